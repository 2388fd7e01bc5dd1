"""Adapter files in every format people have: all are read into PEFT's names, three of them are written.

PEFT       a folder of adapter_config.json and adapter_model.safetensors: base_model.model.LAYER.lora_A.weight
diffusers  one file: unet.LAYER.lora_A.weight, with PEFT's config in its header, lora_adapter_metadata;
           until 2023 LAYER.lora.down.weight or ATTENTION.processor.to_q_lora.down.weight, without an alpha
kohya      one file: lora_unet_LAYER.lora_down.weight and .alpha, the dots of LAYER written as underscores

LAYER is the published name of a linear layer. `unet` is `prior` in an adapter of the prior, and may be absent
from diffusers' names.
"""

from command import BadInput

import json
import math
import re
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from files import (
    file_hash,
    folder_hash,
    load_safetensors,
    making,
    read_json,
    read_state,
    save_safetensors,
    text_hash,
    write_json,
)
from weights import FLOATS, adapter_files, check_finite, fetch, listed

ALL_LINEAR = "all-linear"  # of PEFT's: every linear layer is a target


@dataclass
class LoRAConfig:
    """Which layers are adapted, and how; BadInput for values that cannot be used."""

    rank: int
    alpha: float
    # Ends of names, a regular expression, or "all-linear".
    targets: tuple[str, ...] | str = ("to_q", "to_k", "to_v", "to_out.0")
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    init: str = "gaussian"  # of A: "gaussian", standard deviation 1/r; or "kaiming", uniform as nn.Linear
    rank_pattern: dict = field(default_factory=dict)  # regex of a name's end -> its own rank
    alpha_pattern: dict = field(default_factory=dict)  # likewise its own alpha

    def __post_init__(self):
        if isinstance(self.targets, list | set):
            self.targets = tuple(self.targets)
        if self.targets == (ALL_LINEAR,):
            self.targets = ALL_LINEAR
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

    def is_target(self, layer):
        """Whether the linear layer of this published name is adapted."""
        if self.targets == ALL_LINEAR:
            return True
        if isinstance(self.targets, str):
            return re.fullmatch(self.targets, layer) is not None
        return any(layer == t or layer.endswith("." + t) for t in self.targets)

    def rank_of(self, layer):
        return _by_pattern(self.rank_pattern, layer, self.rank)

    def alpha_of(self, layer):
        return _by_pattern(self.alpha_pattern, layer, self.alpha)

    def scaling_of(self, layer):
        """s of W + s B A: alpha / r, or alpha / sqrt(r) with rslora."""
        rank = self.rank_of(layer)
        return self.alpha_of(layer) / (math.sqrt(rank) if self.rslora else rank)


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


@dataclass
class Adapter:
    """An adapter as its files say it, whatever their format."""

    source: object  # the file, for messages
    config: LoRAConfig
    layers: dict  # published name -> {"lora_A.weight": (r, in), "lora_B.weight": (out, r), and DoRA's norms}
    base: dict | None = None  # name and hash of the model it was trained on (weights.base_of), if it is said

    def tensors(self, prefix):
        return {f"{prefix}.{layer}.{part}": tensor for layer, own in self.layers.items()
                for part, tensor in own.items()}

    def network(self):
        """The part of a pipeline it belongs to, "prior" or "unet"."""
        return _part_of(self.layers)


# Reading

A, B, MAGNITUDE, ALPHA = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector", "alpha"
PEFT = "base_model.model"
METADATA = "lora_adapter_metadata"
OLD, PROCESSORS, KOHYA, NEW = "lora.down and lora.up", "attention processors", "kohya", "lora_A and lora_B"
ENDS = {  # how the names end in each format, and which of its layer's tensors that is
    OLD: {".lora.down.weight": A, ".lora.up.weight": B},
    PROCESSORS: {"_lora.down.weight": A, "_lora.up.weight": B},
    KOHYA: {".lora_down.weight": A, ".lora_up.weight": B, ".alpha": ALPHA},
    NEW: {f".{A}": A, f".{B}": B, f".{MAGNITUDE}": MAGNITUDE, ".lora_A.default.weight": A,
          ".lora_B.default.weight": B, f".{MAGNITUDE}.default.weight": MAGNITUDE},
}
PREFIXES = (f"{PEFT}.", "unet.", "prior.", "lora_unet_", "lora_prior_")
OF_THE_PRIOR = ("transformer_blocks", "proj_in", "embedding_proj", "encoder_hidden_states_proj",
                "proj_to_clip_embeddings")


