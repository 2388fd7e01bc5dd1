"""The attribute classifier: which attributes of the prompts' grammar an image shows.

Network, augmentation and training are ours. Labels come from a folder's attributes.jsonl where there is one,
else from its prompts.
"""

from command import BadInput

import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import trange

import data
import prompts
from files import (
    file_hash,
    json_line,
    load_metadata,
    load_safetensors,
    read_text,
    save_safetensors,
    text_hash,
)
from weights import load_state

# What is judged. Of a "categorical" attribute exactly one value holds for an image, of a "multilabel" one any
# number of values.
ATTRIBUTES = {
    "polyp": ("categorical", ("no polyps", "a polyp")),
    "count": ("categorical", (*"012345678", "more")),
    "place": ("multilabel", prompts.CELLS),
    "size": ("multilabel", prompts.SIZES),
    "instruments": ("categorical", ("none", "some")),
    "box": ("categorical", ("without", "with")),
    "text": ("categorical", ("without", "with")),
    "colour": ("multilabel", prompts.COLORS),
    "paris": ("multilabel", prompts.PARIS),
    "procedure": ("categorical", ("colonoscopy", "gastroscopy")),
}
VALUES = [(attribute, value) for attribute, (_, values) in ATTRIBUTES.items() for value in values]
COLUMN = {pair: i for i, pair in enumerate(VALUES)}
SLICE = {a: slice(COLUMN[a, values[0]], COLUMN[a, values[-1]] + 1) for a, (_, values) in ATTRIBUTES.items()}
ORDERED = ("count", "size")     # where a wrong image may show the next value
UNKNOWN = -1
MIN_EXAMPLES = 5                # training images below which a classifier has not seen a value


# Labels


def merge(parsed: list[dict]) -> dict:
    """The attributes of several prompts of one image together; lists are united, contradictions dropped."""
    out, contradicted = {}, set()
    for attributes in parsed:
        for key, value in attributes.items():
            if isinstance(value, list):
                value = list(dict.fromkeys([*out.get(key, []), *value]))
            elif out.setdefault(key, value) != value:
                contradicted.add(key)
            out[key] = value
    return {key: value for key, value in out.items() if key not in contradicted}


def from_line(line: dict) -> dict:
    """A line of attributes.jsonl as a complete dict of attributes (prompts.py)."""
    polyps = line["polyps"]
    return {"procedure": line["procedure"], "box": line["box"], "text": line["text"],
            "n_polyps": len(polyps), "n_findings": len(polyps), "n_instruments": len(line["instruments"]),
            "abnormality_cells": [c for p in polyps for c in p["cells"]],
            "colors": [c for p in polyps for c in p["colors"]],
            "sizes": [p["size"] for p in polyps], "paris": [p["paris"] for p in polyps]}


KNOWN = {"procedure": ATTRIBUTES["procedure"][1], "box": (False, True), "text": (False, True),
         "abnormality_cells": prompts.CELLS, "colors": prompts.COLORS, "sizes": prompts.SIZES,
         "paris": prompts.PARIS}
LISTED = ("abnormality_cells", "colors", "sizes", "paris")


def unknown_value(attributes: dict):
    """What a line's attributes hold that is no value of them, in words, or None. A null of one that has a
    single value means that it is not known."""
    for key, known in KNOWN.items():
        value = attributes[key]
        values = [] if value is None else value if key in LISTED else [value]
        if wrong := [value for value in values if value not in known]:
            return f"{key} {wrong[0]!r:.60}, expected {', '.join(map(str, known))}"
    return None


def count_value(n_polyps: int) -> str:
    """The value of the attribute "count"."""
    return str(n_polyps) if str(n_polyps) in ATTRIBUTES["count"][1] else "more"


