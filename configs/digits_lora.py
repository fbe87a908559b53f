"""LoRA on the default job: teaches the trained digits model a colour that it never saw.

    python -m experiments.train --config=configs/digits_lora.py --workdir=DIR
    python -m experiments.evaluate --metrics=colour --workdir=DIR \
        --classifier=runs/quickstart/classifier

Needs the default job's run at `init_from` (`./launch/quickstart.sh`), which stays frozen: what is
trained is low-rank updates of the U-Net's attention and of the projections that its pooled caption
goes through (arXiv:2106.09685). Every other picture is of a digit in yellow, a colour outside the
palette; its word is unknown to the tokenizer and so becomes the rare word that the updates give a
meaning (as DreamBooth names its subject, arXiv:2208.12242). Numbers and pictures:
experiments/results/digits_lora/.
"""

from configs import common, common_digits, common_ldm


def get_config(arg=None):
    _, smoke = common.parse(arg)
    config = common_digits.digits_adapter()
    config.data.name = "recoloured_digits"
    config.data.colour = "yellow"  # of every other picture; the others are as they were
    common_ldm.lora(config, rank=8)
    # This U-Net attends in its middle alone; its pooled caption speaks through these.
    config.model.lora.targets = (*config.model.lora.targets, "pool_proj", "time_emb_proj")
    config.optim.learning_rate = 2e-3
    config.train.steps = 1000
    config.optim.decay_steps = 1000
    return common.smoke(config) if smoke else config
