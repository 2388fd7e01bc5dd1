"""Do latents that are cached in K jittered views train like latents of fresh jitter in every step?

Trains the same MSDM with one cached view of an image, with eight, and with images that are jittered and
encoded anew in every step, each with several seeds, and compares training and held-out losses (the latter are
of images without jitter). The spread over the seeds is the noise.

    python tests/cached_views.py --data data/phantom-small --vae runs/demo/vae/best.safetensors \
        --out runs/views
"""

import argparse
import json
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import command  # noqa: E402 - before torch; the project's root is not on the path of a script in tests/

import numpy as np  # noqa: E402
import torch  # noqa: E402

import data  # noqa: E402
import msdm  # noqa: E402
import training  # noqa: E402

ARMS = {"1 view": ["--views", "1"], "8 views": ["--views", "8"], "fresh in every step": []}


class Fresh:
    """In the place of cached latents (n, 1, 2 c, h, w): what is indexed is jittered and encoded now."""

    def __init__(self, vae, images, jitter, seed):
        self.vae, self.images, self.jitter = vae, images, jitter
        self.generator = torch.Generator().manual_seed(training.step_seed("fresh", seed))
        self.shape = (len(images), 1, *self[torch.tensor([0]), None].shape[1:])

    @torch.no_grad()
    def __getitem__(self, key):
        img = data.augment(data.to_float(self.images[key[0]]), self.generator, self.jitter)
        return torch.cat(self.vae.moments(img), dim=1)


def fresh_latents(records, args, vae, sources, folder, world, jitter=0.0, views=1, total=None):
    if not jitter:  # those held out
        return LATENTS_OF(records, args, vae, sources, folder, world, jitter, views, total)
    images = data.Images(records, args.size, args.crop, total=total)
    return Fresh(vae, images, jitter, args.seed), images.records


LATENTS_OF = msdm.latents_of


def losses(run):
    """(mean training loss of the last quarter of the steps, the last held-out loss) of a run's log."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = [line["loss"] for line in lines if "loss" in line]
    held_out = [line["val_loss"] for line in lines if "val_loss" in line]
    return np.mean(train[-len(train) // 4:]), held_out[-1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", required=True, help="data folder")
    parser.add_argument("--vae", required=True, help="checkpoint of vae.py")
    parser.add_argument("--out", required=True, type=Path, help="folder for the runs, which are resumed")
    parser.add_argument("--preset", default="demo", help="of msdm.py")
    parser.add_argument("--jitter", default="0.4", help="brightness and contrast change")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    found = {}
    for seed in args.seeds:
        for arm, flags in ARMS.items():
            run = args.out / f"{arm}, seed {seed}".replace(" ", "-").replace(",", "")
            latents_of = LATENTS_OF if flags else fresh_latents
            with mock.patch.object(msdm, "latents_of", latents_of):
                msdm.main(["--preset", args.preset, "--data", args.data, "--vae", args.vae, "--out", str(run),
                           "--jitter", args.jitter, "--seed", str(seed), "--log-every", "10", "--shown", "0",
                           "--device", "cpu", *flags])
            found.setdefault(arm, []).append(losses(run))
    print(f"{len(args.seeds)} seeds, mean and deviation\n{'':<24}{'training loss':>20}{'held-out loss':>20}")
    for arm, pairs in found.items():
        mean, spread = np.mean(pairs, axis=0), np.std(pairs, axis=0, ddof=1)
        print(f"{arm:<24}" + "".join(f"{m:>12.4f} ± {s:.4f}" for m, s in zip(mean, spread, strict=True)))


if __name__ == "__main__":
    command.run_command(main)
