"""Data sets: both of DeepFashion's layouts, held-out identities, batches, and what is refused."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from rpfm_edge.core.errors import BackendError, ConfigError, InputError
from rpfm_edge.people.data import as_seen, draw_batch, hold_out, shared_person
from rpfm_edge.people.deepfashion import open_split, read_clip
from rpfm_edge.people.formats import write_pose
from rpfm_edge.people.image import decode_image
from rpfm_edge.people.splits import open_splits

FLAT = "fashionWOMENDressesid0000713204_4full.jpg"
NESTED = "fashion/WOMEN/Dresses/id_00007132/04_4_full.jpg"
HEADER = "name:keypoints_y:keypoints_x"


def picture(value: int, size: tuple[int, int] = (256, 176)) -> np.ndarray:
    """A grey level that tells the picture, with a left half that tells the side."""
    image = np.full((*size, 3), value, np.uint8)
    image[:, : size[1] // 2] += 20
    return image


def write_layout_a(root: Path, names: list[str], pairs: list[tuple[str, str]], split: str = "train") -> Path:
    folder = root / f"{split}_highres"
    folder.mkdir(parents=True, exist_ok=True)
    lines = [HEADER]
    for i, name in enumerate(names):
        cv2.imwrite(str(folder / name), picture(10 * i))
        ys, xs = ([float(start + k) for k in range(18)] for start in (100 * i, 50 * i))
        lines.append(f"{name}: {ys}: {xs}")
    (root / f"fasion-resize-annotation-{split}.csv").write_text("\n".join(lines) + "\n")
    listed = ["from,to", *(",".join(pair) for pair in pairs)]
    (root / f"fasion-resize-pairs-{split}.csv").write_text("\n".join(listed) + "\n")
    return root


def people_names(identities: int, pictures: int) -> list[str]:
    return [f"p{i:02d}_{k}.jpg" for i in range(identities) for k in range(pictures)]


def all_pairs(names: list[str]) -> list[tuple[str, str]]:
    return [(a, b) for a in names for b in names if a != b and a[:3] == b[:3]]


@pytest.fixture
def layout_a(tmp_path: Path) -> Path:
    names = people_names(5, 3)
    return write_layout_a(tmp_path, names, all_pairs(names))


B_NAMES = [f"img/WOMEN/Dresses/id_0000713{i}/0{k}_4_full.jpg" for i in (2, 5) for k in (1, 2, 3)]


@pytest.fixture
def layout_b(tmp_path: Path) -> Path:
    lmdb = pytest.importorskip("lmdb")
    (tmp_path / "256-256").mkdir()
    with lmdb.open(str(tmp_path / "256-256"), map_size=1 << 24) as environment, environment.begin(write=True) as writer:
        for i, name in enumerate(B_NAMES):
            square = cv2.resize(picture(10 * i), (256, 256), interpolation=cv2.INTER_CUBIC)
            writer.put(name.replace(".jpg", ".png").encode(), cv2.imencode(".png", square)[1].tobytes())
    for i, name in enumerate(B_NAMES):
        file = tmp_path / name.replace("img/", "pose/").replace(".jpg", ".txt")
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = [f"{40.0 + i + k} {2.0 * k}" for k in range(17)]
        file.write_text("\n".join([*rows, "-1 -1"]) + "\n")
    first, second, third, fourth, fifth, _ = B_NAMES
    (tmp_path / "train_pairs.txt").write_text(f"{first},{second},{third}\n{fourth},{fifth}\n")
    return tmp_path


# Layout A


def test_layout_a(layout_a: Path) -> None:
    split = open_split(layout_a, "train")
    assert split.names == tuple(people_names(5, 3))
    np.testing.assert_array_equal(split.keypoints[2, :, 0], 100 + np.arange(18))
    np.testing.assert_array_equal(split.keypoints[2, :, 1], 200 + np.arange(18))
    np.testing.assert_array_equal(split.identities, np.repeat(np.arange(5), 3))
    assert split.pairs[:2].tolist() == [[0, 1], [0, 2]]
    assert np.abs(split.image(4).astype(int) - picture(40)).max() <= 4
    assert split.image(4, (512, 352)).shape == (512, 352, 3)
    np.testing.assert_array_equal(split.pose(2, (512, 352)), 2 * split.keypoints[2])


def test_images_are_stacked_in_order(layout_a: Path) -> None:
    split = open_split(layout_a, "train")
    np.testing.assert_array_equal(split.images([7, 0]), np.stack([split.image(7), split.image(0)]))
    assert split.images(iter([3]), (64, 44)).shape == (1, 64, 44, 3)
    assert split.images([]).shape == (0, 256, 176, 3)


def test_minus_one_is_missing(layout_a: Path) -> None:
    file = layout_a / "fasion-resize-annotation-train.csv"
    lines = file.read_text().splitlines()
    lines[1] = f"p00_0.jpg: {[-1] * 2 + [5] * 16}: {[-1] + [7] * 17}"
    file.write_text("\n".join(lines))
    keypoints = open_split(layout_a, "train").keypoints[0]
    assert np.isnan(keypoints[:2]).all()  # one coordinate is enough
    assert (keypoints[2:] == (7, 5)).all()


def test_other_spelling_and_other_split(tmp_path: Path) -> None:
    names = people_names(1, 2)
    write_layout_a(tmp_path, names, all_pairs(names), "test")
    for kind in ("annotation", "pairs"):
        (tmp_path / f"fasion-resize-{kind}-test.csv").rename(tmp_path / f"fashion-resize-{kind}-test.csv")
    assert open_split(tmp_path, "test").names == tuple(names)


def test_tree_of_deepfashion(tmp_path: Path) -> None:
    names = [FLAT, FLAT.replace("04_4full", "01_1front"), "fashionMENDenimid0000008003_7additional.jpg"]
    write_layout_a(tmp_path, names, [(names[0], names[1])])
    shutil.rmtree(tmp_path / "train_highres")
    (tmp_path / NESTED).parent.mkdir(parents=True)
    cv2.imwrite(str(tmp_path / NESTED), picture(90, (1101, 750)))
    split = open_split(tmp_path, "train")
    assert np.abs(split.image(0).astype(int) - picture(90)).mean() < 2
    assert split.identities[0] == split.identities[1] != split.identities[2]
    with pytest.raises(InputError, match=f"image {names[1]} cannot be read from"):
        split.image(1)


# Layout B


def test_layout_b(layout_b: Path) -> None:
    split = open_split(layout_b, "train")
    first, second, third, fourth, fifth = (name.replace(".jpg", ".png") for name in B_NAMES[:5])
    named = [(split.names[s], split.names[t]) for s, t in split.pairs.tolist()]
    assert named == [(second, first), (third, first), (fifth, fourth)]  # the list says the target first
    index = split.names.index(third)
    np.testing.assert_array_equal(split.keypoints[index, :17, 0], 2 + np.arange(17))
    np.testing.assert_array_equal(split.keypoints[index, :17, 1], 2 * np.arange(17))
    assert np.isnan(split.keypoints[:, 17]).all()
    assert np.abs(split.images()[index].astype(int) - picture(20)).mean() < 1
    identity = {name: i for name, i in zip(split.names, split.identities.tolist(), strict=True)}
    assert identity[first] == identity[second] == identity[third] != identity[fourth] == identity[fifth]


def test_layout_b_refuses(layout_b: Path) -> None:
    pairs = (layout_b / "train_pairs.txt").read_text()
    (layout_b / "train_pairs.txt").write_text(pairs + "img/alone.jpg\n")
    with pytest.raises(
        InputError, match=r"line 3 of .*train_pairs\.txt is broken: expected a target, then its sources"
    ):
        open_split(layout_b, "train")
    (layout_b / "train_pairs.txt").write_text(pairs + "img/a.jpg,img/b.jpg\n")
    with pytest.raises(InputError, match=r"names 2 pictures that have no keypoints, img/b\.png first"):
        open_split(layout_b, "train")


@pytest.mark.parametrize(
    ("text", "line"),
    [("1 2\n3 x\n", 2), ("1 2\n" * 17, 18), ("1 2\n" * 19, 19), ("1 2 3\n" * 18, 1), ("1 nan\n" * 18, 1)],
)
def test_layout_b_with_a_broken_pose(layout_b: Path, text: str, line: int) -> None:
    file = layout_b / B_NAMES[0].replace("img/", "pose/").replace(".jpg", ".txt")
    file.write_text(text)
    with pytest.raises(InputError, match=rf"line {line} of .*01_4_full\.txt is broken: expected 18 rows"):
        open_split(layout_b, "train")


def test_layout_b_with_a_missing_picture(layout_b: Path) -> None:
    pose = layout_b / B_NAMES[0].replace("img/", "pose/").replace(".jpg", ".txt")
    shutil.copy(pose, pose.with_name("new.txt"))
    new = B_NAMES[0].replace("01_4_full", "new")
    (layout_b / "train_pairs.txt").write_text(f"{new},{B_NAMES[0]}\n")
    split = open_split(layout_b, "train")
    with pytest.raises(InputError, match=r"image img/.*/new\.png cannot be read from .*256-256"):
        split.images()


def test_layout_b_without_a_sound_lmdb(layout_b: Path) -> None:
    (layout_b / "256-256" / "data.mdb").write_bytes(b"no data base" * 1000)
    with pytest.raises(InputError, match="256-256 is no LMDB"):
        open_split(layout_b, "train")
    shutil.rmtree(layout_b / "256-256")
    with pytest.raises(InputError, match=r"has no pictures: expected a folder with data\.mdb"):
        open_split(layout_b, "train")


def test_layout_b_without_the_library(layout_b: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(BackendError, match=r"lmdb is not installed.*pip install 'rpfm-edge\[lmdb\]'"):
        open_split(layout_b, "train")


# What is refused


def test_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no folder .*gone"):
        open_split(tmp_path / "gone", "train")
    with pytest.raises(
        InputError, match=r"is no data set: expected fasion-resize-annotation-train\.csv or train_pairs\.txt"
    ):
        open_split(tmp_path, "train")
    with pytest.raises(ConfigError, match="unknown split 'dev'"):
        open_split(tmp_path, "dev")


@pytest.mark.parametrize(
    "line",
    [
        "p00_1.jpg: [1, 2]: [3, 4]",
        "p00_1.jpg",
        f"p00_1.jpg: {[1] * 18}: [1, 2",
        f"p00_1.jpg: {[1] * 18}: {[1] * 17 + [None]}".replace("None", "null"),
        f"p00_1.jpg: {[1] * 18}: {[1] * 17}",
        f"p00_1.jpg: {[1] * 18}: {{}}",
        "",
    ],
)
def test_broken_annotation(layout_a: Path, line: str) -> None:
    file = layout_a / "fasion-resize-annotation-train.csv"
    lines = file.read_text().splitlines()
    lines[2] = line
    file.write_text("\n".join(lines))
    with pytest.raises(
        InputError, match=r"line 3 of .*annotation-train\.csv is broken: expected name:keypoints_y:keypoints_x"
    ):
        open_split(layout_a, "train")


def test_broken_headers_and_pairs(layout_a: Path) -> None:
    pairs, annotation = (layout_a / f"fasion-resize-{kind}-train.csv" for kind in ("pairs", "annotation"))
    good = pairs.read_text()
    for text, line in ((good + "p00_0.jpg\n", 32), (good.replace("from,to", "to,from"), 1), (good + ",p00_0.jpg", 32)):
        pairs.write_text(text)
        with pytest.raises(InputError, match=rf"line {line} of .*pairs-train\.csv is broken: expected from,to"):
            open_split(layout_a, "train")
    pairs.write_text(good + "p00_0.jpg,q_1.jpg\nq_2.jpg,q_1.jpg\n")
    with pytest.raises(InputError, match=r"pairs-train\.csv names 2 pictures that have no keypoints, q_1\.jpg first"):
        open_split(layout_a, "train")
    pairs.unlink()
    with pytest.raises(
        InputError, match=r"has no fasion-resize-pairs-train\.csv: expected the pairs of its annotation"
    ):
        open_split(layout_a, "train")
    annotation.write_text("name,x,y\n")
    with pytest.raises(InputError, match=r"line 1 of .*annotation-train\.csv is broken"):
        open_split(layout_a, "train")


def test_a_name_that_is_listed_twice(layout_a: Path) -> None:
    file = layout_a / "fasion-resize-annotation-train.csv"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines, lines[4]]))
    with pytest.raises(InputError, match=r"line 17 of .*train\.csv is broken: expected p01_0\.jpg only once"):
        open_split(layout_a, "train")


def test_lists_that_a_spreadsheet_has_saved(layout_a: Path) -> None:
    """They begin with a byte order mark, and lines end as on Windows."""
    plain = open_split(layout_a, "train")
    for kind in ("annotation", "pairs"):
        file = layout_a / f"fasion-resize-{kind}-train.csv"
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    saved = open_split(layout_a, "train")
    assert saved.names == plain.names
    np.testing.assert_array_equal(saved.pairs, plain.pairs)


@pytest.mark.parametrize("name", ["p{}/{}.jpg", "{}{}.jpg"])
def test_pairs_of_pictures_whose_names_tell_two_people(name: str, tmp_path: Path) -> None:
    names = [name.format(person, k) for person in range(3) for k in range(2)]
    for folder in {(tmp_path / "train_highres" / one).parent for one in names}:
        folder.mkdir(parents=True)
    write_layout_a(tmp_path, names, [(names[0], names[1])])
    with pytest.raises(
        InputError, match=rf"pairs {names[0]} with {names[1]}, by their names two people: expected names whose start"
    ):
        open_split(tmp_path, "train")


def test_missing_and_unreadable_pictures(layout_a: Path) -> None:
    (layout_a / "train_highres" / "p00_0.jpg").unlink()
    (layout_a / "train_highres" / "p00_1.jpg").write_bytes(b"no picture")
    split = open_split(layout_a, "train")
    with pytest.raises(InputError, match=r"image p00_0\.jpg cannot be read from .*train_highres"):
        split.images()
    with pytest.raises(InputError, match=r"image p00_1\.jpg of .* is no picture"):
        split.image(1)
    shutil.rmtree(layout_a / "train_highres")
    with pytest.raises(InputError, match="has no pictures: expected the folder train_highres or fashion"):
        open_split(layout_a, "train")


def test_no_clip(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is no clip: expected a folder with annotation\.csv"):
        read_clip(tmp_path)


# Your own pictures


def test_the_recipe_of_the_docs_stretches_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A square picture and its pose are padded to the frame, as ``prepare`` pads them."""
    monkeypatch.chdir(tmp_path)
    for folder in ("pictures", "poses"):
        (tmp_path / folder).mkdir()
    square = np.zeros((440, 440, 3), np.uint8)
    square[210:230, 210:230] = 255
    points = np.full((18, 2), np.nan, np.float32)
    points[0] = 220, 220
    for stem, suffix in (("a_0", "jpg"), ("a_1", "PNG"), ("b_0", "jpg")):
        cv2.imwrite(f"pictures/{stem}.{suffix}", square)
        write_pose(f"poses/{stem}.json", points, (440, 440))
    text = (Path(__file__).parents[2] / "docs/data.md").read_text().partition("## Your own pictures")[2]
    exec(text.partition("```python\n")[2].partition("```")[0], {})
    split = open_split("mine", "test")
    assert split.names == ("a_0.png", "a_1.png", "b_0.png")
    assert split.pairs.tolist() == [[0, 1], [1, 0]]
    for index in range(3):
        rows, columns = np.nonzero(split.image(index)[..., 0] > 128)
        assert (np.ptp(rows), np.ptp(columns)) == (7, 7)
        np.testing.assert_allclose(split.keypoints[index, 0], (columns.mean(), rows.mean()), atol=1)
        assert np.isnan(split.keypoints[index, 1:]).all()


