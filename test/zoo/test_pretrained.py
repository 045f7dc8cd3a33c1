# Owner(s): ["module: nn"]
"""``from_pretrained`` of model after model in one process, patched: equal to stock's. See ``pretrained.py``."""

import importlib.util
import os

import architectures
import pretrained
import pytest


# The first one is to spoil nothing for the others; cvt, poolformer, pvt and timesformer read numbers of a linspace.
SAMPLE = """bert cvt poolformer pvt timesformer albert bart clip gpt2 llama mistral t5 vit wav2vec2 whisper"""

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("transformers") is None,
        reason="transformers is not installed",
    ),
    pytest.mark.skipif(
        "TORCH_EXT_TREE" in os.environ, reason="there is no torch as it is in a tree"
    ),
]


def test_sample(tmp_path):
    found, out = pretrained.compare(SAMPLE.split(), tmp_path)
    assert out == {}
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_all(tmp_path):
    names = [name for name, _ in architectures.models("transformers")]
    found, out = pretrained.compare(names, tmp_path)
    assert len(found) > 100, out
    assert {name: wrong for name, wrong in found.items() if wrong} == {}
