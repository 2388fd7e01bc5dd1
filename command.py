"""What every command shares: bad input, exit status, device, checks of flags.

A command ends with status 0, 1 for a verdict (data.py check, judges.py memorisation), 2 with one line for bad
input, 130 for Ctrl-C, 141 where the reader of its pipe has left; a training that was stopped by a signal and
has saved ends with 128 + the signal.
"""

import errno
import math
import os
import re
import sys

# A thread that waits for work spins for 3,000 turns, some microseconds, then sleeps (GNU's OpenMP, torch's on
# Linux, reads this when torch loads it, so this module is imported first). A step of the tiny preset on two
# cores takes 0.6 s; asleep at once, threads wake too late, 0.8 s; in each of two processes it takes 1.8 s,
# asleep 1.2, spinning on 3.3, since they take each other's cores. The user's own choice of either counts.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import torch  # noqa: E402


class BadInput(ValueError):
    """Input that cannot be used; the message is one line: file, row or key, what was expected, what came."""


# What a full or protected disk raises in a write, where the error often carries no file name.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}


# What torch says where memory is short: in a RuntimeError, or its subclass OutOfMemoryError on a GPU.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")


def run_command(main):
    """Run a script's main(): exit status 2 and one line on bad input, 130 on Ctrl-C.

    Bad input is BadInput, or an OSError with a file name or in DISK_ERRORS, links in a circle, too little
    memory, or an argument that is not UTF-8: libraries do not find files of such names, some only after the
    work. Others keep their traceback. A character that the console has not is printed as a question mark.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        for word in sys.argv[1:]:
            try:
                os.fsencode(word).decode("utf-8")
            except UnicodeError:
                raise BadInput(f"{word}: expected UTF-8; rename the file or folder, or write the text "
                               "anew") from None
        sys.exit(main())
    except KeyboardInterrupt:
        print("stopped by Ctrl-C; training, sampling, experiments go on by the same command", file=sys.stderr)
        sys.exit(130)
    except BadInput as error:
        _refuse(error)
    except BrokenPipeError:  # the reader of a pipe has left, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        if not error.filename and error.errno not in DISK_ERRORS:
            raise
        _refuse(f"{error.filename}: {error.strerror}" if error.filename else error)
    except (MemoryError, RuntimeError) as error:
        if str(error).startswith("Symlink loop"):           # of Path.resolve
            _refuse(f"{error}; remove the link or name another folder")
        if not isinstance(error, MemoryError) and not any(said in str(error) for said in OUT_OF_MEMORY):
            raise
        _refuse(f"out of memory ({reason(error)}); a smaller --batch-size or --size, or in training a larger "
                "--accumulate, needs less")


def _refuse(error):
    # A name or a key may hold line breaks and control characters: the message stays one line.
    print("error:", "".join(c if c.isprintable() else "?" for c in str(error)), file=sys.stderr)
    sys.exit(2)


def reason(error):
    """The first line of an exception's message; the name of its class where there is none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def best_device(name="auto"):
    """The torch.device of that name, or BadInput; "auto" is CUDA when there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = re.split(r"[.:,(\n]", str(error))[0]
        raise BadInput(f"--device {name}: not a device of this machine ({reason})") from None


def fast_dtype(device):
    """bfloat16 on a GPU that computes in it, and not by emulation; float32 elsewhere."""
    supported = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if supported else torch.float32


def training_dtype(device):
    """fast_dtype, but float16 on a GPU without bfloat16: training scales its loss and skips an overflow."""
    fast = fast_dtype(device)
    return torch.float16 if device.type == "cuda" and fast == torch.float32 else fast


def to_device(tensor, device):
    """The tensor on a device; from the CPU to a GPU through pinned memory, without waiting for the copy."""
    device = torch.device(device)
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def at_least_one(args, *names):
    """BadInput for a count below 1. names: attributes of args; None is a count that was not given."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise BadInput(f"{_flag(name)} {value}: expected 1 or more")


def check_range(args, low, high, *names):
    """BadInput for a number that is not finite or outside [low, high], which may be infinite; None passes."""
    for name in names:
        value = getattr(args, name)
        if value is None or (low <= value <= high and abs(value) != math.inf):  # NaN fails a comparison
            continue
        ends = [f"from {low}"] * (low != -math.inf) + [f"up to {high}"] * (high != math.inf)
        raise BadInput(" ".join([f"{_flag(name)} {value}: expected a finite number", *ends]))


def _flag(name):
    return ("-" if len(name) == 1 else "--") + name.replace("_", "-")
