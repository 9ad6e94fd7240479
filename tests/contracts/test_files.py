"""Hostile tables: each row is mapped, or refused by line and reason, and nothing is quoted."""

import gzip
from collections.abc import Sequence
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fraud_nb.domain.schema import Transaction, decode
from fraud_nb.operations.files import (
    Columns,
    FileMap,
    InvalidFile,
    InvalidMap,
    Labels,
    MappedBatch,
    check,
    read_map,
    report_lines,
    rows_of,
)

ROOT = Path(__file__).parents[2]
HANDBOOK = ROOT.parent / "shared/data/handbook_sim_dev_2018-04-01_2018-09-04.parquet"
HEADER = "id,who,when,paid,note\n"
COLUMNS = Columns(transaction_id="id", customer_id="who", event_time="when", amount="paid")
MAP = FileMap(columns=COLUMNS)
NOON = 1_522_584_000_000  # 2018-04-01 12:00 UTC
WHEN = "2018-04-01 12:00:00"


def read(path: Path, file_map: FileMap = MAP) -> MappedBatch:
    """All batches in one."""
    whole = MappedBatch()
    for batch in rows_of(path, file_map):
        whole.rows += batch.rows
        whole.refusals += batch.refusals
        whole.refunds += batch.refunds
    return whole


def csv_file(tmp_path: Path, content: str | bytes) -> Path:
    path = tmp_path / "table.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refusals(batch: MappedBatch) -> list[tuple[int, str, str]]:
    return [(each.line, each.field, each.reason) for each in batch.refusals]


def parquet_file(tmp_path: Path, **columns: Any) -> Path:
    """One row or more; what is not named is plain."""
    rows = len(next(iter(columns.values())))
    plain = {"id": [f"t{row}" for row in range(rows)], "who": ["ada"] * rows, "when": [WHEN] * rows, "paid": [1] * rows}
    path = tmp_path / "table.parquet"
    pq.write_table(pa.table(plain | columns), path)
    return path


def only(cells: Sequence[tuple[int, str, str]]) -> tuple[str, str]:
    ((_, name, reason),) = cells
    return name, reason


def test_columns_are_the_fields_of_the_wire() -> None:
    wire = {name.removesuffix("_minor").removesuffix("_e6") for name in Transaction.__struct_fields__}
    assert set(Columns.__struct_fields__) == wire


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "BOM"])
def test_marks_and_line_ends_are_no_data(tmp_path: Path, ending: str, mark: bytes) -> None:
    text = f"{HEADER}007,ada,{WHEN},57.16,x\n\n8,bob,{WHEN},1e1,\n".replace("\n", ending)
    batch = read(csv_file(tmp_path, mark + text.encode()))
    expected = [Transaction("007", "ada", NOON, 5716, "EUR"), Transaction("8", "bob", NOON, 1000, "EUR")]
    assert [row.transaction for row in batch.rows] == expected
    assert [row.line for row in batch.rows] == [2, 4] and not batch.refusals


def test_the_message_is_what_was_decoded_and_has_no_other_column(tmp_path: Path) -> None:
    (row,) = read(csv_file(tmp_path, f"{HEADER}1,ada,{WHEN},57.16,ANSWER\n")).rows
    assert decode(row.message) == row.transaction
    assert set(msgspec.json.decode(row.message)) == {"transaction_id", "customer_id", "event_time", "amount"}


