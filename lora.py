"""Low-rank adapters on any nn.Linear: LoRA, rsLoRA and DoRA, in folders that PEFT reads and writes too.

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
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from files import load_safetensors, read_json, save_safetensors, write_json
from weights import FLOATS, check_finite, listed, rename


@dataclass
class LoRAConfig:
    """Which layers are adapted, and how; BadInput for values that cannot be used."""

    rank: int
    alpha: float
    targets: tuple[str, ...] | str = ("to_q", "to_k", "to_v", "to_out.0")  # ends of names, or a regex
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    init: str = "gaussian"  # of A: "gaussian", standard deviation 1/r; or "kaiming", uniform as nn.Linear
    rank_pattern: dict = field(default_factory=dict)  # regex of a name's end -> its own rank
    alpha_pattern: dict = field(default_factory=dict)  # likewise its own alpha

    def __post_init__(self):
        if isinstance(self.targets, list | set):
            self.targets = tuple(self.targets)
        names = self.targets if isinstance(self.targets, tuple) else (self.targets,)
        if not names or not all(isinstance(name, str) and name for name in names):
            raise BadInput(f"LoRA targets: expected names of layers, got {self.targets!r:.100}")
        for what, pattern in (("rank", self.rank_pattern), ("alpha", self.alpha_pattern)):
            if not isinstance(pattern, dict):
                raise BadInput(f"LoRA {what}_pattern: expected a {what} for each name, got {pattern!r:.100}")
        for rank in (self.rank, *self.rank_pattern.values()):
            if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= 1 << 16:
                raise BadInput(f"LoRA rank: expected a whole number from 1, got {rank!r:.100}")
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            if not _is_number(alpha):
                raise BadInput(f"LoRA alpha: expected a finite number, got {alpha!r:.100}")
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise BadInput(f"LoRA dropout: expected a number from 0, below 1, got {self.dropout!r:.100}")
        _check_patterns(self)
        if self.init not in ("gaussian", "kaiming"):
            raise BadInput(f"LoRA init: expected gaussian or kaiming, got {self.init!r}")


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


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
    _wrap(model, names, config)
    return names


def _targets(model, config):
    names, others = [], []
    for name, module in model.named_modules():
        if name and _is_target(_published(model, name), config.targets):
            (names if isinstance(module, nn.Linear) else others).append(name)
    if others:
        raise BadInput(f"LoRA targets that are not linear layers: {listed(others, 5)}")
    if not names:
        raise BadInput(f"LoRA targets match no layer of {type(model).__name__}: {config.targets!s:.200}")
    return names


def _wrap(model, names, config):
    if config.dora:
        _check_rows(model, names)
    model.requires_grad_(False)
    for name in names:
        published = _published(model, name)
        rank = _by_pattern(config.rank_pattern, published, config.rank)
        alpha = _by_pattern(config.alpha_pattern, published, config.alpha)
        layer = LoRALinear(model.get_submodule(name), rank, alpha, config.dropout, config.rslora, config.dora,
                           config.init)
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
    for name, layer in layers(model).items():
        model.set_submodule(name, layer.base)
    if hasattr(model, "lora_config"):
        del model.lora_config


# Flags of the training scripts


FLAGS = {  # values of the flags that are not given; that of the rank is the script's
    "alpha": None, "rslora": False, "dora": False, "lora_dropout": 0.0, "targets": list(LoRAConfig.targets)}


def add_flags(parser, rank):
    flag = functools.partial(parser.add_argument, default=argparse.SUPPRESS)
    parser.add_argument("--init", help="adapter folder to start from, instead of a fresh adapter: what the "
                        "flags below say comes from it")
    flag("--rank", type=int, help=f"rank of the adapter ({rank})")
    flag("--alpha", type=float, help="the update is (alpha / rank) B A (the rank, a factor of 1)")
    flag("--rslora", action=argparse.BooleanOptionalAction,
         help="alpha / sqrt(rank) instead; without --alpha a factor of sqrt(rank), 11.3 at rank 128 (no)")
    flag("--dora", action=argparse.BooleanOptionalAction, help="learn a norm per output too (no)")
    flag("--lora-dropout", type=float, help=f"dropout before A ({FLAGS['lora_dropout']})")
    flag("--targets", nargs="+", help=f"ends of the layers' names ({' '.join(FLAGS['targets'])})")


def set_flags(args, config, source):
    """Set the flags to what an adapter's config says; BadInput if one was given that contradicts it."""
    targets = [config.targets] if isinstance(config.targets, str) else list(config.targets)
    own = {"rank": config.rank, "alpha": config.alpha, "rslora": config.rslora, "dora": config.dora,
           "lora_dropout": config.dropout, "targets": targets}
    for name, value in own.items():
        if (given := getattr(args, name, value)) != value:
            raise BadInput(f"--{name.replace('_', '-')} {given}: the adapter {source} has {value}; leave the "
                           "flag out, or start without --init")
        setattr(args, name, value)


