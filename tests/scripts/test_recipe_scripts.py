"""The scripts beside the recipes: what they compare, and that errors end in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill.guidance import Guidance
from distill.teacher import NetworkTeacher, save_teacher
from rpfm_edge.people.splits import open_splits
from scripts import choose_guidance, judge_precisions
from tests.distill.tiny import toy_teacher


def test_scales_are_compared_on_the_teachers_schedule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the title says how many pairs there are, not how many were asked for."""
    save_teacher(toy_teacher(schedule="interval"), tmp_path / "teacher", ())
    seen: list[Guidance] = []

    def images(teacher: NetworkTeacher, sources: np.ndarray, *rest: Any) -> dict[Any, np.ndarray]:
        seen.append(teacher.guidance)
        return {rest[-1][0]: sources}

    monkeypatch.setattr(choose_guidance, "teacher_images", images)
    monkeypatch.setattr(
        choose_guidance.metrics, "compare", lambda *_: {name: {"mean": 1.0} for name in ("psnr_db", "ssim", "flip")}
    )
    options = ["--data", "sample", "--pairs", "9999", "--scales", "1", "2"]
    assert choose_guidance.main([str(tmp_path / "teacher"), *options]) == 0
    assert seen == [Guidance(1.0, "interval"), Guidance(2.0, "interval")]
    assert f"{len(open_splits('sample').validation.pairs)} validation pairs" in capsys.readouterr().out


@pytest.mark.parametrize("teacher", ["gone", "tests.distill.test_teacher:gaussian_teacher"])
def test_a_teacher_that_cannot_be_guided(teacher: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert choose_guidance.main([teacher, "--data", "sample"]) == 2
    assert capsys.readouterr().err.startswith(f"choose_guidance: {teacher} ")


def test_a_graph_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert judge_precisions.main([str(tmp_path / "gone"), "--out", str(tmp_path / "out.json")]) == 2
    assert "gone is no artifact" in capsys.readouterr().err
