"""The settings of `samray train`: frozen sections, each default written once; `model` is that of `samray label`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from samray.config import InputConfig, ModelConfig, Sections, make_sections, user_settings
from samray.config.base import OneOf, Settings
from samray.config.labels import CLIP
from samray.config.models import teacher_names
from samray.errors import ConfigError
from samray.train.objectives import objective_names

LAST_BLOCKS = "last_blocks:"
SCORES = "iou_head"
"""Value of train.trainable: train only the part that predicts the masks' IoUs."""
LORA = "lora"
"""Value of train.trainable: train low-rank additions to the attention projections, which are saved apart."""


_MAX_EXPAND = 10.0

INPUT_IDENTITY = ("uri_column", "image_column", "max_pixels", "max_bytes", "limit")
"""Settings of `input` that determine which images a training sees."""


class DataConfig(Settings):
    """How training examples are made from DATA: images, masks, prompts."""

    section: ClassVar[str] = "data"
    shares: tuple[float, ...] | None = None
    """Weights for mixing several DATA, in order, such as [3,1]; null weights each by the square root of its images."""
    validation_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Fraction of the images held out from training, by a hash of their URI. `scenes` always use their own split."""
    validation_images: int = Field(default=48, ge=1)
    """Maximum number of held-out images for validation, over all DATA."""
    prompts_per_image: int = Field(default=16, ge=1)
    """Masks per image and step, sampled again each time."""
    centre_fraction: float = Field(default=0.5, ge=0, le=1)
    """Fraction of the first clicks at the centre of the mask; the others are anywhere in the mask."""
    scale_jitter: tuple[float, float] = (0.5, 2.0)
    """Scale images by a random factor in this range, then crop or pad; [1,1] turns it off."""
    flip_fraction: float = Field(default=0.5, ge=0, le=1)
    """Fraction of the images that are flipped left to right."""
    colour_jitter: float = Field(default=0.2, ge=0, lt=1)
    """Strength of random brightness, contrast and saturation changes: 0.2 is up to 20% in either direction."""
    min_area: int = Field(default=64, ge=1)
    """Ignore masks smaller than this, in pixels of the image."""
    area_power: float = Field(default=0.0, ge=0, le=1)
    """Sample masks in proportion to this power of their area: 0 samples all alike, 1 in proportion to their pixels."""
    weigh_by_score: bool = False
    """Sample masks in proportion to predicted_iou x stability_score; for unchecked labels."""
    min_predicted_iou: float | None = Field(default=None, ge=0, le=1)
    """Use only masks with at least this predicted_iou; null uses all."""
    labels: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Use only masks with these names, such as [dog,cat] ("object": those without a name); null uses all."""
    where: str | None = Field(default=None, min_length=1)
    """Use only these images and masks, in SQL, such as "area > 100 and width >= 640"; null uses all."""
    image_root: tuple[str, str] | None = None
    """Old and new start of the images' URIs, for images that moved: [s3://old,/data/new]."""
    sources: tuple[str, ...] = ()
    """Folders of cut-outs and photographs that `scenes` use, in addition to generated shapes."""
    cache: str = "~/.cache/samray"
    """Local directory on each node for the decoded `data.sources`."""

    @field_validator("shares", "scale_jitter", "image_root", "sources", mode="before")
    @classmethod
    def _lists_to_tuples(cls, value: Any) -> Any:
        # YAML and the command line give lists, and whole numbers for floats.
        if not isinstance(value, list):
            return value
        return tuple(float(item) if isinstance(item, int) else item for item in value)

    @field_validator("labels", mode="before")
    @classmethod
    def _one_name_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value

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
    objective: Annotated[str, OneOf(objective_names)] = "masks"
    """What to learn: masks, from labelled images; text: text prompts, from the same; mae: pre-train a plain ViT, on
    unlabelled images."""
    steps: int | None = Field(default=2000, ge=1)
    """Budget in steps; null means that only train.minutes applies."""
    minutes: float | None = Field(default=None, gt=0)
    """Budget in minutes, summed over resumed runs. With both budgets, the one that is used up faster counts."""
    batch_size: int = Field(default=4, ge=1)
    """Images per step, over all workers."""
    trainable: str = "all"
    """What to train: all; iou_head (only the IoU prediction: better ranking, same masks); decoder (the mask decoder);
    decoder+prompt; last_blocks:N (those and the encoder's last N blocks); or lora (an adapter)."""
    lora_rank: int = Field(default=8, ge=1, le=256)
    """Rank of the adapter with train.trainable=lora: its size, and what it can learn, grow with it."""
    from_scratch: bool = False
    """Start from random weights instead of those of model.checkpoint."""
    encoder_checkpoint: str | None = None
    """Weights for the image encoder, from a masked autoencoder: MAE's .pth, ViTMAE's safetensors, or the weights that
    train.objective=mae wrote. Only for plain ViTs; all other weights start as without it."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """AdamW learning rate after the warm-up; the image encoder's layers get less, see train.layer_decay."""
    warmup_steps: int = Field(default=100, ge=1)
    """Steps of linear learning-rate warm-up."""
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    """Learning-rate schedule over the budget: cosine to 0, steps at train.decay_at, or constant."""
    decay_at: tuple[float, ...] = (0.667, 0.963)
    """Fractions of the budget at which `step` lowers the learning rate; default as in the SAM paper (60,000 and 86,666
    of 90,000)."""
    decay_factor: float = Field(default=0.1, gt=0, le=1)
    """Factor by which `step` multiplies the learning rate each time."""
    layer_decay: float = Field(default=0.8, gt=0, le=1)
    """Learning-rate factor from each layer of the image encoder to the layer before it; 1 uses the same rate for
    all."""
    weight_decay: float = Field(default=0.05, ge=0)
    """AdamW weight decay of matrices; biases, norms and single embeddings have none."""
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    """Stochastic depth: probability of skipping the last encoder block's branches; smaller for earlier blocks."""
    max_grad_norm: float = Field(default=2.0, gt=0)
    """Maximum gradient norm; longer gradients are clipped."""
    ema_decay: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the exponential moving average of the weights, which is what is validated and saved."""
    box_fraction: float = Field(default=0.5, ge=0, le=1)
    """Fraction of the steps whose first prompt is a jittered box instead of a click."""
    interaction_steps: int = Field(default=11, ge=1)
    """Prompting rounds: a first prompt, then clicks where the mask is wrong. With 4 or more, two rounds add no
    click."""
    refine_fraction: float = Field(default=1.0, ge=0, le=1)
    """Fraction of the steps that use more than the first prompt."""
    single_weight: float = Field(default=0.25, ge=0)
    """Weight of the single mask's loss after one click, next to the best of three; 1 if the prompt is not ambiguous."""
    ranking_weight: float = Field(default=0.0, ge=0)
    """Weight of a loss on the ranking of the three masks by predicted IoU, besides the squared errors; 0 as in SAM."""
    doubt: float = Field(default=0.0, ge=0, le=4)
    """Weight each mask of a labelled image by this power of the IoU of the model's best mask, which reduces the effect
    of wrong labels; 0 weights all alike."""
    later_multi_weight: float = Field(default=0.0, ge=0)
    """Weight of the best-of-three loss next to the single mask's loss after the first round."""
    first_image_size: int = Field(default=256, ge=32)
    """Input side in the first part of the budget, in pixels; only for models with a TinyViT, which accept any size."""
    first_fraction: float = Field(default=0.0, ge=0, le=1)
    """Length of that part, as a fraction of the budget; the rest trains at the model's own input size."""
    distill_from: Annotated[str, OneOf(teacher_names)] | None = None
    """Distillation teacher, a larger model: the encoder learns its image embeddings; prompt encoder and decoder are
    copied."""
    distill_checkpoint: str | None = None
    """Weights of the teacher; null uses the published file."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Random seed."""
    log_every: int = Field(default=20, ge=1)
    """Steps per line of metrics.jsonl, which contains their means."""
    validate_every: int = Field(default=500, ge=1)
    """Steps between validations; the last validation is at the end."""
    save_every_minutes: float = Field(default=5.0, ge=0)
    """Minutes between checkpoints: the most work that a crash can lose."""

    @field_validator("decay_at", mode="before")
    @classmethod
    def _list_to_tuple(cls, value: Any) -> Any:
        return tuple(float(x) if isinstance(x, int) else x for x in value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _fields_agree(self) -> TrainConfig:
        if self.steps is None and self.minutes is None:
            raise ValueError("train.steps and train.minutes are both null; give one of them a budget")
        name, _, number = self.trainable.partition(":")
        if self.trainable not in ("all", SCORES, LORA, "decoder", "decoder+prompt") and not (
            name == "last_blocks" and number.isdecimal() and int(number) > 0
        ):
            raise ValueError(
                f"train.trainable = {self.trainable!r} is not allowed; it takes all, iou_head, decoder,"
                " decoder+prompt, lora or last_blocks:N with a whole number N of at least 1"
            )
        if self.trainable == LORA:
            self._check_lora()
        if self.distill_from is not None and self.trainable != "all":
            raise ValueError("train.distill_from trains the image encoder alone; leave train.trainable at all")
        if self.distill_from is None and self.distill_checkpoint is not None:
            raise ValueError("train.distill_checkpoint needs train.distill_from, the name of the teacher")
        return self

    def _check_lora(self) -> None:
        """Raises: ValueError. An adapter belongs to a file of weights, from which labelling starts, too."""
        for setting, is_set in (
            ("train.objective", self.objective != "masks"),
            ("train.from_scratch", self.from_scratch),
            ("train.encoder_checkpoint", self.encoder_checkpoint is not None),
            ("train.first_fraction", self.first_fraction > 0),
        ):
            if is_set:
                raise ValueError(
                    f"{setting} is not possible with train.trainable=lora, which adapts the weights of"
                    " model.checkpoint to masks; leave it at its default"
                )


class MaeConfig(Settings):
    """Pre-training with train.objective=mae."""

    section: ClassVar[str] = "mae"
    mask_ratio: float = Field(default=0.75, gt=0, lt=1)
    """Fraction of the patches that are masked."""
    decoder_dim: int = Field(default=512, ge=4)
    """Channels of the decoder, which is discarded after the training; a multiple of 4 and of mae.decoder_heads."""
    decoder_depth: int = Field(default=8, ge=1)
    """Transformer blocks of the decoder."""
    decoder_heads: int = Field(default=16, ge=1)
    """Attention heads of the decoder."""

    @model_validator(mode="after")
    def _fields_agree(self) -> MaeConfig:
        if self.decoder_dim % self.decoder_heads or self.decoder_dim % 4:
            raise ValueError(
                f"mae.decoder_dim = {self.decoder_dim} is not allowed; it takes a multiple of 4 and of"
                f" mae.decoder_heads={self.decoder_heads}"
            )
        return self


class TextConfig(Settings):
    """Text prompts with train.objective=text."""

    section: ClassVar[str] = "text"
    checkpoint: str = CLIP
    """CLIP whose embeddings are the prompts: a folder (path or URI) or a name on Hugging Face. Label with the same."""
    expand: tuple[float, float] = (1.0, 2.0)
    """Expand the box of a mask by a random factor in this range before CLIP sees it."""
    blank_fraction: float = Field(default=0.5, ge=0, le=1)
    """Fraction of the masks of which CLIP sees nothing but the mask: the other pixels are black."""

    @field_validator("expand", mode="before")
    @classmethod
    def _list_to_tuple(cls, value: Any) -> Any:
        return tuple(float(x) if isinstance(x, int) else x for x in value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _fields_agree(self) -> TextConfig:
        low, high = self.expand
        if not 1 <= low <= high <= _MAX_EXPAND:
            raise ValueError(
                f"text.expand = [{low}, {high}] is not allowed; it takes a range in 1 to {_MAX_EXPAND:g}, as [1,2]"
            )
        return self


class TrainClusterConfig(Settings):
    """Where the work runs. These settings are not part of the run's identity: it may resume with other values."""

    section: ClassVar[str] = "cluster"
    address: str | None = None
    """Ray cluster to join (auto, host:port or ray://...); null joins RAY_ADDRESS if set, else starts Ray locally."""
    num_workers: int | None = Field(default=None, ge=1)
    """Training processes, which divide each batch; null is one per GPU, or one in total without GPUs."""
    num_gpus_per_worker: float | None = Field(default=None, ge=0)
    """GPUs per worker; null is 1 if the cluster has GPUs, else 0."""
    num_cpus_per_worker: float | None = Field(default=None, gt=0)
    """CPU cores per worker; null divides the cluster's cores."""
    num_data_actors: int | None = Field(default=None, ge=1)
    """Processes that read and augment images, over all workers; null follows the number of workers and their cores."""
    max_failures: int = Field(default=3, ge=0)
    """Worker deaths tolerated within 4,096 steps; each resumes from the last checkpoint."""
    drain_timeout_s: float = Field(default=120.0, ge=0)
    """Seconds allowed to finish the step and save after SIGTERM or Ctrl-C."""


class TrainSettings(Settings):
    """All settings of a training run."""

    model_config = ConfigDict(strict=False)  # a section may be given as a mapping

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    mae: MaeConfig = MaeConfig()
    text: TextConfig = TextConfig()
    input: InputConfig = InputConfig()
    cluster: TrainClusterConfig = TrainClusterConfig()

    def identity(self) -> dict[str, Any]:
        """The settings that determine the result, as plain JSON values. A run resumes only onto an OUTPUT with the same
        ones.

        Left out: the cluster, where files are kept, and how often it saves. The checkpoint is left out because a file
        may move without changing: the run adds its SHA-256, and that of a teacher or a CLIP.
        """
        plain = self.model_dump(mode="json")
        for name in ("cache", "image_root"):
            del plain["data"][name]
        # The identity of a run that uses all masks is as before these settings existed.
        if self.data.labels is None:
            del plain["data"]["labels"]
        if self.data.where is None:
            del plain["data"]["where"]
        for name in ("save_every_minutes", "distill_checkpoint", "encoder_checkpoint"):
            del plain["train"][name]
        return {
            "data": plain["data"],
            "model": {key: plain["model"][key] for key in ("name", "dtype")},
            "train": plain["train"],
            "mae": plain["mae"],
            "text": {key: value for key, value in plain["text"].items() if key != "checkpoint"},
            "input": {key: plain["input"][key] for key in INPUT_IDENTITY} | self.input.bands_identity(),
        }


TRAIN_SECTIONS: Sections = {
    cls.section: cls
    for cls in (DataConfig, ModelConfig, TrainConfig, MaeConfig, TextConfig, InputConfig, TrainClusterConfig)
}


def load_train_settings(file: str | Path | None = None, overrides: Sequence[str] = ()) -> TrainSettings:
    """Load the settings of a training run: defaults, then the file, then the overrides (`section.key=value`).

    Raises ConfigError that names every bad setting, its value, what is allowed and the closest valid name.
    """
    values, problems = user_settings(TRAIN_SECTIONS, file, overrides)
    settings = TrainSettings(**make_sections(TRAIN_SECTIONS, values, problems))
    if settings.model.device is not None:
        raise ConfigError(
            f"model.device = {settings.model.device!r} is not allowed in training: Ray gives each worker its device;"
            " cluster.num_gpus_per_worker=0 trains on the CPU"
        )
    if settings.model.adapter is not None:
        raise ConfigError("model.adapter is not allowed in training, which starts from the weights of model.checkpoint")
    if settings.model.dtype == "float16":
        raise ConfigError("model.dtype = 'float16' is not allowed in training; it takes auto, float32 or bfloat16")
    return settings
