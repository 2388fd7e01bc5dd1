"""MSDM: text encoder, KL-VAE and U-Net as one text-to-image model; its loss and its training in latents.

DDPM  arXiv:2006.11239  Algorithm 1 and Eq. 14, the training step
LDM   arXiv:2112.10752  Eq. 3, the same in latents and with text
CFG   arXiv:2207.12598  Algorithm 1, text dropped at random
Self-conditioning  arXiv:2208.04202  the estimate of x_0 is fed back, without gradient

    python msdm.py --data data/phantom --vae runs/vae/best.safetensors --out runs/msdm
    python msdm.py --data data/phantom --vae runs/vae/best.safetensors --out runs/msdm --select-every 1000
    python msdm.py --data data/mine --init runs/msdm/best.safetensors --out runs/mine  # fine-tunes the U-Net
"""

from command import BadInput, fast_dtype, run_command, to_device

import argparse
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
import mirrored
import selection
import training
import unet as unets
import vae as vaes
import wording
from captions import CaptionSampler
from diffusion import (
    SOLVERS,
    denoiser,
    from_image,
    guided,
    q_sample,
    sample_in_batches,
    sample_timesteps,
    schedule,
    seeded_noise,
    target,
    timesteps,
    to_x_0,
)
from files import cached_rows, file_hash, load_metadata, load_safetensors, text_hash
from optim import Optimizers
from runfolder import check_savable
from text import (
    FrozenCLIP,
    TextConfig,
    TextTransformer,
    learn_tokenizer,
    load_text_encoder,
    warn_of_cut,
)
from unet import InItsDtype, UNet, UNetConfig
from vae import VAE, VAEConfig, reparameterise
from weights import check_fields, check_format, described_by, listed, load_state

# The model


@dataclass
class Diffusion:
    """What the network predicts, at which noise levels, and for which images: stored in every checkpoint."""

    prediction: str = "eps"  # or "v"
    schedule: str = "scaled_linear"
    beta_start: float = 0.002
    beta_end: float = 0.02
    T: int = 1000
    image_size: int = 256  # pixels
    guidance: float = 4.5  # default of sampling; 1 is off

    def __post_init__(self):
        check_fields(self)
        if self.prediction not in ("eps", "v"):
            raise BadInput(f"Diffusion: prediction={self.prediction!r:.100}, expected eps or v")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise BadInput(f"Diffusion: beta_start={self.beta_start}, beta_end={self.beta_end}, expected "
                           "0 < beta_start <= beta_end < 1")

    def alpha_bar(self):
        return schedule(self.schedule, self.T, self.beta_start, self.beta_end)


