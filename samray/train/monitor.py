"""What the first worker and the driver tell each other while a training is under way: figures, and "stop"."""

from __future__ import annotations

from typing import Any


class Monitor:
    """A Ray actor between the two. Nothing here is needed for correctness."""

    def __init__(self) -> None:
        self.line: dict[str, Any] | None = None
        self.stopping = False

    def beat(self, line: dict[str, Any]) -> bool:
        """How things are; whether to stop."""
        self.line = line
        return self.stopping

    def stop(self) -> None:
        """Let the workers save and end."""
        self.stopping = True

    def read(self) -> dict[str, Any] | None:
        """The last line."""
        return self.line
