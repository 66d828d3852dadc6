"""Image embeddings next to the shards: what a model's encoder made of each image, for decoders and for re-labelling.

OUTPUT/embeddings/shard-000000-000.parquet has the embeddings of the first `IMAGES_PER_FILE` images of shard 0, and so
on: one row per image that was labelled, one row group per row, so that a reader fetches one image by a range. All files
of a shard are written before the shard itself, whose existence remains the only mark that it is done. Each file is
created once, as a shard is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from samray import storage
from samray.config.models import MODELS
from samray.errors import ConfigError, NotFoundError, StorageError
from samray.output.lookup import groups_with, read_footer, read_row_group, shards_of
from samray.output.plan import Plan, load_plan
from samray.output.schema import samray_metadata
from samray.output.seals import leave_room, seal
from samray.output.shards import reraise_damaged
from samray.storage.tables import open_parquet

FOLDER: Final = "embeddings"
IMAGES_PER_FILE: Final = 16
"""Part of the format: it tells which file an image is in. 32 MB of SAM's embeddings in float16, 128 MB of SAM 2's."""

EMBEDDING: Final = "image_embeddings"
HIGH_RES: Final = ("high_res_feats_0", "high_res_feats_1")
EARLY: Final = "early_features"
"""Names of feature maps: (C, h, w); for models whose decoder adds them (C / 8, 4h, 4w) and (C / 4, 2h, 2w); for SAM-HQ
(D, h, w)."""

SCHEMA: Final = pa.schema(
    [
        ("image_id", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("input_width", pa.int32()),
        ("input_height", pa.int32()),
        ("dtype", pa.string()),
        (
            "features",
            pa.list_(
                pa.struct(
                    [
                        ("name", pa.string()),
                        ("shape", pa.list_(pa.int32())),
                        ("scale", pa.list_(pa.float32())),
                        ("data", pa.binary()),
                    ]
                )
            ),
        ),
    ]
)
_DTYPES: Final[Mapping[str, npt.DTypeLike]] = {"float32": "<f4", "float16": "<f2", "int8": "i1"}

Maps = dict[str, npt.NDArray[np.float32]]
"""Name -> feature map (channels, height, width), see `EARLY`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedding:
    """The embedding of one image, as `samray.read_embedding` returns it: what a mask decoder needs besides prompts."""

    image_id: int
    features: dict[str, npt.NDArray[np.float32]]
    """Inputs of the decoder by name: `image_embeddings` (1, C, h, w); for SAM 2 and the embedded model, which have
    them, also `high_res_feats_0` (1, C / 8, 4h, 4w) and `high_res_feats_1` (1, C / 4, 2h, 2w); for SAM-HQ also
    `early_features` (1, D, h, w)."""
    original_hw: tuple[int, int]
    """Size of the upright image in pixels: that of its masks."""
    input_hw: tuple[int, int]
    """Part of the model's square input that shows the image, from the top left corner."""
    image_size: int
    """Side of the square input."""
    dtype: str
    """How the values are stored: float32, float16 or int8."""
    model: str
    model_sha256: str
    """The weights that made it: only their decoder fits."""
    adapter_sha256: str | None
    """The adapter that was merged into them; None without one."""

    @property
    def image_embeddings(self) -> npt.NDArray[np.float32]:
        """(1, C, h, w) float32."""
        return self.features[EMBEDDING]

    @property
    def onnx_inputs(self) -> dict[str, npt.NDArray[np.float32]]:
        """Inputs of the decoder that `samray models export --onnx` writes, besides the prompts and the image's size."""
        if MODELS[self.model].frame == "square":
            return {"image_embed" if name == EMBEDDING else name: values for name, values in self.features.items()}
        return {EMBEDDING: _packed(self.features)}

    @property
    def scale_xy(self) -> tuple[float, float]:
        """Factors from x and y of a prompt, in pixels of the image, to pixels of the model's input."""
        (height, width), (input_h, input_w) = self.original_hw, self.input_hw
        return input_w / width, input_h / height


