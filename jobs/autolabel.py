"""The main job for `ray job submit --working-dir . -- python jobs/autolabel.py INPUT OUTPUT ...`.

Takes exactly the arguments of `samray label`, and is it.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # A script's own folder is on the path, the folder above it, where samray lies in a checkout, is not.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from samray.cli.main import main

    sys.exit(main(["label", *sys.argv[1:]]))
