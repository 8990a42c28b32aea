"""The trajectory store and the students: resuming, exact targets, and that each method comes nearer to its teacher."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from distill.batches import EncodedSplit
from distill.rpfm import RPFMConfig
from distill.store import StoreConfig, Trajectories, build_store, load_store
from distill.student import DistillConfig, Method, create_student, load_student, save_student, train_student
from distill.teacher import RPFMTeacher, load_teacher, sample_teacher
from distill.train import TrainConfig
from rpfm_edge.data import draw_batch
from rpfm_edge.errors import ConfigError, InputError
from tests.distill.tiny import NETWORK, SIZE, toy_data, toy_teacher

STORE = StoreConfig(trajectories=64, sources_per_shard=2, targets_per_source=4)


@pytest.fixture(scope="module")
def teacher() -> RPFMTeacher:
    return toy_teacher()


@pytest.fixture(scope="module")
def data(teacher: RPFMTeacher, tmp_path_factory: pytest.TempPathFactory) -> EncodedSplit:
    return toy_data(teacher, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def store(teacher: RPFMTeacher, data: EncodedSplit, tmp_path_factory: pytest.TempPathFactory) -> Trajectories:
    folder = tmp_path_factory.mktemp("store")
    build_store(teacher, "toy", data, folder, STORE)
    return load_store(folder)


def test_states_are_the_teachers_path(teacher: RPFMTeacher, data: EncodedSplit, store: Trajectories) -> None:
    assert store.states.shape == (64, 9, 8, 8, 6)
    rows = slice(0, 4)  # one source
    shape = (1, 4)
    batch = data.batch(store.sources[:1], store.targets[rows].reshape(shape), store.flips[:1])
    noise = store.states[rows, 0].float()
    end = sample_teacher(teacher, noise, teacher.condition(batch.source, batch.pose), 8, "heun")
    torch.testing.assert_close(
        store.states[rows, -1].float(), end, atol=0.05, rtol=0.05
    )  # bf16 where it is fast, fp16 kept


def test_store_resumes_shard_by_shard(teacher: RPFMTeacher, data: EncodedSplit, tmp_path: Path) -> None:
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    build_store(teacher, "toy", data, whole, STORE)
    for rank in (1, 0):
        share = SimpleNamespace(process_index=rank, num_processes=2, device=torch.device("cpu"))
        build_store(teacher, "toy", data, pieces, STORE, processes=share)  # type: ignore[arg-type]
    (pieces / "shard-00003.safetensors").unlink()
    kept = {f.name: f.stat().st_mtime_ns for f in pieces.glob("shard-*")}
    assert build_store(teacher, "toy", data, pieces, STORE) == STORE.shards
    assert {f.name: f.stat().st_mtime_ns for f in pieces.glob("shard-*") if f.name in kept} == kept
    assert torch.equal(load_store(whole).states, load_store(pieces).states)


def test_store_of_another_config_is_refused(teacher: RPFMTeacher, data: EncodedSplit, tmp_path: Path) -> None:
    build_store(teacher, "toy", data, tmp_path, STORE, seconds=0.0)
    with pytest.raises(ConfigError, match="another teacher or config"):
        build_store(teacher, "toy", data, tmp_path, StoreConfig(trajectories=64, seed=9))


def test_grid_must_serve_eight_steps(teacher: RPFMTeacher, data: EncodedSplit, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a grid of 4"):
        build_store(teacher, "toy", data, tmp_path, StoreConfig(trajectories=8, grid=4))


def test_empty_store(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no trajectories"):
        load_store(tmp_path)


def test_a_flow_map_student_begins_as_its_teacher(teacher: RPFMTeacher, data: EncodedSplit) -> None:
    student = create_student(toy_teacher(scale=1.0), DistillConfig("flowmap", 4)).eval()
    batch = data.batch(*draw_batch(data.split, 2, 2, np.random.default_rng(0)))
    noise = torch.randn(4, *teacher.latent_shape)
    plain = toy_teacher(scale=1.0)
    expected = sample_teacher(plain, noise, plain.condition(batch.source, batch.pose), 4, "euler")
    with torch.no_grad():
        got = student.sample(noise, student.condition(batch.source, batch.pose), 4)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("method", "steps"), [("reflow", 1), ("flowmap", 1), ("flowmap", 2), ("endpoint", 1), ("endpoint", 2)]
)
def test_distillation_beats_few_steps_of_the_teacher(
    method: Method, steps: int, data: EncodedSplit, tmp_path: Path
) -> None:
    """A teacher with a curved closed-form flow, noise never seen: N steps of the student beat N Euler steps."""
    teacher = load_teacher("tests.distill.test_teacher:gaussian_teacher")
    build_store(teacher, "toy", data, tmp_path / "store", STORE)
    train = TrainConfig(steps=70, lr=5e-3, warmup_steps=10, ema=0.9, precision="no")
    config = DistillConfig(method, steps, train, batch=32, perceptual_weight=0.1)
    wide_enough = replace(NETWORK, dim=96, depth=1, pose_channels=2)  # a token must carry its 32 numbers of noise
    fresh = create_student(teacher, config, wide_enough)
    student, _ = train_student(fresh, data, load_store(tmp_path / "store"), config, tmp_path / "c")
    noise = torch.randn(8, *teacher.latent_shape, generator=torch.Generator().manual_seed(7))
    few = sample_teacher(teacher, noise, None, steps, "euler")
    batch = data.batch(*draw_batch(data.split, 2, 4, np.random.default_rng(0)))
    with torch.no_grad():
        made = student.sample(noise, student.condition(batch.source, batch.pose), steps)
    exact = 0.5 + 0.5 * noise
    assert (made - exact).square().mean() < 0.2 * (few - exact).square().mean()


def test_artifact_round_trip(teacher: RPFMTeacher, data: EncodedSplit, tmp_path: Path) -> None:
    config = DistillConfig("flowmap", 2)
    student = create_student(teacher, config).eval()
    saved = save_student(student, tmp_path / "s", config, SIZE, ())
    again, loaded = load_student(saved.path)
    assert loaded.config["steps"] == 2
    batch = data.batch(*draw_batch(data.split, 1, 2, np.random.default_rng(0)))
    noise = torch.randn(2, *teacher.latent_shape)
    with torch.no_grad():
        a, b = (s.sample(noise, s.condition(batch.source, batch.pose), 2) for s in (student, again))
    torch.testing.assert_close(a, b)


def test_a_student_of_a_foreign_teacher_needs_an_architecture() -> None:
    foreign = load_teacher("tests.distill.test_teacher:gaussian_teacher")
    with pytest.raises(ConfigError, match="no RPFM network"):
        create_student(foreign, DistillConfig())
    student = create_student(
        foreign, DistillConfig(), RPFMConfig(**{f: getattr(NETWORK, f) for f in NETWORK.__slots__})
    )
    assert student.network.config.step_embedding


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DistillConfig("magic"), "unknown method 'magic'"),
        (DistillConfig("flowmap", 3), "3 steps"),
        (DistillConfig("endpoint", 5), "5 steps"),
    ],  # type: ignore[arg-type]
)
def test_bad_distillation_config(config: DistillConfig, message: str, teacher: RPFMTeacher) -> None:
    with pytest.raises(ConfigError, match=message):
        create_student(teacher, config)
