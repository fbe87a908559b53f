"""The one command for a folder of pictures: what it chooses, leaves and refuses."""

import dataclasses
import json
import pathlib
import shutil
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from configs import common_folder
from experiments.host import cli
from experiments.quickstart import __main__ as command
from experiments.quickstart import choose, folder, look, matcher, measure
from experiments.run import build

COLOURS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (40, 60, 220)}


def paint(path, number, size=(64, 64)):
    """A square of one of three colours; returns its caption."""
    rng = np.random.default_rng(number)
    name, side = [*COLOURS][number % 3], 24 if number % 2 else 12
    picture = np.full((size[1], size[0], 3), 235, np.uint8)
    top, left = rng.integers(0, min(size) - side, 2)
    picture[top : top + side, left : left + side] = COLOURS[name]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)
    return f"a {'large' if number % 2 else 'small'} {name} square"


def captioned(root, count=40, size=(64, 64)):
    rows = [
        {"file_name": f"{n}.png", "text": paint(root / f"{n}.png", n, size)} for n in range(count)
    ]
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture
def tiny(monkeypatch):
    """Networks of no quality, two steps each, and few samples."""
    stage = {"name": "kl", "channels": 8, "multipliers": (1,), "blocks": 0, "groups": 4}
    stage |= {"mid_attention": False, "z_channels": 8, "patch": 8}
    unet = {"channels": 16, "multipliers": (1, 2), "attention": (False, False), "head_dim": 8}
    denoiser, text_of = choose._denoiser, choose.text_of

    def small_denoiser(*arguments):
        made = denoiser(*arguments)
        return {**made, "network": {**made["network"], **unet, "groups": 4}}

    def small_text(found):
        made, said = text_of(found)
        if made:
            made["network"] |= {"width": 16, "heads": 2}
        return made, said

    def small_stage(large, batch):
        return {"network": stage, "batch_size": batch, "learning_rate": 1e-3}

    monkeypatch.setattr(choose, "_denoiser", small_denoiser)
    monkeypatch.setattr(choose, "text_of", small_text)
    monkeypatch.setattr(choose, "_first_stage", small_stage)
    monkeypatch.setattr(choose, "time_step", lambda config: (1.0, 5.0))
    monkeypatch.setattr(matcher, "time_step", lambda side: (1.0, 0.01))
    monkeypatch.setattr(choose, "FEWEST_STEPS", 2)
    monkeypatch.setattr(choose, "MOST_EPOCHS", 1)
    monkeypatch.setattr(folder, "SAMPLES", 8)
    monkeypatch.setattr(measure, "FEWEST", 2)
    monkeypatch.setattr(matcher, "STEPS", 3)


@pytest.fixture(autouse=True)
def one_cache(monkeypatch):
    """The suite's compiled programs are kept where they are."""
    monkeypatch.setattr(command, "keep_compiled", lambda directory: None)


def start(images, root, *more):
    argv = [f"--images={images}", f"--workdir={root}", *more]
    return cli.run(command.define, command.main, argv)


