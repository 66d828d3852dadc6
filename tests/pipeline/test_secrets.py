"""Signed URLs and passwords in URIs are used to read images, and are written nowhere."""

from __future__ import annotations

import base64
import http.server
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

import samray
from samray import storage
from samray.cli.main import main
from samray.errors import ConfigError
from samray.pipeline.report import LabelReport, print_report
from tests.support import standin

OLD, NEW, PASSWORD = "0LDsIgNaTuRe", "NEWsIgNaTuRe", "pAsSwOrD"
SECRETS = (OLD, NEW, PASSWORD, base64.b64encode(f"me:{PASSWORD}".encode()).decode())

Label = Callable[..., LabelReport]


class _Site(http.server.BaseHTTPRequestHandler):
    """Serves PNGs to requests with the signature, or with user name and password."""

    signature = OLD

    def do_GET(self) -> None:
        asked = urlsplit(self.path)
        signed = parse_qs(asked.query).get("X-Goog-Signature") == [type(self).signature]
        basic = self.headers.get("Authorization", "").removeprefix("Basic ")
        if not signed and basic != base64.b64encode(f"me:{PASSWORD}".encode()).decode():
            self._answer(403, f"<Error>SignatureDoesNotMatch {self.path}</Error>".encode())
        elif not asked.path.removesuffix(".png").strip("/").isdigit():
            self._answer(404, self.path.encode())
        else:
            self._answer(200, standin.make_image(int(asked.path.strip("/").partition(".")[0])))

    do_HEAD = do_GET

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Site) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def write_list(path: Path, site: str, signature: str, names: list[str]) -> str:
    """A list of signed URLs, and one with a user name and password."""
    uris = [f"http://{site}/{name}?v=3&X-Goog-Signature={signature}&X-Goog-Date={signature[:3]}" for name in names]
    path.write_text("\n".join([*uris, f"http://me:{PASSWORD}@{site}/77.png"]) + "\n")
    return str(path)


def everything_in(folder: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of all files; Parquet is compressed, so its values and metadata are read."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield str(path), path.read_bytes().decode("latin-1")
            if path.suffix == ".parquet":
                table = pq.read_table(path)
                yield str(path), f"{table.schema.metadata} {table.to_pylist()}"


def assert_no_secret(folder: Path, *texts: str) -> None:
    for name, text in [*everything_in(folder), *(("what was said", text) for text in texts)]:
        for secret in SECRETS:
            assert secret not in name
            assert secret not in text, f"{name} holds {secret}"


def statuses(output: Path) -> list[str]:
    return [row["status"] for row in pq.read_table(output / "annotations").to_pylist()]


NAMES = [f"{i}.png" for i in range(8)]


def test_nothing_that_a_run_writes_or_says_holds_a_credential(
    label: Label, site: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "samray")
    _Site.signature = OLD
    (tmp_path / "in").mkdir()
    listed = write_list(tmp_path / "in" / "list.txt", site, OLD, [*NAMES, "gone.png"])
    made = tmp_path / "made"
    output = made / "out"
    report = label(listed, output)
    print_report(report)
    assert statuses(output) == ["ok"] * 8 + ["failed", "ok"]
    rows = pq.read_table(output / "annotations").to_pylist()
    assert rows[0]["uri"] == f"http://{site}/0.png?v=3&X-Goog-Signature=***&X-Goog-Date=***"
    assert rows[9]["uri"] == f"http://***@{site}/77.png"
    assert rows[8]["error"].startswith("missing: ")

    for argv in (
        ["label", listed, str(output), "--dry-run"],
        ["verify", str(output), "--deep"],
        ["status", str(output)],
        ["status", str(output), "--json"],
        ["report", str(output), "--out", str(made / "report.html")],
        ["compact", str(output), str(made / "compacted")],
        *(["export", str(output), str(made / f), "--format", f] for f in ("sa1b", "coco", "yolo", "flat", "label-map")),
        ["export", str(output), str(made / "photos"), "--format", "yolo", "--with-images"],
        ["label", f"http://me:{PASSWORD}@{site}/absent/", str(made / "none")],
        ["label", f"s3://AKIA:a/{PASSWORD}@bucket/x", str(made / "none"), f"model.checkpoint=s3://K:{PASSWORD}@b/w.pt"],
        ["label", listed, str(output), f"masks.x=https://u:{PASSWORD}@h/"],
        ["label", listed, str(output), "--config", f"https://u:{PASSWORD}@h/c.yaml"],
        ["verify", f"http://me:{PASSWORD}@{site}/out"],
    ):
        main(argv)
    said = capfd.readouterr()
    assert_no_secret(made, said.out, said.err, caplog.text)
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())  # type: ignore[attr-defined]
    for name, text in everything_in(logs):
        assert not any(secret in text for secret in SECRETS), name


