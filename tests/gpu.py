"""What a GPU does with this code: truth against the CPU, speed and memory at the paper's size, a training.

    python3 tests/gpu.py --out OUT                                       # stages 1 to 4, five minutes
    python3 tests/gpu.py --out OUT --stages 5 --data DIR --minutes 6     # train on a data folder, sample
    python3 tests/gpu.py --out OUT --rehearse                            # everything at tiny sizes on the CPU

It needs no network and no file outside of the repository. Every figure is written to OUT/gpu.json as soon as
it is known. A part runs in a process of its own with its own time limit, so one that fails costs only itself.

1 the machine  2 truth  3 speed at the paper's size  4 Kandinsky at full size  5 a training, OUT/grid.png
"""

import argparse
import contextlib
import functools
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402 - the project's root is not on the path of a script in tests/
import torch  # noqa: E402
from gpu_speed import (  # noqa: E402
    GOLDEN,
    REHEARSAL,
    Captions,
    Sizes,
    flags,
    matmul_rate,
    stage_compiled,
    stage_kandinsky3,
    stage_kandinsky22,
    stage_sampling,
    stage_steps,
    stage_vae,
    without_tf32,
    without_zeros,
)

import data  # noqa: E402
import msdm  # noqa: E402
import optim  # noqa: E402
import phantom  # noqa: E402
import prompts as grammar  # noqa: E402
import sampler  # noqa: E402
import training  # noqa: E402
import unet as unets  # noqa: E402
import vae as vaes  # noqa: E402
from files import read_json, write_json  # noqa: E402
from kandinsky_networks import build_decoder, build_prior, build_unet3  # noqa: E402
from text import TextConfig, TextTransformer, learn_tokenizer  # noqa: E402


class Report:
    """OUT/gpu.json, written anew with every figure."""

    def __init__(self, out):
        self.file = Path(out) / "gpu.json"

    def read(self):
        return read_json(self.file) if self.file.exists() else {}

    def __call__(self, name, **figures):
        found = self.read()
        rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in figures.items()}
        found.setdefault(name, {}).update(rounded)
        write_json(self.file, found)
        print(name, json.dumps(found[name]), flush=True)


# The machine


def stage_machine(report, sizes, device, args):
    without_tf32()
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30 if device.type == "cuda" else 0.0
    report("machine", device=name, memory_gib=memory, torch=torch.__version__, python=sys.version.split()[0],
           cores=os.cpu_count(), date=time.strftime("%Y-%m-%d"), rehearsal=args.rehearse)
    report("machine", matmul_bf16_tflops=matmul_rate(sizes.matmul, torch.bfloat16, device),
           matmul_float32_tflops=matmul_rate(sizes.matmul, torch.float32, device, repeats=5))


# Truth: the GPU against the CPU


