"""Training in float16: a scaled loss, steps that overflow, the scale in a run's state."""

import command

import math

import numpy as np
import pytest
import torch
from helpers import log_lines, tiny_msdm

import data
import msdm
import optim
import phantom
import sampler
import training
import unet
import vae
from files import save_safetensors

BadInput = command.BadInput


class Matrices:
    """Two matrices for Muon and a bias for AdamW, trained in float16 as far as a dtype says so."""

    def __init__(self, dtype=torch.float16, folder=None):
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.SiLU(), torch.nn.Linear(8, 4))
        self.params = dict(self.net.named_parameters())
        self.opt = optim.Optimizers(self.params, 1e-2, muon_lr=1e-2)
        self.ema, self.dtype, self.spoil = training.EMA(self.params, 0.9), dtype, lambda loss: loss
        self.step = training.Step(self, self.params, self.opt, self.ema, training.start("cpu"), dtype=dtype)
        self.run = folder and training.Run(folder, {"lr": 1}, "data", training.start("cpu"))

    def loss(self, batch):
        with training.autocast(torch.device("cpu"), self.dtype):
            return self.spoil((self.net(batch.x).float() - 1).abs().mean())

    def on_device(self, batch):
        return batch

    def take(self, n):
        """(loss, norm) of step n, settled; None for what is not finite, which is not equal to itself."""
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(n))
        loss, norm = self.step(training.Batch(x=x), 1.0, n)
        self.step.settle()
        return tuple(x if math.isfinite(x) else None for x in (loss.item(), norm.item()))

    def everything(self):
        """All tensors of weights, average and optimisers, and the scale; copies."""
        found = {**self.params, **{f"average {k}": v for k, v in self.ema.average.items()}}
        for i, part in enumerate(self.opt.state_dict()):
            found |= {f"{i} {n} {k}": v for n, own in part["state"].items() for k, v in own.items()}
        return {k: v.detach().clone() for k, v in found.items()}, self.step.scaler.get_scale()


def finite_gradient(loss):
    return loss + torch.inf


def infinite_bias(loss, p):
    return loss + 1e38 * p.sum()  # times the scale that is beyond float32; Muon's gradients stay finite


@pytest.mark.parametrize("where", ["loss", "bias"])
def test_a_step_that_overflows_is_left_out_and_halves_the_scale(where, capsys):
    m = Matrices()
    m.take(0)
    before, scale = m.everything()
    m.spoil = finite_gradient if where == "loss" else lambda loss: infinite_bias(loss, m.params["0.bias"])
    m.take(1)
    after, halved = m.everything()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert len(before) > 12 and (scale, halved, m.ema.step) == (2**16, 2**15, 2)
    assert "step 1: it overflows in float16 and is left out; from here on the loss is scaled by 32768" in (
        capsys.readouterr().err)
    m.spoil = lambda loss: loss
    m.take(2)
    after, halved = m.everything()
    assert halved == 2**15 and not any(torch.equal(before[k], after[k]) for k in m.params)
    assert all(x.isfinite().all() for x in after.values())


def test_what_always_overflows_ends_the_run_when_the_scale_is_below_one():
    m = Matrices()
    m.take(0)
    before, _ = m.everything()
    m.spoil = lambda loss: loss * math.nan
    for n in range(16):
        m.take(n)
    with pytest.raises(BadInput, match="step 16: the loss is nan and the norm of its gradient nan"):
        m.take(16)
    assert all(torch.equal(v, before[k]) for k, v in m.everything()[0].items())


def test_small_gradients_are_zero_in_float16_and_the_scale_saves_them():
    def norm(dtype, scaled):
        m = Matrices(dtype)
        m.step.scaler = torch.amp.GradScaler("cpu", enabled=scaled)
        m.spoil = lambda loss: 1e-8 * loss
        return m.take(0)[1]

    exact = norm(torch.float32, False)
    assert norm(torch.float16, False) == 0 < 1e-9 < exact  # half of float16's smallest number is 3e-8
    assert norm(torch.float16, True) == pytest.approx(exact, rel=2e-2)


def test_the_scale_alone_changes_no_bit_and_is_off_without_float16():
    plain, scaled = Matrices(torch.float32), Matrices(torch.float32)
    assert not plain.step.scaler.is_enabled() and len(plain.step.state_dict()) == 2
    scaled.step.scaler = torch.amp.GradScaler("cpu")
    assert [plain.take(n) for n in range(5)] == [scaled.take(n) for n in range(5)]
    one, other = plain.everything()[0], scaled.everything()[0]
    assert all(torch.equal(one[k], other[k]) for k in one)