@pytest.mark.parametrize(
    ("cells", "complaint"),
    [
        (f"1,ada,{WHEN},1", ("row", "ragged")),
        (f"1,ada,{WHEN},1,x,y", ("row", "ragged")),
        (f'1,"ada"b,{WHEN},1,x', ("row", "bad_csv")),
        (f"1,{'a' * 200_000},{WHEN},1,x", ("row", "bad_csv")),
        (f"1,{'a' * 65},{WHEN},1,x", ("customer_id", "bad_text")),
        (f"1,a\0da,{WHEN},1,x", ("customer_id", "bad_text")),
        (f'1,"a\nda",{WHEN},1,x', ("customer_id", "bad_text")),
        (f",ada,{WHEN},1,x", ("transaction_id", "missing")),
        (f"1,,{WHEN},1,x", ("customer_id", "missing")),
        ("1,ada,,1,x", ("event_time", "missing")),
        (f"1,ada,{WHEN},,x", ("amount", "missing")),
        (f'1,ada,{WHEN},"1,500.00",x', ("amount", "not_a_number")),
        (f'1,ada,{WHEN},"1,""customer_id"":""eve""",x', ("amount", "not_a_number")),
        *((f"1,ada,{WHEN},{text},x", ("amount", "not_a_number")) for text in ("NaN", "inf", "-Infinity", "0x10", "١٢")),
        *((f"1,ada,{WHEN},{text},x", ("amount", "not_a_number")) for text in ("1 500", "€5", "+5", "5.", "=1+1")),
        *((f"1,ada,{WHEN},{text},x", ("amount", "out_of_range")) for text in ("1e400", "1" * 40, "1" * 20 + ".5")),
        (f"1,ada,{WHEN},9.999,x", ("amount", "too_many_decimals")),
        (f"1,ada,{WHEN},-0.01,x", ("amount", "negative")),
        *(
            (f"1,ada,{text},1,x", ("event_time", "not_a_time"))
            for text in ("01/04/2018 12:00", "2018-04-01", "1522584")
        ),
        *((f"1,ada,{text},1,x", ("event_time", "not_a_time")) for text in ("2018-02-30 12:00", "2018-W13-7T12:00")),
        ("1,ada,9999-12-31T23:59:59-12:00,1,x", ("event_time", "out_of_range")),
        ("1,ada,1970-01-01T00:00:00,1,x", ("event_time", "out_of_range")),
    ],
)
def test_a_bad_row_is_refused_and_the_next_is_read(tmp_path: Path, cells: str, complaint: tuple[str, str]) -> None:
    path = csv_file(tmp_path, f"{HEADER}{cells}\n2,bob,{WHEN},2,x\n")
    batch = read(path)
    assert only(refusals(batch)) == complaint and batch.refusals[0].line == 2
    assert [row.transaction.customer_id for row in batch.rows] == ["bob"]
    assert batch.rows[0].line == 2 + cells.count("\n") + 1
    assert "ada" not in str(batch.refusals)  # no value


def test_bytes_that_are_not_utf8_spoil_their_own_row(tmp_path: Path) -> None:
    lines = [
        f"1,müller,{WHEN},1,x".encode("latin-1"),
        f"2,müller,{WHEN},1,x".encode(),
        f"3,ada,{WHEN},1,\xff".encode("latin-1"),
    ]
    batch = read(csv_file(tmp_path, HEADER.encode() + b"\n".join(lines)))
    assert refusals(batch) == [(2, "customer_id", "not_utf8")]
    assert [row.transaction.customer_id for row in batch.rows] == [
        "müller",
        "ada",
    ]  # and an unmapped column is no matter


def test_text_is_only_text(tmp_path: Path) -> None:
    ids = ["=1+1", "@SUM(A1)", "000", "123.0", "O'Neil", " padded ", "null", "NaN", "a;b", 'x"y']
    rows = "".join(f'{number},"{text.replace(chr(34), 2 * chr(34))}",{WHEN},1,x\n' for number, text in enumerate(ids))
    assert [row.transaction.customer_id for row in read(csv_file(tmp_path, HEADER + rows)).rows] == ids


def test_an_open_quote_is_found_and_named(tmp_path: Path) -> None:
    rows = [f'1,"ada,{WHEN},1,x', *(f"{number},bob,{WHEN},1,{'y' * 2000}" for number in range(2, 150))]
    batch = read(csv_file(tmp_path, HEADER + "\n".join(rows) + "\n"))
    assert refusals(batch)[0] == (2, "row", "bad_csv") and len(batch.refusals) <= 3
    assert len(batch.rows) > 50  # after 128 KiB the reader gives the quote up


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "empty"),
        (b"id,who,when\n", "no column paid"),
        (b"id,who,when,Paid\n", "did you mean Paid"),
        (b"id,who,when,paid,who\n", "two columns are called who"),
        ("id,who,when,paid\n".encode("utf-16"), "no column id"),
        (b'id,"who"x,when,paid\n', "first line"),
    ],
)
def test_a_file_that_is_no_table_says_so_in_one_line(tmp_path: Path, content: bytes, complaint: str) -> None:
    with pytest.raises(InvalidFile, match=complaint) as refused:
        read(csv_file(tmp_path, content))
    assert "\n" not in str(refused.value)


