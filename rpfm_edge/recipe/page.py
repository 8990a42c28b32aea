"""The report of a run, from the evidence in its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rpfm_edge.core import artifact, shipped
from rpfm_edge.core.files import write_text
from rpfm_edge.core.flow import plural
from rpfm_edge.measure.detail import count_scored
from rpfm_edge.recipe.schema import Recipe
from rpfm_edge.report.page import Evidence, write_report


def write_page(
    recipe: Recipe, path: Path, teacher: str | Path, student: str, distilled: Mapping[str, Path], out: Path
) -> None:
    """``report.html`` and, with the same content, ``report.json``."""
    found = json.loads((out.parent / "evidence.json").read_text(encoding="utf-8"))
    gain = json.loads((out.parent / "gain.json").read_text(encoding="utf-8")) if distilled else None
    frontier = out.parent / "frontier" / "frontier.json"
    bundle, targets = artifact.load(out.parent / "bundle", "bundle"), recipe.build.targets
    page: Evidence = {
        "title": "rpfm-edge report",
        "subtitle": ", ".join([path.name, plural(int(bundle.config["steps"])), bundle.config["precision"], *targets]),
        "machine": found["machine"],
        "headline": headline(found, gain),
        "pictures": picture_rows(found),
        "drift": {
            "stages": found["stages"] + gain_stages(gain, [stage["stage"] for stage in found["stages"]]),
            "missing": found["missing"],
            "note": f"Medians over {len(found['pairs'])} held-out pairs, the same noise everywhere. "
            f"Reference: the teacher with {found['reference']['steps']} {found['reference']['solver']} steps.",
        },
        "latency": latencies(found),
        "losses": losses(teacher, student, distilled),
        "validation": validation_curves(teacher),
        "lineage": [
            {"stage": s.stage, "config": s.config, "tools": s.tools, "inputs": s.inputs} for s in bundle.lineage
        ],
        "method": {
            "commands": [f"rpfm-edge run {path}"],
            "counts": {"held-out pairs": len(found["pairs"]), "frames at least": recipe.bench.runs},
            "seeds": {"recipe": recipe.seed},
            "notes": [*speed_notes(found), *truth_notes(gain), *detail_notes(found)],
        },
    }
    plan = out.parent / "graphs" / "auto" / "evidence" / "plan.json"
    if recipe.quantize.precision == "auto":
        page["plan"] = json.loads(plan.read_text(encoding="utf-8"))
    if recipe.frontier:
        page["frontier"] = json.loads(frontier.read_text(encoding="utf-8"))
    write_report(out, page)
    write_text(out.with_suffix(".json"), json.dumps({**found, "gain": gain}, indent=1))


def latencies(found: Mapping[str, Any]) -> list[Any]:
    """The raw times of every engine, call by call."""
    return [
        {"call": call, "name": f"{s['backend']} {s['precision']}", "values_s": s[call]["values_s"]}
        for s in found["speed"]
        for call in ("prepare", "frame")
    ]


def headline(found: Mapping[str, Any], gain: Mapping[str, Any] | None) -> list[Any]:
    """The figures at the top of the page."""
    stages = {stage["stage"]: stage for stage in found["stages"]}
    judged, few, reference = stages[found["judged"]], found["stages"][1], stages["teacher, reference"]
    rows = [
        ("quality", "bundle against teacher", psnr(judged["against_teacher"]), "dB PSNR",
         f"{few['stage']}: {psnr(few['against_teacher']):.1f} dB"),
        ("quality", "bundle against ground truth", psnr(judged["against_truth"]), "dB PSNR",
         f"teacher: {psnr(reference['against_truth']):.1f} dB"),
    ]  # fmt: skip
    rows += gain_figures(gain)
    for speed in found["speed"]:
        if speed["precision"] == found["judged"].split(",")[0]:
            frame, backend = speed["frame"], speed["backend"]
            note = f"p50 {1e3 * frame['p50_s']:.1f} ms, p95 {1e3 * frame['p95_s']:.1f} ms"
            rows.append(("speed", f"frame, {backend}", frame["fps"], "frames/s", note))
            rows.append(("size", f"engines, {backend}", speed["engine_bytes"] / 2**20, "MiB", speed["precision"]))
    return [dict(zip(("group", "label", "value", "unit", "note"), row, strict=True)) for row in rows]


def psnr(summary: Mapping[str, Any]) -> float:
    """The median PSNR of a comparison, in dB."""
    return float(summary["psnr_db"]["median"])


def picture_rows(found: Mapping[str, Any]) -> list[Any]:
    """Rows of the page, each with the error of the bundle against the teacher."""
    return [
        {"title": " → ".join(names), "images": images, "error_of": ("teacher", found["judged"])}
        for names, images in zip(found["pairs"], found["pictures"], strict=False)
    ]


def gain_figures(gain: Mapping[str, Any] | None) -> list[tuple[str, str, float, str, str]]:
    """Every student of this run at the fewest steps it is measured at."""
    if not gain:
        return []
    rows = []
    for name, by_steps in gain["students"].items():
        steps = min(by_steps, key=int)
        before, after = (psnr(found[steps]["against_teacher"]) for found in (gain["teacher"], by_steps))
        label = f"{name}, {plural(int(steps))}, distilled in this run"
        rows.append(("quality", label, after, "dB PSNR", f"before: {before:.1f} dB"))
    return rows


def gain_stages(gain: Mapping[str, Any] | None, shown: Sequence[str]) -> list[dict[str, Any]]:
    """This run's distillation as stages of the drift table: the teacher at few steps, unless ``shown``, then every
    student."""
    if not gain:
        return []
    stages = [{"stage": f"teacher, {plural(int(n))}", **found} for n, found in gain["teacher"].items()]
    stages = [stage for stage in stages if stage["stage"] not in shown]
    for name, by_steps in gain["students"].items():
        stages += [{"stage": f"{name}, {plural(int(n))}, distilled in this run", **d} for n, d in by_steps.items()]
    return stages


def speed_notes(found: Mapping[str, Any]) -> list[str]:
    """Whether the times of each backend settled."""
    return [
        f"{s['backend']} {s['precision']}: {'stable' if s['frame']['stable'] else 'not stable'}" for s in found["speed"]
    ]


def detail_notes(found: Mapping[str, Any]) -> list[str]:
    """On how many pairs detail was scored, unless on all."""
    words = count_scored(found["stages"], len(found["pairs"]))
    return [words] if words else []


def truth_notes(gain: Mapping[str, Any] | None) -> list[str]:
    """What the students of this run lose against the ground truth, in words."""
    titles = {"mse": "squared error", "flip": "FLIP", "lpips": "LPIPS"}
    notes = []
    for row in gain["truth"] if gain else ():
        figures = []
        for metric in (metric for metric in titles if metric in row):
            interval = row[metric]["interval"]
            spread = f" (95 %: {interval[0]:.3f} … {interval[1]:.3f})" if interval else ""
            figures.append(f"{titles[metric]} {row[metric]['ratio']:.3f}{spread}")
        goal = f"; no loss up to {row['target']:g}" if row["target"] else ""
        where = f"{row['student']}, {plural(row['steps'])}, against the truth, in multiples of the teacher's"
        notes.append(f"{where}: {', '.join(figures)}{goal}")
    return notes


def losses(teacher: str | Path, student: str, distilled: Mapping[str, Path]) -> dict[str, Any]:
    """Loss curves of the artifacts that keep one."""
    curves: dict[str, Any] = {}
    made = {f"{name}, distilled in this run": path for name, path in distilled.items() if str(path) != student}
    for title, spec in {"teacher": teacher, "student": student, **made}.items():
        if points := _config(spec).get("losses"):
            curves[title] = [{"name": title, "steps": [p[0] for p in points], "values": [p[1] for p in points]}]
    return curves


def validation_curves(teacher: str | Path) -> dict[str, Any]:
    """The teacher's loss on held-out people, if it keeps one: whether more time would have helped."""
    points = _config(teacher).get("validation")
    return {"teacher": points} if points else {}


def _config(spec: str | Path) -> Mapping[str, Any]:
    """The config of an artifact; that of a factory is not known."""
    known = str(spec) in shipped.shipped() or Path(spec).exists()
    return artifact.load(shipped.resolve(spec), verify=False).config if known else {}
