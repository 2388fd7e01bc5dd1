"""Low-rank adapters on any nn.Linear: LoRA, rsLoRA and DoRA, saved as PEFT does (adapters.py has the files).

LoRA    arXiv:2106.09685  Sec. 4.1, Eq. 3   y = W x + (alpha / r) B A x with W frozen
rsLoRA  arXiv:2312.03732  Theorem 3.2       alpha / sqrt(r) instead: the size of the update, and so the best
                                            learning rate, no longer depends on r
DoRA    arXiv:2402.09353  Eq. 5, 11         W' = m (W + B A) / ||W + B A||, the norm gets no gradient

DoRA's text norms columns of a d x k matrix, its code and PEFT rows of torch's (out, in) weight, as here.

    names = inject(model, LoRAConfig(rank=8, alpha=8))   # step 0 is the base model: B = 0
    ... train parameters(model) ...
    save(model, "runs/adapter")                           # adapter_config.json, adapter_model.safetensors
    load(base, "runs/adapter"); merge(base)
"""

from command import BadInput

import argparse
import functools
import math
import sys
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from adapters import (
    ALL_LINEAR,
    MAGNITUDE,
    PEFT,
    A,
    Adapter,
    B,
    LoRAConfig,
    check,
    read,
    write_peft,
)
from weights import listed, rename


class LoRALinear(nn.Module):
    """y = W x + s B A x, or DoRA's m / ||W + s B A|| (W + s B A) x, for x (..., in) -> y (..., out).

    s is alpha / r, or alpha / sqrt(r) with rslora. A (r, in), B (out, r), m (out,) are float32, W any dtype.
    """

    def __init__(self, base, rank, alpha, dropout=0.0, rslora=False, dora=False, init="gaussian"):
        super().__init__()
        self.base = base
        self.dropout = nn.Dropout(dropout)
        self.scaling = alpha / math.sqrt(rank) if rslora else alpha / rank
        self.strength = 1.0  # of the whole update: 0 is the base, 1 what was learnt
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        if init == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / rank)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.magnitude = nn.Parameter(base.weight.detach().float().norm(dim=1)) if dora else None
        self.unmerged_weight = None  # the base's own weight while the adapter is merged into it

    def forward(self, x):
        y = self.base(x)
        if self.unmerged_weight is not None or self.strength == 0:
            return y
        dropped = self.dropout(x)
        update = self.scaling * F.linear(F.linear(dropped.to(self.lora_A.dtype), self.lora_A), self.lora_B)
        if self.magnitude is not None:
            gain = self.magnitude / self.adapted().norm(dim=1).detach()  # (out,); detached: DoRA, Eq. 11
            update = gain * update + (gain - 1) * F.linear(dropped, self.base.weight)
        return y + (self.strength * update).to(y.dtype)

    def adapted(self):
        """W + s B A in float32, under autocast too."""
        with torch.autocast(self.lora_A.device.type, enabled=False):
            return self.base.weight.float() + self.scaling * self.lora_B @ self.lora_A

    @torch.no_grad()
    def merged(self):
        """The weight of the linear layer that computes the same, in W's dtype."""
        weight = self.adapted()
        if self.magnitude is not None:
            weight = (self.magnitude / weight.norm(dim=1))[:, None] * weight
        return torch.lerp(self.base.weight.float(), weight, self.strength).to(self.base.weight.dtype)


# An adapter on a model


