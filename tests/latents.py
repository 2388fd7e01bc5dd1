"""What is in each channel of an autoencoder's latents, where a diffusion model has to learn them?

A channel whose neighbouring positions are unrelated is noise to the U-Net: it can learn its spread, no more,
and what the decoder makes of it is grain where the image is smooth.

    python tests/latents.py --vae runs/msdm/vae/best.safetensors --data data/phantom
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import command  # noqa: E402, F401 - before torch; the project's root is not on the path of a script in tests/

import torch  # noqa: E402

import data  # noqa: E402
import vae  # noqa: E402
from tables import print_table  # noqa: E402


def rows_of(mu, logvar):
    """A row a channel of the moments (n, c, h, w): figures of the means, and the deviation of the draws.

    neighbours: correlation of horizontally adjacent positions; 4x4: share of the variance that is left in
    means of 4 x 4 positions, 1/16 for white noise.
    """
    z = mu - mu.mean((0, 2, 3), keepdim=True)
    spread = z.square().mean((0, 2, 3))
    beside = (z[..., 1:] * z[..., :-1]).mean((0, 2, 3)) / spread
    coarse = torch.nn.functional.avg_pool2d(z, 4).square().mean((0, 2, 3)) / spread
    drawn = logvar.exp().mean((0, 2, 3)).sqrt()
    return [{"channel": i, "mean": m.item(), "deviation": s.item(), "of the draw": d.item(),
             "neighbours": b.item(), "4x4": c.item()}
            for i, (m, s, d, b, c) in enumerate(zip(mu.mean((0, 2, 3)), spread.sqrt(), drawn, beside, coarse,
                                                    strict=True))]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vae", required=True, help="checkpoint of vae.py")
    parser.add_argument("--data", required=True, help="data folder")
    parser.add_argument("--size", type=int, default=64, help="side of the images, pixels")
    parser.add_argument("-n", type=int, default=300, help="images")
    args = parser.parse_args()
    images, _ = data.load_images(data.read_folder(args.data)[:args.n], args.size)
    with torch.inference_mode():
        rows = rows_of(*vae.load(args.vae).moments(data.to_float(images)))
    print_table(rows, {key: key for key in rows[0]})


if __name__ == "__main__":
    main()
