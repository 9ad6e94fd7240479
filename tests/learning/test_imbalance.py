"""Resampling: original rows stay, invented ones lie between frauds, cleaning follows its rule."""

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from fraud_nb.features.catalogue import Vector
from fraud_nb.learning.imbalance import ARMS, Arm, TooFewFrauds, resample

NAMES = ("amount", "hour", "weekday")
SMOTE_ARMS: tuple[Arm, ...] = ("smote", "smote_enn")


@pytest.fixture(scope="module")
def vectors() -> Vector:
    """600 genuine rows and then 30 frauds, each column on its own scale, the last with missing values."""
    rng = np.random.default_rng(5)
    rows = np.concatenate([rng.normal(0, 1, (600, 3)), rng.normal(1.5, 1, (30, 3))]) * [1e4, 1, 1e-3] + [7e5, 0, 0]
    rows[rng.random(630) < 0.2, 2] = np.nan
    rows[:20] *= np.linspace(0, 1e-9, 20)[:, None]  # tiny beside the others: scaling there and back would blur them
    return rows.astype(np.float32)


IS_FRAUD = np.arange(630) >= 600


def test_rows_as_they_are(vectors: Vector) -> None:
    weights = np.full(630, 3.0, np.float32)
    sample = resample("none", vectors, IS_FRAUD, weights, NAMES, 1)
    assert sample.vectors is vectors and sample.is_fraud is IS_FRAUD and sample.weights is weights
    assert sample.imputation is None


def test_class_weight_is_the_root_of_the_weighted_ratio(vectors: Vector) -> None:
    plain = resample("class_weight", vectors, IS_FRAUD, None, NAMES, 1).weights
    thinned = resample("class_weight", vectors, IS_FRAUD, np.where(IS_FRAUD, 1, 4).astype(np.float32), NAMES, 1).weights
    assert plain is not None and thinned is not None
    assert plain[600:] == pytest.approx(np.sqrt(600 / 30)) and (plain[:600] == 1).all()
    assert thinned[600:] == pytest.approx(np.sqrt(2400 / 30)) and (thinned[:600] == 4).all()


def test_smote_keeps_rows_and_invents_between_frauds(vectors: Vector) -> None:
    sample = resample("smote", vectors, IS_FRAUD, None, NAMES, 1, fraud_ratio=0.2)
    medians = np.nanmedian(vectors, axis=0)
    assert sample.imputation == pytest.approx(dict(zip(NAMES, medians.tolist(), strict=True)))
    filled = np.where(np.isnan(vectors), medians, vectors).astype(np.float32)
    assert sample.vectors[:630].tobytes() == filled.tobytes()
    assert sample.is_fraud.sum() == 120 and sample.is_fraud[630:].all() and sample.weights is None

    scale = filled.std(axis=0)
    frauds, invented = filled[600:] / scale, sample.vectors[630:] / scale
    neighbours = NearestNeighbors(n_neighbors=6).fit(frauds).kneighbors(frauds, return_distance=False)[:, 1:]
    starts, ends = np.repeat(frauds, 5, axis=0), frauds[neighbours.ravel()]
    lengths = np.linalg.norm(ends - starts, axis=1)
    for row in invented:  # on one of the lines: the way over the row is no longer than the line
        way = np.linalg.norm(row - starts, axis=1) + np.linalg.norm(ends - row, axis=1)
        assert (way - lengths).min() < 1e-3


def test_cleaning_keeps_rows_whose_neighbours_agree(vectors: Vector) -> None:
    before = resample("smote", vectors, IS_FRAUD, None, NAMES, 1)
    after = resample("smote_enn", vectors, IS_FRAUD, None, NAMES, 1)
    fitted_on = before.vectors[:630].astype(np.float64)
    scaled = (before.vectors - fitted_on.mean(axis=0)) / fitted_on.std(axis=0)
    near = NearestNeighbors(n_neighbors=4).fit(scaled).kneighbors(scaled, return_distance=False)[:, 1:]
    agree = (before.is_fraud[near] == before.is_fraud[:, None]).all(axis=1)
    expected = {
        (row.tobytes(), fraud) for row, fraud in zip(before.vectors[agree], before.is_fraud[agree], strict=True)
    }
    found = {(row.tobytes(), fraud) for row, fraud in zip(after.vectors, after.is_fraud, strict=True)}
    assert 0 < len(found) < len(before.vectors)
    assert found == expected


@pytest.mark.parametrize("arm", ARMS)
def test_same_seed_same_sample_and_input_untouched(arm: Arm, vectors: Vector) -> None:
    copy = vectors.copy()
    first, second = (resample(arm, vectors, IS_FRAUD, None, NAMES, 3, negatives_share=0.9) for _ in range(2))
    assert first.vectors.tobytes() == second.vectors.tobytes() and first.note == second.note
    assert vectors.tobytes() == copy.tobytes()
    assert first.vectors.dtype == np.float32 and first.is_fraud.dtype == np.bool_


def test_share_of_genuine_rows(vectors: Vector) -> None:
    sample = resample("smote", vectors, IS_FRAUD, None, NAMES, 3, negatives_share=0.75)
    assert (~sample.is_fraud).sum() == 450 and sample.is_fraud.sum() == 45
    assert sample.note == "smote: 30 frauds -> 45; 75% of 600 genuine -> 450"


@pytest.mark.parametrize("arm", SMOTE_ARMS)
def test_column_without_any_value(arm: Arm, vectors: Vector) -> None:
    empty = vectors.copy()
    empty[:, 1] = np.nan
    sample = resample(arm, empty, IS_FRAUD, None, NAMES, 1)
    assert sample.imputation is not None and sample.imputation["hour"] == 0
    assert sample.vectors.shape[1] == 3 and (sample.vectors[:, 1] == 0).all()


@pytest.mark.parametrize(("arm", "enough"), [("none", 1), ("class_weight", 1), ("smote", 6), ("smote_enn", 6)])
def test_too_few_frauds(arm: Arm, enough: int, vectors: Vector) -> None:
    resample(arm, vectors[: 600 + enough], IS_FRAUD[: 600 + enough], None, NAMES, 1)
    with pytest.raises(TooFewFrauds, match=f"at least {enough} frauds"):
        resample(arm, vectors[: 599 + enough], IS_FRAUD[: 599 + enough], None, NAMES, 1)


@pytest.mark.parametrize(("ratio", "share"), [(0.05, 1.0), (0.1, 0.5), (1.5, 1.0), (0.1, 0.0), (0.1, 1.5)])
def test_impossible_ratio(ratio: float, share: float, vectors: Vector) -> None:
    with pytest.raises(ValueError, match="fraud_ratio or negatives_share"):
        resample("smote", vectors, IS_FRAUD, None, NAMES, 1, fraud_ratio=ratio, negatives_share=share)
