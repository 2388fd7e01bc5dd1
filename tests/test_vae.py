from command import BadInput

import argparse
import math

import latents
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torchvision.models import vgg16

import data
import training
import vae as vaes
from vae import VAE, VAEConfig, kl_divergence, ssim

SMALL = VAEConfig(channels=(8, 16, 16), latent_channels=4)
WEIGHTS = ("kl_weight", "l1_weight", "half_weight")


def images(n=2, size=32, seed=0):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_the_papers_size_to_the_last_parameter():
    with torch.device("meta"):
        assert sum(p.numel() for p in VAE(VAEConfig()).parameters()) == 13_365_094


def test_shapes_and_factor():
    vae = VAE(SMALL)
    z = vae.encode(images())
    assert vae.factor == 4 and z.shape == (2, 4, 8, 8) and vae.decode(z).shape == (2, 3, 32, 32)
    assert VAE(VAEConfig(channels=(8, 8, 8, 8))).factor == 8


def test_encode_and_decode_own_the_latent_scale():
    vae = VAE(SMALL)
    mu, _ = vae.moments(images())
    vae.latent_scale.fill_(3.0)
    torch.testing.assert_close(vae.encode(images()), 3 * mu)
    torch.testing.assert_close(vae.decode(3 * mu), vae.decode_unscaled(mu)[0])


def test_measured_scale_gives_unit_variance():
    vae = VAE(SMALL)
    pixels = ((images(40) + 1) * 127.5).to(torch.uint8)
    vae.latent_scale.copy_(vaes.measure_scale(vae, pixels, training.start("cpu")))
    z = vae.encode(pixels.float() / 127.5 - 1, torch.Generator().manual_seed(0))
    assert z.var().item() == pytest.approx(1.0, rel=0.02)


def test_encoding_with_a_generator_is_repeatable_and_noisy():
    vae = VAE(SMALL)
    a, b = (vae.encode(images(), torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(a, b) and not torch.allclose(a, vae.encode(images()))


def test_kl_of_known_gaussians():
    assert kl_divergence(torch.zeros(3), torch.zeros(3)) == 0
    mu, logvar = torch.tensor([1.0]), torch.tensor([math.log(4.0)])
    assert kl_divergence(mu, logvar).item() == pytest.approx(0.5 * (1 + 4 - 1 - math.log(4)))


def test_ssim_of_itself_is_one_and_noise_lowers_it():
    x = images()
    torch.testing.assert_close(ssim(x, x), torch.ones(2))
    noise = images(seed=1)
    assert (ssim(x, 0.9 * x + 0.1 * noise) > ssim(x, 0.5 * x + 0.5 * noise)).all()


def test_ssim_is_wangs_formula_under_scipys_gaussian_window():
    a = images().double()
    b = 0.7 * a + 0.2 + 0.1 * images(seed=1)

    def window(y):  # radius int(3.5 * 1.5 + 0.5) = 5: 11 x 11; those that lie inside
        return torch.from_numpy(gaussian_filter(y.numpy(), 1.5, truncate=3.5, axes=(2, 3)))[..., 5:-5, 5:-5]

    mu_a, mu_b, c_1, c_2 = window(a), window(b), (0.01 * 2) ** 2, (0.03 * 2) ** 2
    var_a, var_b, cov = window(a * a) - mu_a**2, window(b * b) - mu_b**2, window(a * b) - mu_a * mu_b
    index = (2 * mu_a * mu_b + c_1) * (2 * cov + c_2) / ((mu_a**2 + mu_b**2 + c_1) * (var_a + var_b + c_2))
    torch.testing.assert_close(ssim(a, b), index.mean(dim=(1, 2, 3)))


def test_the_loss_does_not_depend_on_the_images_size():
    torch.manual_seed(0)
    vae = VAE(SMALL)
    small = images(1, 32)
    large = small.repeat(1, 1, 4, 4)
    a, b = (vaes.loss_fn(vae, x, torch.randn(vae.latent_shape(x)), None, 1e-4, 1.0, 1.0)[0].item()
            for x in (small, large))
    assert a == pytest.approx(b, rel=0.1)


def medfusions_loss(vae, img, eps, distance):
    """The released loss, literally: all is summed and divided by the batch, and an image's distance and
    1 - SSIM are broadcast over c x h x w. The target at half resolution is ours (average pooling)."""
    mu, logvar = vae.moments(img)
    out, half = vae.decode_unscaled(mu + (0.5 * logvar).exp() * eps)
    total = 1e-6 * 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum()
    for x, y in ((out, img), (half, F.avg_pool2d(img, 2))):
        of_an_image = (distance(x, y) + 1 - ssim(x, y)).view(-1, 1, 1, 1)
        total = total + ((x - y) ** 2 + of_an_image).sum()
    return total / len(img)


@pytest.mark.parametrize("far", [1.0, 3e4], ids=["reconstruction", "divergence"])
def test_the_paper_presets_weights_are_those_of_the_papers_sums(far):
    """far: how far the latents lie from N(0, 1); at 3e4 the divergence is the greater part of the loss."""
    torch.manual_seed(0)
    vae, img = VAE(VAEConfig(channels=(8, 8, 8, 8),
                             latent_channels=8)), images(size=32)  # 8 x down, 8 channels: as the paper
    torch.nn.init.normal_(vae.to_half.weight, std=0.1 / far)
    torch.nn.init.normal_(vae.to_img.weight, std=0.1 / far)
    torch.nn.init.normal_(vae.to_moments[1].bias[:8], std=far)
    eps = torch.randn(vae.latent_shape(img))

    def distance(x, y):  # in the place of VGG's
        return (x - y).abs().mean(dim=(1, 2, 3))

    weights = {k: vaes.TRAINING["paper"][k] for k in WEIGHTS}
    ours, expected = vaes.loss_fn(vae, img, eps, distance, **weights)[0], medfusions_loss(vae, img, eps,
                                                                                          distance)
    assert ours.item() * img[0].numel() == pytest.approx(expected.item(),
                                                         rel=0.01)  # 4.2e-8 stands for 4.17e-8
    grads = [torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(vae.parameters()))])
             for loss in (ours, expected)]
    assert F.cosine_similarity(*grads, dim=0) > 0.9999
    share = 1e-6 * len(mu := vae.moments(img)[0].flatten()) * 0.5 * mu.square().mean() / 2 / expected
    assert (share > 0.5) == (far > 1)


