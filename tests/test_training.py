import json
import os
import signal

import numpy as np
import pytest
import torch

import training
from weights import BadInput


def ranks():
    return training.start_ranks("cpu")


def test_each_epoch_shows_every_picture_once():
    n, b = 10, 4
    seen = torch.cat([training.batch_indices(n, b, step, seed=3) for step in range(5)])
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()


def test_the_order_of_a_step_does_not_depend_on_the_steps_before():
    assert torch.equal(training.batch_indices(7, 3, 100, 0), training.batch_indices(7, 3, 100, 0))
    assert not torch.equal(training.batch_indices(100, 9, 5, 0), training.batch_indices(100, 9, 5, 1))


def test_seeds_differ_by_step_and_rank_and_repeat():
    draws = {(s, r): torch.randn(3, generator=training.seed_step(0, s, r)) for s in range(2) for r in range(2)}
    assert len({tuple(d.tolist()) for d in draws.values()}) == 4
    assert torch.equal(draws[0, 1], torch.randn(3, generator=training.seed_step(0, 0, 1)))


def test_the_rate_warms_up_and_falls_to_zero():
    assert training.rate(0, 10) == pytest.approx(0.1)
    assert training.rate(50, 10) == 1.0
    assert training.rate(100, 10, steps=100) == pytest.approx(0.0)
    assert training.rate(50, 10, steps=100) == pytest.approx(0.5)


def test_ema_of_constant_weights_is_their_value_and_swap_undoes_itself():
    p = torch.nn.Parameter(torch.zeros(2))
    ema = training.EMA({"p": p}, 0.5)
    p.data.fill_(1.0)
    for step in range(100, 140):
        ema.update(step)
    torch.testing.assert_close(ema.average["p"], torch.ones(2))
    p.data.fill_(3.0)
    ema.swap()
    assert p[0].item() == pytest.approx(1.0) and ema.average["p"][0] == 3.0
    ema.swap()
    assert p[0] == 3.0


def test_a_resumed_log_has_no_doubled_and_no_cut_lines(tmp_path):
    run = training.Run(tmp_path / "run", {"lr": 1}, "data", ranks())
    for step in (1, 2, 3):
        run.log(step=step, loss=0.5)
    run.save_state({"step": 2})
    with open(tmp_path / "run" / "metrics.jsonl", "a") as f:
        f.write('{"step": 4, "lo')  # killed here
    again = training.Run(tmp_path / "run", {"lr": 1}, "data", ranks())
    assert again.resume() == {"step": 2}
    again.log(step=3, loss=0.4)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3] and lines[-1]["loss"] == 0.4


def test_other_settings_or_data_on_the_same_folder_are_refused(tmp_path):
    training.Run(tmp_path, {"lr": 1, "steps": 5}, "data", ranks())
    training.Run(tmp_path, {"lr": 1, "steps": 9}, "data", ranks())  # more steps of the same are fine
    with pytest.raises(BadInput, match="lr=1, now lr=2"):
        training.Run(tmp_path, {"lr": 2, "steps": 5}, "data", ranks())
    with pytest.raises(BadInput, match="other data"):
        training.Run(tmp_path, {"lr": 1, "steps": 5}, "changed", ranks())


def test_a_signal_ends_the_loop_after_its_step_and_sets_the_exit_status():
    loop, done = training.Loop("test", 0, 100, ranks()), []
    for step in loop:
        done.append(step)
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
    assert done == [0, 1, 2, 3]
    with pytest.raises(SystemExit) as stopped:
        loop.finish()
    assert stopped.value.code == 130


def test_gradients_are_averaged_over_ranks(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(
        "import torch, training\n"
        "r = training.start_ranks('cpu')\n"
        "p = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2, 2))]\n"
        "p[0].grad = torch.full((3,), float(r.rank))\n"
        "conv = torch.nn.Parameter(torch.zeros(2, 4, 3, 3).to(memory_format=torch.channels_last))\n"
        "conv.grad = torch.arange(72.0).view(2, 4, 3, 3).to(memory_format=torch.channels_last) * r.rank\n"
        "r.average_gradients([*p, conv])\n"
        "assert (p[0].grad == 0.5).all() and (p[1].grad == 0).all()\n"
        "assert torch.equal(conv.grad, torch.arange(72.0).view(2, 4, 3, 3) / 2) and conv.grad.stride() == conv.stride()\n"
        "loop = training.Loop('two', 0, 9, r)\n"
        "steps = [loop._stop(15, None) if (s, r.rank) == (3, 1) else s for s in loop]\n"
        "assert len(steps) == 4, steps\n"  # one rank was asked to stop: both do, after the same step
        "assert r.mean(float(r.rank)) == 0.5\n"
        "r.wait()\n")
    import subprocess
    import sys
    from pathlib import Path

    env = os.environ | {"PYTHONPATH": str(Path(training.__file__).parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(script)],
                          env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


def test_numpy_is_not_seeded_behind_the_users_back():
    before = np.random.get_state()[1][:3].tolist()
    training.batch_indices(10, 4, 0, 0)
    assert np.random.get_state()[1][:3].tolist() == before


def test_muon_moves_every_direction_of_a_matrix_alike():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 20, 8, generator=g) @ torch.diag(torch.logspace(0, -1.5, 8))
    values = torch.linalg.svdvals(training.orthogonalise(x))
    assert values.min() > 0.6 and values.max() < 1.3 and torch.linalg.svdvals(x).min() < 0.3
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    nearest = (u @ v).flatten(1)  # the orthogonal factor of the polar decomposition
    assert torch.cosine_similarity(training.orthogonalise(x).flatten(1), nearest).min() > 0.97


def test_muons_step_has_a_fifth_of_the_learning_rate_whatever_the_gradients_size():
    for shape in ((16, 64), (64, 16), (16, 4, 3, 3)):
        for size in (1e-3, 1e3):
            p = torch.nn.Parameter(torch.zeros(shape))
            p.grad = size * torch.randn(shape, generator=torch.Generator().manual_seed(1))
            training.Muon([p], lr=0.1).step()
            assert p.square().mean().sqrt().item() == pytest.approx(0.02, rel=0.25)
            assert (p * p.grad).sum() < 0


def test_the_ranks_share_a_batch():
    ranks = [training.Ranks(rank, 3, torch.device("cpu")) for rank in range(3)]
    shares = [ranks[i].batch(50, 4, step=7, seed=1) for i in range(3)]
    assert [len(s) for s in shares] == [4] * 3
    assert torch.equal(torch.cat(shares), training.batch_indices(50, 12, step=7, seed=1))
