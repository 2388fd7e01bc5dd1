"""Text-conditional U-Net: eps = unet(x_t, t, text, text_mask, self_cond).

x_t (b, c, h, w) noisy latent, t (b,) int64 in [0, T), text (b, n, d) token embeddings, the result like x_t.
DDPM      arXiv:2006.11239  App. B    a U-Net of residual blocks conditioned on the time, self-attention at a
                                      coarse level
Medfusion arXiv:2212.07501  the convolution units, the residual blocks and their arrangement
LDM       arXiv:2112.10752  Sec. 3.3  cross-attention from image positions to text tokens
AdaGN     arXiv:2105.05233  Sec. 3.1  group normalisation whose scale and shift come from the embedding
Self-conditioning  arXiv:2208.04202  the previous estimate of x_0 is a second input
CoordConv arXiv:1807.03247  coordinates as input channels; our variant (coordinate_channels, AttentionBlock)

Whether the result means eps or v is data of the training preset (msdm.py); the network is the same.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from weights import check_fields


@dataclass
class UNetConfig:
    in_channels: int = 8
    channels: tuple[int, ...] = (256, 256, 512, 1024)  # of conv_in, then of each level, from fine to coarse
    time_dim: int = 1024  # width of the time embedding and of the projected text
    text_dim: int = 768
    n_heads: int = 8
    dropout: float = 0.1
    self_conditioning: bool = True
    # Not in the paper: a skip connection around the second text layer, so that every token reaches the
    # cross-attention at initialisation; coordinate channels at the input and in the attention blocks; and
    # self-attention at all levels but the finest.
    text_residual: bool = False
    coord_conv: bool = False
    self_attention: bool = False

    def __post_init__(self):
        check_fields(self)
        self.channels = tuple(self.channels)
        for ch in self.channels:
            if ch % 32 or ch % self.n_heads:
                raise ValueError(f"channels={self.channels}: each must be divisible by 32 groups "
                                 f"and {self.n_heads} heads")
        if self.time_dim % 64:
            raise ValueError(f"time_dim={self.time_dim} is not divisible by 64, the width of a pooling head")

    @property
    def factor(self):
        """Side of a position of the coarsest level, in latent positions."""
        return 2 ** (len(self.channels) - 2)


PRESETS = {
    "paper": UNetConfig(),
    "tiny": UNetConfig(in_channels=4, channels=(64, 64, 96, 128), time_dim=128, text_dim=128, n_heads=4,
                       dropout=0.0, self_conditioning=False, text_residual=True, coord_conv=True,
                       self_attention=True),
}
PRESETS["demo"] = replace(PRESETS["tiny"], in_channels=8, channels=(64, 64, 96))


def zero_init(module):
    """All parameters set to zero: at the end of a residual branch, a new block is then the identity."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def init_unit_variance_(linear):
    """Weights N(0, 1 / fan_in), so that the output has the input's variance (ours).

    nn.Linear's default gives 0.58 of the input's standard deviation, 0.11 after four layers.
    """
    nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
    return linear


class Read(NamedTuple):
    """What a network has read of its condition: everything that depends on neither x_t nor t."""

    tokens: object  # (b, n, d), or a CachedTokens of them: for cross-attention
    mask: torch.Tensor | None  # (b, n), true at tokens
    pooled: torch.Tensor  # (b, emb_dim), added to the time embedding


class CachedTokens:
    """Tokens (b, n, d) that are the same in many calls: a layer's keys or values are computed once.

    For one sampling: what is kept does not follow a change of the weights or of an adapter's strength.
    """

    def __init__(self, tokens):
        self.tokens, self.results = tokens, {}

    def project(self, layer):
        if layer not in self.results:
            self.results[layer] = layer(self.tokens)
        return self.results[layer]


def project(layer, tokens):
    """layer(tokens), where tokens may be a CachedTokens."""
    return tokens.project(layer) if isinstance(tokens, CachedTokens) else layer(tokens)


def dtype_of(network):
    """The dtype of a network's own weights; an adapter's, which may come first, are float32 in any case."""
    adapter = ("lora_A", "lora_B", "magnitude")
    return next(p.dtype for name, p in network.named_parameters() if not name.endswith(adapter))


