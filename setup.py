"""What pyproject.toml cannot say: dependencies read from the requirements files."""

import pathlib
import re

from setuptools import setup


def read(name: str) -> list[str]:
    """The requirements of a file, without comments and without what it includes."""
    lines = (pathlib.Path(__file__).parent / name).read_text().splitlines()
    bare = (re.sub(r"(^|\s)#.*", "", line).strip() for line in lines)
    return [line for line in bare if line and not line.startswith("-")]


NEEDED = read("requirements.txt")
(JAX,) = [line for line in NEEDED if re.match(r"jax\W", line)]

setup(
    install_requires=NEEDED,
    extras_require={
        "test": read("requirements-test.txt") + read("requirements-tpu-target.txt"),
        "targets": read("requirements-tpu-target.txt"),
        "tpu": [JAX.replace("jax", "jax[tpu]", 1)],
        "cuda": [JAX.replace("jax", "jax[cuda13]", 1)],
    },
)
