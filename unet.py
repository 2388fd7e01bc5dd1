"""Text-conditional U-Net: eps = unet(x_t, t, text, text_mask, self_cond).

x_t (b, c, h, w) noisy latent, t (b,) int64 in [0, T), text (b, n, d) token embeddings, the result like x_t.
DDPM      arXiv:2006.11239  App. B    a U-Net of residual blocks that know the time
LDM       arXiv:2112.10752  Sec. 3.3  cross-attention from the pixels to the words
AdaGN     arXiv:2105.05233  Sec. 3    group normalisation whose scale and shift come from the embedding
Self-conditioning  arXiv:2208.04202  Sec. 3.2  the last estimate of x_0 is a second input
CoordConv arXiv:1807.03247  coordinates as input channels; here the queries of the cross-attention get them too

Whether the result means eps or v is data of the training preset (msdm.py); the network does not care.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn


@dataclass
class UNetConfig:
    in_channels: int = 8
    channels: tuple[int, ...] = (256, 256, 512, 1024)  # of conv_in, then of each level; the picture halves between levels
    time_dim: int = 1024  # width of the time embedding and of the projected text
    text_dim: int = 768
    n_heads: int = 8
    dropout: float = 0.1
    self_conditioning: bool = True
    text_residual: bool = False  # the text's second layer is a residual one, so that no word falls silent
    coord_conv: bool = False  # the input and the queries of the cross-attention are told where a pixel lies

    def __post_init__(self):
        self.channels = tuple(self.channels)
        for ch in self.channels:
            if ch % 32 or ch % self.n_heads:
                raise ValueError(f"channels={self.channels}: each must be divisible by 32 groups and {self.n_heads} heads")
        if self.time_dim % 64:
            raise ValueError(f"time_dim={self.time_dim} is not divisible by 64, the width of a pooling head")


PRESETS = {
    "paper": UNetConfig(),
    "tiny": UNetConfig(in_channels=4, channels=(64, 64, 96, 128), time_dim=128, text_dim=128, n_heads=4, dropout=0.0,
                       self_conditioning=False, text_residual=True, coord_conv=True),
}


def zero_init(module):
    """Start a residual exit at zero, so that a fresh block is the identity."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def init_unit_variance_(linear):
    """Weights that keep the size of what passes: torch's default shrinks it to 0.58, and four layers deep the words are lost."""
    nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
    return linear


def timestep_embedding(t, dim, freq_shift=1):
    """Transformer position encoding of the time: t (b,) -> (b, dim), sines then cosines, periods from 2 pi to 10000 * 2 pi.

    freq_shift=0 stops one frequency short of the longest period, as some published networks do.
    """
    half = dim // 2
    freq = torch.exp(-math.log(10000) * torch.arange(half, device=t.device, dtype=torch.float32) / (half - freq_shift))
    angle = t.float()[:, None] * freq
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def attention(q, k, v, n_heads, mask=None):
    """softmax(q k^T / sqrt(d)) v on (b, n, heads * d); mask (b, n_keys) or (b, n, n_keys) true where a key may be seen.

    A mask (b, heads, n, n_keys) of floats is added to the logits instead.
    """
    q, k, v = (rearrange(y, "b n (heads d) -> b heads n d", heads=n_heads) for y in (q, k, v))
    if mask is not None:
        mask = mask[:, None, None] if mask.ndim == 2 else mask[:, None] if mask.ndim == 3 else mask
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return rearrange(y, "b heads n d -> b n (heads d)")


def coordinate_channels(x):
    """Where each pixel of x (b, c, h, w) lies: (b, 4, h, w), its x and y from -1 to 1, then the cosines of pi x and pi y."""
    rows, columns = (torch.linspace(-1, 1, n, device=x.device, dtype=x.dtype) for n in x.shape[-2:])
    xy = torch.stack(torch.meshgrid(columns, rows, indexing="xy"))
    return torch.cat([xy, (math.pi * xy).cos()]).expand(len(x), -1, -1, -1)


