"""The settings of a run: frozen sections, each default written once."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, ValidationInfo, field_validator, model_validator

from samray.config.base import OneOf, Settings, as_typed
from samray.config.labels import WAYS, LabelsConfig, ways_with_image_phrases
from samray.config.models import MODELS, model_names
from samray.config.presets import preset_names, preset_path
from samray.config.yaml import load_yaml_file

ModelName = Annotated[str, OneOf(model_names)]
"""A row of `samray.config.models`."""
PointGrid = tuple[tuple[float, float], ...]


class InputConfig(Settings):
    """Which images are read, and how large one may be."""

    section: ClassVar[str] = "input"
    uri_column: str = "uri"
    """Manifest column that holds each image's path or URI."""
    image_column: str = "image"
    """Parquet column that holds encoded images: binary, or Hugging Face struct<bytes, path>."""
    max_pixels: int = Field(default=100_000_000, ge=1)
    """Maximum pixels (width x height) per image; a larger image fails as `too_large` without being decoded."""
    max_bytes: int = Field(default=256 * 2**20, ge=1)
    """Maximum bytes per encoded image; a larger file fails as `too_large` without being read."""
    decode_timeout_s: float = Field(default=60.0, gt=0)
    """CPU seconds allowed to decode one image; after that it fails as `timeout`. Raise it for huge images."""
    bands: tuple[int, ...] | None = None
    """Bands used as red, green and blue, from 1 on, such as [4,3,2]; one band is grey; null: the file's own colours."""
    stretch: tuple[float, float] | None = None
    """Percentiles that become black and white, such as [2,98], per image and band; null keeps the full range."""
    limit: int | None = Field(default=None, ge=1)
    """Label only the first N images of the sorted input; null labels all."""
    allow_outside: bool = False
    """Let a list name files outside its own folder, and a remote list name servers in a private network. Only for lists
    that you trust."""
    skip_duplicates: bool = False
    """Label one of several images with the same bytes; the others fail as `duplicate`. Reads images of equal size
    first."""
    prompts: str | None = None
    """File of user prompts, .jsonl or .parquet: clicks and boxes, one mask for each, or texts (with labels.by)."""

    def bands_identity(self) -> dict[str, Any]:
        """The settings of bands that are used. As before there were any, if none is: an older samray can go on."""
        plain = self.model_dump(mode="json", include={"bands", "stretch"})
        return {name: value for name, value in plain.items() if value is not None}

    @field_validator("bands", "stretch", mode="before")
    @classmethod
    def _lists_to_tuples(cls, value: Any, info: ValidationInfo) -> Any:
        # YAML and the command line give lists, and whole numbers for floats.
        if not isinstance(value, list | tuple):
            return value
        is_float = info.field_name == "stretch"
        return tuple(float(item) if is_float and type(item) is int else item for item in value)

    @model_validator(mode="after")
    def _bands_exist(self) -> InputConfig:
        if self.bands is not None and (len(self.bands) not in (1, 3) or min(self.bands) < 1):
            raise ValueError(f"input.bands = {as_typed(self.bands)} is not allowed; it takes 1 or 3 bands, from 1 on")
        if self.stretch is not None and not 0 <= self.stretch[0] < self.stretch[1] <= 100:
            raise ValueError(
                f"input.stretch = {as_typed(self.stretch)} is not allowed; it takes two percentiles from 0 to 100, the "
                "smaller one first"
            )
        return self


class ModelConfig(Settings):
    """Which Segment Anything model to use, and how to run it."""

    section: ClassVar[str] = "model"
    name: ModelName = "tiny"
    """Model; `samray models` lists their sizes, licences and sources."""
    checkpoint: str | None = None
    """Path or URI of the weights (.pth, .pt, .safetensors); null downloads and verifies the published file."""
    adapter: str | None = None
    """Path or URI of a LoRA adapter for these weights, from train.trainable=lora; it is merged into them."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the networks; auto is bfloat16 on a GPU and float32 on a CPU."""
    device: str | None = None
    """PyTorch device such as cpu, cuda or cuda:1; null uses a GPU if the actor has one."""


