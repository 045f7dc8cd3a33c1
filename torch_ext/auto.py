"""``import torch_ext.auto`` enables the whole series, for experiments that can spare one line only."""

import torch_ext


torch_ext.enable()
