"""Seams of torch/serialization.py."""

from torch_ext.seams import seam


@seam(
    "load_lazy",
    base=("77a5bffdf627cb8e", "df00a66c3659c3fb", "a546c242c3e7c534"),
)
def load(
    f,
    map_location=None,
    pickle_module=None,
    *,
    weights_only=None,
    mmap=None,
    lazy: bool = False,
    **pickle_load_args,
):
    """load(f, map_location=None, pickle_module=pickle, *, weights_only=True, mmap=None, lazy=False, **pickle_load_args)

    Args:
        lazy: If ``True``, no tensor data are read: the tensors lie in a private mapping of the file, of which the
            system reads what is used, when it is used. Writes to a tensor do not reach the file. ``f`` must be the
            path of a zip file written by :func:`torch.save`, and :attr:`map_location` ``None`` or the CPU. The
            file must not be truncated or overwritten while a tensor of it lives. Default: ``False``

    Example:
        >>> # xdoctest: +SKIP("undefined filepaths")
        # Open a file at once, whatever its size, and read the first ten rows of one tensor
        >>> state_dict = torch.load("model.pt", lazy=True)
        >>> state_dict["embedding.weight"][:10].clone()
    """
    if lazy:
        from torch import _load_lazy

        return _load_lazy.load(
            f,
            map_location,
            pickle_module,
            weights_only=weights_only,
            mmap=mmap,
            **pickle_load_args,
        )
    ...


@seam("load_lazy", base=("4fc94ef0c93459c1",))
def save(
    obj,
    f,
    pickle_module=pickle,
    pickle_protocol=DEFAULT_PROTOCOL,
    _use_new_zipfile_serialization=True,
    _disable_byteorder_record=False,
):
    """
    .. note::
        A file that is open with ``torch.load(lazy=True)`` is not written over: a new file is written beside it, and
        takes its name, mode and owner once it is complete. Tensors that were loaded from the old one keep their values.
    """
    if "torch._load_lazy" in sys.modules:  # else no file is lazily open
        from torch._load_lazy import _save_over

        if _save_over.is_open(f):
            return _save_over.save(
                obj,
                f,
                pickle_module,
                pickle_protocol,
                _use_new_zipfile_serialization,
                _disable_byteorder_record,
            )
    ...
