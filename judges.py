"""What the metrics cannot see: does a picture show what its prompt said, is it of use, was it copied?

faithfulness   a small classifier of the grammar's attributes, trained on real pictures, looks at generated ones.
usefulness     GAN-train and GAN-test (Shmelkov et al. 2018, arXiv:1807.09536, Sec. 3): the same classifier trained on
               generated pictures and tested on real ones, and the reverse.
memorisation   the nearest training picture of each generated one, beside those of held-out real pictures; authenticity
               (Alaa et al. 2022, arXiv:2102.08921).

    python judges.py prompts --out prompts.csv
    python sampler.py --ckpt runs/msdm/best.safetensors --prompts prompts.csv --out out/faithfulness
    python judges.py faithfulness --real data/phantom --fake out/faithfulness
    python judges.py usefulness --real data/phantom --fake out/pictures
    python judges.py memorisation --train data/phantom --held-out data/phantom-test --fake out/pictures
"""

import argparse
import csv
import math
import random
from pathlib import Path

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
    merge,
    predict,
    train_classifier,
    truth,
    truth_row,
)
from command import BadInput, best_device, run_command
from files import replacing, write_json
from inception import Inception

MIN_EXAMPLES = 5        # training pictures below which a value is not judged
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


def asked(attributes: dict) -> list[tuple]:
    """The values that a prompt asks for in so many words: "2 polyps" asks for a count, not for presence too."""
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
    """95 % interval of a share (Wilson 1927): stays inside [0, 1] and is honest for small n."""
    if n == 0:
        return 0.0, 1.0
    p, zz = successes / n, z * z / n
    middle, half = p + zz / 2, z * math.sqrt(p * (1 - p) / n + zz / (4 * n))
    return max(0.0, min(p, (middle - half) / (1 + zz))), min(1.0, max(p, (middle + half) / (1 + zz)))    # p: rounding


def share(hits, among):
    """Column-wise share of hits among the True of a mask; nan where the mask is empty."""
    n = among.sum(0)
    return torch.where(n > 0, (hits & among).sum(0) / n, float("nan"))


def report(shown, wanted, truth_real, shown_held_out, truth_held_out):
    """Rows of the two tables, one for each of VALUES and one for each line of SUMMARY, and values too rare to judge.

    shown, wanted (n, values) bool: what the classifier sees in generated pictures, what their prompts asked for.
    """
    known = truth_held_out != UNKNOWN
    accuracy = share(shown_held_out == (truth_held_out == 1), known)
    seen = share(shown_held_out, truth_held_out == 1)
    chance = share(truth_real == 1, truth_real != UNKNOWN)
    n, hits = wanted.sum(0), (shown & wanted).sum(0)
    enough = (truth_real == 1).sum(0) >= MIN_EXAMPLES

    def row(name, columns, judged):
        weight = n[columns] / n[columns].sum()                          # the mix that was asked for
        n_all, n_hits = int(n[columns].sum()), int(hits[columns].sum())
        ever = ~seen[columns].isnan()                                   # values that a held-out picture shows
        low, high = wilson(n_hits, n_all)
        return {"asked for": name, "n": n_all, "share": n_hits / n_all, "low": low, "high": high,
                "seen": float((seen[columns] * weight)[ever].sum() / weight[ever].sum()), "accuracy": float(judged),
                "chance": float((chance[columns] * weight).sum())}

    rows = [{"attribute": attribute} | row(value, [i], accuracy[i])
            for i, (attribute, value) in enumerate(VALUES) if n[i] and enough[i]]
    summary = []
    for name, pairs in SUMMARY.items():
        columns = [COLUMN[p] for p in pairs if n[COLUMN[p]] and enough[COLUMN[p]]]
        if columns:
            judged = accuracy[columns].nanmean()
            if pairs[0][0] == "count":                                  # the whole count must be right
                counts = SLICE["count"]
                judged = share((shown_held_out[:, counts] & (truth_held_out[:, counts] == 1)).any(1),
                               known[:, counts].all(1))
            summary.append(row(name, columns, judged))
    return rows, summary, [f"{a} {v}" for i, (a, v) in enumerate(VALUES) if n[i] and not enough[i]]


