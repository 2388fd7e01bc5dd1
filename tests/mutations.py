"""Damaged and hostile files for tests/fuzz.py: each mutation turns the bytes of a good file into others.

A mutation is a function (rng, data) -> (what was done, bytes), rng of Python's random. Those of a place, as
symbolic links, take (rng, path, box) and change the folder itself.
"""

import io
import json
import math
import os
import pickle
import shutil
import struct
import zipfile
import zlib

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load, save

# Any file


def truncated(rng, data):
    n = rng.randrange(len(data) + 1)
    return f"cut to {n} of {len(data)} bytes", data[:n]


def flipped(rng, data):
    out, n = bytearray(data), rng.choice((1, 4, 64))
    for _ in range(n if data else 0):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return f"{n} bits flipped", bytes(out)


def emptied(rng, data):
    return "empty", b""


def overwritten(rng, data):
    start, n = rng.randrange(len(data) + 1), rng.choice((16, 256, 4096))
    fill = rng.choice((b"\0", b"\xff", b" "))
    return f"{n} x {fill} at byte {start}", data[:start] + fill * n + data[start + n:]


def appended(rng, data):
    return "followed by other bytes", data + rng.choice((data, rng.randbytes(1000), b"\0" * 1000))


def noise(rng, data):
    return "random bytes", rng.randbytes(rng.choice((1, 8, 100, 5000)))


ANY = (truncated, flipped, emptied, overwritten, appended, noise)

# Text

NAMES = ("../sentinel/secret.png", "/etc/passwd", "images/../../sentinel/secret.png", "", ".", "..", "~",
         "a\0b", "$(touch pwned)", "; touch pwned", "x" * 300, "CON", "-rf", "caf\u00e9.png", "\u202egnp.exe",
         "C:\\x.png", "images", "file:///etc/passwd", "*", "\x1b[2J")


def other_encoding(rng, data):
    encoding = rng.choice(("utf-16", "utf-32", "latin-1", "utf-8-sig"))
    return encoding, ("\u00e9" + data.decode("utf-8", "replace")).encode(encoding, "replace")


def lines_changed(rng, data):
    lines = data.splitlines(keepends=True) or [b""]
    kind = rng.choice(("quote", "nul", "long", "blank", "twice", "gone", "ends"))
    i = rng.randrange(len(lines))
    line = lines[i]
    lines[i] = {"quote": b'"' + line, "nul": b"\0" + line, "long": b"x" * 300_000 + line, "blank": b"\n",
                "twice": line + line, "gone": b"", "ends": line.rstrip() + b"\r\r"}[kind]
    return f"line {i + 1}: {kind}", b"".join(lines)


def names_changed(rng, data):
    """A file name or prompt of a line becomes another one."""
    lines, new = data.splitlines(keepends=True) or [b""], rng.choice(NAMES)
    i = rng.randrange(len(lines))
    if lines[i].lstrip().startswith(b"{"):
        row = json.loads(lines[i])
        key = rng.choice(list(row))
        lines[i] = json.dumps(row | {key: new}).encode() + b"\n"
    else:
        fields = lines[i].rstrip().split(b";")
        fields[rng.randrange(len(fields))] = new.encode()
        lines[i] = b";".join(fields) + b"\n"
    return f"line {i + 1}: {new[:40]!r}", b"".join(lines)


def fields_changed(rng, data):
    kind = rng.choice(("more", "fewer", "comma", "tab"))
    lines = data.splitlines(keepends=True) or [b""]
    i = rng.randrange(len(lines))
    lines[i] = {"more": lines[i].rstrip() + b";more\n", "fewer": lines[i].split(b";")[0] + b"\n",
                "comma": lines[i].replace(b";", b","), "tab": lines[i].replace(b";", b"\t")}[kind]
    return f"line {i + 1}: {kind}", b"".join(lines)


def huge_text(rng, data):
    return "20 MB of text", data + rng.choice((b"x", b'"', b";", b"\n")) * 20_000_000


TEXT = (*ANY, other_encoding, lines_changed, names_changed, fields_changed, huge_text)

# JSON

