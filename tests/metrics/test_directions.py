"""Which way numbers are better, by the names that training and evaluation give them."""

import pytest

from diffusion.metrics.directions import higher_is_better

HIGHER = ("psnr", "eval_psnr", "ssim", "eval_accuracy", "eval_adherence_all_raw", "precision")
HIGHER += ("adherence_held_out_all", "clip_score", "inception_score", "classifier_score")
LOWER = ("loss", "eval_loss", "fid", "frechet_distance", "eval_frechet_distance_ema", "kid")
LOWER += ("bits_per_dim", "lpips", "spatial_frechet_distance", "")


@pytest.mark.parametrize("name", (*HIGHER, *LOWER))
def test_the_better_way_is_known(name):
    assert higher_is_better(name) == (name in HIGHER)
