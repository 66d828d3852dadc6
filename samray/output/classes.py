"""The classes of an output: the names that the run asked for, then one more class for masks without a name.

An output without names has that class alone. It is called "object", as in exports of class-agnostic masks elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from samray import storage
from samray.errors import StorageError
from samray.output.plan import Plan
from samray.output.schema import categories_of, num_common_of

UNNAMED: Final = "object"
_UNNAMED: Final = re.compile(f"(unnamed )*{UNNAMED}")


@dataclass(frozen=True, slots=True)
class Classes:
    """Names with their index, from 0 on."""

    names: tuple[str, ...]
    """In the order of the run's `categories`; empty for a run without names."""
    common: frozenset[str]
    """The names that were asked of every image; others were asked of single images."""
    unnamed: str
    """The class of masks without a name, after all others; different from each of them."""
    where: str
    """The output, for messages."""
    _index: Mapping[str | None, int] = field(repr=False)

    def indices(self, labels: Iterable[str | None], num_masks: int) -> list[int]:
        """The class of each mask. labels: empty in an output without names.

        Raises: StorageError for a name that the run did not ask for: OUTPUT is damaged.
        """
        try:
            return [self._index[label] for label in labels] or [len(self.names)] * num_masks
        except KeyError as error:
            raise StorageError(
                f"a mask of {self.where} has the name {error.args[0]!r}, which is not one of those asked for; "
                "`samray verify` finds all such problems"
            ) from None

    def all(self, *, with_unnamed: bool) -> list[str]:
        """All names in the order of their index. with_unnamed: whether a mask has no name."""
        return [*self.names, self.unnamed] if with_unnamed or not self.names else list(self.names)


def classes_of(plan: Plan) -> Classes:
    """The classes of an output."""
    names = tuple(categories_of(plan.run["identity"]) or ())
    unnamed = UNNAMED
    while unnamed in names:
        unnamed = f"unnamed {unnamed}"
    index = {name: number for number, name in enumerate((*names, None))}
    common = frozenset(names[: num_common_of(plan.run["identity"])])
    return Classes(names, common, unnamed, storage.redact(plan.output), index)


def means_unnamed(category: Mapping[str, Any]) -> bool:
    """Whether an element of COCO's `categories` is the class of masks without a name, as `coco` writes it."""
    name = category.get("name")
    # The supercategory tells it from a class that somebody called "object".
    return category.get("supercategory") == UNNAMED and isinstance(name, str) and looks_unnamed(name)


def looks_unnamed(name: str) -> bool:
    """Whether the class of masks without a name may have this name. Annotation tools keep no more of a class."""
    return _UNNAMED.fullmatch(name) is not None
