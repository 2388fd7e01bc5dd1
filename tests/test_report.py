"""The page of a run holds what the files hold, and nothing that it would have to load."""

import csv
import json
import re
import shlex
import shutil
from html.parser import HTMLParser

import pytest
from helpers import image, run

import data
import findings
import metrics
import report
import sampler
from files import file_hash

HOSTILE = '<script>alert("x")</script> & $a_b$ "quotes"'
VOID = {"meta", "img", "wbr"}


class Page(HTMLParser):
    """Texts and attributes of a page; a tag that is not closed in its turn fails."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.words, self.ids = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href", "srcset", "action", "data")]
        self.ids += [v for k, v in attrs if k == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.words.append(data)


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def save_image(path, seed=0, side=32):
    path.parent.mkdir(parents=True, exist_ok=True)
    image(seed, side, side).save(path)


SETTINGS = {
    "vae": {"preset": "demo", "data": "data/p", "kl_weight": 0.003, "steps": 40},
    "msdm": {"preset": "demo", "data": "data/p", "vae": "runs/v.safetensors", "shown": 4, "sample_steps": 25,
             "log_every": 10, "steps": 40, "batch_size": 16},
    "prior": {"network": "prior", "model": "tiny/prior", "data": "data/p", "rank": 8, "steps": 40},
    "unet3": {"network": "unet3", "model": "tiny/k3", "data": "data/p", "rank": 8, "steps": 40},
}
LOG = [{"step": 10, "loss": 0.912345, "grad_norm": 2.25, "lr": 0.00125},
       {"step": 20, "loss": 0.712345, "grad_norm": 1.125, "lr": 0.0015},
       {"step": 20, "val_loss": 0.655551}, {"step": 40, "val_loss": 0.677771, "val_mse": 0.0125}]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, with a run in runs/a that has a log and two sheets."""
    monkeypatch.chdir(tmp_path)
    make_run("msdm")
    return tmp_path


def make_run(kind, name="a"):
    run_folder = data.Path("runs") / name
    write(run_folder / "config.json", {"settings": SETTINGS[kind], "data": "fingerprint0123", "commit": None,
                                       "versions": {"torch": "2.99.1"}, "images_a_step": 16})
    (run_folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LOG))
    (run_folder / "best.safetensors").write_bytes(b"weights of " + name.encode())
    for step in (20, 40):
        save_image(run_folder / f"samples/{step:07d}.png", step)


def make_samples(name, checkpoint, prompts):
    out = data.Path("out") / name
    write(out / "config.json", {"checkpoint": checkpoint, "prompts": "5" * 16, "solver": "dpmpp", "steps": 17,
                                "guidance": 4.25, "seed": 31})
    with open(out / "prompts.csv", "w", newline="", encoding="utf-8") as f:
        rows = csv.writer(f)
        rows.writerows([["Filename", "Prompt", "Seed"],
                        *([f"{i:06d}.png", p, 31 + i] for i, p in enumerate(prompts))])
    for i in range(len(prompts)):
        save_image(out / f"images/{i:06d}.png", 100 + i)
    return out


METRICS = {"fid": 61.2346, "fid_real_half": 3.1234, "kid": 0.00123, "kid_error": 0.0001, "precision": 0.6123,
           "recall": 0.3217, "f1": 0.4218, "inception_score": 2.3456, "inception_score_std": 0.0456,
           "protocol": "fid", "weights": "rule", "weights_published": False, "n_real": 850, "n_fake": 123,
           "kid_subset_size": None, "real": "data/k", "fake": "out/a", "size": 64, "resize": "tf1",
           "notes": ["random weights"]}
ROW = {"n": 8, "share": 0.25, "low": 0.0715, "high": 0.5907, "sensitivity": 0.9615, "accuracy": 0.97,
       "chance": 0.3142}
FAITHFULNESS = {"real": "data/r", "fake": "out/a", "n_train": 900, "n_held_out": 100, "n_fake": 123,
                "n_fake_unjudged": 2, "size": 64, "steps": 250, "seed": 0, "not_judged": ["paris ip"],
                "values": [ROW | {"attribute": "count", "asked for": "2"},
                           ROW | {"attribute": "box", "asked for": "with", "share": 1.0, "high": 1.0,
                                  "sensitivity": None}],
                "confusions": [{"attribute": "count", "asked for": "2", "n": 8, "found": {"3": 5, "2": 2}}],
                "summary": [ROW | {"asked for": "exactly 1, 2, 3 polyps", "share": 0.4321}]}
