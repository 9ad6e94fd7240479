"""What the service says over HTTP, without servers behind it: routes, refusals, limits, batches, no value anywhere."""

import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from fraud_nb.apps import door
from fraud_nb.apps.service import MAX_WAITING, MOST_TOGETHER
from fraud_nb.domain.config import Settings
from fraud_nb.domain.schema import MAX_MESSAGE_BYTES
from fraud_nb.pipeline import contract
from fraud_nb.pipeline.contract import MAX_BATCH, MAX_BATCH_BYTES, ROUTES
from tests.service.service_kit import CANARY, JSON, KEY, SEED, House, full, house, raw, wait_until


@pytest.fixture
def at_home() -> Iterator[House]:
    with house() as running:
        yield running
        assert not any(CANARY in line for line in running.lines)


@pytest.fixture
def locked() -> Iterator[House]:
    with house(Settings(api_key=KEY, allowed_hosts="localhost,shop.example")) as running:
        yield running


def problem(told: Any, status: int, error: str, field: str) -> None:
    """The answer is this problem, and repeats nothing."""
    assert (told.status, told.json["status"]) == (status, status), told.body
    assert (told.json["error"], told.json["field"]) == (error, field)
    assert set(told.json) == {"status", "error", "field", "detail"} and told.json["detail"]
    assert CANARY.encode() not in told.body
    assert told.headers["cache-control"] == "no-store" and told.headers["x-content-type-options"] == "nosniff"


def test_the_seed_body_gets_its_answer(at_home: House) -> None:
    told = at_home.predict(SEED)
    assert told.status == 200 and told.headers["content-type"] == "application/json"
    answer = told.json
    assert answer.pop("latency_ms") > 0
    assert answer == {
        "transaction_id": "TEST123", "probability": 0.25, "decision": "review", "model_version": 1, "policy_version": 1,
        "reasons": [{"code": "AMOUNT", "text": "an amount of 1500.00 EUR", "share": 0.7}],
        "shared_version": 7, "features": "stateless", "recorded": True,
    }  # fmt: skip
    assert at_home.ask("GET", "/decisions/TEST123").json == answer


def test_a_full_body_is_live_and_its_id_may_hold_anything(at_home: House) -> None:
    assert at_home.predict(full(1, transaction_id="a/ü %?#")).json["features"] == "live"
    assert at_home.ask("GET", "/decisions/a%2F%C3%BC%20%25%3F%23").json["transaction_id"] == "a/ü %?#"


def test_the_same_again_and_something_else_under_the_same_id(at_home: House) -> None:
    first, again = at_home.predict(SEED), at_home.predict(SEED)
    assert first.json | {"latency_ms": 0} == again.json | {"latency_ms": 0}
    problem(at_home.predict(SEED.replace(b"1500.00", b"15.00")), 409, "conflict", "transaction_id")


@pytest.mark.parametrize(
    ("body", "error", "field"),
    [
        (b"", "empty", "message"),
        (b"  ", "empty", "message"),
        (b"{", "not_json", "message"),
        (b"[]", "wrong_type", "message"),
        (b"\xff\xfe{}", "not_json", "message"),
        (b"[" * 60_000, "not_json", "message"),
        (SEED.replace(b"1500.00", b"-1"), "negative", "amount"),
        (SEED.replace(b"1500.00", b"NaN"), "not_json", "message"),
        (SEED.replace(b"1500.00", b"10.005"), "too_many_decimals", "amount"),
        (SEED.replace(b"1500.00", f'"{CANARY}"'.encode()), "wrong_type", "amount"),
        (SEED.replace(b"37.7749", CANARY.encode()), "out_of_range", "latitude"),
        (SEED.replace(b"}", f',"{CANARY}":"{CANARY}"}}'.encode()), "unknown_field", "message"),
        (json.dumps(full(1, customer_id=f"{CANARY}\0")).encode(), "bad_text", "customer_id"),
        (json.dumps(full(1, event_time=4_000_000_000_000)).encode(), "in_the_future", "event_time"),
    ],
)
def test_a_bad_body_is_refused_by_field_and_reason(at_home: House, body: bytes, error: str, field: str) -> None:
    told = at_home.predict(body)
    assert told.status == 400
    if (told.json["error"], told.json["field"]) != (error, field):  # two words for one fault may both be right
        assert error in ("not_json", "wrong_type") and told.json["error"] in ("not_json", "wrong_type"), told.body
    problem(told, 400, told.json["error"], told.json["field"])
    assert not at_home.double.decided


