"""The paper's released weights in our networks: their names, and the command that makes a checkpoint of them.

    python release.py --unet unet.safetensors --vae vae.safetensors --out runs/released.safetensors
"""

from command import BadInput, run_command

import argparse
from dataclasses import replace

import torch

from files import read_state, save_safetensors
from msdm import DIFFUSION, MSDM, TRAINING
from runfolder import check_savable
from text import TextEncoderReference
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig
from weights import load_state

# Rename rules


# Pairs for weights.rename, the released name first.
RELEASED_RES_NAMES = (
    ("local_embedder.1", "emb"),
    ("block_seq.0.basic_block", "unit_1"),
    ("block_seq.1.basic_block", "unit_2"),
    ("block_seq.0.conv_res", "unit_1.skip"),
)


def unet_names(config):
    """Rename rules of the paper's released U-Net; its decoder is numbered from the finest level."""
    levels = len(config.channels) - 1
    decoder = []
    for k in range(3 * levels):
        level, before = k // 3, 2 - k % 3  # three blocks a level; ours that come before this one in the level
        ours = 4 * (levels - 1 - level) + before
        decoder += [(f"out_blocks.{k}.0", f"up.{ours}.res"), (f"out_blocks.{k}.1", f"up.{ours}.text")]
        if level > 0 and before == 2:
            decoder.append((f"out_blocks.{k}.2.up_op", f"up.{ours + 1}"))
    return (
        ("time_embedder.time_emb.1", "time_mlp.0"),
        ("time_embedder.time_emb.3", "time_mlp.2"),
        ("cond_projection_linear", "text_mlp.0"),
        ("cond_projection_linear2", "text_mlp.2"),
        ("cond_pooling.attention", "text_pool"),
        ("in_conv.conv", "conv_in"),
        ("outc.conv.conv", "conv_out"),
        ("in_blocks.#.down_op", "down.#"),
        ("in_blocks.#.0", "down.#.res"),
        ("in_blocks.#.1", "down.#.text"),
        ("middle_block.0", "mid_1.res"),
        ("middle_block.1", "mid_1.text"),
        ("middle_block.2", "mid_2"),
        *decoder,
        *RELEASED_RES_NAMES,
        ("attention.in_norm.context_mlp.1", "norm_1.to_scale_shift"),
        ("attention.out_norm.context_mlp.1", "norm_2.to_scale_shift"),
        ("attention.feed_forward", "feed_forward"),
        ("attention.attention", "attention"),
    )


def vae_names(config):
    """Rename rules of the paper's released autoencoder; its decoder is numbered from the finest level."""
    last = len(config.channels) - 2
    return (
        ("inc", "down.0"),
        *((f"encoders.{i}.down_op.down_op", f"down.{2 * i + 1}") for i in range(last + 1)),
        *((f"encoders.{i}.conv_block", f"down.{2 * i + 2}") for i in range(last + 1)),
        ("out_enc.#.conv", "to_moments.#"),
        ("inc_dec", "from_latent"),
        *((f"decoders.{i}.up_op.up_op", f"up.{last - i}.0") for i in range(last + 1)),
        *((f"decoders.{i}.conv_block", f"up.{last - i}.1") for i in range(last + 1)),
        ("outc.conv", "to_img"),
        ("outc_ver.0.conv", "to_half"),
        *RELEASED_RES_NAMES,
    )


# Networks from files or state dicts


def unet_from_release(source) -> UNet:
    """The paper's U-Net from a file or a state dict in the released names; the tensors give its sizes."""
    tensors, name = _released(source)
    try:
        widths = [tensors["in_conv.conv.weight"].shape[0]]
        while (key := f"in_blocks.{3 * len(widths) - 3}.0.block_seq.0.basic_block.conv.weight") in tensors:
            widths.append(tensors[key].shape[0])
        in_channels = tensors["outc.conv.conv.weight"].shape[0]
        time_dim, text_dim = tensors["cond_projection_linear.weight"].shape
        self_conditioning = tensors["in_conv.conv.weight"].shape[1] == 2 * in_channels
    except KeyError as error:
        raise BadInput(f"{name}: not the released U-Net, it has no tensor {error}") from None
    config = UNetConfig(in_channels, tuple(widths), time_dim, text_dim, self_conditioning=self_conditioning)
    with torch.device("meta"):
        unet = UNet(config)
    return load_state(unet, tensors, name, unet_names(config)).eval()


def vae_from_release(source) -> VAE:
    """The paper's autoencoder, likewise; its latent scale is 1."""
    tensors, name = _released(source)
    try:
        widths = [tensors["inc.block_seq.0.basic_block.conv.weight"].shape[0]]
        while (key := f"encoders.{len(widths) - 1}.down_op.down_op.weight") in tensors:
            widths.append(tensors[key].shape[0])
        config = VAEConfig(tuple(widths), tensors["out_enc.1.conv.weight"].shape[0] // 2)
    except KeyError as error:
        raise BadInput(f"{name}: not the released VAE, it has no tensor {error}") from None
    with torch.device("meta"):
        vae = VAE(config)
    return load_state(vae, tensors | {"latent_scale": torch.ones(())}, name, vae_names(config)).eval()


def _released(source):
    return (source, "state dict") if isinstance(source, dict) else (read_state(source), source)


def main(argv=None):
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                     description="Turn weights of the paper's released code into a "
                                                 "checkpoint for sampler.py.")
    parser.add_argument("--unet", required=True, help="U-Net in the released names, .safetensors or .pth")
    parser.add_argument("--vae", required=True, help="autoencoder in the released names")
    parser.add_argument("--text-encoder", default=TRAINING["paper"]["text_encoder"],
                        help="CLIP text model by name or folder")
    parser.add_argument("--size", type=int, default=TRAINING["paper"]["size"],
                        help="side of the images, pixels")
    parser.add_argument("--out", required=True, help="checkpoint to write")
    args = parser.parse_args(argv)
    unet, vae = unet_from_release(args.unet), vae_from_release(args.vae)
    check_savable(args.unet, unet.state_dict())
    check_savable(args.vae, vae.state_dict())
    multiple = vae.factor * unet.config.factor
    if args.size < 1 or args.size % multiple:
        raise BadInput(f"--size {args.size}: expected a multiple of {multiple}, the downsampling of both")
    if unet.config.in_channels != vae.config.latent_channels:
        raise BadInput(f"{args.unet} works on latents of {unet.config.in_channels} channels, "
                       f"{args.vae} makes {vae.config.latent_channels}")
    diffusion = replace(DIFFUSION["paper"], image_size=args.size)
    model = MSDM(unet, vae, TextEncoderReference(args.text_encoder), diffusion, preset="paper")
    save_safetensors(args.out, model.tensors(), model.metadata())
    print(f"{args.out}: U-Net of {sum(p.numel() for p in unet.parameters()):,} and VAE of "
          f"{sum(p.numel() for p in vae.parameters()):,} parameters; text encoder {args.text_encoder}")


if __name__ == "__main__":
    run_command(main)
