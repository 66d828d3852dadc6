"""The `samray` script, and `python -m samray` if the script is not on the path."""

from __future__ import annotations

import signal
import sys


def run() -> None:
    """Run the command line. Ctrl-C ends it without a traceback, also during imports and after the command."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from samray.cli.main import main

    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = main()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(code)


if __name__ == "__main__":
    run()
