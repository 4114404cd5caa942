"""What an exported file says about itself: which run, stage and step, trained on what, made by which picollm."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from picollm import __version__
from picollm.errors import ConfigError
from picollm.files import sha256_json
from picollm.run_dir import TRAINING_STAGES
from picollm.scaling import num_params

if TYPE_CHECKING:
    from picollm.export.folding import Checkpoint


@dataclass(frozen=True)
class Provenance:
    """Where a model comes from.

    Attributes:
        datasets: name -> sha256 of every dataset that it or an earlier stage learnt from.
        training_tokens: seen in this stage and the ones before it.
        license: of the weights, as the user gave it; only they can know.
    """

    run: str
    stage: str
    step: int
    num_params: int
    datasets: dict[str, str]
    training_tokens: int
    checkpoint_sha256: str
    recipe_sha256: str
    tokenizer_sha256: str
    license: str | None = None
    picollm: str = __version__

    @property
    def is_chat(self) -> bool:
        """False for a base model, which knows no turns."""
        return self.stage != "pretrain"

    @property
    def name(self) -> str:
        return f"{self.run}-{self.stage}"

    @property
    def size_label(self) -> str:
        """Parameters as model names have them: 780K, 135M, 1.3B."""
        for scale, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
            if self.num_params >= scale:
                shown = self.num_params / scale
                return f"{shown:.1f}{letter}" if shown < 10 else f"{shown:.0f}{letter}"
        return str(self.num_params)

    @property
    def tags(self) -> list[str]:
        return ["text-generation", *(["conversational"] if self.is_chat else []), "picollm"]

    @property
    def description(self) -> str:
        kind = "chat model" if self.is_chat else "base model"
        return f"{kind} of picollm run {self.run}, stage {self.stage}, step {self.step:,}"


def provenance_of(checkpoint: Checkpoint, license: str | None) -> Provenance:
    """What a checkpoint and the records of its stage and of those before it say.

    Raises:
        ConfigError: the licence is no name of one.
        MissingArtifact: the stage has no config.
        IntegrityError: a config is torn or of another version.
    """
    # It stands in the YAML of a model card, where a colon or a line break would be more than a name.
    if license is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+() -]*", license):
        raise ConfigError(
            f"{license!r:.60} names no licence",
            cause="names are of letters, digits, dots, plus signs, hyphens, brackets and spaces",
            hint="give its SPDX name, as `--license apache-2.0`, or leave it out",
        )
    stage = checkpoint.stage
    recipe = stage.read_config()["recipe"]
    datasets: dict[str, str] = {}
    tokens = 0
    for name in TRAINING_STAGES[: TRAINING_STAGES.index(stage.name) + 1]:
        earlier = stage.run.stage(name)
        if not earlier.config_path.is_file():
            continue
        part: dict[str, Any] = earlier.read_config()["recipe"]
        datasets |= {source["dataset"]: source["sha256"] for source in part.get("data", [])}
        done = checkpoint.step if name == stage.name else max(earlier.finished_steps(), default=0)
        tokens += done * int(part["batch_tokens"])
    return Provenance(
        run=stage.run.name,
        stage=stage.name,
        step=checkpoint.step,
        num_params=num_params(checkpoint.arch).total,
        datasets=datasets,
        training_tokens=tokens,
        checkpoint_sha256=checkpoint.sha256,
        recipe_sha256=sha256_json(recipe),
        tokenizer_sha256=checkpoint.tokenizer_sha256,
        license=license,
    )
