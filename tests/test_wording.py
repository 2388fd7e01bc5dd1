"""Paraphrased captions: the three strategies, the file, and trainings that read it."""

from command import BadInput

import csv
import json
from argparse import Namespace
from collections import Counter
from pathlib import Path

import pytest
import tiny_kandinsky
import torch
from helpers import log_lines, tiny_msdm

import data
import encoded
import finetune
import msdm
import phantom
import training
import vae
import wording
from captions import CaptionSampler
from files import load_safetensors, save_safetensors
from wording import Wording

WAYS = ["2 polyps", "two polyps", "a pair of polyps", "polyps, two of them"]


def flags_of(folder, **given):
    none = dict.fromkeys(("captions", "paraphrases", "strategy", "mix_p"))
    return Namespace(**{"data": folder, **none, **given})


def write_rows(file, rows, header=("Prompt", "Paraphrase")):
    with open(file, "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([header, *rows])
    return file


@pytest.mark.parametrize("strategy, mix_p, own", [("add", 0.5, 0.25), ("mix", 0.3, 0.7), ("mix", 0.0, 1.0),
                                                  ("mix", 1.0, 0.0), ("replace", 0.5, 0.0)])
def test_a_strategy_draws_its_share_of_each_way(strategy, mix_p, own):
    words, g, n = Wording({}, strategy, mix_p), torch.Generator().manual_seed(0), 3000
    drawn = Counter(words.choose(WAYS, g) for _ in range(n))
    for way, share in zip(WAYS, [own] + 3 * [(1 - own) / 3], strict=True):
        assert drawn[way] / n == pytest.approx(share, abs=0.03) and (drawn[way] > 0) == (share > 0)


def test_a_prompt_without_paraphrases_draws_no_random_number():
    g = torch.Generator().manual_seed(0)
    before = g.get_state()
    assert [Wording({}, s).choose(WAYS[:1], g) for s in wording.STRATEGIES] == 3 * WAYS[:1]
    assert torch.equal(g.get_state(), before)


def captions_of(words, join, folder):
    records, text = [data.Record(Path("a"), "a", ["1 polyp", "no text"])], tiny_msdm().text
    place = "", folder, training.start("cpu")
    return CaptionSampler(records, records, text.requires_grad_(False), join, 0.0, *place, words)


def test_a_joined_caption_says_each_prompt_once_and_in_one_way(tmp_path):
    words = Wording({"1 polyp": ["one polyp", "a single polyp"], "no text": ["text-free"]}, "add")
    g = torch.Generator().manual_seed(0)
    captions = captions_of(words, 2, tmp_path)
    drawn = {captions.draw(torch.tensor([0]), g)[0] for _ in range(200)}
    ones, texts = words.ways("1 polyp"), words.ways("no text")
    pairs = {f"{a} {b}" for a in ones for b in texts} | {f"{b} {a}" for a in ones for b in texts}
    assert drawn == {*ones, *texts, *pairs}


def test_the_cache_of_text_states_holds_the_paraphrases(tmp_path):
    captions = captions_of(Wording({"1 polyp": ["one polyp", "a single polyp"]}, "add"), 1, tmp_path)
    assert captions.rows.keys() == {"", "1 polyp", "one polyp", "a single polyp", "no text"}
    assert len(captions.cache[0]) == 5


# The file


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("a", "b"):
        (tmp_path / "images" / f"{name}.png").touch()
    write_rows(tmp_path / "prompt-gt.csv", [("a.png", "1 polyp"), ("b.png", "no text"), ("b.png", "1 polyp")],
               ("Filename", "Prompt"))
    return tmp_path


ROWS = [("1 polyp", "one polyp"), ("no text", "text-free, please"), ("1 polyp", "one polyp"),
        ("1 polyp", "a single polyp"), ("a tube", "one tube")]


def test_a_file_of_paraphrases_is_read_for_the_prompts_of_the_data(folder):
    args = flags_of(folder, paraphrases=write_rows(folder / "p.csv", ROWS))
    words = wording.read(args)
    assert words.paraphrases == {"1 polyp": ["one polyp", "a single polyp"], "no text": ["text-free, please"]}
    assert (args.strategy, args.mix_p, words.strategy) == ("add", None, "add")
    args = flags_of(folder, paraphrases=args.paraphrases, strategy="mix")
    assert (wording.read(args).mix_p, args.mix_p) == (0.5, 0.5)
    assert words.fingerprint("x") != Wording().fingerprint("x") == "x"


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_column_of_the_captions_file_is_read_as_a_file_of_paraphrases_is(folder, ending):
    rows = [("a.png", "1 polyp", "one polyp"), ("b.png", "no text", ""), ("b.png", "1 polyp", "one polyp")]
    if ending == "csv":
        write_rows(folder / "prompt-gt.csv", rows, ("Filename", "Prompt", "Paraphrase"))
    else:
        (folder / "prompt-gt.csv").unlink()
        lines = [json.dumps({"file_name": a, "text": b, "paraphrase": c or None}) for a, b, c in rows]
        (folder / "metadata.jsonl").write_text("\n".join(lines))
    assert [r.prompts for r in data.read_folder(folder)] == [["1 polyp"], ["no text", "1 polyp"]]
    args = flags_of(folder)
    assert wording.read(args).paraphrases == {"1 polyp": ["one polyp"]} and args.strategy == "add"
    with pytest.raises(BadInput, match="1 of 2 prompts of .* have no paraphrase, the first is 'no text'"):
        wording.read(flags_of(folder, strategy="replace"))


@pytest.mark.parametrize("given, rows, expected", [
    ({}, [ROWS[0]], "p.csv: 1 of 2 prompts of .* no paraphrase, the first is 'no text'; add a row"),
    ({}, [*ROWS, ("no text", "")], "p.csv, row 7: the prompt is empty"),
    ({}, [], "p.csv: no rows, expected a prompt and a paraphrase"),
    ({"strategy": "replace"}, [(p, p) for p, _ in ROWS], "p.csv: each paraphrase is its own prompt"),
    ({"mix_p": 0.5}, ROWS, "--mix-p 0.5: expected --strategy mix"),
    ({"mix_p": 1.5, "strategy": "mix"}, ROWS, "--mix-p 1.5: expected a finite number from 0 up to 1"),
    ({"paraphrases": None, "strategy": "add"}, ROWS, "--strategy add: no paraphrases; expected --para"),
    ({"paraphrases": "absent.csv"}, ROWS, "absent.csv: no such file, expected a .csv"),
])
def test_paraphrases_that_cannot_be_used_are_one_clear_line(folder, given, rows, expected):
    file = write_rows(folder / "p.csv", rows)
    (folder / "p.csv").rename(folder / "images/p.csv")  # not beside the captions
    with pytest.raises(BadInput, match=expected):
        wording.read(flags_of(folder, **{"paraphrases": folder / "images" / file.name, **given}))


def test_a_prompt_may_stand_for_itself(folder):
    file = write_rows(folder / "p.csv", [*ROWS[:1], ("no text", "no text")])
    words = wording.read(flags_of(folder, paraphrases=file, strategy="replace"))
    assert words.choose(words.ways("no text"), torch.Generator()) == "no text"


# Trainings


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Rendered data, paraphrases of its prompts, a small MSDM and tiny checkpoints of Kandinsky."""
    root = tmp_path_factory.mktemp("made")
    phantom.main(["--out", str(root / "data"), "--n", "20", "--size", "64"])
    prompts = dict.fromkeys(p for r in data.read_folder(root / "data") for p in r.prompts)
    write_rows(root / "p.csv", [(p, f"{say} {p}") for p in prompts for say in ("Please:", "I need this:")])
    base = tiny_msdm()
    save_safetensors(root / "base.safetensors", base.tensors(), base.metadata())
    tiny_kandinsky.main(["--out", str(root / "tiny22")])
    tiny_kandinsky.main(["--kind", "3", "--out", str(root / "tiny3")])
    return root


def train(root, name, out, *more):
    model = {"msdm": "base.safetensors", "prior": "tiny22/prior", "unet3": "tiny3"}[name]
    size = ["--size", 64] if name == "unet3" else []
    common = ["--model", root / model, "--data", root / "data", "--out", out, "--rank", 4, "--steps", 4,
              "--batch-size", 4, "--log-every", 2, "--save-every", 2, "--shown", 0, "--lr", 1e-2]
    finetune.main([str(x) for x in (name, *common, *size, *more)])
    return load_safetensors(out / "last/adapter_model.safetensors")[0]


@pytest.mark.parametrize("name", ["msdm", "prior", "unet3"])
def test_a_training_on_paraphrases_differs_and_says_its_loss_on_them(made, tmp_path, name):
    more = "--paraphrases", made / "p.csv", "--strategy", "replace"
    plain, other = train(made, name, tmp_path / "plain"), train(made, name, tmp_path / "other", *more)
    assert any(not torch.equal(plain[k], other[k]) for k in plain)
    lines = [[line for line in log_lines(tmp_path / run) if "val_loss" in line] for run in ("plain", "other")]
    assert lines[0][0] == {"step": 0, "val_loss": lines[1][0]["val_loss"]}
    assert all(line["val_loss_paraphrases"] not in (0, line["val_loss"]) for line in lines[1])


def test_a_run_goes_on_with_its_own_paraphrases_only(made, tmp_path):
    more = ["--paraphrases", made / "p.csv", "--strategy", "mix", "--mix-p", 1]
    whole = train(made, "msdm", tmp_path / "whole", *more)
    train(made, "msdm", tmp_path / "run", *more, "--steps", 2)
    resumed = train(made, "msdm", tmp_path / "run", *more)
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    settings = json.loads((tmp_path / "run/config.json").read_text())["settings"]
    assert settings["strategy"] == "mix" and settings["mix_p"] == 1
    for flags, said in (([*more[:2], "--strategy", "add"], "mix_p=1.0, now mix_p=None"),
                        ([*more[:-1], 0.5], "mix_p=1.0, now mix_p=0.5"), ([], "now mix_p=None")):
        with pytest.raises(BadInput, match=said):
            train(made, "msdm", tmp_path / "run", *flags, "--steps", 6)
    file = write_rows(tmp_path / "p.csv", [*wording.read_pairs("", made / "p.csv"), ("Another", "row")])
    train(made, "msdm", tmp_path / "run", *more[2:], "--paraphrases", file)  # the same for these prompts
    write_rows(file, [(p, q + "!") for p, q in wording.read_pairs("", made / "p.csv")])
    with pytest.raises(BadInput, match="other data"):
        train(made, "msdm", tmp_path / "run", *more[2:], "--paraphrases", file, "--steps", 6)


def test_a_step_draws_the_rows_of_a_prompts_paraphrases():
    held = encoded.EncodedData(torch.zeros(2, 2), (torch.arange(6.0),), [[1], [2]], None,
                               {1: [1, 3, 4], 2: [2, 5]}, Wording({"a": ["b"]}, "replace"))
    rows = held.draw(torch.tensor([0, 1] * 50), 0.0, torch.Generator().manual_seed(0))
    assert set(rows[::2].tolist()) == {3, 4} and set(rows[1::2].tolist()) == {5}


def test_the_tokenizer_learns_the_words_of_the_paraphrases(made, tmp_path):
    network = vae.VAE(vae.VAEConfig(channels=(8, 8, 8), latent_channels=4))
    save_safetensors(tmp_path / "vae.safetensors", network.state_dict(), vae.metadata(network))
    msdm.main([str(x) for x in ("--data", made / "data", "--vae", tmp_path / "vae.safetensors", "--size", 32,
                                "--steps", 1, "--batch-size", 2, "--shown", 0, "--out", tmp_path / "run",
                                "--paraphrases", made / "p.csv", "--strategy", "replace")])
    text = msdm.load(tmp_path / "run/last.safetensors").text
    assert text.tokenise(["please"])[1].sum() == 3  # <bos>, the word, <eos>
