"""Messages between the first worker and the driver during a training: metrics, and "stop"."""

from __future__ import annotations

from typing import Any

from samray.errors import SamrayError


class Monitor:
    """A Ray actor between the two. Correctness does not depend on it."""

    def __init__(self) -> None:
        self.line: dict[str, Any] | None = None
        self.stopping = False
        self.num_starts = 0
        self.problem: SamrayError | None = None
        self.failure: SamrayError | None = None

    def begin(self) -> tuple[int, SamrayError | None]:
        """The first worker starts; returns its number of starts since the last step, and the error with which a worker
        of the start before this one ended; None if it died without a word."""
        self.num_starts += 1
        failure, self.failure = self.failure, None
        return self.num_starts, failure

    def fail(self, failure: SamrayError) -> None:
        """Report an error after which the workers are started again."""
        self.failure = self.failure or failure

    def give_up(self, problem: SamrayError) -> None:
        """Report an error that a retry would not fix."""
        self.problem = self.problem or problem

    def why_given_up(self) -> SamrayError | None:
        """The first such error."""
        return self.problem

    def beat(self, line: dict[str, Any]) -> bool:
        """Report the current state; returns whether to stop."""
        self.line = line
        # Deaths before a finished step no longer count.
        self.num_starts, self.failure = 0, None
        return self.stopping

    def stop(self) -> None:
        """Ask the workers to save and end."""
        self.stopping = True

    def read(self) -> dict[str, Any] | None:
        """The last reported line."""
        return self.line
