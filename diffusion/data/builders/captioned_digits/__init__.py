"""Real handwritten digits, composed into captioned colour pictures: the data of the default job."""

from diffusion.data.builders.captioned_digits.captioned_digits import Builder

__all__ = ["Builder"]
