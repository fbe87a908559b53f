"""Pictures without a config: networks, settings and a first stage are all there is."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion.models.controlnet import ControlNet
from diffusion.models.transformer import Transformer
from diffusion.models.unet import UNet
from diffusion.process import gaussian, losses, samplers, schedules
from diffusion.process import keys as ks
from diffusion.sampling import added
from diffusion.sampling.guide import guided
from diffusion.sampling.inputs import Inputs
from diffusion.sampling.pipeline import Pipeline
from diffusion.sampling.settings import Settings
from diffusion.training.conditions import Hints, Label
from diffusion.training.denoiser import Denoiser
from diffusion.training.ema import Ema
from diffusion.training.state import Optimizer

SCHEDULE = schedules.ddpm_linear()
SHAPE = (8, 8, 3)


@dataclasses.dataclass(frozen=True)
class Known:
    """A network that says eps for data that is one colour a class: exact at every level."""

    num_classes: int = 3
    multipliers: tuple[int, ...] = (1, 2)
    size_multiple: int = 2

    def init(self, key, x, t, **given):
        return {"params": {"colour": jnp.array([-0.5, 0.25, 0.75, 0.0])}}

    def apply(self, variables, x, t, labels, residuals=None, keys=None):
        alpha, sigma = (f(t).reshape(-1, 1, 1, 1) for f in (SCHEDULE.alpha, SCHEDULE.sigma))
        x0 = variables["params"]["colour"][labels].reshape(-1, 1, 1, 1)
        return (x - alpha * x0) / sigma


def pipeline(network: Any = None, **settings: Any) -> Pipeline:
    task = Denoiser(
        network=network or Known(),
        sample_shape=SHAPE,
        objective=lambda *a: losses.objective(*a, schedule=SCHEDULE),
        draw=lambda *a: None,
        optimizer=Optimizer({"denoiser": optax.identity()}, lambda step: 0.0),
        ema=Ema(0.0),
        conditions={"label": Label(3), "hint": Hints()},
    )
    params = task.networks_init(jax.random.key(0))
    return Pipeline(task, Settings(SCHEDULE, **{"steps": 4} | settings), params, batch_size=8)


def made(pipe, labels, num, seeds=(0,), **options):
    batches = pipe.images(pipe.columns(labels=labels), num, seeds, **options)
    return np.concatenate(list(batches))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmpp_2m", "unipc", "heun"])
def test_a_known_network_gives_its_data(sampler):
    found = made(pipeline(sampler=sampler), [0, 2], 4)
    wanted = np.round((np.array([-0.5, 0.75, -0.5, 0.75]) + 1) * 127.5)
    np.testing.assert_allclose(found, np.broadcast_to(wanted[:, None, None, None], found.shape))


def test_guidance_goes_away_from_the_null_class():
    """x0 = null + s (told - null), and the null class is black here: s times the colour."""
    found = made(pipeline(guidance_scale=1.2), [1], 1)
    np.testing.assert_array_equal(found, np.round((1.2 * 0.25 + 1) * 127.5))


def says(colour, **settings):
    made = pipeline(**settings)
    return dataclasses.replace(made, params={"denoiser": {"colour": jnp.full(4, colour)}})


def test_autoguidance_goes_away_from_a_worse_model():
    """x0 = worse + w (x0 - worse): of 0.26 and 0.1 at w = 2, 0.42; at w = 1 and of equals, 0.26."""
    good, worse = says(0.26, guidance_scale=2.0), says(0.1, guidance_scale=7.0, clip=True)
    found = made(guided(good, worse), [0], 1)
    np.testing.assert_array_equal(found, np.round((0.42 + 1) * 127.5))
    alone = made(says(0.26), [0], 1)
    for same in (guided(says(0.26), worse), guided(good, good)):
        np.testing.assert_array_equal(made(same, [0], 1), alone)
    # What the worse one predicts may be another thing: x0 here, which is what its x_t is made of.
    x0 = dataclasses.replace(worse, how=dataclasses.replace(worse.how, prediction="x0"))
    assert np.abs(made(guided(good, x0), [0], 1).astype(float) - found).max() > 20
    other = dataclasses.replace(worse, extra={"latent_shift": np.zeros(3)})
    shifted = dataclasses.replace(
        worse, how=dataclasses.replace(worse.how, schedule=schedules.cosine(1000))
    )
    for wrong, name in ((other, "scale of latents"), (shifted, "schedule")):
        with pytest.raises(ValueError, match=f"its {name} is"):
            guided(good, wrong)


class Gaussian(Known):
    """Of data N(0, 1/4): DDIM's way from x_t to x_0 is linear."""

    def apply(self, variables, x, t, labels, residuals=None, keys=None):
        alpha, sigma = (f(t).reshape(-1, 1, 1, 1) for f in (SCHEDULE.alpha, SCHEDULE.sigma))
        return sigma * x / (alpha**2 / 4 + sigma**2)


