"""Writes docs/reference.md, every option of every command and every key of a recipe, from the code:

python scripts/write_reference.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from rpfm_edge.cli import app
from rpfm_edge.recipe.schema import Recipe

PAGE = Path(__file__).parent.parent / "docs/reference.md"
TOP = """# Reference

Every option of every command, and every key of a recipe. Written by `python scripts/write_reference.py`; what the words
mean stands on the pages of the [README](../README.md#commands). Every command but `live` takes `--json`: it prints one
JSON object as the last line of standard output.
"""
MIDDLE = """## Recipes

Keys of a [recipe](recipes.md), table by table. `[teacher]` is also the TOML file of `train`, which takes `weights`
(`"fp16"`, or `"fp32"`: how they are stored), `cache` and `seed` besides.
"""
TABLES = {"distill": "[[distill]]", "qad": "[qad], if wanted", "frontier": "[frontier], if wanted"}
KEYS = {"options": "BACKEND"}  # keys whose names are the user's choice


def page() -> str:
    """The text of the page."""
    parts = [TOP, "## Commands\n", *map(_command, sorted(_commands().items())), MIDDLE]
    return "\n".join([*parts, *_tables(Recipe, "top level")])


def _commands() -> dict[str, Any]:
    return dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def _command(named: tuple[str, Any]) -> str:
    name, command = named
    text = " ".join(command.help.split())
    return f"### rpfm-edge {name}\n\n{text}\n\n" + _table(
        "Option", (_option(one) for one in command.params if one.name != "json")
    )


def _option(parameter: Any) -> tuple[str, str, str]:
    """Name, default and help of an option or an argument."""
    argument = parameter.param_type_name == "argument"
    name = parameter.name.upper() if argument else parameter.opts[0]
    told, default = _split(parameter.help)
    if parameter.required:
        default = "needed"
    elif parameter.default is not None and not isinstance(parameter.default, bool):
        default = f"`{parameter.default}`"
    return f"`{name}`", default, told


def _tables(kind: Any, title: str) -> Iterator[str]:
    """The table of a dataclass, and after it those of the dataclasses that it holds."""
    hints, rows, inner = get_type_hints(kind, include_extras=True), [], []
    for field in fields(kind):
        kinds = [one for one in (hints[field.name], *get_args(hints[field.name])) if is_dataclass(one)]
        if kinds:
            inner.append((kinds[0], TABLES.get(field.name, f"[{field.name}]")))
        else:
            rows.append(_key(field, hints[field.name]))
    yield f"### Recipe: {title}\n\n" + _table("Key", rows)
    for one, name in inner:
        yield from _tables(one, name)


def _key(field: Any, hint: Any) -> tuple[str, str, str]:
    """Name, default and help of a key; choices of its type stand in the help."""
    if get_origin(hint) is not Annotated:
        raise TypeError(f"{field.name} has no help: write Annotated[…, 'help']")
    kind, text = get_args(hint)[0], next(one for one in get_args(hint)[1:] if isinstance(one, str))
    told, default = _split(text)
    if field.default not in (MISSING, None):
        default = f"`{json.dumps(field.default)}`"
    elif field.default is field.default_factory is MISSING:
        default = "needed"
    choices = ", ".join(map(str, _choices(kind)))
    return f"`{KEYS.get(field.name, field.name.rstrip('_'))}`", default, f"{told}: {choices}" if choices else told


def _choices(kind: Any) -> Iterator[Any]:
    """The words that a type allows, itself or by one of its alternatives."""
    if get_origin(kind) is Literal:
        yield from get_args(kind)
    elif get_origin(kind) is not tuple:
        for one in get_args(kind):
            yield from _choices(one)


def _split(text: str) -> tuple[str, str]:
    """A help text → what it says, and the default that it ends with."""
    told, _, default = re.sub(r"\.$", "", text.replace("\\", "")).partition("; default: ")
    return told, default


def _table(head: str, rows: Iterable[tuple[str, str, str]]) -> str:
    lines = [f"|{head}|Default||", "|---|---|---|", *(f"|{'|'.join(row)}|" for row in rows)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
