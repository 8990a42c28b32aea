"""What runs in torch's interpreter: pictures of teacher and student in FP32, and the frames to compare with."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill.condition import Tensors, encode_pose, encoded
from distill.export import to_float
from distill.reference import student_images
from distill.student import Student, load_student
from distill.teacher import NetworkTeacher, load_teacher, sample_teacher
from rpfm_edge.core import artifact
from rpfm_edge.core.files import write_bytes
from rpfm_edge.judge.quality import circumstances, measure_stage, teacher_stages
from rpfm_edge.measure import metrics
from rpfm_edge.measure.machine import where
from rpfm_edge.measure.metrics import psnr_db
from rpfm_edge.people.held_out import draw_pairs
from rpfm_edge.people.image import to_model
from rpfm_edge.people.pose import draw_skeleton
from rpfm_edge.people.splits import open_splits
from scripts.gpu_parts import timing
from scripts.gpu_parts.cases import read_case
from scripts.gpu_parts.engine_side import PARTS, load_pairs
from scripts.gpu_parts.worker import Verb

TEACHER_STEPS = 25
EAGER, COMPILED, GRAPH = "torch eager", "torch.compile", " + CUDA graph"
TEACHER = f"teacher, guided, {TEACHER_STEPS} Heun steps, torch eager"
CONTENDERS = {
    "eager": EAGER,
    "eager+graph": EAGER + GRAPH,
    "compile": COMPILED,
    "compile+graph": COMPILED + GRAPH,
    "teacher": TEACHER,
}
Call = Callable[[], np.ndarray]
Run = Callable[[torch.Tensor], torch.Tensor]  # (1, H, W, 3) uint8 pose → (1, H, W, 3) uint8 picture, on the device


def device() -> torch.device:
    """The GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def forbid_tf32() -> None:
    """Let FP32 mean FP32; convolutions are in TF32 otherwise."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def torch_machine() -> dict[str, Any]:
    """The machine, torch's version, and the name of its GPU (None without one)."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    cuda = {"cuda": str(torch.version.cuda)} if name else {}
    return {"machine": where({"torch": str(torch.__version__)} | cuda), "gpu": name}


def reference(case: str, data: str, count: int, out: str) -> dict[str, Any]:
    """Draw held-out pairs and write them with what torch makes of them in FP32.

    The file holds the fields of ``validate.Pairs``, ``teacher`` and ``student`` (n, H, W, 3), and ``frame``: the
    student's picture of the first pair at the bundle's own noise. Returns the teacher's stages and the circumstances.
    """
    forbid_tf32()
    chosen = read_case(Path(case))
    bundle = artifact.load(chosen.bundle("fp16"), "bundle")
    size, shape = tuple(bundle.config["size"]), tuple(bundle.config["latent_shape"])
    pairs = draw_pairs(open_splits(data).test, count, size, shape)
    teacher, stages = teacher_stages(chosen.teacher, pairs, chosen.steps)
    student = student_images(chosen.student, *pairs.inputs, [chosen.steps])[chosen.steps]
    noise = np.load(bundle.file("noise.npy"), allow_pickle=False)
    first = (*(array[:1] for array in pairs.inputs[:3]), noise)
    frame = student_images(chosen.student, *first, [chosen.steps])[chosen.steps]
    arrays = {name: getattr(pairs, name) for name in PARTS}
    made = {"teacher": teacher, "student": student, "frame": frame[0], "bundle_noise": noise}
    stream = BytesIO()
    np.savez(stream, names=np.array(pairs.names), **arrays, **made)
    write_bytes(Path(out), stream.getvalue())
    judged = {"stage": "student, torch fp32", **measure_stage(student, teacher, pairs, (), ())}
    return {"stages": [*stages, judged], **circumstances(pairs)}


def judge(pairs: str, images: str, stage: str) -> dict[str, Any]:
    """A stage's drift against the teacher, the truth and the student in torch FP32 (``against_student``)."""
    drawn, made = load_pairs(pairs)
    with np.load(images, allow_pickle=False) as stored:
        found = stored["images"]
    measured = measure_stage(found, made["teacher"], drawn, (), ())
    return {"stage": stage, **measured, "against_student": metrics.compare(made["student"], found)}


@torch.inference_mode()  # type: ignore[untyped-decorator]
def open_torch(case: str, pairs: str, names: list[str], dtype: str) -> dict[str, Any]:
    """Time the frame in torch, in each way of ``names`` (keys of ``CONTENDERS``).

    Returns label → PSNR of the student's ways against FP32, so that they are seen to do the same work.
    """
    forbid_tf32()
    chosen, kind, (drawn, made) = read_case(Path(case)), getattr(torch, dtype), load_pairs(pairs)
    student, _ = load_student(chosen.student)
    student.to(device())
    source = torch.from_numpy(to_model(drawn.sources[:1])).to(device())
    joints = torch.from_numpy(drawn.source_poses[:1]).to(device())
    tensors = student.network.source(encoded(student.autoencoder, source, joints))
    tensors = {name: tensor.to(kind) for name, tensor in tensors.items()}
    lower(student.network, student.autoencoder, kind)
    noise = torch.from_numpy(made["bundle_noise"]).to(device(), kind)
    skeleton = draw_skeleton(drawn.poses[0], drawn.sources.shape[1:3])
    run = student_run(student, chosen.steps, noise, tensors, kind)
    distances: dict[str, Any] = {}
    for name, call in student_calls(run, skeleton, names).items():
        distances[CONTENDERS[name]] = psnr_db(made["frame"], call())
        timing.add(CONTENDERS[name], call)
    if "teacher" in names:
        known = (drawn.sources[:1], drawn.source_poses[:1])
        taught = on_host(teacher_run(chosen.teacher, *known, noise, kind), skeleton)
        taught()
        timing.add(TEACHER, taught, slow=True)
    return {"psnr_db": distances}


