"""The teacher: guidance, the artifact, factories, batches, and that flow matching learns."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from distill.condition import Source, encode_pose, per_target
from distill.rpfm import RPFM
from distill.teacher import (
    Example,
    FlowMatchingConfig,
    FlowMatchingLoss,
    Guidance,
    NetworkTeacher,
    draw_example,
    held_out_loss,
    load_teacher,
    pose_kind,
    sample_teacher,
    save_teacher,
    train_teacher,
)
from distill.train import TrainConfig
from rpfm_edge.core.errors import ArtifactError, ConfigError
from rpfm_edge.people.data import draw_batch
from rpfm_edge.people.image import from_model
from rpfm_edge.people.pose import draw_skeleton, flip, from_graph
from tests.distill.tiny import NETWORK, SIZE, toy_data, toy_teacher


@pytest.fixture(scope="module")
def conditions(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Two sources with two targets each, and noise."""
    teacher = toy_teacher()
    data = toy_data(teacher, tmp_path_factory.mktemp("cache"))
    batch = data.batch(*draw_batch(data.split, 2, 2, np.random.default_rng(0)))
    noise = torch.randn(4, *teacher.latent_shape, generator=torch.Generator().manual_seed(1))
    return SimpleNamespace(teacher=teacher, data=data, batch=batch, noise=noise)


def test_guidance_is_null_plus_scale_times_difference(conditions: SimpleNamespace) -> None:
    network, batch, x = conditions.teacher.network, conditions.batch, conditions.noise
    time = torch.full((4,), 0.3)
    with torch.no_grad():
        tensors = per_target(network.source(batch.source), 2)
        pose = encode_pose(network, conditions.teacher.autoencoder, batch.pose, tensors)["pose"]
        nothing = per_target(network.source(batch.source, torch.zeros(2, dtype=torch.bool)), 2)
        conditional = network(x, time, pose=pose, **tensors)
        null = network(x, time, pose=torch.zeros_like(pose), **nothing)
    got = conditions.teacher.velocity(x, 0.3, conditions.teacher.condition(batch.source, batch.pose))
    torch.testing.assert_close(got, null + 1.5 * (conditional - null), atol=1e-5, rtol=1e-4)


def test_scale_one_is_the_conditional_velocity_and_costs_one_evaluation(conditions: SimpleNamespace) -> None:
    teacher = toy_teacher(scale=1.0)
    calls = []
    teacher.network.register_forward_hook(lambda *_: calls.append(1))
    teacher.velocity(conditions.noise, 0.3, teacher.condition(conditions.batch.source, conditions.batch.pose))
    assert len(calls) == 1


def test_interval_schedule_guides_in_the_middle_only(conditions: SimpleNamespace) -> None:
    guided, plain = toy_teacher(3.0, "interval"), toy_teacher(1.0)
    condition = guided.condition(conditions.batch.source, conditions.batch.pose)
    for t, same in ((0.1, True), (0.5, False), (0.9, True)):
        a, b = (teacher.velocity(conditions.noise, t, condition) for teacher in (guided, plain))
        assert torch.equal(a, b) is same


def test_batches_hold_what_the_data_set_says(conditions: SimpleNamespace) -> None:
    data = conditions.data
    batch = data.batch(np.array([0]), np.array([[1, 2]]), np.array([True]))
    torch.testing.assert_close(batch.source.latent[0], data.latents[1, 0].float())
    np.testing.assert_array_equal(from_model(batch.source.pixels.numpy())[0], data.split.image(0, SIZE)[:, ::-1])
    np.testing.assert_array_equal(batch.source.joints[0], flip(data.split.pose(0, SIZE), SIZE[1]))
    torch.testing.assert_close(batch.target[1], data.latents[1, 2].float())
    drawn = draw_skeleton(flip(data.split.pose(2, SIZE), SIZE[1]), SIZE)
    np.testing.assert_array_equal(np.rint((batch.pose[1].numpy().transpose(1, 2, 0) + 1) * 127.5), drawn)


def test_batches_hold_keypoints_for_a_network_of_keypoints(conditions: SimpleNamespace) -> None:
    data = replace(conditions.data, pose="keypoints")
    sources, targets, flips = np.array([0, 3]), np.array([[1, 2], [4, 5]]), np.array([True, False])
    batch, places = data.batch(sources, targets, flips), [(1, True), (2, True), (4, False), (5, False)]
    for pose, (index, mirrored) in zip(batch.pose.numpy(), places, strict=True):
        plain = data.split.pose(index, SIZE)
        np.testing.assert_array_equal(from_graph(pose), flip(plain, SIZE[1]) if mirrored else plain)
    assert torch.isfinite(batch.pose).all()


