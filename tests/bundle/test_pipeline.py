"""The boundary between ``prepare`` and ``frame``: named tensors, both kinds of pose, the source's own joints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from distill.autoencoder import SmallAutoencoder
from distill.batches import EncodedSplit, encode_split
from distill.condition import Source, encoded, with_missing
from distill.guidance import Guidance
from distill.reference import student_images, teacher_images
from distill.student import DistillConfig, DistillLoss, Student
from distill.teacher import FlowMatchingConfig, FlowMatchingLoss, NetworkTeacher, draw_example, pose_kind
from quantize import apply, calibrate
from rpfm_edge import api
from rpfm_edge.bundle.pipeline import Pipeline
from rpfm_edge.chain.build import record
from rpfm_edge.core import artifact
from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.errors import InputError
from rpfm_edge.core.signature import Signature, TensorSpec
from rpfm_edge.people.formats import NobodyError
from rpfm_edge.people.image import from_model, resize, to_model
from rpfm_edge.people.pose import draw_skeleton, from_graph, to_graph
from rpfm_edge.people.splits import open_splits
from tests.keynet import LATENT, SIZE, STEPS, key_graph, key_student

SAMPLE = open_splits("sample")


@pytest.fixture(scope="module")
def student() -> Student:
    return key_student()


@pytest.fixture(scope="module")
def graph(student: Student, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return key_graph(student, tmp_path_factory.mktemp("key") / "graph")


@pytest.fixture(scope="module")
def pipe(graph: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    bundle = api.build(graph.path, tmp_path_factory.mktemp("key") / "bundle", "onnxruntime")
    with Pipeline.open(bundle.path) as opened:
        yield opened


@pytest.fixture(scope="module")
def skeleton_pipe(tiny_graph: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    bundle = api.build(tiny_graph.path, tmp_path_factory.mktemp("skeleton") / "bundle", "onnxruntime")
    with Pipeline.open(bundle.path) as opened:
        yield opened


def pair() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A picture, its keypoints, and the keypoints of another picture of that person."""
    source, target = (int(index) for index in SAMPLE.test.pairs[0])
    return SAMPLE.test.image(source, SIZE), SAMPLE.test.pose(source, SIZE), SAMPLE.test.pose(target, SIZE)


@torch.no_grad()
def in_torch(
    student: Student, picture: np.ndarray, joints: np.ndarray, pose: np.ndarray, noise: np.ndarray
) -> np.ndarray:
    source = encoded(student.autoencoder, torch.from_numpy(to_model(picture[None])), torch.from_numpy(joints[None]))
    condition = student.condition(source, torch.from_numpy(to_graph(pose)[None]))
    latent = student.sample(torch.from_numpy(noise), condition, STEPS)
    return from_model(student.autoencoder.decode(latent, condition).numpy())[0]


def test_the_signatures_name_what_the_network_makes(graph: Artifact) -> None:
    points = TensorSpec("keypoints", (1, 18, 2), "float32")
    appearance, joints = TensorSpec("appearance", (1, *LATENT), "float32"), TensorSpec("joints", (1, 18, 2), "float32")
    assert graph.signatures["prepare"].inputs == (TensorSpec("source", (1, *SIZE, 3), "uint8"), points)
    assert graph.signatures["prepare"].outputs == (appearance, joints, TensorSpec("joint_scores", (1, 18), "float32"))
    noise = TensorSpec("noise", (1, *LATENT), "float32")
    assert graph.signatures["frame"].inputs == (TensorSpec("pose", (1, 18, 2), "float32"), noise, appearance, joints)


def test_a_frame_of_keypoints_is_that_of_torch(pipe: Pipeline, student: Student) -> None:
    """Joints of the pose and of the source are missing among them; another pose gives another picture."""
    picture, _, pose = pair()
    pose[[3, 9]] = np.nan
    assert pipe.pose_kind == "keypoints"
    person, nothing = pipe.prepare(picture), np.full((18, 2), np.nan, np.float32)
    assert set(person.tensors) == {"appearance", "joints", "joint_scores"}
    made = pipe.render(person, pose)
    expected = in_torch(student, picture, nothing, pose, pipe.noise)
    assert np.abs(made.astype(int) - expected).max() <= 1
    assert np.abs(made.astype(int) - pipe.render(person, pose + 5)).max() > 5


