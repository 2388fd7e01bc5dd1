"""Adapters of Kandinsky's networks and sampling with them, on a few rendered images and tiny checkpoints."""

from command import BadInput, run_command

import argparse
import json
import math
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
import tiny_kandinsky
import torch
from helpers import close, image, log_lines, pixels, run, start, two_ranks
from transformers import CLIPImageProcessor

import data
import diffusion
import encoded
import encoders
import finetune
import kandinsky
import lora
import mirrored
import movq
import phantom
import prompts
import sampler
from files import folder_hash, load_safetensors, save_safetensors
from kandinsky_networks import load_decoder, load_prior, load_unet3
from wording import Wording

PROMPT = "Generate an image with 2 polyps."


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Data, a tiny checkpoint of each kind, and a run of each training."""
    root = tmp_path_factory.mktemp("made")
    phantom.main(["--out", str(root / "data"), "--n", "24", "--size", "64"])
    tiny_kandinsky.main(["--out", str(root / "tiny22")])
    tiny_kandinsky.main(["--kind", "3", "--out", str(root / "tiny3")])
    for name in ("prior", "decoder", "unet3"):
        finetune.main(flags(root, name, root / name))
    return root


def flags(root, name, out, *more):
    model = {"prior": ["--model", root / "tiny22/prior"],
             "decoder": ["--model", root / "tiny22/decoder", "--prior", root / "tiny22/prior", "--size", 64],
             "unet3": ["--model", root / "tiny3", "--size", 64]}[name]
    common = ["--data", root / "data", "--out", out, "--cache", root / "cache", "--rank", 4, "--lora-dropout",
              0.1, "--lr", 1e-2,
              "--batch-size", 8, "--steps", 12, "--log-every", 4, "--save-every", 4, "--sample-steps", 1]
    return [str(x) for x in (name, *model, *common, *more)]


def sample(root, kind, out, *more):
    model = ["--ckpt", root / "tiny3"] if kind == "3" else ["--ckpt", root / "tiny22/prior", "--decoder",
                                                            root / "tiny22/decoder"]
    common = ["--prompt", PROMPT, "-n", 2, "--steps", 2, "--size", 64, "--out", out]
    sampler.main([str(x) for x in (*model, *common, *more)])
    return pixels(out)


TRAININGS = ["prior", "decoder", "unet3"]


# The tiny checkpoints


def test_a_tiny_checkpoint_depends_on_its_seed_alone_and_says_what_it_is(made, tmp_path, capsys):
    tiny_kandinsky.main(["--out", str(tmp_path / "again")])
    assert "Random weights" in capsys.readouterr().out
    assert "Random weights" in (tmp_path / "again/README.md").read_text()
    assert folder_hash(tmp_path / "again") == folder_hash(made / "tiny22")
    with pytest.raises(BadInput, match="exists already"):
        tiny_kandinsky.main(["--out", str(tmp_path / "again")])
    assert [p.name for p in tmp_path.iterdir()] == ["again"]


def test_latents_and_embeddings_of_the_tiny_checkpoint_are_of_a_sane_scale(made):
    z = load_safetensors(next(made.glob("cache/latents-*")))[0]["z"]
    assert z.shape == (24, 4, 8, 8) and 0.3 < z.std() < 3
    embeds = load_safetensors(next(made.glob("cache/clip-images-*")))[0]["embeds"]
    assert 0.3 < load_prior(made / "tiny22/prior/prior").normalise(embeds[1:]).std() < 3


# Training


@pytest.mark.parametrize("name", TRAININGS)
def test_the_loss_of_the_images_that_it_learns_from_falls(made, name, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "split", lambda records, **_: (records, records))
    finetune.main(flags(made, name, tmp_path, "--lr", 3e-2, "--lora-dropout", 0, "--steps", 16))
    losses = [line["val_loss"] for line in log_lines(tmp_path) if "val_loss" in line]
    assert len(losses) == 5 and losses[-1] < 0.97 * losses[0], losses


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_ends_in_an_adapter_and_its_log(made, name):
    assert [line["step"] for line in log_lines(made / name) if "val_loss" in line] == [0, 4, 8, 12]
    config = json.loads((made / name / "best/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 4, "LORA")


@pytest.mark.parametrize("name", TRAININGS)
def test_a_run_in_two_parts_ends_with_the_same_bytes_and_encodes_nothing_again(made, name, tmp_path,
                                                                               monkeypatch):
    monkeypatch.setattr(encoded, "clip_images", None)  # would be errors to call
    monkeypatch.setattr(encoded, "clip_texts", None)
    monkeypatch.setattr(kandinsky.Kandinsky3, "encode_text", None)
    monkeypatch.setattr(data, "preprocess", lambda img, size, *_: np.zeros((size, size, 3), np.uint8))
    for steps in (8, 12):
        finetune.main(flags(made, name, tmp_path / "run", "--steps", steps))
    for part in ("best", "last"):
        assert folder_hash(tmp_path / "run" / part) == folder_hash(made / name / part)
    assert log_lines(tmp_path / "run") == log_lines(made / name)


RANK_0_ENCODES = """
import json, sys
import data, encoded, finetune, kandinsky, movq, training
world = training.start("cpu")
training.start = lambda device: world
if world.rank:  # would be errors to call
    encoded.clip_images = encoded.clip_texts = kandinsky.Kandinsky3.encode_text = movq.MoVQ.encode = None
    data.load_images = None
for flags in json.loads(sys.argv[1]):
    finetune.main(flags)
