"""The command that samples: what it refuses before any weight is loaded, and what its files say."""

from command import BadInput

import errno
import json
import shutil
import threading

import numpy as np
import pytest
import torch
from helpers import ROOT, fixture, image, ranks, tiny_msdm, two_ranks
from PIL import Image
from torch.nn.modules.module import register_module_forward_pre_hook

import data
import sampler
from files import file_hash, save_safetensors

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


def test_an_image_that_says_that_it_is_another_is_neither_kept_nor_overwritten(loads, tmp_path):
    sample(tmp_path / "o", "-n", 2, "--seed", 5)
    first, second = (tmp_path / f"o/images/00000{i}.png" for i in range(2))
    shutil.copy(first, second)
    with pytest.raises(BadInput, match="000001.png: expected the image of seed 6 .*, got one of seed 5"):
        sample(tmp_path / "o", "-n", 2, "--seed", 5)
    assert second.read_bytes() == first.read_bytes()


def test_a_negative_prompt_without_guidance_is_refused(loads, tmp_path):
    with pytest.raises(BadInput, match="--negative-prompt plays no part where --guidance is 1"):
        sample(tmp_path / "o", "--negative-prompt", "text", "--guidance", 1)
    assert not (tmp_path / "o").exists()


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
    (["--size", 10**9], "--size 1000000000: expected a finite number up to 65536"),
    (["--guidance", "nan"], "--guidance nan"), (["--guidance", "inf"], "--guidance inf"),
    (["-n", 10**12], "1000000000000 images, expected at most 1000000"), (["-n", 0], "-n 0"),
    (["--prompt", "caf\udce9"], "expected text in UTF-8"),
    (["--prompt", "x" * 100_001], "the prompt has 100001 characters, expected at most 100000"),
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


def test_a_table_of_prompts_that_somebody_went_on_with_is_kept(tmp_path):
    settings = {"prompts": "0", "solver": "ddim", "seed": 1}
    for _ in range(2):
        sampler.claim_folder(tmp_path / "o", settings, ["a", "b, c"], 1)
    table = tmp_path / "o/prompts.csv"
    table.write_bytes(table.read_bytes().replace(b"\n", b"\r\n"))     # as earlier versions wrote it
    sampler.claim_folder(tmp_path / "o", settings, ["a", "b, c"], 1)
    rated = table.read_text().replace("Seed", "Seed,Rating")
    table.write_text(rated)
    with pytest.raises(BadInput, match="prompts.csv: holds other rows"):
        sampler.claim_folder(tmp_path / "o", settings, ["a", "b, c"], 1)
    assert table.read_text() == rated


@pytest.mark.parametrize("resized", [[1], [0, 1, 2]])
def test_images_that_were_resized_where_they_lie_are_named(loads, tmp_path, resized):
    sample(tmp_path / "o", "-n", 4)
    for i in resized:
        file = tmp_path / f"o/images/00000{i}.png"
        with Image.open(file) as img:
            img.resize((16, 12)).save(file)
    (tmp_path / "o/images/000003.png").unlink()
    with pytest.raises(BadInput, match="00000[013].png: .* px, .*move those that were resized away"):
        sample(tmp_path / "o", "-n", 4, "--grid")


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


MODELS = {"2.2": ("kandinsky-2-2-prior", "--decoder", "kandinsky-2-2-decoder"), "3": ("kandinsky-3",)}


def kandinsky_flags(model, *more):
    folders = [x if x.startswith("-") else fixture(x) for x in MODELS[model]]
    return [str(x) for x in ("--ckpt", *folders, "--prompt", PROMPT, "--device", "cpu", "--size", 64,
                             "--steps", 2, *more)]


