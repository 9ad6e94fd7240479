"""Training: the curve is Platt's, measured scores are served scores, budgets hold, the gate refuses what it must."""

import json
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from scipy.optimize import minimize

from fraud_nb.decision.bundle import TrainingWindow, calibrated, check_knots, unpack
from fraud_nb.decision.policy import Policy, count_alerts
from fraud_nb.decision.scorer import Scorer
from fraud_nb.features.catalogue import FEATURE_NAMES, Vector
from fraud_nb.learning.imbalance import ARMS, Arm, TooFewFrauds
from fraud_nb.learning.train import (
    SIMULATOR_GATE,
    CalibrationError,
    Fitted,
    Recipe,
    alert_policy,
    bundle_of,
    calibrate,
    choose,
    columns_of,
    fit,
    gate,
    score,
)

Truth = npt.NDArray[np.bool_]
RECIPE = Recipe(rounds=25, learning_rate=0.2, threads=1, negatives_share=0.5)
NAMES = ("hour", "amount", "same_device_count")  # not in the catalogue's order


def town(rows: int, seed: int) -> tuple[Vector, Truth]:
    """Vectors and truth: 2 % frauds, dearer and on newer devices; some values missing."""
    rng = np.random.default_rng(seed)
    is_fraud = rng.random(rows) < 0.02
    vectors = rng.normal(0, 1, (rows, len(FEATURE_NAMES))).astype(np.float32)
    vectors[:, FEATURE_NAMES.index("amount")] += 2 * is_fraud
    vectors[:, FEATURE_NAMES.index("same_device_count")] -= 1.5 * is_fraud
    vectors[rng.random(vectors.shape) < 0.1] = np.nan
    return vectors, is_fraud


TRAIN, CALIBRATION, TEST = town(4_000, 1), town(4_000, 2), town(6_000, 3)


def fitted_of(arm: Arm, names: tuple[str, ...] = NAMES) -> Fitted:
    return fit(replace(RECIPE, arm=arm), names, *TRAIN, None, *CALIBRATION)


def sealed(fitted: Fitted) -> bytes:
    return bundle_of(fitted, TEST[0][:9], Policy(version=4), TrainingWindow(0, 9), 7, "test", {"auc": 0.9})


@pytest.mark.parametrize("rows", [200, 5_000])
def test_curve_is_platts(rows: int) -> None:
    rng = np.random.default_rng(9)
    margins = rng.normal(-3, 2, rows).astype(np.float32)
    is_fraud = rng.random(rows) < 1 / (1 + np.exp(1 - 0.7 * margins))
    frauds = is_fraud.sum()
    target = np.where(is_fraud, (frauds + 1) / (frauds + 2), 1 / (rows - frauds + 2))

    def loss(line: npt.NDArray[np.float64]) -> float:
        logit = line[0] * margins + line[1]
        return float((np.logaddexp(0, logit) - target * logit).sum())

    slope, intercept = minimize(loss, [1.0, 0.0]).x
    expected = 1 / (1 + np.exp(-slope * margins - intercept))
    knots = calibrate(margins, is_fraud)
    check_knots(knots)
    assert np.abs(calibrated(margins, knots) - expected).max() < 0.001
    assert calibrated(margins, knots).mean() == pytest.approx(target.mean(), rel=0.02)


def test_curve_is_never_certain_and_keeps_order() -> None:
    margins = np.linspace(-40, 40, 500).astype(np.float32)
    knots = calibrate(margins, margins > 0)  # perfectly separable
    found = calibrated(np.array([-1e9, *margins, 1e9], np.float32), knots)
    assert 0 < found.min() < found.max() < 1
    assert (np.diff(found) >= 0).all()
    one = calibrated(margins, calibrate(margins, np.arange(500) == 499))  # a single fraud
    assert (np.diff(one) >= 0).all() and 0 < one.min()


def test_what_cannot_calibrate() -> None:
    margins = np.linspace(-4, 4, 50).astype(np.float32)
    for is_fraud in (np.zeros(50, np.bool_), np.ones(50, np.bool_)):
        with pytest.raises(CalibrationError, match="take more days"):
            calibrate(margins, is_fraud)
    with pytest.raises(CalibrationError, match="do not score higher"):
        calibrate(margins, margins < 0)
    with pytest.raises(CalibrationError, match="do not score higher"):
        calibrate(np.zeros(50, np.float32), margins < 0)


@pytest.mark.parametrize("arm", ARMS)
def test_served_scores_are_measured_scores(arm: Arm) -> None:
    fitted = fitted_of(arm)
    margins, probabilities = score(fitted, TEST[0])
    content = sealed(fitted)
    served = Scorer(unpack(content, None)).score(TEST[0])
    assert served.margin.tobytes() == margins.tobytes()
    assert served.probability.tobytes() == probabilities.tobytes()
    assert probabilities.mean() == pytest.approx(TEST[1].mean(), rel=0.35)  # calibrated whatever the arm did
    assert sealed(fitted_of(arm)) == content


def test_number_of_threads_changes_nothing() -> None:
    one, two = (fit(replace(RECIPE, threads=threads), NAMES, *TRAIN, None, *CALIBRATION) for threads in (1, 2))
    assert one.booster.save_raw("json") == two.booster.save_raw("json")


