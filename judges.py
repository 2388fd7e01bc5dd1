"""Beyond the metrics: are images faithful to their prompts, useful as training data, or copies of it?

faithfulness   our attribute classifier (classifier.py), trained on real images, is applied to generated ones
usefulness     GAN-train and GAN-test (Shmelkov et al. 2018, arXiv:1807.09536, Sec. 3): the same classifier
               trained on generated images and tested on real ones, and the reverse
memorisation   copies of training images among the generated (copies.py), each on its own; and the distance to
               the nearest training image, of generated and of held-out real images: authenticity is of Alaa
               et al. 2022 (arXiv:2102.08921), the rule for "too close" and the verdict are ours; exit status
               1 where the verdict is COPIES

    python judges.py prompts --out prompts.csv
    python sampler.py --ckpt runs/msdm/best.safetensors --prompts prompts.csv --out out/faithfulness
    python judges.py faithfulness --real data/phantom-judges --fake out/faithfulness
    python judges.py usefulness --real data/phantom-others --fake out/msdm
    python judges.py memorisation --train data/phantom --held-out data/phantom-others --fake out/msdm
"""

from command import BadInput, at_least_one, best_device, check_range, run_command

import argparse
import csv
import math
import random
from pathlib import Path

import torch
import torch.nn.functional as F

import data
import duplicates
import metrics
import mirrored
import prompts
import wording
from classifier import (
    ATTRIBUTES,
    COLUMN,
    SLICE,
    UNKNOWN,
    VALUES,
    cannot_judge,
    classifier_of,
    count_value,
    file_of,
    is_judge,
    merge,
    predict,
    train_classifier,
    truth,
    truth_row,
)
from copies import repeats
from files import check_replaced, is_json_with, write_csv
from memorisation import default_sheet, is_sheet, memorisation
from tables import interval, print_table, wilson, write_table

