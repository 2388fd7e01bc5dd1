"""Kill a training at random steps with SIGKILL, start it again, and compare what it leaves with a run that was never killed.

    python tests/kill.py --kills 20
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))

from files import file_hash  # noqa: E402 - the project's root is not on the path of a script in tests/

ENV = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
STEPS = 14
COMPARED = ("last.safetensors", "best.safetensors", "metrics.jsonl", "samples/0000014.png")


def run(script, *flags):
    subprocess.run([sys.executable, HERE / script, *map(str, flags)], check=True, env=ENV, capture_output=True, timeout=300)


def prepare(root):
    """A few phantoms, a VAE of a few steps and the run that is never killed."""
    run("phantom.py", "--out", root / "data", "--n", 40, "--size", 32)
    run("vae.py", "--data", root / "data", "--out", root / "vae", "--size", 32, "--steps", 4, "--perceptual", "off")
    run("msdm.py", *flags(root), "--out", root / "whole")


def flags(root):
    return ["--data", root / "data", "--vae", root / "vae/best.safetensors", "--size", 32, "--steps", STEPS, "--batch-size", 4,
            "--log-every", 1, "--save-every", 5, "--shown", 2, "--sample-steps", 2]


def last_step(folder):
    """The last step that the log tells of: 0 without one; a line cut short does not count."""
    log = folder / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


def kill_at(root, name, step):
    """Start a run, kill it once its log tells of `step`, let it finish: the files of COMPARED that differ, and where it died."""
    command = [sys.executable, HERE / "msdm.py", *map(str, [*flags(root), "--out", root / name])]
    process = subprocess.Popen(command, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while last_step(root / name) < step and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    if process.wait() != -signal.SIGKILL:
        raise RuntimeError(f"{name} ended by itself before step {step}")
    died = last_step(root / name)
    run("msdm.py", *flags(root), "--out", root / name)
    return [f for f in COMPARED if file_hash(root / name / f) != file_hash(root / "whole" / f)], died


def main():
    parser = argparse.ArgumentParser(description="Kill a training at random steps, resume it, compare the files it leaves.")
    parser.add_argument("--kills", type=int, default=20, help="runs, each killed once")
    parser.add_argument("--seed", type=int, default=0, help="of the steps to kill at")
    args = parser.parse_args()
    steps = random.Random(args.seed)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
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
