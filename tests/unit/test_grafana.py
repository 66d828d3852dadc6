"""The Grafana dashboard asks for nothing that is not exported, and shows all that is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import promql_parser
import pytest

from samray.pipeline import metrics
from tests.support import REPOSITORY

DASHBOARD = json.loads((REPOSITORY / "configs" / "grafana" / "samray.json").read_text())
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]

OF_RAY = {"ray_actors", "ray_node_gpus_utilization", "ray_node_gram_used"}
"""Ray's own, see `ray/dashboard/modules/metrics/dashboards` of the installed Ray."""

TAGS = {tag for _, tags in metrics.COUNTERS.values() for tag in tags} | {"le"}
TAGS_OF_OTHERS = {"instance", "GpuIndex", "SessionName", "Name", "State"}
VARIABLES = {"$datasource", "$session", "$__rate_interval", "$__all"}


def parsed(expression: str) -> Any:
    return promql_parser.parse(expression.replace("$__rate_interval", "5m"))


def nodes(tree: Any) -> Iterator[Any]:
    yield tree
    for name in ("lhs", "rhs", "expr", "args", "vector_selector"):
        below = getattr(tree, name, None)
        for part in below if isinstance(below, list) else [below]:
            if part is not None:
                yield from nodes(part)


def names_in(expression: str) -> set[str]:
    return {node.name for node in nodes(parsed(expression)) if isinstance(node, promql_parser.VectorSelector)}


def test_a_wrong_expression_is_noticed() -> None:
    with pytest.raises(ValueError, match="parenthesis"):
        parsed("sum(rate(ray_samray_images_total[5m])")
    assert names_in("1 - sum(rate(a_total[$__rate_interval])) / (b + c{x='y'})") == {"a_total", "b", "c"}


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_each_expression_asks_for_what_is_exported(expression: str) -> None:
    names = names_in(expression)
    assert names
    assert names <= metrics.exported_names() | OF_RAY
    tree = list(nodes(parsed(expression)))
    for node in tree:
        if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
            assert set(node.modifier.labels) <= TAGS | TAGS_OF_OTHERS
        if isinstance(node, promql_parser.VectorSelector):
            matched = {matcher.name for matcher in node.matchers.matchers}
            assert "SessionName" in matched  # the variable at the top of the page holds for every panel
            assert matched <= TAGS_OF_OTHERS
    for name in names:
        if name.endswith(("_total", "_bucket")):  # what only ever grows says nothing by itself
            assert re.search(rf"rate\({name}\{{", expression)


def test_all_that_is_exported_is_shown() -> None:
    shown = set().union(*(names_in(expression) for expression in EXPRESSIONS))
    unshown = metrics.exported_names() - shown
    assert unshown == {"ray_samray_shard_seconds_sum", "ray_samray_shard_seconds_count"}


def test_panels_lie_side_by_side() -> None:
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    boxes = [panel["gridPos"] for panel in PANELS]
    for box in boxes:
        assert 0 <= box["x"] < box["x"] + box["w"] <= 24
        assert box["h"] > 0
    for a, b in combinations(boxes, 2):
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        above = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert beside or above, (a, b)


def test_every_query_goes_to_the_chosen_datasource() -> None:
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    for panel in PANELS:
        assert panel["datasource"] == chosen
        assert [target["refId"] for target in panel["targets"]] == sorted({t["refId"] for t in panel["targets"]})
        assert all(target["datasource"] == chosen for target in panel["targets"])
        assert panel["title"]
        assert panel["description"]
    assert [variable["name"] for variable in DASHBOARD["templating"]["list"]] == ["datasource", "session"]
    used = set(re.findall(r"\$\w+", json.dumps(DASHBOARD).replace("${", "$")))
    assert used == VARIABLES
    assert DASHBOARD["refresh"]
    assert DASHBOARD["schemaVersion"] >= 36
