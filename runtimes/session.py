"""What the sessions of all backends share: the same feeds are accepted and refused, with the same errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

import numpy as np

from rpfm_edge.core.errors import ArtifactError, BackendError, RpfmError
from rpfm_edge.core.signature import Feeds, Signature, TensorSpec

Call = Callable[[Feeds], dict[str, np.ndarray]]


class GuardedSession:
    """A ``Session`` over ``call``: feeds are checked first, one run at a time, none once it is closed."""

    def __init__(self, backend: str, signature: Signature, call: Call) -> None:
        self.backend, self.signature = backend, signature
        self._call: Call | None = call
        self._lock = Lock()

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        """Outputs by name, owned by the caller.

        Raises:
            SignatureError: unfit feeds.
            BackendError: the session is closed, or the library fails, for want of memory most of all.
        """
        with self._lock:
            call = self.require_open()
            self.signature.check(feeds)
            try:
                return call(feeds)
            except RpfmError:
                raise
            except Exception as error:  # each library has its own, some without a base class but this one
                raise BackendError(
                    f"{self.backend} failed while it ran ({type(error).__name__}: {_line(error)})",
                    expected="an engine that fits the machine, and enough memory",
                    fix="free some memory, or build the engine again",
                ) from error

    def keep(self, array: np.ndarray) -> np.ndarray:
        """An array equal to ``array``, in the form that this session takes fastest again and again."""
        return array

    def require_open(self) -> Call:
        """What runs the engine; raises ``BackendError`` once closed."""
        if self._call is None:
            raise BackendError(
                f"this {self.backend} session is closed", expected="an open one", fix="run inside its with block"
            )
        return self._call

    def close(self) -> None:
        """Drop the engine, after a run in progress."""
        with self._lock:
            self._call = None


@contextmanager
def guarded(backend: str, signature: Signature, call: Call) -> Iterator[GuardedSession]:
    """A ``GuardedSession`` that is closed on leaving."""
    session = GuardedSession(backend, signature, call)
    try:
        yield session
    finally:
        session.close()


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def require_signature(where: Path, found: Signature, expected: Signature) -> None:
    """Raise ``ArtifactError`` unless the engine at ``where`` has the tensors of the manifest, in any order."""
    for side, ours, theirs in (
        ("inputs", found.inputs, expected.inputs),
        ("outputs", found.outputs, expected.outputs),
    ):
        if set(ours) != set(theirs):
            raise ArtifactError(
                f"{where} has the {side} {_listed(ours)}", expected=_listed(theirs), fix="build the engine again"
            )


def _listed(specs: tuple[TensorSpec, ...]) -> str:
    return ", ".join(f"{spec.name} {spec}" for spec in sorted(specs, key=lambda spec: spec.name)) or "none"
