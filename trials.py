"""What experiments of several commands share: their processes, the space of their metrics, their tables.

An experiment is a folder of cells. A cell runs the commands of the README one after the other, each of which
goes on where it was, and ends with result.json; a cell that has this file costs nothing more. Tables are made
of these files alone, so a table that is not complete yet holds what is there.
"""

from command import BadInput

import contextlib
import ctypes
import io
import math
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import scipy.stats
import torch

import data
import duplicates
import inception
import metrics
import spaces
from files import create_json, read_json, remove_unfinished, replacing, write_json
from runfolder import read_log
from tables import is_number

HERE = Path(__file__).resolve().parent

# Commands


def run(script, *flags, processes=1):
    """Run a command of this folder to its end, by torchrun if in several processes; BadInput if it fails.

    The command has then said why in its own lines. SIGTERM is passed on: a training saves and stops.
    """
    words = [str(HERE / script), *map(str, flags)]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    launcher *= processes > 1
    print(f"\n$ {shlex.join(['python', *launcher, script, *words[1:]])}", file=sys.stderr, flush=True)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    child = subprocess.Popen([sys.executable, *launcher, *words], preexec_fn=ends_with_parent())
    try:
        status = child.wait()
    except BaseException:  # SIGTERM reached this process alone; after Ctrl-C, which reached both, no harm
        child.terminate()
        child.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if status == 130:
        raise KeyboardInterrupt
    if status:
        ended = (f"was killed by signal {-status}" if status < 0
                 else f"ended with status {status}, its own lines say why")
        raise BadInput(f"{script} {ended}; what is done is kept, and the same command goes on there")


def ends_with_parent():
    """A call for a child before it begins: that it is stopped by SIGTERM when this process is killed, where
    it would go on alone and keep its folder from the next start. None where there is no such call (prctl)."""
    if sys.platform != "linux":
        return None
    prctl, PR_SET_PDEATHSIG, parent = ctypes.CDLL(None).prctl, 1, os.getpid()

    def call():
        prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
        if os.getppid() != parent:  # killed before the call
            os._exit(128 + signal.SIGTERM)

    return call


def parsed(flag, text, own, parse, *given):
    """What a command's parse makes of the flags given and those of a string; BadInput where it refuses them.

    own: as in words_of. Asked before anything is made: when that command's turn comes, hours may have passed.
    """
    words, said = words_of(flag, text, own), io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return parse([*map(str, given), *words])
    except SystemExit:
        why = said.getvalue().strip().splitlines()[-1].rpartition("error: ")[2]
    except BadInput as error:
        why = error
    raise BadInput(f"{flag} {text!r}: {why}")


def devices():
    """The number of processes that sampling is shared out to: one a GPU, else one."""
    return max(1, torch.cuda.device_count())


def words_of(flag, text, own=()):
    """The words of further flags in one string, as a shell splits them.

    BadInput for one of own, the flags that the experiment gives itself: the last one counts for a command, so
    it would take the place of what the experiment compares. argparse takes the beginning of a name for it.
    """
    try:
        words = shlex.split(text or "")
    except ValueError as error:
        raise BadInput(f"{flag} {text!r}: {error}") from None
    for word in words:
        name = word.partition("=")[0]
        for o in own:
            if name == o or len(name) > 2 and (o.startswith(name) if name[:2] == "--" else name[:2] == o):
                raise BadInput(f"{flag} {text!r}: the experiment gives {o} itself; leave {word} out")
    return words


def given(flag, value):
    """A flag with its value, or nothing where there is none."""
    return [] if value is None else [flag, value]


# Folders


@contextlib.contextmanager
def claimed(out, settings, older=None):
    """`with claimed(out, settings):` the folder of an experiment is this one's, by its settings.json.

    BadInput if it holds another one's. A refusal before anything is made leaves the folder as it was, so that
    the mended command is not taken for another experiment. older: {key: the value that says the same in a
    folder that an earlier version has begun}.
    """
    file = out / "settings.json"
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()}
    if not file.exists() and out.exists() and _made(out):
        raise BadInput(f"{out}: not empty and without settings.json of an experiment; give another --out")
    if not (is_new := create_json(file, settings)):
        old = read_json(file)
        if not old:
            raise BadInput(f"{file}: expected the settings of an experiment, got none; give another --out")
        for k in sorted(old):  # what it lacks, its version did not know
            if old[k] not in (now := settings.get(k), (older or {}).get(k, now)):
                raise BadInput(f"{out}: holds results of {k}={old[k]!r:.200}, now {k}={now!r:.200}; "
                               f"give another --out, or, if no result is of the first, mend {file}")
        if old != settings:
            write_json(file, settings)
    remove_unfinished(out, "*.json", "*.md", "*.csv")
    try:
        yield
    except BadInput:
        if is_new and _made(out) == [file]:
            file.unlink()
            with contextlib.suppress(OSError):  # the hidden files of others
                out.rmdir()
        raise


def _made(out):
    return [p for p in out.iterdir() if not p.name.startswith(".")]


def cell(folder, make):
    """The dict make(folder) of a cell, kept in its result.json: computed once."""
    file = Path(folder) / "result.json"
    if not file.exists():
        write_json(file, make(Path(folder)))
    return read_json(file)