def test_captioned_pictures_to_latent_diffusion(tiny, tmp_path, capsys):
    images, root = captioned(tmp_path / "картинки"), tmp_path / "run"
    (images / "broken.png").write_bytes(b"no picture")
    with (images / "metadata.jsonl").open("a") as file:
        file.write(json.dumps({"file_name": "broken.png", "text": "a red square"}) + "\n")
    assert start(images, root, "--minutes=4", "--seed=3") == 0
    results = json.loads((root / "results.json").read_text())
    assert results["reconstruction"]["psnr"] > 0 and np.isfinite(results["kid"])
    assert results["minutes"] > 0 and results["seed"] == 3
    assert results["adherence"]["chance"] == pytest.approx(
        1 / len({c for _, c in rows_of(root, "validation")})
    )
    assert (4 * results["held_out"]["adherence"]["value"]).is_integer()  # a share of four pictures
    assert results["held_out"]["adherence"]["chance"] == results["adherence"]["chance"]
    assert results["data"]["counts"] == {"train": 36, "validation": 4}
    assert results["data"]["left_out"] == 1 and results["data"]["told"] == "captions"
    assert results["chosen"]["image_size"] == 64
    for name in ("samples.png", "real.png", "loss.png", "report.html", "config.py"):
        assert (root / name).stat().st_size > 500
    config = json.loads((root / "ldm" / "config.json").read_text())
    # an epoch over 36 pictures: three batches of 16
    assert config["train"]["steps"] == results["chosen"]["denoiser_steps"] == 3
    text = capsys.readouterr().out
    assert "broken.png" in text and "3 steps" in text and "captions by words" in text

    # again, with an edit of what may change: it goes on, and the file is the user's
    path = root / "config.py"
    path.write_text(path.read_text().replace("        pass\n", "        config.sample.steps = 3\n"))
    before = {p: p.stat().st_mtime_ns for p in (root / "data").rglob("*.png")}
    assert "sample.steps = 3" in path.read_text()
    assert start(images, root, "--seed=4") == 2
    assert "config.py says 3" in capsys.readouterr().err
    assert start(images, root, "--seed=3") == 0
    assert f"those of {path}" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in (root / "data").rglob("*.png")}
    again = json.loads((root / "results.json").read_text())
    assert again["reconstruction"] == results["reconstruction"]
    assert again["minutes"] > results["minutes"]  # over all starts
    # other pictures under the same name are not mixed into it
    paint(images / "0.png", 1, (70, 70))
    assert start(images, root, "--seed=3") == 2
    assert "was begun with other pictures" in capsys.readouterr().err


def rows_of(root, split):
    lines = (root / "data" / split / "metadata.jsonl").read_text().splitlines()
    return [(row["file_name"], row["text"]) for row in map(json.loads, lines)]


@pytest.mark.slow
def test_classes_of_small_pictures_to_diffusion_of_pixels(tiny, tmp_path):
    images, root = tmp_path / "images", tmp_path / "run"
    for n in range(30):
        paint(images / [*COLOURS][n % 3] / f"{n}.png", n, (40, 34))
    assert start(images, root, "--minutes=4") == 0
    results = json.loads((root / "results.json").read_text())
    assert results["reconstruction"] == {"psnr": None}
    assert results["data"]["classes"] == sorted(COLOURS) and "captions_unseen" not in results
    assert results["adherence"]["chance"] == pytest.approx(1 / 3)
    assert (root / "pixel" / "checkpoints").is_dir() and not (root / "ldm").exists()
    config = json.loads((root / "pixel" / "config.json").read_text())
    assert config["model"]["denoiser"]["num_classes"] == 4 and config["data"]["image_size"] == 32