def test_a_resume_reads_the_credentials_from_input_again(label_here: Label, site: str, tmp_path: Path) -> None:
    """With signatures that have been renewed since, and after a failed row was tried again."""
    _Site.signature = OLD
    (tmp_path / "in").mkdir()
    listed = write_list(tmp_path / "in" / "list.txt", site, OLD, NAMES)
    output = tmp_path / "out"
    label_here(listed, output)
    (output / "annotations" / "shard-000001.parquet").unlink()
    _Site.signature = NEW
    write_list(tmp_path / "in" / "list.txt", site, NEW, NAMES)
    assert label_here(listed, output).num_labelled == 4
    assert statuses(output) == ["ok"] * 9
    assert label_here(listed, output, append=True).num_images == 9  # the same images, signed otherwise
    write_list(tmp_path / "in" / "list.txt", site, NEW, [*NAMES, "8.png"])
    assert label_here(listed, output, append=True).num_labelled == 1
    assert_no_secret(output)


def test_a_resume_without_the_credentials_says_what_it_needs(label_here: Label, site: str, tmp_path: Path) -> None:
    _Site.signature = OLD
    listed = write_list(tmp_path / "list.txt", site, OLD, NAMES)
    output = tmp_path / "out"
    label_here(listed, output)
    (output / "annotations" / "shard-000000.parquet").unlink()
    Path(listed).write_text(f"http://{site}/other.png\n")
    with pytest.raises(
        ConfigError, match=r"stores no credentials.* has none of the images that are left .*0\.png\?v=3"
    ):
        label_here(listed, output)
    Path(listed).unlink()
    with pytest.raises(ConfigError, match=r"does not exist.*stores no credentials"):
        label_here(listed, output)
    write_list(Path(listed), site, OLD, NAMES[2:])
    label_here(listed, output)
    assert statuses(output)[:4] == ["failed", "failed", "ok", "ok"]
    rows = pq.read_table(output / "annotations").to_pylist()
    assert "which no OUTPUT keeps" in rows[0]["error"]
    write_list(Path(listed), site, OLD, NAMES)
    label_here(listed, output, retry_failed=True)
    assert statuses(output) == ["ok"] * 9
    with pytest.raises(samray.StorageError, match="which no OUTPUT keeps"):
        samray.MaskDataset(str(output))[0]


def test_urls_that_differ_in_nothing_but_what_is_hidden_stay_apart(
    label_here: Label, site: str, tmp_path: Path
) -> None:
    _Site.signature = OLD
    uris = [f"http://{site}/{i}.png?zzz={word}&X-Goog-Signature={OLD}" for i, word in ((1, "abcdef"), (1, "ghijkl"))]
    (tmp_path / "list.txt").write_text("\n".join(uris))
    output = tmp_path / "out"
    label_here(tmp_path / "list.txt", output)
    (output / "annotations" / "shard-000000.parquet").unlink()
    label_here(tmp_path / "list.txt", output)
    assert statuses(output) == ["ok", "ok"]
    stored_uris = pq.read_table(output / "_samray" / "manifest.parquet")["uri"].to_pylist()
    assert len(set(stored_uris)) == 2
    assert all(storage.redact(uri) == uri and "#image=" in uri for uri in stored_uris)


def test_an_output_of_an_older_version_keeps_its_urls_and_resumes(
    label_here: Label, site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _Site.signature = OLD
    listed = write_list(tmp_path / "list.txt", site, OLD, NAMES)
    output = tmp_path / "out"
    with monkeypatch.context() as older:
        older.setattr("samray.output.plan.hide", lambda images: (images, {}))
        label_here(listed, output)
    (output / "annotations" / "shard-000000.parquet").unlink()
    assert label_here(listed, output).num_labelled == 4
    assert label_here(listed, output, append=True).num_images == 9
    assert main(["verify", str(output), "--deep"]) == 0


def test_prompts_find_signed_urls(label_here: Label, site: str, tmp_path: Path) -> None:
    _Site.signature = OLD
    listed = write_list(tmp_path / "list.txt", site, OLD, NAMES[:2])
    uri = Path(listed).read_text().split()[0]
    (tmp_path / "clicks.jsonl").write_text('{"uri": "%s", "prompts": [{"box": [0, 0, 5, 5]}]}\n' % uri)  # noqa: UP031
    report = label_here(listed, tmp_path / "out", f"input.prompts={tmp_path / 'clicks.jsonl'}")
    assert report.num_images_not_found == 0


def test_a_signed_tar_and_a_signed_parquet_file(label: Label, tmp_path: Path) -> None:
    """Their members' URIs hold the container's."""
    from samray.inputs.rows import input_rows
    from samray.output.credentials import hide, reveal

    tar = f"https://me:{PASSWORD}@h/x.tar"
    rows = input_rows(
        pa.array([f"tar://a.jpg::{tar}", f"tar://b@2x.jpg::{tar}"]), pa.array(["a.jpg", "b.jpg"]), container=tar
    )
    hidden, credentials = hide(rows)
    assert hidden["uri"].to_pylist() == ["tar://a.jpg::https://***@h/x.tar", "tar://b@2x.jpg::https://***@h/x.tar"]
    assert credentials == {"https://***@h/x.tar": tar}
    assert reveal(hidden, credentials)["container"].to_pylist() == [tar, tar]
