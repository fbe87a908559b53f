"""Evaluation through the command: both weights, curves, references, sets of samples, refusals."""

import hashlib
import json
import pathlib
import re
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from diffusion import pictures
from diffusion.interop import inception as inception_files
from diffusion.interop.files import to_tensors
from diffusion.metrics import frechet
from diffusion.sampling.pipeline import Pipeline
from diffusion.training import codec
from experiments.evaluate import __main__ as evaluate
from experiments.evaluate import curves, presets, references, sample_sets
from experiments.evaluate.features import Judge
from experiments.evaluate.metrics import METRICS, described
from experiments.evaluate.samples import Run, Samples, Subject
from experiments.host import cli
from experiments.run import kept as kept_samples

FAST = ("--steps=2", "--num=80", "--num_held_out=8", "--replicates=10")


def run(*argv) -> int:
    return cli.run(evaluate.define, evaluate.main, [str(a) for a in argv])


def refused(capsys, *words) -> None:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and all(str(word) in lines[0] for word in words), lines


def contents(folder):
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def whole(job, tmp_path_factory):
    """One evaluation with everything in it: results, and the folder that it wrote to."""
    root = tmp_path_factory.mktemp("whole")
    metrics = "adherence,frechet_distance,kernel_distance,precision_recall,inception_score,psnr"
    argv = [f"--workdir={job}/ldm", f"--classifier={job}/classifier", f"--metrics={metrics}"]
    argv += ["--sweep_guidance=1,4", "--sweep_steps=3", "--every_checkpoint", *FAST]
    argv += [f"--reference={root}/reference.npz", f"--keep={root}/kept", f"--out={root}/out.json"]
    devices = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: devices)
        assert run(*argv) == 0
    return root, json.loads((root / "out.json").read_text()), argv


def test_averaged_and_raw_weights_stand_side_by_side(whole):
    _, found, _ = whole
    assert list(found["weights"]) == ["ema", "raw"]
    for name in ("frechet_distance", "kernel_distance", "precision", "density", "classifier_score"):
        for which in ("ema", "raw"):
            value = found["weights"][which][name]
            low, high = found["weights"][which]["intervals"][name]
            assert low <= value <= high and low < high, name
        assert found[name] == found["weights"]["ema"][name]
    ema, raw = (found["weights"][which] for which in ("ema", "raw"))
    assert ema["frechet_distance"] != raw["frechet_distance"]
    assert found["adherence"]["count"] == 80 and found["adherence_held_out"]["count"] == 8
    # The first stage's are the same whichever the U-Net's: measured once.
    assert found["autoencoder"]["psnr"] > 0 and "autoencoder" not in raw


def test_numbers_carry_what_they_depend_on(whole, job):
    _, found, _ = whole
    assert found["sample"]["steps"] == 2 and found["sample"]["sampler"] == "dpmpp_2m"
    assert found["samples"] == 80 and found["seed"] == 0 and len(found["checkpoint"]) == 16
    judge = Judge(job / "classifier")
    assert (
        found["features"]["sha256"] == judge.hash and found["features"]["network"] == "classifier"
    )
    reference = found["reference"]
    assert reference["data"] == "captioned_digits" and reference["split"] == "train"
    assert reference["preprocessing"] == {"image_size": 32, "channels": 3, "fit": "crop"}
    assert reference["count"] == 4500 and reference["features"] == found["features"]
    assert {"jax", "code"} <= found["versions"].keys()
    assert len(found["warnings"]) == 1 and "below 50000" in found["warnings"][0]


