"""First-stage latents on disk: encoded once, read by every latent run.

A directory holds `latents-00000-of-00012.array_record`, ..., each of a fixed number of examples,
and `provenance.json`, written last. A record is one row of a NumPy structured dtype, so its size is
fixed and a batch is decoded by one `frombuffer`. Shards are written under a temporary name and
renamed, in any order and by any process; those that are there are not made again, and `plan.json`,
written first, keeps the shards of two first stages apart.

A latent is the first stage's Gaussian posterior, mean m and log-variance l per element, so that
training can draw z = m + exp(l / 2) eps afresh. Per channel c, over all examples and places,

    shift_c = E[z_c] = E[m_c],     std_c^2 = Var[z_c] = Var[m_c] + E[exp(l_c)],              (1)

and what a denoiser sees is (z - shift) * scale. Rules of `Scaling`: a fixed factor (Stable
Diffusion's 0.18215; LDM https://arxiv.org/abs/2112.10752, appendix G), one factor from the standard
deviation of the first examples (LDM's `scale_by_std`), or standardisation per channel (EDM2,
https://arxiv.org/abs/2312.02696: channels of one set differ several-fold in spread).
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from array_record.python import (
    array_record_data_source,
    array_record_module,  # pyright: ignore[reportAttributeAccessIssue]  # compiled, no stubs
)

from diffusion import files
from diffusion.data import provenance
from diffusion.data.sources import Batch

PLAN = "plan.json"
REMEDY = "run `python -m experiments.encode_latents` with the same --config again, to go on"
ANOTHER = "delete it to encode anew, name another folder, or ask for what it holds"
# Whole groups are read and decompressed at once: groups of one make random access exact, and noise
# does not compress.
OPTIONS = "group_size:1,uncompressed"


class Shard(NamedTuple):
    """Examples start .. stop - 1, in the file `path`."""

    path: pathlib.Path
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be written.

    Attributes:
      directory: where.
      count: examples in all: of the data set, times the variants (compositions, flips) of each.
      shard_size: examples a shard (the last may have fewer).
      fields: name -> (NumPy dtype, shape of one example); "mean" and, unless the code is
        deterministic, "logvar" have shape (*space, channels).
      made_from: what identifies the latents: hash of the first stage, preprocessing, tokenizer,
        data set, variants; anything JSON, compared on resuming and on reading.
    """

    directory: pathlib.Path
    count: int
    shard_size: int
    fields: Mapping[str, tuple[str, tuple[int, ...]]]
    made_from: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.count < 1 or self.shard_size < 1:
            raise ValueError(
                f"latents: count={self.count} and shard_size={self.shard_size} must be at least 1"
            )

    @property
    def dtype(self) -> np.dtype:
        return record_dtype(self.fields)

    def body(self) -> dict[str, Any]:
        fields = {name: [dtype, list(shape)] for name, (dtype, shape) in self.fields.items()}
        body = {"count": self.count, "shard_size": self.shard_size, "fields": fields}
        return {**body, "made_from": dict(self.made_from)}

    def shards(self) -> list[Shard]:
        starts = range(0, self.count, self.shard_size)
        names = (f"latents-{i:05d}-of-{len(starts):05d}.array_record" for i in range(len(starts)))
        return [
            Shard(self.directory / name, start, min(start + self.shard_size, self.count))
            for name, start in zip(names, starts)
        ]

    def begin(self) -> None:
        """Makes the directory, or checks that what is in it is a part of this plan.

        Raises:
          ValueError: it holds other data, or latents of another plan; nothing is changed.
        """
        body, plan = self.body(), self.directory / PLAN
        remedy = f"delete {self.directory} and encode again"
        if (self.directory / provenance.FILE).exists():
            found = provenance.read(self.directory, remedy)
        elif plan.exists():
            found = files.read_json(plan, remedy)
        elif self.directory.exists() and any(self.directory.iterdir()):
            raise ValueError(
                f"data.dir={str(self.directory)!r} is not empty and holds no latents: name another "
                "directory, or empty it"
            )
        else:
            return files.write_json(plan, body)
        found = {key: value for key, value in found.items() if key in body}
        files.check_same(found, body, str(self.directory), ANOTHER)

    def missing(self, process_index: int = 0, process_count: int = 1) -> list[Shard]:
        """Shards not yet written; each process is dealt its own."""
        dealt = self.shards()[process_index::process_count]
        return [shard for shard in dealt if not shard.path.exists()]


