"""Feature tests are written as tests of torch itself; here the patches that they test are switched on.

So are they in the processes that a test starts. In a tree (``python -m torch_ext run --tree -- pytest``) they are on
already, and enabling them does nothing.
"""

import os
from pathlib import Path
from unittest import mock

import pytest

import torch_ext
from torch_ext._autoload import VARIABLE


MACHINERY = Path(__file__).parent / "torch_ext"


@pytest.fixture(scope="module", autouse=True)
def patches(request):
    if MACHINERY in request.path.parents:
        yield
    else:
        names = ",".join(patch.name for patch in torch_ext.series)
        environ = {VARIABLE: names, "TORCH_DEVICE_BACKEND_AUTOLOAD": "1"}
        with torch_ext.enable(), mock.patch.dict(os.environ, environ):
            yield


def pytest_collection_modifyitems(config, items):
    if not config.getoption("-m"):
        slow = pytest.mark.skip(reason="slow: run by make test-slow")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(slow)
