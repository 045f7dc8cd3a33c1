"""The models that the zoo builds: one for each architecture that a library knows, by configuration alone.

Nothing is downloaded. Each function yields ``(name, builds)``, where ``builds`` are ways to build that model, from the
smallest; the zoo takes the first that eager construction builds and that has no more parameters than ``limit`` says.

- transformers: each model type that has a model. Its default configuration with small sizes; where that is
  inconsistent, with fewer of them, and at last as it is.
- timm: each entry point, as it is; of families without a small one, the smallest, if possible with less depth. Larger
  variants of the same families are left out.
- torchvision: each entry point as it is; the quantizable ones quantized, too.
- diffusers: each model class; see ``diffusion.py``.
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import diffusion
import torch
from torch import nn


Build = Callable[[], nn.Module]

# How many parameters a model may have.
LIBRARIES = {
    "transformers": 60_000_000,
    "timm": 20_000_000,
    "torchvision": 150_000_000,
    "diffusers": 160_000_000,
}


def models(library: str) -> Iterator[tuple[str, list[Build]]]:
    """``(name, builds)`` of each model of a library.

    Raises:
        ImportError: the library is not installed.
    """
    name_torchvision_operators()
    every = (transformers, timm, torchvision, diffusion.diffusers)
    yield from dict(zip(LIBRARIES, every, strict=True))[library]()


def limit(library: str, name: str) -> int:
    smallest = library == "timm" and name in (_SMALLEST + _SHALLOW).split()
    return 10**9 if smallest else LIBRARIES[library]


_SMALL = {
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "dim": 32,
    "embed_dim": 32,
    "embedding_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "d_ff": 48,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "head_dim": 8,
    "vocab_size": 128,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "max_position_embeddings": 64,
    "image_size": 32,
    "patch_size": 8,
}


_SIZES: list[dict[str, int]] = [
    _SMALL,
    _SMALL | {"vocab_size": 1024, "max_position_embeddings": 512},
    {k: v for k, v in _SMALL.items() if "layer" in k},
    {},
]


def transformers() -> Iterator[tuple[str, list[Build]]]:
    modeling = importlib.import_module("transformers.models.auto.modeling_auto")
    for name in sorted(modeling.MODEL_MAPPING_NAMES):
        yield name, [functools.partial(_transformer, name, sizes) for sizes in _SIZES]


def _transformer(name: str, sizes: dict[str, int]) -> Any:
    library = importlib.import_module("transformers")
    library.logging.set_verbosity_error()
    auto = importlib.import_module("transformers.models.auto.configuration_auto")
    config = auto.CONFIG_MAPPING[name]()
    shrink(config, sizes)
    return library.AutoModel.from_config(config)


def shrink(config: Any, sizes: dict[str, int], seen: set[int] | None = None) -> None:
    """Give a configuration, and those that it holds, small sizes."""
    seen = set() if seen is None else seen
    if not sizes or id(config) in seen:
        return
    seen.add(id(config))
    for key, value in list(vars(config).items()):
        if type(value) is int and value > sizes.get(key, value):
            setattr(config, key, sizes[key])
        elif hasattr(value, "to_dict") and hasattr(value, "__dict__"):
            shrink(value, sizes, seen)
    vocabulary = getattr(config, "vocab_size", None)
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        token = getattr(config, key, None)
        if type(token) is int and type(vocabulary) is int and token >= vocabulary:
            setattr(config, key, 0)


# The smallest entry points of the families that have none of that size, and those that can be had with less depth.
_SMALLEST = """
    convmixer_768_32 davit_tiny focalnet_tiny_srf hiera_tiny_224 inception_resnet_v2 inception_v3
    inception_v4 legacy_xception mobilenetv5_base mvitv2_tiny nasnetalarge nextvit_small
    pnasnet5large rdnet_tiny res2next50 sam2_hiera_tiny selecsls42 sequencer2d_s
    swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 swinv2_tiny_window8_256 tnt_s_legacy_patch16_224
    tresnet_m twins_svt_small vgg11 vitamin_small_224 volo_d1_224 xception41p
"""
_SHALLOW = """
    beit_base_patch16_224 deepseek_vit_412m gemma4_vit_167m naflexvit_base_patch16_parfac_gap
    qwen3_vit_88m samvit_base_patch16_224
"""


def timm() -> Iterator[tuple[str, list[Build]]]:
    library = importlib.import_module("timm")
    for name in library.list_models():
        sizes = {"depth": 2} if name in _SHALLOW.split() else {}
        yield name, [functools.partial(library.create_model, name, **sizes)]


def torchvision() -> Iterator[tuple[str, list[Build]]]:
    library = importlib.import_module("torchvision.models")
    for name in library.list_models():
        builder = library.get_model_builder(name)
        known = inspect.signature(builder).parameters
        weights = dict.fromkeys({"weights", "weights_backbone"} & set(known))
        yield name, [functools.partial(builder, **weights)]
        if "quantize" in known:
            build = functools.partial(builder, **weights, quantize=True)
            yield f"{name}, quantize=True", [build]


_named: list[Any] = []


def name_torchvision_operators() -> None:
    """Let torchvision be imported next to a torch without CUDA.

    NB: its wheels are built for CUDA; without it, they cannot load their operators, and then fail to register what
    they do to fake tensors. Construction does not call them.
    """
    if _named or hasattr(torch.ops.torchvision, "nms") or torch.version.cuda:
        return
    names = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        names.define(f"{name}(Tensor dets, Tensor scores, float threshold) -> Tensor")
    _named.append(names)  # as long as it lives
