"""The features once more, slowly: plain Python, written from the definitions and not from the compiled code."""

import math
import statistics
import struct
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

Row = dict[str, int]  # one event: field name -> integer
Value = int | float
Owners = tuple[str | None, str | None]  # a purchase's merchant and device

# Written down afresh: importing them would let a wrong constant agree with itself.
SECOND = 1_000
MINUTE = 60_000
HOUR = 3_600_000
DAY = 86_400_000
REACH = 7_776_000_000  # ninety days
KEPT = 1_024
MOST = 1_000_000_000_000  # of an amount, in a tile
NO_AMOUNT = -1
NO_PLACE = -2_147_483_648
ABSENT = 0  # merchant, device, category
MEAN_RADIUS_M = 6_371_008.8
COUNT_WINDOWS = {"1m": MINUTE, "10m": 10 * MINUTE, "1h": HOUR, "24h": DAY, "7d": 7 * DAY, "30d": 30 * DAY}
NAN = float("nan")
UNKNOWN = -1
WINDOWED = ("count_1h", "count_24h", "count_30d", "count_60d", "amount_30d", "frauds_14d", "frauds_30d", "frauds_60d")
READINGS = (*WINDOWED, "fraud_amount_60d", "fraud_hours", "first_fraud_hours")  # of one owner
MATURE = 7  # days
MATURE_WINDOWS = (1, 7, 30)  # days
RECORD = (
    *(f"mature_{days}d" for days in MATURE_WINDOWS),
    *(f"mature_frauds_{days}d" for days in MATURE_WINDOWS),
    *("streak", "streak_amount", "streak_days", "genuine_days"),
)  # of a merchant
OWNED = 2 * len(READINGS)
NOTHING_TOLD = (UNKNOWN,) * (OWNED + len(RECORD))


class Oracle:
    """Every accepted event of every customer, in order of acceptance; nothing is ever thrown away."""

    def __init__(self) -> None:
        self.accepted: dict[str, list[Row]] = {}

    def accept(self, customer: str, event: Row) -> None:
        """Learn."""
        self.accepted.setdefault(customer, []).append(event)

    def state(self, customer: str) -> list[Row]:
        """What the contract says is remembered, oldest first, derived from scratch."""
        everything = self.accepted.get(customer, [])
        if not everything:
            return []
        newest = max(event["event_time"] for event in everything)
        within = [
            (event["event_time"], sequence)
            for sequence, event in enumerate(everything)
            if event["event_time"] > newest - REACH
        ]
        return [everything[sequence] for _, sequence in sorted(within)[-KEPT:]]

    def features(self, customer: str, purchase: Row, told: Sequence[int] | None = None) -> dict[str, Value]:
        """The vector of a purchase not yet accepted, by name; `told` is what its merchant and its device read."""
        past = [event for event in self.state(customer) if event["event_time"] <= purchase["event_time"]]
        return dict(_features(purchase, past, NOTHING_TOLD if told is None else told))


def _features(purchase: Row, past: Sequence[Row], told: Sequence[int]) -> Iterator[tuple[str, Value]]:
    """All families, in no particular order: columns are matched by name."""
    for family in (_spree, _means, _novelty, _habit, _movement, _variety, _extremes, _velocity, _itself):
        yield from family(purchase, past)
    merchant, device = told[: len(READINGS)], told[len(READINGS) : OWNED]
    yield from _device(dict(zip(READINGS, device, strict=True)))
    yield from _record(dict(zip(RECORD, told[OWNED:], strict=True)))
    yield from _merchant(purchase, dict(zip(READINGS, merchant, strict=True)))


def _within(purchase: Row, past: Sequence[Row], length: int) -> list[Row]:
    """The old edge is open, the new one closed."""
    now = purchase["event_time"]
    return [event for event in past if now - length < event["event_time"] <= now]


def _amounts(events: Sequence[Row]) -> list[int]:
    """The known ones."""
    return [event["amount"] for event in events if event["amount"] != NO_AMOUNT]


def _itself(purchase: Row, past: Sequence[Row]) -> Iterator[tuple[str, Value]]:
    days, in_day = divmod(purchase["event_time"], DAY)
    hour = in_day // HOUR
    yield "amount", NAN if purchase["amount"] == NO_AMOUNT else purchase["amount"]
    yield "hour", hour
    yield "weekday", (days + 3) % 7  # 1970-01-01 was a Thursday; Monday is 0
    yield "is_night", int(hour in range(6))


def _velocity(purchase: Row, past: Sequence[Row]) -> Iterator[tuple[str, Value]]:
    for label, length in COUNT_WINDOWS.items():
        recent = _within(purchase, past, length)
        yield f"customer_count_{label}", len(recent)
        yield f"customer_sum_{label}", sum(_amounts(recent))


