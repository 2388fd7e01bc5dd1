"""Files in and out: atomic writes, safetensors, JSON, csv, hashes. Nothing is ever unpickled.

A file is written beside its place and renamed over it, so that half a file is never read. Metadata is a dict
of JSON values. safetensors itself stores strings, in an order that changes from call to call, so the dict is
one string, under the key "json": the same tensors and metadata give the same bytes.
"""

from command import BadInput, reason

import contextlib
import csv
import errno
import glob
import hashlib
import itertools
import json
import math
import mmap
import os
import pickle
import re
import secrets
import shutil
import sys
import tempfile
import warnings
from fnmatch import fnmatch
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

LARGEST_JSON = 64 << 20  # bytes; configs and indices of weights are far smaller
LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # what a clone without git-lfs has for a large file
TORCH_SAVE = (b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9c")  # starts of its files: a zip; before torch 1.6


@contextlib.contextmanager
def replacing(path):
    """`with replacing(path) as tmp:` writes tmp, then renames it to path; on an error path is unchanged."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = _beside(path)
    try:
        yield tmp
        os.replace(tmp, path)
    except OSError as error:  # of a full disk, say: it names no file, or tmp
        if error.errno and error.filename in (None, str(tmp), tmp):
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        tmp.unlink(missing_ok=True)


@contextlib.contextmanager
def making(folder):
    """`with making(folder) as tmp:` fills tmp, then renames it to folder; BadInput if there is one already.

    On an error nothing is left; what a kill left is removed by the next one that makes the folder.
    """
    folder = Path(folder)
    if os.path.lexists(folder):
        raise BadInput(f"{folder}: exists already; name another folder, or remove this one")
    folder.parent.mkdir(parents=True, exist_ok=True)
    tmp = _beside(folder.with_name(f"{folder.name}.tmp"))
    remove_unfinished(folder.parent, glob.escape(f"{folder.name}.tmp"))
    tmp.mkdir()
    try:
        yield tmp
        os.replace(tmp, folder)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def _beside(path):
    # The random part: processes of two containers that share a folder may have the same number.
    return path.with_name(f".{path.stem}.{os.getpid()}{secrets.randbelow(10**6):06d}{path.suffix}")


def remove_unfinished(folder, *patterns):
    """Remove what killed processes left unfinished (replacing, making) whose names match the patterns."""
    for path in Path(folder).glob(".*"):
        left = re.fullmatch(r"\.(.+)\.(\d+)\d{6}(\.\w+)", path.name)
        ours = left and any(fnmatch(left[1] + left[3], pattern) for pattern in patterns)
        if ours and not _is_running(int(left[2])):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _is_running(pid):
    if os.name != "posix":  # there a signal 0 is not a question
        return False
    try:
        os.kill(pid, 0)
    except OverflowError:
        return False
    except OSError as error:
        return error.errno == errno.EPERM
    return True


def read_json(path):
    """The object in a JSON file, as a dict; BadInput for anything else, or a key with two values."""
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"{path}: no such file")
    if path.stat().st_size > LARGEST_JSON:
        raise BadInput(f"{path}: expected a JSON file of at most {LARGEST_JSON >> 20} MiB")
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=once_each)
    except (OSError, ValueError) as error:
        if isinstance(error, json.JSONDecodeError):
            refuse_pointer(path)
        raise BadInput(f"{path}: not a JSON file ({error})") from None
    except RecursionError:
        raise BadInput(f"{path}: not a JSON file that can be read: brackets too deep") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path}: expected a JSON object in braces, got a {type(value).__name__}")
    return value


def write_csv(path, header, rows, delimiter=","):
    with replacing(path) as tmp, open(tmp, "w", newline="", encoding="utf-8") as f:
        csv.writer(f, delimiter=delimiter, lineterminator="\n").writerows([header, *rows])


def refuse_other_rows(path, header, rows, delimiter=","):
    """BadInput where a csv file is there with other rows than would replace them: somebody's work perhaps."""
    if not Path(path).is_file():
        return
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            there = list(csv.reader(f, delimiter=delimiter))
    except (UnicodeDecodeError, csv.Error):
        there = None
    if there is None or [row for row in there if row] != [list(header), *([str(x) for x in r] for r in rows)]:
        raise BadInput(f"{path}: holds other rows than this command writes, edited or of other settings; "
                       "they are kept: give another --out, or move the file away and run the command again")


def read_text(path):
    """The text of a UTF-8 file, without a byte order mark; BadInput for other bytes."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def json_line(path, row, text):
    """The value of one line, of number row from 1, of a .jsonl file; BadInput if it is not JSON or has a key
    twice."""
    try:
        return json.loads(text, object_pairs_hook=once_each)
    except (ValueError, RecursionError) as error:           # ValueError: also a number of thousands of digits
        raise BadInput(f"{path}, row {row}: not JSON ({error})") from None


def once_each(pairs):
    found = dict(pairs)
    if twice := [key for key, value in pairs if value is not found[key] and value != found[key]]:   # a NaN is
        raise ValueError(f"the key {twice[0]!r} stands there twice")
    return found


def write_json(path, value):
    with replacing(path) as tmp:
        tmp.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def is_json_with(path, *keys):
    """Whether a file holds a JSON object with all these keys."""
    with contextlib.suppress(BadInput, OSError):
        return read_json(path).keys() >= set(keys)
    return False


def check_replaced(**outputs):
    """BadInput for a file that is there and is not what the command writes there, and for two outputs under
    one name: neither a result nor anything else is lost by a wrong name.

    outputs: flag=(path or None, what is written there in words, function path -> whether a file is that).
    """
    places = {}
    for name, (path, what, is_that) in outputs.items():
        if path is None:
            continue
        flag = f"--{name.replace('_', '-')}"
        other = places.setdefault(os.path.realpath(path), flag)
        if other != flag:
            raise BadInput(f"{other} and {flag} both name {path}: expected a file for each")
        if os.path.lexists(path) and not (os.path.isfile(path) and is_that(path)):
            raise BadInput(f"{flag} {path}: would be replaced and is not {what}; name another file with "
                           f"{flag}")


def create_json(path, value):
    """write_json if there is no such file; whether it was written. Of two processes at once, one writes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = _beside(path)
    try:
        write_json(tmp, value)
        os.link(tmp, path)  # fails where there is one, which a rename does not
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        if path.exists():
            return False
        write_json(path, value)
    finally:
        tmp.unlink(missing_ok=True)
    return True


def save_safetensors(path, tensors: dict, metadata: dict | None = None, header: dict | None = None):
    """Tensors and JSON-able metadata into one safetensors file, atomically.

    header: instead of metadata the strings that another library reads.
    """
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    with replacing(path) as tmp:
        tmp.touch()
        mode = tmp.stat().st_mode  # as the umask says; safetensors' own files are for their owner alone
        try:
            save_file(tensors, tmp, {"json": json.dumps(metadata)} if metadata else header)
        except SafetensorError as error:  # a full disk, a folder that may not be written
            raise OSError(errno.EIO, str(error), str(path)) from None
        tmp.chmod(mode)


def load_safetensors(path, device="cpu"):
    """(tensors, metadata) of any safetensors file; metadata are strings unless save_safetensors wrote it."""
    with _open(path, device) as f:
        metadata = _metadata(f, path)
        return {k: f.get_tensor(k) for k in f.keys()}, metadata  # noqa: SIM118 - not a dict


def load_metadata(path):
    """The metadata alone, without reading a tensor."""
    with _open(path, "cpu") as f:
        return _metadata(f, path)


@contextlib.contextmanager
def _open(path, device):
    if not Path(path).is_file():
        raise BadInput(f"{path}: no such file, expected a .safetensors checkpoint")
    try:
        with safe_open(path, "pt", device=str(device)) as f:
            yield f
    except SafetensorError as error:
        refuse_pointer(path)
        refuse_pickle(path)
        raise BadInput(f"{path}: not a whole safetensors file ({reason(error)})") from None


def refuse_pointer(path):
    """BadInput for a git-lfs pointer, which a clone without git-lfs has in place of a large file."""
    with open(path, "rb") as f:
        if f.read(len(LFS_POINTER)) == LFS_POINTER:
            raise BadInput(f"{path}: a git-lfs pointer instead of the file: run `git lfs pull` in its folder")


def refuse_pickle(path):
    """BadInput for a file of torch.save in place of safetensors: an original checkpoint, say."""
    with open(path, "rb") as f:
        if f.read(7).startswith(TORCH_SAVE):
            raise BadInput(f"{path}: a pickle of torch.save (.pt, .ckpt, .bin), which may run code and is "
                           "not read; expected safetensors; of Kandinsky a folder as published for diffusers")


def _metadata(f, path):
    metadata = f.metadata() or {}
    if metadata.keys() != {"json"}:
        return metadata
    try:
        metadata = json.loads(metadata["json"])
    except (ValueError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict):
        raise BadInput(f"{path}: expected a JSON object as its metadata: not a file of this project")
    return metadata


def read_state(path):
    """State dict of a .safetensors file, or of a .pt, .pth or .ckpt that holds nothing but tensors."""
    path = Path(path)
    if path.suffix == ".safetensors":
        return load_safetensors(path)[0]
    if not path.is_file():
        raise BadInput(f"{path}: no such file, expected weights (.safetensors or .pth)")
    refuse_pointer(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except pickle.UnpicklingError:  # its message advises to unpickle
        raise BadInput(f"{path}: not a file of tensors only: the rest is not unpickled") from None
    except Exception as error:  # the reader of a damaged file fails in many ways
        raise BadInput(f"{path}: not a file of tensors only ({reason(error):.200})") from None
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise BadInput(f"{path}: expected a state dict of tensors, got {type(state).__name__}")
    return state


def file_hash(path):
    """SHA-256 of a file, as 64 hex digits; that of a large file is remembered until the file changes."""
    path = Path(path)
    return _remembered_hash(path) if path.stat().st_size >= 1 << 20 else _hash(path)


def folder_hash(folder):
    """text_hash over the names and the hashes of all files below a folder, but hidden files and folders."""
    names = (f.relative_to(folder) for f in Path(folder).rglob("*") if f.is_file())
    names = sorted(name for name in names if not any(part.startswith(".") for part in name.parts))
    if not names:
        raise BadInput(f"{folder}: expected a folder with files of a model")
    return text_hash(*(part for name in names for part in (name, _remembered_hash(Path(folder) / name))))


def _hash(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _remembered_hash(path):
    """_hash, kept in the user's cache beside the file's size and times, so that a checkpoint is read once."""
    path = path.resolve()
    stat = path.stat()
    state = [str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    cache = Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"))
    note = cache / "msdm/hashes" / f"{text_hash(path)}.json"
    with contextlib.suppress(BadInput, OSError):  # nothing is known yet, or the cache cannot be read
        known = read_json(note)
        if known.get("file") == state and isinstance(known.get("sha256"), str):
            return known["sha256"]
    found = _hash(path)
    with contextlib.suppress(OSError):  # a cache that cannot be written is done without
        write_json(note, {"file": state, "sha256": found})
    return found


def text_hash(*texts):
    """SHA-256 over strings, each ended by a zero byte, as 16 hex digits: the key of a cache."""
    h = hashlib.sha256()
    for text in texts:
        h.update(str(text).encode(errors="surrogatepass") + b"\0")  # a file's name need not be UTF-8
    return h.hexdigest()[:16]


def read_cached(path):
    """(tensors, metadata) of a safetensors file; None if it is absent or broken.

    Broken is also a file that holds NaN or infinity: what was made was checked.
    """
    with contextlib.suppress(BadInput):
        tensors, metadata = load_safetensors(path)
        if all(v.isfinite().all() for v in tensors.values()):
            return tensors, metadata
        print(f"{path}: holds values that are not finite, made again", file=sys.stderr)
    return None


def cached(path, make, write=True):
    """read_cached; where there is nothing, what make() returns, which is saved to the file."""
    if found := read_cached(path):
        return found
    tensors, metadata = make()
    # Equal to those of the file, even in their strides.
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    if write:
        save_or_say(path, tensors, metadata)
    return tensors, metadata


def save_or_say(path, tensors, metadata=None):
    """save_safetensors into a cache, which may be read-only or full: then a line says so."""
    try:
        remove_unfinished(Path(path).parent, glob.escape(Path(path).name))
        save_safetensors(path, tensors, metadata)
    except OSError as error:
        print(f"not cached: {path}: {error.strerror}", file=sys.stderr)


class Mapped(torch.Tensor):
    """A tensor that lies in a file: what is indexed is read, and given back to the system before long.

    Without that a process would in time hold as much of a file as fits into memory.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # what is computed from it is a plain tensor
    HELD = 64 << 20  # bytes that are indexed until memory is given back

    def __getitem__(self, key):
        if self.read > self.HELD:
            _advise(self.mapping, "MADV_DONTNEED")
            self.read = 0
        out = super().__getitem__(key)
        self.read += out.nbytes
        return out


def _advise(mapping, what):
    if hasattr(mapping, "madvise"):  # not on Windows
        mapping.madvise(getattr(mmap, what))


DTYPES = {torch.float16: "F16", torch.float32: "F32"}  # as safetensors names them


CHECKED = 1 << 30


def cached_rows(path, name, parts, make, metadata, world) -> Mapped:
    """The tensor of rows in a safetensors file with this metadata; where there is none, the ranks make it.

    parts: slices that make up the rows, in order; make(some of them) -> iterator of their rows, which are
    written one by one: the whole is never in memory. world: a training.Distributed, all of whose ranks call
    this; each makes a share of the parts. Where the file cannot be written, or the ranks' disks are not one,
    each makes all rows, and an unnamed temporary file holds them as long as its process needs them. As in
    cached a file with NaN or infinity is made again; above CHECKED bytes, which take seconds to read, a
    training finds it by its loss.
    """
    n = parts[-1].stop
    with world.together():
        # Rank 0 alone looks: a network file system remembers for seconds that there was no such file.
        found = world.is_main and _holds_rows(path, name, n, metadata)
        if world.is_main and not found:
            with contextlib.suppress(OSError):  # of a protected folder, as below
                remove_unfinished(path.parent, glob.escape(path.name))
    if world.mean(float(found)) or _make_rows(path, name, parts, make, metadata, world):
        rows = None
        with contextlib.suppress(OSError), open(path, "rb") as f:
            rows = map_rows(f, name)
        if not world.mean(float(rows is None)):  # the file is on the disk of all ranks
            return rows
    with world.together(), tempfile.TemporaryFile() as f:
        write_rows(f, name, n, make(parts), metadata)
        f.flush()
        return map_rows(f, name)


def _holds_rows(path, name, n, metadata):
    """Whether there is such a file, with n rows and this metadata."""
    with contextlib.suppress(BadInput, OSError, KeyError), open(path, "rb") as f:
        if load_metadata(path) == metadata and len(rows := map_rows(f, name)) == n:
            parts = range(0, n if rows.nbytes <= CHECKED else 0, 1024)
            if all(rows[i:i + 1024].isfinite().all() for i in parts):
                return True
            print(f"{path}: holds values that are not finite, made again", file=sys.stderr)
    return False


def _make_rows(path, name, parts, make, metadata, world):
    """Make the file; whether that was possible, the same on all ranks.

    Each rank writes its share into a file of its own, since several processes cannot safely write one on a
    network file system. Rank 0's begins with the header, the others' are appended to it.
    """
    tmp, why = _beside(path), None
    pieces = world.gather(tmp)
    try:
        with world.together():
            own = world.share(parts)
            rows = iter(make(own) if own else ())
            first = list(itertools.islice(rows, 1))  # an error in it leaves not even a folder
            rows = itertools.chain(first, rows)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with open(tmp, "wb") as f:
                    if world.is_main:
                        write_rows(f, name, parts[-1].stop, rows, metadata)
                    else:
                        f.writelines(some.contiguous().numpy().data for some in rows)
            except OSError as error:
                why = error
        if not world.mean(float(why is not None)) and world.is_main:
            try:
                with open(tmp, "ab") as f:
                    for piece in pieces[1:]:
                        with open(piece, "rb") as part:
                            shutil.copyfileobj(part, f, 1 << 24)
                os.replace(tmp, path)
            except OSError as error:
                why = error
        if why is not None:
            print(f"not cached: {path}: {why.strerror}", file=sys.stderr)
        return not world.mean(float(why is not None))
    finally:
        with contextlib.suppress(OSError):
            tmp.unlink()


def write_rows(f, name, n, parts, metadata):
    """Write a safetensors file of one tensor of n rows, which an iterator gives in parts."""
    part = next(parts)
    shape = (n, *part.shape[1:])
    entry = {"dtype": DTYPES[part.dtype], "shape": shape,
             "data_offsets": [0, math.prod(shape) * part.element_size()]}
    header = json.dumps({"__metadata__": {"json": json.dumps(metadata)}, name: entry},
                        separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)  # tensors begin at a multiple of 8 bytes
    f.write(len(header).to_bytes(8, "little") + header)
    for some in itertools.chain([part], parts):
        f.write(some.contiguous().numpy().data)


def map_rows(f, name) -> Mapped:
    """The tensor of this name in an open, whole safetensors file."""
    f.seek(0)
    start = 8 + int.from_bytes(f.read(8), "little")
    entry = json.loads(f.read(start - 8))[name]
    first, last = entry["data_offsets"]
    dtype = {v: k for k, v in DTYPES.items()}[entry["dtype"]]
    mapping = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)  # a writable one must be smaller than memory
    _advise(mapping, "MADV_RANDOM")  # or megabytes around each row would be read with it
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")  # nor is it written to
        values = torch.frombuffer(mapping, dtype=dtype, offset=start + first,
                                  count=(last - first) // dtype.itemsize)
    rows = values.view(entry["shape"]).as_subclass(Mapped)
    rows.mapping, rows.read = mapping, 0
    return rows
