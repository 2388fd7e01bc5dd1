"""Kandinsky's training data after its frozen encoders, kept in files; sample images from them.

The encoders (encoders.py, MoVQ) run once over the images and prompts of a data folder, before a training;
finetune.py then reads what they gave.
"""

from command import BadInput

from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

import data
import lora
import training
from diffusion import guided, seeded_noise
from encoders import clip_black, clip_images, clip_preprocessor, clip_texts, load_transformer, warn_of_cut
from files import cached, folder_hash, text_hash
from kandinsky import (
    Kandinsky3,
    Kandinsky22,
    check_match,
    check_size,
    decode_one_by_one,
    latent_shape,
    on_device,
    pad_texts,
    read_schedule,
    solve,
)
from kandinsky_networks import load_decoder
from movq import MoVQ, load_movq
from runfolder import check_savable
from unet import InItsDtype
from weights import check_kind, fetch, prior_part
from wording import Wording


@dataclass
class EncodedData:
    """Training data after the frozen encoders; a step draws one condition of each image."""

    x_0: torch.Tensor  # (n, ...), float
    conditions: tuple  # the inputs besides x_t and t, each (n_rows, ...); row 0 is the null condition
    rows: list  # of each image, its rows of the conditions
    black: torch.Tensor | None = None  # CLIP embedding (1, d) of a zero image, the null one of a decoder
    ways: dict = field(default_factory=dict)  # of a prompt's row: it and the rows of its paraphrases
    words: Wording = field(default_factory=Wording)  # which of these a step draws

    def draw(self, images, p_uncond, generator):
        """A row (b,) of each of the images (b,), row 0 with probability p_uncond (CFG, Algorithm 1)."""
        own = [self.rows[i] for i in images.tolist()]
        drawn = [rows[int(torch.randint(len(rows), (), generator=generator))] for rows in own]
        drawn = [self.words.choose(self.ways.get(row, [row]), generator) for row in drawn]
        return torch.tensor(drawn).masked_fill(torch.rand(len(drawn), generator=generator) < p_uncond, 0)


@dataclass
class EncoderCache:
    """Runs the frozen encoders once on the images and their prompts, and keeps their output in files.

    Rank 0 runs them, the others wait for its files and load no encoder (world.main_first); so does the first
    rank of another machine, whose disk is not rank 0's. Where a file cannot be written, each rank runs them.
    """

    records: list  # with readable images; mirrored copies are behind them
    words: Wording  # that their prompts are said in
    folder: Path  # of the files
    world: training.Distributed
    dtype: torch.dtype  # of the encoders
    clip: Path  # the folder that holds CLIP's image encoder
    movq: MoVQ | None  # the autoencoder of the network's folder; None: the network makes no latents

    def kept(self, name, key, make):
        """The dict of tensors that make() returns, from its file if there is one; they depend only on key."""
        file = self.folder / f"{name}-{text_hash(*key)}.safetensors"

        def checked():
            tensors = make()
            check_savable(file, tensors)
            return tensors, None

        return cached(file, checked, self.world.is_first_here)[0]

    def prompts(self):
        """(the distinct prompts and paraphrases, the empty prompt first; for each image the positions of its
        own prompts in them; for the position of each prompt, where there are paraphrases, it and theirs)."""
        ways = {p: self.words.ways(p) for r in self.records for p in r.prompts}
        distinct = ["", *sorted({way for p in ways for way in ways[p]} - {""})]
        position = {p: i for i, p in enumerate(distinct)}
        rows = [[position[p] for p in r.prompts] for r in self.records]
        if not self.words.paraphrases:
            return distinct, rows, {}
        return distinct, rows, {position[p]: [position[way] for way in ways[p]] for p in ways}

    def images(self):
        """CLIP embeddings (n + 1, d): of a zero image, the decoder's null condition, then of the images."""
        from transformers import CLIPVisionModelWithProjection

        encoder_folder, processor_folder = (prior_part(self.clip, name)
                                            for name in ("image_encoder", "image_processor"))

        def make():
            encoder = load_transformer(CLIPVisionModelWithProjection, encoder_folder, self.dtype)
            encoder.to(self.world.device)
            transform, n = clip_preprocessor(processor_folder), len(self.records)
            embeds = [clip_black(encoder)]
            for part in tqdm(data.batches(n, 32), "image embeddings", disable=n < 500):
                pixels = [transform(data.open_record(r)) for r in self.records[part]]
                embeds.append(clip_images(encoder, torch.stack(pixels)))
            return {"embeds": torch.cat(embeds)}

        hashes = folder_hash(encoder_folder), folder_hash(processor_folder)
        key = *hashes, data.image_fingerprint(self.records), self.dtype
        return self.kept("clip-images", key, make)["embeds"]

    def latents(self, folder, size):
        """MoVQ latents (n, 4, h, w) of the images, padded to a square."""
        def make():
            images, _ = data.load_images(self.records, size, "pad", on_bad="raise")
            parts = tqdm(data.batches(len(images), 8), "latents", disable=len(images) < 500)
            floats = (data.to_float(images[part].to(self.world.device)) for part in parts)
            with on_device(self.movq, self.world.device):
                return {"z": torch.cat([self.movq.encode(img) for img in floats])}

        key = folder_hash(folder / "movq"), data.image_fingerprint(self.records), size
        return self.kept("latents", key, make)["z"]


