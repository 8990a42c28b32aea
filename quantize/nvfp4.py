"""NVFP4: weights and activations of linear layers as E2M1, in blocks of 16 with an E4M3 scale each and one FP32 scale.

For TensorRT 10.8 and later on GPUs with FP4 tensor cores. TensorRT quantizes activations by an operator of its own, so
a graph comes in two forms: one with that operator, and one that computes the same in plain ONNX, for ONNX Runtime.
Formats and operators: docs.nvidia.com/deeplearning/tensorrt, "Working with quantized types".
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from quantize.float16 import to_float16
from quantize.fp8 import LARGEST as LARGEST_SCALE
from quantize.fp8 import insert, kinds, largest_magnitudes, to_e4m3
from quantize.layers import plan
from quantize.rewire import Made, rewire
from rpfm_edge.core.errors import ArtifactError
from rpfm_edge.core.signature import Feeds

BLOCK = 16
LARGEST = 6  # of E2M1
OPSET = 23  # the first with E2M1
IR_VERSION = 11
OURS = "rpfm"  # domain of the function below

# E2M1 has steps of 1/2 below 2, of 1 below 4 and of 2 up to 6. A block of zeros has a scale of 0, so 1 stands in.
ROUND = f"""<opset_import: ["" : 20], domain: "{OURS}">
RoundToNVFP4 (X, scale) => (Y) {{
    x = Cast <to: int = {TensorProto.FLOAT}> (X)
    split = Constant <value_ints: ints = [0, -1, {BLOCK}]> ()
    blocks = Reshape (x, split)
    last = Constant <value_ints: ints = [-1]> ()
    magnitudes = Abs (blocks)
    largest = ReduceMax <keepdims: int = 1> (magnitudes, last)
    six = Constant <value_float: float = {LARGEST}.0> ()
    ideal = Div (largest, six)
    wanted = Div (ideal, scale)
    most = Constant <value_float: float = {LARGEST_SCALE}.0> ()
    held = Min (wanted, most)
    e4m3 = Cast <to: int = {TensorProto.FLOAT8E4M3FN}> (held)
    rounded = Cast <to: int = {TensorProto.FLOAT}> (e4m3)
    block_scale = Mul (rounded, scale)
    zero = Constant <value_float: float = 0.0> ()
    empty = Equal (block_scale, zero)
    one = Constant <value_float: float = 1.0> ()
    divisor = Where (empty, one, block_scale)
    values = Div (blocks, divisor)
    places = Abs (values)
    half = Constant <value_float: float = 0.5> ()
    two = Constant <value_float: float = 2.0> ()
    four = Constant <value_float: float = 4.0> ()
    small = Less (places, two)
    middle = Less (places, four)
    upper = Where (middle, one, two)
    step = Where (small, half, upper)
    steps = Div (values, step)
    whole = Round (steps)
    unclipped = Mul (whole, step)
    minus_six = Neg (six)
    clipped = Clip (unclipped, minus_six, six)
    dequantized = Mul (clipped, block_scale)
    join = Constant <value_ints: ints = [0, -1]> ()
    y = Reshape (dequantized, join)
    Y = Cast <to: int = {TensorProto.FLOAT16}> (y)
}}"""


@dataclass(frozen=True, slots=True)
class Quantized:
    """Both forms of a graph, and how many products of each kind are FP4 and FP8 in it.

    Attributes:
        plain: in FP16 and FP8, with FP4 by emulation: what ONNX Runtime runs.
        typed: with TensorRT's operator: what engines are built from.
    """

    plain: onnx.ModelProto
    typed: onnx.ModelProto
    fp4: dict[str, int]
    fp8: dict[str, int]


@dataclass(frozen=True, slots=True)
class Blocks:
    """A matrix (N, K): E2M1 values (N, K), E4M3 scales (N, K / 16), and the FP32 scale of these."""

    values: np.ndarray
    scales: np.ndarray
    scale: np.float32

    def dequantized(self) -> np.ndarray:
        """(N, K) float32."""
        steps = self.scales.astype(np.float32) * self.scale
        return self.values.astype(np.float32) * np.repeat(steps, BLOCK, axis=1)


def to_nvfp4(model: onnx.ModelProto, samples: Iterable[Feeds]) -> Quantized:
    """Quantize a "prepare" or "frame" graph, calibrated on ``samples``.

    Of the layers that ``quantize.layers`` plans, the linear ones whose input width is a multiple of 16 become FP4, the
    others, all convolutions among them, FP8.

    Raises:
        ArtifactError: the graph has not the parts of a student's, or no linear layer that FP4 allows.
    """
    layers = plan(model).quantized
    fp4 = fitting(model, layers)
    if not fp4:
        raise ArtifactError(
            "no linear layer has an input width that FP4 allows",
            expected=f"a multiple of {BLOCK}",
            fix="quantize to fp8, or distill a student of another width",
        )
    fp8 = [name for name in layers if name not in fp4]
    ranges = largest_magnitudes(model, samples, layers)
    half = to_float16(insert(model, fp8, ranges))
    return Quantized(_plain(half, fp4, ranges), _typed(half, fp4, ranges), kinds(model, fp4), kinds(model, fp8))


def fitting(model: onnx.ModelProto, products: Collection[str]) -> list[str]:
    """Those of ``products`` that are a Gemm whose input width, the rows of its weights, is a multiple of 16."""
    widths = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    return [
        node.name
        for node in model.graph.node
        if node.name in products
        and node.op_type == "Gemm"
        and widths[node.input[1]][1 if _transposed(node) else 0] % BLOCK == 0
    ]


def to_blocks(matrix: np.ndarray) -> Blocks:
    """Quantize (N, K) along K: the largest value of all becomes 6 × 448, the largest of each block about 6."""
    blocks = matrix.astype(np.float32).reshape(len(matrix), -1, BLOCK)
    largest = np.abs(blocks).max(axis=-1)
    scale = _outer_scale(largest.max())
    scales = to_e4m3(largest / LARGEST / scale)
    steps = scales.astype(np.float32) * scale
    steps[steps == 0] = 1
    values = np.clip(blocks / steps[..., None], -LARGEST, LARGEST).astype(ml_dtypes.float4_e2m1fn)
    return Blocks(values.reshape(matrix.shape), scales, scale)


def _outer_scale(largest: float) -> np.float32:
    return np.float32(largest / (LARGEST * LARGEST_SCALE)) if largest else np.float32(1)


def _typed(half: onnx.ModelProto, products: Collection[str], ranges: Mapping[str, float]) -> onnx.ModelProto:
    """With TensorRT's operator. Each scale is dequantized by the FP32 one, and the FP4 values by what that gives."""

    def factor(node: onnx.NodeProto, place: int, weight: np.ndarray | None) -> Made:
        name, base = node.input[place], f"{node.name}/{'input' if weight is None else 'weight'}"
        values, scales, outer = (f"{name}.{part}" for part in ("fp4", "fp4_scales", "fp4_scale"))
        nodes = []
        if weight is None:
            tensors = [numpy_helper.from_array(_outer_scale(ranges[name]), outer)]
            options = {"axis": -1, "block_size": BLOCK, "scale_type": int(TensorProto.FLOAT8E4M3FN)}
            quantize = helper.make_node(
                "TRT_FP4DynamicQuantize", [name, outer], [values, scales], f"{base}/quantize", domain="trt", **options
            )
            nodes.append(quantize)
        else:
            blocks = to_blocks(weight if _transposed(node) else weight.T)
            parts = {values: blocks.values, scales: blocks.scales, outer: blocks.scale}
            tensors = [numpy_helper.from_array(value, key) for key, value in parts.items()]
        steps, result, exact = f"{name}.fp4_steps", f"{name}.fp4_dequantized", f"{name}.fp4_dequantized32"
        nodes += [
            helper.make_node("DequantizeLinear", [scales, outer], [steps], f"{base}/scales"),
            helper.make_node(
                "DequantizeLinear", [values, steps], [exact], f"{base}/dequantize", axis=-1, block_size=BLOCK
            ),
            helper.make_node("Cast", [exact], [result], f"{base}/cast", to=TensorProto.FLOAT16),
        ]
        return tensors, nodes, result

    return _finish(rewire(half, products, factor), products, "trt")


