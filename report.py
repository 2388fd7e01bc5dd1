"""The page of a run, report.html: settings, curves, images, metrics, faithfulness, copies, failures.

It shows what the run's folder holds and what sampler.py, metrics.py and judges.py wrote of it; it measures
nothing. What is missing stands in the page with the command that makes it. The page is one file without
scripts that loads nothing. The paper's figures are those of docs/paper.md.

    python report.py --run runs/demo/msdm
    python report.py --run runs/msdm --samples out/eval --metrics a.json b.json --faithfulness f.json

Without flags it takes the folders of images in out/, and beside the run, that were sampled from one of its
checkpoints (by its hash), and of the .json files in these folders and in the run's those that metrics.py and
judges.py wrote.
"""

from command import BadInput, run_command

import argparse
import json
import math
import shlex
from pathlib import Path

from PIL import ImageStat

import data
import prompts
from files import check_replaced, replacing
from findings import gather, number, read_samples, rows_of
from judges import requested
from page import (
    bars,
    check_matplotlib,
    curves,
    document,
    esc,
    figure,
    folded,
    missing,
    paragraph,
    picture,
    section,
    shown,
    table,
)
from pixels import open_image
from tables import is_number

MARK = "made by report.py"
# What is shown of more, so that a page stays below 5 MB: sheets, kinds of prompts, prompts in all, images of
# a prompt, closest pairs, lines of the log.
MOST_SHEETS, MOST_KINDS, MOST_PROMPTS, MOST_IMAGES, MOST_PAIRS, MOST_LINES = 6, 18, 72, 4, 12, 100
SHEET, THUMBNAIL = 640, 112                                 # longest sides of embedded images, pixels

KINDS = {  # what a prompt can name, see prompts.py
    "contains": "contents", "n_findings": "number of findings", "n_instruments": "number of instruments",
    "n_polyps": "number of polyps", "box": "green/black box", "text": "text", "colors": "colour",
    "sizes": "size", "paris": "Paris type", "procedure": "procedure",
    "abnormality_cells": "place of an abnormality", "instrument_cells": "place of an instrument",
    "landmark_cells": "place of a landmark"}
TITLES = {"vae": "Autoencoder", "msdm": "MSDM", "adapter of msdm": "Adapter on MSDM",
          "adapter of prior": "Adapter on the prior of Kandinsky 2.2",
          "adapter of decoder": "Adapter on the decoder of Kandinsky 2.2",
          "adapter of unet3": "Adapter on Kandinsky 3's U-Net"}

# Figures of the paper's running text (docs/paper.md), written as there.
MSDM_FIGURES = {
    "paper: MSDM, 100,000 steps": {"fid": "35", "precision": "0.82", "recall": "0.35"},
    "paper: with paraphrases": {"fid": "33.58", "precision": "0.929", "recall": "0.498", "f1": "0.648"}}
PAPER = {
    ("fid", "msdm"): MSDM_FIGURES, ("fid", "adapter of msdm"): MSDM_FIGURES,
    ("fid", "adapter of unet3"): {
        "paper: Kandinsky 3.0, every rank": {"fid": "90 to 110", "recall": "near 0.5"}}}
OFFICIAL = {"paper: submitted sets": {"fid": "close to 0.1"},
            "another team": {"fid": "0.099, 0.064", "inception_score": "2.33"}}
METRICS = (  # key, name, key of its spread, factor
    ("fid", "Frechet distance, FID (lower is better)", None, 1),
    ("fid_real_half", "distance of two halves of the real set", None, 1),
    ("fid_fake_half", "distance of half the real set and as many fakes", None, 1),
    ("fid_parts", "distance, mean of disjoint parts", "fid_parts_std", 1),
    ("kid", "KID × 1000 (lower is better)", "kid_error", 1000),
    ("precision", "precision (1 is best)", None, 1), ("recall", "recall (1 is best)", None, 1),
    ("f1", "F1", None, 1), ("density", "density", None, 1), ("coverage", "coverage (1 is best)", None, 1),
    ("fidelity", "fidelity (100 is best)", None, 1), ("agreement", "agreement (1 is best)", None, 1),
    ("diversity", "diversity", None, 1),
    ("inception_score", "Inception Score", "inception_score_std", 1),
    ("inception_score_real", "Inception Score of the real set", "inception_score_real_std", 1))