def test_steps_follow_from_the_time_and_the_pictures(tmp_path, monkeypatch):
    found = look.look(captioned(tmp_path / "images"), 0)
    chosen, _ = choose.sizes(found, tmp_path / "run", 0)
    times = {"autoencoder": (10.0, 0.1), "denoiser": (20.0, 0.05)}
    monkeypatch.setattr(choose, "time_step", lambda config: times[config.task])
    monkeypatch.setattr(matcher, "time_step", lambda side: (5.0, {64: 0.14}[side]))
    got, why = choose.with_steps(chosen, 10**6, secs=900, spent_secs=60, samples=500)
    # Guided samples of 25 steps, and 600 steps of the matcher, which is most of it.
    evaluation = 15 + 500 * 50 * 0.05 / 16 / 2.5 + 5 + 600 * 0.14
    left = 900 - 60 - evaluation - 1.5 * 30
    assert got["first_stage"]["steps"] == pytest.approx(0.3 * left / 0.105, abs=2)
    assert got["denoiser"]["steps"] == pytest.approx(0.7 * left / 0.0525, abs=2)
    assert f"{got['denoiser']['steps']:,} steps" in why[1]
    assert why[2] == "evaluation: 500 samples and their numbers, about 2 min 15 s"
    few, _ = choose.with_steps(chosen, 36, secs=900, spent_secs=60, samples=500)
    assert few["denoiser"]["steps"] == 400 * 36 // 16
    with pytest.raises(ValueError, match=r"--minutes=1\.5 are too few: .* give --minutes="):
        choose.with_steps(chosen, 10**6, secs=90, spent_secs=20, samples=8)


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
@pytest.mark.parametrize("side", [32, 47, 64, 200, 512])
def test_every_choice_builds(kind, side, tmp_path, monkeypatch):
    """Also those for an accelerator that is not there."""

    class Device:
        platform, device_kind = kind, kind

    found = look.look(captioned(tmp_path / "images", 24, (side, side + 9)), 0)
    with monkeypatch.context() as patch:
        patch.setattr(choose.jax, "devices", lambda: [Device()])
        chosen, _ = choose.sizes(found, tmp_path, 0)
    assert (chosen["first_stage"] is None) == (side < 48)
    assert chosen["image_size"] <= max(side, 32) and chosen["image_size"] in (32, 64, 128, 256)
    assert chosen["denoiser"]["batch_size"] <= 21  # of the pictures
    for name in ("first_stage", "denoiser"):
        if chosen[name]:
            chosen[name]["steps"] = 10
    choose.write(tmp_path / "config.py", found, chosen, ["because"])
    get = folder._configs(tmp_path / "config.py")
    for stage in ("ldm", "autoencoder") if chosen["first_stage"] else ("pixel",):
        from experiments.run import tasks

        tasks.task(get(stage).lock())
    assert build.sample_shape(get())[0] == chosen["image_size"] // (
        8 if chosen["first_stage"] else 1
    )


def test_time_step_measures_a_real_step(tmp_path, tiny, monkeypatch):
    monkeypatch.undo()
    config = common_folder.get_config(
        "autoencoder",
        root="x",
        image_size=16,
        seed=0,
        first_stage={
            "network": {"name": "kl", "channels": 8, "multipliers": (1,), "blocks": 0, "groups": 4}
            | {"mid_attention": False, "z_channels": 4, "patch": 4},
            "batch_size": 8,
            "learning_rate": 1e-3,
            "steps": 10,
        },
        denoiser={},
        text=None,
        classes=0,
    )
    compiling, step = choose.time_step(config.lock(), secs=0.05)
    assert compiling > step > 0


# -- measures ------------------------------------------------------------------------------------


def pictures(count, seed=0, noise=0.0):
    rng = np.random.default_rng(seed)
    pixels, said = np.full((count, 32, 32, 3), 235.0), []
    for i in range(count):
        name, side = [*COLOURS][rng.integers(3)], int(rng.choice([8, 16]))
        top, left = rng.integers(0, 32 - side, 2)
        pixels[i, top : top + side, left : left + side] = COLOURS[name]
        said.append(f"a {'large' if side == 16 else 'small'} {name} square")
    pixels += noise * rng.standard_normal(pixels.shape)
    return measure.Pictures(np.clip(pixels, 0, 255).astype(np.uint8), said)


def test_the_matcher_reads_captions_it_learnt_and_tells_wrong_ones(monkeypatch):
    monkeypatch.setattr(matcher, "STEPS", 150)
    train, other = pictures(600), pictures(100, 1)
    judge = matcher.train(train.pixels, train.said)
    assert "square" not in judge.words and {"red", "large", "a large"} <= {*judge.words}
    found = judge.adherence(other.pixels, other.said)
    assert found["value"] > 0.9 and found["chance"] == pytest.approx(1 / 6)
    shuffled = [other.said[(i + 1) % 100] for i in range(100)]
    assert judge.adherence(other.pixels, shuffled)["value"] < 0.4
    assert matcher.train(train.pixels, ["a square"] * 600) is None
    assert matcher.train(train.pixels[:4], ["one", "two", "three", "four"]) is None