@pytest.mark.parametrize(("size", "nearest"), [(200, "192 and 256"), (65, "64 and 128"), (30, "64")])
@pytest.mark.parametrize("model", MODELS)
def test_a_size_that_kandinsky_does_not_generate_is_refused(monkeypatch, tmp_path, model, size, nearest):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    flags = kandinsky_flags(model)
    for cls in (sampler.kandinsky.Kandinsky22, sampler.kandinsky.Kandinsky3):
        monkeypatch.setattr(cls, "from_pretrained", None)  # would be an error to call
    for flag in ("--size", "--width", "--height"):
        with pytest.raises(BadInput, match=f"{flag} {size}: expected a multiple of 64; .*: {nearest}$"):
            sample(tmp_path / "o", *flags, flag, size)
    with pytest.raises(BadInput, match="--text-encoder is not for a folder of Kandinsky"):
        sample(tmp_path / "o", *flags, "--text-encoder", "clip")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("flags", "size"), [
    (["--width", 128], (128, 64)), (["--height", 128], (64, 128)),
    (["--width", 64, "--height", 64], (64, 64))])
def test_width_and_height(monkeypatch, tmp_path, model, flags, size):
    """Each is --size, here 64, unless given."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sampler.main([*kandinsky_flags(model), "--out", str(tmp_path / "o"), *map(str, flags)])
    with Image.open(tmp_path / "o/images/000000.png") as img:
        assert img.size == size
    config = json.loads((tmp_path / "o/config.json").read_text())
    assert (config["width"], config["height"]) == size
    with pytest.raises(BadInput, match="images made with width="):
        sampler.main([*kandinsky_flags(model), "--out", str(tmp_path / "o"), "--width", "192"])


@pytest.mark.parametrize("model", MODELS)
def test_a_folder_of_an_earlier_version_is_gone_on_with(monkeypatch, tmp_path, model):
    """It wrote one size for both sides, and nothing of the prior's steps or of images to begin with."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    flags, out = kandinsky_flags(model, "--out", tmp_path / "o", "-n", 2), tmp_path / "o"
    sampler.main(flags)
    expected = hashes_of(out)
    config = json.loads((out / "config.json").read_text())
    kept = ("checkpoint", "decoder", "lora", "prior_lora", "decoder_lora", "prompts", "steps", "solver",
            "guidance", "negative_prompt", "seed", "dtype", "lora_scale")
    older = {k: config[k] for k in kept if k in config} | {"size": 64}
    (out / "config.json").write_text(json.dumps(older))
    (out / "images/000001.png").unlink()
    sampler.main(flags)
    assert hashes_of(out) == expected and json.loads((out / "config.json").read_text()) == older
    for more, said in ((["--size", "128"], "width=64, now width=128"),
                       (["--height", "128"], "height=64, now height=128"),
                       *([(["--prior-steps", "9"], "prior_steps=25, now")] if model == "2.2" else [])):
        with pytest.raises(BadInput, match=f"holds images made with {said}"):
            sampler.main([*flags, *more])


# --init-image


