"""LoRA training of a frozen network: MSDM's U-Net, Kandinsky 2.2's prior and decoder, the U-Net of 3.0.

LoRA     arXiv:2106.09685            (lora.py)
CFG      arXiv:2207.12598  Algorithm 1, conditions dropped at random
min-SNR  arXiv:2303.09556  Sec. 3.4  loss weights

One loop trains all four. Kandinsky's frozen encoders run once, before it; their output is kept in files. Two
more commands convert adapters between formats (adapters.py) and merge them into published folders.

    python finetune.py msdm --model runs/msdm/best.safetensors --data data/mine --out runs/adapter
    python finetune.py prior --model PRIOR_FOLDER --data data/mine --out runs/prior
    python finetune.py decoder --model DECODER_FOLDER --prior PRIOR_FOLDER --data data/mine --out runs/decoder
    python finetune.py unet3 --model KANDINSKY_3_FOLDER --data data/mine --out runs/unet3
    python finetune.py convert runs/decoder/best decoder.safetensors --to diffusers
    python finetune.py merge --model DECODER_FOLDER --lora runs/decoder/best --out runs/merged
"""

from command import BadInput, run_command, training_dtype

import argparse
import math
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import adapters
import data
import lora
import mirrored
import msdm
import training
import wording
from captions import CaptionSampler
from diffusion import min_snr_weight, q_sample, target
from encoded import EncoderCache, Sheets, decoder_data, load_autoencoder, prior_data, unet3_data
from files import (
    file_hash,
    folder_hash,
    load_safetensors,
    making,
    read_json,
    refuse_pointer,
    save_safetensors,
)
from kandinsky import read_schedule
from kandinsky_networks import find_network, load_decoder, load_prior, load_unet3
from optim import Optimizers
from runfolder import check_savable, read_run
from unet import UNet, dtype_of
from weights import check_kind, described_by, fetch, prior_part, read_checkpoint


@dataclass
class Task:
    """A network with an adapter, its objective and its validation batch."""

    network: nn.Module
    objective: object  # draw_batch(indices, draws) -> Batch, loss(on_device(part of it)) -> scalar
    held_out: dict  # validation batches, by the name of their loss
    names: list  # of the training images; draw_batch takes indices below their number
    dtype: torch.dtype | None = None  # that the objective computes in; None: training.autocast's
    save_samples: object = None  # save_samples(step), if images are to be sampled and the networks are there


# MSDM's U-Net


def msdm_task(args, world):
    """(run, task) for a checkpoint of msdm.py; latents and captions are prepared as in its own training."""
    with world.together():
        words = wording.read(args)
        model = msdm.load(args.model, world.device, args.text_encoder)
        inject(model.unet, args)
        source = file_hash(args.model)
    train, val, fingerprint = training.read_data(args, world)
    run = start_run(args, world, words.fingerprint(fingerprint), model.unet, weights=source)
    with world.together():
        train, words = mirrored.with_copies(train, args.mirror, args.size, words)
    folder = Path(args.cache or run.folder)
    latents, train, val_latents, val = msdm.both_latents(train, val, args, model.vae, source, folder, world)
    model.unet.to(memory_format=torch.channels_last)
    captions = CaptionSampler(train, val, model.text, args.join, args.p_uncond, source, folder, world,
                              words)
    objective = msdm.Objective(model, latents, captions, args, mirrored.entries(train))
    names = [r.name for r in train if not r.mirror]
    return run, Task(model.unet, objective, objective.held_out(val_latents, val), names,
                     save_samples=lambda step: msdm.save_samples(run, step, model, val, args))


# Kandinsky: the step


def loss_fn(network, x_0, condition, t, eps, alpha_bar, prediction, gamma):
    """DDPM, Algorithm 1, for a network that predicts eps, x_0 or v, with min-SNR weights: a scalar.

    x_0 and eps (b, ...), t (b,), alpha_bar (T,); gamma 0 weights all times alike.
    """
    a_t = alpha_bar[t].view(-1, *[1] * (x_0.ndim - 1))
    x_t = q_sample(x_0, a_t, eps)
    out = network(x_t.to(dtype_of(network)), t, *condition).float()
    out = out[:, :x_0.shape[1]]  # the decoder's variance, after its eps, is not trained
    error = (out - target(prediction, x_0, a_t, eps)).square().flatten(1).mean(dim=1)  # (b,)
    if gamma:
        error = error * min_snr_weight(prediction, a_t.view(-1), gamma)
    return error.mean()


