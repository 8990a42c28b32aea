"""Pictures: what is read and refused, fitting without stretching, and the way into and out of the model's range."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpfm_edge.core.errors import ConfigError, InputError
from rpfm_edge.people.image import fit_image, from_model, letterbox, load_image, resize, save_png, to_model

SIDES = st.integers(1, 2000)


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_png_round_trip_keeps_rgb(tmp_path: Path) -> None:
    image = noise(7, 5)
    save_png(tmp_path / "new" / "a.png", image)
    np.testing.assert_array_equal(load_image(tmp_path / "new" / "a.png"), image)
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / "new" / "a.png"))[..., ::-1], image)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp"])
def test_formats(tmp_path: Path, suffix: str) -> None:
    image = np.full((16, 24, 3), (200, 100, 30), np.uint8)
    cv2.imwrite(str(tmp_path / f"a{suffix}"), image[..., ::-1])
    loaded = load_image(str(tmp_path / f"a{suffix}"))
    assert loaded.shape == image.shape
    assert np.abs(loaded.astype(int) - image).max() <= 4


def test_grey_and_transparent_become_rgb(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "grey.png"), np.full((4, 4), 77, np.uint8))
    cv2.imwrite(str(tmp_path / "clear.png"), np.full((4, 4, 4), (10, 20, 30, 0), np.uint8))
    assert (load_image(tmp_path / "grey.png") == 77).all()
    assert (load_image(tmp_path / "clear.png") == (30, 20, 10)).all()


def test_jpeg_is_turned_as_its_exif_says(tmp_path: Path) -> None:
    data = cv2.imencode(".jpg", noise(16, 24))[1].tobytes()
    tiff = b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + b"\0\0\0\0"
    exif = b"Exif\0\0" + tiff
    (tmp_path / "a.jpg").write_bytes(data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:])
    assert load_image(tmp_path / "a.jpg").shape == (24, 16, 3)


def test_array_is_taken_as_it_is() -> None:
    image = noise(8, 9)
    np.testing.assert_array_equal(load_image(image), image)
    np.testing.assert_array_equal(load_image(image[:, ::-1]), image[:, ::-1])
    assert load_image(image[:, ::-1]).flags.c_contiguous
    np.testing.assert_array_equal(load_image(image, (8, 9)), image)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), r"float32\[4, 4, 3\].*expected uint8"),
        (np.zeros((4, 4), np.uint8), r"uint8\[4, 4\]"),
        (np.zeros((4, 4, 4), np.uint8), r"uint8\[4, 4, 4\]"),
        (np.zeros((0, 4, 3), np.uint8), "not empty"),
        (np.broadcast_to(np.uint8(0), (10_000, 5_001, 3)), "5001 × 10000 pixels: expected at most 50 megapixels"),
    ],
)
def test_arrays_that_are_refused(array: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_image(array)


def test_source_of_another_type() -> None:
    with pytest.raises(InputError, match="given as list"):
        load_image([[1, 2, 3]])  # type: ignore[arg-type]


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no image file .*gone\.jpg"):
        load_image(tmp_path / "gone.jpg")
    with pytest.raises(InputError, match="no image file"):
        load_image(tmp_path)


def test_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(b"x")

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(InputError, match=r"a\.png cannot be read \(Permission denied\)"):
        load_image(tmp_path / "a.png")


@pytest.mark.parametrize("data", [b"", b"hello", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"])
def test_no_picture(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.jpg").write_bytes(data)
    with pytest.raises(InputError, match=r"a\.jpg is no picture"):
        load_image(tmp_path / "a.jpg")


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_picture_cut_short(tmp_path: Path, suffix: str) -> None:
    data = cv2.imencode(suffix, noise(64, 64))[1].tobytes()
    (tmp_path / "a").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="a is cut short"):
        load_image(tmp_path / "a")


def test_large_png_is_refused_by_its_header(tmp_path: Path) -> None:
    header = struct.pack(">IIBBBBB", 30_000, 2_000, 8, 2, 0, 0, 0)  # 180 MB once decoded, 60 bytes here
    data = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(InputError, match="30000 × 2000 pixels: expected at most 50 megapixels"):
        load_image(tmp_path / "a.png")


def test_large_jpeg_is_refused_by_its_header(tmp_path: Path) -> None:
    data = bytearray(cv2.imencode(".jpg", noise(8, 8))[1].tobytes())
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 8_000, 9_000)
    for fill in (b"", b"\xff\xff"):  # which may stand before any marker
        (tmp_path / "a.jpg").write_bytes(data[:frame] + fill + data[frame:])
        with pytest.raises(InputError, match="9000 × 8000 pixels"):
            load_image(tmp_path / "a.jpg")


@given(SIDES, SIDES, SIDES, SIDES)
def test_letterbox_is_the_largest_centred_box_of_the_same_aspect(h: int, w: int, height: int, width: int) -> None:
    box = letterbox((h, w), (height, width))
    assert box.height == height or box.width == width
    scale = min(height / h, width / w)
    assert abs(box.height - h * scale) <= 1
    assert abs(box.width - w * scale) <= 1
    assert 0 <= height - box.height - 2 * box.top <= 1
    assert 0 <= width - box.width - 2 * box.left <= 1


def test_fitting_pads_with_the_median_border_colour() -> None:
    image = np.full((100, 100, 3), (10, 200, 90), np.uint8)
    image[25:75, 25:75] = 255  # a square must stay one
    image[0, :20] = 0  # a blemish does not move the median
    fitted = load_image(image, (256, 176))
    assert fitted.shape == (256, 176, 3)
    assert (fitted[:40] == (10, 200, 90)).all()
    assert (fitted[216:] == (10, 200, 90)).all()
    rows, columns = np.nonzero((fitted == 255).all(axis=2))
    assert abs(np.ptp(rows) - np.ptp(columns)) <= 1
    assert abs(np.ptp(rows) + 1 - 88) <= 2


def test_fitting_to_the_same_aspect_pads_nothing() -> None:
    image = noise(512, 352)
    np.testing.assert_array_equal(fit_image(image, (256, 176)), resize(image, (256, 176)))


def test_shrinking_averages_areas() -> None:
    image = noise(32, 16)
    means = image.reshape(8, 4, 4, 4, 3).mean(axis=(1, 3))
    assert np.abs(resize(image, (8, 4)) - means).max() <= 0.5 + 1e-6


def test_save_refuses(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a\.jpg is no PNG"):
        save_png(tmp_path / "a.jpg", noise(4, 4))
    with pytest.raises(InputError, match="float64"):
        save_png(tmp_path / "a.png", np.zeros((4, 4, 3)))
    assert list(tmp_path.iterdir()) == []


def test_save_that_fails_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_png(tmp_path / "a.png", noise(4, 4))
    write = Path.write_bytes

    def fill_the_disk(path: Path, data: bytes) -> int:
        write(path, data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fill_the_disk)
    with pytest.raises(OSError, match="No space"):
        save_png(tmp_path / "a.png", noise(9, 9))
    np.testing.assert_array_equal(load_image(tmp_path / "a.png"), noise(4, 4))
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_model_range_and_round_trip() -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    model = to_model(ramp)
    assert model.shape == (1, 3, 16, 16)
    assert model.dtype == np.float32
    assert (model.min(), model.max()) == (-1, 1)
    np.testing.assert_allclose(model[0, 0], ramp[0, :, :, 0] / 127.5 - 1, atol=1e-7)
    np.testing.assert_array_equal(from_model(model), ramp)


def test_from_model_rounds_and_clips() -> None:
    values = (
        np.array([-3, -1, 0.4 / 127.5 - 1, 0.6 / 127.5 - 1, 1, 7], np.float32).reshape(1, 1, 1, 6).repeat(3, axis=1)
    )
    assert from_model(values)[0, 0, :, 0].tolist() == [0, 0, 0, 1, 255, 255]


def test_to_model_refuses_other_arrays() -> None:
    with pytest.raises(InputError, match=r"uint8\[4, 4, 3\].*\[B, H, W, 3\]"):
        to_model(noise(4, 4))
