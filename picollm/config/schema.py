"""The one config tree of a run."""

from __future__ import annotations

from pydantic import Field

from picollm.config.base import Section
from picollm.config.data import DataConfig
from picollm.config.eval import EvalConfig
from picollm.config.model import ModelConfig
from picollm.config.sft import SftConfig
from picollm.config.tokenizer import TokenizerConfig
from picollm.config.train import TrainConfig


class RunConfig(Section):
    """Everything an operator may say about a run. Sections and keys are those of `--set section.key=value`."""

    seed: int = Field(default=42, ge=0, lt=2**63)
    """Decides initial weights and data order."""
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    sft: SftConfig = SftConfig()
    eval: EvalConfig = EvalConfig()


# How a stage is executed, not what it learns: free to change on resume.
RUNTIME_KEYS = frozenset(
    {
        "train.device_batch_size",
        "train.threads",
        "train.compile",
        "train.checkpoint_every",
        "train.checkpoint_minutes",
        "train.activation_checkpointing",
        "train.keep_last",
        "train.eval_every",
        "train.eval_tokens",
        "model.attention",
        "data.cache_gib",
    }
)
