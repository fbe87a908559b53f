"""PNGs that carry how they were made: images, grids, captioned grids, curves."""

import itertools
import pathlib
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, PngImagePlugin

from diffusion import files


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
    with files.whole(path) as partial:
        Image.fromarray(squeezed).save(partial, "PNG", pnginfo=info)


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


# -- drawn by matplotlib -------------------------------------------------------------------------


class Line(NamedTuple):
    """y against x, each y within [low, high] where they are given."""

    x: Sequence[Any]
    y: Sequence[float]
    label: str = ""
    low: Sequence[float] = ()
    high: Sequence[float] = ()


class Panel(NamedTuple):
    """Lines in one frame; `settings` are those of matplotlib's `Axes.set`, `mark` an x to rule,
    `bands` areas (x, low, high) to shade."""

    lines: Sequence[Line]
    settings: Mapping[str, Any]
    mark: float | None = None
    bands: Sequence[tuple[Any, Any, Any]] = ()


def logged(rows: Sequence[Mapping[str, Any]], key: str) -> Line:
    """`key` against the step, of rows as metrics.jsonl holds them."""
    having = [row for row in rows if row.get(key) is not None]
    return Line([row["step"] for row in having], [row[key] for row in having], key)


def figure(
    path: pathlib.Path,
    panels: Sequence[Panel | None],
    columns: int,
    size: tuple[float, float] = (4.2, 2.8),
    made: Mapping[str, str] | None = None,
) -> None:
    """Panels row by row, None leaving a place empty; `made`: how, as the PNG's text metadata.

    `size`: inches of a panel, width and height.
    """
    rows = -(-len(panels) // columns)
    frame, axes = _axes(rows, columns, size)
    for axis, panel in itertools.zip_longest(axes.flat, panels):
        if panel is None:
            axis.axis("off")
        else:
            _draw(axis, panel)
    frame.tight_layout()
    _save(frame, path, dict(made or {}))


def _draw(axis: Any, panel: Panel) -> None:
    for band in panel.bands:
        axis.fill_between(*band, alpha=0.2, color="grey", linewidth=0)
    for line, dash in zip(panel.lines, itertools.cycle(("-", "--", "-.", ":"))):
        style: dict[str, Any] = {"label": line.label, "linestyle": dash, "linewidth": 1}
        if line.low:
            spans = [np.subtract(line.y, line.low), np.subtract(line.high, line.y)]
            style |= {"yerr": np.maximum(spans, 0), "marker": "o", "markersize": 3, "capsize": 2}
        if any(isinstance(x, str) for x in line.x):
            style["linestyle"] = "none"
        axis.errorbar(line.x, line.y, **style)
    if panel.mark is not None:
        axis.axvline(panel.mark, color="grey", linewidth=1, linestyle=":")
    axis.set(**panel.settings)
    if "xticks" in panel.settings:
        axis.minorticks_off()
    axis.grid(alpha=0.3)
    if len(panel.lines) > 1:
        axis.legend(fontsize=7)


def captioned(
    path: pathlib.Path,
    pixels: np.ndarray,
    captions: Sequence[str],
    columns: int = 8,
    made: Mapping[str, str] | None = None,
) -> None:
    """A grid with each image's caption under it; its text metadata hold "generated" and `made`."""
    frame, axes = _axes(-(-len(pixels) // columns), columns, (1.5, 1.95))
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, caption in zip(axes.flat, pixels, captions):
        axis.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255)
        axis.set_title("\n".join(textwrap.wrap(caption, 22)), fontsize=6.5, y=-0.07, va="top")
    frame.subplots_adjust(0.01, 0.06, 0.99, 0.99, wspace=0.08, hspace=0.42)
    _save(frame, path, {"generated": "true", **(made or {})})


def sheet(*arguments: Any) -> Callable[[pathlib.Path], None]:
    """`captioned` of these, once it is told where."""
    return lambda path: captioned(path, *arguments)


def _save(frame: Any, path: pathlib.Path, metadata: dict[str, str]) -> None:
    with files.whole(path) as partial:
        frame.savefig(partial, format="png", dpi=90, metadata=metadata)


def _axes(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, np.ndarray]:
    """A figure of its own, which no window and no list of open figures holds, and its axes."""
    from matplotlib.figure import Figure

    frame = Figure((size[0] * columns, size[1] * rows))
    return frame, frame.subplots(rows, columns, squeeze=False)
