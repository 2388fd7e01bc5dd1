"""How close generated images come to real ones: the command, from two folders to a table of figures.

The figures are functions of feature arrays (distances.py). Without --features, features are those of the
network that FID was defined on: TensorFlow's Inception of December 2015, 299 px, which is not torchvision's
(inception.py). Kynkäänniemi et al. (1904.06991) use VGG-16 features for precision and recall, here as in
MSDM's paper they are Inception's: the numbers are not comparable with theirs. --features takes another space
(spaces.py). --protocol computes what the task's organisers did, in 2024 by the ImageNet Inception, in 2025
(imageclef.py) by a medical image encoder.

    python metrics.py --real data/kvasir --fake out/msdm
    python metrics.py --real data/kvasir --fake out/msdm --protocol imageclef
    python metrics.py --real data/phantom --fake out/tiny --weights rule  # needs no download: not comparable
    python metrics.py --real data/kvasir --fake out/msdm --features facebook/dinov2-base
    python metrics.py --real data/kvasir --fake out/msdm --protocol imageclef2025 --pairs paraphrases.csv
    torchrun --nproc-per-node 4 metrics.py --real data/kvasir --fake out/msdm  # the images shared out
"""

from command import BadInput, run_command

import argparse
import os
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import imageclef
import spaces
import training
from data import SUFFIXES, batches, check_writable, files_in, read_ahead
from distances import (
    as_features,
    as_moment,
    density_coverage,
    f1_score,
    fid,
    frechet_distance,
    inception_score,
    intervals,
    kid,
    mean_and_root,
    precision_recall,
)
from files import (
    check_replaced,
    is_json_with,
    load_safetensors,
    read_cached,
    read_json,
    save_or_say,
    save_safetensors,
    text_hash,
    write_json,
)
from inception import ImageNetInception, Inception
from pixels import FORMATS, open_image, preprocess

# Every number of two sets


SPLITS, K, PARTS = 10, 3, 4
LEAST_RESAMPLES = 20  # of a 95 % interval: of fewer, it is one of their extremes
MOST_RESAMPLES = 100_000  # more change no digit that is shown
K_DENSITY = 5  # of density and coverage, as Naeem et al. choose it
SOFTMAX = ("imageclef", "imageclef-resized")  # the protocols whose features are softmax outputs
RESULT = ("fid", "protocol", "n_fake", "kid_subset_size", "weights_published")  # keys of a --json file


