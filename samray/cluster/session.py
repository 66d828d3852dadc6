"""The Ray of this process: one it is connected to, a cluster to join, or a private one.

A private Ray listens only on loopback, requires a token that no other run knows, keeps its files in a folder that no
other user can enter, and leaves neither processes nor files behind. The file is long because start and end mirror each
other.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import logging
import os
import secrets
import shutil
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import psutil
import ray
from filelock import FileLock, Timeout
from ray._private import auto_init_hook, ray_constants, worker
from ray._private.node import Node
from ray._private.utils import get_num_cpus
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]
from ray._raylet import Config as RayConfig  # type: ignore[attr-defined]

import samray
from samray.cluster.address import check_cluster
from samray.cluster.agents import AGENTS, without_agents
from samray.cluster.cpus import allowed_cpus
from samray.cluster.gpus import num_gpus
from samray.cluster.helpers import without_helpers
from samray.config import ClusterConfig
from samray.errors import ConfigError, SamrayError

QUIET: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}

MAX_PARENT_CHARS: Final = 24
"""Ray has sockets in its folder, and a socket's path is limited to 107 bytes: with a longer TMPDIR, /tmp is used."""

_PREFIX: Final = "samray-"
_LOCK: Final = "lock"
_MARK: Final = "SAMRAY_RAY_FOLDER"
"""Environment variable of all processes of a private Ray."""

_IDLE_MS: Final = "10000"
"""Milliseconds after which a private Ray ends a worker without work: longer than a pause between two shards."""

_LEAVE_S: Final = 5.0
"""Seconds that Ray's processes may take to end by themselves after their driver."""

_DIE_S: Final = 30.0
"""Seconds that killed processes may take to be gone: a busy machine takes a while to free their memory."""


@contextlib.contextmanager
def running_ray(config: ClusterConfig, *, one_dataset: bool = True, runtime_envs: bool = False) -> Iterator[bool]:
    """Provide Ray. Yields whether the number of nodes is fixed, as for a Ray on only this machine.

    Uses, in this order: the Ray that this process is already connected to; config.address; RAY_ADDRESS, which is set
    for submitted jobs; else a private Ray, which ends with the block. Workers of an existing cluster keep their
    environment: credentials are never sent. one_dataset: nothing else uses Ray in the block, which lets a private Ray
    start faster. runtime_envs: something in it has a `runtime_env`, as Ray Train's workers do. Raises: ConfigError if
    there is no cluster at the address.
    """
    if ray.is_initialized():
        # Ray keeps the actors of a run that failed, with their CPUs and GPUs, while its error's traceback is in memory:
        # in a cycle, which Python may find only after minutes.
        gc.collect()
        yield is_fixed()
        return
    address = cluster_address(config)
    if address is None:
        if not one_dataset:
            with local_ray():
                yield True
            return
        unused = set(AGENTS) - ({"runtime_env_agent"} if runtime_envs else set())
        with without_agents(unused), local_ray(), without_helpers():
            yield True
        return
    # First, because `ray.init` itself would try for minutes.
    check_cluster(address)
    try:
        ray.init(address, runtime_env=_code_to_ship(), **QUIET)
    except Exception as error:
        raise ConfigError(f"the Ray cluster at {address} cannot be joined: {error}") from error
    try:
        with _others_leave_first():
            yield False
    finally:
        ray.shutdown()


def cluster_address(config: ClusterConfig) -> str | None:
    """The cluster to join; None for a private Ray."""
    address = config.address or os.environ.get("RAY_ADDRESS")
    return None if address in (None, "", "local") else address


def is_fixed() -> bool:
    """Whether this process started its Ray, for only this machine."""
    node = worker._global_node
    return node is not None and bool(node.ray_init_cluster)


def this_machine() -> dict[str, float]:
    """The resources of a private Ray: the CPUs and GPUs that this process may use."""
    return {"CPU": float(num_cpus()), "GPU": float(num_gpus())}


def num_cpus() -> int:
    """CPUs that this process may use. Ray knows about containers, but not about taskset and batch systems."""
    return max(1, min(allowed_cpus(), int(get_num_cpus())))


def ensure_ray(config: ClusterConfig) -> bool:
    """Like `running_ray`, until the process ends."""
    stack = contextlib.ExitStack()
    # No `with`: a lazy dataset needs Ray after the caller has returned.
    is_ours = not ray.is_initialized()
    fixed = stack.enter_context(running_ray(config, one_dataset=False))
    if is_ours:
        atexit.register(stack.close)
    return fixed


