"""kvasir.py: prompts that are true by the mask, on scenes drawn here and on the real images."""

from command import BadInput

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


@pytest.mark.parametrize("values", [(0, 1), (0, 255), (0, 200), ((0, 0, 0), (255, 0, 0)),
                                    ((0, 0, 0), (0, 90, 0))])
def test_masks_of_any_value_show_the_polyp(tmp_path, values):
    src = kvasir_folder(tmp_path / "src")
    found = kvasir.true_prompts(src / "images" / "one.jpg", src / "masks" / "one.jpg")
    mask = np.zeros((300, 360), bool)
    disc(mask, 60, 60, 30)
    Image.fromarray(np.uint8(values)[mask.astype(int)]).save(tmp_path / "mask.png")
    assert kvasir.true_prompts(src / "images" / "one.jpg", tmp_path / "mask.png") == found


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
