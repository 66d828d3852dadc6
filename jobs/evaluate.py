"""Run `samray evaluate` with the same arguments: `python jobs/evaluate.py points DATA ...`."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # A script's own folder is on sys.path, but not the folder above it, where a checkout has samray.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from samray.cli.main import main

    sys.exit(main(["evaluate", *sys.argv[1:]]))
