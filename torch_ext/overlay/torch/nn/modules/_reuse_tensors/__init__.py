r"""``Module.load_state_dict(..., reuse_tensors=True)``: the copying load, without the copy.

The law: the module is afterwards as after the copying load in every observable way
(values, dtypes, ``requires_grad``, identity of its parameters, ties, attributes, hooks,
gradients, who refers to what), but that

- where shape, dtype, device and strides agree its memory *is* the state dict's,
- what was on meta takes the device of the state dict's tensor (its dtype stays),
- any other tensor is converted by itself, straight into its final memory.

A call that raises leaves the module as it was; the state dict is never changed.

How: :mod:`._walk` finds what goes where, :mod:`._plan` decides and does it,
:mod:`._journal` makes the effects of hooks and overrides undoable.

What this does not do: a tensor subclass with operations of its own is copied to by its
own ``copy_``. What was converted in place is lost if the interpreter is interrupted then
and there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import Module
from torch.nn.modules import _around_load
from torch.nn.modules._load_state_dict import check_is_mapping, raise_errors
from torch.nn.modules._reuse_tensors._commit import commit, roll_back, Undo
from torch.nn.modules._reuse_tensors._journal import Journal
from torch.nn.modules._reuse_tensors._plain import plan_plain
from torch.nn.modules._reuse_tensors._plan import NOTHING, Plan, SAME, SHARE
from torch.nn.modules._reuse_tensors._sharding import Sharding, sharding_of
from torch.nn.modules._reuse_tensors._walk import Walk
from torch.nn.modules._to_empty import own
from torch.nn.modules.module import _IncompatibleKeys


__all__ = ["load_state_dict"]


class _LoadedKeys(_IncompatibleKeys):
    """``missing_keys`` and ``unexpected_keys``, and how the others were loaded.

    Attributes:
        reused (tuple of str): keys whose memory the module now shares.
        converted (tuple of str): keys that were copied.
        still_meta (tuple of str): parameters and buffers, non-persistent ones
            included, that are still on the meta device.
    """

    reused: tuple[str, ...] = ()
    converted: tuple[str, ...] = ()
    still_meta: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return repr(_IncompatibleKeys(*self))

    __str__ = __repr__


def load_state_dict(
    module: Module,
    state_dict: Mapping[str, Any],
    *,
    strict: bool = True,
    assign: bool = False,
) -> _LoadedKeys:
    """See :meth:`torch.nn.Module.load_state_dict` for ``reuse_tensors=True``."""
    if assign:
        raise ValueError(
            "Expected only one of assign and reuse_tensors to be True, got both. (Did you "
            "mean reuse_tensors=True alone? It keeps the module's Parameters, assign=True "
            "replaces them.)"
        )
    is_mapping = isinstance(state_dict, Mapping)
    metadata = getattr(state_dict, "_metadata", None)
    if is_mapping and type(state_dict) not in (dict, OrderedDict):
        try:
            state_dict = OrderedDict(state_dict)
        except BaseException as error:
            if (sharding := sharding_of(module)) is not None:
                sharding.agree(error)
            raise
    if not is_mapping:
        return _load(module, state_dict, metadata, strict)
    with _around_load.around_load(module, state_dict, True):
        return _load(module, state_dict, metadata, strict)


def _load(
    module: Module,
    state_dict: Mapping[str, Any],
    metadata: Mapping[str, dict[str, Any]] | None,
    strict: bool,
) -> _LoadedKeys:
    is_mapping = isinstance(state_dict, Mapping)
    planned = plan_plain(module, state_dict) if is_mapping else None
    if planned is not None:
        plan, missing = planned
        keys = _LoadedKeys(missing, [])
        errors = _still_meta(module, state_dict, plan, missing) if strict else []
        raise_errors(module, keys, errors, strict)
        undo: Undo = []
        try:
            commit(plan, undo, back_up=False)
        except BaseException:
            roll_back(undo)
            plan.claims.drop()
            raise
    else:
        keys, plan = _load_as_they_ask(module, state_dict, metadata, strict)
    _report(keys, plan)
    return keys


def _load_as_they_ask(
    module: Module,
    state_dict: Mapping[str, Any],
    metadata: Mapping[str, dict[str, Any]] | None,
    strict: bool,
) -> tuple[_LoadedKeys, Plan]:
    """Load modules some of which have hooks, overrides, odd tensors or parts of tensors."""
    sharding = sharding_of(module)
    if sharding is None:
        check_is_mapping(state_dict)
        return _walk(module, state_dict, metadata, strict, None)
    try:
        check_is_mapping(state_dict)
        with sharding.prepared():
            loaded = _walk(module, state_dict, metadata, strict, sharding)
    except BaseException as error:
        sharding.agree(error)
        raise
    sharding.finish()
    return loaded


def _walk(
    module: Module,
    state_dict: Mapping[str, Any],
    metadata: Mapping[str, dict[str, Any]] | None,
    strict: bool,
    sharding: Sharding | None,
) -> tuple[_LoadedKeys, Plan]:
    plan = Plan(module, state_dict, sharding)
    journal = Journal(plan)
    keys = _LoadedKeys([], [])
    walk = Walk(plan, journal, state_dict, metadata, keys)
    try:
        walk.run(module)
        errors = walk.error_msgs
        if strict and not errors:
            errors = _still_meta(module, state_dict, plan, keys.missing_keys)
        if sharding is not None:
            for names in (*keys, plan.keys):
                names[:] = map(sharding.clean, names)
        raise_errors(module, keys, errors, strict)
        commit(plan, journal.undo, back_up=False)
    except BaseException:
        roll_back(journal.undo)
        plan.claims.drop()
        raise
    return keys, plan


def _still_meta(
    module: Module,
    state_dict: Mapping[str, Any],
    plan: Plan,
    missing_keys: list[str],
) -> list[str]:
    """What is wrong with tensors that no key is missing for and that stay on meta."""
    on_meta = [
        (key, tensor)
        for key, tensor, persistent in plan.left
        if persistent and tensor.is_meta
    ]
    if not on_meta:
        return []
    known, to_come = set(missing_keys), plan.gets_memory()
    return [
        _why_on_meta(module, key, tensor, state_dict.get(key))
        for key, tensor in on_meta
        if key not in known and id(tensor) not in to_come
    ]


def _why_on_meta(module: Module, key: str, tensor: Tensor, source: Any) -> str:
    if not isinstance(source, Tensor) or source.is_meta:
        return (
            f'Expected "{key}" to have data after the load, got a tensor on the meta device. '
            "(Did you mean to load a state dict that is not on the meta device itself, or to "
            "call to_empty(skip_materialized=True) first?)"
        )
    # The load of its module swallows it, or the copy_ of its class does nothing on meta.
    owners = [m for m in module.modules() if any(t is tensor for t in own(m))]
    owner = type(owners[0]).__name__ if owners else "its module"
    return (
        f'Expected the load of "{key}" by {owner} to give it data, got a {type(tensor).__name__} that is still on the '
        "meta device. Construct it on a real device, or call to_empty(skip_materialized=True) first."
    )


def _report(keys: _LoadedKeys, plan: Plan) -> None:
    keys.still_meta = tuple(key for key, tensor, _ in plan.left if tensor.is_meta)
    if plan.all_alike:
        keys.reused = tuple(plan.keys)
        plan.claims.finish(plan.targets, plan.sources)
        return
    reused, converted = [], []
    taken: tuple[list[Tensor], list[Tensor]] = [], []
    for key, target, source in zip(plan.keys, plan.targets, plan.sources, strict=True):
        how = plan.outcome.get(id(target))
        # NB: of a tie whose keys differ only the last one has its memory in the module.
        if (how is SHARE or how is SAME) and target.data_ptr() == source.data_ptr():
            reused.append(key)
            if how is SHARE:
                taken[0].append(target)
                taken[1].append(source)
        elif how is not NOTHING:
            converted.append(key)
    keys.reused, keys.converted = tuple(reused), tuple(converted)
    plan.claims.finish(*taken)
