"""The loops to compare: each makes a frame of one person from a drawn skeleton, by other means than ours.

A builder takes the ``Subject`` and returns a call, skeleton (H, W, 3) uint8 → image (H, W, 3) uint8; it raises
``BackendError`` where this machine lacks something, and that reason stands in the table.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from distill.condition import encode_pose, encoded
from distill.export import modules, to_float
from distill.student import load_student
from distill.teacher import load_teacher, sample_teacher
from rpfm_edge.bundle.pipeline import Person, Pipeline
from rpfm_edge.core import artifact
from rpfm_edge.core.errors import BackendError
from rpfm_edge.core.extras import import_extra
from rpfm_edge.people.image import from_model, to_model
from runtimes import ort, ov

Draw = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Subject:
    """What every loop is given: the same student, person and noise, and as many threads.

    ``bundles``: precision → bundle; ``person``: a source image; ``stack`` closes what a loop opened.
    """

    bundles: dict[str, Path]
    teacher: str
    person: np.ndarray
    threads: int
    stack: ExitStack

    @property
    def student(self) -> Path:
        """The float student, as the torch backend of the float bundle carries it."""
        return self.bundles["fp32"] / "engines/torch/frame/student"

    def opened(self, precision: str, backend: str) -> tuple[Pipeline, Person]:
        """Our pipeline, and the person prepared by it."""
        pipe = self.stack.enter_context(Pipeline.open(self.bundles[precision], backend))
        return pipe, pipe.prepare(self.person)

    def feeds(self, precision: str, backend: str) -> dict[str, np.ndarray]:
        """Noise, and the person's tensors that the backend itself computed."""
        with Pipeline.open(self.bundles[precision], backend) as pipe:
            feeds = pipe.feeds(pipe.prepare(self.person), np.empty(0))
            return {name: np.array(array) for name, array in feeds.items() if name != "pose"}


def ours(precision: str, backend: str, subject: Subject) -> Draw:
    """``Pipeline.render_input``: what ``Pipeline.render`` does once the skeleton is drawn."""
    pipe, person = subject.opened(precision, backend)
    return lambda skeleton: pipe.render_input(person, skeleton[None])


def openvino_loop(precision: str, subject: Subject) -> Draw:
    """OpenVINO's own loop over the same engine, as ``benchmark_app -api sync`` runs it: one request, its tensors set
    once, no checks and no copies but that of the skeleton into its tensor."""
    import openvino

    loaded = artifact.load(subject.bundles[precision], "bundle")
    core = openvino.Core()
    device, settings = ov.compile_settings(core, loaded.config["backends"]["openvino"])
    compiled = core.compile_model(loaded.path / "engines/openvino/frame" / ov.MODEL, device, settings)
    request = compiled.create_infer_request()
    image, pose = (np.empty(loaded.signatures["frame"].outputs[0].shape, np.uint8) for _ in range(2))
    memory = {**subject.feeds(precision, "openvino"), "pose": pose, "image": image}
    for name, array in memory.items():
        request.set_tensor(name, openvino.Tensor(array, shared_memory=True))

    def draw(skeleton: np.ndarray) -> np.ndarray:
        memory["pose"][0] = skeleton  # ``memory`` lives as long as this function: OpenVINO does not keep it alive
        request.infer(share_outputs=True)
        return image[0]

    return draw


