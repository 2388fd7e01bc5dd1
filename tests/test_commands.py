"""The real commands, end to end, on a few rendered images: render, train, kill, go on, sample."""

from command import BadInput, run_command

import importlib
import json
import re
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from helpers import ROOT, log_lines, run, start, tiny_msdm, torchrun
from PIL import Image
from resume_after_kill import kill_at, run_whole

import data
import msdm
import sampler
import vae
from files import file_hash, load_metadata, load_safetensors, save_safetensors
from runfolder import read_run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with data, a VAE and a U-Net trained for a few steps by the commands of the README."""
    root = tmp_path_factory.mktemp("made")
    run("phantom.py", "--out", root / "data", "--n", 40, "--size", 32)
    run("vae.py", "--data", root / "data", "--out", root / "vae", "--size", 32, "--steps", 6, "--perceptual",
        "off")
    run("msdm.py", *msdm_flags(root), "--out", root / "msdm")
    return root


def in_process(script, *flags):
    {"msdm.py": msdm, "sampler.py": sampler, "vae.py": vae}[script].main(list(map(str, flags)))


def msdm_flags(root):
    return ["--data", root / "data", "--vae", root / "vae/best.safetensors", "--size", 32, "--steps", 12,
            "--batch-size", 4,
            "--log-every", 2, "--save-every", 4, "--shown", 2, "--sample-steps", 2]


def test_a_run_folder_holds_what_the_design_says(made):
    run_folder = made / "msdm"
    config = json.loads((run_folder / "config.json").read_text())
    assert config["settings"]["batch_size"] == 4 and config["versions"]["torch"] and config["data"]
    steps = [line["step"] for line in log_lines(run_folder)]
    assert steps == sorted(steps) and steps[-1] == 12
    assert {p.name for p in (run_folder / "samples").iterdir()} == {"0000004.png", "0000008.png",
                                                                    "0000012.png"}
    assert all((run_folder / f).exists() for f in ("last.safetensors", "best.safetensors", "state.pt"))


def test_a_killed_vae_run_ends_with_the_same_bytes(made, tmp_path):
    flags = ["--data", made / "data", "--size", 32, "--steps", 6, "--perceptual", "off", "--save-every", 2]
    flags += ["--out", tmp_path / "again"]
    killed = start("vae.py", *flags, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    state = tmp_path / "again" / "state.pt"
    for _ in range(3000):
        if (tmp_path / "again/last.safetensors").exists() or killed.poll() is not None:
            break
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert state.exists()
    run("vae.py", *flags)
    assert file_hash(tmp_path / "again" / "last.safetensors") == file_hash(made / "vae" / "last.safetensors")


def test_killed_msdm_runs_end_with_the_same_files(made):
    run_whole(made)
    for step in (0, 6, 13):  # before the first state, after one, between the last step and its state
        assert kill_at(made, f"killed-{step}", step)[0] == []


def test_a_whole_u_net_goes_on_from_a_checkpoint_whose_vae_and_text_encoder_stay(made, tmp_path):
    run("msdm.py", "--data", made / "data", "--init", made / "msdm/best.safetensors", "--steps", 3,
        "--batch-size", 4,
        "--lr", 1e-2, "--warmup", 0, "--ema-decay", 0, "--shown", 0, "--out", tmp_path / "on")
    before, after = (load_safetensors(f)[0]
                     for f in (made / "msdm/best.safetensors", tmp_path / "on/last.safetensors"))
    assert before.keys() == after.keys()
    kept = {k for k in before if torch.equal(before[k], after[k])}
    assert all(k in kept for k in before if not k.startswith("unet."))
    moved = [k for k in before if k.startswith("unet.") and k not in kept]
    assert len(moved) > 0.9 * sum(k.startswith("unet.") for k in before)
    assert load_metadata(tmp_path / "on/last.safetensors")["preset"] == "tiny"


def test_self_conditioning_and_dropout_are_the_presets_unless_flags_say_otherwise(made, tmp_path):
    in_process("msdm.py", *msdm_flags(made), "--steps", 1, "--self-conditioning", "--dropout", 0.1, "--out",
               tmp_path)
    preset, given = (load_metadata(x / "last.safetensors")["unet"] for x in (made / "msdm", tmp_path))
    assert given == preset | {"self_conditioning": True, "dropout": 0.1}
    assert (preset["self_conditioning"], preset["dropout"]) == (False, 0.0)
    assert msdm.TRAINING["paper"]["self_conditioning"] and msdm.TRAINING["paper"]["dropout"] == 0.1


def test_the_preset_paper_is_the_papers_training():
    for training in (msdm.TRAINING["paper"], vae.TRAINING["paper"]):
        assert (training["size"], training["lr"], training["muon_lr"]) == (256, 1e-4, 0)  # AdamW for all
        assert training["jitter"] == 0.4
    unet = msdm.TRAINING["paper"]
    assert (unet["steps"], unet["batch_size"], unet["p_uncond"]) == (100_000, 64, 0.2)
    assert (unet["text_encoder"], unet["loss"]) == ("openai/clip-vit-large-patch14", "l1")
    assert tiny_msdm().defaults["steps"] == 150


@pytest.mark.parametrize("script", ["vae.py", "msdm.py"])
def test_a_batch_in_parts_is_one_step_of_the_whole(made, tmp_path, script):
    flags = ["--data", made / "data", "--size", 32, "--steps", 2, "--batch-size", 5, "--warmup", 0]
    vae_file = made / "vae/best.safetensors"
    flags += ["--perceptual", "off"] if script == "vae.py" else ["--vae", vae_file, "--shown", 0]
    losses = []
    for parts in (1, 2):
        in_process(script, *flags, "--log-every", 1, "--accumulate", parts, "--out", tmp_path / str(parts))
        losses.append([line["loss"] for line in log_lines(tmp_path / str(parts)) if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == 2
    one, two = (load_safetensors(tmp_path / str(parts) / "last.safetensors")[0] for parts in (1, 2))
    assert all(torch.allclose(one[k], two[k], atol=1e-4) for k in one)


def test_the_checkpoints_hold_the_averaged_weights_and_the_state_the_raw_ones(made, tmp_path):
    flags = ["--data", made / "data", "--vae", made / "vae/best.safetensors", "--size", 32, "--steps", 3,
             "--batch-size", 4]
    in_process("msdm.py", *flags, "--warmup", 0, "--shown", 0, "--out", tmp_path)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["weights"].keys() == state["ema"].keys()
    assert not any(torch.equal(state["weights"][k], state["ema"][k])
                   for k in ("unet.conv_in.weight", "unet.conv_out.bias"))
    for name in ("best", "last"):
        tensors, meta = load_safetensors(tmp_path / f"{name}.safetensors")
        assert meta["step"] == 3 and all(torch.equal(tensors[k], v) for k, v in state["ema"].items())


def test_a_sheet_that_a_kill_left_out_is_made_by_the_next_start(made, tmp_path):
    flags = ["msdm.py", *msdm_flags(made), "--save-every", 2, "--out", tmp_path]
    in_process(*flags, "--steps", 2)
    sheet = tmp_path / "samples/0000002.png"
    before = sheet.read_bytes()
    sheet.unlink()
    in_process(*flags, "--steps", 2)
    assert sheet.read_bytes() == before


TWO_RANKS = """
import sys, torch, msdm, training
save = training.Run.save_progress
def save_progress(run, step, weights, *more):
    torch.save({k: v.detach() for k, v in weights.items()}, f"{sys.argv[1]}/rank-{run.world.rank}.pt")
    save(run, step, weights, *more)
