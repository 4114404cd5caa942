"""A run folder that is torn, tampered with, or of another version: every reader refuses, and nothing is touched."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from picollm.errors import IntegrityError
from picollm.run_dir import RunDir

Damage = Callable[[Path], None]
WEIGHTS = "sft/checkpoints/step_000010/model.safetensors"
META = "sft/checkpoints/step_000010/meta.json"
SUMS = "sft/checkpoints/step_000010/SHA256SUMS"
CHAT, EVAL, SFT = ("chat", "-p", "hi"), ("eval", "--suite", "bpb"), ("sft",)
REPORT, TRAIN, SHOW = ("report",), ("tokenizer", "train"), ("tokenizer", "show", "hi")
MANIFEST, SPEEDRUN = ("manifest", "write"), ("speedrun", "--run", "tiny")


def torn(name: str) -> Damage:
    return lambda run: (run / name).write_bytes((run / name).read_bytes()[: (run / name).stat().st_size // 2]) and None


def flipped(name: str) -> Damage:
    def damage(run: Path) -> None:
        data = bytearray((run / name).read_bytes())
        data[len(data) // 2] ^= 1
        (run / name).write_bytes(data)

    return damage


def content(name: str, data: bytes) -> Damage:
    return lambda run: (run / name).write_bytes(data) and None


def with_value(name: str, key: str, value: Any) -> Damage:
    """One top-level key of a JSON file changed; None takes it out."""

    def damage(run: Path) -> None:
        values = json.loads((run / name).read_text())
        values.pop(key, None)
        (run / name).write_text(json.dumps(values | ({} if value is None else {key: value})))

    return damage


def gone(name: str) -> Damage:
    return lambda run: (run / name).unlink()


def rehash(folder: Path) -> None:
    """Make a checkpoint's list of hashes agree with its files, as somebody would who means harm."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "SHA256SUMS")
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder).as_posix()}" for path in files
    ]
    (folder / "SHA256SUMS").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("damage", "commands", "message", "hint"),
    [
        (torn("config.json"), (EVAL, REPORT, TRAIN, SPEEDRUN), "config.json` is not readable JSON", "restore it"),
        (content("config.json", b"\xff\xfe\0{"), (EVAL, REPORT), "config.json` is not readable JSON", "restore it"),
        (content("config.json", b"[" * 200_000), (REPORT, SPEEDRUN), "config.json` is not readable JSON", "restore"),
        (with_value("config.json", "schema", 7), (EVAL, REPORT, TRAIN, ("pretrain",), SFT, SPEEDRUN),
         "config.json` was written by another version of picollm", "--run NAME"),
        (with_value("config.json", "schema", None), (REPORT,), "was written by another version", "--run NAME"),
        (with_value("config.json", "config", None), (EVAL, REPORT, ("tokenizer", "eval")), "is torn or was edited", ""),
        (with_value("config.json", "config", {"zzz": 1}), (EVAL, SPEEDRUN, ("tokenizer", "eval")),
         "does not hold a valid config", "undo the edit"),
        (torn("sft/STAGE.json"), (CHAT, EVAL, REPORT, MANIFEST), "sft/STAGE.json` is not readable JSON", "remove it"),
        (content("sft/STAGE.json", b""), (CHAT, EVAL), "sft/STAGE.json` is not readable JSON", "remove it"),
        (content("sft/STAGE.json", b'{"schema": 1}'), (CHAT, EVAL, REPORT, MANIFEST), "STAGE.json` is torn", "remove"),
        (content("sft/STAGE.json", b'{"schema": 1, "inputs": {}, "result": {}, "outputs": {"a": 1}}'),
         (CHAT, MANIFEST), "STAGE.json` is torn or was edited", "remove it"),
        (with_value("sft/STAGE.json", "schema", 2), (CHAT, EVAL, REPORT), "another version of picollm", "--run NAME"),
        (torn("pretrain/STAGE.json"), (SFT, REPORT), "pretrain/STAGE.json` is not readable JSON", "remove it"),
        (torn("sft/config.json"), (EVAL, REPORT), "sft/config.json` is not readable JSON", "--run tiny --force sft"),
        (content("sft/config.json", b'{"schema": 1}'), (EVAL, REPORT), "sft/config.json` is torn", "--force sft"),
        (with_value("pretrain/config.json", "schema", 0), (REPORT, ("pretrain",)), "another version of picollm", ""),
        (torn("tokenizer/tokenizer.json"), (CHAT, SHOW), "tokenizer.json` is not the file that was recorded",
         "picollm tokenizer train --run tiny"),
        (flipped("tokenizer/tokenizer.json"), (CHAT, SHOW), "is not the file that was recorded", "tokenizer train"),
        (torn("tokenizer/STAGE.json"), (CHAT, SHOW, TRAIN), "tokenizer/STAGE.json` is not readable JSON", "remove it"),
        (flipped(WEIGHTS), (CHAT,), "model.safetensors` is damaged", "restore the file"),
        (torn(WEIGHTS), (CHAT,), "model.safetensors` is damaged", "restore the file"),
        (gone(WEIGHTS), (CHAT,), "model.safetensors` is missing", "restore the file"),
        (flipped(META), (CHAT,), "meta.json` is damaged", "restore the file"),
        (torn(SUMS), (CHAT, EVAL), "SHA256SUMS` is torn or was edited", "restore the file"),
        (gone(SUMS), (CHAT, EVAL), "has no list of hashes", "restore the file"),
        (content(SUMS, b"\xff"), (CHAT, EVAL), "has no list of hashes", "restore the file"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused_by_all_who_read_it(
    tiny_run: Path, refused: Any, damage: Damage, commands: tuple[tuple[str, ...], ...], message: str, hint: str
) -> None:
    damage(tiny_run)
    for arguments in commands:
        told = refused(5, *arguments).err
        assert message in told.splitlines()[0]
        assert hint in told


def test_a_lost_tokenizer_names_the_command(tiny_run: Path, refused: Any) -> None:
    (tiny_run / "tokenizer/tokenizer.json").unlink()
    for arguments in (CHAT, SHOW):
        assert "make it with `picollm tokenizer train --run tiny`" in refused(4, *arguments).err


def test_damage_in_one_run_does_not_hide_the_others(tiny_run: Path, command: Any) -> None:
    shutil.copytree(tiny_run, tiny_run.parent / "other")
    torn("config.json")(tiny_run)
    ended = command("runs", "--json")
    assert ended.code == 0
    assert "warning: run `tiny` is left out: " in ended.err
    told = json.loads(ended.out)
    assert [row["run"] for row in told["runs"]] == ["other"]
    assert [(row["run"], row["error"]["exit_code"]) for row in told["torn"]] == [("tiny", 5)]
    shutil.rmtree(tiny_run.parent / "other")
    assert "there is no run" not in command("runs").err


def test_damaged_weights_end_an_evaluation(tiny_run: Path, refused: Any) -> None:
    """The worker's error comes back as it was; what it had prepared may stay."""
    flipped(WEIGHTS)(tiny_run)
    told = refused(5, *EVAL, new=True).err
    assert "model.safetensors` is damaged\n  cause: its sha256 is" in told
    assert not (tiny_run / "eval/sft-bpb/STAGE.json").exists()


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b'{"schema": 2}'])
def test_torn_results_of_an_evaluation(tiny_run: Path, command: Any, refused: Any, data: bytes) -> None:
    stage = RunDir(tiny_run).eval_stage("sft", "bpb")
    results = stage.path / "results.json"
    results.parent.mkdir(parents=True)
    results.write_bytes(data)
    stage.write_record({"recipe": "a" * 64}, [results], {})
    assert f"`{results}`" in refused(5, *REPORT).err


