from command import BadInput

import argparse
import json
import math
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ENV, ROOT, close, two_ranks

import lora
import optim
import training


def ranks():
    return training.start("cpu")


class Objective:
    """A loss of a batch on the CPU."""

    def __init__(self, loss):
        self.loss = loss

    def on_device(self, batch):
        return batch


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


def test_the_draws_of_an_image_depend_on_seed_step_and_position_alone():
    def draw(seed, step, positions):
        return [tuple(torch.randn(3, generator=g).tolist()) for g in training.Draws(seed, step, positions)]

    whole = draw(0, 0, range(6))
    assert whole == draw(0, 0, range(2)) + draw(0, 0, range(2, 6))
    assert len({*whole, *draw(0, 1, range(6)), *draw(1, 0, range(6))}) == 18


def test_a_share_of_the_images_is_the_same_in_parts():
    for p in (0.0, 0.3, 0.5, 1.0):
        whole = training.Draws(0, 0, range(20)).share(p)
        assert sum(whole) == 20 * p
        assert whole == [x for i in range(0, 20, 4) for x in training.Draws(0, 0, range(i, i + 4)).share(p)]
    for p in (0.1, 0.3, 0.5):  # in batches that are too small for one of each step
        alone = [training.Draws(0, step, range(2)).share(p) for step in range(100)]
        assert sum(sum(fed) for fed in alone) == 200 * p and {*map(sum, alone)} <= {0, 1}
    batch = training.Batch(x=torch.arange(4), fed=[False, True, False, True]).where_first("fed")
    assert batch.x.tolist() == [1, 3, 0, 2] and batch.fed == [True, True, False, False]


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


@pytest.mark.parametrize("damaged", ['{"step": 1, "lo', '{"loss": 0.5}', '{"step": true}', "[]"])
def test_a_run_does_not_go_on_over_a_log_that_is_damaged(tmp_path, damaged):
    p = {"p": torch.nn.Parameter(torch.ones(1))}
    opt = optim.Optimizers(p, 1.0)
    training.Run(tmp_path, {}, "data", ranks()).save_progress(2, p, opt)
    log = tmp_path / "metrics.jsonl"
    log.write_text(f'{damaged}\n{{"step": 2, "loss": 0.4}}\n')
    text = log.read_text()
    with pytest.raises(BadInput, match="metrics.jsonl, row 1: .*take the line out"):
        training.Run(tmp_path, {}, "data", ranks()).restore(p, opt)
    assert log.read_text() == text


def test_another_end_of_the_falling_rate_is_said(tmp_path, capsys):
    for steps, said in ((5, ""), (5, ""), (9, "falls to zero at step 9 from here on, before at step 5")):
        training.Run(tmp_path, {"cosine": True, "steps": steps}, "data", ranks())
        assert said in (found := capsys.readouterr().err) and bool(found) == bool(said)


def test_other_settings_or_data_on_the_same_folder_are_refused(tmp_path):
    training.Run(tmp_path, {"lr": 1, "steps": 5}, "data", ranks())
    training.Run(tmp_path, {"lr": 1, "steps": 9}, "data", ranks())  # more steps of the same are fine
    with pytest.raises(BadInput, match="lr=1, now lr=2"):
        training.Run(tmp_path, {"lr": 2, "steps": 5}, "data", ranks())
    with pytest.raises(BadInput, match="other data"):
        training.Run(tmp_path, {"lr": 1, "steps": 5}, "changed", ranks())


def test_a_run_that_has_ended_keeps_the_versions_it_was_made_with(tmp_path):
    _, p, opt = saved_run(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"commit": "of then"}))
    for steps, kept in ((2, True), (3, False)):
        assert training.Run(tmp_path, {"lr": 1, "steps": steps}, "data", ranks()).restore(p, opt) == 2
        assert (json.loads(file.read_text())["commit"] == "of then") == kept


