"""Libraries that come with an extra, imported when they are needed."""

from __future__ import annotations

import importlib.util
from typing import Any

from rpfm_edge.core.errors import BackendError


def import_extra(module: str, extra: str) -> Any:
    """Import an optional library; raises ``BackendError`` naming the pip extra that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise missing_extra((error.name or module).partition(".")[0], extra, f" ({error})") from None


def missing_extra(library: str, extra: str, why: str = "") -> BackendError:
    """The refusal of what needs an optional library that is not here."""
    return BackendError(
        f"{library} is not installed{why}", expected=f"the extra {extra}", fix=f"run: pip install 'rpfm-edge[{extra}]'"
    )


def require_module(module: str, extra: str) -> None:
    from importlib.util import find_spec

    if find_spec(module) is None:
        raise missing_extra(module, extra)