@pytest.fixture
def pictures(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for i in range(2):
        image(i, 64, 64).save(tmp_path / f"{i}.png")
    (tmp_path / "text.png").write_text("no image")
    return [tmp_path / "0.png", tmp_path / "1.png"]


def flags_of(model, checkpoint):
    if model == "msdm":
        return ["--ckpt", str(checkpoint), "--prompt", PROMPT, "--steps", "2"]
    return kandinsky_flags(model)


@pytest.mark.parametrize("model", ["msdm", *MODELS])
def test_strength_zero_is_the_reconstruction_and_one_the_plain_sample(checkpoint, pictures, tmp_path, model):
    flags = [*flags_of(model, checkpoint), "-n", "2", "--out"]
    sampler.main([*flags, str(tmp_path / "plain")])
    for strength in ("0", "0.5", "1"):
        sampler.main([*flags, str(tmp_path / strength), "--init-image", str(pictures[0]), "--strength",
                      strength])
    found = {name: list(hashes_of(tmp_path / name).values()) for name in ("plain", "0", "0.5", "1")}
    assert found["1"] == found["plain"]  # the whole files
    with Image.open(tmp_path / "0/images/000000.png") as a, Image.open(tmp_path / "0/images/000001.png") as b:
        assert a.tobytes() == b.tobytes() and a.text["init_image"] == file_hash(pictures[0])
    assert len({*found["plain"], *found["0.5"], *found["0"]}) == 6
    args = sampler.parse([*flags, "x", "--device", "cpu"])
    loaded = sampler.find_model(args)[0]()
    size = {} if model == "msdm" else {"height": 64, "width": 64}
    with torch.no_grad(), Image.open(tmp_path / "0/images/000000.png") as img:
        z = loaded.encode_image(data.open_image(pictures[0]), **size)
        decode = loaded.vae.decode if model == "msdm" else loaded.movq.decode
        own = data.to_uint8(decode(z))[0].permute(1, 2, 0).numpy()
        assert (own == np.asarray(img)).all()


def test_another_image_or_strength_on_a_folder_is_refused(checkpoint, pictures, tmp_path):
    flags = [*flags_of("msdm", checkpoint), "--steps", "4", "--out", str(tmp_path / "o")]
    one, other = (["--init-image", str(p)] for p in pictures)
    sampler.main([*flags, *one])
    sampler.main([*flags, *one, "--strength", "0.3"])  # the default
    config = json.loads((tmp_path / "o/config.json").read_text())
    assert config["strength"] == 0.3 and config["init_image"] == file_hash(pictures[0])
    for more, said in ((other, "made with init_image="), ([], "made with strength=0.3, now strength=None"),
                       ([*one, "--strength", "0.4"], "made with strength=0.3, now strength=0.4")):
        with pytest.raises(BadInput, match=said):
            sampler.main([*flags, *more])


@pytest.mark.parametrize(("flags", "said"), [
    (["--strength", "0.5"], "--strength 0.5: expected --init-image"),
    (["--init-image", "{}/0.png", "--strength", "1.1"], "--strength 1.1: expected .* from 0 up to 1"),
    (["--init-image", "{}/0.png", "--strength", "nan"], "--strength nan: expected"),
    (["--init-image", "{}/0.png", "--strength", "0.4"], "--strength 0.4: less than one of 2 steps; .* 0.5"),
    (["--init-image", "{}/absent.png"], "absent.png: no such image"),
    (["--init-image", "{}/text.png"], "text.png: the file is no JPEG, PNG, GIF, BMP, WEBP or TIFF")])
def test_an_init_image_that_cannot_be_used_is_one_line(checkpoint, pictures, tmp_path, flags, said):
    with pytest.raises(BadInput, match=said):
        sampler.main([*flags_of("msdm", checkpoint), "--out", str(tmp_path / "o"),
                      *(f.format(tmp_path) for f in flags)])
    assert not (tmp_path / "o").exists()


# --image-prompt


def test_variations_of_an_image(pictures, tmp_path):
    def made(name, *flags):
        sampler.main(kandinsky_flags("2.2", "-n", 2, "--out", tmp_path / name, *flags))
        return set(hashes_of(tmp_path / name).values())

    one, other = (["--image-prompt", p] for p in pictures)
    plain, variations = made("plain"), made("one", *one)
    assert made("zero", *one, "--image-weight", 0) == plain  # the whole files
    found = [plain, variations, made("other", *other), made("half", *one, "--image-weight", 0.5),
             made("both", *one, "--init-image", pictures[1], "--strength", 0.5),
             made("negative", *one, "--negative-prompt", "text", "--prior-steps", 3)]
    assert len(set.union(*found)) == 12
    with Image.open(tmp_path / "one/images/000001.png") as img:
        assert img.text["image_prompt"] == file_hash(pictures[0]) and "init_image" not in img.text
    for flags, said in ((other, "made with image_prompt="), ([], "made with image_weight=1.0, now"),
                        ([*one, "--image-weight", 0.5], "made with image_weight=1.0, now image_weight=0.5")):
        with pytest.raises(BadInput, match=said):
            made("one", *flags)


@pytest.mark.parametrize(("flags", "said"), [
    (["--image-weight", "0.5"], "--image-weight 0.5: expected --image-prompt"),
    (["--image-prompt", "{}/0.png", "--image-weight", "-1"], "--image-weight -1.0: .* from 0 up to 1"),
    (["--image-prompt", "{}/0.png", "--prior-steps", "3"], "--prior-steps plays no part where"),
    (["--image-prompt", "{}/0.png", "--prior-guidance", "3", "--negative-prompt", "text"],
     "--prior-guidance plays no part where"),
    (["--image-prompt", "{}/text.png"], "text.png: the file is no JPEG, PNG, GIF, BMP, WEBP or TIFF")])
def test_an_image_prompt_that_cannot_be_used_is_one_line(pictures, rows, tmp_path, flags, said):
    with pytest.raises(BadInput, match=said):
        sampler.main(kandinsky_flags("2.2", "--out", tmp_path / "o", *(f.format(tmp_path) for f in flags)))
    assert not any(rows.values()) and not (tmp_path / "o").exists()


def test_an_image_prompt_is_for_kandinsky_2_2(checkpoint, pictures, tmp_path):
    for ckpt, kind in ((checkpoint, "an MSDM checkpoint"), (fixture("kandinsky-3"), "Kandinsky 3")):
        with pytest.raises(BadInput, match=f"--image-prompt is not for {kind}"):
            sample(tmp_path / "o", "--ckpt", ckpt, "--image-prompt", pictures[0])


# Width and height


def test_width_and_height_are_not_for_msdm(checkpoint, tmp_path):
    for flag in ("--width", "--height"):
        with pytest.raises(BadInput, match=f"{flag} is not for an MSDM checkpoint"):
            sample(tmp_path / "o", "--ckpt", checkpoint, flag, 64)


# The prior of Kandinsky 2.2


@pytest.fixture
def rows(monkeypatch, tmp_path):
    """The batch size of every pass through the prior and the decoder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = {"Prior": [], "Decoder": []}

    def count(module, args):
        if type(module).__name__ in rows:
            rows[type(module).__name__].append(len(args[0]))

    hook = register_module_forward_pre_hook(count)
    yield rows
    hook.remove()


def test_the_prior_has_guidance_and_steps_of_its_own(rows, tmp_path):
    def asked(name, *flags):
        [found.clear() for found in rows.values()]
        sampler.main(kandinsky_flags("2.2", "--out", tmp_path / name, *flags))
        prior, decoder = rows.values()
        assert sum(decoder) == 4  # two steps with guidance
        return sum(prior)

    assert asked("plain") == asked("same", "--prior-steps", 25, "--prior-guidance", 4) == 50
    assert asked("one", "--prior-guidance", 1) == 25  # once a step
    assert asked("few", "--prior-guidance", 1, "--prior-steps", 3) == 3
    same, one, plain = (hashes_of(tmp_path / name) for name in ("same", "one", "plain"))
    assert same == plain != one
    with pytest.raises(BadInput, match="made with prior_steps=25, now prior_steps=3"):
        sampler.main(kandinsky_flags("2.2", "--out", tmp_path / "plain", "--prior-steps", 3))


@pytest.mark.parametrize(("flags", "said"), [
    (["--prior-steps", "1001"], "--prior-steps 1001: the checkpoint's schedule has 1000 times"),
    (["--prior-steps", "0"], "--prior-steps 0: expected 1 or more"),
    (["--prior-guidance", "nan"], "--prior-guidance nan: expected a finite number"),
    (["--guidance", "1", "--prior-guidance", "1", "--negative-prompt", "text"], "plays no part")])
def test_a_request_that_the_prior_cannot_fulfil_is_refused(rows, tmp_path, flags, said):
    with pytest.raises(BadInput, match=said):
        sampler.main(kandinsky_flags("2.2", "--out", tmp_path / "o", *flags))
    assert not any(rows.values()) and not (tmp_path / "o").exists()


@pytest.mark.parametrize("flags", [["--prior-steps", 3], ["--prior-guidance", 0]])
def test_flags_of_the_prior_are_for_kandinsky_2_2(checkpoint, tmp_path, flags):
    for ckpt, kind in ((checkpoint, "an MSDM checkpoint"), (fixture("kandinsky-3"), "Kandinsky 3")):
        with pytest.raises(BadInput, match=f"{flags[0]} is not for {kind}"):
            sample(tmp_path / "o", "--ckpt", ckpt, *flags)


# Files are written while the next batch is computed


def test_a_batch_is_written_while_the_next_one_is_computed(loads, tmp_path, monkeypatch):
    write, computing, before = data.write_image, threading.Event(), []

    class Slow(Model):
        def sample_batch(self, prompts, seeds, **request):
            if seeds[0] == 2:
                computing.set()
            return super().sample_batch(prompts, seeds, **request)

    def write_late(path, *args):
        before.append(computing.wait(timeout=20) and path.name)
        write(path, *args)

    monkeypatch.setattr(sampler, "find_model", lambda args: (Slow, {"checkpoint": "0123"}))
    monkeypatch.setattr(data, "write_image", write_late)
    sample(tmp_path / "o", "-n", 4, "--batch-size", 2)
    assert set(before[:2]) == {"000000.png", "000001.png"}
    assert all(sampler.is_whole(tmp_path / "o/images" / f"{i:06d}.png", {}, {}) for i in range(4))


def test_a_file_that_cannot_be_written_ends_the_command_and_is_made_by_the_next(loads, tmp_path, monkeypatch):
    write = data.write_image

    def full(path, *args):
        if path.name == "000001.png":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, *args)

    with monkeypatch.context() as m, pytest.raises(OSError, match="No space left"):
        m.setattr(data, "write_image", full)
        sample(tmp_path / "o", "-n", 8, "--batch-size", 2)
    there = {f.name for f in (tmp_path / "o/images").iterdir()}
    assert there <= {"000000.png", "000002.png", "000003.png"}  # and no batch after the next one
    sample(tmp_path / "o", "-n", 8, "--batch-size", 2)
    sample(tmp_path / "all", "-n", 8)
    assert hashes_of(tmp_path / "o") == hashes_of(tmp_path / "all")


# Several processes


def hashes_of(out):
    return {f.name: file_hash(f) for f in sorted((out / "images").iterdir())}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model, path = tiny_msdm(), tmp_path_factory.mktemp("msdm") / "tiny.safetensors"
    save_safetensors(path, model.tensors(), model.metadata())
    return path


def test_two_processes_make_the_files_of_one(checkpoint, tmp_path):
    flags = ["--ckpt", checkpoint, "--prompt", PROMPT, "-n", 8, "--steps", 2, "--batch-size", 2, "--grid"]
    one, two = tmp_path / "one", tmp_path / "two"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as under torchrun: the order of sums depends on it
    sampler.main([*map(str, flags), "--out", str(one)])
    torch.set_num_threads(threads)
    shutil.copytree(one, two)
    (two / "grid.png").unlink()
    for i in (0, 1, 2, 7):
        (two / f"images/{i:06d}.png").unlink()
    kept = (two / "images/000003.png").stat().st_mtime_ns
    two_ranks(ROOT / "sampler.py", *flags, "--out", two)
    assert len(hashes_of(one)) == 8 and hashes_of(two) == hashes_of(one)
    assert (two / "images/000003.png").stat().st_mtime_ns == kept
    for name in ("grid.png", "config.json", "prompts.csv"):
        assert file_hash(two / name) == file_hash(one / name)


FAILS_ON_ONE = """
import errno, os, sys
import sampler
from command import run_command
if os.environ["RANK"] == "1":
    def fail(path, *args):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))
    sampler.data.write_image = fail
