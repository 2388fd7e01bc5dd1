from command import BadInput

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from files import save_safetensors, write_json
from weights import (
    base_of,
    check_config,
    check_divisible,
    fetch,
    files_to_fetch,
    load_state,
    read_checkpoint,
    rename,
)

RULES = (("down_blocks.#.resnets.#", "down.#.res.#"), ("to_q|query", "to_q"), ("conv_in", "stem"))


@pytest.mark.parametrize(("published", "ours"), [
    ("down_blocks.3.resnets.11.conv1.weight", "down.3.res.11.conv1.weight"),
    ("mid.to_q.bias", "mid.to_q.bias"),
    ("conv_in.weight", "stem.weight"),
    ("xconv_in.weight", "xconv_in.weight"),  # whole dotted parts only
])
def test_names_go_both_ways(published, ours):
    assert rename(published, RULES) == ours
    assert rename(ours, RULES, back=True) == published


def test_an_older_name_is_read_and_never_written():
    assert rename("mid.query.weight", RULES) == "mid.to_q.weight"
    assert rename("mid.to_q.weight", RULES, back=True) == "mid.to_q.weight"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(3, 4)
        self.to_q = nn.Linear(4, 2, bias=False)


def published():
    return {"conv_in.weight": torch.randn(4, 3), "conv_in.bias": torch.randn(4),
            "query.weight": torch.randn(2, 4)}


def meta_net():
    with torch.device("meta"):
        return Net()


def test_fills_a_meta_module():
    tensors = published()
    net = load_state(meta_net(), tensors, "here", RULES, torch.float64)
    assert torch.equal(net.to_q.weight, tensors["query.weight"].double())
    assert isinstance(net.stem.bias, nn.Parameter) and net.stem.bias.requires_grad


@pytest.mark.parametrize(("change", "message"), [
    ({"conv_out.weight": torch.zeros(1)}, "not read: conv_out.weight"),
    ({"to_q.weight": torch.zeros(2, 4)}, "duplicates: to_q.weight and query.weight"),
    ({"conv_in.bias": torch.zeros(5)}, r"other shapes: conv_in.bias expected \(4,\), got \(5,\)"),
    ({"conv_in.bias": None}, "not set: conv_in.bias"),
])
def test_what_differs_is_listed_by_published_name(change, message):
    tensors = {k: v for k, v in (published() | change).items() if v is not None}
    with pytest.raises(BadInput, match=f"here: does not fit Net: {message}"):
        load_state(meta_net(), tensors, "here", RULES)


def shards(folder, variant=""):
    """A checkpoint in two files with an index, as large models are published."""
    tensors, stem = published(), "diffusion_pytorch_model"
    parts = {f"{stem}{variant}-00001-of-00002.safetensors": ["conv_in.weight"],
             f"{stem}{variant}-00002-of-00002.safetensors": ["conv_in.bias", "query.weight"]}
    for name, keys in parts.items():
        save_safetensors(folder / name, {k: tensors[k] for k in keys})
    write_json(folder / f"{stem}.safetensors.index{variant}.json",
               {"metadata": {}, "weight_map": {k: name for name, keys in parts.items() for k in keys}})
    write_json(folder / "config.json", {"_class_name": "Net"})
    return tensors, sorted(parts)


def test_shards_and_half_variants(tmp_path):
    tensors, _ = shards(tmp_path)
    half = {k: v.half() for k, v in published().items()}
    save_safetensors(tmp_path / "diffusion_pytorch_model.fp16.safetensors", half)
    config, found = read_checkpoint(tmp_path)
    assert config == {"_class_name": "Net"}
    assert all(torch.equal(found[k], v) for k, v in tensors.items()) and len(found) == 3
    _, found = read_checkpoint(tmp_path, torch.float16)
    assert all(torch.equal(found[k], v) for k, v in half.items())
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").unlink()
    assert read_checkpoint(tmp_path)[1].keys() == half.keys()  # the only one there is


