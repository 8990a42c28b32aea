"""Graphs of networks that nobody here wrote: an autoencoder in Stable Diffusion's layout behind a small UNet's kind."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from diffusers import AutoencoderKL

from distill.autoencoder import KLAutoencoder
from distill.contract import ContractNetwork
from distill.export import Frame, example_feeds, signatures
from distill.graphs import write_graph
from distill.student import Student
from quantize.execute import Graph
from quantize.int8 import to_int8
from quantize.layers import load, plan
from tests.distill.test_contract import factory
from tests.distill.tiny import SIZE

LEVELS = (32, 32, 64, 64)


@pytest.fixture(scope="module")
def frame(tmp_path_factory: pytest.TempPathFactory) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """The frame graph of a student behind a whole decoder of four levels, and inputs for it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=LEVELS,
            latent_channels=8,
            layers_per_block=2,
        )
    network = ContractNetwork(factory()).as_student(True)
    student = Student(network, KLAutoencoder(vae)).eval().requires_grad_(False)
    boundary = signatures(student, SIZE)
    noise = np.random.default_rng(0).standard_normal((1, *network.latent_shape), dtype=np.float32)
    feeds = example_feeds(student, boundary, noise)["frame"]
    path = tmp_path_factory.mktemp("graph") / "frame.onnx"
    write_graph(Frame(student, 1), boundary["frame"], feeds, path)
    return load(path), feeds


def decoder_convolutions(model: onnx.ModelProto) -> set[str]:
    return {n.name for n in model.graph.node if n.op_type == "Conv" and any("vae" in name for name in n.input)}


def test_a_whole_decoder_is_quantized(frame: tuple[onnx.ModelProto, dict[str, np.ndarray]]) -> None:
    """The Reshapes of a group norm keep no convolution in float."""
    model, _ = frame
    convolutions = decoder_convolutions(model)
    quantized = convolutions & set(plan(model).quantized)
    assert len(convolutions) >= 35
    assert len(quantized) >= 0.9 * len(convolutions), sorted(convolutions - quantized)


def test_its_pictures_stay(frame: tuple[onnx.ModelProto, dict[str, np.ndarray]]) -> None:
    model, feeds = frame
    rng, samples = np.random.default_rng(1), []
    for _ in range(4):
        noise = rng.standard_normal(feeds["noise"].shape, dtype=np.float32)
        samples.append({**feeds, "noise": noise})
    quantized, products = to_int8(model, samples)
    assert products["Conv"] >= 0.9 * len(decoder_convolutions(model))
    exact, rounded = (Graph(one)(feeds).astype(float) for one in (model, quantized))
    assert 10 * np.log10(255**2 / np.mean((exact - rounded) ** 2)) > 30