class InItsDtype:
    """A network as a function whose inputs are cast to its dtype and whose output is float32.

    remember(*condition): the condition to call it with in its place in many steps, without gradient. A
    network with read(*condition) -> Read then reads it once.
    """

    def __init__(self, network):
        self.network, self.dtype = network, dtype_of(network)

    def _cast(self, x):
        return x.to(self.dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    def __call__(self, x_t, t, *condition):
        return self.network(self._cast(x_t), t, *map(self._cast, condition)).float()

    def remember(self, *condition):
        if not hasattr(self.network, "read"):
            return condition
        read = self.network.read(*map(self._cast, condition))
        return read._replace(tokens=CachedTokens(read.tokens)), *[None] * (len(condition) - 1)


def timestep_embedding(t, dim, freq_shift=1):
    """Sinusoidal embedding of the time (after arXiv:1706.03762, Sec. 3.5): t (b,) -> (b, dim).

    Sines come first, then cosines. The angular frequencies fall geometrically from 1 to 1 / 10000, as in
    DDPM's code; with freq_shift=0, as in the paper, they end one step above 1 / 10000.
    """
    half = dim // 2
    i = torch.arange(half, device=t.device, dtype=torch.float32)
    freq = torch.exp(-math.log(10000) * i / (half - freq_shift))
    angle = t.float()[:, None] * freq
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def attention(q, k, v, n_heads, mask=None, bias=None):
    """softmax(q k^T / sqrt(d) + bias) v in every head.

    q (b, n, heads * d), k and v (b, n_keys, heads * d); the result is like q.
    mask: bool, true where a key takes part: (b, n_keys) for all queries, or (b, n, n_keys) for each.
    bias: float (b or 1, heads, n, n_keys).
    """
    q, k, v = (rearrange(y, "b n (heads d) -> b heads n d", heads=n_heads) for y in (q, k, v))
    if mask is not None:
        mask = mask[:, None, None] if mask.ndim == 2 else mask[:, None]  # (b, 1, 1 or n, n_keys)
    if bias is not None:
        mask = bias if mask is None else bias.masked_fill(~mask, -torch.inf)  # (b, heads, n, n_keys)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return rearrange(y, "b heads n d -> b n (heads d)")


def coordinate_channels(x):
    """Coordinates of the positions of x (b, c, h, w) as (b, 4, h, w): x, y in [-1, 1], cos(pi x), cos(pi y).

    CoordConv has x and y; the cosines, which separate the centre from the border, are ours.
    """
    rows, columns = (torch.linspace(-1, 1, n, device=x.device, dtype=x.dtype) for n in x.shape[-2:])
    xy = torch.stack(torch.meshgrid(columns, rows, indexing="xy"))  # (2, h, w)
    return torch.cat([xy, (math.pi * xy).cos()]).expand(len(x), -1, -1, -1)


class GroupNorm(nn.GroupNorm):
    """Group normalisation in x's own dtype; the sums are float32 in any case.

    Under autocast torch's own writes float32, which every later layer would read, and cast, again.
    """

    def forward(self, x):
        weight, bias = (p if p is None else p.to(x.dtype) for p in (self.weight, self.bias))
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)


class ConvUnit(nn.Module):
    """x + SiLU(dropout(norm(conv(x)))), with a 1x1 convolution of x where the width changes (Medfusion).

    Dropout acts on whole channels.
    """

    def __init__(self, in_ch, out_ch, groups, dropout=0.0):
        super().__init__()
        self.conv = nn.Conv2d(in_ch, out_ch, 3, padding=1)
        self.norm = GroupNorm(groups, out_ch)
        self.dropout = nn.Dropout2d(dropout)
        self.skip = nn.Conv2d(in_ch, out_ch, 1) if in_ch != out_ch else nn.Identity()

    def forward(self, x):
        return self.skip(x) + F.silu(self.dropout(self.norm(self.conv(x))))


class ResBlock(nn.Module):
    """Two convolution units (Medfusion); with emb_dim, a projection of an embedding is added between them."""

    def __init__(self, in_ch, out_ch, emb_dim=None, groups=32, dropout=0.0):
        super().__init__()
        self.unit_1 = ConvUnit(in_ch, out_ch, groups, dropout)
        self.unit_2 = ConvUnit(out_ch, out_ch, groups, dropout)
        zero_init(self.unit_2.conv)
        self.emb = nn.Linear(emb_dim, out_ch) if emb_dim else None

    def forward(self, x, emb=None):
        x = self.unit_1(x)  # (b, out_ch, h, w)
        if self.emb is not None:
            x = x + self.emb(F.silu(emb))[:, :, None, None]  # emb (b, emb_dim)
        return self.unit_2(x)


