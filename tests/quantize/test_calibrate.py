"""Calibration samples: spread, true to the data and to the student, reproducible, and what is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from distill.export import reference
from quantize import calibrate
from rpfm_edge.core import artifact
from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.errors import ArtifactError, ConfigError, InputError, SignatureError
from rpfm_edge.core.files import file_digest
from rpfm_edge.people.data import Split
from rpfm_edge.people.pose import draw_skeleton


def test_identities_and_sources_are_spread(samples: Path, people: Split) -> None:
    """16 samples of 12 identities: every identity, none more than twice, and no source twice."""
    loaded = calibrate.load(samples)
    sources = [loaded.facts["sources"][i] for i in loaded.index]
    times = np.unique([people.identities[people.names.index(name)] for name in sources], return_counts=True)[1]
    assert len(set(sources)) == len(sources) == 16
    assert len(times) == len(set(people.identities.tolist())) == 12
    assert times.max() == 2


def test_samples_are_pairs_of_the_data(samples: Path, people: Split) -> None:
    loaded = calibrate.load(samples)
    known = {(people.names[a], people.names[b]) for a, b in people.pairs}
    for source, pose, skeleton in zip(loaded.index, loaded.facts["poses"], loaded.pose, strict=True):
        assert (loaded.facts["sources"][source], pose) in known
        place = people.names.index(pose)
        np.testing.assert_array_equal(skeleton, draw_skeleton(people.keypoints[place] * (48 / 176, 64 / 256), (64, 48)))
    for name, image in zip(loaded.facts["sources"], loaded.source, strict=True):
        np.testing.assert_array_equal(image, people.image(people.names.index(name), (64, 48)))


def test_keys_and_values_are_those_of_torch(samples: Path, tiny_graph: Artifact) -> None:
    prepare = reference(tiny_graph.path / "student")["prepare"]
    loaded = calibrate.load(samples)
    expected = np.stack([prepare({"source": source[None]})["source_kv"] for source in loaded.source])
    np.testing.assert_allclose(loaded.tensors["source_kv"], expected, atol=1e-4)


def test_noise_is_standard_normal_and_never_repeats(samples: Path) -> None:
    noise = calibrate.load(samples).noise
    assert noise.dtype == np.float32
    assert abs(noise.mean()) < 4 / np.sqrt(noise.size)
    assert noise.std() == pytest.approx(1, abs=4 / np.sqrt(2 * noise.size))
    assert len(np.unique(noise)) > 0.99 * noise.size


def test_the_seed_decides_every_byte(tiny_graph: Artifact, people: Split, samples: Path, tmp_path: Path) -> None:
    again, other = (
        calibrate.record(tiny_graph, people, tmp_path / f"{seed}.safetensors", 16, seed=seed) for seed in (0, 1)
    )
    assert again.read_bytes() == samples.read_bytes()
    assert calibrate.load(other).facts["poses"] != calibrate.load(samples).facts["poses"]
    assert calibrate.load(samples).sha256 == file_digest(samples)


def test_feeds_fit_the_graphs(samples: Path, tiny_graph: Artifact) -> None:
    loaded = calibrate.load(samples)
    loaded.check(tiny_graph)
    for name, number in (("prepare", len(loaded.source)), ("frame", 16)):
        feeds = list(loaded.feeds(name))
        assert len(feeds) == number
        for feed in feeds:
            tiny_graph.signatures[name].check(feed)


def test_all_pairs_are_taken_if_there_are_fewer(tiny_graph: Artifact, people: Split, tmp_path: Path) -> None:
    few = replace(people, pairs=people.pairs[:9])
    loaded = calibrate.load(calibrate.record(tiny_graph, few, tmp_path / "s", 64))
    assert loaded.facts["count"] == len(loaded.index) == 9


def test_every_source_of_an_identity_comes_before_any_comes_twice(people: Split) -> None:
    pairs = calibrate.spread_pairs(people, np.random.default_rng(0))
    assert sorted(map(tuple, pairs)) == sorted(map(tuple, people.pairs))
    for identity in set(people.identities.tolist()):
        own = [source for source, _ in pairs.tolist() if people.identities[source] == identity]
        assert len(set(own[: len(set(own))])) == len(set(own))


def test_too_few_samples(tiny_graph: Artifact, people: Split, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="7 calibration samples: expected at least 8"):
        calibrate.record(tiny_graph, people, tmp_path / "s", 7)
    with pytest.raises(InputError, match="only 5 pairs to calibrate with: expected at least 8"):
        calibrate.record(tiny_graph, replace(people, pairs=people.pairs[:5]), tmp_path / "s")
    assert not list(tmp_path.iterdir())


def test_blank_and_identical_inputs(tiny_graph: Artifact, people: Split, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (256, 176, 3), dtype=np.uint8)
    grey, noisy = (cv2.imencode(".png", image)[1].tobytes() for image in (np.full_like(noise, 9), noise))
    with pytest.raises(InputError, match=r"picture p\d+_\d.jpg is blank"):
        calibrate.record(tiny_graph, replace(people, read=lambda name: grey), tmp_path / "s", 8)
    with pytest.raises(InputError, match=r"every picture, p\d+_\d.jpg first, is the same"):
        calibrate.record(tiny_graph, replace(people, read=lambda name: noisy), tmp_path / "s", 8)
    nobody = replace(people, keypoints=np.full_like(people.keypoints, np.nan))
    with pytest.raises(InputError, match="only 0 pairs to calibrate with: expected at least 8 with joints"):
        calibrate.record(tiny_graph, nobody, tmp_path / "s", 8)


def test_a_picture_without_joints_is_no_target(people: Split) -> None:
    """It is left out, as in validation; one joint is enough, and as a source it needs none."""
    keypoints = people.keypoints.copy()
    keypoints[:2] = np.nan
    keypoints[1, 4] = 50.0
    pairs = calibrate.spread_pairs(replace(people, keypoints=keypoints), np.random.default_rng(0))
    assert sorted(map(tuple, pairs)) == sorted((a, b) for a, b in map(tuple, people.pairs) if b != 0)
    assert 0 in pairs[:, 0]


def test_one_source_in_many_poses_calibrates(tiny_graph: Artifact, people: Split, tmp_path: Path) -> None:
    pairs = np.array([(0, target) for target in range(1, 10)])
    loaded = calibrate.load(calibrate.record(tiny_graph, replace(people, pairs=pairs), tmp_path / "s"))
    assert loaded.facts["sources"] == [people.names[0]]
    assert len(loaded.pose) == 9


def test_a_student_that_is_not_finite(tiny_graph: Artifact, people: Split, tmp_path: Path) -> None:
    shutil.copytree(tiny_graph.path, tmp_path / "graph")
    model = onnx.load(tmp_path / "graph/prepare.onnx")
    weights = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("embed_source.bias"))
    broken = numpy_helper.to_array(weights).copy()
    broken[0] = np.nan
    weights.CopyFrom(numpy_helper.from_array(broken, weights.name))
    onnx.save(model, tmp_path / "graph/prepare.onnx")
    with pytest.raises(ArtifactError, match="values that are not finite"):
        calibrate.record(artifact.load(tmp_path / "graph", verify=False), people, tmp_path / "s", 8)
    assert not (tmp_path / "s").exists()


def test_files_that_are_no_samples(tmp_path: Path, samples: Path) -> None:
    (tmp_path / "cut").write_bytes(samples.read_bytes()[:-100])
    (tmp_path / "text").write_text("hello")
    for name in ("cut", "text", "absent"):
        with pytest.raises(ArtifactError, match=r"cannot be read \(.+\): expected calibration samples"):
            calibrate.load(tmp_path / name)


def test_samples_of_another_graph(samples: Path, tiny_graph: Artifact) -> None:
    loaded = calibrate.load(samples)
    with pytest.raises(ArtifactError, match="were recorded with graph"):
        loaded.check(replace(tiny_graph, config={**tiny_graph.config, "steps": 9}))
    with pytest.raises(SignatureError, match="input 'pose'"):
        replace(loaded, pose=loaded.pose[:, :32]).check(tiny_graph)
