"""`python -m picollm_cli` is the command `picollm`."""

from __future__ import annotations

from picollm_cli.main import main

if __name__ == "__main__":
    main()
