"""The real commands, end to end, on a few drawn pictures: draw, train, kill, go on, sample."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import kill
import numpy as np
import pytest
import torch
from PIL import Image

from files import file_hash, load_metadata, load_safetensors, save_safetensors

HERE = Path(__file__).resolve().parents[1]
ENV = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run(script, *flags, expect=0):
    done = subprocess.run([sys.executable, HERE / script, *map(str, flags)], capture_output=True, text=True, env=ENV, timeout=300)
    assert done.returncode == expect, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with data, a VAE and a U-Net trained for a few steps by the commands of the README."""
    root = tmp_path_factory.mktemp("made")
    run("phantom.py", "--out", root / "data", "--n", 40, "--size", 32)
    run("vae.py", "--data", root / "data", "--out", root / "vae", "--size", 32, "--steps", 6, "--perceptual", "off")
    run("msdm.py", *msdm_flags(root), "--out", root / "msdm")
    return root


def msdm_flags(root):
    return ["--data", root / "data", "--vae", root / "vae/best.safetensors", "--size", 32, "--steps", 12, "--batch-size", 4,
            "--log-every", 2, "--save-every", 4, "--shown", 2, "--sample-steps", 2]


def test_a_run_folder_holds_what_the_design_says(made):
    run_folder = made / "msdm"
    config = json.loads((run_folder / "config.json").read_text())
    assert config["settings"]["batch_size"] == 4 and config["versions"]["torch"] and config["data"]
    steps = [json.loads(line)["step"] for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == 12
    assert {p.name for p in (run_folder / "samples").iterdir()} == {"0000004.png", "0000008.png", "0000012.png"}
    assert all((run_folder / f).exists() for f in ("last.safetensors", "best.safetensors", "state.pt"))


def test_a_killed_vae_run_ends_with_the_same_bytes(made, tmp_path):
    flags = ["--data", made / "data", "--size", 32, "--steps", 6, "--perceptual", "off", "--save-every", 2]
    flags += ["--out", tmp_path / "again"]
    killed = subprocess.Popen([sys.executable, HERE / "vae.py", *map(str, flags)], env=ENV, stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL)
    state = tmp_path / "again" / "state.pt"
    for _ in range(3000):
        if state.exists() or killed.poll() is not None:
            break
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert state.exists()
    run("vae.py", *flags)
    assert file_hash(tmp_path / "again" / "last.safetensors") == file_hash(made / "vae" / "last.safetensors")


def test_killed_msdm_runs_end_with_the_same_files(tmp_path):
    kill.prepare(tmp_path)
    for step in (0, 6, 13):  # before the first state, after one, between the last step and its state
        assert kill.kill_at(tmp_path, f"killed-{step}", step)[0] == []


def test_a_whole_u_net_goes_on_from_a_checkpoint_whose_vae_and_text_encoder_stay(made, tmp_path):
    run("msdm.py", "--data", made / "data", "--init", made / "msdm/best.safetensors", "--steps", 3, "--batch-size", 4,
        "--lr", 1e-2, "--warmup", 0, "--ema-decay", 0, "--shown", 0, "--out", tmp_path / "on")
    before, after = (load_safetensors(f)[0] for f in (made / "msdm/best.safetensors", tmp_path / "on/last.safetensors"))
    assert before.keys() == after.keys()
    kept = {k for k in before if torch.equal(before[k], after[k])}
    assert all(k in kept for k in before if not k.startswith("unet."))
    moved = [k for k in before if k.startswith("unet.") and k not in kept]
    assert len(moved) > 0.9 * sum(k.startswith("unet.") for k in before)
    assert load_metadata(tmp_path / "on/last.safetensors")["preset"] == "tiny"


@pytest.mark.parametrize("script", ["vae.py", "msdm.py"])
def test_a_batch_in_parts_is_one_step_of_the_whole(made, tmp_path, script):
    flags = ["--data", made / "data", "--size", 32, "--steps", 2, "--batch-size", 5, "--warmup", 0]
    flags += ["--perceptual", "off"] if script == "vae.py" else ["--vae", made / "vae/best.safetensors", "--shown", 0]
    losses = []
    for parts in (1, 2):
        run(script, *flags, "--log-every", 1, "--accumulate", parts, "--out", tmp_path / str(parts))
        lines = map(json.loads, (tmp_path / str(parts) / "metrics.jsonl").read_text().splitlines())
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == 2
    one, two = (load_safetensors(tmp_path / str(parts) / "last.safetensors")[0] for parts in (1, 2))
    assert all(torch.allclose(one[k], two[k], atol=1e-4) for k in one)


@pytest.mark.parametrize("path, script, flag", [("msdm/best", "sampler.py", "--ckpt"), ("vae/best", "msdm.py", "--vae")])
def test_a_checkpoint_of_an_earlier_format_is_refused_with_the_way_out(made, tmp_path, path, script, flag):
    tensors, meta = load_safetensors(made / f"{path}.safetensors")
    del meta["format"]
    save_safetensors(tmp_path / "old.safetensors", tensors, meta)
    more = ["--prompt", "x"] if script == "sampler.py" else ["--data", made / "data"]
    said = run(script, flag, tmp_path / "old.safetensors", *more, "--out", tmp_path / "out", expect=2).stderr
    assert "old.safetensors: a checkpoint of format 1, this version reads format 2; train it anew" in said
    assert not (tmp_path / "out").exists()


def test_the_same_folder_with_another_setting_is_refused(made):
    done = run("msdm.py", *msdm_flags(made), "--out", made / "msdm", "--lr", 0.5, expect=2)
    assert "this run was started with lr=0.001, now lr=0.5" in done.stderr


def test_a_folder_of_another_kind_is_not_taken_for_a_run(made, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert "something else than a training run" in run("msdm.py", *msdm_flags(made), "--out", tmp_path, expect=2).stderr


def test_help_tells_every_flag():
    for script in ("vae.py", "msdm.py"):
        said = run(script, "--help").stdout
        assert all(flag in said for flag in ("--data", "--steps", "--lr", "--minutes")), script


def test_ctrl_c_saves_and_leaves_with_130(made, tmp_path):
    flags = [*msdm_flags(made), "--out", tmp_path / "run", "--steps", 100_000, "--save-every", 90_000]
    process = subprocess.Popen([sys.executable, HERE / "msdm.py", *map(str, flags)], env=ENV, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run" / "metrics.jsonl"
    for _ in range(3000):
        if log.exists() and log.stat().st_size:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert "Traceback" not in process.stderr.read()
    assert (tmp_path / "run" / "state.pt").exists()


def test_sampling_writes_a_data_folder_and_makes_only_what_is_missing(made, tmp_path):
    flags = ["--ckpt", made / "msdm/best.safetensors", "--prompt", "Generate an image with 1 polyp.", "-n", 3, "--steps", 3,
             "--out", tmp_path / "out", "--grid"]
    run("sampler.py", *flags)
    files = sorted((tmp_path / "out/images").iterdir())
    assert [f.name for f in files] == ["000000.png", "000001.png", "000002.png"]
    assert (tmp_path / "out/prompts.csv").read_text().splitlines()[2] == "000001.png,Generate an image with 1 polyp.,1"
    before = [file_hash(f) for f in files]
    files[1].unlink()
    untouched = files[0].stat().st_mtime_ns
    run("sampler.py", *flags)
    assert [file_hash(f) for f in files] == before and files[0].stat().st_mtime_ns == untouched
    refused = run("sampler.py", *flags, "--seed", 7, expect=2)
    assert "made with seed=0, now seed=7" in refused.stderr
    assert np.asarray(Image.open(tmp_path / "out/grid.png")).shape[2] == 3


def test_prompts_from_a_text_file_and_from_a_csv_agree(made, tmp_path):
    (tmp_path / "p.txt").write_text("Generate an image containing text.\n\nGenerate an image with no polyps.\n")
    (tmp_path / "p.csv").write_text("Prompt;Filename\nGenerate an image containing text.;a\nGenerate an image with no polyps.;b\n")
    for name in ("txt", "csv"):
        run("sampler.py", "--ckpt", made / "msdm/last.safetensors", "--prompts", tmp_path / f"p.{name}", "--steps", 2,
            "--out", tmp_path / name)
    assert file_hash(tmp_path / "txt/images/000001.png") == file_hash(tmp_path / "csv/images/000001.png")


@pytest.mark.parametrize("script, flags, said", [
    ("sampler.py", ["--ckpt", "{root}/vae/best.safetensors", "--prompt", "x"], "expected a checkpoint of msdm.py, got 'vae'"),
    ("sampler.py", ["--ckpt", "{root}/absent.safetensors", "--prompt", "x"], "no such file"),
    ("sampler.py", ["--ckpt", "{root}/msdm/best.safetensors"], "give --prompt TEXT or --prompts FILE"),
    ("sampler.py", ["--ckpt", "{root}/msdm/best.safetensors", "--prompt", "x", "--steps", "2000"], "1000 times"),
    ("msdm.py", ["--data", "{root}/absent", "--vae", "{root}/vae/best.safetensors"], "absent"),
    ("msdm.py", ["--data", "{root}/data", "--vae", "{root}/msdm/best.safetensors"], "expected a checkpoint of vae.py"),
    ("msdm.py", ["--data", "{root}/data", "--vae", "{root}/vae/best.safetensors", "--size", "36"], "not divisible"),
    ("msdm.py", ["--data", "{root}/data", "--vae", "{root}/vae/best.safetensors", "--text-encoder", "absent/model"],
     "--text-encoder train"),
    ("vae.py", ["--data", "{root}/data", "--perceptual", "{root}/absent.pth"], "--perceptual"),
    ("vae.py", ["--data", "{root}/data", "--batch-size", "0"], "--batch-size 0: expected 1 or more"),
    ("vae.py", ["--data", "{root}/data", "--size", "50"], "--size 50: expected a multiple of 4, 32 or more"),
    ("msdm.py", ["--data", "{root}/data", "--vae", "{root}/vae/best.safetensors", "--sample-steps", "1001"], "1000 times"),
    ("msdm.py", ["--data", "{root}/data", "--vae", "{root}/vae/best.safetensors", "--join", "0"], "--join 0: expected 1 or more"),
    ("msdm.py", ["--data", "{root}/data"], "give either --vae CHECKPOINT or --init CHECKPOINT"),
    ("msdm.py", ["--data", "{root}/data", "--init", "{root}/msdm/best.safetensors", "--size", "64"], "--size 64: {root}/msdm"),
    ("msdm.py", ["--data", "{root}/data", "--init", "{root}/msdm/best.safetensors", "--preset", "paper"], "--preset paper: "),
])
def test_bad_input_is_one_line_and_status_2(made, tmp_path, script, flags, said):
    done = run(script, *[f.format(root=made) for f in flags], "--out", tmp_path / "out", expect=2)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and said.format(root=made) in errors[0] and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()  # the corrected command finds the name free