def test_dropped_conditions_are_not_seen(conditions: SimpleNamespace) -> None:
    """Nothing flows back to the source and the skeletons of the first person, who lost them; the other's are used."""
    batch, noise, time = conditions.batch, conditions.noise, torch.full((4,), 0.3)
    latent, skeleton = batch.source.latent.clone().requires_grad_(), batch.pose.clone().requires_grad_()
    source = Source(latent, batch.source.pixels, batch.source.joints)
    loss = FlowMatchingLoss(conditions.teacher.network, conditions.teacher.autoencoder, FlowMatchingConfig())
    loss(Example(source, skeleton, batch.target, time, noise, torch.tensor([False, True]))).backward()
    assert [bool(gradient.any()) for gradient in latent.grad] == [False, True]
    assert [bool(gradient.any()) for gradient in skeleton.grad] == [False, False, True, True]


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_so_many_lose_their_conditions(share: float, conditions: SimpleNamespace) -> None:
    config, rng = FlowMatchingConfig(sources=8, targets_per_source=1, condition_dropout=share), np.random.default_rng(0)
    kept = torch.cat([draw_example(conditions.data, config, rng, "cpu").keep for _ in range(40)])
    deviation = math.sqrt(share * (1 - share) / len(kept))
    assert abs(float(kept.float().mean()) - (1 - share)) <= 4 * deviation


def test_flow_matching_learns_to_reach_the_target(conditions: SimpleNamespace, tmp_path: Path) -> None:
    """A network trained on few pairs for a few seconds samples nearer to their targets than the mean picture is."""
    teacher, data = conditions.teacher, conditions.data
    torch.manual_seed(0)
    train = TrainConfig(steps=300, lr=4e-3, warmup_steps=20, ema=0.95, precision="no")
    config = FlowMatchingConfig(train=train, sources=4, targets_per_source=4, condition_dropout=0.0)
    network, history = train_teacher(RPFM(NETWORK), teacher.autoencoder, data, config, tmp_path / "c")
    assert np.mean(history.losses[-20:]) < 0.8 * np.mean(history.losses[:5])
    learnt = NetworkTeacher(network, teacher.autoencoder, Guidance(1.0), SIZE)
    batch = data.batch(*draw_batch(data.split, 4, 4, np.random.default_rng(5)))
    noise = torch.randn(16, *learnt.latent_shape)
    made = sample_teacher(learnt, noise, learnt.condition(batch.source, batch.pose), 8)[-1]
    error = (made - batch.target).square().mean()
    assert error < (data.latents.float().mean((0, 1)) - batch.target).square().mean()


def test_held_out_loss_is_the_same_each_time_and_for_every_run(conditions: SimpleNamespace) -> None:
    """Whatever the seed and the batches of the run, but not whatever the weights."""
    data, network = conditions.data, RPFM(NETWORK)
    runs = (FlowMatchingConfig(), FlowMatchingConfig(TrainConfig(seed=5), sources=2, targets_per_source=3))
    first, second = (held_out_loss(data, config) for config in runs)
    model = FlowMatchingLoss(network, conditions.teacher.autoencoder, runs[0])
    with torch.no_grad():
        assert first(model) == first(model) == second(model)
        # an untrained network predicts zero, so this is E|y - z|² of the pictures there
        assert first(model) == pytest.approx(1 + float(data.latents.float().square().mean()), rel=0.1)
        better = FlowMatchingLoss(conditions.teacher.network, conditions.teacher.autoencoder, runs[0])
        assert first(better) != first(model)


def test_training_keeps_the_held_out_curve(conditions: SimpleNamespace, tmp_path: Path) -> None:
    data, teacher = conditions.data, conditions.teacher
    train = TrainConfig(steps=40, lr=4e-3, warmup_steps=5, ema=0.9, precision="no", evaluate_every_s=1000.0)
    config = FlowMatchingConfig(train=train, sources=2, targets_per_source=4)
    network, history = train_teacher(RPFM(NETWORK), teacher.autoencoder, data, config, tmp_path / "c", data)
    with torch.no_grad():
        final = held_out_loss(data, config)(FlowMatchingLoss(network, teacher.autoencoder, config))
    assert history.validation == [(history.elapsed_s, 40, pytest.approx(final))]
    assert final < history.losses[0]


