"""The trajectory store and the students: resuming, exact targets, and that each method comes nearer to its teacher."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from distill import store as store_module
from distill import train as train_module
from distill.batches import EncodedSplit, settle_split
from distill.export import export
from distill.graphs import write_graph
from distill.rpfm import RPFM, RPFMConfig
from distill.store import StoreConfig, Trajectories, build_store, load_store
from distill.student import (
    METHODS,
    DistillConfig,
    DistillLoss,
    Method,
    Student,
    create_student,
    load_student,
    save_student,
    train_student,
)
from distill.teacher import FlowMatchingConfig, NetworkTeacher, load_teacher, sample_teacher, train_teacher
from distill.train import TrainConfig
from rpfm_edge.core.errors import ArtifactError, ConfigError, InputError, ParityError
from rpfm_edge.core.flow import check_steps
from rpfm_edge.core.signature import Signature, TensorSpec
from rpfm_edge.people.data import draw_batch
from tests.distill.tiny import NETWORK, SIZE, randomised, toy_data, toy_teacher

STORE = StoreConfig(trajectories=64, sources_per_shard=2, targets_per_source=4)


@pytest.fixture(scope="module")
def teacher() -> NetworkTeacher:
    return toy_teacher()


@pytest.fixture(scope="module")
def data(teacher: NetworkTeacher, tmp_path_factory: pytest.TempPathFactory) -> EncodedSplit:
    return toy_data(teacher, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def store(teacher: NetworkTeacher, data: EncodedSplit, tmp_path_factory: pytest.TempPathFactory) -> Trajectories:
    folder = tmp_path_factory.mktemp("store")
    build_store(teacher, "toy", data, folder, STORE)
    return load_store(folder)


def test_states_are_the_teachers_path(teacher: NetworkTeacher, data: EncodedSplit, store: Trajectories) -> None:
    assert store.states.shape == (64, 9, 8, 8, 6)
    rows = slice(0, 4)  # one source
    shape = (1, 4)
    batch = data.batch(store.sources[:1], store.targets[rows].reshape(shape), store.flips[:1])
    noise = store.states[rows, 0].float()
    end = sample_teacher(teacher, noise, teacher.condition(batch.source, batch.pose), 8, "heun")[-1]
    torch.testing.assert_close(
        store.states[rows, -1].float(), end, atol=0.05, rtol=0.05
    )  # bf16 where it is fast, fp16 kept


def test_no_two_paths_share_their_noise(store: Trajectories) -> None:
    """Nor do two shards share their draws: the noises of all are as good as uncorrelated."""
    noise = store.states[:, 0].float().flatten(1)
    others = torch.corrcoef(noise) - torch.eye(len(noise))
    assert others.abs().max() < 6 / math.sqrt(noise.shape[1])  # six standard deviations
    drawn = np.stack([store.sources, store.targets, store.flips]).reshape(3, STORE.shards, STORE.shard_size)
    assert len({drawn[:, shard].tobytes() for shard in range(STORE.shards)}) == STORE.shards


def test_store_resumes_shard_by_shard(teacher: NetworkTeacher, data: EncodedSplit, tmp_path: Path) -> None:
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


def test_store_of_another_config_is_refused(teacher: NetworkTeacher, data: EncodedSplit, tmp_path: Path) -> None:
    build_store(teacher, "toy", data, tmp_path, STORE, seconds=0.0)
    with pytest.raises(ConfigError, match="another teacher, data set or config"):
        build_store(teacher, "toy", data, tmp_path, StoreConfig(trajectories=64, seed=9))


def test_store_of_another_data_set_is_refused(teacher: NetworkTeacher, data: EncodedSplit, tmp_path: Path) -> None:
    """Its paths name pictures by number, so they would be of other people."""
    build_store(teacher, "toy", data, tmp_path, STORE, seconds=0.0)
    other = replace(data, split=replace(data.split, pairs=data.split.pairs[:-1]))
    moved = replace(data, split=replace(data.split, keypoints=data.split.keypoints + 1))  # corrected since
    for one in (other, moved):
        with pytest.raises(ConfigError, match="another teacher, data set or config"):
            build_store(teacher, "toy", one, tmp_path, STORE)
    copied = replace(data, split=replace(data.split, root=tmp_path))
    build_store(teacher, "toy", copied, tmp_path, STORE, seconds=0.0)


def test_damaged_files_are_named(teacher: NetworkTeacher, data: EncodedSplit, tmp_path: Path) -> None:
    """A shard and the description of a store, and the latents, cut short by a copy that did not end."""
    few = replace(STORE, trajectories=STORE.shard_size)
    build_store(teacher, "toy", data, tmp_path / "store", few)
    toy_data(teacher, tmp_path)
    shard, meta = (tmp_path / "store" / name for name in ("shard-00000.safetensors", "store.json"))
    [latents] = tmp_path.glob("latents-*")
    for file, use in (
        (shard, lambda: load_store(tmp_path / "store", few)),
        (shard, lambda: build_store(teacher, "toy", data, tmp_path / "store", few)),
        (meta, lambda: build_store(teacher, "toy", data, tmp_path / "store", few)),
        (latents, lambda: toy_data(teacher, tmp_path)),
    ):
        file.write_bytes(file.read_bytes()[:100])
        with pytest.raises(ArtifactError, match=rf"{file.name} does not fit this run \(.+\): expected .*; delete it"):
            use()


def test_shards_are_the_same_however_many_are_solved_together(
    teacher: NetworkTeacher, data: EncodedSplit, store: Trajectories, tmp_path: Path
) -> None:
    build_store(teacher, "toy", data, tmp_path, replace(STORE, shards_per_solve=3))
    together = load_store(tmp_path, STORE)
    assert torch.equal(together.states[:, 0], store.states[:, 0])
    np.testing.assert_array_equal(together.targets, store.targets)
    torch.testing.assert_close(together.states, store.states, atol=0.05, rtol=0.05)  # bf16 where it is fast


def test_of_a_larger_store_only_the_paths_that_were_asked_for(
    teacher: NetworkTeacher, data: EncodedSplit, store: Trajectories, tmp_path: Path
) -> None:
    build_store(teacher, "toy", data, tmp_path, STORE)
    files = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    few = replace(STORE, trajectories=24)
    assert build_store(teacher, "toy", data, tmp_path, few) == 3
    assert files == {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    assert torch.equal(load_store(tmp_path, few).states, store.states[:24])
    assert len(load_store(tmp_path).states) == 64


def test_seconds_bound_the_solving_of_all_calls_together(
    teacher: NetworkTeacher, data: EncodedSplit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each solve takes ten seconds of a clock that we turn: 25 s are three solves, and no more in a second call."""
    ticks = itertools.count(step=10)
    monkeypatch.setattr(store_module, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    assert build_store(teacher, "toy", data, tmp_path, STORE, seconds=25) == 3
    assert build_store(teacher, "toy", data, tmp_path, STORE, seconds=25) == 3
    assert build_store(teacher, "toy", data, tmp_path, STORE, seconds=35) == 4


def test_grid_must_serve_eight_steps(teacher: NetworkTeacher, data: EncodedSplit, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a grid of 4"):
        build_store(teacher, "toy", data, tmp_path, StoreConfig(trajectories=8, grid=4))


def test_empty_store(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no trajectories"):
        load_store(tmp_path)


def test_a_flow_map_student_begins_as_its_teacher(teacher: NetworkTeacher, data: EncodedSplit) -> None:
    student = create_student(toy_teacher(scale=1.0), DistillConfig("flowmap", 4)).eval()
    batch = data.batch(*draw_batch(data.split, 2, 2, np.random.default_rng(0)))
    noise = torch.randn(4, *teacher.latent_shape)
    plain = toy_teacher(scale=1.0)
    expected = sample_teacher(plain, noise, plain.condition(batch.source, batch.pose), 4, "euler")[-1]
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
    few = sample_teacher(teacher, noise, None, steps, "euler")[-1]
    batch = data.batch(*draw_batch(data.split, 2, 4, np.random.default_rng(0)))
    with torch.no_grad():
        made = student.sample(noise, student.condition(batch.source, batch.pose), steps)
    exact = 0.5 + 0.5 * noise
    assert (made - exact).square().mean() < 0.2 * (few - exact).square().mean()


def test_an_endpoint_is_judged_by_its_edges_too(
    teacher: NetworkTeacher, data: EncodedSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a decoder that leaves latents as they are: L1 of their differences down and across, of the first images."""
    student = create_student(teacher, DistillConfig("endpoint", 1)).eval()
    monkeypatch.setattr(student.autoencoder, "decode", lambda latent, tensors=None: latent)
    batch = data.batch(*draw_batch(data.split, 1, 4, np.random.default_rng(0)))
    wanted = [torch.randn(4, *teacher.latent_shape) for _ in range(2)]
    with torch.no_grad():
        plain, judged = (
            DistillLoss(student, DistillConfig("endpoint", 1, perceptual_weight=weight, perceptual_images=3))(
                batch.source, batch.pose, *wanted
            )
            for weight in (0.0, 0.25)
        )
        made = student.sample(wanted[0], student.condition(batch.source, batch.pose), 1)
    wrong = (made - wanted[1])[:3].numpy()
    edges = sum(np.abs(np.diff(wrong, axis=axis)).mean() for axis in (2, 3))
    assert edges > 0.1
    assert float(judged - plain) == pytest.approx(0.25 * edges, rel=1e-3)


def gaussian_student(method: Method, data: EncodedSplit, folder: Path, start: RPFM | None = None) -> RPFM:
    """A one-step student of the closed-form teacher: 100 steps from nothing, or 60 gentler ones from a start."""
    teacher = load_teacher("tests.distill.test_teacher:gaussian_teacher")
    build_store(teacher, "toy", data, folder / "store", STORE)
    torch.manual_seed(0)
    steps, lr = (60, 1e-3) if start else (100, 5e-3)
    train = TrainConfig(steps=steps, lr=lr, warmup_steps=10, ema=0.9, precision="no")
    config = DistillConfig(method, 1, train, batch=32, perceptual_weight=0.0)
    fresh = create_student(teacher, config, replace(NETWORK, dim=96, depth=1, pose_channels=2), start)
    student, _ = train_student(fresh, data, load_store(folder / "store"), config, folder / f"{method}-{steps}")
    return student.network


@pytest.mark.slow
def test_an_endpoint_polishes_a_flow_map(data: EncodedSplit, tmp_path: Path) -> None:
    """At one step, noise never seen: nearer to the closed form than the flow map it starts from, and than this flow
    map trained on as long. The step embedding is kept, and is told d = 1."""
    data = settle_split(data, "cpu", resident=True)
    flowmap = gaussian_student("flowmap", data, tmp_path)
    continued = gaussian_student("flowmap", data, tmp_path, flowmap)
    polished = gaussian_student("endpoint", data, tmp_path, flowmap)
    noise = torch.randn(16, 8, 8, 6, generator=torch.Generator().manual_seed(7))
    batch = data.batch(*draw_batch(data.split, 2, 8, np.random.default_rng(0)))
    told: list[torch.Tensor] = []
    polished.step.register_forward_hook(lambda module, inputs, output: told.append(inputs[0]))

    def error(network: RPFM) -> float:
        student = Student(network, toy_teacher().autoencoder).eval()
        with torch.no_grad():
            made = student.sample(noise, student.condition(batch.source, batch.pose), 1)
        return float((made - (0.5 + 0.5 * noise)).square().mean())

    assert error(polished) < 0.8 * error(continued) < error(flowmap)
    assert [d.unique().tolist() for d in told] == [[1.0]]


@pytest.mark.parametrize("method", ["flowmap", "endpoint"])
def test_a_student_begins_as_the_one_it_starts_from(
    method: Method, teacher: NetworkTeacher, data: EncodedSplit
) -> None:
    """A flow map has a step embedding that its start lacked, and it is zero; an endpoint adds none."""
    start = create_student(teacher, DistillConfig("reflow", 1))
    randomised(start.network, seed=5)
    student = create_student(teacher, DistillConfig(method, 1), start=start.network)
    assert (student.network.step is None) == (method == "endpoint")
    batch = data.batch(*draw_batch(data.split, 1, 2, np.random.default_rng(0)))
    noise = torch.randn(2, *teacher.latent_shape)
    with torch.no_grad():
        a, b = (s.sample(noise, s.condition(batch.source, batch.pose), 1) for s in (start, student))
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_size": (8, 8)}, r"has latents \(8, 8, 8\): expected \(8, 8, 6\)"),
        ({"factor": 4}, r"has pictures \(32, 24\): expected \(64, 48\)"),
        ({"depth": 3}, r"has architecture .*'depth': 3.*: expected .*'depth': 2"),
        ({"step_embedding": True}, "reflow, whose network knows no step size, cannot start"),
    ],
)
def test_a_start_that_does_not_fit(changes: dict[str, object], message: str, teacher: NetworkTeacher) -> None:
    start = RPFM(replace(NETWORK, **changes))
    with pytest.raises(ConfigError, match=message):
        create_student(teacher, DistillConfig("reflow", 1), NETWORK, start)


@pytest.mark.parametrize("start", [True, False])
def test_the_architecture_is_that_of_the_weights(start: bool, teacher: NetworkTeacher) -> None:
    """Another one is refused, whether the weights are the teacher's or a student's; their own may be named."""
    given = create_student(teacher, DistillConfig("reflow", 1)).network if start else None
    student = create_student(teacher, DistillConfig("flowmap", 1), NETWORK, given)
    assert student.network.config == replace(NETWORK, step_embedding=True)
    with pytest.raises(ConfigError, match=r"'dim': 32\}: expected \{'dim': 64\}; .* leave the preset out"):
        create_student(teacher, DistillConfig("flowmap", 1), replace(NETWORK, dim=64), given)


@pytest.mark.parametrize(
    ("method", "trained", "refused"), [("endpoint", 1, (2, 4)), ("flowmap", 4, (3, 16)), ("reflow", 4, ())]
)
def test_steps_that_a_student_has_not_learnt(
    method: Method, trained: int, refused: tuple[int, ...], teacher: NetworkTeacher, tmp_path: Path
) -> None:
    """An endpoint is trained for one number, a flow map for those that divide the paths, reflow for every time."""
    config = DistillConfig(method, trained)
    saved = save_student(create_student(teacher, config), tmp_path / "s", config, SIZE, ())
    expected = {"endpoint": "expected 1;", "flowmap": "expected 1 or 2 or 4 or 8;"}
    for steps in refused:
        with pytest.raises(ConfigError, match=rf"steps = {steps} for a student .* {method} for .*: {expected[method]}"):
            export(saved.path, tmp_path / "graph", steps)
    assert not (tmp_path / "graph").exists()
    for steps in {"endpoint": (1,), "flowmap": (1, 2, 4, 8), "reflow": (1, 3, 16)}[method]:
        check_steps(saved.config, steps)


class ChangesWhenTraced(torch.nn.Module):
    """Adds ``error`` in the graph alone."""

    def __init__(self, error: float) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x + (self.error if torch.jit.is_tracing() else 0.0)


@pytest.mark.parametrize("error", [0.0, 1e-3, math.nan])
def test_a_graph_that_differs_from_torch_is_not_written(error: float, tmp_path: Path) -> None:
    boundary = Signature((TensorSpec("x", (1, 3), "float32"),), (TensorSpec("y", (1, 3), "float32"),))
    feeds, file = {"x": np.ones((1, 3), np.float32)}, tmp_path / "frame.onnx"
    if not error:
        assert write_graph(ChangesWhenTraced(error), boundary, feeds, file) < 1e-6
        assert file.is_file()
        return
    with pytest.raises(
        ParityError,
        match=r"^frame\.onnx differs from torch by (0\.00\d+|nan) of its largest value: expected at most 0\.0001",
    ):
        write_graph(ChangesWhenTraced(error), boundary, feeds, file)
    assert not file.exists()


@pytest.mark.parametrize("method", [*METHODS, "teacher"])
def test_a_killed_run_continues_to_the_same_weights(
    method: str,
    teacher: NetworkTeacher,
    data: EncodedSplit,
    store: Trajectories,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the real losses: what they draw depends on the step alone, and a checkpoint holds all that they change."""
    limits, step = TrainConfig(steps=5, warmup_steps=2, save_every_s=0.0), train_module._Run.train_step
    monkeypatch.setattr(train_module, "SHARE", math.inf)  # saves after every step

    def train(name: str) -> tuple[RPFM, list[float]]:
        torch.manual_seed(0)
        if method == "teacher":
            config = FlowMatchingConfig(limits, sources=2, targets_per_source=2)
            network, history = train_teacher(RPFM(NETWORK), teacher.autoencoder, data, config, tmp_path / name)
            return network, history.losses
        distilled = DistillConfig(method, 2, limits, batch=8)
        student, history = train_student(create_student(teacher, distilled), data, store, distilled, tmp_path / name)
        return student.network, history.losses

    def dies(run: Any, *arguments: Any) -> None:
        if run.history.step == 3:
            raise KeyboardInterrupt
        step(run, *arguments)

    whole, losses = train("whole")
    monkeypatch.setattr(train_module._Run, "train_step", dies)
    with pytest.raises(KeyboardInterrupt):
        train("cut")
    monkeypatch.setattr(train_module._Run, "train_step", step)
    resumed, again = train("cut")
    assert again == losses
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_artifact_round_trip(teacher: NetworkTeacher, data: EncodedSplit, tmp_path: Path) -> None:
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
    with pytest.raises(ConfigError, match="brings no network"):
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
def test_bad_distillation_config(config: DistillConfig, message: str, teacher: NetworkTeacher) -> None:
    with pytest.raises(ConfigError, match=message):
        create_student(teacher, config)
