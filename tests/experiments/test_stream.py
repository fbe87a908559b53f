"""Vectors of a set, streamed in any batches and over two processes, are those of the whole."""

import importlib.util
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

from experiments.evaluate import stream

WORKER = pathlib.Path(__file__).with_name("stream_worker.py")
SIZES = (7, 64, 1000)


@pytest.fixture(scope="module")
def worker():
    specification = importlib.util.spec_from_file_location("stream_worker", WORKER)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each of two processes has, of all."""
    root = tmp_path_factory.mktemp("stream")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    running = [
        subprocess.Popen([sys.executable, WORKER, address, str(i), root / f"{i}"], env=environment)
        for i in range(2)
    ]
    assert [process.wait(timeout=300) for process in running] == [0, 0]
    return [np.load(root / f"{i}.npz") for i in range(2)]


@pytest.mark.parametrize("size", SIZES)
def test_statistics_over_two_processes_are_those_of_the_whole(two, worker, size):
    x = worker.vectors().astype(np.float64)
    for found in two:
        assert found[f"count{size}"] == len(x)
        np.testing.assert_allclose(found[f"mean{size}"], x.mean(0), rtol=1e-10)
        covariance = np.cov(x, rowvar=False)
        error = np.linalg.norm(found[f"covariance{size}"] - covariance)
        assert error < 1e-10 * np.linalg.norm(covariance)
    np.testing.assert_array_equal(two[0][f"mean{size}"], two[1][f"mean{size}"])


@pytest.mark.parametrize("size", SIZES)
def test_rows_come_back_in_order_and_to_the_bit(two, worker, size):
    for found in two:
        np.testing.assert_array_equal(found[f"rows{size}"], worker.vectors())


def test_what_the_first_process_measures_is_known_to_the_bit_on_both(two):
    for found in two:
        assert found["first"].tolist() == [1 / 3, 0.0]


@pytest.mark.parametrize("chunk", SIZES)
def test_statistics_in_chunks_are_those_of_the_whole(worker, monkeypatch, chunk):
    x = worker.vectors()
    monkeypatch.setattr(stream, "CHUNK", chunk)
    found = stream.statistics(x)
    np.testing.assert_allclose(found.mean, x.astype(np.float64).mean(0), rtol=1e-10)
    np.testing.assert_allclose(found.covariance, np.cov(x.astype(float), rowvar=False), rtol=1e-10)
