"""The pieces of an HTML page that needs no other file and no network: tables, figures, images, charts.

Whatever comes from a file passes through esc. Images become JPEG data URIs, charts inline SVG by matplotlib,
whose texts stay texts: they can be searched, and the browser draws them in its own font.
"""

from command import BadInput

import base64
import html
import io
import re
from importlib.util import find_spec

from PIL import Image

COLOURS = ("#1f6f8b", "#c8553d", "#5b7f3a", "#7a5195", "#8a6d1d")
GREY, INK = "#8b949e", "#24292f"
# Units of the charts' width are inches of 72 points; the browser stretches them to the width of the column.
WIDTH = 4.2

STYLE = """
:root { color-scheme: light; --ink: #24292f; --soft: #57606a; --line: #d8dee4; --pale: #f6f8fa;
  --mark: #1f6f8b }
* { box-sizing: border-box }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100% }
body { margin: 0 auto; max-width: 1120px; padding: 24px 16px 64px; color: var(--ink); background: #fff;
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  overflow-wrap: anywhere }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 .3rem }
h2 { font-size: 1.3rem; margin: 2.6rem 0 .6rem; padding-top: .7rem; border-top: 2px solid var(--ink) }
h3 { font-size: 1rem; margin: 1.4rem 0 .5rem }
p { margin: .5rem 0; max-width: 75ch }
a { color: var(--mark) }
nav { margin: 1rem 0; display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; font-size: .95rem }
.soft, figcaption, .unit { color: var(--soft) }
figure { margin: 0 }
figcaption { font-size: .85rem; line-height: 1.4; margin-top: .35rem }
figure svg, figure img { display: block; width: 100%; height: auto }
.wide { display: grid; gap: 24px 32px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)) }
.grid { display: grid; gap: 18px 24px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)) }
.row { display: grid; gap: 3px; grid-template-columns: repeat(4, 1fr) }
.pair { display: grid; gap: 3px; grid-template-columns: 1fr 1fr }
.pairs { display: grid;
  gap: 16px; grid-template-columns: repeat(auto-fill, minmax(160px, 1fr)) }
.tiles { display: grid;
  gap: 12px; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); margin: 1rem 0 }
.tile { background: var(--pale); border-left: 4px solid var(--mark); padding: .6rem .8rem }
.tile b { display: block; font-size: 1.35rem; line-height: 1.25 }
.tile span { font-size: .85rem; color: var(--soft) }
table { border-collapse: collapse; width: 100%; margin: .6rem 0; font-size: .9rem }
th, td { overflow-wrap: break-word; text-align: left;
  vertical-align: top; padding: .35rem .5rem; border-bottom: 1px solid var(--line) }
th { font-weight: 600 }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
.lines { white-space: pre-line }
.facts { max-width: 60rem }
.facts td { overflow-wrap: anywhere }
.facts td:first-child { width: 34%; color: var(--soft) }
.note { background: #fff8e6; border-left: 4px solid #d4a72c; padding: .6rem .8rem; margin: .8rem 0 }
.missing { background: var(--pale); border-left: 4px solid var(--line); padding: .6rem .8rem;
  margin: .8rem 0 }
pre { margin: .4rem 0 0; white-space: pre-wrap; font: .82rem/1.45 ui-monospace, Menlo, Consolas, monospace }
code { font: .88em ui-monospace, Menlo, Consolas, monospace }
details { margin: .8rem 0 } summary { cursor: pointer; color: var(--mark) }
@media (max-width: 480px) { table { font-size: .8rem } th, td { padding: .3rem .3rem } }
@media print {
  @page { margin: 14mm }
  body { max-width: none; padding: 0; font-size: 10pt }
  nav, details { display: none }
  h2, h3 { break-after: avoid } figure, tr, .tile, .note, .missing { break-inside: avoid }
  .wide { grid-template-columns: 1fr 1fr } .grid { grid-template-columns: 1fr 1fr 1fr }
  .tile, .note, .missing { print-color-adjust: exact; -webkit-print-color-adjust: exact }
}
"""


def visible(text) -> str:
    """The text with a replacement character for what cannot be shown, or is half a character."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


def esc(value) -> str:
    """Any value as text of a page."""
    return html.escape(visible(str(value)))


def shown(value) -> str:
    """A number as people read it: counts with commas, others with four digits, "–" for what is not known."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def document(mark, title, body) -> str:
    """A whole page. mark: a comment by which its maker knows it. Its policy forbids scripts and loading."""
    return f"""<!DOCTYPE html>
<!-- {mark} -->
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{esc(title)}</title>
<style>{STYLE}</style>
</head>
<body>
{body}
</body>
</html>
"""


def table(head, rows, kind="") -> str:
    """head: texts, () for none; rows: lists of values, numbers flush right. kind: a class of STYLE."""
    rows = [list(row) for row in rows]
    right = {i for row in rows for i, v in enumerate(row) if isinstance(v, int | float)}

    def cells(tag, row):
        return "".join(f'<{tag} class="n">{esc(shown(v))}</{tag}>' if i in right else
                       f"<{tag}>{esc(shown(v))}</{tag}>" for i, v in enumerate(row))

    top = f"<thead><tr>{cells('th', head)}</tr></thead>" if head else ""
    body = "".join(f"<tr>{cells('td', row)}</tr>\n" for row in rows)
    return f'<table class="{kind}">{top}<tbody>\n{body}</tbody></table>'


