"""The documentation site builds strictly, its links lead somewhere, it fetches nothing, and its commands parse."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import pydoc
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import typer

import samray
from samray import errors
from samray.cli import main as cli
from samray.cli import status_view
from samray.config import SECTIONS, setting_rows
from samray.config.edges import EDGE_SECTIONS
from samray.config.embed import EMBED_SECTIONS
from samray.config.names import NAME_SECTIONS
from samray.output.status import Status
from samray.text import cost_in_words
from samray.train.settings import TRAIN_SECTIONS
from tests.support import pages

CONFIG = pages.REPOSITORY / "docs" / "site" / "mkdocs.yml"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None,
    reason="mkdocs is not installed, so the docs are NOT built: pip install 'samray[test]'",
)


class Page(HTMLParser):
    """What a page links to, what it loads, its anchors and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.text = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value}
        if "id" in values:
            self.anchors.add(values["id"])
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag in ("img", "script", "link", "iframe"):
            self.loads += [values[name] for name in ("src", "href") if name in values]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Page]:
    """The pages of the site, built strictly: a warning fails."""
    folder = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "PYTHONPATH": str(pages.REPOSITORY), "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(CONFIG), "-d", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr
    return {path: Page(path) for path in sorted(folder.rglob("*.html")) if path.name != "404.html"}


def page_of(site: dict[Path, Page], name: str) -> Page:
    (page_of_name,) = (page for path, page in site.items() if path.as_posix().endswith(f"/{name}.html"))
    return page_of_name


def test_every_link_leads_to_a_file_and_an_anchor(site: dict[Path, Page]) -> None:
    broken = []
    for path, page in site.items():
        for link in [*page.links, *page.loads]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = path if not parts.path else (path.parent / unquote(parts.path)).resolve()
            target = target / "index.html" if target.is_dir() else target
            if not target.exists() or (target in site and parts.fragment not in {"", *site[target].anchors}):
                broken.append((path.name, link))
    assert broken == []
    assert sum(len(page.links) for page in site.values()) > 500


def test_no_page_loads_anything_from_another_host(site: dict[Path, Page]) -> None:
    for path, page in site.items():
        assert [link for link in page.loads if urlsplit(link).netloc] == [], path
    styles = [style for path in site for style in path.parent.glob("assets/**/*.css")]
    assert styles
    assert all("fonts.googleapis.com" not in style.read_text() for style in styles)


def test_the_examples_of_status_and_cost_are_what_is_printed() -> None:
    status = Status(
        output="s3://bucket/labels", state="running", num_shards=15_625, num_shards_done=6_440, num_shards_begun=8,
        num_images=1_000_000, num_images_done=412_160, num_shards_read=101, num_masks=38_241_900,
        failures={"truncated": 32}, device_seconds=94, held_seconds=100, gpu_seconds=34.9 * 3600, images_per_s=23.61,
        images_per_s_overall=22.87, eta_s=24_900, last_shard_s_ago=12, quiet_s=12, usual_gap_s=3, own_clock=False,
        gpu_price_per_hour=2.0,
    )  # fmt: skip
    page = (pages.REPOSITORY / "docs" / "deployment" / "monitoring.md").read_text()
    assert "\n".join(f"{name}: {value}" for name, value in status_view.rows(status)) in page
    assert cost_in_words(3600, 2.5, 2000) in page


def test_quoted_messages_are_in_the_code() -> None:
    page = (pages.REPOSITORY / "docs" / "reference" / "errors.md").read_text()
    source = "".join(path.read_text() for path in (pages.REPOSITORY / "samray").rglob("*.py"))
    for message in re.findall(r"^\| `([^`]*[a-z] [^`]*)` \|", page.partition("## Frequent errors")[2], re.MULTILINE):
        for part in message.split("..."):
            assert part.strip() in source, message


def test_the_readme_is_short() -> None:
    assert len((pages.REPOSITORY / "README.md").read_bytes()) <= 10_000


def test_paths_and_names_in_the_text_exist() -> None:
    """Files of the repository, and names of Python, wherever they are written as code."""
    for page in pages.PAGES:
        for code in re.findall(r"`([^`\n]+)`", page.read_text()):
            if re.fullmatch(r"(samray|jobs|configs|tests|docs)/[\w./-]+", code):
                assert (pages.REPOSITORY / code).exists(), f"{page.name}: {code}"
            elif re.fullmatch(r"samray(\.\w+)+", code):
                assert pydoc.locate(code) is not None, f"{page.name}: {code}"


def test_links_of_the_readme_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (pages.REPOSITORY / "README.md").read_text()):
        assert (pages.REPOSITORY / link).exists(), link


def test_the_reference_has_every_command_setting_name_and_error(site: dict[Path, Page]) -> None:
    commands, settings, api, faults = (
        " ".join(page_of(site, f"reference/{name}").text.split()) for name in ("cli", "settings", "api", "errors")
    )
    for name in command_names():
        assert f" {name} " in commands, name
    for sections in (SECTIONS, EDGE_SECTIONS, EMBED_SECTIONS, NAME_SECTIONS, TRAIN_SECTIONS):
        for section in sections:
            for row in setting_rows(section, sections):
                assert row.name in settings
                assert row.description.replace("`", "") in settings
    assert {f"samray.{name}" for name in samray.__all__} <= page_of(site, "reference/api").anchors
    for name in samray.__all__:
        doc = " ".join((inspect.getdoc(getattr(samray, name)) or "").split())
        assert re.sub(r"[`\-* ]", "", doc) in re.sub(r"[\-* ]", "", api), name
    for name in ("StorageError", "TooLargeError", *errors.IMAGE_ERROR_REASONS):
        assert name in faults, name


def command_names() -> list[str]:
    def walk(group: Any, name: str) -> list[str]:
        parts = [[f"{name} {key}"] if not hasattr(one, "commands") else walk(one, f"{name} {key}")
                 for key, one in group.commands.items()]  # fmt: skip
        return [name for part in parts for name in part]

    return walk(typer.main.get_command(cli.app), "samray")


@pytest.mark.parametrize(("page", "line"), pages.commands(r"samray \w|python jobs/(autolabel|train|evaluate)"))
def test_every_command_parses(page: str, line: str) -> None:
    """Its options are the command's, and its settings are settings."""
    pages.parse(line)


@pytest.mark.parametrize(("page", "line"), pages.commands(r"(samray|ray job|python jobs/)"))
def test_no_command_names_a_file_of_the_repository_that_is_not_there(page: str, line: str) -> None:
    for word in re.findall(r"\b(?:jobs|configs)/\S+", line):
        assert (pages.REPOSITORY / word).exists(), word


def test_every_command_has_an_example() -> None:
    lines = " ".join(line for _, line in pages.commands("samray "))
    assert [name for name in command_names() if name not in lines] == []


def test_blocks_of_json_and_yaml_are_sound() -> None:
    import yaml

    for _, _, text in pages.blocks("yaml"):
        assert yaml.safe_load(text)
    for _, _, text in pages.blocks("json"):
        assert all(json.loads(line) for line in text.splitlines())
