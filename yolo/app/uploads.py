"""Pictures from strangers: each becomes a small RGB array, or one sentence that says why not."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from yolo.data.dataset import MAX_PIXELS
from yolo.errors import UserError

MAX_FILE_SIZE = "100mb"  # of a video
MAX_PICTURE_SIZE = 15 << 20  # bytes
LONGEST_SIDE = (
    2048  # pixels kept: several times what the network sees, a fraction of what a phone takes
)
# Pillow knows dozens more, some of which start other programs (EPS: Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
ORIENTATION = 0x0112  # EXIF; 5 to 8 exchange the sides

Image.init()  # a list of formats is only understood once all are registered


class Picture(NamedTuple):
    """A picture as it is worked on, and how large it was."""

    pixels: np.ndarray  # [H, W, 3] uint8 RGB, at most LONGEST_SIDE
    height: int  # of the original
    width: int

    @property
    def scale(self) -> float:
        """Original pixels per pixel."""
        return self.width / self.pixels.shape[1]


def read_picture(path: str | Path) -> Picture:
    """Decode a file of any kind: the first frame, upright, without transparency, 8 bits per colour.

    Raises:
        UserError: for what is no picture, damaged or too large, without its path or content.
    """
    try:
        if Path(path).stat().st_size > MAX_PICTURE_SIZE:
            raise UserError(f"This picture has more than {MAX_PICTURE_SIZE >> 20} MB.")
        with Image.open(path, formats=FORMATS) as image:
            return _decode(image)
    except Image.DecompressionBombError:
        raise _too_large() from None
    except UserError:
        raise
    except Exception:  # the decoders of seven formats raise nearly everything on damaged data
        raise UserError(
            "This file is damaged or no picture. Please try a JPEG, PNG, WebP, GIF, BMP or TIFF "
            "file."
        ) from None


def _decode(image: Image.Image) -> Picture:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise _too_large()
    if image.getexif().get(ORIENTATION, 1) >= 5:
        width, height = height, width
    largest = (LONGEST_SIDE, LONGEST_SIDE)
    image.draft("RGB", largest)  # JPEG alone: decode at a half, a quarter, an eighth
    image.thumbnail(largest)
    upright = ImageOps.exif_transpose(image)
    return Picture(np.array(_to_rgb(upright)), height, width)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode[0] in "IF":  # 16 and 32 bits: Pillow would cut off all above 255
        values = np.asarray(image, np.float32)
        largest = float(values.max(initial=0))
        deep = (
            4095.0 if largest <= 4095 else 65535.0
        )  # 12 bits in a file for 16, as of many cameras
        top = deep if image.mode.startswith("I") else largest
        image = Image.fromarray((values / max(top, 1e-9) * 255).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _too_large() -> UserError:
    limit = f"{MAX_PIXELS // 10**6} million pixels"
    return UserError(f"This picture has more than {limit}. Please make it smaller first.")