def test_pictures_between_two_are_denoised_lines_and_share_their_noise():
    pipe = pipeline(Gaussian(), steps=10)
    images = np.random.default_rng(0).integers(96, 160, (2, *SHAPE), np.uint8)
    run = pipe.compiled(strength=0.5, rounded=False)

    def between(mix, other):
        columns = {**pipe.columns(), "mix": np.array(mix, np.float32), "image": images[:1]}
        rows = pipe.images({**columns, "other": other}, len(mix), run=run)
        return np.concatenate(list(rows))

    start, quarter, end = between([0, 0.25, 1], images[1:])
    np.testing.assert_allclose(quarter, 0.75 * start + 0.25 * end, atol=1e-5)
    alone = next(pipe.images({**pipe.columns(), "image": images[:1]}, 1, run=run))
    np.testing.assert_allclose(start, alone[0], atol=1e-6)
    assert np.abs(np.subtract(*between([0, 1], images[:1]))).max() > 0.05  # noise of their own
    seen = pipe.compiled("estimates")(
        pipe.params, *np.zeros((2, 1), np.int32), {"label": np.zeros(1, np.int32)}
    )
    assert seen[1].shape == (10, 1, *SHAPE)  # the last estimate is what is made
    np.testing.assert_array_equal(seen[1][-1], seen[0])
    assert np.abs(seen[1][0] - seen[0].astype(int)).max() > 5


def test_pictures_go_on_where_they_are_told_and_seeds_follow_each_other():
    pipe = pipeline(sampler="ddpm", steps=2)
    pipe = dataclasses.replace(pipe, params={"denoiser": {"colour": jnp.zeros(4)}})
    pipe = dataclasses.replace(pipe, how=dataclasses.replace(pipe.how, prediction="x0"))
    columns = pipe.columns(labels=[0])
    whole = made(pipe, [0], 5, (7, 8))
    np.testing.assert_array_equal(whole[5:], made(pipe, [0], 5, (8,)))
    rest = np.concatenate(list(pipe.images(columns, 5, (7, 8), start=3)))
    np.testing.assert_array_equal(rest, whole[3:])
    assert len({picture.tobytes() for picture in whole}) == 10


def test_what_a_pipeline_cannot_do_is_refused_by_the_arguments_name():
    pipe = pipeline()
    for call, words in (
        (lambda: pipe.columns(["a cat"]), "prompt='a cat' was given, but the model reads no"),
        (lambda: pipe.columns(labels=[4]), r"label=4 must lie in 0..3"),
        (lambda: next(pipe.images({}, 0)), "num=0 must"),
        (lambda: pipe.resized((7, 8)), "size=7,8 must be height,width in multiples of 2"),
        (lambda: pipe.changed(steps=0), "steps=0, but"),
        (lambda: pipe.changed(sampler="magic"), "sampler='magic' is unknown"),
        (lambda: pipe.changed(options={"magic": 1}), "options=.*a key that ddim lacks"),
        (lambda: pipe.changed(guidance_rescale=2), "guidance_rescale=2, but"),
        (lambda: pipe.changed(guidance_interval=(3,)), r"guidance_interval=\(3,\) must"),
        (lambda: pipe.changed(dynamic_threshold=2.0), "dynamic_threshold=2.0: "),
        (lambda: pipe.compiled(strength=0.1), "strength=0.1 of 4 steps is none"),
        (lambda: pipe.slots.read(mask="m.png"), "mask=m.png needs"),
        (lambda: pipe.slots.read(controls=["c.png"]), "1 pictures for 0 ControlNets"),
    ):
        with pytest.raises(ValueError, match=f"^{words}"):
            call()


def test_another_sampler_has_no_options_of_the_first():
    how = Settings(SCHEDULE, options={"eta": 1.0})
    assert how.changed(steps=3).options == {"eta": 1.0}
    assert how.changed(sampler="unipc").options == {}
    assert how.changed(sampler=None, guidance_scale=None) == how


def test_a_controlnet_steers_the_unet_that_it_was_made_for():
    unet = UNet(channels=8, multipliers=(1, 2), blocks=1, attention=(False, False), groups=4)
    fields = {"channels": 8, "multipliers": (1, 2), "blocks": 1, "attention": (False, False)}
    pipe = pipeline(unet.clone(num_classes=4))
    steered = added.with_controlnet(pipe, ControlNet(**fields), {"a": 1})
    steered = added.with_controlnet(steered, ControlNet(**fields), {"b": 2})
    assert len(steered.task.controlnets) == steered.slots.controls == 2
    assert steered.params["controlnet"] == {"a": 1} and steered.params["controlnet_1"] == {"b": 2}
    with pytest.raises(ValueError, match=r"channels=.16, 16., but the U-Net has .8, 8."):
        added.with_controlnet(pipe, ControlNet(**{**fields, "channels": 16}), {})
    transformer = Transformer(out_channels=3, width=12, depth=1, heads=2, num_classes=4)
    with pytest.raises(ValueError, match="steers a U-Net, but the denoiser is a Transformer"):
        added.with_controlnet(pipeline(transformer), ControlNet(**fields), {})
    assert pipeline(transformer).resized((4, 6)).task.sample_shape == (4, 6, 3)


