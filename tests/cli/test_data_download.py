"""`picollm data download` and what `speedrun` fetches: real processes, the real client, a server on this machine."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from hub_server import Hub, Status, shard
from rich.console import Console

from picollm.data import order
from picollm.data.datasets import Dataset
from picollm.data.download import State
from picollm.data.pinned import pin
from picollm.data.registry import REGISTRY, HubSource, Registered
from picollm.errors import HostError
from picollm.locks import hold_lock
from picollm_cli.commands.speedrun import Job
from picollm_cli.console import Output
from picollm_cli.downloading import _display, line
from picollm_cli.launch_line import Launch

if TYPE_CHECKING:
    from conftest import Command

ROOT = Path(__file__).parents[2]
SET = "hf:org/set"


def start(*arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "picollm_cli", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def half_way(hub: Hub, process: subprocess.Popen[str], sent: int = 20_000) -> None:
    deadline = time.monotonic() + 30
    while hub.sent < sent:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def climbmix(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The registry's `climbmix` is the small dataset of the server, with as many characters a shard as it has."""
    source = HubSource("org/set", validation="shard_00005.parquet")
    chars = sum(map(len, shard(0)))
    monkeypatch.setitem(REGISTRY, "climbmix", Registered(source, 5, chars, len(hub.files["shard_00000.parquet"])))
    return hub


def test_download_says_what_comes_and_then_there_is_nothing_to_do(hub: Hub, command: Command) -> None:
    ended = command("data", "download", SET, "--shards", "3")
    assert ended.code == 0, ended.err
    assert f"dataset `set`: 3 training and 1 validation shards of org/set at {hub.commit[:12]}, 50" in ended.err
    assert ended.out.startswith("dataset `set` is complete and verified after ")
    assert "3 training shards, 160 rows" in ended.out
    hub.requests.clear()
    for arguments in (("data", "download", SET, "--shards", "3"), ("data", "download", "set")):
        ended = command(*arguments)
        assert ended.out.endswith("nothing to do\n")
    assert hub.requests == []
    result = json.loads(command("data", "download", "set", "--shards", "5", "--json").out)
    assert result | {"sha256": "", "path": ""} == {
        "name": "set", "path": "", "sha256": "", "shards": 5, "files": 6, "fetched": 2, "rows": 240,
        "bytes": sum(map(len, hub.files.values())),
        "source": {"hub": "org/set", "revision": hub.commit, "column": "text", "shards": 5},
    }  # fmt: skip


def test_killed_in_the_middle_and_run_again(hub: Hub, command: Command) -> None:
    hub.bytes_per_s = 15_000
    process = start("data", "download", SET, "--shards", "5", "--jobs", "3")
    half_way(hub, process)
    process.kill()
    process.communicate()
    dataset = Dataset.open("set")
    came = {file.name for file in dataset.files} - {file.name for file in dataset.missing()}
    halves = {path.name: path.stat().st_size for path in (dataset.path / "parts").iterdir() if path.stat().st_size}
    assert halves
    hub.bytes_per_s = None
    hub.requests.clear()
    ended = command("data", "download", "set")
    assert ended.code == 0, ended.err
    for name in came:
        assert hub.fetched(name) == []
    assert {name: hub.fetched(name) for name in halves} == {name: [f"bytes={size}-"] for name, size in halves.items()}
    assert Dataset.open("set").verify() == []


def test_ctrl_c_is_clean(hub: Hub) -> None:
    hub.bytes_per_s = 15_000
    process = start("data", "download", SET, "--shards", "5")
    half_way(hub, process, 5000)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.endswith(
        "error: the download was stopped\n  cause: whole files and half ones are kept\n\n"
        "hint: go on with `picollm data download set`\n"
    )