# Holding out, and batches


@pytest.mark.parametrize(("amount", "held_count"), [(2, 2), (0.4, 2), (1 / 3, 2), (4, 4)])
def test_hold_out(layout_a: Path, amount: float, held_count: int) -> None:
    whole = open_split(layout_a, "train")
    rest, held = hold_out(whole, amount, seed=3)
    assert len(np.unique(held.identities)) == held_count
    assert not set(rest.identities.tolist()) & set(held.identities.tolist())
    assert sorted(rest.names + held.names) == sorted(whole.names)
    for part in (rest, held):
        named = [(part.names[s], part.names[t]) for s, t in part.pairs.tolist()]
        assert named == [pair for pair in all_pairs(list(whole.names)) if pair[0] in part.names]
        index = whole.names.index(part.names[-1])
        np.testing.assert_array_equal(part.keypoints[-1], whole.keypoints[index])
        np.testing.assert_array_equal(part.image(len(part.names) - 1), whole.image(index))


def test_hold_out_is_drawn_by_the_seed(layout_a: Path) -> None:
    whole = open_split(layout_a, "train")
    assert hold_out(whole, 2, 3)[1].names == hold_out(whole, 2, 3)[1].names
    assert len({hold_out(whole, 2, seed)[1].names for seed in range(20)}) > 4


