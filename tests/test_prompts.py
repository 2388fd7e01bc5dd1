"""The grammar reads what it writes, every real prompt of the task, and plain English beside them."""

import csv
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prompts import (
    CELL_ORDER,
    CELLS,
    COLORS,
    NAMES,
    PARIS,
    SENTENCES,
    SIZES,
    mirror,
    paraphrase,
    parse,
    write,
)

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "medvqa-gi-2024-prompts.csv"
SLIPS = {  # the real prompts that parse and write do not give back letter by letter, and their meaning
    "Generate an image with Pink findings.": {"colors": ["pink"]},  # a color in the place of the number
    "Generate an image with an abnormality with the color pale pink.": {"colors": ["pink"]},
    "Generate an image with an abnormality with the color pink/red.": {"colors": ["pink", "red"]},
    "Generate an image with an abnormality with the colors ink, white and brown.":
        {"colors": ["pink", "white", "brown"]},
}
SAMPLE = [
    {"contains": ["polyp"]}, {"contains": ["polyp", "oesophagitis"]}, {"contains": ["polyp snare", "tube"]},
    {"contains": ["z-line"]}, {"n_findings": 0}, {"n_findings": 1}, {"n_instruments": 2}, {"n_polyps": 16},
    {"n_polyps": 40}, {"box": True}, {"box": False}, {"text": True}, {"text": False},
    {"procedure": "colonoscopy"},
    {"procedure": "gastroscopy"}, {"colors": ["pink"]}, {"colors": list(COLORS)}, {"sizes": ["< 5mm"]},
    {"sizes": list(SIZES)}, {"paris": ["iia"]}, {"paris": list(PARIS)}, {"abnormality_cells": ["center"]},
    {"instrument_cells": ["upper-left", "center-left"]}, {"landmark_cells": list(CELLS)},
    {"n_polyps": 2, "box": False, "procedure": "colonoscopy", "instrument_cells": ["lower-right"]},
]
SALAD = ("no not and or , with polyp polyps 2 two text is red white center upper-left >20mm paris instruments"
         " . generate")


def some(values):
    return st.lists(st.sampled_from(values), min_size=1, unique=True)


ATTRIBUTES = st.fixed_dictionaries({}, optional={
    "contains": some(list(NAMES)),
    "n_findings": st.integers(0, 40), "n_instruments": st.integers(0, 40), "n_polyps": st.integers(0, 40),
    "box": st.booleans(), "text": st.booleans(), "colors": some(COLORS), "sizes": some(SIZES),
    "paris": some(PARIS),
    "procedure": st.sampled_from(("colonoscopy", "gastroscopy")),
    "abnormality_cells": some(CELLS), "instrument_cells": some(CELLS), "landmark_cells": some(CELLS)})


@pytest.fixture(scope="module")
def real():
    if not REAL.exists():
        pytest.skip(f"the task's prompts are not at {REAL}")
    with open(REAL, encoding="utf-8-sig", newline="") as f:
        return sorted({row["prompt"] for row in csv.DictReader(f)})


