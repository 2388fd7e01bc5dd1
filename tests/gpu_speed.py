"""Stages 3 and 4 of gpu.py: speed and memory at the paper's size, Kandinsky at full size."""

import gc
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch

import data
import finetune
import kandinsky
import lora
import msdm
import optim
import training
import unet as unets
import vae as vaes
from encoded import EncodedData
from files import read_json
from kandinsky_networks import build_decoder, build_prior, build_unet3
from movq import build_movq
from text import TextConfig, TextTransformer, learn_tokenizer

GOLDEN = Path(__file__).resolve().parent / "golden"
GFLOP = 74.3  # of the paper's U-Net for one latent of 32 x 32 and 64 tokens, forward; three times that a step


@dataclass
class Sizes:
    """What is measured: the paper's sizes, or tiny ones in the rehearsal."""

    matmul: int = 8192
    preset: str = "paper"
    latent: int = 32  # side
    batch: int = 64
    steps: int = 15  # timed
    sampled: int = 256  # images
    samplers: tuple = (("dpmpp", 20), ("ddpm", 150))
    channels: tuple = ()  # of the U-Net, instead of the preset's
    vae_batch: int = 8
    image: int = 256
    backend: str = "inductor"
    kandinsky: bool = True  # published sizes
    rank: int = 128
    lora_batches: tuple = (32, 8, 8)
    pixels: tuple = (512, 1024)  # of Kandinsky 2.2 and 3
    pipeline_steps: tuple = (25, 50, 25)  # prior, decoder, U-Net 3
    trained: int = 20  # steps that follow the CPU's


REHEARSAL = Sizes(matmul=256, preset="demo", latent=8, batch=4, steps=1, sampled=4,
                  samplers=(("dpmpp", 2), ("ddpm", 3)), channels=(32,), vae_batch=2, image=32,
                  backend="aot_eager", kandinsky=False, rank=2, lora_batches=(2, 2, 2), pixels=(64, 64),
                  pipeline_steps=(2, 2, 2), trained=2)


# The clock


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(f, repeats, device, warm_up=3):
    """Of one call, the mean of `repeats` after a few that do not count."""
    for _ in range(warm_up):
        f()
    synchronise(device)
    start = time.perf_counter()
    for _ in range(repeats):
        f()
    synchronise(device)
    return (time.perf_counter() - start) / repeats


def peak(device):
    """Largest allocated memory since the last call, GiB; 0 on a CPU."""
    if device.type != "cuda":
        return 0.0
    found = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return found


def without_tf32():
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def matmul_rate(n, dtype, device, repeats=20):
    """TFLOP/s of a square product of random matrices."""
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / seconds(lambda: a @ b, repeats, device) / 1e12


# Speed at the paper's size


class Captions:
    """Random states of as many prompts as images, as a frozen text encoder's cache holds them."""

    def __init__(self, n, length, dim, device):
        g = torch.Generator().manual_seed(3)
        self.states = torch.randn(n, length, dim, generator=g).to(device)
        self.mask = (torch.arange(length) < torch.randint(8, length + 1, (n, 1), generator=g)).to(device)

    def draw(self, indices, generator):
        return indices.tolist()

    def fields(self, indices):
        return {"rows": torch.tensor(indices)}

    def encode(self, batch):
        return self.states[batch.rows], self.mask[batch.rows]


@torch.no_grad()
def without_zeros(network, std):
    """Parameters that are zero as built become N(0, std^2): products with zeros are faster than others."""
    for p in network.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=std)
    return network


def flags(**more):
    return SimpleNamespace(**{"p_self_cond": 0.5, "logit_normal": None, "loss": "l2"} | more)


def paper_msdm(sizes, device):
    """The model of a preset with random weights, the same in every call."""
    torch.manual_seed(0)
    vae = vaes.VAE(vaes.PRESETS[sizes.preset])
    config = replace(unets.PRESETS[sizes.preset], in_channels=vae.config.latent_channels, text_dim=768)
    config = replace(config, channels=sizes.channels or config.channels)
    with torch.device(device):
        unet = unets.UNet(config)
    text = TextTransformer(TextConfig(*learn_tokenizer(["2 polyps"]), dim=768, length=64))
    diffusion = replace(msdm.DIFFUSION[sizes.preset], image_size=sizes.latent * vae.factor)
    model = msdm.MSDM(unet, vae, text, diffusion, sizes.preset).to(device)
    model.unet.to(memory_format=torch.channels_last)
    return model