def located(source):
    """The path of an adapter: a file, a folder, or for a name on the hub the folder in its cache."""
    return Path(source) if _is_file(Path(source)) else fetch(source, chosen=adapter_files)


def _is_file(path):
    return path.is_file() or (path.suffix in (".safetensors", ".bin") and not path.is_dir())


def adapter_hash(path):
    """The hash of an adapter's folder, or of its file and the adapter_config.json that belongs to it."""
    if not _is_file(path):
        return folder_hash(path)
    file, config = _files(path)
    return text_hash(file_hash(file), file_hash(config)) if config else file_hash(file)


def read(source, names=None):
    """The Adapter in a file or folder of any format, or on the hub; BadInput for what is not understood.

    names: the published names of the network's linear layers, which undo kohya's underscores.
    """
    file, config_file = _files(located(source))
    found, metadata = _content(file)
    kind, prefix, layers = _layers(file, found, names)
    header = _header(file, metadata) if kind == NEW else None
    alphas = {layer: own.pop(ALPHA) for layer, own in layers.items() if ALPHA in own}
    if config_file:
        config = _config(read_json(config_file), config_file, layers)
    elif header is not None:
        own = {k.removeprefix(prefix): v for k, v in header.items() if k.startswith(prefix)}
        if not own.keys() & READ:
            raise BadInput(f"{file}: expected the settings {prefix}r and so on in its header, {METADATA}, as "
                           f"its tensors are {next(iter(found))} and so on; got "
                           f"{listed(sorted(header), 3) or 'none'}: give both one prefix, or the PEFT folder")
        config = _config({"peft_type": "LORA"} | own, f"{file}, {METADATA}", layers)
    elif prefix == f"{PEFT}.":
        raise BadInput(f"{file}: expected adapter_config.json beside it, which holds its alpha")
    else:
        config = _config_of_tensors(file, kind, layers, alphas)
    base = (header or metadata).get("base")
    return Adapter(file, config, layers, base if isinstance(base, dict) else None)


def part_of(source):
    """The part of a pipeline that an adapter belongs to, "prior" or "unet", by the names in its file."""
    file, _ = _files(located(source))
    return _part_of(_content(file)[0])


def _part_of(names):
    """The prior's layers have names of their own, also where a format puts underscores for dots."""
    starts = "prior.", "lora_prior_", *(p + name for p in ("", *PREFIXES) for name in OF_THE_PRIOR)
    return "prior" if any(name.startswith(starts) for name in names) else "unet"


def _content(file):
    """(tensors, metadata) of an adapter's file."""
    return (read_state(file), {}) if file.suffix == ".bin" else load_safetensors(file)


def _files(path):
    """(file of tensors, adapter_config.json or None) of an adapter's path."""
    if _is_file(path):
        config = path.with_name("adapter_config.json")
        return path, config if path.stem == "adapter_model" and config.is_file() else None
    config = path / "adapter_config.json"
    stem = "adapter_model" if config.is_file() else "pytorch_lora_weights"
    for name in (f"{stem}.safetensors", f"{stem}.bin"):
        if (path / name).is_file():
            return path / name, config if config.is_file() else None
    files = sorted(path.glob("*.safetensors"))
    if config.is_file() or len(files) != 1:
        raise BadInput(f"{path}: expected an adapter: adapter_config.json and adapter_model.safetensors, or "
                       "pytorch_lora_weights.safetensors, or one other .safetensors; got "
                       f"{listed(sorted(f.name for f in path.iterdir()), 3) if path.is_dir() else 'none'}")
    return files[0], None


