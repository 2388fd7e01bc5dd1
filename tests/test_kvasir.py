"""kvasir.py: prompts that are true by the mask, by the answers, by the class, on folders drawn here and on
the real images."""

from command import BadInput

import json
import os

import numpy as np
import pytest
from helpers import KVASIR, image, real_images
from PIL import Image

import data
import kvasir
import prompts


def disc(mask, x, y, r):
    rows, columns = np.ogrid[:mask.shape[0], :mask.shape[1]]
    mask[(columns - x) ** 2 + (rows - y) ** 2 <= r * r] = True


def test_polyps_and_their_cells():
    mask = np.zeros((300, 300), bool)
    assert kvasir.polyps_in(mask) == []
    disc(mask, 50, 50, 30)
    disc(mask, 200, 150, 40)                   # on the border between center and center-right
    mask[290:294, 290:294] = True              # a speck: 0.02 % of the image
    assert kvasir.polyps_in(mask) == [["upper-left"], ["center", "center-right"]]
    mask[:] = True
    assert kvasir.polyps_in(mask) == [list(prompts.CELLS)]     # a ninth each: below 20 %, all are fullest


def scene(box=None):
    """A bright octagon on black with, where asked, a box in its lower left."""
    x = np.zeros((300, 360, 3), np.uint8)
    rows, columns = np.mgrid[:300, :360]
    edge = np.minimum(np.minimum(rows, 299 - rows) + np.minimum(columns, 359 - columns) - 70, 1000)
    x[(edge > 0) & (rows > 8) & (rows < 292)] = (190, 110, 90)
    if box is not None:
        x[200:, :120] = 0
        x[215:285, 20:110] = box
    return Image.fromarray(x)


