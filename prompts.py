"""The grammar of the task's prompts: parse a text into attributes, write attributes as text, paraphrase,
mirror the places.

The prompts of ImageCLEFmed MEDVQA-GI 2024 are sentences such as "Generate an image with 2 polyps.".
Attributes are a dict that holds only what a prompt mentions:

    contains                               names: "polyp", "oesophagitis", "tube", ... (NAMES, others as is)
    n_findings, n_instruments, n_polyps    int; "no polyps" is 0
    box, text                              bool; box is the green/black box artefact
    colors, sizes, paris                   lists; colors of an abnormality, sizes and Paris types of polyps
    procedure                              "colonoscopy" or "gastroscopy"
    abnormality_cells, instrument_cells, landmark_cells    lists of names of the 3x3 grid (CELLS)

parse works on words, not on templates, so that it covers paraphrases too. Each sentence goes through three
passes:

    _tokenise            words and phrases become tokens (LEXICON)
    _attach_modifiers    places, colors, sizes, types and numbers are assigned to the nouns that they qualify
    _resolve_negation    every noun becomes True (present), False (denied) or None (left open)

For "no text, two red polyps in the center":

    _tokenise            no  noun:text  and  count:2  color:red  noun:polyp  word:in  cell:center
    _attach_modifiers    text []  polyp [2, red, center]
    _resolve_negation    text False  polyp True
    parse                {"n_polyps": 2, "text": False, "colors": ["red"], "abnormality_cells": ["center"]}

Where a sentence is ambiguous ("no polyps and text", "one or two polyps", "no polyp in the center"), parse
leaves the attribute out. Lists keep the order of the text, so that write(parse(prompt)) is the prompt again.
"""

import random
import re
import unicodedata
from dataclasses import dataclass, field
from itertools import groupby

CELLS = ("upper-left", "upper-center", "upper-right", "center-left", "center", "center-right",
         "lower-left", "lower-center", "lower-right")
SIZES = ("< 5mm", "5-10mm", "11-20mm", ">20mm")
PARIS = ("is", "ip", "iia")
# the most frequent first
COLORS = ("pink", "red", "white", "yellow", "grey", "orange", "brown", "black", "blue", "purple", "green",
          "violet", "burgundy")
# the data's order of the cells of abnormalities and instruments
CELL_ORDER = ("center", "upper-left", "upper-right", "lower-left", "lower-right", "center-left",
              "center-right", "upper-center", "lower-center")

NAMES = {  # what an image can contain: its kind and its spellings; "polyp snare" must precede "polyp"
    "polyp snare": ("instrument", r"(?:polyp )?snares?"),
    "biopsy forceps": ("instrument", r"(?:biopsy )?forceps"),
    "metal clip": ("instrument", r"metal(?:lic)? clips?"),
    "injection needle": ("instrument", r"(?:injection )?needles?"),
    "tube": ("instrument", r"tubes?"),
    "polyp": ("abnormality", r"polyps?"),
    "ulcerative colitis": ("abnormality", r"(?:ulcerative )?colitis"),
    "oesophagitis": ("abnormality", r"o?esophagitis"),
    "barretts": ("abnormality", r"barrett'?s?(?: o?esophagus)?"),
    "z-line": ("landmark", r"z[- ]?line"),
    "cecum": ("landmark", r"ca?ecum"),
    "ileum": ("landmark", r"ileum"),
    "pylorus": ("landmark", r"pylorus"),
}
KIND = {name: kind for name, (kind, _) in NAMES.items()} | {
    "finding": "abnormality", "abnormality": "abnormality",
    "instrument": "instrument", "landmark": "landmark",
    "text": "text", "box": "box", "colonoscopy": "procedure", "gastroscopy": "procedure"}
ARTICLES = {"polyp": "a ", "z-line": "the ", "cecum": "the ", "ileum": "the ", "pylorus": "the "}
COUNTED = {"finding": "n_findings", "instrument": "n_instruments", "polyp": "n_polyps"}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
           "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
           "twenty")


# Writing: the data's own sentences, typos included


def _and(words, last=" and "):
    return last.join((", ".join(words[:-1]), words[-1])) if len(words) > 1 else words[0]


def _count(noun):
    return lambda n: f"Generate an image with {n or 'no'} {noun}{'' if n == 1 else 's'}."


def _whether(thing):
    return lambda yes: f"Generate an image {'' if yes else 'not '}containing {thing}."


