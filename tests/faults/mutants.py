"""`make mutants`: take one safety mechanism out at a time, in a copy, and see that the tests notice.

What came of a mutant is noted under `.fraud/mutants/` and not tried again while the package, its tests and what they
share are the same. `--only 3,7` tries these again.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.faults.mutations import MUTANTS, Mutant
from tests.faults.notes import Notes, Result, code_of

ROOT = Path(__file__).parents[2]
NOTES = Notes(ROOT / ".fraud" / "mutants" / "results.jsonl")
ONE_TEST_S, SELECTION_S = 120, 600  # a test that waits for longer fails; a selection that does proves nothing
PASSED, FAILED = 0, 1  # exit codes of pytest; every other one says that it could not do its work


def mutated(text: str, mutant: Mutant) -> str:
    """The text with the mutant's patch; raises ValueError where that does not fit exactly once."""
    if (found := text.count(mutant.old)) != 1:
        raise ValueError(f"{mutant.title}: its old text is in {mutant.file} {found} times, not once; write it anew")
    return text.replace(mutant.old, mutant.new)


def copied(source: Path, target: Path) -> None:
    """All files of the repository, and what was compiled: it lies under the name of what it means."""
    listed = subprocess.run(
        ["git", "-c", f"safe.directory={source}", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=source, check=True, capture_output=True, text=True,
    )  # fmt: skip
    files = [source / name for name in listed.stdout.split("\0") if name]
    for file in [*files, *(source / "fraud_nb").rglob("*.nbc")]:
        if file.is_file():  # else it was deleted and is in the index still
            place = target / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, place)


@dataclass(frozen=True)
class Outcome:
    """What pytest made of a selection."""

    word: str  # passed, failed, or why that cannot be said
    by: str = ""  # the first test that failed, and why


def tried(tree: Path, tests: Sequence[str], seconds: float = SELECTION_S) -> Outcome:
    """Run these tests in this tree."""
    plugins = ["-p", "no:cacheprovider", "-p", "pytest_timeout"]  # no other one: they take a while to import
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "-W", "ignore", *plugins]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FRAUD_", "PYTEST_"))}
    ours = {"PYTHONPATH": str(tree), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "COLUMNS": "200"}
    child = subprocess.Popen(
        [*command, "--timeout", str(ONE_TEST_S), *tests],
        cwd=tree, env={**kept, **ours}, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        said, _ = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        return Outcome(f"no end within {seconds:.0f} s")
    failed = [line.removeprefix("FAILED ") for line in said.splitlines() if line.startswith("FAILED ")]
    if child.returncode == PASSED:
        return Outcome("passed")
    if child.returncode == FAILED and failed:
        return Outcome("failed", failed[0])
    last_words = " | ".join(said.strip().splitlines()[-3:])
    return Outcome(f"exit code {child.returncode} and no test that failed: {last_words}"[:500])


def needed(file: Path, root: Path) -> set[Path]:
    """A file of tests, what it imports of tests, and what that imports."""
    found, new = set[Path](), {file}
    while new:
        found |= new
        modules = {name for each in new for name in re.findall(r"^ *from (tests\S+) import", each.read_text(), re.M)}
        new = {root / f"{name.replace('.', '/')}.py" for name in modules} - found
    return found


def code(mutant: Mutant, root: Path) -> str:
    """What is tried, and on what."""
    selected = {root / test.partition("::")[0] for test in mutant.tests}
    fixtures = {folder / "conftest.py" for file in selected for folder in (root / "tests", file.parent)}
    tests = {each for file in selected | {file for file in fixtures if file.exists()} for each in needed(file, root)}
    return code_of({*(root / "fraud_nb").rglob("*.py"), *tests}, repr(mutant))


class Trial:
    """Mutants of one repository, tried in copies of it."""

    def __init__(self, root: Path, notes: Notes) -> None:
        self.root, self.notes = root, notes
        self.passes: dict[tuple[str, ...], Outcome] = {}  # what the code as it is makes of each selection

    def outcome(self, mutant: Mutant | None, tests: tuple[str, ...]) -> Outcome:
        """Of these tests, in a new copy."""
        with tempfile.TemporaryDirectory(prefix="fraud-") as folder:
            tree = Path(folder)
            copied(self.root, tree)
            if mutant is not None:
                file = tree / "fraud_nb" / mutant.file
                file.write_text(mutated(file.read_text(), mutant))
            return tried(tree, tests)

    def result(self, mutant: Mutant) -> Result:
        """Killed, survived, or why nobody knows."""
        if mutant.tests not in self.passes:
            self.passes[mutant.tests] = self.outcome(None, mutant.tests)
        begin, healthy = time.monotonic(), self.passes[mutant.tests]
        if healthy.word != "passed":
            return {"outcome": f"not tried: without it, {healthy.word} {healthy.by}", "by": "", "seconds": 0.0}
        found = self.outcome(mutant, mutant.tests)
        word = {"passed": "survived", "failed": "killed"}.get(found.word, found.word)
        return {"outcome": word, "by": found.by, "seconds": round(time.monotonic() - begin, 1)}

    def run(self, mutants: Sequence[Mutant], numbers: Sequence[int]) -> int:
        """Try, note and tell; 0 if all that do harm are killed, and only those."""
        known = {result["code"]: result for result in self.notes if result["outcome"] in ("killed", "survived")}
        killed, strange = 0, 0
        for number in numbers or range(1, len(mutants) + 1):
            mutant = mutants[number - 1]
            mine = code(mutant, self.root)
            result = None if numbers else known.get(mine)
            if result is None:
                result = {"mutant": mutant.title, **self.result(mutant), "code": mine}
                self.notes.add(result)
            expected = "survived" if mutant.harmless else "killed"
            killed += not mutant.harmless and result["outcome"] == "killed"
            strange += result["outcome"] != expected
            mark = "" if result["outcome"] == expected else "  !!"
            sys.stdout.write(f"{number:3} {result['outcome']:8} {result['seconds']:6.1f} s  {mutant.title}{mark}\n")
            why = mutant.harmless if result["outcome"] == "survived" else result["by"]
            sys.stdout.write(f"{'':22}{why or mutant.breaks}\n")
            sys.stdout.flush()
        harmful = sum(not mutants[number - 1].harmless for number in numbers or range(1, len(mutants) + 1))
        sys.stdout.write(f"killed {killed}/{harmful}\n")
        return 1 if strange else 0


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.mutants", description=__doc__)
    parser.add_argument("--only", default="", help="numbers of mutants, with commas; whatever is noted")
    arguments = parser.parse_args()
    return Trial(ROOT, NOTES).run(MUTANTS, [int(number) for number in arguments.only.split(",") if number])


if __name__ == "__main__":
    sys.exit(main())
