"""Adapter files of every format: those that the reference libraries wrote, ours in their names, merging."""

from command import BadInput

import argparse
import json
import shutil

import pytest
import tiny_kandinsky
import torch
from helpers import close, fixture, recorded, run, tiny_msdm
from test_finetune import PROMPT, pixels

import adapters
import finetune
import lora
import sampler
from files import folder_hash, load_safetensors, making, read_json, save_safetensors, write_json
from kandinsky_networks import load_decoder, load_prior, load_unet3
from unet import InItsDtype, dtype_of
from weights import adapter_files, fetch, rename

FILES = {  # of adapter-formats, and the output that the reference recorded with each
    "peft": "out", "diffusers": "out", "diffusers-pipeline": "out", "kohya": "out",
    "attention-processor": "out_scale_one", "attention-processor-full": "out_full"}


def formats(name):
    return fixture("adapter-formats") / name


def keys(path):
    return set(load_safetensors(path)[0])


@pytest.fixture
def decoder():
    return load_decoder(fixture("kandinsky-2-2-decoder") / "unet")


@torch.no_grad()
def output(network):
    """Of the decoder, on the recorded input."""
    r = recorded("adapter-formats/recorded.safetensors")
    return network(r["sample"], r["timestep"], r["image_embeds"])


def convert(source, out, form, *more):
    finetune.main(["convert", str(source), str(out), "--to", form, *map(str, more)])
    return out


def refused(message, call, *args):
    with pytest.raises(BadInput, match=message) as error:
        call(*args)
    assert "\n" not in str(error.value) and len(str(error.value)) < 700


# Files of the reference libraries


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_the_reference_gives_the_recorded_output(decoder, name):
    base = output(decoder)
    expected = recorded("adapter-formats/recorded.safetensors")[FILES[name]]
    folder = formats(name)
    for source in (folder, next(folder.glob("*.safetensors"))):
        lora.load(decoder, source)
        close(output(decoder), expected, 1e-5)
        assert (output(decoder) - base).abs().max() > 0.01
        lora.remove(decoder)


def test_a_file_without_a_word_of_its_alpha_is_said(decoder, tmp_path, capsys):
    whole = load_safetensors(formats("diffusers/pytorch_lora_weights.safetensors"))[0]
    save_safetensors(tmp_path / "x.safetensors", whole)
    lora.load(decoder, tmp_path / "x.safetensors")
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "no alpha in its header: the update counts once" in said
    close(output(decoder), recorded("adapter-formats/recorded.safetensors")["out_scale_one"], 1e-5)


def test_tensors_saved_by_torch_are_read_without_unpickling(decoder, tmp_path):
    whole = load_safetensors(formats("attention-processor-full/pytorch_lora_weights.safetensors"))[0]
    torch.save(whole, tmp_path / "pytorch_lora_weights.bin")
    lora.load(decoder, tmp_path)
    close(output(decoder), recorded("adapter-formats/recorded.safetensors")["out_full"], 1e-5)
    torch.save({"x": print}, tmp_path / "pytorch_lora_weights.bin")
    lora.remove(decoder)
    refused("not a file of tensors only", lora.load, decoder, tmp_path)


# Between the formats


def test_converted_files_have_the_names_of_the_reference(tmp_path):
    model = fixture("kandinsky-2-2-decoder")
    to_diffusers = convert(formats("peft"), tmp_path / "d.safetensors", "diffusers")
    assert keys(to_diffusers) == keys(formats("diffusers-pipeline/pytorch_lora_weights.safetensors"))
    assert {k.removeprefix("unet.") for k in keys(to_diffusers)} == keys(
        formats("diffusers/pytorch_lora_weights.safetensors"))
    to_kohya = convert(formats("diffusers"), tmp_path / "k.safetensors", "kohya")
    theirs = load_safetensors(formats("kohya/decoder.safetensors"))[0]
    ours = load_safetensors(to_kohya)[0]
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in theirs)
    for name, more in (("peft", ()), ("diffusers", ()), ("diffusers-pipeline", ()),
                       ("kohya", ("--model", model)), ("attention-processor", ()),
                       ("kohya", ("--model", model / "unet"))):
        out = convert(formats(name), tmp_path / f"{name}{len(str(more))}", "peft", *more)
        assert keys(out / "adapter_model.safetensors") == keys(formats("peft/adapter_model.safetensors"))