def _place(noun):
    return lambda cells: f"Generate an image with an an {noun} located in the {_and(cells)}."


def _polyps(values):
    return "a polyp" if len(values) == 1 else "polyps"


SENTENCES = {  # in the data's order
    "contains": lambda names:
        f"Generate an image containing {ARTICLES.get(names[0], '')}{'and'.join(names)}.",
    "n_findings": _count("finding"),
    "n_instruments": _count("instrument"),
    "n_polyps": _count("polyp"),
    "box": _whether("a green/black box artefact"),
    "text": _whether("text"),
    "colors": lambda colors:
        f"Generate an image with an abnormality with the color{'s' * (len(colors) > 1)} {_and(colors)}.",
    "sizes": lambda sizes: f"Generate an image with {_polyps(sizes)} of size {_and(sizes)}.",
    "paris": lambda types: f"Generate {_polyps(types)} of type {_and([f'paris {t}' for t in types])}.",
    "procedure": lambda name: f"Generate an image from a {name} procedure.",
    "abnormality_cells": _place("abnormality"),
    "instrument_cells": _place("instrument"),
    "landmark_cells": lambda cells:
        _place("anatomical landmark")(cells).replace("lower-right", "lower-rigth"),
}


def write(attributes: dict) -> str:
    """The canonical prompt: one sentence per idea, joined by spaces. Lists are written in the order given."""
    return " ".join(SENTENCES[key](value) for key, value in _ideas(attributes))


def _ideas(attributes):
    """(key, value) per sentence. Neighbours of one kind in `contains` share one: "polyp snareandtube"."""
    if unknown := attributes.keys() - SENTENCES.keys():
        raise ValueError(f"expected attributes among {', '.join(SENTENCES)}, "
                         f"got {', '.join(sorted(unknown))}")
    for key in SENTENCES:
        value = attributes.get(key, [])
        if key == "contains":
            for _, names in groupby(value, key=lambda name: KIND.get(name, name)):
                yield key, list(names)
        elif value != []:
            yield key, value


# Parsing


SPELLING = [(re.compile(pattern), better) for pattern, better in (
    (r"[\u2010-\u2015\u2212]", "-"), (r"\u2019", "'"), (r"n't\b", " not"), (r"\bcannot\b", "can not"),
    (r"rigth", "right"), (r"\b(?:centre|middle|central)\b", "center"),
    (r"\btop\b", "upper"), (r"\bbottom\b", "lower"),
    (r"\bgray\b", "grey"), (r"\bcolors? ink\b", "color pink"),
    (r"\b(red|pink|grey|brown|yellow)d?ish\b", r"\1"),
    (r" ?millimet(?:er|re)s?\b", "mm"), (r"-free\b", " free"),
    (rf"(?<=[a-z])and(?={'|'.join(pattern for _, pattern in NAMES.values())})", " and "),  # "snareandtube"
)]
SENTENCE_END = re.compile(r"[;!?]|(?<!\d)\.|\.(?!\d)|(?<!not )(?<!to )\b(?=generate\b)")

_N = rf"(?:\d{{1,3}}|{'|'.join(NUMBERS[1:])})"
_LESS = r"(?:<=?|under|below|(?:less|smaller) than)"
_MORE = r"(?:>=?|over|above|(?:more|larger|bigger|greater) than)"
_MM = r"(?: ?mm|(?=,? (?:and|or)|, ))"  # the unit may wait: "5-10 and 11-20mm"
_TYPE = r"paris[ -](?:(?:class(?:ification)?|types?|category) )*(?:is (?=(?:0-)?i))?(?:0-)?"
_SHOW = "|".join(rf"{verb}(?:e|es|s|ing)?" for verb in (
    "show", "contain", "includ", "depict", "display", "reveal", "featur"))