def truth_row(attributes: dict) -> list[int]:
    """1, 0 or UNKNOWN for each of VALUES: what a real image with these attributes shows.

    A prompt that names places, sizes, colours or types names all of them, so the others are absent.
    """
    a, contains = dict(attributes), attributes.get("contains", ())
    shown = "polyp" in contains or bool(a.get("sizes") or a.get("paris"))
    contradicted = shown and 0 in (a.get("n_polyps"), a.get("n_findings"))
    if contradicted:
        a = {k: v for k, v in a.items() if k not in ("n_polyps", "n_findings")}
    if a.get("n_findings") == 0:
        a = {"n_polyps": 0, "abnormality_cells": [], "colors": []} | a
    if a.get("n_polyps") == 0:
        a = {"sizes": [], "paris": []} | a
    n_polyps = a.get("n_polyps")
    polyp = None if n_polyps is None else n_polyps > 0
    if shown and not contradicted:
        polyp = True
    some = a["n_instruments"] > 0 if "n_instruments" in a else None
    if a.get("instrument_cells") or any(prompts.KIND.get(name) == "instrument" for name in contains):
        some = None if some is False else True
    row = [UNKNOWN] * len(VALUES)

    def categorical(attribute, index):
        if index is not None:
            span = SLICE[attribute]
            row[span] = [int(i == index) for i in range(span.stop - span.start)]

    def multilabel(attribute, names):
        if names is not None:
            row[SLICE[attribute]] = [int(v in names) for v in ATTRIBUTES[attribute][1]]

    categorical("polyp", polyp)
    categorical("count", None if n_polyps is None else ATTRIBUTES["count"][1].index(count_value(n_polyps)))
    categorical("instruments", some)
    categorical("box", a.get("box"))
    categorical("text", a.get("text"))
    categorical("procedure", {"colonoscopy": 0, "gastroscopy": 1}.get(a.get("procedure")))
    multilabel("place", a.get("abnormality_cells"))
    multilabel("size", a.get("sizes"))
    multilabel("colour", a.get("colors"))
    multilabel("paris", a.get("paris"))
    return row


def truth(records, folder) -> torch.Tensor:
    """(n, len(VALUES)) int8 of 1, 0, UNKNOWN: from the folder's attributes.jsonl, else from the prompts.

    Those of a mirrored copy are from its prompts, which are mirrored too.
    """
    lines = read_attributes(folder)
    if lines is not None:
        missing = [r.name for r in records if r.name not in lines]
        if missing:
            raise BadInput(f"{folder}/attributes.jsonl: no line for {missing[0]}")
    rows = [truth_row(merge([prompts.parse(p) for p in r.prompts]) if lines is None or r.mirror
                      else from_line(lines[r.name])) for r in records]
    return torch.tensor(rows, dtype=torch.int8)


def cannot_judge(labels) -> dict:
    """{column of VALUES: why} for the values that a classifier trained on labels (n, values) cannot judge.

    A classifier answers with one of the values that it has seen, whatever an image shows. It can judge a
    value only if it has seen images with it, images without it, and, of a number or a size, those next to
    it: one that has seen no more than three polyps calls eight of them three.
    """
    seen = (labels == 1).sum(0) >= MIN_EXAMPLES
    seen_without = (labels == 0).sum(0) >= MIN_EXAMPLES
    why = {}
    for i, (attribute, _) in enumerate(VALUES):
        span = SLICE[attribute]
        beside = range(max(i - 1, span.start), min(i + 2, span.stop)) if attribute in ORDERED else ()
        missing = [VALUES[j][1] for j in beside if not seen[j]]
        if not seen[i]:
            why[i] = f"fewer than {MIN_EXAMPLES} real images show it"
        elif not seen_without[i]:
            why[i] = f"fewer than {MIN_EXAMPLES} real images are without it"
        elif missing:
            why[i] = f"the judge has not seen {' and '.join(missing)}"
    return why


def read_attributes(folder):
    """{file name: line} of attributes.jsonl, or None where there is no such file."""
    path = Path(folder) / "attributes.jsonl"
    if not path.is_file():
        return None
    lines = {}
    for i, text in enumerate(read_text(path).split("\n"), 1):
        if not text.strip():
            continue
        line = json_line(path, i, text)
        try:
            fault = unknown_value(from_line(line))
            if line["file_name"] in lines:
                fault = f"{line['file_name']} stands there twice"
            lines[line["file_name"]] = line
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BadInput(f"{path}, row {i}: expected an image's attributes ({error!r:.100})") from None
        if fault:
            raise BadInput(f"{path}, row {i}: {fault}")
    return lines


