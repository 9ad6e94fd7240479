"""The style of the notebooks, as far as a machine can hold it."""

import ast
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
NBS = ROOT / "nbs"
# The index is the tens digit of the notebook.
LAYERS = ("domain", "features", "decision", "learning", "adapters", "pipeline", "operations", "apps")
DIRECTIVES = {"default_exp", "export", "hide", "slow", "infra", "eval"}
MAX_EXPORT_LINES = 60
Cell = Mapping[str, Any]

NOTEBOOKS = sorted(path for path in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
GUIDES = [path for path in NOTEBOOKS if NBS / "guides" in path.parents]
JOBS = [path for path in NOTEBOOKS if path.parent == NBS / "jobs"]
NUMBERED = [path for path in NOTEBOOKS if re.match(r"\d\d_", path.name)]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def notebook(path: Path) -> Mapping[str, Any]:
    content: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def text_of(value: str | list[str]) -> str:
    return value if isinstance(value, str) else "".join(value)


def cells(path: Path, kind: str | None = None) -> Iterator[tuple[str, Cell, str]]:
    """Where the cell is (for a message), the cell, and its source."""
    for position, cell in enumerate(notebook(path)["cells"]):
        if kind in (None, cell["cell_type"]):
            where = f"{name_of(path)}, cell {position} (id {cell.get('id', 'none')})"
            yield where, cell, text_of(cell["source"])


def directives(source: str) -> list[str]:
    """Names of the nbdev directives of a code cell."""
    return re.findall(r"^\s*#\s*\|\s*([\w-]+)", source, flags=re.MULTILINE)


def default_exp(path: Path) -> str | None:
    """Module this notebook exports to, such as `features.windows`."""
    for _, _, source in cells(path, "code"):
        found = re.search(r"^\s*#\s*\|\s*default_exp\s+(\S+)", source, flags=re.MULTILINE)
        if found:
            return found[1]
    return None


def python_of(source: str) -> ast.Module:
    """Syntax tree of a code cell; lines for IPython (`%time`, `!ls`) are dropped."""
    return ast.parse(re.sub(r"^[%!].*$", "", source, flags=re.MULTILINE))


def is_luhn_valid(digits: str) -> bool:
    doubled = [sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2]]
    return (sum(doubled) + sum(int(digit) for digit in digits[-1::-2])) % 10 == 0


def card_numbers(text: str) -> list[str]:
    """Runs of 13 to 19 digits, also with spaces or hyphens between, that carry a valid check digit."""
    runs = re.findall(r"(?<![\d.])\d(?:[ -]?\d){12,18}(?![\d.])", text)
    return [run for run in runs if is_luhn_valid(re.sub(r"\D", "", run))]


def output_texts(cell: Cell) -> Iterator[str]:
    """Every text a code cell shows; pictures are left out."""
    for output in cell["outputs"]:
        yield text_of(output.get("text", ""))
        for mime, content in output.get("data", {}).items():
            if mime == "application/json" or mime.endswith("+json"):
                yield json.dumps(content)
            elif mime.startswith("text/"):
                yield text_of(content)


each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS, f"no notebook under {NBS}: these tests would pass on nothing"


@each_notebook
def test_format_has_cell_ids(path: Path) -> None:
    content = notebook(path)
    version = (content["nbformat"], content["nbformat_minor"])
    assert version == (4, 5), f"{name_of(path)}: nbformat is {version}, not 4.5; open and save it in JupyterLab 4"
    ids = [cell.get("id") for cell in content["cells"]]
    assert all(ids), f"{name_of(path)}: a cell has no id, so each export would differ; save it in JupyterLab 4"
    assert len(set(ids)) == len(ids), f"{name_of(path)}: two cells share an id; give the copied cell its own"


@each_notebook
def test_kernel_is_python3(path: Path) -> None:
    kernel = notebook(path)["metadata"].get("kernelspec", {}).get("name")
    assert kernel == "python3", f"{name_of(path)}: kernel is {kernel!r}; choose `python3`, then `make export`"


