"""The networks of Kandinsky 2.2 and 3.0: the image prior, the decoder U-Net, the U-Net of 3.0.

Kandinsky   arXiv:2310.03502            2.x: text -> CLIP image embedding -> MoVQ latent -> image
unCLIP      arXiv:2204.06125  Sec. 2.2  the prior: a causal transformer that predicts x_0, the image embedding
ADM         arXiv:2105.05233  Sec. 3    residual blocks whose scale and shift come from the embedding
Kandinsky 3 arXiv:2312.03511            text -> T5 states -> MoVQ latent -> image
BigGAN      arXiv:1809.11096  App. B    bottleneck blocks of BigGAN-deep
iDDPM       arXiv:2102.09672  Eq. 15    a learnt variance between beta and its lower bound

Weights are read from folders in the published layout, under the published names (weights.py). The autoencoder
is in movq.py.
"""

from command import BadInput

from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint

from files import read_json
from unet import (
    AdaGroupNorm,
    Attention,
    AttentionBlock,
    GroupNorm,
    Read,
    attention,
    project,
    timestep_embedding,
)
from weights import (
    DIFFUSERS_NAMES,
    check_config,
    check_divisible,
    load_published,
    prior_part,
    refuse_other_unet,
)

# The image prior of 2.2: unCLIP, Sec. 2.2


def time_features(t, dim):
    """Kandinsky 2's timestep embedding, (b,) -> (b, dim): cosines first, without the longest period."""
    return timestep_embedding(t, dim, freq_shift=0).roll(dim // 2, dims=1)


class PriorBlock(nn.Module):
    """Pre-norm transformer block on (b, n, dim); mask (b, n, n) true where a query may attend to a key."""

    def __init__(self, dim, n_heads):
        super().__init__()
        self.norm_1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, dim, n_heads, bias=True)
        self.norm_2 = nn.LayerNorm(dim)
        self.feed_forward = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x, mask):
        y = self.norm_1(x)
        x = x + self.attention(y, y, mask)
        return x + self.feed_forward(self.norm_2(x))


