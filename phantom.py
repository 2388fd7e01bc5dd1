"""Phantoms: rendered endoscopy images with exact attributes, as a data folder.

They need no download, and an image generated from their prompts can be checked. A scene depends on (seed,
index) only, in units of the image's side from the upper left; it is the same at every size that it is
rendered at. Attributes:

    polyps       0, 1, 2 or 3, a quarter of the images each; they never touch. n_findings is their number.
                 --max-polyps 8 draws 0 to 8 alike, to teach a judge what a wrong number looks like; beside
                 more than 3 there are fewer instruments, and more than 5 fit only where most are small.
    cells        a polyp covers a cell of the 3x3 grid when at least 30 % of its visible area lies there, and
                 always the cell with most of it. The head counts, not its stalk or what frame and box hide.
    size         radius of the head 0.071 (< 5mm), 0.103 (5-10mm), 0.146 (11-20mm), 0.203 (>20mm), each
                 +- 7 %: 4.5, 6.6, 9.3, 13 px of 64. A flat head is an ellipse of the same area, semi-axes
                 1.3 r and r / 1.3.
    paris        is: round dome; ip: dome on a stalk; iia: flat wide ellipse, dull
    colors       one of COLORS; on a quarter of the two larger classes two, a half each
    instruments  0 (half of the images), 1 or 2 shafts from an edge, clear of polyps; one lies in a cell with
                 at least 30 % of its visible length, and always in the cell with most of it
    box, text    half of the images each; the box is green or black in the lower left, text is at the left
                 edge or in a corner
    procedure    colonoscopy (3 of 4): orange-red, rings of folds around the lumen; gastroscopy: pale rose,
                 long folds
    landmark     the lumen, the only one: the cell of its centre. In a prompt only where there is no polyp.

    python phantom.py --out data/phantom --n 2000 --size 64 --seed 0
"""

from command import BadInput, run_command

import argparse
import json
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import partial
from math import atan2, cos, hypot, pi, sin
from multiprocessing import parent_process
from pathlib import Path
from threading import Thread

import numpy as np
from PIL import Image
from tqdm import tqdm

import prompts
from files import remove_unfinished, replacing

MOST = 1_000_000                 # images; their names have six digits
MOST_POLYPS = 8                  # of the nine cells, one is always left
LARGEST = 2048                   # px; there a process takes 2 GB and some 20 s an image
RADIUS = dict(zip(prompts.SIZES, (0.071, 0.103, 0.146, 0.203), strict=True))
COLORS = {"pink": (0.98, 0.60, 0.80), "red": (0.66, 0.05, 0.12), "white": (0.97, 0.95, 0.88),
          "yellow": (0.93, 0.80, 0.22), "purple": (0.47, 0.24, 0.62)}
COLOR_SHARES = (0.26, 0.22, 0.20, 0.16, 0.16)
COVERS = 0.30                    # share of the area (polyp) or length (instrument) that must lie in a cell
WALL = {"colonoscopy": ((0.05, 0.01, 0.01), (0.46, 0.13, 0.08), (0.84, 0.42, 0.29), (1.00, 0.66, 0.50)),
        "gastroscopy": ((0.10, 0.03, 0.04), (0.60, 0.28, 0.28), (0.90, 0.58, 0.55), (1.00, 0.80, 0.75))}
#       colour at brightness 0 (lumen), 1/3 (shadow), 2/3 (wall), 1 (lit fold)
SHADOW, FLESH = np.float32((0.30, 0.06, 0.05)), np.float32((0.96, 0.62, 0.52))
BOX = {"green": (0.06, 0.66, 0.50), "black": (0.02, 0.02, 0.03)}
TEXT_SIZE = (0.19, 0.20)
# 3 x 5 dots of each digit
DIGITS = ("111101101101111", "010110010010111", "111001111100111", "111001011001111", "101101111001001",
          "111100111001111", "111100111101111", "111001010010010", "111101111101111", "111101111001111")


# Geometry


def cell_of(x, y):
    """Index of the 3x3 cell that holds a point, in reading order."""
    column, row = (np.clip(np.floor(3 * np.asarray(z)), 0, 2).astype(int) for z in (x, y))
    return 3 * row + column


