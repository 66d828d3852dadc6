"""Images that could not be used: counts by reason, with an example of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from samray.errors import ImageError
from samray.sam.memory import is_out_of_memory


class Failures:
    """Counts failed images."""

    def __init__(self) -> None:
        self.reasons: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        """Reason -> the error message of the first such image."""

    def __len__(self) -> int:
        return self.reasons.total()

    def add(self, error: ImageError) -> None:
        self.reasons[error.reason] += 1
        self.examples.setdefault(error.reason, error.message)

    @contextmanager
    def out_of_memory(self) -> Iterator[None]:
        """Count an image that does not fit into memory as failed; re-raise every other error."""
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self.add(ImageError("out_of_memory", " ".join(str(error).split()) or "it does not fit into memory"))

    def figures(self) -> dict[str, Any]:
        """num_failed, and failures: reason -> number."""
        return {"num_failed": len(self), "failures": dict(self.reasons)}
