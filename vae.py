"""Autoencoders: pictures in [-1, 1] to latents and back. The KL-VAE and how it is trained; MoVQ, as published.

z = vae.encode(img), img = vae.decode(z); paper: img (b, 3, h, w), z (b, 8, h/8, w/8).
VAE    arXiv:1312.6114   the KL-regularised autoencoder; App. B: the KL of two Gaussians
LDM    arXiv:2112.10752  Sec. 3.1  compress the pictures first, with a perceptual and a small KL term; App. G: unit-variance latents
LPIPS  arXiv:1801.03924  Sec. 3  distance of unit-normalised VGG features, here without its learnt weights
SSIM   Wang et al. 2004, IEEE TIP 13(4), Eq. 13
VQGAN  arXiv:2012.09841  Sec. 3.1  encoder, codebook, decoder
MoVQ   arXiv:2209.09002  a VQGAN whose decoder's normalisation is modulated by the latent: Kandinsky's autoencoder

    python vae.py --data data/phantom --out runs/vae
"""

import argparse
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

import data
import training
from unet import RELEASED_RES_NAMES, CrossAttention, ResBlock, zero_init
from weights import BadInput, file_hash, load_published, load_safetensors, load_state, read_state, run_command, supported


@dataclass
class VAEConfig:
    channels: tuple[int, ...] = (64, 128, 256, 512)  # the picture halves between levels
    latent_channels: int = 8

    def __post_init__(self):
        self.channels = tuple(self.channels)


PRESETS = {
    "paper": VAEConfig(),
    "tiny": VAEConfig(channels=(16, 32, 64), latent_channels=4),
}


def released_names(config):
    """Rename rules (weights.rename) of the paper's released autoencoder, whose decoder is counted from the largest picture."""
    last = len(config.channels) - 2
    return (
        ("inc", "down.0"),
        *((f"encoders.{i}.down_op.down_op", f"down.{2 * i + 1}") for i in range(last + 1)),
        *((f"encoders.{i}.conv_block", f"down.{2 * i + 2}") for i in range(last + 1)),
        ("out_enc.#.conv", "to_moments.#"),
        ("inc_dec", "from_latent"),
        *((f"decoders.{i}.up_op.up_op", f"up.{last - i}.0") for i in range(last + 1)),
        *((f"decoders.{i}.conv_block", f"up.{last - i}.1") for i in range(last + 1)),
        ("outc.conv", "to_img"),
        ("outc_ver.0.conv", "to_half"),
        *RELEASED_RES_NAMES,
    )


