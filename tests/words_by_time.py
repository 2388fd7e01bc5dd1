"""At which times do words matter? How much lower a trained model's loss is with them than without.

The loss is the squared error of held-out images at fixed times, with the same noise for all words and
without self-conditioning. Of each kind of words, only the images with such a prompt count. "Without words"
is the empty prompt, which a training sees for a share p_uncond of its images only, so a part of the gain
where the noise is low is of any words at all.

    python tests/words_by_time.py --ckpt runs/msdm/best.safetensors --data data/phantom
"""

import argparse
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import command  # noqa: E402, F401 - before torch; the project's root is not on the path of a script in tests/

import torch  # noqa: E402

import data  # noqa: E402
import msdm  # noqa: E402
import prompts  # noqa: E402
from diffusion import q_sample, target  # noqa: E402

TIMES = (100, 200, 300, 400, 500, 600, 700, 800, 900)
KINDS = {"number of polyps": "n_polyps", "place": "abnormality_cells", "colours": "colors"}


def words_of(record, rng):
    """{kind: the words of a record of that kind}, "up to eight prompts" and those of KINDS that it has."""
    own = record.prompts
    out = {"up to eight prompts": " ".join(rng.sample(own, min(8, len(own))))}
    for prompt in own:
        attributes = [*prompts.parse(prompt)]
        out |= {kind: prompt for kind, attribute in KINDS.items() if attributes == [attribute]}
    return out


@torch.inference_mode()
def losses(model, x_0, t, words, rows, batch=40):
    """The squared error of the latents x_0[rows], of (n, c, h, w), at time t with the words of each row."""
    eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(t))[rows]
    x_0 = x_0[rows]
    a_t = model.diffusion.alpha_bar().float()[t]
    x_t, y = q_sample(x_0, a_t, eps), target(model.diffusion.prediction, x_0, a_t, eps)
    out = []
    for i in range(0, len(x_0), batch):
        part = slice(i, i + batch)
        states, mask = model.text(words[part])
        out.append(model.unet(x_t[part], torch.full((len(x_t[part]),), t), states, mask))
    return (torch.cat(out) - y).square().mean((1, 2, 3))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", required=True, help="checkpoint of msdm.py")
    parser.add_argument("--data", required=True, help="data folder with prompts of the task's grammar")
    parser.add_argument("-n", type=int, default=400, help="held-out images")
    args = parser.parse_args()
    model, rng = msdm.load(args.ckpt), random.Random(0)
    images, records = data.load_images(data.split(data.read_folder(args.data))[1][:args.n],
                                       model.diffusion.image_size)
    with torch.inference_mode():
        x_0 = torch.cat([model.vae.encode(data.to_float(part)) for part in images.split(32)])
    words = [words_of(r, rng) for r in records]
    rows = {kind: [i for i, w in enumerate(words) if kind in w] for kind in ("up to eight prompts", *KINDS)}
    rows = {kind: i for kind, i in rows.items() if len(i) > 1}  # an error needs two
    print(f"{len(records)} held-out images; less loss with words +- standard error; of "
          + ", ".join(f"{kind}: {len(i)}" for kind, i in rows.items()))
    alpha_bar = model.diffusion.alpha_bar()
    for t in TIMES:
        none = losses(model, x_0, t, [""] * len(x_0), list(range(len(x_0))))
        said = [f"t {t}: alpha_bar {alpha_bar[t]:.4f}, loss without words {none.mean():.3f}"]
        for kind, i in rows.items():
            less = none[i] - losses(model, x_0, t, [words[j][kind] for j in i], i)
            said.append(f"{kind} {less.mean():.4f} +- {less.std() / len(i)**0.5:.4f}")
        print("; ".join(said), flush=True)


if __name__ == "__main__":
    main()
