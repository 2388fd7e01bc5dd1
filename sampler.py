"""Prompts to images: the command. The model is MSDM, Kandinsky 2.2 or Kandinsky 3, with or without adapters.

    python sampler.py --ckpt runs/msdm/best.safetensors --prompt "Generate an image with 2 polyps." -n 8 \
        --grid --out out/msdm
    python sampler.py --ckpt PRIOR_FOLDER --decoder DECODER_FOLDER --prior-lora runs/prior/best \
        --decoder-lora runs/decoder/best --prompts prompts.csv --size 256 --out out/kandinsky22
    python sampler.py --ckpt COMBINED_FOLDER --prompts prompts.csv --out out/kandinsky22  # both in one folder
    python sampler.py --ckpt runs/msdm/best.safetensors --prompt "Generate an image with 1 polyp." -n 20 \
        --init-image polyp.png --strength 0.5 --out out/like-it  # begins at an image instead of noise
    python sampler.py --ckpt KANDINSKY_3_FOLDER --lora runs/unet3/best --prompts prompts.csv --size 256 \
        --out out/kandinsky3
    torchrun --nproc-per-node 2 sampler.py --ckpt runs/msdm/best.safetensors --prompts prompts.csv \
        --out out/msdm  # two GPUs, each with its share of the images
"""

from command import BadInput, at_least_one, check_range, fast_dtype, run_command

import argparse
import math
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import adapters
import data
import kandinsky
import lora
import msdm
import training
from diffusion import SOLVERS
from encoders import clip_preprocessor
from files import (
    create_json,
    file_hash,
    folder_hash,
    read_json,
    refuse_other_rows,
    remove_unfinished,
    text_hash,
    write_csv,
)
from weights import check_kind, fetch, kind_of, prior_part

IMAGES = {"init_image": ("strength", 0.3), "image_prompt": ("image_weight", 1.0)}  # file: its share, default
MOST_IMAGES = 1_000_000  # a request; their names have six digits
MOST_PIXELS = 1 << 16  # of a side
OWN = ("steps", "guidance", "prior_steps", "prior_guidance", "width", "height")  # where a model has defaults

# The model


def dashed(name):
    return "--" + name.replace("_", "-")


def image_hash(path):
    """file_hash of an image; BadInput if it cannot be read."""
    data.open_image(path)
    return file_hash(path)


def find_model(args):
    """(load, hashes) of --ckpt: load() returns the model with its adapters; hashes are of all files it reads.

    A file is a checkpoint of msdm.py; a folder, or a name on the hub, holds one or is Kandinsky's. BadInput
    for flags and folders that do not fit, before a weight is loaded.
    """
    def refuse(kind, *flags):
        for flag in flags:
            if (value := getattr(args, flag)) not in (None, "") and value is not False:  # 0 is a value
                raise BadInput(f"{dashed(flag)} is not for {kind}, which --ckpt {args.ckpt} is")

    device = training.own_device(args.device)
    args.dtype = args.dtype or str(fast_dtype(device)).removeprefix("torch.")
    flags = ("lora", "prior_lora", "decoder_lora")
    for flag in flags:
        setattr(args, flag, getattr(args, flag) and adapters.located(getattr(args, flag)))
    hashes = {k: getattr(args, k) and adapters.adapter_hash(getattr(args, k)) for k in flags}
    for k in IMAGES:
        hashes[k] = image_hash(getattr(args, k)) if getattr(args, k) else None
    if Path(args.ckpt).is_file() or args.ckpt.endswith(".safetensors"):
        return find_msdm(args, args.ckpt, device, hashes, refuse)
    dtype = getattr(torch, args.dtype)
    folder = fetch(args.ckpt, dtype)
    if (file := msdm.checkpoint_in(folder)) is not None:
        return find_msdm(args, file, device, hashes, refuse)
    refuse("a folder of Kandinsky", "text_encoder")
    kind = kind_of(folder)
    if kind == "3":
        refuse("Kandinsky 3", "decoder", "prior_lora", "decoder_lora", "prior_steps", "prior_guidance",
               "image_prompt")
        decoder, cls, more = folder, kandinsky.Kandinsky3, (args.lora, dtype, args.text_device)
    else:
        refuse("Kandinsky 2.2", "lora", "text_device")
        if kind == "decoder":
            message = "is the decoder of Kandinsky 2.2: give it by --decoder, its prior's folder by --ckpt"
            raise BadInput(f"{args.ckpt} {message}")
        if kind == "prior" and not args.decoder:
            message = "is the prior of Kandinsky 2.2: give its decoder's folder too, by --decoder"
            raise BadInput(f"{args.ckpt} {message}")
        decoder, cls = fetch(args.decoder, dtype) if args.decoder else folder, kandinsky.Kandinsky22
        check_kind(decoder, "decoder", "combined")
        more = decoder, args.prior_lora, args.decoder_lora, dtype
        if args.decoder:
            hashes["decoder"] = folder_hash(decoder)
        if args.image_prompt:
            clip_preprocessor(prior_part(folder, "image_processor"))  # before a weight is loaded
    for side in ("size", "width", "height"):
        kandinsky.check_size(dashed(side), getattr(args, side), cls.size_multiple(decoder))
    hashes["checkpoint"] = folder_hash(folder)

    def load():
        pipeline = cls.from_pretrained(folder, *more)
        return pipeline.offload(device) if args.offload else pipeline.to(device)

    return load, hashes


