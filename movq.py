"""MoVQ, the autoencoder of Kandinsky 2.2 and, wider, of 3.0. Published weights only: nothing here trains it.

VQGAN  arXiv:2012.09841  Sec. 3.1  encoder, codebook, decoder
MoVQ   arXiv:2209.09002            a VQGAN whose decoder normalisation is modulated by the latent
"""

from command import BadInput

from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from unet import Attention
from weights import DIFFUSERS_NAMES, check_config, check_divisible, load_published


class PlainNorm(nn.GroupNorm):
    """The encoder's group normalisation, with the call signature of the decoder's SpatialNorm."""

    def __init__(self, ch, groups=32):
        super().__init__(groups, ch, eps=1e-6)

    def forward(self, x, z=None):
        return super().forward(x)


class SpatialNorm(nn.Module):
    """norm(x) scale(z) + shift(z), scale and shift 1x1 convolutions of the latent (MoVQ)."""

    def __init__(self, ch, latent_ch):
        super().__init__()
        self.plain = PlainNorm(ch)  # 32 groups, whatever the encoder has
        self.scale = nn.Conv2d(latent_ch, ch, 1)
        self.shift = nn.Conv2d(latent_ch, ch, 1)

    def forward(self, x, z):
        # The latent is upsampled to x, nearest. A 1x1 convolution commutes with that, and upsampling is
        # broadcasting over the r x s positions of x in a latent position: no tensor of x's size is made.
        h, w = z.shape[-2:]
        x = rearrange(self.plain(x), "b c (h r) (w s) -> b c h r w s", h=h, w=w)
        scale, shift = (rearrange(y, "b c h w -> b c h 1 w 1") for y in (self.scale(z), self.shift(z)))
        return rearrange(torch.addcmul(shift, x, scale), "b c h r w s -> b c (h r) (w s)")


class MoVQResBlock(nn.Module):
    """Pre-activation residual block of two 3x3 convolutions; z is the latent, for the decoder's norm."""

    def __init__(self, in_ch, out_ch, norm):
        super().__init__()
        self.norm_1 = norm(in_ch)
        self.conv_1 = nn.Conv2d(in_ch, out_ch, 3, padding=1)
        self.norm_2 = norm(out_ch)
        self.conv_2 = nn.Conv2d(out_ch, out_ch, 3, padding=1)
        self.skip = nn.Conv2d(in_ch, out_ch, 1) if in_ch != out_ch else nn.Identity()

    def forward(self, x, z=None):
        y = self.conv_1(F.silu(self.norm_1(x, z)))  # (b, out_ch, h, w)
        return self.skip(x) + self.conv_2(F.silu(self.norm_2(y, z)))


class MoVQAttention(Attention):
    """Single-head self-attention over all positions, residual (VQGAN)."""

    def __init__(self, ch, norm):
        super().__init__(ch, ch, n_heads=1, bias=True)
        self.norm = norm(ch)

    def forward(self, x, z=None):
        h, w = x.shape[-2:]
        y = self.norm(x.flatten(2)) if z is None else self.norm(x, z).flatten(2)
        y = y.transpose(1, 2)  # (b, h * w, c)
        return rearrange(super().forward(y, y), "b (h w) c -> b c h w", h=h, w=w) + x


class Downsample(nn.Conv2d):
    """3x3 convolution with stride 2, padded on the right and at the bottom only."""

    def __init__(self, ch):
        super().__init__(ch, ch, 3, stride=2)

    def forward(self, x, z=None):
        return super().forward(F.pad(x, (0, 1, 0, 1)))  # (b, c, h, w) -> (b, c, h / 2, w / 2)


class Upsample(nn.Conv2d):
    """Nearest upsampling by 2, then a 3x3 convolution."""

    def __init__(self, ch):
        super().__init__(ch, ch, 3, padding=1)

    def forward(self, x, z=None):
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # (b, c, 2 h, 2 w)


