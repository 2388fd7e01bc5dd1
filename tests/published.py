"""The published folders of Kandinsky as they lie on your disk, held against docs/kandinsky.md.

Loads every network of each folder, compares its number of parameters with the table of that page, and draws
an image of 2.2 (its prior and its decoder) and of 3, whose hash two machines can compare. Exit status 1: a
number of parameters is another one.

    python tests/published.py PRIOR_FOLDER DECODER_FOLDER
    python tests/published.py KANDINSKY_3_FOLDER --out out/published
"""

import argparse
import hashlib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from command import BadInput, at_least_one, best_device, check_range, fast_dtype, run_command  # noqa: E402

import torch  # noqa: E402 - the project's root is not on the path of a script in tests/
from transformers import (  # noqa: E402
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
    T5EncoderModel,
)

import data  # noqa: E402
from encoders import load_transformer  # noqa: E402
from kandinsky import Kandinsky3, Kandinsky22, check_size  # noqa: E402
from kandinsky_networks import load_decoder, load_prior, load_unet3  # noqa: E402
from movq import load_movq  # noqa: E402
from weights import fetch, kind_of, prior_part  # noqa: E402

PROMPT = "Generate an image with 1 polyp."


def transformer(cls):
    return lambda folder, dtype: load_transformer(cls, folder, dtype)


LOADERS = {  # name of the folder in the table: the part's name there, its subfolder, its loader
    "kandinsky-2-2-prior": (("prior", "prior", load_prior),
                            ("text encoder", "text_encoder", transformer(CLIPTextModelWithProjection)),
                            ("image encoder", "image_encoder", transformer(CLIPVisionModelWithProjection))),
    "kandinsky-2-2-decoder": (("decoder U-Net", "unet", load_decoder),
                              ("MoVQ", "movq", lambda folder, _: load_movq(folder))),
    "kandinsky-3": (("text encoder", "text_encoder", transformer(T5EncoderModel)),
                    ("U-Net", "unet", load_unet3), ("MoVQ", "movq", lambda folder, _: load_movq(folder))),
}


def documented():
    """{(folder's name, part): number of parameters as text} of the table in docs/kandinsky.md."""
    found, name = {}, None
    for line in (ROOT / "docs/kandinsky.md").read_text(encoding="utf-8").splitlines():
        row = re.fullmatch(r"\| (?:`kandinsky-community/(\S+)`)? ?\| ([^|]+?) \| ([\d.,]+(?: B)?) \|.*", line)
        if row:
            name = row[1] or name
            found[name, re.split(r",| \(", row[2])[0]] = row[3]
    return found


TABLES = {"prior": ("kandinsky-2-2-prior",), "decoder": ("kandinsky-2-2-decoder",), "3": ("kandinsky-3",),
          "combined": ("kandinsky-2-2-prior", "kandinsky-2-2-decoder")}  # by what a folder holds


def compare(folder, kind, dtype):
    """Print a line for each network of a folder; whether all have the documented number of parameters."""
    same, expected = True, documented()
    for part, name, load in LOADERS[kind]:
        place = prior_part(folder, name) if kind == "kandinsky-2-2-prior" else folder / name
        n, said = sum(p.numel() for p in load(place, dtype).parameters()), expected[kind, part]
        found = f"{n / 1e9:.2f} B" if said.endswith("B") else f"{n:,}"
        print(f"{folder}: {part}: {n:,} parameters, docs/kandinsky.md has {said}"
              + (": the same" if found == said else ": ANOTHER NUMBER"))
        same &= found == said
    return same


def draw(name, pipeline, args, device):
    """Draw an image of the pipeline and print its hash, with everything that it depends on."""
    settings = pipeline.defaults | {k: v for k, v in (("height", args.size), ("width", args.size),
                                                      ("steps", args.steps)) if v}
    image = pipeline.offload(device).sample([PROMPT], seed=args.seed, **settings)
    said = ", ".join(f"{k} {v}" for k, v in settings.items())
    digest = hashlib.sha256(image.numpy().tobytes()).hexdigest()
    print(f"image of {name} for {PROMPT!r}: seed {args.seed}, {said}, {args.dtype} on "
          f"{torch.cuda.get_device_name(device) if device.type == 'cuda' else device}, "
          f"torch {torch.__version__}, mean {image.float().mean():.2f} of 255: sha256 {digest}")
    if args.out:
        data.write_image(Path(args.out) / f"{name}.png", image[0].permute(1, 2, 0).numpy())


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag("folders", nargs="+", help="published folders, or their names on the hub")
    flag("--seed", type=int, default=0, help="of the images")
    flag("--steps", type=int, help="solver steps; None: 50 for 2.2, 25 for 3")
    flag("--size", type=int, help="side of the images in pixels; None: 512 for 2.2, 1024 for 3")
    flag("--device", default="auto", help="cpu, cuda, or auto")
    flag("--dtype", choices=("float32", "bfloat16", "float16"), help="None: bfloat16 on a GPU that has it")
    flag("--out", help="folder for the images as PNG files")
    args = parser.parse_args(argv)
    at_least_one(args, "steps", "size")
    check_range(args, -2**63, 2**64 - 1, "seed")
    device = best_device(args.device)
    args.dtype = args.dtype or str(fast_dtype(device)).removeprefix("torch.")
    dtype = getattr(torch, args.dtype)
    check_size("--size", args.size, 64)
    folders = [fetch(name, dtype) for name in args.folders]
    tables = [(table, folder) for folder in folders for table in TABLES[kind_of(folder)]]
    kinds = dict(tables)
    if len(kinds) < len(tables):
        raise BadInput(f"{' '.join(args.folders)}: expected at most one folder of each kind")
    same = all([compare(folder, kind, dtype) for kind, folder in kinds.items()])
    pair = [kinds.get(f"kandinsky-2-2-{part}") for part in ("prior", "decoder")]
    if all(pair):
        draw("kandinsky-2-2", Kandinsky22.from_pretrained(*pair, dtype=dtype), args, device)
    elif any(pair):
        print("no image of Kandinsky 2.2: it needs both folders, the prior's and the decoder's")
    if "kandinsky-3" in kinds:
        draw("kandinsky-3", Kandinsky3.from_pretrained(kinds["kandinsky-3"], dtype=dtype), args, device)
    return 0 if same else 1


if __name__ == "__main__":
    run_command(main)
