"""User prompts instead of the point grid: clicks, a box, or both, for one mask each; or a text, for all it names.

Coordinates are pixels of the upright image; x goes right and y down from the top left corner. Boxes are [x, y, w, h] as
in COCO: corners x0, y0, x1, y1 (as SAM's predictor takes them) become [x0, y0, x1 - x0, y1 - y0].
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from samray.config.base import did_you_mean
from samray.errors import ConfigError
from samray.text import plain

MOST_CHARACTERS: Final = 250
"""The longest phrase. A token has at least one character, so a phrase fits a prompt of 256 tokens."""
_LISTS: Final = ("points", "labels", "box")
_KEYS: Final = (*_LISTS, "text")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """The prompt for one mask, or with text for the masks of all that it names. Raises ConfigError if it is malformed.

    Coordinates may be any finite numbers: a box drawn over the edge may start a little below 0. `problem_in` checks
    them against the size of an image; a prompt outside fails that image only.
    """

    points: tuple[tuple[float, float], ...] = ()
    """x, y of each click."""
    labels: tuple[int, ...] = ()
    """One per click: 1 on the object, 0 on the background."""
    box: tuple[float, float, float, float] | None = None
    """x, y, w, h."""
    text: str | None = None
    """A phrase, in a prompt of its own: `labels.by` says which network finds it, in this image alone."""

    def __post_init__(self) -> None:
        if self.text is not None:
            self._check_text(self.text)
            return
        # A single point instead of a list of them is refused here: its items are numbers.
        if not isinstance(self.points, tuple | list) or any(_is_coordinate(point) for point in self.points):
            raise ConfigError(
                f"points is {str(self.points)[:60]}, not a list of points; write one point as points=((x, y),)"
            )
        if not isinstance(self.labels, tuple | list):
            raise ConfigError(f"labels is {str(self.labels)[:60]}, not a list; write one label as labels=(1,)")
        for point in self.points:
            if len(point) != 2 or not all(map(_is_coordinate, point)):
                raise ConfigError(f"the point {list(point)} is not an [x, y] in pixels")
        if len(self.labels) != len(self.points):
            raise ConfigError(f"points and labels differ in number: {len(self.points)} and {len(self.labels)}")
        for label in self.labels:
            # Not isinstance: True is an int for Python.
            if type(label) is not int or label not in (0, 1):
                raise ConfigError(f"the label {label!r} is neither 1 (on the object) nor 0 (background)")
        box = self.box
        if box is not None and (len(box) != 4 or not all(map(_is_coordinate, box)) or min(box[2:]) <= 0):
            raise ConfigError(f"the box {list(box)} is not an [x, y, w, h] in pixels with width and height above 0")
        if box is None and 1 not in self.labels:
            raise ConfigError("expected a point with label 1, a box or a text, got none of them")

    def _check_text(self, text: Any) -> None:
        if not isinstance(text, str):
            raise ConfigError(f"text is {str(text)[:60]!r}, not text")
        if self.points or self.labels or self.box is not None:
            raise ConfigError(f"the text {text[:60]!r} comes with points or a box; give it in a prompt of its own")
        if problem := phrase_problem(text):
            raise ConfigError(f"the text {problem}")
        object.__setattr__(self, "text", text.strip())  # frozen, but not in use yet

    @classmethod
    def parse(cls, value: Any) -> Prompt:
        """Parse plain JSON values, from `to_json` or from a user; null counts as not given. Raises: ConfigError."""
        if not isinstance(value, Mapping):
            raise ConfigError(f"{str(value)[:60]!r} is not an object with points and labels, box, or text")
        for key in value:
            if key not in _KEYS:
                raise ConfigError(f"unknown key {key!r}{did_you_mean(str(key), _KEYS)}; keys are {', '.join(_KEYS)}")
        points, labels, box = (value.get(key) for key in _LISTS)
        for key, part in zip(_LISTS, (points, labels, box), strict=True):
            if part is not None and not isinstance(part, list | tuple):
                raise ConfigError(f"{key} is {str(part)[:60]!r}, not a list")
        return cls(
            # A point that is not a list stays one value, which the check of its length then names.
            points=tuple(tuple(point) if isinstance(point, list | tuple) else (point,) for point in points or ()),
            labels=tuple(labels or ()),
            box=None if box is None else tuple(box),
            text=value.get("text"),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @property
    def is_ambiguous(self) -> bool:
        """A single click, which may mean a part, a whole object, or a group."""
        return len(self.points) == 1 and self.box is None

    def problem_in(self, width: int, height: int) -> str | None:
        """Describe what is outside an image of this size; None if nothing is. A box may touch the edge."""
        for x, y in self.points:
            if not (0 <= x < width and 0 <= y < height):
                return f"the point [{x:g}, {y:g}] is outside the image of {width}x{height} pixels"
        if self.box is not None:
            x, y, w, h = self.box
            if not (x >= 0 and y >= 0 and x + w <= width and y + h <= height):
                return f"the box [{x:g}, {y:g}, {w:g}, {h:g}] extends beyond the image of {width}x{height} pixels"
        return None


def phrase_problem(phrase: str) -> str | None:
    """The problem of a phrase, as the end of a sentence; None if it has none."""
    # Marks and format characters alone: a tokenizer may make no token of them.
    if not any(unicodedata.category(char)[0] in "LNPS" for char in plain(phrase)):
        return f"is {phrase!r}; it takes a phrase with letters or digits"
    if len(phrase.strip()) > MOST_CHARACTERS:
        return f"has {len(phrase)} characters, expected at most {MOST_CHARACTERS}; name a thing in a few words"
    return None


def _is_coordinate(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False
