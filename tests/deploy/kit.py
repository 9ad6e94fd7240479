"""What the files say that bring the system up: read as their tools read them, and compared with the code."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fraud_nb.apps.cli import parser

ROOT = Path(__file__).parents[2]
OURS = {"fraud-nb": "worker", "fraud-nb-bento": "bento"}  # image: its stage of the Dockerfile
SECRET = re.compile(r"PASSWORD|SECRET|TOKEN|KEY|AUTH$")  # in the name of a variable
Document = dict[str, Any]


def documents(path: Path) -> list[Document]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def compose() -> Document:
    """docker-compose.yml as it is written, with its anchors resolved."""
    return documents(ROOT / "docker-compose.yml")[0]


def interpolated(value: Any, variables: Mapping[str, str]) -> Any:
    """What Compose makes of ${NAME:?remedy}, ${NAME:-default} and $$."""
    if isinstance(value, Mapping):
        return {key: interpolated(each, variables) for key, each in value.items()}
    if isinstance(value, list):
        return [interpolated(each, variables) for each in value]
    if not isinstance(value, str):
        return value

    def put(found: re.Match[str]) -> str:
        if found[0] == "$$":
            return "$"
        given = variables.get(found["name"], "")
        if not given and found["how"] == ":?":
            raise KeyError(f"{found['name']}: {found['text']}")
        return given or (found["text"] if found["how"] == ":-" else "")

    return re.sub(r"\$\$|\$\{(?P<name>\w+)(?P<how>:\?|:-)(?P<text>[^}]*)\}", put, value)


def example_variables() -> dict[str, str]:
    """The variables of deploy/compose/example.env, with what it holds for each."""
    lines = (ROOT / "deploy/compose/example.env").read_text(encoding="utf-8").splitlines()
    return dict(line.partition("=")[::2] for line in lines if line and not line.startswith("#"))


def filled_in() -> dict[str, str]:
    """The same as its command fills it in."""
    return {name: f"{number:048x}" for number, name in enumerate(example_variables(), 10**20)}


def started(filled: Mapping[str, str]) -> dict[str, Document]:
    """The services of docker-compose.yml with these variables."""
    services: dict[str, Document] = interpolated(compose()["services"], filled)
    return services


def repository_of(image: str) -> str:
    return image.partition(":")[0]


def manifests() -> list[Document]:
    """Everything in deploy/kubernetes but the kustomization."""
    folder = ROOT / "deploy/kubernetes"
    return [each for path in sorted(folder.glob("*.yaml")) for each in documents(path) if path.stem != "kustomization"]


def pod_of(manifest: Document) -> Document | None:
    """The template of its pods, where it has any."""
    spec = manifest.get("spec", {})
    if manifest["kind"] == "CronJob":
        spec = spec["jobTemplate"]["spec"]
    template: Document | None = spec.get("template")
    return template


def check_command(words: Sequence[str]) -> None:
    """Fails where the command line does not know the command, or one of its options."""
    try:
        parser().parse_args(list(words))
    except SystemExit as left:
        raise AssertionError(f"fraud {' '.join(words)}: not understood; see fraud --help") from left