class Objective:
    """Draws the batches of encoded data and computes their loss. images: indices of the training images;
    entries: of each image, the rows of the data that show it, its own and its mirrored copies'."""

    def __init__(self, network, encoded, images, schedule, args, device, dtype, entries=None):
        self.network, self.encoded, self.images, self.args = network, encoded, images, args
        self.entries = entries or [[i] for i in range(len(encoded.x_0))]
        self.device, self.dtype, self.prediction = device, dtype, schedule.prediction
        self.computes_in = torch.float16 if dtype == torch.float16 else None  # None: training.autocast's
        self.alpha_bar = schedule.alpha_bar.float().to(device)

    def draw_batch(self, indices, draws):
        """Everything random of a step: times, noise, and the condition of each image."""
        images, t, eps, rows = [], [], [], []
        for image, g in zip(self.images[indices].tolist(), draws, strict=True):
            images.append(mirrored.draw(self.entries[image], g))
            t.append(torch.randint(len(self.alpha_bar), (), generator=g))
            eps.append(torch.randn(self.encoded.x_0.shape[1:], generator=g))
            rows.append(self.encoded.draw(torch.tensor(images[-1:]), self.args.p_uncond, g))
        return training.Batch(images=torch.tensor(images), t=torch.stack(t), eps=torch.stack(eps),
                              rows=torch.cat(rows))

    def held_out(self, images):
        """Validation batches, by the name of their loss: each image with its first condition and, where
        there are any, with a paraphrase of that; at fixed times and noise."""
        t, eps = training.fixed_noise(len(images), self.encoded.x_0.shape[1:], len(self.alpha_bar))
        rows, ways = {"val_loss": [self.encoded.rows[i][0] for i in images.tolist()]}, self.encoded.ways
        if ways:
            said = [self.encoded.words.held_out(ways[row], i) for i, row in enumerate(rows["val_loss"])]
            rows["val_loss_paraphrases"] = said
        return {name: training.Batch(images=images, t=t, eps=eps, rows=torch.tensor(own))
                for name, own in rows.items()}

    def on_device(self, batch):
        """A batch, or a part of one, as loss reads it: latents and conditions themselves, on the device."""
        chosen = [c[batch.rows] for c in self.encoded.conditions]
        conditions = {f"condition_{i}": c.to(self.dtype) if c.is_floating_point() else c
                      for i, c in enumerate(chosen)}
        return training.Batch(x_0=self.encoded.x_0[batch.images], t=batch.t, eps=batch.eps,
                              **conditions).to(self.device)

    def loss(self, batch):
        """loss_fn of a batch from on_device."""
        condition = [v for k, v in vars(batch).items() if k.startswith("condition_")]
        with training.autocast(self.device, self.computes_in):
            return loss_fn(self.network, batch.x_0, condition, batch.t, batch.eps, self.alpha_bar,
                           self.prediction, self.args.min_snr_gamma)


