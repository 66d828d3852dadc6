"""The pipeline's stages with the toys' rows: unpickling one of these in a worker of Ray's imports this module there."""

from __future__ import annotations

from typing import Any

from samray.config.models import MODELS
from samray.inputs.readers import READERS
from samray.pipeline import fetch, labeler
from tests.support.micro import MICRO_SAM2
from tests.toys import base64_input, patch_model

_fetch_shard, _build_labeler = fetch.fetch_shard, labeler.build_labeler


def _add_rows() -> None:
    MODELS["toy"] = patch_model.SPEC
    MODELS[MICRO_SAM2.name] = MICRO_SAM2
    if base64_input.READER not in READERS:
        READERS.append(base64_input.READER)


def fetch_shard(*args: Any, **kwargs: Any) -> Any:
    _add_rows()
    return _fetch_shard(*args, **kwargs)


def build_labeler(*args: Any, **kwargs: Any) -> Any:
    _add_rows()
    return _build_labeler(*args, **kwargs)