def evaluate(real, fake, whole=True, kid_subset_size=None, seed=0, resamples=0) -> dict:
    """Every number of two sets {"features", "logits"}; real may be {"mu", "sigma"}.

    whole=False leaves out KID, precision, recall, density and coverage. FID decreases with n. For scale, FID
    and the last four are also computed for two disjoint halves of the real set, NAME_real_half, and for as
    many fakes against one of these halves, NAME_fake_half; FID for disjoint parts of both sets too (mean and
    standard deviation). resamples: of the intervals, NAME_low and NAME_high; 0 leaves them out.
    """
    rng, out = np.random.default_rng(seed), {}
    x, logits = shuffled(fake, rng)                         # files are in prompt order, splits must not be
    if logits is not None:
        out["inception_score"], out["inception_score_std"] = inception_score(logits, SPLITS)
    if "mu" in real:
        mu, r = mean_and_root(as_features(x, "fake", least=2))
        return out | {"fid": frechet_distance(real["mu"], real["sigma"], mu, r.T @ r)}
    y, logits = shuffled(real, rng)
    if logits is not None and len(logits) >= SPLITS:
        out["inception_score_real"], out["inception_score_real_std"] = inception_score(logits, SPLITS)
    out["fid"] = fid(y, x)
    n = out["n_half"] = min(len(y) // 2, len(x))
    out["fid_real_half"], out["fid_fake_half"] = fid(y[:n], y[n:2 * n]), fid(y[:n], x[:n])
    n = out["n_part"] = min(len(y), len(x)) // PARTS
    if n > 1:
        parts = [fid(a, b) for a, b in zip(y.split(n)[:PARTS], x.split(n)[:PARTS], strict=True)]
        out["fid_parts"], out["fid_parts_std"] = float(np.mean(parts)), float(np.std(parts, ddof=1))
    if whole:
        out["kid"], out["kid_error"] = kid(y, x, kid_subset_size)
        out |= neighbours(y, x)
        out["f1"] = f1_score(out["precision"], out["recall"])
        n = out["n_half"]
        for name, other in (("real_half", y[n:2 * n]), ("fake_half", x[:n])) if n > K else ():
            out |= {f"{k}_{name}": v for k, v in neighbours(y[:n], other).items()}
        if resamples and min(len(y), len(x)) // 2 > K:
            ends = intervals(lambda y, x: {"fid": fid(y, x)} | neighbours(y, x), y, x, resamples, seed)
            for name, (low, high) in ends.items():
                most = 1.0 if name in ("precision", "recall", "coverage") else high
                out[f"{name}_low"], out[f"{name}_high"] = low, min(high, most)
    return out


def neighbours(real, fake) -> dict:
    """Precision and recall; density and coverage where there are enough images."""
    out = dict(zip(("precision", "recall"), precision_recall(real, fake, K), strict=True))
    if min(len(real), len(fake)) > K_DENSITY:
        out |= zip(("density", "coverage"), density_coverage(real, fake, K_DENSITY), strict=True)
    return out


def shuffled(features, rng):
    order = rng.permutation(len(features["features"]))
    return features["features"][order], features["logits"][order] if "logits" in features else None


# Folders to features


def image_files(folder, quiet=False):
    """The images of a data folder (in its images/) or of a plain folder, sorted, links to nowhere among them.
    Other files are left out, which a line says unless quiet."""
    folder = Path(folder)
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder, expected one of images")
    root = folder / "images" if (folder / "images").is_dir() else folder
    files = sorted(p for p in root.iterdir() if p.is_file() and not p.name.startswith("."))
    images = files_in(root)
    if not images:
        raise BadInput(f"{root}: holds no images ({', '.join(SUFFIXES)})")
    others = [p.name for p in files if p.suffix.lower() not in SUFFIXES]
    if others and not quiet:
        print(f"{root}: {len(others)} other files left out, first {others[0]}", file=sys.stderr)
    return images


def say_nested(folder):
    """Say how many images lie in subfolders, which are not read; hidden folders are not counted."""
    root = Path(folder) / "images" if (Path(folder) / "images").is_dir() else Path(folder)
    n = 0
    for place, folders, names in os.walk(root):
        folders[:] = [f for f in folders if not f.startswith(".")]
        images = [f for f in names if not f.startswith(".") and f.lower().endswith(SUFFIXES)]
        n += len(images) * (Path(place) != root)
    if n:
        print(f"{root}: {n} image{'s' * (n > 1)} in subfolders not read", file=sys.stderr)


def common_side(paths) -> int:
    """Longer side of images that must all have one size; every image is padded to a square of this side."""
    sizes = {}
    for path in paths:
        try:
            with Image.open(path, formats=FORMATS) as img:
                size = img.size
        except Exception:                                   # anything: it is a decoder
            size = open_image(path).size                    # raises with the reason
        first = sizes.setdefault(size, path.name)
        if len(sizes) > 1:
            (width, height), name = next(iter(sizes.items()))
            raise BadInput(f"{path}: expected generated images of one size, {name} is {width}x{height}, "
                           f"{first} is {size[0]}x{size[1]}")
    return max(size)


def read(path, size):
    """uint8 (3, size, size), padded to a square as in training; size None: 299 px by numpy.resize."""
    img = open_image(path)
    pixels = np.resize(np.asarray(img), (299, 299, 3)) if size is None else preprocess(img, size)
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)


def extract(net, paths, size, resize="tf1", names=("2048",), batch_size=32, workers=2, what="images"):
    """{name: (n, d) float32 on the CPU} of image files, in order. An unreadable file is an error.

    what: the name of the progress bar; None for no bar.
    """
    parts = []
    images = read_ahead(lambda i: read(paths[i], size), len(paths), workers, ahead=2 * batch_size)
    with tqdm(total=len(paths), desc=what, unit="image", disable=what is None) as bar:
        for part in batches(len(paths), batch_size):
            batch = torch.stack([next(images) for _ in range(part.start, part.stop)])
            features = net(batch, resize)
            parts.append({name: features[name].float().cpu() for name in names if name in features})
            bar.update(len(batch))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def folder_key(paths, *protocol):
    """Hash of what features depend on: every file's name, size and modification time, and the protocol."""
    files = ((p.name, p.stat()) for p in paths)
    return text_hash("features 1", *protocol, *(f"{name} {s.st_size} {s.st_mtime_ns}" for name, s in files))


