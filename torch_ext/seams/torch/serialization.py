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
