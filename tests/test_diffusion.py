import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import diffusion
from diffusion import SOLVERS, denoiser, guided, q_sample, schedule, seeded_noise, timesteps, to_x_0

ALPHA_BAR = schedule("scaled_linear", 1000, 0.002, 0.02)


def fresh_noise(shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=g, dtype=torch.float64)


def gaussian(mean, std, alpha_bar):
    """The exact E[x_0 | x_t] when the data is N(mean, std^2)."""
    def denoise(x_t, t):
        a = alpha_bar[t]
        gain = a.sqrt() * std**2 / (a * std**2 + 1 - a)
        return mean + gain * (x_t - a.sqrt() * mean), None
    return denoise


# schedules and times


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine"])
def test_a_schedule_falls_from_almost_one_towards_zero(name):
    a = schedule(name)
    assert a.dtype == torch.float64 and len(a) == 1000
    assert (a[1:] < a[:-1]).all() and a[0] > 0.99 and 0 < a[-1] < 0.01


@pytest.mark.parametrize("name, ends, first, last", [
    ("linear", (1e-4, 0.02), 0.9999, 4.0358e-5), ("scaled_linear", (0.002, 0.02), 0.998, 7.4702e-5)])
def test_the_ends_of_the_published_schedules(name, ends, first, last):
    a = schedule(name, 1000, *ends)
    assert a[0].item() == pytest.approx(first, rel=1e-12) and a[-1].item() == pytest.approx(last, rel=1e-5)


def test_cosine_betas_are_capped():
    a = schedule("cosine", 50)
    assert (1 - a[-1] / a[-2]).item() == pytest.approx(0.999)
    assert a[24].item() == pytest.approx(math.cos((0.5 + 0.008) / 1.008 * math.pi / 2) ** 2
                                         / math.cos(0.008 / 1.008 * math.pi / 2) ** 2)


def test_spacings_of_table_2():
    assert timesteps(1000, 10, "trailing").tolist() == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
    assert timesteps(1000, 10, "leading").tolist() == [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]
    assert timesteps(1000, 10, "leading", offset=1).tolist()[0] == 901
    assert timesteps(1000, 10, "linspace").tolist() == [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]
    assert timesteps(1000, 1).tolist() == timesteps(1000, 1, "linspace").tolist() == [999]


@given(T=st.integers(1, 1000), steps=st.integers(1, 1000),
       spacing=st.sampled_from(["trailing", "leading", "linspace"]))
@settings(max_examples=50, deadline=None)
def test_times_descend_and_stay_inside(T, steps, spacing):
    if steps > T:
        with pytest.raises(ValueError, match="steps"):
            timesteps(T, steps, spacing)
        return
    t = timesteps(T, steps, spacing)
    assert len(t) == steps and (t[1:] < t[:-1]).all() and t[-1] >= 0 and t[0] < T


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="schedule"):
        schedule("squared")
    with pytest.raises(ValueError, match="spacing"):
        timesteps(10, 2, "middle")
    with pytest.raises(ValueError, match="offset"):
        timesteps(10, 10, "leading", offset=1)


# solvers


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 5, 50])
def test_a_point_mass_is_recovered_exactly(solver, steps):
    x_0 = torch.full((2, 4, 8, 8), 0.3, dtype=torch.float64)
    noise = fresh_noise(x_0.shape)
    out = SOLVERS[solver](lambda x_t, t: (x_0, None), noise(), ALPHA_BAR, timesteps(1000, steps), noise)
    torch.testing.assert_close(out, x_0)


@pytest.mark.parametrize("solver", ["ddim", "dpmpp"])
@pytest.mark.parametrize("steps", [2, 5, 50])
def test_a_point_mass_keeps_its_noise_on_the_way(solver, steps):
    """The last step lands on x_0 whatever came before it; this is about those before."""
    x_0, eps = torch.full((2, 4, 8, 8), 0.3, dtype=torch.float64), fresh_noise((2, 4, 8, 8))()
    times, visited = timesteps(1000, steps), []

    def denoise(x_t, t):
        visited.append((x_t, ALPHA_BAR[t]))
        return x_0, None

    SOLVERS[solver](denoise, q_sample(x_0, ALPHA_BAR[times[0]], eps), ALPHA_BAR, times, None)
    assert len(visited) == steps
    for x_t, a_t in visited:
        torch.testing.assert_close(x_t, a_t.sqrt() * x_0 + (1 - a_t).sqrt() * eps)


