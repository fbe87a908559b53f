import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from diffusion.models.autoencoder import AutoencoderKL, VQModel
from diffusion.models.bottleneck import (
    Code,
    Posterior,
    code_counts,
    code_usage,
    perplexity,
    quantize,
)
from diffusion.models.positions import patches, unpatch

SMALL = {"channels": 8, "multipliers": (1, 2), "blocks": 1, "groups": 4}
VQ = {**SMALL, "num_codes": 16}


def per_level(levels, *attending):
    return tuple(level in attending for level in range(levels))


def random_keys(count, seed=0):
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(count))


def init(module, x):
    """Variables with every parameter drawn at random (quicker than compiling `init`)."""
    rng = np.random.default_rng(1)

    def draw(shape):
        fan_in = np.prod(shape.shape[:-1]) if len(shape.shape) > 2 else 4
        return jnp.asarray(rng.standard_normal(shape.shape) * fan_in**-0.5, jnp.float32)

    return jax.tree.map(draw, jax.eval_shape(module.init, jax.random.key(0), x))


def image(*space, channels=3, batch=2, dtype=np.float32):
    x = np.random.default_rng(0).standard_normal((batch, *space, channels))
    return jnp.asarray(x, dtype)


def codes(count):
    return jnp.asarray(np.random.default_rng(1).standard_normal((count, 3)), jnp.float32)


@pytest.mark.parametrize(
    ("module", "count", "factor"),
    [
        (AutoencoderKL(multipliers=(1, 2, 4), z_channels=3), 55_312_063, 4),
        (AutoencoderKL(multipliers=(1, 2, 4, 4), z_channels=4), 83_653_863, 8),
        (
            AutoencoderKL(multipliers=(1, 1, 2, 2, 4), attention=per_level(5, 4), z_channels=16),
            69_610_963,
            16,
        ),
        (
            AutoencoderKL(
                multipliers=(1, 1, 2, 2, 4, 4), attention=per_level(6, 4, 5), z_channels=64
            ),
            103_880_131,
            32,
        ),
        (VQModel(multipliers=(1, 2, 4), num_codes=8192), 55_322_782, 4),
        (VQModel(multipliers=(1, 2, 4), num_codes=8192, mid_attention=False), 53_219_486, 4),
        (
            VQModel(
                multipliers=(1, 2, 2, 4),
                attention=per_level(4, 3),
                z_channels=4,
                num_codes=16384,
            ),
            67_717_295,
            8,
        ),
        (
            VQModel(
                multipliers=(1, 1, 2, 2, 4),
                attention=per_level(5, 4),
                z_channels=8,
                num_codes=16384,
            ),
            69_593_371,
            16,
        ),
    ],
    ids=["kl_f4", "kl_f8", "kl_f16", "kl_f32", "vq_f4", "vq_f4_noattn", "vq_f8", "vq_f16"],
)
def test_published_sizes(module, count, factor):
    x = jnp.zeros((1, 32, 32, 3))
    params = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    assert sum(p.size for p in jax.tree.leaves(params)) == count
    assert module.downsampling == factor


