"""``train`` and ``distill`` at toy size: the chain of students, what they share, and what their artifacts say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from distill import rpfm
from distill.commands import DistillRecipe, TrainRecipe, distill, train
from distill.student import load_student
from rpfm_edge.artifact import Artifact
from rpfm_edge.data import Split, hold_out, open_split, sample_root
from rpfm_edge.errors import ConfigError
from tests.distill.tiny import SIZE

QUICK = DistillRecipe(trajectories=32, targets_per_source=4, seconds=0.1, batch=8)


@pytest.fixture(scope="module")
def splits() -> tuple[Split, Split]:
    return hold_out(open_split(sample_root(), "test"), 2, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chain")


@pytest.fixture(scope="module")
def teacher(splits: tuple[Split, Split], folder: Path) -> Artifact:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(rpfm.PRESETS, "tiny", rpfm.RPFMConfig(dim=32, depth=1, heads=2))
        seconds = {"autoencoder_seconds": 0.1, "seconds": 0.3, "autoencoder_batch": 2}
        recipe = TrainRecipe("tiny", **seconds, sources=2, targets_per_source=2, size=SIZE, cache=str(folder / "cache"))
        return train(recipe, splits[0], folder / "teacher", splits[1])


@pytest.fixture(scope="module")
def chain(teacher: Artifact, splits: tuple[Split, Split], folder: Path) -> dict[str, Artifact]:
    """teacher → reflow → flowmap → endpoint, one store, one cache; the store may not be solved after the first."""
    shared = replace(QUICK, store=str(folder / "store"), cache=str(folder / "cache"))
    made: dict[str, Artifact] = {}
    for name, method, init in (("r", "reflow", None), ("f", "flowmap", "r"), ("e", "endpoint", "f")):
        start = str(made[init].path) if init else None
        recipe = replace(shared, method=method, steps=1, init=start, store_seconds=0.0 if made else None)
        made[name] = distill(recipe, str(teacher.path), splits[0], folder / name)
    return made


def test_the_teacher_keeps_its_held_out_curve(teacher: Artifact) -> None:
    curve, stage = teacher.config["validation"], teacher.lineage[-1]
    assert [len(point) for point in curve] == [3] * len(curve)
    assert curve[-1][1] == stage.config["steps_done"]
    assert stage.config["train"]["evaluate_every_s"] == pytest.approx(0.3 / 50)


def test_a_chain_solves_its_paths_once(chain: dict[str, Artifact], folder: Path) -> None:
    """Shards are written once, and the last student's record says that it learnt from all of them."""
    assert len(list((folder / "store").glob("shard-*"))) == 1
    assert [made.lineage[-1].config["trajectories"] for made in chain.values()] == [32, 32, 32]
    assert not [path for path in folder.glob("*.work/store")]


def test_a_chain_encodes_its_data_once(chain: dict[str, Artifact], folder: Path) -> None:
    """Two files: the pictures that train, encoded by ``train`` for all that follow, and the validation's."""
    assert len(list((folder / "cache").glob("latents-*"))) == 2
    assert not list(folder.glob("*.work/latents-*"))


def test_a_chain_is_known_by_its_lineage(chain: dict[str, Artifact], teacher: Artifact) -> None:
    stages = chain["e"].lineage
    assert [stage.stage for stage in stages] == ["autoencoder", "train", "distill", "distill", "distill"]
    assert [stage.config.get("method") for stage in stages[2:]] == ["reflow", "flowmap", "endpoint"]
    assert [dict(stage.inputs) for stage in stages[2:]] == [
        {"teacher": teacher.digest},
        {"teacher": teacher.digest, "init": chain["r"].digest},
        {"teacher": teacher.digest, "init": chain["f"].digest},
    ]


def test_a_chain_keeps_the_step_embedding_from_the_flow_map_on(chain: dict[str, Artifact]) -> None:
    embedded = [load_student(made.path)[0].network.config.step_embedding for made in chain.values()]
    assert embedded == [False, True, True]


def test_another_start_begins_afresh(
    chain: dict[str, Artifact], teacher: Artifact, splits: tuple[Split, Split], folder: Path
) -> None:
    """The state of a run is of its start: another one does not continue it."""
    recipe = replace(QUICK, method="endpoint", steps=1, store=str(folder / "store"), cache=str(folder / "cache"))
    made = distill(replace(recipe, init=str(chain["r"].path)), str(teacher.path), splits[0], folder / "e")
    assert not load_student(made.path)[0].network.config.step_embedding
    assert len(list((folder / "e.work").glob("endpoint-1-*.safetensors"))) == 2


@pytest.mark.parametrize(("method", "weight"), [("flowmap", 0.5), ("endpoint", -1.0)])
def test_perceptual_weight_that_cannot_be(
    method: str, weight: float, splits: tuple[Split, Split], tmp_path: Path
) -> None:
    recipe = replace(QUICK, method=method, perceptual_weight=weight)
    with pytest.raises(ConfigError, match=f"perceptual_weight {weight:g} with method {method}"):
        distill(recipe, "teacher:xs", splits[0], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_perceptual_weight_is_recorded(
    teacher: Artifact, chain: dict[str, Artifact], splits: tuple[Split, Split], folder: Path
) -> None:
    assert chain["e"].lineage[-1].config["perceptual_weight"] == 0.5
    recipe = replace(QUICK, method="endpoint", steps=1, perceptual_weight=0.0, store=str(folder / "store"))
    made = distill(replace(recipe, cache=str(folder / "cache")), str(teacher.path), splits[0], folder / "plain")
    assert made.lineage[-1].config["perceptual_weight"] == 0.0


def test_unfinished_training_on_other_inputs_is_refused(
    teacher: Artifact, splits: tuple[Split, Split], folder: Path
) -> None:
    """Zero steps would be trained, and the record would name a batch that no step has seen."""
    recipe = replace(QUICK, cache=str(folder / "cache"), store=str(folder / "store-2"))
    distill(recipe, str(teacher.path), splits[0], folder / "other")
    with pytest.raises(ConfigError, match="was trained with other settings"):
        distill(replace(recipe, batch=16), str(teacher.path), splits[0], folder / "other")
