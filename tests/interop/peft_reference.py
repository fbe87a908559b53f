"""Run in a process of its own: LoRA by Diffusers' own loaders and savers, which need PEFT.

    python peft_reference.py PACKAGES DIR

PACKAGES holds peft and accelerate, apart from the environment: Diffusers takes other paths wherever
it finds them. DIR holds unet/, inputs.npz and ours/; written are theirs/ and alone/, files of
updates with an alpha of their own, and outputs.npz. With "files" after DIR, what Diffusers makes of
every file of updates in DIR/files is written, and a file of DoRA with what it is worth.
"""

import pathlib
import sys
import warnings

import numpy as np

ALPHA, RANK = 6, 3
FILE = "pytorch_lora_weights.safetensors"


def load(directory):
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(directory / "unet", low_cpu_mem_usage=False).eval()
    absent = ("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor")
    parts = {**dict.fromkeys(absent), "unet": unet, "scheduler": DDIMScheduler()}
    return StableDiffusionPipeline(**parts, requires_safety_checker=False)


def files(directory, run):
    import torch
    from peft import LoraConfig

    found = {}
    for path in sorted((directory / "files").glob("*.safetensors")):
        pipe = load(directory)
        pipe.load_lora_weights(path.parent, weight_name=path.name)
        found[path.stem] = run(pipe.unet)
    unet = load(directory).unet
    targets = ["to_q", "proj_in", "conv1", "linear_1", "downsamplers.0.conv"]
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, use_dora=True))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if ".lora_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    unet.save_lora_adapter(directory / "dora")
    return found | {"dora": run(unet)}


def main(packages, directory, only=""):
    sys.modules["torchvision"] = None  # it stands beside, for others; here it is not to be found
    sys.path.append(packages)
    warnings.simplefilter("ignore")
    import torch
    from diffusers.training_utils import _collate_lora_metadata
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.set_num_threads(1)
    given = {key: torch.from_numpy(a) for key, a in np.load(directory / "inputs.npz").items()}

    def run(unet):
        with torch.no_grad():
            return unet(**given).sample.numpy()

    if only:
        np.savez(directory / "outputs.npz", **files(directory, run))
        return
    found, pipe = {}, load(directory)
    pipe.load_lora_weights(directory / "ours")
    found["pipeline"] = run(pipe.unet)
    assert pipe.get_active_adapters() == ["default_0"]
    pipe.unload_lora_weights()
    found["plain"] = run(pipe.unet)
    pipe.unet.load_lora_adapter(directory / "ours", prefix="unet", weight_name=FILE)
    found["unet"] = run(pipe.unet)

    unet = load(directory).unet
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(
        LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, alpha_pattern={"to_k": 1.5})
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if ".lora_" in name:
                parameter.normal_(0, 0.3, generator=generator)
    found["theirs"] = run(unet)
    unet.save_lora_adapter(directory / "alone")
    type(load(directory)).save_lora_weights(
        directory / "theirs",
        unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(unet)),
        **_collate_lora_metadata({"unet": unet}),
    )
    np.savez(directory / "outputs.npz", **found)


if __name__ == "__main__":
    main(sys.argv[1], pathlib.Path(sys.argv[2]), *sys.argv[3:])
