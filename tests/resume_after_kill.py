"""Kill a training at random steps with SIGKILL, resume it, compare its files with those of a whole run.

    python tests/resume_after_kill.py --kills 20
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers import run, start  # noqa: E402

from files import file_hash  # noqa: E402 - the project's root is not on the path of a script in tests/

STEPS = 14
COMPARED = ("last.safetensors", "best.safetensors", "metrics.jsonl", "samples/0000014.png")


def prepare(root):
    """A few phantoms and a VAE of a few steps."""
    run("phantom.py", "--out", root / "data", "--n", 40, "--size", 32)
    run("vae.py", "--data", root / "data", "--out", root / "vae", "--size", 32, "--steps", 4, "--perceptual",
        "off")


def run_whole(root):
    """The run that is never killed."""
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
    """Kill a run once its log has `step`, resume it: the COMPARED files that differ, where it died."""
    process = start("msdm.py", *flags(root), "--out", root / name, stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL)
    while last_step(root / name) < step and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    if process.wait() != -signal.SIGKILL:
        raise RuntimeError(f"{name} ended by itself before step {step}")
    died = last_step(root / name)
    run("msdm.py", *flags(root), "--out", root / name)
    return [f for f in COMPARED if file_hash(root / name / f) != file_hash(root / "whole" / f)], died


def main():
    parser = argparse.ArgumentParser(description="Kill a training at random steps, resume, compare files.")
    parser.add_argument("--kills", type=int, default=20, help="runs, each killed once")
    parser.add_argument("--seed", type=int, default=0, help="of the steps to kill at")
    args = parser.parse_args()
    steps = random.Random(args.seed)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        run_whole(Path(folder))
        for i in range(args.kills):
            step = steps.randrange(0, STEPS)
            differ, died = kill_at(Path(folder), f"killed-{i}", step)
            failed += bool(differ)
            found = f"other {', '.join(differ)}" if differ else "the same files"
            print(f"{i + 1:2d} killed after step {died:2d}: {found}", flush=True)
    print(f"{args.kills - failed} of {args.kills} runs ended with the files of the run that was never killed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
