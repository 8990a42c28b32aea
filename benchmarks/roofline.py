"""How much of what a machine can compute a frame uses: operations of the graph over those of a matrix product.

The peak is measured, never taken from a data sheet: four matrix products in a row, of the same type, by the same
backend with the same options. Operations are those of convolutions and matrix products, a multiplication and an
addition each; what else a graph does counts as nothing, so a share of 1 cannot be reached.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import runtimes
from rpfm_edge.core import artifact
from rpfm_edge.core.signature import Signature, TensorSpec
from rpfm_edge.measure import clock

WIDTH, LAYERS = 1024, 4
SCALE = np.float32(1 / 127)


def graph_flops(model: onnx.ModelProto) -> int:
    """Floating-point (or integer) operations of one run: two per multiply-add of every Conv, Gemm and MatMul."""
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    shapes = {tensor.name: list(tensor.dims) for tensor in inferred.graph.initializer}
    for value in (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output):
        shapes.setdefault(value.name, [d.dim_value for d in value.type.tensor_type.shape.dim])
    for node in inferred.graph.node:
        if node.op_type == "Constant":
            shapes[node.output[0]] = list(helper.get_attribute_value(node.attribute[0]).dims)
    return sum(2 * _multiply_adds(node, shapes) for node in inferred.graph.node)


def _multiply_adds(node: onnx.NodeProto, shapes: Mapping[str, list[int]]) -> int:
    if node.op_type == "Conv":  # every output value sums over (input channels / groups) × kernel
        return math.prod(shapes[node.output[0]]) * math.prod(shapes[node.input[1]][1:])
    if node.op_type == "MatMul":
        return math.prod(shapes[node.output[0]]) * shapes[node.input[0]][-1]
    if node.op_type == "Gemm":
        across = next((attribute.i for attribute in node.attribute if attribute.name == "transA"), 0)
        return math.prod(shapes[node.output[0]]) * shapes[node.input[0]][0 if across else 1]
    return 0


def product_graph(precision: str) -> onnx.ModelProto:
    """``LAYERS`` products of square matrices in float32 or float16, or (int8) quantized and dequantized around each."""
    rng = np.random.default_rng(0)
    weights = [rng.uniform(-1, 1, (WIDTH, WIDTH)).astype(np.float32) / WIDTH**0.5 for _ in range(LAYERS)]
    nodes, constants, tensor = [], [], "x"
    if precision == "fp16":
        weights, tensor = [weight.astype(np.float16) for weight in weights], "x16"
        nodes.append(helper.make_node("Cast", ["x"], [tensor], "narrow", to=TensorProto.FLOAT16))
    if precision == "int8":
        constants += [numpy_helper.from_array(SCALE, "scale"), numpy_helper.from_array(np.int8(0), "zero")]
    for k, weight in enumerate(weights):
        factor = f"w{k}"
        if precision == "int8":
            constants.append(numpy_helper.from_array(np.rint(weight / SCALE).clip(-127, 127).astype(np.int8), f"q{k}"))
            nodes += [
                helper.make_node("DequantizeLinear", [f"q{k}", "scale", "zero"], [factor], f"dw{k}"),
                helper.make_node("QuantizeLinear", [tensor, "scale", "zero"], [f"a{k}"], f"qa{k}"),
                helper.make_node("DequantizeLinear", [f"a{k}", "scale", "zero"], [f"f{k}"], f"da{k}"),
            ]
            tensor = f"f{k}"
        else:
            constants.append(numpy_helper.from_array(weight, factor))
        nodes.append(helper.make_node("MatMul", [tensor, factor], [f"y{k}"], f"m{k}"))
        tensor = f"y{k}"
    nodes.append(helper.make_node("Cast", [tensor], ["y"], "widen", to=TensorProto.FLOAT))
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, (WIDTH, WIDTH)) for n in "xy")
    graph = helper.make_graph(nodes, "products", [x], [y], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def peak_flops(backend: str, precision: str, options: Mapping[str, Any], runs: int = 12) -> float:
    """Operations per second that ``backend`` reaches in products of ``WIDTH`` × ``WIDTH``: the best of ``runs``."""
    x = np.random.default_rng(1).uniform(-1, 1, (WIDTH, WIDTH)).astype(np.float32)
    if backend == "torch":
        return _torch_peak(x, options, runs)
    model = product_graph(precision)
    signature = Signature(*((TensorSpec(name, (WIDTH, WIDTH), "float32"),) for name in "xy"))
    runtime = runtimes.load(backend)
    with TemporaryDirectory() as folder:
        with artifact.replacing_folder(Path(folder) / "graph", "graph") as made:
            onnx.save(model, made / "frame.onnx")
            artifact.seal(made, "graph", {"precision": precision}, {"frame": signature}, ())
        engine = Path(folder) / "engine"
        engine.mkdir()
        runtime.build(artifact.load(Path(folder) / "graph", "graph"), "frame", engine, options)
        with runtime.open(engine, signature, options) as session:
            times = clock.measure(lambda: session.run({"x": x}), warmup=3, min_runs=runs, min_seconds=0)
    return graph_flops(model) / min(times.values_s)


def _torch_peak(x: np.ndarray, options: Mapping[str, Any], runs: int) -> float:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(int(options.get("threads", 0)) or before)
    try:
        a = torch.from_numpy(x)
        times = clock.measure(lambda: a @ a, warmup=3, min_runs=LAYERS * runs, min_seconds=0)
    finally:
        torch.set_num_threads(before)
    return 2 * WIDTH**3 / min(times.values_s)
