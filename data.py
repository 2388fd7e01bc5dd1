"""A folder of images with prompts in, uint8 tensors and prompts out: one preprocessing for training and metrics alike.

A data folder is images/*.{jpg,jpeg,png} beside a captions file: prompt-gt.csv (Prompt;Filename), metadata.jsonl or
another .csv. Several rows may speak of one image. Pixels are uint8 RGB; by default the whole picture, padded to a
square with black, because nothing that a prompt names may be cut off. Nothing is ever flipped or recoloured.

    python data.py check --data data/phantom
    python data.py kvasir-seg --src Kvasir-SEG --out data/kvasir
"""

import argparse
import csv
import io
import json
import shutil
import struct
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from scipy.ndimage import gaussian_filter, label
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from tqdm import tqdm

import prompts as grammar
from weights import BadInput, file_hash, replacing, run_command, text_hash

SUFFIXES = (".jpg", ".jpeg", ".png")
PROMPT_COLUMNS = ("prompt", "text", "caption")
FILE_COLUMNS = ("filename", "file_name", "image")
# What PIL raises on broken files, besides its own UnidentifiedImageError (an OSError).
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
MAX_UNREADABLE = 0.05


@dataclass
class Record:
    """One image and every prompt that was given for it."""
    path: Path
    name: str               # file name with its ending: what the split and the captions file go by
    prompts: list[str]


# Reading a folder

def read_folder(folder, captions=None) -> list[Record]:
    """The images that the captions speak of, one Record each, in the order in which the captions first name them."""
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
    """(row number, name as written, path or None, prompts) of every row of the captions file, bad ones included."""
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


