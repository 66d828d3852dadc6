"""The part of `samray.cluster.helpers` that workers need; imports nothing, because every actor imports it."""

from __future__ import annotations


class NoTracker:
    """In place of the handle of Ray Data's tracker of actors: there is only one node to ask for."""

    @property
    def update_actor_location(self) -> NoTracker:
        """The method that an actor calls."""
        return self

    def remote(self, *args: object) -> None:
        """Send nothing."""
