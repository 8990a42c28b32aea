"""Where what can be made or fetched again is kept: in the user's cache, never in a bundle."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def cache_root() -> Path:
    """``$RPFM_EDGE_CACHE``, by default ``$XDG_CACHE_HOME/rpfm-edge``, by default ``~/.cache/rpfm-edge``."""
    if root := os.environ.get("RPFM_EDGE_CACHE"):
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rpfm-edge"


def cache_folder(name: str) -> Path | None:
    """The folder ``name`` of ``cache_root``, made if need be, or None where it cannot be written."""
    folder = cache_root() / name
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return folder if os.access(folder, os.W_OK) else None