def test_manifest_holds_what_was_given() -> None:
    manifest = unpack(sealed(fitted_of("smote")), None).manifest
    assert tuple(name for name, _ in manifest.features) == NAMES
    assert manifest.imputation is not None and set(manifest.imputation) == set(NAMES)
    assert manifest.policy["version"] == 4 and manifest.metrics == {"auc": 0.9}
    assert (manifest.training, manifest.label_horizon_ms) == (TrainingWindow(0, 9), 7)


def test_recipe_reaches_the_trees() -> None:
    model = json.loads(fitted_of("none").booster.save_raw("json"))["learner"]
    trees = model["gradient_booster"]["model"]["trees"]
    assert len(trees) == RECIPE.rounds
    assert max(len(tree["left_children"]) for tree in trees) <= 2 ** (RECIPE.depth + 1) - 1
    assert json.loads(model["learner_model_param"]["base_score"]) in (0.5, [0.5])


def test_weights_count_as_repeated_rows() -> None:
    vectors, is_fraud = TRAIN
    recipe = replace(RECIPE, subsample=1.0, colsample=1.0)
    weighted = fit(recipe, NAMES, vectors, is_fraud, np.where(is_fraud, 1, 2).astype(np.float32), *CALIBRATION)
    twice = np.concatenate([np.arange(len(vectors)), np.flatnonzero(~is_fraud)])
    repeated = fit(recipe, NAMES, vectors[twice], is_fraud[twice], None, *CALIBRATION)
    apart = np.abs(score(weighted, TEST[0])[0] - score(repeated, TEST[0])[0])
    plain = fit(recipe, NAMES, vectors, is_fraud, None, *CALIBRATION)
    unweighted = np.abs(score(weighted, TEST[0])[0] - score(plain, TEST[0])[0])
    assert np.median(apart) < np.median(unweighted) / 3  # the bins of the columns differ a little


def test_columns() -> None:
    assert (columns_of(NAMES, TEST[0])[:, 0].tobytes()) == TEST[0][:, FEATURE_NAMES.index("hour")].tobytes()
    with pytest.raises(ValueError, match="names: magic"):
        columns_of(("hour", "magic"), TEST[0])
    with pytest.raises(ValueError, match="vectors: shape"):
        columns_of(NAMES, TEST[0][:, :3])
    with pytest.raises(TooFewFrauds):
        fit(RECIPE, NAMES, TRAIN[0], np.zeros(4_000, np.bool_), None, *CALIBRATION)


@pytest.mark.parametrize("share", [0.0, 0.003, 0.02, 1.0])
def test_alert_budget_holds(share: float) -> None:
    _, probabilities = score(fitted_of("none"), TEST[0])
    amounts = np.random.default_rng(1).lognormal(8, 1, len(probabilities)).astype(np.int64)
    priced = alert_policy(probabilities, amounts, share, Policy(version=3))
    assert count_alerts(probabilities, amounts, priced) <= share * len(probabilities)
    assert priced.version == 3
    assert (priced.alert_price_minor == 0) == (share == 1.0)
    with pytest.raises(ValueError, match="alert_share"):
        alert_policy(probabilities, amounts, share + 1.1, Policy())


GOOD = {"frauds": 200.0, "auc": 0.94, "average_precision": 0.45, "recall_at_fpr_1pct": 0.65, "ece": 0.001}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"frauds": 49.0}, "frauds is 49, at least 50"),
        ({"auc": 0.899}, "auc is 0.899, at least 0.9 "),
        ({"auc": 0.99}, "a leak until disproved"),
        ({"auc": float("nan")}, "auc is not known"),
        ({"average_precision": 0.2}, "average_precision is 0.2, at least 0.25"),
        ({"recall_at_fpr_1pct": 0.4}, "recall_at_fpr_1pct is 0.4"),
        ({"ece": 0.02}, "do not keep their word"),
    ],
)
def test_gate_names_the_failure(change: dict[str, float], says: str) -> None:
    assert gate(GOOD, None) == []
    failures = gate({**GOOD, **change}, None)
    assert len(failures) == 1 and says in failures[0]


def test_gate_against_a_champion() -> None:
    assert gate(GOOD, GOOD) == []
    better = {**GOOD, "average_precision": 0.50}
    assert len(gate(GOOD, better)) == 1 and gate(GOOD, better, champion_low=0.44) == []
    weak = {**GOOD, "average_precision": 0.28}
    assert "leak until disproved" in gate(GOOD, weak)[0]
    assert gate(GOOD, weak, replace(SIMULATOR_GATE, max_average_precision_gain=0.2)) == []
    assert len(gate({}, None)) == 5


def test_choice() -> None:
    assert choose({"none": {"average_precision": 0.4}, "smote": {"average_precision": 0.5}}) == "smote"
    assert choose({"none": {"average_precision": 0.5}, "smote": {"average_precision": 0.5}}) == "none"
    assert choose({"none": {"average_precision": 0.5}, "smote": {"average_precision": 0.509}}) == "none"
    assert choose({"none": {"average_precision": 0.5}, "smote": {"average_precision": 0.511}}) == "smote"
    with pytest.raises(ValueError, match="needs frauds"):
        choose({"none": {"average_precision": float("nan")}})
