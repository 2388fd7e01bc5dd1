"""Is an image one of those, as it is, mirrored, turned, shifted or recoloured? Each image on its own (ours).

Images are compared at 64 x 64 px, by the middle 48 x 48 of the one, in its 8 mirrorings and turns, at every
place of the other. What counts is detail between 3 and 9 px: brightness that varies slowly is alike in all of
endoscopy, and noise is not copied. At the best alignment, a gain for each colour channel is fitted (an offset
does not survive the filter). The residual of a block of 12 x 12 px is the root of the share of its detail's
energy that the fit leaves unexplained, that of the image what three quarters of its blocks with detail are
within: 0 for the same image, about 1 for an unrelated one. A copy matches everywhere, two polyps at one place
in a few blocks.
Where either image is nearly black, as in the bars beside a wide image, nothing is compared.

All pairs would take hours. Of each image only the SHORTLIST most similar originals are aligned to the pixel,
found by the correlation of 12 x 12 means, each of 4 x 4 px, in all 8 forms at every second pixel of shift.
"""

import hashlib

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from tqdm import tqdm

from pixels import batches

SIDE, WINDOW, CELL, STRIDE = 64, 48, 4, 2           # px
REACH = (SIDE - WINDOW) // 2                        # px, the largest shift either way
MIDDLE = slice(REACH, REACH + WINDOW)
PLACES = 2 * REACH // STRIDE + 1                    # of a window, along a side
FINE, COARSE = 3, 9                                 # px, between which detail counts
SHORTLIST, CORRELATION = 4, 0.7
LEAST = 0.3                                         # residual below which one image shows what another does
BLACK, DETAIL = 16, 1.5                             # grey levels; a block with less detail is not compared
BLOCK, PART = 12, 0.75                              # px; share of the blocks within the residual
FORMS = [f"{mirrored}{turn}" or "as it is" for turn in ("", "turned by 90", "turned by 180", "turned by 270")
         for mirrored in ("", "mirrored" + (", " if turn else ""))]


