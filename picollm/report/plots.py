"""Pictures of a run, drawn without a display and with the same bytes for the same figures."""

from __future__ import annotations

import io
from itertools import accumulate
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Point = dict[str, Any]

TITLES = {"pretrain": "Pretraining", "sft": "Fine-tuning (SFT)", "rl": "Reinforcement learning (RL)"}
# Names under which stages record their validation -> unit.
UNITS = {"val_bpb": "bits per byte", "val_loss": "nats per token"}
# Share of a curve's points behind one smoothed point: enough to see the trend through the documents' noise.
SMOOTHING_SHARE = 0.05
# Okabe & Ito's palette: told apart by colour-blind readers and in grey.
LOSS, VALIDATION, INK = "#0072B2", "#D55E00", "#333333"


def draw_loss(curves: dict[str, list[Point]], validation: dict[str, list[Point]]) -> bytes:
    """The loss curve as PNG: one panel per stage, training loss over tokens, validation as points on its own axis.

    Args:
        curves: stage -> `{"step", "tokens", "loss"}` in order; points without tokens or loss are left out.
        validation: stage -> `{"step", "tokens", "name", "value"}`; the first name of a stage is drawn.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = list(curves)
    figure = Figure(figsize=(1.2 + 5.2 * len(panels), 3.9), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    widths = [max(1, len(curves[stage])) ** 0.5 for stage in panels]
    axes = figure.subplots(1, len(panels), squeeze=False, width_ratios=widths)[0]
    for axis, stage in zip(axes, panels, strict=True):
        _panel(axis, stage, curves[stage], validation.get(stage, []))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def smooth(values: list[float]) -> list[float]:
    """Centred moving mean over about SMOOTHING_SHARE of the values.

    At the start the window narrows on both sides, so that the steep fall is not flattened; at the end only ahead.
    """
    half = round(SMOOTHING_SHARE * len(values) / 2)
    sums = [0.0, *accumulate(values)]
    out = []
    for index in range(len(values)):
        behind = min(half, index)
        ahead = min(behind, len(values) - 1 - index)
        out.append((sums[index + ahead + 1] - sums[index - behind]) / (behind + ahead + 1))
    return out


def token_unit(largest: float) -> tuple[float, str]:
    """(divisor, label) so that an axis shows numbers under a thousand."""
    for divisor, name in ((1e9, "billion tokens"), (1e6, "million tokens"), (1e3, "thousand tokens")):
        if largest >= divisor:
            return divisor, name
    return 1.0, "tokens"


def _panel(axis: Axes, stage: str, curve: list[Point], validation: list[Point]) -> None:
    points = [(p["tokens"], p["loss"]) for p in curve if p["tokens"] is not None and p["loss"] is not None]
    divisor, unit = token_unit(max((tokens for tokens, _ in points), default=0))
    x, y = [tokens / divisor for tokens, _ in points], [loss for _, loss in points]
    axis.plot(x, y, color=LOSS, alpha=0.28, linewidth=0.9, label="training, each step")
    axis.plot(x, smooth(y), color=LOSS, linewidth=2.0, label="training, smoothed")
    axis.set_title(TITLES.get(stage, stage), loc="left", fontweight="bold", color=INK)
    axis.set_xlabel(unit)
    axis.set_ylabel("loss (nats per token)")
    axis.grid(True, color="#DDDDDD", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.margins(x=0.01)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(colors=INK)
    shown = [p for p in validation if p["name"] == validation[0]["name"] and None not in (p["tokens"], p["value"])]
    handles, labels = axis.get_legend_handles_labels()
    if shown:
        # Nats per token share the axis of the training loss; bits per byte are another quantity.
        name = shown[0]["name"]
        own_axis = name.removeprefix("val_") != "loss"
        target = axis.twinx() if own_axis else axis
        xs, ys = [p["tokens"] / divisor for p in shown], [p["value"] for p in shown]
        marks = target.plot(xs, ys, color=VALIDATION, linewidth=1.0, linestyle=":", marker="o", markersize=6, zorder=5)
        label = f"validation, {ys[-1]:.3f} at the end"
        if own_axis:
            label += " (right axis)"
            target.set_ylabel(f"validation ({UNITS.get(name, name)})", color=VALIDATION)
            target.tick_params(axis="y", colors=VALIDATION)
            target.spines[["top", "left"]].set_visible(False)
            target.set_ylim(0, 1.6 * max(ys))
        handles, labels = [*handles, *marks], [*labels, label]
    axis.legend(handles, labels, frameon=False, fontsize="small", loc="upper right")
