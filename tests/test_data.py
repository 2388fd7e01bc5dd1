"""data.py: a folder is read as it stands, every odd image opens, bad input is one clear line."""

from command import BadInput

import argparse
import csv
import json
import os
import random
import resource
import struct
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import KVASIR, PROMPTS, image, real_images, tiny_msdm
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.v2 import functional as tv

import data
import duplicates
import files
import msdm
import pixels
import training
import vae
from captions import CaptionSampler
from data import Record
from wording import Wording

ROWS = [("Generate an image containing a polyp.", "a"), ("Generate an image with 2 polyps.", "b.png"),
        ("Generate an image with an an abnormality located in the upper-left, center and lower-rigth.",
         "a.jpg")]


@pytest.fixture
def folder(tmp_path):
    """Images a.jpg, b.png, c.jpg and no captions."""
    (tmp_path / "images").mkdir()
    for i, name in enumerate(("a.jpg", "b.png", "c.jpg")):
        image(i).save(tmp_path / "images" / name)
    return tmp_path


def write(path, header, rows, delimiter, start="", end="\n", encoding="utf-8"):
    cells = [header, *rows]
    quoted = [delimiter.join(f'"{c}"' if delimiter in c else c for c in row) for row in cells]
    path.write_bytes((start + end.join(quoted) + end).encode(encoding))
    return path


# ---- captions ----

@pytest.mark.parametrize("delimiter", [";", ","])
@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n"])
@pytest.mark.parametrize("header", [("Prompt", "Filename"), ("text", "file_name"), ("caption", "image")])
def test_every_dialect_of_csv_reads_the_same(folder, delimiter, start, end, header):
    write(folder / "prompt-gt.csv", header, ROWS, delimiter, start, end)
    records = data.read_folder(folder)
    assert [r.name for r in records] == ["a.jpg",
                                         "b.png"]                 # order of first appearance, c has no prompt
    assert records[0].prompts == [ROWS[0][0], ROWS[2][0]] and records[1].prompts == [ROWS[1][0]]
    assert records[0].path == folder / "images" / "a.jpg"


def test_columns_may_stand_in_any_order_and_a_paraphrase_is_not_a_prompt(folder):
    rows = [("a.jpg", "one", "another one"), ("b", "two", "")]
    write(folder / "prompt-gt.csv", ("Filename", "Prompt", "Paraphrase"), rows, ",")
    assert [r.prompts for r in data.read_folder(folder)] == [["one"], ["two"]]


def test_which_captions_file_is_read(folder):
    write(folder / "other.csv", ("Prompt", "Filename"), [("other", "a")], ",")
    assert data.read_folder(folder)[0].prompts == ["other"]
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "images/a.jpg",
                                                       "text": "metadata"}) + "\n\n")
    assert data.read_folder(folder)[0].prompts == ["metadata"]
    data.write_captions(folder, [("gt; quoted", "a.jpg")])
    assert data.read_folder(folder)[0].prompts == ["gt; quoted"]
    assert data.read_folder(folder, folder / "other.csv")[0].prompts == ["other"]


def test_written_captions_read_back(folder):
    rows = [('with "quotes"; and, both', "a.jpg"), ("größer", "b.png")]
    data.write_captions(folder, rows)
    assert (folder / "prompt-gt.csv").read_text(encoding="utf-8").startswith("Prompt;Filename\n")
    assert [(p, r.name) for r in data.read_folder(folder) for p in r.prompts] == rows


@pytest.mark.parametrize("text, expected", [
    ("Prompt;Filename\nok;a\n ;b\n", "row 3: the prompt is empty"),
    ("Prompt;Filename\nok;a\nok;nowhere.jpg\n", "row 3: no image 'nowhere.jpg'"),
    ("Prompt;Seed\nok;a\n", "row 1: expected a column filename or file_name or image"),
    ("Filename,Size\na,3\n", "row 1: expected a column prompt or text or caption"),
    ("Prompt,Filename\nupper-left, center,a\n", "row 2: expected 2 fields, got 3"),
    ("Prompt;Filename\nok\n", "row 2: expected 2 fields, got 1"),
    ("Prompt;Filename\n", "no rows"),
    ("", "row 1: expected a column"),
    ("Prompt;Filename\n\xff;a\n".encode("latin-1"), "not UTF-8"),
    ("Prompt;Filename\nok;a\n".encode("utf-16"), "not UTF-8"),
])
def test_bad_csv_is_one_line_with_file_and_row(folder, text, expected):
    path = folder / "prompt-gt.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(BadInput) as error:
        data.read_folder(folder)
    assert expected in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("line", ["{", "[1]", '{"file_name": "a"}', '{"text": "x"}',
                                  '{"file_name": 3, "text": "x"}'])
def test_bad_jsonl_names_the_row(folder, line):
    (folder / "metadata.jsonl").write_text('{"file_name": "a", "text": "x"}\n' + line + "\n")
    with pytest.raises(BadInput, match="metadata.jsonl, row 2"):
        data.read_folder(folder)


@pytest.mark.parametrize("line, said", [
    ('{"file_name": "a", "text": "x", "n": ' + "1" * 5000 + "}", "row 2: not JSON .*5000 digits"),
    ("[" * 200_000, "row 2: not JSON"),
    ('{"file_name": "a", "text": "x \\ud800 y"}', r"row 2: the prompt holds \\ud800, half a character"),
    ('{"file_name": "a", "text": "x", "text": "y"}', "row 2: not JSON .*the key 'text' stands there twice"),
    ('{"file_name": "a", "text": "x", "Text": "y"}', "row 2: 'text' stands there twice"),
])
def test_a_row_of_jsonl_that_no_training_can_use_is_refused(folder, capsys, line, said):
    (folder / "metadata.jsonl").write_text('{"file_name": "a", "text": "x"}\n' + line + "\n")
    with pytest.raises(BadInput, match="metadata.jsonl, " + said):
        data.read_folder(folder)
    if "half a character" in said:
        assert data.main(["check", "--data", str(folder)]) == 1
        assert "unusable: prompts are unusable" in capsys.readouterr().out