class VAE(nn.Module):
    """KL autoencoder. encode and decode own the latent scale: z has about unit variance over the training pictures."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        widths, latent = config.channels, config.latent_channels
        self.down = nn.ModuleList([ResBlock(3, widths[0], groups=8)])
        for a, b in zip(widths, widths[1:], strict=False):
            self.down += [nn.Conv2d(a, b, 3, stride=2, padding=1), ResBlock(b, b, groups=8)]
        self.to_moments = nn.Sequential(nn.Conv2d(widths[-1], 2 * latent, 3, padding=1), nn.Conv2d(2 * latent, 2 * latent, 1))

        self.from_latent = ResBlock(latent, widths[-1], groups=8)
        self.up = nn.ModuleList()  # from the smallest picture to the largest
        for a, b in zip(widths[:0:-1], widths[-2::-1], strict=True):
            self.up.append(nn.ModuleList([nn.Conv2d(a, b, 3, padding=1), ResBlock(b, b, groups=8)]))
        self.to_img = zero_init(nn.Conv2d(widths[0], 3, 1))
        self.to_half = zero_init(nn.Conv2d(widths[1], 3, 1))  # deep supervision: the picture at half resolution
        self.register_buffer("latent_scale", torch.ones(()))

    @property
    def factor(self):
        """Pixels a latent cell is wide."""
        return 2 ** (len(self.config.channels) - 1)

    def moments(self, img):
        """(mu, logvar) of q(z | img), before the latent scale."""
        x = img
        for block in self.down:
            x = block(x)
        mu, logvar = self.to_moments(x).chunk(2, dim=1)
        return mu, logvar.clamp(-30, 20)

    def encode(self, img, generator=None):
        """z of about unit variance: drawn from q(z | img) with the generator, its mean without one."""
        mu, logvar = self.moments(img)
        return (mu if generator is None else reparameterise(mu, logvar, generator)) * self.latent_scale

    def decode(self, z):
        """img (b, 3, h, w), not clamped."""
        return self.decode_unscaled(z / self.latent_scale)[0]

    def decode_unscaled(self, z):
        """(img, img at half resolution) of a latent before the scale: what the loss looks at."""
        x = self.from_latent(z)
        for conv, block in self.up[:-1]:
            x = block(conv(F.interpolate(x, scale_factor=2.0, mode="nearest")))
        half = self.to_half(x)
        conv, block = self.up[-1]
        return self.to_img(block(conv(F.interpolate(x, scale_factor=2.0, mode="nearest")))), half


def reparameterise(mu, logvar, generator=None):
    """z = mu + sigma eps   (VAE, Eq. 10); the generator lives on the CPU, as every source of noise here."""
    eps = torch.randn(mu.shape, generator=generator).to(mu)
    return mu + (0.5 * logvar).exp() * eps


# The loss


def kl_divergence(mu, logvar):
    """KL(N(mu, sigma^2) || N(0, 1)), a mean over all elements (VAE, App. B)."""
    return 0.5 * (mu**2 + logvar.exp() - 1 - logvar).mean()


def ssim(a, b, sigma=1.5, data_range=2.0):
    """Structural similarity (b,) of pictures in [-1, 1]: 11 x 11 Gaussian windows, those that lie inside (Wang et al., Eq. 13)."""
    c_1, c_2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    x = torch.arange(11, device=a.device, dtype=a.dtype) - 5
    g = torch.exp(-(x**2) / (2 * sigma**2))
    g = g / g.sum()

    def blur(y):  # separable, one channel at a time
        y = y.flatten(0, 1)[:, None]
        return F.conv2d(F.conv2d(y, g.view(1, 1, 11, 1)), g.view(1, 1, 1, 11)).view(len(a), -1)

    mu_a, mu_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mu_a**2, blur(b * b) - mu_b**2, blur(a * b) - mu_a * mu_b
    s = (2 * mu_a * mu_b + c_1) * (2 * cov + c_2) / ((mu_a**2 + mu_b**2 + c_1) * (var_a + var_b + c_2))
    return s.mean(dim=1)


class Perceptual(nn.Module):
    """Distance of unit-normalised VGG-16 features after each of its five stages: LPIPS, Eq. 1 with w = 1."""

    def __init__(self, state_dict):
        super().__init__()
        from torchvision.models import vgg16

        vgg = vgg16()
        vgg.load_state_dict(state_dict)
        self.stages = nn.ModuleList(vgg.features[a:b] for a, b in ((0, 4), (4, 9), (9, 16), (16, 23), (23, 30)))
        self.eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))

    def forward(self, a, b):
        """(b, 3, h, w) twice in [-1, 1], sides of at least 16 -> (b,)"""
        x = (torch.cat([a, b]) / 2 + 0.5 - self.mean) / self.std
        total = 0.0
        for stage in self.stages:
            x = stage(x)
            f_a, f_b = F.normalize(x, dim=1, eps=1e-10).chunk(2)
            total = total + (f_a - f_b).square().sum(dim=1).mean(dim=(1, 2))
        return total


def find_perceptual(where):
    """(the perceptual loss or None, hash of its weights) named by --perceptual: "off", "auto" (torchvision's cache) or a file."""
    if where == "off":
        return None, "off"
    path = Path(torch.hub.get_dir()) / "checkpoints" / "vgg16-397923af.pth" if where == "auto" else Path(where)
    if not path.is_file():
        if where == "auto":
            print(f"no VGG-16 weights at {path}: training without the perceptual term (--perceptual FILE gives them)")
            return None, "off"
        raise BadInput(f"--perceptual {where}: no such file, expected torchvision's VGG-16 weights, auto or off")
    try:
        return Perceptual(read_state(path)), file_hash(path)
    except RuntimeError as error:
        raise BadInput(f"{path}: not torchvision's VGG-16 weights ({str(error).splitlines()[0]})") from None


def loss_fn(vae, img, perceptual, kl_weight, l1_weight, generator):
    """Reconstruction at full and half resolution + KL. Each term is a mean, so the picture's size does not set the step."""
    mu, logvar = vae.moments(img)
    out, half = vae.decode_unscaled(reparameterise(mu, logvar, generator))
    kl = kl_divergence(mu, logvar)
    loss, parts = kl_weight * kl, {"kl": kl}
    for name, x, target in (("", out, img), ("half_", half, F.avg_pool2d(img, 2))):
        parts[name + "mse"] = F.mse_loss(x, target)
        with torch.autocast(x.device.type, enabled=False):  # the variance of smooth places is below what bf16 can tell
            parts[name + "dssim"] = 1 - ssim(x.float(), target.float()).mean()
        loss = loss + parts[name + "mse"] + l1_weight * F.l1_loss(x, target) + parts[name + "dssim"]
        if perceptual is not None:
            parts[name + "perceptual"] = perceptual(x, target).mean()
            loss = loss + parts[name + "perceptual"]
    return loss, parts


# MoVQ, the autoencoder of Kandinsky 2.2 and, wider, of 3.0. Published weights only: nothing here trains it.


RES_NAMES = (  # published name, ours: what MoVQ has in common with the networks of kandinsky.py
    ("down_blocks.#", "down.#"),
    ("up_blocks.#", "up.#"),
    ("mid_block", "mid"),
    ("resnets.#", "res.#"),
    ("attentions.#", "attn.#"),
    ("norm1", "norm_1"),
    ("norm2", "norm_2"),
    ("conv1", "conv_1"),
    ("conv2", "conv_2"),
    ("conv_shortcut", "skip"),
    ("attn.#.group_norm", "attn.#.norm"),
    ("conv_norm_out", "norm_out"),
)


class PlainNorm(nn.GroupNorm):
    """The encoder's normalisation, called like the decoder's."""

    def __init__(self, ch):
        super().__init__(32, ch, eps=1e-6)

    def forward(self, x, z=None):
        return super().forward(x)


class SpatialNorm(nn.Module):
    """norm(x) scale(z) + shift(z): the latent speaks to every layer of the decoder (MoVQ)."""

    def __init__(self, ch, latent_ch):
        super().__init__()
        self.plain = PlainNorm(ch)
        self.scale = nn.Conv2d(latent_ch, ch, 1)
        self.shift = nn.Conv2d(latent_ch, ch, 1)

    def forward(self, x, z):
        # A 1x1 convolution and nearest upsampling commute: convolve the small picture.
        scale, shift = (F.interpolate(y, x.shape[-2:], mode="nearest") for y in (self.scale(z), self.shift(z)))
        return self.plain(x) * scale + shift


class MoVQResBlock(nn.Module):
    def __init__(self, in_ch, out_ch, norm):
        super().__init__()
        self.norm_1 = norm(in_ch)
        self.conv_1 = nn.Conv2d(in_ch, out_ch, 3, padding=1)
        self.norm_2 = norm(out_ch)
        self.conv_2 = nn.Conv2d(out_ch, out_ch, 3, padding=1)
        self.skip = nn.Conv2d(in_ch, out_ch, 1) if in_ch != out_ch else nn.Identity()

    def forward(self, x, z=None):
        y = self.conv_1(F.silu(self.norm_1(x, z)))
        return self.skip(x) + self.conv_2(F.silu(self.norm_2(y, z)))


class MoVQAttention(CrossAttention):
    """Every pixel looks at every pixel, with one head."""

    def __init__(self, ch, norm):
        super().__init__(ch, ch, n_heads=1, bias=True)
        self.norm = norm(ch)

    def forward(self, x, z=None):
        h, w = x.shape[-2:]
        y = (self.norm(x.flatten(2)) if z is None else self.norm(x, z).flatten(2)).transpose(1, 2)  # (b, h * w, c)
        return rearrange(super().forward(y, y), "b (h w) c -> b c h w", h=h, w=w) + x


class Halve(nn.Conv2d):
    """3x3 convolution with stride 2; the padding is to the right and below only."""

    def __init__(self, ch):
        super().__init__(ch, ch, 3, stride=2)

    def forward(self, x, z=None):
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Double(nn.Conv2d):
    def __init__(self, ch):
        super().__init__(ch, ch, 3, padding=1)

    def forward(self, x, z=None):
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class MoVQLevel(nn.Module):
    """Residual blocks, the first n_attn of them followed by attention, then a change of resolution."""

    def __init__(self, in_ch, out_ch, norm, n_res, n_attn, resample=None):
        super().__init__()
        self.res = nn.ModuleList(MoVQResBlock(in_ch if i == 0 else out_ch, out_ch, norm) for i in range(n_res))
        self.attn = nn.ModuleList(MoVQAttention(out_ch, norm) for _ in range(n_attn))
        self.resample = resample

    def forward(self, x, z=None):
        for i, res in enumerate(self.res):
            x = res(x, z)
            if i < len(self.attn):
                x = self.attn[i](x, z)
        return x if self.resample is None else self.resample(x)


class MoVQEncoder(nn.Module):
    def __init__(self, widths, attention, n_res, latent_ch):
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        for i, (ch, has_attention) in enumerate(zip(widths, attention, strict=True)):
            resample = Halve(ch) if i + 1 < len(widths) else None
            self.down.append(MoVQLevel(widths[max(i - 1, 0)], ch, PlainNorm, n_res, n_res * has_attention, resample))
        self.mid = MoVQLevel(ch, ch, PlainNorm, 2, 1)
        self.norm_out = PlainNorm(ch)
        self.conv_out = nn.Conv2d(ch, latent_ch, 3, padding=1)

    def forward(self, img):
        x = self.conv_in(img)
        for level in (*self.down, self.mid):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class MoVQDecoder(nn.Module):
    def __init__(self, widths, attention, n_res, latent_ch, z_ch):
        super().__init__()
        norm = partial(SpatialNorm, latent_ch=z_ch)
        above = widths[-1]
        self.conv_in = nn.Conv2d(latent_ch, above, 3, padding=1)
        self.mid = MoVQLevel(above, above, norm, 2, 1)
        self.up = nn.ModuleList()  # from the smallest picture to the largest
        for i, (ch, has_attention) in enumerate(zip(reversed(widths), attention, strict=True)):
            resample = Double(ch) if i + 1 < len(widths) else None
            self.up.append(MoVQLevel(above, ch, norm, n_res, n_res * has_attention, resample))
            above = ch
        self.norm_out = norm(ch)
        self.conv_out = nn.Conv2d(ch, 3, 3, padding=1)

    def forward(self, y, z):
        y = self.conv_in(y)
        for level in (self.mid, *self.up):
            y = level(y, z)
        return self.conv_out(F.silu(self.norm_out(y, z)))


class MoVQ(nn.Module):
    """encode(img) -> z, decode(z) -> img; img (b, 3, h, w) in [-1, 1], z (b, 4, h/8, w/8) not scaled, not quantised.

    Kandinsky's diffusion models live in the z before the codebook, so the codebook is only a parameter of the file;
    quantise is what MoVQ itself was trained with.
    """

    published_names = (
        *RES_NAMES,
        ("down.#.downsamplers.0.conv", "down.#.resample"),
        ("up.#.upsamplers.0.conv", "up.#.resample"),
        ("quantize.embedding", "codebook"),
        ("norm_layer", "plain"),
        ("conv_y", "scale"),
        ("conv_b", "shift"),
        ("spatial_norm.plain", "norm.plain"),
        ("spatial_norm.scale", "norm.scale"),
        ("spatial_norm.shift", "norm.shift"),
        ("to_q|query", "to_q"),  # the first checkpoints have the names on the right of the bar
        ("to_k|key", "to_k"),
        ("to_v|value", "to_v"),
        ("to_out.0|proj_attn", "to_out.0"),
    )

    def __init__(self, widths, down_attention, up_attention, n_res, latent_ch, z_ch, n_codes):
        super().__init__()
        self.factor = 2 ** (len(widths) - 1)  # pixels a latent cell is wide
        self.encoder = MoVQEncoder(widths, down_attention, n_res, latent_ch)
        self.quant_conv = nn.Conv2d(latent_ch, z_ch, 1)
        self.codebook = nn.Embedding(n_codes, z_ch)
        self.post_quant_conv = nn.Conv2d(z_ch, latent_ch, 1)
        self.decoder = MoVQDecoder(widths, up_attention, n_res + 1, latent_ch, z_ch)

    def encode(self, img):
        return self.quant_conv(self.encoder(img))

    def decode(self, z):
        return self.decoder(self.post_quant_conv(z), z)

    def quantise(self, z):
        """The nearest codebook entry at each place (VQGAN, Eq. 2)."""
        b, _, h, w = z.shape
        nearest = torch.cdist(rearrange(z, "b c h w -> (b h w) c"), self.codebook.weight).argmin(dim=1)
        return rearrange(self.codebook(nearest), "(b h w) c -> b c h w", b=b, h=h, w=w)


def build_movq(config: dict):
    """MoVQ from its published config.json."""
    down, up = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"), ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")
    c = supported(
        config, "MoVQ", "VQModel",
        free={"block_out_channels": (64,), "down_block_types": down[:1], "up_block_types": up[:1],
              "layers_per_block": 1, "latent_channels": 3, "vq_embed_dim": None, "num_vq_embeddings": 256,
              "sample_size": 32, "scaling_factor": 0.18215, "force_upcast": False},  # these three change nothing here
        fixed={"in_channels": (3,), "out_channels": (3,), "act_fn": ("silu",), "norm_num_groups": (32,),
               "norm_type": ("spatial",), "mid_block_add_attention": (True,), "lookup_from_codebook": (False,)})
    for key, kinds in (("down_block_types", down), ("up_block_types", up)):
        if len(c[key]) != len(c["block_out_channels"]) or set(c[key]) - set(kinds):
            raise BadInput(f"MoVQ: not supported: {key}={c[key]!r}")
    return MoVQ(c["block_out_channels"], [kind == down[1] for kind in c["down_block_types"]],
                [kind == up[1] for kind in c["up_block_types"]], c["layers_per_block"], c["latent_channels"],
                c["vq_embed_dim"] or c["latent_channels"], c["num_vq_embeddings"])