# -- checkpoints of somebody who means harm ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": 10**9}, "do not fit its architecture"),
        ({"hidden_size": 10**30}, "do not fit its architecture"),
        ({"intermediate_size": 2**50}, "do not fit its architecture"),
        ({"num_hidden_layers": 10**9}, "do not fit its architecture"),
        ({"vocab_size": 10**12}, "do not fit its architecture"),
        ({"vocab_size": 448}, "has another vocabulary than its tokenizer"),
        ({"max_position_embeddings": 10**12}, "describes no model we know"),
        ({"num_attention_heads": 0}, "describes no model we know"),
    ],
    ids=str,
)
def test_sizes_are_checked_before_memory_is_taken(
    tiny_run: Path, refused: Any, values: dict[str, int], message: str
) -> None:
    meta = json.loads((tiny_run / META).read_text())
    meta["model"] |= values
    (tiny_run / META).write_text(json.dumps(meta))
    rehash((tiny_run / META).parent)
    assert message in refused(5, *CHAT).err.splitlines()[0]


def test_a_header_longer_than_the_file(tiny_run: Path, refused: Any) -> None:
    (tiny_run / WEIGHTS).write_bytes((2**60).to_bytes(8, "little") + b"{}")
    rehash((tiny_run / WEIGHTS).parent)
    assert "cannot be read as safetensors\n  cause: " in refused(5, *CHAT).err


