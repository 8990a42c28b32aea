"""A second Python that answers requests: one JSON line in, one JSON line out; arrays travel in files.

TensorRT and torch may each need an interpreter of their own, and a crash in either must not end the check.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from threading import Timer
from typing import Any

from rpfm_edge.core.errors import RpfmError

Verb = Callable[..., dict[str, Any]]
SCRIPT = Path(__file__).resolve().parents[1] / "gpu_check.py"
SIDES = {"engine": "scripts.gpu_parts.engine_side", "torch": "scripts.gpu_parts.torch_side"}


class OutOfTimeError(Exception):
    """The time limit came before the answer; the process was ended."""


class PartError(Exception):
    """A part could not be measured; the text says why, in one sentence."""


class Worker:
    """The process. ``sides`` are keys of ``SIDES``; what it prints goes to ``log``."""

    def __init__(self, python: str, sides: tuple[str, ...], log: Path, environment: Mapping[str, str]) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [python, str(SCRIPT), "worker", "--sides", *sides]
        with log.open("ab") as stream:
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=stream,
                    text=True,
                    env={**os.environ, **environment},
                    start_new_session=True,  # so that it can be ended together with what it started
                )
            except OSError as error:
                raise PartError(f"{python} cannot be started ({error})") from None

    def ask(self, verb: str, timeout_s: float, **arguments: Any) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            OutOfTimeError: none came in ``timeout_s`` seconds.
            PartError: the request failed, or the process died.
        """
        late: list[bool] = []

        def end() -> None:
            late.append(True)
            self.kill()

        timer = Timer(max(timeout_s, 0.0), end)
        timer.start()
        try:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            with suppress(BrokenPipeError):
                self._process.stdin.write(json.dumps({"verb": verb, **arguments}) + "\n")
                self._process.stdin.flush()
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        if late:
            self._process.wait()
            raise OutOfTimeError
        if not line:
            code, said = self._process.wait(), self.log.read_text(errors="replace").strip().rpartition("\n")[2]
            raise PartError(f"{verb}: the process ended with exit code {code} ({said[:200]}); see {self.log}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PartError(str(answer["error"]))
        return answer

    @property
    def alive(self) -> bool:
        """Whether it can still be asked."""
        return self._process.poll() is None

    def kill(self) -> None:
        """End it and what it started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """End it, give back its pipes."""
        self.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream:
                with suppress(BrokenPipeError):
                    stream.close()


def serve(verbs: Mapping[str, Verb]) -> None:
    """Answer requests until standard input ends. Standard output belongs to the answers; prints go to the log."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = verbs[request.pop("verb")](**request)
        except RpfmError as error:
            answer = {"error": str(error)}
        except Exception as error:  # a library's own: the log has its trace, the evidence its first line
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