# Pieces


def command(script, *words):
    return " ".join(["python", script, *(shlex.quote(str(w)) for w in words)])


def sampling_command(found, images):
    """The command that samples with this run's weights; names in capitals are for the reader to replace."""
    s, best = found.settings, found.run / "best"
    model = s.get("model") or "MODEL"
    weights = {
        "msdm": ["--ckpt", f"{best}.safetensors"],
        "adapter of prior": ["--ckpt", model, "--decoder", s.get("decoder") or "DECODER",
                             "--prior-lora", best],
        "adapter of decoder": ["--ckpt", s.get("prior") or "PRIOR", "--decoder", model,
                               "--decoder-lora", best]}
    return command("sampler.py", *weights.get(found.kind, ["--ckpt", model, "--lora", best]),
                   "--prompts", "prompts.csv", "--solver", "dpmpp", "--steps", 20, "--out", images)


def fake_folder(found):
    """Where images of this run are, or would be: out/demo-msdm for runs/demo/msdm."""
    if found.samples:
        return found.samples.folder
    parts = found.run.absolute().parts
    below = parts[len(parts) - parts[::-1].index("runs"):] if "runs" in parts else parts[-1:]
    return Path("out") / ("-".join(below) or "report")


def evenly(items, most):
    """At most so many of a list, evenly spaced, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def image_or_failure(found, path):
    """The PIL image of a file; a line among the failures where it cannot be read (None) or is flat."""
    try:
        img = open_image(path)
    except BadInput as error:
        found.failures.append(str(error))
        return None
    if max(ImageStat.Stat(img).stddev) < 2:
        found.failures.append(f"{path}: every pixel has nearly the same colour")
    return img


def as_text(value):
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def everything(path, values):
    """Every value of a file, folded away: what the page does not choose to show can still be read."""
    def leaves(value, name):
        if isinstance(value, dict):
            for k, v in value.items():
                yield from leaves(v, f"{name}.{k}" if name else k)
        elif isinstance(value, list) and any(isinstance(v, dict | list) for v in value):
            for i, v in enumerate(value):
                yield from leaves(v, f"{name}[{i}]")
        else:
            yield name, as_text(value)

    return folded(f"Everything in {path}", table((), leaves(values, ""), "facts"))


# Sections


def overview(found):
    """Tiles with the figures that people ask for first."""
    steps = max((line["step"] for line in found.log), default=0)
    tiles = [(shown(steps), f"steps of {shown(found.images_a_step)} images")]
    held_out = [line for line in found.log if is_number(line.get("val_loss"))]
    if held_out:
        best = min(held_out, key=lambda line: line["val_loss"])
        tiles.append((f"{best['val_loss']:.4g}", f"lowest held-out loss, at step {best['step']:,}"))
        if found.kind == "vae" and is_number(mse := best.get("val_mse")) and mse > 0:
            psnr = 10 * math.log10(4 / mse)                 # images span [-1, 1]: the peak is 2
            tiles.append((f"{psnr:.1f} dB", "PSNR of held-out reconstructions, by their squared error"))
    for path, values in found.metrics[:1]:
        fid = shown(number(path, values, "fid"))
        tiles.append((fid, f"FID, protocol {values['protocol']}; see its limits"))
    if found.faithfulness:
        path, values = found.faithfulness
        rows = rows_of(path, values, "values", *SHARE)
        rows = [[number(path, r, k) or 0 for k in ("n", "share")] for r in rows]
        if total := sum(n for n, _ in rows):
            hits = sum(n * share for n, share in rows) / total
            tiles.append((f"{hits:.0%}", f"of {shown(total)} requests of prompts, found by the judge"))
    if found.memorisation:
        verdict = str(found.memorisation[1]["verdict"]).split(":")[0]
        tiles.append((verdict[:1].upper() + verdict[1:], "verdict on copies of training images"))
    tiles = (f'<div class="tile"><b>{esc(big)}</b><span>{esc(small)}</span></div>' for big, small in tiles)
    return f'<div class="tiles">{"".join(tiles)}</div>'


def samples_over_time(found):
    title = "Samples over time"
    if not found.sheets:
        why = ("a prior alone draws none, train it with --decoder" if found.kind == "adapter of prior" else
               "the run has not come to its first checkpoint (--save-every), or --shown was 0")
        return section("time", title, missing(f"No sheets in {found.run / 'samples'}: {why}."))
    if found.kind == "vae":
        protocol = "Held-out images above, their reconstructions below; the same images at every step."
    else:
        protocol = (f"Generated: {shown(found.settings.get('shown'))} images of held-out prompts with the "
                    f"averaged (EMA) weights, dpmpp, {shown(found.settings.get('sample_steps'))} steps; the "
                    "same prompts and seeds at every step.")
    chosen = evenly(found.sheets, MOST_SHEETS)
    images = [(int(path.stem), image_or_failure(found, path)) for path in chosen]
    parts = [figure(picture(img, f"sample sheet of step {step}", SHEET), f"Step {step:,}")
             for step, img in images if img is not None]
    some = f" {len(chosen)} of {len(found.sheets)} sheets." if len(chosen) < len(found.sheets) else ""
    kind = "wide" if found.kind == "vae" else "grid"
    return section("time", title, paragraph(protocol + some), f'<div class="{kind}">{"".join(parts)}</div>')


CHARTS = (  # name, keys of metrics.jsonl, title, unit of the y axis, whether it may be logarithmic
    ("loss", ("loss", "val_loss", "val_loss_paraphrases"), "Loss", "loss, no unit", False),
    ("grad", ("grad_norm",), "Norm of the gradient before clipping", "norm of the gradient, no unit", True),
    ("lr", ("lr",), "Learning rate of AdamW", "learning rate, no unit", False),
    ("fid", ("fid",), "FID of fixed prompts and seeds", "FID", False),
    ("pr", ("precision", "recall"), "Precision, recall of fixed prompts and seeds", "share of images", False))
LABELS = {"loss": "training", "val_loss": "held-out", "val_loss_paraphrases": "held-out, paraphrases"}


def curves_section(found):
    path = found.run / "metrics.jsonl"
    if not found.log:
        return section("curves", "Curves", missing(f"{path} has no line: run the training's command again."))
    points = {}
    for line in found.log:
        for key in line.keys() - {"step"}:
            if is_number(line[key]):
                points.setdefault(key, []).append((line["step"], line[key]))
    known = {key for _, keys, *_ in CHARTS for key in keys}
    others = [(f"own{i}", (key,), key, key, False) for i, key in enumerate(sorted(points.keys() - known))]
    protocol = (f"Loss; training: of one step's {shown(found.images_a_step)} images, every "
                f"{shown(found.settings.get('log_every'))} steps; held-out: of the images of the split.")
    out = []
    for name, keys, title, unit, log in (*CHARTS, *others):
        lines = {LABELS.get(k, k): evenly(points[k], 1000) for k in keys if k in points}
        if sum(map(len, lines.values())) > 1:               # a single number is in the table below
            caption = protocol if name == "loss" else f"{title}; {', '.join(keys)} of metrics.jsonl."
            out.append(figure(curves(name, caption, lines, "optimiser step", unit, log), caption))
    last = [(LABELS.get(k, k), p[-1][1], p[-1][0]) for k, p in sorted(points.items())]
    rows = [(line["step"], ", ".join(f"{k} {as_text(v)}" for k, v in line.items() if k != "step"))
            for line in evenly(found.log, MOST_LINES)]
    some = f" ({MOST_LINES} of {len(found.log):,}, evenly)" if len(found.log) > MOST_LINES else ""
    return section("curves", "Curves", f'<div class="wide">{"".join(out)}</div>', "<h3>Last values</h3>",
                   table(("", "value", "at step"), last, "facts"),
                   folded(f"The lines of metrics.jsonl{some}", table(("step", "values"), rows)))


def prompt_kind(prompt):
    """The attributes that a prompt names, in words."""
    return ", ".join(KINDS.get(k, k) for k in prompts.parse(prompt)) or "other words"


def sampling_protocol(samples):
    """How the images of a folder were made, in one sentence."""
    c = samples.config
    facts = [f"{c.get('solver')}, {c.get('steps')} steps, guidance {c.get('guidance')}",
             f"seeds from {c.get('seed')}", *(f"{k.replace('_', ' ')} {c[k]}" for k in
                                              ("negative_prompt", "dtype", "lora_scale") if c.get(k))]
    whose = ("weights of this run" if samples.ours else
             "NOT known to be of this run: its config.json has no hash of one of this run's checkpoints")
    return f"Generated images of {samples.folder}: {', '.join(facts)}; {whose}."


def prompt_rows(found, by_prompt):
    """Figures of up to four images of each prompt."""
    out = []
    for prompt, files in by_prompt.items():
        images = [image_or_failure(found, f) for f in files[:MOST_IMAGES]]
        row = "".join(picture(img, f"generated: {prompt}", THUMBNAIL) for img in images if img is not None)
        out.append(figure(f'<div class="row">{row}</div>', prompt))
    return f'<div class="{"grid" if len(out) > 4 else "wide"}">{"".join(out)}</div>'


def kinds_section(found):
    title = "Images for each kind of prompt"
    if not found.samples and found.kind == "vae":
        return section("kinds", title, missing("An autoencoder has no prompts: this is for the page of the "
                                               "model that is trained on its latents."))
    if not found.samples:
        return section("kinds", title, missing(
            "No folder of images that was sampled from this run's checkpoints is in out/ or beside the run; "
            "--samples names another place.", command("judges.py", "prompts", "--out", "prompts.csv"),
            sampling_command(found, fake_folder(found))))
    groups = {}
    for file, prompt in found.samples.images:
        groups.setdefault(prompt_kind(prompt), {}).setdefault(prompt, []).append(file)
    parts = [paragraph(sampling_protocol(found.samples))]
    most = MOST_PROMPTS // min(len(groups), MOST_KINDS)
    for kind, by_prompt in list(groups.items())[:MOST_KINDS]:
        some = f" ({most} of {len(by_prompt)} prompts)" if len(by_prompt) > most else ""
        parts += [f"<h3>{esc(kind[:1].upper() + kind[1:] + some)}</h3>",
                  prompt_rows(found, dict(list(by_prompt.items())[:most]))]
    if len(groups) > MOST_KINDS:
        parts.append(paragraph(f"{MOST_KINDS} of {len(groups)} kinds of prompts are shown."))
    return section("kinds", title, *parts)


def metrics_section(found):
    parts = [metrics_table(found, path, values) for path, values in found.metrics]
    if not parts and found.kind == "vae":
        return ""
    if not parts:
        real = found.settings.get("data") or "REAL"
        parts = [missing("No --json file of metrics.py in the run's folder or with its images.",
                         command("metrics.py", "--real", real, "--fake", fake_folder(found), "--json",
                                 found.run / "metrics.json"))]
    return section("metrics", "Metrics", *parts)


def metrics_table(found, path, values):
    """One file of metrics.py beside the paper's figures."""
    protocol = str(values["protocol"])
    paper = OFFICIAL if protocol == "imageclef" else PAPER.get((protocol, found.kind), {})
    paper = paper if values.get("features", "inception") == "inception" else {}
    rows = []
    for key, name, spread, scale in METRICS:
        if (value := number(path, values, key)) is not None:
            text, error = shown(float(value * scale)), number(path, values, spread)
            text += f" ± {error * scale:.2g}" if error is not None else ""
            low, high = (number(path, values, f"{key}_{end}") for end in ("low", "high"))
            text += f" ({low * scale:.4g}–{high * scale:.4g})" if None not in (low, high) else ""
            rows.append((name, text, *(figures.get(key, "") for figures in paper.values())))
    own = ("space", "resize", "k", "splits", "kid_subset_size", "pairs")
    n_real, n_fake = (shown(number(path, values, k)) for k in ("n_real", "n_fake"))
    facts = [f"protocol {protocol}", f"{n_real} real images of {values.get('real')}",
             f"{n_fake} generated of {values.get('fake')}",
             f"{shown(values.get('size'))} px", *(f"{k} {values[k]}" for k in own if values.get(k)),
             f"weights {str(values.get('weights'))[:16]}"]
    facts += ["in brackets 95 % intervals"] if any(key.endswith("_low") for key in values) else []
    if found.samples and Path(str(values.get("fake"))).resolve() != found.samples.folder.resolve():
        facts.append("these are not the images shown above")
    plain = beside_the_paper(found, values, paper)
    notes = values.get("notes")
    notes = "\n".join(map(str, notes)) if isinstance(notes, list) else ""
    return "\n".join([f"<h3>{esc(path.name)}</h3>", table(("", "this run", *paper), rows),
                      paragraph(", ".join(facts) + "."), paragraph(plain, "note") if plain else "",
                      paragraph(notes, "soft lines") if notes else "", everything(path, values)])