@pytest.mark.parametrize("header", ["Prompt,prompt,Filename", "text,image,image", "text,image,text"])
def test_one_column_twice_is_refused(folder, header):
    (folder / "prompt-gt.csv").write_text(header + "\na,a,a\n")
    with pytest.raises(BadInput, match="row 1: '.*' stands there twice"):
        data.read_folder(folder)


def test_which_of_two_names_of_a_column_is_read_is_said(folder, capsys):
    pixels.said.clear()
    (folder / "prompt-gt.csv").write_text("image,Filename,text,Prompt\nb,a,one,two\n")
    assert [(r.name, r.prompts) for r in data.read_folder(folder)] == [("a.jpg", ["two"])]
    err = capsys.readouterr().err
    assert "filename and image mean the same, 'filename' is read" in err and err.count("\n") == 2
    row = '{"caption": "one", "text": "two", "file_name": "a"}\n'
    (folder / "m.jsonl").write_text(row * 2)
    assert data.read_folder(folder, folder / "m.jsonl")[0].prompts == ["two", "two"]
    said = f"{folder / 'm.jsonl'}, row 1: text and caption mean the same, 'text' is read\n"
    assert capsys.readouterr().err == said


def test_captions_that_are_no_file_are_not_called_absent(folder):
    os.mkfifo(folder / "pipe.csv")
    for path in (folder, folder / "pipe.csv", Path("/dev/zero")):
        for read in (lambda: data.read_folder(folder, path), lambda: data.read_prompts(path)):   # noqa: B023
            with pytest.raises(BadInput, match=f"{path}: not a file, expected"):
                read()


def test_missing_folders_and_files(folder, tmp_path):
    with pytest.raises(BadInput, match="nowhere: no such folder"):
        data.read_folder(tmp_path / "nowhere")
    with pytest.raises(BadInput, match="expected prompt-gt.csv, metadata.jsonl or one .csv, found none"):
        data.read_folder(folder)
    with pytest.raises(BadInput, match="no such captions file"):
        data.read_folder(folder, tmp_path / "x.csv")
    with pytest.raises(BadInput, match="no folder images/"):
        data.read_folder(folder / "images")
    for name in ("x.csv", "y.csv"):
        write(folder / name, ("Prompt", "Filename"), ROWS, ";")
    with pytest.raises(BadInput, match="x.csv, y.csv"):
        data.read_folder(folder)
    image().save(folder / "images" / "a.png")
    with pytest.raises(BadInput, match="'a' may be any of a.jpg, a.png"):
        data.read_folder(folder, folder / "x.csv")


@pytest.mark.parametrize("text, expected", [
    ('Prompt;Filename\nok;a\n"no end;b\nok;c\n', "row 3: a quote is not closed in its line"),
    ('Prompt;Filename\n"two\nlines";a\n', "row 2: a quote is not closed in its line"),
    ("Prompt;Filename\nok;a;;\n", "row 2: expected 2 fields, got 4, the last ones empty"),
    ("Prompt;Filename\nok;../images/a.jpg\n", "row 2: no image '../images/a.jpg'"),
    ("Prompt;Filename\nok;/etc/a.jpg\n", "row 2: no image '/etc/a.jpg'"),
    ("Prompt;Filename\nok;d.tif\n", "row 2: no image 'd.tif' in .*: the file is there, but only .jpg, .jpeg"),
])
def test_rows_that_would_be_read_wrongly_are_refused(folder, text, expected):
    image().save(folder / "images" / "d.tif")
    (folder / "prompt-gt.csv").write_text(text)
    with pytest.raises(BadInput, match=expected):
        data.read_folder(folder)


@pytest.mark.parametrize("name", ["images\\caf\u00e9.png", ".\\images\\cafe\u0301.png", "cafe\u0301",
                                  "images/caf\u00e9.png"])
@pytest.mark.parametrize("on_disk", ["caf\u00e9.png", "cafe\u0301.png"])
def test_a_name_is_found_in_every_spelling(folder, name, on_disk):
    image().save(folder / "images" / on_disk)
    data.write_captions(folder, [("x", name)])
    assert [r.name for r in data.read_folder(folder)] == [on_disk]


def test_quotes_around_a_word_are_kept(folder):
    (folder / "prompt-gt.csv").write_text('Filename;Prompt\na;"large" polyp\nb;a "flat" one\n')
    assert [r.prompts for r in data.read_folder(folder)] == [['"large" polyp'], ['a "flat" one']]


def test_padding_to_other_proportions_keeps_the_whole_image_in_the_middle():
    white = Image.new("RGB", (40, 20), "white")
    for (width, height), box in {(64, 64): (0, 16, 64, 48), (64, 32): (0, 0, 64, 32),
                                 (32, 64): (0, 24, 32, 40), (96, 32): (16, 0, 80, 32)}.items():
        out = pixels.padded(white, width, height)
        assert out.shape == (height, width, 3)
        x_0, y_0, x_1, y_1 = box
        inside = np.zeros((height, width), bool)
        inside[y_0:y_1, x_0:x_1] = True
        assert (abs(out.astype(int) - 255 * inside[..., None]).max(axis=2) > 128).sum() == 0
        assert out[inside].mean() > 240 and (inside.all() or out[~inside].mean() < 15)


def test_a_pipe_is_no_image(folder):
    os.mkfifo(folder / "images" / "pipe.png")
    assert [p.name for p in data.list_images(folder)] == ["a.jpg", "b.png", "c.jpg"]


# ---- pixels ----

def colours(img):
    """Left half and right half, away from the border between them."""
    x = np.asarray(img).astype(int)
    return x[4, 4].tolist(), x[-5, -5].tolist()