training.Run.save_progress = save_progress
msdm.main(sys.argv[2:])
"""


def test_two_processes_train_one_model_and_both_end(made, tmp_path):
    (tmp_path / "two.py").write_text(TWO_RANKS)
    torchrun(tmp_path / "two.py", tmp_path, *msdm_flags(made), "--steps", 6, "--save-every", 3, "--device",
             "cpu", "--log-every", 1, "--out", tmp_path / "run")
    one, other = (torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    state = torch.load(tmp_path / "run/state.pt", weights_only=True)
    assert state["step"] == 6 and all(torch.equal(one[k], v) for k, v in state["weights"].items())
    in_process("msdm.py", *msdm_flags(made), "--steps", 6, "--save-every", 3, "--device", "cpu",
               "--batch-size", 8, "--log-every", 1, "--accumulate", 2, "--out", tmp_path / "one")
    for key, expected in (("loss", [1, 2, 3, 4, 5, 6]), ("val_loss", [3, 6])):
        both, one = ([x for x in log_lines(tmp_path / run) if key in x] for run in ("run", "one"))
        assert [x["step"] for x in both] == [x["step"] for x in one] == expected  # one rank writes
        assert [x[key] for x in both] == pytest.approx([x[key] for x in one], rel=3e-6)
    load_safetensors(tmp_path / "run/best.safetensors")


@pytest.mark.parametrize("path, script, flag",
                         [("msdm/best", "sampler.py", "--ckpt"), ("vae/best", "msdm.py", "--vae")])
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
    done = run("msdm.py", *msdm_flags(made), "--out", tmp_path, expect=2)
    assert "something else than a training run" in done.stderr


@pytest.mark.parametrize("total", ['"4"', "0", "true", "null", "4.0"])
def test_a_damaged_number_in_a_run_s_settings_is_refused(tmp_path, total):
    (tmp_path / "config.json").write_text(
        f'{{"settings": {{}}, "data": "", "versions": {{}}, "images_a_step": {total}}}')
    with pytest.raises(BadInput, match="config.json: images_a_step=.* expected a number of images"):
        read_run(tmp_path)


def test_a_run_can_be_repeated_from_its_folder(made, tmp_path):
    flags = ["--data", made / "data", "--size", 32, "--steps", 10, "--perceptual", "off", "--batch-size", 3,
             "--lr", 2e-3, "--seed", -7, "--log-every", 1, "--no-cosine"]
    in_process("vae.py", *flags, "--out", tmp_path / "vae")
    more = ["--vae", made / "vae/best.safetensors", "--shown", 0, "--logit-normal", -0.5, 0.8, "--join", 2]
    in_process("msdm.py", *(f for f in flags if f not in ("--perceptual", "off")), *more, "--out",
               tmp_path / "msdm")
    for name in ("vae", "msdm"):
        in_process(f"{name}.py", "--from-run", tmp_path / name, "--out", tmp_path / f"{name}-again")
        losses = [[line["loss"] for line in log_lines(tmp_path / f) if "loss" in line]
                  for f in (name, f"{name}-again")]
        assert len(losses[0]) == 10 and losses[1] == pytest.approx(losses[0], rel=0, abs=1e-6)
    in_process("vae.py", "--from-run", tmp_path / "vae", "--steps", 2, "--out", tmp_path / "short")
    assert log_lines(tmp_path / "short")[-1]["step"] == 2  # a flag on the command line wins


def test_a_folder_to_repeat_must_be_a_run(made, tmp_path):
    done = run("vae.py", "--from-run", tmp_path / "absent", "--out", tmp_path / "out", expect=2)
    assert "absent: no config.json, expected the folder of a training run" in done.stderr
    with pytest.raises(BadInput, match="--from-run .*: a training of 'Autoencoder', expected one of 'MSDM'"):
        in_process("msdm.py", "--from-run", made / "vae", "--out", tmp_path / "out")


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_its_last_good_state(made, tmp_path):
    flags = ["--data", made / "data", "--size", 32, "--perceptual", "off", "--lr", 1e30, "--warmup", 0,
             "--steps", 9, "--save-every", 4, "--out", tmp_path]
    done = run("vae.py", *flags, expect=2)
    lines = [line for line in done.stderr.splitlines() if "error: " in line]
    assert len(lines) == 1 and "Nothing of this step was saved" in lines[0] and ".png" in lines[0]
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert all(v.isfinite().all() for v in state["weights"].values())
    assert not (tmp_path / "best.safetensors").exists()


def test_one_unreadable_image_held_out_stops_no_training(made, tmp_path):
    shutil.copytree(made / "data", tmp_path / "data")
    held_out = data.split(data.read_folder(tmp_path / "data"))[1][0].path
    held_out.write_bytes(held_out.read_bytes()[:100])
    run("vae.py", "--data", tmp_path / "data", "--size", 32, "--steps", 1, "--perceptual", "off", "--out",
        tmp_path / "vae")


COMMANDS = sorted(p.stem for p in ROOT.glob("*.py") if "\ndef main(" in p.read_text(encoding="utf-8"))


def help_of(module, capsys, monkeypatch, *words):
    monkeypatch.setenv("COLUMNS", "500")  # a flag and its help on one line
    monkeypatch.setattr("sys.argv", [f"{module.__name__}.py", *words, "--help"])
    with pytest.raises(SystemExit) as left:
        module.main()
    assert left.value.code in (0, None)
    return capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_of_every_command_has_a_help_text(name, capsys, monkeypatch):
    module = importlib.import_module(name)
    pages = [help_of(module, capsys, monkeypatch)]
    parts = re.search(r"^  \{([\w,-]+)\}", pages[0], re.MULTILINE)
    if parts:  # a command of several: data.py check, ...
        pages = [help_of(module, capsys, monkeypatch, part) for part in parts[1].split(",")]
    for page in pages:
        entries = re.split(r"^  (?=-)", page, flags=re.MULTILINE)[1:]
        assert len(entries) > 1
        without = [entry for entry in entries
                   if not re.match(r"-.*?\S(\n {10,}| {2,})\w", entry)]  # (default: 1) is no help
        assert not without, without


def test_ctrl_c_saves_and_leaves_with_130(made, tmp_path):
    flags = [*msdm_flags(made), "--out", tmp_path / "run", "--steps", 100_000, "--save-every", 90_000]
    process = start("msdm.py", *flags, stderr=subprocess.PIPE, text=True)
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
    flags = ["--ckpt", made / "msdm/best.safetensors", "--prompt", "Generate an image with 1 polyp.", "-n", 3,
             "--steps", 3,
             "--out", tmp_path / "out", "--grid"]
    run("sampler.py", *flags)
    files = sorted((tmp_path / "out/images").iterdir())
    assert [f.name for f in files] == ["000000.png", "000001.png", "000002.png"]
    rows = (tmp_path / "out/prompts.csv").read_text().splitlines()
    assert rows[2] == "000001.png,Generate an image with 1 polyp.,1"
    before = [file_hash(f) for f in files]
    files[1].unlink()
    untouched = files[0].stat().st_mtime_ns
    run("sampler.py", *flags)
    assert [file_hash(f) for f in files] == before and files[0].stat().st_mtime_ns == untouched
    refused = run("sampler.py", *flags, "--seed", 7, expect=2)
    assert "made with seed=0, now seed=7" in refused.stderr
    assert np.asarray(Image.open(tmp_path / "out/grid.png")).shape[2] == 3


def test_prompts_from_a_text_file_and_from_a_csv_agree(made, tmp_path):
    one, other = "Generate an image containing text.", "Generate an image with no polyps."
    (tmp_path / "p.txt").write_text(f"{one}\n\n{other}\n")
    (tmp_path / "p.csv").write_text(f"Prompt;Filename\n{one};a\n{other};b\n")
    for name in ("txt", "csv"):
        run("sampler.py", "--ckpt", made / "msdm/last.safetensors", "--prompts", tmp_path / f"p.{name}",
            "--steps", 2,
            "--out", tmp_path / name)
    assert file_hash(tmp_path / "txt/images/000001.png") == file_hash(tmp_path / "csv/images/000001.png")


@pytest.mark.parametrize("script, flags, said", [
    ("sampler.py", ["--ckpt", "{root}/vae/best.safetensors", "--prompt", "x"],
     "expected a checkpoint of msdm.py, got 'vae'"),
    ("sampler.py", ["--ckpt", "{root}/absent.safetensors", "--prompt", "x"], "no such file"),
    ("sampler.py", ["--ckpt", "{root}/msdm/best.safetensors"], "give --prompt TEXT or --prompts FILE"),
    ("sampler.py", ["--ckpt", "{root}/msdm/best.safetensors", "--prompt", "x", "--steps", "2000"],
     "1000 times"),
    ("msdm.py", ["--data", "{root}/absent", "--vae", "{root}/vae/best.safetensors"], "absent"),
    ("msdm.py", ["--data", "{root}/data", "--vae", "{root}/msdm/best.safetensors"],
     "expected a checkpoint of vae.py"),
    ("msdm.py", ["--data", "{root}/data", "--vae", "{root}/vae/best.safetensors", "--size", "36"],
     "not divisible"),
    ("msdm.py", ["--data", "{root}/data", "--vae", "{root}/vae/best.safetensors", "--text-encoder",
                 "absent/model"],
     "--text-encoder train"),
    ("vae.py", ["--data", "{root}/data", "--perceptual", "{root}/absent.pth"], "--perceptual"),
    ("vae.py", ["--data", "{root}/data", "--batch-size", "0"], "--batch-size 0: expected 1 or more"),
    ("vae.py", ["--data", "{root}/data", "--size", "72"], "--size 72: expected a multiple of 16, 32 or more"),
    ("msdm.py", ["--data", "{root}/data", "--vae", "{root}/vae/best.safetensors", "--sample-steps", "1001"],
     "1000 times"),
    ("msdm.py", ["--data", "{root}/data", "--vae", "{root}/vae/best.safetensors", "--join", "0"],
     "--join 0: expected 1 or more"),
    ("msdm.py", ["--data", "{root}/data"], "give either --vae CHECKPOINT or --init CHECKPOINT"),
    ("msdm.py", ["--data", "{root}/data", "--init", "{root}/msdm/best.safetensors", "--size", "64"],
     "--size 64: {root}/msdm"),
    ("msdm.py", ["--data", "{root}/data", "--init", "{root}/msdm/best.safetensors", "--dropout", "0.1"],
     "--dropout 0.1: {root}/msdm/best.safetensors has 0.0"),
    ("msdm.py", ["--data", "{root}/data", "--init", "{root}/msdm/best.safetensors", "--preset", "paper"],
     "--preset paper: "),
])
def test_bad_input_is_one_line_and_status_2(made, tmp_path, capsys, script, flags, said):
    flags = [*(f.format(root=made) for f in flags), "--out", tmp_path / "out"]
    with pytest.raises(SystemExit) as left:
        run_command(lambda: in_process(script, *flags))
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert left.value.code == 2 and len(errors) == 1 and said.format(root=made) in errors[0]
    assert not (tmp_path / "out").exists()  # the corrected command finds the name free
