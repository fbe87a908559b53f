"""Stored latents: resumable to the byte, whole or refused, with right statistics."""

import dataclasses
import json

import numpy as np
import pytest

from diffusion.data import latents, loader, provenance

FIELDS = {
    "mean": ("float16", (4, 4, 3)),
    "logvar": ("float32", (4, 4, 3)),
    "tokens": ("int32", (5,)),
    "label": ("int32", ()),
}
COUNT = 50


def columns(start, stop):
    """Latents of examples start .. stop - 1, each a function of its number only."""
    rows = [np.random.default_rng(i) for i in range(start, stop)]
    mean = np.stack([r.normal(size=(4, 4, 3)) * [1, 2, 0.5] + [0, 3, -1] for r in rows])
    logvar = np.stack([r.normal(size=(4, 4, 3)) - 2 for r in rows])
    numbers = np.arange(start, stop)
    return {
        "mean": mean,
        "logvar": logvar,
        "tokens": numbers[:, None] + np.arange(5),
        "label": numbers % 10,
    }


@pytest.fixture
def plan(tmp_path):
    return latents.Plan(tmp_path / "latents", COUNT, 16, FIELDS, {"first_stage": "abc", "f": 4})


def write(plan, shards=None):
    plan.begin()
    for shard in plan.missing() if shards is None else shards:
        latents.write_shard(plan, shard, columns(shard.start, shard.stop))


def finished(plan, rule="channel", **options):
    write(plan)
    return latents.finish(plan, latents.Scaling(rule, **options))


@pytest.mark.parametrize("memory", [2**30, 0])
def test_what_is_read_is_what_was_written(plan, memory):
    finished(plan)
    source = latents.LatentSource(plan.directory, memory_limit_bytes=memory)
    assert len(source) == COUNT
    indices = np.array([49, 0, 16, 15, 16])
    batch, expected = source.batch(indices), columns(0, COUNT)
    for name in FIELDS:
        kind = "float32" if name in ("mean", "logvar") else "int32"
        assert batch[name].dtype == kind
        stored = expected[name].astype(FIELDS[name][0])
        np.testing.assert_array_equal(batch[name], stored[indices].astype(kind))
    assert batch["mean"].flags.c_contiguous


def test_loader_over_latents(plan):
    finished(plan)
    source = latents.LatentSource(plan.directory)
    made = loader.Loader(source, 25, 0)
    seen = np.concatenate([next(made)["tokens"][:, 0] for _ in range(2)])
    made.close()
    assert sorted(seen.tolist()) == list(range(COUNT))


def test_statistics_are_those_of_sampled_latents(plan):
    known = finished(plan)
    data = columns(0, COUNT)
    mean = data["mean"].astype(np.float16).astype(np.float64)
    std = np.exp(0.5 * data["logvar"].astype(np.float32).astype(np.float64))
    np.testing.assert_allclose(known["statistics"]["mean"], mean.mean((0, 1, 2)), rtol=1e-12)
    expected = np.sqrt(mean.var((0, 1, 2)) + (std**2).mean((0, 1, 2)))
    np.testing.assert_allclose(known["statistics"]["std"], expected, rtol=1e-12)
    z = mean + std * np.random.default_rng(0).normal(size=(200, *mean.shape))
    source = latents.LatentSource(plan.directory)
    scaled = (z - source.shift) * source.scale
    np.testing.assert_allclose(scaled.mean((0, 1, 2, 3)), 0, atol=0.01)
    np.testing.assert_allclose(scaled.std((0, 1, 2, 3)), 1, atol=0.01)


def test_statistics_do_not_cancel_far_from_zero(tmp_path):
    fields = {"mean": ("float64", (1, 1))}
    plan = latents.Plan(tmp_path / "far", 3000, 1000, fields, {})
    plan.begin()
    rng = np.random.default_rng(0)
    values = 1e8 + rng.normal(size=(3000, 1, 1))
    for shard in plan.missing():
        latents.write_shard(plan, shard, {"mean": values[shard.start : shard.stop]})
    _, std = latents.statistics(plan)
    np.testing.assert_allclose(std, values.std(), rtol=1e-6)


def test_scaling_rules(tmp_path):
    made = {}
    for rule, options in (
        ("fixed", {"value": 0.18215}),
        ("std", {"examples": 10}),
        ("channel", {}),
    ):
        plan = latents.Plan(tmp_path / rule, COUNT, 16, FIELDS, {})
        made[rule] = finished(plan, rule, **options)
    assert made["fixed"]["scale"] == [0.18215] * 3 and made["fixed"]["shift"] == [0] * 3
    first = columns(0, 10)
    mean = first["mean"].astype(np.float16).astype(np.float64)
    spread = np.sqrt(mean.var() + np.exp(first["logvar"].astype(np.float32).astype(float)).mean())
    np.testing.assert_allclose(made["std"]["scale"], 1 / spread, rtol=1e-6)
    assert made["std"]["shift"] == [0] * 3
    assert made["channel"]["shift"] == made["channel"]["statistics"]["mean"]


