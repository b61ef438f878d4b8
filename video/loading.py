"""Worker processes that load clips ahead of the training loop.

`load` wraps torch's DataLoader and adds four things:

1. An error in a worker arrives as one line.
2. If a worker dies, the message names the file that it was reading (`dead_worker`).
3. Workers ignore Ctrl-C and SIGTERM; the parent process handles them.
4. No worker outlives the run.
"""

import contextlib
import functools
import multiprocessing.util
import os
import re
import signal
import threading
import time
import weakref

import numpy as np
import torch

from engine.errors import printable
from video.annotations import DataError


class Plan:
    """The order of the items: an iterable with a list of (item index, epoch) for each step.

    Step k of process `rank` covers B positions of the sequence of all epochs, starting at position
    (k * world + rank) * B. An epoch of a finite data set is a permutation drawn from (seed,
    epoch). If the data set has `weights`, an epoch is instead as many draws with replacement, with
    these probabilities. Each draw then has its own number instead of the epoch, because an item
    that is drawn twice should differ. Of an endless data set the list holds only the positions.
    See data.batches.
    """

    def __init__(self, dataset, batch_size, seed, steps, start, shuffle, rank, world, repeats):
        self.length = len(dataset) if hasattr(dataset, "__len__") else None
        self.batch_size, self.seed, self.steps, self.start = batch_size, seed, steps, start
        self.shuffle, self.rank, self.world, self.repeats = shuffle, rank, world, repeats
        self.weights = getattr(dataset, "weights", None) if shuffle else None

    def __len__(self):
        return max(self.steps - self.start, 0)

    def __iter__(self):
        order = functools.lru_cache(maxsize=2)(self.order)
        for step in range(self.start, self.steps):
            first = (step * self.world + self.rank) * self.batch_size
            positions = range(first, first + self.batch_size)
            if self.length is None:
                yield list(positions)
                continue
            turns = [(*divmod(position // self.repeats, self.length), position % self.repeats)
                     for position in positions]
            yield [(int(order(epoch)[i]) if self.shuffle else i,
                    (epoch if self.weights is None else epoch * self.length + i) * self.repeats
                    + repeat) for epoch, i, repeat in turns]

    def order(self, epoch):
        """The item indices of an epoch, in order."""
        rng = np.random.default_rng((self.seed, epoch))
        return rng.permutation(self.length) if self.weights is None else \
            rng.choice(self.length, self.length, p=self.weights)


def load(dataset, plan, workers, collate, **options):
    """Yield the batches that `collate` makes of the items of a data set.

    plan     iterable of lists of indices, one list per batch; None: the data set iterates by
             itself
    workers  number of processes that load ahead; 0: load in this process
    options  further arguments of DataLoader
    raises   DataError where an item or `collate` returns one
    """
    # DataLoader gives each worker one torch thread. The loader has its own generator, so that
    # starting it does not change torch's global generator.
    if plan is not None:
        dataset, options = _ErrorsAsItems(dataset), {"batch_sampler": plan}
    notes = torch.zeros(workers, 512, dtype=torch.uint8).share_memory_() if workers else None
    if workers:
        _notes.add(notes)
    loader = torch.utils.data.DataLoader(
        dataset, collate_fn=collate, num_workers=workers, generator=torch.Generator(),
        pin_memory=torch.cuda.is_available(),  # so that copies to the GPU run asynchronously
        worker_init_fn=functools.partial(start_worker, notes=notes), **options)
    batches = iter(loader)
    if workers and threading.current_thread() is threading.main_thread():
        # torch's signal handler raises an error for a dead worker at any point of the program, even
        # while a checkpoint is written or while that error is handled. Without the handler the next
        # batch raises it (torch checks every five seconds).
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # DataLoader and multiprocessing end their children with SIGTERM, which our workers ignore. A
    # worker that is stuck in a file therefore needs SIGKILL.
    end = multiprocessing.util.Finalize(None, _kill, (list(getattr(batches, "_workers", ())),),
                                        exitpriority=10)
    try:
        for batch in batches:
            if isinstance(batch, DataError):
                raise batch
            yield batch
    finally:
        del batches  # DataLoader asks the workers to end and waits for them, up to a limit
        end()


class _ErrorsAsItems(torch.utils.data.Dataset):
    """Returns a DataError as an item. DataLoader would wrap a raised one in a long traceback."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, index):
        try:
            return self.dataset[index]
        except DataError as error:
            return error


def _kill(children):
    for child in children:
        if child.is_alive():
            child.kill()


# Each worker writes its process id and the file it reads into shared memory, for `dead_worker`.

_notes = weakref.WeakSet()  # in the parent: uint8 (workers, 512) for each loader
_note = None  # in a worker: its own row


def start_worker(number, notes=None):
    """First call in a worker: ignore SIGINT and SIGTERM, because the parent ends its workers.

    Ctrl-C reaches every process of a terminal, and a scheduler may signal all processes of a job.
    """
    global _note
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if notes is not None:
        _note = notes[number]
        _write("")


def _write(path):
    if _note is not None:
        text = f"{os.getpid()} {path}".encode("utf-8", "backslashreplace")[:_note.numel()]
        text = bytearray(text.ljust(_note.numel(), b"\0"))
        _note.copy_(torch.frombuffer(text, dtype=torch.uint8))


def _read(note):
    """(process id, path) as text; each is "" where it is missing."""
    return bytes(note.tolist()).rstrip(b"\0").decode("utf-8", "replace").partition(" ")[::2]


@contextlib.contextmanager
def reading_file(path):
    """Context in which a worker reads a file. If the worker dies inside, `dead_worker` names it."""
    _write(path)
    try:
        yield
    finally:
        _write("")


def dead_worker(error):
    """One line about a worker that died and the file it was reading; None for other errors.

    error  what DataLoader raised: for a dead worker, or for a broken pipe to one
    """
    message = re.search(r"DataLoader worker \(pid\(?s?\)? ([\d, ]+)\) "
                        r"(is killed by signal: \w+|exited unexpectedly)", str(error))
    notes = [_read(note) for rows in list(_notes) for note in rows]
    if message:
        dead, how = message[1].split(", "), message[2]
    else:
        broken = isinstance(error, (ConnectionError, EOFError))
        pids = [pid for pid, _ in notes if broken and pid]
        for _ in range(40 if pids else 0):  # a process closes its pipes shortly before it ends
            if any(_has_ended(int(pid)) for pid in pids):
                break
            time.sleep(0.05)
        dead, how = [pid for pid in pids if _has_ended(int(pid))], "has ended"
    if not dead:
        return None
    files = [printable(path) for pid, path in notes if pid in dead and path]
    return (f"a process that loads clips (pid {', '.join(dead)}) {how} while reading "
            f"{', '.join(files) or 'no file'}. If nobody killed it, memory may have run out: lower "
            "--workers; or that file crashes the decoder: remove it")


def _has_ended(pid):
    """True for a child process that has ended, whether or not its exit code was collected."""
    if not hasattr(os, "waitid"):  # macOS, before Python 3.13
        return False
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:  # already collected, or a child of Python 3.14's fork server
        return not os.path.exists(f"/proc/{pid}") if os.path.exists("/proc/self") else True