ODD = (None, True, [], {}, "", "x", -1, 0, 1, 3, 0.5, 1e308, math.inf, math.nan, 2**31, 2**63, 2**200, [None],
       {"x": 1}, "../../sentinel", "/etc/passwd", "\ud800", [1, "x"], "0", "NaN", [[]], -1e-9, 10**5)


def deep(rng, data):
    n, kind = 200_000, rng.choice(("[", '{"a":'))
    close = "]" if kind == "[" else "}"
    whole = rng.random() < 0.5
    return f"{kind!r} nested {n} times", ((kind * n + "1" + close * n) if whole else kind * n).encode()


def places(tree, path=()):
    """The path of every value of a JSON tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        if not isinstance(value, str):
            yield from places(value, (*path, key))


def altered_tree(rng, tree):
    """(what was done, the tree with one value replaced, dropped, renamed or added)"""
    every = list(places(tree))[:5000]
    kind = rng.choice(("value",) * 6 + ("whole", "drop", "add", "type"))
    if kind == "whole" or not every:
        new = rng.choice(ODD)
        return f"the whole is {new!r}", new
    path = rng.choice([p for p in every if len(p) <= rng.choice((1, 2, 9))] or every)
    parent = tree
    for key in path[:-1]:
        parent = parent[key]
    where = "/".join(map(str, path))
    if kind == "drop":
        del parent[path[-1]]
        return f"without {where}", tree
    if kind == "add" and isinstance(parent, dict):
        parent[rng.choice(("x", "__class__", "../x", ""))] = rng.choice(ODD)
        return f"more keys beside {where}", tree
    old = parent[path[-1]]
    wrapped = rng.choice((str(old), [old], {"x": old}, -1))
    parent[path[-1]] = wrapped if kind == "type" else rng.choice(ODD)
    return f"{where} is {parent[path[-1]]!r:.60}", tree


def json_changed(rng, data):
    """A JSON file, or a line of .jsonl."""
    lines = data.splitlines(keepends=True) if data.startswith(b'{"file_name"') else [data]
    i = rng.randrange(len(lines))
    if rng.random() < 0.2:
        key = rng.choice(list(json.loads(lines[i])))
        what, again = f"{key} twice", json.dumps({key: rng.choice(ODD)})[1:-1]
        new = lines[i].rstrip().removesuffix(b"}") + f", {again}}}".encode()
    else:
        what, tree = altered_tree(rng, json.loads(lines[i]))
        new = json.dumps(tree).encode()
    return what, b"".join([*lines[:i], new + b"\n", *lines[i + 1:]])


JSON = (*ANY, json_changed, json_changed, json_changed, json_changed, json_changed, deep, other_encoding)

# safetensors


def parts(data):
    n = int.from_bytes(data[:8], "little")
    return json.loads(data[8:8 + n]), data[8 + n:]


def assembled(header, body):
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return len(text).to_bytes(8, "little") + text + body


def header_size(rng, data):
    n = rng.choice((2**63, 2**64 - 1, 2**40, 10**8, 99_999_999, len(data), len(data) - 8, 0, 1))
    return f"header of {n} bytes", n.to_bytes(8, "little") + data[8:]


def header_changed(rng, data):
    header, body = parts(data)
    name = rng.choice([k for k in header if k != "__metadata__"])
    entry, kind = header[name], rng.choice(("dtype", "shape", "offsets", "gone", "renamed", "added", "deep"))
    if kind == "dtype":
        entry["dtype"] = rng.choice(("F16", "BF16", "I64", "BOOL", "F64", "U8", "XX", "F8_E4M3", None, 3))
    elif kind == "shape":
        entry["shape"] = rng.choice(([-1], [2**40, 2**40], [], [0], None, "x", [1, *entry["shape"]], [2**62]))
    elif kind == "offsets":
        entry["data_offsets"] = rng.choice(([0, 0], [-4, 4], [0, 2**60], [4, 0], None, [0], ["a", "b"]))
    elif kind == "gone":
        del header[name]
    elif kind == "renamed":
        header[rng.choice(("x", "", "../x", "__class__", name + ".x"))] = header.pop(name)
    elif kind == "added":
        header["x" * rng.choice((1, 10_000))] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    else:
        return "a header nested deeply", assembled(b"[" * 100_000, body)
    return f"header: {kind} of {name}", assembled(header, body)


def metadata_changed(rng, data):
    """The metadata of a checkpoint written by files.save_safetensors, or those of another one."""
    header, body = parts(data)
    text = header.get("__metadata__", {}).get("json")
    kind = rng.choice(("tree",) * 8 + ("none", "no json", "deep", "twice")) if text else "other"
    what = f"metadata: {kind}"
    if kind == "tree":
        tree = json.loads(text)
        inner = (tree.get("text") or {}).get("train") if isinstance(tree, dict) else None
        if inner and rng.random() < 0.3:
            what, tokenizer = altered_tree(rng, json.loads(inner["tokenizer"]))
            what, inner["tokenizer"] = f"tokenizer: {what}", json.dumps(tokenizer)
        else:
            what, tree = altered_tree(rng, tree)
        header["__metadata__"] = {"json": json.dumps(tree)}
    else:
        header["__metadata__"] = {"none": {}, "no json": {"json": "{x"}, "deep": {"json": "[" * 100_000},
                                  "twice": {"json": "{}", "x": "y"}, "other": {"format": "tf"}}[kind]
    return what, assembled(header, body)


def values_changed(rng, data):
    """Tensors of another dtype or shape, NaN, infinite or huge."""
    tensors = load(data)
    header, _ = parts(data)
    name = rng.choice(list(tensors))
    x, kind = tensors[name], rng.choice(("nan", "inf", "huge", "int", "half", "empty", "larger", "double"))
    if kind in ("nan", "inf", "huge") and x.is_floating_point() and x.numel():
        x = x.clone()
        x.view(-1)[rng.randrange(x.numel())] = {"nan": math.nan, "inf": math.inf, "huge": 1e38}[kind]
    else:
        x = {"int": x.long(), "half": x.half(), "empty": x.flatten()[:0], "double": x.double()}.get(
            kind, torch.zeros(*x.shape, 2))
    return f"{name}: {kind}", save(tensors | {name: x.contiguous()}, header.get("__metadata__"))


SAFETENSORS = (*ANY, header_size, header_changed, header_changed, metadata_changed, metadata_changed,
               metadata_changed, values_changed, values_changed)

# Images


def png(width, height, body=b"", colour=2, depth=8, more=()):
    """A PNG of these declared sides with the given, compressed, data."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(k, d) for k, d in (
        (b"IHDR", header), *more, (b"IDAT", body or zlib.compress(b"\0" * 100)), (b"IEND", b"")))


