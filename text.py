"""Text encoders of MSDM: a small transformer trained with the U-Net, and its tokenizer; a public frozen CLIP.

CLIP   arXiv:2103.00020  Sec. 2.4, the text transformer
ALiBi  arXiv:2108.12409  Sec. 3, a penalty on attention logits that is linear in the distance of two tokens
BPE    arXiv:1508.07909  byte-pair encoding
"""

from command import BadInput, reason

import hashlib
import json
import re
import sys
from dataclasses import asdict, dataclass

import torch
from torch import nn

from files import text_hash
from unet import attention
from weights import check_fields


def warn_of_cut(encoder, prompts):
    """One line on stderr if prompts are longer than the text encoder reads; each prompt counts once.

    encoder has `length`, in tokens, and lost(prompt), the end of a prompt that it does not read.
    """
    known = vars(encoder).setdefault("checked_prompts", set())
    new = sorted(set(prompts) - known)
    known.update(new)
    if cut := [lost for lost in map(encoder.lost, new) if lost]:
        print(f"warning: {len(cut)} of {len(new)} prompts {'is' if len(cut) == 1 else 'are'} cut: the text "
              f"encoder reads {encoder.length} tokens, what stands behind them is lost, for example "
              f"{' '.join(cut[0].split()[:6])!r}", file=sys.stderr)


@dataclass
class TextConfig:
    """A text transformer trained with the U-Net; tokenizer is the text of a `tokenizers` JSON file."""

    tokenizer: str
    vocab: int
    length: int = 96  # tokens, padded or truncated
    dim: int = 128
    n_layers: int = 2
    n_heads: int = 4

    def __post_init__(self):
        check_fields(self)
        if self.length > 4096:  # memory grows with its square, and no tensor of a file tells it
            raise BadInput(f"TextConfig: length={self.length}, expected at most 4096 tokens")
        if self.dim % self.n_heads:
            raise BadInput(f"TextConfig: dim={self.dim} is not divisible by {self.n_heads} heads")


class TextLayer(nn.Module):
    """Self-attention, then a feed-forward layer, both residual and pre-normalised."""

    def __init__(self, dim, n_heads):
        super().__init__()
        self.n_heads = n_heads
        self.norm_1, self.norm_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x, mask, bias):
        y = self.norm_1(x)
        x = x + self.to_out[0](attention(self.to_q(y), self.to_k(y), self.to_v(y), self.n_heads, mask, bias))
        return x + self.mlp(self.norm_2(x))


def alibi(n, n_heads, device):
    """Bias of the logits (1, n_heads, n, n): -|i - j| 2^(-8 h / n_heads) for head h = 1, 2, ...

    ALiBi, Sec. 3, where it is causal; the symmetric form is ours.
    """
    slope = 2.0 ** (-8 * torch.arange(1, n_heads + 1, device=device) / n_heads)
    position = torch.arange(n, device=device)
    return (-slope[:, None, None] * (position[None] - position[:, None]).abs())[None]


class TextTransformer(nn.Module):
    """Prompts -> (states (b, length, dim), mask (b, length)), true at tokens.

    CLIP's text transformer at a small size and bidirectional (ours). ALiBi replaces position embeddings, so
    joined sentences may come in any order, and "upper-left" attends to the noun nearby.
    """

    in_checkpoint = True  # its tensors are

    def __init__(self, config: TextConfig):
        super().__init__()
        from tokenizers import Tokenizer

        self.config = config
        self.tokenizer = Tokenizer.from_str(config.tokenizer)
        if max(self.tokenizer.get_vocab().values(), default=0) >= config.vocab:
            raise BadInput(f"TextConfig: vocab={config.vocab}, but the tokenizer has more tokens")
        self.tokenizer.enable_truncation(config.length)
        self.tokenizer.enable_padding(length=config.length, pad_id=0, pad_token="<pad>")
        self.tokens = nn.Embedding(config.vocab, config.dim)
        self.layers = nn.ModuleList(TextLayer(config.dim, config.n_heads) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, prompts):
        return self.encode(*(x.to(self.tokens.weight.device) for x in self.tokenise(prompts)))

    def tokenise(self, prompts):
        """(ids (b, length) int64, mask (b, length) bool) of b prompts, on the CPU."""
        encoded = self.tokenizer.encode_batch(list(prompts))
        mask = torch.tensor([e.attention_mask for e in encoded])
        return torch.tensor([e.ids for e in encoded]), mask.bool()

    def encode(self, ids, mask):
        """(states (b, length, dim), mask) of the tokens that tokenise returns."""
        bias = alibi(self.config.length, self.config.n_heads, ids.device)
        x = self.tokens(ids)  # (b, length, dim)
        for layer in self.layers:
            x = layer(x, mask, bias)
        return self.norm(x), mask

    @property
    def length(self):
        return self.config.length

    def lost(self, prompt):
        """The end of a prompt that is not read, "" for most."""
        rest = self.tokenizer.encode(prompt).overflowing
        starts = [a for a, b in rest[0].offsets if a < b] if rest else []
        return prompt[starts[0]:] if starts else ""

    def metadata(self):
        return {"train": asdict(self.config)}


