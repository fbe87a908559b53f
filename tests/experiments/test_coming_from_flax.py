"""Every "now" of docs/coming-from-flax-diffusers.md runs, on a tiny pipeline in Flax's files."""

import importlib.util
import json
import pathlib
import re
import shutil

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.torch import load_file

from experiments.convert import __main__ as convert

ROOT = pathlib.Path(__file__).parents[2]
PAGE = ROOT / "docs" / "coming-from-flax-diffusers.md"
STEMS = {
    "unet": ("diffusion_pytorch_model", "diffusion_flax_model"),
    "vae": ("diffusion_pytorch_model", "diffusion_flax_model"),
    "text_encoder": ("model", "flax_model"),
}


def as_flax(source, target):
    """The pipeline with Flax's trees and class names in the place of PyTorch's."""
    path = ROOT / "tests" / "interop" / "flax_reference.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    shutil.copytree(source, target)
    for name, (stem, flax_stem) in STEMS.items():
        tensors = load_file(target / name / f"{stem}.safetensors")
        tree = flax.serialization.msgpack_serialize(reference.flax_tree(tensors))
        (target / name / f"{flax_stem}.msgpack").write_bytes(tree)
        (target / name / f"{stem}.safetensors").unlink()
    for file in (*target.glob("*.json"), *target.glob("*/config.json"), *target.glob("sch*/*")):
        found = json.loads(file.read_text())
        if "_class_name" in found:
            found["_class_name"] = "Flax" + found["_class_name"]
        file.write_text(json.dumps(found))


def test_every_now_runs(sd, reference, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    as_flax(reference[1], tmp_path / "sd")
    assert sd.command(convert, "--from=diffusers", "--source=sd", "--workdir=runs/sd") == 0
    text = PAGE.read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 5
    rng = np.random.default_rng(0)
    given = {
        "prompts": sd.PROMPTS,
        "pixels": jnp.asarray(rng.uniform(-1, 1, (2, 16, 16, 3)), jnp.float32),
        "noise": jnp.asarray(rng.normal(size=(2, 8, 8, 4)), jnp.float32),
        "keys": jax.random.split(jax.random.key(0), 2),
        "t": jnp.array([3, 700]),
        "states": jnp.asarray(rng.normal(size=(2, 16, 24)), jnp.float32),
    }
    for block in blocks:
        exec(block, given)
    shapes = {"latents": (2, 8, 8, 4), "images": (2, 16, 16, 3), "eps": (2, 8, 8, 4)}
    shapes |= {"states": (2, 16, 24), "sampled": (2, 8, 8, 4), "pictures": (2, 16, 16, 3)}
    for name, shape in shapes.items():
        assert given[name].shape == shape and np.all(np.isfinite(given[name])), name
    wanted = sd.theirs(
        reference[0],
        None,
        latents=sd.noise(given["pipe"], 2, 0),
        num_inference_steps=10,
        negative_prompt=["blurred"] * 2,
    )
    np.testing.assert_allclose(given["pictures"] / 255, wanted, atol=0.5 / 255 + 1e-4)
