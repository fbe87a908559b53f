"""OpenAI's U-Nets (improved-diffusion, guided-diffusion) to what a workdir is made of."""

import pathlib

from ml_collections import ConfigDict

from configs import adm_classifier
from diffusion.interop import openai, single_file
from diffusion.interop.files import Weights
from diffusion.interop.scheduler import Scheduler
from experiments.convert.reading import Parts, finish, pipeline_config
from experiments.run import build, tasks


def from_openai(source: pathlib.Path, config: ConfigDict | None, order: str | None) -> Parts:
    """Reads one file. ValueError naming it for what is missing or does not fit.

    `config`: of a file that was not published. `order`: of q, k and v, where it is not what the
    published file has, or legacy.
    """
    held = single_file.read_file(source)
    if openai.is_classifier(held):
        return _classifier(held, source, config)
    module = openai.infer_unet(held, source)
    if config is not None:
        config = ConfigDict(config.to_dict())
        network = build.denoiser_network(config)
        params = openai.read_unet(held, network, order or "legacy")
        if params["conv_in"]["kernel"].shape[-2] == 6:  # OpenAI's upsamplers enlarge no other way
            config.conditioning.update(degradation="area", enlarge="linear")
        return Parts(finish(config, params, source), {"denoiser": params})
    known = openai.published(module)
    if known is None:
        raise ValueError(
            f"{source} has an architecture of no file that OpenAI published: give its config, "
            "--config=configs/X.py, for its heads, schedule and size"
        )
    order = order or known.order
    print(
        f"note: {source.name} is read as {known.name}: heads={known.heads}, "
        f"head_dim={known.head_dim}, {known.schedule['name']} of {known.schedule['num_steps']} "
        f"steps, {order} order of q, k, v; give --config for another of this architecture",
        flush=True,
    )
    network = openai.with_heads(module, known.heads, known.head_dim)
    params = openai.read_unet(held, network, order)
    channels = 3 if known.small else params["conv_in"]["kernel"].shape[-2]
    learned = module.out_channels == 2 * channels
    described = Scheduler(
        dict(known.schedule),
        "eps",
        "ddpm",
        {"spacing": "linspace"},
        clip=True,
        variance="learned" if learned else "fixed_large",
    )
    config = pipeline_config(network, None, described)
    config.data.update({"image_size": known.size, "channels": channels})
    config.conditioning.null_label = False  # every class is one of the data's
    if known.small:
        config.conditioning.update(downscale=known.size // known.small)
        config.conditioning.update(degradation="area", enlarge="linear")
    config.sample.steps = 250
    return Parts(finish(config, params, source), {"denoiser": params})


def _classifier(held: Weights, source: pathlib.Path, config: ConfigDict | None) -> Parts:
    """A classifier of noised pictures, for `sample --guidance_classifier`."""
    if config is None:
        config = adm_classifier.get_config(str(openai.classifier_size(held, source)))
    config = ConfigDict(config.to_dict())
    network, side = tasks.task(config).network, config.data.image_size
    return Parts(config, {"classifier": openai.read_classifier(held, network, side)})
