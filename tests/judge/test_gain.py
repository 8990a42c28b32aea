"""What distillation gained: the same pairs as everywhere, chunks that add up, and ratios that can be told by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from distill.export import export
from distill.student import DistillConfig, Student, save_student
from distill.teacher import save_teacher
from rpfm_edge import api
from rpfm_edge.bundle.pipeline import Pipeline
from rpfm_edge.core.errors import BackendError, ConfigError, InputError
from rpfm_edge.judge import gain
from rpfm_edge.judge.gain import GainConfig, compare_truth, draw_chunks, measure_gain, merge
from rpfm_edge.judge.quality import bundle_videos, images_of
from rpfm_edge.measure import metrics
from rpfm_edge.measure.detail import detail
from rpfm_edge.measure.flicker import flicker_levels
from rpfm_edge.people.data import sample_root
from rpfm_edge.people.deepfashion import open_split
from rpfm_edge.people.held_out import ClipConfig, draw_pairs, open_clips
from rpfm_edge.people.splits import open_splits
from scripts import judge_students
from tests.blob import blob_network
from tests.distill.tiny import NETWORK, SIZE, toy_teacher

CONFIG = GainConfig(pairs=5, seed=3, chunk=2, batch=2, metrics=("psnr_db", "ssim"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A teacher without guidance, and its own network as a student of any number of steps, and of two."""
    folder, teacher = tmp_path_factory.mktemp("models"), toy_teacher(scale=1.0)
    student = Student(teacher.network, teacher.autoencoder)
    made = {"teacher": save_teacher(teacher, folder / "teacher", ()).path}
    for name, config in {"same": DistillConfig("reflow"), "two": DistillConfig("endpoint", steps=2)}.items():
        made[name] = save_student(student, folder / name, config, SIZE, ()).path
    return made


def measured(models: dict[str, Path], out: Path, config: GainConfig = CONFIG) -> dict[str, Any]:
    students = {name: path for name, path in models.items() if name != "teacher"}
    return measure_gain(models["teacher"], students, "sample", out, config)