def config_of(args):
    alpha = args.rank if args.alpha is None else args.alpha
    return LoRAConfig(args.rank, alpha, args.targets, args.lora_dropout, args.rslora, args.dora)


# Adapter folders


def tensors(model):
    """The adapter's tensors under PEFT's names, base_model.model.NAME.lora_A.weight and so on."""
    out = {}
    for name, layer in layers(model).items():
        prefix = f"base_model.model.{_published(model, name)}"
        out[f"{prefix}.lora_A.weight"], out[f"{prefix}.lora_B.weight"] = layer.lora_A, layer.lora_B
        if layer.magnitude is not None:
            out[f"{prefix}.lora_magnitude_vector"] = layer.magnitude
    return out


def save(model, folder):
    """Write adapter_config.json and adapter_model.safetensors, with the published names of the layers.

    Where model.base is known (weights.base_of), its hash goes into the metadata of the tensors: versions of
    PEFT refuse a config with a field of another project.
    """
    if not layers(model):
        raise BadInput(f"{type(model).__name__} carries no adapter to save")
    base = getattr(model, "base", None)
    save_safetensors(Path(folder) / "adapter_model.safetensors", tensors(model), base and {"base": base})
    fields = _peft_fields(model.lora_config) | {"base_model_name_or_path": base and base["name"]}
    write_json(Path(folder) / "adapter_config.json", fields)


def load(model, folder):
    """Add a saved adapter to its base model: trainable, the base frozen. On an error nothing is changed.

    An adapter that was trained on another base than this model is loaded all the same, and a line says so.
    """
    if layers(model):
        raise BadInput(f"{type(model).__name__} carries an adapter already: remove it first")
    folder = Path(folder)
    config = _read_config(folder / "adapter_config.json")
    file = folder / "adapter_model.safetensors"
    found, metadata = load_safetensors(file)
    names = _targets(model, config)
    expected = {}  # published name of a tensor -> its shape
    for name in names:
        published, base = _published(model, name), model.get_submodule(name)
        rank = _by_pattern(config.rank_pattern, published, config.rank)
        prefix = f"base_model.model.{published}"
        expected[f"{prefix}.lora_A.weight"] = (rank, base.in_features)
        expected[f"{prefix}.lora_B.weight"] = (base.out_features, rank)
        if config.dora:
            expected[f"{prefix}.lora_magnitude_vector"] = (base.out_features,)
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    shapes = [f"{k} expected {s}, got {tuple(found[k].shape)}" for k, s in expected.items()
              if k in found and tuple(found[k].shape) != s]
    dtypes = [f"{k} expected floats, got {v.dtype}" for k, v in found.items() if v.dtype not in FLOATS]
    if missing or extra or shapes or dtypes:
        problems = {"not in the file": missing, "no such layer": extra, "other shapes": shapes,
                    "other dtypes": dtypes}
        parts = [f"{problem}: {listed(which, 3)}" for problem, which in problems.items() if which]
        raise BadInput(f"{folder}: not an adapter of this {type(model).__name__}: " + "; ".join(parts))
    found = {k: v.float() for k, v in found.items()}
    check_finite(file, found)
    theirs, ours = metadata.get("base"), getattr(model, "base", None)
    if isinstance(theirs, dict) and ours and theirs.get("hash") != ours["hash"]:
        print(f"warning: {folder}: trained on other weights ({theirs.get('name')!r:.100}) than these "
              f"({ours['name']!r:.100})", file=sys.stderr)
    _wrap(model, names, config)
    with torch.no_grad():
        for name, parameter in tensors(model).items():
            parameter.copy_(found[name])