class AdaGroupNorm(nn.Module):
    """AdaGN: norm(x) (1 + scale) + shift, with scale and shift projected from the embedding.

    The paper (Sec. 3.1) writes y_s norm(x) + y_b; this is the form of its code, here plain at initialisation.
    """

    def __init__(self, ch, emb_dim, groups=32):
        super().__init__()
        self.norm = GroupNorm(groups, ch, affine=False)
        self.to_scale_shift = zero_init(nn.Linear(emb_dim, 2 * ch))

    def forward(self, x, emb):
        scale, shift = self.to_scale_shift(F.silu(emb))[:, :, None, None].chunk(2, dim=1)  # (b, ch, 1, 1)
        return self.norm(x) * (1 + scale) + shift


class Attention(nn.Module):
    """Multi-head attention from x (b, n, query_dim) to context (b, n_keys, context_dim) -> (b, n, out_dim).

    context may be a CachedTokens. q, k and v are separate layers, because LoRA finds them by name.
    """

    def __init__(self, query_dim, context_dim, n_heads, dropout=0.0, out_dim=None, bias=False):
        super().__init__()
        self.n_heads = n_heads
        out_dim = out_dim or query_dim
        self.to_q = nn.Linear(query_dim, out_dim, bias=bias)
        self.to_k = nn.Linear(context_dim, out_dim, bias=bias)
        self.to_v = nn.Linear(context_dim, out_dim, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(out_dim, out_dim, bias=bias), nn.Dropout(dropout)])

    def forward(self, x, context, mask=None):
        k, v = project(self.to_k, context), project(self.to_v, context)
        y = attention(self.to_q(x), k, v, self.n_heads, mask)
        return self.to_out[1](self.to_out[0](y))


class AttentionBlock(nn.Module):
    """Cross-attention from image positions to text tokens, then a position-wise feed-forward layer.

    Both are residual and pre-normalised by AdaGN. context=None: self-attention. With coord_conv (ours) the
    positions get coordinate channels, as queries and in self-attention as context too, whose width is then
    ch + 4: the logit of "upper-left" can then be linear in the position.
    """

    def __init__(self, ch, emb_dim, context_dim, n_heads, dropout=0.0, groups=32, coord_conv=False):
        super().__init__()
        self.coord_conv = coord_conv
        self.norm_1 = AdaGroupNorm(ch, emb_dim, groups)
        self.attention = Attention(ch + 4 * coord_conv, context_dim, n_heads, dropout, out_dim=ch)
        self.norm_2 = AdaGroupNorm(ch, emb_dim, groups)
        self.feed_forward = nn.Sequential(nn.Conv2d(ch, 4 * ch, 1, bias=False), nn.SiLU(),
                                          nn.Conv2d(4 * ch, ch, 1, bias=False))
        zero_init(self.attention.to_out[0])
        zero_init(self.feed_forward[2])

    def forward(self, x, emb, context=None, mask=None):
        h, w = x.shape[-2:]
        y = self.norm_1(x, emb)
        if self.coord_conv:
            y = torch.cat([y, 4 * coordinate_channels(y)], dim=1)  # 4 times as large (ours): few among ch
        y = rearrange(y, "b c h w -> b (h w) c")
        y = self.attention(y, y if context is None else context, mask)  # (b, h * w, ch)
        x = x + rearrange(y, "b (h w) c -> b c h w", h=h, w=w)
        return x + self.feed_forward(self.norm_2(x, emb))


class Stage(nn.Module):
    """A residual block, self-attention if it attends, then cross-attention to the text."""

    def __init__(self, in_ch, out_ch, config, attends=False):
        super().__init__()
        self.res = ResBlock(in_ch, out_ch, config.time_dim, dropout=config.dropout)
        # Two attention blocks, by their names in checkpoints: positions to positions, positions to tokens.
        self.image = self._attention(out_ch, out_ch + 4 * config.coord_conv, config) if attends else None
        self.text = self._attention(out_ch, config.time_dim, config)

    @staticmethod
    def _attention(ch, context_dim, config):
        block = AttentionBlock(ch, config.time_dim, context_dim, config.n_heads, config.dropout,
                               coord_conv=config.coord_conv)
        for layer in (block.attention.to_q, block.attention.to_k, block.attention.to_v):
            init_unit_variance_(layer)  # logits of unit variance: attention is not uniform at the start
        return block

    def forward(self, x, emb, text, text_mask):
        x = self.res(x, emb)
        if self.image is not None:
            x = self.image(x, emb)
        return self.text(x, emb, text, text_mask)