def _packed(features: Maps) -> npt.NDArray[np.float32]:
    """(1, C + ..., h, w): `samray.sam.encoder.packed`, without torch."""
    embedding, (_, _, h, w) = features[EMBEDDING], features[EMBEDDING].shape
    if EARLY in features:
        return np.concatenate([embedding, features[EARLY]], axis=1)
    if HIGH_RES[0] not in features:
        return embedding
    s0, s1 = (features[name] for name in HIGH_RES)
    halves = s1.reshape(1, -1, h, 2, w, 2).transpose(0, 3, 5, 1, 2, 4).reshape(1, -1, h, w)
    quarters = s0.reshape(1, -1, h, 2, 2, w, 2, 2).transpose(0, 3, 6, 4, 7, 1, 2, 5).reshape(1, -1, h, w)
    return np.concatenate([embedding, halves, quarters], axis=1)


def kind_of(identity: Mapping[str, Any]) -> str:
    """How a run stores embeddings: `float32`, `float16`, `int8`, or `none`."""
    return str(identity.get("output", {}).get("embeddings", "none"))


def make_row(
    image_id: int, original_hw: tuple[int, int], input_hw: tuple[int, int], maps: Maps, dtype: str
) -> dict[str, Any]:
    """A row of `SCHEMA`."""
    features = []
    for name, values in maps.items():
        data, scale = _encode(values, dtype)
        features.append({"name": name, "shape": list(values.shape), "scale": scale, "data": data})
    return {
        "image_id": image_id,
        "width": original_hw[1],
        "height": original_hw[0],
        "input_width": input_hw[1],
        "input_height": input_hw[0],
        "dtype": dtype,
        "features": features,
    }


def maps_of(row: Mapping[str, Any]) -> Maps:
    """The feature maps of a row of `SCHEMA`. Raises: ValueError if they do not fit their shapes."""
    if row["dtype"] not in _DTYPES:
        raise ValueError(f"embeddings of the type {row['dtype']!r}; known are {', '.join(_DTYPES)}")
    maps = {}
    for feature in row["features"]:
        values = np.frombuffer(feature["data"], _DTYPES[row["dtype"]]).reshape(feature["shape"]).astype(np.float32)
        if feature["scale"] is not None:
            with np.errstate(invalid="ignore"):  # damage: `verify` looks for values that are not finite
                values *= np.asarray(feature["scale"], np.float32)[:, None, None]
        maps[feature["name"]] = values
    return maps


def _encode(values: npt.NDArray[np.float32], dtype: str) -> tuple[bytes, list[float] | None]:
    """The values (channels, h, w) as bytes in C order, little-endian; for int8 also the scale of each channel."""
    if dtype != "int8":
        # Features of real weights do not come near float16's limit; beyond it they would be infinite.
        limit = np.finfo(np.float16).max if dtype == "float16" else np.inf
        return np.clip(values, -limit, limit).astype(_DTYPES[dtype]).tobytes(), None
    scale = np.abs(values).max(axis=(1, 2)) / np.float32(127)
    scale[scale == 0] = 1
    return np.rint(values / scale[:, None, None]).astype(np.int8).tobytes(), scale.tolist()


# --- files -----------------------------------------------------------------------------------------------------------


def file_name(shard: int, file: int) -> str:
    """Name of the file with images `file * IMAGES_PER_FILE` and following of a shard."""
    return f"shard-{shard:06d}-{file:03d}.parquet"


def file_uri(output: str, shard: int, file: int) -> str:
    return storage.join(storage.normalize(output), FOLDER, file_name(shard, file))


