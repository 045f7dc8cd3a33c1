"""The queue: every patch in the order in which it applies, each to be deleted once the minimum torch has it.

An entry tells what the patch is for and which files it brings. Its seams are found by its name below ``seams/``.
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Patch:
    """One change to PyTorch core.

    Attributes:
        name: what :func:`torch_ext.enable` takes.
        subject: first line of the commit message, in core's style.
        summary: what core gets, in one line, as the README's table shows it.
        rationale: body of the commit message.
        files: new files by upstream path; a folder stands for all Python files below it.
        tests: test files by their path in the repository, which is also their path in pytorch.
        requires: names of earlier patches that this one builds on.
        rfc: path of the RFC in the repository.
        root: the folder with the patch's ``seams/`` and ``overlay/``; tests and RFCs lie beside it.
    """

    name: str
    subject: str
    summary: str
    rationale: str
    files: tuple[str, ...]
    tests: tuple[str, ...]
    requires: tuple[str, ...] = ()
    rfc: str = ""
    root: Path = Path(__file__).parent


series: tuple[Patch, ...] = (
    Patch(
        name="load_lazy",
        subject="[serialization] Add torch.load(lazy=True), which reads no tensor data",
        summary="`torch.load(f, lazy=True)`: what `torch.load(f)` returns, with no tensor data read",
        rationale="""\
torch.load reads every byte of a checkpoint; torch.load(mmap=True) does not,
but opens only local zip files, spends most of its time in a pure-Python
unpickler and in per-tensor lookups, and takes a record's size on trust. With
lazy=True, every offset and size is checked, the file is mapped once, its
pickle is read by a small reader that knows a few inert globals and calls
nothing else, and plain tensors are made over the mapping. What the reader does
not know goes to torch's own unpickler, under the allow-list of weights_only.
What cannot be mapped becomes a deferred tensor, which reads the bytes that it
needs at its first use. torch.save onto a file that is lazily open writes
beside it and renames.""",
        files=("torch/_load_lazy",),
        tests=(
            "test/load_lazy_case.py",
            "test/load_lazy_corpus/__init__.py",
            "test/load_lazy_corpus/build.py",
            "test/load_lazy_corpus/calls.py",
            "test/load_lazy_corpus/case.py",
            "test/load_lazy_corpus/containers.py",
            "test/load_lazy_corpus/directories.py",
            "test/load_lazy_corpus/files.py",
            "test/load_lazy_corpus/legacy.py",
            "test/load_lazy_corpus/opcodes.py",
            "test/load_lazy_corpus/safetensors.py",
            "test/load_lazy_corpus/tensors.py",
            "test/load_lazy_files.py",
            "test/load_lazy_judge.py",
            "test/op_tables.py",
            "test/test_load_lazy.py",
            "test/test_load_lazy_bad_files.py",
            "test/test_load_lazy_deferred.py",
            "test/test_load_lazy_deferred_law.py",
            "test/test_load_lazy_deferred_tables.py",
            "test/test_load_lazy_deferred_use.py",
            "test/test_load_lazy_formats.py",
            "test/test_load_lazy_fuzz.py",
            "test/test_load_lazy_invariants.py",
            "test/test_load_lazy_legacy.py",
            "test/test_load_lazy_locations.py",
            "test/test_load_lazy_lease.py",
            "test/test_load_lazy_mapped.py",
            "test/test_load_lazy_no_checkpoint.py",
            "test/test_load_lazy_other_tensors.py",
            "test/test_load_lazy_processes.py",
            "test/test_load_lazy_read.py",
            "test/test_load_lazy_safetensors.py",
            "test/test_load_lazy_save_over.py",
            "test/test_load_lazy_sharded.py",
            "test/test_load_lazy_source.py",
        ),
        rfc="rfcs/RFC-0001-lazy-torch-load.md",
    ),
    Patch(
        name="to_empty_skip_materialized",
        subject="[nn] Add Module.to_empty(skip_materialized=True)",
        summary="`Module.to_empty(skip_materialized=True)`: what is not on meta stays as it is, ties are kept",
        rationale="""\
