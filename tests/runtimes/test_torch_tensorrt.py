"""torch-tensorrt: FP16 in the program, refusals, and real builds for a GPU that is not here (slow)."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import runtimes
from rpfm_edge.chain.build import record
from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.errors import ArtifactError, BackendError, ConfigError
from rpfm_edge.core.signature import Signature
from rpfm_edge.measure.metrics import psnr_db
from runtimes import torch_trt
from runtimes.trt import store
from runtimes.trt.cuda import Device

torch = pytest.importorskip("torch")
VARIABLE = "RPFM_EDGE_TORCH_TENSORRT_PYTHON"
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if torch-tensorrt were here: what is refused before it is needed must not depend on it."""
    monkeypatch.setattr(torch_trt, "library", lambda: pytest.fail("nothing may be compiled"))


def arrays(feeds: dict[str, np.ndarray]) -> list[Any]:
    return [torch.from_numpy(value) for value in feeds.values()]


def products(program: Any) -> list[Any]:
    """The nodes that multiply: linear layers, convolutions and attention."""
    aten = torch.ops.aten
    kinds = (aten.linear.default, aten.conv2d.default, aten.scaled_dot_product_attention.default)
    return [node for node in program.graph.nodes if node.target in kinds]


def test_a_program_computes_what_the_module_does(graph: Artifact, tiny: Any) -> None:
    module = tiny.modules(graph.path / "student")["frame"]
    program = torch_trt.exported(module, tiny.SIGNATURE)
    image, tokens = program.module()(*arrays(tiny.feeds(0)))
    expected = tiny.factory(graph.path / "student")["frame"](tiny.feeds(0))
    np.testing.assert_allclose(tokens.numpy(), expected["tokens"], atol=1e-6)
    np.testing.assert_array_equal(image.numpy(), expected["image"])


def test_half_products(tiny_graph: Artifact) -> None:
    """Products in FP16, everything between and the boundary in FP32, near the same image."""
    from distill.export import modules

    rng = np.random.default_rng(0)
    feeds = {
        name: {
            spec.name: rng.integers(0, 256, spec.shape, dtype=np.uint8)
            if spec.dtype == "uint8"
            else rng.standard_normal(spec.shape, dtype=np.float32)
            for spec in signature.inputs
        }
        for name, signature in tiny_graph.signatures.items()
    }
    for name, module in modules(tiny_graph.path / "student").items():
        with torch_trt.half_products(module):
            program = torch_trt.exported(module, tiny_graph.signatures[name])
        assert {value.meta["val"].dtype for value in products(program)} == {torch.float16}
        norms = [node for node in program.graph.nodes if node.target is torch.ops.aten.layer_norm.default]
        assert norms
        assert {node.meta["val"].dtype for node in norms} == {torch.float32}
        (result,) = program.module()(*arrays(feeds[name]))
        with torch.no_grad():
            known = module(*arrays(feeds[name]))
        known = known[0] if isinstance(known, tuple) else known
        (spec,) = tiny_graph.signatures[name].outputs
        assert (tuple(result.shape), str(result.dtype)) == (spec.shape, f"torch.{spec.dtype}")
        if name == "frame":
            assert 48 < psnr_db(result[0].numpy(), known[0].numpy()) < np.inf  # 48 dB: one grey level everywhere
        else:
            assert 0 < (result - known).abs().max() < 2e-3 * known.abs().max()


def test_half_products_leave_the_map_in_single_precision(aligned_graph: Artifact) -> None:
    from distill.export import modules

    known = record(aligned_graph)
    assert known is not None
    signature, module = aligned_graph.signatures["frame"], modules(aligned_graph.path / "student")["frame"]
    grids: list[Any] = []

    def keep(part: Any, inputs: Any, output: Any) -> None:
        grids.append(output.grid)

    feeds = [torch.from_numpy(known[spec.name].astype(spec.dtype)) for spec in signature.inputs]
    hook = module.student.network.alignment.aligner.register_forward_hook(keep)
    with torch.no_grad():
        exact, _ = module(*feeds)
        with torch_trt.half_products(module):
            half, _ = module(*feeds)
    hook.remove()
    assert torch.equal(*grids)
    assert 40 < psnr_db(half[0].numpy(), exact[0].numpy()) < np.inf
    with torch_trt.half_products(module):
        program = torch_trt.exported(module, signature)
    kinds = [node.meta["val"].dtype for node in products(program)]
    assert {torch.float16, torch.float32} == set(kinds)


@pytest.mark.parametrize("without", ["student", "factory"])
def test_refuses_a_graph_without_its_student(
    make_graph: Callable[..., Artifact], engine: Path, without: str, library: None
) -> None:
    graph = make_graph(student=without != "student")
    if without == "factory":
        graph.config.pop("factory")  # type: ignore[attr-defined]
    message = "because the torch-tensorrt backend runs only the float student"
    with pytest.raises(BackendError, match=message):
        torch_trt.build(graph, "frame", engine, {})
    assert not list(engine.iterdir())


