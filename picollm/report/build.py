"""`report.json`, `report.md` and `plots/loss.png` of a run: on Monday, what was trained on Friday."""

from __future__ import annotations

from pathlib import Path

from picollm.events import read_events
from picollm.files import write_atomic, write_json
from picollm.report.collect import Figures, collect, curve
from picollm.report.markdown import render
from picollm.run_dir import RunDir

PLOT = "plots/loss.png"


def write_report(run: RunDir) -> Path:
    """Write the report of a run, finished or not, and return the path of `report.md`.

    The same folder gives the same bytes; nothing is measured and no time of writing is noted.

    Raises:
        IntegrityError: a file of the run is torn or of another version.
        HostError: the report cannot be written.
    """
    return write_figures(run, collect(run))


def write_figures(run: RunDir, figures: Figures) -> Path:
    """As `write_report`, from figures that `collect` has read."""
    plot = _loss_plot(run, figures)
    if plot is None:
        (run.path / PLOT).unlink(missing_ok=True)
    else:
        write_atomic(run.path / PLOT, plot)
    write_json(run.path / "report.json", figures)
    path = run.path / "report.md"
    write_atomic(path, render(figures, plot=PLOT if plot else None))
    return path


def _loss_plot(run: RunDir, figures: Figures) -> bytes | None:
    curves = {name: curve(read_events(run.stage(name).events_path)) for name in figures["stages"]}
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return None
    from picollm.report.plots import draw_loss

    validation = {
        name: [
            {**point, "tokens": (point["step"] or 0) * figures["stages"][name]["recipe"]["batch_tokens"]}
            for point in figures["stages"][name]["validation"]
        ]
        for name in curves
    }
    return draw_loss(curves, validation)
