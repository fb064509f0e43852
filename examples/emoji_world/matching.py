"""Explain a picture as sprites over a gradient: the mathematics of the reader (`read.py`).

A picture is split into a background bg and D, its difference to it. A sprite with mask alpha shows A t + B u in each
channel, with its tint t, white u = 1, and the maps A and B of its kind (`templates.py`). So it makes D = A t + B u - alpha bg,
and with D' = D + alpha bg the energy of D that it explains is

    gain = |D|^2 - |D' - A t - B u|^2 = 2 t A.D' + 2 u B.D' - |A t + B u|^2 - alpha.(2 D bg + alpha bg^2),

which for all places at once is a few correlations of D and D bg with A, B and alpha; the background changes with the row
alone, so the terms without D are sums over rows. Kinds are told apart with whatever t and u fit each channel best, so that
wrong colours do not hide a right shape; the tint is then the one of the eight that is nearest. Energies are squares of
colours in 0 to 1, summed over channels and pixels.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from .templates import SHAPES, TINT_COLOURS, Templates, templates
from .world import BACKGROUNDS, KINDS, TINTS

__all__ = ["Canvas", "Square", "fit_background", "leftover", "look", "overlap", "proposals", "split", "to_size"]

SIDES = tuple(0.29 * 1.12**i for i in range(8))  # sprite sides that are looked for, in short sides of the picture
NEAR = (0.90, 0.95, 1.0, 1.05, 1.10)  # sides tried in refinement, relative to the proposal
CLIMBS = 4  # steps of a pixel in place and side, and of 3 degrees, at most
OVERLAP = 0.15  # squares may share this much of the smaller one
BLAME = 0.5  # weight of what a square leaves unexplained against what it explains
LEFT, PART = 0.02, 0.35  # energy of a pixel that is something; part of a square that makes it one thing
FLOOR, MOST_NOISE = 0.0004, 0.003  # energy per pixel: of no account; noise at most (3 and 8 grey values per channel)
MOST = 5  # proposals at most
PALE = 0.3  # how firmly white stays white where it would fit better in another colour
# Brightness and two axes of colour. Colour counts half, as for eyes and lossy coders, which change it first.
EYE = np.array([[1, 1, 1], [0.5 * 1.5**0.5, -0.5 * 1.5**0.5, 0], [0.5**1.5, 0.5**1.5, -(0.5**0.5)]], np.float32)
EVERY, REAL = list(range(len(SHAPES))), list(range(len(KINDS)))  # with and without the blobs

Place = tuple[int, int, int, float]  # left, top and side in pixels of a canvas; turn in degrees
Square = tuple[float, float, float, float]  # centre x, y and side in short sides of the picture; turn in degrees


@dataclass(frozen=True)
class Canvas:
    """A picture at working size as foreground over background.

    planes: three of picture minus background, and their dot product with the background; (4, H, W).
    rows: colour of the background's rows, (3, H).
    """

    planes: np.ndarray
    rows: np.ndarray

    @property
    def size(self) -> tuple[int, int]:
        return self.planes.shape[2], self.planes.shape[1]

    @functools.cached_property
    def noise(self) -> float:
        """Energy of a typical background pixel; a sprite is not blamed for that much."""
        quiet = self.energy[self.energy < LEFT]
        return min(float(np.median(quiet)), MOST_NOISE) if quiet.size else 0.0

    @functools.cached_property
    def energy(self) -> np.ndarray:
        """Squared difference to the background, (H, W)."""
        return (self.planes[:3] ** 2).sum(0)

    def region(self, x: int, y: int, width: int, height: int) -> Canvas:
        """A rectangle that may reach outside the picture; there it shows plain background."""
        w, h = self.size
        planes = np.zeros((4, height, width), np.float32)
        y0, y1, x0, x1 = max(y, 0), min(y + height, h), max(x, 0), min(x + width, w)
        planes[:, y0 - y : y1 - y, x0 - x : x1 - x] = self.planes[:, y0:y1, x0:x1]
        return Canvas(planes, self.rows[:, np.clip(np.arange(y, y + height), 0, h - 1)])

    def without(self, squares: list[Square]) -> Canvas:
        """The same canvas with squares turned into plain background."""
        planes, short = self.planes.copy(), min(self.size)
        for square in squares:
            x, y, side, _ = (v * short for v in square)
            y0, y1, x0, x1 = (max(0, round(v)) for v in (y - side / 2, y + side / 2, x - side / 2, x + side / 2))
            planes[:, y0:y1, x0:x1] = 0
        return Canvas(planes, self.rows)


def to_size(image: Image.Image, short: int) -> np.ndarray:
    """The picture with this short side in pixels, float32 in 0 to 1, (H, W, 3)."""
    scale = short / min(image.size)
    width, height = (max(short, round(side * scale)) for side in image.size)
    size = (width, height)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC)
    return np.asarray(image, np.float32) / 255


def _times(height: int) -> np.ndarray:
    return (np.arange(height, dtype=np.float32) + 0.5) / height


def fit_background(picture: np.ndarray) -> tuple[str, float, np.ndarray]:
    """Name, share of the picture that agrees, and the gradient (2, 3): colour = line[0] + line[1] * t, t down from 0 to 1."""
    h, w, _ = picture.shape
    t = _times(h)[:, None]
    best = (-1.0, "", np.zeros((2, 3), np.float32))
    lights = np.arange(-16, 17, 4, dtype=np.float32) / 255
    for name, ends in BACKGROUNDS.items():
        top, bottom = np.array(ends, np.float32) / 255
        off = picture - (top + (bottom - top) * t)[:, None]
        mean, square = off.mean(-1), (off * off).mean(-1)
        # mean over channels of (off - light)^2, without a plane per light
        away = square[..., None] - 2 * mean[..., None] * lights + lights**2
        agree = np.exp(away * (-0.5 / 0.045**2)).mean((0, 1))
        i = int(agree.argmax())
        if agree[i] > best[0]:
            best = (float(agree[i]), name, np.stack([top + lights[i], bottom - top]))
    _, name, line = best
    prior = line.copy()
    basis = np.concatenate([np.ones((h, 1), np.float32), t], axis=1)
    for reach in (0.08, 0.05):
        inlier = np.abs(picture - (basis @ line)[:, None]).max(-1) < reach
        weight = inlier.sum(1).astype(np.float32)
        gram = (basis * weight[:, None]).T @ basis + np.eye(2) * (0.02 * h * w)
        right = basis.T @ (picture * inlier[..., None]).sum(1) + prior * (0.02 * h * w)
        line = np.linalg.solve(gram, right).astype(np.float32)
    share = float((np.abs(picture - (basis @ line)[:, None]).max(-1) < 0.06).mean())
    return name, share, line


def split(picture: np.ndarray, line: np.ndarray) -> Canvas:
    """The picture (H, W, 3) over the background that `fit_background` found."""
    rows = line[0] + line[1] * _times(len(picture))[:, None]
    over = np.ascontiguousarray((picture - rows[:, None]).transpose(2, 0, 1))
    rows = np.ascontiguousarray(rows.T)
    product = (over * rows[:, :, None]).sum(0)
    return Canvas(np.concatenate([over, product[None]]), rows)


def _window_sums(plane: np.ndarray, side: int) -> np.ndarray:
    """Sums over all squares of this side, shape (H - side + 1, W - side + 1)."""
    table = np.pad(plane.astype(np.float64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    return table[side:, side:] - table[:-side, side:] - table[side:, :-side] + table[:-side, :-side]


def _gains(canvas: Canvas, t: Templates, shapes: list[int], step: int = 1) -> np.ndarray:
    """Energy that every shape explains at every place of a canvas, in the colours that fit best.

    Args:
        t: templates of one side s.
        shapes: indices of the K shapes to try.
        step: distance between places in pixels.

    Returns:
        Gains, shape (R, C, K), with R = (H - s) // step + 1 and so on.
    """
    side = round(t.a.shape[1] ** 0.5)
    windows = sliding_window_view(canvas.planes, (side, side), axis=(1, 2))[:, ::step, ::step]
    size = (*windows.shape[1:3], len(shapes))
    flat = windows.reshape(4, -1, side * side)
    over, shaded = flat[:3].reshape(-1, side * side), flat[3]
    rows = sliding_window_view(canvas.rows, side, axis=1)[:, ::step]  # (3, R, side)
    a = (over @ t.a[shapes].T).reshape(3, *size) + (rows @ t.rows_aa[shapes].T)[:, :, None]
    b = (over @ t.b[shapes].T).reshape(3, *size) + (rows @ t.rows_ab[shapes].T)[:, :, None]
    covered = 2 * (shaded @ t.alpha[shapes].T).reshape(size) + ((rows**2).sum(0) @ t.rows_al[shapes].T)[:, None]
    # Best colours per channel: [[aa, ab], [ab, bb]] (tint, white) = (a, b), where white is held near 1 by PALE.
    aa, ab, bb = t.sum_aa[shapes], t.sum_ab[shapes], t.sum_bb[shapes]
    held = (1 + PALE) * bb + 1e-3  # a blob has no white part
    b += PALE * bb
    gain = (held * a * a - 2 * ab * a * b + aa * b * b) / (aa * held - ab * ab) - PALE * bb
    return gain.sum(0) - covered


def proposals(canvas: Canvas, turns: tuple[float, ...] = (0.0,)) -> list[Square]:
    """Squares that an upright or turned sprite explains, best first, not overlapping."""
    w, h = canvas.size
    short = min(w, h)
    pad = 3  # a sprite may reach this many pixels outside
    canvas = canvas.region(-pad, -pad, w + 2 * pad, h + 2 * pad)
    found = []
    for fraction in SIDES:
        side = round(fraction * short)
        energy = _window_sums(canvas.energy, side)
        for turn in turns:
            gain = _gains(canvas, templates(side, turn), REAL).max(-1)
            score = gain - BLAME * (energy - gain)
            peak = sliding_window_view(np.pad(score, 1, constant_values=-np.inf), (3, 3)).max((-1, -2))
            for y, x in np.argwhere((score == peak) & (score > 0)):
                across, down = (float(v - pad + side / 2) / short for v in (x, y))
                found.append((float(score[y, x]), (across, down, side / short, turn)))
    found.sort(reverse=True)
    kept: list[Square] = []
    for _, square in found:
        if all(overlap(square, other) < OVERLAP for other in kept):
            kept.append(square)
    return kept[:MOST]


def overlap(p: Square, q: Square) -> float:
    """Shared area of two squares (x, y, side) over the smaller one's."""
    reach = (p[2] + q[2]) / 2
    dx, dy = (max(0.0, min(reach - abs(p[i] - q[i]), p[2], q[2])) for i in (0, 1))
    return dx * dy / min(p[2], q[2]) ** 2