class MoVQLevel(nn.Module):
    """Residual blocks, the first n_attn of them followed by attention, then a change of resolution."""

    def __init__(self, in_ch, out_ch, norm, n_res, n_attn, resample=None):
        super().__init__()
        self.res = nn.ModuleList(
            MoVQResBlock(in_ch if i == 0 else out_ch, out_ch, norm) for i in range(n_res))
        self.attn = nn.ModuleList(MoVQAttention(out_ch, norm) for _ in range(n_attn))
        self.resample = resample

    def forward(self, x, z=None):
        for i, res in enumerate(self.res):
            x = res(x, z)
            if i < len(self.attn):
                x = self.attn[i](x, z)
        return x if self.resample is None else self.resample(x)


class MoVQEncoder(nn.Module):
    """forward(img (b, 3, H, W)) -> (b, latent_ch, H / s, W / s), s = 2^(levels - 1)."""

    def __init__(self, widths, attention, n_res, latent_ch, groups):
        super().__init__()
        norm = partial(PlainNorm, groups=groups)
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        for i, (ch, has_attention) in enumerate(zip(widths, attention, strict=True)):
            above = widths[max(i - 1, 0)]
            resample = Downsample(ch) if i + 1 < len(widths) else None
            self.down.append(MoVQLevel(above, ch, norm, n_res, n_res * has_attention, resample))
        self.mid = MoVQLevel(ch, ch, norm, 2, 1)
        self.norm_out = norm(ch)
        self.conv_out = nn.Conv2d(ch, latent_ch, 3, padding=1)

    def forward(self, img):
        x = self.conv_in(img)                           # (b, widths[0], H, W)
        for level in (*self.down, self.mid):
            x = level(x)                                # at last (b, widths[-1], H / s, W / s)
        return self.conv_out(F.silu(self.norm_out(x)))  # (b, latent_ch, H / s, W / s)


class MoVQDecoder(nn.Module):
    """forward(y (b, latent_ch, h, w), z (b, z_ch, h, w)) -> img (b, 3, s h, s w); z modulates every norm."""

    def __init__(self, widths, attention, n_res, latent_ch, z_ch):
        super().__init__()
        norm = partial(SpatialNorm, latent_ch=z_ch)
        above = widths[-1]
        self.conv_in = nn.Conv2d(latent_ch, above, 3, padding=1)
        self.mid = MoVQLevel(above, above, norm, 2, 1)
        self.up = nn.ModuleList()  # from the smallest feature map to the largest
        for i, (ch, has_attention) in enumerate(zip(reversed(widths), attention, strict=True)):
            resample = Upsample(ch) if i + 1 < len(widths) else None
            self.up.append(MoVQLevel(above, ch, norm, n_res, n_res * has_attention, resample))
            above = ch
        self.norm_out = norm(ch)
        self.conv_out = nn.Conv2d(ch, 3, 3, padding=1)

    def forward(self, y, z):
        y = self.conv_in(y)                                # (b, widths[-1], h, w)
        for level in (self.mid, *self.up):
            y = level(y, z)                                # at last (b, widths[0], s h, s w)
        return self.conv_out(F.silu(self.norm_out(y, z)))  # (b, 3, s h, s w)


def in_fastest_layout(x):
    """x (b, c, h, w) in the memory layout in which a CPU convolves fastest, as it is elsewhere."""
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x


