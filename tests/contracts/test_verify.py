"""`fraud verify` finds whatever is not as the log says, wherever it lies; and nothing where all is well."""

from collections.abc import Callable

import pytest

from fraud_nb.adapters.ports import SHARED, Outgoing
from fraud_nb.adapters.postgres import VersionLog
from fraud_nb.pipeline.sharing import Sharing, close_version
from fraud_nb.pipeline.verify import Difference
from tests.conftest import tampering
from tests.contracts.worker_kit import HOME, PARTITIONS, Rehearsal, buy, differences, work

FLIP = "{column} = set_byte({column}, {place}, get_byte({column}, {place}) # 1)"


@pytest.fixture
def proved(worker: Rehearsal, postgres: str) -> Rehearsal:
    """Ten purchases, the second five of which were told what their shop had seen of the first; all is well."""
    worker.sharing = Sharing(VersionLog(postgres), worker.store, PARTITIONS)
    for first in (0, 5):
        buy(worker, first, first + 5)
        work(worker)
        close_version(worker.sharing, worker.claims[0].epoch)
    assert differences(worker) == []
    return worker


@pytest.mark.parametrize(
    ("change", "stages"),
    [
        (FLIP.format(column="features", place=9), ["features"]),
        ("probability = probability + 1e-12", ["probability"]),
        ("outcome = 'decline'", ["outcome"]),
        ("""reasons = '[{"code":"X","text":"y","share":1.0}]'""", ["reasons"]),
        (FLIP.format(column="shared", place=0), ["features", "shared"]),  # and what follows from what it was told
        ("model_version = model_version + 1", []),  # every model is the same one here
        ("amount_base = amount_base + 1", ["features", "features", "features", "state", "state"]),
        ("customer_id = 'bob'", ["features", "features", "features", "state"]),
    ],
)
def test_a_changed_row(proved: Rehearsal, postgres: str, change: str, stages: list[str]) -> None:
    with tampering(postgres) as cursor:
        cursor.execute(f"UPDATE decisions SET {change} WHERE transaction_id = 't7'")
    found = differences(proved)
    assert [each.stage for each in found] == stages
    assert all(each.offset in (7, 8, 9, -1) for each in found)


Change = Callable[[list[Outgoing]], object]


@pytest.mark.parametrize(
    ("change", "offset"),
    [
        (lambda published: published.pop(4), 4),
        (lambda published: published.pop(), 9),
        (lambda published: published.insert(4, published[3]), 4),
        (lambda published: published.append(published[-1]), -1),
        (lambda published: published.insert(3, published.pop(4)), 3),
        (lambda published: published.clear(), 0),
    ],
    ids=["missing", "last missing", "twice", "last twice", "out of order", "none"],
)
def test_a_changed_topic(proved: Rehearsal, change: Change, offset: int) -> None:
    published = list(proved.sink.published)
    change(published)
    assert differences(proved, published) == [Difference("topic", HOME, offset)]


@pytest.mark.parametrize("partition", [HOME, SHARED])
def test_a_changed_state(proved: Rehearsal, partition: int) -> None:
    """Of customers and of shops: another byte, another watermark, nothing at all."""
    (owner,) = [name for place, name in proved.store.profiles if place == partition]
    kept, reached = proved.store.profiles[partition, owner], proved.store.watermarks[partition]
    for profile, watermark in (
        (kept[:-1] + bytes([kept[-1] ^ 1]), reached),
        (kept, reached - 1),
        (None, reached),
    ):
        proved.store.watermarks[partition] = watermark
        proved.store.profiles.pop((partition, owner))
        if profile is not None:
            proved.store.profiles[partition, owner] = profile
        else:
            proved.store.profiles[partition, "nobody"] = kept
        assert differences(proved) == [Difference("state", partition, -1)]
        proved.store.profiles[partition, owner] = kept


def test_a_missing_row(proved: Rehearsal, postgres: str) -> None:
    with tampering(postgres) as cursor:
        cursor.execute("DELETE FROM decisions WHERE transaction_id = 't3'")
    found = {each.stage for each in differences(proved)}
    assert found == {"features", "state", "topic", "shared", "lost"}
