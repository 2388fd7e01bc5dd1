"""From noise to pictures: schedules, solvers and guidance as pure functions; below them the command line.

A solver sees only denoise(x_t, t) -> (x_0, log_variance or None); what the network predicts, guidance, self-conditioning and
clipping live in that closure. alpha_bar is the product that the DDIM paper calls alpha.
DDPM         arXiv:2006.11239  Eq. 4 q(x_t | x_0), Eq. 7 the posterior, Eq. 15 x_0 from eps
DDIM         arXiv:2010.02502  Eq. 12
DPM-Solver++ arXiv:2211.01095  Algorithm 2, the multistep solver of second order
iDDPM        arXiv:2102.09672  Eq. 17 the cosine schedule
v-prediction arXiv:2202.00512  Sec. 4 and App. D
Guidance     arXiv:2207.12598  Eq. 6: its w is guidance - 1
Spacing      arXiv:2305.08891  Table 2

    python sampler.py --ckpt runs/msdm/best.safetensors --prompt "Generate an image with 2 polyps." -n 8 --grid --out out
    python sampler.py --ckpt PRIOR_FOLDER --decoder DECODER_FOLDER --prior-lora runs/prior/best --decoder-lora runs/decoder/best \
        --prompts prompts.csv --size 256 --out out/kandinsky22
    python sampler.py --ckpt KANDINSKY_3_FOLDER --lora runs/unet3/best --prompts prompts.csv --size 256 --out out/kandinsky3
"""

import argparse
import math

import torch

# Schedules


def schedule(name, T=1000, beta_start=0.0001, beta_end=0.02):
    """alpha_bar (T,) float64, the product of 1 - beta up to each t."""
    if name == "linear":
        beta = torch.linspace(beta_start, beta_end, T, dtype=torch.float64)
    elif name == "scaled_linear":
        beta = torch.linspace(beta_start**0.5, beta_end**0.5, T, dtype=torch.float64) ** 2
    elif name == "cosine":  # iDDPM, Eq. 17, with its s = 0.008; beta_start and beta_end play no part
        t = torch.arange(T + 1, dtype=torch.float64) / T
        f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    else:
        raise ValueError(f"schedule {name!r} is not one of linear, scaled_linear, cosine")
    return torch.cumprod(1 - beta, dim=0)


