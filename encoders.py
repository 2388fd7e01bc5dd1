"""Frozen encoders as transformers loads them: CLIP's two, T5, tokenizers around Kandinsky, vision models.

CLIP  arXiv:2103.00020  text and image towers with projections into one space of embeddings
"""

from command import BadInput, reason

import importlib
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from files import read_json, refuse_pointer
from weights import HALF, check_finite, listed, refuse_pickles

MOST_EXTRA = 10_000     # tokens that a T5 tokenizer adds to its vocabulary; the published ones add 100
VOCABULARIES = ("tokenizer.json",), ("vocab.json", "merges.txt"), ("*.model",)  # files of tokenizers


def check_files(folder, is_tokenizer):
    """BadInput for a folder that lacks what load_transformer reads, or has git-lfs pointers for it."""
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder, expected the model's {folder.name} there, as published: "
                       "download the model again")
    for file in folder.glob("*"):
        if file.is_file():
            refuse_pointer(file)
    if not is_tokenizer:
        read_json(folder / "config.json")  # if it is absent or broken, transformers takes sizes of its own
        refuse_pickles(folder)
    # Without a vocabulary transformers makes a tokenizer that knows no word, and says nothing.
    elif not any(all(any(folder.glob(name)) for name in names) for names in VOCABULARIES):
        raise BadInput(f"{folder}: no vocabulary, expected tokenizer.json, or vocab.json and merges.txt, or "
                       "spiece.model: download the model again")
    elif (file := folder / "tokenizer_config.json").is_file():
        extra = read_json(file).get("extra_ids") or 0
        if not isinstance(extra, int) or not 0 <= extra <= MOST_EXTRA:  # transformers makes them one by one
            raise BadInput(f"{file}: extra_ids is {extra!r:.60}, expected a number up to {MOST_EXTRA}")


def load_transformer(cls, folder, dtype=None, pads=True):
    """A tokenizer or, with dtype, a frozen model of transformers from a folder; BadInput if it fails.

    No code of the folder is run, and nothing unpickled. Of weights in two precisions those for dtype are
    read. Every weight must be there but those of a pooling layer, which none of our models reads. pads:
    whether the tokenizer must have a padding token, as one has not whose texts are read alone.
    """
    folder, settings = Path(folder), {"trust_remote_code": False}
    check_files(folder, dtype is None)
    if dtype is not None:
        halves = [".fp16" in f.name for f in folder.glob("*.safetensors")]
        half = any(halves) and (dtype in HALF or all(halves))
        settings |= {"dtype": dtype, "use_safetensors": True, "variant": "fp16" if half else None,
                     "output_loading_info": True}
    try:
        loaded = cls.from_pretrained(folder, local_files_only=True, **settings)
    except MemoryError:
        raise
    except Exception as error:  # a file that transformers cannot use shows in many ways
        why = f"{cls.__name__} does not load from it ({reason(error)})"
        raise BadInput(f"{folder}: {_missing_packages(folder) or why}") from None
    if dtype is None:
        if pads and loaded.pad_token is None:
            raise BadInput(f"{folder}: the tokenizer has no padding token; expected tokenizer_config.json or "
                           "special_tokens_map.json beside its vocabulary")
        return loaded
    loaded, info = loaded
    if missing := sorted(k for k in info["missing_keys"] if "pooler." not in k):
        raise BadInput(f"{folder}: lacks weights of {type(loaded).__name__}: {listed(missing, 5)}")
    check_finite(folder, dict(loaded.named_parameters()))
    return loaded.requires_grad_(False).eval()


def load_image_processor(folder):
    """The image processor of transformers in a folder, which makes pixels of images; no code of it is run."""
    from transformers import AutoImageProcessor

    read_json(folder / "preprocessor_config.json")
    try:
        return AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a file that transformers cannot use shows in many ways
        raise BadInput(f"{folder}/preprocessor_config.json: transformers makes no image processor of it "
                       f"({reason(error)})") from None


def _missing_packages(folder):
    """What to install for a tokenizer that lies there as sentencepiece's file only; None if nothing."""
    if not any(folder.glob("*.model")) or (folder / "tokenizer.json").is_file():
        return None
    names = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}
    missing = [name for module, name in names.items() if not _is_installed(module)]
    return missing and f"its tokenizer needs {' and '.join(missing)}: pip install {' '.join(missing)}"


