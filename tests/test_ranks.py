"""Several processes under torchrun, on the CPU by gloo: they share out the work and end together."""

import argparse
import shutil

import pytest
import torch
from helpers import ROOT, image, log_lines, ranks, tiny_msdm, two_ranks

import data
import msdm
import training
import vae
from captions import CaptionSampler
from wording import Wording


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data folder of 100 images: parts of 32, 32, 32 and 4."""
    root = tmp_path_factory.mktemp("data")
    (root / "images").mkdir()
    for i in range(100):
        image(i, 32, 32).save(root / f"images/{i:03d}.png")
    data.write_captions(root, [(f"an image with {i % 7} polyps", f"{i:03d}.png") for i in range(100)])
    return root


def latents(folder, out, world):
    args = argparse.Namespace(size=32, crop="pad", seed=3)
    return msdm.latents_of(data.read_folder(folder), args, tiny_msdm().vae, (), out, world, 0.4, 2)[0]


def test_the_share_of_a_list():
    for n in range(12):
        for size in (1, 2, 3, 5):
            shares = [training.Distributed(rank, size, torch.device("cpu")).share(list(range(n)))
                      for rank in range(size)]
            assert sum(shares, []) == list(range(n)) and len(shares[0]) >= len(shares[-1])
            assert max(map(len, shares)) - min(map(len, shares)) <= 1 and bool(shares[0]) == (n > 0)


SHARED_LATENTS = """
import argparse, sys
from pathlib import Path
from command import BadInput
import duplicates, files, msdm, training
from test_ranks import latents
world, folder, root = training.start("cpu"), Path(sys.argv[1]), Path(sys.argv[2])
if world.rank:  # would be errors to call: rank 0 compares the images
    duplicates.look = duplicates.compare = None
train, val, _ = training.read_data(argparse.Namespace(data=folder, captions=None), world)
assert len(train) + len(val) == 100 and val
encode, encoded = msdm.encode_latents, []

def counted(vae, images, parts, *more):
    encoded.append(len(parts))
    return encode(vae, images, parts, *more)

msdm.encode_latents = counted
first = latents(folder, root / "two", world)
again = latents(folder, root / "two", world)
assert encoded == [2] and (first == again).all(), encoded  # two parts of four, once

beside = files._beside
if world.rank == 1:  # the disk of one rank is full
    files._beside = lambda path: root / "absent" / "x"
alone = latents(folder, root / "full", world)
assert encoded == [2, 2, 4] and (first == alone).all() and not list((root / "full").iterdir()), encoded
files._beside = beside
apart = latents(folder, root / f"disk-{world.rank}", world)  # disks that are not one
assert encoded == [2, 2, 4, 2, 4] and (first == apart).all(), encoded

def fails(vae, images, parts, *more):
    yield from encode(vae, images, parts[:1], *more)
    if world.rank == 1:
        raise BadInput("an image is unreadable")
    yield from encode(vae, images, parts[1:], *more)

msdm.encode_latents = fails
try:
    latents(folder, root / "bad", world)
    raise SystemExit("expected BadInput")
except BadInput as error:
    assert str(error).startswith("an image is" if world.rank else "another process of this command"), error
world.barrier()
assert not list((root / "bad").iterdir())
"""


def test_ranks_share_the_encoding_and_their_file_is_that_of_one_process(folder, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as under torchrun
    latents(folder, tmp_path / "one", training.start("cpu"))
    torch.set_num_threads(threads)
    (tmp_path / "two").mkdir()
    (one,) = (tmp_path / "one").iterdir()
    left = tmp_path / "two" / f".{one.stem}.99999999000001.safetensors"  # of a rank that was killed
    left.touch()
    (tmp_path / "two.py").write_text(SHARED_LATENTS)
    shutil.rmtree(folder.parent / ".features")
    two_ranks(tmp_path / "two.py", folder, tmp_path)
    (two,) = (tmp_path / "two").iterdir()
    assert two.name == one.name and two.read_bytes() == one.read_bytes()


SHARED_TEXTS = """
import sys
from pathlib import Path
import msdm, training
from test_ranks import captions
world, root = training.start("cpu"), Path(sys.argv[1])
text, encoded = msdm.TextTransformer.encode, []

def counted(self, ids, mask):
    encoded.append(len(ids))
    return text(self, ids, mask)

