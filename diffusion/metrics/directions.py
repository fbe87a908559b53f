"""Which way a number is better: what ranks runs, keeps the best checkpoint and describes metrics.

By how a name begins, after the "eval_" of a training run: "eval_adherence_all_raw" is an adherence.
"""

HIGHER = (
    "accuracy",
    "adherence",
    "classifier_score",
    "clip_score",
    "coverage",
    "density",
    "examples_per_sec",
    "inception_score",
    "precision",
    "psnr",
    "recall",
    "ssim",
)
NEITHER = ("high_frequency", "latent", "sharpness")  # best near those of the data


def higher_is_better(name: str) -> bool:
    """False where lower is, as of losses and distances, and of any number unknown here."""
    return name.removeprefix("eval_").startswith(HIGHER)


def has_best(name: str) -> bool:
    """False where neither the highest nor the lowest is the best."""
    return not name.removeprefix("eval_").startswith(NEITHER)
