"""Which TensorRT is here, and the table of what differs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rpfm_edge.core.errors import BackendError
from runtimes.trt import api
from runtimes.trt import api as trt_api


def enumeration(*names: str) -> Any:
    return SimpleNamespace(__members__=dict.fromkeys(names))


def module(version: str, creation: tuple[str, ...], flags: tuple[str, ...], **more: Any) -> Any:
    """The names by which a version is recognised, as its Python module has them; more of the module is not needed."""
    context = SimpleNamespace(execute_async_v3=None)
    names = {"IExecutionContext": context, "DataType": SimpleNamespace(UINT8=0), "Builder": None, "OnnxParser": None}
    names["HardwareCompatibilityLevel"] = enumeration("NONE", "AMPERE_PLUS")
    networks = {"NetworkDefinitionCreationFlag": enumeration(*creation), "BuilderFlag": enumeration(*flags)}
    return SimpleNamespace(__name__="tensorrt", __version__=version, **names, **networks, **more)


V8 = module("8.6.0", ("EXPLICIT_BATCH", "EXPLICIT_PRECISION"), ("FP16", "INT8", "PREFER_PRECISION_CONSTRAINTS"))
V10 = module("10.3.0", ("EXPLICIT_BATCH", "STRONGLY_TYPED"), ("FP16", "INT8", "PREFER_PRECISION_CONSTRAINTS"))
V11 = module("11.0.0", (), ("REFIT", "TF32"))


@pytest.mark.parametrize(
    ("version", "network_flags", "by_flags"),
    [(V8, ("EXPLICIT_BATCH",), True), (V10, ("STRONGLY_TYPED",), False), (V11, (), False)],
    ids=["8.6", "10.3", "11.0"],
)
def test_the_table(version: Any, network_flags: tuple[str, ...], by_flags: bool) -> None:
    library = api.describe(version)
    assert library.network_flags == network_flags
    assert library.precision_flags == (("FP16", "INT8", "PREFER_PRECISION_CONSTRAINTS") if by_flags else ())
    assert library.parses_opset_20 is not by_flags
    assert library.builds
    assert library.times_tactics
    assert library.targets == {}
    assert library.hardware_levels == ("ampere_plus",)
    assert not library.portable


def test_tensorrt_for_rtx() -> None:
    pytest.importorskip("tensorrt_rtx")
    library = api.load("tensorrt_rtx")
    assert (library.name, library.network_flags, library.precision_flags) == ("tensorrt_rtx", ("STRONGLY_TYPED",), ())
    assert library.builds
    assert library.portable
    assert not library.times_tactics
    assert {"8.6", "8.9", "12.0"} <= set(library.targets)
    assert library.targets["12.0"] == "SM120"
    assert library.hardware_levels == ()


def test_a_runtime_without_a_builder(monkeypatch: pytest.MonkeyPatch) -> None:
    lean = SimpleNamespace(
        __name__="tensorrt_lean",
        __version__="10.3.0",
        IExecutionContext=V10.IExecutionContext,
        DataType=V10.DataType,
    )
    assert not api.describe(lean).builds


def found(monkeypatch: pytest.MonkeyPatch, **modules: Any) -> None:
    """Let exactly these modules be installed."""

    def import_module(name: str) -> Any:
        if isinstance(modules[name], Exception):
            raise modules[name]
        return modules[name]

    monkeypatch.setattr(trt_api, "find_spec", lambda name: name in modules or None)
    monkeypatch.setattr(trt_api, "import_module", import_module)


def test_the_full_library_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    rtx = SimpleNamespace(**vars(V11) | {"__name__": "tensorrt_rtx"})
    found(monkeypatch, tensorrt_rtx=rtx, tensorrt=V10)
    assert api.load().name == "tensorrt"
    assert api.load("tensorrt_rtx").name == "tensorrt_rtx"


@pytest.mark.parametrize(("name", "wanted"), [("auto", "tensorrt or tensorrt_rtx"), ("tensorrt_lean", "tensorrt_lean")])
def test_not_installed(monkeypatch: pytest.MonkeyPatch, name: str, wanted: str) -> None:
    found(monkeypatch)
    with pytest.raises(BackendError, match=f"TensorRT is not installed: expected the package {wanted}; install one"):
        api.load(name)


def test_a_library_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    found(monkeypatch, tensorrt=ImportError("libcudart.so.13: cannot open shared object file"))
    with pytest.raises(BackendError, match=r"tensorrt cannot be imported \(libcudart\.so\.13: cannot open"):
        api.load()


def test_a_library_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    old = SimpleNamespace(__name__="tensorrt", __version__="8.2.1", IExecutionContext=SimpleNamespace())
    found(monkeypatch, tensorrt=old)
    with pytest.raises(BackendError, match=r"tensorrt 8\.2\.1 is too old: expected TensorRT 8\.6 or later; update it"):
        api.load()