def shared_features(net, paths, file, protocol, args, world, what):
    """{"features", "logits"} (n, d) of image files on rank 0, None on the others; kept in a file.

    The ranks share the batches, so the features are those of one process.
    """
    with world.together():
        kept = read_cached(file) if world.is_main else None
    if world.mean(float(kept is not None)):
        return kept and kept[0]
    names = ("2048", "logits_unbiased", "logits", "features")
    with world.together():
        own = world.share(batches(len(paths), args.batch_size))
        out = own and extract(net, paths[own[0].start:own[-1].stop], protocol["size"], args.resize, names,
                              args.batch_size, args.workers, what if world.is_main else None)
    parts = [part for part in world.gather(out) if part]
    if not world.is_main:
        return None
    out = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if args.protocol in SOFTMAX:
        out = {"features": out["logits"].double().softmax(1).float(), "logits": out["logits"]}
    elif "features" not in out:
        out = {"features": out["2048"], "logits": out.get("logits_unbiased")}
        out = {name: x for name, x in out.items() if x is not None}
    save_or_say(file, out)
    return out


def read_stats(path, protocol):
    """Real features as --real-stats wrote them, or the mu and sigma of an .npz as other tools write them."""
    if path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as f:
                moments = {name: torch.from_numpy(f[name]) for name in ("mu", "sigma")}
        except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
            raise BadInput(f"{path}: expected an .npz with mu and sigma ({error})") from None
        print(f"{path}: holds no weights, resize or size to check against this run", file=sys.stderr)
        return {name: as_moment(x, f"{path}: {name}", ndim)
                for (name, x), ndim in zip(moments.items(), (1, 2), strict=True)}
    tensors, metadata = load_safetensors(path)
    if "features" not in tensors:
        held = ", ".join(list(tensors)[:3]) or "nothing"
        raise BadInput(f"{path}: not a file of --real-stats, it holds {held}")
    if any(x.ndim != 2 or len(x) != len(tensors["features"]) for x in tensors.values()):
        raise BadInput(f"{path}: expected a row an image in every tensor")
    for name, value in protocol.items():
        if metadata.get(name) != value:
            raise BadInput(f"{path}: made with {name} {metadata.get(name)}, this run has {value}")
    return tensors


# Command line


PROTOCOLS = {
    "fid": "pooled features (2,048) of the FID Inception",
    "imageclef": "softmax (1,000) of torchvision's ImageNet Inception-v3, images re-flowed by numpy.resize",
    "imageclef-resized": "softmax (1,000) of torchvision's ImageNet Inception-v3, images really resized",
    "imageclef2025": "at unit length",
}
NOTES = {
    "fid": [
        "precision and recall on Inception features, as in MSDM's paper: not comparable with those of",
        "Kynkäänniemi et al., who use VGG-16 features",
    ],
    "imageclef": [
        "the organisers' protocol: distances of softmax outputs lie in [0, 2], not comparable with FIDs of",
        "the pooled features (--protocol fid); they used Keras' weights, so figures agree only approximately",
    ],
    "imageclef-resized": [
        "the organisers' features without their numpy.resize: not comparable with their figures, nor with",
        "FIDs of the pooled features (--protocol fid); they used Keras' weights, these are torchvision's",
    ],
    "imageclef2025": [
        f"the protocol of 2025, there with features of {imageclef.ENCODER}; figures of",
        "another space are not comparable with the organisers', nor are theirs of versions of their script",
        "that do not bring features to unit length (imageclef.py)",
    ],
}
OTHER_SPACE = "figures of this space are comparable neither with those of another one nor with published FIDs"


