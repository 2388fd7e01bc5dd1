"""The public Kvasir data sets as data folders: images byte for byte, prompts derived from the masks.

Kvasir-SEG  Jha et al. 2020, MMM: 1,000 images with polyps and a mask of each

    python kvasir.py seg --src Kvasir-SEG --out data/kvasir
"""

from command import BadInput, run_command

import argparse
import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import binary_erosion, label
from tqdm import tqdm

import data
import prompts
from files import replacing
from pixels import FORMATS, orientation

SPECK = 0.0005  # share of the image: smaller components are JPEG noise, of 1e-5; polyps have at least 1.6e-3
COVERS = 0.20       # share of a polyp's area that must lie in a cell


def polyps_in(mask) -> list[list[str]]:
    """The cells of every polyp in a boolean mask (h, w): those of the 3x3 grid that hold at least COVERS of
    its area, and always the fullest. A polyp is an 8-connected component no smaller than SPECK."""
    h, w = mask.shape
    components, n = label(mask, np.ones((3, 3)))
    polyps = []
    for i in range(1, n + 1):
        y, x = np.nonzero(components == i)
        if len(y) >= SPECK * mask.size:
            share = np.bincount(3 * y // h * 3 + 3 * x // w, minlength=9) / len(y)
            covered = [s >= COVERS or s == share.max() for s in share]
            polyps.append([c for c, yes in zip(prompts.CELLS, covered, strict=True) if yes])
    return polyps


def binary(mask, path):
    """The polyps' pixels of a mask (h, w), its brightest channel: black and one other value, of any height,
    with a soft edge between them as JPEG and resizing make it. BadInput for a mask of more values."""
    values, top = np.unique(mask), mask.max()
    few = len(values) <= 8                                  # drawn, not photographed or compressed
    between = (mask > 0) & (mask < top) if few else (mask > top // 8) & (mask < top - top // 8)
    area = binary_erosion(between, np.ones((3, 3)), iterations=2 + min(mask.shape) // 200).any()
    if area or top < 128 and not few or len(values) > 1 and values[0] > top // 8:
        shown = ", ".join(map(str, values[:8])) + f", ... {top}" * (not few)
        raise BadInput(f"{path}: expected a mask of black and one other value, got greys {shown}")
    return mask > min(127, top // 2)


def has_box(img) -> bool:
    """Whether an RGB image has the artefact, a green or black box in its lower left. The rule is ours.

    Green: at least 5 % of the lower left quarter is a green that no tissue has. Black: going right along the
    lower edge, the height of the black above it stays level over four columns and then falls at once by 7.5 %
    of the image, where the frame's own corner falls slowly. On 850 images of Kvasir-SEG with labels by eye,
    the same that the numbers were chosen on, it finds 499 of 499 boxes and 5 where there is none; 16 notches
    of the frame that are too small to label are left out.
    """
    n = 128
    rgb = np.asarray(img.resize((n, n), Image.Resampling.BOX)).astype(int)
    r, g, _ = np.moveaxis(rgb[n // 2:, :n // 2], -1, 0)
    if ((g > 1.25 * r) & (g > 60)).mean() >= 0.05:
        return True
    black = rgb.max(-1) < 24
    height = np.cumprod(black[::-1], axis=0).sum(0) / n
    before = np.stack([height[k:n - 5 + k] for k in range(4)])           # columns x - 3 ... x
    fall = height[3:n - 2] - height[5:]                                  # from column x to x + 2
    level = (np.ptp(before, axis=0) <= 0.02) & (before.max(0) < 0.75)  # a black edge of full height is no box
    return bool((level & (fall >= 0.075))[:int(0.6 * n)].any())


def orientation_of(path):
    with Image.open(path, formats=FORMATS) as img:
        return orientation(img)


def true_prompts(path, mask_path) -> list[str]:
    """The prompts that hold for one image, each about one fact."""
    img, mask = data.open_image(path), data.open_image(mask_path)
    turn, mask_turn = orientation_of(path), orientation_of(mask_path)
    if turn != mask_turn:                                   # was it drawn on stored or on turned pixels?
        raise BadInput(f"{mask_path}: expected the EXIF orientation of its image, {turn}, got {mask_turn}; "
                       "save both upright, without EXIF")
    if img.size != mask.size:
        raise BadInput(f"{mask_path}: expected the size of its image, {img.size}, got {mask.size}")
    polyps = polyps_in(binary(np.asarray(mask).max(-1).astype(int), mask_path))
    n = len(polyps)
    facts = [{"n_polyps": n}, {"n_findings": n}, {"procedure": "colonoscopy"}, {"box": has_box(img)}]
    if polyps:
        cells = [c for c in prompts.CELLS if any(c in polyp for polyp in polyps)]
        facts = [{"contains": ["polyp"]}, *facts, {"abnormality_cells": cells}]
    return [prompts.write(fact) for fact in facts]


def convert_seg(src, out, workers):
    """The public Kvasir-SEG folder into a data folder: images byte for byte, prompts from the masks."""
    images, out = data.list_images(src), Path(out)
    if not (Path(src) / "masks").is_dir():
        raise BadInput(f"{src}: holds no folder masks/")
    if out.resolve() == Path(src).resolve():
        raise BadInput(f"{out}: --out must be another folder than --src")
    masks = {p.stem: p for p in data.files_in(Path(src) / "masks")}
    missing = [p.name for p in images if p.stem not in masks]
    if missing or not images:
        raise BadInput(f"{src}/masks: no mask for {len(missing)} of {len(images)} images "
                       f"{' '.join(missing[:3])}")
    there = data.files_in(out / "images") if (out / "images").is_dir() else []
    if others := {p.name for p in there} - {p.name for p in images}:
        raise BadInput(f"{out}: holds {len(others)} images that are not from {src}; give an empty folder")
    def prompts_of(i):
        return true_prompts(images[i], masks[images[i].stem])

    rows = data.in_parallel(prompts_of, len(images), workers, "masks")
    for path in tqdm(images, "copying", unit="image", delay=2, leave=False, disable=None):
        with replacing(out / "images" / path.name) as tmp:
            shutil.copyfile(path, tmp)
    data.write_captions(out, [(prompt, p.name) for p, own in zip(images, rows, strict=True)
                              for prompt in own])
    print(f"{out}: {len(images)} images, {sum(map(len, rows))} prompts")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Turn a public data set into a data folder.")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("seg", help="Kvasir-SEG: images with masks of their polyps",
                            formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--src", required=True, metavar="DIR", help="folder with images/ and masks/")
    p.add_argument("--out", required=True, metavar="DIR", help="data folder to write")
    p.add_argument("--workers", type=int, default=2, help="threads that read images")
    args = parser.parse_args(argv)
    return convert_seg(args.src, args.out, args.workers)


if __name__ == "__main__":
    run_command(main)
