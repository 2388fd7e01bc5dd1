"""How far are copies of an image from its original, and images of other scenes from theirs (copies.py)?

Half of a data folder's images are held against the others, near-duplicates left out; then copies of some of
its images, in each of the forms below, against the folder.

    python tests/planted_copies.py --data data/kvasir --n 60
"""

import argparse
import io
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import command  # noqa: E402, F401 - before torch; the project's root is not on the path of a script in tests/

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from PIL import Image  # noqa: E402

import copies  # noqa: E402
import data  # noqa: E402
from classifier import augment  # noqa: E402
from memorisation import limit_of, same_frame  # noqa: E402

GENERATOR = torch.Generator().manual_seed(0)


def compressed(images, quality=30):
    def once(img):
        file = io.BytesIO()
        Image.fromarray(img.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
        return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)

    return torch.stack([once(img) for img in images])


def turned(images):
    return torch.rot90(images.flip(-1), 1, (-2, -1))


def shifted(images, most=0.12):
    reach = round(most * images.shape[-1])
    moves = torch.randint(-reach, reach + 1, (len(images), 2), generator=GENERATOR).tolist()
    return torch.stack([F.pad(img, (dx, -dx, dy, -dy)) for img, (dy, dx) in zip(images, moves, strict=True)])


def recoloured(images):
    gain, offset = torch.rand(2, len(images), 3, 1, 1, generator=GENERATOR)
    return (images * (0.7 + 0.6 * gain) + 50 * offset - 25).round().clamp(0, 255).byte()


def disturbed(images):
    """With other light, blur, noise and a pixel's shift."""
    return augment(images, GENERATOR).round().clamp(0, 255).byte()


FORMS = {
    "the same": lambda x: x,
    "mirrored and turned": turned,
    "JPEG of quality 30": compressed,
    "shifted by up to 12 %, black outside": shifted,
    "gains of 0.7 to 1.3, offsets of 25 either way": recoloured,
    "other light, blur, noise, a pixel's shift": disturbed,
    "all at once": lambda x: disturbed(recoloured(shifted(turned(compressed(x))))),
}


def others(images):
    """Residuals of one half against the other, in random order, without near-duplicates of one there."""
    order = torch.randperm(len(images), generator=GENERATOR)
    own, rest = images[order[len(order) // 2:]], images[order[:len(order) // 2]]
    residual, index, *_ = copies.closest(own, rest)
    keep = [r >= copies.LEAST and not same_frame(img, rest[i])
            for r, img, i in zip(residual, own, index, strict=True)]
    return residual[keep], len(rest)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="data folder")
    parser.add_argument("--n", type=int, default=60, help="copies of each form")
    parser.add_argument("--most", type=int, default=2000, help="images of the folder that are used")
    args = parser.parse_args()
    images, _ = data.load_images(data.read_folder(args.data)[:args.most], copies.SIDE)
    residual, n = others(images)
    quantiles = residual.quantile(torch.tensor([0, 0.01, 0.05, 0.5])).tolist()
    limit = limit_of(residual)
    print(f"{len(residual)} images against {n} others: smallest, 1 %, 5 %, median residual "
          + ", ".join(f"{q:.2f}" for q in quantiles) + f"; limit {limit:.2f}; by that of every second one "
          f"{int((residual[1::2] < limit_of(residual[::2])).sum())} false alarms of {len(residual[1::2])}")
    some = torch.randperm(len(images), generator=GENERATOR)[:args.n]
    for name, form in FORMS.items():
        residual, index, *_ = copies.closest(form(images[some]), images)
        found = ((residual < limit) & (index == some)).sum()
        print(f"{name}: median residual {residual.median():.2f}, 95 % {residual.quantile(0.95):.2f}; "
              f"{found} of {len(some)} found")


if __name__ == "__main__":
    main()
