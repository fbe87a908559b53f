"""Prepares a config's data set: `python -m experiments.prepare_data --config=configs/X.py`.

Writes ArrayRecord under `config.data.dir` (a latent config: the images its latents are made of).
`--source_dir=DIR` reads files that you already have: the publisher's own (CIFAR-10 python batches,
MNIST-style idx.gz, LSUN lmdb), or a folder of images with captions in `metadata.jsonl` or in a
`.txt` beside each. `--names=FILE` takes of a folder's images those that it names, one a line, below
the folder and with any suffix: LDM's FFHQ and CelebA-HQ are 60,000 and 25,000 of theirs, by lists
in CompVis/taming-transformers:data. A data set that is there and whole is left as it is. The one
command that may import TensorFlow, for data sets of the tensorflow-datasets catalogue.
"""

import sys

from absl import flags

from diffusion.data import prepare
from experiments.host import cli
from experiments.run import data


def define(add: cli.Flags) -> None:
    add.config()
    add.add("string", "source_dir", None, "Files that you already have.")
    add.add("string", "names", None, "Of a folder's images, those named in this file, one a line.")
    add.add("integer", "max_bad_images", 0, "Files of a folder that are no image to skip.")


def main(values: flags.FlagValues) -> None:
    section = data.images_config(cli.require(values, "config")).data
    name, row = section.name, data.known(section.name)
    if row.prepared_as is None:
        print(f"{name}: read or made while training, there is nothing to prepare", flush=True)
        return
    name = row.prepared_as or name
    if values.names and not values.source_dir:
        raise ValueError(f"--names={values.names} are of a folder: give its --source_dir as well")
    own = values.source_dir, values.max_bad_images, values.names
    made = prepare.prepare(name, section.dir, *own)
    print(f"{name} is ready in {made}", flush=True)


if __name__ == "__main__":
    sys.exit(cli.run(define, main))
