"""make-tiny, the three trainings and sampling with what they made, on a few drawn pictures."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from reference import close

import data
import kandinsky
import lora
import phantom
import sampler
from weights import BadInput, folder_hash, load_safetensors

HERE = Path(__file__).resolve().parents[1]
PROMPT = "Generate an image with 2 polyps."


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Data, a tiny checkpoint of each kind, and a run of each training."""
    root = tmp_path_factory.mktemp("made")
    phantom.main(["--out", str(root / "data"), "--n", "24", "--size", "64"])
    kandinsky.main(["make-tiny", "--out", str(root / "tiny22")])
    kandinsky.main(["make-tiny", "--kind", "3", "--out", str(root / "tiny3")])
    for name in ("train-prior", "train-decoder", "train-unet3"):
        kandinsky.main(flags(root, name, root / name))
    return root


def flags(root, name, out, *more):
    model = {"train-prior": ["--model", root / "tiny22/prior"],
             "train-decoder": ["--model", root / "tiny22/decoder", "--prior", root / "tiny22/prior", "--size", 64],
             "train-unet3": ["--model", root / "tiny3", "--size", 64]}[name]
    common = ["--data", root / "data", "--out", out, "--cache", root / "cache", "--rank", 4, "--lora-dropout", 0.1, "--lr", 1e-2,
              "--batch-size", 8, "--steps", 12, "--log-every", 4, "--save-every", 4]
    return [str(x) for x in (name, *model, *common, *more)]


def sample(root, kind, out, *more):
    model = ["--ckpt", root / "tiny3"] if kind == "3" else ["--ckpt", root / "tiny22/prior", "--decoder", root / "tiny22/decoder"]
    common = ["--prompt", PROMPT, "-n", 2, "--steps", 2, "--size", 64, "--out", out]
    sampler.main([str(x) for x in (*model, *common, *more)])
    return [(out / "images" / f"{i:06d}.png").read_bytes() for i in range(2)]


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


TRAININGS = ["train-prior", "train-decoder", "train-unet3"]


# The tiny checkpoints


def test_a_tiny_checkpoint_depends_on_its_seed_alone_and_says_what_it_is(made, tmp_path, capsys):
    kandinsky.main(["make-tiny", "--out", str(tmp_path / "again")])
    assert "Random weights" in capsys.readouterr().out and "Random weights" in (tmp_path / "again/README.md").read_text()
    assert folder_hash(tmp_path / "again") == folder_hash(made / "tiny22")
    with pytest.raises(BadInput, match="exists already"):
        kandinsky.main(["make-tiny", "--out", str(tmp_path / "again")])
    assert [p.name for p in tmp_path.iterdir()] == ["again"]


def test_latents_and_embeddings_of_the_tiny_checkpoint_are_of_a_sane_scale(made):
    z = load_safetensors(next(made.glob("cache/latents-*")))[0]["z"]
    assert z.shape == (24, 4, 8, 8) and 0.3 < z.std() < 3
    embeds = load_safetensors(next(made.glob("cache/clip-images-*")))[0]["embeds"]
    assert 0.3 < kandinsky.load_prior(made / "tiny22/prior/prior").normalise(embeds[1:]).std() < 3


# Training


