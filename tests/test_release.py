"""The weights of the paper's released code in our networks; its recorded outputs may not be copied here."""

from command import BadInput

import json

import pytest
import torch
import torch.nn.functional as F
from helpers import close, fixture, recorded

import diffusion
import msdm
import release
from files import load_safetensors, save_safetensors
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig
from weights import rename

# The released code's arithmetic, spelled out under its own names


class Released(dict):
    """Tensors by released name; `read` holds the names that were looked up."""

    def __init__(self, tensors):
        super().__init__(tensors)
        self.read = set()

    def __getitem__(self, name):
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name):
        self.read.add(name)
        return super().get(name)

    def conv(self, name, x, **settings):
        return F.conv2d(x, self[f"{name}.weight"], self.get(f"{name}.bias"), **settings)

    def linear(self, name, x):
        return F.linear(x, self[f"{name}.weight"], self.get(f"{name}.bias"))

    def res_block(self, name, x, groups, emb=None):
        for i in (0, 1):
            unit, skip = f"{name}.block_seq.{i}.basic_block", x
            if f"{name}.block_seq.{i}.conv_res.weight" in self:
                skip = self.conv(f"{name}.block_seq.{i}.conv_res", x)
            y = self.conv(f"{unit}.conv", x, padding=1)
            x = skip + F.silu(F.group_norm(y, groups, self[f"{unit}.norm.weight"], self[f"{unit}.norm.bias"]))
            if i == 0 and emb is not None:
                x = x + self.linear(f"{name}.local_embedder.1", F.silu(emb))[:, :, None, None]
        return x

    def attend(self, name, x, text, mask, n_heads):
        q, k, v = self.linear(f"{name}.to_q", x), self.linear(f"{name}.to_k",
                                                              text), self.linear(f"{name}.to_v", text)
        q, k, v = (y.unflatten(2, (n_heads, -1)).transpose(1, 2) for y in (q, k, v))
        logits = q @ k.mT / q.shape[-1] ** 0.5
        y = logits.masked_fill(~mask[:, None, None], -torch.inf).softmax(dim=-1) @ v
        return self.linear(f"{name}.to_out.0", y.transpose(1, 2).flatten(2))

    def text_block(self, name, x, emb, text, mask):
        def norm(layer):
            scale_shift = self.linear(f"{name}.attention.{layer}.context_mlp.1", F.silu(emb))
            scale, shift = scale_shift[:, :, None, None].chunk(2, dim=1)
            return F.group_norm(x, 32) * (1 + scale) + shift

        y = self.attend(f"{name}.attention.attention", norm("in_norm").flatten(2).mT, text, mask, n_heads=8)
        x = x + y.mT.view_as(x)
        y = F.silu(self.conv(f"{name}.attention.feed_forward.0", norm("out_norm")))
        return x + self.conv(f"{name}.attention.feed_forward.2", y)

    def unet(self, x, t, text, mask, levels):
        half = self["time_embedder.time_emb.1.weight"].shape[1] // 2
        angle = t[:, None] * 10000 ** (-torch.arange(half) / (half - 1))
        emb = self.linear("time_embedder.time_emb.1", torch.cat([angle.sin(), angle.cos()], dim=1))
        emb = self.linear("time_embedder.time_emb.3", F.silu(emb))
        text = self.linear("cond_projection_linear2", F.silu(self.linear("cond_projection_linear", text)))
        query, heads = text.mean(dim=1, keepdim=True), text.shape[2] // 64
        emb = emb + self.attend("cond_pooling.attention", query, text, mask, heads)[:, 0]

        def both(name, x):
            return self.text_block(f"{name}.1", self.res_block(f"{name}.0", x, 32, emb), emb, text, mask)

        skips = [self.conv("in_conv.conv", x, padding=1)]
        for k in range(3 * levels - 1):
            down = f"in_blocks.{k}.down_op"
            skips.append(self.conv(down, skips[-1], stride=2, padding=1) if f"{down}.weight" in self
                         else both(f"in_blocks.{k}", skips[-1]))
        x = self.res_block("middle_block.2", both("middle_block", skips[-1]), 32, emb)
        for k in reversed(range(3 * levels)):  # counted from the largest image
            x = both(f"out_blocks.{k}", torch.cat([x, skips.pop()], dim=1))
            if f"out_blocks.{k}.2.up_op.weight" in self:
                x = self.conv(f"out_blocks.{k}.2.up_op", F.interpolate(x, scale_factor=2), padding=1)
        return self.conv("outc.conv.conv", x)

    def moments(self, img, levels):
        x = self.res_block("inc", img, 8)
        for i in range(levels - 1):
            x = self.conv(f"encoders.{i}.down_op.down_op", x, stride=2, padding=1)
            x = self.res_block(f"encoders.{i}.conv_block", x, 8)
        return self.conv("out_enc.1.conv", self.conv("out_enc.0.conv", x, padding=1)).chunk(2, dim=1)

    def decode(self, z, levels):
        x = self.res_block("inc_dec", z, 8)
        for i in reversed(range(levels - 1)):
            half = self.conv("outc_ver.0.conv", x) if i == 0 else None
            x = self.conv(f"decoders.{i}.up_op.up_op", F.interpolate(x, scale_factor=2), padding=1)
            x = self.res_block(f"decoders.{i}.conv_block", x, 8)
        return self.conv("outc.conv", x), half


