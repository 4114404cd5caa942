"""`picollm report`: what was trained, on what, how well."""

from __future__ import annotations

from picollm_cli import options
from picollm_cli.console import Output


def report(run: options.Run = None, json: options.Json = False) -> None:
    """Write a run's report: `report.md`, `report.json` and the loss curve.

    Works on an unfinished run too, and says what is missing.

    \b
    Examples:
      picollm report
      picollm report --run demo
      picollm report --run demo --json
    """
    from picollm.report.build import write_figures
    from picollm.report.collect import collect
    from picollm.report.markdown import headline, summary
    from picollm.run_dir import find_run

    out = Output(as_json=json)
    found = find_run(run)
    figures = collect(found)
    path = write_figures(found, figures)
    out.print(str(path))
    out.print()
    out.print(headline(figures))
    out.print()
    rows = summary(figures)
    width = max((len(label) for label, _ in rows), default=0)
    for label, value in rows:
        out.print(f"{label:<{width}}  {value}")
    out.result(figures)
    if figures["missing_stages"]:
        out.hint(
            f"not finished: {', '.join(figures['missing_stages'])}; continue with `picollm speedrun --run {found.name}`"
        )
