"""The weights of the paper's released code in our networks. The recorded files lie beside the project and are not copied."""

import json

import pytest
import torch
from reference import close, fixture, recorded

import diffusion
import msdm
import release
from command import BadInput
from files import load_safetensors, save_safetensors
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig
from weights import rename


@pytest.mark.parametrize("kind", ["plain", "selfcond"])
def test_the_released_unet_answers_as_recorded(kind):
    net = release.unet_from_release(fixture(f"mmcp-release/unet-{kind}.safetensors"))
    assert net.config == UNetConfig(8, (32, 32, 64, 96), 64, 24, self_conditioning=kind == "selfcond")
    r = recorded(f"mmcp-release/unet-{kind}-recorded.safetensors")
    with torch.no_grad():
        close(net(r["x_t"], r["t"], r["context"], r["context_mask"]), r["out"], 1e-4)


def test_the_released_vae_answers_as_recorded():
    vae = release.vae_from_release(load_safetensors(fixture("mmcp-release/vae.safetensors"))[0])
    r = recorded("mmcp-release/vae-recorded.safetensors")
    with torch.no_grad():
        mu, logvar = vae.moments(r["image"])
        decoded, half = vae.decode_unscaled(mu)
        close(vae.decode(vae.encode(r["image"])), r["decoded_mean"], 1e-4)
    for ours, theirs in ((mu, "mean"), (logvar, "logvar"), (decoded, "decoded_mean"), (half, "half_resolution_output")):
        close(ours, r[theirs], 1e-4)


def test_the_released_schedule_is_the_paper_presets():
    r = recorded("mmcp-release/schedule-recorded.safetensors")
    alpha_bar = msdm.DIFFUSION["paper"].alpha_bar()
    before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    beta = 1 - alpha_bar / before
    close(alpha_bar.float(), r["alphas_cumprod"], 1e-6)
    close(beta.float(), r["betas"], 1e-6)
    close((beta * before.sqrt() / (1 - alpha_bar)).float(), r["posterior_mean_coef1"], 1e-4)
    close(((1 - before) * (1 - beta).sqrt() / (1 - alpha_bar)).float(), r["posterior_mean_coef2"], 1e-4)
    close((beta * (1 - before) / (1 - alpha_bar)).float(), r["posterior_variance"], 1e-6)
    # and the posterior that the solver draws from is the recorded one
    t = 400
    x_0, x_t = torch.tensor([0.3]), torch.tensor([-0.7])
    drawn = diffusion.ddpm(lambda x, _: (x_0, torch.tensor(-1e4)), x_t, alpha_bar[:t + 1], torch.tensor([t]), None)
    close(drawn, x_0, 1e-6)  # a single step lands on x_0
    means = []
    diffusion.ddpm(lambda x, _: (means.append(x), (x_0, torch.tensor(-1e4)))[1], x_t, alpha_bar, torch.tensor([t, t - 1]),
                 lambda: torch.zeros(1))
    close(means[1], r["posterior_mean_coef1"][t] * x_0 + r["posterior_mean_coef2"][t] * x_t, 1e-4)


@pytest.mark.parametrize("name, network, rules", [
    ("unet-paper-plain", lambda: UNet(UNetConfig(self_conditioning=False)), release.unet_names(UNetConfig())),
    ("unet-paper-selfcond", lambda: UNet(UNetConfig()), release.unet_names(UNetConfig())),
    ("vae-paper", lambda: VAE(VAEConfig()), release.vae_names(VAEConfig())),
])
def test_every_released_tensor_has_one_place(name, network, rules):
    released = json.loads(fixture(f"mmcp-release/{name}-manifest.json").read_text())
    with torch.device("meta"):
        ours = {k: list(v.shape) for k, v in network().state_dict().items() if k != "latent_scale"}
    assert {rename(k, rules): v for k, v in released.items()} == ours
    assert len(released) == len(ours)
    assert {rename(k, rules, back=True) for k in ours} == released.keys()


def in_released_names(module, rules):
    return {rename(k, rules, back=True): v for k, v in module.state_dict().items() if k != "latent_scale"}


@pytest.fixture
def released(tmp_path):
    """A U-Net and a VAE with random weights, written under the released names."""
    torch.manual_seed(0)
    unet = UNet(UNetConfig(4, (32, 32, 64), 64, 16, n_heads=8))
    vae = VAE(VAEConfig((8, 16, 16), 4))
    for p in [*unet.parameters(), *vae.parameters()]:
        torch.nn.init.normal_(p, std=0.1)
    save_safetensors(tmp_path / "unet.safetensors", in_released_names(unet, release.unet_names(unet.config)))
    torch.save({"state_dict": in_released_names(vae, release.vae_names(vae.config))}, tmp_path / "vae.ckpt")
    return tmp_path, unet, vae


def test_import_writes_a_checkpoint_with_the_same_weights(released, capsys):
    folder, unet, vae = released
    release.main(["--unet", str(folder / "unet.safetensors"), "--vae", str(folder / "vae.ckpt"), "--size", "32",
               "--out", str(folder / "ours.safetensors")])
    tensors, meta = load_safetensors(folder / "ours.safetensors")
    assert meta["text"] == {"name": "openai/clip-vit-large-patch14", "length": 64} and meta["diffusion"]["prediction"] == "eps"
    expected = {f"unet.{k}": v for k, v in unet.state_dict().items()} | {f"vae.{k}": v for k, v in vae.state_dict().items()}
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
