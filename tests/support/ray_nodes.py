"""A real Ray cluster on this machine: `ray start` processes with ports of their own, jobs submitted to it, nodes lost.

Everything is ended by pid: `ray stop` would end every Ray of the machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from jobs.benchmarks.s3_server import free_ports
from tests.support import REPOSITORY

RAY = [sys.executable, "-c", "import sys; from ray.scripts.scripts import main; sys.argv[0] = 'ray'; sys.exit(main())"]
STARTED = "Ray runtime started"
"""What `ray start` prints when its node has joined."""


@dataclass
class Node:
    """One `ray start --block`, and all it has started."""

    process: subprocess.Popen[bytes]
    log: Path

    def wait_until_started(self, timeout_s: float = 300.0) -> None:
        deadline = time.monotonic() + timeout_s
        while STARTED not in self.log.read_text(errors="replace"):
            assert self.process.poll() is None, self.log.read_text(errors="replace")
            assert time.monotonic() < deadline, self.log.read_text(errors="replace")
            time.sleep(0.2)

    def family(self) -> list[psutil.Process]:
        """The raylet, its agents, and the workers: all but what has ended."""
        try:
            root = psutil.Process(self.process.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def has_worker(self, name: str) -> bool:
        """Whether a worker whose title holds name runs here; Ray titles its workers by what they do."""
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                if name in " ".join(process.cmdline()):
                    return True
        return False

    def kill(self) -> None:
        """kill -9 of all of it, as when a machine is taken away."""
        family = self.family()
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        psutil.wait_procs(family, timeout=10)

    def end(self, patience_s: float = 5.0) -> None:
        """SIGTERM, then as kill."""
        family = self.family()
        if self.process.poll() is None:
            self.process.terminate()
        _, alive = psutil.wait_procs(family, timeout=patience_s)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        psutil.wait_procs(alive, timeout=10)


@dataclass
class Head(Node):
    """The head node, and how to reach the cluster."""

    environment: dict[str, str]
    address: str
    """Address of the GCS, for nodes that join."""
    temp_dir: str
    nodes: list[Node] = field(default_factory=list)

    def ray(self, *arguments: str, cwd: Path = REPOSITORY) -> str:
        """`ray ARGUMENTS` against this cluster; returns what it prints."""
        done = subprocess.run(
            [*RAY, *arguments], cwd=cwd, env=self.environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def add_nodes(self, count: int, num_cpus: int) -> list[Node]:
        """Worker nodes that have joined."""
        # A folder each: else the nodes unpack a job's working directory into the same place, one over the other. And an
        # address each: else a driver may take any of them for its own node.
        added = [self._add_node(f"--num-cpus={num_cpus}") for _ in range(count)]
        for node in added:
            node.wait_until_started()
        return added

    def _add_node(self, *options: str) -> Node:
        name = f"node-{len(self.nodes)}"
        options += (f"--address={self.address}", f"--temp-dir={self.temp_dir}/{name}")
        log = self.log.with_name(f"{name}.log")
        node = Node(_start(log, self.environment, f"--node-ip-address=127.0.0.{len(self.nodes) + 2}", *options), log)
        self.nodes.append(node)
        return node

    def submit(self, *arguments: str) -> str:
        """Submit the main job from the repository's root; returns its id."""
        job = f"job-{secrets.token_hex(4)}"
        runtime = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "120", "OMP_NUM_THREADS": "1"}}
        options = ["--submission-id", job, "--no-wait", "--working-dir", ".", "--runtime-env-json", json.dumps(runtime)]
        self.ray("job", "submit", *options, "--", "python", "jobs/autolabel.py", *arguments)
        return job

    def _ask(self, path: str, method: str = "GET") -> Any:
        """As `ray job status`, `logs` and `stop` do, each of which would take seconds of a core to start."""
        headers = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        url = f"{self.environment['RAY_API_SERVER_ADDRESS']}/api/jobs/{path}"
        request = urllib.request.Request(url, headers=headers, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def stop(self, job: str) -> None:
        """As `ray job stop` does, and at once: the job is small."""
        assert self._ask(f"{job}/stop", "POST")["stopped"]

    def logs(self, job: str) -> str:
        return str(self._ask(f"{job}/logs")["logs"])

    def wait_for(self, condition: Callable[[], bool], job: str, timeout_s: float = 400.0) -> None:
        """Poll until it holds; fails with the job's log where time runs out."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, self.logs(job)
            time.sleep(0.5)

    def end_of(self, job: str, timeout_s: float = 300.0) -> str:
        """SUCCEEDED, STOPPED or FAILED, once it is one of them."""
        deadline = time.monotonic() + timeout_s
        while True:
            status = str(self._ask(job)["status"])
            if status in ("SUCCEEDED", "STOPPED", "FAILED"):
                return status
            assert time.monotonic() < deadline, status
            time.sleep(0.2)


@contextlib.contextmanager
def running_head(folder: Path, num_cpus: int) -> Iterator[Head]:
    """`ray start --head` and the dashboard, logging into folder; it and the nodes that join end with the block."""
    ports = dict(zip(("port", "dashboard-port"), free_ports(2), strict=True))
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{ports['dashboard-port']}",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # tests end their nodes when all is over
        # By default an idle worker ends after a second, and the next one pays for its imports again.
        "RAY_idle_worker_killing_time_threshold_ms": "10000",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    options = ["--head", f"--num-cpus={num_cpus}", "--include-dashboard=true"]
    options += [f"--{name}={port}" for name, port in ports.items()]
    log = folder / "head.log"
    with tempfile.TemporaryDirectory(prefix="head-", dir="/tmp") as temp_dir:  # short: Ray's sockets lie in it
        process = _start(log, environment, *options, f"--temp-dir={temp_dir}")
        head = Head(process, log, environment, f"127.0.0.1:{ports['port']}", temp_dir)
        try:
            head.wait_until_started()
            _wait_for_port(ports["dashboard-port"], head)
            yield head
        finally:
            for node in [*head.nodes, head]:
                node.end()


def _start(log: Path, environment: dict[str, str], *options: str) -> subprocess.Popen[bytes]:
    common = ["--block", "--disable-usage-stats", "--object-store-memory=200000000"]
    agent, metrics = free_ports(2)
    common += [f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}"]
    with log.open("wb") as file:
        return subprocess.Popen(
            [*RAY, "start", *common, *options],
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _wait_for_port(port: int, head: Head, timeout_s: float = 300.0) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert head.process.poll() is None, head.log.read_text(errors="replace")
        assert time.monotonic() < deadline, head.log.read_text(errors="replace")
        time.sleep(0.5)
