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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
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


def one(number: int, seed: int, model: Path, size: int) -> dict[str, Any]:
    """What came of it."""
    result: dict[str, Any] = {"fault": number, "seed": seed}
    try:
        result |= {"outcome": "survived"} | play(PLAYS[number], seed, model, size)
    except NotRun as why:
        result |= {"outcome": f"not run: {why}"}
    except Exception as error:
        traceback.print_exc()
        result |= {"outcome": "failed", "why": f"{type(error).__name__}: {error}"[:300]}
    sys.stderr.write(f"    fault {number}, seed {seed}: {json.dumps(result)}\n")
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


@contextmanager
def playing(
    wanted: Iterable[tuple[int, int]],  # faults and seeds
    model: Path,
    size: int,
    jobs: int,
) -> Iterator[dict[tuple[int, int], Future[dict[str, Any]]]]:
    """What will come of each; plays are processes of their own, because they wait more than they work."""
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        try:
            yield {(number, seed): pool.submit(one, number, seed, model, size) for number, seed in wanted}
        finally:
            pool.shutdown(cancel_futures=True)


def faults(wanted: Mapping[int, Sequence[int]], is_again: bool, size: int, jobs: int) -> int:
    """Play, note and tell; 0 if all was survived."""
    mine = code()

    def note(done: Future[dict[str, Any]]) -> None:
        if not done.cancelled():
            NOTES.add(done.result() | {"code": mine})

    known = {
        (each["fault"], each["seed"]): each
        for each in NOTES
        if each["code"] == mine and each["outcome"] != "failed" and not is_again
    }
    missing = [(number, seed) for number, seeds in wanted.items() for seed in seeds if (number, seed) not in known]
    survived, records, seconds = 0, 0, 0.0
    with tempfile.TemporaryDirectory(prefix="fraud-") as folder:
        model = small_model(Path(folder) / "model.bundle")
        with playing(missing, model, size, jobs) as plays:
            for future in plays.values():
                future.add_done_callback(note)
            for number, seeds in wanted.items():
                results = [known.get((number, seed)) or plays[number, seed].result() for seed in seeds]
                survived += all(result["outcome"] == "survived" for result in results)
                records += sum(result.get("records", 0) for result in results)
                seconds += sum(result.get("seconds", 0.0) for result in results)
                sys.stdout.write(row(PLAYS[number], results, len(seeds)) + "\n")
                sys.stdout.flush()
    played = f"{records:,} records in {seconds / 60:,.0f} minutes of play, {jobs} at a time"
    sys.stdout.write(f"survived {survived}/{len(wanted)}, {played}, code {mine}\n")
    return 0 if survived == len(wanted) else 1


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.run", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="of the faults that matter most; the others have three")
    parser.add_argument("--only", default="", help="numbers of faults, with commas")
    parser.add_argument("--seed", type=int, help="play this one seed again, whatever is noted")
    parser.add_argument("--purchases", type=int, default=PURCHASES, help="in one flow; some faults have several")
    parser.add_argument("--jobs", type=int, default=1, help="plays at the same time; two or three on two cores")
    arguments = parser.parse_args()
    only = sorted(int(number) for number in arguments.only.split(",") if number) or sorted(PLAYS)
    fewer = min(arguments.seeds, OTHERWISE_SEEDS)
    seeds = {number: range(arguments.seeds if PLAYS[number].is_thorough else fewer) for number in only}
    is_again = arguments.seed is not None
    wanted = {number: [arguments.seed] for number in only} if is_again else seeds
    return faults(wanted, is_again, arguments.purchases, arguments.jobs)


if __name__ == "__main__":
    sys.exit(main())
