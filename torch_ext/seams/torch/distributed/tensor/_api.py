"""Seams of torch/distributed/tensor/_api.py."""

from torch.utils import _sharded_meta
from torch.utils._swap_meta import is_on_meta

from torch_ext.seams import seam


@seam("materialize_sharded", base=("dbfb2d9e3051fb87", "876cd47a258314e4"))
def distribute_tensor(tensor, device_mesh=None, placements=None, *, src_data_rank=0):
    if is_on_meta(tensor):
        sharded = _sharded_meta.distribute(
            tensor, device_mesh, placements, src_data_rank
        )
        if sharded is not None:
            return sharded
    ...
