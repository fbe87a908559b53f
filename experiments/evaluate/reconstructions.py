"""What is said of a first stage: reconstructions against their images, and the latents.

psnr, ssim               means over images, of uint8 reconstructions (diffusion/metrics)
sharpness                energy of high frequencies over that of the images; 1 is as sharp
lpips                    where the run's config names the weights, and they are there
frechet_distance         of reconstructions and images on a feature network: a classifier's here,
                         named so; "rFID" is this on Inception's, which any function may stand in
latent_mean, latent_std  of each channel, of the posterior's mean
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion.data import loader
from diffusion.interop.perceptual import load_lpips
from diffusion.metrics import frechet, reconstruction
from diffusion.metrics.intervals import beside, mean_interval
from diffusion.models.perceptual import LPIPS
from diffusion.training import codec
from experiments.run import data, networks

Features = Callable[[np.ndarray], np.ndarray]  # uint8 images to (batch, dim)


def test_images(stage: networks.Stage, num: int) -> Iterator[np.ndarray]:
    """Batches of the first `num` images of the evaluation split, uint8."""
    source, steps = data.open_images(stage.config, stage.config.data.eval_split)
    size = stage.config.evaluation.batch_size
    for batch in loader.one_pass(source, size, steps, stop=min(num, len(source))):
        yield batch["image"][batch["valid"]]


@functools.lru_cache(maxsize=1)
def _compiled(network: Any) -> Callable[..., Any]:
    @jax.jit
    def run(params, image):
        x = codec.signed(image)
        z = network.apply({"params": params}, x, method="encode").mean
        return codec.to_uint8(network.apply({"params": params}, z, method="decode")), z

    return run


def reconstructor(stage: networks.Stage) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """A compiled function from uint8 images to (uint8 reconstructions, latent means)."""

    def reconstruct(image):
        made, z = _compiled(stage.network)(stage.params, image)
        return np.asarray(made), np.asarray(z)

    return reconstruct


def measure(
    stage: networks.Stage, batches: Iterable[np.ndarray], features: Features | None = None
) -> dict[str, Any]:
    """Everything above, over batches of uint8 images."""
    reconstruct, distance = reconstructor(stage), perceptual(stage.config)
    columns: dict[str, list[np.ndarray]] = {}
    latents, seen = [], ([], [])
    for image in batches:
        made, z = reconstruct(image)
        found = reconstruction.per_example(
            jnp.asarray(image), jnp.asarray(made), reconstruction.UINT8
        )
        if distance is not None:
            found["lpips"] = distance(image, made)
        for name, values in found.items():
            columns.setdefault(name, []).append(np.asarray(values))
        latents.append(z.reshape(-1, z.shape[-1]))
        if features is not None:
            seen[0].append(features(image))
            seen[1].append(features(made))
    return _summary(columns, latents, seen)


def _summary(columns: dict, latents: list, seen: tuple[list, list]) -> dict[str, Any]:
    means = {name: mean_interval(np.concatenate(values)) for name, values in columns.items()}
    of_images, energy = (means.pop(f"high_frequency{of}").value for of in ("_of_images", ""))
    results: dict[str, Any] = beside(means)
    results |= {"sharpness": energy / of_images} if of_images else {}
    z = np.concatenate(latents).astype(np.float64)
    results |= {"latent_mean": z.mean(0).tolist(), "latent_std": z.std(0).tolist()}
    results["count"] = sum(len(values) for values in columns["psnr"])
    if seen[0]:
        images, made = (frechet.feature_statistics(np.concatenate(part)) for part in seen)
        warning = frechet.sample_count_warning(images.count, images.mean.size)
        if warning:
            print(f"note: {warning}", flush=True)
        results["frechet_distance"] = frechet.frechet_distance(made, images)
    return results


def perceptual(config: ConfigDict) -> Callable[[np.ndarray, np.ndarray], np.ndarray] | None:
    """LPIPS of two batches of uint8 images; None where the config names no weights."""
    if "perceptual" not in config or not (config.perceptual.vgg and config.perceptual.heads):
        return None
    return _lpips(**config.perceptual)


@functools.lru_cache(maxsize=1)
def _lpips(**files: str) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    params, _ = load_lpips(**files)

    @jax.jit
    def run(params, x, y):
        x, y = (codec.signed(a) for a in (x, y))
        return LPIPS().apply({"params": params}, x, y)

    return lambda x, y: np.asarray(run(params, x, y))
