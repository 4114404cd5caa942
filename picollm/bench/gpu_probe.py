"""The probe: nine sections with a time budget each, whose rows are handed on one by one.

Bounds are those that an H200 must reach for the bars of the project (docs/performance.md); on another GPU they are
figures to compare with.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from picollm.bench import kernels, steps
from picollm.bench.rows import Row, Shapes
from picollm.bench.sections import SECTIONS
from picollm.errors import first_line

MEASURE: dict[str, Callable[[Shapes, torch.device], Iterator[Row]]] = {
    "identity": kernels.identity,
    "ceilings": kernels.ceilings,
    "gemm": kernels.gemm,
    "attention": kernels.attention,
    "pointwise": kernels.pointwise,
    "d12": steps.small_step,
    "d20": steps.middle_step,
    "fp8": steps.eight_bits,
    "profile": steps.breakdown,
}


@dataclass(frozen=True)
class Spec:
    """What a worker is asked: where, which sections, which sizes."""

    device: str
    sections: tuple[str, ...]
    shapes: Shapes

    @classmethod
    def of(cls, values: dict[str, Any]) -> Spec:
        return cls(values["device"], tuple(values["sections"]), Shapes.of(values["shapes"]))


def run(spec: Spec, write: Callable[..., None]) -> bool:
    """Measure section by section; `write(kind, **fields)` gets `start`, `section`, `row` and `section_end` events.

    A section that fails is an event, and the next one begins: an hour on a GPU costs money.

    Returns:
        False when a section failed.
    """
    assert set(MEASURE) == set(SECTIONS)
    device = torch.device(spec.device)
    torch.manual_seed(0)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    write("start", device=name, torch=torch.__version__)
    good = True
    for name in spec.sections:
        section = SECTIONS[name]
        write("section", section=name, budget_s=section.budget_s)
        started = time.monotonic()
        rows, cut, error = MEASURE[name](spec.shapes, device), False, None
        try:
            for row in rows:
                write("row", section=name, **row.to_json())
                if cut := time.monotonic() - started > section.budget_s:
                    break
        except Exception as caught:
            good, error = False, f"{type(caught).__name__}: {first_line(caught)}"
        finally:
            rows.close()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        write("section_end", section=name, dt_s=round(time.monotonic() - started, 2), cut=bool(cut), error=error)
    return good
