"""The compiled fold against the slow oracle, bit for bit."""

import itertools
import math
import random
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fraud_nb.features.catalogue import FEATURE_NAMES
from fraud_nb.features.fold import fold, fold_blind
from fraud_nb.features.profile import CAPACITY, Profiles
from fraud_nb.features.tiles import KINDS, OWNED, READINGS, RECORD, UNKNOWN, WIDTH
from fraud_nb.features.windows import EVENT, Events
from tests.parity.oracle import (
    ABSENT,
    COUNT_WINDOWS,
    DAY,
    HOUR,
    KEPT,
    MINUTE,
    NO_AMOUNT,
    NO_PLACE,
    NOTHING_TOLD,
    REACH,
    Oracle,
    Row,
    bits,
    by_name,
    metres,
)
from tests.parity.oracle import READINGS as ORACLE_READINGS
from tests.parity.oracle import RECORD as ORACLE_RECORD

Stream = list[tuple[str, Row]]  # customer and event, in order of acceptance
Vectors = npt.NDArray[np.float32]
BASE = 1_767_268_800_000  # noon, 2026-01-01
EDGES = [*COUNT_WINDOWS.values(), REACH]
FIELDS = EVENT.names or ()
COUNT_30D = ORACLE_READINGS.index("count_30d")  # of the merchant, whose readings come first
MAX_INT64 = 2**63 - 1
BUSY: Row = {"event_time": 0, "amount": 100, "merchant": 1, "device": 1, "category": 1, "latitude": 0, "longitude": 0}
THOROUGH = settings(
    max_examples=250,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)

edge_steps = st.builds(
    lambda edge, jitter, sign: sign * (edge + jitter),
    st.sampled_from(EDGES),
    st.sampled_from([-1, 0, 1]),
    st.sampled_from([1, 1, -1]),
)
steps = st.one_of(
    edge_steps,
    st.sampled_from([0, 0, 1, -1, 999, 1000, 1001]),
    st.integers(1, 3 * HOUR),
    st.integers(-100 * DAY, -MINUTE),  # late
    st.integers(REACH - 2, REACH + 2 * DAY),  # the horizon lets go
)
amounts = st.one_of(
    st.sampled_from([NO_AMOUNT, 0, 1, 10**15, 10**15 - 1]), st.integers(0, 20_000), st.integers(0, 10**15)
)
keys = st.sampled_from([ABSENT, 1, 2, -1, 2**63 - 1, -(2**63)])
places = st.one_of(
    st.just((NO_PLACE, NO_PLACE)),
    st.sampled_from([(0, 180_000_000), (0, -180_000_000), (90_000_000, 0), (-90_000_000, 1), (0, 0), (-1, -1)]),
    st.tuples(st.integers(-50, 50), st.integers(179_999_900, 180_000_000)),
    st.tuples(st.integers(-50, 50), st.integers(-180_000_000, -179_999_900)),
    st.tuples(st.integers(89_999_900, 90_000_000), st.integers(-180_000_000, 180_000_000)),
    st.tuples(st.integers(-90_000_000, 90_000_000), st.integers(-180_000_000, 180_000_000)),
)
# Which earlier event the step counts from: windows must be hit exactly between any two events, not only neighbours.
entries = st.tuples(st.sampled_from("abc"), st.integers(0, 59), steps, amounts, keys, keys, keys, places)
# What merchants and devices read need not fit together here: a family must look at what it says it looks at.
wholes = st.one_of(st.sampled_from([0, 1, 2, 2**24 + 1, 2**53 + 1, 10**15]), st.integers(0, 50), st.integers(0, 10**15))
ages = st.one_of(st.just(UNKNOWN), st.integers(0, 61 * 24))
unknowns = st.just([UNKNOWN] * len(READINGS))
known = st.builds(
    lambda sums, hours: [*sums, *hours],
    *(st.lists(drawn, min_size=n, max_size=n) for drawn, n in ((wholes, 9), (ages, 2))),
)
records = st.one_of(
    st.builds(
        lambda sums, days: [*sums, *days],
        *(st.lists(drawn, min_size=n, max_size=n) for drawn, n in ((wholes, 8), (ages, 2))),
    ),
    st.just([UNKNOWN] * len(RECORD)),
)
told_rows = st.builds(lambda *parts: [*itertools.chain(*parts)], *[st.one_of(known, known, unknowns)] * 2, records)


