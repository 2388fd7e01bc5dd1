"""mirrored.py: pairs that agree after mirroring, what is left alone, and that a step draws them together."""

from command import BadInput

from argparse import Namespace

import numpy as np
import pytest
import torch
from helpers import image, tiny_msdm
from PIL import Image, ImageOps

import data
import finetune
import mirrored
import msdm
import phantom
import prompts
import training
from captions import CaptionSampler
from files import save_safetensors
from wording import Wording

FREE = [prompts.write({"text": False}), prompts.write({"box": False})]
LEFT = prompts.write({"abnormality_cells": ["upper-left", "center"]})
OWN = Wording()                            # prompts in their own words
AXES = ("horizontal", "vertical", "both")


def record(folder, own, name="a.png", img=None):
    wall = Image.new("RGB", (40, 32), (190, 110, 90))
    wall.paste(image(len(name), 10, 10), (20, 3))
    (img or wall).save(folder / name)
    return data.Record(folder / name, name, list(own))


def drawn(scene, folder, name):
    return record(folder, [prompts.write({"text": False, "box": False})], name,
                  Image.fromarray(phantom.render(scene, 96)))


@pytest.mark.parametrize("axis", AXES)
def test_the_mirrored_image_of_a_phantom_shows_its_mirrored_prompt(tmp_path, axis):
    cells = set()
    for index in range(120):
        scene = phantom.draw_scene(7, index) | {"text": None}
        if scene["box"] or len(scene["polyps"]) != 1 or scene["polyps"][0]["paris"] == "ip":
            continue
        with_polyp = drawn(scene, tmp_path, "a.png")
        without = drawn(scene | {"polyps": []}, tmp_path, "b.png")
        own = phantom.attributes(scene, "a.png")["polyps"][0]["cells"]
        with_polyp.prompts.append(prompts.write({"abnormality_cells": own}))
        records = mirrored.with_copies([with_polyp, without], axis, 96, OWN)[0]
        a, b = (next(r for r in records if r.name == name and r.mirror == axis)
                for name in ("a.png", "b.png"))
        polyp = (data.read_image(a, 96).int() - data.read_image(b, 96).int()).abs().sum(0).double().numpy()
        y, x = (np.average(np.arange(96) + 0.5, weights=polyp.sum(other)) / 96 for other in (1, 0))
        place = prompts.CELLS[phantom.cell_of(x, y)]
        found = prompts.parse(" ".join(a.prompts))["abnormality_cells"]
        assert place in found == prompts.mirror({"abnormality_cells": own}, axis)["abnormality_cells"], index
        cells.add(place)
    assert len(cells) >= 4


@pytest.mark.parametrize(("own", "size", "why"), [
    ([*FREE, LEFT], 512, None), ([FREE[0], LEFT], 512, None), ([LEFT], 64, None), ([LEFT], 255, None),
    ([FREE[1], LEFT], 256, "perhaps with text"), ([*FREE, prompts.write({"text": True})], 64, "with text"),
    ([FREE[0], prompts.write({"box": True})], 64, "with a box"),
    ([*FREE, "A polyp on the left wall."], 64, "with a side named"),
    ([*FREE, "A polyp on a fold, top right."], 64, None)])
def test_what_a_mirror_would_make_untrue_is_left_alone(tmp_path, own, size, why):
    a, b = record(tmp_path, own), record(tmp_path, [*FREE, LEFT], "b.png")
    found = mirrored.obstacle(a, size, OWN)
    assert found is None if why is None else found.startswith(why)
    names = [r.name for r in mirrored.with_copies([a, b], "vertical", size, OWN)[0]]
    assert names == ["a.png", "b.png", *["a.png"] * (why is None), "b.png"]


def test_paraphrases_are_mirrored_with_their_prompts(tmp_path):
    a, b = record(tmp_path, [*FREE, LEFT]), record(tmp_path, FREE, "b.png")
    words = Wording({LEFT: ["A lesion in the top left and center."], FREE[0]: ["Text-free."]}, "mix", 0.3)
    records, found = mirrored.with_copies([a, b], "horizontal", 64, words)
    right = records[2].prompts[2]
    assert [r.name for r in records] == ["a.png", "b.png", "a.png", "b.png"]
    assert right == prompts.mirror(LEFT, "horizontal") != LEFT
    other = {right: ["A lesion in the top right and center."]}
    assert found == Wording(words.paraphrases | other, "mix", 0.3)
    words.paraphrases[LEFT].append("A lesion on the left wall.")
    assert [r.name for r in mirrored.with_copies([a, b], "both", 64, words)[0]] == ["a.png", *["b.png"] * 4]