@torch.no_grad()
@pytest.mark.parametrize("self_conditioning", [False, True])
def test_the_released_unet_is_its_arithmetic_spelled_out(self_conditioning):
    torch.manual_seed(0)
    config = UNetConfig(4, (32, 32, 64, 96), 128, 24, n_heads=8, self_conditioning=self_conditioning)
    tensors = in_released_names(randomised(UNet(config)), release.unet_names(config))
    x, previous, text, t = *torch.randn(2, 2, 4, 8, 8), torch.randn(2, 6, 24), torch.tensor([3, 700])
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]]).bool()
    released = Released(tensors)
    expected = released.unet(torch.cat([x, previous], dim=1) if self_conditioning else x, t, text, mask,
                             levels=3)
    ours = release.unet_from_release(tensors)
    assert ours.config == config
    out = ours(x, t, text, mask, previous) if self_conditioning else ours(x, t, text, mask)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert tensors.keys() <= released.read


@torch.no_grad()
def test_the_released_vae_is_its_arithmetic_spelled_out():
    torch.manual_seed(0)
    config = VAEConfig((8, 16, 24, 32), 4)
    tensors = in_released_names(randomised(VAE(config)), release.vae_names(config))
    img, released, ours = torch.rand(2, 3, 32,
                                     32) * 2 - 1, Released(tensors), release.vae_from_release(tensors)
    mu, logvar = released.moments(img, levels=4)
    assert logvar.abs().max() < 20  # within the clamp
    for out, expected in zip((*ours.moments(img), *ours.decode_unscaled(mu)),
                             (mu, logvar, *released.decode(mu, 4)), strict=True):
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert tensors.keys() <= released.read and ours.latent_scale == 1


def test_the_paper_presets_schedule_is_the_posterior_of_ddpm():
    """Betas are squares of equally spaced roots; a step has the mean and variance of DDPM's Eq. 7."""
    alpha_bar, t = msdm.DIFFUSION["paper"].alpha_bar(), 400
    beta = torch.linspace(0.002**0.5, 0.02**0.5, 1000, dtype=torch.float64) ** 2
    torch.testing.assert_close(alpha_bar, (1 - beta).cumprod(dim=0))
    x_0, x_t, visited = torch.tensor([0.3]), torch.tensor([-0.7]), []

    def denoise(x, t):
        visited.append(x)
        return x_0, None

    for noise in (0.0, 1.0):
        diffusion.ddpm(denoise, x_t, alpha_bar, torch.tensor([t, t - 1]),
                       lambda noise=noise: torch.tensor([noise]))
    before, now = alpha_bar[t - 1], alpha_bar[t]
    mean = before.sqrt() * beta[t] / (1 - now) * 0.3 - (1 - beta[t]).sqrt() * (1 - before) / (1 - now) * 0.7
    close(visited[1], mean.float().view(1), 1e-6)
    close((visited[3] - visited[1]) ** 2, (beta[t] * (1 - before) / (1 - now)).float().view(1), 1e-6)


# The released code's own weights and outputs


