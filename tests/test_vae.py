import math

import pytest
import torch

import vae as vaes
from command import BadInput
from vae import VAE, VAEConfig, kl_divergence, ssim

SMALL = VAEConfig(channels=(8, 16, 16), latent_channels=4)


def pictures(n=2, size=32, seed=0):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_the_papers_size_to_the_last_parameter():
    with torch.device("meta"):
        assert sum(p.numel() for p in VAE(VAEConfig()).parameters()) == 13_365_094


def test_shapes_and_factor():
    vae = VAE(SMALL)
    z = vae.encode(pictures())
    assert vae.factor == 4 and z.shape == (2, 4, 8, 8) and vae.decode(z).shape == (2, 3, 32, 32)
    assert VAE(VAEConfig(channels=(8, 8, 8, 8))).factor == 8


def test_encode_and_decode_own_the_latent_scale():
    vae = VAE(SMALL)
    mu, _ = vae.moments(pictures())
    vae.latent_scale.fill_(3.0)
    torch.testing.assert_close(vae.encode(pictures()), 3 * mu)
    torch.testing.assert_close(vae.decode(3 * mu), vae.decode_unscaled(mu)[0])


def test_measured_scale_gives_unit_variance():
    vae = VAE(SMALL)
    images = ((pictures(40) + 1) * 127.5).to(torch.uint8)
    vae.latent_scale.copy_(vaes.measure_scale(vae, images, "cpu"))
    z = vae.encode(images.float() / 127.5 - 1, torch.Generator().manual_seed(0))
    assert z.var().item() == pytest.approx(1.0, rel=0.02)


def test_encoding_with_a_generator_is_repeatable_and_noisy():
    vae = VAE(SMALL)
    a, b = (vae.encode(pictures(), torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(a, b) and not torch.allclose(a, vae.encode(pictures()))


def test_kl_of_known_gaussians():
    assert kl_divergence(torch.zeros(3), torch.zeros(3)) == 0
    mu, logvar = torch.tensor([1.0]), torch.tensor([math.log(4.0)])
    assert kl_divergence(mu, logvar).item() == pytest.approx(0.5 * (1 + 4 - 1 - math.log(4)))


def test_ssim_of_itself_is_one_and_noise_lowers_it():
    x = pictures()
    torch.testing.assert_close(ssim(x, x), torch.ones(2))
    noise = pictures(seed=1)
    assert (ssim(x, 0.9 * x + 0.1 * noise) > ssim(x, 0.5 * x + 0.5 * noise)).all()


def test_the_loss_does_not_depend_on_the_pictures_size():
    torch.manual_seed(0)
    vae = VAE(SMALL)
    small = pictures(1, 32)
    large = small.repeat(1, 1, 4, 4)
    a, b = (vaes.loss_fn(vae, x, torch.randn(vae.latent_shape(x)), None, 1e-4, 1.0)[0].item() for x in (small, large))
    assert a == pytest.approx(b, rel=0.1)


def test_one_batch_overfits():
    torch.manual_seed(0)
    vae, x = VAE(SMALL), torch.nn.functional.interpolate(pictures(size=4), size=32, mode="bilinear")
    opt = torch.optim.Adam(vae.parameters(), lr=5e-3)
    g = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(40):
        loss, _ = vaes.loss_fn(vae, x, torch.randn(vae.latent_shape(x), generator=g), None, 1e-6, 1.0)
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_perceptual_loss_from_a_file_in_torchvisions_format(tmp_path):
    from torchvision.models import vgg16

    torch.manual_seed(0)
    file = tmp_path / "vgg.pth"
    torch.save({k: v if v.numel() < 2**24 else torch.zeros(1).expand(v.shape) for k, v in vgg16().state_dict().items()}, file)
    loss, _ = vaes.find_perceptual(str(file))
    x = pictures()
    assert loss(x, x).abs().max() == 0 and (loss(x, pictures(seed=1)) > 0).all()
    with pytest.raises(BadInput, match="no such file"):
        vaes.find_perceptual(str(tmp_path / "absent.pth"))
    assert vaes.find_perceptual("off") == (None, "off")