def test_curves_hold_every_point_and_are_drawn(whole):
    root, found, _ = whole
    points = [(p["curve"], p["guidance_scale"], p["steps"], p["weights"]) for p in found["sweep"]]
    default = found["sample"]["guidance_scale"]
    for which in ("ema", "raw"):
        for wanted in (("guidance_scale", 1.0, 2), ("guidance_scale", 4.0, 2)):
            assert (*wanted, which) in points
        assert ("steps", default, 3, which) in points
    assert len(points) == 6 == len({p["frechet_distance"] for p in found["sweep"]})
    assert [p["step"] for p in found["checkpoints"]] == [2, 2, 4, 4]
    newest = found["checkpoints"][2]["frechet_distance"]
    assert newest == pytest.approx(found["frechet_distance"], rel=1e-6)
    for name in ("out_sweep.png", "out_checkpoints.png"):
        with Image.open(root / name) as picture:
            assert min(picture.size) > 200


def test_several_runs_stand_on_one_plot_against_evaluations(whole, tmp_path, monkeypatch):
    """--beside: a line a run, sampler and guidance, each point as its JSON has it."""
    root, found, _ = whole
    own = curves.swept_steps(root / "out.json")
    scale = found["sample"]["guidance_scale"]
    assert [(p["evaluations"], p["run"]) for p in own] == [(3 * (1 + (scale != 1)), "ldm")] * 2
    quick = [{**p, "run": "quick", "sampler": "meanflow", "guidance_scale": 1.0} for p in own]
    quick = [{**p, "evaluations": n, "frechet_distance": n} for p in quick for n in (2.0, 1.0)]
    drawn, draw = [], pictures.figure
    monkeypatch.setattr(pictures, "figure", lambda *a, **k: (drawn.extend(a[1]), draw(*a, **k)))
    curves.beside(tmp_path / "beside.png", [*own, *quick])
    panel = next(p for p in drawn if p.settings["ylabel"] == "frechet distance")
    lines = {line.label: (line.x, line.y) for line in panel.lines}
    assert lines["quick meanflow raw"] == ((1.0, 2.0), (1.0, 2.0))
    guided = f"ldm dpmpp_2m guided by {scale:g} ema"
    assert lines[guided] == ((own[0]["evaluations"],), (own[0]["frechet_distance"],))
    assert len(lines) == 4 and panel.settings["xlabel"] == "network evaluations a picture"
    assert (tmp_path / "beside.png").stat().st_size > 10_000


def test_the_distance_is_that_of_the_samples_and_the_training_images(whole, job):
    root, found, _ = whole
    judge = Judge(job / "classifier")
    samples = sample_sets.open_samples(root / "kept" / "ema")
    made = np.concatenate(list(samples.batches()))
    assert made.shape == (80, 32, 32, 3) and made.dtype == np.uint8
    with np.load(root / "reference.npz") as file:
        mean, covariance = file["mu"], file["sigma"]
    features = frechet.feature_statistics(judge(made)[1])
    wanted = frechet.gaussian_frechet_distance(features.mean, features.covariance, mean, covariance)
    assert found["frechet_distance"] == pytest.approx(wanted, rel=1e-6)


def test_again_it_reads_what_it_kept(whole, monkeypatch):
    root, found, argv = whole
    before = contents(root / "kept")

    def never(*_, **__):
        raise AssertionError("samples are made again")

    monkeypatch.setattr(Pipeline, "compiled", never)
    short = [a for a in argv if "sweep" not in a and "every" not in a and "adherence" not in a]
    assert run(*short, "--metrics=frechet_distance", f"--out={root}/again.json") == 0
    again = json.loads((root / "again.json").read_text())
    assert again["frechet_distance"] == found["frechet_distance"]
    assert contents(root / "kept") == before


