"""Prompts to images: the command. The model is MSDM, Kandinsky 2.2 or Kandinsky 3, with or without adapters.

    python sampler.py --ckpt runs/msdm/best.safetensors --prompt "Generate an image with 2 polyps." -n 8 \
        --grid --out out/msdm
    python sampler.py --ckpt PRIOR_FOLDER --decoder DECODER_FOLDER --prior-lora runs/prior/best \
        --decoder-lora runs/decoder/best --prompts prompts.csv --size 256 --out out/kandinsky22
    python sampler.py --ckpt KANDINSKY_3_FOLDER --lora runs/unet3/best --prompts prompts.csv --size 256 \
        --out out/kandinsky3
"""

import argparse
import csv
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import kandinsky
import lora
import msdm
from command import BadInput, at_least_one, best_device, run_command
from diffusion import SOLVERS
from files import file_hash, folder_hash, read_json, replacing, text_hash, write_json
from weights import fetch

# The model


def load_model(args):
    """(the model of --ckpt with its adapters, the hashes of all files read).

    A file is a checkpoint of msdm.py; a folder, or a name on the hub, is Kandinsky's.
    """
    def refuse(kind, *flags):
        for flag in flags:
            if getattr(args, flag):
                raise BadInput(f"--{flag.replace('_', '-')} is not for {kind}, which --ckpt {args.ckpt} is")

    device = best_device(args.device)
    flags = ("lora", "prior_lora", "decoder_lora")
    hashes = {k: getattr(args, k) and folder_hash(getattr(args, k)) for k in flags}
    if Path(args.ckpt).is_file() or args.ckpt.endswith(".safetensors"):
        refuse("an MSDM checkpoint", "decoder", "prior_lora", "decoder_lora", "size", "dtype", "text_device")
        model = msdm.load(args.ckpt, device)
        if args.lora:
            lora.load(model.unet, args.lora)
        return model, hashes | {"checkpoint": file_hash(args.ckpt)}
    folder, dtype = fetch(args.ckpt), getattr(torch, args.dtype or "float32")
    if (folder / "prior").is_dir():
        refuse("a Kandinsky 2.2 prior", "lora", "text_device")
        if not args.decoder:
            message = "is the prior of Kandinsky 2.2: give its decoder's folder too, by --decoder"
            raise BadInput(f"{args.ckpt} {message}")
        decoder = fetch(args.decoder)
        adapters = args.prior_lora, args.decoder_lora
        model = kandinsky.Kandinsky22.from_pretrained(folder, decoder, *adapters, dtype)
        hashes["decoder"] = folder_hash(decoder)
    elif (folder / "unet").is_dir() and (folder / "text_encoder").is_dir():
        refuse("Kandinsky 3", "decoder", "prior_lora", "decoder_lora")
        model = kandinsky.Kandinsky3.from_pretrained(folder, args.lora, dtype, args.text_device)
    else:
        raise BadInput(f"{args.ckpt}: expected a file of msdm.py, the prior folder of Kandinsky 2.2, or the "
                       "folder of Kandinsky 3")
    return model.to(device), hashes | {"checkpoint": folder_hash(folder)}


# The images


def claim_folder(out, settings, prompts, seed):
    """Write config.json and prompts.csv into a new folder or one of the same settings; else BadInput."""
    config_file = out / "config.json"
    if config_file.exists():
        old = read_json(config_file)
        for k, now in settings.items():
            if old.get(k) != now:
                made = f"holds images made with {k}={old.get(k)!r}, now {k}={now!r}"
                raise BadInput(f"{out}: {made}; give another --out")
    elif out.exists() and any(out.iterdir()):
        raise BadInput(f"{out}: not empty and not made by sampler.py; give another --out")
    write_json(config_file, settings)
    with replacing(out / "prompts.csv") as tmp, open(tmp, "w", newline="", encoding="utf-8") as f:
        rows = csv.writer(f)
        rows.writerow(["Filename", "Prompt", "Seed"])
        rows.writerows([f"{i:06d}.png", p, seed + i] for i, p in enumerate(prompts))


