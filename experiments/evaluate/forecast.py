"""Futures of a series, sampled from a run, against what came and against two plain forecasters.

    python -m experiments.evaluate.forecast --workdir=DIR [--samples=100] [--seed=0] [--out=DIR]

Every window whose future lies in what the run held out (`configs/forecast.py`). forecast.json:
CRPS and coverage (`metrics/forecast.py`) of the run's averaged weights, of

    seasonal_naive          the same months of the last year, plus what that was wrong by, drawn
                            from all windows before what is held out
    exponential_smoothing   additive error and season, with the trend (none, additive, damped) of
                            the least AIC, fitted by statsmodels before what is held out; its
                            states follow the series to each window's start

and forecast.png: futures with bands of 50 % and 90 %.
"""

import pathlib
import sys
from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from diffusion import files, pictures
from diffusion.data import series
from diffusion.metrics import forecast as scores
from diffusion.metrics.intervals import beside, mean_interval
from experiments.host import cli
from experiments.run import data, generate, workdir

LEVELS = (0.5, 0.8, 0.9)
TRENDS: dict[str, dict[str, Any]] = {
    "none": {"trend": None},
    "additive": {"trend": "add"},
    "damped": {"trend": "add", "damped_trend": True},
}


def seasonal_naive(values: Any, starts: Any, leads: int, season: int, rng: Any, num: int) -> Any:
    """(windows, num, leads) for futures that begin at `starts`; wrong as before the first."""
    known = values[: starts[0]]
    first = np.arange(season, len(known) - leads + 1)[:, None] + np.arange(leads)
    wrong = known[first] - known[first - season]
    place = starts[:, None] - season + np.arange(leads) % season
    return values[place][:, None] + wrong[rng.integers(len(wrong), size=(len(starts), num))]


def exponential_smoothing(
    values: Any, starts: Any, leads: int, season: int, seed: int, num: int
) -> tuple[Any, str]:
    """The same by statsmodels, and which trend it has."""
    from statsmodels.tsa.exponential_smoothing.ets import ETSModel

    def model(known: Any, trend: str) -> Any:
        settings = {"error": "add", "seasonal": "add", "seasonal_periods": season}
        return ETSModel(known, **settings, **TRENDS[trend])

    fitted = {trend: model(values[: starts[0]], trend).fit(disp=False) for trend in TRENDS}
    best = min(fitted, key=lambda trend: fitted[trend].aic)
    found = []
    for start in starts:
        known = model(values[:start], best).smooth(fitted[best].params)
        rng = np.random.default_rng([seed, int(start)])
        paths = known.simulate(leads, anchor="end", repetitions=num, rng=rng)
        found.append(np.asarray(paths).reshape(leads, num).T)
    return np.stack(found), best


def sampled(model: generate.Model, past: Any, num: int, seed: int) -> Any:
    """(windows, num, leads) of the run, standardised."""
    columns = {"past": np.repeat(past, num, axis=0)}
    batches = model.pipeline.images(columns, len(columns["past"]), [seed])
    return np.concatenate(list(batches))[..., 0].reshape(len(past), num, -1)


def measured(samples: Any, outcome: Any) -> dict[str, Any]:
    found = scores.crps(samples, outcome)
    return {
        **beside({"crps": mean_interval(found.mean(1))}),
        "crps_by_lead": [round(float(x), 4) for x in found.mean(0)],
        "coverage": {f"{p:g}": round(scores.coverage(samples, outcome, p), 4) for p in LEVELS},
    }


def forecast(directory: pathlib.Path, num: int, seed: int) -> tuple[dict[str, Any], dict, Any]:
    """What forecast.json holds, the samples by forecaster, and the outcomes."""
    config: ConfigDict = workdir.read_config(directory)
    if config.task != "denoiser" or config.conditioning.concat != "past":
        raise ValueError(
            f"--workdir={directory} holds no run that is told of the past: name one of "
            "configs/forecast.py"
        )
    if num < 2:
        raise ValueError(f"--samples={num} must be at least 2, to have quantiles")
    model = generate.load(directory)
    source, _ = data.open_images(config, "test")
    found = source.batch(np.arange(len(source)))
    starts, leads = found["start"], found["image"].shape[1]
    values = series.SERIES[config.data.name]()
    outcome = values[starts[:, None] + np.arange(leads)]
    season, rng = config.data.season, np.random.default_rng(seed)
    mean, std = (np.array(source.provenance[key]) for key in ("mean", "std"))
    usual = mean[(starts[:, None] + np.arange(leads)) % season][:, None]
    smooth, trend = exponential_smoothing(values, starts, leads, season, seed, num)
    samples = {
        "run": sampled(model, found["past"], num, seed) * std + usual,
        "seasonal_naive": seasonal_naive(values, starts, leads, season, rng, num),
        "exponential_smoothing": smooth,
    }
    results = {name: measured(drawn, outcome) for name, drawn in samples.items()}
    results["exponential_smoothing"]["trend"] = trend
    described = {"windows": len(outcome), "samples": num, "seed": seed, "step": model.step}
    return {**results, **described, "checkpoint": model.checkpoint_hash}, samples, outcome


def plot(path: pathlib.Path, samples: dict[str, Any], outcome: Any) -> None:
    """Futures that follow each other: a row of panels, one a forecaster."""
    leads, panels = outcome.shape[1], []
    chosen = np.arange(0, len(outcome), leads)
    x = (np.arange(len(chosen) * leads) / leads).tolist()
    for name, drawn in samples.items():
        bands = [scores.interval(drawn[chosen], p) for p in (0.9, 0.5)]
        middle = np.median(drawn[chosen], axis=1).reshape(-1).tolist()
        lines = [
            pictures.Line(x, outcome[chosen].reshape(-1).tolist(), "measured"),
            pictures.Line(x, middle, "median"),
        ]
        shaded = [(x, low.reshape(-1), high.reshape(-1)) for low, high in bands]
        panels.append(
            pictures.Panel(
                lines, {"title": name.replace("_", " "), "xlabel": "years"}, None, shaded
            )
        )
    pictures.figure(path, panels, 1, size=(9.0, 2.4))


def define(add: cli.Flags) -> None:
    add.add("string", "workdir", None, "A run of configs/forecast.py.")
    add.add("integer", "samples", 100, "Futures of each window.")
    add.add("integer", "seed", 0, "Of all draws.")
    add.add("string", "out", None, "Folder of forecast.json and forecast.png; default: the run's.")


def main(values: flags.FlagValues) -> None:
    directory = pathlib.Path(cli.require(values, "workdir"))
    results, samples, outcome = forecast(directory, values.samples, values.seed)
    out = pathlib.Path(values.out) if values.out else directory
    out.mkdir(parents=True, exist_ok=True)
    files.write_json(out / "forecast.json", results)
    plot(out / "forecast.png", samples, outcome)
    for name in samples:
        print(f"{name}: CRPS {results[name]['crps']:.4f}, coverage {results[name]['coverage']}")


if __name__ == "__main__":
    sys.exit(cli.run(define, main))
