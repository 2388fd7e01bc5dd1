"""How close generated images come to real ones: FID, KID, precision, recall, F1 and Inception Score.

FID               arXiv:1706.08500  Eq. 6     Frechet distance of two Gaussians fitted to Inception features
KID               arXiv:1801.01401  Sec. 4    squared maximum mean discrepancy, cubic kernel, unbiased
precision, recall arXiv:1904.06991  Eq. 1, 2  share of one set inside the k-NN balls of the other
Inception Score   arXiv:1606.03498  Sec. 4    exp of the mean KL(p(y|x) || p(y)), by splits

Features are those of the network that FID was defined on: TensorFlow's Inception of December 2015, 299 px,
which is not torchvision's (inception.py). Kynkäänniemi et al. (1904.06991) use VGG-16 features for precision
and recall, here as in MSDM's paper they are Inception's: the numbers are not comparable with theirs. The
standard error of KID is ours. The first half of the file works on arrays only; the second half turns folders
into arrays.

    python metrics.py --real data/kvasir --fake out/msdm
    python metrics.py --real data/kvasir --fake out/msdm --protocol imageclef
    python metrics.py --real data/phantom --fake out/tiny --weights rule  # needs no download: not comparable
    torchrun --nproc-per-node 4 metrics.py --real data/kvasir --fake out/msdm  # the images shared out
"""

from command import BadInput, run_command

import argparse
import math
import os
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
from PIL import Image
from tqdm import tqdm

import training
from data import SUFFIXES, batches, check_writable, read_ahead
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

# Statistics of feature arrays


def frechet_distance(mu_1, cov_1, mu_2, cov_2) -> float:
    """|mu_1 - mu_2|^2 + tr(cov_1 + cov_2 - 2 (cov_1 cov_2)^(1/2)) of two Gaussians, singular or not."""
    mu_1, mu_2 = (as_moment(mu, f"mu_{i}", 1) for i, mu in ((1, mu_1), (2, mu_2)))
    cov_1, cov_2 = (as_moment(cov, f"cov_{i}", 2) for i, cov in ((1, cov_1), (2, cov_2)))
    if not len(mu_1) == len(mu_2) == len(cov_1) == len(cov_2):
        raise BadInput(f"Frechet distance: expected equal widths, got mu {len(mu_1)} and {len(mu_2)}, "
                       f"cov {len(cov_1)} and {len(cov_2)}")
    return distance_of_roots(mu_1, root(cov_1, "cov_1"), mu_2, root(cov_2, "cov_2"))


def fid(real, fake) -> float:
    """Frechet distance of Gaussians fitted to two sets of features (n, d), unbiased covariances."""
    real, fake = two_sets(real, fake, least=2)
    return distance_of_roots(*mean_and_root(real), *mean_and_root(fake))


def distance_of_roots(mu_1, root_1, mu_2, root_2):
    """With cov = R^T R and M = R_1 R_2^T, cov_1 cov_2 has the nonzero eigenvalues of the symmetric M M^T.

    So no root of an unsymmetric matrix is needed, with the imaginary parts that rounding gives it. A zero
    eigenvalue may come out as 1e-16 of the largest, its root as 1e-8; svdvals(M) would be exact and several
    times as slow.
    """
    m = root_1 @ root_2.T
    m = m if m.shape[0] <= m.shape[1] else m.T
    trace = torch.linalg.eigvalsh(m @ m.T).clamp_min(0).sqrt().sum()
    distance = (mu_1 - mu_2).square().sum() + root_1.square().sum() + root_2.square().sum() - 2 * trace
    return max(0.0, distance.item())


def mean_and_root(x):
    """mu and R with R^T R the covariance of the rows of x. With n <= d, R is the scaled centred rows."""
    n, d = x.shape
    mu = x.mean(0, dtype=torch.float64)
    return mu, (x.double() - mu) / math.sqrt(n - 1) if n <= d else root(covariance(x, mu), "covariance")


