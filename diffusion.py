"""Diffusion in equations: schedules, forward process, targets, solvers, guidance, seeded noise.

A solver is solver(denoise, x_T, alpha_bar, timesteps, noise) -> x_0. timesteps (steps,) int64 descend;
noise() returns fresh N(0, 1) like x_T; denoise(x_t, t) -> (x_0, log_variance or None), where t is an int, the
same for the batch. What the network predicts, guidance, clipping and self-conditioning live in that closure
(guided, denoiser). There is no network and no file here.
alpha_bar is the product that the DDIM paper calls alpha.
DDPM         arXiv:2006.11239  Eq. 4 q(x_t | x_0), Eq. 7 the posterior, Eq. 15 x_0 from eps
DDIM         arXiv:2010.02502  Eq. 12
DPM-Solver++ arXiv:2211.01095  Algorithm 2, the multistep solver of second order
iDDPM        arXiv:2102.09672  Eq. 17 the cosine schedule, Eq. 15 a learnt variance
v-prediction arXiv:2202.00512  Sec. 4 and App. D
CFG          arXiv:2207.12598  Eq. 6, classifier-free guidance: its w is guidance - 1
Self-conditioning  arXiv:2208.04202  the previous estimate of x_0 is a further input
SDEdit       arXiv:2108.01073  Sec. 3, image to image
min-SNR      arXiv:2303.09556  Sec. 3.4  loss weights
Spacing      arXiv:2305.08891  Table 2
"""

import math

import torch
import torch.nn.functional as F

# Schedules


def schedule(name, T=1000, beta_start=0.0001, beta_end=0.02):
    """alpha_bar (T,) float64, the product of 1 - beta up to each t; name: linear, scaled_linear or cosine."""
    if name == "linear":
        beta = torch.linspace(beta_start, beta_end, T, dtype=torch.float64)
    elif name == "scaled_linear":
        beta = torch.linspace(beta_start**0.5, beta_end**0.5, T, dtype=torch.float64) ** 2
    elif name == "cosine":  # iDDPM, Eq. 17, with its s = 0.008; beta_start and beta_end are not used
        t = torch.arange(T + 1, dtype=torch.float64) / T
        f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    else:
        raise ValueError(f"schedule {name!r} is not one of linear, scaled_linear, cosine")
    return torch.cumprod(1 - beta, dim=0)


