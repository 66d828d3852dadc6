"""Ray Data's helper actors, which a private Ray does without.

Each is a Python process that imports Ray, most of them also Ray Data. What they cost at the start:
`jobs/benchmark.py start`.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from typing import Any

import ray
from ray.data._internal.cluster_autoscaler import DefaultAutoscalingCoordinator
from ray.data._internal.execution.operators import actor_pool_map_operator
from ray.data._internal.stats import _StatsManager

from samray.cluster.one_node import NoTracker


@contextlib.contextmanager
def without_helpers() -> Iterator[None]:
    """In the block, Ray Data starts no coordinator of autoscaling, collector of metrics, or tracker of actors.

    Only for a Ray that no node can join, that has no dashboard, and in which one dataset runs at a time: the
    coordinator shares a cluster among datasets and asks for nodes, the collector feeds the dashboard, the tracker
    knows the nodes of restarted actors.
    """
    known: Any = ray.nodes()  # type: ignore[no-untyped-call]
    nodes = {node["NodeID"]: node["Resources"] for node in known if node["Alive"]}
    # Up to Ray 2.59 a list, without the nodes' ids.
    is_list = tuple(map(int, ray.__version__.split(".")[:2])) < (2, 60)
    reserved: Any = list(nodes.values()) if is_list else nodes

    def ignore(*args: object, **options: object) -> None:
        return None

    replacements: list[tuple[Any, str, Any]] = [
        (DefaultAutoscalingCoordinator, "request_resources", ignore),
        (DefaultAutoscalingCoordinator, "cancel_request", ignore),
        (DefaultAutoscalingCoordinator, "get_reserved_resources", lambda self: reserved),
        (_StatsManager, "update_execution_metrics", staticmethod(ignore)),
        (_StatsManager, "update_iteration_metrics", staticmethod(ignore)),
        (_StatsManager, "register_dataset_to_stats_actor", staticmethod(ignore)),
        # As Ray Data itself does it if the collector does not respond.
        (_StatsManager, "gen_dataset_id_from_stats_actor", staticmethod(lambda: uuid.uuid4().hex)),
        (actor_pool_map_operator, "get_or_create_actor_location_tracker", NoTracker),
    ]
    if hasattr(actor_pool_map_operator, "get_actor_locations"):  # since Ray 2.60
        # Without an answer, Ray Data keeps the node on which the actor was created: the only one.
        replacements.append((actor_pool_map_operator, "get_actor_locations", lambda actor_ids: {}))
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in replacements:
            stack.enter_context(_replaced(owner, name, replacement))
        yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, replacement: Any) -> Iterator[None]:
    """Replace a method of a class, or a name in a module. Raises: KeyError if there is none, as in a later Ray."""
    # From the class's own dictionary: `getattr` would lose that it is a static method.
    before = vars(owner)[name]
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        setattr(owner, name, before)
