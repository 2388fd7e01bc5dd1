"""A folder of images with prompts in, uint8 tensors and prompts out, the same for training and metrics.

A data folder is images/*.{jpg,jpeg,png} beside a captions file: prompt-gt.csv (Prompt;Filename),
metadata.jsonl or another .csv. Several rows may belong to one image. Pixels are uint8 RGB; by default the
whole image, padded to a square with black, because nothing that a prompt names may be cut off. Images are
flipped only where their prompts are too (mirrored.py), and their hue is never jittered.

    python data.py check --data data/phantom
"""

from command import BadInput, run_command

import argparse
import csv
import json
import os
import sys
import unicodedata
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

import prompts as grammar
from duplicates import near_duplicates, seen
from files import json_line, read_text, refuse_other_rows, replacing, text_hash, write_csv
from pixels import batches as batches
from pixels import in_parallel, note, open_image, preprocess
from pixels import read_ahead as read_ahead

SUFFIXES = (".jpg", ".jpeg", ".png")
PROMPT_COLUMNS = ("prompt", "text", "caption")
FILE_COLUMNS = ("filename", "file_name", "image")
MAX_UNREADABLE = 0.05
IN_MEMORY = 2 << 30     # bytes of decoded images that a training keeps
MIRRORED = {"horizontal": Image.Transpose.FLIP_LEFT_RIGHT, "vertical": Image.Transpose.FLIP_TOP_BOTTOM,
            "both": Image.Transpose.ROTATE_180}
CLIP_WORDS = 62         # CLIP is given 64 tokens, two of them mark start and end; a word is one token or more

@dataclass
class Record:
    """One image and all its prompts; their paraphrases are read by wording.py."""
    path: Path
    name: str               # file name with its ending: the key of the split and of the captions file
    prompts: list[str]
    mirror: str = ""        # the key of MIRRORED by which the image is mirrored, as its prompts are already


# Reading a folder


def read_folder(folder, captions=None) -> list[Record]:
    """The images that the captions name, one Record each, in the order of their first rows."""
    source, records = captions_file(folder, captions), {}
    for row, name, path, prompts in read_rows(folder, source):
        if why := prompt_fault(prompts):
            raise BadInput(f"{source}, row {row}: {why}")
        if path is None:
            raise BadInput(f"{source}, row {row}: no image {name!r} in {image_folder(folder)}"
                           + hint(name, other_files(folder)))
        records.setdefault(path.name, Record(path, path.name, [])).prompts.append(prompts[0])
    if not records:
        raise BadInput(f"{source}: no rows, expected a prompt and a file name in each")
    return list(records.values())


def read_rows(folder, source):
    """(row number, name as written, path or None, [prompt, its paraphrase if there is one]) of every row of
    the captions file, bad or not."""
    find = image_finder(folder)
    for row, name, prompts in (read_jsonl if source.suffix == ".jsonl" else read_csv)(source):
        yield row, name, find(name), prompts


LONGEST = 100_000  # characters of a prompt: text encoders read a few hundred


