"""What a run found out, kept for the next one: nothing is found out twice, as long as nothing has changed."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Result = dict[str, Any]


def code_of(files: Iterable[Path], *more: str) -> str:
    """A name for what was run: results of other code prove nothing."""
    contents = [file.read_bytes() for file in sorted(files)]
    return hashlib.sha256(b"\0".join([*contents, *(each.encode() for each in more)])).hexdigest()[:12]


class Notes:
    """Results, one a line."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __iter__(self) -> Iterator[Result]:
        if self.file.exists():
            yield from map(json.loads, self.file.read_text().splitlines())

    def add(self, result: Result) -> None:
        """Keep a result, at once."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as file:
            file.write(json.dumps(result) + "\n")
