"""`samray report` of a training: one page that says how it went, from the OUTPUT alone."""

import json
import re
from pathlib import Path

import pytest

from samray.cli.main import main
from samray.errors import ConfigError
from samray.report.training import MAX_VALIDATIONS, write_train_report
from samray.train.run import full_identity
from samray.train.store import Position, Store
from tests.support.micro import settings_of


@pytest.fixture
def training(tmp_path: Path) -> Path:
    """A training that is half done: 10 lines of means and 60 validations."""
    store, settings = Store(str(tmp_path / "weights")), settings_of("train.steps=1200", "data.shares=[3,1]")
    data = [("s3://KEY:SECRET@bucket/<b>labels", 1234), ("scenes", None)]
    store.claim(full_identity(settings, "micro", data), settings.model_dump(mode="json"))
    position = {"minutes": 1.5, "progress": 0.5}
    lines = [
        {**position, "kind": "train", "step": 10 * i, "lr": 1e-3, "examples_per_s": 7.25, "mask_loss": 1 / (i + 1)}
        for i in range(10)
    ]
    lines += [
        {
            **position,
            "kind": "validation",
            "step": 10 * i,
            "miou": 0.25 + i / 200,
            "miou_oracle": 0.5,
            "num_regions": 77,
        }
        for i in range(60)
    ]
    store.write_metrics(lines)
    store._put("position.json", lambda path: path.write_text(json.dumps({"step": 600, "elapsed_s": 125.0})))
    assert store.read_position() == Position(600, 125.0)
    return tmp_path / "weights"


@pytest.mark.slow
def test_the_page_says_how_it_went(training: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["report", str(training)]) == 0
    page_path = training / "report.html"
    assert capsys.readouterr().out.strip() == str(page_path)
    page = page_path.read_text()
    for words in ("50% done", "0.545", "0.250 at step 0", "2 min 5 s", ">7.25<", "1,234", "endless", "75%"):
        assert words in page, words
    assert '<td>train.steps</td><td class="mono"><b>1200</b>' in re.sub(r">\s+<", "><", page)
    assert page.count('<td class="num">77</td>') == MAX_VALIDATIONS + 1, "the first one, and the last"
    assert 'src="data:image/png;base64,iVBOR' in page
    assert not re.search(r'(src|href)="(?!data:|#)', page), "it fetches nothing"
    assert "SECRET" not in page
    assert "<b>labels" not in page


def test_a_training_without_a_figure_has_no_page_yet(training: Path, tmp_path: Path):
    (training / "metrics.jsonl").unlink()
    with pytest.raises(ConfigError, match="without metrics so far"):
        write_train_report(str(training))
    with pytest.raises(ConfigError, match="has no training"):
        write_train_report(str(tmp_path))


def test_after_a_single_line_there_is_one(training: Path, tmp_path: Path):
    (training / "position.json").unlink()
    Store(str(training)).write_metrics([{"kind": "train", "step": 20, "minutes": 0.1, "progress": 0.1, "lr": 1e-4}])
    page = Path(write_train_report(str(training), str(tmp_path / "page.html"))).read_text()
    assert "No images were held out" in page
    assert "0% done" in page


def test_the_next_command_of_an_adapter_names_the_weights_that_it_was_trained_on(training: Path, tmp_path: Path):
    run = json.loads((training / "train.json").read_text())
    run["settings"]["train"] |= {"trainable": "lora", "from_scratch": False}
    run["settings"]["model"]["checkpoint"] = "/weights/base.pth"
    (training / "train.json").write_text(json.dumps(run))
    page = Path(write_train_report(str(training), str(tmp_path / "page.html"))).read_text()
    assert f"model.checkpoint=/weights/base.pth model.adapter={training}/adapter.safetensors" in page
