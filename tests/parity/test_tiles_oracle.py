"""Tiles, and their versions over a history, against the slow oracle, bit for bit."""

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fraud_nb.domain.money import Rates
from fraud_nb.domain.schema import Label, Transaction
from fraud_nb.features.shared import SharedHistory
from fraud_nb.features.tiles import (
    CHANGE,
    OWNED,
    READINGS,
    RECORD,
    TILE,
    WIDTH,
    Changes,
    Readings,
    Tiles,
    changes_of,
    claim_steps,
)
from fraud_nb.features.windows import events_of
from tests.parity.oracle import (
    DAY,
    HOUR,
    MINUTE,
    NO_AMOUNT,
    SECOND,
    UNKNOWN,
    Bought,
    Owners,
    Seen,
    TileOracle,
    is_claimed,
    readings,
    record,
    tiles,
)

BASE = 1_767_268_800_000  # noon, 2026-01-01
EDGES = [
    0,
    HOUR,
    2 * HOUR,
    24 * HOUR,
    25 * HOUR,
    *(days * DAY for days in (2, 7, 8, 9, 14, 15, 30, 31, 37, 38, 59, 60, 61, 62)),
]
THOROUGH = settings(
    max_examples=400,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)

# An earlier time, cut to a unit, and how far from there: edges must be hit exactly between any two purchases.
Step = tuple[int, int, int]
units = st.sampled_from([1, 1, SECOND, HOUR, DAY])
jitters = st.sampled_from([-1, 0, 0, 1])
edge_steps = st.builds(
    lambda edge, jitter, sign: sign * edge + jitter, st.sampled_from(EDGES), jitters, st.sampled_from([1, 1, -1])
)
steps = st.one_of(
    edge_steps,
    edge_steps,
    st.sampled_from([0, 1, -1, 999, 1_000, 1_001]),
    st.integers(1, 3 * HOUR),
    st.integers(-70 * DAY, 70 * DAY),
)
leaps = st.tuples(st.integers(0, 39), units, steps)
amounts = st.one_of(st.sampled_from([NO_AMOUNT, NO_AMOUNT, 0, 1, 10**15]), st.integers(0, 20_000))
# One identifier for a shop and for a device: they are different owners.
merchants, devices = st.sampled_from(["m:x", "m:x", "m:y", None]), st.sampled_from(["d:x", "d:z", None])
purchases = st.tuples(leaps, amounts, st.tuples(merchants, devices))
OWNERS = ("m:x", "m:y", "d:x", "d:z")


def time_of(times: Sequence[int], leap: Step) -> int:
    """A moment near one of those."""
    anchor, unit, step = leap
    return times[anchor % len(times)] // unit * unit + step


def to_times(leapt: Sequence[Step]) -> list[int]:
    """Each leap starts from one before it."""
    times = [BASE]
    for leap in leapt:
        times.append(time_of(times, leap))
    return times[1:]


class Change(NamedTuple):
    """A purchase (claim 0), or a claim about it."""

    time: int
    amount: int
    owners: Owners
    claim: int


def to_changes(drawn: Sequence[tuple[tuple[Step, int, Owners], int]]) -> list[Change]:
    """Every purchase, and its claim as often as it is made and taken back: an odd number of steps and it stands."""
    times = to_times([leap for (leap, _, _), _ in drawn])
    return [
        Change(time, amount, owners, claim)
        for time, ((_, amount, owners), flips) in zip(times, drawn, strict=True)
        for claim in [0, *[1, -1, 1, -1][:flips]]
    ]


change_lists = st.lists(st.tuples(purchases, st.sampled_from([0, 0, 1, 1, 2, 3, 4])), max_size=40).map(to_changes)


def seen_by(owner: str, changes: Sequence[Change]) -> list[Seen]:
    """What the changes come to; a claim stands if it was made more often than taken back."""
    mine = [change for change in changes if owner in change.owners]
    found: list[Seen] = []
    for change in mine:
        if change.claim == 0:
            found.append((change.time, change.amount, False))
        else:  # its own purchase is the last one before it
            found[-1] = (*found[-1][:2], change.claim > 0)
    return found


