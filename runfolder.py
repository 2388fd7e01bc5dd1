"""The run folder: config.json, metrics.jsonl, samples, checkpoints, the state to resume from, a model card.

A folder belongs to one run and, while that trains, to one process (several under torchrun count as one).
Nothing else is written over and nothing but our own unfinished files is removed; nothing that is not finite
is saved.
"""

from command import BadInput, reason

import contextlib
import errno
import json
import math
import os
import pickle
import platform
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from files import (
    json_line,
    load_metadata,
    read_json,
    read_text,
    remove_unfinished,
    replacing,
    save_safetensors,
    write_json,
)

try:
    import fcntl
except ImportError:  # Windows: run folders are not locked there
    fcntl = None

# The folder

CHECKPOINTS = ("best.safetensors", "last.safetensors", "best", "last", "best-fid.safetensors")


def read_run(folder):
    """config.json of a run folder; None if the folder is absent or empty; BadInput if it is something else.

    Files that a killed start leaves and other runs in folders inside count as nothing.
    """
    folder = Path(folder)
    if not (folder / "config.json").exists():
        found = sorted(folder.iterdir()) if folder.is_dir() else []
        other = [p.name for p in found if not _is_ours(p)]
        if other:
            raise BadInput(f"{folder}: holds something else than a training run: {', '.join(other[:5])}; "
                           "give a new or empty folder")
        return None
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or not {"settings", "data", "versions"} <= config.keys() \
            or not isinstance(config["settings"], dict):
        raise BadInput(f"{folder}: holds something else than a training run; give a new or empty folder")
    if type(total := config.get("images_a_step", 1)) is not int or total < 1:
        raise BadInput(f"{folder}/config.json: images_a_step={total!r:.100}, expected a number of images; "
                       "the file is damaged")
    return config


def _is_ours(path):
    if path.is_dir():
        with contextlib.suppress(BadInput):
            return path.name == "samples" and not any(path.iterdir()) or (
                (path / "config.json").is_file() and read_run(path) is not None)
        return False
    return path.name == ".lock" or re.fullmatch(r"\.config\.\d+\.json", path.name) is not None