def test_broken_checkpoints_are_named(tmp_path):
    with pytest.raises(BadInput, match="config.json: no such file"):
        read_checkpoint(tmp_path)
    _, names = shards(tmp_path)
    last = (tmp_path / names[1]).read_bytes()
    (tmp_path / names[1]).write_bytes(last[:-9])
    with pytest.raises(BadInput, match=f"{names[1]}: not a whole safetensors file"):
        read_checkpoint(tmp_path)
    (tmp_path / names[1]).unlink()
    with pytest.raises(BadInput, match=f"{names[1]}: no such file"):
        read_checkpoint(tmp_path)
    write_json(tmp_path / "diffusion_pytorch_model.safetensors.index.json",
               {"weight_map": {"x": "../elsewhere"}})
    with pytest.raises(BadInput, match="names of files beside it"):
        read_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BadInput, match="config.json: not a JSON file"):
        read_checkpoint(tmp_path)


def test_an_unsupported_setting_is_refused_by_name_and_value():
    config = json.loads('{"_class_name": "Net", "_version": "1", "width": 3, "act": "silu", "norm": null}')
    free, fixed = {"width": 8, "depth": 2}, {"act": ("silu",), "norm": (None,)}
    assert check_config(config, "here", "Net", free, fixed) == {"width": 3, "depth": 2}
    with pytest.raises(BadInput, match="here: not supported in a Net: act='gelu', new_thing=4"):
        check_config(config | {"act": "gelu", "new_thing": 4}, "here", "Net", free, fixed)
    with pytest.raises(BadInput, match="expected the config of a Net, got VQModel"):
        check_config({"_class_name": "VQModel"}, "here", "Net", free, fixed)


DEFAULTS = {"width": 8, "offset": 0, "layers": 2, "widths": (8, 8), "kinds": ("a",), "beta": 0.1, "on": True,
            "act": "silu"}


@pytest.mark.parametrize(("key", "values"), [
    ("width", [None, [8], "8", -1, 0, 1.5, True, 10**30]), ("offset", [-1, None]), ("layers", [10**4]),
    ("widths", [None, [], 8, "8", [8, -1], [8, None], [8, [8]], [8] * 17]), ("kinds", [["a", 1], None]),
    ("beta", [None, "0.1", -1, float("nan"), float("inf"), [0.1]]), ("on", [None, 1, "true"]),
    ("act", [None, 1])])
def test_an_odd_value_is_one_line(key, values):
    for value in values:
        with pytest.raises(BadInput, match=f"here: not supported: {key}=") as error:
            check_config({key: value}, "here", "Net", DEFAULTS, {})
        assert len(str(error.value)) < 300 and "expected" in str(error.value)
    assert check_config({}, "here", "Net", DEFAULTS, {}) == DEFAULTS
    with pytest.raises(BadInput, match=r"widths holds 9, not a multiple of 8 \(groups\)"):
        check_divisible("here", "widths", [8, 9], "groups", 8)


@pytest.mark.parametrize(("dtype", "kept"), [(torch.float32, "unet/d"), (torch.float16, "unet/d.fp16"),
                                             (torch.bfloat16, "unet/d.fp16")])
def test_one_precision_is_downloaded_and_never_code(dtype, kept):
    names = ["model_index.json", "unet/config.json", "unet/d.safetensors", "unet/d.fp16.safetensors",
             "unet/d.bin", "unet/d.pt", "unet/m.pkl", "unet/m.ckpt", "pipeline.py", "movq/w.safetensors",
             "vae/w.fp16.safetensors", "tokenizer/spiece.model", "tokenizer/merges.txt", "README.md",
             "t5/m.safetensors.index.json", "t5/m-00001-of-00001.safetensors",
             "t5/m.safetensors.index.fp16.json", "t5/m.fp16-00001-of-00001.safetensors"]
    index, shard = (("index.json", "m-") if dtype == torch.float32 else ("index.fp16.json", "m.fp16-"))
    assert set(files_to_fetch(names, dtype)) == {
        "model_index.json", "unet/config.json", f"{kept}.safetensors", "movq/w.safetensors",
        "vae/w.fp16.safetensors", "tokenizer/spiece.model", "tokenizer/merges.txt",
        f"t5/m.safetensors.{index}", f"t5/{shard}00001-of-00001.safetensors"}


def test_a_download_asks_for_these_files_alone(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda name: ["a.json", "a.py", "a.bin"])
    monkeypatch.setattr("huggingface_hub.snapshot_download",
                        lambda name, allow_patterns: (tmp_path / ",".join([name, *allow_patterns])))
    assert fetch("some/model", torch.float16) == tmp_path / "some/model,a.json"
    for name in ("../model", "some/..", "a/b/c", "-x/y", "/etc/x"):
        with pytest.raises(BadInput, match="no such folder"):
            fetch(name)


