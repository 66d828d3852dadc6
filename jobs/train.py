"""Train a model on synthetic scenes, or evaluate weights on scenes with held-out objects.

The embedded model was made so (Debian packages tuxpaint-stamps-default, openclipart-png, mate-backgrounds and
plasma-workspace-wallpapers installed):

    python jobs/train.py runs/tiny --minutes 90 --sources /usr/share/tuxpaint/stamps /usr/share/openclipart/png \\
        /usr/share/backgrounds/mate /usr/share/wallpapers

Running the same command again goes on where the last one stopped. `--evaluate WEIGHTS` prints figures as JSON instead.
"""

import argparse
import json
import sys
from pathlib import Path

from samray.errors import SamrayError
from samray.evaluate.scenes import evaluate_clicks, heldout_scenes
from samray.sam.checkpoints import load_model
from samray.train.cutouts import CutoutSource
from samray.train.trainer import TrainConfig, Trainer


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    default = TrainConfig()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", nargs="?", help="folder for weights, resumable state and metrics")
    parser.add_argument("--sources", nargs="*", default=[], metavar="DIR", help="folders of cut-outs and photographs")
    parser.add_argument("--cache", default="~/.cache/samray", metavar="DIR", help="where the decoded sources are kept")
    parser.add_argument("--model", default=default.model, help="row of the model table (default: %(default)s)")
    parser.add_argument("--init", metavar="WEIGHTS", help="begin with these weights instead of random ones")
    parser.add_argument("--minutes", type=float, default=default.minutes, help="time budget (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=default.steps, help="step budget (default: %(default)s)")
    parser.add_argument(
        "--batch-size", type=int, default=default.batch_size, help="scenes a step (default: %(default)s)"
    )
    parser.add_argument("--learning-rate", type=float, default=default.learning_rate, help="default: %(default)s")
    parser.add_argument("--ema-decay", type=float, default=default.ema_decay, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=default.seed, help="default: %(default)s")
    parser.add_argument("--num-workers", type=int, default=default.num_workers, help="processes that paint scenes")
    parser.add_argument("--threads", type=int, default=None, help="of the training process (default: torch's choice)")
    parser.add_argument("--evaluate", metavar="WEIGHTS", help="evaluate these weights instead of training")
    parser.add_argument("--num-scenes", type=int, default=500, help="scenes to evaluate on (default: %(default)s)")
    parser.add_argument("--scene-size", type=int, default=256, help="side of a scene to evaluate on, in pixels")
    args = parser.parse_args(argv)
    if args.output is None and args.evaluate is None:
        parser.error("name an output folder, or weights to --evaluate")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        source = CutoutSource(args.sources, Path(args.cache)) if args.sources else None
        if source is not None:
            for split in ("train", "heldout"):
                print("{}: {} cut-outs, {} photographs".format(split, *source.count(split)), file=sys.stderr)
        if args.evaluate is not None:
            model = load_model(args.model, checkpoint=args.evaluate)
            # Seeds beyond those that training validates on.
            scenes = heldout_scenes(args.num_scenes, args.scene_size, source, first_seed=1_000_000)
            print(json.dumps(evaluate_clicks(model, scenes), indent=2))
            return 0
        config = TrainConfig(
            model=args.model,
            init=args.init,
            minutes=args.minutes,
            steps=args.steps,
            batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            ema_decay=args.ema_decay,
            seed=args.seed,
            num_workers=args.num_workers,
            threads=args.threads,
        )
        Trainer(args.output, config, source).fit()
    except SamrayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
