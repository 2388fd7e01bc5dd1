"""Checkpoints published elsewhere, read into our own modules and written back under their own names.

A network with published checkpoints carries a table of rename rules, `published_names`. A load is strict:
every tensor sets one parameter and every parameter is set, or an error lists what does not fit.
"""

import functools
import re
from pathlib import Path

import torch

from command import BadInput
from files import load_safetensors, read_json

DIFFUSERS_NAMES = (  # published name, ours: what the published networks of Kandinsky have in common
    ("down_blocks.#", "down.#"),
    ("up_blocks.#", "up.#"),
    ("mid_block", "mid"),
    ("resnets.#", "res.#"),
    ("attentions.#", "attn.#"),
    ("norm1", "norm_1"),
    ("norm2", "norm_2"),
    ("conv1", "conv_1"),
    ("conv2", "conv_2"),
    ("conv_shortcut", "skip"),
    ("attn.#.group_norm", "attn.#.norm"),
    ("conv_norm_out", "norm_out"),
)


def rename(name, rules, back=False):
    """The published name of a tensor or module as ours; with back, ours as published.

    A rule is (published, ours), each a run of whole dotted parts in which # stands for one number. The rules
    of a table are applied in order, for back in reverse order. "a|b" reads either name and writes the first.
    """
    for published, ours in reversed(rules) if back else rules:
        old, new = (ours, published.split("|")[0]) if back else (published, ours)
        name = _pattern(old).sub(functools.partial(_fill, new), name)
    return name


@functools.cache
def _pattern(rule):
    alternatives = re.escape(rule).replace(r"\#", r"(\d+)").replace(r"\|", "|")
    return re.compile(rf"(?<![^.])(?:{alternatives})(?![^.])")


def _fill(new, match):
    numbers = iter(g for g in match.groups() if g is not None)
    return re.sub("#", lambda _: next(numbers), new)


def load_state(module, tensors, source, rules=(), dtype=None):
    """Fill a module built on the meta device: all parameters set, all tensors used, or BadInput.

    rules rename published tensors (see rename). Tensors of load_safetensors stay in the file until they are
    converted to dtype, one after the other; those of that dtype remain there, mapped into memory.
    """
    own, names, duplicates = module.state_dict(), {}, []  # names: our name -> the published one
    for name in tensors:
        renamed = rename(name, rules)
        if renamed in names:
            duplicates.append(f"{name} and {names[renamed]}")
        names[renamed] = name
    missing = sorted(rename(k, rules, back=True) for k in own.keys() - names.keys())
    extra = sorted(names[k] for k in names.keys() - own.keys())
    shapes = [f"{names[k]} expected {tuple(own[k].shape)}, got {tuple(tensors[names[k]].shape)}"
              for k in sorted(own.keys() & names.keys()) if own[k].shape != tensors[names[k]].shape]
    if missing or extra or shapes or duplicates:
        problems = {"not set": missing, "not read": extra, "other shapes": shapes, "duplicates": duplicates}
        parts = [f"{problem}: {', '.join(which)}" for problem, which in problems.items() if which]
        raise BadInput(f"{source}: does not fit {type(module).__name__}: " + "; ".join(parts))
    ours = {k: tensors[names[k]] for k in own}
    cast = {k: v.to(dtype) if dtype and v.is_floating_point() else v for k, v in ours.items()}
    module.load_state_dict(cast, strict=True, assign=True)
    return module


def check_format(path, meta, kind, number, remedy):
    """BadInput for a checkpoint of another kind, or of an earlier or later format."""
    if meta.get("kind") != kind:
        found = meta.get("kind", "a file without a kind")
        raise BadInput(f"{path}: expected a checkpoint of {kind}.py, got {found!r}")
    if (found := meta.get("format", 1)) != number:
        versions = f"a checkpoint of format {found}, this version reads format {number}"
        raise BadInput(f"{path}: {versions}; {remedy}")


def check_config(config, source, kind, defaults, allowed):
    """The settings of a published config.json that are read, or BadInput with every unsupported value.

    defaults: the settings that are read, with their values where a file lacks them; allowed: the supported
    values of settings that are not read.
    """
    if config.get("_class_name", kind) != kind:
        raise BadInput(f"{source}: expected the config of a {kind}, got {config['_class_name']}")
    wrong = [f"{k}={v!r}" for k, v in config.items()
             if not k.startswith("_") and k not in defaults and v not in allowed.get(k, ())]
    if wrong:
        raise BadInput(f"{source}: not supported in a {kind}: {', '.join(wrong)}")
    return defaults | {k: v for k, v in config.items() if k in defaults}


def fetch(name):
    """A local folder, or the hub's cache of a repository: configs, tokenizers, safetensors."""
    if Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        raise BadInput(f"{name}: no such folder")
    from huggingface_hub import snapshot_download  # only here: a local folder needs no hub

    try:
        patterns = ["*.json", "*.txt", "*.model", "*.safetensors"]
        return Path(snapshot_download(str(name), allow_patterns=patterns))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        message = f"{name}: no such folder, and the hub gave no repository of this name ({reason})"
        raise BadInput(message) from None


def read_checkpoint(folder, dtype=None, stem="diffusion_pytorch_model"):
    """(config, tensors) of a published folder: config.json, and safetensors in one file or in indexed shards.

    If there is a half-precision variant too, dtype decides which is read. No tensor is copied yet.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    variants = [".fp16", ""] if dtype in (torch.float16, torch.bfloat16) else ["", ".fp16"]
    for variant in variants:
        if (whole := folder / f"{stem}{variant}.safetensors").is_file():
            return config, load_safetensors(whole)[0]
        if (index := folder / f"{stem}.safetensors.index{variant}.json").is_file():
            return config, _read_shards(index)
    raise BadInput(f"{folder}: expected {stem}.safetensors, its .fp16 variant, or shards with an index")


def _read_shards(index):
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise BadInput(f"{index}: expected a weight_map from tensors to files")
    tensors = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise BadInput(f"{index}: expected names of files beside it, got {shard}")
        found = load_safetensors(index.with_name(shard))[0]
        if both := sorted(tensors.keys() & found.keys()):
            raise BadInput(f"{index}: in more than one shard: {', '.join(both)}")
        tensors |= found
    return tensors


def load_published(build, folder, dtype):
    """The network that build makes of a published config, with the folder's weights, in evaluation mode.

    Its parameters stay trainable: if frozen, torch chooses other kernels, and outputs differ in the last bit.
    """
    config, tensors = read_checkpoint(folder, dtype)
    with torch.device("meta"):
        module = build(config)
    return load_state(module, tensors, folder, module.published_names, dtype).eval()
