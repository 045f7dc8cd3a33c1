"""Feature tests are written as tests of torch itself; here the patches that they test are switched on.

So are they in the processes that a test starts. In a tree (``python -m torch_ext run --tree -- pytest``) they are on
already, and enabling them does nothing.

``--examples=N`` lets each property test and state machine try N examples, and counts them among the slow tests. The
seed is printed, so that ``--hypothesis-seed`` repeats what failed.
"""

import os
import random
import sys
from pathlib import Path
from unittest import mock

import hypothesis.core
import pytest
from hypothesis import is_hypothesis_test, settings

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


def pytest_addoption(parser):
    parser.addoption(
        "--examples", type=int, help="examples of each property test, as a slow test"
    )


@pytest.hookimpl(trylast=True)  # after hypothesis has read --hypothesis-seed
def pytest_configure(config):
    examples = config.getoption("--examples")
    if examples:
        if hypothesis.core.global_force_seed is None:
            hypothesis.core.global_force_seed = random.SystemRandom().randrange(2**32)
        # For property tests in processes of their own, and those without hypothesis.
        os.environ["PROPERTY_TEST_EXAMPLES"] = str(examples)
        os.environ["PROPERTY_TEST_SEED"] = str(hypothesis.core.global_force_seed)


def pytest_report_header(config):
    examples = config.getoption("--examples")
    if not examples:
        return None
    seed = hypothesis.core.global_force_seed
    again = f"make test-slow EXAMPLES={examples} SEED={seed}"
    return f"property tests: {examples} examples each, seed {seed} (again: {again})"


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    header = pytest_report_header(config)
    if header and exitstatus:
        terminalreporter.write_line(header)


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(config, items):
    if not config.getoption("-m"):
        slow = pytest.mark.skip(reason="slow: run by make test-slow")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(slow)
    examples = config.getoption("--examples")
    for item in items if examples else ():
        try_examples(item, examples)


def try_examples(item, examples):
    """Let a property test be a slow test that tries so many examples."""
    # NB: the class's own, since TestCase wraps the methods of each instance.
    owner = item.cls or item.module
    function = getattr(owner, getattr(item, "originalname", None) or item.name)
    if not is_hypothesis_test(function):
        return
    item.add_marker("slow")
    if hasattr(item.cls, "settings"):  # that of a state machine
        item.cls.settings = settings(item.cls.settings, max_examples=examples)
    else:
        known = function._hypothesis_internal_use_settings
        function._hypothesis_internal_use_settings = settings(
            known, max_examples=examples
        )
