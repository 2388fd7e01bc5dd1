"""The paper's experiments as commands: Chaichuk and Tutubalina, CEUR-WS 3740, paper 142.

paraphrase      Sec. 4.2.2  the prompts of a data set in other words, as training captions (wording.py)
ablation        Sec. 5.1.4  MSDM with and without self-conditioning, dropout, ... (ablation.py)
table1, table2  Sec. 5.1.2  ranks of the adapters of Kandinsky 2.2 (sweeps.py)
submission      Sec. 5.2    an image for each test prompt, and a zip of them (submission.py)
table3          Sec. 5.2    models by the organisers' protocol (submission.py)

    python experiments.py paraphrase --data data/mine --out data/paraphrases.csv
    python experiments.py paraphrase --data prompts.csv --model Qwen/Qwen2.5-7B-Instruct --out FILE.csv
"""

from command import BadInput, check_range, fast_dtype, run_command

import argparse
import functools
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import ablation
import data
import prompts as grammar
import submission
import sweeps
import training
from encoders import load_transformer
from files import create_json, folder_hash, read_json, remove_unfinished, text_hash, write_csv
from weights import fetch

# Paraphrases

HEADER = ["Prompt", "Paraphrase"]
MOST = 1000  # paraphrases of a prompt: the grammar finds them by chance, a second for a thousand
ROUNDS = 4  # times that a language model is asked for the paraphrases of a prompt that are missing
INSTRUCTION = ("Rewrite this request for an endoscopic image in other words. Keep every number, color, size, "
               "type, place and name, add nothing, and answer with the new request alone.")


class LanguageModel:
    """Rewrites a prompt by a causal language model of transformers in a folder."""

    def __init__(self, folder, device):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = load_transformer(AutoTokenizer, folder, pads=False)
        self.model = load_transformer(AutoModelForCausalLM, folder, fast_dtype(device)).to(device)

    @torch.inference_mode()
    def answers(self, prompt, n, seed):
        """n answers to INSTRUCTION, each its first line that is not empty, sampled from a seed."""
        text, chat = f"{INSTRUCTION}\n\n{prompt}", self.tokenizer.chat_template is not None
        if chat:
            message = [{"role": "user", "content": text}]
            text = self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        else:
            text = f"Request: {text}\nAnswer:"
        read = self.tokenizer(text, return_tensors="pt", add_special_tokens=not chat).to(self.model.device)
        length = read["input_ids"].shape[1]
        torch.manual_seed(seed)
        out = self.model.generate(input_ids=read["input_ids"], attention_mask=read["attention_mask"],
                                  do_sample=True, temperature=1.0, top_p=0.95, num_return_sequences=n,
                                  max_new_tokens=32 + 2 * len(self.tokenizer(prompt)["input_ids"]),
                                  pad_token_id=self.tokenizer.eos_token_id)
        found = self.tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)
        return [next(iter(answer.strip().splitlines()), "").strip(' "') for answer in found]


def of_grammar(prompt, n, seed, taken):
    """(up to n paraphrases of a prompt from the grammar that are not taken, how many were made)."""
    made = grammar.paraphrase(prompt, n, seed)
    return [p for p in made if p not in taken and p != prompt], len(made)


def of_model(model, prompt, n, seed, taken):
    """(up to n paraphrases by a language model, how many it was asked for).

    An answer is kept if it has the attributes of the prompt, as prompts.parse reads them, and is new.
    """
    attributes, kept, asked = grammar.parse(prompt), {}, 0
    for turn in range(ROUNDS):
        missing = n - len(kept)
        if not missing:
            break
        asked += missing
        for answer in model.answers(prompt, missing, training.step_seed(seed, prompt, turn)):
            if answer and answer not in taken and answer != prompt and not data.prompt_fault([answer]) \
                    and grammar.parse(answer) == attributes:
                kept[answer] = True
    return list(kept), asked


def rows_so_far(out, settings, own):
    """The rows of the file out that earlier starts of the same command have written; none of a new one.

    The settings stand beside it, in OUT.json. BadInput if the file holds something else, or a row that this
    command would not write: only a prompt outside the grammar may have any words, which are added by hand.
    """
    beside = out.with_suffix(".json")
    if not beside.exists() and not out.exists():
        return []
    if not beside.exists() or not {"prompts", "per_prompt"} <= (old := read_json(beside)).keys():
        raise BadInput(f"{out}: it or {beside.name} is there already and not made by this command; give "
                       "another --out")
    for k, now in settings.items():
        if old.get(k) != now:
            raise BadInput(f"{out}: made with {k}={old.get(k)!r}, now {k}={now!r}; give another --out")
    if not out.exists():
        return []
    rows, first = [], {}
    for i, (prompt, other) in data.csv_rows(out, *(((name.lower(),), True) for name in HEADER)):
        why = ("a prompt of --data" if prompt not in own else "other words for the prompt" if not other else
               "the attributes of the prompt" if grammar.parse(prompt) not in ({}, grammar.parse(other)) else
               f"words that row {first[other]} has not" if other in first and grammar.parse(prompt) else None)
        if why:
            raise BadInput(f"{out}, row {i}: expected {why}, got {[prompt, other]}; remove the row")
        first[other] = i
        rows.append([prompt, other])
    return rows


