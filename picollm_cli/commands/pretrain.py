"""`picollm pretrain`: one stage, text -> a base model."""

from __future__ import annotations

from picollm_cli import options
from picollm_cli.console import Output


def pretrain(
    run: options.Run = None,
    preset: options.Preset = None,
    config: options.ConfigFile = None,
    sets: options.Set = None,
    launch: options.Launch = None,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    yes: options.Yes = False,
) -> None:
    """Pretrain a base model on the run's dataset, or continue where it stopped.

    The run needs a tokenizer first. Ctrl-C saves and stops; the same command
    continues.

    \b
    Examples:
      picollm pretrain --run demo
      picollm pretrain --run peps --preset cpu-small --set data.dataset=peps
      picollm pretrain --run peps --set train.checkpoint_every=50
      picollm pretrain --run peps --launch nproc=2
    """
    from picollm_cli.launch import run_stage
    from picollm_cli.launch_line import parse_launch
    from picollm_cli.prepare import open_run, resolve_run
    from picollm_cli.prepare_stage import prepare_pretrain

    out, how = Output(json), parse_launch(launch)
    if dry_run:
        from picollm_cli.dry_run import show_plan

        show_plan(out, resolve_run(run=run, preset=preset, config=config, sets=sets), how)
        return
    with open_run(out, run=run, preset=preset, config=config, sets=sets, ranks=how.ranks, yes=yes) as prepared:
        stage = prepare_pretrain(prepared, ranks=how.ranks)
        record = run_stage(out, stage, "picollm.stages.pretrain", launch=how)
    found = record["result"]
    out.print(f"pretrain of run `{prepared.run.name}` is finished: step {found['step']}, loss {found['loss']:.4f}")
    out.result({"run": prepared.run.name, "stage": "pretrain", **found})
    out.hint(f"teach it to answer with `picollm sft --run {prepared.run.name}`")
