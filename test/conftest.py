"""Feature tests are written as tests of torch itself; here the patches that they test are switched on.

So are they in the processes that a test starts. In a tree (``python -m torch_ext run --tree -- pytest``) they are on
already, and enabling them does nothing.
"""

import os
import sys
from pathlib import Path
from unittest import mock

import pytest

import torch_ext
from torch_ext._autoload import VARIABLE


ROOT = Path(__file__).parent
MACHINERY = ROOT / "torch_ext"


@pytest.fixture(scope="module", autouse=True)
def patches(request):
    if MACHINERY in request.path.parents:
        yield
    else:
        if ROOT / "distributed" in request.path.parents:
            let_children_import(request.module, request.path)
        names = ",".join(patch.name for patch in torch_ext.series)
        environ = {VARIABLE: names, "TORCH_DEVICE_BACKEND_AUTOLOAD": "1"}
        with torch_ext.enable(), mock.patch.dict(os.environ, environ):
            yield


def let_children_import(module, path):
    """Name the classes of a test module as a spawned process finds them: from this folder, which is on its path."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    sys.modules.setdefault(name, module)
    for value in vars(module).values():
        if isinstance(value, type) and value.__module__ == module.__name__:
            value.__module__ = name


def pytest_collection_modifyitems(config, items):
    if not config.getoption("-m"):
        slow = pytest.mark.skip(reason="slow: run by make test-slow")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(slow)
