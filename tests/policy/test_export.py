"""What is exported, and what the exported package must not need."""

import ast
import configparser
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "fraud_nb"
WRITTEN_BY_NBDEV = {"__init__", "_modidx"}
NOTEBOOK_ONLY = {"nbdev", "fastcore", "execnb"}

FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.stem != "_modidx")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def modules_on_disk() -> set[str]:
    relative = (path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py"))
    return {".".join(path.parts) for path in relative if path.name not in WRITTEN_BY_NBDEV}


def modules_of_notebooks() -> list[str]:
    notebooks = (path for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
    found = (re.search(r'"#\s*\|\s*default_exp\s+([\w.]+)', path.read_text(encoding="utf-8")) for path in notebooks)
    return [match[1] for match in found if match]


def imported_packages(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def test_every_module_has_its_notebook() -> None:
    orphans = modules_on_disk() - set(modules_of_notebooks())
    assert not orphans, f"fraud_nb holds {sorted(orphans)}, which no notebook exports; delete the files"


def test_every_notebook_has_its_module() -> None:
    missing = set(modules_of_notebooks()) - modules_on_disk()
    assert not missing, f"fraud_nb lacks {sorted(missing)}; run `make export`"


def test_no_two_notebooks_write_one_module() -> None:
    modules = modules_of_notebooks()
    twice = {module for module in modules if modules.count(module) > 1}
    assert not twice, f"more than one notebook has `#| default_exp` {sorted(twice)}; give each its own module"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_package_runs_without_nbdev(path: Path) -> None:
    unwanted = NOTEBOOK_ONLY & set(imported_packages(path))
    assert not unwanted, f"{name_of(path)}: imports {sorted(unwanted)}; take that import out of the `#| export` cell"


def test_settings_keep_the_tags_of_cells() -> None:
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    keys = settings["DEFAULT"].get("allowed_cell_metadata_keys", "")
    assert "tags" in keys.split(), (
        "settings.ini: needs `allowed_cell_metadata_keys = tags`; without it nbdev_clean strips the `parameters` tag, "
        "and papermill ignores -p without a word"
    )