def load_autoencoder(folder, network, size):
    """The frozen MoVQ of a folder; BadInput if it and the network do not divide images of this size."""
    movq = load_movq(folder / "movq").requires_grad_(False)
    multiple = movq.factor * 2 ** (len(network.down) - 1)
    if size < 1 or size % multiple:
        message = f"is not divisible by {multiple}, the downsampling of MoVQ and the U-Net together"
        raise BadInput(f"--size {size} {message}")
    return movq


@torch.no_grad()
def prior_data(args, prior, folder, encoders):
    """x_0: normalised image embeddings (n, d). Conditions: CLIP embedding, states and mask of a prompt."""
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    prompts, rows, ways = encoders.prompts()
    text_folder, tokenizer_folder = prior_part(folder, "text_encoder"), prior_part(folder, "tokenizer")
    tokenizer = load_transformer(CLIPTokenizer, tokenizer_folder)

    def make():
        encoder = load_transformer(CLIPTextModelWithProjection, text_folder, encoders.dtype)
        encoder.to(encoders.world.device)
        parts = tqdm(data.batches(len(prompts), 64), "text embeddings", disable=len(prompts) < 500)
        encoded = [[x.cpu() for x in clip_texts(encoder, tokenizer, prompts[part])] for part in parts]
        embeds, states, mask = map(torch.cat, zip(*encoded, strict=True))
        return {"embeds": embeds, "states": states, "mask": mask}

    key = folder_hash(text_folder), folder_hash(tokenizer_folder), *prompts, encoders.dtype
    texts = encoders.kept("clip-texts", key, make)
    if encoders.world.is_main:
        warn_of_cut(tokenizer, prompts, texts["states"].shape[1])
    embeds = encoders.images()
    x_0, conditions = prior.normalise(embeds[1:].float()), (texts["embeds"], texts["states"], texts["mask"])
    return EncodedData(x_0, conditions, rows, embeds[:1], ways, encoders.words)


@torch.no_grad()
def decoder_data(args, decoder, folder, encoders):
    """x_0: MoVQ latents (n, 4, h, w). Condition: the image's own CLIP embedding, not normalised."""
    latents = encoders.latents(folder, args.size)
    embeds = encoders.images()  # row 0: the null condition
    return EncodedData(latents, (embeds,), [[1 + i] for i in range(len(latents))])


