"""PNGs: single images that carry how they were made, grids, captioned grids, curves."""

import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, PngImagePlugin


def as_images(x: np.ndarray) -> np.ndarray:
    """Samples of any rank as uint8 (n, height, width, channels), to look at.

    Images as they are, the frames of a video side by side, a series (n, length, channels) in
    [-1, 1] as a plot of its first channel.
    """
    if x.ndim == 5:
        n, frames, height, width, channels = x.shape
        return x.transpose(0, 2, 1, 3, 4).reshape(n, height, frames * width, channels)
    return _plots(x[..., 0]) if x.ndim == 3 else x


def _plots(values: np.ndarray, height: int = 96) -> np.ndarray:
    """(n, length) in [-1, 1] to uint8 (n, height, length, 1): black lines on white."""
    row = (1 - np.clip(values, -1, 1)) / 2 * (height - 1)
    before = np.concatenate([row[:, :1], row[:, :-1]], 1)
    top, bottom = np.minimum(row, before) - 0.5, np.maximum(row, before) + 0.5
    place = np.arange(height)[None, :, None]
    inside = (place >= top[:, None]) & (place <= bottom[:, None])
    return np.where(inside, 0, 255).astype(np.uint8)[..., None]


def save_png(path: pathlib.Path, pixels: np.ndarray, text: Mapping[str, str]) -> None:
    """One uint8 (height, width, channels) image with text metadata, "generated" among it."""
    info = PngImagePlugin.PngInfo()
    for key, value in {"generated": "true", **text}.items():
        info.add_text(key, str(value))
    squeezed = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    Image.fromarray(squeezed).save(path, pnginfo=info)


def grid(pixels: np.ndarray, columns: int | None = None, gap: int = 2) -> np.ndarray:
    """(n, height, width, channels) uint8 to one image, row by row, on mid-grey."""
    n, height, width, channels = pixels.shape
    columns = columns or int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    shape = (rows * (height + gap) + gap, columns * (width + gap) + gap, channels)
    sheet = np.full(shape, 128, np.uint8)
    for i, image in enumerate(pixels):
        top, left = (i // columns) * (height + gap) + gap, (i % columns) * (width + gap) + gap
        sheet[top : top + height, left : left + width] = image
    return sheet


def save_grid(path: pathlib.Path, pixels: np.ndarray, columns: int | None = None, scale: int = 1):
    sheet = grid(pixels, columns).repeat(scale, 0).repeat(scale, 1)
    save_png(path, sheet, {})


def captioned(path: pathlib.Path, pixels: np.ndarray, captions: Sequence[str], columns: int = 8):
    """A grid with each image's caption under it."""
    import textwrap

    plt = pyplot()
    rows = -(-len(pixels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(1.5 * columns, 1.95 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, caption in zip(axes.flat, pixels, captions):
        axis.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255)
        axis.set_title("\n".join(textwrap.wrap(caption, 22)), fontsize=6.5, y=-0.07, va="top")
    figure.subplots_adjust(0.01, 0.06, 0.99, 0.99, wspace=0.08, hspace=0.42)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def curves(path: pathlib.Path, runs: Mapping[str, pathlib.Path], key: str = "loss") -> None:
    """`key` of each run's metrics.jsonl against the step, one panel a run."""
    plt = pyplot()
    figure, axes = plt.subplots(1, len(runs), figsize=(4.2 * len(runs), 3.2), squeeze=False)
    for axis, (name, directory) in zip(axes.flat, runs.items()):
        lines = (directory / "metrics.jsonl").read_text().splitlines()
        rows = [row for row in map(json.loads, lines) if row.get(key) is not None]
        axis.plot([row["step"] for row in rows], [row[key] for row in rows], linewidth=1)
        axis.set(title=name, xlabel="step", ylabel=key, yscale="log")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def panels(
    path: pathlib.Path,
    rows: Sequence[Mapping[str, float | int]],
    shown: Mapping[str, Sequence[str]],
    mark: int | None = None,
) -> None:
    """Keys of `rows` against their "step", one panel a title; `mark`: a step to draw a line at."""
    plt = pyplot()
    columns = 3
    figure, axes = plt.subplots(
        -(-len(shown) // columns), columns, figsize=(4.2 * columns, 2.7 * -(-len(shown) // columns))
    )
    for axis, (title, keys) in zip(axes.flat, shown.items()):
        for key in keys:
            have = [row for row in rows if row.get(key) is not None]
            axis.plot([r["step"] for r in have], [r[key] for r in have], linewidth=1, label=key)
        if mark is not None:
            axis.axvline(mark, color="grey", linewidth=1, linestyle=":")
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        if len(keys) > 1:
            axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
