"""judges.py on toy images: a bright disc is a polyp, a green square in the lower left is the box."""

from command import BadInput

import csv
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops, ImageOps

import classifier
import data
import judges
import memorisation
import prompts
from classifier import COLUMN, SLICE, UNKNOWN, VALUES
from files import load_safetensors, save_safetensors

SIDE = 32


def toy_image(rng, polyp, box):
    img = np.kron(rng.normal(90, 20, (4, 4, 3)), np.ones((8, 8, 1)))    # patches, by which a copy is known
    if polyp:
        y, x = np.mgrid[:SIDE, :SIDE]
        cx, cy = rng.uniform(8, 24, 2)
        img[np.hypot(x - cx, y - cy) < 6] = 230
    if box:
        img[-8:, :8] = 20, 180, 130
    return img.clip(0, 255).astype(np.uint8)


def write_folder(folder, rng, n, captions="prompt-gt.csv"):
    """n images with two prompts each, or one where they stand for generated ones."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for i in range(n):
        polyp, box = rng.random(2) < 0.5
        data.write_image(folder / "images" / f"{i:06d}.png", toy_image(rng, polyp, box))
        said = [prompts.write({"contains": ["polyp"]} if polyp else {"n_polyps": 0}),
                prompts.write({"box": bool(box)})]
        rows += [(p, f"{i:06d}.png") for p in (said if captions == "prompt-gt.csv" else [said[i % 2]])]
    write_rows(folder / captions, rows)
    return folder


def write_rows(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as f:
        csv.writer(f, delimiter=";" if path.name == "prompt-gt.csv"
                   else ",").writerows([("Prompt", "Filename"), *rows])


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Real images, other real images, and true images that stand for generated ones."""
    root, rng = tmp_path_factory.mktemp("toy"), np.random.default_rng(0)
    write_folder(root / "real", rng, 240)
    write_folder(root / "other", rng, 100)
    write_folder(root / "fake", rng, 100, "prompts.csv")
    return root


def run(command, **flags):
    flags = {"size": SIDE, "device": "cpu"} | ({} if command == "memorisation" else {"steps": 40}) | flags
    given = [str(x) for name, value in flags.items() for x in ("--" + name.replace("_", "-"), value)]
    return judges.main([command, *given])


def faithfulness(toy, fake):
    run("faithfulness", real=toy / "real", fake=fake, held_out=toy / "other", json=toy / "table.json")
    table = json.loads((toy / "table.json").read_text())
    return {row["asked for"]: row for row in table["summary"]}, table


def test_true_images_score_as_the_classifier_does(toy, capsys):
    rows, table = faithfulness(toy, toy / "fake")
    assert table["n_train"] == 240 and table["n_held_out"] == 100 and table["n_fake"] == 100
    assert rows["with / without the box"]["n"] == 50
    for name in ("no polyps", "a polyp", "with / without the box"):
        row = rows[name]
        assert row["accuracy"] > 0.9 and abs(row["share"] - row["sensitivity"]) < 0.15
        assert row["low"] <= row["share"] <= row["high"]
        assert 0.4 < row["chance"] < 0.6
    said = capsys.readouterr().out
    assert "no polyps" in said and "chance" in said


def test_the_classifier_is_kept_and_read_again(toy, capsys, monkeypatch):
    faithfulness(toy, toy / "fake")
    monkeypatch.setattr(classifier, "train_classifier", lambda *_: pytest.fail("trained again"))
    capsys.readouterr()
    first, _ = faithfulness(toy, toy / "fake")
    assert "read from" in capsys.readouterr().out
    assert faithfulness(toy, toy / "fake")[0] == first


def test_shuffled_prompts_fall_to_chance(toy, tmp_path):
    (tmp_path / "images").symlink_to(toy / "fake" / "images")
    names = [r.name for r in data.read_folder(toy / "fake")]
    said = [p for r in data.read_folder(toy / "fake") for p in r.prompts]
    np.random.default_rng(1).shuffle(said)
    write_rows(tmp_path / "prompts.csv", list(zip(said, names, strict=True)))
    rows, _ = faithfulness(toy, tmp_path)
    for row in rows.values():
        assert row["low"] < row["chance"] < row["high"]


