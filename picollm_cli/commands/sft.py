"""`picollm sft`: one stage, base model and conversations -> a chat model."""

from __future__ import annotations

from picollm_cli import options
from picollm_cli.console import Output


def sft(
    run: options.Run = None,
    config: options.ConfigFile = None,
    sets: options.Set = None,
    launch: options.Launch = None,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    yes: options.Yes = False,
) -> None:
    """Fine-tune a pretrained model on conversations, or continue where it stopped.

    Without `sft.mix` in the config these are the toy world's.
    Ctrl-C saves and stops; the same command continues.

    \b
    Examples:
      picollm sft --run demo
      picollm sft --run peps --set sft.steps=200 --set sft.lr_scale=0.5
      picollm sft --run peps --config mixture.toml
    """
    from picollm_cli.launch import run_stage
    from picollm_cli.launch_line import check_launch, parse_launch
    from picollm_cli.nodes import follow, leading
    from picollm_cli.prepare import open_run, resolve_run
    from picollm_cli.prepare_stage import prepare_sft, say_sft_sources

    out, how = Output(json), parse_launch(launch)
    given = {"run": run, "preset": None, "config": config, "sets": sets, "create": False}
    if dry_run:
        from picollm_cli.dry_run import show_plan

        show_plan(out, resolve_run(**given), how, "sft")
        return
    if how.node_rank:
        check_launch(how)
        follow(out, resolve_run(**given).run, ["sft"], how)
        return
    with open_run(out, **given, launch=how, yes=yes) as prepared, leading(prepared.run, how) as board:
        stage = prepare_sft(prepared, how)
        say_sft_sources(out, prepared)
        record = run_stage(out, stage, "picollm.stages.sft", launch=how, board=board)
    found = record["result"]
    out.print(f"sft of run `{prepared.run.name}` is finished: step {found['step']}, loss {found['loss']:.4f}")
    out.result({"run": prepared.run.name, "stage": "sft", **found})
    out.hint(f"talk to it with `picollm chat --run {prepared.run.name}`")