Nested wrappers materialize bottom-up, and a parent's to_empty wipes what a
child just initialized (#90465, #104187). With skip_materialized=True only
tensors on meta get memory. They stay the same objects, so ties, hooks and
optimizers that refer to them stay valid; DTensors do, too. Module._apply lets
what it is called with exchange tensors in place, so that whatever overrides
of it do around that is done.""",
        files=(
            "torch/nn/modules/_init_once.py",
            "torch/nn/modules/_to_empty.py",
            "torch/utils/_sharded_meta.py",
            "torch/utils/_swap_meta.py",
        ),
        tests=("test/nn/test_to_empty_skip_materialized.py",),
    ),
    Patch(
        name="load_state_dict_reuse_tensors",
        subject="[nn] Add Module.load_state_dict(reuse_tensors=True)",
        summary="`Module.load_state_dict(sd, reuse_tensors=True)`: the copying load, without the copy",
        rationale="""\
load_state_dict(assign=True) avoids the copy and loses parameter identity with
it: ties, optimizers, hooks and attributes. With reuse_tensors=True the module
is as after the copying load, except that its tensors take over the memory of
the state dict's where dtype, device and strides agree; what does not is
converted one by one. Everything is checked before anything changes, and a load
that raises, be it from a hook, leaves the module as it was. The result tells
what was reused and converted, and what is still on meta.

All loads deal out the keys of a module to its children once, instead of
filtering all keys for each child (#61398, #85743, #173158), so that time is
linear in the number of tensors. Hooks and overrides get the dicts that they
always got, and the results are the same bit for bit.""",
        files=(
            "torch/nn/modules/_around_load.py",
            "torch/nn/modules/_load_state_dict.py",
            "torch/nn/modules/_reuse_tensors",
        ),
        tests=(
            "test/nn/test_reuse_tensors.py",
            "test/nn/test_reuse_tensors_compat.py",
            "test/nn/test_reuse_tensors_law.py",
            "test/nn/test_reuse_tensors_memory.py",
            "test/nn/test_reuse_tensors_table.py",
            "test/nn/test_reuse_tensors_two_modules.py",
            "test/nn/test_reuse_tensors_walk.py",
        ),
        requires=("to_empty_skip_materialized",),
        rfc="rfcs/RFC-0002-load-state-dict-reuse-tensors.md",
    ),
    Patch(
        name="load_state_dict_sharded",
        subject="[distributed] Load sharded modules from full tensors, each rank its own part",
        summary="`load_state_dict(reuse_tensors=True)` of FSDP and DTensor modules from full tensors, each rank "
        "its own part; `torch.distributed.errors.fail_together`: an error of one rank is one of all",
        rationale="""\
A sharded module loads an unsharded checkpoint by set_model_state_dict, for
which one rank, or every rank, reads the whole file, and full tensors are sent
around. With load_state_dict(reuse_tensors=True) each rank now takes its own
part of each tensor of the state dict, straight into its own memory; with
torch.load(lazy=True) only these parts are read. DTensors of any mesh (FSDP2,
tensor parallel, both) and FullyShardedDataParallel are supported. Before
anything changes the ranks agree by the store of the process group, so that all
of them load, or all raise with the cause. fail_together() does the same for
any code, so that a file that is bad on one rank is an error of all.""",
        files=("torch/distributed/_load_sharded", "torch/distributed/errors.py"),
        tests=(
            "test/distributed/load_sharded_case.py",
            "test/distributed/test_fail_together.py",
            "test/distributed/test_load_sharded.py",
            "test/distributed/test_load_sharded_fsdp1.py",
            "test/distributed/test_load_sharded_law.py",
        ),
        requires=("load_lazy", "load_state_dict_reuse_tensors"),
        rfc="rfcs/RFC-0005-sharded-load.md",
    ),
    Patch(
        name="optimizer_load_full_state",
        subject="[optim] Load full optimizer state into DTensor parameters",
        summary="`Optimizer.load_state_dict` of full tensors into DTensor parameters: each rank gets its part",
        rationale="""\
Optimizer.load_state_dict of the state of an unsharded model, with parameters
that are DTensors (fully_shard, tensor parallelism), keeps the full tensors as
they are. The next step then raises "got mixed torch.Tensor and DTensor". State
of the shape of its parameter now becomes a DTensor with the placements of the
parameter, of which each rank keeps its own part. Nothing is sent, since each
rank has the whole state dict; of torch.load(lazy=True) only the part is read.""",
        files=("torch/optim/_sharded_state.py",),
        tests=("test/distributed/test_optimizer_full_state.py",),
        requires=("load_state_dict_sharded",),
        rfc="rfcs/RFC-0005-sharded-load.md",
    ),
    Patch(
        name="deferred_init",
        subject="[nn] Add torch.nn.utils.deferred_init and meta_init",
        summary="`torch.nn.utils.deferred_init`, `materialize_module`: construct now, initialize later, bit for bit; "
        "`meta_init`: a meta context that is hard to escape",
        rationale="""\
With torch.device("meta") a constructor that names a device, uses a legacy
constructor or NumPy escapes, one that reads a value fails, and what it
computed (non-persistent buffers) is lost. meta_init() adds a function mode and
a dispatch mode under which all of it ends on meta, and values that can be
known are told. deferred_init(fn) does the same and records what is done to
each storage, so that materialize_module(deferred_init(fn)) is fn(), bit for
bit, in any order.""",
        files=("torch/nn/utils/_deferred_init",),
        tests=(
            "test/nn/test_deferred_init.py",
            "test/nn/test_deferred_init_law.py",
            "test/nn/test_deferred_init_load.py",
            "test/nn/test_deferred_init_use.py",
            "test/nn/test_meta_init.py",
            "test/nn/deferred_init_case.py",
            "test/nn/escapes.py",
            "test/nn/meta_block_case.py",
            "test/nn/test_meta_block.py",
        ),
        requires=("to_empty_skip_materialized", "load_state_dict_reuse_tensors"),
        rfc="rfcs/RFC-0003-deferred-init.md",
    ),
    Patch(
        name="device_context_meta",
        subject="[utils] Make `with torch.device('meta')` the context of meta_init",
        summary='`with torch.device("meta"):` becomes `meta_init()`: nothing escapes, and what is known is kept',
        rationale="""\
A module constructor that names a device, or uses a legacy constructor, escapes
`with torch.device("meta")`, and what it computes is lost. The context becomes
meta_init(). This changes behaviour without a new argument; the RFC says what,
why, and how to stage it.""",
        files=("torch/utils/_device_meta.py",),
        tests=(
            "test/distributed/test_meta_block_communicates.py",
            "test/utils/device_factories.py",
            "test/utils/test_device_context_constants.py",
            "test/utils/test_device_context_meta.py",
            "test/utils/test_device_context_meta_block.py",
        ),
        requires=("deferred_init",),
        rfc="rfcs/RFC-0003-deferred-init.md",
    ),
    Patch(
        name="materialize_sharded",
        subject="[distributed] Initialize sharded modules on meta once, each rank its part",
        summary="FSDP initializes each module once, however wrappers are nested; `materialize_module` gives each rank "
        "its shards of the unsharded model",
        rationale="""\
FullyShardedDataParallel empties modules that have their values already, and a
param_init_fn that calls to_empty wipes what nested wrappers sharded (#90465,
#104187). Now each module with something on meta is initialized once, and the
rest is left alone. fully_shard and distribute_tensor remember which part of
which parameter on meta a rank has, so that materialize_module gives it that
part of the values which deferred_init recorded, or reset_parameters() makes:
bit for bit those of the unsharded model, in the memory of the shards and one
whole tensor (or module), without communication, and without the random ops of
DTensor (#196562).""",
        files=("torch/distributed/fsdp/_materialize.py",),
        tests=(
            "test/distributed/fsdp/materialize_case.py",
            "test/distributed/fsdp/test_fsdp_materialize.py",
            "test/distributed/fsdp/test_fully_shard_materialize.py",
        ),
        requires=("to_empty_skip_materialized", "deferred_init"),
        rfc="rfcs/RFC-0004-materialize-sharded-modules.md",
    ),
    Patch(
        name="dcp_torch_reader",
        subject="[dcp] Add TorchSaveReader and streaming conversion to one file",
        summary="`torch.distributed.checkpoint.TorchSaveReader`: `dcp.load` from `.pt`, safetensors files, each rank "
        "reading its own pieces; `dcp_to_torch_save(stream=True)`, `dcp_to_safetensors`: one tensor in memory",
        rationale="""\
dcp.load reads a file of torch.save on one rank, whole and with
weights_only=False, and broadcasts each tensor; values that are no tensors, and
processes without a group, are refused. TorchSaveReader opens the file lazily on
each rank, so that DCP's own planner knows what is in it, and each rank reads
the bytes of its pieces straight into its shards. safetensors files, single or
sharded, are read the same way. In the other direction dcp_to_torch_save builds
the whole state dict first; with stream=True it writes the same file one
tensor at a time, and dcp_to_safetensors a safetensors file.""",
        files=(
            "torch/distributed/checkpoint/_single_file.py",
            "torch/distributed/checkpoint/torch_save_reader.py",
        ),
        tests=(
            "test/distributed/checkpoint/test_single_file.py",
            "test/distributed/checkpoint/test_torch_save_reader.py",
            "test/distributed/checkpoint/test_torch_save_reader_processes.py",
        ),
        requires=("load_lazy",),
        rfc="rfcs/RFC-0006-dcp-torch-save-reader.md",
    ),
)
