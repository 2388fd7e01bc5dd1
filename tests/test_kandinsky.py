"""Parity with recorded outputs of the reference libraries: networks to 1e-4, pipelines to 1e-3, float32 on a CPU."""

import json
from pathlib import Path

import pytest
import torch

import kandinsky
import lora
import vae
from weights import load_safetensors, rename

FIXTURES = Path(__file__).resolve().parents[2] / "shared" / "fixtures"
pytestmark = pytest.mark.skipif(not FIXTURES.is_dir(), reason=f"no recorded reference outputs in {FIXTURES}")


def close(a, b, tolerance=1e-4):
    assert (a.float() - b.float()).abs().max() <= tolerance


@pytest.fixture(scope="module")
def recorded():
    return {n: load_safetensors(FIXTURES / f"kandinsky-{n}-recorded.safetensors")[0] for n in ("2-2", "3")}


@pytest.fixture(scope="module")
def k22():
    return kandinsky.Kandinsky22.from_pretrained(FIXTURES / "kandinsky-2-2-prior", FIXTURES / "kandinsky-2-2-decoder")


@pytest.fixture(scope="module")
def k3():
    return kandinsky.Kandinsky3.from_pretrained(FIXTURES / "kandinsky-3")


def said(n):
    return json.loads((FIXTURES / f"kandinsky-{n}-recorded.json").read_text())


def test_networks_of_2_2(k22, recorded):
    r = recorded["2-2"]
    with torch.inference_mode():
        embed, states, mask = k22.encode_text(said("2-2")["prompts"])
        close(embed, r["text.text_embeds"])
        close(states, r["text.last_hidden_state"])
        assert torch.equal(mask.long(), r["text.attention_mask"])
        close(k22.encode_image(r["vision.pixel_values"]), r["vision.image_embeds"])
        close(k22.prior(r["prior.hidden_states"], r["prior.timestep"], embed, states, mask), r["prior.predicted_image_embedding"])
        close(k22.decoder(r["unet.sample"], r["unet.timestep"], r["unet.image_embeds"]), r["unet.out"])
        z = k22.movq.encode(r["movq.image"])
        close(z, r["movq.latents"])
        close(k22.movq.decode(z), r["movq.decoded_force_not_quantize"])


def test_pipeline_of_2_2_seed_for_seed(k22, recorded):
    r, s = recorded["2-2"], said("2-2")
    steps, guidance = s["num_inference_steps"], s["guidance_scale"]
    embeds, negative = k22.embed(s["prompts"], steps, guidance, torch.Generator().manual_seed(s["prior_seed"]))
    close(embeds, r["pipeline.image_embeds"], 1e-3)
    close(negative, r["pipeline.negative_image_embeds"], 1e-3)
    img = k22.decode(embeds, negative, steps, guidance, s["height"], s["width"], torch.Generator().manual_seed(s["decoder_seed"]))
    close(img, r["pipeline.image"], 1e-3)


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_adapters_of_peft_on_the_decoder(kind, recorded):
    r, outputs = recorded["2-2"], load_safetensors(FIXTURES / "adapters-recorded.safetensors")[0]
    decoder = kandinsky.load_decoder(FIXTURES / "kandinsky-2-2-decoder" / "unet")
    lora.load(decoder, FIXTURES / f"adapter-{kind}")
    decoder.eval()
    with torch.inference_mode():
        out = decoder(r["unet.sample"], r["unet.timestep"], r["unet.image_embeds"])
        close(out, outputs[f"{kind}.unet.out"])
        assert (out - r["unet.out"]).abs().max() > 1e-3  # the adapter does something
        lora.merge(decoder)
        close(decoder(r["unet.sample"], r["unet.timestep"], r["unet.image_embeds"]), out, 1e-5)


def test_network_of_3(k3, recorded):
    r = recorded["3"]
    with torch.inference_mode():
        states, mask = r["unet.encoder_hidden_states"], r["text.attention_mask"].bool()
        close(k3.unet(r["unet.sample"], r["unet.timestep"], states, mask), r["unet.out"])
        for own, whole, m in zip(k3.encode_text(said("3")["prompts"]), r["text.last_hidden_state"], mask, strict=True):
            close(own, whole[m])


def test_a_picture_of_3_does_not_depend_on_its_batch(k3):
    prompts = said("3")["prompts"]
    together = k3.sample(prompts, seed=3, steps=3, height=64, width=64, batch_size=2)
    alone = k3.sample(prompts[1:], seed=4, steps=3, height=64, width=64)
    assert (together[1].int() - alone[0].int()).abs().max() <= 1


BUILD = {"2-2-prior": kandinsky.build_prior, "2-2-unet": kandinsky.build_decoder, "3-unet": kandinsky.build_unet3,
         "2-2-movq": vae.build_movq, "3-movq": vae.build_movq}


@pytest.mark.parametrize("name", BUILD)
def test_every_published_tensor_is_read_once(name):
    manifest = json.loads((FIXTURES / "manifests" / f"kandinsky-{name}.json").read_text())
    with torch.device("meta"):
        network = BUILD[name](manifest["config"])
    published = {rename(k, network.published_names): tuple(shape) for k, shape in manifest["tensors"].items()}
    assert len(published) == len(manifest["tensors"])
    assert published == {k: tuple(v.shape) for k, v in network.state_dict().items()}
    assert sum(p.numel() for p in network.parameters()) == manifest["parameters"]


@pytest.mark.parametrize("name, count", [("2-2-prior", 41_943_040), ("2-2-unet", 26_345_472), ("3-unet", 53_477_376)])
def test_the_papers_lora_counts(name, count):
    manifest = json.loads((FIXTURES / "manifests" / f"kandinsky-{name}.json").read_text())
    with torch.device("meta"):
        network = BUILD[name](manifest["config"])
        lora.inject(network, lora.LoRAConfig(rank=128, alpha=128))
    assert sum(p.numel() for p in lora.parameters(network)) == count