def write_counts(folder, rng, shown, asked=None):
    """Images of so many bright discs, each in a cell of its own, with prompts for as many, or for `asked`."""
    rows = []
    for i, n in enumerate(shown):
        img = rng.normal(90, 10, (SIDE, SIDE, 3))
        for cell in rng.permutation(9)[:n]:
            y, x = 2 + 10 * (cell // 3) + rng.integers(3), 2 + 10 * (cell % 3) + rng.integers(3)
            img[y:y + 6, x:x + 6] = 230
        data.write_image(folder / "images" / f"{i:04d}.png", img.clip(0, 255).astype(np.uint8))
        rows.append((prompts.write({"n_polyps": int(asked or n)}), f"{i:04d}.png"))
    write_rows(folder / "prompt-gt.csv", rows)
    return folder


class Counter(torch.nn.Module):
    """Logits of a classifier that counts the discs of write_counts, more than `most` of them as most."""

    def __init__(self, most):
        super().__init__()
        self.most, self.out = most, torch.nn.Linear(1, 1)

    def forward(self, img):
        n = ((img.float().mean(1) > 160).sum((1, 2)) / 36).round().long().clamp(max=self.most)
        logits = torch.zeros(len(img), len(VALUES))
        logits[torch.arange(len(img)), SLICE["count"].start + n] = 1
        return logits


@pytest.mark.parametrize("most", [8, 3])
def test_eight_polyps_under_a_prompt_for_three_are_not_credited(tmp_path, capsys, monkeypatch, most):
    rng = np.random.default_rng(0)
    real, held_out = (write_counts(tmp_path / name, rng, np.arange(10 * (most + 1)) % (most + 1))
                      for name in ("real", "held-out"))
    fake = write_counts(tmp_path / "fake", rng, [8] * 10 + [3] * 10, asked=3)
    monkeypatch.setattr(judges, "classifier_of", lambda *_: Counter(most))
    run("faithfulness", real=real, held_out=held_out, fake=fake, json=tmp_path / "table.json")
    table = json.loads((tmp_path / "table.json").read_text())
    if most == 3:                                           # its "3" would be right in all of them
        assert table["not_judged"] == ["count 3: the judge has not seen 4"] and not table["values"]
        assert "not judged: count 3: the judge has not seen 4" in capsys.readouterr().out
    else:
        [row], [confused] = table["values"], table["confusions"]
        assert row["sensitivity"] == 1 and row["n"] == 20 and row["share"] == row["only"] == 0.5
        assert confused["found"] == {"3": 10, "8": 10} and not table["not_judged"]
        assert table["summary"][0]["asked for"] == "exactly 3 polyps"


def write_places(folder, rng, shown, asked=None):
    """Red images with a bright square in a cell, and prompts for this cell, or for `asked`."""
    rows, corners = [], {"upper-left": (3, 3), "upper-right": (3, 20), "center": (12, 12)}
    for i, cell in enumerate(shown):
        img, (y, x) = rng.normal((130, 80, 80), 5, (SIDE, SIDE, 3)), corners[cell] + rng.integers(3, size=2)
        img[y:y + 8, x:x + 8] = 230
        data.write_image(folder / "images" / f"{i:04d}.png", img.clip(0, 255).astype(np.uint8))
        rows.append((prompts.write({"abnormality_cells": [asked or cell]}), f"{i:04d}.png"))
    write_rows(folder / "prompt-gt.csv", rows)
    return folder


def test_a_judge_learns_a_place_from_mirrored_images(tmp_path):
    rng = np.random.default_rng(0)
    real = write_places(tmp_path / "real", rng, ["upper-left", "center"] * 40)
    held_out = write_places(tmp_path / "held-out", rng, ["upper-left", "upper-right", "center"] * 8)
    fake = write_places(tmp_path / "fake", rng, ["upper-right"] * 8 + ["upper-left"] * 4, "upper-right")

    def judged(**flags):
        run("faithfulness", real=real, held_out=held_out, fake=fake, json=tmp_path / "t.json", **flags)
        table = json.loads((tmp_path / "t.json").read_text())
        return table, [r for r in table["values"] if r["attribute"] == "place"], table["not_judged"]

    _, rows, reasons = judged()
    assert not rows and reasons == ["place upper-right: fewer than 5 real images show it"]
    table, [row], reasons = judged(mirror="horizontal")
    assert {p.name for p in tmp_path.glob("*.safetensors")} == {                # two judges, two files
        f"real.judge-{SIDE}.safetensors", f"real.judge-{SIDE}-mirror-horizontal.safetensors"}
    assert not reasons and (table["n_train"], table["n_mirrored"], table["mirror"]) == (80, 80, "horizontal")
    assert row["n"] == 12 and row["share"] == pytest.approx(8 / 12)
    assert row["chance"] is None                            # all ask for the same
    assert row["base_rate"] == 0


def test_a_classifier_s_file_says_what_it_has_seen(tmp_path):
    rng, file = np.random.default_rng(0), tmp_path / "c.safetensors"
    real, other, fake = (write_counts(tmp_path / name, rng, np.arange(24) % 4)
                         for name in ("real", "other", "fake"))
    for flags in ({"held_out": real, "fake": other}, {"held_out": other, "fake": real}):
        with pytest.raises(BadInput, match="real: 24 of 24 images are also in .*real, which the classifier"):
            run("faithfulness", real=real, **flags, classifier=file, steps=1)
    run("faithfulness", real=real, held_out=other, fake=fake, classifier=file, steps=1)
    seen = load_safetensors(file)[1]["seen"]["count"]
    assert [seen[v] for v in ("0", "3", "4", "more")] == [6, 6, 0, 0]


@pytest.mark.parametrize("seen, why", [
    ({"0": 9, "1": 9, "2": 9}, {"2": "the judge has not seen 3"}),
    ({"1": 9, "2": 9, "3": 4}, {"1": "the judge has not seen 0", "2": "the judge has not seen 3",
                                "3": "fewer than 5 real images show it"}),
    ({"1": 9}, {"1": "fewer than 5 real images are without it"}),
])
def test_a_number_is_judged_only_between_numbers_that_were_seen(seen, why):
    rows = [classifier.truth_row({"n_polyps": int(n)}) for n, k in seen.items() for _ in range(k)]
    found = classifier.cannot_judge(torch.tensor(rows, dtype=torch.int8))
    assert {v: found[COLUMN["count", v]] for v in seen if COLUMN["count", v] in found} == why
    if "0" not in seen:                                     # who has seen nothing else calls all a polyp
        assert found[COLUMN["polyp", "a polyp"]] == "fewer than 5 real images are without it"


def test_damaged_images_have_a_row_each(toy):
    _, table = faithfulness(toy, toy / "fake")
    rows = {row.pop("held-out images"): row for row in table["degraded"]}
    assert len(rows) == 5 and all(set(row) == {"polyp", "box"} for row in rows.values())
    assert rows["as they are"]["box"] > 0.9 > rows["another image"]["box"]


def test_a_value_is_found_alone_or_among_others():
    """An image whose polyps fill every cell shows the cell asked for, and is not what the prompt asks for."""
    span = SLICE["place"]
    targets = torch.zeros(2, len(VALUES), dtype=torch.bool)
    targets[:, COLUMN["place", "center"]] = True
    predicted = targets.clone()
    predicted[1, span] = True
    assert judges.same_set(predicted, targets)[:, span].all(1).tolist() == [True, False]


def test_repeated_images_are_counted(toy):
    images, _ = data.load_images(data.read_folder(toy / "fake")[:10], SIDE)
    assert judges.repeats(images) == 0 and judges.repeats(torch.cat([images, images[:1], images[:2]])) == 3


def test_prompts_that_ask_for_nothing_are_refused(toy, tmp_path):
    (tmp_path / "images").symlink_to(toy / "fake" / "images")
    write_rows(tmp_path / "prompts.csv", [("A sunset over the sea.", "000000.png")])
    with pytest.raises(BadInput, match="asks for anything"):
        faithfulness(toy, tmp_path)


def test_a_file_of_another_kind_is_not_a_classifier(toy, tmp_path):
    file = tmp_path / "unet.safetensors"
    save_safetensors(file, {"w": torch.zeros(1)}, {"kind": "msdm"})
    with pytest.raises(BadInput, match="--classifier .*is not a classifier"):
        run("faithfulness", real=toy / "real", fake=toy / "fake", classifier=file)


@pytest.mark.parametrize("k, n, low, high",
                         [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0),
                                             (18, 20, 0.6990, 0.9721)])
