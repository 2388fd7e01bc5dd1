"""What the tests share: recorded outputs, commands as subprocesses, small models and images."""

import json
import os
import socket
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from files import load_safetensors
from msdm import MSDM, Diffusion
from pixels import open_image
from text import TextConfig, TextTransformer, learn_tokenizer
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).resolve().parent / "golden"
SHARED = ROOT.parent / "shared"
KVASIR = SHARED / "data/kvasir-seg"
real_images = pytest.mark.skipif(not KVASIR.is_dir(), reason=f"no real images at {KVASIR}")
ENV = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

# Recorded outputs of the reference


def fixture(name):
    """The file or folder of this name; the test is skipped where neither place has it."""
    for place in (GOLDEN, SHARED / "fixtures"):
        if (place / name).exists():
            return place / name
    pytest.skip(f"{name} lies in ../shared/fixtures, which is not beside this clone")


def recorded(name):
    return load_safetensors(fixture(name))[0]


def manifest(name):
    return json.loads(fixture(f"manifests/{name}.json").read_text())


def close(out, expected, atol):
    torch.testing.assert_close(out, expected, atol=atol, rtol=0)


# Commands


def run(script, *flags, expect=0):
    """A command of the project in a process of its own; another exit status than expected fails the test."""
    done = subprocess.run([sys.executable, ROOT / script, *map(str, flags)], capture_output=True, text=True,
                          env=ENV, timeout=300)
    assert done.returncode == expect, done.stderr[-3000:]
    return done


def start(script, *flags, **settings):
    """The same command, not waited for."""
    return subprocess.Popen([sys.executable, ROOT / script, *map(str, flags)], env=ENV, **settings)


def torchrun(script, *flags, processes=2):
    """A script under torchrun, one thread a process; it must end with status 0."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone",
               script, *flags]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=150,
                          env=ENV | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"})
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def two_ranks(script, *flags):
    """[(exit status, stderr)] of two processes of a script; nobody ends the others, as torchrun would."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = ENV | {"PYTHONPATH": str(ROOT), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": str(port)}
    command = [sys.executable, script, *map(str, flags)]
    processes = [subprocess.Popen(command, env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                                  stderr=subprocess.PIPE, text=True) for rank in range(2)]
    said = [p.communicate(timeout=120)[1] for p in processes]
    return [(p.returncode, err) for p, err in zip(processes, said, strict=True)]


def log_lines(run_folder):
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


# Memory


class PeakMemory(TorchDispatchMode):
    """peak: the most bytes of tensors made inside that were alive at once, on any device, meta included."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = weakref.WeakSet()  # a view shares its tensor's storage and counts once

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for storage in (x.untyped_storage() for x in tree_leaves(out) if isinstance(x, torch.Tensor)):
            if storage not in self.known:
                self.known.add(storage)
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return out

    def _add(self, n):
        self.now += n
        self.peak = max(self.peak, self.now)


# Models and images

PROMPTS = ["Generate an image with 2 polyps.", "Generate an image containing text.",
           "Generate an image with no polyps."]


def tiny_msdm(**diffusion):
    """A small MSDM in which no layer is zero, and so every part takes part."""
    torch.manual_seed(0)
    tokenizer, vocab = learn_tokenizer(PROMPTS, vocab=300)
    text = TextTransformer(TextConfig(tokenizer, vocab, length=16, dim=32, n_layers=1, n_heads=2))
    unet = UNet(UNetConfig(in_channels=4, channels=(32, 32, 32), time_dim=64, text_dim=32, n_heads=2,
                           dropout=0.1))
    vae = VAE(VAEConfig(channels=(8, 8, 8), latent_channels=4))
    for p in [*unet.parameters(), *vae.parameters()]:
        torch.nn.init.normal_(p, std=0.1)
    return MSDM(unet, vae, text, Diffusion(**{"prediction": "v", "image_size": 32} | diffusion)).eval()


def image(seed=0, w=48, h=32):
    """Smooth coloured noise, a PIL image."""
    x = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(x).resize((w, h), Image.Resampling.BICUBIC)


def pixels(out):
    """Of the two images in a folder, as bytes; the files also hold the settings that they were made with."""
    return [open_image(out / "images" / f"{i:06d}.png").tobytes() for i in range(2)]
