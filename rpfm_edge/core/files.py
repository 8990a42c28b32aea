"""Files that survive a kill: written whole or not at all, exchanged in one step, scratch folders swept."""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from rpfm_edge.core.errors import warn

with suppress(ImportError):  # on Windows, where folders cannot be opened either, so that nothing is locked
    import fcntl
SCRATCH = ".rpfm-"  # in the names of scratch folders, before eight random characters
OLD = ".old"  # what an exchange of folders has put aside


def json_digest(value: Any) -> str:
    """sha256 of the canonical JSON of ``value``."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=dict).encode()).hexdigest()


def finite(value: Any) -> Any:
    """JSON knows neither infinity (the PSNR of equal images) nor nan: both become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    return [finite(entry) for entry in value] if isinstance(value, list | tuple) else value


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(stream)


def _digest(stream: Any) -> str:  # Python 3.10 has no hashlib.file_digest
    sha = hashlib.sha256()
    while block := stream.read(1 << 20):
        sha.update(block)
    return sha.hexdigest()


def require_writable(folder: Path) -> None:
    """Make ``folder`` and try to write there: now, not after what is to be kept there was measured."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        error.filename = str(folder)  # instead of the temporary file
        raise


@contextmanager
def scratch_folder(out: Path) -> Iterator[Path]:
    """Yield a folder beside ``out``, for as long as the block lasts.

    What killed processes have left is removed. If one was killed between the two renames of an exchange, what was there
    before is first put back.
    """
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        with _locked(out.parent) as alone:
            if (aside := put_aside(out)) and not out.exists():
                aside[-1].rename(out)
            if alone:
                _sweep(out)
            scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}{SCRATCH}", dir=out.parent))
            stack.callback(shutil.rmtree, scratch, ignore_errors=True)
            scratch.chmod(0o755)
            stack.enter_context(_locked(scratch))
        yield scratch


@contextmanager
def _locked(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of ``folder``, which ends with the process. False if another has it and we do not ``wait``, or if
    there are no locks: on Windows, and on some network file systems. A scratch folder is not waited for: whoever writes
    in it is who has locked it.
    """
    wait = wait and SCRATCH not in folder.name
    with ExitStack() as stack:
        try:
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            held = False
        else:
            held = True
        yield held


def _scratch_folders(out: Path, end: str = "") -> list[Path]:
    return list(out.parent.glob(f".{glob.escape(out.name)}{SCRATCH}{'?' * 8}{end}"))


def put_aside(out: Path) -> list[Path]:
    """What exchanges that were killed between their two renames have left."""
    return _scratch_folders(out.resolve(), OLD)


def _sweep(out: Path) -> None:
    """Remove the scratch folders that no process holds, and what was put aside for an ``out`` that is there."""
    for folder in _scratch_folders(out):
        with _locked(folder, wait=False) as ended:
            if ended:
                shutil.rmtree(folder, ignore_errors=True)
    if (out / "manifest.json").is_file():  # an artifact that the user has, so that what was put aside is not needed
        for folder in put_aside(out):
            shutil.rmtree(folder, ignore_errors=True)


def exchange(scratch: Path, out: Path) -> None:
    """Rename ``scratch`` to ``out``; what was there comes back if that fails, and otherwise is removed with scratch."""
    old = scratch.with_name(scratch.name + OLD)
    with _locked(out.parent):  # nobody takes what is put aside for what a kill has left
        try:
            if out.exists():
                out.rename(old)
            scratch.rename(out)
        except BaseException:  # an interrupt, too
            if old.exists() and not out.exists():
                old.rename(out)
            raise
        if old.exists():
            old.rename(scratch)


def write_text(path: Path, text: str) -> None:
    """``write_bytes`` of UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``path`` aside and rename it into place, so that nobody ever reads half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # containers may share the folder and the pid
    try:
        scratch.write_bytes(data)
        scratch.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not name it
        raise
    finally:
        scratch.unlink(missing_ok=True)


def keep_text(path: Path, text: str) -> None:
    """``write_text`` of a result that is returned as well: what prevents it is said on standard error, and no more."""
    try:
        write_text(path, text)
    except OSError as error:
        warn(f"{path} was not written, so this result is not kept: {error.strerror or error}")