def _is_installed(module):
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def check_vocabulary(folder, tokenizer, encoder):
    """BadInput for a tokenizer of more tokens than its text encoder has embeddings for."""
    if len(tokenizer) > encoder.config.vocab_size:
        raise BadInput(f"{folder}: the tokenizer has {len(tokenizer)} tokens, the text encoder reads "
                       f"{encoder.config.vocab_size}: they do not belong together")


def warn_of_cut(tokenizer, prompts, length):
    """One line on stderr if prompts are longer than the length tokens that a text encoder reads."""
    prompts = list(prompts)
    tokens = tokenizer(prompts, verbose=False).input_ids if prompts else []
    cut = [(p, ids) for p, ids in zip(prompts, tokens, strict=True) if len(ids) > length]
    if cut:
        lost = " ".join(tokenizer.decode(cut[0][1][length - 1:-1]).split()[:6])  # the end token is kept
        print(f"warning: {len(cut)} of {len(prompts)} prompts are cut to the {length} tokens that the text "
              f"encoder reads; of {cut[0][0][:40]!r}... is lost: {lost!r}...", file=sys.stderr)


# CLIP


def clip_texts(text_encoder, tokenizer, prompts):
    """(text embeddings (b, d), states (b, 77, d), mask (b, 77)); CLIP's text encoder itself gets no mask."""
    tokens = tokenizer(prompts, padding="max_length", max_length=clip_length(text_encoder), truncation=True,
                       return_tensors="pt").to(text_encoder.device)
    out = text_encoder(tokens.input_ids)
    return out.text_embeds, out.last_hidden_state, tokens.attention_mask.bool()


def clip_length(text_encoder):
    """The number of tokens that CLIP reads, 77; a tokenizer's own file need not say it."""
    return text_encoder.config.max_position_embeddings


def clip_images(image_encoder, pixels):
    """CLIP embeddings (b, d) of images (b, 3, s, s) that are preprocessed for CLIP."""
    return image_encoder(pixels.to(image_encoder.device, image_encoder.dtype)).image_embeds


def clip_black(image_encoder):
    """CLIP embedding (1, d) of a zero image, the decoder's null condition."""
    size = image_encoder.config.image_size
    return clip_images(image_encoder, torch.zeros(1, 3, size, size))


def clip_preprocessor(folder):
    """Function from an RGB image to (3, s, s) for CLIP: short side to s (bicubic), centre crop, normalise."""
    file = folder / "preprocessor_config.json"
    c = {"do_rescale": True, "rescale_factor": 1 / 255} | read_json(file)  # older files lack these two
    size = c.get("size")
    side = size.get("shortest_edge") if isinstance(size, dict) else size  # older files have plain numbers
    fixed = {"crop_size": (side, {"height": side, "width": side}), "resample": (3,),
             "do_rescale": (True, False),
             **dict.fromkeys(("do_resize", "do_center_crop", "do_normalize"), (True,))}
    wrong = [f"{k}={c.get(k)!r:.100}" for k, v in fixed.items() if c.get(k) not in v]
    if type(side) is not int or side < 1:
        wrong.append(f"size={size!r:.100}")
    wrong += [f"{k}={c.get(k)!r:.100}, expected three numbers{more}"
              for k, low, more in (("image_mean", -1e6, ""), ("image_std", 0, " above 0"))
              if not _are_three(c.get(k), low)]
    factor = c["rescale_factor"] if c["do_rescale"] else 1.0
    if not _are_three([factor] * 3, 0):
        wrong.append(f"rescale_factor={factor!r:.100}, expected a number above 0")
    if wrong:
        raise BadInput(f"{file}: not supported: {', '.join(wrong)}")
    mean, std = (torch.tensor(c[k]).view(3, 1, 1) for k in ("image_mean", "image_std"))

    def transform(img):
        w, h = img.size
        w, h = (side, int(side * h / w)) if w <= h else (int(side * w / h), side)
        left, top = (w - side) // 2, (h - side) // 2
        img = img.resize((w, h), Image.Resampling.BICUBIC).crop((left, top, left + side, top + side))
        return (torch.from_numpy(np.array(img)).permute(2, 0, 1) / (1 / factor) - mean) / std

    return transform


def _are_three(values, low):
    """Whether a setting is three numbers above low."""
    return isinstance(values, list) and len(values) == 3 and all(
        isinstance(v, int | float) and not isinstance(v, bool) and low < v < 1e6 for v in values)
