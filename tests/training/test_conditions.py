"""Conditions: what the network is given, what says nothing, and what is dropped."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion.models.embedders import ClassEmbedder
from diffusion.models.lora import Lora
from diffusion.process import keys as ks
from diffusion.training import conditions
from diffusion.training.conditions import Concat, Hints, Label, Text
from diffusion.training.denoiser import Denoiser
from diffusion.training.ema import Ema
from diffusion.training.state import Optimizer

NULL = (7, 0, 0)
TOKENS = jnp.array([[1, 2, 0], [3, 0, 0]], jnp.int32)


def table(variables, tokens, mask=None, keys=None):
    """A text encoder: each token's row, which nothing else changes."""
    return variables["params"]["rows"][tokens]


PARAMS = {"text_encoder": {"rows": jnp.arange(16.0).reshape(8, 2)}}
TEXT = Text(types.SimpleNamespace(apply=table), NULL, mask_padding=True)


def test_a_caption_becomes_a_context_and_its_mask():
    given = TEXT.encode(PARAMS, {"tokens": TOKENS})
    np.testing.assert_array_equal(given["context"][0, 1], [4.0, 5.0])
    np.testing.assert_array_equal(given["context_mask"], TOKENS != 0)
    assert set(Text(TEXT.encoder, NULL).encode(PARAMS, {"tokens": TOKENS})) == {"context"}


def test_what_is_dropped_is_what_guidance_takes_for_nothing():
    """One null condition: a batch dropped whole is the null batch."""
    told = {"text": TEXT, "label": Label(5), "hint": Hints()}
    batch = {"tokens": TOKENS, "label": jnp.array([0, 4]), "other": jnp.arange(2)}
    nothing = {**batch, **conditions.null(told, PARAMS, batch)}
    np.testing.assert_array_equal(nothing["tokens"], [NULL, NULL])
    np.testing.assert_array_equal(nothing["label"], [5, 5])
    dropped = conditions.drop(told, PARAMS, batch, jnp.array([True, True]))
    jax.tree.map(np.testing.assert_array_equal, dropped, nothing)
    half = conditions.drop(told, PARAMS, batch, jnp.array([False, True]))
    np.testing.assert_array_equal(half["tokens"], [TOKENS[0], NULL])
    np.testing.assert_array_equal(half["label"], [0, 5])
    np.testing.assert_array_equal(half["other"], [0, 1])


def test_stored_contexts_are_taken_and_dropped_to_the_empty_captions():
    stored = jnp.full((2, 3, 2), -1.0, jnp.float16)
    batch = {"tokens": TOKENS, "context": stored}
    np.testing.assert_array_equal(TEXT.encode(PARAMS, batch)["context"], stored)
    half = conditions.drop({"text": TEXT}, PARAMS, batch, jnp.array([True, False]))
    assert half["context"].dtype == jnp.float16
    empty = TEXT.encode(PARAMS, {"tokens": jnp.array([NULL])})["context"][0]
    np.testing.assert_array_equal(half["context"], np.stack([empty, stored[1]]))


def test_a_negative_caption_stands_for_the_empty_one():
    batch = {"tokens": TOKENS, "negative": TOKENS[::-1]}
    np.testing.assert_array_equal(TEXT.null(PARAMS, batch)["tokens"], TOKENS[::-1])


def test_a_label_is_given_as_it_is_or_as_a_context():
    label, batch = Label(5), {"label": jnp.array([2, 5])}
    assert label.init(jax.random.key(0))[1] == {}
    np.testing.assert_array_equal(label.encode({}, batch)["labels"], [2, 5])
    embedded = Label(5, ClassEmbedder(6, 4))
    given, params = embedded.init(jax.random.key(0))
    assert set(given) == {"context"} and given["context"].shape == (1, 1, 4)
    rows = jax.tree.leaves(params["class_embedder"])[0]
    np.testing.assert_array_equal(
        embedded.encode(params, batch)["context"][:, 0], rows[np.array([2, 5])]
    )


@pytest.mark.parametrize(("columns", "scales"), [(("hint",), None), (("hint_0", "hint_1"), (1, 2))])
def test_control_pictures_lie_between_0_and_1(columns, scales):
    batch = {n: jnp.full((2, 4, 4, 3), 51 * (i + 1), jnp.uint8) for i, n in enumerate(columns)}
    for i, scale in enumerate(scales or ()):
        batch[f"hint_scale_{i}"] = jnp.full(2, float(scale))
    given = Hints().encode({}, batch)
    np.testing.assert_allclose([h[0, 0, 0, 0] for h in given["hints"]], [0.2, 0.4][: len(columns)])
    assert [int(s[0]) for s in given.get("hint_scales", ())] == list(scales or ())
    assert Hints().null({}, batch) == {} and Hints().encode({}, {}) == {}


