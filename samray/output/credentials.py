"""Credentials in the URIs of an input: used to read the images, never stored in OUTPUT.

The URIs of a list of signed URLs, or of an INPUT such as `https://user:password@host/photos/`, are secrets themselves.
The plan stores them without credentials (`hide`). To read the images, the driver lists INPUT again, which also picks up
new signatures, and sends the real URIs to the workers with each shard (`reveal`).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from samray import storage
from samray.errors import ConfigError
from samray.inputs.listing import list_images
from samray.inputs.rows import may_hold_credentials

if TYPE_CHECKING:
    from samray.config import Config
    from samray.output.plan import Plan

Credentials = Mapping[str, str]
"""URI or container in the plan -> in INPUT, for those that differ."""


def hide(images: pa.Table) -> tuple[pa.Table, dict[str, str]]:
    """The images (columns `uri` and `container`) without credentials in their URIs, and the mapping back to the
    originals.

    URIs that differ only in credentials stay distinct: a hash of the whole URI is appended, as `#image=...`.
    """
    # The URI of an image in a container contains the container's, so only the latter is redacted by itself.
    in_container = pc.is_valid(images["container"])
    single = pc.if_else(in_container, None, images["uri"])
    hidden = {**_hidden(single), **_hidden(images["container"])}
    if not hidden:
        return images, {}
    uris = [
        uri if container is None else uri.replace(container, hidden.get(container, container))
        for uri, container in zip(images["uri"].to_pylist(), images["container"].to_pylist(), strict=True)
    ]
    columns = {"uri": [hidden.get(uri, uri) for uri in uris], "container": _mapped(images["container"], hidden)}
    for name, values in columns.items():
        index = images.schema.get_field_index(name)
        images = images.set_column(index, images.schema.field(name), pa.chunked_array([pa.array(values, pa.string())]))
    return images, {shown: uri for uri, shown in hidden.items()}


def hide_known(uris: pa.ChunkedArray) -> pa.ChunkedArray:
    """Apply `hide` to the URIs of a plan from an older version."""
    hidden = _hidden(uris)
    return pa.chunked_array([pa.array(_mapped(uris, hidden), pa.string())]) if hidden else uris


def reveal(rows: pa.Table, credentials: Credentials) -> pa.Table:
    """Rows of a plan with their original, readable URIs and containers."""
    for name in ("uri", "container") if credentials else ():
        index = rows.schema.get_field_index(name)
        column = pa.array(_mapped(rows[name], credentials), pa.string())
        rows = rows.set_column(index, rows.schema.field(name), [column])
    return rows


def read_credentials(plan: Plan, input_uri: str, config: Config, shards: Iterable[int]) -> dict[int, dict[str, str]]:
    """Shard -> the credentials of its images, for shards that need any. Lists INPUT if there are such shards.

    Images that INPUT no longer lists are left out: they become failed rows. Raises: ConfigError if INPUT cannot be
    listed or has none of them, StorageError.
    """
    needed: dict[int, set[str]] = {}
    # If no generation hides anything, no shard of the plan is read.
    for shard in shards if any(generation.num_hidden for generation in plan.generations) else ():
        rows = plan.read_shard(shard)
        # An image in a tar or Parquet file is read by its container, any other by its own URI.
        sources = pc.coalesce(rows["container"], rows["uri"]).unique().to_pylist()
        if uris := {uri for uri in sources if storage.is_redacted(uri)}:
            needed[shard] = uris
    if not needed:
        return {}
    where = f"{storage.redact(plan.output)} stores no credentials, so INPUT must list its images again"
    try:
        listed = list_images(input_uri, config.input).images
    except ConfigError as error:
        raise ConfigError(f"{error}; {where}") from error
    _, credentials = hide(listed)
    by_shard = {shard: {uri: credentials[uri] for uri in uris if uri in credentials} for shard, uris in needed.items()}
    # Some images may be gone from INPUT, which makes failed rows; if all are, this is another INPUT.
    if not any(by_shard.values()):
        raise ConfigError(
            f"{where}: INPUT {storage.redact(input_uri)} has none of the images that are left to label, for example"
            f" {min(next(iter(needed.values())))}; give the INPUT that they came from"
        )
    return by_shard


def _hidden(uris: pa.ChunkedArray) -> dict[str, str]:
    """URI -> URI without credentials, for those that have any."""
    # Arrow rules out nearly all URIs; Python looks at the rest.
    candidates = uris.filter(may_hold_credentials(uris)).unique().to_pylist()
    redacted = ((uri, storage.redact(uri)) for uri in candidates)
    hidden = {uri: shown for uri, shown in redacted if shown != uri}
    times = Counter(hidden.values())
    return {uri: shown if times[shown] == 1 else f"{shown}#image={_hash(uri)}" for uri, shown in hidden.items()}


def _hash(uri: str) -> str:
    return hashlib.blake2b(uri.encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()


def _mapped(uris: pa.ChunkedArray, other: Mapping[str, str]) -> list[Any]:
    return [other.get(uri, uri) for uri in uris.to_pylist()]