def test_keypoints_stand_over_what_is_found(pipe: Pipeline, student: Student) -> None:
    picture, joints, pose = pair()
    joints[[2, 7]] = np.nan
    found, told = pipe.prepare(picture), pipe.prepare(picture, joints)
    assert found.joints is not None
    assert told.joints is not None
    known = np.isfinite(joints).all(axis=1)
    np.testing.assert_array_equal(told.joints[known], joints[known])
    np.testing.assert_array_equal(told.joints[~known], found.joints[~known])
    expected = in_torch(student, picture, joints, pose, pipe.noise)
    assert np.abs(pipe.render(told, pose).astype(int) - expected).max() <= 1
    assert np.abs(pipe.render(told, pose).astype(int) - pipe.render(found, pose)).max() > 5


def test_nobody_in_the_source(pipe: Pipeline) -> None:
    blank, (_, joints, pose) = np.full((*SIZE, 3), 90, np.uint8), pair()
    with pytest.raises(NobodyError, match="nobody was found in the source: expected a person; give another photo, or"):
        pipe.prepare(blank)
    assert pipe.render(pipe.prepare(blank, joints), pose).shape == (*SIZE, 3)


def test_keypoints_are_checked_as_a_pose_is(pipe: Pipeline) -> None:
    picture, joints, _ = pair()
    with pytest.raises(InputError, match=r"keypoints has shape \[17, 2\]"):
        pipe.prepare(picture, joints[:17])
    with pytest.raises(InputError, match=r"keypoint 0 \(nose\) lies at .*; scale keypoints to the picture"):
        pipe.prepare(picture, joints + 500)
    with pytest.raises(InputError, match="keypoints has no visible keypoint"):
        pipe.prepare(picture, np.full((18, 2), np.nan))


def test_a_photo_alone_for_a_bundle_of_skeletons(skeleton_pipe: Pipeline) -> None:
    picture, joints, pose = pair()
    with pytest.raises(InputError, match=r"this bundle's prepare takes a photo alone: .*; leave them out\."):
        skeleton_pipe.prepare(picture, joints)
    person = skeleton_pipe.prepare(picture)
    assert skeleton_pipe.pose_kind == "skeleton"
    assert person.joints is None
    drawn = skeleton_pipe.render_input(person, draw_skeleton(pose, SIZE)[None])
    np.testing.assert_array_equal(skeleton_pipe.render(person, pose), drawn)


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_a_bundle_of_before(tiny_graph: Artifact, skeleton_pipe: Pipeline, tmp_path: Path, backend: str) -> None:
    """Its keys and values have no axis of one source, and its manifest says no kind of pose."""
    bundle = api.build(as_before(tiny_graph, tmp_path / "graph").path, tmp_path / "bundle", backend)
    picture, _, pose = pair()
    with Pipeline.open(bundle.path) as old:
        person = old.prepare(picture)
        assert person.tensors["source_kv"].shape == skeleton_pipe.prepare(picture).tensors["source_kv"].shape[1:]
        made = old.render(person, pose)
    expected = skeleton_pipe.render(skeleton_pipe.prepare(picture), pose)
    assert np.abs(made.astype(int) - expected).max() <= (0 if backend == "onnxruntime" else 1)


def as_before(graph: Artifact, out: Path) -> Artifact:
    """``graph`` with the boundary that older versions exported."""
    config = {key: value for key, value in graph.config.items() if key != "pose"}
    with artifact.replacing_folder(out, "graph") as folder:
        for name in graph.files:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(graph.file(name).read_bytes())
        boundary = {name: _without_axis(signature) for name, signature in graph.signatures.items()}
        for name, kind in (("prepare", "Squeeze"), ("frame", "Unsqueeze")):
            model = onnx.load(graph.file(f"{name}.onnx"))
            value = next(v for v in (*model.graph.input, *model.graph.output) if v.name == "source_kv")
            for node in model.graph.node:
                for names in (node.input, node.output):
                    names[:] = ["with axis" if other == "source_kv" else other for other in names]
            ends = ["with axis", "axis"], ["source_kv"]
            if kind == "Unsqueeze":
                ends = ["source_kv", "axis"], ["with axis"]
            place = len(model.graph.node) if kind == "Squeeze" else 0
            model.graph.node.insert(place, helper.make_node(kind, *ends, name=kind))
            model.graph.initializer.append(numpy_helper.from_array(np.array([0]), "axis"))
            del value.type.tensor_type.shape.dim[0]
            onnx.save(model, folder / f"{name}.onnx")
        artifact.seal(folder, "graph", config, boundary, graph.lineage)
    return artifact.load(out, "graph")


def _without_axis(signature: Signature) -> Signature:
    def changed(specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(s.name, s.shape[1:] if s.name == "source_kv" else s.shape, s.dtype) for s in specs)

    return Signature(changed(signature.inputs), changed(signature.outputs))