@pytest.mark.parametrize("variant", [{}, {"rslora": True}, {"dora": True}])
@pytest.mark.parametrize("form", ["peft", "diffusers", "kohya"])
def test_a_round_trip_keeps_the_output(decoder, tmp_path, capsys, variant, form):
    targets = ("to_q", "to_k", "add_k_proj", "to_out.0", "linear_1")
    config = lora.LoRAConfig(rank=4, alpha=6.5, targets=targets, rank_pattern={"to_k": 2},
                             alpha_pattern={"mid_block.*to_q": 3}, **variant)
    lora.inject(decoder, config)
    for p in lora.parameters(decoder):
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    out = output(decoder)
    lora.save(decoder, tmp_path / "adapter")
    lora.remove(decoder)
    there = tmp_path / ("there" if form == "peft" else "there.safetensors")
    if variant.get("dora") and form == "kohya":
        refused("kohya's names cannot say DoRA", convert, tmp_path / "adapter", there, form)
        assert not there.exists()
        return
    convert(tmp_path / "adapter", there, form)
    model = ("--model", fixture("kandinsky-2-2-decoder")) if form == "kohya" else ()
    for source in (there, convert(there, tmp_path / "back", "peft", *model)):
        lora.load(decoder, source)
        close(output(decoder), out, 1e-6)
        lora.save(decoder, tmp_path / "again")  # what was read can be saved, and is the same
        lora.remove(decoder)
        lora.load(decoder, tmp_path / "again")
        close(output(decoder), out, 1e-6)
        lora.remove(decoder)
    assert not capsys.readouterr().err  # neither alpha nor the base is unknown


def test_an_adapter_of_the_prior_in_every_format(tmp_path):
    prior = load_prior(fixture("kandinsky-2-2-prior") / "prior")
    x, states, mask = torch.randn(2, 1, 32), torch.randn(1, 77, 32), torch.ones(1, 77)
    inputs = x[0], torch.tensor([3]), x[1], states, mask
    lora.inject(prior, lora.LoRAConfig(rank=2, alpha=2))
    for p in lora.parameters(prior):
        p.data += 0.1
    with torch.no_grad():
        expected = prior(*inputs)
    lora.save(prior, tmp_path / "peft")
    files = {form: convert(tmp_path / "peft", tmp_path / f"{form}.safetensors", form)
             for form in ("diffusers", "kohya")}
    assert all(k.startswith("prior.transformer_blocks.") for k in keys(files["diffusers"]))
    assert all(k.startswith("lora_prior_transformer_blocks_") for k in keys(files["kohya"]))
    old, older = {}, {}  # as diffusers wrote them in 2023
    for name, tensor in lora.tensors(prior).items():
        name = name.replace("lora_A", "lora.down").replace("lora_B", "lora.up")
        name = name.removeprefix("base_model.model.")
        old[f"prior.{name}"] = tensor
        name = name.replace("to_out.0", "to_out").replace(".lora.", "_lora.")
        older[name.replace("attn1.", "attn1.processor.")] = tensor
    assert "transformer_blocks.1.attn1.processor.to_out_lora.up.weight" in older
    for name, found in {"old": old, "older": older}.items():
        files[name] = tmp_path / f"{name}.safetensors"
        save_safetensors(files[name], found)
    for file in files.values():
        lora.remove(prior)
        lora.load(prior, file)
        with torch.no_grad():
            close(prior(*inputs), expected, 1e-6)


@pytest.mark.parametrize("prefix", ["base_model.model", "unet"])
def test_the_header_says_what_the_reference_reads(tmp_path, prefix):
    """It makes a config of the header's fields that have the prefix of the names."""
    convert(formats("kohya"), tmp_path / "peft", "peft", "--model", fixture("kandinsky-2-2-decoder"))
    file = tmp_path / "peft/adapter_model.safetensors"
    if prefix == "unet":
        file = convert(tmp_path / "peft", tmp_path / "d.safetensors", "diffusers")
    metadata = load_safetensors(file)[1]
    assert metadata.keys() == {"lora_adapter_metadata"}  # of several, safetensors changes the order
    header = json.loads(metadata["lora_adapter_metadata"])
    fields = {k.removeprefix(f"{prefix}."): v for k, v in header.items() if k.startswith(f"{prefix}.")}
    known = json.loads(load_safetensors(formats("diffusers/pytorch_lora_weights.safetensors"))[1]
                       ["lora_adapter_metadata"])
    assert fields.keys() <= known.keys()
    expected = {"r": 4, "lora_alpha": 6.0, "rank_pattern": {}, "use_dora": False}
    assert {k: fields[k] for k in expected} == expected
    targets = {f"{prefix}.{t}.lora_A.weight" for t in fields["target_modules"]}
    assert targets == {k for k in keys(file) if "lora_A" in k}


