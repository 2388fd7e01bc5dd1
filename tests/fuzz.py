"""Give every command damaged and hostile files: it works, or it refuses them in one line.

    python tests/fuzz.py --mutations 1000
    python tests/fuzz.py --only 17 --keep out/fuzz     # case 17 alone; its folder stays in out/fuzz

A case is a good folder in which one file is changed (mutations.py), and one command on it, in a worker
process. It fails if the command ends with a traceback or with more than one line, runs for over 30 s, takes
over 2 GiB, writes outside its output folder, or ends with status 0 and NaN in what it wrote.
"""

import argparse
import contextlib
import io
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from command import run_command  # noqa: E402

import mutations  # noqa: E402
import numpy as np  # noqa: E402 - the project's root is not on the path of a script in tests/
import torch  # noqa: E402
from fuzz_cases import COMMANDS, KINDS, argv_of, build  # noqa: E402
from PIL import Image  # noqa: E402

from files import load_safetensors  # noqa: E402

SECONDS, BYTES = 30, 2 << 30

# The worker: one command after the other in one process


def entry(name):
    """The function without arguments that is the command."""
    import importlib

    module, argv = argv_of(name)
    module = importlib.import_module(module)
    if name == "metrics stats":
        return lambda: module.read_stats(Path("stats.safetensors"), {"size": 32}) and None
    if name == "metrics":
        def read():
            paths = module.image_files(Path("data"))
            module.extract(lambda images, resize: {"2048": images.float().mean((2, 3))}, paths,
                           module.common_side(paths))
        return read
    return lambda: module.main(argv)


def resident(key):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"no {key}")


def perform(name):
    """(exit status or None, stderr, traceback or "", growth of the memory in bytes) of a command."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak of the memory starts anew
    before, status, trace = resident("VmRSS"), None, ""
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run_command(entry(name))
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            trace = traceback.format_exc()
    return status, err.buffer.getvalue().decode("utf-8", "replace"), trace, resident("VmHWM") - before


def serve(pipe):
    """Answer (folder, name of a command) with perform's; networks are smaller than the presets'."""
    import unet
    import vae

    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what libraries write there is no answer
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", ResourceWarning)
    unet.PRESETS["tiny"] = unet.UNetConfig(channels=(32, 32, 32), time_dim=64, text_dim=32, n_heads=2)
    vae.PRESETS["tiny"] = vae.VAEConfig(channels=(8, 8, 8), latent_channels=4)
    space = resident("VmSize") + (8 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (space, space))  # no case takes the whole machine
    pipe.send("ready")
    while True:
        folder, name = pipe.recv()
        os.chdir(folder)
        pipe.send(perform(name))


class Worker:
    """A process that runs commands, started anew when it dies or overruns."""

    def __init__(self):
        self.process = None

    def start(self):
        spawn = multiprocessing.get_context("spawn")
        self.pipe, other = spawn.Pipe()
        self.process = spawn.Process(target=serve, args=(other,), daemon=True)
        self.process.start()
        other.close()
        self.pipe.recv()

    def seconds(self):
        """Processor time of the process so far; that of a process that has died counts as none."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self):
        if self.process is not None:
            self.process.kill()
            self.process.join()
        self.process = None

    def call(self, folder, name):
        """perform(name) in a folder; a traceback of one line if there is no answer."""
        if self.process is None:
            self.start()
        self.pipe.send((str(folder), name))
        begun, used = time.monotonic(), self.seconds()
        while not self.pipe.poll(1):
            wall, own = time.monotonic() - begun, self.seconds() - used
            if wall > SECONDS and own > SECONDS or wall > 4 * SECONDS:  # a busy machine takes longer
                self.stop()
                return None, "", f"no end after {wall:.0f} s, {own:.0f} of them of the processor", 0
        try:
            return self.pipe.recv()
        except EOFError:
            self.process.join()
            code = self.process.exitcode
            self.stop()
            return None, "", f"the process died with exit code {code}", 0


# A case


def snapshot(box, out):
    """Size, time and inode of every file below box, but not below its folders of the names out."""
    found = {}
    for folder, folders, names in os.walk(box):
        if folder == str(box):
            folders[:] = [f for f in folders if f not in out]
        for name in names:
            stat = os.lstat(os.path.join(folder, name))
            found[os.path.relpath(os.path.join(folder, name), box)] = (
                stat.st_size, stat.st_mtime_ns, stat.st_ino)
    return found


def spoilt(out):
    """What a command that ended well must not leave in its output folder; "" if it has not."""
    for path in sorted(p for p in out.rglob("*") if p.is_file() and not p.is_symlink()):
        try:
            if not whole(path):
                return f"{path.name} holds NaN, infinity or one colour"
        except Exception as error:
            return f"{path.name} cannot be read ({type(error).__name__})"
    return ""


def whole(path):
    if path.suffix == ".safetensors":
        tensors = load_safetensors(path)[0].values()
        return all(x.isfinite().all() for x in tensors if x.is_floating_point())
    if path.name == "metrics.jsonl":
        return "NaN" not in path.read_text(encoding="utf-8")
    if path.parent.name == "images" and path.suffix == ".png":
        with Image.open(path) as img:
            pixels = np.asarray(img)
        return (pixels != pixels[0, 0]).any()
    return True