msdm.TextTransformer.encode = counted
found = captions(root / "two", world)
assert sum(encoded) == [64 + 1, 17 + 1][world.rank], encoded  # and the empty one, to know the size
again = captions(root / "two", world)
assert encoded[-1] == 1 and (again.cache[0] == found.cache[0]).all(), encoded
"""


def captions(root, world):
    """The captions of 80 images, with prompts of their own, for a frozen text encoder."""
    records = [data.Record(ROOT / str(i), str(i), [f"an image with {i} polyps"]) for i in range(80)]
    text = tiny_msdm().text.requires_grad_(False)
    return CaptionSampler(records[8:], records[:8], text, 1, 0.2, "0", root, world, Wording())


@torch.no_grad()
def test_ranks_share_the_captions_and_their_file_is_that_of_one_process(tmp_path):
    one = captions(tmp_path / "one", training.start("cpu"))
    prompts = sorted(one.rows)
    states, mask = tiny_msdm().text(prompts[:64])  # in batches of the same size
    assert torch.equal(one.cache[0][:64], states) and torch.equal(one.cache[1][:64], mask)
    (tmp_path / "two.py").write_text(SHARED_TEXTS)
    two_ranks(tmp_path / "two.py", tmp_path)
    (a,), (b,) = ((tmp_path / name).iterdir() for name in ("one", "two"))
    assert a.name == b.name and a.name.startswith("text-") and a.read_bytes() == b.read_bytes()


SHARED_VALIDATION = """
import argparse, torch, training, vae
from command import BadInput
from helpers import tiny_msdm
world, one = training.start("cpu"), training.Distributed(0, 1, torch.device("cpu"))
settings = argparse.Namespace(**vae.TRAINING["tiny"])
objective = vae.Objective(tiny_msdm().vae, None, settings, one.device)
images = torch.randint(256, (40, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

class Counted:
    n, bad = 0, False
    def __len__(self):
        return len(images)
    def __getitem__(self, part):
        if self.bad:
            raise BadInput("an image is unreadable")
        self.n += part.stop - part.start
        return images[part]

shared = Counted()
loss, terms = objective.validate(shared, world)
expected, terms_of_one = objective.validate(images, one)
torch.testing.assert_close(loss, expected)
torch.testing.assert_close(terms, {} if world.rank else terms_of_one)
assert shared.n == [32, 8][world.rank] and len(terms_of_one) == 5
scale = vae.measure_scale(objective.vae, shared, world)
torch.testing.assert_close(scale, vae.measure_scale(objective.vae, images, one))
assert shared.n == [64, 16][world.rank]
shared.bad = world.rank == 1
for function in (objective.validate, lambda *args: vae.measure_scale(objective.vae, *args)):
    try:
        function(shared, world)
        raise SystemExit("expected BadInput")
    except BadInput as error:
        assert str(error).startswith("an image is" if world.rank else "another process of this"), error
"""


def test_ranks_share_the_autoencoders_validation(tmp_path):
    (tmp_path / "two.py").write_text(SHARED_VALIDATION)
    two_ranks(tmp_path / "two.py")


def test_a_run_of_two_processes_goes_on_in_one_with_the_losses_of_one(folder, tmp_path, capsys):
    flags = ["--data", folder, "--size", 32, "--perceptual", "off", "--log-every", 1, "--save-every", 2,
             "--no-cosine", "--device", "cpu"]
    two_ranks(ROOT / "vae.py", *flags, "--batch-size", 2, "--steps", 4, "--out", tmp_path / "two")
    for name, batch_size in (("two", 2), ("one", 4)):
        vae.main([str(x) for x in (*flags, "--batch-size", batch_size, "--steps", 6, "--out",
                                   tmp_path / name)])
    assert "a step keeps its 4 images, 4 in each of 1 process" in capsys.readouterr().err
    two, one = (log_lines(tmp_path / name) for name in ("two", "one"))
    assert [line["step"] for line in two] == [line["step"] for line in one] == [1, 2, 2, 3, 4, 4, 5, 6, 6]
    for ours, expected in zip(two, one, strict=True):
        assert ours == pytest.approx(expected, rel=3e-4)


# Rank 2 is alone on its machine.
TWO_MACHINES = """
import os, sys
os.environ["LOCAL_RANK"] = {"0": "0", "1": "1", "2": "0"}[os.environ["RANK"]]
import training
world = training.start("cpu")

def function():
    with open(sys.argv[1], "a") as f:
        f.write(f"{world.rank}\\n")

world.main_first(function)
"""


def test_rank_0_comes_first_then_the_first_of_each_other_machine(tmp_path):
    (tmp_path / "machines.py").write_text(TWO_MACHINES)
    ranks(3, tmp_path / "machines.py", tmp_path / "order")
    assert (tmp_path / "order").read_text().split() == ["0", "2", "1"]
