"""How a stage is launched: the option `--launch`, and the exact command line it becomes."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from typing import Any

from picollm.errors import ConfigError, did_you_mean
from picollm.run_dir import StageDir


@dataclass(frozen=True)
class Launch:
    """How a stage is launched: `--launch nproc=8,nnodes=2,node_rank=0,rdzv=host:port`."""

    nproc: int = 1
    nnodes: int = 1
    node_rank: int = 0
    rdzv: str | None = None

    @property
    def ranks(self) -> int:
        return self.nproc * self.nnodes


def parse_launch(text: str | None) -> Launch:
    """Read `--launch`; None is one process on this machine.

    Raises:
        ConfigError: an unknown key, a value out of range, or several nodes without a meeting point.
    """
    if not text:
        return Launch()
    known = [field.name for field in fields(Launch)]
    hint = "write it as `--launch nproc=8` or `--launch nproc=8,nnodes=2,node_rank=0,rdzv=host:port`"
    values: dict[str, Any] = {}
    for part in text.split(","):
        key, equals, value = part.strip().partition("=")
        if not equals or not value:
            raise ConfigError(f"`--launch {text}` cannot be read", cause=f"`{part}` is not `key=value`", hint=hint)
        if key not in known:
            raise ConfigError(
                f"`--launch` knows no `{key}`",
                cause=f"keys are {', '.join(f'`{name}`' for name in known)}",
                hint=did_you_mean(key, known, otherwise=hint),
            )
        if key == "rdzv":
            values[key] = value
            continue
        lowest = 0 if key == "node_rank" else 1
        if not value.isdecimal() or int(value) < lowest:
            raise ConfigError(
                f"`--launch {key}={value}` is out of range", cause=f"it must be a whole number from {lowest}", hint=hint
            )
        values[key] = int(value)
    launch = Launch(**values)
    if launch.nnodes > 1 and launch.rdzv is None:
        raise ConfigError("several nodes need a meeting point", cause="`rdzv` is missing in `--launch`", hint=hint)
    if launch.node_rank >= launch.nnodes:
        raise ConfigError(
            f"`--launch node_rank={launch.node_rank}` is out of range",
            cause=f"nodes are numbered 0 to {launch.nnodes - 1}",
            hint=hint,
        )
    return launch


def launch_command(stage: StageDir, module: str, launch: Launch, *, has_gpu: bool) -> list[str]:
    """The exact command line of a stage's worker.

    One process without a GPU runs the module itself: torchrun would cost seconds and bring nothing.
    """
    worker = ["-m", module, str(stage.path)]
    if launch.ranks == 1 and not has_gpu:
        return [sys.executable, *worker]
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={launch.nproc}", "--max-restarts=0"]
    if launch.nnodes == 1:
        return [*torchrun, "--standalone", *worker]
    return [
        *torchrun,
        f"--nnodes={launch.nnodes}",
        f"--node-rank={launch.node_rank}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={launch.rdzv}",
        f"--rdzv-id={stage.run.name}-{stage.path.name}",
        *worker,
    ]
