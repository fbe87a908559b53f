"""Fine-tuning through the commands: a converted pipeline, a user's folder of captioned images."""

import json
import pathlib
import shutil
import warnings

import jax
import numpy as np
import pytest
from PIL import Image

from configs import stable_diffusion
from diffusion import weights
from diffusion.interop import autoencoder, text_encoder, unet_config
from experiments import encode_latents, sample, train
from experiments.convert import __main__ as convert
from experiments.host import cli
from experiments.run import assemble, build, networks

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from diffusers import StableDiffusionPipeline


def refused(capsys, *words) -> None:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert all(word in lines[0] for word in words), lines[0]


@pytest.fixture
def pictures(tmp_path):
    """A folder of four captioned images, and one that is none."""
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 255, (16, 20, 3), np.uint8)).save(folder / f"{i}.png")
    (folder / "4.png").write_bytes((folder / "3.png").read_bytes()[:60])
    rows = [{"file_name": f"{i}.png", "text": f"a fox, {i}"} for i in range(5)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def tune(sd, converted, pictures, target, *argv, words="online"):
    given = (f"--config.init_from={converted}", f"--config.data.dir={pictures}")
    given += ("--config.train.batch_size=4", "--config.train.steps=2", "--config.parallel.data=1")
    given += ("--config.evaluation.preview=0", f"--workdir={target}")
    config = f"--config=configs/stable_diffusion.py:v1,{words},smoke"
    return cli.run(train.define, train.main, (config, *sd.FLAGS, *given, *argv))


def test_fine_tuning_begins_from_a_converted_pipeline(sd, converted, pictures, tmp_path, capsys):
    target = tmp_path / "run"
    assert tune(sd, converted, pictures, target, "--config.data.max_bad_images=1") == 0
    assert "1 of 5 files are no image" in capsys.readouterr().out
    base, found = networks.load(converted), networks.load(target, "raw")
    assert set(found.params) == {"denoiser", "text_encoder", "autoencoder"}
    for name in ("text_encoder", "autoencoder"):
        jax.tree.map(np.testing.assert_array_equal, found.params[name], base.params[name])
    pairs = zip(*(jax.tree.leaves(n.params["denoiser"]) for n in (base, found)), strict=True)
    steps = [np.abs(a - b).max() for a, b in pairs]
    assert 0 < max(steps) < 1e-4  # Adam's two steps at a rate of 1e-5
    np.testing.assert_array_equal(found.extra["latent_scale"], base.extra["latent_scale"])
    assert found.tokenizer.sha256 == base.tokenizer.sha256
    argv = ("--to=diffusers", f"--workdir={target}", f"--out={tmp_path}/out")
    assert cli.run(convert.define, convert.main, argv) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert isinstance(
            StableDiffusionPipeline.from_pretrained(tmp_path / "out"), StableDiffusionPipeline
        )


@pytest.mark.parametrize("adapted", [False, True], ids=["whole", "lora"])
def test_latent_consistency_is_distilled_from_a_converted_pipeline(
    adapted, sd, converted, pictures, tmp_path
):
    """The teacher is what was converted; guidance is told to the whole network alone."""
    target, words = tmp_path / "run", "online,lcm" + ",lora" * adapted
    more = ("--config.data.max_bad_images=1", "--config.optim.learning_rate=1e-3")
    if not adapted:
        more += tuple(flag.replace("denoiser", "teacher") for flag in sd.FLAGS if "deno" in flag)
    assert tune(sd, converted, pictures, target, *more, words=words) == 0
    assert np.isfinite(losses(target)).all() and min(losses(target)) > 0
    found = networks.load(target, "raw", merged=False).params
    base = networks.load(converted).params["denoiser"]
    assert ("lora" in found) == adapted and ("guidance_proj" in found["denoiser"]) != adapted
    same = [
        np.array_equal(a, b)
        for a, b in zip(*map(jax.tree.leaves, (base, {k: found["denoiser"][k] for k in base})))
    ]
    assert all(same) if adapted else not any(same)
    made = []
    for scale in (1, 8):
        out = tmp_path / f"out{scale}"
        given = (f"--workdir={target}", f"--out={out}", "--num=1", "--steps=2", "--prompt=a fox")
        argv = (*given, f"--guidance_scale={scale}")
        assert cli.run(sample.define, sample.main, argv) == 0
        made.append((out / "00000.png").read_bytes())
    assert made[0] != made[1]


@pytest.fixture
def stored(sd, converted, pictures, tmp_path):
    """`command(module, *flags)` of the config that stores latents and contexts, and its latents."""

    def command(module, *argv):
        given = ("--config=configs/stable_diffusion.py:v1,smoke", *sd.FLAGS)
        given += (f"--config.init_from={converted}", f"--config.latents.first_stage={converted}")
        given += (f"--config.latents.data_dir={pictures}", f"--config.data.dir={tmp_path}/latents")
        given += ("--config.data.max_bad_images=1", "--config.parallel.data=1")
        return cli.run(module.define, module.main, (*given, *argv))

    assert command(encode_latents) == 0
    return command


def losses(directory):
    return [json.loads(x)["loss"] for x in (directory / "metrics.jsonl").read_text().splitlines()]


def test_stored_contexts_train_as_captions_encoded_on_the_way(
    sd, converted, pictures, stored, tmp_path
):
    """The same draws, half of the captions dropped: losses differ by what float16 rounds."""
    more = ("--config.conditioning.drop=0.5", "--config.data.max_bad_images=1")
    assert tune(sd, converted, pictures, tmp_path / "online", *more) == 0
    steps = ("--config.train.batch_size=4", "--config.train.steps=2")
    steps += ("--config.evaluation.preview=0", f"--workdir={tmp_path}/stored")
    assert stored(train, *more, *steps) == 0
    found, wanted = losses(tmp_path / "stored"), losses(tmp_path / "online")
    assert len(found) == 2
    np.testing.assert_allclose(found, wanted, rtol=2e-3)


def test_contexts_need_a_frozen_text_encoder_and_controls_need_images(stored, tmp_path, capsys):
    trained = "--config.conditioning.train_text_encoder=True"
    assert stored(train, f"--workdir={tmp_path}/run", trained) == 2
    refused(capsys, "latents.contexts=True", "frozen")
    assert not (tmp_path / "run").exists()
    config = stable_diffusion.get_config("v1,smoke")
    config.model.controlnet = {"hint_widths": (8, 8, 8, 8)}
    with pytest.raises(ValueError, match=r"model\.controlnet is given images"):
        assemble.build_run(config)


def test_contexts_of_another_text_encoder_are_refused(stored, converted, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(converted, other)
    params, config, _ = weights.load_weights(other / "text_encoder")
    params["final_norm"]["bias"] = params["final_norm"]["bias"] + 1e-3
    weights.save_weights(other / "text_encoder", params, config)
    assert stored(train, f"--config.init_from={other}", f"--workdir={tmp_path}/run") == 2
    refused(capsys, "made_from.text_encoder")
    assert stored(encode_latents, f"--config.init_from={other}") == 2
    refused(capsys, "made_from.text_encoder")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ((), ("4.png is no image", "one of 1 of 5", "max_bad_images=0")),
        (("--config.model.denoiser.heads=2",), ("model.denoiser.heads=4", "2")),
        (("--config.model.text_encoder.layers=3",), ("model.text_encoder.layers=2", "3")),
        (("--config.model.autoencoder.blocks=2",), ("model.autoencoder.blocks=1", "2")),
    ],
)
def test_fine_tuning_refuses(sd, converted, pictures, tmp_path, capsys, argv, words):
    more = ("--config.data.max_bad_images=1",) if argv else ()
    assert tune(sd, converted, pictures, tmp_path / "run", *more, *argv) == 2
    refused(capsys, *words)
    assert not (tmp_path / "run").exists()


