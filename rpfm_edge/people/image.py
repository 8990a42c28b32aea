"""Pictures: reading, fitting and writing them, and the way into and out of the model's range."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Literal, NamedTuple

import cv2
import numpy as np

from rpfm_edge.core.errors import ConfigError, InputError
from rpfm_edge.core.files import write_bytes

MAX_PIXELS = 50_000_000
_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0 … SOF15, without DHT, JPG and DAC


Fit = Literal["pad", "squeeze"]  # how a picture meets a size: with margins, or stretched


class Box(NamedTuple):
    """A rectangle in pixels."""

    top: int
    left: int
    height: int
    width: int


class _Header(NamedTuple):
    """Size in pixels, where the header ends, and what must come after it in a whole file."""

    height: int
    width: int
    end: int
    closing: bytes


def load_image(source: str | Path | np.ndarray, size: tuple[int, int] | None = None) -> np.ndarray:
    """Read a picture as (H, W, 3) uint8 RGB.

    Args:
        source: a file that OpenCV reads (JPEG, turned as its EXIF says, PNG, WebP, BMP …; transparency is dropped),
            or an array that is (H, W, 3) uint8 RGB already.
        size: (height, width) to fit the picture to, see ``fit_image``; None leaves it as it is.

    Raises:
        InputError: no such file, no picture, cut short, an array of another dtype or shape, empty, over 50 megapixels.
    """
    if isinstance(source, np.ndarray):
        image = np.ascontiguousarray(check_image(source))
    elif isinstance(source, (str, Path)):
        image = decode_image(_read_bytes(Path(source)), str(source))
    else:
        raise InputError(
            f"an image was given as {type(source).__name__}",
            expected="a path or a (H, W, 3) uint8 RGB array",
            fix="pass one of these",
        )
    return image if size is None else fit_image(image, size)


def check_image(image: np.ndarray) -> np.ndarray:
    """Return ``image``; raise ``InputError`` unless it is (H, W, 3) uint8, not empty and at most 50 megapixels."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise InputError(
            f"an image is {image.dtype}{list(image.shape)}",
            expected="uint8 [H, W, 3], RGB, not empty",
            fix="convert it to 8-bit RGB",
        )
    _check_pixels(image.shape[0], image.shape[1], "an image")
    return image


def decode_image(data: bytes, name: str) -> np.ndarray:
    """Decode an encoded picture to (H, W, 3) uint8 RGB; ``name`` stands for it in errors (``InputError``)."""
    header = _header(data)
    if header is not None:
        _check_pixels(header.height, header.width, name)  # before the decoder allocates anything
        if header.closing not in data[header.end :]:  # OpenCV would fill the rest with grey
            raise _no_picture(name, "cut short")
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if data else None
    except cv2.error:  # a size beyond OpenCV's own limit, in a format whose header is not read here
        image = None
    if image is None:
        raise _no_picture(name, "no picture that can be read")
    _check_pixels(image.shape[0], image.shape[1], name)
    rgb: np.ndarray = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    return rgb


