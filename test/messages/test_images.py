# SPDX-License-Identifier: Apache-2.0
"""Every image encoding, padded rows, endianness, and what must be refused."""

from __future__ import annotations

import struct
import zlib
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from kfloc_ros.errors import FrameError
from kfloc_ros.messages.images import (
    ENCODINGS,
    decode_compressed,
    decode_depth_message,
    decode_image,
    fill_image,
    is_depth,
)

RGB = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
GREY = RGB[..., 0]
RGB16 = RGB.astype(np.uint16) * 256 + 17
FLAT = np.array([200, 90, 40], np.uint8)


def message(
    encoding: str, data: NDArray[np.generic], width: int = 8, padding: int = 0, big_endian: bool = False
) -> SimpleNamespace:
    rows = np.ascontiguousarray(data).reshape(len(data), -1)
    if rows.dtype == np.uint16:
        rows = rows.astype(">u2" if big_endian else "<u2")
    packed = rows.view(np.uint8).reshape(len(rows), -1)
    step = packed.shape[1] + padding
    padded = np.pad(packed, ((0, 0), (0, padding)), constant_values=77)
    return SimpleNamespace(
        encoding=encoding, height=len(rows), width=width, step=step, is_bigendian=int(big_endian), data=padded.tobytes()
    )


def bayer(pattern: str) -> NDArray[np.uint8]:
    """A mosaic of one colour: interpolation must give that colour back whatever the method."""
    channel = {"r": 0, "g": 1, "b": 2}
    tile = np.array([FLAT[channel[letter]] for letter in pattern], np.uint8).reshape(2, 2)
    return np.tile(tile, (3, 4))


GREY_RGB = np.repeat(GREY[..., None], 3, axis=2)
ALPHA = np.full((6, 8, 1), 9, np.uint8)
CASES = {
    "rgb8": (RGB, RGB),
    "bgr8": (RGB[..., ::-1], RGB),
    "8UC3": (RGB[..., ::-1], RGB),
    "rgba8": (np.concatenate([RGB, ALPHA], 2), RGB),
    "bgra8": (np.concatenate([RGB[..., ::-1], ALPHA], 2), RGB),
    "8UC4": (np.concatenate([RGB[..., ::-1], ALPHA], 2), RGB),
    "mono8": (GREY, GREY_RGB),
    "8UC1": (GREY, GREY_RGB),
    "mono16": (RGB16[..., 0], GREY_RGB),
    "rgb16": (RGB16, RGB),
    "bgr16": (RGB16[..., ::-1], RGB),
}


@pytest.mark.parametrize("padding", [0, 6])
@pytest.mark.parametrize("encoding", CASES)
def test_encodings_with_and_without_padded_rows(encoding: str, padding: int) -> None:
    data, expected = CASES[encoding]
    assert np.array_equal(decode_image(message(encoding, data, padding=padding)), expected)


@pytest.mark.parametrize("encoding", ["mono16", "rgb16", "bgr16"])
def test_big_endian(encoding: str) -> None:
    data, expected = CASES[encoding]
    assert np.array_equal(decode_image(message(encoding, data, big_endian=True, padding=2)), expected)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("pattern", ["rggb", "bggr", "gbrg", "grbg"])
def test_bayer_patterns_give_the_colour_back(pattern: str, bits: int) -> None:
    mosaic: NDArray[np.generic] = bayer(pattern)
    if bits == 16:
        mosaic = mosaic.astype(np.uint16) * 256
    decoded = decode_image(message(f"bayer_{pattern}{bits}", mosaic, padding=4))
    assert np.array_equal(decoded[1:-1, 1:-1], np.broadcast_to(FLAT, (4, 6, 3)))


@pytest.mark.parametrize(
    ("encoding", "order"), [("yuv422", "uyvy"), ("uyvy", "uyvy"), ("yuv422_yuy2", "yuyv"), ("yuyv", "yuyv")]
)
def test_yuv422(encoding: str, order: str) -> None:
    y, u, v = 120, 90, 170
    data = np.tile(np.array([{"y": y, "u": u, "v": v}[letter] for letter in order], np.uint8), (6, 4))
    expected = [
        np.clip(value, 0, 255)
        for value in (
            1.164 * (y - 16) + 1.596 * (v - 128),
            1.164 * (y - 16) - 0.813 * (v - 128) - 0.391 * (u - 128),
            1.164 * (y - 16) + 2.018 * (u - 128),
        )
    ]
    decoded = decode_image(message(encoding, data, padding=8))
    assert decoded.shape == (6, 8, 3)
    assert np.abs(decoded.astype(float) - expected).max() <= 2