def test_a_base_is_known_in_every_format(decoder, tmp_path, capsys):
    lora.inject(decoder, lora.LoRAConfig(rank=2, alpha=2))
    lora.save(decoder, tmp_path / "adapter")
    lora.remove(decoder)
    decoder.base = {"name": "another/model", "hash": "0"}
    for form in ("peft", "diffusers", "kohya"):
        there = tmp_path / ("there" if form == "peft" else f"{form}.safetensors")
        lora.load(decoder, convert(tmp_path / "adapter", there, form))
        lora.remove(decoder)
        assert "trained on other weights ('kandinsky-2-2-decoder')" in capsys.readouterr().err
    file = tmp_path / "adapter/adapter_model.safetensors"
    save_safetensors(file, load_safetensors(file)[0], {"base": {"name": "old", "hash": "1"}})  # of version 1
    lora.load(decoder, tmp_path / "adapter")
    assert "trained on other weights ('old')" in capsys.readouterr().err


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_names_of_a_live_model_are_read(decoder, tmp_path, prefix):
    """PEFT's state_dict has the adapter's name, default, in each of them."""
    shutil.copytree(formats("peft"), tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    found = {k.removeprefix("base_model.model."): v for k, v in load_safetensors(file)[0].items()}
    save_safetensors(file, {prefix + k.replace(".weight", ".default.weight"): v for k, v in found.items()})
    lora.load(decoder, tmp_path / "adapter")
    close(output(decoder), recorded("adapter-formats/recorded.safetensors")["out"], 1e-5)


# Refusals


@pytest.mark.parametrize(("name", "change", "message"), [
    ("diffusers", {"text_encoder.x.lora_A.weight": (2, 2)}, "no such layer: base_model.model.text_encoder.x"),
    ("diffusers-pipeline", {"text_encoder.x.lora_A.weight": (2, 2)},
     "among the names of lora_A and lora_B: text_encoder.x.lora_A.weight"),
    ("diffusers-pipeline", {"prior.x.lora_A.weight": (2, 2)},
     "adapter of one network.*tensors of unet. and prior."),
    ("diffusers", {"mid_block.attentions.0.to_q.lora_B.bias": (2,)},
     "names of lora_A and lora_B: mid_block.*bias"),
    ("diffusers", {"mid_block.attentions.0.to_q.lora_A.default.weight": (4, 32)},
     "says twice: mid_block"),
    ("diffusers", {"conv_in.lora_A.weight": (4, 4)}, "no such layer: base_model.model.conv_in.lora_A.weight"),
    ("diffusers", {"mid_block.attentions.0.add_k_proj.lora_A.weight": (4, 24)},
     "x.safetensors: not an adapter of this Decoder: not named by target_modules in its config, or excluded "
     "there: mid_block.attentions.0.add_k_proj$"),
    ("diffusers", {"mid_block.attentions.0.to_q.lora_magnitude_vector": (32,)},
     "without use_dora in its config, which must say it: base_.*.to_q.lora_magnitude_vector$"),
    ("kohya", {"lora_unet_mid_block_attentions_0_to_q.dora_scale": (32, 1)},
     "names of kohya: lora_unet_mid_block_attentions_0_to_q.dora_scale"),
    ("kohya", {"lora_te_text_model.lora_down.weight": (4, 8)},
     "names of kohya: lora_te_text_model.lora_down.weight"),
    ("kohya", {"lora_unet_input_blocks_1_1_to_q.lora_down.weight": (4, 8)},
     "no such linear layer: lora_unet_input_blocks_1_1_to_q.lora_down.weight; expected the network that it"),
    ("kohya", {"lora_unet_mid_block_attentions_0_add_k_proj.alpha": ()},
     "mid_block.attentions.0.add_k_proj.alpha only"),
    ("kohya", {"lora_unet_mid_block_attentions_0_to_q.alpha": (2,)}, "one number as each alpha"),
    ("attention-processor", {"mid_block.attentions.0.processor.to_q_lora.magnitude": (32,)},
     "names of attention processors: mid_block.attentions.0.processor.to_q_lora.magnitude"),
    ("attention-processor", {"mid_block.attentions.0.processor.to_q_lora.down.weight": (4, 32, 1, 1)},
     "matrices A and B of a linear layer, got mid_block.attentions.0.to_q.lora_A.weight"),
    ("attention-processor", {"down_blocks.0.resnets.0.conv1_lora.down.weight": (4, 32),
                             "down_blocks.0.resnets.0.conv1_lora.up.weight": (32, 4)},
     "not linear layers: down_blocks.0.resnets.0.conv1"),
    ("attention-processor", {"mid_block.attentions.0.processor.to_q_lora.down.weight": (4, 31)},
     "other shapes"),
    ("attention-processor", {"mid_block.attentions.0.processor.add_k_proj_lora.down.weight": (4, 24)},
     "not in the file: .*add_k_proj.lora_B.weight"),
])
def test_what_a_format_or_the_network_has_not_is_refused_by_name(decoder, tmp_path, name, change, message):
    file = next(formats(name).glob("*.safetensors"))
    found, metadata = load_safetensors(file)
    more = {k: torch.ones(shape) for k, shape in change.items()}
    save_safetensors(tmp_path / "x.safetensors", found | more, header=metadata or None)
    refused(message, lora.load, decoder, tmp_path / "x.safetensors")
    assert not lora.layers(decoder)


def test_targets_that_are_not_linear_are_named_as_published(decoder):
    refused("not linear layers: down_blocks.0.resnets.0.conv1, ", lora.inject, decoder,
            lora.LoRAConfig(rank=2, alpha=2, targets=("conv1",)))


@pytest.mark.parametrize(("header", "message"), [
    ("[1]", "a JSON object in its header"), ("{", "a JSON object in its header"),
    ('{"r": 4}', "lora_adapter_metadata: expected the fields target_modules, which PEFT writes"),
    ('{"unet.r": 4, "unet.target_modules": ["to_q"]}',
     "x.safetensors: expected the settings r and so on in its header, lora_adapter_metadata, as its "
     "tensors are .*lora_A.weight and so on; got unet.r, unet.target_modules: give both one prefix, or the"),
    ("{}", "in its header, .* got none: "),
    ('{"r": 4, "target_modules": ["to_q"]}', "or excluded there: down_blocks.1.attentions.0.to_k, "),
    ('{"r": 3, "target_modules": ["to_q"]}', "not named by target_modules .*other shapes"),
    ('{"r": 4, "target_modules": ["to_q"], "use_qalora": true}', "metadata: not supported: use_qalora"),
    ('{"r": 4, "lora_alpha": "x", "target_modules": ["to_q"]}', "lora_adapter_metadata: LoRA alpha")])
def test_a_header_that_cannot_be_used_is_refused(decoder, tmp_path, header, message):
    found = load_safetensors(formats("diffusers/pytorch_lora_weights.safetensors"))[0]
    save_safetensors(tmp_path / "x.safetensors", found, header={"lora_adapter_metadata": header})
    refused(message, lora.load, decoder, tmp_path / "x.safetensors")


def test_ranks_without_any_alpha_are_refused_where_the_strength_is_not_known(decoder, tmp_path):
    lora.inject(decoder, lora.LoRAConfig(rank=2, alpha=2, rank_pattern={"to_q": 3}))
    save_safetensors(tmp_path / "x.safetensors",
                     {k.removeprefix("base_model.model."): v for k, v in lora.tensors(decoder).items()})
    save_safetensors(tmp_path / "adapter_model.safetensors", lora.tensors(decoder))
    lora.remove(decoder)
    refused("ranks 2 to 3 and no alpha in the header", lora.load, decoder, tmp_path / "x.safetensors")
    refused("expected adapter_config.json beside it", lora.load, decoder,
            tmp_path / "adapter_model.safetensors")
    refused("got adapter_model.safetensors, x.safetensors", lora.load, decoder, tmp_path)
    refused("no such file", lora.load, decoder, tmp_path / "y.safetensors")
    refused("adapter of one network.*got tensors: ", lora.load, decoder,
            fixture("kandinsky-2-2-decoder") / "unet/diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize(("words", "message"), [
    (["{kohya}", "{tmp}/out", "--to", "peft"], "underscores, and only the network tells .* by --model"),
    (["{peft}", "{tmp}/out", "--to", "kohya"], "--to kohya writes a .safetensors file"),
    (["{peft}", "{tmp}/out.safetensors"], "--to peft writes a folder"),
    (["{peft}", "{tmp}"], "exists already"),
    (["{peft}", "{tmp}/there.safetensors", "--to", "diffusers"], "there.safetensors: exists already"),
    (["{tmp}/none", "{tmp}/out"], "none: no such folder"),
    (["{peft}", "{tmp}/out", "--model", "{tmp}/none"], "none: no such folder"),
    (["{peft}", "{tmp}/out", "--model", "{tmp}"], "expected a published model .*got no config.json there"),
    (["{peft}", "{tmp}/out", "--model", "{prior}"],
     "not an adapter of this network: .*no such layer.*; expected the network that it was trained on$"),
    (["{kohya}", "{tmp}/out", "--model", "{tmp}/there.safetensors"], "not a whole safetensors file"),
    (["{kohya}", "{tmp}/out", "--model", "{prior}/prior/diffusion_pytorch_model.safetensors"],
     "expected a checkpoint of msdm.py, got 'a file without a kind'"),
])
def test_bad_input_to_a_conversion_is_one_line_and_writes_nothing(tmp_path, words, message):
    (tmp_path / "there.safetensors").write_text("mine")
    places = {"kohya": formats("kohya"), "peft": formats("peft"), "tmp": tmp_path,
              "prior": fixture("kandinsky-2-2-prior")}
    refused(message, finetune.main, ["convert", *[w.format(**places) for w in words]])
    assert [p.name for p in tmp_path.iterdir()] == ["there.safetensors"]
    assert (tmp_path / "there.safetensors").read_text() == "mine"


