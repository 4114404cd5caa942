from __future__ import annotations

import time

import pytest

from picollm.generate.tools import MAX_CHARS, calculate


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("7+5", "12"),
        (" 7 - 12 ", "-5"),
        ("2+3*4", "14"),
        ("(2+3)*4", "20"),
        ("8/2", "4"),
        ("7/2", "3.5"),
        ("7//2", "3"),
        ("-7//2", "-4"),
        ("7%4", "3"),
        ("--3", "3"),
        ("+3", "3"),
        ("0.1+0.2", "0.3"),
        ("1/3", "0.3333333333"),
        ("1,000+24", "1024"),
        ("12345678901234567890*10", "123456789012345678900"),
        ("0-0", "0"),
    ],
)
def test_arithmetic(expression: str, result: str) -> None:
    assert calculate(expression) == result


@pytest.mark.parametrize(
    "expression",
    [
        "",
        " ",
        "7+",
        "1/0",
        "5%0",
        "2**9",
        "9**9**9",
        "1 2",
        "7,5",
        "f(3)",
        "(3)(4)",
        "3 .real",
        "()",
        "1e9",
        "0x10",
        "True",
        "'a'*3",
        "__import__('os')",
        "7=7",
        "(" * 50 + "1",
        "1" * (MAX_CHARS + 1),
    ],
)
def test_what_is_not_taken_has_no_result(expression: str) -> None:
    assert calculate(expression) is None


def test_white_space_around_is_no_matter() -> None:
    assert calculate("\n7+5\n") == "12"


def test_longest_expressions_are_quick() -> None:
    worst = ["*".join(["9" * 9] * 10), "-" * (MAX_CHARS - 1) + "1", "(" * 49 + "1" + ")" * 49, "9" * MAX_CHARS]
    started = time.process_time()
    for expression in worst:
        assert calculate(expression) is not None
    assert time.process_time() - started < 0.5
