"""Memorisation: are generated images copies of training images?

Two questions. Is this image a copy: each generated image on its own is held against all training images, as
it is, mirrored, turned, shifted and recoloured (copies.py); one that is nearer than images of other patients
are is named with its original. Is the model too near its data: the shares of generated and of held-out real
images whose nearest training image is too close, which say nothing of one image among thousands.
"""

from command import BadInput

import sys

import numpy as np
import scipy.stats
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import trange

import copies
import data
import duplicates
import metrics
from classifier import augment
from files import replacing
from inception import Inception
from pixels import FORMATS, SIDE
from tables import interval, print_table, wilson, write_table

# Residual of copies.closest below which an image is a copy: so much of the smallest one among held-out images
# of the same data, from copies.LEAST to COPY. Kvasir-SEG: images of other scenes have at least 0.95, copies
# seldom above 0.7; phantoms, whose drawn surfaces are alike, 0.44 (tests/planted_copies.py, docs/results.md).
OF_HELD_OUT, COPY = 0.8, 0.7
SHOWN = 20              # copies that are named on the screen
MOST_SHOWN = 1000       # pairs on the sheet: a JPEG ends at 65,535 rows of pixels
FEWEST = 20             # images below which none too close says little: the interval of 0 of 19 ends at 0.17
DESCRIPTION = 0x010E    # the EXIF tag ImageDescription, in PNG and JPEG alike
SHEET = "judges.py memorisation: closest pairs"


def memorisation(args):
    """Print tables, verdict and sheet; the exit status, 1 where the verdict is COPIES.

    "Too close" is our rule: see rows_of. Authentic (Alaa et al.): a ratio above 1.
    """
    if args.captions and args.held_out:
        raise BadInput("--captions says how a training divided its images, --held-out names others; give one")
    train, held_out = (image_records(args.train), image_records(args.held_out)) if args.held_out else (
        as_in_training(args.train, args.captions))
    total = None if args.held_out else len(train) + len(held_out)
    if len(train) < 2 or len(held_out) < FEWEST:
        raise BadInput(f"expected at least 2 training images and {FEWEST} held out, got {len(train)} "
                       f"of {args.train} and {len(held_out)} of {args.held_out or args.train}")
    if args.held_out:
        duplicates.expect_others(image_records(args.fake), args.fake, held_out, args.held_out,
                                 "which is held out")
    images, train = data.load_images(train, args.size, total=total)
    held_out_images, held_out = data.load_images(held_out, args.size, total=total)
    fake_images, fake = data.load_images(image_records(args.fake), args.size)
    named, found, radius = distances(images, held_out_images, fake_images, args)
    rows, near, near_ratio = rows_of(found, radius, args.seed)
    if near == 0 or (found["held-out real"][0] == 0).float().mean() >= 0.01:
        raise BadInput(f"{args.held_out or args.train}: expected held-out images other than those to "
                       "train on, about 1 % and more are the same")
    limit, frames, *tested = copy_limit(held_out_images, images, args.device, args.seed)
    if len(held_out) - len(frames) < FEWEST:
        raise BadInput(f"{args.held_out or args.train}: {len(frames)} of {len(held_out)} held-out images "
                       f"show what a training image does, as {held_out[frames[0]].name}; expected at least "
                       f"{FEWEST} others")
    copied, copied_pairs = copies_among(fake_images, fake, images, train, limit, args.device)
    conclusion = verdict(*rows, len(copied))
    print(f"{len(train)} training images of {args.train}; {args.size} px; distances of {named}\n")
    print_memorisation(rows, near, near_ratio, limit, frames, tested, copied, conclusion)
    d, i = found["generated"]
    order = torch.minimum(d / near, d / radius[i] / near_ratio).argsort()[:args.pairs].tolist()
    pairs = [{"generated": fake[j].name, "training": train[i[j]].name, "distance": float(d[j]),
              "ratio": float(d[j] / radius[i[j]])} for j in order]
    flagged = conclusion.startswith("COPIES")
    if args.json:
        write_table(args.json, {
            "train": str(args.train), "held_out": str(args.held_out or "10 % of train"),
            "fake": str(args.fake), "features": named, "size": args.size, "seed": args.seed,
            "near": float(near), "near_ratio": float(near_ratio), "copy": limit, "copies": copied,
            "held_out_near_duplicates": [held_out[k].name for k in frames],
            "false_alarms": tested[0], "false_alarms_of": tested[1],
            "verdict": conclusion, "flagged": flagged, "rows": rows, "pairs": pairs})
    sheet = args.sheet or default_sheet(args.fake)
    if data.can_write(sheet):
        shown = [*copied_pairs, *((fake_images[j], images[i[j]]) for j in order)][:args.pairs]
        labels = [*(f"copy, residual {c['residual']:.3g}" for c in copied),
                  *(f"ratio {p['ratio']:.3g}" for p in pairs)][:args.pairs]
        write_pairs(sheet, shown, labels)
        print(f"{min(len(shown), MOST_SHOWN)} pairs, copies first, then the closest, generated left, "
              f"training right: {sheet}")
    else:
        print(f"no sheet of pairs: {sheet} cannot be written; name another file with --sheet",
              file=sys.stderr)
    return int(flagged)


