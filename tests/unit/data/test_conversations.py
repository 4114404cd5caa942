"""The one conversation type: what is accepted, what is refused and why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from picollm.data.conversations import Conversation, EmptyMessage, Message, Part


def user(text: object = "hi") -> dict:
    return {"role": "user", "content": text}


def assistant(content: object = "hello") -> dict:
    return {"role": "assistant", "content": content}


def system(text: object = "be brief") -> dict:
    return {"role": "system", "content": text}


def part(kind: object, text: object) -> dict:
    return {"type": kind, "text": text}


TOOL_REPLY = [
    part("text", "Let me see. "),
    part("python", "7+5"),
    part("python_output", "12"),
    part("text", "It is 12."),
]


@pytest.mark.parametrize(
    "messages",
    [
        [user(), assistant()],
        [system(), user(), assistant()],
        [user(), assistant(), user("more"), assistant("ok")],
        [user(), assistant(TOOL_REPLY)],
        [user(), assistant([part("python", "1"), part("python_output", "")])],
    ],
)
def test_round_trip_keeps_everything(messages: list[dict]) -> None:
    parsed = Conversation.from_json({"messages": messages, "id": 3})
    assert parsed.to_json() == {"messages": messages}
    assert Conversation.from_json(json.loads(json.dumps(parsed.to_json()))) == parsed


def test_parts_and_text_of_a_tool_reply() -> None:
    reply = Conversation.from_json({"messages": [user(), assistant(TOOL_REPLY)]}).messages[1]
    assert reply.parts == (
        Part("text", "Let me see. "), Part("python", "7+5"), Part("output", "12"), Part("text", "It is 12."),
    )  # fmt: skip
    assert reply.text == "Let me see. It is 12."


def test_one_text_part_becomes_a_string() -> None:
    assert Message("assistant", (Part("text", "x"),)).to_json() == assistant("x")


def test_chars_count_every_part() -> None:
    assert Conversation.from_json({"messages": [user("abc"), assistant(TOOL_REPLY)]}).num_chars == 3 + 12 + 3 + 2 + 9


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([user()], "object with a list `messages`"),
        ({"messages": "hi"}, "object with a list `messages`"),
        ({"messages": []}, "`messages` is empty"),
        ({"messages": ["hi"]}, "message 1 is a string"),
        ({"messages": [assistant()]}, "message 1 has role `assistant` where `user` must follow"),
        ({"messages": [user(), user()]}, "message 2 has role `user` where `assistant`"),
        ({"messages": [user()]}, "the last message is of the user"),
        ({"messages": [system()]}, "the last message is of the system"),
        ({"messages": [user(), system(), assistant()]}, "message 2 has role `system`, which is allowed only at the"),
        ({"messages": [system(), system(), assistant()]}, "message 2 has role `system`"),
        ({"messages": [{"role": "human", "content": "x"}, assistant()]}, "message 1 has role `human`; roles are"),
        ({"messages": [{"content": "x"}, assistant()]}, "role missing or null"),
        ({"messages": [user(5), assistant()]}, "content of message 1 .user. is a number"),
        ({"messages": [user([part("text", "x")]), assistant()]}, "is a list; it must be a string"),
        ({"messages": [user(), assistant(None)]}, "missing or null; it must be a string or a list of parts"),
        ({"messages": [user(), assistant(["x"])]}, "part 1 of message 2 is a string"),
        ({"messages": [user(), assistant([part("image", "x")])]}, "type 'image'; types are text, python"),
        ({"messages": [user(), assistant([part(["text"], "x")])]}, "types are text, python"),
        ({"messages": [user(), assistant([part("text", 1)])]}, "text of part 1 of message 2 is a number"),
        ({"messages": [user(), assistant([part("python", "1")])]}, "ends with a `python` part"),
        ({"messages": [user(), assistant([part("python", "1"), part("text", "x")])]}, "its `python_output` must come"),
        ({"messages": [user(), assistant([part("python_output", "1")])]}, "without a `python` part before it"),
        ({"messages": [user(), assistant([part("python", " "), part("python_output", "1")])]}, "empty `python` part"),
    ],
)
def test_refusals_say_why(value: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        Conversation.from_json(value)
    assert not isinstance(caught.value, EmptyMessage)


@pytest.mark.parametrize("content", ["", " \n", [], [part("text", " ")]])
def test_an_empty_message_is_its_own_reason(content: object) -> None:
    with pytest.raises(EmptyMessage, match=r"message 2 \(assistant\) is empty"):
        Conversation.from_json({"messages": [user(), assistant(content)]})


def test_real_dialogues_parse(shared_data: Path) -> None:
    """One of the 400 ends with an empty reply of the assistant; all others survive the round trip."""
    lines = (shared_data / "conversations/schema-guided-test.jsonl").read_text(encoding="utf-8").splitlines()
    empty = 0
    for line in lines:
        try:
            assert Conversation.from_json(json.loads(line)).to_json() == json.loads(line)
        except EmptyMessage:
            empty += 1
    assert (len(lines), empty) == (400, 1)