IMAGE = jnp.full((1, 4, 4, 1), 255, jnp.uint8)
MASK = jnp.zeros((1, 4, 4, 1), jnp.uint8).at[:, :, 2:].set(1)


@pytest.mark.parametrize(("kind", "hole", "order"), [("inpaint", 0, 1), ("inpaint_ldm", -1, -1)])
def test_what_inpainting_joins_is_in_the_authors_order(kind, hole, order):
    """Stable Diffusion: [mask 0 or 1, latents, grey hole]; CompVis: [latents, black, mask -1, 1]"""
    concat = Concat(kind, (2, 2, 2))
    ready = concat.ready({"image": IMAGE, "mask": MASK}, lambda x: x[:, ::2, ::2] * 3, {})
    latents = np.broadcast_to(np.array([3.0, 3.0 * hole])[None, None, :, None], (1, 2, 2, 1))
    np.testing.assert_array_equal(ready["masked"], latents)
    mask = np.array([0.0, 1.0]) if kind == "inpaint" else np.array([-1.0, 1.0])
    mask = np.broadcast_to(mask[None, None, :, None], (1, 2, 2, 1))
    found = concat.encode({}, ready)["concat"]
    np.testing.assert_array_equal(found, np.concatenate([mask, latents][::order], -1))
    stored = {"masked": jnp.asarray(latents) / 3, "mask": MASK[:, ::2, ::2]}
    again = concat.encode(
        {}, concat.ready(stored, lambda x: x * 0, {"latent_shift": 0.0, "latent_scale": 3.0})
    )
    np.testing.assert_allclose(again["concat"], found, atol=1e-6)
    assert concat.init(jax.random.key(0))[0]["concat"].shape == (1, 2, 2, 2)


def test_a_small_picture_is_enlarged_to_the_size_of_x():
    small = jnp.arange(0, 160, 10, dtype=jnp.uint8).reshape(1, 4, 4, 1)
    same = Concat("low_resolution", (4, 4, 1)).encode({}, {"small": small})["concat"]
    np.testing.assert_allclose(same, np.asarray(small) / 127.5 - 1, atol=1e-6)
    found = Concat("low_resolution", (8, 8, 1), 2).encode({}, {"small": small})["concat"]
    assert found.shape == (1, 8, 8, 1)
    np.testing.assert_allclose(found.mean(), same.mean(), atol=1e-2)


class Matrix:
    """A network of one dense layer, which says what else it was given."""

    guidance_width = 8

    def __init__(self):
        self.given = {}

    def apply(self, variables, x, t, *hint, keys=None, **given):
        self.given = given
        return [x] if hint else x @ variables["params"]["to_q"]["kernel"]


def denoiser(**fields):
    return Denoiser(
        network=Matrix(),
        sample_shape=(2,),
        draw=lambda key, x0, step: (jnp.ones(1), x0),
        optimizer=Optimizer({"denoiser": optax.identity()}, lambda step: 0.0),
        ema=Ema(0.0),
        **fields,
    )


@pytest.mark.parametrize("own", [False, True])
def test_a_teacher_under_low_rank_updates_has_none(own):
    """Its updates are the student's: the teacher is the network that they are added to, or one of
    its own."""
    found = []

    def objective(network, x0, t, noise):
        found.extend(network(x0, t, teacher=teacher) for teacher in (False, True))
        return jnp.zeros(1), {}

    task = denoiser(
        objective=objective, lora=Lora(1, 1.0, ("to_q",)), teacher=Matrix() if own else None
    )
    params = {"denoiser": {"to_q": {"kernel": jnp.eye(2)}}}
    params |= {"lora": {"to_q": {"down": jnp.ones((2, 1)), "up": jnp.ones((1, 2))}}}
    params |= {"teacher": {"to_q": {"kernel": 5 * jnp.eye(2)}}}
    keys = ks.example_keys(jax.random.key_data(jax.random.key(0)), jnp.int32(0), jnp.arange(1))
    task.loss(params, {}, {"image": jnp.full((1, 2), 255, jnp.uint8)}, keys, train=False)
    student, teacher = (float(out[0, 0]) for out in found)
    assert (student, teacher) == (3.0, 5.0 if own else 1.0)


def test_a_controlnet_beside_a_network_that_is_told_guidance():
    """Only the network is told it; a ControlNet is told the rest."""
    control = Matrix()
    task = denoiser(objective=print, controlnets=(control,))
    given = {"guidance": jnp.ones(1), "context": jnp.ones((1, 1, 2)), "hints": (jnp.ones((1, 2)),)}
    params = {"denoiser": {"to_q": {"kernel": jnp.eye(2)}}, "controlnet": {}}
    task.predict(params, jnp.ones((1, 2)), jnp.ones(1), given)
    assert set(control.given) == {"context"}
    assert set(task.network.given) == {"context", "guidance", "residuals"}