def cells_covered(x, y):
    """Names of the cells that hold at least COVERS of the points, and of the fullest one."""
    share = np.bincount(cell_of(x, y), minlength=9) / len(x)
    return [name for name, s in zip(prompts.CELLS, share, strict=True) if s >= COVERS or s == share.max()]


def frame_distance(x, y, cut):
    """Distance to the octagonal frame, positive inside: the image fills the square except for its corners."""
    x, y = np.minimum(x, 1 - x), np.minimum(y, 1 - y)
    return np.minimum(np.minimum(x, y) + 0.004, (x + y - cut) * 0.5**0.5)


def rectangle_distance(x, y, rect):
    """Distance to a rectangle (x_0, y_0, x_1, y_1); 0 inside."""
    bounds = (x, *rect[::2]), (y, *rect[1::2])
    dx, dy = (np.maximum(np.maximum(low - z, z - high), 0) for z, low, high in bounds)
    return np.hypot(dx, dy)


def segment_distance(x, y, a, b):
    """(distance to the segment a b, position along it in [0, 1])."""
    (ax, ay), dx, dy = a, b[0] - a[0], b[1] - a[1]
    along = np.clip(((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy), 0, 1)
    return np.hypot(x - ax - along * dx, y - ay - along * dy), along


def head_coordinates(polyp, x, y):
    """(u, v) in the frame of the polyp's head: its outline is the unit circle."""
    dx, dy = x - polyp["center"][0], y - polyp["center"][1]
    c, s, stretch = cos(polyp["angle"]), sin(polyp["angle"]), reach(polyp) / polyp["radius"]
    return (c * dx + s * dy) / (polyp["radius"] * stretch), (c * dy - s * dx) / (polyp["radius"] / stretch)


def reach(polyp):
    """Radius of a circle that holds the head."""
    return polyp["radius"] * (1.3 if polyp["paris"] == "iia" else 1.0)


def stalk_end(polyp):
    (x, y), length = polyp["center"], 1.75 * polyp["radius"]
    return x + length * cos(polyp["stalk"]), y + length * sin(polyp["stalk"])


def circles(polyp):
    """Circles (x, y, radius) that hold the polyp with its stalk."""
    (x, y), (ex, ey), r = polyp["center"], stalk_end(polyp), 0.44 * polyp["radius"]
    stalk = [(x + 0.7 * (ex - x), y + 0.7 * (ey - y), r), (ex, ey, r)] if polyp["paris"] == "ip" else []
    return np.array([(x, y, reach(polyp)), *stalk])


def apart(polyp, other):
    """Whether a gap of wall separates two polyps, stalks included."""
    a, b = circles(polyp)[:, None], circles(other)
    return (np.hypot(a[..., 0] - b[:, 0], a[..., 1] - b[:, 1]) > a[..., 2] + b[:, 2] + 0.03).all()


def visible_cells(scene, polyp):
    """Names of the cells that the polyp covers; none where frame or box hides 1/8 of it, or its stalk."""
    if polyp["paris"] == "ip":
        end = stalk_end(polyp)
        clear_of_frame = frame_distance(*end, scene["cut"]) >= 0.01
        if not clear_of_frame or scene["box"] and rectangle_distance(*end, scene["box"]) < 0.03:
            return []
    x, y = np.meshgrid(*(c + np.linspace(-1, 1, 33) * reach(polyp) for c in polyp["center"]))
    u, v = head_coordinates(polyp, x, y)
    head = u * u + v * v <= 1
    visible = head & (frame_distance(x, y, scene["cut"]) > 0)
    if scene["box"]:
        visible &= rectangle_distance(x, y, scene["box"]) > 0
    return cells_covered(x[visible], y[visible]) if visible.sum() > 0.875 * head.sum() else []


# Drawing the random numbers of a scene


def draw_scene(seed, index, max_polyps=3):
    """All that the image shows, as plain numbers: first what prompts describe, then light and folds."""
    rng = np.random.default_rng([seed, index])
    scene = {"procedure": "colonoscopy" if rng.random() < 0.75 else "gastroscopy",
             "cut": rng.uniform(0.17, 0.20)}
    n_polyps, n_instruments = rng.integers(max_polyps + 1), rng.choice(3, p=(0.50, 0.33, 0.17))
    has_box, has_text = rng.random(2) < 0.5
    box = (0.0, 1 - rng.uniform(0.19, 0.21), rng.uniform(0.20, 0.22), 1.0)
    scene["box"] = box if has_box else None
    scene["box_color"] = "green" if rng.random() < 0.6 else "black"
    cells = rng.permutation(9)[:n_polyps]
    placed = None
    while placed is None:
        placed = place_things(rng, scene, cells, n_instruments)
        if n_polyps > 3:                                    # these seldom fit: fewer instruments, other cells
            n_instruments, cells = rng.integers(n_instruments + 1), rng.permutation(9)[:n_polyps]
    scene["polyps"], scene["instruments"] = placed
    text = place_text(rng, scene)
    scene["text"] = text if has_text else None
    scene["digits"] = rng.integers(10, size=(2, 5)).tolist()
    scene["lumen"] = place_lumen(rng, scene)
    scene["phase"] = rng.uniform(0, 2 * pi, 6).tolist()
    scene["tint"] = 1 + 0.02 * rng.normal(size=3)
    light, rings, lobes = rng.uniform((0.96, 1.25, 0.13), (1.04, 1.5, 0.22)).tolist()
    scene["light"], scene["rings"], scene["lobes"] = light, rings, lobes
    scene["vessels"] = grow_vessels(rng)
    scene["glints"] = rng.uniform((0.1, 0.1, 0, 0.005), (0.9, 0.9, pi, 0.009), (9, 4)).tolist()
    return scene


def place_things(rng, scene, cells, n_instruments):
    """(polyps near the centres of the cells, instruments clear of them); None where there is no room."""
    polyps, instruments = [], []
    for cell in cells:
        size, paris = prompts.SIZES[rng.integers(4)], prompts.PARIS[rng.choice(3, p=(0.40, 0.30, 0.30))]
        n_colors = 2 if size in prompts.SIZES[2:] and rng.random() < 0.25 else 1
        colors = rng.choice(list(COLORS), n_colors, replace=False, p=COLOR_SHARES).tolist()
        polyp = {"size": size, "paris": paris, "colors": sorted(colors, key=list(COLORS).index),
                 "radius": RADIUS[size] * rng.uniform(0.93, 1.07),
                 "phase": rng.uniform(0, 2 * pi, 2).tolist()}
        low = 0.93 * reach(polyp) + 0.015
        for _ in range(30):
            polyp["angle"], polyp["stalk"] = rng.uniform(-0.6, 0.6), rng.uniform(0, 2 * pi)
            center = (np.array([cell % 3, cell // 3]) + 0.5) / 3 + rng.uniform(-0.075, 0.075, 2)
            polyp["center"] = np.clip(center, low, 1 - low).tolist()
            if all(apart(polyp, other) for other in polyps):
                polyp["cells"] = visible_cells(scene, polyp)
                if prompts.CELLS[cell] in polyp["cells"]:
                    break
        else:
            return None
        polyps.append(polyp)
    for _ in range(200):
        if len(instruments) == n_instruments:
            return polyps, instruments
        instruments += draw_instrument(rng, scene, polyps, instruments)
    return None


def draw_instrument(rng, scene, polyps, others):
    """[a shaft from an edge, clear of polyps, box and other shafts], or [] when the drawn one is not."""
    side, at = rng.integers(4), rng.uniform(0.15, 0.85)
    start = np.array([(at, -0.03), (1.03, at), (at, 1.03), (-0.03, at)][side])
    inwards = np.array([(0, 1), (-1, 0), (0, -1), (1, 0)][side])
    way = rng.uniform(0.25, 0.75, 2) - start
    way /= np.hypot(*way)
    tip = start + rng.uniform(0.36, 0.60) * way
    x, y = np.linspace(start, tip, 60).T
    if (way @ inwards < 0.6 or frame_distance(*tip, scene["cut"]) < 0.12
            or scene["box"] and rectangle_distance(x, y, scene["box"]).min() < 0.05
            or any(np.hypot(x - cx, y - cy).min() < r + 0.065 for p in polyps for cx, cy, r in circles(p))
            or any(segment_distance(x, y, o["start"], o["tip"])[0].min() < 0.12 for o in others)):
        return []
    visible = frame_distance(x, y, scene["cut"]) > 0
    return [{"start": start.tolist(), "tip": tip.tolist(), "jaws": bool(rng.random() < 0.6),
             "cells": cells_covered(x[visible], y[visible])}]


def place_text(rng, scene):
    """Upper left corner of the text: left edge or an upper corner, the lower right one if that hides less."""
    def hidden(slot):
        rect = (*slot, slot[0] + TEXT_SIZE[0], slot[1] + TEXT_SIZE[1])
        shafts = [np.linspace(i["start"], i["tip"], 20).T for i in scene["instruments"]]
        return (sum(max(0, 1.05 - rectangle_distance(*p["center"], rect) / reach(p)) for p in scene["polyps"])
                + sum((rectangle_distance(*shaft, rect) < 0.03).mean() for shaft in shafts))

    slots = rng.permutation([(0.02, 0.02), (0.02, 0.36), (0.79, 0.02)]).tolist()
    return min([*slots, (0.79, 0.79)], key=hidden)


def place_lumen(rng, scene):
    """The lumen at the first of 24 random spots that is clear of polyps, or at the clearest."""
    radius = rng.uniform(0.085, 0.12)

    def room(spot):
        x, y = spot
        gaps = [hypot(p["center"][0] - x, p["center"][1] - y) - p["radius"] for p in scene["polyps"]]
        return min([*gaps, 1.1 * radius + 0.05])

    return {"center": max(rng.uniform(0.24, 0.76, (24, 2)).tolist(), key=room), "radius": radius,
            "aspect": rng.uniform(0.8, 1.0), "angle": rng.uniform(0, pi)}


def grow_vessels(rng):
    """Branching polylines as segments (x_0, y_0, x_1, y_1, width)."""
    segments = []
    for _ in range(4):
        tips = [(*rng.uniform(0.12, 0.88, 2).tolist(), rng.uniform(0, 2 * pi), 0.004)]
        for _ in range(16):
            x, y, heading, width = tips.pop(0)
            heading += rng.normal(0, 0.3)
            end = x + 0.04 * cos(heading), y + 0.04 * sin(heading)
            segments.append((x, y, *end, width))
            turns = (0.5, -0.5) if rng.random() < 0.3 else (0.0,)
            tips += [(*end, heading + turn, width * 0.9) for turn in turns]
    return segments


# Rendering


def smoothstep(low, high, x):
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def blend(img, window, color, alpha):
    img[window] += alpha[..., None] * (np.asarray(color, np.float32) - img[window])


def window_around(points, margin, n):
    """Slices of an n x n image that hold the points with a margin."""
    low, high = np.min(points, axis=0) - margin, np.max(points, axis=0) + margin
    return tuple(slice(max(0, int(low[i] * n)), max(0, int(high[i] * n) + 2)) for i in (1, 0))


def render(scene, size):
    """The scene as uint8 (size, size, 3), averaged down from twice the size."""
    n = 2 * size
    grid = (np.arange(n, dtype=np.float32) + 0.5) / n
    x, y = np.meshgrid(grid, grid)
    img = paint_wall(scene, x, y)
    for vessel in scene["vessels"]:
        paint_vessel(img, x, y, vessel)
    for polyp in scene["polyps"]:
        paint_polyp(img, x, y, polyp)
    for instrument in scene["instruments"]:
        paint_instrument(img, x, y, instrument)
    img *= smoothstep(0, 0.006, frame_distance(x, y, scene["cut"]))[..., None]
    if scene["box"]:
        paint_box(img, x, y, scene["box"], BOX[scene["box_color"]])
    if scene["text"]:
        paint_text(img, x, y, scene["text"], scene["digits"])
    img = img.reshape(size, 2, size, 2, 3).mean((1, 3))
    return (np.clip(img, 0, 1) * 255 + 0.5).astype(np.uint8)


def paint_wall(scene, x, y):
    """Mucosa: brightness from folds, depth and light, then colour by brightness."""
    lumen, p = scene["lumen"], scene["phase"]
    dx, dy = x - lumen["center"][0], y - lumen["center"][1]
    c, s, turn = cos(lumen["angle"]), sin(lumen["angle"]), np.arctan2(dy, dx)
    radius = np.hypot(c * dx + s * dy, (c * dy - s * dx) / lumen["aspect"])
    depth = np.log2(radius / lumen["radius"] + 1e-3)                # 0: the lumen's edge
    if scene["procedure"] == "colonoscopy":
        # Each ring has a lit rim towards the lumen and ends in the shadow of the next, nearer one.
        ring = scene["rings"] * depth + scene["lobes"] * np.sin(3 * turn + p[3]) + 0.16 * np.sin(turn + p[4])
        fold = np.floor(ring)
        part = ring - fold
        crescent = (0.55 + 0.45 * np.sin(turn + 2.3 * fold + p[5])) * smoothstep(-1.2, 0.5, ring)
        bright = 0.74 + 0.26 * crescent * (np.exp(-part / 0.22) - 1.5 * smoothstep(0.35, 1, part))
        bright *= 0.12 + 0.88 * smoothstep(-0.35, 2.1, ring)
    else:
        ridge = np.sin(9 * turn + 0.3 * np.sin(p[4]) * depth + p[3])
        groove = np.exp(-(ridge + 1) / 0.25) * smoothstep(0, 1, depth)
        bright = 0.78 + 0.10 * smoothstep(-0.6, 0.9, ridge) - 0.16 * groove
        bright *= 0.12 + 0.88 * smoothstep(-0.5, 1.3, depth)
    bright *= scene["light"] * (1 - 0.55 * ((x - 0.5) ** 2 + (y - 0.5) ** 2))
    waves = np.sin(9 * x + 4 * y + p[0]) + np.sin(11 * y - 5 * x + p[1]) + np.sin(17 * x - 13 * y + p[2])
    bright += 0.01 * waves
    stops = np.array(WALL[scene["procedure"]]) * scene["tint"]
    channels = [np.interp(bright, (0, 1 / 3, 2 / 3, 1), stops[:, i]) for i in range(3)]
    img = np.stack(channels, axis=-1).astype(np.float32)
    for gx, gy, angle, r in scene["glints"]:
        win = window_around([(gx, gy)], 5 * r, len(x))
        c, s, dx, dy = cos(angle), sin(angle), x[win] - gx, y[win] - gy
        shine = np.exp(-(((c * dx + s * dy) / (2 * r)) ** 2) - ((c * dy - s * dx) / r) ** 2)
        blend(img, win, (1.0, 0.97, 0.93), 0.9 * shine * smoothstep(0.45, 0.7, bright[win]))
    return img


def paint_vessel(img, x, y, vessel):
    a, b, width = vessel[:2], vessel[2:4], vessel[4]
    win = window_around([a, b], 0.012, len(x))
    distance, _ = segment_distance(x[win], y[win], a, b)
    dark = 0.4 * np.exp(-((distance / width) ** 2))[..., None]
    img[win] *= 1 - dark * np.array((0.25, 0.75, 0.70), np.float32)


def paint_polyp(img, x, y, polyp):
    """Contact shadow, stalk, head with its colour, dark rim, highlights. The light is above the camera."""
    (cx, cy), r, flat, (a, b) = polyp["center"], polyp["radius"], polyp["paris"] == "iia", polyp["phase"]
    win = window_around([(cx, cy)], 2.6 * r, len(x))
    x, y = x[win], y[win]
    edge = 0.010 / r                                        # soft edges have one width, whatever the radius
    far = np.hypot(*head_coordinates(polyp, x - 0.10 * r, y - 0.16 * r))
    blend(img, win, SHADOW / 2, (0.55 if flat else 0.75) * np.clip(1 - (far - 0.9) / (0.28 + edge), 0, 1))
    if polyp["paris"] == "ip":
        distance, along = segment_distance(x, y, (cx, cy), stalk_end(polyp))
        side = distance / r / (0.33 + 0.11 * along)
        tone = (1.06 - 0.45 * side**2) * (1 - 0.35 * smoothstep(0.75, 0.5, along))  # the head shades its neck
        blend(img, win, SHADOW, 0.8 * smoothstep(1.35 + edge, 1, side))
        blend(img, win, tone[..., None] * FLESH, smoothstep(1 + edge, 1 - edge, side))
    u, v = head_coordinates(polyp, x, y)
    turn = np.arctan2(v, u)
    lobes = 0.035 * np.sin(3 * turn + a) + 0.025 * np.sin(5 * turn + b)
    q = np.hypot(u, v) * (1 + (0.4 if flat else 1.0) * lobes)
    inside = smoothstep(1 + edge / 2, 1 - edge / 2, q)
    lx, ly = (x - cx) / r, (y - cy) / r
    warp = 1.5 * np.sin(3 * u - 2 * v + a)
    grain = (np.sin(8 * u + warp + a) * np.sin(7 * v - warp + b)
             + np.sin(15 * u - 6 * v + b) * np.sin(13 * v + warp))
    if flat:
        light = 0.92 - 0.12 * (lx + ly) * q**2 + 0.03 * grain
    else:
        facing = 0.86 * np.sqrt(np.clip(1 - q * q, 0, 1)) - 0.30 * lx - 0.42 * ly
        light = 0.50 + 0.50 * np.clip(facing, 0, 1.1) + 0.025 * grain
    first, second = (np.array(COLORS[polyp["colors"][i]], np.float32) for i in (0, -1))
    color = first + smoothstep(-0.3, 0.3, u + 0.2 * np.sin(4 * v + a))[..., None] * (second - first)
    rim = (0.5 if flat else 0.75) * smoothstep(0.88 - 1.4 * edge, 1, q)[..., None]
    blend(img, win, color * light[..., None] * (1 - rim) + rim * SHADOW, inside)
    if not flat:
        spots = ((-0.30, -0.42, 0.17), (-0.02, -0.55, 0.07), (-0.52, -0.18, 0.08), (0.15, 0.35, 0.05))
        shine = sum(np.exp(-(((lx - sx) / w) ** 2) - ((ly - sy) / (0.7 * w)) ** 2) for sx, sy, w in spots)
        blend(img, win, (1.0, 1.0, 0.98), 0.9 * np.minimum(shine, 1) * inside)


def paint_instrument(img, x, y, instrument):
    """A metal shaft with a bright edge, and at its tip open jaws or a snare's loop."""
    (ax, ay), (bx, by) = instrument["start"], instrument["tip"]
    win = window_around([(ax, ay), (bx, by)], 0.12, len(x))
    angle, dx, dy = atan2(by - ay, bx - ax), x[win] - bx, y[win] - by
    along = cos(angle) * dx + sin(angle) * dy + 0.05                # 0: the shaft ends
    across = cos(angle) * dy - sin(angle) * dx
    shadow = smoothstep(0.06, 0.03, np.abs(across - 0.012)) * smoothstep(0.05, 0, along)
    img[win] *= 1 - 0.5 * shadow[..., None]
    tone = 0.50 - 0.30 * (across / 0.034) ** 2 + 0.55 * np.exp(-(((across + 0.012) / 0.008) ** 2))
    blend(img, win, tone[..., None] * np.array((0.82, 0.95, 1.12), np.float32),
          smoothstep(0.036, 0.030, np.abs(across)) * smoothstep(0, -0.006, along))
    if instrument["jaws"]:
        tip = np.abs(np.abs(across) - 0.45 * along - 0.006) - 0.009
        tip = np.where((along > -0.005) & (along < 0.075), tip, 1)
    else:
        tip = np.abs(np.hypot((along - 0.05) / 1.3, across) - 0.042) - 0.008
    blend(img, win, (0.80, 0.86, 0.92), smoothstep(0.005, 0, tip))


def paint_box(img, x, y, rect, color):
    """The scope guide's box, with a pale curve in it."""
    win = window_around([rect[:2], rect[2:]], 0.02, len(x))
    u, v = (x[win] - rect[0]) / (rect[2] - rect[0]), (y[win] - rect[1]) / (rect[3] - rect[1])
    blend(img, win, color, smoothstep(0.004, 0, rectangle_distance(x[win], y[win], rect)))
    curve = np.abs(u - 0.45 - 0.17 * np.sin(6 * v)) * (rect[2] - rect[0])
    blend(img, win, (0.93, 0.95, 0.90), smoothstep(0.014, 0.008, curve) * ((v > 0.25) & (v < 0.85)))


def paint_text(img, x, y, corner, digits):
    """Two lines of digits and one of squares, as the processor burns them in."""
    glyphs = [[np.array(list(DIGITS[d]), int).reshape(5, 3) for d in line] for line in digits]
    glyphs.append([np.ones((5, 3), int)] * 5)
    dots = np.pad(np.block([[np.pad(glyph, ((0, 2), (0, 1))) for glyph in line] for line in glyphs]), 1)
    win = window_around([corner, np.add(corner, TEXT_SIZE)], 0.01, len(x))
    i, j = (np.floor((z[win] - z_0) / 0.0095).astype(int) + 1 for z, z_0 in ((y, corner[1]), (x, corner[0])))
    blend(img, win, (0.97, 0.97, 0.93), dots[i.clip(0, dots.shape[0] - 1), j.clip(0, dots.shape[1] - 1)])


# Prompts and files


def attributes(scene, file_name):
    """The line of attributes.jsonl."""
    polyps = [{"cells": p["cells"], "size": p["size"], "paris": p["paris"], "colors": p["colors"],
               "center": [round(c, 4) for c in p["center"]], "radius": round(p["radius"], 4)}
              for p in scene["polyps"]]
    return {"file_name": file_name, "procedure": scene["procedure"], "polyps": polyps,
            "instruments": [{"cells": i["cells"]} for i in scene["instruments"]],
            "box": scene["box"] is not None, "text": scene["text"] is not None}


def describe(scene, rng):
    """7 to 11 prompts in the task's grammar, each about one attribute; of 12 a random one is left out."""
    polyps, instruments = scene["polyps"], scene["instruments"]
    facts = [{"n_findings": len(polyps)}, {"n_instruments": len(instruments)}, {"n_polyps": len(polyps)},
             {"text": scene["text"] is not None}, {"box": scene["box"] is not None},
             {"procedure": scene["procedure"]}]
    if polyps:
        facts += [{"contains": ["polyp"]},
                  {"abnormality_cells": in_order(prompts.CELLS, [c for p in polyps for c in p["cells"]])},
                  {"colors": in_order(prompts.COLORS, [c for p in polyps for c in p["colors"]])},
                  {"sizes": in_order(prompts.SIZES, [p["size"] for p in polyps])},
                  {"paris": in_order(prompts.PARIS, [p["paris"] for p in polyps])}]
    else:
        facts += [{"landmark_cells": [prompts.CELLS[cell_of(*scene["lumen"]["center"])]]}]
    if instruments:
        facts += [{"instrument_cells": in_order(prompts.CELLS, [c for i in instruments for c in i["cells"]])}]
    if len(facts) > 11:
        facts.pop(rng.integers(len(facts)))
    return [prompts.write(fact) for fact in facts]


def in_order(names, found):
    return [name for name in names if name in found]


def make_words(index, seed, max_polyps):
    """(line of attributes.jsonl, rows of prompt-gt.csv) of one image."""
    scene, name = draw_scene(seed, index, max_polyps), f"{index:06d}.png"
    prompts_of_it = describe(scene, np.random.default_rng([seed, index, 1]))
    rows = "".join(f"{prompt};{name}\n" for prompt in prompts_of_it)
    return json.dumps(attributes(scene, name)) + "\n", rows


def make_image(index, seed, max_polyps, size, folder):
    with replacing(folder / f"{index:06d}.png") as tmp:
        Image.fromarray(render(draw_scene(seed, index, max_polyps), size)).save(tmp)


def check_out(out, n):
    """The files of an existing folder; it is refused if it holds anything but a phantom of n images."""
    for place in (out / "images", out, *out.parents):
        if place.is_symlink() and not place.exists():
            raise BadInput(f"{place}: expected a folder, found a link to {os.readlink(place)}, which leads "
                           "nowhere; remove the link or name another folder with --out")
    if out.exists() and not out.is_dir():
        raise BadInput(f"{out}: expected a folder, found a file")
    folders = [folder for folder in (out, out / "images") if folder.is_dir()]
    found = {p.relative_to(out).as_posix() for folder in folders for p in folder.iterdir()
             if not p.name.startswith(".")}
    ours = {"images", "attributes.jsonl", "prompt-gt.csv", *(f"images/{i:06d}.png" for i in range(n))}
    if others := sorted(found - ours):
        raise BadInput(f"{out}: expected an empty folder or this same phantom, found {others[0]}")
    return found


def check_same(out, found, size, lines, captions):
    """Refuse another phantom and edited captions; of the same, remove what a killed run left half written."""
    if found and ("attributes.jsonl" not in found
                  or (out / "attributes.jsonl").read_bytes() != lines.encode()):
        raise BadInput(f"{out}: expected an empty folder or this same phantom, "
                       "found another (--n, --seed, --max-polyps or version)")
    if "prompt-gt.csv" in found and (out / "prompt-gt.csv").read_bytes() != captions.encode():
        raise BadInput(f"{out / 'prompt-gt.csv'}: expected the prompts of this phantom, found others, edited "
                       "perhaps; move the file away and run the command again")
    for name in sorted(f for f in found if f.endswith(".png"))[:1]:       # an unreadable one is written anew
        with suppress(OSError), Image.open(out / name) as img:
            if img.size != (size, size):
                raise BadInput(f"{out / name}: expected {size} x {size} px, "
                               f"found {img.width} x {img.height} (--size)")
    remove_unfinished(out, "attributes.jsonl", "prompt-gt.csv")
    remove_unfinished(out / "images", "[0-9]*.png")


@contextmanager
def workers(out):
    """A pool of processes; left early, by Ctrl-C say, it waits only for what they are at."""
    pool = ProcessPoolExecutor(os.cpu_count(), initializer=start_worker)
    try:
        yield pool
    except BrokenProcessPool:
        raise BadInput(f"{out}: a worker process was killed, for want of memory perhaps; run the same "
                       "command again") from None
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker():
    """Ctrl-C is left to the parent process; a worker ends when that ends, in whatever way."""
    def follow():
        parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=follow, daemon=True).start()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="data folder to write")
    parser.add_argument("--n", type=int, default=2000, help="number of images")
    parser.add_argument("--size", type=int, default=64, help="side of an image, px")
    parser.add_argument("--seed", type=int, default=0, help="image i depends on the seed and i only")
    parser.add_argument("--max-polyps", type=int, default=3,
                        help=f"the most polyps of an image, up to {MOST_POLYPS}; {MOST_POLYPS} for a judge")
    args = parser.parse_args(argv)
    for name, low, high in (("n", 1, MOST), ("size", 16, LARGEST), ("seed", 0, 2**64 - 1),
                            ("max-polyps", 1, MOST_POLYPS)):
        value = getattr(args, name.replace("-", "_"))
        if not low <= value <= high:
            raise BadInput(f"--{name}: expected at {f'least {low}' if value < low else f'most {high}'}, "
                           f"got {value}")
    found = check_out(args.out, args.n)
    with workers(args.out) as pool:
        drawn = {"seed": args.seed, "max_polyps": args.max_polyps}
        words = pool.map(partial(make_words, **drawn), range(args.n), chunksize=10)
        lines, rows = zip(*tqdm(words, total=args.n, desc="scenes", unit="image"), strict=True)
        captions = "Prompt;Filename\n" + "".join(rows)
        check_same(args.out, found, args.size, "".join(lines), captions)
        # attributes.jsonl comes first: check_same of a later run compares it. prompt-gt.csv comes last, when
        # folder is complete.
        with replacing(args.out / "attributes.jsonl") as tmp:
            tmp.write_text("".join(lines), encoding="utf-8")
        (args.out / "images").mkdir(exist_ok=True)
        make = partial(make_image, **drawn, size=args.size, folder=args.out / "images")
        made = pool.map(make, range(args.n), chunksize=4)
        for _ in tqdm(made, total=args.n, desc="images", unit="image"):
            pass
    with replacing(args.out / "prompt-gt.csv") as tmp:
        tmp.write_text(captions, encoding="utf-8")
    print(f"{args.out}: {args.n} images, {''.join(rows).count(';')} prompts")


if __name__ == "__main__":
    run_command(main)