"""


def test_of_two_ranks_the_first_encodes(made, tmp_path):
    (tmp_path / "two.py").write_text(RANK_0_ENCODES)
    two_ranks(tmp_path / "two.py", json.dumps([
        flags(made, name, tmp_path / name, "--cache", tmp_path / "cache", "--steps", 1, "--batch-size", 1)
        for name in TRAININGS]))
    for file in (tmp_path / "cache").iterdir():
        ours, expected = (load_safetensors(folder / file.name)[0] for folder in (file.parent, made / "cache"))
        assert ours.keys() == expected.keys()
        assert all(torch.allclose(v, expected[k], atol=1e-5) for k, v in ours.items()), file
    for name in TRAININGS:  # rank 1 has one of the two held-out images
        both, one = (log_lines(folder / name)[0]["val_loss"] for folder in (tmp_path, made))
        assert both == pytest.approx(one, rel=1e-5)


def test_an_epoch_is_a_pass_over_the_pairs_of_image_and_prompt(made, tmp_path):
    train, _ = data.split(data.read_folder(made / "data"))
    pairs = sum(len(r.prompts) for r in train)
    assert pairs > 2 * len(train)
    command = flags(made, "prior", tmp_path, "--epochs", 0.5, "--save-every", 100)
    with pytest.raises(BadInput, match="--steps 12: --epochs 0.5 says how long; leave one of them out"):
        finetune.main(command)
    where = command.index("--steps")
    command[where:where + 2] = []
    finetune.main(command)
    assert log_lines(tmp_path)[-1]["step"] == math.ceil(0.5 * pairs / 8)
    for given, expected in (([], (0.5, None)), (["--steps", "1"], (None, 1))):  # what is given beats the run
        args = finetune.parse(["prior", "--from-run", str(tmp_path), "--out", "x", *given])
        assert (args.epochs, getattr(args, "steps", None)) == expected
    # A run that goes on in two processes keeps its 8 images a step, whatever they would make of --batch-size.
    args = finetune.parse(command)
    world = finetune.training.Distributed(0, 2, torch.device("cpu"))
    assert finetune.steps_of(args, pairs, world) == math.ceil(0.5 * pairs / 8)


@pytest.mark.parametrize("name", TRAININGS)
def test_a_changed_caption_encodes_no_image_again(made, name, tmp_path, monkeypatch):
    shutil.copytree(made / "data", tmp_path / "data")
    with open(tmp_path / "data/prompt-gt.csv", "a", encoding="utf-8") as f:
        f.write("Generate an image with 6 findings.;000000.png\n")
    monkeypatch.setattr(encoded, "clip_images", None)
    monkeypatch.setattr(movq.MoVQ, "encode", None)
    shutil.copytree(made / "cache", tmp_path / "cache")
    finetune.main(flags(made, name, tmp_path / "run", "--data", tmp_path / "data", "--cache",
                        tmp_path / "cache", "--steps", 1))


@pytest.mark.parametrize("name", TRAININGS)
@pytest.mark.parametrize("damage", ["cut", "not finite"])
def test_a_broken_cache_is_made_again(made, name, tmp_path, damage):
    shutil.copytree(made / "cache", tmp_path / "cache")
    files = sorted((tmp_path / "cache").iterdir())
    for file in files:
        whole = file.read_bytes()
        if damage == "cut":
            file.write_bytes(whole[:-1])
        else:
            tensors = load_safetensors(file)[0]
            save_safetensors(file, {k: v if v.dtype == torch.bool else v / 0 for k, v in tensors.items()})
    broken = {file: file.read_bytes() for file in files}
    finetune.main(flags(made, name, tmp_path / "run", "--cache", tmp_path / "cache"))
    assert folder_hash(tmp_path / "run/last") == folder_hash(made / name / "last")
    used = {"prior": ("clip-images", "clip-texts"), "decoder": ("clip-images", "latents"),
            "unet3": ("latents", "t5")}[name]
    again = [file for file in files if file.read_bytes() != broken[file]]
    assert len(again) == 2 and all(file.name.startswith(used) for file in again)
    for file in again:
        one, other = (load_safetensors(f)[0] for f in (file, made / "cache" / file.name))
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


# Sample images


def sheet_of(made, name, out, *more):
    """The sheet of a run of four steps: (2, 3, 64, 64), the two images that are held out."""
    if name == "prior":
        more = "--decoder", made / "tiny22/decoder", "--size", 64, *more
    finetune.main(flags(made, name, out, "--steps", 4, "--sample-steps", 3, *more))
    sheet = np.asarray(data.open_image(out / "samples/0000004.png"))
    return np.stack([sheet[:, :64], sheet[:, 66:]]).transpose(0, 3, 1, 2)


def drawn_by_the_pipeline(made, name, adapter):
    """What the pipelines draw of the same prompts or images from the seeds 0 and 1."""
    _, records = data.split(data.read_folder(made / "data"))
    prompts = [r.prompts[i % len(r.prompts)] for i, r in enumerate(records)]
    settings = {"seed": 0, "steps": 3, "solver": "dpmpp", "height": 64, "width": 64}
    if name == "unet3":
        pipeline = kandinsky.Kandinsky3.from_pretrained(made / "tiny3", lora=adapter)
        return pipeline.sample(prompts, **settings)
    loras = {f"{name}_lora": adapter}
    pipeline = kandinsky.Kandinsky22.from_pretrained(made / "tiny22/prior", made / "tiny22/decoder", **loras)
    if name == "prior":
        return pipeline.sample(prompts, prior_steps=3, **settings)
    names = [r.name for r in data.read_folder(made / "data")]
    embeds = load_safetensors(next(made.glob("cache/clip-images-*")))[0]["embeds"]
    own = embeds[[1 + names.index(r.name) for r in records]]
    noise = diffusion.seeded_noise(range(len(own)))
    images = pipeline._decode(own, embeds[:1].expand_as(own), 3, 4.0, 64, 64, noise, "dpmpp", None, 1.0)
    return data.to_uint8(images)


@pytest.mark.parametrize("name", TRAININGS)
def test_a_sheet_shows_what_the_pipeline_draws_with_the_adapter(made, name, tmp_path):
    sheet = sheet_of(made, name, tmp_path / "run").astype(int)
    error, change = (np.abs(sheet - drawn_by_the_pipeline(made, name, adapter).numpy()).mean()
                     for adapter in (tmp_path / "run/last", None))
    assert error < 0.2 and change > 3 * error, (error, change)


@pytest.mark.parametrize("name", TRAININGS)
def test_a_sheet_that_a_kill_left_out_is_made_by_the_next_start(made, name, tmp_path):
    sheet = tmp_path / "samples/0000004.png"
    first = sheet_of(made, name, tmp_path)
    before = sheet.read_bytes()
    sheet.unlink()
    assert (sheet_of(made, name, tmp_path) == first).all() and sheet.read_bytes() == before


def test_sheets_change_no_adapter_and_the_prior_has_none_without_a_decoder(made, tmp_path):
    sheet_of(made, "prior", tmp_path / "shown")
    finetune.main(flags(made, "prior", tmp_path / "plain", "--steps", 4))
    assert folder_hash(tmp_path / "shown/last") == folder_hash(tmp_path / "plain/last")
    assert not list((tmp_path / "plain/samples").iterdir())
    assert [p.name for p in sorted((made / "unet3/samples").iterdir())] == ["0000004.png", "0000008.png",
                                                                           "0000012.png"]


def test_what_only_a_sheet_needs_is_on_the_device_while_it_computes(made, tmp_path, monkeypatch):
    placed, on_device = [], encoded.on_device

    def noted(module, device):
        placed.append((type(module).__name__, device))
        return on_device(module, device)

    monkeypatch.setattr(encoded, "on_device", noted)
    sheet_of(made, "prior", tmp_path, "--device", "cpu")
    assert placed == [("Decoder", torch.device("cpu")), ("MoVQ", torch.device("cpu"))]


def test_a_killed_run_ends_with_the_same_bytes(made, tmp_path):
    command = flags(made, "prior", tmp_path / "run")
    killed = start("finetune.py", *command, stderr=subprocess.DEVNULL)
    state = tmp_path / "run/state.pt"
    while not state.exists() and killed.poll() is None:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert state.exists()
    finetune.main(command)
    for part in ("best", "last"):
        assert folder_hash(tmp_path / "run" / part) == folder_hash(made / "prior" / part)


def test_the_learning_rate_warms_up_and_falls_by_half_a_cosine(made, tmp_path):
    finetune.main(flags(made, "prior", tmp_path / "a", "--warmup", 4, "--cosine", "--log-every", 1))
    expected = [1e-2 * min((i + 1) / 4, 1) * (1 + math.cos(math.pi * i / 12)) / 2 for i in range(12)]
    rates = [line["lr"] for line in log_lines(tmp_path / "a") if "lr" in line]
    assert rates == pytest.approx(expected, rel=1e-5)


def test_the_rate_of_the_warm_up_is_that_of_the_step(made, tmp_path):
    for name, warmup in (("whole", 0), ("quarter", 4)):
        finetune.main(flags(made, "prior", tmp_path / name, "--warmup", warmup, "--steps", 1))
    whole, quarter = (torch.load(tmp_path / name / "state.pt", weights_only=True)["weights"]
                      for name in ("whole", "quarter"))
    for k, b in whole.items():  # B begins at 0, and Adam's first step is as long as the rate
        if "lora_B" in k:
            close(quarter[k], b / 4, 1e-8)
            assert b.abs().max() == pytest.approx(1e-2, rel=1e-3)


def init_flags(root, out, *more):
    """A run that begins with the adapter of another; its rank and dropout come from there."""
    given = flags(root, "decoder", out, "--init", root / "decoder/last", *more)
    for flag in ("--rank", "--lora-dropout"):
        del given[given.index(flag):given.index(flag) + 2]
    return given


def test_a_run_begins_with_the_adapter_that_is_given(made, tmp_path):
    finetune.main(init_flags(made, tmp_path / "run", "--lr", 0, "--steps", 4))
    begun, goal = ([line["val_loss"] for line in log_lines(folder) if "val_loss" in line]
                   for folder in (tmp_path / "run", made / "decoder"))
    assert begun == goal[-1:] * 2 and goal[-1] != goal[0]
    assert folder_hash(tmp_path / "run/best") == folder_hash(made / "decoder/last")
    settings = json.loads((tmp_path / "run/config.json").read_text())["settings"]
    assert (settings["rank"], settings["alpha"], settings["lora_dropout"]) == (4, 4, 0.1)
    assert settings["targets"] == ["to_q", "to_k", "to_v", "to_out.0"]
    assert settings["init_hash"] == folder_hash(made / "decoder/last")
    finetune.main(["decoder", "--from-run", str(tmp_path / "run"), "--steps", "1", "--out",
                   str(tmp_path / "again")])
    assert log_lines(tmp_path / "again")[0] == log_lines(tmp_path / "run")[0]
    before = log_lines(tmp_path / "run")
    with pytest.raises(BadInput, match="started with init_hash='"):
        finetune.main(flags(made, "decoder", tmp_path / "run", "--lr", 0))
    assert log_lines(tmp_path / "run") == before


def test_a_run_goes_on_where_the_adapter_that_it_began_with_is_gone(made, tmp_path, capsys):
    """Its ranks and strengths, a layer's own too, and which layers it adapts are in config.json."""
    network = load_decoder(made / "tiny22/decoder/unet")
    lora.inject(network, lora.LoRAConfig(4, 4, ".*(to_q|to_k)", 0.1, rslora=True, rank_pattern={"to_k": 2},
                                         alpha_pattern={"mid_block.*to_q": 3}))
    lora.save(network, tmp_path / "init")
    more = "--init", tmp_path / "init"
    finetune.main(init_flags(made, tmp_path / "whole", *more))
    for name in ("run", "lost"):
        finetune.main(init_flags(made, tmp_path / name, *more, "--steps", 4))
    (tmp_path / "lost/state.pt").unlink()  # of the first step, before which the adapter is needed
    shutil.rmtree(tmp_path / "init")
    capsys.readouterr()
    finetune.main(init_flags(made, tmp_path / "run", *more))
    assert f"run goes on without --init {tmp_path / 'init'}, which is not there" in capsys.readouterr().err
    for part in ("best", "last"):
        assert folder_hash(tmp_path / "run" / part) == folder_hash(tmp_path / "whole" / part)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("run", "whole")]
    assert configs[0] == configs[1]
    for name in ("new", "lost"):
        with pytest.raises(BadInput, match="init: no such folder"):
            finetune.main(init_flags(made, tmp_path / name, *more))


