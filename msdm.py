"""MSDM: text encoder, KL-VAE and U-Net as one text-to-image model, and how the U-Net is trained in the VAE's latents.

DDPM  arXiv:2006.11239  Algorithm 1 and Eq. 14, the training step
LDM   arXiv:2112.10752  Eq. 3, the same in latents and with text
CFG   arXiv:2207.12598  Algorithm 1, text dropped at random
Self-conditioning  arXiv:2208.04202  Sec. 3.2 and Algorithm 1
CLIP  arXiv:2103.00020  Sec. 2.4, the text transformer
ALiBi arXiv:2108.12409  Sec. 3, nearer words are heard better
SD3   arXiv:2403.03206  Sec. 3.1, logit-normal times

    python msdm.py --data data/phantom --vae runs/vae/best.safetensors --out runs/msdm
    python msdm.py --data data/mine --base runs/msdm/best.safetensors --lora 8 --out runs/adapter
    python msdm.py import --unet FILE --vae FILE --out runs/released.safetensors      # the paper's released weights
"""

import argparse
import sys
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
import lora as loras
import sampler
import training
import unet as unets
import vae as vaes
from unet import UNet, UNetConfig, attention
from vae import VAE, VAEConfig
from weights import (
    BadInput,
    file_hash,
    load_safetensors,
    load_state,
    read_state,
    run_command,
    save_safetensors,
    text_hash,
)

# Text: a small CLIP text transformer that is trained along, or a public frozen one


@dataclass
class TextConfig:
    """A text transformer trained along; its tokenizer is the text of a `tokenizers` JSON file."""

    tokenizer: str
    vocab: int
    length: int = 96
    dim: int = 128
    n_layers: int = 2
    n_heads: int = 4


class TextLayer(nn.Module):
    """Self-attention, then a feed-forward layer, each on a normalised input."""

    def __init__(self, dim, n_heads):
        super().__init__()
        self.n_heads = n_heads
        self.norm_1, self.norm_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x, mask):
        y = self.norm_1(x)
        x = x + self.to_out[0](attention(self.to_q(y), self.to_k(y), self.to_v(y), self.n_heads, mask))
        return x + self.mlp(self.norm_2(x))


def alibi(n, n_heads, device):
    """-|i - j| 2^(-8 h / n_heads) for head h = 1, 2, ...: (1, n_heads, n, n), added to the logits (ALiBi, Sec. 3, both ways)."""
    slope = 2.0 ** (-8 * torch.arange(1, n_heads + 1, device=device) / n_heads)
    place = torch.arange(n, device=device)
    return (-slope[:, None, None] * (place[None] - place[:, None]).abs())[None]


class TextTransformer(nn.Module):
    """Prompts -> (states (b, length, dim), mask (b, length)), true at tokens.

    CLIP's text tower at a small size; it looks both ways, for nothing is generated here. A token knows others by their
    distance and not by their place in the text: several sentences may come in any order, and "upper-left" belongs to the
    noun of its own.
    """

    trained = True

    def __init__(self, config: TextConfig):
        super().__init__()
        from tokenizers import Tokenizer

        self.config = config
        self.tokenizer = Tokenizer.from_str(config.tokenizer)
        self.tokenizer.enable_truncation(config.length)
        self.tokenizer.enable_padding(length=config.length, pad_id=0, pad_token="<pad>")
        self.tokens = nn.Embedding(config.vocab, config.dim)
        self.layers = nn.ModuleList(TextLayer(config.dim, config.n_heads) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, prompts):
        encoded = self.tokenizer.encode_batch(list(prompts))
        device = self.tokens.weight.device
        ids = torch.tensor([e.ids for e in encoded], device=device)
        mask = torch.tensor([e.attention_mask for e in encoded], device=device).bool()
        bias = alibi(self.config.length, self.config.n_heads, device).masked_fill(~mask[:, None, None], -torch.inf)
        x = self.tokens(ids)
        for layer in self.layers:
            x = layer(x, bias)
        return self.norm(x), mask

    def describe(self):
        return {"train": asdict(self.config)}