def _search(
    canvas: Canvas, places: list[Place], reach: int, step: int, shapes: list[int], shares: np.ndarray
) -> tuple[float, Place]:
    """The best share and place of a real kind over some places and their neighbours.

    `shares` (one per shape) is raised to what each shape explains of a square at its own best place.
    """
    best, at = -np.inf, places[0]
    real = [i for i, shape in enumerate(shapes) if shape < len(KINDS)]
    for x, y, side, turn in places:
        part = canvas.region(x - reach, y - reach, side + 2 * reach, side + 2 * reach)
        gain = _gains(part, templates(side, turn), shapes, step)
        energy = _window_sums(part.energy, side)[::step, ::step] - canvas.noise * side**2
        share = np.minimum(gain / (np.maximum(energy, 0) + FLOOR * side**2)[..., None], 0.999)
        shares[shapes] = np.maximum(shares[shapes], share.max((0, 1)))
        share = share[..., real].max(-1)
        row, column = np.unravel_index(share.argmax(), share.shape)
        if share[row, column] > best:
            best = float(share[row, column])
            at = (x - reach + int(column) * step, y - reach + int(row) * step, side, turn)
    return best, at


def _refine(canvas: Canvas, square: Square, turns: tuple[float, ...]) -> tuple[Place, np.ndarray]:
    """The best place near a proposal, and the share that each shape explains at its own best place there."""
    x, y, fraction, turn = square
    short = min(canvas.size)
    shares = np.full(len(SHAPES), -np.inf)
    sides = sorted({2 * round(s * fraction * short / 2) for s in NEAR})
    places = [(round(x * short - side / 2), round(y * short - side / 2), side, turn) for side in sides]
    best, at = _search(canvas, places, 3, 1, EVERY, shares)
    if turns:
        likely = [int(i) for i in np.argsort(shares[: len(KINDS)])[::-1][:6]]
        best, at = max((best, at), _search(canvas, [(*at[:3], turn + d) for d in turns], 2, 2, likely, shares))
    for _ in range(CLIMBS):
        x, y, side, turn = at
        before = best
        places = [(x, y, side + d, turn) for d in (-1, 0, 1)]
        places += [(x, y, side, turn + d) for d in turns and (-3.0, 3.0)]
        best, at = _search(canvas, places, 1, 1, EVERY, shares)
        if best < before + 0.01:
            break
    return at, shares


