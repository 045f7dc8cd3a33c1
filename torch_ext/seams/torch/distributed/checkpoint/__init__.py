"""Public names that torch.distributed.checkpoint gets."""

from torch.distributed.checkpoint.torch_save_reader import TorchSaveReader

from torch_ext.seams import exports


exports("dcp_torch_reader", "TorchSaveReader")
