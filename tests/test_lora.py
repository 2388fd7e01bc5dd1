from command import BadInput

import json

import pytest
import torch
from torch import nn

import lora
from files import load_safetensors, save_safetensors, write_json

VARIANTS = [{}, {"rslora": True}, {"dora": True}, {"rslora": True, "dora": True}, {"init": "kaiming"}]


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias=bias) for bias in (True, False, True))
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(0.0)])

    def forward(self, x):
        return self.to_out[0](torch.softmax(self.to_q(x) * self.to_k(x), dim=-1) * self.to_v(x))


class Net(nn.Module):
    """Two blocks under names of its own; its checkpoints are published under others."""

    published_names = (("down_blocks.#.attn1", "blocks.#.attention"), ("proj_in", "stem"))

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(nn.ModuleDict({"attention": Attention(8)}) for _ in range(2))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block["attention"](x)
        return x


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().requires_grad_(True)


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


def disturb(net):
    """An adapter that has learnt something."""
    with torch.no_grad():
        for p in lora.parameters(net):
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return net


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_fresh_adapter_is_the_base_exactly(net, variant):
    base = net(X)
    names = lora.inject(net, lora.LoRAConfig(rank=3, alpha=5, **variant))
    assert names == [f"blocks.{i}.attention.{t}" for i in (0, 1)
                     for t in ("to_q", "to_k", "to_v", "to_out.0")]
    assert torch.equal(net(X), base)


@pytest.mark.parametrize(("variant", "scaling"), [({}, 5 / 4), ({"rslora": True}, 5 / 2)])
def test_low_rank_update_is_equation_3(variant, scaling):
    base = nn.Linear(6, 7)
    layer = lora.LoRALinear(base, rank=4, alpha=5, **variant)
    nn.init.normal_(layer.lora_B)
    expected = X @ (base.weight + scaling * layer.lora_B @ layer.lora_A).T + base.bias
    torch.testing.assert_close(layer(X), expected)


def test_dora_rescales_each_output_and_its_norm_gets_no_gradient():
    base = nn.Linear(6, 7)
    layer = lora.LoRALinear(base, rank=4, alpha=4, dora=True)
    nn.init.normal_(layer.lora_B)
    with torch.no_grad():
        layer.magnitude.mul_(1.7)
    weight = base.weight + layer.lora_B @ layer.lora_A
    expected = X @ ((layer.magnitude / weight.norm(dim=1).detach())[:, None] * weight).T + base.bias
    torch.testing.assert_close(layer(X), expected)
    grads = [torch.autograd.grad(y.square().sum(), [layer.lora_A, layer.lora_B, layer.magnitude],
                                 retain_graph=True)
             for y in (layer(X), expected)]
    torch.testing.assert_close(grads[0], grads[1])