@pytest.mark.parametrize(("pixels", "own"), [(np.uint8(7), 200), (np.float32(0.5), 200 / 255)])
def test_what_is_kept_of_an_image_is_in_the_samples_own_units(pixels, own):
    """8 bits for `sample`, floats in [0, 1] for `evaluate`."""
    image, mask = (
        jnp.full((1, 2, 2, 1), 200, jnp.uint8),
        jnp.array([0, 1, 0, 1]).reshape(1, 2, 2, 1),
    )
    found = Inputs(image=image, mask=mask).pasted(jnp.full((1, 2, 2, 1), pixels))
    np.testing.assert_allclose(found.ravel(), [own, pixels, own, pixels], rtol=1e-6)


def test_a_state_in_float64_around_a_network_in_float32(monkeypatch):
    """EDM's algorithm 1 as NumPy takes it in float64, around a network of float32."""
    schedule, kinds = schedules.EDM(), set()

    class Curved(Known):
        def apply(self, variables, x, t, labels, residuals=None, keys=None):
            kinds.add((str(x.dtype), str(t.dtype)))
            return jnp.sin(3 * x) + t.reshape(-1, 1, 1, 1)

    pipe = pipeline(Curved(), sampler="heun", steps=6, prediction="edm")
    how = dataclasses.replace(pipe.how, schedule=schedule, state="float64")
    pipe = dataclasses.replace(pipe, how=how)
    plain, states = samplers.sample, []

    def seen(method, denoise, x, *rest):
        states.append((str(x.dtype), str(denoise(x, jnp.ones(len(x))).dtype)))
        return plain(method, denoise, x, *rest)

    monkeypatch.setattr(samplers, "sample", seen)
    given = np.uint32([0, 0]), np.int32([0, 1]), {"label": np.zeros(2, np.int32)}
    found = np.asarray(pipe.compiled(rounded=False)(pipe.params, *given))
    assert kinds == {("float32", "float32")} and found.dtype == np.float32

    network = functools.partial(Curved().apply, {}, labels=None)
    denoise = gaussian.make_denoise(network, schedule, "edm")
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(given[1])
    x = np.float64(80) * np.asarray(ks.normal(ks.stream(keys, 0), (2, *SHAPE)), np.float64)
    levels = np.append(np.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), 6) ** 7, 0)

    def slope(x, level):
        t = jnp.full(2, level, jnp.float32)
        return (x - np.asarray(denoise(jnp.float32(x), t), np.float64)) / level

    for here, there in itertools.pairwise(levels):
        first = slope(x, here)
        end = x + (there - here) * first
        x = end if there == 0 else x + (there - here) * (first + slope(end, there)) / 2
    np.testing.assert_allclose(found, np.clip((x + 1) / 2, 0, 1), rtol=0, atol=1e-5)
    narrow = dataclasses.replace(pipe, how=dataclasses.replace(how, state="float32"))
    other = np.asarray(narrow.compiled(rounded=False)(pipe.params, *given))
    assert 0 < np.abs(other - found).max() < 1e-3
    assert states == [("float64", "float64"), ("float32", "float32")]
    with pytest.raises(ValueError, match="state='half' is unknown"):
        dataclasses.replace(how, state="half")


def test_schedules_are_compared_between_whole_times_and_in_sigma():
    ways = [schedules.TrigFlow(sigma_data=deviation) for deviation in (0.5, 1.0)]
    one, other = (
        dataclasses.replace(pipeline(), how=dataclasses.replace(pipeline().how, schedule=way))
        for way in ways
    )
    guided(one, one)
    with pytest.raises(ValueError, match="its schedule is"):
        guided(one, other)


def test_a_classifier_does_not_lead_from_no_signal():
    how = dataclasses.replace(pipeline().how, schedule=schedules.Flow(), classifier_scale=2.0)
    with pytest.raises(ValueError, match="cannot lead from a last alpha of 0"):
        how.classified(lambda x, t: x, lambda x, t: x, jnp.zeros(1, int))


def test_a_network_that_is_told_its_guidance_takes_no_other():
    class Told(Known):
        guidance_width = 8

    told = pipeline(Told())
    for setting in ({"guidance_interval": (0.0, 500.0)}, {"guidance_rescale": 0.5}):
        (name,) = setting
        with pytest.raises(ValueError, match=rf"{name}=.*told its guidance"):
            told.changed(**setting).compiled()
    with pytest.raises(ValueError, match=r"autoguidance=True, .*told its guidance"):
        guided(told, pipeline()).compiled()