def test_wilson_interval(k, n, low, high):
    assert judges.wilson(k, n) == pytest.approx((low, high), abs=1e-4)


def test_wilson_of_nothing_is_everything():
    assert judges.wilson(0, 0) == (0.0, 1.0)


def known(row, attribute):
    return dict(zip(classifier.ATTRIBUTES[attribute][1], row[SLICE[attribute]], strict=True))


def test_what_no_prompt_speaks_of_is_unknown():
    said = ("Generate an image containing a polyp.",
            "Generate an image with an an abnormality located in the center.")
    row = classifier.truth_row(classifier.merge([prompts.parse(p) for p in said]))
    assert known(row, "polyp") == {"no polyps": 0, "a polyp": 1}
    assert known(row, "place") == {c: int(c == "center") for c in prompts.CELLS}
    for attribute in ("count", "size", "box", "text", "instruments", "procedure", "colour"):
        assert set(row[SLICE[attribute]]) == {UNKNOWN}


def test_no_polyps_have_no_size():
    row = classifier.truth_row({"n_polyps": 0})
    assert known(row, "count")["0"] == 1 and set(known(row, "size").values()) == {0}
    assert set(known(row, "place").values()) == {UNKNOWN}         # another finding may be anywhere
    assert set(known(classifier.truth_row({"n_findings": 0}), "place").values()) == {0}


def test_a_drawing_tells_everything():
    polyp = {"cells": ["center", "center-left"], "size": "5-10mm", "paris": "ip", "colors": ["red"]}
    line = {"procedure": "gastroscopy", "polyps": [polyp, polyp], "instruments": [], "box": True,
            "text": False}
    row = classifier.truth_row(classifier.from_line(line))
    assert UNKNOWN not in row
    shown = {pair for pair, y in zip(VALUES, row, strict=True) if y}
    assert shown == {("polyp", "a polyp"), ("count", "2"), ("place", "center"), ("place", "center-left"),
                     ("size", "5-10mm"), ("instruments", "none"), ("box", "with"), ("text", "without"),
                     ("colour", "red"), ("paris", "ip"), ("procedure", "gastroscopy")}


@pytest.mark.parametrize("said, attribute", [
    ([{"n_polyps": 1}, {"n_polyps": 3}], "count"), ([{"n_polyps": 0}, {"contains": ["polyp"]}], "polyp"),
    ([{"n_polyps": 0}, {"sizes": ["> 20mm"]}], "count"), ([{"box": True}, {"box": False}], "box"),
    ([{"n_instruments": 0}, {"contains": ["tube"]}], "instruments")])
def test_what_prompts_contradict_is_unknown(said, attribute):
    for order in (said, said[::-1]):
        assert set(known(classifier.truth_row(classifier.merge(order)), attribute).values()) == {UNKNOWN}
    row = classifier.truth_row({"n_findings": 0, "contains": ["polyp"]})
    assert set(row) == {UNKNOWN}                            # not: no polyp anywhere, of no colour
    row = classifier.truth_row({"contains": ["tube", "polyp", "hemorrhoids"]})
    assert known(row, "instruments")["some"] == 1 and known(row, "polyp")["a polyp"] == 1


def test_unknown_labels_do_not_count_in_the_loss():
    logits = torch.randn(4, len(VALUES), requires_grad=True)
    labels = torch.full((4, len(VALUES)), UNKNOWN, dtype=torch.int8)
    labels[0, SLICE["box"]] = torch.tensor([0, 1], dtype=torch.int8)
    labels[1, SLICE["place"]] = 0
    classifier.loss_fn(logits, labels).backward()
    touched = {(i, VALUES[j][0]) for i, j in logits.grad.nonzero().tolist()}
    assert touched == {(0, "box"), (1, "place")}


