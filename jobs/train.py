"""Training for `ray job submit --working-dir . -- python jobs/train.py DATA... OUTPUT ...`.

Takes exactly the arguments of `samray train`, and is it. The embedded model is trained so, on two cores (Debian
packages tuxpaint-stamps-default, openclipart-png, mate-backgrounds and plasma-workspace-wallpapers installed; S stands
for /usr/share):

    python jobs/train.py scenes runs/tiny train.from_scratch=true train.minutes=90 train.steps=null \\
        data.sources=[S/tuxpaint/stamps,S/openclipart/png,S/backgrounds/mate,S/wallpapers] \\
        train.learning_rate=8e-4 train.warmup_steps=200 train.layer_decay=1 train.first_fraction=0.5 \\
        train.box_fraction=0.06 train.interaction_steps=2 train.refine_fraction=0.08 train.later_multi_weight=1 \\
        model.dtype=bfloat16
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # A script's own folder is on the path, the folder above it, where samray lies in a checkout, is not.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from samray.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