class Prior(nn.Module):
    """forward(x, t, text_embed, text_states, text_mask) -> the normalised CLIP image embedding x_0 (b, d).

    x (b, d) noisy x_0, t (b,), text_embed (b, d), text_states (b, 77, d), text_mask (b, 77) true at tokens.
    The sequence is the text states, the text embedding, the time, x and a learnt query, whose output is the
    result. Attention is causal.
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
        emb = self.time_mlp(time_features(t, self.positions.shape[-1]).to(x.dtype))       # (b, dim)
        singles = torch.stack([self.from_embed(text_embed), emb, self.from_x(x)], dim=1)  # (b, 3, dim)
        query = self.query.expand(len(x), -1, -1)                                         # (b, 1, dim)
        tokens = torch.cat([self.from_states(text_states), singles, query], dim=1)        # (b, n, dim)
        tokens = tokens + self.positions
        n = tokens.shape[1]
        causal = torch.ones(n, n, dtype=torch.bool, device=x.device).tril()               # (n, n)
        mask = causal & F.pad(text_mask.bool(), (0, 4), value=True)[:, None]              # (b, n, n)
        for block in self.blocks:
            tokens = checkpointed(self, block, tokens, mask)                              # (b, n, dim)
        return self.to_embed(self.norm_out(tokens[:, -1]))                                # (b, d)

    def normalise(self, embed):
        """CLIP image embedding (b, d) -> x_0."""
        return (embed - self.clip_mean) / self.clip_std

    def denormalise(self, x_0):
        """x_0 (b, d) -> CLIP image embedding."""
        return x_0 * self.clip_std + self.clip_mean


def checkpointed(network, block, *args):
    """block(*args); with gradient checkpointing its activations are computed again in the backward pass."""
    if network.gradient_checkpointing and torch.is_grad_enabled():
        recorded = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()  # without dropout
        return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=not recorded)
    return block(*args)


def build_prior(config: dict):
    """The prior from its published config.json; BadInput for settings that are not supported."""
    c = check_config(
        config, "prior", "PriorTransformer",
        defaults={"num_attention_heads": 32, "attention_head_dim": 64, "num_layers": 20, "embedding_dim": 768,
                  "num_embeddings": 77},
        allowed={"additional_embeddings": (4,), "dropout": (0.0,), "time_embed_act_fn": ("silu",),
                 "encoder_hid_proj_type": ("linear",), "added_emb_type": ("prd",), "norm_in_type": (None,),
                 "embedding_proj_norm_type": (None,), "time_embed_dim": (None,),
                 "embedding_proj_dim": (None,), "clip_embed_dim": (None,)})
    n_heads = c["num_attention_heads"]
    check_divisible("prior", "num_attention_heads * attention_head_dim", [n_heads * c["attention_head_dim"]],
                    "cosines and sines of the time", 2)
    return Prior(c["embedding_dim"], n_heads * c["attention_head_dim"], n_heads, c["num_layers"],
                 c["num_embeddings"])


def load_prior(folder, dtype=torch.float32):
    """The prior from a published folder of config.json and safetensors, in evaluation mode."""
    return load_published(build_prior, folder, dtype)


# The decoder of 2.2: a U-Net from an image embedding to a MoVQ latent (Kandinsky; its blocks: ADM, Sec. 3)


class DecoderResBlock(nn.Module):
    """Residual block: the embedding scales and shifts the second norm, resample acts on both paths."""

    def __init__(self, in_ch, out_ch, emb_dim, groups, resample=None):
        super().__init__()
        self.norm_1 = GroupNorm(groups, in_ch)
        self.conv_1 = nn.Conv2d(in_ch, out_ch, 3, padding=1)
        self.emb = nn.Linear(emb_dim, 2 * out_ch)
        self.norm_2 = GroupNorm(groups, out_ch)
        self.conv_2 = nn.Conv2d(out_ch, out_ch, 3, padding=1)
        self.skip = nn.Conv2d(in_ch, out_ch, 1) if in_ch != out_ch else nn.Identity()
        self.resample = resample or (lambda x: x)

    def forward(self, x, emb):
        y = self.conv_1(self.resample(F.silu(self.norm_1(x))))                  # (b, out_ch, h', w')
        scale, shift = self.emb(F.silu(emb))[:, :, None, None].chunk(2, dim=1)  # (b, out_ch, 1, 1) each
        y = self.conv_2(F.silu(self.norm_2(y) * (1 + scale) + shift))
        return self.skip(self.resample(x)) + y


def downsample(x):
    """(b, c, h, w) -> (b, c, h / 2, w / 2)."""
    return F.avg_pool2d(x, 2)


def upsample(x):
    """(b, c, h, w) -> (b, c, 2 h, 2 w)."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class ImageAttention(nn.Module):
    """Self-attention of x (b, c, h, w) and cross-attention to tokens (b, n, token_dim) in one softmax.

    The keys and values of both are concatenated. tokens may be a CachedTokens.
    """

    def __init__(self, ch, token_dim, head_dim, groups):
        super().__init__()
        self.n_heads = ch // head_dim
        self.norm = GroupNorm(groups, ch)
        self.to_q, self.to_k, self.to_v = nn.Linear(ch, ch), nn.Linear(ch, ch), nn.Linear(ch, ch)
        self.token_k, self.token_v = nn.Linear(token_dim, ch), nn.Linear(token_dim, ch)
        self.to_out = nn.ModuleList([nn.Linear(ch, ch)])

    def forward(self, x, tokens):
        h, w = x.shape[-2:]
        y = self.norm(x.flatten(2)).transpose(1, 2)                      # (b, h * w, c)
        k = torch.cat([project(self.token_k, tokens), self.to_k(y)], dim=1)  # (b, n + h * w, c)
        v = torch.cat([project(self.token_v, tokens), self.to_v(y)], dim=1)
        y = self.to_out[0](attention(self.to_q(y), k, v, self.n_heads))  # (b, h * w, c)
        return rearrange(y, "b (h w) c -> b c h w", h=h, w=w) + x