def onnxruntime_loop(precision: str, subject: Subject) -> Draw:
    """ONNX Runtime directly: ``InferenceSession.run`` in a loop."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = subject.threads
    path = subject.bundles[precision] / "engines/onnxruntime/frame" / ort.MODEL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feeds = subject.feeds(precision, "onnxruntime")
    return lambda skeleton: session.run(None, {**feeds, "pose": skeleton[None]})[0][0]


def _torch_frame(subject: Subject, device: str = "cpu") -> tuple[nn.Module, list[torch.Tensor]]:
    """The frame of the float student as a module, and its noise and the person's tensors, in the module's order."""
    feeds, boundary = (
        subject.feeds("fp32", "torch"),
        artifact.load(subject.bundles["fp32"], "bundle").signatures["frame"],
    )
    rest = [torch.from_numpy(feeds[spec.name]).to(device) for spec in boundary.inputs[1:]]
    return modules(subject.student)["frame"].to(device).requires_grad_(False), rest


def eager(subject: Subject) -> Draw:
    """The student in eager torch, under ``inference_mode``."""
    frame, rest = _torch_frame(subject)
    return _torch_draw(frame, rest)


def compiled(subject: Subject) -> Draw:
    """The student by ``torch.compile`` (inductor), which compiles C++ on the CPU."""
    if not shutil.which("g++"):
        raise BackendError("torch.compile needs g++ on the CPU", expected="a compiler", fix="install g++")
    frame, rest = _torch_frame(subject)
    return _torch_draw(torch.compile(frame), rest)


def _torch_draw(frame: Any, rest: list[torch.Tensor], device: str = "cpu") -> Draw:
    @torch.inference_mode()
    def draw(skeleton: np.ndarray) -> np.ndarray:
        pose = torch.from_numpy(skeleton)[None].to(device)
        return frame(pose, *rest)[0][0].cpu().numpy()

    return draw


def compiled_gpu(subject: Subject) -> Draw:
    """The student by ``torch.compile`` on an NVIDIA GPU, without CUDA graphs."""
    _require_gpu()
    frame, rest = _torch_frame(subject, "cuda")
    return _torch_draw(torch.compile(frame), rest, "cuda")


def cuda_graph(subject: Subject) -> Draw:
    """The student in eager torch, captured once as a CUDA graph and replayed."""
    _require_gpu()
    frame, rest = _torch_frame(subject, "cuda")
    pose = torch.zeros((1, *subject.person.shape), dtype=torch.uint8, device="cuda")
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.inference_mode():
        with torch.cuda.stream(side):  # libraries allocate their workspaces outside the graph
            for _ in range(3):
                frame(pose, *rest)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            image = frame(pose, *rest)[0]

    def draw(skeleton: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            pose.copy_(torch.from_numpy(skeleton)[None])
            graph.replay()
            return image[0].cpu().numpy()

    return draw


def _require_gpu() -> None:
    if not torch.cuda.is_available():
        raise BackendError(
            "torch finds no CUDA device", expected="an NVIDIA GPU and torch with CUDA", fix="run this on a GPU"
        )


def diffusers_pipeline(encode_every_time: bool, subject: Subject) -> Draw:
    """A ``DiffusionPipeline`` around the same network and decoder; ``encode_every_time``: the source too, as pipelines
    that take a picture do, since they keep nothing between calls."""
    import_extra("diffusers", "distill")
    from benchmarks.peers.diffusers_style import make_pipeline

    student, loaded = load_student(subject.student)
    noise = torch.from_numpy(np.load(subject.bundles["fp32"] / "noise.npy"))
    pipe = make_pipeline(student.eval().requires_grad_(False))
    source = {"image": subject.person} if encode_every_time else {"source": pipe.encode_source(subject.person)}
    steps = int(loaded.config["steps"])
    return lambda skeleton: pipe(pose=skeleton, latents=noise, num_inference_steps=steps, **source)[0]


def teacher(steps: int, subject: Subject) -> Draw:
    """The teacher in eager torch by ``steps`` guided Euler steps; the person is encoded once."""
    model = load_teacher(subject.teacher)
    noise = torch.from_numpy(np.load(subject.bundles["fp32"] / "noise.npy"))
    with torch.inference_mode():
        pixels = torch.from_numpy(to_model(subject.person[None]))
        source = encoded(model.autoencoder, pixels, torch.full((1, 18, 2), float("nan")))
        known = model.condition(source, torch.zeros_like(pixels))

    @torch.inference_mode()
    def draw(skeleton: np.ndarray) -> np.ndarray:
        pose = to_float(torch.from_numpy(skeleton)[None])
        posed = known | encode_pose(model.network, model.autoencoder, pose, known)  # type: ignore[attr-defined]
        latent = sample_teacher(model, noise, posed, steps)[-1]
        return from_model(model.autoencoder.decode(latent, posed).numpy())[0]

    return draw