def stepper(model, sizes, device, compiled=None, record=True, world=None, **more):
    """A function that takes one training step of msdm.py: draw a batch, loss, gradient, AdamW, average.

    The batch is of sizes.batch images in each process of the world. Returns the loss, a tensor.
    """
    torch.manual_seed(0)
    side, c, n = sizes.latent, model.vae.config.latent_channels, 1024
    latents = torch.randn(n, 1, 2 * c, side, side).half()
    objective = msdm.Objective(model, latents, Captions(n, 64, 768, device), flags(loss="l1", **more))
    if compiled:
        objective.network = torch.compile(model.unet, dynamic=False, backend=compiled)
    params = dict(model.unet.train().named_parameters())
    opt, world = optim.Optimizers(params, 1e-4), world or training.Distributed(0, 1, device)
    ema, count = training.EMA(params, 0.9999), iter(range(10**9))
    take_step = training.Step(objective, params, opt, ema, world, record=record)

    def step():
        i = next(count)
        return take_step(objective.draw_batch(*world.batch(n, sizes.batch, i, 0)), 1.0)[0]

    return step


def report_steps(report, name, step, sizes, device, rate, warm_up=5, passes=3.0):
    """passes: forward passes that a step costs, by operations."""
    a_step = seconds(step, sizes.steps, device, min(warm_up, sizes.steps))
    share = passes * GFLOP * sizes.batch / a_step / 1e3 / rate
    report(name, step_ms=1e3 * a_step, images_per_s=sizes.batch / a_step, share_of_matmul=share,
           peak_gib=peak(device), rate_tflops=rate)


def stage_steps(report, sizes, device, args):
    """With and without the second pass of self-conditioning, and without a CUDA graph."""
    rate = matmul_rate(sizes.matmul, torch.bfloat16, device)
    model = paper_msdm(sizes, device)
    for name, p, passes, record in (("step, no graph", 0.5, 3.5, False),
                                    ("step, no self-conditioning", 0.0, 3.0, True), ("step", 0.5, 3.5, True)):
        peak(device)
        step = stepper(model, sizes, device, p_self_cond=p, record=record)
        report_steps(report, name, step, sizes, device, rate, passes=passes)
    profile(report, "step", step, device, args)
    report_memory(report, step, device, sizes)


def report_memory(report, step, device, sizes):
    """Allocated memory after steps that follow the warm-up: it must not grow."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        for _ in range(sizes.steps):
            step()
        report("memory", grows_by=torch.cuda.memory_allocated() / before - 1)


def stage_compiled(report, sizes, device, args):
    """The compiled step, and its losses against those of the network as it is (without dropout equal)."""
    rate = matmul_rate(sizes.matmul, torch.bfloat16, device)
    step = stepper(paper_msdm(sizes, device), sizes, device, compiled=sizes.backend)
    start = time.perf_counter()
    losses = [step()]
    synchronise(device)
    report("step, compiled", first_step_s=time.perf_counter() - start)
    eager = stepper(paper_msdm(sizes, device), sizes, device, record=False)
    losses, expected = [*losses, step()], [eager(), eager()]
    report("step, compiled", loss=losses[1].item(), loss_moves_by=(losses[1] / losses[0] - 1).abs().item(),
           loss_differs_by=max((a / b - 1).abs().item() for a, b in zip(losses, expected, strict=True)))
    report_steps(report, "step, compiled", step, sizes, device, rate, passes=3.5)
    profile(report, "compiled step", step, device, args)


def profile(report, name, step, device, args, steps=3):
    """The ten kernels that take longest, and the share of the time in which the GPU waits for the CPU."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    alone = seconds(step, steps, device, warm_up=1) * steps
    with profiler(activities=kinds) as found:
        for _ in range(steps):
            step()
        synchronise(device)
    events, key = (found.key_averages(),
                   "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total")
    if device.type == "cuda":
        events = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    events = sorted(events, key=lambda e: getattr(e, key), reverse=True)
    total = sum(getattr(e, key) for e in events) / 1e6
    rows = [f"{getattr(e, key) / 1e4 / total:5.1f} %  {e.count // steps:5d} a step  {e.key[:150]}"
            for e in events[:25]]
    with open(Path(args.out) / "profile.txt", "a", encoding="utf-8") as f:
        f.write(f"{name}: {1e3 * total / steps:.2f} ms of kernels a step\n" + "\n".join(rows) + "\n\n")
    report("profile " + name, kernels_ms=1e3 * total / steps, step_ms=1e3 * alone / steps,
           waits_for_cpu=max(0.0, 1 - total / alone), ten_largest=rows[:10])


