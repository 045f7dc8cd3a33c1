"""Seams of torch/utils/serialization/config.py."""

from torch_ext.seams import seam


@seam("load_lazy", base=("3be68a06dbb7991d",))
class load:
    # How torch.load(lazy=True) gets at a local file's bytes: "map" maps the file, "read" reads all of it at once, in
    # several threads, so that what happens to the file later is of no concern.
    lazy_mode: str = "map"

    # Of how many mapped files at a time a lease is held, with a descriptor each (Linux). A lease lets tensors outlive a
    # change of their file by anybody: who opens it for writing waits until what is in use has moved to memory. 0: none.
    # NB: who keeps the GIL while it opens the file for writing waits for 45 seconds, and the file is not protected.
    lazy_leases: int = 0
