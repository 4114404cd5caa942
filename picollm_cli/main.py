"""The command `picollm`: registers the subcommands in the pipeline's order and turns errors into exit codes."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable
from typing import Annotated, NoReturn

import typer

from picollm import __version__
from picollm.errors import ConfigError, HostError, Interrupted, PicollmError
from picollm_cli.commands import (
    bench,
    chat,
    data,
    doctor,
    eval,
    export,
    manifest,
    pretrain,
    report,
    runs,
    sft,
    speedrun,
    tokenizer,
)
from picollm_cli.console import Output, ready_streams

TRACEBACK_FRAMES = 6
BROKEN_PIPE = 128 + 13  # what a shell says of a program that SIGPIPE ended

HELP = """One command from raw text to a chat model that runs anywhere.

\b
Examples:
  picollm speedrun --preset demo
  picollm chat
  picollm COMMAND --help
"""

app = typer.Typer(
    name="picollm",
    help=HELP,
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    add_completion=True,
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"picollm {__version__}")
        raise typer.Exit()


@app.callback()
def picollm(
    version: Annotated[
        bool, typer.Option("--version", "-V", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """The options of `picollm` itself; its help is `HELP`."""


# The panels, and the commands inside each, stand in the pipeline's order.
PANELS: dict[str, dict[str, typer.Typer | Callable[..., None]]] = {
    "Check": {"doctor": doctor.doctor, "bench": bench.app},
    "Build": {"data": data.app, "tokenizer": tokenizer.app},
    "Train": {
        "speedrun": speedrun.speedrun,
        "pretrain": pretrain.pretrain,
        "sft": sft.sft,
        "eval": eval.evaluate,
    },
    "Use": {"chat": chat.chat},
    "Record": {"runs": runs.runs, "report": report.report, "manifest": manifest.app},
    "Publish": {"export": export.app},
}
for _title, _commands in PANELS.items():
    # Typer lists commands before groups; a nameless group per panel keeps them in this order.
    _panel = typer.Typer()
    for _name, _command in _commands.items():
        if isinstance(_command, typer.Typer):
            _panel.add_typer(_command, name=_name, rich_help_panel=_title)
        else:
            _panel.command(_name, rich_help_panel=_title)(_command)
    app.add_typer(_panel)
COMMANDS = [name for commands in PANELS.values() for name in commands]


def _bug(error: Exception) -> PicollmError:
    """What is not in the error tree is our mistake, and somebody should hear of it."""
    return PicollmError(
        f"picollm {__version__} failed in a way it should not",
        cause=f"{type(error).__name__}: {error}",
        hint="this is a bug: please report it with the traceback and the output of `picollm doctor --json`",
    )


def _run(arguments: list[str]) -> int:
    """Run one command line and return its exit code; the only place where errors become text."""
    # Whatever goes wrong, also before options are parsed, a reader of JSON gets an object.
    out = Output(as_json="--json" in arguments)
    try:
        result = app(args=arguments, prog_name="picollm", standalone_mode=False)
        # Typer turns Ctrl-C into exit code 130; commands themselves return nothing.
        if result == Interrupted.exit_code:
            raise Interrupted("interrupted")
        return result if isinstance(result, int) else 0
    except PicollmError as error:
        out.error(error)
        return error.exit_code
    except KeyboardInterrupt:
        out.error(Interrupted("interrupted"))
        return Interrupted.exit_code
    except typer.TyperException as error:
        # An empty message is the help that a group prints when it is called without a command.
        if message := error.format_message():
            out.error(_usage_error(message, arguments))
        return error.exit_code
    except typer.Abort:
        out.error(Interrupted("aborted"))
        return Interrupted.exit_code
    except (BrokenPipeError, SystemExit) as error:
        # The reader of our output went away (`picollm runs | head`): its decision, and it ends us as it ends others.
        # Rich makes a SystemExit of it; those of Typer's shell completion mean something else.
        if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:
        if error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            # Files of ours are named; what has no name and no room is what the output goes to.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            out.error(HostError("cannot write the output", cause=error.strerror, hint="free room where stdout goes to"))
            return HostError.exit_code
        if error.filename is None:
            return _say_bug(out, error)
        # Commands wrap what they expect to fail; a path that cannot be read at all is still this machine's fault.
        problem = HostError(
            f"cannot use `{os.fsdecode(error.filename)}`",
            cause=error.strerror or str(error),
            hint="check that the path can be read, and `picollm doctor disk.writable base_dir`",
        )
        out.error(problem)
        return problem.exit_code
    except Exception as error:
        return _say_bug(out, error)


def _say_bug(out: Output, error: Exception) -> int:
    """Show a short traceback and how to report it; returns the exit code."""
    out.note("".join(traceback.format_exception(error, limit=-TRACEBACK_FRAMES)).rstrip())
    out.error(_bug(error))
    return PicollmError.exit_code


def _usage_error(message: str, arguments: list[str]) -> ConfigError:
    """What Typer says about a command line, in our shape."""
    words = [word for word in arguments[:1] if word in COMMANDS]
    first, _, rest = message.strip().partition("\n")
    return ConfigError(
        first[:1].lower() + first[1:].rstrip(".").replace("'", "`"),
        cause=rest.strip() or None,
        hint=f"see `picollm {' '.join([*words, '--help'])}`",
    )


def main() -> NoReturn:
    """Entry point of the console script."""
    ready_streams()
    sys.exit(_run(sys.argv[1:]))
