"""`samray.label_dataset` on Rays of 1, 2, 3 and 4 CPUs, and what each Ray looked like from outside; JSON on stdout.

python -m tests.support.on_small_rays.py FOLDER_OF_IMAGES CPUS...
"""

from __future__ import annotations

import json
import os
import stat
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import ray.data

from samray.cluster.session import local_ray
from samray.config import load_config
from samray.pipeline.dataset_stage import label_dataset
from tests.support import standin


def label(folder: str) -> dict[str, list[str]]:
    """Statuses by reader."""
    config = load_config(None, None, ["model.device=cpu"])
    readers = {"read_images": ray.data.read_images, "read_binary_files": ray.data.read_binary_files}
    return {
        name: [
            row["status"] for row in label_dataset(read(folder), config, make_labeler=standin.make_labeler).take_all()
        ]
        for name, read in readers.items()
    }


def seen_from_outside(folder: Path) -> dict[str, Any]:
    """Where Ray listens, the modes of its folders and of its token, and its processes."""
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    listening = [
        [process.name(), connection.laddr.ip, connection.laddr.port]
        for process in family
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN or not connection.raddr
    ]
    modes = {str(path): stat.S_IMODE(path.stat().st_mode) for path in [folder, *folder.rglob("*")] if path.is_dir()}
    token = folder / "auth_token"
    return {
        "listening": listening,
        "folders": modes,
        "token": [stat.S_IMODE(token.stat().st_mode), len(token.read_text())],
        "pids": [process.pid for process in family[1:]],
    }


def is_running(pid: int) -> bool:
    """Not so of a zombie: in a container whose first process reaps nothing, it is there for ever."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def main(images: str, *cpus: str) -> None:
    parent = Path(tempfile.gettempdir())
    answers: dict[str, Any] = {}
    for number in cpus:
        with local_ray(num_cpus=int(number), object_store_memory=100 * 2**20):
            folder = Path(os.environ["RAY_AUTH_TOKEN_PATH"]).parent
            answers[number] = {"labelled": label(images), **seen_from_outside(folder)}
        left = [pid for pid in answers[number]["pids"] if is_running(pid)]
        answers[number] |= {"processes_left": left, "files_left": os.listdir(parent)}
        answers[number]["environment_left"] = sorted(name for name in os.environ if name.startswith("RAY_AUTH"))
    print(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
