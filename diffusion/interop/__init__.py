"""Weights in other projects' formats, in and out: Diffusers' and Transformers' directories."""

from diffusion.interop.autoencoder import load_autoencoder, save_autoencoder
from diffusion.interop.controlnet import load_controlnet, save_controlnet
from diffusion.interop.dinov2 import load_dinov2
from diffusion.interop.embeddings import load_embeddings, save_embeddings
from diffusion.interop.latte import load_latte, save_latte
from diffusion.interop.lora import load_lora, save_lora
from diffusion.interop.pixart import load_pixart, save_pixart
from diffusion.interop.t5 import load_t5, save_t5
from diffusion.interop.text_encoder import load_text_encoder, save_text_encoder
from diffusion.interop.text_pair import load_text_pair, save_text_pair
from diffusion.interop.text_transformer import load_sd3, save_sd3
from diffusion.interop.transformer import load_dit, load_transformer, save_transformer
from diffusion.interop.unet import load_unet, save_unet

__all__ = [
    "load_autoencoder",
    "load_controlnet",
    "load_dinov2",
    "load_dit",
    "load_embeddings",
    "load_latte",
    "load_lora",
    "load_pixart",
    "load_sd3",
    "load_t5",
    "load_text_encoder",
    "load_text_pair",
    "load_transformer",
    "load_unet",
    "save_autoencoder",
    "save_controlnet",
    "save_embeddings",
    "save_latte",
    "save_lora",
    "save_pixart",
    "save_sd3",
    "save_t5",
    "save_text_encoder",
    "save_text_pair",
    "save_transformer",
    "save_unet",
]
