"""Artifacts that ship with the package, by name (``teacher:xs``, ``student:xs``), and the data sample."""

from __future__ import annotations

from pathlib import Path

from rpfm_edge.core.errors import ArtifactError

FOLDER = Path(__file__).parent.parent / "assets"


def shipped() -> dict[str, Path]:
    """Name → folder of every shipped artifact: ``weights/KIND-PRESET`` is named ``KIND:PRESET``."""
    folders = sorted((FOLDER / "weights").glob("*-*"))
    return {folder.name.replace("-", ":", 1): folder for folder in folders if folder.is_dir()}


def resolve(path: str | Path) -> Path:
    """The folder that a path or the name of a shipped artifact stands for."""
    text = str(path)
    names = shipped()
    if text in names:
        return names[text]
    if ":" in text and not Path(text).exists():
        raise ArtifactError(
            f"no shipped artifact {text!r}", expected=f"a path or one of {sorted(names)}", fix="check it"
        )
    return Path(path)