COPIES = {"train": "data/p", "held_out": "10 % of train", "fake": "out/a", "features": "thumbnails",
          "size": 64, "verdict": "COPIES: 1 of 123 generated images is a training image", "flagged": True,
          "near": 0.3,
          "near_ratio": 0.7, "rows": [{"images": "generated", "n": 123, "too close": 0.0813, "low": 0.0012,
                                       "high": 0.2, "authentic": 0.6789, "median distance": 0.5678}],
          "copies": [{"image": "000000.png", "training": "t7.png", "form": "mirrored", "shift": [0, 1],
                      "residual": 0.0456}],
          "pairs": [{"generated": "000001.png", "training": "t7.png", "distance": 0.0123, "ratio": 0.3456},
                    {"generated": "000002.png", "training": "lost.png", "distance": 0.2, "ratio": 0.9}]}
TWO = "Generate an image with 2 polyps."


def make_results():
    """A folder of images of runs/a and the three files of results in the run's folder."""
    out = make_samples("a", file_hash("runs/a/best.safetensors"), [TWO, TWO, HOSTILE])
    save_image(data.Path("data/p/images/t7.png"), 7)
    for name, value in (("m", METRICS), ("faith", FAITHFULNESS), ("copies", COPIES)):
        write(data.Path("runs/a") / f"{name}.json", value)
    return out


def page(*flags):
    report.main(["--run", "runs/a", *flags])
    return data.Path("runs/a/report.html").read_text(encoding="utf-8")


def leaves(value):
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [x for v in values for x in leaves(v)] if isinstance(value, dict | list) else [value]


def test_the_page_holds_every_value_of_the_files_and_loads_nothing(folder):
    make_results()
    text = page()
    found = Page(text)
    config = json.loads((folder / "runs/a/config.json").read_text())
    for value in leaves([config, LOG, METRICS, FAITHFULNESS, COPIES]):
        if value is not None:
            assert (value if isinstance(value, str) else json.dumps(value)) in found.text, value
    assert [link for link in found.links if not link.startswith(("#", "data:image/jpeg;base64,"))] == []
    assert "script" not in found.tags and not re.search(r"@import|url\((?!#)", text)
    assert len(found.ids) == len(set(found.ids))
    # two sheets; three generated images, two of them again under the value that fails; a copy and a pair
    assert found.tags.count("img") == 2 + 3 + 2 + 2 * 2
    # loss, gradient, learning rate; faithfulness in short and value by value
    assert found.tags.count("svg") == 5
    for said in ("dpmpp, 17 steps, guidance 4.25, seeds from 31; weights of this run", "33.58", "0.929",
                 "optimiser step", "share of images", "0.43 (0.07–0.59), n = 8", "1 pairs are not shown",
                 "000000.png, t7.png, copy, mirrored, residual 0.05",
                 "The paper's figures are of other data and cannot be compared", "here it has 850"):
        assert said in found.text, said


def test_a_sheet_is_named_by_decimal_digits(folder):
    shutil.copy(folder / "runs/a/samples/0000020.png", folder / "runs/a/samples/²0.png")
    assert [p.name for p in findings.gather("runs/a").sheets] == ["0000020.png", "0000040.png"]


def test_steps_that_float16_left_out_are_counted(folder):
    for lost in (("loss",), ("grad_norm",), ("loss", "grad_norm")):
        with open("runs/a/metrics.jsonl", "a") as f:
            line = {"step": 40, "loss": 1.0, "grad_norm": 1.0, "lr": 1e-4}
            f.write(json.dumps({k: v for k, v in line.items() if k not in lost}) + "\n")
    assert "3 logged steps had no finite loss or gradient and were left out" in Page(page()).text


def test_failures_are_told_from_the_files(folder):
    out = make_results()
    (out / "images/000002.png").unlink()
    data.write_image(out / "images/000001.png", data.np.full((8, 8, 3), 9, "uint8"))
    found = Page(page()).text
    failures = found[found.index("Looked at"):found.index("config.json; what is not set")]
    for said in ("rose again, from 0.6556 at step 20 to 0.6778 at step 40", "COPIES: 1 of 123",
                 "1 of 2 values are shown less often", "count 2: asked for 8 times, found 2 times",
                 "the judge finds 3 in 5, 2 in 2",
                 "1 images of out/a are not there, first 000002.png", "nearly the same colour"):
        assert said in failures, said
    assert "box with" not in failures


