"""Parse an expression of `--where`, and compute it on Arrow arrays: the allowed nodes, one line each."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import reduce
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from samray.config.base import did_you_mean
from samray.errors import ConfigError

if TYPE_CHECKING:
    from sqlglot import exp

Values = Any
"""A pa.Array, or a pa.Scalar with the value of all rows."""
Columns = Callable[[str], Values]

QUALITY: Final = "quality."
"""Before the name of a column of `samray quality`."""
MAX_CHARACTERS: Final = 10_000

_COMPARISONS: Final = {
    "EQ": pc.equal,
    "NEQ": pc.not_equal,
    "GT": pc.greater,
    "GTE": pc.greater_equal,
    "LT": pc.less,
    "LTE": pc.less_equal,
}
_TEXT: Final = {"StartsWith": pc.starts_with, "EndsWith": pc.ends_with, "Contains": pc.match_substring}
_PLAIN: Final = {
    "Abs": pc.abs,
    "Sqrt": pc.sqrt,
    "Ln": pc.ln,
    "Floor": pc.floor,
    "Ceil": pc.ceil,
    "Lower": pc.utf8_lower,
    "Upper": pc.utf8_upper,
}
FUNCTIONS: Final = (
    "abs", "sqrt", "ln", "log10", "floor", "ceil", "greatest", "least", "coalesce", "lower", "upper", "length",
    "starts_with", "ends_with", "contains", "regexp_matches",
)  # fmt: skip
_ALLOWED: Final = (
    "comparisons, and, or, not, in, between, like, is null, + - * / % //, list[1], and the functions "
    f"{', '.join(FUNCTIONS)}"
)


def name_of(column: exp.Column) -> str:
    """A column's name, in lower case; with its table only for those of quality, which may be named like others."""
    name = column.name.lower()
    return f"{QUALITY}{name}" if column.table.lower() == QUALITY[:-1] else name


def parse(text: str) -> Iterator[tuple[exp.Expr, list[tuple[str, str]]]]:
    """The terms that `and` joins, each with its columns as (qualifier or "", `name_of`), in lower case.

    Raises: ConfigError for what is not a SQL expression or uses what is not allowed.
    """
    from sqlglot import errors, exp, parse_one

    if len(text) > MAX_CHARACTERS:
        raise ConfigError(f"where: {len(text):,} characters, more than the {MAX_CHARACTERS:,} allowed")
    try:
        tree = parse_one(text, dialect="duckdb")
        _check(tree)
    except errors.SqlglotError as error:
        raise ConfigError(f"where: {text!r} is not a SQL expression: {_reason(error)}") from None
    except RecursionError:
        raise ConfigError("where: too many parentheses") from None
    for term in _split(tree):
        columns = [(column.table.lower(), name_of(column)) for column in term.find_all(exp.Column)]
        yield term, columns


def _reason(error: Any) -> str:
    details = getattr(error, "errors", None)
    if not details:
        return "it is empty" if "No expression" in str(error) else str(error).splitlines()[0]
    first = details[0]
    what = first["description"].split(":")[0] if "Required" in first["description"] else first["description"]
    what = "something is missing" if what.startswith("Required") else what.lower()
    return f"{what}, at {first['highlight']!r} (character {first['col']})"


def _split(tree: exp.Expr) -> Iterator[exp.Expr]:
    from sqlglot import exp

    # Not recursive on the left: a long chain of `and` is a deep tree there.
    if isinstance(tree, exp.Paren):
        yield from _split(tree.this)
    elif isinstance(tree, exp.And):
        for part in tree.flatten():
            yield from _split(part)
    else:
        yield tree


_ARGUMENTS: Final = {
    "Column": {"this", "table"},
    "Literal": {"this", "is_string"},
    "In": {"this", "expressions"},
    "Like": {"this", "expression", "negate"},
    "ILike": {"this", "expression", "negate"},
    "Between": {"this", "low", "high"},
    "Div": {"this", "expression", "typed", "safe"},
    "Greatest": {"this", "expressions", "ignore_nulls"},
    "Least": {"this", "expressions", "ignore_nulls"},
    "Coalesce": {"this", "expressions"},
    "Bracket": {"this", "expressions", "offset"},
    "Identifier": {"this", "quoted"},
}
"""Node -> the arguments that are computed; {this, expression} for the others. Another argument, such as the query of
`in (select ...)`, is refused rather than ignored."""


