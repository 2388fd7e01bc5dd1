"""Checkpoint files in and out: atomic, safetensors only, never a pickle.

A file is written beside its place and renamed over it, so a reader never sees half of it. Metadata is a dict of JSON values.
safetensors itself stores strings, in an order that changes from call to call, so the dict is one string, under the key "json":
the same tensors and metadata give the same bytes.
"""

import contextlib
import errno
import functools
import hashlib
import json
import os
import pickle
import re
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


class BadInput(ValueError):
    """Something the user gave cannot be used. The message is one line: which file, row or key, what was expected, what came."""


def run_command(main):
    """Run a script's main(): exit status 2 and one line on bad input, 130 on Ctrl-C."""
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("stopped by Ctrl-C; the same command goes on where this one was", file=sys.stderr)
        sys.exit(130)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"error: {error.filename}: {error.strerror}" if error.filename else f"error: {error}", file=sys.stderr)
        sys.exit(2)


@contextlib.contextmanager
def replacing(path):
    """`with replacing(path) as tmp:` writes tmp, then renames it to path; on an error path stays as it was."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield tmp
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def write_json(path, value):
    with replacing(path) as tmp:
        tmp.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def save_safetensors(path, tensors: dict, metadata: dict | None = None):
    """Tensors and JSON-able metadata into one safetensors file, atomically. Names lose the prefixes of compile and DDP."""
    tensors = {clean_name(k): v.detach().cpu().contiguous() for k, v in tensors.items()}
    with replacing(path) as tmp:
        try:
            save_file(tensors, tmp, {"json": json.dumps(metadata)} if metadata else None)
        except SafetensorError as error:  # a full disk, a folder that may not be written
            raise OSError(errno.EIO, str(error), str(path)) from None


def clean_name(name):
    """A parameter's own name: without what torch.compile and DistributedDataParallel put before it."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


def load_safetensors(path, device="cpu"):
    """(tensors, metadata) of a file that save_safetensors wrote, or of any other safetensors file (metadata then strings)."""
    with _open(path, device) as f:
        metadata = _metadata(f)
        return {k: f.get_tensor(k) for k in f.keys()}, metadata  # noqa: SIM118 - not a dict


def load_metadata(path):
    """The metadata alone, without reading a tensor."""
    with _open(path, "cpu") as f:
        return _metadata(f)


@contextlib.contextmanager
def _open(path, device):
    if not Path(path).is_file():
        raise BadInput(f"{path}: no such file, expected a .safetensors checkpoint")
    try:
        with safe_open(path, "pt", device=str(device)) as f:
            yield f
    except SafetensorError as error:
        raise BadInput(f"{path}: not a whole safetensors file ({error})") from None


def _metadata(f):
    metadata = f.metadata() or {}
    return json.loads(metadata["json"]) if metadata.keys() == {"json"} else metadata


def read_state(path):
    """State dict of a .safetensors file, or of a .pt, .pth or .ckpt that holds tensors and nothing that must be unpickled."""
    path = Path(path)
    if path.suffix == ".safetensors":
        return load_safetensors(path)[0]
    if not path.is_file():
        raise BadInput(f"{path}: no such file, expected weights (.safetensors or .pth)")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise BadInput(f"{path}: not a file of tensors only ({str(error).splitlines()[0]})") from None
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise BadInput(f"{path}: expected a state dict of tensors, got {type(state).__name__}")
    return state


def load_state(module, tensors, source, rules=(), dtype=None):
    """Fill a module built on the meta device: every parameter set, every tensor used, or an error that lists the rest.

    rules rename published tensors (see rename). Tensors of load_safetensors lie in the file until they are converted to
    dtype, one after the other; those that have it already stay there, mapped.
    """
    own, names, twice = module.state_dict(), {}, []
    for name in tensors:
        mine = rename(name, rules)
        if mine in names:
            twice.append(f"{name} and {names[mine]}")
        names[mine] = name
    missing = sorted(rename(k, rules, back=True) for k in own.keys() - names.keys())
    extra = sorted(names[k] for k in names.keys() - own.keys())
    shapes = [f"{names[k]} expected {tuple(own[k].shape)}, got {tuple(tensors[names[k]].shape)}"
              for k in sorted(own.keys() & names.keys()) if own[k].shape != tensors[names[k]].shape]
    if missing or extra or shapes or twice:
        parts = [f"{word}: {', '.join(found)}" for word, found in
                 (("not set", missing), ("not read", extra), ("other shapes", shapes), ("read twice", twice)) if found]
        raise BadInput(f"{source}: does not fit {type(module).__name__}: " + "; ".join(parts))
    ours = {k: tensors[names[k]] for k in own}
    cast = {k: v.to(dtype) if dtype and v.is_floating_point() else v for k, v in ours.items()}
    module.load_state_dict(cast, strict=True, assign=True)
    return module


