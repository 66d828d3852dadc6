"""The table of formats, one row each. All code that depends on the set of formats uses it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from samray.config.base import did_you_mean
from samray.errors import ConfigError
from samray.exports import coco, flat, geojson, geoparquet, label_map, sa1b, saco, yolo
from samray.exports.base import ExportOptions, Format, as_option

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

FORMATS: Final[dict[str, Format]] = {
    "sa1b": sa1b.FORMAT,
    "coco": coco.FORMAT,
    "yolo": yolo.FORMAT,
    "flat": flat.FORMAT,
    "label-map": label_map.FORMAT,
    "saco": saco.FORMAT,
    "geojson": geojson.FORMAT,
    "geoparquet": geoparquet.FORMAT,
}


def find_format(name: str) -> Format:
    """The row with this name. Raises: ConfigError that names the closest one."""
    if name not in FORMATS:
        raise ConfigError(f"unknown format {name!r}{did_you_mean(name, FORMATS)}; formats are {', '.join(FORMATS)}")
    return FORMATS[name]


def options_of(name: str, values: Mapping[str, Any]) -> ExportOptions:
    """The options of a format with these values. None, and False for an option of another format, count as not given.

    Raises: ConfigError for an option that the format does not have, and for an invalid value.
    """
    cls = find_format(name).options
    for option, value in values.items():
        if option in cls.model_fields or value is None or value is False:
            continue
        others = [other for other, row in FORMATS.items() if option in row.options.model_fields]
        if others:
            raise ConfigError(f"{as_option(option)} is an option of {' and '.join(others)}, not of {name}")
        near = did_you_mean(option, option_fields())
        raise ConfigError(f"unknown option {option}{near}; {_options_in_words(name)}")
    return cls(**{key: value for key, value in values.items() if key in cls.model_fields and value is not None})


def _options_in_words(name: str) -> str:
    options = ", ".join(FORMATS[name].options.model_fields)
    return f"options of {name} are {options}" if options else f"{name} has no options"


def option_fields() -> dict[str, dict[str, FieldInfo]]:
    """Option -> the formats that have it, each with the field of its options class."""
    fields: dict[str, dict[str, FieldInfo]] = {}
    for name, row in FORMATS.items():
        for option, field in row.options.model_fields.items():
            fields.setdefault(option, {})[name] = field
    return fields


def option_help(fields: Mapping[str, FieldInfo]) -> str:
    """The help texts of an option, each followed by the formats that it applies to."""
    formats: dict[str, list[str]] = {}
    for name, field in fields.items():
        formats.setdefault((field.description or "").rstrip(".\n"), []).append(name)
    return " ".join(f"{text} ({', '.join(names)})." for text, names in formats.items())
