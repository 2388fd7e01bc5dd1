"""A folder of images with prompts in, uint8 tensors and prompts out, the same for training and metrics.

A data folder is images/*.{jpg,jpeg,png} beside a captions file: prompt-gt.csv (Prompt;Filename),
metadata.jsonl or another .csv. Several rows may belong to one image. Pixels are uint8 RGB; by default the
whole image, padded to a square with black, because nothing that a prompt names may be cut off. Images are
never flipped, and their hue is never jittered.

    python data.py check --data data/phantom
"""

import argparse
import csv
import io
import json
import struct
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from scipy.ndimage import gaussian_filter
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from tqdm import tqdm

import prompts as grammar
from command import BadInput, run_command
from files import file_hash, replacing, text_hash

SUFFIXES = (".jpg", ".jpeg", ".png")
PROMPT_COLUMNS = ("prompt", "text", "caption")
FILE_COLUMNS = ("filename", "file_name", "image")
# What PIL raises on broken files, besides its own UnidentifiedImageError (an OSError).
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
MAX_UNREADABLE = 0.05


@dataclass
class Record:
    """One image and all its prompts."""
    path: Path
    name: str               # file name with its ending: the key of the split and of the captions file
    prompts: list[str]


# Reading a folder


def read_folder(folder, captions=None) -> list[Record]:
    """The images that the captions name, one Record each, in the order of their first rows."""
    source, records = captions_file(folder, captions), {}
    for row, name, path, prompts in read_rows(folder, source):
        if not all(prompts):
            raise BadInput(f"{source}, row {row}: the prompt is empty")
        if path is None:
            raise BadInput(f"{source}, row {row}: no image {name!r} in {image_folder(folder)}")
        records.setdefault(path.name, Record(path, path.name, [])).prompts.extend(prompts)
    if not records:
        raise BadInput(f"{source}: no rows, expected a prompt and a file name in each")
    return list(records.values())


def read_rows(folder, source):
    """(row number, name as written, path or None, prompts) of every row of the captions file, bad or not."""
    find = image_finder(folder)
    for row, name, prompts in (read_jsonl if source.suffix == ".jsonl" else read_csv)(source):
        yield row, name, find(name), prompts


def image_folder(folder):
    folder = Path(folder)
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder, expected one that holds images/ and prompt-gt.csv")
    if not (folder / "images").is_dir():
        raise BadInput(f"{folder}: holds no folder images/")
    return folder / "images"


def list_images(folder) -> list[Path]:
    return files_in(image_folder(folder))


def files_in(folder):
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))


def image_finder(folder):
    """find(name) -> path of an image named with or without its ending, or None."""
    by_name, by_stem = {}, {}
    for path in list_images(folder):
        by_name[path.name] = path
        by_stem.setdefault(path.stem, []).append(path)

    def find(name):
        name = name.removeprefix("images/")
        paths = [by_name[name]] if name in by_name else by_stem.get(name, [])
        if len(paths) > 1:
            raise BadInput(f"{paths[0].parent}: {name!r} may be any of {', '.join(p.name for p in paths)}")
        return paths[0] if paths else None

    return find


def captions_file(folder, captions=None):
    """The file given, else prompt-gt.csv, else metadata.jsonl, else the only .csv."""
    folder = image_folder(folder).parent
    if captions:
        if not Path(captions).is_file():
            raise BadInput(f"{captions}: no such captions file")
        return Path(captions)
    for name in ("prompt-gt.csv", "metadata.jsonl"):
        if (folder / name).is_file():
            return folder / name
    found = sorted(p for p in folder.glob("*.csv") if not p.name.startswith("."))
    if len(found) != 1:
        raise BadInput(f"{folder}: expected prompt-gt.csv, metadata.jsonl or one .csv, found "
                       + (", ".join(p.name for p in found) or "none; name the file with --captions"))
    return found[0]


