"""What all tests on a GPU need: they compile, and torch warns of more there than elsewhere."""

from __future__ import annotations

from pathlib import Path

import jaxtyping
import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Torch's warnings are no errors: of its own prototypes (`set_sync_debug_mode`), of TF32, while tracing.

    They come once in a process, and as errors would end the test, or the compilation, that they come in.
    """
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.filterwarnings("default"))


def pytest_runtest_setup() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if not jaxtyping.config.jaxtyping_disable:
        pytest.fail("run it with JAXTYPING_DISABLE=1: checks of shapes cannot be compiled", pytrace=False)
