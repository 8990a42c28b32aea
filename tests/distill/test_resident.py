"""What is kept on the device is what would be made for every batch, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from distill.batches import encode_split, settle_split
from distill.resident import as_model, fits, open_pictures, settle
from rpfm_edge.people.data import Split, draw_batch, sample_root
from rpfm_edge.people.deepfashion import open_split
from rpfm_edge.people.image import to_model
from tests.distill.tiny import SIZE, toy_data, toy_teacher


@pytest.fixture(scope="module")
def split() -> Split:
    return open_split(sample_root(), "test")


def test_pictures_for_the_network_are_those_of_numpy() -> None:
    every_grey = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    assert torch.equal(as_model(torch.from_numpy(every_grey)), torch.from_numpy(to_model(every_grey)))


def test_pictures_decoded_once_are_the_decoded_pictures(split: Split) -> None:
    wanted = np.array([5, 90, 5, 17])
    kept, read = (open_pictures(split, SIZE, "cpu", resident)(wanted) for resident in (True, False))
    np.testing.assert_array_equal(kept.numpy(), [split.image(i, SIZE) for i in wanted])
    assert torch.equal(kept, read)


def test_pictures_are_decoded_once(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures, decoded = open_pictures(split, SIZE, "cpu", resident=True), []
    plain = Split.image

    def counted(self: Split, index: int, size: tuple[int, int]) -> np.ndarray:
        decoded.append(index)
        return plain(self, index, size)

    monkeypatch.setattr(Split, "image", counted)
    for _ in range(3):
        pictures(np.array([1, 2]))
    assert sorted(decoded) == list(range(len(split.names)))


def test_batches_are_equal_with_and_without_drawn_skeletons(tmp_path: Path) -> None:
    data = toy_data(toy_teacher(), tmp_path)
    drawn, kept = draw_batch(data.split, 3, 4, np.random.default_rng(1)), settle_split(data, "cpu", resident=True)
    assert data.skeletons is None
    assert kept.skeletons is not None
    assert set(drawn[2].tolist()) == {True, False}
    plain, quick = data.batch(*drawn), kept.batch(*drawn)
    assert torch.equal(plain.pose, quick.pose)
    assert torch.equal(plain.source.latent, quick.source.latent)
    assert torch.equal(plain.source.pixels, quick.source.pixels)
    assert torch.equal(plain.target, quick.target)


def test_latents_do_not_depend_on_where_pictures_are(split: Split, tmp_path: Path) -> None:
    autoencoder = toy_teacher().autoencoder
    pictures = open_pictures(split, SIZE, "cpu", resident=True)
    kept = encode_split(split, autoencoder, tmp_path / "kept", SIZE, pictures=pictures)
    assert torch.equal(kept.latents, encode_split(split, autoencoder, tmp_path / "read", SIZE).latents)


def test_a_cache_is_of_one_autoencoder(split: Split, tmp_path: Path) -> None:
    """Also where only its normalisation differs, which no parameter shows."""
    autoencoder = toy_teacher().autoencoder
    first = encode_split(split, autoencoder, tmp_path, SIZE)
    autoencoder.mean += 0.5
    second = encode_split(split, autoencoder, tmp_path, SIZE)
    assert len(list(tmp_path.glob("latents-*"))) == 2
    torch.testing.assert_close(second.latents.float(), first.latents.float() - 0.5 / autoencoder.std, atol=0.01, rtol=0)


def test_a_quarter_of_a_gpu_may_be_taken_and_nothing_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (400, 1000))
    assert [fits(size, "cuda") for size in (100, 101)] == [True, False]
    assert not fits(1, "cpu")
    tensor = torch.zeros(101, dtype=torch.uint8)
    assert settle(tensor, "cuda") is tensor
