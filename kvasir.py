"""The public Kvasir data sets as data folders: images byte for byte, prompts in the grammar of the task.

Kvasir-SEG   Jha et al. 2020, MMM: 1,000 images of polyps with a mask of each, from which prompts are derived
Kvasir-VQA   Gautam et al. 2024, arXiv:2409.01437: 6,500 images with questions and answers, the source of the
             task's own data. An answer becomes the sentence that the task has for it; QUESTIONS is the table.
HyperKvasir  Borgli et al. 2020, doi:10.1038/s41597-020-00622-y: 10,662 labelled images, each in the folder
             of its class. The tract gives the procedure: lower-gi-tract a colonoscopy, upper-gi-tract a
             gastroscopy. The class gives what the image contains, nothing where the grammar has no word:

    barretts, barretts-short-segment                       barretts
    esophagitis-a, esophagitis-b-d                         oesophagitis
    z-line                                                 the z-line
    pylorus                                                the pylorus
    polyps, dyed-lifted-polyps                             a polyp
    ulcerative-colitis-grade-0-1, -1, -1-2, -2, -2-3, -3   ulcerative colitis
    hemorrhoids                                            hemorrhoids
    cecum                                                  the cecum
    ileum                                                  the ileum
    retroflex-stomach, retroflex-rectum, bbps-0-1, bbps-2-3, impacted-stool, dyed-resection-margins: nothing

    python kvasir.py seg --src Kvasir-SEG --out data/kvasir
    python kvasir.py vqa --src Kvasir-VQA --out data/vqa
    python kvasir.py hyper --src hyper-kvasir/labeled-images --out data/hyper
"""

from command import BadInput, run_command

import argparse
import filecmp
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import binary_erosion, label
from tqdm import tqdm

import data
import prompts
from files import json_line, read_json, read_text, replacing
from pixels import FORMATS, orientation

SPECK = 0.0005  # share of the image: smaller components are JPEG noise, of 1e-5; polyps have at least 1.6e-3
COVERS = 0.20       # share of a polyp's area that must lie in a cell

TERMS = {
    "seg": "Kvasir-SEG, for research and education; cite Jha et al. 2020, Kvasir-SEG: A Segmented Polyp "
           "Dataset, MMM 2020, doi:10.1007/978-3-030-37734-2_37",
    "vqa": "Kvasir-VQA, CC BY-NC 4.0; cite Gautam et al. 2024, Kvasir-VQA: A Text-Image Pair GI Tract "
           "Dataset, VLM4Bio 2024, doi:10.1145/3689096.3689458",
    "hyper": "HyperKvasir, CC BY 4.0; cite Borgli et al. 2020, HyperKvasir, a comprehensive multi-class "
             "image and video dataset for gastrointestinal endoscopy, Scientific Data 7, 283, "
             "doi:10.1038/s41597-020-00622-y",
}

# Kvasir-VQA: the attribute that a question asks for; None: the grammar has no sentence for its answer. Keys
# are what stands before the question mark, with the typos of the published ones mended.
QUESTIONS = {
    "are there any abnormalities in the image": "contains",
    "are there any instruments in the image": "contains",
    "are there any anatomical landmarks in the image": "contains",
    "how many findings are present": "n_findings",
    "how many instruments are in the image": "n_instruments",
    "how many polyps are in the image": "n_polyps",
    "does this image contain any finding": "n_findings",    # "no" is 0, "yes" no number
    "is there a green/black box artefact": "box",
    "is there text": "text",
    "what color is the abnormality": "colors",
    "what is the size of the polyp": "sizes",
    "what type of polyp is present": "paris",
    "what type of procedure is the image taken from": "procedure",
    "where in the image is the abnormality": "abnormality_cells",
    "where in the image is the instrument": "instrument_cells",
    "where in the image is the anatomical landmark": "landmark_cells",
    "what color is the anatomical landmark": None,
    "have all polyps been removed": None,
    "is this finding easy to detect": None,
}
# a sentence that says one part of an answer, for the grammar to read
SAYING = {"contains": "generate an image containing {}", "colors": "an abnormality with the color {}",
          "sizes": "a polyp of size {}", "paris": "a polyp of type {}", "procedure": "a {} procedure",
          "abnormality_cells": "an abnormality in the {}", "instrument_cells": "an instrument in the {}",
          "landmark_cells": "a landmark in the {}"}
