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
        lazy: If ``True``, the same objects are returned and no tensor data are read. The tensors of a local file on the
            CPU lie in a private mapping of it, of which the system reads what is used, when it is used. All others (of
            a file object, for another device, of the other byte order, with ``mmap=False``) are deferred: views and
            casts of them stay so, and the first use reads the bytes that it needs. Writes to a tensor never reach the
            file. :attr:`f` may also be a safetensors file, the index of a sharded checkpoint, or a folder that holds
            one, ``model.safetensors`` or ``pytorch_model.bin``. While a mapped tensor lives, its file
            must not be truncated or written to by others than :func:`torch.save`; where that may happen, set
            ``torch.utils.serialization.config.load.lazy_mode`` to ``"read"``, which reads a local file whole, or, on
            Linux, ``lazy_leases`` to the number of files that are to be protected by a lease. Default: ``False``

    Raises:
        RuntimeError: With ``lazy=True``, if the file is damaged or lies about itself; the text names the file, the
            record and the offset. On use of a deferred tensor, if the file was changed, moved or closed meanwhile.
        ValueError: With ``lazy=True``, if another argument asks for what is not lazy, or :attr:`f` is a URL.
        TypeError: If :attr:`lazy` is no bool.

    Example:
        >>> # xdoctest: +SKIP("undefined filepaths")
        # Open a file at once, whatever its size, and read the first ten rows of one tensor
        >>> state_dict = torch.load("model.pt", lazy=True)
        >>> state_dict["embedding.weight"][:10].clone()
        # Read one rank's rows of each tensor from a file that is not local, in another dtype
        >>> with fsspec.open("s3://bucket/model.pt", "rb") as f:
        ...     rows = {k: v[rank::world].float() for k, v in torch.load(f, lazy=True).items()}
        ...     rows = {k: v.clone() for k, v in rows.items()}
        # Read a local file whole, since another program may truncate it or write to it
        >>> import torch.utils.serialization.config
        >>> torch.utils.serialization.config.load.lazy_mode = "read"
        >>> state_dict = torch.load("model.pt", lazy=True)
    """
    if lazy is not False:
        from torch import _load_lazy

        _load_lazy.check_flag(lazy)
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
