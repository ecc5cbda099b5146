"""Video: handwritten digits in frames of 56 x 56 pixels, and features from a random layer.

The handwriting is scikit-learn's `load_digits`: 1797 digits of 8 x 8 pixels by thirteen writers, in
order. A digit is drawn into a frame in four steps:

1. upscale its 8 x 8 pixels smoothly to ink between 0 and 1;
2. resample the ink under a random translation, rotation and scale;
3. apply a soft threshold to the ink: a low threshold gives a thick stroke, a high one a thin one;
4. combine it with background shapes, and draw brightness and noise at random.

A frame is then divided into 7 x 7 cells of 8 x 8 pixels. The features of a cell are 512 rectified
random projections of the cell and its eight neighbours: an untrained convolution with fixed
weights.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from einops import rearrange, reduce
from sklearn.datasets import load_digits

from .style import HOME, Style

FRAME, GRID, CELL, CHANNELS = 56, 7, 8, 512
INK = 32  # side of an upscaled digit, in pixels
ROW, COLUMN = np.mgrid[:FRAME, :FRAME].astype(np.float32) + 0.5  # pixel centres


def film(
    digits: np.ndarray, split: int, rng: np.random.Generator, style: Style = HOME
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one clip: digits [T] to frames [T, 56, 56] and boxes [T, 4], zeros without a digit."""
    T = len(digits)
    frames = 0.6 * (_stripes(T, rng) if style.striped else _shapes(T, rng))
    boxes = np.zeros((T, 4), dtype=np.int64)
    shown = np.flatnonzero(digits >= 0)
    ink = _write(digits[shown], style.centre, split, rng, style)
    frames[shown] = np.maximum(frames[shown] / 2, ink)
    if style.clutter:
        stray = np.flatnonzero(rng.random(T) < style.clutter)
        other = _pick(rng.integers(0, 10, len(stray)), split, rng, style)
        frames[stray] = np.maximum(frames[stray], 0.5 * _place(other, (6, 50), (6, 50), rng, style))
    boxes[shown] = [_box(picture) for picture in ink]
    return _expose(frames, rng), boxes


