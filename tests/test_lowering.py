"""Every config's train step as GPUs and TPUs are given it, on a machine that has neither."""

import importlib
import pathlib

import jax
import pytest

from diffusion.models import target
from experiments.plan import cost

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
NAMES = sorted(
    path.stem
    for path in CONFIGS.glob("*.py")
    if path.stem != "__init__" and not path.stem.startswith("common")
)


# One of each kind of network and task, with adapters; the others are in the slow suite.
OFTEN = ("ddpm_cifar10", "digits_autoencoder", "digits_controlnet", "dit_imagenet256", "digits_ldm")
SMOKES = [pytest.param(n, marks=[] if n in OFTEN else [pytest.mark.slow]) for n in NAMES]


def lowered(name, argument, aim, *platforms):
    """The step's text for each platform, traced once for a target, in bfloat16."""
    config = importlib.import_module(f"configs.{name}").get_config(argument).unlock()
    if "dtype" in config.model:
        config.model.dtype = "bfloat16"
    task, state, frozen = cost.shapes(config.lock())
    batch = cost.abstract_batch(config, task, config.train.batch_size)
    with target.handed(aim):
        traced = jax.jit(task.train_step, donate_argnums=0).trace(
            state, batch, frozen | cost.judges(task)
        )
    texts = [traced.lower(lowering_platforms=(p,)).as_text() for p in platforms]
    return texts, len(jax.tree.leaves(state))


@pytest.mark.parametrize("name", SMOKES)
def test_every_smoke_step_is_lowered_for_gpus_and_tpus(name):
    texts, leaves = lowered(name, "smoke", target.Target("gpu"), "cuda", "tpu")
    for text in texts:
        # The state is given away, whole, and nothing is asked of the host.
        assert text.count("tf.aliasing_output") + text.count("jax.buffer_donor") >= leaves
        assert "callback" not in text


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_step_is_lowered_at_full_size(name):
    for aim, platform in ((target.Target("gpu"), "cuda"), (target.Target("tpu"), "tpu")):
        texts, _ = lowered(name, None, aim, platform)
        assert "bf16" in texts[0]