def test_box_is_seen_black_or_green_and_only_there():
    assert not kvasir.has_box(scene()) and kvasir.has_box(scene((0, 0, 0))) and kvasir.has_box(scene((40, 190,
                                                                                                      160)))
    assert not kvasir.has_box(scene((0, 0, 0)).transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    assert not kvasir.has_box(Image.new("RGB", (64, 64))) and not kvasir.has_box(Image.new("RGB", (64, 64),
                                                                                           (190, 110, 90)))
    for dye in ((60, 90, 130), (70, 110, 150), (80, 120, 110)):
        assert not kvasir.has_box(Image.new("RGB", (64, 64), dye)), dye


def kvasir_folder(folder):
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for name, discs, box in (("one", [(60, 60, 30)], None),
                             ("two", [(60, 60, 30), (300, 150, 40)], (0, 0, 0)),
                             ("none", [], None)):
        mask = np.zeros((300, 360), bool)
        for d in discs:
            disc(mask, *d)
        scene(box).save(folder / "images" / f"{name}.jpg")
        Image.fromarray(mask).convert("RGB").save(folder / "masks" / f"{name}.jpg", quality=80)
    return folder


def test_kvasir_prompts_are_true_by_the_mask(tmp_path):
    src, out = kvasir_folder(tmp_path / "src"), tmp_path / "out"
    assert kvasir.main(["seg", "--src", str(src), "--out", str(out)]) is None
    records = {r.path.stem: [prompts.parse(p) for p in r.prompts] for r in data.read_folder(out)}
    common = {"procedure": "colonoscopy"}
    assert records["one"] == [{"contains": ["polyp"]}, {"n_polyps": 1}, {"n_findings": 1}, common,
                              {"box": False},
                              {"abnormality_cells": ["upper-left"]}]
    assert records["two"] == [{"contains": ["polyp"]}, {"n_polyps": 2}, {"n_findings": 2}, common,
                              {"box": True},
                              {"abnormality_cells": ["upper-left", "center-right"]}]
    assert records["none"] == [{"n_polyps": 0}, {"n_findings": 0}, common, {"box": False}]
    for path in data.list_images(src):
        assert (out / "images" / path.name).read_bytes() == path.read_bytes()
    assert data.main(["check", "--data", str(out)]) == 0
    before = (out / "prompt-gt.csv").read_bytes()
    kvasir.main(["seg", "--src", str(src), "--out", str(out)])
    assert (out / "prompt-gt.csv").read_bytes() == before


def test_kvasir_refuses_before_it_writes(tmp_path):
    src, out = kvasir_folder(tmp_path / "src"), tmp_path / "out"
    command = ["seg", "--src", str(src), "--out", str(out)]
    (src / "masks" / "one.jpg").rename(tmp_path / "mask")
    with pytest.raises(BadInput, match="no mask for 1 of 3 images one.jpg"):
        kvasir.main(command)
    Image.new("RGB", (5, 5)).save(src / "masks" / "one.jpg")
    with pytest.raises(BadInput, match="expected the size of its image"):
        kvasir.main(command)
    (src / "masks" / "one.jpg").write_bytes(b"")
    with pytest.raises(BadInput, match="one.jpg: the file is empty"):
        kvasir.main(command)
    assert not out.exists()
    with pytest.raises(BadInput, match="another folder"):
        kvasir.main([*command[:-1], str(src)])
    (tmp_path / "mask").rename(src / "masks" / "one.jpg")
    (out / "images").mkdir(parents=True)
    image().save(out / "images" / "stranger.png")
    with pytest.raises(BadInput, match="1 images that are not from"):
        kvasir.main(command)
    assert [p.name for p in out.rglob("*.*")] == ["stranger.png"]
    own = next(src.glob("images/*"))
    (out / "images/stranger.png").replace(out / "images" / own.name)  # another image under the same name
    with pytest.raises(BadInput, match=f"1 images that are not from .*, for example {own.name}"):
        kvasir.main(command)
    (out / "images" / own.name).unlink()
    (out / "prompt-gt.csv").write_text("my;notes")
    with pytest.raises(BadInput, match="holds prompt-gt.csv of other images"):
        kvasir.main(command)
    assert (out / "prompt-gt.csv").read_text() == "my;notes"


@pytest.mark.parametrize("values", [(0, 1), (0, 255), (0, 200), ((0, 0, 0), (255, 0, 0)),
                                    ((0, 0, 0), (0, 90, 0))])
def test_masks_of_any_value_show_the_polyp(tmp_path, values):
    src = kvasir_folder(tmp_path / "src")
    found = kvasir.true_prompts(src / "images" / "one.jpg", src / "masks" / "one.jpg")
    mask = np.zeros((300, 360), bool)
    disc(mask, 60, 60, 30)
    Image.fromarray(np.uint8(values)[mask.astype(int)]).save(tmp_path / "mask.png")
    assert kvasir.true_prompts(src / "images" / "one.jpg", tmp_path / "mask.png") == found


def test_an_inverted_mask_and_two_masks_of_one_image_are_refused(tmp_path):
    src, out = kvasir_folder(tmp_path / "src"), tmp_path / "out"
    command, mask = ["seg", "--src", str(src), "--out", str(out)], src / "masks" / "none.jpg"
    Image.new("L", (360, 300), 255).save(mask)
    with pytest.raises(BadInput, match="none.jpg: white in 100% of its pixels .* is it inverted"):
        kvasir.main(command)
    polyp = np.zeros((300, 360), bool)
    disc(polyp, 180, 150, 90)                               # a quarter of the image
    Image.fromarray(np.uint8(polyp) * 255).save(mask)
    kvasir.main(command)
    Image.fromarray(np.uint8(~polyp) * 255).save(mask)
    with pytest.raises(BadInput, match="white in 76% of its pixels and 4 of 4 corners; .* inverted"):
        kvasir.main(command)
    Image.new("L", (360, 300)).save(mask.with_suffix(".png"))
    with pytest.raises(BadInput, match="none.* and none.* are masks of one image; keep one"):
        kvasir.main(command)


@pytest.mark.parametrize("values, shown", [((0, 1, 2), "0, 1, 2"), ((0, 1, 255), "0, 1, 255"),
                                           ((0, 128, 255), "0, 128, 255"), ((40, 200, 200), "40, 200")])
def test_masks_of_several_values_are_refused_by_name(tmp_path, values, shown):
    src, out = kvasir_folder(tmp_path / "src"), tmp_path / "out"
    parts = np.zeros((300, 360), int)
    parts[20:80, 20:80], parts[150:200, 200:300] = 1, 2
    (src / "masks" / "one.jpg").unlink()
    Image.fromarray(np.uint8(values)[parts]).save(src / "masks" / "one.png")
    with pytest.raises(BadInput, match=f"one.png: expected a mask of black .* got greys {shown}$"):
        kvasir.main(["seg", "--src", str(src), "--out", str(out)])
    Image.effect_noise((360, 300), 40).save(src / "masks" / "one.png")
    with pytest.raises(BadInput, match="one.png: expected a mask of black and one other"):
        kvasir.main(["seg", "--src", str(src), "--out", str(out)])
    assert not out.exists()


@pytest.mark.parametrize("turn", [3, 6])
def test_an_image_turned_without_its_mask_is_refused(tmp_path, turn):
    src, out = kvasir_folder(tmp_path / "src"), tmp_path / "out"
    exif = Image.Exif()
    exif[0x112] = turn
    scene().save(src / "images" / "one.jpg", exif=exif)
    with pytest.raises(BadInput, match=f"one.jpg: expected the EXIF orientation of its image, {turn}, got 1"):
        kvasir.main(["seg", "--src", str(src), "--out", str(out)])
    assert not out.exists()
    with Image.open(src / "masks" / "one.jpg") as mask:
        mask.load()
        mask.save(src / "masks" / "one.jpg", exif=exif)
    kvasir.main(["seg", "--src", str(src), "--out", str(out)])
    cell = {3: "lower-right", 6: "upper-right"}[turn]
    assert {"abnormality_cells": [cell]} in [prompts.parse(p) for p in data.read_folder(out)[1].prompts]


@real_images
def test_real_masks():
    for name, polyps, box in (("cju414lf2l1lt0801rl3hjllj", 4, None),      # four components
                              ("cju15jr8jz8sb0855ukmkswkz", 1, None),      # one and a speck
                              ("cju16fpvhzypl0799p9phnlx6", 1, True),      # black box
                              ("ck2bxqz3evvg20794iiyv5v2m", 1, True),      # green box
                              ("cju3uhb79gcgr0871orbrbi3x", 10, None),
                              ("cju0tl3uz8blh0993wxvn7ly3", 1, False)):
        found = {}
        for prompt in kvasir.true_prompts(KVASIR / "images" / f"{name}.jpg",
                                          KVASIR / "masks" / f"{name}.jpg"):
            found |= prompts.parse(prompt)
        assert found["n_polyps"] == found["n_findings"] == polyps and found["abnormality_cells"], name
        assert box is None or found["box"] == box, name


# Kvasir-VQA and HyperKvasir, in the layouts that are published

PLACES = "Where in the image is the abnormality?"
COLOR = "What color is the abnormality? If more than one separate with ;"
ROWS = [  # of one image: question, answer, the attributes that its prompt says
    ("How many polyps are in the image?", "2", {"n_polyps": 2}),
    ("How many findings are present?", "0", {"n_findings": 0}),
    ("How many instrumnets are in the image?", "0", {"n_instruments": 0}),
    (PLACES, "center; center-left", {"abnormality_cells": ["center", "center-left"]}),
    ("Where in the image is the instrument?", "none", None),
    ("Where in the image is the anatomical landmark?", "lower-right;", {"landmark_cells": ["lower-right"]}),
    (COLOR, "pale pink; red; flesh", {"colors": ["pink", "red"]}),
    ("What is the size of the polyp?", "<5mm; 11-20mm", {"sizes": ["< 5mm", "11-20mm"]}),
    ("What type of polyp is present?", "paris iia", {"paris": ["iia"]}),
    ("What type of procedure is the image taken from?", "Colonoscopy", {"procedure": "colonoscopy"}),
    ("Is there text?", "yes", {"text": True}),
    ("Is there a green/black box artefact?", "no", {"box": False}),
    ("Are there any abnormalities in the image? Check all that are present.", "polyp; hemorrhoids",
     {"contains": ["polyp", "hemorrhoids"]}),
    ("Are there any instruments in the image? Check all that are present.", "biopsy forceps; tube",
     {"contains": ["biopsy forceps", "tube"]}),
    ("Are there any anatomical landmarks in the image? Check all that are present.", "z-line",
     {"contains": ["z-line"]}),
    ("What color is the anatomical landmark? If more than one separate with ;", "pink", None),
    ("Does this image contain any finding?", "no", {"n_findings": 0}),
    ("Have all polyps been removed?", "not relevant", None), ("Is this finding easy to detect?", "yes", None),
    ("What day is it?", "tuesday", None),
]


def vqa_folder(folder, rows, names=("a", "b"), table="metadata.csv"):
    """rows: (source, question, answer, img_id)."""
    (folder / "images").mkdir(parents=True)
    for i, name in enumerate(names):
        image(i).save(folder / "images" / f"{name}.jpg")
    columns = ("source", "question", "answer", "img_id")
    if table.endswith(".jsonl"):
        text = "".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows)
    else:
        text = "\n".join(",".join(row) for row in [columns, *rows]) + "\n"
    (folder / table).write_text(text)
    return folder


