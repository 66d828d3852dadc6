"""Strict YAML: no duplicate keys, and YAML 1.2 scalars: `no` is text and `1e-3` is a number."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

import yaml

from samray.errors import ConfigError

_MAX_DEPTH: Final = 16
_MAX_BYTES: Final = 16 * 2**20


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's core scalars; PyYAML uses 1.1's (`no` is false, `1e-3` is text, `010` is 8)."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        mark: Any = event.start_mark
        if isinstance(event, yaml.AliasEvent):  # a few lines of aliases can expand to gigabytes
            problem = f"aliases (*{event.anchor}) are not allowed: write the value out"
            raise yaml.composer.ComposerError(None, None, problem, mark)
        if self._depth == _MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"nested deeper than {_MAX_DEPTH} levels", mark)
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        # PyYAML silently takes the last of repeated keys.
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is not text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    try:
        return int(node.value)
    except ValueError as error:  # Python does not convert thousands of digits
        problem = f"the number is too long: {error}"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error


def _construct_float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    return float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan"))


_RESOLVERS: list[tuple[str, str, str]] = [
    ("tag:yaml.org,2002:null", r"^(?:~|null|Null|NULL|)$", "~nN\0"),
    ("tag:yaml.org,2002:bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("tag:yaml.org,2002:int", r"^[-+]?[0-9]+(?:_[0-9]+)*$", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        "-+.0123456789",
    ),
]
_StrictLoader.yaml_implicit_resolvers = {}  # replace SafeLoader's, which are YAML 1.1's
for _tag, _pattern, _first in _RESOLVERS:
    _StrictLoader.add_implicit_resolver(_tag, re.compile(_pattern), ["" if c == "\0" else c for c in _first])
_StrictLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_StrictLoader.add_constructor("tag:yaml.org,2002:float", _construct_float)


def load_yaml_file(path: Path) -> dict[str, Any]:
    """Load the mapping in a YAML file; {} if the file is empty.

    Raises ConfigError with file, line and column if the file cannot be read, is not YAML, repeats a key, or is not a
    mapping.
    """
    try:
        # Opening a pipe would wait forever.
        if not path.is_file() and path.exists():
            raise ConfigError(f"the configuration file {path} is a folder, a pipe or a device; name a YAML file")
        with path.open("rb") as stream:
            # One byte more than allowed shows that the file is too large.
            data = stream.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise ConfigError(f"the configuration file {path} has more than {_MAX_BYTES >> 20} MiB; check the path")
        text = data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"cannot read the configuration file {path}: {why}") from None
    try:
        loaded = yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} must contain sections of settings (`masks:` and below it `points_per_side: 16`)")
    return loaded


def parse_value(text: str) -> Any:
    """Parse the value in `section.key=value`: a YAML scalar, or a flow list or mapping if it starts with [ or {.

    Anything else is taken literally, so paths with `#`, `: ` or `@` need no quotes. Raises ConfigError if a list, a
    mapping or a quoted string is not closed.
    """
    text = text.strip()
    if text[:1] in ("[", "{", '"', "'"):
        try:
            return yaml.load(text, Loader=_StrictLoader)
        except yaml.composer.ComposerError as error:
            raise ConfigError(f"cannot read the value {text[:60]}: {error.problem}") from None
        except yaml.YAMLError:
            raise ConfigError(
                f"cannot read the value {text[:200]}: a bracket or quote is not closed; in a shell, put quotes around "
                "a setting with spaces or brackets"
            ) from None
    loader = _StrictLoader("")
    # The tag of the text as a plain scalar: number, boolean, null or text.
    tag = loader.resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]
    try:
        return loader.construct_object(yaml.ScalarNode(tag, text))
    except yaml.constructor.ConstructorError:
        raise ConfigError(f"cannot read the value {text[:20]}...: the number is too long") from None
