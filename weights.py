"""Checkpoints published elsewhere, read into our own modules and written back under their own names.

A network with published checkpoints carries a table of rename rules, `published_names`. A load is strict:
every tensor sets one parameter and every parameter is set, or an error lists what does not fit.
"""

from command import BadInput, reason

import contextlib
import functools
import re
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import torch

from files import load_safetensors, read_json, refuse_pickle, text_hash

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


FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # dtypes that weights may have
HALF = (torch.bfloat16, torch.float16)  # those that are read from the .fp16 variant where there is one

AVERAGING = ("decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step",
             "use_ema_warmup")  # what averaged weights (EMA) have in config.json; nothing of the network


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
    kinds = [f"{names[k]} expected {_kind(own[k])}, got {tensors[names[k]].dtype}"
             for k in sorted(own.keys() & names.keys()) if _kind(own[k]) != _kind(tensors[names[k]])]
    if missing or extra or shapes or duplicates or kinds:
        problems = {"not set": missing, "not read": extra, "other shapes": shapes, "duplicates": duplicates,
                    "other dtypes": kinds}
        parts = [f"{problem}: {listed(which, 20)}" for problem, which in problems.items() if which]
        raise BadInput(f"{source}: does not fit {type(module).__name__}: " + "; ".join(parts))
    ours = {k: tensors[names[k]] for k in own}
    cast = {k: v.to(dtype or own[k].dtype) if v.is_floating_point() else v.to(own[k].dtype)
            for k, v in ours.items()}
    check_finite(source, {names[k]: v for k, v in cast.items()})
    module.load_state_dict(cast, strict=True, assign=True)
    return module


def _kind(tensor):
    if tensor.dtype in FLOATS:
        return "floats"
    return "whole numbers" if tensor.dtype in (torch.bool, torch.int64, torch.int32) else "others"


def listed(names, most):
    """The first names, and how many more there are: a message stays a line."""
    return ", ".join([*names[:most], *[f"and {len(names) - most} more"] * (len(names) > most)])


def check_finite(source, tensors):
    """BadInput for weights that hold NaN or infinity, as a run that diverged leaves: every image is black."""
    def finite(x):  # least and largest keep NaN, and need no copy
        return all(torch.isfinite(end) for end in torch.aminmax(x.detach()))

    wrong = [k for k, v in tensors.items() if v.is_floating_point() and v.numel() and not finite(v)]
    if wrong:
        raise BadInput(f"{source}: NaN or infinite weights in {len(wrong)} tensors: {listed(wrong, 5)}")


def check_format(path, meta, kind, number, remedy):
    """BadInput for a checkpoint of another kind, or of an earlier or later format."""
    if meta.get("kind") != kind:
        found = meta.get("kind", "a file without a kind")
        raise BadInput(f"{path}: expected a checkpoint of {kind}.py, got {found!r}")
    if (found := meta.get("format", 1)) != number:
        versions = f"a checkpoint of format {found}, this version reads format {number}"
        raise BadInput(f"{path}: {versions}; {remedy}")


@contextlib.contextmanager
def described_by(path):
    """`with described_by(path):` builds a model of a checkpoint's metadata; BadInput if that fails."""
    try:
        yield
    except Exception as error:  # wrong sizes, kinds or names fail somewhere inside the network
        raise BadInput(f"{path}: its metadata do not describe a model ({reason(error)}); the file is damaged "
                       "or of another version: train or import it anew") from None


def check_fields(config):
    """BadInput for a field of a config dataclass that is not of its default's kind, or out of bounds.

    A file's metadata may hold anything; a size of 10^10 would be allocated, not refused.
    """
    for field in fields(config):
        value = getattr(config, field.name)
        default = field.type() if field.default is MISSING else field.default
        if (expected := _expected(field.name, value, default)) is not None:
            raise BadInput(f"{type(config).__name__}: {field.name}={value!r:.100}, expected {expected}")


def check_config(config, source, kind, defaults, allowed):
    """The settings of a published config.json that are read, or BadInput with every unsupported value.

    defaults: the settings that are read, with their values where a file lacks them; allowed: the supported
    values of settings that are not read. Notes of how the weights were averaged are passed over.
    """
    if config.get("_class_name", kind) != kind:
        raise BadInput(f"{source}: expected the config of a {kind}, got {str(config['_class_name']):.100}")
    wrong = [f"{k}={v!r:.100}" for k, v in config.items()
             if not k.startswith("_") and k not in (*defaults, *AVERAGING) and v not in allowed.get(k, ())]
    if wrong:
        raise BadInput(f"{source}: not supported in a {kind}: {listed(wrong, 20)}")
    settings = defaults | {k: v for k, v in config.items() if k in defaults}
    for key, value in settings.items():
        if (expected := _expected(key, value, defaults[key])) is not None:
            raise BadInput(f"{source}: not supported: {key}={value!r:.100}, expected {expected}")
    return settings


