"""Loading weights: every format, every way a file can be wrong, and the cache of downloads.

The file is long because its cases share their helpers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from samray.errors import ConfigError, StorageError
from samray.sam import fetch, weights_file
from samray.sam.checkpoints import check_checkpoint, checkpoint_sha256, list_models, load_model, resolve_checkpoint
from samray.sam.formats import read_state_dict
from samray.sam.sam import Sam
from samray.sam.spec import MODELS, ModelSpec, TinyVitSpec, VitSpec
from samray.storage import retrying

VIT = ModelSpec(
    name="small_vit",
    image_size=64,
    encoder=VitSpec(dim=32, depth=2, num_heads=2, global_blocks=(1,), window=3),
    embed_dim=32,
    decoder_heads=2,
    decoder_mlp_dim=32,
    iou_hidden_dim=32,
)
DEEPER = dataclasses.replace(VIT, name="deeper_vit", encoder=dataclasses.replace(VIT.encoder, depth=4))
TINY = dataclasses.replace(
    VIT,
    name="small_tiny",
    encoder=TinyVitSpec(dims=(16, 32), depths=(1, 1), num_heads=(1, 2), windows=(4, 4), strides=(2,)),
)


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own, three small rows in the table, and no waiting between retries."""
    monkeypatch.setenv("SAMRAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(retrying, "FIRST_BACKOFF_S", 0.0)
    for spec in (VIT, DEEPER, TINY):
        monkeypatch.setitem(MODELS, spec.name, spec)


def random_state(spec: ModelSpec, seed: int = 0) -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Sam(spec).state_dict()


def masks_of(model: Sam) -> Tensor:
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    points, labels = torch.tensor([[[20.0, 30.0]]]), torch.ones(1, 1, dtype=torch.int64)
    return model.predict(model.encode_images(pixels), points, labels)[0]


def expected_masks(spec: ModelSpec, state: dict[str, Tensor]) -> Tensor:
    model = Sam(spec).eval()
    model.load_state_dict(state, strict=True)
    with torch.no_grad():
        return masks_of(model)


# --- formats -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_meta_names_in_any_container(form: str, tmp_path: Path) -> None:
    """By content, not by extension: all three are called .weights."""
    state, path = random_state(VIT), tmp_path / "sam.weights"
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    model = load_model("small_vit", path)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.dtype == torch.float32
    assert torch.equal(masks_of(model), expected_masks(VIT, state))


def test_mobile_sam_s_extras_are_left_out(tmp_path: Path) -> None:
    state = random_state(TINY)
    extras = {
        "image_encoder.norm_head.weight": torch.ones(32),
        "image_encoder.norm_head.bias": torch.zeros(32),
        "image_encoder.head.weight": torch.ones(1000, 32),
        "image_encoder.head.bias": torch.zeros(1000),
        "image_encoder.layers.1.blocks.0.attn.attention_bias_idxs": torch.zeros(16, 16, dtype=torch.int64),
    }
    torch.save(state | extras, tmp_path / "mobile_sam.pt")
    assert torch.equal(masks_of(load_model("small_tiny", tmp_path / "mobile_sam.pt")), expected_masks(TINY, state))


def test_half_precision_files_become_float32(tmp_path: Path) -> None:
    state = {k: v.half() if v.is_floating_point() else v for k, v in random_state(TINY).items()}
    save_file(state, tmp_path / "tiny.safetensors")
    model = load_model("small_tiny", tmp_path / "tiny.safetensors")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(masks_of(model), expected_masks(TINY, {k: v.float() for k, v in state.items()}))


def test_training_s_counters_may_be_absent(tmp_path: Path) -> None:
    state = {k: v for k, v in random_state(TINY).items() if not k.endswith("num_batches_tracked")}
    save_file(state, tmp_path / "tiny.safetensors")
    load_model("small_tiny", tmp_path / "tiny.safetensors")


def test_a_hugging_face_folder_is_found_by_its_file(tmp_path: Path) -> None:
    save_file(random_state(VIT), tmp_path / "model.safetensors")
    assert resolve_checkpoint("small_vit", tmp_path) == tmp_path / "model.safetensors"
    assert resolve_checkpoint("small_vit", f"file://{tmp_path}") == tmp_path / "model.safetensors"
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"has no model\.safetensors and no pytorch_model\.bin"):
        resolve_checkpoint("small_vit", tmp_path)