def find_msdm(args, file, device, hashes, refuse):
    """(load, hashes) of a checkpoint of msdm.py."""
    msdm.load_meta(file)
    refuse("an MSDM checkpoint", "decoder", "prior_lora", "decoder_lora", "prior_steps", "prior_guidance",
           "image_prompt", "size", "width", "height", "text_device", "offload")

    def load():
        model = msdm.load(file, device, args.text_encoder)
        if args.lora:
            lora.load(model.unet, args.lora)
        return model

    return load, hashes | {"checkpoint": file_hash(file)}


# The images


def check_folder(out, settings):
    """BadInput for a folder that cannot be written, or holds something else than images of these settings."""
    there = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise BadInput(f"{out}: {there} is not a folder that can be written; give another --out")
    config_file = out / "config.json"
    # Listed before config.json is tried: another sampler, which writes that first, may start meanwhile.
    found = out.exists() and any(not p.name.startswith(".") for p in out.iterdir())
    other = f"{out}: not empty and not made by sampler.py; give another --out"
    if config_file.exists():
        old = as_written_now(read_json(config_file))
        if not {"prompts", "solver"} <= old.keys():
            raise BadInput(other)
        for k, now in settings.items():
            if old.get(k) != now:
                made = f"holds images made with {k}={old.get(k)!r:.100}, now {k}={now!r:.100}"
                raise BadInput(f"{out}: {made}; give another --out")
    elif found:
        raise BadInput(other)


def as_written_now(config):
    """The config.json of a folder with what an earlier version of Kandinsky's sampling did not yet write.

    Images were squares of one size, and the prior of 2.2 took 25 steps. What else is missing was None.
    """
    if "size" not in config:
        return config
    sides = {"width": config["size"], "height": config["size"]}
    return sides | ({"prior_steps": 25} if config.get("decoder") else {}) | config


def claim_folder(out, settings, prompts, seed):
    """Write config.json and prompts.csv into a new folder or one of the same settings; else BadInput.

    Of two samplers at once one writes config.json; the other, if its settings are the same, makes the same
    files.
    """
    check_folder(out, settings)
    if (out / "config.json").exists() or not create_json(out / "config.json", settings):
        check_folder(out, settings)  # by now another sampler may have claimed it
    remove_unfinished(out, "config.json", "prompts.csv", "grid.png", "t5-*.safetensors")
    remove_unfinished(out / "images", "[0-9]*.png")
    own = table(out, prompts, seed)
    refuse_other_rows(*own)
    write_csv(*own)


def table(out, prompts, seed):
    """(file, header, rows) of prompts.csv."""
    return out / "prompts.csv", ("Filename", "Prompt", "Seed"), [
        (f"{i:06d}.png", p, seed + i) for i, p in enumerate(prompts)]


def is_whole(file, expected, sizes):
    """Whether an image is there and its checksums hold; one that is broken is sampled again.

    expected: text chunks; BadInput if a whole image has them with other values: it is another one's copy.
    sizes: {(width, height): file} of the whole ones, to add to.
    """
    try:
        with Image.open(file, formats=("PNG",)) as img:
            found = {k: img.info.get(k) for k in expected}  # before verify, which spends the file
            img.verify()
            size = img.size
    except Exception:  # PIL's decoders raise anything
        return False
    if any(found[k] not in (None, v) for k, v in expected.items()):
        raise BadInput(f"{file}: expected the image of seed {expected['seed']} and its prompt, got one of "
                       f"seed {found['seed']}; it is not overwritten: move it away")
    sizes.setdefault(size, file)
    return True