def file_hash(path):
    """SHA-256 of a file, as 64 hex digits."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def folder_hash(folder):
    """text_hash over the names and the hashes of all files below a folder."""
    files = sorted(f for f in Path(folder).rglob("*") if f.is_file() and not f.name.startswith("."))
    if not files:
        raise BadInput(f"{folder}: expected a folder with files of a model")
    return text_hash(*(part for f in files for part in (f.relative_to(folder), file_hash(f))))


def text_hash(*texts):
    """SHA-256 over strings, each ended by a zero byte, as 16 hex digits: the key of a cache."""
    h = hashlib.sha256()
    for text in texts:
        h.update(str(text).encode() + b"\0")
    return h.hexdigest()[:16]


def best_device(name="auto"):
    """"auto" is CUDA when there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = re.split(r"[.:,(\n]", str(error))[0]
        raise BadInput(f"--device {name}: not a device of this machine ({reason})") from None


# The mapper: checkpoints published elsewhere, read into our own modules


def rename(name, rules, back=False):
    """The published name of a tensor or module as ours; with back, ours as published.

    A rule is (published, ours), each a run of whole dotted parts in which # stands for one number. The rules of a table
    are applied one after the other, backwards for back. "a|b" reads either name and writes the first.
    """
    for published, ours in reversed(rules) if back else rules:
        old, new = (ours, published.split("|")[0]) if back else (published, ours)
        name = _pattern(old).sub(functools.partial(_fill, new), name)
    return name


@functools.cache
def _pattern(rule):
    return re.compile(r"(?<![^.])(?:" + re.escape(rule).replace(r"\#", r"(\d+)").replace(r"\|", "|") + r")(?![^.])")


def _fill(new, match):
    numbers = iter(g for g in match.groups() if g is not None)
    return re.sub("#", lambda _: next(numbers), new)


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: not a JSON file ({error})") from None


def supported(config, source, kind, free, fixed):
    """A published config.json as plain settings, or an error that names every value that the code here does not do.

    free: settings that are read, with the value a file without them means; fixed: settings with the values supported.
    """
    if config.get("_class_name", kind) != kind:
        raise BadInput(f"{source}: expected the config of a {kind}, got {config['_class_name']}")
    wrong = [f"{k}={v!r}" for k, v in config.items()
             if not k.startswith("_") and k not in free and v not in fixed.get(k, ())]
    if wrong:
        raise BadInput(f"{source}: not supported in a {kind}: {', '.join(wrong)}")
    return free | {k: v for k, v in config.items() if k in free}


def fetch(name):
    """A folder of this machine, or a repository of the hub brought to its cache: configs, tokenizers, safetensors."""
    if Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        raise BadInput(f"{name}: no such folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), allow_patterns=["*.json", "*.txt", "*.model", "*.safetensors"]))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BadInput(f"{name}: no such folder, and the hub gave no repository of this name ({reason})") from None


def read_checkpoint(folder, dtype=None, stem="diffusion_pytorch_model"):
    """(config, tensors) of a published model folder: config.json beside one safetensors file, or several with an index.

    Where there is a half-precision variant beside the full one, dtype decides which is read. No tensor is copied yet.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    variants = [".fp16", ""] if dtype in (torch.float16, torch.bfloat16) else ["", ".fp16"]
    for variant in variants:
        if (whole := folder / f"{stem}{variant}.safetensors").is_file():
            return config, load_safetensors(whole)[0]
        if (index := folder / f"{stem}.safetensors.index{variant}.json").is_file():
            return config, _read_shards(index)
    raise BadInput(f"{folder}: expected {stem}.safetensors, its .fp16 variant, or shards with an index; found none")


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
    """A network that build makes of a published config, filled from its folder, in evaluation mode.

    Its parameters stay trainable: frozen ones change torch's choice of kernels, and so the last bit of published outputs.
    """
    config, tensors = read_checkpoint(folder, dtype)
    with torch.device("meta"):
        module = build(config)
    return load_state(module, tensors, folder, module.published_names, dtype).eval()