@pytest.mark.parametrize("padding", [0, 8])
@pytest.mark.parametrize(("encoding", "order"), [("nv12", "uv"), ("nv21", "vu")])
def test_two_colours_behind_the_brightness(encoding: str, order: str, padding: int) -> None:
    y, colours = 120, {"u": 90, "v": 170}
    rows = np.full((9, 8), y, np.uint8)
    rows[6:] = np.tile([colours[letter] for letter in order], (3, 4))
    sent = message(encoding, rows, padding=padding)
    sent.height = 6
    decoded = decode_image(sent)
    expected = [
        1.164 * (y - 16) + 1.596 * 42,
        1.164 * (y - 16) - 0.813 * 42 + 0.391 * 38,
        1.164 * (y - 16) - 2.018 * 38,
    ]
    assert decoded.shape == (6, 8, 3) and np.abs(decoded.astype(float) - expected).max() <= 2
    sent.data = sent.data[: 6 * (8 + padding)]
    with pytest.raises(FrameError, match="needs"):
        decode_image(sent)
    sent.height = 5
    with pytest.raises(FrameError):
        decode_image(sent)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("encoding", ["mono16", "rgb16", "bayer_rggb16"])
def test_cameras_of_fewer_than_16_bits_are_as_bright_as_others(encoding: str, bits: int) -> None:
    def scaled(values: NDArray[np.uint8], bits: int) -> NDArray[np.uint16]:
        return np.asarray(values.astype(np.uint16) << (bits - 8), dtype=np.uint16)

    values = {"mono16": GREY, "rgb16": RGB, "bayer_rggb16": bayer("rggb")}[encoding].copy()
    values[0, 0] = 255
    whole = decode_image(message(encoding, scaled(values, 16)))
    for big_endian in (False, True):
        assert np.array_equal(decode_image(message(encoding, scaled(values, bits), big_endian=big_endian)), whole)
    stored = scaled(values, bits)[..., ::-1] if encoding == "rgb16" else scaled(values, bits)
    data = cv2.imencode(".png", stored)[1].tobytes()
    told = f"{encoding}; png compressed {'bgr16' if encoding == 'rgb16' else ''}"
    assert np.array_equal(decode_compressed(SimpleNamespace(format=told, data=data)), whole)


@pytest.mark.parametrize(
    ("said", "topic", "depth"),
    [
        ("16UC1", "/camera/image_raw", True),
        ("32FC1", "/front/image", True),
        ("mono16", "/camera/depth/image_raw", True),
        ("mono16", "/thermal/image_raw", False),
        ("mono8", "/camera/depth/image_raw", False),
    ],
)
def test_grey_images_of_16_bits_are_depth_if_their_topic_says_so(said: str, topic: str, depth: bool) -> None:
    assert is_depth(SimpleNamespace(encoding=said), topic) is depth
    assert is_depth(SimpleNamespace(format=f"{said}; png compressed "), topic) is depth


def test_every_encoding_is_tested() -> None:
    others = {f"bayer_{p}{b}" for p in ("rggb", "bggr", "gbrg", "grbg") for b in (8, 16)}
    assert set(ENCODINGS) == CASES.keys() | others | {"yuv422", "uyvy", "yuv422_yuy2", "yuyv", "nv12", "nv21"}


def test_the_last_row_needs_no_padding() -> None:
    padded = message("rgb8", RGB, padding=5)
    padded.data = padded.data[:-5]
    assert np.array_equal(decode_image(padded), RGB)


def test_there_and_back() -> None:
    sent = fill_image(SimpleNamespace(), RGB)
    assert sent.encoding == "rgb8" and np.array_equal(decode_image(sent), RGB)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"encoding": "32FC1"}, "32FC1"),
        ({"encoding": ""}, "encoding ''"),
        ({"width": 0}, "no pixels"),
        ({"height": 0}, "no pixels"),
        ({"step": 5}, "step is 5"),
        ({"data": b"abc"}, "has 3"),
        ({"height": 30_000}, "needs"),
        ({"height": 4_000_000_000}, "too large"),
    ],
)
def test_unusable_images_are_refused_in_words(changes: dict[str, object], said: str) -> None:
    bad = message("rgb8", RGB)
    for name, value in changes.items():
        setattr(bad, name, value)
    with pytest.raises(FrameError, match=said):
        decode_image(bad)