def lower(network: Any, autoencoder: Any, dtype: torch.dtype) -> None:
    """Compute in ``dtype``, but embed times in FP32: their sinusoids have no room in FP16."""
    embeddings = {name: getattr(network, name) for name in ("time", "step")}
    for name in embeddings:
        setattr(network, name, None)
    network.to(dtype)
    autoencoder.to(dtype)
    for name, embedding in embeddings.items():
        if embedding is not None:
            embedding.register_forward_hook(lambda module, arguments, output: output.to(dtype))
        setattr(network, name, embedding)


def student_run(student: Student, steps: int, noise: torch.Tensor, tensors: Tensors, dtype: torch.dtype) -> Run:
    """The student's frame; noise and the source's tensors stay on the device."""

    def run(pose: torch.Tensor) -> torch.Tensor:
        posed = encode_pose(student.network, student.autoencoder, to_float(pose).to(dtype), tensors)
        condition = tensors | posed
        latent = student.sample(noise, condition, steps)
        return to_levels(student.autoencoder.decode(latent, condition))

    return run


def teacher_run(teacher: Path, sources: np.ndarray, joints: np.ndarray, noise: torch.Tensor, dtype: torch.dtype) -> Run:
    """The teacher's frame: guided, ``TEACHER_STEPS`` steps; what depends on the source alone is computed before."""
    loaded = load_teacher(teacher)
    assert isinstance(loaded, NetworkTeacher)
    loaded.to(device())
    lower(loaded.network, loaded.autoencoder, dtype)
    source = torch.from_numpy(to_model(sources)).to(device(), dtype)
    given = encoded(loaded.autoencoder, source, torch.from_numpy(joints).to(device(), dtype))
    kept = loaded.condition(given, source)

    def run(pose: torch.Tensor) -> torch.Tensor:
        condition = kept | encode_pose(loaded.network, loaded.autoencoder, to_float(pose).to(dtype), kept)
        latent = sample_teacher(loaded, noise, condition, TEACHER_STEPS, "heun")[-1]
        return to_levels(loaded.autoencoder.decode(latent, condition))

    return run


def to_levels(image: torch.Tensor) -> torch.Tensor:
    """(1, 3, H, W) in [-1, 1] → (1, H, W, 3) uint8, as the exported frame rounds."""
    levels = (image.permute(0, 2, 3, 1).float() + 1) * 127.5
    return levels.round().clamp(0, 255).to(torch.uint8)


def student_calls(run: Run, skeleton: np.ndarray, names: list[str]) -> dict[str, Call]:
    """Name → the frame in that way; CUDA graphs hold the default compilation's kernels, or the eager ones."""
    compiled: Run = torch.compile(run, dynamic=False, fullgraph=True)
    ways = {"eager": run, "compile": compiled}
    return {
        name: on_host(ways[name.partition("+")[0]], skeleton, captured="+" in name)
        for name in CONTENDERS
        if name in names and name != "teacher"
    }


def on_host(run: Run, skeleton: np.ndarray, captured: bool = False) -> Call:
    """``run`` from a picture on the host to a picture on the host, through pinned memory as TensorRT's session does."""
    on_gpu = device().type == "cuda"
    shape = (1, *skeleton.shape)
    staged, result = (torch.empty(shape, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(2))
    pose = torch.from_numpy(skeleton[None].copy()).to(device())
    step = graphed(run, pose) if captured else lambda: run(pose)

    def call() -> np.ndarray:
        with torch.inference_mode():
            staged.copy_(torch.from_numpy(skeleton)[None])
            pose.copy_(staged, non_blocking=True)
            result.copy_(step(), non_blocking=True)
            if on_gpu:
                torch.cuda.synchronize()
        return np.array(result[0].numpy())

    return call


def graphed(run: Run, pose: torch.Tensor) -> Callable[[], torch.Tensor]:
    """``run`` on the memory of ``pose``, captured as one CUDA graph."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # what is set up at the first runs must not be captured
        for _ in range(3):
            run(pose)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        image = run(pose)

    def replay() -> torch.Tensor:
        graph.replay()
        return image

    return replay


VERBS: dict[str, Verb] = timing.VERBS | {
    "torch_machine": torch_machine,
    "reference": reference,
    "judge": judge,
    "open_torch": open_torch,
}