@pytest.mark.parametrize("end", ["lora_A.weight", "lora_B.weight"])
def test_half_a_layer_is_refused_by_its_name_where_no_network_is_known(tmp_path, end):
    found, metadata = load_safetensors(formats("diffusers/pytorch_lora_weights.safetensors"))
    key = next(k for k in sorted(found) if k.endswith(end))
    save_safetensors(tmp_path / "x.safetensors", {k: v for k, v in found.items() if k != key},
                     header=metadata)
    refused(f"x.safetensors: expected matrices .* of every layer, not there: {key}; take the file again",
            convert, tmp_path / "x.safetensors", tmp_path / "out", "peft")
    assert not (tmp_path / "out").exists()


# Layers


@pytest.mark.parametrize(("load", "folder"), [
    (load_prior, "kandinsky-2-2-prior/prior"), (load_decoder, "kandinsky-2-2-decoder/unet"),
    (load_unet3, "kandinsky-3/unet")])
@torch.no_grad()
def test_all_linear_adapts_every_linear_layer_the_embedding_of_the_time_included(load, folder, tmp_path):
    model, part = folder.split("/")
    network = load(fixture(model) / part)
    sizes = lora.linear_sizes(network)
    t, states = torch.tensor([3]), torch.randn(1, 77, 32)
    inputs = {load_prior: (torch.randn(1, 32), t, torch.randn(1, 32), states, torch.ones(1, 77)),
              load_decoder: (torch.randn(1, 4, 8, 8), t, torch.randn(1, 32)),
              load_unet3: (torch.randn(1, 4, 8, 8), t, states, torch.ones(1, 77))}[load]
    base = network(*inputs)
    lora.inject(network, lora.LoRAConfig(rank=2, alpha=2, targets=("all-linear",)))
    assert len(lora.layers(network)) == len(sizes) and "time_embedding.linear_1" in sizes
    assert torch.equal(network(*inputs), base)
    for p in lora.parameters(network):
        p += 0.05
    adapted = network(*inputs)
    lora.save(network, tmp_path)
    assert set(read_json(tmp_path / "adapter_config.json")["target_modules"]) == sizes.keys()
    lora.remove(network)
    lora.load(network, tmp_path)
    assert torch.equal(network(*inputs), adapted) and not torch.equal(adapted, base)