def _extremes(purchase: Row, past: Sequence[Row]) -> Iterator[tuple[str, Value]]:
    for label in ("24h", "30d"):
        known = _amounts(_within(purchase, past, COUNT_WINDOWS[label]))
        yield f"customer_max_{label}", max(known) if known else NAN


def _variety(purchase: Row, past: Sequence[Row]) -> Iterator[tuple[str, Value]]:
    for label in ("24h", "7d"):
        recent = _within(purchase, past, COUNT_WINDOWS[label])
        yield f"customer_merchants_{label}", len({event["merchant"] for event in recent} - {ABSENT})
        yield f"customer_devices_{label}", len({event["device"] for event in recent} - {ABSENT})


def _movement(purchase: Row, past: Sequence[Row]) -> Iterator[tuple[str, Value]]:
    elapsed = purchase["event_time"] - past[-1]["event_time"] if past else None
    yield "seconds_since_last", NAN if elapsed is None else elapsed / SECOND
    placed = [event for event in past if event["latitude"] != NO_PLACE]
    if not placed or purchase["latitude"] == NO_PLACE:
        yield from ((name, NAN) for name in ("distance_from_last", "speed_from_last", "distance_from_usual"))
        return
    last = placed[-1]
    away = metres((last["latitude"], last["longitude"]), (purchase["latitude"], purchase["longitude"]))
    yield "distance_from_last", away
    yield "speed_from_last", away * 3600 / max(purchase["event_time"] - last["event_time"], SECOND)
    home = _middle(event["latitude"] for event in placed), _middle(event["longitude"] for event in placed)
    yield "distance_from_usual", metres(home, (purchase["latitude"], purchase["longitude"]))


def _middle(values: Iterator[int]) -> int:
    """The median; half a micro-degree goes down."""
    return math.floor(statistics.median([Fraction(value) for value in values]))


def metres(one: tuple[int, int], other: tuple[int, int]) -> int:
    """Haversine on the mean sphere, to the nearest metre."""
    degree = math.pi / 180e6  # one micro-degree
    half_north = (other[0] - one[0]) * degree / 2.0
    half_east = (other[1] - one[1]) * degree / 2.0
    shrink = math.cos(one[0] * degree) * math.cos(other[0] * degree)
    # Grouped like this because half a turn away the last bit of the square is worth centimetres.
    square = math.sin(half_north) * math.sin(half_north) + shrink * math.sin(half_east) * math.sin(half_east)
    return math.floor(2 * MEAN_RADIUS_M * math.asin(math.sqrt(min(1.0, square))) + 0.5)


def _habit(purchase: Row, past: Sequence[Row]) -> Iterator[tuple[str, Value]]:
    yield "history_count", len(past)
    yield "history_days", (purchase["event_time"] - past[0]["event_time"]) / DAY if past else NAN
    known = _amounts(past)
    habit = len(known) >= 3
    middle = statistics.median([Fraction(amount) for amount in known]) if habit else Fraction(0)
    spread = statistics.median([abs(amount - middle) for amount in known]) if habit else Fraction(0)
    outliers = [amount for amount in _amounts(_within(purchase, past, 7 * DAY)) if amount > 3 * middle]
    yield "customer_outliers_7d", len(outliers) if habit else NAN
    judged = habit and purchase["amount"] != NO_AMOUNT
    amount = Fraction(purchase["amount"])
    # The median is a whole or a half number; half a minor unit is the least it can be other than zero.
    yield "amount_to_median", float(amount / max(middle, Fraction(1, 2))) if judged else NAN
    yield "amount_in_spreads", float((amount - middle) / max(spread, Fraction(1))) if judged else NAN


def _novelty(purchase: Row, past: Sequence[Row]) -> Iterator[tuple[str, Value]]:
    for name in ("merchant", "device", "category"):
        same = [event for event in past if event[name] == purchase[name]]
        yield f"same_{name}_count", NAN if purchase[name] == ABSENT else len(same)


def _means(purchase: Row, past: Sequence[Row]) -> Iterator[tuple[str, Value]]:
    for label in ("24h", "7d", "30d"):
        known = _amounts([*_within(purchase, past, COUNT_WINDOWS[label]), purchase])
        yield f"customer_mean_{label}", _ratio(sum(known), len(known)) if known else NAN