def test_other_types_than_json_are_refused_before_reading(at_home: House) -> None:
    for kind in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "application/vnd.bentoml+pickle",
        "application/jsonp",
    ):
        problem(at_home.predict(SEED, {"Content-Type": kind}), 415, "wrong_content_type", "Content-Type")
    problem(at_home.predict(SEED, {}), 415, "wrong_content_type", "Content-Type")
    assert at_home.predict(SEED, {"Content-Type": "Application/JSON; charset=utf-8"}).status == 200


def test_a_large_body_is_refused_by_its_length_and_in_chunks(at_home: House) -> None:
    large = b" " * MAX_MESSAGE_BYTES + SEED
    problem(at_home.predict(large), 413, "too_large", "message")
    chunks = (large[start : start + 32_768] for start in range(0, len(large), 32_768))
    problem(at_home.ask("POST", "/predict", chunks), 413, "too_large", "message")
    head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %s\r\n\r\n"
    for length in (b"999999999", b"9" * 30):  # announced, and refused before a byte of it came
        answer = raw(at_home.port, head % length)
        assert answer.startswith((b"HTTP/1.1 413", b"HTTP/1.1 400")), answer
    assert b" 413 " in raw(at_home.port, head % b"999999999").split(b"\r\n")[0]
    # A body longer than announced: the rest is not part of it, whatever it says.
    assert b" 400 " in raw(at_home.port, head % b"10" + SEED).split(b"\r\n")[0]
    # A body shorter than announced: nobody is left to answer, and nothing is decided.
    raw(at_home.port, head % b"1000" + SEED)
    assert not at_home.double.decided
    assert at_home.predict(SEED).status == 200


def test_whoever_is_still_sending_gets_the_answer_too(at_home: House) -> None:
    """A refusal ends the connection, but not under the feet of one who sends everything before reading anything."""
    large = SEED.rjust(10_000_000)
    problem(at_home.predict(large), 413, "too_large", "message")
    problem(at_home.ask("POST", "/predict", iter([large[:5_000_000], large[5_000_000:]])), 413, "too_large", "message")
    problem(at_home.predict(large, {"Content-Type": "text/plain"}), 415, "wrong_content_type", "Content-Type")
    for path in ("/no/such/path", "/health"):
        assert at_home.ask("POST", path, large).status in (404, 405)
    assert at_home.predict(SEED).status == 200


