"""One image file in, uint8 RGB out: what any file of any origin is read as, or why it cannot be.

Whole images are padded to a square with black, because nothing that a prompt names may be cut off.
"""

from command import BadInput

import contextlib
import hashlib
import io
import os
import sys
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

# What is decoded, whatever the ending says. PIL knows more, some by starting other programs.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF")
MAX_SIDE = 65535                                            # pixels; a JPEG cannot have more
# The turns that EXIF's orientation asks for.
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
         4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270,
         7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}
SIDE = 24               # of thumbnails, pixels

# Above twice Image.MAX_IMAGE_PIXELS, 178,956,970 pixels, PIL refuses an image as a decompression bomb; from
# half of that on it warns, in two lines. It also warns of damaged EXIF, which open_image reads past.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


def open_image(path) -> Image.Image:
    """An image as 8-bit RGB, upright: EXIF rotation applied, transparency over black, 16 bits scaled down.

    BadInput, in one line, for whatever cannot be read.
    """
    with said_in_one_line(path), opened(path) as img:
        check_pixels(img)
        deep = is_deep(img)
        img.load()
        turn = TURNS.get(orientation(img))
        img = to_rgb(img.transpose(turn) if turn is not None else img, path)
        check_depth(img, deep, path)
    return img


@contextlib.contextmanager
def said_in_one_line(path):
    """BadInput for whatever a decoder raises on the file's bytes."""
    try:
        yield
    except FileNotFoundError:
        raise BadInput(f"{path}: no such image") from None
    except Image.DecompressionBombError:
        most = f"{2 * Image.MAX_IMAGE_PIXELS:,} pixels (width x height), the most that is read"
        raise BadInput(f"{path}: more than {most}, against decompression bombs; make it smaller") from None
    except UnidentifiedImageError:
        why = f"is no {', '.join(FORMATS[:-1])} or {FORMATS[-1]}" if Path(path).stat().st_size else "is empty"
        raise BadInput(f"{path}: the file {why}") from None
    except (MemoryError, BadInput):
        raise
    except Exception as error:                              # a decoder raises anything on bytes of any kind
        raise BadInput(f"{path}: cannot be read as an image ({' '.join(str(error).split())})") from None


def opened(path, content=None):
    """PIL's image of a file; of a JPEG whose EXIF stops PIL already here, of the file without it.

    content: the bytes of the file, where they have been read.
    """
    try:
        return Image.open(path if content is None else io.BytesIO(content), formats=FORMATS)
    except MemoryError:
        raise
    except Exception:
        content = Path(path).read_bytes() if content is None else content
        if not content.startswith(b"\xff\xd8\xff\xe1"):
            raise
    end = 4 + int.from_bytes(content[4:6])                  # where the segment ends: its length counts itself
    return Image.open(io.BytesIO(content[:2] + content[end:]), formats=FORMATS)


def is_deep(img):
    """Whether an open image has colours of 16 bits, of which PIL keeps the high bytes alone."""
    return img.mode in ("RGB", "RGBA") and any(";16" in str(tile) for tile in img.tile)


def check_depth(img, deep, path):
    """BadInput for the RGB image of a deep one that uses so few of its 16 bits that it is nearly black."""
    if deep and max(high for _, high in img.getextrema()) < 64:
        raise BadInput(f"{path}: colours of 16 bits, of which fewer are used, would be nearly black; "
                       "expected 8 bits a colour")


def check_pixels(img):
    """ValueError for a side so long that padding to a square would take more memory than the image."""
    if max(img.size) > MAX_SIDE:
        raise ValueError(f"{img.width} x {img.height} pixels, expected sides of at most {MAX_SIDE}")


def orientation(img) -> int:
    """EXIF's orientation of an open image, 1 to 8; 1, upright, where it has none or a damaged one."""
    try:
        turned = img.getexif().get(0x0112, 1)
        return turned if turned in TURNS else 1
    except MemoryError:
        raise
    except Exception:                                       # its parser raises anything on damaged bytes
        return 1


