"""Kandinsky 2.2 and 3.0: their networks, schedules and pipelines. Each section names its paper.

Kandinsky            arXiv:2310.03502            2.x: text -> CLIP image embedding -> MoVQ latent -> picture
unCLIP               arXiv:2204.06125  Sec. 2.2  the prior: a causal transformer that predicts x_0, the image embedding
ADM                  arXiv:2105.05233  Sec. 3    residual blocks whose scale and shift come from the embedding
Kandinsky 3          arXiv:2312.03511            text -> T5 states -> MoVQ latent -> picture
BigGAN               arXiv:1809.11096  App. B    BigGAN-deep's bottleneck blocks
iDDPM                arXiv:2102.09672  Eq. 15    a learnt variance between beta and its lower bound
Dynamic thresholding arXiv:2205.11487  Sec. 2.3  (Imagen)
Guidance             arXiv:2207.12598  Eq. 6     its w is guidance - 1
LoRA                 arXiv:2106.09685            (lora.py)
min-SNR weights      arXiv:2303.09556  Sec. 3.4

Networks are filled from folders in the published layout and names (weights.py); their autoencoder MoVQ lives in vae.py.

    python kandinsky.py train-prior --model PRIOR_FOLDER --data data/mine --out runs/prior
    python kandinsky.py train-decoder --model DECODER_FOLDER --prior PRIOR_FOLDER --data data/mine --out runs/decoder
    python kandinsky.py train-unet3 --model KANDINSKY_3_FOLDER --data data/mine --out runs/unet3
    python kandinsky.py make-tiny --out runs/tiny     # runs/tiny/prior and decoder, of random weights, to try the commands on
"""

import argparse
import math
import os
import re
import string
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import data
import lora as loras
import sampler
import training
from unet import AdaGroupNorm, CrossAttention, TextBlock, attention, sinusoidal
from vae import RES_NAMES, build_movq, load_movq
from weights import (
    BadInput,
    fetch,
    folder_hash,
    load_published,
    load_safetensors,
    read_json,
    rename,
    run_command,
    save_safetensors,
    supported,
    text_hash,
    write_json,
)

# The image prior of 2.2: unCLIP, Sec. 2.2


def time_features(t, dim):
    """The sinusoids of Kandinsky 2: cosines first, and short of the longest period."""
    return sinusoidal(t, dim, last=0).roll(dim // 2, dims=1)


class PriorBlock(nn.Module):
    def __init__(self, dim, n_heads):
        super().__init__()
        self.norm_1 = nn.LayerNorm(dim)
        self.attention = CrossAttention(dim, dim, n_heads, bias=True)
        self.norm_2 = nn.LayerNorm(dim)
        self.feed_forward = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x, mask):
        y = self.norm_1(x)
        x = x + self.attention(y, y, mask)
        return x + self.feed_forward(self.norm_2(x))


class Prior(nn.Module):
    """forward(x, t, text_embed, text_states, text_mask) -> the normalised CLIP image embedding x_0 (b, d).

    x (b, d) noisy x_0, text_embed (b, d), text_states (b, 77, d), text_mask (b, 77) true at tokens. The sequence is the
    text states, the text embedding, the time, x and a learnt query, whose output is the answer; each looks back only.
    """

    published_names = (
        ("transformer_blocks.#", "blocks.#"),
        ("attn1", "attention"),
        ("ff.net.0.proj", "feed_forward.0"),
        ("ff.net.2", "feed_forward.2"),
        ("norm1", "norm_1"),
        ("norm3", "norm_2"),
        ("time_embedding.linear_1", "time_mlp.0"),
        ("time_embedding.linear_2", "time_mlp.2"),
        ("encoder_hidden_states_proj", "from_states"),
        ("embedding_proj", "from_embed"),
        ("proj_in", "from_x"),
        ("prd_embedding", "query"),
        ("positional_embedding", "positions"),
        ("proj_to_clip_embeddings", "to_embed"),
    )

    def __init__(self, embed_dim, dim, n_heads, n_layers, n_tokens):
        super().__init__()
        self.gradient_checkpointing = False
        self.time_mlp = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.from_states = nn.Linear(embed_dim, dim)
        self.from_embed = nn.Linear(embed_dim, dim)
        self.from_x = nn.Linear(embed_dim, dim)
        self.query = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(torch.zeros(1, n_tokens + 4, dim))
        self.blocks = nn.ModuleList(PriorBlock(dim, n_heads) for _ in range(n_layers))
        self.norm_out = nn.LayerNorm(dim)
        self.to_embed = nn.Linear(dim, embed_dim)
        self.clip_mean = nn.Parameter(torch.zeros(1, embed_dim), requires_grad=False)
        self.clip_std = nn.Parameter(torch.ones(1, embed_dim), requires_grad=False)

    def forward(self, x, t, text_embed, text_states, text_mask):
        emb = self.time_mlp(time_features(t, self.positions.shape[-1]).to(x.dtype))
        one_each = torch.stack([self.from_embed(text_embed), emb, self.from_x(x)], dim=1)
        tokens = torch.cat([self.from_states(text_states), one_each, self.query.expand(len(x), -1, -1)], dim=1)
        tokens = tokens + self.positions
        n = tokens.shape[1]
        past = torch.ones(n, n, dtype=torch.bool, device=x.device).tril()
        mask = past & F.pad(text_mask.bool(), (0, 4), value=True)[:, None]  # (b, n, n)
        for block in self.blocks:
            tokens = run(self, block, tokens, mask)
        return self.to_embed(self.norm_out(tokens[:, -1]))

    def normalise(self, embed):
        return (embed - self.clip_mean) / self.clip_std

    def denormalise(self, x_0):
        return x_0 * self.clip_std + self.clip_mean


def run(network, block, *args):
    """block(*args); while training with gradient checkpointing its inside is forgotten and computed again."""
    if network.gradient_checkpointing and torch.is_grad_enabled():
        return checkpoint(block, *args, use_reentrant=False)
    return block(*args)


def build_prior(config: dict):
    """The prior from its published config.json."""
    c = supported(
        config, "prior", "PriorTransformer",
        free={"num_attention_heads": 32, "attention_head_dim": 64, "num_layers": 20, "embedding_dim": 768,
              "num_embeddings": 77},
        fixed={"additional_embeddings": (4,), "dropout": (0.0,), "time_embed_act_fn": ("silu",),
               "encoder_hid_proj_type": ("linear",), "added_emb_type": ("prd",), "norm_in_type": (None,),
               "embedding_proj_norm_type": (None,), "time_embed_dim": (None,), "embedding_proj_dim": (None,),
               "clip_embed_dim": (None,)})
    return Prior(c["embedding_dim"], c["num_attention_heads"] * c["attention_head_dim"], c["num_attention_heads"],
                 c["num_layers"], c["num_embeddings"])


def load_prior(folder, dtype=torch.float32):
    return load_published(build_prior, folder, dtype)


# The decoder of 2.2: a U-Net from an image embedding to a MoVQ latent (Kandinsky; its blocks: ADM, Sec. 3)


class DecoderResBlock(nn.Module):
    """Two convolutions, scaled and shifted between by the embedding; resample changes the resolution of both paths."""

    def __init__(self, in_ch, out_ch, emb_dim, groups, resample=None):
        super().__init__()
        self.norm_1 = nn.GroupNorm(groups, in_ch)
        self.conv_1 = nn.Conv2d(in_ch, out_ch, 3, padding=1)
        self.emb = nn.Linear(emb_dim, 2 * out_ch)
        self.norm_2 = nn.GroupNorm(groups, out_ch)
        self.conv_2 = nn.Conv2d(out_ch, out_ch, 3, padding=1)
        self.skip = nn.Conv2d(in_ch, out_ch, 1) if in_ch != out_ch else nn.Identity()
        self.resample = resample or (lambda x: x)

    def forward(self, x, emb):
        y = self.conv_1(self.resample(F.silu(self.norm_1(x))))
        scale, shift = self.emb(F.silu(emb))[:, :, None, None].chunk(2, dim=1)
        y = self.conv_2(F.silu(self.norm_2(y) * (1 + scale) + shift))
        return self.skip(self.resample(x)) + y


def halve(x):
    return F.avg_pool2d(x, 2)


