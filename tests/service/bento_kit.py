"""A bento as a stranger runs it: imported from a file, in an empty directory, with nothing but what it asks for."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.service.service_kit import ask, wait_until

ROOT = Path(__file__).parents[2]
# Only this is known of the environment; PATH is where bentoml's own helpers are.
KEPT = ("PATH", "HOME", "LANG", "TMPDIR")
HIDE = """
import sys
HIDDEN = frozenset({hidden!r})
class Hider:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"hidden from the bento: {{name}}", name=name)
sys.path[:] = [each for each in sys.path if each != {root!r}]
sys.meta_path[:] = [Hider(), *(each for each in sys.meta_path if "__editable__" not in str(each))]
"""


def brought_by(requirements: Iterable[str]) -> set[str]:
    """Packages that come with these requirements."""
    brought: set[tuple[str, frozenset[str]]] = set()
    wanted = [Requirement(each) for each in requirements]
    while wanted:
        one = wanted.pop()
        key = canonicalize_name(one.name), frozenset(one.extras)
        if key in brought or (one.marker is not None and not one.marker.evaluate({"extra": ""})):
            continue
        try:
            needs = [Requirement(each) for each in distribution(one.name).requires or ()]
        except PackageNotFoundError:  # for another platform
            continue
        brought.add(key)
        for each in needs:
            if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in {"", *one.extras}):
                each.marker = None
                wanted.append(each)
    return {name for name, _ in brought}


def fresh_environment(folder: Path) -> Path:
    """A folder for PYTHONPATH that hides the repository and every package the bento does not ask for."""
    asked = yaml.safe_load((ROOT / "bentofile.yaml").read_text())["python"]["packages"]
    brought = brought_by(asked)
    hidden = {
        module
        for module, owners in packages_distributions().items()
        if module != "fraud_nb" and not brought & {canonicalize_name(owner) for owner in owners}
    }
    assert {"mlflow", "shap", "pandas"} <= hidden and "xgboost" not in hidden
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(HIDE.format(hidden=sorted(hidden), root=str(ROOT)))
    return folder


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@dataclass
class Box:
    """An empty directory, a fresh environment, and a BentoML store with the one imported bento in it."""

    folder: Path
    environment: dict[str, str]
    tag: str

    def run(self, *words: str) -> str:
        """A bentoml command; its standard output."""
        return subprocess.run(
            [sys.executable, "-m", "bentoml", *words], env=self.environment, cwd=self.folder, check=True,
            capture_output=True, text=True, timeout=120,
        ).stdout  # fmt: skip


def unpack(bento: Path, tag: str, folder: Path) -> Box:
    """Import the file."""
    environment = {name: os.environ[name] for name in KEPT if name in os.environ}
    environment |= {
        "BENTOML_HOME": str(folder / "store"),
        "BENTOML_DO_NOT_TRACK": "True",
        "PYTHONPATH": str(fresh_environment(folder / "hide")),
        "NUMBA_CACHE_DIR": str(folder / "numba"),
    }
    empty = folder / "empty"
    empty.mkdir()
    box = Box(empty, environment, tag)
    box.run("import", str(bento))
    return box


@dataclass
class Served:
    """A running service."""

    port: int
    process: subprocess.Popen[bytes]
    log: Path

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def serve(
    box: Box,
    settings: Mapping[str, str],  # FRAUD_ variables
    host: str | None = None,  # None: what the bento itself says
) -> Served:
    """`bentoml serve`, without waiting for it."""
    port, log = free_port(), box.folder.parent / f"log{len(list(box.folder.parent.glob('log*')))}"
    command = [sys.executable, "-m", "bentoml", "serve", box.tag, "--port", str(port)]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command + (["--host", host] if host else []), env={**box.environment, **settings}, cwd=box.folder,
            stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip
    return Served(port, process, log)


@contextmanager
def serving(box: Box, settings: Mapping[str, str], host: str | None = None) -> Iterator[Served]:
    """A service that is ready, and gone afterwards."""
    served = serve(box, settings, host)

    def is_ready() -> bool:
        assert served.process.poll() is None, served.log.read_text()
        try:
            return ask(served.port, "GET", "/readyz").status == 200
        except OSError:
            return False

    try:
        wait_until(is_ready, f"the service is ready: {served.log}", 120)
        yield served
    finally:
        if served.process.poll() is None:
            served.stop()