def closest(images, originals, device="cpu"):
    """The original that each image is nearest to: uint8 (n, 3, h, w), (m, 3, h, w) -> four tensors.

    (residual (n,) float in [0, 1], index of the original (n,), of the form in FORMS (n,), shift (n, 2) down
    and to the right of the image so turned, in 64ths of the side). An image or original without detail, such
    as a black one, has a residual of 1.
    """
    _, index, which = shortlist(images, originals, device)
    found = []
    for k, x in enumerate(images):
        residual, shift = align_all(x, originals[index[k]], which[k], device)
        best = int(residual.argmin())
        found.append((residual[best], index[k, best], which[k, best] // PLACES**2, shift[best]))
    return tuple(torch.stack(parts) for parts in zip(*found, strict=True))


def align_all(x, originals, which, device):
    """align of one image (3, h, w) and k originals, each in its form and near its place, on the CPU."""
    turned = forms(canvas(x[None].to(device)))[0, which // PLACES**2]
    residual, shift = align(turned, canvas(originals.to(device)), (which % PLACES**2).to(device))
    return residual.cpu(), shift.cpu()


def shortlist(images, originals, device, others=False):
    """(correlation, index, which), all (n, SHORTLIST): the most similar originals, each in its best form and
    place. which is form * PLACES^2 + place. others: the image itself, at its own index, is none of them.
    Memory does not grow with the number of pairs.
    """
    n = len(images)
    top, index, which = torch.full((n, 0), -1.0), *torch.zeros(2, n, 0, dtype=torch.long)
    blocks = tqdm(batches(len(originals), 512), "copies", unit="block", delay=2, leave=False, disable=None)
    for block in blocks:
        windows = windows_of(canvas(originals[block].to(device)))
        score = torch.empty(n, block.stop - block.start)    # filled in place: a list fragments the heap
        best = torch.empty(score.shape, dtype=torch.long)
        for part in batches(n, 16):
            score[part], best[part] = similarity(canvas(images[part].to(device)), windows)
        number = torch.arange(block.start, block.stop).expand(n, -1)
        if others:
            score = score.masked_fill(number == torch.arange(n)[:, None], -1.0)
        pairs = (top, score), (index, number), (which, best)
        top, index, which = (torch.cat(pair, dim=1) for pair in pairs)
        top, keep = top.topk(min(SHORTLIST, top.shape[1]), dim=1)
        index, which = index.gather(1, keep), which.gather(1, keep)
    return top, index, which


def repeats(images, device="cpu"):
    """The number of images (n, 3, h, w) that show again what another of them shows: n less the number of
    different ones. Again: the same pixels, or a residual to it below LEAST.

    Images whose correlation is below CORRELATION are not aligned: shifted and mirrored ones have at least
    0.79, nineteen of twenty unrelated ones below 0.71, of phantoms and of Kvasir-SEG. Of each group that is
    found one image stays, and these are compared anew: a group may be larger than a shortlist. Takes n^2:
    1,500 images 21 s of one core.
    """
    first, alone = {}, 0
    for k, x in enumerate(images):
        first.setdefault(hashlib.sha256(x.numpy().tobytes()).digest(), k)
    left = images[list(first.values())]
    while len(left) > 1:
        links, short = [], shortlist(left, left, device, others=True)
        for k, (top, index, which) in enumerate(zip(*short, strict=True)):
            if (near := top > CORRELATION).any():
                residual, _ = align_all(left[k], left[index[near]], which[near], device)
                links += [(k, i) for i in index[near][residual < LEAST].tolist()]
        if not links:
            break
        graph = coo_array((np.ones(len(links), bool), np.array(links).T), shape=(len(left),) * 2)
        label = connected_components(graph, directed=False)[1]
        _, at, size = np.unique(label, return_index=True, return_counts=True)
        alone += int((size == 1).sum())
        left = left[at[size > 1]]
    return len(images) - alone - len(left)


def canvas(images):
    """float (n, 3, 64, 64) in [0, 255]."""
    if images.shape[-1] < SIDE:
        return F.interpolate(images.float(), size=(SIDE, SIDE), mode="bilinear")
    return F.adaptive_avg_pool2d(images.float(), SIDE)


def blur(x, width):
    return F.avg_pool2d(x, width, 1, width // 2, count_include_pad=False)


def grey_detail(x):
    """(n, 1, 64, 64): the mean of the channels, each at one contrast, between FINE and COARSE."""
    grey = (x / x.std((2, 3), keepdim=True).clamp_min(1)).mean(1, keepdim=True)
    grey = blur(grey, FINE)
    return grey - blur(grey, COARSE)


def forms(x):
    """(n, 8, c, h, w) in the order of FORMS."""
    turned = [torch.rot90(x, k, (-2, -1)) for k in range(4)]
    return torch.stack([y for t in turned for y in (t, t.flip(-1))], dim=1)


def unit(x):
    x = x - x.mean(-1, keepdim=True)
    return x / x.norm(dim=-1, keepdim=True).clamp_min(1e-6)


def windows_of(x):
    """(n, places, 144) unit descriptors of the windows of each image (n, 3, 64, 64), STRIDE px apart."""
    cells = F.avg_pool2d(grey_detail(x), CELL, STRIDE)
    return unit(F.unfold(cells, WINDOW // CELL, dilation=CELL // STRIDE).transpose(1, 2))


def similarity(x, windows):
    """(correlation, form * PLACES^2 + place), both (n, m): images x (n, 3, 64, 64), windows_of m others."""
    query = unit(F.avg_pool2d(forms(grey_detail(x))[:, :, 0, MIDDLE, MIDDLE], CELL).flatten(2))
    s = query.flatten(0, 1) @ windows.flatten(0, 1).T                       # (n 8, m places)
    return s.view(len(x), 8, -1, PLACES**2).transpose(1, 2).flatten(2).max(2)


def align(x, y, place):
    """(residual (k,), shift (k, 2) px) of images x against originals y, both (k, 3, 64, 64), near a place.

    place (k,): the index of the window in windows_of. Pixels up to 2 from there are tried, with the grey
    detail; the residual is that of the best, of the three channels together.
    """
    corner = STRIDE * torch.stack([place // PLACES, place % PLACES], dim=1)
    tried = cut(F.pad(grey_detail(y), (2, 2, 2, 2)), corner, WINDOW + 4)   # (k, 1, 52, 52)
    tried = unit(tried.unfold(2, WINDOW, 1).unfold(3, WINDOW, 1).flatten(4).flatten(1, 3))    # (k, 25, 2304)
    target = unit(grey_detail(x)[:, 0, MIDDLE, MIDDLE].flatten(1))
    best = (tried @ target[:, :, None])[:, :, 0].argmax(1)
    corner = (corner + torch.stack([best // 5, best % 5], dim=1) - 2).clamp(0, SIDE - WINDOW)
    x, y = x[:, :, MIDDLE, MIDDLE], cut(y, corner, WINDOW)
    light = torch.minimum(x.amax(1, keepdim=True), y.amax(1, keepdim=True))
    mask = -F.max_pool2d(-light, COARSE, 1, COARSE // 2) > BLACK
    x, y = (blur(z, FINE) for z in (x, y))
    x, y = ((z - blur(z, COARSE)) * mask for z in (x, y))
    gain = ((x * y).sum((2, 3)) / (y * y).sum((2, 3)).clamp_min(1e-6)).clamp_min(0)[:, :, None, None]
    left, of_x, of_y = (F.avg_pool2d(z * z, BLOCK).mean(1).flatten(1) for z in (x - gain * y, x, gain * y))
    energy = torch.maximum(of_x, of_y)                                     # (k, blocks), mean square
    share = torch.where(energy > DETAIL**2, left / energy.clamp_min(1e-6), torch.nan)
    enough = share.isfinite().sum(1) >= share.shape[1] // 4
    return torch.where(enough, share.nanquantile(PART, dim=1).clamp(0, 1).sqrt(), 1.0), corner - REACH


def cut(x, corner, side):
    """A square of each image (k, c, h, w), its upper left pixel at corner (k, 2)."""
    return torch.stack([z[:, i:i + side, j:j + side] for z, (i, j) in zip(x, corner.tolist(), strict=True)])