def test_a_run_that_is_further_than_its_epochs_says_so(made, tmp_path):
    command = flags(made, "prior", tmp_path / "run")
    where = command.index("--steps")
    command[where:where + 2] = []
    finetune.main([*command, "--epochs", "0.3"])
    steps = log_lines(tmp_path / "run")[-1]["step"]
    with pytest.raises(BadInput, match=f"^--epochs 0.1, . steps: the run in .* is at step {steps} already; "):
        finetune.main([*command, "--epochs", "0.1"])


def test_a_repeated_run_whose_flags_contradict_the_adapter_says_where_they_are_from(made, tmp_path):
    repeat = ["decoder", "--from-run", made / "prior", "--model", made / "tiny22/decoder", "--prior",
              made / "tiny22/prior", "--init", tmp_path / "init", "--out", tmp_path / "run"]
    network = load_decoder(made / "tiny22/decoder/unet")
    lora.inject(network, lora.LoRAConfig(2, 4, dropout=0.1))
    lora.save(network, tmp_path / "init")
    with pytest.raises(BadInput, match=r"--rank 4, given or of --from-run .*prior: the adapter .*init has 2; "
                                       "give the adapter's own --rank, or start without --init"):
        finetune.main([str(x) for x in repeat])
    finetune.main([str(x) for x in (*repeat, "--rank", 2, "--steps", 1, "--size", 64)])
    assert (tmp_path / "run/last").is_dir()