def redrawn(network, seed=0):
    """Every weight from N(0, 0.1^2): as built, zeros at the exits make all outputs equal."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(0.1 * torch.randn(p.shape, generator=g))
    return network.eval().requires_grad_(False)


def truth_cases():
    """name -> (network, its inputs): small configurations of the five networks."""
    g = torch.Generator().manual_seed(1)

    def noise(*shape):
        return torch.randn(shape, generator=g)

    def build(make, folder):
        return redrawn(make(read_json(GOLDEN / folder / "config.json")))

    class AutoEncode(torch.nn.Module):
        def __init__(self, vae):
            super().__init__()
            self.vae = vae

        def forward(self, img):
            return self.vae.decode(self.vae.encode(img))

    t, mask = torch.tensor([10, 700]), torch.arange(77) < torch.tensor([[60], [77]])
    config = unets.UNetConfig(channels=(64, 64, 128), time_dim=128, text_dim=32, n_heads=4)
    prior = build(build_prior, "kandinsky-2-2-prior/prior")
    width, decoder = prior.to_embed.out_features, build(build_decoder, "kandinsky-2-2-decoder/unet")
    text_dim = read_json(GOLDEN / "kandinsky-3/unet/config.json")["encoder_hid_dim"]
    return {
        "unet": (redrawn(unets.UNet(config)), (noise(2, 8, 16, 16), t, noise(2, 77, 32), mask, noise(2, 8,
                 16, 16))),
        "vae": (redrawn(AutoEncode(vaes.VAE(vaes.PRESETS["tiny"]))), (noise(2, 3, 64, 64).clamp(-1, 1),)),
        "prior": (prior, (noise(2, width), t, noise(2, width), noise(2, 77, width), mask)),
        "decoder": (decoder, (noise(2, 4, 16, 16), t, noise(2, decoder.to_tokens.in_features))),
        "unet3": (build(build_unet3, "kandinsky-3/unet"), (noise(2, 4, 16, 16), t, noise(2, 77, text_dim),
                  mask)),
    }


def difference(out, expected):
    """Root mean square of the difference, in standard deviations of what is expected."""
    return ((out.float().cpu() - expected).square().mean().sqrt() / expected.std()).item()


def moved(inputs, device, dtype=None):
    return [x.to(device, dtype if x.is_floating_point() else None) for x in inputs]


LAST_LAYER = {"unet": "conv_out.weight", "vae": "vae.to_img.weight", "prior": "to_embed.weight",
              "decoder": "conv_out.weight", "unet3": "conv_out.weight"}  # no norm undoes what changes there


@torch.no_grad()
def stage_truth(report, sizes, device, args):
    without_tf32()
    for name, (network, inputs) in truth_cases().items():
        expected = network(*inputs)
        network.to(device)
        exact = difference(network(*moved(inputs, device)), expected)
        with torch.autocast(device.type, torch.bfloat16):
            mixed = difference(network(*moved(inputs, device)), expected)
        weight = network.get_parameter(LAST_LAYER[name])
        weight *= 1.01
        control = difference(network(*moved(inputs, device)), expected)
        weight /= 1.01
        half = difference(network.to(torch.bfloat16)(*moved(inputs, device, torch.bfloat16)), expected)
        report("truth " + name, float32=exact, bf16_autocast=mixed, bf16_weights=half,
               one_weight_changed=control, holds=exact <= 1e-3 < control and max(mixed, half) <= 5e-2)
    model = small_msdm(device="cpu")
    wanted = model.sample(["2 polyps", "no polyps"], seed=3, steps=10, solver="dpmpp", guidance=2.0)
    found = model.to(device).sample(["2 polyps", "no polyps"], seed=3, steps=10, solver="dpmpp", guidance=2.0)
    worst = (found.int() - wanted.int()).abs().max().item()
    report("truth sampler", largest_difference_of_255=worst, deviation_of_image=wanted.float().std().item(),
           holds=worst <= 2)


def small_msdm(device, seed=0):
    torch.manual_seed(seed)
    tokenizer, vocab = learn_tokenizer(["2 polyps", "no polyps"], vocab=300)
    text = TextTransformer(TextConfig(tokenizer, vocab, length=16, dim=32, n_layers=1, n_heads=2))
    config = unets.UNetConfig(in_channels=4, channels=(64, 64, 64), time_dim=128, text_dim=32, n_heads=4,
                              dropout=0.0)
    model = msdm.MSDM(unets.UNet(config), vaes.VAE(vaes.PRESETS["tiny"]), text,
                      msdm.Diffusion(prediction="v", image_size=64))
    without_zeros(model.unet, 0.05)  # those at the exits
    without_zeros(model.vae, 0.05)
    return model.to(device).eval()


def short_training(device, steps, batch, noise_seed=0):
    """Losses of `steps` steps on 64 latents, as msdm.py takes them."""
    model = small_msdm("cpu").to(device)
    latents = torch.randn(64, 1, 8, 16, 16, generator=torch.Generator().manual_seed(2)).half()
    objective = msdm.Objective(model, latents, Captions(64, 16, 32, device), flags())
    params = dict(model.unet.named_parameters())
    take_step = training.Step(objective, params, optim.Optimizers(params, 1e-3), None,
                              training.Distributed(0, 1, device))
    losses = []
    for i in range(steps):
        draws, first = training.Draws(noise_seed, i, range(batch)), batch * i % 64
        loss, _ = take_step(objective.draw_batch(torch.arange(first, first + batch), draws), 1.0)
        losses.append(loss.item())
    return losses


def stage_training(report, sizes, device, args):
    train = functools.partial(short_training, batch=min(16, sizes.batch))
    expected = train(torch.device("cpu"), sizes.trained)
    losses, control = train(device, sizes.trained), train(device, sizes.trained, noise_seed=1)

    def worst(found):
        return max(abs(a / b - 1) for a, b in zip(found, expected[:len(found)], strict=True))

    report("truth training", first_loss=expected[0], last_loss=expected[-1], largest_deviation=worst(losses),
           other_noise_deviates=worst(control), holds=worst(losses) <= 0.02 < worst(control))
    low = functools.partial(torch.amp.GradScaler, init_scale=2.0**8)  # none of the steps overflows
    with patch.object(torch.amp, "GradScaler", low), patch.object(training, "training_dtype",
                                                                  lambda device: torch.float16):
        half = worst(train(device, sizes.trained // 2))  # as on a GPU without bfloat16
    report("truth training, float16", largest_deviation=half, holds=0 < half <= 0.02)


def stage_resume(report, sizes, device_is_never_touched, args):
    """A run that is killed in the middle and started again, against one that was left alone."""
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        phantom.main(["--out", str(tmp / "data"), "--n", "40", "--size", "32"])
        device = ["--device", "cpu" if args.rehearse else "auto"]
        steps = "4" if args.rehearse else "12"
        common = ["--data", str(tmp / "data"), "--size", "32", "--preset", "demo", *device]
        in_a_process(vaes.main, [*common, "--out", str(tmp / "vae"), "--steps", "2", "--perceptual", "off"],
                     limit=60)

        def command(name):
            return [*common, "--vae", str(tmp / "vae/best.safetensors"), "--out", str(tmp / name), "--shown",
                    "0", "--steps", steps, "--save-every", "2", "--log-every", "1", "--batch-size", "4"]

        def losses(name):
            return {x["step"]: x["loss"] for x in read_log(tmp / name)}

        in_a_process(msdm.main, command("whole"), limit=90)
        killed = in_a_process(msdm.main, command("killed"), limit=90,
                              kill_when=lambda: len(losses("killed")) >= (2 if args.rehearse else 5))
        before = len(losses("killed"))
        in_a_process(msdm.main, command("killed"), limit=90)
        whole, again = losses("whole"), losses("killed")
        worst = max(abs(again[i] / whole[i] - 1) for i in whole)
        report("truth resume", killed=killed, steps_before=before, steps=len(again), largest_deviation=worst,
               holds=killed == "killed" and before < int(steps) == len(again) and worst <= 1e-3)


# A training in earnest


def stage_train(report, sizes, device_is_never_touched, args):
    """The commands on a data folder: the autoencoder for a quarter of the time, the U-Net for the rest."""
    tiny = ["--batch-size", "2", "--steps", "2", "--device", "cpu"] if args.rehearse else ["--device", "cuda"]
    with tempfile.TemporaryDirectory() as tmp:
        tmp, folder = Path(tmp), args.data
        if folder is None:
            folder, n = str(tmp / "phantoms"), "24" if args.rehearse else "600"
            phantom.main(["--out", folder, "--n", n, "--size", str(sizes.image)])
        common = ["--preset", sizes.preset, "--data", folder, "--size", str(sizes.image), *tiny,
                  "--log-every", "25", "--save-every", "1000000"]

        def train(name, main, reserved, share, *more):
            """A command that may take this share of the minutes that are left after some reserved seconds."""
            left = max(0.02, share * (args.deadline - time.monotonic() - reserved) / 60)
            seen = []  # (seconds, steps) whenever its log has grown

            def look():
                lines = read_log(tmp / name)
                if lines and (not seen or lines[-1]["step"] > seen[-1][1]):
                    seen.append((time.monotonic(), lines[-1]["step"]))

            how = in_a_process(main, [*common, "--out", str(tmp / name), "--minutes", f"{left:.3f}", *more],
                               limit=600, kill_when=look)
            steps_a_s = (seen[-1][1] - seen[1][1]) / (seen[-1][0] - seen[1][0]) if len(seen) > 2 else 0.0
            report(f"training {name}", how=how, minutes=left, flags=more[-9:], steps_per_s=steps_a_s,
                   images_per_s=steps_a_s * msdm.TRAINING[sizes.preset]["batch_size"] * (name == "msdm"))
            return how

        # Reserved for reading and encoding the images, writing 10 GB of states and sampling.
        train("vae", vaes.main, 90, 0.25, "--perceptual", "off")
        rest = ["--vae", str(tmp / "vae/best.safetensors"), "--text-encoder", "train", "--shown", "0"]
        if train("msdm", msdm.main, 65, 1.0, *rest, *args.train_flags.split()) != "ok":
            train("msdm", msdm.main, 65, 1.0, *rest)
        write_grid(report, sizes, tmp, args)
        for name in ("vae", "msdm"):
            lines = read_log(tmp / name, "val_loss")
            report(f"training {name}", data=Path(folder).name, validation=lines[-1],
                   losses=[[x["step"], x["loss"]] for x in read_log(tmp / name)][::10])


def read_log(run, key="loss"):
    """The lines of a run's metrics.jsonl that hold a value."""
    file = run / "metrics.jsonl"
    lines = [json.loads(x) for x in file.read_text().splitlines()] if file.exists() else []
    return [x for x in lines if key in x]