def _check(tree: exp.Expr) -> None:
    """Raises: ConfigError for the first node that is not allowed."""
    for node in tree.walk():
        name = type(node).__name__
        if name not in _NODES and name != "Identifier":
            raise ConfigError(f"where: {shown(node)} is not allowed{_near(node)}; an expression takes {_ALLOWED}")
        known = _ARGUMENTS.get(name, {"this", "expression"})
        extra = [key for key, value in node.args.items() if value and key not in known]
        if extra:
            raise ConfigError(f"where: {shown(node)} is not allowed; an expression takes {_ALLOWED}")


def _near(node: exp.Expr) -> str:
    return did_you_mean(str(node.this), FUNCTIONS) if type(node).__name__ == "Anonymous" else ""


def shown(node: exp.Expr) -> str:
    text = str(node.sql(dialect="duckdb", normalize_functions=False))
    return text if len(text) <= 60 else f"{text[:57]}..."


def evaluate(node: exp.Expr, columns: Columns) -> Values:
    """Compute a checked tree. columns: name, in lower case -> values.

    Raises: ConfigError for values of types that do not go together.
    """
    try:
        return _NODES[type(node).__name__](node, lambda part: evaluate(part, columns), columns)
    except (pa.ArrowException, TypeError, OverflowError) as error:
        # pyarrow names functions and types, the reader knows the expression.
        raise ConfigError(f"where: {shown(node)} does not fit the types of its columns: {error}") from None


Compute = Callable[[Any], Values]


def _binary(function: Callable[..., Any]) -> Callable[[Any, Compute, Columns], Values]:
    return lambda node, of, columns: function(of(node.this), of(node.expression))


def _with_text(function: Callable[..., Any]) -> Callable[[Any, Compute, Columns], Values]:
    return lambda node, of, columns: function(of(node.this), _text(node.expression))


def _chain(function: Callable[..., Any]) -> Callable[[Any, Compute, Columns], Values]:
    # A loop: a chain of a thousand terms is a tree of that depth.
    return lambda node, of, columns: reduce(function, (of(part) for part in node.flatten(unnest=False)))


def _unary(function: Callable[..., Any]) -> Callable[[Any, Compute, Columns], Values]:
    return lambda node, of, columns: function(of(node.this))


def _literal(node: Any, of: Compute, columns: Columns) -> Values:
    if node.is_string:
        return pa.scalar(node.this)
    try:
        return pa.scalar(int(node.this), pa.int64())
    except ValueError:
        return pa.scalar(float(node.this))
    except OverflowError:
        raise ConfigError(f"where: {node.this} is too large a number") from None


def _text(node: Any) -> str:
    if type(node).__name__ != "Literal" or not node.is_string:
        raise ConfigError(f"where: expected text in single quotes in place of {shown(node)}")
    return str(node.this)


def _matches(node: Any, of: Compute, columns: Columns) -> Values:
    pattern, ignore_case = _text(node.expression), type(node).__name__ == "ILike"
    if "\\" in pattern:
        # Without an escape character, as in DuckDB. Arrow's has one, and takes it literally in some patterns.
        wild = {"%": ".*", "_": "."}
        regex = "".join(wild.get(character) or re.escape(character) for character in pattern)
        is_match = pc.match_substring_regex(of(node.this), f"(?s)^{regex}$", ignore_case=ignore_case)
    else:
        is_match = pc.match_like(of(node.this), pattern, ignore_case=ignore_case)
    return pc.invert(is_match) if node.args.get("negate") else is_match


def _is_in(node: Any, of: Compute, columns: Columns) -> Values:
    values, wanted = of(node.this), [of(part) for part in node.expressions]
    if any(not isinstance(value, pa.Scalar) for value in wanted):
        raise ConfigError(f"where: expected a list of numbers or text in {shown(node)}")
    # Of null it is not known whether it is one of them; nor of any other value, if one of them is null.
    known = [value.as_py() for value in wanted if value.is_valid]
    unknown = pa.scalar(None if len(known) < len(wanted) else False, pa.bool_())
    value_set = pa.array(known)
    if pa.types.is_integer(values.type) and pa.types.is_floating(value_set.type):
        values = pc.cast(values, pa.float64())
    is_member = pc.is_in(values, value_set=value_set.cast(values.type) if known else pa.array([], values.type))
    is_member = pc.if_else(is_member, True, unknown)
    return pc.if_else(pc.is_valid(values), is_member, pa.scalar(None, pa.bool_()))


def _is(node: Any, of: Compute, columns: Columns) -> Values:
    values, kind = of(node.this), type(node.expression).__name__
    if kind == "Null":
        return pc.is_null(values)
    if kind != "Boolean":
        raise ConfigError(f"where: {shown(node)} is not allowed: `is` takes null, true or false")
    return pc.fill_null(pc.equal(values, of(node.expression)), False)


