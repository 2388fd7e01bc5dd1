"""Phantoms: the same image from the same numbers, a data folder, and images that show what prompts state."""

import csv
import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from helpers import ROOT
from PIL import Image

import data
import phantom
import prompts

SCENES = [phantom.draw_scene(7, i) for i in range(150)]


@pytest.fixture(scope="module")
def images():
    return [phantom.render(scene, 64) for scene in SCENES[:60]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("phantom") / "p"
    phantom.main(["--out", str(out), "--n", "12", "--size", "32", "--seed", "3"])
    return out


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def pixel(img, x, y):
    """Mean colour in [0, 1] of the four pixels around a point."""
    size = len(img)
    i, j = (min(max(int(z * size - 0.5), 0), size - 2) for z in (y, x))
    return img[i:i + 2, j:j + 2].reshape(4, 3).mean(0) / 255


# ---------------------------------------------------------------- scenes

def test_a_scene_depends_on_seed_and_index_only():
    again = phantom.draw_scene(7, 5, 3)
    assert np.array_equal(phantom.render(again, 32), phantom.render(SCENES[5], 32))
    assert not np.array_equal(phantom.render(phantom.draw_scene(8, 5), 32), phantom.render(again, 32))


def test_64_and_256_px_show_the_same_scene():
    for scene in SCENES[:8]:
        large = np.asarray(Image.fromarray(phantom.render(scene, 256)).resize((64, 64), Image.Resampling.BOX),
                           float)
        assert np.abs(large - phantom.render(scene, 64)).mean() < 2.5


def test_attributes_are_spread_as_the_docstring_says():
    scenes = SCENES + [phantom.draw_scene(11, i) for i in range(250)]
    n_polyps = Counter(len(s["polyps"]) for s in scenes)
    assert set(n_polyps) == {0, 1, 2, 3} and min(n_polyps.values()) > 0.18 * len(scenes)
    for key in ("box", "text"):
        assert 0.42 < np.mean([s[key] is not None for s in scenes]) < 0.58
    assert 0.42 < np.mean([len(s["instruments"]) == 0 for s in scenes]) < 0.58
    assert 0.65 < np.mean([s["procedure"] == "colonoscopy" for s in scenes]) < 0.85
    polyps = [p for s in scenes for p in s["polyps"]]
    assert set(Counter(c for p in polyps for c in p["cells"])) == set(prompts.CELLS)
    assert {p["size"] for p in polyps} == set(prompts.SIZES) and {p["paris"]
                                                                  for p in polyps} == set(prompts.PARIS)
    assert {c for p in polyps for c in p["colors"]} == set(phantom.COLORS) <= set(prompts.COLORS)
    assert np.mean([len(p["cells"]) == 1 for p in polyps]) > 0.9


def test_up_to_eight_polyps_are_drawn_where_asked_for():
    scenes = [phantom.draw_scene(7, i, 8) for i in range(60)]
    n_polyps = Counter(len(s["polyps"]) for s in scenes)
    assert set(n_polyps) == set(range(9))
    eight = next(s for s in scenes if len(s["polyps"]) == 8)
    assert all(phantom.apart(a, b) for a in eight["polyps"] for b in eight["polyps"] if a is not b)


def test_size_classes_do_not_overlap():
    radii = {size: [p["radius"] for s in SCENES for p in s["polyps"] if p["size"] == size]
             for size in prompts.SIZES}
    for small, large in zip(prompts.SIZES, prompts.SIZES[1:], strict=False):
        assert 1.2 * max(radii[small]) < min(radii[large])


def test_a_polyp_covers_a_cell_with_30_percent_of_its_visible_area():
    assert phantom.cells_covered(np.array([0.1] * 7 + [0.5] * 3), np.full(10, 0.1)) == ["upper-left",
                                                                                        "upper-center"]
    assert phantom.cells_covered(np.array([0.1] * 8 + [0.5] * 2), np.full(10, 0.9)) == ["lower-left"]
    assert phantom.cells_covered(np.linspace(0, 0.99, 9), np.full(9, 0.5)) == ["center-left", "center",
                                                                               "center-right"]
    spread = np.array([0.1, 0.5, 0.9, 0.1, 0.5, 0.1]), np.array([0.1, 0.1, 0.1, 0.5, 0.5, 0.5])
    assert phantom.cells_covered(*spread) == ["center-left"]                    # the fullest


def test_polyps_touch_neither_each_other_nor_instruments_and_are_hardly_hidden():
    for scene in SCENES:
        for i, polyp in enumerate(scene["polyps"]):
            assert polyp["cells"] == phantom.visible_cells(scene, polyp) != []
            assert all(phantom.apart(polyp, other) for other in scene["polyps"][:i])
            for shaft in scene["instruments"]:
                distance, _ = phantom.segment_distance(*polyp["center"], shaft["start"], shaft["tip"])
                assert distance > polyp["radius"] + 0.05
            if scene["text"]:
                rect = (*scene["text"], *np.add(scene["text"], phantom.TEXT_SIZE))
                assert phantom.rectangle_distance(*polyp["center"], rect) > 0


# ---------------------------------------------------------------- pixels

def test_the_middle_of_a_polyp_has_its_color(images):
    """At the middle, or on both halves; the light changes brightness, so directions are compared."""
    def chroma(color):
        color = np.asarray(color) - 0.25 * np.mean(color)
        return color / np.linalg.norm(color)

    right = []
    for scene, img in zip(SCENES, images, strict=False):
        for polyp in scene["polyps"]:
            step = 0.5 * polyp["radius"] if len(polyp["colors"]) == 2 else 0.0
            for name, side in zip(polyp["colors"], (-step, step), strict=False):
                (x, y), angle = polyp["center"], polyp["angle"]
                seen = chroma(pixel(img, x + side * np.cos(angle), y + side * np.sin(angle)))
                nearest = max(phantom.COLORS, key=lambda c: seen @ chroma(phantom.COLORS[c]))
                right.append(nearest == name)
    assert len(right) > 60 and np.mean(right) > 0.9


def test_the_box_is_there_when_it_is_said_to_be(images):
    for scene, img in zip(SCENES, images, strict=False):
        r, g, b = pixel(img, 0.17, 0.97)
        if scene["box"] and scene["box_color"] == "green":
            assert g > 0.4 > r and g > b
        elif scene["box"]:
            assert max(r, g, b) < 0.15
        elif not scene["polyps"] and not scene["instruments"]:
            r, g, b = pixel(img, 0.15, 0.86)
            assert r > 1.2 * max(g, b)                                   # mucosa


def test_text_is_light_where_it_is_said_to_be(images):
    for scene, img in zip(SCENES, images, strict=False):
        if scene["text"]:
            x, y = scene["text"]
            assert pixel(img, x + 0.09, y + 0.155).mean() > 0.6              # the line of squares


def test_corners_are_black_and_the_lumen_is_dark(images):
    for scene, img in zip(SCENES, images, strict=False):
        assert (img[-1, -1] == 0).all() or scene["text"]
        if not scene["polyps"] and not scene["instruments"]:
            assert pixel(img, *scene["lumen"]["center"]).max() < 0.45


# ---------------------------------------------------------------- prompts

def test_prompts_are_true_and_7_to_11():
    for i, scene in enumerate(SCENES):
        texts = phantom.describe(scene, np.random.default_rng(i))
        truth = phantom.attributes(scene, "x.png")
        assert 7 <= len(texts) <= 11 and len(set(texts)) == len(texts)
        for text in texts:
            (key, said), = prompts.parse(text).items()
            polyps = truth["polyps"]
            assert said == {
                "n_findings": len(polyps), "n_polyps": len(polyps),
                "n_instruments": len(truth["instruments"]),
                "text": truth["text"], "box": truth["box"], "procedure": truth["procedure"],
                "contains": ["polyp"],
                "abnormality_cells": [c for c in prompts.CELLS if any(c in p["cells"] for p in polyps)],
                "colors": [c for c in prompts.COLORS if any(c in p["colors"] for p in polyps)],
                "sizes": [s for s in prompts.SIZES if any(s == p["size"] for p in polyps)],
                "paris": [t for t in prompts.PARIS if any(t == p["paris"] for p in polyps)],
                "instrument_cells": [c for c in prompts.CELLS
                                     if any(c in p["cells"] for p in truth["instruments"])],
                "landmark_cells": [prompts.CELLS[phantom.cell_of(*scene["lumen"]["center"])]]}[key]


# ---------------------------------------------------------------- files

def test_the_folder_is_a_data_folder(folder):
    text = (folder / "attributes.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    names = [f"{i:06d}.png" for i in range(12)]
    assert [line["file_name"] for line in lines] == names
    assert all(set(line) == {"file_name", "procedure", "polyps", "instruments", "box", "text"}
               for line in lines)
    for polyp in (p for line in lines for p in line["polyps"]):
        assert set(polyp) == {"cells", "size", "paris", "colors", "center", "radius"}
        assert all(0 <= z <= 1 for z in polyp["center"])
    with open(folder / "prompt-gt.csv", encoding="utf-8", newline="") as f:
        rows = list(csv.DictReader(f, delimiter=";"))
    assert list(rows[0]) == ["Prompt", "Filename"]
    assert list(dict.fromkeys(row["Filename"] for row in rows)) == names
    assert [record.name for record in data.read_folder(folder)] == names
    assert {Image.open(folder / "images" / name).size for name in names} == {(32, 32)}


def test_the_same_command_again_writes_the_same_files(folder):
    before = files(folder)
    (folder / "images/000004.png").unlink()
    (folder / "prompt-gt.csv").unlink()                                  # as if it had been stopped early
    phantom.main(["--out", str(folder), "--n", "12", "--size", "32", "--seed", "3"])
    assert files(folder) == before


def test_a_killed_run_leaves_nothing_behind(folder):
    before = files(folder)
    (folder / "images/000004.png").unlink()
    (folder / "prompt-gt.csv").rename(folder / ".prompt-gt.99999999000001.csv")     # number and six digits
    (folder / "images/.000004.99999999000001.png").write_bytes(b"half")
    (folder / ".env.local.orig").write_text("somebody's")
    phantom.main(["--out", str(folder), "--n", "12", "--size", "32", "--seed", "3"])
    assert files(folder) == before | {".env.local.orig": b"somebody's"}
    (folder / ".env.local.orig").unlink()


KILLED = """
import os, signal, sys, phantom
phantom.render = lambda scene, size: os.kill(os.getpid(), signal.SIGKILL)
phantom.run_command(lambda: phantom.main(["--out", sys.argv[1], "--n", "4"]))
"""


def test_a_killed_worker_ends_the_command_in_one_line(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "p"], cwd=ROOT, capture_output=True,
                          text=True, timeout=60)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2 and len(errors) == 1 and "a worker process was killed" in errors[0]
    assert "Traceback" not in done.stderr and not (tmp_path / "p/prompt-gt.csv").exists()


def test_attributes_of_somebody_else_are_left_alone(tmp_path):
    for name in ("attributes.jsonl", ".attributes.7.jsonl"):
        (tmp_path / name).write_bytes(b"\xff\xfe")
    with pytest.raises(data.BadInput, match="found another"):
        phantom.main(["--out", str(tmp_path), "--n", "2"])
    assert len(list(tmp_path.iterdir())) == 2


def test_edited_captions_are_kept(folder):
    before = files(folder)
    with open(folder / "prompt-gt.csv", "a", encoding="utf-8") as f:
        f.write("An expert's sentence.;000000.png\n")
    with pytest.raises(data.BadInput, match="prompt-gt.csv: expected the prompts of this phantom"):
        phantom.main(["--out", str(folder), "--n", "12", "--size", "32", "--seed", "3"])
    assert "An expert's" in (folder / "prompt-gt.csv").read_text(encoding="utf-8")
    (folder / "prompt-gt.csv").write_bytes(before["prompt-gt.csv"])


@pytest.mark.parametrize("other", [("--n", "11"), ("--seed", "4"), ("--size", "48"), ("--max-polyps", "8")])
def test_another_phantom_is_refused(folder, other):
    before = files(folder)
    flags = {"--n": "12", "--size": "32", "--seed": "3"} | {other[0]: other[1]}
    with pytest.raises(data.BadInput, match="found"):
        phantom.main(["--out", str(folder), *(word for flag in flags.items() for word in flag)])
    assert files(folder) == before


def test_a_strange_folder_and_strange_numbers_are_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("the only copy")
    with pytest.raises(data.BadInput, match=r"thesis\.txt"):
        phantom.main(["--out", str(tmp_path), "--n", "2"])
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(data.BadInput, match="folder"):
        phantom.main(["--out", str(tmp_path / "thesis.txt"), "--n", "2"])
    with pytest.raises(data.BadInput, match="--n: expected at least 1, got 0"):
        phantom.main(["--out", str(tmp_path / "p"), "--n", "0"])
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("flag, value, bound", [("--n", 10**9, 10**6), ("--size", 100_000, 2048),
                                                ("--seed", 2**64, 2**64 - 1)])
def test_numbers_beyond_their_bounds_are_refused(tmp_path, flag, value, bound):
    with pytest.raises(data.BadInput, match=f"{flag}: expected at most {bound}, got {value}"):
        phantom.main(["--out", str(tmp_path / "p"), "--n", "1", flag, str(value)])
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("link", ["p", "p/images"])
@pytest.mark.parametrize("target", ["absent", "self"])
def test_a_link_to_nowhere_is_named(tmp_path, link, target):
    link = tmp_path / link
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(link if target == "self" else tmp_path / target)
    with pytest.raises(data.BadInput, match=f"{link}: expected a folder, found a link to .*nowhere"):
        phantom.main(["--out", str(tmp_path / "p"), "--n", "1"])
    with pytest.raises(data.BadInput, match=f"{link}: "):
        phantom.main(["--out", str(link / "below"), "--n", "1"])