def test_a_meta_without_a_tokenizer(tiny_run: Path, refused: Any) -> None:
    with_value(META, "tokenizer_sha256", None)(tiny_run)
    rehash((tiny_run / META).parent)
    assert "meta.json` is torn or was edited\n  cause: it names no tokenizer" in refused(5, *CHAT).err


# -- going on from what is left ---------------------------------------------------------------------------------------


def test_a_damaged_checkpoint_never_costs_an_intact_one(tiny_run: Path, command: Any) -> None:
    """Resume falls back and sets the damaged one aside, so that no good one below it is pruned for it."""
    import torch

    from picollm.attention_choice import AttentionChoice
    from picollm.config.recipe import TrainRecipe, TrainRuntime
    from picollm.train import checkpoint
    from picollm.train.step import build_trainer

    stage = RunDir(tiny_run).stage("sft")
    config = stage.read_config()
    recipe, runtime = (
        TrainRecipe.model_validate(config["recipe"]),
        TrainRuntime.model_validate(config["runtime"]),
    )
    damaged = stage.checkpoints / "step_000020"
    shutil.copytree(stage.checkpoints / "step_000010", damaged)
    flipped("sft/checkpoints/step_000020/model.safetensors")(tiny_run)
    bytes_of_damaged = (damaged / "model.safetensors").read_bytes()
    junk = stage.checkpoints / "step_999999999"
    junk.mkdir()
    (junk / "note").write_text("junk")

    trainer = build_trainer(recipe, runtime, AttentionChoice("sdpa", None, "test"), torch.device("cpu"))
    meta, warnings = checkpoint.resume(stage, trainer.model, trainer.optimizer)
    assert meta is not None and meta["step"] == 10
    assert [warning.split(" is")[0] for warning in warnings] == ["checkpoint of step 20"]
    saver = checkpoint.Saver(stage, 0, 1, keep_last=1, asynchronous=False)
    saver.save(15, trainer.model, trainer.optimizer, {"tokenizer_sha256": recipe.tokenizer_sha256})
    names = sorted(path.name for path in stage.checkpoints.iterdir())
    assert names == ["step_000015", "step_000020.damaged", "step_999999999"]
    assert (stage.checkpoints / "step_000020.damaged/model.safetensors").read_bytes() == bytes_of_damaged
    assert json.loads(command(*CHAT, "--json").out)["step"] == 15


def test_with_every_checkpoint_damaged_pretraining_refuses(tiny_run: Path) -> None:
    (tiny_run / "pretrain/STAGE.json").unlink()
    shutil.copytree(tiny_run / "pretrain/checkpoints/step_000010", tiny_run / "pretrain/checkpoints/step_000005")
    for step in ("step_000005", "step_000010"):
        flipped(f"pretrain/checkpoints/{step}/model.safetensors")(tiny_run)
    before = {path: path.read_bytes() for path in (tiny_run / "pretrain/checkpoints").rglob("*") if path.is_file()}
    done = subprocess.run(
        [sys.executable, "-m", "picollm.stages.pretrain", str(tiny_run / "pretrain")], capture_output=True, timeout=120
    )
    assert done.returncode == IntegrityError.exit_code
    told = json.loads((tiny_run / "pretrain/log/error.json").read_text())
    assert told["message"] == "no checkpoint of stage `pretrain` is intact"
    assert told["hint"].endswith("`picollm speedrun --run tiny --force pretrain`")
    assert {path: path.read_bytes() for path in before} == before
    assert not (tiny_run / "pretrain/STAGE.json").exists()


@pytest.mark.parametrize("arguments", [("pretrain",), ("tokenizer", "train"), ("speedrun",)])
def test_a_mistyped_run_is_not_made(refused: Any, tiny_run: Path, arguments: tuple[str, ...]) -> None:
    """A run of defaults under the wrong name would be the newest one, which reading commands take."""
    wrong = f"{tiny_run.name}x"
    assert f"did you mean `--run {tiny_run.name}`?" in refused(4, *arguments, "--run", wrong).err
    assert not tiny_run.with_name(wrong).exists()
