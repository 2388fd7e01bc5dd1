"""Files in and out: atomic writes, safetensors, JSON, hashes. Nothing is ever unpickled.

A file is written beside its place and renamed over it, so that half a file is never read. Metadata is a dict
of JSON values. safetensors itself stores strings, in an order that changes from call to call, so the dict is
one string, under the key "json": the same tensors and metadata give the same bytes.
"""

import contextlib
import errno
import hashlib
import json
import os
import pickle
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from command import BadInput


@contextlib.contextmanager
def replacing(path):
    """`with replacing(path) as tmp:` writes tmp, then renames it to path; on an error path is unchanged."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield tmp
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: not a JSON file ({error})") from None


def write_json(path, value):
    with replacing(path) as tmp:
        tmp.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def save_safetensors(path, tensors: dict, metadata: dict | None = None):
    """Tensors and JSON-able metadata into one safetensors file, atomically."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    with replacing(path) as tmp:
        try:
            save_file(tensors, tmp, {"json": json.dumps(metadata)} if metadata else None)
        except SafetensorError as error:  # a full disk, a folder that may not be written
            raise OSError(errno.EIO, str(error), str(path)) from None


def load_safetensors(path, device="cpu"):
    """(tensors, metadata) of any safetensors file; metadata are strings unless save_safetensors wrote it."""
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
    """State dict of a .safetensors file, or of a .pt, .pth or .ckpt that holds nothing but tensors."""
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


def cached(path, make, write=True):
    """(tensors, metadata) of a safetensors file; if absent or broken, of make(), which are saved to it."""
    try:
        return load_safetensors(path)
    except BadInput:
        tensors, metadata = make()
    # Equal to those of the file, even in their strides.
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    if write:
        try:
            save_safetensors(path, tensors, metadata)
        except OSError as error:
            print(f"not cached: {path}: {error.strerror}", file=sys.stderr)
    return tensors, metadata