def compiled(kept: Tiles, changes: Sequence[Change]) -> Changes:
    """The same, as the package takes them."""
    parts = [np.zeros(0, CHANGE)]
    for each in changes:
        time, amount, none = (np.array([number]) for number in (each.time, each.amount, 0))
        claims = np.array([each.claim]) if each.claim else None
        parts.append(changes_of(kept.slots_of([each.owners]), time, amount, none, claims))
    return np.concatenate(parts)


def read(kept: Tiles, owners: Sequence[Owners], times: Sequence[int]) -> Readings:
    """What purchases would read now; none of them is added."""
    nothing = np.zeros(0, CHANGE)
    now = np.zeros(len(times), np.int64)
    found, unread = kept.tell(nothing, kept.slots_of(owners), np.array(times, np.int64), now)
    assert len(unread) == 0
    return found


def expected_readings(changes: Sequence[Change], owners: Owners, time: int) -> list[int]:
    """By definition."""
    unknown = [UNKNOWN] * len(READINGS)
    told = [
        number for owner in owners for number in (unknown if owner is None else readings(seen_by(owner, changes), time))
    ]
    shop, _ = owners
    return told + ([UNKNOWN] * len(RECORD) if shop is None else record(seen_by(shop, changes), time))


def check_tiles(kept: Tiles, changes: Sequence[Change]) -> None:
    """Equal tiles for every owner."""
    for owner in OWNERS:
        found = [dict(zip(TILE.names or (), row, strict=True)) for row in kept.rows(owner).tolist()]
        assert found == tiles(seen_by(owner, changes)), owner


@THOROUGH
@given(change_lists, st.randoms(use_true_random=False), st.lists(st.integers(0, 100), max_size=5), leaps)
def test_tiles_equal_oracle_in_any_order(
    changes: list[Change], chance: random.Random, cuts: list[int], leap: Step
) -> None:
    shuffled = chance.sample(changes, len(changes))
    edges = sorted({0, len(shuffled), *(min(cut, len(shuffled)) for cut in cuts)})
    whole, parts = Tiles(), Tiles(rows=8)
    whole.apply(compiled(whole, changes))
    check_tiles(whole, changes)
    for start, stop in zip(edges, edges[1:], strict=False):
        parts.apply(compiled(parts, shuffled[start:stop]))
        moved = Tiles(rows=8)  # dumped and loaded in the middle
        for owner in chance.sample(OWNERS, len(OWNERS)):
            moved.load([owner], [parts.dump(owner)])
        parts = moved
    assert [parts.dump(owner) for owner in OWNERS] == [whole.dump(owner) for owner in OWNERS]

    times = [change.time for change in changes] or [BASE]
    asked = [(owners, time) for owners in (("m:x", "d:x"), ("m:y", None)) for time in (*times, time_of(times, leap))]
    found = read(parts, [owners for owners, _ in asked], [time for _, time in asked])
    assert found.tolist() == [expected_readings(changes, owners, time) for owners, time in asked]


MIDNIGHT = BASE - 12 * HOUR
OLDEST = {  # hour tiles count back from this hour, days from today
    "count_1h": BASE - HOUR,
    "count_24h": BASE - 24 * HOUR,
    "count_30d": MIDNIGHT - 30 * DAY,
    "count_60d": MIDNIGHT - 60 * DAY,
    "amount_30d": MIDNIGHT - 30 * DAY,
    "frauds_14d": MIDNIGHT - 14 * DAY,
    "frauds_30d": MIDNIGHT - 30 * DAY,
    "frauds_60d": MIDNIGHT - 60 * DAY,
    "fraud_amount_60d": MIDNIGHT - 60 * DAY,
}


