"""The settings of a run: frozen sections, each default written once."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from samray.config.base import Settings
from samray.config.presets import preset_names, preset_path
from samray.config.yaml import load_yaml_file

ModelName = Literal["tiny", "vit_t", "vit_b", "vit_l", "vit_h"]
PointGrid = tuple[tuple[float, float], ...]


class InputConfig(Settings):
    """What is read, and how large an image may be."""

    section: ClassVar[str] = "input"
    uri_column: str = "uri"
    """Manifest column that holds each image's path or URI."""
    image_column: str = "image"
    """Parquet column that holds encoded images: binary, or Hugging Face struct<bytes, path>."""
    max_pixels: int = Field(default=100_000_000, ge=1)
    """Most pixels (width x height) an image may have; a larger one fails, undecoded, as `too_large`."""
    max_bytes: int = Field(default=256 * 2**20, ge=1)
    """Largest encoded image, bytes; a larger one fails, unread, as `too_large`."""
    decode_timeout_s: float = Field(default=60.0, gt=0)
    """Seconds of CPU time that decoding one image may take; more fails as `timeout`. Raise it for huge images."""
    limit: int | None = Field(default=None, ge=1)
    """Label only the first N images of the sorted input; null labels all."""
    allow_outside: bool = False
    """Let a list name files outside of its own folder, and a remote list servers of a private network; for lists that
    you trust."""
    prompts: str | None = None
    """Clicks and boxes of a person, .jsonl or .parquet: one mask for each of them, in place of the grid's."""


class ModelConfig(Settings):
    """Which Segment Anything model, and how it is run."""

    section: ClassVar[str] = "model"
    name: ModelName = "tiny"
    """tiny (embedded in samray), vit_t (MobileSAM), vit_b, vit_l or vit_h (Meta)."""
    checkpoint: str | None = None
    """Weights as a path or URI (.pth, .pt, .safetensors); null takes the published file, downloaded and verified."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the networks; auto is bfloat16 on a GPU and float32 on a CPU."""
    device: str | None = None
    """Torch device such as cpu, cuda or cuda:1; null takes a GPU where the actor has one."""