class MSDM(nn.Module):
    """Text encoder, U-Net and VAE. sample(prompts) -> uint8 (b, 3, h, w)."""

    def __init__(self, unet, vae, text, diffusion, preset="paper"):
        super().__init__()
        self.unet, self.vae, self.text, self.diffusion, self.preset = unet, vae, text, diffusion, preset

    @property
    def device(self):
        return self.unet.conv_in.weight.device

    @property
    def T(self):
        return self.diffusion.T

    @property
    def defaults(self):
        """Default settings of sample_batch."""
        return {"steps": 150, "guidance": self.diffusion.guidance}

    @property
    def networks(self):
        """The networks that adapters can be attached to."""
        return [self.unet]

    def latent_shape(self):
        side = self.diffusion.image_size // self.vae.factor
        return (self.vae.config.latent_channels, side, side)

    def prepare(self, prompts, cache=None):
        """Warns of prompts that the text encoder cuts; they are encoded with each batch."""
        warn_of_cut(self.text, prompts)

    @torch.inference_mode()
    def encode_image(self, img):
        """The z_init (1, c, h, w) of an RGB image: its mean latent, padded to a square as in training."""
        pixels = torch.from_numpy(data.preprocess(img, self.diffusion.image_size)).permute(2, 0, 1)
        return self.vae.encode(data.to_float(pixels[None].to(self.device)))

    def denoiser(self, prompts, guidance, negative_prompt=""):
        """denoise(x_t, t) -> (x_0, None) for a solver, on one batch of latents with a prompt for each."""
        b = len(prompts)
        states, mask = self.text([*prompts, negative_prompt])  # (b + 1, n, d), (b + 1, n)
        cond, null = (states[:b], mask[:b]), (states[b:].expand(b, -1, -1), mask[b:].expand(b, -1))
        predict = guided(InItsDtype(self.unet), cond, null, guidance)
        return denoiser(predict, self.diffusion.alpha_bar(), self.diffusion.prediction,
                        self_conditioning=self.unet.config.self_conditioning)

    def sample(self, prompts, seed=0, steps=150, solver="ddpm", guidance=None, negative_prompt="",
               batch_size=16, z_init=None, strength=1.0):
        """uint8 (len(prompts), 3, h, w). Image i depends on its prompt and seed + i, not on the batch size.

        guidance None: the checkpoint's own. Image to image: the solver begins at z_init, of encode_image.
        strength 0 gives its reconstruction by the VAE, 1 the plain sample, in which z_init plays no part.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        guidance = self.diffusion.guidance if guidance is None else guidance
        self.prepare([*prompts, negative_prompt])
        return sample_in_batches(self.sample_batch, prompts, seed, batch_size, steps=steps, solver=solver,
                                 guidance=guidance, negative_prompt=negative_prompt, z_init=z_init,
                                 strength=strength)

    @torch.inference_mode()
    def sample_batch(self, prompts, seeds, steps, solver, guidance, negative_prompt="", z_init=None,
                     strength=1.0):
        """uint8 (b, 3, h, w) of one batch: a prompt and a seed for each image."""
        denoise, draw = self.denoiser(prompts, guidance, negative_prompt), seeded_noise(seeds)

        def noise():
            return to_device(draw(len(prompts), *self.latent_shape()), self.device)

        alpha_bar = self.diffusion.alpha_bar()
        x_t, times = from_image(z_init, strength, timesteps(self.T, steps), alpha_bar, noise())
        z = SOLVERS[solver](denoise, x_t, alpha_bar, times, noise)
        return torch.cat([data.to_uint8(self.vae.decode(part)) for part in z.split(16)])  # bounds the memory

    def tensors(self):
        """The tensors of a checkpoint, without a public text encoder, which the metadata names."""
        own = self.state_dict()
        return own if self.text.in_checkpoint else {k: v for k, v in own.items() if not k.startswith("text.")}

    def metadata(self):
        """Metadata of a checkpoint: everything that rebuilds the model around its tensors."""
        return {"kind": "msdm", "format": FORMAT, "preset": self.preset, "unet": asdict(self.unet.config),
                "vae": asdict(self.vae.config), "text": self.text.metadata(),
                "diffusion": asdict(self.diffusion)}


FORMAT = 2  # of the files that this code writes
KIND = "MSDM"  # what a run is called


def load_meta(path):
    """The metadata of a checkpoint, read without its tensors; BadInput unless they describe a model."""
    meta = load_metadata(path)
    check_format(path, meta, "msdm", FORMAT,
                 "train it anew with msdm.py, or import released weights again with release.py")
    with described_by(path):
        configs(meta)
        if meta["preset"] not in TRAINING:
            raise BadInput(f"preset={meta['preset']!r:.100}, expected one of {', '.join(TRAINING)}")
    return meta


def checkpoint_in(folder):
    """The checkpoint that a folder holds, as a repository of the hub does; None if it holds none.

    BadInput for several.
    """
    files = [f for f in sorted(Path(folder).glob("*.safetensors")) if load_metadata(f).get("kind") == "msdm"]
    if len(files) > 1:
        raise BadInput(f"{folder}: holds {len(files)} checkpoints of msdm.py; give the file of one of them: "
                       f"{', '.join(f.name for f in files)}")
    return files[0] if files else None


def configs(meta):
    """(UNetConfig, VAEConfig, TextConfig or None, Diffusion) of a checkpoint's metadata; they fit."""
    unet, vae = UNetConfig(**meta["unet"]), VAEConfig(**meta["vae"])
    text = TextConfig(**meta["text"]["train"]) if "train" in meta["text"] else None
    diffusion = Diffusion(**meta["diffusion"])
    diffusion.alpha_bar()
    if unet.in_channels != vae.latent_channels:
        raise BadInput(f"in_channels={unet.in_channels}, latent_channels={vae.latent_channels}")
    if text and unet.text_dim != text.dim:
        raise BadInput(f"text_dim={unet.text_dim}, the text encoder has {text.dim}")
    if diffusion.image_size % (multiple := 2 ** (len(vae.channels) + len(unet.channels) - 3)):
        raise BadInput(f"image_size={diffusion.image_size}, expected a multiple of {multiple}")
    if not text and not (isinstance(meta["text"]["name"], str) and type(meta["text"]["length"]) is int
                         and meta["text"]["length"] > 0):
        raise BadInput("text: expected the name of a text encoder and a number of tokens")
    return unet, vae, text, diffusion


