"""CLIP's two towers and its score against Transformers, live, every parameter drawn at random."""

import json

import jax
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from diffusion.interop.clip import load_clip, load_image_encoder
from diffusion.metrics.clip_score import clip_score
from diffusion.models.clip import pool_text, preprocess

TOLERANCE = 1e-5
VISION = {
    "hidden_size": 16,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 8,
    "projection_dim": 12,
    "hidden_act": "quick_gelu",
}
TEXT = {
    "vocab_size": 41,
    "hidden_size": 8,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 7,
    "projection_dim": 12,
    "bos_token_id": 38,
    "hidden_act": "quick_gelu",
}
# In the first row the end token, 39, is not the largest.
TOKENS = np.array([[38, 5, 9, 39, 40, 40], [38, 7, 39, 0, 0, 0], [38, 1, 2, 3, 4, 39]], np.int32)


def redrawn(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.eval()


def pictures(height=31, width=45, channels=3):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (3, height, width, channels)).astype(np.uint8)


def error(ours, theirs):
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def vectors(clip, images, tokens):
    with jax.default_matmul_precision("highest"):
        image = jax.jit(lambda p, x: clip.image.apply({"params": p}, x))(
            clip.params["image"], preprocess(images, clip.image.image_size, clip.mean, clip.std)
        )
        hidden = jax.jit(lambda p, t: clip.text.apply({"params": p}, t))(
            clip.params["text"], tokens
        )
        text = pool_text(hidden, tokens, clip.params["text_projection"], clip.end)
    return np.asarray(image), np.asarray(text)


@pytest.mark.parametrize("end", [39, 2])
def test_both_towers_and_the_score_match(tmp_path, end):
    config = CLIPConfig(
        text_config=CLIPTextConfig(**TEXT, eos_token_id=end).to_dict(),
        vision_config=CLIPVisionConfig(**VISION).to_dict(),
        projection_dim=12,
    )
    model = redrawn(CLIPModel(config))
    model.save_pretrained(tmp_path)
    clip = load_clip(tmp_path)
    assert clip.end == (39 if end == 39 else None)
    images = pictures(24, 24)
    image, text = vectors(clip, images, TOKENS)
    with torch.no_grad():
        x = torch.from_numpy(preprocess(images, 24)).permute(0, 3, 1, 2)
        theirs = model(input_ids=torch.from_numpy(TOKENS).long(), pixel_values=x)
    ours = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (image, text)]
    assert error(ours[0], theirs.image_embeds.numpy()) < TOLERANCE
    assert error(ours[1], theirs.text_embeds.numpy()) < TOLERANCE
    # With the opposite vectors as well: half of them are more than a right angle apart.
    cosine = (theirs.image_embeds * theirs.text_embeds).sum(-1).numpy()
    cosine = np.concatenate([cosine, -cosine])
    assert cosine.min() < -0.1 and cosine.max() > 0.1
    found = clip_score(np.tile(image, (2, 1)), np.concatenate([text, -text]))
    assert found.value == pytest.approx(100 * np.maximum(cosine, 0).mean(), rel=1e-5)


def test_the_image_tower_alone(tmp_path):
    model = redrawn(
        CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION | {"hidden_act": "gelu"}))
    )
    model.save_pretrained(tmp_path)
    module, params = load_image_encoder(tmp_path)
    x = preprocess(pictures(), 24)
    with jax.default_matmul_precision("highest"):
        ours = jax.jit(lambda p, x: module.apply({"params": p}, x))(params, x)
    with torch.no_grad():
        theirs = model(torch.from_numpy(x).permute(0, 3, 1, 2)).image_embeds.numpy()
    assert error(ours, theirs) < TOLERANCE
    assert error(theirs[0], theirs[1]) > 100 * TOLERANCE
    with pytest.raises(ValueError, match="this CLIP sees 24 a side"):
        jax.eval_shape(module.init, jax.random.key(0), x[:, :16])


@pytest.mark.parametrize("shape", [(31, 45), (60, 24), (24, 24), (10, 16)])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_prepared_as_openai_does(shape, channels):
    images = pictures(*shape, channels)
    wanted = []
    for pixels in images:
        image = Image.fromarray(pixels.squeeze()).convert("RGB")
        # openai/CLIP: clip.py, _transform: Resize(n, BICUBIC), CenterCrop, ToTensor, Normalize.
        short, long = min(image.size), max(image.size)
        size = tuple(24 if side == short else int(24 * long / short) for side in image.size)
        image = image.resize(size, Image.Resampling.BICUBIC)
        top, left = ((side - 24) // 2 for side in image.size[::-1])
        wanted.append(np.asarray(image)[top : top + 24, left : left + 24] / 255)
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    np.testing.assert_allclose(preprocess(images, 24), (np.stack(wanted) - mean) / std, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["BertModel"]}, "BertModel"),
        ({"patch_size": 4}, "patch_embedding"),
        ({"num_channels": 1}, "num_channels=1"),
    ],
)
def test_another_architecture_is_refused(tmp_path, change, message):
    redrawn(CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION))).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        load_image_encoder(tmp_path)


def test_vectors_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="NaN among the images"):
        clip_score(np.full((2, 3), np.nan), np.ones((2, 3)))