def test_a_distance_of_another_space_does_not_stand_beside_the_papers(folder):
    more = {"features": "dino", "space": "dino: CLS", "weights_published": None, "precision_low": 0.5111,
            "precision_high": 0.7222, "coverage": 0.8765}
    write(folder / "runs/a/m.json", METRICS | more)
    found = Page(page()).text
    assert "33.58" not in found and "paper: MSDM" not in found
    for said in ("0.6123 (0.5111–0.7222)", "space dino: CLS", "coverage (1 is best) 0.8765"):
        assert said in found, said


def test_the_tasks_figures_are_said_to_be_of_other_images(folder):
    write(folder / "runs/a/m.json", METRICS | {"protocol": "imageclef", "n_real": 2000,
                                               "weights_published": True})
    found = Page(page()).text
    assert "the organisers' own two sets" in found and "2,000 development images" not in found


def test_chance_is_named_as_the_file_has_it(folder):
    make_results()
    found = Page(page()).text
    assert "Diamond: the share of real images that show it." in found
    assert found.count(" real images that show it") == 1 + 2  # and in the legends of two figures
    rows = {key: [r | {"base_rate": 0.2} for r in FAITHFULNESS[key]] for key in ("values", "summary")}
    write(folder / "runs/a/faith.json", FAITHFULNESS | rows)
    assert "Diamond: chance, what the same images would have if they were dealt" in Page(page()).text


def test_a_file_that_was_only_searched_does_not_end_the_page(folder):
    out = make_results()
    (folder / "runs/a/notes.json").write_text("[1]")
    (out.parent / "b").mkdir()
    (out.parent / "b/prompts.csv").write_text('"')
    (out.parent / "b/config.json").write_text("{}")
    found = Page(page()).text
    for said in ("left out: runs/a/notes.json", "left out: out/b/prompts.csv", "COPIES: 1 of 123"):
        assert said in found, said
    write(folder / "m.json", METRICS | {"fake": str(out.resolve())})  # the same folder, as a whole path
    assert "not the images shown" not in Page(page("--metrics", str(folder / "m.json"))).text


def test_texts_of_files_are_escaped(folder):
    make_results()
    write(folder / "runs/a/faith.json", FAITHFULNESS | {"not_judged": [HOSTILE]})
    settings = SETTINGS["msdm"] | {HOSTILE: HOSTILE}
    write(folder / "runs/a/config.json", {"settings": settings, "data": HOSTILE})
    text = page()
    # a caption, what is not judged, a key, its value, the fingerprint
    assert "<script" not in text and Page(text).text.count(HOSTILE) == 5


def test_what_is_missing_is_named_with_a_command_that_is_accepted(folder):
    text = page()
    found = Page(text).text
    assert "Not measured, so not known: faithfulness, copies" in found
    lines = {}
    for line in "\n".join(re.findall(r"<pre>(.*?)</pre>", text, re.S)).splitlines():
        words = shlex.split(line)
        lines[" ".join(words[1:3]) if words[1] == "judges.py" else words[1]] = words[2:]
    assert lines.keys() == {"judges.py prompts", "sampler.py", "metrics.py", "judges.py faithfulness",
                            "judges.py memorisation"}
    asked = sampler.parse(lines["sampler.py"])
    assert asked.ckpt == "runs/a/best.safetensors" and asked.out == "out/a"
    assert metrics.parse(lines["metrics.py"]).fake == data.Path("out/a")


@pytest.mark.parametrize("kind, said", [
    ("vae", ["Autoencoder", "An autoencoder has no prompts", "25.1 dB"]),
    ("prior", ["Adapter on the prior of Kandinsky 2.2", "--ckpt tiny/prior --decoder DECODER --prior-lora"]),
    ("unet3", ["Adapter on Kandinsky 3's U-Net", "--ckpt tiny/k3 --lora runs/a/best"])])