def record_dtype(fields: Mapping[str, Any]) -> np.dtype:
    """The structured dtype of a record, little-endian."""
    little = {name: (np.dtype(d).newbyteorder("<"), tuple(n)) for name, (d, n) in fields.items()}
    return np.dtype([(name, *layout) for name, layout in little.items()])


def write_shard(plan: Plan, shard: Shard, columns: Mapping[str, np.ndarray]) -> None:
    """Writes one shard, whole or not at all.

    Args:
      columns: each field of the plan for the examples of the shard, stacked.

    Raises:
      ValueError: a field is missing, of another shape, or not finite in its stored precision.
    """
    rows = np.zeros(shard.stop - shard.start, plan.dtype)
    for name in plan.fields:
        shape, planned = np.shape(columns[name]) if name in columns else None, rows[name].shape
        if shape != planned:
            raise ValueError(f"latents: field {name!r} has shape {shape}, the plan says {planned}")
        with np.errstate(over="ignore"):  # an overflow becomes infinite, which is reported below
            rows[name] = columns[name]
        if not np.isfinite(rows[name]).all():
            bad = int(np.argwhere(~np.isfinite(rows[name]))[0, 0]) + shard.start
            raise ValueError(
                f"latents: field {name!r} of example {bad} is not finite as "
                f"{plan.fields[name][0]}: look at the first stage, or store float32"
            )
    with files.whole(shard.path, RuntimeError) as partial:
        writer = array_record_module.ArrayRecordWriter(str(partial), OPTIONS)
        for row in rows:
            writer.write(row.tobytes())
        writer.close()


@dataclasses.dataclass(frozen=True)
class Scaling:
    """How latents are shifted and scaled before a denoiser sees them.

    Attributes:
      rule: "fixed" (scale = `value`, no shift), "std" (scale = 1 / std of the first `examples`, no
        shift) or "channel" (eq. 1 per channel).
      value: of "fixed".
      examples: of "std"; 0 means all.
    """

    rule: str
    value: float = 1.0
    examples: int = 0

    def __post_init__(self) -> None:
        if self.rule not in ("fixed", "std", "channel"):
            raise ValueError(f"latent scaling {self.rule!r} is unknown: use fixed, std or channel")
        if not np.isfinite(self.value) or self.value <= 0:
            raise ValueError(f"latent scale {self.value} must be finite and above 0")


def finish(plan: Plan, scaling: Scaling) -> dict[str, Any]:
    """Once every shard is there: statistics (eq. 1), and the provenance that makes it whole.

    Raises:
      ValueError: a shard is missing; a channel that never varies under the rule "channel".
    """
    if (plan.directory / provenance.FILE).exists():
        known = provenance.read(plan.directory, REMEDY)
        wanted = {"scaling": dataclasses.asdict(scaling)}
        files.check_same(known, wanted, str(plan.directory), ANOTHER, free=True)
        return known
    if missing := plan.missing():
        raise ValueError(f"{len(missing)} shards such as {missing[0].path} are missing: {REMEDY}")
    shift, std = statistics(plan)
    used_shift, scale = _scale(plan, scaling, shift, std)
    files.clear(plan.directory)
    body = {
        **plan.body(),
        "statistics": {"mean": shift.tolist(), "std": std.tolist()},
        "scaling": dataclasses.asdict(scaling),
        "shift": used_shift.tolist(),
        "scale": scale.tolist(),
    }
    whole = provenance.write(plan.directory, body, exclude=(PLAN,))
    (plan.directory / PLAN).unlink(missing_ok=True)
    return whole