def test_gaussian_init_has_standard_deviation_one_over_rank():
    layer = lora.LoRALinear(nn.Linear(4000, 2), rank=8, alpha=8)
    assert layer.lora_A.std().item() == pytest.approx(1 / 8, rel=0.02)
    assert not layer.lora_B.any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_merged_equals_unmerged_and_unmerge_gives_the_base_back(net, variant):
    weights = {k: v.clone() for k, v in net.state_dict().items()}
    lora.inject(net, lora.LoRAConfig(rank=3, alpha=5, **variant))
    out = disturb(net)(X)
    assert (out - net.stem(X)).abs().max() > 0.1
    for _ in range(2):  # twice is once
        lora.merge(net)
    torch.testing.assert_close(net(X), out, atol=1e-5, rtol=0)
    lora.unmerge(net)
    assert torch.equal(net(X), out)
    lora.merge(net)
    lora.remove(net)
    assert net.state_dict().keys() == weights.keys()
    assert all(torch.equal(v, weights[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("merged", [False, True])
def test_scale_weights_the_whole_change(net, variant, merged):
    base = net(X)
    lora.inject(net, lora.LoRAConfig(rank=3, alpha=5, targets=("to_out.0",), **variant))
    full = disturb(net)(X)
    if merged:
        lora.merge(net)
    lora.set_scale(net, 0.0)
    torch.testing.assert_close(net(X), base, atol=0 if not merged else 1e-6, rtol=0)
    lora.set_scale(net, 1.0)
    torch.testing.assert_close(net(X), full)


def test_only_the_adapter_trains(net):
    lora.inject(net, lora.LoRAConfig(rank=2, alpha=2, dora=True))
    trainable = {id(p) for p in net.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in lora.parameters(net)}
    assert len(trainable) == 8 * 3
    before = net(X).detach()
    opt = torch.optim.SGD(lora.parameters(net), lr=0.1)
    for _ in range(2):  # B moves first, A only where B is no longer zero
        opt.zero_grad()
        net(X).square().sum().backward()
        opt.step()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in lora.parameters(net))
    assert (net(X) - before).abs().max() > 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_folder_round_trip(net, variant, tmp_path):
    lora.inject(net, lora.LoRAConfig(rank=3, alpha=5, rank_pattern={"blocks.1.*to_q": 2}, **variant))
    out = disturb(net)(X)
    lora.save(net, tmp_path)
    lora.remove(net)
    lora.load(net, tmp_path)
    assert torch.equal(net(X), out)
    assert all(p.requires_grad for p in lora.parameters(net)) and not net.stem.weight.requires_grad


def test_the_folder_is_what_peft_writes(net, tmp_path):
    lora.inject(net, lora.LoRAConfig(rank=3, alpha=5, dora=True))
    lora.save(net, tmp_path)
    tensors, _ = load_safetensors(tmp_path / "adapter_model.safetensors")
    assert {k: tuple(v.shape) for k, v in tensors.items()} == {
        f"base_model.model.down_blocks.{i}.attn1.{t}.{end}": shape
        for i in (0, 1) for t in ("to_q", "to_k", "to_v", "to_out.0")
        for end, shape in (("lora_A.weight", (3, 8)), ("lora_B.weight", (8, 3)),
                           ("lora_magnitude_vector", (8,)))}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["use_dora"]) == ("LORA", 3, 5,
                                                                                            True)
    assert config["target_modules"] == ["to_q", "to_k", "to_v", "to_out.0"]


def test_targets_and_patterns_see_published_names(net):
    config = lora.LoRAConfig(rank=4, alpha=4, targets=r"down_blocks\.1\.attn1\.to_[qk]|proj_in",
                             rank_pattern={"attn1.to_k": 2}, alpha_pattern={"proj_in": 7})
    assert lora.inject(net, config) == ["stem", "blocks.1.attention.to_q", "blocks.1.attention.to_k"]
    stem, q, k = lora.layers(net).values()
    assert (len(stem.lora_A), len(q.lora_A), len(k.lora_A)) == (4, 4, 2)
    assert (stem.scaling, q.scaling, k.scaling) == (7 / 4, 1, 2)


def test_half_precision_base_keeps_a_float32_adapter(net):
    net.to(torch.bfloat16)
    lora.inject(net, lora.LoRAConfig(rank=2, alpha=2, dora=True))
    assert all(p.dtype == torch.float32 for p in lora.parameters(net))
    assert net(X.bfloat16()).dtype == torch.bfloat16
    lora.merge(net)
    assert net.blocks[0]["attention"].to_q.base.weight.dtype == torch.bfloat16


def test_dropout_acts_in_training_only(net):
    lora.inject(net, lora.LoRAConfig(rank=2, alpha=2, dropout=0.5))
    disturb(net).train()
    assert not torch.equal(net(X), net(X))
    net.eval()
    assert torch.equal(net(X), net(X))


def test_works_on_the_meta_device():
    with torch.device("meta"):
        net = Net()
    lora.inject(net, lora.LoRAConfig(rank=3, alpha=3))
    assert sum(p.numel() for p in lora.parameters(net)) == 8 * 2 * 3 * 8


@pytest.mark.parametrize(("make", "message"), [
    (lambda net: lora.LoRAConfig(rank=0, alpha=1), "rank: expected a whole number from 1, got 0"),
    (lambda net: lora.LoRAConfig(rank=2, alpha=1, targets="(("), "not a regular expression"),
    (lambda net: lora.LoRAConfig(rank=2, alpha=1, targets="a{99999999999}"), "not a regular expression"),
    (lambda net: lora.inject(net, lora.LoRAConfig(2, 2, targets=("to_x",))),
     r"match no layer of Net: \('to_x',\)"),
    (lambda net: lora.inject(net, lora.LoRAConfig(2, 2, targets=("attn1",))),
     "not linear layers: down_blocks.0.attn1, down_blocks.1.attn1"),
    (lambda net: lora.save(net, "nowhere"), "carries no adapter"),
    (lambda net: lora.load(net, "nowhere"), "nowhere: no such folder"),
])
def test_bad_input_is_one_clear_line(net, make, message):
    with pytest.raises(BadInput, match=message) as error:
        make(net)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("pattern", [
    "([a-z_0-9.]+)+x", "(.|.)*x", "(a?){40}", ".*" * 9 + "x", "(.|.)" * 40 + "x", ".?" * 40 + "x",
    "(?x)(.+) *x", "(?x) # [\n (.+)+x#]", "(?#[)(.+)+x]", "(.|a)" * 3000])
def test_a_regular_expression_that_could_match_for_ever_is_refused(pattern):
    for given in ({"targets": pattern}, {"rank_pattern": {pattern: 2}}, {"alpha_pattern": {pattern: 2}}):
        with pytest.raises(BadInput, match="may take for ever to match") as error:
            lora.LoRAConfig(rank=2, alpha=1, **given)
        assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("pattern", [
    r".*\.(attn1|attn2)\.(to_q|to_k|to_v|to_out\.0)", r"(.*\.)?attn1\.to_[qk]", r"^(?!.*mid).*\.\d+\.to_q$",
    r"(?:.*?(?:down|up).*?)?attn[12]\.to_(?:q|k)", "|".join(f"blocks.{i}.to_q" for i in range(300))])
def test_a_regular_expression_of_the_usual_kind_is_read(pattern):
    assert lora.LoRAConfig(rank=2, alpha=1, targets=pattern).targets == pattern


@pytest.mark.parametrize(("change", "message"), [
    ({"bias": "all"}, "bias='all'"),
    ({"use_qalora": True}, "use_qalora=True"),
    ({"exclude_modules": ["to_q"]}, "excluded there: down_blocks.0.attn1.to_q"),
    ({"layers_to_transform": [1]}, "excluded there: down_blocks.0.attn1.to_k"),
    ({"layers_to_transform": [0], "layers_pattern": 3}, "layers_pattern: expected names, got 3"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    ({"some_new_field": 3}, "some_new_field=3"),
    ({"peft_type": "LOHA"}, "peft_type='LOHA'"),
    ({"r": 0}, "adapter_config.json: LoRA rank"),
    ({"r": None}, "rank"), ({"r": True}, "rank"), ({"r": 10**30}, "rank"), ({"r": [3]}, "rank"),
    ({"lora_alpha": None}, "alpha"), ({"lora_alpha": "5"}, "alpha"), ({"lora_alpha": float("nan")}, "alpha"),
    ({"target_modules": None}, "targets"), ({"target_modules": []}, "targets"),
    ({"target_modules": [1]}, "targets"), ({"target_modules": 3}, "targets"),
    ({"target_modules": {"a": 1}}, "targets"),
    ({"rank_pattern": ["to_q"]}, "rank_pattern"), ({"rank_pattern": {"to_q": "3"}}, "rank"),
    ({"alpha_pattern": "to_q"}, "alpha_pattern"), ({"alpha_pattern": {"to_q": "x"}}, "alpha"),
    ({"lora_dropout": 1.5}, "dropout"), ({"lora_dropout": None}, "dropout"),
    ({"use_dora": "false"}, "use_dora: expected true or false, got 'false'"),
    ({"use_rslora": []}, "use_rslora: expected true or false"),
    ({"r": 4}, r"other shapes: .*down_blocks.0.attn1.to_k.lora_A.weight expected \(4, 8\), got \(3, 8\)"),
    ({"use_dora": True}, "not in the file: base_model.model.down_blocks.0.attn1.to_k.lora_magnitude_vector"),
    ({"target_modules": ["to_q"]}, "excluded there: down_blocks.0.attn1.to_k"),
])
def test_an_adapter_of_another_kind_is_refused_and_the_model_untouched(net, tmp_path, change, message):
    lora.inject(net, lora.LoRAConfig(rank=3, alpha=5))
    lora.save(net, tmp_path)
    lora.remove(net)
    write_json(tmp_path / "adapter_config.json",
               json.loads((tmp_path / "adapter_config.json").read_text()) | change)
    with pytest.raises(BadInput, match=message) as error:
        lora.load(net, tmp_path)
    assert not lora.layers(net) and len(str(error.value)) < 1000


@pytest.mark.parametrize(("change", "message"), [
    (lambda v: v.to(torch.int64), "other dtypes: base_model.model.down_blocks.0.attn1.to_.*and 13 more"),
    (lambda v: v.to(torch.float8_e4m3fn), "other dtypes"),
    (lambda v: v / 0, "NaN or infinite weights in 16 tensors"),
    (lambda v: v[:1], "other shapes: .*and 13 more")])
def test_tensors_that_are_no_adapters_are_refused_in_a_short_line(net, tmp_path, change, message):
    lora.inject(net, lora.LoRAConfig(rank=3, alpha=5))
    lora.save(disturb(net), tmp_path)
    lora.remove(net)
    file = tmp_path / "adapter_model.safetensors"
    save_safetensors(file, {k: change(v) for k, v in load_safetensors(file)[0].items()})
    with pytest.raises(BadInput, match=message) as error:
        lora.load(net, tmp_path)
    assert not lora.layers(net) and len(str(error.value)) < 1000


def test_an_adapter_in_half_precision_is_read(net, tmp_path):
    lora.inject(net, lora.LoRAConfig(rank=3, alpha=5))
    lora.save(disturb(net), tmp_path)
    lora.remove(net)
    file = tmp_path / "adapter_model.safetensors"
    save_safetensors(file, {k: v.bfloat16() for k, v in load_safetensors(file)[0].items()})
    lora.load(net, tmp_path)
    assert all(p.dtype == torch.float32 for p in lora.parameters(net))


def test_an_adapter_of_another_base_is_said_in_one_line_and_loaded(net, tmp_path, capsys):
    net.base = {"name": "some/model", "hash": "0123"}
    lora.inject(net, lora.LoRAConfig(rank=3, alpha=5))
    lora.save(net, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/model" and "hash" not in config  # PEFT refuses others
    for base, lines in (({"name": "copy", "hash": "0123"}, 0), ({"name": "some/model", "hash": "4567"}, 1),
                        (None, 0)):
        lora.remove(net)
        net.base = base
        lora.load(net, tmp_path)
        said = capsys.readouterr().err
        assert lora.layers(net) and said.count("\n") == lines
        assert not said or "trained on other weights ('some/model')" in said


def test_dora_on_an_output_without_weights_is_refused(net):
    """It divides by the norm of each output's weights: the first step would be NaN."""
    with torch.no_grad():
        net.blocks[1]["attention"].to_q.weight[3] = 0
    with pytest.raises(BadInput, match="zero in down_blocks.1.attn1.to_q"):
        lora.inject(net, lora.LoRAConfig(rank=3, alpha=5, dora=True))
    assert not lora.layers(net)
    lora.inject(net, lora.LoRAConfig(rank=3, alpha=5))


def test_a_second_adapter_is_refused(net):
    lora.inject(net, lora.LoRAConfig(rank=3, alpha=5))
    with pytest.raises(BadInput, match="carries an adapter already"):
        lora.inject(net, lora.LoRAConfig(rank=3, alpha=5))