@pytest.fixture(scope="module")
def found(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("found") / "gain.json"
    return measured(models, out), out


def test_chunks_are_the_pairs_of_every_other_figure() -> None:
    test = open_splits("sample").test
    whole = draw_pairs(test, 5, SIZE, NETWORK.latent_shape, seed=3)
    chunks = list(draw_chunks(test, NETWORK.latent_shape, CONFIG))
    assert [len(indices) for indices, _ in chunks] == [2, 2, 1]
    np.testing.assert_array_equal(np.concatenate([noise for _, noise in chunks]), whole.noise)
    read = [gain.read_pairs(test, *chunk, SIZE) for chunk in chunks]
    assert [name for pairs in read for name in pairs.names] == whole.names
    for part in ("sources", "source_poses", "poses", "truths"):
        np.testing.assert_array_equal(np.concatenate([getattr(p, part) for p in read]), getattr(whole, part))


def test_a_student_that_is_the_teacher_gains_and_loses_nothing(found: tuple[dict[str, Any], Path]) -> None:
    result = found[0]
    assert list(result["students"]["same"]) == ["1", "2", "4", "8"]
    assert list(result["students"]["two"]) == ["2"]
    for steps, distances in result["students"]["same"].items():
        expected = result["teacher"][steps]["against_truth"]["psnr_db"]["values"]
        np.testing.assert_allclose(distances["against_truth"]["psnr_db"]["values"], expected, atol=0.02)
    assert len(result["pairs"]) == len(result["reference"]["against_truth"]["ssim"]["values"]) == 5
    assert json.loads(found[1].read_text())["truth"] == result["truth"]


def test_chunks_give_what_one_chunk_gives(
    models: dict[str, Path], found: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    once = measured(models, tmp_path / "gain.json", replace(CONFIG, chunk=5, batch=1))
    assert once["pairs"] == found[0]["pairs"]
    for side in ("against_teacher", "against_truth"):
        one, many = (r["students"]["two"]["2"][side]["psnr_db"]["values"] for r in (once, found[0]))
        np.testing.assert_allclose(one, many, atol=0.02)  # a grey level here and there


def test_half_precision_is_near_and_not_the_same(
    models: dict[str, Path], found: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    half = measured(models, tmp_path / "gain.json", replace(CONFIG, precision="bf16", pairs=2))
    for side in ("against_teacher", "against_truth"):
        values = half["students"]["two"]["2"][side]["psnr_db"]["values"]
        expected = found[0]["students"]["two"]["2"][side]["psnr_db"]["values"][:2]
        assert values != expected
        np.testing.assert_allclose(values, expected, atol=1.0)


def test_it_continues_and_grows(
    models: dict[str, Path], found: tuple[dict[str, Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, counted = gain.read_pairs, []

    def watched(split: Any, indices: Any, *rest: Any) -> Any:
        counted.append(len(indices))
        if len(counted) == 2:
            raise KeyboardInterrupt
        return read(split, indices, *rest)

    monkeypatch.setattr(gain, "read_pairs", watched)
    out = tmp_path / "gain.json"
    with pytest.raises(KeyboardInterrupt):
        measured(models, out)
    assert not out.exists()
    assert measured(models, out, replace(CONFIG, pairs=4))["students"]["two"]
    assert counted == [2, 2, 2]  # the first chunk is not measured again
    assert measured(models, out)["students"]["two"] == found[0]["students"]["two"]
    assert counted == [2, 2, 2, 1]
    other = replace(CONFIG, seed=4, pairs=2)
    assert measured(models, out, other)["seed"] == 4
    assert counted == [2, 2, 2, 1, 2]  # what was measured of another draw is not taken for this one


def test_merged_statistics_are_those_of_the_whole() -> None:
    values = np.random.default_rng(0).normal(size=11).tolist()
    parts = [{"a": {"b": metrics.statistics(values[i : i + 4])}, "names": values[i : i + 4]} for i in (0, 4, 8)]
    assert merge(parts) == {"a": {"b": metrics.statistics(values)}, "names": values}
    parts[0]["a"] = {}  # where nobody could be scored
    assert merge(parts) == {"a": {"b": metrics.statistics(values[4:])}, "names": values}


def summary(mse: list[float], flip: list[float]) -> dict[str, Any]:
    psnr = [10 * np.log10(255**2 / value) if value else float("inf") for value in mse]
    return {"against_truth": {"psnr_db": metrics.statistics(psnr), "flip": metrics.statistics(flip)}}


def test_errors_are_multiples_of_the_teachers() -> None:
    reference = summary([100.0, 300.0], [0.2, 0.2])
    students = {"a": {"1": summary([105.0, 315.0], [0.2, 0.2])}, "b": {"8": summary([0.0, 200.0], [0.1, 0.3])}}
    first, second = compare_truth(students, reference, seed=0)
    assert (first["student"], first["steps"], first["target"]) == ("a", 1, 1.05)
    assert first["mse"]["teacher"] == pytest.approx(200)
    assert first["mse"]["ratio"] == pytest.approx(1.05)
    assert first["mse"]["interval"] == pytest.approx([1.05, 1.05])  # every pair is worse by the same factor
    assert first["flip"]["ratio"] == 1
    assert (second["steps"], second["target"]) == (8, None)
    assert second["mse"]["ratio"] == pytest.approx(0.5)
    assert second["flip"]["interval"] == pytest.approx([0.5, 1.5])


@pytest.mark.parametrize(("ratio", "correlation"), [(1.5, 0.3), (3.0, 0.3), (0.7, 0.9)])
def test_the_interval_holds_the_true_ratio_about_95_times_in_100(ratio: float, correlation: float) -> None:
    """Log-normal errors of 64 pictures. With so few, a bootstrap holds the truth 93 to 94 times in 100."""
    held, trials, rng = 0, 400, np.random.default_rng(1)
    for trial in range(trials):
        shared, alone = rng.normal(size=(2, 2, 64))  # for each of the two errors
        theirs = np.exp(6 + 0.5 * shared)
        own = ratio * np.exp(6 + 0.5 * (correlation * shared + np.sqrt(1 - correlation**2) * alone))
        (row,) = compare_truth({"a": {"1": summary(*own.tolist())}}, summary(*theirs.tolist()), seed=trial)
        for metric in ("mse", "flip"):
            low, high = row[metric]["interval"]
            held += low <= ratio <= high
    assert 0.915 < held / (2 * trials) < 0.96


def test_one_pair_has_no_interval() -> None:
    assert compare_truth({"a": {"4": summary([1.0], [0.1])}}, summary([2.0], [0.1]), 0)[0]["mse"]["interval"] is None


def test_what_cannot_be_measured(models: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "gain.json"
    with pytest.raises(ConfigError, match="0 pairs in chunks of 2: expected at least 1 of each"):
        measured(models, out, replace(CONFIG, pairs=0))
    with pytest.raises(ConfigError, match="no students: expected students of one size"):
        measure_gain(models["teacher"], {}, "sample", out, CONFIG)
    teacher = toy_teacher()
    student = Student(teacher.network, teacher.autoencoder)
    wide = save_student(student, tmp_path / "wide", DistillConfig(), (64, 64), ()).path
    with pytest.raises(ConfigError, match=r"two of \(64, 48\), wide of \(64, 64\): expected students of one size"):
        measure_gain(models["teacher"], {"two": models["two"], "wide": wide}, "sample", out, CONFIG)
    test = open_splits("sample").test
    nothing = replace(test, pairs=test.pairs[:0])
    with pytest.raises(InputError, match="has no pairs"):
        list(draw_chunks(nothing, (1,), CONFIG))


# Bundles, poses, detail and clips -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student of two steps as an engine."""
    folder = tmp_path_factory.mktemp("bundle")
    return api.build(export(models["two"], folder / "graph").path, folder / "engine", "onnxruntime").path


@pytest.fixture
def filmed_people(monkeypatch: pytest.MonkeyPatch) -> Any:
    """All of the sample as the test split, so that its clip counts."""
    split = open_split(sample_root(), "test")
    monkeypatch.setattr(gain, "open_splits", lambda _: SimpleNamespace(test=split))
    return split


def test_bundles_are_judged_and_filmed(
    models: dict[str, Path], bundle: Path, filmed_people: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The figures against pictures and clips that are made here."""
    monkeypatch.setenv("RPFM_EDGE_POSE", str(blob_network(tmp_path / "blob.xml")))
    config = replace(CONFIG, pairs=3, poses=True, filmed=ClipConfig(count=1, frames=3))
    students, out = {"two": models["two"]}, tmp_path / "gain.json"
    result = measure_gain(models["teacher"], students, "sample", out, config, {"engine": bundle})
    name = "engine, fp32, onnxruntime"
    measured, student = result["bundles"][name]["2"], result["students"]["two"]["2"]
    pairs = draw_pairs(filmed_people, 3, SIZE, NETWORK.latent_shape, seed=3)
    images = images_of(bundle, "onnxruntime", pairs)
    assert measured["against_truth"] == metrics.compare(pairs.truths, images, CONFIG.metrics)
    expected = [detail(image, truth) for image, truth in zip(images, pairs.truths, strict=True)]
    assert measured["detail"]["detail"]["values"] == expected
    np.testing.assert_allclose(student["detail"]["detail"]["values"], expected, atol=0.02)
    assert result["ground_truth"]["detail"]["detail"]["values"] == [1, 1, 1]
    assert all("pck" in one["pose"] for one in (measured, student, result["reference"], result["ground_truth"]))
    (clip,) = open_clips(filmed_people, config.filmed, SIZE, NETWORK.latent_shape, 3)
    with Pipeline.open(bundle, "onnxruntime") as pipe:
        (video,) = bundle_videos(pipe, [clip])
    assert list(result["flicker"]) == ["teacher, reference", name, "ground truth"]
    assert result["flicker"][name]["flicker"]["values"] == [flicker_levels(video, clip.truth)]
    assert [(row["student"], row["steps"]) for row in result["truth"]] == [("two", 2), (name, 2)]
    assert result["truth"][1]["mse"]["ratio"] == pytest.approx(result["truth"][0]["mse"]["ratio"], abs=0.01)
    assert not {"pck", "detail", "flicker"} & set(result["missing"])

    for slow in ("read_pairs", "bundle_videos"):
        monkeypatch.setattr(gain, slow, None)  # all of it is kept
    assert measure_gain(models["teacher"], students, "sample", out, config, {"engine": bundle}) == result


def test_what_bundles_must_be(models: dict[str, Path], bundle: Path, tmp_path: Path) -> None:
    students, out = {"two": models["two"]}, tmp_path / "gain.json"
    with pytest.raises(BackendError, match="has no engine for openvino"):
        measure_gain(models["teacher"], students, "sample", out, replace(CONFIG, backend="openvino"), {"a": bundle})
    other = SimpleNamespace(config={"size": (64, 64), "latent_shape": NETWORK.latent_shape})
    with pytest.raises(ConfigError, match=r"wide of \(64, 64\), two of \(64, 48\): expected students of one size"):
        gain._common_shape(students, {"wide": (other, "onnxruntime")})  # type: ignore[dict-item]


def test_what_was_not_measured_has_a_reason(models: dict[str, Path], found: tuple[dict[str, Any], Path]) -> None:
    assert found[0]["missing"]["pck"] == "poses were not asked for"
    assert found[0]["missing"]["flicker"] == "no clips were asked for"
    assert "detail" not in found[0]["missing"]


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def judge(models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*students: Path | str | int, pairs: int = 2, code: int = 0) -> str:
        arguments = [models["teacher"], *students, "--data", "sample", "--out", tmp_path / "judged.json"]
        arguments += ["--pairs", pairs, "--chunk", 1, "--metrics", "psnr_db"]
        assert judge_students.main([str(a) for a in arguments]) == code
        return "".join(capsys.readouterr())

    return run


def test_the_command_prints_every_student(judge: Callable[..., str], models: dict[str, Path], tmp_path: Path) -> None:
    printed = judge(models["same"], models["two"])
    result = json.loads((tmp_path / "judged.json").read_text())
    rows = [line.split() for line in printed.splitlines()]
    assert [row[1] for row in rows if row and row[0] in ("same", "two")] == ["1", "2", "4", "8", "2"]
    at_4 = next(row for row in result["truth"] if row["steps"] == 4)
    line = next(row for row in rows if row[:2] == ["same", "4"])
    assert f"{at_4['mse']['ratio']:.4f}" in line
    assert line[-1] == ("met" if at_4["mse"]["ratio"] <= 1.01 else "MISSED")


def test_the_command_says_what_is_wrong(judge: Callable[..., str], models: dict[str, Path]) -> None:
    assert "two students or bundles of one name" in judge(models["two"], models["two"], code=2)
    assert "judge_students: 0 pairs" in judge(models["two"], pairs=0, code=2)


def test_the_command_judges_a_bundle_beside_them(
    judge: Callable[..., str], models: dict[str, Path], bundle: Path, filmed_people: Any, tmp_path: Path
) -> None:
    printed = judge(models["two"], "--bundles", bundle, "--frames", 2)
    result = json.loads((tmp_path / "judged.json").read_text())
    name = "engine, fp32, onnxruntime"
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    flicker = {model: found["flicker"]["mean"] for model, found in result["flicker"].items()}
    detail = result["bundles"][name]["2"]["detail"]["detail"]["median"]
    ratio = flicker[name] / flicker["ground truth"]
    line = [line for line in lines if line.startswith(f"{name}, 2 steps")][-1]  # of poses, detail and flicker
    assert f"{detail:.3f} {flicker[name]:.3f} {ratio:.3f}" in line
    assert any(line.startswith(f"{name} 2 ") for line in lines)  # and its error in multiples of the teacher's
    assert "two students or bundles of one name" in judge(bundle, "--bundles", bundle, code=2)
