"""Seams of torch/random.py: who asks in a deferred_init is told the state of eager construction."""

import sys

from torch_ext.seams import seam


@seam("deferred_init", base=("e5b84a1c37d94ca6",))
def get_rng_state():
    outside = sys.modules.get("torch.nn.utils._deferred_init._outside")
    if outside is not None:
        outside.sync_default_generator()
    ...


@seam("deferred_init", base=("fd1f2ff2e00afbb8",))
def initial_seed():
    outside = sys.modules.get("torch.nn.utils._deferred_init._outside")
    if outside is not None:
        outside.sync_default_generator()
    ...
