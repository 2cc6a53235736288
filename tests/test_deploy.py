"""What is in deploy/: every query can be parsed, and asks for metrics and labels that there are."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from service import metrics

DEPLOY = Path(__file__).parents[1] / "deploy"
ALERTS = DEPLOY / "prometheus" / "alerts.yml"
DASHBOARD = DEPLOY / "grafana" / "recurra.json"

ADDED = {"instance", "job"}
"""labels that Prometheus adds to whatever it scrapes"""


def samples() -> dict[str, set[str]]:
    """Name of a sample -> its labels, for all that the service offers and what Prometheus says of a target."""
    found: dict[str, set[str]] = {"up": set()}
    for metric in vars(metrics).values():
        if isinstance(metric, metrics.Counter):
            found[f"{metric._name}_total"] = set(metric._labelnames)
        elif isinstance(metric, metrics.Gauge):
            found[metric._name] = set(metric._labelnames)
        elif isinstance(metric, metrics.Histogram):
            for suffix in ("_bucket", "_sum", "_count"):
                found[metric._name + suffix] = {*metric._labelnames, *(("le",) if suffix == "_bucket" else ())}
    for family in metrics.ProcessCollector(registry=None).collect():
        found |= {sample.name: set(sample.labels) for sample in family.samples}
    return found


def rules() -> list[Any]:
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def dashboard() -> Any:  # noqa: ANN401 (any JSON)
    return json.loads(DASHBOARD.read_text())


def queries() -> dict[str, str]:
    """Where it stands -> the query, Grafana's variables filled in."""
    found = {f"alert {rule['alert']}": rule["expr"] for rule in rules()}
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            filled = target["expr"].replace("$__rate_interval", "5m")
            found[f"panel {panel['title']} {target['refId']}"] = re.sub(r"\$\w+", ".+", filled)
    return found


def parts(expression: Any) -> Iterator[Any]:  # noqa: ANN401 (the parser has no types)
    """An expression and all within it."""
    yield expression
    for name in ("lhs", "rhs", "expr", "param", "vector_selector"):
        if getattr(expression, name, None) is not None:
            yield from parts(getattr(expression, name))
    for argument in getattr(expression, "args", ()):
        yield from parts(argument)


@pytest.mark.parametrize("where", queries())
def test_a_query_asks_for_what_there_is(where: str) -> None:
    query, known = queries()[where], samples()
    found = list(parts(promql_parser.parse(query)))
    selectors = [part for part in found if isinstance(part, promql_parser.VectorSelector)]
    assert {one.name for one in selectors} == set(re.findall(r"\b(?:recurra|process)_\w+|\bup\b", query))
    labels: set[str] = set(ADDED)
    for one in selectors:
        labels |= known[one.name]
        assert {matcher.name for matcher in one.matchers.matchers} <= known[one.name] | ADDED
    for part in found:
        if isinstance(part, promql_parser.AggregateExpr) and part.modifier is not None:
            assert set(part.modifier.labels) <= labels
    for expected, function in (("_total", "rate"), ("_bucket", "rate")):
        if any(one.name.endswith(expected) for one in selectors):
            assert any(getattr(getattr(part, "func", None), "name", "") in (function, "increase") for part in found)


def test_an_alert_says_what_it_is_and_what_to_do() -> None:
    assert len({rule["alert"] for rule in rules()}) == len(rules()) >= 5
    for rule in rules():
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"]["summary"] and rule["annotations"]["description"]
        for label in re.findall(r"\$labels\.(\w+)", json.dumps(rule["annotations"])):
            assert label == "instance" or re.search(rf"by \([^)]*\b{label}\b", rule["expr"])


def test_the_dashboard_shows_every_metric_of_the_service() -> None:
    shown = " ".join(queries().values())
    assert [
        name for name in samples() if name.startswith("recurra_") and name.endswith("_total") and name not in shown
    ] == []
    for panel in dashboard()["panels"]:
        assert panel["title"] and panel["description"] and panel["fieldConfig"]["defaults"]["unit"]
    asked = [one["definition"] for one in dashboard()["templating"]["list"] if one["type"] == "query"]
    assert all(re.fullmatch(r"label_values\((\w+), \w+\)", one)[1] in samples() for one in asked)  # type: ignore[index]


def test_prometheus_takes_the_rules() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed")
    for arguments in (["rules", ALERTS], ["config", ALERTS.with_name("prometheus.yml")]):
        checked = subprocess.run([promtool, "check", *arguments], capture_output=True, text=True, timeout=60)
        assert checked.returncode == 0, checked.stdout + checked.stderr