def double(x):
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class ImageAttention(nn.Module):
    """The pixels look at the image tokens and at each other in one softmax: keys and values of both, side by side."""

    def __init__(self, ch, token_dim, head_dim, groups):
        super().__init__()
        self.n_heads = ch // head_dim
        self.norm = nn.GroupNorm(groups, ch)
        self.to_q, self.to_k, self.to_v = nn.Linear(ch, ch), nn.Linear(ch, ch), nn.Linear(ch, ch)
        self.token_k, self.token_v = nn.Linear(token_dim, ch), nn.Linear(token_dim, ch)
        self.to_out = nn.ModuleList([nn.Linear(ch, ch)])

    def forward(self, x, tokens):
        h, w = x.shape[-2:]
        y = self.norm(x.flatten(2)).transpose(1, 2)  # (b, h * w, c)
        k = torch.cat([self.token_k(tokens), self.to_k(y)], dim=1)
        v = torch.cat([self.token_v(tokens), self.to_v(y)], dim=1)
        y = self.to_out[0](attention(self.to_q(y), k, v, self.n_heads))
        return rearrange(y, "b (h w) c -> b c h w", h=h, w=w) + x


class DecoderLevel(nn.Module):
    """Residual blocks, the first of them followed by attention where there is some, then a change of resolution."""

    def __init__(self, res, attn=(), resample=None):
        super().__init__()
        self.res, self.attn, self.resample = nn.ModuleList(res), nn.ModuleList(attn), resample

    def stage(self, i, x, emb, tokens):
        x = self.res[i](x, emb)
        return self.attn[i](x, tokens) if i < len(self.attn) else x