def _expected(key, value, default):
    """What a setting must be, by the kind of its default, if it is something else; None: of any kind."""
    if isinstance(default, tuple):
        if isinstance(value, list | tuple) and 1 <= len(value) <= 16:
            first = default[0] if default else ""
            return next((f"a list of such: {e}" for v in value if (e := _expected(key, v, first))), None)
        return "a list of 1 to 16 values"
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "true or false"
    if isinstance(default, int):  # a network of a million layers would be built for hours
        low, high = min(default, 1), 256 if "layers" in key else 1 << 16
        whole = isinstance(value, int) and not isinstance(value, bool)
        return None if whole and low <= value <= high else f"one whole number from {low} to {high}"
    if isinstance(default, float):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return None if number and 0 <= value <= sys.float_info.max else "one finite number from 0"
    if isinstance(default, str):
        return None if isinstance(value, str) else "a string"
    return None


def check_divisible(source, key, values, by_key, by):
    """BadInput for values of the setting key that are not multiples of by, a setting or twice it."""
    if wrong := [v for v in values if v % by]:
        raise BadInput(f"{source}: not supported: {key} holds {wrong[0]}, not a multiple of {by} ({by_key})")


def fetch(name, dtype=None, chosen=None):
    """A local folder, or the hub's cache of a repository: configs, tokenizers, safetensors.

    Of weights in two precisions only those for dtype are downloaded. Never code, never pickles.
    chosen: function from the names of all files to those that are downloaded, instead of files_to_fetch.
    """
    if Path(name).is_dir():
        return Path(name)
    if Path(name).is_file():
        refuse_pickle(name)
        raise BadInput(f"{name}: a file; expected a folder, or a name on the hub")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name)):
        raise BadInput(f"{name}: no such folder")
    import huggingface_hub as hub  # only here: a local folder needs no hub

    try:
        try:
            names = hub.list_repo_files(str(name))
            patterns = chosen(names) if chosen else files_to_fetch(names, dtype)
        except Exception:  # offline, in whichever words: what is in the hub's cache
            patterns = ["*" + ending for ending in FETCHED]
        return Path(hub.snapshot_download(str(name), allow_patterns=patterns))
    except (OSError, ValueError) as error:
        message = f"{name}: no such folder, and the hub gave no repository of this name ({reason(error)})"
        raise BadInput(message) from None


PICKLES = (".bin", ".ckpt", ".pt", ".pth")
FETCHED = (".json", ".txt", ".model", ".safetensors")  # endings of configs, tokenizers, weights


def files_to_fetch(names, dtype=None):
    """The files of a repository that a model of dtype is read from, of all their names."""
    names = [n for n in names if n.endswith(FETCHED)]
    weights = {}  # folder -> is it half precision -> names of the weights and their indices
    for n in names:
        if ".safetensors" in n:
            folder, _, file = n.rpartition("/")
            weights.setdefault(folder, {}).setdefault(".fp16" in file, []).append(n)
    unread = {n for both in weights.values() if len(both) == 2 for n in both[dtype not in HALF]}
    return [n for n in names if n not in unread]


def adapter_files(names):
    """The files of a repository that an adapter is read from: at its top, in the first format it has."""
    tops = [n for n in names if "/" not in n]
    for files in (["adapter_config.json", "adapter_model.safetensors"], ["pytorch_lora_weights.safetensors"]):
        if set(files) <= set(tops):
            return files
    return [n for n in tops if n.endswith(".safetensors")]


# Which model a folder holds

KINDS = {"prior": "the prior of Kandinsky 2.2", "decoder": "the decoder of Kandinsky 2.2",
         "combined": "the prior and the decoder of Kandinsky 2.2 in one folder", "3": "Kandinsky 3"}
OTHER_UNETS = (  # a setting, its value, what it belongs to
    ("encoder_hid_dim_type", "text_image_proj", "a U-Net of Kandinsky 2.1"),
    ("addition_embed_type", "text_image", "a U-Net of Kandinsky 2.1"),
    ("addition_embed_type", "image_hint", "a ControlNet, which also reads a hint image"),
    ("in_channels", 9, "an inpainting U-Net, which also reads a mask"))


