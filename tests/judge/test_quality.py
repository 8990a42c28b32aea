"""What validate adds to the distances: poses, detail and flicker, in the evidence, the budget and the table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runtimes
from distill.reference import REFERENCE_SOLVER, REFERENCE_STEPS, teacher_images
from rpfm_edge import api
from rpfm_edge.bundle.pipeline import Pipeline
from rpfm_edge.core import artifact
from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.errors import ConfigError
from rpfm_edge.judge.quality import bundle_videos, judge_bundle, missing_measures
from rpfm_edge.measure.budget import Budget
from rpfm_edge.measure.detail import detail
from rpfm_edge.measure.flicker import flicker_levels, motion_ratio
from rpfm_edge.measure.metrics import compare
from rpfm_edge.people.data import Split, sample_root
from rpfm_edge.people.deepfashion import open_split, read_clip
from rpfm_edge.people.formats import write_pose
from rpfm_edge.people.held_out import ClipConfig, draw_pairs, open_clips, shuffled_pairs
from rpfm_edge.people.pose import FRAME, scale_pose
from rpfm_edge.report import tables
from tests.blob import blob_network
from tests.toy import make_teacher

SIZE, SHAPE = (64, 48), (8, 8, 6)
FILMED = ClipConfig(count=1, frames=3)
REFERENCE = (REFERENCE_STEPS, REFERENCE_SOLVER)


@pytest.fixture(scope="module")
def split() -> Split:
    """All of the sample, the person of its clip included."""
    return open_split(sample_root(), "test")


@pytest.fixture(scope="module")
def bundle(tiny_graph: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return api.build(tiny_graph.path, tmp_path_factory.mktemp("bundle") / "bundle", "onnxruntime")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teacher") / "teacher")


@pytest.fixture
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RPFM_EDGE_POSE", raising=False)
    monkeypatch.setenv("RPFM_EDGE_CACHE", str(tmp_path / "cache"))


def measured(bundle: Artifact, teacher: Path, split: Split, budget: Budget, filmed: ClipConfig) -> dict[str, Any]:
    return judge_bundle(bundle, teacher, split, ["onnxruntime"], 2, budget, filmed=filmed)


def test_poses_and_flicker_of_every_stage(
    bundle: Artifact, teacher: Path, split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RPFM_EDGE_POSE", str(blob_network(tmp_path / "blob.xml")))
    filmed = ClipConfig(count=1, frames=3, teacher=True)
    budget = Budget(psnr_db_min=0.1, detail_min=0.99, pck_min=1.1, flicker_max=-1)
    found = measured(bundle, teacher, split, budget, filmed)
    stages = {stage["stage"]: stage for stage in found["stages"]}
    reference, few, own, truth = stages.values()
    assert list(stages)[-1] == "ground truth"
    still, filmed_too = {"pose", "detail"}, {"pose", "detail", "flicker"}
    assert [set(stage) & filmed_too for stage in (reference, few, own, truth)] == [
        filmed_too, still, filmed_too, filmed_too
    ]  # fmt: skip
    assert truth["detail"]["detail"]["values"] == [1, 1]
    assert all(set(stage["pose"]) == {"pck", "pck_unsided"} for stage in stages.values())
    assert truth["flicker"]["motion"]["values"] == [1]
    assert not {"pck", "detail", "flicker"} & set(found["missing"])
    assert found["clips"] == [{"name": "p00999", "frames": 3}]
    levels, share = own["flicker"]["flicker"]["mean"], own["pose"]["pck"]["mean"]
    assert found["violations"] == [
        f"onnxruntime: detail median {own['detail']['detail']['median']:.4g} is below the limit 0.99 (detail_min)",
        f"onnxruntime: pck mean {share:.4g} is below the limit 1.1 (pck_min)",
        f"onnxruntime: flicker mean {levels:.4g} is above the limit -1 (flicker_max)",
    ]


@pytest.mark.usefixtures("no_network")
def test_clips_are_rendered_from_one_noise(bundle: Artifact, split: Split) -> None:
    clips = open_clips(split, FILMED, SIZE, SHAPE)
    with Pipeline.open(bundle, "onnxruntime") as pipe:
        (video,) = bundle_videos(pipe, clips)
        assert bundle_videos(pipe, []) == []
    _, keypoints = read_clip(sample_root() / "clips" / "p00999")
    with Pipeline.open(bundle.path) as pipe:
        person = pipe.prepare(split.image(split.names.index("p00999_0.jpg"), SIZE))
        frames = [pipe.render(person, scale_pose(pose, FRAME, SIZE), clips[0].noise) for pose in keypoints[:3]]
    np.testing.assert_array_equal(video, np.stack(frames))
    assert flicker_levels(video, clips[0].truth) > 0
    assert motion_ratio(video, clips[0].truth) > 0


@pytest.mark.usefixtures("no_network")
def test_what_cannot_be_measured_is_said_and_breaks_its_limit(
    bundle: Artifact, teacher: Path, split: Split, capsys: pytest.CaptureFixture[str]
) -> None:
    found = measured(bundle, teacher, split, Budget(pck_min=0.9, flicker_max=2.0), ClipConfig(count=0))
    assert found["stages"][-1].keys() == {"stage", "detail"}
    assert not [stage for stage in found["stages"] if {"pose", "flicker"} & set(stage)]
    assert found["violations"] == [
        "onnxruntime: pck was not measured, the limit is 0.9 (pck_min)",
        "onnxruntime: flicker was not measured, the limit is 2 (flicker_max)",
    ]
    tables.drift(found)
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "pck was not measured: the network is not at hand (run: python -m rpfm_edge.measure.joints, or set" in printed
    )
    assert "flicker was not measured: no clips were asked for" in printed
    assert "ground truth – – 1.000 – – –" in printed
    assert "detail was" not in printed


@pytest.mark.usefixtures("no_network")
def test_detail_where_nobody_can_be_seen(
    bundle: Artifact, teacher: Path, split: Split, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = np.full((*SIZE, 3), 128, np.uint8)
    monkeypatch.setattr(Split, "image", lambda *_: plain)
    found = measured(bundle, teacher, split, Budget(detail_min=0), ClipConfig(count=0))
    assert found["violations"] == ["onnxruntime: detail was not measured, the limit is 0 (detail_min)"]
    assert [stage["stage"] for stage in found["stages"]][-1] == "bundle, 2 steps, fp32, onnxruntime"
    tables.drift(found)
    printed = " ".join(capsys.readouterr().out.split())
    assert "detail was not measured: nobody stands out from the background" in printed
    assert "PCK" not in printed


@pytest.mark.usefixtures("no_network")
def test_each_pair_has_its_own_noise_and_both_references(bundle: Artifact, teacher: Path, split: Split) -> None:
    """The figures against pictures that are made one by one here."""
    pairs = draw_pairs(split, 2, SIZE, SHAPE)
    assert abs(np.corrcoef(pairs.noise.reshape(2, -1))[0, 1]) < 0.3  # six standard deviations
    with Pipeline.open(bundle.path) as pipe:
        own = np.stack(
            [pipe.render(pipe.prepare(pairs.sources[i]), pairs.poses[i], pairs.noise[i : i + 1]) for i in range(2)]
        )
    one_by_one = [teacher_images(teacher, *(part[i : i + 1] for part in pairs.inputs), [REFERENCE]) for i in range(2)]
    wanted = np.concatenate([made[REFERENCE] for made in one_by_one])
    reference, _, mine, _ = measured(bundle, teacher, split, Budget(), ClipConfig(count=0))["stages"]
    assert mine == {
        "stage": "bundle, 2 steps, fp32, onnxruntime",
        "against_teacher": compare(wanted, own),
        "against_truth": compare(pairs.truths, own),
        "detail": mine["detail"],
    }
    for stage, images in ((reference, wanted), (mine, own)):
        kept = [detail(image, truth) for image, truth in zip(images, pairs.truths, strict=True)]
        assert stage["detail"]["detail"]["values"] == kept


def test_targets_without_a_visible_joint_are_left_out(split: Split) -> None:
    hidden = int(split.pairs[0][1])
    keypoints = split.keypoints.copy()
    keypoints[hidden] = np.nan
    chosen = shuffled_pairs(replace(split, keypoints=keypoints), len(split.pairs), np.random.default_rng(0))
    assert sorted(chosen) == sorted((int(s), int(t)) for s, t in split.pairs if t != hidden)
    assert len(chosen) < len(split.pairs)


def test_poses_without_a_torso_are_not_scored(split: Split) -> None:
    pairs = draw_pairs(split, 2, SIZE, SHAPE)
    pairs.poses[:, 1] = np.nan
    assert missing_measures(pairs, split, FILMED)["pck"] == "no pose has neck and hip"


def test_pairs_hold_the_poses_of_both_pictures(split: Split) -> None:
    pairs = draw_pairs(split, 3, SIZE, SHAPE)
    for names, poses in zip(pairs.names, zip(pairs.source_poses, pairs.poses, strict=True), strict=True):
        for name, pose in zip(names, poses, strict=True):
            np.testing.assert_array_equal(pose, split.pose(split.names.index(name), SIZE))


def test_clips_of_one_frame_are_refused_before_anything_slow(bundle: Artifact, split: Split) -> None:
    with pytest.raises(ConfigError, match="clips of 1 frames"):
        measured(bundle, Path("no teacher"), split, Budget(), ClipConfig(frames=1))


def test_the_table_gives_means(capsys: pytest.CaptureFixture[str]) -> None:
    def stage(name: str, **measures: Any) -> dict[str, Any]:
        return {"stage": name, **measures}

    pose = {"pck": {"mean": 0.8125}, "pck_unsided": {"mean": 0.9}}
    stages = [
        stage("teacher, reference", against_truth={"psnr_db": {"median": 18.44}}, pose=pose),
        stage("student", against_teacher={"psnr_db": {"median": 31.1}}),
        stage("bundle", flicker={"flicker": {"mean": 0.9990}, "motion": {"mean": 0.5}}),
        stage("smear", detail={"detail": {"median": 0.25, "mean": 0.5, "values": [0.25]}}),
        stage("ground truth", flicker={"flicker": {"mean": 0.3996}, "motion": {"mean": 1.0}}),
    ]
    tables.drift({"stages": stages, "missing": {"lpips": "weights not at hand"}, "pairs": [("a", "b")] * 2})
    printed = capsys.readouterr().out.splitlines()
    assert max(map(len, printed)) <= 80
    lines = [" ".join(line.split()) for line in printed]
    assert "teacher, reference – – – 18.4 – –" in lines
    assert "teacher, reference 0.812 0.900 – – – –" in lines
    assert "bundle – – – 0.999 2.500 0.500" in lines  # its flicker is 2.5 times the truth's
    assert "smear – – 0.250 – – –" in lines  # the median
    assert "ground truth – – – 0.400 1.000 1.000" in lines
    assert "detail was scored on 1 of 2 pairs" in lines
    assert sum("student" in line for line in lines) == 1
    assert sum("ground truth" in line for line in lines) == 1


@pytest.mark.parametrize("command", ["validate", "bench", "render"])
def test_a_command_verifies_a_bundle_once_and_opens_each_engine_once(
    bundle: Artifact, teacher: Path, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    verified, opened = list[Path](), list[str]()
    verify, runtime = artifact._verify, runtimes.load("onnxruntime")
    monkeypatch.setattr(artifact, "_verify", lambda found, *rest: verified.append(found) or verify(found, *rest))
    open_engine = runtime.open
    monkeypatch.setattr(runtime, "open", lambda engine, *rest: opened.append(engine.name) or open_engine(engine, *rest))
    person = sample_root() / "test_highres" / "p00900_0.jpg"
    pose = tmp_path / "pose.json"
    write_pose(pose, open_split(sample_root(), "test").pose(1, (256, 176)), (256, 176))
    if command == "validate":
        api.validate(bundle.path, teacher, "sample", backend="onnxruntime", pairs=2)
    elif command == "bench":
        api.bench(bundle.path, "onnxruntime", 2, 0.01)
    else:
        api.render(bundle.path, person, pose, tmp_path / "frame.png", "onnxruntime")
    assert sorted(opened) == ["frame", "prepare"]
    assert len(verified) == 1 + (command == "validate")  # the teacher, too
