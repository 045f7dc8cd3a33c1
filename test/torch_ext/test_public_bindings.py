"""What the patches make public is public by the rules of pytorch's test_public_bindings.py, and nothing else is."""

import importlib
from pathlib import Path

import pytest

import torch_ext
from torch_ext import _drift


def module_of(file):
    """The module that a file below ``torch`` makes."""
    parts = Path(file).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


EXPORTED = [
    (module_of(seam.file), name)
    for patch in torch_ext.series
    for seam in _drift.seams_of(patch)
    if seam.is_exports
    for name in seam.adds
]
OVERLAY = Path(torch_ext.__file__).parent / "overlay"
PUBLIC_MODULES = [
    name
    for path in sorted(OVERLAY.rglob("*.py"))
    if "._" not in (name := module_of(path.relative_to(OVERLAY)))
]


@pytest.fixture(autouse=True, scope="module")
def enabled():
    with torch_ext.enable():
        yield


def looks_public(module, name):
    home = getattr(getattr(module, name), "__module__", None)
    at_home = isinstance(home, str) and home.startswith(module.__name__)
    return at_home and "._" not in home and not name.startswith("_")


@pytest.mark.parametrize(("module", "name"), EXPORTED)
def test_a_public_name_has_its_public_home(module, name):
    namespace = importlib.import_module(module)
    home = getattr(namespace, name).__module__
    assert "._" not in home
    # The very rule, where there is an __all__; torch.distributed.checkpoint has none.
    if hasattr(namespace, "__all__"):
        assert name in namespace.__all__
        assert looks_public(namespace, name)


@pytest.mark.parametrize("name", PUBLIC_MODULES)
def test_what_looks_public_in_a_new_module_is_public(name):
    module = importlib.import_module(name)
    assert set(module.__all__) == {n for n in dir(module) if looks_public(module, n)}
