"""What all tests share."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

settings.register_profile("same", derandomize=True, deadline=None)  # red or green, it stays so
settings.load_profile("same")


@pytest.fixture(scope="session", autouse=True)
def _cache_folder(request: pytest.FixtureRequest) -> Iterator[None]:
    """Keep trained weights in pytest's own cache, not in the user's."""
    cache = request.config.cache
    assert cache is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache.mkdir("weights")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Use one thread: the tests' models are too small for more, and a busy machine stalls many."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Give every test the same random numbers, whatever ran before it."""
    torch.manual_seed(0)
