"""First stages through the commands: adversarial training, resuming, measuring, encoding."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import common, ldm_celebahq256
from diffusion.data import latents, loader
from diffusion.metrics import frechet
from experiments import encode_latents, train
from experiments.convert import __main__ as convert
from experiments.convert import reading
from experiments.evaluate import __main__ as evaluate
from experiments.evaluate.features import Judge
from experiments.host import cli
from experiments.run import build, data, networks

CONFIG = "--config=configs/digits_autoencoder.py:smoke"
ADVERSARIAL = (
    "--config.loss.adversarial=hinge",
    "--config.loss.adversarial_start_steps=1",
    "--config.loss.adversarial_warmup_steps=1",
    "--config.model.discriminator.norm=batch",
    "--config.model.discriminator.channels=8",
    "--config.evaluation.every_steps=2",
)


def run(module, *argv) -> int:
    return cli.run(module.define, module.main, argv)


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir):
    keys = ("loss", "discriminator_loss", "adaptive_weight", "logits_real")
    return {row["step"]: [row[k] for k in keys] for row in rows(workdir) if "loss" in row}


@pytest.fixture(scope="module")
def adversarial(job, tmp_path_factory):
    """An unbroken run of four steps, both networks in training from the third."""
    workdir = tmp_path_factory.mktemp("adversarial") / "run"
    argv = (CONFIG, *ADVERSARIAL, f"--config.data.dir={job}/data", f"--workdir={workdir}")
    argv += (f"--config.evaluation.classifier={job}/classifier",)
    with pytest.MonkeyPatch.context() as patch:
        see_one(patch)
        assert run(train, *argv) == 0
    return workdir, argv


def see_one(patch):
    import jax

    devices = jax.devices()[:1]
    patch.setattr(jax, "devices", lambda *_: devices)


def test_everything_about_the_adversary_is_logged(adversarial):
    found = rows(adversarial[0])
    logged = next(row for row in found if row["step"] == 4 and "loss" in row)
    keys = {"adaptive_weight", "generator_loss", "discriminator_loss", "logits_real", "logits_fake"}
    keys |= {"grad_norm_autoencoder", "grad_norm_discriminator", "reconstruction", "kl"}
    assert keys <= logged.keys()
    assert logged["adaptive_weight"] > 0
    evaluated = next(row for row in found if "eval_psnr" in row)
    keys = {f"eval_{name}" for name in ("psnr", "ssim", "sharpness", "loss", "kl")}
    keys |= {f"eval_latent_{moment}_{c}" for moment in ("mean", "std") for c in range(4)}
    assert keys <= evaluated.keys()
    assert evaluated["eval_frechet_distance"] > 0


def test_the_loops_numbers_are_those_of_the_command(adversarial, job, tmp_path):
    """At the last step, on every image of the evaluation split: nothing is averaged twice."""
    workdir, _ = adversarial
    argv = (f"--workdir={workdir}", "--metrics=reconstruction", "--num=1000000")
    argv += (f"--classifier={job}/classifier", f"--out={tmp_path}/numbers.json")
    assert run(evaluate, *argv) == 0
    wanted = json.loads((tmp_path / "numbers.json").read_text())["reconstruction"]
    logged = [row for row in rows(workdir) if "eval_psnr" in row][-1]
    np.testing.assert_allclose(
        logged["eval_frechet_distance"], wanted["frechet_distance"], rtol=1e-4
    )
    for c in range(4):
        np.testing.assert_allclose(
            logged[f"eval_latent_std_{c}"], wanted["latent_std"][c], rtol=1e-3
        )
    # The loop measures before pixels are rounded.
    np.testing.assert_allclose(logged["eval_psnr"], wanted["psnr"], atol=0.1)


def test_bfloat16_stays_finite_and_near_float32(adversarial, tmp_path):
    unbroken, argv = adversarial
    argv = [a for a in argv if not a.startswith("--workdir")] + [f"--workdir={tmp_path}/run"]
    assert run(train, *argv, "--config.model.dtype=bfloat16") == 0
    for row in rows(tmp_path / "run"):
        assert all(np.isfinite(v) for v in row.values() if isinstance(v, float)), row
    pairs = zip(rows(tmp_path / "run"), rows(unbroken), strict=True)
    near = [(a["reconstruction"], b["reconstruction"]) for a, b in pairs if "reconstruction" in a]
    assert len(near) == 4
    np.testing.assert_allclose(*zip(*near), rtol=0.05)


def test_two_networks_resume_as_one(adversarial, tmp_path):
    """Two steps, then the same command with four: optimisers, statistics and step go on."""
    unbroken, argv = adversarial
    argv = [a for a in argv if not a.startswith("--workdir")] + [f"--workdir={tmp_path}/run"]
    assert run(train, *argv, "--config.train.steps=2") == 0
    assert run(train, *argv, "--config.train.steps=4") == 0
    assert losses(tmp_path / "run") == losses(unbroken)


def test_reconstructions_are_measured(adversarial, job, tmp_path):
    workdir, _ = adversarial
    out = tmp_path / "numbers.json"
    argv = (f"--workdir={workdir}", "--metrics=reconstruction", "--num=100", f"--out={out}")
    assert run(evaluate, *argv, f"--classifier={job}/classifier") == 0
    found = json.loads(out.read_text())["reconstruction"]
    # The first 100 held-out images, through the network here, measured here.
    stage = networks.load_stage(workdir)
    source, steps = data.open_images(stage.config, stage.config.data.eval_split)
    images = next(loader.one_pass(source, 100, steps, stop=100))["image"]
    given = {"params": stage.params}
    z = stage.network.apply(given, jnp.asarray(images) / 127.5 - 1, method="encode").mean
    x = np.asarray(stage.network.apply(given, z, method="decode"))
    made = np.clip(np.rint((x + 1) * 127.5), 0, 255).astype(np.uint8)
    psnr = -10 * np.log10(np.square(made / 255.0 - images / 255.0).mean((1, 2, 3)))
    assert found["count"] == 100 and found["psnr"] == pytest.approx(psnr.mean(), abs=0.01)
    half = 1.96 * psnr.std(ddof=1) / 10
    wanted = [psnr.mean() - half, psnr.mean() + half]
    np.testing.assert_allclose(found["intervals"]["psnr"], wanted, atol=0.03)
    for name, moment in (("mean", np.mean), ("std", np.std)):
        moments = moment(np.asarray(z), axis=(0, 1, 2))
        np.testing.assert_allclose(found[f"latent_{name}"], moments, rtol=1e-3, atol=1e-3)
    judge = Judge(job / "classifier")
    seen, shown = (frechet.feature_statistics(judge(part)[1]) for part in (made, images))
    distance = frechet.frechet_distance(seen, shown)
    assert found["frechet_distance"] == pytest.approx(distance, rel=0.02)
    assert 0 < found["sharpness"] and -1 <= found["ssim"] <= 1


def test_a_report_is_written(adversarial, tmp_path):
    argv = ("--every_checkpoint", f"--workdir={adversarial[0]}", "--num=20")
    assert run(evaluate, *argv, f"--out={tmp_path}/report") == 0
    found = json.loads((tmp_path / "report" / "results.json").read_text())
    assert list(found["checkpoints"]) == ["2", "4"] and found["counts_from_step"] == 2
    for name in ("curves.png", "grid.png"):
        with Image.open(tmp_path / "report" / name) as picture:
            assert min(picture.size) > 60


# -- latents ---------------------------------------------------------------------------------------


def encode_argv(job, out, *more):
    return (
        "--config=configs/digits_ldm.py:smoke",
        f"--config.data.dir={out}",
        f"--config.latents.data_dir={job}/data",
        f"--config.latents.first_stage={job}/autoencoder",
        *more,
    )


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_interrupted_encoding_goes_on_to_the_same_bytes(job, tmp_path, monkeypatch, capsys):
    write, written = latents.write_shard, []

    def once(plan, shard, columns):
        if written:
            raise OSError("disk full")
        written.append(shard.path.name)
        write(plan, shard, columns)

    with monkeypatch.context() as patch:
        patch.setattr(latents, "write_shard", once)
        assert run(encode_latents, *encode_argv(job, tmp_path / "latents")) == 2
    assert not (tmp_path / "latents" / "provenance.json").exists()
    assert run(encode_latents, *encode_argv(job, tmp_path / "latents")) == 0
    found, wanted = contents(tmp_path / "latents"), contents(job / "latents")
    assert found.keys() == wanted.keys() and len(written) == 1
    shards = [name for name in wanted if str(name).startswith("latents-")]
    assert len(shards) >= 3
    for name in (*shards, *[n for n in wanted if n not in shards]):
        assert found[name] == wanted[name], name


@pytest.mark.parametrize(
    ("scaling", "more"),
    [("fixed", ("--config.latents.scale=0.18215",)), ("std", ()), ("channel", ())],
)
def test_scale_rules_are_stored(job, tmp_path, scaling, more):
    """LDM's `scale_by_std` is of the first batch alone: another number than over all."""
    examples = "--config.latents.scaling_examples=32" if scaling == "std" else None
    argv = [*more, f"--config.latents.scaling={scaling}", *([examples] if examples else [])]
    assert run(encode_latents, *encode_argv(job, tmp_path / "latents", *argv)) == 0
    source = latents.LatentSource(tmp_path / "latents")
    first = source.batch(np.arange(32))
    z_std = np.sqrt(first["mean"].astype(np.float64).var() + np.exp(first["logvar"]).mean())
    if scaling == "fixed":
        np.testing.assert_allclose(source.scale, 0.18215)
    elif scaling == "std":
        np.testing.assert_allclose(source.scale, 1 / z_std, rtol=1e-4)
        assert len(set(source.scale.tolist())) == 1
    else:
        known = source.provenance["statistics"]["std"]
        np.testing.assert_allclose(source.scale, 1 / np.array(known), rtol=1e-6)
    assert source.provenance["scaling"]["rule"] == scaling