def learn_tokenizer(prompts, vocab=1024):
    """Byte-level BPE learnt from the training prompts, as (JSON text, vocabulary size). <pad> is 0; <bos> and <eos> go round.

    Words are cut at spaces and marks but not at hyphens: "upper-left" is one token, a place of its own, and not "upper", "-",
    "left", which the text layers would have to put together again. So is a number with its noun, lest "2" alone be heard as of
    polyps and of instruments alike, and ">20mm".
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    tok = Tokenizer(models.BPE())
    tok.normalizer = normalizers.Lowercase()
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"(?:\b(?:no|\d+) |[<>] ?)?[\w-]+|[^\w\s-]"), "removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<bos>", "<eos>"]
    tok.train_from_iterator(sorted(set(prompts)), trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=special, initial_alphabet=alphabet, show_progress=False))
    tok.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[(s, tok.token_to_id(s)) for s in special[1:]])
    return tok.to_str(), tok.get_vocab_size()


class NamedText(nn.Module):
    """A public text encoder that is only named, for a checkpoint that is written without it."""

    trained = False

    def __init__(self, name, length=64):
        super().__init__()
        self.name, self.length = name, length

    def describe(self):
        return {"name": self.name, "length": self.length}


class FrozenCLIP(NamedText):
    """A public CLIP text model by name or folder: last hidden states of prompts padded to 64 tokens, never trained, not copied."""

    def __init__(self, name, length=64, dtype=torch.float32):
        super().__init__(name, length)
        from transformers import AutoTokenizer, CLIPTextModel

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name)
            self.model = CLIPTextModel.from_pretrained(name, dtype=dtype).eval().requires_grad_(False)
        except (OSError, ValueError) as error:
            raise BadInput(f"text encoder {name}: neither a folder with a CLIP text model nor to be had from the hub "
                           f"({str(error).splitlines()[0]}); --text-encoder train learns a small one") from None

    @torch.no_grad()
    def forward(self, prompts):
        tokens = self.tokenizer(list(prompts), padding="max_length", truncation=True, max_length=self.length,
                                return_tensors="pt").to(self.model.device)
        states = self.model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        return states.float(), tokens.attention_mask.bool()


# The model


@dataclass
class Diffusion:
    """What the network predicts, at which noise levels, and for which pictures: stored in every checkpoint."""

    prediction: str = "eps"  # or "v"
    schedule: str = "scaled_linear"
    beta_start: float = 0.002
    beta_end: float = 0.02
    T: int = 1000
    image_size: int = 256

    def alpha_bar(self):
        return sampler.schedule(self.schedule, self.T, self.beta_start, self.beta_end)


class MSDM(nn.Module):
    """Text encoder, U-Net and VAE. sample(prompts) -> uint8 (b, 3, h, w)."""

    def __init__(self, unet, vae, text, diffusion):
        super().__init__()
        self.unet, self.vae, self.text, self.diffusion = unet, vae, text, diffusion

    @property
    def device(self):
        return self.unet.conv_in.weight.device

    @property
    def T(self):
        return self.diffusion.T

    def latent_shape(self):
        side = self.diffusion.image_size // self.vae.factor
        return (self.vae.config.latent_channels, side, side)

    def denoiser(self, prompts, guidance, negative_prompt=""):
        """What a solver asks: denoise(x_t, t) -> (x_0, None) of one batch of latents, a prompt for each."""
        b = len(prompts)
        states, mask = self.text([*prompts, negative_prompt])
        predict = sampler.guided(self.unet, states[:b], mask[:b], states[b:].expand(b, -1, -1), mask[b:].expand(b, -1), guidance)
        return sampler.denoiser(predict, self.diffusion.alpha_bar(), self.diffusion.prediction, self.unet.config.self_conditioning)

    @torch.inference_mode()
    def sample(self, prompts, seed=0, steps=150, solver="ddpm", guidance=4.5, negative_prompt="", batch_size=16):
        """Pictures uint8 (len(prompts), 3, h, w). Picture i depends on its prompt and on seed + i, not on the batch size."""
        if isinstance(prompts, str):
            prompts = [prompts]
        pictures = [self.sample_batch(prompts[i:i + batch_size], range(seed + i, seed + min(i + batch_size, len(prompts))),
                                      steps, solver, guidance, negative_prompt) for i in range(0, len(prompts), batch_size)]
        return torch.cat(pictures)

    @torch.inference_mode()
    def sample_batch(self, prompts, seeds, steps=150, solver="ddpm", guidance=4.5, negative_prompt=""):
        """One batch: a prompt and a seed for each picture."""
        denoise = self.denoiser(prompts, guidance, negative_prompt)
        noise = sampler.seeded_noise(seeds, self.latent_shape(), self.device)
        times = sampler.timesteps(self.diffusion.T, steps)
        z = sampler.SOLVERS[solver](denoise, noise(-1), self.diffusion.alpha_bar(), times, noise)
        return ((self.vae.decode(z) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()

    def tensors(self):
        """Everything a checkpoint holds: a public text encoder is named in the metadata, not copied."""
        return {k: v for k, v in self.state_dict().items() if self.text.trained or not k.startswith("text.")}

    def describe(self):
        return {"kind": "msdm", "unet": asdict(self.unet.config), "vae": asdict(self.vae.config),
                "text": self.text.describe(), "diffusion": asdict(self.diffusion)}


def load(path, device="cpu") -> MSDM:
    """The model of a checkpoint, ready to sample."""
    tensors, meta = load_safetensors(path)
    if meta.get("kind") != "msdm":
        raise BadInput(f"{path}: expected an MSDM checkpoint, got {meta.get('kind', 'a file without a kind')!r}")

    def part(prefix):
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    with torch.device("meta"):
        unet, vae = UNet(UNetConfig(**meta["unet"])), VAE(VAEConfig(**meta["vae"]))
        text = TextTransformer(TextConfig(**meta["text"]["train"])) if "train" in meta["text"] else None
    load_state(unet, part("unet."), path)
    load_state(vae, part("vae."), path)
    if text is None:
        text = FrozenCLIP(meta["text"]["name"], meta["text"]["length"])
    else:
        load_state(text, part("text."), path)
    return MSDM(unet, vae, text, Diffusion(**meta["diffusion"])).to(device).eval().requires_grad_(False)


# The paper's released weights, read into our own networks


def unet_from_release(source) -> UNet:
    """The paper's U-Net from a file or a state dict in the released names; its sizes are read off the tensors."""
    tensors, name = _released(source)
    try:
        widths = [tensors["in_conv.conv.weight"].shape[0]]
        while (key := f"in_blocks.{3 * len(widths) - 3}.0.block_seq.0.basic_block.conv.weight") in tensors:
            widths.append(tensors[key].shape[0])
        in_channels = tensors["outc.conv.conv.weight"].shape[0]
        time_dim, text_dim = tensors["cond_projection_linear.weight"].shape
        self_conditioning = tensors["in_conv.conv.weight"].shape[1] == 2 * in_channels
    except KeyError as error:
        raise BadInput(f"{name}: not the released U-Net, it has no tensor {error}") from None
    config = UNetConfig(in_channels, tuple(widths), time_dim, text_dim, self_conditioning=self_conditioning)
    with torch.device("meta"):
        unet = UNet(config)
    return load_state(unet, tensors, name, unets.released_names(config)).eval()