def load(path, device="cpu", text_encoder=None) -> MSDM:
    """The model of a checkpoint, frozen and ready to sample.

    text_encoder: folder or name of the frozen text encoder that the checkpoint names, if it lies elsewhere
    now. BadInput if it is not the one that the model was trained with.
    """
    meta = load_meta(path)
    tensors, _ = load_safetensors(path)

    def part(prefix):
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    with described_by(path), torch.device("meta"):
        unet, vae, text, diffusion = configs(meta)
        unet, vae, text = UNet(unet), VAE(vae), text and TextTransformer(text)
    parts = ("unet.", "vae.") if text is None else ("unet.", "vae.", "text.")
    if others := [k for k in tensors if not k.startswith(parts)]:
        raise BadInput(f"{path}: tensors of no part of the model: {listed(others, 5)}; expected names that "
                       f"begin with {', '.join(parts)}")
    load_state(unet, part("unet."), path)
    load_state(vae, part("vae."), path)
    if text is None:
        text = load_text_encoder(path, meta["text"], text_encoder)
    elif text_encoder:
        raise BadInput(f"--text-encoder {text_encoder}: {path} holds a text encoder of its own")
    else:
        load_state(text, part("text."), path)
    model = MSDM(unet, vae, text, diffusion, meta["preset"])
    model.unet.base = {"name": Path(path).name, "hash": file_hash(path)}  # what an adapter belongs to
    return model.to(device).eval().requires_grad_(False)


# Training: presets and data


DIFFUSION = {
    "paper": Diffusion(),
    "tiny": Diffusion("v", "linear", 0.0001, 0.02, image_size=64, guidance=2.5),
}
DIFFUSION["demo"] = DIFFUSION["tiny"]
TRAINING = {  # values of the flags that are not given, by preset
    "paper": {"size": 256, "text_encoder": "openai/clip-vit-large-patch14", "loss": "l1", "steps": 100_000,
              "batch_size": 64, "lr": 1e-4, "muon_lr": 0.0, "warmup": 0, "cosine": False, "ema_decay": 0.9999,
              "jitter": 0.4, "views": 8, "join": 1, "logit_normal": None, "p_uncond": 0.2,
              "p_self_cond": 0.5},
    "tiny": {"size": 64, "text_encoder": "train", "loss": "l2", "steps": 1400,
             "batch_size": 16, "lr": 1e-3, "muon_lr": 3e-3, "warmup": 100, "cosine": True, "ema_decay": 0.999,
             "jitter": 0.0, "views": 1, "join": 8, "logit_normal": (0.2, 0.9), "p_uncond": 0.1,
             "p_self_cond": 0.5},
}
TRAINING["demo"] = TRAINING["tiny"] | {"steps": 450, "warmup": 20, "ema_decay": 0.99}
OF_THE_UNET = ("self_conditioning", "dropout")  # flags of its config
for name, settings in TRAINING.items():
    settings |= {k: getattr(unets.PRESETS[name], k) for k in OF_THE_UNET}


