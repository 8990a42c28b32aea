"""The aligner, the encoder's joints and their training, against maps that are known."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from distill.align_data import AlignmentBatch, draw_alignment, draw_nobody
from distill.align_training import AlignmentTraining, disturbed, finder_losses, map_error, map_losses, train_alignment
from distill.aligned import AlignedRPFM, move
from distill.alignment import Aligned, Aligner, Alignment, enlarge, expected_places, fetch, places, to_grid
from distill.autoencoder import ALIGNED, AlignedAutoencoder, SmallAutoencoder, SmallAutoencoderConfig, create, describe
from distill.condition import Source
from distill.decoder_training import texture_loss, with_aligned_decoder
from distill.networks import create_network
from distill.resident import Pictures, as_model
from distill.rpfm import RPFMConfig
from distill.surface import HIGH, LAYERS, LOW
from distill.train import TrainConfig
from rpfm_edge.people.data import Split, draw_batch, sample_root
from rpfm_edge.people.deepfashion import open_split
from rpfm_edge.people.pose import MISSING

SIZE = (64, 48)
NETWORK = RPFMConfig(
    dim=32, depth=2, heads=2, latent_size=(8, 6), pose="keypoints", shared_modulation=True, start_noise=0.25
)


@pytest.fixture(scope="module")
def sample() -> Split:
    return open_split(sample_root(), "test")


@pytest.fixture(scope="module")
def photos(sample: Split) -> Tensor:
    return as_model(torch.from_numpy(sample.images([0, 1], SIZE)))


@pytest.fixture(scope="module")
def joints(sample: Split) -> Tensor:
    return torch.from_numpy(np.stack([sample.pose(0, SIZE), sample.pose(1, SIZE)]))


def unmoved(count: int = 1) -> Tensor:
    """(B, H/2, W/2, 2): the map of a picture to itself."""
    own = places(SIZE, 2).T.unflatten(1, (SIZE[0] // 2, SIZE[1] // 2))
    return to_grid(own.expand(count, -1, -1, -1), SIZE)


def test_the_map_to_itself_fetches_the_picture(photos: Tensor) -> None:
    fetched = fetch(photos, enlarge(unmoved(2)))
    inner = (slice(None), slice(None), slice(1, -1), slice(1, -1))  # at the border no place lies beyond the last centre
    assert torch.allclose(fetched[inner], photos[inner], atol=1e-4)


def test_an_untrained_aligner_is_the_limb_map(photos: Tensor, joints: Tensor) -> None:
    """Between a pose and itself that moves nothing."""
    alignment = Alignment(SIZE).eval()
    with torch.no_grad():
        _, aligned = alignment(photos, joints, joints)
    middle = (slice(None), slice(2, -2), slice(2, -2))
    assert torch.allclose(aligned.grid[middle], unmoved(2)[middle], atol=2e-3)


def test_a_joint_is_found_where_the_heat_is() -> None:
    heat = torch.full((1, 18, 16, 12), -30.0)
    heat[0, :, 5, 7] = 30.0
    assert torch.allclose(expected_places(heat), torch.tensor([30.0, 22.0]).expand(1, 18, 2), atol=1e-3)
    heat[0, :, 5, 8] = 30.0  # half way between two cells
    assert torch.allclose(expected_places(heat)[0, 0], torch.tensor([32.0, 22.0]), atol=1e-3)


def test_places_are_the_centres_of_the_cells() -> None:
    assert places((256, 176), 2)[0].tolist() == [1.0, 1.0]
    assert places((256, 176), 4)[44 + 1].tolist() == [6.0, 6.0]
    assert places((512, 352), 4)[0].tolist() == [1.0, 1.0]  # frame units are those of a frame 256 high


# Training ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def painted(tmp_path_factory: pytest.TempPathFactory, sample: Split) -> tuple[Split, Pictures]:
    """People whose colours are their surface: a square that is somewhere else in every picture. The true map moves the
    colours of one picture exactly onto another."""
    root = tmp_path_factory.mktemp("painted")
    (root / "surface").mkdir()
    images = []
    for person in range(2):
        tiles = []
        for number in range(8):
            y, x = np.mgrid[:32, :24].astype(np.float32)
            left, top = 4 + number % 4, 8 + number // 2 + person
            tile = np.zeros((32, 24, 4), np.uint8)
            tile[..., 0], tile[..., 1], tile[..., 2] = 12 * (x - left) + 40, 100, 12 * (y - top) + 40
            tile[..., 3] = 3 * ((x >= left) & (x < left + 12) & (y >= top) & (y < top + 12))
            tiles.append(tile)
            picture = np.where(tile[..., 3:] > 0, tile[..., :3], 240)
            images.append(cv2.resize(picture, SIZE[::-1], interpolation=cv2.INTER_NEAREST))
        strip = np.concatenate(tiles, axis=1)
        cv2.imwrite(str(root / "surface" / f"q{person}.png"), strip[..., [2, 1, 0, 3]])
    names = tuple(f"q{person}_{number}.jpg" for person in range(2) for number in range(8))
    pairs = np.array([(8 * p + a, 8 * p + b) for p in range(2) for a in range(8) for b in range(8) if a != b])
    encoded = dict(zip(names, (cv2.imencode(".png", image[..., ::-1])[1].tobytes() for image in images), strict=True))
    split = replace(
        sample,
        root=root,
        names=names,
        keypoints=sample.keypoints[:16],
        pairs=pairs,
        identities=np.repeat([0, 1], 8),
        read=encoded.__getitem__,
    )
    return split, Pictures(split, SIZE, "cpu", False)


def drawn(painted: tuple[Split, Pictures], moved: float, seed: int = 0) -> AlignmentBatch:
    rng = np.random.default_rng(seed)
    return draw_alignment(*painted, draw_batch(painted[0], 2, 3, rng), rng, moved)


def perfect(batch: AlignmentBatch) -> Aligned:
    """What an aligner that knows the truth would say."""
    wanted = batch.surfaces[:, 3].long()
    layers = torch.nn.functional.one_hot(wanted, len(LAYERS)).permute(0, 3, 1, 2) * 40.0 - 20.0
    context = torch.zeros(len(batch.targets), 64, SIZE[0] // 8, SIZE[1] // 8)
    coarse, points = (torch.nn.functional.avg_pool2d(part, 2) for part in (batch.places, batch.surfaces[:, :3]))
    grids = [to_grid(part, SIZE) for part in (batch.places, coarse)]
    return Aligned(grids[0], 40 * batch.seen - 20, layers, context, grids[1], points)


@pytest.mark.parametrize("moved", [0.0, 1.0])
def test_the_true_map_moves_the_pixels_onto_the_target(painted: tuple[Split, Pictures], moved: float) -> None:
    """Mirrored, shifted and scaled photos included: then some places lie outside, and are not seen."""
    batch = drawn(painted, moved)
    fetched = fetch(batch.pixels.repeat_interleave(3, 0), to_grid(batch.places, SIZE))
    inner = torch.nn.functional.avg_pool2d(batch.seen, 5, 1, 2) > 0.999  # an edge mixes with what is beside it
    assert inner.sum() > 40
    error = (fetched - batch.pictures).abs().mean(1, keepdim=True)[inner]
    assert error.median() < 0.06
    assert error.mean() < 0.12


def test_no_loss_where_the_map_is_true(painted: tuple[Split, Pictures]) -> None:
    batch = drawn(painted, 0.0)
    losses = map_losses(batch, perfect(batch))
    assert losses["map"] < 0.02  # the floor of the error's square root
    assert losses["seen"] < 1e-3
    assert losses["layers"] < 1e-3
    assert losses["points"] < 1e-5
    assert map_error(batch, perfect(batch).grid)[batch.seen > 0].max() < 0.11


def test_points_off_by_a_centimetre_cost_two_of_them(painted: tuple[Split, Pictures]) -> None:
    batch = drawn(painted, 0.0)
    shifted = perfect(batch)._replace(points=perfect(batch).points + 0.01)
    assert float(map_losses(batch, shifted)["points"]) == pytest.approx(0.02, abs=1e-5)


def test_the_error_of_a_shifted_map_is_the_shift(painted: tuple[Split, Pictures]) -> None:
    batch = drawn(painted, 0.0)
    shifted = perfect(batch)._replace(grid=to_grid(batch.places + torch.tensor([3.0, 4.0]).view(1, 2, 1, 1), SIZE))
    assert torch.allclose(map_error(batch, shifted.grid)[batch.seen > 0], torch.tensor(5.0), atol=0.01)


def test_training_brings_the_map_nearer_to_the_truth(painted: tuple[Split, Pictures], tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = AlignmentTraining(
        TrainConfig(steps=60, lr=4e-3, warmup_steps=5, ema=0.5, precision="no"), sources=2, targets_per_source=3
    )
    before = Alignment(SIZE).eval()
    after, history = train_alignment(before, *painted, config, tmp_path / "a.safetensors")
    assert history.step == 60
    batch, untrained = drawn(painted, 0.0, seed=7), Alignment(SIZE).eval()
    with torch.no_grad():
        errors = [
            map_error(batch, model(batch.pixels, batch.joints, batch.targets)[1].grid)[batch.seen > 0].mean()
            for model in (untrained, after)
        ]
    assert errors[1] < 0.97 * errors[0]


def test_without_surface_maps_the_pictures_teach(sample: Split, tmp_path: Path) -> None:
    """The weights of the true map are zero, and the loss is finite and falls."""
    pictures = Pictures(sample, SIZE, "cpu", False)
    rng = np.random.default_rng(0)
    batch = draw_alignment(sample, pictures, draw_batch(sample, 2, 3, rng), rng, 0.0)
    assert not batch.weight.any()
    assert (batch.surfaces == -1).all()
    config = AlignmentTraining(
        TrainConfig(steps=20, lr=2e-3, warmup_steps=5, ema=0.5, precision="no"), sources=2, targets_per_source=3
    )
    _, history = train_alignment(Alignment(SIZE), sample, pictures, config, tmp_path / "a.safetensors")
    assert all(math.isfinite(loss) for loss in history.losses)
    assert np.mean(history.losses[-5:]) < np.mean(history.losses[:5])


def test_joints_outside_the_photo_count_as_absent(painted: tuple[Split, Pictures]) -> None:
    batch = drawn(painted, 0.0)
    far = batch._replace(joints=torch.full_like(batch.joints, float("nan")))
    seen, _ = Alignment(SIZE)(far.pixels, far.joints, far.targets)
    losses = finder_losses(far, seen)
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert losses["joints"] == 0


def test_nobody_is_a_picture_in_range(photos: Tensor) -> None:
    made = draw_nobody(12, photos, np.random.default_rng(0))
    assert made.shape == (12, 3, *SIZE)
    assert made.abs().max() <= 1


def test_disturbed_joints_are_near_or_missing(joints: Tensor) -> None:
    many = joints.repeat(50, 1, 1)
    found = disturbed(many, 2.0, 0.25, torch.Generator().manual_seed(0))
    gone = found.isnan().all(2)
    assert 0.2 < float(gone.float().mean()) < 0.3
    assert float((found - many)[~gone].std()) == pytest.approx(2.0, rel=0.1)


# The network and its decoder -----------------------------------------------------------------------------------------


def test_joints_that_are_given_stand_and_the_others_are_found(photos: Tensor, joints: Tensor) -> None:
    network = create_network(NETWORK).eval()
    assert isinstance(network, AlignedRPFM)
    given = joints.clone()
    given[:, ::2] = MISSING
    with torch.no_grad():
        made = network.source(Source(torch.zeros(2, 8, 8, 6), photos, given))
        found = network.alignment.encoder(photos).joints
    assert torch.equal(made["joints"][:, 1::2], joints[:, 1::2])
    assert torch.equal(made["joints"][:, ::2], found[:, ::2])
    assert ((made["joint_scores"] >= 0) & (made["joint_scores"] <= 1)).all()
    assert set(network.frame_tensors) < set(made)


def test_the_aligned_decoder_starts_at_the_linear_path_and_sees_the_source(photos: Tensor) -> None:
    small = SmallAutoencoder(SmallAutoencoderConfig(widths=(8, 8, 16)))
    aligned = with_aligned_decoder(small).eval()
    latent = small.encode(photos)
    assert torch.equal(aligned.encode(photos), latent)
    encoder = Alignment(SIZE).encoder(photos)
    masks = torch.ones(2, 9, *(side // 2 for side in SIZE))
    tensors = dict(zip(ALIGNED, (photos, encoder.fine, masks), strict=True))
    with torch.no_grad():
        seen, blind = aligned.decode(latent, tensors), aligned.decode(latent)
    linear = torch.nn.functional.pixel_shuffle(small.latent_to_patches(latent), 8)
    gate = torch.sigmoid(torch.tensor(-1.0))
    assert torch.allclose(seen, linear + gate * (photos - linear), atol=1e-5)
    assert torch.allclose(blind, linear * (1 - gate), atol=1e-5)
    assert not any(parameter.requires_grad for parameter in aligned.encoder.parameters())


def test_an_aligned_autoencoder_describes_itself() -> None:
    made = AlignedAutoencoder(SmallAutoencoderConfig(latent_channels=4, widths=(8, 8, 16)))
    again = create(describe(made))
    assert type(again) is AlignedAutoencoder
    again.load_state_dict(made.state_dict())


def test_masks_are_shares(photos: Tensor, joints: Tensor) -> None:
    alignment = Alignment(SIZE).eval()
    with torch.no_grad():
        seen, aligned = alignment(photos, joints, joints.flip(0))
        moved = move(aligned, photos, seen.fine, torch.ones(2, 3, 1, 1))
    assert moved["masks"].shape == (2, 9, SIZE[0] // 2, SIZE[1] // 2)
    assert torch.allclose(moved["masks"][:, 1:].sum(1), torch.ones(2, SIZE[0] // 2, SIZE[1] // 2), atol=1e-5)


def test_the_flow_starts_around_the_latent_of_the_moved_photo(photos: Tensor, joints: Tensor) -> None:
    """Of an untrained network: what the autoencoder's linear path makes of the moved photo, and some of the noise."""
    network = create_network(NETWORK).eval()
    assert isinstance(network, AlignedRPFM)
    small = SmallAutoencoder(SmallAutoencoderConfig(widths=(8, 8, 16))).eval()
    network.conditioner.see_as(small)
    with torch.no_grad():
        given = network.source(Source(small.encode(photos), photos, joints))
        made = network.pose(joints.flip(0), given)
        noise = torch.randn(2, 8, 8, 6)
        begin = network.start(noise, made)
        assert torch.allclose(begin - 0.25 * noise, small.encode(made["moved_photo"]), atol=1e-4)


