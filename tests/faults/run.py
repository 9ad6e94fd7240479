"""`make faults`: every fault at its seeds, one row each, and how many were survived.

What was survived is noted under `.fraud/faults/` and not played again while the code is the same: ended in the
middle, the next run goes on there. A seed is replayed by `--only NUMBER --seed SEED`.
"""

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.e2e.stream_kit import small_model
from tests.faults.notes import Notes, code_of
from tests.faults.plays import PLAYS, Play
from tests.faults.stage import NotRun, stage

ROOT = Path(__file__).parents[2]
NOTES = Notes(ROOT / ".fraud" / "faults" / "results.jsonl")
PLAYED = ("notes", "plays", "proxy", "run", "stage", "truth")  # of this folder
PURCHASES = 3_000  # of one flow; some plays have several
OTHERWISE_SEEDS = 3  # of faults that are not played at every seed


def code() -> str:
    """What was played, and on what."""
    here = Path(__file__).parent
    return code_of([*(ROOT / "fraud_nb").rglob("*.py"), *(here / f"{name}.py" for name in PLAYED)])


def play(each: Play, seed: int, model: Path, size: int) -> dict[str, Any]:
    """One fault at one seed, and the proof; raises whatever was wrong, or NotRun."""
    begin = time.monotonic()
    with stage(model, f"{each.number}:{seed}", size) as where:
        try:
            each.play(where)
            if each.checks:
                where.check()
        except NotRun:
            raise
        except BaseException:
            for worker in where.workers:
                sys.stderr.write(f"{worker.log.name}:\n{worker.last_words()}\n")
            raise
        seconds = time.monotonic() - begin
        return {"records": where.sent, "settled_s": round(where.settled_s, 1), "seconds": round(seconds, 1)}


def one(each: Play, seed: int, model: Path, size: int) -> dict[str, Any]:
    """What came of it."""
    result: dict[str, Any] = {"fault": each.number, "seed": seed}
    try:
        result |= {"outcome": "survived"} | play(each, seed, model, size)
    except NotRun as why:
        result |= {"outcome": f"not run: {why}"}
    except Exception as error:
        traceback.print_exc()
        result |= {"outcome": "failed", "why": f"{type(error).__name__}: {error}"[:300]}
    return result


def row(each: Play, results: Sequence[dict[str, Any]], wanted: int) -> str:
    """One line about a fault."""
    survived = [result for result in results if result["outcome"] == "survived"]
    reasons = {result["outcome"] for result in results if result["outcome"].startswith("not run")}
    if reasons:
        return f"{each.number:2}  {each.title}: {reasons.pop()}"
    failed = [str(result["seed"]) for result in results if result["outcome"] == "failed"]
    records = sum(result["records"] for result in survived)
    slowest = max((result["settled_s"] for result in survived), default=0.0)
    text = f"{each.number:2}  {each.title}: {len(survived)}/{wanted} seeds, {records:,} records, "
    return f"{text}all dealt with {slowest:.1f} s after the last one" + (f"; FAILED: {failed}" if failed else "")


def faults(seeds: int, only: Sequence[int], exactly: int | None, size: int) -> int:
    """Play, note and tell; 0 if all was survived."""
    mine = code()
    known = {
        (each["fault"], each["seed"]): each for each in NOTES if each["code"] == mine and each["outcome"] != "failed"
    }
    survived, records = 0, 0
    with tempfile.TemporaryDirectory(prefix="fraud-") as folder:
        model = small_model(Path(folder) / "model.bundle")
        for each in (PLAYS[number] for number in sorted(only or PLAYS)):
            wanted = (
                [exactly] if exactly is not None else range(seeds if each.is_thorough else min(seeds, OTHERWISE_SEEDS))
            )
            results = []
            for seed in wanted:
                result = known.get((each.number, seed)) if exactly is None else None
                if result is None:
                    result = one(each, seed, model, size)
                    NOTES.add(result | {"code": mine})
                    sys.stderr.write(f"    fault {each.number}, seed {seed}: {json.dumps(result)}\n")
                results.append(result)
            survived += all(result["outcome"] == "survived" for result in results)
            records += sum(result.get("records", 0) for result in results)
            sys.stdout.write(row(each, results, len(wanted)) + "\n")
            sys.stdout.flush()
    played = len(only or PLAYS)
    sys.stdout.write(f"survived {survived}/{played}, {records:,} records, code {mine}\n")
    return 0 if survived == played else 1


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.run", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="of the faults that matter most; the others have three")
    parser.add_argument("--only", default="", help="numbers of faults, with commas")
    parser.add_argument("--seed", type=int, help="play this one seed again, whatever is noted")
    parser.add_argument("--purchases", type=int, default=PURCHASES, help="in one flow; some faults have several")
    arguments = parser.parse_args()
    only = [int(number) for number in arguments.only.split(",") if number]
    return faults(arguments.seeds, only, arguments.seed, arguments.purchases)


if __name__ == "__main__":
    sys.exit(main())
