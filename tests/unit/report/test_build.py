"""The report of a run: every figure from what the stages left behind, the same bytes from the same folder."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from picollm.errors import IntegrityError
from picollm.events import EventWriter
from picollm.files import write_json
from picollm.report.build import write_report
from picollm.run_dir import RunDir

MakeRun = Callable[..., RunDir]


def report_of(run: RunDir) -> tuple[dict, str]:
    path = write_report(run)
    return json.loads((run.path / "report.json").read_text()), path.read_text()


def test_figures_of_a_finished_run(make_run: MakeRun) -> None:
    figures, _ = report_of(make_run())
    assert figures["missing_stages"] == []
    # 2 * 320 padded rows * 64, 2 layers of 4 * 64 * 64 + 2 * 64 * 256, 2 scalars.
    assert figures["model"]["num_params"] == 2 * 320 * 64 + 2 * (4 * 64 * 64 + 2 * 64 * 256) + 2
    pretrain, sft = figures["stages"]["pretrain"], figures["stages"]["sft"]
    assert (pretrain["state"], pretrain["steps"], pretrain["tokens"]) == ("finished", 20, 20 * 128)
    assert pretrain["loss_first"] == pytest.approx(5.9)
    assert pretrain["loss_final"] == pytest.approx(6 - 10.5 / 10)  # mean of the last 20 steps, 1 to 20
    assert sft["loss_final"] == pytest.approx(6 - 30.5 / 10)
    assert pretrain["tokens_per_s"] == pytest.approx(128 / 0.5)
    assert pretrain["cpu_s"] == 12.5
    assert pretrain["validation"] == [{"step": 20, "name": "val_bpb", "value": 1.25, "stderr": None, "n": None}]
    assert figures["evaluation"]["sft"]["suites"]["chat"]["sum_held_out"] == {"n": 80, "score": 0.95, "stderr": 0.024}
    assert figures["data"]["pretrain"][0]["kind"] == "text"
    assert figures["samples"] == [{"stage": "sft", "prompt": "Who are you?", "text": "I am picollm.\n```\nnot a fence"}]
    assert len(figures["stages"]["sft"]["checkpoint"]["sha256"]) == 64


def test_page_of_a_finished_run(make_run: MakeRun) -> None:
    run = make_run()
    _, page = report_of(run)
    assert page.startswith("# Run `demo`\n\nA model of 139.3 k parameters from preset `demo`, pretrained on `stories`")
    assert "then fine-tuned on `talks` for 40 steps (5.12 k tokens)." in page
    for heading in ("Summary", "Loss", "Data", "Recipe", "Evaluation", "Samples", "Environment", "Use it"):
        assert f"\n## {heading}\n" in page
    assert "| `sum` | 1.000 ± 0.000 | 100 | 0.950 ± 0.024 | 80 |" in page
    assert "| `stories` | 1.2345 ± 0.0100 | 60 |" in page
    assert "| Chat, held out, sft | sum 0.95 ± 0.02 |" in page
    assert "| Weights, sft | `sft/checkpoints/step_000040/model.safetensors`, sha256 " in page
    assert "| `train.steps` | 20 | --set |" in page
    assert ", validation 1.2500 bits per byte |" in page
    assert "| 100.0%, 1.50 epochs |" in page and "25.0% stand in pieces that were cut" in page
    assert "![Training loss and validation over tokens](plots/loss.png)" in page
    assert "````text" in page  # longer than the fence inside the sample
    assert (run.path / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_writing_again_gives_the_same_bytes(make_run: MakeRun) -> None:
    run = make_run()
    names = ("report.md", "report.json", "plots/loss.png")
    write_report(run)
    first = [(run.path / name).read_bytes() for name in names]
    write_report(run)
    assert [(run.path / name).read_bytes() for name in names] == first
    assert not list(run.path.rglob("*.tmp"))


def test_tables_hold_no_ragged_rows(make_run: MakeRun) -> None:
    _, page = report_of(make_run())
    blocks = [block.splitlines() for block in page.split("\n\n") if block.startswith("| ")]
    assert len(blocks) >= 7
    for block in blocks:
        assert len({line.replace("\\|", "").count("|") for line in block}) == 1, block


def test_unfinished_run_says_what_is_missing(make_run: MakeRun) -> None:
    run = make_run("half of pretrain")
    figures, page = report_of(run)
    assert figures["missing_stages"] == ["pretrain", "sft", "eval"]
    assert figures["stages"]["pretrain"]["state"] == "unfinished"
    assert figures["stages"]["pretrain"]["cpu_s"] == 7.5  # of the checkpoint: there is no record yet
    assert "**Not complete: `pretrain`, `sft` and `eval` have not finished.**" in page
    assert "7 of 20 steps" in page
    assert "## Use it" not in page


def test_run_that_has_only_a_config(make_run: MakeRun) -> None:
    run = make_run("config")
    figures, page = report_of(run)
    assert figures["missing_stages"] == ["tokenizer", "pretrain", "sft", "eval"]
    assert figures["model"] is None
    assert "Nothing has been trained in this run yet." in page
    assert not (run.path / "plots").exists()


def test_attempts_and_repeated_steps(make_run: MakeRun) -> None:
    """A crash after step 7, resumed from 5: six and seven count once, time counts twice."""
    run = make_run("half of pretrain")
    stage = run.stage("pretrain")
    events = EventWriter(stage.events_path, "pretrain")
    events.write("note", text="a | b", level="warning")
    events.write("stage_start", attempt=2, resumed_from=5, total_steps=20)
    for step in range(6, 9):
        events.write("step", step=step, loss=1.0, tokens=step * 128, dt_s=0.5)
    events.write("stage_end", ok=False, reason="stopped")
    events.close()
    figures, page = report_of(run)
    pretrain = figures["stages"]["pretrain"]
    assert (pretrain["state"], pretrain["steps"], pretrain["attempts"], pretrain["resumed_from"]) == (
        "stopped",
        8,
        2,
        [5],
    )
    assert pretrain["loss_final"] == pytest.approx((5.9 + 5.8 + 5.7 + 5.6 + 5.5 + 3 * 1.0) / 8)
    assert pretrain["tokens_per_s"] == pytest.approx(256)
    assert "- pretrain: 2 attempts, resumed from step 5" in page
    assert "- pretrain: a \\| b" in page


def test_wall_time_is_summed_over_attempts(make_run: MakeRun) -> None:
    run = make_run("half of pretrain")
    lines = [
        {"kind": "stage_start", "t": 100.0, "attempt": 1, "resumed_from": 0, "total_steps": 20},
        {"kind": "step", "t": 130.0, "step": 1, "loss": 1.0, "dt_s": 1.0},
        {"kind": "stage_start", "t": 500.0, "attempt": 2, "resumed_from": 1, "total_steps": 20},
        {"kind": "step", "t": 510.0, "step": 2, "loss": 1.0, "dt_s": 1.0},
    ]
    text = "".join(json.dumps({"v": 1, "stage": "pretrain", **line}) + "\n" for line in lines)
    run.stage("pretrain").events_path.write_text(text)
    figures, _ = report_of(run)
    assert figures["stages"]["pretrain"]["wall_s"] == 40.0  # the night between does not count
    assert figures["stages"]["pretrain"]["started_at"] == "1970-01-01 00:01:40 UTC"


def test_time_by_stage_and_notes_of_the_run(make_run: MakeRun) -> None:
    """The run's own events: the time of each stage, both attempts of one, and what was changed on the way."""
    run = make_run()
    lines = [
        {"stage": "tokenizer", "kind": "stage_start", "t": 10.0},
        {"stage": "tokenizer", "kind": "stage_end", "t": 14.0},
        {"stage": "sft", "kind": "stage_start", "t": 20.0},
        {"stage": "sft", "kind": "stage_end", "t": 25.0, "ok": False},
        {"stage": "run", "kind": "note", "t": 26.0, "text": "config changed"},
        {"stage": "sft", "kind": "stage_start", "t": 30.0},
        {"stage": "sft", "kind": "stage_end", "t": 90.0},
        {"stage": "report", "kind": "stage_start", "t": 91.0},
        {"stage": "report", "kind": "stage_end", "t": 92.0},
    ]
    run.events_path.write_text("".join(json.dumps({"v": 1, **line}) + "\n" for line in lines))
    figures, page = report_of(run)
    assert figures["wall_s"] == {"tokenizer": 4.0, "sft": 65.0}
    assert "| Time by stage | tokenizer 4 s, sft 1 min 05 s |" in page
    assert "- config changed\n" in page