def test_refuses_a_graph_that_is_not_there(graph: Artifact, engine: Path, library: None) -> None:
    with pytest.raises(ArtifactError, match=r"has no prepare\.onnx"):
        torch_trt.build(graph, "prepare", engine, {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int8"}, r"torch-tensorrt option precision is 'int8': expected one of \['fp32', 'fp16'\]"),
        ({"optimization_level": 6}, r"torch-tensorrt option optimization_level is 6: expected an integer, 0 to 5"),
        ({"half": True}, r"unknown torch-tensorrt option 'half'"),
    ],
)
def test_refuses_options(graph: Artifact, engine: Path, options: dict[str, Any], message: str, library: None) -> None:
    with pytest.raises(ConfigError, match=message):
        torch_trt.build(graph, "frame", engine, options)
    assert not list(engine.iterdir())


@pytest.mark.skipif(runtimes.find_spec("torch_tensorrt") is not None, reason="torch-tensorrt is installed")
def test_without_the_library() -> None:
    message = r"backend torch-tensorrt is not installed: .*run: pip install 'rpfm-edge\[torch-tensorrt\]'"
    with pytest.raises(BackendError, match=message):
        runtimes.load("torch-tensorrt")


def test_without_a_gpu(graph: Artifact, engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch-tensorrt asks torch for the GPU while it is imported, and torch answers with a RuntimeError."""
    (tmp_path / "torch_tensorrt.py").write_text("raise RuntimeError('Found no NVIDIA driver on your system.\\nMore')")
    monkeypatch.syspath_prepend(str(tmp_path))
    message = r"torch-tensorrt cannot be imported \(Found no NVIDIA driver on your system\.\): expected an NVIDIA GPU"
    with pytest.raises(BackendError, match=message):
        torch_trt.build(graph, "frame", engine, {})
    assert not list(engine.iterdir())


def compiler(convert: Callable[..., bytes]) -> SimpleNamespace:
    """As much of torch-tensorrt as a build touches, for what happens around it."""
    dynamo = SimpleNamespace(convert_exported_program_to_serialized_trt_engine=convert)
    return SimpleNamespace(dynamo=dynamo, Input=lambda shape, dtype: (shape, dtype), tensorrt_package_name="tensorrt")


def test_a_module_that_cannot_be_converted(graph: Artifact, engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(program: Any, **settings: Any) -> bytes:
        raise RuntimeError("While interpreting the module got an error: Could not get tensor shape.\n\nWhile executing")

    monkeypatch.setattr(torch_trt, "library", lambda: compiler(convert))
    message = r"cannot compile graph frame \(Could not get tensor shape\.\): expected .* build for tensorrt instead"
    with pytest.raises(BackendError, match=message):
        torch_trt.compile_plan(graph, "frame", torch_trt.checked_options({}))


def test_names_and_types_reach_the_compiler(graph: Artifact, monkeypatch: pytest.MonkeyPatch, tiny: Any) -> None:
    asked: dict[str, Any] = {}

    def convert(program: Any, **settings: Any) -> bytes:
        asked.update(settings, types={node.meta["val"].dtype for node in products(program)})
        return b"plan"

    monkeypatch.setattr(torch_trt, "library", lambda: compiler(convert))
    option = torch_trt.checked_options({"precision": "fp16", "workspace_mib": 2})
    assert torch_trt.compile_plan(graph, "frame", option) == b"plan"
    assert asked["types"] == {torch.float16}
    assert asked["arg_inputs"] == [(spec.shape, getattr(torch, spec.dtype)) for spec in tiny.SIGNATURE.inputs]
    assert asked["arg_input_binding_names"] == ("pose", "noise", "source_kv")
    assert asked["output_binding_names"] == ("image", "tokens")
    assert asked["workspace_size"] == 2 * 2**20


def test_what_is_written_and_kept(graph: Artifact, tmp_path: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Around the compiler, which is not here: a plan is made once for a precision and a GPU, and opened as recorded."""
    made: list[Any] = []

    def convert(program: Any, **settings: Any) -> bytes:
        made.append(program)
        return b"plan %d" % len(made)

    monkeypatch.setattr(torch_trt, "library", lambda: compiler(convert))
    monkeypatch.setattr(torch_trt, "device", lambda: Device("GPU of a test", "8.6", "12.8"))
    known = SimpleNamespace(name="tensorrt", version="10.3.0", portable=False)
    monkeypatch.setattr(torch_trt, "load_library", lambda name: known)
    plans = []
    for options in ({}, {"precision": "fp16"}, {"identities": 1}):
        engine = tmp_path / f"engine{len(plans)}"
        engine.mkdir()
        torch_trt.build(graph, "frame", engine, options)
        plan, record = store.read(engine)
        assert (record["library"], record["version"]) == ("tensorrt", "10.3.0")
        assert record["device"]["name"] == "GPU of a test"
        plans.append(plan)
    assert plans == [b"plan 1", b"plan 2", b"plan 1"]
    asked: list[Any] = []
    monkeypatch.setattr(torch_trt.backend, "open", lambda *arguments: nullcontext(asked.append(arguments)))
    with torch_trt.open(engine, tiny.SIGNATURE, {"identities": 1}):
        running = {"library": "tensorrt", "cuda_graph": True, "identities": 1, "rebuild": False}
        assert asked == [(engine, tiny.SIGNATURE, running)]


@pytest.fixture(scope="module", params=[1, 4], ids=["1 step", "4 steps"])
def shipped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The float graph of student:xs."""
    from distill.export import export

    return export("student:xs", tmp_path_factory.mktemp("shipped") / "graph", steps=request.param)


def run_and_save(graph: Artifact, folder: Path) -> dict[str, np.ndarray]:
    """Inputs of both graphs as files of ``folder``; returns what the student makes of them, by output."""
    from distill.export import reference

    rng, student = np.random.default_rng(0), reference(graph.path / "student")
    source, pose = (rng.integers(0, 256, graph.signatures["prepare"].inputs[0].shape, dtype=np.uint8) for _ in range(2))
    known = student["prepare"]({"source": source})
    frame = {"pose": pose, "noise": np.load(graph.file("noise.npy")), **known}
    np.savez(folder / "prepare.npz", source=source)
    np.savez(folder / "frame.npz", **frame)
    return known | student["frame"](frame)


def counts(graph: Artifact) -> dict[str, dict[str, int]]:
    """Products that both graphs need: adaLN is constant, and the last block of prepare ends at its keys and values."""
    from distill.student import load_student

    student, loaded = load_student(graph.path / "student")
    network, autoencoder, depth = student.network, student.autoencoder, student.network.config.depth

    def convolutions(*parts: Any) -> int:
        return sum(isinstance(layer, torch.nn.Conv2d) for part in parts for layer in part.modules())

    steps = int(loaded.config["steps"])
    decoder = convolutions(network.pose_encoder, autoencoder.decoder, autoencoder.latent_to_patches)
    return {
        "prepare": {
            "MATRIX_MULTIPLY": 1 + 4 * (depth - 1) + 1,
            "CONVOLUTION": convolutions(autoencoder.encoder, autoencoder.patches_to_latent),
            "ATTENTION_OUTPUT": depth - 1,
        },
        "frame": {
            "MATRIX_MULTIPLY": steps * (1 + 4 * depth + 1),
            "CONVOLUTION": decoder,
            "ATTENTION_OUTPUT": steps * depth,
        },
    }


def check_network(network: dict[str, Any], signature: Signature, products: dict[str, int], kind: str) -> None:
    """The boundary is the signature's, every product that is needed is there once, in the type that was asked for."""
    types = {"UINT8": "uint8", "FLOAT": "float32"}
    for side, specs in (("inputs", signature.inputs), ("outputs", signature.outputs)):
        found = [(tensor, tuple(shape), types[dtype]) for tensor, dtype, shape in network[side]]
        assert found == [(spec.name, spec.shape, spec.dtype) for spec in specs]
    layers: dict[str, int] = network["layers"]
    for product, count in products.items():
        assert {key: value for key, value in layers.items() if key.startswith(product)} == {f"{product} {kind}": count}
    assert [key for key in layers if key.startswith("NORMALIZATION")] == ["NORMALIZATION FLOAT"]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_builds_engines_without_a_gpu(shipped: Artifact, tmp_path: Path, precision: str) -> None:
    """The real torch-tensorrt and the real builder, for SM86, in an environment of their own.

    The engine cannot run here. What runs is the program that torch-tensorrt lowered and turned into the network layer
    by layer: it must compute what the student does.
    """
    if not (python := os.environ.get(VARIABLE)):
        pytest.skip(f"${VARIABLE} names no python with torch-tensorrt-rtx: run scripts/prove_torch_tensorrt.sh")
    known, out = run_and_save(shipped, tmp_path), tmp_path / "out"
    out.mkdir()
    program = Path(__file__).with_name("build_without_gpu.py")
    command = [python, str(program), str(shipped.path), precision, str(tmp_path), str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    report = json.loads((out / "report.json").read_text())
    for name, signature in shipped.signatures.items():
        check_network(report[name], signature, counts(shipped)[name], {"fp32": "FLOAT", "fp16": "HALF"}[precision])
        size, seconds = (out / f"{name}.plan").stat().st_size, report[name]["seconds"]
        assert size > 1e6
        print(f"\n{name}, {shipped.config['steps']} steps, {precision}: {seconds:.1f} s, {size:,} bytes")
    source_kv, image = np.load(out / "prepare.npz")["source_kv"], np.load(out / "frame.npz")["image"]
    tolerance, least_db = {"fp32": (1e-5, 60), "fp16": (2e-3, 48)}[precision]
    assert np.abs(source_kv - known["source_kv"]).max() < tolerance * np.abs(known["source_kv"]).max()
    assert psnr_db(image[0], known["image"][0]) > least_db