@pytest.mark.parametrize(("names", "people"), [([f"IMG_{k}.jpg" for k in range(9)], 1), ([], 0)])
def test_nobody_to_hold_out(names: list[str], people: int, tmp_path: Path) -> None:
    write_layout_a(tmp_path, names, [], "test")
    with pytest.raises(InputError, match=rf"has too few identities to hold some out: {people}: expected 2 or more"):
        open_splits(tmp_path)


@pytest.mark.parametrize("amount", [0, 5, -1, 0.0, 1.0])
def test_hold_out_refuses(layout_a: Path, amount: float) -> None:
    with pytest.raises(ConfigError, match=rf"cannot hold out {amount} of 5 identities: expected 1 to 4"):
        hold_out(open_split(layout_a, "train"), amount, 0)


def test_batches_hold_pairs_of_the_split(layout_a: Path) -> None:
    split = open_split(layout_a, "train")
    rng = np.random.default_rng(0)
    pairs = set(map(tuple, split.pairs.tolist()))
    for _ in range(20):
        sources, targets, flips = draw_batch(split, 6, 2, rng)
        assert (sources.shape, targets.shape, flips.shape) == ((6,), (6, 2), (6,))
        assert (sources.dtype, targets.dtype, flips.dtype) == (np.int64, np.int64, np.bool_)
        assert {(s, t) for s, row in zip(sources.tolist(), targets.tolist(), strict=True) for t in row} <= pairs
        assert len(set(sources.tolist())) == 6
        assert (targets[:, 0] != targets[:, 1]).all()


