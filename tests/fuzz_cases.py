"""The cases of tests/fuzz.py: the commands, which of their files are changed, and a folder of good ones."""

import contextlib
import io
import json
import shutil

import mutations as m
import torch
from helpers import image, run, tiny_msdm
from PIL import Image
from test_release import in_released_names
from tiny_kandinsky import main as make_tiny

import adapters
import msdm
import release
import vae
from files import save_safetensors

DATA = "--data data --steps 1 --batch-size 2"
VAE = f"{DATA} --size 32 --perceptual off"
MSDM = f"{DATA} --vae vae.safetensors --size 32 --shown 1 --sample-steps 1"
ADAPTER = f"{DATA} --rank 2 --model"
SMALL = "--size 64 --sample-steps 1"
SAMPLE = "--ckpt msdm.safetensors --steps 1"
SAMPLE_22 = "--ckpt prior --decoder decoder --size 64 --steps 1 --prompt polyp"

COMMANDS = {  # name: module, flags, output folder
    "check": ("data", "check --data data", ""),
    "check jsonl": ("data", "check --data jsonl", ""),
    "vae": ("vae", VAE, "out"),
    "vae jsonl": ("vae", f"{VAE} --data jsonl", "out"),
    "vae resumed": ("vae", f"{VAE} --steps 2", "run-vae"),
    "msdm": ("msdm", MSDM, "out"),
    "msdm --init": ("msdm", f"{DATA} --init msdm.safetensors", "out"),
    "msdm resumed": ("msdm", f"{MSDM} --steps 2", "run-msdm"),
    "finetune msdm": ("finetune", f"msdm {ADAPTER} msdm.safetensors", "out"),
    "finetune resumed": ("finetune", f"msdm {ADAPTER} msdm.safetensors --steps 2", "run-adapter"),
    "finetune prior": ("finetune", f"prior {ADAPTER} prior", "out"),
    "finetune decoder": ("finetune", f"decoder {ADAPTER} decoder --prior prior {SMALL}", "out"),
    "finetune unet3": ("finetune", f"unet3 {ADAPTER} k3 {SMALL}", "out"),
    "sampler": ("sampler", f"{SAMPLE} --prompt polyp", "out"),
    "sampler --lora": ("sampler", f"{SAMPLE} --prompt polyp --lora run-adapter/best", "out"),
    "sampler again": ("sampler", f"{SAMPLE} --prompt polyp -n 2", "sampled"),
    "sampler .txt": ("sampler", f"{SAMPLE} --prompts prompts.txt", "out"),
    "sampler .csv": ("sampler", f"{SAMPLE} --prompts prompts.csv", "out"),
    "sampler 2.2": ("sampler", SAMPLE_22, "out"),
    "sampler 2.2 lora": ("sampler", f"{SAMPLE_22} --prior-lora run-prior/best", "out"),
    "sampler 2.2 kohya": ("sampler", f"{SAMPLE_22} --prior-lora foreign/kohya.safetensors", "out"),
    "convert": ("finetune", "convert foreign/diffusers.safetensors out/x.safetensors --to kohya", ""),
    "sampler 3": ("sampler", "--ckpt k3 --size 64 --steps 1 --prompt polyp", "out"),
    "metrics": ("metrics", "", ""),  # its reading half, below
    "metrics stats": ("metrics", "stats", ""),
    "memorisation": ("judges", "memorisation --train data --held-out held --fake data --size 32 "
                     "--sheet out/x.png --json out/x.json", ""),
    "kvasir": ("kvasir", "seg --src kvasir", "out"),
    "release": ("release", "--unet released/unet.safetensors --vae released/vae.pth --size 32", "out"),
}
ON_DATA = ["check", "vae", "msdm", "finetune msdm", "finetune prior"]
ON_IMAGES = [*ON_DATA, "memorisation", "metrics", "check", "vae"]
ON_22 = ["sampler 2.2", "finetune prior", "finetune decoder"]
ON_3 = ["sampler 3", "finetune unet3"]