@torch.no_grad()
def test_all_linear_on_msdms_network():
    unet = tiny_msdm().unet
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 5, 32)
    base, n = unet(*inputs), len(lora.linear_sizes(unet))
    lora.inject(unet, lora.LoRAConfig(rank=2, alpha=2, targets="all-linear"))
    assert len(lora.layers(unet)) == n and torch.equal(unet(*inputs), base)
    assert all(layer.lora_A.shape[0] == 2 for layer in lora.layers(unet).values())
    for p in lora.parameters(unet):
        p += 0.05
    assert not torch.equal(unet(*inputs), base)


def test_an_adapter_of_msdm_goes_through_kohyas_names_and_back(tmp_path):
    model = tiny_msdm()
    save_safetensors(tmp_path / "msdm.safetensors", model.tensors(), model.metadata())
    lora.inject(model.unet, lora.LoRAConfig(rank=2, alpha=3))
    for p in lora.parameters(model.unet):
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    expected = lora.tensors(model.unet)
    lora.save(model.unet, tmp_path / "peft")
    file = convert(tmp_path / "peft", tmp_path / "k.safetensors", "kohya")
    assert all(k.startswith("lora_unet_") for k in keys(file))
    back = convert(file, tmp_path / "back", "peft", "--model", tmp_path / "msdm.safetensors")
    found = load_safetensors(back / "adapter_model.safetensors")[0]
    assert found.keys() == expected.keys() and all(torch.equal(v, found[k]) for k, v in expected.items())
    assert adapters.read(back).config.alpha == 3


@pytest.mark.parametrize(("change", "left"), [
    ({"target_modules": "all-linear"}, lambda name: True),
    ({"exclude_modules": ["to_k"]}, lambda name: "to_k" not in name),
    ({"exclude_modules": r".*mid_block.*"}, lambda name: "mid_block" not in name),
    ({"layers_to_transform": 0}, lambda name: "attentions.0." in name),
    ({"layers_to_transform": [1], "layers_pattern": ["up_blocks", "down_blocks"]},
     lambda name: "down_blocks.1" in name),
    ({"eva_config": {"rho": 2.0}, "init_lora_weights": "eva"}, lambda name: True)])
def test_fields_that_narrow_the_targets_leave_what_the_tensors_say(decoder, tmp_path, change, left):
    shutil.copytree(formats("peft"), tmp_path / "adapter")
    file, config = tmp_path / "adapter/adapter_model.safetensors", tmp_path / "adapter/adapter_config.json"
    found = {k: v for k, v in load_safetensors(file)[0].items() if left(k)}
    assert found
    save_safetensors(file, found)
    write_json(config, read_json(config) | change)
    lora.load(decoder, tmp_path / "adapter")
    assert {k: v.shape for k, v in lora.tensors(decoder).items()} == {k: v.shape for k, v in found.items()}
    lora.save(decoder, tmp_path / "again")
    lora.remove(decoder)
    lora.load(decoder, tmp_path / "again")
    assert lora.tensors(decoder).keys() == found.keys()


@pytest.mark.parametrize(("change", "message"), [
    ({"layers_to_transform": "x"}, r"config.json: layers_to_transform: expected whole numbers, got \['x'"),
    ({"layers_to_transform": [7]}, "json: target_.*, name none of the file's layers: down_blocks.1.attent"),
    ({"exclude_modules": ["to_k"]}, "target_modules in its config, or excluded there: .*to_k")])