def test_a_resumed_run_has_the_scale_of_the_one_that_was_not_stopped(tmp_path):
    def spoilt(m, n):
        m.spoil = finite_gradient if n in (1, 2, 6) else lambda loss: loss
        return m.take(n)

    whole = Matrices()
    losses = [spoilt(whole, n) for n in range(9)]
    first = Matrices(folder=tmp_path)
    assert first.run.restore(first.params, first.step, first.ema) == 0
    assert [spoilt(first, n) for n in range(4)] == losses[:4]
    first.run.save_progress(4, first.params, first.step, first.ema)
    again = Matrices(folder=tmp_path)
    assert again.run.restore(again.params, again.step, again.ema) == 4
    assert again.everything()[1] == 2**14
    assert [spoilt(again, n) for n in range(4, 9)] == losses[4:]
    found, expected = again.everything(), whole.everything()
    assert all(torch.equal(found[0][k], expected[0][k]) for k in expected[0]) and found[1] == expected[1]
    assert again.step.scaler.state_dict() == whole.step.scaler.state_dict()


def test_a_state_goes_on_with_or_without_a_scale(tmp_path):
    for before, now, scale in ((torch.float32, torch.float16, 2**16), (torch.float16, torch.float32, 1)):
        folder = tmp_path / str(now)
        old = Matrices(before, folder)
        old.run.restore(old.params, old.step, old.ema)
        old.take(0)
        state = old.opt if before == torch.float32 else old.step  # as runs before there was float16
        old.run.save_progress(1, old.params, state, old.ema)
        new = Matrices(now, folder)
        assert new.run.restore(new.params, new.step, new.ema) == 1
        found, expected = new.everything(), old.everything()
        assert all(torch.equal(found[0][k], expected[0][k]) for k in expected[0]) and found[1] == scale
        new.take(1)


@pytest.mark.parametrize(("device", "bfloat16", "fast", "training_s"), [
    ("cpu", True, torch.float32, torch.float32), ("cuda", True, torch.bfloat16, torch.bfloat16),
    ("cuda", False, torch.float32, torch.float16)])
def test_the_dtype_of_a_device(monkeypatch, device, bfloat16, fast, training_s):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bfloat16)
    found = [f(torch.device(device)) for f in (command.fast_dtype, command.training_dtype)]
    assert found == [fast, training_s]


# The commands


def test_vae_and_msdm_in_float16_follow_float32(tmp_path, monkeypatch, low_scale):
    """As on a GPU without bfloat16: losses, gradients and validation to 2 %."""
    phantom.main(["--out", str(tmp_path / "data"), "--n", "12", "--size", "32"])
    small = unet.UNetConfig(channels=(32, 32, 32), time_dim=64, n_heads=2)
    monkeypatch.setitem(unet.PRESETS, "tiny", small)
    flags = ["--data", tmp_path / "data", "--size", 32, "--batch-size", 4, "--steps", 5, "--log-every", 1,
             "--warmup", 0]
    commands = ((vae.main, ["--perceptual", "off"]),
                (msdm.main, ["--vae", tmp_path / "vae float32/best.safetensors", "--shown", 1,
                             "--sample-steps", 1]))
    for name, dtype in (("float32", torch.float32), ("float16", torch.float16)):
        monkeypatch.setattr(training, "training_dtype", lambda device, dtype=dtype: dtype)
        for main, more in commands:
            main(list(map(str, [*flags, *more, "--out", tmp_path / f"{main.__module__} {name}"])))
    for name in ("vae", "msdm"):
        exact, found = (log_lines(tmp_path / f"{name} {dtype}") for dtype in ("float32", "float16"))
        assert exact != found and len(found) == 6
        for one, other in zip(exact, found, strict=True):
            assert other == pytest.approx(one, rel=2e-2, abs=1e-4)


def test_msdm_samples_in_float16_and_refuses_what_is_not_finite(tmp_path):
    m, images = tiny_msdm(), []
    save_safetensors(tmp_path / "m.safetensors", m.tensors(), m.metadata())
    m.unet.conv_out.weight.data.fill_(1e38)  # beyond float16
    save_safetensors(tmp_path / "large.safetensors", m.tensors(), m.metadata())

    def sample(name, dtype):
        out = tmp_path / f"{name}-{dtype}"
        sampler.main(["--ckpt", str(tmp_path / f"{name}.safetensors"), "--prompt", "2 polyps", "--steps", "4",
                      "--solver", "dpmpp", "--dtype", dtype, "--out", str(out)])
        images.append(np.asarray(data.open_image(out / "images/000000.png")).astype(int))

    sample("m", "float32")
    sample("m", "float16")
    assert 0 < np.abs(images[0] - images[1]).max() <= 8 < images[0].std()
    with pytest.raises(BadInput, match="not finite: another --dtype"):
        sample("large", "float16")
    assert not list((tmp_path / "large-float16/images").glob("*.png"))
