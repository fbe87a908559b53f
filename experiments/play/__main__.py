"""A page on this machine that draws as one types: prompt and sliders to pictures of a trained run.

    python -m experiments.play --workdir=DIR [--port=8765]

Open the address that it prints. It listens on the loopback alone and serves its own page and
pictures, no file. Each number of steps is compiled when it is first asked for; after that a picture
costs its evaluations. A run of few steps (configs/meanflow_digits.py, distil_digits.py) is made for
this.
"""

import functools
import http.server
import importlib.resources
import io
import ipaddress
import math
import sys
import threading
import time
import urllib.parse
from typing import Any

import jax
import numpy as np
from absl import flags
from PIL import Image

from diffusion import pictures
from diffusion.sampling.pipeline import Pipeline
from experiments.host import cli
from experiments.run import generate

STEPS = (1, 2, 4, 8, 16, 25, 50)
MOST_WORDS = 2000  # characters of a prompt
MOST_GUIDANCE = 30.0
MOST_PICTURES = 16


class Player:
    """Pictures of a run, one request at a time. `weights`: the sets of weights that it has."""

    def __init__(self, workdir: str):
        self.pipelines = {"ema": generate.load(workdir, "ema").pipeline}
        if generate.load(workdir, "raw").config.ema.decay:
            self.pipelines["raw"] = generate.load(workdir, "raw").pipeline
        self.params = {k: jax.device_put(p.params) for k, p in self.pipelines.items()}
        self.lock = threading.Lock()

    @property
    def pipeline(self) -> Pipeline:
        return self.pipelines["ema"]

    @functools.lru_cache(maxsize=16)  # noqa: B019  (it lives as long as the process)
    def _run(self, steps: int) -> Any:
        return self.pipeline.changed(steps=steps, guidance_scale=1.0).compiled()

    def picture(self, asked: dict[str, str]) -> tuple[bytes, float]:
        """A PNG, and the seconds that it took. ValueError in one sentence for what is not one."""
        steps = _number(asked, "steps", int, self.pipeline.how.steps, 1, STEPS[-1])
        guidance = _number(
            asked, "guidance", float, self.pipeline.how.guidance_scale, 0.0, MOST_GUIDANCE
        )
        seed = _number(asked, "seed", int, 0, 0, 2**32 - 1)
        count = _number(asked, "num", int, 1, 1, MOST_PICTURES)
        which = asked.get("weights", "ema")
        if which not in self.pipelines:
            raise ValueError(f"weights={which} must be one of {', '.join(self.pipelines)}")
        columns = self._columns(asked.get("prompt", ""), count)
        if guidance != 1:
            columns["guidance_scale"] = np.full(count, guidance, np.float32)
        numbers = np.full(count, seed, np.uint32), np.arange(count, dtype=np.int32)
        with self.lock:
            started = time.perf_counter()
            pixels = np.asarray(self._run(steps)(self.params[which], *numbers, columns))
            taken = time.perf_counter() - started
        file = io.BytesIO()
        Image.fromarray(pictures.grid(pictures.as_images(pixels), columns=count)).save(file, "PNG")
        return file.getvalue(), taken

    def _columns(self, prompt: str, count: int) -> dict[str, np.ndarray]:
        """One row a picture; a model of classes reads a number."""
        if len(prompt) > MOST_WORDS:
            raise ValueError(f"the prompt has {len(prompt)} characters: give at most {MOST_WORDS}")
        reads = self.pipeline.task.conditions
        words = [prompt] if "text" in reads else None
        labels = None
        if "label" in reads and prompt.strip():
            if not prompt.strip().isdecimal() or len(prompt.strip()) > 6:
                raise ValueError(f"prompt={prompt!r}: this model reads the number of a class")
            labels = [int(prompt)]
        columns = self.pipeline.columns(words, labels=labels)
        return {name: np.resize(rows, (count, *rows.shape[1:])) for name, rows in columns.items()}


def _number(asked: dict[str, str], name: str, kind: Any, default: Any, low: Any, high: Any) -> Any:
    text = asked.get(name, "")
    try:
        value = kind(text) if text else default
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise ValueError(f"{name}={text[:40]} must be a number in {low}..{high}")
    return value


class Handler(http.server.BaseHTTPRequestHandler):
    """/ is the page, /picture a PNG; nothing else is served."""

    player: Player
    page: bytes

    def do_GET(self):
        path, _, query = self.path.partition("?")
        try:
            if not _is_loopback(self.headers.get("Host", "")):
                return self._send(403, "text/plain", b"this page is for this machine alone")
            if path == "/":
                return self._send(200, "text/html; charset=utf-8", self.page)
            if path != "/picture":
                return self._send(404, "text/plain", b"there is nothing here but /")
            asked = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
            try:
                png, seconds = self.player.picture(asked)
            except ValueError as error:
                return self._send(400, "text/plain; charset=utf-8", str(error).encode())
            self._send(200, "image/png", png, {"X-Milliseconds": f"{1000 * seconds:.1f}"})
        except ConnectionError:  # nobody waits for it any more
            self.close_connection = True

    def _send(self, status: int, kind: str, body: bytes, more: dict[str, str] | None = None):
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        for name, value in {"Cache-Control": "no-store", **(more or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Quiet: one request a key press."""


def _is_loopback(host: str) -> bool:
    """Whether a Host header names this machine: another site's name for it may not be used."""
    try:
        name = urllib.parse.urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def server(workdir: str, port: int = 0) -> http.server.ThreadingHTTPServer:
    """The server of a run, on the loopback; port 0: any that is free."""
    player = Player(workdir)
    how, page = player.pipeline.how, importlib.resources.files("experiments.play")
    text = (page / "page.html").read_text(encoding="utf-8")
    steps = sorted({*STEPS, how.steps})
    filled = {
        "STEPS": "".join(f"<option{' selected' * (n == how.steps)}>{n}</option>" for n in steps),
        "GUIDANCE": f"{how.guidance_scale:g}",
        "WEIGHTS": "".join(f"<option>{name}</option>" for name in player.pipelines),
    }
    for name, value in filled.items():
        text = text.replace(f"${name}", value)
    handler = type("Playing", (Handler,), {"player": player, "page": text.encode()})
    return http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)


def define(add: cli.Flags) -> None:
    add.add("string", "workdir", None, "A run with task='denoiser'.")
    add.add("integer", "port", 8765, "Of the page; 0: any that is free.")


def main(values: flags.FlagValues) -> int:
    workdir = cli.require(values, "workdir")
    if not 0 <= values.port < 2**16:
        raise ValueError(f"--port={values.port} must lie in 0..65535")
    with server(workdir, values.port) as serving:
        print(f"http://127.0.0.1:{serving.server_port}/  (Ctrl-C ends it)", flush=True)
        try:
            serving.serve_forever()
        except KeyboardInterrupt:
            print()
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(define, main))