@pytest.mark.parametrize(("attributes", "prompt"), [
    ({"contains": ["polyp"]}, "Generate an image containing a polyp."),
    ({"contains": ["polyp", "oesophagitis"]}, "Generate an image containing a polypandoesophagitis."),
    ({"contains": ["barretts"]}, "Generate an image containing barretts."),
    ({"contains": ["z-line"]}, "Generate an image containing the z-line."),
    ({"n_findings": 1}, "Generate an image with 1 finding."),
    ({"n_polyps": 0}, "Generate an image with no polyps."),
    ({"n_instruments": 2}, "Generate an image with 2 instruments."),
    ({"box": False}, "Generate an image not containing a green/black box artefact."),
    ({"text": True}, "Generate an image containing text."),
    ({"colors": ["pink"]}, "Generate an image with an abnormality with the color pink."),
    ({"colors": ["red", "pink", "grey"]},
     "Generate an image with an abnormality with the colors red, pink and grey."),
    ({"sizes": ["< 5mm"]}, "Generate an image with a polyp of size < 5mm."),
    ({"sizes": ["5-10mm", ">20mm"]}, "Generate an image with polyps of size 5-10mm and >20mm."),
    ({"paris": ["is"]}, "Generate a polyp of type paris is."),
    ({"paris": ["is", "iia"]}, "Generate polyps of type paris is and paris iia."),
    ({"procedure": "gastroscopy"}, "Generate an image from a gastroscopy procedure."),
    ({"abnormality_cells": ["center", "upper-left"]},
     "Generate an image with an an abnormality located in the center and upper-left."),
    ({"instrument_cells": ["lower-center"]},
     "Generate an image with an an instrument located in the lower-center."),
    ({"landmark_cells": ["center", "lower-left", "lower-right"]},
     "Generate an image with an an anatomical landmark located in the center, lower-left and lower-rigth."),
    ({"n_polyps": 1, "contains": ["tube"]},
     "Generate an image containing tube. Generate an image with 1 polyp."),
    ({}, ""),
])
def test_canonical_prompts(attributes, prompt):
    assert write(attributes) == prompt
    assert parse(prompt) == attributes


@given(ATTRIBUTES)
@settings(deadline=None)
def test_parse_reads_what_write_writes(attributes):
    assert parse(write(attributes)) == attributes


def test_unknown_attributes_are_refused():
    with pytest.raises(ValueError, match="n_cats"):
        write({"n_cats": 3})


def test_all_real_prompts_are_understood_and_paraphrased(real):
    check_paraphrases(real)
    assert len(real) == 483
    assert {p: parse(p) for p in real if write(parse(p)) != p} == SLIPS
    assert all(parse(p) for p in real)
    for p in real:
        a = parse(p)
        assert len(a) == 1, p
        for key in ("abnormality_cells", "instrument_cells"):
            assert a.get(key, []) == [c for c in CELL_ORDER if c in a.get(key, [])], p
        assert set(a.get("colors", [])) <= set(COLORS) and set(a.get("contains", [])) <= set(NAMES), p


@pytest.mark.parametrize(("text", "attributes"), [
    ("a colonoscopy picture showing two polyps", {"n_polyps": 2, "procedure": "colonoscopy"}),
    ("no instruments visible", {"n_instruments": 0}),
    ("three findings are visible", {"n_findings": 3}),
    ("GENERATE AN IMAGE WITH  2 POLYPS", {"n_polyps": 2}),
    ("generate an image with 1 polyp, generate an image with no instruments",
     {"n_polyps": 1, "n_instruments": 0}),
    ("Generate an image with 1 polyp.Generate an image not containing text.", {"n_polyps": 1, "text": False}),
    ("Polyps: 2, instruments: none, text: no", {"n_polyps": 2, "n_instruments": 0, "text": False}),
    ("The number of polyps is three", {"n_polyps": 3}),
    ("Two large red and white polyps", {"n_polyps": 2, "colors": ["red", "white"]}),
    ("A polyp in the upper left and an instrument in the bottom-right corner",
     {"contains": ["polyp"], "abnormality_cells": ["upper-left"], "instrument_cells": ["lower-right"]}),
    ("In the middle of the image, an abnormality is seen", {"abnormality_cells": ["center"]}),
    ("an upper-left lesion, a lower-right tool",
     {"abnormality_cells": ["upper-left"], "instrument_cells": ["lower-right"]}),
    ("A polyp measuring between 11 and 20 millimetres", {"sizes": ["11-20mm"]}),
    ("polyps of size 5-10 and 11-20mm", {"sizes": ["5-10mm", "11-20mm"]}),
    ("a 7 mm polyp and a polyp larger than 20mm", {"sizes": ["5-10mm", ">20mm"]}),
    ("a sessile polyp, Paris classification Is", {"paris": ["is"]}),
    ("its Paris type is Ip polyp", {"paris": ["ip"]}),
    ("esophagitis and Barrett's esophagus", {"contains": ["oesophagitis", "barretts"]}),
    ("text in the lower left, and a green box artifact in the lower right", {"text": True, "box": True}),
    ("an image with red text", {"text": True}),
    ("a polyp snare around the caecum", {"contains": ["polyp snare", "cecum"]}),
    ("an image of a gastroscopy without text", {"procedure": "gastroscopy", "text": False}),
    ("no text in this colonoscopy", {"procedure": "colonoscopy", "text": False}),
    ("Generate an image containing haemorrhoids.", {"contains": ["haemorrhoids"]}),
])
def test_plain_english(text, attributes):
    assert parse(text) == attributes