class ConvUnit(nn.Module):
    """x + SiLU(dropout(norm(conv(x)))); whole channels are dropped."""

    def __init__(self, in_ch, out_ch, groups, dropout=0.0):
        super().__init__()
        self.conv = nn.Conv2d(in_ch, out_ch, 3, padding=1)
        self.norm = nn.GroupNorm(groups, out_ch)
        self.dropout = nn.Dropout2d(dropout)
        self.skip = nn.Conv2d(in_ch, out_ch, 1) if in_ch != out_ch else nn.Identity()

    def forward(self, x):
        return self.skip(x) + F.silu(self.dropout(self.norm(self.conv(x))))


class ResBlock(nn.Module):
    """Two convolution units; where an embedding is given, a projection of it is added between them."""

    def __init__(self, in_ch, out_ch, emb_dim=None, groups=32, dropout=0.0):
        super().__init__()
        self.unit_1 = ConvUnit(in_ch, out_ch, groups, dropout)
        self.unit_2 = ConvUnit(out_ch, out_ch, groups, dropout)
        zero_init(self.unit_2.conv)
        self.emb = nn.Linear(emb_dim, out_ch) if emb_dim else None

    def forward(self, x, emb=None):
        x = self.unit_1(x)
        if self.emb is not None:
            x = x + self.emb(F.silu(emb))[:, :, None, None]
        return self.unit_2(x)


class AdaGroupNorm(nn.Module):
    """norm(x) (1 + scale) + shift, scale and shift from the embedding; plain group normalisation at the start."""

    def __init__(self, ch, emb_dim, groups=32):
        super().__init__()
        self.norm = nn.GroupNorm(groups, ch, affine=False)
        self.to_scale_shift = zero_init(nn.Linear(emb_dim, 2 * ch))

    def forward(self, x, emb):
        scale, shift = self.to_scale_shift(F.silu(emb))[:, :, None, None].chunk(2, dim=1)
        return self.norm(x) * (1 + scale) + shift


class Attention(nn.Module):
    """Queries (b, m, q_dim) look at keys and values made of (b, n, kv_dim); separate q, k, v: LoRA finds them by name."""

    def __init__(self, q_dim, kv_dim, n_heads, dropout=0.0, out_dim=None, bias=False):
        super().__init__()
        self.n_heads = n_heads
        out_dim = out_dim or q_dim
        self.to_q = nn.Linear(q_dim, out_dim, bias=bias)
        self.to_k = nn.Linear(kv_dim, out_dim, bias=bias)
        self.to_v = nn.Linear(kv_dim, out_dim, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(out_dim, out_dim, bias=bias), nn.Dropout(dropout)])

    def forward(self, x, context, mask=None):
        y = attention(self.to_q(x), self.to_k(context), self.to_v(context), self.n_heads, mask)
        return self.to_out[1](self.to_out[0](y))


class AttentionBlock(nn.Module):
    """The pixels look at the words, then each pixel thinks: x + attention(norm(x), text), x + feed_forward(norm(x)).

    Without a text they look at each other. With coord_conv a pixel knows where it lies when it asks the words: "upper-left"
    is then a linear matter.
    """

    def __init__(self, ch, emb_dim, text_dim, n_heads, dropout=0.0, groups=32, coord_conv=False):
        super().__init__()
        self.coord_conv = coord_conv
        self.norm_1 = AdaGroupNorm(ch, emb_dim, groups)
        self.attention = Attention(ch + 4 * coord_conv, text_dim, n_heads, dropout, out_dim=ch)
        self.norm_2 = AdaGroupNorm(ch, emb_dim, groups)
        self.feed_forward = nn.Sequential(nn.Conv2d(ch, 4 * ch, 1, bias=False), nn.SiLU(),
                                          nn.Conv2d(4 * ch, ch, 1, bias=False))
        zero_init(self.attention.to_out[0])
        zero_init(self.feed_forward[2])

    def forward(self, x, emb, text=None, text_mask=None):
        h, w = x.shape[-2:]
        y = self.norm_1(x, emb)
        if self.coord_conv:
            y = torch.cat([y, 4 * coordinate_channels(y)], dim=1)  # loud enough among dozens of channels
        y = rearrange(y, "b c h w -> b (h w) c")
        y = self.attention(y, y if text is None else text, text_mask)
        x = x + rearrange(y, "b (h w) c -> b c h w", h=h, w=w)
        return x + self.feed_forward(self.norm_2(x, emb))