@pytest.mark.parametrize("cls", [AutoencoderKL, VQModel])
@pytest.mark.parametrize("space", [(8,), (8, 12), (4, 8, 4)], ids=["audio", "image", "volume"])
def test_sizes_at_any_rank(cls, space):
    module = cls(**SMALL, patch=2, attention=(False, True), z_channels=5, embed_channels=6)
    x = jnp.zeros((2, *space, 3))
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    z = jax.eval_shape(lambda v: module.apply(v, x, method="encode").mean, variables)
    assert z.shape == (2, *(n // module.downsampling for n in space), module.latent_channels)
    y = jax.eval_shape(lambda v, z: module.apply(v, z, method="decode"), variables, z)
    assert y.shape == x.shape


def test_a_patch_stem_is_ldms_network_on_folded_pixels():
    patched = AutoencoderKL(**SMALL, patch=2)
    plain = AutoencoderKL(**SMALL, image_channels=3 * 2 * 2)
    x, z = image(8, 12), image(2, 3)
    variables = init(patched, x)

    def run(module, x):
        mean = module.apply(variables, x, method="encode").mean
        return mean, module.apply(variables, z, method="decode")

    (mean, y), (folded_mean, folded_y) = jax.jit(
        lambda: (run(patched, x), run(plain, patches(x, (2, 2))))
    )()
    np.testing.assert_allclose(mean, folded_mean, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(y, unpatch(folded_y, (2, 2)), rtol=1e-5, atol=1e-5)
    assert y.shape == x.shape


def test_a_patch_is_folded_in_row_major_order():
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(patches(x, (2, 2))[0, 0, 1], [2, 3, 6, 7])


@pytest.mark.parametrize("space", [(2, 4), (6, 8), (4, 10)])
def test_a_size_that_f_does_not_divide_is_refused(space):
    module = AutoencoderKL(**SMALL, patch=2)
    message = rf"image size \({space[0]}, {space[1]}\).*f=4.*(resize|crop|pad)"
    with pytest.raises(ValueError, match=message):
        module.init(jax.random.key(0), jnp.zeros((1, *space, 3)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention": (True,)}, r"attention=\(True,\) has 1 entries"),
        ({"use_quant_conv": False, "embed_channels": 5}, "embed_channels=5"),
        ({"image_channels": 1}, "image_channels=1"),
    ],
)
def test_contradicting_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderKL(**SMALL, **fields).init(jax.random.key(0), jnp.zeros((1, 4, 4, 3)))


def test_latents_of_another_first_stage_are_refused():
    module = AutoencoderKL(**SMALL, z_channels=3)
    with pytest.raises(ValueError, match=r"latents have 4 channels.*latent_channels=3"):
        module.init(jax.random.key(0), jnp.zeros((1, 4, 4, 4)), method="decode")


@pytest.mark.parametrize("cls", [AutoencoderKL, VQModel])
def test_the_last_layer_is_where_it_is_said_to_be(cls):
    """Its bias's gradient of sum(x_hat) counts the pixels, which only the last layer's does."""
    module, x = cls(**SMALL), image(4, 4)
    params = init(module, x)["params"]
    assert cls.last_layer in flatten_dict(params)
    path = (*cls.last_layer[:-1], "bias")
    grad = jax.jit(jax.grad(lambda p: module.apply({"params": p}, x).sum()))(params)
    np.testing.assert_allclose(flatten_dict(grad)[path], np.full(3, 2 * 4 * 4), rtol=1e-5)


@jax.debug_key_reuse(False)  # the same draw twice is what is tested
def test_call_is_reconstruct_and_decode_of_the_sample():
    module, x, keys = AutoencoderKL(**SMALL), image(4, 4), random_keys(2)

    @jax.jit
    def run(variables):
        y, posterior = module.apply(variables, x, keys, method="reconstruct")
        sampled = module.apply(variables, posterior.sample(keys), method="decode")
        mean = module.apply(variables, posterior.mean, method="decode")
        called = module.apply(variables, x, keys), module.apply(variables, x)
        return y, sampled, mean, called

    y, sampled, mean, called = run(init(module, x))
    np.testing.assert_allclose(y, sampled, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(called[0], sampled, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(called[1], mean, rtol=1e-5, atol=1e-6)
    assert float(jnp.abs(mean - sampled).max()) > 1e-3


def test_vq_call_is_decode_of_encode():
    module, x, keys = VQModel(**VQ), image(4, 4), random_keys(2)

    @jax.jit
    def run(variables):
        code = module.apply(variables, x, method="encode")
        y, quantized = module.apply(variables, x, keys, method="reconstruct")
        return code, y, quantized, module.apply(variables, code.mean, method="decode")

    code, y, quantized, decoded = run(init(module, x))
    assert isinstance(code, Code)
    assert quantized.loss.shape == (2,)
    np.testing.assert_allclose(y, decoded, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(code.sample(keys), code.mean)
    assert float(code.std.max()) == 0


def test_vq_gradient_reaches_the_encoder_through_the_codes():
    module, x = VQModel(**VQ), image(4, 4)
    params = init(module, x)["params"]
    grad = jax.jit(jax.grad(lambda p: jnp.square(module.apply({"params": p}, x) - x).mean()))(
        params
    )
    assert float(jnp.abs(grad["encoder"]["conv_in"]["kernel"]).max()) > 0
    # Reconstruction alone says nothing to the codebook (van den Oord et al., section 3.2).
    np.testing.assert_array_equal(grad["codebook"]["embedding"], 0)


def test_bfloat16_keeps_parameters_and_results_float32():
    module, x = AutoencoderKL(**SMALL, dtype=jnp.bfloat16), image(4, 4)
    variables = init(module, x)
    y, posterior = jax.jit(lambda v, x: module.apply(v, x, method="reconstruct"))(variables, x)
    assert {a.dtype for a in jax.tree.leaves((variables, y, posterior))} == {jnp.dtype("float32")}
    exact = jax.jit(AutoencoderKL(**SMALL).apply)(variables, x)
    assert 0 < np.linalg.norm(y - exact) / np.linalg.norm(exact) < 0.05


def test_float64_runs_in_float64(x64):
    module, x = AutoencoderKL(**SMALL), image(4, 4, dtype=np.float64)
    variables = init(module, x)
    posterior = jax.eval_shape(lambda v: module.apply(v, x, method="encode"), variables)
    assert posterior.mean.dtype == posterior.logvar.dtype == jnp.float64
    y = jax.eval_shape(lambda v: module.apply(v, x, random_keys(2)), variables)
    assert y.dtype == jnp.float64


def test_remat_changes_nothing():
    x = image(4, 4)
    plain, remat = (AutoencoderKL(**SMALL, remat=r) for r in (False, True))
    params = init(plain, x)["params"]

    def grad(module):
        loss = lambda p: jnp.square(module.apply({"params": p}, x)).mean()  # noqa: E731
        return jax.jit(jax.grad(loss))(params)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        grad(remat),
        grad(plain),
    )


def test_kl_of_closed_form():
    """KL(N(m, s^2) || N(0, 1)) = (m^2 + s^2 - 1) / 2 - log s, here for two latents each."""
    mean, std = np.array([0.0, 3.0]), np.array([1.0, 0.5])
    posterior = Posterior(
        jnp.broadcast_to(mean[:, None, None], (2, 2, 1)),
        jnp.broadcast_to(2 * np.log(std)[:, None, None], (2, 2, 1)),
    )
    expected = 2 * ((mean**2 + std**2 - 1) / 2 - np.log(std))
    np.testing.assert_allclose(posterior.kl(), expected, rtol=1e-6)


@jax.debug_key_reuse(False)  # the same draw twice is what is tested
def test_samples_have_the_posteriors_moments_and_depend_on_their_own_key_alone():
    shape = (4, 50, 50, 2)
    posterior = Posterior(jnp.full(shape, 2.0), jnp.full(shape, 2 * np.log(0.5)))
    keys = random_keys(4)
    z = posterior.sample(keys)
    np.testing.assert_allclose(z.mean((1, 2, 3)), np.full(4, 2.0), atol=0.03)
    np.testing.assert_allclose(z.std((1, 2, 3)), np.full(4, 0.5), atol=0.03)
    part = jax.tree.map(lambda a: a[2:3], posterior).sample(keys[2:3])
    np.testing.assert_array_equal(part, z[2:3])
    assert float(jnp.abs(z[0] - z[1]).max()) > 0.1


def test_logvar_is_clamped():
    module, x = AutoencoderKL(**SMALL), image(4, 4)
    params = init(module, x)["params"]
    for value, expected in ((1e4, 20.0), (-1e4, -30.0)):
        params["quant_conv"]["bias"] = jnp.full(6, value)
        posterior = module.apply({"params": params}, x, method="encode")
        np.testing.assert_array_equal(posterior.logvar, expected)
        assert float(jnp.abs(posterior.mean - value).max()) < 1e2


def test_quantize_takes_the_nearest_code():
    z, codebook = image(4, 5), codes(7)
    distance = ((np.asarray(z)[..., None, :] - np.asarray(codebook)) ** 2).sum(-1)
    result = quantize(z, codebook, commitment=1.0, codebook_weight=0.25)
    np.testing.assert_array_equal(result.indices, distance.argmin(-1))
    np.testing.assert_allclose(result.codes, codebook[distance.argmin(-1)], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(result.loss, 1.25 / 3 * distance.min(-1).mean((1, 2)), rtol=1e-5)


def test_quantize_passes_gradients_straight_through():
    z, codebook = image(4, 5), codes(7)
    weight = image(4, 5)[::-1]
    grad = jax.grad(lambda z: (quantize(z, codebook).codes * weight).sum())(z)
    np.testing.assert_array_equal(grad, weight)


def test_usage_and_perplexity():
    counts = code_counts(jnp.array([[0, 1], [1, 3]]), 8)
    np.testing.assert_array_equal(counts, [1, 2, 0, 1, 0, 0, 0, 0])
    assert float(code_usage(counts)) == 3 / 8
    np.testing.assert_allclose(perplexity(counts), np.exp(1.5 * np.log(2)), rtol=1e-6)
    np.testing.assert_allclose(perplexity(jnp.full(8, 3.0)), 8, rtol=1e-6)
