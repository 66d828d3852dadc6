"""Training for `ray job submit --working-dir . -- python jobs/train.py DATA... OUTPUT ...`.

Takes the arguments of `samray train` and runs it. samray/weights/README.md describes how the embedded model is trained
with it.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # A script's own folder is on sys.path, but not the folder above it, where a checkout has samray.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from samray.cli.main import main

    sys.exit(main(["train", *sys.argv[1:]]))
