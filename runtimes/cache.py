"""Where backends keep what they can make again: never in a bundle."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def cache_folder(backend: str) -> Path | None:
    """``$RPFM_EDGE_CACHE/BACKEND`` (default ``~/.cache/rpfm-edge/BACKEND``), or None where it cannot be written."""
    root = os.environ.get("RPFM_EDGE_CACHE") or Path("~/.cache/rpfm-edge").expanduser()
    folder = Path(root) / backend
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return folder if os.access(folder, os.W_OK) else None
