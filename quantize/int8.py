"""INT8: weights and activations of an ONNX graph between explicit QuantizeLinear and DequantizeLinear nodes, by NNCF.

Everything is symmetric: weights per output channel, activations per tensor. Each unrolled step is calibrated by itself,
so the ranges are those of its own time, while the INT8 weights are stored once for all steps.
"""

from __future__ import annotations

import io
import logging
import os
from collections import Counter
from collections.abc import Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass
from itertools import count
from typing import Literal, get_args

import numpy as np
import onnx
from onnx import numpy_helper

from quantize.layers import plan
from rpfm_edge.errors import ArtifactError, ConfigError
from rpfm_edge.progress import progress
from rpfm_edge.signature import Feeds

Weights = Literal["half", "full"]
Activations = Literal["signed", "unsigned"]


@dataclass(frozen=True, slots=True)
class Int8Config:
    """How a graph is quantized. The defaults give one graph that is right on every CPU and that TensorRT takes too.

    Attributes:
        weights: "half" keeps weights in [-64, 64]. CPUs without VNNI add products of bytes in 16 bits, which overflow
            with the "full" range: a transformer on OpenVINO was off by 12 % with it there, by 2 % without. Half costs
            one bit of the weights (about 1 dB) and no time. Use "full" for graphs that run on VNNI or a GPU only.
        activations: "signed" is all that TensorRT accepts. "unsigned" spends the sign bit of what follows a ReLU on
            precision (about 1.5 dB), and ONNX Runtime is a sixth faster with it; OpenVINO is as fast with either.
        smooth_quant_alpha: 0 to 1 moves outliers of the activations into the weights (SmoothQuant, arXiv 2211.10438),
            each step by its own scales and its own copy of the weights: 0.1 dB better, three times as large with four
            steps. None is off.
    """

    weights: Weights = "half"
    activations: Activations = "signed"
    smooth_quant_alpha: float | None = None

    def __post_init__(self) -> None:
        for name, choices in (("weights", get_args(Weights)), ("activations", get_args(Activations))):
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"INT8 option {name} is {getattr(self, name)!r}",
                    expected=f"one of {choices}",
                    fix="choose one of them",
                )
        if self.smooth_quant_alpha is not None and not 0 <= self.smooth_quant_alpha <= 1:
            raise ConfigError(
                f"INT8 option smooth_quant_alpha is {self.smooth_quant_alpha}",
                expected="0 to 1, or none",
                fix="change it",
            )


def to_int8(
    model: onnx.ModelProto, samples: Iterable[Feeds], config: Int8Config | None = None
) -> tuple[onnx.ModelProto, dict[str, int]]:
    """Quantize a "prepare" or "frame" graph (``quantize.layers`` says which of its layers), calibrated on ``samples``.

    Bias correction is off: it changed the drift by 0.1 dB at most and took up to 40 % longer. The range of an
    activation is NNCF's default, the mean of the samples' extremes, which was 0.6 dB better than the extremes of all.

    Returns:
        A new graph with the same inputs and outputs, and how many products of each kind have INT8 on both sides.

    Raises:
        ArtifactError: the graph has not the parts of a student's, or NNCF left a layer of the plan in float.
    """
    config = config or Int8Config()
    layers = plan(model)
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    if config.smooth_quant_alpha is not None:
        _unshare_weights(copy, layers.quantized)
    quantized = _run_nncf(copy, list(samples), layers.kept, config)
    if config.activations == "signed":
        _sign_activations(quantized)
    _require_symmetric(quantized)
    done = {node.name: node.op_type for node in int8_products(quantized)}
    if wrong := sorted(set(done) ^ set(layers.quantized)):
        raise _off_plan(
            f"quantization differs from its plan in {len(wrong)} layers, {wrong[0]} first",
            "all planned layers in INT8, no other",
        )
    onnx.checker.check_model(quantized, full_check=True)
    return quantized, dict(sorted(Counter(done.values()).items()))


def int8_products(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The Conv, Gemm and MatMul nodes whose both factors come from a DequantizeLinear, at most reshaped on the way."""
    dequantized: set[str] = set()
    found = []
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" or (
            node.op_type in ("Reshape", "Transpose", "DepthToSpace") and node.input[0] in dequantized
        ):
            dequantized.update(node.output)
        elif node.op_type in ("Conv", "Gemm", "MatMul") and dequantized.issuperset(node.input[:2]):
            found.append(node)
    return found


def _run_nncf(
    model: onnx.ModelProto, samples: list[Feeds], kept: tuple[str, ...], config: Int8Config
) -> onnx.ModelProto:
    os.environ.setdefault("NNCF_CI", "1")  # otherwise NNCF reports every call to its makers, without asking
    import nncf

    alpha = -1.0 if config.smooth_quant_alpha is None else config.smooth_quant_alpha
    advanced = nncf.AdvancedQuantizationParameters(
        overflow_fix=nncf.OverflowFix.ENABLE if config.weights == "half" else nncf.OverflowFix.DISABLE,
        disable_bias_correction=True,
        smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=alpha, convolution=-1),
    )
    nncf.set_log_level(logging.ERROR)
    passes = 1 if config.smooth_quant_alpha is None else 2
    silent = redirect_stdout(io.StringIO())  # NNCF draws bars of its own, also where nobody watches
    with progress("calibrating", passes * len(samples)) as advance, silent:
        seen = count(1)

        def feed(sample: Feeds) -> dict[str, np.ndarray]:
            advance(next(seen), "")
            return dict(sample)

        quantized: onnx.ModelProto = nncf.quantize(
            model,
            nncf.Dataset(samples, feed),
            preset=nncf.QuantizationPreset.PERFORMANCE,  # symmetric activations; weights are so in any case
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(samples),
            ignored_scope=nncf.IgnoredScope(names=list(kept)),
            advanced_parameters=advanced,
        )
    return quantized


def _unshare_weights(model: onnx.ModelProto, layers: Iterable[str]) -> None:
    """Give every layer its own copy of its weights: NNCF does not smooth what several layers share."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    wanted, taken = set(layers), set()
    for node in model.graph.node:
        for place, name in enumerate(node.input[:2]):
            if node.name in wanted and name in tensors and name in taken:
                own = model.graph.initializer.add()
                own.CopyFrom(tensors[name])
                own.name = node.input[place] = f"{name}.{node.name}"
            taken.add(name)


def _sign_activations(model: onnx.ModelProto) -> None:
    """Turn UINT8 quantizers, which NNCF gives to what is never negative, into INT8 ones of the same range."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" and tensors[node.input[2]].data_type == onnx.TensorProto.UINT8:
            scale, zero = tensors[node.input[1]], tensors[node.input[2]]
            wider = numpy_helper.to_array(scale) * np.float32(255 / 127)
            scale.CopyFrom(numpy_helper.from_array(wider, scale.name))
            zero.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(zero).astype(np.int8), zero.name))
    stale = [value for value in model.graph.value_info if value.type.tensor_type.elem_type == onnx.TensorProto.UINT8]
    for value in stale:
        model.graph.value_info.remove(value)


def _require_symmetric(model: onnx.ModelProto) -> None:
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if (
            node.op_type in ("QuantizeLinear", "DequantizeLinear")
            and numpy_helper.to_array(tensors[node.input[2]]).any()
        ):
            raise _off_plan(f"{node.name} has a zero point", "symmetric quantization")


def _off_plan(problem: str, expected: str) -> ArtifactError:
    return ArtifactError(problem, expected=expected, fix="use the pinned version of nncf (see constraints.txt)")