@pytest.mark.parametrize("name", OLDEST)
@pytest.mark.parametrize("asked", [BASE, BASE + HOUR - 1])
@pytest.mark.parametrize("is_newest", [False, True])  # of its owner's purchases
def test_old_edge_of_a_window(name: str, asked: int, is_newest: bool) -> None:
    for time, is_counted in ((OLDEST[name] - 1, False), (OLDEST[name], True), (OLDEST[name] + 1, True)):
        owners: Owners = ("m:x", None)
        changes = [Change(time, 7, owners, 0), Change(time, 7, owners, 1)]
        others = [] if is_newest else [Change(BASE, 0, owners, 0)]
        kept = Tiles(rows=8)
        kept.apply(compiled(kept, changes + others))
        found = read(kept, [owners], [asked])[0, READINGS.index(name)]
        worth = 7 if "amount" in name else 1
        assert found == is_counted * worth + (len(others) if name.startswith("count") else 0)


@pytest.mark.parametrize(("asked", "hours"), [(BASE - DAY, 0), (BASE, 0), (BASE + HOUR - 1, 0), (BASE + 61 * HOUR, 61)])
def test_hours_since_a_fraud(asked: int, hours: int) -> None:
    """From the beginning of its tile to this hour, or to the owner's newest one."""
    kept, owners = Tiles(rows=8), ("m:x", None)
    kept.apply(compiled(kept, [Change(time, 1, owners, claim) for time in (BASE, BASE - 60 * DAY) for claim in (0, 1)]))
    found = dict(zip(READINGS, read(kept, [owners], [asked])[0].tolist(), strict=False))
    first = 60 * 24 + 12 if hours == 0 else hours  # two days later, the first one is out of sight
    assert (found["fraud_hours"], found["first_fraud_hours"]) == (hours, first)


def test_nobody_and_nothing_yet() -> None:
    kept = Tiles(rows=8)
    found = read(kept, [(None, None), ("m:x", None), (None, "d:x")], [BASE] * 3).tolist()
    unknown, new = [UNKNOWN] * len(READINGS), [0] * (len(READINGS) - 2) + [UNKNOWN, UNKNOWN]
    nobody, blank = [UNKNOWN] * len(RECORD), [0] * (len(RECORD) - 2) + [UNKNOWN, UNKNOWN]
    assert found == [unknown + unknown + nobody, new + unknown + blank, unknown + new + nobody]


Days = list[tuple[int, int, int]]  # age in days, purchases, frauds
STREAK = RECORD.index("streak")


@pytest.mark.parametrize(
    ("days", "streak"),
    [
        ([(8, 1, 0)], (0, 0, UNKNOWN, 8)),
        ([(3, 2, 0), (7, 1, 0)], (0, 0, UNKNOWN, UNKNOWN)),  # too young to be genuine
        ([(3, 2, 1), (7, 2, 1), (9, 1, 1)], (3, 30, 9, UNKNOWN)),  # of young days what is known
        ([(8, 1, 1), (10, 2, 2), (11, 1, 0), (12, 1, 1)], (3, 30, 10, 11)),
        ([(8, 2, 1), (9, 1, 1)], (0, 0, UNKNOWN, 8)),  # a mixed day ends it and is not part of it
        ([(60, 1, 1), (61, 1, 0)], (1, 10, 60, UNKNOWN)),
    ],
)
def test_a_streak_ends_where_something_was_genuine(days: Days, streak: tuple[int, ...]) -> None:
    owners: Owners = ("m:x", None)
    changes = [
        Change(BASE - age * DAY, 10, owners, claim)
        for age, count, frauds in days
        for number in range(count)
        for claim in ([0, 1] if number < frauds else [0])
    ]
    kept = Tiles(rows=8)
    kept.apply(compiled(kept, changes))
    assert tuple(read(kept, [owners], [BASE])[0, OWNED + STREAK :].tolist()) == streak


