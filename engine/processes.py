r"""Several processes, one run: what every file needs to know about the others.

    torchrun --nproc-per-node 8 train.py mae --data DIR         all GPUs of one machine
    torchrun --nproc-per-node 8 --nnodes 4 --rdzv-backend c10d \
        --rdzv-endpoint HOST:29500 train.py mae ...             several machines
    python train.py mae ...                                     one process: this file does nothing

Dropout (attention.py), batch statistics (batch_norm.py) and the contrastive loss (clip_video.py)
depend on the joined batch of all processes. They import this file and not the training loop.

The promise: W processes with B clips each take the same step as one process with W * B clips. Loss
and gradients are equal within rounding. DDP alone does not give that. It takes five things:
1. Clips: at step k, process r has rows r*B to r*B + B - 1 of the joined batch (data.batches).
2. Random numbers: each process draws those of the joined batch from the same generator and keeps
   its own rows (`joined`). They are a function of (seed, step, row) alone.
3. Losses: what compares rows (contrastive loss, batch statistics) gathers them first, with gradient
   (`gather_with_gradient`). What divides a sum by its own count (of words, say) divides by the mean
   count of all processes (`mean`); the mean of these quotients is the quotient of the sums.
4. Gradients: the mean over processes, by DDP, or by FSDP2, which also cuts weights, gradients and
   optimiser states into W parts (`parallel`).
5. Evaluation: whole batches are dealt out and results put together in their order (`collect`). The
   sum is the same for any W, and every clip counts once.

Where we differ: official loaders pad the last batch of an evaluation, so some clips count twice
(VideoMAE engine_for_finetuning.py).

Two or four gloo processes agree with one to 1e-6 in every stage (tests/test_processes.py).

>>> rank(), world(), joined(4), mean(torch.tensor(3.0)).item()
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
    """How many processes work on this run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    """Which of them this one is, 0 to world() - 1. Process 0 alone prints and writes."""
    return dist.get_rank() if world() > 1 else 0


def several():
    """True where torchrun has started more processes than this one, even before they have met."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def start(device):
    """Meet the others, where torchrun has started several; returns the device of this process.

    device  "cpu", "cuda" or "cuda:N"; of several processes on a machine each takes a GPU of its own
    """
    if not several():
        return device
    local = int(os.environ.get("LOCAL_RANK", 0))
    if device.startswith("cuda"):
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    return device


def wait():
    """Until all are here."""
    if world() > 1:
        dist.barrier()


def end():
    """All is done: leave the others, at the end of the program."""
    if world() > 1:
        dist.destroy_process_group()


def first_to_say(text):
    """True for the first process that wants to print this text: several may stop for one reason."""
    if not several():
        return True
    try:  # torchrun keeps a small table of numbers for its processes
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]),
                              is_master=False)
        return store.add(f"said {zlib.crc32(text.encode())}", 1) == 1
    except (RuntimeError, ValueError):
        return True


# ------------------------------------------------------------------------------------------------
# The joined batch


def joined(count):
    """(W * B, slice): rows of the joined batch, and which of them this process computes now.

    count  B, or fewer inside of a `piece`
    """
    total, first = _piece or (count, 0)
    first += rank() * total
    return world() * total, slice(first, first + count)


_piece = None


@contextlib.contextmanager
def piece(total, first):
    """Context in which only some of our `total` rows are computed, from `first` on.

    Random numbers are still drawn for all rows.
    """
    global _piece
    _piece, before = (total, first), _piece
    try:
        yield
    finally:
        _piece = before


def mean(x):
    """Mean of a tensor over all processes, without gradient. Alone: x itself."""
    if world() == 1:
        return x
    x = x.detach().clone()
    dist.all_reduce(x)
    return x / world()


def means(numbers, device="cpu"):
    """{name: number} -> the means over all processes, which must have the same names."""
    if world() == 1:
        return dict(numbers)
    values = torch.tensor(list(map(float, numbers.values())), dtype=torch.float64, device=device)
    return dict(zip(numbers, mean(values).tolist()))


class Gather(torch.autograd.Function):
    """See `gather_with_gradient`."""

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
    """x (B, ...) of every process, joined in order of rank: (world*B, ...). Alone: x itself.

    Backward, the gradients of all processes for our part are added up. Each process then has
    `world` times the gradient of one process with the joined batch. Data-parallel training takes
    the mean over processes afterwards, which is that gradient. B must be equal everywhere.
    """
    return Gather.apply(x) if world() > 1 else x


def row_before(x):
    """x (B, ...) -> (1, ...): the row before our first one in the joined batch; before row 0, the
    last."""
    return gather_with_gradient(x[-1:])[rank() - 1][None]


def collect(rows, device="cpu"):
    """Put together what was dealt out: [(number, ...), ...] of each process -> of all, by number.

    Tensors in the rows, also in dicts and lists, come back on `device`. Alone: the rows themselves.
    """
    if world() == 1:
        return list(rows)
    carry = torch.utils._pytree.tree_map_only
    parts = [None] * world()
    dist.all_gather_object(parts, carry(torch.Tensor, lambda x: x.cpu(), list(rows)))
    rows = carry(torch.Tensor, lambda x: x.to(device), [row for part in parts for row in part])
    return sorted(rows, key=lambda row: row[0])


# ------------------------------------------------------------------------------------------------
# Gradients, and weights cut into parts


class Step(torch.nn.Module):
    """A model with its loss. DDP and FSDP2 wrap this, so a loss may call any part of the model."""

    def __init__(self, model, loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, *inputs):
        return self.loss(self.model, *inputs) if inputs else None


def parallel(model, loss, shard=False, parts=()):
    """loss(model, ...) -> a function of the other inputs whose gradients are means over processes.

    shard  True = FSDP2: every process keeps a part of all weights, gradients and optimiser states
           and gathers a block while it computes with it. Optimisers must be made afterwards.
    parts  classes of modules that are gathered one at a time
    """
    step = Step(model, loss)
    if world() == 1:
        return step
    if not shard:
        return torch.nn.parallel.DistributedDataParallel(step)
    from torch.distributed.fsdp import fully_shard
    kind = next(model.parameters()).device.type
    options = dict(mesh=dist.init_device_mesh(kind, (world(),)), ignored_params=scalars(model))
    for module in reversed(list(model.modules())):
        if isinstance(module, parts):
            fully_shard(module, **options)
    step = fully_shard(step, **options)
    with torch.no_grad():
        step()  # FSDP2 must meet the outermost module first, before evaluation calls what is inside
    step.reshard()
    return step


def scalars(model):
    """Parameters of one number. They cannot be cut; `clip` averages their gradients."""
    return {parameter for parameter in model.parameters() if parameter.ndim == 0}


@contextlib.contextmanager
def exchange(step, on):
    """Context of a micro-batch: on=False keeps its gradients here, to be exchanged with the last
    one's."""
    if hasattr(step, "set_requires_gradient_sync"):
        step.set_requires_gradient_sync(on)
        yield
    elif on or not hasattr(step, "no_sync"):
        yield
    else:
        with step.no_sync():
            yield


