from __future__ import annotations

import base64
import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unfused.data.files import BadFile
from unfused.data.images import decode_image, encode_thumbnail

NOISE = np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8)


def encoded(image: Image.Image, how: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, how, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("how", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
@pytest.mark.parametrize("shape", [(64, 64), (200, 31), (1, 1), (3, 500)])
def test_any_format_and_shape(tmp_path: Path, how: str, shape: tuple[int, int]) -> None:
    (tmp_path / "x.jpg").write_bytes(encoded(Image.new("RGB", shape, (200, 100, 50)), how))
    pixels = decode_image(tmp_path / "x.jpg", 32)
    assert pixels.shape == (3, 32, 32) and pixels.dtype == np.uint8 and pixels.flags.c_contiguous
    assert np.abs(pixels.mean(axis=(1, 2)) - (200, 100, 50)).max() < 8


def test_centre_crop(tmp_path: Path) -> None:
    image = Image.new("RGB", (300, 100), "red")
    image.paste(Image.new("RGB", (100, 100), "blue"), (100, 0))
    image.save(tmp_path / "x.png")
    assert (decode_image(tmp_path / "x.png", 100) == np.array([0, 0, 255])[:, None, None]).all()


def test_orientation(tmp_path: Path) -> None:
    image = Image.new("RGB", (64, 64), "black")
    image.paste(Image.new("RGB", (64, 32), "white"), (0, 0))  # the upper half
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise: up becomes right
    image.save(tmp_path / "x.jpg", exif=exif)
    pixels = decode_image(tmp_path / "x.jpg", 64)[0]
    assert pixels[:, 40:].min() > 200 and pixels[:, :24].max() < 50


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_white(tmp_path: Path, mode: str) -> None:
    Image.new("RGBA", (16, 16), (0, 0, 0, 0)).convert(mode).save(
        tmp_path / "x.png", **({"transparency": 0} if mode == "P" else {})
    )
    assert decode_image(tmp_path / "x.png", 16).min() == 255


def test_deep_grey_keeps_its_range(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64)[None].repeat(64, 0)
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "x.png")
    assert np.ptp(decode_image(tmp_path / "x.png", 64)) > 240
    Image.fromarray((ramp / 7 - 100).astype(np.float32)).save(tmp_path / "x.tiff")
    assert np.ptp(decode_image(tmp_path / "x.tiff", 64)) > 240
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(tmp_path / "x.tiff")
    with pytest.raises(BadFile, match="NaN"):
        decode_image(tmp_path / "x.tiff", 64)


def test_bad_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = encoded(Image.fromarray(NOISE), "PNG")
    for content, reason in [
        (b"", "empty file"),
        (picture[: len(picture) // 2], "truncated"),
        (encoded(Image.fromarray(NOISE), "JPEG")[:3000], "truncated"),
        (picture[:20], "truncated"),
        (picture[:100] + bytes(200) + picture[300:], "damaged"),
        (b"just some words\n" * 20, "not a picture: text"),
        (b"RIFF\0\0\0\0WAVEfmt ", "not a picture: a WAV recording"),
        (b"\0\0\0\x18ftypheic" + bytes(100), "convert it to JPEG or PNG"),
        (bytes(1000), "nothing but zero bytes"),
    ]:
        (tmp_path / "x.png").write_bytes(content)
        with pytest.raises(BadFile) as caught:
            decode_image(tmp_path / "x.png")
        assert reason in caught.value.reason and caught.value.reason.isprintable()
    (tmp_path / "x.png").write_bytes(picture)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(BadFile, match="too many pixels"):
        decode_image(tmp_path / "x.png")


@pytest.mark.parametrize("how", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_never_raise_anything_else(tmp_path: Path, how: str) -> None:
    generator = np.random.default_rng(0)
    original = encoded(Image.fromarray(NOISE), how)
    for _ in range(60):
        content = bytearray(original)
        for place in (len(content) * generator.random(4) ** 3).astype(int):
            content[place] = generator.integers(256)
        (tmp_path / "x.png").write_bytes(content[: int(len(content) * generator.uniform(0.5, 1.5))])
        try:
            assert decode_image(tmp_path / "x.png", 32).shape == (3, 32, 32)
        except BadFile as error:
            assert error.reason


def test_thumbnail(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"\xff <b>.png")
    Image.fromarray(NOISE).save(path)
    kind, _, content = encode_thumbnail(path, 48).partition(",")
    assert kind == "data:image/jpeg;base64" and len(content) < 6000
    assert Image.open(io.BytesIO(base64.b64decode(content))).size == (48, 48)
