"""Photographs with a clear licence that scikit-image brings: files on this machine, nothing is downloaded.

Authors and licences are those that scikit-image states in `skimage/data/_fetchers.py`. Its other photographs are left
out, because it states none, or only that no restrictions are known.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Final


@dataclass(frozen=True, slots=True)
class Photograph:
    """A photograph in scikit-image's folder of data."""

    file: str
    subject: str
    author: str
    licence: str
    source: str = ""
    """Address of the original, if it is known."""

    @property
    def credit(self) -> str:
        """`chelsea.png: a cat, by Stefan van der Walt, CC0`."""
        source = f" ({self.source})" if self.source else ""
        return f"{self.file}: {self.subject}, by {self.author}, {self.licence}{source}"


PHOTOGRAPHS: Final = (
    Photograph("astronaut.png", "Eileen Collins", "NASA", "public domain", "https://flic.kr/p/r9qvLn"),
    Photograph("camera.png", "a man with a camera", "Lav Varshney", "CC0"),
    Photograph("chelsea.png", "a cat", "Stefan van der Walt", "CC0"),
    Photograph("coffee.png", "a cup of coffee", "Rachel Michetti, courtesy of Pikolo Espresso Bar", "CC0"),
    Photograph(
        "rocket.jpg", "Falcon 9", "SpaceX", "public domain", "https://www.flickr.com/photos/spacexphotos/16511594820"
    ),
)
"""In the order of their names, which is the order in which a folder is labelled."""


def photograph_files() -> list[tuple[Photograph, Path]]:
    """The photographs that are on this machine, with their files; none if scikit-image is without its data."""
    # Found without an import, which would take a second.
    spec = importlib.util.find_spec("skimage")
    folders = [Path(location) / "data" for location in (spec.submodule_search_locations or ()) if spec] if spec else []
    return [
        (photograph, folder / photograph.file)
        for photograph in PHOTOGRAPHS
        for folder in folders
        if (folder / photograph.file).is_file()
    ]