class MaskConfig(Settings):
    """Automatic mask generation: names and defaults of segment-anything, plus settings that its users asked for.

    A setting that you do not give follows the model: the embedded model and SAM 2 have their own values
    (`model_masks`), every other model uses the defaults listed here, which are the reference's.
    """

    section: ClassVar[str] = "masks"
    points_per_side: int = Field(default=32, ge=1, le=256)
    """Points along one side of the prompt grid: N x N points per image (or per crop)."""
    points_per_batch: int | None = Field(default=None, ge=1)
    """Point prompts decoded at once. Affects only memory and speed; null adapts it to the free memory."""
    pred_iou_thresh: float = Field(default=0.88, ge=0, le=1)
    """Keep masks whose IoU, as predicted by the model, is above this."""
    stability_score_thresh: float = Field(default=0.95, ge=0, le=1)
    """Keep masks with at least this stability score (IoU of the mask cut at a higher and at a lower threshold)."""
    stability_score_offset: float = Field(default=1.0, ge=0)
    """Shift of the threshold, in logits, up and down for the stability score."""
    box_nms_thresh: float = Field(default=0.7, ge=0, le=1)
    """Box IoU above which two masks of one crop are duplicates; the one with the lower score is dropped."""
    crop_n_layers: int = Field(default=0, ge=0, le=4)
    """Layers of zoomed-in crops in addition to the whole image; layer i has 2^i x 2^i crops."""
    crop_nms_thresh: float = Field(default=0.7, ge=0, le=1)
    """Box IoU above which masks of different crops are duplicates; the one from the smaller crop is kept."""
    crop_overlap_ratio: float = Field(default=512 / 1500, ge=0, lt=1)
    """Overlap of neighbouring crops in layer 1, as a fraction of the image's shorter side; halves with each layer."""
    crop_n_points_downscale_factor: int = Field(default=1, ge=1)
    """Crop layer i uses points_per_side divided by this to the power of i."""
    point_grids: tuple[PointGrid, ...] | None = None
    """Custom points instead of points_per_side: one list of [x, y] in 0..1 per crop layer."""
    refine: Literal["m2m"] | None = None
    """m2m: decode every mask once more with itself as a prompt (SAM 2's use_m2m): cleaner, several times slower."""
    min_mask_region_area: int = Field(default=0, ge=0)
    """Remove islands and fill holes smaller than this, in pixels; 0 leaves masks as predicted."""
    min_mask_area: int = Field(default=0, ge=0)
    """Drop masks smaller than this, in pixels."""
    max_mask_area_fraction: float | None = Field(default=None, gt=0, le=1)
    """Drop masks that cover at least this fraction of the image; null keeps them."""
    mask_nms_thresh: float | None = Field(default=None, ge=0, le=1)
    """Also drop masks whose pixels overlap a better mask by more than this IoU; null compares boxes only."""
    max_masks: int | None = Field(default=None, ge=1, le=65536)
    """Keep at most this many masks per image, highest predicted IoU first; null keeps all."""
    non_overlapping: bool = False
    """Assign each pixel to at most one mask, the one with the best score."""
    bbox_convention: Literal["coco", "sam"] = "coco"
    """coco: boxes as pycocotools' toBbox; sam: width and height one pixel smaller, as in the SA-1B files."""
    tile: int | None = Field(default=None, ge=64, le=16384)
    """Side in pixels of the tiles in which larger images are labelled, also above input.max_pixels; null: as wholes."""
    tile_overlap: float = Field(default=0.25, ge=0.05, le=0.5)
    """Overlap of neighbouring tiles, as a fraction of masks.tile. Objects smaller than it are whole in one of them."""

    @field_validator("point_grids", mode="before")
    @classmethod
    def _grids_to_tuples(cls, grids: Any) -> Any:
        if hasattr(grids, "tolist"):  # the reference takes arrays; this avoids importing numpy
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
            if (num_grids := len(self.point_grids)) != layers + 1:
                raise ValueError(
                    f"masks.point_grids has {num_grids} grids, but masks.crop_n_layers={layers} needs {layers + 1}"
                )
            if not any(self.point_grids):
                raise ValueError("masks.point_grids has no points; it needs at least one")
            if any(not 0 <= c <= 1 for grid in self.point_grids for point in grid for c in point):
                raise ValueError(
                    "masks.point_grids has a coordinate outside 0..1; coordinates are fractions of the crop's size"
                )
        elif self.points_per_side // self.crop_n_points_downscale_factor**layers < 1:
            raise ValueError(
                f"masks.crop_n_points_downscale_factor={self.crop_n_points_downscale_factor} leaves no points of"
                f" masks.points_per_side={self.points_per_side} in crop layer {layers}"
            )
        return self

    def for_model(self, name: str | None) -> MaskConfig:
        """These settings, with the defaults of that model for every setting that the user did not give; None: those of
        the reference.

        Those stay marked as not given: a later `for_model` with another name replaces them again. Raises SettingsError
        if a given setting does not fit the model's defaults.
        """
        values = {key: getattr(self, key) for key in self.model_fields_set}
        resolved = MaskConfig(**{**model_masks(name), **values})
        resolved.model_fields_set.intersection_update(values)
        return resolved


@cache
def model_masks(name: str | None) -> Mapping[str, Any]:
    """The mask settings in which a model differs from the reference, from the preset of its family or its own."""
    preset = (MODELS[name].masks_preset if name in MODELS else None) or name
    return load_yaml_file(preset_path(preset))["masks"] if preset is not None and preset in preset_names() else {}