def expect_one_size(sizes):
    """BadInput for images of several sizes, {(width, height): file}: some were resized where they lie."""
    if len(sizes) > 1:
        (one, file), (other, resized) = list(sizes.items())[:2]
        raise BadInput(f"{resized}: {other[0]} x {other[1]} px, {file.name} has {one[0]} x {one[1]}; images "
                       "of one folder have one size: move those that were resized away")


def image_file(out, i):
    return out / "images" / f"{i:06d}.png"


def write_samples(model, prompts, indices, args, request, hashes, is_main):
    """Write the images of these indices into the data folder args.out. request: settings of sample_batch.

    Every image says in itself that it is synthetic, and of what: prompt, seed, hashes of the weights.
    """
    out = Path(args.out)
    parts = {"init_image": args.strength != 1, "image_prompt": args.image_weight != 0}
    used = {k: v for k, v in hashes.items() if v and parts.get(k, True)}

    def write(i, image):
        text = {"synthetic": "generated by a model, not a photograph", "prompt": prompts[i],
                "seed": str(args.seed + i), **used}
        data.write_image(image_file(out, i), image.transpose(1, 2, 0), text if args.metadata else None)

    if not indices:
        return
    negative = [args.negative_prompt] if args.negative_prompt else []
    model.prepare([*(prompts[i] for i in indices), *negative], cache=out)
    bar = tqdm(total=len(indices), desc="sampling", unit="image", disable=not is_main)
    with bar, ThreadPoolExecutor(4) as writers:  # a batch is written while the next one is computed
        written = ()
        for part in data.batches(len(indices), args.batch_size):
            batch = indices[part]
            seeds = [args.seed + i for i in batch]
            images = model.sample_batch([prompts[i] for i in batch], seeds, **request)
            list(written)  # waits for the batch before, and raises what a writer raised
            written = writers.map(write, batch, images.numpy())
            bar.update(len(batch))
        list(written)


def write_grid(out, n):
    """The first 64 of n images in a sheet."""
    files = [image_file(out, i) for i in range(min(n, 64))]
    shown = [data.open_image(file) for file in files]
    expect_one_size({img.size: file for img, file in zip(shown, files, strict=True)})
    data.write_grid(out / "grid.png", np.stack([np.asarray(img).transpose(2, 0, 1) for img in shown]))


