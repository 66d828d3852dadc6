"""One operation on an output, as a process of its own for the test that kills it.

python -m tests.support.operation.py NAME FOLDER PACE ON_RAY

PACE: seconds per image, or a folder in which a file with the name of an output holds what makes it.

label, append, retry: FOLDER/in into FOLDER/out, with the stand-in labeler. compact, export and
import: FOLDER/out into FOLDER/compact, FOLDER/out into FOLDER/export, FOLDER/export into FOLDER/import.
edges: FOLDER/in into FOLDER/edges, with a stand-in that draws the red channel.
tiles: FOLDER/in into FOLDER/tiles in tiles, see `tests.support.tile_operation`.
names: what has names, in one Ray, see `tests.support.name_operation`.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import numpy as np

from samray.config import Config, load_config
from samray.errors import ImageError
from samray.exports.export import export
from samray.imports.import_ import import_
from samray.output.compact import compact
from samray.pipeline.labeler import ShardLabeler
from samray.pipeline.run import label_with
from tests.support import standin

FAILS_AT_FIRST = (7, 7, 7)
"""First pixel of an image that fails until `retry`."""


class Failing(standin.StandIn):
    """The stand-in, to which some images are too hard."""

    def generate(self, images: list[np.ndarray]) -> list[list[dict[str, object]]]:
        if any(tuple(image[0, 0]) == FAILS_AT_FIRST for image in images):
            raise ImageError("too_hard", "not this time")
        return super().generate(images)


def make_labeler(config: Config, num_threads: int, pace: standin.Pace, fails: bool) -> ShardLabeler:
    kind = Failing if fails else standin.StandIn
    return ShardLabeler(lambda _: kind(pace), max_pixels=config.input.max_pixels, num_threads=num_threads)


def main(name: str, folder: str, pace_text: str, on_ray: str) -> int:
    root, ray, pace = Path(folder), on_ray == "ray", standin.Pace.parse(pace_text)
    if name in ("label", "append", "retry"):
        base = [f"model.checkpoint={standin.__file__}", "output.images_per_shard=2", "output.max_failed_fraction=1.0"]
        config = load_config(None, None, [*base, "cluster.max_actors=1", "cluster.num_cpus_per_actor=1"])
        labeler = functools.partial(make_labeler, pace=pace, fails=name != "retry")
        options = {"append": name == "append", "retry_failed": name == "retry"}
        return label_with(str(root / "in"), str(root / "out"), config, make_labeler=labeler, **options).exit_code
    if name == "edges":
        from tests.support.edge_operation import detect

        return detect(root, pace.of("edges"))
    if name == "tiles":
        from tests.support.tile_operation import label_in_tiles

        return label_in_tiles(root, pace.of("tiles"))
    if name == "names":
        from tests.support.name_operation import label_and_name

        return label_and_name(root, pace)
    if name == "compact":
        compact(str(root / "out"), str(root / "compact"), 4096)
    elif name == "export":
        export(root / "out", root / "export", format="sa1b", ray=ray, progress=False)
    else:
        import_(root / "export", root / "import", format="sa1b", images_per_shard=2, ray=ray, progress=False)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
