"""Kill the commands at random moments with SIGKILL, start them again, compare with a run never killed.

    python tests/resume_after_kill.py --kills 100
    python tests/resume_after_kill.py --kills 10 --commands sampler phantom

A command is killed up to three times, each time after a random delay, at a random step of its log, or while
it writes a file, and is then left to finish. No kill may leave half a file under its name; in the end the
files are those of a run that was never killed, bit for bit, and no unfinished file or process is left.
"""

import argparse
import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402 - the project's root is not on the path of a script in tests/
from helpers import run, start, tiny_msdm  # noqa: E402
from PIL import Image  # noqa: E402

from files import file_hash, load_safetensors, save_safetensors  # noqa: E402

STEPS = 14
COMPARED = ("last.safetensors", "best.safetensors", "metrics.jsonl", "samples/0000014.png")
QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def prepare(root):
    """A few phantoms and a VAE of a few steps."""
    run("phantom.py", "--out", root / "data", "--n", 40, "--size", 32)
    run("vae.py", "--data", root / "data", "--out", root / "vae", "--size", 32, "--steps", 4, "--perceptual",
        "off")


def run_whole(root):
    """The run of msdm.py that is never killed."""
    run("msdm.py", *flags(root), "--out", root / "whole")


def flags(root):
    return ["--data", root / "data", "--vae", root / "vae/best.safetensors", "--size", 32, "--steps", STEPS,
            "--batch-size", 4,
            "--log-every", 1, "--save-every", 5, "--shown", 2, "--sample-steps", 2]


def last_step(folder):
    """The last step in the log: 0 without one; a line cut short does not count."""
    log = folder / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


def kill_at(root, name, step):
    """Kill a run of msdm.py once its log has `step`, resume it: the COMPARED files that differ, its end."""
    process = start("msdm.py", *flags(root), "--out", root / name, **QUIET)
    while last_step(root / name) < step and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    if process.wait() != -signal.SIGKILL:
        raise RuntimeError(f"{name} ended by itself before step {step}")
    died = last_step(root / name)
    run("msdm.py", *flags(root), "--out", root / name)
    return [f for f in COMPARED if file_hash(root / name / f) != file_hash(root / "whole" / f)], died


# Every command

TRAINING = ["--size", 32, "--steps", STEPS, "--batch-size", 4, "--log-every", 1, "--save-every", 4]
ADAPTER = [*TRAINING[2:], "--rank", 2]


def commands(root):
    """{name: (script, its flags without the output folder)}"""
    data, metrics = ["--data", root / "data"], ["--real", root / "real", "--fake", root / "fake"]
    return {
        "vae": ("vae.py", [*data, *TRAINING, "--perceptual", "off"]),
        "msdm": ("msdm.py", flags(root)),
        "finetune msdm": ("finetune.py", ["msdm", "--model", root / "msdm.safetensors", *data, *ADAPTER,
                                          "--shown", 2, "--sample-steps", 2]),
        "finetune prior": ("finetune.py", ["prior", "--model", root / "k22/prior", *data, *ADAPTER]),
        "sampler": ("sampler.py", ["--ckpt", root / "msdm.safetensors", "--prompts", root / "prompts.txt",
                                   "--steps", 10, "--batch-size", 4, "--grid"]),
        "phantom": ("phantom.py", ["--n", 150, "--size", 64]),
        "metrics": ("metrics.py", [*metrics, "--weights", "rule", "--batch-size", 8]),
    }


def inputs(root, names):
    """The files that the commands of these names read."""
    from tiny_kandinsky import main as make_tiny

    if {"vae", "msdm", "finetune msdm", "finetune prior"} & set(names):
        prepare(root)
    for seed, folder in enumerate(("real", "fake") if "metrics" in names else ()):
        run("phantom.py", "--out", root / folder, "--n", 10, "--size", 32, "--seed", seed)
    model = tiny_msdm()
    save_safetensors(root / "msdm.safetensors", model.tensors(), model.metadata())
    (root / "prompts.txt").write_text("".join(f"Generate an image with {i} polyps.\n" for i in range(40)))
    if "finetune prior" in names:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            make_tiny(["--out", str(root / "k22")])


def argv(root, name, out):
    script, given = commands(root)[name]
    if name == "metrics":
        return [script, *given, "--cache", out, "--json", out / "numbers.json"]
    return [script, *given, "--out", out]


UNFINISHED = re.compile(r"\..*\.\d+(\.\w+)?")  # of files.replacing


def unfinished(folder):
    return [p for p in folder.rglob(".*") if UNFINISHED.fullmatch(p.name)]


def files_of(folder):
    found = {p.relative_to(folder): p for p in sorted(folder.rglob("*")) if p.is_file()}
    return {n: p for n, p in found.items() if not any(part.startswith(".") for part in n.parts)}


def half_files(folder):
    """Files that cannot be read whole. A log, which is appended to, may end with half a line."""
    bad = []
    for name, path in files_of(folder).items():
        try:
            content(path)
        except Exception as error:
            bad.append(f"{name} ({error!r:.80})")
    return bad


