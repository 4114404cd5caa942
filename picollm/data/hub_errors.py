"""What can go wrong between us and the Hub: what passes and is tried again, and what is an error of ours.

Messages never carry the token, nor an address with its query, which content networks sign, or a password in it.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from picollm.errors import ConfigError, PicollmError, RemoteError, first_line

LOGIN_HINT = "log in with `hf auth login`, and accept the terms on the dataset's page if it has some"
TRIES = 6  # for a file; a question that somebody waits for is given up sooner
QUESTION_TRIES = 4
# Seconds before the second try, doubled every time; what the Hub itself asks for goes before, up to its own limit.
FIRST_WAIT_S, LONGEST_WAIT_S, LONGEST_ASKED_S = 1.0, 30.0, 600.0

Answer = TypeVar("Answer")


class TryAgain(Exception):
    """The Hub could not now; `after_s` is how long it asks to be left alone, if it says."""

    def __init__(self, reason: str, after_s: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.after_s = reason, after_s


def delay_s(tries: int, asked_s: float | None) -> float:
    """How long to wait after so many tries; a little different for everybody, unless the Hub asked for so long."""
    if asked_s is not None:
        return min(asked_s, LONGEST_ASKED_S)
    return min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (tries - 1)) * random.uniform(0.75, 1.25)


def patiently(repo: str, ask: Callable[[], Answer]) -> Answer:
    """Ask the Hub, again and again where that may help.

    Raises:
        ConfigError: what is asked for does not exist.
        RemoteError: no answer after all tries, or no access.
    """
    tries = 0
    while True:
        try:
            with speaking(repo):
                return ask()
        except TryAgain as error:
            tries += 1
            if tries == QUESTION_TRIES:
                raise RemoteError(
                    f"the Hub did not answer for `{repo}`", cause=error.reason, hint="run the same command again"
                ) from None
            time.sleep(delay_s(tries, error.after_s))


@contextmanager
def speaking(repo: str) -> Iterator[None]:
    """Turn what the client raises into an error of ours, or TryAgain."""
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    try:
        yield
    except (HTTPError, OfflineModeIsEnabled) as error:
        # Not `from error`: it holds the request, and that the token.
        raise _translated(error, repo) from None


def _translated(error: Exception, repo: str) -> PicollmError | TryAgain:
    from huggingface_hub import errors

    reason = _blotted(first_line(error))
    if isinstance(error, errors.OfflineModeIsEnabled):
        return RemoteError("the Hub's client is offline", cause=reason, hint="unset HF_HUB_OFFLINE, then run it again")
    if isinstance(error, errors.GatedRepoError):
        return RemoteError(f"no access to `{repo}`", cause="its owner asks for terms to be accepted", hint=LOGIN_HINT)
    if isinstance(error, errors.RevisionNotFoundError):
        return ConfigError(
            f"`{repo}` has no such revision", cause=reason, hint="see the dataset's page for its branches"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return ConfigError(f"there is no dataset `{repo}` on the Hub, or it is private", cause=reason, hint=LOGIN_HINT)
    if isinstance(error, errors.EntryNotFoundError):
        return RemoteError("the file is gone from the Hub")
    if not isinstance(error, errors.HfHubHTTPError):
        return TryAgain(reason)
    code = error.response.status_code
    if code in (401, 403):
        return RemoteError(f"no access to `{repo}`", cause=reason, hint=LOGIN_HINT)
    if code in (408, 429) or code >= 500:
        return TryAgain(f"HTTP {code}", _retry_after_s(error.response.headers))
    return RemoteError(f"the Hub refused `{repo}`", cause=reason)


def _retry_after_s(headers: Any) -> float | None:
    """Seconds to wait: `Retry-After`, or what the Hub's rate limit says (`"api";r=0;t=55`)."""
    if (seconds := headers.get("Retry-After", "")).isascii() and seconds.isdigit():
        return float(seconds)
    match = re.search(r"r=0;\s*t=(\d+)", headers.get("RateLimit", ""))
    return float(match[1]) if match else None


def _blotted(text: str) -> str:
    """A message without the token, and without the query of an address: content networks sign it."""
    from huggingface_hub import get_token

    if token := get_token():
        text = text.replace(token, "***")
    text = re.sub(r"(//)[^/\s@]+@", r"\1", text)  # who asks: an endpoint may hold a name and a password
    return re.sub(r"\?[^\s'\"]+", "", text)
