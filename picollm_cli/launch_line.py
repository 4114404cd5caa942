"""How a stage is launched: the option `--launch`, and the exact command line it becomes on each node."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields, replace
from typing import Any

from picollm.errors import ConfigError, HostError, did_you_mean
from picollm.run_dir import StageDir

# How often torchrun starts all ranks again, from the last checkpoint, after one of them died.
RESTARTS = 3
# How long a node waits in torchrun for the others to come, at the start and after a restart.
JOIN_TIMEOUT_S = 600
MAX_PORT = 65_535


@dataclass(frozen=True)
class Launch:
    """How a stage is launched: `--launch nproc=8,nnodes=2,node_rank=0,rdzv=host:port,restarts=3`."""

    nproc: int = 1
    nnodes: int = 1
    node_rank: int = 0
    rdzv: str | None = None
    restarts: int | None = None

    @property
    def ranks(self) -> int:
        return self.nproc * self.nnodes

    @property
    def max_restarts(self) -> int:
        """As asked for; else none for one process, which the same command continues as well."""
        return (RESTARTS if self.ranks > 1 else 0) if self.restarts is None else self.restarts

    @property
    def lead_host(self) -> str:
        """Node 0's name or address, as the other nodes reach it."""
        assert self.rdzv is not None
        return self.rdzv.rpartition(":")[0].strip("[]")


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
        if key in values:
            raise ConfigError(f"`--launch {text}` cannot be read", cause=f"it says `{key}` twice", hint=hint)
        if key == "rdzv":
            host, _, port = value.rpartition(":")
            if not host or not port.isdecimal() or not 0 < int(port) <= MAX_PORT:
                cause = "it must be node 0's name or address and a free port there"
                raise ConfigError(f"`--launch rdzv={value}` is not `host:port`", cause=cause, hint=hint)
            values[key] = value
            continue
        lowest = 1 if key in ("nproc", "nnodes") else 0
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


def attempt_id(stage: StageDir) -> str:
    """Name of the stage's next attempt, which is torchrun's rendezvous id: an agent of an earlier one never joins it.

    Every attempt leaves a log, and `--force` moves the logs to `old/`, so no number comes twice.
    """
    logs = [*stage.log_dir.glob("attempt_*.log"), *stage.run.path.glob(f"old/*-{stage.path.name}*/log/attempt_*.log")]
    numbers = [path.stem.removeprefix("attempt_") for path in logs]
    last = max((int(number) for number in numbers if number.isdecimal()), default=0)
    return f"{stage.run.name}-{stage.path.name}-{last + 1}"


def launch_command(
    stage: StageDir, module: str, launch: Launch, *, has_gpu: bool, attempt: str | None = None
) -> list[str]:
    """The exact command line of a stage's workers on one node.

    One process without a GPU runs the module itself: torchrun would cost seconds and bring nothing.

    Args:
        attempt: the rendezvous id that node 0 made; the next one unless told.
    """
    worker = ["-m", module, str(stage.path)]
    if launch.ranks == 1 and not has_gpu and not launch.max_restarts:
        return [sys.executable, *worker]
    torchrun = [
        *(sys.executable, "-m", "torch.distributed.run"),
        f"--nproc-per-node={launch.nproc}",
        f"--max-restarts={launch.max_restarts}",
    ]
    if launch.nnodes == 1:
        return [*torchrun, "--standalone", *worker]
    leads = launch.node_rank == 0
    # The rendezvous numbers nodes by the order of these names, and the name of the first is where its ranks are met.
    # `~` comes after every letter and digit: so rank 0, which holds the lock and sees its launcher, stays on node 0.
    name = launch.lead_host if leads else f"~{launch.node_rank:04}"
    return [
        *torchrun,
        f"--nnodes={launch.nnodes}",
        f"--local-addr={name}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={launch.rdzv}",
        f"--rdzv-id={attempt or attempt_id(stage)}",
        f"--rdzv-conf=is_host={int(leads)},join_timeout={JOIN_TIMEOUT_S}",
        *worker,
    ]


def launch_commands(stage: StageDir, module: str, launch: Launch, *, has_gpu: bool) -> list[list[str]]:
    """`launch_command` for every node, node 0 first."""
    nodes = [replace(launch, node_rank=rank) for rank in range(launch.nnodes)]
    return [launch_command(stage, module, node, has_gpu=has_gpu) for node in nodes]


def check_launch(launch: Launch) -> None:
    """Refuse what torch would refuse minutes later, on every node for itself.

    Raises:
        ConfigError: more processes on this machine than GPUs.
        HostError: several GPUs, and torch cannot make them talk to each other; or nodes, and node 0 has no address.
    """
    import socket

    from picollm.hardware import detect
    from picollm.runtimes import check_ranks

    machine = detect()
    check_ranks(machine, launch.nproc)
    if machine.gpus and launch.ranks > 1:
        from picollm.torch_facts import torch_facts

        facts = torch_facts(machine)
        if not facts["distributed"]["nccl"]:
            raise HostError(
                f"{launch.ranks} processes on GPUs need NCCL",
                cause=f"torch {facts['torch']} was built without it",
                hint="install a CUDA build of torch (https://pytorch.org/get-started), or train with one process",
            )
    if launch.nnodes > 1:
        try:
            socket.getaddrinfo(launch.lead_host, None)
        except OSError as error:
            raise HostError(
                f"`rdzv={launch.rdzv}` names no machine",
                cause=error.strerror or str(error),
                hint="give node 0's name as this machine knows it (`getent hosts NAME`), or its address",
            ) from error
