"""The words of training captions: an image's prompts as they are written, or paraphrases of them.

Three strategies of the paper (CEUR-WS 3740, paper 142, Sec. 4.2.2), for each prompt that a step draws:

    add        its own words or one of its paraphrases, all equally likely
    mix        one of its paraphrases with probability mix_p, else its own words
    replace    one of its paraphrases

Paraphrases come from --paraphrases, a csv with columns Prompt and Paraphrase (experiments.py writes it), or
else from the column Paraphrase of the captions file, and belong to every image with that prompt.
"""

from command import BadInput, check_range

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch

import data
from files import text_hash

STRATEGIES = ("add", "mix", "replace")


@dataclass
class Wording:
    """How a training says its prompts; with no paraphrases, in their own words."""

    paraphrases: dict = field(default_factory=dict)  # prompt -> list of other words
    strategy: str = "add"
    mix_p: float = 0.5

    def ways(self, prompt):
        """The ways to say a prompt: its own words first."""
        return [prompt, *self.paraphrases.get(prompt, [])]

    def choose(self, ways, generator):
        """One of the ways to say a prompt, its own words first; only one way draws no random number."""
        if len(ways) == 1 or self.strategy == "mix" and torch.rand((), generator=generator) >= self.mix_p:
            return ways[0]
        first = 0 if self.strategy == "add" else 1
        return ways[int(torch.randint(first, len(ways), (), generator=generator))]

    def held_out(self, ways, i):
        """The one of the ways in which the validation on paraphrases says the prompt of held-out image i."""
        return ways[1 + i % (len(ways) - 1)] if len(ways) > 1 else ways[0]

    def fingerprint(self, of_data):
        """The fingerprint of a data folder together with these paraphrases."""
        return text_hash(of_data, json.dumps(self.paraphrases)) if self.paraphrases else of_data


def add_flags(parser):
    parser.add_argument("--paraphrases", metavar="FILE.csv",
                        help="other words for the prompts, columns Prompt and Paraphrase (experiments.py "
                             "paraphrase writes it); None: the captions file's column Paraphrase, if any")
    parser.add_argument("--strategy", choices=STRATEGIES,
                        help="add them to the prompts, mix them in with probability --mix-p, or replace the "
                             "prompts; None: add, where there are paraphrases")
    parser.add_argument("--mix-p", type=float, metavar="P",
                        help="share of prompts that mix replaces; None: 0.5")


def read(args):
    """The Wording of a command's flags; strategy and mix_p of args become what it has, or None.

    BadInput for a file that cannot be used or has no other words, a prompt of --data without a paraphrase,
    flags that do not fit.
    """
    if "paraphrases" not in args:  # Kandinsky's decoder reads no prompts
        return Wording()
    if args.mix_p is not None and args.strategy != "mix":
        raise BadInput(f"--mix-p {args.mix_p:g}: expected --strategy mix with it, which alone draws by it")
    check_range(args, 0, 1, "mix_p")
    source = Path(args.paraphrases or data.captions_file(args.data, args.captions))
    found = by_prompt(read_pairs("--paraphrases", source) if args.paraphrases else column(source))
    if args.strategy and not found:
        raise BadInput(f"--strategy {args.strategy}: no paraphrases; expected --paraphrases FILE.csv, or a "
                       f"column Paraphrase in {source}")
    if args.paraphrases or args.strategy in ("mix", "replace"):
        prompts = dict.fromkeys(p for r in data.read_folder(args.data, args.captions) for p in r.prompts)
        if without := [p for p in prompts if p not in found]:
            raise BadInput(f"{source}: {len(without)} of {len(prompts)} prompts of {args.data} have no "
                           f"paraphrase, the first is {without[0]!r:.100}; add a row for each, "
                           "experiments.py paraphrase writes them")
        found = {p: found[p] for p in prompts}
    if (args.paraphrases or args.strategy) and not any(found.values()):
        raise BadInput(f"{source}: each paraphrase is its own prompt, expected other words; experiments.py "
                       "paraphrase writes them")
    if found:
        args.strategy = args.strategy or "add"
        args.mix_p = 0.5 if args.strategy == "mix" and args.mix_p is None else args.mix_p
    return Wording(found, args.strategy or "add", args.mix_p or 0.0)


def read_pairs(flag, path) -> list[tuple[str, str]]:
    """(prompt, paraphrase) of every row of a csv with these two columns, each pair once.

    A row may repeat its prompt, by hand, where there are no other words. BadInput, which names the flag, for
    a file without rows or with a prompt that cannot be used.
    """
    if not path.is_file() or path.suffix.lower() != ".csv":
        why = "not a .csv" if path.is_file() else "no such file"
        raise BadInput(f"{flag} {path}: {why}, expected a .csv with columns Prompt and Paraphrase")
    rows = data.csv_rows(path, (data.PROMPT_COLUMNS, True), (("paraphrase",), True))
    if not (found := checked(path, rows)):
        raise BadInput(f"{flag} {path}: no rows, expected a prompt and a paraphrase in each")
    return found


def column(captions):
    """The same pairs of the column Paraphrase of a captions file, where it is filled; [] if it has none."""
    rows = (data.read_jsonl if captions.suffix == ".jsonl" else data.read_csv)(captions)
    return checked(captions, ((row, texts) for row, _, texts in rows if len(texts) > 1))


def checked(path, rows):
    """[(prompt, paraphrase)], each once, of (row number, [prompt, paraphrase]) of a file."""
    found = {}
    for row, texts in rows:
        if why := data.prompt_fault(texts):
            raise BadInput(f"{path}, row {row}: {why}; expected a prompt and a paraphrase")
        found[tuple(texts)] = True
    return list(found)


def by_prompt(pairs):
    """{prompt: its paraphrases}; a pair of a prompt with itself is none."""
    found = {}
    for prompt, paraphrase in pairs:
        found.setdefault(prompt, []).extend([paraphrase] if paraphrase != prompt else [])
    return found
