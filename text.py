"""Text encoders of MSDM: a small transformer that is trained along, with its tokenizer, or a public frozen CLIP.

CLIP   arXiv:2103.00020  Sec. 2.4, the text transformer
ALiBi  arXiv:2108.12409  Sec. 3, attention logits fall linearly with the distance of two tokens
"""

from dataclasses import asdict, dataclass

import torch
from torch import nn

from command import BadInput
from unet import attention


@dataclass
class TextConfig:
    """A text transformer trained along; its tokenizer is the text of a `tokenizers` JSON file."""

    tokenizer: str
    vocab: int
    length: int = 96
    dim: int = 128
    n_layers: int = 2
    n_heads: int = 4


class TextLayer(nn.Module):
    """Self-attention, then a feed-forward layer, each on a normalised input."""

    def __init__(self, dim, n_heads):
        super().__init__()
        self.n_heads = n_heads
        self.norm_1, self.norm_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x, mask):
        y = self.norm_1(x)
        x = x + self.to_out[0](attention(self.to_q(y), self.to_k(y), self.to_v(y), self.n_heads, mask))
        return x + self.mlp(self.norm_2(x))


def alibi(n, n_heads, device):
    """-|i - j| 2^(-8 h / n_heads) for head h = 1, 2, ...: (1, n_heads, n, n), added to the logits (ALiBi, Sec. 3, both ways)."""
    slope = 2.0 ** (-8 * torch.arange(1, n_heads + 1, device=device) / n_heads)
    place = torch.arange(n, device=device)
    return (-slope[:, None, None] * (place[None] - place[:, None]).abs())[None]


class TextTransformer(nn.Module):
    """Prompts -> (states (b, length, dim), mask (b, length)), true at tokens.

    CLIP's text tower at a small size; it looks both ways, for nothing is generated here. A token knows others by their
    distance and not by their place in the text: several sentences may come in any order, and "upper-left" belongs to the
    noun of its own.
    """

    trained = True

    def __init__(self, config: TextConfig):
        super().__init__()
        from tokenizers import Tokenizer

        self.config = config
        self.tokenizer = Tokenizer.from_str(config.tokenizer)
        self.tokenizer.enable_truncation(config.length)
        self.tokenizer.enable_padding(length=config.length, pad_id=0, pad_token="<pad>")
        self.tokens = nn.Embedding(config.vocab, config.dim)
        self.layers = nn.ModuleList(TextLayer(config.dim, config.n_heads) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, prompts):
        encoded = self.tokenizer.encode_batch(list(prompts))
        device = self.tokens.weight.device
        ids = torch.tensor([e.ids for e in encoded], device=device)
        mask = torch.tensor([e.attention_mask for e in encoded], device=device).bool()
        bias = alibi(self.config.length, self.config.n_heads, device).masked_fill(~mask[:, None, None], -torch.inf)
        x = self.tokens(ids)
        for layer in self.layers:
            x = layer(x, bias)
        return self.norm(x), mask

    def metadata(self):
        return {"train": asdict(self.config)}


def learn_tokenizer(prompts, vocab=1024):
    """Byte-level BPE learnt from the training prompts, as (JSON text, vocabulary size). <pad> is 0; <bos> and <eos> go round.

    Words are cut at spaces and marks but not at hyphens: "upper-left" is one token, a place of its own, and not "upper", "-",
    "left", which the text layers would have to put together again. So is a number with its noun, lest "2" alone be heard as of
    polyps and of instruments alike, and ">20mm".
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    tok = Tokenizer(models.BPE())
    tok.normalizer = normalizers.Lowercase()
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"(?:\b(?:no|\d+) |[<>] ?)?[\w-]+|[^\w\s-]"), "removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<bos>", "<eos>"]
    tok.train_from_iterator(sorted(set(prompts)), trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=special, initial_alphabet=alphabet, show_progress=False))
    tok.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[(s, tok.token_to_id(s)) for s in special[1:]])
    return tok.to_str(), tok.get_vocab_size()


class TextEncoderReference(nn.Module):
    """A public text encoder that is only named, for a checkpoint that is written without it."""

    trained = False

    def __init__(self, name, length=64):
        super().__init__()
        self.name, self.length = name, length

    def metadata(self):
        return {"name": self.name, "length": self.length}


class FrozenCLIP(TextEncoderReference):
    """A public CLIP text model by name or folder: last hidden states of prompts padded to 64 tokens, never trained, not copied."""

    def __init__(self, name, length=64, dtype=torch.float32):
        super().__init__(name, length)
        from transformers import AutoTokenizer, CLIPTextModel

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name)
            self.model = CLIPTextModel.from_pretrained(name, dtype=dtype).eval().requires_grad_(False)
        except (OSError, ValueError) as error:
            raise BadInput(f"text encoder {name}: neither a folder with a CLIP text model nor to be had from the hub "
                           f"({str(error).splitlines()[0]}); --text-encoder train learns a small one") from None

    @torch.no_grad()
    def forward(self, prompts):
        tokens = self.tokenizer(list(prompts), padding="max_length", truncation=True, max_length=self.length,
                                return_tensors="pt").to(self.model.device)
        states = self.model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        return states.float(), tokens.attention_mask.bool()