@pytest.mark.parametrize("table", ["metadata.csv", "answers.jsonl"])
def test_answers_become_the_tasks_own_sentences(tmp_path, capsys, table):
    rows = [("HyperKvasir", question, answer, "a") for question, answer, _ in ROWS]
    src, out = vqa_folder(tmp_path / "src", [*rows, ("x", "Is there text?", "no", "gone")],
                          table=table), tmp_path / "out"
    kvasir.main(["vqa", "--src", str(src), "--out", str(out)])
    (record,) = data.read_folder(out)
    wanted = [attributes for _, _, attributes in ROWS if attributes]
    assert record.name == "a.jpg" and len(set(record.prompts)) == len(record.prompts) == len(wanted) - 1
    assert all(prompts.parse(prompt) in wanted for prompt in record.prompts)
    assert all(attributes in [prompts.parse(prompt) for prompt in record.prompts] for attributes in wanted)
    assert record.prompts[1] == "Generate an image containing biopsy forcepsandtube."
    assert (out / "images" / "a.jpg").read_bytes() == (src / "images" / "a.jpg").read_bytes()
    said = capsys.readouterr().out
    for line in ("1 images, 14 prompts", "1 parts of answers outside the grammar: colors: flesh",
                 "3 answers to questions that the grammar has no sentence for",
                 "1 rows without their image: gone", "1 answers to questions that are not known: What day",
                 "CC BY-NC 4.0; cite Gautam",
                 "1 images that no row or caption gives a prompt: b.jpg"):
        assert line in said, line