def test_a_body_that_comes_too_slowly(at_home: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is the sender's fault; and who promises much and sends nothing is not waited for."""
    monkeypatch.setitem(contract.BY_PATH, "/predict", contract.BY_PATH["/predict"]._replace(deadline_s=0.2))
    monkeypatch.setattr(door, "LINGER_S", 0.2)
    head = (
        b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n%sContent-Length: %d\r\n\r\n"
    )
    for more, length, status in ((b"", 1_000, 408), (b"", 10**9, 413), (b"Expect: 100-continue\r\n", 10**9, 413)):
        with socket.create_connection(("127.0.0.1", at_home.port), timeout=30) as connection:
            connection.sendall(head % (more, length) + SEED)
            said = connection.makefile("rb").read()  # to the end: it closes
        assert said.startswith(b"HTTP/1.1 %d" % status) and b'"field":"message"' in said
    assert not at_home.double.decided


def test_a_full_size_body_is_read(at_home: House) -> None:
    assert at_home.predict(SEED + b" " * (MAX_MESSAGE_BYTES - len(SEED))).status == 200


def test_what_is_not_a_route(at_home: House) -> None:
    for path in ("/docs.json", "/schema.json", "/healthz", "/static_content/index.html", "/predict/", "/PREDICT", "//"):
        problem(at_home.ask("GET", path), 404, "no_such_path", "path")
    for path in ("/decisions/", "/decisions/unknown", "/decisions/%00", "/decisions/" + "x" * 65):
        problem(at_home.ask("GET", path), 404, "not_decided", "transaction_id")
    for method, path in (("GET", "/predict"), ("DELETE", "/decisions/1"), ("POST", "/health"), ("OPTIONS", "/predict")):
        told = at_home.ask(method, path, "{}")
        problem(told, 405, "wrong_method", "method")
        assert told.headers["allow"] in ("POST", "GET, HEAD")
    head = at_home.ask("HEAD", "/health")
    assert (head.status, head.body) == (200, b"")


def test_the_key(locked: House) -> None:
    named = {**JSON, "Host": "localhost"}
    for headers in (
        named,
        {**named, "X-API-Key": ""},
        {**named, "X-API-Key": KEY + "x"},
        {**named, "X-API-Key": KEY[1:]},
    ):
        for route in ROUTES:
            told = locked.ask(route.method, route.path, None, headers)
            if route.is_open:
                assert told.status == 200
            else:
                problem(told, 401, "wrong_key", "X-API-Key")
        problem(locked.ask("GET", "/no/such/path", None, headers), 401, "wrong_key", "X-API-Key")
    assert locked.predict(SEED, {**named, "X-API-Key": KEY}).status == 200


def test_the_names_under_which_it_is_asked(locked: House) -> None:
    for host in ("evil.example", "127.0.0.1", "localhost.evil.example", "", "evil.example:3000", "[::1]:3000"):
        headers = {**JSON, "Host": host, "X-API-Key": KEY}
        problem(locked.predict(SEED, headers), 421, "wrong_host", "Host")
        assert locked.ask("GET", "/livez", None, headers).status == 200
    for host in ("localhost", "LOCALHOST:3000", "shop.example:443"):
        assert locked.predict(SEED, {**JSON, "Host": host, "X-API-Key": KEY}).status == 200


def test_a_batch_answers_each_in_its_place(at_home: House) -> None:
    bodies: list[Any] = [full(1), {"amount": 1}, full(2), [], json.loads(SEED), full(1, amount=99), full(3, amount="x")]
    replies = at_home.ask("POST", "/predict/batch", json.dumps(bodies)).json
    assert [reply.get("status", 200) for reply in replies] == [200, 400, 200, 400, 200, 409, 400]
    assert [reply.get("transaction_id") for reply in replies] == ["t-1", None, "t-2", None, "TEST123", None, None]
    assert replies[6]["field"] == "amount"
    assert at_home.ask("POST", "/predict/batch", "[]").json == []


def test_a_batch_has_limits_of_its_own(at_home: House) -> None:
    bodies = [full(number) for number in range(MAX_BATCH)]
    replies = at_home.ask("POST", "/predict/batch", json.dumps(bodies)).json
    assert [reply["transaction_id"] for reply in replies] == [body["transaction_id"] for body in bodies]
    assert max(at_home.double.groups) <= MOST_TOGETHER and len(at_home.double.groups) < MAX_BATCH
    problem(at_home.ask("POST", "/predict/batch", json.dumps([*bodies, full(0)])), 400, "too_many", "message")
    problem(at_home.ask("POST", "/predict/batch", SEED), 400, "not_json", "message")
    problem(at_home.ask("POST", "/predict/batch", b"[" * 60_000), 400, "not_json", "message")
    problem(at_home.ask("POST", "/predict/batch", b" " * (MAX_BATCH_BYTES + 1)), 413, "too_large", "message")
    long = SEED.replace(b"online_retail", b"x" * MAX_MESSAGE_BYTES)
    reply = at_home.ask("POST", "/predict/batch", b"[" + long + b"]").json[0]
    assert (reply["status"], reply["error"]) == (400, "too_large")


def test_many_askers_are_decided_together(at_home: House) -> None:
    at_home.double.may_go.clear()
    with ThreadPoolExecutor(17) as pool:
        told = [pool.submit(at_home.predict, full(0))]
        wait_until(lambda: at_home.double.groups, "the first is being decided")
        told += [pool.submit(at_home.predict, full(number)) for number in range(1, 17)]
        wait_until(lambda: at_home.running.teller._queue.qsize() == 16, "sixteen wait")
        at_home.double.may_go.set()
        assert [each.result().json["transaction_id"] for each in told] == [f"t-{number}" for number in range(17)]
    assert at_home.double.groups == [1, 16]


def test_one_that_breaks_takes_no_neighbour_with_it(at_home: House) -> None:
    at_home.double.breaks_on = "t-3"
    replies = at_home.ask("POST", "/predict/batch", json.dumps([full(number) for number in range(8)])).json
    assert [reply.get("status", 200) for reply in replies] == [200, 200, 200, 500, 200, 200, 200, 200]
    problem(at_home.predict(full(3)), 500, "failed", "message")
    lines = [json.loads(line) for line in at_home.lines if "fail" in line or "not decided" in line]
    assert {(line["event"], line["error"]) for line in lines} == {
        ("not decided", "ZeroDivisionError"), ("request failed", "ZeroDivisionError"),
    }  # fmt: skip
    assert lines[-1]["route"] == "/predict"
    assert at_home.predict(full(9)).status == 200 and at_home.ask("GET", "/livez").status == 200


def test_unavailable_is_said_with_when_to_ask_again(at_home: House) -> None:
    at_home.double.status = "down"
    told = at_home.predict(SEED)
    problem(told, 503, "unavailable", "message")
    assert told.headers["retry-after"] == "1"
    problem(at_home.ask("GET", "/decisions/TEST123"), 503, "unavailable", "message")
    assert at_home.ask("POST", "/predict/batch", b"[" + SEED + b"]").json[0]["error"] == "unavailable"
    health = at_home.ask("GET", "/health")
    assert (health.status, health.json["status"], health.headers["retry-after"]) == (503, "down", "1")
    problem(at_home.ask("GET", "/readyz"), 503, "not_ready", "message")
    assert at_home.ask("GET", "/livez").status == 200
    at_home.double.status = "ok"
    wait_until(lambda: at_home.ask("GET", "/readyz").status == 200, "ready again")
    assert at_home.predict(SEED).status == 200


def test_degraded_is_ready_and_says_so(at_home: House) -> None:
    at_home.double.status, at_home.double.recorded = "degraded", False
    assert at_home.predict(SEED).json["recorded"] is False
    health = at_home.ask("GET", "/health")
    assert health.status == 200
    assert health.json == {
        "status": "degraded", "postgres": False, "redis": True, "kafka": True, "model_version": 1,
        "state_age_ms": None, "waiting": 0,
    }  # fmt: skip
    assert at_home.ask("GET", "/readyz").status == 200
    metrics = at_home.ask("GET", "/metrics").body.decode()
    assert 'fraud_http_decisions_total{features="stateless",outcome="review",recorded="false"} 1.0' in metrics


def test_whoever_waits_too_long_is_told(at_home: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is not decided after that; asked again, with the same id, there is an answer."""
    monkeypatch.setitem(contract.BY_PATH, "/predict", contract.BY_PATH["/predict"]._replace(deadline_s=0.2))
    at_home.double.may_go.clear()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(at_home.predict, full(1))
        wait_until(lambda: at_home.double.groups, "the first is being decided")
        problem(at_home.predict(full(2)), 503, "too_slow", "message")
        problem(first.result(), 503, "too_slow", "message")
    at_home.double.may_go.set()
    monkeypatch.undo()
    assert at_home.predict(full(3)).status == 200
    assert set(at_home.double.decided) == {"t-1", "t-3"}
    assert at_home.ask("GET", "/decisions/t-1").status == 200


def test_too_many_askers_are_sent_away(at_home: House) -> None:
    at_home.double.may_go.clear()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(at_home.predict, full(0))
        wait_until(lambda: at_home.double.groups, "the first is being decided")
        queue = at_home.running.teller._queue
        gone = SimpleNamespace(told=SimpleNamespace(cancelled=lambda: True))
        for _ in range(MAX_WAITING):
            queue.put(gone)  # type: ignore[arg-type]
        told = at_home.predict(full(1))
        problem(told, 503, "overloaded", "message")
        assert told.headers["retry-after"] == "1"
        at_home.double.may_go.set()
        assert first.result().status == 200
    wait_until(queue.empty, "those who left are passed over")
    assert at_home.predict(full(1)).status == 200


def test_a_new_champion_between_two_groups(at_home: House) -> None:
    assert at_home.predict(full(1)).json["model_version"] == 1
    at_home.champion.append(SimpleNamespace(version=2))
    wait_until(lambda: at_home.ask("GET", "/health").json["model_version"] == 2, "the new model is there")
    assert at_home.predict(full(2)).json["model_version"] == 2
    metrics = at_home.ask("GET", "/metrics").body.decode()
    assert "fraud_model_version 2.0" in metrics and "fraud_promotion_refused 0.0" in metrics
    assert [json.loads(line)["model_version"] for line in at_home.lines if '"model"' in line] == [2]
    wait_until(lambda: at_home.double.swept, "the sweep has its turn")


def test_what_is_counted(at_home: House) -> None:
    for path in ("/predict", "/nothing", f"/{CANARY}"):
        at_home.ask("GET", path)
    at_home.predict(full(1))
    at_home.predict(b"{")
    text = at_home.ask("GET", "/metrics")
    assert text.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = text.body.decode()
    for line in (
        'fraud_http_requests_total{route="/predict",status="200"} 1.0',
        'fraud_http_requests_total{route="/predict",status="400"} 1.0',
        'fraud_http_requests_total{route="/predict",status="405"} 1.0',
        'fraud_http_requests_total{route="other",status="404"} 2.0',
        'fraud_http_request_seconds_count{route="/predict"} 3.0',
        'fraud_http_decisions_total{features="live",outcome="review",recorded="true"} 1.0',
    ):
        assert line in found
    assert CANARY not in found


def test_the_description_is_whole_and_loads_nothing(at_home: House) -> None:
    described = at_home.ask("GET", "/openapi.json").json
    assert set(described["paths"]) == {route.path for route in ROUTES}
    text = json.dumps(described)
    for name in set(part.split('"')[0] for part in text.split("#/components/schemas/")[1:]):
        assert name in described["components"]["schemas"]
    for path in ("/docs", "/"):
        page = at_home.ask("GET", path)
        assert page.headers["content-type"].startswith("text/html")
        assert page.headers["content-security-policy"].startswith("default-src 'none'")
        assert b"<script" not in page.body and b"//" not in page.body.replace(b"</", b"")
        assert all(route.path.encode() in page.body for route in ROUTES)


def test_the_description_names_the_decoders_fields() -> None:
    from fraud_nb.domain import schema

    bodies = contract.BODIES
    assert set(bodies["Purchase"]["properties"]) == set(schema._Wire.__struct_fields__)
    assert set(bodies["StatelessPurchase"]["properties"]) == set(schema._StatelessWire.__struct_fields__)
    for example in contract.EXAMPLES.values():
        door.admitted(json.dumps(example).encode(), "EUR", 1_800_000_000_000)


def test_stopping_finishes_what_was_accepted() -> None:
    with house() as running:
        running.double.may_go.clear()
        with ThreadPoolExecutor(9) as pool:
            told = [pool.submit(running.predict, full(0))]
            wait_until(lambda: running.double.groups, "the first is being decided")
            told += [pool.submit(running.predict, full(number)) for number in range(1, 9)]
            wait_until(lambda: running.running.teller._queue.qsize() == 8, "eight wait")
            running.server.should_exit = True
            threading.Timer(0.2, running.double.may_go.set).start()
            assert [each.result().status for each in told] == [200] * 9
    assert not running.running.teller.is_alive()


def test_no_value_is_logged(at_home: House) -> None:
    at_home.predict(SEED.replace(b"TEST123", CANARY.encode()), {**JSON, "X-Other": CANARY})
    at_home.predict(SEED.replace(b"37.7749", CANARY.encode()))
    at_home.ask("GET", f"/decisions/{CANARY}x?card={CANARY}")
    at_home.double.breaks_on = "bad"
    at_home.predict(full(1, transaction_id="bad", merchant_id=CANARY))
    assert at_home.lines and not any(CANARY in line for line in at_home.lines)
