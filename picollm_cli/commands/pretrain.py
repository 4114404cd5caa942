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
    from picollm_cli.launch_line import check_launch, parse_launch
    from picollm_cli.nodes import follow, leading
    from picollm_cli.prepare import open_run, resolve_run
    from picollm_cli.prepare_stage import prepare_pretrain

    out, how = Output(json), parse_launch(launch)
    given = {"run": run, "preset": preset, "config": config, "sets": sets}
    if dry_run:
        from picollm_cli.dry_run import show_plan

        show_plan(out, resolve_run(**given), how)
        return
    if how.node_rank:
        check_launch(how)
        follow(out, resolve_run(**given).run, ["pretrain"], how)
        return
    with open_run(out, **given, launch=how, yes=yes) as prepared, leading(prepared.run, how) as board:
        stage = prepare_pretrain(prepared, how)
        record = run_stage(out, stage, "picollm.stages.pretrain", launch=how, board=board)
    found = record["result"]
    out.print(f"pretrain of run `{prepared.run.name}` is finished: step {found['step']}, loss {found['loss']:.4f}")
    out.result({"run": prepared.run.name, "stage": "pretrain", **found})
    out.hint(f"teach it to answer with `picollm sft --run {prepared.run.name}`")