def _layers(file, found, names):
    """(format, prefix of the names, {layer: {"lora_A.weight": tensor, ...}}) of a file's tensors."""
    kind = next((k for k, ends in ENDS.items() if any(n.endswith((*ends,)) for n in found)), None)
    prefixes = [p for p in PREFIXES if any(name.startswith(p) for name in found)]
    if kind is None or len(prefixes) > 1 or (kind == KOHYA) != any(p.startswith("lora") for p in prefixes):
        of = f" of {' and '.join(prefixes)}" if len(prefixes) > 1 else ""
        raise BadInput(f"{file}: expected the adapter of one network, as PEFT, diffusers or kohya write it; "
                       f"got tensors{of}: {listed(sorted(found), 3) or 'none'}")
    prefix, flat = "".join(prefixes), {name.replace(".", "_"): name for name in names or ()}
    if kind == KOHYA and names is None:
        raise BadInput(f"{file}: kohya writes the dots of names as underscores, and only the network tells "
                       "which they are: give its folder by --model")
    layers, unknown, twice, absent = {}, [], [], []
    for name, tensor in found.items():
        end = next((e for e in ENDS[kind] if name.endswith(e)), None)
        if end is None or not name.startswith(prefix):
            unknown.append(name)
            continue
        layer, part = name[len(prefix):-len(end)], ENDS[kind][end]
        if kind == PROCESSORS:
            layer = layer.replace(".processor.", ".") + ".0" * layer.endswith(".to_out")
        if kind == KOHYA:
            if layer not in flat:
                absent.append(name)
                continue
            layer = flat[layer]
        if part in layers.setdefault(layer, {}):
            twice.append(name)
        layers[layer][part] = tensor
    problems = {f"not supported among the names of {kind}": unknown, "says twice": twice,
                "the network has no such linear layer": absent}
    if parts := [f"{problem}: {listed(sorted(names), 5)}" for problem, names in problems.items() if names]:
        way_out = "; expected the network that it was trained on" if absent else ""
        raise BadInput(f"{file}: {'; '.join(parts)}{way_out}")
    return kind, prefix, layers


def _header(file, metadata):
    """The config that diffusers keeps in a file's header; None if there is none."""
    if METADATA not in metadata:
        return None
    try:
        header = json.loads(metadata[METADATA])
    except (ValueError, RecursionError, TypeError):
        header = None
    if not isinstance(header, dict):
        raise BadInput(f"{file}: expected a JSON object in its header, {METADATA}")
    return header


def _config_of_tensors(file, kind, layers, alphas):
    """The config of a file that has none: the ranks of the tensors; alpha is kohya's, else the rank."""
    ranks = {}
    for layer, own in layers.items():
        if not own.keys() & {A, B} or any(own[part].ndim != 2 for part in own.keys() & {A, B}):
            wrong = [f"{layer}.{part} {tuple(x.shape)}" for part, x in own.items()] or [f"{layer}.alpha only"]
            raise BadInput(f"{file}: expected matrices A and B of a linear layer, got {listed(wrong, 3)}")
        ranks[layer] = own[A].shape[0] if A in own else own[B].shape[1]
    if any(alpha.numel() != 1 for alpha in alphas.values()):
        raise BadInput(f"{file}: expected one number as each alpha")
    if kind == NEW:
        if len(set(ranks.values())) > 1:
            raise BadInput(f"{file}: ranks {min(ranks.values())} to {max(ranks.values())} and no alpha in "
                           f"the header ({METADATA}): nothing says how strong each layer is; give the PEFT "
                           "folder")
        print(f"note: {file}: no alpha in its header: the update counts once, as diffusers takes it",
              file=sys.stderr)
    strengths = ranks | {layer: alpha.item() for layer, alpha in alphas.items()}
    rank, alpha = (Counter(x.values()).most_common(1)[0][0] for x in (ranks, strengths))
    try:
        return LoRAConfig(rank, alpha, tuple(layers), dora=any(MAGNITUDE in own for own in layers.values()),
                          rank_pattern={_exactly(k): v for k, v in ranks.items() if v != rank},
                          alpha_pattern={_exactly(k): v for k, v in strengths.items() if v != alpha})
    except BadInput as error:
        raise BadInput(f"{file}: {error}") from None


def _exactly(layer):
    return f"^{re.escape(layer)}"


def own_sizes(adapter):
    """{layer: (in, out)} as its tensors say, where the network is not known; BadInput for half a layer."""
    lacking = [f"{layer}.{part}" for layer, own in adapter.layers.items() for part in (A, B)
               if part not in own or not own[part].ndim]
    if lacking:
        raise BadInput(f"{adapter.source}: expected matrices {A} and {B} of every layer, not there: "
                       f"{listed(lacking, 3)}; take the file again from where it was made")
    return {layer: (own[A].shape[-1], own[B].shape[0]) for layer, own in adapter.layers.items()}