def test_a_broken_line_of_captions_is_named(sd, converted, pictures, tmp_path, capsys):
    with (pictures / "metadata.jsonl").open("a") as file:
        file.write('{"file_name": "3.png"\n')
    assert tune(sd, converted, pictures, tmp_path / "run", "--config.data.max_bad_images=1") == 2
    refused(capsys, "metadata.jsonl, line 6")
    assert not (tmp_path / "run").exists()


# -- what is published fits the configs ----------------------------------------------------------

UNETS = {  # unet/config.json of stable-diffusion-v1-5 and stable-diffusion-2
    "v1": {"attention_head_dim": 8, "cross_attention_dim": 768},
    "v2": {
        "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
    },
}
TEXTS = {  # text_encoder/config.json
    "v1": {"hidden_act": "quick_gelu", "hidden_size": 768, "num_hidden_layers": 12},
    "v2": {"hidden_act": "gelu", "hidden_size": 1024, "num_hidden_layers": 23},
}
FIRST_STAGE = {  # vae/config.json of both
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_published_networks_are_those_of_the_configs(version):
    """So that a run of the config begins from them: no field of a network is another."""
    config = stable_diffusion.get_config(version)
    published = {
        "_class_name": "UNet2DConditionModel",
        "block_out_channels": [320, 640, 1280, 1280],
        **UNETS[version],
    }
    theirs = unet_config.read_unet_config(published, pathlib.Path("config.json"))[0]
    assert networks.difference(build.denoiser_network(config), theirs) is None
    width = TEXTS[version]["hidden_size"]
    published = {
        "vocab_size": 49408,
        "max_position_embeddings": 77,
        "intermediate_size": 4 * width,
        "num_attention_heads": width // 64,
        **TEXTS[version],
    }
    theirs = text_encoder._module(published, "config.json", None)
    assert networks.difference(build.text_encoder(config), theirs) is None
    theirs = autoencoder._module(FIRST_STAGE, "config.json", None)
    ours = build.autoencoder(config.model.autoencoder)
    assert networks.difference(ours, theirs) is None
    assert networks.difference(ours, theirs.clone(blocks=3)) == ("blocks", 2, 3)
