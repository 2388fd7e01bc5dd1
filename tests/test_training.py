import json
import os
import signal

import numpy as np
import pytest
import torch
from helpers import close, torchrun

import lora
import optim
import training
from command import BadInput


def ranks():
    return training.start("cpu")


def test_each_epoch_takes_every_image_once():
    n, b = 10, 4
    seen = torch.cat([training.batch_indices(n, b, step, seed=3) for step in range(5)])
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()


def test_the_order_of_a_step_depends_on_its_number_and_the_seed_alone():
    forwards = [training.batch_indices(7, 3, step, 0) for step in range(9)]
    backwards = [training.batch_indices(7, 3, step, 0) for step in reversed(range(9))]
    assert all(torch.equal(a, b) for a, b in zip(forwards, reversed(backwards), strict=True))
    assert not torch.equal(training.batch_indices(100, 9, 5, 0), training.batch_indices(100, 9, 5, 1))


def test_seeds_differ_by_step_and_rank_and_repeat():
    draws = {(s, r): torch.randn(3, generator=training.seed_step(0, s, r)) for s in range(2)
             for r in range(2)}
    assert len({tuple(d.tolist()) for d in draws.values()}) == 4
    assert torch.equal(draws[0, 1], torch.randn(3, generator=training.seed_step(0, 0, 1)))


def test_the_rate_warms_up_and_falls_to_zero():
    assert optim.lr_factor(0, 10) == pytest.approx(0.1)
    assert optim.lr_factor(50, 10) == 1.0
    assert optim.lr_factor(100, 10, steps=100) == pytest.approx(0.0)
    assert optim.lr_factor(50, 10, steps=100) == pytest.approx(0.5)


def test_ema_of_constant_weights_is_their_value_and_swap_undoes_itself():
    p = torch.nn.Parameter(torch.zeros(2))
    ema = training.EMA({"p": p}, 0.5)
    p.data.fill_(1.0)
    ema.update()
    torch.testing.assert_close(ema.average["p"],
                               torch.full((2,), 0.9))  # the first decay is 1 / 10, below the given one
    ema.update()
    torch.testing.assert_close(ema.average["p"], torch.full((2,), 1 - 0.1 * 2 / 11))  # the second 2 / 11
    for _ in range(140):
        ema.update()
    torch.testing.assert_close(ema.average["p"], torch.ones(2))
    p.data.fill_(3.0)
    with ema.applied():
        assert p[0].item() == pytest.approx(1.0) and ema.average["p"][0] == 3.0
    assert p[0] == 3.0


def test_a_resumed_log_has_no_doubled_and_no_cut_lines(tmp_path):
    run = training.Run(tmp_path / "run", {"lr": 1}, "data", ranks())
    for step in (1, 2, 3):
        run.log(step=step, loss=0.5)
    p = {"p": torch.nn.Parameter(torch.ones(1))}
    opt = optim.Optimizers(p, 1.0)
    run.save_progress(2, p, opt)
    with open(tmp_path / "run" / "metrics.jsonl", "a") as f:
        f.write('{"step": 4, "lo')  # killed here
    again = training.Run(tmp_path / "run", {"lr": 1}, "data", ranks())
    p["p"].data.fill_(5.0)
    assert again.restore(p, opt) == 2 and p["p"].item() == 1.0
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
        "r = training.start('cpu')\n"
        "p = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2, 2))]\n"
        "p[0].grad = torch.full((3,), float(r.rank))\n"
        "conv = torch.nn.Parameter(torch.zeros(2, 4, 3, 3).to(memory_format=torch.channels_last))\n"
        "conv.grad = torch.arange(72.0).view(2, 4, 3, 3).to(memory_format=torch.channels_last) * r.rank\n"
        "r.average_gradients([*p, conv])\n"
        "assert (p[0].grad == 0.5).all() and (p[1].grad == 0).all()\n"
        "assert torch.equal(conv.grad, torch.arange(72.0).view(2, 4, 3, 3) / 2)\n"
        "assert conv.grad.stride() == conv.stride()\n"
        "loop = training.Loop('two', 0, 9, r)\n"
        "steps = [loop._stop(15, None) if (s, r.rank) == (3, 1) else s for s in loop]\n"
        "assert len(steps) == 4, steps\n"  # one rank was asked to stop: both do, after the same step
        "assert r.mean(float(r.rank)) == 0.5\n"
        "r.barrier()\n")
    torchrun(script)


