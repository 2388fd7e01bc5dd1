"""How far the fast solvers are from the exact path: error against a fine solution of the same ODE.

The error is the root mean square difference of latents from 500 DPM-Solver++ steps, over the spread of those
latents, on a trained checkpoint.
Two choices of times are compared: even in t (trailing, the default) and even in log-SNR.

    python tests/curves.py --ckpt runs/msdm/best.safetensors
"""

import argparse
import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402 - the project's root is not on the path of a script in tests/
from tqdm import tqdm  # noqa: E402

import msdm  # noqa: E402
from diffusion import SOLVERS, seeded_noise, timesteps  # noqa: E402

PROMPTS = ("Generate an image with 1 polyp.", "Generate an image with no polyps.",
           "Generate an image containing text.", "Generate an image with 2 instruments.")


def log_snr_times(alpha_bar, steps):
    """(steps,) descending times from T - 1, even in log(alpha_bar / (1 - alpha_bar)); no time twice."""
    log_snr = torch.log(alpha_bar / (1 - alpha_bar))
    wanted = torch.linspace(log_snr[-1], log_snr[0], steps + 1, dtype=torch.float64)[:-1]
    times = (log_snr[None] - wanted[:, None]).abs().argmin(dim=1)
    for i in range(1, steps):
        times[i] = min(times[i], times[i - 1] - 1)
    return times


@torch.inference_mode()
def latents(model, solver, times, n, guidance):
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(n)]
    draw = seeded_noise(range(20_000, 20_000 + n))

    def noise():
        return draw(n, *model.latent_shape())

    denoise = model.denoiser(prompts, guidance)
    return SOLVERS[solver](denoise, noise(), model.diffusion.alpha_bar(), times, noise)


def main():
    parser = argparse.ArgumentParser(description="Error of DDIM and DPM-Solver++ against a fine solution.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--ckpt", required=True, help="checkpoint of msdm.py")
    parser.add_argument("-n", type=int, default=16, help="pictures")
    parser.add_argument("--guidance", type=float, help="as in sampler.py; None: the checkpoint's")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20, 25, 50], help="solver steps")
    args = parser.parse_args()
    model = msdm.load(args.ckpt)
    args.guidance = model.diffusion.guidance if args.guidance is None else args.guidance
    alpha_bar, T = model.diffusion.alpha_bar(), model.diffusion.T
    exact = latents(model, "dpmpp", timesteps(T, 500), args.n, args.guidance)
    runs = list(product(("ddim", "dpmpp"), ("trailing", "log-SNR"), args.steps))
    errors = {}
    for solver, spacing, steps in tqdm(runs, "curves"):
        times = timesteps(T, steps) if spacing == "trailing" else log_snr_times(alpha_bar, steps)
        out = latents(model, solver, times, args.n, args.guidance)
        errors[solver, spacing, steps] = ((out - exact).square().mean().sqrt() / exact.std()).item()
    print("| solver, times | " + " | ".join(map(str, args.steps)) + " |\n|---|" + "---|" * len(args.steps))
    for solver, spacing in dict.fromkeys(k[:2] for k in errors):
        row = [f"{errors[solver, spacing, s]:.3f}" for s in args.steps]
        print(f"| {solver}, {spacing} | " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