def covariance(x, mu):
    cov = torch.zeros(len(mu), len(mu), dtype=torch.float64, device=x.device)
    for rows in x.split(1024):                              # never the whole set in float64
        rows = rows.double() - mu
        cov.addmm_(rows.T, rows)
    return cov.div_(len(x) - 1)


def root(cov, name):
    """R (rank, d) with R^T R = cov, by pivoted Cholesky (LAPACK's pstrf), which stops at the rank of cov.

    The textbook's symmetric root needs eigh, which takes more than ten times as long at d = 2,048.
    """
    factor, pivot, rank, _ = scipy.linalg.lapack.dpstrf(cov.cpu().numpy().T, lower=1)
    r = torch.from_numpy(factor.T[:rank]).triu()[:, np.argsort(pivot)].to(cov.device)
    if (cov.trace() - r.square().sum()).abs() <= 1e-6 * cov.trace().abs():
        return r
    value, vector = torch.linalg.eigh(cov)                  # not quite positive: from float32, for instance
    if value[0] < -1e-4 * value[-1].abs():
        raise BadInput(f"{name}: has negative eigenvalues, expected a covariance")
    return value.clamp_min(0).sqrt()[:, None] * vector.T


def kid(real, fake, subset_size: int | None = None, subsets=100, seed=0) -> tuple[float, float]:
    """(MMD^2, standard error) with the kernel (x.y / d + 1)^3; unbiased, so MMD^2 may be negative.

    subset_size None: over the whole sets. Else the mean over random subsets; subsets overlap: the standard
    error uses n / subset_size effective subsets (ours; most libraries report the standard deviation over
    subsets).
    """
    real, fake = two_sets(real, fake, least=2)
    if subset_size is None:
        return mmd(real, fake)
    n = min(len(real), len(fake))
    if not 2 <= subset_size <= n:
        raise BadInput(f"KID: expected a subset size from 2 to {n}, the smaller set, got {subset_size}")
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(subsets):
        x, y = (x[rng.choice(len(x), subset_size, replace=False)] for x in (real, fake))
        values.append(mmd(x, y)[0])
    return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(n / subset_size))


def mmd(x, y):
    """(MMD^2, standard error) by U-statistics: arXiv:1801.01401, Eq. 4; our error is of their linear part."""
    m, n = len(x), len(y)
    xx, yy = ((kernel_sums(a, a)[0] - (a.double().square().mean(1) + 1) ** 3) / (len(a) - 1) for a in (x, y))
    over_y, over_x = kernel_sums(x, y)
    over_y, over_x = over_y / n, over_x / m  # mean kernel of each x with all y, of each y with all x
    value = xx.mean() + yy.mean() - over_y.mean() - over_x.mean()
    variance = 4 * ((xx - over_y).var() / m + (yy - over_x).var() / n)
    return value.item(), variance.sqrt().item()


def kernel_sums(x, y):
    """Sums over the rows and over the columns of the kernel matrix, in float64, one strip at a time."""
    y = y.double()
    rows, columns = (torch.zeros(len(a), dtype=torch.float64, device=x.device) for a in (x, y))
    for i in torch.arange(len(x), device=x.device).split(512):
        k = (x[i].double() @ y.T).div_(x.shape[1]).add_(1).pow_(3)
        rows[i] = k.sum(1)
        columns += k.sum(0)
    return rows, columns