def print_table(rows, columns):
    """columns: {heading: key of a row, or function of a row -> text}; text is flush left, numbers flush right."""
    def cell(row, column):
        value = column(row) if callable(column) else row[column]
        return ("-" if math.isnan(value) else f"{value:.3f}") if isinstance(value, float) else str(value)

    lines = [list(columns), *([cell(row, c) for c in columns.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = [isinstance(c, str) and isinstance(rows[0][c], str) for c in columns.values()]
    for line in [lines[0], ["-" * w for w in widths], *lines[1:]]:
        padded = [c.ljust(w) if to_left else c.rjust(w) for c, w, to_left in zip(line, widths, left, strict=True)]
        print("  ".join(padded).rstrip())


def interval(row):
    return f"{row['low']:.2f}-{row['high']:.2f}"


def real_pictures(folder, held_out, size):
    """(records, images, labels) of the pictures to train on and of those held out: 10 % unless a folder is given."""
    train = data.read_folder(folder)
    train, rest = (train, data.read_folder(held_out)) if held_out else data.split(train)
    return labelled(train, folder, size), labelled(rest, held_out or folder, size)


def labelled(records, folder, size):
    images, records = data.load_images(records, size)
    return records, images, truth(records, folder)


# Faithfulness

def faithfulness(args):
    """Per value: how many of the pictures whose prompt asks for it show it."""
    fake_images, fake = data.load_images(data.read_folder(args.fake), args.size)
    wanted = torch.zeros(len(fake), len(VALUES), dtype=torch.bool)
    for i, record in enumerate(fake):
        for pair in asked(merge([prompts.parse(p) for p in record.prompts])):
            wanted[i, COLUMN[pair]] = True
    if not wanted.any():
        raise BadInput(f"{args.fake}: no prompt asks for anything that is judged ({', '.join(ATTRIBUTES)}); "
                       f"the first is {fake[0].prompts[0]!r}")
    real = real_pictures(args.real, args.held_out, args.size)
    (train, images, labels), (held_out, held_out_images, held_out_labels) = real
    net = classifier_of(args.real, train, images, labels, args)
    rows, summary, rare = report(predict(net, fake_images), wanted, labels,
                                 predict(net, held_out_images), held_out_labels)
    protocol = {"real": str(args.real), "fake": str(args.fake), "held_out": str(args.held_out or "10 % of real"),
                "n_train": len(train), "n_held_out": len(held_out), "n_fake": len(fake),
                "n_fake_unjudged": int((~wanted.any(1)).sum()), "size": args.size, "steps": args.steps,
                "seed": args.seed}
    print(f"{len(fake)} generated pictures of {args.fake}, "
          f"{protocol['n_fake_unjudged']} with prompts that ask for nothing judged\n"
          f"{len(train)} real pictures of {args.real} to train on, {len(held_out)} held out; "
          f"{args.size} px, seed {args.seed}\n")
    columns = {"asked for": "asked for", "n": "n", "share": "share", "95 % interval": interval, "seen in real": "seen",
               "accuracy": "accuracy", "chance": "chance"}
    if rows:
        print_table(rows, {"attribute": "attribute"} | columns)
        print()
        print_table(summary, columns)
        print("\nshare: of the n pictures whose prompt asks for it, those that show it, with Wilson's interval.\n"
              "seen in real: the same of held-out real pictures that do show it: what perfect pictures would score.\n"
              "accuracy: of all held-out real pictures, those that the classifier judges rightly.\n"
              "chance: of the real pictures, those that show it: what pictures that ignore their prompts would score.")
    if rare:
        print(f"not judged, fewer than {MIN_EXAMPLES} real pictures show it: {', '.join(rare)}")
    if args.json:
        write_json(args.json, protocol | {"values": rows, "summary": summary, "not_judged": rare})


def evaluation_prompts(colors):
    """One prompt for each value of the faithfulness table."""
    wanted = [{"n_polyps": 0}, {"contains": ["polyp"]}, *({"n_polyps": n} for n in (1, 2, 3)),
              *({"abnormality_cells": [c]} for c in prompts.CELLS), *({"sizes": [s]} for s in prompts.SIZES),
              {"n_instruments": 0}, {"n_instruments": 1}, {"box": True}, {"box": False}, {"text": True},
              {"text": False},
              *({"colors": [c]} for c in colors)]
    return [prompts.write(a) for a in wanted]


def write_prompts(args):
    lines = [p for p in evaluation_prompts(args.colors) for _ in range(args.per_value)]
    with replacing(args.out) as tmp, open(tmp, "w", newline="", encoding="utf-8") as f:
        csv.writer(f, lineterminator="\n").writerows([["Prompt"], *([p] for p in lines)])
    print(f"{args.out}: {len(lines)} prompts, {args.per_value} a value")


# Usefulness

def usefulness(args):
    """What a classifier learns from generated pictures beside what one learns from as many real ones, told as little."""
    (train, images, labels), (held_out, test_images, test_labels) = real_pictures(args.real, args.held_out, args.size)
    fake, fake_images, fake_labels = labelled(data.read_folder(args.fake), args.fake, args.size)
    on_all = classifier_of(args.real, train, images, labels, args)
    rng = random.Random(args.seed)
    n, n_prompts = min(len(train), len(fake)), round(sum(len(r.prompts) for r in fake) / len(fake))
    a, b = rng.sample(range(len(train)), n), rng.sample(range(len(fake)), n)
    on_real = train_classifier(images[a], said([train[i] for i in a], n_prompts, rng), args.steps, args.seed, device=args.device)
    on_fake = train_classifier(fake_images[b], fake_labels[b], args.steps, args.seed, device=args.device)
    rows = balanced_rows({"real-train": (predict(on_real, test_images), test_labels),
                          "GAN-train": (predict(on_fake, test_images), test_labels),
                          "real-test": (predict(on_all, test_images), test_labels),
                          "GAN-test": (predict(on_all, fake_images), fake_labels)})
    if not rows:
        raise BadInput(f"{args.fake}: its prompts name no attribute that {args.real} knows, both present and absent")
    print(f"{args.real}: {len(train)} real pictures, {len(held_out)} held out; {args.fake}: {len(fake)} generated ones, "
          f"{n_prompts} prompt{'s' * (n_prompts > 1)} each; {args.size} px, {args.steps} steps, seed {args.seed}\n")
    print_table(rows, {"values" if key == "n_values" else key: key for key in rows[0]})
    print("\nBalanced accuracy, mean over the attribute's values: the share judged rightly of the pictures with a\n"
          "value and of those without, averaged; 0.5 is chance.\n"
          f"real-train, GAN-train: trained on {n} real and on {n} generated pictures, each known by as many prompts, and\n"
          "tested on held-out real ones. real-test, GAN-test: trained on all real pictures and all that is known of them,\n"
          "tested on held-out real and on generated ones.")
    if args.json:
        write_json(args.json, {"real": str(args.real), "fake": str(args.fake), "n_train": n, "n_prompts": n_prompts,
                                       "n_real": len(train), "n_held_out": len(held_out), "n_fake": len(fake), "size": args.size,
                                       "steps": args.steps, "seed": args.seed, "attributes": rows})


def said(records, n_prompts, rng):
    """Labels of real pictures by n_prompts of their prompts alone: as little as is known of generated ones."""
    some = [rng.sample(r.prompts, min(n_prompts, len(r.prompts))) for r in records]
    return torch.tensor([truth_row(merge([prompts.parse(p) for p in few])) for few in some], dtype=torch.int8)


def balanced_rows(tests):
    """{name: (shown, labels)} -> a row an attribute: its balanced accuracy in each, over values that all can test."""
    scores = {}
    for name, (shown, labels) in tests.items():
        scores[name] = (share(shown, labels == 1) + share(~shown, labels == 0)) / 2
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
    """How close generated pictures come to training pictures, beside pictures that cannot have been copied from them."""
    train = any_pictures(args.train)
    train, held_out = (train, any_pictures(args.held_out)) if args.held_out else data.split(train)
    images, train = data.load_images(train, args.size)
    others, held_out = data.load_images(held_out, args.size)
    fake_images, fake = data.load_images(any_pictures(args.fake), args.size)
    if len(train) < 2 or len(held_out) < 20:
        raise BadInput(f"expected at least 2 training pictures and 20 held out, got {len(train)} of {args.train} "
                       f"and {len(held_out)} of {args.held_out or args.train}")
    generator = torch.Generator().manual_seed(args.seed)
    some = torch.randperm(len(train), generator=generator)[:200]
    copies = augment(images[some], generator).round().clamp(0, 255).byte()
    named, embed = thumbnails_or_inception(args)
    known = features(embed, images, args.device)
    radius = nearest(known, known, skip_self=True)[0].clamp_min(1e-12)  # distance of training pictures to each other
    found = {"generated": nearest(features(embed, fake_images, args.device), known),
             "held-out real": nearest(features(embed, others, args.device), known),
             "altered copies": nearest(features(embed, copies, args.device), known)}
    d, i = found["held-out real"]
    near, near_for_its_place = d.quantile(0.01), (d / radius[i]).quantile(0.01)
    if near == 0:
        raise BadInput(f"{args.held_out or args.train}: expected held-out pictures other than those to train on, "
                       "1 % and more are the same")
    rows = []
    for name, (d, i) in found.items():
        close = (d < near) | (d / radius[i] < near_for_its_place)
        low, high = wilson(int(close.sum()), len(close))
        rows.append({"pictures": name, "n": len(d), "too close": float(close.float().mean()), "low": low, "high": high,
                     "authentic": float((d > radius[i]).float().mean()), "median distance": float(d.median())})
    generated, real, altered = rows
    verdict = ("COPIES: more generated pictures are too close than chance explains" if generated["low"] > real["high"] else
               "cannot tell: not even altered copies stand out in these features" if altered["low"] <= real["high"] else
               "SUSPICIOUS: more generated pictures are too close than held-out ones; too few are held out to be sure"
               if generated["low"] > real["too close"] else
               "no sign of copying: about as many generated pictures are too close as held-out ones")
    print(f"{len(train)} training pictures of {args.train}; {args.size} px; distances of {named}\n")
    print_table(rows, {"pictures": "pictures", "n": "n", "too close": "too close", "95 % interval": interval,
                       "authentic": "authentic", "median distance": "median distance"})
    print(f"\ntoo close: nearer to a training picture than all but 1 % of held-out ones, below {near:.4g} or below "
          f"{near_for_its_place:.4g} times\nthe distance from that training picture to its own nearest. "
          "authentic: farther than once that distance.\n"
          "altered copies: training pictures with other light, blur, noise and a pixel's shift: how copies would score.\n"
          f"\n{verdict}")
    d, i = found["generated"]
    order = torch.minimum(d / near, d / radius[i] / near_for_its_place).argsort()[:args.pairs].tolist()
    pairs = [{"generated": fake[j].name, "training": train[i[j]].name, "distance": float(d[j]),
              "ratio": float(d[j] / radius[i[j]])} for j in order]
    sheet = args.sheet or Path(args.fake) / "closest.png"
    draw_pairs(sheet, [(fake_images[j], images[i[j]]) for j in order], [p["ratio"] for p in pairs])
    print(f"the {len(pairs)} closest pairs, generated left, training right: {sheet}")
    if args.json:
        write_json(args.json, {"train": str(args.train), "held_out": str(args.held_out or "10 % of train"),
                                       "fake": str(args.fake), "features": named, "size": args.size, "seed": args.seed,
                                       "near": float(near), "near_ratio": float(near_for_its_place), "verdict": verdict,
                                       "flagged": verdict.startswith("COPIES"), "rows": rows, "pairs": pairs})


def any_pictures(folder):
    """The pictures of a data folder or of a plain one: what was said of them does not matter here."""
    return [data.Record(path, path.name, []) for path in metrics.image_files(folder)]


def thumbnails_or_inception(args):
    """(name, function uint8 images -> features) that distances are taken in.

    Features of the attribute classifier will not do: they forget what is no attribute. Of altered copies of phantoms 3 %
    lay nearer than all but 1 % of held-out pictures in them, and all in thumbnails.
    """
    if not args.weights:
        return "colour thumbnails of 16 x 16 at one brightness and contrast", thumbnails
    net = Inception(None if args.weights == "published" else args.weights).to(args.device).eval()
    return f"Inception's 2,048 features, weights {net.source[:12]}", lambda img: net(img)["2048"]


def thumbnails(img):
    x = F.adaptive_avg_pool2d(img.float(), 16).flatten(1)
    return F.normalize(x - x.mean(1, keepdim=True))


@torch.inference_mode()
def features(embed, images, device, batch_size=64):
    """(n, d) float32 features of uint8 images."""
    starts = trange(0, len(images), batch_size, desc="features", delay=2, leave=False)
    return torch.cat([embed(images[i:i + batch_size].to(device)).float().cpu() for i in starts])


def nearest(a, b, skip_self=False, chunk=1024):
    """(distance, index) of the row of b nearest to each row of a; skip_self: a is b, and no row its own neighbour."""
    index = []
    square = (b * b).sum(1)
    for i in range(0, len(a), chunk):
        d = square - 2 * a[i:i + chunk] @ b.T                           # less |a|^2, which changes no order
        if skip_self:
            d[range(len(d)), range(i, i + len(d))] = torch.inf
        index.append(d.argmin(1))
    index = torch.cat(index)
    return (a - b[index]).norm(dim=1), index                            # afresh: the sum above rounds small distances


def draw_pairs(path, pairs, numbers, side=128, columns=4, gap=6, line=14):
    """Pairs of uint8 pictures beside each other, closest first, a number below each."""
    rows = -(-len(pairs) // columns)
    sheet = Image.new("RGB", (columns * (2 * side + gap) + gap, rows * (side + line + gap) + gap), "white")
    pen = ImageDraw.Draw(sheet)
    for k, (pair, number) in enumerate(zip(pairs, numbers, strict=True)):
        x, y = gap + k % columns * (2 * side + gap), gap + k // columns * (side + line + gap)
        for j, img in enumerate(pair):
            sheet.paste(Image.fromarray(img.permute(1, 2, 0).numpy()).resize((side, side)), (x + j * side, y))
        pen.text((x, y + side + 1), f"{number:.3g}", fill="black")
    with replacing(path) as tmp:
        sheet.save(tmp)


# Command line

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(function, name, summary):
        p = commands.add_parser(name, help=summary, description=summary,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        p.set_defaults(function=function)
        return p

    def pictures(p, real, what, trains=True):
        p.add_argument(real, type=Path, required=True, help=what)
        p.add_argument("--fake", type=Path, required=True, help="generated pictures, as sampler.py wrote them")
        p.add_argument("--held-out", type=Path, help=f"data folder of other real pictures; without it 10 %% of {real}")
        p.add_argument("--size", type=int, default=64, help="side of the pictures as they are judged, pixels")
        if trains:
            p.add_argument("--steps", type=int, default=1000, help="optimiser steps of the classifier, 64 pictures each")
        p.add_argument("--seed", type=int, default=0, help="seed of everything drawn at random")
        p.add_argument("--device", default="auto", help="cpu, cuda or auto")
        p.add_argument("--json", type=Path, help="file for every number of the tables")

    p = command(faithfulness, "faithfulness", "how often generated pictures show what their prompts said")
    pictures(p, "--real", "data folder that the classifier learns from, of another seed than the model's")
    p.add_argument("--classifier", type=Path, help="file of the trained classifier; without it one beside --real")
    p = command(usefulness, "usefulness", "what a classifier of generated pictures knows of real ones, and the reverse")
    pictures(p, "--real", "data folder of real pictures")
    p.add_argument("--classifier", type=Path, help="file of the classifier of all of them; without it one beside --real")
    p = command(memorisation, "memorisation", "whether generated pictures are copies of training pictures")
    pictures(p, "--train", "data folder that the model was trained on", trains=False)
    p.add_argument("--weights", help='Inception features instead of thumbnails: a file of weights, or "published"')
    p.add_argument("--sheet", type=Path, help="picture of the closest pairs; without it closest.png in --fake")
    p.add_argument("--pairs", type=int, default=24, help="how many of the closest pairs to show")
    p = command(write_prompts, "prompts", "the evaluation prompts of the faithfulness table, as a csv for sampler.py")
    p.add_argument("--out", type=Path, required=True, help="csv file to write, column Prompt")
    p.add_argument("--per-value", type=int, default=20, help="prompts for each value asked for")
    p.add_argument("--colors", nargs="+", default=["pink", "red", "white", "yellow", "purple"], choices=prompts.COLORS,
                   metavar="COLOR", help="colours to ask for: those of the phantom")
    args = parser.parse_args(argv)
    if "device" in args:
        args.device = best_device(args.device)
        if args.size % 16 or args.size < 32:
            raise BadInput(f"--size: expected a multiple of 16, at least 32, got {args.size}")
        if getattr(args, "sheet", None) and args.sheet.suffix.lower() not in data.SUFFIXES:
            raise BadInput(f"--sheet {args.sheet}: expected a name that ends in {', '.join(data.SUFFIXES)}")
        if getattr(args, "steps", 1) < 1:
            raise BadInput(f"--steps: expected at least 1, got {args.steps}")
    args.function(args)


if __name__ == "__main__":
    run_command(main)
