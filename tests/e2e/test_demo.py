"""`fraud demo`, cold to its proof and then warm to Ctrl-C: the numbers it prints, and what it leaves behind."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.e2e.stream_kit import MAIN


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    # Not pytest's own folder: as root, PostgreSQL runs as `nobody`, who may not enter that one.
    with tempfile.TemporaryDirectory(prefix="fraud-demo-", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)
        yield Path(folder) / "home"


def demo(home: Path, *words: str) -> subprocess.Popen[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FRAUD_")}
    command = [sys.executable, "-c", MAIN, "demo", *words]
    return subprocess.Popen(
        command, env={**kept, "FRAUD_HOME": str(home)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip


def left_behind(home: Path) -> list[str]:
    """Processes that still work in this home."""
    found = []
    for process in psutil.process_iter(["cmdline", "environ"]):
        words = " ".join(process.info["cmdline"] or ())
        if str(home) in words or (process.info["environ"] or {}).get("FRAUD_HOME") == str(home):
            found.append(words)
    return found


def test_cold_to_the_proof(home: Path) -> None:
    running = demo(home, "--seconds", "10")
    out, said = running.communicate(timeout=280)
    assert running.returncode == 0, said
    result = json.loads(out.splitlines()[-1])
    assert result["decisions"] == result["transactions"] >= 1_900
    assert (result["lost"], result["duplicated"], result["parity_mismatches"]) == (0, 0, 0)
    assert result["auc"] > 0.90 and 0 < result["average_precision"] < 1
    assert 0 < result["p50_ms"] <= result["p99_ms"]
    assert said.count(" decided: approve ") >= 10, "one line a second"
    assert left_behind(home) == []


def test_warm_to_ctrl_c(home: Path) -> None:
    begun = time.monotonic()
    running = demo(home)
    try:
        for line in running.stderr or ():
            if "decided: approve" in line:
                break
        warm_s = time.monotonic() - begun
        running.send_signal(signal.SIGINT)
        running.wait(20)
    finally:
        running.kill()
    assert running.returncode == 0
    assert left_behind(home) == []
    assert warm_s < 60, "history and model were there"  # its goal is 20 s on a quiet machine
