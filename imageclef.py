"""The protocol of MEDVQA-GI 2025 (ImageCLEFmedical) for generated images: fidelity, agreement, diversity.

Features are those of a medical image encoder, ENCODER at the organisers': the state of its CLS token, at unit
length. Prompts come in pairs, a prompt and a paraphrase, with several images each. A figure is a mean over
prompts or pairs, and how many of them it could be computed of stands beside it.

The organisers' public script exists in versions that differ: one brings states to unit length as here,
another takes Frechet distances of them as they are, which are far larger. Its fidelity is a mean over pairs
of 100 / (1 + (d_1 + d_2) / 2), which is at most ours (Jensen), and its images go to the encoder's own
processor as they are, here padded to one side before. Agreement and diversity are as here.
"""

from command import BadInput

import torch
import torch.nn.functional as F

import data
import wording
from distances import as_features, fid, mean_interval

ENCODER = "ikim-uk-essen/BiomedCLIP_ViT_patch16_224"
LEAST = 2  # images of a prompt that a covariance, or a distance between them, needs
FEW = 5    # prompts or pairs that a bootstrap needs: the interval of two would be the two themselves

# The figures, of features (n, d) at unit length by prompt


def fidelity(real: dict, fake: dict) -> torch.Tensor:
    """100 / (1 + d) of each prompt, d the Frechet distance of its images to its real images: (prompts,).

    float64 in (0, 100], 100 is the best; over the prompts with LEAST images and LEAST real images.
    """
    both = [p for p in fake if min(len(fake[p]), len(real.get(p, ()))) >= LEAST]
    return torch.tensor([100 / (1 + fid(real[p], fake[p])) for p in both], dtype=torch.float64)


def agreement(fake: dict, pairs) -> torch.Tensor:
    """Mean cosine similarity of the images of a prompt with those of its paraphrase, of each pair: (pairs,).

    1 / (m n) sum over x_i, y_j of x_i . y_j, with all m images x_i of the one and n images y_j of the other,
    which is the product of the means, mean(x) . mean(y). float64 in [-1, 1].
    """
    found = [fake[a].mean(0) @ fake[b].mean(0) for a, b in pairs if a in fake and b in fake]
    return torch.stack(found) if found else torch.zeros(0, dtype=torch.float64)


def diversity(fake: dict) -> torch.Tensor:
    """Mean Euclidean distance between two images of a prompt, of each prompt with LEAST: (prompts,).

    2 / (n (n - 1)) sum over i < j of |x_i - x_j|. float64 from 0, all images the same, to 2.
    """
    found = [F.pdist(x).mean() for x in fake.values() if len(x) >= LEAST]
    return torch.stack(found) if found else torch.zeros(0, dtype=torch.float64)


def evaluate(real, fake, groups, resamples=0) -> dict:
    """Every figure of features (n, d) of any length; groups: what read_groups returns.

    NAME_low and NAME_high are 95 % intervals over prompts or pairs where there are FEW, n_NAME is the number
    of these. A figure that no prompt allows is absent.
    """
    pairs, real_rows, fake_rows = groups
    real, fake = (F.normalize(as_features(x, name, LEAST).double(), dim=1)
                  for x, name in ((real, "real"), (fake, "fake")))
    own_real, own_fake = ({p: x[rows] for p, rows in of.items()}
                          for x, of in ((real, real_rows), (fake, fake_rows)))
    out = {"fid": fid(real, fake), "n_prompts": len(own_fake)}
    for name, values in (("fidelity", fidelity(own_real, own_fake)),
                         ("agreement", agreement(own_fake, pairs)), ("diversity", diversity(own_fake))):
        out[f"n_{name}"] = len(values)
        if len(values):
            out[name] = values.mean().item()
        if len(values) >= FEW and resamples:
            out[f"{name}_low"], out[f"{name}_high"] = mean_interval(values, resamples)
    return out


# Which images belong to which prompt


def rows_by_prompt(folder, paths) -> dict:
    """{prompt: rows of paths} by the captions of a data folder; an image may have several prompts."""
    row, out = {p.name: i for i, p in enumerate(paths)}, {}
    for record in data.read_folder(folder):
        if record.name not in row:
            raise BadInput(f"{record.path}: no such image, expected it as the captions name it")
        for prompt in dict.fromkeys(record.prompts):
            out.setdefault(prompt, []).append(row[record.name])
    return out


def read_groups(pairs_file, real, real_paths, fake, fake_paths):
    """(pairs, {prompt: its real images}, {prompt: its images}), images as rows of the paths.

    real, fake: data folders. Real images of a prompt are those whose captions name it or a wording that the
    pairs couple with it. BadInput unless both prompts of some pair have images, and some prompt real ones.
    """
    found = [pair for pair in wording.read_pairs("--pairs", pairs_file) if pair[0] != pair[1]]
    pairs = list({frozenset(pair): pair for pair in found}.values())  # in both orders it is one
    if not pairs:
        raise BadInput(f"--pairs {pairs_file}: every row repeats its prompt, expected other words for it")
    fakes, reals = rows_by_prompt(fake, fake_paths), rows_by_prompt(real, real_paths)
    if nameless := sorted({*range(len(fake_paths))} - {i for rows in fakes.values() for i in rows}):
        raise BadInput(f"{fake_paths[nameless[0]]}: has no prompt in the captions of {fake}; expected a "
                       "folder of sampler.py")
    if not any(a in fakes and b in fakes for a, b in pairs):
        raise BadInput(f"{pairs_file}: no row has images of both prompts in {fake}; expected the pairs that "
                       f"were sampled, the first is {pairs[0][0]!r:.100}")
    wordings = {}
    for pair in pairs:
        for a, b in (pair, pair[::-1]):
            wordings.setdefault(a, []).append(b)
    own = {p: sorted({i for q in (p, *wordings.get(p, ())) for i in reals.get(q, ())}) for p in fakes}
    if not any(len(own[p]) >= LEAST and len(fakes[p]) >= LEAST for p in fakes):
        raise BadInput(f"{fake}: no prompt has {LEAST} images and {LEAST} real ones; expected prompts of the "
                       f"captions of {real}, or paraphrases that --pairs couples with them, the first is "
                       f"{next(iter(fakes))!r:.100}")
    return pairs, own, fakes


def table(numbers) -> list[str]:
    """The rows of the table."""
    def row(name, key, note, of):
        n = f"{numbers[f'n_{key}']} {of}"
        if key not in numbers:
            return f"{name:<34}{'-':>10}  {n}"
        low, high = (numbers.get(f"{key}_{end}") for end in ("low", "high"))
        interval = "" if low is None else f", 95 %: {low:.4f} to {high:.4f}"
        return f"{name:<34}{numbers[key]:>10.4f}  {n}{interval}; {note}"

    prompts = f"of {numbers['n_prompts']} prompts"
    return [
        row("fidelity", "fidelity", "100 / (1 + Frechet distance) within a prompt", prompts),
        row("agreement", "agreement", "cosine between images of a pair", "pairs of prompts"),
        row("diversity", "diversity", "distance between images of a prompt", prompts),
        f"{'Frechet distance of all':<34}{numbers['fid']:>10.4f}",
    ]