JUDGEMENT = {           # keys by which a --json file of each command is known
    "faithfulness": ("n_fake_unjudged", "values", "summary", "not_judged"),
    "usefulness": ("n_held_out", "attributes"),
    "memorisation": ("near_ratio", "verdict", "flagged", "rows", "pairs"),
}
ASKED_COLORS = ("pink", "red", "white", "yellow", "purple")
LEARNT, HELD_OUT = "which the classifier is trained on", "which is held out"
SUMMARY = {             # rows of the short table: which values each pools
    "no polyps": [("polyp", "no polyps")],
    "a polyp": [("polyp", "a polyp")],
    "exactly {} polyps": [("count", v) for v in "12345678"],            # those that are asked for and judged
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
    a, contains = attributes, attributes.get("contains", ())
    out = [("place", c) for c in a.get("abnormality_cells", ())] + [("size", s) for s in a.get("sizes", ())]
    out += [("colour", c) for c in a.get("colors", ())] + [("paris", p) for p in a.get("paris", ())]
    none = a.get("n_polyps") == 0
    if none and not ("polyp" in contains or a.get("sizes") or a.get("paris")):  # they contradict it
        out.append(("polyp", "no polyps"))
    if a.get("n_polyps"):
        out.append(("count", count_value(a["n_polyps"])))
    if "polyp" in contains and not none:
        out.append(("polyp", "a polyp"))
    named = a.get("instrument_cells") or any(prompts.KIND.get(name) == "instrument" for name in contains)
    if a.get("n_instruments", bool(named)):
        out.append(("instruments", "some"))
    elif "n_instruments" in a and not named:
        out.append(("instruments", "none"))
    out += [(key, "with" if a[key] else "without") for key in ("box", "text") if key in a]
    out += [("procedure", a["procedure"])] if "procedure" in a else []
    return [pair for pair in out if pair in COLUMN]


# Counting


def share(hits, among):
    """Column-wise share of hits among the True of a mask; nan where the mask is empty."""
    n = among.sum(0)
    return torch.where(n > 0, (hits & among).sum(0) / n, float("nan"))


def report(predicted, targets, truth_real, predicted_held_out, truth_held_out, trained_on=None):
    """Rows of three tables, by VALUES, by SUMMARY and of confusions, and the values not judged, with reasons.

    predicted, targets (n, values) bool: the classifier's output on generated images, the values that their
    prompts name. truth_real, truth_held_out (n, values) int8: 1, 0 or UNKNOWN; trained_on: that of the
    classifier's own images, if these are more than truth_real's.

    chance: the share if the same images were dealt at random to the prompts that ask for any value of the
    attribute; nan where all ask for the same. base rate: the share of real images that show it.
    """
    known = truth_held_out != UNKNOWN
    accuracy = share(predicted_held_out == (truth_held_out == 1), known)
    sensitivity = share(predicted_held_out, truth_held_out == 1)
    only_real = share(same_set(predicted_held_out, truth_held_out == 1), truth_held_out == 1)
    base_rate = share(truth_real == 1, truth_real != UNKNOWN)
    chance = torch.empty(len(VALUES))
    for span in SLICE.values():
        asked = targets[:, span].any(1)
        chance[span] = predicted[asked, span].float().mean(0)
        if len(targets[asked, span].unique(dim=0)) < 2:                 # all ask for the same
            chance[span] = math.nan
    n, hits = targets.sum(0), (predicted & targets).sum(0)
    only = (same_set(predicted, targets) & targets).sum(0)
    why = cannot_judge(truth_real if trained_on is None else trained_on)

    def row(name, columns, judged):
        weight = n[columns] / n[columns].sum()                          # the prompts' mix of values
        n_all, n_hits = int(n[columns].sum()), int(hits[columns].sum())
        tested = ~sensitivity[columns].isnan()                          # values that a held-out image shows
        n_images = int(targets[:, columns].any(1).sum())                # a prompt may name several values
        low, high = wilson(round(n_hits / n_all * n_images), n_images)

        def perfect(shares):
            return float((shares[columns] * weight)[tested].sum() / weight[tested].sum())

        return {"asked for": name, "n": n_images, "share": n_hits / n_all, "low": low, "high": high,
                "sensitivity": perfect(sensitivity), "only": int(only[columns].sum()) / n_all,
                "only_real": perfect(only_real), "accuracy": float(judged),
                "chance": float((chance[columns] * weight).sum()),
                "base_rate": float((base_rate[columns] * weight).sum())}

    judged = [i for i in range(len(VALUES)) if n[i] and i not in why]
    rows = [{"attribute": VALUES[i][0]} | row(VALUES[i][1], [i], accuracy[i]) for i in judged]
    summary = []
    for name, pairs in SUMMARY.items():
        columns = [COLUMN[p] for p in pairs if COLUMN[p] in judged]
        if columns:
            right = accuracy[columns].nanmean()
            if pairs[0][0] == "count":                                  # the whole count must be right
                counts = SLICE["count"]
                right = share((predicted_held_out[:, counts] & (truth_held_out[:, counts] == 1)).any(1),
                              known[:, counts].all(1))
            summary.append(row(name.format(", ".join(VALUES[i][1] for i in columns)), columns, right))
    not_judged = [f"{' '.join(VALUES[i])}: {why[i]}" for i in why if n[i]]
    return rows, summary, confusions(predicted, targets, judged), not_judged


def same_set(predicted, targets):
    """(n, values) bool: whether an attribute's predicted values are the targets, none missing, none more."""
    out = torch.empty_like(targets)
    for span in SLICE.values():
        out[:, span] = (predicted[:, span] == targets[:, span]).all(1, keepdim=True)
    return out


def confusions(predicted, targets, judged):
    """Of each judged value a row: how often the classifier found which values where prompts ask for it."""
    rows = []
    for i in judged:
        attribute, value = VALUES[i]
        shown = predicted[targets[:, i], SLICE[attribute]]
        found = dict(zip(ATTRIBUTES[attribute][1], shown.sum(0).tolist(), strict=True))
        found["none of these"] = int((~shown.any(1)).sum())
        found = {v: k for v, k in sorted(found.items(), key=lambda pair: -pair[1]) if k}
        rows.append({"attribute": attribute, "asked for": value, "n": len(shown), "found": found})
    return rows


def degraded_rows(net, images, labels, trained_on, seed):
    """What the classifier still finds in held-out images (n, 3, size, size) that are no longer good ones.

    A row a kind of damage, an attribute a column: of the judged values that the undamaged images show, the
    share that is found. Where damage costs nothing, images so damaged would get a good figure.
    """
    generator, size = torch.Generator().manual_seed(seed), images.shape[-1]
    x, width = images.float(), size // 8 // 2 * 2 + 1
    kinds = {"as they are": x,
             f"blurred, {width} x {width} px": F.avg_pool2d(x, width, 1, width // 2, count_include_pad=False),
             "noise of 50 grey levels": x + 50 * torch.randn(x.shape, generator=generator),
             "right half of another": torch.cat([x[..., :size // 2], x.roll(1, 0)[..., size // 2:]], dim=-1),
             "another image": x.roll(1, 0)}
    why = cannot_judge(trained_on)
    judged = torch.tensor([i not in why for i in range(len(VALUES))])
    rows = []
    for name, img in kinds.items():
        hits = predict(net, img.clamp(0, 255).byte())
        shown = (labels == 1) & judged
        rows.append({"held-out images": name} | {
            attribute: float((hits & shown)[:, span].sum() / shown[:, span].sum())
            for attribute, span in SLICE.items() if shown[:, span].any()})
    return rows


def real_images(folder, held_out, size, mirror=None):
    """(records, images, labels), twice: to train on and held out, which are 10 % unless a folder is given.

    mirror: a value of --mirror; the copies stand behind the images to train on.
    """
    train, rest, total = real_records(folder, held_out, size, mirror)
    return labelled(train, folder, size, total), labelled(rest, held_out or folder, size, total)


def real_records(folder, held_out, size, mirror=None):
    """(records to train on, those that are held out, the number of images if both are of one folder)."""
    train = data.read_folder(folder)
    total = None if held_out else len(train)
    train, rest = (train, data.read_folder(held_out)) if held_out else data.split(train)
    if not rest:
        raise BadInput(f"{folder}: 1 image, expected at least 2, one of them to hold out, or --held-out")
    if held_out:
        duplicates.expect_others(rest, held_out, train, folder, LEARNT)
    return mirrored.with_copies(train, mirror, size, wording.Wording())[0], rest, total


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
    real = real_images(args.real, args.held_out, args.size, args.mirror)
    (train, images, labels), (held_out, held_out_images, held_out_labels) = real
    duplicates.expect_others(fake, args.fake, train, args.real, LEARNT)
    duplicates.expect_others(fake, args.fake, held_out, args.held_out or args.real, HELD_OUT)
    net = classifier_of(args.real, train, images, labels, args)
    own = torch.tensor([not r.mirror for r in train])
    rows, summary, confused, not_judged = report(predict(net, fake_images), targets, labels[own],
                                                 predict(net, held_out_images), held_out_labels, labels)
    protocol = {"real": str(args.real), "fake": str(args.fake),
                "held_out": str(args.held_out or "10 % of real"),
                "n_train": int(own.sum()), "n_mirrored": int((~own).sum()), "mirror": args.mirror,
                "n_held_out": len(held_out), "n_fake": len(fake),
                "n_fake_unjudged": int((~targets.any(1)).sum()),
                "n_fake_repeats": repeats(fake_images, args.device),
                "size": args.size, "steps": args.steps, "seed": args.seed}
    print(f"{len(fake)} generated images of {args.fake}, "
          f"{protocol['n_fake_unjudged']} with prompts that ask for nothing judged, "
          f"{protocol['n_fake_repeats']} that show again what another does\n"
          f"{protocol['n_train']} real images of {args.real} to train on"
          + f", {protocol['n_mirrored']} mirrored copies of them" * bool(args.mirror)
          + f", {len(held_out)} held out; {args.size} px, seed {args.seed}\n")
    degraded = degraded_rows(net, held_out_images, held_out_labels, labels, args.seed) if rows else []
    if rows:
        print_faithfulness(rows, summary, confused, degraded)
    for line in not_judged:
        print(f"not judged: {line}")
    if args.json:
        write_table(args.json, protocol | {"values": rows, "summary": summary, "confusions": confused,
                                           "degraded": degraded, "not_judged": not_judged})


def print_faithfulness(rows, summary, confused, degraded):
    columns = {"asked for": "asked for", "n": "n", "share": "share", "95 % interval": interval,
               "sensitivity": "sensitivity", "only": "only", "only, real": "only_real",
               "accuracy": "accuracy", "chance": "chance", "base rate": "base_rate"}
    print_table(rows, {"attribute": "attribute"} | columns)
    print()
    print_table(summary, columns)
    print("\nshare: of the n images whose prompt asks for it, those that the classifier finds it in; where\n"
          "a prompt names several values, the mean over these.\n"
          "sensitivity: the same of held-out real images that show it: what perfect images would score.\n"
          "only: those in which it finds what the prompt asks for and no other value of the attribute:\n"
          "polyps in all cells would have a share of 1. only, real: the same of held-out real images.\n"
          "accuracy: of all held-out real images, those that the classifier judges correctly.\n"
          "chance: the share if these images were dealt to these prompts at random. base rate: of the real\n"
          "images, those that show it, which one image for all prompts may exceed; its share is its chance.\n"
          "Where all prompts ask for the same, there is no chance.\n")
    print_table(confused, {"attribute": "attribute", "asked for": "asked for", "n": "n", "found": lambda row:
                           ", ".join(f"{value} {k}" for value, k in row["found"].items())})
    print("\nfound: what the classifier finds where this is asked for, and in how many of the n images.\n")
    print_table(degraded, {key: key for key in degraded[0]})
    print("\nWhat it still finds, of what held-out images show, after damage: images so damaged would score "
          "it.\nanother image: what is found by chance.\n")


def evaluation_prompts(colors):
    """One prompt for each value of the faithfulness table."""
    attributes = [{"n_polyps": 0}, {"contains": ["polyp"]}, *({"n_polyps": n} for n in (1, 2, 3)),
                  *({"abnormality_cells": [c]} for c in prompts.CELLS),
                  *({"sizes": [s]} for s in prompts.SIZES),
                  {"n_instruments": 0}, {"n_instruments": 1},
                  {"box": True}, {"box": False}, {"text": True}, {"text": False},
                  *({"colors": [c]} for c in colors)]
    return [prompts.write(a) for a in attributes]


def repeated_prompts(n, colors=ASKED_COLORS):
    """The evaluation prompts, each n times."""
    return [p for p in evaluation_prompts(colors) for _ in range(n)]


def write_prompts(args):
    """The evaluation prompts, each --per-value times, as a csv with the column Prompt."""
    lines = repeated_prompts(args.per_value, args.colors)
    write_csv(args.out, ["Prompt"], [[p] for p in lines])
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
    """Compare a classifier of generated images with one of as many real images, with as few facts each."""
    real = real_images(args.real, args.held_out, args.size)
    (train, images, labels), (held_out, test_images, test_labels) = real
    fake, fake_images, fake_labels = labelled(data.read_folder(args.fake), args.fake, args.size)
    duplicates.expect_others(fake, args.fake, train, args.real, LEARNT)
    duplicates.expect_others(fake, args.fake, held_out, args.held_out or args.real, HELD_OUT)
    on_all = classifier_of(args.real, train, images, labels, args)
    rng = random.Random(args.seed)
    n, n_facts = min(len(train), len(fake)), max(
        1, round(sum(len(facts_of(r)) for r in fake) / len(fake)))
    a, b = rng.sample(range(len(train)), n), rng.sample(range(len(fake)), n)
    few_labels = labels_from_facts([train[i] for i in a], n_facts, rng)
    on_real = train_classifier(images[a], few_labels, args.steps, args.seed, device=args.device)
    on_fake = train_classifier(fake_images[b], fake_labels[b], args.steps, args.seed, device=args.device)
    why, asked = cannot_judge(labels), (fake_labels == 1).any(0)
    fit = torch.tensor([i not in why for i in range(len(VALUES))])
    not_judged = [f"{' '.join(VALUES[i])}: {why[i]}" for i in why if asked[i]]
    rows = balanced_rows(fit, {"real-train": (predict(on_real, test_images), test_labels),
                               "GAN-train": (predict(on_fake, test_images), test_labels),
                               "real-test": (predict(on_all, test_images), test_labels),
                               "GAN-test": (predict(on_all, fake_images), fake_labels)})
    if not rows:
        raise BadInput(f"{args.fake}: expected prompts with an attribute present in some images of both "
                       f"folders and absent in others, as those of {args.real}")
    n_repeats = repeats(fake_images, args.device)
    print(f"{args.real}: {len(train)} real images, {len(held_out)} held out; "
          f"{args.fake}: {len(fake)} generated images, {n_repeats} that show again what another does, "
          f"{n_facts} fact{'s' * (n_facts != 1)} each; "
          f"{args.size} px, {args.steps} steps, seed {args.seed}\n")
    print_table(rows, {"values" if key == "n_values" else key: key for key in rows[0]})
    print("\nBalanced accuracy, mean over the attribute's values: the share judged correctly of the images\n"
          "with a value and of those without, averaged; 0.5 is chance.\n"
          f"real-train, GAN-train: trained on {n} real and on {n} generated images, each with labels from\n"
          "as many facts of their prompts, and tested on held-out real ones. real-test, GAN-test: trained\n"
          "on all real images with all their labels, tested on held-out real and on generated ones.\n"
          "Copies of training images would do well: see judges.py memorisation. One good image a prompt,\n"
          "repeated, would do well in GAN-test.")
    for line in not_judged:
        print(f"not judged: {line}")
    if args.json:
        write_table(args.json, {
            "real": str(args.real), "fake": str(args.fake), "n_train": n, "n_facts": n_facts,
            "n_real": len(train), "n_held_out": len(held_out), "n_fake": len(fake),
            "n_fake_repeats": n_repeats, "size": args.size, "steps": args.steps, "seed": args.seed,
            "attributes": rows, "not_judged": not_judged})


def facts_of(record):
    """[{attribute: value}, ...] of the prompts of an image; one prompt may say several."""
    return [{key: value} for key, value in merge([prompts.parse(p) for p in record.prompts]).items()]


def labels_from_facts(records, n_facts, rng):
    """Labels of real images from n_facts of what their prompts say, as few as generated ones have."""
    own = [facts_of(r) for r in records]
    some = [rng.sample(facts, min(n_facts, len(facts))) for facts in own]
    return torch.tensor([truth_row(merge(few)) for few in some], dtype=torch.int8)


def balanced_rows(fit, tests):
    """{name: (predicted, labels)} -> a row an attribute: balanced accuracy by name, over testable values.

    fit (values,) bool: those that the classifier of real images can judge.
    """
    scores = {}
    for name, (predicted, labels) in tests.items():
        scores[name] = (share(predicted, labels == 1) + share(~predicted, labels == 0)) / 2
    testable = fit & ~torch.stack(list(scores.values())).isnan().any(0)
    rows = []
    for attribute, span in SLICE.items():
        use = testable[span]
        if use.any():
            rows.append({"attribute": attribute, "n_values": int(use.sum())}
                        | {name: float(score[span][use].mean()) for name, score in scores.items()})
    return rows


# Command line


def parse(argv):
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
    mirrored.add_flag(p)
    p = command(usefulness, "usefulness", "train on generated images and test on real ones, and the reverse")
    common(p, "--real", "data folder of real images")
    p.add_argument("--classifier", type=Path, help="file of their classifier; unset, one beside --real")
    p = command(memorisation, "memorisation", "whether generated images are copies of training images")
    common(p, "--train", "data folder that the model was trained on", trains=False)
    p.add_argument("--captions", type=Path, help="captions file that the model was trained with, when it is "
                   "not the folder's own")
    p.add_argument("--weights", help='Inception, not thumbnails, as features: a weights file or "published"')
    p.add_argument("--sheet", type=Path, help="image file of the closest pairs; unset, closest.png by --fake")
    p.add_argument("--pairs", type=int, default=24,
                   help="number of closest pairs in --json and, up to 1000, on the sheet")
    p = command(write_prompts, "prompts", "write the evaluation prompts of faithfulness as a csv file")
    p.add_argument("--out", type=Path, required=True, help="csv file to write, column Prompt")
    p.add_argument("--per-value", type=int, default=20, help="number of prompts for each value")
    p.add_argument("--colors", nargs="+", default=list(ASKED_COLORS),
                   choices=prompts.COLORS, metavar="COLOR", help="colours to write prompts for")
    args = parser.parse_args(argv)
    if "size" in args:
        if args.size % 16 or args.size < 32:
            raise BadInput(f"--size: expected a multiple of 16, at least 32, got {args.size}")
        if getattr(args, "sheet", None) and args.sheet.suffix.lower() not in data.SUFFIXES:
            raise BadInput(f"--sheet {args.sheet}: expected a name that ends in {', '.join(data.SUFFIXES)}")
        check_range(args, -2**63, 2**64 - 1, "seed")
    at_least_one(args, *(name for name in ("steps", "pairs", "per_value") if name in args))
    if args.command == "prompts" and args.out.suffix.lower() == ".txt":
        raise BadInput(f"--out {args.out}: a .txt is read as one prompt a line, this is a table; name a .csv")
    return args


def main(argv=None):
    args = parse(argv)
    if "device" in args:
        args.device = best_device(args.device)
    data.check_writable(**{name: getattr(args, name, None) for name in ("out", "json", "sheet")})
    check_outputs(args)
    for name in ("real", "train", "held_out", "fake"):
        if getattr(args, name, None):
            metrics.say_nested(getattr(args, name))
    return args.function(args)


def check_outputs(args):
    """BadInput where a file of a flag, or its default, would replace one of another kind."""
    command = args.command
    classifier = file_of(args.real, args) if "classifier" in args else None
    sheet = (args.sheet or default_sheet(args.fake)) if "sheet" in args else None
    check_replaced(
        out=(getattr(args, "out", None), "a file of judges.py prompts", is_prompts),
        classifier=(classifier, "a classifier that judges.py wrote", is_judge),
        sheet=(sheet, "a sheet of judges.py memorisation", is_sheet),
        json=(getattr(args, "json", None), f"a result of judges.py {command}",
              lambda path: is_json_with(path, *JUDGEMENT[command])))


if __name__ == "__main__":
    run_command(main)