@pytest.mark.parametrize("flag", [["--rank", "8"], ["--alpha", "5"], ["--dora"], ["--rslora"],
                                  ["--lora-dropout", "0"], ["--targets", "to_q"]])
def test_a_flag_that_contradicts_the_adapter_to_begin_with_is_refused(made, tmp_path, flag):
    with pytest.raises(BadInput) as error:
        finetune.main(init_flags(made, tmp_path / "run", *flag))
    assert str(error.value).startswith(f"{flag[0]} ") and "leave the flag out" in str(error.value)
    assert not (tmp_path / "run").exists()


def test_an_adaptation_can_be_repeated_from_its_folder(made, tmp_path):
    finetune.main(["prior", "--from-run", str(made / "prior"), "--out", str(tmp_path / "again")])
    finetune.main(["decoder", "--from-run", str(made / "decoder"), "--steps", "8", "--out",
                   str(tmp_path / "short")])
    for name, again in (("prior", "again"), ("decoder", "short")):
        losses = [[line["loss"] for line in log_lines(folder) if "loss" in line]
                  for folder in (made / name, tmp_path / again)]
        assert losses[1] and losses[1] == pytest.approx(losses[0][:len(losses[1])], rel=0, abs=1e-6)


@pytest.mark.parametrize("more", [["--gradient-checkpointing"], ["--accumulate", "2"], ["--accumulate", "3"]])
def test_what_saves_memory_changes_no_more_than_rounding(made, tmp_path, more):
    command = ["--lora-dropout", "0", "--steps", "3", "--lr", "1e-4"]
    finetune.main(flags(made, "decoder", tmp_path / "a", *command))
    finetune.main(flags(made, "decoder", tmp_path / "b", *command, *more))
    a, b = (load_safetensors(tmp_path / x / "last/adapter_model.safetensors")[0] for x in "ab")
    assert a.keys() == b.keys() and all((a[k] - b[k]).abs().max() < 1e-5 for k in a)


def test_a_bfloat16_base_learns_in_float32(made, tmp_path):
    finetune.main(flags(made, "prior", tmp_path / "run", "--dtype", "bfloat16", "--steps", 4, "--dora",
                        "--rslora",
                         "--cache", tmp_path / "cache"))
    tensors, _ = load_safetensors(tmp_path / "run/last/adapter_model.safetensors")
    assert all(v.dtype == torch.float32 and v.isfinite().all() for v in tensors.values())
    assert any(k.endswith("lora_magnitude_vector") for k in tensors)


@pytest.mark.parametrize("name", ["prior", "decoder"])
def test_a_folder_of_both_parts_is_trained_as_the_two(made, name, tmp_path):
    """diffusers' combined pipeline: the prior's parts with prior_ before their names."""
    both = tmp_path / "both"
    shutil.copytree(made / "tiny22/decoder", both)
    for part in (made / "tiny22/prior").iterdir():
        shutil.copytree(part, both / f"prior_{part.name}")
    model = ["--model", both, *(["--prior", both] if name == "decoder" else [])]
    finetune.main(flags(made, name, tmp_path / "run", *model))
    ours, theirs = (load_safetensors(folder / "last/adapter_model.safetensors")[0]
                    for folder in (tmp_path / "run", made / name))
    assert ours.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in ours.items())


