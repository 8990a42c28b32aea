"""Teachers of modules: a network that nobody here wrote, from its factory to the bundle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distill.autoencoder import Pixels
from distill.batches import EncodedSplit
from distill.condition import Source, with_missing
from distill.contract import ContractNetwork, Parts
from distill.drawing import heat_maps
from distill.export import export
from distill.guidance import Branch, Guidance
from distill.store import StoreConfig, build_store, load_store
from distill.student import DistillConfig, create_student, load_student, save_student, train_student
from distill.teacher import NetworkTeacher, load_teacher, sample_teacher
from distill.train import TrainConfig
from rpfm_edge.core.errors import ConfigError
from tests.distill.tiny import SIZE, toy_data, toy_teacher

HERE = "tests.distill.test_contract"


class TimestepEmbedding(nn.Module):
    """By the name that diffusers' has."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        return self.layers(t[:, None])


class Convolutions(nn.Module):
    """A velocity of convolutions, with tokens of the source pooled in and a heat map beside the latent."""

    def __init__(self, embeds: bool = True) -> None:
        super().__init__()
        self.time = TimestepEmbedding(16) if embeds else None
        self.enter, self.leave = nn.Conv2d(8 + 18, 16, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)
        self.look = nn.Linear(8, 16)

    def forward(self, x: Tensor, t: Tensor, *, tokens: Tensor, heat: Tensor) -> Tensor:
        hidden = self.enter(torch.cat([x, heat], dim=1)) + self.look(tokens.mean(1))[..., None, None]
        if self.time is not None:
            hidden = hidden + self.time(t)[..., None, None]
        return self.leave(torch.nn.functional.silu(hidden)) - 0.3 * x


class Tokens(nn.Module):
    """Of a source: what a small encoder sees of its pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.see = nn.Conv2d(3, 8, 8, 8)

    def forward(self, pixels: Tensor, latent: Tensor, keypoints: Tensor) -> dict[str, Tensor]:
        return {"tokens": self.see(pixels).flatten(2).transpose(1, 2)}


def heat(keypoints: Tensor) -> dict[str, Tensor]:
    return {"heat": heat_maps(keypoints, SIZE, out=(8, 6))}


def factory(**changes: object) -> Parts:
    """Always the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network, tokens = Convolutions(changes.pop("embeds", True)), Tokens()  # type: ignore[arg-type]
    parts = Parts(network, toy_teacher().autoencoder, SIZE, tokens, heat, guidance=Guidance(2.0))
    return replace(parts, **changes)


def of_fixed_steps() -> Parts:
    """A network without a time embedding."""
    return factory(embeds=False)


def of_its_own_sampler() -> Parts:
    """A sampler that goes straight to twice the noise: nothing else would."""

    def straight(predict: Callable[..., Tensor], noise: Tensor, times: Sequence[float]) -> list[Tensor]:
        return [noise * (1 + t) for t in times]

    return factory(path=straight)


@pytest.fixture(scope="module")
def teacher() -> NetworkTeacher:
    made = load_teacher(f"{HERE}:factory")
    assert isinstance(made, NetworkTeacher)
    return made


@pytest.fixture(scope="module")
def data(teacher: NetworkTeacher, tmp_path_factory: pytest.TempPathFactory) -> EncodedSplit:
    return replace(toy_data(teacher, tmp_path_factory.mktemp("cache")), pose="keypoints")


def some_of(data: EncodedSplit) -> tuple[Source, Tensor]:
    batch = data.batch(np.array([0, 12]), np.array([[1, 2], [13, 14]]), np.zeros(2, bool))
    return batch.source, batch.pose


