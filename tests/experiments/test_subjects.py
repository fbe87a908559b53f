"""Learning one subject: textual inversion and DreamBooth, from a converted pipeline."""

import json
import warnings

import jax
import numpy as np
import pytest
from PIL import Image

from diffusion.data.subjects import Prior, Prompts
from diffusion.interop import load_embeddings
from diffusion.sampling import added
from experiments import train
from experiments.convert import __main__ as convert
from experiments.host import cli
from experiments.run import data, folders, generate, networks, workdir

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from diffusers import StableDiffusionPipeline


def folder(path, seed):
    path.mkdir()
    rng = np.random.default_rng(seed)
    for i in range(3):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(path / f"{i}.png")
    return path


def run(sd, converted, target, argument, *argv):
    argv = (f"--config=configs/stable_diffusion.py:v1,{argument},smoke", *sd.FLAGS, *argv)
    argv += (f"--config.init_from={converted}", "--config.train.batch_size=4")
    argv += ("--config.train.steps=2", "--config.parallel.data=1", "--config.evaluation.preview=0")
    return cli.run(train.define, train.main, (*argv, f"--workdir={target}"))


@pytest.fixture(scope="module")
def learned(sd, converted, tmp_path_factory):
    """The workdir of a word of two vectors, learned for two steps."""
    root, devices = tmp_path_factory.mktemp("word"), jax.devices()[:1]
    word = ("--config.model.words.word=<cat>", "--config.model.words.start=f")
    word += ("--config.model.words.vectors=2", f"--config.data.dir={folder(root / 'cat', 0)}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: devices)
        assert run(sd, converted, root / "run", "textual_inversion", *word) == 0
    return root / "run"


def test_training_a_word_changes_its_rows_and_nothing_else(sd, converted, learned):
    base, found = networks.load(converted), networks.load(learned, "raw", merged=False)
    assert set(found.params) == {"denoiser", "text_encoder", "autoencoder", "words"}
    for name in ("denoiser", "text_encoder", "autoencoder"):
        jax.tree.map(np.testing.assert_array_equal, found.params[name], base.params[name])
    (start,) = base.tokenizer.backend.encode("f", add_special_tokens=False).ids
    row = np.asarray(base.params["text_encoder"]["token_embedding"]["embedding"])[start]
    moved = np.abs(np.asarray(found.params["words"]["embedding"]) - row)
    assert moved.shape == (2, 24)
    # Adam's first step is its rate for every value, and the second no longer.
    assert np.all(moved.max(axis=1) > 1e-3) and moved.max() < 2 * 2.1e-3
    assert found.tokenizer.vocabulary_size == base.tokenizer.vocabulary_size + 2


def test_a_learned_word_is_written_and_read(sd, converted, learned, tmp_path):
    """The run, its file on the pipeline it began from, and Diffusers with that file agree."""
    argv = ("--to=diffusers", f"--workdir={learned}", f"--out={tmp_path}/out")
    assert sd.command(convert, *argv) == 0
    file = tmp_path / "out/learned_embeds.safetensors"
    own, plain = generate.load(learned).pipeline, generate.load(converted).pipeline
    with_file = added.with_embeddings(plain, load_embeddings(file))
    prompts = ["a photo of <cat>"]
    np.testing.assert_array_equal(own.tokens(prompts), with_file.tokens(prompts))
    tables = [p.params["text_encoder"]["token_embedding"]["embedding"] for p in (own, with_file)]
    np.testing.assert_array_equal(*tables)
    argv = ("--to=diffusers", f"--workdir={converted}", f"--out={tmp_path}/pipe")
    assert sd.command(convert, *argv) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = StableDiffusionPipeline.from_pretrained(tmp_path / "pipe")
        theirs.load_textual_inversion(str(file))
    spelled = theirs.maybe_convert_prompt(prompts[0], theirs.tokenizer)
    options = {"padding": "max_length", "max_length": 16, "truncation": True}
    np.testing.assert_array_equal(
        own.tokens(prompts)[0], theirs.tokenizer(spelled, **options).input_ids
    )
    table = theirs.text_encoder.get_input_embeddings().weight.detach().numpy()
    np.testing.assert_array_equal(table, tables[0])


def test_dreambooth_trains_the_network_alone_and_weighs_the_class(sd, converted, tmp_path):
    given = (f"--config.data.dir={folder(tmp_path / 'dog', 1)}",)
    given += (f"--config.data.prior_dir={folder(tmp_path / 'dogs', 2)}",)
    given += ("--config.data.prior_weight=3.0",)
    assert run(sd, converted, tmp_path / "one", "dreambooth", *given) == 0
    base, found = networks.load(converted), networks.load(tmp_path / "one", "raw")
    for name in ("text_encoder", "autoencoder"):
        jax.tree.map(np.testing.assert_array_equal, found.params[name], base.params[name])
    steps = jax.tree.map(
        lambda a, b: np.abs(a - b).max(), found.params["denoiser"], base.params["denoiser"]
    )
    assert 0 < max(jax.tree.leaves(steps)) < 2e-5
    logged = (tmp_path / "one/metrics.jsonl").read_text().splitlines()[0]
    loss = json.loads(logged)["loss"]
    assert 3 < loss < 8  # about 1 of the subject's pictures, and three times that of the class
    # what samples are compared with is the subject's alone
    config = workdir.read_config(tmp_path / "one")
    _, steps = data.open_images(config, "train")
    assert not any(isinstance(step, Prior) for step in steps)
    assert isinstance(folders.prior(config)[0], Prior)


def test_half_of_every_batch_is_the_class_and_means_are_those_of_the_paper():
    class Class:
        def __len__(self):
            return 7

        def batch(self, index):
            return {"image": np.full((len(index), 2, 2, 3), 200 + index[:, None, None, None])}

    index = np.array([4, 1, 0, 2])
    batch = {"image": np.zeros((4, 2, 2, 3), int), "index": index, "position": np.arange(4)}
    batch["epoch"] = np.zeros(4, int)
    told = Prompts(("a {}", "the {}"), seed=0)(batch)
    assert {*told["caption"]} <= {"a {}", "the {}"}
    found = Prior(Class(), ("dog",), 0.5, seed=0)(told)
    image = found["image"][:, 0, 0, 0]
    assert not image[[0, 2]].any() and np.all(image[[1, 3]] >= 200) and np.all(image < 207)
    assert found["caption"][1] == found["caption"][3] == "dog" != found["caption"][0]
    losses = np.array([1.0, 10, 3, 20])
    assert (losses * found["weight"]).mean() == pytest.approx(2 + 0.5 * 15)
    many = {"index": np.arange(400), "epoch": np.zeros(400, int)}
    drawn = Prompts(("a", "b"), seed=0)(many)["caption"]
    assert 150 < drawn.count("a") < 250
    assert drawn != Prompts(("a", "b"), seed=0)({**many, "epoch": np.ones(400, int)})["caption"]


def test_what_no_subject_can_be_learned_from_is_named(sd, converted, tmp_path, capsys):
    pictures = folder(tmp_path / "cat", 0)
    own = f"--config.data.dir={pictures}"
    for argument, flags, words in (
        ("textual_inversion", ("--config.model.words.start=of fox",), ("words.start", "tokens")),
        ("textual_inversion", ("--config.model.words.word=f",), ("'f' is a token",)),
        ("textual_inversion", ('--config.data.prompts=("a cat",)',), ("data.prompts", "<new>")),
        ("dreambooth", (f"--config.data.prior_dir={tmp_path}/none",), ("none",)),
        (
            "dreambooth",
            (f"--config.data.prior_dir={pictures}", "--config.data.prior_weight=-1.0"),
            ("data.prior_weight=-1.0",),
        ),
        ("dreambooth", ("--config.data.prior_dir=",), ("data.prior_prompts", "empty")),
    ):
        start = ("--config.model.words.start=f",) if argument[0] == "t" else ()
        assert run(sd, converted, tmp_path / "run", argument, own, *start, *flags) == 2
        error = capsys.readouterr().err
        assert all(word in error for word in words), error
        assert not (tmp_path / "run").exists()
    (pictures / "0.txt").write_text("a caption")
    for i in (1, 2):
        (pictures / f"{i}.txt").write_text("a caption")
    more = (own, "--config.model.words.start=f")
    assert run(sd, converted, tmp_path / "run", "textual_inversion", *more) == 2
    assert "data.prompts" in capsys.readouterr().err