def load_movq(folder, dtype=torch.float32):
    return load_published(build_movq, folder, dtype)


# Training


@dataclass
class Recipe:
    """How a preset is trained."""

    size: int
    batch_size: int
    lr: float
    muon_lr: float | None  # of the inner weights, by Muon; None: AdamW for all
    steps: int
    l1_weight: float
    kl_weight: float
    jitter: float
    cosine: bool


RECIPES = {
    "paper": Recipe(size=256, batch_size=8, lr=1e-4, muon_lr=None, steps=50_000, l1_weight=0.0, kl_weight=1e-6,
                    jitter=0.4, cosine=False),
    "tiny": Recipe(size=64, batch_size=16, lr=1e-3, muon_lr=3e-3, steps=800, l1_weight=1.0, kl_weight=3e-3,
                   jitter=0.0, cosine=True),
}


def load(path, device="cpu") -> VAE:
    """The VAE of a checkpoint written here, frozen."""
    tensors, meta = load_safetensors(path)
    if meta.get("kind") != "vae":
        raise BadInput(f"{path}: expected a checkpoint of vae.py, got {meta.get('kind', 'a file without a kind')!r}")
    with torch.device("meta"):
        vae = VAE(VAEConfig(**meta["config"]))
    return load_state(vae, tensors, path).to(device).eval().requires_grad_(False)


