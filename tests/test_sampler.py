"""The command that samples: what it refuses before any weight is loaded, and what its files say."""

from command import BadInput

import json
import threading

import pytest
import torch
from helpers import fixture
from PIL import Image

import data
import sampler

PROMPT = "Generate an image with 1 polyp."


class Model:
    """Stands for a pipeline: every image is its seed's noise."""

    defaults, T, networks, loads = {"steps": 3, "guidance": 4.0}, 1000, [], 0

    def prepare(self, prompts, cache):
        pass

    def sample_batch(self, prompts, seeds, **request):
        noise = [torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(s)) for s in seeds]
        return (torch.stack(noise) * 50 + 128).clamp(0, 255).byte()


@pytest.fixture
def loads(monkeypatch):
    """The number of loads of a stand-in for the model of --ckpt."""
    count = []

    def load():
        count.append(1)
        return Model()

    monkeypatch.setattr(sampler, "find_model", lambda args: (load, {"checkpoint": "0123", "lora": None}))
    return count


def sample(out, *flags, prompt=PROMPT):
    sampler.main(["--ckpt", "x", "--prompt", prompt, "--out", str(out), *map(str, flags)])


def test_every_image_says_that_it_is_synthetic_unless_asked_not_to(loads, tmp_path):
    sample(tmp_path / "a", "-n", 2, "--seed", 5)
    sample(tmp_path / "b", "-n", 2, "--seed", 5, "--no-metadata")
    first, second = (tmp_path / name / "images/000001.png" for name in "ab")
    with Image.open(first) as a, Image.open(second) as b:
        assert a.text["prompt"] == PROMPT and a.text["seed"] == "6" and a.text["checkpoint"] == "0123"
        assert "generated" in a.text["synthetic"] and "lora" not in a.text and not b.text
        assert a.tobytes() == b.tobytes()
    (tmp_path / "a/images/000001.png").unlink()
    sample(tmp_path / "a", "-n", 2, "--seed", 5, "--no-metadata")  # is no other setting
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in "ab"]
    assert configs[0] == configs[1]


def test_a_prompt_of_two_lines_is_a_row_that_can_be_read(loads, tmp_path):
    sample(tmp_path / "o", prompt="2 polyps\r\nin the\ncentre\n")
    assert data.read_prompts(tmp_path / "o/prompts.csv") == ["2 polyps in the centre"]
    assert data.read_folder(tmp_path / "o")[0].prompts == ["2 polyps in the centre"]
    with Image.open(tmp_path / "o/images/000000.png") as img:
        assert img.text["prompt"] == "2 polyps in the centre"


@pytest.mark.parametrize("seed", [-1, -2**63, 2**63, 2**64 - 2])
def test_seeds_of_64_bits(loads, tmp_path, seed):
    sample(tmp_path / "o", "-n", 2, "--seed", seed)
    assert f"000001.png,{PROMPT},{seed + 1}" in (tmp_path / "o/prompts.csv").read_text()


@pytest.mark.parametrize(("flags", "said"), [
    (["--seed", 2**64], "--seed"), (["--seed", -2**63 - 1], "--seed"),
    (["--seed", 2**64 - 1, "-n", 2], "must stay below"),
    (["--lora-scale", "nan"], "--lora-scale nan: expected a finite number"),
    (["--lora-scale", "0.5"], "--lora-scale 0.5: expected an adapter that it scales"),
    (["--prompt", "\n "], "--prompt: an empty text"),
    (["--guidance", "nan"], "--guidance nan"), (["--guidance", "inf"], "--guidance inf"),
    (["-n", 10**12], "1000000000000 images, expected at most 1000000"), (["-n", 0], "-n 0"),
    (["--prompt", "caf\udce9"], "expected text in UTF-8"),
    (["--negative-prompt", "\udce9"], "expected text in UTF-8")])
def test_flags_are_refused_before_the_model_is_loaded(loads, tmp_path, flags, said):
    with pytest.raises(BadInput, match=said):
        sample(tmp_path / "o", *flags)
    assert not loads and not (tmp_path / "o").exists()


def test_a_folder_is_refused_before_the_model_is_loaded(loads, tmp_path):
    sample(tmp_path / "done")
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.txt").write_text("")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text('{"settings": {}}')
    loads.clear()
    for out, flags, said in (("done", ["--seed", 7], "made with seed=0, now seed=7"),
                             ("done", ["--steps", 9], "made with steps=3, now steps=9"),
                             ("file", [], "not a folder that can be written"),
                             ("file/below", [], "not a folder that can be written"),
                             ("other", [], "not made by sampler.py"), ("run", [], "not made by sampler.py")):
        with pytest.raises(BadInput, match=said):
            sample(tmp_path / out, *flags)
    assert not loads and [p.name for p in (tmp_path / "other").iterdir()] == ["thesis.txt"]


def test_two_samplers_in_one_folder_agree_or_one_is_refused(tmp_path):
    """As if both had looked into the empty folder before either wrote."""
    outcomes = []

    def claim(seed):
        both.wait()
        try:
            settings = {"prompts": "0", "solver": "ddim", "seed": seed}
            sampler.claim_folder(tmp_path / "o", settings, ["x"], seed)
            outcomes.append(seed)
        except BadInput as error:
            outcomes.append(str(error))

    for seeds, refused in (((1, 1), 0), ((1, 2), 1)):
        for _ in range(20):
            outcomes.clear()
            both = threading.Barrier(2)
            threads = [threading.Thread(target=claim, args=(s,)) for s in seeds]
            [t.start() for t in threads]
            [t.join() for t in threads]
            assert sum(isinstance(o, str) for o in outcomes) == refused, outcomes
            kept = json.loads((tmp_path / "o/config.json").read_text())["seed"]
            assert kept in outcomes
            for f in (tmp_path / "o").iterdir():
                f.unlink()


@pytest.mark.parametrize(("size", "nearest"), [(200, "192 and 256"), (65, "64 and 128"), (30, "64")])
@pytest.mark.parametrize("model", ["2.2", "3"])
def test_a_size_that_kandinsky_does_not_generate_is_refused(monkeypatch, tmp_path, model, size, nearest):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if model == "3":
        flags = ["--ckpt", fixture("kandinsky-3")]
    else:
        flags = ["--ckpt", fixture("kandinsky-2-2-prior"), "--decoder", fixture("kandinsky-2-2-decoder")]
    for cls in (sampler.kandinsky.Kandinsky22, sampler.kandinsky.Kandinsky3):
        monkeypatch.setattr(cls, "from_pretrained", None)  # would be an error to call
    with pytest.raises(BadInput, match=f"--size {size}: expected a multiple of 64; the nearest: {nearest}$"):
        sample(tmp_path / "o", *flags, "--size", size)
    with pytest.raises(BadInput, match="--text-encoder is not for a folder of Kandinsky"):
        sample(tmp_path / "o", *flags, "--text-encoder", "clip")
    assert not (tmp_path / "o").exists()
