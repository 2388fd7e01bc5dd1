"""What the tests share: recorded outputs, commands as subprocesses, small models and images."""

import atexit
import json
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from classifier import VALUES, Classifier
from files import load_safetensors, save_safetensors
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
    (done,) = ranks(1, ROOT / script, *flags, limit=300)
    assert done.returncode == expect, done.stderr[-3000:]
    return done


def start(script, *flags, **settings):
    """The same command in a fresh interpreter, not waited for."""
    return subprocess.Popen([sys.executable, ROOT / script, *map(str, flags)], env=ENV, **settings)


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


# Starting Python and torch takes seconds. So one process imports the project, and commands are forks of it.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["sampler", "finetune", "judges", "metrics", "phantom", "vae", "torch._dynamo"])


def ranks(n, script, *flags, limit=150):
    """n processes of a script, one thread each, as torchrun starts them; nobody ends the others."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {k: v for k, v in ENV.items() if k not in ("RANK", "WORLD_SIZE")}
    if n > 1:
        env |= {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with tempfile.TemporaryDirectory() as tmp:
        started = []
        for rank in range(n):
            own = env | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if n > 1 else {})
            files = [f"{tmp}/{rank}{name}" for name in ("out", "err")]
            args = str(script), [*map(str, flags)], own, os.getcwd(), files
            p = FORKS.Process(target=run_forked, args=args)
            p.start()
            started.append((p, files))
        ends = time.monotonic() + limit
        for p, files in started:
            p.join(max(0, ends - time.monotonic()))
            if p.is_alive():
                p.kill()
                raise AssertionError(f"{script}: no end in {limit} s: " + Path(files[1]).read_text()[-3000:])
        return [Done(p.exitcode, *(Path(f).read_text(errors="replace") for f in files))
                for p, files in started]


def run_forked(script, flags, env, folder, files):
    """Run a script as `python SCRIPT FLAGS` does, in this process, its output in two files."""
    for fd, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), fd)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    torch.set_num_threads(1)
    sys.argv, sys.path[0:0] = [script, *flags], [str(Path(script).parent)]
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # a fork ends without them


def two_ranks(script, *flags):
    """Two processes of a script, which must end with status 0."""
    done = ranks(2, script, *flags)
    assert all(d.returncode == 0 for d in done), "\n".join(d.stderr[-3000:] for d in done)
    return Done(0, "".join(d.stdout for d in done), "".join(d.stderr for d in done))


def torchrun(script, *flags):
    """The same by torchrun itself."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", script,
               *flags]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=150,
                          env=ENV | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"})
    assert done.returncode == 0, done.stderr[-3000:]
    return done


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


def judge_file(path):
    """A file of an attribute classifier of random weights, for images of 32 px; returns the path."""
    torch.manual_seed(0)
    meta = {"kind": "judge", "size": 32, "values": [list(v) for v in VALUES], "key": "k"}
    save_safetensors(path, Classifier(32).state_dict(), meta)
    return path


def image(seed=0, w=48, h=32):
    """Smooth coloured noise, a PIL image."""
    x = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(x).resize((w, h), Image.Resampling.BICUBIC)


def pixels(out):
    """Of the two images in a folder, as bytes; the files also hold the settings that they were made with."""
    return [open_image(out / "images" / f"{i:06d}.png").tobytes() for i in range(2)]
