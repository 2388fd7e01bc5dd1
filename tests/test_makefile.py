"""The Makefile hands its values to the commands as they stand; the map of the paper names what is there."""

import importlib
import json
import re
import subprocess

import pytest
import tiny_kandinsky
from helpers import ROOT

import finetune
import metrics
import phantom
import sampler
from files import folder_hash


def made_commands(*words):
    """The lines that make would run, without running them: python is replaced by echo."""
    done = subprocess.run(["make", "--silent", "--old-file", ".venv/installed", "PY=echo", *words], cwd=ROOT,
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("given, preset", [([], "tiny"), (["PRESET=paper"], "paper"), (["PRESET="], "tiny")])
def test_preset_reaches_both_trainings(given, preset):
    vae, unet = made_commands("train-msdm", "DATA=some $folder", *given)
    assert vae == f"vae.py --preset {preset} --data some $folder --out runs/msdm/vae"
    assert unet.startswith(f"msdm.py --preset {preset} --data some $folder --vae runs/msdm/vae/best.saf")


def test_size_reaches_both_trainings():
    assert [line.split().count("128") for line in made_commands("train-msdm", "DATA=x", "SIZE=128")] == [1, 1]
    assert not any("--size" in line for line in made_commands("train-msdm", "DATA=x"))


def test_faithfulness_samples_what_it_judges_by_phantoms_that_nothing_else_uses():
    prompts, sampled, judged = made_commands("faithfulness", "CKPT=some $file", "FLAGS=--json t")[-3:]
    assert prompts == "judges.py prompts --out out/faithfulness.csv"
    assert sampled == ("sampler.py --ckpt some $file --prompts out/faithfulness.csv --seed 10000 "
                       "--solver dpmpp --steps 20 --out out/faithfulness")
    assert judged == "judges.py faithfulness --real data/phantom-judges --fake out/faithfulness --json t"
    drawn = re.findall(r"phantom\.py .*--seed (\d+)( --max-polyps 8)?", (ROOT / "Makefile").read_text())
    assert sorted(drawn) == [("0", ""), ("0", ""), ("1", ""), ("2", " --max-polyps 8")]


def test_the_experiments_run_on_built_in_data_unless_values_are_given():
    said = made_commands("ablation")
    assert said[-1] == ("experiments.py ablation --preset tiny --data data/phantom --real "
                        "data/phantom-others --judge data/phantom-judges --out runs/ablation")
    said = made_commands("ablation", "DATA=some $folder", "PRESET=paper", "STEPS=20", "FLAGS=--seeds 2")
    assert said == ["experiments.py ablation --preset paper --data some $folder --real some $folder --out "
                    "runs/ablation --steps 20 --seeds 2"]
    one, two = made_commands("table2", "PRIOR=p", "DECODER=d", "DATA=x", "WEIGHTS=w")
    assert one == "experiments.py table1 --out runs/tables/table1 --prior p --decoder d --data x --weights w"
    assert two == ("experiments.py table2 --table1 runs/tables/table1 --out runs/tables/table2 --prior p "
                   "--decoder d --data x --weights w")
    tiny = made_commands("table1", "STEPS=20")[-1]
    assert "--prior runs/tiny-kandinsky22/prior" in tiny and tiny.endswith("--steps 20")
    assert made_commands("submission", "CKPT=c", "PROMPTS=p q.csv") == [
        "experiments.py submission --ckpt c --prompts p q.csv --out out/submission"]
    assert made_commands("submission")[-1].startswith(
        "experiments.py submission --ckpt runs/demo/msdm/best.safetensors --prompts docs/paper-prompts.txt")
    assert made_commands("table3", "CKPT=a b", "DATA=x", "PROMPTS=p", "OUT=o") == [
        "experiments.py table3 a b --prompts p --data x --out o"]


def in_process(line):
    """A printed command, without the start of a python; it has no word with a space in it."""
    script, *flags = line.split()
    {"finetune.py": finetune, "sampler.py": sampler, "metrics.py": metrics}[script].main(flags)


def test_the_papers_stages_go_on_where_they_were_and_use_each_others_results(tmp_path):
    phantom.main(["--out", str(tmp_path / "data"), "--n", "12", "--size", "64"])
    tiny_kandinsky.main(["--out", str(tmp_path / "tiny")])
    (tmp_path / "prompts.txt").write_text("Generate an image with 2 polyps.\n")
    prior, decoder, out = (tmp_path / name for name in ("tiny/prior", "tiny/decoder", "out"))
    lines = made_commands(
        "paper-kandinsky22", f"PRIOR={prior}", f"DECODER={decoder}", f"DATA={tmp_path / 'data'}",
        f"OUT={out}", f"PROMPTS={tmp_path / 'prompts.txt'}", "SAMPLING=--size 64 --steps 1 -n 10",
        "WEIGHTS=rule", "FLAGS=--size 64 --epochs 0.1 --rank 2 --shown 1 --sample-steps 1 --batch-size 8")
    assert [line.split()[0] for line in lines] == ["finetune.py", "sampler.py", "metrics.py"] * 3
    for line in lines[:4]:  # and killed
        in_process(line)
    first = {f: f.stat().st_mtime_ns for f in (out / "stage-1").rglob("*.png")}
    bytes_of = {f: f.read_bytes() for f in (out / "stage-1").rglob("*") if f.is_file()}
    judged = (out / "stage-1/metrics.json").stat().st_mtime_ns
    adapter = folder_hash(out / "stage-1/decoder/best")
    for line in lines:
        in_process(line)
    assert len(first) == 11 and all(f.stat().st_mtime_ns == made for f, made in first.items())
    assert folder_hash(out / "stage-1/decoder/best") == adapter
    assert [f.name for f, held in bytes_of.items() if f.read_bytes() != held] == []
    assert (out / "stage-1/metrics.json").stat().st_mtime_ns == judged
    assert list((out / "stage-2/prior/samples").iterdir())  # drawn by the decoder of stage 1
    best = {name: folder_hash(out / name / "best") for name in ("stage-2/prior", "stage-3/decoder")}
    used = [json.loads((out / f"stage-{n}/sample/config.json").read_text()) for n in (1, 2, 3)]
    assert [(x["prior_lora"], x["decoder_lora"]) for x in used] == [
        (None, adapter), (best["stage-2/prior"], adapter), (best["stage-2/prior"], best["stage-3/decoder"])]
    assert all(json.loads((out / f"stage-{n}/metrics.json").read_text())["fid"] > 0 for n in (1, 2, 3))


def test_without_inception_weights_the_stages_say_so_and_go_on(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ntest "$1" != -c\n')  # the weights are not there, all else succeeds
    python.chmod(0o755)
    said = subprocess.run(["make", "--silent", "--old-file", ".venv/installed", f"PY={python}",
                           "paper-kandinsky22", "PRIOR=a", "DECODER=b", "DATA=c"], cwd=ROOT,
                          capture_output=True, text=True, timeout=60)
    assert said.returncode == 0 and said.stderr.count("give WEIGHTS=FILE") == 3


def test_the_map_of_the_paper_names_files_targets_and_tests_that_are_there():
    text = (ROOT / "docs/paper.md").read_text(encoding="utf-8")
    of_the_map = text.split("\n## The map")[1].split("\n## ")[0]
    tests = "".join(f.read_text(encoding="utf-8") for f in ROOT.glob("tests/test_*.py"))
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    named = re.findall(r"`(test_\w+)`", of_the_map)
    assert len(named) > 30 and [x for x in named if f"def {x}(" not in tests] == []
    assert [x for x in re.findall(r"(\w+\.py)\b", of_the_map) if not (ROOT / x).is_file()] == []
    assert [x for x in re.findall(r"`make ([\w-]+)", of_the_map) if x not in targets] == []
    for module, name in re.findall(r"`(\w+)\.((?!py\b)\w+)`", of_the_map):
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"
