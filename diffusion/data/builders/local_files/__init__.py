"""Data sets from files that the user has: a publisher's own, or a folder of images."""

from diffusion.data.builders.local_files.local_files import builder
from diffusion.data.builders.local_files.readers import Files, read

__all__ = ["Files", "builder", "read"]
