"""Bad input in 64 classes: the bytes, and what each way in says to them. Good neighbours of the bad are here too."""

import gzip
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from fraud_nb.adapters.kafka_bus import murmur2_partitions
from fraud_nb.features.windows import DAY_MS, MINUTE_MS

CANARY = "5500005555555559"  # looks like a card number: no refusal, log line or metric may repeat it
PARTITIONS = 4
TEXTS = ("transaction_id", "customer_id", "merchant_id", "device_id", "ip", "category", "channel")


class Refusal(NamedTuple):
    """A dead letter on the stream; 400 over HTTP, unless there is a better word for it there."""

    field: str
    reason: str
    status: int = 400


DECIDED, REPEAT, CONFLICT = "decided", "repeat", "conflict"  # over HTTP: 200, 200 and the same answer, 409
UNSENT = "unsent"  # the broker refuses it, and says so to the sender
Expected = Refusal | str


class Example(NamedTuple):
    """One message."""

    body: bytes | None
    stream: Expected
    http: Expected
    ident: str  # of the purchase it holds, or pretends to hold
    customer: str = "ada"
    steps_astray: int = 0  # how far from the customer's partition it is put


@dataclass(frozen=True)
class Class:
    """One way in which input can be bad, or only look bad."""

    group: str
    name: str
    examples: list[Example]


def check_over_http(
    each: Class,
    predict: Callable[[bytes | None], Any],  # asks the service; what it tells has a status and JSON
) -> None:
    """All examples of a class are answered as they must be, in order."""
    decided: dict[str, Any] = {}
    for example in each.examples:
        told = predict(example.body)
        if isinstance(example.http, Refusal):
            name, reason, status = example.http
            assert (told.status, told.json["field"], told.json["error"]) == (status, name, reason), each
            assert told.json["detail"] and CANARY.encode() not in told.body
        elif example.http == CONFLICT:
            assert (told.status, told.json["error"], told.json["field"]) == (409, "conflict", "transaction_id"), each
        else:
            answer = told.json | {"latency_ms": 0}
            assert (told.status, answer["transaction_id"], answer["recorded"]) == (200, example.ident, True), each
            assert example.http == (REPEAT if example.ident in decided else DECIDED)
            assert decided.setdefault(example.ident, answer) == answer


def purchase(ident: str, now_ms: int, **changed: str | None) -> bytes:
    """A good message with some fields written otherwise, added, or left out. Values are JSON as it is written."""
    fields: dict[str, str | None] = {
        "transaction_id": f'"{ident}"',
        "customer_id": '"ada"',
        "event_time": str(now_ms),
        "amount": "15.00",
        "currency": '"EUR"',
        "merchant_id": f'"{CANARY}"',
        "latitude": "52.52",
        "longitude": "13.405",
    } | changed
    written = (f'"{name}":{text}' for name, text in fields.items() if text is not None)
    return ("{" + ",".join(written) + "}").encode("utf-8", "surrogatepass")


def home_of(customer: str) -> int:
    """The customer's partition."""
    return int(murmur2_partitions([customer.encode()], PARTITIONS)[0])


def neighbour_of(customer: str) -> str:
    """Somebody else in the same partition."""
    return next(name for number in range(99) if home_of(name := f"neighbour {number}") == home_of(customer))


