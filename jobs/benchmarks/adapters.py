"""`jobs/benchmark.py lora`: an adapter and full fine-tuning on the small world of `samray demo --train`.

The model labels images of a world that it has not seen, a simulated annotator corrects them, and both trainings learn
from the result. One click on each blob of held-out images is what is compared, and the stored sizes.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import samray
from samray.cli.demo_train import DEFAULTS, FIRST_HELDOUT, clicks, correct, make_world
from samray.cluster.session import running_ray
from samray.config import Config, load_config
from samray.errors import SamrayError
from samray.sam.weights_file import ADAPTER_FILE, resolve_checkpoint
from samray.train.run import train
from samray.train.settings import load_train_settings
from samray.train.store import WEIGHTS_FILE

KINDS = {"all": WEIGHTS_FILE, "lora": ADAPTER_FILE}
"""train.trainable -> what it writes."""
_KEYS = ("miou", "miou_oracle")


def lora(
    steps: int,
    images: int,
    heldout: int,
    rank: int,
    rate_all: float,
    rate_lora: float,
    decay_all: float,
    decay_lora: float,
    folder: Path | None,
) -> dict[str, Any]:
    """IoU of a click on held-out images before and after both trainings, and the sizes of their files.

    rate_all, rate_lora: learning rates; an adapter needs a higher one. decay_all, decay_lora: train.layer_decay.
    """
    rates, decays = {"all": rate_all, "lora": rate_lora}, {"all": decay_all, "lora": decay_lora}
    with _folder(folder) as root:
        known = make_world(root / "images", range(images))
        unseen = make_world(root / "heldout", range(FIRST_HELDOUT, FIRST_HELDOUT + heldout))
        config = load_config(None, None, list(DEFAULTS))
        with running_ray(config.cluster, one_dataset=False):
            _corrected(root, config, known)
            for kind in KINDS:
                settings = _settings(kind, steps, rank, rates[kind], decays[kind])
                report = train(root / "corrected", root / kind, settings, progress=False)
                if report.exit_code:
                    raise SamrayError(f"train.trainable={kind} ended early: {report.problem}")
        models = {
            "before": config,
            "all": _with_model(config, checkpoint=str(root / "all" / WEIGHTS_FILE)),
            "lora": _with_model(config, adapter=str(root / "lora" / ADAPTER_FILE)),
        }
        figures = {name: clicks(one, root / "heldout", unseen) for name, one in models.items()}
        sizes = {kind: (root / kind / name).stat().st_size for kind, name in KINDS.items()}
    ious = {name: {key: scores[key] for key in _KEYS} for name, scores in figures.items()}
    gains = {kind: {key: ious[kind][key] - ious["before"][key] for key in _KEYS} for kind in KINDS}
    return {
        "steps": steps,
        "images": images,
        "heldout": heldout,
        "rank": rank,
        "learning_rate": rates,
        "layer_decay": decays,
        "iou_of_a_click": ious,
        "gain": gains,
        "gain_lora / gain_all": {key: gains["lora"][key] / gains["all"][key] for key in _KEYS},
        "bytes": sizes,
        "bytes_adapter / bytes_model": sizes["lora"] / resolve_checkpoint("tiny").stat().st_size,
    }


@contextlib.contextmanager
def _folder(folder: Path | None) -> Iterator[Path]:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)


def _corrected(root: Path, config: Config, known: dict[str, Any]) -> None:
    """Label the images, and import what the annotator makes of the masks."""
    options: dict[str, Any] = {"confident": 0.5, "progress": False}
    if samray.label(root / "images", root / "labels", config, progress=False).exit_code:
        raise SamrayError("the labelling ended early")
    samray.export(root / "labels", root / "review", format="coco", **options)
    correct(root / "review" / "instances.json", root / "corrected.json", known)
    samray.import_(root / "corrected.json", root / "corrected", corrects=root / "labels", **options)


def _settings(kind: str, steps: int, rank: int, rate: float, decay: float) -> Any:
    return load_train_settings(
        None,
        [
            f"train.trainable={kind}", f"train.lora_rank={rank}", f"train.steps={steps}", f"train.learning_rate={rate}",
            f"train.layer_decay={decay}", "train.batch_size=3", "train.warmup_steps=5", "train.ema_decay=0.9",
            "train.interaction_steps=1", "train.box_fraction=0", "data.prompts_per_image=8",
            "train.validate_every=100000", "data.validation_fraction=0",
        ],
    )  # fmt: skip


def _with_model(config: Config, **values: str) -> Config:
    return config.model_copy(update={"model": config.model.model_copy(update=values)})