def test_an_interrupted_evaluation_goes_on(whole, tmp_path, monkeypatch):
    root, _, argv = whole
    short = [a for a in argv if "sweep" not in a and "every" not in a and "adherence" not in a]
    short = [a for a in short if "keep" not in a and "out=" not in a]
    short += ["--metrics=kernel_distance", f"--keep={tmp_path}/kept", "--weights=ema"]
    short += ["--num=90", f"--out={tmp_path}/out.json", f"--reference={root}/reference.npz"]
    monkeypatch.setattr(Pipeline, "at_a_time", lambda *_: 40)
    write, written = kept_samples._write, []

    def full_disk(file, batch):
        if len(written) == 1:
            raise OSError("no space left on device")
        written.append(file)
        write(file, batch)

    monkeypatch.setattr(kept_samples, "_write", full_disk)
    assert run(*short) == 2
    assert not (tmp_path / "out.json").exists()
    kept = tmp_path / "kept" / "ema"
    assert sorted(p.name for p in kept.iterdir()) == ["00000.npy", "samples.json"]
    first = contents(kept)["00000.npy"]
    monkeypatch.setattr(kept_samples, "_write", write)
    assert run(*short) == 0
    assert sorted(p.name for p in kept.glob("*.npy")) == [f"0000{i}.npy" for i in range(3)]
    assert contents(kept)["00000.npy"] == first
    # The samples are a function of seed and place alone: the first 80 are the other run's, but for
    # the rounding of another batch size.
    whole_set, this = (
        np.concatenate(list(sample_sets.open_samples(path).batches())).astype(int)
        for path in (root / "kept" / "ema", kept)
    )
    assert len(this) == 90 and np.abs(this[:80] - whole_set).max() <= 1


# -- sets of samples -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def forms(whole, tmp_path_factory):
    """The same images as a folder, an .npz of either kind, and parts."""
    root = tmp_path_factory.mktemp("forms")
    kept = whole[0] / "kept" / "ema"
    made = np.concatenate(list(sample_sets.open_samples(kept).batches()))
    (root / "folder").mkdir()
    for i, image in enumerate(made):
        Image.fromarray(image).save(root / "folder" / f"{i:05d}.png")
    Image.fromarray(np.zeros((99, 99, 3), np.uint8)).save(root / "folder" / "grid.png")
    np.savez(root / "adm.npz", made)
    np.savez_compressed(root / "samples.npz", images=made, labels=np.arange(80))
    return [kept, root / "folder", root / "adm.npz", root / "samples.npz"]


def test_samples_of_any_form_give_the_same_number(whole, forms, job, tmp_path):
    root, found, _ = whole
    argv = [f"--classifier={job}/classifier", f"--reference={root}/reference.npz"]
    argv += ["--metrics=frechet_distance,kernel_distance", f"--out={tmp_path}/out.json"]
    for path in forms:
        assert run(*argv, f"--samples={path}", "--replicates=0") == 0
        again = json.loads((tmp_path / "out.json").read_text())
        assert again["frechet_distance"] == pytest.approx(found["frechet_distance"], rel=1e-6)
        assert list(again["weights"]) == ["samples"] and again["samples"] == 80
        assert again["samples_from"] == path.name


# -- Inception and CLIP --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    shapes = inception_files.shapes()
    rng = np.random.default_rng(0)

    def draw(shape):
        fan_in = np.prod(shape.shape[:-1]) if len(shape.shape) > 1 else 100
        drawn = rng.normal(size=shape.shape) * (2 / fan_in) ** 0.5
        return np.float32(drawn if len(shape.shape) > 1 else 1 + drawn)

    save_file(to_tensors(jax.tree.map(draw, shapes), ()), path)
    return path