@pytest.mark.parametrize("steps", [1, 4])
def test_a_student_begins_as_the_teachers_network(teacher: NetworkTeacher, data: EncodedSplit, steps: int) -> None:
    """A flow map's new step embedding is zero, so it makes the teacher's own Euler steps, without guidance."""
    source, pose = some_of(data)
    plain = NetworkTeacher(teacher.network, teacher.autoencoder, Guidance(1.0), SIZE)
    noise = torch.randn(4, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    want = sample_teacher(plain, noise, plain.condition(source, pose), steps)[-1]
    student = create_student(teacher, DistillConfig("flowmap", 1))
    torch.testing.assert_close(student.sample(noise, student.condition(source, pose), steps), want)
    assert student.network.step is not None
    assert teacher.network.step is None, "the teacher stays as it is"


def test_the_step_size_reaches_the_copy(teacher: NetworkTeacher, data: EncodedSplit) -> None:
    source, pose = some_of(data)
    student = create_student(teacher, DistillConfig("flowmap", 1))
    assert student.network.step is not None
    with torch.no_grad():
        student.network.step.step.mlp[2].weight.normal_()
    condition, x, t = student.condition(source, pose), torch.zeros(4, *teacher.latent_shape), torch.zeros(4)
    short, long = (student.average_velocity(x, t, torch.full((4,), d), condition) for d in (0.125, 1.0))
    assert (short - long).abs().max() > 1e-3


def test_three_branches_are_their_weighted_sum(teacher: NetworkTeacher, data: EncodedSplit) -> None:
    """CFLD's: a scale for the pose and one for the source."""
    source, pose = some_of(data)
    three = (Branch(1 - 2.0, ("heat", "tokens")), Branch(2.0 - 3.0, ("tokens",)), Branch(lambda t: 3.0))
    guided = NetworkTeacher(teacher.network, teacher.autoencoder, three, SIZE)
    x = torch.randn(4, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    tokens = teacher.network.source(source)["tokens"].repeat_interleave(2, dim=0)
    drawn, time = heat_maps(with_missing(pose), SIZE, out=(8, 6)), torch.full((4,), 0.4)
    core = teacher.network.network
    nobody, posed, whole = (
        core(x, time, tokens=tokens * a, heat=drawn * b) for a, b in ((0.0, 0.0), (0.0, 1.0), (1.0, 1.0))
    )
    want = nobody + 2.0 * (posed - nobody) + 3.0 * (whole - posed)
    torch.testing.assert_close(guided.velocity(x, 0.4, guided.condition(source, pose)), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("branches", "message"),
    [
        ((Branch(2.0), Branch(-0.5, ("heat",))), "add up to 1.5"),
        ((Branch(2.0), Branch(-1.0, ("hat",))), "goes without 'hat': expected one of .*heat.*tokens"),
    ],
)
def test_branches_that_cannot_be(
    branches: tuple[Branch, ...], message: str, teacher: NetworkTeacher, data: EncodedSplit
) -> None:
    with pytest.raises(ConfigError, match=message):
        NetworkTeacher(teacher.network, teacher.autoencoder, branches, SIZE).condition(*some_of(data))


def test_paths_and_references_are_of_the_teachers_own_sampler(data: EncodedSplit, tmp_path: Path) -> None:
    own = load_teacher(f"{HERE}:of_its_own_sampler")
    config = StoreConfig(8, sources_per_shard=2, targets_per_source=4)
    build_store(own, "own", data, tmp_path / "store", config)
    states = load_store(tmp_path / "store").states.float()
    torch.testing.assert_close(states[:, 8], 2 * states[:, 0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(states[:, 2], 1.25 * states[:, 0], rtol=1e-3, atol=1e-3)


def test_a_network_without_a_time_embedding_learns_its_steps_alone(data: EncodedSplit, tmp_path: Path) -> None:
    fixed = load_teacher(f"{HERE}:of_fixed_steps")
    store = tmp_path / "store"
    build_store(fixed, "fixed", data, store, StoreConfig(8, sources_per_shard=2, targets_per_source=4))
    config = DistillConfig("flowmap", 2, TrainConfig(steps=2), batch=4)
    student = create_student(fixed, config)
    student, _ = train_student(student, data, load_store(store), config, tmp_path / "c.safetensors")
    save_student(student, tmp_path / "student", config, SIZE, ())
    export(tmp_path / "student", tmp_path / "graph")
    with pytest.raises(ConfigError, match=r"steps = 4 .*: expected 2"):
        export(tmp_path / "student", tmp_path / "other", steps=4)


def test_a_saved_student_is_made_by_its_factory_again(
    teacher: NetworkTeacher, data: EncodedSplit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, pose = some_of(data)
    student = create_student(teacher, DistillConfig("flowmap", 2))
    with torch.no_grad():
        for parameter in student.network.parameters():
            parameter.add_(0.01)
    save_student(student, tmp_path / "student", DistillConfig("flowmap", 2), SIZE, ())
    again, _ = load_student(tmp_path / "student")
    noise = torch.randn(4, *teacher.latent_shape)
    a, b = (one.sample(noise, one.condition(source, pose), 2) for one in (student, again))
    torch.testing.assert_close(a, b)
    monkeypatch.delattr(f"{HERE}.factory")
    with pytest.raises(ConfigError, match="cannot be imported"):
        load_student(tmp_path / "student")


def test_what_a_source_encoder_knows_is_not_trained(teacher: NetworkTeacher) -> None:
    student = create_student(teacher, DistillConfig("reflow", 1))
    trained = {name for name, weight in student.network.named_parameters() if weight.requires_grad}
    assert trained == {name for name, _ in student.network.named_parameters() if not name.startswith("source_encoder")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": torch.sin}, "network is a builtin_function_or_method: expected an nn.Module"),
        ({"source": None}, "source is a NoneType: expected a module or a function"),
        ({"pose_kind": "heat maps"}, "pose_kind 'heat maps': expected one of"),
        ({"fit": "crop"}, "fit 'crop': expected one of"),
        ({"size": (64, 50)}, r"size \[64, 50\] is no multiple of 8, the codec's factor"),
        ({"codec": nn.Identity()}, "codec has no encode"),
    ],
)
def test_parts_that_cannot_be(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        factory(**changes)


def test_a_time_embedding_that_is_not_there() -> None:
    network = ContractNetwork(factory(time_embedding="tme"))
    with pytest.raises(ConfigError, match=r"no module 'tme', its time_embedding: expected such as \['time'"):
        network.as_student(True)


def test_pictures_are_their_own_latents() -> None:
    parts = factory(codec=Pixels())
    assert parts.latent_shape == (3, *SIZE)
    image = torch.rand(1, 3, *SIZE)
    assert torch.equal(parts.codec.decode(parts.codec.encode(image)), image)


def test_adapters_are_merged_into_the_copy(data: EncodedSplit, tmp_path: Path) -> None:
    """They begin as nothing; trained, they move linear layers and nothing else, and leave no trace of themselves."""
    teacher = load_teacher(f"{HERE}:factory")
    store = tmp_path / "store"
    build_store(teacher, "lora", data, store, StoreConfig(8, sources_per_shard=2, targets_per_source=4))
    config = DistillConfig("flowmap", 1, TrainConfig(steps=3, lr=1e-2, ema=0.0), batch=8, lora=2)
    student = create_student(teacher, config)
    source, pose = some_of(data)
    noise = torch.randn(4, *teacher.latent_shape)
    plain = create_student(teacher, replace(config, lora=0))
    a, b = (one.sample(noise, one.condition(source, pose), 1) for one in (plain, student))
    torch.testing.assert_close(a, b)
    trained, _ = train_student(student, data, load_store(store), config, tmp_path / "c.safetensors")
    before, after = plain.network.state_dict(), trained.network.state_dict()
    assert before.keys() == after.keys()
    moved = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    assert moved & {"network.look.weight"}
    assert all("time" in name or name == "network.look.weight" for name in moved)


def test_gradient_checkpointing_needs_modules_that_can(teacher: NetworkTeacher) -> None:
    with pytest.raises(ConfigError, match="compute its activations again"):
        create_student(teacher, DistillConfig("reflow", 1, gradient_checkpointing=True))


def of_nothing_at_noise() -> Parts:
    """A velocity that is 0 / 0 where there is nothing but noise."""

    class Divided(Convolutions):
        def forward(self, x: Tensor, t: Tensor, *, tokens: Tensor, heat: Tensor) -> Tensor:
            return super().forward(x, t, tokens=tokens, heat=heat) * (t / t)[:, None, None, None]

    return factory(network=Divided(), guidance=Guidance(1.0))


def test_a_velocity_that_is_no_number_at_noise_is_found_before_the_paths(data: EncodedSplit, tmp_path: Path) -> None:
    broken = load_teacher(f"{HERE}:of_nothing_at_noise")
    with pytest.raises(ConfigError, match="velocity at t = 0 is not finite"):
        build_store(broken, "broken", data, tmp_path / "store", StoreConfig(8))
    assert not list((tmp_path / "store").glob("shard-*"))