def test_a_header_alone_is_a_table_without_rows(tmp_path: Path) -> None:
    report = check(csv_file(tmp_path, HEADER), MAP)
    assert report.rows == 0 and report.first_ms is None
    assert report_lines(report) == ["0 rows: 0 valid, 0 refunds left out"]


def test_gzip(tmp_path: Path) -> None:
    content = gzip.compress((HEADER + f"1,ada,{WHEN},1,x\n" * 5000).encode())
    path = tmp_path / "table.csv.gz"
    path.write_bytes(content)
    assert len(read(path).rows) == 5000
    for broken in (content[:-20], b"id,who,when,paid\n"):
        path.write_bytes(broken)
        with pytest.raises(InvalidFile, match="cannot be read"):
            read(path)


@pytest.mark.parametrize("name", ["no.csv", "no.csv.gz", "no.parquet"])
def test_a_file_that_is_not_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidFile, match="No such file"):
        read(tmp_path / name)


def test_parquet_and_csv_agree(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    cents, times = rng.integers(0, 10**9, 300), NOON + rng.integers(0, 10**10, 300)
    ids, whole = pa.array(range(300), pa.int32()), [float(number) for number in range(300)]
    path = parquet_file(tmp_path, id=ids, who=whole, when=pa.array(times, pa.timestamp("ms")), paid=cents / 100)
    typed = read(path)
    texts = (
        f"{row},{row},{np.datetime64(int(moment), 'ms')},{amount // 100}.{amount % 100:02d},x\n"
        for row, (moment, amount) in enumerate(zip(times, cents, strict=True))
    )
    plain = read(csv_file(tmp_path, HEADER + "".join(texts)))
    assert [row.transaction for row in typed.rows] == [row.transaction for row in plain.rows]
    assert [row.transaction.amount_minor for row in typed.rows] == cents.tolist()


@pytest.mark.parametrize(
    ("name", "cells", "value"),
    [
        ("paid", pa.array([57.16, 5 * 57.16, 0.1 + 0.2], pa.float64()), [5716, 28580, 30]),
        ("paid", pa.array([57.16, 1234.56], pa.float32()), [5716, 123456]),
        ("paid", pa.array([Decimal("57.16"), Decimal("0.10")], pa.decimal128(12, 2)), [5716, 10]),
        ("paid", pa.array([3, 10**12]), [300, 10**14]),
        ("when", pa.array([datetime(2018, 4, 1, 12)], pa.timestamp("ns")), [NOON]),
        ("when", pa.array([NOON], pa.timestamp("ms", "America/New_York")), [NOON]),
        ("when", pa.array([NOON // 1000], pa.timestamp("s")), [NOON]),
        ("who", pa.array(["007", "7"]).dictionary_encode(), ["007", "7"]),
        ("who", pa.array([b"007"], pa.binary()), ["007"]),
        ("who", pa.array([2**63 + 1], pa.uint64()), ["9223372036854775809"]),
    ],
)
def test_typed_columns(tmp_path: Path, name: str, cells: Any, value: list[object]) -> None:
    batch = read(parquet_file(tmp_path, **{name: cells}))
    field = {"paid": "amount_minor", "when": "event_time", "who": "customer_id"}[name]
    assert [getattr(row.transaction, field) for row in batch.rows] == value, batch.refusals


@pytest.mark.parametrize(
    ("name", "cells", "complaint"),
    [
        ("who", pa.array([0.5]), ("customer_id", "not_whole")),
        ("who", pa.array([2.0**53]), ("customer_id", "not_whole")),
        ("who", pa.array([float("inf")]), ("customer_id", "not_whole")),
        ("who", pa.array([float("nan")]), ("customer_id", "missing")),
        ("who", pa.array([True]), ("customer_id", "wrong_type")),
        ("who", pa.array([["ada"]]), ("customer_id", "wrong_type")),
        ("who", pa.array([b"\xff"], pa.binary()), ("customer_id", "not_utf8")),
        ("paid", pa.array([float("inf")]), ("amount", "not_a_number")),
        ("paid", pa.array([1e300]), ("amount", "out_of_range")),
        ("paid", pa.array([True]), ("amount", "not_a_number")),
        ("when", pa.array([datetime(2018, 4, 1).date()]), ("event_time", "not_a_time")),
        ("when", pa.array([NOON]), ("event_time", "not_a_time")),  # milliseconds, but the map says datetime
        ("when", pa.array([2**62 // 10**6], pa.timestamp("s")), ("event_time", "not_a_time")),
    ],
)
def test_typed_cells_are_refused_one_by_one(tmp_path: Path, name: str, cells: Any, complaint: tuple[str, str]) -> None:
    assert only(refusals(read(parquet_file(tmp_path, **{name: cells})))) == complaint


def test_a_broken_parquet_file(tmp_path: Path) -> None:
    path = parquet_file(tmp_path, paid=[1.0] * 1000)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(InvalidFile, match="cannot be read"):
        read(path)


def test_clock_changes_and_units(tmp_path: Path) -> None:
    berlin = msgspec.convert({"columns": msgspec.to_builtins(COLUMNS), "time": {"zone": "Europe/Berlin"}}, FileMap)
    times = ["2018-03-25 02:30", "2018-10-28 02:30", "2018-10-28 02:30+01:00", "2018-10-28 03:30", "2018-07-01 12:00"]
    rows = "".join(f"{number},ada,{text},1,x\n" for number, text in enumerate(times))
    batch = read(csv_file(tmp_path, HEADER + rows), berlin)
    assert refusals(batch) == [(2, "event_time", "never_that_night"), (3, "event_time", "twice_that_night")]
    utc = [datetime.fromisoformat(text) for text in ("2018-10-28T01:30Z", "2018-10-28T02:30Z", "2018-07-01T10:00Z")]
    assert [row.transaction.event_time for row in batch.rows] == [int(each.timestamp() * 1000) for each in utc]
    for unit, text in (("s", "1522584000"), ("s", "1522584000.000"), ("ms", str(NOON))):
        units = msgspec.convert({"columns": msgspec.to_builtins(COLUMNS), "time": {"unit": unit}}, FileMap)
        (row,) = read(csv_file(tmp_path, f"{HEADER}1,ada,{text},1,x\n"), units).rows
        assert row.transaction.event_time == NOON
        assert refusals(read(csv_file(tmp_path, f"{HEADER}1,ada,{WHEN},1,x\n"), units))


def test_defaults_refunds_period_and_delimiter(tmp_path: Path) -> None:
    file_map = msgspec.convert(
        {
            "columns": msgspec.to_builtins(COLUMNS) | {"currency": "money"},
            "defaults": {"currency": "JPY", "channel": "shop"},
            "amounts": {"negative": "skip"},
            "csv": {"delimiter": ";"},
        },
        FileMap,
    )
    rows = [f"1;ada;{WHEN};5;", f"2;ada;{WHEN};5;USD", f"3;ada;{WHEN};-5;USD", "4;ada;2018-04-02 12:00;7;"]
    path = csv_file(tmp_path, "id;who;when;paid;money\n" + "\n".join(rows))
    batch = read(path, file_map)
    paid = [(row.transaction.amount_minor, row.transaction.currency, row.transaction.channel) for row in batch.rows]
    assert paid == [(5, "JPY", "shop"), (500, "USD", "shop"), (7, "JPY", "shop")]
    assert batch.refunds == 1 and not batch.refusals
    first_day = [row.line for each in rows_of(path, file_map, NOON, NOON + 1) for row in each.rows]
    assert first_day == [2, 3]


def test_labels_with_a_time_of_their_own(tmp_path: Path) -> None:
    header = HEADER.strip() + ",known\n"
    assert header.split(",")[:4] == ["id", "who", "when", "paid"]
    rows = f"1,ada,{WHEN},1,1,2026-03-04 05:06\n2,ada,{WHEN},1,1,\n3,ada,{WHEN},1,1,soon\n4,ada,{WHEN},1,,soon\n"
    batch = read(
        csv_file(tmp_path, header + rows), msgspec.structs.replace(MAP, labels=Labels(column="note", time="known"))
    )
    assert [row.label and row.label.label_time for row in batch.rows] == [1_772_600_760_000, None]
    assert refusals(batch) == [(3, "label_time", "not_a_time"), (4, "label_time", "not_a_time")]


@pytest.mark.parametrize("silence", [True, False])
def test_labels(tmp_path: Path, silence: bool) -> None:
    labels = Labels(column="note", delay_days=1.5, source="analyst", silence_is_genuine=silence)
    flags = ["1", "true", "0", "False", "", "maybe"]
    rows = "".join(f"{number},ada,{WHEN},1,{text}\n" for number, text in enumerate(flags))
    late = "9,ada,2099-12-31 23:00,1,1\n"  # its label would come after what the schema allows
    batch = read(csv_file(tmp_path, HEADER + rows + late), msgspec.structs.replace(MAP, labels=labels))
    found = [None if row.label is None else row.label.is_fraud for row in batch.rows]
    assert found == ([True, True, None, None, None] if silence else [True, True, False, False, None])
    assert batch.rows[0].label is not None and batch.rows[0].label.label_time == NOON + 36 * 3_600_000
    assert refusals(batch) == [(7, "is_fraud", "not_a_flag"), (8, "label_time", "out_of_range")]


def test_the_check_counts_by_hand(tmp_path: Path) -> None:
    rows = [f"1,ada,{WHEN},1,x", "2,bob,2018-04-01 11:00,1,x", f"1,ada,{WHEN},1,x"]
    rows += [f"3,eve,{WHEN},x,x"] * 5 + ["4,eve"]
    report = check(csv_file(tmp_path, HEADER + "\n".join(rows)), MAP)
    assert (report.rows, report.valid, report.duplicates, report.out_of_order, report.customers) == (9, 3, 1, 1, 2)
    assert (report.first_ms, report.last_ms) == (NOON - 3_600_000, NOON)
    refused = report.refused["amount", "not_a_number"]
    assert (refused.count, refused.first_lines) == (5, (5, 6, 7))
    assert "line 5, 6, 7, ..." in report_lines(report)[-2]


@pytest.mark.parametrize(
    ("toml", "complaint"),
    [
        ("[colums]\n", "colums: no such key; did you mean columns"),
        ("", "columns: missing"),
        ("[time]\nzone = 'UTC'\n", "columns: missing"),
        ("[columns]\nid = 'x'\n", "columns.id: no such key"),
        ("[columns]\ntransaction_id = 1\n", "columns.transaction_id: expected `str`"),
        ("FULL[time]\nunit = 'minutes'\n", "time.unit"),
        ("FULL[time]\nzone = 'Mars/Olympus'\n", "time.zone: no such zone"),
        ("FULL[time]\nzone = '../../etc/passwd'\n", "time.zone: no such zone"),
        ("FULL[defaults]\ncurrency = 'eur'\n", "defaults.currency"),
        ("FULL[csv]\ndelimiter = '::'\n", "csv.delimiter"),
        ("FULL[labels]\ncolumn = 'note'\n", "either time, a column, or delay_days"),
        ("FULL[labels]\ncolumn = 'who'\ndelay_days = 1\n", "labels.column: also in"),
        ("[columns\n", "not TOML"),
        ("\xff", "not TOML"),
    ],
)
def test_a_wrong_map_names_the_key(tmp_path: Path, toml: str, complaint: str) -> None:
    full = "[columns]\ntransaction_id = 'id'\ncustomer_id = 'who'\nevent_time = 'when'\namount = 'paid'\n"
    path = tmp_path / "map.toml"
    path.write_text(toml.replace("FULL", full), encoding="latin-1")
    with pytest.raises(InvalidMap, match=complaint) as refused:
        read_map(path)
    assert "\n" not in str(refused.value)


if HANDBOOK.exists():  # evaluation data without a licence to be shipped: a machine that lacks them has nothing to test

    def test_the_handbook(tmp_path: Path) -> None:
        file_map = read_map(ROOT / "tests/handbook.toml")
        batches = rows_of(HANDBOOK, file_map)
        rows = [row for _, batch in zip(range(4), batches, strict=False) for row in batch.rows]
        table = pq.read_table(HANDBOOK).slice(0, len(rows))
        assert len(rows) == 4 * 4096
        assert [row.transaction.amount_minor for row in rows] == np.rint(table["TX_AMOUNT"].to_numpy() * 100).tolist()
        assert [row.transaction.event_time for row in rows] == (
            table["TX_DATETIME"].cast(pa.int64()).to_numpy() // 1000
        ).tolist()
        assert [row.label is not None for row in rows] == (table["TX_FRAUD"].to_numpy() == 1).tolist()
