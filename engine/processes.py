r"""Distributed training: the calls by which the processes of one run exchange data.

    torchrun --nproc-per-node 8 train.py mae --data DIR         all GPUs of one machine
    torchrun --nproc-per-node 8 --nnodes 4 --rdzv-backend c10d \
        --rdzv-endpoint HOST:29500 train.py mae ...             several machines
    python train.py mae ...                                     one process: no communication

Dropout (attention.py), batch statistics (batch_norm.py) and the contrastive loss (clip_video.py)
depend on the global batch, which is the batches of all processes together.

W processes with B clips each take the same step as one process with W * B clips: loss and gradients
are equal within rounding. DDP alone does not guarantee that. Five parts are needed:
1. Clips: at step k, process r has rows r*B to r*B + B - 1 of the global batch (data.batches).
2. Random numbers: each process draws those of the global batch from the same generator and keeps
   its own rows (`joined`). They are a function of (seed, step, row) alone.
3. Losses: a loss that compares rows first gathers them, with gradient (`gather_with_gradient`). So
   do batch statistics. A mean over words divides by the mean count of all processes (`mean`). The
   mean of these quotients over processes is the quotient of the sums.
4. Gradients: DDP or FSDP2 averages them over processes (`parallel`). FSDP2 also splits weights,
   gradients and optimiser states into W parts.
5. Evaluation: each process measures some of the batches, and `gather_rows` joins the results in the
   order of the batches. The result is the same for any W, and every clip counts once.

Where we differ from official code: official loaders pad the last batch of an evaluation, so some
clips count twice (VideoMAE engine_for_finetuning.py).

Two or four gloo processes agree with one to 1e-6 in every stage (tests/test_processes.py).

>>> rank(), world(), global_rows(4), mean(torch.tensor(3.0)).item()
(0, 1, (4, slice(0, 4, None)), 3.0)
"""

import contextlib
import errno
import io
import json
import os
import pickle
import shutil
import zlib
from collections import OrderedDict
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate


def world():
    """Number of processes of this run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    """Index of this process, 0 to world() - 1. Only process 0 prints and writes."""
    return dist.get_rank() if world() > 1 else 0


def is_distributed():
    """True where torchrun started several processes, also before they are connected (`start`)."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def start(device):
    """Connect to the other processes, if there are several -> the device of this process.

    device  "cpu", "cuda" or "cuda:N"; each of several processes on a machine takes its own GPU
    """
    if not is_distributed():
        return device
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if device.startswith("cuda"):
        device = f"cuda:{local_rank}"
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    return device


def wait():
    """Wait until all processes have reached this call."""
    if world() > 1:
        dist.barrier()


def end():
    """Disconnect from the other processes, at the end of the program."""
    if world() > 1:
        dist.destroy_process_group()


def first_to_print(text):
    """True for the first process that calls this with the text, so that an error prints once."""
    if not is_distributed():
        return True
    try:  # torchrun has a key-value store for its processes
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]),
                              is_master=False)
        return store.add(f"said {zlib.crc32(text.encode())}", 1) == 1
    except (RuntimeError, ValueError):
        return True


# ------------------------------------------------------------------------------------------------
# The global batch


def global_rows(count):
    """(W * B, slice): number of rows of the global batch, and the rows that this process computes.

    count  rows to compute: B, or fewer inside a `piece`
    """
    total, first = _piece or (count, 0)
    first += rank() * total
    return world() * total, slice(first, first + count)


_piece = None


@contextlib.contextmanager
def piece(total, first):
    """Context in which only some of this process's `total` rows are computed, from `first` on.

    Random numbers are still drawn for all rows.
    """
    global _piece
    _piece, before = (total, first), _piece
    try:
        yield
    finally:
        _piece = before


def mean(x):
    """Mean of a tensor over all processes, without gradient. With one process: x itself."""
    if world() == 1:
        return x
    x = x.detach().clone()
    dist.all_reduce(x)
    return x / world()


def means(numbers, device="cpu"):
    """{name: number} -> means over all processes. All must have the same names."""
    if world() == 1:
        return dict(numbers)
    values = torch.tensor(list(map(float, numbers.values())), dtype=torch.float64, device=device)
    return dict(zip(numbers, mean(values).tolist()))