def check(adapter, sizes, network):
    """BadInput unless the tensors are those of the targets among layers of these sizes, {name: (in, out)}."""
    expected, config = {}, adapter.config
    for layer, (n_in, n_out) in ((k, v) for k, v in sizes.items() if config.is_target(k)):
        rank = config.rank_of(layer)
        expected[f"{PEFT}.{layer}.{A}"], expected[f"{PEFT}.{layer}.{B}"] = (rank, n_in), (n_out, rank)
        if config.dora:
            expected[f"{PEFT}.{layer}.{MAGNITUDE}"] = (n_out,)
    found = adapter.tensors(PEFT)
    shapes = [f"{k} expected {s}, got {tuple(found[k].shape)}" for k, s in expected.items()
              if k in found and tuple(found[k].shape) != s]
    dtypes = [f"{k} expected floats, got {v.dtype}" for k, v in found.items() if v.dtype not in FLOATS]
    beside = [layer for layer in adapter.layers if layer in sizes and not config.is_target(layer)]
    foreign, unused = [], []
    for layer in adapter.layers.keys() - beside:
        names = (f"{PEFT}.{layer}.{part}" for part in adapter.layers[layer])
        (unused if layer in sizes else foreign).extend(name for name in names if name not in expected)
    problems = {"not in the file": expected.keys() - found.keys(), "no such layer": foreign,
                "not named by target_modules in its config, or excluded there": beside,
                "without use_dora in its config, which must say it": unused, "other shapes": shapes,
                "other dtypes": dtypes}
    if parts := [f"{problem}: {listed(sorted(which), 3)}" for problem, which in problems.items() if which]:
        way_out = "; expected the network that it was trained on" if foreign else ""
        raise BadInput(f"{adapter.source}: not an adapter of {network}: {'; '.join(parts)}{way_out}")
    check_finite(adapter.source, {k: v.float() for k, v in found.items()})


# Writing


def write(adapter, out, form):
    """Write an adapter to out: "peft" a folder, "diffusers" and "kohya" a file.

    BadInput for DoRA in kohya's names. The config, with the hash of the base, is in the header too, where
    diffusers' loader reads it: without, it would take alpha = r.
    """
    if form == "peft":
        with making(out) as folder:
            write_peft(adapter, folder)
    elif form == "diffusers":
        network = adapter.network()
        save_safetensors(out, adapter.tensors(network), header=_in_header(adapter, network))
    else:
        save_safetensors(out, _in_kohya(adapter), {"base": adapter.base} if adapter.base else None)


def write_peft(adapter, folder):
    """Write adapter_config.json and adapter_model.safetensors into a folder, file by file."""
    save_safetensors(Path(folder) / "adapter_model.safetensors", adapter.tensors(PEFT),
                     header=_in_header(adapter, PEFT))
    write_json(Path(folder) / "adapter_config.json", _fields(adapter))


def _in_header(adapter, prefix):
    """The header's entry. diffusers drops what has not the prefix, so that the hash of the base may be there.

    One entry: safetensors writes several in an order that changes from call to call.
    """
    fields = {f"{prefix}.{k}": v for k, v in _fields(adapter).items()}
    return {METADATA: json.dumps(fields | ({"base": adapter.base} if adapter.base else {}))}


def _in_kohya(adapter):
    config, prefix = adapter.config, f"lora_{adapter.network()}"
    if config.dora:
        raise BadInput(f"{adapter.source}: kohya's names cannot say DoRA: expected --to peft or diffusers, "
                       "or a merge into the model")
    out = {}
    for layer, own in adapter.layers.items():
        name = f"{prefix}_{layer.replace('.', '_')}"
        if f"{name}.alpha" in out:
            raise BadInput(f"{adapter.source}: two layers are {name} in kohya's names")
        out |= {f"{name}.lora_down.weight": own[A], f"{name}.lora_up.weight": own[B],
                f"{name}.alpha": torch.tensor(float(config.scaling_of(layer) * config.rank_of(layer)))}
    return out


# The config as PEFT writes it