def to_rgb(img, path):
    """An open image as RGB.

    PNG does not say how many of a grey's 16 bits are used: cameras write 8, 10, 12 or 14. White is the
    largest grey of the fewest bits that hold the brightest pixel. So all of 16 bits are read as they are, 8
    or 12 bits in 16 come out as bright as they were, and an honest but dark image, with nothing above a
    quarter of white, comes out too bright: a note names the first such file of a folder.
    """
    if img.mode == "F" or img.mode.startswith("I"):
        grey = np.asarray(img)
        top = grey.max()
        if img.mode == "F" or grey.min() < 0 or top > 65535:
            raise ValueError("expected greys of 8 or 16 bits, got 32")
        bits = next(b for b in (8, 10, 12, 14, 16) if top < 2 ** b)
        grey = (grey.astype(np.int64) * 255 // (2 ** bits - 1)).astype(np.uint8)
        dark = np.quantile(grey, 0.99) < 16
        if top and (bits < 16 or dark):
            note(Path(path).parent, "16 bits", f"{path}: greys of 16 bits, the brightest is {top} of 65535; "
                 + (f"read as {bits} bits" if bits < 16 else "99 % of the image is nearly black"))
        return Image.fromarray(grey).convert("RGB")
    if "A" in img.getbands() or "transparency" in img.info:
        img = img.convert("RGBA")
        black = Image.new("RGB", img.size)
        black.paste(img, mask=img.getchannel("A"))
        return black
    return img.convert("RGB")


said = {}


def note(place, kind, text):
    """A line on stderr, of each kind the first of a place only, and of several processes from one only."""
    if said.setdefault((place, kind), text) is text and os.environ.get("RANK", "0") == "0":
        tqdm.write(text, file=sys.stderr)


def preprocess(img, size, crop="pad", rng=None) -> np.ndarray:
    """RGB image -> uint8 (size, size, 3) by PIL's bicubic resize, which is antialiased.

    "pad" keeps the whole image, centred on a black square: a prompt may name anything in it. "center" and
    "random" cut out a square of the short side, as the paper does, "random" at a place drawn from rng, a
    numpy Generator.
    """
    w, h = img.size
    if crop == "pad":
        return padded(img, size, size)
    side = min(w, h)
    x, y = (w - side) // 2, (h - side) // 2
    if crop == "random":
        x, y = int(rng.integers(w - side + 1)), int(rng.integers(h - side + 1))
    elif crop != "center":
        raise ValueError(f'expected crop "pad", "center" or "random", got {crop!r}')
    square = img.crop((x, y, x + side, y + side))
    return np.array(square.resize((size, size), Image.Resampling.BICUBIC))


def padded(img, width, height) -> np.ndarray:
    """The image centred on the smallest black one of these proportions, resized to uint8 (height, width, 3).

    PIL's resize works along the rows first, then along the columns. Here the rows are padded and resized a
    strip at a time: the same bytes as of the whole one, which for a square of 60,000 pixels takes 11 GB.
    """
    w, h = img.size
    full_w, full_h = max(w, round(h * width / height)), max(h, round(w * height / width))
    rows, step = Image.new("RGB", (width, full_h)), max(1, 2 ** 20 // full_w)
    for y in range(0, h, step):
        strip = Image.new("RGB", (full_w, min(step, h - y)))
        strip.paste(img.crop((0, y, w, y + strip.height)), ((full_w - w) // 2, 0))
        strip = strip.resize((width, strip.height), Image.Resampling.BICUBIC)
        rows.paste(strip, (0, (full_h - h) // 2 + y))
    return np.array(rows.resize((width, height), Image.Resampling.BICUBIC))


def look(path):
    """(SHA-256 as 32 bytes, grey thumbnail, uint8 (SIDE, SIDE), None or why open_image cannot read it) of an
    image file; zeros where it is unreadable."""
    thumbnail = np.zeros((SIDE, SIDE), np.uint8)            # a duplicate of none
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return bytes(32), thumbnail, f"{path}: no such image"
    except OSError as error:
        return bytes(32), thumbnail, f"{path}: cannot be read as an image ({error.strerror})"
    why = None
    try:
        with said_in_one_line(path), opened(path, content) as img:
            check_pixels(img)
            deep = is_deep(img)
            img.draft("L", (2 * SIDE, 2 * SIDE))            # a JPEG is decoded at a fraction of its size
            rgb = to_rgb(img, path)
            check_depth(rgb, deep, path)
            thumbnail = np.asarray(rgb.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX))
    except BadInput as error:
        why = str(error)
    return hashlib.sha256(content).digest(), thumbnail, why


# Many files


def batches(n, size):
    """Slices of range(n), `size` long, the last one perhaps shorter."""
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def in_parallel(function, n, workers, what):
    """[function(0), ..., function(n - 1)] on threads. A bar appears after 2 s."""
    done = read_ahead(function, n, workers, ahead=4 * max(1, workers))
    return list(tqdm(done, what, n, unit="image", delay=2, leave=False, disable=None))


def read_ahead(function, n, workers, ahead):
    """function(0), ..., function(n - 1) in order, computed on threads, at most `ahead` before they are due.

    PIL releases the GIL, and threads need no shared memory, of which containers have little.
    """
    pool, waiting = ThreadPoolExecutor(max(1, workers)), deque()
    try:
        for i in range(n):
            waiting.append(pool.submit(function, i))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