@pytest.mark.parametrize("weight_map", [
    {"x": "../elsewhere"}, {"x": "/etc/passwd"}, {"x": ".."}, {"x": ""}, {"x": 1}, {"x": ["a"]}, {"x": None},
    {"x": "code.py"}, []])
def test_an_index_names_files_beside_it(tmp_path, weight_map):
    shards(tmp_path)
    write_json(tmp_path / "diffusion_pytorch_model.safetensors.index.json", {"weight_map": weight_map})
    with pytest.raises(BadInput, match="index.json: expected (names of files beside it|a weight_map)"):
        read_checkpoint(tmp_path)


def test_a_shard_may_link_into_the_hubs_cache_and_nowhere_else(tmp_path):
    snapshot = tmp_path / "models--o--m/snapshots/0123/unet"
    (tmp_path / "models--o--m/blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    tensors, names = shards(snapshot)
    for i, name in enumerate(names):
        (snapshot / name).rename(tmp_path / f"models--o--m/blobs/{i}")
        (snapshot / name).symlink_to(f"../../../blobs/{i}")
    assert read_checkpoint(snapshot)[1].keys() == tensors.keys()
    assert base_of(snapshot, tensors)["name"] == "o/m"
    (snapshot / names[0]).unlink()
    (tmp_path / "models--o--m/blobs/0").rename(tmp_path / "elsewhere.safetensors")
    (snapshot / names[0]).symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(BadInput, match="a link out of its folder"):
        read_checkpoint(snapshot)


@pytest.mark.parametrize(("change", "message"), [
    ({"conv_in.bias": torch.tensor([0, 1, torch.nan, 0])}, "NaN or infinite weights in 1 tensors: conv_in"),
    ({"conv_in.bias": torch.full((4,), 1e6)}, "NaN or infinite weights in 1 tensors: conv_in"),  # in half
    ({"conv_in.bias": torch.zeros(4, dtype=torch.int64)}, "other dtypes: conv_in.bias expected floats"),
    ({"conv_in.bias": torch.zeros(4, dtype=torch.float8_e4m3fn)}, "other dtypes: conv_in.bias expected"),
    ({f"x{i}": torch.zeros(1) for i in range(50)}, "and 30 more")])
def test_weights_that_would_fail_later_are_refused(change, message):
    with pytest.raises(BadInput, match=f"here: .*{message}"):
        load_state(meta_net(), published() | change, "here", RULES, torch.float16)


def test_weights_in_half_precision_become_those_of_the_network():
    net = load_state(meta_net(), {k: v.half() for k, v in published().items()}, "here", RULES)
    assert {p.dtype for p in net.parameters()} == {torch.float32}


def test_a_name_that_is_no_folder(monkeypatch, tmp_path):
    assert fetch(tmp_path) == tmp_path
    with pytest.raises(BadInput, match="no such folder"):
        fetch(tmp_path / "missing")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BadInput, match="someone/model: no such folder, and the hub gave no repository"):
        fetch("someone/model")


def test_loading_takes_no_more_memory_than_the_weights(tmp_path):
    """Anonymous memory: pages of the file itself do not count, they can be dropped at any time."""
    code = """
import sys, threading, time
import torch
from torch import nn
from weights import load_published

def anonymous():
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

def build(config):
    net = nn.Sequential(*[nn.Linear(1000, 1000) for _ in range(40)])
    net.published_names = ()
    return net

peak, done = 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)

torch.ones(9).double().sum()
before = anonymous()
watcher = threading.Thread(target=watch)
watcher.start()
net = load_published(build, sys.argv[1], getattr(torch, sys.argv[2]))
done = True
watcher.join()
print((peak - before) / sum(p.nbytes for p in net.parameters()))
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc here to read the memory from")
    net = nn.Sequential(*[nn.Linear(1000, 1000) for _ in range(40)])
    save_safetensors(tmp_path / "diffusion_pytorch_model.safetensors",
                     {k: v.half() for k, v in net.state_dict().items()})
    write_json(tmp_path / "config.json", {})
    for dtype, limit in (("float16", 0.15), ("float32", 1.15)):
        done = subprocess.run([sys.executable, "-c", code, tmp_path, dtype], capture_output=True, text=True,
                              cwd=Path(__file__).resolve().parents[1])
        assert float(done.stdout or "nan") <= limit, done.stderr