def test_a_box_that_no_prompt_speaks_of_is_found(tmp_path, capsys):
    img = Image.new("RGB", (120, 120), (200, 120, 100))
    img.paste((20, 170, 130), (5, 75, 45, 115))
    boxed = record(tmp_path, [FREE[0], LEFT], "boxed.png", img)
    free = record(tmp_path, [*FREE, LEFT], "b.png")
    denied = record(tmp_path, [*FREE, LEFT], "denied.png", img)         # the prompts know better
    records = mirrored.with_copies([boxed, free, denied], "both", 64, OWN)[0]
    assert [r.name for r in records if r.mirror == "both"] == ["b.png", "denied.png"]
    assert mirrored.entries(records) == [[0], [1, 3, 5, 7], [2, 4, 6, 8]]
    said = "--mirror both: 2 of 3 images are mirrored; left alone: 1 with a box"
    assert said in capsys.readouterr().err
    with pytest.raises(BadInput, match="none of 1 images can be mirrored, found 1 with a box; leave"):
        mirrored.with_copies([boxed], "both", 64, OWN)
    assert mirrored.with_copies([boxed], None, 64, OWN)[0] == [boxed]


@torch.no_grad()
def test_a_step_draws_the_latent_of_the_mirrored_image_with_its_mirrored_prompt(tmp_path):
    m, flags = tiny_msdm(), Namespace(size=32, crop="pad", seed=3, p_self_cond=0.0, logit_normal=None)
    own = [record(tmp_path, [LEFT, *FREE][:1 + 2 * i], f"{i}.png") for i in range(2)]
    own[0].prompts.append("A polyp on the left.")                       # this image is left alone
    records = mirrored.with_copies(own, "both", 32, OWN)[0]
    latents, kept = msdm.latents_of(records, flags, m.vae, ("vae",), tmp_path / "run", training.start("cpu"))
    flips = {"": lambda x: x, "horizontal": ImageOps.mirror, "vertical": ImageOps.flip,
             "both": lambda x: ImageOps.mirror(ImageOps.flip(x))}
    assert kept == records and [r.mirror for r in records] == ["", "", *AXES]
    for r, latent in zip(records, latents, strict=True):
        pixels = data.preprocess(flips[r.mirror](data.open_image(r.path)), 32)
        img = data.to_float(torch.from_numpy(pixels).permute(2, 0, 1)[None])
        torch.testing.assert_close(latent.float(), torch.cat(m.vae.moments(img), 1), atol=2e-3, rtol=2e-3)
    captions = CaptionSampler(records, own, m.text, 1, 0.0, "", tmp_path, training.start("cpu"), OWN)
    objective = msdm.Objective(m, latents[:, :1], captions, flags, mirrored.entries(records))
    shown, asked = [], []
    objective.latents = Recorder(latents, shown)
    captions.fields = lambda own: asked.extend(own) or {"rows": torch.zeros(len(own))}
    for step in range(40):
        indices, draws = training.Distributed(0, 1, torch.device("cpu")).batch(2, 2, step, 0)
        objective.draw_batch(indices, draws)
    for row, prompt in zip(shown, asked, strict=True):
        assert prompt in records[row].prompts
    assert {row: shown.count(row) for row in set(shown)}[0] == 40 and set(shown) == {0, 1, 2, 3, 4}


class Recorder:
    """In the place of latents: keeps which rows are read."""

    def __init__(self, latents, shown):
        self.latents, self.shown, self.shape = latents, shown, latents.shape

    def __getitem__(self, key):
        self.shown += key[0].tolist()
        return self.latents[key]


def test_mirrored_images_have_latents_of_their_own_and_plain_ones_keep_theirs(tmp_path):
    own = [record(tmp_path, [*FREE, LEFT], f"{i}.png") for i in range(2)]
    plain, pairs = data.image_fingerprint(own), mirrored.with_copies(own, "vertical", 32, OWN)[0]
    assert data.image_fingerprint(own) == plain
    assert len({plain, *(data.image_fingerprint([*own, *(mirrored.mirrored(r, axis) for r in own)])
                         for axis in AXES)}) == 4
    assert data.image_fingerprint(pairs) != data.image_fingerprint([*own, *own])


def test_an_adapter_learns_from_mirrored_pairs(tmp_path):
    base = tiny_msdm()
    save_safetensors(tmp_path / "base.safetensors", base.tensors(), base.metadata())
    phantom.main(["--out", str(tmp_path / "data"), "--n", "12", "--size", "32"])
    flags = ["msdm", "--data", tmp_path / "data", "--model", tmp_path / "base.safetensors", "--rank", 4,
             "--steps", 2, "--batch-size", 4, "--shown", 0, "--mirror", "both", "--cache", tmp_path / "cache"]
    finetune.main([str(x) for x in (*flags, "--out", tmp_path / "run")])
    train, _ = data.split(data.read_folder(tmp_path / "data"))
    free = [r for r in train if not mirrored.obstacle(r, 32, OWN)]
    names = [msdm.load_metadata(f).get("names") for f in (tmp_path / "cache").glob("latents-*")]
    assert 0 < len(free) < len(train)
    assert {len(n) for n in names} == {len(train) + 3 * len(free), 12 - len(train)}