@pytest.mark.parametrize("name", TRAININGS)
def test_a_float16_base_learns_as_one_in_float32(made, name, tmp_path, low_scale):
    finetune.main(flags(made, name, tmp_path, "--dtype", "float16", "--cache", tmp_path / "cache"))
    for line, exact in zip(log_lines(tmp_path), log_lines(made / name), strict=True):
        line.pop("grad_norm", None), exact.pop("grad_norm", None)
        assert line == pytest.approx(exact, rel=2e-2)
    tensors, _ = load_safetensors(tmp_path / "last/adapter_model.safetensors")
    assert all(v.dtype == torch.float32 and v.isfinite().all() for v in tensors.values())
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert [s["_growth_tracker"] for s in state["optimiser"] if "scale" in s] == [12]  # steps in a row


def test_a_killed_float16_run_ends_with_the_same_bytes_and_scale(made, tmp_path):
    more = ["--dtype", "float16", "--save-every", 2, "--log-every", 1, "--cache", tmp_path / "cache"]
    finetune.main(flags(made, "prior", tmp_path / "whole", *more))
    command = flags(made, "prior", tmp_path / "run", *more)
    killed = start("finetune.py", *command, stderr=subprocess.DEVNULL)
    while not (tmp_path / "run/last").exists() and killed.poll() is None:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    finetune.main(command)
    assert log_lines(tmp_path / "run") == log_lines(tmp_path / "whole")
    assert folder_hash(tmp_path / "run/last") == folder_hash(tmp_path / "whole/last")
    one, other = (torch.load(tmp_path / x / "state.pt", weights_only=True)["optimiser"][-1]
                  for x in ("run", "whole"))
    assert one == other and one["scale"] > 0


def test_a_float16_run_that_becomes_nan_ends_with_2_and_its_last_good_state(made, tmp_path, monkeypatch,
                                                                            low_scale, capsys):
    loss_fn, taken = finetune.loss_fn, []

    def spoilt(network, *more):
        taken.append(network.training)
        return loss_fn(network, *more) * (float("nan") if network.training and sum(taken) > 4 else 1)

    command = flags(made, "prior", tmp_path, "--dtype", "float16", "--log-every", 1, "--cache",
                    tmp_path / "cache")
    finetune.main([*command, "--steps", "4"])
    good = folder_hash(tmp_path / "last")
    monkeypatch.setattr(finetune, "loss_fn", spoilt)
    taken += [True] * 4
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: finetune.main([*command, "--steps", "60"]))
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "step 12: it overflows in float16 and is left out; from here on the loss is scaled by 1\n" in said
    assert "error: step 13: the loss is nan" in said
    assert folder_hash(tmp_path / "last") == good
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["step"] == 12 and state["optimiser"][-1]["scale"] == 1
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    monkeypatch.setattr(finetune, "loss_fn", loss_fn)
    finetune.main([*command, "--steps", "14"])
    assert [x["step"] for x in log_lines(tmp_path) if "loss" in x] == [1, 2, 3, 4, 13, 14]


def test_auto_is_the_dtype_of_the_device_or_of_the_run_that_goes_on(made, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "training_dtype", lambda device: torch.float16)
    args = argparse.Namespace(dtype="auto", out=tmp_path)
    assert finetune.base_dtype(args, None) == torch.float16
    args.out = made / "prior"  # as of a run before there was float16
    assert finetune.base_dtype(args, None) == torch.float32
    args.dtype = "bfloat16"
    assert finetune.base_dtype(args, None) == torch.bfloat16


@pytest.mark.parametrize("prediction", ["eps", "x_0", "v"])
@pytest.mark.parametrize("gamma", [0.0, 5.0])
def test_min_snr_weights(prediction, gamma):
    class Zero(torch.nn.Linear):
        def forward(self, x, t, extra):
            return torch.cat([0 * x, x], dim=1)  # what is behind the channels of x_0 does not count

    alpha_bar = diffusion.schedule("cosine").float()
    g = torch.Generator().manual_seed(0)
    x_0, eps, t = torch.randn(3, 4, 2, 2, generator=g), torch.randn(3, 4, 2, 2,
                                                                    generator=g), torch.tensor([30, 500, 950])
    loss = finetune.loss_fn(Zero(1, 1), x_0, [None], t, eps, alpha_bar, prediction, gamma)
    snr = (alpha_bar / (1 - alpha_bar))[t]
    weight = {"eps": snr.clamp(max=gamma) / snr, "x_0": snr.clamp(max=gamma),
              "v": snr.clamp(max=gamma) / (snr + 1)}[prediction] if gamma else torch.ones(3)
    a_t = alpha_bar[t].view(3, 1, 1, 1)
    aim = {"eps": eps, "x_0": x_0, "v": a_t.sqrt() * eps - (1 - a_t).sqrt() * x_0}[prediction]
    error = aim.square().mean(dim=(1, 2, 3))
    close(loss, (weight * error).mean(), 1e-5)
    assert snr[0] > 5 > snr[1]