KANDINSKY = {  # kinds of its folder, the network's part, its loader, its training data, what else these read
    "prior": (("prior", "combined"), "prior", load_prior, prior_data,
              ("scheduler", "text_encoder", "tokenizer", "image_encoder", "image_processor")),
    "decoder": (("decoder", "combined"), "unet", load_decoder, decoder_data,
                ("scheduler", "movq", "image_encoder", "image_processor")),
    "unet3": (("3",), "unet", load_unet3, unet3_data, ("scheduler", "movq", "text_encoder", "tokenizer")),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def kandinsky_task(args, world):
    """(run, task) for a network of a published folder."""
    kinds, part, load, encode, others = KANDINSKY[args.network]
    with world.together():
        if not args.init:
            lora.config_of(args)  # bad flags fail before anything is read
        words = wording.read(args)
        dtype = base_dtype(args, world.device)
        folder = fetch(args.model, dtype)
        clip = fetch(args.prior, dtype) if args.network == "decoder" else folder
        check_kind(folder, *kinds)
        if args.network == "decoder":
            check_kind(clip, "prior", "combined")
        own = prior_part if args.network == "prior" else Path
        network, schedule = load(own(folder, part), dtype), read_schedule(own(folder, "scheduler"))
        inject(network, args)
        movq = None if args.network == "prior" else load_autoencoder(folder, network, args.size)
        if args.sample_steps > (T := len(schedule.alpha_bar)):
            raise BadInput(f"--sample-steps {args.sample_steps}: the schedule has {T} times")
        shown = args.shown and world.is_main and (args.network != "prior" or args.decoder)
        sheets = Sheets(args, network, schedule, movq, dtype, world.device) if shown else None
    train, val, fingerprint = training.read_data(args, world)
    with world.together():
        readable, images, val_images = readable_images(train, val, args)
        hashes = {"weights": folder_hash(own(folder, part))}
        for name in others:
            of_clip = name.startswith("image_")
            hashes[f"{name}_hash"] = folder_hash(prior_part(clip, name) if of_clip else own(folder, name))
        if args.epochs:
            args.steps = steps_of(args, sum(len(readable[i].prompts) for i in images.tolist()), world)
    run = start_run(args, world, words.fingerprint(fingerprint), network, dtype=str(dtype), **hashes)
    with world.together():
        learnt = [readable[i] for i in images.tolist()]
        records, words = mirrored.with_copies(learnt, args.mirror, args.size, words)
        records = readable + records[len(learnt):]
    encoders = EncoderCache(records, words, Path(args.cache or run.folder), world, dtype, clip, movq)
    encoded = world.main_first(lambda: encode(args, network, folder, encoders))
    network.to(world.device).gradient_checkpointing = args.gradient_checkpointing
    objective = Objective(network, encoded, images, schedule, args, world.device, dtype,
                          mirrored.entries(records))
    names = [readable[i].name for i in images.tolist()]

    def save_samples(step):
        data.write_grid(run.sheet(step), sheets.draw(encoded, val_images[:args.shown]))

    return run, Task(network, objective, objective.held_out(val_images), names, objective.computes_in,
                     sheets and save_samples)


def base_dtype(args, device):
    """--dtype of the frozen base; auto is that of the run which goes on, or else the device's."""
    if args.dtype != "auto":
        return DTYPES[args.dtype]
    return DTYPES.get(str(own_settings(args.out).get("dtype")).removeprefix("torch."), training_dtype(device))


def steps_of(args, n_rows, world):
    """The steps of --epochs over n_rows pairs of image and prompt; a resumed run keeps its images a step."""
    old = read_run(args.out) or {}
    return math.ceil(args.epochs * n_rows / old.get("images_a_step", args.batch_size * world.size))


def readable_images(train, val, args):
    """(records that can be read, indices of the training images in them, of the held-out ones)."""
    records = data.read_folder(args.data, args.captions)
    readable = data.Images(records, 1).records  # warns of those that are not, and remembers them
    position = {r.name: i for i, r in enumerate(readable)}
    images, val_images = (torch.tensor([position[r.name] for r in side if r.name in position])
                          for side in (train, val))
    if not len(images) or not len(val_images):
        expected = "at least 2, for training and validation"
        raise BadInput(f"{args.data}: {len(readable)} readable images, expected {expected}")
    return readable, images, val_images


# The loop


def inject(network, args):
    """Attach a fresh adapter, or that of --init, whose settings args then hold."""
    if config := begun_with(args):  # its tensors are in the run's state
        print(f"{args.out} goes on without --init {args.init}, which is not there and not needed any more",
              file=sys.stderr)
        lora.inject(network, config)
        lora.set_flags(args, config, args.out)
    elif args.init:
        lora.load(network, args.init)
        lora.set_flags(args, network.lora_config, args.init)
    else:
        torch.manual_seed(training.step_seed("weights", args.seed))
        lora.inject(network, lora.config_of(args))
    n, start = len(lora.layers(network)), f", from {args.init}" if args.init else ""
    print(f"{args.model}: an adapter of rank {args.rank} on {n} layers{start}", file=sys.stderr)


def begun_with(args):
    """The LoRAConfig of the adapter that the run in args.out began with, if it goes on and --init is gone."""
    config = own_settings(args.out).get("init_settings")
    if not args.init or Path(args.init).exists() or not config or not (Path(args.out) / "state.pt").exists():
        return None
    with described_by(Path(args.out) / "config.json"):
        return lora.LoRAConfig(**config)


def own_settings(out):
    """The settings of the run in the folder out; none if there is no run yet."""
    return (read_run(out) or {"settings": {}})["settings"]


def start_run(args, world, fingerprint, network, **more):
    """The run folder args.out of the training of a network; more: settings beside the flags."""
    settings = training.settings_of(args) | {"alpha": lora.config_of(args).alpha} | more
    if begun_with(args):
        settings |= {k: own_settings(args.out)[k] for k in ("init_hash", "init_settings")}
    elif args.init:
        settings["init_hash"] = adapters.adapter_hash(adapters.located(args.init))
        settings["init_settings"] = asdict(network.lora_config)
    return training.Run(args.out, settings, fingerprint, world, f"{KIND} ({args.network})",
                        args.from_run)


def train(args):
    """Train an adapter of args.network; checkpoints and logs go to the run folder args.out."""
    world = training.start(args.device)
    run, task = (msdm_task if args.network == "msdm" else kandinsky_task)(args, world)
    network, objective = task.network, task.objective
    params = lora.tensors(network)
    opt = Optimizers(params, args.lr)
    ema = training.EMA(params, args.ema_decay)

    def validate():
        network.eval()
        losses = training.validate(objective, task.held_out, args.batch_size, world)
        network.train()
        return losses

    def save(name):
        check_savable(run.folder / name, params)
        lora.save(network, run.folder / name)

    # A block that is computed again needs its random state for dropout, which a CUDA graph cannot give.
    record = not (args.lora_dropout and getattr(network, "gradient_checkpointing", False))
    take_step = training.Step(objective, params, opt, ema, world, args.accumulate, record, task.dtype)

    def checkpoint(step):
        take_step.settle()
        with ema.applied():
            run.keep(step, save=save, **validate())
        run.save_progress(step, params, take_step, ema)  # before the samples, which take long
        sample(step)

    def sample(step):
        if world.is_main and task.save_samples and step and not run.sheet(step).exists():
            network.eval()
            with ema.applied():
                task.save_samples(step)
        network.train()

    start = run.restore(params, take_step, ema)
    if not start and not (run.folder / "metrics.jsonl").exists():
        losses = validate()  # of --init, or of a fresh adapter the base's: B = 0
        source = args.init or f"{args.model} without an adapter"
        check_savable(source, {"the validation loss": torch.tensor(losses["val_loss"])})
        run.log(step=0, **losses)
    sample(start)  # where a kill left none
    loop = training.Loop(f"{args.network} adapter", start, args.steps, world, args.minutes)
    loop.run(take_step, objective.draw_batch, task.names, run, args, checkpoint)
    if world.is_main:
        print(f"{run.result()}: validation loss {run.best:.4f}")


# Adapters: other formats, and merged into their model


def convert(args):
    """Write the adapter args.source to args.out in the format args.to."""
    out, is_file = Path(args.out), args.to != "peft"
    if is_file != (out.suffix == ".safetensors"):
        raise BadInput(f"{out}: --to {args.to} writes a {'.safetensors file' if is_file else 'folder'}")
    if os.path.lexists(out):
        raise BadInput(f"{out}: exists already; name another OUT, or remove this one")
    sizes = args.model and sizes_of(args.model, args.source)
    adapter = adapters.read(args.source, sizes)
    adapters.check(adapter, sizes or adapters.own_sizes(adapter), "this network" if sizes else "one network")
    adapters.write(adapter, out, args.to)
    print(f"{out}: an adapter of {len(adapter.layers)} layers")


def sizes_of(model, adapter):
    """{name: (in, out)} of the linear layers that the adapter may belong to; no weight of the model is read.

    model: a checkpoint of msdm.py, or a folder with a network of Kandinsky.
    """
    if Path(model).is_file() or model.endswith(".safetensors"):
        config, build = msdm.configs(msdm.load_meta(model))[0], UNet
    else:
        folder = fetch(model, chosen=lambda names: [n for n in names if n.endswith("config.json")])
        place, build, _ = find_network(folder, adapters.part_of(adapter))
        config = read_json(place / "config.json")
    with torch.device("meta"):
        return lora.linear_sizes(build(config))


def merge(args):
    """Write the published folder args.model to args.out, its network merged with the adapter args.lora."""
    if Path(args.model).is_file():
        raise BadInput(f"--model {args.model}: a file; expected a published folder of Kandinsky. The adapter "
                       "of an MSDM checkpoint is not merged: give it to sampler.py by --lora")
    folder, out = fetch(args.model), Path(args.out)
    if out.resolve().is_relative_to(folder.resolve()):
        raise BadInput(f"--out {out}: lies in the folder of --model; name another one")
    place, _, load = find_network(folder, adapters.part_of(args.lora))
    if place == folder:
        raise BadInput(f"--model {folder}: expected the whole published folder, of which this is one network")
    kept = ".json", ".md", ".txt"  # of the network's folder, whose weights are written anew
    for file in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        unread = file.parent == place and not file.name.endswith((*kept, ".safetensors"))
        if file.is_file() and not hidden and not unread:
            refuse_pointer(file)
    with making(out) as made:
        _, stored = read_checkpoint(place)
        network = load(place, max((x.dtype for x in stored.values()), key=lambda dtype: dtype.itemsize))
        try:
            lora.load(network, args.lora)
        except BadInput as error:
            raise BadInput(f"{error}; tried in {place.name}/ of --model {folder}") from None

        def left_out(at, names):  # hidden files, and all weights of the network
            ends = kept if Path(at) == place else ("",)
            return [n for n in names if n.startswith(".") or not n.endswith(ends)]

        try:
            shutil.copytree(folder, made, ignore=left_out, dirs_exist_ok=True)
        except shutil.Error as error:  # a list of what could not be copied
            source, _, why = error.args[0][0]
            raise BadInput(f"{source}: cannot be copied to {out} ({why})") from None
        for file in tqdm(sorted(place.glob("*.safetensors")), "merging", disable=None):
            found, _ = load_safetensors(file)
            merged = lora.merged_weights(network, found)
            check_savable(f"{file} with {args.lora}", merged)
            save_safetensors(made / place.name / file.name, found | merged, header={"format": "pt"})
    print(f"{out}: {folder} with {args.lora} merged into {len(lora.layers(network))} layers of {place.name}/")


# The command

KIND = "LoRA adapter"  # what a run is called
COMMON = {"steps": 10_000, "lr": 1e-4, "warmup": 0, "cosine": False, "ema_decay": 0.999}
TRAINING = {  # defaults of Kandinsky's flags
    "prior": COMMON | {"batch_size": 32, "p_uncond": 0.1, "size": 512},
    "decoder": COMMON | {"batch_size": 8, "p_uncond": 0.0, "size": 512},
    "unet3": COMMON | {"batch_size": 8, "p_uncond": 0.1, "size": 256},
}
RANKS = {"msdm": 8, "prior": 128, "decoder": 128, "unet3": 128}


def add_kandinsky_flags(parser, flag, network):
    flag("ema_decay", "of the averaged adapter", type=float)
    flag("p_uncond", "share of conditions replaced by the null one", type=float)
    flag("size", "side of the images in pixels", type=int)
    mirrored.add_flag(parser)
    if network == "prior":
        parser.add_argument("--decoder", help="decoder folder of 2.2, which draws the sample images; None: "
                            "there are none")
        parser.add_argument("--decoder-lora", help="adapter folder of that decoder")
    if network == "decoder":
        parser.add_argument("--prior", required=True, help="prior folder of 2.2, for its image encoder")
    if network != "decoder":  # which reads no prompts
        wording.add_flags(parser)
    if network == "unet3":
        parser.add_argument("--text-device", help="device of the text encoder; None: --device")
    parser.add_argument("--min-snr-gamma", type=float, default=5.0,
                        help="bound of the loss weights; 0 weights all times alike")
    parser.add_argument("--epochs", type=float,
                        help="passes over the pairs of image and prompt, as the paper counts, instead of "
                             "--steps: an image with ten prompts is drawn ten times in one")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto",
                        help="of the frozen weights; auto is bfloat16 on a GPU, float16 on one without it, "
                             "float32 on a CPU, or what a resumed run has. Adapters are float32")
    parser.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction,
                        default=network == "unet3",
                        help="recompute activations in the backward pass to save memory")
    parser.add_argument("--shown", type=int, default=4, help="images in the sample sheet of a checkpoint")
    parser.add_argument("--sample-steps", type=int, default=25, help="solver steps of a sample sheet")