_FORMER_MASKS: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    "tiny": (
        {"pred_iou_thresh": 0.62, "stability_score_thresh": 0.8},  # samray 0.1
        {"pred_iou_thresh": 0.5, "stability_score_thresh": 0.8},  # weights until November 2026
    ),
}
"""Values of `model_masks` in earlier versions. The reference's values count too: 0.1 used them from Python."""


_TILES = ("tile", "tile_overlap")


class OutputConfig(Settings):
    """How rows are grouped into Parquet shards, and when a run counts as failed."""

    section: ClassVar[str] = "output"
    images_per_shard: int = Field(default=64, ge=1, le=10_000)
    """Images per Parquet shard. A shard is the unit of work, retry and resume."""
    compression_level: int = Field(default=3, ge=1, le=22)
    """zstd compression level of the shards."""
    embeddings: Literal["none", "float16", "int8", "float32"] = "none"
    """Also store image embeddings, for `samray label --from` and other decoders; int8 takes a quarter of float32."""
    max_failed_fraction: float = Field(default=0.1, ge=0, le=1)
    """Exit with an error if more than this fraction of the images could not be labelled."""


class ClusterConfig(Settings):
    """Where the work runs. These settings do not affect the masks: a run may resume with other values."""

    section: ClassVar[str] = "cluster"
    address: str | None = None
    """Ray cluster to join (auto, host:port or ray://...); null joins RAY_ADDRESS if set, else starts Ray locally."""
    min_actors: int = Field(default=1, ge=1)
    """Minimum number of labelling actors; each loads its own copy of the model."""
    max_actors: int | None = Field(default=None, ge=1)
    """Maximum number of labelling actors; null uses as many as fit in the cluster."""
    num_gpus_per_actor: float | None = Field(default=None, ge=0)
    """GPUs per actor; fractions allowed. null is 1 if the cluster has GPUs, else 0."""
    num_cpus_per_actor: float | None = Field(default=None, gt=0)
    """CPU cores per actor; null divides the cluster's cores among the actors."""
    num_fetch_tasks: int | None = Field(default=None, ge=1)
    """Shards fetched from storage at the same time; null follows the number of actors."""
    drain_timeout_s: float = Field(default=60.0, ge=0)
    """Seconds allowed to finish the shards in progress after SIGTERM or Ctrl-C."""
    no_progress_timeout_s: float = Field(default=7200.0, gt=0)
    """Abort the run if no shard finishes for this many seconds."""
    gpu_price_per_hour: float | None = Field(default=None, ge=0)
    """Price of one GPU per hour, in any currency, to report the cost of the run; null leaves the cost out."""

    @model_validator(mode="after")
    def _fields_agree(self) -> ClusterConfig:
        if self.max_actors is not None and self.max_actors < self.min_actors:
            raise ValueError(f"cluster.max_actors={self.max_actors} is below cluster.min_actors={self.min_actors}")
        return self


class StorageConfig(Settings):
    """How long to retry storage. After that, an unreadable image fails; if no image can be read, the run ends."""

    section: ClassVar[str] = "storage"
    timeout_s: float = Field(default=75.0, gt=0)
    """Seconds to retry one image or file. Raise it to wait out outages; lower it for links to many dead hosts."""
    max_attempts: int | None = Field(default=None, ge=1)
    """Maximum requests per image or file; null retries until storage.timeout_s."""
    stall_timeout_s: float = Field(default=20.0, gt=0)
    """Seconds without receiving a byte before a request is cancelled and retried."""


