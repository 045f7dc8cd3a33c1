"""Initialize the modules that have something on meta: each of them once, and nothing that has its values already.

What is on meta gets memory as ``to_empty(skip_materialized=True)`` gives it, and then ``init`` is called with one
module after the other. A module takes a turn if a parameter or buffer of its own is still without values; what it has
already, be it from a checkpoint, from a wrapper or from the turn of a module that it is tied to, ``init`` sees as a
copy, so that it stays the very tensor with the very values. As FSDP asks of it, ``init`` is to look after what the
module itself has.

Of a DTensor that ``fully_shard`` or ``distribute_tensor`` cut on meta, ``init`` sees the whole tensor, for the time of
its turn, and the rank keeps its part. So all ranks have to start from the same state of the generator, and compute
what an unsharded model would have; the random ops of DTensor, which do not, are not used (#196562).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.modules._to_empty import Fill, own, own_dicts
from torch.types import Device
from torch.utils._sharded_meta import is_sharded, local_of, Part, part_of
from torch.utils._swap_meta import is_on_meta


Init = Callable[[Module], None]


def reset_parameters(module: Module) -> None:
    """The default of ``init``."""
    module.reset_parameters()  # type: ignore[operator]


def check_can_reset(modules: Mapping[str, Module]) -> None:
    """Raise if one of ``modules``, by name, has no ``reset_parameters``."""
    lacking = [
        f"{name or 'the module'} ({type(module).__name__})"
        for name, module in modules.items()
        if not callable(getattr(module, "reset_parameters", None))
    ]
    if lacking:
        raise RuntimeError(
            "Expected modules that have parameters or buffers of their own on meta to have a reset_parameters() "
            f"method, got none of {', '.join(lacking)}. (Did you mean to pass init_fn, or to use deferred_init?)"
        )


def initialize(
    modules: Sequence[Module],
    device: Device,
    init: Init,
    overwritable: Iterable[Tensor] = (),
) -> None:
    """Give memory to what ``modules`` themselves have on meta, and initialize it; or raise, and leave it on meta.

    Args:
        overwritable: tensors that have values, which ``init`` sees and may replace.
    """
    turns = Turns(modules, overwritable)
    turns.show_whole()
    fill = Fill(modules, device)
    try:
        # NB: the innermost first, so that what looks after others' parameters (FSDP) finds them there.
        for module in reversed(modules):
            if turns.has_come(module):
                module._apply(fill, recurse=False)
        with torch.no_grad():
            turns.take(init)
    except BaseException:
        fill.undo()
        raise


class Turns:
    """Which of ``modules`` are to be initialized: those that have something on meta now."""

    def __init__(
        self, modules: Iterable[Module], overwritable: Iterable[Tensor] = ()
    ) -> None:
        self._modules = list(modules)
        tensors = {id(t): t for m in self._modules for t in own(m)}
        open_ = set(map(id, overwritable))
        self._done = {
            key: t for key, t in tensors.items() if not (is_on_meta(t) or key in open_)
        }
        self._parts: dict[int, Part] = {}
        self._coming = {m for m in self._modules if self.has_come(m)}

    def show_whole(self) -> None:
        """Let ``init`` see the whole of each tensor of which this rank has a part that is on meta now."""
        for tensor in {t for m in self._coming for t in own(m) if is_on_meta(t)}:
            if is_sharded(tensor) and (part := part_of(tensor)) is not None:
                self._parts[id(tensor)] = part

    def has_come(self, module: Module) -> bool:
        """Whether ``module`` has something that was on meta and did not have a turn."""
        return any(id(t) not in self._done for t in own(module))

    def take(self, init: Init, containers: bool = False) -> None:
        """Call ``init`` with each module when its turn has come.

        Args:
            containers: also with a module that has nothing of its own, unless all below it has its values already.
        """
        for module in self._modules:
            if self.has_come(module):
                with self._shown(module):
                    init(module)
            elif containers and self._is_open(module):
                init(module)
            self._done.update((id(t), t) for t in own(module))

    def _is_open(self, module: Module) -> bool:
        """Whether a module with nothing of its own has nothing below it, either, or something that takes a turn."""
        if next(own(module), None) is not None:
            return False
        below = list(module.modules())
        nothing = all(next(own(m), None) is None for m in below)
        return nothing or not self._coming.isdisjoint(below)

    @contextmanager
    def _shown(self, module: Module) -> Iterator[None]:
        """Let ``module`` have copies of what has its values, and the whole of what is sharded."""
        shown: dict[int, Tensor] = {}
        there = [
            (tensors, key, tensor)
            for tensors in own_dicts(module)
            for key, tensor in tensors.items()
            if tensor is not None
            and (id(tensor) in self._done or id(tensor) in self._parts)
        ]
        for tensors, key, tensor in there:
            if id(tensor) not in shown:
                shown[id(tensor)] = self._stand_in(tensor)
            tensors[key] = shown[id(tensor)]
        try:
            yield
            for tensors, key, tensor in there:
                made = tensors[key]
                if id(tensor) not in self._done and made is not None:
                    _keep_part(tensor, made, self._parts[id(tensor)])
        finally:
            for tensors, key, tensor in there:
                tensors[key] = tensor

    def _stand_in(self, tensor: Tensor) -> Tensor:
        part = self._parts.get(id(tensor))
        with torch.no_grad():
            if part is not None:
                made = torch.zeros_like(part.whole, device=local_of(tensor).device)
            elif is_sharded(tensor):  # NB: its values are on all ranks
                made = local_of(tensor).new_zeros(tensor.shape)
            else:
                made = tensor.detach().clone()
        if isinstance(tensor, Parameter):
            return Parameter(made, tensor.requires_grad)
        return made


def _keep_part(tensor: Tensor, made: Tensor, part: Part) -> None:
    """Copy what the rank has of ``made`` to ``tensor``."""
    if made.shape != tensor.shape:
        raise RuntimeError(
            f"Expected a sharded parameter of shape {list(tensor.shape)} to be initialized in that shape, got "
            f"{list(made.shape)}."
        )
    with torch.no_grad():
        local_of(tensor).copy_(part.of(made.detach()))