@pytest.mark.parametrize("attributes, pairs", [
    ({"n_polyps": 0}, [("polyp", "no polyps")]),
    ({"n_polyps": 2}, [("count", "2")]),
    ({"contains": ["polyp"]}, [("polyp", "a polyp")]),
    ({"n_instruments": 1}, [("instruments", "some")]),
    ({"abnormality_cells": ["center", "lower-left"]}, [("place", "center"), ("place", "lower-left")]),
    ({"box": False, "text": True}, [("box", "without"), ("text", "with")]),
    ({"landmark_cells": ["center"]}, []),
    ({"contains": ["biopsy forceps"]}, [("instruments", "some")]), ({"contains": ["hemorrhoids"]}, []),
    ({"n_instruments": 0, "contains": ["tube"]}, []), ({"n_instruments": 0}, [("instruments", "none")]),
    ({"n_polyps": 0, "contains": ["polyp"]}, []), ({"n_polyps": 0, "sizes": ["< 5mm"]}, [("size", "< 5mm")]),
])
def test_requested(attributes, pairs):
    assert judges.requested(attributes) == pairs
    assert judges.requested({}) == []


def test_report_on_perfect_and_on_blind_images():
    """Two values, half of the images each: those that obey score 1, those of one value always 1/2."""
    box = SLICE["box"]
    labels = torch.full((200, len(VALUES)), UNKNOWN, dtype=torch.int8)
    labels[:, box] = torch.tensor([[1, 0], [0, 1]], dtype=torch.int8).repeat(100, 1)
    wanted = torch.zeros(200, len(VALUES), dtype=torch.bool)
    wanted[:, box] = labels[:, box] == 1
    blind = torch.zeros_like(wanted)
    blind[:, COLUMN["box", "with"]] = True
    for shown, expected in ((wanted, 1.0), (blind, 0.5)):
        rows, summary, confused, rare = judges.report(shown, wanted, labels, wanted, labels)
        assert len(rows) == 2 and len(summary) == 1 and not rare
        assert summary[0]["share"] == summary[0]["only"] == expected and summary[0]["n"] == 200
        assert [row["found"] for row in confused] == [{"with" if expected < 1 else "without": 100},
                                                      {"with": 100}]
        assert summary[0]["chance"] == summary[0]["accuracy"] / 2 == summary[0]["sensitivity"] / 2 == 0.5
    labels[4:, box] = UNKNOWN
    assert judges.report(wanted, wanted, labels, wanted, labels)[3] == [
        "box without: fewer than 5 real images show it", "box with: fewer than 5 real images show it"]


def test_chance_is_what_the_same_images_have_under_other_prompts():
    """Of 30 images, 10 a number, all show 2: right in a third, as they would be however they were dealt."""
    numbers, n = SLICE["count"], 30
    wanted = torch.zeros(n, len(VALUES), dtype=torch.bool)
    wanted[torch.arange(n), numbers.start + 1 + torch.arange(n) % 3] = True
    labels = torch.zeros(200, len(VALUES), dtype=torch.int8)
    labels[torch.arange(200), numbers.start + torch.arange(200) % 10] = 1
    for always, share, chance in ((2, 1 / 3, 1 / 3), (None, 1.0, 1 / 3), (7, 0.0, 0.0)):
        shown = wanted.clone()
        if always:
            shown[:] = False
            shown[:, numbers.start + always] = True
        [row] = judges.report(shown, wanted, labels, labels == 1, labels)[1]
        found = row["share"], row["chance"], row["base_rate"]
        assert found == pytest.approx((share, chance, 0.1))


def test_an_image_counts_once_however_many_values_its_prompt_names():
    cells = SLICE["place"]
    wanted, shown = torch.zeros(2, 10, len(VALUES), dtype=torch.bool)
    wanted[:, cells.start:cells.start + 3] = True
    shown[:5] = wanted[:5]
    labels = torch.zeros(20, len(VALUES), dtype=torch.int8)
    labels[::2, cells] = 1
    [row] = judges.report(shown, wanted, labels, labels == 1, labels)[1]
    assert row["n"] == 10 and row["share"] == 0.5
    assert (row["low"], row["high"]) == pytest.approx(judges.wilson(5, 10))


def test_what_cannot_be_tested_is_null_in_the_file(tmp_path):
    rows = [{"asked for": "ip", "share": 0.5, "sensitivity": math.nan}]
    judges.write_table(tmp_path / "table.json", {"values": rows, "n": 2})
    table = json.loads((tmp_path / "table.json").read_text(), parse_constant=pytest.fail)
    assert table == {"values": [{"asked for": "ip", "share": 0.5, "sensitivity": None}], "n": 2}
    assert math.isnan(rows[0]["sensitivity"])  # the table on the screen shows a dash


def test_evaluation_prompts_ask_for_one_value_each(tmp_path):
    judges.main(["prompts", "--out", str(tmp_path / "prompts.csv"), "--per-value", "3"])
    with open(tmp_path / "prompts.csv", encoding="utf-8", newline="") as f:
        said = [row["Prompt"] for row in csv.DictReader(f)]
    pairs = [judges.requested(prompts.parse(p)) for p in said]
    assert all(len(p) == 1 for p in pairs)
    assert len(said) == 3 * len({p[0] for p in pairs})
    some = {("polyp", "no polyps"), ("count", "3"), ("place", "lower-right"), ("size", "< 5mm"),
            ("box", "without")}
    assert some <= {p[0] for p in pairs}


def test_the_features_and_logits_do_not_depend_on_the_batch():
    torch.manual_seed(0)
    net = classifier.Classifier(SIDE).eval()
    img = torch.randint(256, (5, 3, SIDE, SIDE), dtype=torch.uint8)
    torch.testing.assert_close(net(img)[:2], net(img[:2]), rtol=1e-4, atol=1e-5)
    assert net.embed(img).shape == (5, 256) and net(img).shape == (5, len(VALUES))


# Outputs

