"""Stable Diffusion XL at reduced width, whole, beside Diffusers' pipeline from the same noise."""

import copy
import pathlib
import re
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import stable_diffusion
from diffusion.data import provenance
from diffusion.files import read_json, write_json
from diffusion.interop import compvis, compvis_ldm, load_embeddings, load_unet
from diffusion.sampling import added
from diffusion.sampling.pipeline import Pipeline
from experiments import encode_latents, sample
from experiments.convert import __main__ as convert
from experiments.convert import single
from experiments.run import assemble, generate, networks, workdir

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    from diffusers import (
        EulerDiscreteScheduler,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from diffusers.loaders.lora_conversion_utils import (
        _convert_non_diffusers_lora_to_diffusers,
        _maybe_map_sgm_blocks_to_diffusers,
    )
    from safetensors.numpy import save_file
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

# As the published files are, narrow.
UNET = {
    "block_out_channels": (8, 16, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (1, 2, 4),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 24 + 20,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 12 + 6 * 4,
    "sample_size": 8,
}
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "interpolation_type": "linear",
    "use_karras_sigmas": False,
}
TEXT = {"vocab_size": 514, "max_position_embeddings": 16, "bos_token_id": 512, "eos_token_id": 513}
FIRST = {"hidden_size": 24, "intermediate_size": 96, "num_hidden_layers": 2}
SECOND = {"hidden_size": 20, "intermediate_size": 80, "num_hidden_layers": 3, "hidden_act": "gelu"}


@pytest.fixture(scope="module")
def xl(sd, tmp_path_factory):
    """(Diffusers' pipeline, its directory, our workdir of it)."""
    root = tmp_path_factory.mktemp("xl")
    sd.quiet()
    torch.manual_seed(0)
    vae = sd.first_stage(0.13025)
    first = CLIPTextConfig(**TEXT, **FIRST, num_attention_heads=3)
    second = CLIPTextConfig(**TEXT, **SECOND, num_attention_heads=4, projection_dim=12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = sd.tokenizer()
        other.pad_token = "!"
        pipe = StableDiffusionXLPipeline(
            vae=sd.randomise(vae, 1),
            text_encoder=sd.randomise(CLIPTextModel(first), 2),
            text_encoder_2=sd.randomise(CLIPTextModelWithProjection(second), 3),
            tokenizer=sd.tokenizer(),
            tokenizer_2=other,
            unet=sd.randomise(UNet2DConditionModel(**UNET), 4),
            scheduler=EulerDiscreteScheduler(**SCHEDULER),
            add_watermarker=False,
        )
        pipe.save_pretrained(root / "pipeline")
        # As read, "!" is a token of its own, as its files say that it is special.
        pipe = StableDiffusionXLPipeline.from_pretrained(root / "pipeline", add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    argv = ("--from=diffusers", f"--source={root}/pipeline", f"--workdir={root}/run")
    assert sd.command(convert, *argv) == 0
    return pipe, root / "pipeline", root / "run"


@pytest.fixture
def latents(monkeypatch):
    """Ours and theirs are compared where they are diffused."""
    monkeypatch.setattr(Pipeline, "decode", lambda self, params, x, *rest: x)


def distance(ours, theirs):
    theirs = np.moveaxis(np.asarray(theirs), 1, -1)
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def test_the_network_is_diffusers(sd, xl):
    module, params = load_unet(xl[1] / "unet")
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count == sum(p.numel() for p in xl[0].unet.parameters())
    draw = np.random.default_rng(0).normal
    x, context, pooled = (
        draw(size=size).astype("f4") for size in ((2, 8, 4, 4), (2, 5, 44), (2, 12))
    )
    sizes = np.array([[512, 768, 0, 32, 1024, 1024], [9] * 6], "f4")
    with torch.no_grad():
        given = [torch.from_numpy(v) for v in (x, context, pooled, sizes)]
        told = {"text_embeds": given[2], "time_ids": given[3]}
        ours_first = given[0].permute(0, 3, 1, 2)
        t = torch.tensor([7, 900])
        wanted = xl[0].unet(ours_first, t, given[1], added_cond_kwargs=told).sample
    condition = generate.load(xl[2]).pipeline.task.conditions["text"]
    vector = condition._given(
        {"context": jnp.asarray(context), "pooled": jnp.asarray(pooled)},
        {"sizes": jnp.asarray(sizes)},
    )["vector"]
    with jax.default_matmul_precision("highest"):
        found = jax.jit(module.apply)(
            {"params": params}, x, np.array([7, 900]), context=context, vector=vector
        )
    assert distance(found, wanted) < 1e-5


@pytest.mark.parametrize("negative", [None, "given"])
def test_a_whole_pipeline_equals_diffusers(sd, xl, latents, negative):
    """Without a negative prompt both sides guide away from zeros."""
    model = generate.load(xl[2]).pipeline
    assert (model.how.sampler, model.how.guidance_scale) == ("euler", 5.0)
    negative = negative and sd.NEGATIVE
    found = sd.ours(model, negative=negative, steps=3)
    given = {"latents": sd.noise(model, 2, 5), "output_type": "latent", "num_inference_steps": 3}
    wanted = sd.theirs(xl[0], model, **given, negative_prompt=negative)
    assert distance(found, wanted) < 1e-5
    other = sd.theirs(xl[0], model, **given, negative_prompt=negative and ["", ""])
    assert (distance(found, other) > 1e-3) == (negative is not None)


def test_the_command_tells_of_sizes(sd, xl, tmp_path, capsys):
    argv = [f"--prompt={prompt}" for prompt in sd.PROMPTS]
    argv += ["--guidance_scale=7.5", "--size=24,16", "--steps=3"]
    sizes = ("--original_size=48,64", "--crop=3,4", "--target_size=12,16")
    found = sd.sampled(xl[2], tmp_path / "told", *argv, *sizes)
    model = generate.load(xl[2]).pipeline.resized((24, 16))
    own = [24, 16, 0, 0, 24, 16]  # of an uncropped picture of the size asked for
    assert model.columns(sizes={"crop": (0, 0)})["sizes"].tolist() == [own]
    given = {"latents": sd.noise(model, 2, 5), "height": 24, "width": 16, "num_inference_steps": 3}
    told = {"original_size": (48, 64), "crops_coords_top_left": (3, 4), "target_size": (12, 16)}
    wanted = sd.theirs(xl[0], model, **given, **told)
    assert np.abs(found - wanted).max() < 0.5 / 255 + 1e-3
    assert np.abs(sd.theirs(xl[0], model, **given) - wanted).max() > 0.01
    for wrong in ("--crop=1", "--target_size=-1,2"):
        assert sd.command(sample, f"--workdir={xl[2]}", wrong) == 2
        assert wrong.split("=")[0][2:] in capsys.readouterr().err


@pytest.fixture(scope="module")
def trained(xl, tmp_path_factory):
    """A function from "online" or "" to the config that trains the pipeline on two pictures."""
    root, own = tmp_path_factory.mktemp("pictures"), workdir.read_config(xl[2])
    for i, size in enumerate(((40, 30), (16, 64))):
        Image.new("RGB", size, (90 * i, 8, 9)).save(root / f"{i}.png")
        (root / f"{i}.txt").write_text("a fox")

    def made(switch):
        config = stable_diffusion.get_config(f"xl,{switch},smoke".replace(",,", ","))
        config.model, config.data.image_size, config.init_from = own.model, 16, str(xl[2])
        config.conditioning.size_dim = own.conditioning.size_dim
        config.parallel.data, config.train.batch_size = 1, 2
        if "latents" in config:
            config.latents.update({"first_stage": str(xl[2]), "data_dir": str(root)})
            config.data.dir = str(root / "latents")
        else:
            config.data.dir = str(root)
        return config

    return made


def test_training_tells_of_each_pictures_own_size(trained):
    wanted = [[30, 40, 0, 2, 16, 16], [64, 16, 24, 0, 16, 16]]
    run = assemble.build_run(trained("online").lock())
    batch = next(iter(run.train_batches()))
    assert sorted(batch["sizes"].tolist()) == wanted
    params = run.start | run.frozen
    tokens = {key: jnp.asarray(batch[key]) for key in ("tokens", "sizes")}
    vectors = run.task.conditions["text"].encode(params, tokens)["vector"]
    assert np.abs(vectors[0] - vectors[1]).max() > 0.1  # of one caption
    config = trained("").lock()
    encode_latents.encode(config)
    stored = next(iter(assemble.build_run(config).train_batches()))
    assert sorted(stored["sizes"].tolist()) == wanted
    known = provenance.read(folder := pathlib.Path(config.data.dir), "")
    del known["made_from"]["sizes"]  # as latents were stored before there were any
    provenance.write(folder, {k: v for k, v in known.items() if k not in ("files", "sha256")})
    with pytest.raises(ValueError, match="sizes"):
        assemble.build_run(config)
    config = trained("online")
    config.data.update(crop="random", shorter_side=20, flip=True)
    with pytest.raises(ValueError, match=r"data\.flip=True"):
        assemble.build_run(config.lock())


def test_what_is_written_diffusers_loads(sd, xl, tmp_path):
    assert sd.command(convert, "--to=diffusers", f"--workdir={xl[2]}", f"--out={tmp_path}/p") == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        back = StableDiffusionXLPipeline.from_pretrained(tmp_path / "p", add_watermarker=False)
    back.set_progress_bar_config(disable=True)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        ours, theirs = (getattr(p, name).state_dict() for p in (back, xl[0]))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert back.config.force_zeros_for_empty_prompt
    given = {"num_inference_steps": 2, "output_type": "np", "latents": torch.ones(2, 4, 8, 8)}
    prompts = ["wow!! a fox!", "the sea"]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pictures = [pipe(prompts, **given).images for pipe in (back, xl[0])]
    np.testing.assert_array_equal(*pictures)


def test_one_with_more_channels_is_not_written(sd, xl, tmp_path, capsys):
    shutil.copytree(xl[2], tmp_path / "run")
    config = read_json(tmp_path / "run/config.json", "")
    config["conditioning"]["concat"] = "inpaint"
    write_json(tmp_path / "run/config.json", config)
    argv = ("--to=diffusers", f"--workdir={tmp_path}/run", f"--out={tmp_path}/p")
    assert sd.command(convert, *argv) == 2
    assert "conditioning.concat='inpaint' of Stable Diffusion XL" in capsys.readouterr().err
    assert not (tmp_path / "p").exists()


def kohya(unet, dotted=False):
    """A file as kohya's trainer writes it for SDXL, or dotted as ComfyUI does: CompVis's names, of
    every attention."""
    draw, tensors = np.random.default_rng(6), {}
    places = {
        "input_blocks_3_1": "down_blocks.1.attentions.0",
        "input_blocks_5_1": "down_blocks.2.attentions.0",
        "middle_block_1": "mid_block.attentions.0",
        **{f"output_blocks_{n}_1": f"up_blocks.{n // 2}.attentions.{n % 2}" for n in range(4)},
    }
    for theirs, ours in places.items():
        for name, module in unet.get_submodule(ours).named_modules():
            if isinstance(module, torch.nn.Linear):
                out, width = module.weight.shape
                key = f"lora_unet_{theirs}_{name.replace('.', '_')}"
                if dotted:
                    key = f"diffusion_model.{re.sub(r'_(?=[0-9])', '.', theirs)}.{name}"
                tensors[f"{key}.lora_down.weight"] = draw.normal(0, 0.3, (2, width)).astype("f4")
                tensors[f"{key}.lora_up.weight"] = draw.normal(0, 0.3, (out, 2)).astype("f4")
                tensors[f"{key}.alpha"] = np.array(1.0, "f4")
    return tensors


def test_updates_by_compvis_names_are_diffusers(sd, xl, latents, tmp_path):
    """By Diffusers' own translation of the names; its merge needs another package."""
    tensors = kohya(xl[0].unet)
    draw = np.random.default_rng(7)
    for te, width in (("te1", 24), ("te2", 20)):
        key = f"lora_{te}_text_model_encoder_layers_0_self_attn_q_proj"
        tensors[f"{key}.lora_down.weight"] = draw.normal(size=(2, width)).astype("f4")
        tensors[f"{key}.lora_up.weight"] = draw.normal(size=(width, 2)).astype("f4")
        tensors[f"{key}.alpha"] = np.array(2.0, "f4")
    save_file(tensors, tmp_path / "x.safetensors")
    as_torch = {key: torch.from_numpy(np.asarray(value)) for key, value in tensors.items()}
    mapped = _maybe_map_sgm_blocks_to_diffusers(as_torch, xl[0].unet.config)
    theirs, alphas = _convert_non_diffusers_lora_to_diffusers(mapped)
    changed = {"unet": copy.deepcopy(xl[0].unet)}
    changed |= {n: copy.deepcopy(getattr(xl[0], n)) for n in ("text_encoder", "text_encoder_2")}
    with torch.no_grad():
        for key in [key for key in theirs if key.endswith("down.weight")]:
            name = re.sub(r"[._]lora\.down\.weight$", "", key).replace(".processor.", ".")
            name = re.sub(
                r"self_attn\.to_(\w)$", r"self_attn.\1_proj", name.replace("text_model.", "")
            )
            network, name = re.sub(r"to_out$", "to_out.0", name).split(".", 1)
            alpha = alphas.get(f"{key}.alpha") or alphas[key.replace("lora.down.weight", "alpha")]
            up = theirs[key.replace("down.weight", "up.weight")]
            model = changed[network]
            model = getattr(model, "text_model", model)
            model.get_submodule(name).weight += alpha / 2 * up @ theirs[key]
    other = copy.copy(xl[0])
    for name, network in changed.items():
        setattr(other, name, network)
    model = generate.load(xl[2]).pipeline
    pipe = added.with_lora(model, str(tmp_path / "x.safetensors"))
    found = sd.ours(pipe, steps=2)
    given = {"latents": sd.noise(model, 2, 5), "output_type": "latent", "num_inference_steps": 2}
    assert distance(found, sd.theirs(other, model, **given)) < 1e-5
    assert distance(found, sd.theirs(xl[0], model, **given)) > 0.01
    kept = {key: value for key, value in tensors.items() if key.startswith("lora_te")}
    save_file(kept | kohya(xl[0].unet, dotted=True), tmp_path / "dotted.safetensors")
    again = added.with_lora(model, str(tmp_path / "dotted.safetensors"))
    jax.tree.map(np.testing.assert_array_equal, again.params, pipe.params)


def test_a_word_of_both_encoders_is_diffusers(sd, xl, tmp_path):
    draw = np.random.default_rng(8)
    word = {"clip_l": draw.normal(size=(2, 24)), "clip_g": draw.normal(size=(2, 20))}
    word = {key: value.astype("f4") for key, value in word.items()}
    save_file(word, tmp_path / "<cat>.safetensors")
    pipe = added.with_embeddings(
        generate.load(xl[2]).pipeline, load_embeddings(tmp_path / "<cat>.safetensors")
    )
    theirs = copy.copy(xl[0])
    parts = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
    for name in parts:
        setattr(theirs, name, copy.deepcopy(getattr(theirs, name)))
    for key, words, encoder in (("clip_l", *parts[:2]), ("clip_g", *parts[2:])):
        theirs.load_textual_inversion(
            {"<cat>": torch.from_numpy(word[key])},
            token="<cat>",
            text_encoder=getattr(theirs, encoder),
            tokenizer=getattr(theirs, words),
        )
    prompts = ["A <cat>!", "the sea"]
    with torch.no_grad():
        context, _, pooled, _ = theirs.encode_prompt(prompts, do_classifier_free_guidance=False)
    tokens = jnp.asarray(pipe.tokens(prompts))
    with jax.default_matmul_precision("highest"):
        found = pipe.task.condition(pipe.params, {"tokens": tokens})
    for ours, wanted in ((found["context"], context), (found["vector"][:, :12], pooled)):
        assert np.linalg.norm(ours - wanted.numpy()) / np.linalg.norm(wanted) < 1e-5


def test_one_file_is_the_same_as_the_directory(sd, xl, tmp_path):
    """As SGM names it: OpenCLIP's q, k and v in one tensor, its projection not transposed."""
    config = workdir.read_config(xl[2])
    module, params = load_unet(xl[1] / "unet")
    tensors = compvis_ldm.unet_tensors(module, params)
    assert "model.diffusion_model.label_emb.0.0.weight" in tensors
    found = networks.load(xl[2])
    first = compvis.to_compvis_tensors(found.first_stage, found.params["autoencoder"])
    tensors |= {f"first_stage_model.{name}": value for name, value in first.items()}
    for key, value in xl[0].text_encoder.state_dict().items():
        name = "conditioner.embedders.0.transformer.text_model." + key.removeprefix("text_model.")
        tensors[name] = value.numpy()
    state = {
        k.removeprefix("text_model."): v.numpy()
        for k, v in xl[0].text_encoder_2.state_dict().items()
    }
    state["text_projection"] = np.ascontiguousarray(state.pop("text_projection.weight").T)
    state["positional_embedding"] = state.pop("embeddings.position_embedding.weight")
    for key in [key for key in state if ".self_attn.q_proj." in key]:
        parts = [state.pop(key.replace("q_proj", f"{n}_proj")) for n in "qkv"]
        state[key.replace("q_proj.", "in_proj_")] = np.concatenate(parts)
    names = (("final_layer_norm", "ln_final"), ("encoder.layers.", "transformer.resblocks."))
    names += (("layer_norm", "ln_"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"))
    for key, value in state.items():
        for theirs, ours in (*names, ("self_attn", "attn"), ("embeddings.", "")):
            key = key.replace(theirs, ours)
        tensors[f"conditioner.embedders.1.model.{key}"] = value
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, tmp_path / "x.safetensors")
    parts = single.from_compvis(tmp_path / "x.safetensors", config, xl[1] / "tokenizer")
    for name, tree in parts.params.items():
        jax.tree.map(np.testing.assert_array_equal, tree, found.params[name])
    prompts = ["wow!! a fox!", ""]
    tokens = [words.encode(prompts, 32) for words in (parts.tokenizer, found.tokenizer)]
    np.testing.assert_array_equal(*tokens)


def test_the_refiner_is_refused_by_name(sd, xl, tmp_path, capsys):
    index = read_json(xl[1] / "model_index.json", "")
    for change in (
        {"_class_name": "StableDiffusionXLImg2ImgPipeline", "requires_aesthetics_score": True},
        {"text_encoder": [None, None], "tokenizer": [None, None]},
    ):
        write_json(tmp_path / "p/model_index.json", {**index, **change})
        for name in ("unet", "scheduler", "vae", "text_encoder_2", "tokenizer_2"):
            (tmp_path / "p" / name).exists() or (tmp_path / "p" / name).symlink_to(xl[1] / name)
        argv = ("--from=diffusers", f"--source={tmp_path}/p", f"--workdir={tmp_path}/run")
        assert sd.command(convert, *argv) == 2
        assert "refiner" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
