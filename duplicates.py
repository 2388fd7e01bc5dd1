"""What is remembered of the images of a data folder: hash, thumbnail, why one is unreadable, near-duplicates.

It lies in .features beside the data folder, so that a second start reads no image. Where that cannot be
written, a note says so, and each process reads the images anew.
"""

from command import BadInput

import glob
import hashlib
import sys
import time

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from tqdm import tqdm

from files import load_safetensors, remove_unfinished, save_safetensors, text_hash
from pixels import SIDE, batches, in_parallel, look, note

# Near-duplicates


def near_duplicates(records, workers=2) -> list[list[int]]:
    """Groups of indices of images that show the same or nearly the same frame; kept for the next start."""
    if not records:
        return []
    thumbnails = np.stack([thumbnail for _, thumbnail, _ in seen(records, workers)])
    file, key = memory(records, "groups"), text_hash(RULE, hashlib.sha256(thumbnails).hexdigest())
    label = read_groups(file, key, len(records))
    if label is None:
        label = np.full(len(records), -1)                   # of each image its group's number
        for k, group in enumerate(compare(thumbnails)):
            label[group] = k
        write(file, {"label": torch.from_numpy(label)}, {"key": key})
    groups = {}
    for i in np.flatnonzero(label >= 0).tolist():
        groups.setdefault(int(label[i]), []).append(i)
    return list(groups.values())


def read_groups(file, key, n):
    """The group's number of each of n images, -1: none; None unless the file holds those of the key."""
    try:
        tensors, metadata = load_safetensors(file)
        label = tensors["label"].numpy()
        return label if metadata["key"] == key and label.shape == (n,) else None
    except (BadInput, OSError, KeyError):
        return None


RULE = "24x24, blur 1.5, correlation 0.95"


