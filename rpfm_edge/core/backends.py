"""The backends, one row each: what is known of one besides its module in ``runtimes``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Backend:
    """A backend, as ``runtimes.load`` opens it and tables name it."""

    module: str  # with the contract of ``core.runtime``
    libraries: tuple[str, ...]  # import names, of which it needs one
    extra: str  # of rpfm-edge, which installs it
    title: str
    distributions: tuple[str, ...]  # what pip may call the libraries: their versions are shown
    runs: Literal["graph", "student"] = "graph"  # the student itself, which a bundle does not carry, runs in FP32 alone
    on_gpu: bool = False  # its engines belong to one GPU
    fuses_attention: bool = False  # in FP16, and takes signed INT8 only
    biases: Literal["float", "int32"] = "float"  # of INT8 layers; without INT32 some stay float there
    narrow: tuple[str, ...] = ()  # the precisions that are no matter of course in which it computes


BACKENDS = {
    "openvino": Backend("runtimes.ov", ("openvino",), "openvino", "OpenVINO", ("openvino",)),
    "onnxruntime": Backend(
        "runtimes.ort",
        ("onnxruntime",),
        "onnxruntime",
        "ONNX Runtime",
        ("onnxruntime", "onnxruntime-gpu"),
        biases="int32",
    ),
    "tensorrt": Backend(
        "runtimes.trt.backend",
        ("tensorrt", "tensorrt_rtx", "tensorrt_lean", "tensorrt_dispatch"),
        "tensorrt",
        "TensorRT",
        ("tensorrt", "tensorrt-rtx", "cuda-bindings"),
        on_gpu=True,
        fuses_attention=True,
        narrow=("fp8", "nvfp4"),
    ),
    "torch-tensorrt": Backend(
        "runtimes.torch_trt",
        ("torch_tensorrt",),
        "torch-tensorrt",
        "Torch-TensorRT",
        ("torch-tensorrt", "torch-tensorrt-rtx"),
        runs="student",
        on_gpu=True,
        fuses_attention=True,
    ),
    "torch": Backend("runtimes.torch_reference", ("torch",), "distill", "Student, torch", ("torch",), runs="student"),
}


def runs_student(name: str) -> bool:
    """Whether the backend runs the student itself, not its graphs, and so in FP32 alone."""
    return BACKENDS[name].runs == "student"
