"""Additions to click's `--help`: every setting with its default, and the exit codes."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console
from rich.markup import escape
from typer.core import TyperCommand, TyperGroup

from samray.config import SECTIONS, Sections, SettingRow, preset_names, setting_rows
from samray.config.base import as_typed
from samray.errors import ConfigError
from samray.text import abridged, two_columns

EXIT_CODES = {
    0: "success",
    1: "the run failed: a shard is missing, too many images failed, or `verify` found a problem",
    2: "wrong usage or configuration; nothing was run",
    3: "storage could not be read or written",
    130: "interrupted by Ctrl-C; run the same command to resume",
    143: "stopped by SIGTERM; run the same command to resume",
}


class HelpfulGroup(TyperGroup):
    """A group whose `--help` ends with the exit codes."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        _print_exit_codes(Console())


class Command(TyperCommand):
    """A command whose `--help` ends with the exit codes."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        _print_exit_codes(Console())


class CommandWithSettings(TyperCommand):
    """A command whose `--help` also lists every setting, generated from the settings classes."""

    sections: ClassVar[Sections] = SECTIONS
    """The sections of settings that the command takes."""
    has_presets: ClassVar[bool] = True

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        console = Console()
        for section, cls in self.sections.items():
            console.print(f"[bold]{section}[/bold]: {escape(' '.join((cls.__doc__ or '').split()))}")
            table = two_columns()
            for row in setting_rows(section, self.sections):
                default = escape(f"[{_default_in_words(row)}]")
                names = f": {row.allowed}" if row.is_name else ""
                table.add_row(f"[cyan]{row.name}[/cyan]", f"{escape(row.description + names)} [dim]{default}[/dim]")
            console.print(table)
        if self.has_presets:
            presets = ", ".join(preset_names())
            console.print(f"[bold]presets[/bold]: {presets} (YAML files in the format of --config)\n")
        _print_exit_codes(console)


def _print_exit_codes(console: Console) -> None:
    console.print("[bold]exit codes[/bold]")
    table = two_columns()
    for code, meaning in EXIT_CODES.items():
        table.add_row(f"[cyan]{code}[/cyan]", meaning)
    console.print(table)
    console.print("Set SAMRAY_DEBUG=1 to see the traceback of an error.\n")


def split_settings(words: list[str], needed: list[str], sections: Sections = SECTIONS) -> tuple[list[str], list[str]]:
    """Separate settings from other arguments, in any order.

    An argument that looks like a setting counts as one unless a path of that name exists: a mistyped setting is then
    reported as such. Raises ConfigError if fewer other arguments are left than are needed.
    """
    known = rf"({'|'.join(sections)})\.\w+="
    settings = [
        word
        for word in words
        if re.match(known, word) or (re.match(r"[A-Za-z_]\w*(\.\w+)?=[^/]*$", word) and not Path(word).exists())
    ]
    others = [word for word in words if word not in settings]
    if len(others) < len(needed):
        raise ConfigError(f"Missing argument '{needed[len(others)]}' (see samray --help)")
    return settings, others


def refuse_expanded_glob(words: list[str]) -> None:
    """Raises: ConfigError if the shell expanded a pattern: more than two arguments, and an inner one is an existing
    path.

    words: the arguments that are not settings.
    """
    existing = [word for word in words if Path(word).exists()]
    if len(words) <= 2 or not any(word in existing for word in words[1:-1]):
        return
    files = [Path(word) for word in existing if Path(word).is_file()] or [Path(words[0])]
    endings = {path.suffix for path in files}
    folder = Path(os.path.commonpath([path.parent for path in files]))
    pattern = folder / f"*{endings.pop() if len(endings) == 1 else ''}"
    raise ConfigError(
        f"expected INPUT and OUTPUT, got {len(words)} arguments: {abridged(words, 3)}; "
        f"if the shell expanded a pattern, quote it: '{pattern}'"
    )


def _default_in_words(row: SettingRow) -> str:
    """`0.7`, or `0.5 for tiny, else 0.88`."""
    of_presets = [f"{_in_words(default)} for {preset}, " for preset, default in row.default_of_preset().items()]
    return "".join(of_presets) + ("else " if of_presets else "") + _in_words(row.default)


def _in_words(default: Any) -> str:
    if isinstance(default, float):
        return f"{default:.4g}"
    return f"{default:_}" if isinstance(default, int) and not isinstance(default, bool) else as_typed(default)