def _fields(adapter):
    config, base = adapter.config, adapter.base
    return {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": base and base.get("name"),
        "inference_mode": True, "r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout,
        "target_modules": config.targets if isinstance(config.targets, str) else list(config.targets),
        "use_rslora": config.rslora, "use_dora": config.dora, "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        "init_lora_weights": "gaussian" if config.init == "gaussian" else True,
        "bias": "none", "fan_in_fan_out": False, "modules_to_save": None}


# A field that PEFT may add and that is not listed here is refused unless it is off (None, False or empty).
MEANINGLESS = ("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode",
               "peft_version", "megatron_core", "qalora_group_size", "layers_pattern", "eva_config")
READ = {"r", "lora_alpha", "target_modules", "lora_dropout", "use_rslora", "use_dora", "rank_pattern",
        "alpha_pattern"}
NARROWING = ("exclude_modules", "layers_to_transform")  # of the targets
SUPPORTED = {"peft_type": ("LORA",), "bias": ("none",),
             "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal")}  # those that keep the base


def _config(fields, source, layers):
    """The config of PEFT's fields. Where they narrow the targets, the layers that have tensors are these."""
    wrong = [f"{k}={v!r:.100}" for k, v in fields.items()
             if k not in READ and k not in MEANINGLESS and k not in NARROWING
             and v and v not in SUPPORTED.get(k, ())]
    if wrong or fields.get("peft_type") != "LORA":
        wrong = wrong or [f"peft_type={fields.get('peft_type')!r:.100}"]
        raise BadInput(f"{source}: not supported: {listed(wrong, 20)}")
    if missing := sorted({"r", "target_modules"} - fields.keys()):
        raise BadInput(f"{source}: expected the fields {', '.join(missing)}, which PEFT writes; without them "
                       "it is not the config of a LoRA adapter")
    for key in ("use_rslora", "use_dora"):
        if fields.get(key) not in (True, False, None):
            raise BadInput(f"{source}: {key}: expected true or false, got {fields[key]!r:.100}")
    try:
        config = LoRAConfig(
            rank=fields["r"], alpha=fields.get("lora_alpha", 8), targets=fields["target_modules"],
            dropout=fields.get("lora_dropout", 0.0), rslora=bool(fields.get("use_rslora")),
            dora=bool(fields.get("use_dora")), rank_pattern=fields.get("rank_pattern") or {},
            alpha_pattern=fields.get("alpha_pattern") or {},
            init="gaussian" if fields.get("init_lora_weights") == "gaussian" else "kaiming")
        if config.targets == ALL_LINEAR or any(fields.get(k) not in (None, []) for k in NARROWING):
            if not (kept := tuple(_narrowed(config, fields, layers))):
                raise BadInput(f"target_modules, less {' and '.join(NARROWING)}, name none of the file's "
                               f"layers: {listed(sorted(layers), 3)}")
            config = replace(config, targets=kept)
    except BadInput as error:
        raise BadInput(f"{source}: {error}") from None
    return config


def _narrowed(config, fields, layers):
    """Those of the layers that the targets leave: not excluded, and of a number to transform."""
    excluded, numbers, stems = map(fields.get, ("exclude_modules", "layers_to_transform", "layers_pattern"))
    kept = list(filter(config.is_target, layers))
    if excluded:
        out = replace(config, targets=excluded)
        kept = [layer for layer in kept if not out.is_target(layer)]
    if numbers not in (None, []):
        numbers = numbers if isinstance(numbers, list) else [numbers]
        if not all(type(x) is int for x in numbers):
            raise BadInput(f"layers_to_transform: expected whole numbers, got {numbers!r:.100}")
        stems = [stems] if isinstance(stems, str) else stems or []
        if not isinstance(stems, list) or not all(isinstance(x, str) for x in stems):
            raise BadInput(f"layers_pattern: expected names, got {stems!r:.100}")
        stems = [re.escape(x) for x in stems] or ["[^.]*"]
        found = [[re.match(rf"(?:.*\.)?{x}\.(\d+)\.", layer) for x in stems] for layer in kept]
        kept = [layer for layer, own in zip(kept, found, strict=True)
                if any(own) and int(next(filter(None, own))[1]) in numbers]
    return kept


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


def _by_pattern(patterns, name, default):
    return next((v for k, v in patterns.items() if re.fullmatch(rf"(.*\.)?({k})", name)), default)