def table(numbers, setting) -> str:
    """The numbers and their protocol, as text."""
    def row(name, key, note="", error=None, scale=1):
        if key not in numbers:
            return f"{name:<34}{'-':>10}"
        spread = f" ± {scale * numbers[error]:.4f}" if error else ""
        if f"{key}_low" in numbers:
            note += f"; 95 %: {numbers[f'{key}_low']:.4f} to {numbers[f'{key}_high']:.4f}"
        return f"{name:<34}{scale * numbers[key]:>10.4f}{spread:<13}{note}".rstrip()

    def halves(key):
        if f"{key}_real_half" not in numbers:
            return ""
        real, fake = (numbers[f"{key}_{which}_half"] for which in ("real", "fake"))
        return f"; {n_half} and {n_half}: real {real:.4f}, fake {fake:.4f}"

    known, protocol = numbers | setting, setting["protocol"]
    n_real, n_fake, n_half, n_part = (known.get(n) for n in ("n_real", "n_fake", "n_half", "n_part"))
    rows = [
        row("FID" if setting["features"] == "inception" else "Frechet distance", "fid",
            f"{n_real or 'unknown'} real, {n_fake} fake"),
        row("  real half against real half", "fid_real_half",
            f"{n_half} and {n_half}: what a perfect model gets"),
        row("  real half against as many fakes", "fid_fake_half", f"{n_half} and {n_half}"),
        row(f"  mean of {PARTS} disjoint parts", "fid_parts", f"{n_part} and {n_part}, std. dev.",
            "fid_parts_std"),
    ]
    if protocol == "fid":
        subset_size = setting["kid_subset_size"]
        subsets = f"100 subsets of {subset_size}" if subset_size else "whole sets"
        rows += [
            row("KID x 1000", "kid", f"{subsets}, std. error", "kid_error", 1000),
            row("precision", "precision", f"k = {K}, fakes near reals" + halves("precision")),
            row("recall", "recall", f"k = {K}, reals near fakes" + halves("recall")),
            row("F1", "f1"),
            row("density", "density", f"k = {K_DENSITY}, reals around a fake" + halves("density")),
            row("coverage", "coverage", f"k = {K_DENSITY}, reals with a fake near" + halves("coverage")),
        ]
    if setting["features"] == "inception":
        rows += [
            row("Inception Score", "inception_score", f"{SPLITS} splits, std. dev.", "inception_score_std"),
            row("  of the real images", "inception_score_real", f"{SPLITS} splits",
                "inception_score_real_std"),
        ]
    if protocol == "imageclef2025":
        rows = imageclef.table(numbers)
    published = {True: ", the published file", False: ", not the published file", None: ""}
    facts = {
        "real": f"{setting['real']}: {n_real or 'an unknown number of'} images",
        "fake": f"{setting['fake']}: {n_fake} images",
        "images": f"padded to a square, {setting['size']} px" if setting["size"] else "as they are",
        "features": setting["space"],
        "resize": setting["resize"] if setting["resize"] == OWN_RESIZE else f"{setting['resize']}, to 299 px",
        "weights": f"{setting['weights'][:16]}{published[setting['weights_published']]}",
        "time": f"{setting['seconds']:.1f} s on {setting['device']}",
    }
    return "\n".join([*rows, ""] + [f"{name:<10}{fact}" for name, fact in facts.items()] + setting["notes"])


