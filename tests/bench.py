"""Speed and memory on this machine, as ratios within one run: networks, trainings, sampling, metrics.

    python tests/bench.py                      # the whole table, ten minutes on two cores
    python tests/bench.py unet cache           # parts of it, of: {parts}

A row says what was measured, beside what, and their ratio; MISS means that an aim was not reached here. A
*share* is of the rate of a square float32 product in the same part, by the operations of the convolutions,
products and attentions that run. Nothing else should run on the machine.
"""

import gc
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import command  # noqa: E402, F401 - before torch; the project's root is not on the path of a script in tests/

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from gpu_speed import GFLOP, GOLDEN, REHEARSAL, Sizes, paper_msdm, stepper, without_zeros  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import lora  # noqa: E402
import movq as movqs  # noqa: E402
import msdm  # noqa: E402
import optim  # noqa: E402
import training  # noqa: E402
from diffusion import SOLVERS  # noqa: E402
from files import read_json  # noqa: E402
from kandinsky_networks import build_decoder, build_prior, build_unet3  # noqa: E402
from unet import PRESETS, InItsDtype, UNet  # noqa: E402
from vae import VAE, VAEConfig  # noqa: E402

CPU = torch.device("cpu")
TINY = Sizes(preset="tiny", latent=16, batch=16)


def seconds(f, repeats=3):
    """The best of a few calls, after one that does not count."""
    best = float("inf")
    for _ in range(repeats + 1):
        start = time.perf_counter()
        f()
        best = min(best, time.perf_counter() - start)
    return best


def matmul_rate(n=3072, dtype=torch.float32):
    """GFLOP/s of a square product."""
    a, b = (torch.randn(n, n).to(dtype) for _ in range(2))
    return 2 * n**3 / seconds(lambda: a @ b) / 1e9


def gflop(f):
    """Operations of a call, 1e9, of its convolutions, products and attentions."""
    with FlopCounterMode(display=False) as counter:
        f()
    return counter.get_total_flops() / 1e9


def row(what, value, beside="", ratio=None, aim=None):
    """Print a row; ratio and aim are numbers, a ratio below its aim is a MISS."""
    mark = "" if aim is None else "ok" if ratio >= aim else "MISS"
    shown = "" if ratio is None else f"{ratio:.2f}"
    print(f"{mark:<5}{what:<50}{value:>15}{beside:>38}{shown:>8}{'' if aim is None else f'{aim:.2f}':>7}",
          flush=True)


# The paper's U-Net


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
        forward = seconds(lambda: net(x, t, text, mask))
        share = b * GFLOP / forward / rate
        row(f"paper U-Net, batch {b}: forward", f"{forward:.2f} s", f"matmul {rate:.0f} GFLOP/s", share, 0.70)
        predict = InItsDtype(net)
        read = predict.remember(text, mask)
        known = seconds(lambda: predict(x, t, *read))
        row("  the same, its prompt read before", f"{known:.2f} s", f"not read {forward:.2f} s",
            forward / known)
        half = InItsDtype(UNet(PRESETS["paper"]).bfloat16().eval().to(memory_format=torch.channels_last))
        low = seconds(lambda: half(x, t, text, mask))
        row("  the same in bfloat16", f"{low:.2f} s", f"float32 {forward:.2f} s", forward / low)
    opt = optim.Optimizers(dict(net.named_parameters()), 1e-4)
    a_step = seconds(lambda: step(net, opt, x, t, text, mask), repeats=2)
    rate = max(rate, matmul_rate())
    row(f"paper U-Net, batch {b}: training step", f"{a_step:.2f} s", f"matmul {rate:.0f} GFLOP/s",
        3 * b * GFLOP / a_step / rate, 0.55)


def cache_rows(b=2):
    """A step on cached latents and text states against one that encodes its images and prompts."""
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
    what = f"paper, batch {b}: training step on caches"
    row(what, f"{with_cache:.2f} s", f"one that encodes {without:.2f} s", without / with_cache, 1.15)
    row("  the same", f"{with_cache:.2f} s", f"U-Net's step alone {alone:.2f} s", alone / with_cache, 0.95)


# The tiny preset: its step, compiled, in two processes, in memory; sampling


def tiny_step(**more):
    torch.manual_seed(0)
    return stepper(paper_msdm(TINY, CPU), TINY, CPU, **more)


