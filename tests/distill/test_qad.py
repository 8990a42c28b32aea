"""Quantization-aware distillation: it rounds what the quantizer rounds, as the quantizer does, and gets used to it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from torch import nn
from typer.testing import CliRunner

from distill import qad
from distill import train as train_module
from distill.qad import Batch, QadConfig, QadLoss, Rendering, RoundedWeight, int8_layers, round_layers, train_rounded
from distill.student import Student, load_student
from distill.train import TrainConfig
from quantize import apply, calibrate
from quantize.execute import Graph
from quantize.weight_only import GROUP, in_groups
from rpfm_edge import api
from rpfm_edge.cli import app
from rpfm_edge.core import artifact
from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.errors import ArtifactError, ConfigError
from rpfm_edge.core.stages import Stages
from rpfm_edge.measure.metrics import psnr_db
from rpfm_edge.people.data import Split, sample_root
from rpfm_edge.people.deepfashion import open_split
from rpfm_edge.people.image import from_model, to_model
from rpfm_edge.recipe import run
from rpfm_edge.recipe.load import load_recipe
from tests.conftest import TINY_SIZE, TINY_STEPS
from tests.quantize.test_int8 import weights as int8_weights
from tests.quantize.test_layers import modules

QUICK = TrainConfig(steps=25, lr=2e-5, warmup_steps=5, ema=0.8, precision="no")


@pytest.fixture(scope="module")
def people() -> Split:
    return open_split(sample_root(), "test")


@pytest.fixture
def student(tiny_student: Artifact) -> Student:
    return load_student(tiny_student.path)[0]


def batches(student: Student, people: Split, count: int, targets: int = 1) -> list[Batch]:
    shape = student.network.latent_shape
    return [qad.draw(people, TINY_SIZE, targets, shape, np.random.default_rng([9, k])) for k in range(count)]


@torch.no_grad()
def error(rounded: Student, exact: Student, people: Split, **options: Any) -> float:
    """The loss on people's pictures that training does not draw, after rounding ``rounded`` once more."""
    rendering = Rendering(deepcopy(rounded), TINY_STEPS)
    round_layers(rendering, batches=batches(exact, people, 8), **options)
    loss = QadLoss(rendering, Rendering(exact, TINY_STEPS))
    return float(np.mean([float(loss(*batch)) for batch in batches(exact, people, 4, targets=4)]))


def test_the_rounded_layers_are_the_planned_ones(tiny_graph: Artifact, student: Student) -> None:
    """By the plan of the exported graphs, which knows no modules."""
    planned = {name for graph in ("prepare", "frame") for name in modules(tiny_graph, graph)[0]}
    assert set(int8_layers(student)) == planned


def test_a_student_that_aligns_gets_used_to_rounding_but_for_its_map(
    aligned_graph: Artifact, aligned_student: Artifact, people: Split, tmp_path: Path
) -> None:
    planned = {name for graph in ("prepare", "frame") for name in modules(aligned_graph, graph)[0]}
    student = load_student(aligned_student.path)[0]
    assert set(int8_layers(student)) == {name for name in planned if "alignment" not in name and name != "attention"}
    before = deepcopy(student.state_dict())
    config = QadConfig(TINY_STEPS, "int8", replace(QUICK, steps=2, warmup_steps=1), samples=2)
    trained, _ = train_rounded(student, people, TINY_SIZE, config, tmp_path / "checkpoint")
    changed = {name for name, value in trained.state_dict().items() if not torch.equal(value, before[name])}
    assert not [name for name in changed if "alignment" in name]
    assert {"network.conditioner.layers.1.conv1.weight", "autoencoder.high.0.conv2.weight"} <= changed


def test_an_autoencoder_of_another_kind_is_left_in_float(student: Student) -> None:
    student.autoencoder = nn.Sequential(nn.Conv2d(3, 8, 1))
    assert {name.split(".")[0] for name in int8_layers(student)} == {"network"}


