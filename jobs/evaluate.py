"""Takes exactly the arguments of `samray evaluate`, and is it: `python jobs/evaluate.py points DATA ...`."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # A script's own folder is on the path, the folder above it, where samray lies in a checkout, is not.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from samray.cli.main import main

    sys.exit(main(["evaluate", *sys.argv[1:]]))
