"""Surface maps: correspondences that are known because the maps are made by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from distill.surface import HIGH, LOW, Surface, correspond, has_surfaces, mirrored, read_surface, search_trees
from rpfm_edge.core.errors import InputError
from rpfm_edge.people.data import Split, sample_root
from rpfm_edge.people.deepfashion import open_split


def slab(shift: int = 0, layer: int = 3) -> Surface:
    """A square of one layer, whose points follow from its pixels, drawn ``shift`` pixels to the right."""
    y, x = np.mgrid[:40, :40].astype(np.float32)
    points = np.stack([(x - shift) * 0.01, np.zeros_like(x), y * 0.01], axis=-1)
    inside = (y >= 10) & (y < 30) & (x >= 10 + shift) & (x < 30 + shift)
    return Surface(points, np.where(inside, layer, 0).astype(np.uint8))


def test_a_shifted_slab_is_found_exactly() -> None:
    found = correspond(slab(5), search_trees(slab(0)))
    inside = slab(5).layers > 0
    y, x = np.nonzero(inside)
    assert found.seen[inside].all()
    assert not found.seen[~inside].any()
    assert np.abs(found.places[inside] - np.stack([x - 5, y], axis=-1)).max() < 0.6
    assert np.abs(found.places[inside] - np.stack([x - 5, y], axis=-1)).mean() < 0.1


def test_another_layer_is_never_a_match() -> None:
    found = correspond(slab(layer=4), search_trees(slab(layer=3)))
    assert not found.seen.any()
    assert not found.known.any()


def test_what_the_source_hides_is_not_seen_but_its_nearest_place_is_known() -> None:
    whole = slab()
    layers = whole.layers.copy()
    layers[:, 20:] = 0
    found = correspond(whole, search_trees(Surface(whole.points, layers)))
    assert found.seen[15, 12]
    assert not found.seen[15, 28]
    assert found.known[15, 28]
    assert found.places[15, 28, 0] == pytest.approx(19, abs=1)


def test_mirroring_both_mirrors_the_map() -> None:
    plain = correspond(slab(5), search_trees(slab(0)))
    other = correspond(mirrored(slab(5)), search_trees(mirrored(slab(0))))
    assert (other.seen == plain.seen[:, ::-1]).all()
    seen = plain.seen
    assert np.abs(39 - other.places[:, ::-1, 0][seen] - plain.places[..., 0][seen]).max() < 0.6


@pytest.fixture
def split(tmp_path: Path) -> Split:
    return replace(open_split(sample_root(), "test"), root=tmp_path)


def test_reads_the_tile_of_its_picture(split: Split) -> None:
    assert not has_surfaces(split)
    (split.root / "surface").mkdir()
    name, _, number = Path(split.names[2]).stem.rpartition("_")
    strip = np.zeros((128, 8 * 88, 4), np.uint8)
    strip[:, 88 * int(number) : 88 * int(number) + 88] = (10, 20, 255, 3)
    cv2.imwrite(str(split.root / "surface" / f"{name}.png"), strip[..., [2, 1, 0, 3]])
    found = read_surface(split, 2)
    assert has_surfaces(split)
    assert found.layers.shape == (128, 88)
    assert (found.layers == 3).all()
    assert found.points[0, 0] == pytest.approx(np.array([10, 20, 255]) / 255 * (HIGH - LOW) + LOW, abs=1e-5)
    assert not (read_surface(split, 3).layers == 3).any()


def test_a_missing_or_broken_strip_is_one_sentence(split: Split) -> None:
    with pytest.raises(InputError, match="is no strip of surface maps"):
        read_surface(split, 0)
    (split.root / "surface").mkdir()
    name = Path(split.names[8]).stem.rpartition("_")[0]
    (split.root / "surface" / f"{name}.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="train without maps"):
        read_surface(split, 8)