def bomb(rng, data):
    w, h = rng.choice(((60_000, 60_000), (2**31 - 1, 2**31 - 1), (13_000, 13_000), (1, 170_000_000),
                       (100_000, 1000), (0, 0), (0, 5), (12_000, 14_000)))
    if w == 13_000:  # whole, below the limit of PIL: 40 kB that are 169 million pixels of one byte
        return f"a whole PNG of {w} x {h}", png(w, h, zlib.compress(bytes((w + 1) * h), 9), colour=0)
    return f"a PNG that declares {w} x {h}", png(w, h)


def text_bomb(rng, data):
    return "200 MB of text in a PNG", png(8, 8, zlib.compress(bytes(8 * 25)), more=(
        (b"zTXt", b"x\0\0" + zlib.compress(b"y" * 200_000_000, 1)),))


def other_image(rng, data):
    """The same image in another mode or format, or a strange one."""
    img, out = Image.open(io.BytesIO(data)).convert("RGB"), io.BytesIO()
    kind = rng.choice(("GIF", "BMP", "TIFF", "WEBP", "PPM", "1", "P", "LA", "RGBA", "I;16", "F", "CMYK",
                       "thin", "dot", "EPS", "exif"))
    if kind in ("1", "P", "LA", "RGBA"):
        img.convert(kind).save(out, "PNG")
    elif kind == "I;16":
        Image.fromarray(np.asarray(img)[..., 0].astype(np.uint16) * 257).save(out, "PNG")
    elif kind == "F":
        Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(out, "TIFF")
    elif kind == "CMYK":
        img.convert(kind).save(out, "JPEG")
    elif kind in ("thin", "dot"):
        img.resize((60_000, 1) if kind == "thin" else (1, 1)).save(out, "PNG")
    elif kind == "exif":
        exif = img.getexif()
        exif[0x0112] = rng.choice((0, 6, 9, 255))
        exif[0x013B] = "x" * rng.choice((1, 60_000))
        raw = bytearray(exif.tobytes())
        for _ in range(rng.choice((0, 3))):
            raw[rng.randrange(6, len(raw))] = rng.randrange(256)
        img.save(out, "JPEG", exif=bytes(raw))
    else:
        img.save(out, kind)
    return f"as {kind}", out.getvalue()