@each_notebook
def test_opens_with_title_and_subtitle(path: Path) -> None:
    where, cell, source = next(cells(path))
    assert cell["cell_type"] == "markdown", f"{where}: must be markdown, `# Title` and then `> subtitle`"
    assert re.match(r"# \S.*\n+> \S", source), f"{where}: must open with `# Title`, an empty line and `> subtitle`"


@each_notebook
def test_directives_are_known(path: Path) -> None:
    for where, _, source in cells(path, "code"):
        unknown = set(directives(source)) - DIRECTIVES
        assert not unknown, f"{where}: {sorted(unknown)} are not directives used here; take one of {sorted(DIRECTIVES)}"


@each_notebook
def test_export_cells_hold_one_idea(path: Path) -> None:
    for where, _, source in cells(path, "code"):
        lines = len(source.splitlines())
        too_long = "export" in directives(source) and lines > MAX_EXPORT_LINES
        assert not too_long, f"{where}: {lines} lines exported at once, at most {MAX_EXPORT_LINES}; split it by idea"


@each_notebook
def test_no_star_import(path: Path) -> None:
    for where, _, source in cells(path, "code"):
        for node in ast.walk(python_of(source)):
            star = isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names)
            assert not star, f"{where}: star import; name what you use"


@each_notebook
def test_no_error_output(path: Path) -> None:
    for where, cell, _ in cells(path, "code"):
        errors = [output["ename"] for output in cell["outputs"] if output["output_type"] == "error"]
        assert not errors, f"{where}: shows {errors[0]}; repair the cell, or expect the error with `pytest.raises`"


@each_notebook
def test_no_output_names_a_machine(path: Path) -> None:
    for where, cell, _ in cells(path, "code"):
        found = [text for text in output_texts(cell) if re.search(r"(?<![\w.:])/(tmp|home|root|work|Users)/", text)]
        assert not found, f"{where}: the output names a folder of somebody's machine; show less of it"


@each_notebook
def test_no_card_number_in_output(path: Path) -> None:
    for where, cell, _ in cells(path, "code"):
        shown = [number for text in output_texts(cell) for number in card_numbers(text)]
        assert not shown, f"{where}: {len(shown)} outputs look like card numbers; change the example and run it again"


@pytest.mark.parametrize("path", NUMBERED, ids=name_of)
def test_number_is_the_layer(path: Path) -> None:
    module, tens = default_exp(path), int(path.name[0])
    assert module, f"{name_of(path)}: has a number but no `#| default_exp`; add it, or move the notebook to guides/"
    assert tens < len(LAYERS), f"{name_of(path)}: there is no layer {tens}x; see the table in CONTRIBUTING.md"
    layer, _, name = module.partition(".")
    assert layer == LAYERS[tens], f"{name_of(path)}: {tens}x is {LAYERS[tens]}, but it exports to {module}; rename one"
    expected = path.stem[3:]
    assert name == expected, f"{name_of(path)}: exports to {module}, expected {layer}.{expected}; rename one"


def test_jobs_have_one_parameters_cell() -> None:
    for path in JOBS:
        tagged = [where for where, cell, _ in cells(path, "code") if "parameters" in cell["metadata"].get("tags", [])]
        assert len(tagged) == 1, f"{name_of(path)}: {len(tagged)} cells tagged `parameters`; a job has exactly one"


def test_jobs_define_nothing() -> None:
    for where, source in ((where, source) for path in JOBS for where, _, source in cells(path, "code")):
        for node in ast.walk(python_of(source)):
            defines = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            assert not defines, f"{where}: a job defines nothing; move this into a numbered notebook and import it"


@pytest.mark.parametrize("path", GUIDES, ids=name_of)
def test_guides_never_export(path: Path) -> None:
    for where, _, source in cells(path, "code"):
        found = {"default_exp", "export"} & set(directives(source))
        assert not found, f"{where}: a guide exports nothing; move this into a numbered notebook"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("4111 1111 1111 1111", 1),
        ("4111-1111-1111-1112", 0),
        ("id=5500005555555559;", 1),
        ("0.4111111111111111", 0),  # a decimal fraction
        ("123456789012", 0),  # too short
    ],
)
def test_card_numbers_are_told_from_other_digits(text: str, found: int) -> None:
    assert len(card_numbers(text)) == found
