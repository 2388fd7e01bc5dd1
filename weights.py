"""Checkpoint files in and out: atomic, safetensors only, never a pickle.

A file is written beside its place and renamed over it, so a reader never sees half of it. Metadata is a dict of JSON values;
safetensors itself only stores strings, so each value is kept as its JSON text.
"""

import contextlib
import hashlib
import json
import os
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
        save_file(tensors, tmp, {k: json.dumps(v) for k, v in (metadata or {}).items()})


def clean_name(name):
    """A parameter's own name: without what torch.compile and DistributedDataParallel put before it."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


def load_safetensors(path, device="cpu"):
    """(tensors, metadata) of a file that save_safetensors wrote, or of any other safetensors file (metadata then strings)."""
    with _open(path, device) as f:
        metadata = {k: _from_json(v) for k, v in (f.metadata() or {}).items()}
        return {k: f.get_tensor(k) for k in f.keys()}, metadata  # noqa: SIM118 - not a dict


def load_metadata(path):
    """The metadata alone, without reading a tensor."""
    with _open(path, "cpu") as f:
        return {k: _from_json(v) for k, v in (f.metadata() or {}).items()}


@contextlib.contextmanager
def _open(path, device):
    if not Path(path).is_file():
        raise BadInput(f"{path}: no such file, expected a .safetensors checkpoint")
    try:
        with safe_open(path, "pt", device=str(device)) as f:
            yield f
    except SafetensorError as error:
        raise BadInput(f"{path}: not a whole safetensors file ({error})") from None


def _from_json(text):
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def load_state(module, tensors, source):
    """Fill a module built on the meta device: every parameter set, every tensor used, or an error that lists what differs."""
    own = module.state_dict()
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    shapes = [f"{k} expected {tuple(own[k].shape)}, got {tuple(tensors[k].shape)}"
              for k in sorted(own.keys() & tensors.keys()) if own[k].shape != tensors[k].shape]
    if missing or extra or shapes:
        parts = [f"{word}: {', '.join(names)}" for word, names in
                 (("not set", missing), ("not read", extra), ("other shapes", shapes)) if names]
        raise BadInput(f"{source}: does not fit {type(module).__name__}: " + "; ".join(parts))
    module.load_state_dict(tensors, strict=True, assign=True)
    return module


def file_hash(path):
    """SHA-256 of a file, as 64 hex digits."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def text_hash(*texts):
    """SHA-256 over strings, each ended by a zero byte, as 16 hex digits: the key of a cache."""
    h = hashlib.sha256()
    for text in texts:
        h.update(str(text).encode() + b"\0")
    return h.hexdigest()[:16]


def best_device(name="auto"):
    """"auto" is CUDA when there is one, else the CPU."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
