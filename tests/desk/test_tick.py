"""From rows to what the page is told: without a browser and without a database."""

import math
import struct
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from fraud_nb.adapters.desk import (
    SCORE_EDGES,
    Alert,
    Case,
    Counts,
    Look,
    Purchase,
    Seen,
    Spot,
    Verdict,
    latency_buckets,
)
from fraud_nb.adapters.postgres import standing_verdicts
from fraud_nb.apps.dashboard import (
    Latency,
    case_of,
    categories_of,
    dashboard_environment,
    frame_of,
    normal_of,
    quantile,
    request_of,
    share,
    tick_of,
    waterfall_of,
)
from fraud_nb.apps.metrics import WorkerCollector, serve_metrics
from fraud_nb.decision.breaker import Breaker
from fraud_nb.domain.schema import Reason
from fraud_nb.pipeline.stream import Counts as Books
from tests.desk.desk_kit import free_port

NOW = 1_767_268_800_000


def alert(ident: str = "t", **given: Any) -> Alert:
    facts = Alert(
        ident, "ada", NOW, NOW, 5_000, "EUR", 5_000, "gold", "luxury", 52_000_000, 13_000_000, 0.5, "review",
        False, (Reason("A", "why", 0.7), Reason("B", "also", 0.2)), None, None,
    )  # fmt: skip
    return facts._replace(**given)


def look(*alerts: Alert, **given: Any) -> Look:
    counts = Counts(
        Counter(approve=9, review=1), Counter({"": 10}), Counter({"": 1}), Counter({0: 9, 15: 1}), newest_ms=NOW
    )
    return Look(Seen((10,), settled=counts), Counts(), NOW, 0, list(alerts), [], 3, 1)._replace(**given)


def tick(*alerts: Alert, **given: Any) -> dict[str, Any]:
    return tick_of(look(*alerts, **given), ["–", ""], "EUR")


def test_what_is_under_way_is_shown_as_decided() -> None:
    shown = tick(under_way=Counts(Counter(decline=2), newest_ms=NOW + 5))
    assert shown["tiles"]["decided"][0] == "12" and shown["tiles"]["alerts"][0] == "25 %"
    assert [line[:2] for line in shown["outcomes"]] == [["approve", 9], ["challenge", 0], ["review", 1], ["decline", 2]]


def test_every_score_bin_is_told() -> None:
    scores = tick()["scores"]
    assert len(scores) == len(SCORE_EDGES) + 1 == 16 and scores[0][0] == 9 and scores[15][0] == 1


def test_an_alert_without_a_known_amount_has_no_expected_loss() -> None:
    shown = tick(alert("a"), alert("b", amount_base=-1, currency="JPY"))
    assert [row["loss"] for row in shown["queue"]] == ["25 EUR", "not known"]
    assert shown["queue"][1]["amount"] == "5,000 JPY" and shown["tiles"]["risk"][0] == "25 EUR"


def test_what_has_a_verdict_is_no_longer_at_risk() -> None:
    assert tick(alert("a"), alert("b", verdict="genuine"))["tiles"]["risk"][0] == "25 EUR"


def test_alerts_are_drawn_once_and_above_the_rest() -> None:
    dots = tick(
        alert(), alert(latitude_e6=None), places=[Spot(1_000, 2_000, False), Spot(52_000_000, 13_000_000, True)]
    )["dots"]
    assert dots == [[0.002, 0.001, 0], [13.0, 52.0, 1]]


def test_many_categories_are_a_few_and_the_rest() -> None:
    counts = Counter({f"c{number}": 100 - number for number in range(30)})
    rows = categories_of(counts, Counter(c0=1, c29=2))
    assert len(rows) == 8 and rows[0] == ["c0", 100, "1.0 %"] and rows[-1][0] == "23 others"
    assert sum(number for _, number, _ in rows) == counts.total()
    assert categories_of(Counter({"": 2}), Counter()) == [["not told", 2, "0.00 %"]]


@given(some.lists(some.tuples(some.floats(-90, 90), some.floats(-180, 180)), max_size=60))
def test_a_frame_is_a_frame(places: list[tuple[float, float]]) -> None:
    west, south, east, north = frame_of(places)
    assert -180 <= west < east <= 180 and -90 <= south < north <= 90


