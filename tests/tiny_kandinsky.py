"""Tiny Kandinsky checkpoints of random weights in the published layout, for tests of the commands.

    python tests/tiny_kandinsky.py --out runs/tiny22              # runs/tiny22/prior and runs/tiny22/decoder
    python tests/tiny_kandinsky.py --kind 3 --out runs/tiny3
"""

import argparse
import os
import re
import string
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from command import BadInput, run_command  # noqa: E402

import torch  # noqa: E402 - the project's root is not on the path of a script in tests/
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402
from transformers import (  # noqa: E402
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from encoders import clip_images  # noqa: E402
from files import save_safetensors, write_json  # noqa: E402
from kandinsky_networks import build_decoder, build_prior, build_unet3  # noqa: E402
from movq import build_movq  # noqa: E402
from weights import rename  # noqa: E402

SENTENCES = """Generate an image with 1 finding. Generate an image with 2 polyps.
Generate an image with no instruments.
Generate an image with an an abnormality located in the upper-left, center and lower-right.
Generate an image with an abnormality with the colors pink, red, white, yellow and purple.
Generate an image containing text.
Generate an image not containing a green/black box artefact. Generate an image from a colonoscopy procedure.
Generate an image from a gastroscopy procedure. Generate an image with a polyp of size < 5mm.
Generate a polyp of type paris ip.
Generate an image with an an anatomical landmark located in the center-left."""


def smooth_images(n, size, generator):
    """(n, 3, size, size) in [-1, 1]: clouds of colour, on which random encoders are calibrated."""
    coarse = torch.randn(n, 3, 1, 1, generator=generator) + torch.randn(n, 3, 4, 4, generator=generator)
    return torch.tanh(F.interpolate(coarse, size=size, mode="bicubic") / 2)


def random_network(build, config):
    """A network with torch's random weights; parameters that start at zero get small random ones."""
    network = build(config)
    for p in network.parameters():
        if p.requires_grad and not p.any():
            nn.init.normal_(p, std=0.05)
    return network.eval()


def save_published(network, folder, config):
    tensors = {rename(k, network.published_names, back=True): v for k, v in network.state_dict().items()}
    save_safetensors(folder / "diffusion_pytorch_model.safetensors", tensors)
    write_json(folder / "config.json", config)


@torch.no_grad()
def tiny_movq(folder, generator):
    """Random, but calibrated: latents of mean 0 and deviation 1, images of mean 0 and deviation 0.5."""
    config = {"_class_name": "VQModel", "block_out_channels": [32] * 4, "latent_channels": 4,
              "vq_embed_dim": 4, "num_vq_embeddings": 16,
              "down_block_types": ["DownEncoderBlock2D"] * 3 + ["AttnDownEncoderBlock2D"],
              "up_block_types": ["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * 3, "layers_per_block": 1,
              "norm_type": "spatial"}
    movq, img = random_network(build_movq, config), smooth_images(16, 64, generator)
    for layer, run_movq, deviation in ((movq.quant_conv, movq.encode, 1.0),
                                       (movq.decoder.conv_out, lambda x: movq.decode(movq.encode(x)), 0.5)):
        std, mean = torch.std_mean(run_movq(img), dim=(0, 2, 3))
        layer.weight *= (deviation / std).view(-1, 1, 1, 1)
        layer.bias.copy_((layer.bias - mean) * deviation / std)
    save_published(movq, folder / "movq", config)


def clip_vocabulary():
    """Vocabulary and merges of a byte pair encoding: the words of SENTENCES whole, others by letters."""
    letters = string.ascii_lowercase + string.digits + string.punctuation
    pieces, merges = ["<|startoftext|>", "<|endoftext|>", *letters, *(c + "</w>" for c in letters)], []
    for word in sorted(set(re.findall(r"[a-z]+", SENTENCES.lower()))):
        parts = [*word[:-1], word[-1] + "</w>"]
        for i in range(1, len(parts)):
            merges.append(("".join(parts[:i]), parts[i]))
            pieces.append("".join(parts[:i + 1]))
    return {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}, list(dict.fromkeys(merges))


@torch.no_grad()
def make_tiny_22(out, generator):
    dim, prior_folder, decoder_folder = 32, out / "prior", out / "decoder"
    vocab, merges = clip_vocabulary()
    CLIPTokenizer(vocab, merges, model_max_length=77).save_pretrained(prior_folder / "tokenizer")
    common = {"hidden_size": dim, "intermediate_size": 2 * dim, "projection_dim": dim, "num_hidden_layers": 2,
              "num_attention_heads": 4, "hidden_act": "gelu", "initializer_factor": 8.0}
    CLIPTextModelWithProjection(CLIPTextConfig(
        **common, vocab_size=len(vocab), max_position_embeddings=77, bos_token_id=0, eos_token_id=1,
        pad_token_id=1)).save_pretrained(prior_folder / "text_encoder")
    vision = CLIPVisionModelWithProjection(CLIPVisionConfig(**common, image_size=32, patch_size=8)).eval()
    vision.save_pretrained(prior_folder / "image_encoder")
    write_json(prior_folder / "image_processor/preprocessor_config.json", {
        "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": 32},
        "resample": 3, "do_center_crop": True, "crop_size": {"height": 32, "width": 32}, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "do_convert_rgb": True,
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]})
    config = {"_class_name": "PriorTransformer", "num_attention_heads": 4, "attention_head_dim": 16,
              "num_layers": 2, "embedding_dim": dim}
    prior, embeds = random_network(build_prior, config), clip_images(vision, smooth_images(64, 32, generator))
    prior.clip_mean.copy_(embeds.mean(dim=0, keepdim=True))
    prior.clip_std.copy_(embeds.std(dim=0, keepdim=True))
    save_published(prior, prior_folder / "prior", config)
    write_json(prior_folder / "scheduler/scheduler_config.json", {
        "_class_name": "UnCLIPScheduler", "num_train_timesteps": 1000, "prediction_type": "sample",
        "clip_sample": True, "clip_sample_range": 5.0, "variance_type": "fixed_small_log"})
    config = {"_class_name": "UNet2DConditionModel", "block_out_channels": [32, 64], "layers_per_block": 1,
              "cross_attention_dim": 32, "encoder_hid_dim": dim, "attention_head_dim": 16, "in_channels": 4,
              "out_channels": 8, "norm_num_groups": 8,
              "down_block_types": ["ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"],
              "up_block_types": ["SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"],
              "mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "encoder_hid_dim_type": "image_proj",
              "addition_embed_type": "image", "resnet_time_scale_shift": "scale_shift"}
    save_published(random_network(build_decoder, config), decoder_folder / "unet", config)
    write_json(decoder_folder / "scheduler/scheduler_config.json", {
        "_class_name": "DDPMScheduler", "beta_schedule": "linear", "beta_start": 0.00085, "beta_end": 0.012,
        "num_train_timesteps": 1000, "prediction_type": "epsilon", "clip_sample": True,
        "clip_sample_range": 2.0, "thresholding": True, "dynamic_thresholding_ratio": 0.99,
        "sample_max_value": 2.0, "variance_type": "learned_range"})
    tiny_movq(decoder_folder, generator)


