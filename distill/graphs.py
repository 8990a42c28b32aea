"""A torch module as an ONNX graph: traced, simplified, and compared with torch before it is kept."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rpfm_edge.core.errors import ConfigError, ParityError
from rpfm_edge.core.signature import Signature

OPSET = 20
TOLERANCE = 1e-4  # of FP32: of the largest value of an output, or of 1 if all are smaller


def write_graph(
    module: nn.Module, signature: Signature, feeds: dict[str, np.ndarray], path: Path, guarded: bool = False
) -> float:
    """Export, simplify, compare with torch on ``feeds`` and write; returns the largest deviation (``TOLERANCE``).

    A module may return a second tensor, its result before rounding: only that one shows how near the graph is, so it is
    compared too, and left out of the file. ``guarded``: see ``simplified``.

    Raises:
        ConfigError: the module cannot be traced.
        ParityError: the graph and torch disagree.
    """
    import onnx

    model = simplified(module, signature, guarded)
    deviation = max_deviation(module, model, feeds)
    if not deviation <= TOLERANCE:  # nan must not pass
        raise ParityError(
            f"{path.name} differs from torch by {deviation:.2g} of its largest value",
            expected=f"at most {TOLERANCE:g}",
            fix="check the versions of torch, onnx and onnxsim (rpfm-edge doctor)",
        )
    del model.graph.output[len(signature.outputs) :]
    onnx.save(model, path)
    return deviation


def simplified(module: nn.Module, signature: Signature, guarded: bool = False) -> Any:
    """The ONNX model of ``module`` after onnxsim, inputs and outputs named by the signature.

    ``guarded``: onnxsim works in a process of its own, since there are graphs of transformers at which it ends on a
    failed assertion. Then ONNX Runtime folds their constants.
    """
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        traced, simple = Path(folder) / "traced.onnx", Path(folder) / "simple.onnx"
        _trace(module, signature, traced)
        if guarded:
            command = [sys.executable, "-m", "distill.graphs", str(traced), str(simple)]
            if subprocess.run(command, capture_output=True, check=False).returncode:
                simple.unlink(missing_ok=True)
                _fold(traced, simple)
        else:
            with quiet():
                simplify(traced, simple)
        return onnx.load(simple)


def simplify(traced: Path, simple: Path) -> None:
    """By onnxsim, but for a fusion that makes an operator of ONNX Runtime alone."""
    import onnx
    import onnxsim

    model, valid = onnxsim.simplify(onnx.load(traced), skipped_optimizers=["fuse_attention"])
    if not valid:
        raise ParityError(
            "onnxsim changed what the graph computes", expected="the same results", fix="use the pinned onnxsim version"
        )
    onnx.save(model, simple)


def _trace(module: nn.Module, signature: Signature, path: Path) -> None:
    example = tuple(torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in signature.inputs)
    with warnings.catch_warnings(), traceable(type(module).__name__.lower()):
        warnings.simplefilter("ignore")  # tracing is deprecated, but eight times as fast for the same graph
        torch.onnx.export(
            module.eval(),
            example,
            path,
            input_names=[spec.name for spec in signature.inputs],
            output_names=[spec.name for spec in signature.outputs],
            opset_version=OPSET,
            dynamo=False,
        )


def _fold(traced: Path, simple: Path) -> None:
    """What of onnxsim's work quantization needs: constants folded, no-ops gone."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    settings.optimized_model_filepath = str(simple)
    settings.log_severity_level = 3
    onnxruntime.InferenceSession(traced, settings, providers=["CPUExecutionProvider"])


@contextmanager
def traceable(graph: str) -> Iterator[None]:
    """Say in one sentence what of a network cannot be traced; torch's fused transformer layers never can."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    except (torch.onnx.errors.OnnxExporterError, torch.jit.TracingCheckError, RuntimeError) as error:
        raise ConfigError(
            f"{graph} cannot be traced to ONNX ({str(error).strip().splitlines()[0][:200]})",
            expected="operations that torch.onnx.export knows, and no decisions by a tensor's values",
            fix="replace the operation in the network, source or pose that it is in",
        ) from None
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def max_deviation(module: nn.Module, model: Any, feeds: dict[str, np.ndarray]) -> float:
    """How far the float outputs of torch and of ONNX Runtime are apart on ``feeds``, each in shares of its largest
    value, or of 1."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        result = module.eval()(*(torch.from_numpy(value) for value in feeds.values()))
    expected = result if isinstance(result, tuple) else (result,)
    pairs = zip(session.run(None, feeds), expected, strict=True)
    return max(
        float(np.abs(got - want.numpy()).max()) / max(1.0, float(want.abs().max()))
        for got, want in pairs
        if want.is_floating_point()
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Send what C++ code writes to standard error to nowhere: onnxsim reports every node that it may not fold."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


if __name__ == "__main__":
    simplify(*map(Path, sys.argv[1:]))