def test_only_the_published_weights_are_called_inceptions(
    inception_weights, forms, tmp_path, monkeypatch
):
    """A reference of images alone, as guided-diffusion writes them."""
    images = np.concatenate(list(sample_sets.open_samples(forms[2]).batches()))
    np.savez(tmp_path / "reference.npz", images[:12, ::-1])
    np.savez(tmp_path / "samples.npz", images[:12])
    argv = [f"--samples={tmp_path}/samples.npz", f"--reference={tmp_path}/reference.npz"]
    argv += [f"--inception_weights={inception_weights}", "--metrics=kid,inception_score"]
    argv += [f"--out={tmp_path}/out.json", "--feature_batch=12", "--replicates=10"]
    assert run(*argv) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    sha256 = hashlib.sha256(inception_weights.read_bytes()).hexdigest()
    assert found["features"]["sha256"] == sha256
    assert found["features"]["preprocessing"] == "torch-fidelity"
    assert "kernel_distance" in found and "kid" not in found and "inception_score" not in found
    assert found["reference"]["unchecked"] == ["data", "preprocessing"]
    monkeypatch.setattr(inception_files, "SHA256", sha256)  # were it the published file
    assert run(*argv) == 0
    named = json.loads((tmp_path / "out.json").read_text())
    assert named["kid"] == found["kernel_distance"] and "inception_score" in named
    assert run(*argv, "--inception_preprocessing=pytorch-fid") == 0
    other = json.loads((tmp_path / "out.json").read_text())
    assert "kid" not in other and other["kernel_distance"] != named["kid"]


def test_captions_are_scored_by_clip(job, tmp_path):
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    small = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2, "projection_dim": 6}
    length = {"vocab_size": 100, "max_position_embeddings": 24, "eos_token_id": 3}
    text = CLIPTextConfig(**small, **length)
    vision = CLIPVisionConfig(**small, image_size=16, patch_size=8)
    both = {"text_config": text.to_dict(), "vision_config": vision.to_dict()}
    config = CLIPConfig(**both, projection_dim=6)
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    shutil.copy(job / "ldm" / "tokenizer.json", tmp_path / "clip" / "tokenizer.json")
    argv = [f"--workdir={job}/ldm", "--metrics=clip_score", f"--clip={tmp_path}/clip"]
    assert run(*argv, "--steps=2", "--num=6", "--weights=ema", f"--out={tmp_path}/out.json") == 0
    found = json.loads((tmp_path / "out.json").read_text())
    low, high = found["intervals"]["clip_score"]
    assert 0 <= found["clip_score"] <= 100 and low <= found["clip_score"] <= high
    sha256 = hashlib.sha256((tmp_path / "clip" / "model.safetensors").read_bytes()).hexdigest()
    assert found["clip"] == sha256


