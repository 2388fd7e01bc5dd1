"""Model selection by FID: what is kept and logged, what it costs the training (nothing), kills, processes."""

from command import BadInput

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, judge_file, log_lines, run, two_ranks

import inception
import metrics
import msdm
import selection
import spaces
from files import load_metadata, load_safetensors

IMAGES = 7


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Data, an autoencoder, a run without selection and one with it, every second checkpoint."""
    root = tmp_path_factory.mktemp("selection")
    run("phantom.py", "--out", root / "data", "--n", 24, "--size", 32)
    run("vae.py", "--data", root / "data", "--out", root / "vae", "--size", 32, "--steps", 4, "--perceptual",
        "off")
    judge_file(root / "judge.safetensors")
    run("msdm.py", *flags(root), "--out", root / "plain")
    run("msdm.py", *flags(root), *selecting(root), "--out", root / "run")
    return root


def flags(root):
    return ["--data", root / "data", "--vae", root / "vae/best.safetensors", "--size", 32, "--steps", 12,
            "--batch-size", 4, "--log-every", 2, "--save-every", 2, "--shown", 0, "--sample-steps", 2,
            "--device", "cpu"]


def selecting(root):
    return ["--select-every", 4, "--select-images", IMAGES, "--classifier", root / "judge.safetensors"]


def in_process(*words):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                                # as the runs of made
    try:
        msdm.main([str(w) for w in words])
    finally:
        torch.set_num_threads(threads)


def fids(folder):
    return [line for line in log_lines(folder) if "fid" in line]


@pytest.fixture(autouse=True)
def no_inception(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


def test_the_best_fid_is_kept_and_logged(made):
    lines = fids(made / "run")
    assert [line["step"] for line in lines] == [4, 8, 12]
    assert all(line["space"].startswith("classifier ") and 0 <= line["recall"] <= 1 for line in lines)
    best = min(lines, key=lambda line: line["fid"])
    meta = load_metadata(made / "run/best-fid.safetensors")
    assert {k: best[k] for k in ("step", "fid", "precision", "recall", "space")}.items() <= meta.items()

    # The figures again, from the checkpoint and the images of the folder by themselves.
    last = msdm.load(made / "run/last.safetensors")
    net = spaces.load(f"classifier:{made / 'judge.safetensors'}")
    paths = metrics.image_files(made / "data")
    real = metrics.extract(net, paths, 32, names=["features"], what=None)["features"]
    records = {r.name: r for r in msdm.data.read_folder(made / "data")}
    train, val = msdm.data.split(list(records.values()))
    order = selection.np.random.default_rng(0).permutation(24)
    prompts = [[*train, *val][i].prompts[0] for i in order[:IMAGES]]
    images = last.sample(prompts, seed=0, steps=2, solver="dpmpp")
    fake = net(images)["features"]
    assert lines[-1]["fid"] == pytest.approx(metrics.fid(real, fake), rel=1e-3)
    assert (lines[-1]["precision"], lines[-1]["recall"]) == pytest.approx(
        metrics.precision_recall(real, fake, metrics.K), abs=1e-5)


def test_selection_changes_nothing_in_the_training(made):
    for name in ("last.safetensors", "best.safetensors"):
        plain, ours = (load_safetensors(made / folder / name)[0] for folder in ("plain", "run"))
        assert plain.keys() == ours.keys() and all(torch.equal(plain[k], ours[k]) for k in plain)
    rest = [line for line in log_lines(made / "run") if "fid" not in line]
    assert rest == log_lines(made / "plain")


def test_a_best_checkpoint_that_is_not_there_any_more_is_made_by_the_next_selection(made, tmp_path, capsys):
    run, file = tmp_path / "run", tmp_path / "run/best-fid.safetensors"
    shutil.copytree(made / "run", run)
    meta, of = load_metadata(file), SimpleNamespace(run=SimpleNamespace(folder=run), key="other")
    assert selection.Selection.kept(of) == {}               # of other prompts or real images
    of.key = meta["selection"]
    assert selection.Selection.kept(of) == meta
    file.write_bytes(b"half")
    assert selection.Selection.kept(of) == {}
    file.unlink()
    assert selection.Selection.kept(of) == {}

    log = [line | {"fid": 0.0} if "fid" in line else line for line in log_lines(run)]  # none will be less
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    words = [*flags(made), *selecting(made), "--out", run]
    words[words.index("--steps") + 1] = 16
    in_process(*words)
    meta, line = load_metadata(file), fids(run)[-1]
    assert (meta["step"], line["step"], meta["fid"]) == (16, 16, line["fid"])
    assert f"FID {line['fid']:.4g} of {line['space']} at step 16" in capsys.readouterr().out


@pytest.mark.parametrize("moment", ["before it", "in the sampling", "before the line"])
def test_a_killed_run_makes_the_selections_that_are_missing(made, tmp_path, monkeypatch, moment):
    """A kill around the second selection; the FIDs, the best and the features kept are those of one run."""
    class Killed(Exception):
        pass

    def kill(*args, **more):
        raise Killed

    whole, calls = selection.Selection, []

    class Dies(whole):
        def __call__(self, step, *others):
            calls.append(step)
            if step == 8 and moment == "before it":
                kill()
            if step == 8 and moment == "in the sampling":
                self.net.forward = kill
            if step == 8 and moment == "before the line":
                self.run.log = kill
            super().__call__(step, *others)

    monkeypatch.setattr(selection, "Selection", Dies)
    words = [*flags(made), *selecting(made), "--out", tmp_path / "run"]
    with pytest.raises(Killed):
        in_process(*words)
    assert calls == [4, 8] and [line["step"] for line in fids(tmp_path / "run")] == [4]
    monkeypatch.setattr(selection, "Selection", whole)
    monkeypatch.setattr(selection, "extract", kill)         # the real features are read from their file
    in_process(*words)
    assert log_lines(tmp_path / "run") == log_lines(made / "run")
    for name in ("last.safetensors", "best-fid.safetensors"):
        ours, expected = (load_safetensors(folder / name) for folder in (tmp_path / "run", made / "run"))
        assert ours[1] == expected[1] and all(torch.equal(ours[0][k], x) for k, x in expected[0].items())


def test_a_finished_run_begins_to_select_in_another_space(made, tmp_path, capsys):
    """Lines of one space are not compared with those of another; with --weights the Inception is taken."""
    shutil.copytree(made / "run", tmp_path / "run")
    in_process(*flags(made), *selecting(made), "--weights", "rule", "--out", tmp_path / "run")
    done = capsys.readouterr()
    assert f"selection: FID of {IMAGES} images every 4 steps, features of inception rule" in done.err
    assert "best-fid.safetensors: FID" in done.out and "of inception rule at step 12" in done.out
    new = fids(tmp_path / "run")[len(fids(made / "run")):]
    assert [(line["step"], line["space"]) for line in new] == [(12, "inception rule")]
    assert load_metadata(tmp_path / "run/best-fid.safetensors")["space"] == "inception rule"


def test_two_processes_share_the_images(made, tmp_path):
    words = [*flags(made), *selecting(made), "--out", tmp_path / "run"]
    words[words.index("--batch-size") + 1] = 2
    done = two_ranks(ROOT / "msdm.py", *words)
    assert done.stderr.count("selection: FID of") == 1 and done.stdout.count("best-fid.safetensors: FID") == 1
    for ours, expected in zip(fids(tmp_path / "run"), fids(made / "run"), strict=True):
        assert ours["step"] == expected["step"] and ours["selection"] == expected["selection"]
        assert ours["fid"] == pytest.approx(expected["fid"], rel=0.02)


@pytest.mark.parametrize(("more", "words"), [
    (["--select-every", 3], "--select-every 3: expected a multiple of --save-every 2"),
    (["--select-every", 0], "--select-every 0: expected a multiple"),
    (["--select-every", 4, "--select-images", 3], "--select-images 3: expected at least 4"),
    (["--classifier", "c"], "--classifier c: only --select-every N reads it"),
    (["--weights", "w"], "--weights w: only --select-every N reads it"),
    (["--select-every", 4], "no Inception weights in torch's cache; name them with --weights FILE, or an"),
    (["--select-every", 4, "--classifier", "absent"], "absent: expected an attribute classifier"),
    (["--select-every", 4, "--weights", "absent"], "absent: no such file"),
])
def test_bad_flags_are_one_line_before_anything_is_written(made, tmp_path, more, words):
    with pytest.raises(BadInput, match=words) as error:
        in_process(*flags(made), *more, "--out", tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_the_published_inception_goes_before_the_classifier(made, tmp_path, monkeypatch):
    args = msdm.argparse.Namespace(select_weights=None, classifier=str(made / "judge.safetensors"))
    assert selection.load_space(args)[1].startswith("classifier ")
    file = tmp_path / "hub/checkpoints" / inception.PUBLISHED["fid"]["files"][0]
    file.parent.mkdir(parents=True)
    file.write_bytes(b"half a file")
    with pytest.raises(BadInput, match="SHA-256"):
        selection.load_space(args)