def test_only_a_file_of_the_same_kind_is_replaced(toy, tmp_path):
    memory = {"train": toy / "real", "held_out": toy / "other", "fake": toy / "fake"}
    real = {"real": toy / "real", "fake": toy / "fake"}
    for name, content in (("x.png", b"\x89PNG\r\n"), ("x.json", b'{"kind": "msdm"}'),
                          ("x.safetensors", b""), ("x.csv", b"Prompt\nGenerate an image of my own.\n"),
                          ("rows.csv", b"Prompt;Filename\n")):
        (tmp_path / name).write_bytes(content)
    data.write_image(tmp_path / "image.png", np.zeros((4, 4, 3), np.uint8))
    (tmp_path / "link.json").symlink_to(tmp_path / "absent")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.exists()}
    for name in [*before, "link.json"]:
        for command, flags in (("memorisation", memory), ("faithfulness", real), ("usefulness", real)):
            with pytest.raises(BadInput, match="--json .*is not a result"):
                run(command, **flags, json=tmp_path / name)
        with pytest.raises(BadInput, match="--out .*is not a file of judges.py prompts"):
            judges.main(["prompts", "--out", str(tmp_path / name)])
    for name in ("x.png", "image.png"):
        with pytest.raises(BadInput, match="--sheet .*is not a sheet"):
            run("memorisation", **memory, sheet=tmp_path / name)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.exists()} == before
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake/closest.png").write_bytes(b"\x89PNG")
    (tmp_path / "fake/images").symlink_to(toy / "fake/images")
    with pytest.raises(BadInput, match="--sheet .*closest.png"):  # a default name as well
        run("memorisation", **memory | {"fake": tmp_path / "fake"})


def test_a_file_of_the_same_kind_is_replaced(tmp_path):
    for colors in (["red"], list(prompts.COLORS)):
        judges.main(["prompts", "--out", str(tmp_path / "p.csv"), "--per-value", "1", "--colors", *colors])
    pair = torch.zeros(3, SIDE, SIDE, dtype=torch.uint8)
    for name in ("a.png", "a.jpg"):
        memorisation.write_pairs(tmp_path / name, [(pair, pair)], ["ratio 1"])
        assert memorisation.is_sheet(tmp_path / name)


@pytest.mark.parametrize("flags", [("sheet", "json"), ("classifier", "json")])
def test_two_outputs_under_one_name_are_refused(toy, tmp_path, flags):
    command = "memorisation" if "sheet" in flags else "faithfulness"
    real = "train" if "sheet" in flags else "real"
    (tmp_path / "down").mkdir()
    files = zip(flags, (tmp_path / "z.png", tmp_path / "down/../z.png"), strict=True)
    with pytest.raises(BadInput, match=f"--{flags[0]} and --{flags[1]} both name"):
        run(command, **{real: toy / "real"}, fake=toy / "fake", **dict(files))
    assert not (tmp_path / "z.png").exists()


def test_a_named_classifier_of_something_else_stays_and_a_default_one_is_replaced(toy, tmp_path, capsys):
    flags = {"real": toy / "real", "fake": toy / "fake", "held_out": toy / "other", "steps": 1}
    file = tmp_path / "c.safetensors"
    run("faithfulness", classifier=file, **flags)
    before = file.read_bytes()
    with pytest.raises(BadInput, match="1 steps, seed 0.*needs one of .* 1 steps, seed 6.*another file"):
        run("faithfulness", classifier=file, seed=6, **flags)
    assert file.read_bytes() == before
    run("faithfulness", seed=7, **flags)
    capsys.readouterr()
    run("faithfulness", seed=8, **flags)
    assert "1 steps, seed 7" in (said := capsys.readouterr().err) and "replaced by" in said