def to_stream(drawn: Sequence[tuple[str, int, int, int, int, int, int, tuple[int, int]]]) -> Stream:
    """Steps become times."""
    times, stream = [BASE], []
    for customer, anchor, step, amount, merchant, device, category, place in drawn:
        time = times[anchor % len(times)] + step
        times.append(time)
        stream.append((customer, dict(zip(FIELDS, (time, amount, merchant, device, category, *place), strict=True))))
    return stream


streams = st.lists(entries, min_size=1, max_size=60).map(to_stream)


def customers_of(stream: Stream) -> list[str]:
    return [customer for customer, _ in stream]


def events_of(stream: Stream) -> Events:
    return np.array([tuple(row[name] for name in FIELDS) for _, row in stream], EVENT)


def run(profiles: Profiles, stream: Stream) -> Vectors:
    return fold(profiles, customers_of(stream), events_of(stream))


def rows_of(events: Events) -> list[Row]:
    return [{name: int(event[name]) for name in FIELDS} for event in events]


def dumps(profiles: Profiles) -> dict[str, bytes]:
    return {customer: profiles.dump(customer) for customer in "abc"}


def check_vector(
    oracle: Oracle, customer: str, event: Row, vector: npt.NDArray[np.float32], told: Sequence[int] | None = None
) -> None:
    """Equal bits, column by column."""
    expected = by_name(FEATURE_NAMES, oracle.features(customer, event, told))
    found = {name: bits(float(value)) for name, value in zip(FEATURE_NAMES, vector, strict=True)}
    assert found == expected


@THOROUGH
@given(streams)
def test_fold_equals_oracle(stream: Stream) -> None:
    profiles, oracle = Profiles(), Oracle()
    vectors = run(profiles, stream)
    assert vectors.dtype == np.float32
    for (customer, event), vector in zip(stream, vectors, strict=True):
        check_vector(oracle, customer, event, vector)
        oracle.accept(customer, event)
    for customer in "abc":
        assert rows_of(profiles.rows(customer)) == oracle.state(customer)