def test_the_canary_has_every_tensor(graph: Artifact) -> None:
    made = record(graph)
    assert made is not None
    names = {"source", "keypoints", "pose", "noise", "appearance", "joints", "joint_scores", "image"}
    assert set(made) == names
    known = np.isfinite(pair()[1]).all(axis=1)
    np.testing.assert_allclose(from_graph(made["joints"][0].astype(np.float32))[known], pair()[1][known], atol=0.05)


def test_samples_are_of_its_own_kind(graph: Artifact, tmp_path: Path) -> None:
    samples = calibrate.record(graph, SAMPLE.training, tmp_path / "samples", 8)
    loaded = calibrate.load(samples)
    assert set(loaded.tensors) == {"appearance", "joints"}
    assert loaded.pose.shape == (8, 18, 2)
    loaded.check(graph)
    for number, given in enumerate((samples, None)):  # without samples it is checked on random points
        made = apply.quantize(graph, "fp16", tmp_path / f"out{number}", given)
        assert made.config["pose"] == "keypoints"
        assert made.signatures == graph.signatures


@pytest.fixture(scope="module")
def data(student: Student, tmp_path_factory: pytest.TempPathFactory) -> EncodedSplit:
    assert isinstance(student.autoencoder, SmallAutoencoder)
    return encode_split(SAMPLE.training, student.autoencoder, tmp_path_factory.mktemp("c"), SIZE, pose="keypoints")


def test_a_network_of_keypoints_is_trained(student: Student, data: EncodedSplit) -> None:
    """Flow matching and an endpoint student, decoder and all: the loss is finite and reaches every weight."""
    fresh = key_student().requires_grad_(True)
    example = draw_example(data, FlowMatchingConfig(sources=2, targets_per_source=2), np.random.default_rng(0), "cpu")
    matching = FlowMatchingLoss(fresh.network, fresh.autoencoder, FlowMatchingConfig())
    distilling = DistillLoss(fresh, DistillConfig("endpoint", 1))
    losses = matching(example), distilling(example.source, example.pose, example.noise, example.target)
    for loss in losses:
        fresh.zero_grad()
        loss.backward()
        assert torch.isfinite(loss)
        assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in fresh.network.parameters())


def test_a_teacher_of_keypoints(student: Student, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without guidance it is its network, so that its pictures at the same noise are those of such a student."""
    teacher = NetworkTeacher(student.network, student.autoencoder, Guidance(1.0), SIZE)
    assert pose_kind(teacher) == "keypoints"
    picture, joints, pose = (part[None] for part in pair())
    noise = np.random.default_rng(1).standard_normal((1, *LATENT), dtype=np.float32)
    made = teacher_images(teacher, picture, joints, pose, noise, [(STEPS, "euler")])[STEPS, "euler"]
    assert np.abs(made[0].astype(int) - in_torch(student, picture[0], joints[0], pose[0], noise)).max() <= 1
    monkeypatch.setattr("distill.reference.load_student", lambda path: (student, None))
    by_student = student_images("any", picture, joints, pose, noise, [STEPS])[STEPS]
    assert np.abs(made.astype(int) - by_student).max() <= 1


def test_guidance_takes_tensors_of_no_source(student: Student) -> None:
    picture, joints, pose = (torch.from_numpy(part[None]) for part in pair())
    source = encoded(student.autoencoder, torch.from_numpy(to_model(picture.numpy())), joints)
    teacher, x = NetworkTeacher(student.network, student.autoencoder, Guidance(3.0), SIZE), torch.zeros(1, *LATENT)
    got = teacher.velocity(x, 0.5, teacher.condition(source, with_missing(pose)))
    time, tensors = torch.full((1,), 0.5), student.network.source(source)
    moved = student.network.pose(with_missing(pose), tensors)["motion"]
    none = student.network.source(Source(*source), torch.zeros(1, dtype=torch.bool))
    given = student.network(x, time, motion=moved, **tensors)
    null = student.network(x, time, motion=torch.zeros_like(moved), **none)
    torch.testing.assert_close(got, null + 3 * (given - null))


def test_a_photo_is_stretched_where_the_teachers_were(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = np.random.default_rng(0).integers(0, 256, (40, 90, 3), dtype=np.uint8)
    padded = pipe.prepare(wide).tensors
    monkeypatch.setattr(pipe, "_fit", "squeeze")
    for name, stretched in pipe.prepare(resize(wide, pipe.size)).tensors.items():
        np.testing.assert_array_equal(pipe.prepare(wide).tensors[name], stretched)
    assert any((pipe.prepare(wide).tensors[name] != padded[name]).any() for name in padded)
