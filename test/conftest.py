"""Feature tests are written as tests of torch itself; here the patches that they test are switched on.

In a tree (``python -m torch_ext run --tree -- pytest``) they are on already, and enabling them does nothing.
"""

from pathlib import Path

import pytest

import torch_ext


MACHINERY = Path(__file__).parent / "torch_ext"


@pytest.fixture(scope="module", autouse=True)
def patches(request):
    if MACHINERY in request.path.parents:
        yield
    else:
        with torch_ext.enable():
            yield


def pytest_collection_modifyitems(config, items):
    if not config.getoption("-m"):
        slow = pytest.mark.skip(reason="slow: run by make test-slow")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(slow)