KINDS = {  # name: places, mutations, commands
    "captions csv": (["data/prompt-gt.csv"], m.TEXT + m.PLACE, ON_DATA),
    "captions jsonl": (["jsonl/metadata.jsonl"], m.TEXT + m.JSON + m.PLACE, ["check jsonl", "vae jsonl"]),
    "JPEG": (["data/images/*.jpg"], m.IMAGE, ON_IMAGES),
    "PNG": (["data/images/*.png"], m.IMAGE, ON_IMAGES),
    "image names": (["data/images/*"], (*m.PLACE, m.renamed, m.renamed), ON_IMAGES),
    "masks": (["kvasir/*/*"], m.IMAGE + m.PLACE, ["kvasir"]),
    "msdm checkpoint": (["msdm.safetensors"], m.SAFETENSORS + m.PLACE,
                        ["sampler", "finetune msdm", "msdm --init", "sampler --lora"]),
    "vae checkpoint": (["vae.safetensors"], m.SAFETENSORS + m.PLACE, ["msdm"]),
    "2.2 weights": (["prior/*/*.safetensors", "decoder/*/*.safetensors"], m.SAFETENSORS + m.PLACE, ON_22),
    "3 weights": (["k3/*/*.safetensors"], m.SAFETENSORS + m.PLACE, ON_3),
    "2.2 configs": (["prior/*/config.json", "decoder/*/config.json"], m.JSON + m.PLACE, ON_22),
    "3 configs": (["k3/*/config.json"], m.JSON + m.PLACE, ON_3),
    "2.2 schedulers": (["*/scheduler/*", "prior/image_processor/*"], m.JSON + m.PLACE, ON_22),
    "3 scheduler": (["k3/scheduler/*"], m.JSON + m.PLACE, ON_3),
    "2.2 tokenizer": (["prior/tokenizer/*"], m.JSON + m.PLACE, ["sampler 2.2", "finetune prior"]),
    "3 tokenizer": (["k3/tokenizer/*"], m.JSON + m.PLACE, ON_3),
    "adapter": (["run-adapter/best/*.safetensors"], m.SAFETENSORS + m.PLACE, ["sampler --lora"]),
    "adapter config": (["run-adapter/best/*.json"], m.JSON + m.PLACE, ["sampler --lora"]),
    "2.2 adapter": (["run-prior/best/*.json"], m.JSON + m.PLACE, ["sampler 2.2 lora"]),
    "2.2 foreign adapter": (["foreign/*"], m.SAFETENSORS + m.PLACE, ["sampler 2.2 kohya", "convert"]),
    "vae run": (["run-vae/config.json"], m.JSON + m.PLACE, ["vae resumed"]),
    "run log": (["run-vae/metrics.jsonl"], m.TEXT + m.PLACE, ["vae resumed"]),
    "msdm run": (["run-msdm/config.json", "run-msdm/latents-*"], m.ANY + m.PLACE, ["msdm resumed"]),
    "sampled run": (["sampled/config.json", "sampled/images/*"], m.ANY + m.PLACE, ["sampler again"]),
    "state.pt": (["run-*/state.pt"], m.STATE + m.PLACE, ["vae resumed", "msdm resumed", "finetune resumed"]),
    "prompts txt": (["prompts.txt"], m.TEXT + m.PLACE, ["sampler .txt"]),
    "prompts csv": (["prompts.csv"], m.TEXT + m.PLACE, ["sampler .csv"]),
    "released weights": (["released/unet.safetensors"], m.SAFETENSORS + m.PLACE, ["release"]),
    "released .pth": (["released/vae.pth"], m.STATE + m.PLACE, ["release"]),
    "feature file": (["stats.safetensors"], m.SAFETENSORS + m.PLACE, ["metrics stats"]),
}


def argv_of(name):
    """(module, its arguments) of one of COMMANDS."""
    module, flags, out = COMMANDS[name]
    out = f"{out}/x.safetensors" if module == "release" else out
    return module, [*flags.split(), *(["--out", out] if out else [])]


# The good folder


def build(root, worker):
    """Everything that the commands read, and runs and adapters made by them. Raises if one fails."""
    for name, n, seed in (("data", 24, 0), ("held", 20, 1)):
        run("phantom.py", "--out", root / name, "--n", n, "--size", 32, "--seed", seed)
    captions = (root / "data/prompt-gt.csv").read_text()
    for path in sorted((root / "data/images").iterdir())[::2]:
        Image.open(path).save(path.with_suffix(".jpg"))
        path.unlink()
        captions = captions.replace(path.name, path.stem + ".jpg")
    (root / "data/prompt-gt.csv").write_text(captions)
    (root / "data/attributes.jsonl").unlink()
    shutil.copytree(root / "data/images", root / "jsonl/images")
    rows = [line.split(";") for line in captions.splitlines()[1:]]
    lines = [json.dumps({"file_name": name, "text": prompt}) + "\n" for prompt, name in rows]
    (root / "jsonl/metadata.jsonl").write_text("".join(lines))
    for folder in ("images", "masks"):
        (root / "kvasir" / folder).mkdir(parents=True)
    for i in range(3):
        image(i).save(root / f"kvasir/images/{i}.jpg")
        image(i).convert("L").point(lambda x: 255 * (x > 150)).save(root / f"kvasir/masks/{i}.png")
    (root / "prompts.txt").write_text("".join(p + "\n" for p, _ in rows[:3]))
    (root / "prompts.csv").write_text("Prompt;Seed\n" + "".join(f"{p};1\n" for p, _ in rows[:3]))
    (root / "sentinel").mkdir()
    (root / "sentinel/secret.txt").write_text("secret\n")
    image().save(root / "sentinel/secret.png")
    model = tiny_msdm()
    save_safetensors(root / "msdm.safetensors", model.tensors(), model.metadata())
    save_safetensors(root / "vae.safetensors", model.vae.state_dict(), vae.metadata(model.vae))
    unet = msdm.UNet(msdm.unets.UNetConfig(4, (32, 32, 64), 64, 16, n_heads=8))
    save_safetensors(root / "released/unet.safetensors",
                     in_released_names(unet, release.unet_names(unet.config)))
    torch.save(in_released_names(model.vae, release.vae_names(model.vae.config)), root / "released/vae.pth")
    save_safetensors(root / "stats.safetensors", {"features": torch.randn(20, 8)}, {"size": 32})
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        make_tiny(["--out", str(root / "k22")])
        make_tiny(["--kind", "3", "--out", str(root / "k3")])
    for part in ("prior", "decoder"):
        (root / "k22" / part).rename(root / part)
    (root / "out").mkdir()
    for name, made in (("vae", "run-vae"), ("msdm", "run-msdm"), ("finetune msdm", "run-adapter"),
                       ("finetune prior", "run-prior"), ("sampler again", None)):
        status, err, trace, _ = worker.call(root, name)
        if status != 0:
            raise RuntimeError(f"{name} fails on good files: {err[-2000:]}{trace}")
        if made:
            (root / "out").rename(root / made)
    for form in ("diffusers", "kohya"):
        adapters.write(adapters.read(root / "run-prior/best"), root / f"foreign/{form}.safetensors", form)
