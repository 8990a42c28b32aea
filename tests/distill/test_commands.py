"""``train`` and ``distill`` at toy size: the chain of students, what they share, and what their artifacts say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from distill import rpfm
from distill.autoencoder import AlignedAutoencoder
from distill.commands import DistillRecipe, distill
from distill.export import export
from distill.student import DistillConfig, create_student, load_student
from distill.teach import TrainRecipe, train
from distill.teacher import load_teacher
from rpfm_edge import api
from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.errors import ConfigError, InputError
from rpfm_edge.people.data import Split, hold_out, sample_root
from rpfm_edge.people.deepfashion import open_split
from tests.distill.test_teacher import gaussian_teacher
from tests.distill.tiny import SIZE

TRAINED = TrainRecipe(
    "tiny",
    pose="skeleton",
    autoencoder_seconds=0.1,
    autoencoder_batch=2,
    alignment_seconds=0.1,
    decoder_seconds=0.1,
    seconds=0.3,
    sources=2,
    targets_per_source=2,
    size=SIZE,
)
KINDS = ("training", "validation")
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
        return train(replace(TRAINED, cache=str(folder / "cache")), splits[0], folder / "teacher", splits[1])


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


def test_another_size_is_another_run(
    teacher: Artifact, splits: tuple[Split, Split], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its latents would be read as those of the first one. Weights of another precision are stored as asked."""
    monkeypatch.setitem(rpfm.PRESETS, "tiny", rpfm.RPFMConfig(dim=32, depth=1, heads=2))
    again = replace(TRAINED, cache=str(folder / "cache"))
    with pytest.raises(ConfigError, match=r"autoencoder.safetensors was .*\(inputs.size\): .* = \[64, 48\]"):
        train(replace(again, size=(48, 64)), splits[0], folder / "teacher")
    with pytest.raises(ConfigError, match=r"teacher.safetensors was trained with .*\(inputs.autoencoder\)"):
        train(replace(again, weights="fp32"), splits[0], folder / "teacher")
    files = list((folder / "teacher.work").glob("autoencoder-*"))
    kinds = {load_file(file)["mean"].dtype for file in files}
    assert (len(files), kinds) == (2, {torch.float16, torch.float32})


