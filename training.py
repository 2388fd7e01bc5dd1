"""What the training scripts share: processes and device, seeds, EMA, the step, the loop, flags.

All randomness of step n comes from (seed, n, position in the batch) and the data order from (seed, epoch): a
batch is the same in any number of processes. Dropout alone comes from (seed, n, rank). So the state of a run
is its weights, its optimiser and its step, and a run killed at any moment and resumed ends with the same
weights, bit for bit on a CPU, as one that was never killed. A run stopped by Ctrl-C or --minutes also
validates where it stops. Nothing that is not finite is ever saved.
loss scaling  arXiv:1710.03740  Sec. 3.2, in float16, by torch.amp.GradScaler
EMA  arXiv:2006.11239  App. B (decay 0.9999); the warm-up min(decay, (1 + n) / (10 + n)) is TensorFlow's
"""

from command import BadInput, at_least_one, best_device, check_range, reason, to_device, training_dtype

import argparse
import atexit
import contextlib
import functools
import gc
import hashlib
import math
import os
import signal
import sys
import time
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

import data
from optim import lr_factor
from recorded import Recorded
from runfolder import Run, read_run

# Processes


@dataclass
class Distributed:
    """One process a GPU, started by torchrun; a plain start is rank 0 of 1."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self):
        return self.rank == 0

    @property
    def is_first_here(self):
        """Whether it is the first rank of its machine."""
        return processes()[2] == 0

    def average(self, x):
        """The mean over the ranks of a scalar tensor without gradient; all must call it."""
        if self.size > 1:
            x = x.clone()
            dist.all_reduce(x)
            x /= self.size
        return x

    def mean(self, value: float):
        """The mean of a number over the ranks, on every rank; all must call it."""
        if self.size == 1:
            return value
        x = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(x)
        return x.item() / self.size

    def share(self, items):
        """This rank's part of a list: the parts follow each other and differ in length by 1 at most.

        Rank 0 has an item if any rank has.
        """
        first, last = (-(-len(items) * rank // self.size) for rank in (self.rank, self.rank + 1))
        return items[first:last]

    def gather(self, value):
        """The values of all ranks on rank 0, in order; an empty list elsewhere. All must call it."""
        if self.size == 1:
            return [value]
        values = [None] * self.size if self.is_main else None
        dist.gather_object(value, values)
        return values or []

    def batch(self, n, batch_size, step, seed):
        """This rank's part of a step's batch: its (batch_size,) indices below n, and its Draws."""
        part = range(self.rank * batch_size, (self.rank + 1) * batch_size)
        indices = batch_indices(n, batch_size * self.size, step, seed)[part.start:part.stop]
        return indices, Draws(seed, step, part)

    def barrier(self):
        if self.size > 1:
            dist.barrier()

    @contextlib.contextmanager
    def together(self):
        """`with world.together():` ends on all ranks at once: if it fails on one, no other waits for it.

        All ranks must enter it, and no collective may stand inside.
        """
        error = None
        try:
            yield
        except (BadInput, OSError) as raised:
            error = raised
        failed = self.mean(float(error is not None)) > 0
        if error is not None:
            raise error
        if failed:
            raise BadInput("another process of this command stopped; its own line says why")

    def main_first(self, function):
        """function() on every rank, on rank 0 before the others: they find in files what it has kept there.

        The first rank of each other machine comes second: its disk may be another. It ends on all ranks at
        once, as together.
        """
        own = 0 if self.is_main else 1 if self.is_first_here else 2
        for turn in range(3):
            with self.together():
                if turn == own:
                    out = function()
        return out


def own_device(name="auto"):
    """command.best_device; of several processes on a machine each has a GPU of its own."""
    size, _, local_rank = processes()
    if size == 1 or name not in ("auto", "cuda") or not torch.cuda.is_available():
        return best_device(name)
    device = best_device(f"cuda:{local_rank}")
    torch.cuda.set_device(device)
    return device


def start(device="auto"):
    """The Distributed of this process. All ranks build equal weights from one seed."""
    size, rank, _ = processes()
    device = own_device(device)
    if size > 1:
        try:  # five minutes for the others to appear; later one may encode images for hours while they wait
            store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(minutes=5)))
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank,
                                    world_size=size, timeout=timedelta(hours=24))
        except (dist.DistStoreError, dist.DistNetworkError) as error:
            raise BadInput(f"WORLD_SIZE={size}: the processes did not find each other ({reason(error)}); "
                           "start them by torchrun, or unset WORLD_SIZE and RANK for one process") from None
        atexit.register(dist.destroy_process_group)  # an exit with an open group may abort other ranks
    return Distributed(rank, size, device)


def processes():
    """(number of processes, rank, rank on this machine) as torchrun says them; (1, 0, 0) without it."""
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    given = {name: os.environ[name] for name in names if os.environ.get(name)}
    if "RANK" not in given and given.get("WORLD_SIZE", "1") == "1":
        return 1, 0, 0
    out = "; start several processes by torchrun, or unset WORLD_SIZE and RANK for one process"
    if missing := [name for name in names if name not in given and name != "LOCAL_RANK"]:
        found = ", ".join(f"{k}={v}" for k, v in given.items())
        raise BadInput(f"{found} in the environment, but no {' and no '.join(missing)}{out}")
    numbers = [given["WORLD_SIZE"], given["RANK"], given.get("LOCAL_RANK", given["RANK"])]
    if not all(n.isdecimal() for n in numbers) or not int(numbers[1]) < int(numbers[0]):
        raise BadInput(f"WORLD_SIZE={numbers[0]}, RANK={numbers[1]}, LOCAL_RANK={numbers[2]} in the "
                       f"environment: expected whole numbers, each rank below the size{out}")
    return tuple(int(n) for n in numbers)


def autocast(device, dtype=None):
    """Mixed precision in a dtype: bfloat16 or float16; float32 is none. None: that of training_dtype.

    Casts are not cached: one made in self-conditioning's pass without gradient would be reused in the next.
    """
    dtype = dtype or training_dtype(device)
    enabled = dtype != torch.float32  # which torch.autocast does not take
    return torch.autocast(device.type, dtype if enabled else None, enabled=enabled, cache_enabled=False)


# Seeds and order


def step_seed(*key):
    """A 63-bit seed for torch from integers and strings."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