@pytest.mark.parametrize("name", TRAININGS)
def test_the_loss_falls(made, name):
    losses = [line["val_loss"] for line in lines(made / name) if "val_loss" in line]
    assert len(losses) == 4 and min(losses) < losses[0]
    config = json.loads((made / name / "best/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 4, "LORA")


@pytest.mark.parametrize("name", TRAININGS)
def test_a_run_in_two_parts_ends_with_the_same_bytes_and_encodes_nothing_again(made, name, tmp_path, monkeypatch):
    monkeypatch.setattr(kandinsky, "clip_images", None)  # would be errors to call
    monkeypatch.setattr(kandinsky, "clip_texts", None)
    monkeypatch.setattr(kandinsky.Kandinsky3, "encode_text", None)
    monkeypatch.setattr(data, "preprocess", lambda img, size, *_: np.zeros((size, size, 3), np.uint8))
    for steps in (8, 12):
        kandinsky.main(flags(made, name, tmp_path / "run", "--steps", steps))
    for part in ("best", "last"):
        assert folder_hash(tmp_path / "run" / part) == folder_hash(made / name / part)
    assert lines(tmp_path / "run") == lines(made / name)


def test_a_killed_run_ends_with_the_same_bytes(made, tmp_path):
    command = flags(made, "train-prior", tmp_path / "run")
    killed = subprocess.Popen([sys.executable, HERE / "kandinsky.py", *command], stderr=subprocess.DEVNULL,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})
    state = tmp_path / "run/state.pt"
    while not state.exists() and killed.poll() is None:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert state.exists()
    kandinsky.main(command)
    for part in ("best", "last"):
        assert folder_hash(tmp_path / "run" / part) == folder_hash(made / "train-prior" / part)


@pytest.mark.parametrize("more", [["--gradient-checkpointing"], ["--accumulate", "2"]])
def test_what_saves_memory_changes_no_more_than_rounding(made, tmp_path, more):
    command = ["--lora-dropout", "0", "--steps", "3", "--lr", "1e-4"]
    kandinsky.main(flags(made, "train-decoder", tmp_path / "a", *command))
    kandinsky.main(flags(made, "train-decoder", tmp_path / "b", *command, *more))
    a, b = (load_safetensors(tmp_path / x / "last/adapter_model.safetensors")[0] for x in "ab")
    assert a.keys() == b.keys()
    if more[0] == "--gradient-checkpointing":
        assert all((a[k] - b[k]).abs().max() < 1e-5 for k in a)
    else:  # other noise, for it is drawn in parts
        assert all(a[k].shape == b[k].shape and b[k].isfinite().all() for k in a)


def test_a_bfloat16_base_learns_in_float32(made, tmp_path):
    kandinsky.main(flags(made, "train-prior", tmp_path / "run", "--dtype", "bfloat16", "--steps", 4, "--dora", "--rslora",
                         "--cache", tmp_path / "cache"))
    tensors, _ = load_safetensors(tmp_path / "run/last/adapter_model.safetensors")
    assert all(v.dtype == torch.float32 and v.isfinite().all() for v in tensors.values())
    assert any(k.endswith("lora_magnitude_vector") for k in tensors)


@pytest.mark.parametrize("prediction", ["eps", "x_0"])
@pytest.mark.parametrize("gamma", [0.0, 5.0])
def test_min_snr_weights(prediction, gamma):
    class Zero(torch.nn.Linear):
        def forward(self, x, t, extra):
            return torch.cat([0 * x, x], dim=1)  # what is behind the channels of x_0 does not count

    alpha_bar = sampler.schedule("cosine").float()
    g = torch.Generator().manual_seed(0)
    x_0, eps, t = torch.randn(3, 4, 2, 2, generator=g), torch.randn(3, 4, 2, 2, generator=g), torch.tensor([30, 500, 950])
    loss = kandinsky.loss_fn(Zero(1, 1), x_0, [None], t, eps, alpha_bar, prediction, gamma)
    snr = (alpha_bar / (1 - alpha_bar))[t]
    weight = {"eps": snr.clamp(max=gamma) / snr, "x_0": snr.clamp(max=gamma)}[prediction] if gamma else torch.ones(3)
    error = (x_0 if prediction == "x_0" else eps).square().mean(dim=(1, 2, 3))
    close(loss, (weight * error).mean(), 1e-5)
    assert snr[0] > 5 > snr[1]


def test_a_step_draws_a_pictures_own_rows_or_the_null_one():
    material = kandinsky.Material(torch.zeros(3, 2), (torch.arange(6.0),), [[1], [2, 3], [4, 5]])
    pictures, g = torch.tensor([0, 1, 2] * 200), torch.Generator().manual_seed(0)
    rows = material.draw(pictures, 0.25, g)
    for picture, own in enumerate(material.rows):
        assert set(rows[pictures == picture].tolist()) == {0, *own}
    assert 0.2 < (rows == 0).float().mean() < 0.3
    assert not (material.draw(pictures, 0.0, g) == 0).any() and not material.draw(pictures, 1.0, g).any()


# What the networks are told in training is what the pipelines tell them


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


@pytest.mark.parametrize("size", [(64, 48), (50, 70), (33, 32), (32, 32), (31, 90)])
def test_pictures_are_prepared_as_clip_does(made, size):
    from transformers import CLIPImageProcessor

    pixels = np.random.default_rng(0).integers(0, 256, (size[1] // 8 + 1, size[0] // 8 + 1, 3), dtype=np.uint8)
    img = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    folder = made / "tiny22/prior/image_processor"
    theirs = CLIPImageProcessor.from_pretrained(folder)(img, return_tensors="pt")["pixel_values"][0]
    ours = kandinsky.clip_preprocessor(folder)(img)
    assert ours.shape == theirs.shape == (3, 32, 32)
    assert (ours - theirs).abs().mean() < 0.004  # half a grey value of 255: other roundings of the same resize


# Sampling


def test_two_adapters_of_2_2_and_their_strength(made, tmp_path):
    adapters = ["--prior-lora", made / "train-prior/best", "--decoder-lora", made / "train-decoder/best"]
    base = sample(made, "2.2", tmp_path / "base")
    adapted = sample(made, "2.2", tmp_path / "adapted", *adapters)
    assert adapted != base and sample(made, "2.2", tmp_path / "zero", *adapters, "--lora-scale", 0) == base
    only_decoder = sample(made, "2.2", tmp_path / "decoder", *adapters[2:])
    assert only_decoder not in (base, adapted)
    (tmp_path / "adapted/images/000001.png").unlink()
    assert sample(made, "2.2", tmp_path / "adapted", *adapters) == adapted
    settings = json.loads((tmp_path / "adapted/config.json").read_text())
    assert settings["prior_lora"] == folder_hash(made / "train-prior/best") and settings["size"] == 64
    for change, said in (([*adapters, "--lora-scale", 0.5], "lora_scale"), ([], "prior_lora"), ([*adapters, "--size", 96], "size")):
        with pytest.raises(BadInput, match=f"holds pictures made with {said}="):
            sample(made, "2.2", tmp_path / "adapted", *change)


def test_an_adapter_of_3_and_its_strength(made, tmp_path):
    adapter = ["--lora", made / "train-unet3/best"]
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
    ("train-decoder", ["--model", "{root}/tiny22/prior"], "unet/config.json: no such file"),
    ("train-unet3", ["--model", "{root}/tiny22/decoder"], "expected the config of a Kandinsky3UNet, got UNet2DConditionModel"),
    ("train-prior", ["--rank", "0"], "rank: expected a whole number from 1, got 0"),
    ("train-prior", ["--targets", "to_x"], "LoRA targets match no layer of Prior"),
    ("train-prior", missing_shard, "shard-1.safetensors: no such file"),
    ("train-prior", ["--model", "{root}/absent"], "absent: no such folder"),
    ("train-prior", ["--data", "{root}/absent"], "absent"),
    ("train-prior", ["--batch-size", "0"], "--batch-size 0: expected 1 or more"),
    ("train-decoder", ["--size", "60"], "--size 60 is not divisible by 16"),
    ("train-decoder", ["--prior", "{root}/tiny3"], "image_encoder: expected a folder with files of a model"),
])
def test_bad_input_is_one_line_and_writes_no_adapter(made, tmp_path, name, change, said):
    change = change(made, tmp_path) if callable(change) else [c.format(root=made) for c in change]
    with pytest.raises(BadInput) as error:
        kandinsky.main(flags(made, name, tmp_path / "run", *change))
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.glob("run/*/adapter*")) and not (tmp_path / "run/metrics.jsonl").exists()


