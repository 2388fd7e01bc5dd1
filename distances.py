"""Figures of two sets of features: FID, KID, precision, recall, density, coverage, Inception Score.

FID                arXiv:1706.08500  Eq. 6     Frechet distance of two Gaussians fitted to the features
KID                arXiv:1801.01401  Sec. 4    squared maximum mean discrepancy, cubic kernel, unbiased
precision, recall  arXiv:1904.06991  Eq. 1, 2  share of one set inside the k-NN balls of the other
density, coverage  arXiv:2002.09797  Sec. 3    how many real balls hold a fake; real balls that hold one
Inception Score    arXiv:1606.03498  Sec. 4    exp of the mean KL(p(y|x) || p(y)), by splits

Arrays or tensors (images, features) in, Python floats out; which network the features are of is not known
here. The standard error of KID is ours, and so are the intervals.
"""

from command import BadInput

import math

import numpy as np
import scipy.linalg
import torch
from tqdm import trange

# Of Gaussians


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


# Of kernels


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


# Of nearest neighbours


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
    return tuple(x.double().mean().item() for x in (in_real, in_fake))


def density_coverage(real, fake, k=5) -> tuple[float, float]:
    """Naeem et al. 2020, Sec. 3, with B_i the ball around real x_i that reaches to its k-th nearest real:

        density  = 1 / (k M)  sum over fakes y_j, reals x_i of [y_j in B_i]         from 0, may exceed 1
        coverage = 1 / N      sum over reals x_i of [some fake y_j in B_i]          in [0, 1]

    Of N reals and M fakes of one distribution density is 1 on average, coverage about 1 - 2^-k if N = M. A
    ball contains its boundary; exact as precision_recall.
    """
    real, fake = two_sets(real, fake, least=k + 1)
    ball, centre = radii(real, k), real.mean(0)
    small, norm = centred(real, centre)
    rim = ball * (1 + 1e-12)                                # as in inside
    counts = torch.zeros(len(fake), dtype=torch.float64, device=fake.device)
    covered = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for i in torch.arange(len(fake), device=fake.device).split(512):
        d2, slack = squared_distances(*centred(fake[i], centre), small, norm)
        gap = d2 - ball.float()
        within = gap < -slack
        for pairs in (gap.abs() <= slack).nonzero().split(4096):
            a, b = pairs.T
            within[a, b] = (fake[i[a]].double() - real[b].double()).square().sum(1) <= rim[b]
        counts[i] = within.sum(1).double() / k
        covered |= within.any(0)
    return counts.mean().item(), covered.double().mean().item()


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


# Of logits


def inception_score(logits, splits=10) -> tuple[float, float]:
    """Mean and standard deviation over equal splits, in the order given, of exp(mean KL(p(y|x) || p(y))).

    logits (n, classes), p(y|x) their softmax; a score is at least 1 and at most the number of classes.
    """
    logits = as_features(logits, "logits", least=splits)
    scores = []
    for i in range(splits):
        log_p = logits[i * len(logits) // splits:(i + 1) * len(logits) // splits].double().log_softmax(1)
        p = log_p.exp()
        log_marginal = p.mean(0).clamp_min(torch.finfo(p.dtype).tiny).log()
        scores.append((p * (log_p - log_marginal)).sum(1).mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


# Intervals


def mean_interval(values, resamples=100, seed=0) -> tuple[float, float]:
    """95 % interval of the mean of n values (n,) by the percentile bootstrap (Efron 1979).

    The 2.5 % and 97.5 % quantiles of the means of resamples, each n values drawn with replacement.
    """
    values, rng = values.double().cpu().numpy(), np.random.default_rng(seed)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(resamples)]
    return tuple(np.quantile(means, (0.025, 0.975)).tolist())


def intervals(figures, real, fake, resamples=100, seed=0) -> dict:
    """{name: (low, high)}: 95 % intervals of figures(real, fake) -> {name: value from 0}, by half-sampling.

    Each resample is a random half of either set, drawn without replacement (subsampling: Politis and Romano
    1994). Of a mean, halves deviate from the whole as wholes do from the truth: both variances are s^2 / n.
    Copies, as drawing with replacement makes them, would shrink all nearest-neighbour balls to points. With
    x* the figures of halves: from x + q_2.5%(x*) - mean(x*), at least 0, to x + q_97.5%(x*) - mean(x*)
    (ours), since a Frechet distance, or a recall, of fewer images is another. So the interval says what other
    images in these numbers would give, not what more images would. That of a small Frechet distance is too
    wide, by half and more. A figure that halves do not have, or that is one and the same in all, has none.
    """
    real, fake = two_sets(real, fake, least=4)
    rng, value, found = np.random.default_rng(seed), figures(real, fake), []
    for _ in trange(resamples, desc="intervals", delay=5, leave=False):
        found.append(figures(*(x[rng.permutation(len(x))[:len(x) // 2]] for x in (real, fake))))
    out = {}
    for name in found[0]:
        halves = np.array([f[name] for f in found])
        if np.ptp(halves):
            low, high = (value[name] + np.quantile(halves, (0.025, 0.975)) - halves.mean()).tolist()
            out[name] = max(0.0, min(low, value[name])), max(high, value[name])
    return out


# Checks


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
    if torch.is_tensor(x) and x.is_complex():
        raise BadInput(f"{name}: expected real numbers, got {str(x.dtype).removeprefix('torch.')}")
    x = torch.as_tensor(x, dtype=torch.float64)
    if x.ndim != ndim or ndim == 2 and len(x) != x.shape[1]:
        expected = "square matrix" if ndim == 2 else "vector"
        raise BadInput(f"{name}: expected a {expected}, got shape {tuple(x.shape)}")
    if not x.isfinite().all():
        raise BadInput(f"{name}: holds NaN or infinity")
    if ndim == 2 and (x - x.T).abs().max() > 1e-6 * x.abs().max():
        raise BadInput(f"{name}: not symmetric, expected a covariance")
    return x