def timesteps(T, steps, spacing="trailing", offset=0):
    """(steps,) int64, descending: which of the T times a solver visits (2305.08891, Table 2). offset moves "leading" only."""
    if not 1 <= steps <= T:
        raise ValueError(f"steps={steps}: expected 1 to T={T}")
    if spacing == "trailing":
        t = torch.arange(steps, dtype=torch.float64).mul(-T / steps).add(T).round().long() - 1
    elif spacing == "leading":
        t = (torch.arange(steps) * (T // steps)).flip(0) + offset
    elif spacing == "linspace":
        t = torch.linspace(T - 1, 0, steps, dtype=torch.float64).round().long()
    else:
        raise ValueError(f"spacing {spacing!r} is not one of trailing, leading, linspace")
    if t.max() >= T:
        raise ValueError(f"offset={offset} moves a time to {int(t.max())}, expected below T={T}")
    return t


# The forward process


def q_sample(x_0, alpha_bar_t, eps):
    """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps   (DDPM, Eq. 4)."""
    return alpha_bar_t.sqrt() * x_0 + (1 - alpha_bar_t).sqrt() * eps


def target(prediction, x_0, alpha_bar_t, eps):
    """What the network should say: "eps", or "v" = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0 (2202.00512, App. D)."""
    return eps if prediction == "eps" else alpha_bar_t.sqrt() * eps - (1 - alpha_bar_t).sqrt() * x_0


def to_x_0(prediction, out, x_t, alpha_bar_t):
    """x_0 from the network's output: DDPM, Eq. 15 for "eps"; sqrt(alpha_bar_t) x_t - sqrt(1 - alpha_bar_t) v for "v"."""
    if prediction == "eps":
        return (x_t - (1 - alpha_bar_t).sqrt() * out) / alpha_bar_t.sqrt()
    return alpha_bar_t.sqrt() * x_t - (1 - alpha_bar_t).sqrt() * out


# Solvers: solver(denoise, x_T, alpha_bar, timesteps, noise) -> x_0. The last step lands on x_0.


def _levels(alpha_bar, timesteps):
    """(t, alpha_bar at t, alpha_bar at the next time) of each step; after the last time there is no noise left."""
    alpha_bar = alpha_bar.double().cpu()
    here = alpha_bar[timesteps.cpu()]
    after = torch.cat([here[1:], torch.ones(1, dtype=torch.float64)])
    return zip(timesteps.tolist(), here, after, strict=True)


def ddpm(denoise, x_t, alpha_bar, timesteps, noise):
    """Ancestral sampling: draw x_s from q(x_s | x_t, x_0), DDPM, Eqs. 6 and 7 with s for t - 1. Same as DDIM with eta = 1."""
    for i, (t, a_t, a_s) in enumerate(_levels(alpha_bar, timesteps)):
        x_0, log_variance = denoise(x_t, t)
        alpha = a_t / a_s  # of the step from s to t
        x_t = (a_s.sqrt() * (1 - alpha) / (1 - a_t)).item() * x_0 + (alpha.sqrt() * (1 - a_s) / (1 - a_t)).item() * x_t
        if a_s < 1:
            variance = (1 - a_s) / (1 - a_t) * (1 - alpha)
            sigma = variance.sqrt().item() if log_variance is None else (0.5 * log_variance).exp()
            x_t = x_t + sigma * noise(i)
    return x_t


def ddim(denoise, x_t, alpha_bar, timesteps, noise=None):
    """Deterministic DDIM: Eq. 12 with sigma_t = 0."""
    for t, a_t, a_s in _levels(alpha_bar, timesteps):
        x_0, _ = denoise(x_t, t)
        eps = (x_t - a_t.sqrt().item() * x_0) / (1 - a_t).sqrt().item()
        x_t = a_s.sqrt().item() * x_0 + (1 - a_s).sqrt().item() * eps
    return x_t


def dpmpp(denoise, x_t, alpha_bar, timesteps, noise=None):
    """DPM-Solver++(2M): Algorithm 2. The two ends, where the log-SNR is infinite, are steps of first order."""
    x_0_before, lambda_before = None, None
    for t, a_t, a_s in _levels(alpha_bar, timesteps):
        x_0, _ = denoise(x_t, t)
        lambda_t, lambda_s = (0.5 * torch.log(a / (1 - a)) for a in (a_t, a_s))
        h = lambda_s - lambda_t
        d = x_0
        if x_0_before is not None and torch.isfinite(h) and torch.isfinite(lambda_t - lambda_before):
            r = (lambda_t - lambda_before) / h
            d = x_0 + (x_0 - x_0_before) / (2 * r.item())
        # -alpha_s (exp(-h) - 1) = alpha_s - alpha_t sigma_s / sigma_t, which stays finite at both ends
        ratio = ((1 - a_s) / (1 - a_t)).sqrt()
        x_t = ratio.item() * x_t + (a_s.sqrt() - a_t.sqrt() * ratio).item() * d
        x_0_before, lambda_before = x_0, lambda_t
    return x_t


SOLVERS = {"ddpm": ddpm, "ddim": ddim, "dpmpp": dpmpp}


# The closure around the network


def guided(network, text, text_mask, null, null_mask, guidance):
    """predict(x_t, t, self_cond): uncond + guidance (cond - uncond), both in one batch (2207.12598, Eq. 6 with w = guidance - 1).

    text (b, n, d), null like it: the embedding of the negative prompt. Guidance 1 asks the network once a step.
    """
    if guidance == 1:
        return lambda x_t, t, self_cond: network(x_t, t, text, text_mask, self_cond)
    both, both_mask = torch.cat([text, null]), torch.cat([text_mask, null_mask])

    def predict(x_t, t, self_cond):
        twice = None if self_cond is None else torch.cat([self_cond, self_cond])
        cond, uncond = network(torch.cat([x_t, x_t]), torch.cat([t, t]), both, both_mask, twice).chunk(2)
        return uncond + guidance * (cond - uncond)

    return predict


def denoiser(predict, alpha_bar, prediction, self_conditioning):
    """denoise(x_t, t) -> (x_0, None) of a network that predicts eps or v; feeds its last estimate back (2208.04202, Sec. 3.2)."""
    last = None  # zeros at the first step

    def denoise(x_t, t):
        nonlocal last
        times = torch.full((len(x_t),), t, dtype=torch.int64, device=x_t.device)
        out = predict(x_t, times, last if self_conditioning else None)
        last = to_x_0(prediction, out, x_t, alpha_bar[t].to(x_t))
        return last, None

    return denoise


def seeded_noise(seeds, shape, device="cpu"):
    """noise(i) -> (len(seeds), *shape): each picture's own CPU generator, which gives x_T first, then every step's noise."""
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    return lambda i: torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)


# The command line


def read_prompts(args):
    """The prompts of the request, each repeated -n times."""
    import csv
    import io
    from pathlib import Path

    import data
    from weights import BadInput

    prompts = list(args.prompt or [])
    if args.prompts:
        path = Path(args.prompts)
        if not path.is_file():
            raise BadInput(f"{path}: no such file, expected prompts, one a line, or a csv with a Prompt column")
        if path.suffix.lower() not in (".txt", ".csv"):
            raise BadInput(f"{path}: expected a .txt of prompts, one a line, or a .csv with a Prompt column")
        text = data.read_text(path)
        if path.suffix.lower() == ".csv":
            header = text.partition("\n")[0]
            rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=";" if ";" in header else ",")
            column = next((c for c in rows.fieldnames or [] if c.strip().lower() in data.PROMPT_COLUMNS), None)
            if column is None:
                raise BadInput(f"{path}, row 1: expected a Prompt column, got {header.strip()!r}")
            for row in rows:
                if None in row or None in row.values():
                    raise BadInput(f"{path}, row {rows.line_num}: expected {len(rows.fieldnames)} fields; "
                                   f"a prompt that holds a {rows.reader.dialect.delimiter!r} must be quoted")
                if not row[column].strip():
                    raise BadInput(f"{path}, row {rows.line_num}: the prompt is empty")
                prompts.append(row[column].strip())
        else:
            prompts += [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise BadInput(f"{args.prompts}: no prompts in it" if args.prompts else "give --prompt TEXT or --prompts FILE")
    return [p for p in prompts for _ in range(args.n)]


def write_samples(model, prompts, args, settings, size):
    """Pictures into args.out as a data folder; those that are there already stay (DESIGN.md 5). size: keywords of the model."""
    import csv
    from pathlib import Path

    import numpy as np
    from tqdm import tqdm

    import data
    from weights import BadInput, read_json, replacing, write_json

    out = Path(args.out)
    config_file = out / "config.json"
    if config_file.exists():
        old = read_json(config_file)
        differ = [k for k in settings if old.get(k) != settings[k]]
        if differ:
            k = differ[0]
            raise BadInput(f"{out}: holds pictures made with {k}={old.get(k)!r}, now {k}={settings[k]!r}; give another --out")
    elif out.exists() and any(out.iterdir()):
        raise BadInput(f"{out}: not empty and not made by sampler.py; give another --out")
    write_json(config_file, settings)
    with replacing(out / "prompts.csv") as tmp, open(tmp, "w", newline="", encoding="utf-8") as f:
        rows = csv.writer(f)
        rows.writerow(["Filename", "Prompt", "Seed"])
        rows.writerows([f"{i:06d}.png", p, args.seed + i] for i, p in enumerate(prompts))

    files = [out / "images" / f"{i:06d}.png" for i in range(len(prompts))]
    missing = [i for i, f in enumerate(files) if not f.exists()]
    if missing and hasattr(model, "encode_once"):  # Kandinsky 3 reads all texts first: its encoder is freed before it draws
        model.encode_once([*(prompts[i] for i in missing), args.negative_prompt], cache=out)
    with tqdm(total=len(files), initial=len(files) - len(missing), desc="sampling", unit="picture") as bar:
        for start in range(0, len(missing), args.batch_size):
            part = missing[start:start + args.batch_size]
            pictures = model.sample_batch([prompts[i] for i in part], [args.seed + i for i in part], args.steps, args.solver,
                                          args.guidance, args.negative_prompt, **size)
            for i, picture in zip(part, pictures.numpy(), strict=True):
                data.write_image(files[i], picture.transpose(1, 2, 0))
            bar.update(len(part))
    if args.grid:
        shown = [np.asarray(data.open_image(f)).transpose(2, 0, 1) for f in files[:64]]
        data.write_grid(out / "grid.png", np.stack(shown))


def load_model(args):
    """(the model of --ckpt with its adapters, the networks that the adapters are on, the hashes of all that was read).

    A file is a checkpoint of msdm.py; a folder, or a name on the hub, is Kandinsky's.
    """
    from pathlib import Path

    import kandinsky
    import lora
    import msdm
    from weights import BadInput, best_device, fetch, file_hash, folder_hash

    def refuse(kind, *flags):
        for flag in flags:
            if getattr(args, flag):
                raise BadInput(f"--{flag.replace('_', '-')} is not for {kind}, which --ckpt {args.ckpt} is")

    device = best_device(args.device)
    hashes = {k: getattr(args, k) and folder_hash(getattr(args, k)) for k in ("lora", "prior_lora", "decoder_lora")}
    if Path(args.ckpt).is_file() or args.ckpt.endswith(".safetensors"):
        refuse("an MSDM checkpoint", "decoder", "prior_lora", "decoder_lora", "size", "dtype", "text_device")
        model = msdm.load(args.ckpt, device)
        if args.lora:
            lora.load(model.unet, args.lora)
        return model, [model.unet], hashes | {"checkpoint": file_hash(args.ckpt)}
    folder, dtype = fetch(args.ckpt), getattr(torch, args.dtype or "float32")
    if (folder / "prior").is_dir():
        refuse("a Kandinsky 2.2 prior", "lora", "text_device")
        if not args.decoder:
            raise BadInput(f"{args.ckpt} is the prior of Kandinsky 2.2: give its decoder's folder too, by --decoder")
        decoder = fetch(args.decoder)
        model = kandinsky.Kandinsky22.from_pretrained(folder, decoder, args.prior_lora, args.decoder_lora, dtype)
        networks, hashes["decoder"] = [model.prior, model.decoder], folder_hash(decoder)
    elif (folder / "unet").is_dir() and (folder / "text_encoder").is_dir():
        refuse("Kandinsky 3", "decoder", "prior_lora", "decoder_lora")
        model = kandinsky.Kandinsky3.from_pretrained(folder, args.lora, dtype, args.text_device)
        networks = [model.unet]
    else:
        raise BadInput(f"{args.ckpt}: expected a file of msdm.py, the prior folder of Kandinsky 2.2, or the folder of Kandinsky 3")
    return model.to(device), networks, hashes | {"checkpoint": folder_hash(folder)}


def main(argv=None):
    parser = argparse.ArgumentParser(description="Draw pictures for prompts.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--ckpt", required=True, help="checkpoint of msdm.py, or published folder of Kandinsky 2.2's prior or of 3")
    parser.add_argument("--decoder", help="folder of the decoder (Kandinsky 2.2)")
    parser.add_argument("--lora", help="adapter folder (MSDM, Kandinsky 3)")
    parser.add_argument("--prior-lora", help="adapter folder of the prior (Kandinsky 2.2)")
    parser.add_argument("--decoder-lora", help="adapter folder of the decoder (Kandinsky 2.2)")
    parser.add_argument("--lora-scale", type=float, default=1.0, help="strength of the adapters; 0 is the model without them")
    parser.add_argument("--prompt", action="append", help="a prompt; may be given several times")
    parser.add_argument("--prompts", help="file of prompts: .txt, one a line, or .csv with a Prompt column")
    parser.add_argument("-n", type=int, default=1, help="pictures a prompt")
    parser.add_argument("--seed", type=int, default=0, help="picture i is drawn from seed + i")
    parser.add_argument("--steps", type=int, help="solver steps, 1 to 1000; None: 150 for MSDM, 50 for Kandinsky 2.2, 25 for 3")
    parser.add_argument("--solver", choices=sorted(SOLVERS), default="ddpm", help="how noise becomes a picture")
    parser.add_argument("--guidance", type=float,
                        help="uncond + guidance (cond - uncond); 1 is off; None: 4.5 for MSDM, 4.0 for Kandinsky")
    parser.add_argument("--negative-prompt", default="", help="what guidance moves away from")
    parser.add_argument("--size", type=int, help="side of the pictures, pixels (Kandinsky); None: 512 for 2.2, 1024 for 3")
    parser.add_argument("--batch-size", type=int, default=16, help="pictures at a time; does not change them")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights (Kandinsky); None: float32")
    parser.add_argument("--text-device", help="where the text encoder runs, when not on --device (Kandinsky 3)")
    parser.add_argument("--grid", action=argparse.BooleanOptionalAction, default=False,
                        help="also a sheet of the first 64, grid.png")
    parser.add_argument("--out", required=True, help="data folder to write; the same command again makes only what is missing")
    args = parser.parse_args(argv)

    import inspect

    import lora
    from weights import BadInput, text_hash

    for name in ("n", "batch_size", "steps", "size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise BadInput(f"{'-n' if name == 'n' else '--' + name.replace('_', '-')} {value}: expected 1 or more")
    prompts = read_prompts(args)
    model, networks, hashes = load_model(args)
    own = {k: p.default for k, p in inspect.signature(model.sample).parameters.items()}  # what the model is drawn with by default
    args.steps, args.guidance = (own[k] if getattr(args, k) is None else getattr(args, k) for k in ("steps", "guidance"))
    size = {k: args.size or own[k] for k in ("height", "width") if k in own}
    if args.steps > model.T:
        raise BadInput(f"--steps {args.steps}: the checkpoint's schedule has {model.T} times")
    for network in networks:
        lora.set_scale(network, args.lora_scale)
    adapted = any(lora.layers(network) for network in networks)
    settings = hashes | {"prompts": text_hash(*prompts), "steps": args.steps, "solver": args.solver, "guidance": args.guidance,
                         "negative_prompt": args.negative_prompt, "seed": args.seed, "size": size.get("height"),
                         "dtype": args.dtype or ("float32" if size else None), "lora_scale": args.lora_scale if adapted else None}
    write_samples(model, prompts, args, settings, size)


if __name__ == "__main__":
    from weights import run_command

    run_command(main)