def make_tiny_3(out, generator):
    words = sorted({w for w in SENTENCES.split()})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0), *(("▁" + w, -2.0) for w in words),
              *((c, -6.0) for c in string.ascii_letters + string.digits + string.punctuation)]
    T5Tokenizer(pieces, extra_ids=0, model_max_length=128).save_pretrained(out / "tokenizer")
    T5EncoderModel(T5Config(vocab_size=len(pieces), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
                            feed_forward_proj="gated-gelu")).save_pretrained(out / "text_encoder")
    config = {"_class_name": "Kandinsky3UNet", "block_out_channels": [32, 64], "layers_per_block": 2,
              "groups": 8, "attention_head_dim": 16, "cross_attention_dim": 32, "encoder_hid_dim": 32,
              "time_embedding_dim": 64}
    save_published(random_network(build_unet3, config), out / "unet", config)
    write_json(out / "scheduler/scheduler_config.json", {
        "_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 1000,
        "prediction_type": "epsilon", "clip_sample": True, "clip_sample_range": 2.0, "thresholding": True,
        "dynamic_thresholding_ratio": 0.99, "sample_max_value": 1.5, "variance_type": "fixed_small"})
    tiny_movq(out, generator)


def make_tiny(args):
    out = Path(args.out)
    if out.exists():
        raise BadInput(f"{out}: exists already; give another --out")
    note = "Random weights: they test the commands, not the images."
    out.parent.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory(prefix=".", dir=out.parent) as tmp:
        torch.manual_seed(args.seed)
        made = Path(tmp) / out.name
        (make_tiny_22 if args.kind == "2.2" else make_tiny_3)(made, torch.Generator().manual_seed(args.seed))
        (made / "README.md").write_text(f"{note}\n", encoding="utf-8")
        os.replace(made, out)
    models = f"{out}/prior and {out}/decoder" if args.kind == "2.2" else out
    print(f"{models}: {note}")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Write a tiny Kandinsky checkpoint of random weights.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--kind", choices=("2.2", "3"), default="2.2", help="which Kandinsky")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    make_tiny(parser.parse_args(argv))


if __name__ == "__main__":
    run_command(main)