def test_a_folder_with_its_weights_in_several_files_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"cut into several files, .* max_shard_size"):
        resolve_checkpoint("small_vit", tmp_path)
    torch.save(random_state(VIT), tmp_path / "pytorch_model.bin")
    load_model("small_vit", tmp_path)


def test_two_different_tables_of_positions_are_refused(tmp_path: Path) -> None:
    state = {
        "shared_image_embedding.positional_embedding": torch.zeros(2, 16),
        "prompt_encoder.shared_embedding.positional_embedding": torch.ones(2, 16),
    }
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="one table of positions"):
        read_state_dict(tmp_path / "model.safetensors")


# --- files that do not fit -----------------------------------------------------------------------------------------


def load_error(name: str, state: object, path: Path) -> str:
    torch.save(state, path)
    with pytest.raises(ConfigError) as caught:
        load_model(name, path)
    return str(caught.value)


def test_missing_unexpected_and_misshapen_keys_are_named(tmp_path: Path) -> None:
    state = random_state(VIT)
    del state["image_encoder.pos_embed"]
    state["image_encoder.extra"] = torch.zeros(1)
    state["mask_decoder.iou_token.weight"] = torch.zeros(1, 7)
    message = load_error("small_vit", state, tmp_path / "sam.pth")
    assert "1 missing key: image_encoder.pos_embed" in message
    assert "1 unexpected key: image_encoder.extra" in message
    assert "1 misshapen key: mask_decoder.iou_token.weight is (1, 7), expected (1, 32)" in message
    assert str(tmp_path / "sam.pth") in message


def test_another_model_s_file_is_recognised(tmp_path: Path) -> None:
    message = load_error("small_vit", random_state(DEEPER), tmp_path / "sam.pth")
    assert "unexpected keys: image_encoder.blocks.2." in message
    assert "It fits deeper_vit: set model.name=deeper_vit." in message


def test_a_pickle_is_not_executed(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "executed"),)

    for path, save in (
        (tmp_path / "sam.pth", lambda path: torch.save({"weight": Malicious()}, path)),
        (tmp_path / "raw.pkl", lambda path: path.write_bytes(pickle.dumps(Malicious(), protocol=2))),
    ):
        save(path)
        with pytest.raises(ConfigError, match=r"does not execute|is a damaged"):
            load_model("small_vit", path)
        assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("kept", [0, 7, 40, 3000, 0.9])
def test_a_file_cut_short_is_refused(form: str, kept: float, tmp_path: Path) -> None:
    path = tmp_path / "sam.pth"
    if form == "safetensors":
        save_file(random_state(VIT), path)
    else:
        torch.save(random_state(VIT), path, _use_new_zipfile_serialization=form == "zip")
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    with pytest.raises(ConfigError, match=r"damaged|truncated|not a checkpoint|more than tensors") as caught:
        load_model("small_vit", path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>Not Found</html>", "is not a checkpoint"),
        (b"", r"\(0 bytes\) is not a checkpoint"),
    ],
)
def test_what_is_no_checkpoint_is_called_so(data: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "sam.pth"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=words):
        load_model("small_vit", path)


def test_a_damaged_zip_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "sam.pt"
    torch.save(random_state(VIT), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"sam\.pt is truncated or damaged, .* download or copy it again"):
        load_model("small_vit", path)


KEY = "mask_decoder.iou_token.weight"