def precision_recall(real, fake, k=3) -> tuple[float, float]:
    """Precision: share of fakes inside the k-NN balls of the reals. Recall: the reverse. (Eq. 1, 2)

    Equal to (covered(fake, real), covered(real, fake)) in float64, with

        def covered(a, b):
            radius = torch.cdist(b, b).kthvalue(k + 1, dim=1).values    # + 1: nearest to a point is itself
            return (torch.cdist(a, b) <= radius).any(dim=1).double().mean().item()

    Faster: distances come from a float32 product, one strip at a time. Wherever its rounding could decide,
    the distance is computed again in float64: a duplicate is at distance 0, and a ball contains its boundary.
    """
    real, fake = two_sets(real, fake, least=k + 1)
    ball_real, ball_fake = radii(real, k), radii(fake, k)
    centre = real.mean(0)
    small, norm = centred(real, centre)
    in_real, in_fake = (torch.zeros(len(x), dtype=torch.bool, device=x.device) for x in (fake, real))
    for i in torch.arange(len(fake), device=fake.device).split(512):
        d2, slack = squared_distances(*centred(fake[i], centre), small, norm)
        in_real[i] = inside(d2 - ball_real.float(), fake[i], real, ball_real, slack)
        in_fake |= inside((d2 - ball_fake[i, None].float()).T, real, fake[i], ball_fake[i], slack)
    return in_real.double().mean().item(), in_fake.double().mean().item()


