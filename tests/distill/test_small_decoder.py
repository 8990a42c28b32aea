"""A small decoder for a large one's latents, from its size to a student that carries it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from distill.autoencoder import KLAutoencoder, Pixels
from distill.commands import DistillRecipe, distill
from distill.contract import Parts
from distill.decoder_command import DecoderRecipe, distill_decoder, load_decoder
from distill.export import export
from distill.small_decoder import (
    SmallDecoder,
    SmallDecoderConfig,
    SmallDecoderTraining,
    multiplications,
    sized,
    train_small_decoder,
)
from distill.student import load_student
from distill.train import TrainConfig
from rpfm_edge.bundle.pipeline import Pipeline
from rpfm_edge.chain.build import build
from rpfm_edge.core.errors import ArtifactError, ConfigError
from rpfm_edge.people.splits import open_splits
from tests.distill.test_contract import factory
from tests.distill.tiny import SIZE

HERE = "tests.distill.test_small_decoder"


def kl_codec() -> KLAutoencoder:
    """In Stable Diffusion's layout, but small; random weights, always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        vae = AutoencoderKL(**kinds, block_out_channels=(8, 8, 16, 16), norm_num_groups=4, latent_channels=8)
    return KLAutoencoder(vae.eval().requires_grad_(False))


def of_kl() -> Parts:
    """A teacher behind that codec."""
    return factory(codec=kl_codec())


@pytest.mark.parametrize(("factor", "channels"), [(4, 4), (8, 8), (16, 16)])
def test_a_size_is_what_its_layers_multiply(factor: int, channels: int) -> None:
    config, size, counted = SmallDecoderConfig(channels, factor, 16), (64, 48), []

    def count(module: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        kernel = module.kernel_size[0] * module.kernel_size[1]
        counted.append(kernel * module.in_channels * module.out_channels * made.shape[2] * made.shape[3])

    decoder = SmallDecoder(config)
    for layer in decoder.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(count)
    picture = decoder(torch.zeros(1, channels, size[0] // factor, size[1] // factor))
    assert picture.shape == (1, 3, *size)
    assert multiplications(config, size) == sum(counted)


def test_the_widest_that_fits_is_taken() -> None:
    codec = kl_codec()
    widths = [sized(codec, (256, 176), gflop).width for gflop in (0.5, 1.0, 2.0, 4.0)]
    assert widths == sorted(set(widths))
    for gflop, width in zip((0.5, 1.0, 2.0, 4.0), widths, strict=True):
        here, wider = (2e-9 * multiplications(SmallDecoderConfig(8, 8, w), (256, 176)) for w in (width, width + 4))
        assert here <= gflop < wider


def test_pixels_have_no_decoder_to_make_small() -> None:
    with pytest.raises(ConfigError, match="1 pixels per latent: expected 4, 8 or 16; its own decoder stays"):
        sized(Pixels(), (64, 48), 2.0)


class Linear(nn.Module):
    """A codec whose decoder is linear in patches of 8 pixels."""

    latent_channels, factor = 8, 8

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Conv2d(8, 192, 1)

    def decode(self, latent: Tensor) -> Tensor:
        return torch.nn.functional.pixel_shuffle(self.up(latent), 8)


def test_what_is_linear_is_known_before_the_training(tmp_path: Path) -> None:
    """By least squares, so that the first step is at the end."""
    latents = torch.randn(32, 8, 8, 6)
    config = SmallDecoderTraining(TrainConfig(steps=1, lr=0.0, warmup_steps=1, precision="no"))
    decoder, _ = train_small_decoder(
        SmallDecoder(SmallDecoderConfig(8, 8, 8)), Linear(), latents, replace(config, noise=0.0), tmp_path / "c"
    )
    with torch.no_grad():
        torch.testing.assert_close(decoder(latents), Linear().decode(latents), atol=1e-4, rtol=1e-4)


def test_a_run_in_pieces_is_the_run_in_one(tmp_path: Path) -> None:
    latents, codec = torch.randn(16, 8, 8, 6), kl_codec()

    def made(name: str, *steps: int) -> dict[str, Tensor]:
        for count in steps:
            torch.manual_seed(1)
            config = SmallDecoderTraining(TrainConfig(steps=count, lr=1e-3, final_lr_fraction=1.0, precision="no"))
            decoder = SmallDecoder(SmallDecoderConfig(8, 8, 8))
            decoder, history = train_small_decoder(decoder, codec, latents, config, tmp_path / name)
            assert history.step == count
        return decoder.state_dict()

    whole, pieces = made("whole", 6), made("pieces", 3, 6)
    for name, weight in whole.items():
        torch.testing.assert_close(pieces[name], weight, atol=1e-5, rtol=1e-5)


def test_from_a_large_decoder_to_a_bundle_with_a_small_one(tmp_path: Path) -> None:
    """The student carries the encoder and the small decoder, and its bundle draws what torch draws."""
    splits, spec = open_splits("sample"), f"{HERE}:of_kl"
    made = distill_decoder(DecoderRecipe(0.05, 3.0, pictures=24), spec, splits.training, tmp_path / "codec")
    assert made.kind == "codec"
    assert made.config["psnr_db"] > 15
    assert made.config["after_ms"] > 0
    recipe = DistillRecipe(method="reflow", steps=1, seconds=1.0, trajectories=8, batch=8, codec=str(made.path))
    student, loaded = load_student(distill(recipe, spec, splits.training, tmp_path / "student").path)
    names = set(student.autoencoder.state_dict())
    assert any(name.startswith("encoder.vae.encoder") for name in names)
    assert not any("vae.decoder" in name for name in names)
    bundle = build(export(loaded.path, tmp_path / "graph").path, tmp_path / "bundle", ["onnxruntime", "torch"])
    photo, pose = splits.test.image(0, SIZE), splits.test.pose(1, SIZE)
    drawn = []
    for backend in ("onnxruntime", "torch"):
        with Pipeline.open(bundle, backend) as pipe:
            drawn.append(pipe.render(pipe.prepare(photo), pose).astype(int))
    assert np.abs(drawn[0] - drawn[1]).max() <= 1


def test_codecs_that_do_not_fit(tmp_path: Path) -> None:
    splits = open_splits("sample")
    with pytest.raises(ConfigError, match="looks at the aligned source"):
        distill_decoder(DecoderRecipe(), "teacher:xs", splits.training, tmp_path / "codec")
    with pytest.raises(ArtifactError, match="is a student"):
        load_decoder(load_student("student:xs")[1].path)
    distill_decoder(DecoderRecipe(0.05, 0.5, pictures=8), f"{HERE}:of_kl", splits.training, tmp_path / "codec")
    recipe = DistillRecipe(method="reflow", steps=1, seconds=1.0, trajectories=8, codec=str(tmp_path / "codec"))
    with pytest.raises(ConfigError, match=r"decodes 8 channels of 8 pixels: expected 12 of 8, the teacher's"):
        distill(recipe, "teacher:xs", splits.training, tmp_path / "student")