def saved_run(folder):
    """A run with a state of step 2 and a checkpoint, and the tensors and optimiser in it."""
    run, p = training.Run(folder, {"lr": 1}, "data", ranks()), {"p": torch.nn.Parameter(torch.ones(2))}
    opt = optim.Optimizers(p, 1.0)
    assert run.restore(p, opt) == 0
    run.log(step=1, loss=0.5)
    run.keep(2, 0.4, lambda name: run.save_checkpoint(name, p, {"kind": "test"}))
    run.save_progress(2, p, opt)
    return run, p, opt


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def test_a_refused_resume_changes_nothing_and_a_broken_checkpoint_is_told(tmp_path, capsys):
    run, p, opt = saved_run(tmp_path)
    run.log(step=2, loss=0.4)

    def resume(steps):
        return training.Run(tmp_path, {"lr": 1, "steps": steps}, "data", ranks()).restore(p, opt)

    before = contents(tmp_path)
    with pytest.raises(BadInput, match="--steps 1: the run in .* is at step 2 already"):
        resume(1)
    assert contents(tmp_path) == before
    (tmp_path / "best.safetensors").write_text("a table")
    assert resume(2) == 2
    assert "best.safetensors: not a whole checkpoint; the next one" in capsys.readouterr().err
    run.state_file.unlink()
    before = contents(tmp_path)
    with pytest.raises(BadInput, match="state.pt: no such file"):
        resume(5)
    assert contents(tmp_path) == before


def test_a_lost_or_broken_state_does_not_begin_anew_over_the_checkpoints(tmp_path):
    run, p, opt = saved_run(tmp_path)
    whole = run.state_file.read_bytes()
    other = {"p": torch.nn.Parameter(torch.ones(3))}
    nan = torch.load(run.state_file, weights_only=True)
    nan["weights"]["p"][0] = torch.nan
    torch.save(nan, tmp_path.parent / "nan.pt")
    not_finite = (tmp_path.parent / "nan.pt").read_bytes()
    for broken in (None, whole[:100], whole[:-1], b"", b"not a state", not_finite):
        run.state_file.unlink(missing_ok=True)
        if broken is not None:
            run.state_file.write_bytes(broken)
        before = contents(tmp_path)
        with pytest.raises(BadInput, match=r"state.pt: n.*best.safetensors, last.safetensors.*another --out"):
            training.Run(tmp_path, {"lr": 1}, "data", ranks()).restore(p, opt)
        assert {**contents(tmp_path), "config.json": 0} == {**before, "config.json": 0}
    run.state_file.write_bytes(whole)
    with pytest.raises(BadInput, match="those of another network"):
        run.restore(other, optim.Optimizers(other, 1.0))
    assert training.Run(tmp_path, {"lr": 1}, "data", ranks()).restore(p, opt) == 2


def test_a_folder_with_other_things_in_it_is_refused_untouched(tmp_path):
    (tmp_path / ".zcompdump-Mac.local-5.9").write_text("mine")
    with pytest.raises(BadInput, match="something else than a training run: .zcompdump"):
        training.Run(tmp_path, {"lr": 1}, "data", ranks())
    assert [p.name for p in tmp_path.iterdir()] == [".zcompdump-Mac.local-5.9"]
    out = tmp_path / "out"
    training.Run(out / "vae", {"lr": 1}, "data", ranks())  # a run may hold another, as of make train-msdm
    training.Run(out, {"lr": 1}, "data", ranks())


def test_only_our_own_unfinished_files_are_removed(tmp_path):
    training.Run(tmp_path, {"lr": 1}, "data", ranks())
    gone = subprocess.Popen(["true"])
    gone.wait()
    ours = [f"{name}.{gone.pid}000001.{end}" for name, end in (
        (".state", "pt"), (".last", "safetensors"), (".latents-0123456789abcdef", "safetensors"),
        (".metrics", "jsonl"), ("samples/.0000012", "png"))]
    mine = [".env.local.orig", f".last.{gone.pid}000001.safetensors.bak", f".notes.{gone.pid}000001.pt",
            ".bash_history.old.bak"]
    for name in ours + mine:
        (tmp_path / name).write_text("x")
    training.Run(tmp_path, {"lr": 1}, "data", ranks())
    left = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")}
    assert left.isdisjoint(ours) and left > set(mine)


