# Owner(s): ["module: nn"]
"""Models that were not written for it: nothing off meta, and deferred construction is eager construction.

A sample in the default suite, every architecture in the slow one; ``zoo.py`` makes a table of all.
"""

import warnings

import architectures
import pytest
import zoo


pytest.importorskip("transformers")

SAMPLE = [
    "albert",
    "bart",
    "beit",
    "bert",
    "big_bird",
    "bloom",
    "clip",
    "convbert",
    "convnext",
    "deberta-v2",
    "deit",
    "detr",
    "dinov2",
    "distilbert",
    "electra",
    "falcon",
    "fnet",
    "gemma",
    "gpt2",
    "gpt_neox",
    "gpt_oss",
    "hubert",
    "llama",
    "mamba",
    "mistral",
    "mixtral",
    "mobilevit",
    "mpnet",
    "mt5",
    "opt",
    "perceiver",
    "phi",
    "qwen2",
    "reformer",
    "regnet",
    "roberta",
    "rwkv",
    "segformer",
    "siglip",
    "swin",
    "t5",
    "vit",
    "wav2vec2",
    "whisper",
    "xlm-roberta",
]
MODELS = dict(architectures.transformers())


def check(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        build = zoo.buildable(MODELS[name])
        if build is None:
            pytest.skip("eager construction does not build it in a small size")
        assert zoo.in_meta_init(build) == "ok"
        for shuffled in (False, True):
            assert zoo.deferred(build, shuffled).startswith("ok")


@pytest.mark.parametrize("name", [name for name in SAMPLE if name in MODELS])
def test_sample(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(MODELS).difference(SAMPLE)))
def test_all(name):
    check(name)


def test_the_sample_is_large():
    assert sum(name in MODELS for name in SAMPLE) >= 40
