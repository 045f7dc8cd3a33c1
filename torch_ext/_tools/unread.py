"""What is in a DCP checkpoint, by name, with its tensors unread."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Unread:
    """A tensor of a DCP checkpoint."""

    checkpoint: Any
    name: str

    @property
    def dtype(self) -> torch.dtype:
        """As the checkpoint's metadata say."""
        dtype: torch.dtype = self.checkpoint.of(self.name).properties.dtype
        return dtype

    def read(self) -> torch.Tensor:
        """The tensor, read anew at each call."""
        tensor: torch.Tensor = self.checkpoint.tensor(self.name)
        return tensor


def open_dcp(path: str) -> dict[str, Any]:
    """The values of the DCP checkpoint ``path``: tensors as :class:`Unread`, others as they are."""
    # NB: here, since the new one is there while the patches are on.
    from torch.distributed.checkpoint import _single_file as single_file  # type: ignore[attr-defined]
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    checkpoint = single_file._Checkpoint(single_file.ChunkReader(path))
    described = checkpoint.metadata.state_dict_metadata
    values = checkpoint.objects()
    return {
        name: Unread(checkpoint, name)
        if isinstance(kind, TensorStorageMetadata)
        else values[name]
        for name, kind in described.items()
    }


def nested(path: str, values: dict[str, Any]) -> dict[str, Any]:
    """``values`` of the DCP checkpoint ``path`` in the containers in which they were when they were saved."""
    from torch.distributed.checkpoint._traverse import set_element
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    mappings = FileSystemReader(path).read_metadata().planner_data or {}
    result: dict[str, Any] = {}
    for name, value in values.items():
        set_element(result, mappings.get(name, (name,)), value)
    return result
