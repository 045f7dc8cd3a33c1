"""Seams of torch/distributed/fsdp/_fully_shard/_fsdp_param.py."""

from torch.utils._sharded_meta import note_fsdp_shard
from torch.utils._swap_meta import is_on_meta

from torch_ext.seams import seam


class FSDPParam:
    @seam("materialize_sharded", base=("881a1ac7c04f6f03",))
    def _setattr_on_modules(self, param):
        if is_on_meta(param):
            note_fsdp_shard(self, param)
        ...
