"""The digit classifier that judges the default job's samples; never sees a test digit.

    python -m experiments.train --config=configs/digits_classifier.py --workdir=DIR

Trained on the training digits in all colours, held-out pairs too: it judges shapes. Its accuracy on
the composed test digits is `eval_accuracy` in metrics.jsonl; see experiments/results/digits/.
"""

from configs import common, common_digits


def get_config(arg=None):
    _, smoke = common.parse(arg)
    config = common_digits.digits_data(common.base("classifier"))
    config.data.compose_held_out = True
    config.model.classifier = {"widths": (32, 64, 96), "feature_dim": 64, "dropout": 0.3}
    config.train.steps = 1500
    config.train.batch_size = 64
    config.train.log_every_steps = 100
    config.train.save_every_steps = 1500
    config.optim.name = "adamw"
    config.optim.learning_rate = 3e-3
    config.optim.warmup_steps = 50
    config.optim.decay = "cosine"
    config.optim.decay_steps = 1500
    config.optim.weight_decay = 1e-2
    config.evaluation.every_steps = 1500
    return common.smoke(config) if smoke else config