class DecoderLevel(nn.Module):
    """Residual blocks, the first len(attn) of them followed by attention, then a change of resolution."""

    def __init__(self, res, attn=(), resample=None):
        super().__init__()
        self.res, self.attn, self.resample = nn.ModuleList(res), nn.ModuleList(attn), resample

    def stage(self, i, x, emb, tokens):
        x = self.res[i](x, emb)
        return self.attn[i](x, tokens) if i < len(self.attn) else x


class Decoder(nn.Module):
    """forward(z, t, image_embed) -> (b, 8, h, w): eps, then v of iDDPM's learnt variance (Eq. 15).

    z (b, 4, h, w) noisy MoVQ latent, t (b,), image_embed (b, d) CLIP image embedding, not normalised, or what
    read(image_embed) returns.
    """

    published_names = (
        *DIFFUSERS_NAMES,
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

    def __init__(self, widths, with_attention, n_res, image_dim, token_dim, head_dim, in_ch, out_ch, groups):
        super().__init__()
        self.gradient_checkpointing = False
        self.time_dim = widths[0]
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

        self.down, ch, skips = nn.ModuleList(), widths[0], [widths[0]]  # skips: widths of the skips
        for i, (width, has_attention) in enumerate(zip(widths, with_attention, strict=True)):
            blocks = [res(ch if j == 0 else width, width) for j in range(n_res)]
            last = i + 1 == len(widths)
            self.down.append(DecoderLevel(blocks, attn(width, n_res * has_attention),
                                          None if last else res(width, width, downsample)))
            ch, skips = width, skips + [width] * (n_res + (not last))
        self.mid = DecoderLevel([res(ch, ch), res(ch, ch)], attn(ch, 1))
        self.up = nn.ModuleList()  # from the smallest feature map to the largest
        for i in reversed(range(len(widths))):
            blocks = [res((ch if j == 0 else widths[i]) + skips.pop(), widths[i]) for j in range(n_res + 1)]
            ch = widths[i]
            self.up.append(DecoderLevel(blocks, attn(ch, (n_res + 1) * with_attention[i]),
                                        res(ch, ch, upsample) if i > 0 else None))
        self.norm_out = GroupNorm(groups, ch)
        self.conv_out = nn.Conv2d(ch, out_ch, 3, padding=1)

    def read(self, image_embed):
        """The Read of image_embed (b, d); tokens (b, 32, token_dim), without a mask."""
        tokens = self.token_norm(rearrange(self.to_tokens(image_embed), "b (n d) -> b n d", n=32))
        return Read(tokens, None, self.image_mlp(image_embed))

    def forward(self, z, t, image_embed):
        tokens, _, pooled = image_embed if isinstance(image_embed, Read) else self.read(image_embed)
        emb = self.time_mlp(time_features(t, self.time_dim).to(z.dtype)) + pooled  # (b, emb_dim)
        x = self.conv_in(z)                                      # (b, widths[0], h, w)
        skips = [x]
        for level in self.down:
            for i in range(len(level.res)):
                x = checkpointed(self, level.stage, i, x, emb, tokens)
                skips.append(x)
            if level.resample is not None:
                x = level.resample(x, emb)                       # (b, c, h / 2, w / 2)
                skips.append(x)
        for i in range(2):
            x = checkpointed(self, self.mid.stage, i, x, emb, tokens)
        for level in self.up:
            for i in range(len(level.res)):
                x = torch.cat([x, skips.pop()], dim=1)
                x = checkpointed(self, level.stage, i, x, emb, tokens)
            if level.resample is not None:
                x = level.resample(x, emb)                       # (b, c, 2 h, 2 w)
        return self.conv_out(F.silu(self.norm_out(x)))           # (b, 8, h, w) as z


def build_decoder(config: dict):
    """The decoder U-Net from its published config.json; BadInput for settings that are not supported."""
    down = ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D")  # without, with attention
    up = ("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D")
    off = ("center_input_sample", "only_cross_attention", "dual_cross_attention", "use_linear_projection",
           "class_embed_type", "addition_time_embed_dim", "num_class_embeds", "resnet_skip_time_act",
           "time_embedding_dim", "time_embedding_act_fn", "timestep_post_act", "time_cond_proj_dim",
           "projection_class_embeddings_input_dim",
           "class_embeddings_concat", "mid_block_only_cross_attention", "cross_attention_norm",
           "num_attention_heads", "reverse_transformer_layers_per_block", "upcast_attention")
    refuse_other_unet("decoder U-Net", config)
    c = check_config(
        config, "decoder U-Net", "UNet2DConditionModel",
        defaults={"block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2,
                  "cross_attention_dim": 1280, "encoder_hid_dim": 0, "attention_head_dim": 8,
                  "in_channels": 4, "out_channels": 4, "norm_num_groups": 32,
                  "down_block_types": (), "up_block_types": (),
                  "sample_size": None, "addition_embed_type_num_heads": 64},  # the last 2 are unused
        allowed={"mid_block_type": ("UNetMidBlock2DSimpleCrossAttn",), "act_fn": ("silu",),
                 "encoder_hid_dim_type": ("image_proj",), "addition_embed_type": ("image",),
                 "resnet_time_scale_shift": ("scale_shift",), "norm_eps": (1e-5,),
                 "flip_sin_to_cos": (True,), "freq_shift": (0,), "conv_in_kernel": (3,),
                 "time_embedding_type": ("positional",), "conv_out_kernel": (3,), "downsample_padding": (1,),
                 "dropout": (0.0,), "mid_block_scale_factor": (1,), "resnet_out_scale_factor": (1,),
                 "transformer_layers_per_block": (1,), "attention_type": ("default",),
                 **dict.fromkeys(off, (None, False))})
    for key, expected in (("in_channels", 4), ("out_channels", 8)):
        if c[key] != expected:
            raise BadInput(f"decoder U-Net: not supported: {key}={c[key]!r}, expected {expected}")
    n = len(c["block_out_channels"])
    with_attention = [kind == down[1] for kind in c["down_block_types"]]
    if list(c["down_block_types"]) != [down[a] for a in with_attention] or len(with_attention) != n:
        raise BadInput(f"decoder U-Net: not supported: down_block_types={c['down_block_types']!r}")
    if list(c["up_block_types"]) != [up[a] for a in reversed(with_attention)]:
        raise BadInput(f"decoder U-Net: not supported: up_block_types={c['up_block_types']!r}, expected the "
                       "down_block_types in reverse order")
    if not c["encoder_hid_dim"]:
        raise BadInput("decoder U-Net: not supported: encoder_hid_dim=0, expected one whole number from 1")
    widths = c["block_out_channels"]
    check_divisible("decoder U-Net", "block_out_channels", widths, "norm_num_groups", c["norm_num_groups"])
    check_divisible("decoder U-Net", "block_out_channels", widths[:1], "cosines and sines of the time", 2)
    attended = [*(w for w, a in zip(widths, with_attention, strict=True) if a), widths[-1]]
    check_divisible("decoder U-Net", "block_out_channels", attended, "attention_head_dim",
                    c["attention_head_dim"])
    return Decoder(c["block_out_channels"], with_attention, c["layers_per_block"], c["encoder_hid_dim"],
                   c["cross_attention_dim"], c["attention_head_dim"], c["in_channels"], c["out_channels"],
                   c["norm_num_groups"])


def load_decoder(folder, dtype=torch.float32):
    """The decoder U-Net from a published folder of config.json and safetensors, in evaluation mode."""
    return load_published(build_decoder, folder, dtype)


# The U-Net of 3.0: blocks after BigGAN-deep, self-attention and cross-attention to the text (Kandinsky 3)


class BigGANUnit(nn.Module):
    """AdaGN, SiLU, convolution; up doubles the resolution before the convolution, down halves it after."""

    def __init__(self, in_ch, out_ch, kernel, emb_dim, groups, up=False, down=False):
        super().__init__()
        self.norm = AdaGroupNorm(in_ch, emb_dim, groups)
        self.up = nn.ConvTranspose2d(in_ch, in_ch, 2, stride=2) if up else nn.Identity()
        self.conv = nn.Conv2d(in_ch, out_ch, kernel, padding=kernel // 2)
        self.down = nn.Conv2d(out_ch, out_ch, 2, stride=2) if down else nn.Identity()

    def forward(self, x, emb):
        return self.down(self.conv(self.up(F.silu(self.norm(x, emb)))))  # (b, out_ch, h', w')


class BigGANBlock(nn.Module):
    """Residual bottleneck of four units, 1x1, 3x3, 3x3, 1x1, after BigGAN-deep (App. B).

    Kandinsky 3 chose half the width inside (BigGAN-deep: a quarter) and learnt up- and downsampling.
    """

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
    """Layers of block, cross-attention, block; widths: (in, inner, out) of each layer.

    attn[0] is the self-attention of the level, attn[i + 1] the cross-attention of layer i; a level without
    attention has neither.
    """

    def __init__(self, widths, self_ch, has_attention, emb_dim, text_dim, head_dim, groups, up=False,
                 down=False):
        super().__init__()

        def attend(ch, to_dim):
            return AttentionBlock(ch, emb_dim, to_dim, ch // head_dim, groups=groups)

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

    z (b, 4, h, w) noisy MoVQ latent, t (b,), text (b, n, d) T5 states with zeros at padding, text_mask (b, n)
    true at tokens; text may be what read(text, text_mask, text_length) returns, and only then is text_mask
    None. A row without a token is the null condition. The query that pools the text is a mean over the first
    text_length (b,) positions of a row, padding included (ours); None: over all n, as published, so that a
    row depends on the longest of its batch.
    """

    published_names = (
        *DIFFUSERS_NAMES,
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
        self.time_dim = first = widths[0] // 2
        self.time_mlp = nn.Sequential(nn.Linear(first, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
        self.text_mlp = nn.Sequential(nn.Linear(text_in, text_dim, bias=False), nn.LayerNorm(text_dim))
        self.text_pool = Attention(text_dim, text_dim, emb_dim // head_dim, out_dim=emb_dim)
        self.conv_in = nn.Conv2d(in_ch, first, 3, padding=1)
        common = emb_dim, text_dim, head_dim, groups
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        above = [first, *widths[:-1]]  # width of the level above, of the input and output
        for i, (outer, ch) in enumerate(zip(above, widths, strict=True)):
            layers = [(outer if j == 0 else ch, ch, ch) for j in range(n_layers)]
            self.down.append(UNet3Level(layers, outer, i > 0, *common, down=i + 1 < len(widths)))
        for i in reversed(range(len(widths))):
            outer, ch, lowest = above[i], widths[i], i + 1 == len(widths)
            both = ch if lowest else 2 * ch  # with the skip
            layers = [(both, both, ch), *[(ch, ch, ch)] * (n_layers - 2), (ch, ch, outer)]
            self.up.append(UNet3Level(layers, outer, i > 0, *common, up=not lowest))
        self.norm_out = GroupNorm(groups, first)
        self.conv_out = nn.Conv2d(first, in_ch, 3, padding=1)

    def read(self, text, text_mask, text_length=None):
        """The Read of these inputs of forward; tokens (b, n, text_dim)."""
        text_mask = text_mask.bool()
        text_mask = text_mask | ~text_mask.any(dim=1, keepdim=True)  # all masked becomes none masked
        text = self.text_mlp(text)                                   # (b, n, text_dim)
        if text_length is None:
            mean = text.mean(dim=1, keepdim=True)                    # (b, 1, text_dim)
        else:
            counted = torch.arange(text.shape[1], device=text.device) < text_length[:, None]
            total = (text * counted[..., None]).sum(dim=1, keepdim=True)
            mean = total / text_length.to(text.dtype)[:, None, None]
        return Read(text, text_mask, self.text_pool(mean, text, text_mask)[:, 0])

    def forward(self, z, t, text, text_mask=None, text_length=None):
        read = text if isinstance(text, Read) else self.read(text, text_mask, text_length)
        text, text_mask, pooled = read
        emb = self.time_mlp(timestep_embedding(t, self.time_dim).to(z.dtype)) + pooled
        x, skips = self.conv_in(z), []                               # (b, widths[0] / 2, h, w)
        for level in self.down:
            if level.attn:
                x = checkpointed(self, level.attn[0], x, emb)
            for i in range(len(level.res_in)):
                x = checkpointed(self, level.layer, i, x, emb, text, text_mask)
            skips.append(x)                                          # (b, c, h / 2, w / 2) but for the last
        skips.pop()
        for n, level in enumerate(self.up):
            if n > 0:
                x = torch.cat([x, skips.pop()], dim=1)
            for i in range(len(level.res_in)):
                x = checkpointed(self, level.layer, i, x, emb, text, text_mask)
            if level.attn:
                x = checkpointed(self, level.attn[0], x, emb)
        return self.conv_out(F.silu(self.norm_out(x)))               # (b, 4, h, w)


def build_unet3(config: dict):
    """The U-Net of Kandinsky 3 from its published config.json; BadInput for unsupported settings."""
    refuse_other_unet("U-Net 3", config)
    c = check_config(
        config, "U-Net 3", "Kandinsky3UNet",
        defaults={"in_channels": 4, "time_embedding_dim": 1536, "groups": 32, "attention_head_dim": 64,
                  "layers_per_block": 3, "block_out_channels": (384, 768, 1536, 3072),
                  "cross_attention_dim": 4096, "encoder_hid_dim": 4096},
        allowed={})
    for key in ("layers_per_block", "cross_attention_dim"):
        if c[key] < 2:
            raise BadInput(f"U-Net 3: not supported: {key}={c[key]!r}, expected one whole number from 2")
    if c["in_channels"] != 4:
        raise BadInput(f"U-Net 3: not supported: in_channels={c['in_channels']!r}, expected 4")
    # The width inside a block is half of the one outside.
    check_divisible("U-Net 3", "block_out_channels", c["block_out_channels"], "twice groups",
                    2 * c["groups"])
    check_divisible("U-Net 3", "block_out_channels", c["block_out_channels"], "attention_head_dim",
                    c["attention_head_dim"])
    check_divisible("U-Net 3", "time_embedding_dim", [c["time_embedding_dim"]], "attention_head_dim",
                    c["attention_head_dim"])
    check_divisible("U-Net 3", "block_out_channels", c["block_out_channels"][:1],
                    "half of it: cosines and sines of the time", 4)
    return UNet3(c["block_out_channels"], c["layers_per_block"], c["time_embedding_dim"],
                 c["encoder_hid_dim"], c["cross_attention_dim"], c["attention_head_dim"], c["in_channels"],
                 c["groups"])


def load_unet3(folder, dtype=torch.float32):
    """The U-Net of Kandinsky 3 from a published folder of config.json and safetensors, in evaluation mode."""
    return load_published(build_unet3, folder, dtype)


# The networks that adapters belong to, by the class in their config.json
NETWORKS = {
    "PriorTransformer": (build_prior, load_prior),
    "UNet2DConditionModel": (build_decoder, load_decoder),
    "Kandinsky3UNet": (build_unet3, load_unet3),
}


def find_network(folder, part):
    """(folder of the network, function to build it, function to load it) in a model's folder.

    part: "prior" or "unet", which of the two is meant where the folder holds both. It may also hold the
    network itself; BadInput if there is none.
    """
    folder = Path(folder)
    both = {"prior": prior_part(folder, "prior"), "unet": folder / "unet"}
    places = [p for p in (both[part], *both.values(), folder) if (p / "config.json").is_file()]
    kind = read_json(places[0] / "config.json").get("_class_name") if places else None
    if not isinstance(kind, str) or kind not in NETWORKS:
        raise BadInput(f"{folder}: expected a published model with a network in prior/ or unet/, of "
                       f"{', '.join(NETWORKS)}; got {f'{kind!r:.100}' if places else 'no config.json there'}")
    return places[0], *NETWORKS[kind]
