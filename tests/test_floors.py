"""The house: imports point down its floors, and a file stays small enough to read."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = ["parallel", "moe.ops", "moe.model", "moe.train", "moe.serve", "moe.planner", "experiments"]
"""From the ground up: a module imports from its own floor and those before it."""
LINES = 400


def modules() -> list[Path]:
    return [file for folder in ("parallel", "moe", "experiments") for file in sorted((ROOT / folder).rglob("*.py"))]


def floor_of(name: str) -> int | None:
    # A command is an entrance to its package from the top of moe: nothing imports it.
    if name.endswith(".__main__"):
        return FLOORS.index("experiments") - 1
    return next((i for i, floor in enumerate(FLOORS) if name == floor or name.startswith(f"{floor}.")), None)


def imported(file: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: write out the whole name of what is imported"
            found.append(node.module or "")
    return found


@pytest.mark.parametrize("file", modules(), ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_down(file):
    own = floor_of(".".join(file.relative_to(ROOT).with_suffix("").parts))
    for name in imported(file):
        floor = floor_of(name)
        assert floor is None or own is None or floor <= own, f"{file} imports {name} from a floor above"
        assert not name.startswith("tests"), f"{file} imports {name}: the product does not need its tests"


def test_every_module_stands_on_a_floor():
    for file in modules():
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        assert floor_of(name) is not None or name == "moe.__init__", f"{name} stands on no floor"


@pytest.mark.parametrize("file", [*modules(), *sorted((ROOT / "tests").rglob("*.py"))], ids=str)
def test_files_are_small(file):
    assert len(file.read_text("utf-8").splitlines()) <= LINES
