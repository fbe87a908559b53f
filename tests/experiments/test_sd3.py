"""Stable Diffusion 3 at reduced width, whole, beside Diffusers' pipeline from the same noise."""

import inspect
import json
import warnings

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from diffusion.files import read_json, write_json
from diffusion.interop import scheduler, scheduler_keys
from diffusion.sampling.pipeline import Pipeline
from experiments import train
from experiments.convert import __main__ as convert
from experiments.run import build, generate, workdir

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import tokenizers
    import torch
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        PreTrainedTokenizerFast,
        T5Config,
        T5EncoderModel,
    )

# As the published files are, narrow; 3.5's norms and blocks where there is no T5.
SD3 = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "caption_projection_dim": 24,
    "joint_attention_dim": 48,
    "pooled_projection_dim": 24 + 12,
    "pos_embed_max_size": 12,
    "sample_size": 8,
}
SD35 = {**SD3, "qk_norm": "rms_norm", "dual_attention_layers": (0,)}
TEXT = {"vocab_size": 514, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 2}
FIRST = {"hidden_size": 24, "intermediate_size": 96, "num_hidden_layers": 2, "projection_dim": 24}
SECOND = {"hidden_size": 20, "intermediate_size": 80, "num_hidden_layers": 3, "hidden_act": "gelu"}
T5 = {"vocab_size": 40, "d_model": 48, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_heads": 4}
VAE = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}


def words():
    """A tokenizer of T5's kind."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    pieces += [(p, -4.0 - i / 9) for i, p in enumerate(("▁the", "▁fo", "x", "▁sea", "s", "A", ","))]
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    names = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


WITHOUT = {"text_encoder_3": None, "tokenizer_3": None}


@pytest.fixture(scope="module")
def sd3(sd, tmp_path_factory, request):
    """(Diffusers' pipeline, its directory, our workdir of it)."""
    root, t5 = tmp_path_factory.mktemp("sd3"), request.param == "with_t5"
    sd.quiet()
    torch.manual_seed(0)
    first = CLIPTextConfig(**TEXT, **FIRST, num_attention_heads=3)
    second = CLIPTextConfig(**TEXT, **SECOND, num_attention_heads=4, projection_dim=12)
    third = T5EncoderModel(T5Config(**T5, feed_forward_proj="gated-gelu")) if t5 else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = sd.tokenizer()
        other.pad_token = "!"
        pipe = StableDiffusion3Pipeline(
            vae=sd.randomise(sd.first_stage(1.5305, shift_factor=0.0609, **VAE), 1),
            text_encoder=sd.randomise(CLIPTextModelWithProjection(first), 2),
            text_encoder_2=sd.randomise(CLIPTextModelWithProjection(second), 3),
            text_encoder_3=sd.randomise(third, 4) if t5 else None,
            tokenizer=sd.tokenizer(),
            tokenizer_2=other,
            tokenizer_3=words() if t5 else None,
            transformer=sd.randomise(SD3Transformer2DModel(**(SD3 if t5 else SD35)), 5),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )
        pipe.save_pretrained(root / "pipeline")
        pipe = StableDiffusion3Pipeline.from_pretrained(
            root / "pipeline", **({} if t5 else WITHOUT)
        )
    pipe.set_progress_bar_config(disable=True)
    argv = ("--from=diffusers", f"--source={root}/pipeline", f"--workdir={root}/run")
    assert sd.command(convert, *argv) == 0
    return pipe, root / "pipeline", root / "run"


def distance(ours, theirs):
    theirs = np.moveaxis(np.asarray(theirs), 1, -1)
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def of(*kinds):
    """A test of pipelines with T5, or without."""
    return pytest.mark.parametrize("sd3", kinds, indirect=True)


@of("with_t5", "without")
def test_a_whole_pipeline_equals_diffusers(sd, sd3, monkeypatch):
    monkeypatch.setattr(Pipeline, "decode", lambda self, params, x, *rest: x)
    model = generate.load(sd3[2]).pipeline
    assert (model.how.sampler, model.how.guidance_scale, model.how.steps) == ("euler", 7.0, 28)
    assert model.how.schedule.shift == 3 and model.extra["latent_shift"][0] == np.float32(0.0609)
    negative = sd.NEGATIVE if sd3[0].text_encoder_3 else None
    given = {"output_type": "latent", "num_inference_steps": 3, "negative_prompt": negative}
    if negative:  # off the middle of the grid
        model = model.resized((12, 20))
        given |= {"height": 12, "width": 20}
    found = sd.ours(model, negative=negative, steps=3)
    wanted = sd.theirs(sd3[0], model, latents=sd.noise(model, 2, 5), **given)
    assert distance(found, wanted) < 1e-5


@of("without")
def test_the_command_makes_its_pictures(sd, sd3, tmp_path):
    argv = [f"--prompt={prompt}" for prompt in sd.PROMPTS]
    found = sd.sampled(sd3[2], tmp_path / "out", *argv, "--guidance_scale=7.5", "--steps=2")
    model = generate.load(sd3[2]).pipeline
    wanted = sd.theirs(sd3[0], model, latents=sd.noise(model, 2, 5), num_inference_steps=2)
    assert np.abs(found - wanted).max() < 0.5 / 255 + 1e-3


@of("with_t5", "without")
def test_what_is_written_diffusers_loads(sd, sd3, tmp_path):
    assert sd.command(convert, "--to=diffusers", f"--workdir={sd3[2]}", f"--out={tmp_path}/p") == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        none = {} if sd3[0].text_encoder_3 else WITHOUT
        back = StableDiffusion3Pipeline.from_pretrained(tmp_path / "p", **none)
    back.set_progress_bar_config(disable=True)
    names = ("transformer", "vae", "text_encoder", "text_encoder_2")
    for name in names if none else (*names, "text_encoder_3"):
        ours, theirs = (getattr(p, name).state_dict() for p in (back, sd3[0]))
        assert ours.keys() == theirs.keys()
        for key in ours:  # positions of the grid are made anew
            torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=1e-6)
    given = {"num_inference_steps": 2, "output_type": "np", "latents": torch.ones(2, 16, 8, 8)}
    prompts = ["wow!! a fox!", "the sea"]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pictures = [pipe(prompts, **given).images for pipe in (back, sd3[0])]
    np.testing.assert_allclose(*pictures, atol=1e-5)