LEXICON = [  # kind, value (None: the text itself), pattern; where several match at one place, the first wins
    ("noun", "box", r"(?:green|black)(?: ?(?:/|-|and/or|and|or)? ?(?:black|green))? box(?:es)?(?: overlay)?"),
    ("noun", "box", r"box(?= art[ei]facts?)"),
    ("size", "< 5mm", rf"{_LESS} ?5 ?mm"),
    ("size", "5-10mm", rf"between 5(?: ?mm)? and 10 ?mm|5(?: ?mm)? ?(?:-|to) ?10{_MM}"),
    ("size", "11-20mm", rf"between 11(?: ?mm)? and 20 ?mm|11(?: ?mm)? ?(?:-|to) ?20{_MM}"),
    ("size", ">20mm", rf"{_MORE} ?20 ?mm"),
    ("size", "", rf"(?:{_LESS}|{_MORE}|up to|at (?:least|most)|about) ?\d+(?:\.\d+)? ?[mc]m"
                 r"|\d+(?:\.\d+)? ?cm"),
    ("size", None, r"\d+(?:\.\d+)? ?mm"),
    ("paris", "iia", rf"(?:{_TYPE}|0-)?iia"),
    ("paris", "ip", rf"(?:{_TYPE}|0-)?ip"),
    ("paris", "is", rf"(?:{_TYPE}|0-|(?<=i[pa] and )|(?<=i[pa], ))is"),  # any other "is" is a verb
    *(("cell", cell, rf"{a}[- ]?{b}|{b}[- ]?{a}")
      for cell in CELLS if "-" in cell for a, b in [cell.split("-")]),
    ("cell", "center", r"center"),
    *(("noun", name, pattern) for name, (_, pattern) in NAMES.items()),
    ("noun", "finding", r"findings?"),
    ("noun", "abnormality", r"abnormalit(?:y|ies)|lesions?|anomal(?:y|ies)"
                            r"|abnormal (?:area|region|spot|tissue)s?"),
    ("noun", "instrument", r"(?:instrument|tool|device)s?"),
    ("noun", "landmark", r"landmarks?"),
    ("noun", "text", r"text(?:s|ual)?(?: (?:overlay|annotation|label|element)s?)?"
                     r"|lettering|captions?|annotations?"),
    ("noun", "colonoscopy", r"colonoscop(?:y|ic|ies)"),
    ("noun", "gastroscopy", r"gastroscop(?:y|ic|ies)"),
    ("open", "", r"(?:(?:no )?(?:more|fewer|less) than|at (?:least|most)|up to|over|about|around|roughly)"
                 rf" {_N}"),
    ("open", "", r"couple of|possibl[ey]|maybe|perhaps|might|may|either|suspected|if|whether"),
    ("word", None, r"not only"),
    ("not", "", r"no(?= ?(?:,|$))"),  # "text: no"
    ("no", "", r"no|without|neither|never|lack(?:s|ing)?(?: of)?|absence of|devoid of|free (?:of|from)"),
    ("no", "", r"exclud(?:e|es|ing)|omit(?:s|ting)?|avoid(?:s|ing)?|leav(?:e|es|ing) out"),
    ("not", "", r"(?:(?:is|are|was|were|does|do|did|can|should|must) )?not"),
    ("not", "", r"(?:(?:is|are) )?(?:absent|missing|nowhere|free|none|zero|0)"),
    ("yes", "", rf"{_SHOW}|with|ha(?:s|ve|ving)|see|there (?:is|are)|but|however|while|whereas|yet"),
    ("or", "", r"and/or|or|nor"),
    ("and", "", r"and|as well as|plus"),
    ("scene", "", r"(?:image|picture|photo|frame|view|still|scene)s?"),
    ("count", None, rf"(?<!-)(?:{_N}|single|sole|solitary|pair of)(?! (?:of|can|could|should)\b|[-:%])"),
    ("color", None, rf"(?:{'|'.join(COLORS)})(?! (?:frame|border|background|light|corner|mucosa))"),
    ("filler", "", r"an?|the|any|some|colou?red|sized?"),
    ("word", None, r"[\w'-]+"),
]
LEXER = re.compile(rf"(?<![\w.])(?:{'|'.join(f'({pattern})' for _, _, pattern in LEXICON)})(?!\w)|([,&/+])")
LEXICON.append(("and", "", "the last group above"))
MODIFIERS = ("cell", "color", "size", "paris", "count")
COUNTING = ("count", "number", "total", "is", "are", "of")


@dataclass
class Token:
    kind: str
    value: object
    truth: bool | None = True  # of a noun: present, denied (False), or left open (None)
    modifiers: list = field(default_factory=list)  # of a noun: the tokens that qualify it