OWN_RESIZE = "by the space's own image processor"


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--real", type=Path, help="folder of real images, of any sizes")
    parser.add_argument("--fake", type=Path, required=True, help="folder of generated images of one size")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="fid",
                        help="fid, or what MEDVQA-GI computed in 2024, or in 2025")
    parser.add_argument("--features", help="the space: inception, a vision model of transformers by folder "
                        "or name, or classifier:FILE of judges.py; unset, inception, or for imageclef2025 "
                        f"{imageclef.ENCODER}")
    parser.add_argument("--pairs", type=Path,
                        help="imageclef2025: csv of Prompt,Paraphrase, the prompts of --fake in pairs")
    parser.add_argument("--resize", choices=("tf1", "antialias"), default="tf1",
                        help="to 299 px: as TensorFlow 1, or with antialiasing")
    parser.add_argument("--weights", help="Inception weights: a .pth or .safetensors file, "
                        'or "rule" for random ones; unset, the published file from the cache or downloaded')
    parser.add_argument("--kid-subset-size", type=int,
                        help="images in each of 100 random subsets; unset, whole sets")
    parser.add_argument("--bootstrap", type=int, default=100,
                        help="resamples of each 95 %% interval, 20 or more: random halves of the images, of "
                             "imageclef2025 a bootstrap of prompts; 0: none, which saves time")
    parser.add_argument("--real-stats", type=Path,
                        help="file of the real features, written if absent, else read")
    parser.add_argument("--cache", type=Path,
                        help="folder for features; unset, .features beside each image folder")
    parser.add_argument("--json", type=Path, help="file for every number and setting")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument("--batch-size", type=int, default=32, help="images at a time through the network")
    parser.add_argument("--workers", type=int, default=2, help="threads that read images")
    args = parser.parse_args(argv)
    check_space(args)
    stats = args.real_stats
    if args.real is None and not (stats and stats.is_file()):
        raise BadInput(f"{stats}: no such file; expected it or --real DIR" if stats else
                       "expected --real, a folder")
    if stats and stats.suffix != ".safetensors" and not (stats.suffix == ".npz" and stats.is_file()):
        raise BadInput(f"{stats}: expected a .safetensors file, or an .npz that is there already")
    if args.batch_size < 1 or args.workers < 0:
        raise BadInput("expected --batch-size >= 1 and --workers >= 0, "
                       f"got {args.batch_size} and {args.workers}")
    if args.bootstrap > MOST_RESAMPLES:
        raise BadInput(f"--bootstrap {args.bootstrap}: expected at most {MOST_RESAMPLES} resamples")
    if args.bootstrap and args.bootstrap < LEAST_RESAMPLES:
        raise BadInput(f"--bootstrap {args.bootstrap}: expected at least {LEAST_RESAMPLES} resamples for an "
                       "interval of 95 %, or 0 for none")
    stats = None if stats and stats.is_file() else stats    # it is written
    check_writable(json=args.json, real_stats=stats)
    check_replaced(json=(args.json, "a result of metrics.py", is_result),
                   real_stats=(stats, "a file", os.path.isfile))
    return args


def check_space(args):
    """Fill in --features; BadInput for flags that belong to another space or protocol."""
    of_2025 = args.protocol == "imageclef2025"
    if args.features is None:
        args.features = imageclef.ENCODER if of_2025 else "inception"
    if args.features in ("", "classifier:"):
        raise BadInput(f"--features {args.features!r}: expected inception, a vision model by folder or name, "
                       "or classifier:FILE")
    if args.features != "inception":
        if args.protocol in SOFTMAX:
            raise BadInput(f"--features {args.features}: --protocol {args.protocol} has features of its own")
        for flag, given in (("--weights", args.weights), ("--resize", args.resize != "tf1" and args.resize)):
            if given:
                raise BadInput(f"{flag} {given}: is of the Inception; the features are those of "
                               f"{args.features}")
    if of_2025 != bool(args.pairs):
        raise BadInput("--protocol imageclef2025: expected --pairs FILE, a csv of Prompt,Paraphrase"
                       if of_2025 else f"--pairs {args.pairs}: only --protocol imageclef2025 reads it")
    if of_2025 and (args.real is None or args.real_stats):
        raise BadInput("--protocol imageclef2025: expected --real FOLDER with captions, not --real-stats")
    if of_2025 and args.kid_subset_size is not None:
        raise BadInput(f"--kid-subset-size {args.kid_subset_size}: --protocol imageclef2025 has no KID")


def is_result(path):
    """Whether a file is one that --json wrote."""
    return is_json_with(path, *RESULT)


def untimed(result):
    return {k: v for k, v in result.items() if k != "seconds"}


def image_sets(args, known, quiet):
    """(real images, none if their features are known; generated images); BadInput for too few."""
    if not quiet:
        for folder in (args.fake, *([] if known else [args.real])):
            say_nested(folder)
    fake_paths = image_files(args.fake, quiet)
    real_paths = [] if known else image_files(args.real, quiet)
    if gone := [p for p in (*fake_paths, *real_paths) if not p.exists()]:
        raise BadInput(f"{gone[0]}: no such image, a link that leads nowhere")
    least, why = ((SPLITS, "one a split of the Inception Score") if args.features == "inception" else
                  (K + 1, "k + 1 for recall"))
    if len(fake_paths) < least:
        raise BadInput(f"{args.fake}: expected at least {least} images, {why}, got {len(fake_paths)}")
    if not known and len(real_paths) <= K:
        raise BadInput(f"{args.real}: expected at least {K + 1} images, k + 1 for precision, "
                       f"got {len(real_paths)}")
    if known and args.real and not quiet:
        print(f"real features come from {args.real_stats}; {args.real} is not read", file=sys.stderr)
    if real_paths and not quiet and fake_paths[0].parent.samefile(real_paths[0].parent):
        print(f"{args.real} and {args.fake} are one folder: the figures are of images against themselves",
              file=sys.stderr)
    smaller = min(len(fake_paths), len(real_paths) or len(fake_paths))
    if args.kid_subset_size is not None and not 2 <= args.kid_subset_size <= smaller:
        raise BadInput(f"expected --kid-subset-size from 2 to {smaller}, the smaller folder, "
                       f"got {args.kid_subset_size}")
    return real_paths, fake_paths