def write_grid(report, sizes, tmp, args):
    """Four images of a finding in each of the nine cells, a row a cell, into OUT/grid.png."""
    rows = [f"Generate an image with an an abnormality located in the {cell}." for cell in grammar.CELLS]
    (tmp / "prompts.txt").write_text("\n".join(rows))
    steps = "2" if args.rehearse else "50"
    start = time.perf_counter()
    in_a_process(sampler.main, ["--ckpt", str(tmp / "msdm/last.safetensors"), "--prompts",
                 str(tmp / "prompts.txt"), "-n", "4", "--solver", "dpmpp", "--steps", steps, "--batch-size",
                 "36", "--out", str(tmp / "out"), "--device", "cpu" if args.rehearse else "cuda"], limit=120)
    files = sorted((tmp / "out/images").iterdir())
    images = np.stack([np.asarray(data.open_image(f)).transpose(2, 0, 1) for f in files])
    data.write_grid(Path(args.out) / "grid.png", images, columns=4)
    report("training grid", images=len(images), rows=rows, seconds=time.perf_counter() - start)


# Stages, each part in a process of its own


PARTS = (  # stage, name, function, seconds it may take; what may overrun comes last
    (1, "machine", stage_machine, 40),
    (2, "truth", stage_truth, 50),
    (3, "steps", stage_steps, 90), (3, "sampling", stage_sampling, 75), (3, "vae", stage_vae, 30),
    (4, "Kandinsky 2.2", stage_kandinsky22, 75), (4, "Kandinsky 3", stage_kandinsky3, 75),
    (3, "compiled", stage_compiled, 150),
    (2, "training", stage_training, 60), (2, "resume", stage_resume, 100),
    (5, "train", stage_train, 600),
)