def _spree(purchase: Row, past: Sequence[Row]) -> Iterator[tuple[str, Value]]:
    known = _amounts(past)
    habit = len(known) >= 3
    usual = [amount for amount in known if amount <= 3 * Fraction(sum(known), len(known))] if habit else []
    total, count = max(sum(usual), 1), len(usual)
    judged = habit and purchase["amount"] != NO_AMOUNT
    yield "amount_to_usual", _ratio(purchase["amount"] * count, total) if judged else NAN
    recent = _within(purchase, past, 14 * DAY)
    outliers = [event for event in recent if habit and event["amount"] * count > 3 * sum(usual)]
    for label, length in (("24h", DAY), ("3d", 3 * DAY), ("14d", 14 * DAY)):
        yield f"customer_spree_{label}", len(_within(purchase, outliers, length)) if habit else NAN
    yield "spree_days", (purchase["event_time"] - outliers[0]["event_time"]) / DAY if outliers else NAN
    yield "spree_largest", _ratio(max([0, *_amounts(recent)]) * count, total) if habit else NAN


def _record(told: Row) -> Iterator[tuple[str, Value]]:
    known, streak = told["streak"] != UNKNOWN, told["streak"] > 0
    for days in MATURE_WINDOWS:
        mature, frauds = told[f"mature_{days}d"], told[f"mature_frauds_{days}d"]
        yield f"merchant_mature_{days}d", mature / 24 if known else NAN
        yield f"merchant_risk_{days}d", _ratio(frauds, max(mature, frauds, 1)) if known else NAN
    yield "merchant_streak", told["streak"] if known else NAN
    yield "merchant_streak_mean", _ratio(told["streak_amount"], told["streak"]) if streak else NAN
    yield "merchant_streak_days", told["streak_days"] if streak else NAN
    yield "merchant_genuine_days", told["genuine_days"] if known and told["genuine_days"] != UNKNOWN else NAN


def _merchant(purchase: Row, told: Row) -> Iterator[tuple[str, Value]]:
    known, claimed = told["count_30d"] != UNKNOWN, told["frauds_60d"] > 0
    for name in ("count_1h", "count_24h", "count_30d", "frauds_14d", "frauds_30d"):
        yield f"merchant_{name}", told[name] if known else NAN
    compared = known and purchase["amount"] != NO_AMOUNT and told["amount_30d"] != 0
    scaled = float(purchase["amount"]) * float(told["count_30d"])  # in integers it may be too large
    yield "amount_to_merchant_mean", scaled / float(told["amount_30d"]) if compared else NAN
    yield "merchant_fraud_share", _ratio(told["frauds_60d"], max(told["count_60d"], 1)) if known else NAN
    yield "merchant_fraud_mean", _ratio(told["fraud_amount_60d"], told["frauds_60d"]) if known and claimed else NAN
    for name in ("fraud_hours", "first_fraud_hours"):
        yield f"merchant_{name}", told[name] if known and claimed else NAN


def _device(told: Row) -> Iterator[tuple[str, Value]]:
    for name in ("count_1h", "count_24h", "count_30d", "frauds_60d"):
        yield f"device_{name}", told[name] if told["count_30d"] != UNKNOWN else NAN


def _ratio(part: int, whole: int) -> float:
    """Rounded to float64 before the division as well; Python's own would round once."""
    return float(part) / float(whole)


class Bought(NamedTuple):
    """A purchase as its merchant and its device see it."""

    time: int
    amount: int
    owners: Owners
    claims: tuple[tuple[int, bool], ...] = ()  # label time and "it is fraud", in the order they came in


Seen = tuple[int, int, bool]  # of one purchase: time, amount, whether the claim that it is fraud stands


def is_claimed(claims: Sequence[tuple[int, bool]]) -> bool:
    """The newest label decides; of several with one time, the one that came in last."""
    return max((at, order, is_fraud) for order, (at, is_fraud) in enumerate(claims))[2] if claims else False


def tiles(seen: Sequence[Seen]) -> list[Row]:
    """What is kept of an owner's purchases, oldest first."""
    newest = _floor(max((time for time, _, _ in seen), default=0), HOUR)
    parts: dict[int, list[Seen]] = {}
    for one in seen:
        hour, day = _floor(one[0], HOUR), _floor(one[0], DAY)
        if hour >= newest - DAY:
            parts.setdefault(hour, []).append(one)
        elif day >= _floor(newest, DAY) - 60 * DAY:
            parts.setdefault(day, []).append(one)
    return [_tile(begin, parts[begin]) for begin in sorted(parts)]


def _floor(time: int, unit: int) -> int:
    """Where its second, hour or day (UTC) begins."""
    return time // unit * unit


def _tile(begin: int, part: Sequence[Seen]) -> Row:
    """The sums of an hour or a day."""
    known = [(min(amount, MOST) if amount != NO_AMOUNT else 0, is_fraud) for _, amount, is_fraud in part]
    frauds = [amount for amount, is_fraud in known if is_fraud]
    sums = {"amount": sum(amount for amount, _ in known), "fraud_amount": sum(frauds)}
    return {"event_time": begin, **sums, "count": len(part), "frauds": len(frauds)}


