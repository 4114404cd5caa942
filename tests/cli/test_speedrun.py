"""The order of stages, resuming, skipping and redoing; the workers are fakes that follow the protocol."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy
import pytest
from typer.testing import CliRunner, Result

from picollm.data import toy_world
from picollm.data.conversations import Conversation
from picollm.data.dataset_writer import DatasetWriter
from picollm.errors import ConfigError, HostError, IntegrityError, Interrupted, MissingArtifact
from picollm.events import read_all
from picollm.files import sha256_file, sha256_json, write_json
from picollm.locks import hold_lock
from picollm.run_dir import RunDir
from picollm_cli import launch, prepare
from picollm_cli.commands import speedrun as command
from picollm_cli.console import Output
from picollm_cli.main import app

runner = CliRunner()


@pytest.fixture
def base(clean_environment: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A base with a small text dataset and a small one of conversations, and workers that train nothing."""
    with DatasetWriter("stories", clean_environment) as writer:
        writer.start("text")
        for text in toy_world.documents(40, seed=1):
            writer.add("train", text)
        for text in toy_world.documents(4, seed=2):
            writer.add("validation", text)
        writer.publish({"generator": "test"})
    with DatasetWriter("talks", clean_environment) as writer:
        writer.start("conversations")
        for split, num in (("train", 20), ("validation", 4)):
            for talk in toy_world.conversations(num, seed=num):
                writer.add(split, Conversation.from_json(talk))
        writer.publish({"generator": "test"})
    (tmp_path / "run.toml").write_text('[data]\ndataset = "stories"\n[[sft.mix]]\ndataset = "talks"\n')
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))

    def run_fake(out: Any, stage: Any, module: str, **options: Any) -> dict[str, Any]:
        assert module == f"picollm.stages.{stage.name.split('/')[0]}"
        return launch.run_stage(out, stage, "fake_worker", **options)

    monkeypatch.setattr(command, "run_stage", run_fake)
    return clean_environment


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    return ["speedrun", "--preset", "demo", "--config", str(tmp_path / "run.toml"), "--set", "tokenizer.vocab_size=300"]


def invoke(*arguments: str) -> Result:
    result = runner.invoke(app, list(arguments))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def states(result: Result) -> dict[str, str]:
    return {name: stage["state"] for name, stage in json.loads(result.stdout.splitlines()[-1])["stages"].items()}


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_all_stages_then_nothing_left_to_do(base: Path, arguments: list[str]) -> None:
    run = RunDir(base / "runs" / "demo")
    first = states(invoke(*arguments, "--json"))
    assert list(first) == ["data", "tokenizer", "pretrain", "sft", "eval", "report", "manifest"]
    assert first == {"data": "already done"} | dict.fromkeys(list(first)[1:], "made")
    assert sorted(path.name for path in (run.path / "eval").iterdir()) == ["sft-bpb", "sft-samples"]
    events = read_all(run.events_path)
    commands = [event for event in events if event["kind"] == "command"]
    assert [event["stage"] for event in commands] == [*list(first)[1:4], "eval/sft-bpb", "eval/sft-samples"]
    kinds = [(event["stage"], event["kind"]) for event in events if event["kind"] != "command"]
    assert kinds == [(name, kind) for name in list(first)[1:-1] for kind in ("stage_start", "stage_end")]
    environment = json.loads(run.environment_path.read_text())
    assert environment["command"][0] == "picollm" and environment["packages"]["numpy"] == numpy.__version__
    assert {key: commands[0][key] for key in ("code_sha256", "torch", "git_commit")}.items() <= environment.items()
    recipes = [run.stage(name).read_config()["recipe"] for name in ("pretrain", "sft")]
    for source in [source for recipe in recipes for source in recipe["data"]]:
        kept = run.kept_dataset_record(source["dataset"], source["sha256"])
        assert sha256_file(kept) == source["sha256"]
    invoke("manifest", "verify", "--run", "demo")

    before = tree(run.path)
    assert set(states(invoke("speedrun", "--run", "demo", "--json")).values()) == {"already done"}
    assert tree(run.path) == before


def test_report_and_manifest_follow_what_changed_since(base: Path, arguments: list[str]) -> None:
    invoke(*arguments)
    run = RunDir(base / "runs" / "demo")
    os.utime(run.stage("sft").record_path)
    made = states(invoke("speedrun", "--run", "demo", "--json"))
    assert [name for name, state in made.items() if state == "made"] == ["report", "manifest"]
    (run.path / "eval" / "extra.json").write_text("{}")
    made = states(invoke("speedrun", "--run", "demo", "--json"))
    assert [name for name, state in made.items() if state == "made"] == ["manifest"]