class Decoder(nn.Module):
    """forward(z, t, image_embed) -> (b, 8, h, w): eps and, behind it, the place of the variance in iDDPM, Eq. 15.

    z (b, 4, h, w) noisy MoVQ latent, image_embed (b, d) CLIP image embedding, not normalised.
    """

    published_names = (
        *RES_NAMES,
        ("down.#.downsamplers.0", "down.#.resample"),
        ("up.#.upsamplers.0", "up.#.resample"),
        ("time_emb_proj", "emb"),
        ("add_k_proj", "token_k"),
        ("add_v_proj", "token_v"),
        ("time_embedding.linear_1", "time_mlp.0"),
        ("time_embedding.linear_2", "time_mlp.2"),
        ("add_embedding.image_proj", "image_mlp.0"),
        ("add_embedding.image_norm", "image_mlp.1"),
        ("encoder_hid_proj.image_embeds", "to_tokens"),
        ("encoder_hid_proj.norm", "token_norm"),
    )

    def __init__(self, widths, attention, n_res, image_dim, token_dim, head_dim, in_ch, out_ch, groups):
        super().__init__()
        self.gradient_checkpointing = False
        emb_dim = 4 * widths[0]
        self.time_mlp = nn.Sequential(nn.Linear(widths[0], emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
        self.image_mlp = nn.Sequential(nn.Linear(image_dim, emb_dim), nn.LayerNorm(emb_dim))
        self.to_tokens = nn.Linear(image_dim, 32 * token_dim)  # 32 tokens
        self.token_norm = nn.LayerNorm(token_dim)
        self.conv_in = nn.Conv2d(in_ch, widths[0], 3, padding=1)

        def res(a, b, resample=None):
            return DecoderResBlock(a, b, emb_dim, groups, resample)

        def attn(ch, n):
            return [ImageAttention(ch, token_dim, head_dim, groups) for _ in range(n)]

        self.down, ch, skips = nn.ModuleList(), widths[0], [widths[0]]  # skips: widths that the way up takes back
        for i, (width, has_attention) in enumerate(zip(widths, attention, strict=True)):
            blocks = [res(ch if j == 0 else width, width) for j in range(n_res)]
            last = i + 1 == len(widths)
            self.down.append(DecoderLevel(blocks, attn(width, n_res * has_attention),
                                          None if last else res(width, width, halve)))
            ch, skips = width, skips + [width] * (n_res + (not last))
        self.mid = DecoderLevel([res(ch, ch), res(ch, ch)], attn(ch, 1))
        self.up = nn.ModuleList()  # from the smallest picture to the largest
        for i in reversed(range(len(widths))):
            blocks = [res((ch if j == 0 else widths[i]) + skips.pop(), widths[i]) for j in range(n_res + 1)]
            ch = widths[i]
            self.up.append(DecoderLevel(blocks, attn(ch, (n_res + 1) * attention[i]),
                                        res(ch, ch, double) if i > 0 else None))
        self.norm_out = nn.GroupNorm(groups, ch)
        self.conv_out = nn.Conv2d(ch, out_ch, 3, padding=1)

    def forward(self, z, t, image_embed):
        emb = self.time_mlp(time_features(t, self.time_mlp[0].in_features).to(z.dtype)) + self.image_mlp(image_embed)
        tokens = self.token_norm(rearrange(self.to_tokens(image_embed), "b (n d) -> b n d", n=32))
        x = self.conv_in(z)
        skips = [x]
        for level in self.down:
            for i in range(len(level.res)):
                x = run(self, level.stage, i, x, emb, tokens)
                skips.append(x)
            if level.resample is not None:
                x = level.resample(x, emb)
                skips.append(x)
        for i in range(2):
            x = run(self, self.mid.stage, i, x, emb, tokens)
        for level in self.up:
            for i in range(len(level.res)):
                x = run(self, level.stage, i, torch.cat([x, skips.pop()], dim=1), emb, tokens)
            if level.resample is not None:
                x = level.resample(x, emb)
        return self.conv_out(F.silu(self.norm_out(x)))


def build_decoder(config: dict):
    """The decoder U-Net from its published config.json."""
    down = ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D")  # without, with attention
    up = ("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D")
    off = ("center_input_sample", "only_cross_attention", "dual_cross_attention", "use_linear_projection",
           "class_embed_type", "addition_time_embed_dim", "num_class_embeds", "resnet_skip_time_act",
           "time_embedding_dim", "time_embedding_act_fn", "timestep_post_act", "time_cond_proj_dim",
           "projection_class_embeddings_input_dim",
           "class_embeddings_concat", "mid_block_only_cross_attention", "cross_attention_norm", "num_attention_heads",
           "reverse_transformer_layers_per_block", "upcast_attention")
    c = supported(
        config, "decoder U-Net", "UNet2DConditionModel",
        free={"block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2, "cross_attention_dim": 1280,
              "encoder_hid_dim": None, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4,
              "norm_num_groups": 32, "down_block_types": (), "up_block_types": (),
              "sample_size": None, "addition_embed_type_num_heads": 64},  # these two change nothing here
        fixed={"mid_block_type": ("UNetMidBlock2DSimpleCrossAttn",), "encoder_hid_dim_type": ("image_proj",),
               "addition_embed_type": ("image",), "resnet_time_scale_shift": ("scale_shift",), "act_fn": ("silu",),
               "norm_eps": (1e-5,), "flip_sin_to_cos": (True,), "freq_shift": (0,), "conv_in_kernel": (3,),
               "time_embedding_type": ("positional",), "conv_out_kernel": (3,), "downsample_padding": (1,),
               "dropout": (0.0,), "mid_block_scale_factor": (1,), "resnet_out_scale_factor": (1,),
               "transformer_layers_per_block": (1,), "attention_type": ("default",),
               **dict.fromkeys(off, (None, False))})
    n = len(c["block_out_channels"])
    attention = [kind == down[1] for kind in c["down_block_types"]]
    if list(c["down_block_types"]) != [down[a] for a in attention] or len(attention) != n:
        raise BadInput(f"decoder U-Net: not supported: down_block_types={c['down_block_types']!r}")
    if list(c["up_block_types"]) != [up[a] for a in reversed(attention)]:
        raise BadInput(f"decoder U-Net: not supported: up_block_types={c['up_block_types']!r}, unlike the way down")
    for key in ("layers_per_block", "attention_head_dim", "cross_attention_dim", "encoder_hid_dim"):
        if not isinstance(c[key], int):
            raise BadInput(f"decoder U-Net: not supported: {key}={c[key]!r}, expected one whole number")
    return Decoder(c["block_out_channels"], attention, c["layers_per_block"], c["encoder_hid_dim"],
                   c["cross_attention_dim"], c["attention_head_dim"], c["in_channels"], c["out_channels"],
                   c["norm_num_groups"])


def load_decoder(folder, dtype=torch.float32):
    return load_published(build_decoder, folder, dtype)


# The U-Net of 3.0: blocks of BigGAN-deep, attention of the pixels to themselves and to the text (Kandinsky 3)


class BigGANUnit(nn.Module):
    """Normalise with the embedding, SiLU, convolve; the picture doubles before the convolution or halves behind it."""

    def __init__(self, in_ch, out_ch, kernel, emb_dim, groups, up=False, down=False):
        super().__init__()
        self.norm = AdaGroupNorm(in_ch, emb_dim, groups)
        self.up = nn.ConvTranspose2d(in_ch, in_ch, 2, stride=2) if up else nn.Identity()
        self.conv = nn.Conv2d(in_ch, out_ch, kernel, padding=kernel // 2)
        self.down = nn.Conv2d(out_ch, out_ch, 2, stride=2) if down else nn.Identity()

    def forward(self, x, emb):
        return self.down(self.conv(self.up(F.silu(self.norm(x, emb)))))


class BigGANBlock(nn.Module):
    """A residual bottleneck of four units, 1x1, 3x3, 3x3, 1x1, at half the width (BigGAN, App. B)."""

    def __init__(self, in_ch, out_ch, emb_dim, groups, up=False, down=False):
        super().__init__()
        mid = max(in_ch, out_ch) // 2
        self.units = nn.ModuleList([
            BigGANUnit(in_ch, mid, 1, emb_dim, groups),
            BigGANUnit(mid, mid, 3, emb_dim, groups, up=up),
            BigGANUnit(mid, mid, 3, emb_dim, groups, down=down),
            BigGANUnit(mid, out_ch, 1, emb_dim, groups),
        ])
        self.skip_up = nn.ConvTranspose2d(in_ch, in_ch, 2, stride=2) if up else nn.Identity()
        self.skip = nn.Conv2d(in_ch, out_ch, 1) if in_ch != out_ch else nn.Identity()
        self.skip_down = nn.Conv2d(out_ch, out_ch, 2, stride=2) if down else nn.Identity()

    def forward(self, x, emb):
        y = x
        for unit in self.units:
            y = unit(y, emb)
        return self.skip_down(self.skip(self.skip_up(x))) + y


class UNet3Level(nn.Module):
    """Layers of block, cross-attention, block; widths: (in, between, out) of each.

    attn[0] is the self-attention of the level, those behind it belong to the layers; a level without has none at all.
    """

    def __init__(self, widths, self_ch, has_attention, emb_dim, text_dim, head_dim, groups, up=False, down=False):
        super().__init__()

        def attend(ch, to_dim):
            return TextBlock(ch, emb_dim, to_dim, ch // head_dim, groups=groups)

        self.res_in, self.res_out, self.attn = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        if has_attention:
            self.attn.append(attend(self_ch, self_ch))
        for i, (in_ch, ch, out_ch) in enumerate(widths):
            self.res_in.append(BigGANBlock(in_ch, ch, emb_dim, groups, up=up and i == 0))
            if has_attention:
                self.attn.append(attend(ch, text_dim))
            self.res_out.append(BigGANBlock(ch, out_ch, emb_dim, groups, down=down and i + 1 == len(widths)))

    def layer(self, i, x, emb, text, text_mask):
        x = self.res_in[i](x, emb)
        if self.attn:
            x = self.attn[i + 1](x, emb, text, text_mask)
        return self.res_out[i](x, emb)


class UNet3(nn.Module):
    """forward(z, t, text, text_mask, text_length=None) -> eps (b, 4, h, w).

    z (b, 4, h, w) noisy MoVQ latent, text (b, n, d) T5 states with zeros at padding, text_mask (b, n) true at tokens.
    A row without a token is the null condition. The pooled text is a mean over the first text_length (b,) positions of a
    row, padding included; None: over all n, as published, so that a row depends on the longest of its batch.
    """

    published_names = (
        *RES_NAMES,
        ("resnets_in.#", "res_in.#"),
        ("resnets_out.#", "res_out.#"),
        ("resnet_blocks.#", "units.#"),
        ("shortcut_up_sample", "skip_up"),
        ("shortcut_projection", "skip"),
        ("shortcut_down_sample", "skip_down"),
        ("units.#.up_sample", "units.#.up"),
        ("projection", "conv"),
        ("units.#.down_sample", "units.#.down"),
        ("group_norm.context_mlp.1", "norm.to_scale_shift"),
        ("in_norm.context_mlp.1", "norm_1.to_scale_shift"),
        ("out_norm.context_mlp.1", "norm_2.to_scale_shift"),
        ("time_embedding.linear_1", "time_mlp.0"),
        ("time_embedding.linear_2", "time_mlp.2"),
        ("encoder_hid_proj.projection_linear", "text_mlp.0"),
        ("encoder_hid_proj.projection_norm", "text_mlp.1"),
        ("add_time_condition.attention", "text_pool"),
    )

    def __init__(self, widths, n_layers, emb_dim, text_in, text_dim, head_dim, in_ch, groups):
        super().__init__()
        self.gradient_checkpointing = False
        first = widths[0] // 2
        self.time_mlp = nn.Sequential(nn.Linear(first, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
        self.text_mlp = nn.Sequential(nn.Linear(text_in, text_dim, bias=False), nn.LayerNorm(text_dim))
        self.text_pool = CrossAttention(text_dim, text_dim, emb_dim // head_dim, out_dim=emb_dim)
        self.conv_in = nn.Conv2d(in_ch, first, 3, padding=1)
        common = emb_dim, text_dim, head_dim, groups
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        above = [first, *widths[:-1]]  # the width that a level gets from above, and gives back
        for i, (outer, ch) in enumerate(zip(above, widths, strict=True)):
            layers = [(outer if j == 0 else ch, ch, ch) for j in range(n_layers)]
            self.down.append(UNet3Level(layers, outer, i > 0, *common, down=i + 1 < len(widths)))
        for i in reversed(range(len(widths))):
            outer, ch, lowest = above[i], widths[i], i + 1 == len(widths)
            both = ch if lowest else 2 * ch  # with the skip
            layers = [(both, both, ch), *[(ch, ch, ch)] * (n_layers - 2), (ch, ch, outer)]
            self.up.append(UNet3Level(layers, outer, i > 0, *common, up=not lowest))
        self.norm_out = nn.GroupNorm(groups, first)
        self.conv_out = nn.Conv2d(first, in_ch, 3, padding=1)

    def forward(self, z, t, text, text_mask, text_length=None):
        text_mask = text_mask.bool()
        text_mask = text_mask | ~text_mask.any(dim=1, keepdim=True)  # all masked is none masked: softmax needs a key
        text = self.text_mlp(text)
        if text_length is None:
            mean = text.mean(dim=1, keepdim=True)
        else:
            counted = torch.arange(text.shape[1], device=text.device) < text_length[:, None]
            mean = (text * counted[..., None]).sum(dim=1, keepdim=True) / text_length.to(text.dtype)[:, None, None]
        pooled = self.text_pool(mean, text, text_mask)[:, 0]
        emb = self.time_mlp(sinusoidal(t, self.time_mlp[0].in_features).to(z.dtype)) + pooled
        x, skips = self.conv_in(z), []
        for level in self.down:
            if level.attn:
                x = run(self, level.attn[0], x, emb)
            for i in range(len(level.res_in)):
                x = run(self, level.layer, i, x, emb, text, text_mask)
            skips.append(x)
        skips.pop()
        for n, level in enumerate(self.up):
            if n > 0:
                x = torch.cat([x, skips.pop()], dim=1)
            for i in range(len(level.res_in)):
                x = run(self, level.layer, i, x, emb, text, text_mask)
            if level.attn:
                x = run(self, level.attn[0], x, emb)
        return self.conv_out(F.silu(self.norm_out(x)))


def build_unet3(config: dict):
    """The U-Net of Kandinsky 3 from its published config.json."""
    c = supported(
        config, "U-Net 3", "Kandinsky3UNet",
        free={"in_channels": 4, "time_embedding_dim": 1536, "groups": 32, "attention_head_dim": 64,
              "layers_per_block": 3, "block_out_channels": (384, 768, 1536, 3072), "cross_attention_dim": 4096,
              "encoder_hid_dim": 4096},
        fixed={})
    for key in ("layers_per_block", "cross_attention_dim"):
        if not isinstance(c[key], int) or c[key] < 2:
            raise BadInput(f"U-Net 3: not supported: {key}={c[key]!r}, expected one whole number from 2")
    return UNet3(c["block_out_channels"], c["layers_per_block"], c["time_embedding_dim"], c["encoder_hid_dim"],
                 c["cross_attention_dim"], c["attention_head_dim"], c["in_channels"], c["groups"])


def load_unet3(folder, dtype=torch.float32):
    return load_published(build_unet3, folder, dtype)


# Schedules: what a published scheduler_config.json says, in terms of sampler.py


@dataclass
class Schedule:
    alpha_bar: torch.Tensor
    prediction: str  # "eps" or "x_0": what the network says
    clip: float | None  # x_0 is cut to [-clip, clip]
    threshold: tuple[float, float] | None  # dynamic thresholding instead: the quantile of |x_0|, and the largest bound
    learned_variance: bool
    spacing: str
    offset: int
    unclip: bool  # from the scheduler of that name, which rounds in a way of its own

    def timesteps(self, steps):
        if not 1 <= steps <= len(self.alpha_bar):
            raise BadInput(f"--steps {steps}: expected 1 to {len(self.alpha_bar)}")
        return sampler.timesteps(len(self.alpha_bar), steps, self.spacing, self.offset)

    def bound(self, x_0):
        if self.threshold is not None:
            return dynamic_threshold(x_0, *self.threshold)
        return x_0 if self.clip is None else x_0.clamp(-self.clip, self.clip)


def dynamic_threshold(x_0, quantile, largest):
    """Cut x_0 to [-s, s] and divide by s, the quantile of its absolute values, at least 1 (Imagen, Sec. 2.3)."""
    s = torch.quantile(x_0.flatten(1).abs(), quantile, dim=1).clamp(1, largest)
    s = s.view(-1, *[1] * (x_0.ndim - 1))
    return x_0.clamp(-s, s) / s


def read_schedule(folder):
    """The Schedule of a folder with scheduler_config.json."""
    path = Path(folder) / "scheduler_config.json"
    config = read_json(path)
    names = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
    predictions = {"epsilon": "eps", "sample": "x_0"}
    variances = ("fixed_small", "fixed_small_log", "learned_range")  # the first two are one: the posterior's variance
    unclip = config.get("_class_name") == "UnCLIPScheduler"
    c = supported(
        config, path, "UnCLIPScheduler" if unclip else "DDPMScheduler",
        free={"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2" if unclip else "linear",
              "beta_start": 0.0001, "beta_end": 0.02, "prediction_type": "epsilon", "clip_sample": True,
              "clip_sample_range": 1.0, "thresholding": False, "dynamic_thresholding_ratio": 0.995,
              "sample_max_value": 1.0, "variance_type": "fixed_small_log" if unclip else "fixed_small",
              "timestep_spacing": "linspace" if unclip else "leading", "steps_offset": 0},
        fixed={"trained_betas": (None,), "rescale_betas_zero_snr": (False,)})
    for key, known in (("beta_schedule", names), ("prediction_type", predictions), ("variance_type", variances),
                       ("timestep_spacing", ("leading", "trailing", "linspace"))):
        if c[key] not in known:
            raise BadInput(f"{path}: not supported: {key}={c[key]!r}, expected one of {', '.join(known)}")
    alpha_bar = sampler.schedule(names[c["beta_schedule"]], c["num_train_timesteps"], c["beta_start"], c["beta_end"])
    return Schedule(alpha_bar, predictions[c["prediction_type"]], c["clip_sample_range"] if c["clip_sample"] else None,
                    (c["dynamic_thresholding_ratio"], c["sample_max_value"]) if c["thresholding"] else None,
                    c["variance_type"] == "learned_range", c["timestep_spacing"], c["steps_offset"], unclip)


def denoiser(predict, schedule, alpha_bar, timesteps):
    """denoise(x_t, t) -> (x_0, log_variance or None) for a solver; predict(x_t, t) -> (eps or x_0, v or None)."""
    alpha_bar = F.pad(alpha_bar, (0, 1), value=1)  # alpha_bar[-1]: no noise is left
    after = dict(zip(timesteps.tolist(), [*timesteps[1:].tolist(), -1], strict=True))

    def denoise(x_t, t):
        times = torch.full((len(x_t),), t, dtype=torch.int64, device=x_t.device)
        out, v = predict(x_t, times)
        x_0 = out if schedule.prediction == "x_0" else sampler.to_x_0("eps", out, x_t, alpha_bar[t].to(x_t))
        if not schedule.learned_variance:
            return schedule.bound(x_0), None
        a_t, a_s = alpha_bar[t], alpha_bar[after[t]]
        beta = 1 - a_t / a_s
        smallest = (beta * (1 - a_s) / (1 - a_t)).clamp(min=1e-20)
        v = (v + 1) / 2
        return schedule.bound(x_0), v * beta.log().item() + (1 - v) * smallest.log().item()  # iDDPM, Eq. 15

    return denoise


def guided(network, cond, null, guidance):
    """predict(x_t, t): uncond + guidance (cond - uncond), and the conditional output; both conditions in one batch.

    cond and null are tuples of what the network is given after x_t and t. Guidance 1 asks the network once a step.
    """
    dtype = next(network.parameters()).dtype

    def ask(x_t, t, *condition):
        return network(x_t.to(dtype), t, *(c.to(dtype) if c.is_floating_point() else c for c in condition)).float()

    if guidance == 1:
        return lambda x_t, t: (ask(x_t, t, *cond),) * 2
    both = [torch.cat(pair) for pair in zip(null, cond, strict=True)]

    def predict(x_t, t):
        out_null, out = ask(torch.cat([x_t, x_t]), torch.cat([t, t]), *both).chunk(2)
        return guidance * out - (guidance - 1) * out_null, out

    return predict


def reference_ddpm(predict, schedule, timesteps, x_t, noise):
    """sampler.ddpm with the reference's float32 rounding, operation by operation.

    In exact arithmetic they are the same. But a network may amplify the last bit of x_T to 1 % of the picture, and then
    only this gives the picture of a seed published elsewhere.
    """
    beta = (1 - schedule.alpha_bar / F.pad(schedule.alpha_bar[:-1], (1, 0), value=1)).float()
    alpha_bar = torch.cumprod(1 - beta, dim=0)
    denoise = denoiser(predict, schedule, alpha_bar, timesteps)
    one = torch.ones(())
    for i, t in enumerate(timesteps.tolist()):
        s = int(timesteps[i + 1]) if i + 1 < len(timesteps) else -1
        a_t, a_s = alpha_bar[t], alpha_bar[s] if s >= 0 else one
        x_0, log_variance = denoise(x_t, t)
        # The older scheduler takes beta from its table between neighbours: 1.0006 x_0 instead of x_0 in the last step.
        beta_t = beta[t] if schedule.unclip and s == t - 1 else 1 - a_t / a_s
        x_t = a_s.sqrt() * beta_t / (1 - a_t) * x_0 + (a_t / a_s).sqrt() * (1 - a_s) / (1 - a_t) * x_t
        if s >= 0:
            sigma = ((1 - a_s) / (1 - a_t) * beta_t).sqrt() if log_variance is None else (0.5 * log_variance).exp()
            x_t = x_t + sigma * noise(i)
    return x_t


def solve(predict, schedule, steps, solver, draw, shape, device):
    """x_0 of the given shape; x_T and every step's noise are drawn in order. solver: one of sampler.SOLVERS or reference."""
    timesteps = schedule.timesteps(steps)
    x_T = draw(*shape).to(device)

    def noise(i):
        return draw(*shape).to(device)

    if solver == "reference":
        return reference_ddpm(predict, schedule, timesteps, x_T, noise)
    denoise = denoiser(predict, schedule, schedule.alpha_bar, timesteps)
    return sampler.SOLVERS[solver](denoise, x_T, schedule.alpha_bar, timesteps, noise)


def latent_shape(n, height, width, s):
    """The reference's latent: whole blocks of s x s pixels, s cells each, at least as large as the picture asked for."""
    return n, 4, math.ceil(height / s**2) * s, math.ceil(width / s**2) * s


def from_generator(generator):
    """draw(n, ...) from one generator, as a reference pipeline draws."""
    return lambda *shape: torch.randn(shape, generator=generator)


def from_seeds(seeds):
    """draw(n, ...) with a generator a picture; n may be a multiple of the pictures, each then gives as many rows."""
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    return lambda n, *shape: torch.stack([torch.randn(shape, generator=g) for g in generators * (n // len(generators))])


def to_uint8(img):
    return ((img.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def in_batches(pipeline, prompts, seed, batch_size, **settings):
    batches = [range(i, min(i + batch_size, len(prompts))) for i in range(0, len(prompts), batch_size)]
    return torch.cat([pipeline.sample_batch([prompts[i] for i in b], [seed + i for i in b], **settings) for b in batches])


def alone_on_a_cpu(sample_batch):
    """On a CPU one picture at a time: a batch gains next to nothing there, and its size would move a picture's last bits."""
    def sample(self, prompts, seeds, *args, **kwargs):
        if self.device.type != "cpu":
            return sample_batch(self, prompts, seeds, *args, **kwargs)
        return torch.cat([sample_batch(self, [p], [s], *args, **kwargs) for p, s in zip(prompts, seeds, strict=True)])

    return sample


def load_tower(cls, folder, dtype=None):
    """A tokenizer, or a text or image encoder, frozen, of transformers from a folder."""
    try:
        if dtype is None:
            return cls.from_pretrained(folder, local_files_only=True)
        return cls.from_pretrained(folder, dtype=dtype, local_files_only=True).requires_grad_(False).eval()
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BadInput(f"{folder}: {cls.__name__} does not load from it ({reason})") from None


# The pipeline of 2.2


def clip_texts(text_encoder, tokenizer, prompts):
    """(text embedding (b, d), states (b, 77, d), mask (b, 77)); the text encoder itself sees no mask."""
    tokens = tokenizer(prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True,
                       return_tensors="pt").to(text_encoder.device)
    out = text_encoder(tokens.input_ids)
    return out.text_embeds, out.last_hidden_state, tokens.attention_mask.bool()


def clip_images(image_encoder, pixels):
    """CLIP embedding (b, d) of pictures as CLIP wants them."""
    return image_encoder(pixels.to(image_encoder.device, image_encoder.dtype)).image_embeds


def clip_black(image_encoder):
    """The embedding (1, d) of zeros, the decoder's null condition."""
    size = image_encoder.config.image_size
    return clip_images(image_encoder, torch.zeros(1, 3, size, size))


class Kandinsky22:
    """text -> image embedding -> picture. embed and decode repeat the reference seed for seed; sample is for use."""

    def __init__(self, prior, prior_schedule, text_encoder, tokenizer, image_encoder, decoder, decoder_schedule, movq):
        self.prior, self.prior_schedule = prior, prior_schedule
        self.text_encoder, self.tokenizer, self.image_encoder = text_encoder, tokenizer, image_encoder
        self.decoder, self.decoder_schedule, self.movq = decoder, decoder_schedule, movq

    @classmethod
    def from_pretrained(cls, prior, decoder, prior_lora=None, decoder_lora=None, dtype=torch.float32):
        """prior, decoder: published folders or names on the hub; adapters: PEFT folders. MoVQ stays in float32."""
        from transformers import CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection

        prior, decoder = fetch(prior), fetch(decoder)
        networks = load_prior(prior / "prior", dtype), load_decoder(decoder / "unet", dtype)
        for network, adapter in zip(networks, (prior_lora, decoder_lora), strict=True):
            if adapter is not None:
                loras.load(network, adapter)
        return cls(networks[0], read_schedule(prior / "scheduler"),
                   load_tower(CLIPTextModelWithProjection, prior / "text_encoder", dtype),
                   load_tower(CLIPTokenizer, prior / "tokenizer"),
                   load_tower(CLIPVisionModelWithProjection, prior / "image_encoder", dtype),
                   networks[1], read_schedule(decoder / "scheduler"), load_movq(decoder / "movq"))

    @property
    def device(self):
        return self.prior.query.device

    def to(self, device):
        for module in (self.prior, self.text_encoder, self.image_encoder, self.decoder, self.movq):
            module.to(device)
        return self

    @property
    def T(self):
        return min(len(self.prior_schedule.alpha_bar), len(self.decoder_schedule.alpha_bar))

    def encode_text(self, prompts):
        return clip_texts(self.text_encoder, self.tokenizer, prompts)

    def embed(self, prompts, steps=25, guidance=4.0, generator=None, negative_prompt=None):
        """(image embeddings, negative ones), both (b, d), drawn from one generator."""
        return self._embed(prompts, steps, guidance, from_generator(generator), negative_prompt, "reference")

    @torch.inference_mode()
    def _embed(self, prompts, steps, guidance, draw, negative_prompt, solver):
        # A negative prompt gets an image embedding of its own from the same run; without one a black picture's serves.
        n, negative = len(prompts), [] if negative_prompt is None else [negative_prompt] * len(prompts)
        everything = [*prompts, *negative]
        null = self.encode_text([negative_prompt or ""] * len(everything))
        predict = guided(self.prior, self.encode_text(everything), null, guidance)
        shape = (len(everything), self.prior.clip_mean.shape[-1])
        embeds = self.prior.denormalise(solve(predict, self.prior_schedule, steps, solver, draw, shape, self.device))
        if negative:
            return embeds[:n], embeds[n:]
        return embeds, clip_black(self.image_encoder).expand_as(embeds)

    def decode(self, image_embeds, negative_image_embeds, steps, guidance, height, width, generator):
        """Pictures (b, 3, height, width) in about [-1, 1], drawn from one generator."""
        draw = from_generator(generator)
        return self._decode(image_embeds, negative_image_embeds, steps, guidance, height, width, draw, "reference")

    @torch.inference_mode()
    def _decode(self, image_embeds, negative_image_embeds, steps, guidance, height, width, draw, solver):
        shape = latent_shape(len(image_embeds), height, width, self.movq.factor)
        predict = guided(self.decoder, (image_embeds,), (negative_image_embeds,), guidance)

        def eps_and_variance(x_t, t):  # guidance is for eps; the variance is that of the condition
            out, cond = predict(x_t, t)
            return out[:, :4], cond[:, 4:]

        return self.movq.decode(solve(eps_and_variance, self.decoder_schedule, steps, solver, draw, shape, self.device))

    def sample(self, prompts, seed=0, steps=50, guidance=4.0, height=512, width=512, batch_size=16, **settings):
        """uint8 (b, 3, h, w); picture i depends on its prompt and on seed + i alone. settings: see sample_batch."""
        return in_batches(self, prompts, seed, batch_size, steps=steps, guidance=guidance, height=height, width=width, **settings)

    @alone_on_a_cpu
    def sample_batch(self, prompts, seeds, steps=50, solver="ddpm", guidance=4.0, negative_prompt="", height=512, width=512,
                     prior_steps=25):
        """One batch: a prompt and a seed for each picture. steps are the decoder's."""
        draw = from_seeds(seeds)
        embeds = self._embed(prompts, prior_steps, guidance, draw, negative_prompt or None, solver)
        return to_uint8(self._decode(*embeds, steps, guidance, height, width, draw, solver))


# The pipeline of 3.0


class Kandinsky3:
    """text -> T5 states -> picture. generate repeats the reference seed for seed; sample is for use.

    The text encoder is the largest part by far: it is loaded when it is needed, and sample frees it before it draws.
    """

    n_tokens = 128

    def __init__(self, unet, schedule, text_folder, text_dtype, text_device, tokenizer, movq):
        self.unet, self.schedule, self.tokenizer, self.movq = unet, schedule, tokenizer, movq
        self.text_folder, self.text_dtype, self.text_device = text_folder, text_dtype, text_device
        self.text_encoder, self.texts = None, {}

    @classmethod
    def from_pretrained(cls, folder, lora=None, dtype=torch.float32, text_device=None):
        """A published folder or a name on the hub; lora: a PEFT folder. MoVQ stays in float32, T5 is never in float16."""
        from transformers import AutoTokenizer

        folder = fetch(folder)
        unet = load_unet3(folder / "unet", dtype)
        if lora is not None:
            loras.load(unet, lora)
        return cls(unet, read_schedule(folder / "scheduler"), folder / "text_encoder",
                   torch.float32 if dtype == torch.float32 else torch.bfloat16, text_device,
                   load_tower(AutoTokenizer, folder / "tokenizer"), load_movq(folder / "movq"))

    @property
    def device(self):
        return self.unet.conv_in.weight.device

    @property
    def T(self):
        return len(self.schedule.alpha_bar)

    def to(self, device):
        for module in (self.unet, self.movq):
            module.to(device)
        return self

    @torch.inference_mode()
    def encode_text(self, prompts):
        """T5 states of each prompt's own tokens: a list of (n, d)."""
        from transformers import T5EncoderModel

        if self.text_encoder is None:
            self.text_encoder = load_tower(T5EncoderModel, self.text_folder, self.text_dtype)
            self.text_encoder.to(self.text_device or self.device)
        tokens = self.tokenizer(list(prompts), padding="max_length", max_length=self.n_tokens, truncation=True,
                                return_tensors="pt").to(self.text_encoder.device)
        states = self.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        return [s[m.bool()] for s, m in zip(states, tokens.attention_mask, strict=True)]

    def encode_once(self, prompts, batch_size=16, cache=None):
        """Put the states of the distinct prompts that are not known yet into self.texts, on the CPU; then free the encoder.

        cache: a folder that keeps them, for this text encoder and dtype.
        """
        file, kept = None, {}
        if cache is not None:
            weights = sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in self.text_folder.iterdir())
            file = Path(cache) / f"t5-{text_hash(self.text_folder.resolve(), weights, self.text_dtype)}.safetensors"
            kept = load_safetensors(file)[0] if file.is_file() else {}
            self.texts |= {p: kept[text_hash(p)] for p in prompts if text_hash(p) in kept}
        missing = sorted({p for p in prompts if p} - self.texts.keys())
        if torch.device(self.text_device or self.device).type == "cpu":
            batch_size = 1  # as alone_on_a_cpu
        for i in tqdm(range(0, len(missing), batch_size), "T5 states", disable=len(missing) < 100):
            batch = missing[i:i + batch_size]
            self.texts |= {p: states.cpu() for p, states in zip(batch, self.encode_text(batch), strict=True)}
        self.text_encoder = None
        if file is not None and missing:
            save_safetensors(file, kept | {text_hash(p): self.texts[p] for p in missing})

    def generate(self, prompts, steps=25, guidance=4.0, height=1024, width=1024, generator=None, negative_prompt=None):
        """Pictures (b, 3, height, width) in about [-1, 1], drawn from one generator.

        As in the reference the texts of a batch are cut to its longest plus one and the pooled text is a mean over what
        is left, so a picture depends on its batch.
        """
        texts = self.encode_text(prompts)
        null = None if negative_prompt is None else self.encode_text([negative_prompt])[0]
        return self._generate(texts, null, False, steps, guidance, height, width, from_generator(generator), "reference")

    @torch.inference_mode()
    def _generate(self, texts, null, own_length, steps, guidance, height, width, draw, solver):
        nulls = [texts[0][:0] if null is None else null] * len(texts)  # the null condition is zeros without a token
        lengths = [[min(len(x) + 1, self.n_tokens) for x in row] for row in (texts, nulls)]
        n = max(lengths[0] + lengths[1]) if own_length else max(lengths[0])
        cond, null = ((*pad_texts(row, n), torch.tensor(length)) for row, length in zip((texts, nulls), lengths, strict=True))
        cond, null = ([x.to(self.device) for x in row[:3 if own_length else 2]] for row in (cond, null))
        predict = guided(self.unet, cond, null, guidance)
        shape = latent_shape(len(texts), height, width, 8)
        return self.movq.decode(solve(predict, self.schedule, steps, solver, draw, shape, self.device))

    def sample(self, prompts, seed=0, steps=25, guidance=4.0, height=1024, width=1024, batch_size=16, **settings):
        """uint8 (b, 3, h, w); picture i depends on its prompt and on seed + i alone. settings: see sample_batch."""
        self.encode_once([*prompts, settings.get("negative_prompt", "")], batch_size)
        return in_batches(self, prompts, seed, batch_size, steps=steps, guidance=guidance, height=height, width=width, **settings)

    @alone_on_a_cpu
    def sample_batch(self, prompts, seeds, steps=25, solver="ddpm", guidance=4.0, negative_prompt="", height=1024, width=1024):
        """One batch: a prompt and a seed for each picture, texts from encode_once."""
        self.encode_once([*prompts, negative_prompt], len(prompts))
        null = self.texts[negative_prompt] if negative_prompt else None
        return to_uint8(self._generate([self.texts[p] for p in prompts], null, True, steps, guidance, height, width,
                                       from_seeds(seeds), solver))


def pad_texts(texts, n):
    """(states (b, n, d) with zeros at padding, mask (b, n)) of texts (n_i, d), cut where they are longer."""
    texts = [text[:n] for text in texts]
    mask = torch.arange(n) < torch.tensor([len(text) for text in texts])[:, None]
    return torch.stack([F.pad(text, (0, 0, 0, n - len(text))) for text in texts]), mask


# LoRA training of the prior, the decoder and the U-Net of 3.0. Everything that a step reads is encoded once and kept in
# files; then the encoders are freed and one loop trains each of the three networks.


@dataclass
class Material:
    """What a step reads of the pictures.

    x_0 (n, ...): what is noised. tables: what the network is told besides x_t and t, one description a row; row 0 is the
    pipeline's null condition. rows: the rows that describe each picture; a step draws one of them.
    """

    x_0: torch.Tensor
    tables: tuple
    rows: list

    def draw(self, pictures, p_uncond, generator):
        """A row for each picture, row 0 with probability p_uncond (2207.12598, Algorithm 1)."""
        drawn = [self.rows[i][int(torch.randint(len(self.rows[i]), (), generator=generator))] for i in pictures.tolist()]
        return torch.tensor(drawn).masked_fill(torch.rand(len(drawn), generator=generator) < p_uncond, 0)

    def condition(self, rows, device, dtype):
        return [t.to(device, dtype if t.is_floating_point() else None) for t in (table[rows] for table in self.tables)]


@dataclass
class Source:
    """Where material comes from: the readable pictures and their prompts, and where encoded ones are kept."""

    records: list
    cache: Path
    ranks: training.Ranks
    dtype: torch.dtype  # of the encoders

    def kept(self, name, key, make):
        """make()'s tensors, from their file where there is one; key holds everything that they depend on."""
        file = self.cache / f"{name}-{text_hash(*key)}.safetensors"
        if file.is_file():
            return load_safetensors(file)[0]
        tensors = {k: v.detach().cpu().contiguous() for k, v in make().items()}  # as from the file, to the strides
        if self.ranks.first:
            save_safetensors(file, tensors)
        return tensors

    def prompts(self):
        """The distinct prompts, the empty one first, and for each picture the places of its own among them."""
        distinct = ["", *sorted({p for r in self.records for p in r.prompts} - {""})]
        places = {p: i for i, p in enumerate(distinct)}
        return distinct, [[places[p] for p in r.prompts] for r in self.records]

    def images(self, folder):
        """CLIP embeddings (n + 1, d) of a black picture, the decoder's null condition, and of the pictures."""
        from transformers import CLIPVisionModelWithProjection

        def make():
            encoder = load_tower(CLIPVisionModelWithProjection, folder / "image_encoder", self.dtype).to(self.ranks.device)
            see = clip_preprocessor(folder / "image_processor")
            embeds = [clip_black(encoder)]
            for i in tqdm(range(0, len(self.records), 32), "image embeddings", disable=len(self.records) < 500):
                embeds.append(clip_images(encoder, torch.stack([see(data.open_image(r.path)) for r in self.records[i:i + 32]])))
            return {"embeds": torch.cat(embeds)}

        key = folder_hash(folder / "image_encoder"), folder_hash(folder / "image_processor"), data.fingerprint(self.records)
        return self.kept("clip-images", (*key, self.dtype), make)["embeds"]

    def latents(self, folder, network, size):
        """MoVQ latents (n, 4, h, w) of the pictures, padded to a square."""
        movq = load_movq(folder / "movq").requires_grad_(False)
        multiple = movq.factor * 2 ** (len(network.down) - 1)
        if size < 1 or size % multiple:
            raise BadInput(f"--size {size} is not divisible by {multiple}: MoVQ and the U-Net halve the picture so often")

        def make():
            movq.to(self.ranks.device)
            images, _ = data.load_images(self.records, size, "pad", on_bad="raise")
            batches = tqdm(range(0, len(images), 8), "latents", disable=len(images) < 500)
            return {"z": torch.cat([movq.encode(images[i:i + 8].to(self.ranks.device).float() / 127.5 - 1) for i in batches])}

        return self.kept("latents", (folder_hash(folder / "movq"), data.fingerprint(self.records), size), make)["z"]


def clip_preprocessor(folder):
    """picture -> (3, s, s) for CLIP's image tower: the short side becomes s, bicubic, and the centre is cut out."""
    c = read_json(folder / "preprocessor_config.json")
    size = c.get("size")
    side = size.get("shortest_edge") if isinstance(size, dict) else size  # older files have plain numbers
    fixed = {"crop_size": (side, {"height": side, "width": side}), "resample": (3,),
             **dict.fromkeys(("do_resize", "do_center_crop", "do_normalize"), (True,))}
    wrong = [f"{k}={c.get(k)!r}" for k, v in fixed.items() if c.get(k) not in v]
    if not isinstance(side, int) or wrong:
        raise BadInput(f"{folder}/preprocessor_config.json: not supported: {', '.join(wrong or [f'size={size!r}'])}")
    mean, std = (torch.tensor(c[k]).view(3, 1, 1) for k in ("image_mean", "image_std"))

    def see(img):
        w, h = img.size
        w, h = (side, int(side * h / w)) if w <= h else (int(side * w / h), side)
        left, top = (w - side) // 2, (h - side) // 2
        img = img.resize((w, h), Image.Resampling.BICUBIC).crop((left, top, left + side, top + side))
        return (torch.from_numpy(np.array(img)).permute(2, 0, 1) / 255 - mean) / std

    return see


@torch.no_grad()
def prior_material(args, prior, folder, source):
    """x_0: normalised image embeddings. Told: a prompt as CLIP's text tower reads it."""
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    prompts, rows = source.prompts()

    def make():
        tokenizer = load_tower(CLIPTokenizer, folder / "tokenizer")
        encoder = load_tower(CLIPTextModelWithProjection, folder / "text_encoder", source.dtype).to(source.ranks.device)
        batches = tqdm(range(0, len(prompts), 64), "text embeddings", disable=len(prompts) < 500)
        parts = [[x.cpu() for x in clip_texts(encoder, tokenizer, prompts[i:i + 64])] for i in batches]
        return dict(zip(("embeds", "states", "mask"), map(torch.cat, zip(*parts, strict=True)), strict=True))

    key = folder_hash(folder / "text_encoder"), folder_hash(folder / "tokenizer"), *prompts, source.dtype
    texts = source.kept("clip-texts", key, make)
    return Material(prior.normalise(source.images(folder)[1:].float()), (texts["embeds"], texts["states"], texts["mask"]), rows)


@torch.no_grad()
def decoder_material(args, decoder, folder, source):
    """x_0: MoVQ latents. Told: the picture's own CLIP embedding, not normalised."""
    latents = source.latents(folder, decoder, args.size)
    return Material(latents, (source.images(fetch(args.prior)),), [[1 + i] for i in range(len(latents))])


@torch.no_grad()
def unet3_material(args, unet, folder, source):
    """x_0: MoVQ latents. Told: T5 states of a prompt and its own length plus one, as in Kandinsky3.sample."""
    from transformers import AutoTokenizer

    latents = source.latents(folder, unet, args.size)
    prompts, rows = source.prompts()
    text_dtype = torch.float32 if source.dtype == torch.float32 else torch.bfloat16
    reader = Kandinsky3(unet, None, folder / "text_encoder", text_dtype, args.text_device or source.ranks.device,
                        load_tower(AutoTokenizer, folder / "tokenizer"), None)
    reader.encode_once(prompts, cache=source.cache)
    texts = [reader.texts[p] for p in prompts[1:]]
    texts = [texts[0][:0], *texts]  # the null condition is zeros without a token
    lengths = torch.tensor([min(len(x) + 1, reader.n_tokens) for x in texts])
    return Material(latents, (*pad_texts(texts, int(lengths.max())), lengths), rows)


TRAININGS = {"train-prior": ("prior", load_prior, prior_material), "train-decoder": ("unet", load_decoder, decoder_material),
             "train-unet3": ("unet", load_unet3, unet3_material)}  # folder of the network, its loader, what it learns from


def loss_fn(network, x_0, condition, t, eps, alpha_bar, prediction, gamma):
    """DDPM, Algorithm 1, for a network that says eps or x_0, with min-SNR weights (2303.09556, Sec. 3.4): the error of x_0
    counts min(SNR, gamma), which for eps is min(SNR, gamma) / SNR. gamma 0 weights all times alike."""
    a_t = alpha_bar[t].view(-1, *[1] * (x_0.ndim - 1))
    x_t = sampler.q_sample(x_0, a_t, eps)
    out = network(x_t.to(next(network.parameters()).dtype), t, *condition).float()
    out = out[:, :x_0.shape[1]]  # behind the decoder's eps is its variance, which is not trained
    error = (out - (x_0 if prediction == "x_0" else eps)).square().flatten(1).mean(dim=1)
    if gamma:
        snr = (a_t / (1 - a_t)).view(-1)
        error = error * (snr.clamp(max=gamma) if prediction == "x_0" else (gamma / snr).clamp(max=1))
    return error.mean()


class LoRARun(training.Run):
    """RUN/best and RUN/last are PEFT folders; the folders read may move, for their contents are hashed."""

    FREE = (*training.Run.FREE, "model", "prior", "cache", "text_device", "epochs")


def train(args):
    """Train an adapter on one network: args.command says which."""
    ranks = training.start_ranks(args.device)
    device = ranks.device
    dtype = {"auto": torch.bfloat16 if device.type == "cuda" else torch.float32}.get(args.dtype) or getattr(torch, args.dtype)
    training.check_flags(args, "batch_size", "accumulate")
    config = loras.config_of(args)
    part, load, make_material = TRAININGS[args.command]
    folder = fetch(args.model)
    network, schedule = load(folder / part, dtype), read_schedule(folder / "scheduler")
    training.seed_step(args.seed, "weights")
    loras.inject(network, config)
    records = data.read_folder(args.data, args.captions)
    splits = data.split(records)
    _, readable = data.load_images(records, 1)  # names those that are not
    place = {r.name: i for i, r in enumerate(readable)}
    pictures, val_pictures = (torch.tensor([place[r.name] for r in side if r.name in place]) for side in splits)
    if not len(pictures) or not len(val_pictures):
        raise BadInput(f"{args.data}: {len(readable)} readable pictures, expected at least 2: one to learn from, one to check")
    b = args.batch_size
    if args.epochs:
        args.steps = math.ceil(args.epochs * len(pictures) / (b * ranks.world))
    settings = {k: v for k, v in vars(args).items() if k != "out"}
    settings |= {"alpha": config.alpha, "dtype": str(dtype), "network": folder_hash(folder / part)}
    run = LoRARun(args.out, settings, data.fingerprint(records), ranks)
    material = make_material(args, network, folder, Source(readable, Path(args.cache or run.folder), ranks, dtype))

    network.to(device).train()
    network.gradient_checkpointing = args.gradient_checkpointing
    params = loras.tensors(network)
    opt = training.Optimisers(params, args.lr)
    ema = training.EMA(params, args.ema_decay)
    alpha_bar = schedule.alpha_bar.float().to(device)
    T = len(alpha_bar)

    def loss_of(pictures, rows, t, eps):
        with training.autocast(device):
            return loss_fn(network, material.x_0[pictures].to(device), material.condition(rows, device, dtype), t.to(device),
                           eps.to(device), alpha_bar, schedule.prediction, args.min_snr_gamma)

    @torch.no_grad()
    def validate():
        """The averaged adapter on held-out pictures, each with its first prompt, at fixed times and noise."""
        ema.swap()
        network.eval()
        total, n, g = 0.0, len(val_pictures), torch.Generator().manual_seed(0)
        t = (torch.arange(n) * T // n)[torch.randperm(n, generator=g)]
        eps = torch.randn(n, *material.x_0.shape[1:], generator=g)
        first = torch.tensor([material.rows[i][0] for i in val_pictures.tolist()])
        for i in range(0, n, b):
            s = slice(i, i + b)
            total += loss_of(val_pictures[s], first[s], t[s], eps[s]).item() * len(t[s])
        network.train()
        ema.swap()
        return total / n

    def save(name):
        if ranks.first:
            ema.swap()
            loras.save(network, run.folder / name)
            ema.swap()

    start, best = run.restore(params, ema, opt)
    if not start and not (run.folder / "metrics.jsonl").exists():
        run.log(step=0, val_loss=validate())  # of the base

    def checkpoint(step):
        nonlocal best
        val = validate()
        run.log(step=step, val_loss=val)
        if val < best:
            best = val
            save("best")
        save("last")
        run.save_progress(step, best, params, ema, opt)

    loop = training.Loop(args.command, start, args.steps, ranks, args.minutes)
    for step in loop:
        g = training.seed_step(args.seed, step, ranks.rank)
        value = 0.0
        for chunk in pictures[ranks.batch(len(pictures), b, step, args.seed)].chunk(args.accumulate):
            t = torch.randint(T, (len(chunk),), generator=g)
            eps = torch.randn(len(chunk), *material.x_0.shape[1:], generator=g)
            loss = loss_of(chunk, material.draw(chunk, args.p_uncond, g), t, eps) * len(chunk) / b
            loss.backward()
            value = value + loss.detach()
        ranks.average_gradients(params.values())
        norm = nn.utils.clip_grad_norm_(params.values(), 1.0)
        opt.step(1.0)
        ema.update(step)
        if (step + 1) % args.log_every == 0:
            value = ranks.mean(value.item())
            run.log(step=step + 1, loss=value, grad_norm=norm.item(), lr=args.lr)
            loop.show(loss=f"{value:.4f}")
        if (step + 1) % args.save_every == 0 or loop.last(step):
            checkpoint(step + 1)
    loop.finish()
    if ranks.first:
        print(f"{run.folder}/best: validation loss {best:.4f}")


# A checkpoint of random weights in the published layout, to try every command on


SENTENCES = """Generate an image with 1 finding. Generate an image with 2 polyps. Generate an image with no instruments.
Generate an image with an an abnormality located in the upper-left, center and lower-right.
Generate an image with an abnormality with the colors pink, red, white, yellow and purple. Generate an image containing text.
Generate an image not containing a green/black box artefact. Generate an image from a colonoscopy procedure.
Generate an image from a gastroscopy procedure. Generate an image with a polyp of size < 5mm. Generate a polyp of type paris ip.
Generate an image with an an anatomical landmark located in the center-left."""


def smooth_pictures(n, size, generator):
    """(n, 3, size, size) in [-1, 1]: clouds of colour, on which random encoders are calibrated."""
    coarse = torch.randn(n, 3, 1, 1, generator=generator) + torch.randn(n, 3, 4, 4, generator=generator)
    return torch.tanh(F.interpolate(coarse, size=size, mode="bicubic") / 2)


def random_network(build, config):
    """A network with torch's random weights; what starts at zero gets small ones, so that every part takes part."""
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
    """Random, but its latents have mean 0 and deviation 1, and its pictures use the range of grey values."""
    config = {"_class_name": "VQModel", "block_out_channels": [32] * 4, "latent_channels": 4, "vq_embed_dim": 4,
              "num_vq_embeddings": 16, "down_block_types": ["DownEncoderBlock2D"] * 3 + ["AttnDownEncoderBlock2D"],
              "up_block_types": ["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * 3, "layers_per_block": 1,
              "norm_type": "spatial"}
    movq, img = random_network(build_movq, config), smooth_pictures(16, 64, generator)
    for layer, run_movq, deviation in ((movq.quant_conv, movq.encode, 1.0),
                                       (movq.decoder.conv_out, lambda x: movq.decode(movq.encode(x)), 0.5)):
        std, mean = torch.std_mean(run_movq(img), dim=(0, 2, 3))
        layer.weight *= (deviation / std).view(-1, 1, 1, 1)
        layer.bias.copy_((layer.bias - mean) * deviation / std)
    save_published(movq, folder / "movq", config)


def clip_vocabulary():
    """Vocabulary and merges of a byte pair encoding that reads the words of SENTENCES whole and others by letters."""
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
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

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
        "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": 32}, "resample": 3,
        "do_center_crop": True, "crop_size": {"height": 32, "width": 32}, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "do_convert_rgb": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]})
    config = {"_class_name": "PriorTransformer", "num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 2,
              "embedding_dim": dim}
    prior, embeds = random_network(build_prior, config), clip_images(vision, smooth_pictures(64, 32, generator))
    prior.clip_mean.copy_(embeds.mean(dim=0, keepdim=True))
    prior.clip_std.copy_(embeds.std(dim=0, keepdim=True))
    save_published(prior, prior_folder / "prior", config)
    write_json(prior_folder / "scheduler/scheduler_config.json", {
        "_class_name": "UnCLIPScheduler", "num_train_timesteps": 1000, "prediction_type": "sample", "clip_sample": True,
        "clip_sample_range": 5.0, "variance_type": "fixed_small_log"})
    config = {"_class_name": "UNet2DConditionModel", "block_out_channels": [32, 64], "layers_per_block": 1,
              "cross_attention_dim": 32, "encoder_hid_dim": dim, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8,
              "norm_num_groups": 8, "down_block_types": ["ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"],
              "up_block_types": ["SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"],
              "mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "encoder_hid_dim_type": "image_proj",
              "addition_embed_type": "image", "resnet_time_scale_shift": "scale_shift"}
    save_published(random_network(build_decoder, config), decoder_folder / "unet", config)
    write_json(decoder_folder / "scheduler/scheduler_config.json", {
        "_class_name": "DDPMScheduler", "beta_schedule": "linear", "beta_start": 0.00085, "beta_end": 0.012,
        "num_train_timesteps": 1000, "prediction_type": "epsilon", "clip_sample": True, "clip_sample_range": 2.0,
        "thresholding": True, "dynamic_thresholding_ratio": 0.99, "sample_max_value": 2.0, "variance_type": "learned_range"})
    tiny_movq(decoder_folder, generator)


def make_tiny_3(out, generator):
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    words = sorted({w for w in SENTENCES.split()})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0), *(("▁" + w, -2.0) for w in words),
              *((c, -6.0) for c in string.ascii_letters + string.digits + string.punctuation)]
    T5Tokenizer(pieces, extra_ids=0, model_max_length=128).save_pretrained(out / "tokenizer")
    T5EncoderModel(T5Config(vocab_size=len(pieces), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
                            feed_forward_proj="gated-gelu")).save_pretrained(out / "text_encoder")
    config = {"_class_name": "Kandinsky3UNet", "block_out_channels": [32, 64], "layers_per_block": 2, "groups": 8,
              "attention_head_dim": 16, "cross_attention_dim": 32, "encoder_hid_dim": 32, "time_embedding_dim": 64}
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
    note = "Random weights: they prove that the commands work, and draw noise."
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
    parser = argparse.ArgumentParser(description="Train LoRA adapters for Kandinsky 2.2 and 3.0.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, text):
        return commands.add_parser(name, help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    tiny = command("make-tiny", "Write a tiny checkpoint of random weights in the published layout: it proves the machinery only.")
    tiny.add_argument("--out", required=True, help="folder to write")
    tiny.add_argument("--kind", choices=("2.2", "3"), default="2.2", help="which Kandinsky")
    tiny.add_argument("--seed", type=int, default=0, help="of the weights")
    for name, text, model, batch_size, p_uncond, size in (
            ("train-prior", "Train an adapter of the image prior of 2.2", "prior folder of 2.2", 32, 0.1, None),
            ("train-decoder", "Train an adapter of the decoder of 2.2", "decoder folder of 2.2", 8, 0.0, 512),
            ("train-unet3", "Train an adapter of the U-Net of 3.0", "folder of 3.0", 8, 0.1, 256)):
        p = command(name, f"{text}: OUT/best and OUT/last.")
        p.add_argument("--model", required=True, help=f"{model}, or its name on the hub")
        if name == "train-decoder":
            p.add_argument("--prior", required=True, help="prior folder of 2.2, for its image encoder")
        if name == "train-unet3":
            p.add_argument("--text-device", help="where the text encoder runs, when not on --device")
        p.add_argument("--cache", help="folder for encoded pictures and texts; runs may share it; --out without it")
        if size:
            p.add_argument("--size", type=int, default=size, help="side of the pictures, pixels")
        loras.add_flags(p)
        p.add_argument("--min-snr-gamma", type=float, default=5.0, help="bound of the loss weights; 0 weights all times alike")
        p.add_argument("--p-uncond", type=float, default=p_uncond, help="share of conditions replaced by the null one")
        p.add_argument("--batch-size", type=int, default=batch_size, help="pictures a step and process")
        p.add_argument("--accumulate", type=int, default=1, help="parts in which a batch goes through the network")
        p.add_argument("--lr", type=float, default=1e-4, help="learning rate, constant")
        p.add_argument("--ema-decay", type=float, default=0.999, help="of the averaged adapter")
        p.add_argument("--epochs", type=float, help="passes over the pictures, instead of --steps")
        p.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
                       help="of the frozen weights; auto is bfloat16 on a GPU. Adapters are float32")
        p.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=name == "train-unet3",
                       help="compute activations twice instead of keeping them")
        training.add_flags(p, 10_000)
    args = parser.parse_args(argv)
    (make_tiny if args.command == "make-tiny" else train)(args)


if __name__ == "__main__":
    run_command(main)
