"""The entry point: user faults end in one sentence, and a signal leaves nothing unfinished behind.

Exit codes: 0 good, 1 over the drift budget or slower than allowed, 2 an error, 3 no baseline, 4 unstable, 130
interrupted, 143 terminated.
"""

from __future__ import annotations

import errno
import io
import shutil
import signal
import sys

from rich.console import Console

from rpfm_edge.cli import app
from rpfm_edge.core.errors import RpfmError

SIGNALS = {130: "interrupted", 143: "terminated"}  # exit codes that a shell reports too
FIXES = {errno.ENOSPC: "free some space", errno.EDQUOT: "free some space", errno.EFBIG: "raise the limit of file sizes"}


def main() -> None:
    """Run the command line; user faults end in one sentence and exit code 2."""
    signal.signal(signal.SIGTERM, _terminate)
    if isinstance(sys.stdout, io.TextIOWrapper):  # what an old code page lacks, such as ←, must not end a command
        sys.stdout.reconfigure(errors="replace")
    try:
        app()
    except RpfmError as error:
        _fail(str(error))
    except SystemExit as end:
        if end.code in SIGNALS:
            _fail(f"{SIGNALS[end.code]}; finished stages are kept.", end.code)
        raise
    except shutil.Error as error:  # of a folder: what failed, from where, to where and why
        _, target, why = error.args[0][0]
        _fail(f"{target}: {why}; check the path, its permissions and the free space.")
    except OSError as error:
        fix = FIXES.get(error.errno or 0, "check the path and its permissions")
        culprit = error.filename2 or error.filename or "the disk"  # the second is where a copy goes
        _fail(f"{culprit}: {error.strerror or error}; {fix}.")


def _terminate(*_: object) -> None:
    """End as an interrupt does, so that nothing unfinished stays behind. A second signal must not stop the cleaning up:
    ``timeout`` sends it to the process and to its group."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(143)


def _fail(message: str, code: int = 2) -> None:
    Console(stderr=True).print(f"rpfm-edge: {message}", soft_wrap=True, markup=False, highlight=False)
    sys.exit(code)


if __name__ == "__main__":
    main()
