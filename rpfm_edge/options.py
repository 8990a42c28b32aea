"""Options of backends as a command line gives them: BACKEND.NAME=VALUE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rpfm_edge.errors import ConfigError

WORDS = {"true": True, "false": False}


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
        options.setdefault(backend, {})[name] = WORDS.get(text, number)
    return options