@pytest.mark.parametrize(("days", "within"), [(1, 24), (7, 7 * 24), (30, 30 * 24)])
@pytest.mark.parametrize("hour", [0, 1, 23])
def test_a_mature_window_is_as_long_as_its_name_says(days: int, within: int, hour: int) -> None:
    """One purchase a day: as many 24ths as the window has hours."""
    kept, owners = Tiles(rows=8), ("m:x", None)
    kept.apply(compiled(kept, [Change(MIDNIGHT - age * DAY, 10, owners, 0) for age in range(60)]))
    found = read(kept, [owners], [MIDNIGHT + hour * HOUR])[0, OWNED:]
    assert found[RECORD.index(f"mature_{days}d")] == within


def test_all_hours_and_days_beside_a_neighbour() -> None:
    """An owner with every tile it can have, made in disorder, leaves the block before it alone."""
    chance = random.Random(5)
    both: tuple[Owners, Owners] = ("m:x", None), ("m:y", "d:x")
    changes = [
        Change(BASE - half_hours * 30 * MINUTE, 10 * half_hours, owners, claim)
        for half_hours in range(70 * 48)
        for owners in both
        for claim in ([0, 1] if half_hours % 10 == 0 else [0])
    ]
    kept = Tiles(rows=8)
    kept.apply(compiled(kept, chance.sample(changes, len(changes))))
    check_tiles(kept, changes)
    assert len(kept.rows("m:x")) == len(kept.rows("m:y")) == 25 + 60  # yesterday has a day's tile and twelve hours' own


Bill = tuple[tuple[Step, int, Owners], list[tuple[Step, bool]]]  # a purchase and its labels


def to_stream(drawn: Sequence[Bill]) -> list[Bought]:
    """Leaps become times; a label comes near any purchase, earlier or later than its own."""
    times = to_times([leap for (leap, _, _), _ in drawn])
    return [
        Bought(time, amount, owners, tuple((time_of([*times[row:], *times], at), is_fraud) for at, is_fraud in claims))
        for row, (time, ((_, amount, owners), claims)) in enumerate(zip(times, drawn, strict=True))
    ]


# Near what follows, because that is when somebody looks.
label_steps = st.one_of(st.sampled_from([0, -1, 1, 999, -999, 1_000, -1_000, -1_001]), edge_steps)
label_leaps = st.tuples(st.integers(0, 39), st.sampled_from([1, SECOND, SECOND]), label_steps)
label_lists = st.lists(st.tuples(label_leaps, st.sampled_from([True, True, False])), max_size=4)
streams = st.lists(st.tuples(purchases, label_lists), min_size=1, max_size=40).map(to_stream)
RATES = Rates()


def transaction_of(number: int, bought: Bought) -> Transaction:
    """In euros, or in a currency for which there is no rate."""
    merchant, device = (None if owner is None else owner[2:] for owner in bought.owners)
    amount, currency = (1, "SEK") if bought.amount == NO_AMOUNT else (bought.amount, "EUR")
    return Transaction(f"t{number}", "c", bought.time, amount, currency, merchant, device)


def run(shared: SharedHistory, stream: Sequence[Bought]) -> Readings:
    """The readings of a part of a history."""
    transactions = [transaction_of(number, bought) for number, bought in enumerate(stream)]
    labels = [[Label("t", is_fraud, at) for at, is_fraud in bought.claims] for bought in stream]
    return shared.read(transactions, events_of(transactions, RATES), labels)


def expected(stream: Sequence[Bought]) -> list[list[int]]:
    """The same, slowly."""
    oracle, found = TileOracle(), []
    for bought in stream:
        found.append(oracle.told(bought))
        oracle.accept(bought)
    return found


def differences(found: Readings, wanted: Sequence[Sequence[int]]) -> list[tuple[int, str, int, int]]:
    """Row, reading, found, wanted: what a failure should say."""
    names = [*(f"{kind} {name}" for kind in ("merchant", "device") for name in READINGS), *RECORD]
    return [
        (row, name, one, other)
        for row, (mine, theirs) in enumerate(zip(found.tolist(), wanted, strict=True))
        for name, one, other in zip(names, mine, theirs, strict=True)
        if one != other
    ]