def test_contradicting_answers_make_no_prompt(tmp_path, capsys):
    rows = [("x", question, answer, name) for question, answer, name in (
        ("How many polyps are in the image?", "2", "a"), ("How many polyps are in the image?", "3", "a"),
        ("How many findings are present?", "1", "b"), ("Does this image contain any finding?", "no", "b"),
        ("What type of procedure is the image taken from?", "colonoscopy; gastroscopy", "b"),
        ("Is there text?", "no", "a"), ("Is there text?", "no", "a"), (PLACES, "center", "b"),
        (PLACES, "center; upper-left", "b"), (COLOR, "red", "b"), (COLOR, "red", "b"))]
    kvasir.main(["vqa", "--src", str(vqa_folder(tmp_path / "src", rows)), "--out", str(tmp_path / "out")])
    assert [[prompts.parse(p) for p in r.prompts] for r in data.read_folder(tmp_path / "out")] == [
        [{"text": False}], [{"colors": ["red"]}]]
    assert "8 answers that contradict each other" in capsys.readouterr().out


def test_captions_of_2025_become_prompts(tmp_path, capsys):
    src = vqa_folder(tmp_path / "src", [("x", "Is there text?", "no", "a")])
    (tmp_path / "captions.json").write_text(json.dumps({
        "a": {"Is there text?": ["no text; none at all", "No  letters.\n"], "Other?": ["No letters.", " "]},
        "b": {"Is there text?": ["Some text is seen."]}, "gone": {"Is there text?": ["x", "y"]}}))
    kvasir.main(["vqa", "--src", str(src), "--out", str(tmp_path / "out"), "--captions",
                 str(tmp_path / "captions.json")])
    assert [r.prompts for r in data.read_folder(tmp_path / "out")] == [
        ["Generate an image not containing text.", "no text; none at all", "No letters."],
        ["Some text is seen."]]
    said = capsys.readouterr().out
    assert "2 captions without their image: gone (2)" in said
    assert "1 captions that cannot be used: a: " in said


HEAD = "img_id,question,answer\n"