def parse(text: str) -> dict:
    """The attributes of a prompt; of several sentences the union, without values that contradict others."""
    found, contradicted = {}, set()
    for sentence in _sentences(text):
        for key, value in _read_sentence(sentence):
            if key in ("contains", "colors", "sizes", "paris") or key.endswith("_cells"):
                found.setdefault(key, {})[value] = True
            elif found.setdefault(key, value) != value:
                contradicted.add(key)
    return {key: list(found[key]) if isinstance(found[key], dict) else found[key]
            for key in SENTENCES if key in found and key not in contradicted}


def _sentences(text):
    """The sentences of a text, in one spelling."""
    text = unicodedata.normalize("NFKC", " ".join(text.lower().split()))
    for pattern, better in SPELLING:
        text = pattern.sub(better, text)
    return SENTENCE_END.split(text)


def _read_sentence(sentence):
    """(key, value) of every attribute of a sentence; the entries of a list one by one."""
    tokens = _tokenise(sentence)
    _attach_modifiers(tokens)
    _resolve_negation(tokens)
    for noun in (t for t in tokens if t.kind == "noun"):
        name, kind = noun.value, KIND[noun.value]
        values = {of: [m.value for m in noun.modifiers if m.kind == of] for of in MODIFIERS}
        if noun.truth is False and not noun.modifiers:  # "no polyp in the center" does not deny every polyp
            if name in COUNTED:
                yield COUNTED[name], 0
            elif kind in ("text", "box"):
                yield kind, False
        elif noun.truth:
            if kind in ("text", "box"):
                yield kind, True
            elif kind == "procedure":
                yield kind, name
            elif name in COUNTED and any(values["count"]):
                yield from ((COUNTED[name], n) for n in values["count"] if n)
            elif name in NAMES and not values["size"] + values["paris"]:
                yield "contains", name
            if kind in ("abnormality", "instrument", "landmark"):
                yield from ((f"{kind}_cells", cell) for cell in values["cell"] if cell)
            if kind == "abnormality":
                for key, of in (("colors", "color"), ("sizes", "size"), ("paris", "paris")):
                    yield from ((key, value) for value in values[of] if value)
    other = re.fullmatch(r"generate an image containing ([^,]+?) *", sentence)
    if other and all(t.kind == "word" for t in tokens[3:]):
        yield "contains", other[1]


def _tokenise(sentence):
    """The tokens of a sentence, without fillers such as articles."""
    return [token for match in LEXER.finditer(sentence) if (token := _token(match)).kind != "filler"]


def _token(match):
    kind, value, _ = LEXICON[match.lastindex - 1]
    value = match[0] if value is None else value
    if kind == "count":
        value = {"single": 1, "sole": 1, "solitary": 1, "pair of": 2}.get(value, value)
        value = int(value) if str(value).isdigit() else NUMBERS.index(value)
    elif kind == "size" and value and value not in SIZES:
        mm = float(value.removesuffix("mm"))
        value = SIZES[(mm >= 5) + (mm >= 11) + (mm > 20)]
    return Token(kind, value)


def _attach_modifiers(tokens):
    """Assign every place, color, size, type and number to the noun that it qualifies."""
    either = {tokens[i - 1].kind for i, t in enumerate(tokens) if t.kind == "or" and i}
    for i, t in enumerate(tokens):
        if t.kind in MODIFIERS and (noun := _owner(tokens, i)):
            noun.modifiers.append(t)
            if t.kind in either or i and tokens[i - 1].kind in ("no", "not"):
                t.value = None  # "red or white", "not red" still qualify the polyp, with an open value


def _owner(tokens, i):
    """A noun right behind ("upper-left polyp"), else the last one before, else the first one after. A number
    may be separated from its noun by other words ("two large polyps"), but from one before it only by words
    of counting ("polyp count: 2")."""
    number, j = tokens[i].kind == "count", i + 1
    kinds = (*MODIFIERS, "word") if number else MODIFIERS
    while j < len(tokens) and (tokens[j].kind in kinds or _joins_modifiers(tokens, j)):
        j += 1
    if j < len(tokens) and tokens[j].kind == "noun":
        return tokens[j]
    before, after = ([t for t in part if t.kind == "noun" and KIND[t.value] != "procedure"]
                     for part in (tokens[:i], tokens[i:]))
    if number:
        last = next((t for t in reversed(tokens[:i]) if t.value not in COUNTING), None)
        return last if last in before else None
    return (before[-1:] or after[:1] or [None])[0]


