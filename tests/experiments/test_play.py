"""The page of a run: pictures by HTTP, refusals that leave it running, and nothing but its own."""

import html
import http.client
import http.server
import io
import json
import pathlib
import re
import socket
import threading
import urllib.parse

import numpy as np
import pytest
from PIL import Image

from diffusion import pictures
from experiments.host import cli
from experiments.play import __main__ as play
from experiments.run import generate


@pytest.fixture(scope="module")
def serving(job):
    with play.server(str(job / "ldm")) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield serving
        serving.shutdown()


@pytest.fixture(scope="module")
def address(serving):
    return serving.server_address


def get(address, path, **headers):
    connection = http.client.HTTPConnection(*address, timeout=300)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read()


def picture(address, **asked):
    return get(address, "/picture?" + urllib.parse.urlencode(asked))


def test_pictures_are_those_of_the_run(address, job):
    pipeline = generate.load(job / "ldm").pipeline.changed(steps=2, guidance_scale=3.0)
    asked = {"prompt": "a red seven", "steps": 2, "guidance": 3, "seed": 5, "num": 2}
    status, headers, body = picture(address, **asked)
    assert status == 200 and headers["Content-Type"] == "image/png"
    assert float(headers["X-Milliseconds"]) > 0
    want = pictures.grid(next(pipeline.images(pipeline.columns(["a red seven"]), 2, [5])), 2)
    found = np.asarray(Image.open(io.BytesIO(body)))
    assert found.shape == want.shape
    assert np.abs(found.astype(int) - want.astype(int)).max() <= 1
    for other in ({"guidance": 1}, {"seed": 6}, {"weights": "raw"}):
        status, _, changed = picture(address, **asked | other)
        assert status == 200 and changed != body


def test_what_is_no_request_is_refused_and_leaves_it_running(address):
    for asked, words in (
        ({"steps": "many"}, "steps=many"),
        ({"steps": "0"}, "steps=0"),
        ({"guidance": "nan"}, "guidance=nan"),
        ({"seed": "-1"}, "seed=-1"),
        ({"num": "99"}, "num=99"),
        ({"weights": "best"}, "weights=best"),
        ({"prompt": "red " * 600}, "2400 characters"),
    ):
        status, _, body = picture(address, **{"prompt": "a red seven", **asked})
        assert status == 400 and words in body.decode(), (asked, body)
    with socket.create_connection(address) as lost:  # goes away before it is answered
        lost.sendall(b"GET /picture?prompt=a+red+seven&steps=2 HTTP/1.1\r\nHost: localhost\r\n\r\n")
    with socket.create_connection(address) as noise:
        noise.sendall(b"\x00\xff nonsense\r\n\r\n")
    assert picture(address, prompt="\x00\u2603", steps=2)[0] == 200  # words that it does not know
    assert picture(address, steps=2)[0] == 200


LOOK = pathlib.Path(__file__).with_name("play_look.html")


@pytest.fixture(scope="module")
def watched(serving):
    """The same server, which also has a page that uses the page, and can lose connections."""
    lost = threading.Event()

    class Watched(serving.RequestHandlerClass):
        def do_GET(self):
            if self.path == "/look":
                self._send(200, "text/html", LOOK.read_bytes())
            elif self.path.startswith("/lost?"):
                lost.set() if self.path.endswith("on") else lost.clear()
                self._send(200, "text/plain", b"")
            elif lost.is_set():
                self.close_connection = True
            else:
                super().do_GET()

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Watched) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        yield other.server_address
        other.shutdown()


def test_a_browser_draws_as_one_types(watched, address, browser):
    """A prompt typed, a slider moved, bad requests and lost connections, as a reader sees them."""
    host = "http://{}:{}".format(*watched)
    dumped = browser("--window-size=900,1200", "--dump-dom", f"{host}/look")
    seen = json.loads(html.unescape(re.search(r'<pre id="seen">(.*?)</pre>', dumped, re.S)[1]))
    assert "error" not in seen, seen
    first, one_step, typed, same, slid, seeded, raw, refused, broken, lost, again = seen["pictures"]
    assert seen["words"] == "a red seven" and seen["scale"] == "7.5"
    assert 0 not in seen["pictures"] and typed == same
    assert len({first, one_step, typed, slid, seeded, raw}) == 6  # each wish is another picture
    assert refused == broken == lost == again == raw  # what is no answer leaves the last one
    for key in ("first", "typed", "slid", "seeded", "raw", "again"):
        assert re.fullmatch(r"[\d.]+ ms", seen[key]), (key, seen)
    assert "2400 characters" in seen["refused"] and "seed=-1" in seen["broken"]
    assert "still running" in seen["lost"] and seen["file"] == 404
    assert seen["overflow"] <= 0
    assert picture(address, steps=2)[0] == 200


def test_it_serves_its_page_and_no_file(address, job):
    status, _, body = get(address, "/")
    text = body.decode()
    assert status == 200 and 'id="prompt"' in text and "$" not in text.replace("${", "")
    assert "<option>raw</option>" in text
    for path in (
        "/config.json",
        "/../config.json",
        "/page.html",
        "/picture/..",
        "//etc/passwd",
        "//[",
    ):
        assert get(address, path)[0] == 404
    for host in ("evil.example", "[::1", "localhost@evil.example"):
        assert get(address, "/", Host=host)[0] == 403
    assert address[0] == "127.0.0.1"


def test_the_command_refuses_by_name(job, capsys):
    for argv, words in (
        ([], "--workdir is missing"),
        ([f"--workdir={job}/nothing"], "holds no run"),
        ([f"--workdir={job}/classifier"], "task='classifier'"),
        ([f"--workdir={job}/ldm", "--port=99999"], "--port=99999"),
    ):
        assert cli.run(play.define, play.main, argv) == 2
        assert words in capsys.readouterr().err