@pytest.mark.parametrize("break_it, message", [
    (lambda src: (src / "metadata.csv").write_text("img_id,question\na,b\n"), "expected a column answer"),
    (lambda src: (src / "metadata.csv").unlink(), "expected metadata.csv .* found no table"),
    (lambda src: (src / "metadata.csv").write_text(HEAD + "z,Is there text?,no\n"), "no row names"),
    (lambda src: (src / "metadata.csv").write_text(HEAD + "a,Why?,so\n"),
     r"no answer makes a prompt \(1 answers to questions that are not known, the first is 'Why\?'\)"),
    (lambda src: (src / "metadata.csv").write_text(HEAD + "a,How many polyps are in the image?,many\n"),
     r"\(1 parts of answers outside the grammar, the first is 'n_polyps: many'\)"),
    (lambda src: (src / "images").rename(src / "pictures"), "holds no folder images/"),
    (lambda src: (src / "metadata.csv").rename(src / "t.jsonl"), "t.jsonl, row 1: not JSON"),
    (lambda src: (src / "c.json").write_text('{"a": ["red"]}'), "c.json, 'a': expected {img_id"),
    (lambda src: (src / "c.json").write_text('{"a": {"b": [1]}}'), "c.json, 'a', 'b': expected {img_id"),
    (lambda src: (src / "c.json").write_text('{"a": {}, "a": 1}'), "c.json: .*'a' stands there twice"),
])
def test_vqa_refuses_before_it_writes(tmp_path, break_it, message):
    src, out = vqa_folder(tmp_path / "src", [("x", "Is there text?", "no", "a")]), tmp_path / "out"
    break_it(src)
    captions = ["--captions", str(src / "c.json")] if (src / "c.json").exists() else []
    with pytest.raises(BadInput, match=message):
        kvasir.main(["vqa", "--src", str(src), "--out", str(out), *captions])
    assert not out.exists()


def hyper_folder(folder):
    rows = ["Video file,Organ,Finding,Classification"]
    for tract, kind, names in (
            ("lower-gi-tract", "pathological-findings",
             ("polyps", "ulcerative-colitis-grade-1-2", "hemorrhoids")),
            ("lower-gi-tract", "quality-of-mucosal-views", ("bbps-2-3",)),
            ("upper-gi-tract", "anatomical-landmarks", ("z-line", "retroflex-stomach")),
            ("upper-gi-tract", "pathological-findings", ("esophagitis-a", "nonsense"))):
        for name in names:
            (folder / tract / kind / name).mkdir(parents=True)
            image(len(rows)).save(folder / tract / kind / name / f"of-{name}.jpg")
            rows.append(f"of-{name},{tract[:5].title()} GI,{name},{kind}")
    (folder / "image-labels.csv").write_text("\n".join(rows) + "\n")
    return folder


def test_classes_become_prompts(tmp_path, capsys):
    src, out = hyper_folder(tmp_path / "src"), tmp_path / "out"
    table = src / "image-labels.csv"
    lines = table.read_text().replace("of-polyps,Lower GI,polyps", "of-polyps,Lower GI,cecum").splitlines()
    table.write_text("\n".join([*(x for x in lines if "of-z-line" not in x), "lost,Lower GI,polyps,x"]))
    kvasir.main(["hyper", "--src", str(src), "--out", str(out)])
    colon, stomach = ({"procedure": name} for name in ("colonoscopy", "gastroscopy"))
    assert {r.name: [prompts.parse(p) for p in r.prompts] for r in data.read_folder(out)} == {
        "of-ulcerative-colitis-grade-1-2.jpg": [{"contains": ["ulcerative colitis"]}, colon],
        "of-hemorrhoids.jpg": [{"contains": ["hemorrhoids"]}, colon], "of-bbps-2-3.jpg": [colon],
        "of-z-line.jpg": [{"contains": ["z-line"]}, stomach], "of-retroflex-stomach.jpg": [stomach],
        "of-esophagitis-a.jpg": [{"contains": ["oesophagitis"]}, stomach]}
    said = capsys.readouterr().out
    for line in ("1 images of a class that is not known: nonsense", "CC BY 4.0; cite Borgli",
                 "1 images whose folder and row name different classes: polyps, cecum",
                 "1 images without a row of a known class, whose folder was believed: of-z-line.jpg, no row",
                 "1 rows without their image: lost"):
        assert line in said, line


def test_rows_that_contradict_each_other_leave_their_image_out_in_any_order(tmp_path, capsys):
    src, out = hyper_folder(tmp_path / "src"), tmp_path / "out"
    with open(src / "image-labels.csv", "a", encoding="utf-8") as f:
        f.write("of-polyps,Lower GI,cecum,x\nof-hemorrhoids,Lower GI,hemorrhoids,x\n")
    kvasir.main(["hyper", "--src", str(src), "--out", str(out)])
    names = {r.name for r in data.read_folder(out)}
    assert "of-polyps.jpg" not in names and "of-hemorrhoids.jpg" in names
    assert "1 images whose folder and row name different classes: polyps, cecum" in capsys.readouterr().out