@pytest.mark.parametrize("steps", [2, 5, 50])
def test_ancestral_sampling_of_a_point_mass_has_the_variance_of_every_level(steps):
    x_0, noise = torch.full((20_000,), 0.3, dtype=torch.float64), fresh_noise((20_000,))
    times, visited = timesteps(1000, steps), []

    def denoise(x_t, t):
        visited.append((x_t, ALPHA_BAR[t]))
        return x_0, None

    diffusion.ddpm(denoise, q_sample(x_0, ALPHA_BAR[times[0]], noise()), ALPHA_BAR, times, noise)
    for x_t, a_t in visited:
        assert x_t.mean().item() == pytest.approx(0.3 * a_t.sqrt().item(), abs=0.03)
        assert x_t.var().item() == pytest.approx(1 - a_t.item(), rel=0.05)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_gaussian_keeps_its_mean_and_variance(solver):
    noise = fresh_noise((20_000,))
    out = SOLVERS[solver](gaussian(0.5, 0.7, ALPHA_BAR), noise(), ALPHA_BAR, timesteps(1000, 1000), noise)
    assert out.mean().item() == pytest.approx(0.5, abs=0.02)
    assert out.std().item() == pytest.approx(0.7, rel=0.02)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("strength", [0.0, 0.1, 0.3, 1.0])
def test_from_images_of_a_gaussian_come_images_of_the_same(solver, strength):
    noise, times = fresh_noise((20_000,)), timesteps(1000, 1000)
    x_0 = 0.5 + 0.7 * fresh_noise((20_000,), seed=1)()
    x_t, left = diffusion.from_image(x_0, strength, times, ALPHA_BAR, noise())
    out = SOLVERS[solver](gaussian(0.5, 0.7, ALPHA_BAR), x_t, ALPHA_BAR, left, noise)
    assert out.mean().item() == pytest.approx(0.5, abs=0.02)
    assert out.std().item() == pytest.approx(0.7, rel=0.02)
    kept = torch.corrcoef(torch.stack([x_0, out]))[0, 1].item()  # how much of the images is left
    low, high = {0.0: (1 - 1e-9, 1.1), 0.1: (0.6, 0.9), 0.3: (0.15, 0.5), 1.0: (-0.02, 0.02)}[strength]
    assert low < kept < high and (strength or torch.equal(out, x_0))


@pytest.mark.parametrize(("strength", "left"), [(0, 0), (0.19, 1), (0.2, 2), (0.58, 5), (0.99, 9), (1, 10)])
def test_the_last_steps_are_left_and_the_image_is_noised_to_the_first(strength, left):
    x_0, eps, times = torch.full((1, 3), 2.0), torch.ones(4, 3), timesteps(1000, 10)
    x_t, own = diffusion.from_image(x_0, strength, times, ALPHA_BAR, eps)
    assert torch.equal(own, times[10 - left:])
    a_t = ALPHA_BAR[own[0]].float() if left else torch.ones(())
    expected = eps if left == 10 else a_t.sqrt() * 2 + (1 - a_t).sqrt() * eps
    torch.testing.assert_close(x_t, expected)
    assert left not in (0, 10) or torch.equal(x_t, expected)
    with pytest.raises(ValueError, match="strength=1.5: expected 0 to 1"):
        diffusion.from_image(x_0, 1.5, times, ALPHA_BAR, eps)


def ode_error(solver, steps, T=100_000):
    """Distance to the exact flow (an ODE) of Gaussian data, where x_t scales with its own deviation."""
    alpha_bar, std, x_T = schedule("linear", T, 1e-6, 2e-4), 0.5, torch.tensor([1.3], dtype=torch.float64)
    times = torch.linspace(0.9 * T, 0.2 * T, steps + 1,
                           dtype=torch.float64).round().long()  # the last one only ends the path
    seen = []

    def denoise(x_t, t):
        seen.append(x_t)
        return gaussian(0.0, std, alpha_bar)(x_t, t)

    solver(denoise, x_T, alpha_bar, times, None)
    a, b = alpha_bar[times[0]], alpha_bar[times[-1]]
    exact = x_T * ((b * std**2 + 1 - b) / (a * std**2 + 1 - a)).sqrt()
    return (seen[-1] - exact).abs().item()