def timesteps(T, steps, spacing="trailing", offset=0):
    """(steps,) int64, descending: the times of a solver's steps (2305.08891, Table 2).

    offset is added to "leading" only.
    """
    if not 1 <= steps <= T:
        raise ValueError(f"steps={steps}: expected 1 to T={T}")
    if spacing == "trailing":
        t = torch.arange(steps, dtype=torch.float64).mul(-T / steps).add(T).round().long() - 1
    elif spacing == "leading":
        t = (torch.arange(steps) * (T // steps)).flip(0) + offset
    elif spacing == "linspace":
        t = torch.linspace(T - 1, 0, steps, dtype=torch.float64).round().long()
    else:
        raise ValueError(f"spacing {spacing!r} is not one of trailing, leading, linspace")
    if t.max() >= T:
        raise ValueError(f"offset={offset} moves a time to {int(t.max())}, expected below T={T}")
    return t


# The forward process and the regression target


def q_sample(x_0, alpha_bar_t, eps):
    """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps   (DDPM, Eq. 4)."""
    return alpha_bar_t.sqrt() * x_0 + (1 - alpha_bar_t).sqrt() * eps


def target(prediction, x_0, alpha_bar_t, eps):
    """Regression target of the network.

    "eps", "x_0", or "v" = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0 (2202.00512, App. D).
    """
    if prediction == "eps":
        return eps
    if prediction == "x_0":
        return x_0
    if prediction == "v":
        return alpha_bar_t.sqrt() * eps - (1 - alpha_bar_t).sqrt() * x_0
    raise ValueError(f"prediction {prediction!r} is not one of eps, x_0, v")


def to_x_0(prediction, out, x_t, alpha_bar_t):
    """x_0 from the network's output.

    "eps": DDPM, Eq. 15. "v": sqrt(alpha_bar_t) x_t - sqrt(1 - alpha_bar_t) v (2202.00512, App. D).
    """
    if prediction == "eps":
        return (x_t - (1 - alpha_bar_t).sqrt() * out) / alpha_bar_t.sqrt()
    if prediction == "x_0":
        return out
    if prediction == "v":
        return alpha_bar_t.sqrt() * x_t - (1 - alpha_bar_t).sqrt() * out
    raise ValueError(f"prediction {prediction!r} is not one of eps, x_0, v")


def sample_timesteps(n, T, logit_normal, generator):
    """n training times in [0, T), int64: uniform, or T sigmoid(m + s z), z ~ N(0, 1), logit_normal = (m, s).

    The density is that of SD3 (arXiv:2403.03206, Sec. 3.1), where it weighs the times of a rectified flow;
    over DDPM's index it is our choice. m and s put the weight where words lower the loss
    (docs/experiments.md).
    """
    if logit_normal is None:
        return torch.randint(T, (n,), generator=generator)
    m, s = logit_normal
    return (T * torch.sigmoid(m + s * torch.randn(n, generator=generator))).long().clamp(max=T - 1)


def min_snr_weight(prediction, alpha_bar_t, gamma):
    """Weights of the squared errors (2303.09556, Sec. 3.4).

    min(SNR, gamma) for "x_0", min(SNR, gamma) / SNR for "eps". For "v" it follows from the first: an error e
    of v is an error sqrt(1 - alpha_bar_t) e of x_0, so min(SNR, gamma) (1 - alpha_bar_t), which is
    min(SNR, gamma) / (SNR + 1).
    """
    snr = alpha_bar_t / (1 - alpha_bar_t)
    if prediction == "x_0":
        return snr.clamp(max=gamma)
    if prediction == "eps":
        return (gamma / snr).clamp(max=1)
    if prediction == "v":
        return snr.clamp(max=gamma) * (1 - alpha_bar_t)
    raise ValueError(f"prediction {prediction!r} is not one of eps, x_0, v")


# Solvers


def _noise_levels(alpha_bar, timesteps):
    """(t, alpha_bar_t, alpha_bar_s) of each step as Python numbers; s is the next, less noisy time.

    alpha_bar_s = 1 in the last step, which therefore ends in x_0.
    """
    times = timesteps.tolist()
    levels = alpha_bar.double()[timesteps.to(alpha_bar.device)].tolist()
    return zip(times, levels, [*levels, 1.0][1:], strict=True)


def ddpm(denoise, x_t, alpha_bar, timesteps, noise):
    """Ancestral sampling: draw x_s from q(x_s | x_t, x_0), DDPM, Eqs. 6 and 7 with s for t - 1.

    DDIM with eta = 1 is the same.
    """
    for t, a_t, a_s in _noise_levels(alpha_bar, timesteps):  # a_t, a_s: alpha_bar at t and s
        x_0, log_variance = denoise(x_t, t)
        alpha = a_t / a_s  # DDPM's alpha of the step from s to t
        x_t = math.sqrt(a_s) * (1 - alpha) / (1 - a_t) * x_0 + math.sqrt(alpha) * (1 - a_s) / (1 - a_t) * x_t
        if a_s < 1:
            variance = (1 - a_s) / (1 - a_t) * (1 - alpha)
            sigma = math.sqrt(variance) if log_variance is None else (0.5 * log_variance).exp()
            x_t = x_t + sigma * noise()
    return x_t


def ddim(denoise, x_t, alpha_bar, timesteps, noise=None):
    """Deterministic DDIM: Eq. 12 with sigma_t = 0."""
    for t, a_t, a_s in _noise_levels(alpha_bar, timesteps):
        x_0, _ = denoise(x_t, t)
        eps = (x_t - math.sqrt(a_t) * x_0) / math.sqrt(1 - a_t)
        x_t = math.sqrt(a_s) * x_0 + math.sqrt(1 - a_s) * eps
    return x_t


def dpmpp(denoise, x_t, alpha_bar, timesteps, noise=None):
    """DPM-Solver++(2M): Algorithm 2. The paper's alpha and sigma are sqrt(alpha_bar) and sqrt(1 - alpha_bar).

    First order in the first step, which has no earlier estimate, and in the last, where lambda is infinite.
    """
    x_0_before, lambda_before = None, None
    for t, a_t, a_s in _noise_levels(alpha_bar, timesteps):
        x_0, _ = denoise(x_t, t)
        d = x_0
        lambda_t = 0.5 * math.log(a_t / (1 - a_t)) if a_t > 0 else -math.inf  # the paper's log(alpha / sigma)
        if x_0_before is not None and a_s < 1:
            h = 0.5 * math.log(a_s / (1 - a_s)) - lambda_t
            d = x_0 + (x_0 - x_0_before) / (2 * (lambda_t - lambda_before) / h)
        # The paper's -alpha_s (exp(-h) - 1) is alpha_s - alpha_t ratio, which is finite in the last step too.
        ratio = math.sqrt((1 - a_s) / (1 - a_t))
        x_t = ratio * x_t + (math.sqrt(a_s) - math.sqrt(a_t) * ratio) * d
        x_0_before, lambda_before = x_0, lambda_t
    return x_t


SOLVERS = {"ddpm": ddpm, "ddim": ddim, "dpmpp": dpmpp}


def from_image(x_0, strength, timesteps, alpha_bar, eps):
    """(x_t, the timesteps left) for a solver that begins at an image: x_0, noised with eps (SDEdit, Sec. 3).

    strength, 0 to 1: the last int(strength steps) of the timesteps are left, as in the published pipelines,
    and x_t is at the first of them. With none left x_t is x_0, which a solver returns. With all left, at
    strength 1, x_t is eps and x_0 plays no part, may be None: exactly the plain sample. The published
    pipelines noise x_0 there too, so a trace of it remains; that ours does not is intended.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength={strength}: expected 0 to 1")
    n = int(strength * len(timesteps))
    if n == len(timesteps):
        return eps, timesteps
    left = timesteps[len(timesteps) - n:]
    return q_sample(x_0, alpha_bar[left[0]] if n else alpha_bar.new_ones(()), eps), left


# The closure around the network


def guided(network, cond, null, guidance):
    """predict(x_t, t, *more) -> (out_null + guidance (out_cond - out_null), out_cond), for CFG.

    That is Eq. 6 with w = guidance - 1; the second is for a learnt variance, which is not guided.

    cond and null are tuples of equal shapes: the network's arguments after x_t and t. Those in more, of x_t's
    batch size, follow them. Both conditions pass in one batch; guidance 1 needs no unconditional pass.
    A network with remember(*condition) is given what that returns, made once here.
    """
    remember = getattr(network, "remember", lambda *condition: condition)
    if guidance == 1:
        cond = remember(*cond)
        return lambda x_t, t, *more: (network(x_t, t, *cond, *more),) * 2
    both = remember(*(torch.cat(pair) for pair in zip(null, cond, strict=True)))

    def predict(x_t, t, *more):
        out = network(torch.cat([x_t, x_t]), torch.cat([t, t]), *both, *(torch.cat([m, m]) for m in more))
        out_null, out_cond = out.chunk(2)
        return guidance * out_cond - (guidance - 1) * out_null, out_cond  # exactly out_null at guidance 0

    return predict


def denoiser(predict, alpha_bar, prediction, bound=None, learnt_variance_of=None, self_conditioning=False):
    """denoise(x_t, t) -> (x_0, log_variance or None), from predict(x_t, t, ...) -> (output, extra).

    bound: a function that clips an estimate of x_0. learnt_variance_of: the solver's times, if extra is the
    learnt share of the log-variance (iDDPM, Eq. 15); otherwise extra is not read. With self_conditioning
    predict also gets the previous x_0, zeros in the first step. The closure stores it, so every batch needs a
    denoiser of its own.
    """
    alpha_bar = F.pad(alpha_bar, (0, 1), value=1)  # alpha_bar[-1]: no noise is left
    times = [] if learnt_variance_of is None else learnt_variance_of.tolist()
    after = dict(zip(times, [*times[1:], -1], strict=True)) if times else {}
    last = None

    def denoise(x_t, t):
        nonlocal last
        a_t = alpha_bar[t].to(x_t.dtype)  # on alpha_bar's CPU: a copy would wait for the GPU
        batch_t = torch.full((len(x_t),), t, dtype=torch.int64, device=x_t.device)
        more = [torch.zeros_like(x_t) if last is None else last] if self_conditioning else []
        out, extra = predict(x_t, batch_t, *more)
        last = to_x_0(prediction, out, x_t, a_t)
        if bound is not None:
            last = bound(last)
        log_variance = learnt_log_variance(extra, alpha_bar[t], alpha_bar[after[t]]) if after else None
        return last, log_variance

    return denoise


def learnt_log_variance(v, a_t, a_s):
    """Log of the variance, from the posterior's (v = -1) to beta (v = 1): iDDPM, Eq. 15, with s for t - 1."""
    beta = 1 - a_t / a_s
    smallest = (beta * (1 - a_s) / (1 - a_t)).clamp(min=1e-20)
    share = (v + 1) / 2
    return share * beta.log().item() + (1 - share) * smallest.log().item()


# Seeds


def seeded_noise(seeds):
    """draw(n, *shape) -> N(0, 1) of (n, *shape), one row from the CPU generator of each seed.

    A generator supplies x_T and then every step's noise of its image, so the image does not depend on the
    batch. n may be a multiple of the number of seeds: each generator then supplies as many rows, in turn.
    """
    generators = [torch.Generator().manual_seed(s) for s in seeds]

    def draw(n, *shape):
        rows = generators * (n // len(generators))
        return torch.stack([torch.randn(shape, generator=g) for g in rows])

    return draw


def sample_in_batches(sample_batch, prompts, seed, batch_size, **settings):
    """uint8 (len(prompts), 3, h, w) of sample_batch(prompts, seeds, **settings); image i has seed + i.

    One string is one prompt.
    """
    prompts = [prompts] if isinstance(prompts, str) else prompts
    parts = [range(i, min(i + batch_size, len(prompts))) for i in range(0, len(prompts), batch_size)]
    images = [sample_batch([prompts[i] for i in p], [seed + i for i in p], **settings) for p in parts]
    return torch.cat(images)
