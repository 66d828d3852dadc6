"""Base class of every settings section: frozen, strict, with errors that say what to type instead."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Literal

import annotated_types
from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import core_schema

from samray.errors import ConfigError

_MOST_SHOWN: Final = 200
"""Maximum characters of a wrong value in a message."""


class SettingsError(ConfigError):
    """One or more settings are wrong. `problems` has one clause per setting; the message contains all of them."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(dict.fromkeys(problems))
        many = len(self.problems) > 1
        text = "".join(f"\n  - {p}" for p in self.problems)
        super().__init__(f"{len(self.problems)} settings are wrong:{text}" if many else self.problems[0])


@dataclass(frozen=True, slots=True)
class OneOf:
    """Text that must be a name of a table; the table is asked at each check, for rows may be added."""

    names: Callable[[], Sequence[str]]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def _check(self, name: str) -> str:
        if name not in self.names():
            raise ValueError(f"{name} is not one of {', '.join(self.names())}")
        return name


class Settings(BaseModel):
    """One section. Keyword arguments only; raises SettingsError instead of pydantic's ValidationError."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=True,  # a field's docstring is its description in --help and in the docs
    )
    section: ClassVar[str] = ""

    if not TYPE_CHECKING:  # type checkers keep the signature made from the fields

        def __init__(self, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise SettingsError([_sentence(type(self), problem) for problem in error.errors()]) from None


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """`; did you mean points_per_side?`, or "" if no valid name is close."""
    near = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.7)
    return f"; did you mean {near[0]}?" if near else ""


def allowed_values(field: FieldInfo) -> str:
    """The values that a field accepts: `a number from 0 to 1`, `true or false`, `one of coco, sam`, `... or null`."""
    kinds = typing.get_args(field.annotation) if _is_union(field.annotation) else (field.annotation,)
    tables = [limit for limit in field.metadata if isinstance(limit, OneOf)]
    # A name of a table is shown with the names that it may be, not as text.
    kinds = tuple(Annotated[kind, *tables] if kind is str and tables else kind for kind in kinds)
    words = [_kind_in_words(kind) + _range_in_words(field) for kind in kinds if kind is not types.NoneType]
    if types.NoneType in kinds:
        words.append("null")
    return " or ".join(words)


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _kind_in_words(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) is Annotated:
        return "one of " + ", ".join(name for table in kind.__metadata__ for name in table.names())
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if typing.get_origin(kind) is tuple and typing.get_args(kind)[0] in words:
        items = [item for item in typing.get_args(kind) if item is not Ellipsis]
        return f"a list of {'' if len(items) == 1 else 'two '}{'strings' if items[0] is str else 'numbers'}"
    return words.get(kind, "a list with one list of [x, y] points per crop layer")


def _range_in_words(field: FieldInfo) -> str:
    low = high = ""
    for limit in field.metadata:
        if isinstance(limit, annotated_types.Ge):
            low = f"from {limit.ge:,}" if isinstance(limit.ge, int) else f"from {limit.ge}"
        elif isinstance(limit, annotated_types.Gt):
            low = f"above {limit.gt}"
        elif isinstance(limit, annotated_types.Le):
            high = f"to {limit.le}"
        elif isinstance(limit, annotated_types.Lt):
            high = f"to below {limit.lt}"
    if low and not high:
        low = low.replace("from", "of at least")
    return "".join(f" {words}" for words in (low, high) if words)


def _sentence(cls: type[Settings], problem: Any) -> str:
    """Turn one of pydantic's error entries into a clause with the names of the command line."""
    if not problem["loc"]:  # from a model validator, about several fields
        return str(problem["ctx"]["error"])
    key = str(problem["loc"][0])
    name = f"{cls.section}.{key}" if cls.section else key
    field = cls.model_fields.get(key)
    if field is None:
        prefix = name.removesuffix(key)
        return f"unknown setting {name}{did_you_mean(name, [prefix + valid for valid in cls.model_fields])}"
    value = problem["input"]
    shown = repr(value) if isinstance(value, str) else as_typed(value)
    if len(shown) > _MOST_SHOWN:
        shown = f"{shown[:_MOST_SHOWN]}..."
    if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
        example = next(iter(field.annotation.model_fields))
        text = repr(value) if isinstance(value, str) else "..."
        return (
            f"{name} = {shown} is not allowed; {name} is a section of settings, as in"
            f' Config({name}={{"{example}": {text}}}), or {name}.{example}=... on the command line'
        )
    return f"{name} = {shown} is not allowed; it takes {allowed_values(field)}"


def as_typed(value: Any) -> str:
    """A value as typed on the command line after `section.key=`."""
    if isinstance(value, tuple):
        return f"[{','.join(map(as_typed, value))}]"
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)