def _joins_modifiers(tokens, i):
    """Whether this is the "and" or "or" between two modifiers of a kind, as in "red and white polyps"."""
    around = {t.kind for t in tokens[i - 1:i + 2:2]}
    return (tokens[i].kind in ("and", "or") and 0 < i < len(tokens) - 1
            and len(around) == 1 and around <= set(MODIFIERS))


def _resolve_negation(tokens):
    """Set the truth of every noun. A negation in front extends over "or"; over "and" or a comma is open."""
    truth = True  # of the next noun
    met, linked = True, False  # whether the last negation has met its noun, whether a list goes on
    for i, t in enumerate(tokens):
        if t.kind == "noun":
            if met and not (truth or linked):  # "no text in this colonoscopy"
                truth = True if KIND[t.value] == "procedure" else None
            t.truth, met = truth, True
        elif t.kind == "not" and (denied := _denied(tokens, i)):
            for noun in denied[1:]:
                noun.truth = None  # "polyps and instruments are absent"
            denied[0].truth = False if denied[0].truth and denied[0] is tokens[i - 1] else None
        elif t.kind in ("no", "not"):
            truth, met = (False if truth or met else None), False
        elif t.kind == "open":
            truth, met = None, False
        elif t.kind == "count" and not truth:
            truth = met or None  # "no polyps, 2 instruments"
        elif t.kind == "yes" and met:
            truth = True
        elif t.kind == "and" and met and truth is False:
            truth = None
        elif t.kind == "or" and truth and not _joins_modifiers(tokens, i):
            for noun in [x for x in tokens[:i] if x.kind == "noun"][-1:]:
                noun.truth = None  # "a polyp or a tube"
            truth, met = None, False
        linked = t.kind in ("and", "or") or linked and t.kind != "noun"


def _denied(tokens, i):
    """The nouns in front of a "not" that belongs to them ("text is not visible"), the nearest first."""
    ahead = [t.kind for t in tokens[i + 1:i + 3]]
    if "noun" in ahead and ahead[0] != "and":  # "a polyp not containing text"
        return []
    while i and tokens[i - 1].kind in ("word", "scene", *MODIFIERS):
        i -= 1
    nouns = []
    while i and tokens[i - 1].kind == "noun" and not (nouns and tokens[i - 1].modifiers):
        nouns.append(tokens[i - 1])
        i -= 2 if i > 1 and tokens[i - 2].kind in ("and", "or") else i
    return nouns


# Mirroring: the prompt of the mirrored image


SWAPPED = {"horizontal": {"left": "right", "right": "left", "rigth": "left"},
           "vertical": {"upper": "lower", "lower": "upper", "top": "bottom", "bottom": "top"}}
SWAPPED["both"] = SWAPPED["horizontal"] | SWAPPED["vertical"]
# words that tell a side; in a text that parse has understood they are parts of cells and sizes
SIDES = re.compile(r"(?:left|right|upper|lower|top|bottom)\w*|(?:up|down)(?:wards?)?|above|below|beneath"
                   r"|under|over|(?:north|south|east|west)\w*|[ns][ew]|quadrants?"
                   r"|o'?clock|\d{1,2}:\d\d|(?:counter|anti)?clockwise|(?:horizontal|vertical)(?:ly)?")


def mirror(what, axis):
    """Attributes or a prompt as they are true of the mirrored image.

    axis: "horizontal", left becomes right, "vertical", upper becomes lower, or "both", half a turn. A text
    gets other words for its sides and keeps the rest, so that mirrored twice it is the same. None for a text
    that names a side and is not understood ("on the left wall"): nobody knows what is true of its mirror.
    """
    def swap(match):
        word = SWAPPED[axis][match[0].lower()]
        return word.upper() if match[0].isupper() else word.title() if match[0][0].isupper() else word

    def swapped(text):
        return re.sub(rf"\b(?:{'|'.join(SWAPPED[axis])})\b", swap, text, flags=re.IGNORECASE)

    if isinstance(what, dict):
        return {key: [swapped(cell) for cell in value] if key.endswith("_cells") else value
                for key, value in what.items()}
    attributes = parse(what)
    if write(attributes) == what:                           # the data's own sentences, with their typos
        return write(mirror(attributes, axis))
    tokens = [token for sentence in _sentences(what) for token in _tokenise(sentence)]
    words = [word for token in tokens if token.kind == "word" for word in token.value.split("-")]
    words += re.findall(r"\d+:\d+", what)                   # 9:00, which is two tokens
    understood = not any(SIDES.fullmatch(word) for word in words)
    return swapped(what) if understood and parse(swapped(what)) == mirror(attributes, axis) else None


