"""A benchmark's numbers as a table and as a picture."""

import pathlib
from typing import Any

from diffusion import pictures, wording
from diffusion.pictures import Line, Panel


def table(found: dict[str, Any]) -> str:
    if "rows" in found:
        fit = found.get("fit")
        said = f"\nsecs = {fit['a_secs']:.4g} + {fit['b_secs']:.4g} B" if fit else ""
        return _rows(found["rows"]) + said
    lines = [
        f"{'side':<10} {'examples/s':>11} {'p10':>9} {'p90':>9} {'ms a call':>10} {'MFU':>6} "
        f"{'peak MiB':>9} {'cold s':>7} {'warm s':>7}"
    ]
    for name, side in found["sides"].items():
        rate, first = side["examples_per_sec"], side["first_step_secs"]
        lines.append(
            f"{name:<10} {rate['median']:>11.1f} {rate['p10']:>9.1f} {rate['p90']:>9.1f} "
            f"{side['step_secs']['median'] * 1e3:>10.2f} {side['mfu']:>6.1%} "
            f"{side['peak_bytes'] / 2**20:>9.0f} {first['cold']:>7.2f} "
            f"{first.get('warm', float('nan')):>7.2f}"
        )
    if gate := found["gate"]:
        errors = ", ".join(f"{k} {gate[k]:.1e}" for k in gate["limits"] if k in gate)
        lines.append(f"gate {'passed' if gate['passed'] else 'FAILED'}: {errors}")
    if "ratio" in found:
        lines.append(
            f"ratio {found['ratio']:.2f} (peak memory {found['memory_ratio']:.2f}, our buffers "
            f"to its peak {found['buffer_ratio']:.2f})"
        )
    return "\n".join(lines)


def _rows(rows: list[dict[str, Any]]) -> str:
    names = list(rows[0])
    return wording.table([names, *([_short(row[name]) for name in names] for row in rows)])


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def plot(path: pathlib.Path, found: dict[str, Any]) -> None:
    """Examples a second of each side, p10 to p90."""
    if "sides" not in found:
        raise ValueError("--plot draws the sides of train, sample, autoencoder and compile")
    rates = [side["examples_per_sec"] for side in found["sides"].values()]
    medians, low, high = ([rate[key] for rate in rates] for key in ("median", "p10", "p90"))
    title = f"{found['suite']}, batch {found['batch']}"
    settings = {"title": title, "ylabel": "examples a second", "ylim": (0, 1.1 * max(high))}
    line = Line(list(found["sides"]), medians, low=low, high=high)
    pictures.figure(path, [Panel([line], settings)], columns=1)
