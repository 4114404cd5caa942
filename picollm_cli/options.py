"""Options that several commands share, spelled once."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

Run = Annotated[
    Optional[str],
    typer.Option("--run", metavar="NAME", help="Name of the run. \\[env: PICOLLM_RUN]", show_default=False),
]
Preset = Annotated[
    Optional[str],
    typer.Option("--preset", metavar="NAME", help="Preset to start from: demo, cpu-small, d12 …", show_default=False),
]
ConfigFile = Annotated[
    Optional[str],
    typer.Option("--config", metavar="FILE", help="TOML file with values over the preset's.", show_default=False),
]
Set = Annotated[
    Optional[list[str]],
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="One config value, as `train.steps=600`; may be repeated.",
        show_default=False,
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show config, estimate and launch line; change nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output on stdout.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Answer yes to every question.")]
Launch = Annotated[
    Optional[str],
    typer.Option(
        "--launch",
        metavar="KEY=VALUE,…",
        help="Processes, as `nproc=8`; several nodes also take `nnodes=2,node_rank=0` and `rdzv=host:port`. "
        "`restarts=3` is how often a stage goes on by itself after one of several processes died.",
        show_default=False,
    ),
]
