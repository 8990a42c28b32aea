"""Pack a data set, or any large file, into pieces that travel one by one, and unpack it where they arrive.

    python scripts/pack.py pack DATA OUT --piece-mb 35     # OUT/manifest.json, OUT/part-000.tar, …
    python scripts/pack.py unpack IN FOLDER                # as often as pieces arrive, in any order

Each piece is a tar file that stands alone. It holds whole files; a file that is larger than a piece is cut. The
manifest has the sha256 of every piece and of every file. Only the standard library is used: nothing is installed yet
where pieces are unpacked.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

MANIFEST, FORMAT = "manifest.json", 1
BLOCK, TRAILER = tarfile.BLOCKSIZE, tarfile.RECORDSIZE  # members are padded to the one, a tar's end to the other
SMALLEST_MB = 0.05


class PackError(Exception):
    """A fault of the user's: problem, what was expected, what to do; the sentence of ``rpfm_edge.core.errors``."""

    def __init__(self, problem: str, *, expected: str, fix: str) -> None:
        super().__init__(f"{problem}: expected {expected}; {fix}.")


@dataclass(frozen=True)
class Segment:
    """``size`` bytes of ``file`` from ``offset``, a member of a piece. ``path`` is the file's name in the data."""

    file: Path
    path: str
    offset: int
    size: int
    whole: bool

    @property
    def member(self) -> str:
        """The name in the tar: the path, and where a cut file's segment begins."""
        return self.path if self.whole else f"{self.path}.from-{self.offset:015d}"

    @property
    def info(self) -> tarfile.TarInfo:
        """The header, without time and owner."""
        info = tarfile.TarInfo(self.member)
        info.size = self.size
        return info

    @property
    def cost(self) -> int:
        """Bytes of a piece: header and padded data."""
        return len(self.info.tobuf(tarfile.PAX_FORMAT)) + -(-self.size // BLOCK) * BLOCK


def pack(source: Path, out: Path, piece_mb: float = 35.0) -> list[Path]:
    """Write the pieces of a folder or a file, none larger than ``piece_mb`` · 10⁶ bytes; returns them, manifest first.

    The same data gives the same bytes: names are sorted, times and owners left out.
    """
    if not SMALLEST_MB <= piece_mb < math.inf:
        raise PackError(f"pieces of {piece_mb:g} MB", expected=f"at least {SMALLEST_MB} MB", fix="allow larger ones")
    if out.is_dir() and any(out.iterdir()):
        raise PackError(f"{out} is not empty", expected="an empty or a new folder", fix="empty it or give another")
    root, files = (source, sorted(source.rglob("*"))) if source.is_dir() else (source.parent, [source])
    if linked := [file for file in files if file.is_symlink() and file.is_dir()]:
        raise PackError(f"{linked[0]} is a link to a folder", expected="folders and files", fix="copy it there")
    files = [file for file in files if file.is_file()]
    if not files:
        raise PackError(f"there are no files in {source}", expected="a folder with files, or a file", fix="check it")
    out.mkdir(parents=True, exist_ok=True)
    limit = int(piece_mb * 1e6)
    pieces, written = {}, []
    for number, segments in enumerate(_fill(root, files, limit)):
        piece = out / f"part-{number:03d}.tar"
        _write_piece(piece, segments)
        members = {s.member: [s.path, s.offset] for s in segments}
        pieces[piece.name] = {"sha256": _digest(piece), "members": members}
        written.append(piece)
    digests = {file.relative_to(root).as_posix(): _digest(file) for file in files}
    _write_json(out / MANIFEST, {"format": FORMAT, "pieces": pieces, "files": digests})
    return [out / MANIFEST, *written]


def _fill(root: Path, files: list[Path], limit: int) -> Iterator[list[Segment]]:
    """The segments of each piece, in order, as many as fit."""
    piece: list[Segment] = []
    left = limit - TRAILER
    for file in files:
        for segment in _segments(file, file.relative_to(root).as_posix(), limit):
            if segment.cost > left and piece:
                yield piece
                piece, left = [], limit - TRAILER
            piece.append(segment)
            left -= segment.cost
    yield piece


def _segments(file: Path, path: str, limit: int) -> Iterator[Segment]:
    size = file.stat().st_size
    whole = Segment(file, path, 0, size, whole=True)
    if whole.cost <= limit - TRAILER:
        yield whole
        return
    step = (limit - TRAILER - Segment(file, path, 0, 0, whole=False).cost) // BLOCK * BLOCK
    for offset in range(0, size, step):
        yield Segment(file, path, offset, min(step, size - offset), whole=False)


def _write_piece(piece: Path, segments: list[Segment]) -> None:
    scratch = piece.with_name(f".{piece.name}")
    with tarfile.open(scratch, "w", format=tarfile.PAX_FORMAT) as tar:
        for segment in segments:
            with segment.file.open("rb") as stream:
                stream.seek(segment.offset)
                tar.addfile(segment.info, stream)
    scratch.replace(piece)


def unpack(source: Path, data: Path) -> list[str]:
    """Unpack the pieces that lie in ``source`` into the folder ``data``; returns the names of those still missing.

    Which pieces are done is kept in ``data.pieces.json`` until all of them are; then every file is verified.
    """
    manifest, place = _read_manifest(source / MANIFEST), data.resolve()
    digest, record = _digest(source / MANIFEST), place.with_name(place.name + ".pieces.json")
    done = set(_read_record(record, digest))
    for name, piece in manifest["pieces"].items():
        if name in done or not (source / name).is_file():
            continue
        if _digest(source / name) != piece["sha256"]:
            raise PackError(
                f"{source / name} is damaged", expected=f"sha256 {piece['sha256'][:12]}…", fix="copy it again"
            )
        _extract(source / name, piece["members"], data)
        done.add(name)
        _write_json(record, {"manifest": digest, "done": sorted(done)})
    missing = sorted(set(manifest["pieces"]) - done)
    if not missing:
        _verify(data, manifest["files"])
        record.unlink(missing_ok=True)
    return missing


def _extract(piece: Path, members: dict[str, list[Any]], data: Path) -> None:
    with tarfile.open(piece) as tar:
        for member, (path, offset) in members.items():
            stream = tar.extractfile(member)
            assert stream is not None, "the sha256 of the piece was right"
            target = data / path
            target.parent.mkdir(parents=True, exist_ok=True)
            cut = member != path
            with target.open("r+b" if cut and target.exists() else "wb") as written:
                written.seek(offset)
                _copy(stream, written)


def _copy(source: Any, target: BinaryIO) -> None:
    while block := source.read(1 << 20):
        target.write(block)


def _verify(data: Path, files: dict[str, str]) -> None:
    for path, digest in files.items():
        if not (data / path).is_file() or _digest(data / path) != digest:
            raise PackError(
                f"{data / path} is not what was packed",
                expected=f"sha256 {digest[:12]}…",
                fix=f"delete it and {data.name}.pieces.json, and unpack every piece again",
            )


def _read_manifest(file: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        paths = [Path(path) for path in manifest["files"]]
        sound = manifest["format"] == FORMAT and manifest["pieces"]
    except FileNotFoundError:
        raise PackError(f"there is no {file}", expected="what pack wrote", fix="copy it beside the pieces") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PackError(f"{file} cannot be read ({error})", expected="what pack wrote", fix="copy it again") from None
    paths += [Path(path) for piece in manifest["pieces"].values() for path, _ in piece["members"].values()]
    if not sound or any(path.is_absolute() or ".." in path.parts for path in paths):
        raise PackError(f"{file} is no manifest", expected=f"one of format {FORMAT}", fix="copy it again")
    return dict(manifest)


def _read_record(record: Path, digest: str) -> list[str]:
    """The pieces that were unpacked earlier, if it was the same data."""
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
        return list(found["done"]) if found["manifest"] == digest else []
    except (OSError, ValueError, KeyError):
        return []


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}")
    scratch.write_text(json.dumps(content, indent=1), encoding="utf-8")
    scratch.replace(path)


def _digest(file: Path) -> str:
    sha = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0: done; 1: pieces are missing; 2: an error, said in one sentence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="a folder or a file → pieces")
    packing.add_argument("source", type=Path, metavar="DATA")
    packing.add_argument("out", type=Path, metavar="OUT")
    packing.add_argument("--piece-mb", type=float, default=35.0, help="largest piece, in 10⁶ bytes")
    unpacking = commands.add_parser("unpack", help="pieces → the files, in FOLDER")
    unpacking.add_argument("source", type=Path, metavar="IN")
    unpacking.add_argument("data", type=Path, metavar="FOLDER")
    options = parser.parse_args(arguments)
    try:
        if options.command == "pack":
            for file in pack(options.source, options.out, options.piece_mb):
                print(f"{file}  {file.stat().st_size / 1e6:.1f} MB")
            return 0
        missing = unpack(options.source, options.data)
    except (PackError, OSError) as error:
        print(f"pack: {error}", file=sys.stderr)
        return 2
    print(f"still missing: {', '.join(missing)}" if missing else f"{options.data} is complete, every sha256 is right")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