def stage_sampling(report, sizes, device, args):
    model = without_zeros(paper_msdm(sizes, device), 0.02).eval().requires_grad_(False)
    model.unet.to(torch.bfloat16 if device.type == "cuda" else torch.float32)
    model.vae.to(memory_format=torch.channels_last)
    prompts = ["Generate an image with 2 polyps."] * sizes.sampled
    model.sample(prompts, steps=2, batch_size=sizes.sampled)  # warms up
    peak(device)
    for solver, steps in sizes.samplers:
        synchronise(device)
        start = time.perf_counter()
        images = model.sample(prompts, steps=steps, solver=solver, batch_size=sizes.sampled)
        took = time.perf_counter() - start
        rate = sizes.sampled / took
        report(f"sampling, {solver}, {steps} steps", seconds=took, images=len(images), images_per_s=rate,
               minutes_for_5000=5000 / rate / 60, peak_gib=peak(device))
    with tempfile.TemporaryDirectory() as tmp:
        start = time.perf_counter()
        for i, image in enumerate(images[:32].numpy()):
            data.write_image(Path(tmp) / f"{i}.png", image.transpose(1, 2, 0))
        report("sampling", png_ms=(time.perf_counter() - start) / len(images[:32]) * 1e3)
    z = torch.randn(len(prompts), *model.latent_shape(), device=device)
    with torch.inference_mode():
        report("sampling", decode_s=seconds(lambda: model.vae.decode(z), 1, device, warm_up=1))


def stage_vae(report, sizes, device, args):
    vae = vaes.VAE(vaes.PRESETS[sizes.preset]).to(device, memory_format=torch.channels_last).train()
    settings = SimpleNamespace(kl_weight=4.2e-8, l1_weight=0.0, half_weight=0.25)
    objective = vaes.Objective(vae, None, settings, device)
    params = dict(vae.named_parameters())
    take_step = training.Step(objective, params, optim.Optimizers(params, 1e-4), None,
                              training.Distributed(0, 1, device))
    images = torch.randint(0, 256, (256, 3, sizes.image, sizes.image), dtype=torch.uint8)
    draws = training.Draws(0, 0, range(sizes.vae_batch))

    def step():
        take_step(vaes.draw_batch(vae, images[torch.randint(256, (sizes.vae_batch,))], 0.4, draws), 1.0)

    a_step = seconds(step, sizes.steps, device)
    report("vae step", step_ms=1e3 * a_step, images_per_s=sizes.vae_batch / a_step, peak_gib=peak(device))
    profile(report, "vae step", step, device, args)


# Kandinsky at full size


def on_device(build, name, folder, sizes, device, dtype):
    """A network of a published config, its weights drawn on the device."""
    published = GOLDEN / f"manifests/{name}.json"
    config = read_json(published)["config"] if sizes.kandinsky else read_json(GOLDEN / folder / "config.json")
    with torch.device("meta"):
        network = build(config).to(dtype)
    network.to_empty(device=device)
    for p in network.parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=0.02)
    for buffer in network.buffers():
        buffer.zero_()
    return network.eval().requires_grad_(False)


def dtype_of(device):
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def lora_steps(report, name, network, schedule, encoded, b, sizes, device):
    """Steps of finetune.py with an adapter of the paper's rank, with and without gradient checkpointing."""
    lora.inject(network, lora.LoRAConfig(rank=sizes.rank, alpha=sizes.rank))
    params, n = lora.tensors(network), len(encoded.x_0)
    args = SimpleNamespace(p_uncond=0.1, min_snr_gamma=5.0)
    objective = finetune.Objective(network, encoded, torch.arange(n), schedule, args, device,
                                   dtype_of(device))
    opt, ema = optim.Optimizers(params, 1e-4), training.EMA(params, 0.999)
    take_step = training.Step(objective, params, opt, ema, training.Distributed(0, 1, device))
    network.train()
    for checkpointed in (False, True):
        network.gradient_checkpointing = checkpointed
        count = iter(range(1000))

        def step(count=count):
            i = next(count)
            indices = torch.arange(b) + i * b % (n - b + 1)
            take_step(objective.draw_batch(indices, training.Draws(0, i, range(b))), 1.0)

        peak(device)
        a_step = seconds(step, min(sizes.steps, 6), device, warm_up=2)
        report(f"{name}, LoRA {sizes.rank}, batch {b}" + ", checkpointing" * checkpointed,
               step_ms=1e3 * a_step, images_per_s=b / a_step, peak_gib=peak(device),
               adapter_millions=sum(p.numel() for p in params.values()) / 1e6)
    lora.remove(network)
    network.eval().gradient_checkpointing = False