def clip(model, limit):
    """Scale all gradients to a norm of at most `limit`; returns the norm before.

    Averages first what FSDP2 has not averaged: the gradients of `scalars`.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    if not any(isinstance(parameter, DTensor) for parameter in parameters):
        return float(torch.nn.utils.clip_grad_norm_(parameters, limit))
    square = torch.zeros((), device=parameters[0].device)
    for parameter in parameters:
        if parameter.ndim == 0:
            parameter.grad = mean(parameter.grad)
            square += parameter.grad**2 / world()  # counted once when all add up
        else:
            square += parameter.grad.to_local().square().sum()
    norm = float(mean(square) * world()) ** 0.5
    scale = min(1.0, limit / (norm + 1e-6))
    for parameter in parameters:
        parameter.grad.mul_(scale)
    return norm


def whole(x):
    """A tensor that may be cut into parts -> all of it, on every process."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def place(x, parameter):
    """All of a tensor -> what this process keeps of it, cut like a parameter of the same shape."""
    x = x.to(parameter.device)
    if isinstance(parameter, DTensor) and x.shape == parameter.shape and not isinstance(x, DTensor):
        everywhere = DTensor.from_local(x, parameter.device_mesh, [Replicate()], run_check=False)
        return everywhere.redistribute(placements=parameter.placements)
    return x


@contextlib.contextmanager
def unsharded(step):
    """Context in which every process has all weights, for work outside of the step.

    FSDP2's hooks are off: processes may compute different things, and must not wait for each other.
    """
    from torch.distributed.fsdp import FSDPModule
    cut = [(module, module._forward_pre_hooks, module._forward_hooks) for module in step.modules()
           if isinstance(module, FSDPModule)]
    for module, *_ in cut:
        module.unshard()
        module._forward_pre_hooks, module._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for module, before, after in cut:
            module._forward_pre_hooks, module._forward_hooks = before, after
            module.reshard()


# ------------------------------------------------------------------------------------------------
# Checkpoints in parts (torch.distributed.checkpoint), which load at any number of processes