# The network and its training


class Residual(nn.Module):
    def __init__(self, ch):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(ch, ch, 3, padding=1, bias=False), nn.BatchNorm2d(ch), nn.ReLU(),
                                  nn.Conv2d(ch, ch, 3, padding=1, bias=False), nn.BatchNorm2d(ch))

    def forward(self, x):
        return F.relu(x + self.body(x))


def conv(c_in, c_out, stride=1):
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False),
                         nn.BatchNorm2d(c_out), nn.ReLU())


class Classifier(nn.Module):
    """uint8 images (b, 3, size, size) -> logits (b, values); embed: the (b, 256) features before them."""

    def __init__(self, size=64, ch=32):
        super().__init__()
        n_halvings = max(1, round(math.log2(size / 16)))                # from size / 2 down to 8 x 8
        self.body = nn.Sequential(
            nn.PixelUnshuffle(2), conv(12, ch), *(conv(ch, ch, stride=2) for _ in range(n_halvings - 1)),
            conv(ch, 2 * ch, stride=2), Residual(2 * ch), Residual(2 * ch),
            conv(2 * ch, 4 * ch, stride=2), Residual(4 * ch))
        self.where = nn.Conv2d(4 * ch, ch, 1)
        self.features = nn.Sequential(nn.Linear(24 * ch, 256), nn.BatchNorm1d(256), nn.ReLU())
        self.out = nn.Linear(256, len(VALUES))

    def embed(self, img):
        x = (img.float() - 128) / 64
        x = self.body(x.contiguous(memory_format=torch.channels_last))
        flat = F.adaptive_avg_pool2d(self.where(x), 4).flatten(1)       # keeps the positions
        return self.features(torch.cat([flat, x.mean((2, 3)), x.amax((2, 3))], dim=1))

    def forward(self, img):
        return self.out(self.embed(img))


def augment(images, generator):
    """Small changes that keep every label: light, a pixel's shift, a generated image's blur and noise."""
    b = len(images)
    x = data.augment(images, generator, amount=0.1).float()
    dx, dy = torch.randint(-1, 2, (2,), generator=generator).tolist()
    x = torch.roll(x, (dx, dy), dims=(2, 3))
    blur, noise = torch.rand(2, b, 1, 1, 1, generator=generator)
    x = torch.lerp(x, F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False), 0.7 * blur)
    return x + 6 * noise * torch.randn(x.shape, generator=generator)


def loss_fn(logits, labels):
    """Sum of cross-entropy (categorical) and binary cross-entropy (multilabel) over known labels."""
    loss = 0
    for attribute, (kind, _) in ATTRIBUTES.items():
        y, target = logits[:, SLICE[attribute]], labels[:, SLICE[attribute]]
        known = target[:, 0] != UNKNOWN
        if known.any():
            y, target = y[known], target[known].float()
            loss = loss + (F.cross_entropy(y, target) if kind == "categorical" else
                           F.binary_cross_entropy_with_logits(y, target, reduction="none").sum(1).mean())
    return loss


def train_classifier(images, labels, steps, seed=0, batch_size=64, lr=2e-3, device="cpu"):
    """Train on uint8 images (n, 3, size, size) with labels (n, values): AdamW, one-cycle learning rate."""
    labelled = (labels != UNKNOWN).any(1)
    images, labels = images[labelled], labels[labelled]
    if len(images) < 2:
        raise BadInput(f"{len(images)} images to train a classifier on, expected at least 2 with prompts "
                       f"about any of {', '.join(ATTRIBUTES)}")
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Classifier(images.shape[-1])
    net = net.to(device, memory_format=torch.channels_last).train()
    opt = torch.optim.AdamW(net.parameters(), lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=steps, pct_start=0.15)
    order = torch.empty(0, dtype=torch.long)
    bar = trange(steps, desc="classifier", delay=2, leave=False)
    for step in bar:
        if len(order) < min(batch_size, len(images)):
            order = torch.randperm(len(images), generator=generator)
        batch, order = order[:batch_size], order[batch_size:]
        loss = loss_fn(net(augment(images[batch], generator).to(device)), labels[batch].to(device))
        loss.backward()
        opt.step()
        opt.zero_grad(set_to_none=True)
        schedule.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    if not all(v.isfinite().all() for v in net.state_dict().values()):
        raise BadInput("the classifier's training ended in NaN, expected finite weights; try another --seed")
    return net.eval()


