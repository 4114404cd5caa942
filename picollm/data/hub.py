"""The Hub through its own client: what a repository holds at a commit, and the bytes of one file.

Files come over plain HTTP ranges with the client's session, so that a half file goes on where a killed process left
it: `hf_hub_download` of huggingface_hub 2 starts every file over. The token is the client's business: it is read from
its cache or environment and sent to the Hub alone.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from picollm import __version__
from picollm.data.hub_errors import TryAgain, patiently, speaking
from picollm.data.registry import HubSource
from picollm.errors import ConfigError, first_line
from picollm.files import disk_errors

if TYPE_CHECKING:
    import pyarrow.parquet

IMPORT_HINT = "download its files yourself and make a dataset of them with `picollm data import NAME PATH…`"
FOOTER_BYTES = 1 << 18
# A list of thousands of files takes the Hub longer than the first bytes of one.
LISTING_TIMES = 6
_HELD_OUT = re.compile(r"(?:^|[/_.-])(validation|valid|val|dev|test)(?=[/_.-])")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Stopped(Exception):
    """Somebody asked to stop in the middle of a file."""


@dataclass(frozen=True)
class HubFile:
    """A file at a commit: its path in the repository, its size, and the hash of its bytes."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Listing:
    """The parquet files of a dataset at one commit, each split in the order of the files' names."""

    commit: str
    train: tuple[HubFile, ...]
    validation: tuple[HubFile, ...]


# -- what there is ----------------------------------------------------------------------------------------------------


def list_files(source: HubSource) -> Listing:
    """Ask the Hub for the files of a dataset.

    A file is validation when the source names it, or its card or its path says `validation` or, where none does,
    `test`; else it is the last by name.

    Raises:
        ConfigError: no such repository, revision or config; or it has fewer than two parquet files.
        RemoteError: the Hub does not answer or does not let us in.
    """
    from huggingface_hub import HfApi

    api = HfApi(endpoint=_endpoint(), library_name="picollm", library_version=__version__)
    info = patiently(
        source.repo,
        lambda: api.dataset_info(
            source.repo, revision=source.revision, files_metadata=True, timeout=LISTING_TIMES * _timeout_s()
        ),
    )
    found = {
        entry.rfilename: HubFile(entry.rfilename, entry.size or 0, entry.lfs["sha256"] if entry.lfs else "")
        for entry in info.siblings or []
        if entry.rfilename.endswith(".parquet")
    }
    splits = _splits(source, sorted(found), _patterns(source, info.card_data))
    listing = Listing(info.sha or "", *(tuple(found[path] for path in paths) for paths in splits))
    if not listing.train or not listing.validation:
        raise ConfigError(
            f"`{source.repo}` has {len(listing.train) + len(listing.validation)} parquet files to train on",
            cause="two are needed, one of them for validation",
            hint=IMPORT_HINT,
        )
    if unhashed := [file.path for file in (*listing.train, *listing.validation) if not file.sha256]:
        raise ConfigError(
            f"`{source.repo}` cannot be verified", cause=f"the Hub has no sha256 of `{unhashed[0]}`", hint=IMPORT_HINT
        )
    return listing


def _patterns(source: HubSource, card: Any) -> dict[str, list[str]] | None:
    """Split -> patterns of paths, for the config that is meant, as the dataset's card has them; None without any."""
    configs = {}
    for entry in (card or {}).get("configs") or []:
        files = entry.get("data_files") or []
        # A card gives one pattern, a list of them, or a list of splits with one or more each.
        files = [files] if isinstance(files, str) else files
        of: dict[str, list[str]] = {}
        for item in files:
            split, path = (item["split"], item["path"]) if isinstance(item, dict) else ("train", item)
            of.setdefault(split, []).extend([path] if isinstance(path, str) else path)
        if of:
            configs[entry.get("config_name", "default")] = of
    if source.validation or not configs:
        return None
    name = source.config or ("default" if len(configs) > 1 else next(iter(configs)))
    if name in configs:
        return configs[name]
    if source.config:
        return None  # a folder may have the name
    raise ConfigError(
        f"`{source.repo}` holds several datasets",
        cause=f"its configs are {', '.join(configs)}",
        hint=f"choose one, such as `picollm data download hf:{source.repo}:{next(iter(configs))} --shards N`",
    )


