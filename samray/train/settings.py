"""The settings of `samray train`: frozen sections, each default written once; `model` is that of `samray label`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from samray.config import ModelConfig, Sections, make_sections, own_settings
from samray.config.base import Settings
from samray.errors import ConfigError

LAST_BLOCKS = "last_blocks:"
SCORES = "iou_head"
"""Value of train.trainable: what predicts the masks' IoUs, and nothing else."""


class DataConfig(Settings):
    """Which examples are made of DATA: images, their masks, prompts."""

    section: ClassVar[str] = "data"
    shares: tuple[float, ...] | None = None
    """How much of each DATA, in their order, such as [3,1]; null draws each by the root of its number of images."""
    validation_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Part of the images, by a hash of their URI, that is never trained on; of `scenes` always their own split."""
    validation_images: int = Field(default=48, ge=1)
    """Held-out images that validation looks at, at most, all DATA together."""
    prompts_per_image: int = Field(default=16, ge=1)
    """Masks of an image that are asked for in a step, drawn anew each time."""
    centre_fraction: float = Field(default=0.5, ge=0, le=1)
    """Part of the first clicks that are at the mask's centre; the others are anywhere in it."""
    scale_jitter: tuple[float, float] = (0.5, 2.0)
    """Images are scaled by a factor between these, then cropped or padded; [1,1] leaves them whole."""
    flip_fraction: float = Field(default=0.5, ge=0, le=1)
    """Part of the images that are mirrored, left to right."""
    colour_jitter: float = Field(default=0.2, ge=0, lt=1)
    """How much brightness, contrast and saturation vary: 0.2 is by a fifth up and down."""
    min_area: int = Field(default=64, ge=1)
    """Masks smaller than this, pixels of the image, are not asked for."""
    area_power: float = Field(default=0.0, ge=0, le=1)
    """Large masks are asked for more often, as this power of their area: 0 asks for all alike, 1 by their pixels."""
    weigh_by_score: bool = False
    """Ask for a mask more often the higher its predicted_iou x stability_score is; for labels that nobody looked at."""
    min_predicted_iou: float | None = Field(default=None, ge=0, le=1)
    """Only masks that whoever labelled them scored at least so; null takes all."""
    image_root: tuple[str, str] | None = None
    """What the images' URIs began with, and what they begin with now, such as [s3://old,/data/new]."""
    sources: tuple[str, ...] = ()
    """Folders of cut-outs and photographs that `scenes` are painted of, beside what is made up."""
    cache: str = "~/.cache/samray"
    """Where the decoded `data.sources` are kept, on each node."""

    @field_validator("shares", "scale_jitter", "image_root", "sources", mode="before")
    @classmethod
    def _lists_to_tuples(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        return tuple(float(item) if isinstance(item, int) else item for item in value)

    @model_validator(mode="after")
    def _fields_agree(self) -> DataConfig:
        low, high = self.scale_jitter
        if not 0 < low <= high:
            raise ValueError(f"data.scale_jitter = [{low}, {high}] is not allowed; it takes a range above 0")
        if self.shares is not None and (min(self.shares, default=0) < 0 or sum(self.shares) <= 0):
            raise ValueError(
                f"data.shares = {list(self.shares)} is not allowed; it takes numbers of at least 0, not all 0"
            )
        return self


class TrainConfig(Settings):
    """How the model is trained."""

    section: ClassVar[str] = "train"
    steps: int | None = Field(default=2000, ge=1)
    """Budget in steps; null leaves it to train.minutes."""
    minutes: float | None = Field(default=None, gt=0)
    """Budget in minutes, summed over resumed runs. With both, the schedule follows what is used up faster."""
    batch_size: int = Field(default=4, ge=1)
    """Images a step, all workers together."""
    trainable: str = "all"
    """all, iou_head (only what predicts the masks' IoUs: masks stay as they are, their ranking improves), decoder (the
    mask decoder), decoder+prompt, or last_blocks:N (those, and the encoder's last N blocks)."""
    from_scratch: bool = False
    """Begin with random weights, not with those of model.checkpoint."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Of AdamW, after the warm-up; the image encoder's layers get less by train.layer_decay."""
    warmup_steps: int = Field(default=100, ge=1)
    """Steps in which the learning rate rises to its value."""
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    """How the learning rate falls with the budget: a half cosine to 0, in steps (train.decay_at), or not at all."""
    decay_at: tuple[float, ...] = (0.667, 0.963)
    """Parts of the budget after which `step` lowers the learning rate; the SAM paper's 60,000 and 86,666 of 90,000."""
    decay_factor: float = Field(default=0.1, gt=0, le=1)
    """What `step` multiplies the learning rate by, each time."""
    layer_decay: float = Field(default=0.8, gt=0, le=1)
    """Each layer of the image encoder learns this much slower than the one after it; 1 lets all learn alike."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Of matrices; biases, norms and single embeddings have none."""
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    """How often the last encoder block's branches are left out of an image in training; less in earlier blocks."""
    max_grad_norm: float = Field(default=2.0, gt=0)
    """Longer gradients are cut to this."""
    ema_decay: float = Field(default=0.999, ge=0, lt=1)
    """Of the running average of the weights, which is what is validated and written."""
    box_fraction: float = Field(default=0.5, ge=0, le=1)
    """Part of the steps whose first prompt is a jittered box, not a click."""
    interaction_steps: int = Field(default=11, ge=1)
    """Rounds of prompting: a first prompt, then clicks where the answer is wrong; from 4 on two rounds add no click."""
    refine_fraction: float = Field(default=1.0, ge=0, le=1)
    """Part of the steps that go beyond their first prompt."""
    single_weight: float = Field(default=0.25, ge=0)
    """Of the single mask's loss beside the best of three after one click; it is 1 where the prompt is not ambiguous."""
    doubt: float = Field(default=0.0, ge=0, le=4)
    """A mask of a labelled image counts as this power of the IoU of the model's best answer, so that wrong labels,
    which no answer fits, teach less; 0 trusts all alike."""
    later_multi_weight: float = Field(default=0.0, ge=0)
    """Of the best of three's loss beside the single mask's after the first round."""
    first_image_size: int = Field(default=256, ge=32)
    """Input side in the first part of the budget, pixels: of models with a TinyViT, whose weights fit any size."""
    first_fraction: float = Field(default=0.0, ge=0, le=1)
    """How much of the budget that part is; the rest trains at the model's own input size."""
    distill_from: Literal["vit_t", "vit_b", "vit_l", "vit_h"] | None = None
    """A larger model: the encoder learns its image embeddings; prompt encoder and decoder are taken from it."""
    distill_checkpoint: str | None = None
    """That model's weights; null takes the published file."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Of everything that is drawn."""
    log_every: int = Field(default=20, ge=1)
    """Steps a line of metrics.jsonl, with their means."""
    validate_every: int = Field(default=500, ge=1)
    """Steps from one validation to the next; the last is at the end."""
    save_every_minutes: float = Field(default=5.0, ge=0)
    """Minutes from one save to the next: what a death costs at most."""

    @field_validator("decay_at", mode="before")
    @classmethod
    def _list_to_tuple(cls, value: Any) -> Any:
        return tuple(float(x) if isinstance(x, int) else x for x in value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _fields_agree(self) -> TrainConfig:
        if self.steps is None and self.minutes is None:
            raise ValueError("train.steps and train.minutes are both null; give one of them a budget")
        name, _, number = self.trainable.partition(":")
        if self.trainable not in ("all", SCORES, "decoder", "decoder+prompt") and not (
            name == "last_blocks" and number.isdecimal() and int(number) > 0
        ):
            raise ValueError(
                f"train.trainable = {self.trainable!r} is not allowed; it takes all, iou_head, decoder, decoder+prompt"
                " or last_blocks:N with a whole number N of at least 1"
            )
        if self.distill_from is not None and self.trainable != "all":
            raise ValueError("train.distill_from trains the image encoder alone; leave train.trainable at all")
        if self.distill_from is None and self.distill_checkpoint is not None:
            raise ValueError("train.distill_checkpoint needs train.distill_from, the name of its model")
        return self


class TrainClusterConfig(Settings):
    """Where the work runs. Nothing here is part of the run's identity: it may be resumed with other values."""

    section: ClassVar[str] = "cluster"
    address: str | None = None
    """Ray cluster to join (auto, host:port or ray://...); null joins RAY_ADDRESS if set, else starts Ray here."""
    num_workers: int | None = Field(default=None, ge=1)
    """Training processes, which share out each batch; null is one a GPU, or one where there is none."""
    num_gpus_per_worker: float | None = Field(default=None, ge=0)
    """GPUs reserved a worker; null is 1 where the cluster has GPUs, else 0."""
    num_cpus_per_worker: float | None = Field(default=None, gt=0)
    """CPU cores a worker computes with; null shares out what the cluster has."""
    num_data_actors: int | None = Field(default=None, ge=1)
    """Processes that read and augment images, all workers together; null follows the workers and their cores."""
    max_failures: int = Field(default=3, ge=0)
    """Worker deaths that are survived within 4,096 steps, each from the last save on."""
    drain_timeout_s: float = Field(default=120.0, ge=0)
    """Seconds to finish the step and save after SIGTERM or Ctrl-C."""


class TrainSettings(Settings):
    """All settings of a training run."""

    model_config = ConfigDict(strict=False)  # a section may be given as a mapping

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    cluster: TrainClusterConfig = TrainClusterConfig()

    def identity(self) -> dict[str, Any]:
        """What determines the curve, as plain JSON values; a run resumes only onto an OUTPUT with the same identity.

        Left out: the cluster, where things are kept, and how often is saved. The checkpoint is left out because its
        path may change while its content does not: the run adds its SHA-256, and that of a teacher.
        """
        plain = self.model_dump(mode="json")
        for name in ("cache", "image_root"):
            del plain["data"][name]
        for name in ("save_every_minutes", "distill_checkpoint"):
            del plain["train"][name]
        return {
            "data": plain["data"],
            "model": {key: plain["model"][key] for key in ("name", "dtype")},
            "train": plain["train"],
        }


TRAIN_SECTIONS: Sections = {cls.section: cls for cls in (DataConfig, ModelConfig, TrainConfig, TrainClusterConfig)}


def load_train_settings(file: str | Path | None = None, overrides: Sequence[str] = ()) -> TrainSettings:
    """Defaults, then the file, then the overrides, each `section.key=value`.

    Raises ConfigError that names every bad setting, its value, what is allowed and the nearest valid name.
    """
    own, problems = own_settings(TRAIN_SECTIONS, file, overrides)
    settings = TrainSettings(**make_sections(TRAIN_SECTIONS, own, problems))
    if settings.model.device is not None:
        raise ConfigError(
            f"model.device = {settings.model.device!r} is not allowed in training: Ray gives each worker its device;"
            " cluster.num_gpus_per_worker=0 trains on the CPU"
        )
    if settings.model.dtype == "float16":
        raise ConfigError("model.dtype = 'float16' is not allowed in training; it takes auto, float32 or bfloat16")
    return settings
