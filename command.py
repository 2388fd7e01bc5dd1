"""What every command shares: errors of the user's making, exit status, device, checks of flags.

A command ends with status 0, or 1 for a verdict (data.py check), 2 with one line for bad input, 130 for Ctrl-C.
"""

import re
import sys

import torch


class BadInput(ValueError):
    """Something the user gave cannot be used. The message is one line: which file, row or key, what was expected, what came."""


def run_command(main):
    """Run a script's main(): exit status 2 and one line on bad input, 130 on Ctrl-C."""
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("stopped by Ctrl-C; the same command goes on where this one was", file=sys.stderr)
        sys.exit(130)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"error: {error.filename}: {error.strerror}" if error.filename else f"error: {error}", file=sys.stderr)
        sys.exit(2)


def best_device(name="auto"):
    """"auto" is CUDA when there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = re.split(r"[.:,(\n]", str(error))[0]
        raise BadInput(f"--device {name}: not a device of this machine ({reason})") from None


def at_least_one(args, *names):
    """Counts of the command line that must be 1 or more, by attribute; None is a count that was not given."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise BadInput(f"{'-' if len(name) == 1 else '--'}{name.replace('_', '-')} {value}: expected 1 or more")
