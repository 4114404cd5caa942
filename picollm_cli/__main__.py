"""Where the command `picollm` starts, also as `python -m picollm_cli`."""

from __future__ import annotations

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Load the command, which takes a moment, and run it; Ctrl-C in that moment is no traceback either."""
    try:
        from picollm_cli.main import main as run
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted\n")
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
