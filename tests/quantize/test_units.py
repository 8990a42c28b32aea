"""Units: every product once, grouped over the steps, named by place; multiplications against a formula."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from quantize.layers import PRODUCTS, load
from quantize.units import chosen, matching, multiplications, units
from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.errors import ArtifactError, ConfigError
from tests.conftest import TINY_STEPS


@pytest.fixture(scope="module")
def frame(tiny_graph: Artifact) -> onnx.ModelProto:
    return onnx.load(tiny_graph.file("frame.onnx"))


@pytest.mark.parametrize("name", ["prepare", "frame"])
def test_every_product_is_in_one_unit(tiny_graph: Artifact, name: str) -> None:
    model = onnx.load(tiny_graph.file(f"{name}.onnx"))
    products = [node.name for node in model.graph.node if node.op_type in PRODUCTS]
    found = [product for unit in units(model) for product in unit.products]
    assert sorted(found) == sorted(products)
    assert len({unit.name for unit in units(model)}) == len(units(model))


def test_units_hold_all_steps_of_a_block_and_say_its_place(frame: onnx.ModelProto) -> None:
    found = {unit.name: unit for unit in units(frame)}
    kinds = {node.name: node for node in frame.graph.node}
    for block in range(2):  # the depth of the tiny student
        for part in ("qkv", "qk", "av", "linear0", "linear1", "linear2"):
            assert len(found[f"block{block}.{part}"].products) == TINY_STEPS
    for part in ("qk", "av"):
        assert found[f"block0.{part}"].attention
    softmax = {node.output[0] for node in frame.graph.node if node.op_type == "Softmax"}
    for name, unit in found.items():
        assert (kinds[unit.products[0]].input[0] in softmax) == name.endswith(".av")
        if not unit.attention and name != "decoder.conv0":
            assert len({kinds[product].input[1] for product in unit.products}) == 1
    assert len(found["encoder.conv0"].products) == 1
    both = [kinds[product] for product in found["decoder.conv0"].products]  # the decoder's two paths from the latent
    assert len({node.input[0] for node in both}) == 1
    assert len({node.input[1] for node in both}) == 2
    assert "decoder.conv1" not in found
    assert "head" not in found
    assert len(found["block1.linear3"].products) == TINY_STEPS  # the head, whose result moves the noise


def test_a_graph_without_attention_is_refused(frame: onnx.ModelProto) -> None:
    copy = onnx.ModelProto()
    copy.CopyFrom(frame)
    for node in copy.graph.node:
        node.op_type = "Mul" if node.op_type == "MatMul" else node.op_type
    with pytest.raises(ArtifactError, match="has no attention"):
        units(copy)


def test_the_attention_of_another_autoencoder_is_a_block_of_its_own(tmp_path: Path) -> None:
    """It stands once in a frame, whatever the steps."""
    import torch
    from diffusers import AutoencoderKL

    from distill.autoencoder import KLAutoencoder
    from distill.export import export
    from distill.rpfm import RPFM, RPFMConfig
    from distill.student import DistillConfig, Student, save_student

    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8,) * 4,
            norm_num_groups=4,
            latent_channels=4,
        )
        network = RPFM(RPFMConfig(dim=32, depth=2, heads=2, latent_size=(8, 6), latent_channels=4, step_embedding=True))
        student = Student(network, KLAutoencoder(vae))
    made = save_student(student, tmp_path / "student", DistillConfig(steps=2), (64, 48), ())
    found = {unit.name: unit for unit in units(load(export(made.path, tmp_path / "graph").file("frame.onnx")))}
    assert len(found["block0.qk"].products) == len(found["block1.av"].products) == 2
    assert len(found["block2.qk"].products) == len(found["block2.av"].products) == 1
    assert "block2.qkv" in found
    assert {name for name, unit in found.items() if unit.attention} == {
        f"block{block}.{part}" for block in range(3) for part in ("qk", "av")
    }


def test_patterns_choose_units_and_a_pattern_without_one_is_an_error(frame: onnx.ModelProto) -> None:
    found = units(frame)
    known = [unit.name for unit in found]
    names = matching(known, ["block*.qk", "decoder.conv0"])
    assert names == {"block0.qk", "block1.qk", "decoder.conv0"}
    assert len(chosen(found, names)) == 2 * TINY_STEPS + 2
    with pytest.raises(ConfigError, match=r"'block9.\*' matches no layer"):
        matching(known, ["block9.*"])


def test_a_misspelt_unit_is_told_its_neighbours_and_not_all_names(frame: onnx.ModelProto) -> None:
    known = [unit.name for unit in units(frame)]
    with pytest.raises(ConfigError) as raised:
        matching(known, ["decoder.con0"])
    words, _, nearest = raised.value.expected.partition(", such as ")
    assert words == f"a name or pattern of one of the {len(known)}"
    assert len(nearest.split(", ")) == 3
    assert nearest.startswith("decoder.conv0, ")
    assert set(nearest.split(", ")) <= set(known)


def test_multiplications_are_those_of_the_formula() -> None:
    weights = {"w": np.zeros((6, 3, 5, 5), np.float32), "g": np.zeros((4, 7), np.float32)}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["y"], name="conv", pads=[2] * 4, strides=[2, 2]),
        helper.make_node("Gemm", ["a", "g"], ["b"], name="gemm", transA=1),
        helper.make_node("MatMul", ["p", "q"], ["r"], name="matmul"),
    ]
    shapes = {"x": (1, 3, 8, 10), "a": (4, 9), "p": (2, 3, 5), "q": (2, 5, 6)}
    results = {"y": (1, 6, 4, 5), "b": (9, 7), "r": (2, 3, 6)}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in results.items()],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    counts = multiplications(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]))
    assert counts == {"conv": 4 * 5 * 6 * 3 * 5 * 5, "gemm": 9 * 4 * 7, "matmul": 2 * 3 * 5 * 6}