class MaskConfig(Settings):
    """Automatic mask generation: the reference's names and defaults, then what its users asked for.

    A setting that is not given follows the model: the embedded model has values of its own (`model_masks`), every other
    model the reference's, which are the defaults here.
    """

    section: ClassVar[str] = "masks"
    points_per_side: int = Field(default=32, ge=1, le=256)
    """Side of the square grid of point prompts: N x N points an image (or a crop)."""
    points_per_batch: int | None = Field(default=None, ge=1)
    """Point prompts decoded at once; only memory depends on it; null adapts it to the memory there is."""
    pred_iou_thresh: float = Field(default=0.88, ge=0, le=1)
    """Keep masks whose IoU, as predicted by the model, is above this."""
    stability_score_thresh: float = Field(default=0.95, ge=0, le=1)
    """Keep masks at least this stable when the cut through the logits moves."""
    stability_score_offset: float = Field(default=1.0, ge=0)
    """How far, in logits, the cut moves up and down for the stability score."""
    box_nms_thresh: float = Field(default=0.7, ge=0, le=1)
    """Of two masks of a crop whose boxes overlap by more than this IoU, drop the lower-scored."""
    crop_n_layers: int = Field(default=0, ge=0, le=4)
    """Layers of zoomed-in crops after the whole image; layer i has 2^i x 2^i crops."""
    crop_nms_thresh: float = Field(default=0.7, ge=0, le=1)
    """Box IoU above which masks of different crops are duplicates; the more zoomed-in one stays."""
    crop_overlap_ratio: float = Field(default=512 / 1500, ge=0, lt=1)
    """Overlap of neighbouring crops in layer 1, as a part of the image's shorter side; halves with each layer."""
    crop_n_points_downscale_factor: int = Field(default=1, ge=1)
    """points_per_side is divided by this to the power of the crop layer."""
    point_grids: tuple[PointGrid, ...] | None = None
    """Own points, one list of [x, y] in 0..1 a crop layer, instead of points_per_side."""
    min_mask_region_area: int = Field(default=0, ge=0)
    """Remove islands and fill holes smaller than this, pixels; 0 leaves masks as predicted."""
    min_mask_area: int = Field(default=0, ge=0)
    """Drop masks smaller than this, pixels."""
    max_mask_area_fraction: float | None = Field(default=None, gt=0, le=1)
    """Drop masks that cover at least this part of the image; null keeps them."""
    mask_nms_thresh: float | None = Field(default=None, ge=0, le=1)
    """Also drop near-duplicates by the IoU of the masks themselves; null leaves it at boxes."""
    max_masks: int | None = Field(default=None, ge=1, le=65536)
    """Keep at most this many masks an image, best predicted IoU first; null keeps all."""
    non_overlapping: bool = False
    """Give every pixel to at most one mask, the best-scored."""
    bbox_convention: Literal["coco", "sam"] = "coco"
    """coco: boxes as pycocotools' toBbox; sam: one pixel smaller in width and height, as the reference wrote them."""

    @field_validator("point_grids", mode="before")
    @classmethod
    def _grids_to_tuples(cls, grids: Any) -> Any:
        if hasattr(grids, "tolist"):  # arrays are how the reference takes them; no need to import numpy for that
            grids = grids.tolist()
        if not isinstance(grids, list | tuple):
            return grids
        grids = [g.tolist() if hasattr(g, "tolist") else g for g in grids]
        if not all(isinstance(g, list | tuple) and all(isinstance(p, list | tuple) for p in g) for g in grids):
            return grids
        return tuple(tuple(tuple(point) for point in grid) for grid in grids)

    @model_validator(mode="after")
    def _fields_agree(self) -> MaskConfig:
        layers = self.crop_n_layers
        if self.point_grids is not None:
            if (held := len(self.point_grids)) != layers + 1:
                raise ValueError(
                    f"masks.point_grids holds {held} grids, but masks.crop_n_layers={layers} needs {layers + 1}"
                )
            if not any(self.point_grids):
                raise ValueError("masks.point_grids holds no point at all: a grid without a point finds nothing")
            if any(not 0 <= c <= 1 for grid in self.point_grids for point in grid for c in point):
                raise ValueError(
                    "masks.point_grids holds a coordinate outside 0..1 (they are parts of the crop's width and height)"
                )
        elif self.points_per_side // self.crop_n_points_downscale_factor**layers < 1:
            raise ValueError(
                f"masks.crop_n_points_downscale_factor={self.crop_n_points_downscale_factor} leaves no point of"
                f" masks.points_per_side={self.points_per_side} in crop layer {layers}"
            )
        return self

    def for_model(self, name: str) -> MaskConfig:
        """These settings with every one that is not given as the model of that name has it.

        They remain not given: `for_model` of another name gives that model's. Raises SettingsError where a given
        setting does not fit the model's own.
        """
        given = {key: getattr(self, key) for key in self.model_fields_set}
        resolved = MaskConfig(**{**model_masks(name), **given})
        resolved.model_fields_set.intersection_update(given)
        return resolved


@cache
def model_masks(name: str) -> Mapping[str, Any]:
    """The mask settings in which a model differs from the reference: those of the preset with the model's name."""
    return load_yaml_file(preset_path(name))["masks"] if name in preset_names() else {}


_FORMER_MASKS: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    "tiny": ({"pred_iou_thresh": 0.62},),  # samray 0.1
}
"""Values that earlier versions had in `model_masks`. The reference's count too: 0.1 used them from Python."""


class OutputConfig(Settings):
    """How the Parquet shards are cut, and when a run counts as failed."""

    section: ClassVar[str] = "output"
    images_per_shard: int = Field(default=64, ge=1, le=10_000)
    """Images a Parquet shard; a shard is the unit of work, of retry and of resume."""
    compression_level: int = Field(default=3, ge=1, le=22)
    """zstd level of the shards."""
    max_failed_fraction: float = Field(default=0.1, ge=0, le=1)
    """Exit with an error when more than this part of the images could not be labelled."""