# Paraphrasing: frames and synonyms. A {word} stands for one of WORDS, {it} for what the sentence is about.


SHOWN = ("{make} {image} {with} {it}.", "{make} {image} {with} {it}.", "{image} {with} {it}.",
         "{this} {shows} {it}.",
         "There {be} {it} in {this}.", "{it} {be} {seen}.", "{it} {be} {seen} in {this}.",
         "In {this}, {it} {be} {seen}.")
HIDDEN = ("{make} {image} {without} {it}.", "{make} {image} {without} {it}.", "{image} {without} {it}.",
          "{this} {lacks} {it}.", "There {be} no {it} in {this}.", "No {it} {be} {seen}.",
          "No {it} {be} {seen} in {this}.")
PROCEDURE = ("{make} {scan} {from} a {it}{exam}.", "{make} {scan} {from} a {it}{exam}.",
             "{make} a {it} {view}.", "{scan} {from} a {it}{exam}.",
             "{this} comes from a {it}{exam}.", "A {view} {from} a {it}{exam}.")
WORDS = {word: choices.split(" | ") for word, choices in {
    "make": "Generate | Create | Produce | Render | Synthesize | Make | Please generate | I need | Give me",
    "image": "an image | a picture | a realistic image | an endoscopic image | a frame | a clinical image"
             " | a video frame | an endoscopic view | an endoscopic photo | an endoscopy image",
    "scan": "an image | a picture | a realistic image | a frame | a clinical image | a video frame | a still"
            " | a photo",
    "this": "the image | the picture | this endoscopic view | the frame | this image | the scene",
    "with": "with | showing | containing | that shows | that contains | depicting | displaying | that has",
    "shows": "shows | contains | depicts | displays | features | has | should show | should contain",
    "seen": "visible | present | shown | seen | evident",
    "without": "without any | with no | free of any | not containing any | not showing any | that shows no",
    "lacks": "does not contain any | does not show any | contains no | shows no"
             " | should not contain any",
    "from": "from | taken during | captured during | recorded during | acquired during | of",
    "exam": " |  procedure |  examination |  exam",
    "view": "image | picture | frame | view | photo | still",
    "in": "located in | in | situated in | lying in | positioned in | which is located in",
    "abnormality": "an abnormality | a lesion | an abnormal area | an abnormal finding | an abnormal region",
    "lesion": "lesion | abnormality",
    "instrument": "an instrument | a medical instrument | an endoscopic instrument | a tool"
                  " | an endoscopic tool",
    "landmark": "an anatomical landmark | a landmark | an anatomic landmark",
    "colored": "colored | in shades of | that appears | with tones of | that is",
    "size": "of size | measuring | with a size of | with a diameter of",
    "< 5mm": "< 5 mm | less than 5 mm | under 5 mm",
    "5-10mm": "5-10 mm | 5 to 10 mm | between 5 and 10 mm",
    "11-20mm": "11-20 mm | 11 to 20 mm | between 11 and 20 mm",
    ">20mm": "> 20 mm | more than 20 mm | over 20 mm",
    "polyp < 5mm": "a polyp smaller than 5 mm | a polyp of less than 5 mm",
    "polyp 5-10mm": "a 5-10 mm polyp | a polyp of 5 to 10 mm | a polyp between 5 and 10 mm",
    "polyp 11-20mm": "an 11-20 mm polyp | a polyp of 11 to 20 mm | a polyp between 11 and 20 mm",
    "polyp >20mm": "a polyp larger than 20 mm | a polyp of more than 20 mm",
    "type": "of | classified as | categorized as | described as",
    "one": "1 | one | a single | exactly one | just one | only one",
    "findings": "findings | endoscopic findings",
    "instruments": "instruments | medical instruments | endoscopic instruments | tools | endoscopic tools",
    "polyps": "polyps | mucosal polyps",
    "distinct": " | separate | distinct",
    "box": "green/black box artefact | green/black box | green and black box | black/green box artifact",
    "text": "text | text overlay | written text | lettering | overlaid text | burnt-in text"
            " | text annotation",
    "a text": "text | a text overlay | written text | lettering | overlaid text | burnt-in text"
              " | a text annotation",
    "polyp": "a polyp | a mucosal polyp",
    "polyp snare": "a polyp snare | a polypectomy snare | a snare",
    "biopsy forceps": "biopsy forceps",
    "metal clip": "a metal clip | a metallic clip",
    "injection needle": "an injection needle | a needle",
    "tube": "a tube",
    "ulcerative colitis": "ulcerative colitis",
    "oesophagitis": "oesophagitis | esophagitis",
    "barretts": "Barrett's oesophagus | Barrett's esophagus",
    "z-line": "the z-line | the Z-line",
    "cecum": "the cecum | the caecum",
    "ileum": "the ileum",
    "pylorus": "the pylorus",
}.items()}


