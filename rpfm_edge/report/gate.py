"""The gate on the command line: its options, and its verdicts as a table and in sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rpfm_edge.report import tables

COLOURS = {"pass": "green", "regression": "red", "error": "red", "no baseline": "yellow", "unstable": "yellow"}
WAYS = {"a/b": "in the same rounds", "baseline": "against stored times", "save": "stored"}


def render(result: Mapping[str, Any]) -> None:
    """Print one line a backend, then every reason, and what throttled."""
    table = tables.table("backend", "old ms", "new ms", "slower", "95 % interval", "rounds", "verdict")
    for record in result["backends"]:
        verdict = "saved" if _saved(record) else record["verdict"]
        table.add_row(record["backend"], *_cells(record), f"[{COLOURS[record['verdict']]}]{verdict}[/]")
    tables.console.print(table)
    for record in result["backends"]:
        for reason in record["reasons"]:
            tables.say(f"{record['backend']}: {reason}")
        if record.get("throttling"):
            tables.say(f"{record['backend']}: throttled during the run ({', '.join(record['throttling'])})")
        if (others := record.get("others")) is not None and "way" in record:
            tables.say(f"{record['backend']}: {WAYS[record['way']]}; other programs used {others:.0%} of the cores")
        if _saved(record) and record["reasons"]:
            untold = "the gate cannot hold the same bundle against these times"
            tables.say(f"{record['backend']}: warning: {untold}; save again when the machine is quiet")
    for name, reason in result.get("skipped", {}).items():
        tables.say(f"{name} skipped: {reason}")


def _saved(record: Mapping[str, Any]) -> bool:
    return record.get("way") == "save" and record["verdict"] == "pass"


def _cells(record: Mapping[str, Any]) -> list[str]:
    times = [f"{1e3 * record[side]['p50_s']:.2f}" if side in record else "–" for side in ("old", "new")]
    judged = ["–", "–"]
    if "slowdown" in record:
        low, high = record["interval"]
        judged = [f"{record['slowdown']:+.1%}", f"{low:+.1%} … {high:+.1%}"]
    return [*times, *judged, str(record.get("rounds", "–"))]