@settings(THOROUGH, max_examples=800)
@given(streams)
def test_history_equals_oracle(stream: list[Bought]) -> None:
    found = run(SharedHistory(), stream)
    assert found.dtype == np.int64 and found.shape == (len(stream), WIDTH)
    assert differences(found, expected(stream)) == []


@THOROUGH
@given(streams, st.lists(st.integers(0, 40), max_size=6))
def test_chunks_make_no_difference(stream: list[Bought], cuts: list[int]) -> None:
    pieces = SharedHistory()
    pieces.tiles = Tiles(rows=8)
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts + cuts), len(stream)]  # with empty chunks between
    parts = [run(pieces, stream[start:stop]) for start, stop in zip(edges, edges[1:], strict=False)]
    assert np.concatenate(parts).tobytes() == run(SharedHistory(), stream).tobytes()


Claims = tuple[tuple[int, bool], ...]


def retold(stream: Sequence[Bought], change: Callable[[Claims], Claims]) -> list[Bought]:
    """The same purchases with other labels."""
    return [bought._replace(claims=change(bought.claims)) for bought in stream]


@THOROUGH
@given(streams, st.integers(0, 39), st.booleans())
def test_no_look_ahead(stream: list[Bought], row: int, is_fraud: bool) -> None:
    """What comes after a purchase, be it a purchase or a label, changes nothing for it and those before it."""
    head = stream[: row % len(stream) + 1]
    clock = max(bought.time for bought in head)
    until_now = run(SharedHistory(), stream)[: len(head)].tobytes()
    assert run(SharedHistory(), head).tobytes() == until_now

    def dropped(claims: Claims) -> Claims:
        return tuple((at, fraud) for at, fraud in claims if at <= clock)

    def flipped(claims: Claims) -> Claims:
        return tuple((at, fraud if at <= clock else not fraud) for at, fraud in claims)

    def added(claims: Claims) -> Claims:
        return (*claims, (clock + 1, is_fraud))

    for change in (dropped, flipped, added):
        assert run(SharedHistory(), retold(head, change)).tobytes() == until_now


def test_a_second_is_read_when_it_is_over() -> None:
    """Of an owner's purchases and labels those of earlier whole seconds."""
    claims = ((BASE + 2_999, True), (BASE + 4_000, False), (BASE + 3_500, True))
    moments = [0, 999, 1_000, 2_999, 3_000, 4_999, 5_000]
    stream = [Bought(BASE + moment, 10, ("m:x", None), claims if moment == 0 else ()) for moment in moments]
    found = run(SharedHistory(), stream)
    assert found[:, READINGS.index("count_1h")].tolist() == [0, 0, 2, 3, 4, 5, 6]
    assert found[:, READINGS.index("frauds_60d")].tolist() == [0, 0, 0, 0, 1, 1, 0]


def test_a_late_purchase_is_read_by_the_clock() -> None:
    """It is accepted when the newest before it was, whatever its own time says."""
    moments = [5_000, -2 * DAY, 5_999, 6_000]
    stream = [Bought(BASE + moment, 10, (None, "d:x"), ((BASE - DAY, True),)) for moment in moments]
    found = run(SharedHistory(), stream)[:, len(READINGS) : OWNED]
    assert found[:, READINGS.index("count_30d")].tolist() == [0, 0, 0, 3]
    assert found[:, READINGS.index("frauds_30d")].tolist() == [0, 0, 0, 3]


