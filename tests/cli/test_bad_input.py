"""What a user can get wrong on the command line, in config files, on stdin and with the base directory.

Errors of `data import` (encodings, JSON lines, mixed folders, names) stand in test_data.py and
tests/unit/data/test_importer.py; a torn or foreign run folder in test_bad_runs.py.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from picollm import hardware
from picollm.locks import hold_lock
from picollm.run_dir import base_dir
from picollm_cli.inspection import Inspection
from picollm_cli.machine_checks import check_device

DRY = ("speedrun", "--preset", "demo", "--run", "new", "--dry-run")


@pytest.mark.parametrize(
    ("arguments", "code", "message", "hint"),
    [
        (("speedrun", "--preset", "demoo"), 2, "unknown preset `demoo`", "`--preset demo`"),
        (("speedrun", "--preset", "zzz"), 2, "unknown preset `zzz`", "choose one"),
        ((*DRY, "--set", "train.stpes=4"), 2, "unknown key `train.stpes`", "`train.steps`"),
        ((*DRY, "--set", "trian.steps=4"), 2, "unknown section `trian`", "`train`"),
        ((*DRY, "--set", "a.b.c=1"), 2, "unknown section `a`", "prints every key"),
        ((*DRY, "--set", "train.steps"), 2, "`--set train.steps` is not `section.key=value`", "train.steps=600"),
        ((*DRY, "--set", "=3"), 2, "`--set =3` is not", "train.steps=600"),
        ((*DRY, "--set", "train=3"), 2, "`train` is a section", "set one of its keys"),
        ((*DRY, "--set", "train.steps=many"), 2, "`train.steps` cannot be", "leave it out"),
        ((*DRY, "--set", "train.steps=-1"), 2, "`train.steps` cannot be -1", "leave it out"),
        ((*DRY, "--set", "seed=99999999999999999999"), 2, "`seed` cannot be", "the default is `42`"),
        ((*DRY, "--set", "model.max_position_embeddings=1000000000000"), 2, "cannot be 1000000000000", "default"),
        ((*DRY, "--set", "train.batch_tokens=7"), 2, "train.batch_tokens", ""),
        ((*DRY, "--config", "none.toml"), 2, "there is no config file `none.toml`", "path of a TOML file"),
        ((*DRY, "--launch", "nproc"), 2, "`--launch nproc` cannot be read", "nproc=8"),
        ((*DRY, "--launch", "nproc=two"), 2, "`--launch nproc=two` is out of range", "nproc=8"),
        ((*DRY, "--launch", "nproc=0"), 2, "`--launch nproc=0` is out of range", "nproc=8"),
        ((*DRY, "--launch", "npoc=2"), 2, "`--launch` knows no `npoc`", "`nproc`"),
        ((*DRY, "--skip", "pretrian"), 2, "knows no stage `pretrian`", "`--skip pretrain`"),
        (("eval", "--suite", "bbp"), 2, "there is no suite `bbp`", "choose one"),
        (("chat", "-p", "hi", "--stage", "stf"), 2, "`stf` is not a training stage", "`--stage sft`"),
        (("chat", "-p", "hi", "--temperature", "inf"), 2, "`temperature` must be", "in range"),
        (("chat", "-p", ""), 2, "the prompt is empty", "give a text"),
        (("chat", "-p", "word " * 300), 2, "does not fit the model's context", "shorten it"),
        (("chat", "-p", "hi", "--system", "word " * 300), 2, "does not fit the model's context", "shorten it"),
        (("chat", "-p", "\udcff"), 2, "the text is not UTF-8", "iconv"),
        (("chat", "-p", "hi", "--system", "\udcff"), 2, "the text is not UTF-8", "iconv"),
        (("tokenizer", "show", "\udcff"), 2, "the text is not UTF-8", "iconv"),
        (("data", "show", "storys"), 4, "there is no dataset `storys`", "did you mean `stories`"),
        (("data", "verify", "zzz"), 4, "there is no dataset `zzz`", "picollm data import zzz"),
        (("data", "show", "../tiny"), 2, "`../tiny` cannot be the name of a dataset", "choose a name"),
        (("chat", "-p", "hi", "--run", "tony"), 4, "there is no run `tony`", "`--run tiny`"),
    ],
    ids=lambda value: " ".join(value)[:60].encode("ascii", "replace").decode() if isinstance(value, tuple) else None,
)
def test_a_wrong_command_line(
    tiny_run: Path, refused: Any, arguments: tuple[str, ...], code: int, message: str, hint: str
) -> None:
    told = refused(code, *arguments).err
    error, _, rest = told.partition("\n")
    assert message in error
    assert hint in rest


@pytest.mark.parametrize("name", ["a/b", "../tiny", ".hidden", "/etc", "tiny\n", "-x", "n" * 200])
@pytest.mark.parametrize(
    "arguments",
    [
        ("chat", "-p", "hi"), ("eval",), ("report",), ("manifest", "write"), ("tokenizer", "show", "hi"),
        ("tokenizer", "train"), ("pretrain",), ("sft",), ("speedrun",), ("doctor",),
    ],
    ids=" ".join,
)  # fmt: skip
def test_no_name_of_a_run_leads_out_of_the_runs(
    tiny_run: Path, refused: Any, arguments: tuple[str, ...], name: str
) -> None:
    assert f"`{name}` cannot be the name of a run" in refused(2, *arguments, f"--run={name}").err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[train\nsteps = 3", "is not valid TOML"),
        (b"\xff\xfe", "is not valid TOML"),
        (b"train = 3", "`train` is a section"),
        (b"[train]\nstpes = 3", "unknown key `train.stpes`"),
        (b"[train]\nsteps = 1979-05-27", "`train.steps` cannot be"),
    ],
)
def test_a_bad_config_file(refused: Any, tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    told = refused(2, "speedrun", "--config", str(path)).err
    assert message in told.splitlines()[0]
    assert str(path) in told


@pytest.mark.parametrize("arguments", [("chat", "-p", "-"), ("chat",), ("tokenizer", "show", "-")], ids=" ".join)
def test_stdin_that_is_not_utf_8(
    tiny_run: Path, refused: Any, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\n")))
    assert "error: the text is not UTF-8\n  cause: " in refused(2, *arguments).err


# -- datasets ---------------------------------------------------------------------------------------------------------


def test_a_dataset_that_is_not_there(tiny_run: Path, refused: Any) -> None:
    told = refused(
        4, "tokenizer", "train", "--preset", "demo", "--run", "new", "--set", "data.dataset=storys", new=True
    )
    assert told.err.startswith("error: there is no dataset `storys`\n  cause: ")
    assert "did you mean `stories`" in told.err


def test_nothing_to_import(refused: Any, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "folder").mkdir()
    for name in ("empty.txt", "folder"):
        assert "error: " in refused(2, "data", "import", "nothing", str(tmp_path / name)).err


def test_a_dataset_that_changed_under_a_trained_run(tiny_run: Path, command: Any, refused: Any, tmp_path: Path) -> None:
    """The tokenizer belongs to the weights: it is not touched once there are any, `--force tokenizer` apart."""
    text = tmp_path / "stories.jsonl"
    text.write_text("".join(json.dumps({"text": f"another story, number {i}"}) + "\n" for i in range(50)))
    was = json.loads(command("data", "show", "stories", "--json").out)["sha256"]
    assert command("data", "import", "stories", str(text), "--force").code == 0
    now = json.loads(command("data", "show", "stories", "--json").out)["sha256"]
    told = refused(2, "tokenizer", "train", "--run", "tiny").err
    assert told.startswith("error: dataset `stories` has changed since run `tiny` was trained on it\n")
    assert was[:12] in told and now[:12] in told
    assert "--run NAME" in told and "picollm speedrun --run tiny --force tokenizer" in told
    # Without its record the tokenizer is no less the model's.
    (tiny_run / "tokenizer/STAGE.json").unlink()
    assert refused(2, "tokenizer", "train", "--run", "tiny").err == told
    # A run without weights is free to follow.
    for stage in ("pretrain", "sft"):
        shutil.rmtree(tiny_run / stage)
    assert command("tokenizer", "train", "--run", "tiny").code == 0


# -- this machine -----------------------------------------------------------------------------------------------------


def test_a_disk_without_room(tiny_run: Path, refused: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("text " * 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=2**30, used=2**30 - 100, free=100))
    for arguments in (
        ("speedrun", "--preset", "demo", "--run", "new"),
        ("tokenizer", "train", "--run", "tiny"),
        ("pretrain", "--run", "tiny"),
        ("sft", "--run", "tiny"),
    ):
        told = refused(3, *arguments).err
        assert "does not fit on the disk\n  cause: it needs about" in told
        assert "PICOLLM_BASE_DIR" in told
    refused(3, "data", "import", "new", str(text))


def test_a_run_that_another_process_works_on(tiny_run: Path, refused: Any) -> None:
    with hold_lock(tiny_run / "lock", "run"):
        for arguments in (("speedrun",), ("pretrain",), ("eval",), ("tokenizer", "train"), ("manifest", "write")):
            told = refused(3, *arguments, "--run", "tiny").err
            assert told.startswith(f"error: run `tiny` is in use by another process\n  cause: process {os.getpid()} ")


@pytest.mark.parametrize(
    "arguments",
    [
        ("speedrun", "--preset", "demo"), ("tokenizer", "train", "--preset", "demo"), ("data", "show", "toy-world"),
        ("data", "import", "notes", "a.txt"),
    ],
    ids=" ".join,
)  # fmt: skip
@pytest.mark.parametrize("where", ["file/base", "n" * 300])
def test_a_base_directory_that_cannot_be(
    command: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: tuple[str, ...], where: str
) -> None:
    """Below a file and with a name that is too long nobody can make a directory, root included."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("kept")
    (tmp_path / "a.txt").write_text("some text")
    monkeypatch.setenv("PICOLLM_BASE_DIR", str(tmp_path / where))
    ended = command(*arguments)
    assert ended.code == 3
    assert ended.err.startswith("error: cannot ") and "\nhint: " in ended.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "file"]
    assert (tmp_path / "file").read_text() == "kept"


