"""copies.py: each of the forms in which an image may be a copy, and images that are none."""

from command import BadInput  # noqa: F401 - before torch

import pytest
import torch
import torch.nn.functional as F
from helpers import KVASIR, real_images

import copies
import data
from memorisation import COPY


def scenes(n, seed):
    """uint8 (n, 3, 64, 64): smooth random fields, darker towards the corners as endoscopy is."""
    generator = torch.Generator().manual_seed(seed)
    x = F.interpolate(torch.randn(n, 3, 12, 12, generator=generator), size=64, mode="bicubic")
    ramp = torch.linspace(-1, 1, 64) ** 2
    return (130 + 30 * x - 40 * (ramp + ramp[:, None])).clamp(0, 255).byte()


def change(img, kind):
    """One image (3, 64, 64) in another form."""
    if kind == "shifted":                                   # what comes in from outside is black
        return F.pad(img, (7, -7, -5, 5))
    if kind == "recoloured":
        gain, offset = torch.tensor([[[0.7]], [[1.2]], [[0.9]]]), torch.tensor([[[20.0]], [[-10.0]], [[5.0]]])
        return (gain * img + offset).clamp(0, 255).byte()
    return copies.forms(img[None])[0, copies.FORMS.index(kind)]


@pytest.mark.parametrize("kind", [*copies.FORMS, "shifted", "recoloured"])
def test_one_copy_among_a_thousand_is_found_with_its_original(kind):
    images, originals = scenes(1000, 0), scenes(8, 1)
    images[617] = change(originals[5], kind)
    if kind == "as it is":                                  # the thousand are the same in every case
        residual, index, form, shift = copies.closest(images, originals)
        assert (residual < COPY).nonzero().tolist() == [[617]] and residual[617] < 0.05
    else:
        residual, index, form, shift = copies.closest(images[610:620], originals)
        assert (residual < COPY).nonzero().tolist() == [[7]]
    k = 617 if kind == "as it is" else 7
    assert index[k] == 5
    inverse = {"turned by 90": "turned by 270", "turned by 270": "turned by 90"}.get(kind, kind)
    assert copies.FORMS[form[k]] == (inverse if kind in copies.FORMS else "as it is")
    assert shift[k].tolist() == ([5, -7] if kind == "shifted" else [0, 0])


@pytest.mark.parametrize("kind", ["as it is", "mirrored", "by one pixel", "recoloured"])
def test_an_image_that_comes_again_is_counted(kind):
    images = scenes(30, 2)
    again = [x.roll((1, 1), (1, 2)) if kind == "by one pixel" else change(x, kind) for x in images[[3, 3, 8]]]
    assert copies.repeats(images) == 0 and copies.repeats(images[:1]) == 0
    assert copies.repeats(torch.stack([*images, *again])) == 3  # two of the one, one of the other


def test_a_large_group_is_one_image():
    one = F.interpolate(scenes(1, 5).float(), size=96, mode="bilinear").byte()[0]
    moved = [one[:, 16 + k // 5:80 + k // 5, 16 + k % 5:80 + k % 5] for k in range(25)]
    assert copies.repeats(torch.stack([*moved, *moved[:7], *scenes(3, 6)])) == 31


def test_black_and_flat_images_are_copies_of_none():
    flat = torch.zeros(3, 3, 64, 64, dtype=torch.uint8)
    flat[1] += 90
    residual = copies.closest(flat, torch.cat([flat, scenes(2, 0)]))[0]
    assert residual.tolist() == [1, 1, 1]
    assert copies.repeats(flat) == 1                        # but a black one is there twice


@real_images
def test_real_images_their_copies_and_frames_of_one_clip():
    """Of different patients none is below COPY, in every form all are; frames of a clip are counted apart."""
    paths = sorted((KVASIR / "images").iterdir())[:40]
    images, _ = data.load_images([data.Record(p, p.name, []) for p in paths], 64)
    assert copies.closest(images[20:], images[:20])[0].min() > COPY
    for k, kind in enumerate([*copies.FORMS, "shifted", "recoloured"]):
        residual, index, _, _ = copies.closest(change(images[k], kind)[None], images[:20])
        assert residual[0] < COPY and index[0] == k, kind
