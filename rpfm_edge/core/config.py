"""TOML tables read into dataclasses, with errors that name the key."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from math import inf, isfinite
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from rpfm_edge.core.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


T = TypeVar("T")
COUNTS = ("steps", "batch", "trajectories", "targets_per_source", "sources", "autoencoder_batch", "pairs", "runs")
FROM_ZERO = ("seed", "pictures")
AMOUNTS = ("seconds", "autoencoder_seconds", "alignment_seconds", "decoder_seconds", "store_seconds", "lr", "ema")


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no file {path}", expected="a TOML file", fix="check the path") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error})", expected="valid TOML", fix="correct it") from None


def parse(kind: type[T], table: Mapping[str, Any], where: str) -> T:
    """Build the dataclass ``kind`` from a table: unknown keys, missing keys, wrong types, counts below 1, times and
    rates that are not positive, and numbers that are not finite are errors.

    A field ``from_`` is the key ``from``, which Python keeps for itself.
    """
    hints = {name.rstrip("_"): hint for name, hint in get_type_hints(kind).items()}
    known = {f.name.rstrip("_"): f for f in fields(kind)}  # type: ignore[arg-type]
    for key in table:
        if key not in known:
            names = list(known)
            raise ConfigError(f"{where}: unknown key {key!r}", expected=f"one of {names}", fix="check the spelling")
    values = {known[key].name: _value(hints[key], value, where, key) for key, value in table.items()}
    for key, value in table.items():
        _check_range(key, value, where, from_zero="from_zero" in known[key].metadata)
    try:
        return kind(**values)
    except TypeError:
        missing = [key for key in known if key not in table]
        raise ConfigError(f"{where} lacks a key", expected=f"{missing[0]!r}", fix="add it") from None


def _value(hint: Any, value: Any, where: str, key: str) -> Any:
    """A value of a key: a table becomes its dataclass, an array of tables a tuple of them."""
    inner = next((one for one in (hint, *get_args(hint)) if is_dataclass(one)), None)
    if inner and get_origin(hint) is tuple and _fits(tuple[Mapping[str, Any], ...], value):
        rows = enumerate(value, 1)
        return tuple(parse(inner, row, f"{where} [[{key}]] {number}") for number, row in rows)  # type: ignore[arg-type]
    if inner and get_origin(hint) is not tuple and isinstance(value, Mapping):
        return parse(inner, value, f"{where} [{key}]")  # type: ignore[arg-type]
    return _checked(hint, value, f"{where}: {key}")


def _check_range(key: str, value: Any, where: str, from_zero: bool) -> None:
    numbers = value if isinstance(value, list | tuple) else (value,)
    if key in COUNTS and min(numbers, default=0) < 1:
        expected = "at least 1"
    elif key in FROM_ZERO and not 0 <= value < 2**63:  # torch and numpy take no larger seeds
        expected = "0 or more" if value < 0 else "less than 2 ** 63"
    elif key in AMOUNTS and not (0 < value < inf or (from_zero and value == 0)):
        expected = "a finite number" + (", 0 or more" if from_zero else " above 0")
    elif key == "ema" and value >= 1:
        expected = "below 1"
    elif isinstance(value, float) and not isfinite(value):
        expected = "a finite number"
    else:
        return
    shown = f"{value:g}" if isinstance(value, float) else value
    raise ConfigError(f"{where}: {key} = {shown}", expected=expected, fix="correct the value")


def _checked(hint: Any, value: Any, where: str) -> Any:
    if not _fits(hint, value):
        raise ConfigError(f"{where} = {value!r}", expected=_words(hint), fix="correct the value")
    return tuple(value) if isinstance(value, list) else value


def _fits(hint: Any, value: Any) -> bool:
    """Whether a value read from TOML is of a type: lists stand for tuples, integers do for floats, booleans do not."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(one, value) for one in arguments)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        hints = arguments[:1] * len(value) if Ellipsis in arguments and isinstance(value, list | tuple) else arguments
        return (
            isinstance(value, list | tuple)
            and len(value) == len(hints)
            and all(_fits(one, entry) for one, entry in zip(hints, value, strict=True))
        )
    if origin is Mapping:
        return isinstance(value, Mapping)
    return type(value) in ((int, float) if hint is float else (hint,))


def _words(hint: Any) -> str:
    """A type as a reader of TOML knows it."""
    origin, arguments = get_origin(hint), [one for one in get_args(hint) if one is not type(None)]
    if origin in (Union, UnionType):
        return " or ".join(_words(one) for one in arguments)
    if origin is Literal:
        return f"one of {arguments}"
    if origin is tuple:
        kinds = dict.fromkeys(_words(one) for one in arguments if one is not Ellipsis)
        return f"a list{'' if Ellipsis in arguments else f' of {len(arguments)}'}, each {' or '.join(kinds)}"
    names = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}
    return names.get(hint, "a table")


def without_none(changes: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in changes.items() if value is not None}


def parse_options(given: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Backend → name → value. ``true``, ``false`` and integers are taken for what they look like, all else is text;
    the backend checks names and types.

    Raises:
        ConfigError: an entry of another form.
    """
    options: dict[str, dict[str, Any]] = {}
    for entry in given:
        place, equals, text = entry.partition("=")
        backend, dot, name = place.partition(".")
        if not (equals and dot and backend and name):
            raise ConfigError(
                f"option {entry!r}",
                expected="BACKEND.NAME=VALUE, such as tensorrt.workspace_mib=1024",
                fix="correct it",
            )
        number = int(text) if text.removeprefix("-").isdecimal() else text
        options.setdefault(backend, {})[name] = {"true": True, "false": False}.get(text, number)
    return options