@torch.inference_mode()
def predict(net, images, batch_size=128):
    """(n, values) bool: the most probable categorical value, multilabel values above probability 1/2."""
    device = net.out.weight.device
    logits = torch.cat([net(chunk.to(device)).cpu() for chunk in images.split(batch_size)])
    predicted = logits > 0
    for attribute, (kind, _) in ATTRIBUTES.items():
        if kind == "categorical":
            y = logits[:, SLICE[attribute]]
            predicted[:, SLICE[attribute]] = F.one_hot(y.argmax(1), y.shape[1]).bool()
    return predicted


def made_from(folder, records, args):
    """What a classifier of these images is made of: (metadata of its file, the same in words)."""
    attributes = Path(folder) / "attributes.jsonl"
    attributes_hash = file_hash(attributes) if attributes.is_file() else ""
    key = text_hash(data.fingerprint(records), attributes_hash, args.size, args.steps, args.seed)
    return {"kind": "judge", "size": args.size, "values": [list(v) for v in VALUES], "key": key}, (
        f"{len(records)} images of {folder}, {args.size} px, {args.steps} steps, seed {args.seed}, key {key}")


def other_than(made_of, file):
    """What the classifier in a file was made from, in words; None if it is what made_from returns."""
    metadata = load_metadata(file)
    if made_of.items() <= metadata.items():
        return None
    return metadata.get("trained_on", f"other data, steps or seed, key {metadata.get('key')}")


def classifier_of(folder, records, images, labels, args):
    """The classifier of these images: read from its file if the key is equal, else trained and saved.

    Another one in a file that the user named is BadInput; in the default file it is replaced.
    """
    file = file_of(folder, args)
    made_of, ours = made_from(folder, records, args)
    if Path(file).is_file():
        if (other := other_than(made_of, file)) is None:
            net = load_state(Classifier(args.size), load_safetensors(file)[0], file)
            print(f"classifier: read from {file}")
            return net.to(args.device, memory_format=torch.channels_last).eval()
        if args.classifier:
            raise BadInput(f"{file}: holds a classifier of {other}; this run needs one of {ours}; name "
                           "another file with --classifier")
        print(f"{file}: holds a classifier of {other}; replaced by one of {ours}", file=sys.stderr)
    made_of["seen"] = {a: dict(zip(ATTRIBUTES[a][1], (labels[:, span] == 1).sum(0).tolist(), strict=True))
                       for a, span in SLICE.items()}
    began = time.perf_counter()
    net = train_classifier(images, labels, args.steps, args.seed, device=args.device)
    kept = f"in {file}"
    try:
        save_safetensors(file, net.state_dict(), made_of | {"trained_on": ours})
    except OSError as error:                                # the table does not need the file
        kept = "not kept"
        print(f"the classifier is not kept: {file}: {error.strerror}; name another file with --classifier",
              file=sys.stderr)
    print(f"classifier: {args.steps} steps on {len(images)} images of {folder}, "
          f"{time.perf_counter() - began:.0f} s; {kept}")
    return net


def is_judge(path):
    """Whether a file is one that classifier_of wrote."""
    try:
        return load_metadata(path).get("kind") == "judge"
    except (BadInput, OSError):
        return False


def file_of(folder, args):
    """The classifier's file that the flags name, else the default one of a data folder."""
    return args.classifier or default_file(folder, args.size, getattr(args, "mirror", None))


def default_file(folder, size, mirror=None):
    """The classifier's file of a data folder, next to that folder; mirror: a value of --mirror, or None."""
    folder = Path(folder).resolve()
    return folder.with_name(f"{folder.name}.judge-{size}{f'-mirror-{mirror}' * bool(mirror)}.safetensors")