def layers(model):
    """The adapted layers by name, in the model's order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def inject(model, config: LoRAConfig):
    """Wrap the target layers, freeze everything else, return the names of the wrapped layers.

    BadInput if there is an adapter already, or if the targets match no layer or one that is not linear.
    """
    if layers(model):
        raise BadInput(f"{type(model).__name__} carries an adapter already: remove it first")
    names = _targets(model, config)
    if not names:
        raise BadInput(f"LoRA targets match no layer of {type(model).__name__}: {config.targets!s:.200}")
    _wrap(model, names, config)
    return names


def linear_sizes(model):
    """{published name: (in, out)} of the linear layers of a model without adapter."""
    return {_published(model, name): (m.in_features, m.out_features) for name, m in model.named_modules()
            if name and isinstance(m, nn.Linear)}


def _targets(model, config):
    """The names of the layers that a config adapts; BadInput for one that is not linear."""
    names, others = [], []
    for name, module in model.named_modules():
        published = _published(model, name)
        if name and config.is_target(published):
            if isinstance(module, nn.Linear):
                names.append(name)
            else:
                others.append(published)
    if others and config.targets != ALL_LINEAR:
        raise BadInput(f"LoRA targets that are not linear layers: {listed(others, 5)}")
    return names


def _wrap(model, names, config):
    if config.dora:
        _check_rows(model, names)
    if config.targets == ALL_LINEAR:  # in a file, which may be read into another network, the layers' names
        config = replace(config, targets=tuple(_published(model, name) for name in names))
    model.requires_grad_(False)
    for name in names:
        published = _published(model, name)
        layer = LoRALinear(model.get_submodule(name), config.rank_of(published), config.alpha_of(published),
                           config.dropout, config.rslora, config.dora, config.init)
        model.set_submodule(name, layer.train(model.training))
    model.lora_config = config


def _check_rows(model, names):
    weights = {name: model.get_submodule(name).weight for name in names}
    zero = [_published(model, k) for k, w in weights.items() if not w.is_meta and not w.any(dim=1).all()]
    if zero:
        raise BadInput("DoRA divides by the norm of an output's weights, which is zero in "
                       f"{listed(zero, 3)}: leave these layers out, or train without DoRA")


def parameters(model):
    """The trained parameters: A, B and the magnitudes."""
    return list(tensors(model).values())


def set_scale(model, s):
    """Weight the whole update, DoRA's too: 0 is the base, 1 what was learnt. Merged layers stay merged."""
    for layer in layers(model).values():
        layer.strength = s
        if layer.unmerged_weight is not None:
            _unmerge(layer)
            _merge(layer)


def merge(model):
    """Add the adapter to the base weights: inference at no extra cost. The base is kept for unmerge."""
    for layer in layers(model).values():
        if layer.unmerged_weight is None:
            _merge(layer)


def unmerge(model):
    """The base weights again, bit for bit, with the adapter beside them."""
    for layer in layers(model).values():
        if layer.unmerged_weight is not None:
            _unmerge(layer)


def _merge(layer):
    weight = layer.merged()
    layer.unmerged_weight = layer.base.weight.data
    layer.base.weight.data = weight


def _unmerge(layer):
    layer.base.weight.data = layer.unmerged_weight.to(layer.base.weight)  # it may have been moved since
    layer.unmerged_weight = None


def remove(model):
    """The base model as it was before inject, still frozen; a merged adapter is unmerged first."""
    unmerge(model)
    _leave_bases(model)


def bake(model):
    """Merge the adapter for good: plain linear layers, and no copy of their weights as they were."""
    merge(model)
    _leave_bases(model)


def _leave_bases(model):
    for name, layer in layers(model).items():
        model.set_submodule(name, layer.base)
    if hasattr(model, "lora_config"):
        del model.lora_config


# Flags of the training scripts


FLAGS = {  # values of the flags that are not given; that of the rank is the script's
    "alpha": None, "rslora": False, "dora": False, "lora_dropout": 0.0, "targets": list(LoRAConfig.targets)}


def add_flags(parser, rank):
    flag = functools.partial(parser.add_argument, default=argparse.SUPPRESS)
    parser.add_argument("--init", help="adapter of any format to start from, instead of a fresh one: what "
                        "the flags below say comes from it")
    flag("--rank", type=int, help=f"rank of the adapter ({rank})")
    flag("--alpha", type=float, help="the update is (alpha / rank) B A (the rank, a factor of 1)")
    flag("--rslora", action=argparse.BooleanOptionalAction,
         help="alpha / sqrt(rank) instead; without --alpha a factor of sqrt(rank), 11.3 at rank 128 (no)")
    flag("--dora", action=argparse.BooleanOptionalAction, help="learn a norm per output too (no)")
    flag("--lora-dropout", type=float, help=f"dropout before A ({FLAGS['lora_dropout']})")
    flag("--targets", nargs="+", help="ends of the layers' published names; all-linear: every linear layer "
                                      f"({' '.join(FLAGS['targets'])})")