def load_network(args):
    """(the network of the protocol, its resize, words for its features)."""
    if args.protocol in SOFTMAX:
        resize = "numpy.resize" if args.protocol == "imageclef" else args.resize
        return ImageNetInception(args.weights), resize, PROTOCOLS[args.protocol]
    if args.features == "inception":
        return Inception(args.weights), args.resize, PROTOCOLS["fid"]
    net = spaces.load(args.features)
    return net, OWN_RESIZE, f"{args.features}: {net.features}"


def notes_of(args, net, numbers, width):
    """What a reader must know of the figures, as lines."""
    notes = list(NOTES[args.protocol])
    if args.features != "inception" and args.protocol == "fid":
        notes = [OTHER_SPACE]
    n = min(numbers["n_real"] or numbers["n_fake"], numbers["n_fake"])
    if n <= width and args.protocol != "imageclef2025":
        notes.append(f"small sets: {n} images for {width} features; the Frechet distance is too large by an "
                     "amount that falls with n: compare equal n only")
    if net.source == "rule":
        notes.append("not comparable with any published number: these are random weights made by a rule")
    elif net.published is False:
        notes.append("not comparable with any published number, unless this file holds the published tensors")
    return notes


def main(argv=None):
    args = parse(argv)
    start = time.perf_counter()
    known = args.real_stats and args.real_stats.is_file()
    world = training.start("cpu")  # gloo, whatever --device is: features are gathered on the CPU
    with world.together():
        real_paths, fake_paths = image_sets(args, known, quiet=not world.is_main)
        groups = args.pairs and imageclef.read_groups(args.pairs, args.real, real_paths, args.fake,
                                                      fake_paths)
        size = common_side(fake_paths)
        device = training.own_device(args.device)
    net, resize, space = world.main_first(lambda: load_network(args))  # it may download the weights
    net.to(device)
    protocol = {"protocol": args.protocol, "weights": net.source,
                "size": None if resize == "numpy.resize" else size, "resize": resize}

    def features(folder, paths, what):
        folder = folder.resolve()
        name = f"{folder.name}-{folder_key(paths, *protocol.values())}.safetensors"
        file = (args.cache or folder.parent / ".features") / name
        return shared_features(net, paths, file, protocol, args, world, what)

    with world.together():
        real = read_stats(args.real_stats, protocol) if known and world.is_main else None
    if not known:
        real = features(args.real, real_paths, "real images")
    fake = features(args.fake, fake_paths, "fake images")
    if not world.is_main:
        return
    if args.real_stats and not known:
        save_safetensors(args.real_stats, real, protocol)
    if groups:
        numbers = imageclef.evaluate(real["features"], fake["features"], groups, args.bootstrap)
        space += f", {PROTOCOLS[args.protocol]}"
    else:
        whole = args.protocol == "fid"
        numbers = evaluate(real, fake, whole, args.kid_subset_size, resamples=args.bootstrap)
    counts = {"n_real": len(real["features"]) if "features" in real else None, "n_fake": len(fake_paths)}
    setting = protocol | counts | {
        "real": str(args.real_stats if known else args.real), "fake": str(args.fake),
        "features": args.features, "space": space, "pairs": args.pairs and str(args.pairs),
        "k": K, "k_density": K_DENSITY, "splits": SPLITS, "bootstrap": args.bootstrap,
        "kid_subset_size": args.kid_subset_size, "weights_published": net.published, "device": str(device),
        "seconds": time.perf_counter() - start,
        "notes": notes_of(args, net, counts, fake["features"].shape[1]),
    }
    print(table(numbers, setting))
    result = numbers | setting
    if args.json and not (is_result(args.json) and untimed(read_json(args.json)) == untimed(result)):
        write_json(args.json, result)  # not where a run before found the same


if __name__ == "__main__":
    run_command(main)
