"""The whole chain at toy size: train → distill → quantize → build → validate → bench → render → inspect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from distill import rpfm
from rpfm_edge import api
from rpfm_edge.bundle.pipeline import Pipeline
from rpfm_edge.core import artifact
from rpfm_edge.people.data import sample_root
from rpfm_edge.people.deepfashion import open_split
from rpfm_edge.people.formats import write_pose

SIZE = (64, 48)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every artifact of the chain, made in a few seconds from the packaged sample."""
    folder = tmp_path_factory.mktemp("chain")
    config = folder / "tiny.toml"
    config.write_text(
        f'preset = "tiny"\npose = "skeleton"\nsize = {list(SIZE)}\nweights = "fp32"\n'
        "autoencoder_seconds = 1.0\nseconds = 2.0\nsources = 2\ntargets_per_source = 4\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(rpfm.PRESETS, "tiny", rpfm.RPFMConfig(dim=32, depth=2, heads=2))
        made = {"teacher": api.train(config, "sample", folder / "teacher").path}
    made["student"] = api.distill(
        made["teacher"],
        "sample",
        folder / "student",
        steps=2,
        trajectories=32,
        seconds=2.0,
        batch=16,
        targets_per_source=4,
    ).path
    for precision in ("fp32", "int8"):
        made[precision] = api.quantize(made["student"], "sample", folder / precision, precision, samples=8).path
    made["bundle"] = api.build(made["fp32"], folder / "bundle", ["openvino", "onnxruntime", "torch"]).path
    made["small"] = api.build(made["int8"], folder / "small", "openvino").path
    return made


def test_every_artifact_verifies_and_knows_its_lineage(chain: dict[str, Path]) -> None:
    record = api.inspect(chain["small"])
    assert [stage["stage"] for stage in record["lineage"]] == [
        "autoencoder",
        "train",
        "distill",
        "export",
        "quantize",
        "build",
    ]
    assert record["lineage"][2]["inputs"]["teacher"] == artifact.load(chain["teacher"]).digest
    assert record["lineage"][3]["inputs"]["student"] == artifact.load(chain["student"]).digest


def test_backends_render_the_same_picture(chain: dict[str, Path]) -> None:
    test = open_split(sample_root(), "test")
    pictures = {}
    for backend in ("openvino", "onnxruntime", "torch"):
        with Pipeline.open(chain["bundle"], backend) as pipe:
            assert pipe.size == SIZE
            person = pipe.prepare(test.image(0))
            pictures[backend] = pipe.render(person, test.pose(1, SIZE)).astype(int)
    assert pictures["torch"].std() > 1
    for backend in ("openvino", "onnxruntime"):
        assert abs(pictures[backend] - pictures["torch"]).max() <= 1


def test_validate_measures_and_keeps_the_evidence(chain: dict[str, Path], tmp_path: Path) -> None:
    budget = tmp_path / "budget.toml"
    budget.write_text("[drift]\npsnr_db_min = 1.0\nssim_min = 1.0\n")
    found = api.validate(chain["bundle"], chain["teacher"], "sample", budget, pairs=3)
    bundles = [f"bundle, 2 steps, fp32, {backend}" for backend in ("openvino", "onnxruntime", "torch")]
    assert [stage["stage"] for stage in found["stages"]][:5] == ["teacher, reference", "teacher, 2 steps", *bundles]
    assert [text.split()[:2] for text in found["violations"]] == [
        [f"{backend}:", "ssim"] for backend in ("openvino", "onnxruntime", "torch")
    ]
    assert api.inspect(chain["bundle"])["evidence"]["drift"]["violations"] == found["violations"]


def test_validating_one_backend_leaves_the_evidence_of_all(chain: dict[str, Path]) -> None:
    def kept() -> Any:
        return api.inspect(chain["bundle"])["evidence"].get("drift")

    api.validate(chain["bundle"], chain["teacher"], "sample", pairs=2)
    before = kept()
    found = api.validate(chain["bundle"], chain["teacher"], "sample", backend="onnxruntime", pairs=2, seed=1)
    stages = [stage["stage"] for stage in found["stages"] if stage["stage"].startswith("bundle")]
    assert stages == ["bundle, 2 steps, fp32, onnxruntime"]
    assert before
    assert kept() == before


def test_evidence_does_not_change_who_the_bundle_is(chain: dict[str, Path]) -> None:
    before = artifact.load(chain["bundle"]).digest
    found = api.bench(chain["bundle"], runs=3, seconds=0.01)
    assert {b["backend"] for b in found["backends"]} == {"openvino", "onnxruntime", "torch"}
    assert all(b["frame"]["runs"] >= 3 and b["frame"]["p50_s"] > 0 for b in found["backends"])
    assert artifact.load(chain["bundle"]).digest == before


def test_render_writes_the_picture_that_the_pipeline_makes(chain: dict[str, Path], tmp_path: Path) -> None:
    test = open_split(sample_root(), "test")
    source, pose = tmp_path / "person.png", tmp_path / "pose.json"
    cv2.imwrite(str(source), test.image(0, SIZE)[..., ::-1])
    write_pose(pose, test.pose(1, SIZE), SIZE)
    written = api.render(chain["small"], source, pose, tmp_path / "out.png")
    with Pipeline.open(chain["small"]) as pipe:
        expected = pipe.render(pipe.prepare(source), test.pose(1, SIZE))
    np.testing.assert_array_equal(cv2.imread(str(written))[..., ::-1], expected)
