"""The README and the pages in docs/, and the blocks in them that tests run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import typer

from samray.cli import main as cli
from samray.cli.help import split_settings
from samray.config import load_config
from samray.config.embed import EMBED_SECTIONS, load_embed_config
from samray.config.names import NAME_SECTIONS, load_names_config
from samray.train.settings import TRAIN_SECTIONS, load_train_settings
from tests.support import REPOSITORY

JOBS = {"autolabel": "label", "train": "train", "evaluate": "evaluate"}
"""Launcher in jobs/ -> the command whose arguments it takes."""
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]


def block(mark: str) -> tuple[str, str]:
    """(page, text) of the one fenced block below the line `<!-- mark -->`, in whichever page it is."""
    pattern = rf"^<!-- {re.escape(mark)} -->\n```\w+\n(.*?)^```$"
    blocks = [(name_of(page), text) for page in PAGES for text in re.findall(pattern, page.read_text(), re.M | re.S)]
    assert len(blocks) == 1, f"{len(blocks)} blocks in README.md and docs/ are marked {mark!r}; expected one"
    return blocks[0]


def blocks(language: str) -> list[tuple[str, str, str]]:
    """(page, mark, text) of each fenced block of a language; mark is empty if the block has none."""
    pattern = rf"(?:^<!-- ([^>]+) -->\n)?^```{language}\n(.*?)^```$"
    return [
        (name_of(page), mark, text)
        for page in PAGES
        for mark, text in re.findall(pattern, page.read_text(), re.MULTILINE | re.DOTALL)
    ]


def commands(start: str) -> list[tuple[str, str]]:
    """(page, command) of each line of the bash blocks that matches `start`; continued lines are joined."""
    return [
        (page, line)
        for page, _, text in blocks("bash")
        for line in re.sub(r"\\\n\s*", "", text).splitlines()
        if re.match(start, line)
    ]


def parse(line: str) -> None:
    """Read `samray ...` or `python jobs/... ...` as the command line would, and run nothing.

    Raises: click's or samray's error if an option, an argument or a setting is not one of that command's.
    """
    words = shlex.split(line, comments=True)
    if match := re.match(r"python jobs/(\w+)\.py ", line):
        words[:2] = ["samray", JOBS[match[1]]]
    command: Any = typer.main.get_command(cli.app)
    for word in words[1:3]:
        if hasattr(command, "commands"):
            command = command.commands[word]
            del words[1]
    context = command.make_context("samray", words[1:])
    sections = getattr(command, "sections", None)
    if sections is None:
        return
    arguments: list[str] = []
    for name in ("input", "output", "dest", "data", "words", "directory", "settings"):
        value = context.params.get(name) or ()
        arguments += value if isinstance(value, list | tuple) else [str(value)]
    overrides, _ = split_settings(arguments, [], sections)
    if sections is TRAIN_SECTIONS:
        load_train_settings(None, overrides)
    elif sections is NAME_SECTIONS:
        load_names_config(None, overrides)
    elif sections is EMBED_SECTIONS:
        load_embed_config(None, overrides)
    else:
        load_config(context.params.get("preset"), None, overrides)


def name_of(page: Path) -> str:
    return page.relative_to(REPOSITORY).as_posix()
