"""`picollm eval`: score a trained stage. The scores are made by a worker, one stage folder per suite."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from picollm_cli import options
from picollm_cli.console import Output
from picollm_cli.stage_option import StageOption, choose_stage

if TYPE_CHECKING:
    from picollm.run_dir import RunDir, StageDir

MODULE = "picollm.stages.eval"


def evaluate(
    run: options.Run = None,
    stage: StageOption = None,
    suite: Annotated[
        Optional[str],
        typer.Option(
            "--suite", metavar="SUITE", help="bpb, samples or chat; all that apply unless told.", show_default=False
        ),
    ] = None,
    set_: options.Set = None,
    json: options.Json = False,
) -> None:
    """Score a trained model.

    `bpb` is bits per byte of the validation text, `samples` shows what the
    model says, `chat` asks a model that was fine-tuned on the toy world about
    facts it was trained on and, apart, about held-out ones. A suite that was
    scored on this checkpoint before is not run again.

    \b
    Examples:
      picollm eval
      picollm eval --run demo --stage sft --suite chat --json
      picollm eval --stage pretrain --suite bpb
      picollm eval --suite chat --set eval.questions=200
    """
    from picollm.errors import ConfigError
    from picollm_cli.launch import run_stage
    from picollm_cli.prepare import resolve_run, store_run, using_run
    from picollm_cli.prepare_stage import prepare_eval, require_trained, suites_for

    out = Output(as_json=json)
    prepared = resolve_run(run=run, preset=None, config=None, sets=set_ or (), create=False)
    found = prepared.run
    trained = choose_stage(found, stage)
    require_trained(found, trained.name)
    applying = suites_for(found, trained.name)
    if suite == "chat" and suite not in applying:
        raise ConfigError(
            f"suite `chat` does not apply to stage `{trained.name}` of run `{found.name}`",
            cause="it asks the toy world's questions, which this stage was not fine-tuned on",
            hint=f"choose one of {', '.join(f'`{name}`' for name in applying)}",
        )
    results: dict[str, Any] = {}
    step = 0
    with using_run(found):
        store_run(prepared)
        for name in [suite] if suite else applying:
            prepared_stage = prepare_eval(found, trained.name, name)
            run_stage(out, prepared_stage, MODULE, title=f"eval {name}")
            scores = prepared_stage.read_results()
            step = scores["step"]
            results |= scores["suites"]
            _show(out, found, prepared_stage, name, scores)
    out.result({"run": found.name, "stage": trained.name, "step": step, "suites": results})


def _show(out: Output, run: RunDir, stage: StageDir, suite: str, results: dict[str, Any]) -> None:
    """One suite for a human: scores as a table, samples as text."""
    from rich.table import Table

    out.print(f"{suite} · run {run.name}, stage {results['stage']}, step {results['step']:,}", style="name")
    if suite == "samples":
        import json

        for line in (stage.path / "samples.jsonl").read_text(encoding="utf-8").splitlines():
            sample = json.loads(line)
            out.print(f"  {sample['prompt']}", style="quiet")
            out.print(f"  {sample['text'].strip()}\n")
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("task")
    for title in ("bits per byte" if suite == "bpb" else "score", "± stderr", "n"):
        table.add_column(title, justify="right")
    digits = 4 if suite == "bpb" else 3
    for task, score in results["suites"][suite].items():
        error = "" if score["stderr"] is None else f"{score['stderr']:.{digits}f}"
        table.add_row(task, f"{score['score']:.{digits}f}", error, f"{score['n']:,}")
    out.table(table)
    out.print()
