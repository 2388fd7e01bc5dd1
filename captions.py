"""The captions of a training: which words a step says of an image, and their states from the text encoder."""

import torch
from tqdm import tqdm

import data
from files import cached_rows, text_hash
from runfolder import check_savable
from text import warn_of_cut


def text_states(text, prompts, source, folder, world):
    """The states (len(prompts), n, d) that a frozen text encoder makes, kept in a file of folder."""
    def make(parts):
        quiet = len(prompts) < 512 or not world.is_main
        for part in tqdm(parts, "text states", disable=quiet):
            states, _ = text(prompts[part])
            check_savable("the prompts, read by the text encoder", {"states": states})
            yield states.cpu()

    weights = source if text.in_checkpoint else text.weights
    key = text_hash(weights, next(text.parameters()).dtype, text.length, *prompts)
    file, parts = folder / f"text-{key}.safetensors", data.batches(len(prompts), 64)
    return cached_rows(file, "states", parts, make, {"prompts": len(prompts)}, world)


class CaptionSampler:
    """Picks captions for a batch of images and encodes them.

    An image's caption joins up to `join` of its prompts, or is empty with probability p_uncond. The output of
    a frozen encoder is kept in a file of folder, which all ranks make, each a share; on a CPU it is a map of
    that file. Not so if captions are joined, or if it takes more than CACHE bytes, as CLIP ViT-L's for 5,500
    prompts: then they are encoded with each batch, which adds a twentieth to the work of a step. source: a
    hash that is part of the file's key, of the checkpoint that holds the text encoder. words: the Wording
    that says how the prompts are said.
    """

    CACHE = 1 << 30

    def __init__(self, records, val_records, text, join, p_uncond, source, folder, world, words):
        self.records, self.text, self.join, self.p_uncond = records, text, join, p_uncond
        self.words, self.cache = words, None
        ways = {p: self.words.ways(p) for r in (*records, *val_records) for p in r.prompts}
        longest = {p: max(ways[p], key=len) for p in ways}
        if world.is_main:
            warn_of_cut(text, (" ".join(sorted((longest[p] for p in r.prompts), key=len)[-join:])
                               for r in (*records, *val_records)))
        if join == 1 and not any(p.requires_grad for p in text.parameters()):
            distinct = sorted({way for p in ways for way in ways[p]} | {""})
            if len(distinct) * text([""])[0].nbytes > self.CACHE:
                return
            self.rows = {p: i for i, p in enumerate(distinct)}
            mask = text.tokenise(distinct)[1]
            states = text_states(text, distinct, source, folder, world)
            self.cache = [x if world.device.type == "cpu" else x.to(world.device) for x in (states, mask)]

    def draw(self, indices, generator):
        """A caption for each of the images `indices` (b,): a list of b strings."""
        prompts = []
        for i in indices.tolist():
            own = self.records[i].prompts
            n = int(torch.randint(1, 1 + min(self.join, len(own)), (), generator=generator))
            chosen = torch.randperm(len(own), generator=generator)[:n].tolist()
            said = [self.words.choose(self.words.ways(own[j]), generator) for j in chosen]
            prompts.append(" ".join(said))
        return data.drop_context(prompts, self.p_uncond, generator)

    def fields(self, prompts):
        """What a batch holds of its prompts: their rows in the cache, or their tokens."""
        if self.cache is not None:
            return {"rows": torch.tensor([self.rows[p] for p in prompts])}
        ids, mask = self.text.tokenise(prompts)
        return {"ids": ids, "mask": mask}

    def encode(self, batch):
        """(states (b, n, d), mask (b, n)) of a batch with these fields."""
        if self.cache is not None:
            return self.cache[0][batch.rows], self.cache[1][batch.rows]
        return self.text.encode(batch.ids, batch.mask)
