"""Options of backends on a command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from rpfm_edge import api
from rpfm_edge.artifact import Artifact
from rpfm_edge.errors import ConfigError
from rpfm_edge.options import parse_options


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


def test_options_reach_the_bundle(tiny_graph: Artifact, tmp_path: Path) -> None:
    made = api.build(tiny_graph.path, tmp_path / "bundle", ["onnxruntime"], parse_options(["onnxruntime.threads=1"]))
    assert made.config["backends"]["onnxruntime"]["threads"] == 1
