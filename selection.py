"""Model selection by images: every N steps FID, precision and recall of fixed prompts, the best one kept.

The held-out loss weighs noise levels, not images, and its least value need not be the best images'. So every
--select-every steps the averaged weights sample --select-images images, always of the same prompts and seeds,
and these are compared with the real images of the data folder, as metrics.py does. Features are the FID
Inception's if its weights are given or in torch's cache, else those of an attribute classifier. An FID of so
few images compares checkpoints of one run, and nothing else.
"""

from command import BadInput, fast_dtype

import contextlib
import sys

import numpy as np
import torch

import spaces
import training
from data import batches, image_fingerprint
from diffusion import sample_in_batches
from distances import fid, precision_recall
from files import cached, load_metadata, text_hash
from inception import Inception, cached_file
from metrics import K, extract

NAMES = ("2048", "features")  # of an Inception's features, of another space's


def add_flags(parser):
    parser.add_argument("--select-every", type=int,
                        help="steps between FIDs of sampled images, a multiple of --save-every; the best "
                             "checkpoint becomes best-fid.safetensors; None: no such selection")
    parser.add_argument("--select-images", type=int, default=200, help="images sampled for each of them")
    parser.add_argument("--weights", dest="select_weights",  # settings have hashes under weights
                        help="Inception weights for them, or rule; None: the published file, if it is in "
                             "torch's cache")
    parser.add_argument("--classifier", help="attribute classifier of judges.py, whose features are used "
                                             "where there are no Inception weights")


def check_flags(args):
    """BadInput for values out of their range, and for flags that nothing reads."""
    if args.select_every is None:
        for name, value in (("weights", args.select_weights), ("classifier", args.classifier)):
            if value:
                raise BadInput(f"--{name} {value}: only --select-every N reads it")
        return
    if args.select_every < 1 or args.select_every % args.save_every:
        raise BadInput(f"--select-every {args.select_every}: expected a multiple of --save-every "
                       f"{args.save_every}, since a selection goes on from a checkpoint")
    if args.select_images <= K:
        raise BadInput(f"--select-images {args.select_images}: expected at least {K + 1}, k + 1 for recall")


def load_space(args):
    """(network, its name with its first digits) of the features; BadInput if neither is there."""
    if args.select_weights or cached_file("fid"):
        net, name = Inception(args.select_weights), "inception"
    elif args.classifier:
        net, name = spaces.load(f"classifier:{args.classifier}"), "classifier"
    else:
        raise BadInput("--select-every: no Inception weights in torch's cache; name them with --weights "
                       "FILE, or an attribute classifier of judges.py with --classifier FILE")
    return net, f"{name} {net.source[:8]}"


class Selection:
    """The FIDs of a run: all ranks sample a share of the images, rank 0 compares and keeps.

    net, space: of load_space. records: the images of the data folder, which are the real set and from which
    the prompts come, in an order drawn once: the first prompt of each image, then the second.
    """

    def __init__(self, args, net, space, run, world, records):
        self.args, self.net, self.space, self.run, self.world = args, net.to(world.device), space, run, world
        records = [r for r in records if not r.mirror]  # mirrored copies are no images of the folder
        n, paths = len(records), [r.path for r in records]
        order = np.random.default_rng(0).permutation(n).tolist()
        own = (records[order[i % n]].prompts for i in range(args.select_images))
        self.prompts = [prompts[i // n % len(prompts)] for i, prompts in enumerate(own)]
        with world.together():
            if n <= K:
                raise BadInput(f"--select-every: {n} real images, expected at least {K + 1}, k + 1 for "
                               "precision")
            key = text_hash(image_fingerprint(records), *(p.name for p in paths), net.source, args.size)
            if world.is_main:
                print(f"selection: FID of {args.select_images} images every {args.select_every} steps, "
                      f"features of {space}", file=sys.stderr)
                file = run.folder / f"real-{key}.safetensors"
                self.real = cached(file, lambda: self.real_features(paths))[0]["features"]
        # Lines of another space, of other steps, prompts or real images are not comparable.
        self.key = text_hash(key, str(args.sample_steps), *self.prompts)[:8]

    def real_features(self, paths):
        """({"features": (n, d)} of image files as metrics.py reads them, no metadata)."""
        found = extract(self.net, paths, self.args.size, names=NAMES, what="real images")
        return {"features": next(iter(found.values()))}, None

    def lines(self):
        """The selections of metrics.jsonl that compare with each other."""
        return [line for line in self.run.lines()
                if line.get("selection") == self.key and {"step", "fid"} <= line.keys()]

    def due(self, step):
        """Whether step has a selection that was not made yet; the same on all ranks."""
        made = self.world.is_main and any(line["step"] == step for line in self.lines())
        return self.world.mean(float(made)) == 0 and step > 0 and step % self.args.select_every == 0

    def __call__(self, step, model, ema, more):
        """Log fid, precision and recall of the averaged weights, and save them if their FID is the least.

        more: metadata of the checkpoint beside the model's and these numbers. The U-Net is in training mode
        again afterwards. The checkpoint comes before its line: a kill between the two costs one more
        selection of this step.
        """
        model.eval()
        with ema.applied():
            self.compare(step, model, more)
        model.unet.train()

    def compare(self, step, model, more):
        """The same of the weights that the model holds."""
        own = self.world.share(range(len(self.prompts)))
        with self.world.together():
            features = self.features(model, own) if own else None
        parts = [x for x in self.world.gather(features) if x is not None]
        with self.world.together():
            if self.world.is_main:
                fake = torch.cat(parts)
                precision, recall = precision_recall(self.real, fake, K)
                numbers = {"fid": fid(self.real, fake), "precision": precision, "recall": recall}
                numbers = {k: float(f"{v:.6g}") for k, v in numbers.items()}  # as the log keeps them
                if numbers["fid"] < self.kept().get("fid", torch.inf):
                    meta = model.metadata() | more | {"step": step, "space": self.space,
                                                      "selection": self.key} | numbers
                    self.run.save_checkpoint("best-fid", model.tensors(), meta)
                self.run.log(step=step, **numbers, space=self.space, selection=self.key)

    def features(self, model, own):
        """(len(own), d) of the images of a range of the prompts, image i with seed i."""
        with training.autocast(model.device, fast_dtype(model.device)):
            images = sample_in_batches(model.sample_batch, [self.prompts[i] for i in own], own.start, 16,
                                       steps=self.args.sample_steps, solver="dpmpp",
                                       guidance=model.diffusion.guidance)
        found = (self.net(images[part], "tf1") for part in batches(len(images), 32))
        return torch.cat([next(x[n] for n in NAMES if n in x).float().cpu() for x in found])

    def kept(self):
        """The metadata of best-fid.safetensors; {} if it is absent, broken or of other selections."""
        with contextlib.suppress(BadInput, OSError):
            meta = load_metadata(self.run.folder / "best-fid.safetensors")
            if meta.get("selection") == self.key:
                return meta
        return {}

    def best(self):
        """A line on the best FID so far."""
        if not (meta := self.kept()):
            return "no FID yet"
        return (f"{self.run.folder / 'best-fid.safetensors'}: FID {meta['fid']:.4g} of {self.space} at step "
                f"{meta['step']}")