@pytest.mark.parametrize("solver, order", [(diffusion.ddim, 1), (diffusion.dpmpp, 2)])
def test_order_of_convergence_on_a_gaussian(solver, order):
    errors = [ode_error(solver, steps) for steps in (32, 64, 128)]
    measured = [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]
    assert measured[-1] == pytest.approx(order, abs=0.35), (errors, measured)


def algorithm_2(x_theta, x_T, alpha, sigma, times):
    """DPM-Solver++(2M) as arXiv:2211.01095 prints it: the x at all of its times t_0 > ... > t_M."""
    lambda_ = (alpha / sigma).log()
    t, M = times.tolist(), len(times) - 1
    h = [None, *(lambda_[t[i]] - lambda_[t[i - 1]] for i in range(1, M + 1))]
    x, Q = [x_T], [x_theta(x_T, t[0])]
    for i in range(1, M + 1):
        if i == 1:
            D = Q[0]
        else:
            r = h[i - 1] / h[i]
            D = (1 + 1 / (2 * r)) * Q[i - 1] - 1 / (2 * r) * Q[i - 2]
        x.append(sigma[t[i]] / sigma[t[i - 1]] * x[i - 1] - alpha[t[i]] * ((-h[i]).exp() - 1) * D)
        Q.append(x_theta(x[i], t[i]))
    return x, Q[-1]


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("steps", [2, 3, 10])
def test_dpmpp_is_algorithm_2_at_every_step(spacing, steps):
    def x_theta(x_t, t):  # any function of x and t does
        return torch.tanh(1.5 * x_t + t / 700) - 0.2

    def denoise(x_t, t):
        visited.append(x_t)
        return x_theta(x_t, t), None

    visited, x_T, times = [], fresh_noise((64,))(), timesteps(1000, steps, spacing)
    out = diffusion.dpmpp(denoise, x_T, ALPHA_BAR, times)
    expected, last_estimate = algorithm_2(x_theta, x_T, ALPHA_BAR.sqrt(), (1 - ALPHA_BAR).sqrt(), times)
    torch.testing.assert_close(visited, expected)
    torch.testing.assert_close(out, last_estimate)  # behind the last time sigma is 0