def read_text(path):
    try:
        return path.read_text(encoding="utf-8-sig")         # utf-8-sig drops a byte order mark
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def csv_rows(path, *columns):
    """(row number, [field of each column]) of every nonempty row. Row 1 is the header.

    columns: (spellings, required) of each; a field of an absent column is None.
    """
    text = read_text(path)
    first = (text.splitlines() or [""])[0]
    delimiter = ";" if ";" in first else ","
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    try:
        header = [c.strip().lower() for c in next(rows, [])]
        places = [next((header.index(c) for c in names if c in header), None) for names, _ in columns]
        for place, (names, needed) in zip(places, columns, strict=True):
            if needed and place is None:
                raise BadInput(f"{path}, row 1: expected a column {' or '.join(names)}, got {first[:80]!r}")
        for fields in rows:
            fields = [f.strip() for f in fields]
            if not any(fields):
                continue
            if len(fields) != len(header):
                raise BadInput(f"{path}, row {rows.line_num}: "
                               f"expected {len(header)} field{'s' * (len(header) > 1)}, "
                               f"got {len(fields)}; a prompt that holds a {delimiter!r} must be quoted")
            yield rows.line_num, [None if place is None else fields[place] for place in places]
    except csv.Error as error:
        raise BadInput(f"{path}, row {rows.line_num}: not a CSV row ({error})") from None


def read_csv(path):
    """(row number, image name, prompts) of every row."""
    columns = (FILE_COLUMNS, True), (PROMPT_COLUMNS, True), (("paraphrase",), False)
    for row, (name, prompt, paraphrase) in csv_rows(path, *columns):
        yield row, name, [prompt, *([paraphrase] if paraphrase else [])]


def read_prompts(path):
    """The prompts of a .txt file, one a line, or of a .csv with a Prompt column, in order."""
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"{path}: no such file, expected prompts, one a line, or a csv with a Prompt column")
    if path.suffix.lower() == ".txt":
        prompts = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    elif path.suffix.lower() == ".csv":
        prompts = []
        for row, (prompt,) in csv_rows(path, (PROMPT_COLUMNS, True)):
            if not prompt:
                raise BadInput(f"{path}, row {row}: the prompt is empty")
            prompts.append(prompt)
    else:
        raise BadInput(f"{path}: expected a .txt of prompts, one a line, or a .csv with a Prompt column")
    if not prompts:
        raise BadInput(f"{path}: no prompts in it")
    return prompts


def read_jsonl(path):
    """(line number, image name, prompts) of every line {"file_name": ..., "text": ...}."""
    for i, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise BadInput(f"{path}, row {i}: not JSON ({error})") from None
        row = {k.lower(): v for k, v in row.items()} if isinstance(row, dict) else {}
        name = next((row[c] for c in FILE_COLUMNS if c in row), None)
        prompts = [next((row[c] for c in PROMPT_COLUMNS if c in row), None)]
        prompts += [row["paraphrase"]] if row.get("paraphrase") else []
        if not all(isinstance(x, str) for x in (name, *prompts)):
            raise BadInput(f'{path}, row {i}: expected {{"file_name": "...", "text": "..."}}, '
                           f"got {line.strip()[:80]}")
        yield i, name, [prompt.strip() for prompt in prompts]


# Pixels


def open_image(path) -> Image.Image:
    """An image as 8-bit RGB, upright: EXIF rotation applied, transparency over black, 16 bits scaled down."""
    try:
        with Image.open(path) as img:
            img.load()
            return to_rgb(ImageOps.exif_transpose(img))
    except FileNotFoundError:
        raise BadInput(f"{path}: no such image") from None
    except UnidentifiedImageError:
        why = "is no JPEG or PNG" if Path(path).stat().st_size else "is empty"
        raise BadInput(f"{path}: the file {why}") from None
    except UNREADABLE as error:
        raise BadInput(f"{path}: cannot be read as an image ({error})") from None


def to_rgb(img):
    if img.mode.startswith("I"):                            # 16-bit grey PNG; PIL itself would clip it at 255
        grey = np.asarray(img).astype(np.int64) // 257
        return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
    if "A" in img.getbands() or "transparency" in img.info:
        img = img.convert("RGBA")
        black = Image.new("RGB", img.size)
        black.paste(img, mask=img.getchannel("A"))
        return black
    return img.convert("RGB")


