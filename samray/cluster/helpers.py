"""Ray Data's helper actors, which a private Ray does without.

Each is a Python process that imports Ray Data. What they cost at the start: `jobs/benchmark.py start`.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from typing import Any

import ray
from ray.data._internal.cluster_autoscaler import DefaultAutoscalingCoordinator
from ray.data._internal.stats import _StatsManager


@contextlib.contextmanager
def without_helpers() -> Iterator[None]:
    """In the block, Ray Data starts neither its coordinator of autoscaling nor its collector of metrics.

    Only for a Ray that no node can join, that has no dashboard, and in which one dataset runs at a time: the
    coordinator shares a cluster among datasets and asks for nodes, the collector feeds the dashboard.
    """
    known: Any = ray.nodes()  # type: ignore[no-untyped-call]
    nodes = {node["NodeID"]: node["Resources"] for node in known if node["Alive"]}
    # Up to Ray 2.59 a list, without the nodes' ids.
    is_list = tuple(map(int, ray.__version__.split(".")[:2])) < (2, 60)
    reserved: Any = list(nodes.values()) if is_list else nodes

    def nothing(*args: object, **options: object) -> None:
        return None

    replacements: list[tuple[type, str, Any]] = [
        (DefaultAutoscalingCoordinator, "request_resources", nothing),
        (DefaultAutoscalingCoordinator, "cancel_request", nothing),
        (DefaultAutoscalingCoordinator, "get_reserved_resources", lambda self: reserved),
        (_StatsManager, "update_execution_metrics", staticmethod(nothing)),
        (_StatsManager, "update_iteration_metrics", staticmethod(nothing)),
        (_StatsManager, "register_dataset_to_stats_actor", staticmethod(nothing)),
        # As Ray Data itself does it if the collector does not respond.
        (_StatsManager, "gen_dataset_id_from_stats_actor", staticmethod(lambda: uuid.uuid4().hex)),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in replacements:
            stack.enter_context(_replaced(owner, name, replacement))
        yield


@contextlib.contextmanager
def _replaced(owner: type, name: str, replacement: Any) -> Iterator[None]:
    """Replace a method of a class. Raises: KeyError if there is none, as in a later Ray."""
    # From the class's own dictionary: `getattr` would lose that it is a static method.
    before = vars(owner)[name]
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        setattr(owner, name, before)