def test_targets_repeat_only_when_they_run_out(layout_a: Path) -> None:
    sources, targets, _ = draw_batch(open_split(layout_a, "train"), 20, 5, np.random.default_rng(0))
    assert np.bincount(sources).min() >= 1  # 15 pictures, 20 draws
    for row in targets:
        assert sorted(np.unique(row, return_counts=True)[1].tolist()) == [2, 3]  # two targets, five draws


def test_sources_are_drawn_uniformly_among_those_with_pairs(tmp_path: Path) -> None:
    names = people_names(2, 3)
    pairs = [
        (names[0], names[1]),
        (names[0], names[2]),
        (names[3], names[4]),
    ]  # the first has two pairs, the second one
    split = open_split(write_layout_a(tmp_path, names, pairs), "train")
    rng = np.random.default_rng(0)
    drawn = [draw_batch(split, 1, 1, rng) for _ in range(2000)]
    sources = np.array([batch[0][0] for batch in drawn])
    assert set(sources.tolist()) == {0, 3}
    assert abs((sources == 0).mean() - 0.5) < 0.05
    assert abs(np.mean([batch[1][0, 0] == 1 for batch in drawn]) - 0.25) < 0.05
    assert abs(np.mean([batch[2][0] for batch in drawn]) - 0.5) < 0.05