def test_a_step_draws_an_images_own_rows_or_the_null_one():
    held = encoded.EncodedData(torch.zeros(3, 2), (torch.arange(6.0),), [[1], [2, 3], [4, 5]])
    images, g = torch.tensor([0, 1, 2] * 200), torch.Generator().manual_seed(0)
    rows = held.draw(images, 0.25, g)
    for i, own in enumerate(held.rows):
        assert set(rows[images == i].tolist()) == {0, *own}
    assert 0.2 < (rows == 0).float().mean() < 0.3
    assert not (held.draw(images, 0.0, g) == 0).any() and not held.draw(images, 1.0, g).any()


# The conditions of the training are those of the pipelines


def test_a_step_draws_a_mirrored_image_with_its_own_row():
    held = encoded.EncodedData(torch.zeros(5, 2), (torch.arange(6.0),), [[1], [2], [3], [4], [5]])
    schedule = argparse.Namespace(prediction="epsilon", alpha_bar=torch.linspace(0.9, 0.1, 10))
    objective = finetune.Objective(None, held, torch.tensor([2, 1]), schedule,
                                   argparse.Namespace(p_uncond=0.0), "cpu", torch.float32,
                                   [[0], [1], [2, 3, 4]])
    world, drawn = finetune.training.Distributed(0, 1, torch.device("cpu")), []
    for step in range(20):
        batch = objective.draw_batch(*world.batch(2, 2, step, 0))
        drawn += zip(batch.images.tolist(), batch.rows.tolist(), strict=True)
    assert set(drawn) == {(1, 2), (2, 3), (3, 4), (4, 5)} and sum(image == 1 for image, _ in drawn) == 20


@torch.no_grad()
@pytest.mark.parametrize("name", TRAININGS)
def test_mirrored_images_are_encoded_behind_the_others(made, name, tmp_path):
    with torch.enable_grad():
        finetune.main(flags(made, name, tmp_path / "run", "--mirror", "vertical", "--steps", 1, "--cache",
                            tmp_path / "cache"))
    records = data.read_folder(made / "data")
    train, _ = data.split(records)
    free = [r for r in train if not mirrored.obstacle(r, 64, Wording())]
    rows = len(records) + len(free)
    cached = {kind: load_safetensors(next(tmp_path.glob(f"cache/{kind}-*")))[0]
              for kind in {"prior": ("clip-images", "clip-texts"), "decoder": ("clip-images", "latents"),
                           "unet3": ("latents",)}[name]}
    assert free and all(len(cached[kind]["embeds"]) == 1 + rows for kind in cached if kind == "clip-images")
    if name == "prior":
        texts = {prompts.mirror(p, "vertical") for r in free for p in r.prompts}
        texts |= {p for r in records for p in r.prompts} | {""}
        assert len(cached["clip-texts"]["embeds"]) == len(texts)
    else:
        place = made / {"decoder": "tiny22/decoder", "unet3": "tiny3"}[name] / "movq"
        img = [data.preprocess(data.open_image(r.path), 64) for r in records]
        img += [data.preprocess(data.open_image(r.path), 64)[::-1] for r in free]
        img = data.to_float(torch.from_numpy(np.stack(img)).permute(0, 3, 1, 2))
        close(cached["latents"]["z"].float(), movq.load_movq(place).encode(img), 1e-3)


@torch.no_grad()
def test_conditions_are_the_pipelines_own(made):
    pipeline = kandinsky.Kandinsky22.from_pretrained(made / "tiny22/prior", made / "tiny22/decoder")
    records = data.read_folder(made / "data")
    prompts = ["", *sorted({p for r in records for p in r.prompts})]
    texts = load_safetensors(next(made.glob("cache/clip-texts-*")))[0]
    for name, expected in zip(("embeds", "states", "mask"), pipeline.encode_text(prompts[:3]), strict=True):
        close(texts[name][:3].float(), expected.float(), 1e-4)
    embeds = load_safetensors(next(made.glob("cache/clip-images-*")))[0]["embeds"]
    close(embeds[:1], pipeline._embed([PROMPT], 1, 1.0, sampler_noise, None, "ddim")[1], 1e-5)


def sampler_noise(*shape):
    return torch.zeros(shape)


@pytest.mark.parametrize(("size", "change", "grey"), [
    *(((w, h), {}, 1) for w, h in ((64, 48), (50, 70), (33, 32), (32, 32), (31, 90))),
    ((64, 48), {"rescale_factor": 1 / 127.5}, 2), ((64, 48), {"do_rescale": False}, 255),
    ((64, 48), {"size": 32, "crop_size": 32, "image_processor_type": None,  # transformers before 4.26
                "feature_extractor_type": "CLIPFeatureExtractor"}, 1),
    ((64, 48), {"crop_size": 32, "do_pad": None, "input_data_format": None}, 1)])
def test_images_are_prepared_as_clip_does(made, tmp_path, size, change, grey):
    """grey: how many times larger than usual a grey value is."""
    img = image(0, *size)
    file = made / "tiny22/prior/image_processor/preprocessor_config.json"
    (tmp_path / file.name).write_text(json.dumps(json.loads(file.read_text()) | change))
    theirs = CLIPImageProcessor.from_pretrained(tmp_path)(img, return_tensors="pt")["pixel_values"][0]
    ours = encoders.clip_preprocessor(tmp_path)(img)
    assert ours.shape == theirs.shape == (3, 32, 32)
    assert (ours - theirs).abs().mean() < 0.004 * grey  # half a grey value of 255: resizes round differently


@pytest.mark.parametrize(("change", "said"), [
    ({"do_rescale": "yes"}, "do_rescale='yes'"), ({"rescale_factor": -1}, "rescale_factor=-1, expected a"),
    ({"rescale_factor": "a"}, "rescale_factor='a'"), ({"do_normalize": False}, "do_normalize=False"),
    ({"image_mean": None}, "image_mean=None, expected three numbers$"),
    ({"image_mean": [0.5, 0.5]}, "image_mean"),
    ({"image_std": [0.5, 0.5, 0]}, "image_std=.*, expected three numbers above 0$"),
    ({"image_std": ["a", 1, 1]}, "image_std"), ({"size": 0, "crop_size": 0}, "size=0")])
