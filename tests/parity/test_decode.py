"""The door: whatever comes, a transaction or one named error that never repeats a value."""

import json
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fraud_nb.domain import schema
from fraud_nb.domain.schema import InvalidTransaction, Transaction, decimals_of, decode, encode, to_minor_units

NOON = 1_767_268_800_000
EARLIEST, LATEST = 946_684_800_000, 4_102_444_800_000
LARGEST = 10**15
CANARY = "canary4929"
TEXTS = ("transaction_id", "customer_id", "merchant_id", "device_id", "ip", "category", "channel")
REQUIRED = ("transaction_id", "customer_id", "event_time", "amount")
GOOD: dict[str, str] = {  # JSON as written
    "transaction_id": '"t"',
    "customer_id": '"c"',
    "event_time": str(NOON),
    "amount": "15.00",
    "currency": '"EUR"',
    "merchant_id": '"m"',
    "device_id": '"d"',
    "ip": '"192.0.2.1"',
    "category": '"books"',
    "channel": '"web"',
    "latitude": "52.52",
    "longitude": "13.405",
}


def message(**changed: str | None) -> bytes:
    """A good message with some fields written otherwise, or left out."""
    fields = {name: text for name, text in (GOOD | changed).items() if text is not None}
    return ("{" + ",".join(f'"{name}":{text}' for name, text in fields.items()) + "}").encode("utf-8", "surrogatepass")


def refusal(body: bytes | None) -> InvalidTransaction:
    with pytest.raises(InvalidTransaction) as caught:
        decode(body)
    assert caught.value.__cause__ is None
    return caught.value


def is_in_range(transaction: Transaction) -> bool:
    return EARLIEST <= transaction.event_time <= LATEST and 0 <= transaction.amount_minor <= LARGEST


def survives(body: bytes) -> bool:
    """Whether it was let in; any exception but the named one passes through and fails the test."""
    try:
        transaction = decode(body)
    except InvalidTransaction as error:
        assert error.reason and error.remedy and CANARY not in str(error)
        return False
    assert is_in_range(transaction)
    return True


def answer(body: bytes) -> Transaction | tuple[str, str]:
    """What the door says: the transaction, or field and reason."""
    try:
        return decode(body)
    except InvalidTransaction as error:
        return error.field, error.reason


def test_the_short_way_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ('""', f'"{"x" * 64}"', f'"{"x" * 65}"', '"a\x7f"', '"\u00fc"', '"\\u00fc"')
    bodies = [message(**{name: text}) for name in TEXTS for text in texts]
    assert 0 < sum(map(schema.is_plain, bodies)) < len(bodies)  # both ways are taken
    quick = [answer(body) for body in bodies]
    monkeypatch.setattr(schema, "is_plain", lambda _: False)
    assert quick == [answer(body) for body in bodies]


BAD_TEXTS = ['""', f'"{"x" * 65}"', '"a\\n"', '"\\u0000"', '"\\u007f"', '"\\u0085"', '"\\u2028"', '"\\u2029"']
REFUSED: list[tuple[str, str, str]] = [  # field, JSON as written, reason
    *((name, text, "bad_text") for name in TEXTS for text in BAD_TEXTS),
    *((name, text, "wrong_type") for name in TEXTS for text in ("5", "true", "[]", "{}")),
    *((name, "null", "wrong_type") for name in ("transaction_id", "customer_id", "event_time", "amount")),
    *(("currency", text, "bad_text") for text in ('"eur"', '"EU"', '"EURO"', '"EUR\\n"', '""', '"E1R"')),
    *(("currency", text, "wrong_type") for text in ("978", "true", "[]")),
    *(("event_time", str(time), "out_of_range") for time in (EARLIEST - 1, LATEST + 1, -1, 0, 2**63, -(10**30))),
    *(("event_time", text, "wrong_type") for text in ('"1"', "1767268800000.5", "true", "[]")),
    *(("amount", text, "wrong_type") for text in ('"15.00"', "true", "[]", "{}", '"é"')),
    *(("amount", text, "negative") for text in ("-1", "-0.01", "-1e2")),
    *(("amount", text, "too_many_decimals") for text in ("0.001", "15.001", "1e-3", "-0.001")),
    *(("amount", text, "out_of_range") for text in ("10000000000000.01", "1e14", "1e30", "9" * 40)),
    *(("latitude", text, "out_of_range") for text in ("90.000001", "-90.000001", "1e30")),
    *(("longitude", text, "out_of_range") for text in ("180.000001", "-180.000001", "1e30")),
    *((name, text, "wrong_type") for name in ("latitude", "longitude") for text in ('"x"', "true", "[]")),
]  # fmt: skip


@pytest.mark.parametrize(("field", "text", "reason"), REFUSED)
def test_every_refusal(field: str, text: str, reason: str) -> None:
    error = refusal(message(**{field: text}))
    assert (error.field, error.reason) == (field, reason)


@pytest.mark.parametrize("field", REQUIRED)
def test_missing(field: str) -> None:
    error = refusal(message(**{field: None}))
    assert (error.field, error.reason) == (field, "missing")


@pytest.mark.parametrize("field", ["latitude", "longitude"])
@pytest.mark.parametrize("text", [None, "null"])
def test_half_a_place(field: str, text: str | None) -> None:
    assert refusal(message(**{field: text})).reason == "half_a_place"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (None, "empty"),
        (b"", "empty"),
        (b" \n", "empty"),
        (b"{", "not_json"),
        (b"\xff", "not_json"),
        (message()[:-1], "not_json"),
        (message() + b"x", "not_json"),
        (message(ip='"\ud800"'), "not_json"),
        (message(ip='"\\ud800"'), "not_json"),
        (message(amount="NaN"), "not_json"),
        (message(amount="01"), "not_json"),
        (message(amount="[" * 30_000 + "]" * 30_000), "not_json"),
        (b"null", "wrong_type"),
        (b"[]", "wrong_type"),
        (message(unknown="1"), "unknown_field"),
        (message() + b" " * 65_536, "too_large"),
    ],
)
def test_whole_message(body: bytes | None, reason: str) -> None:
    error = refusal(body)
    assert (error.field, error.reason) == ("message", reason)


