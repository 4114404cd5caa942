"""The files of a downloaded dataset: fetched several at a time, hashed, and only then given their names.

What is to come is pinned before (`pinned.py`). A half file stays in `parts/` and goes on next time; one that came with
another content goes to `quarantine/` and is fetched again.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from picollm.data import hub
from picollm.data.dataset_record import ShardFile
from picollm.data.datasets import Dataset
from picollm.data.hub_errors import LOGIN_HINT, TRIES, TryAgain, delay_s
from picollm.data.verified import Wrong
from picollm.errors import ConfigError, HostError, RemoteError
from picollm.files import disk_errors, fsync_path, sha256_file
from picollm.hardware import disk_free
from picollm.locks import hold_lock
from picollm.units import size

JOBS = 8
PARTS, QUARANTINE = "parts", "quarantine"
# A file is given up after TRIES without a mebibyte of gain, or when it came whole and wrong so often.
WRONG_TRIES, GAIN_BYTES = 3, 1 << 20
DISK_MARGIN_BYTES = 256 << 20
RATE_WINDOW_S = 20.0
STOP_WAIT_S = 2.0  # threads look up at every piece of a file; one that waits for a dead server is left behind
NAMED_MISSING = 40


@dataclass(frozen=True)
class State:
    """How far a download is, at one moment.

    Attributes:
        files, bytes: here and found right; of half files the bytes that came.
        rate: bytes a second over the last seconds.
        active: name, bytes that came and size of each file on its way.
    """

    files: int
    num_files: int
    bytes: int
    num_bytes: int
    rate: float
    active: list[tuple[str, int, int]]

    @property
    def left_s(self) -> float | None:
        """Seconds until it is done at this rate; None while nothing comes."""
        return (self.num_bytes - self.bytes) / self.rate if self.rate > 0 else None


class Download:
    """Context manager that fetches what a dataset lacks, in threads and in the order of its record.

    Leaving it stops the threads; half files stay and go on next time.

    Raises:
        HostError: another process is at it, or the disk has no room.
    """

    def __init__(self, dataset: Dataset, *, jobs: int = JOBS) -> None:
        self.dataset = dataset
        self._jobs = jobs
        self._stack = ExitStack()
        self._stop = threading.Event()
        self._changed = threading.Condition()  # guards everything below
        self._waiting: deque[ShardFile] = deque()
        self._active: set[str] = set()
        self._got = dict.fromkeys((file.name for file in dataset.files), 0)
        self._right: set[str] = set()
        self._failed: dict[str, str] = {}
        self._fatal: BaseException | None = None
        self._last_gain = 0.0
        self._came: deque[tuple[float, int]] = deque()  # (when, bytes that came so far)
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Download:
        dataset = self.dataset
        self._stack.enter_context(hold_lock(dataset.path / ".lock", f"dataset `{dataset.name}`"))
        try:
            self._waiting.extend(dataset.unverified())
            waiting = {file.name for file in self._waiting}
            for file in dataset.files:
                if file.name in waiting:
                    self._got[file.name] = self._on_disk(file)
                else:
                    self._right.add(file.name)
                    self._got[file.name] = file.bytes
            self._check_room()
            with disk_errors(dataset.path):
                (dataset.path / PARTS).mkdir(exist_ok=True)
        except BaseException:
            self._stack.close()
            raise
        self._came.append((time.monotonic(), 0))
        self._last_gain = time.monotonic()
        self._threads = [
            # Nothing that waits for a socket keeps the process from ending.
            threading.Thread(target=self._work, name=f"download-{i}", daemon=True)
            for i in range(min(self._jobs, len(self._waiting)))
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        deadline = time.monotonic() + STOP_WAIT_S
        for thread in self._threads:
            thread.join(timeout=max(0.0, deadline - time.monotonic()))
        self._stack.close()

    def _on_disk(self, file: ShardFile) -> int:
        for path in (self.dataset.path / file.name, self._part(file)):
            if path.is_file():
                return min(file.bytes, path.stat().st_size)
        return 0

    def _part(self, file: ShardFile) -> Path:
        return self.dataset.path / PARTS / file.name

    def _check_room(self) -> None:
        needed = sum(file.bytes for file in self.dataset.files) - sum(self._got.values())
        folder = self.dataset.path
        if needed and (free := disk_free(folder)) < needed + DISK_MARGIN_BYTES:
            raise HostError(
                f"not enough room for dataset `{self.dataset.name}`",
                cause=f"{size(needed)} are to come under `{folder}`, where {size(free)} are free",
                hint="free some, ask for fewer `--shards`, or set PICOLLM_BASE_DIR to a larger disk",
            )

    # -- for those who wait -------------------------------------------------------------------------------------------

    def state(self) -> State:
        """How far it is."""
        with self._changed:
            now, total = time.monotonic(), self._came[-1][1]
            while len(self._came) > 1 and now - self._came[0][0] > RATE_WINDOW_S:
                self._came.popleft()
            since, before = self._came[0]
            sizes = {file.name: file.bytes for file in self.dataset.files}
            return State(
                len(self._right),
                len(sizes),
                sum(self._got.values()),
                sum(sizes.values()),
                (total - before) / max(now - since, 1e-3),
                [(name, self._got[name], sizes[name]) for name in sorted(self._active)],
            )

    def wait(self, timeout_s: float) -> bool:
        """Wait that long or until nothing more will come; True says that it is over, for better or worse."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while self._waiting or self._active:
                if self._fatal is not None or (left := deadline - time.monotonic()) <= 0:
                    return self._fatal is not None
                self._changed.wait(left)
        return True

    def wait_for(self, file: ShardFile) -> None:
        """Wait until a file is here and right.

        Raises:
            RemoteError, HostError, IntegrityError: it will not come.
        """
        while True:
            with self._changed:
                if file.name in self._right:
                    return
                if file.name not in self._failed and self._fatal is None and (self._waiting or self._active):
                    self._changed.wait(0.2)  # short: Ctrl-C is looked at in between
                    continue
            self.check()
            raise hub.Stopped

    def check(self) -> None:
        """Raise what kept files from coming, if anything has.

        Raises:
            RemoteError: files are missing after all tries; they are named.
        """
        if self._fatal is not None:
            raise self._fatal
        if not self._failed:
            return
        # Whatever was still to come when it ended is missing too.
        names = [file.name for file in self.dataset.files if file.name not in self._right]
        named = ", ".join(names[:NAMED_MISSING]) + (", …" if len(names) > NAMED_MISSING else "")
        first, reason = next(iter(self._failed.items()))
        raise RemoteError(
            f"{len(names)} of {len(self.dataset.files)} files of dataset `{self.dataset.name}` are missing",
            cause=f"{named}; `{first}`: {reason}",
            hint=f"what came is kept; go on with `picollm data download {self.dataset.name}`",
        )

    # -- the threads --------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._changed:
                if self._stop.is_set() or not self._waiting:
                    return
                file = self._waiting.popleft()
                self._active.add(file.name)
            problem: str | None = None
            fatal: BaseException | None = None
            right = False
            try:
                self._obtain(file)
                right = True
            except hub.Stopped:
                pass
            except RemoteError as error:
                problem = error.cause or error.message
                if error.hint == LOGIN_HINT:  # the others would hear the same
                    fatal = error
            except BaseException as error:
                fatal = error
            with self._changed:
                self._active.discard(file.name)
                if right:
                    self._right.add(file.name)
                    self._got[file.name] = file.bytes
                if problem:
                    self._failed[file.name] = problem
                if fatal is not None:
                    self._fatal = self._fatal or fatal
                    self._stop.set()
                if self._stop.is_set():
                    self._waiting.clear()
                self._changed.notify_all()

    def _obtain(self, file: ShardFile) -> None:
        """Have a file under its name and right, however many tries it takes within the limits."""
        if (self.dataset.path / file.name).is_file() and self._accept(file):
            return
        wanted = hub.HubFile(file.origin or file.name, file.bytes, file.sha256)
        source, part = self.dataset.source, self._part(file)
        tries = wrong = 0
        since = time.monotonic()
        while True:
            before = self._got[file.name]
            asked: float | None = None
            try:
                hub.fetch(
                    source["hub"], source["revision"], wanted, part,
                    gained=lambda count: self._gained(file, count), stop=self._stop,
                )  # fmt: skip
                if self._take(file, part):
                    return
                reason, wrong = "it came with another content than the Hub's record says", wrong + 1
            except TryAgain as error:
                reason, asked = error.reason, error.after_s
            if self._got[file.name] - before >= GAIN_BYTES:
                tries, since = 0, time.monotonic()
            tries += 1
            if tries >= TRIES or wrong >= WRONG_TRIES:
                if not wrong and self._last_gain < since:
                    self._stop.set()  # nobody got anything all the while: the others need not try as long
                raise RemoteError(f"`{file.name}` did not come", cause=reason)
            if self._stop.wait(delay_s(tries, asked)):
                raise hub.Stopped

    def _gained(self, file: ShardFile, count: int) -> None:
        with self._changed:
            self._got[file.name] += count
            if count > 0:
                now = time.monotonic()
                self._last_gain = now
                total = self._came[-1][1] + count
                if now - self._came[-1][0] < 0.1 and len(self._came) > 1:
                    self._came.pop()
                self._came.append((now, total))

    def _take(self, file: ShardFile, part: Path) -> bool:
        """Give a whole file its name if its bytes are right, else put it aside."""
        if part.stat().st_size != file.bytes or (digest := sha256_file(part)) != file.sha256:
            self._put_aside(file, part)
            return False
        final = self.dataset.path / file.name
        with disk_errors(final):
            fsync_path(part)
            os.replace(part, final)
            fsync_path(final.parent)
        return self._accept(file, digest)

    def _accept(self, file: ShardFile, digest: str | None = None) -> bool:
        """Check the file under its name, which notes it as verified; a wrong one goes aside.

        Args:
            digest: its sha256, where it has just been computed.

        Raises:
            ConfigError: its bytes are right, and it holds no text.
        """
        try:
            self.dataset.verified.check(file, self.dataset.column, digest=digest)
            return True
        except Wrong as error:
            path = self.dataset.path / file.name
            if sha256_file(path) == file.sha256:
                raise ConfigError(
                    f"`{file.name}` of `{self.dataset.source['hub']}` cannot be read as text",
                    cause=str(error),
                    hint=f"remove it with `picollm data remove {self.dataset.name}`; name a column with `--field`",
                ) from error
            self._put_aside(file, path)
            return False

    def _put_aside(self, file: ShardFile, path: Path) -> None:
        """Into quarantine, for whoever wants to know; only the last wrong copy of a file is kept."""
        folder = self.dataset.path / QUARANTINE
        with disk_errors(folder):
            folder.mkdir(exist_ok=True)
            os.replace(path, folder / file.name)
        with self._changed:
            self._got[file.name] = 0
