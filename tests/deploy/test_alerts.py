"""Alerts and board ask for metrics that exist, by labels they have."""

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import promql_parser
import pytest

from fraud_nb.apps.metrics import WorkerCollector
from fraud_nb.decision.breaker import Breaker
from fraud_nb.domain.schema import Outcome
from fraud_nb.pipeline.stream import Counts
from tests.deploy.kit import ROOT, compose, documents

TARGET = {"job", "instance"}  # labels that Prometheus adds
OTHERS = {  # of the prediction service and of the scheduler
    "fraud_http_requests_total": {"route", "status"},
    "fraud_http_request_seconds_bucket": {"route", "le"},
    "fraud_http_decisions_total": {"outcome", "features", "recorded"},
    "fraud_job_runs_total": {"job", "outcome"},
    "fraud_job_last_success_timestamp_seconds": {"job"},
    "up": set(),
}


def worker_metrics() -> dict[str, set[str]]:
    """Every series a worker shows, with its labels."""
    counts = Counts()
    counts.outcomes[Outcome.APPROVE], counts.newest_record_ms = 1, 1
    worker = SimpleNamespace(counts=counts, model=SimpleNamespace(version=1), breaker=Breaker())
    collector = WorkerCollector(worker, SimpleNamespace(labels=0, dead_letters=0))  # type: ignore[arg-type]
    samples = (sample for family in collector.collect() for sample in family.samples)
    return {sample.name: set(sample.labels) for sample in samples}


METRICS = worker_metrics() | OTHERS
RULES = [rule for group in documents(ROOT / "deploy/prometheus/alerts.yml")[0]["groups"] for rule in group["rules"]]
BOARD = json.loads((ROOT / "deploy/grafana/boards/fraud.json").read_text(encoding="utf-8"))
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
QUERIES = [target for panel in PANELS for target in panel["targets"]]


def parts(expression: Any) -> Iterator[Any]:
    """An expression of PromQL and everything within it."""
    yield expression
    for name in ("expr", "lhs", "rhs", "param", "vector_selector"):
        if (inner := getattr(expression, name, None)) is not None:
            yield from parts(inner)
    for argument in getattr(expression, "args", None) or ():
        yield from parts(argument)


def check(text: str) -> set[str]:
    """The metrics asked for; fails on unknown ones, and on labels they do not have."""
    found = list(parts(promql_parser.parse(text.replace("$__rate_interval", "1m"))))
    asked = [each for each in found if isinstance(each, promql_parser.VectorSelector)]
    assert asked, f"{text}: asks for nothing"
    for each in asked:
        assert each.name in METRICS, f"{text}: nobody shows {each.name}"
        labels = {matcher.name for matcher in each.matchers.matchers}
        assert labels <= METRICS[each.name] | TARGET, f"{text}: {each.name} has no {labels - METRICS[each.name]}"
    known = set.union(TARGET, *(METRICS[each.name] for each in asked))
    for each in found:
        if isinstance(each, promql_parser.AggregateExpr) and each.modifier is not None:
            assert set(each.modifier.labels) <= known, f"{text}: grouped by a label that nothing in it has"
    return {each.name for each in asked}


def test_the_check_finds_what_is_wrong() -> None:
    assert check("sum by (outcome) (rate(fraud_decisions_total[1m]))") == {"fraud_decisions_total"}
    for wrong in (
        "fraud_decision_total",
        'fraud_decisions_total{result="approve"}',
        "sum by (result) (fraud_decisions_total)",
        "1 + 1",
    ):
        with pytest.raises(AssertionError):
            check(wrong)
    with pytest.raises(ValueError, match="expected type matrix"):
        check("rate(fraud_decisions_total)")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_rule_asks_for_what_exists_and_says_what_to_do(rule: dict[str, Any]) -> None:
    check(rule["expr"])
    assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
    assert rule["labels"]["severity"] in ("page", "ticket")
    assert set(rule["annotations"]) == {"summary", "description"}


def test_names_of_rules_differ() -> None:
    assert len({rule["alert"] for rule in RULES}) == len(RULES)


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_panel_asks_for_what_exists(panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        check(target["expr"])
        assert target["datasource"]["uid"] == "prometheus"


def test_all_that_a_worker_shows_is_on_the_board() -> None:
    shown = set().union(*(check(target["expr"]) for target in QUERIES))
    left_out = {"fraud_records_total", "fraud_latency_seconds_count", "fraud_latency_seconds_sum"}
    left_out |= {"fraud_state_lag_seconds_count", "fraud_state_lag_seconds_sum"}
    assert set(worker_metrics()) - shown == left_out


def test_panels_do_not_overlap() -> None:
    places = [
        (x, y)
        for box in (panel["gridPos"] for panel in BOARD["panels"])
        for x in range(box["x"], box["x"] + box["w"])
        for y in range(box["y"], box["y"] + box["h"])
    ]
    assert len(set(places)) == len(places) and max(x for x, _ in places) < 24


def test_scrapes_go_where_metrics_are() -> None:
    (scrape,) = documents(ROOT / "deploy/prometheus/prometheus.yml")
    assert all((ROOT / "deploy/prometheus" / name).is_file() for name in scrape["rule_files"])
    services, jobs = compose()["services"], {each["job_name"]: each for each in scrape["scrape_configs"]}
    for name in ("worker", "scheduler"):
        port = services[name]["command"][-1]
        said = json.dumps(jobs[name])
        assert f'"{name}:{port}"' in said or (f'"names": ["{name}"]' in said and f'"port": {port}' in said)
    assert jobs["scheduler"]["honor_labels"], "its own label `job` would be renamed"
    assert {rule_job for rule in RULES for rule_job in jobs if f'job="{rule_job}"' in rule["expr"]} == set(jobs)


def test_grafana_finds_board_and_source() -> None:
    folder = ROOT / "deploy/grafana/provisioning"
    (source,) = documents(folder / "datasources/prometheus.yml")[0]["datasources"]
    (provider,) = documents(folder / "dashboards/boards.yml")[0]["providers"]
    assert source["uid"] == "prometheus" and source["url"] == "http://prometheus:9090"
    mounts = dict(volume.split(":")[:2] for volume in compose()["services"]["grafana"]["volumes"])
    assert mounts["./deploy/grafana/boards"] == provider["options"]["path"]


def test_every_alert_has_a_section_of_the_runbook() -> None:
    """In the order of the rules, and each says what it means, what to look at and what to do."""
    text = (ROOT / "docs/runbook.md").read_text(encoding="utf-8")
    sections = dict(part.split("\n", 1) for part in text.split("\n## ")[1:])
    alerts = [rule["alert"] for rule in RULES]
    assert list(sections)[: len(alerts)] == alerts
    for alert in alerts:
        assert all(word in sections[alert].lower() for word in ("**means**", "**look at**", "**do**")), alert
