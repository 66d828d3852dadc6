"""Ray's agents, which a private Ray does without.

A raylet starts two agents, each a Python process that imports much of Ray: one for the dashboard and for metrics, one
that prepares runtime environments. What they cost at the start: `jobs/benchmark.py start`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any, Final

from ray._private import services, utils
from ray._private.ray_constants import PROCESS_TYPE_RAYLET
from ray._raylet import (  # type: ignore[attr-defined]
    DASHBOARD_AGENT_LISTEN_PORT_NAME,
    METRICS_AGENT_PORT_NAME,
    METRICS_EXPORT_PORT_NAME,
    RUNTIME_ENV_AGENT_PORT_NAME,
    persist_port,
)

AGENTS: Final = {
    "dashboard_agent": (METRICS_AGENT_PORT_NAME, METRICS_EXPORT_PORT_NAME, DASHBOARD_AGENT_LISTEN_PORT_NAME),
    "runtime_env_agent": (RUNTIME_ENV_AGENT_PORT_NAME,),
}
"""Agent -> its ports. The raylet reads them from files, which it waits for."""

_NO_PORT: Final = -1
"""The text that Ray's own agents write for a server that they do not start."""

_STAND_IN: Final = "cat"
"""The raylet ends if an agent does, so a process is needed: this one reads a pipe from the raylet and ends with it."""


@contextlib.contextmanager
def without_agents(names: Collection[str]) -> Iterator[None]:
    """Start no such agent with a Ray that starts in the block. names: of `AGENTS`.

    Only for a Ray without dashboard; without runtime_env_agent no task or actor may have a `runtime_env`.
    """
    start, find_problem = services.start_ray_process, utils.get_dashboard_dependency_error

    def start_process(command: list[str], process_type: str, *args: Any, **options: Any) -> Any:
        if process_type == PROCESS_TYPE_RAYLET:
            for name in names:
                command = _without(command, name)
        return start(command, process_type, *args, **options)

    services.start_ray_process = start_process
    if "dashboard_agent" in names:
        # It imports the dashboard's packages, aiohttp among them, to see whether its agent could use them.
        utils.get_dashboard_dependency_error = lambda: None
    try:
        yield
    finally:
        services.start_ray_process, utils.get_dashboard_dependency_error = start, find_problem


def _without(command: list[str], agent: str) -> list[str]:
    """The raylet's command with a stand-in for the agent, whose port files are written here."""
    values = dict(part.split("=", 1) for part in command if "=" in part)
    for name in AGENTS[agent]:
        persist_port(values["--session_dir"], values["--node_id"], name, _NO_PORT)
    option = f"--{agent}_command"
    return [f"{option}={_STAND_IN}" if part.startswith(f"{option}=") else part for part in command]
