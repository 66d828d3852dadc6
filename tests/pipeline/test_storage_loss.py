"""Storage that goes away in the middle of a run: it ends, blames no image, and the same command finishes it."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from samray import storage
from samray.cli.main import main as cli
from samray.config import StorageConfig
from samray.errors import StorageError
from samray.output.shards import done_shards, read_shard
from samray.pipeline.report import LabelReport
from tests.support.fault_proxy import FaultProxy, running_proxy
from tests.support.here import use_no_ray
from tests.support.outputs import check_every_image_once
from tests.support.standin import make_image

NUM_IMAGES = 24


@pytest.fixture
def pictures(tmp_path: Path) -> Iterator[FaultProxy]:
    """A proxy before a web server with img_0.png, img_1.png, ..."""
    (tmp_path / "web").mkdir()
    for i in range(NUM_IMAGES):
        (tmp_path / "web" / f"img_{i}.png").write_bytes(make_image(i))
    handler = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(handler, directory=tmp_path / "web")
    ) as web:
        threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        with running_proxy(f"127.0.0.1:{web.server_port}") as proxy:
            yield proxy
        web.shutdown()
    storage.configure(StorageConfig())
    storage.reset()


@pytest.mark.parametrize("fault", ["AccessDenied", "503", "reset"])
def test_a_run_whose_input_goes_away_ends_and_is_resumed(
    tmp_path: Path,
    pictures: FaultProxy,
    label: Callable[..., LabelReport],
    fault: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = [f"img_{i}.png" for i in range(NUM_IMAGES)]
    manifest, output = tmp_path / "list.txt", str(tmp_path / "out")
    manifest.write_text("".join(f"{pictures.url}/{name}\n" for name in names))
    pictures.spoil(fault, "GET", after=10)
    with pytest.raises(StorageError):
        label(manifest, output, "storage.timeout_s=1", "cluster.num_fetch_tasks=1")
    for shard in done_shards(output):
        assert set(read_shard(output, shard)["status"].to_pylist()) == {"ok"}
    assert not storage.exists(storage.join(output, "_SUCCESS"))
    pictures.heal()
    use_no_ray(monkeypatch)
    assert label(manifest, output).exit_code == 0
    check_every_image_once(output, {name: make_image(i) for i, name in enumerate(names)})


def test_a_storage_that_is_gone_is_exit_code_3(
    tmp_path: Path, pictures: FaultProxy, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures.spoil("503", "GET")
    code = cli(["label", f"{pictures.url}/list.csv", str(tmp_path / "out"), "storage.timeout_s=0.5"])
    assert code == 3
    assert "run the same command again" in capsys.readouterr().err