class UNet(nn.Module):
    """forward(x_t, t, text, text_mask=None, self_cond=None) -> (b, c, h, w).

    text_mask (b, n): true (1) at tokens, false (0) at padding; None: all are tokens. self_cond, like x_t: the
    previous estimate of x_0, None for zeros; a network without self-conditioning raises a ValueError.
    text may be what read(text, text_mask) returns. h and w must be multiples of config.factor.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        first, *widths = config.channels
        dim = config.time_dim
        self.time_mlp = nn.Sequential(nn.Linear(dim // 4, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.text_mlp = nn.Sequential(nn.Linear(config.text_dim, dim, bias=False), nn.SiLU(),
                                      nn.Linear(dim, dim, bias=False))
        self.text_pool = Attention(dim, dim, n_heads=dim // 64)
        for layer in (*self.text_mlp[::2], self.text_pool.to_v, self.text_pool.to_out[0]):
            init_unit_variance_(layer)
        in_ch = config.in_channels * (1 + config.self_conditioning) + 4 * config.coord_conv
        self.conv_in = nn.Conv2d(in_ch, first, 3, padding=1)

        def attends(level):
            return config.self_attention and level > 0

        self.down, skips, ch = nn.ModuleList(), [first], first  # skips: widths, taken from the end
        for i, width in enumerate(widths):
            for _ in range(2):
                self.down.append(Stage(ch, width, config, attends(i)))
                ch = width
                skips.append(ch)
            if i + 1 < len(widths):
                self.down.append(nn.Conv2d(ch, ch, 3, stride=2, padding=1))
                skips.append(ch)

        self.mid_1 = Stage(ch, ch, config, attends(len(widths) - 1))
        self.mid_2 = ResBlock(ch, ch, dim, dropout=config.dropout)

        self.up = nn.ModuleList()
        for i in reversed(range(len(widths))):
            finer = config.channels[i]  # a level ends at the width of the next, finer one
            for out_ch in (widths[i], widths[i], finer):
                self.up.append(Stage(ch + skips.pop(), out_ch, config, attends(i)))
                ch = out_ch
            if i > 0:
                self.up.append(nn.Conv2d(ch, ch, 3, padding=1))
        self.conv_out = zero_init(nn.Conv2d(ch, config.in_channels, 1))

    def read(self, text, text_mask=None):
        """The Read of text (b, n, d) and its mask; tokens (b, n, time_dim), on a CPU without padding."""
        text_mask = None if text_mask is None else text_mask.bool()
        text = self.text_mlp[0](text)  # (b, n, time_dim)
        text = self.text_mlp[2](self.text_mlp[1](text)) + (text if self.config.text_residual else 0)
        query = text.mean(dim=1, keepdim=True)  # (b, 1, time_dim); counts padding, as the paper's code does
        pooled = self.text_pool(query, text, text_mask)[:, 0]
        if text_mask is not None and text_mask.device.type == "cpu" and not torch.compiler.is_compiling():
            # Drop columns that are padding in every row: same result, less work. CPU only, because a GPU
            # would have to synchronise, and not compiled, because shapes would depend on the batch.
            used = text_mask.any(dim=0)
            text, text_mask = text[:, used], text_mask[:, used]
        return Read(text, text_mask, pooled)

    def forward(self, x_t, t, text, text_mask=None, self_cond=None):
        if self.config.self_conditioning:
            previous = torch.zeros_like(x_t) if self_cond is None else self_cond
            x_t = torch.cat([x_t, previous], dim=1)  # (b, 2 c, h, w)
        elif self_cond is not None:
            raise ValueError("self_cond was given to a U-Net built with self_conditioning=False")
        if self.config.coord_conv:
            x_t = torch.cat([x_t, coordinate_channels(x_t)], dim=1)  # 4 channels more
        text, text_mask, pooled = text if isinstance(text, Read) else self.read(text, text_mask)
        emb = self.time_mlp(timestep_embedding(t, self.config.time_dim // 4).to(x_t.dtype)) + pooled

        x = self.conv_in(x_t)  # (b, channels[0], h, w); emb (b, time_dim)
        skips = [x]
        for block in self.down:
            x = block(x, emb, text, text_mask) if isinstance(block, Stage) else block(x)
            skips.append(x)
        x = self.mid_2(self.mid_1(x, emb, text, text_mask), emb)  # (b, channels[-1], h / 2^k, w / 2^k)
        for block in self.up:
            if isinstance(block, Stage):
                x = block(torch.cat([x, skips.pop()], dim=1), emb, text, text_mask)
            else:
                x = block(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv_out(x)  # (b, c, h, w)