def sides_patched(rng, data):
    """A JPEG or PNG whose header declares other sides."""
    side = rng.choice((0, 1, 65_535, 5000))
    if data[:2] == b"\xff\xd8" and (at := data.find(b"\xff\xc0")) > 0:
        return f"declared {side} px", data[:at + 5] + struct.pack(">HH", side, side) + data[at + 9:]
    return f"declared {side} px", png(side, side, zlib.compress(b"\0" * 3000))


IMAGE = (*ANY, truncated, flipped, bomb, bomb, text_bomb, other_image, other_image, sides_patched)

# Files of torch.save, and of numpy


class Payload:
    """What an attacker pickles: reading it would run a command."""

    def __reduce__(self):
        return os.system, ("touch pwned",)


def pickled(rng, data):
    value = rng.choice((Payload(), {"weights": Payload()}, [1, 2], {"x": {1, 2}}))
    if rng.random() < 0.5:
        return "a plain pickle", pickle.dumps(value)
    out = io.BytesIO()
    torch.save(value, out)
    return "torch.save of another object", out.getvalue()


def state_changed(rng, data):
    state, out = torch.load(io.BytesIO(data), weights_only=True), io.BytesIO()
    what = "the whole is a list"
    if not isinstance(state, dict) or rng.random() < 0.1:
        state = [state]
    else:
        key = rng.choice(list(state))
        kind = rng.choice(("gone", "odd", "odd", "inside"))
        if kind == "inside" and isinstance(state[key], dict) and state[key]:
            inner = rng.choice(list(state[key]))
            others = torch.zeros(3, dtype=torch.int64), torch.tensor(math.nan)
            state[key][inner] = rng.choice((*ODD[:11], *others))
            key = f"{key}/{inner}"
        elif kind == "gone":
            del state[key]
        else:
            state[key] = rng.choice((*ODD[:17], torch.zeros(2)))
        what = f"{key}: {kind}"
    torch.save(state, out)
    return what, out.getvalue()


def zip_changed(rng, data):
    out, n = io.BytesIO(), rng.choice((1, 3_000_000))
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist()[:rng.randrange(1, 20)]:
            new.writestr(rng.choice((name, "../" + name)) if n == 1 else name, old.read(name) + b"\0" * n)
    return f"other zip members, + {n} bytes each", out.getvalue()


STATE = (*ANY, pickled, pickled, state_changed, state_changed, state_changed, zip_changed)

# Places


def replaced_by_link(rng, path, box):
    secret = box / "sentinel"
    target = rng.choice((secret / "secret.txt", secret / "secret.png", secret, path, "nowhere", "/dev/null",
                         ".."))
    path.unlink()
    path.symlink_to(target)
    return f"a link to {target}"


def replaced_by_folder(rng, path, box):
    path.unlink()
    path.mkdir()
    return "a folder"


def removed(rng, path, box):
    path.unlink()
    return "not there"


def renamed(rng, path, box):
    """Another name, beside the old one or instead of it."""
    new = os.fsencode(path.parent) + b"/" + rng.choice((
        b"caf\xe9" + os.fsencode(path.suffix), b"a\nb" + os.fsencode(path.suffix), b".hidden.png", b"-x.png",
        b"x" * 240 + b".png", b"a;b.png", b'"q.png', b"\x1b[31m.png", "\u00e9".encode() + b".png"))
    shutil.copy(path, new)
    if rng.random() < 0.5:
        path.unlink()
    return f"a file {new[-30:]!r}"


PLACE = (replaced_by_link, replaced_by_link, replaced_by_folder, removed)