class Run:
    """runs/NAME/: config.json, metrics.jsonl, samples/, last and best checkpoints; state.pt to resume from.

    settings must not change between two starts, except those named in FREE; inputs count by their hash, not
    by their path. batch_size counts over all processes: run.batch_size is this process's part. kind: what is
    trained, for the model card. like: the folder of a run that is repeated.
    """

    FREE = ("data", "captions", "paraphrases", "vae", "init", "model", "prior", "cache", "perceptual",
            "text_encoder", "text_device", "steps", "epochs", "minutes", "accumulate", "device", "compile",
            "log_every", "save_every", "shown", "sample_steps", "decoder", "decoder_lora", "select_every",
            "select_images", "select_weights", "classifier")

    def __init__(self, folder, settings: dict, fingerprint: str, world, kind="Model", like=None):
        self.folder, self.world, self.kind, self.best = Path(folder), world, kind, math.inf
        self.state_file = self.folder / "state.pt"
        settings = json.loads(json.dumps(settings, default=str))
        self.batch_size = settings.get("batch_size")
        self.config = {"kind": kind, "settings": settings, "data": fingerprint, "versions": versions(),
                       "commit": git_commit(), "images_a_step": (self.batch_size or 1) * world.size}
        with world.together():
            self.old = read_run(self.folder)
            self._check(self.old)
        with world.together():
            if world.is_main:
                self._claim()
                if like:
                    self._compare(like, read_run(like))

    def _check(self, old):
        """BadInput if the folder's run, of the config old, is another than this one."""
        if old is None:
            return
        was, now = old["settings"], self.config["settings"]
        for key in sorted(was.keys() - {"batch_size", *self.FREE}):  # what it lacks, its version did not know
            if was[key] != now.get(key):
                raise BadInput(f"{self.folder}: this run was started with {key}={was[key]!r}, "
                               f"now {key}={now.get(key)!r}; give another --out")
        if old["data"] != self.config["data"]:
            raise BadInput(f"{self.folder}: this run was started on other data "
                           f"({old['data']}, now {self.config['data']}); give another --out")
        if was.get("cosine") and was.get("steps") != now.get("steps") and self.world.is_main:
            print(f"{self.folder}: the learning rate falls to zero at step {now.get('steps')} from here on, "
                  f"before at step {was.get('steps')}", file=sys.stderr)
        size = self.world.size
        total = old.get("images_a_step", (was.get("batch_size") or 1) * size)
        if total != self.config["images_a_step"]:
            if was.get("batch_size") != self.batch_size or total % size:
                raise BadInput(f"{self.folder}: this run was started with batch_size={was['batch_size']!r}, "
                               f"{total} images a step in all, now batch_size={self.batch_size!r} "
                               f"in {size} process{'es' * (size > 1)}; keep their product (--accumulate: the "
                               "same step with less memory), or give another --out")
            self.batch_size = total // size
            if self.world.is_main:
                print(f"{self.folder}: a step keeps its {total} images, {self.batch_size} in each of {size} "
                      f"process{'es' * (size > 1)}", file=sys.stderr)
            self.config["images_a_step"] = total

    def _claim(self):
        """Lock the folder, write its config.json, remove what a kill left unfinished."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock()
        if self.old is None:  # that of an older run is replaced when its state has been read, see restore
            write_json(self.folder / "config.json", self.config)
        (self.folder / "samples").mkdir(exist_ok=True)
        remove_unfinished(self.folder, "config.json", "metrics.jsonl", "state.pt", "MODEL_CARD.md",
                          "best.safetensors", "last.safetensors", "best-fid.safetensors",
                          "real-*.safetensors", "latents-*.safetensors", "clip-*.safetensors",
                          "t5-*.safetensors", "text-*.safetensors")
        remove_unfinished(self.folder / "samples", "[0-9]*.png")
        for name in ("best", "last"):
            remove_unfinished(self.folder / name, "adapter_*")

    def _lock(self):
        """Hold .lock until this process ends, in whatever way; BadInput if another process holds it."""
        if fcntl is None:
            return
        self.lock = open(self.folder / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 - open as long as we are
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):  # a file system without locks
                print(f"{self.folder}: cannot be locked ({error.strerror}); start no second training in it",
                      file=sys.stderr)
                return
            self.lock.seek(0)
            raise BadInput(f"{self.folder}: another process ({self.lock.read().strip()}) trains in it; wait "
                           "for its end, or give another --out") from None
        self.lock.truncate(0)
        self.lock.write(f"process {os.getpid()} on {platform.node()}\n")
        self.lock.flush()

    def _compare(self, like, old):
        """Tell in one line what differs from the run that is repeated."""
        old, new = ({**c["settings"], **c} for c in (old or {"settings": {}}, self.config))
        keys = [k for k in sorted(new) if k not in {"settings", "commit", *self.FREE}
                and k in old and old[k] != new[k]]
        if keys:
            found = ", ".join(f"{k} was {old[k]!r}, is {new[k]!r}" for k in keys)
            print(f"{self.folder}: differs from {like}: {found}", file=sys.stderr)

    def whole(self):
        """Names of the checkpoints in the folder that can be read."""
        out = []
        for name in CHECKPOINTS:
            path = self.folder / name
            with contextlib.suppress(BadInput, OSError):
                load_metadata(path / "adapter_model.safetensors" if path.is_dir() else path)
                out.append(name)
        return out

    def result(self):
        """The checkpoint to name at the end: best, or last where best is not there any more."""
        return self.folder / next(iter(self.whole()), "")

    def restore(self, weights, opt, ema=None):
        """The step of the saved state, whose weights, averages and optimiser are put back; 0 for a new run.

        weights: tensors by name, filled in place. Lines of metrics.jsonl after that step are dropped, because
        the resumed run writes them again. BadInput if the state is lost or broken: the run would begin anew
        over its checkpoints; and if the log is, which would be written anew without what was in it.
        """
        with self.world.together():
            lines = self.lines()
            if self.state_file.exists():
                step = self._fill(weights, opt, ema)
            elif self.whole() or any(line.get("step") and "val_loss" in line for line in lines):
                raise BadInput(f"{self.state_file}: no such file, without it this run would begin again at "
                               f"step 0{self._way_out()}")
            else:
                step = 0
            settings = self.config["settings"]
            if step > (steps := settings.get("steps") or step):
                epochs = settings.get("epochs")
                flag = f"--steps {steps}" if epochs is None else f"--epochs {epochs:g}, {steps} steps"
                raise BadInput(f"{flag}: the run in {self.folder} is at step {step} already; give more, or "
                               "another --out")
        if self.world.is_main:
            if self.old is None or step < steps:  # a run that has ended keeps the versions it was made with
                write_json(self.folder / "config.json", self.config)
            self._tell_broken()
            kept = [line for line in lines if line["step"] <= step]
            if kept or (self.folder / "metrics.jsonl").exists():
                with replacing(self.folder / "metrics.jsonl") as tmp:
                    tmp.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        if ema:
            ema.step = step
        if not step:  # from here on a missing state is a lost one
            self.save_progress(0, weights, opt, ema)
        return step

    def _tell_broken(self):
        """A line for each checkpoint that is there and cannot be read."""
        for name in CHECKPOINTS:
            if (self.folder / name).exists() and name not in self.whole():
                print(f"{self.folder / name}: not a whole checkpoint; the next one of this run replaces it",
                      file=sys.stderr)

    def _fill(self, weights, opt, ema):
        try:
            state = torch.load(self.state_file, map_location="cpu", weights_only=True)
            step, self.best = int(state["step"]), float(state["best"])
            for own, saved in ((weights, state["weights"]), (ema.average if ema else {}, state["ema"] or {})):
                if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in saved.items()}:
                    raise ValueError("the tensors are those of another network")
                if not all(v.isfinite().all() for v in saved.values()):
                    raise ValueError("its weights are not finite")
                for k, tensor in own.items():
                    tensor.data.copy_(saved[k])
            opt.load_state_dict(state["optimiser"])
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError,
                AttributeError, OSError) as error:
            raise BadInput(f"{self.state_file}: not a whole state of this run ({reason(error):.100})"
                           f"{self._way_out()}") from None
        return step

    def _way_out(self):
        whole = self.whole()
        left = f" Still whole: {', '.join(whole)}." if whole else ""
        return f".{left} Put state.pt back from a copy, or leave this folder as it is and give another --out"

    def save_progress(self, step, weights, opt, ema=None):
        """What restore puts back."""
        if not self.world.is_main:
            return
        check_savable(f"{self.state_file}, step {step}", weights)
        state = {"step": step, "best": self.best, "optimiser": opt.state_dict(), "ema": ema and ema.average,
                 "weights": {k: tensor.detach() for k, tensor in weights.items()}}
        with replacing(self.state_file) as tmp:
            try:
                torch.save(state, tmp)
            except RuntimeError as error:
                if "inline_container" not in str(error):    # torch's file writer, where the disk is full
                    raise
                raise BadInput(f"{self.state_file}: cannot be written, is the disk full? "
                               f"({reason(error):.100})") from None

    def keep(self, step, val_loss, save, **values):
        """Log a validation; save("last"), and save("best") if its loss is the lowest so far. Rank 0 saves."""
        if not math.isfinite(self.world.mean(val_loss)):
            raise BadInput(f"step {step}: the validation loss is {val_loss:g}. Nothing was saved, what was "
                           "saved before is whole; give a lower --lr or a longer --warmup, and another --out")
        self.log(step=step, val_loss=val_loss, **values)
        is_best = val_loss < self.best
        self.best = min(self.best, val_loss)
        if self.world.is_main:
            for name in ["best"] * is_best + ["last"]:
                save(name)
            write_card(self, step, val_loss)

    def save_checkpoint(self, name, tensors, metadata):
        check_savable(self.folder / name, tensors)
        save_safetensors(self.folder / f"{name}.safetensors", tensors, metadata)

    def sheet(self, step):
        """Path of the sample sheet of a step."""
        return self.folder / "samples" / f"{step:07d}.png"

    def log(self, **values):
        """One line of metrics.jsonl; values are numbers."""
        if self.world.is_main:
            line = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in values.items()}
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as f:
                f.write(json.dumps(line) + "\n")

    def lines(self):
        """The lines of metrics.jsonl as dicts, see read_log."""
        return read_log(self.folder)[0]


def read_log(folder):
    """(the lines of metrics.jsonl in a run folder, unfinished): dicts, each with its "step", from 0.

    unfinished: the number of a last line that a kill left unfinished, which is left out; else None. No file
    is no line. BadInput for any other line that is damaged.
    """
    path, lines = Path(folder) / "metrics.jsonl", []
    rows = read_text(path).split("\n") if path.exists() else []
    for i, text in enumerate(rows, 1):
        if not text.strip():
            continue
        way_out = "; take the line out, or put the file back from a copy"
        try:
            line = json_line(path, i, text)
        except BadInput as error:
            if i == len(rows):  # without a line break: it was being written
                return lines, i
            raise BadInput(f"{error}{way_out}") from None
        step = line.get("step") if isinstance(line, dict) else None
        if type(step) is not int or not 0 <= step < 2**63:
            expected = '{"step": 50, "loss": 0.5, ...}'
            raise BadInput(f"{path}, row {i}: expected {expected}, got {text[:80]}{way_out}")
        lines.append(line)
    return lines, None


def check_savable(what, tensors):
    """BadInput if one of the tensors of a dict holds a number that is not finite."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise BadInput(f"{what}: {name} holds numbers that are not finite; it is not saved")


