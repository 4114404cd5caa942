"""Everything a user can cause, as one tree. The exit code belongs to the class.

PicollmError            1
├─ ConfigError          2   a value or a combination of values
├─ HostError            3   this machine cannot: no GPU, disk full, a lock held elsewhere
├─ MissingArtifact      4   an earlier step has to run first; always names its command
├─ IntegrityError       5   bytes are not as recorded: checksum, torn file, foreign schema
├─ RemoteError          6   network or Hub; safe to retry
├─ WorkerError          7   a training process died
│  ├─ OutOfMemory       7
│  └─ Diverged          7   several steps in a row were not finite
├─ GateError            8   a publishing gate failed
└─ Interrupted        130   stopped on request, state saved

`assert` is for our own mistakes; whatever else escapes is a bug.
"""

from __future__ import annotations

from collections.abc import Callable


class PicollmError(Exception):
    """An error with what happened, why, and the next command.

    Args:
        message: what happened, in one line without a full stop.
        cause: why, when it is known.
        hint: what to do next, best a command that can be pasted.
    """

    exit_code = 1

    def __init__(self, message: str, *, cause: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.cause = cause
        self.hint = hint

    def __reduce__(self) -> tuple[Callable[..., PicollmError], tuple[object, ...]]:
        """Errors cross from helper processes; the default forgets keyword arguments."""
        return _rebuilt, (type(self), self.message, self.cause, self.hint)

    def to_dict(self) -> dict[str, object]:
        return {
            "type": type(self).__name__,
            "message": self.message,
            "cause": self.cause,
            "hint": self.hint,
            "exit_code": self.exit_code,
        }


def _rebuilt(kind: type[PicollmError], message: str, cause: str | None, hint: str | None) -> PicollmError:
    return kind(message, cause=cause, hint=hint)  # type: ignore[arg-type]


class ConfigError(PicollmError):
    exit_code = 2


class HostError(PicollmError):
    exit_code = 3


class MissingArtifact(PicollmError):
    """Something an earlier command makes is not there; `hint` carries that command."""

    exit_code = 4

    def __init__(self, message: str, *, hint: str, cause: str | None = None) -> None:
        super().__init__(message, cause=cause, hint=hint)


class IntegrityError(PicollmError):
    exit_code = 5


class RemoteError(PicollmError):
    exit_code = 6


class WorkerError(PicollmError):
    exit_code = 7


class OutOfMemory(WorkerError):
    """Memory ran out.

    Attributes:
        backed_off: the stage's `runtime.json` now asks for less, so that another start may fit.
    """

    backed_off = False

    def to_dict(self) -> dict[str, object]:
        return {**super().to_dict(), "backed_off": self.backed_off}


class Diverged(WorkerError):
    pass


class GateError(PicollmError):
    exit_code = 8


class Interrupted(PicollmError):
    exit_code = 130


def nearest(name: str, known: list[str]) -> str | None:
    """The known name closest to a mistyped one, or None when nothing is close."""
    from difflib import get_close_matches

    return next(iter(get_close_matches(name, known, n=1, cutoff=0.5)), None)


def did_you_mean(name: str, known: list[str], option: str = "", *, otherwise: str | None = None) -> str | None:
    """A hint for a mistyped name: the nearest one as it is to be typed, or `otherwise` when nothing is close.

    Args:
        option: what stands before the name on the command line, with its space: `--preset `.
    """
    close = nearest(name, known)
    return f"did you mean `{option}{close}`?" if close else otherwise


def printable(text: str) -> str:
    """The text with escapes for bytes of a file's name that are no text, which UTF-8 cannot hold."""
    return text.encode(errors="backslashreplace").decode()


def first_line(error: BaseException) -> str:
    """The first line with text of a library's message, without its full stop; its type where it says nothing."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line.rstrip(".") for line in lines if line), type(error).__name__)
