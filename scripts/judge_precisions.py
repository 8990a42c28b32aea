"""The precisions of one graph side by side on people that nobody trained, calibrated or planned with.

    python scripts/judge_precisions.py GRAPH [NAME=QUANTIZED …] --data DATA --out precisions.json

GRAPH is a float graph artifact; the others are made from it. NNCF with its defaults (``nncf.quantize``, nothing else)
stands beside them, as what one gets without this package. All on OpenVINO; frames are timed in turns.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from rich.console import Console
from rich.table import Table

from quantize import calibrate
from rpfm_edge.bundle.engines import size_bytes
from rpfm_edge.bundle.pipeline import Pipeline
from rpfm_edge.chain import build
from rpfm_edge.core import artifact
from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.errors import RpfmError
from rpfm_edge.core.files import write_text
from rpfm_edge.judge.quality import images_of
from rpfm_edge.measure import clock, metrics
from rpfm_edge.measure.clock import steady
from rpfm_edge.measure.joints import pose_accuracy
from rpfm_edge.measure.machine import where
from rpfm_edge.people.held_out import Pairs, draw_pairs
from rpfm_edge.people.splits import open_splits

BACKEND = "openvino"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 after an error, which is said in one sentence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("graph", type=Path)
    parser.add_argument("quantized", nargs="*", help="NAME=PATH")
    parser.add_argument("--data", default="sample")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=60)
    given = parser.parse_args(arguments)
    try:
        rows = run(given)
    except RpfmError as error:
        print(f"judge_precisions: {error}", file=sys.stderr)
        return 2
    show(rows)
    return 0


def run(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure, write ``given.out``, and return a row for each graph."""
    graph, splits, work = artifact.load(given.graph, "graph"), open_splits(given.data), given.out.with_suffix(".work")
    size, shape = tuple(graph.config["size"]), graph.config["latent_shape"]
    pairs = draw_pairs(splits.test, given.pairs, size, shape)
    samples = calibrate.record(graph, splits.training, work / "samples.safetensors", given.samples)
    graphs = {"float": graph.path, "NNCF defaults": naive(graph, samples, work / "naive")}
    graphs |= {name: Path(path) for name, _, path in (text.partition("=") for text in given.quantized)}
    bundles = {name: build.build(path, work / "bundles" / name, BACKEND) for name, path in graphs.items()}
    images = {name: images_of(made, BACKEND, pairs) for name, made in bundles.items()}
    times = frame_times(bundles, pairs, given.rounds)
    rows = [judge(name, made, images, pairs) | {"frame": times[name].to_json()} for name, made in bundles.items()]
    found = {"rows": rows, "pairs": len(pairs.names), "samples": given.samples, "machine": where()}
    write_text(given.out, json.dumps(found, indent=1))
    return rows


def naive(graph: Artifact, samples: Path, out: Path) -> Path:
    """The graph as NNCF quantizes it by itself."""
    os.environ.setdefault("NNCF_CI", "1")
    import nncf

    nncf.set_log_level(logging.ERROR)
    recorded = calibrate.load(samples)
    with artifact.replacing_folder(out, "graph") as folder:
        for name in ("prepare", "frame"):
            data = nncf.Dataset(list(recorded.feeds(name)), dict)
            onnx.save(nncf.quantize(onnx.load(graph.file(f"{name}.onnx")), data), folder / f"{name}.onnx")
        (folder / "noise.npy").write_bytes(graph.file("noise.npy").read_bytes())
        names = ("steps", "size", "latent_shape", "pose")  # older graphs do not say the pose
        kept = {key: graph.config[key] for key in names if key in graph.config}
        artifact.seal(folder, "graph", kept | {"precision": "int8"}, graph.signatures, graph.lineage)
    return out


def frame_times(bundles: dict[str, Artifact], pairs: Pairs, rounds: int) -> dict[str, clock.Latency]:
    """A frame without drawing, of each bundle, in turns."""
    with ExitStack() as opened:
        calls: dict[str, Callable[[], object]] = {}
        for name, made in bundles.items():
            pipe = opened.enter_context(Pipeline.open(made.path, BACKEND))
            calls[name] = partial(pipe.render_input, pipe.prepare(pairs.sources[0]), pipe.pose_input(pairs.poses[0]))
        return steady(calls, rounds, warmup=3)


def judge(name: str, made: Artifact, images: dict[str, np.ndarray], pairs: Pairs) -> dict[str, Any]:
    """Distances to the float graph, errors against the truth in multiples of its errors, joints in place."""
    exact, ours, truth = images["float"], images[name], pairs.truths
    errors = [float(np.mean((made.astype(float) - truth) ** 2)) for made in (exact, ours)]
    distances = [metrics.compare(truth, made) for made in (exact, ours)]
    ratios = {"mse": errors[1] / errors[0], "flip": distances[1]["flip"]["mean"] / distances[0]["flip"]["mean"]}
    pose: dict[str, Any] = pose_accuracy(ours, pairs.poses).get("pose", {})
    return {
        "name": name,
        "against_float": metrics.compare(exact, ours),
        "truth_ratio": ratios,
        "pck": pose.get("pck", {}).get("mean"),
        "engine_bytes": size_bytes(made, BACKEND),
    }


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("graph", "PSNR", "least", "SSIM", "MSE ×", "FLIP ×", "PCK", "p50 ms", "× float", "MiB", box=None)
    exact_s = rows[0]["frame"]["p50_s"]
    for row in rows:
        drift, frame = row["against_float"], row["frame"]
        table.add_row(
            row["name"],
            f"{drift['psnr_db']['median']:.1f}",
            f"{drift['psnr_db']['p05']:.1f}",
            f"{drift['ssim']['median']:.4f}",
            f"{row['truth_ratio']['mse']:.4f}",
            f"{row['truth_ratio']['flip']:.4f}",
            "–" if row["pck"] is None else f"{row['pck']:.3f}",
            f"{1e3 * frame['p50_s']:.2f}",
            f"{exact_s / frame['p50_s']:.2f}",
            f"{row['engine_bytes'] / 2**20:.1f}",
        )
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