# What only PEFT's files need: patterns, published names, adapter_config.json


def _check_patterns(config):
    expressions = [config.targets] if isinstance(config.targets, str) else []
    for pattern in (*expressions, *config.rank_pattern, *config.alpha_pattern):
        try:
            slow = len(pattern) > 10_000 or _ways(re.compile(pattern).pattern) > 300_000
        except (re.error, RecursionError, OverflowError) as error:
            raise BadInput(f"LoRA: {pattern!r:.100} is not a regular expression ({error})") from None
        if slow:
            raise BadInput(f"LoRA: {pattern!r:.100} may take for ever to match: expected at most three of "
                           "* + {} in a regular expression, none of them after a group; or a list of names")


TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^]\\])*\]|\(\?|(?P<repeat>[*+?]|\{\d*,?\d*\})[?+]?|.", re.DOTALL)


def _ways(pattern):
    """A bound of the ways to match a regular expression with a name, all of which Python may try.

    It is the product of the alternatives and of the lengths of repeats, 32 for any; infinite if a group is
    repeated, where repeats may be nested. The name of a layer is short, the file of an adapter anybody's.
    """
    ways, groups, last = 1, [1], ""  # groups: the number of alternatives of each open one
    for token in TOKEN.finditer(pattern):
        text, repeat = token[0], token["repeat"]
        if text.isspace():  # (?x) ignores it
            continue
        if text == "#" or repeat not in (None, "?") and last == ")":  # in (?x), a comment, with any brackets
            return math.inf
        if repeat:
            ways *= 2 if repeat == "?" else 32
        elif text in ("(", "(?"):
            groups.append(1)
        elif text == ")":
            ways *= groups.pop()
        elif text == "|":
            groups[-1] += 1
        last = text
    return ways * groups[0]


def _is_target(name, targets):
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == t or name.endswith("." + t) for t in targets)


def _by_pattern(patterns, name, default):
    return next((v for k, v in patterns.items() if re.fullmatch(rf"(.*\.)?({k})", name)), default)


def _published(model, name):
    """The published name of a layer; the network's own name where it has no table published_names."""
    return rename(name, getattr(model, "published_names", ()), back=True)


def _peft_fields(config):
    return {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": None, "inference_mode": True,
        "r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout,
        "target_modules": config.targets if isinstance(config.targets, str) else list(config.targets),
        "use_rslora": config.rslora, "use_dora": config.dora, "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        "init_lora_weights": "gaussian" if config.init == "gaussian" else True,
        "bias": "none", "fan_in_fan_out": False, "modules_to_save": None}


# A field that PEFT may add and that is not listed here is refused unless it is off (None, False or empty).
MEANINGLESS = ("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode",
               "peft_version", "megatron_core", "qalora_group_size", "layers_pattern")
READ = {"r", "lora_alpha", "target_modules", "lora_dropout", "use_rslora", "use_dora", "rank_pattern",
        "alpha_pattern"}
SUPPORTED = {"peft_type": ("LORA",), "bias": ("none",),
             "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal")}  # those that keep the base


def _read_config(path):
    config = read_json(path)
    wrong = [f"{k}={v!r:.100}" for k, v in config.items()
             if k not in READ and k not in MEANINGLESS and v and v not in SUPPORTED.get(k, ())]
    if wrong or config.get("peft_type") != "LORA":
        wrong = wrong or [f"peft_type={config.get('peft_type')!r:.100}"]
        raise BadInput(f"{path}: not supported: {listed(wrong, 20)}")
    if missing := sorted({"r", "target_modules"} - config.keys()):
        raise BadInput(f"{path}: expected the fields {', '.join(missing)}")
    for key in ("use_rslora", "use_dora"):
        if config.get(key) not in (True, False, None):
            raise BadInput(f"{path}: {key}: expected true or false, got {config[key]!r:.100}")
    try:
        return LoRAConfig(
            rank=config["r"], alpha=config.get("lora_alpha", 8), targets=config["target_modules"],
            dropout=config.get("lora_dropout", 0.0), rslora=bool(config.get("use_rslora")),
            dora=bool(config.get("use_dora")), rank_pattern=config.get("rank_pattern") or {},
            alpha_pattern=config.get("alpha_pattern") or {},
            init="gaussian" if config.get("init_lora_weights") == "gaussian" else "kaiming")
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None