def compare(thumbnails) -> list[list[int]]:
    """The groups of near-duplicates among grey thumbnails, uint8 (n, 24, 24); takes n^2.

    Rule and threshold are ours: two images belong together when their 24x24 grey thumbnails, high-passed by
    subtracting a blur of 1.5 thumbnail pixels, have a correlation above 0.95. In Kvasir-SEG true pairs have
    at least 0.969, all others at most 0.868; 4,000 phantoms at most 0.941.
    """
    first, detail = {}, []                                  # of equal thumbnails, one image stands for all
    same = [first.setdefault(t.tobytes(), i) for i, t in enumerate(thumbnails)]
    for part in batches(len(thumbnails), 4096):
        x = thumbnails[part].astype(np.float32)
        x = torch.from_numpy(x - gaussian_filter(x, (0, 1.5, 1.5))).flatten(1)
        x = x - x.mean(1, keepdim=True)
        norm = x.norm(dim=1, keepdim=True)
        index = torch.arange(part.start, part.stop)
        keep = (norm[:, 0] > SIDE) & (torch.tensor(same[part]) == index)
        detail.append((x[keep] / norm[keep], index[keep]))  # under one grey level of detail: of none
    x, index = (torch.cat(parts) for parts in zip(*detail, strict=True))
    n, place = len(x), {int(i): k for k, i in enumerate(index)}
    group = torch.arange(n)                                 # of each, one of its members stands for it
    strips = batches(n, max(64, min(1024, 2 ** 22 // max(n, 1))))           # at most 50 MB at a time
    for part in tqdm(strips, "near-duplicates", unit="strip", delay=2, leave=False, disable=None):
        close = (x[part] @ x[part.start:].T > 0.95) & (group[part, None] != group[part.start:])
        if close.any():
            links = torch.cat([close.nonzero() + part.start, torch.stack([torch.arange(n), group], 1)]).T
            graph = coo_array((np.ones(links.shape[1], bool), links.numpy()), shape=(n, n))
            label = connected_components(graph, directed=False)[1]
            group = torch.from_numpy(np.unique(label, return_index=True)[1][label])
    groups = {}
    for i, k in enumerate(same):
        if k in place:
            groups.setdefault(int(group[place[k]]), []).append(i)
    return [g for g in groups.values() if len(g) > 1]


# Files that have been looked at


remembered = {}


def seen(records, workers=2) -> list[tuple]:
    """pixels.look at each image file; only files that are new, by name, size and times, are read."""
    if not records:
        return []
    file = memory(records, "seen")
    if file not in remembered:
        remembered[file] = read_seen(file)
    known, keys = remembered[file], [stat_key(r.path) for r in records]
    new = [i for i, r in enumerate(records) if keys[i] is None or known.get(r.name, [None])[0] != keys[i]]
    found = in_parallel(lambda i: look(records[new[i]].path), len(new), workers, "comparing images")
    out = dict(zip(new, found, strict=True))
    for i, (sha, thumbnail, why) in out.items():            # the folder may be elsewhere at the next start
        out[i] = sha, thumbnail, why and why.removeprefix(str(records[i].path))
    keep = {records[i].name: (keys[i], *out[i]) for i in new if keys[i] and any(out[i][0])}
    if keep:
        known |= keep
        write_seen(file, known)
    found = [out[i] if i in out else known[r.name][1:] for i, r in enumerate(records)]
    return [(sha, t, why and f"{r.path}{why}") for r, (sha, t, why) in zip(records, found, strict=True)]


def expect_others(records, folder, known, source, what):
    """BadInput if most images of a folder are those of another, of which the message says what they are.

    The same: equal bytes, or an equal thumbnail with any detail. Some are said in a line: a set may hold an
    image twice.
    """
    def keys(records):
        return [t.tobytes() if np.ptp(t) else sha for sha, t, _ in seen(records)]

    there = set(keys(known))
    n = sum(key in there for key in keys(records))
    said = f"{folder}: {n} of {len(records)} images are also in {source}, {what}"
    if n > len(records) / 2:
        raise BadInput(f"{said}; expected different images")
    if n:
        print(said, file=sys.stderr)


def memory(records, what):
    """The file beside the data folder of these records in which something is kept for the next start."""
    folder = records[0].path.absolute().parent
    folder = folder.parent if folder.name == "images" else folder
    return folder.parent / ".features" / f"{folder.name}.{what}.safetensors"


def stat_key(path):
    """Size in bytes and times in ns of a file: a copy may keep the time of the file that it replaces, but not
    the time of change. None where there is no such file, or where it is so new that another change might
    have the same time."""
    try:
        found = path.stat()
    except OSError:
        return None
    new = time.time_ns() - max(found.st_mtime_ns, found.st_ctime_ns) < 50_000_000
    return None if new else (found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def read_seen(file) -> dict:
    """{name: (size and times, hash, thumbnail, None or why it is unreadable)} of such a file; empty where
    there is none or another's."""
    try:
        tensors, metadata = load_safetensors(file)
        hashes, thumbnails = tensors["hash"].numpy(), tensors["thumbnail"].numpy()
        if hashes.shape[1:] != (32,) or thumbnails.shape[1:] != (SIDE, SIDE):
            return {}
        why = metadata["unreadable"]
        return {name: (tuple(key), h.astype(np.uint8).tobytes(), t.astype(np.uint8), why.get(name))
                for (name, *key), h, t in zip(metadata["files"], hashes, thumbnails, strict=True)}
    except (BadInput, OSError, KeyError, TypeError, ValueError, AttributeError):
        return {}


def write_seen(file, known):
    hashes = np.stack([np.frombuffer(h, np.uint8) for _, h, _, _ in known.values()])
    tensors = {"hash": torch.from_numpy(hashes),
               "thumbnail": torch.from_numpy(np.stack([t for _, _, t, _ in known.values()]))}
    write(file, tensors, {"files": [[name, *v[0]] for name, v in known.items()],
                          "unreadable": {name: v[3] for name, v in known.items() if v[3]}})


def write(file, tensors, metadata):
    try:
        remove_unfinished(file.parent, glob.escape(file.name))
        save_safetensors(file, tensors, metadata)
    except (OSError, ValueError) as error:                  # ValueError: a folder's name that is not UTF-8
        note(file.parent, "cache", f"not cached: {file}: {getattr(error, 'strerror', None) or error}")