run_command(sampler.main)
"""


def test_a_process_that_fails_leaves_no_other_waiting(checkpoint, tmp_path):
    """Nobody ends the others here, as torchrun would."""
    (tmp_path / "two.py").write_text(FAILS_ON_ONE)
    flags = ["--ckpt", checkpoint, "--prompt", PROMPT, "-n", 4, "--steps", 2, "--grid"]
    first, second = ranks(2, tmp_path / "two.py", *flags, "--out", tmp_path / "o")
    assert (first.returncode, second.returncode) == (2, 2), first.stderr + second.stderr
    assert "error: another process stopped" in first.stderr and "No space left on device" in second.stderr
    assert len(hashes_of(tmp_path / "o")) == 2 and not (tmp_path / "o/grid.png").exists()


# Names on the hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A folder that stands for the hub: someone/NAME is downloaded from its folder NAME, as snapshots are."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def names(name):
        return [str(f.relative_to(tmp_path / name)) for f in (tmp_path / name).rglob("*") if f.is_file()]

    def download(name, allow_patterns):
        name = name.split("/")[1]
        blobs, snapshot = (tmp_path / f"hub/models--someone--{name}" / x for x in ("blobs", "snapshots/0"))
        shutil.rmtree(tmp_path / "hub", ignore_errors=True)
        blobs.mkdir(parents=True)
        snapshot.mkdir(parents=True)
        for i, file in enumerate(n for n in names(name) if n in allow_patterns):
            shutil.copy(tmp_path / name / file, blobs / str(i))
            (snapshot / file).symlink_to(blobs / str(i))
        return snapshot

    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda name: names(name.split("/")[1]))
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return tmp_path


def test_an_msdm_checkpoint_by_its_name_on_the_hub(checkpoint, hub):
    (hub / "tiny").mkdir()
    shutil.copy(checkpoint, hub / "tiny/polyps.safetensors")
    save_safetensors(hub / "tiny/vae.safetensors", {"x": torch.zeros(1)}, {"kind": "vae"})
    (hub / "tiny/README.md").write_text("card")
    for ckpt, out in ((checkpoint, "file"), ("someone/tiny", "name"), (hub / "tiny", "folder")):
        sampler.main([str(x) for x in ("--ckpt", ckpt, "--prompt", PROMPT, "--steps", 2, "--out", hub / out)])
    assert hashes_of(hub / "name") == hashes_of(hub / "folder") == hashes_of(hub / "file")
    configs = [json.loads((hub / name / "config.json").read_text()) for name in ("file", "name")]
    assert configs[0] == configs[1]
    with pytest.raises(BadInput, match="--size is not for an MSDM checkpoint, which --ckpt someone/tiny is"):
        sample(hub / "o", "--ckpt", "someone/tiny", "--size", 64)


@pytest.mark.parametrize(("files", "said"), [
    ([], "someone--x/.*: no published model: expected .*, or for sampler.py a checkpoint of msdm.py"),
    (["vae"], "someone--x/.*: no published model"),
    (["best", "last"], "holds 2 checkpoints of msdm.py; .*: best.safetensors, last.safetensors"),
    (["broken"], "broken.safetensors: not a whole safetensors file")])
def test_a_repository_without_one_model_is_refused_in_one_line(checkpoint, hub, files, said):
    (hub / "x").mkdir()
    (hub / "x/README.md").write_text("card")
    for name in files:
        shutil.copy(checkpoint, hub / f"x/{name}.safetensors")
    if files == ["vae"]:
        save_safetensors(hub / "x/vae.safetensors", {"x": torch.zeros(1)}, {"kind": "vae"})
    if files == ["broken"]:
        (hub / "x/broken.safetensors").write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(BadInput, match=said):
        sample(hub / "o", "--ckpt", "someone/x")
    assert not (hub / "o").exists()


# --offload


@pytest.mark.parametrize("model", MODELS)
def test_offloading_changes_no_image_on_a_cpu(monkeypatch, tmp_path, model):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for flag in ("--no-offload", "--offload"):
        sampler.main(kandinsky_flags(model, flag, "-n", 2, "--out", tmp_path / flag))
    assert hashes_of(tmp_path / "--offload") == hashes_of(tmp_path / "--no-offload")


def test_offloading_is_not_for_msdm(checkpoint, tmp_path):
    with pytest.raises(BadInput, match="--offload is not for an MSDM checkpoint"):
        sampler.main(["--ckpt", str(checkpoint), "--prompt", "x", "--offload", "--out", str(tmp_path / "o")])
