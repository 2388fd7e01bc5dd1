"""The experiments as commands: paraphrases of the real prompts, by the grammar and by a language model."""

from command import BadInput

import csv

import pytest
import torch
from helpers import SHARED, run

import experiments
from prompts import parse

REAL = SHARED / "data" / "medvqa-gi-2024-prompts.csv"
PROMPTS = ["Generate an image with 2 polyps.", "Generate an image not containing text.",
           "Generate an image with an abnormality with the color pink."]


def prompt_file(folder, prompts=PROMPTS):
    file = folder / "prompts.txt"
    file.write_text("\n".join(prompts), encoding="utf-8")
    return file


def rows_of(file):
    with open(file, encoding="utf-8", newline="") as f:
        return [(row["Prompt"], row["Paraphrase"]) for row in csv.DictReader(f)]


@pytest.mark.skipif(not REAL.exists(), reason=f"the task's prompts are not at {REAL}")
def test_the_real_prompts_have_more_than_11000_distinct_paraphrases_of_their_attributes(tmp_path):
    done = run("experiments.py", "paraphrase", "--data", REAL, "--out", tmp_path / "p.csv")
    rows = rows_of(tmp_path / "p.csv")
    assert len({p for p, _ in rows}) == 483 and len({q for _, q in rows}) == len(rows) > 11_000
    assert not {p for p, _ in rows} & {q for _, q in rows}
    assert all(parse(p) == parse(q) for p, q in rows)
    assert f"{len(rows)} paraphrases of 483 prompts" in done.stdout


def test_paraphrases_go_on_with_the_same_settings_only(tmp_path):
    out, flags = tmp_path / "p.csv", ["paraphrase", "--data", prompt_file(tmp_path), "--per-prompt", 4]
    run("experiments.py", *flags, "--out", out)
    whole = out.read_bytes()
    assert len(rows_of(out)) == 12
    out.write_bytes(b"".join(whole.splitlines(keepends=True)[:5]))  # as a stop leaves it
    done = run("experiments.py", *flags, "--out", out)
    assert out.read_bytes() == whole and "8 asked for now, 8 kept" in done.stdout
    error = run("experiments.py", *flags, "--out", out, "--seed", 1, expect=2).stderr
    assert "seed=0, now seed=1" in error and out.read_bytes() == whole
    error = run("experiments.py", *flags, "--out", tmp_path / "b.csv", "--per-prompt", 10**9, expect=2).stderr
    assert "--per-prompt 1000000000: expected a finite number from 1 up to 1000" in error
    (tmp_path / "mine.csv").write_text("Prompt,Paraphrase\n")
    assert "not made by this command" in run("experiments.py", *flags, "--out", tmp_path / "mine.csv",
                                             expect=2).stderr


def test_rows_that_are_no_paraphrases_are_refused(tmp_path):
    out, flags = tmp_path / "p.csv", ["paraphrase", "--data", prompt_file(tmp_path, [*PROMPTS, "a cat"]),
                                      "--per-prompt", 2]
    experiments.main([*map(str, flags), "--out", str(out)])
    header, first, *rest = out.read_text().splitlines()
    prompt, other = rows_of(out)[0]
    for row, words in ((f"{prompt},{other[:-12]}", "the attributes of the prompt"),  # as a cut file ends
                       (f"{prompt},", "other words for the prompt"), ("foo,bar", "a prompt of --data"),
                       (rest[0], "words that row 3 has not")):
        out.write_text("\n".join([header, first, *rest, row]))
        before = out.read_bytes()
        with pytest.raises(BadInput, match=f"p.csv, row {len(rest) + 3}: expected {words}, got .*; remove"):
            experiments.main([*map(str, flags), "--out", str(out)])
        assert out.read_bytes() == before
    by_hand = "\n".join([f"{header},Reviewer", *(f"{row},me" for row in (first, *rest, "a cat,one polyp"))])
    out.write_text(by_hand)
    experiments.main([*map(str, flags), "--out", str(out)])
    assert out.read_text() == by_hand  # nothing is new, nothing is written


def test_prompts_outside_the_grammar_are_named(tmp_path):
    file = prompt_file(tmp_path, [*PROMPTS, "a cat"])
    done = run("experiments.py", "paraphrase", "--data", file, "--out", tmp_path / "p.csv")
    assert "1 prompts have none, the first is 'a cat'" in done.stderr
    file = prompt_file(tmp_path, ["a cat"])
    error = run("experiments.py", "paraphrase", "--data", file, "--out", tmp_path / "q.csv", expect=2).stderr
    assert "none of its 1 prompts" in error and not (tmp_path / "q.csv").exists()


def language_model(folder):
    """A folder of a causal language model of random weights that knows the words of PROMPTS; it has no
    padding token, as Llama's has not."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    words = ["<unk>", "<end>", *sorted({w for p in PROMPTS for w in p.removesuffix(".").split()}), "."]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>",
                            bos_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=len(words), n_positions=256, n_embd=16, n_layer=1, n_head=2,
                               bos_token_id=1, eos_token_id=1)).save_pretrained(folder)
    return folder


def test_what_a_language_model_of_random_weights_says_is_counted_and_refused(tmp_path):
    out, asked = tmp_path / "p.csv", 3 * 2 * experiments.ROUNDS
    flags = ["paraphrase", "--data", prompt_file(tmp_path), "--per-prompt", 2, "--out", out]
    done = run("experiments.py", *flags, "--model", language_model(tmp_path / "model"))
    rows = rows_of(out)  # word salad keeps the attributes of a prompt now and then
    assert f"{asked} asked for now, {len(rows)} kept, {asked - len(rows)} refused" in done.stdout
    assert len(rows) < 4 and all(parse(p) == parse(q) and p != q for p, q in rows)
    assert "prompts have none, the first is" in done.stderr


def test_a_language_model_answers_the_same_for_the_same_seed(tmp_path):
    model = experiments.LanguageModel(language_model(tmp_path), torch.device("cpu"))
    first, again, other = (model.answers(PROMPTS[0], 3, seed) for seed in (1, 1, 2))
    assert first == again != other and len(set(first)) == 3


class Stub:
    """A language model that gives these answers, n at a time."""

    def __init__(self, *answers):
        self.left = list(answers)

    def answers(self, prompt, n, seed):
        out, self.left = self.left[:n], self.left[n:]
        return out


def test_an_answer_is_kept_only_if_it_is_new_and_keeps_the_attributes():
    prompt, taken = PROMPTS[0], {"An image of two polyps."}
    stub = Stub("Show two polyps.", "Show three polyps.", "", prompt, "Show two polyps.",
                "An image of two polyps.", "There are 2 polyps.", "Show two polyps in red.")
    kept, asked = experiments.of_model(stub, prompt, 3, 0, taken)
    assert (kept, asked) == (["Show two polyps.", "There are 2 polyps."], 3 + 2 + 2 + 1)
