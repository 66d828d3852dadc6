"""Masks that are no masks: what a damaged OUTPUT, or one made to do harm, may hold."""

from __future__ import annotations

from typing import Any

from tests.support.handmade import HEIGHT, WIDTH, annotation, blob

FAR = 2**31 - 1
SOUND = annotation(blob(1))


def rle(counts: Any, size: Any = (HEIGHT, WIDTH)) -> dict[str, Any]:
    return {"size": None if size is None else list(size), "counts": counts}


def string_of(*runs: int) -> str:
    """Run lengths as COCO's string, whatever they sum to: pycocotools checks nothing."""
    text = b""
    for index, run in enumerate(runs):
        value = run - (runs[index - 2] if index > 2 else 0)
        while True:
            bits, value = value & 31, value >> 5
            more = value != (-1 if bits & 16 else 0)
            text += bytes([bits + 48 + 32 * more])
            if not more:
                break
    return text.decode()


N = HEIGHT * WIDTH
LIES: dict[str, dict[str, Any]] = {
    "runs that sum to more": rle(string_of(0, N * 1000)),
    "runs that sum to a little more": rle(string_of(1, N)),
    "runs that sum to less": rle(string_of(1, 5)),
    "a negative run": rle(string_of(5, -5, N)),
    "a run of 2^62": rle("o" * 12 + "0"),
    "a string that stops inside a number": rle("oooo"),
    "no string": rle(""),
    "not COCO's characters": rle("\x00~é\U0001f600"),
    "a lie about the size": rle(string_of(0, N), (WIDTH, HEIGHT)),
    "a size of 2^31 - 1": rle(string_of(0, N), (FAR, FAR)),
    "a size of one number": rle(string_of(0, N), (N,)),
    "a size of none": rle(string_of(0, N), ()),
    "a negative size": rle(string_of(0, N), (-HEIGHT, -WIDTH)),
    "null for the string": rle(None),
    "null for the size": rle(string_of(0, N), None),
}
"""What a mask's `segmentation` may be in an OUTPUT of images of HEIGHT x WIDTH."""

SIZES: dict[str, tuple[int, int]] = {
    "2^40 pixels": (2**20, 2**20),
    "2^62 pixels": (FAR, FAR),
    "one endless line": (1, FAR),
    "one endless column": (FAR, 1),
    "nothing": (0, 0),
    "less than nothing": (-HEIGHT, -WIDTH),
}
"""What the height and width of an image may be said to be."""


def covering(hw: tuple[int, int]) -> dict[str, Any]:
    """A mask that covers an image of that size, from a few characters."""
    height, width = hw
    return {**SOUND, "segmentation": rle(string_of(0, height * width), hw), "area": height * width}
