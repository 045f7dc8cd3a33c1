"""``with torch.device("meta"):`` as :func:`torch.nn.utils.meta_init`, the context that nothing escapes.

Law: inside of the block everything that is constructed is on meta, whatever the constructor says; the innermost block
decides, so ``with torch.device("cpu"):`` inside of it is the way to a real tensor. A *default* device
(``torch.set_default_device("meta")``) is no block: as ever it fills in a missing ``device`` and overrides none.

Threads that are started inside are outside, as they always were; ``meta_init`` takes them along.
"""

from collections.abc import Callable
from typing import Any

import torch


Function = Callable[..., Any]


def block(device: Any) -> "MetaBlock | RealBlock | None":
    """What answers the calls in a block of ``device`` that opens here; None: upstream's code does.

    Raises:
        RuntimeError: ``device`` is no device.
    """
    if not isinstance(device, torch.device):
        device = torch.device(device)
    if device.type == "meta":
        return MetaBlock()
    from torch.nn.utils._deferred_init._context import deciding

    around, _ = deciding()
    return RealBlock(device) if around is not None else None


class MetaBlock:
    """A block of the meta device, as long as its DeviceContext lives.

    NB: the ``with`` statement of ``torch.device`` pushes and pops the mode in C++ and calls nothing at its end. What it
    pops was its only reference to the DeviceContext, which has the only one to this. If somebody else holds one, the
    recorder knows from the stack of modes that the block has ended.
    """

    def __init__(self) -> None:
        # NB: that imports torch.utils._device, which imports this.
        from torch.nn.utils._deferred_init import _loading  # noqa: F401
        from torch.nn.utils._deferred_init._context import OpMode, Recorder
        from torch.nn.utils._deferred_init._tape import Tape

        self.recorder = Recorder(Tape(random=False))
        self.call = self.recorder.call
        self._mode = OpMode(self.recorder)
        self._mode.put_on()
        self.recorder.open()

    def __del__(self) -> None:
        self.recorder.close()
        self._mode.take_off()


class RealBlock:
    """A block of a real device inside of other blocks: what it makes is real."""

    recorder = None

    def __init__(self, device: torch.device) -> None:
        from torch.nn.utils._deferred_init._calls import DEVICE_CONSTRUCTORS
        from torch.nn.utils._deferred_init._context import state

        self.device = device
        self._state = state
        self._constructors = DEVICE_CONSTRUCTORS

    def call(
        self,
        func: Function,
        types: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None,
    ) -> Any:
        """Call ``func`` by stock's rule, while the meta blocks around this one make nothing."""
        kwargs, state = kwargs or {}, self._state
        if state.handling is not None:
            return func(*args, **kwargs)
        if func in self._constructors and kwargs.get("device") is None:
            kwargs["device"] = self.device
        state.reals += 1
        try:
            return func(*args, **kwargs)
        finally:
            state.reals -= 1
