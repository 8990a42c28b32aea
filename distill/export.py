"""Student → ONNX: ``prepare.onnx`` (once per identity) and ``frame.onnx`` (per frame), checked against torch before
they are kept.

The frame is one graph: pose encoder, the unrolled steps, the decoder and the conversion to uint8. Its times are
constants, so time embedding and adaLN fold away.
"""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distill.student import Student, load_student
from distill.teacher import encode_pose
from rpfm_edge import artifact
from rpfm_edge.artifact import Artifact, Stage, tool_versions
from rpfm_edge.errors import ParityError
from rpfm_edge.flow import check_steps
from rpfm_edge.signature import Signature, TensorSpec

OPSET = 20
TOLERANCE = 1e-4  # max abs in FP32, on keys and values and on the image in [-1, 1] before it is rounded
TOOLS = ("torch", "onnx", "onnxscript", "onnxsim", "onnxruntime")
FACTORY = "distill.export:reference"


class Prepare(nn.Module):
    """(1, H, W, 3) uint8 source → (layers, 2, heads, N, hd) keys and values."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(self, source: Tensor) -> Tensor:
        latent = self.student.autoencoder.encode(to_float(source))
        return self.student.network.source_kv(latent)[:, :, 0].float()  # whatever the network computes in


class Frame(nn.Module):
    """(1, H, W, 3) uint8 skeleton, (1, C, h, w) noise, keys and values → (1, H, W, 3) image, as uint8 and as [-1, 1]
    float."""

    def __init__(self, student: Student, steps: int) -> None:
        super().__init__()
        self.student, self.steps = student, steps

    def forward(self, pose: Tensor, noise: Tensor, source_kv: Tensor) -> tuple[Tensor, Tensor]:
        features = encode_pose(self.student.network, self.student.autoencoder, to_float(pose))
        condition = {"pose": features, "source_kv": source_kv.unsqueeze(2)}
        image = self.student.autoencoder.decode(self.student.sample(noise, condition, self.steps)).permute(0, 2, 3, 1)
        image = image.float()  # grey levels in half precision would have steps of 1/8
        return ((image + 1) * 127.5).round().clamp(0, 255).to(torch.uint8), image


def to_float(image: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 → (B, 3, H, W) in [-1, 1]."""
    return image.float().permute(0, 3, 1, 2) / 127.5 - 1  # cast first: TensorRT moves no uint8


def signatures(student: Student, size: tuple[int, int]) -> dict[str, Signature]:
    """The boundaries of both graphs."""
    config = student.network.config
    image = (1, *size, 3)
    source_kv = TensorSpec("source_kv", config.source_kv_shape, "float32")
    noise = TensorSpec("noise", (1, *config.latent_shape), "float32")
    return {
        "prepare": Signature((TensorSpec("source", image, "uint8"),), (source_kv,)),
        "frame": Signature(
            (TensorSpec("pose", image, "uint8"), noise, source_kv), (TensorSpec("image", image, "uint8"),)
        ),
    }


def export(path: str | Path, out: Path, steps: int | None = None, noise_seed: int = 0) -> Artifact:
    """Export the student artifact at ``path`` to a graph artifact at ``out``.

    Args:
        steps: unrolled steps; default: those the student was distilled for.
        noise_seed: of the noise that the graph artifact carries and every frame uses by default.

    Raises:
        ConfigError: the student has not learnt to run with ``steps``.
        ParityError: the ONNX graph and torch disagree by more than 1e-4; nothing is written then.
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
        "latent_shape": list(student.network.config.latent_shape),
        "factory": FACTORY,
        "student": loaded.digest,
    }
    with artifact.replacing_folder(out, "graph") as folder:
        deviation = {
            name: write_graph(module, boundary[name], feeds[name], folder / f"{name}.onnx")
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
    """Real-looking inputs for both graphs: random pictures, the noise, and the keys and values that torch computes."""
    rng = np.random.default_rng(0)
    source, pose = (rng.integers(0, 256, boundary["prepare"].inputs[0].shape, dtype=np.uint8) for _ in range(2))
    with torch.no_grad():
        source_kv = Prepare(student)(torch.from_numpy(source)).numpy()
    return {"prepare": {"source": source}, "frame": {"pose": pose, "noise": noise, "source_kv": source_kv}}


def write_graph(module: nn.Module, signature: Signature, feeds: dict[str, np.ndarray], path: Path) -> float:
    """Export, simplify, compare with torch on ``feeds`` and write; returns the largest absolute deviation.

    A module may return a second tensor, its result before rounding: only that one shows how near the graph is, so it is
    compared too, and left out of the file.
    """
    import onnx

    model = simplified(module, signature)
    deviation = max_deviation(module, model, feeds)
    if not deviation <= TOLERANCE:  # nan must not pass
        raise ParityError(
            f"{path.name} differs from torch by {deviation:.2g}",
            expected=f"at most {TOLERANCE:g}",
            fix="check the versions of torch, onnx and onnxsim (rpfm-edge doctor)",
        )
    del model.graph.output[len(signature.outputs) :]
    onnx.save(model, path)
    return deviation


def simplified(module: nn.Module, signature: Signature) -> Any:
    """The ONNX model of ``module`` after onnxsim, inputs and outputs named by the signature."""
    import onnx
    import onnxsim

    example = tuple(torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in signature.inputs)
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated, but eight times as fast for the same graph
        torch.onnx.export(
            module.eval(),
            example,
            stream,
            input_names=[spec.name for spec in signature.inputs],
            output_names=[spec.name for spec in signature.outputs],
            opset_version=OPSET,
            dynamo=False,
        )
    with quiet():
        model, valid = onnxsim.simplify(onnx.load_from_string(stream.getvalue()))
    if not valid:
        raise ParityError(
            "onnxsim changed what the graph computes", expected="the same results", fix="use the pinned onnxsim version"
        )
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Send what C++ code writes to standard error to nowhere: onnxsim reports every node that it may not fold."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def max_deviation(module: nn.Module, model: Any, feeds: dict[str, np.ndarray]) -> float:
    """Largest absolute difference between the float outputs of torch and of ONNX Runtime on ``feeds``."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        result = module.eval()(*(torch.from_numpy(value) for value in feeds.values()))
    expected = result if isinstance(result, tuple) else (result,)
    pairs = zip(session.run(None, feeds), expected, strict=True)
    return max(float(np.abs(got - want.numpy()).max()) for got, want in pairs if want.is_floating_point())


def reference(folder: Path) -> dict[str, Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]]:
    """The graphs as torch runs them, from a student artifact: what the ``torch`` backend calls."""
    graphs, outputs = modules(folder), {"prepare": "source_kv", "frame": "image"}

    def runner(name: str) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
        @torch.inference_mode()
        def run(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            result = graphs[name](
                **{key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in feeds.items()}
            )
            return {outputs[name]: (result[0] if isinstance(result, tuple) else result).numpy()}

        return run

    return {name: runner(name) for name in graphs}


def modules(folder: Path) -> dict[str, nn.Module]:
    """The graphs as modules, from a student artifact: what the ``torch-tensorrt`` backend compiles.

    Their outputs begin with those of the signature; a frame adds its image before rounding.
    """
    student, loaded = load_student(folder)
    return {"prepare": Prepare(student).eval(), "frame": Frame(student, int(loaded.config["steps"])).eval()}
