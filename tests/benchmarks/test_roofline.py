"""Operations of a graph against torch's own counter, and the peak against numpy."""

from __future__ import annotations

import time

import numpy as np
import onnx
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.roofline import LAYERS, WIDTH, graph_flops, peak_flops, product_graph
from distill.export import example_feeds, modules, signatures
from distill.student import load_student
from rpfm_edge.core.artifact import Artifact


def test_operations_of_a_frame_are_those_that_torch_counts(tiny_student: Artifact, tiny_graph: Artifact) -> None:
    student, loaded = load_student(tiny_student.path)
    noise = np.zeros((1, *student.network.latent_shape), np.float32)
    feeds = example_feeds(student, signatures(student, tuple(loaded.config["size"])), noise)["frame"]
    frame = modules(tiny_student.path)["frame"]
    # of the attentions, the counter knows this one alone
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        frame(*(torch.from_numpy(value) for value in feeds.values()))
    per_module = counter.get_flop_counts()["Global"]
    # torch counts the modulations and embeddings of time, which are constants of the graph
    constant = 0
    network = student.network
    for layer in (*(b.modulation for b in network.blocks), network.modulation, *network.time.mlp, *network.step.mlp):
        if isinstance(layer, torch.nn.Linear):
            constant += 2 * layer.in_features * layer.out_features * int(loaded.config["steps"])
    assert graph_flops(onnx.load(tiny_graph.file("frame.onnx"))) == sum(per_module.values()) - constant


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_operations_of_products(precision: str) -> None:
    assert graph_flops(product_graph(precision)) == 2 * WIDTH**3 * LAYERS


def test_the_peak_is_of_the_order_of_numpys() -> None:
    x = np.random.default_rng(0).standard_normal((WIDTH, WIDTH)).astype(np.float32)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        x @ x
        times.append(time.perf_counter() - start)
    numpys = 2 * WIDTH**3 / min(times)
    assert numpys / 6 < peak_flops("openvino", "fp32", {}, runs=3) < 6 * numpys