def test_a_second_process_in_a_run_folder_is_refused_until_the_first_is_gone(tmp_path):
    script = ("import sys, time, training\n"
              "run = training.Run(sys.argv[1], {'lr': 1}, 'data', training.start('cpu'))\n"
              "print('mine', flush=True)\n"
              "time.sleep(60)\n")
    command = [sys.executable, "-c", script, str(tmp_path)]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENV, cwd=ROOT)
    assert first.stdout.readline() == "mine\n"
    with pytest.raises(BadInput, match=f"another process \\(process {first.pid} on .*\\) trains in it"):
        training.Run(tmp_path, {"lr": 1}, "data", ranks())
    first.kill()
    first.wait()
    training.Run(tmp_path, {"lr": 1}, "data", ranks())


def test_other_numbers_of_processes_keep_the_images_of_a_step(tmp_path, capsys):
    def run(batch_size, size):
        world = training.Distributed(0, size, torch.device("cpu"))
        world.mean = float  # as if the other processes agreed
        return training.Run(tmp_path, {"batch_size": batch_size}, "data", world)

    assert run(8, 2).batch_size == 8
    assert run(8, 1).batch_size == 16
    assert "keeps its 16 images, 16 in each of 1 process" in capsys.readouterr().err
    assert run(8, 4).batch_size == 4 and run(8, 2).batch_size == 8
    assert run(16, 1).batch_size == 16
    for batch_size, size in ((16, 3), (4, 2)):
        with pytest.raises(BadInput, match="batch_size=8, 16 images a step in all, now"):
            run(batch_size, size)