def letterbox(from_size: tuple[int, int], size: tuple[int, int]) -> Box:
    """Where a picture of ``from_size`` (height, width) lies, centred, when fitted to ``size`` without stretching."""
    scale = min(size[0] / from_size[0], size[1] / from_size[1])
    height, width = (min(n, max(1, round(m * scale))) for m, n in zip(from_size, size, strict=True))
    return Box((size[0] - height) // 2, (size[1] - width) // 2, height, width)


def fit_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Fit (H, W, 3) uint8 to ``size`` (height, width), keeping the aspect ratio: a person must not be stretched.

    What is left over on both sides is filled with the median colour of the picture's border, which continues the
    plain backgrounds of fashion pictures.
    """
    if image.shape[:2] == tuple(size):
        return image
    box = letterbox((image.shape[0], image.shape[1]), size)
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    fitted = np.empty((*size, 3), np.uint8)
    fitted[:] = np.median(border, axis=0).round()
    fitted[box.top : box.top + box.height, box.left : box.left + box.width] = resize(image, (box.height, box.width))
    return fitted


def fitted(image: np.ndarray, size: tuple[int, int], fit: Fit) -> np.ndarray:
    """(H, W, 3) uint8 at ``size`` (height, width): with margins, or stretched."""
    return fit_image(image, size) if fit == "pad" else resize(image, size)


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize (H, W, 3) uint8 to ``size`` (height, width), whatever that does to the aspect ratio.

    Areas are averaged where the picture shrinks, cubic interpolation where it grows.
    """
    if image.shape[:2] == tuple(size):
        return image
    shrinks = image.shape[0] * image.shape[1] > size[0] * size[1]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    resized: np.ndarray = cv2.resize(image, (size[1], size[0]), interpolation=method)
    return resized


def save_png(path: str | Path, image: np.ndarray) -> None:
    """Write (H, W, 3) uint8 RGB as PNG, aside and then renamed, so that nobody ever reads half a picture."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ConfigError(f"{path} is no PNG file name", expected="a name that ends in .png", fix="rename it")
    _, encoded = cv2.imencode(".png", cv2.cvtColor(check_image(image), cv2.COLOR_RGB2BGR))
    write_bytes(path, encoded.tobytes())


def to_model(images: np.ndarray) -> np.ndarray:
    """(B, H, W, 3) uint8 → (B, 3, H, W) float32 in [-1, 1]."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise InputError(
            f"images are {images.dtype}{list(images.shape)}",
            expected="uint8 [B, H, W, 3]",
            fix="stack 8-bit RGB images",
        )
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)).astype(np.float32) / np.float32(127.5) - np.float32(1)


def from_model(images: np.ndarray) -> np.ndarray:
    """(B, 3, H, W) float in [-1, 1] → (B, H, W, 3) uint8, rounded; what lies outside the range is clipped."""
    scaled = np.rint((images.astype(np.float32) + 1) * np.float32(127.5))
    return np.ascontiguousarray(np.clip(scaled, 0, 255).astype(np.uint8).transpose(0, 2, 3, 1))


def _read_bytes(path: Path) -> bytes:
    if not path.is_file():
        raise InputError(f"there is no image file {path}", expected="a picture", fix="check the path")
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror})",
            expected="a file that you may read",
            fix="check its permissions",
        ) from None


def _no_picture(name: str, what: str) -> InputError:
    return InputError(
        f"{name} is {what}", expected="a whole JPEG, PNG, WebP or BMP picture", fix="open it in a viewer to check"
    )


def _check_pixels(height: int, width: int, name: str) -> None:
    if height * width > MAX_PIXELS:
        raise InputError(
            f"{name} has {width} × {height} pixels",
            expected=f"at most {MAX_PIXELS // 1_000_000} megapixels",
            fix="scale the picture down",
        )


def _header(data: bytes) -> _Header | None:
    """The header of a PNG or JPEG, None for other formats and broken headers."""
    if data.startswith(_PNG) and len(data) >= 24:
        width, height = struct.unpack(">II", data[16:24])
        return _Header(height, width, 24, b"IEND")
    if not data.startswith(_JPEG):
        return None
    position = 2
    while position + 9 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker in _JPEG_FRAMES:
            height, width = struct.unpack(">HH", data[position + 5 : position + 9])
            return _Header(height, width, position, b"\xff\xd9")
        if marker == 0xFF:  # a fill byte
            position += 1
        else:
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return None


def check_pair(a: np.ndarray, b: np.ndarray) -> None:
    """Raise ``InputError`` unless both are uint8 (H, W, 3) images of one size."""
    check_image(a)
    check_image(b)
    check_shapes(a, b)


def check_shapes(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape != b.shape:
        raise InputError(
            f"shapes {list(a.shape)} and {list(b.shape)} differ",
            expected="the same shape",
            fix="compare like with like",
        )


Image = np.ndarray  # (H, W, 3) uint8 RGB