def test_each_picture_is_scored_with_the_caption_it_was_made_of(monkeypatch, tmp_path):
    """Captions go in turn where there are more samples; batches do not begin anew."""
    captions, seen = ["a", "b", "c"], []

    class Scorer:
        def scores(self, images, texts):
            seen.extend(zip(images[:, 0, 0, 0].tolist(), texts))
            return np.zeros(len(images))

    pictures = np.arange(8).repeat(12).reshape(8, 2, 2, 3)
    monkeypatch.setattr(Samples, "prompts", lambda *_: (captions, {}))
    monkeypatch.setattr(Samples, "batches", lambda *_: iter((pictures[:5], pictures[5:])))
    tools = types.SimpleNamespace(clip=Scorer())
    subject = Subject(Samples(Run(tmp_path), num=8), tools, needs=frozenset({"clip"}))
    assert subject.rows["clip"]["score"].shape == (8,)
    assert seen == list(enumerate("abcabcab"))


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--num=64",), ("64 samples", "64 dimensions", "KID", "more than 64")),
        (("--metrics=fid",), ("--metrics=fid", "--features=inception")),
        (("--weights=raw", "--metrics=psnr"), ("--weights=raw", "psnr")),
        (("--sweep_guidance=1,two",), ("--sweep_guidance=1,two",)),
        (("--sweep_classifier=1",), ("--sweep_classifier=1", "--guidance_classifier=DIR")),
        (("--checkpoint_step=3",), ("3",)),
        (("--beside=none.json",), ("--beside", "--sweep_steps")),
        (("--beside=none.json", "--sweep_steps=2"), ("--beside=none.json is no file",)),
        (("--preset=ldm_table1_celebahq",), ("celeb_a_hq/256", "captioned_digits")),
        (("--preset=best",), ("best", "ldm_table1_celebahq")),
        (("--samples=nowhere",), ("--samples=nowhere",)),
        (("--samples=s", "--keep=k"), ("--keep", "--samples=s")),
        (("--features=inception", "--inception_weights=none.pth"), ("none.pth is missing",)),
    ],
)
def test_evaluation_refuses(job, tmp_path, capsys, argv, words):
    out = tmp_path / "out.json"
    out.write_text("an earlier result")
    base = [f"--workdir={job}/ldm", f"--classifier={job}/classifier", f"--out={out}"]
    assert run(*base, "--metrics=frechet_distance", "--steps=2", *argv) == 2
    refused(capsys, *words)
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]
    assert out.read_text() == "an earlier result"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--metrics=motion",), ("motion is of videos", "images")),
        (("--metrics=spectrum",), ("spectrum is of series", "images")),
        (("--metrics=bits_per_dim",), ("bits_per_dim is of pixels", "latents")),
        (("--metrics=kid",), ("--metrics=kid", "classifier", "kernel_distance")),
        (("--metrics=sfid",), ("--metrics=sfid", "frechet_distance")),
        (("--metrics=inception_score", "--features=clip"), ("classes", "--features=clip")),
        (("--metrics=adherence", "--num_held_out=0"), ("--num_held_out=0",)),
        (("--metrics=adherence,psnr", "--weights=raw"), ("--weights=raw", "psnr")),
        (("--metrics=psnr,beauty", "--weights=raw"), ("beauty", "bits_per_dim")),
    ],
)
def test_what_a_metric_is_not_of_is_refused_before_any_network_runs(
    job, tmp_path, capsys, monkeypatch, argv, words
):
    def never(*_, **__):
        raise AssertionError("a network is run")

    monkeypatch.setattr(Pipeline, "compiled", never)
    monkeypatch.setattr(Judge, "__call__", never)
    monkeypatch.setattr(references, "of_data", never)
    base = [f"--workdir={job}/ldm", f"--classifier={job}/classifier", f"--out={tmp_path}/out.json"]
    assert run(*base, *argv) == 2
    refused(capsys, *words)
    assert not list(tmp_path.iterdir())


def test_a_run_that_has_not_what_is_asked_is_refused(job, tmp_path, capsys):
    out = f"--out={tmp_path}/out.json"
    for name in ("bits_per_dim", "clip_score", "precision_recall"):
        argv = (f"--classifier={job}/classifier", f"--metrics={name}", out)
        assert run(f"--workdir={job}/autoencoder", *argv) == 2
        refused(capsys, name, "of denoisers", "task='autoencoder'")
    assert run(f"--workdir={job}/classifier", "--metrics=reconstruction", out) == 2
    refused(capsys, "reconstruction needs a first stage")


def test_the_readme_lists_every_metric():
    readme = (pathlib.Path(__file__).parents[2] / "README.md").read_text()
    section = readme.split("`--metrics` names")[1].split("\n\n")[1]
    found = re.findall(r"^- `(\w+)`: (.*)$", section, re.M)
    assert found == [(name, described(name)) for name in METRICS]


def changed_identity(path, out, **changes):
    with np.load(path) as file:
        arrays = dict(file)
    identity = json.loads(str(arrays["identity"]))
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        (identity[section] if section else identity)[name] = value
    np.savez(out, **arrays | {"identity": json.dumps(identity)})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"preprocessing__image_size": 64}, ("preprocessing.image_size=64", "32")),
        ({"preprocessing__fit": "pad"}, ("preprocessing.fit='pad'", "'crop'")),
        ({"features__sha256": "0" * 16}, ("features.sha256", "0" * 16)),
        ({"data": "fashion_mnist"}, ("data='fashion_mnist'", "captioned_digits")),
    ],
)
def test_a_reference_of_something_else_is_refused(whole, job, tmp_path, capsys, changes, words):
    path = tmp_path / "reference.npz"
    changed_identity(whole[0] / "reference.npz", path, **changes)
    before = contents(tmp_path)
    base = [f"--workdir={job}/ldm", f"--classifier={job}/classifier", f"--reference={path}"]
    argv = ["--metrics=frechet_distance", *FAST, f"--out={tmp_path}/out.json"]
    assert run(*base, *argv) == 2
    refused(capsys, "--reference", *words)
    assert contents(tmp_path) == before


