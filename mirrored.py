"""Mirrored pairs: training images mirrored together with the sides that their prompts name.

The paper gave flips up because prompts name places; prompts.mirror flips the words with the image. What a
mirror would make untrue is left alone:

    a box           where a prompt of the image says so, or none denies it and kvasir.has_box finds it: the
                    endoscope draws it in the lower left only
    text            where a prompt says so, or none denies it and images are of LEGIBLE pixels or more:
                    mirrored letters are no letters. In smaller images the endoscope's own cannot be read.
    a named side    where a prompt, or a paraphrase of it, names one in words outside the grammar

A mirrored copy is one more way to see its image: a step draws the image first, then it or one of its copies.
"""

from command import BadInput

from dataclasses import replace

import torch

import data
import prompts
from duplicates import seen
from kvasir import has_box
from pixels import note

# A value of --mirror: the copies that it makes of an image. horizontal: left becomes right; vertical: upper
# becomes lower; the copy "both" is half a turn.
AXES = {"horizontal": ("horizontal",), "vertical": ("vertical",), "both": ("horizontal", "vertical", "both")}
LEGIBLE = 256   # px: the endoscope's letters, a 40th to a 50th of the side high, then have 5 rows of pixels


def add_flag(parser):
    parser.add_argument("--mirror", choices=tuple(AXES),
                        help="learn from mirrored images too, the sides in their prompts mirrored with them; "
                             "images with a box, with text (from "
                             f"{LEGIBLE} px on also where no prompt denies it), or with a side in words "
                             "outside the grammar are left alone. None: no image is mirrored")


def with_copies(records, mirror, size, words, workers=2):
    """(records and behind them their mirrored copies, words with the paraphrases of the copies' prompts).

    Of each record that can be mirrored there is a copy for each of AXES[mirror]; mirror: a value of --mirror.
    size: of the images in training, pixels; words: the Wording of the prompts. A line on stderr says what is
    left alone. BadInput for a folder without any image that can be mirrored.
    """
    if mirror is None:
        return records, words

    def look(i):
        return "unreadable" if why[i] else obstacle(records[i], size, words)

    why = [why for _, _, why in seen(records, workers)]
    found = data.in_parallel(look, len(records), workers, "looking for boxes")
    free = [r for r, reason in zip(records, found, strict=True) if not reason]
    alone = ", ".join(f"{found.count(reason)} {reason}" for reason in sorted({*found} - {None}))
    if not free:
        raise BadInput(f"--mirror {mirror}: none of {len(records)} images can be mirrored, found {alone}; "
                       "leave the flag out")
    note(records[0].path.parent, "mirror", f"--mirror {mirror}: {len(free)} of {len(records)} images are "
         "mirrored" + f"; left alone: {alone}" * bool(alone))
    paraphrases = {prompts.mirror(prompt, axis): [prompts.mirror(way, axis) for way in words.ways(prompt)[1:]]
                   for axis in AXES[mirror] for record in free for prompt in record.prompts
                   if prompt in words.paraphrases}
    return ([*records, *(mirrored(record, axis) for axis in AXES[mirror] for record in free)],
            replace(words, paraphrases=paraphrases | words.paraphrases))


def obstacle(record, size, words):
    """Why an image cannot be mirrored, or None."""
    facts = [prompts.parse(prompt) for prompt in record.prompts]
    told = {thing: {fact[thing] for fact in facts if thing in fact} for thing in ("box", "text")}
    for thing, said in told.items():
        if True in said:
            return f"with a {thing}" if thing == "box" else "with text"
    if not told["text"] and size >= LEGIBLE:
        return f"perhaps with text, at {LEGIBLE} px or more"
    if any(prompts.mirror(way, "both") is None for prompt in record.prompts for way in words.ways(prompt)):
        return "with a side named outside the grammar"
    return "with a box" if not told["box"] and has_box(data.open_image(record.path)) else None


def mirrored(record, axis):
    """A record's mirrored copy."""
    own = [prompts.mirror(prompt, axis) for prompt in record.prompts]
    return data.Record(record.path, record.name, own, axis)


def entries(records):
    """For each image the indices of its records: its own, then those of its mirrored copies."""
    found = {}
    for i, record in enumerate(records):
        found.setdefault(record.name, []).append(i)
    return list(found.values())


def draw(own, generator):
    """One of the entries of an image; where there is only one, no random number is drawn."""
    return own[int(torch.randint(len(own), (), generator=generator))] if len(own) > 1 else own[0]
