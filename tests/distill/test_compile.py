"""Every training module is one graph to torch.compile: a break would cost speed and say nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from distill.autoencoder import _Loss as AutoencoderLoss
from distill.rpfm import RPFM
from distill.student import DistillConfig, DistillLoss, create_student, examples
from distill.teacher import FlowMatchingConfig, FlowMatchingLoss, draw_example
from rpfm_edge.people.data import draw_batch
from tests.distill.tiny import NETWORK, randomised, toy_data, toy_teacher

Case = tuple[nn.Module, tuple[object, ...]]


def teacher_case(cache: Path) -> Case:
    teacher, config = toy_teacher(), FlowMatchingConfig(sources=2, targets_per_source=2)
    loss = FlowMatchingLoss(randomised(RPFM(NETWORK)), teacher.autoencoder, config)
    return loss, (draw_example(toy_data(teacher, cache), config, np.random.default_rng(0), "cpu"),)


def autoencoder_case(cache: Path) -> Case:
    return AutoencoderLoss(toy_teacher().autoencoder), (torch.rand(2, 3, 64, 48) * 2 - 1, torch.randn(2, 8, 8, 6))


def student_case(method: str) -> Callable[[Path], Case]:
    def make(cache: Path) -> Case:
        teacher, config = toy_teacher(), DistillConfig(method, 2)  # type: ignore[arg-type]
        data, rng = toy_data(teacher, cache), np.random.default_rng(0)
        batch = data.batch(*draw_batch(data.split, 2, 2, rng))
        parts = examples(torch.randn(4, 9, *teacher.latent_shape), config, rng)
        return DistillLoss(create_student(teacher, config), config), (batch.source, batch.pose, *parts)

    return make


CASES = {"teacher": teacher_case, "autoencoder": autoencoder_case} | {
    method: student_case(method) for method in ("flowmap", "endpoint")
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_is_one_graph(name: str, tmp_path: Path) -> None:
    loss, inputs = CASES[name](tmp_path)
    torch.compiler.reset()
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), loss(*inputs))