def paraphrase(text: str, n: int, seed: int) -> list[str]:
    """n distinct prompts with the attributes of text, the same for the same seed; fewer where the frames give
    no more. Of a text outside the grammar, or with a name that is not in NAMES, only the text itself is
    returned."""
    attributes, rng, out = parse(text), random.Random(f"{seed} {text}"), {}
    known = attributes and set(attributes.get("contains", [])) <= NAMES.keys()
    for _ in range(50 + 20 * n if known else 0):
        if len(out) == n:
            break
        candidate = " ".join(_rephrase(key, value, rng) for key, value in _ideas(attributes))
        if candidate != text and candidate not in out and parse(candidate) == attributes:
            out[candidate] = True
    return list(out) or [text][:n]


def _rephrase(key, value, rng):
    """One idea in other words."""
    frames, many = SHOWN, False
    if key == "procedure":
        frames, it = PROCEDURE, value
    elif key == "text":
        frames, it = (SHOWN, "{a text}") if value else (HIDDEN, "{text}")
    elif key == "box":
        frames, it = (SHOWN, "a {box}") if value else (HIDDEN, "{box}")
    elif key.startswith("n_"):
        frames, it, many = (SHOWN if value else HIDDEN), rng.choice(WORDS[key[2:]]), value != 1
        number = rng.choice((str(value), NUMBERS[value] if value < len(NUMBERS) else f"exactly {value}"))
        if value > 1 and len(it.split()) == 1:
            it = f"{{distinct}} {it}".strip()
        it = it if value == 0 else f"{number} {it}" if many else f"{{one}} {it.removesuffix('s')}"
    elif key == "contains":
        it, many = _and([f"{{{name}}}" for name in value]), len(value) > 1 or value == ["biopsy forceps"]
        if len(value) > 1 or KIND[value[0]] == "landmark":  # not "there is the z-line"
            frames = [frame for frame in SHOWN if not frame.startswith("There")]
    elif key == "colors":
        it = rng.choice((f"{{abnormality}} {{colored}} {_and(value)}", f"a {_and(value)} {{lesion}}"))
    elif key == "sizes" and len(value) == 1 and rng.random() < 0.4:
        it = f"{{polyp {value[0]}}}"
    elif key == "sizes":
        it, many = f"{_polyps(value)} {{size}} {_and([f'{{{size}}}' for size in value])}", len(value) > 1
    elif key == "paris":
        types, s = _and([{"is": "Is", "ip": "Ip", "iia": "IIa"}[t] for t in value]), "s" * (len(value) > 1)
        it = rng.choice((f"{{type}} Paris type{s} {types}", f"with Paris classification {types}"))
        it, many = f"{_polyps(value)} {it}", len(value) > 1
    else:
        cells = _and(value, rng.choice((" and ", ", and ") if len(value) > 2 else (" and ",)))
        for word, other in rng.choice(((), (("-", " "),), (("upper", "top"), ("lower", "bottom")))):
            cells = cells.replace(word, other)
        it = f"{{{key.removesuffix('_cells')}}} {{in}} the {cells}"
    slots, sentence = {"it": it, "be": "are" if many else "is"}, rng.choice(frames)
    while "{" in sentence:
        sentence = re.sub(r"\{(.+?)\}", lambda m: slots.get(m[1]) or rng.choice(WORDS[m[1]]), sentence)
    sentence = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", " ".join(sentence.split()))
    first, _, rest = sentence.partition(" ")
    if first.isdigit():  # no sentence begins with a figure
        first = NUMBERS[int(first)] if int(first) < len(NUMBERS) else f"exactly {first}"
        sentence = f"{first} {rest}"
    return sentence[0].upper() + sentence[1:]