def encode_latents(vae, images, parts, jitter, views, seed, device):
    """Latent mean and log-variance of each image's `views` jittered copies, for one of the parts at a time:
    (b, views, 2 c, h, w) float16. images: data.Images; parts: slices of them that follow each other."""
    for part in parts:
        pixels, out = images[part], []
        images.begin(range(part.stop, min(part.stop + 32, parts[-1].stop)))
        for view in range(views):
            g = torch.Generator().manual_seed(training.step_seed("view", seed, part.start, view))
            img = data.to_float(pixels)
            if jitter:
                img = data.augment(img, g, jitter)
            with torch.no_grad():
                moments = torch.cat(vae.moments(img.to(device)), dim=1)
            out.append(moments.half().cpu())
        yield torch.stack(out, dim=1)


def latents_of(records, args, vae, sources, folder, world, jitter=0.0, views=1, total=None):
    """(encode_latents of the images of records, the records that could be read), kept in a file of folder.

    The tensor (n, views, 2 c, h, w) is a map of that file, which all ranks make, 32 images at a time.
    sources: hashes that are part of its key, as of the VAE; the images' own is added, captions play no part.
    total: see data.load_images.
    """
    with world.together():
        images = data.Images(records, args.size, args.crop, total=total, keep=False)
        key = text_hash(*sources, data.image_fingerprint(records), args.size, args.crop, jitter, views,
                        args.seed, *(r.name for r in records))

    def make(parts):
        encoded = encode_latents(vae, images, parts, jitter, views, args.seed, world.device)
        quiet = len(images) < 500 or not world.is_main
        for part in tqdm(encoded, "latents", len(parts), unit="batch", disable=quiet):
            check_savable(f"{records[0].path.parent}, encoded by the autoencoder", {"latents": part})
            yield part

    names = {"names": [r.name for r in images.records]}
    file, parts = folder / f"latents-{key}.safetensors", data.batches(len(images), 32)
    return cached_rows(file, "moments", parts, make, names, world), images.records


# Training: the step


def loss_fn(unet, x_0, text, text_mask, t, eps, alpha_bar, diffusion, loss, n_fed=0):
    """DDPM, Algorithm 1: the network's error at x_t, a scalar.

    x_0, eps (b, c, h, w); text (b, n, d); text_mask (b, n); t (b,); alpha_bar (T,); loss "l1" or "l2". The
    estimate of x_0 is fed back in the first n_fed rows, zeros in the others (arXiv:2208.04202).
    """
    a_t = alpha_bar[t].view(-1, 1, 1, 1)
    x_t = q_sample(x_0, a_t, eps)
    estimate = torch.zeros_like(x_0) if unet.config.self_conditioning else None
    if n_fed:
        fed = slice(n_fed)
        with torch.no_grad():  # no gradient through the estimate (Self-conditioning)
            out = unet(x_t[fed], t[fed], text[fed], text_mask[fed])
            estimate[fed] = to_x_0(diffusion.prediction, out.float(), x_t[fed], a_t[fed])
    out = unet(x_t, t, text, text_mask, estimate)
    y = target(diffusion.prediction, x_0, a_t, eps)
    return F.l1_loss(out, y) if loss == "l1" else F.mse_loss(out, y)


