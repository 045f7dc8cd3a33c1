# Owner(s): ["module: python frontend"]
"""Factories that take a ``device=``."""

import re

import numpy as np
import torch
from torch.testing._internal.common_utils import subtest


X = torch.arange(6.0).reshape(2, 3)
CSR = ([0, 1], [0], [1.0], (1, 2))

# Their arguments tell the values.
CONSTANTS = {
    "zeros": lambda **kw: torch.zeros(2, **kw),
    "ones": lambda **kw: torch.ones(2, **kw),
    "full": lambda **kw: torch.full((2,), 3.0, **kw),
    "eye": lambda **kw: torch.eye(2, **kw),
    "arange": lambda **kw: torch.arange(3, **kw),
    "linspace": lambda **kw: torch.linspace(0, 1, 3, **kw),
    "logspace": lambda **kw: torch.logspace(0, 1, 3, **kw),
    "tensor": lambda **kw: torch.tensor([1.0, 2.0], **kw),
    "as_tensor": lambda **kw: torch.as_tensor(np.ones(2), **kw),
    "as_tensor, of a tensor": lambda **kw: torch.as_tensor(X, **kw),
    "asarray": lambda **kw: torch.asarray([1.0], **kw),
    "scalar_tensor": lambda **kw: torch.scalar_tensor(1.0, **kw),
    "tril_indices": lambda **kw: torch.tril_indices(2, 3, **kw),
    "triu_indices": lambda **kw: torch.triu_indices(2, 3, **kw),
    "bartlett_window": lambda **kw: torch.bartlett_window(3, **kw),
    "blackman_window": lambda **kw: torch.blackman_window(3, **kw),
    "hamming_window": lambda **kw: torch.hamming_window(3, **kw),
    "hann_window": lambda **kw: torch.hann_window(3, **kw),
    "kaiser_window": lambda **kw: torch.kaiser_window(3, **kw),
    "fftfreq": lambda **kw: torch.fft.fftfreq(3, **kw),
    "rfftfreq": lambda **kw: torch.fft.rfftfreq(3, **kw),
}
FACTORIES = CONSTANTS | {
    "empty": lambda **kw: torch.empty(2, **kw),
    "empty_permuted": lambda **kw: torch.empty_permuted((2, 3), (1, 0), **kw),
    "empty_strided": lambda **kw: torch.empty_strided((2, 3), (1, 2), **kw),
    "rand": lambda **kw: torch.rand(2, **kw),
    "randn": lambda **kw: torch.randn(2, **kw),
    "randint": lambda **kw: torch.randint(9, (2,), **kw),
    "randperm": lambda **kw: torch.randperm(3, **kw),
    "rand, generator": lambda **kw: torch.rand(2, generator=torch.Generator(), **kw),
    "normal": lambda **kw: torch.normal(0.0, 1.0, (2,), **kw),
    "tensor, requires_grad": lambda **kw: torch.tensor(1.0, requires_grad=True, **kw),
    "signal.windows.hann": lambda **kw: torch.signal.windows.hann(3, **kw),
    "sparse_coo": lambda **kw: torch.sparse_coo_tensor([[0]], [1.0], (2,), **kw),
    "sparse_csr": lambda **kw: torch.sparse_csr_tensor(*CSR, **kw),
    "empty_like": lambda **kw: torch.empty_like(X, **kw),
    "zeros_like": lambda **kw: torch.zeros_like(X, **kw),
    "ones_like": lambda **kw: torch.ones_like(X, **kw),
    "full_like": lambda **kw: torch.full_like(X, 2.0, **kw),
    "rand_like": lambda **kw: torch.rand_like(X, **kw),
    "randn_like": lambda **kw: torch.randn_like(X, **kw),
    "randint_like": lambda **kw: torch.randint_like(X, 9, **kw),
    "new_empty": lambda **kw: X.new_empty(2, **kw),
    "new_empty_strided": lambda **kw: X.new_empty_strided((2,), (1,), **kw),
    "new_zeros": lambda **kw: X.new_zeros(2, **kw),
    "new_ones": lambda **kw: X.new_ones(2, **kw),
    "new_full": lambda **kw: X.new_full((2,), 3.0, **kw),
    "new_tensor": lambda **kw: X.new_tensor([1.0], **kw),
}


def by_name(factories):
    return [subtest(f, name=re.sub(r"\W+", "_", n)) for n, f in factories.items()]