def distances(images, held_out, fake, args):
    """(name of the features, {images: (distance, index) of the nearest training image}, of each training
    image the distance to its nearest other)."""
    generator = torch.Generator().manual_seed(args.seed)
    some = torch.randperm(len(images), generator=generator)[:200]
    altered = augment(images[some], generator).round().clamp(0, 255).byte()
    named, embed = thumbnails_or_inception(args)
    known = features(embed, images, args.device)
    radius = nearest(known, known, skip_self=True)[0].clamp_min(1e-12)
    kinds = {"generated": fake, "held-out real": held_out, "altered copies": altered}
    return named, {name: nearest(features(embed, x, args.device), known) for name, x in kinds.items()}, radius


def halves(n, seed):
    """The indices below n, in random order, as two halves."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return order[::2], order[1::2]


def rows_of(found, radius, seed=0):
    """(a row for each kind of images, the two limits of "too close").

    found: {kind: (distance, index) of the nearest training image}; radius: of each of these the distance to
    its own nearest. Too close is a distance, or its ratio to the radius, below the 1 % quantile of one half
    of the held-out images. Their row is of the other half: that of the first would be 1 % by construction.
    """
    d, i = found["held-out real"]
    own, others = halves(len(d), seed)
    d, i = d[own], i[own]
    near, near_ratio = d.quantile(0.01), (d / radius[i]).quantile(0.01)
    rows = []
    for name, (d, i) in found.items():
        d, i = (d[others], i[others]) if name == "held-out real" else (d, i)
        close = (d < near) | (d / radius[i] < near_ratio)
        low, high = wilson(int(close.sum()), len(close))
        rows.append({"images": name, "n": len(d), "too close": float(close.float().mean()),
                     "low": low, "high": high, "authentic": float((d > radius[i]).float().mean()),
                     "median distance": float(d.median())})
    return rows, near, near_ratio


def copy_limit(held_out, originals, device, seed=0):
    """(residual below which an image is a copy, indices of near-duplicates, false alarms, of how many).

    Held-out images that show what a training image does, as frames of one clip, are counted apart. All others
    set the limit, so none of them is below it. False alarms are those of one half of them by the limit that
    the other half sets, which is at least as high.
    """
    residual, index, *_ = copies.closest(held_out, originals, device)
    frames = [k for k in (residual < COPY).nonzero()[:, 0].tolist()
              if residual[k] < copies.LEAST or same_frame(held_out[k], originals[index[k]])]
    others = np.delete(residual.numpy(), frames)
    own, rest = (others[half.numpy()] for half in halves(len(others), seed))
    tested = rest < limit_of(own)
    return limit_of(others), frames, int(tested.sum()), len(tested)


def limit_of(residuals) -> float:
    """The residual below which an image is a copy, by those of held-out images of other scenes."""
    return min(COPY, max(copies.LEAST, OF_HELD_OUT * min(residuals.tolist(), default=1.0)))


def copies_among(images, records, originals, train, limit, device):
    """(a dict for each of the images that is a copy, closest first, the pairs of images themselves)."""
    residual, index, form, shift = copies.closest(images, originals, device)
    order = residual.argsort()[:(residual < limit).sum()].tolist()
    found = [{"image": records[k].name, "training": train[index[k]].name, "form": copies.FORMS[form[k]],
              "shift": shift[k].tolist(), "residual": float(residual[k])} for k in order]
    return found, [(images[k], originals[index[k]]) for k in order]


def same_frame(*images) -> bool:
    """Whether two uint8 images (3, h, w) are near-duplicates by the rule of a data folder."""
    grey = F.adaptive_avg_pool2d(torch.stack(images).float().mean(1, keepdim=True), SIDE)[:, 0]
    return bool(duplicates.compare(grey.byte().numpy()))


def print_memorisation(rows, near, near_ratio, limit, frames, tested, copied, conclusion):
    print_table(rows, {"images": "images", "n": "n", "too close": "too close", "95 % interval": interval,
                       "authentic": "authentic", "median distance": "median distance"})
    alarms, n_tested = tested
    print(f"\ntoo close: nearer to a training image than all but 1 % of one half of the held-out ones, below "
          f"{near:.4g}\nor below {near_ratio:.4g} times the distance from that training image to its own "
          "nearest; the row of held-out ones is\nof their other half. authentic: farther than once that "
          "distance.\n"
          "altered copies: training images with other light, blur, noise and a pixel's shift, as copies "
          "would score.\n\n"
          f"copies, each image on its own: {len(copied)} of {rows[0]['n']} generated ones have a residual "
          f"below {limit:.2f}, the limit that held-out ones set.\nBy that of one half of these, {alarms} of "
          f"{n_tested} in the other half would be copies: at most "
          f"{5000 * wilson(alarms, n_tested)[1]:.0f} of 5,000\nare false alarms (95 %). Not counted: "
          f"{len(frames)} held-out ones that show what a training image does, as frames of one clip.")
    for c in copied[:SHOWN]:
        down, right = c["shift"]
        print(f"    {c['image']}: {c['training']} {c['form']}, shifted by {down}, {right} of 64 (down, "
              f"right), residual {c['residual']:.3f}")
    if len(copied) > SHOWN:
        print(f"    and {len(copied) - SHOWN} more, all of them in the file of --json")
    print(f"\n{conclusion}")


def verdict(generated, real, altered, n_copies):
    """One line from the three rows of the table: the share "too close" with its Wilson interval (ours).

    n_copies: generated images that are copies, each on its own; one is enough, among however many others.
    """
    n = generated["n"]
    if n_copies:
        are = "is a training image" if n_copies == 1 else "are training images"
        return f"COPIES: {n_copies} of {n} generated images {are}"
    close = [[round(row["n"] * share) for share in (row["too close"], 1 - row["too close"])]
             for row in (generated, real)]
    p = scipy.stats.fisher_exact(close, alternative="greater").pvalue
    if p < 0.01 and generated["low"] > real["high"]:
        return "COPIES: more generated images are too close than chance explains"
    if altered["low"] <= real["high"]:
        return "cannot tell: not even altered copies stand out in these features"
    if p < 0.05:
        return (f"SUSPICIOUS: more generated images are too close than held-out ones (Fisher's exact test: "
                f"p = {p:.2g}), not by enough to be sure")
    if n < FEWEST:
        return (f"cannot tell: {n} image{'s' * (n > 1)}, expected at least {FEWEST}; the share that is too "
                f"close may be anything from {generated['low']:.2f} to {generated['high']:.2f}")
    return "no sign of copying: about as many generated images are too close as held-out ones"


def default_sheet(fake):
    """closest.png in a data folder; beside a plain folder, where it would be taken for one of its images."""
    if (fake / "images").is_dir():
        return fake / "closest.png"
    fake = fake.absolute()                                  # "." has no name
    return fake.with_name(f"{fake.name}-closest.png")


def image_records(folder):
    """Records, without prompts, of the images of a data folder or of a plain folder."""
    return [data.Record(path, path.name, []) for path in metrics.image_files(folder)]


def as_in_training(folder, captions=None):
    """(records to train on, those held out): as a training divides the images that its captions name.

    Any other image is one to train on: nobody knows what it was used for, and a copy of it must not pass.
    Where no captions can be read all images are divided, which a line says unless it is a plain folder.
    """
    records = image_records(folder)
    try:
        captioned = data.read_folder(folder, captions)
    except BadInput as error:
        if captions:
            raise
        if (folder / "images").is_dir():
            print(f"all images of {folder} are divided, with a prompt or without: {error}", file=sys.stderr)
        return data.split(records)
    named = {r.name for r in captioned}
    if others := [r for r in records if r.name not in named]:
        print(f"{folder}: {len(others)} of {len(records)} images have no prompt; they count as images to "
              "train on", file=sys.stderr)
    train, held_out = data.split(captioned)
    return [*train, *others], held_out


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


def write_pairs(path, pairs, labels, side=128, columns=4, gap=6, line=14):
    """Pairs of uint8 images (3, h, w) side by side in one image file, closest first, a label below each; no
    more than MOST_SHOWN."""
    pairs, labels = pairs[:MOST_SHOWN], labels[:MOST_SHOWN]
    rows = -(-len(pairs) // columns)
    sheet = Image.new("RGB", (columns * (2 * side + gap) + gap, rows * (side + line + gap) + gap), "white")
    pen = ImageDraw.Draw(sheet)
    for k, (pair, label) in enumerate(zip(pairs, labels, strict=True)):
        x, y = gap + k % columns * (2 * side + gap), gap + k // columns * (side + line + gap)
        for j, img in enumerate(pair):
            sheet.paste(Image.fromarray(img.permute(1, 2, 0).numpy()).resize((side, side)), (x + j * side, y))
        pen.text((x, y + side + 1), label, fill="black")
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
