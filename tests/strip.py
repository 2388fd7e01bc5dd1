"""The README's strip: one image on its way from noise, the estimates of x_0 decoded, with the prompt below.

    python tests/strip.py --ckpt runs/msdm/best.safetensors --out docs/strip.png
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from command import run_command  # noqa: E402

import torch  # noqa: E402 - the project's root is not on the path of a script in tests/
from PIL import Image, ImageDraw, ImageFont  # noqa: E402

import data  # noqa: E402
import msdm  # noqa: E402
from diffusion import ddpm, seeded_noise, timesteps  # noqa: E402
from files import replacing  # noqa: E402


@torch.inference_mode()
def frames(model, prompt, seed, steps, n):
    """(n, 3, h, w) uint8: x_T decoded, then estimates of x_0 at evenly spaced steps, in the end the image."""
    draw, estimates = seeded_noise([seed]), []

    def noise():
        return draw(1, *model.latent_shape())

    denoise, x_T = model.denoiser([prompt], model.diffusion.guidance), noise()

    def watched(x_t, t):
        x_0, log_variance = denoise(x_t, t)
        estimates.append(x_0)
        return x_0, log_variance

    ddpm(watched, x_T, model.diffusion.alpha_bar(), timesteps(model.T, steps), noise)
    chosen = [round(i * (steps - 1) / (n - 2)) for i in range(n - 1)]
    return data.to_uint8(model.vae.decode(torch.cat([x_T, *(estimates[i] for i in chosen)])))


def main():
    parser = argparse.ArgumentParser(description="Draw the README's strip from a checkpoint of msdm.py.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--ckpt", required=True, help="checkpoint of msdm.py")
    parser.add_argument("--prompt", help="the prompt",
                        default="Generate an image with an an abnormality located in the center-right.")
    parser.add_argument("--seed", type=int, default=0, help="of the image")
    parser.add_argument("--steps", type=int, default=150, help="of ddpm")
    parser.add_argument("-n", type=int, default=10, help="frames")
    parser.add_argument("--out", required=True, help="PNG to write")
    args = parser.parse_args()
    images = frames(msdm.load(args.ckpt), args.prompt, args.seed, args.steps, args.n)
    side, gap = 96, 4
    sheet = Image.new("RGB", (args.n * (side + gap) - gap, side + 24), "white")
    for i, img in enumerate(images):
        frame = Image.fromarray(img.permute(1, 2, 0).numpy()).resize((side, side), Image.Resampling.BICUBIC)
        sheet.paste(frame, (i * (side + gap), 0))
    ImageDraw.Draw(sheet).text((sheet.width // 2, side + 12), args.prompt, fill="black", anchor="mm",
                               font=ImageFont.load_default(14))
    with replacing(args.out) as tmp:
        sheet.save(tmp)


if __name__ == "__main__":
    run_command(main)