def parse(argv):
    parser = argparse.ArgumentParser(description="Sample images for prompts.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag("--ckpt", required=True,
         help="checkpoint of msdm.py, published folder of Kandinsky 3, of 2.2's prior, or of 2.2's prior and "
         "decoder combined; or the name on the hub of one of these")
    flag("--decoder", help="folder of the decoder (Kandinsky 2.2)")
    flag("--lora", help="adapter (MSDM, Kandinsky 3): a folder of PEFT, a file of diffusers or kohya, or its "
         "name on the hub")
    flag("--prior-lora", help="likewise of the prior (Kandinsky 2.2)")
    flag("--decoder-lora", help="likewise of the decoder (Kandinsky 2.2)")
    flag("--lora-scale", type=float, default=1.0, help="strength of the adapters; 0 is the base model")
    flag("--text-encoder", help="folder of the frozen text encoder that an MSDM checkpoint names, if it lies "
         "elsewhere now")
    flag("--prompt", action="append", help="a prompt; may be given several times")
    flag("--prompts", help="file of prompts: .txt, one a line, or .csv with a Prompt column")
    flag("-n", type=int, default=1, help="images a prompt")
    flag("--seed", type=int, default=0, help="image i has the seed seed + i")
    flag("--steps", type=int,
         help="solver steps, 1 to 1000; None: 150 for MSDM, 50 for Kandinsky 2.2, 25 for Kandinsky 3")
    flag("--solver", choices=sorted(SOLVERS), default="ddpm", help="numerical solver of the reverse process")
    flag("--guidance", type=float,
         help="g of uncond + g (cond - uncond); 1 is off; None: the checkpoint's for MSDM, 4 for Kandinsky")
    flag("--prior-steps", type=int, help="solver steps of the prior (Kandinsky 2.2); None: 25")
    flag("--prior-guidance", type=float,
         help="g of the prior (Kandinsky 2.2); 1 is off; None: that of the decoder, --guidance")
    flag("--negative-prompt", default="", help="what guidance moves away from")
    flag("--init-image", help="image to begin at instead of noise, padded with black to the images' shape")
    flag("--strength", type=float, help="how much of --init-image is made anew, the share of --steps that is "
         "taken: 0 its reconstruction by the autoencoder, 1 as without it; None: 0.3")
    flag("--image-prompt", help="image to draw variations of (Kandinsky 2.2): its embedding stands for "
         "what the prior makes of the prompt, which is only their caption then")
    flag("--image-weight", type=float,
         help="share of --image-prompt in the embedding, 0 to 1; the rest is the prior's; None: 1")
    flag("--size", type=int, help="both sides in pixels (Kandinsky); None: 512 for 2.2, 1024 for 3")
    flag("--width", type=int, help="of the images in pixels (Kandinsky), as --height is; None: --size")
    flag("--height", type=int, help="of the images in pixels (Kandinsky); None: --size")
    flag("--batch-size", type=int, default=16, help="images at a time; does not change them")
    flag("--device", default="auto", help="cpu, cuda, or auto")
    flag("--dtype", choices=("float32", "bfloat16", "float16"),
         help="of the diffusion network's weights; None: bfloat16 on a GPU that has it, else float32")
    flag("--text-device", help="device of the text encoder (Kandinsky 3); None: --device")
    flag("--offload", action=argparse.BooleanOptionalAction, default=False,
         help="keep on the GPU only the network that computes, to need less of its memory (Kandinsky)")
    flag("--grid", action=argparse.BooleanOptionalAction, default=False,
         help="write a grid of the first 64 images too, grid.png")
    flag("--metadata", action=argparse.BooleanOptionalAction, default=True,
         help="say in every PNG that it is synthetic, with its prompt, its seed and the checkpoint's hash")
    flag("--out", required=True, help="data folder to write; run again, only missing images are made")
    args = parser.parse_args(argv)
    check_flags(args)
    return args


def check_flags(args):
    """BadInput for flags that are out of range or lack another; sets the shares of images."""
    at_least_one(args, "n", "batch_size", "steps", "prior_steps", "size", "width", "height")
    check_range(args, -math.inf, math.inf, "guidance", "prior_guidance", "lora_scale")
    check_range(args, -2**63, 2**64 - 1, "seed")
    check_range(args, 0, 1, "strength", "image_weight")
    check_range(args, -math.inf, MOST_PIXELS, "size", "width", "height")
    for image, (share, default) in IMAGES.items():
        if getattr(args, image) and getattr(args, share) is None:
            setattr(args, share, default)
        elif getattr(args, share) is not None and not getattr(args, image):
            raise BadInput(f"{dashed(share)} {getattr(args, share):g}: expected {dashed(image)}, its image")
    if args.image_weight == 1:
        # A negative prompt still asks the prior; it is guided against itself, so that guidance plays no part.
        for k in ("prior_guidance", *(() if args.negative_prompt else ("prior_lora", "prior_steps"))):
            if getattr(args, k) is not None:
                raise BadInput(f"{dashed(k)} plays no part where --image-weight is 1: leave one of them out")
    if args.lora_scale != 1 and not (args.lora or args.prior_lora or args.decoder_lora):
        raise BadInput(f"--lora-scale {args.lora_scale:g}: expected an adapter that it scales, of --lora, "
                       "--prior-lora or --decoder-lora")


def one_line(prompt):
    """The prompt with a space for each line break: a row of prompts.csv is one line."""
    return " ".join(re.split(r"[\r\n]+", prompt.strip("\r\n")))