class ClusterConfig(Settings):
    """Where the work runs. Nothing here changes the masks, so a run may resume with other values."""

    section: ClassVar[str] = "cluster"
    address: str | None = None
    """Ray cluster to join (auto, host:port or ray://...); null joins RAY_ADDRESS if set, else starts Ray here."""
    min_actors: int = Field(default=1, ge=1)
    """Labelling actors, each with its own model, that are kept at least."""
    max_actors: int | None = Field(default=None, ge=1)
    """Labelling actors at most; null takes as many as the cluster has room for."""
    num_gpus_per_actor: float | None = Field(default=None, ge=0)
    """GPUs reserved an actor, parts allowed; null is 1 where the cluster has GPUs, else 0."""
    num_cpus_per_actor: float | None = Field(default=None, gt=0)
    """CPU cores an actor reserves and uses; null shares out what the cluster has."""
    num_fetch_tasks: int | None = Field(default=None, ge=1)
    """Shards fetched from storage at once; null follows the number of actors."""
    drain_timeout_s: float = Field(default=60.0, ge=0)
    """Seconds to finish the shards in flight after SIGTERM or Ctrl-C."""
    no_progress_timeout_s: float = Field(default=7200.0, gt=0)
    """Seconds without one finished shard after which the run is given up."""
    gpu_price_per_hour: float | None = Field(default=None, ge=0)
    """What one GPU costs an hour, in any currency: the closing summary then tells the cost; null leaves it out."""

    @model_validator(mode="after")
    def _fields_agree(self) -> ClusterConfig:
        if self.max_actors is not None and self.max_actors < self.min_actors:
            raise ValueError(f"cluster.max_actors={self.max_actors} is below cluster.min_actors={self.min_actors}")
        return self


class StorageConfig(Settings):
    """How long storage is tried again; then an image fails if others can be read, and if none can, the run ends."""

    section: ClassVar[str] = "storage"
    timeout_s: float = Field(default=75.0, gt=0)
    """Seconds to try one image or file again; raise it to wait out outages, lower it for links to many dead hosts."""
    max_attempts: int | None = Field(default=None, ge=1)
    """Most requests for one image or file; null tries for storage.timeout_s."""
    stall_timeout_s: float = Field(default=20.0, gt=0)
    """Seconds without a byte from the server before an attempt is given up and made again."""


class Config(Settings):
    """All settings of a run. Mask settings that are not given are the model's own."""

    model_config = ConfigDict(strict=False)  # a section may be given as a mapping

    input: InputConfig = InputConfig()
    model: ModelConfig = ModelConfig()
    masks: MaskConfig = MaskConfig()
    output: OutputConfig = OutputConfig()
    cluster: ClusterConfig = ClusterConfig()
    storage: StorageConfig = StorageConfig()

    @model_validator(mode="after")
    def _masks_follow_the_model(self) -> Config:
        self.__dict__["masks"] = self.masks.for_model(self.model.name)  # frozen, and not yet in use
        return self

    def default_identity(self) -> dict[str, Any]:
        """`identity` of a run of the same model with nothing else set: what a setting counts as in an older run.json
        that does not have it."""
        plain = {"input": InputConfig(), "masks": MaskConfig().for_model(self.model.name), "output": OutputConfig()}
        return self.model_copy(update=plain).identity()

    def as_begun(self, identity: Mapping[str, Any]) -> Config:
        """These settings, to go on with the run of that identity.

        Mask settings that are not given stay as the run has them if an older version chose them for this model.
        """
        unset = model_masks(self.model.name).keys() - self.masks.model_fields_set
        begun = identity.get("masks", {})
        reference = {key: MaskConfig.model_fields[key].default for key in unset}
        for former in (reference, *_FORMER_MASKS.get(self.model.name, ())):
            values = {key: former.get(key, getattr(self.masks, key)) for key in unset}
            if unset and all(begun.get(key, "not there") == value for key, value in values.items()):
                return self.model_copy(update={"masks": self.masks.model_copy(update=values)})
        return self

    def identity(self) -> dict[str, Any]:
        """What determines the output, as plain JSON values; a run resumes only onto an output with the same identity.

        Left out: the cluster, how often storage is tried, time limits, the shards' compression, and points_per_batch,
        none of which changes a mask. The checkpoint and the prompts are left out because a file's path may change while
        its content does not: the pipeline adds their SHA-256.
        """
        plain = self.model_dump(mode="json")
        del plain["masks"]["points_per_batch"]
        for name in ("prompts", "allow_outside", "decode_timeout_s"):
            del plain["input"][name]
        return {
            "input": plain["input"],
            "model": {key: plain["model"][key] for key in ("name", "dtype")},
            "masks": plain["masks"],
            "output": {"images_per_shard": plain["output"]["images_per_shard"]},
        }