def test_images_in_subfolders_are_mentioned(toy, tmp_path, capsys):
    data.write_image(tmp_path / "images/a/b/x.png", np.zeros((4, 4, 3), np.uint8))
    data.write_image(tmp_path / "images/.cache/x.png", np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(BadInput, match="holds no images"):
        run("memorisation", train=tmp_path, fake=toy / "fake")
    assert capsys.readouterr().err == f"{tmp_path / 'images'}: 1 image in subfolders not read\n"


# Usefulness

def test_true_images_are_as_useful_as_real_ones(toy, tmp_path):
    run("usefulness", real=toy / "real", held_out=toy / "other", fake=toy / "fake",
        json=tmp_path / "table.json")
    table = json.loads((tmp_path / "table.json").read_text())
    rows = {row["attribute"]: row for row in table["attributes"]}
    assert set(rows) == {"polyp", "box"} and table["n_train"] == 100
    assert all(row[name] > 0.8 for row in rows.values()
               for name in ("real-train", "GAN-train", "real-test", "GAN-test"))


def test_balanced_accuracy():
    box = SLICE["box"]
    labels = torch.full((6, len(VALUES)), UNKNOWN, dtype=torch.int8)
    labels[:, box] = torch.tensor([[1, 0]] * 4 + [[0, 1]] * 2, dtype=torch.int8)
    right, always = labels == 1, torch.zeros(6, len(VALUES), dtype=torch.bool)
    always[:, COLUMN["box", "without"]] = True
    fit = torch.ones(len(VALUES), dtype=torch.bool)
    [row] = judges.balanced_rows(fit, {"right": (right, labels), "always": (always, labels)})
    assert row == {"attribute": "box", "n_values": 2, "right": 1.0, "always": 0.5}


# Memorisation

@pytest.fixture(scope="module")
def copies(toy):
    """Altered copies of training images, as a folder of generated ones."""
    images, train = data.load_images(data.read_folder(toy / "real")[:60], SIDE)
    altered = classifier.augment(images, torch.Generator().manual_seed(7)).round().clamp(0, 255).byte()
    for img, record in zip(altered, train, strict=True):
        data.write_image(toy / "copies" / "images" / record.name, img.permute(1, 2, 0).numpy())
    write_rows(toy / "copies" / "prompts.csv", [(r.prompts[0], r.name) for r in train])
    return toy / "copies"


def remembered(toy, fake, expect=None, **more):
    status = run("memorisation", train=toy / "real", held_out=toy / "other", fake=fake,
                 sheet=toy / "sheet.png", json=toy / "memory.json", **more)
    assert expect in (None, status)
    return json.loads((toy / "memory.json").read_text())


def test_copies_are_flagged_and_other_images_are_not(toy, copies, capsys):
    found = remembered(toy, copies)
    assert found["flagged"] and found["rows"][0]["too close"] > 0.5
    assert all(p["generated"] == p["training"] for p in found["pairs"][:5])
    assert "COPIES" in capsys.readouterr().out
    assert Image.open(toy / "sheet.png").size[0] > 4 * 2 * 128
    honest = remembered(toy, toy / "fake", expect=0)
    assert not honest["copies"] and not honest["held_out_near_duplicates"]
    assert not honest["flagged"] and honest["rows"][0]["authentic"] > found["rows"][0]["authentic"]


def test_a_few_copies_among_many_are_named(toy, copies):
    mixed = toy / "mixed" / "images"
    for i, record in enumerate(data.read_folder(toy / "fake")):
        data.write_image(mixed / f"{i:03d}.png", data.open_image(record.path))
    for name in sorted(p.name for p in (copies / "images").iterdir())[:6]:
        data.write_image(mixed / f"copy-{name}", data.open_image(copies / "images" / name))
    found = remembered(toy, toy / "mixed")  # a folder without captions will do
    assert found["verdict"].startswith("COPIES: ") and len(found["copies"]) >= 5
    assert all(c["image"] == f"copy-{c['training']}" for c in found["copies"])


CHANGES = {"as it is": lambda img: img, "mirrored": ImageOps.mirror,
           "mirrored, turned by 90": lambda img: ImageOps.mirror(img.rotate(90)),
           "turned by 180": lambda img: img.rotate(180),
           "shifted": lambda img: ImageChops.offset(img, 3, -2),
           "recoloured": lambda img: Image.merge("RGB", [c.point(lambda v, k=k: v * k + 12) for c, k in
                                                        zip(img.split(), (0.7, 0.9, 0.8), strict=True)]),
           "a JPEG": lambda img: img}


@pytest.mark.parametrize("change", CHANGES)
def test_a_training_image_among_the_generated_is_a_copy(toy, tmp_path, capsys, change):
    (tmp_path / "fake").mkdir()
    for record in data.read_folder(toy / "fake")[:29]:
        (tmp_path / "fake" / record.name).write_bytes(record.path.read_bytes())
    original = data.read_folder(toy / "real")[7]
    copy = tmp_path / "fake" / ("copy.jpg" if change == "a JPEG" else "copy.png")
    CHANGES[change](data.open_image(original.path)).save(copy, quality=90)
    found = remembered(toy, tmp_path / "fake", expect=1)
    assert found["flagged"] and found["verdict"] == "COPIES: 1 of 30 generated images is a training image"
    [named] = found["copies"]
    assert (named["image"], named["training"]) == (copy.name, original.name)
    assert named["form"] == (change if "turned" in change or "mirrored" in change else "as it is")
    assert named["shift"] == ([4, -6] if change == "shifted" else [0, 0])  # in 64ths: the images have 32 px
    assert f"{copy.name}: {original.name} {named['form']}" in capsys.readouterr().out


@pytest.mark.parametrize("captions", [None, "some.csv"])
def test_what_a_training_saw_is_divided_as_the_training_divides_it(toy, tmp_path, capsys, captions):
    records = data.read_folder(toy / "real")
    (tmp_path / "images").symlink_to(toy / "real/images")
    file = tmp_path / (captions or "prompt-gt.csv")
    write_rows(tmp_path / "prompt-gt.csv", [(r.prompts[0], r.name) for r in records])
    write_rows(file, [(r.prompts[0], r.name) for r in records[::2]])
    train, held_out = memorisation.as_in_training(tmp_path, captions and file)
    assert [r.name for r in held_out] == [r.name for r in data.split(data.read_folder(tmp_path, file))[1]]
    assert {r.name for r in train} == {r.name for r in records} - {r.name for r in held_out}
    assert f"{tmp_path}: 120 of 240 images have no prompt; they count as" in capsys.readouterr().err
    with pytest.raises(BadInput, match="--captions .*give one"):
        run("memorisation", train=tmp_path, held_out=toy / "other", fake=toy / "fake", captions=file)


@pytest.mark.parametrize("name, said", [("labels.csv", False), ("images/x", True), ("metadata.jsonl", False)])
def test_without_captions_all_images_are_divided(toy, tmp_path, capsys, name, said):
    place = tmp_path / "images" if said else tmp_path
    place.mkdir(exist_ok=True)
    for record in data.read_folder(toy / "real")[:40]:
        shutil.copy(record.path, place)
    (tmp_path / "labels.csv").write_text("id,age\n1,60\n")
    (tmp_path / name).write_text("x")
    train, held_out = memorisation.as_in_training(tmp_path)
    assert (len(train), len(held_out)) == (36, 4)
    assert ("are divided, with a prompt or without: " in capsys.readouterr().err) == said


def test_links_to_nowhere_are_unreadable_images(toy, tmp_path):
    shutil.copytree(toy / "real", tmp_path / "real")
    for i in range(20):
        (tmp_path / f"real/images/{i:06d}.png").unlink()
        (tmp_path / f"real/images/{i:06d}.png").symlink_to(tmp_path / "moved" / f"{i}.png")
    with pytest.raises(BadInput, match="20 of 240 images"):
        run("memorisation", train=tmp_path / "real", held_out=toy / "other", fake=toy / "fake")


def test_near_duplicates_that_are_held_out_are_counted_apart(toy):
    images, _ = data.load_images(data.read_folder(toy / "real")[:60], SIDE)
    again = [images[3], images[4].flip(-1), images[5].roll((1, 1), (1, 2))]
    held_out = torch.stack([*images[40:], *again])
    limit, frames, alarms, n = memorisation.copy_limit(held_out, images[:40], "cpu")
    assert frames == [20, 21, 22] and (alarms, n) == (0, 10) and 0.4 < limit <= memorisation.COPY


def test_false_alarms_are_of_images_that_did_not_set_the_limit(monkeypatch):
    residual = torch.tensor([1.0, 0.5, 0.9, 0.95])          # 0.5: another scene, nearer than the others
    monkeypatch.setattr(memorisation.copies, "closest", lambda *_: (residual, torch.zeros(4, dtype=int)))
    images = torch.randint(256, (4, 3, SIDE, SIDE), dtype=torch.uint8)
    for seed in range(4):
        limit, frames, alarms, n = memorisation.copy_limit(images, images[3:], "cpu", seed)
        is_tested = 1 in memorisation.halves(4, seed)[1]
        assert not frames and limit == pytest.approx(0.4) and (alarms, n) == (is_tested, 2)


def test_images_of_the_same_kind_are_seldom_suspicious():
    """Generated and held-out ones at the same distances: the test errs in 5 %, whatever their numbers."""
    generator = torch.Generator().manual_seed(0)
    for n_held_out, n in ((40, 2000), (170, 200)):
        said = []
        for _ in range(200):
            found = {name: (torch.rand(k, generator=generator), torch.randint(50, (k,), generator=generator))
                     for name, k in (("generated", n), ("held-out real", n_held_out))}
            found["altered copies"] = torch.zeros(200), torch.zeros(200, dtype=int)
            rows, *_ = memorisation.rows_of(found, torch.ones(50))
            said.append(memorisation.verdict(*rows, 0).split(":")[0])
        assert said.count("SUSPICIOUS") + said.count("COPIES") < 0.1 * len(said), (n, said)


def test_images_nearer_than_held_out_ones_are_suspicious():
    rows = [{"n": 100, "too close": share, "low": low, "high": high} for share, low, high in
            ((0.1, 0.055, 0.174), (0.0, 0.0, 0.07), (1.0, 0.98, 1.0))]
    assert memorisation.verdict(*rows, 0).startswith("SUSPICIOUS: more generated images are too close than")
    rows[1]["high"] = 0.05
    assert memorisation.verdict(*rows, 0).startswith("COPIES: more")
    few = {"n": 5, "too close": 0.2, "low": 0.036, "high": 0.62}, {"n": 1000, "too close": 0.02,
                                                                  "low": 0.013, "high": 0.031}
    assert not memorisation.verdict(*few, rows[2], 0).startswith("COPIES")  # Fisher's p is 0.1
    rows[0] |= {"too close": 0.03, "low": 0.01, "high": 0.085}
    assert memorisation.verdict(*rows, 0).startswith("no sign of copying")


@pytest.mark.parametrize("n", [1, 19])
def test_few_images_cannot_tell(toy, tmp_path, n):
    (tmp_path / "fake").mkdir()
    for record in data.read_folder(toy / "fake")[10:10 + n]:
        (tmp_path / "fake" / record.name).write_bytes(record.path.read_bytes())
    found = remembered(toy, tmp_path / "fake")
    assert found["verdict"].startswith(f"cannot tell: {n} image") and not found["flagged"]


@pytest.mark.parametrize("command", ["faithfulness", "usefulness", "memorisation"])
def test_generated_images_that_are_held_out_are_refused(toy, tmp_path, command):
    for record in data.read_folder(toy / "other"):          # the same pixels, other bytes
        (tmp_path / "images").mkdir(exist_ok=True)
        data.open_image(record.path).save(tmp_path / "images" / record.name, compress_level=1)
    (tmp_path / "prompt-gt.csv").write_bytes((toy / "other/prompt-gt.csv").read_bytes())
    real = "train" if command == "memorisation" else "real"
    with pytest.raises(BadInput, match="100 of 100 images are also in .*other, which is held out; exp"):
        run(command, **{real: toy / "real"}, held_out=toy / "other", fake=tmp_path)


def test_held_out_images_that_show_training_images_are_refused(toy, tmp_path):
    (tmp_path / "images").mkdir()
    for record in data.read_folder(toy / "real")[:40]:
        ImageOps.mirror(data.open_image(record.path)).save(tmp_path / "images" / record.name)
    with pytest.raises(BadInput, match="40 of 40 held-out images show what a training image does, as 000000"):
        run("memorisation", train=toy / "real", held_out=tmp_path, fake=toy / "fake")


def test_held_out_images_that_were_trained_on_are_refused(toy):
    with pytest.raises(BadInput, match="the same"):
        run("memorisation", train=toy / "real", held_out=toy / "real", fake=toy / "fake")


def test_inception_features_can_stand_in(toy, copies, monkeypatch):
    class Inception(torch.nn.Module):
        source = "rule"

        def forward(self, img):
            return {"2048": torch.nn.functional.avg_pool2d(img.float(), 4).flatten(1)}

    monkeypatch.setattr(memorisation, "Inception", lambda weights: Inception())
    found = remembered(toy, copies, weights="rule")
    assert "rule" in found["features"] and math.isfinite(found["near"])


def test_features_without_power_say_so(toy, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    monkeypatch.setattr(memorisation, "thumbnails", lambda img: torch.rand(len(img), 4, generator=generator))
    found = remembered(toy, toy / "fake")
    assert not found["flagged"] and "cannot tell" in found["verdict"]


def test_nearest():
    a, b = torch.randn(50, 8), torch.randn(70, 8)
    d, i = memorisation.nearest(a, b, chunk=16)
    expected = torch.cdist(a.double(), b.double()).min(1)
    assert torch.equal(i, expected.indices)
    torch.testing.assert_close(d, expected.values.float())
    d, i = memorisation.nearest(a, a, chunk=16)
    assert (d == 0).all() and torch.equal(i, torch.arange(50))
    d, i = memorisation.nearest(a, a, skip_self=True, chunk=16)
    assert (d > 0).all() and (i != torch.arange(50)).all()


def test_the_table_comes_where_the_classifier_cannot_be_kept(toy, capsys, monkeypatch):
    def refuse(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(classifier, "save_safetensors", refuse)
    run("faithfulness", real=toy / "real", fake=toy / "fake", held_out=toy / "other", steps=1, seed=5)
    said = capsys.readouterr()
    assert "asked for" in said.out and "name another file with --classifier" in said.err


def test_a_classifier_of_nan_is_refused(toy, tmp_path):
    flags = {"real": toy / "real", "fake": toy / "fake", "held_out": toy / "other", "steps": 1}
    run("faithfulness", classifier=tmp_path / "c.safetensors", **flags)
    tensors, metadata = load_safetensors(tmp_path / "c.safetensors")
    tensors["out.bias"][0] = torch.nan
    save_safetensors(tmp_path / "c.safetensors", tensors, metadata)
    with pytest.raises(BadInput, match="c.safetensors: NaN or infinite weights .*out.bias"):
        run("faithfulness", classifier=tmp_path / "c.safetensors", **flags)


def test_places_that_cannot_be_written_are_refused_at_once(toy, tmp_path):
    (tmp_path / "file").touch()
    for flag in ("json", "sheet"):
        with pytest.raises(BadInput, match=f"--{flag} .*cannot be written"):
            run("memorisation", train=tmp_path / "absent", fake=toy / "fake",
                **{flag: tmp_path / "file" / "x.png"})


def test_the_sheet_is_no_image_of_a_plain_folder(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    assert memorisation.default_sheet(tmp_path) == tmp_path / "closest.png"
    assert memorisation.default_sheet(tmp_path / "images") == tmp_path / "images-closest.png"
    monkeypatch.chdir(tmp_path / "images")
    assert memorisation.default_sheet(Path()) == tmp_path / "images-closest.png"


def test_more_pairs_than_a_jpeg_holds_are_cut_and_prompts_in_a_txt_file_refused(toy, tmp_path):
    memorisation.write_pairs(tmp_path / "s.jpg", [(torch.zeros(3, 8, 8).byte(),) * 2] * 2000, ["x"] * 2000)
    with Image.open(tmp_path / "s.jpg") as img:
        assert img.height == 6 + memorisation.MOST_SHOWN / 4 * (128 + 14 + 6)
    with pytest.raises(BadInput, match="--out .*p.txt: a .txt is read as one prompt a line"):
        judges.main(["prompts", "--out", str(tmp_path / "p.txt")])


def test_a_strange_size_is_refused(toy):
    with pytest.raises(BadInput, match="--size"):
        run("usefulness", real=toy / "real", fake=toy / "fake", size=50)


@pytest.mark.parametrize("row", ['{"polyps": ' + "9" * 10_000 + "}", "[" * 100_000, "{", "[]"])
def test_a_row_of_attributes_that_cannot_be_used_is_one_line(tmp_path, row):
    (tmp_path / "attributes.jsonl").write_text("\n" + row + "\n")
    with pytest.raises(BadInput, match="attributes.jsonl, row 2: "):
        classifier.read_attributes(tmp_path)


@pytest.mark.parametrize("key, wrong, said", [
    ("file_name", "a.png", "a.png stands there twice"),
    ("box", "yes", "box 'yes', expected False, True"), ("box", [True], "box [True], expected False, True"),
    ("procedure", "Colonoscopy", "procedure 'Colonoscopy', expected colonoscopy, gastroscopy"),
    ("cells", ["Center"], "abnormality_cells 'Center', expected upper-left, "),
    ("size", "5-10 mm", "sizes '5-10 mm', expected < 5mm, "), ("size", None, "sizes None, expected"),
    ("colors", ["rosa"], "colors 'rosa', expected pink, "), ("paris", "Is", "paris 'Is', expected is, ")])
def test_attributes_that_contradict_or_are_no_values_are_refused(tmp_path, key, wrong, said):
    polyp = {"cells": ["center"], "size": "5-10mm", "paris": "is", "colors": ["pink"]}
    line = {"file_name": "b.png", "procedure": "colonoscopy", "polyps": [polyp], "instruments": [],
            "box": False, "text": True}
    other = line | ({"polyps": [polyp | {key: wrong}]} if key in polyp else {key: wrong})
    path = tmp_path / "attributes.jsonl"
    path.write_text("\n".join(map(json.dumps, (line | {"file_name": "a.png", "text": None}, line))))
    assert list(classifier.read_attributes(tmp_path)) == ["a.png", "b.png"]
    path.write_text("\n".join(map(json.dumps, (line | {"file_name": "a.png"}, other))))
    with pytest.raises(BadInput, match=f"attributes.jsonl, row 2: {re.escape(said)}"):
        classifier.read_attributes(tmp_path)