def set_flags(args, config, source):
    """Set the flags to what an adapter's config says; BadInput if one was given that contradicts it."""
    targets = [config.targets] if isinstance(config.targets, str) else list(config.targets)
    own = {"rank": config.rank, "alpha": config.alpha, "rslora": config.rslora, "dora": config.dora,
           "lora_dropout": config.dropout, "targets": targets}
    for name, value in own.items():
        given, flag = getattr(args, name, value), f"--{name.replace('_', '-')}"
        if (set(given) != set(value) if name == "targets" else given != value):
            where, way_out = "", "leave the flag out"
            if getattr(args, "from_run", None):  # its flags cannot be left out
                where, way_out = f", given or of --from-run {args.from_run}", f"give the adapter's own {flag}"
            raise BadInput(f"{flag} {given}{where}: the adapter {source} has {value}; {way_out}, or start "
                           "without --init")
        setattr(args, name, value)


def config_of(args):
    alpha = args.rank if args.alpha is None else args.alpha
    return LoRAConfig(args.rank, alpha, args.targets, args.lora_dropout, args.rslora, args.dora)


# Adapters in files


def tensors(model):
    """The adapter's tensors under PEFT's names, base_model.model.NAME.lora_A.weight and so on."""
    return _adapter(model).tensors(PEFT) if layers(model) else {}


def _adapter(model):
    own = {}
    for name, layer in layers(model).items():
        parts = {A: layer.lora_A, B: layer.lora_B, MAGNITUDE: layer.magnitude}
        own[_published(model, name)] = {k: v for k, v in parts.items() if v is not None}
    return Adapter(type(model).__name__, model.lora_config, own, getattr(model, "base", None))


def save(model, folder):
    """Write adapter_config.json and adapter_model.safetensors, with the published names of the layers.

    Where model.base is known (weights.base_of), its hash goes into the header of the tensors: versions of
    PEFT refuse a config with a field of another project.
    """
    if not layers(model):
        raise BadInput(f"{type(model).__name__} carries no adapter to save")
    write_peft(_adapter(model), folder)


def load(model, source):
    """Add a saved adapter to its base model: trainable, the base frozen. On an error nothing is changed.

    source: a folder, a file or a name on the hub, in any format of adapters.py. An adapter that was trained
    on another base than this model is loaded all the same, and a line says so.
    """
    if layers(model):
        raise BadInput(f"{type(model).__name__} carries an adapter already: remove it first")
    sizes = linear_sizes(model)
    adapter = read(source, sizes)
    names = _targets(model, adapter.config)
    check(adapter, sizes, f"this {type(model).__name__}")
    theirs, ours = adapter.base, getattr(model, "base", None)
    if theirs and ours and theirs.get("hash") != ours["hash"]:
        print(f"warning: {source}: trained on other weights ({theirs.get('name')!r:.100}) than these "
              f"({ours['name']!r:.100})", file=sys.stderr)
    _wrap(model, names, adapter.config)
    found = adapter.tensors(PEFT)
    with torch.no_grad():
        for name, parameter in tensors(model).items():
            parameter.copy_(found[name])


@torch.no_grad()
def merged_weights(model, found):
    """Those of the published tensors found whose layers are adapted, merged, each in its own dtype.

    Afterwards these are the base weights of the model's layers.
    """
    out = {}
    for name, layer in layers(model).items():
        key = f"{_published(model, name)}.weight"
        if key in found:
            layer.base.weight = nn.Parameter(found[key], requires_grad=False)
            out[key] = layer.merged()
    return out


def _published(model, name):
    """The published name of a layer; the network's own name where it has no table published_names."""
    return rename(name, getattr(model, "published_names", ()), back=True)
