"""The loader: one stream, whatever the processes; complete epochs; resumes to the bit."""

import json

import numpy as np
import pytest

from diffusion.data import loader, sources, tokenizers, transforms
from diffusion.data.builders.captioned_digits import compose


@pytest.fixture(scope="module")
def pipeline(digits):
    tokenizer = tokenizers.train(compose.vocabulary())
    return [transforms.ComposeDigits.of(digits, 0), transforms.Tokenize(tokenizer, 16)]


@pytest.fixture(scope="module")
def numbers():
    return sources.MemorySource({"value": np.arange(10)})


def take(source, count, **options):
    made = loader.Loader(source, **options)
    batches = [next(made) for _ in range(count)]
    made.close()
    return batches


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_batches_hold_what_the_contract_says(digits, pipeline):
    (batch,) = take(digits, 1, batch_size=16, seed=0, transforms=pipeline)
    kinds = {name: (value.dtype.name, value.shape) for name, value in batch.items()}
    assert kinds == {
        "image": ("uint8", (16, 32, 32, 3)),
        "label": ("int32", (16,)),
        "tokens": ("int32", (16, 16)),
        "attributes": ("int32", (16, 5)),
        "position": ("int32", (16,)),
        "index": ("int64", (16,)),
    }
    assert batch["position"].tolist() == list(range(16))
    np.testing.assert_array_equal(batch["attributes"][:, 0], batch["label"])
    np.testing.assert_array_equal(digits.batch(batch["index"])["label"], batch["label"])


def test_pictures_and_captions_belong_together(digits, pipeline):
    (batch,) = take(digits, 1, batch_size=64, seed=0, transforms=pipeline)
    glyphs, tokenizer = pipeline[0].glyphs, pipeline[1].tokenizer
    stated = [compose.parse(text) for text in tokenizer.decode(batch["tokens"])]
    columns = {name: np.array([one[name] for one in stated]) for name in compose.ATTRIBUTES}
    np.testing.assert_array_equal(compose.render(glyphs, batch["index"], columns), batch["image"])


def test_every_epoch_visits_each_example_once(numbers):
    values = np.concatenate([b["value"] for b in take(numbers, 15, batch_size=4, seed=1)])
    epochs = values.reshape(6, 10)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(10))
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 6


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_one_stream(digits, pipeline, processes):
    options = {"batch_size": 8, "seed": 3, "transforms": pipeline}
    whole = take(digits, 3, **options)
    parts = [
        take(digits, 3, **options, process_index=i, process_count=processes)
        for i in range(processes)
    ]
    for step, expected in enumerate(whole):
        together = {name: np.concatenate([part[step][name] for part in parts]) for name in expected}
        assert_equal(together, expected)


def test_two_processes_are_disjoint_and_complete(numbers):
    parts = [
        take(numbers, 5, batch_size=2, seed=0, process_index=i, process_count=2) for i in (0, 1)
    ]
    read = [{int(v) for batch in part for v in batch["value"]} for part in parts]
    assert read[0].isdisjoint(read[1]) and read[0] | read[1] == set(range(10))


@pytest.mark.parametrize("workers", [0, 3])
def test_threads_do_not_change_the_stream(digits, pipeline, workers):
    options = {"batch_size": 8, "seed": 0, "transforms": pipeline}
    for a, b in zip(take(digits, 6, **options), take(digits, 6, workers=workers, **options)):
        assert_equal(a, b)


def test_state_restores_the_following_batches(digits, pipeline):
    options = {"batch_size": 1000, "seed": 0, "transforms": pipeline}
    straight = take(digits, 7, **options)  # past the end of the first epoch
    made = loader.Loader(digits, **options)
    for _ in range(3):
        next(made)
    state = json.loads(json.dumps(made.get_state()))
    made.close()
    again = loader.Loader(digits, **options)
    next(again)
    again.set_state(state)
    for expected in straight[3:]:
        assert_equal(next(again), expected)
    assert again.get_state()["step"] == 7
    again.set_state(state)  # and once more, backwards
    assert_equal(next(again), straight[3])
    again.close()


def test_seed_changes_the_order(numbers):
    a, b = (take(numbers, 1, batch_size=10, seed=s)[0]["value"].tolist() for s in (0, 1))
    assert a != b


def test_state_of_another_stream_is_refused(numbers):
    made = loader.Loader(numbers, 2, seed=0)
    state = made.get_state()
    for key, other in (("batch_size", 4), ("seed", 1), ("examples", 9)):
        with pytest.raises(ValueError, match=f"{key}={other}.*{key}={state[key]}"):
            made.set_state({**state, key: other})