def test_another_size_is_another_run_with_an_autoencoder_that_is_given(
    splits: tuple[Split, Split], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(rpfm.PRESETS, "tiny", rpfm.RPFMConfig(dim=32, depth=1, heads=2))
    given = replace(TRAINED, autoencoder=str(small_vae(tmp_path / "vae")), seconds=0.1)
    train(given, splits[0], tmp_path / "out")
    with pytest.raises(ConfigError, match=r"teacher.safetensors was trained with .*\(inputs.size\): .* = \[64, 48\]"):
        train(replace(given, size=(48, 64)), splits[0], tmp_path / "out")


def small_vae(folder: Path) -> Path:
    """A folder of an untrained ``AutoencoderKL`` with four pixels per latent."""
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
    AutoencoderKL(**blocks, block_out_channels=[8, 8, 8], norm_num_groups=4).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_people_without_pairs(kind: str, splits: tuple[Split, Split], tmp_path: Path) -> None:
    """Refused before the autoencoder is trained."""
    one, other = (replace(s, pairs=s.pairs[:0]) if kind == k else s for s, k in zip(splits, KINDS, strict=True))
    with pytest.raises(InputError, match=rf"the {kind} people of .* have no pairs: expected two pictures"):
        train(TRAINED, one, tmp_path / "out", other)
    with pytest.raises(InputError, match=r"the training people of .* have no pairs"):
        distill(QUICK, "teacher:xs", replace(splits[0], pairs=splits[0].pairs[:0]), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_picture_to_validate_on_is_missing(splits: tuple[Split, Split], tmp_path: Path) -> None:
    def read(name: str) -> bytes:
        if name == splits[1].names[-1]:
            raise InputError(f"image {name} cannot be read", expected="it", fix="copy it")
        return splits[1].read(name)

    with pytest.raises(InputError, match=f"image {splits[1].names[-1]} cannot be read"):
        train(TRAINED, splits[0], tmp_path / "out", replace(splits[1], read=read))
    assert not list(tmp_path.iterdir())


def foreign_teacher() -> SimpleNamespace:
    """A factory whose teacher has an autoencoder that no artifact can hold."""
    return SimpleNamespace(**{**vars(gaussian_teacher()), "autoencoder": _Identity()})


def test_a_factory_that_was_edited_is_another_teacher(
    splits: tuple[Split, Split], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its paths are not continued with those of the old one, and the record tells the two apart."""
    file, spec = tmp_path / "edited_teacher.py", "edited_teacher:factory"
    file.write_text("from tests.distill.test_teacher import gaussian_teacher as factory\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    shared = {"preset": "tiny", "cache": str(folder / "cache")}
    monkeypatch.setitem(rpfm.PRESETS, "tiny", rpfm.RPFMConfig(dim=32, depth=1, heads=2))
    recipe, out = replace(QUICK, **shared), tmp_path / "out"
    first = distill(recipe, spec, splits[0], out)
    assert distill(recipe, spec, splits[0], out).lineage[-1].inputs == first.lineage[-1].inputs
    file.write_text(file.read_text() + "# edited\n")
    with pytest.raises(ConfigError, match=r"was trained with other settings \(inputs.teacher\)"):
        distill(recipe, spec, splits[0], out)
    next((tmp_path / "out.work").glob("flowmap-*.safetensors")).unlink()
    with pytest.raises(ConfigError, match="holds trajectories of another teacher"):
        distill(recipe, spec, splits[0], out)


class _Identity(torch.nn.Identity):
    latent_channels, factor = 8, 8


def test_a_teacher_whose_student_cannot_be_saved(splits: tuple[Split, Split], tmp_path: Path) -> None:
    spec = "tests.distill.test_commands:foreign_teacher"
    with pytest.raises(ConfigError, match="autoencoder _Identity: expected SmallAutoencoder or KLAutoencoder"):
        distill(replace(QUICK, preset="xs"), spec, splits[0], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_preset_that_is_not_the_teachers(splits: tuple[Split, Split], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has architecture .*'dim': 192.*: expected .*'dim': 384"):
        distill(replace(QUICK, preset="s"), "teacher:xs", splits[0], tmp_path / "out")
    assert not list(tmp_path.iterdir())
    student = create_student(load_teacher("teacher:xs"), DistillConfig(), rpfm.preset("xs", "keypoints"))
    assert student.network.config.dim == 192


def test_a_size_that_cannot_be_cut_into_patches(splits: tuple[Split, Split], tmp_path: Path) -> None:
    """Refused before anything is trained or encoded: 8 pixels per latent and 2 × 2 latents per patch."""
    with pytest.raises(ConfigError, match=r"size = \[100, 48\]: expected multiples of 16, .*; take \[96, 48\]"):
        train(TrainRecipe(size=(100, 48)), splits[0], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_size_is_measured_by_the_autoencoder_that_is_given(splits: tuple[Split, Split], tmp_path: Path) -> None:
    """Four pixels per latent, so multiples of 8."""
    small_vae(tmp_path / "vae")
    with pytest.raises(ConfigError, match=r"size = \[68, 40\]: expected multiples of 8, .*; take \[64, 40\]"):
        train(
            TrainRecipe(size=(68, 40), pose="skeleton", autoencoder=str(tmp_path / "vae")), splits[0], tmp_path / "out"
        )
    assert [path.name for path in tmp_path.iterdir()] == ["vae"]


WRONG = {"seconds": -1.0, "lr": 0.0, "ema": 0.0, "batch": 0, "targets_per_source": 0, "trajectories": 0}


@pytest.mark.parametrize("key", [*WRONG, "store_seconds"])
def test_numbers_that_distill_cannot_take(key: str, tmp_path: Path) -> None:
    value = WRONG.get(key, 0.0)
    with pytest.raises(ConfigError, match=rf"^distill: {key} = {value:g}: expected"):
        api.distill("teacher:xs", "sample", tmp_path / "out", **{key: value})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("changes", [{"seconds": -1.0}, {"autoencoder_seconds": 0.0}, {"sources": 0}])
def test_numbers_that_train_cannot_take(changes: dict[str, float], tmp_path: Path) -> None:
    """The same in a file and beside it."""
    [(key, value)], file = changes.items(), tmp_path / "config.toml"
    file.write_text(f"{key} = {value}\n")
    for config, given in (("xs", changes), (file, {})):
        with pytest.raises(ConfigError, match=rf"{key} = {value:g}: expected"):
            api.train(config, "sample", tmp_path / "out", **given)
    assert list(tmp_path.iterdir()) == [file]


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
    """Zero steps would be trained, and the record would name a batch that no step has seen. The store is left alone."""
    recipe = replace(QUICK, cache=str(folder / "cache"), store=str(folder / "store-2"))
    distill(recipe, str(teacher.path), splits[0], folder / "other")
    with pytest.raises(ConfigError, match=r"was trained with other settings \(inputs.batch\): expected .* = 8;"):
        distill(replace(recipe, batch=16), str(teacher.path), splits[0], folder / "other")
    shards = len(list((folder / "store-2").glob("shard-*")))
    more = replace(recipe, trajectories=recipe.trajectories + 64)
    with pytest.raises(ConfigError, match=r"\(inputs.store.trajectories\): expected .* = 32; delete it"):
        distill(more, str(teacher.path), splits[0], folder / "other")
    assert len(list((folder / "store-2").glob("shard-*"))) == shards
    (folder / "other.work" / "flowmap-4.safetensors").unlink()
    distill(more, str(teacher.path), splits[0], folder / "other")
    assert len(list((folder / "store-2").glob("shard-*"))) == shards + 2


@pytest.mark.slow
def test_a_teacher_of_keypoints_is_made_in_stages_and_distilled(splits: tuple[Split, Split], tmp_path: Path) -> None:
    """Autoencoder, alignment, flow and decoder; the same call finds all of them done."""
    recipe = replace(TRAINED, pose="keypoints", guidance_scale=1.0, cache=str(tmp_path / "cache"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(rpfm.PRESETS, "tiny", rpfm.RPFMConfig(dim=32, depth=1, heads=2))
        made = train(recipe, splits[0], tmp_path / "teacher", splits[1])
        again = train(recipe, splits[0], tmp_path / "teacher", splits[1])
    assert [stage.stage for stage in made.lineage] == ["autoencoder", "alignment", "train", "decoder"]
    assert made.files == again.files
    teacher = load_teacher(made.path)
    assert teacher.pose == "keypoints"
    assert isinstance(teacher.autoencoder, AlignedAutoencoder)
    distilled = distill(replace(QUICK, cache=recipe.cache, steps=1), str(made.path), splits[0], tmp_path / "student")
    graph = export(distilled.path, tmp_path / "graph")
    assert graph.config["pose"] == "keypoints"
    assert graph.signatures["frame"].input("pose").shape == (1, 18, 2)
    assert {"joints", "joint_scores"} <= {spec.name for spec in graph.signatures["prepare"].outputs}