@pytest.mark.parametrize(
    ("kind", "spoil", "words"),
    [
        (
            "int8",
            lambda value: value.to(torch.int8),
            f"1 mistyped key (not float32, float16, bfloat16 or float64): {KEY} is int8",
        ),
        ("bool", lambda value: value > 0, f"{KEY} is bool"),
        ("complex", lambda value: value.to(torch.complex64), f"{KEY} is complex64"),
        ("float8", lambda value: value.to(torch.float8_e4m3fn), f"{KEY} is float8_e4m3fn"),
        ("sparse", lambda value: value.to_sparse(), f"{KEY} is sparse"),
        ("meta", lambda value: value.to("meta"), f"{KEY} is without values"),
        ("quantized", lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8), f"{KEY} is quantized"),
        ("nan", lambda value: value * torch.nan, f"1 key with values that are not finite: {KEY}"),
        ("inf", lambda value: value.half() * -torch.inf, "not finite"),
        ("large", lambda value: value.double().fill_(1e300), "not finite"),  # infinite once it is float32
    ],
)
def test_tensors_that_are_no_weights_are_named(
    kind: str, spoil: Callable[[Tensor], Tensor], words: str, tmp_path: Path
) -> None:
    state, path = random_state(VIT), tmp_path / "sam.pth"
    torch.save(state | {KEY: spoil(state[KEY])}, path)
    for refused in (lambda: load_model("small_vit", path), lambda: check_checkpoint("small_vit", path)):
        with pytest.raises(ConfigError) as caught:
            refused()
        assert words in str(caught.value)
        assert str(path) in str(caught.value)


def test_floats_of_every_width_and_what_is_not_loaded_are_taken(tmp_path: Path) -> None:
    state, path = random_state(TINY), tmp_path / "sam.pth"
    extras = {"image_encoder.head.bias": torch.full((3,), -torch.inf), "image_encoder.head.weight": torch.ones(3).int()}
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        torch.save({k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()} | extras, path)
        load_model("small_tiny", path)
    torch.save(Sam(VIT).state_dict(keep_vars=True), path)  # with gradients
    with warnings.catch_warnings(action="error"):
        load_model("small_vit", path)


def test_a_state_dict_holds_tensors_alone(tmp_path: Path) -> None:
    message = load_error("small_vit", {"model": random_state(VIT), "epoch": 3}, tmp_path / "sam.pth")
    assert "model, epoch (2 of 2 entries) are something else; model has tensors: save only that entry" in message
    training = {"epoch": 3, "optimizer": {"state": {}}, "state_dict": random_state(VIT)}
    assert "torch.load(FILE)['state_dict']" in load_error("small_vit", training, tmp_path / "sam.pth")
    assert load_error("small_vit", {"epoch": 3}, tmp_path / "sam.pth").endswith("are something else")
    assert "found a list" in load_error("small_vit", [torch.zeros(1)], tmp_path / "sam.pth")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "vit_bb"}, r"'vit_bb' is not one of tiny, .*did you mean vit_b\?"),
        ({"dtype": "float64"}, "not one of auto, float32, bfloat16, float16"),
        ({"dtype": torch.float64}, "not one of auto, float32, bfloat16, float16"),
        ({"device": "gpu"}, "not a device of this PyTorch"),
        ({"device": "cuda:99"}, r"PyTorch sees \d+ GPUs"),
        ({"checkpoint": "/nowhere/sam.pth"}, "the file /nowhere/sam.pth does not exist"),
        ({"checkpoint": "memory://nowhere/sam.pth"}, "does not exist"),
        ({"checkpoint": "nosuch://bucket/sam.pth"}, "nosuch"),
    ],
)
def test_wrong_arguments_are_config_errors(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_model(**arguments)  # type: ignore[arg-type]


def test_precisions(tmp_path: Path) -> None:
    save_file(random_state(TINY), tmp_path / "tiny.safetensors")
    for dtype, expected in (("bfloat16", torch.bfloat16), (torch.float16, torch.float16), ("auto", torch.float32)):
        model = load_model("small_tiny", tmp_path / "tiny.safetensors", device="cpu", dtype=dtype)
        assert model.dtype == expected
        assert model.mask_decoder.iou_token.weight.dtype == torch.float32


# --- the cache -----------------------------------------------------------------------------------------------------


class Server:
    """Serves one file's bytes with ranges over HTTP, and counts whole or partial GETs of it."""

    def __init__(self, data: bytes) -> None:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(len(server.data)))
                self.send_header("Accept-Ranges", "bytes")
                self.end_headers()

            def do_GET(self) -> None:
                server.gets += 1
                first, last = (int(n) for n in self.headers["Range"].removeprefix("bytes=").split("-"))
                body = server.data[first : last + 1]
                self.send_response(206)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Content-Range", f"bytes {first}-{last}/{len(server.data)}")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                pass

        self.data, self.gets = data, 0
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/sam_small.pth"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    torch.save(random_state(VIT), tmp_path / "published.pth")
    server = Server((tmp_path / "published.pth").read_bytes())
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def published(server: Server, monkeypatch: pytest.MonkeyPatch) -> ModelSpec:
    sha256 = hashlib.sha256(server.data).hexdigest()
    spec = dataclasses.replace(VIT, file_name="sam_small.pth", url=server.url, sha256=sha256, size_mb=1.0)
    monkeypatch.setitem(MODELS, "small_vit", spec)
    return spec