def prompts_to_say(source):
    """(distinct prompts of a data folder or a file of prompts, in order; those of them in the grammar)."""
    found = data.read_prompts(source) if Path(source).is_file() else [
        p for r in data.read_folder(source) for p in r.prompts]
    own = dict.fromkeys(found)
    known = [p for p in own if grammar.parse(p)]
    if not known:
        raise BadInput(f"{source}: none of its {len(own)} prompts is of the task's grammar (prompts.py), "
                       "which says whether a paraphrase keeps the meaning")
    return own, known


def paraphrase(args):
    """Write args.per_prompt paraphrases of each distinct prompt of args.data to the csv args.out."""
    check_range(args, 1, MOST, "per_prompt")
    check_range(args, -2**63, 2**64 - 1, "seed")
    out = Path(args.out)
    if out.suffix.lower() != ".csv":
        raise BadInput(f"--out {out}: expected a name that ends in .csv")
    data.check_writable(out=out)
    own, known = prompts_to_say(args.data)
    settings = {"prompts": text_hash(*own), "per_prompt": args.per_prompt, "seed": args.seed, "model": None}
    if args.model:
        device = training.own_device(args.device)
        folder = fetch(args.model, fast_dtype(device))
        settings["model"] = folder_hash(folder)
    rows, beside = rows_so_far(out, settings, own), out.with_suffix(".json")
    if not beside.exists():
        create_json(beside, settings)
    remove_unfinished(out.parent, out.name, beside.name)
    done, taken, asked = {prompt for prompt, _ in rows}, own.keys() | {p for _, p in rows}, 0
    before, left = len(rows), [p for p in known if p not in done]
    model = LanguageModel(folder, device) if args.model and left else None
    for prompt in tqdm(left, "paraphrases", disable=None):
        more = args.per_prompt, args.seed, taken
        new, n = of_model(model, prompt, *more) if model else of_grammar(prompt, *more)
        asked += n
        taken.update(new)
        rows += [[prompt, p] for p in new]
        if model:  # takes long: nothing of it is lost
            write_csv(out, HEADER, rows)
    if left:
        write_csv(out, HEADER, rows)
    kept = len(rows) - before
    print(f"{out}: {len(rows)} paraphrases of {len(own)} prompts; {asked} asked for now, {kept} kept, "
          f"{asked - kept} refused")
    done = {prompt for prompt, _ in rows}
    if without := [p for p in own if p not in done]:
        print(f"{out}: {len(without)} prompts have none, the first is {without[0]!r:.100}; a training wants "
              "one of each prompt, so add rows by hand", file=sys.stderr)


# The command

EXPERIMENTS = {  # function, its flags
    "ablation": (ablation.ablation, ablation.add_flags),
    "table1": (sweeps.table1, functools.partial(sweeps.add_flags, network="prior")),
    "table2": (sweeps.table2, functools.partial(sweeps.add_flags, network="decoder")),
    "submission": (submission.submission, submission.add_flags),
    "table3": (submission.table3, submission.add_table3_flags),
}


def main(argv=None):
    parser = argparse.ArgumentParser(description="The paper's experiments.")
    commands = parser.add_subparsers(dest="command", required=True)
    text = """Write other words for each prompt of a data set, one row Prompt,Paraphrase each. All are
        distinct and have the attributes of their prompt, which is checked for each. The same command goes on
        after a stop; its settings are kept beside the file, in FILE.json."""
    p = commands.add_parser("paraphrase", help="other words for the training captions", description=text,
                            formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--data", required=True, help="data folder, or a file of prompts: .txt, or .csv with a "
                   "column Prompt")
    p.add_argument("--out", required=True, metavar="FILE.csv", help="where they are written")
    p.add_argument("--per-prompt", type=int, default=25, metavar="K", help="paraphrases of a prompt")
    p.add_argument("--seed", type=int, default=0, help="of the choice of words")
    p.add_argument("--model", help="a causal language model that rewrites the prompts: folder, or name on "
                   "the hub; None: the grammar's own sentences")
    p.add_argument("--device", default="auto", help="of the language model: cpu, cuda or auto")
    p.set_defaults(run=paraphrase)
    for name, (run, add_flags) in EXPERIMENTS.items():
        p = commands.add_parser(name, help=run.__doc__, description=run.__doc__,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        add_flags(p)
        p.set_defaults(run=run)
    args = parser.parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    run_command(main)
