"""The KL autoencoder: images in [-1, 1] to latents and back; its loss and its training.

z = vae.encode(img), img = vae.decode(z); paper: img (b, 3, h, w), z (b, 8, h/8, w/8).
VAE    arXiv:1312.6114   the KL-regularised autoencoder; App. B: the KL of two Gaussians
LDM    arXiv:2112.10752  Sec. 3.1  compress the images first, with a perceptual and a small KL term;
                         App. G  unit-variance latents
Medfusion  arXiv:2212.07501  the network with its deep supervision, and the terms of the loss (loss_fn)
LPIPS  arXiv:1801.03924  Sec. 3  distance of unit-normalised VGG features, here without its learnt weights
SSIM   Wang et al. 2004, IEEE TIP 13(4), Eqs. 13 and 17

    python vae.py --data data/phantom --out runs/vae
"""

from command import BadInput, run_command

import argparse
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import data
import training
import unet as unets
from files import file_hash, load_safetensors, read_state
from optim import Optimizers
from unet import ResBlock, zero_init
from weights import check_fields, check_format, described_by, load_state


@dataclass
class VAEConfig:
    channels: tuple[int, ...] = (64, 128, 256, 512)  # of each level, from fine to coarse
    latent_channels: int = 8

    def __post_init__(self):
        check_fields(self)
        self.channels = tuple(self.channels)
        if len(self.channels) < 2:
            raise BadInput(f"VAEConfig: channels={self.channels}, expected those of two levels or more")


PRESETS = {
    "paper": VAEConfig(),
    "tiny": VAEConfig(channels=(16, 32, 64), latent_channels=4),
    "demo": VAEConfig(channels=(16, 32, 64, 96), latent_channels=8),
}