def vae_from_release(source) -> VAE:
    """The paper's autoencoder, likewise; latent scale 1."""
    tensors, name = _released(source)
    try:
        widths = [tensors["inc.block_seq.0.basic_block.conv.weight"].shape[0]]
        while (key := f"encoders.{len(widths) - 1}.down_op.down_op.weight") in tensors:
            widths.append(tensors[key].shape[0])
        config = VAEConfig(tuple(widths), tensors["out_enc.1.conv.weight"].shape[0] // 2)
    except KeyError as error:
        raise BadInput(f"{name}: not the released VAE, it has no tensor {error}") from None
    with torch.device("meta"):
        vae = VAE(config)
    return load_state(vae, tensors | {"latent_scale": torch.ones(())}, name, vaes.released_names(config)).eval()


def _released(source):
    return (source, "state dict") if isinstance(source, dict) else (read_state(source), source)


def import_release(argv):
    """msdm.py import: released files into a checkpoint of ours."""
    parser = argparse.ArgumentParser(prog="msdm.py import", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                     description="Turn weights of the paper's released code into a checkpoint for sampler.py.")
    parser.add_argument("--unet", required=True, help="U-Net in the released names, .safetensors or .pth")
    parser.add_argument("--vae", required=True, help="autoencoder in the released names")
    parser.add_argument("--text-encoder", default=RECIPES["paper"].text_encoder, help="CLIP text model by name or folder")
    parser.add_argument("--size", type=int, default=RECIPES["paper"].diffusion.image_size, help="side of the pictures, pixels")
    parser.add_argument("--out", required=True, help="checkpoint to write")
    args = parser.parse_args(argv)
    unet, vae = unet_from_release(args.unet), vae_from_release(args.vae)
    if unet.config.in_channels != vae.config.latent_channels:
        raise BadInput(f"{args.unet} draws latents of {unet.config.in_channels} channels, "
                       f"{args.vae} makes {vae.config.latent_channels}")
    diffusion = replace(RECIPES["paper"].diffusion, image_size=args.size)
    model = MSDM(unet, vae, NamedText(args.text_encoder), diffusion)
    save_safetensors(args.out, model.tensors(), model.describe())
    print(f"{args.out}: U-Net of {sum(p.numel() for p in unet.parameters()):,} and VAE of "
          f"{sum(p.numel() for p in vae.parameters()):,} parameters; text encoder {args.text_encoder}")


# Training: presets are data


@dataclass
class Recipe:
    """How a preset is trained. The network's own sizes are unet.PRESETS."""

    diffusion: Diffusion
    loss: str  # "l1" or "l2"
    text_encoder: str
    steps: int
    batch_size: int
    lr: float
    muon_lr: float | None  # of the U-Net's inner matrices, by Muon; None: AdamW for all
    warmup: int
    cosine: bool  # the learning rate falls to zero at the last step
    ema_decay: float
    jitter: float  # brightness and contrast
    views: int  # jittered copies of each picture in the latent cache
    join: int  # up to so many of a picture's prompts are read as one
    times: tuple[float, float] | None  # mean and spread of the logit of t / T; None: even in t
    p_uncond: float = 0.2
    p_self_cond: float = 0.5


RECIPES = {
    "paper": Recipe(Diffusion(), loss="l1", text_encoder="openai/clip-vit-large-patch14", steps=100_000, batch_size=64,
                    lr=1e-4, muon_lr=None, warmup=0, cosine=False, ema_decay=0.9999, jitter=0.4, views=8, join=1, times=None),
    "tiny": Recipe(Diffusion("v", "linear", 0.0001, 0.02, image_size=64), loss="l2", text_encoder="train", steps=2050,
                   batch_size=16, lr=1e-3, muon_lr=3e-3, warmup=200, cosine=True, ema_decay=0.999, jitter=0.0, views=1, join=8,
                   times=(-0.4, 0.9)),
}


def draw_times(n, T, times, generator):
    """n times of [0, T), int64: even, or with times = (mean, spread) T sigmoid(mean + spread z), z normal: more often where
    the layout is decided, less where the picture is all noise or all but done (SD3, Sec. 3.1)."""
    if times is None:
        return torch.randint(T, (n,), generator=generator)
    mean, spread = times
    return (T * torch.sigmoid(mean + spread * torch.randn(n, generator=generator))).long().clamp(max=T - 1)


def loss_fn(unet, x_0, text, text_mask, t, eps, alpha_bar, diffusion, loss, self_cond):
    """DDPM, Algorithm 1: the error of the network at x_t. self_cond (b,) true where the estimate of x_0 is fed back."""
    a_t = alpha_bar[t].view(-1, 1, 1, 1)
    x_t = sampler.q_sample(x_0, a_t, eps)
    estimate = None
    if self_cond is not None and self_cond.any():
        with torch.no_grad():  # no gradient through the estimate (2208.04202, Sec. 3.2)
            chosen = self_cond.nonzero()[:, 0]
            out = unet(x_t[chosen], t[chosen], text[chosen], text_mask[chosen])
            estimate = torch.zeros_like(x_0)
            estimate[chosen] = sampler.to_x_0(diffusion.prediction, out.float(), x_t[chosen], a_t[chosen])
    out = unet(x_t, t, text, text_mask, estimate)
    target = sampler.target(diffusion.prediction, x_0, a_t, eps)
    return F.l1_loss(out, target) if loss == "l1" else F.mse_loss(out, target)


class PromptSource:
    """Prompts of pictures as text states: drawn, joined, dropped; cached where the encoder is frozen."""

    def __init__(self, records, val_records, text, join, p_uncond):
        self.records, self.text, self.join, self.p_uncond = records, text, join, p_uncond
        self.cache = None
        if not text.trained and join == 1:
            distinct = sorted({p for r in (*records, *val_records) for p in r.prompts} | {""})
            self.rows = {p: i for i, p in enumerate(distinct)}
            batches = [distinct[i:i + 64] for i in range(0, len(distinct), 64)]
            parts = [text(batch) for batch in tqdm(batches, "text states", disable=len(batches) < 8)]
            self.cache = [torch.cat(p) for p in zip(*parts, strict=True)]

    def draw(self, indices, generator):
        """A prompt for each picture, some of them empty."""
        prompts = []
        for i in indices.tolist():
            own = self.records[i].prompts
            n = int(torch.randint(1, 1 + min(self.join, len(own)), (), generator=generator))
            prompts.append(" ".join(own[j] for j in torch.randperm(len(own), generator=generator)[:n].tolist()))
        return data.drop_context(prompts, self.p_uncond, generator)

    def __call__(self, prompts):
        if self.cache is None:
            return self.text(prompts)
        rows = torch.tensor([self.rows[p] for p in prompts], device=self.cache[0].device)
        return self.cache[0][rows], self.cache[1][rows]


def encode_latents(vae, images, jitter, views, seed, device):
    """(n, views, 2 c, h, w) float16: mean and log-variance of every picture under `views` brightness and contrast changes."""
    out = []
    for start in tqdm(range(0, len(images), 32), "latents", unit="batch", disable=len(images) < 500):
        for view in range(views):
            g = torch.Generator().manual_seed(training.step_seed("view", seed, start, view))
            img = images[start:start + 32].float() / 127.5 - 1
            if jitter:
                img = data.augment(img, g, jitter)
            with torch.no_grad():
                moments = torch.cat(vae.moments(img.to(device)), dim=1)
            out.append(moments.half().cpu())
    chunks = [torch.stack(out[i:i + views], dim=1) for i in range(0, len(out), views)]
    return torch.cat(chunks)


def validate(model, latents, prompts, alpha_bar, recipe, batch_size):
    """The loss on held-out pictures with fixed prompts, times and noise, so that two steps compare."""
    total, n = 0.0, len(latents)
    g = torch.Generator().manual_seed(0)
    t = (torch.arange(n) * recipe.diffusion.T // n)[torch.randperm(n, generator=g)]
    eps = torch.randn(latents.shape, generator=g)
    for i in range(0, n, batch_size):
        s = slice(i, i + batch_size)
        text, mask = prompts[0][s], prompts[1][s]
        with torch.no_grad(), training.autocast(model.device):
            loss = loss_fn(model.unet, latents[s].to(model.device), text, mask, t[s].to(model.device), eps[s].to(model.device),
                           alpha_bar, recipe.diffusion, recipe.loss, None)
        total += loss.item() * len(text)
    return total / n


def cached_latents(file, key, records, make, ranks):
    """(latents, the records that could be read): from their file when they are of the same pictures and VAE, else made and kept."""
    if file.is_file():
        tensors, meta = load_safetensors(file)
        if meta.get("key") == key:
            names = set(meta["names"])
            return tensors["moments"], [r for r in records if r.name in names]
    moments, kept = make(records)
    if ranks.first:
        save_safetensors(file, {"moments": moments}, {"key": key, "names": [r.name for r in kept]})
    return moments, kept


def new_model(args, recipe, vae, text, prompts):
    """An untrained U-Net and, where no frozen one is given, a text encoder whose tokenizer is learnt from the prompts."""
    if text is None:
        text = TextTransformer(TextConfig(*learn_tokenizer(prompts)))
    text_dim = text.config.dim if text.trained else text.model.config.hidden_size
    config = replace(unets.PRESETS[args.preset], in_channels=vae.config.latent_channels, text_dim=text_dim)
    return MSDM(UNet(config), vae, text, recipe.diffusion)


def adapted_model(args, device):
    """The model of --base with a fresh adapter on its U-Net."""
    model = load(args.base, device)
    if args.size not in (None, model.diffusion.image_size):
        raise BadInput(f"--size {args.size}: {args.base} draws {model.diffusion.image_size} pixels")
    training.seed_step(args.seed, "weights")
    names = loras.inject(model.unet, loras.config_of(args))
    print(f"{args.base}: an adapter on {len(names)} layers", file=sys.stderr)
    return model


def train(args, recipe):
    """Train, on the latents of a data folder, the U-Net and a text encoder of its own where no public one is named; or, with
    --base, an adapter on a trained U-Net."""
    ranks = training.start_ranks(args.device)
    device = ranks.device
    base = adapted_model(args, device) if args.base else None
    if base:
        recipe = replace(recipe, diffusion=base.diffusion, muon_lr=None)
    vae, size = base.vae if base else vaes.load(args.vae).to(device), recipe.diffusion.image_size
    multiple = vae.factor * 2 ** (len(unets.PRESETS[args.preset].channels) - 2)
    if not base and (size < 1 or size % multiple):
        raise BadInput(f"--size {size} is not divisible by {multiple}: {args.vae} and the U-Net halve the picture so often")
    frozen = None
    if not base and recipe.text_encoder != "train":
        frozen = FrozenCLIP(recipe.text_encoder, dtype=torch.float16 if device.type == "cuda" else torch.float32)
    train_records, val_records, fingerprint = training.read_data(args)
    fixed = {k: v for k, v in asdict(recipe).items() if k != "steps"}
    unsaid = ("out", "base", *(() if base else loras.FLAGS))
    settings = {k: v for k, v in vars(args).items() if k not in unsaid}
    settings |= {"recipe": fixed, "vae_hash": file_hash(args.base or args.vae), "size": size}
    run = training.Run(args.out, settings, fingerprint, ranks)

    def latents_of(part, records, jitter, views):
        def make(records):
            images, kept = data.load_images(records, size, args.crop)
            return encode_latents(vae, images, jitter, views, args.seed, device), kept

        key = text_hash(settings["vae_hash"], run.config["data"], size, args.crop, jitter, views, args.seed)
        return cached_latents(run.folder / f"latents-{part}.safetensors", key, records, make, ranks)

    latents, train_records = latents_of("train", train_records, recipe.jitter, recipe.views)
    val_latents, val_records = latents_of("val", val_records, 0.0, 1)

    training.seed_step(args.seed, "weights")
    model = base or new_model(args, recipe, vae, frozen, [p for r in train_records for p in r.prompts]).to(device)
    model.unet.to(memory_format=torch.channels_last)
    text = model.text
    if base:
        params = loras.tensors(model.unet)
    else:
        params = {f"unet.{k}": p for k, p in model.unet.named_parameters()}
        params |= {f"text.{k}": p for k, p in text.named_parameters() if text.trained}
    opt = training.Optimisers(params, recipe.lr, recipe.muon_lr, ends=("unet.conv_in", "unet.conv_out", "text."))
    ema = training.EMA(params, recipe.ema_decay)
    alpha_bar = recipe.diffusion.alpha_bar().float().to(device)
    source = PromptSource(train_records, val_records, text, recipe.join, recipe.p_uncond)
    val_z = vae.latent_scale.cpu() * val_latents[:, 0].float().chunk(2, dim=1)[0]
    shown = [r.prompts[i % len(r.prompts)] for i, r in enumerate(val_records[:args.shown])]

    start, best = run.restore(params, ema, opt)

    def save(name, metadata):
        if not base:
            run.save_checkpoint(name, model.tensors(), metadata)
        elif ranks.first:
            loras.save(model.unet, run.folder / name)

    def checkpoint(step):
        nonlocal best
        ema.swap()
        model.eval()
        with torch.no_grad():
            prompts = source([r.prompts[0] for r in val_records])
        val = validate(model, val_z, prompts, alpha_bar, recipe, recipe.batch_size)
        metadata = model.describe() | {"step": step, "val_loss": val, "data": run.config["data"]}
        run.log(step=step, val_loss=val)
        if val < best:
            best = val
            save("best", metadata)
        save("last", metadata)
        if shown and ranks.first:
            pictures = model.sample(shown, seed=0, steps=args.sample_steps, solver="dpmpp")
            data.write_grid(run.folder / "samples" / f"{step:07d}.png", pictures)
        model.unet.train()
        text.train(text.trained)
        ema.swap()
        run.save_progress(step, best, params, ema, opt)

    model.unet.train()
    vae.eval()
    loop = training.Loop(f"msdm {args.preset}", start, recipe.steps, ranks, args.minutes)
    for step in loop:
        g = training.seed_step(args.seed, step, ranks.rank)
        indices = ranks.batch(len(train_records), recipe.batch_size, step, args.seed)
        for part in indices.chunk(args.accumulate):
            view = torch.randint(recipe.views, (len(part),), generator=g)
            mu, logvar = latents[part, view].float().chunk(2, dim=1)
            x_0 = (vae.latent_scale * vaes.reparameterise(mu, logvar, g).to(device))
            t = draw_times(len(part), recipe.diffusion.T, recipe.times, g).to(device)
            eps = torch.randn(x_0.shape, generator=g).to(device)
            self_cond = None
            if model.unet.config.self_conditioning:
                self_cond = (torch.rand(len(part), generator=g) < recipe.p_self_cond).to(device)
            with training.autocast(device):
                text_states, mask = source(source.draw(part, g))
                loss = loss_fn(model.unet, x_0, text_states, mask, t, eps, alpha_bar, recipe.diffusion, recipe.loss, self_cond)
            (loss * len(part) / len(indices)).backward()
        ranks.average_gradients(params.values())
        norm = nn.utils.clip_grad_norm_(params.values(), 1.0)
        rate = training.rate(step, recipe.warmup, recipe.steps if recipe.cosine else None)
        opt.step(rate)
        ema.update(step)
        if (step + 1) % args.log_every == 0:
            value = ranks.mean(loss.item())
            run.log(step=step + 1, loss=value, grad_norm=norm.item(), lr=rate * recipe.lr)
            loop.show(loss=f"{value:.4f}")
        if (step + 1) % args.save_every == 0 or loop.last(step):
            checkpoint(step + 1)
    loop.finish()
    if ranks.first:
        print(f"{run.folder}/best{'' if base else '.safetensors'}: validation loss {best:.4f}")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["import"]:
        return import_release(argv[1:])
    parser = argparse.ArgumentParser(description="Train MSDM's U-Net in the latents of a trained VAE.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--preset", choices=sorted(RECIPES), default="tiny", help="network and training settings")
    recipe = RECIPES[training.chosen_preset(argv, RECIPES)]
    parser.add_argument("--vae", help="checkpoint of vae.py")
    parser.add_argument("--base", help="checkpoint of msdm.py to go on from by an adapter; all but its U-Net stays as it is")
    loras.add_flags(parser, "--lora", None)
    parser.add_argument("--size", type=int, help=f"side of the pictures, pixels; None: base's or {recipe.diffusion.image_size}")
    parser.add_argument("--crop", choices=("pad", "random", "center"), default="pad", help="how a picture becomes a square")
    parser.add_argument("--text-encoder", default=recipe.text_encoder, help="CLIP text model by name or folder, or train")
    parser.add_argument("--batch-size", type=int, default=recipe.batch_size, help="pictures a step and process")
    parser.add_argument("--accumulate", type=int, default=1, help="parts in which a batch goes through the network")
    parser.add_argument("--lr", type=float, default=recipe.lr, help="learning rate after the warm-up; Muon's goes with it")
    parser.add_argument("--p-uncond", type=float, default=recipe.p_uncond, help="share of prompts made empty")
    parser.add_argument("--jitter", type=float, default=recipe.jitter, help="brightness and contrast change, 0 to 1")
    parser.add_argument("--views", type=int, default=recipe.views, help="changed copies of a picture among the cached latents")
    parser.add_argument("--join", type=int, default=recipe.join, help="read up to so many prompts of a picture as one")
    parser.add_argument("--ema-decay", type=float, default=recipe.ema_decay, help="of the averaged weights")
    parser.add_argument("--shown", type=int, default=16, help="pictures in the sample grid")
    parser.add_argument("--sample-steps", type=int, default=25, help="solver steps of the sample grid")
    training.add_flags(parser, recipe.steps)
    args = parser.parse_args(argv)
    if (args.base is None) != (args.rank is None) or (args.base is None) == (args.vae is None):
        raise BadInput("give either --vae CHECKPOINT or --base CHECKPOINT --lora RANK")
    training.check_flags(args, "batch_size", "accumulate", "views", "join", "sample_steps")
    if args.sample_steps > recipe.diffusion.T:
        raise BadInput(f"--sample-steps {args.sample_steps}: the schedule has {recipe.diffusion.T} times")
    image_size = recipe.diffusion.image_size if args.size is None else args.size
    recipe = replace(recipe, diffusion=replace(recipe.diffusion, image_size=image_size), text_encoder=args.text_encoder,
                     batch_size=args.batch_size, lr=args.lr, muon_lr=recipe.muon_lr and recipe.muon_lr * (args.lr / recipe.lr),
                     p_uncond=args.p_uncond, jitter=args.jitter, views=args.views, join=args.join, ema_decay=args.ema_decay,
                     steps=args.steps)
    train(args, recipe)


if __name__ == "__main__":
    run_command(main)