def contents(folder):
    """torch's reader for a folder of parts, after a safe look at its table of contents.

    Unpickling may name the classes of such a table alone, and only tensors may be in it. Else
    ValueError.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    class Careful(pickle.Unpickler):
        def find_class(self, module, name):
            dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
            if (module, name) in ALLOWED or dtype:
                return super().find_class(module, name)
            raise ValueError(f"its table of contents names {module}.{name}")

    class Reader(FileSystemReader):
        def read_metadata(self, *args, **kwargs):
            return Careful(io.BytesIO((Path(folder) / ".metadata").read_bytes())).load()

    found = Reader(folder)
    others = [name for name, kind in found.read_metadata().state_dict_metadata.items()
              if not isinstance(kind, TensorStorageMetadata)]
    if others:
        raise ValueError(f"holds more than tensors: {others[0]}")
    return found


ALLOWED = {("torch.distributed.checkpoint.metadata", name) for name in (
    "TensorStorageMetadata", "Metadata", "TensorProperties", "MetadataIndex", "StorageMeta",
    "ChunkStorageMetadata", "BytesStorageMetadata", "_MEM_FORMAT_ENCODING")} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("torch", "Size"),
    ("torch.serialization", "_get_layout"), ("pathlib", "PosixPath"), ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath")}


def crc(path):
    """CRC-32 of a file."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(2**20):
            value = zlib.crc32(block, value)
    return value


def save_parts(folder, tensors, facts):
    """Every process writes its part of {name: tensor} into a folder.

    facts.json has `facts` and a CRC-32 of each file.
    """
    import torch.distributed.checkpoint as checkpoint
    folder = Path(folder)
    try:
        checkpoint.save(dict(tensors), storage_writer=checkpoint.FileSystemWriter(
            folder, sync_files=True))
    except checkpoint.CheckpointException as error:  # every process gets it; all stopped writing
        if rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
        raise first_cause(error, folder) from None
    own = [(path.name, crc(path)) for path in sorted(folder.glob(f"__{rank()}_*"))]
    if rank() == 0:
        own.append((".metadata", crc(folder / ".metadata")))
    files = dict(collect(own))
    if rank() == 0:
        with open(folder / "facts.json", "w") as file:
            text = json.dumps(facts)
            json.dump({"facts": text, "crc": zlib.crc32(text.encode()), "files": files}, file,
                      indent=1)
            file.flush()
            os.fsync(file.fileno())
    wait()


def first_cause(error, folder):
    """What went wrong in one of the processes, as an OSError.

    torch's own error is no Exception, so nobody would catch it. It also hides an interruption and a
    lack of memory; these are returned as they are.
    """
    for found, _ in (error.failures or {}).values():
        if isinstance(found, (KeyboardInterrupt, MemoryError)):
            return found
    first = cause = next(iter(error.failures.values()))[0] if error.failures else error
    while cause is not None and not (isinstance(cause, OSError) and cause.errno):
        cause = cause.__context__  # torch's writer of archives complains of what followed
    if cause is not None:
        return OSError(cause.errno, cause.strerror, cause.filename or str(folder))
    line = (str(first).strip().splitlines() or [type(first).__name__])[0]
    return OSError(errno.EIO, line + "; the disk may be full" * ("inline_container" in line),
                   str(folder))


def read_facts(folder):
    """The facts of `save_parts`, after a check that every file is as it was written.

    ValueError where one is not.
    """
    found = json.loads((Path(folder) / "facts.json").read_text())
    if zlib.crc32(found["facts"].encode()) != found["crc"]:
        raise ValueError("the checksum of facts.json is wrong")
    mine = sorted(found["files"])[rank()::world()]
    wrong = [(name,) for name in mine if not (Path(folder) / name).exists()
             or crc(Path(folder) / name) != found["files"][name]]
    wrong = collect(wrong)
    if wrong:
        raise ValueError(f"the checksum of {wrong[0][0]} is wrong")
    return json.loads(found["facts"])


def read_parts(folder, make):
    """{name: tensor} that several processes wrote, however many read.

    make  function (name, shape, dtype) -> the tensor to fill, whole or cut
    """
    import torch.distributed.checkpoint as checkpoint
    source = contents(folder)
    tensors = {name: make(name, kind.size, kind.properties.dtype)
               for name, kind in source.read_metadata().state_dict_metadata.items()}
    try:
        checkpoint.load(tensors, storage_reader=source)
    except checkpoint.CheckpointException as error:
        raise first_cause(error, folder) from None
    return tensors