def look(canvas: Canvas, square: Square, turns: tuple[float, ...]) -> tuple[Square, str | None, str | None, float]:
    """The square moved to where it fits best, with kind and tint (None for a blob) and confidence."""
    (x, y, side, turn), shares = _refine(canvas, square, turns)
    short = min(canvas.size)
    moved = ((x + side / 2) / short, (y + side / 2) / short, side / short, turn)
    order = np.argsort(shares)[::-1]
    if order[0] >= len(KINDS):
        return moved, None, None, 0.0
    first, second = shares[order[:2]]
    confidence = max(0.0, float(first * (1 - (1 - first) / (1 - second))))
    return moved, KINDS[order[0]], _tint(canvas.region(x, y, side, side), templates(side, turn), order[0]), confidence


def _tint(part: Canvas, t: Templates, kind: int) -> str:
    """The tint that leaves least of a square unexplained."""
    alpha, a, b = t.alpha[kind], t.a[kind], t.b[kind]
    seen = part.planes[:3].reshape(3, -1) + alpha * np.repeat(part.rows, len(part.rows[0]), axis=1)  # D'
    left = seen - np.multiply.outer(TINT_COLOURS, a) - b  # (8, 3, s * s)
    return list(TINTS)[int(((EYE @ left) ** 2).sum((1, 2)).argmin())]


def leftover(canvas: Canvas) -> Square | None:
    """The square of a small sprite that is fullest of foreground, or None if none is full enough to be a thing."""
    short = min(canvas.size)
    side = round(SIDES[0] * short)
    part = _window_sums(canvas.energy > LEFT, side) / side**2
    y, x = np.unravel_index(part.argmax(), part.shape)
    return ((x + side / 2) / short, (y + side / 2) / short, side / short, 0.0) if part[y, x] > PART else None
