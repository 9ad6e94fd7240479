"""What the repository as a whole promises."""

import re
import subprocess
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
MAX_TARGETS = 13
PRIVATE_KEY = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY")


def makefile_targets() -> list[str]:
    """Targets a person can name; files and special targets are left out."""
    return re.findall(r"^([a-z][a-z-]*):(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)


def lock_entries() -> list[str]:
    """One text for each package of requirements.lock, with its continuation lines."""
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    lock = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    return re.split(r"\n(?=\S)", lock.strip())


def committed_files() -> list[Path]:
    """Files git tracks, and new ones it would add."""
    git = ["git", "-C", str(ROOT), "-c", f"safe.directory={ROOT}"]  # in CI another user may own the clone
    command = [*git, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def test_makefile_stays_short() -> None:
    targets = makefile_targets()
    assert targets, "Makefile: no target found"
    assert len(targets) <= MAX_TARGETS, f"Makefile: {len(targets)} targets, at most {MAX_TARGETS}; drop or merge some"


def test_every_target_is_documented() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    silent = [name for name in makefile_targets() if not re.search(rf"^{name}:.*## \S", makefile, flags=re.MULTILINE)]
    assert not silent, f"Makefile: {silent} lack a `## what it does` for `make help`"


def test_lock_names_no_address() -> None:
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    addresses = [number for number, line in enumerate(lines, start=1) if "://" in line or "--index-url" in line]
    assert not addresses, f"requirements.lock: addresses in lines {addresses}; renew it as CONTRIBUTING.md says"


def test_lock_has_a_hash_for_each_package() -> None:
    entries = lock_entries()
    bare = [entry.splitlines()[0] for entry in entries if not re.match(r"\S+==\S+[^\n]*\\\n\s+--hash=sha256:", entry)]
    assert entries and not bare, f"requirements.lock: no exact version and hash for {bare}; renew it (CONTRIBUTING.md)"


def test_the_bento_asks_for_versions_of_the_lock() -> None:
    locked = {re.split(r"[\\;]", entry)[0].strip() for entry in lock_entries()}
    asked = yaml.safe_load((ROOT / "bentofile.yaml").read_text(encoding="utf-8"))["python"]["packages"]
    strange = [each for each in asked if each.partition(";")[0].strip() not in locked]
    assert asked and not strange, f"bentofile.yaml: {strange} are not in requirements.lock; take its versions"


def test_no_private_key_is_committed() -> None:
    keys = [str(path.relative_to(ROOT)) for path in committed_files() if PRIVATE_KEY.search(path.read_bytes())]
    assert not keys, f"private keys in {keys}; take them out of the history and replace them, they are public now"
