"""The models of diffusers: every class of it that is a model, with arguments that make it small.

The defaults of their constructors are full sizes. Arguments that count layers or heads, or that are a width which
follows from no other, are told by their names and cut down; where that is inconsistent, fewer of them. What has no
default, or where the rule does not do, is given by hand.
"""

import functools
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn


# What arguments are called, what they may be at most, and the last try that cuts them down.
_RULES = [
    (re.compile(r"(^|_)(n_?|num_)?(layers?|depth|blocks)(_|$)|depths?$"), 1, 2),
    (re.compile(r"heads$|n_head$"), 2, 1),
    (re.compile(r"block_out_channels|^channels$"), 64, 2),
    (
        re.compile(
            r"^(base|caption|cross_attention|encoder|decoder|encoder_hidden|ffn|joint_attention|latent|model"
            r"|pooled_projection|source|target|text).*dim$|caption_channels|base_channels|hidden_size"
            r"|intermediate_size|_ff$"
        ),
        64,
        0,
    ),
]
_TRIES = 4


def _nets(name: str, key: str) -> dict[str, Callable[[], Any]]:
    return {key: lambda: [_build(name, 0), _build(name, 0)]}


_GIVEN: dict[str, dict[str, Any]] = {
    "AudioLDM2ProjectionModel": {
        "text_encoder_dim": 32,
        "text_encoder_1_dim": 32,
        "langauge_model_dim": 32,
    },
    "AutoencoderKLHunyuanImage": {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 32,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "spatial_compression_ratio": 2,
        "sample_size": 32,
    },
    "AutoencoderKLKVAEVideo": {"ch": 32},
    "AutoencoderVidTok": {"ch": 32},
    "BriaFibo2Transformer2DModel": {
        "dim": 256,
        "n_layers": 2,
        "cap_feat_dim": 32,
        "injection_layer_ids": (0,),
    },
    "ControlNetUnionModel": {
        "addition_time_embed_dim": 32,
        "projection_class_embeddings_input_dim": 64,
        "num_trans_channel": 64,
        "num_proj_channel": 64,
    },
    "Cosmos3AVAEAudioTokenizer": {"dec_dim": 32},
    "DreamLiteTransformer2DModel": {"in_channels": 32},
    "EasyAnimateTransformer3DModel": {
        "in_channels": 16,
        "out_channels": 16,
        "patch_size": 2,
    },
    "FluxMultiControlNetModel": _nets("FluxControlNetModel", "controlnets"),
    "HiDreamImageTransformer2DModel": {
        "patch_size": 2,
        "caption_channels": [64, 64],
        "llama_layers": [0, 1],
    },
    "HunyuanDiT2DControlNetModel": {
        "in_channels": 4,
        "patch_size": 2,
        "hidden_size": 176,
    },
    "HunyuanDiT2DModel": {"in_channels": 4, "patch_size": 2, "hidden_size": 176},
    "HunyuanDiT2DMultiControlNetModel": _nets(
        "HunyuanDiT2DControlNetModel", "controlnets"
    ),
    "Kandinsky6SRLatentUpscalerBank": {"stage_channels": (64, 32, 32)},
    "Kandinsky6Transformer3DModel": {"model_dim": 256, "ff_dim": 64, "time_dim": 64},
    "LatteTransformer3DModel": {
        "in_channels": 4,
        "patch_size": 2,
        "caption_channels": 32,
    },
    "LuminaNextDiT2DModel": {"hidden_size": 64, "num_kv_heads": 2},
    "MMAudioVAE": {"hidden_channels": 64},
    "MultiAdapter": _nets("T2IAdapter", "adapters"),
    "MultiControlNetModel": _nets("ControlNetModel", "controlnets"),
    "OmniGenTransformer2DModel": {
        "rope_scaling": {"short_factor": [1.0] * 16, "long_factor": [1.0] * 16}
    },
    "PRXTransformer2DModel": {"hidden_size": 64, "axes_dim": [16, 16]},
    "QwenImageMultiControlNetModel": _nets("QwenImageControlNetModel", "controlnets"),
    "RFD4ProteinaAutoencoder": {
        "atom37_mask": [[True] * 37] * 147,
        "allowed_residue_types": [[True] * 147] * 7,
    },
    "SD3MultiControlNetModel": _nets("SD3ControlNetModel", "controlnets"),
    "SanaWMTransformer3DModel": {"hidden_size": 224, "num_layers": 4},
    "StableAudioProjectionModel": {
        "text_encoder_dim": 32,
        "conditioning_dim": 32,
        "min_value": 0,
        "max_value": 32,
    },
    "Transformer2DModel": {"in_channels": 32},
    "TransformerTemporalModel": {"in_channels": 32},
    "UniDiffuserModel": {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
    },
    "UniDiffuserTextDecoder": {
        "prefix_length": 7,
        "prefix_inner_dim": 32,
        "vocab_size": 128,
        "n_embd": 32,
    },
    "WanAnimate2Transformer3DModel": {"dim": 256},
    "WanVACETransformer3DModel": {"vace_layers": [0]},
    "ZImageControlNetModel": {
        "control_layers_places": [0],
        "control_refiner_layers_places": [0],
        "control_in_dim": 16,
        "dim": 256,
    },
    "ZImageTransformer2DModel": {"dim": 256},
}


def diffusers() -> Iterator[tuple[str, list[Callable[[], nn.Module]]]]:
    """``(name, builds)`` of each class of models, see ``architectures.py``."""
    library = importlib.import_module("diffusers")
    for name in sorted(dir(library)):
        # NB: each name is imported when it is first asked for, and pipelines want more than is needed here.
        if name.endswith(("Pipeline", "Blocks")):
            continue
        found = getattr(library, name)
        if not inspect.isclass(found) or not issubclass(found, library.ModelMixin):
            continue
        if found is not library.ModelMixin:
            yield name, [functools.partial(_build, name, i) for i in range(_TRIES)]


def _build(name: str, attempt: int) -> Any:
    library = importlib.import_module("diffusers")
    library.logging.set_verbosity_error()
    model = getattr(library, name)
    given = {k: v() if callable(v) else v for k, v in _GIVEN.get(name, {}).items()}
    return model(**{**_small(model, attempt), **given})


def _small(model: type, attempt: int) -> dict[str, Any]:
    small = {}
    for name, parameter in inspect.signature(model).parameters.items():
        for pattern, most, last in _RULES:
            if attempt <= last and pattern.search(name):
                small[name] = _cut(parameter.default, most)
                break
    return {k: v for k, v in small.items() if v is not inspect.Parameter.empty}


def _cut(value: Any, most: int) -> Any:
    if type(value) in (tuple, list):
        return type(value)(_cut(v, most) for v in value)
    return min(value, most) if type(value) is int else value
