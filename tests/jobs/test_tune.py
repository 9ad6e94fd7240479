"""The search for a recipe: a budget, a seed, and today's recipe among the trials."""

import json
from pathlib import Path

from fraud_nb.learning.train import Recipe
from fraud_nb.operations.jobs import run_job

NOTEBOOK = Path(__file__).parents[2] / "nbs" / "jobs" / "tune.ipynb"


def test_a_search_begins_with_todays_recipe(tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    values = {"trials": 2, "customers": 150, "days": 50, "most_rounds": 40, "output": str(found)}
    run_job(NOTEBOOK, tmp_path / "tune.ipynb", values, progress=False)
    result = json.loads(found.read_text())
    first, second = result["trials"]
    assert first["depth"] == Recipe().depth and first["colsample"] == Recipe().colsample
    assert {name: first[name] for name in ("depth", "subsample")} != {
        name: second[name] for name in ("depth", "subsample")
    }
    assert result["recipe"]["rounds"] <= 40 and all(0 <= trial["average_precision"] <= 1 for trial in result["trials"])