def encoded_data(x_0, *conditions):
    n = len(x_0)
    return EncodedData(x_0, conditions, [[i] for i in range(n)])


class RandomTexts(kandinsky.Kandinsky22):
    """The pipeline without its text encoder: random states instead."""

    def encode_text(self, prompts):
        width, n = self.prior.to_embed.out_features, len(prompts)
        tokens, draw = self.prior.positions.shape[1] - 4, torch.Generator().manual_seed(n)
        embeds, states = torch.randn(n, width, generator=draw), torch.randn(n, tokens, width, generator=draw)
        return (embeds.to(self.device), states.to(self.device), torch.ones(n, tokens, dtype=torch.bool,
                device=self.device))


def stage_kandinsky22(report, sizes, device, args):
    dtype, n, (b_prior, b_decoder, _) = dtype_of(device), 64, sizes.lora_batches
    schedules = [kandinsky.read_schedule(GOLDEN / f"kandinsky-2-2-{part}/scheduler") for part in ("prior",
                 "decoder")]
    prior = on_device(build_prior, "kandinsky-2-2-prior", "kandinsky-2-2-prior/prior", sizes, device, dtype)
    width, tokens = prior.to_embed.out_features, prior.positions.shape[1] - 4
    texts = torch.randn(n, width), torch.randn(n, tokens, width), torch.ones(n, tokens, dtype=torch.bool)
    lora_steps(report, "prior", prior, schedules[0], encoded_data(torch.randn(n, width), *texts), b_prior,
               sizes, device)
    decoder = on_device(build_decoder, "kandinsky-2-2-unet", "kandinsky-2-2-decoder/unet", sizes, device,
                        dtype)
    side, width = sizes.pixels[0] // 8, decoder.to_tokens.in_features
    encoded = encoded_data(torch.randn(n, 4, side, side), torch.randn(n, width))
    lora_steps(report, "decoder", decoder, schedules[1], encoded, b_decoder, sizes, device)
    movq = on_device(build_movq, "kandinsky-2-2-movq", "kandinsky-2-2-decoder/movq", sizes, device,
                     torch.float32)
    pipeline = RandomTexts(prior, schedules[0], None, None, None, decoder, schedules[1], movq)
    steps, pixels = sizes.pipeline_steps, sizes.pixels[0]

    def sample():
        return pipeline.sample_batch(["a", "b"], [0, 1], steps=steps[1], prior_steps=steps[0], height=pixels,
                                     width=pixels, negative_prompt="nothing")

    report_pipeline(report, "Kandinsky 2.2", sample, pixels, device)


def stage_kandinsky3(report, sizes, device, args):
    dtype, n, b = dtype_of(device), 64, sizes.lora_batches[2]
    unet = on_device(build_unet3, "kandinsky-3-unet", "kandinsky-3/unet", sizes, device, dtype)
    schedule = kandinsky.read_schedule(GOLDEN / "kandinsky-3/scheduler")
    side, width = sizes.latent, unet.text_mlp[0].in_features
    texts = torch.randn(n, 40, width), torch.ones(n, 40, dtype=torch.bool), torch.full((n,), 40)
    lora_steps(report, "unet3", unet, schedule, encoded_data(torch.randn(n, 4, side, side), *texts), b,
               sizes, device)
    movq = on_device(build_movq, "kandinsky-3-movq", "kandinsky-3/movq", sizes, device, torch.float32)
    pipeline = kandinsky.Kandinsky3(unet, schedule, None, dtype, None, None, movq)
    pipeline.texts = {p: torch.randn(20, width).to(dtype) for p in ("a", "b")}

    def sample():
        return pipeline.sample_batch(["a", "b"], [0, 1], steps=sizes.pipeline_steps[2],
                                     height=sizes.pixels[1], width=sizes.pixels[1])

    report_pipeline(report, "Kandinsky 3", sample, sizes.pixels[1], device)


def report_pipeline(report, name, sample, pixels, device):
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    peak(device)
    start = time.perf_counter()
    images = sample()
    report(f"{name}, 2 images of {pixels} px", seconds=time.perf_counter() - start, peak_gib=peak(device),
           side=images.shape[-1])