def test_killed_and_resumed_gives_the_same_bytes(plan, tmp_path):
    finished(plan)
    other = dataclasses.replace(plan, directory=tmp_path / "resumed")
    other.begin()
    shards = other.shards()
    write(other, shards[:2])
    kept = shards[0].path.stat().st_mtime_ns
    # A process killed inside the third shard leaves a temporary file and no shard.
    leftover = other.directory / f".{shards[2].path.name}.123.partial"
    leftover.write_bytes(b"half of a shard")
    with pytest.raises(ValueError, match=r"2 shards .*encode_latents"):
        latents.finish(other, latents.Scaling("channel"))
    with pytest.raises(ValueError, match="half-written"):
        latents.LatentSource(other.directory)
    assert [shard.start for shard in other.missing()] == [32, 48]
    finished(other)
    assert shards[0].path.stat().st_mtime_ns == kept, "a whole shard is not made again"
    names = sorted(path.name for path in plan.directory.iterdir())
    assert names == sorted(path.name for path in other.directory.iterdir())
    for name in names:
        assert (plan.directory / name).read_bytes() == (other.directory / name).read_bytes(), name


def test_processes_are_dealt_disjoint_shards(plan):
    plan.begin()
    parts = [plan.missing(i, 3) for i in range(3)]
    together = [shard.start for part in parts for shard in part]
    assert sorted(together) == [0, 16, 32, 48] and len(set(together)) == 4
    for part in reversed(parts):
        write(plan, part)
    assert latents.finish(plan, latents.Scaling("channel"))["count"] == COUNT


def test_finishing_twice_changes_nothing_and_another_scaling_is_refused(plan):
    known = finished(plan)
    assert finished(plan) == known
    with pytest.raises(ValueError, match=r"scaling\.rule='channel'.*'fixed'"):
        latents.finish(plan, latents.Scaling("fixed"))


@pytest.mark.parametrize("stage", ["started", "finished"])
@pytest.mark.parametrize(
    "change, key",
    [
        ({"made_from": {"first_stage": "xyz", "f": 4}}, r"made_from\.first_stage"),
        ({"shard_size": 8}, "shard_size"),
        ({"count": 49}, "count"),
    ],
)
def test_latents_of_another_plan_are_not_mixed(plan, stage, change, key):
    write(plan, plan.shards()[:1]) if stage == "started" else finished(plan)
    before = {p.name: p.read_bytes() for p in plan.directory.iterdir()}
    with pytest.raises(ValueError, match=key):
        dataclasses.replace(plan, **change).begin()
    assert before == {p.name: p.read_bytes() for p in plan.directory.iterdir()}


def test_expected_provenance_is_checked_on_reading(plan):
    finished(plan)
    latents.LatentSource(plan.directory, {"made_from": {"first_stage": "abc"}})
    with pytest.raises(ValueError, match=r"made_from\.first_stage='abc'.*'other'"):
        latents.LatentSource(plan.directory, {"made_from": {"first_stage": "other"}})


def test_files_beside_the_latents_are_part_of_the_provenance(plan):
    plan.begin()
    (plan.directory / "first_stage").mkdir()
    (plan.directory / "first_stage" / "config.json").write_text("{}")
    finished(plan)
    files = json.loads((plan.directory / provenance.FILE).read_text())["files"]
    assert "first_stage/config.json" in files and "plan.json" not in files
    (plan.directory / "first_stage" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"first_stage/config\.json is missing"):
        latents.LatentSource(plan.directory)


def test_a_killed_finish_can_be_finished(plan, monkeypatch):
    write(plan)

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(provenance, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            latents.finish(plan, latents.Scaling("channel"))
    plan.begin()
    assert plan.missing() == []
    assert latents.finish(plan, latents.Scaling("channel"))["count"] == COUNT


def test_bad_latents_are_refused_and_leave_no_shard(plan):
    plan.begin()
    shard = plan.missing()[1]
    for value, field in ((np.nan, "mean"), (np.inf, "logvar"), (1e6, "mean")):
        bad = columns(shard.start, shard.stop)
        bad[field][3, 0, 0, 0] = value
        with pytest.raises(ValueError, match=f"'{field}' of example 19 is not finite"):
            latents.write_shard(plan, shard, bad)
    with pytest.raises(ValueError, match="'mean' has shape"):
        latents.write_shard(plan, shard, columns(0, 3))
    with pytest.raises(ValueError, match="'label' has shape None"):
        short = columns(shard.start, shard.stop)
        short.pop("label")
        latents.write_shard(plan, shard, short)
    assert len(plan.missing()) == 4 and not list(plan.directory.glob("*.array_record"))


def test_bad_plans_and_scalings(plan, tmp_path):
    for options in ({"rule": "fixed", "value": 0.0}, {"rule": "fixed", "value": float("nan")}):
        with pytest.raises(ValueError, match="latent scale"):
            latents.Scaling(**options)
    with pytest.raises(ValueError, match="latent scaling 'mean' is unknown"):
        latents.Scaling("mean")
    with pytest.raises(ValueError, match="shard_size=0"):
        dataclasses.replace(plan, shard_size=0)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("dear")
    with pytest.raises(ValueError, match="not empty"):
        dataclasses.replace(plan, directory=tmp_path / "other").begin()
    constant = latents.Plan(tmp_path / "flat", 4, 4, {"mean": ("float32", (2, 2))}, {})
    constant.begin()
    values = np.stack([np.zeros((4, 2)), np.random.default_rng(0).normal(size=(4, 2))], -1)
    latents.write_shard(constant, constant.shards()[0], {"mean": values})
    with pytest.raises(ValueError, match="channel 0 never varies"):
        latents.finish(constant, latents.Scaling("channel"))
    with pytest.raises(ValueError, match="does not exist"):
        latents.LatentSource(tmp_path / "nowhere")