def result(folder, figures, optional=()):
    """The dict of a cell's result.json: figures are finite numbers, optional ones may be None or absent.

    BadInput for any other: such a file was not written here, and a table of it would be wrong in silence.
    """
    file = Path(folder) / "result.json"
    found = read_json(file)
    for key in (*figures, *optional):
        value = found.get(key)
        if not is_number(value) and not (key in optional and value is None):
            raise BadInput(f"{file}: expected {key}, a finite number, got {value!r:.60}; remove the file, "
                           "and the same command makes it again")
    return dict.fromkeys(optional) | found


def results(folders, figures, optional=()):
    """{key: result} of the folders {key: folder} that have one."""
    return {k: result(f, figures, optional) for k, f in folders.items() if (f / "result.json").exists()}


def validation(run_folder, *others):
    """The validation line of metrics.jsonl after step 0 with the lowest loss: that of the best checkpoint.

    others: further figures of such a line. BadInput without such a line, or where one is not a number.
    """
    held_out = [line for line in read_log(run_folder)[0] if "val_loss" in line and line["step"]]
    for line in held_out:
        for key in ("val_loss", *others):
            if not is_number(line.get(key)):
                raise BadInput(f"{run_folder}/metrics.jsonl, step {line['step']}: expected {key}, a finite "
                               f"number, got {line.get(key)!r:.60}")
    if not held_out:
        raise BadInput(f"{run_folder}/metrics.jsonl: no line with val_loss, expected one a checkpoint")
    return min(held_out, key=lambda line: line["val_loss"])


# The space of the metrics, and its real images


def real_images(folder):
    """The fingerprint of all images that metrics.py reads in a folder; BadInput for one that it cannot."""
    records = [data.Record(path, path.name, []) for path in metrics.image_files(folder, quiet=True)]
    for _, _, why in duplicates.seen(records):
        if why:
            raise BadInput(f"{why}; metrics.py reads every image of {folder}, so mend or remove it")
    return data.image_fingerprint(records)


def add_space_flags(parser):
    parser.add_argument("--features", help="space of the metrics, as metrics.py --features: inception, a "
                        "vision model by folder or name, or classifier:FILE; None: Inception if its weights "
                        "are there")
    parser.add_argument("--weights", help="Inception weights, as metrics.py --weights")


def space_flags(args, classifier=None):
    """Flags of metrics.py that say the space; None where there is none.

    In order: --features, --weights, the published Inception in torch's cache, the attribute classifier.
    """
    if args.features:
        return ["--features", args.features, *given("--weights", args.weights)]
    if args.weights:
        return ["--weights", args.weights]
    if inception.cached_file("fid"):
        return []
    return ["--features", f"classifier:{classifier}"] if classifier else None


def check_space(args):
    """BadInput for a space that metrics.py cannot use: said before a cell is trained, not after it."""
    if args.features == "inception" and not args.weights:
        inception.Inception()  # from torch's cache, or downloaded into it
    elif args.features not in (None, "inception"):
        if args.weights:
            raise BadInput(f"--weights {args.weights}: is of the Inception; the features are those of "
                           f"{args.features}")
        spaces.load(args.features)
    elif args.weights:
        inception.Inception(args.weights)


def space_of(file):
    """The name of the space of a result of metrics.py --json."""
    return space_name(read_json(file), file)


def space_name(found, file):
    """That of the object found in a file: its words, and the hash of the weights that measured."""
    if not isinstance(found.get("space"), str) or not isinstance(found.get("weights"), str):
        raise BadInput(f"{file}: expected a result of metrics.py --json, with its space")
    if found["weights"] == "rule":
        return found["space"] + ", of random weights: comparable with nothing else"
    return f"{found['space']}, weights {found['weights']:.8}"


def one_space(out, names):
    """The one space of a table's figures, by their names (space_of); "" without any. BadInput for several."""
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise BadInput(f"{out}: expected the name of a space in each result.json, got {wrong[0]!r:.60}")
    names = {n for n in names if not any(m.startswith(f"{n}, weights ") for m in names)}  # by older versions
    if len(names := sorted(names)) > 1:
        raise BadInput(f"{out}: figures in several spaces, which do not compare: {'; '.join(names)}; give "
                       "another --out, or remove result.json and the metrics beside it of some cells")
    return "".join(names)


NO_SPACE = ("No FID, precision and recall: the Inception weights are not in torch's cache; give them by "
            "--weights FILE, or another space by --features")

# Tables


def over_seeds(values):
    """(mean, half of its 95 % interval by Student's t) of n independent runs: t_(n-1, 97.5 %) s / sqrt(n), s
    their standard deviation; None for half of one run's, and for both where a run has no value."""
    n = len(values)
    if n < 2 or None in values:
        return (None if None in values else float(np.mean(values))), None
    half = scipy.stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n)
    return float(np.mean(values)), float(half)


def number(value, half=None):
    """A figure, perhaps with half of its interval; "-" where there is none."""
    if value is None:
        return "-"
    digits = ".2g" if 0 < abs(value) < 1e-3 else ".1f" if abs(value) >= 100 else ".4f"
    shown = f"{value:{digits}}"
    return shown if half is None else f"{shown} ± {number(half)}"


def markdown(heads, rows):
    """A table of markdown: the first column flush left, the others flush right."""
    sides = [":---" if i == 0 else "---:" for i in range(len(heads))]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in [heads, sides, *rows])


def write_table(out, name, text, table):
    """OUT/NAME.md for people and OUT/NAME.json with the same figures, whole at any time."""
    out = Path(out)
    with replacing(out / f"{name}.md") as tmp:
        tmp.write_text(text, encoding="utf-8")
    write_json(out / f"{name}.json", table)