def f1_score(precision, recall) -> float:
    """Harmonic mean; 0 where both are 0."""
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def radii(x, k, strip=1024):
    """Squared distance of every row to its k-th neighbour in float64, not counting the row itself.

    The matrix of distances is symmetric: each block serves its rows and its columns.
    """
    small, norm = centred(x, x.mean(0))
    spare = min(k + 3, len(x))                              # two more than needed: float32 may swap them
    near = torch.full((len(x), spare), torch.inf, device=x.device)
    who = torch.zeros(len(x), spare, dtype=torch.int64, device=x.device)

    def keep_nearest(rows, d2, first):
        d, i = d2.topk(min(spare, d2.shape[1]), largest=False)
        d, i = torch.cat([near[rows], d], 1), torch.cat([who[rows], i + first], 1)
        near[rows], order = d.topk(spare, largest=False)
        who[rows] = i.gather(1, order)

    starts = range(0, len(x), strip)
    for i in starts:
        for j in starts[i // strip:]:
            a, b = slice(i, i + strip), slice(j, j + strip)
            d2, _ = squared_distances(small[a], norm[a], small[b], norm[b])
            keep_nearest(a, d2, j)
            if j > i:
                keep_nearest(b, d2.T.contiguous(), i)
    out = torch.empty(len(x), dtype=torch.float64, device=x.device)     # a list of parts fragments the heap
    for i in torch.arange(len(x), device=x.device).split(256):
        a, b = x[i, None].double(), x[who[i]].double()
        exact = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")[:, 0]
        out[i] = exact.kthvalue(k + 1).values.square()
    return out


def inside(gap, a, b, ball, slack):
    """Which rows of a lie in a ball of b; gap (a, b): squared distance minus squared radius, up to slack."""
    low, at = gap.min(1)
    found = low < -slack
    unsure = (low.abs() <= slack).nonzero()[:, 0]
    rim = ball * (1 + 1e-12)                                # sums of 2,048 squares in another order
    found[unsure] = (a[unsure].double() - b[at[unsure]]).square().sum(1) <= rim[at[unsure]]
    for i in unsure[~found[unsure]]:                        # not in the closest ball, but perhaps in another
        others = (gap[i] <= slack).nonzero()[:, 0]
        found[i] = ((a[i].double() - b[others]).square().sum(1) <= rim[others]).any()
    return found


def centred(x, centre):
    """(x - centre in float32, its squared norms): smaller numbers have smaller rounding errors."""
    small = (x - centre).float()
    return small, torch.linalg.vector_norm(small, dim=1).square()


def squared_distances(a, norm_a, b, norm_b):
    """|a|^2 + |b|^2 - 2 a.b for every row of a with every row of b, and a bound on its rounding."""
    slack = 4 * torch.finfo(torch.float32).eps * math.sqrt(a.shape[1]) * (norm_a.max() + norm_b.max())
    return torch.addmm(norm_b, a, b.T, alpha=-2).add_(norm_a[:, None]), slack.item()


def inception_score(logits, splits=10) -> tuple[float, float]:
    """Mean and standard deviation over equal splits, in the order given, of exp(mean KL(p(y|x) || p(y)))."""
    logits = as_features(logits, "logits", least=splits)
    scores = []
    for i in range(splits):
        log_p = logits[i * len(logits) // splits:(i + 1) * len(logits) // splits].double().log_softmax(1)
        p = log_p.exp()
        log_marginal = p.mean(0).clamp_min(torch.finfo(p.dtype).tiny).log()
        scores.append((p * (log_p - log_marginal)).sum(1).mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def as_features(x, name, least) -> torch.Tensor:
    """x as a tensor (n, d) of float32 or float64 on its own device, checked: n >= least, finite."""
    x = torch.as_tensor(x).detach()
    if x.ndim != 2 or not x.shape[1] or x.is_complex():
        raise BadInput(f"{name}: expected an array (images, features), got shape {tuple(x.shape)}")
    if len(x) < least:
        raise BadInput(f"{name}: expected at least {least} images, got {len(x)}")
    x = x if x.dtype in (torch.float32, torch.float64) else x.float()
    if not x.isfinite().all():
        row = (~x.isfinite()).any(1).nonzero()[0].item()
        raise BadInput(f"{name}: row {row} holds NaN or infinity")
    return x


def two_sets(real, fake, least):
    real, fake = as_features(real, "real", least), as_features(fake, "fake", least)
    if real.shape[1] != fake.shape[1]:
        raise BadInput(f"features of different widths: real {real.shape[1]}, fake {fake.shape[1]}")
    if real.dtype != fake.dtype:
        real, fake = real.double(), fake.double()
    return real, fake.to(real.device)


def as_moment(x, name, ndim):
    x = torch.as_tensor(x, dtype=torch.float64)
    if x.ndim != ndim or ndim == 2 and len(x) != x.shape[1]:
        expected = "square matrix" if ndim == 2 else "vector"
        raise BadInput(f"{name}: expected a {expected}, got shape {tuple(x.shape)}")
    if not x.isfinite().all():
        raise BadInput(f"{name}: holds NaN or infinity")
    if ndim == 2 and (x - x.T).abs().max() > 1e-6 * x.abs().max():
        raise BadInput(f"{name}: not symmetric, expected a covariance")
    return x


# Every number of two sets


SPLITS, K, PARTS = 10, 3, 4


def evaluate(real, fake, whole=True, kid_subset_size=None, seed=0) -> dict:
    """Every number of two sets {"features", "logits"}; real may be {"mu", "sigma"}.

    whole=False leaves out KID, precision and recall. FID decreases with n. For scale it is also computed for
    two disjoint halves of the real set, for as many fakes against one of these halves, and for disjoint parts
    of both sets (mean and standard deviation).
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
        out["precision"], out["recall"] = precision_recall(y, x, K)
        out["f1"] = f1_score(out["precision"], out["recall"])
    return out


def shuffled(features, rng):
    order = rng.permutation(len(features["features"]))
    return features["features"][order], features["logits"][order] if "logits" in features else None


# Folders to features


def image_files(folder, quiet=False):
    """The images of a data folder (in its images/) or of a plain folder, sorted. Other files are left out,
    which a line says unless quiet."""
    folder = Path(folder)
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder, expected one of images")
    root = folder / "images" if (folder / "images").is_dir() else folder
    files = sorted(p for p in root.iterdir() if p.is_file() and not p.name.startswith("."))
    images = [p for p in files if p.suffix.lower() in SUFFIXES]
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
    names = ("2048", "logits_unbiased", "logits")
    with world.together():
        own = world.share(batches(len(paths), args.batch_size))
        out = own and extract(net, paths[own[0].start:own[-1].stop], protocol["size"], args.resize, names,
                              args.batch_size, args.workers, what if world.is_main else None)
    parts = [part for part in world.gather(out) if part]
    if not world.is_main:
        return None
    out = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if args.protocol == "fid":
        out = {"features": out["2048"], "logits": out.get("logits_unbiased")}
        out = {name: x for name, x in out.items() if x is not None}
    else:
        out = {"features": out["logits"].double().softmax(1).float(), "logits": out["logits"]}
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
        return moments
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
}


def table(numbers, setting) -> str:
    """The numbers and their protocol, as text."""
    def row(name, key, note="", error=None, scale=1):
        if key not in numbers:
            return f"{name:<34}{'-':>10}"
        spread = f" ± {scale * numbers[error]:.4f}" if error else ""
        return f"{name:<34}{scale * numbers[key]:>10.4f}{spread:<13}{note}".rstrip()

    known = numbers | setting
    n_real, n_fake, n_half, n_part = (known.get(n) for n in ("n_real", "n_fake", "n_half", "n_part"))
    rows = [
        row("FID", "fid", f"{n_real or 'unknown'} real, {n_fake} fake"),
        row("  real half against real half", "fid_real_half",
            f"{n_half} and {n_half}: what a perfect model gets"),
        row("  real half against as many fakes", "fid_fake_half", f"{n_half} and {n_half}"),
        row(f"  mean of {PARTS} disjoint parts", "fid_parts", f"{n_part} and {n_part}, std. dev.",
            "fid_parts_std"),
    ]
    if setting["protocol"] == "fid":
        subset_size = setting["kid_subset_size"]
        subsets = f"100 subsets of {subset_size}" if subset_size else "whole sets"
        rows += [
            row("KID x 1000", "kid", f"{subsets}, std. error", "kid_error", 1000),
            row("precision", "precision", f"k = {K}, fakes near reals"),
            row("recall", "recall", f"k = {K}, reals near fakes"),
            row("F1", "f1"),
        ]
    rows += [
        row("Inception Score", "inception_score", f"{SPLITS} splits, std. dev.", "inception_score_std"),
        row("  of the real images", "inception_score_real", f"{SPLITS} splits", "inception_score_real_std"),
        "",
    ]
    published = "the published file" if setting["weights_published"] else "not the published file"
    facts = {
        "real": f"{setting['real']}: {n_real or 'an unknown number of'} images",
        "fake": f"{setting['fake']}: {n_fake} images",
        "images": f"padded to a square, {setting['size']} px" if setting["size"] else "as they are",
        "features": PROTOCOLS[setting["protocol"]],
        "resize": f"{setting['resize']}, to 299 px",
        "weights": f"{setting['weights'][:16]}, {published}",
        "time": f"{setting['seconds']:.1f} s on {setting['device']}",
    }
    return "\n".join(rows + [f"{name:<10}{fact}" for name, fact in facts.items()] + setting["notes"])


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--real", type=Path, help="folder of real images, of any sizes")
    parser.add_argument("--fake", type=Path, required=True, help="folder of generated images of one size")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="fid",
                        help="fid, or what MEDVQA-GI 2024 computed")
    parser.add_argument("--resize", choices=("tf1", "antialias"), default="tf1",
                        help="to 299 px: as TensorFlow 1, or with antialiasing")
    parser.add_argument("--weights", help="Inception weights: a .pth or .safetensors file, "
                        'or "rule" for random ones; unset, the published file from the cache or downloaded')
    parser.add_argument("--kid-subset-size", type=int,
                        help="images in each of 100 random subsets; unset, whole sets")
    parser.add_argument("--real-stats", type=Path,
                        help="file of the real features, written if absent, else read")
    parser.add_argument("--cache", type=Path,
                        help="folder for features; unset, .features beside each image folder")
    parser.add_argument("--json", type=Path, help="file for every number and setting")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument("--batch-size", type=int, default=32, help="images at a time through the network")
    parser.add_argument("--workers", type=int, default=2, help="threads that read images")
    args = parser.parse_args(argv)
    stats = args.real_stats
    if args.real is None and not (stats and stats.is_file()):
        raise BadInput(f"{stats}: no such file; expected it or --real DIR" if stats else
                       "expected --real, a folder")
    if stats and stats.suffix != ".safetensors" and not (stats.suffix == ".npz" and stats.is_file()):
        raise BadInput(f"{stats}: expected a .safetensors file, or an .npz that is there already")
    if args.batch_size < 1 or args.workers < 0:
        raise BadInput("expected --batch-size >= 1 and --workers >= 0, "
                       f"got {args.batch_size} and {args.workers}")
    stats = None if stats and stats.is_file() else stats    # it is written
    check_writable(json=args.json, real_stats=stats)
    check_replaced(json=(args.json, "a result of metrics.py", is_result),
                   real_stats=(stats, "a file", os.path.isfile))
    return args


def is_result(path):
    """Whether a file is one that --json wrote."""
    return is_json_with(path, "fid", "protocol", "kid_subset_size", "weights_published")


def untimed(result):
    return {k: v for k, v in result.items() if k != "seconds"}


def image_sets(args, known, quiet):
    """(real images, none if their features are known; generated images); BadInput for too few."""
    if not quiet:
        for folder in (args.fake, *([] if known else [args.real])):
            say_nested(folder)
    fake_paths = image_files(args.fake, quiet)
    real_paths = [] if known else image_files(args.real, quiet)
    if len(fake_paths) < SPLITS:
        raise BadInput(f"{args.fake}: expected at least {SPLITS} images, one a split of the Inception Score, "
                       f"got {len(fake_paths)}")
    if not known and len(real_paths) <= K:
        raise BadInput(f"{args.real}: expected at least {K + 1} images, k + 1 for precision, "
                       f"got {len(real_paths)}")
    if known and args.real and not quiet:
        print(f"real features come from {args.real_stats}; {args.real} is not read", file=sys.stderr)
    smaller = min(len(fake_paths), len(real_paths) or len(fake_paths))
    if args.kid_subset_size is not None and not 2 <= args.kid_subset_size <= smaller:
        raise BadInput(f"expected --kid-subset-size from 2 to {smaller}, the smaller folder, "
                       f"got {args.kid_subset_size}")
    return real_paths, fake_paths


def main(argv=None):
    args = parse(argv)
    start = time.perf_counter()
    known = args.real_stats and args.real_stats.is_file()
    world = training.start("cpu")  # gloo, whatever --device is: features are gathered on the CPU
    with world.together():
        real_paths, fake_paths = image_sets(args, known, quiet=not world.is_main)
        size = common_side(fake_paths)
        device = training.own_device(args.device)
    network = Inception if args.protocol == "fid" else ImageNetInception
    net = world.main_first(lambda: network(args.weights).to(device))  # it may download the weights
    reflow = args.protocol == "imageclef"
    protocol = {"protocol": args.protocol, "weights": net.source, "size": None if reflow else size,
                "resize": "numpy.resize" if reflow else args.resize}

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
    numbers = evaluate(real, fake, args.protocol == "fid", args.kid_subset_size)

    notes = list(NOTES[args.protocol])
    if net.source == "rule":
        notes.append("not comparable with any published number: these are random weights made by a rule")
    elif not net.published:
        notes.append("not comparable with any published number, unless this file holds the published tensors")
    setting = protocol | {
        "real": str(args.real_stats if known else args.real), "fake": str(args.fake),
        "n_real": len(real["features"]) if "features" in real else None, "n_fake": len(fake_paths),
        "k": K, "splits": SPLITS, "kid_subset_size": args.kid_subset_size, "weights_published": net.published,
        "device": str(device), "seconds": time.perf_counter() - start, "notes": notes,
    }
    print(table(numbers, setting))
    result = numbers | setting
    if args.json and not (is_result(args.json) and untimed(read_json(args.json)) == untimed(result)):
        write_json(args.json, result)  # not where a run before found the same


if __name__ == "__main__":
    run_command(main)
