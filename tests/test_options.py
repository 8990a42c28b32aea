"""Options of backends on a command line."""

from __future__ import annotations

from pathlib import Path

import pytest

import runtimes
from rpfm_edge import api
from rpfm_edge.chain import build
from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.config import parse_options
from rpfm_edge.core.errors import BackendError, ConfigError


def test_types_and_backends() -> None:
    given = ["tensorrt.workspace_mib=1024", "tensorrt.cuda_graph=false", "openvino.hint=LATENCY", "tensorrt.x=-1"]
    assert parse_options(given) == {
        "tensorrt": {"workspace_mib": 1024, "cuda_graph": False, "x": -1},
        "openvino": {"hint": "LATENCY"},
    }
    assert parse_options(["tensorrt.compute_capability=8.6"]) == {"tensorrt": {"compute_capability": "8.6"}}


@pytest.mark.parametrize("entry", ["tensorrt", "workspace_mib=1", "tensorrt.=1", ".x=1", "tensorrt.x"])
def test_another_form(entry: str) -> None:
    with pytest.raises(ConfigError, match=r"option .*: expected BACKEND\.NAME=VALUE, such as tensorrt\.workspace_mib"):
        parse_options([entry])


def test_options_of_a_backend_that_is_no_target(tiny_graph: Artifact, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="options of 'openvino', which is no target: expected one of"):
        api.build(tiny_graph.path, tmp_path / "bundle", ["onnxruntime"], {"openvino": {"threads": 1}})
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("target", "options", "error"),
    [
        ("openvino", ["openvino.bogus=1"], ConfigError),
        ("openvino", ["openvino.threads=99999999999999999999"], ConfigError),
        ("bogus", [], BackendError),
    ],
)
def test_nothing_is_compiled_before_all_is_checked(
    tiny_graph: Artifact,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    options: list[str],
    error: type[Exception],
) -> None:
    compiled: list[object] = []
    monkeypatch.setattr(runtimes.load("onnxruntime"), "build", lambda *given: compiled.append(given))
    monkeypatch.setattr(build, "record", compiled.append)
    with pytest.raises(error, match=r"bogus|threads"):
        api.build(tiny_graph.path, tmp_path / "bundle", ["onnxruntime", target], parse_options(options))
    assert not compiled


def test_options_reach_the_bundle(tiny_graph: Artifact, tmp_path: Path) -> None:
    made = api.build(tiny_graph.path, tmp_path / "bundle", ["onnxruntime"], parse_options(["onnxruntime.threads=1"]))
    assert made.config["backends"]["onnxruntime"]["threads"] == 1