def num_files(plan: Plan, shard: int) -> int:
    """Number of embedding files of a shard."""
    return -(-plan.num_images_of(shard) // IMAGES_PER_FILE)


def file_bytes(rows: Iterable[Mapping[str, Any]], run: Mapping[str, Any], compression_level: int = 3) -> bytes:
    """Encode rows of `SCHEMA`, with the metadata of a run (`Plan.run`), as Parquet."""
    made_by = {"version": run.get("samray_version"), "identity": run.get("identity", {})}
    made_by |= {"generation": run.get("generation", 0)}
    metadata = {b"samray": json.dumps(made_by, sort_keys=True, separators=(",", ":")).encode()}
    sink = pa.BufferOutputStream()
    schema = SCHEMA.with_metadata(metadata)
    with pq.ParquetWriter(
        sink,
        schema,
        compression="zstd",
        compression_level=compression_level,
        use_dictionary=False,
        write_statistics=["image_id"],
        write_page_checksum=True,
    ) as writer:
        leave_room(writer)
        # One group each; a file without rows has none, and still says that its images are done.
        for row in rows:
            writer.write_table(pa.Table.from_pylist([row], schema=schema))
    return seal(sink.getvalue())


def read_file(output: str, shard: int, file: int) -> list[dict[str, Any]]:
    """All rows of a file. Raises: NotFoundError, StorageError."""
    uri = file_uri(output, shard, file)
    data = storage.read_bytes(uri)
    with reraise_damaged(uri):
        rows: list[dict[str, Any]] = open_parquet(data).read().to_pylist()
        return rows


def read_generation_of(output: str, shard: int, file: int) -> int:
    """Generation of the plan for which a file was written. Raises: NotFoundError, StorageError."""
    uri = file_uri(output, shard, file)
    footer = read_footer(uri, storage.file_size(uri))
    with reraise_damaged(uri):
        return int(samray_metadata(footer.schema.to_arrow_schema()).get("generation", 0))


class RowReader:
    """Reads rows of embeddings by ranges; keeps the footers of the last shard. For several threads."""

    def __init__(self, output: str) -> None:
        self._output = output
        self._footers: tuple[str, int | None, pq.FileMetaData] | None = None

    def read(self, shard: int, index: int, image_id: int) -> dict[str, Any] | None:
        """The row of an image, at this index of its shard; None if it has none. Raises: NotFoundError, StorageError."""
        uri = file_uri(self._output, shard, index // IMAGES_PER_FILE)
        known = self._footers
        if known is None or known[0] != uri:
            size = storage.file_size(uri)
            known = self._footers = (uri, size, read_footer(uri, size))
        _, size, footer = known
        with reraise_damaged(uri):
            groups = groups_with(footer, "image_id", image_id)
        for group in groups:
            for row in read_row_group(uri, size, footer, group).to_pylist():
                if row["image_id"] == image_id:
                    return dict(row)
        return None


def read_embedding(output: str, image_id: int) -> Embedding:
    """The stored embedding of one image: what a mask decoder needs besides prompts.

    Reads the part of the plan around that id, and the footer and one row group of one file.
    Raises: ConfigError if OUTPUT has no embeddings, or none of this image; StorageError.
    """
    plan = load_plan(str(output))
    where, identity = storage.redact(plan.output), plan.run["identity"]
    if kind_of(identity) == "none":
        raise ConfigError(f"{where} has no embeddings: it was made without output.embeddings, see `samray embed`")
    for shard, _ in shards_of(plan, image_id):
        ids = plan.read_shard(shard)["image_id"].to_pylist()
        if image_id not in ids:
            continue
        index = ids.index(image_id)
        try:
            row = RowReader(plan.output).read(shard, index, image_id)
        except NotFoundError as error:
            name = file_name(shard, index // IMAGES_PER_FILE)
            raise ConfigError(
                f"image {image_id} of {where} has no embedding yet: {FOLDER}/{name} is missing; finish the run first"
            ) from error
        if row is None:
            raise ConfigError(f"image {image_id} of {where} has no embedding: it failed, see samray.read_image")
        return embedding_of(row, identity, file_uri(plan.output, shard, index // IMAGES_PER_FILE))
    raise ConfigError(f"{where} has no image_id {image_id} among its {plan.num_images} images")


def embedding_of(row: Mapping[str, Any], identity: Mapping[str, Any], uri: str) -> Embedding:
    """A row of `SCHEMA` as an Embedding. Raises: StorageError if it is damaged."""
    model = identity.get("model", {})
    try:
        maps = {name: values[None] for name, values in maps_of(row).items()}
        return Embedding(
            image_id=row["image_id"],
            features=maps,
            original_hw=(row["height"], row["width"]),
            input_hw=(row["input_height"], row["input_width"]),
            image_size=MODELS[model["name"]].image_size,
            dtype=row["dtype"],
            model=model["name"],
            model_sha256=model["checkpoint_sha256"],
            adapter_sha256=model.get("adapter_sha256"),
        )
    except (ValueError, TypeError, KeyError) as error:
        raise StorageError(f"{storage.redact(uri)} has values that samray does not write: {error!r}") from error
