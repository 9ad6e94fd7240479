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

from tests.e2e.stream_kit import MAIN, fraud, small_model


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    # Not pytest's own folder: as root, PostgreSQL runs as `nobody`, who may not enter that one.
    with tempfile.TemporaryDirectory(prefix="fraud-demo-", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)
        yield Path(folder) / "home"


def started(home: Path, *words: str) -> subprocess.Popen[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FRAUD_")}
    command = [sys.executable, "-c", MAIN, *words]
    return subprocess.Popen(
        command, env={**kept, "FRAUD_HOME": str(home)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip


def demo(home: Path, *words: str) -> subprocess.Popen[str]:
    return started(home, "demo", *words)


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


def wait_for_line(running: subprocess.Popen[str], words: str) -> None:
    assert any(words in line for line in running.stderr or ()), f"it ended without: {words}"


def refusal(home: Path, name: str, holder: subprocess.Popen[str]) -> str:
    return (
        f"fraud: {name}: one is at work in {home}, process {holder.pid}; stop it, or set FRAUD_HOME to another folder\n"
    )


def test_a_second_demo_is_refused_and_a_killed_one_blocks_nobody(home: Path) -> None:
    first = demo(home)
    wait_for_line(first, "[1/6]")
    second = demo(home)
    _, said = second.communicate(timeout=60)
    assert (second.returncode, said) == (1, refusal(home, "demo", first))
    first.kill()
    first.wait(10)
    third = demo(home)
    wait_for_line(third, "[1/6]")
    third.send_signal(signal.SIGINT)
    third.communicate(timeout=120)
    assert third.returncode == 0 and left_behind(home) == []


def test_no_demo_beside_a_stream(home: Path, tmp_path: Path) -> None:
    model = small_model(tmp_path / "model.bundle")
    assert fraud({"FRAUD_HOME": str(home)}, "up").returncode == 0
    stream = started(home, "stream", "--model", str(model))
    try:
        wait_for_line(stream, '"ready"')
        refused = demo(home)
        _, said = refused.communicate(timeout=60)
        assert (refused.returncode, said) == (1, refusal(home, "stream", stream))
        assert stream.poll() is None, "it goes on"
    finally:
        stream.terminate()
        stream.communicate(timeout=60)
        assert fraud({"FRAUD_HOME": str(home)}, "down").returncode == 0
    assert left_behind(home) == []
