"""What `dataset.json` says of a dataset: its kind, where it is from, every file with its split, size and hash."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from picollm.data.registry import REGISTRY, TOY_NAMES
from picollm.errors import IntegrityError
from picollm.files import SCHEMA, read_json, sha256_file
from picollm.run_dir import NAME_PATTERN

Kind = Literal["text", "conversations"]
Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")
RECORD_NAME = "dataset.json"
# Where a downloaded dataset keeps its records of fewer shards, for the runs that were trained on them.
OLDER_FOLDER = "older"


@dataclass(frozen=True)
class ShardFile:
    """One file of a dataset as its record pins it.

    Attributes:
        rows, chars: what is inside; None where it was not known when the record was written.
        bytes: size of the file on disk.
        origin: its path in the repository it is downloaded from.
    """

    name: str
    split: Split
    rows: int | None
    bytes: int
    chars: int | None
    sha256: str
    origin: str | None = None

    def check(self) -> None:
        """Raises ValueError, TypeError: not what a record may say, whoever wrote it."""
        if not NAME_PATTERN.match(self.name) or self.split not in SPLITS:
            raise ValueError(f"it names a file `{self.name}` of split `{self.split}`")
        counts = [count for count in (self.bytes, self.rows, self.chars) if count is not None]
        if self.bytes is None or any(type(count) is not int or count < 0 for count in counts):
            raise ValueError(f"sizes of `{self.name}` are no counts")
        if not isinstance(self.sha256, str) or not isinstance(self.origin, str | None):
            raise ValueError(f"`sha256` or `origin` of `{self.name}` is no text")

    def to_json(self) -> dict[str, Any]:
        """As the record has it: without an origin where it has none, so that records stay what they were."""
        return {key: value for key, value in asdict(self).items() if key != "origin" or value is not None}


@dataclass(frozen=True)
class DatasetRecord:
    """A record that was read and found usable.

    Attributes:
        sha256: of its bytes, which hold the hash of every shard: the dataset's identity.
    """

    kind: Kind
    sha256: str
    source: dict[str, Any]
    created_by: str
    files: tuple[ShardFile, ...]
    totals: dict[str, Any]


def read_record(name: str, path: Path) -> DatasetRecord:
    """The record of dataset `name` in a file.

    Raises:
        IntegrityError: it does not exist, is torn, or of another version.
    """
    again = f"make it again with `picollm data import {name} PATH… --force`"
    if name in TOY_NAMES:
        again = f"make it again with `picollm data show {name}`"
    elif name in REGISTRY:
        again = f"remove it with `picollm data remove {name}`, then `picollm data download {name} --shards N`"
    try:
        content = read_json(path)
        digest = sha256_file(path)
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            raise ValueError(f"its schema is not {SCHEMA}, the one this version reads")
        files = tuple(ShardFile(**entry) for entry in content["files"])
        for file in files:
            file.check()
        if len({file.name for file in files}) != len(files):
            raise ValueError("it names a file twice")
        if content["kind"] not in ("text", "conversations"):
            raise ValueError(f"its kind is {content['kind']!r}")
        if not isinstance(content["source"], dict) or not isinstance(content["totals"], dict):
            raise ValueError("`source` and `totals` must be objects")
        return DatasetRecord(
            content["kind"], digest, content["source"], content["created_by"], files, content["totals"]
        )
    except FileNotFoundError:
        raise IntegrityError(f"dataset `{name}` is torn", cause=f"`{path}` does not exist", hint=again) from None
    except IntegrityError as error:
        raise IntegrityError(f"dataset `{name}` is torn", cause=f"{error.message}: {error.cause}", hint=again) from None
    except (KeyError, TypeError, ValueError) as error:
        reason = f"no key {error}" if isinstance(error, KeyError) else str(error)
        raise IntegrityError(
            f"dataset `{name}` has a record that cannot be used", cause=f"`{path}`: {reason}", hint=again
        ) from error