def versions():
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}


def git_commit():
    try:
        here = Path(__file__).resolve().parent
        out = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True,
                             timeout=10)
        return out.stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


# The model card

CARD_END = "<!-- A later checkpoint rewrites what stands above this line, and nothing below it. -->"
CARD = f"""{CARD_END}

## Data and licence

Licence of the data: not given. Licence of the weights: not given.

## Intended use and limits

For research and teaching. Not a medical device: its images are no findings of a patient, and no diagnosis,
no treatment and no judgement of one may rest on them. It repeats what is rare or wrong in its training
data, an image may not show what its prompt says, and it may come close to an image that it was trained on.

## Metrics

(not measured yet: metrics.py and judges.py)

## Memorisation

(not measured yet: judges.py memorisation)
"""


def write_card(run, step, val_loss):
    """MODEL_CARD.md of a run: what it was trained on and how, without the paths of this machine.

    The part below CARD_END is for the reader to fill; a file without that line is left alone. Bytes that are
    no UTF-8 stay what they are, in a reader's text and in names.
    """
    path, settings = run.folder / "MODEL_CARD.md", run.config["settings"]
    old = path.read_text(encoding="utf-8", errors="surrogateescape") if path.exists() else CARD
    if CARD_END not in old:
        return

    def shown(value):  # folders and files by their names alone; names on the hub whole
        is_path = isinstance(value, str) and "/" in value and (value[0] in "/~." or Path(value).exists())
        return Path(value).resolve().name if is_path else value

    rows = [(k, shown(v)) for k, v in sorted(settings.items()) if v is not None]
    rows += [(f"version of {k}", v) for k, v in run.config["versions"].items()]
    table = "".join(f"| {k} | {v} |\n" for k, v in rows)
    head = f"""# {run.kind}, trained on {Path(settings.get("data", "")).resolve().name}

Step {step}: held-out loss {val_loss:.6g}, the lowest so far {run.best:.6g}. The held-out images are a tenth
of the data; the loss compares checkpoints of this run, not models.

| setting | value |
|---|---|
| fingerprint of the data | {run.config["data"]} |
| images a step | {run.config["images_a_step"]} |
{table}
"""
    with replacing(path) as tmp:
        tmp.write_text(head + old[old.index(CARD_END):], encoding="utf-8", errors="surrogateescape")