def test_validation_twice_is_one_number_and_leaves_the_network():
    torch.manual_seed(0)
    vae = VAE(SMALL)
    for p in vae.parameters():  # a fresh decoder is zero and would hide the noise of the latents
        torch.nn.init.normal_(p, std=0.1)
    settings = argparse.Namespace(**{k: vaes.TRAINING["tiny"][k] for k in WEIGHTS})
    objective = vaes.Objective(vae, None, settings, torch.device("cpu"))
    held_out = data.to_uint8(images(20))
    world = training.start("cpu")
    first = objective.validate(held_out, world)
    torch.rand(1)  # what is drawn between two validations plays no part
    assert objective.validate(held_out, world) == first and first[0] > 0
    assert all(p.grad is None for p in vae.parameters())


def test_one_batch_overfits():
    torch.manual_seed(0)
    vae, x = VAE(SMALL), torch.nn.functional.interpolate(images(size=4), size=32, mode="bilinear")
    opt = torch.optim.Adam(vae.parameters(), lr=5e-3)
    g = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(40):
        eps = torch.randn(vae.latent_shape(x), generator=g)
        loss, _ = vaes.loss_fn(vae, x, eps, None, 1e-6, 1.0, 1.0)
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def vgg_weights():
    """Small random weights under torchvision's names; the classifier's are one number each, expanded."""
    g = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in vgg16().state_dict().items()}
    return {k: 0.05 * torch.randn(s if k.startswith("features") else (1,) * len(s), generator=g).expand(s)
            for k, s in shapes.items()}


def test_perceptual_loss_is_equation_1_of_lpips_after_five_stages():
    weights, (a, b) = vgg_weights(), (images(), images(seed=1))
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    x, y = (((img + 1) / 2 - mean) / std for img in (a, b))
    expected = torch.zeros(2)
    for stage in ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21),
                  (24, 26, 28)):  # convolutions of vgg16().features
        if stage[0]:
            x, y = F.max_pool2d(x, 2), F.max_pool2d(y, 2)
        for i in stage:
            x, y = (F.conv2d(z, weights[f"features.{i}.weight"], weights[f"features.{i}.bias"],
                             padding=1).relu()
                    for z in (x, y))
        unit_x, unit_y = (z / z.square().sum(dim=1, keepdim=True).sqrt() for z in (x, y))
        expected += (unit_x - unit_y).square().sum(dim=1).mean(dim=(1, 2))
    loss = vaes.Perceptual(weights)
    torch.testing.assert_close(loss(a, b), expected)
    assert loss(a, a).abs().max() == 0 and (expected > 1e-3).all()


def test_perceptual_loss_from_a_file_in_torchvisions_format(tmp_path):
    file = tmp_path / "vgg.pth"
    torch.save(vgg_weights(), file)
    loss, file_hash = vaes.find_perceptual(str(file))
    assert isinstance(loss, vaes.Perceptual) and len(file_hash) == 64
    with pytest.raises(BadInput, match="no such file"):
        vaes.find_perceptual(str(tmp_path / "absent.pth"))
    assert vaes.find_perceptual("off") == (None, "off")


def test_a_channel_of_noise_is_told_from_a_smooth_one():
    noise = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    noise[:, 1] = F.avg_pool2d(F.pad(noise[:, 1], (2, 2, 2, 2)), 5, stride=1)  # neighbours share 20 of 25
    noise[:, 2] = 3 + 2 * noise[:, 0]
    white, smooth, moved = latents.rows_of(noise, torch.full_like(noise, math.log(0.04)))
    assert abs(white["neighbours"]) < 0.02 and white["4x4"] == pytest.approx(1 / 16, rel=0.1)
    assert smooth["neighbours"] == pytest.approx(0.8, abs=0.05) and smooth["4x4"] > 0.5
    assert moved["mean"] == pytest.approx(3, abs=0.05) and moved["deviation"] == pytest.approx(2, abs=0.05)
    assert moved["neighbours"] == pytest.approx(white["neighbours"], abs=1e-5)
    assert white["of the draw"] == pytest.approx(0.2)