@pytest.mark.parametrize(("text", "attributes"), [
    ("no polyps or instruments", {"n_polyps": 0, "n_instruments": 0}),
    ("neither text nor a green box", {"text": False, "box": False}),
    ("without polyps but with text", {"n_polyps": 0, "text": True}),
    ("no polyps, 2 instruments", {"n_polyps": 0, "n_instruments": 2}),
    ("a text-free image with one instrument", {"text": False, "n_instruments": 1}),
    ("A polyp is visible, text is not", {"contains": ["polyp"], "text": False}),
    ("the text overlay isn't visible", {"text": False}),
    ("Do not generate an image with text", {"text": False}),
    ("instruments are absent", {"n_instruments": 0}),
    # ambiguous: nothing more is claimed than is said
    ("no polyps and text", {"n_polyps": 0}),
    ("polyps and instruments are absent", {"n_instruments": 0}),
    ("no polyp in the center", {}),
    ("no red polyps", {}),
    ("the polyp is red, not white", {"contains": ["polyp"], "colors": ["red"]}),
    ("a red or white polyp", {"contains": ["polyp"]}),
    ("one or two polyps", {"contains": ["polyp"]}),
    ("at least two polyps", {}),
    ("several polyps", {"contains": ["polyp"]}),
    ("a polyp or a tube", {}),
    ("a polyp in the center or text", {}),
    ("not without text", {}),
    ("perhaps a polyp", {}),
    ("2 images with a polyp", {"contains": ["polyp"]}),
    ("1 polyp. 2 polyps.", {}),
    ("no oesophagitis", {}),
])
def test_negation_and_ambiguity(text, attributes):
    assert parse(text) == attributes


@pytest.mark.parametrize("text", ["", " ", "a photo of a cat", "red", "Generate an image.", "in the center",
                                  "?!", "7"])
def test_unknown_prompts_say_nothing(text):
    assert parse(text) == {}
    assert paraphrase(text, 5, 0) == [text]


@given(st.text() | st.lists(st.sampled_from(SALAD.split())).map(" ".join))
@settings(deadline=None)
def test_any_text_gives_attributes_that_can_be_written(text):
    attributes = parse(text)
    assert attributes.keys() <= SENTENCES.keys()
    write(attributes)


def check_paraphrases(prompts, n=25):
    for p in prompts:
        out = paraphrase(p, n, seed=0)
        assert len(set(out)) == n and p not in out, p
        assert all(parse(q) == parse(p) for q in out), p


def test_paraphrases_keep_the_attributes():
    check_paraphrases([write(a) for a in SAMPLE])


def test_paraphrases_depend_on_the_seed_alone():
    prompt = write(SAMPLE[0])
    assert paraphrase(prompt, 10, 1) == paraphrase(prompt, 20, 1)[:10]
    assert paraphrase(prompt, 10, 1) != paraphrase(prompt, 10, 2)
    assert paraphrase(prompt, 0, 1) == []


def test_a_name_that_the_frames_do_not_know_comes_back_alone():
    prompt = "Generate an image containing haemorrhoids."
    assert paraphrase(prompt, 5, 0) == [prompt]


