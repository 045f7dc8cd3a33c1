"""The models that the zoo builds: one for each architecture that a library knows, by configuration alone.

Nothing is downloaded. A transformers architecture gets its default configuration with small sizes; where that is
inconsistent, with fewer of them, and at last as it is.
"""

import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn


Build = Callable[[], nn.Module]

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


_LAYERS = {k: v for k, v in _SMALL.items() if "layer" in k}
_SIZES = [
    _SMALL,
    _SMALL | {"vocab_size": 1024, "max_position_embeddings": 512},
    _LAYERS,
]


def transformers() -> Iterator[tuple[str, Callable[[int], Build]]]:
    """``(model type, build)`` of each configuration that has a model, where ``build(i)`` is one of several sizes."""
    modeling = importlib.import_module("transformers.models.auto.modeling_auto")
    for name in sorted(modeling.MODEL_MAPPING_NAMES):
        yield name, functools.partial(_builder, name)


def _builder(name: str, size: int) -> Build:
    library = importlib.import_module("transformers")
    library.logging.set_verbosity_error()
    auto = importlib.import_module("transformers.models.auto.configuration_auto")
    config = auto.CONFIG_MAPPING[name]()
    if size < len(_SIZES):
        shrink(config, _SIZES[size])
    return functools.partial(library.AutoModel.from_config, config)


def shrink(config: Any, sizes: dict[str, int], seen: set[int] | None = None) -> None:
    """Give a configuration, and those that it holds, small sizes."""
    seen = set() if seen is None else seen
    if id(config) in seen:
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