class Gather(torch.autograd.Function):
    """The autograd function of `gather_with_gradient`."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(world())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad.chunk(world())[rank()]


def gather_with_gradient(x):
    """x (B, ...) of every process, concatenated by rank: (W*B, ...). With one process: x itself.

    The backward pass sums the gradients of all processes for this process's rows. Each process
    computes the loss of the global batch, so the sum is W times the gradient of that loss. DDP or
    FSDP2 then averages over processes, which removes the factor W. B must be equal in all of them.
    """
    return Gather.apply(x) if world() > 1 else x


def previous_row(x):
    """x (B, ...) -> (1, ...): the row of the global batch before this process's first row.

    The row before row 0 is the last row.
    """
    return gather_with_gradient(x[-1:])[rank() - 1][None]


def gather_rows(rows, device="cpu"):
    """[(number, ...), ...] of each process -> the rows of all processes, sorted by number.

    Tensors in the rows, also in dicts and lists, are returned on `device`. With one process: the
    rows themselves.
    """
    if world() == 1:
        return list(rows)
    tree_map = torch.utils._pytree.tree_map_only
    parts = [None] * world()
    dist.all_gather_object(parts, tree_map(torch.Tensor, lambda x: x.cpu(), list(rows)))
    rows = tree_map(torch.Tensor, lambda x: x.to(device), [row for part in parts for row in part])
    return sorted(rows, key=lambda row: row[0])


# ------------------------------------------------------------------------------------------------
# Gradients, and sharded weights


class Step(torch.nn.Module):
    """A model and its loss as one module, which DDP or FSDP2 wraps.

    So the loss may call any part of the model.
    """

    def __init__(self, model, loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, *inputs):
        return self.loss(self.model, *inputs) if inputs else None


def parallel(model, loss, shard=False, parts=()):
    """loss(model, *inputs) -> function of the inputs whose gradients are means over processes.

    shard  True = FSDP2: each process keeps a part of weights, gradients and optimiser states. It
           gathers the weights of one block while it computes with that block. Create optimisers
           after this call
    parts  classes of modules that are gathered one at a time
    """
    step = Step(model, loss)
    if world() == 1:
        return step
    if not shard:
        return torch.nn.parallel.DistributedDataParallel(step)
    from torch.distributed.fsdp import fully_shard
    device_type = next(model.parameters()).device.type
    options = dict(mesh=dist.init_device_mesh(device_type, (world(),)),
                   ignored_params=scalars(model))
    for module in reversed(list(model.modules())):
        if isinstance(module, parts):
            fully_shard(module, **options)
    step = fully_shard(step, **options)
    with torch.no_grad():
        step()  # FSDP2 must see the outermost module first; evaluation calls inner ones
    step.reshard()
    return step


def scalars(model):
    """The scalar parameters. FSDP2 cannot split them, so `clip` averages their gradients."""
    return {parameter for parameter in model.parameters() if parameter.ndim == 0}


@contextlib.contextmanager
def exchange(step, on):
    """Context of a micro-batch. on=True averages the gradients over processes in its backward pass.

    on=False only adds them up in this process.
    """
    if hasattr(step, "set_requires_gradient_sync"):
        step.set_requires_gradient_sync(on)
        yield
    elif on or not hasattr(step, "no_sync"):
        yield
    else:
        with step.no_sync():
            yield


def clip(model, limit):
    """Scale all gradients so that their norm is at most `limit` -> the norm before scaling.

    First averages over processes the gradients of `scalars`, which FSDP2 leaves out.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    if not any(isinstance(parameter, DTensor) for parameter in parameters):
        return float(torch.nn.utils.clip_grad_norm_(parameters, limit))
    square = torch.zeros((), device=parameters[0].device)
    for parameter in parameters:
        if parameter.ndim == 0:
            parameter.grad = mean(parameter.grad)
            square += parameter.grad**2 / world()  # all processes add it, so it counts once
        else:
            square += parameter.grad.to_local().square().sum()
    norm = float(mean(square) * world()) ** 0.5
    scale = min(1.0, limit / (norm + 1e-6))
    for parameter in parameters:
        parameter.grad.mul_(scale)
    return norm


def full_tensor(x):
    """A tensor that may be sharded -> the full tensor, on every process."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def shard_like(x, parameter):
    """A full tensor -> this process's part, sharded like `parameter` if it has the same shape."""
    x = x.to(parameter.device)
    if isinstance(parameter, DTensor) and x.shape == parameter.shape and not isinstance(x, DTensor):
        replicated = DTensor.from_local(x, parameter.device_mesh, [Replicate()], run_check=False)
        return replicated.redistribute(placements=parameter.placements)
    return x


@contextlib.contextmanager
def unsharded(step):
    """Context in which every process has all weights, for work outside the training step.

    FSDP2's hooks are off, because the processes may compute different things here and must not wait
    for each other.
    """
    from torch.distributed.fsdp import FSDPModule
    sharded = [(module, module._forward_pre_hooks, module._forward_hooks)
               for module in step.modules() if isinstance(module, FSDPModule)]
    for module, *_ in sharded:
        module.unshard()
        module._forward_pre_hooks, module._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for module, before, after in sharded:
            module._forward_pre_hooks, module._forward_hooks = before, after
            module.reshard()


# ------------------------------------------------------------------------------------------------
# Sharded checkpoints (torch.distributed.checkpoint), which load with any number of processes