def test_broken_sets_are_refused(whole, forms, job, tmp_path, capsys):
    out, reference = tmp_path / "out.json", whole[0] / "reference.npz"
    argv = [f"--classifier={job}/classifier", f"--reference={reference}", f"--out={out}"]
    argv += ["--metrics=kernel_distance"]

    def says(path, *words):
        assert run(*argv, f"--samples={path}") == 2
        refused(capsys, *words)
        assert not out.exists()

    folder = tmp_path / "folder"
    shutil.copytree(forms[1], folder)
    Image.fromarray(np.zeros((16, 32, 3), np.uint8)).save(folder / "00100.png")
    says(folder, "mixes sizes", "00100.png", "(16, 32, 3)")
    (folder / "00100.png").unlink()
    (folder / "00003.png").write_bytes((folder / "00003.png").read_bytes()[:300])
    says(folder, "00003.png", "half-written")
    (folder / "00003.png.partial").write_bytes(b"")
    says(folder, "half-written", "00003.png.partial")
    parts = tmp_path / "parts"
    shutil.copytree(forms[0], parts)
    (parts / "00000.npy").unlink()
    says(parts, "half-written (9 of 10 parts)", "--keep")
    (tmp_path / "empty").mkdir()
    says(tmp_path / "empty", "no images")
    images = np.zeros((300, 8, 8, 3), np.float32)
    images[270, 0, 0] = np.nan
    np.savez(tmp_path / "nan.npz", images)
    says(tmp_path / "nan.npz", "NaN", "from 250 on")
    np.savez(tmp_path / "floats.npz", np.zeros((3, 8, 8, 3), np.float32))
    says(tmp_path / "floats.npz", "float32", "uint8")
    np.savez(tmp_path / "small.npz", np.zeros((30, 16, 16, 3), np.uint8))
    says(tmp_path / "small.npz", "(32, 32) pixels", "(16, 16)", "one size")
    np.savez(tmp_path / "other.npz", pixels=np.zeros(3))
    says(tmp_path / "other.npz", "pixels", "arr_0")
    (tmp_path / "cut.npz").write_bytes(forms[3].read_bytes()[:5000])
    says(tmp_path / "cut.npz", "truncated")