def _scale(
    plan: Plan, scaling: Scaling, shift: np.ndarray, std: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    if scaling.rule == "fixed":
        return np.zeros_like(shift), np.full_like(std, scaling.value)
    if scaling.rule == "std":
        # Of all elements about their common mean, as torch's `z.flatten().std()` in LDM.
        means, stds = statistics(plan, scaling.examples) if scaling.examples else (shift, std)
        spread = np.sqrt(np.mean(stds**2 + means**2) - np.mean(means) ** 2)
        shift, std = np.zeros_like(shift), np.full_like(std, spread)
    if not (std > 0).all():
        raise ValueError(
            f"latent scaling {scaling.rule!r}: channel {int(np.argmin(std))} never varies, so "
            "it has no scale; use scaling 'fixed', or train the first stage longer"
        )
    return shift, 1 / std


def statistics(plan: Plan, examples: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Mean and std of z per channel (eq. 1): float64, over the first `examples` or all."""
    number, total, centred, noise = 0, 0.0, 0.0, 0.0
    for rows in _chunks(plan, examples or plan.count):
        mean = rows["mean"].astype(np.float64).reshape(-1, rows["mean"].shape[-1])
        n, chunk_mean = len(mean), mean.mean(0)
        # Chan's update of mean and centred sum of squares, free of cancellation.
        delta, whole = chunk_mean - (total / number if number else chunk_mean), number + n
        centred = centred + ((mean - chunk_mean) ** 2).sum(0) + delta**2 * number * n / whole
        total, number = total + mean.sum(0), whole
        if "logvar" in plan.fields:
            logvar = rows["logvar"].astype(np.float64).reshape(mean.shape)
            noise = noise + np.exp(logvar).sum(0)
    return np.asarray(total / number), np.sqrt((centred + noise) / number)


def _chunks(plan: Plan, examples: int, chunk: int = 1024) -> Iterator[np.ndarray]:
    for shard in plan.shards():
        stop = min(shard.stop, examples) - shard.start
        with array_record_data_source.ArrayRecordDataSource([str(shard.path)]) as records:
            for first in range(0, stop, chunk):
                raw = records.__getitems__(range(first, min(first + chunk, stop)))
                yield np.frombuffer(b"".join(raw), plan.dtype)


class LatentSource:
    """Stored latents as a `Source`: "mean" and "logvar" float32, "tokens", "label", ... as stored.

    Attributes:
      shift, scale: float32 (channels,); a denoiser sees (z - shift) * scale.
      provenance: of the directory.
    """

    def __init__(
        self,
        directory: str | pathlib.Path,
        expected: Mapping[str, Any] | None = None,
        memory_limit_bytes: int = 4 * 2**30,
    ) -> None:
        """Opens `directory`; reads it into memory once where it fits.

        Args:
          expected: what its provenance must say, such as {"made_from": {"first_stage": sha256}}.

        Raises:
          ValueError: missing, half-written, a shard of another size, or made from something else.
        """
        self.directory = pathlib.Path(directory)
        self.provenance = provenance.read(self.directory, REMEDY)
        files.check_same(self.provenance, expected or {}, str(directory), ANOTHER, free=True)
        self.shift = np.array(self.provenance["shift"], np.float32)
        self.scale = np.array(self.provenance["scale"], np.float32)
        self._dtype = record_dtype(self.provenance["fields"])
        self._count = int(self.provenance["count"])
        shards = sorted(name for name in self.provenance["files"] if name.startswith("latents-"))
        paths = [str(self.directory / name) for name in shards]
        self._records: Any = array_record_data_source.ArrayRecordDataSource(paths)
        self._rows: np.ndarray | None = None
        if self._count * self._dtype.itemsize <= memory_limit_bytes:
            self._rows = self._read(np.arange(self._count))

    def __len__(self) -> int:
        return self._count

    def _read(self, indices: np.ndarray, chunk: int = 8192) -> np.ndarray:
        rows = np.empty(len(indices), self._dtype)
        for first in range(0, len(indices), chunk):
            wanted = indices[first : first + chunk].tolist()
            raw = b"".join(self._records.__getitems__(wanted))
            rows[first : first + chunk] = np.frombuffer(raw, self._dtype)
        return rows

    def batch(self, indices: np.ndarray) -> Batch:
        rows = self._read(indices) if self._rows is None else self._rows[indices]
        columns = {name: np.ascontiguousarray(rows[name]) for name in self._dtype.names or ()}
        return {k: v.astype(np.float32) if v.dtype.kind == "f" else v for k, v in columns.items()}
