"""The settings of masks with names, and the ways to find them: one table, one row per way.

Settings, help, the plan and the actors take names and functions from here, so this module imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import Field, field_validator, model_validator

from samray.config.base import OneOf, Settings


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """A value of `labels.by`. The functions are `module:function`, imported when they are needed."""

    inputs: str
    """Called with the `LabelsConfig` in the driver, before anything is written; see `samray.labels.ways.Inputs`."""
    builder: str
    """Called with the model (the device, if it needs no SAM), the `Config` and the inputs in each actor; returns a mask
    generator."""
    needs: tuple[str, ...]
    """Settings that must be given; with takes_image_phrases, images may bring the phrases."""
    takes_image_phrases: bool = True
    """Whether an image may have phrases of its own, besides or instead of `labels.phrases`."""
    takes_clicks: bool = False
    """Whether it also makes a mask, without a name, from each click or box of a prompt file."""
    thresholds: tuple[str, ...] = ("score_thresh",)
    """Settings that give more masks if they are lowered."""
    needs_sam: bool = True
    """Whether `model.name` makes the masks. If not, the way's own network does, and no SAM is loaded."""
    presence: bool = False
    """Whether it says how likely an image shows what a phrase names at all, apart from scores of single masks."""
    names_grid: bool = False
    """Whether it finds all masks, as without names, and then names them."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Settings of `labels` that have another default with it."""
    network: str | None = None
    """Network of `transformers` that `labels.checkpoint` is by default: a name on the Hugging Face Hub."""


CLIP: Final = "openai/clip-vit-large-patch14"
"""The CLIP that is used if none is given: a name on the Hugging Face Hub."""

WAYS: Final[Mapping[str, Way]] = {
    "example": Way(
        inputs="samray.labels.example:read_example",
        builder="samray.labels.example:build_generator",
        needs=("example", "example_mask", "name"),
        takes_image_phrases=False,
    ),
    "grounding_dino": Way(
        inputs="samray.labels.grounding_dino:read_inputs",
        builder="samray.labels.grounding_dino:build_generator",
        needs=("phrases",),
        takes_clicks=True,
        thresholds=("score_thresh", "text_thresh"),
        network="IDEA-Research/grounding-dino-tiny",
    ),
    "sam3": Way(
        inputs="samray.labels.sam3:read_inputs",
        builder="samray.labels.sam3:build_generator",
        needs=("phrases",),
        needs_sam=False,
        presence=True,
        network="facebook/sam3",
    ),
    "fastsam": Way(
        inputs="samray.labels.fastsam:read_inputs",
        builder="samray.labels.fastsam:build_generator",
        needs=("onnx",),
        needs_sam=False,
        thresholds=("score_thresh", "conf_thresh"),
        defaults={
            "nms_thresh": 0.9,  # as published, like the crops, the template and the network
            "crops": ("boxed",),
            "templates": ("{}",),
            "negatives": ("object", "things", "stuff", "texture"),  # LERF's, for the same purpose
        },
        network="openai/clip-vit-base-patch32",
    ),
    "clip": Way(
        inputs="samray.labels.clip:read_inputs",
        builder="samray.labels.clip:build_generator",
        needs=("phrases",),
        names_grid=True,
        network=CLIP,
    ),
    "sam_text": Way(
        inputs="samray.labels.sam_text:read_inputs",
        builder="samray.labels.sam_text:build_generator",
        needs=("phrases",),
        takes_clicks=True,
        network=CLIP,
    ),
}


def ways_with_image_phrases() -> str:
    """The ways whose images may have phrases of their own, for messages."""
    *names, last = (name for name, way in WAYS.items() if way.takes_image_phrases)
    return f"labels.by={', '.join(names)} or {last}"


DESIGNS: Final[Mapping[str, str]] = {
    "persam": "samray.labels.persam:PersamGenerator",
    "stitched_points": "samray.labels.stitched:StitchedGenerator",
    "stitched_grid": "samray.labels.stitched:StitchedGenerator",
    "stitched_single": "samray.labels.stitched:StitchedGenerator",
    "stitched_negative": "samray.labels.stitched:StitchedGenerator",
}
"""How `labels.by=example` looks for the example's class: the value of `labels.design` -> its generator."""

