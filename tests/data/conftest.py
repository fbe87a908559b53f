"""The real digits, prepared once for all tests of data."""

import pathlib

import pytest

from diffusion.data import prepare, sources


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("data")
    prepare.prepare("captioned_digits", root)
    return root


@pytest.fixture(scope="session")
def digits(data_dir) -> sources.Source:
    return sources.open_source("captioned_digits", data_dir, "train")