def test_a_run_with_other_settings_is_refused(made):
    before = folder_hash(made / "train-prior")
    with pytest.raises(BadInput, match="started with alpha=4, now alpha=8"):
        kandinsky.main(flags(made, "train-prior", made / "train-prior", "--rank", 8))
    assert folder_hash(made / "train-prior") == before


@pytest.mark.parametrize(("kind", "change", "said"), [
    ("2.2", ["--prior-lora", "{root}/train-decoder/best"], "not an adapter of this Prior"),
    ("2.2", ["--decoder", "{root}/tiny22/prior"], "unet/config.json: no such file"),
    ("2.2", ["--ckpt", "{root}/tiny22/decoder"], "expected a file of msdm.py, the prior folder of Kandinsky 2.2, or the"),
    ("2.2", ["--lora", "{root}/train-prior/best"], "--lora is not for a Kandinsky 2.2 prior"),
    ("2.2", ["--prior-lora", "{root}/absent"], "absent: expected a folder"),
    ("3", ["--decoder", "{root}/tiny22/decoder"], "--decoder is not for Kandinsky 3"),
    ("3", ["--lora", "{root}/train-decoder/best"], "not an adapter of this UNet3"),
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
    done = subprocess.run([sys.executable, HERE / "kandinsky.py", *flags(made, "train-prior", tmp_path / "run", "--rank", 0)],
                          capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 2 and done.stderr.splitlines() == ["error: LoRA rank: expected a whole number from 1, got 0"]


def test_adapters_train_every_layer(made):
    for name, folder, load in (("train-prior", "tiny22/prior/prior", kandinsky.load_prior),
                               ("train-decoder", "tiny22/decoder/unet", kandinsky.load_decoder),
                               ("train-unet3", "tiny3/unet", kandinsky.load_unet3)):
        network = load(made / folder)
        lora.load(network, made / name / "last")
        assert all(layer.lora_B.abs().max() > 0 for layer in lora.layers(network).values()), name