def test_batches_are_drawn_by_the_generator(layout_a: Path) -> None:
    split = open_split(layout_a, "train")
    first, second = (draw_batch(split, 4, 2, np.random.default_rng(5)) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


def test_batches_need_pairs(tmp_path: Path) -> None:
    split = open_split(write_layout_a(tmp_path, people_names(2, 1), []), "train")
    with pytest.raises(InputError, match="has no pairs"):
        draw_batch(split, 1, 1, np.random.default_rng(0))


def test_validation_people_neither_train_nor_judge(tmp_path: Path) -> None:
    train, test = people_names(12, 2), [f"q{k:02d}_{n}.jpg" for k in range(3) for n in range(2)]
    write_layout_a(tmp_path, train, all_pairs(train))
    write_layout_a(tmp_path, test, all_pairs(test), "test")
    found = open_splits(tmp_path)
    people = [{name.partition("_")[0] for name in one.names} for one in (found.training, found.validation, found.test)]
    assert [len(one) for one in people] == [11, 1, 3]
    assert len(set.union(*people)) == 15


def test_somebody_who_trains_must_not_judge(tmp_path: Path) -> None:
    names = people_names(12, 2)
    write_layout_a(tmp_path, names, all_pairs(names))
    write_layout_a(tmp_path, ["q0_0.jpg", "p03_7.jpg", "p05_9.jpg"], [], "test")
    with pytest.raises(InputError, match=r"the person of p03_7\.jpg is in the test and in the training list of"):
        open_splits(tmp_path)


def test_deepfashion_is_cut_by_garment_and_colour(tmp_path: Path) -> None:
    """Its lists hold some garments twice, in another colour each: that is no reason to refuse them."""
    dress, denim = FLAT, "fashionMENDenimid0000008001_{}.jpg"
    train = [dress, *(denim.format(view) for view in ("1front", "3back"))]
    write_layout_a(tmp_path, train, [(train[1], train[2])])
    write_layout_a(tmp_path, [dress.replace("04_", "05_")], [], "test")
    assert open_splits(tmp_path).test.names == (dress.replace("04_", "05_"),)
    assert shared_person([denim, NESTED], [dress]) == NESTED  # however they are written


def test_margins_move_a_pose_with_its_picture(layout_a: Path) -> None:
    """A joint is on the same spot of the picture, stretched or with margins."""
    split = open_split(layout_a, "train")
    padded, size = as_seen(split, "pad"), (128, 128)
    height, width = decode_image(split.read(split.names[0]), "it").shape[:2]
    kept = min(size[0] / height, size[1] / width)
    stretched, moved = split.pose(0, size), padded.pose(0, size)
    centred = (moved - 63.5) / kept * [size[1] / width, size[0] / height] + 63.5
    np.testing.assert_allclose(centred, stretched, atol=1.5)
    border = padded.image(0, size)[:, 0]
    assert (border == border[0]).all(), "a margin beside a tall picture"
    assert as_seen(split, None) is split
