"""The toy world as datasets: generated the first time that somebody asks for them, the same bytes on every machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from picollm.data.conversations import Conversation
from picollm.data.dataset_record import SPLITS, Split
from picollm.data.dataset_writer import DatasetWriter
from picollm.data.datasets import Dataset
from picollm.data.registry import TOY_NAMES, TOY_WORLD, TOY_WORLD_CHAT
from picollm.errors import PicollmError
from picollm.locks import hold_lock
from picollm.run_dir import datasets_dir

TOY_SEED = 1
TOY_SIZES = {TOY_WORLD: (8_000, 300), TOY_WORLD_CHAT: (12_000, 300)}  # rows of train and validation
TOY_FINGERPRINT_ROWS = 256


def _toy_rows(name: str, split: Split, num: int) -> Iterator[str | Conversation]:
    from picollm.data import toy_world

    if name == TOY_WORLD:
        generate = toy_world.documents if split == "train" else toy_world.validation_documents
        yield from generate(num, TOY_SEED)
    else:
        # Another seed gives another stream of the same facts.
        seed = TOY_SEED if split == "train" else TOY_SEED + 1
        yield from map(Conversation.from_json, toy_world.conversations(num, seed))


def _toy_source(name: str) -> dict[str, Any]:
    """Says which generator made the rows: a hash of the first of them, so that a changed generator is noticed."""
    digest = hashlib.sha256()
    streams = [_toy_rows(name, split, TOY_FINGERPRINT_ROWS) for split in SPLITS]
    for row in chain(*streams):
        text = row if isinstance(row, str) else json.dumps(row.to_json(), ensure_ascii=False)
        digest.update(text.encode() + b"\0")
    return {"generator": "picollm.data.toy_world", "seed": TOY_SEED, "fingerprint": digest.hexdigest()}


def _toy_is_intact(name: str, base: Path | None, keep: Collection[str]) -> bool:
    try:
        dataset = Dataset.open(name, base)
        dataset.check_sizes()
    except PicollmError:
        return False
    return dataset.sha256 in keep or dataset.source == _toy_source(name)


def ensure_toy_world(base: Path | None = None, *, keep: Collection[str] = ()) -> None:
    """Generate the datasets `toy-world` and `toy-world-chat` unless both are there and intact.

    Cheap when they are: records, file sizes and a hash of the first rows. Damaged ones are made again, and those of an
    older generator. Processes that call this at the same time wait for one another.

    Args:
        keep: hashes of datasets that a run was prepared with: they stay, whatever generator made them.

    Raises:
        HostError: the base directory cannot be written.
    """
    if all(_toy_is_intact(name, base, keep) for name in TOY_NAMES):
        return
    with hold_lock(datasets_dir(base) / ".toy-world.lock", "the toy world", wait_s=300):
        for name in TOY_NAMES:
            if _toy_is_intact(name, base, keep):
                continue
            with DatasetWriter(name, base) as writer:
                writer.start("text" if name == TOY_WORLD else "conversations")
                for split, num in zip(SPLITS, TOY_SIZES[name], strict=True):
                    for row in _toy_rows(name, split, num):
                        writer.add(split, row)
                # What is replaced was generated too: there is nothing of the user's to keep.
                writer.publish(_toy_source(name), existing="delete")


def ensure(name: str, base: Path | None = None, *, keep: Collection[str] = ()) -> Dataset:
    """Open a dataset; the toy world's are generated first when they are not there.

    Args:
        keep: as in `ensure_toy_world`.

    Raises:
        MissingArtifact, IntegrityError: as `Dataset.open`.
    """
    if name in TOY_NAMES:
        ensure_toy_world(base, keep=keep)
    return Dataset.open(name, base, keep=keep)