def test_dataset_changed_since(make_run: MakeRun) -> None:
    run = make_run()
    path = run.base / "datasets" / "stories" / "dataset.json"
    path.write_text(path.read_text() + "\n")
    figures, page = report_of(run)
    assert "files" not in figures["data"]["pretrain"][0]
    assert "gone or changed since" in page


def test_a_run_describes_its_data_where_the_dataset_is_not(make_run: MakeRun) -> None:
    """A run that was copied alone, or whose dataset was removed, still says the files and rows it was made from."""
    run = make_run()
    before, page = report_of(run)
    source = before["data"]["pretrain"][0]
    record = run.base / "datasets" / "stories" / "dataset.json"
    kept = run.kept_dataset_record("stories", source["sha256"])
    kept.parent.mkdir()
    record.rename(kept)
    assert report_of(run) == (before, page)
    kept.write_text(kept.read_text().replace("1200", "1300"))  # no longer what the recipe names
    assert "files" not in report_of(run)[0]["data"]["pretrain"][0]


def test_every_command_that_worked_on_the_run_is_told(make_run: MakeRun) -> None:
    run = make_run()
    write_json(run.environment_path, {"torch": "2.11.0", "packages": {"numpy": "2.1"}, "command": ["picollm", "first"]})
    here = {"torch": "2.11.0", "packages": {"numpy": "2.1"}, "git_dirty": True}
    lines = [
        {"stage": "tokenizer", "t": 10.0, "command": ["picollm", "first"], **here},
        {"stage": "pretrain", "t": 20.0, "command": ["picollm", "first"], **here},
        {"stage": "sft", "t": 86400.0, "command": ["picollm", "speedrun", "--force", "sft"], **here, "torch": "2.13.0"},
        {"stage": "eval/sft-bpb", "t": 86500.0, "command": ["picollm", "eval"], **here, "packages": {"numpy": "2.4"}},
        {"stage": "eval/sft-chat", "t": 86510.0, "command": ["picollm", "eval"], **here, "packages": {"numpy": "2.4"}},
    ]
    run.events_path.write_text("".join(json.dumps({"v": 1, "kind": "command", **line}) + "\n" for line in lines))
    figures, page = report_of(run)
    assert [(entry["stages"], entry["other"]) for entry in figures["commands"]] == [
        (["tokenizer", "pretrain"], {}),
        (["sft"], {"torch": ["2.11.0", "2.13.0"]}),
        (["eval"], {"packages.numpy": ["2.1", "2.4"]}),
    ]
    row = "| 1970-01-02 00:00:00 UTC | sft | `picollm speedrun --force sft` | `torch` 2.13.0, not 2.11.0 |"
    assert row in page


def test_a_clock_that_went_back_makes_no_negative_time(make_run: MakeRun) -> None:
    run = make_run()
    text = [{"kind": "stage_start", "t": 9000.0, "attempt": 1}, {"kind": "step", "t": 5400.0, "step": 1, "loss": 1.0}]
    lines = [{"v": 1, "stage": "pretrain", **line} for line in text]
    run.stage("pretrain").events_path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    lines = [{"stage": "sft", "kind": "stage_start", "t": 9000.0}, {"stage": "sft", "kind": "stage_end", "t": 5400.0}]
    run.events_path.write_text("".join(json.dumps({"v": 1, **line}) + "\n" for line in lines))
    figures, _ = report_of(run)
    assert (figures["stages"]["pretrain"]["wall_s"], figures["wall_s"]) == (0.0, {"sft": 0.0})


def test_run_of_another_version_is_refused(make_run: MakeRun) -> None:
    run = make_run()
    run.config_path.write_text('{"schema": 99}')
    with pytest.raises(IntegrityError, match="another version"):
        write_report(run)
    assert not (run.path / "report.md").exists()