def prompt_fault(prompts):
    """Why a row's prompts cannot be used, or None."""
    if not all(prompts):
        return "the prompt is empty"
    if (n := max(map(len, prompts), default=0)) > LONGEST:
        return f"the prompt has {n} characters, expected at most {LONGEST}"
    # JSON can escape what no UTF-8 text holds: one half of a pair of surrogates. No tokenizer takes it.
    half = next((c for prompt in prompts for c in prompt if "\ud800" <= c <= "\udfff"), None)
    return half and f"the prompt holds \\u{ord(half):04x}, half a character, expected text in UTF-8"


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
    """The images of a folder, sorted. No folders and pipes: a pipe would be waited for. A link to nowhere is
    one of them, an unreadable one."""
    named = (p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    return sorted((p for p in named if p.is_file() or not p.exists()), key=lambda p: p.name)


def other_files(folder) -> set[str]:
    """Names, as plain_name writes them, of the files in images/ whose endings are not read."""
    found = (p for p in image_folder(folder).iterdir() if not p.name.startswith("."))
    return {plain_name(p.name) for p in found if p.suffix.lower() not in SUFFIXES and p.is_file()}


def hint(name, others):
    """What to add to the name of an image that is not found."""
    there = plain_name(name) in others
    return f": the file is there, but only {', '.join(SUFFIXES)} are read" if there else ""


def plain_name(name):
    """One spelling of a file name: Windows writes images\\a.png, macOS an accent behind its letter."""
    return unicodedata.normalize("NFC", name).replace("\\", "/").removeprefix("./").removeprefix("images/")


def image_finder(folder):
    """find(name) -> path of an image named with or without its ending, or None.

    A name is looked up among the files of images/ and never becomes a path: it cannot leave that folder.
    """
    by_name, by_spelling, by_stem = {}, {}, {}
    for path in list_images(folder):
        by_name[path.name] = [path]
        by_spelling.setdefault(plain_name(path.name), []).append(path)
        by_stem.setdefault(plain_name(path.stem), []).append(path)

    def find(name):
        paths = by_name.get(name) or by_spelling.get(plain := plain_name(name)) or by_stem.get(plain, [])
        if len(paths) > 1:
            raise BadInput(f"{paths[0].parent}: {name!r} may be any of {', '.join(p.name for p in paths)}")
        return paths[0] if paths else None

    return find


def captions_file(folder, captions=None):
    """The file given, else prompt-gt.csv, else metadata.jsonl, else the only .csv."""
    folder = image_folder(folder).parent
    if captions:
        if not Path(captions).is_file():
            why = "not a file, expected a" if Path(captions).exists() else "no such"
            raise BadInput(f"{captions}: {why} captions file")
        return Path(captions)
    for name in ("prompt-gt.csv", "metadata.jsonl"):
        if (folder / name).is_file():
            return folder / name
    found = sorted(p for p in folder.glob("*.csv") if not p.name.startswith("."))
    if len(found) != 1:
        raise BadInput(f"{folder}: expected prompt-gt.csv, metadata.jsonl or one .csv, found "
                       + (", ".join(p.name for p in found) or "none; name the file with --captions"))
    return found[0]


def csv_rows(path, *columns):
    """(row number, [field of each column]) of every nonempty row. Row 1 is the header.

    columns: (spellings, required) of each; a field of an absent column is None. A row is one line: a quoted
    field that goes on in the next line looks the same as a forgotten quote, which would swallow rows.
    """
    first, *lines = read_text(path).split("\n")
    delimiter = ";" if ";" in first else ","
    header = [c.lower() for c in csv_fields(path, 1, first, delimiter)]
    found = [which_column(path, 1, header, names) for names, _ in columns]
    places = [None if name is None else header.index(name) for name in found]
    for place, (names, needed) in zip(places, columns, strict=True):
        if needed and place is None:
            raise BadInput(f"{path}, row 1: expected a column {' or '.join(names)}, got {first[:80]!r}")
    for row, line in enumerate(lines, 2):
        fields = csv_fields(path, row, line, delimiter)
        if not any(fields):
            continue
        if len(fields) != len(header):
            why = f"got {len(fields)}; a prompt that holds a {delimiter!r} must be quoted"
            if len(fields) > len(header) and not any(fields[len(header):]):
                why = f"got {len(fields)}, the last ones empty: a {delimiter!r} too many"
            raise BadInput(f"{path}, row {row}: expected {len(header)} field{'s' * (len(header) > 1)}, {why}")
        yield row, [None if place is None else fields[place] for place in places]


def which_column(path, row, found, names):
    """The one of a column's names that is read, of all those found in a row in lower case, or None.

    BadInput where one stands there twice; a note where several do.
    """
    there = [name for name in names if name in found]
    if twice := [name for name in there if found.count(name) > 1]:
        raise BadInput(f"{path}, row {row}: {twice[0]!r} stands there twice, expected one such column")
    if len(there) > 1:
        note(path, there[0], f"{path}, row {row}: {' and '.join(there)} mean the same, {there[0]!r} is read")
    return there[0] if there else None


def csv_fields(path, row, line, delimiter):
    """The fields of one line of a csv file, without the space around them.

    Quotes that are not csv's, as around the first word of a prompt, are kept as they are.
    """
    if len(line) > LONGEST:
        raise BadInput(f"{path}, row {row}: a line of {len(line)} characters, expected a prompt and a name")
    if '"' not in line:
        return [field.strip() for field in line.split(delimiter)]
    try:
        parsed = csv.reader([line], delimiter=delimiter, skipinitialspace=True, strict=True)
        return [field.strip() for field in next(parsed, [])]
    except csv.Error:
        if line.count('"') % 2 == 0:
            return [field.strip() for field in line.split(delimiter)]
        raise BadInput(f"{path}, row {row}: a quote is not closed in its line; expected one line a prompt, "
                       f'where "" stands for a quote inside quotes, got {line[:80]!r}') from None


def read_csv(path):
    """(row number, image name, [prompt, its paraphrase if there is one]) of every row."""
    columns = (FILE_COLUMNS, True), (PROMPT_COLUMNS, True), (("paraphrase",), False)
    for row, (name, prompt, paraphrase) in csv_rows(path, *columns):
        yield row, name, [prompt, *([paraphrase] if paraphrase else [])]


def read_prompts(path):
    """The prompts of a .txt file, one a line, or of a .csv with a Prompt column, in order."""
    path = Path(path)
    if not path.is_file():
        why = "not a file" if path.exists() else "no such file"
        raise BadInput(f"{path}: {why}, expected prompts, one a line, or a csv with a Prompt column")
    if path.suffix.lower() == ".txt":                       # splitlines would end a line at U+2028 too
        prompts = [line.strip() for line in read_text(path).split("\n") if line.strip()]
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
    """The same of every line {"file_name": ..., "text": ...}."""
    for i, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        row = json_line(path, i, line)
        keys = [k.lower() for k in row] if isinstance(row, dict) else []
        row = dict(zip(keys, row.values(), strict=True)) if keys else {}
        columns = FILE_COLUMNS, PROMPT_COLUMNS, ("paraphrase",)
        name, *prompts = (row.get(which_column(path, i, keys, names)) for names in columns)
        prompts = prompts if prompts[1] else prompts[:1]    # an empty paraphrase is none
        if not all(isinstance(x, str) for x in (name, *prompts)):
            raise BadInput(f'{path}, row {i}: expected {{"file_name": "...", "text": "..."}}, '
                           f"got {line.strip()[:80]}")
        yield i, name, [prompt.strip() for prompt in prompts]


# Images


def load_images(records, size, crop="pad", workers=2, on_bad="skip", seed=0, total=None):
    """(uint8 tensor (n, 3, size, size), the records that could be read), in order; all in memory.

    Unreadable images are named on stderr and left out; more than 5 % of them are an error, with
    on_bad="raise" one is. total: the number of images that the 5 % are of, where records are a part of them,
    as the few held out are. A random crop is drawn once for each image, from seed and its index in records.
    """
    out = torch.empty(len(records), 3, size, size, dtype=torch.uint8)

    def load(i):
        try:
            out[i] = read_image(records[i], size, crop, (seed, i))
        except BadInput as error:
            if on_bad == "raise":
                raise
            return str(error)
        return None

    keep = leave_out(records, in_parallel(load, len(records), workers, "reading images"), total)
    return (out, list(records)) if len(keep) == len(records) else (out[keep], [records[i] for i in keep])


def open_record(record) -> Image.Image:
    """The image of a record, upright, then mirrored as the record says."""
    img = open_image(record.path)
    return img.transpose(MIRRORED[record.mirror]) if record.mirror else img


def read_image(record, size, crop="pad", seed=()):
    """uint8 tensor (3, size, size) of a record's image; a random crop is drawn from the seed."""
    rng = np.random.default_rng(seed) if crop == "random" else None
    return torch.from_numpy(preprocess(open_record(record), size, crop, rng)).permute(2, 0, 1)


def leave_out(records, errors, total=None):
    """The indices of the records without an error, None or text, after naming the others; see load_images."""
    bad = [e for e in errors if e]
    for error in bad:
        tqdm.write(f"skipped {error}", file=sys.stderr)
    total = total or len(records)
    if len(bad) > MAX_UNREADABLE * total or bad and len(bad) == len(records):
        raise BadInput(f"{records[0].path.parent}: {len(bad)} of {len(records)} images cannot be read, more "
                       f"than 5 %{f' of {total}' * (total != len(records))}; "
                       f"the first: {bad[0]}")
    if bad:
        print(f"skipped {len(bad)} unreadable images of {len(records)}", file=sys.stderr)
    return [i for i, e in enumerate(errors) if not e]


class Images:
    """images[indices] -> uint8 (b, 3, size, size), decoded by threads when they are asked for.

    The images are those of load_images, but only as many of them stay in memory as there is room for; the
    others are read again each time. Which cannot be read is known without reading them (duplicates.seen), and
    `records` are those that can. An image that has become unreadable since is BadInput. keep: whether images
    may stay in memory, IN_MEMORY bytes for all those that total counts.
    """

    def __init__(self, records, size, crop="pad", workers=2, seed=0, total=None, keep=True):
        errors = [why for _, _, why in seen(records, workers)]
        self.indices = leave_out(records, errors, total)    # in records: a random crop depends on it
        self.records = [records[i] for i in self.indices]
        self.size, self.crop, self.seed = size, crop, seed
        self.room = keep * IN_MEMORY // (3 * size ** 2) * len(records) // (total or len(records) or 1)
        self.kept, self.begun, self.pool = {}, {}, ThreadPoolExecutor(workers)

    def __len__(self):
        return len(self.records)

    def begin(self, indices):
        """Begin to decode images that will be asked for next."""
        for i in indices:
            if i not in self.kept and i not in self.begun:
                self.begun[i] = self.pool.submit(self._read, i)

    def _read(self, i):
        return read_image(self.records[i], self.size, self.crop, (self.seed, self.indices[i]))

    def __getitem__(self, which):
        """The images of a slice, or of a tensor or list of indices."""
        indices = range(len(self))[which] if isinstance(which, slice) else torch.as_tensor(which).tolist()
        out = torch.empty(len(indices), 3, self.size, self.size, dtype=torch.uint8)
        self.begin(indices)
        for k, i in enumerate(indices):
            out[k] = self._take(i)
        return out

    def _take(self, i):
        if i in self.kept:
            return self.kept[i]
        img = self.begun.pop(i).result() if i in self.begun else self._read(i)      # the same one again
        if len(self.kept) < self.room:
            self.kept[i] = img
        return img


def to_float(images):
    """uint8 images as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(img):
    """Float images, clamped to [-1, 1], as uint8 on the CPU; BadInput for NaN or infinity."""
    if not img.isfinite().all():
        raise BadInput("an image with values that are not finite: another --dtype (bfloat16, float32), a "
                       "smaller --guidance or another adapter")
    return ((img.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


# Training


def split(records, fraction=0.1, seed=2204, groups=None):
    """(train, val) by image, each in the order of records. The hash of seed and file name decides, so every
    script has the same split of a folder, at any image size: what is held out in training is new to the
    metrics too.

    groups: lists of indices into records that stay together; by default the near-duplicates among the images.
    Where large groups would spoil the sizes, others are held out, as near to the fraction as groups allow and
    never above three times of it; where no group fits, they are divided. A line on stderr says so.
    """
    if not 0 <= fraction < 1:
        raise BadInput(f"validation fraction: expected a number in [0, 1), got {fraction}")
    n = len(records)
    n_val = round(fraction * n) or int(fraction > 0 and n > 1)
    rank = [text_hash(seed, r.name) for r in records]
    groups = near_duplicates(records) if groups is None else groups
    grouped = {i for group in groups for i in group}
    units = [list(group) for group in groups] + [[i] for i in range(n) if i not in grouped]
    units.sort(key=lambda unit: min(rank[i] for i in unit))
    held = {i for unit in hold_out(units, n_val, min(n - 1, max(n_val, int(3 * fraction * n)))) for i in unit}
    largest, why = max(map(len, groups), default=0), "near-duplicates stay together"
    if n_val and not held:
        held, why = set(sorted(range(n), key=rank.__getitem__)[:n_val]), "near-duplicates are on both sides"
    if n_val and (abs(len(held) - n_val) >= max(2, 0.15 * n_val) or largest > n_val or "both" in why):
        note(records[0].path.parent, "split", f"{records[0].path.parent}: {len(held)} of {n} images are held "
             f"out, {n_val} were asked for; {why}, the largest group has {largest} images")
    sides = [[r for i, r in enumerate(records) if (i in held) == side] for side in (False, True)]
    return sides[0], sides[1]


def hold_out(units, n_val, most):
    """Those units, lists that stay whole, that make up n_val images, or as near to it as they can, and at
    most `most`. The first ones in order where that comes out."""
    taken, count = [], 0
    for unit in units:
        if count < n_val:
            taken, count = [*taken, unit], count + len(unit)
    if count <= min(most, n_val + max(1, 0.15 * n_val)):
        return taken
    taken, count = [], 0
    for unit in units:                                      # the same without those that are too large
        if count + len(unit) <= n_val:
            taken, count = [*taken, unit], count + len(unit)
    if count == n_val:
        return taken
    of_size = {}
    for unit in units:
        of_size.setdefault(len(unit), []).append(unit)
    last = {0: 0}                                           # sums of sizes that can be reached, by which size
    for size, same in sorted(of_size.items()):
        used = {}
        for total in range(size, most + 1):
            if total not in last and total - size in last and used.get(total - size, 0) < len(same):
                last[total], used[total] = size, used.get(total - size, 0) + 1
    taken, total = [], min(last, key=lambda t: (not t, abs(t - n_val), t))
    while total:
        taken.append(of_size[last[total]].pop(0))
        total -= last[total]
    return taken


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
    """Hash of names, contents and prompts: a resumed run compares it with its data folder's."""
    return text_hash(image_fingerprint(records), *(json.dumps([r.name, r.prompts]) for r in records))


def image_fingerprint(records) -> str:
    """Hash of names and contents of the images alone: what is computed from pixels depends on it."""
    images = [[r.name, h.hex(), *[r.mirror] * bool(r.mirror)]
              for r, (h, *_) in zip(records, seen(records), strict=True)]
    return text_hash(*map(json.dumps, images))


# Writing


def write_image(path, pixels, text=None):
    """uint8 (h, w, 3) into a PNG, atomically; text: a dict of strings to keep in it."""
    chunks = PngInfo()
    for key, value in (text or {}).items():
        chunks.add_text(key, value.encode("utf-8", "replace").decode())
    with replacing(path) as tmp:
        Image.fromarray(np.asarray(pixels)).save(tmp, "PNG", pnginfo=chunks)


def check_writable(**files):
    """BadInput for a file of a flag that cannot be written: said before the work, not after it."""
    for flag, path in files.items():
        if path is not None and not can_write(path):
            raise BadInput(f"--{flag.replace('_', '-')} {path}: cannot be written there; name another place")


def can_write(path):
    path = Path(path).absolute()
    folder = next(p for p in path.parents if p.exists())    # the folders between are made
    return not path.is_dir() and folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


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


CAPTIONS = ("Prompt", "Filename")       # the columns of prompt-gt.csv


def refuse_other_captions(folder, rows):
    """BadInput where folder/prompt-gt.csv holds other (prompt, file name) rows than these."""
    refuse_other_rows(Path(folder) / "prompt-gt.csv", CAPTIONS, rows, ";")


def write_captions(folder, rows):
    """(prompt, file name) rows into folder/prompt-gt.csv, atomically."""
    write_csv(Path(folder) / "prompt-gt.csv", CAPTIONS, rows, ";")


# Check


def check(folder, captions, workers):
    """Print what a data folder holds; returns the exit status, 1 if it is unusable for training."""
    source = captions_file(folder, captions)
    records, missing, unfit, others, paraphrases = {}, [], [], other_files(folder), []
    for row, name, path, prompts in read_rows(folder, source):
        if path is None:
            missing.append(f"row {row}: {name}{hint(name, others)}")
        elif why := prompt_fault(prompts):
            unfit.append(f"row {row}: {name}: {why}")
        else:
            records.setdefault(path.name, Record(path, path.name, [])).prompts.append(prompts[0])
            paraphrases += prompts[1:]
    records = list(records.values())

    def inspect(i):
        try:
            return open_image(records[i].path).size
        except BadInput as error:
            return str(error)

    found = in_parallel(inspect, len(records), workers, "reading images")      # a size or an error
    unreadable = [error for error in found if isinstance(error, str)]
    sizes = Counter(f"{size[0]}x{size[1]}" for size in found if not isinstance(size, str))
    same = {}
    for record, (h, *_), size in zip(records, seen(records, workers), found, strict=True):
        if not isinstance(size, str):
            same.setdefault(h, []).append(record.name)
    same = [" = ".join(names) for names in same.values() if len(names) > 1]
    groups = near_duplicates(records, workers)
    near = [" ~ ".join(records[i].name for i in g) for g in groups]
    held_out = split(records, groups=groups)[1] if records else []
    distinct = len({prompt for r in records for prompt in r.prompts})
    texts = Counter(prompt for r in records for prompt in r.prompts) + Counter(paraphrases)
    unknown = [f"{n} x {text}" for text, n in texts.most_common() if not grammar.parse(text)]
    names = {r.name for r in records}
    unnamed = [p.name for p in list_images(folder) if p.name not in names]
    cut = {text: text.split()[CLIP_WORDS:] for text in texts if len(text.split()) > CLIP_WORDS}
    cut = [f"{texts[text]} x without: {' '.join(lost[:6])}" for text, lost in cut.items()]
    counts = [len(r.prompts) for r in records] or [0]

    print(f"{source}\n{len(records)} images, {sum(counts)} prompts, {distinct} distinct, "
          f"{min(counts)} to {max(counts)} an image, {np.mean(counts):.1f} on average"
          + f"; {len(paraphrases)} paraphrases" * bool(paraphrases))
    print(f"{len(sizes)} sizes, most often " + ", ".join(f"{size} ({n})" for size, n in sizes.most_common(5)))
    print(f"{len(held_out)} images would be held out of training, the largest group of near-duplicates has "
          f"{max(map(len, groups), default=0)}")
    for what, names in (("rows without their image", missing), ("rows with an unusable prompt", unfit),
                        ("unreadable images", unreadable), ("images without a prompt", unnamed),
                        (f"files that are not read, only {', '.join(SUFFIXES)} are", sorted(others)),
                        ("exact duplicates", same), ("groups of near-duplicates, kept in one split", near),
                        ("distinct prompts outside the grammar", unknown),
                        (f"distinct prompts of more than {CLIP_WORDS} words, which CLIP cuts (a lower bound: "
                         "a word may be several tokens)", cut)):
        more = [f"and {len(names) - 20} more"] * (len(names) > 20)
        print("\n    ".join([f"{len(names)} {what}", *names[:20], *more]))
    faults = [what for what, bad in (("images are missing", missing), ("prompts are unusable", unfit),
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
