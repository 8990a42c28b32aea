"""Student → ONNX: ``prepare.onnx`` (once per identity) and ``frame.onnx`` (per frame), checked against torch before
they are kept.

The frame is one graph: pose encoder, the unrolled steps, the decoder and the conversion to uint8. Its times are
constants, so time embedding and adaLN fold away. What goes from the one graph to the other are the tensors that the
network makes of a source, by their own names.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from distill.condition import Source, Tensors, encode_pose, encoded
from distill.graphs import OPSET, write_graph
from distill.student import Student, load_student
from rpfm_edge.core import artifact
from rpfm_edge.core.artifact import Artifact, Stage, tool_versions
from rpfm_edge.core.flow import check_steps
from rpfm_edge.core.signature import GIVEN_JOINTS, Signature, TensorSpec
from rpfm_edge.people.pose import MISSING, pose_input

TOOLS = ("torch", "onnx", "onnxscript", "onnxsim", "onnxruntime")
FACTORY = "distill.export:reference"
RESERVED = {"source", GIVEN_JOINTS, "pose", "noise", "image"}


class Prepare(nn.Module):
    """(1, H, W, 3) uint8 source, and (1, 18, 2) keypoints for a network that looks at them → the network's tensors, in
    its order."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(self, source: Tensor, keypoints: Tensor | None = None) -> tuple[Tensor, ...]:
        pixels = to_float(source)
        joints = pixels.new_full((len(pixels), 18, 2), MISSING) if keypoints is None else keypoints
        tensors = self.student.network.source(encoded(self.student.autoencoder, pixels, joints))
        return tuple(tensor.float() for tensor in tensors.values())  # whatever the network computes in