class Draws:
    """The random numbers of a batch: iterating gives a CPU generator for each of its images, in order.

    positions: of the images in the batch of all processes.
    """

    def __init__(self, seed, step, positions):
        self.seed, self.step, self.positions = seed, step, positions

    def __iter__(self):
        return (torch.Generator().manual_seed(step_seed(self.seed, self.step, i)) for i in self.positions)

    def share(self, p):
        """A share p of the images, true or false for each: every second one for p = 0.5.

        The steps take turns, so that batches smaller than 1 / p have their share over many steps.
        """
        turn = self.step * p % 1 + 1e-9  # a little more, against the rounding of products such as 10 * 0.3
        return [int((i + 1) * p + turn) > int(i * p + turn) for i in self.positions]


def batch_indices(n, batch_size, step, seed):
    """The batch of a step: (batch_size,) indices below n, epoch after epoch, each epoch in its own order."""
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    out = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(positions // n):
        here = positions // n == epoch
        out[here] = epoch_order(n, int(epoch), seed)[positions[here] % n]
    return torch.from_numpy(out)


@functools.lru_cache(maxsize=2)
def epoch_order(n, epoch, seed):
    """A permutation of range(n); that of 100,000 images takes a millisecond, each step reads of it."""
    return np.random.default_rng([seed % 2**64, epoch]).permutation(n)  # numpy's seeds are from 0


# One step


class Batch:
    """Everything random of a step, by name: tensors or lists of one length.

    It is drawn for the whole batch and then cut into parts, so the parts equal the whole.
    """

    def __init__(self, **fields):
        vars(self).update(fields)

    def __len__(self):
        return len(next(iter(vars(self).values())))

    def __getitem__(self, part):
        return Batch(**{k: v[part] for k, v in vars(self).items()})

    def where_first(self, name):
        """The same with the rows first in which the field, a list, is true."""
        field = getattr(self, name)
        order = sorted(range(len(field)), key=lambda i: not field[i])
        return Batch(**{k: v[order] if isinstance(v, torch.Tensor) else [v[i] for i in order]
                        for k, v in vars(self).items()})

    def to(self, device):
        """Its tensors on a device, copied without waiting for a GPU."""
        return Batch(**{k: to_device(v, device) if isinstance(v, torch.Tensor) else v
                        for k, v in vars(self).items()})

    def chunk(self, n):
        """At most n parts of equal length, the last one perhaps shorter."""
        return [self[part] for part in data.batches(len(self), math.ceil(len(self) / n))]


class Loss(nn.Module):
    """An objective as a module whose forward is the loss; params: those that are trained, by name."""

    def __init__(self, objective, params: dict):
        super().__init__()
        self.objective, self.params = objective, nn.ParameterList(params.values())

    def forward(self, batch):
        return self.objective.loss(batch)


class Step:
    """step(batch, factor): one step of the optimiser on the mean of a loss over the parts of a batch.

    objective: on_device(part of a batch) and loss(what that returns) -> a scalar. params: by name; ema: or
    None; accumulate: number of parts; record: on a GPU, run loss and gradient as a CUDA graph. Gradients are
    averaged over the ranks and clipped to norm 1. A loss or gradient that is not finite is BadInput on all
    ranks: on a CPU before the step, on a GPU, which no step waits for, one step later. settle() must come
    before anything is saved.

    dtype: that the objective computes in; None: autocast's. In float16 the loss is scaled, so that small
    gradients do not become 0. A step that overflows is left out, by optimisers and average, on all ranks, and
    halves the scale; it is BadInput once that is below 1. So the weights may only change when loss and norm
    are read, in the next call or settle(): meanwhile the next batch is drawn, and a GPU computes.
    """

    def __init__(self, objective, params: dict, opt, ema, world, accumulate=1, record=True, dtype=None):
        self.objective, self.params, self.opt, self.ema, self.world = objective, params, opt, ema, world
        self.accumulate, self.unread = accumulate, None
        torch.backends.cudnn.benchmark = True  # the shapes repeat: let cuDNN try its algorithms
        record = record and world.device.type == "cuda" and world.size == 1
        scales = (dtype or training_dtype(world.device)) == torch.float16
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=scales)  # does nothing if not enabled
        self.recorded = Recorded(objective, params.values(), self.scaler) if record else None
        self.loss = Loss(objective, params)
        if world.size > 1:
            self.loss = nn.parallel.DistributedDataParallel(self.loss)
            atexit.register(self._leave)  # runs before start's destroy_process_group

    def _leave(self):
        """Let go of the process group, whose threads must end before Python does: else they may abort it."""
        self.loss = None
        gc.collect()  # it lies in cycles

    def backward(self, part, weight, is_last):
        """weight times the loss of a part of a batch, without gradient; adds to the gradients.

        With the last part the ranks average their gradients.
        """
        part = self.objective.on_device(part)
        if self.recorded is not None:
            try:
                return self.recorded(part, weight)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                print(f"the step cannot be recorded as a CUDA graph ({reason(error)}): it runs without, more "
                      "slowly", file=sys.stderr)
                self.recorded = None
        with contextlib.nullcontext() if is_last or self.world.size == 1 else self.loss.no_sync():
            loss = weight * self.loss(part)
            self.scaler.scale(loss).backward()
        return loss.detach()

    def __call__(self, batch, factor, step=1, names=()):
        """(loss of this rank's part of the batch, a tensor without gradient, and the norm before clipping).

        factor: of the learning rates; step and names of the batch's images are for the message of BadInput.
        """
        scales = self.scaler.is_enabled()
        if scales:
            self.settle()
        parts = batch.chunk(self.accumulate)
        total = sum(self.backward(part, len(part) / len(batch), part is parts[-1]) for part in parts)
        mean = self.world.average(total)
        if scales:
            self._unscale(mean)
        norm = nn.utils.clip_grad_norm_(self.params.values(), 1.0)
        self.settle()
        self.unread = self._copy(torch.stack([mean.to(norm), norm])), step, factor, names
        if not scales:
            if norm.device.type == "cpu":
                self.settle()
            self._take(factor)
        return total, norm

    def _unscale(self, loss):
        """Divide the gradients by the scale; the scaler notes whether they, or the loss, are not finite."""
        grad = next(p.grad for p in self.params.values() if p.grad is not None)
        grad.add_(0 * loss)  # 0 or NaN: that of an infinite loss may be finite, as an absolute error's is
        self.scaler.unscale_(self.opt)

    def _take(self, factor, finite=True):
        """One step of the optimisers and the average."""
        self.scaler.step(self.opt, factor)  # leaves out what is not finite
        self.scaler.update()
        self.opt.zero_grad(set_to_none=self.recorded is None)  # a recorded graph adds to these very tensors
        if self.ema is not None:
            self.ema.update(finite)

    def _copy(self, found):
        """A function that waits for a tensor on its way to the CPU and returns its values."""
        if found.device.type == "cpu":
            return found.tolist
        on_cpu, there = torch.empty(found.shape, pin_memory=True), torch.cuda.Event()
        on_cpu.copy_(found, non_blocking=True)
        there.record()
        return lambda: there.synchronize() or on_cpu.tolist()

    def settle(self):
        """BadInput if loss or norm of the last step that was not read yet are not finite.

        In float16 this takes the last step, or leaves it out.
        """
        if self.unread is None:
            return
        (read, step, factor, names), self.unread = self.unread, None
        loss, norm = read()
        finite = math.isfinite(loss) and math.isfinite(norm)
        if self.scaler.is_enabled():
            self._take(factor, finite)
            if not finite and (scale := self.scaler.get_scale()) >= 1:
                if self.world.is_main:
                    tqdm.write(f"step {step}: it overflows in float16 and is left out; from here on the loss "
                               f"is scaled by {scale:g}", file=sys.stderr)
                return
        if finite:
            return
        names = list(dict.fromkeys(names))
        shown = ", ".join(names[:12]) + f" and {len(names) - 12} more" * (len(names) > 12)
        rate = factor * self.opt.parts[0].defaults["lr"]
        raise BadInput(f"step {step}: the loss is {loss:g} and the norm of its gradient {norm:g}, with "
                       f"learning rate {rate:g} and images {shown}. Nothing of this step was saved, what was "
                       "saved before is whole; give a lower --lr or a longer --warmup, and another --out")

    def state_dict(self):
        """States of the optimisers and, where there is one, of the scale: a list."""
        return [*self.opt.state_dict(), *([self.scaler.state_dict()] if self.scaler.is_enabled() else [])]

    def load_state_dict(self, states):
        """Put them back; a run may go on with or without a scale on another device."""
        self.opt.load_state_dict([state for state in states if "scale" not in state])
        for state in states:
            if "scale" in state:
                self.scaler.load_state_dict(state)