def compressed(kind: str, image: NDArray[np.uint8] = RGB) -> bytes:
    flags = [cv2.IMWRITE_JPEG_QUALITY, 100] if kind == ".jpg" else []
    return cv2.imencode(kind, image[..., ::-1], flags)[1].tobytes()


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("pattern", ["rggb", "bggr", "gbrg", "grbg"])
def test_a_mosaic_compressed_as_it_is_gives_the_colours_of_the_raw_image(pattern: str, bits: int) -> None:
    mosaic = bayer(pattern) if bits == 8 else bayer(pattern).astype(np.uint16) * 256
    encoding = f"bayer_{pattern}{bits}"
    packed = SimpleNamespace(format=f"{encoding}; png compressed ", data=cv2.imencode(".png", mosaic)[1].tobytes())
    assert np.array_equal(decode_compressed(packed), decode_image(message(encoding, mosaic)))
    assert (decode_compressed(packed) == FLAT).all()


def test_an_image_made_of_a_mosaic_before_it_was_compressed_is_that_image() -> None:
    for made in ("bgr8", "mono8"):
        image = RGB if made == "bgr8" else np.repeat(GREY[..., None], 3, axis=2)
        data = compressed(".png", image) if made == "bgr8" else cv2.imencode(".png", GREY)[1].tobytes()
        packed = SimpleNamespace(format=f"bayer_rggb8; png compressed {made}", data=data)
        assert np.array_equal(decode_compressed(packed), image)
    colour = SimpleNamespace(format="bayer_rggb8; png compressed ", data=compressed(".png"))
    assert np.array_equal(decode_compressed(colour), RGB), "three channels are no mosaic, whatever the format says"


@pytest.mark.parametrize(("made", "swapped"), [("bgr8", False), ("rgb8", True), ("", False)])
def test_an_image_compressed_with_red_first_gets_its_red_back(made: str, swapped: bool) -> None:
    image = RGB[..., ::-1] if swapped else RGB
    packed = SimpleNamespace(
        format=f"rgb8; png compressed {made}", data=compressed(".png", np.ascontiguousarray(image))
    )
    assert np.array_equal(decode_compressed(packed), RGB)


def test_an_orientation_in_exif_is_not_followed() -> None:
    """The poses and the calibration are of the sensor's picture; COLMAP and image_transport ignore the tag, too."""
    jpeg = compressed(".jpg")
    tag = b"MM\x00*\x00\x00\x00\x08\x00\x01\x01\x12\x00\x03\x00\x00\x00\x01\x00\x03\x00\x00\x00\x00\x00\x00"
    exif = b"Exif\x00\x00" + tag
    turned = jpeg[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + jpeg[2:]
    plain = decode_compressed(SimpleNamespace(format="jpeg", data=jpeg))
    follows = cv2.imdecode(np.frombuffer(turned, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    assert np.array_equal(follows, plain[::-1, ::-1]), "the test's own tag must be one that OpenCV understands"
    assert np.array_equal(decode_compressed(SimpleNamespace(format="jpeg", data=turned)), plain)


def packed_depth(counts: NDArray[np.uint16]) -> list[SimpleNamespace]:
    """A depth image as raw, as a plain PNG and as compressed_depth_image_transport packs it."""
    png = cv2.imencode(".png", counts)[1].tobytes()
    return [
        message("16UC1", counts),
        SimpleNamespace(format="16UC1; png compressed ", data=png),
        SimpleNamespace(format="16UC1; compressedDepth", data=bytes(12) + png),
    ]


def test_the_highest_count_is_no_depth_however_it_is_packed() -> None:
    counts = np.full((6, 8), 2000, np.uint16)
    counts[:3] = 65535
    counts[3, 0] = 0
    for packed in packed_depth(counts):
        depth_m = decode_depth_message(packed, not hasattr(packed, "encoding"))
        assert (depth_m[:3] == 0).all() and depth_m[3, 0] == 0 and (depth_m[4:] == 2.0).all()


def test_depth_of_floats_packed_into_counts_is_known_where_it_is_positive() -> None:
    """compressed_depth_image_transport stores a / depth + b in 16 bits."""
    counts = np.full((6, 8), 2000, np.uint16)
    counts[0] = 0
    png = cv2.imencode(".png", counts)[1].tobytes()

    def packed(a: float, b: float) -> SimpleNamespace:
        data = bytes(4) + np.array([a, b], "<f4").tobytes() + png
        return SimpleNamespace(format="32FC1; compressedDepth png", data=data)

    depth_m = decode_depth_message(packed(4000.0, 0.0), True)
    assert (depth_m[0] == 0).all() and (depth_m[1:] == 2.0).all()
    assert (decode_depth_message(packed(4000.0, 3000.0), True) == 0).all(), "behind the camera is unknown"
    for a, b in ((np.nan, 0.0), (np.inf, 0.0), (100.0, np.nan), (-1.0, 5.0), (0.0, 0.0)):
        with pytest.raises(FrameError, match="in its header"):
            decode_depth_message(packed(a, b), True)


@pytest.mark.parametrize("kept", [0, 5, 12, 60])
def test_packed_depth_that_is_cut_off_is_refused(kept: int) -> None:
    packed = packed_depth(np.full((6, 8), 2000, np.uint16))[2]
    packed.data = packed.data[:kept]
    with pytest.raises(FrameError, match="is not a 16-bit PNG"):
        decode_depth_message(packed, True)


def test_depth_with_more_pixels_than_any_camera_is_refused_before_it_is_unpacked() -> None:
    rows = zlib.compress(bytes(2_000_000), 9)  # fewer than the header says
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 16, 0, 0, 0, 0)), (b"IDAT", rows), (b"IEND", b"")]
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )
    with pytest.raises(FrameError, match="is not a 16-bit PNG"):
        decode_depth_message(SimpleNamespace(format="16UC1; compressedDepth png", data=bytes(12) + png), True)