def safe_reader(folder):
    """torch's reader for a folder of parts, with a safe unpickler for its metadata.

    ValueError where the metadata names a class that such metadata does not need, or an entry that
    is not a tensor.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    class SafeUnpickler(pickle.Unpickler):
        def find_class(self, module, name):
            dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
            if (module, name) in ALLOWED or dtype:
                return super().find_class(module, name)
            raise ValueError(f"its metadata names {module}.{name}")

    class Reader(FileSystemReader):
        def read_metadata(self, *args, **kwargs):
            return SafeUnpickler(io.BytesIO((Path(folder) / ".metadata").read_bytes())).load()

    reader = Reader(folder)
    others = [name for name, kind in reader.read_metadata().state_dict_metadata.items()
              if not isinstance(kind, TensorStorageMetadata)]
    if others:
        raise ValueError(f"holds more than tensors: {others[0]}")
    return reader


# Names that the metadata of a sharded checkpoint may contain: (module, class or function).


ALLOWED = {("torch.distributed.checkpoint.metadata", name) for name in (
    "TensorStorageMetadata", "Metadata", "TensorProperties", "MetadataIndex", "StorageMeta",
    "ChunkStorageMetadata", "BytesStorageMetadata", "_MEM_FORMAT_ENCODING")} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("torch", "Size"),
    ("torch.serialization", "_get_layout"), ("pathlib", "PosixPath"), ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath")}


def crc(path):
    """CRC-32 checksum of a file."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(2**20):
            value = zlib.crc32(block, value)
    return value


def save_parts(folder, tensors, facts):
    """Write {name: tensor} into a folder; every process writes its own part.

    facts.json holds `facts` and a CRC-32 of each file.
    """
    import torch.distributed.checkpoint as checkpoint
    folder = Path(folder)
    try:
        checkpoint.save(dict(tensors), storage_writer=checkpoint.FileSystemWriter(
            folder, sync_files=True))
    except checkpoint.CheckpointException as error:  # raised in every process; none writes now
        if rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
        raise first_cause(error, folder) from None
    own = [(path.name, crc(path)) for path in sorted(folder.glob(f"__{rank()}_*"))]
    if rank() == 0:
        own.append((".metadata", crc(folder / ".metadata")))
    files = dict(gather_rows(own))
    if rank() == 0:
        with open(folder / "facts.json", "w") as file:
            text = json.dumps(facts)
            json.dump({"facts": text, "crc": zlib.crc32(text.encode()), "files": files}, file,
                      indent=1)
            file.flush()
            os.fsync(file.fileno())
    wait()


def first_cause(error, folder):
    """The error of one process behind a CheckpointException, as an OSError.

    CheckpointException is not a subclass of Exception, so `except Exception` does not catch it. It
    may also hide a KeyboardInterrupt or a MemoryError; these are returned unchanged.
    """
    for failure, _ in (error.failures or {}).values():
        if isinstance(failure, (KeyboardInterrupt, MemoryError)):
            return failure
    first = cause = next(iter(error.failures.values()))[0] if error.failures else error
    while cause is not None and not (isinstance(cause, OSError) and cause.errno):
        cause = cause.__context__  # torch's writer raises a second error on top of the first
    if cause is not None:
        return OSError(cause.errno, cause.strerror, cause.filename or str(folder))
    line = (str(first).strip().splitlines() or [type(first).__name__])[0]
    return OSError(errno.EIO, line + "; the disk may be full" * ("inline_container" in line),
                   str(folder))


def read_facts(folder):
    """The facts of `save_parts`. ValueError where the checksum of a file in the folder is wrong."""
    saved = json.loads((Path(folder) / "facts.json").read_text())
    if zlib.crc32(saved["facts"].encode()) != saved["crc"]:
        raise ValueError("the checksum of facts.json is wrong")
    own = sorted(saved["files"])[rank()::world()]  # each process checks some of the files
    wrong = [(name,) for name in own if not (Path(folder) / name).exists()
             or crc(Path(folder) / name) != saved["files"][name]]
    wrong = gather_rows(wrong)
    if wrong:
        raise ValueError(f"the checksum of {wrong[0][0]} is wrong")
    return json.loads(saved["facts"])


def read_parts(folder, make):
    """{name: tensor} of a folder of `save_parts`, read by any number of processes.

    make  function (name, shape, dtype) -> the tensor to fill, full or sharded
    """
    import torch.distributed.checkpoint as checkpoint
    source = safe_reader(folder)
    tensors = {name: make(name, kind.size, kind.properties.dtype)
               for name, kind in source.read_metadata().state_dict_metadata.items()}
    try:
        checkpoint.load(tensors, storage_reader=source)
    except checkpoint.CheckpointException as error:
        raise first_cause(error, folder) from None
    return tensors