class Config(Settings):
    """All settings of a run. Mask settings that are not given follow the model."""

    model_config = ConfigDict(strict=False)  # a section may be given as a mapping
    finds_masks: ClassVar[bool] = True
    """Whether the command makes masks."""

    input: InputConfig = InputConfig()
    model: ModelConfig = ModelConfig()
    masks: MaskConfig = MaskConfig()
    labels: LabelsConfig = LabelsConfig()
    output: OutputConfig = OutputConfig()
    cluster: ClusterConfig = ClusterConfig()
    storage: StorageConfig = StorageConfig()

    @model_validator(mode="after")
    def _masks_follow_the_model(self) -> Config:
        self.__dict__["masks"] = self.masks.for_model(self.sam_name)  # frozen, but not in use yet
        return self

    @model_validator(mode="after")
    def _one_source_of_masks(self) -> Config:
        by = self.labels.by
        if by is not None and self.input.prompts is not None and not WAYS[by].takes_image_phrases:
            raise ValueError(
                f"labels.by={by} takes no prompts, neither clicks nor boxes nor texts; leave input.prompts out. Texts "
                f"of single images need {ways_with_image_phrases()}"
            )
        return self

    @model_validator(mode="after")
    def _prompts_are_of_single_images(self) -> Config:
        if self.input.skip_duplicates and self.input.prompts is not None:
            raise ValueError(
                "input.skip_duplicates labels one of several equal images, but input.prompts may ask each for other "
                "masks; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _tiles_of_the_grid(self) -> Config:
        conflicts = {
            "input.prompts": (self.input.prompts is not None, "clicks and boxes are answered on the whole image"),
            "labels.by": (self.labels.by is not None, "find all masks first, then name them with samray name"),
            "output.embeddings": (self.output.embeddings != "none", "embeddings are those of whole images"),
        }
        for name, (is_set, why) in conflicts.items():
            if self.masks.tile is not None and is_set:
                raise ValueError(f"masks.tile does not work with {name}: {why}; leave one of them out")
        return self

    @model_validator(mode="after")
    def _embeddings_of_sam(self) -> Config:
        if self.output.embeddings != "none" and self.labels.by is not None:
            raise ValueError(
                f"output.embeddings does not apply with labels.by={self.labels.by}; leave one of them out, or store "
                "the embeddings apart with samray embed"
            )
        return self

    @model_validator(mode="after")
    def _no_model_without_use(self) -> Config:
        used = ModelConfig(device=self.model.device)
        if not self.labels.needs_sam and self.model != used:
            changed = [key for key in ModelConfig.model_fields if getattr(self.model, key) != getattr(used, key)]
            raise ValueError(
                f"labels.by={self.labels.by} makes the masks with its own network, in float32, and "
                f"loads no other model; leave out {' and '.join(f'model.{key}' for key in changed)}"
            )
        return self

    @property
    def sam_name(self) -> str | None:
        """The model that makes the masks; None if `labels.by` makes them itself."""
        return self.model.name if self.labels.needs_sam else None

    @property
    def masks_are_prompted(self) -> bool:
        """Whether all masks are those of clicks and boxes: a way of `labels` finds others as well."""
        return self.input.prompts is not None and self.labels.by is None

    def default_identity(self) -> dict[str, Any]:
        """`identity` of a run of the same model with nothing else set: what a setting counts as in an older run.json
        that does not have it."""
        plain = {"input": InputConfig(), "masks": MaskConfig().for_model(self.sam_name), "output": OutputConfig()}
        # A run without names does not record settings of names.
        defaults = {**self.model_copy(update=plain).identity(), "labels": LabelsConfig().identity()}
        defaults["output"]["embeddings"] = OutputConfig().embeddings
        defaults["input"] |= {"bands": None, "stretch": None}
        if "masks" in defaults:
            defaults["masks"] |= {name: MaskConfig.model_fields[name].default for name in _TILES}
        return defaults

    def as_begun(self, identity: Mapping[str, Any]) -> Config:
        """These settings, adjusted to resume the run with that identity.

        Mask settings that are not given keep the run's values if an older version chose those for this model.
        """
        self = self.model_copy(update={"labels": self.labels.as_begun(identity.get("labels", {}))})
        unset = model_masks(self.model.name).keys() - self.masks.model_fields_set
        begun = identity.get("masks", {})
        reference = {key: MaskConfig.model_fields[key].default for key in unset}
        for former in (reference, *_FORMER_MASKS.get(self.model.name, ())):
            values = {key: former.get(key, getattr(self.masks, key)) for key in unset}
            if unset and all(begun.get(key, "not there") == value for key, value in values.items()):
                return self.model_copy(update={"masks": self.masks.model_copy(update=values)})
        return self

    def identity(self) -> dict[str, Any]:
        """The settings that determine the output, as plain JSON values. A run resumes only onto an output with the same
        ones.

        Left out because they do not change a mask: the cluster, storage retries, time limits, the compression of
        shards, and points_per_batch. Checkpoint, adapter and prompts are left out because a file may move without
        changing: the pipeline adds the SHA-256 of their content, and the settings of `labels` if they are used.
        """
        plain = self.model_dump(mode="json")
        model = ("name", "dtype") if self.labels.needs_sam else ()
        del plain["masks"]["points_per_batch"]
        # As with embeddings below: an older samray can go on with an output without tiles.
        for name in _TILES if self.masks.tile is None else ():
            del plain["masks"][name]
        for name in ("prompts", "allow_outside", "decode_timeout_s"):
            del plain["input"][name]
        for name in ("bands", "stretch"):
            del plain["input"][name]
        output = ("images_per_shard", *(("embeddings",) if self.output.embeddings != "none" else ()))
        return {
            "input": plain["input"] | self.input.bands_identity(),
            "model": {key: plain["model"][key] for key in model},
            "masks": plain["masks"],
            "output": {key: plain["output"][key] for key in output},
        }