@pytest.mark.parametrize(("prompt", "expected"), [
    ("Generate an image with no polyps.", r"(?!.*(separate|distinct|polyps? is)).*polyps"),  # of none
    ("Generate an image with 1 polyp.", r"(?!.*(separate|distinct|polyps|\bare\b)).*polyp"),
    ("Generate an image with 5 polyps.", r"[A-Z](?!.*polyps is)"),  # no sentence begins with a figure
    ("Generate an image containing biopsy forceps.", r"(?!.*(a biopsy|is (visible|seen)))"),
    ("Generate an image containing polyp snareandtube.", r".*\b[Aa] (polyp(ectomy)? )?snare and a tube"),
    ("Generate an image containing injection needle.", r".*\b[Aa](n injection)? needle"),
    ("Generate an image containing the z-line.", r"(?!There).*\bthe [zZ]-line\b|The [zZ]-line"),
    ("Generate an image with an abnormality with the colors orange and red.",
     r".*(An|an) orange and red|.*orange and red"),
    ("Generate an image from a colonoscopy procedure.", r"(?!A image|.*endoscopic (image|photo))"),
])
def test_paraphrases_are_english(prompt, expected):
    for text in paraphrase(prompt, 100, 0):
        assert re.match(expected, text) and text.endswith(".") and "  " not in text, text
        assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou1]|\ban? an?\b", text), text


@pytest.mark.parametrize("name", ["{it}", "{nobody}", "{", "haemorrhoids"])
def test_braces_in_a_prompt_are_no_frames(name):
    prompt = f"Generate an image containing {name}."
    assert paraphrase(prompt, 3, 0) == [prompt]


AXES = ("horizontal", "vertical", "both")


@pytest.mark.parametrize(("prompt", "axis", "mirrored"), [
    ("upper-left", "horizontal", "upper-right"), ("upper-left", "vertical", "lower-left"),
    ("upper-left", "both", "lower-right"), ("center", "both", "center"),
    ("upper-center", "horizontal", "upper-center"), ("center-right", "horizontal", "center-left"),
    ("Two large polyps, one in the Top LEFT, below 5mm", "both",
     "Two large polyps, one in the Bottom RIGHT, below 5mm"),
    ("Generate an image with an an anatomical landmark located in the lower-left.", "horizontal",
     "Generate an image with an an anatomical landmark located in the lower-rigth."),
    ("Generate an image with Pink findings.", "both", "Generate an image with Pink findings."),
])
def test_the_sides_of_a_prompt_are_mirrored_and_the_rest_is_kept(prompt, axis, mirrored):
    if prompt in CELLS:
        prompt, mirrored = (write({"abnormality_cells": [cell]}) for cell in (prompt, mirrored))
    assert mirror(prompt, axis) == mirrored


@pytest.mark.parametrize("axis", AXES)
def test_a_real_prompt_mirrored_twice_is_itself_and_its_parse_the_mirrored_parse(real, axis):
    assert len(real) == 483
    paraphrased = [q for p in real[::7] for q in paraphrase(p, 5, 0)]
    for p in real + paraphrased:
        assert mirror(mirror(p, axis), axis) == p
        assert parse(mirror(p, axis)) == mirror(parse(p), axis)
    assert sum(mirror(p, axis) != p for p in real) > 200


@given(ATTRIBUTES, st.sampled_from(AXES))
@settings(deadline=None)
def test_attributes_and_what_is_written_of_them_are_mirrored_alike(attributes, axis):
    mirrored = mirror(attributes, axis)
    assert mirror(mirrored, axis) == attributes and mirrored.keys() == attributes.keys()
    assert parse(mirror(write(attributes), axis)) == mirrored


@pytest.mark.parametrize("text", [
    "a polyp on the left", "the right colon", "upper endoscopy of a polyp", "a polyp at 3 o'clock",
    "a left-sided polyp", "the upper half is red", "a polyp under a fold", "a polyp in the upperleft",
    "a polyp left of the one in the upper-right", "the topmost polyp", "it moves downwards",
    "a polyp in the northwest", "a polyp in the southwestern quadrant", "a polyp in the NW corner",
    "a polyp at 3 oclock", "a polyp at 9:00", "a polyp in the first quadrant"])
def test_what_names_a_side_outside_the_grammar_is_not_mirrored(text):
    assert [mirror(text, axis) for axis in AXES] == [None] * 3


def test_what_names_no_side_stays_as_it_is():
    for text in ("", "a photo of a cat", "polyps of over 20mm", "perhaps a polyp", "no polyp in the center"):
        assert [mirror(text, axis) for axis in AXES] == [text] * 3