def fixed_noise(n, shape, T):
    """(t (n,), eps (n, *shape)) of every validation, fixed so that steps compare; t is spread over [0, T)."""
    g = torch.Generator().manual_seed(0)
    t = (torch.arange(n) * T // n)[torch.randperm(n, generator=g)]
    return t, torch.randn(n, *shape, generator=g)


@torch.no_grad()
def validate(objective, held_out, batch_size, world):
    """The means of an objective's loss over held-out batches, both by name; the ranks share their parts."""
    losses = {}
    for name, batch in held_out.items():
        parts = [batch[part] for part in data.batches(len(batch), batch_size)[world.rank::world.size]]
        total = sum(objective.loss(objective.on_device(part)).item() * len(part) for part in parts)
        losses[name] = world.size * world.mean(total) / len(batch)
    return losses


class EMA:
    """Exponential moving average of named parameters: average <- decay average + (1 - decay) value."""

    def __init__(self, params: dict, decay):
        self.decay, self.params, self.step = decay, params, 0
        self.average = {k: p.detach().clone() for k, p in params.items()}

    @torch.no_grad()
    def update(self, taken=True):
        """taken: False for a step that was left out, which only counts."""
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        values = [p.detach() for p in self.params.values()]
        if taken:
            torch._foreach_lerp_(list(self.average.values()), values, 1 - decay)
        self.step += 1

    @contextlib.contextmanager
    def applied(self):
        """Inside `with ema.applied():` the network holds the average."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self):
        for k, p in self.params.items():
            p.data, self.average[k] = self.average[k], p.data


# The loop


class Loop:
    """run(...) takes the steps of a training; `for step in Loop(...)` counts them, with a progress bar.

    Both end early, between two steps and on all ranks at once, after SIGINT (Ctrl-C), SIGTERM or `minutes`.
    """

    def __init__(self, name, start, steps, world, minutes=None):
        self.bar = tqdm(total=steps, initial=min(start, steps), desc=name, unit="step", dynamic_ncols=True,
                        disable=not world.is_main, mininterval=1.0 if sys.stderr.isatty() else 30.0)
        self.start, self.steps, self.world = start, steps, world
        self.deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self.stopped_by, self.decided, self.ends = None, None, False

    def __iter__(self):
        old = {s: signal.signal(s, self._stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            for step in range(self.start, self.steps):
                yield step
                self.bar.update()
                if self.last(step):
                    break
        finally:
            self.bar.close()
            for s, handler in old.items():
                signal.signal(s, handler)

    def run(self, take_step, draw_batch, names, run: Run, args, checkpoint):
        """All steps, then finish().

        take_step: a Step. draw_batch(indices, draws) -> Batch, indices below the number of names, which are
        of the training images; checkpoint(number of steps taken) validates and saves.
        """
        for step in self:
            torch.manual_seed(step_seed("dropout", args.seed, step, self.world.rank))
            indices, draws = self.world.batch(len(names), run.batch_size, step, args.seed)
            factor = lr_factor(step, args.warmup, args.steps if args.cosine else None)
            loss, norm = take_step(draw_batch(indices, draws), factor, step + 1, [names[i] for i in indices])
            if (step + 1) % args.log_every == 0:
                take_step.settle()  # NaN ends the run, also in its log
                self.log(run, step + 1, loss, grad_norm=norm.item(), lr=factor * args.lr)
            if (step + 1) % args.save_every == 0 or self.last(step):
                checkpoint(step + 1)
        self.finish()

    def _stop(self, signum, frame):
        self.stopped_by = signum

    def last(self, step):
        """True in the last step of this process: time to save.

        The first call of a step decides for the step, in a collective that every rank must enter.
        """
        if step != self.decided:
            stop = self.stopped_by is not None or time.monotonic() > self.deadline
            self.decided, self.ends = step, self.world.mean(float(stop)) > 0 or step + 1 >= self.steps
        return self.ends

    def log(self, run: Run, step, loss, **values):
        """A line of metrics.jsonl, and the loss next to the progress bar."""
        loss = self.world.mean(loss.item())
        finite = {k: v for k, v in {"loss": loss, **values}.items() if math.isfinite(v)}
        run.log(step=step, **finite)  # a step that float16 left out lacks one or both
        self.bar.set_postfix(loss=f"{loss:.4f}", refresh=False)

    def finish(self):
        """Call it after everything is saved: a run stopped by a signal exits with that signal's status."""
        if self.stopped_by is not None:
            print("stopped and saved; the same command goes on from here", file=sys.stderr)
            sys.exit(128 + self.stopped_by)


# Flags


def add_flags(parser, presets):
    """Add the flags of every training script; returns flag(name, help, ...), which adds one with presets.

    presets: {name: {flag: value}}, the values of flags that are not given (fill_defaults).
    """
    parser.allow_abbrev = False  # repeated() looks for --from-run as it is written

    def flag(name, text, **settings):
        values = {preset: settings_of[name] for preset, settings_of in presets.items() if name in settings_of}
        same = len({str(v) for v in values.values()}) == 1
        default = next(iter(values.values())) if same else ", ".join(f"{p} {v}" for p, v in values.items())
        parser.add_argument(f"--{name.replace('_', '-')}", default=argparse.SUPPRESS,
                            help=f"{text} ({default})", **settings)

    parser.add_argument("--from-run", metavar="RUN",
                        help="run folder to repeat: flags that are not given come from its config.json")
    parser.add_argument("--data", required=True, help="data folder")
    parser.add_argument("--captions", help="captions file, when it is not the folder's own")
    parser.add_argument("--out", required=True, help="run folder; an existing run is resumed")
    flag("steps", "optimiser steps in all", type=int)
    flag("batch_size", "images a step and process", type=int)
    flag("lr", "learning rate after the warm-up", type=float)
    flag("warmup", "steps in which the learning rate rises to its value", type=int)
    flag("cosine", "let the learning rate fall to zero by half a cosine",
         action=argparse.BooleanOptionalAction)
    parser.add_argument("--accumulate", type=int, default=1,
                        help="parts in which a batch passes through the network")
    parser.add_argument("--minutes", type=float,
                        help="stop cleanly after this many minutes; the same command resumes")
    parser.add_argument("--seed", type=int, default=2204, help="of weights, order, noise; 64 bits")
    parser.add_argument("--device", default="auto",
                        help="cpu (computes in float32), cuda (bfloat16; float16 and a scaled loss on a GPU "
                             "without it), or auto")
    parser.add_argument("--log-every", type=int, default=50, help="steps between lines of metrics.jsonl")
    parser.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
    return flag


def repeated(parser, argv, kind):
    """The command line argv (None: this process's) after the words that --from-run's run stands for.

    parser: of the command; kind: what its runs are called. Settings that are no flags are left out."""
    argv = sys.argv[1:] if argv is None else list(argv)
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--from-run")
    folder = own.parse_known_args(argv)[0].from_run
    if folder is None:
        return argv
    if (config := read_run(folder)) is None:
        raise BadInput(f"--from-run {folder}: no config.json, expected the folder of a training run")
    if not str(was := config.get("kind", kind)).startswith(kind):       # an older run does not say it
        raise BadInput(f"--from-run {folder}: a training of {was!r:.60}, expected one of {kind!r}")
    words, settings = [], dict(config["settings"])
    if settings.get("epochs") is not None:  # the steps of the run are computed of them
        settings.pop("epochs" if any(word.partition("=")[0] == "--steps" for word in argv) else "steps")
    for action in parser._actions:  # argparse has no public list of its flags
        value = settings.get(action.dest)
        if value is None or not action.option_strings:
            continue
        flag = action.option_strings[0]
        if isinstance(value, bool):
            words += [flag] if value else [w for w in action.option_strings if w.startswith("--no-")]
        elif isinstance(value, list):
            words += [flag, *map(str, value)]
        else:
            words.append(f"{flag}={str(value).removeprefix('torch.')}")
    return [*words, *argv]


def settings_of(args):
    """The flags of a command by name: what config.json keeps of them."""
    return {k: v for k, v in vars(args).items() if k not in ("out", "from_run")}


def check_flags(args):
    """BadInput for values outside of their range, before anything is read. Absent flags pass."""
    def present(*names):
        return [name for name in names if name in args]

    at_least_one(args, *present("steps", "batch_size", "accumulate", "log_every", "save_every", "views",
                                "join", "sample_steps"))
    check_range(args, 0, 1, *present("p_uncond", "p_self_cond", "jitter", "dropout", "ema_decay",
                                     "lora_dropout"))
    check_range(args, 0, math.inf, *present("lr", "muon_lr", "warmup", "minutes", "shown", "min_snr_gamma",
                                            "l1_weight", "kl_weight", "half_weight"))
    check_range(args, -2**63, 2**64 - 1, *present("seed"))
    mean, deviation = getattr(args, "logit_normal", None) or (0, 1)
    if not (math.isfinite(mean) and 0 < deviation < math.inf):
        raise BadInput(f"--logit-normal {mean:g} {deviation:g}: expected a number and a deviation above 0")
    epochs = getattr(args, "epochs", None)
    if epochs is not None and not 0 < epochs < math.inf:
        raise BadInput(f"--epochs {epochs:g}: expected a number above 0")


def fill_defaults(args, settings: dict):
    """The values of flags that were not given."""
    for name, value in settings.items():
        if name not in args:
            setattr(args, name, value)


def read_data(args, world):
    """(records to train on, records to validate on, fingerprint) of --data.

    Rank 0 compares the images, the others read what it has kept of them (duplicates.seen).
    """
    def read():
        records = data.read_folder(args.data, args.captions)
        train, val = data.split(records)
        if not val:
            raise BadInput(f"{args.data}: one image, expected at least 2: one to learn from, one to check")
        return train, val, data.fingerprint(records)

    return world.main_first(read)
