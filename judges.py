"""Beyond the metrics: are images faithful to their prompts, useful as training data, or copies of it?

faithfulness   our attribute classifier (classifier.py), trained on real images, is applied to generated ones
usefulness     GAN-train and GAN-test (Shmelkov et al. 2018, arXiv:1807.09536, Sec. 3): the same classifier
               trained on generated images and tested on real ones, and the reverse
memorisation   distance to the nearest training image, of generated and of held-out real images; authenticity
               is of Alaa et al. 2022 (arXiv:2102.08921), the rule for "too close" and the verdict are ours

    python judges.py prompts --out prompts.csv
    python sampler.py --ckpt runs/msdm/best.safetensors --prompts prompts.csv --out out/faithfulness
    python judges.py faithfulness --real data/phantom --fake out/faithfulness
    python judges.py usefulness --real data/phantom --fake out/msdm
    python judges.py memorisation --train data/phantom --held-out data/phantom-test --fake out/msdm
"""

from command import BadInput, at_least_one, best_device, run_command

import argparse
import csv
import io
import math
import random
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import trange

import data
import metrics
import prompts
from classifier import (
    ATTRIBUTES,
    COLUMN,
    SLICE,
    UNKNOWN,
    VALUES,
    augment,
    classifier_of,
    default_file,
    is_judge,
    merge,
    predict,
    train_classifier,
    truth,
    truth_row,
)
from files import check_replaced, is_json_with, replacing, write_json
from inception import Inception
from pixels import FORMATS

MIN_EXAMPLES = 5        # training images below which a value is not judged
FEWEST = 20             # images below which none too close says little: the interval of 0 of 19 ends at 0.17
JUDGEMENT = {           # keys by which a --json file of each command is known
    "faithfulness": ("n_fake_unjudged", "values", "summary", "not_judged"),
    "usefulness": ("n_prompts", "n_held_out", "attributes"),
    "memorisation": ("near_ratio", "verdict", "flagged", "pairs"),
}
DESCRIPTION = 0x010E    # the EXIF tag ImageDescription, in PNG and JPEG alike
SHEET = "judges.py memorisation: closest pairs"
SUMMARY = {             # rows of the short table: which values each pools
    "no polyps": [("polyp", "no polyps")],
    "a polyp": [("polyp", "a polyp")],
    "exactly 1, 2, 3 polyps": [("count", v) for v in "123"],
    "a polyp in the cell asked for": [("place", v) for v in prompts.CELLS],
    "size class": [("size", v) for v in prompts.SIZES],
    "with / without instruments": [("instruments", "none"), ("instruments", "some")],
    "with / without the box": [("box", "without"), ("box", "with")],
    "with / without text": [("text", "without"), ("text", "with")],
    "colours": [("colour", v) for v in prompts.COLORS],
    "paris type": [("paris", v) for v in prompts.PARIS],
    "procedure": [("procedure", "colonoscopy"), ("procedure", "gastroscopy")],
}


def requested(attributes: dict) -> list[tuple]:
    """The (attribute, value) pairs that a prompt names explicitly: "2 polyps" is a count, not presence."""
    a = attributes
    out = [("place", c) for c in a.get("abnormality_cells", ())] + [("size", s) for s in a.get("sizes", ())]
    out += [("colour", c) for c in a.get("colors", ())] + [("paris", p) for p in a.get("paris", ())]
    if a.get("n_polyps") == 0:
        out.append(("polyp", "no polyps"))
    elif "n_polyps" in a:
        out.append(("count", str(a["n_polyps"]) if a["n_polyps"] < 4 else "more"))
    if "polyp" in a.get("contains", ()):
        out.append(("polyp", "a polyp"))
    if "n_instruments" in a:
        out.append(("instruments", "some" if a["n_instruments"] else "none"))
    out += [(key, "with" if a[key] else "without") for key in ("box", "text") if key in a]
    out += [("procedure", a["procedure"])] if "procedure" in a else []
    return [pair for pair in out if pair in COLUMN]


# Counting