@pytest.mark.parametrize(
    ("labels", "steps"),
    [
        ([], []),
        ([(5, 5, True)], [(5, 1)]),
        ([(5, 5, False)], []),
        ([(5, 5, True), (6, 6, True), (7, 7, True)], [(5, 1)]),  # however many say so
        ([(5, 5, True), (6, 6, False), (7, 7, False), (8, 8, True)], [(5, 1), (6, -1), (8, 1)]),
        ([(5, 5, True), (6, 4, False)], [(5, 1)]),  # told later, and known earlier
        ([(6, 5, True), (5, 4, False)], [(6, 1)]),  # moments in no order
        ([(6, 4, True), (5, 5, False)], []),  # the fraud is seen when it is already taken back
        ([(5, 5, True), (5, 5, False)], []),  # one time, one moment: the last that came in
        ([(5, 5, False), (5, 5, True)], [(5, 1)]),
        ([(6, 5, False), (5, 5, True)], [(5, 1)]),  # one time: the last that came in, although it is seen first
        ([(6, 5, True), (5, 5, False)], []),
        ([(5, 3, True), (5, 2, False), (5, 4, False), (9, 9, True)], [(9, 1)]),
    ],
)
def test_claim_steps_by_hand(labels: list[tuple[int, int, bool]], steps: list[tuple[int, int]]) -> None:
    told = [(moment, Label("t", is_fraud, at)) for moment, at, is_fraud in labels]
    assert claim_steps(told) == steps


few = st.integers(0, 5)


@THOROUGH
@given(st.lists(st.tuples(few, few, st.booleans()), max_size=6))
def test_claim_steps_equal_oracle(labels: list[tuple[int, int, bool]]) -> None:
    found = claim_steps([(moment, Label("t", is_fraud, at)) for moment, at, is_fraud in labels])
    assert [moment for moment, _ in found] == sorted({moment for moment, _ in found})
    for now in range(-1, 7):
        stands = is_claimed([(at, is_fraud) for moment, at, is_fraud in labels if moment <= now])
        assert sum(sign for moment, sign in found if moment <= now) == stands


def town(seed: int, count: int) -> list[Bought]:
    """Many owners, most of them met rarely and some all the time, over a hundred days."""
    chance, stream, now = random.Random(seed), [], BASE
    for _ in range(count):
        now += int(chance.expovariate(count / (100 * DAY)))
        time = now - chance.choice([0, 0, 0, 0, chance.randrange(DAY), chance.randrange(90 * DAY)])
        shop, phone = (int(chance.expovariate(1 / 60)) for _ in range(2))
        owners = (chance.choice([f"m:{shop}", f"m:{shop}", None]), chance.choice([f"d:{phone}", None]))
        claims = tuple(
            (time + int(chance.expovariate(1 / (5 * DAY))), chance.random() < 0.7)
            for _ in range(chance.choice([0, 0, 0, 0, 1, 2]))
        )
        stream.append(Bought(time, chance.choice([NO_AMOUNT, chance.randrange(10**6)]), owners, claims))
    return stream


def test_many_owners_in_a_tiny_arena() -> None:
    """The arena grows while rows are read, and blocks of every size are taken from and given to the free list."""
    stream, shared = town(7, 4_000), SharedHistory()
    shared.tiles = Tiles(rows=8)
    found = np.concatenate([run(shared, stream[start : start + 700]) for start in range(0, len(stream), 700)])
    assert differences(found, expected(stream)) == []
    assert {name: int((column > 0).sum()) for name, column in columns(found).items() if (column > 0).sum() < 200} == {}


def columns(found: Readings) -> dict[str, npt.NDArray[np.int64]]:
    """The readings of merchants by name."""
    of_shops = np.hstack([found[:, : len(READINGS)], found[:, OWNED:]])
    return {name: of_shops[:, place] for place, name in enumerate((*READINGS, *RECORD))}


def test_absurd_amounts_do_not_wrap() -> None:
    """Nine million million million would be more than 64 bits hold; a tile counts 10**12 of each."""
    tiles, count = Tiles(), 20_000
    slots = tiles.slots_of([("m:a", None)] * count)
    times, at = np.full(count, BASE), np.zeros(count, np.int64)
    tiles.apply(changes_of(slots, times, np.full(count, 10**15), at))
    tiles.apply(changes_of(slots, times, np.full(count, 10**15), at, np.ones(count, np.int64)))
    (tile,) = tiles.rows("m:a")
    assert (tile["count"], tile["amount"], tile["fraud_amount"]) == (count, count * 10**12, count * 10**12)
