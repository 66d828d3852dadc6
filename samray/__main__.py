"""The `samray` script, and `python -m samray` where it is not on the path."""

from __future__ import annotations

import signal
import sys


def run() -> None:
    """The command line, which Ctrl-C ends without a traceback also while it is being imported and when it is over."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from samray.cli.main import main

    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = main()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(code)


if __name__ == "__main__":
    run()