def compile_rows():
    plain = seconds(tiny_step(p_self_cond=0.0))
    if not shutil.which("c++"):
        print("     compiled: left out, no C++ compiler on the path")
        return
    compiled = tiny_step(p_self_cond=0.0, compiled="inductor")
    start = time.perf_counter()
    compiled()
    first = time.perf_counter() - start
    fast = seconds(compiled)
    row(f"tiny, batch {TINY.batch}: training step, compiled", f"{fast:.2f} s", f"eager {plain:.2f} s",
        plain / fast)
    row("  its first step", f"{first:.0f} s")


def sampling_rows(n=16):
    model = without_zeros(paper_msdm(TINY, CPU), 0.02).eval().requires_grad_(False)
    prompts = ["Generate an image with 2 polyps."] * n
    text, mask = model.text(prompts * 2)
    x, t = torch.randn(2 * n, *model.latent_shape()), torch.full((2 * n,), 500)
    with torch.inference_mode():
        alone = seconds(lambda: model.unet(x, t, text, mask))
    model.sample(prompts, steps=2, batch_size=n)  # warms up
    for solver, steps in (("dpmpp", 20), ("ddim", 50), ("ddpm", 150)):
        start = time.perf_counter()
        model.sample(prompts, steps=steps, solver=solver, batch_size=n)
        took = time.perf_counter() - start
        row(f"tiny, {n} images of 64 px: {solver}, {steps} steps", f"{n / took:.2f} images/s",
            f"U-Net alone {n / steps / alone:.2f} images/s", steps * alone / took)
    assert set(SOLVERS) == {"dpmpp", "ddim", "ddpm"}


def process_rows():
    """Two gloo processes of a thread against one of two threads, on the same global batch."""
    one, two, again = (float(by_itself("worker", processes=n)[-1]) for n in (1, 2, 1))
    one = min(one, again)
    row("tiny, batch 16: step, two processes", f"{two:.2f} s", f"one with two threads {one:.2f} s", one / two,
        0.85)