def halves(mode, left, right, w=32, h=16):
    img = Image.new(mode, (w, h), left)
    img.paste(right, (w // 2, 0, w, h))
    return img


@pytest.mark.parametrize("name, img, left, right", [
    ("grey.png", halves("L", 40, 200), [40] * 3, [200] * 3),
    ("one_bit.png", halves("1", 0, 1), [0] * 3, [255] * 3),
    ("rgba.png", halves("RGBA", (200, 100, 40, 255), (200, 100, 40, 0)), [200, 100, 40], [0, 0, 0]),
    ("half_transparent.png", halves("RGBA", (200, 100, 40, 128), (0, 0, 0, 255)), [100, 50, 20], [0, 0, 0]),
    ("grey_alpha.png", halves("LA", (90, 255), (90, 0)), [90] * 3, [0] * 3),
    ("palette.png", halves("RGB", (250, 0, 0), (0, 0, 250)).quantize(4), [250, 0, 0], [0, 0, 250]),
    ("cmyk.jpg", halves("RGB", (255, 255, 255), (0, 0, 0)).convert("CMYK"), [255] * 3, [0] * 3),
    ("16_bit.png", Image.fromarray(np.repeat(np.array([[0x4000, 0xFFFF]], np.uint16), 16, 1).repeat(16, 0)),
     [63] * 3, [255] * 3),
])
def test_every_mode_opens_as_rgb(tmp_path, name, img, left, right):
    img.save(tmp_path / name, quality=100) if name.endswith("jpg") else img.save(tmp_path / name)
    opened = data.open_image(tmp_path / name)
    assert opened.mode == "RGB"
    np.testing.assert_allclose(colours(opened), (left, right), atol=2)


def test_a_palette_colour_may_be_transparent(tmp_path):
    halves("RGB", (250, 0, 0), (0, 0, 250)).quantize(2).save(tmp_path / "p.png", transparency=0)
    first, second = colours(data.open_image(tmp_path / "p.png"))
    assert [0, 0, 0] in (first, second) and first != second


@pytest.mark.parametrize("orientation, turned",
                         [(3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_270),
                                                 (8, Image.Transpose.ROTATE_90)])
def test_exif_rotation_is_applied(tmp_path, orientation, turned):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image().save(tmp_path / "r.png", exif=exif)
    np.testing.assert_array_equal(data.open_image(tmp_path / "r.png"), image().transpose(turned))


def with_exif(path, *entries):
    """A JPEG with these EXIF entries (tag, type, count, value of four bytes)."""
    image().save(path)
    ifd = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3].ljust(4, b"\0") for entry in entries)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + ifd + bytes(4)
    jpeg = path.read_bytes()
    path.write_bytes(jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:])
    return path


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_exif_is_read_past(tmp_path):
    turned, text = (0x112, 3, 1, struct.pack("<H", 6)), (282, 2, 3, b"72\0")
    for entries, size in (((turned, text), (32, 48)), ((turned, (315, 5, 1, bytes(4))), (32, 48)),
                          (((0x112, 2, 3, b"up\0"),), (48, 32)),
                          ((text, (0xffff, 99, 2 ** 31, b"")), (48, 32))):
        assert data.open_image(with_exif(tmp_path / "e.jpg", *entries)).size == size
    rng = random.Random(0)
    for _ in range(300):
        entries = [(rng.choice((0x112, 282, 0x8769, 0xA005)), rng.randrange(14),
                    rng.choice((0, 1, 9, 2 ** 31)), rng.randbytes(4)) for _ in range(3)]
        assert sorted(data.open_image(with_exif(tmp_path / "e.jpg", *entries)).size) == [32, 48]


@pytest.mark.parametrize("top, white, words", [(200, 255, "read as 8 bits"), (4000, 4095, "read as 12 bits"),
                                              (16000, 16383, "read as 14 bits"), (20000, 65535, ""),
                                              (65535, 65535, "")])
