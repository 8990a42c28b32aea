"""Ways to INT8 beside plain calibration, judged by the picture: a sweep over NNCF's options, and its accuracy control.

Both divide the calibration samples by identity: three quarters calibrate, and on the people of the last one is judged.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx

from quantize import calibrate
from quantize.calibrate import Samples
from quantize.execute import Graph
from quantize.int8 import Control, Int8Config, Ranges, sign_activations, to_int8
from rpfm_edge.core.artifact import Artifact, tool_versions
from rpfm_edge.core.errors import InputError
from rpfm_edge.core.files import json_digest, write_text
from rpfm_edge.core.precisions import LEAST_SAMPLES
from rpfm_edge.core.progress import progress
from rpfm_edge.core.signature import Feeds
from rpfm_edge.measure.metrics import psnr_db, ssim
from rpfm_edge.people.data import identities_of

ALPHAS = (0.15, 0.25, 0.5, 0.75, 0.95)
LEAST_PSNR_DB = 48.0
HELD_OUT = 0.25
CAP_DB = 100.0  # of a picture that does not differ, whose PSNR is infinite
TIE_DB = 0.1  # what calibrating with other samples changes: below it the smaller graph is the better one


def choose(
    method: str, least_psnr_db: float | None, graph: Artifact, samples: Path, work: Path
) -> tuple[Int8Config, dict[str, Any]]:
    """The options of a method, and what is to be kept of how they were found: ``method``, and the rows of a sweep."""
    if method == "sweep":
        rows = sweep(graph, samples, work)
        return best_config(rows), {"method": method, "sweep": rows}
    if method == "accuracy-control":
        return Int8Config(least_psnr_db=LEAST_PSNR_DB if least_psnr_db is None else least_psnr_db), {"method": method}
    return Int8Config(), {}


def divide(samples: Samples) -> tuple[Samples, Samples]:
    """Those that calibrate and those that judge: a quarter of the identities of the sources, at least one.

    Raises:
        InputError: all sources show the same person, or too few samples are left to calibrate with.
    """
    people = identities_of(samples.facts["sources"])
    known = np.unique(people)
    if len(known) < 2:
        raise InputError(
            "the calibration samples show only one person", expected="two or more", fix="use a larger data set"
        )
    held = known[np.linspace(0, len(known) - 1, max(round(HELD_OUT * len(known)), 1)).astype(int)]
    judging = np.isin(people[samples.index], held)
    if (left := int((~judging).sum())) < LEAST_SAMPLES:
        raise InputError(
            f"{left} of {len(judging)} calibration samples are left beside those that judge",
            expected=f"at least {LEAST_SAMPLES}",
            fix="ask for more samples, or use a larger data set",
        )
    return _part(samples, ~judging), _part(samples, judging)


def _part(samples: Samples, mask: np.ndarray) -> Samples:
    used, index = np.unique(samples.index[mask], return_inverse=True)
    names = [samples.facts["sources"][place] for place in used]
    return replace(
        samples,
        source=samples.source[used],
        tensors={name: tensor[used] for name, tensor in samples.tensors.items()},
        keypoints=None if samples.keypoints is None else samples.keypoints[used],
        index=index.astype(np.int64),
        pose=samples.pose[mask],
        noise=samples.noise[mask],
        facts=samples.facts | {"count": int(mask.sum()), "sources": names},
    )


def pictures(prepare: onnx.ModelProto | Path, frame: onnx.ModelProto | Path, samples: Samples) -> np.ndarray:
    """(N, H, W, 3) uint8: every sample from its source to the picture."""
    render = Graph(frame)
    return np.stack([render(feeds)[0] for feeds in _frame_feeds(prepare, samples)])


def _frame_feeds(prepare: onnx.ModelProto | Path, samples: Samples) -> Iterator[Feeds]:
    """The inputs of a frame, with the tensors that ``prepare`` makes of the sources."""
    graph = Graph(prepare)
    prepared = [graph.named(feeds) for feeds in samples.feeds("prepare")]
    for feeds, source in zip(samples.feeds("frame"), samples.index, strict=True):
        yield {**feeds, **{name: prepared[source][name] for name in samples.tensors}}


def sweep(
    graph: Artifact, samples: Path, work: Path, configs: Sequence[Int8Config] | None = None
) -> list[dict[str, Any]]:
    """Quantize ``graph`` in many ways, and measure each against the float graph on people that did not calibrate it.

    Args:
        graph: a float graph artifact.
        samples: of ``calibrate.record`` with this graph.
        work: a folder with one small file per configuration; what is there is not measured again.
        configs: what to try; by default every estimator of ranges, then SmoothQuant's ``ALPHAS`` with the best one.

    Returns:
        rows, the least drift first: ``config`` (fields of ``Int8Config``), ``psnr_db`` and ``ssim`` (medians),
        ``psnr_db_min``, ``pairs`` (judged), ``bytes`` of both graphs and ``seconds`` to quantize them.

    Raises:
        ArtifactError: samples of another graph.
        InputError: samples of a single person, or too few of them.
    """
    loaded = calibrate.load(samples)
    loaded.check(graph)
    if configs is not None:
        return _sorted(_Sweep(graph, loaded, work).rows(configs))
    trials = _Sweep(graph, loaded, work)
    rows = trials.rows([Int8Config(ranges=ranges) for ranges in get_args(Ranges)])
    best = best_config(rows)
    return _sorted(rows + trials.rows([replace(best, smooth_quant_alpha=alpha) for alpha in ALPHAS]))


def best_config(rows: Iterable[Mapping[str, Any]]) -> Int8Config:
    """Of the rows of ``sweep`` within ``TIE_DB`` of the greatest median PSNR the one with the smallest graphs."""
    found = _sorted(rows)
    level = [row for row in found if row["psnr_db"] >= found[0]["psnr_db"] - TIE_DB]
    return Int8Config(**min(level, key=lambda row: row["bytes"])["config"])


def _sorted(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return sorted((dict(row) for row in rows), key=lambda row: -float(row["psnr_db"]))


class _Sweep:
    """The divided samples, and the pictures of the float graphs, rendered once for all configurations."""

    def __init__(self, graph: Artifact, samples: Samples, work: Path) -> None:
        self._files = {name: graph.file(f"{name}.onnx") for name in ("prepare", "frame")}
        self._key = {"graph": graph.digest, "samples": samples.sha256, "tools": tool_versions("nncf", "onnxruntime")}
        self._calibrating, self._judging = divide(samples)
        self._exact: np.ndarray | None = None
        self._work = work

    def rows(self, configs: Sequence[Int8Config]) -> list[dict[str, Any]]:
        found = []
        with progress("sweep", len(configs)) as advance:
            for done, config in enumerate(configs, 1):
                path = self._work / f"{json_digest(self._key | {'config': asdict(config)})}.json"
                row = _recorded(path)
                if row is None:
                    row = self._measured(config)
                    write_text(path, json.dumps(row))
                found.append(row)
                advance(done, f"{row['psnr_db']:.1f} dB")
        return found

    def _measured(self, config: Int8Config) -> dict[str, Any]:
        if self._exact is None:
            self._exact = pictures(self._files["prepare"], self._files["frame"], self._judging)
        start = time.perf_counter()
        made = {
            name: to_int8(onnx.load(file), self._calibrating.feeds(name), config)[0]
            for name, file in self._files.items()
        }
        seconds = time.perf_counter() - start
        couples = list(zip(self._exact, pictures(**made, samples=self._judging), strict=True))
        ratios = [min(psnr_db(*couple), CAP_DB) for couple in couples]
        return {
            "config": asdict(config),
            "psnr_db": float(np.median(ratios)),
            "psnr_db_min": min(ratios),
            "ssim": float(np.median([ssim(*couple) for couple in couples])),
            "pairs": len(couples),
            "bytes": sum(model.ByteSize() for model in made.values()),
            "seconds": round(seconds, 1),
        }


def _recorded(path: Path) -> dict[str, Any] | None:
    """A row that was written; None if it is missing or damaged."""
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
        return row if {"config", "psnr_db", "psnr_db_min", "ssim", "bytes"} <= set(row) else None
    except (OSError, ValueError, TypeError):
        return None


def frame_control(graph: Artifact, prepare: Path, judging: Samples, config: Int8Config) -> Control:
    """What NNCF's accuracy control of a frame needs: PSNR to the float pictures of ``judging``.

    Args:
        graph: the float graph artifact.
        prepare: the INT8 graph whose keys and values the frame will get.
        config: with ``least_psnr_db``.
    """
    assert config.least_psnr_db is not None
    exact = pictures(graph.file("prepare.onnx"), graph.file("frame.onnx"), judging)
    feeds = list(_frame_feeds(prepare, judging))

    def score(model: onnx.ModelProto, items: Iterable[int]) -> tuple[float, list[float]]:
        render = Graph(_as_kept(model, config))
        values = [min(psnr_db(exact[item], render(feeds[item])[0]), CAP_DB) for item in items]
        return float(np.mean(values)), values

    return Control(range(len(feeds)), score, config.least_psnr_db)


def _as_kept(model: onnx.ModelProto, config: Int8Config) -> onnx.ModelProto:
    """``model`` with the activations that it will have in the end: NNCF judges before they become signed."""
    if config.activations == "unsigned":
        return model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    sign_activations(copy)
    return copy