def test_human_output_names_the_next_command(base: Path, arguments: list[str]) -> None:
    result = invoke(*arguments)
    assert "run `demo` is finished" in result.stdout
    assert "1.5000 bits per byte" in result.stdout
    assert "[7/7] manifest: made" in result.stderr
    assert "picollm chat --run demo" in result.stderr


def test_force_moves_a_stage_and_all_later_ones_aside(base: Path, arguments: list[str]) -> None:
    invoke(*arguments)
    run = RunDir(base / "runs" / "demo")
    kept = tree(run.path / "pretrain")
    made = states(invoke("speedrun", "--run", "demo", "--force", "sft", "--set", "sft.steps=7", "--json"))
    redone = ("sft", "eval", "report", "manifest")
    assert made == {name: "made" if name in redone else "already done" for name in command.NAMES}
    assert tree(run.path / "pretrain") == kept
    moved = sorted(path.name.split("-", 2)[2] for path in (run.path / "old").iterdir())
    assert moved == ["eval", "manifest.json", "plots", "report.json", "report.md", "sft"]
    assert run.stage("sft").read_config()["recipe"]["steps"] == 7


@pytest.mark.parametrize(("name", "kind"), [("nowhere", MissingArtifact), ("stories", ConfigError)])
def test_what_cannot_be_made_again_is_not_moved_aside(
    base: Path, arguments: list[str], tmp_path: Path, name: str, kind: type[Exception]
) -> None:
    """A mistyped dataset, or one of the wrong kind, must cost neither the model that is there nor the run's config."""
    invoke(*arguments)
    run = RunDir(base / "runs" / "demo")
    before = tree(run.path)
    (tmp_path / "mixture.toml").write_text(f'[[sft.mix]]\ndataset = "{name}"\n')
    with pytest.raises(kind, match=name):
        invoke("speedrun", "--run", "demo", "--force", "sft", "--config", str(tmp_path / "mixture.toml"))
    assert tree(run.path) == before


def test_a_change_asks_only_for_the_datasets_that_it_names(base: Path, arguments: list[str]) -> None:
    """Fine-tuning reads no text: a run whose text is gone can still be given other conversations."""
    invoke(*arguments, "--skip", "sft", "--skip", "eval")
    (base / "datasets" / "stories").rename(base / "stories")
    run = RunDir(base / "runs" / "demo")
    given: dict[str, Any] = {"run": "demo", "preset": None, "config": None}
    with prepare.open_run(Output(), **given, sets=["sft.steps=7"]):
        assert run.read_config()["config"]["sft"]["steps"] == 7
    (base / "mixture.toml").write_text('[[sft.mix]]\ndataset = "nowhere"\n')
    with pytest.raises(MissingArtifact, match="nowhere"):
        invoke("sft", "--run", "demo", "--config", str(base / "mixture.toml"))
    with pytest.raises(MissingArtifact, match="stories"):  # what starts over reads it again
        invoke("speedrun", "--run", "demo", "--force", "pretrain")
    assert run.stage("pretrain").record()