def test_another_preparation_for_clip_is_refused(made, tmp_path, change, said):
    config = json.loads((made / "tiny22/prior/image_processor/preprocessor_config.json").read_text()) | change
    left = {k: v for k, v in config.items() if v is not None}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(left))
    with pytest.raises(BadInput, match=said):
        encoders.clip_preprocessor(tmp_path)


def test_older_files_that_do_not_name_the_rescaling_are_read(made, tmp_path):
    folder = made / "tiny22/prior/image_processor"
    config = json.loads((folder / "preprocessor_config.json").read_text())
    left = {k: v for k, v in config.items() if "rescale" not in k}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(left))
    ours = [encoders.clip_preprocessor(f)(image(0, 40, 32)) for f in (folder, tmp_path)]
    assert torch.equal(*ours)


def test_captions_that_clip_cuts_are_said_once(made, tmp_path, capsys):
    shutil.copytree(made / "data", tmp_path / "data")
    with open(tmp_path / "data/prompt-gt.csv", "a", encoding="utf-8") as f:
        f.write("Generate an image with 1 polyp. " * 30 + ";000000.png\n")
    for _ in range(2):  # the second time the states come from the cache
        finetune.main(flags(made, "prior", tmp_path / "run", "--data", tmp_path / "data", "--steps", 1))
        said = [line for line in capsys.readouterr().err.splitlines() if "are cut to the 77 tokens" in line]
        assert len(said) == 1 and said[0].startswith("warning: 1 of ")
        shutil.rmtree(tmp_path / "run")


# Sampling


def test_two_adapters_of_2_2_and_their_strength(made, tmp_path):
    adapters = ["--prior-lora", made / "prior/best", "--decoder-lora", made / "decoder/best"]
    base = sample(made, "2.2", tmp_path / "base")
    adapted = sample(made, "2.2", tmp_path / "adapted", *adapters)
    assert adapted != base and sample(made, "2.2", tmp_path / "zero", *adapters, "--lora-scale", 0) == base
    only_decoder = sample(made, "2.2", tmp_path / "decoder", *adapters[2:])
    assert only_decoder not in (base, adapted)
    (tmp_path / "adapted/images/000001.png").unlink()
    assert sample(made, "2.2", tmp_path / "adapted", *adapters) == adapted
    settings = json.loads((tmp_path / "adapted/config.json").read_text())
    assert settings["prior_lora"] == folder_hash(made / "prior/best") and settings["height"] == 64
    for change, said in (([*adapters, "--lora-scale", 0.5], "lora_scale"), ([], "prior_lora"),
                         ([*adapters, "--size", 128], "width")):
        with pytest.raises(BadInput, match=f"holds images made with {said}="):
            sample(made, "2.2", tmp_path / "adapted", *change)


def test_an_adapter_of_3_and_its_strength(made, tmp_path):
    adapter = ["--lora", made / "unet3/best"]
    base = sample(made, "3", tmp_path / "base")
    assert sample(made, "3", tmp_path / "adapted", *adapter) != base
    assert sample(made, "3", tmp_path / "zero", *adapter, "--lora-scale", 0) == base


# Bad input


def missing_shard(root, tmp_path):
    shutil.copytree(root / "tiny22/prior", tmp_path / "prior")
    whole = tmp_path / "prior/prior/diffusion_pytorch_model.safetensors"
    index = {"weight_map": dict.fromkeys(load_safetensors(whole)[0], "shard-1.safetensors")}
    whole.with_name("diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    whole.unlink()
    return ["--model", str(tmp_path / "prior")]


@pytest.mark.parametrize(("name", "change", "said"), [
    ("decoder", ["--model", "{root}/tiny22/prior"],
     "holds the prior of Kandinsky 2.2; expected the decoder of Kandinsky 2.2"),
    ("unet3", ["--model", "{root}/tiny22/decoder"],
     "holds the decoder of Kandinsky 2.2; expected Kandinsky 3"),
    ("prior", ["--model", "{root}/tiny3"], "holds Kandinsky 3; expected the prior of Kandinsky 2.2"),
    ("prior", ["--rank", "0"], "rank: expected a whole number from 1, got 0"),
    ("prior", ["--targets", "to_x"], "LoRA targets match no layer of Prior"),
    ("prior", missing_shard, "shard-1.safetensors: no such file"),
    ("prior", ["--model", "{root}/absent"], "absent: no such folder"),
    ("prior", ["--data", "{root}/absent"], "absent"),
    ("prior", ["--batch-size", "0"], "--batch-size 0: expected 1 or more"),
    ("decoder", ["--size", "60"], "--size 60 is not divisible by 16"),
    ("decoder", ["--prior", "{root}/tiny3"], "holds Kandinsky 3; expected the prior of Kandinsky 2.2"),
    ("decoder", ["--sample-steps", "1001"], "--sample-steps 1001: the schedule has 1000 times"),
    ("prior", ["--decoder", "{root}/tiny22/prior"], "holds the prior of Kandinsky 2.2; expected the decoder"),
    ("prior", ["--decoder", "{root}/tiny22/decoder", "--size", "100"], "--size 100: expected a multiple of"),
    ("prior", ["--decoder-lora", "{root}/prior"], "--decoder-lora: expected --decoder FOLDER too"),
])
def test_bad_input_is_one_line_and_writes_no_adapter(made, tmp_path, name, change, said):
    change = change(made, tmp_path) if callable(change) else [c.format(root=made) for c in change]
    with pytest.raises(BadInput) as error:
        finetune.main(flags(made, name, tmp_path / "run", *change))
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.glob("run/*/adapter*")) and not (tmp_path / "run/metrics.jsonl").exists()