def test_greys_of_16_bits_are_never_nearly_black(tmp_path, capsys, top, white, words):
    grey = np.linspace(0, top, 32 * 32).reshape(32, 32).round().astype(np.uint16)
    for name in ("a.png", "b.png"):
        Image.fromarray(grey).save(tmp_path / name)
        np.testing.assert_array_equal(np.asarray(data.open_image(tmp_path / name))[..., 0],
                                      grey.astype(int) * 255 // white)
    err = capsys.readouterr().err
    assert err.count("\n") == bool(words) and words in err                  # once, not for every image


def test_a_hot_pixel_does_not_hide_a_black_image(tmp_path, capsys):
    grey = np.full((32, 32), 900, np.uint16)
    grey[0, 0] = 65535
    Image.fromarray(grey).save(tmp_path / "hot.png")
    data.open_image(tmp_path / "hot.png")
    assert "99 % of the image is nearly black" in capsys.readouterr().err


def test_only_formats_of_images_are_decoded(tmp_path):
    (tmp_path / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    with pytest.raises(BadInput, match="x.png: the file is no JPEG, PNG, GIF, BMP, WEBP or TIFF"):
        data.open_image(tmp_path / "x.png")


def test_bombs_and_endless_strips_are_one_line(tmp_path):
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")
    Image.new("1", (70000, 1)).save(tmp_path / "strip.png")
    for name, why in (("bomb.png", "178,956,970 pixels .width x height.*decompression bomb"),
                      ("strip.png", "sides of at most 65535")):
        with pytest.raises(BadInput, match=why) as error:
            data.open_image(tmp_path / name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("w, h", [(60, 31), (31, 60), (1, 500), (3000, 7), (2048, 1537), (40, 40)])
def test_padding_gives_the_bytes_of_the_whole_square(w, h):
    img, side = image(w, w, h), max(w, h)
    square = Image.new("RGB", (side, side))
    square.paste(img, ((side - w) // 2, (side - h) // 2))
    np.testing.assert_array_equal(data.preprocess(img, 24),
                                  np.array(square.resize((24, 24), Image.Resampling.BICUBIC)))


def test_padding_a_long_strip_needs_little_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    data.preprocess(Image.new("RGB", (60000, 12), (120, 60, 40)), 32)      # the square would be 10.8 GB
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def broken_files(folder):
    image(1, 300, 300).save(folder / "whole.jpg")
    image(1, 300, 300).save(folder / "whole.png")
    for suffix in ("jpg", "png"):
        content = (folder / f"whole.{suffix}").read_bytes()
        (folder / f"truncated.{suffix}").write_bytes(content[:len(content) // 2])
    (folder / "zero.jpg").touch()
    (folder / "text.png").write_text("not an image")
    return [folder / name for name in ("truncated.jpg", "truncated.png", "zero.jpg", "text.png",
                                       "absent.png")]


def test_broken_files_are_named(tmp_path):
    for path in broken_files(tmp_path):
        with pytest.raises(BadInput) as error:
            data.open_image(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_padding_keeps_the_whole_image_centred_on_black():
    x = data.preprocess(Image.new("RGB", (60, 30), (200, 100, 50)), 20)
    assert x.shape == (20, 20, 3) and x.dtype == np.uint8
    assert (x[:4] == 0).all() and (x[-4:] == 0).all() and (x[7:13] == (200, 100, 50)).all()


def test_a_square_of_the_right_size_is_untouched():
    np.testing.assert_array_equal(data.preprocess(image(0, 32, 32), 32), image(0, 32, 32))


def test_resizing_antialiases():
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (512, 256))).convert("RGB")
    assert np.ptp(data.preprocess(stripes, 32)[4:-4, 4:-4].astype(int)) <= 2      # the mean grey, no moire


def test_crops_are_squares_of_the_short_side():
    img = Image.fromarray(np.tile(np.arange(90, dtype=np.uint8), (30, 1))).convert("RGB")
    np.testing.assert_array_equal(data.preprocess(img, 30, "center")[0, :, 0], np.arange(30, 60))
    starts = {int(data.preprocess(img, 30, "random", np.random.default_rng(s))[0, 0, 0]) for s in range(200)}
    assert min(starts) < 5 and max(starts) > 55 and max(starts) <= 60
    with pytest.raises(ValueError, match="expected crop"):
        data.preprocess(img, 30, "squash")


def many(folder, n, bad=0):
    records = []
    for i in range(n):
        path = folder / f"{i}.png"
        path.touch() if i < bad else image(i).save(path)
        records.append(Record(path, path.name, [f"prompt {i}"]))
    return records


def test_images_come_in_order(tmp_path):
    records = many(tmp_path, 7)
    images, kept = data.load_images(records, 16, workers=3)
    assert images.dtype == torch.uint8 and images.shape == (7, 3, 16, 16) and kept == records
    for i in range(7):
        np.testing.assert_array_equal(images[i].permute(1, 2, 0), data.preprocess(image(i), 16))


def test_a_few_unreadable_images_are_named_and_skipped(tmp_path, capsys):
    records = many(tmp_path, 40, bad=2)
    images, kept = data.load_images(records, 8)
    err = capsys.readouterr().err
    assert len(images) == 38 and kept == records[2:] and "2 unreadable images of 40" in err
    assert str(records[0].path) in err and str(records[1].path) in err
    np.testing.assert_array_equal(images[0].permute(1, 2, 0), data.preprocess(image(2), 8))
    with pytest.raises(BadInput, match="0.png"):
        data.load_images(records, 8, on_bad="raise")


def test_many_unreadable_images_stop_the_run(tmp_path):
    with pytest.raises(BadInput, match="3 of 40 images cannot be read"):
        data.load_images(many(tmp_path, 40, bad=3), 8)


def test_the_five_percent_may_be_of_more_images(tmp_path):
    records = many(tmp_path, 10, bad=1)
    with pytest.raises(BadInput, match="1 of 10 images cannot be read, more than 5 %; "):
        data.load_images(records, 8)
    assert len(data.load_images(records, 8, total=100)[1]) == 9
    with pytest.raises(BadInput, match="1 of 1 images cannot be read, more than 5 % of 100"):
        data.load_images(records[:1], 8, total=100)


def test_reading_ahead_is_bounded_and_in_order():
    begun = []
    ahead = data.read_ahead(lambda i: begun.append(i) or i, 50, workers=3, ahead=5)
    assert next(ahead) == 0 and len(begun) <= 6
    assert list(ahead) == list(range(1, 50))


# ---- training ----

names = st.lists(st.text("abcdef", min_size=1, max_size=5), min_size=2, max_size=60, unique=True)


@given(names, st.integers(0, 5), st.sampled_from([0.1, 0.25, 0.5]), st.randoms())
@settings(max_examples=40, deadline=None)
def test_split_goes_by_name_and_seed(names, seed, fraction, random):
    records = [Record(Path(n), n, []) for n in names]
    train, val = data.split(records, fraction, seed, groups=[])
    assert len(val) == max(1, round(fraction * len(records))) and len(train) + len(val) == len(records)
    shuffled = random.sample(records, len(records))
    assert {r.name for r in data.split(shuffled, fraction, seed, groups=[])[1]} == {r.name for r in val}


def test_seeds_split_differently_and_fraction_zero_keeps_all():
    records = [Record(Path(str(i)), str(i), []) for i in range(100)]
    assert data.split(records, seed=0, groups=[])[1] != data.split(records, seed=1, groups=[])[1]
    assert data.split(records, 0, groups=[]) == (records, [])
    assert data.split([], groups=[]) == ([], [])
    with pytest.raises(BadInput, match="fraction"):
        data.split(records, 1.0)


def test_a_tenth_of_the_images_is_held_out():
    records = [Record(Path(str(i)), str(i), []) for i in range(2000)]
    assert [len(part) for part in data.split(records, groups=[])] == [1800, 200]  # as in the paper


def test_a_group_shares_a_side():
    records = [Record(Path(str(i)), str(i), []) for i in range(60)]
    groups = [list(range(i, 60, 12)) for i in range(12)]
    for seed in range(20):
        train, val = data.split(records, 0.1, seed, groups)
        assert train and val
        for group in groups:
            assert len({records[i] in val for i in group}) == 1


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(0, 30), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_large_groups_do_not_spoil_the_sizes(sizes, n_single, seed):
    n = sum(sizes) + n_single
    records = [Record(Path(str(i)), str(i), []) for i in range(n)]
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    groups = [list(range(a, a + size)) for a, size in zip(starts, sizes, strict=True) if size > 1]
    train, val = data.split(records, 0.1, seed, groups)
    n_val, names = round(0.1 * n) or int(n > 1), {r.name for r in val}
    units = [len(g) for g in groups] + [1] * (n - sum(map(len, groups)))
    sums = {0}
    for size in units:
        sums |= {s + size for s in sums if s + size <= max(n_val, 0.3 * n) and s + size < n}
    best = min(abs(s - n_val) for s in (sums - {0} or sums))
    if len(sums) > 1 or n == 1:
        assert abs(len(val) - n_val) <= max(best, 1, 0.15 * n_val) and len(val) <= max(n_val, 0.3 * n)
        assert all(len({str(i) in names for i in group}) == 1 for group in groups)
    else:
        assert len(val) == n_val                                           # the groups are divided
    assert len(train) + len(val) == n


def test_a_split_that_groups_change_is_said(tmp_path, capsys):
    records = [Record(tmp_path / str(i), str(i), []) for i in range(100)]
    assert len(data.split(records, groups=[[3, 4], [8, 9]])[1]) in (10, 11)
    assert capsys.readouterr().err == ""
    train, val = data.split(records, groups=[list(range(95))])
    assert len(val) == 5 and {r.name for r in val} == {str(i) for i in range(95, 100)}
    assert "5 of 100 images are held out, 10 were asked for" in capsys.readouterr().err
    pixels.said.clear()
    assert len(data.split(records, groups=[list(range(100))])[1]) == 10
    assert "near-duplicates are on both sides, the largest group has 100" in capsys.readouterr().err


def test_near_duplicates_are_found_and_kept_together(tmp_path):
    records = many(tmp_path, 30)
    noise = np.random.default_rng(0).normal(0, 4, (32, 48, 3))
    again = np.asarray(image(3)) * 0.9 + noise                     # darker, noisy, recompressed, another size
    Image.fromarray(again.clip(0, 255).astype(np.uint8)).resize((96, 64)).save(tmp_path / "again.jpg",
                                                                               quality=80)
    records.append(Record(tmp_path / "again.jpg", "again.jpg", []))
    assert data.near_duplicates(records) == [[3, 30]]
    for seed in range(15):
        train, _ = data.split(records, 0.3, seed)
        assert (records[3] in train) == (records[30] in train)


def test_flat_and_unreadable_images_are_nobodys_duplicates(tmp_path):
    records = many(tmp_path, 4, bad=2)
    for i in (4, 5):
        Image.new("RGB", (20, 20), (90, 30, 30)).save(tmp_path / f"{i}.png")
        records.append(Record(tmp_path / f"{i}.png", f"{i}.png", []))
    assert data.near_duplicates(records) == [] and data.near_duplicates([]) == []


@pytest.mark.parametrize("as_float", [False, True])
def test_augment_is_torchvisions_colour_jitter(as_float):
    images = torch.randint(0, 256, (5, 3, 8, 8), generator=torch.Generator().manual_seed(0),
                           dtype=torch.uint8)
    brightness, contrast = 0.6 + 0.8 * torch.rand(2, 5, generator=torch.Generator().manual_seed(1))
    x = images / 127.5 - 1 if as_float else images
    out = data.augment(x, torch.Generator().manual_seed(1))
    assert out.dtype == x.dtype and len({round(f, 4)
                                         for f in (*brightness.tolist(), *contrast.tolist())}) == 10
    for i in range(5):
        want = tv.adjust_contrast(tv.adjust_brightness(images[i] / 255, brightness[i]), contrast[i])
        got = (out[i] + 1) / 2 if as_float else out[i] / 255
        torch.testing.assert_close(got, want, atol=1e-5 if as_float else 0.5 / 255 + 1e-5, rtol=0)


def test_augment_of_nothing_changes_nothing():
    images = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(data.augment(images, torch.Generator(), amount=0.0), images)


def test_context_is_dropped_per_sample():
    prompts = [str(i) for i in range(2000)]
    out = data.drop_context(prompts, 0.2, torch.Generator().manual_seed(0))
    assert all(o in ("", p) for o, p in zip(out, prompts, strict=True)) and 340 < out.count("") < 460
    assert out == data.drop_context(prompts, 0.2, torch.Generator().manual_seed(0))
    assert data.drop_context(prompts, 0.0, torch.Generator()) == prompts
    assert data.drop_context(prompts, 1.0, torch.Generator()) == [""] * 2000


def test_images_are_compared_once(folder, monkeypatch):
    folder = folder.rename(folder.parent / f"{folder.name}-once")
    data.write_captions(folder, [("x", "a"), ("x", "b")])
    time.sleep(0.1)                                         # a newer file might change within the same tick
    records, opened, compared = data.read_folder(folder), [], []
    first = data.near_duplicates(records), data.fingerprint(records)
    look, compare = duplicates.look, duplicates.compare
    monkeypatch.setattr(duplicates, "look", lambda path: opened.append(path.name) or look(path))
    monkeypatch.setattr(duplicates, "compare", lambda x: compared.append(len(x)) or compare(x))
    duplicates.remembered.clear()                           # as a new process
    assert (data.near_duplicates(records), data.fingerprint(records)) == first and opened == compared == []
    content = bytearray((folder / "images" / "b.png").read_bytes())
    content[-1] ^= 1
    times = (folder / "images" / "b.png").stat()
    (folder / "images" / "b.png").write_bytes(content)      # as many bytes, and the old time set back
    os.utime(folder / "images" / "b.png", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert data.fingerprint(records) != first[1] and opened == ["b.png"]
    image(7).save(folder / "images" / "b.png")
    assert data.near_duplicates(records) == first[0] == [] and compared == [2]
    for cache in (folder.parent / ".features").glob(f"{folder.name}.*"):
        cache.write_bytes(b"broken")
    duplicates.remembered.clear()
    assert len(data.seen(records)) == 2 and data.near_duplicates(records) == [] and compared == [2, 2]


def test_a_place_without_a_cache_is_one_note(folder, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(duplicates, "save_safetensors", refuse)
    data.write_captions(folder, [("x", "a"), ("x", "b")])
    time.sleep(0.1)
    data.split(data.read_folder(folder))
    data.fingerprint(data.read_folder(folder))
    assert capsys.readouterr().err.count("not cached: ") == 1


def test_remembered_groups_are_the_computed_ones(folder):
    for i in range(40):
        image(i % 25).save(folder / "images" / f"n{i:02d}.png", compress_level=i % 10)
    records = [Record(p, p.name, []) for p in data.list_images(folder)]
    groups = data.near_duplicates(records)
    assert groups == duplicates.compare(np.stack([t for _, t, _ in data.seen(records)]))
    assert groups[0] == [0, 3, 28] and data.near_duplicates(records) == groups
    assert data.near_duplicates(records[:20]) != groups     # other images, another key
    assert data.near_duplicates(records) == groups


@pytest.mark.filterwarnings("ignore")
def test_a_look_knows_what_cannot_be_opened(tmp_path):
    """The verdict of the first look, which decodes a JPEG at a fraction of its size, is open_image's."""
    rng, both = random.Random(0), []
    image(0, 400, 300).save(tmp_path / "a.jpg", quality=95)
    image(1, 400, 300).convert("CMYK").save(tmp_path / "b.jpg", progressive=True)
    image(2, 400, 300).save(tmp_path / "c.png")
    Image.fromarray(np.full((40, 40), 3e5, np.float32)).save(tmp_path / "d.tiff")
    whole = [p.read_bytes() for p in sorted(tmp_path.iterdir())]
    for trial in range(400):
        content = bytearray(whole[trial % 4])
        if trial % 3:
            del content[rng.randrange(len(content)):]
        else:
            for _ in range(8):
                content[rng.randrange(len(content))] ^= rng.randrange(256)
        path = tmp_path / f"x{trial}.jpg"
        path.write_bytes(content)
        _, thumbnail, why = pixels.look(path)
        try:
            data.open_image(path)
            opens = None
        except BadInput as error:
            opens = str(error)
        assert (why is None) == (opens is None), (trial, why, opens)
        assert why is None or not thumbnail.any()
        both.append(why is None)
    assert 20 < sum(both) < 380
    assert pixels.look(with_exif(tmp_path / "e.jpg", (0x112, 2, 3, b"up\0")))[2] is None


def test_the_fingerprint_of_images_knows_no_prompts(folder):
    data.write_captions(folder, [("x", "a"), ("x", "b")])
    records = data.read_folder(folder)
    whole, images = data.fingerprint(records), data.image_fingerprint(records)
    records[0].prompts[0] = "y"
    assert data.fingerprint(records) != whole and data.image_fingerprint(records) == images


def test_fingerprint_sees_names_contents_and_prompts(folder):
    data.write_captions(folder, ROWS[:2] + [("x", "c.jpg")])
    first = data.fingerprint(data.read_folder(folder))
    assert first == data.fingerprint(data.read_folder(folder))
    image(9, 90, 90).save(folder / "images" / "c.jpg")
    second = data.fingerprint(data.read_folder(folder))
    data.write_captions(folder, ROWS[:2] + [("y", "c.jpg")])
    assert len({first, second, data.fingerprint(data.read_folder(folder))}) == 3


def test_write_image_is_whole_or_absent(tmp_path):
    pixels = np.asarray(image())
    data.write_image(tmp_path / "deep" / "x.png", pixels)
    np.testing.assert_array_equal(data.open_image(tmp_path / "deep" / "x.png"), pixels)
    with pytest.raises((TypeError, ValueError)):
        data.write_image(tmp_path / "deep" / "y.png", np.zeros((3, 4, 5, 6, 7)))
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["x.png"]


def test_an_image_keeps_its_text(tmp_path):
    text = {"prompt": "größer \U0001fa7a", "bad": "\udce9"}
    data.write_image(tmp_path / "x.png", np.zeros((4, 4, 3), np.uint8), text)
    with Image.open(tmp_path / "x.png") as img:
        assert img.text == text | {"bad": "?"}


def test_a_place_that_cannot_be_written_is_said_at_once(tmp_path):
    (tmp_path / "file").touch()
    data.check_writable(json=tmp_path / "new" / "x.json", sheet=None)
    for path in (tmp_path, tmp_path / "file" / "x.json"):
        with pytest.raises(BadInput, match="--real-stats .*: cannot be written there"):
            data.check_writable(real_stats=path)


def test_a_grid_is_read_row_by_row(tmp_path):
    images = torch.randint(0, 256, (5, 3, 4, 6), dtype=torch.uint8)
    data.write_grid(tmp_path / "grid.png", images)
    sheet = np.asarray(data.open_image(tmp_path / "grid.png")).transpose(2, 0, 1)
    assert sheet.shape == (3, 4 + 2 + 4, 6 + 2 + 6 + 2 + 6)
    np.testing.assert_array_equal(sheet[:, 6:, 8:14], images[4])
    assert (sheet[:, 6:, 16:] == 255).all()
    data.write_grid(tmp_path / "row.png", images, columns=5)
    assert data.open_image(tmp_path / "row.png").size == (5 * 8 - 2, 4)


# ---- data that grows ----

@pytest.mark.parametrize("crop", ["pad", "random"])
@pytest.mark.parametrize("room", [2 << 30, 40_000, 0])
def test_images_are_those_of_load_images_in_any_memory(tmp_path, monkeypatch, crop, room):
    monkeypatch.setattr(data, "IN_MEMORY", room)
    records = many(tmp_path, 60, bad=2)
    want, kept = data.load_images(records, 16, crop, seed=5)
    images = data.Images(records, 16, crop, seed=5)
    assert images.records == kept and len(images) == 58
    for _ in range(2):
        images.begin([7, 1, 2])
        for which in (torch.tensor([3, 1, 3, 57]), slice(50, 70), [9], slice(0)):
            assert torch.equal(images[which], want[which])
    assert torch.equal(images[:], want) and len(images.kept) == min(58, room // (3 * 16 * 16))


def test_images_of_a_part_share_the_memory_of_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "IN_MEMORY", 20 * 3 * 8 * 8)
    records = many(tmp_path, 40)
    parts = data.Images(records[:30], 8, total=40), data.Images(records[30:], 8, total=40)
    assert [part[:] is None or len(part.kept) for part in parts] == [15, 5]


def test_unreadable_images_are_known_and_named_without_reading(folder, monkeypatch, capsys):
    records = many(folder / "images", 40, bad=2)
    time.sleep(0.1)
    with pytest.raises(BadInput, match="more than 5 %"):
        data.Images(records[:10], 8)
    first = data.Images(records, 8)
    duplicates.remembered.clear()
    monkeypatch.setattr(pixels, "opened", None)             # would be an error to call
    capsys.readouterr()
    again = data.Images(records, 8)
    err = capsys.readouterr().err
    assert first.records == again.records == records[2:] and "2 unreadable images of 40" in err
    assert f"skipped {records[1].path}: the file is empty" in err


def test_rows_in_a_file_are_whole_or_absent(tmp_path, capsys):
    rows, file = torch.randn(10, 3, 2).half(), tmp_path / "cache" / "r.safetensors"
    world = training.start("cpu")

    def make(parts):
        return (rows[part] for part in parts)

    def killed(parts):
        yield from make(parts[:2])
        raise KeyboardInterrupt

    def cached_rows(make, n=10, file=file, metadata=None):
        parts = data.batches(n, 4)
        return files.cached_rows(file, "moments", parts, make, metadata or {"names": ["\u00e9"]}, world)

    with pytest.raises(KeyboardInterrupt):
        cached_rows(killed)
    assert list((tmp_path / "cache").iterdir()) == []
    got = cached_rows(make)
    again = cached_rows(None)
    assert torch.equal(got, rows) and torch.equal(again, rows)
    assert torch.equal(files.load_safetensors(file)[0]["moments"], rows)
    files.save_safetensors(tmp_path / "s.safetensors", {"moments": rows}, {"names": ["\u00e9"]})
    assert file.read_bytes() == (tmp_path / "s.safetensors").read_bytes()           # as others write it
    broken = bytearray(file.read_bytes())
    broken[-2:] = b"\xff\xff"  # NaN
    left = file.with_name(".r.99999999000001.safetensors")  # of a process that was killed
    for other in (file.read_bytes()[:-1], b"", broken):
        file.write_bytes(other)
        left.touch()
        assert torch.equal(cached_rows(make), rows)
        assert file in file.parent.iterdir() and not left.exists()
    assert len(cached_rows(make, 4, metadata={"names": []})) == 4
    (tmp_path / "file").touch()
    aside = cached_rows(make, file=tmp_path / "file" / "r.safetensors")
    assert torch.equal(aside, rows) and "not cached: " in capsys.readouterr().err


def resident():
    """Bytes of this process in memory, those of mapped files among them."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
def test_a_map_is_read_without_staying_in_memory(tmp_path):
    part = torch.arange(2 ** 20, dtype=torch.float32).view(4, -1)
    made, world = (part + 4 * i for i in range(100)), training.start("cpu")
    file, parts = tmp_path / "r.safetensors", data.batches(400, 4)
    rows = files.cached_rows(file, "x", parts, lambda parts: made, {}, world)
    assert type(rows[3:5]) is type(rows[[1]]) is type(rows + 1) is torch.Tensor
    before, most = resident(), 0
    for i in np.random.default_rng(0).permutation(400):
        assert rows[[int(i)], 5].item() == 5 + 2 ** 18 * (i % 4) + 4 * (i // 4)
        rows[[int(i)]].sum()
        most = max(most, resident() - before)
    assert most < 250 << 20                                 # of 400 MiB, which were all read


def test_latents_in_a_file_are_those_of_the_images_in_memory(tmp_path):
    (tmp_path / "images").mkdir()
    records, seed, views = many(tmp_path / "images", 70), 3, 2
    torch.manual_seed(0)
    network = vae.VAE(vae.VAEConfig(channels=(8, 8, 8), latent_channels=4))
    args = argparse.Namespace(size=16, crop="pad", seed=seed)
    world = training.start("cpu")
    latents, kept = msdm.latents_of(records, args, network, (), tmp_path / "run", world, 0.4, views)
    images, want = data.load_images(records, 16)[0], torch.empty(70, views, 8, 4, 4, dtype=torch.float16)
    for part in data.batches(70, 32):
        for view in range(views):
            g = torch.Generator().manual_seed(training.step_seed("view", seed, part.start, view))
            with torch.no_grad():
                moments = network.moments(data.augment(data.to_float(images[part]), g, 0.4))
            want[part, view] = torch.cat(moments, dim=1).half()
    assert kept == records and torch.equal(latents, want)


def test_text_states_that_are_too_large_to_keep_are_encoded_with_the_batch(monkeypatch, tmp_path):
    records = [Record(Path(str(i)), str(i), [prompt]) for i, prompt in enumerate(PROMPTS)]
    text = tiny_msdm().text.requires_grad_(False)
    place = "", tmp_path, training.start("cpu")
    kept = CaptionSampler(records, records, text, 1, 0.2, *place, Wording())
    monkeypatch.setattr(CaptionSampler, "CACHE", 3 * text([""])[0].nbytes)     # of 4 prompts
    anew = CaptionSampler(records, records, text, 1, 0.2, *place, Wording())
    assert kept.cache is not None and anew.cache is None
    states = [sampler.encode(training.Batch(**sampler.fields(PROMPTS))) for sampler in (kept, anew)]
    for a, b in zip(*states, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_a_training_in_little_memory_is_the_same_and_a_second_start_reads_no_image(tmp_path, monkeypatch):
    (tmp_path / "data/images").mkdir(parents=True)
    records = many(tmp_path / "data/images", 200)
    data.write_captions(tmp_path / "data", [(f"an image with {i % 7} polyps", r.name)
                                            for i, r in enumerate(records)])
    time.sleep(0.1)

    def train(name):
        common = ["--data", str(tmp_path / "data"), "--size", "32", "--steps", "3", "--batch-size", "8",
                  "--device", "cpu"]
        vae.main([*common, "--preset", "tiny", "--perceptual", "off", "--crop", "random",
                  "--out", str(tmp_path / f"vae-{name}")])
        msdm.main([*common, "--preset", "tiny", "--vae", str(tmp_path / "vae-whole/best.safetensors"),
                   "--shown", "0", "--out", str(tmp_path / f"msdm-{name}")])
        return [files.load_safetensors(tmp_path / f"{kind}-{name}" / "last.safetensors")[0]
                for kind in ("vae", "msdm")]

    whole = train("whole")
    monkeypatch.setattr(data, "IN_MEMORY", 20_000)          # six images of 200
    small = train("small")
    for a, b in zip(whole, small, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    for name in ("opened", "look", "compare", "encode_latents"):
        place = next(m for m in (pixels, duplicates, msdm) if hasattr(m, name))
        monkeypatch.setattr(place, name, None)              # would be an error to call
    monkeypatch.setattr(duplicates, "look", None)
    duplicates.remembered.clear()                           # as a new process
    assert all(torch.equal(a[k], b[k]) for a, b in zip(train("small"), small, strict=True) for k in a)


# ---- check and the command line ----

def test_check_reports_everything_by_name(folder, capsys):
    for i in range(20):
        image(50 + i).save(folder / "images" / f"n{i}.png")
    (folder / "images" / "copy.png").write_bytes((folder / "images" / "b.png").read_bytes())
    rows = [*ROWS, ("Draw me a sheep.", "copy.png"), *((ROWS[0][0], f"n{i}") for i in range(20))]
    data.write_captions(folder, rows)
    assert data.main(["check", "--data", str(folder)]) == 0
    out = capsys.readouterr().out
    for line in ("23 images, 24 prompts, 4 distinct, 1 to 2 an image", "48x32 (23)", "b.png = copy.png",
                 "b.png ~ copy.png", "1 images without a prompt\n    c.jpg", "1 x Draw me a sheep.",
                 "usable"):
        assert line in out
    (folder / "images" / "n0.png").write_bytes(b"")
    assert data.main(["check", "--data", str(folder)]) == 0                # 1 of 23 is still below 5 %
    assert "1 unreadable images\n    " + str(folder / "images" / "n0.png") in capsys.readouterr().out


def test_check_says_what_is_held_out_cut_and_not_read(folder, capsys):
    image().save(folder / "images" / "d.tif")
    rows = [("a polyp " * 31 + "and the end", "a"), ("a polyp " * 31, "b"), ("x", "d.tif")]
    data.write_captions(folder, rows)
    assert data.main(["check", "--data", str(folder)]) == 1
    out = capsys.readouterr().out
    for line in ("1 images would be held out of training, the largest group of near-duplicates has 0",
                 "row 4: d.tif: the file is there, but only .jpg, .jpeg, .png are read",
                 "1 distinct prompts of more than 62 words", "1 x without: and the end", "    d.tif\n"):
        assert line in out


@pytest.mark.parametrize("row, expected", [("x;lost.jpg", "1 rows without their image\n    row 5: lost.jpg"),
                                           (" ;c", "1 rows with an unusable prompt\n    row 5: c: the")])
def test_check_says_what_makes_a_folder_unusable(folder, capsys, row, expected):
    data.write_captions(folder, ROWS)
    with open(folder / "prompt-gt.csv", "a") as f:
        f.write(row + "\n")
    assert data.main(["check", "--data", str(folder)]) == 1
    out = capsys.readouterr().out
    assert expected in out and "unusable: " in out


def test_check_of_too_many_broken_images(folder, capsys):
    broken = broken_files(folder / "images")[:-1]
    data.write_captions(folder, [("x", p.name) for p in broken])
    assert data.main(["check", "--data", str(folder)]) == 1
    out = capsys.readouterr().out
    assert "4 unreadable images" in out and all(p.name in out for p in broken)


@pytest.mark.parametrize("make, status, word", [(lambda f: None, 2, "error: "),
                                                (lambda f: data.write_captions(f, [("x", "none.jpg")]), 1,
                                                 ""),
                                                (lambda f: data.write_captions(f, ROWS), 0, "")])
def test_exit_status(folder, capsys, monkeypatch, make, status, word):
    make(folder)
    monkeypatch.setattr(sys, "argv", ["data.py", "check", "--data", str(folder)])
    with pytest.raises(SystemExit) as stop:
        data.run_command(data.main)
    assert (stop.value.code or 0) == status and capsys.readouterr().err.startswith(word)


# ---- real images ----

@real_images
def test_the_near_duplicates_of_kvasir_are_found_and_no_others():
    records = [Record(p, p.name, []) for p in data.list_images(KVASIR)]
    pairs = [("cju30bmab08bi0835mvlr6e0r", "cju77k828z46w0871r0avuoo9"),
             ("cju5fydrud94708507vo6oy21", "cju7avvi51iox0817ym55y6tt"),
             ("cju76lsehyia10987u54vn8rb", "cju772304yw5t0818vbw8kkjf"),
             ("cju886ryxnsl50801r93jai7q", "cju8amfdtqi4x09871tygrgqe")]
    found = [tuple(records[i].path.stem for i in group) for group in data.near_duplicates(records)]
    assert sorted(found) == pairs
    train, val = data.split(records)
    assert abs(len(val) - 85) <= 1 and len(train) + len(val) == 850


@real_images
def test_the_real_prompts_read_as_a_captions_file(folder):
    with open(KVASIR.parent / "medvqa-gi-2024-prompts.csv", encoding="utf-8") as f:
        texts = [row["prompt"] for row in csv.DictReader(f)][:500]
    data.write_captions(folder, [(text, "a") for text in texts])
    assert data.read_folder(folder)[0].prompts == texts


# Prompts for the sampler


def read_prompts(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    return data.read_prompts(tmp_path / name)


def test_prompts_come_out_of_a_file_as_other_programs_write_it(tmp_path):
    assert read_prompts(tmp_path, "p.txt", b"\xef\xbb\xbfone\r\n\r\n two \n") == ["one", "two"]
    within = "a\u2028b\u0085c\fd"                           # one prompt: no other editor ends a line there
    assert read_prompts(tmp_path, "p.txt", f"{within}\rnext\n".encode()) == [within, "next"]
    assert read_prompts(tmp_path, "p.csv",
                        b'\xef\xbb\xbfFilename,Prompt\r\na,"one, or two"\r\n\r\nb,three\r\n') == \
        ["one, or two", "three"]


@pytest.mark.parametrize("content, said", [
    (b"", "row 1: expected a column prompt or text or caption, got ''"),
    (b"Name;Filename\nx;y\n", "row 1: expected a column prompt or text or caption, got 'Name;Filename'"),
    (b"Filename,Prompt\na,x\nb\n", "row 3: expected 2 fields"),
    (b"Prompt\nin the upper-left, center\n",
     "row 2: expected 1 field, got 2; a prompt that holds a ',' must be quoted"),
    (b"Filename,Prompt\na,\n", "row 2: the prompt is empty"),
    (b"Prompt\n\xff\n", "not UTF-8"),
])
def test_a_prompts_file_that_cannot_be_used_is_named_with_its_row(tmp_path, content, said):
    with pytest.raises(BadInput, match=said):
        read_prompts(tmp_path, "p.csv", content)