def _between(node: Any, of: Compute, columns: Columns) -> Values:
    values = of(node.this)
    return pc.and_kleene(pc.greater_equal(values, of(node.args["low"])), pc.less_equal(values, of(node.args["high"])))


def _divide(node: Any, of: Compute, columns: Columns) -> Values:
    left, right = (pc.cast(of(part), pa.float64()) for part in (node.this, node.expression))
    return pc.divide(left, _not_zero(right))


def _not_zero(divisor: Values) -> Values:
    """Null in place of 0: what is divided by it is unknown, and not worth the end of a job."""
    return pc.if_else(pc.equal(divisor, 0), pa.scalar(None, divisor.type), divisor)


def _quotient(node: Any, of: Compute, columns: Columns) -> tuple[Values, Values, Values]:
    """Dividend, divisor and their whole quotient, rounded towards 0; null where the divisor is 0."""
    left, right = of(node.this), of(node.expression)
    if not (pa.types.is_integer(left.type) and pa.types.is_integer(right.type)):
        raise ConfigError(f"where: {shown(node)} takes whole numbers")
    right = _not_zero(right)
    return left, right, pc.divide(left, right)


def _remainder(node: Any, of: Compute, columns: Columns) -> Values:
    left, right, quotient = _quotient(node, of, columns)
    return pc.subtract(left, pc.multiply(right, quotient))


def _log(node: Any, of: Compute, columns: Columns) -> Values:
    if node.expression is not None and str(node.this) != "10":
        raise ConfigError(f"where: {shown(node)} is not allowed; use ln or log10")
    return pc.log10(of(node.this if node.expression is None else node.expression))


def _extreme(function: Callable[..., Any]) -> Callable[[Any, Compute, Columns], Values]:
    return lambda node, of, columns: function(of(node.this), *(of(part) for part in node.expressions))


def _element(node: Any, of: Compute, columns: Columns) -> Values:
    """list[i], which is null if the list is shorter. sqlglot counts from 0, DuckDB from 1."""
    lists = of(node.this)
    index = node.expressions[0] if len(node.expressions) == 1 else None
    if index is None or type(index).__name__ != "Literal" or index.is_string or not str(index.this).isdigit():
        raise ConfigError(f"where: {shown(node)} takes the number of an element, from 1 on, as in bbox[3]")
    if not (pa.types.is_list(lists.type) or pa.types.is_large_list(lists.type)):
        raise ConfigError(f"where: {shown(node.this)} is not a list, so it has no elements")
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    at = lists.offsets.to_numpy()[: len(lists)] + int(index.this)
    return lists.values.take(pa.array(at, mask=np.asarray(lengths <= int(index.this))))


def _length(node: Any, of: Compute, columns: Columns) -> Values:
    values = of(node.this)
    is_text = pa.types.is_string(values.type) or pa.types.is_large_string(values.type)
    return pc.utf8_length(values) if is_text else pc.list_value_length(values)


_NODES: Final[dict[str, Callable[[Any, Compute, Columns], Values]]] = {
    "Column": lambda node, of, columns: columns(name_of(node)),
    "Literal": _literal,
    "Boolean": lambda node, of, columns: pa.scalar(node.this),
    "Null": lambda node, of, columns: pa.scalar(None),
    "Paren": _unary(lambda values: values),
    "And": _chain(pc.and_kleene),
    "Or": _chain(pc.or_kleene),
    "Not": _unary(pc.invert),
    "Neg": _unary(pc.negate),
    # As in DuckDB a whole number beyond 64 bits is an error: the others would wrap around.
    "Add": _binary(pc.add_checked),
    "Sub": _binary(pc.subtract_checked),
    "Mul": _binary(pc.multiply_checked),
    "Div": _divide,
    "IntDiv": lambda node, of, columns: _quotient(node, of, columns)[2],
    "Mod": _remainder,
    "In": _is_in,
    "Is": _is,
    "Between": _between,
    "Like": _matches,
    "ILike": _matches,
    "RegexpLike": lambda node, of, columns: pc.match_substring_regex(of(node.this), _text(node.expression)),
    "Bracket": _element,
    "Log": _log,
    "Length": _length,
    "Greatest": _extreme(pc.max_element_wise),
    "Least": _extreme(pc.min_element_wise),
    "Coalesce": _extreme(pc.coalesce),
    **{name: _binary(function) for name, function in _COMPARISONS.items()},
    **{name: _unary(function) for name, function in _PLAIN.items()},
    **{name: _with_text(function) for name, function in _TEXT.items()},
}
"""Every node of sqlglot's that an expression may have, and how it is computed."""