def test_fields_that_leave_too_few_layers_are_refused(decoder, tmp_path, change, message):
    shutil.copytree(formats("peft"), tmp_path / "adapter")
    config = tmp_path / "adapter/adapter_config.json"
    write_json(config, read_json(config) | change)
    refused(message, lora.load, decoder, tmp_path / "adapter")


# Names on the hub


@pytest.mark.parametrize(("names", "expected"), [
    (["README.md", "adapter_config.json", "adapter_model.safetensors", "x.safetensors", "code.py",
      "checkpoint-500/adapter_model.safetensors"], ["adapter_config.json", "adapter_model.safetensors"]),
    (["pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin", "unet/model.safetensors"],
     ["pytorch_lora_weights.safetensors"]),
    (["mine.safetensors", "optimizer.pt"], ["mine.safetensors"])])
def test_of_an_adapters_repository_only_its_files_are_downloaded(monkeypatch, tmp_path, names, expected):
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda name: names)
    monkeypatch.setattr("huggingface_hub.snapshot_download",
                        lambda name, allow_patterns: tmp_path / ",".join([name, *allow_patterns]))
    assert fetch("some/adapter", chosen=adapter_files) == tmp_path / ",".join(["some/adapter", *expected])


def test_a_name_on_the_hub_is_an_adapter(decoder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda name: ["adapter_config.json"])
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, allow_patterns: formats("peft"))
    lora.load(decoder, "some/adapter")
    close(output(decoder), recorded("adapter-formats/recorded.safetensors")["out"], 1e-5)


