"""`labels.phrases`: a list or a file, and a sentence for each wrong input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from samray.config import LabelsConfig
from samray.errors import ConfigError
from samray.labels.phrases import MOST_PHRASES, read_phrases
from samray.text import plain


def test_phrases_of_a_file_are_those_of_a_list(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("\ufeffcat\n\n  Fire hydrant \r\nst. bernard\n", encoding="utf-8")
    phrases = read_phrases(str(tmp_path / "names.txt"))
    assert phrases == read_phrases(("cat", "Fire hydrant", "st. bernard")) == ["cat", "Fire hydrant", "st. bernard"]
    assert [plain(phrase) for phrase in phrases] == ["cat", "fire hydrant", "st bernard"]


@pytest.mark.parametrize(
    ("phrases", "message"),
    [
        ((), r"labels\.phrases has no phrases"),
        (("cat", " "), r"item 2 is ''; it takes a phrase with letters"),
        (("cat", "..."), r"item 2 is '\.\.\.'"),
        (("cat", "\u200d"), r"item 2 is '\\u200d'; it takes a phrase with letters"),
        (("cat", "\u0301 \x00"), "item 2 is .*; it takes a phrase with letters"),
        ("names.json", r"names\.json looks like JSON; it takes one phrase per line"),
        (("cat", "dog", "Cat."), r"item 3, 'Cat\.', is the same phrase as item 1"),
        (("c" * 251,), "item 1 has 251 characters"),
        (tuple(f"n{i}" for i in range(MOST_PHRASES + 1)), "10,001 phrases, expected at most 10,000"),
        ("there.txt", r"there\.txt does not exist; give a list"),
        ("empty.txt", r"empty\.txt has no phrases"),
        ("latin.txt", r"latin\.txt is not UTF-8"),
        ("twice.txt", r"line 3, 'cat', is the same phrase as line 1"),
    ],
)
def test_wrong_phrases_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phrases: Any, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n \n")
    Path("names.json").write_text('\n["cat", "dog"]\n')
    Path("latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    Path("twice.txt").write_text("cat\n\ncat\n")
    with pytest.raises(ConfigError, match=message):
        read_phrases(phrases)


def test_marks_of_joined_files_are_not_part_of_a_name(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("\ufeffcat\n\ufeffdog\n\ufeff\n\U0001f431\n,\n", encoding="utf-8")
    assert read_phrases(str(tmp_path / "names.txt")) == ["cat", "dog", "\U0001f431", ","]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"phrases": ["cat"]}, r"labels\.phrases needs labels\.by; add labels\.by=grounding_dino"),
        ({"by": "grounding_dino", "phrases": [1]}, r"labels\.phrases = \[1\] is not allowed; it takes text or a list"),
        ({"by": "grounding_dino", "phrases": ["cat"], "text_thresh": 2.0}, r"text_thresh = 2\.0 is not allowed"),
    ],
)
def test_wrong_settings_are_named(labels: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LabelsConfig(**labels)
