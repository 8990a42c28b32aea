"""The options of a backend: known names, types and values, before anything is compiled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rpfm_edge.core.errors import ConfigError

LARGEST = 2**31 - 1  # what every library takes for an integer
THREADS = range(1025)  # 0: as many as the library likes; with far more the process dies


def checked(
    backend: str, defaults: Mapping[str, Any], options: Mapping[str, Any], choices: Mapping[str, Sequence[object]]
) -> dict[str, Any]:
    """``options`` over ``defaults``.

    Raises:
        ConfigError: a name that ``defaults`` lacks, a value of another type than the default's, one outside ``choices``
            of that name, or an integer that is negative or above ``LARGEST``.
    """
    for name, value in options.items():
        if name not in defaults:
            raise ConfigError(
                f"unknown {backend} option {name!r}", expected=f"one of {sorted(defaults)}", fix="check the spelling"
            )
        kind = type(defaults[name])
        allowed = choices.get(name, range(LARGEST + 1) if kind is int else None)
        if type(value) is not kind or (allowed is not None and value not in allowed):
            raise ConfigError(
                f"{backend} option {name} is {value!r}", expected=_expected(kind, allowed), fix="give such a value"
            )
    return {**defaults, **options}


def _expected(kind: type, allowed: Sequence[object] | None) -> str:
    if isinstance(allowed, range):
        return f"an integer, {allowed[0]} to {allowed[-1]}"
    return f"one of {list(allowed)}" if allowed else {bool: "true or false", str: "a string"}[kind]