def content(path):
    """What is compared of a file: its bytes, the tensors of a state, metrics.py's numbers, not the time."""
    if path.suffix == ".pt":
        return torch.load(path, map_location="cpu", weights_only=True)
    if path.suffix == ".safetensors":
        load_safetensors(path)
    elif path.suffix == ".png":
        with Image.open(path) as img:
            img.load()
    elif path.suffix == ".json":
        value = json.loads(path.read_text())
        return {k: v for k, v in value.items() if k != "seconds"} if path.name == "numbers.json" else value
    return path.read_bytes()


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def differences(folder, whole):
    ours, expected = files_of(folder), files_of(whole)
    lists = [f"without {n}" for n in expected.keys() - ours.keys()]
    lists += [f"more: {n}" for n in ours.keys() - expected.keys()]
    return sorted(lists) + [f"other {n}" for n in sorted(ours.keys() & expected.keys())
                            if not same(content(ours[n]), content(expected[n]))]


# Kills


def wait_until(moment, process, out, rng, seconds):
    """Return at a random moment of that kind, or when the process has ended; a text that says which."""
    if moment == "delay":
        delay = rng.uniform(0, seconds)
        end = time.monotonic() + delay
        while time.monotonic() < end and process.poll() is None:
            time.sleep(0.005)
        return f"after {delay:.2f} of {seconds:.2f} s"
    if moment == "step":
        step = rng.randrange(STEPS)
        while last_step(out) < step and process.poll() is None:
            time.sleep(0.005)
        return f"after step {last_step(out)}"
    writes, seen = rng.choice((1, 1, 2, 3)), set()
    while process.poll() is None:
        seen |= {p.name for p in unfinished(out)} if out.exists() else set()
        if len(seen) >= writes:
            return f"in write {writes}"
    return ""


def kill(root, name, out, rng, seconds):
    """Start a command and kill it: (where, the files it left in halves); None if it ended before."""
    script, *given = argv(root, name, out)
    process = start(script, *given, start_new_session=True, **QUIET)
    logs = name in ("vae", "msdm") or name.startswith("finetune")
    where = wait_until(rng.choice(("delay", "write", *["step"] * logs)), process, out, rng, seconds)
    process.send_signal(signal.SIGKILL)
    status = process.wait()
    faults = half_files(out) if out.exists() else []
    if status == -signal.SIGKILL and not group_ends(process.pid):
        faults.append("its processes stay, 10 s after the kill")
    if status not in (0, -signal.SIGKILL):
        faults.append(f"exit status {status} by itself")
    return None if status == 0 else (where, faults)


def group_ends(group, seconds=10):
    """Whether every process of a killed command ends by itself; those that do not are killed."""
    for _ in range(seconds * 20):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    os.killpg(group, signal.SIGKILL)
    return False


def run_kills(root, kills, seed, names, show=print):
    """Kill the commands of these names, in turn, `kills` times in all; the number of faults."""
    rng, seconds, counts, faulty = random.Random(seed), {}, Counter(), Counter()
    inputs(root, names)
    for name in names:
        begun = time.monotonic()
        run(*argv(root, name, root / "whole" / name))
        seconds[name] = time.monotonic() - begun
    number, tried = 0, Counter()
    while number < kills:
        name = min(names, key=lambda n: counts[n] + tried[n])  # some runs end before the moment of their kill
        out = root / f"killed-{tried.total()}"
        tried[name] += 1
        for _ in range(min(rng.choice((1, 2, 3)), kills - number)):
            killed = kill(root, name, out, rng, seconds[name])
            if killed is None:
                break
            number += 1
            counts[name] += 1
            faulty[name] += bool(killed[1])
            show(f"{number:3d} {name} killed {killed[0]}: {', '.join(killed[1]) or 'whole files'}")
        try:
            run(*argv(root, name, out))
        except AssertionError as error:
            faults = [f"does not go on: {str(error).strip().splitlines()[-1][:300]}"]
        else:
            faults = differences(out, root / "whole" / name)
        faults += [f"left {p.relative_to(root)}" for p in unfinished(root)]
        for path in unfinished(root):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        faulty[name] += bool(faults)
        show(f"    {name} finished: {', '.join(faults) or 'the files of the run that was never killed'}")
        shutil.rmtree(out, ignore_errors=True)
    show(f"\n{'command':<16}{'kills':>6}{'faults':>8}")
    for name in names:
        show(f"{name:<16}{counts[name]:>6}{faulty[name]:>8}")
    return faulty.total()


def main():
    parser = argparse.ArgumentParser(description="Kill commands at random moments, resume, compare files.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    names = list(commands(Path()))
    parser.add_argument("--kills", type=int, default=100, help="kills in all, over the commands in turn")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--commands", nargs="+", choices=names, default=names, help="which to kill")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        faults = run_kills(Path(folder), args.kills, args.seed, args.commands, lambda x: print(x, flush=True))
    print(f"{args.kills} kills, {faults} faults")
    return faults > 0


if __name__ == "__main__":
    sys.exit(main())
