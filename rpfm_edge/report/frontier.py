"""A measured frontier (``frontier.measure_frontier``) as it is read: who is best, a table, points of a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

from rpfm_edge.core.backends import BACKENDS
from rpfm_edge.core.errors import ConfigError
from rpfm_edge.core.files import write_text
from rpfm_edge.core.flow import plural
from rpfm_edge.report.plots import Point

BEGIN, END = "<!-- frontier:begin -->", "<!-- frontier:end -->"
COLUMNS = (
    "Engine",
    "Steps",
    "Frames per second",
    "× torch",
    "p50 (ms)",
    "p95 (ms)",
    "PSNR to the teacher (dB)",
    "PSNR to the truth (dB)",
    "Size (MiB)",
)
NAMES = {**{name: row.title for name, row in BACKENDS.items()}, "teacher": "Teacher, Euler"}


@dataclass(frozen=True, slots=True)
class Line:
    """A row of the table: a cell for each of ``COLUMNS``. ``best``: not dominated. ``reason``: why without figures."""

    cells: tuple[str, ...]
    best: bool
    reason: str = ""


def psnr(row: Mapping[str, Any], side: str = "against_teacher") -> float:
    """A row's median PSNR in dB."""
    return float(row[side]["psnr_db"]["median"])


def points(rows: Sequence[Mapping[str, Any]]) -> list[Point]:
    """The rows with a time, as points of the plot."""
    return [
        Point(row["frame"]["fps"], psnr(row), _backend(row), row["precision"], row["steps"], row["pareto"])
        for row in rows
        if "frame" in row
    ]


def lines(rows: Sequence[Mapping[str, Any]]) -> list[Line]:
    """Engines by falling speed, then what was not timed, then what failed."""
    torch_s = {row["steps"]: row["frame"]["p50_s"] for row in rows if row["backend"] == "torch" and "frame" in row}
    timed = sorted((row for row in rows if "frame" in row), key=lambda row: -row["frame"]["fps"])
    judged = [row for row in rows if "frame" not in row and "reason" not in row]
    failed = [row for row in rows if "reason" in row]
    return [_line(row, torch_s.get(row["steps"])) for row in (*timed, *judged, *failed)]


def _backend(row: Mapping[str, Any]) -> str:
    return NAMES.get(row["backend"], str(row["backend"]))


def _line(row: Mapping[str, Any], torch_s: float | None) -> Line:
    head = (f"{_backend(row)} {row['precision'].upper()}", str(row["steps"]))
    quality, speed = ("–", "–"), ("–",) * 4
    if "reason" in row:
        return Line((*head, *speed, *quality, "–"), best=False, reason=row["reason"])
    quality = (f"{psnr(row):.1f}", f"{psnr(row, 'against_truth'):.1f}")
    if frame := row.get("frame"):
        ratio = f"{torch_s / frame['p50_s']:.2f}" if torch_s else "–"
        speed = (_three(frame["fps"]), ratio, _three(1e3 * frame["p50_s"]), _three(1e3 * frame["p95_s"]))
    size = f"{row['engine_bytes'] / 2**20:.1f}" if "engine_bytes" in row else "–"
    return Line((*head, *speed, *quality, size), best=row["pareto"])


def _three(value: float) -> str:
    """At least three significant digits, no exponent."""
    return f"{value:.{max(0, 3 - len(str(int(value))))}f}"


def caption(result: Mapping[str, Any]) -> str:
    """On what, how and where it was measured, in words."""
    machine, reference = result["machine"], result["reference"]
    versions = ", ".join(f"{name} {version.partition('-')[0]}" for name, version in machine["versions"].items())
    return (
        f"Medians over {len(result['pairs'])} pairs of held-out people, the same noise everywhere; the teacher is its "
        f"solution in {reference['steps']} {reference['solver'].title()} steps. Frames in turns, {result['rounds']} "
        f"rounds, on {machine['cpu']}, {machine['usable_cores']} cores, {versions}. A frame is pose drawing, engine "
        "and copies; × torch is the speed in multiples of eager torch with as many steps. Compare within the table: "
        "the speed of a machine drifts."
    )


def markdown(result: Mapping[str, Any]) -> str:
    """The caption, the table with what is not dominated in bold, and the reasons of what failed."""
    found = lines(result["rows"])
    table = ["| " + " | ".join(COLUMNS) + " |", "|---|" + "---:|" * (len(COLUMNS) - 1)]
    for line in found:
        cells = [f"**{cell}**" if line.best else cell for cell in line.cells]
        table.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    bold = "Bold: no other is both faster and, to a tenth of a dB, closer to the teacher."
    reasons = [
        f"- {line.cells[0]}, {plural(int(line.cells[1]))}: {' '.join(line.reason.split())}"
        for line in found
        if line.reason
    ]
    failed = ["", "Not measured:", "", *reasons] if reasons else []
    return "\n".join([fill(f"{caption(result)} {bold}", 120), "", *table, *failed]) + "\n"


def put_in_file(path: Path, result: Mapping[str, Any] | None) -> None:
    """``put_between`` in a text file; without a result only check that it can be done."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error})", expected="a text file", fix="check the path") from None
    changed = put_between(text, markdown(result) if result else "", where=str(path))
    if result:
        write_text(path, changed)


def put_between(text: str, table: str, begin: str = BEGIN, end: str = END, where: str = "the text") -> str:
    """``text`` with what stands between two markers, each on a line of its own, replaced by ``table``.

    Raises:
        ConfigError: the two markers are not there once, in this order.
    """
    before, found, rest = text.partition(begin + "\n")
    _, closed, after = rest.partition(end)
    if not (found and closed) or begin in rest or end in before + after:
        raise ConfigError(
            f"{where} has no place for the table",
            expected=f"one line {begin} and after it one line {end}",
            fix="add the two lines where the table should stand",
        )
    return f"{before}{begin}\n\n{table.strip()}\n\n{end}{after}"
