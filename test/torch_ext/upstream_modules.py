"""Each module of ``module_db`` built, called and differentiated inside of ``with torch.device("meta"):``."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.testing._internal.common_modules import module_db
from upstream_case import Case, some
from upstream_ops import backward, to_meta


def cases(limit: int) -> Iterator[Case]:
    for info in module_db:
        for training in (True, False):
            inputs = info.module_inputs_func(
                info,
                device="cpu",
                dtype=torch.float32,
                requires_grad=True,
                training=training,
            )
            for i, one in enumerate(some(inputs, limit)):
                name = f"{info.name} {'train' if training else 'eval'} {i}"
                yield name, partial(_build_and_call, info, one, training)


def _build_and_call(info: Any, inputs: Any, training: bool) -> Any:
    build, call = inputs.constructor_input, inputs.forward_input
    build = to_meta((build.args, build.kwargs))
    call = to_meta((call.args, call.kwargs)) if call else None
    with torch.device("meta"):
        module = info.module_cls(*build[0], **build[1]).train(training)
        if call is None:
            return module
        out = module(*call[0], **call[1])
        return [module, out, backward(out, [call, list(module.parameters())])]
