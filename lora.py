"""Low-rank adapters on any nn.Linear: LoRA, rsLoRA and DoRA, in folders that PEFT reads and writes too.

LoRA    arXiv:2106.09685  Sec. 4.1, Eq. 3   y = W x + (alpha / r) B A x with W frozen
rsLoRA  arXiv:2312.03732  Theorem 3.2       alpha / sqrt(r) instead: the learning rate survives a large rank
DoRA    arXiv:2402.09353  Eq. 5, 11         W' = m (W + B A) / ||W + B A||, a norm per output that gets no gradient

    names = inject(model, LoRAConfig(rank=8, alpha=8))   # step 0 is the base model: B = 0
    ... train parameters(model) ...
    save(model, "runs/adapter")                           # adapter_config.json, adapter_model.safetensors
    load(base, "runs/adapter"); merge(base)
"""

import argparse
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from command import BadInput
from files import load_safetensors, read_json, save_safetensors, write_json
from weights import rename


@dataclass
class LoRAConfig:
    rank: int
    alpha: float
    targets: tuple[str, ...] | str = ("to_q", "to_k", "to_v", "to_out.0")  # ends of names, or one regular expression
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    init: str = "gaussian"  # of A: "gaussian", standard deviation 1/r; or "kaiming", uniform as nn.Linear
    rank_pattern: dict = field(default_factory=dict)  # regular expression of a name's end -> its own rank
    alpha_pattern: dict = field(default_factory=dict)

    def __post_init__(self):
        if not isinstance(self.targets, str):
            self.targets = tuple(self.targets)
        for rank in (self.rank, *self.rank_pattern.values()):
            if not isinstance(rank, int) or rank < 1:
                raise BadInput(f"LoRA rank: expected a whole number from 1, got {rank!r}")
        expressions = [self.targets] if isinstance(self.targets, str) else []
        for pattern in (*expressions, *self.rank_pattern, *self.alpha_pattern):
            try:
                re.compile(pattern)
            except re.error as error:
                raise BadInput(f"LoRA: {pattern!r} is not a regular expression ({error})") from None
        if self.init not in ("gaussian", "kaiming"):
            raise BadInput(f"LoRA init: expected gaussian or kaiming, got {self.init!r}")


class LoRALinear(nn.Module):
    """y = W x + s B A x, or DoRA's m / ||W + s B A|| (W + s B A) x; A, B and m are float32 over a base of any dtype."""

    def __init__(self, base, rank, alpha, dropout=0.0, rslora=False, dora=False, init="gaussian"):
        super().__init__()
        self.base = base
        self.dropout = nn.Dropout(dropout)
        self.scaling = alpha / math.sqrt(rank) if rslora else alpha / rank
        self.strength = 1.0  # of the whole change: 0 is the base, 1 what was learnt
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
        change = self.scaling * F.linear(F.linear(dropped.to(self.lora_A.dtype), self.lora_A), self.lora_B)
        if self.magnitude is not None:
            gain = self.magnitude / self.adapted().norm(dim=1).detach()
            change = gain * change + (gain - 1) * F.linear(dropped, self.base.weight)
        return y + (self.strength * change).to(y.dtype)

    def adapted(self):
        """W + s B A in float32."""
        return self.base.weight.float() + self.scaling * self.lora_B @ self.lora_A

    @torch.no_grad()
    def merged(self):
        """The weight of one linear layer that does the same."""
        weight = self.adapted()
        if self.magnitude is not None:
            weight = (self.magnitude / weight.norm(dim=1))[:, None] * weight
        return torch.lerp(self.base.weight.float(), weight, self.strength).to(self.base.weight.dtype)


def layers(model):
    """The adapted layers by name, in the model's order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def inject(model, config: LoRAConfig):
    """Wrap the target layers, freeze everything else, return the names of the wrapped layers."""
    if layers(model):
        raise BadInput(f"{type(model).__name__} carries an adapter already: remove or merge it first")
    names = _targets(model, config)
    _wrap(model, names, config)
    return names


def _targets(model, config):
    names, others = [], []
    for name, module in model.named_modules():
        if name and _is_target(_published(model, name), config.targets):
            (names if isinstance(module, nn.Linear) else others).append(name)
    if others:
        raise BadInput(f"LoRA targets that are not linear layers: {', '.join(others)}")
    if not names:
        raise BadInput(f"LoRA targets match no layer of {type(model).__name__}: {config.targets}")
    return names


def _is_target(name, targets):
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == t or name.endswith("." + t) for t in targets)


def _wrap(model, names, config):
    model.requires_grad_(False)
    for name in names:
        published = _published(model, name)
        layer = LoRALinear(model.get_submodule(name), _by_pattern(config.rank_pattern, published, config.rank),
                           _by_pattern(config.alpha_pattern, published, config.alpha), config.dropout, config.rslora,
                           config.dora, config.init)
        model.set_submodule(name, layer.train(model.training))
    model.lora_config = config


def _by_pattern(patterns, name, default):
    return next((v for k, v in patterns.items() if re.fullmatch(rf"(.*\.)?({k})", name)), default)


def _published(model, name):
    """A network with published checkpoints carries its table of names; adapters are kept under the published ones."""
    return rename(name, getattr(model, "published_names", ()), back=True)


def parameters(model):
    """What trains: A, B and the magnitudes."""
    return list(tensors(model).values())


def set_scale(model, s):
    """Weight the whole change, DoRA's too: 0 is the base model, 1 what was learnt. A merged adapter is merged anew."""
    for layer in layers(model).values():
        layer.strength = s
        if layer.unmerged_weight is not None:
            _unmerge(layer)
            _merge(layer)