# In the commands


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Tiny models, and an adapter of each network that has learnt something."""
    root = tmp_path_factory.mktemp("tiny")
    tiny_kandinsky.main(["--out", str(root / "22")])
    tiny_kandinsky.main(["--out", str(root / "3"), "--kind", "3"])
    for name, load, part in (("prior", load_prior, "22/prior/prior"),
                             ("decoder", load_decoder, "22/decoder/unet"), ("unet3", load_unet3, "3/unet")):
        network = load(root / part)
        lora.inject(network, lora.LoRAConfig(rank=2, alpha=3, dora=name == "decoder"))
        for p in lora.parameters(network):
            p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
        lora.save(network, root / f"{name}-adapter")
    return root


def sample(tiny, out, *more, prior="22/prior", decoder="22/decoder"):
    words = ["--ckpt", tiny / prior, "--decoder", tiny / decoder, "--prompt", PROMPT, "-n", 2, "--steps", 2,
             "--size", 64, "--out", out, *more]
    sampler.main([str(x) for x in words])
    return pixels(out)


def merge(model, adapter, out):
    finetune.main(["merge", "--model", str(model), "--lora", str(adapter), "--out", str(out)])


def test_the_sampler_takes_every_format(tiny, tmp_path):
    adapter = tiny / "prior-adapter"
    expected = sample(tiny, tmp_path / "peft", "--prior-lora", adapter)
    for form in ("diffusers", "kohya"):
        file = convert(adapter, tmp_path / f"{form}.safetensors", form)
        assert sample(tiny, tmp_path / form, "--prior-lora", file) == expected
        assert len(read_json(tmp_path / form / "config.json")["prior_lora"]) == 64


@pytest.mark.parametrize(("name", "model", "part", "load"), [
    ("prior", "22/prior", "prior", load_prior), ("decoder", "22/decoder", "unet", load_decoder),
    ("unet3", "3", "unet", load_unet3)])
def test_a_merged_folder_is_the_model_with_the_adapter(tiny, tmp_path, name, model, part, load):
    merge(tiny / model, tiny / f"{name}-adapter", tmp_path / "merged")
    base, adapted = load(tiny / model / part), load(tiny / model / part)
    merged = load(tmp_path / "merged" / part)
    lora.load(adapted, tiny / f"{name}-adapter")
    lora.merge(adapted)
    lora_free = {k.replace(".base.", "."): v for k, v in adapted.state_dict().items() if "lora_" not in k}
    changed = 0
    for k, v in merged.state_dict().items():
        assert torch.equal(v, lora_free[k])
        changed += not torch.equal(v, base.state_dict()[k])
    assert changed == len(lora.layers(adapted)) > 0
    rest = [p.relative_to(tiny / model) for p in (tiny / model).rglob("*")
            if p.is_file() and p.name != "diffusion_pytorch_model.safetensors"]
    rest += [] if name == "prior" else ["movq/diffusion_pytorch_model.safetensors"]
    for p in rest:
        assert (tmp_path / "merged" / p).read_bytes() == (tiny / model / p).read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"merged"}


@pytest.fixture(scope="module")
def combined(tiny):
    """The folder of diffusers' combined pipeline: the prior's parts have prior_ before their names."""
    shutil.copytree(tiny / "22/decoder", tiny / "both")
    for part in (tiny / "22/prior").iterdir():
        shutil.copytree(part, tiny / f"both/prior_{part.name}")
    return tiny / "both"


@pytest.mark.parametrize(("name", "model", "part", "form"), [
    *(("prior", "22/prior/prior", "prior_prior", form) for form in ("peft", "diffusers", "kohya")),
    *(("decoder", "22/decoder/unet", "unet", form) for form in ("peft", "diffusers"))])  # it has DoRA's norms
def test_in_a_combined_folder_an_adapter_finds_its_part(tiny, combined, tmp_path, name, model, part, form):
    adapter = tiny / f"{name}-adapter"
    if form != "peft":
        adapter = convert(adapter, tmp_path / "x.safetensors", form)
    back = convert(adapter, tmp_path / "peft", "peft", "--model", combined)
    found, expected = (load_safetensors(f / "adapter_model.safetensors")[0]
                       for f in (back, tiny / f"{name}-adapter"))
    assert found.keys() == expected.keys()
    merge(combined, adapter, tmp_path / "merged")
    merge((tiny / model).parent, tiny / f"{name}-adapter", tmp_path / "alone")
    file = f"{part}/diffusion_pytorch_model.safetensors"
    other = f"{(tiny / model).name}/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "merged" / file).read_bytes() == (tmp_path / "alone" / other).read_bytes()
    changed = [p.relative_to(combined) for p in combined.rglob("*") if p.is_file()
               and (tmp_path / "merged" / p.relative_to(combined)).read_bytes() != p.read_bytes()]
    assert [str(p) for p in changed] == [file]


def test_a_merge_says_which_part_it_tried(tiny, combined, tmp_path):
    refused(r"no such layer: .*; expected the network .*; tried in unet/ of --model .*both$", merge, combined,
            tiny / "unet3-adapter", tmp_path / "out")
    refused("no such layer: .*; tried in unet/ of --model .*decoder$", merge, tiny / "22/decoder",
            tiny / "prior-adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shards_and_half_precision_are_merged_in_their_dtype(tiny, tmp_path):
    shutil.copytree(tiny / "22/decoder", tmp_path / "model")
    folder, stem = tmp_path / "model/unet", "diffusion_pytorch_model"
    whole, _ = load_safetensors(folder / f"{stem}.safetensors")
    save_safetensors(folder / f"{stem}.fp16.safetensors", {k: v.half() for k, v in whole.items()})
    (folder / f"{stem}.safetensors").unlink()
    shards = {f"{stem}-0000{i + 1}-of-00002.safetensors": sorted(whole)[i::2] for i in range(2)}
    for shard, names in shards.items():
        save_safetensors(folder / shard, {k: whole[k] for k in names})
    write_json(folder / f"{stem}.safetensors.index.json",
               {"weight_map": {k: shard for shard, names in shards.items() for k in names}})
    (folder / f"{stem}.bin").write_bytes(b"weights without the adapter")
    (tmp_path / "model/.git").mkdir()
    merge(tmp_path / "model", tiny / "decoder-adapter", tmp_path / "merged")
    assert {p.name for p in (tmp_path / "merged/unet").iterdir()} == {p.name for p in folder.iterdir()} - {
        f"{stem}.bin"}
    assert not (tmp_path / "merged/.git").exists()
    full = load_decoder(tmp_path / "merged/unet", torch.float32).state_dict()
    half = load_safetensors(tmp_path / f"merged/unet/{stem}.fp16.safetensors")[0]
    assert {v.dtype for v in half.values()} == {torch.float16}
    rules = load_decoder(folder).published_names
    for k, v in full.items():
        torch.testing.assert_close(half[rename(k, rules, back=True)].float(), v, rtol=2e-3, atol=1e-4)


def test_the_sampler_draws_from_a_merged_folder(tiny, tmp_path):
    adapted = sample(tiny, tmp_path / "adapted", "--decoder-lora", tiny / "decoder-adapter")
    merge(tiny / "22/decoder", tiny / "decoder-adapter", tmp_path / "merged")
    merged = sample(tiny, tmp_path / "out", decoder=tmp_path / "merged")
    a, b = (torch.tensor([list(x) for x in images]) for images in (adapted, merged))
    assert (a - b).abs().max() <= 1
    assert sample(tiny, tmp_path / "base") != merged


@pytest.mark.parametrize(("words", "message"), [
    (["--model", "{tiny}/22/prior", "--lora", "{tiny}/decoder-adapter"], "not an adapter of this Prior"),
    (["--model", "{tiny}/22/decoder/unet", "--lora", "{tiny}/decoder-adapter"], "the whole published folder"),
    (["--model", "{tiny}/22/decoder/movq", "--lora", "{tiny}/decoder-adapter"], "got 'VQModel'"),
    (["--model", "{tiny}/22/decoder", "--lora", "{tiny}/none"], "none: no such folder"),
    (["--model", "{tiny}/22/decoder/unet/config.json", "--lora", "{tiny}/decoder-adapter"],
     "config.json: a file; expected a published folder of Kandinsky. .* MSDM .* sampler.py by --lora"),
    (["--model", "{tiny}/22/decoder", "--lora", "{tiny}/decoder-adapter", "--out", "{tiny}/22/decoder/x"],
     "lies in the folder of --model"),
    (["--model", "{tiny}/22/decoder", "--lora", "{tiny}/decoder-adapter", "--out", "{tmp}/mine"],
     "mine: exists already"),
])
def test_bad_input_to_a_merge_is_one_line_and_writes_nothing(tiny, tmp_path, words, message):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/x").write_text("mine")
    before = folder_hash(tiny)
    words = [w.format(tiny=tiny, tmp=tmp_path) for w in words]
    if "--out" not in words:
        words += ["--out", str(tmp_path / "out")]
    refused(message, finetune.main, ["merge", *words])
    assert [p.name for p in tmp_path.rglob("*")] == ["mine", "x"] and folder_hash(tiny) == before


def test_a_merge_that_cannot_copy_a_file_names_it(tiny, tmp_path):
    shutil.copytree(tiny / "22/decoder", tmp_path / "model")
    (tmp_path / "model/README.md").symlink_to("/nowhere/x")
    refused("model/README.md: cannot be copied to", finetune.main,
            ["merge", "--model", str(tmp_path / "model"), "--lora", str(tiny / "decoder-adapter"), "--out",
             str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_merge_of_a_folder_with_a_pointer_for_a_file_is_refused_before_any_work(tiny, tmp_path,
                                                                                  monkeypatch):
    shutil.copytree(tiny / "22/decoder", tmp_path / "model")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    unread = tmp_path / "model/unet/diffusion_pytorch_model.bin"
    unread.write_text(pointer)  # is not copied
    merge(tmp_path / "model", tiny / "decoder-adapter", tmp_path / "merged")
    assert not (tmp_path / "merged/unet" / unread.name).exists()
    monkeypatch.setattr(finetune, "read_checkpoint", None)  # would be an error to call
    file = tmp_path / "model/movq/diffusion_pytorch_model.safetensors"
    file.write_text(pointer)
    refused(f"{file}: a git-lfs pointer instead of the file: run `git lfs pull`", merge, tmp_path / "model",
            tiny / "decoder-adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_is_made_whole_or_not_at_all(tmp_path):
    left = tmp_path / ".out.2147483646000000.tmp"  # of a process that was killed
    left.mkdir()
    with pytest.raises(RuntimeError), making(tmp_path / "out") as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with making(tmp_path / "out") as folder:
        (folder / "whole").write_text("x")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "whole"]
    refused("exists already", making(tmp_path / "out").__enter__)


def test_the_commands_leave_with_status_2(tmp_path):
    done = run("finetune.py", "convert", formats("peft"), tmp_path, "--to", "peft", expect=2)
    said = f"error: {tmp_path}: exists already; name another OUT, or remove this one"
    assert done.stderr.splitlines() == [said]
    run("finetune.py", "convert", formats("peft"), tmp_path / "out")
    assert adapters.read(tmp_path / "out").config.alpha == 6


def test_the_hash_of_a_file_is_also_that_of_the_settings_beside_it(tmp_path):
    shutil.copytree(formats("peft"), tmp_path / "adapter")
    file, config = tmp_path / "adapter/adapter_model.safetensors", tmp_path / "adapter/adapter_config.json"
    before = adapters.adapter_hash(file)
    write_json(config, read_json(config) | {"lora_alpha": 77})
    assert adapters.adapter_hash(file) != before


@torch.no_grad()
def test_a_half_precision_network_with_adapters_everywhere_computes_in_its_own_dtype(decoder):
    decoder.bfloat16()
    lora.inject(decoder, lora.LoRAConfig(rank=2, alpha=2, targets="all-linear"))
    assert next(decoder.parameters()).dtype == torch.float32 and dtype_of(decoder) == torch.bfloat16
    out = InItsDtype(decoder)(torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 32))
    assert out.dtype == torch.float32 and out.isfinite().all()


@torch.no_grad()
def test_a_baked_adapter_is_in_the_weights_alone(decoder):
    lora.load(decoder, formats("peft"))
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 32)
    expected, names = decoder(*inputs), {k for k in decoder.state_dict() if "lora" not in k}
    lora.bake(decoder)
    close(decoder(*inputs), expected, 1e-5)
    assert not lora.layers(decoder) and set(decoder.state_dict()) == {k.replace(".base", "") for k in names}


def test_the_targets_of_an_adapter_may_be_given_in_any_order():
    config = lora.LoRAConfig(rank=2, alpha=2, targets=("to_q", "to_k"))
    args = argparse.Namespace(targets=["to_k", "to_q"])
    lora.set_flags(args, config, "A")
    assert args.rank == 2
    with pytest.raises(BadInput, match="--targets"):
        lora.set_flags(argparse.Namespace(targets=["to_k"]), config, "A")
