"""Diffusers' side of a benchmark, with PyTorch: the same work on the same weights.

    python -m experiments.benchmark.peer gate|measure DIR < work.json

What is given to PyTorch: channels-last memory and `torch.compile` where asked, AdamW over all
parameters at once (fused on a GPU), the average as one `_foreach_lerp_`, bfloat16 by autocast.
"""

import json
import pathlib
import sys
from typing import Any

import diffusers
import numpy as np
import torch
from safetensors.torch import load_file

from experiments.benchmark.workload import GRADIENTS, INPUTS, WEIGHTS, resident_bytes, timed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def load(work: dict[str, Any], directory: pathlib.Path) -> torch.nn.Module:
    config = json.loads((directory / WEIGHTS / "config.json").read_text())
    network = getattr(diffusers, config["_class_name"]).from_pretrained(directory / WEIGHTS)
    return network.to(DEVICE).eval()


def arrays(directory: pathlib.Path) -> dict[str, torch.Tensor]:
    """The inputs, channels first."""
    found = {k: torch.from_numpy(v).to(DEVICE) for k, v in np.load(directory / INPUTS).items()}
    return {k: v.movedim(-1, 1).contiguous() if v.ndim > 3 else v for k, v in found.items()}


def predict(network: Any, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor | None) -> Any:
    given = () if context is None else (context,)
    return network(x, t, *given).sample


# -- the gate: no ratio without it ----------------------------------------------------------------


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def gate(work: dict[str, Any], directory: pathlib.Path) -> dict[str, Any]:
    """Relative errors of output, gradient and samples against what `ours.prepare` wrote."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    network, given = load(work, directory), arrays(directory)
    x = given["x"][:2]
    if work["suite"] == "autoencoder":
        out = network.decode(network.encode(x).latent_dist.mean).sample
        target = x
    else:
        context = given["context"][:2] if "context" in given else None
        out = predict(network, x, given["t"][:2], context)
        target = given["target"][:2]
    torch.nn.functional.mse_loss(out[:, : target.shape[1]], target).backward()
    (name,) = (directory / GRADIENTS).glob("*.safetensors")
    wanted = load_file(name)
    pairs = [
        (wanted[k].to(DEVICE).ravel(), p.grad.ravel())
        for k, p in network.named_parameters()
        if p.grad is not None
    ]
    ours, theirs = (torch.cat(side) for side in zip(*pairs))
    found = {
        "parameters": sum(p.numel() for p in network.parameters()),
        "output": relative(given["output"], out.detach()),
        "gradient": relative(ours, theirs),
    }
    if "sampled" in given:
        found["sampled"] = relative(given["sampled"], sample(work, directory, network, given, 2)())
    return found


# -- what is timed --------------------------------------------------------------------------------


def sample(work, directory, network, given, count) -> Any:
    """DDIM as a Diffusers pipeline runs it, both halves of guidance in one call."""
    scheduler = diffusers.DDIMScheduler.from_pretrained(directory / "scheduler")
    scheduler.set_timesteps(work["sample_steps"])
    scale = work["guidance_scale"]
    context = given.get("context")
    guided = context is not None and scale != 1
    if guided:
        context = torch.cat([context[:count], torch.zeros_like(context[:count])])

    @torch.no_grad()
    def run():
        x = given["x"][:count]
        for t in scheduler.timesteps:
            double = torch.cat([x, x]) if guided else x
            with autocast(work):
                out = predict(network, double, t.to(DEVICE), context).float()
            if guided:
                cond, uncond = out.chunk(2)
                out = uncond + scale * (cond - uncond)
            x = scheduler.step(out, t, x).prev_sample
        return x

    return run


def autocast(work: dict[str, Any]) -> Any:
    return torch.autocast(DEVICE, torch.bfloat16, enabled=work["dtype"] == "bfloat16")


def training(work: dict[str, Any], network: Any, given: dict[str, Any]) -> Any:
    """One step: noise, forward, backward, clipping, AdamW, average."""
    optim = work["optim"]
    parameters = [p for p in network.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(
        parameters,
        lr=optim["learning_rate"],
        betas=(optim["b1"], optim["b2"]),
        eps=optim["eps"],
        weight_decay=optim["weight_decay"],
        fused=DEVICE == "cuda" or None,
    )
    average = [p.detach().clone() for p in parameters]
    loss = reconstruction_loss if work["suite"] == "autoencoder" else noise_loss(work)

    def run():
        adam.zero_grad(set_to_none=True)
        with autocast(work):
            value = loss(work, network, given)
        value.backward()
        if optim["clip_norm"]:
            torch.nn.utils.clip_grad_norm_(parameters, optim["clip_norm"])
        adam.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - work["ema_decay"])

    return run


def noise_loss(work: dict[str, Any]) -> Any:
    scheduler = diffusers.DDPMScheduler()
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(DEVICE)

    def loss(work, network, given):
        x0 = given["x"]
        t = torch.randint(0, 1000, x0.shape[:1], device=DEVICE)
        noise = torch.randn_like(x0)
        out = predict(network, scheduler.add_noise(x0, noise, t), t, given.get("context"))
        return torch.nn.functional.mse_loss(out[:, : x0.shape[1]].float(), noise)

    return loss


def reconstruction_loss(work, network, given):
    posterior = network.encode(given["x"]).latent_dist
    error = network.decode(posterior.sample()).sample.float() - given["x"]
    error = error.square() if work["reconstruction"] == "l2" else error.abs()
    per_example = error.flatten(1)
    reduced = per_example.sum(1) if work["reduction"] == "sum" else per_example.mean(1)
    return (reduced + work["kl_weight"] * posterior.kl()).mean()


def measure(work: dict[str, Any], directory: pathlib.Path) -> dict[str, Any]:
    torch.set_float32_matmul_precision("high" if DEVICE == "cuda" else "highest")
    before = resident_bytes()
    network, given = load(work, directory), arrays(directory)
    if work["peer_options"]["channels_last"]:
        network = network.to(memory_format=torch.channels_last)
        given = {
            k: v.contiguous(memory_format=torch.channels_last) if v.ndim == 4 else v
            for k, v in given.items()
        }
    if mode := work["peer_options"]["compile"]:
        network.forward = torch.compile(network.forward, mode=None if mode == "default" else mode)
        if work["suite"] == "autoencoder":
            network.encoder.forward = torch.compile(network.encoder.forward)
            network.decoder.forward = torch.compile(network.decoder.forward)
    if work["suite"] == "sample":
        call = sample(work, directory, network, given, work["batch"])
    else:
        call = training(work, network.train(), given)
    cuda = DEVICE == "cuda"
    found = timed(call, torch.cuda.synchronize if cuda else lambda: None, work)
    used = torch.cuda.max_memory_allocated() if cuda else resident_bytes() - before
    return found | {
        "peak_bytes": used,
        "resident_bytes": resident_bytes(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
    }


if __name__ == "__main__":
    do = {"gate": gate, "measure": measure}[sys.argv[1]]
    print(json.dumps(do(json.load(sys.stdin), pathlib.Path(sys.argv[2]))))
