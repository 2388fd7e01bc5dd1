"""The script for a GPU, rehearsed on the CPU: every part runs, and its checks can fail."""

import json
import subprocess
import sys
import time

import gpu
import torch
from helpers import ENV, ROOT


def test_the_rehearsal_runs_every_part(tmp_path):
    command = [sys.executable, ROOT / "tests/gpu.py", "--rehearse", "--out", tmp_path]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert all(found[f"part {name}"]["how"] == "ok" for _, name, _, _ in gpu.PARTS)
    compiled = found["step, compiled"]
    assert compiled["loss_differs_by"] < 1e-5 < 1e-3 < compiled["loss_moves_by"]
    assert (tmp_path / "grid.png").stat().st_size and "a step" in (tmp_path / "profile.txt").read_text()


def test_a_part_that_overruns_or_fails_costs_only_itself():
    assert gpu.in_a_process(time.sleep, 60, limit=0.5) == "overran"
    assert gpu.in_a_process(int, "x", limit=10) == "failed"
    assert gpu.in_a_process(int, "1", limit=10) == "ok"


def test_a_changed_weight_is_a_difference():
    network, inputs = gpu.truth_cases()["prior"]
    with torch.no_grad():
        expected = network(*inputs)
        assert gpu.difference(network(*inputs), expected) == 0
        network.get_parameter(gpu.LAST_LAYER["prior"]).mul_(1.01)
        assert gpu.difference(network(*inputs), expected) > 1e-3
