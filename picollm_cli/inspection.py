"""What checks are made of: their answer, the facts they read, and words for numbers."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from picollm.errors import PicollmError

if TYPE_CHECKING:
    from picollm.config.schema import RunConfig
    from picollm.data.datasets import Dataset
    from picollm.hardware import Machine
    from picollm.plan import Plan
    from picollm.run_dir import RunDir


@dataclass(frozen=True)
class Check:
    """What one check found: `block` stops a run, `warn` costs speed or safety, `info` is worth knowing."""

    id: str
    level: Literal["ok", "info", "warn", "block"]
    detail: str
    fix: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Inspection:
    """Facts about this machine and the run it is looked at for.

    Args:
        run: an existing run, whose stored config is looked at; None looks at a new one.
        name: what the run is or will be called; None leaves it to `speedrun`.
        preset: where a new run starts.
        config_path: `--config` of this call, over the preset or the stored config.
        sets: `--set` arguments of this call.
    """

    def __init__(
        self,
        *,
        run: RunDir | None = None,
        name: str | None = None,
        preset: str | None = None,
        config_path: Path | None = None,
        sets: Sequence[str] = (),
    ) -> None:
        self.run, self.name = run, name
        self.preset, self.config_path, self.sets = preset, config_path, tuple(sets)

    @cached_property
    def machine(self) -> Machine:
        from picollm.hardware import detect

        return detect()

    @cached_property
    def torch(self) -> dict[str, Any]:
        """The probe's answer; raises HostError when torch does not work."""
        from picollm.torch_facts import torch_facts

        return torch_facts(self.machine)

    @cached_property
    def config(self) -> RunConfig:
        from picollm.config.resolve import resolve, resolve_existing

        if self.run is not None:
            stored = self.run.read_config()
            return resolve_existing(stored, config_path=self.config_path, sets=self.sets).config
        return resolve(preset=self.preset, config_path=self.config_path, sets=self.sets).config

    @cached_property
    def plan(self) -> Plan:
        from picollm.plan import make_plan

        return make_plan(self.config, self.machine, dataset_chars=self._dataset_chars())

    def dataset(self, name: str) -> Dataset | None:
        """A dataset by name; None for one that the run makes or fetches and that is not there, or not all of it."""
        from picollm.data.datasets import Dataset
        from picollm.data.registry import REGISTRY, TOY_NAMES
        from picollm.errors import MissingArtifact

        try:
            found = Dataset.open(name)
            found.check_sizes()
        except MissingArtifact:
            if name in TOY_NAMES or name in REGISTRY:
                return None
            raise
        return found

    def _dataset_chars(self) -> int | None:
        try:
            datasets = [self.dataset(name) for name, _ in self.config.data.sources]
        except PicollmError:
            return None  # the check `dataset` says why; the plan goes on with an estimate
        found = [dataset.chars("train") for dataset in datasets if dataset]
        return sum(found) if len(found) == len(datasets) else None

    def require_config(self) -> None:
        """Resolve the config now, so that what is wrong with it is an error of the command.

        Raises:
            ConfigError: an unknown preset or key, or a value out of range.
        """
        try:
            _ = self.config
        except ImportError:
            return  # without its packages nothing resolves; the check `packages` says which one is missing

    @property
    def subject(self) -> str:
        """What the plan is for, as a phrase."""
        if self.run:
            return f"run `{self.run.name}`"
        return f"preset `{self.preset}`" if self.preset else f"config `{self.config_path}`"

    @property
    def command(self) -> str:
        """The command line that trains it, for the next step."""
        words = ["picollm", "speedrun"]
        if self.preset:
            words += ["--preset", self.preset]
        if self.name:
            words += ["--run", self.name]
        if self.config_path:
            words += ["--config", str(self.config_path)]
        for argument in self.sets:
            words += ["--set", argument]
        return shlex.join(words)


# -- words for numbers ------------------------------------------------------------------------------------------------


def rate_text(rate: float | None) -> str:
    """A rate of arithmetic: `85 GFLOP/s`; None is a type that does not run."""
    if rate is None:
        return "does not run"
    return f"{rate / 1e12:.0f} TFLOP/s" if rate >= 1e13 else f"{rate / 1e9:.0f} GFLOP/s"
