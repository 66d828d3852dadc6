"""`samray name` without Ray: what becomes of each row, the plan of DEST, and what is refused."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from samray import storage
from samray.cli.main import main
from samray.config import Config
from samray.errors import ConfigError, ImageError, StorageError
from samray.exports.export import export
from samray.imports.import_ import import_
from samray.labels.clip import ClipInputs
from samray.labels.networks import Network
from samray.labels.phrases import read_phrases
from samray.output.compact import refuse_replaced
from samray.output.plan import Plan, load_plan, make_plan
from samray.output.schema import ImageRecord, records_to_table, samray_metadata
from samray.output.shards import commit_shard, mark_success, read_shard, replace_shard, shard_uri
from samray.output.verify import verify
from samray.pipeline import naming
from samray.pipeline.labeler import EncodedImage
from samray.pipeline.naming import NameGenerator, NamingLabeler, plan_names
from samray.pipeline.plan_run import RunPlan
from tests.support.labelled import BLACK, BROKEN, image_bytes, make_output
from tests.support.naming import COLOURS, colour_config, colour_namer
from tests.support.standin import make_image, masks_of


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """No file of a network is looked for."""

    def read(config: Config) -> ClipInputs:
        assert config.labels.phrases is not None
        return ClipInputs(read_phrases(config.labels.phrases), Network(str(config.labels.checkpoint), "0" * 64))

    monkeypatch.setattr(naming, "read_inputs", read)
    monkeypatch.setattr(naming, "check_ray", lambda *_, **__: None)


def encoded(plan: Plan, shard: int, **instead: Any) -> list[EncodedImage]:
    """What the labeler of a shard gets. instead: data of an image, by `img_N`."""
    images = []
    for row in plan.read_shard(shard).to_pylist():
        stem = Path(row["uri"]).stem
        data = instead.get(f"img_{int(stem[4:])}", image_bytes(int(stem[4:])))
        images.append(EncodedImage(row["image_id"], row["file_name"], row["uri"], data, shard=shard))
    return images


def labeler_of(planned: RunPlan, source: Plan) -> NamingLabeler:
    per_shard = planned.plan.generations[0].images_per_shard
    return NamingLabeler(source, per_shard, lambda _: NameGenerator(colour_namer(0.5)), max_pixels=10**6)


def write_names(planned: RunPlan, source: Plan, **instead: Any) -> list[ImageRecord]:
    """Commit all shards of DEST as the pipeline does."""
    labeler = labeler_of(planned, source)
    records = []
    for shard in range(planned.plan.num_shards):
        done = labeler.label(encoded(planned.plan, shard, **instead)).records
        assert commit_shard(planned.plan.output, shard, records_to_table(done, planned.plan.run))
        records += done
    return records


def rows_in(plan: Plan) -> list[dict[str, Any]]:
    return [row for shard in range(plan.num_shards) for row in read_shard(plan.output, shard).to_pylist()]


@pytest.mark.parametrize("per_shard", [4, 3])
def test_every_row_is_the_same_but_for_the_names(tmp_path: Path, per_shard: int) -> None:
    source = make_output(str(tmp_path))
    config = colour_config("clip", *([] if per_shard == 4 else [f"output.images_per_shard={per_shard}"]))
    planned, _, _ = plan_names(source.output, str(tmp_path / "named"), config)
    write_names(planned, source)
    old = [row for shard in range(3) for row in read_shard(source.output, shard).to_pylist()]
    new = [
        row for shard in range(planned.plan.num_shards) for row in read_shard(planned.plan.output, shard).to_pylist()
    ]
    names = [(mask.pop("label"), mask.pop("label_score")) for row in new for mask in row["annotations"]]
    assert new == old
    assert old[BROKEN]["error"].startswith("not_an_image")
    assert old[BLACK]["annotations"] == []
    assert {label for label, _ in names} >= set(COLOURS)
    assert all((label is None) == (score is None) for label, score in names)
    report = verify(planned.plan.output, deep=True)
    assert [problem for problem in report.problems if "_SUCCESS" not in problem] == []
    metadata = samray_metadata(read_shard(planned.plan.output, 0).schema)
    assert metadata["categories"] == list(COLOURS)
    assert load_plan(planned.plan.output).run["categories"] == list(COLOURS)


def test_an_image_that_is_gone_or_another_one_is_a_failed_row(tmp_path: Path) -> None:
    source = make_output(str(tmp_path))
    planned, _, _ = plan_names(source.output, str(tmp_path / "named"), colour_config("clip"))
    gone = ImageError("missing", "no such file")
    records = write_names(planned, source, img_0=gone, img_1=make_image(1, (9, 9)), img_5=gone, img_3=gone)
    assert records[0].error == "missing: no such file"
    assert records[1].error == "unreadable: the image is 9x9, its masks are for 25x16: it was replaced"
    assert (records[0].annotations, records[1].width) == ([], 25)
    assert records[BLACK].error is None, "it has no masks, so nobody looks at it"
    assert str(records[BROKEN].error).startswith("not_an_image"), "it failed before, and still does"
    assert all(record.error is None for record in records[6:])
    report = verify(planned.plan.output, deep=True)
    assert report.num_failed == 3
    assert [problem for problem in report.problems if "_SUCCESS" not in problem] == []


def test_names_of_an_output_with_names_are_replaced(tmp_path: Path) -> None:
    source = make_output(str(tmp_path))
    first, _, _ = plan_names(source.output, str(tmp_path / "first"), colour_config("clip"))
    write_names(first, source)
    mark_success(first.plan.output)
    other = colour_config("clip", "labels.phrases=[one,two,three]")
    planned, again, _ = plan_names(first.plan.output, str(tmp_path / "second"), other)
    assert planned.plan.run["categories"] == ["one", "two", "three"]
    assert again.output == first.plan.output
    assert planned.plan.run["identity"]["names"]["output"] == storage.redact(first.plan.output)


def test_what_cannot_be_named_is_refused(tmp_path: Path) -> None:
    source, dest = make_output(str(tmp_path)), str(tmp_path / "named")
    config = colour_config("clip")
    with pytest.raises(ConfigError, match="is not the output of a samray run"):
        plan_names(str(tmp_path / "in"), dest, config)
    with pytest.raises(ConfigError, match="must be different folders"):
        plan_names(source.output, source.output, config)
    with pytest.raises(ConfigError, match=r"takes labels\.by=clip"):
        plan_names(source.output, dest, Config())
    part = Path(shard_uri(source.output, 1))
    data = part.read_bytes()
    part.unlink()
    with pytest.raises(ConfigError, match="is not finished: 1 of 3 shards are missing"):
        plan_names(source.output, dest, config)
    assert not Path(dest).exists()
    part.write_bytes(data)
    plan_names(source.output, dest, config)
    with pytest.raises(ConfigError, match=r"labels\.crops: .*there, \[\"plain\"\] now"):
        plan_names(source.output, dest, colour_config("clip", "labels.crops=[plain]"))
    with pytest.raises(ConfigError, match="has another output, and not the names of"):
        plan_names(source.output, make_output(str(tmp_path / "other")).output, config)
    assert plan_names(source.output, dest, config)[0].is_new is False


def test_shards_of_the_output_that_are_replaced_meanwhile_are_noticed(tmp_path: Path) -> None:
    source = make_output(str(tmp_path))
    planned, _, fingerprint = plan_names(source.output, str(tmp_path / "named"), colour_config("clip"))
    refuse_replaced(source, fingerprint, planned.plan.output)
    replace_shard(source.output, 0, read_shard(source.output, 0), {"num_images": 4})
    with pytest.raises(StorageError, match="were replaced while they were read"):
        refuse_replaced(source, fingerprint, planned.plan.output)
    with pytest.raises(ConfigError, match="have been replaced since"):
        plan_names(source.output, planned.plan.output, colour_config("clip"))


def test_all_crops_of_an_image_are_one_batch_up_to_a_limit() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    masks = masks_of(pixels) * 3
    whole = replace(colour_namer(), crops=("plain", "blanked"))
    passes = whole.network.passes  # type: ignore[attr-defined]
    wanted = whole.probabilities(pixels, masks)
    assert passes == [18]
    with ThreadPoolExecutor(2) as threads:
        for limit, sizes in ((7, [6, 6, 6]), (1, [1] * 18)):
            for cutters in (None, threads):
                passes.clear()
                namer = replace(whole, crops_at_once=limit, cutters=cutters)
                assert np.allclose(namer.probabilities(pixels, masks), wanted, atol=1e-5)
                assert passes == sizes
                assert namer.probabilities(pixels, []).shape == (0, 3)
        with pytest.raises(ValueError, match="sum to"):
            namer.name(pixels[:-1], masks)


def test_the_first_image_of_a_labelling_process_is_not_in_the_plan(tmp_path: Path) -> None:
    source = make_output(str(tmp_path))
    planned, _, _ = plan_names(source.output, str(tmp_path / "named"), colour_config("clip"))
    pixels = np.full((8, 6, 3), (200, 10, 10), np.uint8)
    done = labeler_of(planned, source).label([EncodedImage(0, "", "", pixels)])
    assert [mask["label"] for mask in done.records[0].annotations] == ["red"]


def test_credentials_of_images_come_from_the_list_again(tmp_path: Path) -> None:
    links = tmp_path / "links.txt"
    links.write_text("".join(f"https://host.test/{i}.png?X-Amz-Signature=secret{i}\n" for i in range(3)))
    config = Config(output={"images_per_shard": 2})
    source = make_plan(str(links), str(tmp_path / "out"), config, config.identity())
    records = [ImageRecord(**row, width=0, height=0, error="missing: gone") for row in fields_of(source)]
    for shard in range(2):
        commit_shard(source.output, shard, records_to_table(records[2 * shard : 2 * shard + 2], source.run))
    planned, _, _ = plan_names(source.output, str(tmp_path / "named"), colour_config("clip"))
    credentials = naming._credentials(planned.plan, source, planned.config, [0, 1])
    assert sorted(uri.rpartition("=")[2] for of_shard in credentials.values() for uri in of_shard.values()) == [
        "secret0", "secret1", "secret2",
    ]  # fmt: skip
    stored = b"".join(path.read_bytes() for path in (tmp_path / "named").rglob("*") if path.is_file())
    assert b"secret" not in stored


def fields_of(plan: Plan) -> list[dict[str, Any]]:
    rows = [row for shard in range(plan.num_shards) for row in plan.read_shard(shard).to_pylist()]
    return [{name: row[name] for name in ("image_id", "file_name", "uri")} for row in rows]


def test_a_corrected_output_keeps_its_corrections(tmp_path: Path) -> None:
    source = make_output(str(tmp_path))
    export(source.output, tmp_path / "coco", format="coco", ray=False, progress=False)
    (coco,) = (tmp_path / "coco").glob("*.json")
    corrected = str(tmp_path / "corrected")
    import_(coco, corrected, format="coco", corrects=source.output, ray=False, progress=False)
    planned, plan, _ = plan_names(corrected, str(tmp_path / "named"), colour_config("clip"))
    write_names(planned, plan)
    mark_success(planned.plan.output)
    assert [row["corrections"] for row in rows_in(planned.plan)] == [row["corrections"] for row in rows_in(plan)]
    assert verify(planned.plan.output, deep=True).problems == []
    imported = str(tmp_path / "imported")
    import_(coco, imported, format="coco", images=str(tmp_path / "in"), ray=False, progress=False)
    planned, plan, _ = plan_names(imported, str(tmp_path / "named-2"), colour_config("clip"))
    assert planned.plan.num_images == plan.num_images


def test_the_command_says_what_is_wrong(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["name", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert "samray name needs labels.phrases, a list" in capsys.readouterr().err
    assert main(["name", str(tmp_path / "a"), str(tmp_path / "b"), "labels.phrases=[cat]", "labels.grid=3"]) == 2
    assert "unknown setting labels.grid" in capsys.readouterr().err
    assert main(["name", str(tmp_path / "a"), "labels.phrases=[cat]"]) == 2
    assert "DEST" in capsys.readouterr().err