def _plain(half: onnx.ModelProto, products: Collection[str], ranges: Mapping[str, float]) -> onnx.ModelProto:
    """In plain ONNX: weights that were quantized and dequantized here, activations that are so by a function."""

    def factor(node: onnx.NodeProto, place: int, weight: np.ndarray | None) -> Made:
        name = node.input[place]
        result = f"{name}.fp4_dequantized"
        if weight is not None:
            blocks = to_blocks(weight if _transposed(node) else weight.T)
            return [numpy_helper.from_array(blocks.dequantized().astype(np.float16), result)], [], result
        outer = f"{name}.fp4_scale"
        tensors = [numpy_helper.from_array(_outer_scale(ranges[name]), outer)]
        emulate = helper.make_node("RoundToNVFP4", [name, outer], [result], f"{node.name}/input/round", domain=OURS)
        return tensors, [emulate], result

    plain = rewire(half, products, factor)
    plain.functions.append(onnx.parser.parse_function(ROUND))
    return _finish(plain, products, OURS)


def _finish(model: onnx.ModelProto, products: Collection[str], domain: str) -> onnx.ModelProto:
    """Tell every Gemm that its weights lie as (N, K) now, and the model what it is made of."""
    for node in model.graph.node:
        if node.name in products and not _transposed(node):
            for attribute in [attribute for attribute in node.attribute if attribute.name == "transB"]:
                node.attribute.remove(attribute)
            node.attribute.append(helper.make_attribute("transB", 1))
    if domain == "trt":
        next(entry for entry in model.opset_import if not entry.domain).version = OPSET
        model.ir_version = IR_VERSION
    model.opset_import.append(helper.make_opsetid(domain, 1))
    onnx.checker.check_model(model, full_check=True)
    return model


def _transposed(gemm: onnx.NodeProto) -> bool:
    return any(attribute.name == "transB" and attribute.i for attribute in gemm.attribute)
