"""A bundle opens whole or not at all."""

import inspect
import random
import zipfile
from io import BytesIO

import msgspec
import numpy as np
import pytest
import xgboost as xgb

from fraud_nb.decision.bundle import (
    Bundle,
    BundleError,
    TrainingWindow,
    _zip,
    pack,
    sha256_of,
    unpack,
)
from fraud_nb.decision.scorer import Scorer
from fraud_nb.features.catalogue import FEATURE_NAMES, Vector, fingerprints

NAMES = ("speed_from_last", "amount", "customer_count_1h", "same_device_count")
KNOTS = [(-6.0, 0.001), (0.0, 0.4), (4.0, 0.98)]


def sample_vectors() -> Vector:
    rng = np.random.default_rng(11)
    vectors = rng.gamma(1.0, 3.0, (400, len(FEATURE_NAMES))).astype(np.float32)
    vectors[rng.random(vectors.shape) < 0.1] = np.nan
    return vectors


VECTORS = sample_vectors()


def train(rounds: int = 15) -> xgb.Booster:
    columns = VECTORS[:, [FEATURE_NAMES.index(name) for name in NAMES]]
    is_fraud = np.nan_to_num(columns[:, 0] + columns[:, 2]) > 10
    settings = {"objective": "binary:logistic", "max_depth": 4, "base_score": 0.05, "nthread": 1}
    return xgb.train(settings, xgb.DMatrix(columns, is_fraud, nthread=1), num_boost_round=rounds)


def packed(booster: xgb.Booster, **changes: object) -> bytes:
    parts: dict[str, object] = {
        "calibrator": KNOTS,
        "policy": {"version": 1},
        "training": TrainingWindow(0, 1),
        "label_horizon_ms": 0,
        "code_version": "0",
    }
    rows = VECTORS[:8, [FEATURE_NAMES.index(name) for name in NAMES]]
    return pack(booster, NAMES, rows, **(parts | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def content() -> bytes:
    return packed(train())


def mutations(content: bytes) -> list[bytes]:
    rng = random.Random(3)
    found = []
    while len(found) < 200:
        place = rng.randrange(len(content))
        kind = rng.choice(("flip", "digit", "insert", "delete", "cut"))
        if kind == "flip":
            changed = content[:place] + bytes([content[place] ^ (1 << rng.randrange(8))]) + content[place + 1 :]
        elif kind == "digit":
            digit = bytes([ord("0") + rng.randrange(10)])
            changed = content[:place] + digit + content[place + 1 :]
        elif kind == "insert":
            changed = content[:place] + bytes([rng.randrange(256)]) + content[place:]
        elif kind == "delete":
            changed = content[:place] + content[place + 1 :]
        else:
            changed = content[:place]
        if changed != content:
            found.append(changed)
    return found


def test_same_parts_same_bytes_and_same_scores(content: bytes) -> None:
    assert packed(train()) == content
    one, two = (Scorer(unpack(content, expected)).score(VECTORS) for expected in (None, sha256_of(content)))
    assert one.margin.tobytes() == two.margin.tobytes()


@pytest.mark.parametrize("with_hash", [True, False])
def test_every_mutation_is_refused(content: bytes, with_hash: bool) -> None:
    changed = mutations(content)
    assert len(changed) >= 200
    for mutant in changed:
        with pytest.raises(BundleError, match="wrong hash" if with_hash else "cut short or changed"):
            unpack(mutant, sha256_of(content) if with_hash else None)


def resealed(contents: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """What a forger makes: a seal that is right."""
    target = BytesIO()
    with zipfile.ZipFile(target, "w", compression) as archive:
        for name, file in contents.items():
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), file, compression)
        archive.comment = b"0" * 64
    body = target.getvalue()[:-64]
    return body + sha256_of(body).encode()


def files_of(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_a_right_seal_is_not_enough(content: bytes) -> None:
    contents = files_of(content)
    model = contents["model.json"]
    other = train(3).save_raw("json")
    for changed in (
        resealed(contents, zipfile.ZIP_DEFLATED),
        resealed(contents | {"extra.json": b"{}"}),
        resealed({name: contents[name] for name in ("manifest.json", "model.json")}),
        resealed(contents | {"model.json": bytes(other)}),
        resealed(contents | {"model.json": model.replace(b"1", b"2", 1)}),
        resealed(contents | {"golden.json": b"{"}),
        resealed(contents | {"manifest.json": b"\xff"}),
        sha256_of(b"").encode(),
    ):
        with pytest.raises(BundleError):
            unpack(changed, None)


def test_another_model_under_the_old_golden_scores_is_refused(content: bytes) -> None:
    contents = files_of(content)
    model = bytes(train(3).save_raw("json"))
    manifest = msgspec.json.decode(contents["manifest.json"])
    manifest["files"]["model.json"] = sha256_of(model)
    forged = _zip(contents | {"model.json": model, "manifest.json": msgspec.json.encode(manifest)})
    with pytest.raises(BundleError, match="golden scores differ"):
        unpack(forged, None)


def test_a_feature_that_means_something_else_by_now_is_refused(content: bytes) -> None:
    contents = files_of(content)
    manifest = msgspec.json.decode(contents["manifest.json"])
    manifest["features"][1][1] = "0" * len(manifest["features"][1][1])
    with pytest.raises(BundleError, match=f"feature {NAMES[1]}: its definition changed"):
        unpack(_zip(contents | {"manifest.json": msgspec.json.encode(manifest)}), None)


def test_unfit_parts_are_not_packed() -> None:
    booster = train()
    for changes in ({"calibrator": [(0.0, 0.5), (0.0, 0.6)]}, {"calibrator": []}, {"calibrator": [(0.0, 1.5)]}):
        with pytest.raises(BundleError, match="calibrator"):
            packed(booster, **changes)
    with pytest.raises(BundleError, match="imputation of shoe_size"):
        packed(booster, imputation={"shoe_size": 1.0})


def test_columns_are_picked_by_name(content: bytes) -> None:
    bundle: Bundle = unpack(content, None)
    assert bundle.names == NAMES
    scorer = Scorer(bundle)
    unused = VECTORS.copy()
    unused[:, [index for index, name in enumerate(FEATURE_NAMES) if name not in NAMES]] = 1e6
    assert scorer.score(unused).margin.tobytes() == scorer.score(VECTORS).margin.tobytes()
    assert scorer.score(VECTORS).probability.std() > 0


def test_rows_score_the_same_alone_and_together(content: bytes) -> None:
    scorer = Scorer(unpack(content, None))
    together = scorer.score(VECTORS)
    alone = np.concatenate([scorer.score(VECTORS[row : row + 1]).margin for row in range(len(VECTORS))])
    assert alone.tobytes() == together.margin.tobytes()
    assert np.allclose(scorer.contributions(VECTORS).sum(axis=1), together.margin, atol=1e-3)


def test_a_fingerprint_is_of_the_code_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """An export under a running worker changes the files, and not what it computes."""
    before = fingerprints()

    def changed(_: object) -> str:
        raise AssertionError("the file was read again")

    monkeypatch.setattr(inspect, "getsource", changed)
    assert fingerprints() == before