def preprocess(img, size, crop="pad", rng=None) -> np.ndarray:
    """RGB image -> uint8 (size, size, 3) by PIL's bicubic resize, which is antialiased.

    "pad" keeps the whole image, centred on a black square: a prompt may name anything in it. "center" and
    "random" cut out a square of the short side, as the paper does, "random" at a place drawn from rng, a
    numpy Generator.
    """
    w, h = img.size
    if crop == "pad":
        side = max(w, h)
        square = Image.new("RGB", (side, side))
        square.paste(img, ((side - w) // 2, (side - h) // 2))
    else:
        side = min(w, h)
        x, y = (w - side) // 2, (h - side) // 2
        if crop == "random":
            x, y = int(rng.integers(w - side + 1)), int(rng.integers(h - side + 1))
        elif crop != "center":
            raise ValueError(f'expected crop "pad", "center" or "random", got {crop!r}')
        square = img.crop((x, y, x + side, y + side))
    return np.array(square.resize((size, size), Image.Resampling.BICUBIC))


def load_images(records, size, crop="pad", workers=2, on_bad="skip", seed=0):
    """(uint8 tensor (n, 3, size, size), the records that could be read), in order.

    Unreadable images are named on stderr and left out; more than 5 % of them are an error, with
    on_bad="raise" one is. A random crop is drawn once for each image, from seed and its index in records.
    """
    out = torch.empty(len(records), 3, size, size, dtype=torch.uint8)

    def load(i):
        try:
            img = open_image(records[i].path)
        except BadInput as error:
            if on_bad == "raise":
                raise
            return str(error)
        pixels = preprocess(img, size, crop, np.random.default_rng((seed, i)) if crop == "random" else None)
        out[i] = torch.from_numpy(pixels).permute(2, 0, 1)
        return None

    errors = in_parallel(load, len(records), workers, "reading images")
    bad = [e for e in errors if e]
    for error in bad:
        tqdm.write(f"skipped {error}", file=sys.stderr)
    if len(bad) > MAX_UNREADABLE * len(records):
        raise BadInput(f"{records[0].path.parent}: {len(bad)} of {len(records)} images cannot be read, "
                       f"more than 5 %; the first: {bad[0]}")
    if not bad:
        return out, list(records)
    print(f"skipped {len(bad)} unreadable images of {len(records)}", file=sys.stderr)
    keep = [i for i, e in enumerate(errors) if not e]
    return out[keep], [records[i] for i in keep]


def to_float(images):
    """uint8 images as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(img):
    """Float images, clamped to [-1, 1], as uint8 on the CPU."""
    return ((img.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def batches(n, size):
    """Slices of range(n), `size` long, the last one perhaps shorter."""
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def in_parallel(function, n, workers, what):
    """[function(0), ..., function(n - 1)] on threads: PIL releases the GIL. A bar appears after 2 s."""
    with ThreadPoolExecutor(max(1, workers)) as pool:
        bar = tqdm(pool.map(function, range(n)), what, n, unit="image", delay=2, leave=False, disable=None)
        return list(bar)


# Training


def split(records, fraction=0.1, seed=2204, groups=None):
    """(train, val) by image, each in the order of records. The hash of seed and file name decides, so every
    script has the same split of a folder, at any image size: what is held out in training is new to the
    metrics too.

    groups: lists of indices into records that stay together; by default the near-duplicates among the images.
    """
    if not 0 <= fraction < 1:
        raise BadInput(f"validation fraction: expected a number in [0, 1), got {fraction}")
    n_val = round(fraction * len(records)) or int(fraction > 0 and len(records) > 1)
    rank = [text_hash(seed, r.name) for r in records]
    for group in near_duplicates(records) if groups is None else groups:
        if len(group) <= len(records) - n_val:              # else the training part would be empty
            first = min(rank[i] for i in group)
            for i in group:
                rank[i] = first
    last = sorted(rank)[n_val - 1] if n_val else ""         # the rank that completes the validation part
    train = [r for r, k in zip(records, rank, strict=True) if k > last]
    return train, [r for r, k in zip(records, rank, strict=True) if k <= last]


def near_duplicates(records, workers=2) -> list[list[int]]:
    """Groups of indices of images that show the same or nearly the same frame.

    Rule and threshold are ours: two images belong together when their 24x24 grey thumbnails, high-passed by
    subtracting a blur of 1.5 thumbnail pixels, have a correlation above 0.95. In Kvasir-SEG true pairs have
    at least 0.969, all others at most 0.868; 4,000 phantoms at most 0.941.
    """
    side = 24

    def thumbnail(i):
        try:
            with Image.open(records[i].path) as img:
                img.draft("L", (2 * side, 2 * side))        # a JPEG is decoded at a fraction of its size
                grey = to_rgb(img).convert("L")
                return np.asarray(grey.resize((side, side), Image.Resampling.BOX), np.float32)
        except UNREADABLE:
            return np.zeros((side, side), np.float32)       # a duplicate of none

    if not records:
        return []
    x = np.stack(in_parallel(thumbnail, len(records), workers, "comparing images"))
    x = torch.from_numpy(x - gaussian_filter(x, (0, 1.5, 1.5))).flatten(1)
    x = x - x.mean(1, keepdim=True)
    norm = x.norm(dim=1, keepdim=True)
    x = torch.where(norm > side, x / norm, 0)           # under one grey level of detail: a duplicate of none
    strips = range(0, len(x), 1024)
    pairs = torch.cat([(x[i:i + 1024] @ x[i:].T > 0.95).nonzero() + i for i in strips]).numpy()
    links = coo_array((np.ones(len(pairs)), pairs.T), shape=(len(x), len(x)))
    group_of = connected_components(links, directed=False)[1]
    groups = {}
    for i, g in enumerate(group_of):
        groups.setdefault(g, []).append(i)
    return [g for g in groups.values() if len(g) > 1]


def augment(images, generator, amount=0.4):
    """Brightness, then contrast, by factors in [1 - amount, 1 + amount] drawn for each image; training only.

    As torchvision's ColorJitter: contrast is about the mean grey of the image, and values are clamped after
    each. images: uint8 or float in [-1, 1], (b, 3, h, w); returned in the same type.
    """
    uniform = torch.rand(2, len(images), 1, 1, 1, generator=generator, device=generator.device)
    factors = 1 + amount * (2 * uniform - 1)
    brightness, contrast = factors.to(images.device)
    is_uint8 = images.dtype == torch.uint8
    x = images.float() / 255 if is_uint8 else (images.float() + 1) / 2
    x = (x * brightness).clamp(0, 1)
    grey = (x * x.new_tensor([0.2989, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    grey = grey.mean((2, 3), keepdim=True)
    x = (grey + (x - grey) * contrast).clamp(0, 1)
    return (x * 255).round().byte() if is_uint8 else (x * 2 - 1).to(images.dtype)


def drop_context(prompts, p, generator) -> list[str]:
    """Each prompt becomes the empty one with probability p: classifier-free guidance (arXiv:2207.12598)."""
    drop = torch.rand(len(prompts), generator=generator, device=generator.device) < p
    return ["" if d else prompt for d, prompt in zip(drop.tolist(), prompts, strict=True)]


def fingerprint(records) -> str:
    """Hash of names, file sizes in bytes and prompts: a resumed run compares it with its data folder's."""
    return text_hash(*(json.dumps([r.name, r.path.stat().st_size, r.prompts]) for r in records))


# Writing


def write_image(path, pixels):
    """uint8 (h, w, 3) into a PNG, atomically."""
    with replacing(path) as tmp:
        Image.fromarray(np.asarray(pixels)).save(tmp, "PNG")


def write_grid(path, images, columns=None, gap=2):
    """uint8 (n, 3, h, w) into one PNG, row by row; columns None: about square; gap: white pixels between."""
    images = np.asarray(images).transpose(0, 2, 3, 1)
    n, h, w, _ = images.shape
    columns = columns or int(np.ceil(n ** 0.5))
    sheet = np.full((-(-n // columns) * (h + gap) - gap, columns * (w + gap) - gap, 3), 255, np.uint8)
    for i, img in enumerate(images):
        y, x = i // columns * (h + gap), i % columns * (w + gap)
        sheet[y:y + h, x:x + w] = img
    write_image(path, sheet)


def write_captions(folder, rows):
    """(prompt, file name) rows into folder/prompt-gt.csv, atomically."""
    with replacing(Path(folder) / "prompt-gt.csv") as tmp, open(tmp, "w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f, delimiter=";", lineterminator="\n")
        writer.writerow(("Prompt", "Filename"))
        writer.writerows(rows)


# Check


def check(folder, captions, workers):
    """Print what a data folder holds; returns the exit status, 1 if it is unusable for training."""
    source = captions_file(folder, captions)
    records, missing, empty = {}, [], []
    for row, name, path, prompts in read_rows(folder, source):
        if path is None:
            missing.append(f"row {row}: {name}")
        elif not all(prompts):
            empty.append(f"row {row}: {name}")
        else:
            records.setdefault(path.name, Record(path, path.name, [])).prompts.extend(prompts)
    records = list(records.values())

    def inspect(i):
        try:
            return open_image(records[i].path).size, file_hash(records[i].path)
        except BadInput as error:
            return str(error), None

    found = in_parallel(inspect, len(records), workers, "reading images")      # (size, hash) or (error, None)
    unreadable = [error for error, h in found if h is None]
    sizes = Counter(f"{size[0]}x{size[1]}" for size, h in found if h)
    same = {}
    for record, (_, h) in zip(records, found, strict=True):
        if h:
            same.setdefault(h, []).append(record.name)
    same = [" = ".join(names) for names in same.values() if len(names) > 1]
    near = [" ~ ".join(records[i].name for i in g) for g in near_duplicates(records, workers)]
    texts = Counter(prompt for r in records for prompt in r.prompts)
    unknown = [f"{n} x {text}" for text, n in texts.most_common() if not grammar.parse(text)]
    unnamed = [p.name for p in list_images(folder) if p.name not in {r.name for r in records}]
    counts = [len(r.prompts) for r in records] or [0]

    print(f"{source}\n{len(records)} images, {sum(counts)} prompts, {len(texts)} distinct, "
          f"{min(counts)} to {max(counts)} an image, {np.mean(counts):.1f} on average")
    print(f"{len(sizes)} sizes, most often " + ", ".join(f"{size} ({n})" for size, n in sizes.most_common(5)))
    for what, names in (("rows without their image", missing), ("rows with an empty prompt", empty),
                        ("unreadable images", unreadable), ("images without a prompt", unnamed),
                        ("exact duplicates", same), ("groups of near-duplicates, kept in one split", near),
                        ("distinct prompts outside the grammar", unknown)):
        more = [f"and {len(names) - 20} more"] * (len(names) > 20)
        print("\n    ".join([f"{len(names)} {what}", *names[:20], *more]))
    faults = [what for what, bad in (("images are missing", missing), ("prompts are empty", empty),
                                     ("no image has a prompt", not records),
                                     (f"more than {MAX_UNREADABLE:.0%} of the images are unreadable",
                                      len(unreadable) > MAX_UNREADABLE * len(records))) if bad]
    print("unusable: " + ", ".join(faults) if faults else "usable")
    return int(bool(faults))


def main(argv=None):
    parser = argparse.ArgumentParser(description="Check a data folder.")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("check", help="print what a data folder holds; exit status 1 if it is unusable",
                            formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--data", required=True, metavar="DIR", help="data folder")
    p.add_argument("--captions", metavar="FILE", help="captions file to use instead of the folder's own")
    p.add_argument("--workers", type=int, default=2, help="threads that read images")
    args = parser.parse_args(argv)
    return check(args.data, args.captions, args.workers)


if __name__ == "__main__":
    run_command(main)
