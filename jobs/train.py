"""Training for `ray job submit --working-dir . -- python jobs/train.py DATA... OUTPUT ...`.

Takes exactly the arguments of `samray train`, and is it. How the embedded model is trained with it stands in the
card of its weights, samray/weights/README.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # A script's own folder is on the path, the folder above it, where samray lies in a checkout, is not.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from samray.cli.main import main

    sys.exit(main(["train", *sys.argv[1:]]))