def test_what_is_not_finite_or_does_not_fit_on_the_disk_replaces_nothing(tmp_path, monkeypatch):
    run, p, opt = saved_run(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(BadInput, match="step 4: the validation loss is nan"):
        run.keep(4, math.nan, None)

    def full_disk(state, file):
        file.write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 487040 vs 486928")

    with monkeypatch.context() as patched, pytest.raises(BadInput, match="state.pt: cannot be written"):
        patched.setattr(torch, "save", full_disk)
        run.save_progress(4, p, opt)
    p["p"].data[0] = torch.inf
    with pytest.raises(BadInput, match="p holds numbers that are not finite"):
        run.save_progress(4, p, opt)
    with pytest.raises(BadInput, match="p holds numbers that are not finite"):
        run.save_checkpoint("last", p, {})
    assert contents(tmp_path) == before


def test_the_model_card_keeps_what_its_reader_wrote_and_names_no_path(tmp_path):
    settings = {"data": str(tmp_path / "kvasir"), "lr": 1, "model": "kandinsky-community/kandinsky-3"}
    run = training.Run(tmp_path / "run", settings, "f00d", ranks())
    card = tmp_path / "run/MODEL_CARD.md"
    run.keep(1, 0.5, lambda name: None)
    text = card.read_text()
    assert "trained on kvasir" in text and "Licence of the data: not given" in text and "0.5" in text
    assert str(tmp_path) not in text and "kandinsky-community/kandinsky-3" in text
    card.write_text(text.replace("(not measured yet: metrics.py and judges.py)", "FID 12.5"))
    run.keep(2, 0.25, lambda name: None)
    assert "FID 12.5" in card.read_text() and "Step 2: held-out loss 0.25" in card.read_text()
    card.write_bytes(card.read_bytes() + b"Lizenz: f\xfcr Lehre")
    run.keep(3, 0.25, lambda name: None)
    assert card.read_bytes().endswith(b"Lizenz: f\xfcr Lehre") and b"Step 3" in card.read_bytes()
    card.write_text("my own card")
    run.keep(3, 0.25, lambda name: None)
    assert card.read_text() == "my own card"


@pytest.mark.parametrize("environment", [
    {"WORLD_SIZE": "2"}, {"RANK": "1"}, {"WORLD_SIZE": "2", "RANK": "0"},
    {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"},
    {"WORLD_SIZE": "two", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}])
def test_half_an_environment_of_torchrun_is_one_line(monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadInput, match="start several processes by torchrun, or unset WORLD_SIZE and RANK"):
        training.start("cpu")


@pytest.mark.parametrize("seed", [-1, -2**63, 2**63, 2**64 - 1])
def test_seeds_of_64_bits_and_negative_ones(seed):
    assert sorted(training.batch_indices(5, 5, 0, seed).tolist()) == list(range(5))
    next(iter(training.Draws(seed, 1, range(1))))


@pytest.mark.parametrize(("change", "said"), [
    ({"steps": 0}, "--steps 0"), ({"lr": -1.0}, "--lr -1"), ({"lr": math.nan}, "--lr nan"),
    ({"muon_lr": math.inf}, "--muon-lr inf"), ({"warmup": -1}, "--warmup -1"), ({"p_uncond": 2.0}, "--p-unc"),
    ({"jitter": -0.1}, "--jitter"), ({"p_self_cond": 1.5}, "--p-self-cond"), ({"ema_decay": 2.0}, "--ema-d"),
    ({"lora_dropout": 1.5}, "--lora-dropout"), ({"min_snr_gamma": -1.0}, "--min-snr-gamma -1"),
    ({"epochs": -1.0}, "--epochs -1"), ({"epochs": 0.0}, "--epochs 0"), ({"minutes": -1.0}, "--minutes -1"),
    ({"logit_normal": [0.0, 0.0]}, "--logit-normal 0 0"), ({"logit_normal": [0.0, math.nan]}, "--logit-n"),
    ({"shown": -1}, "--shown -1"), ({"seed": 2**64}, "--seed")])
def test_a_flag_outside_its_range_is_one_line(change, said):
    training.check_flags(argparse.Namespace(lr=1e-3, minutes=None, logit_normal=None, seed=-1))
    with pytest.raises(BadInput, match=said):
        training.check_flags(argparse.Namespace(**change))


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_not_taken(bad):
    p = {"p": torch.nn.Parameter(torch.tensor([0.0, 1.0]))}
    opt, ema = optim.Optimizers(p, 0.1), training.EMA(p, 0.9)

    def loss_fn(batch):
        if bad == "loss":
            return p["p"].sum() + torch.inf
        return p["p"].sqrt().sum()  # a finite loss with an infinite gradient at 0

    step = training.Step(Objective(loss_fn), p, opt, ema, ranks())
    with pytest.raises(BadInput, match=r"step 7: .*rate 0.05 and images a.png, b.png. Nothing of this step"):
        step(training.Batch(x=torch.zeros(2)), 0.5, 7, ["a.png", "b.png", "a.png"])
    assert p["p"].tolist() == [0.0, 1.0] and ema.step == 0 and not opt.parts[0].state


FAILS_ON_ONE = """
import sys, time, torch, training, optim
from command import BadInput
world = training.start("cpu")
started, said = time.monotonic(), []
try:  # one rank cannot read its data
    with world.together():
        if world.rank == 1:
            raise BadInput("my own line")
except BadInput as error:
    said.append(str(error))
run = training.Run(sys.argv[1], {"batch_size": 1}, "data", world)
p = {"p": torch.nn.Parameter(torch.ones(2))}
opt = optim.Optimizers(p, 0.1)
run.restore(p, opt)
class Objective:
    on_device = staticmethod(lambda batch: batch)
    loss = staticmethod(lambda batch: (p["p"].sum() * batch.x).sum())
step = training.Step(Objective, p, opt, None, world)
for value in (1.0, float("nan") if world.rank == 1 else 1.0):  # then one has a loss that is not a number
    try:
        step(training.Batch(x=torch.tensor([value])), 1.0)
    except BadInput as error:
        said.append(str(error))
assert said[0] == ("my own line" if world.rank else "another process of this command stopped; its own line "
                   "says why"), said
assert len(said) == 2 and "the loss is nan" in said[1], said
assert p["p"].isfinite().all() and time.monotonic() - started < 60
p = {"p": torch.nn.Parameter(torch.ones(2))}
step, found = training.Step(Objective, p, optim.Optimizers(p, 0.1), None, world, dtype=torch.float16), []
for value in (float("inf") if world.rank == 1 else 1.0, 1.0):  # then one overflows in float16
    step(training.Batch(x=torch.tensor([value])), 1.0)
    step.settle()
    found.append([*p["p"].tolist(), step.scaler.get_scale()])
assert found[0] == [1, 1, 2**15] and found[1][0] < 1 and found[1][2] == 2**15, found
assert world.mean(found[1][0]) == found[1][0]
"""


def test_what_fails_on_one_rank_ends_all_of_them(tmp_path):
    (tmp_path / "two.py").write_text(FAILS_ON_ONE)
    two_ranks(tmp_path / "two.py", tmp_path / "run")


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


def test_what_is_not_finite_does_not_come_into_the_log(tmp_path):
    class Late:  # as on a GPU, where a step is judged when its loss is read
        def __call__(self, batch, factor, step, names):
            return torch.tensor(math.nan), torch.tensor(math.nan)

        def settle(self):
            raise BadInput("the loss is nan")

    run = training.Run(tmp_path, {"batch_size": 2}, "data", ranks())
    args = argparse.Namespace(seed=0, warmup=0, cosine=False, steps=4, log_every=1, save_every=4)
    with pytest.raises(BadInput, match="nan"):
        training.Loop("late", 0, 4, ranks()).run(Late(), lambda *_: None, list("abcd"), run, args, None)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_one_rank_is_asked_to_stop_and_both_do(tmp_path):
    (tmp_path / "two.py").write_text(
        "import torch, training\n"
        "r = training.start('cpu')\n"
        "loop = training.Loop('two', 0, 9, r)\n"
        "steps = [loop._stop(15, None) if (s, r.rank) == (3, 1) else s for s in loop]\n"
        "assert len(steps) == 4, steps\n"
        "assert r.mean(float(r.rank)) == 0.5 and r.average(torch.tensor(float(r.rank))) == 0.5\n"
        "r.barrier()\n")
    two_ranks(tmp_path / "two.py")


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

        def zero_grad(self, set_to_none):
            pass

    raw = torch.autograd.grad(loss_fn(training.Batch(x=x)), list(params.values()))
    norm = torch.cat([g.flatten() for g in raw]).norm()
    assert (norm > 1) == (size > 1) and all(g.any() for g in raw)
    opt = Optimizer()
    _, returned = training.Step(Objective(loss_fn), params, opt, None, ranks())(training.Batch(x=x), 1.0)
    close(returned, norm, 1e-3 * norm.item())
    for clipped, g in zip(opt.gradients, raw, strict=True):
        torch.testing.assert_close(clipped, g / max(1.0, norm.item()))


def test_the_ranks_share_a_batch():
    ranks = [training.Distributed(rank, 3, torch.device("cpu")) for rank in range(3)]
    shares = [ranks[i].batch(50, 4, step=7, seed=1)[0] for i in range(3)]
    assert [len(s) for s in shares] == [4] * 3
    assert torch.equal(torch.cat(shares), training.batch_indices(50, 12, step=7, seed=1))


def test_a_step_that_cannot_be_recorded_is_taken_without(capsys):
    def unable(part, weight):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    results = []
    for recorded in (None, unable):
        params = {"p": torch.nn.Parameter(torch.arange(4.0))}
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
        objective = Objective(lambda b, p=params["p"]: p.square().sum() * b.x.mean())
        step = training.Step(objective, params, optim.Optimizers(params, 0.1), None, ranks())
        step.recorded = recorded
        loss, norm = step(training.Batch(x=x), 1.0)
        results.append([loss, norm, *(p.detach() for p in params.values())])
    assert all(map(torch.equal, *results))
    assert "cannot be recorded as a CUDA graph (operation not permitted" in capsys.readouterr().err


def test_parts_of_a_batch_make_the_step_of_the_whole():
    def step(parts):
        torch.manual_seed(0)
        net = torch.nn.Linear(3, 2)
        params, g = dict(net.named_parameters()), torch.Generator().manual_seed(1)
        x = torch.randn(10, 3, generator=g)
        opt = optim.Optimizers(params, 0.1)
        batch = training.Batch(x=x, names=list("abcdefghij"))
        objective = Objective(lambda b: net(b.x).square().mean())
        take_step = training.Step(objective, params, opt, None, ranks(), parts)
        loss, norm = take_step(batch, 1.0)
        return torch.cat([loss.view(1), norm.view(1), *(p.detach().flatten() for p in params.values())])

    for parts in (2, 3, 4, 10, 99):
        torch.testing.assert_close(step(parts), step(1))
    assert [p.names for p in training.Batch(names=list("abcde")).chunk(2)] == [["a", "b", "c"],
                                                                                          ["d", "e"]]