class VAE(nn.Module):
    """KL autoencoder (Medfusion). encode and decode own the latent scale: z has about unit variance."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        widths, latent = config.channels, config.latent_channels
        self.down = nn.ModuleList([ResBlock(3, widths[0], groups=8)])
        for a, b in pairwise(widths):
            self.down += [nn.Conv2d(a, b, 3, stride=2, padding=1), ResBlock(b, b, groups=8)]
        self.to_moments = nn.Sequential(nn.Conv2d(widths[-1], 2 * latent, 3, padding=1),
                                        nn.Conv2d(2 * latent, 2 * latent, 1))

        self.from_latent = ResBlock(latent, widths[-1], groups=8)
        self.up = nn.ModuleList()  # from coarse to fine
        for a, b in pairwise(reversed(widths)):
            self.up.append(nn.ModuleList([nn.Conv2d(a, b, 3, padding=1), ResBlock(b, b, groups=8)]))
        self.to_img = zero_init(nn.Conv2d(widths[0], 3, 1))
        self.to_half = zero_init(nn.Conv2d(widths[1], 3, 1))  # deep supervision: half resolution
        self.register_buffer("latent_scale", torch.ones(()))

    @property
    def factor(self):
        """Side of a latent position in pixels."""
        return 2 ** (len(self.config.channels) - 1)

    def latent_shape(self, img):
        """Of z for images (b, 3, h, w)."""
        return (len(img), self.config.latent_channels, *(side // self.factor for side in img.shape[-2:]))

    def moments(self, img):
        """(mu, logvar) of q(z | img), before the latent scale; img (b, 3, h, w) in [-1, 1]."""
        x = img
        for block in self.down:
            x = block(x)  # at the end (b, channels[-1], h / factor, w / factor)
        mu, logvar = self.to_moments(x).chunk(2, dim=1)  # (b, latent_channels, h / factor, w / factor)
        return mu, logvar.clamp(-30, 20)

    def encode(self, img, generator=None):
        """z of about unit variance: a draw from q(z | img) with a generator, its mean without one."""
        mu, logvar = self.moments(img)
        if generator is not None:  # on the CPU, as every source of noise here
            mu = reparameterise(mu, logvar, torch.randn(mu.shape, generator=generator).to(mu))
        return mu * self.latent_scale

    def decode(self, z):
        """img (b, 3, h, w), not clamped."""
        return self.decode_unscaled(z / self.latent_scale)[0]

    def decode_unscaled(self, z):
        """(img (b, 3, h, w), half (b, 3, h/2, w/2)) of a latent before its scale; the loss compares both."""
        x = self.from_latent(z)  # (b, channels[-1], h / factor, w / factor)
        for conv, block in self.up[:-1]:
            x = block(conv(F.interpolate(x, scale_factor=2.0, mode="nearest")))
        half = self.to_half(x)  # x (b, channels[1], h/2, w/2)
        conv, block = self.up[-1]
        return self.to_img(block(conv(F.interpolate(x, scale_factor=2.0, mode="nearest")))), half


def reparameterise(mu, logvar, eps):
    """z = mu + sigma eps   (VAE, Eq. 10)."""
    return mu + (0.5 * logvar).exp() * eps


# The loss


def kl_divergence(mu, logvar):
    """KL(N(mu, sigma^2) || N(0, 1)), a mean over all elements (VAE, App. B)."""
    return 0.5 * (mu**2 + logvar.exp() - 1 - logvar).mean()


def ssim(a, b, sigma=1.5, data_range=2.0):
    """Structural similarity (b,) of images in [-1, 1]: Wang et al., Eq. 13 and its mean, Eq. 17.

    The windows are Gaussian, 11 x 11, and lie inside the image; the mean is over the channels, too.
    """
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
        cuts = ((0, 4), (4, 9), (9, 16), (16, 23), (23, 30))  # stages end at relu1_2, 2_2, 3_3, 4_3, 5_3
        self.stages = nn.ModuleList(vgg.features[a:b] for a, b in cuts)
        self.eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))

    def forward(self, a, b):
        """a, b (b, 3, h, w) in [-1, 1], sides of at least 16 -> (b,)"""
        x = (torch.cat([a, b]) / 2 + 0.5 - self.mean) / self.std
        total = 0.0
        for stage in self.stages:
            x = stage(x)
            f_a, f_b = F.normalize(x, dim=1, eps=1e-10).chunk(2)
            total = total + (f_a - f_b).square().sum(dim=1).mean(dim=(1, 2))
        return total


def find_perceptual(where):
    """(perceptual loss or None, hash of its weights) of "off", "auto" (torchvision's cache) or a file."""
    if where == "off":
        return None, "off"
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    path = cache / "vgg16-397923af.pth" if where == "auto" else Path(where)
    if not path.is_file():
        if where == "auto":
            print(f"no VGG-16 weights at {path}: training without the perceptual term "
                  "(--perceptual FILE gives them)")
            return None, "off"
        raise BadInput(f"--perceptual {where}: no such file, expected torchvision's VGG-16 weights, "
                       "auto or off")
    try:
        return Perceptual(read_state(path)), file_hash(path)
    except RuntimeError as error:
        raise BadInput(f"{path}: not torchvision's VGG-16 weights ({str(error).splitlines()[0]})") from None


def loss_fn(vae, img, eps, perceptual, kl_weight, l1_weight, half_weight):
    """(loss, its terms) of img (b, 3, h, w): reconstruction at full and half resolution + KL.

    The terms are Medfusion's with four changes. They are means, not sums over an image: the step does not
    depend on the image's size. The target at half resolution is average-pooled (Medfusion: nearest-exact).
    The pixel error is squared, as in the paper, and with l1_weight absolute as well (Medfusion: absolute).
    SSIM is not clamped at 0.
    """
    mu, logvar = vae.moments(img)
    out, half = vae.decode_unscaled(reparameterise(mu, logvar, eps))
    kl = kl_divergence(mu, logvar)
    loss, parts = kl_weight * kl, {"kl": kl}
    for name, weight, x, target in (("", 1.0, out, img), ("half_", half_weight, half, F.avg_pool2d(img, 2))):
        mse = F.mse_loss(x, target)
        with torch.autocast(x.device.type, enabled=False):  # bf16 cannot resolve the variance of smooth areas
            dssim = 1 - ssim(x.float(), target.float()).mean()
        parts |= {name + "mse": mse, name + "dssim": dssim}
        loss = loss + weight * mse + weight * l1_weight * F.l1_loss(x, target) + weight * dssim
        if perceptual is not None:
            parts[name + "perceptual"] = perceptual(x, target).mean()
            loss = loss + weight * parts[name + "perceptual"]
    return loss, parts


# Checkpoints

FORMAT = 2  # of the files that this code writes
KIND = "Autoencoder"  # what a run is called


def metadata(vae):
    """Metadata of a VAE's checkpoint."""
    return {"kind": "vae", "format": FORMAT, "config": asdict(vae.config)}


def load(path, device="cpu") -> VAE:
    """The VAE of a checkpoint written here, frozen."""
    tensors, meta = load_safetensors(path)
    check_format(path, meta, "vae", FORMAT, "train it anew with vae.py")
    with described_by(path), torch.device("meta"):
        vae = VAE(VAEConfig(**meta["config"]))
    return load_state(vae, tensors, path).to(device).eval().requires_grad_(False)


# Training


# Values of the flags that are not given, by preset. The paper sums its terms over an image (perceptual and
# SSIM terms are broadcast over all values); ours are means: over 3 * 256 * 256 = 196,608 values of an image,
# 49,152 at half resolution, 8 * 32 * 32 = 8,192 of a latent. The paper's sum divided by 196,608 has
# kl_weight = 1e-6 * 8192 / 196608 = 4.2e-8, half_weight = 49152 / 196608 = 0.25, and 1 for all others.
TRAINING = {
    "paper": {"size": 256, "steps": 50_000, "batch_size": 8, "lr": 1e-4, "muon_lr": 0.0, "warmup": 100,
              "cosine": False, "l1_weight": 0.0, "kl_weight": 4.2e-8, "half_weight": 0.25, "jitter": 0.4},
    "tiny": {"size": 64, "steps": 800, "batch_size": 16, "lr": 1e-3, "muon_lr": 3e-3, "warmup": 100,
             "cosine": True, "l1_weight": 1.0, "kl_weight": 3e-3, "half_weight": 1.0, "jitter": 0.0},
}
TRAINING["demo"] = TRAINING["tiny"] | {"steps": 250, "warmup": 20}


@torch.no_grad()
def measure_scale(vae, images, world):
    """One over the standard deviation of the latents of the first 2,000 uint8 images (LDM, App. G).

    The ranks share the images.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    with world.together():
        for part in world.share(data.batches(min(len(images), 2000), 32)):
            mu, logvar = (x.double() for x in vae.moments(data.to_float(images[part].to(world.device))))
            sums += torch.stack([mu.sum(), (mu ** 2 + logvar.exp()).sum(), mu.new_tensor(mu.numel())]).cpu()
    total, squares, n = torch.tensor([world.mean(x) for x in sums.tolist()], dtype=torch.float64)
    return (squares / n - (total / n)**2).rsqrt().float()  # of draws z: E[z^2] = mu^2 + sigma^2


def draw_batch(vae, images, jitter, generators):
    """Batch(img, eps) of uint8 images: img in [-1, 1] after the colour jitter, eps the latents' noise."""
    img, generators = data.to_float(images), list(generators)
    if jitter:
        img = torch.cat([data.augment(x[None], g, jitter) for x, g in zip(img, generators, strict=True)])
    shape = vae.latent_shape(img)[1:]
    return training.Batch(img=img, eps=torch.stack([torch.randn(shape, generator=g) for g in generators]))


class Objective:
    """The loss of a batch of images, weighted by the flags."""

    def __init__(self, vae, perceptual, args, device):
        self.vae, self.perceptual, self.args, self.device = vae, perceptual, args, device

    def on_device(self, batch):
        return batch.to(self.device)

    def terms(self, batch):
        args = self.args
        img = batch.img.contiguous(memory_format=torch.channels_last)
        with training.autocast(self.device):
            return loss_fn(self.vae, img, batch.eps, self.perceptual, args.kl_weight, args.l1_weight,
                           args.half_weight)

    def loss(self, batch):
        return self.terms(batch)[0]

    @torch.no_grad()
    def validate(self, images, world):
        """(loss, its terms) as means over uint8 images, with fixed noise in the latents.

        The ranks share the images; the terms are there on rank 0 only, which logs them.
        """
        total, own, terms = 0.0, Counter(), Counter()
        with world.together():
            for part in world.share(data.batches(len(images), 16)):
                some = images[part]
                batch = draw_batch(self.vae, some, 0.0, training.Draws(0, part.start, range(len(some))))
                loss, found = self.terms(self.on_device(batch))
                total += loss.item() * len(batch) / len(images)
                own.update({f"val_{k}": v.item() * len(batch) / len(images) for k, v in found.items()})
        for found in world.gather(own):
            terms.update(found)
        return world.size * world.mean(total), dict(terms)


def train(args):
    world = training.start(args.device)
    device = world.device
    torch.manual_seed(training.step_seed("weights", args.seed))
    vae = VAE(PRESETS[args.preset]).to(device, memory_format=torch.channels_last)
    multiple = vae.factor * unets.PRESETS[args.preset].factor  # the U-Net comes next and halves latents again
    if args.size % multiple or args.size < 32:
        raise BadInput(f"--size {args.size}: expected a multiple of {multiple}, 32 or more")
    train_records, val_records, fingerprint = training.read_data(args, world)
    with world.together():
        perceptual, perceptual_hash = find_perceptual(args.perceptual)
        perceptual = perceptual and perceptual.to(device)
        total = len(train_records) + len(val_records)
        images = data.Images(train_records, args.size, args.crop, total=total)
        val_images = data.Images(val_records, args.size, args.crop, total=total)
    settings = training.settings_of(args) | {"perceptual_weights": perceptual_hash,
                                             "network": asdict(vae.config)}
    run = training.Run(args.out, settings, fingerprint, world, KIND, args.from_run)

    params = dict(vae.named_parameters())
    opt = Optimizers(params, args.lr, args.muon_lr, adamw_only=("down.0.", "to_img", "to_half"))
    objective = Objective(vae, perceptual, args, device)

    take_step = training.Step(objective, params, opt, None, world, args.accumulate)

    def checkpoint(step):
        take_step.settle()
        vae.eval()
        val_loss, terms = objective.validate(val_images, world)
        vae.latent_scale.copy_(measure_scale(vae, images, world))
        meta = metadata(vae) | {"step": step, "val_loss": val_loss, "data": run.config["data"]}
        run.keep(step, val_loss, lambda name: run.save_checkpoint(name, vae.state_dict(), meta), **terms)
        if world.is_main:
            with torch.no_grad():
                img = data.to_float(val_images[:8]).to(device)
                both = torch.cat([img, vae.decode(vae.encode(img))])
                data.write_grid(run.sheet(step), data.to_uint8(both), columns=len(img))
        vae.train()
        run.save_progress(step, vae.state_dict(), take_step)

    def draw(indices, draws):
        upcoming, _ = world.batch(len(images), run.batch_size, draws.step + 1, args.seed)
        some = images[indices]
        images.begin(upcoming.tolist())
        return draw_batch(vae, some, args.jitter, draws)

    vae.train()
    start = run.restore(vae.state_dict(), take_step)
    loop = training.Loop(f"vae {args.preset}", start, args.steps, world, args.minutes)
    loop.run(take_step, draw, [r.name for r in images.records], run, args, checkpoint)
    if world.is_main:
        print(f"{run.result()}: validation loss {run.best:.4f}, "
              f"latent scale {vae.latent_scale.item():.4f}")


def main(argv=None):
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                     description="Train the KL autoencoder on the images of a data folder. "
                                                 "Values in brackets are those of the presets.")
    parser.add_argument("--preset", choices=sorted(TRAINING), default="tiny",
                        help="network and training settings")
    flag = training.add_flags(parser, TRAINING)
    flag("size", "side of the images, pixels", type=int)
    parser.add_argument("--crop", choices=("pad", "random", "center"), default="pad",
                        help="how an image becomes a square")
    flag("muon_lr", "learning rate of Muon for the inner weights; 0: AdamW for all", type=float)
    flag("l1_weight", "weight of the absolute error", type=float)
    flag("kl_weight", "weight of the Kullback-Leibler divergence, a mean over latent elements", type=float)
    flag("half_weight", "weight of the terms of the decoder's second output, at half resolution", type=float)
    flag("jitter", "brightness and contrast change, 0 to 1", type=float)
    parser.add_argument("--perceptual", default="auto",
                        help="VGG-16 weights: a file, off, or auto (torchvision's cache)")
    args = parser.parse_args(training.repeated(parser, argv, KIND))
    training.check_flags(args)
    training.fill_defaults(args, TRAINING[args.preset])
    train(args)


if __name__ == "__main__":
    run_command(main)