def read_csv(path):
    """(row number, image name, prompts) of every row. Row 1 names the columns and shows the delimiter."""
    text = read_text(path)
    first = (text.splitlines() or [""])[0]
    delimiter = ";" if ";" in first else ","
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    try:
        header = [c.strip().lower() for c in next(rows, [])]
        file, prompt, paraphrase = (next((header.index(c) for c in names if c in header), None)
                                    for names in (FILE_COLUMNS, PROMPT_COLUMNS, ("paraphrase",)))
        if file is None or prompt is None:
            names = FILE_COLUMNS if file is None else PROMPT_COLUMNS
            raise BadInput(f"{path}, row 1: expected a column {' or '.join(names)}, got {first[:80]!r}")
        for fields in rows:
            fields = [f.strip() for f in fields]
            if not any(fields):
                continue
            if len(fields) != len(header):
                raise BadInput(f"{path}, row {rows.line_num}: expected {len(header)} fields, got {len(fields)}; "
                               f"a prompt that holds a {delimiter!r} must be quoted")
            more = [fields[paraphrase]] if paraphrase is not None and fields[paraphrase] else []
            yield rows.line_num, fields[file], [fields[prompt], *more]
    except csv.Error as error:
        raise BadInput(f"{path}, row {rows.line_num}: not a CSV row ({error})") from None


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
            raise BadInput(f'{path}, row {i}: expected {{"file_name": "...", "text": "..."}}, got {line.strip()[:80]}')
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
        return Image.fromarray((np.asarray(img).astype(np.int64) // 257).clip(0, 255).astype(np.uint8)).convert("RGB")
    if "A" in img.getbands() or "transparency" in img.info:
        img = img.convert("RGBA")
        black = Image.new("RGB", img.size)
        black.paste(img, mask=img.getchannel("A"))
        return black
    return img.convert("RGB")


def preprocess(img, size, crop="pad", rng=None) -> np.ndarray:
    """RGB picture -> uint8 (size, size, 3) by PIL's bicubic resize, whose kernel widens with the scale (antialiasing).

    "pad" keeps the whole picture, centred on a black square: a prompt may name anything in it. "center" and "random"
    cut a square of the short side out of it, the paper's way; "random" asks rng, a numpy Generator, where.
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

    Unreadable images are named on stderr and left out; more than 5 % of them stop the run, on_bad="raise" at the first.
    A random crop is drawn once an image, from seed and its place in records.
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
        raise BadInput(f"{records[0].path.parent}: {len(bad)} of {len(records)} images cannot be read, more than 5 %; "
                       f"the first: {bad[0]}")
    if not bad:
        return out, list(records)
    print(f"skipped {len(bad)} unreadable images of {len(records)}", file=sys.stderr)
    keep = [i for i, e in enumerate(errors) if not e]
    return out[keep], [records[i] for i in keep]


def in_parallel(function, n, workers, what):
    """[function(0), ..., function(n - 1)] on threads: PIL works outside the GIL. A bar appears after two seconds."""
    with ThreadPoolExecutor(max(1, workers)) as pool:
        bar = tqdm(pool.map(function, range(n)), what, n, unit="image", delay=2, leave=False, disable=None)
        return list(bar)


# Training

def split(records, fraction=0.1, seed=2204, groups=None):
    """(train, val) by image, each in the order of records. The hash of seed and file name decides, so every script
    finds the same split of a folder, at any picture size: what is held out from a training is new to a judge too.

    groups: lists of indices into records that share a side; by default the near-duplicates among the images.
    """
    if not 0 <= fraction < 1:
        raise BadInput(f"validation fraction: expected a number in [0, 1), got {fraction}")
    n_val = round(fraction * len(records)) or int(fraction > 0 and len(records) > 1)
    rank = [text_hash(seed, r.name) for r in records]
    for group in near_duplicates(records) if groups is None else groups:
        if len(group) <= len(records) - n_val:              # else a side would be empty
            first = min(rank[i] for i in group)
            for i in group:
                rank[i] = first
    last = sorted(rank)[n_val - 1] if n_val else ""         # the rank that completes the validation part
    train = [r for r, k in zip(records, rank, strict=True) if k > last]
    return train, [r for r, k in zip(records, rank, strict=True) if k <= last]


def near_duplicates(records, workers=2) -> list[list[int]]:
    """Groups of indices of images that show the same frame, or all but the same.

    Two images belong together when their 24x24 grey thumbnails, less a blur of 1.5 thumbnail pixels, correlate by more
    than 0.95. In Kvasir-SEG true pairs have 0.969 and more, any other 0.868 at most; 4,000 phantoms 0.941 at most.
    """
    side = 24

    def thumbnail(i):
        try:
            with Image.open(records[i].path) as img:
                img.draft("L", (2 * side, 2 * side))        # a JPEG is decoded at a fraction of its size
                return np.asarray(to_rgb(img).convert("L").resize((side, side), Image.Resampling.BOX), np.float32)
        except UNREADABLE:
            return np.zeros((side, side), np.float32)       # like nothing else

    if not records:
        return []
    x = np.stack(in_parallel(thumbnail, len(records), workers, "comparing images"))
    x = torch.from_numpy(x - gaussian_filter(x, (0, 1.5, 1.5))).flatten(1)
    x = x - x.mean(1, keepdim=True)
    norm = x.norm(dim=1, keepdim=True)
    x = torch.where(norm > side, x / norm, 0)               # under one grey level of detail: like nothing else
    pairs = torch.cat([(x[i:i + 1024] @ x[i:].T > 0.95).nonzero() + i for i in range(0, len(x), 1024)]).numpy()
    links = coo_array((np.ones(len(pairs)), pairs.T), shape=(len(x), len(x)))
    group_of = connected_components(links, directed=False)[1]
    groups = {}
    for i, g in enumerate(group_of):
        groups.setdefault(g, []).append(i)
    return [g for g in groups.values() if len(g) > 1]


def augment(images, generator, amount=0.4):
    """Brightness, then contrast, each by its own factor in [1 - amount, 1 + amount] per sample: for training only.

    As torchvision's ColorJitter: contrast is about the mean grey of the picture, and values are clamped after each.
    images: uint8 or float in [-1, 1], (b, 3, h, w); the same comes back.
    """
    factors = 1 + amount * (2 * torch.rand(2, len(images), 1, 1, 1, generator=generator, device=generator.device) - 1)
    brightness, contrast = factors.to(images.device)
    is_uint8 = images.dtype == torch.uint8
    x = images.float() / 255 if is_uint8 else (images.float() + 1) / 2
    x = (x * brightness).clamp(0, 1)
    grey = (x * x.new_tensor([0.2989, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    x = (grey + (x - grey) * contrast).clamp(0, 1)
    return (x * 255).round().byte() if is_uint8 else (x * 2 - 1).to(images.dtype)


def drop_context(prompts, p, generator) -> list[str]:
    """Each prompt becomes the empty one with probability p, for classifier-free guidance (arXiv:2207.12598)."""
    drop = torch.rand(len(prompts), generator=generator, device=generator.device) < p
    return ["" if d else prompt for d, prompt in zip(drop.tolist(), prompts, strict=True)]


def fingerprint(records) -> str:
    """Hash of names, file sizes in bytes and prompts: tells a run whether its data folder is still the same."""
    return text_hash(*(json.dumps([r.name, r.path.stat().st_size, r.prompts]) for r in records))


# Writing

def write_image(path, pixels):
    """uint8 (h, w, 3) into a PNG, atomically."""
    with replacing(path) as tmp:
        Image.fromarray(np.asarray(pixels)).save(tmp, "PNG")


def write_grid(path, images, columns=None, gap=2):
    """uint8 (n, 3, h, w) into one PNG, row by row, near square unless told; gap: white pixels between pictures."""
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


# Kvasir-SEG: prompts that are true by the mask

SPECK = 0.0005      # share of the picture under which a component is JPEG noise: noise has 1e-5, polyps 1.6e-3 and more
COVERS = 0.20       # share of a polyp's area that must lie in a cell


def polyps_in(mask) -> list[list[str]]:
    """The cells of every polyp in a boolean mask: those of the picture's 3x3 grid that hold at least COVERS of its area
    and always the fullest. A polyp is an 8-connected component no smaller than SPECK."""
    h, w = mask.shape
    components, n = label(mask, np.ones((3, 3)))
    polyps = []
    for i in range(1, n + 1):
        y, x = np.nonzero(components == i)
        if len(y) >= SPECK * mask.size:
            share = np.bincount(3 * y // h * 3 + 3 * x // w, minlength=9) / len(y)
            polyps.append([c for c, s in zip(grammar.CELLS, share, strict=True) if s >= COVERS or s == share.max()])
    return polyps


def has_box(img) -> bool:
    """Does an RGB picture carry the artefact, a green or black box in its lower left?

    Green: at least 5 % of the lower left quarter is a green that no tissue has. Black: going right along the lower
    edge, the height of the black above it stays level over four columns and then falls at once by 7.5 % of the
    picture, where the frame's own corner falls slowly. Against 850 pictures of
    Kvasir-SEG looked at one by one, the same that the numbers were chosen on: 499 of 499 boxes found, 5 found where
    none is; 16 notches of the frame too small to call either way are left out.
    """
    n = 128
    rgb = np.asarray(img.resize((n, n), Image.Resampling.BOX)).astype(int)
    r, g, _ = np.moveaxis(rgb[n // 2:, :n // 2], -1, 0)
    if ((g > 1.25 * r) & (g > 60)).mean() >= 0.05:
        return True
    black = rgb.max(-1) < 24
    height = np.cumprod(black[::-1], axis=0).sum(0) / n
    before = np.stack([height[k:n - 5 + k] for k in range(4)])           # columns x - 3 ... x
    fall = height[3:n - 2] - height[5:]                                  # from column x to x + 2
    level = (np.ptp(before, axis=0) <= 0.02) & (before.max(0) < 0.75)    # a black edge of the whole height is no box
    return bool((level & (fall >= 0.075))[:int(0.6 * n)].any())


def kvasir_prompts(path, mask_path) -> list[str]:
    """What is true of one picture, a prompt each."""
    img, mask = open_image(path), open_image(mask_path)
    if img.size != mask.size:
        raise BadInput(f"{mask_path}: expected the size of its picture, {img.size}, got {mask.size}")
    polyps = polyps_in(np.asarray(mask.convert("L")) > 127)
    n = len(polyps)
    facts = [{"n_polyps": n}, {"n_findings": n}, {"procedure": "colonoscopy"}, {"box": has_box(img)}]
    if polyps:
        cells = [c for c in grammar.CELLS if any(c in polyp for polyp in polyps)]
        facts = [{"contains": ["polyp"]}, *facts, {"abnormality_cells": cells}]
    return [grammar.write(fact) for fact in facts]


def kvasir_seg(src, out, workers):
    """The public Kvasir-SEG folder into a data folder: images byte for byte, prompts from the masks."""
    images, out = list_images(src), Path(out)
    if not (Path(src) / "masks").is_dir():
        raise BadInput(f"{src}: holds no folder masks/")
    if out.resolve() == Path(src).resolve():
        raise BadInput(f"{out}: --out must be another folder than --src")
    masks = {p.stem: p for p in files_in(Path(src) / "masks")}
    missing = [p.name for p in images if p.stem not in masks]
    if missing or not images:
        raise BadInput(f"{src}/masks: no mask for {len(missing)} of {len(images)} images {' '.join(missing[:3])}")
    there = files_in(out / "images") if (out / "images").is_dir() else []
    if strangers := {p.name for p in there} - {p.name for p in images}:
        raise BadInput(f"{out}: holds {len(strangers)} images that are not from {src}; give an empty folder")
    rows = in_parallel(lambda i: kvasir_prompts(images[i], masks[images[i].stem]), len(images), workers, "masks")
    for path in tqdm(images, "copying", unit="image", delay=2, leave=False, disable=None):
        with replacing(out / "images" / path.name) as tmp:
            shutil.copyfile(path, tmp)
    write_captions(out, [(prompt, p.name) for p, prompts in zip(images, rows, strict=True) for prompt in prompts])
    print(f"{out}: {len(images)} images, {sum(map(len, rows))} prompts")


# Check

def check(folder, captions, workers):
    """Print what a data folder holds; 1 if a training could not use it."""
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

    def look(i):
        try:
            return open_image(records[i].path).size, file_hash(records[i].path)
        except BadInput as error:
            return str(error), None

    looks = in_parallel(look, len(records), workers, "reading images")
    unreadable = [what for what, h in looks if h is None]
    sizes = Counter(f"{what[0]}x{what[1]}" for what, h in looks if h)
    same = {}
    for record, (_, h) in zip(records, looks, strict=True):
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
    parser = argparse.ArgumentParser(description="Check a data folder, or make one of Kvasir-SEG.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, what):
        p = commands.add_parser(name, help=what, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        p.add_argument("--workers", type=int, default=2, help="threads that read images")
        return p

    p = command("check", "say what a data folder holds; exit status 1 if it is unusable")
    p.add_argument("--data", required=True, metavar="DIR", help="data folder")
    p.add_argument("--captions", metavar="FILE", help="captions file to use instead of the folder's own")
    p = command("kvasir-seg", "turn the public Kvasir-SEG folder into a data folder")
    p.add_argument("--src", required=True, metavar="DIR", help="folder with images/ and masks/")
    p.add_argument("--out", required=True, metavar="DIR", help="data folder to write")
    args = parser.parse_args(argv)
    if args.command == "check":
        return check(args.data, args.captions, args.workers)
    return kvasir_seg(args.src, args.out, args.workers)


if __name__ == "__main__":
    run_command(main)
