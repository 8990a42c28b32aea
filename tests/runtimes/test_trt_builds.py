"""TensorRT without a GPU: tensorrt_rtx parses and builds every graph that we export, and INT8 stays INT8 in it, as do
FP8 and NVFP4.

Its parser and its builder are the real ones. What is not shown here, because only a GPU can: that an engine loads, that
it computes the right picture, and how fast.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rpfm_edge.core import artifact, precisions, shipped
from rpfm_edge.core.artifact import Artifact
from rpfm_edge.people.data import sample_root
from rpfm_edge.people.deepfashion import open_split
from runtimes.trt import api, backend
from runtimes.trt.build import Settings, build_plan
from tests.runtimes import trt_log

pytest.importorskip("tensorrt_rtx", reason="run: pip install 'rpfm-edge[tensorrt-rtx]'")
pytest.importorskip("torch")
pytestmark = pytest.mark.slow

TARGETS = ("8.6", "8.9", "12.0")  # Ampere, Ada and Blackwell; Orin's 8.7 is none of tensorrt_rtx's


@pytest.fixture(scope="module")
def library() -> api.Library:
    return api.load("tensorrt_rtx")


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Artifact]:
    """(preset, precision) → its graph artifact, each made once."""
    from distill.export import export
    from quantize import apply, calibrate

    folder = tmp_path_factory.mktemp("graphs")

    def make(preset: str, precision: str) -> Artifact:
        out = folder / f"{preset}-{precision}"
        if out.exists():
            return artifact.load(out, "graph")
        if precision == "fp32":
            return export(student(preset, folder / preset), out, 1)
        exact, samples = make(preset, "fp32"), folder / f"{preset}.safetensors"
        calibrated = precision in precisions.CALIBRATED
        if calibrated and not samples.exists():
            calibrate.record(exact, open_split(sample_root(), "test"), samples, 8)
        return apply.quantize(exact, precision, out, samples if calibrated else None)  # type: ignore[arg-type]

    return make


def student(preset: str, out: Path) -> Path:
    """The shipped student, or one of that preset with random weights in every layer: "aligned-xs" wants keypoints."""
    if f"student:{preset}" in shipped.shipped():
        return shipped.resolve(f"student:{preset}")
    import torch

    from distill.autoencoder import AlignedAutoencoder, SmallAutoencoder, SmallAutoencoderConfig
    from distill.networks import create_network
    from distill.rpfm import preset as architecture
    from distill.student import DistillConfig, Student, save_student

    size, kind = preset.rpartition("-")[2], "keypoints" if preset.startswith("aligned-") else "skeleton"
    config = architecture(size, kind, step_embedding=True)  # type: ignore[arg-type]
    autoencoder = AlignedAutoencoder if kind == "keypoints" else SmallAutoencoder
    with torch.random.fork_rng():
        torch.manual_seed(0)
        decoder = autoencoder(SmallAutoencoderConfig(latent_channels=config.latent_channels))
        made = Student(create_network(config), decoder)
        with torch.no_grad():
            for parameter in made.parameters():  # some start at zero, and would fold away
                parameter.add_(0.02 * torch.randn_like(parameter))
    return save_student(made, out, DistillConfig(steps=1), (256, 176), ()).path


@pytest.fixture(params=["xs", "s", "aligned-xs"], scope="module")
def preset(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["fp16", "int8"], scope="module")
def graph(request: pytest.FixtureRequest, preset: str, graphs: Callable[[str, str], Artifact]) -> Artifact:
    return graphs(preset, request.param)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["prepare", "frame"])
def test_builds_with_int8_kernels_and_fused_attention(
    graph: Artifact, preset: str, name: str, target: str, library: api.Library
) -> None:
    log: list[str] = []
    file = backend.graph_file(graph, name, library)
    begun = time.monotonic()
    plan = build_plan(library, file, Settings(targets=(target,)), log=log.append)
    wanted = graph.config.get("int8_layers", {}).get(name, {})
    found, attention = trt_log.int8_products(log), trt_log.fused_attention(log)
    size, seconds = len(plan) / 2**20, time.monotonic() - begun
    print(f"{preset} {name} {graph.config['precision']} {target}: {seconds:.0f} s, {size:.1f} MiB, INT8 {found} of "
          f"{wanted}, attention {attention}")  # fmt: skip
    assert found == wanted
    depth = graph.signatures["prepare"].outputs[0].shape[1]
    # The last layer of prepare ends in its keys and values, which attend to nothing.
    assert attention == (depth - 1 if name == "prepare" else depth * graph.config["steps"])


@pytest.mark.parametrize("name", ["prepare", "frame"])
def test_builds_a_float_graph_that_aligns(
    graphs: Callable[[str, str], Artifact], name: str, library: api.Library
) -> None:
    assert build_plan(library, graphs("aligned-xs", "fp32").file(f"{name}.onnx"), Settings(targets=("8.6",)))


@pytest.fixture(scope="module")
def mixed(graphs: Callable[[str, str], Artifact], tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Every second unit of xs in INT8, the others in FP16, as a plan for TensorRT writes them."""
    from itertools import islice

    from quantize import calibrate
    from quantize import mixed as assignments
    from quantize.layers import load
    from quantize.ranges import observe
    from quantize.units import units

    folder, exact = tmp_path_factory.mktemp("mixed"), graphs("xs", "fp32")
    calibrate.record(exact, open_split(sample_root(), "test"), folder / "samples", 8)
    ranges, names = {}, {}
    for name in ("prepare", "frame"):
        model = load(exact.file(f"{name}.onnx"))
        feeds = list(islice(calibrate.load(folder / "samples").feeds(name), 8))
        ranges[name] = {one: seen.range("mse") for one, seen in observe(model, feeds, len(feeds)).items()}
        names[name] = tuple(unit.name for unit in units(model) if unit.quantizable and not unit.attention)[::2]
    return assignments.write(exact, assignments.Assignment(names, rest="fp16"), ranges, folder / "graph", {})


@pytest.mark.parametrize("name", ["prepare", "frame"])
def test_builds_a_mix_of_int8_and_fp16(mixed: Artifact, name: str, library: api.Library) -> None:
    log: list[str] = []
    build_plan(library, backend.graph_file(mixed, name, library), Settings(targets=("8.6",)), log=log.append)
    assert sum(mixed.config["int8_layers"][name].values()) > 3
    assert trt_log.int8_products(log) == mixed.config["int8_layers"][name]


@pytest.mark.parametrize("name", ["prepare", "frame"])
@pytest.mark.parametrize(("precision", "target"), [("fp8", "8.9"), ("fp8", "12.0"), ("nvfp4", "12.0")])
def test_builds_with_fp8_and_fp4_kernels(
    graphs: Callable[[str, str], Artifact], precision: str, target: str, name: str, library: api.Library
) -> None:
    log: list[str] = []
    graph = graphs("xs", precision)
    plan = build_plan(library, backend.graph_file(graph, name, library), Settings(targets=(target,)), log=log.append)
    wanted = {kind: graph.config.get(f"{kind}_layers", {}).get(name, {}) for kind in ("fp8", "nvfp4")}
    found = {"fp8": trt_log.products(log, "FP8"), "nvfp4": trt_log.products(log, "FP4E2M1")}
    attention, depth = trt_log.fused_attention(log), graph.signatures["prepare"].outputs[0].shape[1]
    print(f"xs {name} {precision} {target}: {len(plan) / 2**20:.1f} MiB, {found} of {wanted}, attention {attention}")
    assert found == wanted
    assert attention == (depth - 1 if name == "prepare" else depth * graph.config["steps"])
