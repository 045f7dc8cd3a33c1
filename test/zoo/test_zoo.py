# Owner(s): ["module: nn"]
"""Models that were not written for it: nothing off meta, and deferred construction is eager construction.

A sample in the default suite, every architecture in the slow one; ``zoo.py`` makes a table of all.
"""

import functools
import importlib.util
import warnings

import architectures
import pytest
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


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    "library", [pytest.param(name, marks=needs(name)) for name in SAMPLE]
)
def test_all(library):
    ways = ["meta_init()", *zoo.DEFERRED]
    results = zoo.survey(library, list(models(library)), ways)
    built = {n: r for n, r in results.items() if r[zoo.CHOICE].startswith("ok")}
    wrong = {
        f"{name}, {way}": found[way]
        for name, found in built.items()
        for way in ways
        if not found[way].startswith("ok")
        and not any(part in name for part in FALLS_SHORT)
    }
    assert len(built) > len(results) // 2
    assert wrong == {}
