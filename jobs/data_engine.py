"""The data engine on a small synthetic world that no model has seen: label, correct, train, label again.

    python jobs/data_engine.py world/ [--images 50] [--steps 600]

The loop of `samray demo --train` (`samray/cli/demo_train.py`) at any size. Prints the results on held-out images as a
table and, with --json, as JSON. Every step is a samray command, and resumes if interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from rich.console import Console

# A script's own folder is on sys.path, but not the folder above it, where a checkout has samray.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from samray.cli.demo_train import Rounds, Stopped, figures_table, run_rounds
from samray.config import load_config

TRAINING = ("train.learning_rate=5e-4",)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=50, help="images to label and train on (default: %(default)s)")
    parser.add_argument("--heldout", type=int, default=30, help="held-out images to measure on (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=600, help="training steps (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    if args.heldout < 1:
        parser.error("--heldout must be at least 1")
    rounds = Rounds(num_images=args.images, num_heldout=args.heldout, steps=args.steps, training=TRAINING)
    try:
        report = run_rounds(args.folder, load_config("tiny", None, ["output.images_per_shard=8"]), rounds)
    except Stopped as stopped:
        return stopped.exit_code
    if args.json is not None:
        args.json.write_text(json.dumps(dataclasses.asdict(report), indent=2))
    print("the annotator: " + ", ".join(f"{number} {what}" for what, number in report.person.items()))
    print(f"training: {report.train_seconds:.0f} s")
    Console(highlight=False).print(figures_table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
