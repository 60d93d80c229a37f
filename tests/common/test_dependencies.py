"""Which part may import which: deploy → actors | learner → buffer → common."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ALLOWED = {
    "common": set(),
    "buffer": {"common"},
    "actors": {"buffer", "common"},
    "learner": {"buffer", "common"},
    "deploy": {"actors", "buffer", "common", "learner"},
}
ONLY_IN = {
    "ray": {"deploy"},
    "wandb": {"deploy"},
    "transformers": {"actors", "deploy"},
    "redis": {"buffer", "deploy"},
}


def imports(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import does not survive the folder mapping"
            names.append(node.module or "")
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def files(part: str) -> list[Path]:
    found = sorted((ROOT / part).rglob("*.py"))
    assert found
    return found


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_point_one_way(part):
    for path in files(part):
        for name in imports(path):
            head, *rest = name.split(".")
            if head == "mara" and rest:
                assert rest[0] in ALLOWED[part] | {part}, f"{path} imports {name}"
            assert head not in ALLOWED, f"{path} imports {name} without mara"
            assert part in ONLY_IN.get(head, set(ALLOWED)), f"{path} imports {name}"


@pytest.mark.parametrize("part", ALLOWED)
def test_settings_can_be_read_without_torch(part):
    for path in files(part):
        if path.name.endswith("config.py"):
            heavy = {name.split(".")[0] for name in imports(path)} & {"torch", "transformers", "ray", "numpy"}
            assert not heavy, f"{path} imports {heavy}"


def test_nothing_unpickles():
    for part in ALLOWED:
        for path in files(part):
            names = imports(path)
            assert not {"pickle", "cloudpickle", "marshal", "shelve"} & {n.split(".")[0] for n in names}, path
            for call in re.findall(r"torch\.load\([^\n]*", path.read_text()):
                assert "weights_only=True" in call, path
