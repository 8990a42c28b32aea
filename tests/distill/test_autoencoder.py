"""Autoencoders: the principal-component start against numpy, normalised latents, training, and diffusers' VAE."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from distill import autoencoder as autoencoders
from distill.autoencoder import (
    AutoencoderTraining,
    KLAutoencoder,
    SmallAutoencoder,
    SmallAutoencoderConfig,
    load_kl,
    set_principal_components,
    train_autoencoder,
)
from distill.batches import fingerprint
from distill.train import TrainConfig
from rpfm_edge.core.errors import ConfigError
from rpfm_edge.people.data import sample_root
from rpfm_edge.people.deepfashion import open_split
from rpfm_edge.people.image import to_model

TINY = SmallAutoencoderConfig(latent_channels=6, widths=(8, 8, 16))


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """12 pictures of the sample, (n, 64, 48, 3) uint8."""
    return open_split(sample_root(), "test").images(range(0, 96, 8), (64, 48))


def test_starts_as_the_principal_components_of_its_patches(images: np.ndarray) -> None:
    """Reconstruction error equals what numpy's SVD leaves over: the best that six linear numbers per patch can do."""
    autoencoder = SmallAutoencoder(TINY)
    x = torch.from_numpy(to_model(images))
    set_principal_components(autoencoder, x)
    with torch.no_grad():
        error = float((autoencoder.decode(autoencoder.encode(x)) - x).square().sum())
    patches = (
        to_model(images).reshape(12, 3, 8, 8, 6, 8).transpose(0, 2, 4, 1, 3, 5).reshape(-1, 192).astype(np.float64)
    )
    singular = np.linalg.svd(patches - patches.mean(0), compute_uv=False)
    assert error == pytest.approx((singular[6:] ** 2).sum(), rel=1e-3)


def test_training_beats_the_linear_start_and_normalises(images: np.ndarray, tmp_path: Path) -> None:
    x = torch.from_numpy(to_model(images))
    start = SmallAutoencoder(TINY)
    set_principal_components(start, x)
    config = AutoencoderTraining(
        TrainConfig(steps=200, lr=4e-3, warmup_steps=10, ema=0.95, precision="no"), crop_width=48
    )
    pictures = torch.from_numpy(images)
    trained, _ = train_autoencoder(
        SmallAutoencoder(TINY), lambda indices: pictures[indices], len(images), config, tmp_path / "c"
    )
    with torch.no_grad():
        before, after = (float((a.decode(a.encode(x)) - x).square().mean()) for a in (start, trained))
        latents = trained.encode(x)
    assert after < 0.9 * before
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(6), atol=1e-3, rtol=0)


def test_description_rebuilds_the_architecture() -> None:
    original = SmallAutoencoder(TINY)
    again = autoencoders.create(autoencoders.describe(original))
    assert {k: v.shape for k, v in original.state_dict().items()} == {k: v.shape for k, v in again.state_dict().items()}


