"""Speed against the machine's own matmul rate, measured in the same run: the paper's U-Net, caches, metrics.

Every row is a ratio or a time with its limit; MISS means that the limit was not held here.

    python tests/bench.py [unet] [cache] [metrics]
"""

import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402 - the project's root is not on the path of a script in tests/

import msdm  # noqa: E402
import optim  # noqa: E402
from unet import PRESETS, UNet  # noqa: E402
from vae import VAE, VAEConfig  # noqa: E402

GFLOP = 74.3  # of the paper's U-Net for one latent of 32 x 32 and 64 tokens


def seconds(f, repeats=3):
    """The best of a few calls, after one that does not count."""
    best = float("inf")
    for _ in range(repeats + 1):
        start = time.perf_counter()
        f()
        best = min(best, time.perf_counter() - start)
    return best


def matmul_rate(n=3072):
    """GFLOP/s of a square float32 product."""
    a, b = torch.randn(n, n), torch.randn(n, n)
    return 2 * n**3 / seconds(lambda: a @ b) / 1e9


def batch(b):
    config = PRESETS["paper"]
    text, mask = torch.randn(b, 64, config.text_dim), torch.ones(b, 64).bool()
    return torch.randn(b, 8, 32, 32), torch.randint(1000, (b,)), text, mask


def step(net, opt, x_0, t, text, mask):
    """One training step of the paper preset without self-conditioning's second pass."""
    alpha_bar = msdm.Diffusion().alpha_bar().float()
    eps = torch.randn_like(x_0)
    msdm.loss_fn(net, x_0, text, mask, t, eps, alpha_bar, msdm.Diffusion(), "l1").backward()
    opt.step(1.0)
    opt.zero_grad()


def unet_rows(b=4):
    net = UNet(replace(PRESETS["paper"], dropout=0.0)).to(memory_format=torch.channels_last)
    x, t, text, mask = batch(b)
    rate = matmul_rate()
    with torch.inference_mode():
        forward = b * GFLOP / seconds(lambda: net(x, t, text, mask)) / rate
    opt = optim.Optimizers(dict(net.named_parameters()), 1e-4)
    a_step = seconds(lambda: step(net, opt, x, t, text, mask), repeats=2)
    train = 3 * b * GFLOP / a_step / max(rate, matmul_rate())
    name = f"paper U-Net, batch {b}, share of {rate:.0f} GFLOP/s matmul"
    yield f"{name}: forward", forward, forward >= 0.70
    yield f"{name}: training step", train, train >= 0.50


def cache_rows(b=2):
    """A step on cached latents and text states against one that encodes its pictures and prompts."""
    from transformers import CLIPTextConfig, CLIPTextModel

    net = UNet(PRESETS["paper"]).to(memory_format=torch.channels_last)
    vae = VAE(VAEConfig()).eval().requires_grad_(False)
    clip = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                                        num_attention_heads=12))
    clip.eval().requires_grad_(False)
    opt = optim.Optimizers(dict(net.named_parameters()), 1e-4)
    img, ids = torch.rand(b, 3, 256, 256) * 2 - 1, torch.randint(1, 49000, (b, 64))
    latents, states = torch.randn(1000, 1, 16, 32, 32).half(), torch.randn(500, 64, 768)
    x, t, text, mask = batch(b)

    def cached():
        rows = torch.randint(500, (b,))
        mu, _ = latents[rows, 0].float().chunk(2, dim=1)
        step(net, opt, mu, t, states[rows], mask)

    def uncached():
        step(net, opt, vae.encode(img), t, clip(input_ids=ids).last_hidden_state, mask)

    alone = seconds(lambda: step(net, opt, x, t, text, mask), repeats=2)
    with_cache, without = seconds(cached, repeats=2), seconds(uncached, repeats=2)
    gain = without / with_cache
    yield "step on caches, times as fast as one that encodes", gain, gain >= 1.15
    yield "step on caches, share of the U-Net's step alone", alone / with_cache, alone / with_cache >= 0.95


def main():
    chosen = set(sys.argv[1:]) or {"unet", "cache", "metrics"}
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name, rows in (("unet", unet_rows), ("cache", cache_rows)):
        if name in chosen:
            for what, value, good in rows():
                print(f"{'ok  ' if good else 'MISS'} {what} {value:.2f}", flush=True)
    if "metrics" in chosen:
        import bench_metrics

        for what, result, good in bench_metrics.rows():
            figures = ", ".join(f"{k} {v:.3g}" for k, v in result.items() if isinstance(v, (int, float)))
            print(f"{'ok  ' if good else 'MISS'} {what}: {figures}", flush=True)


if __name__ == "__main__":
    main()
