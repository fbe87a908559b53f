"""A run is its workdir: what may change when a run goes on, and how a run is opened again.

DIR/config.json     the resolved config
DIR/metrics.jsonl   one object a logged step
DIR/checkpoints/    see diffusion/checkpoint.py
DIR/first_stage/    the frozen autoencoder of a latent run, copied from its latents
DIR/text_encoder/, DIR/denoiser/, DIR/teacher/   networks that the run keeps frozen
DIR/tokenizer.json  of a run that reads captions
DIR/features.json   of what a run is aligned to, its hash
DIR/previews/       pictures of the run in progress, NAME-STEP.png (`evaluate/in_loop.py`)
DIR/profile/        a trace of `train.profile_steps` (`host/profile.py`)
DIR/devices.json    what it ran on, last
DIR/README.md       the model card
"""

import fnmatch
import json
import pathlib

from ml_collections import ConfigDict

from configs import common
from diffusion import files
from diffusion.redact import redact

# A resumed run may differ from the one it resumes in these and nothing else.
MAY_CHANGE = (
    "train.steps",
    "train.log_every_steps",
    "train.save_every_steps",
    "train.keep_",
    "train.tensorboard",
    "train.profile_steps",
    "data.dir",
    "parallel.",
    "wandb.",
    "watchdog.",
    "evaluation.",
    "perceptual.",
    "sample.",
)


def to_json(config: ConfigDict) -> str:
    return json.dumps(redact(config.to_dict()), indent=2, sort_keys=True) + "\n"


def check(workdir: pathlib.Path, config: ConfigDict) -> bool:
    """Whether `workdir` holds a run of this config already; changes nothing.

    Raises ValueError naming the first key in which it holds another config's run, and for a
    folder of something else.
    """
    path = workdir / "config.json"
    if not path.exists():
        if workdir.exists() and not workdir.is_dir():
            raise ValueError(f"--workdir={workdir} is a file: name a folder")
        found = sorted(p.name for p in workdir.iterdir()) if workdir.exists() else []
        strangers = [name for name in found if not fnmatch.fnmatch(name, files.PARTIAL)]
        if strangers:
            raise ValueError(
                f"--workdir={workdir} holds {strangers[0]!r} but no config.json, so it is "
                "not a run: name an empty or new folder"
            )
        return False
    old, new = read_config(workdir).to_dict(), json.loads(to_json(config))
    differ = [d for d in files.differences(old, new) if not f"{d[0]}.".startswith(MAY_CHANGE)]
    if differ:
        key, was, _ = differ[0]
        alone = len(differ) == 1 and was is not files.ABSENT
        remedy = "use another --workdir" + (f", or --config.{key}={was}" if alone else "")
        raise ValueError(files.mismatch(f"--workdir={workdir}", differ, remedy))
    return True


def claim(workdir: pathlib.Path, config: ConfigDict, card: str) -> None:
    """Writes config.json and the model card; the run is this config's from here on."""
    # First: killed after it, the folder is a run; killed before it, it is empty.
    files.write(workdir / "config.json", to_json(config))
    for folder in (workdir, workdir / "previews"):
        files.clear(folder)
    files.write(workdir / "README.md", card)


def read_config(workdir: pathlib.Path, flag: str = "--workdir") -> ConfigDict:
    """The resolved config of a run. Raises ValueError for a folder that holds none."""
    path = workdir / "config.json"
    if not path.is_file():
        held = sorted(workdir.glob("*/config.json"))
        runs = [p.parent.name for p in held if '"task"' in p.read_text(errors="replace")]
        remedy = f"name one of those in it ({', '.join(runs)})" if runs else "train one first"
        raise ValueError(f"{flag}={workdir} holds no run (no config.json): {remedy}")
    found = files.read_json(path, "restore it from a copy")
    if "task" not in found:
        raise ValueError(f"{flag}={workdir} holds no run (no task in its config.json): name one")
    known = json.loads(to_json(_known(found)))
    return ConfigDict(_renamed(_completed(found, known))).lock()


def _known(found: dict) -> ConfigDict:
    """The keys that today's configs of such a run share; gives its model those it lacks."""
    task, model = found.get("task"), found.get("model")
    parts = model if isinstance(model, dict) else {}
    if isinstance(lora := parts.get("lora"), dict):
        parts["lora"] = {"initialisation": "uniform", **lora}
    if task == "classifier" and isinstance(judge := parts.get("classifier"), dict):
        parts["classifier"] = {"kind": "digits", **judge}
    if task == "autoencoder" and isinstance(first := parts.get("autoencoder"), dict):
        return common.first_stage(first.get("name"))
    return common.denoiser() if task == "denoiser" else common.base(task)


def _renamed(found: dict) -> dict:
    """In today's words: the denoiser was once called by the kind of its network, "unet"."""
    model, ema = found["model"], found["ema"]
    parts = (model, ema, model.get("unet") if isinstance(model, dict) else None)
    if not all(isinstance(part, dict) for part in parts):
        return found

    def today(names):
        return ["denoiser" if name == "unet" else name for name in names]

    model = dict(zip(today(model), model.values()))
    model["denoiser"] = {"kind": "unet", **model["denoiser"]}
    ema = {**ema, "networks": today(ema["networks"])}
    named = {"init_networks": today(found.get("init_networks", ()))}
    return {**found, **named, "model": model, "ema": ema}


def _completed(found: dict, known: dict) -> dict:
    """With the keys that configs/common.py has gained since the run was made, at their defaults.

    What a section holds below its keys (a schedule's arguments, say) is taken as it is.
    """
    filled = dict(known)
    for key, value in found.items():
        both = isinstance(value, dict) and isinstance(known.get(key), dict)
        filled[key] = {**known[key], **value} if both else value
    return filled
