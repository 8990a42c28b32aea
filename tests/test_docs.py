"""The pages: links lead somewhere, commands and options exist, the lists of rooms and options are whole."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from benchmarks.peers import table as peers
from rpfm_edge.cli import app
from rpfm_edge.report import frontier
from scripts import write_reference
from tests.test_rooms import ROWS

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks/README.md"])
MAIN: Any = typer.main.get_command(app)
COMMANDS: dict[str, Any] = MAIN.commands
SCRIPTS = ("scripts/*.py", "benchmarks/**/*.py", "recipes/*.py", "clients/*.py", "deploy/jetson/*.sh")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def options(command: str) -> set[str]:
    return {word for parameter in COMMANDS[command].params for word in (*parameter.opts, *parameter.secondary_opts)}


def commands(text: str) -> Iterator[list[str]]:
    """The words of every ``rpfm-edge`` in code; continued lines joined, comments left out."""
    code = [*FENCE.findall(text), *re.findall(r"`([^`]+)`", FENCE.sub("", text))] if "`" in text else [text]
    for line in "\n".join(code).replace("\\\n", " ").splitlines():
        for found in re.findall(r"(?:^|[\s=])rpfm-edge ([a-z]+\b[^\n|&;`]*)", line):
            yield found.partition(" #")[0].split()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links(page: Path) -> None:
    text = FENCE.sub("", page.read_text())
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not link.startswith("http"):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{link} leads nowhere"
            assert not anchor or anchor in anchors(target), f"{link} has no such heading"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "docs/examples/gate.yml"], ids=name)
def test_commands(page: Path) -> None:
    for command, *words in commands(page.read_text()):
        assert command in COMMANDS, f"rpfm-edge has no {command}"
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert given <= options(command) | {"--help"}, f"rpfm-edge {command} has no {given - options(command)}"


def test_the_reference_is_what_the_code_says() -> None:
    fix = "run: python scripts/write_reference.py"
    assert write_reference.PAGE.read_text(encoding="utf-8") == write_reference.page(), fix


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_tables_of_options_are_of_scripts(page: Path) -> None:
    """Those of rpfm-edge stand in the reference alone."""
    scripts = "\n".join(path.read_text() for pattern in SCRIPTS for path in ROOT.glob(pattern))
    for cell in re.findall(r"^\| (`--[^|]*)\|", page.read_text(), re.MULTILINE):
        for option in re.findall(r"--[\w-]+", cell):
            assert re.search(rf"{option}\b(?!-)", scripts), f"no script has {option}"


def test_every_room_is_listed_in_its_row() -> None:
    block = (ROOT / "CONTRIBUTING.md").read_text().partition("## Rooms")[2].partition("\nBeside")[0]
    listed = re.findall(r"^\| (\d+) \| `([\w/.]+)` \|", block, re.MULTILINE)
    found = [(int(row), Path(place).stem if place.endswith(".py") else place.split("/")[-2]) for row, place in listed]
    rooms = [(number, room) for number, row in enumerate(ROWS, 1) for room in row if not room.startswith("__")]
    assert sorted(found) == sorted(rooms)
    assert all((ROOT / place).exists() for _, place in listed)


@pytest.mark.parametrize("markers", [(frontier.BEGIN, frontier.END), (peers.BEGIN, peers.END)])
def test_the_numbers_have_a_place_for_the_tables(markers: tuple[str, str]) -> None:
    text = (ROOT / "docs/numbers.md").read_text()
    assert frontier.put_between(text, "| new |", *markers).count("| new |") == 1
