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

What this does not do: pre-hooks and overrides run before the plain modules next to them
have their new values (and before these read a state dict made of the module's own memory);
post-hooks run when all have. A tensor subclass with operations of
its own is copied to by its own ``copy_``. What was converted in place is lost if the
interpreter is interrupted then and there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.nn import Module
from torch.nn.modules._reuse_tensors._journal import Journal
from torch.nn.modules._reuse_tensors._plan import NOTHING, Plan, SAME, SHARE
from torch.nn.modules._reuse_tensors._walk import Walk
from torch.nn.modules.module import _IncompatibleKeys


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
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"Expected state_dict to be dict-like, got {type(state_dict)}.")
    plan = Plan(module)
    journal = Journal(plan)
    walk = Walk(plan, journal, state_dict)
    try:
        walk.run(module)
        if strict:
            walk.error_msgs += map(_still_meta, plan.not_loaded)
        if walk.post_hooks:
            plan.commit(journal.undo, back_up=True)
            _run_post_hooks(walk, journal)
            _raise_errors(module, walk, strict)
        else:
            _raise_errors(module, walk, strict)
            plan.commit(journal.undo, back_up=False)
    except BaseException:
        journal.roll_back()
        raise
    return _report(walk, plan)


def _still_meta(key: str) -> str:
    return (
        f'Expected "{key}" to have data after the load, got a tensor on the meta device. '
        "(Did you mean to load a state dict that is not on the meta device itself, or to "
        "call to_empty(skip_materialized=True) first?)"
    )


def _run_post_hooks(walk: Walk, journal: Journal) -> None:
    """Call each post-hook with the keys that upstream would call it with."""
    missing, unexpected = walk.missing_keys[:], walk.unexpected_keys[:]
    # NB: hooks edit these two lists, to forgive keys for instance.
    walk.missing_keys.clear()
    walk.unexpected_keys.clear()
    keys = _IncompatibleKeys(walk.missing_keys, walk.unexpected_keys)
    i = j = 0
    for module, missing_by_now, unexpected_by_now in walk.post_hooks:
        walk.missing_keys += missing[i:missing_by_now]
        walk.unexpected_keys += unexpected[j:unexpected_by_now]
        i, j = missing_by_now, unexpected_by_now
        for hook in module._load_state_dict_post_hooks.values():
            with journal.watching(module):
                out = hook(module, keys)
            if out is not None:
                raise AssertionError(
                    "Hooks registered with ``register_load_state_dict_post_hook`` are not "
                    "expected to return new values, if incompatible_keys need to be modified, "
                    "it should be done inplace."
                )
    walk.missing_keys += missing[i:]
    walk.unexpected_keys += unexpected[j:]


def _raise_errors(module: Module, walk: Walk, strict: bool) -> None:
    errors = walk.error_msgs[:]
    if strict:
        for which, keys in (
            ("Unexpected", walk.unexpected_keys),
            ("Missing", walk.missing_keys),
        ):
            if keys:
                quoted = ", ".join(f'"{key}"' for key in keys)
                errors.insert(0, f"{which} key(s) in state_dict: {quoted}. ")
    if errors:
        listed = "\n\t".join(errors)
        raise RuntimeError(
            f"Error(s) in loading state_dict for {type(module).__name__}:\n\t{listed}"
        )


def _report(walk: Walk, plan: Plan) -> _LoadedKeys:
    result = _LoadedKeys(walk.missing_keys, walk.unexpected_keys)
    reused, converted = [], []
    for key, tensor, source in plan.loaded:
        how = plan.outcome.get(id(tensor))
        shares = how is SHARE or how is SAME
        # NB: of a tie whose keys differ only the last one has its memory in the module.
        if shares and tensor.data_ptr() == source.data_ptr():
            reused.append(key)
        elif how is not NOTHING:
            converted.append(key)
    result.reused, result.converted = tuple(reused), tuple(converted)
    meta = [key for key, tensor in plan.left if tensor.is_meta]
    result.still_meta = tuple(dict.fromkeys(plan.not_loaded + meta))
    return result