def by_itself(function, *args, processes=1):
    """The words that a function of this file prints in a process of its own, or in two of one thread each."""
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2"] * (processes == 2)
    words = [sys.executable, *launch, __file__, function, *map(str, args)]
    threads = {"OMP_NUM_THREADS": str(2 // processes)}
    done = subprocess.run(words, check=True, text=True, stdout=subprocess.PIPE, env=os.environ | threads)
    return done.stdout.split()


def worker():
    """Print the time of a training step in this process, of several if torchrun has started it."""
    world = training.start("cpu")
    sizes = replace(TINY, batch=16 // world.size)
    took = seconds(stepper(paper_msdm(sizes, CPU), sizes, CPU, world=world, p_self_cond=0.0), repeats=6)
    if world.is_main:
        print(took)


def memory_rows(steps=2000, warm_up=400):
    """Resident memory of a process that trains a small U-Net, over its steps."""
    if not Path("/proc/self/status").exists():
        print("     memory: left out, no /proc on this system")
        return
    first, last = map(float, by_itself("held", steps, warm_up)[-2:])
    row(f"resident memory, last {warm_up} of {steps:,} steps", f"{last:.3f} GiB",
        f"first {warm_up} steps {first:.3f} GiB", first / last, 0.98)


def held(steps, warm_up):
    """Print the most resident memory, GiB, of the first and the last warm_up steps of a training."""
    step, found = stepper(paper_msdm(REHEARSAL, CPU), REHEARSAL, CPU, p_self_cond=0.0), []
    for _ in range(int(steps)):
        step()
        status = Path("/proc/self/status").read_text()
        found.append(int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 2**20)
    print(max(found[:int(warm_up)]), max(found[-int(warm_up):]))


# Autoencoders and Kandinsky


def share_row(what, f, rate, images=None):
    took = seconds(f, repeats=1)
    value = f"{took:.2f} s" if images is None else f"{images / took:.2f} images/s"
    row(what, value, f"matmul {rate:.0f} GFLOP/s", gflop(f) / took / rate)
    return took


class InterpolatingNorm(movqs.SpatialNorm):
    """The same normalisation with its scale and shift interpolated to the size of x, as it once was."""

    def forward(self, x, z):
        scale, shift = (F.interpolate(y, size=x.shape[-2:], mode="nearest")
                        for y in (self.scale(z), self.shift(z)))
        return self.plain(x) * scale + shift


def published(build, name, **changes):
    """A network of a published config, perhaps changed, with random weights, frozen."""
    network = build(read_json(GOLDEN / f"manifests/{name}.json")["config"] | changes)
    return without_zeros(network, 0.02).eval().requires_grad_(False)


@torch.inference_mode()
def autoencoder_rows(b=4):
    vae = VAE(VAEConfig()).eval().to(memory_format=torch.channels_last)
    img, rate = torch.rand(b, 3, 256, 256) * 2 - 1, matmul_rate()
    z = vae.encode(img)
    share_row("paper's autoencoder, 256 px: encode", lambda: vae.encode(img), rate, b)
    share_row("  decode", lambda: vae.decode(z), rate, b)
    movq = published(movqs.build_movq, "kandinsky-2-2-movq")
    z = torch.randn(1, 4, 32, 32)
    as_it_is = share_row("MoVQ of 2.2, 256 px: decode", lambda: movq.decode(z), rate, 1)
    for module in movq.modules():
        if type(module) is movqs.SpatialNorm:
            module.__class__ = InterpolatingNorm
    before = seconds(lambda: movq.decoder(movq.post_quant_conv(z), z), repeats=2)
    row("  the same", f"{as_it_is:.2f} s", f"as it once was {before:.2f} s", before / as_it_is, 1.15)


def kandinsky_rows():
    """Published networks of half the width: forward pass, and a step of an adapter of rank 16."""
    half, rate = [192, 384, 576, 768], matmul_rate()
    t, mask, z = torch.tensor([500]), torch.ones(1, 77, dtype=torch.bool), torch.randn(1, 4, 32, 32)
    prior = published(build_prior, "kandinsky-2-2-prior", num_attention_heads=16)
    text = torch.randn(1, 1280), torch.randn(1, 77, 1280), mask
    adapter_rows("prior", prior, (torch.randn(1, 1280), t, *text), rate)
    decoder = published(build_decoder, "kandinsky-2-2-unet", block_out_channels=half)
    adapter_rows("decoder, 256 px", decoder, (z, t, torch.randn(1, 1280)), rate)
    unet3 = published(build_unet3, "kandinsky-3-unet", block_out_channels=[192, 384, 768, 1536])
    adapter_rows("U-Net 3, 256 px", unet3, (z, t, torch.randn(1, 77, 4096), mask), rate)


def adapter_rows(name, network, inputs, rate):
    with torch.inference_mode():
        forward = share_row(f"Kandinsky's {name}, half width: forward", lambda: network(*inputs), rate)
    lora.inject(network, lora.LoRAConfig(rank=16, alpha=16))
    opt = optim.Optimizers(lora.tensors(network), 1e-4)

    def a_step():
        network(*inputs).square().mean().backward()
        opt.step(1.0)
        opt.zero_grad()

    took = seconds(a_step, repeats=1)
    row("  a step of its adapter", f"{took:.2f} s", f"forward {forward:.2f} s", forward / took)
    network.train().gradient_checkpointing = True
    again = seconds(a_step, repeats=1)
    row("  the same with gradient checkpointing", f"{again:.2f} s", f"without {took:.2f} s", took / again)


def metrics_rows():
    import bench_metrics

    for what, result, good in bench_metrics.rows():
        figures = ", ".join(f"{k} {v:.3g}" for k, v in result.items() if isinstance(v, (int, float)))
        print(f"{'ok' if good else 'MISS':<5}{what}: {figures}", flush=True)


PARTS = {"unet": unet_rows, "cache": cache_rows, "compile": compile_rows, "sampling": sampling_rows,
         "autoencoder": autoencoder_rows, "kandinsky": kandinsky_rows, "processes": process_rows,
         "memory": memory_rows, "metrics": metrics_rows}
__doc__ = __doc__.format(parts=", ".join(PARTS))


def main():
    chosen = sys.argv[1:] or list(PARTS)
    if unknown := [name for name in chosen if name not in PARTS]:
        print(__doc__, f"no part {', '.join(unknown)}", sep="\n", file=sys.stderr)
        return 2
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}, "
          f"{time.strftime('%Y-%m-%d')}")
    print(f"{'':<5}{'what':<50}{'measured':>15}{'beside':>38}{'ratio':>8}{'aim':>7}")
    start = time.perf_counter()
    for name in chosen:
        PARTS[name]()
        gc.collect()
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    by_itself_only = {"worker": worker, "held": held}.get(sys.argv[1] if len(sys.argv) > 1 else "")
    sys.exit(by_itself_only(*sys.argv[2:]) if by_itself_only else main())