def test_a_batch_that_processes_do_not_divide(numbers):
    with pytest.raises(ValueError, match=r"batch_size=9 .* 2 processes"):
        loader.Loader(numbers, 9, 0, process_count=2)
    with pytest.raises(ValueError, match="batch_size=0"):
        loader.Loader(numbers, 0, 0)
    with pytest.raises(ValueError, match="0 examples"):
        loader.Loader(sources.MemorySource({"value": np.zeros(0)}), 2, 0)


def test_an_error_in_a_transform_reaches_the_consumer(numbers):
    def fail(batch):
        raise ValueError("image 3 is broken")

    made = loader.Loader(numbers, 2, 0, [fail])
    with pytest.raises(ValueError, match="image 3 is broken"):
        next(made)
    made.close()


def test_one_pass_is_in_order_padded_and_marked(numbers):
    batches = list(loader.one_pass(numbers, 4))
    assert [b["value"].tolist() for b in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 9, 9]]
    assert [b["valid"].tolist() for b in batches[2:]] == [[True, True, False, False]]
    assert batches[2]["position"].tolist() == [0, 1, 2, 3]


def test_batches_made_ahead_are_the_same_and_so_are_errors(numbers):
    one, other = loader.one_pass(numbers, 4), loader.ahead(loader.one_pass(numbers, 4))
    for a, b in zip(one, other, strict=True):
        assert_equal(a, b)

    def fail(batch):
        if 5 in batch["index"]:
            raise ValueError("image 5 is broken")
        return batch

    made = loader.ahead(loader.one_pass(numbers, 4, [fail]))
    assert next(made)["index"].tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="image 5 is broken"):
        next(made)


def test_one_pass_over_epochs_in_parts(digits, pipeline):
    whole = list(loader.one_pass(digits, 500, pipeline, epochs=2))
    assert len(whole) == 18
    first, second = whole[0], whole[9]
    assert first["index"].tolist() == second["index"].tolist()
    assert (first["image"] != second["image"]).any((1, 2, 3)).mean() > 0.95
    (part,) = loader.one_pass(digits, 500, pipeline, epochs=2, start=4500, stop=5000)
    assert_equal(part, second)
    halves = [
        next(loader.one_pass(digits, 500, pipeline, process_index=i, process_count=2))
        for i in (0, 1)
    ]
    assert_equal({k: np.concatenate([h[k] for h in halves]) for k in first}, first)


def test_one_pass_processes_agree_on_the_number_of_batches(numbers):
    parts = [list(loader.one_pass(numbers, 8, process_index=i, process_count=4)) for i in range(4)]
    assert [len(part) for part in parts] == [2] * 4
    assert sum(int(b["valid"].sum()) for part in parts for b in part) == 10


def test_tokenize_counts_what_it_cuts(digits):
    tokenize = transforms.Tokenize(tokenizers.train(compose.vocabulary()), 12)
    steps = [transforms.ComposeDigits.of(digits, 0), tokenize]
    list(loader.one_pass(digits, 500, steps))
    assert tokenize.captions == 4500
    assert 0 < tokenize.truncated < 4500


def test_small_transforms():
    image = np.random.default_rng(0).integers(1, 256, (2, 28, 28, 1)).astype(np.uint8)
    padded = transforms.PadImage(32)({"image": image})["image"]
    assert padded.shape == (2, 32, 32, 1) and not padded[:, :2].any()
    np.testing.assert_array_equal(padded[:, 2:30, 2:30], image)
    with pytest.raises(ValueError, match=r"data\.image_size=20"):
        transforms.PadImage(20)({"image": image})
    grey = transforms.Channels(3)({"image": image})["image"]
    assert grey.shape == (2, 28, 28, 3) and (grey == image).all()
    with pytest.raises(ValueError, match=r"data\.channels=1, but images have 3"):
        transforms.Channels(1)({"image": grey})
    flipped = transforms.FlipOddEpochs()({"image": image, "epoch": np.array([0, 1])})["image"]
    np.testing.assert_array_equal(flipped[0], image[0])
    np.testing.assert_array_equal(flipped[1], image[1, :, ::-1])
    kept = transforms.Keep(("image",))({"image": image, "label": 0, "index": 1, "position": 2})
    assert kept.keys() == {"image", "index", "position"}