@of("with_t5")
def test_it_is_tuned_on_a_folder(sd3, tmp_path):
    """Its own config trains on: the denoiser alone, latents scaled and shifted as they were."""
    for i in range(8):
        Image.new("RGB", (16, 16), (30 * i, 9, 99)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("the fox, the sea"[: 2 * i + 1])
    config = ConfigDict(workdir.read_config(sd3[2]).to_dict())
    config.init_from, config.data.dir = str(sd3[2]), str(tmp_path)
    config.process.times = "logit_normal"
    config.conditioning.drop = 0.5
    config.train.update(steps=1, batch_size=8, save_every_steps=1, tensorboard=False)
    config.wandb.mode = "disabled"
    assert train.train(config.lock(), tmp_path / "run")
    old, new = (generate.load(run, "raw").pipeline for run in (sd3[2], tmp_path / "run"))
    assert new.extra["latent_shift"][0] == np.float32(0.0609)
    moved = {
        name: not all(map(np.array_equal, *(jax.tree.leaves(p.params[name]) for p in (old, new))))
        for name in old.params
    }
    assert moved == {"denoiser": True, "autoencoder": False, "text_encoder": False}
    assert new.tokenizer.serialised == old.tokenizer.serialised


# What is refused by its name, of which file.
WRONG = {
    "scheduler/scheduler_config.json": {"use_dynamic_shifting": True},
    "transformer/config.json": {"joint_attention_dim": 40},
    "tokenizer_2/tokenizer_config.json": {"model_max_length": 9},
    "text_encoder/config.json": {"eos_token_id": 7},
    "text_encoder_3/config.json": {"is_gated_act": False},
    "vae/config.json": {"a_new_key": 1},
}


@of("with_t5")
@pytest.mark.parametrize("file", WRONG)
def test_a_key_that_is_not_heeded_is_named(sd, sd3, tmp_path, capsys, file):
    copy = tmp_path / "p"
    for path in sd3[1].rglob("*"):
        if path.is_file() and path != sd3[1] / file:
            (copy / path.relative_to(sd3[1])).parent.mkdir(parents=True, exist_ok=True)
            (copy / path.relative_to(sd3[1])).symlink_to(path)
    write_json(copy / file, read_json(sd3[1] / file, "") | WRONG[file])
    argv = ("--from=diffusers", f"--source={copy}", f"--workdir={tmp_path}/run")
    assert sd.command(convert, *argv) == 2
    said = capsys.readouterr().err
    key = next(iter(WRONG[file]))
    assert ("context_embedder" if key == "joint_attention_dim" else key) in said


FLOWS = [{}, {"shift": 3.0}, {"shift": 0.5, "num_train_timesteps": 100, "base_shift": 1}]


@pytest.mark.parametrize("changes", FLOWS)
@pytest.mark.parametrize("steps", [1, 7])
def test_times_of_flow_matching_are_diffusers(tmp_path, changes, steps):
    theirs = FlowMatchEulerDiscreteScheduler(**changes)
    theirs.save_pretrained(tmp_path)
    theirs.set_timesteps(steps)
    read = scheduler.read_scheduler(tmp_path)
    made = build.SCHEDULES["flow"](**{k: v for k, v in read.schedule.items() if k != "name"})
    rows = build.Settings(
        made, read.prediction, sampler=read.sampler, steps=steps, options=read.options
    )
    times = rows.method().rows["t"]
    np.testing.assert_allclose(times, theirs.sigmas[:-1].numpy(), rtol=1e-6)
    told = np.asarray(made.conditioning(times))
    np.testing.assert_allclose(told, theirs.timesteps.numpy(), rtol=1e-6)
    written = scheduler.scheduler_config(read)
    assert FlowMatchEulerDiscreteScheduler.from_config(written).sigmas.equal(
        FlowMatchEulerDiscreteScheduler(**changes).sigmas
    )


def test_every_key_of_flow_matching_is_in_its_table(tmp_path):
    theirs = inspect.signature(FlowMatchEulerDiscreteScheduler.__init__).parameters.keys() - {
        "self"
    }
    assert theirs == scheduler_keys.FLOW_MATCH_KEYS.keys()
    for key in ("invert_sigmas", "stochastic_sampling", "use_karras_sigmas"):
        named = {"_class_name": scheduler_keys.FLOW_MATCH, key: True}
        (tmp_path / "scheduler_config.json").write_text(json.dumps(named))
        with pytest.raises(ValueError, match=f"{key}=True"):
            scheduler.read_scheduler(tmp_path)
    for key, value in (("num_train_timesteps", 0), ("shift", 0.0), ("shift", float("nan"))):
        named = {"_class_name": scheduler_keys.FLOW_MATCH, key: value}
        (tmp_path / "scheduler_config.json").write_text(json.dumps(named))
        with pytest.raises(ValueError, match=rf"scheduler_config\.json.*{key}={value}"):
            scheduler.read_scheduler(tmp_path)