class Objective:
    """The random batch of a step, from the latents and captions of a data folder, and its loss.

    entries: of each image, the rows of latents and captions that show it: its own and its mirrored copies'.
    """

    def __init__(self, model, latents, captions, args, entries=None):
        self.model, self.latents, self.captions, self.args = model, latents, captions, args
        self.entries = entries or [[i] for i in range(len(latents))]
        self.network = model.unet  # the U-Net in training mode, perhaps compiled
        self.alpha_bar = model.diffusion.alpha_bar().float().to(model.device)
        self.scale = model.vae.latent_scale.cpu()

    def draw_batch(self, indices, draws):
        """Everything random of a step on the images `indices`, as a Batch of CPU tensors."""
        n, views, *shape = self.latents.shape
        shape[0] //= 2  # mean and log-variance
        rows, view, noise, t, eps, prompts = [], [], [], [], [], []
        for i, g in zip(indices.tolist(), draws, strict=True):
            rows.append(mirrored.draw(self.entries[i], g))
            view.append(torch.randint(views, (), generator=g))
            noise.append(torch.randn(shape, generator=g))
            t.append(sample_timesteps(1, self.model.T, self.args.logit_normal, g))
            eps.append(torch.randn(shape, generator=g))
            prompts += self.captions.draw(torch.tensor(rows[-1:]), g)
        mu, logvar = self.latents[torch.tensor(rows), torch.stack(view)].float().chunk(2, dim=1)
        z = reparameterise(mu, logvar, torch.stack(noise))
        fed = draws.share(self.args.p_self_cond * self.model.unet.config.self_conditioning)
        return training.Batch(x_0=self.scale * z, t=torch.cat(t), eps=torch.stack(eps), fed=fed,
                              **self.captions.fields(prompts))

    def held_out(self, latents, records):
        """Validation batches, by the name of their loss: on first captions and, where there are any, on
        paraphrases of these; mean latents, fixed times and noise, no self-conditioning."""
        x_0 = self.scale * latents[:, 0].float().chunk(2, dim=1)[0]
        t, eps = training.fixed_noise(len(x_0), x_0.shape[1:], self.model.T)
        words, texts = self.captions.words, {"val_loss": [r.prompts[0] for r in records]}
        if words.paraphrases:
            said = [words.held_out(words.ways(p), i) for i, p in enumerate(texts["val_loss"])]
            texts["val_loss_paraphrases"] = said
        return {name: training.Batch(x_0=x_0, t=t, eps=eps, fed=[False] * len(x_0),
                                     **self.captions.fields(prompts)) for name, prompts in texts.items()}

    def on_device(self, batch):
        """A batch, or a part of one, as loss reads it: the rows that are fed back come first."""
        return batch.where_first("fed").to(self.model.device)

    def loss(self, batch):
        """loss_fn of a batch from on_device."""
        m = self.model
        with training.autocast(m.device):
            text, mask = self.captions.encode(batch)
            unet = self.network if m.unet.training else m.unet
            return loss_fn(unet, batch.x_0, text, mask, batch.t, batch.eps, self.alpha_bar, m.diffusion,
                           self.args.loss, sum(batch.fed))


# Training: the run


def new_model(args, vae, text, prompts):
    """An untrained model; if text is None, its text encoder has a tokenizer learnt from the prompts."""
    if text is None:
        text = TextTransformer(TextConfig(*learn_tokenizer(prompts)))
    text_dim = text.config.dim if text.in_checkpoint else text.model.config.hidden_size
    config = replace(unets.PRESETS[args.preset], in_channels=vae.config.latent_channels, text_dim=text_dim,
                     **{k: getattr(args, k) for k in OF_THE_UNET})
    return MSDM(UNet(config), vae, text, replace(DIFFUSION[args.preset], image_size=args.size), args.preset)


def check_size(args, vae):
    multiple = vae.factor * unets.PRESETS[args.preset].factor
    if args.size < 1 or args.size % multiple:
        raise BadInput(f"--size {args.size} is not divisible by {multiple}, "
                       f"the downsampling of {args.vae} times that of the U-Net")


def given_parts(args, device):
    """(model of --init or None, VAE, frozen text encoder or None) that a training starts from."""
    if args.init:
        base = load(args.init, device, None if args.text_encoder == "train" else args.text_encoder)
        return base, base.vae, None
    vae = vaes.load(args.vae, device)
    check_size(args, vae)
    if args.text_encoder == "train":
        return None, vae, None
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    return None, vae, FrozenCLIP(args.text_encoder, dtype=dtype)


