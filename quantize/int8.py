"""INT8: weights and activations of an ONNX graph between explicit QuantizeLinear and DequantizeLinear nodes, by NNCF.

Everything is symmetric: weights per output channel, activations per tensor. Each unrolled step is calibrated by itself,
so the ranges are those of its own time, while the INT8 weights are stored once for all steps.
"""

from __future__ import annotations

import io
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal, get_args

import numpy as np
import onnx
from onnx import numpy_helper

from quantize.layers import plan
from quantize.ranges import watch
from rpfm_edge.core.errors import ArtifactError, ConfigError, ParityError
from rpfm_edge.core.progress import progress
from rpfm_edge.core.signature import Feeds

Weights = Literal["half", "full"]
Activations = Literal["signed", "unsigned"]
Ranges = Literal["mean", "minmax", "percentile", "histogram"]
ROUNDING_DB = 0.05  # accuracy control judges with weights that are not stored in INT8 yet
OUTLIERS = 1e-5  # share of the magnitudes beyond the range, for "percentile"


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
        ranges: estimator of an activation's range. "mean" and "minmax" are the mean and the largest of the samples'
            extremes, "percentile" is the mean of their quantiles beyond which one magnitude in 100,000 lies, all by
            NNCF; "histogram" is the range with the least squared error, of rounding and clipping, by
            ``quantize.ranges``. ``quantize.methods.sweep`` compares them.
        least_psnr_db: NNCF's accuracy control: layers of the frame go back to float, the worst first, until the
            pictures of held-out samples have this PSNR against the float graph's (``quantize.methods``). None is off.
    """

    weights: Weights = "half"
    activations: Activations = "signed"
    smooth_quant_alpha: float | None = None
    ranges: Ranges = "mean"
    least_psnr_db: float | None = None

    def __post_init__(self) -> None:
        known = {"weights": Weights, "activations": Activations, "ranges": Ranges}
        for name, choices in ((name, get_args(kind)) for name, kind in known.items()):
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
        if self.smooth_quant_alpha is not None and self.least_psnr_db is not None:
            raise ConfigError(
                "INT8 options smooth_quant_alpha and least_psnr_db are both given",
                expected="one of them, because NNCF puts weights back that were not smoothed",
                fix="leave one out",
            )


@dataclass(frozen=True, slots=True)
class Control:
    """What NNCF's accuracy control judges by.

    Attributes:
        items: of held-out samples, each whatever ``score`` takes.
        score: of a graph and some items: their mean PSNR in dB, and each one's own.
        least_db: the mean that the quantized graph has to reach.
    """

    items: Sequence[Any]
    score: Callable[[onnx.ModelProto, Iterable[Any]], tuple[float, list[float]]]
    least_db: float

    def margin_db(self, model: onnx.ModelProto, what: str) -> float:
        """How far ``model`` is above the least; ``ParityError`` if it is below."""
        found, _ = self.score(model, self.items)
        if not found + ROUNDING_DB >= self.least_db:
            raise ParityError(
                f"{what} comes to {found:.1f} dB on held-out samples",
                expected=f"at least {self.least_db:g} dB",
                fix="ask for less, or stay with fp16",
            )
        return found - self.least_db


def to_int8(
    model: onnx.ModelProto,
    samples: Iterable[Feeds],
    config: Int8Config | None = None,
    control: Control | None = None,
) -> tuple[onnx.ModelProto, dict[str, int]]:
    """Quantize a "prepare" or "frame" graph (``quantize.layers`` says which of its layers), calibrated on ``samples``.

    Bias correction is off: it changed the drift by 0.1 dB at most and took up to 40 % longer. With ``control`` layers
    of the plan may stay float.

    Returns:
        A new graph with the same inputs and outputs, and how many products of each kind have INT8 on both sides.

    Raises:
        ArtifactError: the graph has not the parts of a student's, or NNCF left a layer of the plan in float.
        ParityError: what ``control`` demands is out of reach.
    """
    config = config or Int8Config()
    layers = plan(model, corrections=True)
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    if config.smooth_quant_alpha is not None:
        _unshare_weights(copy, layers.quantized)
    feeds = list(samples)
    quantized = _run_nncf(copy, feeds, layers.kept, config, control)
    if config.activations == "signed":
        sign_activations(quantized)
    if config.ranges == "histogram":
        _least_error(quantized, feeds)
    _require_symmetric(quantized)
    done = {node.name: node.op_type for node in int8_products(quantized)}
    planned = set(layers.quantized)
    if wrong := sorted(set(done) - planned if control else set(done) ^ planned):
        raise _off_plan(
            f"quantization differs from its plan in {len(wrong)} layers, {wrong[0]} first",
            "all planned layers in INT8, no other",
        )
    onnx.checker.check_model(quantized, full_check=True)
    if control:
        control.margin_db(quantized, "the int8 graph after accuracy control")
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
    model: onnx.ModelProto, samples: list[Feeds], kept: tuple[str, ...], config: Int8Config, control: Control | None
) -> onnx.ModelProto:
    os.environ.setdefault("NNCF_CI", "1")  # otherwise NNCF reports every call to its makers, without asking
    import nncf

    nncf.set_log_level(logging.ERROR)
    passes = 1 if config.smooth_quant_alpha is None else 2
    silent = redirect_stdout(io.StringIO())  # NNCF draws bars of its own, also where nobody watches
    with progress("calibrating", passes * len(samples)) as advance, silent:
        seen = count(1)

        def feed(sample: Feeds) -> dict[str, np.ndarray]:
            advance(next(seen), "")
            return dict(sample)

        dataset = nncf.Dataset(samples, feed)
        common = {
            "preset": nncf.QuantizationPreset.PERFORMANCE,  # symmetric activations; weights are so in any case
            "model_type": nncf.ModelType.TRANSFORMER,
            "subset_size": len(samples),
            "ignored_scope": nncf.IgnoredScope(names=list(kept)),
        }
        quantized: onnx.ModelProto
        if control is None:
            quantized = nncf.quantize(model, dataset, advanced_parameters=_parameters(config), **common)
        else:
            ranking = {"num_ranking_workers": 1, "ranking_subset_size": len(control.items)}
            quantized = nncf.quantize_with_accuracy_control(
                model,
                dataset,
                nncf.Dataset(control.items),
                control.score,
                max_drop=max(control.margin_db(model, "the float frame behind an int8 prepare"), 0.0),
                drop_type=nncf.DropType.ABSOLUTE,
                advanced_quantization_parameters=_parameters(config),
                advanced_accuracy_restorer_parameters=nncf.AdvancedAccuracyRestorerParameters(**ranking),
                **common,
            )
    return quantized


def _parameters(config: Int8Config) -> Any:
    import nncf
    from nncf.quantization import range_estimator as known

    # not QUANTILE, as in NNCF's own set: of a symmetric range that looks at the positive end alone
    quantile = known.StatisticsCollectorParameters(
        known.StatisticsType.ABS_QUANTILE, known.AggregatorType.MEAN, quantile_outlier_prob=OUTLIERS
    )
    estimators = {
        "mean": known.RangeEstimatorParametersSet.MEAN_MINMAX,
        "minmax": known.RangeEstimatorParametersSet.MINMAX,
        "percentile": known.RangeEstimatorParameters(known.RangeEstimatorParametersSet.MINMAX.min, quantile),
        "histogram": known.RangeEstimatorParametersSet.MEAN_MINMAX,  # to begin with
    }
    alpha = -1.0 if config.smooth_quant_alpha is None else config.smooth_quant_alpha
    return nncf.AdvancedQuantizationParameters(
        overflow_fix=nncf.OverflowFix.ENABLE if config.weights == "half" else nncf.OverflowFix.DISABLE,
        disable_bias_correction=True,
        activations_range_estimator_params=estimators[config.ranges],
        smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=alpha, convolution=-1),
    )


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


def sign_activations(model: onnx.ModelProto) -> None:
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


def _least_error(model: onnx.ModelProto, samples: Sequence[Feeds]) -> None:
    """Give every activation the range of the least squared error, as it is in this graph.

    NNCF's own histogram has two ends, and its symmetric quantizers take the upper one, however far the lower is.
    """
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    names = list(dict.fromkeys(node.input[0] for node in nodes))
    seen = watch(model, names, samples, len(samples))
    for node in nodes:
        levels = 127 if tensors[node.input[2]].data_type == onnx.TensorProto.INT8 else 255
        scale = tensors[node.input[1]]
        value = np.array(seen[node.input[0]].range("mse", levels) / levels, np.float32)
        scale.CopyFrom(numpy_helper.from_array(value.reshape(tuple(scale.dims)), scale.name))


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
