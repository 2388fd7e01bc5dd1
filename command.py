"""What every command shares: bad input, exit status, device, checks of flags.

A command ends with status 0, 1 for a verdict (data.py check), 2 with one line for bad input, 130 for Ctrl-C.
"""

import errno
import os
import re
import sys

import torch


class BadInput(ValueError):
    """Input that cannot be used; the message is one line: file, row or key, what was expected, what came."""


# What a full or protected disk raises in a write, where the error often carries no file name.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}


def run_command(main):
    """Run a script's main(): exit status 2 and one line on bad input, 130 on Ctrl-C.

    Bad input is BadInput, or an OSError with a file name or in DISK_ERRORS. Others keep their traceback.
    """
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("stopped by Ctrl-C; the same command goes on where this one was", file=sys.stderr)
        sys.exit(130)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader of a pipe has left, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        if not error.filename and error.errno not in DISK_ERRORS:
            raise
        reason = f"{error.filename}: {error.strerror}" if error.filename else error
        print(f"error: {reason}", file=sys.stderr)
        sys.exit(2)


def best_device(name="auto"):
    """The torch.device of that name, or BadInput; "auto" is CUDA when there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = re.split(r"[.:,(\n]", str(error))[0]
        raise BadInput(f"--device {name}: not a device of this machine ({reason})") from None


def at_least_one(args, *names):
    """BadInput for a count below 1. names: attributes of args; None is a count that was not given."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            flag = ("-" if len(name) == 1 else "--") + name.replace("_", "-")
            raise BadInput(f"{flag} {value}: expected 1 or more")