def write_samples(model, prompts, args, request):
    """Write the missing images of the data folder args.out. request: settings of sample_batch."""
    out = Path(args.out)
    files = [out / "images" / f"{i:06d}.png" for i in range(len(prompts))]
    missing = [i for i, f in enumerate(files) if not f.exists()]
    if missing:
        model.prepare([*(prompts[i] for i in missing), args.negative_prompt], cache=out)
    with tqdm(total=len(files), initial=len(files) - len(missing), desc="sampling", unit="image") as bar:
        for part in data.batches(len(missing), args.batch_size):
            indices = missing[part]
            seeds = [args.seed + i for i in indices]
            images = model.sample_batch([prompts[i] for i in indices], seeds, **request)
            for i, image in zip(indices, images.numpy(), strict=True):
                data.write_image(files[i], image.transpose(1, 2, 0))
            bar.update(len(indices))
    if args.grid:
        shown = [np.asarray(data.open_image(f)).transpose(2, 0, 1) for f in files[:64]]
        data.write_grid(out / "grid.png", np.stack(shown))


def parse(argv):
    parser = argparse.ArgumentParser(description="Sample images for prompts.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag("--ckpt", required=True,
         help="checkpoint of msdm.py, published prior folder of Kandinsky 2.2, or folder of Kandinsky 3")
    flag("--decoder", help="folder of the decoder (Kandinsky 2.2)")
    flag("--lora", help="adapter folder (MSDM, Kandinsky 3)")
    flag("--prior-lora", help="adapter folder of the prior (Kandinsky 2.2)")
    flag("--decoder-lora", help="adapter folder of the decoder (Kandinsky 2.2)")
    flag("--lora-scale", type=float, default=1.0, help="strength of the adapters; 0 is the base model")
    flag("--prompt", action="append", help="a prompt; may be given several times")
    flag("--prompts", help="file of prompts: .txt, one a line, or .csv with a Prompt column")
    flag("-n", type=int, default=1, help="images a prompt")
    flag("--seed", type=int, default=0, help="image i has the seed seed + i")
    flag("--steps", type=int,
         help="solver steps, 1 to 1000; None: 150 for MSDM, 50 for Kandinsky 2.2, 25 for Kandinsky 3")
    flag("--solver", choices=sorted(SOLVERS), default="ddpm", help="numerical solver of the reverse process")
    flag("--guidance", type=float,
         help="g of uncond + g (cond - uncond); 1 is off; None: the checkpoint's for MSDM, 4 for Kandinsky")
    flag("--negative-prompt", default="", help="what guidance moves away from")
    flag("--size", type=int, help="side of the images in pixels (Kandinsky); None: 512 for 2.2, 1024 for 3")
    flag("--batch-size", type=int, default=16, help="images at a time; does not change them")
    flag("--device", default="auto", help="cpu, cuda, or auto")
    flag("--dtype", choices=("float32", "bfloat16", "float16"),
         help="of the weights (Kandinsky); None: float32")
    flag("--text-device", help="device of the text encoder (Kandinsky 3); None: --device")
    flag("--grid", action=argparse.BooleanOptionalAction, default=False,
         help="write a grid of the first 64 images too, grid.png")
    flag("--out", required=True, help="data folder to write; run again, only missing images are made")
    args = parser.parse_args(argv)
    at_least_one(args, "n", "batch_size", "steps", "size")
    return args


def main(argv=None):
    args = parse(argv)
    prompts = [*(args.prompt or []), *(data.read_prompts(args.prompts) if args.prompts else [])]
    if not prompts:
        raise BadInput("give --prompt TEXT or --prompts FILE")
    prompts = [p for p in prompts for _ in range(args.n)]
    model, hashes = load_model(args)
    given = {"steps": args.steps, "guidance": args.guidance, "height": args.size, "width": args.size}
    request = {k: v if given[k] is None else given[k] for k, v in model.defaults.items()}
    request |= {"solver": args.solver, "negative_prompt": args.negative_prompt}
    if request["steps"] > model.T:
        raise BadInput(f"--steps {request['steps']}: the checkpoint's schedule has {model.T} times")
    for network in model.networks:
        lora.set_scale(network, args.lora_scale)
    adapted = any(lora.layers(network) for network in model.networks)
    is_kandinsky = "height" in request
    settings = hashes | {
        "prompts": text_hash(*prompts), "steps": request["steps"], "solver": args.solver,
        "guidance": request["guidance"], "negative_prompt": args.negative_prompt, "seed": args.seed,
        "size": request.get("height"), "dtype": args.dtype or ("float32" if is_kandinsky else None),
        "lora_scale": args.lora_scale if adapted else None}
    claim_folder(Path(args.out), settings, prompts, args.seed)
    write_samples(model, prompts, args, request)


if __name__ == "__main__":
    run_command(main)