@torch.no_grad()
def measure_scale(vae, images, device):
    """One over the standard deviation of all latents of uint8 pictures (LDM, App. G)."""
    sums, n = torch.zeros(2, dtype=torch.float64), 0
    for i in range(0, len(images), 32):
        mu, logvar = vae.moments(images[i:i + 32].to(device).float() / 127.5 - 1)
        sums += torch.stack([mu.double().sum(), (mu.double() ** 2 + logvar.double().exp()).sum()]).cpu()
        n += mu.numel()
    mean, square = sums / n
    return (square - mean**2).rsqrt().float()


def train(args, recipe):
    ranks = training.start_ranks(args.device)
    device = ranks.device
    training.seed_step(args.seed, "weights")
    vae = VAE(PRESETS[args.preset]).to(device, memory_format=torch.channels_last)
    if args.size % vae.factor or args.size < 32:
        raise BadInput(f"--size {args.size}: expected a multiple of {vae.factor}, 32 or more")
    perceptual, perceptual_hash = find_perceptual(args.perceptual)
    perceptual = perceptual and perceptual.to(device)
    train_records, val_records, fingerprint = training.read_data(args)
    images, _ = data.load_images(train_records, args.size, args.crop)
    val_images, _ = data.load_images(val_records, args.size, args.crop)
    settings = {k: v for k, v in vars(args).items() if k != "out"} | {"perceptual": perceptual_hash}
    run = training.Run(args.out, settings, fingerprint, ranks)

    params = dict(vae.named_parameters())
    muon_lr = recipe.muon_lr and recipe.muon_lr * (args.lr / recipe.lr)
    opt = training.Optimisers(params, args.lr, muon_lr, ends=("down.0.", "to_img", "to_half"))
    state, start, best = run.resume(), 0, float("inf")
    if state is not None:
        start, best = state["step"], state["best"]
        vae.load_state_dict(state["weights"])
        opt.load_state_dict(state["optimiser"])

    def checkpoint(step):
        nonlocal best
        vae.eval()
        val, shown = 0.0, []
        for i in range(0, len(val_images), 16):
            img = val_images[i:i + 16].to(device).float() / 127.5 - 1
            with torch.no_grad():
                loss, _ = loss_fn(vae, img, perceptual, recipe.kl_weight, recipe.l1_weight, torch.Generator().manual_seed(i))
                if not shown:
                    shown = [img[:8], vae.decode_unscaled(vae.moments(img[:8])[0])[0]]
            val += loss.item() * len(img) / len(val_images)
        vae.latent_scale.copy_(measure_scale(vae, images[:2000], device))
        run.log(step=step, val_loss=val)
        metadata = {"kind": "vae", "config": asdict(vae.config), "step": step, "val_loss": val, "data": run.config["data"]}
        if val < best:
            best = val
            run.save_checkpoint("best", vae.state_dict(), metadata)
        run.save_checkpoint("last", vae.state_dict(), metadata)
        if ranks.first:
            pictures = ((torch.cat(shown) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()
            data.write_grid(run.folder / "samples" / f"{step:07d}.png", pictures, columns=len(shown[0]))
        vae.train()
        run.save_state({"step": step, "best": best, "weights": vae.state_dict(), "optimiser": opt.state_dict()})

    vae.train()
    loop = training.Loop(f"vae {args.preset}", start, args.steps, ranks, args.minutes)
    for step in loop:
        g = training.seed_step(args.seed, step, ranks.rank)
        img = images[ranks.batch(len(images), args.batch_size, step, args.seed)].float() / 127.5 - 1
        if args.jitter:
            img = data.augment(img, g, args.jitter)
        img = img.to(device, memory_format=torch.channels_last)
        with training.autocast(device):
            loss, parts = loss_fn(vae, img, perceptual, recipe.kl_weight, recipe.l1_weight, g)
        loss.backward()
        ranks.average_gradients(params.values())
        nn.utils.clip_grad_norm_(params.values(), 1.0)
        rate = training.rate(step, 100, args.steps if recipe.cosine else None)
        opt.step(rate)
        if (step + 1) % args.log_every == 0:
            run.log(step=step + 1, loss=ranks.mean(loss.item()), lr=rate * args.lr, **{k: v.item() for k, v in parts.items()})
            loop.show(loss=f"{loss.item():.4f}")
        if (step + 1) % args.save_every == 0 or loop.last(step):
            checkpoint(step + 1)
    loop.finish()
    if ranks.first:
        print(f"{run.folder}/best.safetensors: validation loss {best:.4f}, latent scale {vae.latent_scale.item():.4f}")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Train the KL autoencoder on the pictures of a data folder.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--preset", choices=sorted(RECIPES), default="tiny", help="network and training settings")
    recipe = RECIPES[training.chosen_preset(argv, RECIPES)]
    parser.add_argument("--size", type=int, default=recipe.size, help="side of the pictures, pixels")
    parser.add_argument("--crop", choices=("pad", "random", "center"), default="pad", help="how a picture becomes a square")
    parser.add_argument("--batch-size", type=int, default=recipe.batch_size, help="pictures a step and process")
    parser.add_argument("--lr", type=float, default=recipe.lr, help="learning rate after 100 steps of warm-up; Muon's goes with it")
    parser.add_argument("--jitter", type=float, default=recipe.jitter, help="brightness and contrast change, 0 to 1")
    parser.add_argument("--perceptual", default="auto", help="VGG-16 weights: a file, off, or auto (torchvision's cache)")
    training.add_flags(parser, recipe.steps)
    args = parser.parse_args(argv)
    training.check_flags(args, "batch_size")
    train(args, recipe)


if __name__ == "__main__":
    run_command(main)
