"""MkDocs hooks: fill in the parts of the reference that come from the code.

A line `<!-- generated: NAME -->` in a page is replaced by what the function NAME of `GENERATED` returns. So a new
command, setting, model or error appears in the documentation without a second edit.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer

import samray
from samray import errors
from samray.cli import main as cli
from samray.cli.help import EXIT_CODES
from samray.config import SECTIONS, Sections, preset_names, preset_path, setting_rows
from samray.config.base import as_typed
from samray.config.edges import EDGE_SECTIONS
from samray.config.embed import EMBED_SECTIONS
from samray.config.names import NAME_SECTIONS
from samray.sam.checkpoints import list_models
from samray.train.settings import TRAIN_SECTIONS

ROOT = Path(__file__).resolve().parents[2]

Row = tuple[str, ...]


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace each `<!-- generated: NAME -->` line. An unknown NAME raises KeyError and so ends the build."""
    return re.sub(r"^<!-- generated: (\S+) -->$", lambda mark: GENERATED[mark[1]](), markdown, flags=re.MULTILINE)


def table(head: Row, rows: list[Row]) -> str:
    """A Markdown table. Pipes are escaped, and so is `<` outside of code, which would begin an HTML tag."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(escape(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def escape(text: str) -> str:
    parts = text.split("`")
    return "`".join(part if i % 2 else part.replace("<", "&lt;") for i, part in enumerate(parts))


# --- command line -----------------------------------------------------------------------------------------------------


def commands() -> str:
    """Every command: usage, what it does, its arguments and options, from the typer app."""
    group = typer.main.get_command(cli.app)
    parts = []
    for name, command in walk(group, "samray"):
        context = command.make_context(name, [], resilient_parsing=True)
        usage = " ".join(command.collect_usage_pieces(context))
        records = [one.get_help_record(context) for one in command.get_params(context) if one.name != "help"]
        rows = [(f"`{record[0]}`", " ".join(record[1].split())) for record in records if record]
        text = f"## {name}\n\n```text\n{name} {usage}\n```\n\n{help_as_markdown(escape(command.help or ''))}\n"
        parts.append(text + ("\n" + table(("argument or option", "meaning"), rows) + "\n" if rows else ""))
    return "\n".join(parts)


def walk(group: Any, name: str) -> Iterator[tuple[str, Any]]:
    """(full name, command) of each command, groups of commands entered; a group that is a command itself, too."""
    for key, command in group.commands.items():
        if hasattr(command, "commands"):
            if command.invoke_without_command:
                yield f"{name} {key}", command
            yield from walk(command, f"{name} {key}")
        elif not command.hidden:
            yield f"{name} {key}", command


def help_as_markdown(text: str) -> str:
    """Typer's help, with the lines below `Examples:` as one block of commands."""
    words, _, examples = text.partition("Examples:")
    lines = [line.strip() for line in examples.splitlines() if line.strip()]
    return words.strip() + ("\n\n```bash\n" + "\n".join(lines) + "\n```" if lines else "")


# --- settings ---------------------------------------------------------------------------------------------------------


def settings_tables(sections: Sections) -> str:
    """A heading, the docstring and a table for each section."""
    parts = []
    for section, cls in sections.items():
        rows = []
        for row in setting_rows(section, sections):
            default = f"`{shown(row.default)}`"
            default += "".join(
                f"; `{shown(value)}` for `{preset}`" for preset, value in row.default_of_preset().items()
            )
            rows.append((f"`{row.name}`", default, row.allowed, f"{row.description}."))
        doc = escape(" ".join((cls.__doc__ or "").split()))
        parts.append(f"### {section}\n\n{doc}\n\n" + table(("setting", "default", "takes", "meaning"), rows))
    return "\n\n".join(parts)


def shown(default: Any) -> str:
    return f"{default:.4g}" if isinstance(default, float) else as_typed(default)


def presets() -> str:
    """The presets' files as they are."""
    files = {name: preset_path(name).read_text().strip() for name in preset_names()}
    return "\n\n".join(f"### {name}\n\n```yaml\n{text}\n```" for name, text in files.items())


def models() -> str:
    rows = [
        (
            f"`{m.name}`",
            f"{m.parameters / 1e6:.1f} M",
            f"{m.size_mb:,.1f} MB" if m.size_mb else "",
            m.licence,
            m.verified_by,
            m.source,
        )
        for m in list_models()
    ]
    return table(("name", "parameters", "file", "licence", "verified by", "from"), rows)


# --- API, errors, files -----------------------------------------------------------------------------------------------


def api() -> str:
    """mkdocstrings' marks for each public name, in the order of `samray.__all__`."""
    return "\n\n".join(f"::: samray.{name}" for name in samray.__all__)


def exit_codes() -> str:
    rows: list[Row] = [(f"`{code}`", f"{text[0].upper()}{text[1:]}.") for code, text in EXIT_CODES.items()]
    return table(("exit code", "meaning"), rows)


def error_classes() -> str:
    """The classes of `samray.errors`, with what each derives from and the first paragraph of its docstring."""
    found = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.SamrayError)]
    rows = []
    for cls in found:
        doc = " ".join((cls.__doc__ or "").split("\n\n")[0].split())
        rows.append((f"`{cls.__name__}`", f"`{cls.__bases__[0].__name__}`", doc))
    return table(("class", "is a", "meaning"), rows)


def file_map() -> str:
    """One row per module: its path, and the first sentence of its docstring."""
    parts = []
    for folder in ("samray", "jobs"):
        paths = sorted((ROOT / folder).rglob("*.py"), key=lambda path: (path.parent, path.name != "__init__.py", path))
        rows = [(f"`{path.relative_to(ROOT)}`", first_sentence(path)) for path in paths]
        parts.append(f"### {folder}/\n\n" + table(("file", "what it is for"), [row for row in rows if row[1]]))
    return "\n\n".join(parts)


def first_sentence(path: Path) -> str:
    """First paragraph of a module's docstring; empty if it has none."""
    paragraph = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0]
    return " ".join(paragraph.split())


GENERATED: dict[str, Callable[[], str]] = {
    "commands": commands,
    "settings": lambda: settings_tables(SECTIONS),
    "edge-settings": lambda: settings_tables({"edges": EDGE_SECTIONS["edges"]}),
    "embed-settings": lambda: settings_tables({"output": EMBED_SECTIONS["output"]}),
    "name-settings": lambda: settings_tables({"labels": NAME_SECTIONS["labels"], "model": NAME_SECTIONS["model"]}),
    "train-settings": lambda: settings_tables(TRAIN_SECTIONS),
    "presets": presets,
    "models": models,
    "api": api,
    "exit-codes": exit_codes,
    "errors": error_classes,
    "file-map": file_map,
    "CONTRIBUTING.md": (ROOT / "CONTRIBUTING.md").read_text,
    "CHANGELOG.md": (ROOT / "CHANGELOG.md").read_text,
}
"""Mark in a page -> what replaces it."""
