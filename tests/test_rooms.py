"""Who may import whom: a file imports its own room and lower rows; inside functions and for type checkers, too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROWS = (
    ("core",),
    ("people",),
    ("measure",),
    ("report", "distill", "quantize", "runtimes"),  # siblings do not know each other
    ("bundle",),
    ("chain", "judge", "live", "doctor"),
    ("search",),
    ("recipe",),
    ("api", "__init__"),
    ("cli",),
    ("__main__",),
)
ROW = {room: number for number, row in enumerate(ROWS) for room in row}
FILES = [
    file for top in ("rpfm_edge", "distill", "quantize", "runtimes") for file in sorted((ROOT / top).rglob("*.py"))
]
MOST_FILES = 7  # directly in rpfm_edge/


def room(module: str) -> str | None:
    """``rpfm_edge.people.pose`` → people, ``quantize.layers`` → quantize; None for libraries."""
    top, *rest = module.split(".")
    if top == "rpfm_edge":
        return rest[0] if rest else "__init__"
    return top if top in ROW else None


def imported(source: str) -> Iterator[str]:
    """Every module that a file imports, wherever the line stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = node.module == "rpfm_edge"  # what is imported is a room, or Pipeline
            yield from (f"rpfm_edge.{alias.name}" if inside else node.module for alias in node.names)


def upward(own: str | None, source: str) -> set[str]:
    """The imports of a file in room ``own`` that do not go down."""
    assert own in ROW, f"the room {own} needs its row"
    return {name for name in imported(source) if (to := room(name)) and to != own and ROW.get(to, 99) >= ROW[own]}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_down(file: Path) -> None:
    parts = file.relative_to(ROOT).with_suffix("").parts
    own = room(".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts))
    assert upward(own, file.read_text(encoding="utf-8")) == set()


def test_few_files_stand_outside_a_room() -> None:
    assert len(list((ROOT / "rpfm_edge").glob("*.py"))) <= MOST_FILES


@pytest.mark.parametrize(
    ("own", "source", "found"),
    [
        ("people", "from rpfm_edge.core.errors import InputError\nimport numpy", set()),
        ("core", "def f():\n    from rpfm_edge.people.pose import flip", {"rpfm_edge.people.pose"}),
        ("quantize", "if TYPE_CHECKING:\n    import distill.train", {"distill.train"}),
        ("measure", "from rpfm_edge import Pipeline", {"rpfm_edge.Pipeline"}),
        ("bundle", "from rpfm_edge import api", {"rpfm_edge.api"}),
    ],
)
def test_the_rule_sees_every_import(own: str, source: str, found: set[str]) -> None:
    assert upward(own, source) == found
