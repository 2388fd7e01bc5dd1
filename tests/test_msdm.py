from command import BadInput

from argparse import Namespace

import pytest
import torch
from helpers import PROMPTS, image, tiny_msdm
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

import data
import diffusion
import lora
import msdm
import text as texts
import training
from captions import CaptionSampler
from files import load_safetensors, save_safetensors
from msdm import MSDM
from text import TextConfig, TextTransformer, learn_tokenizer
from unet import UNet, UNetConfig
from wording import Wording


def test_a_seeds_image_does_not_depend_on_the_batch_size():
    m = tiny_msdm()
    prompts = [PROMPTS[i % 3] for i in range(8)]
    together = m.sample(prompts, seed=5, steps=4, batch_size=8)
    alone = m.sample(prompts, seed=5, steps=4, batch_size=1)
    assert together.dtype == torch.uint8 and together.shape == (8, 3, 32, 32)
    assert (together.int() - alone.int()).abs().max() <= 1
    assert (together[0].int() - together[3].int()).abs().max() > 1  # same prompt, another seed


def test_one_string_is_one_prompt():
    m = tiny_msdm()
    assert torch.equal(m.sample(PROMPTS[0], steps=2), m.sample([PROMPTS[0]], steps=2))


@pytest.mark.parametrize("solver", diffusion.SOLVERS)
def test_every_solver_samples_and_the_prompt_matters(solver):
    m = tiny_msdm()
    a, b = m.sample(PROMPTS[:1], steps=3, solver=solver), m.sample(PROMPTS[1:2], steps=3, solver=solver)
    assert not torch.equal(a, b)


def test_guidance_of_one_is_no_guidance():
    m, calls = tiny_msdm(), []
    m.unet.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    m.sample(PROMPTS, steps=4, guidance=1.0, negative_prompt="ignored")
    assert calls == [3] * 4
    calls.clear()
    m.sample(PROMPTS, steps=4, guidance=2.0)
    assert calls == [6] * 4


def test_the_negative_prompt_is_what_guidance_moves_away_from():
    m = tiny_msdm()
    assert torch.equal(m.sample(PROMPTS[:1], steps=3, guidance=3.0, negative_prompt=PROMPTS[0]),
                       m.sample(PROMPTS[:1], steps=3, guidance=1.0))


@pytest.mark.parametrize("solver", diffusion.SOLVERS)
def test_image_to_image_runs_from_the_reconstruction_to_the_plain_sample(solver):
    m, img = tiny_msdm(), image(3, 48, 32)
    request = {"seed": 5, "steps": 6, "solver": solver}
    pixels = torch.from_numpy(data.preprocess(img, 32)).permute(2, 0, 1)[None]
    with torch.no_grad():
        reconstruction = data.to_uint8(m.vae.decode(m.vae.encode(data.to_float(pixels))))[0]
    z_init = m.encode_image(img)
    runs = {s: m.sample(PROMPTS, z_init=z_init, strength=s, **request) for s in (0, 0.5, 1)}
    assert all(torch.equal(x, reconstruction) for x in runs[0])
    assert torch.equal(runs[1], m.sample(PROMPTS, **request))
    assert not any(torch.equal(runs[0.5], runs[s]) for s in (0, 1))
    alone = m.sample(PROMPTS[1], z_init=z_init, strength=0.5, **(request | {"seed": 6}))
    assert (alone[0].int() - runs[0.5][1].int()).abs().max() <= 1


def test_image_to_image_takes_the_share_of_the_steps():
    m, calls = tiny_msdm(), []
    m.unet.register_forward_pre_hook(lambda module, args: calls.append(args[1].unique().item()))
    m.sample(PROMPTS, steps=6, z_init=m.encode_image(image()), strength=0.5)
    assert calls == diffusion.timesteps(1000, 6).tolist()[3:]