@pytest.mark.parametrize("name", [b" a.jpg", b"caf\xe9.jpg", b"a\nb.jpg"])
def test_names_that_no_table_can_hold_are_refused_before_anything_is_written(tmp_path, name):
    src, out = hyper_folder(tmp_path / "src"), tmp_path / "out"
    image().save(src / "lower-gi-tract/pathological-findings/polyps/x.jpg")
    try:
        (src / "lower-gi-tract/pathological-findings/polyps/x.jpg").rename(
            src / "lower-gi-tract/pathological-findings/polyps" / os.fsdecode(name))
    except OSError:
        pytest.skip("this file system has no such names")
    with pytest.raises(BadInput, match="expected a file name in UTF-8, without"):
        kvasir.main(["hyper", "--src", str(src), "--out", str(out)])
    assert not out.exists()


def test_captions_that_somebody_wrote_are_kept(tmp_path):
    src, out = hyper_folder(tmp_path / "src"), tmp_path / "out"
    command = ["hyper", "--src", str(src), "--out", str(out)]
    for _ in range(2):                                      # the same again is no edit
        kvasir.main(command)
    with open(out / "prompt-gt.csv", "a", encoding="utf-8") as f:
        f.write("An expert's sentence.;of-polyps.jpg\n")
    before = (out / "prompt-gt.csv").read_bytes()
    with pytest.raises(BadInput, match="prompt-gt.csv: holds other rows than this command writes.*are kept"):
        kvasir.main(command)
    assert (out / "prompt-gt.csv").read_bytes() == before


def test_a_row_may_spell_its_class_in_another_way(tmp_path, capsys):
    src, out = hyper_folder(tmp_path / "src"), tmp_path / "out"
    table = src / "image-labels.csv"
    rows = table.read_text().replace("GI,ulcerative-colitis-grade-1-2", "GI,Ulcerative colitis grade_1-2")
    table.write_text(rows.replace("GI,z-line", "GI,Z line of some clinic"))
    kvasir.main(["hyper", "--src", str(src), "--out", str(out)])
    assert len(data.read_folder(out)) == 7
    assert "believed: of-z-line.jpg, z-line-of-some-clinic" in capsys.readouterr().out
    (src / "lower-gi-tract").rename(src / "Lower GI tract")
    polyps = src / "Lower GI tract" / "pathological-findings" / "polyps"
    polyps.rename(polyps.with_name("Polyps"))
    kvasir.main(["hyper", "--src", str(src), "--out", str(tmp_path / "other")])
    found = [{r.name: r.prompts for r in data.read_folder(folder)} for folder in (out, tmp_path / "other")]
    assert found[0] == found[1]
    for path in list(src.glob("*/*/*")):
        path.rename(path.with_name(f"a-{path.name}"))
    with pytest.raises(BadInput, match="known classes, as polyps or cecum; 8 images of a class that is not "
                       "known, the first is 'a-"):
        kvasir.main(["hyper", "--src", str(src), "--out", str(tmp_path / "none")])


def test_every_class_is_written_in_the_grammar():
    assert len(kvasir.CLASSES) == 23
    assert all(name in kvasir.__doc__ for name in kvasir.CLASSES if "colitis" not in name)
    for name in set(kvasir.CLASSES.values()) - {None}:
        assert prompts.parse(prompts.write({"contains": [name]})) == {"contains": [name]}


def test_hyper_refuses_before_it_writes(tmp_path):
    src, out = hyper_folder(tmp_path / "src"), tmp_path / "out"
    command = ["hyper", "--src", str(src), "--out", str(out)]
    with pytest.raises(BadInput, match="expected the folder labeled-images"):
        kvasir.main([*command[:2], str(tmp_path), *command[3:]])
    image().save(src / "upper-gi-tract" / "anatomical-landmarks" / "z-line" / "of-polyps.jpg")
    with pytest.raises(BadInput, match="expected each name once, got lower-gi-.*of-polyps.jpg and upper"):
        kvasir.main(command)
    (src / "image-labels.csv").write_text("Video file,Organ\na,b\n")
    with pytest.raises(BadInput, match="image-labels.csv, row 1: expected a column finding"):
        kvasir.main(command)
    assert not out.exists()