def film_pair(
    named: np.ndarray, others: np.ndarray, split: int, rng: np.random.Generator, style: Style
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw two numbers in each frame, one above the other.

    Args:
        named: The number to find, [T]; if negative, no number is drawn.
        others: The other number, [T].
        split: Split that the handwriting is from.
        rng: Random generator.
        style: Style of the rendering.

    Returns:
        Frames [T, 56, 56], and of the number to find the pixels, bool [T, 56, 56], and the boxes
        [T, 4].
    """
    T = len(named)
    frames = 0.6 * _shapes(T, rng)
    masks, boxes = np.zeros(frames.shape, dtype=bool), np.zeros((T, 4), dtype=np.int64)
    shown = np.flatnonzero(named >= 0)
    first = rng.random((len(shown), 1, 1)) < 0.5
    row = np.where(first, FRAME / 4, 3 * FRAME / 4)
    ink = [
        _write(things[shown], (at - 2, at + 2), split, rng, style)
        for things, at in ((named, row), (others, FRAME - row))
    ]
    frames[shown] = np.maximum(frames[shown] / 2, np.maximum(*ink))
    masks[shown] = ink[0] > 0.5
    boxes[shown] = [_box(picture) for picture in ink[0]]
    return _expose(frames, rng), masks, boxes


def _expose(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Apply a random brightness and noise to every frame."""
    T = len(frames)
    grain = rng.standard_normal(frames.shape, dtype=np.float32)
    return _draw(rng, T, 0.5, 1.0) * frames + _draw(rng, T, 0.03, 0.15) * grain


def shape(style: Style) -> tuple[int, ...]:
    """The shape of the features of a frame."""
    return (2 * CHANNELS,) if style.pooled else (GRID, GRID, CHANNELS)


def see(frames: np.ndarray, style: Style = HOME) -> np.ndarray:
    """Compute the features of every cell: frames [T, 56, 56] to [T, 7, 7, 512].

    If the style is pooled, those of the frame: mean and maximum over its cells, [T, 1024].
    """
    side = CELL // 2
    small = reduce(frames, "t (h a) (w b) -> t h w", "mean", a=2, b=2)
    padded = np.pad(small, ((0, 0), (side, side), (side, side)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3 * side, 3 * side), axis=(1, 2))
    patches = rearrange(windows[:, ::side, ::side], "t i j h w -> (t i j) (h w)")
    weight, bias = _layer()
    features = np.maximum(patches @ weight + bias, 0)
    if style.pooled:
        cells = rearrange(features, "(t p) c -> t p c", t=len(frames))
        return np.concatenate([cells.mean(1), cells.max(1)], -1)
    return rearrange(features, "(t i j) c -> t i j c", i=GRID, j=GRID)


def _draw(
    rng: np.random.Generator, T: int, low: float | np.ndarray, high: float | np.ndarray
) -> np.ndarray:
    """Draw one number for each of T frames: [T, 1, 1]."""
    return rng.uniform(low, high, (T, 1, 1)).astype(np.float32)


def _write(
    things: np.ndarray,
    rows: tuple[float | np.ndarray, ...],
    split: int,
    rng: np.random.Generator,
    style: Style,
) -> np.ndarray:
    """Write a digit or a number into each of S frames, its centre between `rows`: [S, 56, 56]."""
    figures = np.array(style.things.figures)[things]  # [S, 1 or 2]
    if figures.shape[1] == 1:
        return _place(_pick(figures[:, 0], split, rng, style), rows, style.centre, rng, style)
    row, column = _draw(rng, len(things), *rows), _draw(rng, len(things), *style.centre)
    apart = _draw(rng, len(things), 9, 11)
    ink = [
        _place(_pick(figure, split, rng, style), (row - 2, row + 2), (x, x), rng, style)
        for figure, x in zip(figures.T, (column - apart, column + apart), strict=True)
    ]
    return np.maximum(*ink)


def _pick(digits: np.ndarray, split: int, rng: np.random.Generator, style: Style) -> np.ndarray:
    """Pick a handwritten sample of each digit: ink [S, 32, 32]."""
    ink, classes = _handwriting()
    pool = np.asarray(style.writers[split])
    return ink[[rng.choice(pool[classes[pool] == digit]) for digit in digits]]


@cache
def _handwriting() -> tuple[np.ndarray, np.ndarray]:
    """All digits upscaled [1797, 32, 32] and their classes [1797]."""
    images, classes = load_digits(return_X_y=True)
    images = rearrange(images, "n (h w) -> n h w", h=8) / 16
    centres = (np.arange(INK) + 0.5) * 8 / INK - 0.5
    blend = np.exp(-0.5 * ((centres[:, None] - np.arange(8)) / 0.5) ** 2)
    blend /= blend.sum(1, keepdims=True)
    return (blend @ images @ blend.T).astype(np.float32), classes


def _place(
    ink: np.ndarray,
    rows: tuple[float | np.ndarray, ...],
    columns: tuple[float | np.ndarray, ...],
    rng: np.random.Generator,
    style: Style,
) -> np.ndarray:
    """Translate, rotate and scale ink [S, 32, 32] into frames [S, 56, 56].

    The centre is drawn between `rows` and between `columns`: (low, high), numbers or [S, 1, 1].
    """
    S = len(ink)
    angle, scale = _draw(rng, S, -0.3, 0.3), INK / _draw(rng, S, *style.size)
    dy, dx = ROW - _draw(rng, S, *rows), COLUMN - _draw(rng, S, *columns)
    down = (np.cos(angle) * dy - np.sin(angle) * dx) * scale
    right = (np.sin(angle) * dy + np.cos(angle) * dx) * scale
    row, column = down + INK / 2, (right - style.slant * down) / style.narrow + INK / 2
    threshold = _draw(rng, S, *style.stroke)
    return 1 / (1 + np.exp(12 * (threshold - _bilinear(ink, row, column))))


def _bilinear(images: np.ndarray, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Interpolate images [S, H, W] at positions [S, h, w]; outside they are 0."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    row = np.clip(row + 0.5, 0, padded.shape[1] - 1.01)
    column = np.clip(column + 0.5, 0, padded.shape[2] - 1.01)
    top, left = row.astype(int), column.astype(int)
    down, right = (row - top).astype(np.float32), (column - left).astype(np.float32)
    image = np.arange(len(images))[:, None, None]
    above = padded[image, top, left] * (1 - right) + padded[image, top, left + 1] * right
    below = padded[image, top + 1, left] * (1 - right) + padded[image, top + 1, left + 1] * right
    return above * (1 - down) + below * down


def _box(picture: np.ndarray) -> tuple[int, int, int, int]:
    """Find the smallest box (x0, y0, x1, y1) around the ink, x1 and y1 exclusive."""
    rows, columns = np.flatnonzero(picture.max(1) > 0.5), np.flatnonzero(picture.max(0) > 0.5)
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _shapes(T: int, rng: np.random.Generator) -> np.ndarray:
    """Draw outlines of ellipses, boxes and bars [T, 56, 56], three to a frame."""
    frames = np.zeros((T, FRAME, FRAME), dtype=np.float32)
    for _ in range(3):
        angle, kind = _draw(rng, T, 0, np.pi), _draw(rng, T, 0, 3)
        dy, dx = ROW - _draw(rng, T, 6, 50), COLUMN - _draw(rng, T, 6, 50)
        tall, wide = _draw(rng, T, 3, 12), _draw(rng, T, 3, 12)
        u = np.abs(np.cos(angle) * dy - np.sin(angle) * dx) / tall
        v = np.abs(np.sin(angle) * dy + np.cos(angle) * dx) / wide
        ellipse, box, bar = np.sqrt(u * u + v * v), np.maximum(u, v), 1 + u + np.maximum(v - 1, 0)
        edge = np.where(kind < 1, ellipse, np.where(kind < 2, box, bar)) - 1
        frames = np.maximum(frames, np.exp(-((edge * (tall + wide)) ** 2) / 8))
    return frames


def _stripes(T: int, rng: np.random.Generator) -> np.ndarray:
    """Draw soft parallel stripes [T, 56, 56], with one width and direction in each frame."""
    angle, period = _draw(rng, T, 0, np.pi), _draw(rng, T, 6, 20)
    across = np.cos(angle) * ROW + np.sin(angle) * COLUMN
    return (1 + np.sin(2 * np.pi * (across / period + _draw(rng, T, 0, 1)))) / 2


@cache
def _layer() -> tuple[np.ndarray, np.ndarray]:
    """Draw the fixed layer, blurred noise of zero mean: weight [144, 512] and bias [512]."""
    rng = np.random.default_rng(2023)
    side = np.arange(3 * CELL // 2)
    blur = np.exp(-0.5 * (side[:, None] - side) ** 2)
    weight = blur @ rng.standard_normal((CHANNELS, len(side), len(side))) @ blur
    weight -= weight.mean((1, 2), keepdims=True)
    weight /= np.linalg.norm(weight, axis=(1, 2), keepdims=True)
    bias = 0.1 * rng.standard_normal(CHANNELS)
    return weight.reshape(CHANNELS, -1).T.astype(np.float32), bias.astype(np.float32)
