"""A Llama of TinyLlama-1.1B's shape in bfloat16 with generated weights, to show what the patches gain at size."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TYPE_CHECKING

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
from torch import nn, Tensor
from transformers import LlamaConfig, LlamaForCausalLM


if TYPE_CHECKING:
    from typing_extensions import Buffer

TITLE = "Llama, 1.1 B parameters"
RESULT = "logits"

_GIB = 1 << 30
_DISK = 3.0  # the file and some air
_MEMORY = 8.0  # model, state dict and page cache, a file each, and the interpreter


def lack_of_room(folder: Path) -> str | None:
    """Why the file or the model would not fit; None if they do."""
    disk = shutil.disk_usage(folder).free / _GIB
    if disk < _DISK:
        return f"it needs {_DISK:.0f} GiB of free disk, and {folder} has {disk:.1f} GiB"
    memory = psutil.virtual_memory().available / _GIB
    if memory < _MEMORY:
        return f"it needs {_MEMORY:.0f} GiB of available memory, and there are {memory:.1f} GiB"
    return None


def write_checkpoint(path: Path, console: Console) -> str:
    """Write generated weights to ``path``, holding them once; returns what they are."""
    with torch.device("meta"):
        shapes = {key: t.shape for key, t in construct().state_dict().items()}
    parameters = sum(shape.numel() for shape in shapes.values())
    columns = TextColumn("{task.description:9}"), BarColumn(), DownloadColumn(True)
    with Progress(*columns, console=console) as progress:
        generated = progress.add_task("generated", total=2 * parameters)
        written = progress.add_task("written", total=2 * parameters)
        numbers = _Numbers()
        state_dict = {}
        for key, shape in shapes.items():
            state_dict[key] = numbers.tensor(shape)
            progress.advance(generated, 2 * shape.numel())
        with _Counted(path, lambda n: progress.advance(written, n)) as file:
            torch.save(state_dict, file)
    return f"{parameters / 1e9:.2f} B generated parameters, bfloat16"


class _Numbers:
    """Weights as training starts from: normally distributed, or one for norms.

    NB: a billion random numbers take half a minute, so that a few million serve in turn.
    """

    def __init__(self) -> None:
        random = torch.Generator().manual_seed(0)
        self._pool = torch.empty(1 << 22).normal_(0, 0.02, generator=random).bfloat16()
        self._at = 0

    def tensor(self, shape: torch.Size) -> Tensor:
        if len(shape) < 2:
            return torch.ones(shape, dtype=torch.bfloat16)
        result = torch.empty(shape, dtype=torch.bfloat16)
        rest = result.view(-1)
        while rest.numel():
            part = self._pool[self._at : self._at + rest.numel()]
            rest[: part.numel()] = part
            rest = rest[part.numel() :]
            self._at = (self._at + part.numel()) % self._pool.numel()
        return result


class _Counted(io.BufferedWriter):
    """A file that tells of each write."""

    def __init__(self, path: Path, tell: Callable[[int], None]) -> None:
        super().__init__(io.FileIO(path, "wb"))
        self._tell = tell

    def write(self, data: "Buffer", /) -> int:
        n = super().write(data)
        self._tell(n)
        return n


def construct() -> nn.Module:
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=32000,
        max_position_embeddings=2048,
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model: nn.Module = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    return model


def inputs() -> Any:
    return torch.tensor([[1, 15043, 29892, 590, 1024, 338, 365, 29889]])


def forward(model: nn.Module, batch: Any) -> Tensor:
    """Logits behind each of eight tokens."""
    logits: Tensor = model(batch, use_cache=False).logits
    return logits


def describe(logits: Tensor) -> list[str]:
    return []
