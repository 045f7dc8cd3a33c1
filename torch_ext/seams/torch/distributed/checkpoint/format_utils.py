"""Seams of torch/distributed/checkpoint/format_utils.py, and a public name that it gets."""

from torch.distributed.checkpoint._single_file import dcp_to_safetensors

from torch_ext.seams import exports, seam


exports("dcp_torch_reader", "dcp_to_safetensors")


@seam("dcp_torch_reader", base=("24a643a3c3bccd41",))
def dcp_to_torch_save(dcp_checkpoint_dir, torch_save_path, *, stream: bool = False):
    """
    Args:
        stream: If ``True``, the same file is written one tensor at a time, with no more than that in memory, and takes
            its name when it is complete. Default: ``False``

    Raises:
        RuntimeError: With ``stream=True``, if the checkpoint is damaged or incomplete; the text names the key.
    """
    if stream:
        from torch.distributed.checkpoint import _single_file

        reader = _single_file.ChunkReader(dcp_checkpoint_dir)
        return _single_file.save(reader, torch_save_path)
    ...