def test_missing_shards_are_named_and_the_exit_code_is_6(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "hf_mostsecretofall"
    hub.token = secret
    monkeypatch.setenv("HF_TOKEN", secret)
    hub.faults = {f"shard_0000{number}.parquet": [Status(404)] for number in (1, 3)}
    process = start("data", "download", SET, "--shards", "4", "--json")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 6
    error = json.loads(out)["error"]
    assert error["type"] == "RemoteError"
    assert error["message"] == "2 of 5 files of dataset `set` are missing"
    assert error["cause"].startswith("shard_00001.parquet, shard_00003.parquet; ")
    assert secret not in out + err
    assert "Signature" not in out + err


def test_list_show_and_verify_of_a_part(hub: Hub, command: Command) -> None:
    hub.faults = {"shard_00001.parquet": [Status(404)]}
    assert command("data", "download", SET, "--shards", "3").code == 6
    assert command("data", "list").out.splitlines()[1].split()[:6] == ["set", "text", "2", "of", "3", "files"]
    shown = command("data", "show", "set")
    assert "2 of 3 files" in shown.out
    assert "40 documents" in shown.out  # validation is here
    splits = json.loads(command("data", "show", "set", "--json").out)
    assert (splits["missing"], splits["splits"]["train"]["rows"]) == (["shard_00001.parquet"], None)
    ended = command("data", "verify", "set")
    assert (ended.code, "1 of 4 files are missing" in ended.err) == (4, True)
    assert "hint: finish it with `picollm data download set`" in ended.err
    assert command("data", "download", "set").code == 0
    os.utime(Dataset.open("set").path / "shard_00000.parquet")
    assert "dataset `set`: 1 files were touched and are hashed again" in command("data", "download", "set").err
    path = Dataset.open("set").path / "shard_00002.parquet"
    path.write_bytes(bytes(path.stat().st_size))
    ended = command("data", "verify", "set")
    assert (ended.code, "shard_00002.parquet: content changed" in ended.err) == (5, True)
    assert "hint: fetch it again with `picollm data download set`" in ended.err
    assert command("data", "download", "set").code == 0
    assert command("data", "verify", "set").code == 0


def test_names_that_mean_nothing(command: Command) -> None:
    ended = command("data", "download", "climbmux", "--shards", "3")
    assert (ended.code, "did you mean `picollm data download climbmix`?" in ended.err) == (2, True)
    ended = command("pretrain", "--preset", "d12")
    assert (ended.code, "get it with `picollm data download climbmix --shards N`" in ended.err) == (4, True)
    check = json.loads(command("doctor", "dataset", "--preset", "d12", "--json").out)["checks"][0]
    assert (check["level"], check["detail"].partition(";")[0]) == ("ok", "`climbmix` is downloaded when needed")


def test_a_dry_run_knows_the_download_offline(command: Command) -> None:
    ended = command("speedrun", "--preset", "d12", "--dry-run")
    assert ended.code == 0
    assert "about 2.3 GiB, 50 s at 50 MB/s" in ended.out
    plan = json.loads(command("speedrun", "--preset", "d12", "--dry-run", "--json").out)
    assert plan["download_gib"] == pytest.approx(25 * 0.1e9 / 2**30, rel=0.01)
    assert plan["disk_gib"] > plan["download_gib"]
    assert plan["stages"][0] == {"name": "data", "time_s": 50.0, "steps": None, "tokens": None}


SHAPE = (
    "--preset", "cpu-small", "--set", "data.dataset=climbmix", "--set", "train.batch_tokens=1024", "--set",
    "model.hidden_size=64", "--set", "model.num_hidden_layers=2", "--set", "model.head_dim=32", "--set",
    "model.max_position_embeddings=128", "--set", "tokenizer.vocab_size=300", "--set", "tokenizer.max_chars=20000",
)  # fmt: skip
LEFT_OUT = ("--skip", "sft", "--skip", "eval", "--skip", "report", "--skip", "manifest")


def test_speedrun_fetches_and_trains(climbmix: Hub, command: Command) -> None:
    climbmix.bytes_per_s = 40_000
    # 12 steps of 1,024 tokens at 4.5 characters are more than three shards hold.
    ended = command("speedrun", *SHAPE, *LEFT_OUT, "--run", "one", "--set", "train.steps=12", "--json")
    assert ended.code == 0, ended.err
    first = Dataset.open("climbmix")
    assert len(first.of("train")) == 4
    # The tokenizer's shards were asked for first, and it did not wait for the last one.
    order = [text for text in ended.err.splitlines() if text.startswith(("[2/7]", "[3/7]", "downloading"))]
    assert order[0].startswith("[2/7] tokenizer")
    assert json.loads(ended.out.splitlines()[-1])["stages"]["pretrain"]["tokens"] == 12 * 1024

    # A longer run takes more shards; the first one keeps its own, also when it starts over.
    climbmix.bytes_per_s = None
    ended = command("speedrun", *SHAPE, *LEFT_OUT, "--run", "two", "--skip", "pretrain", "--set", "train.steps=99")
    assert ended.code == 0, ended.err
    runs = Path(os.environ["PICOLLM_BASE_DIR"]) / "runs"
    # One was trained while the shards came, one when they were here.
    assert len({(runs / run / "tokenizer/tokenizer.json").read_bytes() for run in ("one", "two")}) == 1
    assert len(Dataset.open("climbmix").of("train")) == 5
    assert not Dataset.open("climbmix").unverified()
    ended = command("speedrun", "--run", "one", *LEFT_OUT, "--json")
    stages = json.loads(ended.out)["stages"]
    assert {stages[name]["state"] for name in ("data", "tokenizer", "pretrain")} == {"already done"}, ended.err
    config = json.loads((runs / "one/pretrain/config.json").read_bytes())
    assert config["recipe"]["data"][0]["sha256"] == first.sha256 != Dataset.open("climbmix").sha256

    # A shard that was changed since is never trained on: it is refused, or fetched again where a stage may.
    path = first.path / "shard_00002.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    ended = command("speedrun", "--run", "one", *LEFT_OUT, "--skip", "data", "--force", "pretrain")
    assert (ended.code, "shard_00002.parquet` of dataset `climbmix` is damaged" in ended.err) == (5, True)


def test_speedrun_does_not_train_on_a_part(climbmix: Hub, command: Command) -> None:
    climbmix.faults = {"shard_00003.parquet": [Status(404)]}
    ended = command("speedrun", *SHAPE, *LEFT_OUT, "--run", "one", "--set", "train.steps=12")
    assert (ended.code, "error: 1 of 5 files of dataset `climbmix` are missing" in ended.err) == (6, True)
    run = Path(os.environ["PICOLLM_BASE_DIR"]) / "runs/one"
    assert (run / "tokenizer/STAGE.json").exists()  # its shards were there
    assert not (run / "pretrain/config.json").exists()
    ended = command("pretrain", "--run", "one")
    assert (ended.code, "finish it with `picollm data download climbmix`" in ended.err) == (4, True)


def test_a_dataset_is_free_again_when_it_is_complete(hub: Hub) -> None:
    """Training takes hours, in which another run may want more shards of the same dataset."""
    dataset = pin("set", HubSource("org/set"), shards=2)
    prepared: Any = SimpleNamespace(run=None)
    with Job(Output(), prepared, Launch(), None) as job:
        job.working = True
        job.fetch(dataset)
        with pytest.raises(HostError, match="in use"), hold_lock(dataset.path / ".lock", "the dataset"):
            pass
        job.finish_downloads()
        with hold_lock(dataset.path / ".lock", "the dataset"):
            assert not dataset.missing()


def test_the_page_about_data(hub: Hub, command: Command) -> None:
    """Every `sh` block of docs/data.md, with the Hub's datasets as small as this server's."""
    page = (ROOT / "docs/data.md").read_text()
    lines = "".join(re.findall(r"^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL)).splitlines()
    assert len(lines) == 5
    hub.repo = REGISTRY["climbmix"].source.repo
    hub.files["shard_06542.parquet"] = hub.files.pop("shard_00005.parquet")
    for typed in lines:
        ended = command(*shlex.split(typed)[1:])
        assert ended.code == 0, (typed, ended.err)
    assert [file.name for file in Dataset.open("climbmix").of("validation")] == ["shard_06542.parquet"]
    for name, registered in REGISTRY.items():
        row = next(row for row in page.splitlines() if row.startswith(f"| `{name}` |"))
        assert f"`{registered.source.repo}`: {registered.num_shards:,} shards" in row
        assert row.endswith(f"| `{registered.source.validation}` |")


def test_a_large_dataset_that_nobody_shuffled_is_told_with_the_remedy(
    climbmix: Hub, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "shuffle" not in command("data", "download", "climbmix", "--shards", "3").err
    monkeypatch.delitem(REGISTRY, "climbmix")
    assert "shuffle" not in command("data", "download", SET, "--shards", "3").err  # 120 rows are shuffled whole
    monkeypatch.setattr(order, "WHOLE_SHUFFLE_DOCUMENTS", 119)
    told = " ".join(command("data", "download", SET).err.split())
    assert "`set` has more than 119 documents" in told and "in blocks of 1,024 neighbours" in told
    assert "in blocks of 1,024 neighbours" in " ".join(command("data", "show", "set").out.split())
    remedy = re.search(r"`picollm (data import set-shuffled [^`]*)`", told)
    assert remedy, told
    *words, pattern, option, column = shlex.split(remedy[1])
    ended = command(*words, *map(str, Path("/").glob(pattern[1:])), option, column)
    assert ended.code == 0, ended.err
    copy, texts = Dataset.open("set-shuffled"), [text for number in (0, 1, 2, 5) for text in shard(number)]
    found = [*copy.documents("train"), *copy.documents("validation")]
    assert sorted(found) == sorted(texts) and copy.is_shuffled
    assert "neighbours" not in command("data", "show", "set-shuffled", "--rows", "0").out


def test_what_a_terminal_and_a_pipe_see() -> None:
    state = State(3, 9, 300 << 20, 900 << 20, 60 << 20, [("a.parquet", 40 << 20, 100 << 20)])
    assert line("set", state) == "downloading set: 3 of 9 files, 300 MiB of 900 MiB, 60.0 MiB/s, about 10 s left"
    assert "left" not in line("set", replace(state, rate=0.0))
    out = Output()
    shown = StringIO()
    out.stderr = Console(file=shown, force_terminal=True, width=120, color_system=None)
    with _display(out, "set") as show:
        show(state)
        show(replace(state, active=[("b.parquet", 0, 1)]))
        show(replace(state, active=[]))
    text = shown.getvalue()
    assert "3/9 files, 60.0 MiB/s, 10 s left" in text
    assert "b.parquet" in text


def test_offline_is_said(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    _, err = (process := start("data", "download", SET, "--shards", "2")).communicate(timeout=60)
    assert (process.returncode, "unset HF_HUB_OFFLINE" in err) == (6, True)