def wilson(successes, n, z=1.959964):
    """95 % interval of a proportion (Wilson 1927): it stays inside [0, 1] and holds for small n."""
    if n == 0:
        return 0.0, 1.0
    p, zz = successes / n, z * z / n
    middle, half = p + zz / 2, z * math.sqrt(p * (1 - p) / n + zz / (4 * n))
    low, high = (middle - half) / (1 + zz), (middle + half) / (1 + zz)
    return max(0.0, min(p, low)), min(1.0, max(p, high))                # p: rounding may leave it outside


def share(hits, among):
    """Column-wise share of hits among the True of a mask; nan where the mask is empty."""
    n = among.sum(0)
    return torch.where(n > 0, (hits & among).sum(0) / n, float("nan"))


def report(predicted, targets, truth_real, predicted_held_out, truth_held_out):
    """Rows of the two tables, by VALUES and by SUMMARY, and the names of values too rare to judge.

    predicted, targets (n, values) bool: the classifier's output on generated images, the values that their
    prompts name. truth_real, truth_held_out (n, values) int8: 1, 0 or UNKNOWN.
    """
    known = truth_held_out != UNKNOWN
    accuracy = share(predicted_held_out == (truth_held_out == 1), known)
    sensitivity = share(predicted_held_out, truth_held_out == 1)
    chance = share(truth_real == 1, truth_real != UNKNOWN)
    n, hits = targets.sum(0), (predicted & targets).sum(0)
    enough = (truth_real == 1).sum(0) >= MIN_EXAMPLES

    def row(name, columns, judged):
        weight = n[columns] / n[columns].sum()                          # the prompts' mix of values
        n_all, n_hits = int(n[columns].sum()), int(hits[columns].sum())
        tested = ~sensitivity[columns].isnan()                          # values that a held-out image shows
        low, high = wilson(n_hits, n_all)
        return {"asked for": name, "n": n_all, "share": n_hits / n_all, "low": low, "high": high,
                "sensitivity": float((sensitivity[columns] * weight)[tested].sum() / weight[tested].sum()),
                "accuracy": float(judged), "chance": float((chance[columns] * weight).sum())}

    rows = [{"attribute": attribute} | row(value, [i], accuracy[i])
            for i, (attribute, value) in enumerate(VALUES) if n[i] and enough[i]]
    summary = []
    for name, pairs in SUMMARY.items():
        columns = [COLUMN[p] for p in pairs if n[COLUMN[p]] and enough[COLUMN[p]]]
        if columns:
            judged = accuracy[columns].nanmean()
            if pairs[0][0] == "count":                                  # the whole count must be right
                counts = SLICE["count"]
                judged = share((predicted_held_out[:, counts] & (truth_held_out[:, counts] == 1)).any(1),
                               known[:, counts].all(1))
            summary.append(row(name, columns, judged))
    return rows, summary, [f"{a} {v}" for i, (a, v) in enumerate(VALUES) if n[i] and not enough[i]]


