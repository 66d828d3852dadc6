"""The names in COCO's and LVIS's `categories`: which category ids mean which name, for each file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from samray.errors import ConfigError
from samray.imports.places import printable
from samray.output.classes import means_unnamed
from samray.output.plan import Plan
from samray.output.schema import categories_of

MAX_NAMES: Final = 65_534
"""The metadata of every shard list the names; and a label map of 16 bits has no more classes."""
_MAX_CHARS: Final = 1000

NameOf = dict[Any, str | None]
"""Category id -> name; None for the class of masks without a name."""


def names_in(plan: Plan) -> frozenset[str] | None:
    """The names of an output that is being written; None if it has none."""
    names = categories_of(plan.run["identity"])
    return None if names is None else frozenset(names)


@dataclass
class Categories:
    """The categories of several files, each with ids of its own."""

    of_file: dict[int, NameOf] = field(default_factory=dict)
    """File index -> its names, for files that have any."""
    _names: dict[str, None] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """All names, each once, in the order of the files."""
        return list(self._names)

    def add(self, file: int, id: Any, category: dict[str, Any]) -> None:
        """Add an element of a file's `categories`; one without a name is ignored. Raises: ConfigError if there are too
        many."""
        name = category.get("name")
        if means_unnamed(category):
            self.of_file.setdefault(file, {})[id] = None
        elif isinstance(name, str) and name:
            name = printable(name)[:_MAX_CHARS]
            self.of_file.setdefault(file, {})[id] = name
            self._names[name] = None
        if len(self._names) > MAX_NAMES:
            raise ConfigError(f"SOURCE has more than {MAX_NAMES} categories, which are not supported")

    def names_of(self, file: int) -> NameOf:
        """The names that a file's annotations mean. A list of results has none of its own: it means those of the other
        files, except for ids that have different names there."""
        if file in self.of_file:
            return self.of_file[file]
        merged: NameOf = {}
        clashing = set()
        for names in self.of_file.values():
            clashing |= {id for id, name in names.items() if merged.setdefault(id, name) != name}
        return {id: name for id, name in merged.items() if id not in clashing}