@pytest.mark.parametrize("big_endian", [False, True])
@pytest.mark.parametrize("encoding", ["16UC1", "32FC1"])
def test_rows_of_depth_may_be_padded_but_the_last(encoding: str, big_endian: bool) -> None:
    kind = np.dtype("u2" if encoding == "16UC1" else "f4").newbyteorder(">" if big_endian else "<")
    values = np.full((6, 8), 1500 if encoding == "16UC1" else 1.5, kind)
    rows = [row.tobytes() for row in values]
    for padding in (0, 6):
        step = len(rows[0]) + padding
        packed = SimpleNamespace(
            encoding=encoding, height=6, width=8, step=step if padding else 0, is_bigendian=int(big_endian),
            data=(bytes([77]) * padding).join(rows),
        )  # fmt: skip
        assert decode_depth_message(packed, False) == pytest.approx(1.5)
        packed.data = packed.data[:-1]
        with pytest.raises(FrameError, match="bytes"):
            decode_depth_message(packed, False)


def test_a_mosaic_is_known_however_its_format_is_written() -> None:
    data = cv2.imencode(".png", bayer("rggb"))[1].tobytes()
    for text in ("bayer_rggb8", "BAYER_RGGB8; png compressed", "bayer_rggb8;png"):
        assert (decode_compressed(SimpleNamespace(format=text, data=data)) == FLAT).all()


def test_png_is_exact_and_jpeg_is_near() -> None:
    assert np.array_equal(decode_compressed(SimpleNamespace(format="png", data=compressed(".png"))), RGB)
    smooth = cv2.resize(RGB, (64, 48), interpolation=cv2.INTER_CUBIC)
    decoded = decode_compressed(SimpleNamespace(format="jpeg", data=compressed(".jpg", smooth)))
    assert np.abs(decoded.astype(int) - smooth).mean() < 6


@pytest.mark.parametrize("kind", [".jpg", ".png"])
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.3, 0.6, 0.9, 0.99])
def test_cut_off_images_are_refused_and_not_filled_with_grey(kind: str, kept: float) -> None:
    data = compressed(kind, cv2.resize(RGB, (64, 48)))
    with pytest.raises(FrameError):
        decode_compressed(SimpleNamespace(format=kind, data=data[: int(kept * len(data))]))


def test_a_jpeg_may_be_followed_by_padding() -> None:
    data = compressed(".jpg") + b"\0" * 100
    assert decode_compressed(SimpleNamespace(format="jpeg", data=data)).shape == RGB.shape