def beside_the_paper(found, values, paper):
    """In plain words, why the paper's figures are, or are not, comparable with a file's."""
    if not paper:
        return ("" if found.kind not in ("adapter of prior", "adapter of decoder") else "The paper's figures "
                "of Kandinsky 2.2 stand in tables that did not survive in the text that we have.")
    if values["protocol"] == "imageclef":
        return ("The figures of the task's teams cannot be compared with these: their real images are the "
                "organisers' own two sets, which are not public, and their weights Keras'.")
    differs = []
    if values.get("n_real") != 2000:
        differs.append("its real set is the task's 2,000 development images, here it has "
                       f"{shown(values.get('n_real'))}")
    if not values.get("weights_published"):
        differs.append("its features are of published weights, these are not")
    if values["protocol"] == "fid" and values.get("resize") != "tf1":
        differs.append("its images were resized as by TensorFlow 1")
    if differs:
        return ("The paper's figures are of other data and cannot be compared with these: "
                f"{'; '.join(differs)}.")
    return ("The paper's figures can be compared with these only if the real folder holds the task's 2,000 "
            "development images.")


SHARE = ("asked for", "n", "share", "low", "high")
MARKS = {"sensitivity": "held-out real images", "chance": "chance"}


def faithfulness_section(found):
    title = "Faithfulness to the prompt"
    if not found.faithfulness:
        return "" if found.kind == "vae" else section("faith", title, missing(
            "No --json file of judges.py faithfulness in the run's folder or with its images. REAL: labelled "
            "images that the model was not trained on.",
            command("judges.py", "faithfulness", "--real", "REAL", "--fake", fake_folder(found), "--json",
                    found.run / "faithfulness.json")))
    path, values = found.faithfulness
    dealt = all("base_rate" in r for r in rows_of(path, values, "values"))  # none in older files
    marks = MARKS | ({} if dealt else {"chance": "real images that show it"})
    charts = [chart for key, name in (("summary", "in short"), ("values", "value by value"))
              for chart in share_charts(path, values, key, name, marks)]
    protocol = (f"{shown(values.get('n_fake'))} generated images of {values.get('fake')}. The judge is a "
                f"classifier trained on {shown(values.get('n_train'))} images of {values.get('real')}, "
                f"{shown(values.get('n_held_out'))} held out, {shown(values.get('size'))} px, "
                f"{shown(values.get('steps'))} steps, seed {values.get('seed')}. Circle: its share of "
                "held-out real images that show the value, what perfect images would score. Diamond: "
                + ("chance, what the same images would have if they were dealt to the prompts at random."
                   if dealt else "the share of real images that show it."))
    rare = values["not_judged"]
    rare = f"Not judged: {'; '.join(map(str, rare))}." if isinstance(rare, list) and rare else ""
    return section("faith", title, paragraph(protocol), f'<div class="wide">{"".join(charts)}</div>',
                   paragraph(rare, "note") if rare else "", everything(path, values))