def test_public_statistics_are_read_and_held_to_the_network(whole, forms, job, tmp_path, capsys):
    """pytorch-fid's kind: mu and sigma, nothing else said."""
    root, found, _ = whole
    with np.load(root / "reference.npz") as file:
        np.savez(tmp_path / "public.npz", mu=file["mu"], sigma=file["sigma"])
    np.savez(tmp_path / "wide.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    argv = [f"--classifier={job}/classifier", f"--samples={forms[2]}", "--replicates=0"]
    argv += [f"--out={tmp_path}/out.json"]
    public = f"--reference={tmp_path}/public.npz"
    assert run(*argv, public, "--metrics=frechet_distance") == 0
    again = json.loads((tmp_path / "out.json").read_text())
    assert again["frechet_distance"] == pytest.approx(found["frechet_distance"], rel=1e-9)
    assert again["reference"]["unchecked"] == ["data", "preprocessing", "features"]
    assert run(*argv, public, "--metrics=kernel_distance") == 2
    refused(capsys, "mu and sigma alone", "vectors")
    assert run(*argv, f"--reference={tmp_path}/wide.npz", "--metrics=frechet_distance") == 2
    refused(capsys, "2048 features", "has 64", "--features=inception")


def test_a_model_that_diverged_is_refused_not_black():
    x = np.full((3, 4, 4, 3), 0.5, np.float32)
    assert sample_sets.to_uint8(x, "nearest").max() == 128
    assert sample_sets.to_uint8(x, "truncate").max() == 127
    x[1, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="sample 41 is NaN"):
        sample_sets.to_uint8(x, "nearest", 40)


def test_nan_samples_end_the_command(job, tmp_path, capsys, monkeypatch):
    black = np.full((80, 32, 32, 3), np.nan, np.float32)
    monkeypatch.setattr(Pipeline, "images", lambda *_, **__: iter([black]))
    out = tmp_path / "out.json"
    out.write_text("an earlier result")
    argv = [f"--workdir={job}/ldm", f"--classifier={job}/classifier", f"--out={out}"]
    assert run(*argv, "--metrics=frechet_distance", *FAST, "--reference_num=200") == 2
    refused(capsys, "sample 0 is NaN", "diverged")
    assert out.read_text() == "an earlier result"


def test_weights_of_another_hash_are_refused(job, tmp_path, capsys):
    path = tmp_path / inception_files.NAME
    path.write_bytes(b"something else")
    argv = [f"--workdir={job}/ldm", "--metrics=kid", f"--inception_weights={path}"]
    assert run(*argv, f"--out={tmp_path}/out.json") == 2
    refused(capsys, inception_files.NAME, "SHA-256", "6726825d")
    assert not (tmp_path / "out.json").exists()


def test_rounding_is_that_of_sampling():
    x = np.random.default_rng(0).uniform(-1.2, 1.2, (2, 9, 9, 3)).astype(np.float32)
    known = codec.to_uint8(jnp.asarray(x))
    again = sample_sets.to_uint8(np.clip((x + 1) / 2, 0, 1), "nearest")
    np.testing.assert_array_equal(again, known)


@pytest.mark.parametrize("name", presets.PRESETS)
def test_presets_fit_their_configs(name):
    """Each names a config, metrics that there are, and a sampler that the schedule serves."""
    import importlib

    from ml_collections import ConfigDict

    from experiments.run import build

    preset = presets.PRESETS[name]
    module, _, arg = preset.config.removeprefix("configs/").partition(".py")
    found = importlib.import_module(f"configs.{module}").get_config(arg.removeprefix(":") or None)
    config = ConfigDict(found.to_dict())
    data = config.latents.data_name if "latents" in config else config.data.name
    assert (data, config.data.image_size) == (preset.data, preset.image_size)
    config.sample.update(preset.sample)
    how = build.settings(config)  # what will sample, not what was set
    found = {key: getattr(how, key) for key in preset.sample if key != "options"}
    assert found == {k: v for k, v in preset.sample.items() if k != "options"}
    assert {**how.options, **preset.sample.get("options", {})} == {**how.options}
    assert module.startswith(preset.row.split()[0].lower().replace("improved", "iddpm"))
    assert set(preset.metrics) <= METRICS.keys()
    given = {"fid", "inception_score", "precision", "recall"}
    assert preset.published.keys() <= given and all(v > 0 for v in preset.published.values())


@pytest.mark.parametrize("given", [("--classifier_scale=3.5",), ()])
def test_a_flag_goes_before_a_preset(monkeypatch, tmp_path, given):
    monkeypatch.setattr(presets, "check", lambda *_: None)
    monkeypatch.setattr(Run, "image_config", None)
    declared, preset = cli.Flags(), presets.PRESETS["adm_imagenet256_guided"]
    evaluate.define(declared)
    argv = (f"--workdir={tmp_path}", "--guidance_classifier=DIR", "--steps=7", *given)
    declared.values(["command", *argv])
    run = evaluate.subject_of(declared.values, preset).samples.run
    wanted = {"classifier_scale": 3.5 if given else 1.0, "guidance_classifier": "DIR"}
    assert run.sample == {**preset.sample, **wanted}
    assert run.options["steps"] == 7