def change(rng, box, kind):
    """Change one file of the kind; returns (command, what was done)."""
    places, changes, commands = KINDS[kind]
    path = rng.choice([p for place in places for p in sorted(box.glob(place))])
    mutate, command = rng.choice(changes), rng.choice(commands)
    if mutate in (*mutations.PLACE, mutations.renamed):
        what = mutate(rng, path, box)
    else:
        what, data = mutate(rng, path.read_bytes())
        path.unlink()  # the good folder has a link to this file
        path.write_bytes(data)
    return command, f"{path.relative_to(box)}: {what}"


def fault(box, command, answer):
    """Why the answer of a command is a failure; "" if it is none."""
    status, err, trace, growth = answer
    if trace:
        return trace
    if growth > BYTES:
        return f"{growth / 2**30:.1f} GiB more memory"
    if status not in (0, 1, 2):
        return f"exit status {status}"
    if status == 2:
        lines = err.replace("\r", "\n").split("\nerror: " if "\nerror: " in err else "error: ", 1)
        if len(lines) < 2 or len(lines[1].strip().splitlines()) != 1:
            return f"exit status 2 with other than one line: {err[-600:]!r}"
    return spoilt(box / (COMMANDS[command][2] or "out")) if status == 0 else ""


def copy_of(base, box):
    """The good folder again: links to its files, and copies of those that a command may append to."""
    def copy(source, target):
        written = Path(source).relative_to(base).parts[0].startswith(("run-", "sampled"))
        (shutil.copy2 if written else os.link)(source, target)

    return Path(shutil.copytree(base, box, copy_function=copy))


def case(base, folder, worker, i, seed):
    """Run case i in a new folder: (kind, command, what was done, exit status, why it failed or "")."""
    rng, kind = random.Random(f"{seed} {i}"), list(KINDS)[i % len(KINDS)]
    box = copy_of(base, folder / f"case-{i}")
    command, what = change(rng, box, kind)
    written = {"out", ".features", COMMANDS[command][2]}  # .features: the caches beside a data folder
    before = snapshot(box, written)
    answer = worker.call(box, command)
    why = fault(box, command, answer)
    after = snapshot(box, written)
    changed = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
    if changed and not why:
        why = f"written outside the output folder: {', '.join(changed[:5])}"
    return kind, command, what, answer[0], why


def short(why):
    """The end of a traceback: the error, and the last line of the project that led to it."""
    lines = why.strip().splitlines()
    own = [x.strip() for x in lines if x.strip().startswith(f'File "{ROOT}') and "/tests/" not in x]
    where = own[-1].replace(f"{ROOT}/", "").removeprefix("File ") if own else ""
    return f"{lines[-1][:200]}  ({where})" if where else why.strip()[:700]


def run_cases(cases, seed=0, keep=None, show=print):
    """The failures of the cases, [(number, kind, command, what was done, why)]; counts are shown."""
    worker, counts, failures = Worker(), Counter(), []
    with tempfile.TemporaryDirectory() as made:
        base, folder = Path(made) / "base", Path(keep or made).resolve()
        base.mkdir()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            build(base, worker)
            for command in COMMANDS:
                box = copy_of(base, folder / "good")
                answer = worker.call(box, command)
                if why := fault(box, command, answer) or answer[0] and answer[1]:
                    failures.append((command, "good files", command, "nothing", why))
                    show(f"FAILED on good files: {command}\n    {short(why)}")
                shutil.rmtree(box)
            for i in cases:
                kind, command, what, status, why = case(base, folder, worker, i, seed)
                outcome = "failed" if why else "worked" if status == 0 else "refused"
                counts.update([(kind, outcome), (command, outcome)])
                if why:
                    failures.append((i, kind, command, what, why))
                    show(f"FAILED case {i}, seed {seed}: {command}: {what}\n    {short(why)}")
                if not (keep and why):
                    shutil.rmtree(folder / f"case-{i}", ignore_errors=True)
        finally:
            worker.stop()
    for title, names in (("kind", KINDS), ("command", COMMANDS)):
        show(f"\n{title:<22}{'worked':>8}{'refused':>8}{'failed':>8}")
        for name in names:
            show(f"{name:<22}" + "".join(f"{counts[name, o]:>8}" for o in ("worked", "refused", "failed")))
    return failures


def main():
    parser = argparse.ArgumentParser(description="Give every command damaged and hostile files.")
    parser.add_argument("--mutations", type=int, default=1000, help="cases")
    parser.add_argument("--seed", type=int, default=0, help="of all cases")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--only", type=int, nargs="+", help="these cases alone")
    parser.add_argument("--keep", help="folder in which the folders of failed cases stay")
    args = parser.parse_args()
    start, cases = time.monotonic(), args.only or range(args.first, args.first + args.mutations)
    failures = run_cases(cases, args.seed, args.keep, lambda text: print(text, flush=True))
    kinds = Counter(short(why) for *_, why in failures)
    for why, n in kinds.most_common():
        print(f"{n:5d} x {why}")
    print(f"{len(cases)} cases, {len(failures)} failed, {time.monotonic() - start:.0f} s")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
