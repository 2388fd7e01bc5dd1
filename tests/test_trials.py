"""The experiments of many commands: ablation, rank sweeps, the submission and its table."""

from command import BadInput

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest
import tiny_kandinsky
from helpers import PROMPTS, ROOT, judge_file, tiny_msdm

import ablation
import experiments
import phantom
import runfolder
import submission
import sweeps
import trials
import vae
from files import file_hash, load_safetensors, save_safetensors, write_json


@pytest.fixture
def commands(monkeypatch):
    """The commands that an experiment runs, each in this process; with `fail`, the one that is killed."""
    ran = []

    def run(script, *flags, processes=1):
        ran.append([script, *map(str, flags)])
        if commands.fail and commands.fail in " ".join(ran[-1]):
            raise KeyboardInterrupt
        importlib.import_module(script.removesuffix(".py")).main(ran[-1][1:])

    commands.fail, commands.ran = None, ran
    monkeypatch.setattr(trials, "run", run)
    return commands


def main(*flags):
    experiments.main([str(f) for f in flags])


def rows_of(file):
    """The rows of the first table of a markdown file, by their first cell."""
    table = file.read_text().split("\n\n")[1]
    return {first: rest for first, *rest in (line.strip("| ").split(" | ") for line in table.splitlines())}


def arguments(out, steps=9):
    """Of an ablation, as far as its table reads them."""
    return Namespace(out=out, preset="tiny", steps=steps, training="", images=10, sampling="", data="own",
                     real="others", judge="own", judge_is_data=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Phantoms and a tiny Kandinsky 2.2."""
    root = tmp_path_factory.mktemp("made")
    phantom.main(["--out", str(root / "data"), "--n", "12", "--size", "64"])
    tiny_kandinsky.main(["--out", str(root / "tiny")])
    return root


# Tables


def test_an_interval_of_students_t_is_that_of_scipys_own_test():
    from scipy.stats import ttest_1samp

    values = [0.2, 0.5, 0.3]
    mean, half = trials.over_seeds(values)
    low, high = ttest_1samp(values, 0).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((low, high)) and mean == pytest.approx(1 / 3)
    assert trials.over_seeds([0.7]) == (0.7, None)
    assert trials.number(None) == "-" and trials.number(0.12345, 0.01) == "0.1235 ± 0.0100"


def test_a_folder_belongs_to_one_experiment_and_a_cell_is_made_once(tmp_path):
    def claim(name, **settings):
        with trials.claimed(tmp_path / name, settings):
            (tmp_path / name / "cell").mkdir(exist_ok=True)

    claim("a", steps=20)
    claim("a", steps=20)
    with pytest.raises(BadInput, match="a: holds results of steps=20, now steps=30; give another --out"):
        claim("a", steps=30)
    with pytest.raises(BadInput, match="a: holds results of steps=20, now steps=None"):
        claim("a", space="x")                               # another experiment, which has no steps
    claim("a", steps=20, space="x")                         # what an older version did not know is kept now
    with pytest.raises(BadInput, match="a: holds results of space='x', now space='y'"):
        claim("a", steps=20, space="y")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/mine.txt").touch()
    with pytest.raises(BadInput, match="b: not empty and without settings.json"):
        claim("b")
    made = []
    for _ in range(2):
        assert trials.cell(tmp_path / "c", lambda folder: made.append(folder) or {"x": 1}) == {"x": 1}
    assert made == [tmp_path / "c"]


def test_the_space_is_the_first_that_is_there(monkeypatch):
    def flags(features=None, weights=None, classifier=None):
        return trials.space_flags(Namespace(features=features, weights=weights), classifier)

    monkeypatch.setattr(trials.inception, "cached_file", lambda which: "there" if which == "fid" else None)
    assert flags("vit", "w.pth", "j") == ["--features", "vit", "--weights", "w.pth"]
    assert flags(None, "w.pth", "j") == ["--weights", "w.pth"]
    assert flags(classifier="j") == []
    monkeypatch.setattr(trials.inception, "cached_file", lambda which: None)
    assert flags(classifier="j") == ["--features", "classifier:j"] and flags() is None


def test_a_string_of_flags_is_split_as_by_a_shell():
    assert trials.words_of("--training", "--lr 1 --data 'my data'") == ["--lr", "1", "--data", "my data"]
    with pytest.raises(BadInput, match="--training .*: No closing quotation"):
        trials.words_of("--training", "--data 'my data")


def test_the_validation_of_a_run_is_that_of_its_best_checkpoint_after_step_0(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 0, "val_loss": 0.1}\n{"step": 5, "loss": 0.2}\n')
    with pytest.raises(BadInput, match="no line with val_loss"):
        trials.validation(tmp_path)
    log.write_text(log.read_text() + '{"step": 5, "val_loss": 0.4}\n{"step": 9, "val_loss": 0.6}\n')
    assert trials.validation(tmp_path) == {"step": 5, "val_loss": 0.4}
    with pytest.raises(BadInput, match="step 5: expected val_loss_paraphrases, a finite number, got None"):
        trials.validation(tmp_path, "val_loss_paraphrases")
    log.write_text(log.read_text() + '{"step": 12, "val_loss": NaN}\n')
    with pytest.raises(BadInput, match="step 12: expected val_loss, a finite number, got nan"):
        trials.validation(tmp_path)


def test_an_experiment_whose_first_command_refuses_leaves_no_folder(tmp_path):
    for made, left in ((None, []), ("cell", ["a", "cell", "settings.json"])):
        with pytest.raises(BadInput, match="refused"), trials.claimed(tmp_path / "a", {"training": "--oops"}):
            if made:
                (tmp_path / "a" / made).mkdir()
            raise BadInput("refused")
        assert sorted(p.name for p in tmp_path.rglob("*")) == left
    with pytest.raises(BadInput, match="holds results"), trials.claimed(tmp_path / "a", {"training": ""}):
        raise AssertionError


@pytest.mark.parametrize("change, said", [
    ({"loss": float("nan")}, "expected loss, a finite number, got nan; remove the file"),
    ({"loss": "0.5"}, "expected loss, a finite number, got '0.5'"), ({"fid": True}, "expected fid"),
    ({"n_judged": None}, "expected n_judged, a finite number, got None"), ({"fid": None}, None),
    ({"loss": 10**400}, "expected loss, a finite number, got 1000"),
    ({"arm": "all-three", "seed": 7}, None)])
def test_a_result_that_is_none_is_one_line_and_its_place_says_whose_it_is(tmp_path, change, said):
    planted(tmp_path, "baseline", 0, 0.5, 50)
    file = tmp_path / "seed-0/baseline/result.json"
    old = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in (old | change).items() if k != "recall"}))  # absent: none
    shutil.copytree(tmp_path / "seed-0", tmp_path / "seed-0 copy")  # a backup is no seed
    args = arguments(tmp_path)
    if said:
        with pytest.raises(BadInput, match=said):
            ablation.write_tables(args)
    else:
        ablation.write_tables(args)
        assert list(rows_of(tmp_path / "ablation.md")) == ["arm", ":---", "baseline"]


def test_figures_in_two_spaces_make_no_table(tmp_path):
    for seed, space in enumerate(("inception", "classifier")):
        planted(tmp_path, "baseline", seed, 0.5, 50)
        write_json(tmp_path / f"seed-{seed}/baseline/metrics.json", {"space": space, "weights": "f00d"})
    with pytest.raises(BadInput, match="in several spaces, which do not compare: classifier, weights f00d; "
                       "inception, weights f00d"):
        ablation.write_tables(arguments(tmp_path))
    with pytest.raises(BadInput, match="expected the name of a space in each result.json, got None"):
        trials.one_space("t", ["a", None])
    assert trials.one_space("t", ["a", "a, weights f00d"]) == "a, weights f00d"  # as older versions name it
    write_json(tmp_path / "seed-0/baseline/metrics.json", {"space": "classifier", "weights": "beef"})
    with pytest.raises(BadInput, match="classifier, weights beef; classifier, weights f00d"):  # replaced
        ablation.write_tables(arguments(tmp_path))


def test_further_flags_are_none_that_the_experiment_gives_itself():
    own = ("--seed", "--out", "-n", "--prompts")
    assert trials.words_of("--sampling", "--steps 2 --negative-prompt 'a -n b' --size 8", own) == [
        "--steps", "2", "--negative-prompt", "a -n b", "--size", "8"]
    for text, of in (("--seed 1", "--seed"), ("--steps 2 --se=1", "--seed"), ("-n 2", "-n"), ("-n2", "-n"),
                     ("--prompt x", "--prompts")):
        with pytest.raises(BadInput, match=f"--sampling '{text}': the experiment gives {of} itself; leave"):
            trials.words_of("--sampling", text, own)
    with pytest.raises(BadInput, match="No closing quotation"):
        trials.words_of("--sampling", "--a 'b")


def test_what_an_ablation_cannot_use_is_said_before_anything_is_made(made, tmp_path, commands):
    flags = ["ablation", "--data", made / "data", "--out", tmp_path / "a"]
    judge, other = judge_file(tmp_path / "judge.safetensors"), tmp_path / "else.csv"
    other.write_text("Prompt,Paraphrase\nx,y\n")
    for more, words in (
            (["--training=--dropout 0.5"], "the experiment gives --dropout itself"),
            (["--training=--no-self 1"], "the experiment gives --no-self-conditioning itself"),
            (["--training=--minutes 5"], "the experiment gives --minutes itself"),
            (["--training=--captions x.csv"], "the experiment gives --captions itself"),
            (["--training=--btach-size 3"], "--training .*: unrecognized arguments: --btach-size"),
            (["--training=--lr 0.1x"], "--training .*: argument --lr: invalid float value: '0.1x'"),
            (["--training=--size 48"], "--training .*: the autoencoder is trained at 64 px"),
            (["--sampling=--stepz 20"], "--sampling .*: unrecognized arguments: --stepz 20"),
            (["--sampling=--steps 0"], "--sampling .*: --steps 0: expected 1 or more"),
            (["--judging=--size 50"], "--judging .*: --size: expected a multiple of 16"),
            (["--judging=--held-out absent"], "absent: no such folder"),
            (["--classifier", judge], "judge.safetensors: holds a classifier of .*--judging need one of"),
            (["--vae", judge], "judge.safetensors"),
            (["--classifier", other], "else.csv: expected an attribute classifier"),
            (["--paraphrases", other], "have no paraphrase"),
            (["--features", "absent"], "absent: no such folder"),
            (["--features", f"classifier:{judge}", "--weights", "rule"], "--weights rule: is of"),
            (["--weights", tmp_path / "absent.pth"], "absent.pth")):
        with pytest.raises((BadInput, OSError), match=words):
            main(*flags, *more)
        assert not (tmp_path / "a").exists() and not commands.ran, more


def test_images_of_the_metrics_are_known_with_and_without_captions(made, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(made / "data", folder)
    first = next((folder / "images").iterdir())
    before = trials.real_images(folder)
    shutil.copy(first, folder / "images/more.png")
    assert trials.real_images(folder) != before
    (folder / "images/more.png").unlink()
    assert trials.real_images(folder) == before
    first.write_bytes(first.read_bytes()[:200])
    with pytest.raises(BadInput, match=f"{first.name}: .*reads every image of .*data, so mend or remove it"):
        trials.real_images(folder)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent was killed")
def test_a_command_ends_when_its_experiment_is_killed(tmp_path):
    (tmp_path / "long.py").write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)\n")
    (tmp_path / "parent.py").write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport trials\n"
        f"from pathlib import Path\ntrials.HERE = Path({str(tmp_path)!r})\ntrials.run('long.py')\n")
    parent = subprocess.Popen([sys.executable, tmp_path / "parent.py"], stdout=subprocess.PIPE, text=True,
                              stderr=subprocess.DEVNULL)
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    for _ in range(100):
        try:
            if Path(f"/proc/{child}/stat").read_text().split()[2] == "Z":
                return
        except (FileNotFoundError, ProcessLookupError):
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the command goes on without its experiment")


@pytest.mark.parametrize("status, raised", [(2, BadInput), (130, KeyboardInterrupt)])
def test_a_command_that_fails_or_is_stopped_ends_the_experiment(tmp_path, monkeypatch, status, raised):
    (tmp_path / "short.py").write_text("import sys\nsys.exit(int(sys.argv[1]))\n")
    monkeypatch.setattr(trials, "HERE", tmp_path)
    trials.run("short.py", 0)
    with pytest.raises(raised, match="short.py ended with status 2" if status == 2 else None):
        trials.run("short.py", status)


def test_a_command_is_told_that_the_experiment_is_stopped_and_waited_for(tmp_path, monkeypatch):
    (tmp_path / "long.py").write_text(
        "import os, pathlib, signal, sys, time\n"
        "def save(*_):\n    time.sleep(0.2)\n    pathlib.Path(sys.argv[1]).touch()\n    sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "os.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(60)\n")
    monkeypatch.setattr(trials, "HERE", tmp_path)
    with pytest.raises(SystemExit) as left:
        trials.run("long.py", tmp_path / "saved")
    assert left.value.code == 143 and (tmp_path / "saved").exists()


# The ablation


def test_each_arm_says_every_setting_that_an_arm_changes():
    originals = ["--strategy", "mix", "--mix-p", 0]
    assert ablation.flags_of("baseline") == [
        "--no-self-conditioning", "--dropout", 0.0, "--jitter", 0.0, "--views", 1, *originals]
    assert ablation.flags_of("all-three") == [
        "--self-conditioning", "--dropout", 0.1, "--jitter", 0.4, "--views", 8, *originals]
    assert ablation.flags_of("paraphrases-add")[-2:] == ["--strategy", "add"]


def planted(out, arm, seed, loss, shown):
    folder = out / f"seed-{seed}" / arm
    write_json(folder / "result.json", {
        "arm": arm, "seed": seed, "step": 9, "loss": loss, "loss_paraphrases": loss + 0.1, "n_judged": 100,
        "n_shown": shown, "faithfulness": shown / 100, "fid": 10 * loss, "precision": 0.5, "recall": 0.25})
    write_json(folder / "metrics.json", {"space": "planted", "weights": "f00d"})


def test_the_ablations_table_is_paired_by_seed(tmp_path):
    for seed, loss in enumerate((0.5, 0.9)):  # seeds differ far more than arms
        planted(tmp_path, "baseline", seed, loss, 50)
        planted(tmp_path, "dropout-0.1", seed, loss - 0.02 - 0.001 * seed, 80)
    planted(tmp_path, "all-three", 0, 0.4, 70)
    args = arguments(tmp_path)
    ablation.write_tables(args)
    table = json.loads((tmp_path / "ablation.json").read_text())
    assert table["means"]["baseline"]["loss"][0] == pytest.approx(0.7)
    mean, half = table["less_baseline"]["dropout-0.1"]["loss"]
    assert mean == pytest.approx(-0.0205) and half == pytest.approx(12.706 * 0.0005, rel=1e-3)
    assert table["less_baseline"]["all-three"] == {"n": 1} | {
        k: [pytest.approx(v), None] for k, v in {"loss": -0.1, "loss_paraphrases": -0.1, "faithfulness": 0.2,
                                                 "fid": -1, "precision": 0, "recall": 0}.items()}
    low, high = table["means"]["dropout-0.1"]["wilson"]  # of 160 of 200
    assert (low, high) == pytest.approx((0.7391, 0.8496), abs=1e-3)
    text = (tmp_path / "ablation.md").read_text()
    assert "Trainings: 5, of 2 seeds, on own; 9 steps instead of the recipe's" in text
    assert "space: planted, weights f00d." in text
    assert "| baseline | 2 | 0.7000 ± 2.5412 |" in text and "| all-three | 1 | 0.4000 |" in text
    assert "against others" in text and "a model that copies them" in text
    assert "; of 6 such intervals about 0.3 would miss 0 by chance." in text  # one arm has one seed
    rows = rows_of(tmp_path / "ablation.md")  # over seeds where there are several, else over its images
    assert rows["dropout-0.1"][3] == "0.8000 ± 0.0000" and rows["all-three"][3].startswith("0.7000 (0.6")


def test_an_arm_of_which_nothing_could_be_judged_has_no_faithfulness(tmp_path):
    planted(tmp_path, "baseline", 0, 0.5, 50)
    planted(tmp_path, "all-three", 0, 0.4, 70)
    file = tmp_path / "seed-0/all-three/result.json"
    write_json(file, json.loads(file.read_text()) | {"n_judged": 0, "n_shown": 0, "faithfulness": None})
    args = arguments(tmp_path, steps=None)
    ablation.write_tables(args)
    assert rows_of(tmp_path / "ablation.md")["all-three"][1:4] == ["0.4000", "0.5000", "-"]


def test_an_ablation_that_is_killed_goes_on_inside_the_arm_and_its_table_holds_what_the_files_hold(
        made, tmp_path, commands, monkeypatch):
    monkeypatch.setattr(trials.inception, "cached_file", lambda which: None)
    vae.main(["--data", str(made / "data"), "--out", str(tmp_path / "vae"), "--size", "32", "--steps", "2",
              "--perceptual", "off"])
    given = ["ablation", "--data", made / "data", "--out", tmp_path / "a", "--vae",
             tmp_path / "vae/best.safetensors", "--seeds", 1, "--arms", "baseline", "paraphrases-replace",
             "--images", 10, "--per-value", 1, "--steps", 2, "--judging=--steps 2", "--sampling=--steps 1",
             "--training=--size 32 --batch-size 2 --log-every 1 --save-every 1 --shown 0 "
             "--warmup 0 --ema-decay 0"]
    commands.fail = "paraphrases-replace/images"  # after its training and its first images
    with pytest.raises(KeyboardInterrupt):
        main(*given)
    assert list(rows_of(tmp_path / "a/ablation.md")) == ["arm", ":---", "baseline"]
    trained = (tmp_path / "a/seed-0/paraphrases-replace/run/best.safetensors").stat().st_mtime_ns
    commands.fail = None
    commands.ran.clear()
    main(*given)
    assert (tmp_path / "a/seed-0/paraphrases-replace/run/best.safetensors").stat().st_mtime_ns == trained
    assert not any("baseline" in " ".join(line) for line in commands.ran)
    rows = rows_of(tmp_path / "a/ablation.md")
    for arm in ("baseline", "paraphrases-replace"):
        cell = tmp_path / "a/seed-0" / arm
        line = min((x for x in runfolder.read_log(cell / "run")[0] if "val_loss" in x),
                   key=lambda x: x["val_loss"])
        found = json.loads((cell / "metrics.json").read_text())
        figures = [line["val_loss"], line["val_loss_paraphrases"]]
        assert rows[arm][1:3] == [f"{x:.4f}" for x in figures]
        assert [x.split()[0] for x in rows[arm][4:]] == [
            trials.number(found[k]) for k in ("fid", "precision", "recall")]
    assert rows["baseline"][1:3] != rows["paraphrases-replace"][1:3]
    with pytest.raises(BadInput, match="holds results of steps=2, now steps=3; give another --out, or, if no "
                       "result is of the first, mend .*a/settings.json"):
        main(*given, "--steps", 3)
    for name in ("faithfulness", "images"):
        file = tmp_path / f"a/prompts-{name}.csv"
        whole = file.read_bytes()
        file.write_bytes(whole[:whole.index(b"\n", 60) + 1])
        with pytest.raises(BadInput, match=f"prompts-{name}.csv: not the prompts of this experiment"):
            main(*given, "--seeds", 2)
        file.unlink()
        main(*given)
        assert file.read_bytes() == whole
    (tmp_path / "a/seed-0/baseline/metrics.json").unlink()  # the result says what it needs
    main(*given)
    commands.ran.clear()
    monkeypatch.setattr(trials.inception, "cached_file", lambda which: "there")  # other metrics now
    with pytest.raises(BadInput, match=r"classifier:the judge'\], now space=\[\]"):
        main(*given, "--seeds", 2)
    assert not commands.ran


# Rank sweeps


def test_tables_1_and_2_go_on_where_they_were_and_hold_what_their_runs_hold(made, tmp_path, commands):
    given = ["--prior", made / "tiny/prior", "--decoder", made / "tiny/decoder", "--data", made / "data",
             "--steps", 2, "--training=--size 64 --batch-size 2 --log-every 1 --save-every 1"]
    one = ["table1", *given, "--out", tmp_path / "one", "--cells", "rank-4", "rank-128", "dora"]
    commands.fail = "rank-128"
    with pytest.raises(KeyboardInterrupt):
        main(*one)
    done = [" ".join(line) for line in commands.ran]
    assert len(done) == 3 and "--rank 32" in done[0] and "--rank 4" in done[1]  # stage 1, a cell, the kill
    assert list(rows_of(tmp_path / "one/table1.md")) == ["adapter", ":---", "rank-4"]
    commands.fail = None
    main(*one)
    assert len(commands.ran) == 5  # what was done is not started again
    rows = rows_of(tmp_path / "one/table1.md")
    for cell in ("rank-4", "rank-128", "dora"):
        run = tmp_path / "one" / cell / "run"
        lowest = min(x["val_loss"] for x in runfolder.read_log(run)[0] if "val_loss" in x and x["step"])
        tensors, _ = load_safetensors(run / "best/adapter_model.safetensors")
        assert rows[cell][2:4] == [f"{sum(x.numel() for x in tensors.values()):,}", f"{lowest:.4f}"]
    assert rows["dora"][0] == "32" and rows["rank-128"][4:] == ["-", "-", "-"]
    with pytest.raises(BadInput, match="holds results of steps=2, now steps=3"):
        main(*one, "--steps", 3)
    two = ["table2", *given, "--out", tmp_path / "two", "--cells", "alpha-half"]
    with pytest.raises(BadInput, match="table1.json: no such file, expected the result of table1"):
        main(*two, "--table1", tmp_path / "none")
    main(*two, "--table1", tmp_path / "one")
    assert rows_of(tmp_path / "two/table2.md")["alpha-half"][:2] == ["32", "16"]


def test_a_sweep_knows_its_models_by_their_contents(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    figures = {"val_loss": 1.0, "rank": 4, "alpha": 4.0, "parameters": 1}
    monkeypatch.setattr(sweeps, "train", lambda *given: figures)
    monkeypatch.setattr(sweeps, "make_cell", lambda *given: figures)
    shutil.copytree(made / "tiny", "tiny")
    given = ["--decoder", made / "tiny/decoder", "--data", made / "data", "--steps", 2, "--out", "t",
             "--prompts", ROOT / "docs/paper-prompts.txt"]
    main("table1", "--prior", "tiny/prior", *given, "--cells", "rank-4")
    main("table1", "--prior", "./tiny/prior", *given, "--cells", "rank-8")  # the same, called otherwise
    with open("tiny/prior/prior/config.json", "a") as f:
        f.write(" ")
    with pytest.raises(BadInput, match="t: holds results of prior="):
        main("table1", "--prior", "tiny/prior", *given, "--cells", "rank-16")
    for more, words in (("--training=--epoch 3", "the experiment gives --epochs itself"),
                        ("--training=--rank-pattern x", "--training .*: unrecognized arguments"),
                        ("--training=--strategy add", "--training .*: "),  # stage 1 is a decoder's
                        ("--sampling=--solver euler", "--sampling .*: argument --solver: invalid choice")):
        with pytest.raises(BadInput, match=words):
            main("table1", "--prior", "tiny/prior", *given, more)
    write_json(tmp_path / "t/settings.json", json.loads((tmp_path / "t/settings.json").read_text()) | {
        "prior": "tiny/prior"})  # as an earlier version kept it
    main("table1", "--prior", "tiny/prior", *given, "--cells", "rank-4")
    assert json.loads((tmp_path / "t/settings.json").read_text())["prior"] != "tiny/prior"
    monkeypatch.setattr(trials.inception, "cached_file", lambda which: "there")
    given[-3] = "u"
    main("table1", "--prior", "tiny/prior", *given, "--cells", "rank-4", "--sampling=--lora-scale 0.8")
    assert json.loads((tmp_path / "u/settings.json").read_text())["real_images"]


def test_the_inception_that_cannot_be_had_is_said_before_anything_is_made(monkeypatch):
    def absent(*args):
        raise BadInput("no weights")

    monkeypatch.setattr(trials.inception, "Inception", absent)
    with pytest.raises(BadInput, match="no weights"):
        trials.check_space(Namespace(features="inception", weights=None))
    trials.check_space(Namespace(features=None, weights=None))  # another space then, which is said


def test_a_result_that_cannot_be_one_is_named(tmp_path):
    cell = tmp_path / "seed-0/baseline"
    good = {k: 1.0 for k in ("step", "loss", "loss_paraphrases")} | {
        "n_judged": 26, "n_shown": 20, "space": "s"}
    write_json(cell / "result.json", good)
    assert ablation.arm_result(cell)["space"] == "s"
    for wrong in ({"n_shown": 50}, {"n_judged": 2.5}, {"n_shown": -1}, {"fid_low": "a"}):
        write_json(cell / "result.json", good | wrong)
        with pytest.raises(BadInput, match="baseline/result.json: expected .*; remove the file, and the sa"):
            ablation.arm_result(cell)
    (tmp_path / "settings.json").write_text("{}")
    with pytest.raises(BadInput, match="settings.json: expected the settings of an experiment"), \
            trials.claimed(tmp_path, {"data": "d", "sampling": ""}):
        pytest.fail("taken")


def test_the_best_prior_is_that_of_the_lowest_fid_or_loss(tmp_path, capsys):
    rows = [{"cell": "rank-4", "val_loss": 1.0, "fid": 9.0}, {"cell": "rank-8", "val_loss": 2.0, "fid": 3.0}]
    write_json(tmp_path / "table1.json", {"results": rows})
    assert sweeps.best_prior(tmp_path) == str(tmp_path / "rank-8/run/best")
    assert "rank-8, of 2 of 14 cells" in capsys.readouterr().err
    rows[0]["fid"] = None
    write_json(tmp_path / "table1.json", {"results": rows})
    assert sweeps.best_prior(tmp_path) == str(tmp_path / "rank-4/run/best")
    for wrong in ({}, {"results": []}, {"results": [{"cell": "rank-4"}]}, {"results": 1},
                  {"results": [rows[1] | {"fid": "3"}]}, {"results": [rows[1] | {"cell": ["rank-4"]}]},
                  {"results": [rows[1] | {"val_loss": float("nan")}]}):
        write_json(tmp_path / "table1.json", wrong)
        with pytest.raises(BadInput, match="table1.json: expected the result of table1, with cells"):
            sweeps.best_prior(tmp_path)


# The submission


@pytest.fixture
def checkpoint(tmp_path):
    m = tiny_msdm()
    save_safetensors(tmp_path / "m.safetensors", m.tensors(), m.metadata())
    return tmp_path / "m.safetensors"


def test_a_submission_is_a_zip_in_order_and_the_same_bytes_again(checkpoint, tmp_path, commands):
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS * 4))
    flags = ["submission", "--ckpt", checkpoint, "--prompts", tmp_path / "p.txt", "--out", tmp_path / "s",
             "--sampling=--steps 1"]
    main(*flags)
    with zipfile.ZipFile(tmp_path / "s.zip") as z:
        assert z.namelist() == [f"{i:06d}.png" for i in range(12)]
        assert z.read("000007.png") == (tmp_path / "s/images/000007.png").read_bytes()
    first = file_hash(tmp_path / "s.zip")
    (tmp_path / "s/images/000003.png").unlink()
    main(*flags)
    assert file_hash(tmp_path / "s.zip") == first
    (tmp_path / "s/images/000012.png").write_bytes((tmp_path / "s/images/000003.png").read_bytes())
    with pytest.raises(BadInput, match="s: 13 images, expected 12"):
        main(*flags)
    shutil.move(tmp_path / "s", tmp_path / "kept")
    with pytest.raises(BadInput, match="s.zip: is there, and the folder .*s of its images is not; move it"):
        main(*flags)
    assert file_hash(tmp_path / "s.zip") == first
    shutil.move(tmp_path / "kept", tmp_path / "s")
    (tmp_path / "s.zip").write_bytes(b"mine")
    with pytest.raises(BadInput, match="s.zip: would be replaced and is not a zip of"):
        main(*flags)
    for name in (".", "/"):
        with pytest.raises(BadInput, match="expected a folder with a name"):
            main("submission", "--ckpt", checkpoint, "--prompts", tmp_path / "p.txt", "--out", name)


def test_table_3_measures_checkpoints_and_folders_by_both_protocols(checkpoint, tmp_path, commands, made):
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS * 4))
    main("submission", "--ckpt", checkpoint, "--prompts", tmp_path / "p.txt", "--out", tmp_path / "s",
         "--sampling=--steps 1")
    commands.ran.clear()
    main("table3", checkpoint, tmp_path / "s", "--data", made / "data", "--prompts", tmp_path / "p.txt",
         "--out", tmp_path / "t", "--sampling=--steps 1", "--weights", "rule")
    assert [line[0] for line in commands.ran] == ["sampler.py", *["metrics.py"] * 4]
    rows = rows_of(tmp_path / "t/table3.md")
    own, folder = rows[str(checkpoint)], rows[str(tmp_path / "s")]
    assert own == folder and own[0] == "12"  # the same images
    found = json.loads((tmp_path / "t" / submission.name_of(tmp_path / "s") / "imageclef.json").read_text())
    shown = float(own[1].split()[0])
    assert shown == pytest.approx(found["fid"], rel=0.05, abs=1e-9) and 0 <= shown <= 2
    shown = [float(own[i].split()[0]) for i in (2, 3)]  # of as many images as there are real ones beside
    assert shown == pytest.approx([found["fid_fake_half"], found["fid_real_half"]], rel=0.05, abs=1e-9)
    assert f"- Equal n: {found['n_half']} images of either side" in (tmp_path / "t/table3.md").read_text()
    file = tmp_path / "t" / submission.name_of(tmp_path / "s") / "result.json"
    result = json.loads(file.read_text())
    write_json(file, result | {"imageclef": result["imageclef"] | {"weights": "f00d"}})
    with pytest.raises(BadInput, match="in several spaces"):
        main("table3", checkpoint, "--data", made / "data", "--prompts", tmp_path / "p.txt",
             "--out", tmp_path / "t", "--sampling=--steps 1", "--weights", "rule")
    write_json(file, result)
    was = submission.hash_of(made / "tiny/prior")  # of a published folder, by its contents
    assert was == submission.hash_of(f"{made}/tiny/../tiny/prior") is not None
    assert was != submission.hash_of(made / "tiny/decoder")
    with pytest.raises(BadInput, match="expected a path with a name, and another one than cache"):
        main("table3", "/", "--data", made / "data", "--prompts", tmp_path / "p.txt", "--out", tmp_path / "t")
    tensors, meta = load_safetensors(checkpoint)
    save_safetensors(checkpoint, tensors, meta | {"step": 7})  # trained on, under the same name
    with pytest.raises(BadInput, match=f"holds the figures of {checkpoint} with hash .*; remove that folder"):
        main("table3", checkpoint, "--data", made / "data", "--prompts", tmp_path / "p.txt",
             "--out", tmp_path / "t", "--sampling=--steps 1", "--weights", "rule")


def test_without_imagenet_weights_table_3_says_what_is_missing_and_names_its_space(monkeypatch, capsys):
    monkeypatch.setattr(submission.inception, "cached_file", lambda which: None)
    args = Namespace(features=None, weights=None, data="some/data")
    (name, flags), = submission.measures_of(args).items()
    assert name == "classifier" and flags[1].endswith("data.judge-64.safetensors")
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "inception_v3_google-0cc3c7bd.pth" in said and "--weights" in said
