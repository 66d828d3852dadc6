"""The names asked for (`labels.phrases`): a list in the settings, or a text file, one phrase per line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from samray import storage
from samray.errors import ConfigError, FileError, NotFoundError, TooLargeError

if TYPE_CHECKING:
    from collections.abc import Iterable

MOST_PHRASES: Final = 10_000
MOST_CHARACTERS: Final = 250
"""The longest phrase. A token has at least one character, so a phrase fits a prompt of 256 tokens."""
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
        data = storage.read_whole(storage.normalize(uri), _MAX_BYTES)
        return data.decode("utf-8-sig").splitlines()
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


def _checked(phrases: Iterable[str], name: str, what: str, *, skip_empty: bool = False) -> list[str]:
    """what: how a phrase's number is called in messages: item or line."""
    place_of: dict[str, int] = {}
    cleaned = []
    for number, phrase in enumerate(phrases, start=1):
        phrase = phrase.strip()
        if not phrase and skip_empty:
            continue
        if not plain(phrase):
            raise ConfigError(f"{name}: {what} {number} is {phrase!r}; it takes a phrase with letters or digits")
        if len(phrase) > MOST_CHARACTERS:
            raise ConfigError(
                f"{name}: {what} {number} has {len(phrase)} characters, expected at most {MOST_CHARACTERS}; name a "
                "thing in a few words"
            )
        # Networks of text ignore case and full stops, and would name each mask by one of the two at random.
        first = place_of.setdefault(plain(phrase), number)
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


def plain(phrase: str) -> str:
    """A phrase as networks read it: lower case, single spaces, without the signs that end a phrase in a prompt."""
    return " ".join(phrase.lower().replace(".", " ").replace("?", " ").split())
