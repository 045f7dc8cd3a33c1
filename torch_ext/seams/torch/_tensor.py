"""Seams of torch/_tensor.py.

Where no context was ever opened in this process, nothing is deferred, and nothing is imported here.
"""

import sys

from torch_ext.seams import seam


class Tensor:
    @seam("deferred_init", base=("76b9363a13f19aa5",))
    def __deepcopy__(self, memo):
        if "torch.nn.utils._deferred_init._outside" in sys.modules:
            from torch.nn.utils._deferred_init import _outside

            if _outside.answers(self):
                return _outside.deepcopy_tensor(self, memo)
        ...

    @seam("deferred_init", base=("d6316c5f342217a7",))
    def __reduce_ex__(self, proto):
        if "torch.nn.utils._deferred_init._outside" in sys.modules:
            from torch.nn.utils._deferred_init import _outside

            if _outside.is_recorded(self):
                self = _outside.to_pickle(self)
        ...
