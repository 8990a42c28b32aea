"""The options of a backend: known names, types and values, before anything is compiled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rpfm_edge.errors import ConfigError


def checked(
    backend: str, defaults: Mapping[str, Any], options: Mapping[str, Any], choices: Mapping[str, Sequence[object]]
) -> dict[str, Any]:
    """``options`` over ``defaults``.

    Raises:
        ConfigError: a name that ``defaults`` lacks, a value of another type than the default's, one outside ``choices``
            of that name, or a negative integer.
    """
    for name, value in options.items():
        if name not in defaults:
            raise ConfigError(
                f"unknown {backend} option {name!r}", expected=f"one of {sorted(defaults)}", fix="check the spelling"
            )
        if type(value) is not type(defaults[name]) or (isinstance(value, int) and value < 0):
            kinds = {bool: "true or false", int: "an integer, 0 or more", str: "a string"}
            kind = kinds[type(defaults[name])]
            raise ConfigError(f"{backend} option {name} is {value!r}", expected=kind, fix="give such a value")
        if name in choices and value not in choices[name]:
            allowed = choices[name]
            expected = f"{allowed[0]} to {allowed[-1]}" if isinstance(allowed, range) else f"one of {list(allowed)}"
            raise ConfigError(f"{backend} option {name} is {value!r}", expected=expected, fix="choose one of them")
    return {**defaults, **options}