def merge(model):
    """Fold the adapter into the base weights: inference without its cost. The base weights are kept for unmerge."""
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
    layer.unmerged_weight, layer.base.weight.data = layer.base.weight.data, weight


def _unmerge(layer):
    layer.base.weight.data, layer.unmerged_weight = layer.unmerged_weight, None


def remove(model):
    """The base model as it was before inject, still frozen; a merged adapter is unmerged first."""
    unmerge(model)
    for name, layer in layers(model).items():
        model.set_submodule(name, layer.base)
    if hasattr(model, "lora_config"):
        del model.lora_config


# Flags of the training scripts


def add_flags(parser, rank):
    parser.add_argument("--rank", type=int, default=rank, help="rank of the adapter")
    parser.add_argument("--alpha", type=float, help="strength: the change is alpha / rank B A; the rank without it")
    parser.add_argument("--rslora", action=argparse.BooleanOptionalAction, default=False, help="alpha / sqrt(rank) instead")
    parser.add_argument("--dora", action=argparse.BooleanOptionalAction, default=False, help="learn a norm per output too")
    parser.add_argument("--lora-dropout", type=float, default=0.0, help="dropout before A")
    parser.add_argument("--targets", nargs="+", default=list(LoRAConfig.targets), help="ends of the layers' names")


def config_of(args):
    alpha = args.rank if args.alpha is None else args.alpha
    return LoRAConfig(args.rank, alpha, args.targets, args.lora_dropout, args.rslora, args.dora)


# Folders, as PEFT writes them: tensors under base_model.model.NAME.lora_A.weight and so on


def tensors(model):
    """The adapter's tensors under PEFT's names."""
    out = {}
    for name, layer in layers(model).items():
        prefix = f"base_model.model.{_published(model, name)}"
        out[f"{prefix}.lora_A.weight"], out[f"{prefix}.lora_B.weight"] = layer.lora_A, layer.lora_B
        if layer.magnitude is not None:
            out[f"{prefix}.lora_magnitude_vector"] = layer.magnitude
    return out


def save(model, folder):
    if not layers(model):
        raise BadInput(f"{type(model).__name__} carries no adapter to save")
    c = model.lora_config
    save_safetensors(Path(folder) / "adapter_model.safetensors", tensors(model))
    write_json(Path(folder) / "adapter_config.json", {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": None, "inference_mode": True,
        "r": c.rank, "lora_alpha": c.alpha, "lora_dropout": c.dropout,
        "target_modules": c.targets if isinstance(c.targets, str) else list(c.targets),
        "use_rslora": c.rslora, "use_dora": c.dora, "rank_pattern": c.rank_pattern,
        "alpha_pattern": c.alpha_pattern, "init_lora_weights": "gaussian" if c.init == "gaussian" else True,
        "bias": "none", "fan_in_fan_out": False, "modules_to_save": None})


def load(model, folder):
    """Put a saved adapter onto its base model: trainable, over a frozen base. On an error the model is as it was."""
    if layers(model):
        raise BadInput(f"{type(model).__name__} carries an adapter already: remove or merge it first")
    folder = Path(folder)
    config = _read_config(folder / "adapter_config.json")
    found, _ = load_safetensors(folder / "adapter_model.safetensors")
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
    if missing or extra or shapes:
        parts = [f"{word}: {', '.join(which)}" for word, which in
                 (("not in the file", missing), ("no such layer", extra), ("other shapes", shapes)) if which]
        raise BadInput(f"{folder}: not an adapter of this {type(model).__name__}: " + "; ".join(parts))
    _wrap(model, names, config)
    with torch.no_grad():
        for name, parameter in tensors(model).items():
            parameter.copy_(found[name])


# A field that PEFT may add and that is not here is refused unless it is off (None, False or empty).
MEANINGLESS = ("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version",
               "megatron_core", "qalora_group_size", "layers_pattern")
READ = {"r", "lora_alpha", "target_modules", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"}
SUPPORTED = {"peft_type": ("LORA",), "bias": ("none",),
             "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal")}  # those that leave the base as it is


def _read_config(path):
    config = read_json(path)
    if not isinstance(config, dict):
        raise BadInput(f"{path}: expected a JSON object")
    wrong = [f"{k}={v!r}" for k, v in config.items()
             if k not in READ and k not in MEANINGLESS and v and v not in SUPPORTED.get(k, ())]
    if wrong or config.get("peft_type") != "LORA":
        wrong = wrong or [f"peft_type={config.get('peft_type')!r}"]
        raise BadInput(f"{path}: not supported: {', '.join(wrong)}")
    if missing := sorted({"r", "target_modules"} - config.keys()):
        raise BadInput(f"{path}: expected the fields {', '.join(missing)}")
    return LoRAConfig(rank=config["r"], alpha=config.get("lora_alpha", 8), targets=config["target_modules"],
                      dropout=config.get("lora_dropout", 0.0), rslora=bool(config.get("use_rslora")),
                      dora=bool(config.get("use_dora")), rank_pattern=config.get("rank_pattern") or {},
                      alpha_pattern=config.get("alpha_pattern") or {},
                      init="gaussian" if config.get("init_lora_weights") == "gaussian" else "kaiming")