@torch.no_grad()
def unet3_data(args, unet, folder, encoders):
    """x_0: MoVQ latents (n, 4, h, w). Conditions: T5 states, mask, own length + 1 as in Kandinsky3.sample."""
    from transformers import T5Tokenizer

    latents = encoders.latents(folder, args.size)
    prompts, rows, ways = encoders.prompts()
    text_dtype = torch.float32 if encoders.dtype == torch.float32 else torch.bfloat16
    text_device = args.text_device or encoders.world.device
    tokenizer = load_transformer(T5Tokenizer, folder / "tokenizer")
    pipeline = Kandinsky3(unet, None, folder / "text_encoder", text_dtype, text_device, tokenizer, None)
    pipeline.prepare(prompts, cache=encoders.folder, is_main=encoders.world.is_first_here)
    texts = [pipeline.texts[p] for p in prompts[1:]]
    check_savable(f"{folder / 'text_encoder'}, text states", dict(zip(prompts[1:], texts, strict=True)))
    texts = [texts[0][:0], *texts]  # the null condition has no token
    lengths = torch.tensor([min(len(x) + 1, pipeline.n_tokens) for x in texts])
    conditions = *pad_texts(texts, int(lengths.max())), lengths
    return EncodedData(latents, conditions, rows, None, ways, encoders.words)


# Sample images


class Sheets:
    """Images of held-out conditions, drawn while a network is trained, always of the same prompts and noise.

    U-Net 3 draws them of prompts, the decoder of the images' own CLIP embeddings, and the prior makes
    embeddings of prompts, which --decoder draws. The networks that only a sheet needs lie in the host's
    memory and are on the device while they compute.
    """

    def __init__(self, args, network, schedule, movq, dtype, device):
        self.args, self.network, self.schedule, self.device = args, network, schedule, device
        self.movq, self.decoder = movq, None
        if args.network == "prior":
            folder = fetch(args.decoder, dtype)
            check_kind(folder, "decoder", "combined")
            check_size("--size", args.size, Kandinsky22.size_multiple(folder))
            self.decoder = load_decoder(folder / "unet", dtype)
            self.decoder_schedule = read_schedule(folder / "scheduler")
            check_match(folder, "width of an image embedding", network.to_embed.out_features,
                        self.decoder.to_tokens.in_features)
            if args.decoder_lora:
                lora.load(self.decoder, args.decoder_lora)
            self.movq = load_movq(folder / "movq")

    @torch.inference_mode()
    def draw(self, encoded, images):
        """uint8 (n, 3, h, w) of a condition of each of the images (n,), with sampler.py's noise of seed 0."""
        own = [encoded.rows[i] for i in images.tolist()]
        rows = torch.tensor([r[i % len(r)] for i, r in enumerate(own)])
        noise, shape = seeded_noise(range(len(rows))), (len(rows), *encoded.x_0.shape[1:])
        x_0 = self.x_0(self.network, self.schedule, encoded.conditions, rows, noise, shape)
        if self.decoder is not None:
            embeds = torch.cat([encoded.black.to(self.device), self.network.denormalise(x_0)])
            shape = latent_shape(len(rows), self.args.size, self.args.size, self.movq.factor)
            with on_device(self.decoder, self.device):
                x_0 = self.x_0(self.decoder, self.decoder_schedule, (embeds,), torch.arange(1, len(embeds)),
                               noise, shape)
        with on_device(self.movq, self.device):
            return data.to_uint8(decode_one_by_one(self.movq, x_0))

    def x_0(self, network, schedule, conditions, rows, noise, shape):
        """What a network makes of noise with rows (n,) of the conditions, guided away from row 0."""
        cond, null = ([c[r].to(self.device) for c in conditions] for r in (rows, torch.zeros_like(rows)))
        predict = guided(InItsDtype(network), cond, null, Kandinsky22.defaults["guidance"])

        def output_and_variance(x_t, t):
            out, of_cond = predict(x_t, t)
            return out[:, :shape[1]], of_cond[:, shape[1]:]

        return solve(output_and_variance, schedule, self.args.sample_steps, "dpmpp", noise, shape,
                     self.device)
