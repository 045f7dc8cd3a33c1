"""Seams of torch/nn/modules/module.py."""

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
                copying load (the same :class:`~torch.nn.Parameter` objects, dtypes, ties, hooks
                and optimizer references), but where shape, dtype, device and strides agree its
                memory *is* that of the state dict's tensor and nothing is copied. What is on
                the meta device takes the device of the state dict's tensor. A call that raises
                leaves the module as it was. The result also has ``reused``, ``converted`` and
                ``still_meta``: tuples of the keys that share memory, were copied, and are on
                the meta device even now. Not with ``assign=True``. Default: ``False``

        Example::

            >>> with torch.device("meta"):
            ...     m = torch.nn.Linear(2, 3)
            >>> sd = {"weight": torch.ones(3, 2), "bias": torch.zeros(3)}
            >>> m.load_state_dict(sd, reuse_tensors=True)
            <All keys matched successfully>
            >>> m.weight.data_ptr() == sd["weight"].data_ptr()
            True
        """
        from torch.nn.modules import _reuse_tensors

        load = _reuse_tensors.load_state_dict if reuse_tensors else _reuse_tensors.load
        return load(self, state_dict, strict=strict, assign=assign)

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
        if skip_materialized:
            from torch.nn.modules import _to_empty

            return _to_empty.to_empty(self, device=device, recurse=recurse)
        ...