def to_told(drawn: tuple[Stream, list[list[int]]]) -> tuple[Stream, list[list[int]]]:
    """A row of readings for each event; an amount times a count is an int64."""
    stream, rows = drawn
    told = [list(row) for row, _ in zip(itertools.cycle(rows), stream, strict=False)]
    for (_, event), row in zip(stream, told, strict=True):
        row[COUNT_30D] = min(row[COUNT_30D], MAX_INT64 // max(event["amount"], 1))
    return stream, told


@THOROUGH
@given(st.tuples(streams, st.lists(told_rows, min_size=1, max_size=12)).map(to_told))
def test_fold_equals_oracle_with_what_it_is_told(drawn: tuple[Stream, list[list[int]]]) -> None:
    stream, told = drawn
    oracle = Oracle()
    vectors = fold(Profiles(arena_events=8), customers_of(stream), events_of(stream), np.array(told, np.int64))
    for (customer, event), vector, row in zip(stream, vectors, told, strict=True):
        check_vector(oracle, customer, event, vector, row)
        oracle.accept(customer, event)


def test_told_nothing_is_told_unknown() -> None:
    stream = busy_stream(1, 50)
    unknown = np.full((50, WIDTH), UNKNOWN, np.int64)
    told = fold(Profiles(), customers_of(stream), events_of(stream), unknown)
    assert told.tobytes() == run(Profiles(), stream).tobytes()


def test_amount_to_merchant_mean_is_rounded_late() -> None:
    # 31 * 42,213,639 / 39 is a tie of float32, which goes up; 31 / 39, rounded before it is multiplied, is below it.
    told = np.zeros((1, WIDTH), np.int64)
    told[0, [COUNT_30D, ORACLE_READINGS.index("amount_30d")]] = 42_213_639, 39
    vector = fold(Profiles(), ["a"], events_of([("a", {**BUSY, "amount": 31})]), told)[0]
    assert vector[FEATURE_NAMES.index("amount_to_merchant_mean")] == 2**25


def test_an_absurd_amount_at_a_busy_shop_does_not_wrap() -> None:
    told = np.zeros((1, WIDTH), np.int64)
    told[0, [COUNT_30D, ORACLE_READINGS.index("amount_30d")]] = 10_000, 50_000_000
    vector = fold(Profiles(), ["a"], events_of([("a", {**BUSY, "amount": 10**15})]), told)[0]
    assert vector[FEATURE_NAMES.index("amount_to_merchant_mean")] == np.float32(2e11)


def test_oracle_names_every_feature() -> None:
    event = dict.fromkeys(FIELDS, 0)
    assert set(Oracle().features("a", event)) == set(FEATURE_NAMES)


def test_oracle_reads_in_the_same_order() -> None:
    assert READINGS == ORACLE_READINGS and RECORD == ORACLE_RECORD
    assert len(NOTHING_TOLD) == WIDTH and len(KINDS) * len(READINGS) == OWNED


@pytest.mark.parametrize("label", COUNT_WINDOWS)
def test_old_edge_is_open_and_new_edge_closed(label: str) -> None:
    length = COUNT_WINDOWS[label]
    for distance, counted in ((length - 1, 1), (length, 0), (length + 1, 0), (0, 1), (-1, 0)):
        rows = [dict.fromkeys(FIELDS, 0) | {"event_time": time} for time in (BASE, BASE + distance)]
        vectors = run(Profiles(), [("a", row) for row in rows])
        assert vectors[1, FEATURE_NAMES.index(f"customer_count_{label}")] == counted


@pytest.mark.parametrize(("distance", "kept"), [(REACH - 1, 2), (REACH, 1), (REACH + 1, 1)])
@pytest.mark.parametrize("late", [False, True])
def test_horizon_edge(distance: int, kept: int, late: bool) -> None:
    times = [BASE + distance, BASE] if late else [BASE, BASE + distance]
    profiles = Profiles()
    run(profiles, [("a", dict.fromkeys(FIELDS, 0) | {"event_time": time}) for time in times])
    assert len(profiles.rows("a")) == kept


def busy_stream(seed: int, count: int) -> Stream:
    """One customer beyond the cap, a fifth of it late, some of that older than everything kept."""
    chance, stream = random.Random(seed), []
    for index in range(count):
        late = chance.choice([0, 0, 0, 0, chance.randrange(2 * count)])
        latitude = chance.choice([NO_PLACE, chance.randrange(-90_000_000, 90_000_000)])
        longitude = NO_PLACE if latitude == NO_PLACE else chance.randrange(-180_000_000, 180_000_000)
        amount = chance.choice([NO_AMOUNT, 0, 10**15, chance.randrange(10**6), chance.randrange(10**15)])
        keyed = [chance.randrange(20) for _ in range(3)]
        values = (BASE + (index - late) * 10 * MINUTE, amount, *keyed, latitude, longitude)
        stream.append(("a", dict(zip(FIELDS, values, strict=True))))
    return stream


@pytest.mark.parametrize("seed", range(3))
def test_cap_of_events(seed: int) -> None:
    stream = busy_stream(seed, 1_100)
    profiles, oracle = Profiles(arena_events=8), Oracle()
    vectors = run(profiles, stream)
    for index, (customer, event) in enumerate(stream):
        if index % 50 == 0 or 1_020 <= index <= 1_030 or index >= 1_095:
            check_vector(oracle, customer, event, vectors[index])
        oracle.accept(customer, event)
    assert len(oracle.state("a")) == KEPT
    assert rows_of(profiles.rows("a")) == oracle.state("a")


def test_older_than_everything_kept_is_judged_and_let_go() -> None:
    stream: Stream = [("a", dict.fromkeys(FIELDS, 0) | {"event_time": BASE + index}) for index in range(KEPT)]
    profiles = Profiles()
    run(profiles, stream)
    before = profiles.dump("a")
    run(profiles, [("a", dict.fromkeys(FIELDS, 0) | {"event_time": BASE - 1})])
    assert profiles.dump("a") == before
    run(profiles, [("a", dict.fromkeys(FIELDS, 0) | {"event_time": BASE, "amount": 7})])  # ties with the oldest
    oldest = profiles.rows("a")[0]
    assert (int(oldest["event_time"]), int(oldest["amount"])) == (BASE, 7)


def test_full_profile_leaves_its_neighbour_alone() -> None:
    """The block before a full one in the arena belongs to somebody else, whatever arrives late."""
    profiles, oracle = Profiles(arena_events=8), Oracle()
    newest = BASE + KEPT * MINUTE
    full = [("b", {**BUSY, "event_time": BASE + number * MINUTE}) for number in range(KEPT)]
    neighbours = [("a", {**BUSY, "event_time": BASE + number}) for number in range(KEPT)]
    late = [("b", {**BUSY, "event_time": time}) for time in (BASE - 1, BASE, BASE + 1, newest)]
    for stream in (neighbours, full, late, neighbours[:3], late):
        run(profiles, stream)
        for customer, event in stream:
            oracle.accept(customer, event)
        for customer in "ab":
            assert rows_of(profiles.rows(customer)) == oracle.state(customer)


def test_largest_sum_is_rounded_once() -> None:
    # One above a tie of float32, whose step here is 2**36. By way of float64, whose step is 128, the sum would first
    # fall back on the tie and then to the even side.
    target = 2**59 + 2**35 + 1
    parts = [10**15] * (target // 10**15) + [target % 10**15]
    stream = [("a", dict.fromkeys(FIELDS, 0) | {"event_time": BASE, "amount": part}) for part in [*parts, 0]]
    vectors = run(Profiles(), stream)
    assert bits(float(vectors[-1, FEATURE_NAMES.index("customer_sum_1m")])) == bits(target)


@settings(THOROUGH, max_examples=100)
@given(streams, st.lists(st.booleans(), min_size=60, max_size=60))
def test_what_is_only_asked_about_is_not_learned(stream: Stream, coins: list[bool]) -> None:
    """Over HTTP a purchase is asked about before it is learned; the oracle answers, and does not accept it."""
    profiles, oracle = Profiles(arena_events=8), Oracle()
    learned = np.array(coins[: len(stream)], np.bool_)
    vectors = fold(profiles, customers_of(stream), events_of(stream), learned=learned)
    for (customer, event), vector, is_learned in zip(stream, vectors, learned.tolist(), strict=True):
        check_vector(oracle, customer, event, vector)
        if is_learned:
            oracle.accept(customer, event)
    for customer in "abc":
        assert rows_of(profiles.rows(customer)) == oracle.state(customer)


def test_where_the_past_cannot_be_read_only_the_purchase_is_known() -> None:
    (vector,) = fold_blind(events_of([("a", BUSY)]))
    known = {name for name, value in zip(FEATURE_NAMES, vector, strict=True) if not np.isnan(value)}
    assert known == {"amount", "hour", "weekday", "is_night"}


@settings(THOROUGH, max_examples=100)
@given(streams, st.lists(st.integers(0, 60), max_size=6))
def test_batches_make_no_difference(stream: Stream, cuts: list[int]) -> None:
    whole, split = Profiles(), Profiles()
    expected = run(whole, stream)
    edges = sorted({0, len(stream), *(min(cut, len(stream)) for cut in cuts)})
    parts = [run(split, stream[start:stop]) for start, stop in zip(edges, edges[1:], strict=False)]
    assert np.concatenate(parts).tobytes() == expected.tobytes()
    assert dumps(split) == dumps(whole)


@settings(THOROUGH, max_examples=100)
@given(streams, st.integers(0, 60))
def test_dump_and_load_in_the_middle(stream: Stream, cut: int) -> None:
    whole, before, after = Profiles(), Profiles(), Profiles(arena_events=8)
    expected = run(whole, stream)
    first = run(before, stream[:cut])
    for customer in reversed("abc"):
        after.load([customer], [before.dump(customer)])
    assert dumps(after) == dumps(before)
    second = run(after, stream[cut:])
    assert first.tobytes() + second.tobytes() == expected.tobytes()
    assert dumps(after) == dumps(whole)


@settings(THOROUGH, max_examples=100)
@given(streams)
def test_tiny_arena_and_rebuild(stream: Stream) -> None:
    roomy, tiny, rebuilt = Profiles(), Profiles(arena_events=8), Profiles(arena_events=8)
    expected = run(roomy, stream)
    assert run(tiny, stream).tobytes() == expected.tobytes()
    rebuilt.learn(customers_of(stream), events_of(stream))
    assert dumps(roomy) == dumps(tiny) == dumps(rebuilt)


def test_many_customers_in_a_tiny_arena() -> None:
    # More than the 1,024 rows to begin with, and blocks of every size taken from and given to the free list.
    chance = random.Random(7)
    names = [f"customer {index}" for index in range(1_500)]
    chosen = names + [names[min(int(chance.expovariate(0.05)), 1_499)] for _ in range(12_000)]
    stream = [(name, busy_stream(index, 1)[0][1]) for index, name in enumerate(chosen)]
    for index, (_, row) in enumerate(stream):
        row["event_time"] += index * chance.randrange(MINUTE)
    tiny, roomy, oracle = Profiles(arena_events=8), Profiles(), Oracle()
    assert run(tiny, stream).tobytes() == run(roomy, stream).tobytes()
    for customer, event in stream:
        oracle.accept(customer, event)
    for name in names:
        assert rows_of(tiny.rows(name)) == oracle.state(name)


def test_customers_who_grow_side_by_side_leave_little_behind() -> None:
    # Blocks of one size are outgrown by all at about the same time, and nobody takes them: the others move together.
    chance, names = random.Random(3), [f"customer {index}" for index in range(300)]
    profiles, oracle = Profiles(arena_events=8), Oracle()
    for day in range(70):
        sold = [name for name in names if chance.random() < 0.9]
        stream = [(name, BUSY | {"event_time": BASE + day * DAY, "amount": chance.randrange(10**6)}) for name in sold]
        profiles.learn(customers_of(stream), events_of(stream))
        for customer, event in stream:
            oracle.accept(customer, event)
        if day % 10 == 9:
            assert all(rows_of(profiles.rows(name)) == oracle.state(name) for name in names)
    assert len(profiles.arena) < 1.5 * profiles.blocks[:, CAPACITY].sum()


@settings(THOROUGH, max_examples=100)
@given(places, places)
def test_haversine_agrees_with_vectors(one: tuple[int, int], other: tuple[int, int]) -> None:
    if NO_PLACE in one + other:
        return
    first, second = unit_vector(one), unit_vector(other)
    chord = math.dist(first, second)
    gap = math.dist(first, [-part for part in second])
    # Half a turn away an arc sine has eight good digits left, so a metre is what can be asked for.
    assert metres(one, other) == pytest.approx(2 * 6_371_008.8 * math.atan2(chord, gap), abs=1.0)


def unit_vector(place: tuple[int, int]) -> list[float]:
    north, east = (math.radians(part / 1e6) for part in place)
    return [math.cos(north) * math.cos(east), math.cos(north) * math.sin(east), math.sin(north)]