def share_charts(path, values, key, name, marks, most=10):
    """Figures of about ten bars each; a row without a share has none."""
    rows = []
    for r in rows_of(path, values, key, *SHARE):
        r = r | {k: number(path, r, k) for k in (*SHARE[1:], *marks)}
        if all(r[k] is not None for k in SHARE):
            label = " ".join(str(r[k]) for k in ("attribute", "asked for") if k in r)
            note = f"{r['share']:.2f} ({r['low']:.2f}–{r['high']:.2f}), n = {r['n']}"
            rows.append(r | {"label": label, "note": note})
    caption = f"Share of images that show what their prompt asks for, {name}, with 95 % intervals (Wilson)."
    n = -(-len(rows) // most)
    parts = [rows[i * len(rows) // n:(i + 1) * len(rows) // n] for i in range(n)]
    return [figure(bars(f"faith-{key}-{i}", caption, part, "share of images", marks), caption)
            for i, part in enumerate(parts)]


def memorisation_section(found):
    title = "Closest training images"
    if not found.memorisation:
        train = found.settings.get("data") or "TRAIN"
        return "" if found.kind == "vae" else section("copies", title, missing(
            "No --json file of judges.py memorisation in the run's folder or with its images.",
            command("judges.py", "memorisation", "--train", train, "--fake", fake_folder(found), "--json",
                    found.run / "memorisation.json")))
    path, values = found.memorisation
    rows = []
    for r in rows_of(path, values, "rows", "images"):
        n, close, low, high, authentic = (number(path, r, k) for k in
                                          ("n", "too close", "low", "high", "authentic"))
        span = f" ({low:.2f}–{high:.2f})" if None not in (low, high) else ""
        rows.append((str(r["images"]), shown(n), f"{shown(close)}{span}", shown(authentic)))
    protocol = (f"Generated images of {values.get('fake')} against training images of {values.get('train')}, "
                f"held out: {values.get('held_out')}; distances of {values.get('features')}, "
                f"{shown(values.get('size'))} px. Pairs, copies first, then the closest: generated left, "
                "training right; residual: what the best alignment leaves unexplained, 0 to 1; ratio: to the "
                "distance of the training image from its own nearest other.")
    verdict = paragraph(str(values["verdict"]), "note" if values.get("flagged") else "")
    shares = table(("", "images", "too close (95 % interval)", "authentic"), rows)
    return section("copies", title, verdict, shares, paragraph(protocol), closest_pairs(found, path, values),
                   everything(path, values))


def closest_pairs(found, path, values):
    """The copies and closest pairs of a file of judges.py memorisation, where their images are there."""
    folders = [Path(str(values.get(k))) for k in ("fake", "train")]
    known = [{p.name: p for root in (folder, folder / "images") if root.is_dir() for p in root.iterdir()}
             for folder in folders]
    copied = [(row["image"], row["training"], f"copy, {row['form']}, residual", number(path, row, "residual"))
              for row in rows_of(path, {"copies": []} | values, "copies", "image", "training", "form")]
    others = [(row["generated"], row["training"], "ratio", number(path, row, "ratio"))
              for row in rows_of(path, values, "pairs", "generated", "training")]
    pairs, gone = [], 0
    for *names, what_far, far in [*copied, *others][:MOST_PAIRS]:
        names = [str(name) for name in names]
        files = [there.get(name) for there, name in zip(known, names, strict=True)]
        both = [] if None in files else [image_or_failure(found, f) for f in files]
        if not both or None in both:
            gone += 1
            continue
        halves = "".join(picture(img, f"{what} {name}", THUMBNAIL)
                         for img, what, name in zip(both, ("generated", "training"), names, strict=True))
        said = f", {what_far} {far:.2f}" if far is not None else ""
        pairs.append(figure(f'<div class="pair">{halves}</div>', f"{names[0]}, {names[1]}{said}"))
    lost = f"{gone} pairs are not shown: their files are not in {folders[0]} and {folders[1]} any more."
    return f'<div class="pairs">{"".join(pairs)}</div>' + (paragraph(lost, "note") if gone else "")


# What went wrong


def weakest(found):
    """(lines, figures) of the values shown less often than by perfect images, the rarest first."""
    path, values = found.faithfulness
    rows = [r for r in rows_of(path, values, "values", "attribute", *SHARE)
            if None not in (number(path, r, k) for k in SHARE[1:])]
    bad = [r for r in rows if (number(path, r, "sensitivity") or 0) > r["high"]]
    bad.sort(key=lambda r: r["share"])
    if not bad:
        return [], ""
    confused = rows_of(path, {"confusions": [], **values}, "confusions", "attribute", "asked for", "found")
    if not all(isinstance(c["found"], dict) for c in confused):
        raise BadInput(f"{path}: confusions: expected an object under each found")
    fake, lines, shown_images = Path(str(values.get("fake"))), [], {}
    images = read_samples(fake, ()).images if (fake / "prompts.csv").is_file() else []
    for r in bad[:6]:
        pair = r["attribute"], r["asked for"]
        files = [f for f, prompt in images if pair in requested(prompts.parse(prompt))]
        hits = round(r["share"] * r["n"])
        text = f"{' '.join(map(str, pair))}: asked for {r['n']} times, found {hits} times"
        text += "".join(f"; the judge finds {', '.join(f'{v} in {n}' for v, n in c['found'].items())}"
                        for c in confused if (c["attribute"], c["asked for"]) == pair)
        if files:
            shown_images[text] = files
        else:
            lines.append(text)
    six = " The six rarest:" if len(bad) > 6 else ""
    return [f"{len(bad)} of {len(rows)} values are shown less often than by perfect images: the judge's "
            f"share of held-out real images lies above the interval.{six}",
            *lines], prompt_rows(found, shown_images)


def failures_section(found):
    """What went wrong, from the files alone."""
    lines, figures, checks = [], "", ["losses", "image files"]
    held_out = [line for line in found.log if is_number(line.get("val_loss"))]
    if held_out:
        best, last = min(held_out, key=lambda line: line["val_loss"]), held_out[-1]
        if last["val_loss"] > best["val_loss"]:
            lines.append(f"The held-out loss rose again, from {best['val_loss']:.4g} at step {best['step']:,}"
                         f" to {last['val_loss']:.4g} at step {last['step']:,}.")
    if skipped := sum("lr" in line and not {"loss", "grad_norm"} <= line.keys() for line in found.log):
        lines.append(f"{skipped} logged steps had no finite loss or gradient and were left out, as float16 "
                     "does.")
    steps, target = found.log[-1]["step"] if found.log else 0, found.settings.get("steps")
    if isinstance(target, int) and steps < target:
        lines.append(f"The run stands at step {steps:,} of {target:,}: it was stopped, or goes on.")
    if found.memorisation:
        checks.append("copies")
        if found.memorisation[1].get("flagged"):
            lines.append(str(found.memorisation[1]["verdict"]))
    if found.faithfulness:
        checks.append("each value of the faithfulness")
        more, figures = weakest(found)
        lines += more
    if found.samples and (gone := [f.name for f, _ in found.samples.images if not f.is_file()]):
        lines.append(f"{len(gone)} images of {found.samples.folder} are not there, first {gone[0]}: its "
                     "command makes them when it is run again.")
    lines += [line for line in dict.fromkeys(found.failures) if "no such image" not in line]
    there = {"faithfulness": found.faithfulness, "copies": found.memorisation}
    unknown = [word for word, result in there.items() if not result and found.kind != "vae"]
    unknown = f" Not measured, so not known: {', '.join(unknown)}." if unknown else ""
    items = "".join(f"<li>{esc(line)}</li>" for line in lines or ["Nothing was found."])
    return section("failures", "Failures", paragraph(f"Looked at: {', '.join(checks)}.{unknown}"),
                   f"<ul>{items}</ul>", figures)


def settings_section(found):
    names = {"data": "fingerprint of the data", "images_a_step": "images a step"}
    others = ((names.get(k, k), v) for k, v in found.config.items() if k != "settings")
    rows = [*found.settings.items(), *others]
    source = f"{found.run / 'config.json'}; what is not set is left out."
    return section("settings", "Settings", paragraph(source),
                   table((), [(k, as_text(v)) for k, v in rows if v is not None], "facts"))


# The page and the command


def build(found) -> str:
    """The page. Failures come after the other sections, which add what they cannot read."""
    title = TITLES.get(found.kind, f"Adapter on {found.kind.removeprefix('adapter of ')}")
    made = [("time", "samples", samples_over_time(found)), ("curves", "curves", curves_section(found)),
            ("kinds", "prompts", kinds_section(found)), ("metrics", "metrics", metrics_section(found)),
            ("faith", "faithfulness", faithfulness_section(found)),
            ("copies", "copies", memorisation_section(found)),
            ("failures", "failures", failures_section(found)),
            ("settings", "settings", settings_section(found))]
    links = "".join(f'<a href="#{name}">{word}</a>' for name, word, text in made if text)
    trained = Path(str(found.settings.get("data") or "?")).name
    about = f"{title}, trained on {trained}. Generated images are synthetic and no findings of a patient."
    name = esc(found.run).replace("/", "/<wbr>")            # a line may break there
    head = f"<h1>{name}</h1>{paragraph(about)}{overview(found)}<nav>{links}</nav>"
    return document(MARK, f"{found.run}: {title}", "\n".join([head, *(text for *_, text in made if text)]))


def is_page(path):
    """Whether a file is one that this command wrote."""
    with open(path, "rb") as f:
        return f"<!-- {MARK} -->".encode() in f.read(100)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Write the page of a run: one HTML file that loads nothing.")
    flag = parser.add_argument
    flag("--run", type=Path, required=True, help="folder of a training: vae.py, msdm.py or finetune.py")
    flag("--samples", type=Path, help="folder of sampler.py; unset, one of this run's weights in out/")
    flag("--metrics", type=Path, nargs="+", default=(), help="files of metrics.py --json; unset, those found")
    flag("--faithfulness", type=Path, help="file of judges.py faithfulness --json; unset, one that is found")
    flag("--memorisation", type=Path, help="file of judges.py memorisation --json; unset, one that is found")
    flag("--out", type=Path, help="file to write; unset, report.html in the run's folder")
    args = parser.parse_args(argv)
    check_matplotlib()
    found = gather(args.run, args.samples, args.metrics, args.faithfulness, args.memorisation)
    out = args.out or args.run / "report.html"
    data.check_writable(out=out)
    check_replaced(out=(out, "a page of report.py", is_page))
    page = build(found)
    with replacing(out) as tmp:
        tmp.write_text(page, encoding="utf-8")
    print(f"{out}: {len(page.encode()) / 1e6:.1f} MB; open it in a browser")


if __name__ == "__main__":
    run_command(main)