def test_artifact_round_trip(conditions: SimpleNamespace, tmp_path: Path) -> None:
    saved = save_teacher(conditions.teacher, tmp_path / "t", ())
    again = load_teacher(saved.path)
    a, b = (t.condition(conditions.batch.source, conditions.batch.pose) for t in (conditions.teacher, again))
    torch.testing.assert_close(
        again.velocity(conditions.noise, 0.5, b), conditions.teacher.velocity(conditions.noise, 0.5, a)
    )
    assert again.guidance == Guidance(1.5, "constant")


def test_truncated_weights_are_refused(conditions: SimpleNamespace, tmp_path: Path) -> None:
    save_teacher(conditions.teacher, tmp_path / "t", ())
    file = tmp_path / "t" / "network.safetensors"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(ArtifactError, match="altered or cut short"):
        load_teacher(tmp_path / "t")


def gaussian_teacher() -> SimpleNamespace:
    """A teacher that is no RPFM: the exact flow to N(0.5, 0.5²), whatever the condition."""

    def velocity(x: torch.Tensor, t: float, condition: object) -> torch.Tensor:
        variance = (1 - t) ** 2 + (0.5 * t) ** 2
        return 0.5 + (t * 0.25 - (1 - t)) / variance * (x - 0.5 * t)

    toy = toy_teacher()
    return SimpleNamespace(
        autoencoder=toy.autoencoder,
        latent_shape=toy.latent_shape,
        size=SIZE,
        condition=lambda source, pose: None,
        velocity=velocity,
    )


def test_any_factory_with_the_velocity_contract_is_a_teacher() -> None:
    teacher = load_teacher("tests.distill.test_teacher:gaussian_teacher")
    noise = torch.randn(4, *teacher.latent_shape, dtype=torch.float64)
    end = sample_teacher(teacher, noise, None, 400, "heun")[-1]
    torch.testing.assert_close(end, 0.5 + 0.5 * noise, atol=1e-4, rtol=0)


@pytest.mark.parametrize("spec", ["no_such_package:factory", "math:no_such_function"])
def test_factory_that_is_not_there(spec: str) -> None:
    with pytest.raises(ConfigError, match="cannot be imported"):
        load_teacher(spec)


def incomplete() -> SimpleNamespace:
    """A factory whose teacher lacks most of the contract."""
    return SimpleNamespace(velocity=None)


def test_factory_without_the_contract() -> None:
    with pytest.raises(ConfigError, match="has no autoencoder, latent_shape, size, condition"):
        load_teacher("tests.distill.test_teacher:incomplete")


def one_that_does_not_fit(**changes: object) -> SimpleNamespace:
    return SimpleNamespace(**{**vars(gaussian_teacher()), **changes})


def of_another_latent() -> SimpleNamespace:
    """A factory whose latents are not those of its autoencoder at its size."""
    return one_that_does_not_fit(latent_shape=(8, 6, 8))


def of_another_velocity() -> SimpleNamespace:
    """A factory whose velocity has a channel too few."""
    return one_that_does_not_fit(velocity=lambda x, t, condition: x[:, 1:])


def of_numpy() -> SimpleNamespace:
    """A factory whose velocity is no tensor."""
    return one_that_does_not_fit(velocity=lambda x, t, condition: x.numpy())


def of_keypoints() -> SimpleNamespace:
    """A factory that wants keypoints."""
    return one_that_does_not_fit(pose="keypoints", condition=lambda source, pose: pose.view(-1, 36)[:, :1])


def test_factory_of_keypoints() -> None:
    assert pose_kind(load_teacher("tests.distill.test_teacher:of_keypoints")) == "keypoints"
    assert pose_kind(load_teacher("tests.distill.test_teacher:gaussian_teacher")) == "skeleton"


def of_another_pose() -> SimpleNamespace:
    """A factory that wants what nobody makes."""
    return one_that_does_not_fit(pose="heat maps")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("of_another_pose", r"wants the pose as 'heat maps': expected one of \('skeleton', 'keypoints'\)"),
        ("of_another_latent", r"latent_shape \(8, 6, 8\): expected \[8, 8, 6\]"),
        ("of_another_velocity", r"a velocity \[1, 7, 8, 6\] for one latent: expected \[1, 8, 8, 6\]"),
        ("of_numpy", r"a velocity of the type ndarray"),
    ],
)
def test_factory_whose_shapes_do_not_fit(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_teacher(f"tests.distill.test_teacher:{name}")
