"""Learned words of Diffusers' and AUTOMATIC1111's files, against Diffusers' own loader."""

import copy
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.files import write_tensors
from diffusion.interop import load_embeddings, save_embeddings
from diffusion.sampling import added
from experiments import sample
from experiments.run import generate

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    from safetensors.torch import save_file

WIDTH = 24
PROMPTS = ["A photo of <cat> at dawn", "<dog>, a dog and <cat>", "my-style; <DOG> dogs<cat>x"]


def vectors(n, seed):
    return torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One file of each kind: a vector, several, A1111's two."""
    folder = tmp_path_factory.mktemp("words")
    save_file({"<cat>": vectors(3, 0)}, folder / "cat.safetensors")
    torch.save({"<dog>": vectors(1, 1)[0]}, folder / "dog.bin")
    webui = {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors(2, 2)}}
    torch.save({**webui, "name": "my-style", "step": 499}, folder / "style.pt")
    save_file({"emb_params": vectors(2, 3)}, folder / "other.safetensors")
    module = torch.nn.ParameterDict({"*": torch.nn.Parameter(vectors(2, 4))})
    torch.save({**webui, "string_to_param": module}, folder / "first.pt")
    return folder


def test_files_hold_their_words(folder, tmp_path):
    wanted = {
        "cat.safetensors": ("<cat>", vectors(3, 0)),
        "dog.bin": ("<dog>", vectors(1, 1)),
        "style.pt": ("my-style", vectors(2, 2)),
        "other.safetensors": ("other", vectors(2, 3)),
        "first.pt": ("first", vectors(2, 4)),
    }
    for file, (word, tensor) in wanted.items():
        found = load_embeddings(folder / file)
        assert list(found) == [word]
        np.testing.assert_array_equal(found[word], tensor.numpy())
        save_embeddings(tmp_path / "w.safetensors", found)
        np.testing.assert_array_equal(load_embeddings(tmp_path / "w.safetensors")[word], tensor)


@pytest.fixture(scope="module")
def theirs(reference, folder):
    """Diffusers' pipeline with the three words."""
    pipe = copy.copy(reference[0])
    pipe.tokenizer, pipe.text_encoder = (
        copy.deepcopy(p) for p in (pipe.tokenizer, pipe.text_encoder)
    )
    pipe.components["text_encoder"]
    for file in ("cat.safetensors", "dog.bin", "style.pt"):
        pipe.load_textual_inversion(str(folder / file))
    return pipe


def test_prompts_with_learned_words_are_as_diffusers_reads_them(folder, theirs, converted):
    pipe = generate.load(converted).pipeline
    for file in ("cat.safetensors", "dog.bin", "style.pt"):
        pipe = added.with_embeddings(pipe, load_embeddings(folder / file))
    tokens = pipe.tokens(PROMPTS)
    spelled = [theirs.maybe_convert_prompt(prompt, theirs.tokenizer) for prompt in PROMPTS]
    options = {"padding": "max_length", "max_length": 16, "truncation": True}
    np.testing.assert_array_equal(tokens, theirs.tokenizer(spelled, **options).input_ids)
    with jax.default_matmul_precision("highest"):
        found = pipe.task.condition(pipe.params, {"tokens": jnp.asarray(tokens)})["context"]
    with torch.no_grad():
        wanted = theirs.text_encoder(torch.from_numpy(tokens).long())[0].numpy()
    assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 1e-5


def test_the_command_takes_files(sd, folder, converted, tmp_path, capsys):
    argv = ("--num=1", "--steps=1", "--prompt=a <cat>", f"--workdir={converted}")
    files = f"--embedding={folder}/cat.safetensors,{folder}/dog.bin"
    assert sd.command(sample, *argv, files, f"--out={tmp_path}/a") == 0
    assert "<cat> (3 vectors)" in capsys.readouterr().out
    assert sd.command(sample, *argv, f"--out={tmp_path}/b") == 0
    assert (tmp_path / "a/00000.png").read_bytes() != (tmp_path / "b/00000.png").read_bytes()


def test_what_is_no_word_of_this_model_is_named(sd, folder, converted, tmp_path, capsys):
    save_file({"clip_l": vectors(1, 0), "clip_g": vectors(1, 0)}, tmp_path / "xl.safetensors")
    save_file({"<w>": torch.ones(1, 8)}, tmp_path / "wide.safetensors")
    save_file({"<w>": torch.ones(1, 2, 24)}, tmp_path / "cube.safetensors")
    save_file({"<w>": torch.full((24,), float("nan"))}, tmp_path / "nan.safetensors")
    save_file({"f</w>": torch.ones(24)}, tmp_path / "token.safetensors")
    for name, words in (
        ("xl", "vectors of 48"),
        ("wide", "vectors of 8, but the text encoder's are of 24"),
        ("cube", "which is no learned word's"),
        ("nan", "are not finite"),
        ("token", "is a token already"),
    ):
        given = f"--embedding={tmp_path}/{name}.safetensors"
        assert sd.command(sample, f"--workdir={converted}", "--num=1", given) == 2
        error = capsys.readouterr().err
        assert words in error and f"{name}.safetensors" in error
    given = f"--embedding={folder}/dog.bin,{folder}/dog.bin"
    assert sd.command(sample, f"--workdir={converted}", "--num=1", given) == 2
    assert "'<dog>' is a token already" in capsys.readouterr().err


@pytest.mark.parametrize("half", ["clip_l", "clip_g"])
def test_half_a_word_of_xl_is_refused(tmp_path, half):
    path = tmp_path / "mycat.safetensors"
    write_tensors(path, {half: np.ones((2, 768), np.float32)})
    with pytest.raises(ValueError, match=f"mycat.safetensors holds {half} alone of clip_l and"):
        load_embeddings(path)