@pytest.fixture(scope="module")
def samples(tiny_graph: Artifact, people: Split, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrate.record(tiny_graph, people, tmp_path_factory.mktemp("calibration") / "a.safetensors", 16)


@pytest.fixture(scope="module")
def int8(tiny_graph: Artifact, samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return apply.quantize(tiny_graph, "int8", tmp_path_factory.mktemp("int8") / "graph", samples)


@pytest.fixture(scope="module")
def rounded(tiny_graph: Artifact, tiny_student: Artifact, samples: Path) -> tuple[Rendering, list[Batch]]:
    """The float student rounded with the ranges of the calibration samples, and these."""
    recorded = calibrate.load(samples)
    inputs = [
        tuple(torch.from_numpy(a) for a in (to_model(recorded.source[i][None]), to_model(pose[None]), noise[None]))
        for i, pose, noise in zip(recorded.index, recorded.pose, recorded.noise, strict=True)
    ]
    rendering = Rendering(load_student(tiny_student.path)[0], TINY_STEPS)
    round_layers(rendering, "int8", inputs)
    return rendering, inputs


def test_weights_are_rounded_as_in_the_graph(
    tiny_graph: Artifact, int8: Artifact, rounded: tuple[Rendering, list[Batch]]
) -> None:
    """NNCF's integers and scales, whatever way round the exporter stored the matrix."""
    ours, seen = int8_layers(rounded[0].student), set()
    for name in ("prepare", "frame"):
        module = {node.name: name for name, node in layers_by_bias(onnx.load(tiny_graph.file(f"{name}.onnx")))}
        for node, (integers, scale, axis) in int8_weights(onnx.load(int8.file(f"{name}.onnx"))).items():
            weight = ours[module[node]].weight.detach().numpy()
            stored = np.moveaxis(integers, axis, 0).reshape(len(weight), -1) * scale[:, None]
            np.testing.assert_allclose(stored, weight.reshape(len(weight), -1), atol=1e-6, rtol=1e-4)
            seen.add(module[node])
    assert seen == set(ours)


def layers_by_bias(model: onnx.ModelProto) -> Iterator[tuple[str, onnx.NodeProto]]:
    """The student's module, which its bias names, and the node of every product that has one."""
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            yield node.input[2].removesuffix(".bias").removeprefix("student."), node


def test_the_rounded_student_makes_the_pictures_of_the_int8_graph(
    tiny_graph: Artifact, int8: Artifact, rounded: tuple[Rendering, list[Batch]]
) -> None:
    """ONNX Runtime is as near to it as two runtimes are to each other, and nearer than to the float graph by far."""
    rendering, inputs = rounded
    exact, quantized = (
        {name: Graph(graph.file(f"{name}.onnx")) for name in ("prepare", "frame")} for graph in (tiny_graph, int8)
    )
    near, far = [], []
    for source, pose, noise in inputs[:8]:
        with torch.no_grad():
            ours = from_model(rendering(source, pose, noise)[0].numpy())[0]
        feeds = {"pose": from_model(pose.numpy()), "noise": noise.numpy()}
        theirs, float_ones = (
            graphs["frame"]({**feeds, "source_kv": graphs["prepare"]({"source": from_model(source.numpy())})})[0]
            for graphs in (quantized, exact)
        )
        near.append(psnr_db(ours, theirs))
        far.append(psnr_db(float_ones, theirs))
    assert min(near) > 40
    assert np.median(near) > np.median(far) + 3


def test_int4_weights_are_found_again() -> None:
    """After the grid was shrunk and stored in half precision, the quantizer's own search gives the same integers."""
    weight = 0.1 * torch.randn(24, 2 * GROUP)
    rounding = RoundedWeight(weight, "int4-weights")
    assert 0.7 <= rounding.shrink.min() < rounding.shrink.max() <= 1
    made, exact = rounding(weight).numpy(), weight.numpy()
    assert np.square(made - exact).mean() <= 1.1 * np.square(in_int4(exact) - exact).mean()
    np.testing.assert_allclose(in_int4(made.astype(np.float16).astype(np.float32)), made, atol=1e-6, rtol=2e-3)


def in_int4(weight: np.ndarray) -> np.ndarray:
    """(outputs, sums) weights as the INT4 graph has them."""
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
    stored, scale, _ = in_groups(node, 1, weight.T)
    return (stored * scale.repeat(GROUP, axis=0)).T


def test_the_gradient_passes_the_rounding_by() -> None:
    weight = torch.randn(4, 9, requires_grad=True)
    made = RoundedWeight(weight, "int8")(weight)
    (made * torch.arange(36.0).view(4, 9)).sum().backward()
    assert torch.equal(weight.grad, torch.arange(36.0).view(4, 9))
    assert not torch.equal(made, weight)


def test_a_channel_of_zeros_stays_zero() -> None:
    weight = torch.zeros(2, GROUP)
    for precision in ("int8", "int4-weights"):
        assert torch.equal(RoundedWeight(weight, precision)(weight), weight)


@pytest.mark.parametrize("precision", ["int8", "int4-weights"])
def test_the_rounded_student_comes_nearer_to_the_float_one(
    precision: qad.Precision, tiny_student: Artifact, people: Split, tmp_path: Path
) -> None:
    exact = load_student(tiny_student.path)[0]
    before = error(exact, exact, people, precision=precision)
    made, history = train_rounded(
        load_student(tiny_student.path)[0],
        people,
        TINY_SIZE,
        QadConfig(TINY_STEPS, precision, QUICK, targets=2),
        tmp_path / "c",
    )
    assert history.step == QUICK.steps
    after = error(made, exact, people, precision=precision)
    assert after < 0.9 * before


class Killed(Exception):
    """Stands for a kill: nothing after it runs."""


def test_a_killed_run_continues_to_the_same_weights(
    tiny_student: Artifact, people: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_module, "SHARE", math.inf)  # saves after every step
    config = QadConfig(1, "int8", replace(QUICK, steps=6, save_every_s=0.0), samples=4)

    def train(checkpoint: str) -> Student:
        fresh = load_student(tiny_student.path)[0]
        return train_rounded(fresh, people, TINY_SIZE, config, tmp_path / checkpoint)[0]

    whole, draw, left = train("whole"), qad.draw, iter(range(4 + 3))

    def dies(*arguments: Any) -> Batch:
        if next(left, None) is None:
            raise Killed
        return draw(*arguments)

    monkeypatch.setattr(qad, "draw", dies)
    with pytest.raises(Killed):
        train("cut")
    monkeypatch.setattr(qad, "draw", draw)
    resumed = train("cut").state_dict()
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed[name], value, msg=name)


# Commands ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tiny_student: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    out = tmp_path_factory.mktemp("qad") / "student"
    options = ("--data", "sample", "--out", str(out), "--steps", "1", "--seconds", "1")
    ended = CliRunner().invoke(app, ["fine-tune", str(tiny_student.path), *options])
    assert ended.exit_code == 0, ended.output
    return artifact.load(out, "student")


def test_steps_that_the_student_has_not_learnt(tiny_student: Artifact, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"steps = 3 for a student .* by flowmap for 2: expected 1 or 2 or"):
        api.fine_tune(tiny_student.path, "sample", tmp_path / "out", steps=3)
    assert not list(tmp_path.iterdir())


def test_the_result_is_a_student_like_any_other(made: Artifact, tiny_student: Artifact) -> None:
    """It says where it comes from, and nothing of it rounds any more."""
    assert made.lineage[-1].stage == "qad"
    assert made.lineage[-1].inputs == {"student": tiny_student.digest}
    assert made.lineage[-1].config["precision"] == "int8"
    assert (made.config["steps"], made.config["method"]) == (1, tiny_student.config["method"])
    assert made.config["losses"]
    student = load_student(made.path)[0]
    assert not any(parameter.requires_grad for parameter in student.parameters())
    for layer in int8_layers(student).values():
        assert not nn.utils.parametrize.is_parametrized(layer)
        assert not layer._forward_pre_hooks


def test_it_goes_the_usual_way_to_an_int8_graph(made: Artifact, tmp_path: Path) -> None:
    graph = api.quantize(made.path, "sample", tmp_path / "graph", "int8", samples=8)
    assert graph.config["precision"] == "int8"
    assert [stage.stage for stage in graph.lineage][-3:] == ["qad", "export", "quantize"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "fp8"}, r"precision = 'fp8': expected one of \['int8', 'int4-weights'\]"),
        ({"trajectories": 64}, "fine-tune: unknown key 'trajectories'"),
        ({"steps": 0}, "steps = 0: expected at least 1"),
        ({"batch": 0}, "batch = 0: expected at least 1"),
        ({"seconds": -1.0}, "seconds = -1: expected a finite number above 0"),
        ({"lr": 0.0}, "lr = 0: expected a finite number above 0"),
        ({"weights": "int8"}, "unknown weights 'int8'"),
    ],
)
def test_a_request_that_cannot_be(
    changes: dict[str, Any], message: str, tiny_student: Artifact, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        api.fine_tune(tiny_student.path, "sample", tmp_path / "out", **changes)
    assert not list(tmp_path.iterdir())


def test_what_is_no_student(tiny_graph: Artifact, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is a graph: expected a student"):
        api.fine_tune(tiny_graph.path, "sample", tmp_path / "out")


def test_another_learning_rate_does_not_continue(made: Artifact, tiny_student: Artifact) -> None:
    with pytest.raises(ConfigError, match="was trained with other settings"):
        api.fine_tune(tiny_student.path, "sample", made.path, steps=1, seconds=2.0, lr=1e-2)


def test_a_recipe_fine_tunes_the_student_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text("out = 'x'\n[student]\nartifact = 'student:xs'\nsteps = 1\n[qad]\nseconds = 9.0\n")
    recipe, asked = load_recipe(file), []
    monkeypatch.setattr(run, "fine_tune", lambda *arguments, **fields: asked.append((arguments, fields)))
    monkeypatch.setattr(Stages, "once", lambda self, name, config, inputs, out, make, tools: make())
    assert run._fine_tune(recipe, Stages(tmp_path), "student:xs") == str(tmp_path / "qad")
    (arguments, fields) = asked[0]
    assert arguments == ("student:xs", "sample", tmp_path / "qad")
    assert (fields["steps"], fields["seconds"], fields["precision"]) == (1, 9.0, "int8")
    assert run._fine_tune(replace(recipe, qad=None), Stages(tmp_path), "student:xs") == "student:xs"
    assert len(asked) == 1
