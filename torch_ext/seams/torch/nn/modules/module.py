"""Seams of torch/nn/modules/module.py."""

import sys

from torch_ext.seams import seam


class Module:
    @seam(
        "load_state_dict_reuse_tensors", base=("9bb6d5641623b62e", "f6b764e6771880c2")
    )
    def load_state_dict(
        self, state_dict, strict=True, assign=False, *, reuse_tensors: bool = False
    ):
        """
        Args:
            reuse_tensors (bool, optional): when ``True``, the module is afterwards as after the
                copying load (the same :class:`~torch.nn.Parameter` objects, dtypes, ties, hooks,
                gradients and optimizer references), but where shape, dtype, device and strides
                agree its memory *is* that of the state dict's tensor and nothing is copied; the
                table below has each case. A call that raises leaves the module as it was. Not
                with ``assign=True``. Default: ``False``

        Returns:
                * With ``reuse_tensors=True`` it also has ``reused``, ``converted`` and
                    ``still_meta``: tuples of the keys that share memory with the state dict, of
                    those that were copied, and of the parameters and buffers, non-persistent
                    ones included, that are on the meta device even now.

        With ``reuse_tensors=True``, the first line that applies says what becomes of a tensor:

        ========================================= =================== ======================================
        in the module                             in the state dict   outcome
        ========================================= =================== ======================================
        any                                       no tensor, or of    an error, as without it
                                                  another shape
        not on meta                               on meta             an error, as without it
        on meta                                   on meta             ``still_meta``; an error if strict
        any                                       its own memory      nothing to do: ``reused``
        of a class with operations of its own     any                 its own ``copy_``: ``converted``
        any                                       of such a class     ``copy_``: ``converted``
        seen by a view, an array, another process any                 copied to where it is: ``converted``
        with gaps in its memory                   any                 copied to where it is: ``converted``
        not on meta                               alike, not taken    takes that memory: ``reused``
        not on meta                               other               copied to where it is: ``converted``
        on meta, tied to others by memory         alike, and that of  all of them take it: ``reused``
                                                  all of them
        on meta, tied to others by memory         other               copied to memory of their own, tied
                                                                      as before: ``converted``
        on meta                                   alike, not taken    takes that memory: ``reused``
        on meta                                   other               copied to memory of its own, on the
                                                                      source's device: ``converted``
        any                                       missing             as without it; ``still_meta`` if on
                                                                      meta
        ========================================= =================== ======================================

        *Alike* means of the same dtype, device and strides. Memory is *taken* by the first tensor that
        reuses it and as long as that one lives; so of two modules that load one state dict, or one mapped
        file, the second one gets copies, and neither sees what is written to the other. A state dict does
        see what is written to the module that took its memory, and so does the module whose
        ``state_dict()`` it is; a privately mapped file does not. All of this is so as well if modules
        are loaded at the same time in several threads.

        Example::

            >>> with torch.device("meta"):
            ...     m = torch.nn.Linear(2, 3)
            >>> sd = {"weight": torch.ones(3, 2), "bias": torch.zeros(3)}
            >>> result = m.load_state_dict(sd, reuse_tensors=True)
            >>> result
            <All keys matched successfully>
            >>> result.reused
            ('weight', 'bias')
            >>> m.weight.data_ptr() == sd["weight"].data_ptr()
            True
        """
        if reuse_tensors:
            from torch.nn.modules._reuse_tensors import load_state_dict

            return load_state_dict(self, state_dict, strict=strict, assign=assign)
        from torch.nn.modules._load_state_dict import load

        def load_own(module, *args):  # in this file, where its warnings come from
            module._load_from_state_dict(*args)

        return load(self, state_dict, strict=strict, assign=assign, load_own=load_own)

    @seam("to_empty_skip_materialized", base=("059c906956373894",))
    def to_empty(self, *, device, recurse=True, skip_materialized: bool = False):
        """
        Args:
            skip_materialized (bool): when ``True``, a tensor that is not on the meta device stays
                the very tensor that it is, and one on the meta device gets memory and stays the
                same object, with its ties, attributes and hooks. Integers and booleans, such as
                ``num_batches_tracked``, become zero; anything else is uninitialized. Default:
                ``False``
        """
        from torch.nn.modules import _to_empty

        if skip_materialized or _to_empty.skips():
            return _to_empty.to_empty(self, device=device, recurse=recurse)
        ...

    @seam("to_empty_skip_materialized", base=("c794bb38d69f5b78",))
    def _apply(self, fn, recurse=True):
        # NB: the class is asked, since a mock and an object with __getattr__ have every attribute.
        if hasattr(type(fn), "_apply_to_module"):  # changes tensors in place
            return fn._apply_to_module(self, recurse)
        ...

    @seam("deferred_init", base=("c794bb38d69f5b78",))
    def _apply(self, fn, recurse=True):
        outside = sys.modules.get("torch.nn.utils._deferred_init._outside")
        if outside is not None:
            fn = outside.naming_the_remedy(self, fn)
        ...