def both_latents(train, val, args, vae, source, folder, world):
    """(latents, their records) of the training images, then of those held out; see latents_of."""
    total, sources = sum(not r.mirror for r in train) + len(val), (source,)
    latents = latents_of(train, args, vae, sources, folder, world, args.jitter, args.views, total)
    return *latents, *latents_of(val, args, vae, sources, folder, world, total=total)


def train(args):
    """Train a new U-Net and, unless a public one is named, its text encoder on the latents of a data folder.

    With --init, the U-Net of a checkpoint is trained; its VAE and text encoder stay as they are.
    """
    world = training.start(args.device)
    device = world.device
    with world.together():
        words = wording.read(args)
        space = args.select_every and selection.load_space(args)
        base, vae, frozen = given_parts(args, device)
        source = file_hash(args.init or args.vae)
    train_records, val_records, fingerprint = training.read_data(args, world)
    fingerprint = words.fingerprint(fingerprint)
    with world.together():
        train_records, words = mirrored.with_copies(train_records, args.mirror, args.size, words)
    text = base.text if base else frozen
    settings = training.settings_of(args) | {
        "source": source, "text_weights": text.weights if text and not text.in_checkpoint else "train"}
    run = training.Run(args.out, settings, fingerprint, world, KIND, args.from_run)
    latents, train_records, val_latents, val_records = both_latents(
        train_records, val_records, args, vae, source, run.folder, world)
    torch.manual_seed(training.step_seed("weights", args.seed))
    selects = space and selection.Selection(args, *space, run, world, [*train_records, *val_records])
    prompts = dict.fromkeys(p for r in train_records for p in r.prompts)
    model = base or new_model(args, vae, frozen, [way for p in prompts for way in words.ways(p)]).to(device)
    model.unet.requires_grad_(True).to(memory_format=torch.channels_last)
    params = {k: p for k, p in model.named_parameters() if p.requires_grad}
    opt = Optimizers(params, args.lr, args.muon_lr, adamw_only=("unet.conv_in", "unet.conv_out", "text."))
    ema = training.EMA(params, args.ema_decay)
    captions = CaptionSampler(train_records, val_records, model.text, args.join, args.p_uncond, source,
                              run.folder, world, words)
    objective = Objective(model, latents, captions, args, mirrored.entries(train_records))
    if args.compile:
        objective.network = torch.compile(model.unet, dynamic=False)
    held_out = objective.held_out(val_latents, val_records)

    take_step = training.Step(objective, params, opt, ema, world, args.accumulate)

    def checkpoint(step):
        take_step.settle()
        model.eval()
        with ema.applied():
            losses = training.validate(objective, held_out, args.batch_size, world)
            meta = model.metadata() | {"step": step, "val_loss": losses["val_loss"], "data": fingerprint}
            run.keep(step, save=lambda name: run.save_checkpoint(name, model.tensors(), meta), **losses)
        run.save_progress(step, params, take_step, ema)  # before the samples, which take long
        sample(step)

    def sample(step):
        model.eval()
        if world.is_main and step and not run.sheet(step).exists():
            with ema.applied():
                save_samples(run, step, model, val_records, args)
        model.unet.train()
        if selects and selects.due(step):
            selects(step, model, ema, {"data": fingerprint})

    start = run.restore(params, take_step, ema)
    sample(start)  # where a kill left none
    loop = training.Loop(f"msdm {args.preset}", start, args.steps, world, args.minutes)
    names = [r.name for r in train_records if not r.mirror]
    loop.run(take_step, objective.draw_batch, names, run, args, checkpoint)
    if world.is_main:
        print(f"{run.result()}: validation loss {run.best:.4f}")
        if selects:
            print(selects.best())


def save_samples(run, step, model, val_records, args):
    """Sample sheet: images of held-out prompts, always with the same seeds."""
    prompts = [r.prompts[i % len(r.prompts)] for i, r in enumerate(val_records[:args.shown])]
    if prompts:
        with training.autocast(model.device, fast_dtype(model.device)):  # as sampler.py: never float16
            images = model.sample(prompts, seed=0, steps=args.sample_steps, solver="dpmpp")
        data.write_grid(run.sheet(step), images)