def test_every_kind_of_training_has_a_page(folder, kind, said):
    make_run(kind)
    if kind == "vae":  # the best of its validations has the squared error
        with open("runs/a/metrics.jsonl", "a") as f:
            f.write(json.dumps({"step": 41, "val_loss": 0.1, "val_mse": 0.0125}) + "\n")
    found = Page(page()).text
    assert all(x in found for x in said), found


def test_only_images_of_this_runs_weights_are_found_and_others_are_said_to_be_so(folder):
    make_samples("other", "0" * 64, [TWO])
    assert "No folder of images" in Page(page()).text
    assert "NOT known to be of this run" in Page(page("--samples", "out/other")).text
    make_samples("own", file_hash("runs/a/best.safetensors"), [TWO])
    assert "Generated images of out/own:" in Page(page()).text


@pytest.mark.parametrize("text, said", [
    ('{"step": 10, "loss": 0.5}\n{"step": 20, "lo\n{"step": 30}\n', "metrics.jsonl, row 2: not JSON"),
    ('[1, 2]\n', 'metrics.jsonl, row 1: expected {"step": 50'),
    ('{"loss": 0.5}\n', 'metrics.jsonl, row 1: expected {"step": 50'),
    ('{"step": "ten"}\n', 'metrics.jsonl, row 1: expected {"step": 50')])
def test_a_damaged_log_is_one_line_and_nothing_is_written(folder, text, said):
    (folder / "runs/a/metrics.jsonl").write_text(text)
    with pytest.raises(report.BadInput, match=re.escape(said)) as error:
        page()
    assert "take the line out" in str(error.value) and "\n" not in str(error.value)
    assert not (folder / "runs/a/report.html").exists()


def test_the_line_that_a_kill_left_unfinished_is_left_out_and_said(folder):
    with open("runs/a/metrics.jsonl", "a") as f:
        f.write('{"step": 40, "lo')
    assert "row 5: unfinished, left out" in Page(page()).text


@pytest.mark.parametrize("value, said", [
    (METRICS | {"fid": "low"}, 'fid: expected a number, got "low"'),
    (FAITHFULNESS | {"values": [{"n": 1}]}, "values: expected a list of objects with asked for"),
    (COPIES | {"rows": 3}, "rows: expected a list of objects with images")])
def test_a_result_of_another_form_is_bad_input(folder, value, said):
    write(folder / "runs/a/result.json", value)
    with pytest.raises(report.BadInput, match=re.escape(said)):
        page()


def test_bad_flags_name_the_way_out(folder):
    done = run("report.py", "--run", "runs/b", expect=2)
    assert done.stderr == "error: runs/b: expected the folder of a training, with config.json\n"
    for flags, said in ((["--run", "runs"], "runs inside it: runs/a"),
                        (["--run", "runs/a", "--samples", "runs/a"], "expected a folder of sampler.py"),
                        (["--run", "runs/a", "--metrics", "runs/a/config.json"], "it has no fid"),
                        (["--run", "runs/a", "--out", "runs/a/metrics.jsonl"], "is not a page of report.py")):
        with pytest.raises(report.BadInput, match=said):
            report.main(flags)


def test_a_second_page_replaces_the_first_with_the_same_bytes(folder):
    make_results()
    assert page() == page()


def test_a_long_run_with_many_large_images_stays_below_5_mb(folder):
    prompts = [f"Generate an image with {n} polyps. word{i}" for i in range(40) for n in (1, 2)] * 4
    out = make_samples("a", file_hash("runs/a/best.safetensors"), prompts[:1])
    save_image(folder / "large.png", 0, 256)
    with open(out / "prompts.csv", "a") as f:
        f.writelines(f"{i:06d}.png,{prompt},{i}\n" for i, prompt in enumerate(prompts[1:], 1))
    for i in range(1, len(prompts)):
        (out / f"images/{i:06d}.png").hardlink_to(folder / "large.png")
    lines = [{"step": i, "loss": i % 7, "lr": 1e-4, "grad_norm": 1.0} for i in range(0, 100_000, 20)]
    (folder / "runs/a/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    save_image(folder / "sheet.png", 1, 1200)
    for step in range(100, 2000, 100):
        (folder / f"runs/a/samples/{step:07d}.png").hardlink_to(folder / "sheet.png")
    text = page()
    assert len(text) < 5e6 and "6 of 21 sheets" in text and "72 of 80 prompts" in text