class Corpus:
    """All classes, with ids that begin with a prefix: ask again under another one."""

    def __init__(self, prefix: str, now_ms: int) -> None:
        self.prefix, self.now_ms, self.number = prefix, now_ms, 0

    def classes(self) -> list[Class]:
        groups = {
            "framing": self.framing(),
            "structure": self.structure(),
            "numbers": self.numbers(),
            "strings": self.strings(),
            "time and place": self.time_and_place(),
            "identity": self.identity(),
        }
        return [Class(group, name, examples) for group, found in groups.items() for name, examples in found.items()]

    def ident(self) -> str:
        self.number += 1
        return f"{self.prefix}-{self.number}"

    def bytes_of(self, **changed: str | None) -> tuple[str, bytes]:
        """The next id, and a good message with these fields written otherwise."""
        ident = self.ident()
        return ident, purchase(ident, self.now_ms, **changed)

    def plain(self, body: bytes | None, stream: Expected, http: Expected | None = None) -> Example:
        """These very bytes."""
        return Example(body, stream, stream if http is None else http, self.ident())

    def with_fields(self, expected: Expected, **changed: str | None) -> Example:
        """A purchase, changed."""
        ident, body = self.bytes_of(**changed)
        return Example(body, expected, expected, ident)

    def framing(self) -> dict[str, list[Example]]:
        not_json, empty = Refusal("message", "not_json"), Refusal("message", "empty")
        too_large = Refusal("message", "too_large", 413)
        good = self.bytes_of()[1]
        return {
            "empty": [self.plain(b"", empty)],
            "whitespace": [self.plain(b" \r\n\t ", empty)],
            "byte order mark": [self.plain(b"\xef\xbb\xbf" + good, not_json)],
            "UTF-16": [self.plain(good.decode().encode(codec), not_json) for codec in ("utf-16", "utf-16-be")],
            "invalid UTF-8": [self.with_fields(not_json, device_id='"\udcff"'), self.plain(b"\xff" + good, not_json)],
            "truncated": [self.plain(good[:-1], not_json), self.plain(good[: len(good) // 2], not_json)],
            "trailing bytes": [self.plain(good + tail, not_json) for tail in (b"x", b"\0", b"}")],
            "two documents": [self.plain(good + good, not_json)],
            "one document a line": [self.plain(good + b"\n" + self.bytes_of()[1] + b"\n", not_json)],
            "gzip": [self.plain(gzip.compress(good), not_json)],
            "10 MB": [
                self.plain(good.rjust(10_000_000), UNSENT, too_large),
                *(self.plain(good.rjust(size), too_large) for size in (1_000_000, 65_537)),
            ],
            "tombstone": [self.plain(None, empty)],
        }

    def structure(self) -> dict[str, list[Example]]:
        wrong_type, unknown = Refusal("message", "wrong_type"), Refusal("message", "unknown_field")
        good = self.bytes_of()[1]
        deep = "[" * 30_000 + "]" * 30_000
        ident = self.ident()
        twice = purchase(ident, self.now_ms).replace(b'"amount":', b'"amount":99.00,"amount":')
        required = ("transaction_id", "customer_id", "event_time", "amount")
        many = {f"{number:x}": "1" for number in range(100_000)}
        return {
            "array": [self.plain(b"[]", wrong_type), self.plain(b"[" + good + b"]", wrong_type)],
            "scalar": [self.plain(text, wrong_type) for text in (b"1", b'"x"', b"true", CANARY.encode())],
            "null": [self.plain(b"null", wrong_type)],
            "deep": [
                self.plain(b"[" * 100_000, Refusal("message", "too_large", 413)),
                self.with_fields(Refusal("message", "not_json"), amount=deep),
            ],
            "a field twice: the last counts": [Example(twice, DECIDED, DECIDED, ident)],
            "a field is missing": [self.with_fields(Refusal(name, "missing"), **{name: None}) for name in required],
            "a field too many": [
                self.with_fields(unknown, pan=f'"{CANARY}"'),
                self.with_fields(unknown, **{CANARY: "1"}),
            ],
            "a field with power elsewhere": [
                self.with_fields(unknown, **{name: '{"x":1}'}) for name in ("__proto__", "__class__", "constructor")
            ],
            "a field in other letters": [
                self.with_fields(unknown, amount=None, Amount="1"),
                self.with_fields(unknown, Transaction_Id='"x"'),
            ],
            "100,000 fields": [
                self.with_fields(Refusal("message", "too_large", 413), **many),
                self.with_fields(unknown, **dict(list(many.items())[:5_000])),
            ],
        }

    def numbers(self) -> dict[str, list[Example]]:
        def amounts(expected: Expected, *texts: str) -> list[Example]:
            return [self.with_fields(expected, amount=text) for text in texts]

        not_json, beyond = Refusal("message", "not_json"), Refusal("amount", "out_of_range")
        north = Refusal("latitude", "out_of_range")
        wrong_type, decimals = Refusal("amount", "wrong_type"), Refusal("amount", "too_many_decimals")
        time = Refusal("event_time", "out_of_range")
        return {
            "not a number": amounts(not_json, "NaN", "nan"),
            "infinite": amounts(not_json, "Infinity"),
            "infinite and negative": amounts(not_json, "-Infinity"),
            "beyond every float": [*amounts(beyond, "1e400"), self.with_fields(north, latitude="1e400")],
            "below every float": [*amounts(decimals, "5e-324"), self.with_fields(DECIDED, latitude="5e-324")],
            "minus zero": [*amounts(DECIDED, "-0.0"), self.with_fields(DECIDED, latitude="-0.0")],
            "negative": amounts(Refusal("amount", "negative"), "-15.00", "-1e-2"),
            "zero": amounts(DECIDED, "0", "0.00", "0e9"),
            "a part of a cent": [
                *amounts(decimals, "0.30000000000000004", "15.001"),
                *amounts(DECIDED, "0.30", "15.0"),
            ],
            "more than anybody pays": [*amounts(beyond, "10000000000000.01", CANARY), *amounts(DECIDED, "1e13")],
            "2^53 + 1": [*amounts(beyond, str(2**53 + 1)), self.with_fields(time, event_time=str(2**53 + 1))],
            "2^63": [
                *amounts(beyond, str(2**63)),
                self.with_fields(time, event_time=str(2**63)),
                self.with_fields(time, event_time=str(-(2**63) - 1)),
            ],
            "5,000 digits": [
                *amounts(beyond, "9" * 5_000),
                *amounts(decimals, "0." + "1" * 5_000),
                self.with_fields(time, event_time="9" * 5_000),
            ],
            "a number as text": [
                *amounts(wrong_type, '"12"', f'"{CANARY}"'),
                self.with_fields(Refusal("event_time", "wrong_type"), event_time=f'"{self.now_ms}"'),
                self.with_fields(Refusal("latitude", "wrong_type"), latitude='"52.52"'),
            ],
            "true": [
                *amounts(wrong_type, "true"),
                self.with_fields(Refusal("event_time", "wrong_type"), event_time="true"),
            ],
            "a whole number with a point": [
                self.with_fields(Refusal("event_time", "wrong_type"), event_time=f"{self.now_ms}{rest}")
                for rest in (".0", ".5", "e0")
            ],
        }

    def strings(self) -> dict[str, list[Example]]:
        def each(text: str) -> list[Example]:
            return [self.with_fields(Refusal(name, "bad_text"), **{name: text}) for name in TEXTS]

        def no_json(text: str) -> Example:
            return self.with_fields(Refusal("message", "not_json"), merchant_id=text)

        def at_shop(*texts: str) -> list[Example]:
            return [self.with_fields(DECIDED, merchant_id=f'"{text}"') for text in texts]

        large = self.with_fields(Refusal("message", "too_large", 413), merchant_id=f'"{"x" * 1_000_000}"')
        return {
            "empty text": each('""'),
            "spaces": at_shop(" ", "   x "),
            "64, 65 and a million letters": [*at_shop("x" * 64, "ü" * 64), *each(f'"{"x" * 65}"'), large],
            "NUL": [*each(f'"{CANARY}\\u0000"'), no_json('"a\0b"')],
            "a new line": [*each('"a\\nb"'), *each('"a\\u2028b"'), no_json('"a\nb"')],
            "half a surrogate pair": [no_json(f'"\\ud800{CANARY}"'), no_json('"\ud800"')],
            "letters from the right, and of no width": at_shop("\u202eabc", "a\u200bb", "\ufeffbooks"),
            "letters that look like others": at_shop("b\u043e\u043eks", "caf\u00e9", "cafe\u0301", "\uff42ooks"),
            "SQL": at_shop("'; DROP TABLE decisions; --", "a\\\\.", "\\\\N", "%s", "$1"),
            "HTML": at_shop("<script>alert(1)</script>", "<img src=x onerror=alert(1)>"),
            "a line of the log": each('"x\\r\\n{\\"level\\":\\"error\\"}"'),
            "a template": at_shop("{{7*7}}", "{0.__class__}", "${jndi:ldap://x}", "%(x)s %n"),
        }

    def time_and_place(self) -> dict[str, list[Example]]:
        def at(expected: Expected, *times: int) -> list[Example]:
            return [self.with_fields(expected, event_time=str(time)) for time in times]

        beyond, future = Refusal("event_time", "out_of_range"), Refusal("event_time", "in_the_future")
        north, east = Refusal("latitude", "out_of_range"), Refusal("longitude", "out_of_range")
        beyond_the_pole = ("90.0001", "-90.0001", CANARY)
        around = [self.with_fields(east, longitude=text) for text in ("180.0001", "-181")]
        return {
            "the beginning of 1970": at(beyond, 0),
            "before 1970": at(beyond, -1, -self.now_ms),
            "seconds, not milliseconds": at(beyond, self.now_ms // 1_000),
            "the year 2099": [*at(future, 4_086_000_000_000), *at(beyond, 4_102_444_800_001, int(CANARY))],
            "five minutes ahead": [*at(DECIDED, self.now_ms + 4 * MINUTE_MS), *at(future, self.now_ms + DAY_MS)],
            "late": at(DECIDED, self.now_ms - 8 * DAY_MS, self.now_ms - 400 * DAY_MS, 946_684_800_000),
            "north of the pole": [self.with_fields(north, latitude=text) for text in beyond_the_pole],
            "around the world": [*around, *(self.with_fields(DECIDED, longitude=text) for text in ("180", "-180.0"))],
            "the wrong way round, nowhere, and half a place": [
                self.with_fields(north, latitude="139.69", longitude="35.68"),
                self.with_fields(DECIDED, latitude="0", longitude="0"),
                self.with_fields(Refusal("longitude", "half_a_place"), longitude=None),
            ],
        }

    def identity(self) -> dict[str, list[Example]]:
        first, other_amount, other_customer, astray = (self.with_fields(DECIDED) for _ in range(4))
        assert first.body and other_amount.body and other_customer.body
        neighbour = neighbour_of("ada")
        changed = other_customer.body.replace(b'"ada"', f'"{neighbour}"'.encode())
        return {
            "the same again": [
                first,
                first._replace(stream=REPEAT, http=REPEAT),
                Example(first.body.replace(b",", b" , "), REPEAT, REPEAT, first.ident),
            ],
            "an id twice, with another amount": [
                other_amount,
                Example(other_amount.body.replace(b"15.00", b"16.00"), CONFLICT, CONFLICT, other_amount.ident),
            ],
            "an id twice, of another customer": [
                other_customer,
                Example(changed, CONFLICT, CONFLICT, other_customer.ident, neighbour),
            ],
            "words nobody has heard of": [
                self.with_fields(DECIDED, category='"time travel"', channel='"telepathy"', currency='"QZX"'),
                self.with_fields(Refusal("currency", "bad_text"), currency='"eur"'),
            ],
            "a key that is not the customer": [
                astray._replace(stream=Refusal("customer_id", "wrong_partition"), steps_astray=1)
            ],
        }