def test_flipped_variants_are_the_latents_of_mirrored_images(tmp_path, monkeypatch):
    """`data.flip` with two epochs: the second one's rows are of the images mirrored."""
    config = ldm_celebahq256.get_config("smoke")
    config.data.update({"dir": str(tmp_path / "latents"), "image_size": 16, "flip": True})
    config.latents.update({"first_stage": str(tmp_path / "run"), "epochs": 2, "shard_size": 5})
    config.model.autoencoder.num_codes = 32
    stage = common.first_stage("vq")
    stage.model.update({"dtype": "float32", "autoencoder": config.model.autoencoder})
    stage.data.image_size = 16
    module = build.autoencoder(stage.model.autoencoder)
    params = jax.jit(module.init)(jax.random.key(1), jnp.zeros((1, 16, 16, 3)))["params"]
    convert.write_workdir(tmp_path / "run", reading.Parts(stage, {"autoencoder": params}))
    images = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), np.uint8)
    monkeypatch.setattr(data, "open_images", lambda *_: (Held(images), []))
    encode_latents.encode(config)
    found = latents.LatentSource(tmp_path / "latents").batch(np.arange(12))["mean"]
    both = np.concatenate([images, images[:, :, ::-1]]).astype(np.float32) / 127.5 - 1
    encode = jax.jit(lambda x: module.apply({"params": params}, x, method="encode").mean)
    wanted = encode(jnp.asarray(both))
    np.testing.assert_allclose(found, wanted, atol=1e-3 * np.abs(wanted).max())
    assert np.abs(found[6:] - found[:6]).max() > 0.1 * np.abs(wanted).max()


