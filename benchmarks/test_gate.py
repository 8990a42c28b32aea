"""The speed that a release is held to: ``--gate NAME`` judges it, ``--save-baseline NAME`` keeps what it is now."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rpfm_edge import api
from rpfm_edge.core.errors import BackendError
from rpfm_edge.measure.verdict import parse_share
from rpfm_edge.report import gate as gate_table


def test_gate(benchmark: Any, case: Any, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> None:
    """One case against its baseline. Whatever is not a pass fails the test: no baseline and unstable too."""
    option = request.config.getoption
    save, gate, folder = option("--save-baseline"), option("--gate"), Path(option("--baselines"))
    if not save and not gate:
        pytest.skip("neither --gate nor --save-baseline was given")
    limits = {"max_slowdown": parse_share(option("--max-slowdown")), "rounds": option("--rounds")}
    try:
        bundle = case.bundle or request.getfixturevalue("builder").bundle(case.precision, case.steps, [case.backend])
        # a bundle of one's own has the baselines of the command line; the student's cases have one each
        name = f"{save or gate}" if case.bundle else f"{save or gate}-{case.precision}-{case.steps}"
        judge = api.save_baseline if save else api.gate
        given = (bundle, name) if save else (bundle, name, None)
        result = benchmark.pedantic(judge, (*given, case.backend, folder), limits, rounds=1)
    except BackendError as error:
        # a case of the student is skipped where its backend is missing; an engine of one's own bundle has to be judged
        (pytest.fail if case.bundle else pytest.skip)(str(error))
    benchmark.extra_info |= result
    with capsys.disabled():
        print()
        gate_table.render(result)
    if result["verdict"] != "pass":
        (record,) = result["backends"]
        pytest.fail(f"{result['verdict']}: {'; '.join(record['reasons']) or 'slower than allowed'}", pytrace=False)