def print_table(rows, columns):
    """columns: {heading: key of a row, or function row -> text}; text is flush left, numbers flush right."""
    def cell(row, column):
        value = column(row) if callable(column) else row[column]
        return ("-" if math.isnan(value) else f"{value:.3f}") if isinstance(value, float) else str(value)

    lines = [list(columns), *([cell(row, c) for c in columns.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = [isinstance(c, str) and isinstance(rows[0][c], str) for c in columns.values()]
    for line in [lines[0], ["-" * w for w in widths], *lines[1:]]:
        cells = zip(line, widths, left, strict=True)
        padded = (c.ljust(w) if to_left else c.rjust(w) for c, w, to_left in cells)
        print("  ".join(padded).rstrip())


def write_table(path, table):
    """The table as a JSON file. What could not be tested, NaN in the rows, is null: JSON has no NaN."""
    def known(value):
        if isinstance(value, dict):
            return {k: known(v) for k, v in value.items()}
        if isinstance(value, list):
            return [known(v) for v in value]
        return value if not isinstance(value, float) or math.isfinite(value) else None

    write_json(path, known(table))


def interval(row):
    return f"{row['low']:.2f}-{row['high']:.2f}"


def real_images(folder, held_out, size):
    """(records, images, labels), twice: to train on and held out, which are 10 % unless a folder is given."""
    train = data.read_folder(folder)
    total = None if held_out else len(train)
    train, rest = (train, data.read_folder(held_out)) if held_out else data.split(train)
    if not rest:
        raise BadInput(f"{folder}: 1 image, expected at least 2, one of them to hold out, or --held-out")
    return labelled(train, folder, size, total), labelled(rest, held_out or folder, size, total)


def labelled(records, folder, size, total=None):
    """(records that could be read, uint8 (n, 3, size, size), labels (n, values))."""
    images, records = data.load_images(records, size, total=total)
    return records, images, truth(records, folder)


# Faithfulness


def faithfulness(args):
    """For each value: the share of images that show it, of those whose prompts ask for it."""
    fake_images, fake = data.load_images(data.read_folder(args.fake), args.size)
    targets = torch.zeros(len(fake), len(VALUES), dtype=torch.bool)
    for i, record in enumerate(fake):
        for pair in requested(merge([prompts.parse(p) for p in record.prompts])):
            targets[i, COLUMN[pair]] = True
    if not targets.any():
        raise BadInput(f"{args.fake}: no prompt asks for anything that is judged ({', '.join(ATTRIBUTES)}); "
                       f"the first is {fake[0].prompts[0]!r}")
    real = real_images(args.real, args.held_out, args.size)
    (train, images, labels), (held_out, held_out_images, held_out_labels) = real
    net = classifier_of(args.real, train, images, labels, args)
    rows, summary, rare = report(predict(net, fake_images), targets, labels,
                                 predict(net, held_out_images), held_out_labels)
    protocol = {"real": str(args.real), "fake": str(args.fake),
                "held_out": str(args.held_out or "10 % of real"),
                "n_train": len(train), "n_held_out": len(held_out), "n_fake": len(fake),
                "n_fake_unjudged": int((~targets.any(1)).sum()), "size": args.size, "steps": args.steps,
                "seed": args.seed}
    print(f"{len(fake)} generated images of {args.fake}, "
          f"{protocol['n_fake_unjudged']} with prompts that ask for nothing judged\n"
          f"{len(train)} real images of {args.real} to train on, {len(held_out)} held out; "
          f"{args.size} px, seed {args.seed}\n")
    columns = {"asked for": "asked for", "n": "n", "share": "share", "95 % interval": interval,
               "sensitivity": "sensitivity", "accuracy": "accuracy", "chance": "chance"}
    if rows:
        print_table(rows, {"attribute": "attribute"} | columns)
        print()
        print_table(summary, columns)
        print("\nshare: of the n images whose prompt asks for it, those that the classifier finds it in.\n"
              "sensitivity: the same of held-out real images that show it: what perfect images would score.\n"
              "accuracy: of all held-out real images, those that the classifier judges correctly.\n"
              "chance: of the real images, those that show it: what images unrelated to prompts would score.")
    if rare:
        print(f"not judged, fewer than {MIN_EXAMPLES} real images show it: {', '.join(rare)}")
    if args.json:
        write_table(args.json, protocol | {"values": rows, "summary": summary, "not_judged": rare})


def evaluation_prompts(colors):
    """One prompt for each value of the faithfulness table."""
    attributes = [{"n_polyps": 0}, {"contains": ["polyp"]}, *({"n_polyps": n} for n in (1, 2, 3)),
                  *({"abnormality_cells": [c]} for c in prompts.CELLS),
                  *({"sizes": [s]} for s in prompts.SIZES),
                  {"n_instruments": 0}, {"n_instruments": 1},
                  {"box": True}, {"box": False}, {"text": True}, {"text": False},
                  *({"colors": [c]} for c in colors)]
    return [prompts.write(a) for a in attributes]


def write_prompts(args):
    """The evaluation prompts, each --per-value times, as a csv with the column Prompt."""
    lines = [p for p in evaluation_prompts(args.colors) for _ in range(args.per_value)]
    with replacing(args.out) as tmp, open(tmp, "w", newline="", encoding="utf-8") as f:
        csv.writer(f, lineterminator="\n").writerows([["Prompt"], *([p] for p in lines)])
    print(f"{args.out}: {len(lines)} prompts, {args.per_value} a value")


def is_prompts(path):
    """Whether a file is one that write_prompts wrote: the column Prompt, and nothing but prompts of it."""
    ours = set(evaluation_prompts(prompts.COLORS))
    try:
        with open(path, newline="", encoding="utf-8") as f:
            rows = csv.reader(f)
            return next(rows, None) == ["Prompt"] and all(len(row) == 1 and row[0] in ours for row in rows)
    except (OSError, UnicodeDecodeError, csv.Error):
        return False


# Usefulness


def usefulness(args):
    """Compare a classifier of generated images with one of as many real images, with as few prompts each."""
    real = real_images(args.real, args.held_out, args.size)
    (train, images, labels), (held_out, test_images, test_labels) = real
    fake, fake_images, fake_labels = labelled(data.read_folder(args.fake), args.fake, args.size)
    on_all = classifier_of(args.real, train, images, labels, args)
    rng = random.Random(args.seed)
    n, n_prompts = min(len(train), len(fake)), round(sum(len(r.prompts) for r in fake) / len(fake))
    a, b = rng.sample(range(len(train)), n), rng.sample(range(len(fake)), n)
    few_labels = labels_from_prompts([train[i] for i in a], n_prompts, rng)
    on_real = train_classifier(images[a], few_labels, args.steps, args.seed, device=args.device)
    on_fake = train_classifier(fake_images[b], fake_labels[b], args.steps, args.seed, device=args.device)
    rows = balanced_rows({"real-train": (predict(on_real, test_images), test_labels),
                          "GAN-train": (predict(on_fake, test_images), test_labels),
                          "real-test": (predict(on_all, test_images), test_labels),
                          "GAN-test": (predict(on_all, fake_images), fake_labels)})
    if not rows:
        raise BadInput(f"{args.fake}: expected prompts with an attribute present in some images of both "
                       f"folders and absent in others, as those of {args.real}")
    print(f"{args.real}: {len(train)} real images, {len(held_out)} held out; "
          f"{args.fake}: {len(fake)} generated images, {n_prompts} prompt{'s' * (n_prompts > 1)} each; "
          f"{args.size} px, {args.steps} steps, seed {args.seed}\n")
    print_table(rows, {"values" if key == "n_values" else key: key for key in rows[0]})
    print("\nBalanced accuracy, mean over the attribute's values: the share judged correctly of the images\n"
          "with a value and of those without, averaged; 0.5 is chance.\n"
          f"real-train, GAN-train: trained on {n} real and on {n} generated images, each with labels from\n"
          "as many prompts, and tested on held-out real ones. real-test, GAN-test: trained on all real\n"
          "images with all their labels, tested on held-out real and on generated ones.")
    if args.json:
        write_table(args.json, {
            "real": str(args.real), "fake": str(args.fake), "n_train": n, "n_prompts": n_prompts,
            "n_real": len(train), "n_held_out": len(held_out), "n_fake": len(fake), "size": args.size,
            "steps": args.steps, "seed": args.seed, "attributes": rows})


def labels_from_prompts(records, n_prompts, rng):
    """Labels of real images from n_prompts of their prompts, as incomplete as those of generated ones."""
    some = [rng.sample(r.prompts, min(n_prompts, len(r.prompts))) for r in records]
    return torch.tensor([truth_row(merge([prompts.parse(p) for p in few])) for few in some], dtype=torch.int8)


def balanced_rows(tests):
    """{name: (predicted, labels)} -> a row an attribute: balanced accuracy by name, over testable values."""
    scores = {}
    for name, (predicted, labels) in tests.items():
        scores[name] = (share(predicted, labels == 1) + share(~predicted, labels == 0)) / 2
    testable = ~torch.stack(list(scores.values())).isnan().any(0)
    rows = []
    for attribute, span in SLICE.items():
        use = testable[span]
        if use.any():
            rows.append({"attribute": attribute, "n_values": int(use.sum())}
                        | {name: float(score[span][use].mean()) for name, score in scores.items()})
    return rows


# Memorisation


def memorisation(args):
    """Distances of generated, held-out real and slightly altered training images to the training images.

    "Too close" is our rule: a distance, or its ratio to the training image's distance to its own nearest
    neighbour, below the 1 % quantile of held-out images. Authentic (Alaa et al.): a ratio above 1.
    """
    train = image_records(args.train)
    total = None if args.held_out else len(train)
    train, held_out = (train, image_records(args.held_out)) if args.held_out else data.split(train)
    if len(train) < 2 or len(held_out) < FEWEST:
        raise BadInput(f"expected at least 2 training images and {FEWEST} held out, got {len(train)} "
                       f"of {args.train} and {len(held_out)} of {args.held_out or args.train}")
    images, train = data.load_images(train, args.size, total=total)
    held_out_images, held_out = data.load_images(held_out, args.size, total=total)
    fake_images, fake = data.load_images(image_records(args.fake), args.size)
    generator = torch.Generator().manual_seed(args.seed)
    some = torch.randperm(len(train), generator=generator)[:200]
    copies = augment(images[some], generator).round().clamp(0, 255).byte()
    named, embed = thumbnails_or_inception(args)
    known = features(embed, images, args.device)
    radius = nearest(known, known, skip_self=True)[0].clamp_min(1e-12)  # training image to its nearest other
    found = {"generated": nearest(features(embed, fake_images, args.device), known),
             "held-out real": nearest(features(embed, held_out_images, args.device), known),
             "altered copies": nearest(features(embed, copies, args.device), known)}
    encoded = (features(embed, as_jpeg(images[some]), args.device) - known[some]).norm(dim=1)
    n_same = count_same(found["generated"][0], found["held-out real"][0], encoded)
    d, i = found["held-out real"]
    near, near_ratio = d.quantile(0.01), (d / radius[i]).quantile(0.01)
    if near == 0:
        raise BadInput(f"{args.held_out or args.train}: expected held-out images other than those to "
                       "train on, 1 % and more are the same")
    rows = []
    for name, (d, i) in found.items():
        close = (d < near) | (d / radius[i] < near_ratio)
        low, high = wilson(int(close.sum()), len(close))
        rows.append({"images": name, "n": len(d), "too close": float(close.float().mean()),
                     "low": low, "high": high, "authentic": float((d > radius[i]).float().mean()),
                     "median distance": float(d.median())})
    conclusion = verdict(*rows, n_same)
    print(f"{len(train)} training images of {args.train}; {args.size} px; distances of {named}\n")
    print_table(rows, {"images": "images", "n": "n", "too close": "too close", "95 % interval": interval,
                       "authentic": "authentic", "median distance": "median distance"})
    print(f"\ntoo close: nearer to a training image than all but 1 % of held-out ones, below {near:.4g} or "
          f"below {near_ratio:.4g} times\nthe distance from that training image to its own nearest. "
          "authentic: farther than once that distance.\n"
          "altered copies: training images with other light, blur, noise and a pixel's shift, as copies "
          f"would score.\n\n{conclusion}")
    d, i = found["generated"]
    order = torch.minimum(d / near, d / radius[i] / near_ratio).argsort()[:args.pairs].tolist()
    pairs = [{"generated": fake[j].name, "training": train[i[j]].name, "distance": float(d[j]),
              "ratio": float(d[j] / radius[i[j]])} for j in order]
    sheet = args.sheet or default_sheet(args.fake)
    if data.can_write(sheet):
        write_pairs(sheet, [(fake_images[j], images[i[j]]) for j in order], [p["ratio"] for p in pairs])
        print(f"the {len(pairs)} closest pairs, generated left, training right: {sheet}")
    else:
        print(f"no sheet of pairs: {sheet} cannot be written; name another file with --sheet",
              file=sys.stderr)
    if args.json:
        write_table(args.json, {
            "train": str(args.train), "held_out": str(args.held_out or "10 % of train"),
            "fake": str(args.fake), "features": named, "size": args.size, "seed": args.seed,
            "near": float(near), "near_ratio": float(near_ratio), "same": n_same, "verdict": conclusion,
            "flagged": conclusion.startswith("COPIES"), "rows": rows, "pairs": pairs})


def count_same(generated, held_out, encoded) -> int:
    """How many generated images are training images, the same or encoded anew, by their distances (n,).

    The bound is ours: 99 % of training images are no farther than that from themselves as a JPEG, and the
    nearest held-out image, which is not one of them, is at least twice as far.
    """
    return int((generated <= torch.minimum(encoded.quantile(0.99), held_out.min() / 2)).sum())


def as_jpeg(images):
    """uint8 images (n, 3, h, w) as they come back from JPEG files of Pillow's default quality, 75."""
    out = []
    for img in images:
        file = io.BytesIO()
        Image.fromarray(img.permute(1, 2, 0).numpy()).save(file, "JPEG")
        out.append(torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1))
    return torch.stack(out)


def verdict(generated, real, altered, n_same):
    """One line from the three rows of the table: the share "too close" with its Wilson interval (ours).

    n_same: generated images that are training images; one is enough, among however many others.
    """
    n = generated["n"]
    if n_same:
        are = "is a training image" if n_same == 1 else "are training images"
        return f"COPIES: {n_same} of {n} generated images {are}"
    if generated["low"] > real["high"]:
        return "COPIES: more generated images are too close than chance explains"
    if altered["low"] <= real["high"]:
        return "cannot tell: not even altered copies stand out in these features"
    if generated["low"] > real["too close"]:
        return ("SUSPICIOUS: more generated images are too close than held-out ones; "
                "too few are held out to be sure")
    if n < FEWEST:
        return (f"cannot tell: {n} image{'s' * (n > 1)}, expected at least {FEWEST}; the share that is too "
                f"close may be anything from {generated['low']:.2f} to {generated['high']:.2f}")
    return "no sign of copying: about as many generated images are too close as held-out ones"


def default_sheet(fake):
    """closest.png in a data folder; beside a plain folder, where it would be taken for one of its images."""
    return fake / "closest.png" if (fake / "images").is_dir() else fake.with_name(f"{fake.name}-closest.png")


def image_records(folder):
    """Records, without prompts, of the images of a data folder or of a plain folder."""
    return [data.Record(path, path.name, []) for path in metrics.image_files(folder)]


def thumbnails_or_inception(args):
    """(name, function uint8 images -> features) of the space of the distances.

    The attribute classifier's features are unsuitable, since they drop what is no attribute: of altered
    copies of phantoms only 3 % lay nearer than all but 1 % of held-out images in them; in thumbnails all did.
    """
    if not args.weights:
        return "colour thumbnails of 16 x 16 at one brightness and contrast", thumbnails
    net = Inception(None if args.weights == "published" else args.weights).to(args.device).eval()
    return f"Inception's 2,048 features, weights {net.source[:12]}", lambda img: net(img)["2048"]


def thumbnails(img):
    """(n, 768) of unit length: the 16 x 16 means of each channel about their common mean (ours)."""
    x = F.adaptive_avg_pool2d(img.float(), 16).flatten(1)
    return F.normalize(x - x.mean(1, keepdim=True))


@torch.inference_mode()
def features(embed, images, device, batch_size=64):
    """(n, d) float32 features of uint8 images."""
    starts = trange(0, len(images), batch_size, desc="features", delay=2, leave=False)
    return torch.cat([embed(images[i:i + batch_size].to(device)).float().cpu() for i in starts])


def nearest(a, b, skip_self=False, chunk=1024):
    """(distance, index) of the row of b nearest to each row of a; skip_self: a is b, its own row excluded."""
    index = []
    square = (b * b).sum(1)
    for i in range(0, len(a), chunk):
        d = square - 2 * a[i:i + chunk] @ b.T                           # |a|^2 would change no order
        if skip_self:
            d[range(len(d)), range(i, i + len(d))] = torch.inf
        index.append(d.argmin(1))
    index = torch.cat(index)
    return (a - b[index]).norm(dim=1), index                            # anew: d above rounds small distances


def write_pairs(path, pairs, numbers, side=128, columns=4, gap=6, line=14):
    """Pairs of uint8 images (3, h, w) side by side in one image file, closest first, a number below each."""
    rows = -(-len(pairs) // columns)
    sheet = Image.new("RGB", (columns * (2 * side + gap) + gap, rows * (side + line + gap) + gap), "white")
    pen = ImageDraw.Draw(sheet)
    for k, (pair, number) in enumerate(zip(pairs, numbers, strict=True)):
        x, y = gap + k % columns * (2 * side + gap), gap + k // columns * (side + line + gap)
        for j, img in enumerate(pair):
            sheet.paste(Image.fromarray(img.permute(1, 2, 0).numpy()).resize((side, side)), (x + j * side, y))
        pen.text((x, y + side + 1), f"{number:.3g}", fill="black")
    exif = Image.Exif()
    exif[DESCRIPTION] = SHEET
    with replacing(path) as tmp:
        sheet.save(tmp, exif=exif)


def is_sheet(path):
    """Whether an image file is one that write_pairs wrote."""
    try:
        with Image.open(path, formats=FORMATS) as img:
            return img.getexif().get(DESCRIPTION) == SHEET
    except Exception:                                                   # anything: it is a decoder
        return False


# Command line


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(function, name, summary):
        p = commands.add_parser(name, help=summary, description=summary,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        p.set_defaults(function=function)
        return p

    def common(p, real, what, trains=True):
        p.add_argument(real, type=Path, required=True, help=what)
        p.add_argument("--fake", type=Path, required=True, help="folder of generated images (sampler.py)")
        p.add_argument("--held-out", type=Path, help=f"folder of other real images; unset, 10 %% of {real}")
        p.add_argument("--size", type=int, default=64, help="side that images are resized to, pixels")
        if trains:
            p.add_argument("--steps", type=int, default=1000, help="optimiser steps, 64 images each")
        p.add_argument("--seed", type=int, default=0, help="seed of everything drawn at random")
        p.add_argument("--device", default="auto", help="cpu, cuda or auto")
        p.add_argument("--json", type=Path, help="file for every number of the tables")

    p = command(faithfulness, "faithfulness", "how often generated images show what their prompts ask for")
    common(p, "--real", "data folder to train the classifier on, of another seed than the model's")
    p.add_argument("--classifier", type=Path, help="file of the trained classifier; unset, one beside --real")
    p = command(usefulness, "usefulness", "train on generated images and test on real ones, and the reverse")
    common(p, "--real", "data folder of real images")
    p.add_argument("--classifier", type=Path, help="file of their classifier; unset, one beside --real")
    p = command(memorisation, "memorisation", "whether generated images are copies of training images")
    common(p, "--train", "data folder that the model was trained on", trains=False)
    p.add_argument("--weights", help='Inception, not thumbnails, as features: a weights file or "published"')
    p.add_argument("--sheet", type=Path, help="image file of the closest pairs; unset, closest.png by --fake")
    p.add_argument("--pairs", type=int, default=24, help="number of closest pairs to show")
    p = command(write_prompts, "prompts", "write the evaluation prompts of faithfulness as a csv file")
    p.add_argument("--out", type=Path, required=True, help="csv file to write, column Prompt")
    p.add_argument("--per-value", type=int, default=20, help="number of prompts for each value")
    p.add_argument("--colors", nargs="+", default=["pink", "red", "white", "yellow", "purple"],
                   choices=prompts.COLORS, metavar="COLOR", help="colours to write prompts for")
    args = parser.parse_args(argv)
    if "device" in args:
        args.device = best_device(args.device)
        if args.size % 16 or args.size < 32:
            raise BadInput(f"--size: expected a multiple of 16, at least 32, got {args.size}")
        if getattr(args, "sheet", None) and args.sheet.suffix.lower() not in data.SUFFIXES:
            raise BadInput(f"--sheet {args.sheet}: expected a name that ends in {', '.join(data.SUFFIXES)}")
    at_least_one(args, *(name for name in ("steps", "pairs", "per_value") if name in args))
    data.check_writable(**{name: getattr(args, name, None) for name in ("out", "json", "sheet")})
    check_outputs(args)
    for name in ("real", "train", "held_out", "fake"):
        if getattr(args, name, None):
            metrics.say_nested(getattr(args, name))
    args.function(args)


def check_outputs(args):
    """BadInput where a file of a flag, or its default, would replace one of another kind."""
    command = args.command
    classifier = (args.classifier or default_file(args.real, args.size)) if "classifier" in args else None
    sheet = (args.sheet or default_sheet(args.fake)) if "sheet" in args else None
    check_replaced(
        out=(getattr(args, "out", None), "a file of judges.py prompts", is_prompts),
        classifier=(classifier, "a classifier that judges.py wrote", is_judge),
        sheet=(sheet, "a sheet of judges.py memorisation", is_sheet),
        json=(getattr(args, "json", None), f"a result of judges.py {command}",
              lambda path: is_json_with(path, *JUDGEMENT[command])))


if __name__ == "__main__":
    run_command(main)