def add_adapter_commands(commands):
    text = """Write an adapter in another format. What that cannot say is refused, but for dropout and
        initialisation, which play no part in the result: kohya's names lose them."""
    p = commands.add_parser("convert", help="an adapter in another format", description=text)
    p.add_argument("source", metavar="IN", help="the adapter: a folder of PEFT, a file of diffusers (before "
                   "2024 too) or kohya, or a folder that holds one, or a name on the hub")
    p.add_argument("out", metavar="OUT", help="a new folder for peft; a new .safetensors file for the others")
    p.add_argument("--to", choices=("peft", "diffusers", "kohya"), default="peft", help="the format of OUT")
    p.add_argument("--model", help="folder of the network or its name on the hub, or checkpoint of msdm.py, "
                   "whose sizes are read: needed for an IN of kohya, whose names have underscores for dots")
    text = "Write a published folder with an adapter merged into its network's weights, in their own dtype."
    p = commands.add_parser("merge", help="an adapter merged into its model", description=text)
    p.add_argument("--model", required=True, help="folder of the model, or its name on the hub")
    p.add_argument("--lora", required=True, help="the adapter, in any format that convert reads")
    p.add_argument("--out", required=True, help="the new folder")


def parse(argv):
    parser = argparse.ArgumentParser(
        description="Train a LoRA adapter of one network; convert one; merge one into its model.")
    networks, parsers = parser.add_subparsers(dest="network", required=True), {}
    for network, what, model in (
            ("msdm", "MSDM's U-Net", "checkpoint of msdm.py"),
            ("prior", "the image prior of Kandinsky 2.2", "prior folder of 2.2"),
            ("decoder", "the decoder of Kandinsky 2.2", "decoder folder of 2.2"),
            ("unet3", "the U-Net of Kandinsky 3", "folder of 3.0")):
        text = f"Train an adapter of {what}: OUT/best and OUT/last. Defaults are in brackets."
        p = networks.add_parser(network, help=f"adapter of {what}", description=text,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        named = "" if network == "msdm" else ", or its name on the hub"
        p.add_argument("--model", required=True, help=f"{model}{named}: the frozen base")
        p.add_argument("--cache", help="folder for the encoders' output, which runs may share; None: --out")
        lora.add_flags(p, RANKS[network])
        flag = training.add_flags(p, msdm.TRAINING if network == "msdm" else {network: TRAINING[network]})
        if network == "msdm":
            p.add_argument("--text-encoder",
                           help="where the frozen text encoder that the checkpoint names lies, if elsewhere")
            msdm.add_flags(p, flag)
        else:
            add_kandinsky_flags(p, flag, network)
        parsers[network] = p
    add_adapter_commands(networks)
    words = sys.argv[1:] if argv is None else list(argv)
    if words and words[0] in parsers:
        words = [words[0], *training.repeated(parsers[words[0]], words[1:], KIND)]
    args = parser.parse_args(words)
    if args.network in parsers:
        training.check_flags(args)
        if getattr(args, "epochs", None) is not None and "steps" in args:
            raise BadInput(f"--steps {args.steps}: --epochs {args.epochs:g} says how long; leave one of them "
                           "out")
        if getattr(args, "decoder_lora", None) and not args.decoder:
            raise BadInput("--decoder-lora: expected --decoder FOLDER too, the decoder that it belongs to")
    return args


def main(argv=None):
    args = parse(argv)
    if args.network in ("convert", "merge"):
        return (convert if args.network == "convert" else merge)(args)
    if not args.init:
        training.fill_defaults(args, lora.FLAGS | {"rank": RANKS[args.network]})
    if args.network == "msdm":
        meta = msdm.load_meta(args.model)
        args.preset = meta["preset"]
        own = ("muon_lr", "text_encoder", *msdm.OF_THE_UNET)  # of its training from nothing
        used = {k: v for k, v in msdm.TRAINING[args.preset].items() if k not in own}
        training.fill_defaults(args, used | {"size": meta["diffusion"]["image_size"]})
        msdm.check_flags(args)
    else:
        training.fill_defaults(args, TRAINING[args.network])
    train(args)


if __name__ == "__main__":
    run_command(main)