def test_a_slow_motion_moves_the_picture_slowly(photos: Tensor, joints: Tensor) -> None:
    """Keypoints are not drawn on whole pixels: a hundredth of one is a hundredth of the change of one."""
    aligner = Aligner(SIZE).eval()
    fine, coarse = (torch.zeros(1, 32, SIZE[0] // scale, SIZE[1] // scale) for scale in (4, 8))
    summary = torch.zeros(1, 128)
    with torch.no_grad():
        still, little, more = (
            aligner(joints[:1] + shift, joints[1:], fine, coarse, summary).grid for shift in (0.0, 0.01, 0.1)
        )
    step = (little - still).abs().mean()
    assert step > 0
    assert float((more - still).abs().mean() / step) == pytest.approx(10, rel=0.1)


def test_textures_forgive_a_shift_but_no_blur() -> None:
    x = torch.arange(64.0)
    stripes = torch.sin(x * math.pi / 4).expand(1, 3, 48, 64)
    shifted, blurred = stripes.roll(2, dims=3), 0.2 * stripes
    assert texture_loss(stripes, stripes) == 0
    assert texture_loss(shifted, stripes) < 0.1 * texture_loss(blurred, stripes)
    error = [(made - stripes).abs().mean() for made in (shifted, blurred)]
    assert error[1] < error[0]  # the sum of errors would prefer the blur


def test_surface_range_holds_the_body() -> None:
    assert (HIGH > LOW).all()