def test_a_run_with_other_settings_is_refused(made):
    before = folder_hash(made / "prior")
    with pytest.raises(BadInput, match="started with alpha=4, now alpha=8"):
        finetune.main(flags(made, "prior", made / "prior", "--rank", 8))
    assert folder_hash(made / "prior") == before


@pytest.mark.parametrize(("name", "flag", "kind", "file"), [
    ("prior", "--model", "tiny22/prior", "text_encoder/config.json"),
    ("prior", "--model", "tiny22/prior", "tokenizer/tokenizer_config.json"),
    ("prior", "--model", "tiny22/prior", "scheduler/scheduler_config.json"),
    ("decoder", "--prior", "tiny22/prior", "image_encoder/config.json"),
    ("decoder", "--prior", "tiny22/prior", "image_processor/preprocessor_config.json"),
    ("decoder", "--model", "tiny22/decoder", "movq/config.json"),
    ("unet3", "--model", "tiny3", "text_encoder/config.json")])
def test_a_run_with_another_encoder_is_refused(made, tmp_path, name, flag, kind, file):
    shutil.copytree(made / kind, tmp_path / "other")
    with open(tmp_path / "other" / file, "a", encoding="utf-8") as f:
        f.write("\n")
    before = folder_hash(made / name)
    with pytest.raises(BadInput, match=f"started with {file.split('/')[0]}_hash="):
        finetune.main(flags(made, name, made / name, flag, tmp_path / "other"))
    assert folder_hash(made / name) == before


def test_folders_are_fetched_in_the_precision_of_the_training(made, tmp_path, monkeypatch):
    asked, fetch = [], finetune.fetch

    def noted(name, dtype=None):
        asked.append((name, dtype))
        return fetch(name, dtype)

    monkeypatch.setattr(finetune, "fetch", noted)
    monkeypatch.setattr(finetune, "train",
                        lambda args: finetune.kandinsky_task(args, finetune.training.start("cpu")))
    finetune.main(flags(made, "decoder", tmp_path / "run", "--dtype", "bfloat16", "--cache",
                        tmp_path / "cache"))
    folders = {str(made / "tiny22/decoder"), str(made / "tiny22/prior")}
    assert {a[0] for a in asked} == folders and {a[1] for a in asked} == {torch.bfloat16}


@pytest.mark.parametrize(("kind", "change", "said"), [
    ("2.2", ["--prior-lora", "{root}/decoder/best"], "not an adapter of this Prior"),
    ("2.2", ["--decoder", "{root}/tiny22/prior"],
     "holds the prior of Kandinsky 2.2; expected the decoder of Kandinsky 2.2"),
    ("2.2", ["--decoder", "{root}/tiny3"], "holds Kandinsky 3; expected the decoder of Kandinsky 2.2"),
    ("2.2", ["--ckpt", "{root}/tiny22/decoder"],
     "is the decoder of Kandinsky 2.2: give it by --decoder, its prior's folder by --ckpt"),
    ("2.2", ["--ckpt", "{root}/data"], "data: no published model: expected the sub-folders prior"),
    ("2.2", ["--ckpt", "{root}/tiny3/unet"], "unet: a part of a published model; expected the folder that"),
    ("2.2", ["--lora", "{root}/prior/best"], "--lora is not for Kandinsky 2.2, which"),
    ("2.2", ["--prior-lora", "{root}/absent"], "absent: no such folder"),
    ("3", ["--decoder", "{root}/tiny22/decoder"], "--decoder is not for Kandinsky 3"),
    ("3", ["--lora", "{root}/decoder/best"], "not an adapter of this UNet3"),
    ("3", ["--steps", "1001"], "--steps 1001: the checkpoint's schedule has 1000 times"),
    ("3", ["--size", "0"], "--size 0: expected 1 or more"),
])
def test_bad_input_to_the_sampler_is_one_line_and_writes_nothing(made, tmp_path, kind, change, said):
    with pytest.raises(BadInput) as error:
        sample(made, kind, tmp_path / "out", *[c.format(root=made) for c in change])
    assert said in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_prior_without_a_decoder_is_refused(made, tmp_path):
    with pytest.raises(BadInput, match="give its decoder's folder too, by --decoder"):
        sampler.main(["--ckpt", str(made / "tiny22/prior"), "--prompt", "x", "--out", str(tmp_path / "out")])


def test_the_command_leaves_with_status_2(made, tmp_path):
    done = run("finetune.py", *flags(made, "prior", tmp_path / "run", "--rank", 0), expect=2)
    assert done.stderr.splitlines() == ["error: LoRA rank: expected a whole number from 1, got 0"]


def test_adapters_train_every_layer_and_are_saved_averaged(made):
    for name, folder, load in (("prior", "tiny22/prior/prior", load_prior),
                               ("decoder", "tiny22/decoder/unet", load_decoder),
                               ("unet3", "tiny3/unet", load_unet3)):
        network = load(made / folder)
        lora.load(network, made / name / "last")
        assert all(layer.lora_B.abs().max() > 0 for layer in lora.layers(network).values()), name
        state = torch.load(made / name / "state.pt", weights_only=True)
        saved = lora.tensors(network)
        assert all(torch.equal(saved[k], v) for k,
                   v in state["ema"].items()), name  # the average, not the raw weights
        assert not any(torch.equal(saved[k], v) for k, v in state["weights"].items()), name
