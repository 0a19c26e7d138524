"""A toy vocabulary, once."""

import pytest
from reference.models import toy_model, write_toy_vocabulary


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory):
    return write_toy_vocabulary(tmp_path_factory.mktemp("toy") / "data")


@pytest.fixture(params=["dense", "moe"])
def model(request, vocabulary):
    return toy_model(vocabulary, moe=request.param == "moe")
