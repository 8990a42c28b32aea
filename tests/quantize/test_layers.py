"""The rule for what stays float, against the names of the student's modules, which the rule itself never reads."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from quantize.layers import PRODUCTS, plan
from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.errors import ArtifactError
from tests.conftest import TINY_STEPS


def modules(graph: Artifact, name: str) -> tuple[Counter[str], Counter[str]]:
    """How often each module of the student is quantized and kept; products without weights count as "attention"."""
    model = onnx.load(graph.file(f"{name}.onnx"))
    biases = {tensor.name for tensor in model.graph.initializer if tensor.name.endswith(".bias")}
    found = plan(model, corrections=True)
    module = {
        node.name: next(
            (t.removesuffix(".bias").removeprefix("student.") for t in node.input if t in biases), "attention"
        )
        for node in model.graph.node
        if node.op_type in PRODUCTS
    }
    assert set(module) == {*found.quantized, *found.kept}
    return Counter(module[name] for name in found.quantized), Counter(module[name] for name in found.kept)


def test_frame(tiny_graph: Artifact) -> None:
    quantized, kept = modules(tiny_graph, "frame")
    once = ["network.pose_encoder.layers.1", "network.pose_encoder.layers.3"]
    once += [f"autoencoder.{layer}" for layer in ("latent_to_patches", "decoder.0", "decoder.11")]
    per_step = {"network.embed": TINY_STEPS, "network.head": TINY_STEPS, "attention": 2 * 2 * TINY_STEPS}
    assert kept == Counter(once) + Counter(per_step)
    linears = [f"network.blocks.{block}.{name}" for block in (0, 1) for name in ("qkv", "proj", "mlp.0", "mlp.2")]
    assert {module: times for module, times in quantized.items() if "blocks" in module} == dict.fromkeys(linears, 2)
    assert quantized["autoencoder.decoder.1.conv1"] == quantized["network.pose_encoder.layers.2.conv1"] == 1


def test_prepare(tiny_graph: Artifact) -> None:
    quantized, kept = modules(tiny_graph, "prepare")
    first = ["autoencoder.patches_to_latent", "autoencoder.encoder.1", "network.embed_source"]
    unshuffled = ["autoencoder.encoder.4", "autoencoder.encoder.7"]
    assert kept == Counter([*first, *unshuffled, "attention", "attention"])  # the last block's attention is not needed
    assert quantized["network.blocks.1.qkv"] == quantized["autoencoder.encoder.10"] == 1


def test_a_layer_of_constants_is_refused(tiny_graph: Artifact) -> None:
    """A modulation that the exporter did not fold would be quantized on a single row."""
    model = onnx.load(tiny_graph.file("frame.onnx"))
    weights = {"condition": np.ones((1, 4), np.float32), "modulation": np.ones((4, 32), np.float32)}
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    model.graph.node.insert(0, helper.make_node("MatMul", list(weights), ["scale"], name="modulation"))
    with pytest.raises(ArtifactError, match="layer modulation depends on no input"):
        plan(model)


def chain(*products: str, image: bool = True) -> onnx.ModelProto:
    """x (1, 4, 4) through products: "linear" with weights, "attention" of the tensor with itself."""
    nodes, tensor = [], "x"
    weights = numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")
    for place, kind in enumerate(products):
        other = "w" if kind == "linear" else tensor
        nodes.append(helper.make_node("MatMul", [tensor, other], [f"t{place}"], name=f"{kind}{place}"))
        tensor = f"t{place}"
    kind = TensorProto.UINT8 if image else TensorProto.FLOAT
    nodes.append(helper.make_node("Cast", [tensor], ["y"], to=kind))
    boundary = (helper.make_tensor_value_info(n, t, [1, 4, 4]) for n, t in (("x", TensorProto.FLOAT), ("y", kind)))
    return helper.make_model(helper.make_graph(nodes, "chain", [next(boundary)], [next(boundary)], [weights]))


@pytest.mark.parametrize(
    ("model", "missing"),
    [
        (chain("linear", "linear", "linear"), "attention"),
        (chain("attention", "attention"), "first layers"),
        (chain("linear", "attention", image=False), "layers to quantize"),
        (chain("linear", "linear", "attention"), "last layers"),
        (chain("linear", "attention", "linear"), "layers joined with the noise"),
    ],
)
def test_a_rule_that_matches_nothing(model: onnx.ModelProto, missing: str) -> None:
    with pytest.raises(
        ArtifactError, match=rf"the graph that makes \['y'\] has no {missing}: expected a prepare or frame"
    ):
        plan(model)
