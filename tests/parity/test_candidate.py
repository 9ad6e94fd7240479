"""A candidate sees what a feature of the catalogue sees: written once more, it fills the same bytes."""

import numpy as np
import pytest

from fraud_nb.domain.machine import compiled
from fraud_nb.features.catalogue import FEATURE_NAMES, Family, Feature
from fraud_nb.features.fold import TODAY, Owner, fold, folding_beside
from fraud_nb.features.profile import Profiles
from fraud_nb.features.tiles import COUNT_30D, UNKNOWN, WIDTH, apply, read_row
from tests.parity.test_fold_oracle import busy_stream, customers_of, events_of


@compiled
def fill_length(purchase, past, out):  # type: ignore[no-untyped-def]
    out[0] = len(past)


@compiled
def fill_count(purchase, told, out):  # type: ignore[no-untyped-def]
    out[0] = told[COUNT_30D] if told[COUNT_30D] != UNKNOWN else np.nan


@pytest.mark.parametrize(
    ("fill", "owner", "twin"),
    [
        (fill_length, None, "history_count"),
        (fill_count, "merchant", "merchant_count_30d"),
        (fill_count, "device", "device_count_30d"),
    ],
)
def test_a_candidate_fills_what_the_catalogue_fills(fill: object, owner: Owner | None, twin: str) -> None:
    stream = busy_stream(1, 1_100)  # beyond the cap, and late
    told = np.random.default_rng(1).integers(UNKNOWN, 4, (len(stream), WIDTH))
    family = Family(fill, (Feature("again", "", ""),), () if owner is None else (read_row, apply))
    folding, beside, alone = folding_beside(family, owner), Profiles(arena_events=8), Profiles(arena_events=8)
    vectors = fold(beside, customers_of(stream), events_of(stream), told, folding=folding)
    expected = fold(alone, customers_of(stream), events_of(stream), told, folding=TODAY)
    assert folding.names == (*FEATURE_NAMES, "again")
    assert vectors[:, :-1].tobytes() == expected.tobytes()
    assert vectors[:, -1].tobytes() == expected[:, FEATURE_NAMES.index(twin)].tobytes()
    assert beside.dump("a") == alone.dump("a")