@given(some.lists(some.sampled_from(("fraud", "genuine", "undo")), max_size=12))
def test_standing_verdicts_are_a_stack(said: list[str]) -> None:
    stands = standing_verdicts(enumerate(said))
    assert [number for number, _ in stands] == sorted(number for number, _ in stands)
    assert all(said[number] == says != "undo" for number, says in stands)
    if said and said[-1] != "undo":
        assert stands[-1] == (len(said) - 1, said[-1])
        assert standing_verdicts(enumerate([*said, "undo"])) == stands[:-1]


@given(some.lists(some.floats(0.001, 10), min_size=1, max_size=200), some.sampled_from((0.5, 0.99)))
def test_quantiles_of_buckets_are_in_the_right_bucket(latencies: list[float], part: float) -> None:
    bounds = [*np.geomspace(0.001, 12, 20).tolist(), math.inf]
    after = {bound: float(sum(latency <= bound for latency in latencies)) for bound in bounds}
    found = quantile(after, dict.fromkeys(bounds, 0.0), part)
    true = sorted(latencies)[math.ceil(part * len(latencies)) - 1]
    place = next(place for place, bound in enumerate(bounds) if bound >= true)
    assert (
        found is not None
        and (bounds[place - 1] if place else 0) <= found * 1.000001
        and found <= bounds[place] * 1.000001
    )


def test_latency_comes_from_the_metrics_of_the_workers() -> None:
    books, port = Books(), free_port()
    worker: Any = SimpleNamespace(counts=books, model=SimpleNamespace(version=3), breaker=Breaker())
    serve_metrics(WorkerCollector(worker, None), port, "127.0.0.1")
    urls = [f"http://127.0.0.1:{port}/metrics", "http://127.0.0.1:1/metrics"]
    latency = Latency(urls)
    assert latency.read(latency_buckets(urls)) == ["–", "nothing decided in the last minute"]
    books.latencies.add(np.full(1_000, 8.0))
    value, about = latency.read(latency_buckets(urls))
    assert 5 < float(value.removesuffix(" ms")) < 12 and about.startswith("p50 of a minute; p99")
    worker.counts = Books()  # it was started anew
    assert latency.read(latency_buckets(urls))[0] == "–"


def test_a_waterfall_ends_at_everything() -> None:
    rows = waterfall_of(alert())
    assert [start for _, start, _ in rows] == pytest.approx([0, 0.7, 0.9]) and rows[-1][1] + rows[-1][
        2
    ] == pytest.approx(1)
    assert waterfall_of(alert(reasons=())) == []
    assert len(waterfall_of(alert(reasons=(Reason("A", "all", 1.0),)))) == 1


def test_normal_leaves_out_the_purchase_itself_and_unknown_amounts() -> None:
    before = [
        Purchase(f"p{amount}", NOW, amount, "EUR", amount, None, None, None) for amount in (100, 200, 300, 400, -1)
    ]
    shown = normal_of(alert(), [Purchase("t", NOW, 5_000, "EUR", 5_000, None, None, "review"), *before], "EUR")
    assert shown["amounts"] == [100, 200, 300, 400] and shown["median"] == 250 and shown["this"] == 5_000
    assert shown["says"] == "20.0 times the median of 4 earlier purchases, 2.50 EUR."
    free = [each._replace(amount_base=0) for each in before]
    assert normal_of(alert(), free, "EUR")["says"].startswith("More than the median")
    assert normal_of(alert(amount_base=-1), before, "EUR")["amounts"] == []


def test_a_case_shows_missing_features_as_not_told() -> None:
    features = [("hour", struct.pack("<f", 3)), ("amount", struct.pack("<f", math.nan))]
    said = [Verdict(1, "t", "fraud", "n", "ada", NOW), Verdict(2, "t", "undo", "", "bob", NOW)]
    shown = case_of(Case(alert(customer_id=None), None, None, None, "http", 3, 1, features, [], said), "EUR")
    assert shown["features"] == [["hour", "3"], ["amount", "not told"]]
    assert [line[0] for line in shown["said"]] == ["undo", "fraud"] and "Customer" not in dict(shown["facts"])


def test_shares_have_as_many_decimals_as_they_deserve() -> None:
    assert [share(part, 1_000) for part in (0, 1, 12, 120)] == ["0.00 %", "0.10 %", "1.2 %", "12 %"]


def test_the_environment_of_voila() -> None:
    made = dashboard_environment({"JUPYTER_PATH": "/elsewhere", "A": "b"}, "postgresql://log")
    ours, theirs = made["JUPYTER_PATH"].split(":")
    assert ours.endswith("apps/static") and theirs == "/elsewhere"
    assert made["FRAUD_POSTGRES"] == "postgresql://log" and made["A"] == "b"
    assert request_of(made) is made