# BPE merges inside a match only; spaces between matches are dropped. Prompts are in lower case here.
WORD = (r"(?:\b(?:no|\d+) |[<>] ?)?"  # optional: a count ("2 ", "no ") or the sign of a size class
        r"[\w-]+"  # a word: letters, digits, hyphens
        r"|[^\w\s-]")  # or one punctuation mark


def learn_tokenizer(prompts, vocab=1024):
    """Byte-level BPE learnt from the training prompts, as (JSON text, vocabulary size).

    <pad> is 0; <bos> and <eos> enclose every prompt. WORD is ours: the position "upper-left" is one token. A
    count with its noun ("2 polyps") and a size class (">20mm") are single tokens too: otherwise "2" has one
    embedding for polyps and instruments.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    tok = Tokenizer(models.BPE())
    tok.normalizer = normalizers.Lowercase()
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORD), "removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<bos>", "<eos>"]
    tok.train_from_iterator(sorted(set(prompts)), trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=special, initial_alphabet=alphabet, show_progress=False))
    tok.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[(s, tok.token_to_id(s)) for s in special[1:]])
    return tok.to_str(), tok.get_vocab_size()


class TextEncoderReference(nn.Module):
    """The name of a public text encoder that is not part of a checkpoint, and its hash, or None."""

    in_checkpoint = False  # its name and hash are

    def __init__(self, name, length=64, weights=None):
        super().__init__()
        self.name, self.length, self.weights = hub_name(name), length, weights

    def metadata(self):
        return {"name": self.name, "length": self.length, "hash": self.weights}


def hub_name(name):
    """The repository of a folder in the hub's cache, as openai/clip-vit-large-patch14; other names as given.

    A checkpoint then names what everyone can fetch, not a place on the machine that it was trained on.
    """
    found = re.search(r"models--([\w.-]+?)--([\w.-]+)/snapshots/[0-9a-f]+/?$", str(name))
    return f"{found[1]}/{found[2]}" if found else str(name)


class FrozenCLIP(TextEncoderReference):
    """A public CLIP text model by name or folder, never trained.

    Prompts -> (last hidden states (b, length, d), mask (b, length)); padded or truncated to length tokens.
    """

    def __init__(self, name, length=64, dtype=torch.float32):
        super().__init__(name, length)
        from transformers import AutoTokenizer, CLIPTextModel

        try:
            # No code of a folder is run, and nothing unpickled.
            self.tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            if not set(self.tokenizer.get_vocab()) - set(self.tokenizer.all_special_tokens):
                raise BadInput("its tokenizer has no vocabulary, tokenizer.json or vocab.json and merges.txt")
            model = CLIPTextModel.from_pretrained(name, dtype=dtype, use_safetensors=True)
            self.model = model.eval().requires_grad_(False)
            if length > (most := model.config.max_position_embeddings):
                raise BadInput(f"it reads at most {most} tokens, {length} are asked for")
        except MemoryError:
            raise
        except Exception as error:  # a file that transformers cannot use shows in many ways
            raise BadInput(f"text encoder {name}: neither a folder with a CLIP text model nor available from "
                           f"the hub ({reason(error)}); --text-encoder train learns a small one") from None
        self.weights = self._hash()

    def _hash(self):
        """Hash of the weights, as float16, and of the vocabulary: not of files, which a hub repacks."""
        parts = sorted(hashlib.sha256(str(tuple(p.shape)).encode() + p.half().numpy().tobytes()).hexdigest()
                       for p in self.model.parameters())
        return text_hash(*parts, json.dumps(sorted(self.tokenizer.get_vocab().items())))

    def lost(self, prompt):
        """The end of a prompt that is not read, "" for most."""
        ids = self.tokenizer(prompt, verbose=False).input_ids
        if len(ids) <= self.length:
            return ""
        return self.tokenizer.decode(ids[self.length - 1:], skip_special_tokens=True)

    def forward(self, prompts):
        return self.encode(*(x.to(self.model.device) for x in self.tokenise(prompts)))

    def tokenise(self, prompts):
        """(ids (b, length) int64, mask (b, length) bool) of b prompts, on the CPU."""
        tokens = self.tokenizer(list(prompts), padding="max_length", truncation=True, max_length=self.length,
                                return_tensors="pt")
        return tokens.input_ids, tokens.attention_mask.bool()

    @torch.no_grad()
    def encode(self, ids, mask):
        """(states (b, length, d), mask) of the tokens that tokenise returns."""
        states = self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return states.float(), mask


def load_text_encoder(path, meta, where=None):
    """The FrozenCLIP of a checkpoint's metadata under "text", found under its name or where it lies now.

    path: of the checkpoint, for messages. BadInput for another encoder than it was trained with.
    """
    way_out = "; --text-encoder FOLDER says where the right one lies"
    try:
        text = FrozenCLIP(where or meta["name"], meta["length"])
    except BadInput as error:
        reason = str(error).split("; --text-encoder")[0]
        raise BadInput(f"{path}, trained with the text encoder {meta['name']}: {reason}{way_out}") from None
    expected = meta.get("hash")  # none in checkpoints of release.py
    if expected not in (None, text.weights):
        raise BadInput(f"{path}: was trained with a text encoder of hash {expected}, "
                       f"{where or meta['name']} holds one of hash {text.weights}{way_out}")
    if where:
        text.name = meta["name"]
    return text
