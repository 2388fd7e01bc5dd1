"""No test goes to the network: set here, before transformers and huggingface_hub are imported."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import functools  # noqa: E402

import pytest  # noqa: E402


@pytest.fixture
def low_scale(monkeypatch):
    """A scale of float16 training at which no step overflows: one left out has no counterpart in float32."""
    import torch

    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=2.0**8))
