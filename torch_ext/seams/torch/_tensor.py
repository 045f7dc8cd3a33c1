"""Seams of torch/_tensor.py.

Where no context was ever opened in this process, nothing is deferred, and nothing is imported here.
"""

import sys

from torch_ext.seams import seam


class Tensor:
    @seam("deferred_init", base=("76b9363a13f19aa5",))
    def __deepcopy__(self, memo):
        outside = sys.modules.get("torch.nn.utils._deferred_init._outside")
        if outside is not None:
            if outside.answers(self):
                return outside.deepcopy_tensor(self, memo)
        ...

    @seam("deferred_init", base=("d6316c5f342217a7",))
    def __reduce_ex__(self, proto):
        outside = sys.modules.get("torch.nn.utils._deferred_init._outside")
        if outside is not None:
            if outside.is_recorded(self):
                self = outside.to_pickle(self)
        ...