def test_without_a_home_directory(command: Any, monkeypatch: pytest.MonkeyPatch, tiny_run: Path) -> None:
    import pwd

    def nobody(uid: int) -> None:
        raise KeyError(uid)

    for name in ("HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    # A container whose user is only a number: with a base directory all is well.
    assert base_dir() == tiny_run.parent.parent
    assert command(*DRY).code == 0
    monkeypatch.delenv("PICOLLM_BASE_DIR")
    ended = command("runs")
    assert ended.code == 3
    assert ended.err.startswith("error: there is no home directory for `~/.local/share`\n  cause: HOME is not set")
    assert "PICOLLM_BASE_DIR" in ended.err


def test_a_gpu_that_torch_was_not_built_for_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpu = hardware.Gpu(0, "NVIDIA GeForce RTX 4060", 8 * 2**30, (8, 9), "570.1")
    version = tmp_path / "version.py"
    monkeypatch.setattr(hardware, "detect_gpus", lambda: (gpu,))
    monkeypatch.setattr(
        hardware.metadata, "distribution", lambda name: SimpleNamespace(locate_file=lambda path: version)
    )
    for line, gpus in (("cuda: Optional[str] = None", ()), ("cuda: Optional[str] = '12.8'", (gpu,)), ("", (gpu,))):
        version.write_text(f"__version__ = '2.13.0'\n{line}\nhip: Optional[str] = None\n")
        assert hardware.detect().gpus == gpus
    version.write_text("cuda: Optional[str] = None\n")
    told = check_device(Inspection(preset="demo"))
    assert told.level == "warn"
    assert "RTX 4060 is not used, because this torch is a CPU build" in told.detail
    version.unlink()
    assert hardware.detect().gpus == (gpu,)


# -- interrupted ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        (("data", "import", "notes", "a.txt"), "picollm.data.spill.Spill.add"),
        (("tokenizer", "train", "--preset", "demo", "--run", "new", "--set", "data.dataset=stories"),
         "picollm.tokenizer.stage.train"),
        (("report", "--run", "tiny"), "picollm.report.build.render"),
        (("manifest", "write", "--run", "tiny"), "picollm.manifest.sha256_file"),
        (("chat", "-p", "hi"), "picollm.generate.session.load_model"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, tuple) else None,
)  # fmt: skip
def test_ctrl_c(
    tiny_run: Path,
    command: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: tuple[str, ...],
    where: str,
) -> None:
    def interrupt(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("some text")
    before = {path: path.read_bytes() for path in tiny_run.rglob("*") if path.is_file()}
    monkeypatch.setattr(where, interrupt)
    ended = command(*arguments)
    assert ended.code == 130
    assert ended.err.startswith("error: interrupted\n")
    assert all(path.read_bytes() == content for path, content in before.items())
    base = tiny_run.parent.parent
    assert not (base / "datasets/notes").exists()
    assert not list(base.rglob("*.tmp"))
    # Whoever comes next finds no lock in the way.
    with hold_lock(tiny_run / "lock", "run"):
        pass


def test_a_reader_that_leaves_at_once(tiny_run: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "picollm_cli", "runs"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout and process.stderr
    process.stdout.close()
    told = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 141
    assert told == b""


@pytest.mark.parametrize("arguments", [("speedrun",), ("pretrain",), ("tokenizer", "train")])
@pytest.mark.parametrize("where", ["data.dataset", "sft.mix"])
def test_a_missing_dataset_leaves_no_run_behind(
    command: Any, clean_environment: Path, tmp_path: Path, arguments: tuple[str, ...], where: str
) -> None:
    config = tmp_path / "own.toml"
    config.write_text('[data]\ndataset = "gone"\n' if where == "data.dataset" else '[[sft.mix]]\ndataset = "gone"\n')
    ended = command(*arguments, "--preset", "demo", "--run", "new", "--config", str(config))
    assert ended.code == 4 and ended.err.startswith("error: there is no dataset `gone`\n")
    assert "picollm data import gone PATH…" in ended.err
    assert not list(clean_environment.rglob("*"))