@contextlib.contextmanager
def local_ray(**options: Any) -> Iterator[None]:
    """A quiet Ray on this machine, whose workers can import what this process can. options: of `ray.init`."""
    options.setdefault("num_cpus", num_cpus())
    with _private_folder() as folder, _private_token(folder):
        try:
            _start(folder, **options)
            with _others_leave_first():
                yield
        finally:
            _end_ray(folder)


@contextlib.contextmanager
def _others_leave_first() -> Iterator[None]:
    """At the end of the block, let the threads that were started in it leave Ray, before this one shuts it down.

    Otherwise Ray may end the whole process with exit code 1, without a word: it does so if it is shut down while a
    thread is inside of it, as the one that runs a pipeline is after Ctrl-C.
    """
    before = set(threading.enumerate())
    # A thread that uses Ray after it is gone would start another one.
    connects, auto_init_hook.enable_auto_connect = auto_init_hook.enable_auto_connect, False
    try:
        yield
    finally:
        others = _threads_in_ray() - before
        if others and ray.is_initialized():
            # Their next call raises an error then, which ends what Ray Data and Ray Train run in threads.
            worker.global_worker.set_is_connected(False)
            deadline = time.monotonic() + _LEAVE_S
            # Until they have ended, because one that is not in Ray now may be between two calls.
            while any(thread.is_alive() for thread in others) and time.monotonic() < deadline:
                time.sleep(0.02)
                others |= _threads_in_ray() - before
            worker.global_worker.set_is_connected(True)
        if not any(thread.is_alive() for thread in others):
            auto_init_hook.enable_auto_connect = connects


def _threads_in_ray() -> set[threading.Thread]:
    """The other threads whose stack has a function of Ray."""
    threads = {thread.ident: thread for thread in threading.enumerate() if thread is not threading.current_thread()}
    threads_in_ray = set()
    for ident, stack in sys._current_frames().items():
        modules = (str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_stack(stack))
        if ident in threads and any(name.partition(".")[0] == "ray" for name in modules):
            threads_in_ray.add(threads[ident])
    return threads_in_ray


def _start(folder: Path, **options: Any) -> None:
    """Start Ray, twice if necessary: it gives its servers 30 s to start, which may be too short on a busy machine.

    Raises: SamrayError, ValueError for options.
    """
    # Ray passes on the script's folder and the current folder, but not the rest of sys.path (for example a checkout).
    import_path = os.pathsep.join(str(Path(entry or ".").absolute()) for entry in sys.path)
    # Otherwise Ray's C++ code warns on stderr that every Ray Data actor has an argument in the object store.
    level = os.environ.get("RAY_BACKEND_LOG_LEVEL", "fatal")
    variables = {"PYTHONPATH": import_path, "RAY_BACKEND_LOG_LEVEL": level, _MARK: str(folder)}
    # By default Ray ends a worker after an idle second, and pays for the next one's imports again.
    variables["RAY_idle_worker_killing_time_threshold_ms"] = _IDLE_MS
    for is_last in (False, True):
        try:
            with (
                _environment(**variables),
                _on_loopback(),
                _without_monitors(),
                _no_log_level_notice(),
            ):
                ray.init("local", include_dashboard=False, _temp_dir=str(folder / "ray"), **QUIET, **options)
            return
        except ValueError:  # an option that Ray refuses: a second try would not help
            raise
        except Exception as error:
            if is_last:
                raise SamrayError(
                    f"Ray did not start on this machine ({error}): its processors may be overloaded, or its memory or"
                    " disk full; run the same command to try again"
                ) from error
            # Whatever the first try has started must not be found by the second.
            _end_ray(folder)


@contextlib.contextmanager
def _private_folder() -> Iterator[Path]:
    """A folder of this run, closed to other users; deleted at the end, or by a later run if this one dies.

    Ray keeps opening the folders that it makes to all users; the enclosing folder keeps them out.
    """
    parent = Path(tempfile.gettempdir())
    if len(str(parent)) > MAX_PARENT_CHARS:
        parent = Path("/tmp")
    _remove_folders_of_dead_runs(parent)
    # Lock it before giving it the name that later runs look for.
    new = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}", dir=parent))
    lock = FileLock(new / _LOCK, mode=0o600)
    lock.acquire()
    folder = new.rename(parent / new.name.removeprefix("."))
    try:
        yield folder
    finally:
        lock.release()
        _remove(folder)


def _remove_folders_of_dead_runs(parent: Path) -> None:
    """Also end the remaining processes of their Rays. The kernel releases the lock of a process however it dies."""
    for folder in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError, Timeout):
            # In a folder of all users, others may have made one of this name, or a link.
            if folder.is_symlink() or folder.stat().st_uid != os.getuid() or not (folder / _LOCK).is_file():
                continue
            # Without waiting: a lock that is held belongs to a run that is alive.
            with FileLock(folder / _LOCK, timeout=0):
                _kill(_processes_of(folder))
                shutil.rmtree(folder, ignore_errors=True)


