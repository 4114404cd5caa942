"""Tokenizers that others published, to measure ours beside: found on this machine, never fetched.

A reference is a `tokenizer.json`, or a `.tiktoken` file (a line per token: its bytes in base64, and its rank) of an
encoding whose split regex is known. Programs that use GPT-2's and GPT-4's keep such files in their caches.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path

import tokenizers
from tokenizers import Regex, models, pre_tokenizers

from picollm.errors import ConfigError, IntegrityError, MissingArtifact
from picollm.tokenizer.tokenizer import byte_alphabet, cut_space_runs


@dataclass(frozen=True)
class Published:
    """Where a published tokenizer is kept by the programs that use it, and how it splits text.

    Args:
        hub_names: repositories that hold it as `tokenizer.json`.
        cache_key: name of its ranks in tiktoken's cache.
        sha256: of those ranks, as tiktoken checks it.
        pattern: of the split before BPE, without the possessive quantifiers that change its speed alone.
    """

    hub_names: tuple[str, ...]
    cache_key: str
    sha256: str
    pattern: str


PUBLISHED: dict[str, Published] = {
    "GPT-2": Published(
        ("gpt2", "openai-community/gpt2"),
        "0ea1e91bbb3a60f729a8dc8f777fd2fc07cd8df4",
        "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    ),
    "GPT-4": Published(
        ("Xenova/gpt-4",),
        "9b5ad71b2ce5302211f9c61530b329a4922fc6a4",
        "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
}


class Reference:
    """A foreign tokenizer, of which only the number of tokens is wanted."""

    def __init__(self, name: str, path: Path, backend: tokenizers.Tokenizer) -> None:
        self.name, self.path, self._backend = name, path, backend

    @property
    def vocab_size(self) -> int:
        """Tokens in all, special ones included where its file has them."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def count(self, texts: Sequence[str]) -> int:
        """Tokens of all texts together."""
        pieces = list(chain.from_iterable(map(cut_space_runs, texts)))
        return sum(map(len, self._backend.encode_batch_fast(pieces, add_special_tokens=False)))


def open_reference(path: Path) -> Reference:
    """A tokenizer from a file that the user names.

    Raises:
        MissingArtifact: there is no such file.
        ConfigError: it is neither a `tokenizer.json` nor the ranks of GPT-2 or GPT-4.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise MissingArtifact(
            f"there is no tokenizer `{path}`",
            cause=error.strerror,
            hint="name a `tokenizer.json`, for example `picollm tokenizer eval --beside tokenizer.json`",
        ) from None
    digest = hashlib.sha256(data).hexdigest()
    for name, published in PUBLISHED.items():
        if digest == published.sha256:
            return Reference(name, path, _from_ranks(data, published.pattern))
    try:
        return Reference(path.name, path, tokenizers.Tokenizer.from_buffer(data))
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(
            f"`{path}` is not a tokenizer that can be measured",
            cause=f"as a `tokenizer.json` it does not parse ({error}), and it is not the ranks of "
            + " or ".join(PUBLISHED),
            hint="name a `tokenizer.json`; every model on the Hub that has a fast tokenizer has one",
        ) from None


def find_references(environ: Mapping[str, str] = os.environ) -> tuple[list[Reference], dict[str, str]]:
    """GPT-2 and GPT-4 where another program has left them, and per name why one is absent. Reads no network.

    Looked at are the Hub client's cache (`HF_HUB_CACHE`, `HF_HOME`) and tiktoken's (`TIKTOKEN_CACHE_DIR`). A damaged
    file counts as absent.
    """
    found: list[Reference] = []
    absent: dict[str, str] = {}
    for name, published in PUBLISHED.items():
        reason = "no file of it is in the caches of the Hub's client or of tiktoken"
        for path in _candidates(published, environ):
            try:
                reference = open_reference(path)
            except (ConfigError, MissingArtifact, IntegrityError):
                reason = f"`{path}` is damaged"
                continue
            reference.name = name
            found.append(reference)
            break
        else:
            absent[name] = reason
    return found, absent


def _candidates(published: Published, environ: Mapping[str, str]) -> Iterator[Path]:
    cache = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    home = Path(environ.get("HF_HOME") or cache / "huggingface")
    hub = Path(environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE") or home / "hub")
    for name in published.hub_names:
        yield from sorted(hub.glob(f"models--{name.replace('/', '--')}/snapshots/*/tokenizer.json"))
    left_by_tiktoken = environ.get("TIKTOKEN_CACHE_DIR") or environ.get("DATA_GYM_CACHE_DIR")
    ranks = Path(left_by_tiktoken or Path(tempfile.gettempdir()) / "data-gym-cache") / published.cache_key
    if ranks.is_file():
        yield ranks


def _from_ranks(data: bytes, pattern: str) -> tokenizers.Tokenizer:
    """A tokenizer of the library from tiktoken's ranks.

    Raises:
        IntegrityError: the ranks are no BPE.
    """
    try:
        lines = (line.split() for line in data.splitlines() if line)
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        merges = [_last_merge(token, rank, ranks) for token, rank in ranks.items() if len(token) > 1]
    except (ValueError, binascii.Error) as error:
        raise IntegrityError("the ranks are not those of a BPE", cause=str(error), hint="name another file") from None
    letter = {byte: character for character, byte in byte_alphabet().items()}

    def spell(token: bytes) -> str:
        return "".join(letter[byte] for byte in token)

    backend = tokenizers.Tokenizer(
        models.BPE(
            {spell(token): rank for token, rank in ranks.items()},
            [(spell(left), spell(right)) for left, right in merges],
            ignore_merges=True,  # tiktoken, too, takes a piece that is a token whole
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    return backend


def _last_merge(token: bytes, rank: int, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens that BPE joins into this one: what is left when only earlier ranks have been applied.

    Raises:
        ValueError: earlier ranks do not lead to two tokens.
    """
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        joined = [(ranks.get(left + right, rank), i) for i, (left, right) in enumerate(pairwise(parts))]
        best, i = min(joined)
        if best >= rank:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    if len(parts) != 2:
        raise ValueError(f"no two tokens of lower rank make {token!r}")
    return parts[0], parts[1]
