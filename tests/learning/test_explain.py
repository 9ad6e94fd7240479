"""Contributions are Shapley values, by shap's own explainer and by the definition; cases are what they are called."""

from itertools import combinations
from math import factorial

import numpy as np
import numpy.typing as npt
import pytest
import shap

from fraud_nb.decision.bundle import TrainingWindow, unpack
from fraud_nb.decision.policy import Policy
from fraud_nb.decision.scorer import Scorer
from fraud_nb.features.catalogue import FEATURE_NAMES, Vector
from fraud_nb.learning.explain import additivity_gap, cases, explanation, importance
from fraud_nb.learning.train import Fitted, Recipe, bundle_of, columns_of, fit

NAMES = ("amount", "hour", "same_device_count")
RNG = np.random.default_rng(2)
VECTORS: Vector = RNG.normal(0, 1, (2_000, len(FEATURE_NAMES))).astype(np.float32)
VECTORS[RNG.random(VECTORS.shape) < 0.1] = np.nan
COLUMNS = columns_of(NAMES, VECTORS)
IS_FRAUD = np.nansum(COLUMNS * [1.5, 0.2, -1.0], axis=1) + RNG.normal(0, 0.5, 2_000) > 2.5
ROWS = VECTORS[:40]


@pytest.fixture(scope="module")
def fitted() -> Fitted:
    recipe = Recipe(rounds=12, depth=3, learning_rate=0.3, min_child_weight=0.1, colsample=1.0, threads=1)
    return fit(recipe, NAMES, VECTORS, IS_FRAUD, None, VECTORS, IS_FRAUD)


@pytest.fixture(scope="module")
def scorer(fitted: Fitted) -> Scorer:
    content = bundle_of(fitted, VECTORS[:3], Policy(), TrainingWindow(0, 1), 1, "test", {})
    return Scorer(unpack(content, None))


def test_equal_to_shaps_explainer(fitted: Fitted, scorer: Scorer) -> None:
    explainer = shap.TreeExplainer(fitted.booster, feature_perturbation="tree_path_dependent")
    expected = explainer.shap_values(columns_of(NAMES, ROWS))
    assert scorer.contributions(ROWS)[:, :-1] == pytest.approx(expected, abs=1e-4)


def value_of(tree: dict[str, npt.NDArray[np.float64]], row: Vector, known: frozenset[int], node: int = 0) -> float:
    """What one tree says when only some features are known; elsewhere both ways count by their training rows."""
    left, right = int(tree["left"][node]), int(tree["right"][node])
    if left < 0:
        return float(tree["leaf"][node])
    feature = int(tree["feature"][node])
    if feature in known:
        value = row[feature]
        goes_left = bool(tree["default_left"][node]) if np.isnan(value) else value < tree["threshold"][node]
        return value_of(tree, row, known, left if goes_left else right)
    cover = tree["cover"]
    sides = [cover[side] / cover[node] * value_of(tree, row, known, side) for side in (left, right)]
    return float(sum(sides))


def test_equal_to_the_definition(fitted: Fitted, scorer: Scorer) -> None:
    trees = []
    for table in fitted.booster.trees_to_dataframe().groupby("Tree"):
        nodes = table[1].reset_index(drop=True)
        place = {name: number for number, name in enumerate(nodes["ID"])}
        trees.append(
            {
                "left": nodes["Yes"].map(place).fillna(-1).to_numpy(),
                "right": nodes["No"].map(place).fillna(-1).to_numpy(),
                "default_left": (nodes["Missing"] == nodes["Yes"]).to_numpy(),
                "feature": nodes["Feature"].map({name: number for number, name in enumerate(NAMES)}).to_numpy(),
                "threshold": nodes["Split"].to_numpy(np.float32),
                "cover": nodes["Cover"].to_numpy(),
                "leaf": nodes["Gain"].to_numpy(),
            }
        )
    found = scorer.contributions(ROWS)[:6]
    for row, contributions in zip(columns_of(NAMES, ROWS)[:6], found, strict=True):
        value = {
            frozenset(known): sum(value_of(tree, row, frozenset(known)) for tree in trees)
            for size in range(4)
            for known in combinations(range(3), size)
        }
        for feature in range(3):
            others = [known for known in value if feature not in known]
            shapley = sum(
                factorial(len(known)) * factorial(2 - len(known)) / 6 * (value[known | {feature}] - value[known])
                for known in others
            )
            assert contributions[feature] == pytest.approx(shapley, abs=1e-3)


def test_gap(fitted: Fitted, scorer: Scorer) -> None:
    contributions, margins = scorer.contributions(ROWS), scorer.score(ROWS).margin
    assert additivity_gap(contributions, margins) < 1e-5
    moved = margins.copy()
    moved[7] += 0.25
    assert additivity_gap(contributions, moved) == pytest.approx(0.25, abs=1e-4)
    assert additivity_gap(contributions[:0], margins[:0]) == 0


def test_importance_leaves_the_base_out_and_keeps_ties_in_order() -> None:
    contributions = np.array([[1, -3, 1, -9], [-1, 1, 1, -9]], np.float32)
    assert importance(contributions, ("a", "b", "c")) == [("b", 2.0), ("a", 1.0), ("c", 1.0)]
    for wrong in (contributions[:, :3], contributions[:0], contributions[0]):
        with pytest.raises(ValueError, match="contributions: shape"):
            importance(wrong, ("a", "b", "c"))


def test_explanation_holds_the_same_numbers(scorer: Scorer) -> None:
    contributions = scorer.contributions(ROWS)
    found = explanation(columns_of(NAMES, ROWS), contributions, NAMES)
    sums = found.values.sum(axis=1) + found.base_values
    assert sums == pytest.approx(scorer.score(ROWS).margin, abs=1e-4)
    assert found.feature_names == list(NAMES) and np.array_equal(found.data, columns_of(NAMES, ROWS), equal_nan=True)
    with pytest.raises(ValueError, match="shapes"):
        explanation(ROWS, contributions, NAMES)


def test_cases() -> None:
    probabilities = np.array([0.9, 0.95, 0.02, 0.01, 0.6, 0.7, 0.001, 0.03, 0.02])
    is_fraud = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0], np.bool_)
    is_alert = probabilities > 0.5
    expected = {"caught fraud": 1, "missed fraud": 3, "false alarm": 5, "approved": 7}
    assert cases(probabilities, is_fraud, is_alert) == expected  # the median is 0.03
    quiet = np.zeros(9, np.bool_)
    assert set(cases(probabilities, is_fraud, quiet)) == {"missed fraud", "approved"}
    assert cases(probabilities[:0], is_fraud[:0], quiet[:0]) == {}