WayName = Annotated[str, OneOf(lambda: list(WAYS))]
DesignName = Annotated[str, OneOf(lambda: list(DESIGNS))]

CROPS: Final = ("plain", "blanked", "enlarged", "boxed")
"""How CLIP gets a mask (`labels.by=clip`, `fastsam`): `samray.labels.zero_shot`."""

_BY_CONTENT: Final = {"example", "example_mask", "name", "phrases", "checkpoint", "onnx"}
_NOT_IN_FIRST_VERSION: Final = {"features", "smooth", "relative_thresh"}


class LabelsConfig(Settings):
    """Masks with names instead of all masks: a label and its score for each mask."""

    section: ClassVar[str] = "labels"
    by: WayName | None = None
    """How to find masks and names: by phrases (grounding_dino, sam3, fastsam (AGPL-3.0), sam_text), an example, or all
    (clip)."""
    phrases: str | tuple[str, ...] | None = None
    """Names to look for: a list, as in '[cat,fire hydrant]', or a text file with one per line: a path or URI."""
    example: str | None = None
    """Image that shows the class, for labels.by=example: a path or URI."""
    example_mask: str | None = None
    """Mask of the class in that image: a picture of the same size, not black (and not transparent) on the class."""
    name: str | None = Field(default=None, min_length=1, max_length=1000)
    """Name of the example's class, written as the label of each mask."""
    design: DesignName = "persam"
    """How to look for the example's class, see the guide "One example"."""
    score_thresh: float | None = Field(default=None, ge=-2, le=2)
    """Least similarity (persam), score (null: grounding_dino 0.3, sam3 0.5), probability (null: clip, fastsam 0.5), IoU
    (sam_text)."""
    text_thresh: float = Field(default=0.25, ge=0, le=1)
    """grounding_dino: least score of the box's phrase; lower it with score_thresh."""
    nms_thresh: float = Field(default=0.8, ge=0, le=1)
    """grounding_dino, fastsam (0.9): of two boxes with a larger IoU keep the better one; 1 keeps both."""
    onnx: str | None = None
    """fastsam: its network as an ONNX file, a path or URI; the weights are under AGPL-3.0. See the guide "Names"."""
    conf_thresh: float = Field(default=0.4, ge=0, le=1)
    """fastsam: masks need more confidence than this; lower it for more masks."""
    checkpoint: str | None = None
    """Network that reads the phrases: a folder (path or URI) or a name on Hugging Face; null: see the guide "Names"."""
    crops: tuple[str, ...] = ("plain", "blanked", "enlarged")
    """clip, fastsam ([boxed]): ways to cut out a mask, embeddings averaged: plain, blanked, enlarged, boxed."""
    templates: tuple[str, ...] = ("a photo of a {}.",)
    """clip, sam_text, fastsam ([{}]): sentences with each phrase in the place of {}; their embeddings are averaged."""
    negatives: tuple[str, ...] = ()
    """clip, fastsam ([object,things,stuff,texture]): phrases that are not names: a mask most like one has no name."""
    relative_thresh: float = Field(default=0.5, ge=0, le=1)
    """persam: least similarity between the image's least (0) and most (1) similar pixel; lower it to find more."""
    max_instances: int = Field(default=10, ge=1, le=1000)
    """persam: most clicks per image, and so most masks. Each costs three passes of the mask decoder."""
    pick: Literal["evidence", "iou"] = "evidence"
    """persam: which of three masks to keep: evidence: most similar inside, least outside; iou: as published."""
    contrast: bool = True
    """persam: compare with the example and its surroundings; false, as published, with the example alone."""
    features: Literal["levels", "embedding"] = "levels"
    """persam: what is compared: levels: three of the encoder's blocks; embedding: the image embedding, as published."""
    smooth: int = Field(default=8, ge=0, le=64)
    """persam: average similarity over the masks of a grid with so many points per side; 0: not, as published."""
    first_version: bool = False
    """persam: measure similarity as samray's first version did, whose outputs are finished so; see labels.block."""
    block: int | None = Field(default=None, ge=0)
    """persam as in the first version: encoder block whose features are compared, from 0; null: the embedding."""
    runs: int = Field(default=32, ge=1, le=10_000)
    """stitched: passes of the mask decoder per image, each with other random points."""
    points: int = Field(default=3, ge=1, le=100)
    """stitched: random points inside the example per run, and as many outside with stitched_negative."""
    grid: int = Field(default=6, ge=1, le=64)
    """stitched: candidates along one side of the grid on the image."""
    keep: float = Field(default=0.5, gt=0, le=1)
    """stitched: share of the runs to keep, best product of predicted IoU and stability first."""
    vote_thresh: float = Field(default=0.05, ge=0, lt=1)
    """stitched: keep pixels whose average over the runs is above this."""
    seed: int = Field(default=0, ge=0)
    """stitched: seed of the random points."""

    @field_validator("crops", "templates", "negatives", mode="before")
    @classmethod
    def _lists_to_tuples(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("phrases", mode="before")
    @classmethod
    def _list_to_tuple(cls, value: Any) -> Any:
        if isinstance(value, list | tuple) and not all(isinstance(phrase, str) for phrase in value):
            raise ValueError("a phrase is text")  # here, because pydantic would report each member of the union
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _fields_agree(self) -> LabelsConfig:
        if self.by is None:
            changed = [key for key in LabelsConfig.model_fields if key in self.model_fields_set and key != "by"]
            changed = [key for key in changed if getattr(self, key) != LabelsConfig.model_fields[key].default]
            if changed:
                fits = next((name for name, way in WAYS.items() if changed[0] in way.needs), next(iter(WAYS)))
                raise ValueError(f"labels.{changed[0]} needs labels.by; add labels.by={fits}")
            return self
        for key, value in WAYS[self.by].defaults.items():
            if key not in self.model_fields_set:
                self.__dict__[key] = value  # frozen, but not in use yet
        if not self.crops or set(self.crops) - set(CROPS) or len(set(self.crops)) < len(self.crops):
            got = ", ".join(self.crops) or "none"
            raise ValueError(f"labels.crops takes one or more of {', '.join(CROPS)}, each once; got {got}")
        if not self.templates or any("{}" not in template for template in self.templates):
            raise ValueError("labels.templates takes one or more sentences with {} in the place of the phrase")
        way = WAYS[self.by]
        # Phrases may come with the images: `samray.labels.ways.read_inputs` checks them.
        needs = [key for key in way.needs if key != "phrases" or not way.takes_image_phrases]
        missing = [key for key in needs if getattr(self, key) is None]
        if missing:
            problem = f"labels.by={self.by} needs {' and '.join(f'labels.{key}' for key in missing)}"
            if len(missing) == 1:
                description = LabelsConfig.model_fields[missing[0]].description or ""
                problem += f": {' '.join(description.rstrip('.').split()).removeprefix(f'{self.by}: ')}"
            raise ValueError(problem)
        return self

    def identity(self) -> dict[str, Any]:
        """The settings that determine the output. Files may move, so those of an example, of phrases and of a network
        count by content, which the pipeline adds."""
        others = _NOT_IN_FIRST_VERSION if self.is_first_version else {"block"}
        return self.model_dump(mode="json", exclude={*_BY_CONTENT, "first_version", *others})

    @property
    def needs_sam(self) -> bool:
        """Whether the model of `model.name` makes the masks."""
        return self.by is None or WAYS[self.by].needs_sam

    @property
    def gives_names(self) -> bool:
        """Whether masks get names, if no image has phrases of its own; fastsam without phrases has masks only."""
        # Where phrases are needed, the images have them if they are not here.
        has_names = self.phrases is not None or self.name is not None
        return self.by is not None and (has_names or "phrases" in WAYS[self.by].needs)

    @property
    def finds_all(self) -> bool:
        """Whether the masks are all that the point grid gives, with names or without."""
        return self.by is None or WAYS[self.by].names_grid

    @property
    def is_first_version(self) -> bool:
        """Whether similarity is measured as in the first version, the only one with a block."""
        return self.first_version or self.block is not None

    def as_begun(self, identity: Mapping[str, Any]) -> LabelsConfig:
        """These settings, adjusted to resume a run with that identity: one of the first version stays with its
        similarity, unless settings of the present one are given."""
        if "block" not in identity or self.model_fields_set & _NOT_IN_FIRST_VERSION:
            return self
        return self.model_copy(update={"first_version": True})
