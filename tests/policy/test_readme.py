"""README.md against the code: no setting, command or file that is not there."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from fraud_nb.apps.cli import parser
from fraud_nb.domain.config import Settings

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = sorted(
    {line.partition("  #")[0].strip() for line in re.findall(r"^\.venv/bin/fraud (.+)$", README, re.MULTILINE)}
)
PATHS = sorted(set(re.findall(r"`((?:tests|deploy|nbs|docs)/[\w./-]+)`|\]\(([\w./-]+)\)", README)))


def test_every_setting_is_in_the_table() -> None:
    table = set(re.findall(r"`FRAUD_(\w+)`", "".join(re.findall(r"^\| `FRAUD_.*$", README, re.MULTILINE))))
    assert table == {field.name.upper() for field in fields(Settings)}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_understood(command: str) -> None:
    parser().parse_args(shlex.split(command.replace("TRANSACTION_ID", "t-1")))


@pytest.mark.parametrize("path", [one or other for one, other in PATHS])
def test_every_file_is_there(path: str) -> None:
    assert (ROOT / path).exists(), f"README.md names {path}"


def test_every_target_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"(?:^|`|=\S+ )make ([a-z]+)", README, re.MULTILINE))
    assert named <= set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
