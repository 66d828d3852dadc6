"""`samray.label_dataset`: labelling as a stage of somebody's own pipeline."""

from __future__ import annotations

import gc
import io
import logging
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray.data
from PIL import Image

import samray
from samray.cluster.session import running_ray
from samray.config import Config, load_config
from samray.pipeline import dataset_stage as stage
from samray.pipeline.dataset_stage import images_of, label_dataset
from tests.support import standin
from tests.support.outputs import expected_masks


def _pixels(data: bytes) -> Any:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)


def test_columns_are_added_and_the_others_kept(local_ray: None, config: Callable[..., Config]) -> None:
    data = [standin.make_image(i) for i in range(5)]
    rows = [
        {
            "image_id": 100 + i,
            "bytes": b"junk" if i == 3 else data[i],
            "tag": f"t{i}",
            "boxes": [[1.0, 2.0], [float(i)]],
        }
        for i in range(5)
    ]

    labelled = label_dataset(ray.data.from_items(rows), config(), make_labeler=standin.make_labeler).take_all()

    assert sorted(row["tag"] for row in labelled) == [f"t{i}" for i in range(5)]
    for row in labelled:
        i = int(row["tag"][1:])
        assert row["bytes"] == rows[i]["bytes"]
        assert [list(box) for box in row["boxes"]] == rows[i]["boxes"]
        if i == 3:
            assert (row["status"], list(row["annotations"])) == ("failed", [])
            assert row["error"].startswith("not_an_image: ")
        else:
            assert (row["status"], row["error"]) == ("ok", None)
            wanted = expected_masks(data[i])
            assert [a["id"] for a in row["annotations"]] == [(100 + i) * 65536 + k for k in range(len(wanted))]
            assert [a["segmentation"]["counts"] for a in row["annotations"]] == [
                m["segmentation"]["counts"] for m in wanted
            ]


def test_arrays_are_images_too(local_ray: None, config: Callable[..., Config]) -> None:
    data = [standin.make_image(i, (10 + i, 8)) for i in range(3)]
    rows = [{"image": _pixels(d), "n": i} for i, d in enumerate(data)]

    labelled = label_dataset(ray.data.from_items(rows), config(), make_labeler=standin.make_labeler).take_all()

    for row in labelled:
        assert row["status"] == "ok", row["error"]
        wanted = expected_masks(data[row["n"]])
        assert [int(a["area"]) for a in row["annotations"]] == [m["area"] for m in wanted]


def test_what_an_image_column_may_hold() -> None:
    import pyarrow as pa

    huggingface = pa.chunked_array([pa.array([{"bytes": b"abc", "path": None}, None])])
    first, second = images_of(huggingface)
    assert first == b"abc"
    assert isinstance(second, samray.ImageError)
    grey = pa.chunked_array([pa.array([[[1.5, 2.5]]])])
    (third,) = images_of(grey)
    assert isinstance(third, samray.ImageError)
    assert third.reason == "unsupported"


def test_an_image_column_that_is_not_there_is_told_and_a_run_after_it_has_all_cpus(
    local_ray: None, config: Callable[..., Config]
) -> None:
    def failed_run() -> None:
        ds = ray.data.from_items([{"picture": standin.make_image(0)}])
        with pytest.raises(Exception, match=r"input\.image_column"):
            label_dataset(ds, config(), make_labeler=standin.make_labeler).take_all()

    gc.disable()  # else it might come by chance
    logging.disable()  # pytest keeps what is logged, with tracebacks
    try:
        failed_run()
        with running_ray(config().cluster):
            deadline = time.monotonic() + 300
            while ray.available_resources()["CPU"] < 2:  # the failed run's actor held one for ten minutes
                assert time.monotonic() < deadline, ray.available_resources()
                time.sleep(0.1)
    finally:
        logging.disable(logging.NOTSET)
        gc.enable()


def test_a_stage_on_cpus_holds_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "cluster_nodes", lambda: [{"CPU": 64.0, "GPU": 2.0}])
    monkeypatch.setattr(stage.ray, "is_initialized", lambda: True)
    for device, gpus in (("cpu", 0.0), ("cuda", 1.0)):
        asked: dict[str, Any] = {}
        ds: Any = SimpleNamespace(map_batches=lambda function, asked=asked, **options: asked.update(options))
        samray.label_dataset(ds, load_config(None, None, [f"model.device={device}"]))
        assert asked["num_gpus"] == gpus
