"""A classifier of Fashion-MNIST, whose features compare samples with data (not "FID").

    python -m experiments.train --config=configs/fashion_classifier.py --workdir=DIR

Needs what `configs/ddpm_fashion_mnist.py` prepares. `eval_accuracy` in metrics.jsonl: test data.
"""

from configs import common


def get_config(arg=None):
    _, smoke = common.parse(arg)
    config = common.base("classifier")
    config.data.update(name="fashion_mnist", dir="runs/data", channels=1, fit="pad")
    config.model.classifier = {
        "kind": "digits",
        "widths": (32, 64, 96),
        "feature_dim": 64,
        "dropout": 0.3,
        "window": 0,
    }
    config.train.update(steps=3000, batch_size=64, log_every_steps=100, save_every_steps=1500)
    config.optim.update(name="adamw", learning_rate=2e-3, warmup_steps=50)
    config.optim.update(decay="cosine", decay_steps=3000, weight_decay=1e-2)
    config.evaluation.every_steps = 1500
    return common.smoke(config) if smoke else config