def section(name, title, *parts) -> str:
    """A part of the page under a heading; name: what a link jumps to. Empty parts are left out."""
    body = "\n".join(part for part in parts if part)
    return f'<section id="{name}">\n<h2>{esc(title)}</h2>\n{body}\n</section>'


def paragraph(text, kind="soft") -> str:
    return f'<p class="{kind}">{esc(text)}</p>'


def missing(what, *commands) -> str:
    """What is not there yet, and the commands that make it."""
    code = f"<pre>{esc(chr(10).join(commands))}</pre>" if commands else ""
    return f'<div class="missing">{esc(what)}{code}</div>'


def figure(body, caption) -> str:
    return f"<figure>{body}<figcaption>{esc(caption)}</figcaption></figure>"


def folded(summary, body) -> str:
    return f"<details><summary>{esc(summary)}</summary>{body}</details>"


def picture(img, alt, side) -> str:
    """A PIL image as an <img>, made smaller where its longer side has more than `side` pixels."""
    if max(img.size) > side:
        img = img.copy()
        img.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    img.convert("RGB").save(file, "JPEG", quality=88, subsampling=0)
    code = base64.b64encode(file.getvalue()).decode()
    width, height = img.size
    return (f'<img src="data:image/jpeg;base64,{code}" width="{width}" height="{height}" '
            f'alt="{esc(alt)}">')


# Charts


def check_matplotlib():
    if not find_spec("matplotlib"):
        raise BadInput("matplotlib draws the charts and is not installed: python -m pip install matplotlib")


def svg(name, alt, height, draw) -> str:
    """A chart as inline SVG. draw(axes) fills it; name: unique in the page; height: inches.

    The same chart gives the same bytes: no date, and ids that depend on its name alone.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    out = io.StringIO()
    settings = {"svg.fonttype": "none", "svg.hashsalt": name, "text.parse_math": False, "font.size": 9,
                "font.family": "sans-serif", "text.color": INK, "axes.labelcolor": INK,
                "axes.edgecolor": GREY, "xtick.color": INK, "ytick.color": INK,
                "axes.spines.top": False, "axes.spines.right": False}
    with rc_context(settings):
        fig = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(fig.subplots())
        fig.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = visible(out.getvalue())
    text = text[text.index("<svg"):].strip()
    text = re.sub(r'\b(id="|url\(#|href="#)', rf"\g<1>{name}-", text)  # an id stands once in a page
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    head = f'{names} role="img" aria-label="{esc(alt)}"'
    return re.sub(r'<svg [^>]*?(viewBox="[^"]+")[^>]*>', lambda m: f"<svg {m[1]} {head}>", text, count=1)


def curves(name, alt, lines, x_label, y_label, log=False) -> str:
    """Curves over steps. lines: {label: [(x, y), ...]}; the last of several is drawn strongest."""
    from matplotlib.ticker import LogLocator

    def draw(axes):
        for i, (label, points) in enumerate(lines.items()):
            few, alone = len(points) < 60, len(points) == 1
            axes.plot(*zip(*points, strict=True), label=label, color=COLOURS[i % len(COLOURS)],
                      marker="o" if few else None, markersize=6 if alone else 3,
                      linewidth=1.4 if few else 0.9)
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.ticklabel_format(axis="y", style="plain", useOffset=False)
        y = [value for points in lines.values() for _, value in points]
        if log and 0 < 5 * min(y) < max(y):
            axes.set_yscale("log", subs=[])
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
        axes.xaxis.get_major_locator().set_params(integer=True, nbins=6)
        axes.grid(axis="y", color=GREY, alpha=0.25, linewidth=0.6)
        if len(lines) > 1:
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)

    return svg(name, alt, 2.7, draw)


def bars(name, alt, rows, x_label, marks) -> str:
    """Horizontal bars of shares in [0, 1] with intervals, each under a line of text.

    rows: {"label", "note", "share", "low", "high"} and a number or None for each of marks, {key: legend}.
    """
    signs = ({"marker": "o", "markersize": 6, "markerfacecolor": "white", "markeredgecolor": INK},
             {"marker": "D", "markersize": 4.5, "color": COLOURS[1]})

    def draw(axes):
        for y, row in enumerate(rows):
            axes.barh(y, row["share"], height=0.34, color=COLOURS[0], alpha=0.5)
            axes.plot([row["low"], row["high"]], [y, y], color=INK, linewidth=1.2, marker="|", markersize=6)
            axes.text(0, y - 0.3, row["label"], ha="left", va="bottom")
            axes.text(1, y - 0.3, row["note"], ha="right", va="bottom", color=GREY)
        for (key, legend), sign in zip(marks.items(), signs, strict=True):
            points = [(row[key], y) for y, row in enumerate(rows) if row[key] is not None]
            if points:
                x, y = zip(*points, strict=True)
                axes.plot(x, y, linestyle="", label=legend, clip_on=False, zorder=3, **sign)
        axes.set(xlabel=x_label, xlim=(0, 1), ylim=(len(rows) - 0.6, -0.85), yticks=[])
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x", color=GREY, alpha=0.25, linewidth=0.6)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)

    return svg(name, alt, 0.9 + 0.42 * len(rows), draw)
