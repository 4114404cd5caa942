"""Every test starts in a clean environment with its own base directory."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from hub_server import Hub

# Tests are imported by path; `hub_server` is what several rooms of them share.
sys.path.insert(0, str(Path(__file__).parent))

# Before anything imports torch: models this small are faster on one thread, and their sums come in one order.
os.environ["OMP_NUM_THREADS"] = "1"

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs llama.cpp runs wherever its package is installed."""
    if importlib.util.find_spec("xllamacpp") is None:
        for item in items:
            if item.get_closest_marker("llamacpp"):
                item.add_marker(pytest.mark.skip(reason="xllamacpp is not installed"))


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No PICOLLM_*, HF_* or colour variables; XDG folders and the base directory are temporary. Yields the base."""
    for name in list(os.environ):
        if name.startswith(("PICOLLM_", "HF_", "XDG_")) or name in (
            "NO_COLOR",
            "FORCE_COLOR",
            "GITHUB_ACTIONS",
            "TORCHELASTIC_ERROR_FILE",
        ):
            monkeypatch.delenv(name)
    base = tmp_path / "base"
    monkeypatch.setenv("PICOLLM_BASE_DIR", str(base))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    return base


@pytest.fixture
def shared_data() -> Path:
    """Real text beside the checkout; the test is skipped where it is not."""
    if not SHARED_DATA.is_dir():
        pytest.skip("no shared/data beside the checkout")
    return SHARED_DATA


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A Hub on 127.0.0.1 with dataset `org/set` of six small shards, which the real client takes for the Hub."""
    import huggingface_hub.constants
    from hub_server import Hub, parquet, shard
    from huggingface_hub.utils import close_session

    server = Hub({f"shard_{number:05d}.parquet": parquet(shard(number)) for number in range(6)})
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    # The client read its own environment when it was imported.
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "hf/token"))
    yield server
    close_session()
    server.close()