def kind_of(folder):
    """What a published folder holds, by its sub-folders: a key of KINDS; BadInput for anything else."""
    if (folder / "prior").is_dir():
        return "prior"
    if (folder / "unet").is_dir():
        file = folder / "unet/config.json"
        config = read_json(file)
        refuse_other_unet(file, config)
        if config.get("_class_name") == "Kandinsky3UNet":
            return "3"
        return "combined" if (folder / "prior_prior").is_dir() else "decoder"
    if (folder / "config.json").is_file():
        raise BadInput(f"{folder}: a part of a published model; expected the folder that holds all parts")
    files = (*folder.glob("*"), *folder.glob("*/*"))
    if originals := sorted(f.name for f in files if f.suffix in PICKLES):
        raise BadInput(f"{folder}: holds pickles ({listed(originals, 3)}), an original checkpoint perhaps, "
                       "which may run code and are not read; expected a folder as published for diffusers, "
                       "by kandinsky-community on the hub")
    raise BadInput(f"{folder}: no published model: expected the sub-folders prior (Kandinsky 2.2) or unet "
                   "(its decoder, or Kandinsky 3), or for sampler.py a checkpoint of msdm.py")


def check_kind(folder, *kinds):
    """BadInput for a folder that does not hold a model of one of these kinds, keys of KINDS."""
    if (found := kind_of(folder)) not in kinds:
        raise BadInput(f"{folder}: holds {KINDS[found]}; expected {KINDS[kinds[0]]}")


def refuse_other_unet(source, config):
    """BadInput for the config of a U-Net that reads more than a latent and the text or its embedding."""
    for key, value, what in OTHER_UNETS:
        if config.get(key) == value:
            raise BadInput(f"{source}: not supported: {key}={value!r}: {what}; expected that of a model from "
                           "text to image, as kandinsky-community/kandinsky-2-2-decoder or kandinsky-3")


def prior_part(folder, name):
    """The folder of a part of 2.2's prior; beside the decoder's parts its name begins with prior_."""
    combined = folder / f"prior_{name}"
    return combined if combined.is_dir() else folder / name


# Weights


def read_checkpoint(folder, dtype=None, stem="diffusion_pytorch_model"):
    """(config, tensors) of a published folder: config.json, and safetensors in one file or in indexed shards.

    If there is a half-precision variant too, dtype decides which is read. No tensor is copied yet.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    variants = [".fp16", ""] if dtype in HALF else ["", ".fp16"]
    for variant in variants:
        if (whole := folder / f"{stem}{variant}.safetensors").is_file():
            return config, load_safetensors(whole)[0]
        if (index := folder / f"{stem}.safetensors.index{variant}.json").is_file():
            return config, _read_shards(index)
    refuse_pickles(folder)
    raise BadInput(f"{folder}: expected {stem}.safetensors, its .fp16 variant, or shards with an index; "
                   "pickles (.bin) are neither downloaded nor read")


def refuse_pickles(folder):
    """BadInput for a folder of weights in pickles only."""
    found = sorted(f.name for f in Path(folder).glob("*") if f.suffix in PICKLES)
    if found and not any(Path(folder).glob("*.safetensors")):
        raise BadInput(f"{folder}: holds pickles only ({listed(found, 3)}), which may run code and are not "
                       "read: save it as safetensors, by save_pretrained of the library that wrote it")


def _read_shards(index):
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise BadInput(f"{index}: expected a weight_map from tensors to files")
    tensors = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise BadInput(f"{index}: expected names of files beside it, .safetensors, got {shard:.100}")
        file = index.with_name(shard)
        if not _is_in(file.resolve(), file.parent.resolve()):
            raise BadInput(f"{file}: a link out of its folder; expected the file itself")
        found = load_safetensors(file)[0]
        if both := sorted(tensors.keys() & found.keys()):
            raise BadInput(f"{index}: in more than one shard: {listed(both, 5)}")
        tensors |= found
    return tensors


def _is_in(file, folder):
    """Whether a file lies in a folder, or folder/file is a link of the hub's cache: snapshots -> blobs."""
    snapshots = next((p for p in folder.parents if p.name == "snapshots"), None)
    return file.parent in (folder, snapshots and snapshots.with_name("blobs"))


def load_published(build, folder, dtype):
    """The network that build makes of a published config, with the folder's weights, in evaluation mode.

    Its parameters stay trainable: if frozen, torch chooses other kernels, and outputs differ in the last bit.
    """
    config, tensors = read_checkpoint(folder, dtype)
    try:
        with torch.device("meta"):
            module = build(config)
    except BadInput as error:
        raise BadInput(f"{folder}/config.json: {error}") from None
    module = load_state(module, tensors, folder, module.published_names, dtype).eval()
    module.base = base_of(folder, tensors)
    return module


def base_of(folder, tensors):
    """Which network an adapter belongs to: its name without the path to it, and a hash of some weights.

    The hash is over the start of every tensor, as in half precision, so that both precisions agree.
    """
    path = Path(folder).resolve()
    hub = next((p for p in path.parents if p.name.startswith("models--")), None)
    name = hub.name.removeprefix("models--").replace("--", "/") if hub else path.parent.name
    starts = ((k, tensors[k].flatten()[:16].half().tolist()) for k in sorted(tensors))
    return {"name": name, "hash": text_hash(*(part for start in starts for part in start))}
