"""What the first worker and the driver tell each other while a training is under way: figures, and "stop"."""

from __future__ import annotations

from typing import Any

from samray.errors import SamrayError


class Monitor:
    """A Ray actor between the two. Nothing here is needed for correctness."""

    def __init__(self) -> None:
        self.line: dict[str, Any] | None = None
        self.stopping = False
        self.num_starts = 0
        self.problem: SamrayError | None = None

    def begin(self) -> int:
        """The first worker starts; how many times it has since the last step."""
        self.num_starts += 1
        return self.num_starts

    def give_up(self, problem: SamrayError) -> None:
        """What another try would not help."""
        self.problem = self.problem or problem

    def why_given_up(self) -> SamrayError | None:
        """The first of them."""
        return self.problem

    def beat(self, line: dict[str, Any]) -> bool:
        """How things are; whether to stop."""
        self.line = line
        self.num_starts = 0
        return self.stopping

    def stop(self) -> None:
        """Let the workers save and end."""
        self.stopping = True

    def read(self) -> dict[str, Any] | None:
        """The last line."""
        return self.line