def test_distances_grow_with_what_is_wrong():
    train = pictures(300)
    sets = {"same": pictures(200, 1).pixels, "noisy": pictures(200, 1, noise=60).pixels}
    sets["blank"] = np.full_like(sets["same"], 235)
    sets["one colour"] = sets["same"].copy()
    sets["one colour"][..., 0] = sets["one colour"][..., 2]
    found = measure.distances(sets, train.pixels)
    for name in ("noisy", "blank", "one colour"):
        assert found["same"]["frechet_distance"] < 0.6 * found[name]["frechet_distance"], name
        assert found["same"]["kid"] + 0.05 < found[name]["kid"], name
    assert abs(found["same"]["kid"]) < 0.05


def test_distances_of_few_pictures_are_left_out_and_it_is_said():
    plain = [dataclasses.replace(pictures(n), said=None) for n in (200, 30, 200)]
    found = measure.measure(*plain, seed=0)
    assert found["kid"] is not None and found["held_out"]["kid"] is None
    assert found["held_out"]["frechet_distance"] is None and found["held_out"]["count"] == 30
    assert len(found["warnings"]) == 1 and "only 30 held-out pictures" in found["warnings"][0]
    whole = {"minutes": 1.0, "reconstruction": {"psnr": None}, **found}
    assert "30 held-out" in folder.table(whole)


def test_pictures_keep_what_is_said_of_them_when_shuffled():
    before = pictures(40)
    after = before.shuffled(3)
    assert after.said != before.said and sorted(after.said) == sorted(before.said)
    known = {x.tobytes(): said for x, said in zip(before.pixels, before.said)}
    assert [known[x.tobytes()] for x in after.pixels] == after.said


# -- wrong folders -------------------------------------------------------------------------------


def empty(root):
    root.mkdir()


def missing(root):
    pass


def one(root):
    paint(root / "1.png", 1)


def all_broken(root):
    root.mkdir()
    for n in range(30):
        (root / f"{n}.png").write_bytes(b"\x89PNG\r\n\x1a\n but no more")