@torch.no_grad()
def test_recorded_outputs_of_the_released_code():
    for kind in ("plain", "selfcond"):
        net = release.unet_from_release(fixture(f"mmcp-release/unet-{kind}.safetensors"))
        assert net.config == UNetConfig(8, (32, 32, 64, 96), 64, 24, self_conditioning=kind == "selfcond")
        r = recorded(f"mmcp-release/unet-{kind}-recorded.safetensors")
        close(net(r["x_t"], r["t"], r["context"], r["context_mask"]), r["out"], 1e-4)

    vae = release.vae_from_release(load_safetensors(fixture("mmcp-release/vae.safetensors"))[0])
    r = recorded("mmcp-release/vae-recorded.safetensors")
    mu, logvar = vae.moments(r["image"])
    decoded, half = vae.decode_unscaled(mu)
    close(vae.decode(vae.encode(r["image"])), r["decoded_mean"], 1e-4)
    for ours, theirs in ((mu, "mean"), (logvar, "logvar"), (decoded, "decoded_mean"),
                         (half, "half_resolution_output")):
        close(ours, r[theirs], 1e-4)

    r = recorded("mmcp-release/schedule-recorded.safetensors")
    alpha_bar = msdm.DIFFUSION["paper"].alpha_bar()
    before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    beta = 1 - alpha_bar / before
    close(alpha_bar.float(), r["alphas_cumprod"], 1e-6)
    close(beta.float(), r["betas"], 1e-6)
    close((beta * before.sqrt() / (1 - alpha_bar)).float(), r["posterior_mean_coef1"], 1e-4)
    close(((1 - before) * (1 - beta).sqrt() / (1 - alpha_bar)).float(), r["posterior_mean_coef2"], 1e-4)
    close((beta * (1 - before) / (1 - alpha_bar)).float(), r["posterior_variance"], 1e-6)

    for name, network, rules in (
            ("unet-paper-plain", lambda: UNet(UNetConfig(self_conditioning=False)),
             release.unet_names(UNetConfig())),
            ("unet-paper-selfcond", lambda: UNet(UNetConfig()), release.unet_names(UNetConfig())),
            ("vae-paper", lambda: VAE(VAEConfig()), release.vae_names(VAEConfig()))):
        released = json.loads(fixture(f"mmcp-release/{name}-manifest.json").read_text())
        with torch.device("meta"):
            ours = {k: list(v.shape) for k, v in network().state_dict().items() if k != "latent_scale"}
        assert {rename(k, rules): v for k, v in released.items()} == ours
        assert len(released) == len(ours)
        assert {rename(k, rules, back=True) for k in ours} == released.keys()


# Import


def in_released_names(module, rules):
    return {rename(k, rules, back=True): v for k, v in module.state_dict().items() if k != "latent_scale"}


def randomised(network):
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return network.eval()


@pytest.fixture
def released(tmp_path):
    """A U-Net and a VAE with random weights, written under the released names."""
    torch.manual_seed(0)
    unet = randomised(UNet(UNetConfig(4, (32, 32, 64), 64, 16, n_heads=8)))
    vae = randomised(VAE(VAEConfig((8, 16, 16), 4)))
    save_safetensors(tmp_path / "unet.safetensors", in_released_names(unet, release.unet_names(unet.config)))
    torch.save({"state_dict": in_released_names(vae, release.vae_names(vae.config))}, tmp_path / "vae.ckpt")
    return tmp_path, unet, vae


def test_import_writes_a_checkpoint_with_the_same_weights(released, capsys):
    folder, unet, vae = released
    release.main(["--unet", str(folder / "unet.safetensors"), "--vae", str(folder / "vae.ckpt"), "--size",
                  "32",
               "--out", str(folder / "ours.safetensors")])
    tensors, meta = load_safetensors(folder / "ours.safetensors")
    assert meta["text"] == {"name": "openai/clip-vit-large-patch14",
                            "length": 64, "hash": None} and meta["diffusion"]["prediction"] == "eps"
    expected = {f"unet.{k}": v for k, v in unet.state_dict().items()} | {f"vae.{k}": v for k,
                                                                         v in vae.state_dict().items()}
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[k], v) for k, v in expected.items())
    assert f"{sum(p.numel() for p in unet.parameters()):,}" in capsys.readouterr().out


def test_files_that_are_not_the_release_are_refused_by_name(released):
    folder, unet, _ = released
    with pytest.raises(BadInput, match="not the released U-Net"):
        release.unet_from_release(folder / "vae.ckpt")
    with pytest.raises(BadInput, match="not the released VAE"):
        release.vae_from_release(str(folder / "unet.safetensors"))
    tensors = in_released_names(unet, release.unet_names(unet.config))
    del tensors["middle_block.2.local_embedder.1.bias"]
    with pytest.raises(BadInput, match="not set: middle_block.2.local_embedder.1.bias"):
        release.unet_from_release(tensors)