def test_size_limit_is_inclusive() -> None:
    assert decode(message().ljust(65_536)) == decode(message())
    assert refusal(message().ljust(65_537)).reason == "too_large"


@pytest.mark.parametrize("field", [*GOOD, "unknown"])
@pytest.mark.parametrize("form", ['"{}"', '["{}"]', '{{"{}":1}}', '"{}\\n"', '"{}', '"\\ud800{}"'])
def test_error_never_repeats_a_value(field: str, form: str) -> None:
    body = message(**{field: form.format(CANARY)})
    if field in TEXTS and form == '"{}"':
        assert survives(body)
    else:
        assert CANARY not in str(refusal(body))


@pytest.mark.parametrize(
    "digits", ["-4929123412341234", "4929123412341234.999", "4929123412341234e9", "4929123412341234e99"]
)
def test_error_never_repeats_digits(digits: str) -> None:
    for field in ("amount", "event_time", "latitude", "longitude", "ip"):
        assert "4929" not in str(refusal(message(**{field: digits})))


@pytest.mark.parametrize(
    "name", ["canary", "$.canary", "required field `canary`", "a$.canary`", "missing required field"]
)
def test_unknown_name_is_not_repeated(name: str) -> None:
    # The name of an unknown field comes from outside too: a card number may well stand where a name should.
    error = refusal(message(**{name: "1"}))
    assert (error.field, error.reason) == ("message", "unknown_field")


@pytest.mark.parametrize("field", ["latitude", "longitude"])
def test_number_beyond_float_is_out_of_range(field: str) -> None:
    # 1e400 is good JSON.
    assert refusal(message(**{field: "1e400"})).reason == "out_of_range"


@pytest.mark.parametrize("digits", ["1" * 41, "1e50", "1e1000"])
def test_number_beyond_every_amount_is_out_of_range(digits: str) -> None:
    # A number is a number however long: "not text" would send the reader looking for quotation marks.
    assert refusal(message(amount=digits)).reason == "out_of_range"


DECIMALS = {
    0: "BIF CLP DJF GNF ISK JPY KMF KRW PYG RWF UGX UYI VND VUV XAF XOF XPF",
    3: "BHD IQD JOD KWD LYD OMR TND",
    4: "CLF UYW",
    2: "EUR USD GBP CHF CNY INR MXN HUF TWD IDR MGA MRU SLE ZWG XCG",
}


@pytest.mark.parametrize(
    ("code", "decimals"), [(code, count) for count, codes in DECIMALS.items() for code in codes.split()]
)
def test_decimals(code: str, decimals: int) -> None:
    assert decimals_of(code) == decimals
    least = "0." + "1".rjust(decimals, "0") if decimals else "1"
    assert decode(message(amount=least, currency=f'"{code}"')).amount_minor == 1
    assert decode(message(amount="7.00000", currency=f'"{code}"')).amount_minor == 7 * 10**decimals
    too_fine = "0." + "1".rjust(decimals + 1, "0")
    assert refusal(message(amount=too_fine, currency=f'"{code}"')).reason == "too_many_decimals"


@settings(max_examples=500, deadline=None, derandomize=True)
@given(st.integers(0, LARGEST), st.sampled_from(["EUR", "JPY", "KWD", "CLF"]), st.integers(-6, 6))
def test_amount_is_exact_however_written(minor: int, code: str, exponent: int) -> None:
    major = Decimal(minor).scaleb(-decimals_of(code))
    assert to_minor_units(f"{major:f}", code) == minor
    assert to_minor_units(f"{major.scaleb(-exponent):f}e{exponent}", code) == minor


@pytest.mark.parametrize("digits", ["0", "-0", "0.0", "-0.00", "0e999", "-0E-9"])
def test_zero_is_zero(digits: str) -> None:
    assert decode(message(amount=digits)).amount_minor == 0


def test_currency_by_default() -> None:
    for text in (None, "null"):
        assert decode(message(currency=text, amount="1500"), "JPY").currency == "JPY"
        assert decode(message(currency=text, amount="1500"), "JPY").amount_minor == 1500


def is_identifier(text: str) -> bool:
    """The schema in words: no control characters, and no line or paragraph separators."""
    return not any(ord(letter) < 32 or 127 <= ord(letter) < 160 or letter in "\u2028\u2029" for letter in text)


identifiers = st.text(st.characters(codec="utf-8"), min_size=1, max_size=64).filter(is_identifier)
optional = st.none() | identifiers
places = st.just((None, None)) | st.tuples(st.integers(-90_000_000, 90_000_000), st.integers(-180_000_000, 180_000_000))
transactions = st.builds(
    lambda ids, time, amount, code, texts, place: Transaction(ids[0], ids[1], time, amount, code, *texts, *place),
    st.tuples(identifiers, identifiers),
    st.integers(EARLIEST, LATEST),
    st.integers(0, LARGEST),
    st.sampled_from(["EUR", "JPY", "KWD", "CLF", "QZX"]),
    st.tuples(optional, optional, optional, optional, optional),
    places,
)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(transactions)
def test_round_trip(transaction: Transaction) -> None:
    body = encode(transaction)
    json.loads(body)
    assert decode(body, "XXX") == transaction
    assert encode(decode(body)) == body
