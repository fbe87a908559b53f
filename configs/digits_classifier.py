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
    config.model.classifier = {
        "kind": "digits",
        "widths": (32, 64, 96),
        "feature_dim": 64,
        "dropout": 0.3,
    }
    config.train.update(steps=1500, batch_size=64, log_every_steps=100, save_every_steps=1500)
    config.optim.update(name="adamw", learning_rate=3e-3, warmup_steps=50)
    config.optim.update(decay="cosine", decay_steps=1500, weight_decay=1e-2)
    config.evaluation.every_steps = 1500
    return common.smoke(config) if smoke else config