def add_flags(parser, flag):
    """The flags of an Objective and its run; flag: the function that training.add_flags returned."""
    parser.add_argument("--crop", choices=("pad", "random", "center"), default="pad",
                        help="how an image becomes a square")
    flag("jitter", "brightness and contrast change, 0 to 1", type=float)
    flag("views", "copies of an image, each with its own jitter, among the cached latents", type=int)
    wording.add_flags(parser)
    mirrored.add_flag(parser)
    flag("join", "join up to this number of an image's prompts into one caption", type=int)
    flag("p_uncond", "share of captions made empty, for classifier-free guidance", type=float)
    flag("loss", "absolute (l1) or squared (l2) error", choices=("l1", "l2"))
    flag("logit_normal", "mean and deviation of the logit of t / T; without them t is uniform", type=float,
         nargs=2, metavar=("M", "S"))
    flag("p_self_cond", "share of a batch in which the estimate of x_0 is fed back", type=float)
    flag("ema_decay", "decay of the averaged weights", type=float)
    parser.add_argument("--shown", type=int, default=16, help="images in the sample sheet")
    parser.add_argument("--sample-steps", type=int, default=25, help="solver steps of the sample sheet")


def what_init_fixes(args):
    """Settings that --init's checkpoint decides; BadInput if a flag has another value."""
    meta = load_meta(args.init)
    own = {"preset": meta["preset"], "size": meta["diffusion"]["image_size"],
           "text_encoder": meta["text"].get("name", "train")}
    own |= {k: getattr(configs(meta)[0], k) for k in OF_THE_UNET}
    given = getattr(args, "text_encoder", "train")
    if "train" not in (own["text_encoder"], given):  # where the frozen one lies; load checks its hash
        own["text_encoder"] = given
    for name, value in own.items():
        if (given := getattr(args, name, None)) not in (None, value):
            raise BadInput(f"--{name.replace('_', '-')} {given}: {args.init} has {value}")
    return own


def check_flags(args):
    if args.sample_steps > (T := DIFFUSION[args.preset].T):
        raise BadInput(f"--sample-steps {args.sample_steps}: the schedule has {T} times")


def parse(argv):
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                     description="Train MSDM's U-Net in the latents of a trained VAE. "
                                                 "Values in brackets are those of the presets.")
    parser.add_argument("--preset", choices=sorted(TRAINING),
                        help="network and training settings; None: --init's, or tiny")
    parser.add_argument("--vae", help="checkpoint of vae.py")
    parser.add_argument("--init",
                        help="checkpoint of msdm.py to start from instead: its VAE and text encoder are kept")
    flag = training.add_flags(parser, TRAINING)
    flag("size", "side of the images, pixels", type=int)
    flag("text_encoder", "CLIP text model by name or folder, or train")
    flag("muon_lr", "learning rate of Muon for the U-Net's inner weights; 0: AdamW for all", type=float)
    flag("self_conditioning", "let the U-Net read its last estimate of x_0 too",
         action=argparse.BooleanOptionalAction)
    flag("dropout", "share of the U-Net's inner channels that a step leaves out", type=float)
    parser.add_argument("--compile", action="store_true",
                        help="compile the U-Net: minutes before the first step, faster steps on a GPU")
    add_flags(parser, flag)
    selection.add_flags(parser)
    args = parser.parse_args(training.repeated(parser, argv, KIND))
    training.check_flags(args)
    if (args.vae is None) == (args.init is None):
        raise BadInput("give either --vae CHECKPOINT or --init CHECKPOINT")
    own = what_init_fixes(args) if args.init else {}
    args.preset = own.pop("preset", None) or args.preset or "tiny"
    training.fill_defaults(args, TRAINING[args.preset] | own)
    check_flags(args)
    selection.check_flags(args)
    return args


def main(argv=None):
    train(parse(argv))


if __name__ == "__main__":
    run_command(main)