class MoVQ(nn.Module):
    """encode(img) -> z, decode(z) -> img; img (b, 3, h, w) in [-1, 1], z (b, 4, h / 8, w / 8) as published.

    z is neither scaled nor quantised: Kandinsky's diffusion models use the latent before the codebook, which
    is only a parameter of the file. quantise is what MoVQ itself was trained with.
    """

    published_names = (
        *DIFFUSERS_NAMES,
        ("down.#.downsamplers.0.conv", "down.#.resample"),
        ("up.#.upsamplers.0.conv", "up.#.resample"),
        ("quantize.embedding", "codebook"),
        ("norm_layer", "plain"),
        ("conv_y", "scale"),
        ("conv_b", "shift"),
        ("spatial_norm.plain", "norm.plain"),
        ("spatial_norm.scale", "norm.scale"),
        ("spatial_norm.shift", "norm.shift"),
        ("to_q|query", "to_q"),  # the first checkpoints have the names on the right of the bar
        ("to_k|key", "to_k"),
        ("to_v|value", "to_v"),
        ("to_out.0|proj_attn", "to_out.0"),
    )

    def __init__(self, widths, down_attention, up_attention, n_res, latent_ch, z_ch, n_codes, groups):
        super().__init__()
        self.factor = 2 ** (len(widths) - 1)  # side of a latent cell in pixels
        self.encoder = MoVQEncoder(widths, down_attention, n_res, latent_ch, groups)
        self.quant_conv = nn.Conv2d(latent_ch, z_ch, 1)
        self.codebook = nn.Embedding(n_codes, z_ch)
        self.post_quant_conv = nn.Conv2d(z_ch, latent_ch, 1)
        self.decoder = MoVQDecoder(widths, up_attention, n_res + 1, latent_ch, z_ch)

    def encode(self, img):
        return self.quant_conv(self.encoder(in_fastest_layout(img)))

    def decode(self, z):
        z = in_fastest_layout(z)
        return self.decoder(self.post_quant_conv(z), z)

    def quantise(self, z):
        """The nearest codebook entry at each position, (b, z_ch, h, w) like z (VQGAN, Eq. 2)."""
        b, _, h, w = z.shape
        distances = torch.cdist(rearrange(z, "b c h w -> (b h w) c"), self.codebook.weight)
        nearest = distances.argmin(dim=1)  # (b * h * w,)
        return rearrange(self.codebook(nearest), "(b h w) c -> b c h w", b=b, h=h, w=w)


def build_movq(config: dict):
    """MoVQ from its published config.json; BadInput for settings that are not supported."""
    down = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")  # without, with attention
    up = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")
    c = check_config(
        config, "MoVQ", "VQModel",
        defaults={"block_out_channels": (64,), "down_block_types": down[:1], "up_block_types": up[:1],
                  "layers_per_block": 1, "latent_channels": 3, "vq_embed_dim": None, "num_vq_embeddings": 256,
                  "norm_num_groups": 32,
                  "sample_size": None, "scaling_factor": None, "force_upcast": None},  # the last 3: unused
        allowed={"in_channels": (3,), "out_channels": (3,), "act_fn": ("silu",),
                 "norm_type": ("spatial",), "mid_block_add_attention": (True,),
                 "lookup_from_codebook": (False,)})
    for key, kinds in (("down_block_types", down), ("up_block_types", up)):
        if len(c[key]) != len(c["block_out_channels"]) or set(c[key]) - set(kinds):
            raise BadInput(f"MoVQ: not supported: {key}={c[key]!r:.100}")
    for key, groups in (("norm_num_groups", c["norm_num_groups"]), ("groups of the decoder's norms", 32)):
        check_divisible("MoVQ", "block_out_channels", c["block_out_channels"], key, groups)
    z_ch = c["latent_channels"] if c["vq_embed_dim"] is None else c["vq_embed_dim"]
    if z_ch != 4:
        raise BadInput(f"MoVQ: not supported: vq_embed_dim={z_ch!r:.100}, expected 4, as the U-Nets read")
    return MoVQ(c["block_out_channels"], [kind == down[1] for kind in c["down_block_types"]],
                [kind == up[1] for kind in c["up_block_types"]], c["layers_per_block"], c["latent_channels"],
                z_ch, c["num_vq_embeddings"], c["norm_num_groups"])


def load_movq(folder, dtype=torch.float32):
    """MoVQ from a published folder of config.json and safetensors, in evaluation mode."""
    return load_published(build_movq, folder, dtype)
