# Owner(s): ["module: nn"]
"""Models that were not written for it: nothing off meta, and deferred construction is eager construction.

A sample in the default suite, every architecture in the slow one; ``zoo.py`` makes a table of all.
"""

import functools
import importlib.util
import os
import warnings

import architectures
import pytest
import table
import zoo


SAMPLE = {
    "transformers": """albert bart beit bert big_bird bloom clip convbert deberta-v2 deit dinov2 distilbert electra
        falcon fnet gemma gpt2 gpt_neox gpt_oss granite hubert llama mamba mistral mixtral mobilevit mpnet mt5 olmo opt
        phi qwen2 reformer roberta rwkv segformer siglip swin t5 vit wav2vec2 whisper xlm-roberta""",
    "timm": """efficientnet_b0 ghostnet_100 levit_128s mobilevitv2_050 regnetx_002 resnet10t vit_tiny_patch16_224
        xcit_nano_12_p16_224""",
    "torchvision": """googlenet lraspp_mobilenet_v3_large quantized_mobilenet_v2 raft_small regnet_x_400mf s3d
        squeezenet1_1 ssdlite320_mobilenet_v3_large""",
    "diffusers": """AutoencoderDC AutoencoderKL AutoencoderKLMochi FluxTransformer2DModel MotionAdapter
        SD3Transformer2DModel SanaTransformer2DModel UNet1DModel UNet2DConditionModel WanTransformer3DModel""",
}

# What is known to fall short, and why.
FALLS_SHORT = {
    "quantize=True": "runs the model to observe it, on random weights; packs weights in objects without a device",
}


models = functools.lru_cache(lambda library: dict(architectures.models(library)))


def needs(library):
    found = importlib.util.find_spec(library) is not None
    return pytest.mark.skipif(not found, reason=f"{library} is not installed")


@pytest.mark.parametrize(
    ("library", "name"),
    [
        pytest.param(library, name, marks=needs(library))
        for library, names in SAMPLE.items()
        for name in names.split()
    ],
)
def test_sample(library, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        builds = models(library)[name]
        which, why = zoo.choose(builds, architectures.limit(library, name))
        assert which >= 0, why
        assert zoo.WAYS["meta_init()"](builds[which]) == "ok"
        for way in zoo.DEFERRED:
            assert zoo.WAYS[way](builds[which]).startswith("ok")


@pytest.fixture(scope="module")
def survey():
    return functools.cache(
        lambda library: zoo.survey(
            library, list(models(library)), zoo.META + zoo.DEFERRED
        )
    )


every_library = pytest.mark.parametrize(
    "library", [pytest.param(name, marks=needs(name)) for name in SAMPLE]
)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@every_library
def test_all(survey, library):
    results = survey(library)
    built = {n: r for n, r in results.items() if r[zoo.CHOICE].startswith("ok")}
    wrong = {
        f"{name}, {way}": found[way]
        for name, found in built.items()
        for way in zoo.META[1:] + zoo.DEFERRED
        if not found[way].startswith("ok")
        and not any(part in name for part in FALLS_SHORT)
    }
    assert len(built) > len(results) // 4
    assert wrong == {}


@pytest.mark.slow
@pytest.mark.timeout(7200)
@every_library
def test_no_model_fails_that_stock_builds(survey, library):
    if "TORCH_EXT_TREE" in os.environ:
        pytest.skip("there is no torch as it is in a tree")
    failed = {
        name: int(found[zoo.CHOICE].split()[1])
        for name, found in survey(library).items()
        if table.kind(found.get(zoo.META[0], "ok")) == "raised"
    }
    stock = zoo.survey(library, list(failed), zoo.STOCK[:1], failed)
    assert [
        n for n, r in stock.items() if table.kind(r[zoo.STOCK[0]]) != "raised"
    ] == []