class Frame(nn.Module):
    """Pose, (1, C, h, w) noise and the tensors of ``frame_tensors``, in their order → (1, H, W, 3) image, as uint8 and
    as [-1, 1] float. The pose is (1, H, W, 3) uint8 or (1, 18, 2), as the network wants it."""

    def __init__(self, student: Student, steps: int) -> None:
        super().__init__()
        self.student, self.steps = student, steps
        self.names = tuple(frame_tensors(student))

    def forward(self, pose: Tensor, noise: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        network, autoencoder = self.student.network, self.student.autoencoder
        condition: Tensors = dict(zip(self.names, tensors, strict=True))
        given = to_float(pose) if network.pose_kind == "skeleton" else pose
        condition |= encode_pose(network, autoencoder, given, condition)
        image = autoencoder.decode(self.student.sample(noise, condition, self.steps), condition).permute(0, 2, 3, 1)
        image = image.float()  # grey levels in half precision would have steps of 1/8
        return ((image + 1) * 127.5).round().clamp(0, 255).to(torch.uint8), image


@torch.no_grad()
def source_tensors(student: Student) -> Tensors:
    """The network's tensors of one source, all black and nobody on it: what counts are their names and shapes."""
    network = student.network
    latent = next(network.parameters()).new_zeros(1, *network.latent_shape)
    pixels, joints = latent.new_zeros(1, 3, *network.size), latent.new_full((1, 18, 2), MISSING)
    tensors: Tensors = network.source(Source(latent, pixels, joints))
    assert not RESERVED & tensors.keys(), "a tensor has the name of another input"
    return tensors


def frame_tensors(student: Student) -> Tensors:
    """Those of them that a frame takes."""
    tensors = source_tensors(student)
    return {name: tensors[name] for name in student.network.frame_tensors or tensors}


def to_float(image: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 → (B, 3, H, W) in [-1, 1]."""
    return image.float().permute(0, 3, 1, 2) / 127.5 - 1  # cast first: TensorRT moves no uint8


def signatures(student: Student, size: tuple[int, int]) -> dict[str, Signature]:
    """The boundaries of both graphs."""
    picture, points = ((1, *size, 3), "uint8"), ((1, 18, 2), "float32")
    source, image = TensorSpec("source", *picture), TensorSpec("image", *picture)
    pose = TensorSpec("pose", *(points if student.network.pose_kind == "keypoints" else picture))
    noise = TensorSpec("noise", (1, *student.network.latent_shape), "float32")

    def specs(tensors: Tensors) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(name, tuple(tensor.shape), "float32") for name, tensor in tensors.items())

    prepared = (source, TensorSpec(GIVEN_JOINTS, *points)) if student.network.source_keypoints else (source,)
    return {
        "prepare": Signature(prepared, specs(source_tensors(student))),
        "frame": Signature((pose, noise, *specs(frame_tensors(student))), (image,)),
    }


def export(path: str | Path, out: Path, steps: int | None = None, noise_seed: int = 0) -> Artifact:
    """Export the student artifact at ``path`` to a graph artifact at ``out``.

    Args:
        steps: unrolled steps; default: those the student was distilled for.
        noise_seed: of the noise that the graph artifact carries and every frame uses by default.

    Raises:
        ConfigError: the student has not learnt to run with ``steps``.
        ParityError: the ONNX graph and torch disagree (``graphs.TOLERANCE``); nothing is written then.
    """
    student, loaded = load_student(path)
    steps, size = steps or int(loaded.config["steps"]), tuple(loaded.config["size"])
    check_steps(loaded.config, steps)
    boundary = signatures(student, size)
    noise = np.random.default_rng(noise_seed).standard_normal(boundary["frame"].input("noise").shape, dtype=np.float32)
    feeds = example_feeds(student, boundary, noise)
    stage = Stage(
        "export",
        {"steps": steps, "opset": OPSET, "noise_seed": noise_seed},
        tool_versions(*TOOLS),
        {"student": loaded.digest},
    )
    config = {
        "steps": steps,
        "precision": "fp32",
        "size": list(size),
        "latent_shape": list(student.network.latent_shape),
        "pose": student.network.pose_kind,
        "fit": student.network.fit,
        "factory": FACTORY,
        "student": loaded.digest,
    }
    foreign = "factory" in loaded.config["network"]
    with artifact.replacing_folder(out, "graph") as folder:
        deviation = {
            name: write_graph(module, boundary[name], feeds[name], folder / f"{name}.onnx", foreign)
            for name, module in (("prepare", Prepare(student)), ("frame", Frame(student, steps)))
        }
        np.save(folder / "noise.npy", noise)
        copy_student(loaded, folder / "student", steps)
        artifact.seal(folder, "graph", config | {"parity_max_abs": deviation}, boundary, (*loaded.lineage, stage))
    return artifact.load(out, "graph")


def copy_student(student: Artifact, folder: Path, steps: int) -> None:
    """Put the student's weights beside the graphs: the torch backend, our reference, runs them."""
    folder.mkdir()
    for name in student.files:
        (folder / name).write_bytes((student.path / name).read_bytes())
    artifact.seal(folder, "student", {**student.config, "steps": steps}, {}, student.lineage)


def example_feeds(
    student: Student, boundary: dict[str, Signature], noise: np.ndarray
) -> dict[str, dict[str, np.ndarray]]:
    """Real-looking inputs for both graphs: random pictures or points, the noise, and the tensors that torch computes.

    Of the source's keypoints half are missing.
    """
    rng = np.random.default_rng(0)
    picture = boundary["prepare"].input("source").shape
    source, pose = (rng.integers(0, 256, picture, dtype=np.uint8) for _ in range(2))
    prepare = {"source": source}
    points = (rng.random((2, 18, 2)) * picture[2:0:-1]).astype(np.float32)
    points[0, ::2] = np.nan
    given, posed = (pose_input(one, "keypoints") for one in points)
    if student.network.source_keypoints:
        prepare[GIVEN_JOINTS] = given
    if student.network.pose_kind == "keypoints":
        pose = posed
    with torch.no_grad():
        made = Prepare(student)(*(torch.from_numpy(array) for array in prepare.values()))
    tensors = {spec.name: value.numpy() for spec, value in zip(boundary["prepare"].outputs, made, strict=True)}
    taken = {spec.name: tensors[spec.name] for spec in boundary["frame"].inputs if spec.name in tensors}
    return {"prepare": prepare, "frame": {"pose": pose, "noise": noise, **taken}}


def reference(folder: Path) -> dict[str, Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]]:
    """The graphs as torch runs them, from a student artifact: what the ``torch`` backend calls.

    Tensors whose shape lacks the axis of one source, which older graphs had, are taken too.
    """
    student, loaded = load_student(folder)
    boundary, graphs = signatures(student, tuple(loaded.config["size"])), _modules(student, loaded)

    def runner(name: str) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
        inputs, outputs = boundary[name].inputs, boundary[name].outputs

        @torch.inference_mode()
        def run(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            given = (np.ascontiguousarray(feeds[spec.name]).reshape(spec.shape) for spec in inputs)
            result = graphs[name](*(torch.from_numpy(array) for array in given))
            return {spec.name: value.numpy() for spec, value in zip(outputs, result, strict=False)}

        return run

    return {name: runner(name) for name in graphs}


def modules(folder: Path) -> dict[str, nn.Module]:
    """The graphs as modules, from a student artifact: what the ``torch-tensorrt`` backend compiles.

    Their outputs begin with those of the signature; a frame adds its image before rounding.
    """
    return _modules(*load_student(folder))


def _modules(student: Student, loaded: Artifact) -> dict[str, nn.Module]:
    return {"prepare": Prepare(student).eval(), "frame": Frame(student, int(loaded.config["steps"])).eval()}
