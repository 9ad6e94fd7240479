"""Whatever comes, a decoder answers with a value in its range or with one named refusal.

FUZZ_CASES=1000000 tries so many messages; each round of them has its number for a seed.
"""

import json
import os
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import msgspec
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from fraud_nb.apps.door import split
from fraud_nb.domain import schema
from fraud_nb.domain.schema import (
    MAX_AMOUNT_MINOR,
    InvalidInput,
    Label,
    StatelessRequest,
    Transaction,
    decode,
    decode_label,
    decode_request,
    encode,
    payload_hash,
)
from tests.faults.corpus import CANARY, TEXTS, Corpus

EARLIEST, NOON, LATEST = 946_684_800_000, 1_767_268_800_000, 4_102_444_800_000
FIELDS = sorted({*schema._Wire.__struct_fields__, *schema._StatelessWire.__struct_fields__, *Label.__struct_fields__})
REASONS = {
    "empty", "too_large", "not_json", "wrong_type", "unknown_field", "missing", "bad_text", "out_of_range", "negative",
    "too_many_decimals", "half_a_place", "too_many",
}  # fmt: skip

SCRAPS = [
    b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\", b"null", b"true", b"-", b"0", b"1e400", b"1e-400", b"9" * 50, b"E",
    b"\\ud800", b"\\u0000", b"\xff", b"\xed\xa0\x80", b"\x00", b"\x7f", b"NaN", b"Infinity", b"{}", b"[]", b"1.5", b" ",
    b'"latitude":', b'"$.x":1,', b"\xe2\x80\xa8", b"[" * 2_000, b'{"a":' * 2_000, b"\xef\xbb\xbf", CANARY.encode(),
    f'"{CANARY}":1,'.encode(),
]  # fmt: skip
BODIES = [each.body for one in Corpus("fuzz", NOON).classes() for each in one.examples if len(each.body or b"") < 500]
TEXT = dict.fromkeys(TEXTS, b'"x"')
PLACE = {"latitude": b"52.52", "longitude": b"13.405"}
GOOD: tuple[dict[str, bytes], ...] = (  # a purchase, one of nobody in particular, a label: JSON as it is written
    TEXT | PLACE | {"event_time": str(NOON).encode(), "amount": b"15.00", "currency": b'"EUR"'},
    PLACE | {"transaction_id": b'"x"', "amount": b"15", "category": b'"x"', "hour": b"2", "day_of_week": b"3"},
    {"transaction_id": b'"x"', "is_fraud": b"true", "label_time": str(NOON).encode(), "source": b'"rule"'},
)
WIDTH = len(FIELDS)  # messages that hypothesis makes of one idea
IDEAS = 60  # in a round; what hypothesis remembers of them is forgotten after it
ROUNDS = -(-int(os.environ.get("FUZZ_CASES", "20000")) // (IDEAS * WIDTH))


def placed(first: int, text: bytes) -> list[bytes]:
    """This text in place of each field, or beside the others, of good messages in turn."""
    bodies = (GOOD[(first + number) % len(GOOD)] | {name: text} for number, name in enumerate(FIELDS))
    return [b"{" + b",".join(b'"%s":%s' % (name.encode(), each[name]) for name in each) + b"}" for each in bodies]


def edited(first: int, changes: Sequence[tuple[int, int, bytes]]) -> list[bytes]:
    """Some messages of the corpus, each written over at the same places."""
    bodies = [bytearray(BODIES[(first + number) % len(BODIES)] or b"") for number in range(WIDTH)]
    for place, length, scrap in changes:
        for body in bodies:
            body[place : place + length] = scrap
    return [bytes(body) for body in bodies]


def tails(text: bytes) -> list[bytes]:
    """The text from its first byte, from its second, ..."""
    return [text[start:] for start in range(WIDTH)]


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=70)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
)
texts = st.builds(
    lambda value, ascii_only: json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass"),
    values,
    st.booleans(),
)
scraps = st.sampled_from(SCRAPS) | st.binary(max_size=9)
edits = st.tuples(st.integers(0, 300), st.integers(0, 20), scraps)
ideas = st.one_of(
    st.builds(placed, st.integers(0, 2), st.sampled_from((b'"y"', b"null", b"3", b"false", b"1767268800001"))),
    st.builds(placed, st.integers(0, 2), texts | scraps),
    st.builds(edited, st.integers(0, len(BODIES)), st.lists(edits, min_size=1, max_size=4)),
    st.builds(tails, st.binary(max_size=200) | texts),
)


def answer(read: Callable[[bytes], Any], body: bytes) -> Any:
    """What was read, or field and reason of the refusal; any other error passes through, and fails the test."""
    try:
        return read(body)
    except InvalidInput as error:
        assert error.field in (*FIELDS, "message") and error.reason in REASONS and error.remedy
        assert error.__cause__ is None and CANARY not in str(error)
        return error.field, error.reason


def is_sound(found: Any) -> bool:
    """Whether every store takes it: no control characters, whole numbers in their range."""
    for name, value in msgspec.structs.asdict(found).items():
        if isinstance(value, str):
            value.encode()
            assert 1 <= len(value) <= 64 and not any(ord(letter) < 32 or 127 <= ord(letter) < 160 for letter in value)
        elif name in ("event_time", "label_time"):
            assert EARLIEST <= value <= LATEST
        elif name == "amount_minor":
            assert 0 <= value <= MAX_AMOUNT_MINOR
        elif value is not None:
            assert abs(value) <= 180_000_000
    return True


def check(body: bytes) -> set[type]:
    """Ask every decoder; the kinds of what they say."""
    found, asked, label = answer(decode, body), answer(decode_request, body), answer(decode_label, body)
    with patch.object(schema, "is_plain", lambda _: False):  # the short way says the same
        assert answer(decode, body) == found
    for each, kinds in ((found, Transaction), (asked, (Transaction, StatelessRequest)), (label, Label)):
        assert isinstance(each, tuple) or (isinstance(each, kinds) and is_sound(each))
    if isinstance(found, Transaction):
        assert asked == found == decode(encode(found), "XXX")
        assert payload_hash(found) == payload_hash(decode(encode(found)))
    answer(split, body)
    answer(split, b"[" + body + b"]")
    return {type(found), type(asked), type(label)}


@pytest.mark.parametrize("number", range(ROUNDS))
def test_fuzz(number: int) -> None:
    seen: set[type] = set()

    @seed(number)
    @settings(max_examples=IDEAS, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(ideas)
    def each(bodies: list[bytes]) -> None:
        for body in bodies:
            seen.update(check(body))

    each()
    assert seen >= {tuple, Transaction}, "both sides of the door must be reached"