def readings(seen: Sequence[Seen], time: int) -> list[int]:
    """What an owner's tiles say to a purchase at this time."""
    kept = tiles(seen)
    if not kept:
        return [0] * (len(READINGS) - 2) + [UNKNOWN, UNKNOWN]
    hour = _floor(max(time, *(each for each, _, _ in seen)), HOUR)
    today = _floor(hour, DAY)
    since = {"1h": hour - HOUR, "24h": hour - DAY, "14d": today - 14 * DAY}
    since |= {"30d": today - 30 * DAY, "60d": today - 60 * DAY}
    found = []
    for name in READINGS[:-2]:
        field, window = name.rsplit("_", 1)
        found.append(sum(tile[field] for tile in kept if tile["event_time"] >= since[window]))
    claimed = [tile["event_time"] for tile in kept if tile["event_time"] >= since["60d"] and tile["frauds"] > 0]
    ages = [(hour - begin) // HOUR for begin in claimed]
    return [*found, min(ages, default=UNKNOWN), max(ages, default=UNKNOWN)]


def record(seen: Sequence[Seen], time: int) -> list[int]:
    """What has become of a merchant's purchases, from single purchases and not from tiles."""
    hour = _floor(max([time, *(each for each, _, _ in seen)]), HOUR)
    today = _floor(hour, DAY)
    days: dict[int, list[Seen]] = {}  # by age in days
    for one in seen:
        if _floor(one[0], DAY) >= today - 60 * DAY:
            days.setdefault((today - _floor(one[0], DAY)) // DAY, []).append(one)
    found = dict.fromkeys(RECORD, 0) | {"streak_days": UNKNOWN, "genuine_days": UNKNOWN}
    for length in MATURE_WINDOWS:
        for age, part in days.items():
            hours = [hour - MATURE * DAY - back * HOUR for back in range(1, length * 24 + 1)]
            within = sum(_floor(begin, DAY) == today - age * DAY for begin in hours)
            frauds = sum(is_fraud for _, _, is_fraud in part)
            found[f"mature_{length}d"] += within * len(part)
            found[f"mature_frauds_{length}d"] += (24 if age == MATURE else within) * frauds
    genuine = [age for age, part in days.items() if age > MATURE and not all(is_fraud for _, _, is_fraud in part)]
    streak = [
        (age, min(amount, MOST) if amount != NO_AMOUNT else 0)
        for age, part in days.items()
        for _, amount, is_fraud in part
        if is_fraud and age < min(genuine, default=61)
    ]
    found |= {"streak": len(streak), "streak_amount": sum(amount for _, amount in streak)}
    found |= {"streak_days": max((age for age, _ in streak), default=UNKNOWN)}
    return list((found | {"genuine_days": min(genuine, default=UNKNOWN)}).values())


class TileOracle:
    """Every accepted purchase with all labels it will ever have, by owner; nothing is added up beforehand."""

    def __init__(self) -> None:
        self.clock = 0
        self.bought: dict[str, list[tuple[int, Bought]]] = {}  # with the clock at which each was accepted

    def accept(self, bought: Bought) -> None:
        """Learn."""
        self.clock = max(self.clock, bought.time)
        for owner in bought.owners:
            if owner is not None:
                self.bought.setdefault(owner, []).append((self.clock, bought))

    def told(self, bought: Bought) -> list[int]:
        """What a purchase not yet accepted reads: whole seconds that were over when it came."""
        until = _floor(max(self.clock, bought.time), SECOND) - 1
        unknown = [UNKNOWN] * len(READINGS)
        merchant, device = (
            unknown if owner is None else readings(self.known(owner, until), bought.time) for owner in bought.owners
        )
        shop, _ = bought.owners
        of_shop = [UNKNOWN] * len(RECORD) if shop is None else record(self.known(shop, until), bought.time)
        return merchant + device + of_shop

    def known(self, owner: str, until: int) -> list[Seen]:
        """An owner's purchases accepted by a moment, with the claims that stood then."""
        return [
            (each.time, each.amount, is_claimed([claim for claim in each.claims if max(claim[0], clock) <= until]))
            for clock, each in self.bought.get(owner, [])
            if clock <= until
        ]


def bits(value: Value) -> bytes:
    """Four bytes of the nearest float32; every NaN is the same NaN."""
    if isinstance(value, float) and math.isnan(value):
        return b"nan "
    return struct.pack("<f", _nearest(value) if isinstance(value, int) else value)


def _nearest(whole: int) -> float:
    """The float32 nearest to an integer, ties to even, rounded once: by way of float64 it would be twice."""
    unit = 1 << max(whole.bit_length() - 24, 0)
    return float(round(Fraction(whole, unit)) * unit)


def by_name(names: Sequence[str], found: dict[str, Value]) -> dict[str, bytes]:
    """The oracle's vector in the catalogue's order."""
    return {name: bits(found[name]) for name in names}
