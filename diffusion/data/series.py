"""Measured series as windows: some past values, and the future that followed them.

    sea_surface_temperature   monthly means of the Nino 1+2 region, degrees Celsius, 1950 to 2010,
                              732 values; public domain (NOAA), in the package statsmodels
                              (BSD-3-Clause) as `datasets.elnino`

Values become anomalies: less the mean of their place in the season (January, ...), over the
deviation of what is left, both of what is not held out.
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
    name: str,
    past: int,
    future: int,
    held_out: int,
    left_out: int = 0,
    season: int = 1,
    split: str = "train",
) -> Source:
    """Every window of a series: "image" (future, 1) and "past" (past, 1), float32.

    "train": those before the last `held_out` values; "test": those whose future lies in them (the
    past may reach back). `left_out` values at the very end are in neither. "start" is where a
    future begins in the series; provenance: "mean" of each place in the season, and "std".
    ValueError for a series too short for that.
    """
    values = SERIES[name]()
    values = values[: len(values) - left_out]
    known = len(values) - held_out
    if (
        min(past, future, held_out, season) < 1
        or left_out < 0
        or held_out < future
        or known < past + future
    ):
        raise ValueError(
            f"data.past={past}, data.held_out={held_out}, data.left_out={left_out} and windows of "
            f"{future} do not fit {len(values) + left_out} values of data.name={name!r}: at least "
            "one window must lie before what is held out, and one future in it"
        )
    mean = np.array([values[i:known:season].mean() for i in range(season)])
    values = values - mean[np.arange(len(values)) % season]
    std = float(values[:known].std())
    first = np.arange(known - past - future + 1)
    if split == "test":
        first = np.arange(known - past, len(values) - past - future + 1)
    rows = (values / std)[first[:, None] + np.arange(past + future)]
    rows = rows.astype(np.float32)[..., None]
    described = {"name": name, "split": split, "mean": mean.tolist(), "std": std}
    columns = {"image": rows[:, past:], "past": rows[:, :past], "start": first + past}
    return MemorySource(columns, described)