def cached() -> list[str]:
    folder = fetch.cache_dir() / "checkpoints"
    return sorted(p.name for p in folder.iterdir() if p.suffix != ".lock") if folder.exists() else []


def test_a_published_model_is_downloaded_once(
    server: Server, published: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By many at a time, in pieces, and not again later."""
    monkeypatch.setattr(fetch, "_PIECE_BYTES", len(server.data) // 3 + 1)
    threads = [threading.Thread(target=resolve_checkpoint, args=("small_vit",)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.gets == 3, "three pieces, once"
    assert cached() == ["sam_small.pth"]
    assert resolve_checkpoint("small_vit").read_bytes() == server.data
    assert checkpoint_sha256("small_vit") == published.sha256
    load_model("small_vit")
    assert server.gets == 3


def test_a_damaged_download_is_refused_and_not_kept(server: Server, published: ModelSpec) -> None:
    server.data = server.data[:-1] + b"!"
    with pytest.raises(ConfigError) as caught:
        load_model("small_vit")
    assert str(published.sha256) in str(caught.value)
    assert hashlib.sha256(server.data).hexdigest() in str(caught.value)
    assert cached() == []


def test_without_a_digest_the_size_is_verified_and_the_keys(
    server: Server, published: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    megabytes = len(server.data) / 1e6
    spec = dataclasses.replace(published, sha256=None, size_mb=megabytes * 1.005)
    monkeypatch.setitem(MODELS, "small_vit", spec)
    load_model("small_vit")
    assert cached() == ["sam_small.pth"]
    assert checkpoint_sha256("small_vit") == hashlib.sha256(server.data).hexdigest()
    fetch.published_path("sam_small.pth").write_bytes(server.data[:-5000])
    with pytest.raises(
        ConfigError, match=r"is not the published sam_small\.pth: expected 0\.\d MB, found .* delete it"
    ):
        resolve_checkpoint("small_vit")
    # As large, and another model: nothing but its keys tells.
    monkeypatch.setitem(
        MODELS, "deeper_vit", dataclasses.replace(DEEPER, file_name="deeper.pth", url=server.url, size_mb=megabytes)
    )
    with pytest.raises(ConfigError, match=r"does not fit deeper_vit: .* missing keys"):
        load_model("deeper_vit")


def test_a_download_of_another_size_is_not_kept(
    server: Server, published: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODELS, "small_vit", dataclasses.replace(published, sha256=None, size_mb=9.0))
    with pytest.raises(ConfigError, match=r"was damaged or changed: expected 9\.0 MB, found"):
        load_model("small_vit")
    assert cached() == []


def test_a_file_put_there_by_hand_is_used_and_verified(server: Server, published: ModelSpec) -> None:
    path = fetch.published_path("sam_small.pth")
    path.parent.mkdir(parents=True)
    path.write_bytes(server.data)
    assert resolve_checkpoint("small_vit") == path
    path.write_bytes(b"something else")
    with pytest.raises(ConfigError, match=r"is not the published sam_small\.pth: expected SHA-256 .* delete it"):
        resolve_checkpoint("small_vit")
    assert server.gets == 0


def test_without_network_the_error_says_what_to_put_where(
    server: Server, published: ModelSpec, storage_limits: Callable[..., None]
) -> None:
    storage_limits(max_attempts=2)
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(ConfigError) as caught:
        load_model("small_vit")
    message = str(caught.value)
    assert server.url in message
    assert str(fetch.published_path("sam_small.pth")) in message
    assert "model.checkpoint" in message
    assert "\n" not in message
    with pytest.raises(StorageError):
        load_model("small_vit", server.url)


def test_the_digest_of_the_embedded_weights_is_that_of_the_file() -> None:
    """A run with weights of a known digest does not read them before it starts."""
    assert MODELS["tiny"].sha256 == fetch.file_sha256(weights_file.embedded_path(MODELS["tiny"]))


def test_other_embedded_weights_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(weights_file, "embedded_path", lambda spec: tmp_path / "weights")
    (tmp_path / "weights").write_bytes(b"others")
    with pytest.raises(ConfigError, match="is not a checkpoint"):
        check_checkpoint()


def test_the_embedded_weights_must_be_in_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(weights_file, "embedded_path", lambda spec: tmp_path / spec.file_name)
    with pytest.raises(ConfigError, match="installation of samray is incomplete"):
        load_model()


def test_a_remote_checkpoint_is_fetched_once_until_it_is_replaced() -> None:
    memory = fsspec.filesystem("memory")
    uri = "memory://weights-test/sam.pth"
    try:
        memory.pipe_file(uri, b"first")
        first = resolve_checkpoint("small_vit", uri)
        assert first.read_bytes() == b"first"
        assert first.name.endswith("-sam.pth")
        stamp = first.stat().st_mtime_ns
        assert resolve_checkpoint("small_vit", uri) == first
        assert first.stat().st_mtime_ns == stamp
        memory.pipe_file(uri, b"second, longer")
        assert resolve_checkpoint("small_vit", uri).read_bytes() == b"second, longer"
    finally:
        memory.rm("/weights-test", recursive=True)


def test_signatures_in_a_uri_stay_out_of_messages_and_file_names(
    server: Server, storage_limits: Callable[..., None]
) -> None:
    storage_limits(max_attempts=2)
    uri = f"{server.url}?X-Amz-Signature=geheim"
    path = resolve_checkpoint("small_vit", uri)
    assert path.name.endswith("-sam_small.pth")
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(StorageError) as caught:
        resolve_checkpoint("small_vit", uri)
    assert "geheim" not in str(caught.value)


def test_a_cache_that_cannot_be_made_is_a_config_error(
    published: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SAMRAY_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="set SAMRAY_CACHE"):
        load_model("small_vit")


def test_digests_are_remembered_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sam.pth"
    path.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    assert checkpoint_sha256("small_vit", path) == digest
    assert not (fetch.cache_dir() / "sha256").exists(), "small files are not worth an entry"

    monkeypatch.setattr(fetch, "_SMALL_FILE_BYTES", 0)
    assert checkpoint_sha256("small_vit", path) == digest
    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", None)  # from here on, hashing would fail
        assert checkpoint_sha256("small_vit", path) == digest
    path.write_bytes(b"Weights")
    os.utime(path, ns=(1, 1))  # whatever the clock's resolution
    assert checkpoint_sha256("small_vit", path) == hashlib.sha256(b"Weights").hexdigest()


def test_list_models_says_what_is_here(server: Server, published: ModelSpec) -> None:
    rows = {row.name: row for row in list_models()}
    assert list(rows)[:5] == ["tiny", "vit_t", "vit_b", "vit_l", "vit_h"]
    assert rows["vit_b"].present is None
    assert (rows["vit_b"].parameters, rows["vit_h"].parameters) == (93_735_472, 641_090_608)
    assert rows["vit_b"].licence == "Apache-2.0"
    assert rows["small_vit"].present is None
    path = resolve_checkpoint("small_vit")
    assert {row.name: row for row in list_models()}["small_vit"].present == path
