"""FP8 and NVFP4 are refused before any work is done, where nothing computes in them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rpfm_edge.chain import build
from rpfm_edge.core import artifact, precisions
from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.errors import ConfigError
from rpfm_edge.recipe.load import load_recipe


@pytest.mark.parametrize("precision", ["fp8", "nvfp4"])
@pytest.mark.parametrize("backend", ["openvino", "onnxruntime", "torch", "torch-tensorrt"])
def test_backends_that_do_not_compute_in_it(
    tiny_graph: Artifact, precision: str, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = replace(tiny_graph, config={**tiny_graph.config, "precision": precision})
    monkeypatch.setattr(artifact, "load", lambda *arguments, **options: graph)
    words = f"{backend} does not compute in {precision}: expected the backend tensorrt; quantize to int8 or fp16"
    with pytest.raises(ConfigError, match=words):
        build.build(graph.path, tmp_path / "bundle", ["tensorrt", backend])
    assert not list(tmp_path.iterdir())


def test_other_precisions_run_on_all_backends() -> None:
    for precision in ("fp32", "fp16", "int8"):
        precisions.require_backends(precision, ["openvino", "onnxruntime", "tensorrt", "torch"])
        precisions.require_gpus(precision, ["7.5", "8.7"])


@pytest.mark.parametrize(
    ("precision", "capability", "refused"),
    [
        ("fp8", "8.6", True),  # Ampere
        ("fp8", "8.7", True),  # Orin
        ("fp8", "8.9", False),  # Ada
        ("fp8", "11.0", False),  # Thor
        ("nvfp4", "8.9", True),
        ("nvfp4", "9.0", True),  # Hopper
        ("nvfp4", "10.0", False),
        ("nvfp4", "12.0", False),
    ],
)
def test_gpus(precision: str, capability: str, refused: bool) -> None:
    """By NVIDIA's table of what its tensor cores compute in."""
    if not refused:
        return precisions.require_gpus(precision, [capability])
    words = (
        rf"GPUs of compute capability {capability} do not compute in {precision}: expected \d+\.\d or later: .*; quanti"
    )
    with pytest.raises(ConfigError, match=words):
        precisions.require_gpus(precision, ["12.0", capability])


@pytest.mark.parametrize("table", ["precision = 'fp8'\nalso = []", "also = ['fp16', 'fp8']"])
def test_a_recipe_is_refused_when_it_is_read(table: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    text = f"out = 'x'\n[student]\nartifact = 'student:xs'\n[quantize]\n{table}\n[build]\ntargets = ["
    path.write_text(f"{text}'tensorrt', 'openvino']")
    with pytest.raises(ConfigError, match="openvino does not compute in fp8: expected the backend tensorrt"):
        load_recipe(path)
    path.write_text(f"{text}'tensorrt']")
    assert load_recipe(path).build.targets == ("tensorrt",)