def cut_off(root):
    """Headers that say what the rest does not hold."""
    for n in range(30):
        paint(root / f"{n}.jpg", n)
        data = (root / f"{n}.jpg").read_bytes()
        (root / f"{n}.jpg").write_bytes(data[: len(data) * 4 // 5])


def captions_alone(root):
    root.mkdir()
    for n in range(30):
        (root / f"{n}.txt").write_text("a red square")


def huge(root):
    """Small files whose headers say 2.5e9 pixels."""
    for n in range(24):
        paint(root / f"{n}.png", n)
        data = bytearray((root / f"{n}.png").read_bytes())
        data[16:24] = struct.pack(">2I", 50_000, 50_000)  # of IHDR, whose checksum follows
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
        (root / f"{n}.png").write_bytes(data)


def a_file(root):
    root.write_text("pictures")


def circle(root):
    root.mkdir()
    (root / "again").symlink_to(root)
    (root / "a.png").symlink_to(root / "b.png")
    (root / "b.png").symlink_to(root / "a.png")


def link_to_itself(root):
    root.symlink_to(root)


def half_captioned(root):
    captioned(root / "train")
    paint(root / "validation" / "1.png", 1)


def broken_metadata(root):
    captioned(root)
    (root / "metadata.jsonl").write_text("{'file_name': 1.png}\n")


def absent_picture(root):
    captioned(root)
    with (root / "metadata.jsonl").open("a") as file:
        file.write(json.dumps({"file_name": "9999.png", "text": "none"}) + "\n")


WRONG = [
    (missing, "does not exist"),
    (empty, "holds no images"),
    (one, "has 1 pictures that can be read, and at least 20"),
    (all_broken, "has 0 pictures that can be read"),
    (cut_off, "of 30 pictures only 0 can be decoded"),
    (captions_alone, "holds no images"),
    (huge, "2500000000 pixels"),
    (a_file, "is a file: name a folder"),
    (circle, "leads back to a folder that it is in"),
    (link_to_itself, "does not exist"),
    (half_captioned, "some images have captions or labels and some have none"),
    (broken_metadata, "is no JSON object"),
    (absent_picture, "does not exist"),
]


@pytest.mark.parametrize(("make", "sentence"), WRONG, ids=lambda v: getattr(v, "__name__", ""))
def test_a_wrong_folder_is_a_sentence_and_nothing_is_written(make, sentence, tmp_path, capsys):
    images, root = tmp_path / "images", tmp_path / "run"
    make(images)
    assert start(images, root) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and sentence in errors and "Traceback" not in errors
    assert errors.count("\n") == 1, errors
    kept = {"seconds.json", "processor_secs.json"}
    assert not root.exists() or {p.name for p in root.rglob("*")} <= kept


def test_a_folder_that_may_not_be_read(tmp_path, monkeypatch, capsys):
    images = captioned(tmp_path / "images")
    monkeypatch.setattr(look.os, "access", lambda path, mode: False)  # root may read anything
    assert start(images, tmp_path / "run") == 2
    assert "may not be read: change its permissions" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_no_space_left(tmp_path, monkeypatch, capsys):
    images, written = captioned(tmp_path / "images"), []
    write_bytes = pathlib.Path.write_bytes

    def full(path, data):
        if "data" in str(path) and path.suffix == ".png" and len(written) >= 5:
            raise OSError(28, "No space left on device")
        written.append(path)
        return write_bytes(path, data)

    monkeypatch.setattr(pathlib.Path, "write_bytes", full)
    assert start(images, tmp_path / "run") == 2
    errors = capsys.readouterr().err
    assert "could not be written (No space left on device): free space" in errors
    assert len(written) >= 5 and not [*(tmp_path / "run").glob("**/*.png")]


def test_other_flags_are_refused(tmp_path, capsys):
    images = captioned(tmp_path / "images")
    for more, sentence in (
        (["--minutes=0"], "--minutes=0.0 must be above 0"),
        (["--smoke"], "--smoke is of the default job"),
    ):
        assert start(images, tmp_path / "run", *more) == 2
        assert sentence in capsys.readouterr().err
    assert cli.run(command.define, command.main, ["--minutes=3"]) == 2
    assert "--minutes=3 needs --images" in capsys.readouterr().err
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "thesis.tex").write_text("")
    assert start(images, strange) == 2
    assert "'thesis.tex' and is not of --images" in capsys.readouterr().err
    assert [p.name for p in strange.iterdir()] == ["thesis.tex"]


def test_an_own_split_is_kept_and_a_class_is_never_held_out_whole(tmp_path):
    images = tmp_path / "images"
    for n in range(24):
        paint(images / "train" / f"{n}.png", n)
    for n in range(5):
        paint(images / "test" / f"{n}.png", n)
    found = look.look(images, 0)
    assert {k: len(v) for k, v in found.rows.items()} == {"train": 24, "validation": 5}
    assert found.told == "nothing"
    shutil.rmtree(images)
    for n in range(22):
        paint(images / ("rare" if n == 0 else "frequent") / f"{n}.png", n)
    for seed in range(20):
        found = look.look(images, seed)
        assert "rare" in {row["label"] for row in found.rows["train"]}


def test_all_captions_of_a_picture_are_held_out_with_it(tmp_path):
    captioned(images := tmp_path / "images", 30, (32, 32))
    rows = [json.loads(line) for line in (images / "metadata.jsonl").read_text().splitlines()]
    rows += [{**row, "text": f"seen: {row['text']}"} for row in rows]
    (images / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = look.look(images, 0)
    paths = {split: {row["path"] for row in rows} for split, rows in found.rows.items()}
    assert {split: len(rows) for split, rows in found.rows.items()} == {
        "train": 54,
        "validation": 6,
    }
    assert not paths["train"] & paths["validation"] and len(paths["validation"]) == 3
    assert len(found.sides) == 30 and found.said().endswith("; 27 train, 3 validation")
    broken = min(paths["train"])
    broken.write_bytes(broken.read_bytes()[:100])
    known = look.shrink(found, tmp_path / "data", 8)
    assert known["counts"] == {"train": 52, "validation": 6}
    rows = [{**rows[1], "text": str(n)} for n in range(20)]
    (images / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="has 1 pictures that can be read"):
        look.look(images, 0)
