"""What GPUs can do at best, by their data sheets, and what they cost: a table by the driver's name."""

from __future__ import annotations

import re
from dataclasses import dataclass

# Prices are estimates: typical on-demand dollars per GPU and hour of smaller clouds, rounded; they move every month.
PRICES_AS_OF = "2025"


@dataclass(frozen=True)
class GpuSpec:
    """A chip by its data sheet: dense (not sparse) peaks in FLOP/s, float32 accumulation.

    `bf16_flops` is None on chips without bfloat16, `fp8_flops` on chips without fp8; `fp32_flops` is the vector units'.
    Tensor cores that have bfloat16 run float16 at its rate; `fp16_flops` is for those that have only float16.
    """

    name: str
    bf16_flops: float | None
    fp8_flops: float | None
    fp32_flops: float
    usd_per_hour: float
    fp16_flops: float | None = None

    def peak_flops(self, dtype: str) -> float:
        """Peak FLOP/s in a compute type; types that the chip lacks run at the float32 rate at best."""
        half = {"bfloat16": self.bf16_flops, "float16": self.bf16_flops or self.fp16_flops}
        return half.get(dtype) or self.fp32_flops


# (words that must all occur in the driver's name, spec). The first row that fits wins, so variants come first.
_T = 1e12
_GPUS: tuple[tuple[str, GpuSpec], ...] = (
    ("gb300", GpuSpec("GB300", 2500 * _T, 5000 * _T, 80 * _T, 8.0)),
    ("b300", GpuSpec("B300", 2250 * _T, 4500 * _T, 75 * _T, 6.0)),
    ("gb200", GpuSpec("GB200", 2500 * _T, 5000 * _T, 80 * _T, 6.5)),
    ("b200", GpuSpec("B200", 2250 * _T, 4500 * _T, 75 * _T, 5.0)),
    ("gh200", GpuSpec("GH200", 989.4 * _T, 1978.9 * _T, 67 * _T, 2.5)),
    ("h200 nvl", GpuSpec("H200 NVL", 835 * _T, 1671 * _T, 60 * _T, 3.2)),
    ("h200", GpuSpec("H200", 989.4 * _T, 1978.9 * _T, 67 * _T, 3.5)),
    ("h100 nvl", GpuSpec("H100 NVL", 835 * _T, 1671 * _T, 60 * _T, 2.8)),
    ("h100 pcie", GpuSpec("H100 PCIe", 756 * _T, 1513 * _T, 51 * _T, 2.4)),
    ("h100", GpuSpec("H100 SXM", 989.4 * _T, 1978.9 * _T, 67 * _T, 3.0)),
    ("h800 pcie", GpuSpec("H800 PCIe", 756 * _T, 1513 * _T, 51 * _T, 2.0)),
    ("h800", GpuSpec("H800", 989.4 * _T, 1978.9 * _T, 67 * _T, 2.5)),
    ("h20", GpuSpec("H20", 148 * _T, 296 * _T, 44 * _T, 1.3)),
    ("a100 40gb", GpuSpec("A100 40GB", 312 * _T, None, 19.5 * _T, 1.3)),
    ("a100 pcie", GpuSpec("A100 80GB PCIe", 312 * _T, None, 19.5 * _T, 1.6)),
    ("a100", GpuSpec("A100 80GB SXM", 312 * _T, None, 19.5 * _T, 1.8)),
    ("a800", GpuSpec("A800", 312 * _T, None, 19.5 * _T, 1.5)),
    ("a40", GpuSpec("A40", 150 * _T, None, 37.4 * _T, 0.4)),
    ("a30", GpuSpec("A30", 165 * _T, None, 10.3 * _T, 0.5)),
    ("l40s", GpuSpec("L40S", 362 * _T, 733 * _T, 91.6 * _T, 1.0)),
    ("l40", GpuSpec("L40", 181 * _T, 362 * _T, 90.5 * _T, 0.9)),
    ("l4", GpuSpec("L4", 121 * _T, 242 * _T, 30.3 * _T, 0.7)),
    ("a10g", GpuSpec("A10G", 70 * _T, None, 35 * _T, 1.0)),
    ("a10", GpuSpec("A10", 125 * _T, None, 31.2 * _T, 0.75)),
    ("a6000", GpuSpec("RTX A6000", 155 * _T, None, 38.7 * _T, 0.5)),
    ("rtx pro 6000", GpuSpec("RTX PRO 6000 Blackwell", 504 * _T, 1008 * _T, 126 * _T, 1.8)),
    ("rtx 6000 ada", GpuSpec("RTX 6000 Ada", 364 * _T, 728 * _T, 91.1 * _T, 0.8)),
    ("rtx 5090", GpuSpec("RTX 5090", 209.5 * _T, 419 * _T, 105 * _T, 0.7)),
    ("rtx 5080", GpuSpec("RTX 5080", 113 * _T, 225 * _T, 56.3 * _T, 0.4)),
    ("rtx 4090", GpuSpec("RTX 4090", 165.2 * _T, 330 * _T, 82.6 * _T, 0.5)),
    ("rtx 4080", GpuSpec("RTX 4080", 97.5 * _T, 195 * _T, 48.7 * _T, 0.3)),
    ("rtx 3090", GpuSpec("RTX 3090", 71 * _T, None, 35.6 * _T, 0.3)),
    ("v100 pcie", GpuSpec("V100 PCIe", None, None, 14.0 * _T, 0.5, fp16_flops=112 * _T)),
    ("v100", GpuSpec("V100", None, None, 15.7 * _T, 0.55, fp16_flops=125 * _T)),
    ("t4", GpuSpec("T4", None, None, 8.1 * _T, 0.35, fp16_flops=65 * _T)),
    ("mi355x", GpuSpec("MI355X", 2516.6 * _T, 5033.2 * _T, 157 * _T, 4.5)),
    ("mi350x", GpuSpec("MI350X", 2307 * _T, 4614 * _T, 144 * _T, 4.0)),
    ("mi325x", GpuSpec("MI325X", 1307.4 * _T, 2614.9 * _T, 163 * _T, 2.8)),
    ("mi300x", GpuSpec("MI300X", 1307.4 * _T, 2614.9 * _T, 163 * _T, 2.5)),
)
# These make another chip, or a part of one, out of a name in the table; no figure is better than a wrong one.
_OTHER_CHIP = frozenset({"mig", "laptop", "ti", "d", "super", "max"})


def gpu_spec(name: str) -> GpuSpec | None:
    """The data sheet behind a driver's name such as `NVIDIA H100 80GB HBM3`; None for chips not in the table."""
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    if words & _OTHER_CHIP:
        return None
    return next((spec for wanted, spec in _GPUS if words.issuperset(wanted.split())), None)
