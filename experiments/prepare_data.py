"""Prepares a config's data set: `python -m experiments.prepare_data --config=configs/X.py`.

Writes ArrayRecord under `config.data.dir`. `--source_dir=DIR` reads files that you already have:
the publisher's own
(CIFAR-10 python batches, MNIST-style idx.gz, LSUN lmdb) or a folder of images with captions in
`metadata.jsonl` or in a `.txt` beside each. A data set that is there and whole is left as it is.
"""

from absl import flags
from ml_collections import config_flags

from diffusion.data import prepare
from experiments import cli

CONFIG = config_flags.DEFINE_config_file("config", None, "The config whose data to prepare.")
SOURCE_DIR = flags.DEFINE_string("source_dir", None, "Files that you already have.")
MAX_BAD_IMAGES = flags.DEFINE_integer(
    "max_bad_images", 0, "Files of a folder that are no image to skip.", lower_bound=0
)


def main() -> None:
    cli.require("config")
    data = CONFIG.value.data
    directory = prepare.prepare(data.name, data.dir, SOURCE_DIR.value, MAX_BAD_IMAGES.value)
    print(f"{data.name} is ready in {directory}", flush=True)


if __name__ == "__main__":
    cli.run(main)