def test_numpy_is_not_seeded_behind_the_users_back():
    before = np.random.get_state()[1][:3].tolist()
    training.batch_indices(10, 4, 0, 0)
    assert np.random.get_state()[1][:3].tolist() == before


def test_muon_moves_every_direction_of_a_matrix_alike():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 20, 8, generator=g) @ torch.diag(torch.logspace(0, -1.5, 8))
    values = torch.linalg.svdvals(optim.orthogonalise(x))
    assert values.min() > 0.6 and values.max() < 1.3 and torch.linalg.svdvals(x).min() < 0.3
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    nearest = (u @ v).flatten(1)  # the orthogonal factor of the polar decomposition
    assert torch.cosine_similarity(optim.orthogonalise(x).flatten(1), nearest).min() > 0.97


def test_muons_step_has_a_fifth_of_the_learning_rate_whatever_the_gradients_size():
    for shape in ((16, 64), (64, 16), (16, 4, 3, 3)):
        for size in (1e-3, 1e3):
            p = torch.nn.Parameter(torch.zeros(shape))
            p.grad = size * torch.randn(shape, generator=torch.Generator().manual_seed(1))
            optim.Muon([p], lr=0.1).step()
            assert p.square().mean().sqrt().item() == pytest.approx(0.02, rel=0.25)
            assert (p * p.grad).sum() < 0


def attention_with_an_adapter():
    net = torch.nn.ModuleDict({"to_q": torch.nn.Linear(6, 4), "to_v": torch.nn.Linear(6, 4)})
    lora.inject(net, lora.LoRAConfig(rank=2, alpha=2, targets=("to_q", "to_v"), dora=True))
    for p in lora.parameters(net):  # a fresh B is zero, and then A has no gradient
        torch.nn.init.normal_(p)
    return net, lora.tensors(net)


def plain_network():
    net = torch.nn.ModuleDict({"to_q": torch.nn.Linear(6, 4), "to_v": torch.nn.Linear(6, 4)})
    return net, dict(net.named_parameters())


@pytest.mark.parametrize("build", [plain_network, attention_with_an_adapter])
@pytest.mark.parametrize("size", [1e-3, 1e3])
def test_a_step_gets_gradients_of_norm_one_at_most(build, size):
    torch.manual_seed(0)
    (net, params), x = build(), torch.randn(5, 6)

    def loss_fn(batch):
        return size * (net["to_q"](batch.x) * net["to_v"](batch.x)).mean()

    class Optimizer:
        def step(self, factor):
            self.gradients = [p.grad.clone() for p in params.values()]

    raw = torch.autograd.grad(loss_fn(training.Batch(x=x)), list(params.values()))
    norm = torch.cat([g.flatten() for g in raw]).norm()
    assert (norm > 1) == (size > 1) and all(g.any() for g in raw)
    opt = Optimizer()
    _, returned = training.train_step(loss_fn, training.Batch(x=x), 1, params, opt, None, ranks(), 1.0)
    close(returned, norm, 1e-3 * norm.item())
    for clipped, g in zip(opt.gradients, raw, strict=True):
        torch.testing.assert_close(clipped, g / max(1.0, norm.item()))


def test_the_ranks_share_a_batch():
    ranks = [training.Distributed(rank, 3, torch.device("cpu")) for rank in range(3)]
    shares = [ranks[i].batch(50, 4, step=7, seed=1) for i in range(3)]
    assert [len(s) for s in shares] == [4] * 3
    assert torch.equal(torch.cat(shares), training.batch_indices(50, 12, step=7, seed=1))


def test_parts_of_a_batch_make_the_step_of_the_whole():
    def step(parts):
        torch.manual_seed(0)
        net = torch.nn.Linear(3, 2)
        params, g = dict(net.named_parameters()), torch.Generator().manual_seed(1)
        x = torch.randn(10, 3, generator=g)
        opt = optim.Optimizers(params, 0.1)
        batch = training.Batch(x=x, nothing=None, names=list("abcdefghij"))
        loss, norm = training.train_step(lambda b: net(b.x).square().mean(), batch, parts, params, opt, None,
                                         ranks(), 1.0)
        return torch.cat([loss.view(1), norm.view(1), *(p.detach().flatten() for p in params.values())])

    for parts in (2, 3, 4, 10, 99):
        torch.testing.assert_close(step(parts), step(1))
    assert [p.names for p in training.Batch(names=list("abcde"), none=None).chunk(2)] == [["a", "b", "c"],
                                                                                          ["d", "e"]]