def test_ddim_converges_to_a_fine_reference():
    x_T = torch.randn(16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    denoise = gaussian(0.2, 0.4, ALPHA_BAR)
    fine = diffusion.ddim(denoise, x_T, ALPHA_BAR, timesteps(1000, 1000))
    errors = [(diffusion.ddim(denoise, x_T, ALPHA_BAR, timesteps(1000, n)) - fine).abs().max().item()
              for n in (10, 50, 250)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]


def test_learned_variance_is_used():
    x_0, noise = torch.zeros(50_000, dtype=torch.float64), fresh_noise((50_000,))
    seen = []

    def denoise(x_t, t):
        seen.append(x_t)
        return x_0, torch.full_like(x_0, math.log(0.25))

    diffusion.ddpm(denoise, x_0, ALPHA_BAR, timesteps(1000, 2), noise)
    assert seen[1].std().item() == pytest.approx(0.5, rel=0.02)


# predictions, guidance, seeds


def test_v_is_the_noise_at_alpha_bar_one_and_the_negative_image_at_zero():
    x_0, eps = torch.randn(2, 5, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    for a, v in ((1.0, eps), (0.0, -x_0)):
        a = torch.tensor(a, dtype=torch.float64)
        torch.testing.assert_close(diffusion.target("v", x_0, a, eps), v)
    torch.testing.assert_close(to_x_0("v", -x_0, eps, a), x_0)
    torch.testing.assert_close(diffusion.target("v", x_0, a + 0.36, eps), 0.6 * eps - 0.8 * x_0)


def test_eps_and_v_give_back_x_0():
    x_0, eps = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    a = ALPHA_BAR[[10, 900]].view(2, 1, 1, 1)
    for prediction in ("eps", "v", "x_0"):
        out = diffusion.target(prediction, x_0, a, eps)
        torch.testing.assert_close(to_x_0(prediction, out, q_sample(x_0, a, eps), a), x_0)


class Recorder:
    """A network that answers with its text and remembers what it was asked."""

    def __init__(self):
        self.calls = []

    def __call__(self, x_t, t, text, mask, self_cond=None):
        self.calls.append((x_t, t, text, mask, self_cond))
        return text[:, :1, 0, None, None].expand(x_t.shape) + (0 if self_cond is None else self_cond)


def test_guidance_is_the_formula_and_doubles_everything():
    net, x_t = Recorder(), torch.randn(3, 2, 4, 4)
    text, null, mask = torch.full((3, 5, 7), 2.0), torch.full((3, 5, 7), 0.5), torch.ones(3, 5)
    self_cond = torch.randn(3, 2, 4, 4)
    out, cond = guided(net, (text, mask), (null, mask), 3.0)(x_t, torch.zeros(3, dtype=torch.long), self_cond)
    torch.testing.assert_close(cond, 2.0 + self_cond)
    torch.testing.assert_close(out, 0.5 + 3.0 * (2.0 - 0.5) + self_cond)  # the estimate is in both halves
    assert len(net.calls) == 1
    assert all(len(part) == 6 for part in net.calls[0])


def test_guidance_one_asks_once_a_step_and_equals_no_guidance():
    net, x_t = Recorder(), torch.randn(3, 2, 4, 4)
    text, mask = torch.randn(3, 5, 7), torch.ones(3, 5)
    out, cond = guided(net, (text, mask), None, 1)(x_t, torch.zeros(3, dtype=torch.long))
    assert cond is out
    assert len(net.calls) == 1 and len(net.calls[0][0]) == 3
    torch.testing.assert_close(out, text[:, :1, 0, None, None].expand(x_t.shape))


def test_the_last_estimate_is_fed_back():
    net, x_T = Recorder(), torch.randn(2, 1, 2, 2)
    text, mask = torch.ones(2, 1, 1), torch.ones(2, 1)
    denoise = denoiser(guided(net, (text, mask), None, 1), ALPHA_BAR, "eps", self_conditioning=True)
    x_0, _ = denoise(x_T, 999)
    denoise(x_T, 500)
    assert not net.calls[0][4].any()  # zeros at the first step
    assert torch.equal(net.calls[1][4], x_0)


def test_a_seeds_noise_does_not_depend_on_its_neighbours():
    together, alone = seeded_noise([7, 8, 9]), seeded_noise([8])
    for _ in range(3):
        assert torch.equal(together(3, 2, 3)[1], alone(1, 2, 3)[0])
    twice = seeded_noise([7, 8, 9])(6, 2)  # each generator gives two rows
    assert len({tuple(row.tolist()) for row in twice}) == 6 and torch.equal(twice[[1, 4]],
                                                                            seeded_noise([8])(2, 2))


def test_an_unknown_prediction_is_refused():
    x = torch.zeros(1)
    for f in (diffusion.target, to_x_0, lambda p, *_: diffusion.min_snr_weight(p, x, 5.0)):
        with pytest.raises(ValueError, match="prediction 'noise'"):
            f("noise", x, x, x)


def test_a_schedule_that_ends_in_pure_noise_can_be_sampled():
    alpha_bar = ALPHA_BAR.clone()
    alpha_bar[-1] = 0.0
    for solver in SOLVERS.values():
        out = solver(gaussian(0.5, 0.7, alpha_bar), torch.ones(3, dtype=torch.float64), alpha_bar,
                     timesteps(1000, 5),
                     lambda: torch.zeros(3, dtype=torch.float64))
        assert out.isfinite().all()


def test_uniform_times_are_uniform_and_logit_normal_ones_have_their_mean_and_deviation():
    g = torch.Generator().manual_seed(0)
    uniform = diffusion.sample_timesteps(40_000, 1000, None, g)
    assert uniform.min() == 0 and uniform.max() == 999
    assert (uniform.bincount(minlength=1000).view(10, 100).sum(1) / 4000 - 1).abs().max() < 0.1
    logit = torch.logit((diffusion.sample_timesteps(40_000, 1000, (-0.4, 0.9), g) + 0.5) / 1000)
    assert abs(logit.mean() + 0.4) < 0.02 and abs(logit.std() - 0.9) < 0.02
    last = diffusion.sample_timesteps(1000, 10, (30.0, 1.0), g)
    assert last.dtype == torch.int64 and (last == 9).all()
