"""Measured series as windows: some past values, and the future that followed them.

    sea_surface_temperature   monthly means of the Nino 1+2 region, degrees Celsius, 1950 to 2010,
                              732 values; public domain (NOAA), in the package statsmodels
                              (BSD-3-Clause) as `datasets.elnino`

Values are standardised by mean and deviation of what is not held out.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from diffusion.data.sources import MemorySource, Source

Values = Float[np.ndarray, "times"]


def _sea_surface_temperature() -> Values:
    try:
        from statsmodels.datasets import elnino  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            "data.name='sea_surface_temperature' is read from the package statsmodels, which is "
            "not installed: pip install -r requirements-forecast.txt"
        ) from error
    return elnino.load_pandas().data.to_numpy(np.float64)[:, 1:].reshape(-1)


SERIES: dict[str, Callable[[], Values]] = {"sea_surface_temperature": _sea_surface_temperature}


def windows(
    name: str, past: int, future: int, held_out: int, left_out: int = 0, split: str = "train"
) -> Source:
    """Every window of a series: "image" (future, 1) and "past" (past, 1), float32.

    "train": those before the last `held_out` values; "test": those whose future lies in them (the
    past may reach back). `left_out` values at the very end are in neither. provenance: "mean" and
    "std" that were taken off. ValueError for a series too short for that.
    """
    values = SERIES[name]()
    values = values[: len(values) - left_out]
    known = len(values) - held_out
    if (
        min(past, future, held_out) < 1
        or left_out < 0
        or held_out < future
        or known < past + future
    ):
        raise ValueError(
            f"data.past={past}, data.held_out={held_out}, data.left_out={left_out} and windows of "
            f"{future} do not fit {len(values) + left_out} values of data.name={name!r}: at least "
            "one window must lie before what is held out, and one future in it"
        )
    mean, std = float(values[:known].mean()), float(values[:known].std())
    first = np.arange(known - past - future + 1)
    if split == "test":
        first = np.arange(known - past, len(values) - past - future + 1)
    rows = ((values - mean) / std)[first[:, None] + np.arange(past + future)]
    rows = rows.astype(np.float32)[..., None]
    described = {"name": name, "split": split, "mean": mean, "std": std}
    return MemorySource({"image": rows[:, past:], "past": rows[:, :past]}, described)