def test_a_file_whose_name_is_no_text(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name stands in the records of the run, which are UTF-8."""
    name = f"{base}/caf\udce9.toml"
    try:
        Path(name).write_text("[sft]\nsteps = 7\n")
    except OSError:
        pytest.skip("the names of this file system are UTF-8")
    words = ["tokenizer", "train", "--preset", "demo", "--set", "data.dataset=stories", "--config", name]
    monkeypatch.setattr("sys.argv", ["picollm", *words])
    invoke(*words)
    run = RunDir(base / "runs" / "demo")
    assert "caf\\udce9.toml" in run.read_config()["sources"]["sft.steps"]
    assert "caf\\udce9.toml" in json.loads(run.environment_path.read_text())["command"][-1]


def test_a_run_of_an_older_picollm(base: Path, arguments: list[str]) -> None:
    """Its recipes lack a key: what it finished is done, and what it only began is not continued as something else."""
    invoke(*arguments)
    run = RunDir(base / "runs" / "demo")
    for name in ("pretrain", "sft"):
        stage = run.stage(name)
        config = stage.read_prepared()
        del config["recipe"]["packing"]
        write_json(stage.config_path, config)
        record = stage.record()
        assert record
        write_json(stage.record_path, record | {"inputs": {"recipe": sha256_json(config["recipe"])}})
    made = states(invoke("speedrun", "--run", "demo", "--json"))
    assert (made["pretrain"], made["sft"]) == ("already done", "already done")
    made = states(invoke("speedrun", "--run", "demo", "--force", "sft", "--json"))
    assert (made["pretrain"], made["sft"]) == ("already done", "made")
    pretrain = run.stage("pretrain")
    pretrain.record_path.unlink()
    write_json(pretrain.checkpoints / "step_000001" / "meta.json", {"schema": 1, "step": 1})
    with pytest.raises(ConfigError, match="another recipe") as caught:
        invoke("speedrun", "--run", "demo")
    assert caught.value.cause == "`packing` was not there yet and is best_fit now"
    assert str(caught.value.hint).startswith("go on with the older picollm that began it")


def test_skip_leaves_stages_out(base: Path, arguments: list[str]) -> None:
    made = states(invoke(*arguments, "--skip", "sft", "--skip", "report", "--json"))
    assert made["sft"] == made["report"] == "skipped"
    assert sorted(path.name for path in (base / "runs/demo/eval").iterdir()) == ["pretrain-bpb", "pretrain-samples"]
    assert not (base / "runs/demo/sft").exists()


def test_skipping_what_a_later_stage_needs_says_how_to_make_it(base: Path, arguments: list[str]) -> None:
    with pytest.raises(MissingArtifact, match="no tokenizer in run `demo`") as caught:
        invoke(*arguments, "--skip", "tokenizer")
    assert caught.value.hint == "make it with `picollm tokenizer train --run demo`"


@pytest.mark.parametrize("option", ["--skip", "--force"])
def test_an_unknown_stage_names_the_nearest(base: Path, option: str) -> None:
    with pytest.raises(ConfigError) as caught:
        invoke("speedrun", option, "pretain")
    assert caught.value.hint == f"did you mean `{option} pretrain`?"
    assert not (base / "runs").exists()


def test_dry_run_writes_nothing_and_has_the_promised_keys(base: Path, arguments: list[str]) -> None:
    before = tree(base)
    plan = json.loads(invoke(*arguments, "--dry-run", "--json").stdout)
    assert {"memory_gib", "time_s", "disk_gib", "money_usd", "stages", "exports", "config", "sources"} <= set(plan)
    assert all({"name", "time_s"} <= set(stage) for stage in plan["stages"])
    assert plan["sources"]["tokenizer.vocab_size"] == "--set"
    assert plan["launch"][-2:] == ["picollm.stages.pretrain", str(base / "runs/demo/pretrain")]
    text = invoke(*arguments, "--dry-run").stdout
    assert "tokenizer.vocab_size" in text and "--set" in text and "picollm.stages.pretrain" in text
    assert tree(base) == before


def test_a_dry_run_says_which_dataset_is_not_read(base: Path, arguments: list[str]) -> None:
    assert "not used" not in invoke(*arguments, "--dry-run").stdout
    mixed = invoke(*arguments, "--dry-run", "--set", "data.mix.toy-world=1").stdout.splitlines()
    [line] = [line for line in mixed if line.split()[:1] == ["data.dataset"]]
    assert line.split(maxsplit=2)[2].strip() == "not used: data.mix"


def test_interrupted_and_continued(base: Path, arguments: list[str]) -> None:
    run = RunDir(base / "runs" / "demo")

    def interrupt() -> None:
        deadline = time.monotonic() + 30
        while not run.stage("pretrain").launcher_path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(Interrupted):
        invoke(*arguments)
    thread.join()
    assert read_all(run.events_path)[-1] == read_all(run.events_path)[-1] | {"stage": "pretrain", "ok": False}
    assert not run.stage("sft").path.exists()
    assert states(invoke("speedrun", "--run", "demo", "--json"))["sft"] == "made"


def test_a_second_process_on_the_run_is_refused(base: Path, arguments: list[str]) -> None:
    invoke(*arguments, *(f"--skip={name}" for name in command.NAMES))
    run = RunDir(base / "runs" / "demo")
    before = tree(run.path)
    with hold_lock(run.lock_path, "run"), pytest.raises(HostError, match="in use by another process"):
        invoke("speedrun", "--run", "demo")
    assert tree(run.path) == before


def test_values_of_a_started_stage_are_frozen(base: Path, arguments: list[str]) -> None:
    invoke(*arguments)
    before = tree(base)
    with pytest.raises(ConfigError, match="stage `pretrain` of run `demo` has started") as caught:
        invoke("speedrun", "--run", "demo", "--set", "train.steps=999", "--set", "train.keep_last=1")
    assert caught.value.cause == "`train.steps` is 140 in the run and 999 now"
    with pytest.raises(ConfigError, match="made with another preset"):
        invoke("speedrun", "--run", "demo", "--preset", "cpu-small")
    assert tree(base) == before


def test_how_it_runs_may_change_until_it_has_run_and_is_noted(base: Path, arguments: list[str]) -> None:
    invoke(*arguments, "--skip", "sft", "--skip", "eval")
    run = RunDir(base / "runs" / "demo")
    invoke("speedrun", "--run", "demo", "--skip", "sft", "--skip", "eval", "--set", "train.checkpoint_every=5")
    assert run.stage("pretrain").read_config()["runtime"]["checkpoint_every"] == 10  # nothing ran, nothing is changed
    run.stage("pretrain").record_path.unlink()
    invoke("speedrun", "--run", "demo", "--set", "train.checkpoint_every=5")
    assert run.stage("pretrain").read_config()["runtime"]["checkpoint_every"] == 5
    notes = [event["text"] for event in read_all(run.events_path) if event["kind"] == "note"]
    assert "runtime checkpoint_every: 10 -> 5" in notes


def test_threads_and_dtype_stay_as_first_decided(
    base: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    invoke(*arguments, "--skip", "sft", "--skip", "eval")
    stage = RunDir(base / "runs" / "demo").stage("pretrain")
    before = stage.read_config()
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr("picollm.hardware.compute_dtype", lambda *_: ("bfloat16", "another machine"))
    invoke("speedrun", "--run", "demo")
    assert stage.read_config() == before
    sft = RunDir(base / "runs" / "demo").stage("sft").read_config()
    assert (sft["runtime"]["threads"], sft["recipe"]["dtype"]) == (1, before["recipe"]["dtype"])


def test_a_full_disk_is_refused_before_anything_is_made(
    base: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("picollm.hardware.disk_free", lambda path: 10 * 2**20)
    before = tree(base)
    with pytest.raises(HostError, match="does not fit on the disk"):
        invoke(*arguments)
    assert tree(base) == before
    assert not (base / "runs").exists()


def test_too_little_memory_needs_a_yes(base: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    plan = prepare.plan_of

    def huge(*args: Any, **options: Any) -> Any:
        class Huge:
            memory_bytes = 2**60
            disk_bytes = plan(*args, **options).disk_bytes

        return Huge

    monkeypatch.setattr(prepare, "plan_of", huge)
    with pytest.raises(ConfigError) as caught:
        invoke(*arguments)
    assert "--yes" in str(caught.value.hint)
    assert states(invoke(*arguments, "--yes", "--json"))["manifest"] == "made"


def test_a_run_of_another_version_is_refused(base: Path, arguments: list[str]) -> None:
    invoke(*arguments, *(f"--skip={name}" for name in command.NAMES))
    path = base / "runs" / "demo" / "config.json"
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 9'))
    before = tree(base)
    with pytest.raises(IntegrityError, match="another version of picollm"):
        invoke("speedrun", "--run", "demo")
    assert tree(base) == before


def test_runs_lists_what_is_done(base: Path, arguments: list[str]) -> None:
    assert json.loads(invoke("runs", "--json").stdout) == {"runs": [], "torn": []}
    invoke(*arguments, "--skip", "eval")
    (row,) = json.loads(invoke("runs", "--json").stdout)["runs"]
    assert (row["run"], row["preset"], row["stages"]) == ("demo", "demo", ["tokenizer", "pretrain", "sft"])
    assert row["loss"] > 0 and row["bytes"] > 0
    heading, line = invoke("runs").stdout.splitlines()
    assert "done up to" in heading and line.split()[:3] == ["demo", "demo", "sft"]


def test_secrets_stay_out_of_the_record() -> None:
    from picollm_cli.environment import redact

    given = ["--set", "train.batch_tokens=2048", "--hf-token", "abc", "api_key=x", "hf_abcdefghijk"]
    assert redact(given) == ["--set", "train.batch_tokens=2048", "--hf-token", "***", "api_key=***", "***"]