class Stage(nn.Module):
    """A residual block, then a text block."""

    def __init__(self, in_ch, out_ch, config):
        super().__init__()
        self.res = ResBlock(in_ch, out_ch, config.time_dim, dropout=config.dropout)
        self.text = AttentionBlock(out_ch, config.time_dim, config.time_dim, config.n_heads, config.dropout,
                              coord_conv=config.coord_conv)
        for layer in (self.text.attention.to_q, self.text.attention.to_k, self.text.attention.to_v):
            init_unit_variance_(layer)  # a pixel hears some words from the start, and not the mean of all

    def forward(self, x, emb, text, text_mask):
        return self.text(self.res(x, emb), emb, text, text_mask)


class UNet(nn.Module):
    """forward(x_t, t, text, text_mask=None, self_cond=None) -> (b, c, h, w).

    text_mask (b, n) is true (1) at tokens and false (0) at padding; None: all are tokens. self_cond is the last estimate
    of x_0, None for zeros; a network without self-conditioning refuses one. h and w must halve len(channels) - 2 times.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        first, *widths = config.channels
        dim = config.time_dim
        self.time_mlp = nn.Sequential(nn.Linear(dim // 4, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.text_mlp = nn.Sequential(nn.Linear(config.text_dim, dim, bias=False), nn.SiLU(), nn.Linear(dim, dim, bias=False))
        self.text_pool = Attention(dim, dim, n_heads=dim // 64)
        for layer in (*self.text_mlp[::2], self.text_pool.to_v, self.text_pool.to_out[0]):
            init_unit_variance_(layer)
        self.conv_in = nn.Conv2d(config.in_channels * (1 + config.self_conditioning) + 4 * config.coord_conv, first, 3, padding=1)

        self.down, skips, ch = nn.ModuleList(), [first], first  # skips: widths that the way up takes back, last first
        for i, width in enumerate(widths):
            for _ in range(2):
                self.down.append(Stage(ch, width, config))
                ch = width
                skips.append(ch)
            if i + 1 < len(widths):
                self.down.append(nn.Conv2d(ch, ch, 3, stride=2, padding=1))
                skips.append(ch)

        self.mid_1 = Stage(ch, ch, config)
        self.mid_2 = ResBlock(ch, ch, dim, dropout=config.dropout)

        self.up = nn.ModuleList()
        for i in reversed(range(len(widths))):
            below = config.channels[i]  # a level ends at the width of the one above it
            for out_ch in (widths[i], widths[i], below):
                self.up.append(Stage(ch + skips.pop(), out_ch, config))
                ch = out_ch
            if i > 0:
                self.up.append(nn.Conv2d(ch, ch, 3, padding=1))
        self.conv_out = zero_init(nn.Conv2d(ch, config.in_channels, 1))

    def forward(self, x_t, t, text, text_mask=None, self_cond=None):
        if self.config.self_conditioning:
            x_t = torch.cat([x_t, torch.zeros_like(x_t) if self_cond is None else self_cond], dim=1)
        elif self_cond is not None:
            raise ValueError("self_cond was given to a U-Net built with self_conditioning=False")
        if self.config.coord_conv:
            x_t = torch.cat([x_t, coordinate_channels(x_t)], dim=1)
        text_mask = None if text_mask is None else text_mask.bool()
        text = self.text_mlp[0](text)  # (b, n, time_dim)
        text = self.text_mlp[2](self.text_mlp[1](text)) + (text if self.config.text_residual else 0)
        pooled = self.text_pool(text.mean(dim=1, keepdim=True), text, text_mask)[:, 0]  # the mean counts pad positions
        emb = self.time_mlp(timestep_embedding(t, self.config.time_dim // 4).to(x_t.dtype)) + pooled
        if text_mask is not None and text_mask.device.type == "cpu":  # on a GPU the length would have to be waited for
            used = text_mask.any(dim=0)  # pads of the whole batch are nothing to the cross-attention from here on
            text, text_mask = text[:, used], text_mask[:, used]

        x = self.conv_in(x_t)
        skips = [x]
        for block in self.down:
            x = block(x, emb, text, text_mask) if isinstance(block, Stage) else block(x)
            skips.append(x)
        x = self.mid_2(self.mid_1(x, emb, text, text_mask), emb)
        for block in self.up:
            if isinstance(block, Stage):
                x = block(torch.cat([x, skips.pop()], dim=1), emb, text, text_mask)
            else:
                x = block(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv_out(x)