def _splits(source: HubSource, paths: list[str], patterns: dict[str, list[str]] | None) -> tuple[list[str], list[str]]:
    """(training paths, validation paths)."""
    if source.validation:
        return [path for path in paths if path < source.validation], [p for p in paths if p == source.validation]
    if patterns is not None:
        split_of = {
            path: split for split, globs in patterns.items() for path in paths if any(fnmatch(path, g) for g in globs)
        }
    else:
        if source.config:
            paths = [path for path in paths if path.startswith(f"{source.config}/")]
        split_of = {path: (_HELD_OUT.search(path) or ["", "train"])[1] for path in paths}
    held_out: list[str] = []
    for names in (("validation", "valid", "val", "dev"), ("test",)):
        held_out = held_out or [path for path in paths if split_of.get(path) in names]
    train = [path for path in paths if split_of.get(path, "").startswith("train")]
    return (train, held_out) if held_out else (train[:-1], train[-1:])


def read_footer(repo: str, commit: str, file: HubFile) -> pyarrow.parquet.FileMetaData:
    """What a parquet file says about itself, from its last bytes alone.

    Raises:
        ConfigError: it is not parquet.
        RemoteError: the Hub does not answer.
    """
    import pyarrow
    import pyarrow.parquet
    from huggingface_hub.utils import get_session, hf_raise_for_status

    def last(num_bytes: int) -> bytes:
        headers = _headers() | {"Range": f"bytes={max(0, file.bytes - num_bytes)}-{file.bytes - 1}"}
        response = get_session().get(_url(repo, commit, file.path), headers=headers, timeout=_timeout_s())
        hf_raise_for_status(response)
        return response.content[-num_bytes:]

    tail = patiently(repo, lambda: last(FOOTER_BYTES))
    if (length := int.from_bytes(tail[-8:-4], "little") + 8) > len(tail):
        tail = patiently(repo, lambda: last(min(length, file.bytes)))
    try:
        return pyarrow.parquet.read_metadata(pyarrow.BufferReader(b"PAR1" + tail[-length:]))
    except pyarrow.ArrowException as error:
        raise ConfigError(
            f"`{file.path}` of `{repo}` is not readable parquet", cause=first_line(error), hint=IMPORT_HINT
        ) from error


# -- one file ---------------------------------------------------------------------------------------------------------


def fetch(
    repo: str,
    commit: str,
    file: HubFile,
    part: Path,
    *,
    gained: Callable[[int], None],
    stop: threading.Event,
) -> None:
    """Bring `part` to the file's size, going on where it ends; what is in it is not looked at.

    Args:
        gained: called with the bytes that were added, and with what was lost when a file has to start over.

    Raises:
        TryAgain: it broke off, or the Hub is busy, or names another content than is recorded.
        Stopped: `stop` was set.
        RemoteError: it cannot be had: gone, or no access.
        HostError: the disk cannot be written.
    """
    from huggingface_hub.utils import get_session, hf_raise_for_status

    have = part.stat().st_size if part.exists() else 0
    if have == file.bytes and part.exists():
        return
    headers = _headers() | ({"Range": f"bytes={have}-"} if have else {})
    with (
        speaking(repo),
        get_session().stream("GET", _url(repo, commit, file.path), headers=headers, timeout=_timeout_s()) as response,
    ):
        if response.status_code == 416 or have > file.bytes:
            part.unlink()
            gained(-have)
            raise TryAgain("the half file was longer than the whole")
        hf_raise_for_status(response)
        _check_named(file, [*response.history, response])
        if have and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            gained(-have)  # the server sends the whole file
            have = 0
        with disk_errors(part):
            sink = open(part, "ab" if have else "wb")
        with sink:
            for chunk in response.iter_bytes():
                if stop.is_set():
                    raise Stopped
                with disk_errors(part):
                    sink.write(chunk)
                have += len(chunk)
                gained(len(chunk))
                if have > file.bytes:
                    break
            with disk_errors(part):
                sink.flush()
    if have < file.bytes:
        raise TryAgain(f"the connection ended after {have:,} of {file.bytes:,} bytes")


def _check_named(file: HubFile, responses: list[Any]) -> None:
    """The hash that the Hub announces, where it does, is the recorded one."""
    for response in responses:
        named = (response.headers.get("X-Linked-Etag") or "").strip('"')
        if _SHA256.fullmatch(named) and named != file.sha256:
            raise TryAgain("the Hub announces another content than its list of files does")


def _endpoint() -> str | None:
    # The client reads it when it is imported; a process that sets it later means it too.
    return os.environ.get("HF_ENDPOINT") or None


def _url(repo: str, commit: str, path: str) -> str:
    from huggingface_hub import hf_hub_url

    return hf_hub_url(repo, path, repo_type="dataset", revision=commit, endpoint=_endpoint())


def _headers() -> dict[str, str]:
    from huggingface_hub.utils import build_hf_headers

    return build_hf_headers(library_name="picollm", library_version=__version__) | {"Accept-Encoding": "identity"}


def _timeout_s() -> float:
    from huggingface_hub import constants

    return constants.HF_HUB_DOWNLOAD_TIMEOUT
