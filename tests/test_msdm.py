import pytest
import torch

import diffusion
import msdm
import text as texts
from command import BadInput
from files import save_safetensors
from msdm import MSDM, Diffusion
from text import TextConfig, TextTransformer, learn_tokenizer
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig

PROMPTS = ["Generate an image with 2 polyps.", "Generate an image containing text.", "Generate an image with no polyps."]


def model(**diffusion):
    """A small model whose every layer answers."""
    torch.manual_seed(0)
    tokenizer, vocab = learn_tokenizer(PROMPTS, vocab=300)
    text = TextTransformer(TextConfig(tokenizer, vocab, length=16, dim=32, n_layers=1, n_heads=2))
    unet = UNet(UNetConfig(in_channels=4, channels=(32, 32, 32), time_dim=64, text_dim=32, n_heads=2, dropout=0.1))
    vae = VAE(VAEConfig(channels=(8, 8, 8), latent_channels=4))
    for p in [*unet.parameters(), *vae.parameters()]:
        torch.nn.init.normal_(p, std=0.1)
    return MSDM(unet, vae, text, Diffusion(**{"prediction": "v", "image_size": 32} | diffusion)).eval()


def test_a_seeds_picture_does_not_depend_on_the_batch_size():
    m = model()
    prompts = [PROMPTS[i % 3] for i in range(8)]
    together = m.sample(prompts, seed=5, steps=4, batch_size=8)
    alone = m.sample(prompts, seed=5, steps=4, batch_size=1)
    assert together.dtype == torch.uint8 and together.shape == (8, 3, 32, 32)
    assert (together.int() - alone.int()).abs().max() <= 1
    assert (together[0].int() - together[3].int()).abs().max() > 1  # same prompt, another seed


def test_one_string_is_one_prompt():
    m = model()
    assert torch.equal(m.sample(PROMPTS[0], steps=2), m.sample([PROMPTS[0]], steps=2))


@pytest.mark.parametrize("solver", diffusion.SOLVERS)
def test_every_solver_samples_and_the_prompt_matters(solver):
    m = model()
    a, b = m.sample(PROMPTS[:1], steps=3, solver=solver), m.sample(PROMPTS[1:2], steps=3, solver=solver)
    assert not torch.equal(a, b)


def test_guidance_of_one_is_no_guidance():
    m, calls = model(), []
    m.unet.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    m.sample(PROMPTS, steps=4, guidance=1.0, negative_prompt="ignored")
    assert calls == [3] * 4
    calls.clear()
    m.sample(PROMPTS, steps=4, guidance=2.0)
    assert calls == [6] * 4


def test_the_negative_prompt_is_what_guidance_moves_away_from():
    m = model()
    assert torch.equal(m.sample(PROMPTS[:1], steps=3, guidance=3.0, negative_prompt=PROMPTS[0]),
                       m.sample(PROMPTS[:1], steps=3, guidance=1.0))


def test_self_conditioning_changes_the_picture():
    m = model()
    with_estimate = m.sample(PROMPTS[:1], steps=4)
    original = m.unet.forward
    m.unet.forward = lambda x_t, t, text, mask, self_cond=None: original(x_t, t, text, mask, None)
    assert not torch.equal(with_estimate, m.sample(PROMPTS[:1], steps=4))


def test_a_checkpoint_gives_back_the_model(tmp_path):
    m = model()
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


def loss(m, prediction, self_cond=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    x_0, eps = torch.randn(4, 4, 8, 8, generator=g), torch.randn(4, 4, 8, 8, generator=g)
    text, mask = m.text([*PROMPTS, ""])
    return msdm.loss_fn(m.unet, x_0, text, mask, torch.tensor([0, 100, 500, 999]), eps, m.diffusion.alpha_bar().float(),
                        m.diffusion, "l2", self_cond)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_a_silent_network_has_the_loss_of_its_target(prediction):
    m = model(prediction=prediction)
    for p in m.unet.parameters():
        torch.nn.init.zeros_(p)
    assert loss(m, prediction).item() == pytest.approx(1.0, rel=0.1)  # eps and v both have unit variance


def test_self_conditioning_is_fed_where_it_was_drawn_and_carries_no_gradient():
    m = model()
    fed = []
    m.unet.register_forward_pre_hook(lambda module, args: fed.append(args[4] if len(args) > 4 else None))
    loss(m, "v", torch.tensor([True, False, True, False])).backward()
    assert len(fed) == 2 and fed[0] is None  # a first pass for the estimate, then the pass that learns
    estimate = fed[1]
    assert not estimate.requires_grad
    assert (estimate[1] == 0).all() and (estimate[3] == 0).all() and estimate[0].abs().sum() > 0


def test_the_tokenizer_knows_its_words_and_survives_others():
    tokenizer, vocab = learn_tokenizer(PROMPTS * 3, vocab=400)
    text = TextTransformer(TextConfig(tokenizer, vocab, length=16, dim=32, n_layers=1, n_heads=2))
    states, mask = text([PROMPTS[0], "", "Ein völlig anderer Satz, länger als sechzehn Wörter " * 3])
    assert states.shape == (3, 16, 32) and mask.sum(dim=1).tolist()[1:] == [2, 16]
    assert mask[0].sum() < 12


def test_a_place_a_number_with_its_noun_and_a_size_are_one_token_each():
    from tokenizers import Tokenizer

    prompts = ["Generate an image with an an abnormality located in the upper-left, center and lower-left.",
               "Generate an image with 2 polyps.", "Generate an image with no instruments. Generate an image with 1 finding.",
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
    m = model()
    torch.testing.assert_close(m.text(PROMPTS)[0][0], m.text(PROMPTS[:1])[0][0])


def test_a_frozen_clip_encoder_from_a_folder(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

    words = {w: i for i, w in enumerate(["<bos>", "<eos>", "<unk>", *["generate", "an", "image", "with", "2", "polyps", "."]])}
    tok = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>",
                            unk_token="<unk>").save_pretrained(tmp_path)
    CLIPTextModel(CLIPTextConfig(vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                                 num_attention_heads=2, max_position_embeddings=77, bos_token_id=0, eos_token_id=1,
                                 pad_token_id=1)).save_pretrained(tmp_path)
    text = texts.FrozenCLIP(str(tmp_path))
    states, mask = text(["generate an image", "polyps"])
    assert states.shape == (2, 64, 32) and mask.sum(dim=1).tolist() == [3, 1]
    assert not any(p.requires_grad for p in text.parameters())
    m = model()
    frozen = MSDM(UNet(UNetConfig(**vars(m.unet.config) | {"text_dim": 32})), m.vae, text, m.diffusion)
    assert not any(k.startswith("text.") for k in frozen.tensors())
    assert frozen.metadata()["text"] == {"name": str(tmp_path), "length": 64}


def test_a_text_encoder_that_is_not_there_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(BadInput, match="--text-encoder train"):
        texts.FrozenCLIP(str(tmp_path / "absent"))
