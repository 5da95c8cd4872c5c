"""Pictures: any file that Pillow reads becomes a square of RGB bytes, or a reason why not."""

from __future__ import annotations

import base64
import io
import os

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from unfused.data.files import BadFile, check_file, kind_of

__all__ = ["IMAGE_EXTENSIONS", "decode_image", "encode_thumbnail", "open_rgb"]

# The last three cannot be read, but a folder that holds them should say so rather than look empty.
IMAGE_EXTENSIONS = frozenset(
    ".jpg .jpeg .jpe .jfif .png .bmp .gif .tif .tiff .webp .ppm .pgm .pbm .pnm .tga .avif .jp2"
    " .heic .heif .svg".split()
)


def decode_image(path: str | os.PathLike[str], size: int = 96) -> np.ndarray:
    """Read a picture as RGB: short side resized to `size`, then the centre cut out.

    The orientation noted by the camera is applied, transparency is laid on white, 16-bit and floating-point
    grey are scaled to 0..255 (floating point by its own range), and an animation gives its first frame.

    Parameters
    ----------
    path : path
        JPEG, PNG, WebP, TIFF, GIF, BMP and whatever else Pillow reads; the extension is not relied on.
    size : int, default=96
        Side of the result in pixels.

    Returns
    -------
    ndarray of shape (3, size, size), uint8

    Raises
    ------
    BadFile
        Missing, empty, not a picture, damaged, cut off, or of more than 178 million pixels.

    Examples
    --------
    >>> import tempfile
    >>> path = os.path.join(tempfile.mkdtemp(), "red.png")
    >>> Image.new("RGB", (200, 100), "red").save(path)
    >>> decode_image(path, 32)[:, 0, 0].tolist()
    [255, 0, 0]
    """
    return np.ascontiguousarray(np.asarray(_open_square(path, size)).transpose(2, 0, 1))


def _open_square(path: str | os.PathLike[str], size: int) -> Image.Image:
    return ImageOps.fit(open_rgb(path, 2 * size), (size, size), Image.Resampling.BICUBIC)


def open_rgb(path: str | os.PathLike[str], least: int | None = None) -> Image.Image:
    """Read a picture as RGB, whole, by the rules of `decode_image`.

    Parameters
    ----------
    path : path
    least : int, optional
        A JPEG may come at a half, a quarter or an eighth of its size where both sides keep so many pixels.

    Raises
    ------
    BadFile
        As `decode_image` does.
    """
    check_file(path)
    try:
        with Image.open(path) as image:
            if least is not None:
                image.draft("RGB", (least, least))
            return _rgb(ImageOps.exif_transpose(image))
    except BadFile:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadFile("too many pixels, or a decompression bomb") from error
    except Exception as error:  # Pillow's plugins raise nearly anything, and none of it may stop a run
        raise BadFile(_reason(path, error)) from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        grey = np.asarray(image, np.float64)
        if not np.isfinite(grey).all():
            raise BadFile("NaN or infinite pixels")
        grey = (grey - grey.min()) * (255 / max(float(np.ptp(grey)), 1e-300))
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _reason(path: str | os.PathLike[str], error: Exception) -> str:
    kind = kind_of(path)
    if "HEIC" in kind:
        return f"{kind}, which cannot be read here: convert it to JPEG or PNG"
    if isinstance(error, UnidentifiedImageError):
        return f"damaged: {kind} that cannot be opened" if "picture" in kind else f"not a picture: {kind}"
    if "truncated" in str(error).lower() or isinstance(error, EOFError):
        return "truncated: the picture is not whole"
    return f"damaged: {str(error).strip().rstrip('.') or type(error).__name__}"


def encode_thumbnail(path: str | os.PathLike[str], px: int = 64) -> str:
    """Encode a small square version of a picture for a web page.

    Parameters
    ----------
    path : path
        A picture that `decode_image` reads.
    px : int, default=64
        Side in pixels.

    Returns
    -------
    str
        ``data:image/jpeg;base64,...``, about 2 kB.

    Raises
    ------
    BadFile
        As `decode_image` does.
    """
    buffer = io.BytesIO()
    _open_square(path, px).save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
