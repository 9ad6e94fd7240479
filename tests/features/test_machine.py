"""What is kept on disk is what was compiled, whoever else writes there at the same time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fraud_nb.domain import geo, machine
from fraud_nb.domain.machine import _Compilations, meaning
from fraud_nb.features import profile


def test_two_processes_that_save_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second saves between the first one's steps; numba's own cache mixes them up."""
    first, second = (_Compilations(str(tmp_path), "function-1.py311", None) for _ in range(2))
    for_events, for_tiles = ("events", "cpu", "meaning"), ("tiles", "cpu", "meaning")
    save = _Compilations._save_data

    def interrupted(self: _Compilations, name: str, data: object) -> None:
        monkeypatch.setattr(_Compilations, "_save_data", save)
        second.save(for_tiles, "code for tiles")
        save(self, name, data)

    monkeypatch.setattr(_Compilations, "_save_data", interrupted)
    first.save(for_events, "code for events")
    for cache in (first, second):
        assert (cache.load(for_events), cache.load(for_tiles)) == ("code for events", "code for tiles")


@pytest.mark.parametrize("kept", [b"", b"\x80", b"not a pickle"])
def test_what_cannot_be_read_is_compiled_again(tmp_path: Path, kept: bytes) -> None:
    cache = _Compilations(str(tmp_path), "function-1.py311", None)
    cache.save(("key",), "code")
    (file,) = tmp_path.iterdir()
    file.write_bytes(kept)
    assert cache.load(("key",)) is None


def test_a_changed_constant_is_another_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though neither its own text nor its file has changed: the constant is in another module."""
    before = meaning(profile.learn.py_func)
    monkeypatch.setattr(profile, "HORIZON_MS", profile.HORIZON_MS + 1)
    assert meaning(profile.learn.py_func) != before


def test_every_compiled_function_has_a_meaning() -> None:
    """None holds a function that would be left out of it."""
    from fraud_nb.adapters import kafka_bus
    from fraud_nb.features import catalogue, fold, tiles, windows

    found = {
        meaning(each.py_func)
        for module in (geo, windows, profile, tiles, catalogue, fold, kafka_bus)
        for each in vars(module).values()
        if isinstance(each, machine.Dispatcher)
    }
    assert len(found) > 30


WRITE = """
import sys
import numpy as np
from fraud_nb.features.profile import Arena
from fraud_nb.features.tiles import TILE
from fraud_nb.features.windows import EVENT
for dtype in (EVENT, TILE) if sys.argv[1] == "0" else (TILE, EVENT):
    arena = Arena(dtype, 8)
    rows = np.arange(40 * dtype.itemsize // 8).view(dtype)
    arena.load(["a", "b"], [b"\\x01" + rows.tobytes(), b"\\x01" + rows[:3].tobytes()])
    assert arena.rows("a").tobytes() == rows.tobytes() and len(arena.rows("b")) == 3
"""


def test_processes_that_start_together_on_a_new_machine(tmp_path: Path) -> None:
    """A worker and a service compile the same functions for rows of two widths, in opposite orders; later ones read."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    for _ in range(2):
        started = [subprocess.Popen([sys.executable, "-c", WRITE, order], env=environment) for order in "01"]
        assert [process.wait(120) for process in started] == [0, 0]
    kept = [path.name for path in tmp_path.rglob("*.nbc")]
    assert len({name for name in kept if name.startswith("profile.put_all")}) == 2
