"""Datasets that have a name before they are here: those of the Hub, where they are and how large, and the toy world.

Sizes are for plans made offline; what is downloaded is pinned by the Hub's own list of files (`hub.py`).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from picollm.errors import ConfigError, did_you_mean

# Generated on this machine (`toy_datasets.py`): text, and conversations.
TOY_WORLD = "toy-world"
TOY_WORLD_CHAT = "toy-world-chat"
TOY_NAMES = (TOY_WORLD, TOY_WORLD_CHAT)

# `hf:org/name`, `hf:org/name:config`, either with `@revision`.
_SPEC = re.compile(r"^hf:([\w.-]+/[\w.-]+)(?::([\w.-]+))?(?:@([\w./-]+))?$", re.ASCII)
# English web text under our tokenizers of 32,768 tokens, rounded up: rather a shard too many than a second epoch.
CHARS_PER_TOKEN = 4.5


@dataclass(frozen=True)
class HubSource:
    """Where a dataset is on the Hub.

    Attributes:
        config: a part of the repository, by the name its card or a folder of it has.
        revision: branch, tag or commit; the commit is what a dataset records.
        validation: path of the validation file, where it is pinned by name.
    """

    repo: str
    config: str | None = None
    revision: str = "main"
    validation: str | None = None


@dataclass(frozen=True)
class Registered:
    """A dataset that has a short name; its shards are alike.

    Attributes:
        num_shards: training shards, validation not counted.
        shard_chars: characters of text in one.
        shard_bytes: size of one on disk.
    """

    source: HubSource
    num_shards: int
    shard_chars: int
    shard_bytes: int

    def shards_for(self, tokens: int) -> int:
        """Training shards that hold so many tokens without repeating any, or all there are."""
        return min(self.num_shards, max(1, math.ceil(tokens * CHARS_PER_TOKEN / self.shard_chars)))


# Both were shuffled and cut into shards of equal size by the author of nanochat (FACTS 2.6); the last is validation.
REGISTRY = {
    "climbmix": Registered(
        HubSource("karpathy/climbmix-400b-shuffle", validation="shard_06542.parquet"),
        num_shards=6542,
        shard_chars=250_000_000,
        shard_bytes=100_000_000,
    ),
    "fineweb-edu": Registered(
        HubSource("karpathy/fineweb-edu-100b-shuffle", validation="shard_01822.parquet"),
        num_shards=1822,
        shard_chars=250_000_000,
        shard_bytes=100_000_000,
    ),
}


def source_named(text: str) -> HubSource:
    """What `climbmix` or `hf:org/name[:config][@revision]` means.

    Raises:
        ConfigError: neither a name of the registry nor of that form.
    """
    if text in REGISTRY:
        return REGISTRY[text].source
    if match := _SPEC.match(text):
        return HubSource(match[1], match[2], match[3] or "main")
    raise ConfigError(
        f"`{text}` is not a dataset that can be downloaded",
        cause=f"names are {', '.join(f'`{name}`' for name in REGISTRY)}; any other is `hf:org/name` or "
        "`hf:org/name:config`, with `@revision` if it must be a certain one",
        hint=did_you_mean(text, list(REGISTRY), "picollm data download ", otherwise="see `picollm data download -h`"),
    )


def local_name(text: str) -> str:
    """The name that a dataset gets on this machine unless somebody chooses one."""
    if text in REGISTRY:
        return text
    source = source_named(text)
    return source.repo.partition("/")[2] + (f"-{source.config}" if source.config else "")
