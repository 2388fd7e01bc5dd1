"""The script for whoever has the published folders, run on tiny ones."""

from command import BadInput

import hashlib

import published
import pytest
from helpers import fixture

import data
from kandinsky import Kandinsky3

FOLDERS = [f"kandinsky-{name}" for name in ("2-2-prior", "2-2-decoder", "3")]
SMALL = ["--size", "64", "--steps", "2", "--device", "cpu"]


def parts(out):
    """{(folder, part): number of parameters} of the lines that were printed."""
    rows = [line.split(": ") for line in out.splitlines() if "parameters" in line]
    return {(row[0].rpartition("/")[2], row[1]): row[2].split()[0] for row in rows}


def test_tiny_folders_load_draw_and_have_other_sizes(tmp_path, capsys):
    folders = [str(fixture(name)) for name in FOLDERS]
    assert published.main([*folders, *SMALL, "--out", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert out.count("ANOTHER NUMBER") == 8 and out.count("sha256") == 2
    image = Kandinsky3.from_pretrained(folders[2]).sample([published.PROMPT], seed=0, steps=2, height=64,
                                                          width=64)
    assert hashlib.sha256(image.numpy().tobytes()).hexdigest() in out
    drawn = data.open_image(tmp_path / "kandinsky-3.png").tobytes()
    assert drawn == image[0].permute(1, 2, 0).numpy().tobytes()


def test_the_documented_sizes_are_no_difference(monkeypatch, capsys):
    published.main([str(fixture(FOLDERS[0])), *SMALL])
    tiny = parts(capsys.readouterr().out)
    assert tiny.keys() == {k for k in published.documented() if k[0] == FOLDERS[0]}
    monkeypatch.setattr(published, "documented", lambda: tiny)
    assert published.main([str(fixture(FOLDERS[0])), *SMALL]) == 0
    out = capsys.readouterr().out
    assert out.count(": the same") == 3 and "no image of Kandinsky 2.2: it needs both folders" in out


def test_every_part_is_in_the_table_of_the_documentation():
    assert published.documented().keys() == {(k, row[0]) for k, v in published.LOADERS.items() for row in v}
    assert published.documented()["kandinsky-2-2-prior", "prior"] == "1,026,225,920"


@pytest.mark.parametrize("folders", [["."], [FOLDERS[0]] * 2])
def test_other_folders_are_refused(folders):
    with pytest.raises(BadInput, match="expected"):
        published.main([*(str(fixture(f)) if f in FOLDERS else f for f in folders), *SMALL])
