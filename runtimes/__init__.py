"""Graph → engine → session, one file per backend; nothing heavy is imported until ``load``."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from typing import TYPE_CHECKING, cast

from rpfm_edge.core.backends import BACKENDS
from rpfm_edge.core.errors import BackendError
from rpfm_edge.core.runtime import Runtime

if TYPE_CHECKING:
    from runtimes import ort, ov, torch_reference, torch_trt
    from runtimes.trt import backend as trt

    _RUNTIMES: tuple[Runtime, ...] = (ov, ort, trt, torch_trt, torch_reference)  # modules, which mypy holds to Runtime


def load(name: str) -> Runtime:
    """The backend ``name``; raises ``BackendError`` if it is unknown, not installed or cannot be imported."""
    if name not in BACKENDS:
        raise BackendError(f"unknown backend {name!r}", expected=f"one of {sorted(BACKENDS)}", fix="check the spelling")
    backend = BACKENDS[name]
    library = next((library for library in backend.libraries if find_spec(library)), None)
    if library is None:
        install, needs = f"run: pip install 'rpfm-edge[{backend.extra}]'", " or ".join(backend.libraries)
        raise BackendError(f"backend {name} is not installed", expected=f"the package {needs}", fix=install)
    try:
        return cast(Runtime, import_module(backend.module))
    except Exception as error:  # a broken library fails in any way: by what it lacks, or by what it checks itself
        raise BackendError(
            f"backend {name} cannot be imported ({error})",
            expected=f"a working package {library}",
            fix=f"reinstall it: pip install --force-reinstall {_distribution(library)}",
        ) from error


def _distribution(library: str) -> str:
    """What pip calls the package ``library``, such as onnxruntime-gpu."""
    return packages_distributions().get(library, [library])[0]


def why_not(name: str) -> str | None:
    """None if the backend ``name`` is usable, or else why not and what to do."""
    try:
        load(name)
    except BackendError as error:
        return str(error)
    return None


def available() -> dict[str, str | None]:
    """Every backend → None if it is usable, or else why not and what to do."""
    return {name: why_not(name) for name in BACKENDS}