NAMED = (*prompts.NAMES, "hemorrhoids")                     # the names that an answer to "contains" may have
NOTHING_SAID = ("", "none", "not relevant")

# HyperKvasir: what the images of a class contain
CLASSES = {"barretts": "barretts", "barretts-short-segment": "barretts", "esophagitis-a": "oesophagitis",
           "esophagitis-b-d": "oesophagitis", "z-line": "z-line", "pylorus": "pylorus",
           "retroflex-stomach": None, "polyps": "polyp", "dyed-lifted-polyps": "polyp",
           **{f"ulcerative-colitis-grade-{grade}": "ulcerative colitis"
              for grade in ("0-1", "1", "1-2", "2", "2-3", "3")},
           "hemorrhoids": "hemorrhoids", "cecum": "cecum", "ileum": "ileum", "retroflex-rectum": None,
           "bbps-0-1": None, "bbps-2-3": None, "impacted-stool": None, "dyed-resection-margins": None}
TRACTS = {"lower-gi-tract": "colonoscopy", "upper-gi-tract": "gastroscopy"}


# Kvasir-SEG


def polyps_in(mask) -> list[list[str]]:
    """The cells of every polyp in a boolean mask (h, w): those of the 3x3 grid that hold at least COVERS of
    its area, and always the fullest. A polyp is an 8-connected component no smaller than SPECK.

    The grid is the frame's own, as people see it who name a place. A training sees the frame padded to a
    square, where a fifth of Kvasir-SEG's images would get another cell, most often one fewer."""
    h, w = mask.shape
    components, n = label(mask, np.ones((3, 3)))
    polyps = []
    for i in range(1, n + 1):
        y, x = np.nonzero(components == i)
        if len(y) >= SPECK * mask.size:
            share = np.bincount(3 * y // h * 3 + 3 * x // w, minlength=9) / len(y)
            covered = [s >= COVERS or s == share.max() for s in share]
            polyps.append([c for c, yes in zip(prompts.CELLS, covered, strict=True) if yes])
    return polyps


def binary(mask, path):
    """The polyps' pixels of a mask (h, w), its brightest channel: black and one other value, of any height,
    with a soft edge between them as JPEG and resizing make it. BadInput for a mask of more values."""
    values, top = np.unique(mask), mask.max()
    few = len(values) <= 8                                  # drawn, not photographed or compressed
    between = (mask > 0) & (mask < top) if few else (mask > top // 8) & (mask < top - top // 8)
    area = binary_erosion(between, np.ones((3, 3)), iterations=2 + min(mask.shape) // 200).any()
    if area or top < 128 and not few or len(values) > 1 and values[0] > top // 8:
        shown = ", ".join(map(str, values[:8])) + f", ... {top}" * (not few)
        raise BadInput(f"{path}: expected a mask of black and one other value, got greys {shown}")
    return mask > min(127, top // 2)


def has_box(img) -> bool:
    """Whether an RGB image has the artefact, a green or black box in its lower left. The rule is ours.

    Green: at least 5 % of the lower left quarter is a green that neither tissue nor blue dye has. Black:
    going right along the lower edge, the height of the black above it stays level over four columns and then
    falls at once by 7.5 % of the image, where the frame's own corner falls slowly. On 850 images of
    Kvasir-SEG with labels by eye, the same that the numbers were chosen on, it finds 499 of 499 boxes and 5
    where there is none; 16 notches of the frame that are too small to label are left out.
    """
    n = 128
    rgb = np.asarray(img.resize((n, n), Image.Resampling.BOX)).astype(int)
    r, g, b = np.moveaxis(rgb[n // 2:, :n // 2], -1, 0)
    if ((g > 1.5 * r) & (g > 1.1 * b) & (g > 60)).mean() >= 0.05:
        return True
    black = rgb.max(-1) < 24
    height = np.cumprod(black[::-1], axis=0).sum(0) / n
    before = np.stack([height[k:n - 5 + k] for k in range(4)])           # columns x - 3 ... x
    fall = height[3:n - 2] - height[5:]                                  # from column x to x + 2
    level = (np.ptp(before, axis=0) <= 0.02) & (before.max(0) < 0.75)  # a black edge of full height is no box
    return bool((level & (fall >= 0.075))[:int(0.6 * n)].any())


def orientation_of(path):
    with Image.open(path, formats=FORMATS) as img:
        return orientation(img)


def true_prompts(path, mask_path) -> list[str]:
    """The prompts that hold for one image, each about one fact."""
    img, mask = data.open_image(path), data.open_image(mask_path)
    turn, mask_turn = orientation_of(path), orientation_of(mask_path)
    if turn != mask_turn:                                   # was it drawn on stored or on turned pixels?
        raise BadInput(f"{mask_path}: expected the EXIF orientation of its image, {turn}, got {mask_turn}; "
                       "save both upright, without EXIF")
    if img.size != mask.size:
        raise BadInput(f"{mask_path}: expected the size of its image, {img.size}, got {mask.size}")
    is_polyp = binary(np.asarray(mask).max(-1).astype(int), mask_path)
    corners = is_polyp[[0, 0, -1, -1], [0, -1, 0, -1]].sum()
    if is_polyp.mean() > 0.95 or corners > 2:               # of Kvasir-SEG's 850 masks none has two white
        raise BadInput(f"{mask_path}: white in {is_polyp.mean():.0%} of its pixels and {corners} of 4 "
                       "corners; expected polyps white on black; is it inverted?")
    polyps = polyps_in(is_polyp)
    n = len(polyps)
    facts = [{"n_polyps": n}, {"n_findings": n}, {"procedure": "colonoscopy"}, {"box": has_box(img)}]
    if polyps:
        cells = [c for c in prompts.CELLS if any(c in polyp for polyp in polyps)]
        facts = [{"contains": ["polyp"]}, *facts, {"abnormality_cells": cells}]
    return [prompts.write(fact) for fact in facts]


def convert_seg(src, out, workers):
    """The public Kvasir-SEG folder into a data folder: images byte for byte, prompts from the masks."""
    images = data.list_images(src)
    if not (Path(src) / "masks").is_dir():
        raise BadInput(f"{src}: holds no folder masks/")
    check_out(src, out, images)
    files = data.files_in(Path(src) / "masks")
    masks = {p.stem: p for p in files}
    if twice := [p.name for p in files if masks[p.stem] != p]:
        raise BadInput(f"{src}/masks: {twice[0]} and {masks[Path(twice[0]).stem].name} are masks of one "
                       "image; keep one")
    missing = [p.name for p in images if p.stem not in masks]
    if missing or not images:
        raise BadInput(f"{src}/masks: no mask for {len(missing)} of {len(images)} images "
                       f"{' '.join(missing[:3])}")

    def prompts_of(i):
        return true_prompts(images[i], masks[images[i].stem])

    rows = data.in_parallel(prompts_of, len(images), workers, "masks")
    if none := sum(prompts.write({"n_polyps": 0}) in own for own in rows):
        print(f"{none} of {len(images)} images have no polyp in their mask")
    write_folder(out, dict(zip(images, rows, strict=True)), TERMS["seg"])


# Kvasir-VQA


def convert_vqa(src, out, captions):
    """The public Kvasir-VQA into a data folder: images/IMG_ID.jpg, a table of img_id, question and answer.

    captions: a JSON file {img_id: {question: [caption, ...]}}, as of the task's edition of 2025; they become
    prompts behind the image's own.
    """
    table, find, images, left_out = table_of(src), data.image_finder(src), data.list_images(src), Left()
    answers = defaultdict(lambda: defaultdict(list))        # of each image and question
    for name, question, answer in table_rows(table):
        if path := find(name):
            answers[path][question].append(answer)
        else:
            left_out["rows without their image"][name] += 1
    if not answers:
        raise BadInput(f"{table}: no row names an image of {Path(src) / 'images'}")
    found = {path: answered(path.stem, answers[path], left_out) for path in images if path in answers}
    for name, own in captions_of(captions, left_out) if captions else ():
        if path := find(name):
            there = found.setdefault(path, [])
            there += [caption for caption in own if caption not in there]
        else:
            left_out["captions without their image"][name] += len(own)
    without = [path.name for path in images if not found.get(path)]
    left_out["images that no row or caption gives a prompt"].update(without)
    found = {path: found[path] for path in images if found.get(path)}
    if not found:
        why = next((f"{names.total()} {why}, the first is {next(iter(names))!r:.100}"
                    for why, names in left_out.items() if "answers" in why and names), "all say nothing")
        raise BadInput(f"{table}: no answer makes a prompt ({why}); expected questions and answers of "
                       "Kvasir-VQA")
    check_out(src, out, found)
    write_folder(out, found, TERMS["vqa"], left_out)


def table_of(src):
    """The table of questions and answers: metadata.csv, metadata.jsonl, or the only .csv or .jsonl there."""
    for name in ("metadata.csv", "metadata.jsonl"):
        if (Path(src) / name).is_file():
            return Path(src) / name
    data.image_folder(src)
    found = [p for p in sorted(Path(src).iterdir()) if p.suffix in (".csv", ".jsonl") and p.name[0] != "."]
    if len(found) != 1:
        raise BadInput(f"{src}: expected metadata.csv with img_id, question and answer, found "
                       + (", ".join(p.name for p in found) or "no table"))
    return found[0]


def table_rows(table):
    """(img_id, question, answer) of every row of the table."""
    columns = ("img_id", "question", "answer")
    if table.suffix == ".csv":
        yield from (fields for _, fields in data.csv_rows(table, *(((c,), True) for c in columns)))
        return
    for i, line in enumerate(read_text(table).split("\n"), 1):
        if line.strip():
            row = json_line(table, i, line)
            if not isinstance(row, dict) or not all(isinstance(row.get(c), str | int) for c in columns):
                raise BadInput(f'{table}, row {i}: expected {{"img_id": "...", "question": "...", "answer": '
                               f'"..."}}, got {line.strip()[:80]}')
            yield tuple(str(row[c]) for c in columns)


def answered(name, answers, left_out):
    """The prompts of one image, in the grammar's order, from {question: [answer, ...]}."""
    said = {}                                               # of a question, or of an attribute of one value
    for question, given in answers.items():
        asked = question.lower().split("?")[0].strip()
        asked = asked.replace("instrumnets", "instruments").replace("artifact", "artefact")
        key = QUESTIONS.get(asked)
        if key is None:
            known = "that the grammar has no sentence for" if asked in QUESTIONS else "that are not known"
            left_out[f"answers to questions {known}"][question] += len(given)
            continue
        for answer in given:
            parts = [" ".join(part.lower().split()) for part in answer.split(";")]
            read = {part: read_part(key, part) for part in parts if part not in NOTHING_SAID}
            unknown = [f"{key}: {part}" for part, value in read.items() if value is None]
            left_out["parts of answers outside the grammar"].update(unknown)
            values = list(dict.fromkeys(value for value in read.values() if value is not None))
            if key in SAYING and key != "procedure":
                said.setdefault(asked, []).extend([{key: values}] * bool(values))
            else:
                said.setdefault(key, []).extend({key: value} for value in values)
    facts = []
    for slot, found in said.items():
        if any(fact != found[0] for fact in found):
            left_out["answers that contradict each other"][f"{name}: {slot}"] += len(found)
        else:
            facts += found[:1]
    order = list(prompts.SENTENCES)
    return [prompts.write(fact) for fact in sorted(facts, key=lambda fact: order.index(next(iter(fact))))]


def read_part(key, part):
    """The value of an attribute, or in its list, that a part of an answer says; None: not in the grammar."""
    if key in ("box", "text"):
        return {"yes": True, "no": False}.get(part)
    if key in prompts.COUNTED.values():
        return int(part) if part.isdecimal() and len(part) < 4 else 0 if part == "no" else None
    read = prompts.parse(SAYING[key].format(part))
    value = read.get(key)
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    fits = list(read) == [key] and isinstance(value, str) and (key != "contains" or value in NAMED)
    return value if fits else None


def captions_of(path, left_out):
    """(img_id, [caption, ...]) of a JSON file {img_id: {question: [caption, ...]}}."""
    expected = "expected {img_id: {question: [caption, ...]}}"
    for name, questions in read_json(path).items():
        own = []
        if not isinstance(questions, dict):
            raise BadInput(f"{path}, {name!r:.80}: {expected}, got {questions!r:.80}")
        for question, captions in questions.items():
            if not isinstance(captions, list) or not all(isinstance(c, str) for c in captions):
                raise BadInput(f"{path}, {name!r:.80}, {question!r:.80}: {expected}, got {captions!r:.80}")
            own += [" ".join(c.split()) for c in captions]
        for caption in own:
            if why := data.prompt_fault([caption]):
                left_out["captions that cannot be used"][f"{name}: {why}"] += 1
        yield name, list(dict.fromkeys(c for c in own if not data.prompt_fault([c])))


# HyperKvasir


def spelled(name):
    """A class or a tract as its folder is called: "Dyed lifted polyps" is dyed-lifted-polyps."""
    return "-".join(name.lower().replace("_", " ").replace("-", " ").split())


def convert_hyper(src, out):
    """HyperKvasir's labelled images, TRACT/KIND/CLASS/*.jpg with image-labels.csv, into a data folder."""
    src, left_out = Path(src), Left()
    table = src / "image-labels.csv"
    if not table.is_file() or not any(spelled(p.name) in TRACTS for p in src.iterdir()):
        raise BadInput(f"{src}: expected the folder labeled-images of HyperKvasir, which holds "
                       f"image-labels.csv, {' and '.join(TRACTS)}")
    labels = defaultdict(set)
    for _, (name, finding) in data.csv_rows(table, (("video file",), True), (("finding",), True)):
        labels[name].add(spelled(finding))
    tracts = {p: TRACTS[spelled(p.name)] for p in sorted(src.iterdir()) if spelled(p.name) in TRACTS}
    images = {p: procedure for tract, procedure in tracts.items() for folder in sorted(tract.glob("*/*"))
              if folder.is_dir() for p in data.files_in(folder)}
    if twice := [name for name, n in Counter(p.name for p in images).items() if n > 1]:
        same = [str(p.relative_to(src)) for p in images if p.name == twice[0]]
        raise BadInput(f"{src}: expected each name once, got {' and '.join(same)}")
    found = {}
    for path, procedure in images.items():
        own, said = spelled(path.parent.name), sorted(labels.pop(path.stem, ()))
        known = [label for label in said if label in CLASSES]
        if own not in CLASSES:
            left_out["images of a class that is not known"][own] += 1
        elif others := [label for label in known if CLASSES[label] != CLASSES[own]]:
            left_out["images whose folder and row name different classes"][f"{own}, {others[0]}"] += 1
        else:
            if not known:
                left_out["images without a row of a known class, whose folder was believed"][
                    f"{path.name}, {', '.join(said) or 'no row'}"] += 1
            facts = [{"contains": [CLASSES[own]]}] * bool(CLASSES[own])
            facts += [{"procedure": procedure}]
            found[path] = [prompts.write(fact) for fact in facts]
    left_out["rows without their image"].update(list(labels))
    if not found:
        why = "".join(f"; {names.total()} {why}, the first is {next(iter(names))!r:.80}"
                      for why, names in left_out.items() if "images" in why)
        raise BadInput(f"{src}: expected images in folders of known classes, as polyps or cecum{why}")
    check_out(src, out, found)
    write_folder(out, found, TERMS["hyper"], left_out)


# Data folders


class Left(defaultdict):
    """What was left out: for each reason a Counter of names."""

    def __init__(self):
        super().__init__(Counter)


def check_out(src, out, images):
    """BadInput for a folder --out that is --src, or that holds images of other sources."""
    out = Path(out)
    if out.resolve() == Path(src).resolve():
        raise BadInput(f"{out}: --out must be another folder than --src")
    there = data.files_in(out / "images") if (out / "images").is_dir() else []
    own = {p.name: p for p in images}
    others = [p for p in there if p.name not in own or not filecmp.cmp(p, own[p.name], shallow=False)]
    if others:
        raise BadInput(f"{out}: holds {len(others)} images that are not from {src}, for example "
                       f"{others[0].name}; give an empty folder")
    if not there and (out / "prompt-gt.csv").exists():
        raise BadInput(f"{out}: holds prompt-gt.csv of other images; give an empty folder")


def write_folder(out, found, terms, left_out=None):
    """Copy images and write their prompts, {path: [prompt, ...]}; print what was found and left out."""
    rows = [(prompt, path.name) for path, own in found.items() for prompt in own]
    for name in (path.name for path in found):
        if name != name.strip() or any(c in "\r\n" or "\ud800" <= c <= "\udfff" for c in name):
            raise BadInput(f"{name!r}: expected a file name in UTF-8, without line breaks or spaces around; "
                           "rename the image")
    data.refuse_other_captions(out, rows)
    for path in tqdm(found, "copying", unit="image", delay=2, leave=False, disable=None):
        with replacing(Path(out) / "images" / path.name) as tmp:
            tmp.write_bytes(path.read_bytes())              # shutil names the source when the disk is full
    data.write_captions(out, rows)
    print(f"{out}: {len(found)} images, {len(rows)} prompts")
    for why, names in (left_out or {}).items():
        if names:
            most = ", ".join(f"{name} ({n})" if n > 1 else name for name, n in names.most_common(3))
            print(f"{names.total()} {why}: {most}" + ", ..." * (len(names) > 3))
    print(terms)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Turn a public data set into a data folder.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what, src in (
            ("seg", "Kvasir-SEG: images with masks of their polyps", "folder with images/ and masks/"),
            ("vqa", "Kvasir-VQA: images with questions and answers", "folder with images/ and metadata.csv"),
            ("hyper", "HyperKvasir: labelled images", "its folder labeled-images")):
        p = commands.add_parser(name, help=what, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        p.add_argument("--src", required=True, metavar="DIR", help=src)
        p.add_argument("--out", required=True, metavar="DIR", help="data folder to write")
        if name == "seg":
            p.add_argument("--workers", type=int, default=2, help="threads that read images")
        if name == "vqa":
            p.add_argument("--captions", metavar="FILE",
                           help="the edition of 2025's captions, {img_id: {question: [caption, ...]}}, which "
                                "become prompts behind the others")
    args = parser.parse_args(argv)
    if args.command == "seg":
        return convert_seg(args.src, args.out, args.workers)
    if args.command == "vqa":
        return convert_vqa(args.src, args.out, args.captions)
    return convert_hyper(args.src, args.out)


if __name__ == "__main__":
    run_command(main)
