"""Student → graph → graph in another precision."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

from rpfm_edge.core import artifact, shipped
from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.errors import ConfigError
from rpfm_edge.core.extras import require_module
from rpfm_edge.core.files import scratch_folder
from rpfm_edge.core.precisions import CALIBRATED, PRECISIONS, Precision, check_method
from rpfm_edge.people.data import as_seen
from rpfm_edge.people.splits import open_splits


def quantize(
    student: str | Path,
    data: str | Path | None,
    out: str | Path,
    precision: str = "int8",
    steps: int | None = None,
    samples: int = 64,
    seed: int = 0,
    *,
    method: str = "ptq",
    least_psnr_db: float | None = None,
) -> Artifact:
    """Export a student (or take a float graph) and write the graph in ``precision``, one of ``PRECISIONS``.

    Args:
        data: only int8, fp8 and nvfp4 need it; None for the others.
        samples: how many calibration samples are drawn from the training identities of ``data``.
        method: of int8. "ptq" calibrates; "sweep" tries estimators of ranges and SmoothQuant first, keeps what it
            measured in ``out.work``, continues from there, and writes it into the lineage; "accuracy-control" leaves
            as many layers in float as ``least_psnr_db`` needs (default: ``quantize.methods.LEAST_PSNR_DB``).
    """
    if precision not in PRECISIONS:
        fix = "run: rpfm-edge plan" if precision == "auto" else "check the spelling"
        raise ConfigError(f"unknown precision {precision!r}", expected=f"one of {PRECISIONS}", fix=fix)
    check_method(method, least_psnr_db, precision)
    if precision in CALIBRATED:
        require_data(data, precision)
    artifact.require_free(out, "graph")
    source, out = shipped.resolve(student), Path(out)
    kind = artifact.load(source, "student", "graph").kind
    check_unrolled(steps, kind)
    if kind == "student" and precision == "fp32":
        return export_float(source, out, steps)
    with scratch_folder(out) as scratch:
        graph = export_float(source, scratch / "graph", steps).path if kind == "student" else source
        return _quantize_graph(
            graph, data, out, precision, {"count": samples, "seed": seed}, scratch, (method, least_psnr_db)
        )


def require_data(data: str | Path | None, precision: str) -> str | Path:
    if data is None:
        raise ConfigError(f"no data for precision {precision}", expected="a data set, or sample", fix="give --data")
    return data


def check_unrolled(steps: int | None, kind: str) -> None:
    if steps is not None and (steps < 1 or kind == "graph"):
        fix = "leave steps out, they are in the graph" if kind == "graph" else "give a positive number of steps"
        raise ConfigError(f"{steps} steps for a {kind}", expected="at least 1, for a student", fix=fix)


def export_float(student: Path, out: Path, steps: int | None) -> Artifact:
    require_module("torch", "distill")
    from distill.export import export

    made: Artifact = export(student, out, steps)
    return made


def _quantize_graph(
    graph: Path,
    data: str | Path | None,
    out: Path,
    precision: str,
    draw: Mapping[str, int],
    scratch: Path,
    way: tuple[str, float | None],
) -> Artifact:
    require_module("nncf", "quantize")
    from quantize import apply, calibrate, methods

    loaded, recorded, chosen = artifact.load(graph, "graph"), None, None
    if precision in CALIBRATED:
        recorded = scratch / "calibration.safetensors"
        people = as_seen(open_splits(require_data(data, precision)).training, loaded.config.get("fit"))
        calibrate.record(loaded, people, recorded, **draw)
        chosen = methods.choose(*way, loaded, recorded, out.with_name(out.name + ".work"))
    return apply.quantize(loaded, cast(Precision, precision), out, recorded, *(chosen or ()))
