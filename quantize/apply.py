"""Graph → graph in another precision, checked against the graph it came from before it is kept."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx

from quantize import calibrate
from quantize.calibrate import Samples
from quantize.execute import Graph
from quantize.float16 import to_float16
from quantize.fp8 import to_fp8
from quantize.int8 import Control, Int8Config, to_int8
from quantize.methods import divide, frame_control
from quantize.nvfp4 import to_nvfp4
from quantize.typed import FOLDER as TYPED
from quantize.typed import to_typed
from quantize.weight_only import to_weight_only
from rpfm_edge.core import artifact
from rpfm_edge.core.artifact import Artifact, Stage, tool_versions
from rpfm_edge.core.errors import ArtifactError, ConfigError, ParityError
from rpfm_edge.core.precisions import CALIBRATED, ROWS, Precision
from rpfm_edge.core.signature import Feeds
from rpfm_edge.measure.metrics import psnr_db
from rpfm_edge.people.pose import passed, pose_input, pose_kind, prepare_feeds
from rpfm_edge.people.splits import open_splits

GRAPHS = ("prepare", "frame")
TOOLS = ("nncf", "onnx", "onnxruntime")
# whose graphs for strongly typed libraries ONNX Runtime runs, too
TYPED_RUN = ("int8", *(name for name, row in ROWS.items() if row.weight_bits))
FLOAT_ONLY = ("factory", "student", "parity_max_abs")  # of the config: true of the exported graph alone


def quantize(
    graph: Artifact,
    precision: Precision,
    out: Path,
    samples: Path | None = None,
    options: Int8Config | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Artifact:
    """Write ``graph`` in ``precision`` to ``out``: a graph artifact with the same signatures and noise.

    "fp32" is a copy. All others leave the float student behind: no backend can run it in the graph's stead.

    Args:
        samples: from ``calibrate.record`` with this very graph; fp16 and weights alone need none, and are then checked
            on random pictures, or on people of the packaged sample where the pose is keypoints.
        options: of int8.
        facts: how the options were found; they go into the lineage.

    Raises:
        ConfigError: an unknown precision, or one that is calibrated without samples.
        ArtifactError: no graph, one that is quantized already, samples of another graph.
        ParityError: images too far from those of ``graph``, or values that are not finite; nothing is written then.
    """
    _check_request(graph, precision, samples)
    options = options or Int8Config()
    recorded = calibrate.load(samples) if samples else None
    if recorded:
        recorded.check(graph)
    inputs = {"graph": graph.digest} | ({"samples": recorded.sha256} if recorded else {})
    settings: dict[str, Any] = {"precision": precision} | (asdict(options) if precision == "int8" else {})
    settings |= facts or {}
    with artifact.replacing_folder(out, "graph") as folder:
        if precision == "fp32":
            _copy(graph, folder, tuple(graph.files))
            config = dict(graph.config)
        else:
            layers = _convert(graph, precision, folder, recorded, options)
            settings["psnr_db"] = _check(graph, folder, recorded, precision)
            if precision in TYPED_RUN and (folder / TYPED).is_dir():  # ONNX Runtime has no operator of TensorRT
                settings["typed_psnr_db"] = _check(graph, folder / TYPED, recorded, precision)
            config = {key: value for key, value in graph.config.items() if key not in FLOAT_ONLY}
            config |= {"precision": precision} | layers
        stage = Stage("quantize", settings, tool_versions(*TOOLS), inputs)
        artifact.seal(folder, "graph", config, graph.signatures, (*graph.lineage, stage))
    return artifact.load(out, "graph")


def _check_request(graph: Artifact, precision: str, samples: Path | None) -> None:
    if precision not in get_args(Precision):
        raise ConfigError(
            f"unknown precision {precision!r}", expected=f"one of {get_args(Precision)}", fix="check the spelling"
        )
    if graph.kind != "graph":
        raise ArtifactError(f"{graph.path} is a {graph.kind}", expected="a graph", fix="export the student first")
    if graph.config["precision"] != "fp32":
        raise ArtifactError(
            f"{graph.path} is in {graph.config['precision']} already",
            expected="an fp32 graph",
            fix="start from the export",
        )
    if precision in CALIBRATED and samples is None:
        raise ConfigError(
            f"{precision} without calibration samples", expected="a file of samples", fix="record some first"
        )


def _convert(
    graph: Artifact, precision: str, folder: Path, samples: Samples | None, options: Int8Config
) -> dict[str, dict[str, dict[str, int]]]:
    """Write both graphs and the noise; returns "int8_layers" and the like: graph → kind → how many.

    Where strongly typed libraries need another form of a graph, it is written beside it.
    """
    layers: dict[str, dict[str, dict[str, int]]] = {}
    judging, control = None, None
    if samples and precision == "int8" and options.least_psnr_db is not None:
        samples, judging = divide(samples)
    for name in GRAPHS:
        model = onnx.load(graph.file(f"{name}.onnx"))
        if judging and name == "frame":
            control = frame_control(graph, folder / "prepare.onnx", judging, options)
        plain, typed, counts = _converted(model, precision, samples.feeds(name) if samples else (), options, control)
        onnx.save(plain, folder / f"{name}.onnx")
        if typed is not None:
            (folder / TYPED).mkdir(exist_ok=True)
            onnx.save(typed, folder / TYPED / f"{name}.onnx")
        for kind, found in counts.items():
            layers.setdefault(f"{kind}_layers", {})[name] = found
    _copy(graph, folder, ("noise.npy",))
    return layers


def _converted(
    model: onnx.ModelProto, precision: str, feeds: Iterable[Feeds], options: Int8Config, control: Control | None
) -> tuple[onnx.ModelProto, onnx.ModelProto | None, dict[str, dict[str, int]]]:
    """The graph, its form for strongly typed libraries if it has one, and type → kind → how many layers have it."""
    if precision == "int8":
        plain, counts = to_int8(model, feeds, options, control)
        # TensorRT takes signed activations only
        return plain, to_typed(plain) if options.activations == "signed" else None, {"int8": counts}
    if bits := ROWS[precision].weight_bits:
        plain, counts = to_weight_only(model, bits)
        return plain, to_typed(plain), {"weight": counts}
    if precision == "fp8":
        plain, counts = to_fp8(model, feeds)
        return plain, None, {"fp8": counts}
    if precision == "nvfp4":
        found = to_nvfp4(model, feeds)
        return found.plain, found.typed, {"nvfp4": found.fp4, "fp8": found.fp8}
    return to_float16(model), None, {}


def _copy(graph: Artifact, folder: Path, files: tuple[str, ...]) -> None:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(graph.file(name), folder / name)


def _check(graph: Artifact, folder: Path, samples: Samples | None, precision: str) -> float:
    """Least PSNR over two samples, source to image, of the graphs in ``folder`` against the float ones."""
    exact, ours = ({name: Graph(where / f"{name}.onnx") for name in GRAPHS} for where in (graph.path, folder))
    worst = float("inf")
    for source, rest in _trials(graph, samples):
        known, found = (graphs["prepare"].named(source) for graphs in (exact, ours))
        if not all(np.isfinite(tensor).all() for tensor in found.values()):
            raise _refused(precision, "gives values that are not finite", "finite ones")
        expected, image = (
            graphs["frame"]({**rest, **passed(graph.signatures["frame"], tensors)})[0]
            for graphs, tensors in ((exact, known), (ours, found))
        )
        worst = min(worst, psnr_db(expected, image))
    if not worst >= (least := ROWS[precision].graph_db):
        raise _refused(precision, f"is {worst:.1f} dB from the float graph", f"at least {least:g} dB")
    return round(worst, 2)


def _refused(precision: str, problem: str, expected: str) -> ParityError:
    fix = "calibrate with more samples or other options" if precision in CALIBRATED else "stay with fp32"
    return ParityError(f"the {precision} graph {problem}", expected=expected, fix=fix)


def _trials(graph: Artifact, samples: Samples | None) -> Iterator[tuple[Feeds, Feeds]]:
    """Two pairs of feeds, of prepare and of frame without what prepare makes.

    Without samples they are random pictures. A graph that aligns the source with keypoints sees people of the packaged
    sample: random joints make a map that no person has.
    """
    boundary, kind = graph.signatures["prepare"], pose_kind(graph.signatures["frame"].input("pose"))
    shape = boundary.input("source").shape[1:]
    for place in (0, -1):
        if samples:
            pose, noise = samples.pose[place], samples.noise[place]
            source = samples.source[samples.index[place]]
        else:
            noise = np.load(graph.file("noise.npy"), allow_pickle=False)[0]
            if kind == "keypoints":
                people, size = open_splits("sample").test, (shape[0], shape[1])
                given, target = (int(index) for index in people.pairs[place])
                source, pose = people.image(given, size), pose_input(people.pose(target, size), kind, size)[0]
            else:
                rng = np.random.default_rng(-place)
                source, pose = (rng.integers(0, 256, shape, dtype=np.uint8) for _ in range(2))
        yield prepare_feeds(boundary, source), {"pose": pose[None], "noise": noise[None]}