def _remove(folder: Path) -> None:
    """Retry, because a process that is ending may still write a last line to its log."""
    deadline = time.monotonic() + _LEAVE_S
    while folder.exists() and time.monotonic() < deadline:
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.05 * folder.exists())


@contextlib.contextmanager
def _private_token(folder: Path) -> Iterator[None]:
    """Require a token that only this Ray's own processes know; leaves ~/.ray/auth_token unchanged."""
    token = folder / "auth_token"
    # Created with its final mode, so that no other user can open it first.
    with open(os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    with _environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token), RAY_AUTH_TOKEN=None):
        _forget_token()
        yield
    _forget_token()


def _forget_token() -> None:
    """Make Ray read mode and token from the environment again; in this order, or a Ray thread may abort the process."""
    RayConfig.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """Make all servers of a Ray started in the block listen only on loopback, as Ray does by default on a Mac."""
    # The constant is for this process, the variable for those that Ray starts; Gloo and NCCL choose by themselves.
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    sockets = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    try:
        with _environment(**{ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0", **sockets}):
            yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextlib.contextmanager
def _without_monitors() -> Iterator[None]:
    """Start no log monitor, since no worker's lines are shown, no autoscaler, since no node can join, and no dashboard.

    `ray.init` has no options for the first two, and without its dashboard it still starts that one's server. Each is a
    Python process, and Ray waits for them one after the other.
    """
    unused = ("start_log_monitor", "start_monitor", "start_api_server")
    before = {name: getattr(Node, name) for name in unused}
    try:
        for name in unused:
            # Ray calls these methods while it starts its head, and needs nothing from them.
            setattr(Node, name, lambda node, **options: None)
        yield
    finally:
        for name, method in before.items():
            setattr(Node, name, method)


def _end_ray(folder: Path) -> None:
    """Shut Ray down, and make sure that its processes end: one may hang on exit and hold a GPU's memory."""
    family = set(_processes_of(folder))  # before: once a process is dying, the kernel shows no environment of it
    try:
        ray.shutdown()
    finally:
        # Time to end by themselves first; what is left then is killed.
        alive = _wait_for(family.union(_processes_of(folder)), _LEAVE_S)
        deadline = time.monotonic() + _DIE_S
        # Look again each time, because the raylet may have started a worker in the meantime.
        while (alive := [*alive, *_processes_of(folder)]) and time.monotonic() < deadline:
            alive = _kill(alive)


def _kill(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Kill and wait for them; returns those that are still there."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()
    return _wait_for(processes, _LEAVE_S)


def _wait_for(processes: Iterable[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Wait until they have ended, reaped or not (unlike psutil); returns those that have not."""
    deadline = time.monotonic() + timeout_s
    while (left := [process for process in processes if _is_alive(process)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def _is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        # A zombie has ended: it holds no memory, and its parent may take any time to reap it.
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def _processes_of(folder: Path) -> list[psutil.Process]:
    """The servers and workers of the Ray with this folder, including those whose parent has died."""
    processes = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            # Environments are inherited, also by processes whose parent is gone, which a tree of processes would miss.
            if process.environ().get(_MARK) == str(folder):
                processes.append(process)
    return processes


@contextlib.contextmanager
def _no_log_level_notice() -> Iterator[None]:
    """Drop the stderr line of Ray's C++ code about RAY_BACKEND_LOG_LEVEL; keep all others."""
    with tempfile.TemporaryFile() as caught:
        # The line comes from C++, so the file descriptor is redirected, not sys.stderr.
        stderr = os.dup(2)
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            caught.seek(0)
            os.write(2, b"".join(line for line in caught if b"RAY_BACKEND_LOG_LEVEL" not in line))


@contextlib.contextmanager
def _environment(**values: str | None) -> Iterator[None]:
    """Set environment variables for the processes started in the block; None: unset."""
    before = {name: os.environ.get(name) for name in values}
    _set(values)
    try:
        yield
    finally:
        _set(before)


def _set(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _code_to_ship() -> dict[str, Any] | None:
    """A source checkout must be sent to the nodes; an installed package is expected there, and a job ships its own."""
    package = Path(samray.__file__).parent
    # Set by Ray in the driver of a submitted job, whose working_dir is on every node already.
    in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    if in_job or package.parent.name in ("site-packages", "dist-packages"):
        return None
    return {"py_modules": [str(package)]}
