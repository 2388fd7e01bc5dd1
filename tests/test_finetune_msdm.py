"""An adapter on a small MSDM: training, resuming, strength, bad input."""

from command import BadInput

import json

import pytest
import torch
from helpers import pixels, tiny_msdm

import finetune
import phantom
import sampler
from files import file_hash, folder_hash, load_safetensors, save_safetensors


@pytest.fixture(scope="module")
def msdm_run(tmp_path_factory):
    """A small MSDM, rendered data, and a run that adapts the one to the other."""
    root = tmp_path_factory.mktemp("msdm")
    base = tiny_msdm()
    save_safetensors(root / "base.safetensors", base.tensors(), base.metadata())
    phantom.main(["--out", str(root / "data"), "--n", "20", "--size", "32"])
    before = file_hash(root / "base.safetensors")
    finetune.main(msdm_flags(root, root / "run"))
    assert file_hash(root / "base.safetensors") == before
    return root


def msdm_flags(root, out, *more):
    common = ["msdm", "--data", root / "data", "--model", root / "base.safetensors", "--rank", 4, "--out",
              out, "--lr", 1e-2,
              "--steps", 8, "--batch-size", 4, "--log-every", 2, "--save-every", 4, "--shown", 2,
              "--sample-steps", 2]
    return [str(x) for x in (*common, *more)]


def sample_msdm(root, out, *more):
    sampler.main([str(x) for x in ("--ckpt", root / "base.safetensors", "--prompt", "2 polyps", "-n", 2,
                                   "--steps", 3, "--out", out,
                                   *more)])
    return pixels(out)


def test_msdm_learns_an_adapter_and_the_base_stays(msdm_run):
    names = {p.name for p in (msdm_run / "run").iterdir() if not p.name.startswith(("latents-", "text-"))}
    assert names == {"best", "last", "config.json", "metrics.jsonl", "samples", "state.pt", "MODEL_CARD.md",
                     ".lock"}
    config = json.loads((msdm_run / "run/best/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 4)
    tensors, _ = load_safetensors(msdm_run / "run/last/adapter_model.safetensors")
    assert all(k.startswith("base_model.model.") for k in tensors)
    assert all(v.any() for k, v in tensors.items() if "lora_B" in k)


def test_a_run_holds_no_setting_that_it_does_not_use(msdm_run):
    settings = json.loads((msdm_run / "run/config.json").read_text())["settings"]
    assert "muon_lr" not in settings and settings["text_encoder"] is None and settings["lr"] == 0.01
    assert "muon_lr" not in (msdm_run / "run/MODEL_CARD.md").read_text()


def test_a_stopped_adaptation_of_msdm_ends_with_the_same_bytes(msdm_run, tmp_path):
    for more in (["--minutes", 0], []):  # the first stops after a step
        torch.rand(1)  # what the process drew before plays no part
        finetune.main(msdm_flags(msdm_run, tmp_path / "run", *more))
    assert folder_hash(tmp_path / "run/last") == folder_hash(msdm_run / "run/last")


def test_the_strength_of_an_adapter_on_msdm(msdm_run, tmp_path):
    adapter = ["--lora", msdm_run / "run/last"]
    base, adapted = sample_msdm(msdm_run, tmp_path / "base"), sample_msdm(msdm_run, tmp_path / "adapted",
                                                                          *adapter)
    assert adapted != base
    assert sample_msdm(msdm_run, tmp_path / "zero", *adapter, "--lora-scale", 0) == base
    with pytest.raises(BadInput, match="holds images made with lora="):
        sample_msdm(msdm_run, tmp_path / "adapted")


@pytest.mark.parametrize(("change", "said"), [
    (["--rank", "0"], "rank: expected a whole number from 1, got 0"),
    (["--targets", "to_x"], "match no layer of UNet"),
    (["--model", "{root}/absent.safetensors"], "no such file"),
    (["--model", "{root}/run/last/adapter_model.safetensors"],
     "expected a checkpoint of msdm.py, got 'a file without a kind'"),
])
def test_bad_input_to_an_adaptation_of_msdm(msdm_run, tmp_path, change, said):
    with pytest.raises(BadInput, match=said):
        finetune.main(msdm_flags(msdm_run, tmp_path / "run", *[c.format(root=msdm_run) for c in change]))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("change", "said"), [
    (["--decoder", "{root}"], "--decoder is not for an MSDM checkpoint"),
    (["--size", "64"], "--size is not for an MSDM checkpoint"),
    (["--lora", "{root}/data"], "data: expected an adapter: adapter_config.json and"),
])
def test_bad_input_to_sampling_with_an_adapter(msdm_run, tmp_path, change, said):
    with pytest.raises(BadInput, match=said):
        sample_msdm(msdm_run, tmp_path / "out", *[c.format(root=msdm_run) for c in change])
    assert not (tmp_path / "out").exists()
