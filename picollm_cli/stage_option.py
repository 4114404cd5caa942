"""`--stage` of the commands that use a trained model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Optional

import typer

if TYPE_CHECKING:
    from picollm.run_dir import RunDir, StageDir

StageOption = Annotated[
    Optional[str],
    typer.Option(
        "--stage",
        metavar="STAGE",
        help="pretrain or sft; the furthest one that is finished unless told.",
        show_default=False,
    ),
]


def choose_stage(run: RunDir, name: str | None) -> StageDir:
    """The training stage meant by `--stage`; the furthest finished one when it is None.

    Raises:
        ConfigError: there is no training stage of that name.
        MissingArtifact: none has finished.
    """
    from picollm.errors import ConfigError, did_you_mean
    from picollm.run_dir import TRAINING_STAGES

    if name is None:
        return run.latest_trained_stage()
    if name not in TRAINING_STAGES:
        raise ConfigError(
            f"`{name}` is not a training stage",
            cause=f"training stages are {', '.join(f'`{known}`' for known in TRAINING_STAGES)}",
            hint=did_you_mean(name, list(TRAINING_STAGES), "--stage "),
        )
    return run.stage(name)