class Held:
    """A source of images in memory."""

    provenance: ClassVar[dict[str, str]] = {"sha256": "0"}

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def batch(self, indices):
        return {"image": self.images[indices]}


@pytest.mark.slow
def test_ten_thousand_latents_killed_half_way(job, tmp_path):
    """SIGKILL in the middle of 13,500 images, and the same command again: the same bytes."""
    more = ("--config.latents.epochs=3", "--config.latents.shard_size=900")

    def command(out):
        return [sys.executable, "-m", "experiments.encode_latents", *encode_argv(job, out, *more)]

    subprocess.run(command(tmp_path / "unbroken"), check=True, capture_output=True)
    broken = tmp_path / "broken"
    process = subprocess.Popen(command(broken), stdout=subprocess.DEVNULL)
    deadline = time.time() + 300
    while len(list(broken.glob("latents-*"))) < 7 and time.time() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert 7 <= len(list(broken.glob("latents-*"))) < 15
    subprocess.run(command(broken), check=True, capture_output=True)
    assert contents(broken) == contents(tmp_path / "unbroken")


# -- bad input -------------------------------------------------------------------------------------


def refused(capsys, *words):
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and all(word in lines[0] for word in words), lines


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--config.latents.scale=0", "--config.latents.scaling=fixed"), ("scale 0", "above 0")),
        (("--config.latents.scale=nan", "--config.latents.scaling=fixed"), ("scale nan",)),
        (("--config.latents.scaling=mean",), ("'mean'", "fixed")),
        (("--config.model.autoencoder.patch=2",), ("autoencoder.patch=4", "2")),
        (("--config.latents.first_stage=nowhere",), ("nowhere", "no run")),
    ],
)
def test_encoding_refuses(job, tmp_path, capsys, argv, words):
    out = tmp_path / "latents"
    assert run(encode_latents, *encode_argv(job, out, *argv)) == 2
    refused(capsys, *words)
    assert not out.exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--config.data.image_size=2",), ("(2, 2)", "f=4")),
        (("--config.loss.adversarial=wasserstein",), ("wasserstein", "hinge")),
        (("--config.loss.reduction=median",), ("median", "mean")),
        (("--config.loss.kl_weight=nan",), ("loss.kl_weight=nan",)),
        (("--config.evaluation.classifier=nowhere",), ("evaluation.classifier=nowhere", "no run")),
        (("--config.loss.reseed_every_steps=5",), ("loss.reseed_every_steps=5", "vq")),
        (
            ("--config.loss.perceptual_weight=1.0",),
            ("perceptual.vgg is empty", "vgg16-397923af.pth", "loss.perceptual_weight=0"),
        ),
        (
            ("--config.loss.adversarial=hinge", "--config.model.discriminator.layers=5"),
            ("layers=5", "fewer layers"),
        ),
    ],
)
def test_training_a_first_stage_refuses(job, tmp_path, capsys, argv, words):
    workdir = tmp_path / "run"
    assert run(train, CONFIG, f"--config.data.dir={job}/data", f"--workdir={workdir}", *argv) == 2
    refused(capsys, *words)
    assert not workdir.exists()


def test_a_report_of_nothing_is_refused(job, tmp_path, capsys):
    (tmp_path / "bare").mkdir()
    shutil.copy(job / "autoencoder" / "config.json", tmp_path / "bare")
    argv = ("--every_checkpoint", f"--out={tmp_path}/out")
    assert run(evaluate, *argv, f"--workdir={job}/autoencoder", "--num=0") == 2
    refused(capsys, "--num=0")
    for flag in ("--keep=kept", "--weights=raw"):
        assert run(evaluate, *argv, f"--workdir={job}/autoencoder", flag) == 2
        refused(capsys, flag.removesuffix("=kept"), "first stage")
    for name, word in (("none", "no run"), ("bare", "no finished checkpoint")):
        assert run(evaluate, *argv, f"--workdir={tmp_path}/{name}") == 2
        refused(capsys, f"--workdir={tmp_path}/{name}", word)
    assert not (tmp_path / "out").exists()