def test_the_default_decoder_is_cheap() -> None:
    """At most 2.5 GFLOP for 256 × 176, counted by torch."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        SmallAutoencoder(SmallAutoencoderConfig()).decode(torch.zeros(1, 8, 32, 22))
    assert 0 < counter.get_total_flops() <= 2.5e9


@pytest.fixture(scope="module")
def kl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small AutoencoderKL as diffusers saves it, with a scaling factor and a shift."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )
    folder = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(folder)
    return folder


def test_kl_honours_scale_and_shift(kl_folder: Path, images: np.ndarray) -> None:
    from diffusers import AutoencoderKL

    x = torch.from_numpy(to_model(images[:2]))
    ours, theirs = load_kl(kl_folder), AutoencoderKL.from_pretrained(kl_folder).eval()
    with torch.no_grad():
        mode = theirs.encode(x).latent_dist.mode()
        torch.testing.assert_close(ours.encode(x), (mode - 0.1159) * 0.3611)
        torch.testing.assert_close(ours.decode(ours.encode(x)), theirs.decode(mode).sample, atol=1e-4, rtol=1e-3)
    assert (ours.latent_channels, ours.factor) == (4, 4)
    rebuilt = autoencoders.create(autoencoders.describe(ours))
    assert isinstance(rebuilt, KLAutoencoder)
    rebuilt.load_state_dict(ours.state_dict())


def test_a_fingerprint_knows_the_scale_and_not_the_place(kl_folder: Path, tmp_path: Path) -> None:
    """Latents of another scale are others, with the same weights; a copy is the same autoencoder."""
    original, copied = load_kl(kl_folder), load_kl(shutil.copytree(kl_folder, tmp_path / "copy"))
    rebuilt = autoencoders.create(autoencoders.describe(original))
    rebuilt.load_state_dict(original.state_dict())
    assert fingerprint(original) == fingerprint(copied) == fingerprint(rebuilt)
    assert str(kl_folder) not in str(autoencoders.describe(original))
    config = json.loads((tmp_path / "copy/config.json").read_text()) | {"scaling_factor": 1.0}
    (tmp_path / "copy/config.json").write_text(json.dumps(config))
    assert fingerprint(load_kl(tmp_path / "copy")) != fingerprint(original)


def test_kl_folder_without_a_vae(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no AutoencoderKL"):
        load_kl(tmp_path)


def test_a_tiny_one_of_diffusers_is_read_and_made_again(tmp_path: Path) -> None:
    from diffusers import AutoencoderTiny

    from distill.autoencoder import create, describe

    widths = {"encoder_block_out_channels": (8, 8, 8, 8), "decoder_block_out_channels": (8, 8, 8, 8)}
    theirs = AutoencoderTiny(**widths, latent_channels=4, scaling_factor=0.5).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_kl(tmp_path)
    assert (ours.factor, ours.latent_channels) == (8, 4)
    image = torch.rand(1, 3, 32, 16) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(image), 0.5 * theirs.encode(image).latents)
        torch.testing.assert_close(ours.decode(ours.encode(image)), theirs.decode(theirs.encode(image).latents).sample)
        again = create(describe(ours))
        again.load_state_dict(ours.state_dict())
        torch.testing.assert_close(again.encode(image), ours.encode(image))


def test_one_with_deep_compression_is_read(tmp_path: Path) -> None:
    from diffusers import AutoencoderDC

    kinds = {f"{side}_block_types": "ResBlock" for side in ("encoder", "decoder")}
    widths = {f"{side}_block_out_channels": (8, 8, 16) for side in ("encoder", "decoder")}
    layers = {f"{side}_layers_per_block": (1, 1, 1) for side in ("encoder", "decoder")}
    scales = {f"{side}_qkv_multiscales": ((), (), ()) for side in ("encoder", "decoder")}
    theirs = AutoencoderDC(latent_channels=8, **kinds, **widths, **layers, **scales, scaling_factor=0.4).eval()
    theirs.save_pretrained(tmp_path)
    ours, image = load_kl(tmp_path), torch.rand(1, 3, 32, 16) * 2 - 1
    with torch.no_grad():
        latent = ours.encode(image)
        torch.testing.assert_close(latent, 0.4 * theirs.encode(image).latent)
        assert latent.shape == (1, 8, 32 // ours.factor, 16 // ours.factor)
        torch.testing.assert_close(ours.decode(latent), theirs.decode(theirs.encode(image).latent).sample)


def test_means_and_deviations_of_channels_join_the_scaling(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    kind = {"block_out_channels": (8,), "norm_num_groups": 4, "latent_channels": 2, "scaling_factor": 0.5}
    plain = AutoencoderKL(**kind)
    theirs = AutoencoderKL(**kind, latents_mean=[0.25, -1.0], latents_std=[2.0, 4.0])
    theirs.load_state_dict(plain.state_dict())
    image = torch.rand(1, 3, 8, 8) * 2 - 1
    with torch.no_grad():
        raw = plain.eval().encode(image).latent_dist.mode()
        want = (raw - torch.tensor([0.25, -1.0]).view(1, 2, 1, 1)) * 0.5 / torch.tensor([2.0, 4.0]).view(1, 2, 1, 1)
        ours = KLAutoencoder(theirs.eval())
        torch.testing.assert_close(ours.encode(image), want)
        torch.testing.assert_close(ours.decode(want), plain.decode(raw).sample)