def read_prompts(args):
    """The prompts of all images; BadInput if there are none, too many, or one that cannot be written."""
    own = [one_line(prompt) for prompt in args.prompt or []]
    prompts = [*own, *(data.read_prompts(args.prompts) if args.prompts else [])]
    if not prompts:
        raise BadInput("give --prompt TEXT or --prompts FILE")
    if not all(prompt.strip() for prompt in prompts):
        raise BadInput("--prompt: an empty text, which no row of prompts.csv may hold; for images of no "
                       "prompt give any, with --guidance 0")
    for prompt in filter(None, (*prompts, args.negative_prompt)):
        if why := data.prompt_fault([prompt]):
            raise BadInput(f"prompt {prompt[:80]!r}: {why}")
    if (total := len(prompts) * args.n) > MOST_IMAGES:
        raise BadInput(f"-n {args.n}: {total} images, expected at most {MOST_IMAGES}, the names' six digits")
    if args.seed + total - 1 >= 2**64:
        raise BadInput(f"--seed {args.seed}: image i has the seed seed + i, which must stay below 2^64")
    return [p for p in prompts for _ in range(args.n)]


def request_of(args, model):
    """The settings of model.sample_batch: the flags, or the model's own; BadInput for what it cannot do."""
    given = {**vars(args), "width": args.width or args.size, "height": args.height or args.size}
    request = {k: v if given[k] is None else given[k] for k, v in model.defaults.items()}
    for k in ("steps", "prior_steps"):
        if request.get(k, 1) > model.T:
            raise BadInput(f"{dashed(k)} {request[k]}: the checkpoint's schedule has {model.T} times")
    if args.negative_prompt and request["guidance"] == 1 and request.get("prior_guidance") in (None, 1):
        raise BadInput("--negative-prompt plays no part where --guidance is 1: leave one of them out")
    if args.strength and int(args.strength * request["steps"]) == 0:
        least = math.ceil(1000 / request["steps"]) / 1000
        raise BadInput(f"--strength {args.strength:g}: less than one of {request['steps']} steps; expected 0 "
                       f"or at least {least}, or more --steps")
    return request | {"solver": args.solver, "negative_prompt": args.negative_prompt}


def image_request(args, model, request):
    """The settings of model.sample_batch that come from images."""
    found = {}
    if args.init_image:
        size = {k: request[k] for k in ("height", "width") if k in request}
        z_init = model.encode_image(data.open_image(args.init_image), **size)
        found |= {"z_init": z_init, "strength": args.strength}
    if args.image_prompt:
        image_embed = model.embed_image(data.open_image(args.image_prompt))
        found |= {"image_embed": image_embed, "image_weight": args.image_weight}
    return found


def main(argv=None):
    args = parse(argv)
    prompts, out = read_prompts(args), Path(args.out)
    settings = {"prompts": text_hash(*prompts), "solver": args.solver,
                "negative_prompt": args.negative_prompt, "seed": args.seed, "strength": args.strength,
                "image_weight": args.image_weight}
    asked = {k: getattr(args, k) for k in OWN if getattr(args, k) is not None}
    check_folder(out, settings | asked)  # before files are hashed, then before weights are loaded
    refuse_other_rows(*table(out, prompts, args.seed))
    world = training.start("cpu")  # gloo, whatever --device is: the processes only wait for each other
    with world.together():
        load, hashes = find_model(args)
        check_folder(out, settings | asked | hashes)
        model = load()
        request = request_of(args, model)
        adapted = any(lora.layers(network) for network in model.networks)
        for network in model.networks:
            lora.set_scale(network, args.lora_scale)
            if args.dtype != "float32":  # the sum of weight and update is rounded once
                lora.bake(network)
                network.to(getattr(torch, args.dtype))
        settings = hashes | settings | {
            **{k: request.get(k) for k in OWN}, "dtype": args.dtype,
            "lora_scale": args.lora_scale if adapted else None}
        request |= image_request(args, model, request)
        if world.is_main:
            claim_folder(out, settings, prompts, args.seed)
        chunks = ({"seed": str(args.seed + i), "prompt": p} for i, p in enumerate(prompts))
        sizes = {}
        missing = [i for i, own in enumerate(chunks) if not is_whole(image_file(out, i), own, sizes)]
        expect_one_size(sizes)
    # All processes have looked by now, so they share out the same list.
    write_samples(model, prompts, world.share(missing), args, request, hashes, world.is_main)
    if args.grid:
        wait(world)
        if world.is_main:
            write_grid(out, len(prompts))


def wait(world):
    """For all processes; BadInput if one has failed, which has said why and left."""
    try:
        world.barrier()
    except RuntimeError:  # of gloo: a connection is closed
        raise BadInput("another process stopped before its images were made; its own line says why") from None


if __name__ == "__main__":
    run_command(main)