def test_a_checkpoint_gives_back_the_model(tmp_path):
    m = tiny_msdm()
    save_safetensors(tmp_path / "m.safetensors", m.tensors(), m.metadata())
    again = msdm.load(tmp_path / "m.safetensors")
    assert torch.equal(m.sample(PROMPTS, steps=3), again.sample(PROMPTS, steps=3))
    assert not any(p.requires_grad for p in again.parameters())


def test_a_checkpoint_of_another_kind_is_refused(tmp_path):
    save_safetensors(tmp_path / "v.safetensors", {"a": torch.zeros(1)}, {"kind": "vae"})
    with pytest.raises(BadInput, match="expected a checkpoint of msdm.py, got 'vae'"):
        msdm.load(tmp_path / "v.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "v.safetensors").read_bytes()[:-2])
    with pytest.raises(BadInput, match="not a whole safetensors file"):
        msdm.load(tmp_path / "cut.safetensors")
    with pytest.raises(BadInput, match="no such file"):
        msdm.load(tmp_path / "absent.safetensors")


def test_a_tensor_of_no_part_of_the_model_is_named(tmp_path):
    m, file = tiny_msdm(), tmp_path / "m.safetensors"
    save_safetensors(file, m.tensors() | {"unett.extra": torch.zeros(1)}, m.metadata())
    with pytest.raises(BadInput, match="tensors of no part of the model: unett.extra; expected names"):
        msdm.load(file)


@pytest.mark.parametrize("part, field, value", [
    ("diffusion", "guidance", "high"), ("diffusion", "guidance", float("nan")),
    ("diffusion", "image_size", 2**20), ("diffusion", "image_size", 30),
    ("diffusion", "beta_start", 2.0), ("diffusion", "beta_end", 0.001),
    ("diffusion", "T", 10**9), ("diffusion", "prediction", "x"), ("diffusion", "schedule", "x"),
    ("train", "n_heads", 0), ("train", "n_heads", 3), ("train", "length", 10**10),
    ("train", "n_layers", 10**9),
    ("train", "vocab", 2), ("train", "vocab", "2"), ("train", "dim", 64), ("train", "tokenizer", None),
    ("unet", "n_heads", 0), ("unet", "channels", 32), ("unet", "channels", [32] * 99),
    ("unet", "dropout", "0"), ("unet", "in_channels", 5), ("unet", "coord_conv", "no"),
    ("vae", "channels", [8]), ("vae", "latent_channels", -1)])
def test_metadata_that_describe_no_model_are_one_line(tmp_path, part, field, value):
    m, file = tiny_msdm(), tmp_path / "m.safetensors"
    meta = m.metadata()
    (meta["text"] if part == "train" else meta)[part][field] = value
    save_safetensors(file, m.tensors(), meta)
    with pytest.raises(BadInput, match=f"{file}: its metadata do not describe a model") as error:
        msdm.load(file)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_metadata_are_checked_before_a_tensor_is_read(tmp_path):
    for part, value in (("preset", "huge"), ("text", {"name": 3, "length": 64}), ("unet", None),
                        ("text", {"name": "a/b", "length": "64"})):
        save_safetensors(tmp_path / "m.safetensors", {}, tiny_msdm().metadata() | {part: value})
        with pytest.raises(BadInput, match="its metadata do not describe a model"):
            msdm.load_meta(tmp_path / "m.safetensors")


def test_an_adapter_on_another_checkpoint_is_said_in_one_line(tmp_path, capsys):
    for name, seed in (("one", 1), ("other", 2)):
        m = tiny_msdm()
        torch.nn.init.normal_(m.unet.conv_in.weight, generator=torch.Generator().manual_seed(seed))
        save_safetensors(tmp_path / f"{name}.safetensors", m.tensors(), m.metadata())
    m = msdm.load(tmp_path / "one.safetensors")
    lora.inject(m.unet, lora.LoRAConfig(rank=2, alpha=2))
    lora.save(m.unet, tmp_path / "adapter")
    for name, said in (("one", ""), ("other", "trained on other weights ('one.safetensors')")):
        lora.load(msdm.load(tmp_path / f"{name}.safetensors").unet, tmp_path / "adapter")
        assert said in (found := capsys.readouterr().err) and bool(found) == bool(said)


def loss(m, n_fed=0, error="l2"):
    g = torch.Generator().manual_seed(0)
    x_0, eps = torch.randn(4, 4, 8, 8, generator=g), torch.randn(4, 4, 8, 8, generator=g)
    text, mask = m.text([*PROMPTS, ""])
    return msdm.loss_fn(m.unet, x_0, text, mask, torch.tensor([0, 100, 500, 999]), eps,
                        m.diffusion.alpha_bar().float(),
                        m.diffusion, error, n_fed)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_a_silent_network_has_the_loss_of_its_target(prediction):
    m, g = tiny_msdm(prediction=prediction), torch.Generator().manual_seed(0)
    for p in m.unet.parameters():
        torch.nn.init.zeros_(p)
    x_0, eps = torch.randn(4, 4, 8, 8, generator=g), torch.randn(4, 4, 8, 8, generator=g)
    a_t = m.diffusion.alpha_bar()[[0, 100, 500, 999]].view(4, 1, 1, 1)
    target = {"eps": eps, "v": a_t.sqrt() * eps - (1 - a_t).sqrt() * x_0}[prediction]
    assert loss(m).item() == pytest.approx(target.square().mean().item(), rel=1e-5)
    assert loss(m, error="l1").item() == pytest.approx(target.abs().mean().item(), rel=1e-5)


def test_self_conditioning_is_fed_to_the_first_rows_and_carries_no_gradient():
    m = tiny_msdm()
    fed = []
    m.unet.register_forward_pre_hook(lambda module, args: fed.append(args[4] if len(args) > 4 else None))
    loss(m, 2).backward()
    assert len(fed) == 2 and fed[0] is None  # a first pass for the estimate, then the pass that learns
    estimate = fed[1]
    assert not estimate.requires_grad
    assert (estimate[2:] == 0).all() and all(row.abs().sum() > 0 for row in estimate[:2])


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_one_batch_overfits(prediction):
    """Four latents. eps is fresh in every step and comes from x_t; v must come from the prompt: all share
    their noise, and at the last time x_t is almost nothing else."""
    m, g = tiny_msdm(prediction=prediction), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    unet = UNet(UNetConfig(**vars(m.unet.config) | {"dropout": 0.0}))
    x_0, eps = torch.randn(4, 4, 8, 8, generator=g), torch.randn(1, 4, 8, 8, generator=g).expand(4, 4, 8, 8)
    alpha_bar = m.diffusion.alpha_bar().float()
    t = {"eps": torch.tensor([700, 800, 900, 999]), "v": torch.tensor([999] * 4)}[prediction]
    opt = torch.optim.Adam([*unet.parameters(), *m.text.parameters()], lr=2e-3)
    losses = []
    for _ in range(50):
        if prediction == "eps":
            eps = torch.randn(4, 4, 8, 8, generator=g)
        text, mask = m.text([*PROMPTS, ""])
        error = msdm.loss_fn(unet, x_0, text, mask, t, eps, alpha_bar, m.diffusion, "l2")
        opt.zero_grad()
        error.backward()
        opt.step()
        losses.append(error.item())
    assert losses[0] > 0.8 and losses[-1] < 0.2, losses[::10]


# What a training reads


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data/images").mkdir(parents=True)
    for i in range(4):
        image(i, 40, 32).save(tmp_path / f"data/images/{i}.png")
    data.write_captions(tmp_path / "data", [(PROMPTS[i % 3], f"{i}.png") for i in range(4)])
    return tmp_path / "data"


def cached_latents(folder, m, out, jitter=0.0, views=1, crop="pad"):
    args, world = Namespace(size=32, crop=crop, seed=3), training.start("cpu")
    return msdm.latents_of(data.read_folder(folder), args, m.vae, ("vae", "data"), out, world, jitter, views)


@torch.no_grad()
@pytest.mark.parametrize("jitter, views", [(0.0, 1), (0.4, 3)])
def test_a_cached_latent_is_the_vaes_own(folder, tmp_path, monkeypatch, jitter, views):
    m = tiny_msdm()
    latents, records = cached_latents(folder, m, tmp_path / "cache", jitter, views)
    assert [r.name for r in records] == ["0.png", "1.png", "2.png", "3.png"] and latents.shape == (4, views,
                                                                                                   8, 8, 8)
    images = data.to_float(torch.stack([torch.from_numpy(data.preprocess(data.open_image(r.path), 32))
                                        for r in records])
                           .permute(0, 3, 1, 2))
    for view in range(views):
        g = torch.Generator().manual_seed(training.step_seed("view", 3, 0, view))
        changed = data.augment(images, g, jitter) if jitter else images
        fresh = torch.cat(m.vae.moments(changed), dim=1)
        torch.testing.assert_close(latents[:, view].float(), fresh, atol=1e-3, rtol=1e-3)  # kept as float16
    monkeypatch.setattr(msdm, "encode_latents", None)  # would be an error to call
    again, _ = cached_latents(folder, m, tmp_path / "cache", jitter, views)
    assert torch.equal(again, latents)


def test_latents_of_other_settings_have_a_file_of_their_own(folder, tmp_path):
    m, settings = tiny_msdm(), [{}, {"jitter": 0.4}, {"jitter": 0.2}, {"jitter": 0.4, "views": 2},
                                {"crop": "center"}]
    for n, changed in enumerate(settings, 1):
        cached_latents(folder, m, tmp_path / "cache", **changed)
        assert len(list((tmp_path / "cache").iterdir())) == n, changed
    cached_latents(folder, m, tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == len(settings)


def test_an_edited_caption_makes_no_latents_anew_and_another_image_does(folder, tmp_path):
    m = tiny_msdm()
    cached_latents(folder, m, tmp_path / "cache")
    data.write_captions(folder, [(PROMPTS[0], f"{i}.png") for i in range(4)])
    cached_latents(folder, m, tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 1
    image(9, 40, 32).save(folder / "images/0.png")
    cached_latents(folder, m, tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_latents_that_are_not_finite_are_not_cached(folder, tmp_path):
    m = tiny_msdm()
    m.vae.to_moments[1].bias.data[0] = torch.nan
    with pytest.raises(BadInput, match="by the autoencoder: latents holds numbers that are not finite"):
        cached_latents(folder, m, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


ONE = training.Distributed(0, 1, torch.device("cpu"))


def test_validation_twice_is_one_number(folder, tmp_path):
    m = tiny_msdm()
    latents, records = cached_latents(folder, m, tmp_path / "cache")
    captions = CaptionSampler(records, records, m.text, 1, 0.2, "", tmp_path, ONE, Wording())
    objective = msdm.Objective(m, latents, captions, Namespace(loss="l2"))
    first = training.validate(objective, objective.held_out(latents, records), 2, ONE)
    torch.rand(1)  # what is drawn between two validations plays no part
    assert training.validate(objective, objective.held_out(latents, records), 2, ONE) == first
    assert first["val_loss"] > 0 and training.validate(
        objective, objective.held_out(latents, records), 3, ONE) == pytest.approx(first, rel=1e-5)


# Text


def test_the_tokenizer_knows_its_words_and_survives_others():
    tokenizer, vocab = learn_tokenizer(PROMPTS * 3, vocab=400)
    text = TextTransformer(TextConfig(tokenizer, vocab, length=16, dim=32, n_layers=1, n_heads=2))
    states, mask = text([PROMPTS[0], "", "Ein völlig anderer Satz, länger als sechzehn Wörter " * 3])
    assert states.shape == (3, 16, 32) and mask.sum(dim=1).tolist()[1:] == [2, 16]
    assert mask[0].sum() < 12


def test_a_place_a_number_with_its_noun_and_a_size_are_one_token_each():
    prompts = ["Generate an image with an an abnormality located in the upper-left, center and lower-left.",
               "Generate an image with 2 polyps.",
               "Generate an image with no instruments. Generate an image with 1 finding.",
               "Generate a polyp of size >20mm, < 5mm and 5-10mm.", "Generate an image not containing text."]
    tokenizer = Tokenizer.from_str(learn_tokenizer(prompts, vocab=500)[0])
    words = [[t.replace("\u0120", " ").strip() for t in tokenizer.encode(p).tokens[1:-1]] for p in prompts]
    assert words[0][-6:] == ["upper-left", ",", "center", "and", "lower-left", "."]
    assert words[1] == ["generate", "an", "image", "with", "2 polyps", "."]
    assert words[2] == ["generate", "an", "image", "with", "no instruments", ".",
                        "generate", "an", "image", "with", "1 finding", "."]
    assert words[3][-6:] == [">20mm", ",", "< 5mm", "and", "5-10mm", "."]
    assert words[4] == ["generate", "an", "image", "not", "containing", "text", "."]


def test_words_are_heard_by_their_distance():
    bias = texts.alibi(4, 2, "cpu")
    assert bias.shape == (1, 2, 4, 4) and torch.equal(bias, bias.mT)
    assert bias[0, 0, 1].tolist() == [-1 / 16, 0, -1 / 16, -2 / 16] and bias[0, 1, 0, 3].item() == -3 / 256


def test_text_states_do_not_depend_on_the_batch():
    m = tiny_msdm()
    torch.testing.assert_close(m.text(PROMPTS)[0][0], m.text(PROMPTS[:1])[0][0])


@pytest.fixture
def clip(tmp_path):
    """A folder with a tiny CLIP text model that knows a few words."""
    folder = tmp_path / "clip"
    words = {w: i for i, w in enumerate(["<bos>", "<eos>", "<unk>",
                                         *["generate", "an", "image", "with", "2", "polyps", "."]])}
    tok = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>",
                            unk_token="<unk>").save_pretrained(folder)
    CLIPTextModel(CLIPTextConfig(vocab_size=len(words), hidden_size=32, intermediate_size=64,
                                 num_hidden_layers=1,
                                 num_attention_heads=2, max_position_embeddings=77, bos_token_id=0,
                                 eos_token_id=1,
                                 pad_token_id=1)).save_pretrained(folder)
    return folder


def test_a_frozen_clip_encoder_from_a_folder(clip):
    text = texts.FrozenCLIP(str(clip))
    states, mask = text(["generate an image", "polyps"])
    assert states.shape == (2, 64, 32) and mask.sum(dim=1).tolist() == [3, 1]
    assert not any(p.requires_grad for p in text.parameters())
    m = tiny_msdm()
    frozen = MSDM(UNet(UNetConfig(**vars(m.unet.config) | {"text_dim": 32})), m.vae, text, m.diffusion)
    assert not any(k.startswith("text.") for k in frozen.tensors())
    assert frozen.metadata()["text"] == {"name": str(clip), "length": 64, "hash": text.weights}
    half = texts.FrozenCLIP(str(clip), dtype=torch.float16)
    assert half.weights == text.weights  # a GPU's training and a CPU's sampling name the same encoder


def test_a_frozen_encoder_that_is_another_one_now_or_lies_elsewhere(clip, tmp_path):
    m, text = tiny_msdm(), texts.FrozenCLIP(str(clip))
    model = MSDM(UNet(UNetConfig(**vars(m.unet.config) | {"text_dim": 32})), m.vae, text, m.diffusion)
    file, away = tmp_path / "m.safetensors", tmp_path / "away"
    save_safetensors(file, model.tensors(), model.metadata())
    assert msdm.load(file).text.weights == text.weights
    clip.rename(away)
    with pytest.raises(BadInput, match="--text-encoder FOLDER says where") as error:
        msdm.load(file)
    assert "--text-encoder train" not in str(error.value)
    again = msdm.load(file, text_encoder=str(away))
    assert again.metadata()["text"] == model.metadata()["text"]
    other = CLIPTextModel.from_pretrained(away)
    for p in other.parameters():
        p.data.add_(0.1)
    other.save_pretrained(away)
    with pytest.raises(BadInput, match=f"hash {text.weights}, .*away holds one of hash"):
        msdm.load(file, text_encoder=str(away))
    meta = model.metadata()
    meta["text"]["hash"] = None  # as release.py writes
    save_safetensors(file, model.tensors(), meta)
    assert msdm.load(file, text_encoder=str(away)).text.name == str(clip)
    save_safetensors(file, m.tensors(), m.metadata())
    with pytest.raises(BadInput, match="holds a text encoder of its own"):
        msdm.load(file, text_encoder=str(away))


def test_a_folder_of_the_hubs_cache_is_named_as_its_repository():
    cached = "/home/x/.cache/huggingface/hub/models--openai--clip-vit-large-patch14/snapshots/32bd6428/"
    assert texts.hub_name(cached) == "openai/clip-vit-large-patch14"
    assert texts.hub_name("models/clip") == "models/clip"


def test_a_cut_prompt_is_told_once_with_the_words_that_are_lost(clip, capsys):
    for text in (tiny_msdm().text, texts.FrozenCLIP(str(clip), length=16)):
        long = " ".join(["Generate an image with 2 polyps."] * 4)
        capsys.readouterr()  # transformers' bar of the weights
        texts.warn_of_cut(text, [long, "Generate an image.", long])
        said = capsys.readouterr().err
        assert "1 of 2 prompts is cut" in said and "16 tokens" in said and "polyps" in said
        assert said.count("\n") == 1
        texts.warn_of_cut(text, [long])
        assert capsys.readouterr().err == ""
    m = tiny_msdm()
    m.sample([long], steps=1)
    m.sample([long], steps=1)
    assert capsys.readouterr().err.count("cut") == 1


def test_joined_prompts_that_are_cut_are_told_before_training(folder, tmp_path, capsys):
    records = data.read_folder(folder)
    for record in records:
        record.prompts = PROMPTS
    CaptionSampler(records, records, tiny_msdm().text, 1, 0.2, "", tmp_path, ONE, Wording())
    assert capsys.readouterr().err == ""
    CaptionSampler(records, records, tiny_msdm().text, 3, 0.2, "", tmp_path, ONE, Wording())
    assert "1 of 1 prompts is cut" in capsys.readouterr().err


def test_more_tokens_than_a_text_encoder_reads_are_one_clear_line(clip):
    with pytest.raises(BadInput, match="reads at most 77 tokens, 78 are asked for"):
        texts.FrozenCLIP(str(clip), 78)


def test_a_text_encoder_that_is_not_there_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(BadInput, match="--text-encoder train"):
        texts.FrozenCLIP(str(tmp_path / "absent"))


def test_a_text_encoder_without_a_vocabulary_is_refused(clip, tmp_path, monkeypatch):
    """transformers makes a tokenizer that knows no word, and says nothing."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (clip / "tokenizer.json").unlink()
    (clip / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    with pytest.raises(BadInput, match="its tokenizer has no vocabulary, tokenizer.json or vocab.json and"):
        texts.FrozenCLIP(str(clip))


def test_weights_of_a_text_encoder_that_are_broken_or_pickled_are_one_clear_line(clip, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    weights = clip / "model.safetensors"
    whole = weights.read_bytes()
    state = {k: v.clone() for k, v in load_safetensors(weights)[0].items()}  # apart from the file
    for change in (lambda: weights.write_bytes(whole[:-9]), lambda: weights.write_bytes(b"version https://git"),
                   lambda: (weights.unlink(), torch.save(state, clip / "pytorch_model.bin"))):
        change()
        with pytest.raises(BadInput, match="--text-encoder train") as error:
            texts.FrozenCLIP(str(clip))
        assert "\n" not in str(error.value)
