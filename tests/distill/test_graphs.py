"""Graphs of modules: what happens where a tool ends on an assertion, and how near is near."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from distill import graphs
from distill.graphs import write_graph
from rpfm_edge.core.errors import ConfigError, ParityError
from rpfm_edge.core.signature import Signature, TensorSpec

BOUNDARY = Signature((TensorSpec("x", (2, 8), "float32"),), (TensorSpec("y", (2, 4), "float32"),))
FEEDS = {"x": np.linspace(-1, 1, 16, dtype=np.float32).reshape(2, 8)}


class Scaled(nn.Module):
    """A linear layer of constants folded from a power, times ``scale``."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.scale = nn.Linear(8, 4), scale
        self.error = 0.0

    def forward(self, x: Tensor) -> Tensor:
        error = 0.0 if torch.jit.is_tracing() else self.error
        return self.scale * self.layer(x) * torch.full((), 2.0).pow(2) + error


def test_a_graph_that_onnxsim_dies_of_is_folded_by_onnx_runtime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is tried with a Python that aborts."""
    aborts = tmp_path / "python"
    aborts.write_text("#!/bin/sh\nkill -ABRT $$\n")
    aborts.chmod(0o755)
    monkeypatch.setattr(graphs.sys, "executable", str(aborts))
    assert write_graph(Scaled(), BOUNDARY, FEEDS, tmp_path / "y.onnx", guarded=True) < 1e-6
    kinds = [node.op_type for node in onnx.load(tmp_path / "y.onnx").graph.node]
    assert "Pow" not in kinds, "constants are folded"


@pytest.mark.parametrize(("scale", "passes"), [(1.0, False), (1000.0, True)])
def test_what_is_near_depends_on_the_size_of_the_values(scale: float, passes: bool, tmp_path: Path) -> None:
    module = Scaled(scale)
    module.error = 0.01
    if passes:
        assert write_graph(module, BOUNDARY, FEEDS, tmp_path / "y.onnx") < 1e-4
        return
    with pytest.raises(ParityError, match=r"y.onnx differs from torch by 0.0\d* of its largest value"):
        write_graph(module, BOUNDARY, FEEDS, tmp_path / "y.onnx")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_traced_is_named(tmp_path: Path) -> None:
    class Solved(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.lstsq(x.T, x.T).solution @ x[:, :4]

    with pytest.raises(ConfigError, match=r"solved cannot be traced to ONNX .*lstsq"):
        write_graph(Solved(), BOUNDARY, FEEDS, tmp_path / "y.onnx")