def in_a_process(function, *args, limit, kill_when=None):
    """function(*args) in a forked process group: "ok", "failed", "killed" or "overran" its limit in seconds.

    The caller must not have touched the GPU, which a fork cannot take along.
    """
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setsid()
            function(*args)
            status = 0
        except SystemExit as error:
            status = error.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status if isinstance(status, int) else 1)
    ends, how = time.monotonic() + limit, None
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return how or ("ok" if status == 0 else "failed")
        if how is None and (time.monotonic() > ends or (kill_when is not None and kill_when())):
            how = "overran" if time.monotonic() > ends else "killed"
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        time.sleep(0.02)


def run_part(report, name, function, args):
    """One part; what it raises is its figure."""
    random.seed(0)
    torch.manual_seed(0)
    touches = function not in (stage_resume, stage_train)  # these only start processes that do
    device = torch.device("cpu" if args.rehearse or not touches or not torch.cuda.is_available() else "cuda")
    try:
        function(report, REHEARSAL if args.rehearse else Sizes(), device, args)
    except Exception as error:
        report("part " + name, error=f"{type(error).__name__}: {str(error)[:300]}")
        raise


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="folder of gpu.json, profile.txt, grid.png")
    parser.add_argument("--stages",
                        help="numbers or names of parts, with commas; None: 1,2,3,4 (rehearsed: all)")
    parser.add_argument("--minutes", type=float, default=5.0,
                        help="for everything; stage 5 takes what is left")
    parser.add_argument("--data", help="data folder of stage 5; phantoms without it")
    parser.add_argument("--train-flags", default="", help="further flags of msdm.py in stage 5")
    parser.add_argument("--rehearse", action="store_true", help="all stages at tiny sizes on the CPU")
    args = parser.parse_args()
    Path(args.out).mkdir(parents=True, exist_ok=True)
    if args.rehearse:  # the optimisers import it: once, not in each of a dozen forks
        import torch._dynamo  # noqa: F401
    args.deadline = time.monotonic() + 60 * args.minutes
    chosen = set((args.stages or ("1,2,3,4,5" if args.rehearse else "1,2,3,4")).split(","))
    report, bad = Report(args.out), []
    for stage, name, function, limit in PARTS:
        if not chosen & {str(stage), name}:
            continue
        start, left = time.monotonic(), args.deadline - time.monotonic()
        how = (in_a_process(run_part, report, name, function, args, limit=min(limit,
               left)) if left > 5 else "no time")
        report("part " + name, how=how, seconds=time.monotonic() - start)
        bad += [name] * (how != "ok")
    found = report.read()
    bad += [k for k, v in found.items() if v.get("holds") is False]
    print("all parts ran, all truths hold" if not bad else "not well: " + ", ".join(bad))
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
