"""The names asked for (`labels.phrases`): a list in the settings, or a text file, one phrase per line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

from samray import storage
from samray.errors import ConfigError, FileError, NotFoundError, TooLargeError
from samray.prompts import phrase_problem
from samray.rle.records import MaskRecord
from samray.text import plain

if TYPE_CHECKING:
    from samray.prompts import Prompt

MOST_PHRASES: Final = 10_000
IMAGE_PHRASES_KEPT: Final = 4096
"""Encoded phrases of single images kept per actor, the most recent: 60 MB with Grounding DINO, 12 MB with CLIP."""
_MAX_BYTES: Final = 16 * 1024 * 1024
_SETTING: Final = "labels.phrases"


def read_phrases(phrases: tuple[str, ...] | str) -> list[str]:
    """The phrases in order, without white space around them, and without empty lines if phrases is a file.

    phrases: a list, or a text file (UTF-8) on any fsspec URI.
    Raises: ConfigError that says which phrase is empty, too long or a duplicate, or that there are none or too many;
    StorageError.
    """
    if not isinstance(phrases, str):
        return _checked(phrases, _SETTING, "item")
    name = f"{_SETTING} {storage.redact(phrases)}"
    return _checked(_lines_of(phrases, name), name, "line", skip_empty=True)


def _lines_of(uri: str, name: str) -> list[str]:
    try:
        text = storage.read_whole(storage.normalize(uri), _MAX_BYTES).decode("utf-8-sig")
    except NotFoundError as error:
        raise ConfigError(
            f"{name} does not exist; give a list, as in {_SETTING}=[cat,dog], or a text file with one phrase per line"
        ) from error
    except TooLargeError as error:
        raise ConfigError(f"{name} has more than {_MAX_BYTES // 1024**2} MiB; it takes one phrase per line") from error
    except FileError as error:
        raise ConfigError(f"{name} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} is not UTF-8 text: {error}") from error
    if text.lstrip()[:1] in ("[", "{"):
        raise ConfigError(f"{name} looks like JSON; it takes one phrase per line, without brackets and quotes")
    return text.splitlines()


def _checked(phrases: Iterable[str], name: str, what: str, *, skip_empty: bool = False) -> list[str]:
    """what: how a phrase's number is called in messages: item or line."""
    number_of: dict[str, int] = {}
    cleaned = []
    for number, phrase in enumerate(phrases, start=1):
        # Also without the marks that editors leave at the start of a file, where several files were joined.
        phrase = phrase.strip().strip("\ufeff\u200b").strip()
        if not phrase and skip_empty:
            continue
        if problem := phrase_problem(phrase):
            raise ConfigError(f"{name}: {what} {number} {problem}")
        # Networks of text ignore case and full stops, and would name each mask by one of the two at random.
        first = number_of.setdefault(plain(phrase), number)
        if first != number:
            raise ConfigError(
                f"{name}: {what} {number}, {phrase!r}, is the same phrase as {what} {first}; leave one out"
            )
        cleaned.append(phrase)
    if not cleaned:
        raise ConfigError(f"{name} has no phrases; give at least one, as in {_SETTING}=[cat,dog]")
    if len(cleaned) > MOST_PHRASES:
        raise ConfigError(f"{name} has {len(cleaned):,} phrases, expected at most {MOST_PHRASES:,}")
    return cleaned


class FoundMasks(list[MaskRecord]):
    """The masks of one image, and how likely it shows each phrase. A list, so that all that takes masks takes it."""

    def __init__(self, masks: Iterable[MaskRecord], presence: Iterable[tuple[str, float]]) -> None:
        """presence: all phrases asked of the image, in order, each with a score from 0 to 1."""
        super().__init__(masks)
        self.presence = [{"phrase": phrase, "score": score} for phrase, score in presence]


class Asked:
    """The phrases asked of every image, to which an image may add its own: the texts of its prompts."""

    def __init__(self, common: Sequence[str]) -> None:
        self.common = tuple(common)
        self._known = {plain(phrase) for phrase in common}

    def only_of(self, prompts: Iterable[Prompt]) -> list[str]:
        """The texts among an image's prompts that are not asked of every image, each once."""
        return [text for key, text in distinct(prompts).items() if key not in self._known]


def distinct(prompts: Iterable[Prompt]) -> dict[str, str]:
    """The texts of prompts: each as networks read it -> as it was first written."""
    texts: dict[str, str] = {}
    for prompt in prompts:
        if prompt.text is not None:
            texts.setdefault(plain(prompt.text), prompt.text)
    return texts
