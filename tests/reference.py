"""Where recorded reference outputs lie: small ones in tests/golden/, the rest in the folder shared beside the project."""

import json
from pathlib import Path

import pytest
import torch

from files import load_safetensors

GOLDEN = Path(__file__).resolve().parent / "golden"
SHARED = Path(__file__).resolve().parents[2] / "shared" / "fixtures"


def fixture(name):
    """The file or folder of this name; the test is skipped where neither place has it."""
    for place in (GOLDEN, SHARED):
        if (place / name).exists():
            return place / name
    pytest.skip(f"{name} lies in ../shared/fixtures, which is not beside this clone")


def recorded(name):
    return load_safetensors(fixture(name))[0]


def manifest(name):
    return json.loads(fixture(f"manifests/{name}.json").read_text())


def close(out, expected, atol):
    torch.testing.assert_close(out, expected, atol=atol, rtol=0)
