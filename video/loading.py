"""Worker processes that load clips ahead, and what becomes of one that dies.

`load` wraps torch's DataLoader. It adds four things: an error in a worker arrives as one line; a
worker that dies is reported with the file it was reading; Ctrl-C and SIGTERM are left to the parent
process; and no worker outlives the run.
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
    """Iterates over the indices of each step, computed as they are needed; see data.batches.

    Step k of rank r takes the places from (k * world + r) * B on. An epoch of a finite data set is
    a permutation drawn from (seed, epoch); where the data set has `weights`, it is as many draws by
    these, and each draw of an item has a number of its own, as an epoch has.
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
            places = range(first, first + self.batch_size)
            if self.length is None:
                yield list(places)
                continue
            turns = [(*divmod(place // self.repeats, self.length), place % self.repeats)
                     for place in places]
            yield [(int(order(epoch)[i]) if self.shuffle else i,
                    (epoch if self.weights is None else epoch * self.length + i) * self.repeats
                    + again) for epoch, i, again in turns]

    def order(self, epoch):
        """The items of an epoch, in order."""
        rng = np.random.default_rng((self.seed, epoch))
        return rng.permutation(self.length) if self.weights is None else \
            rng.choice(self.length, self.length, p=self.weights)


def load(dataset, plan, workers, collate, **options):
    """Iterate over the batches that `collate` makes of the items of a data set.

    plan     iterable of lists of indices, one list a batch; None: the data set iterates by itself
    workers  processes that load ahead; 0: this one
    options  further arguments of DataLoader
    raises   DataError where an item or `collate` gives one
    """
    # DataLoader gives each worker one torch thread. It has its own generator, so that starting it
    # does not advance the global one.
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
        # torch reports a dead worker from a signal handler, at any point of the program: in the
        # middle of writing a checkpoint, or of handling the same death. Without the handler the
        # next batch reports it (torch looks every five seconds).
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # Workers ignore SIGTERM. DataLoader and multiprocessing use SIGTERM to end their children, so
    # a worker that is stuck in a file needs SIGKILL.
    end = multiprocessing.util.Finalize(None, _kill, (list(getattr(batches, "_workers", ())),),
                                        exitpriority=10)
    try:
        for batch in batches:
            if isinstance(batch, DataError):
                raise batch
            yield batch
    finally:
        del batches  # DataLoader asks the workers to end, and waits a while
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


# Each worker writes its process number and the file it reads into shared bytes, for `dead_worker`.

_notes = weakref.WeakSet()  # of the parent: uint8 (workers, 512) for each loader
_note = None  # of a worker: its own row


def start_worker(number, notes=None):
    """First call in a worker: signals are left to the parent, which ends the workers itself.

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
    """(process number, path) as text; "" where there is none."""
    return bytes(note.tolist()).rstrip(b"\0").decode("utf-8", "replace").partition(" ")[::2]


@contextlib.contextmanager
def in_hand(path):
    """Context in which a worker reads a file; if it dies inside, `dead_worker` names the file."""
    _write(path)
    try:
        yield
    finally:
        _write("")


def dead_worker(error):
    """One line about a worker that died, with the file it was reading; None for other errors.

    error  what DataLoader raised for a dead worker or a broken pipe to it
    """
    told = re.search(r"DataLoader worker \(pid\(?s?\)? ([\d, ]+)\) "
                     r"(is killed by signal: \w+|exited unexpectedly)", str(error))
    notes = [_read(note) for rows in list(_notes) for note in rows]
    if told:
        dead, how = told[1].split(", "), told[2]
    else:
        broken = isinstance(error, (ConnectionError, EOFError))
        numbers = [number for number, _ in notes if broken and number]
        for _ in range(40 if numbers else 0):  # a process closes its pipes just before it ends
            if any(_has_ended(int(number)) for number in numbers):
                break
            time.sleep(0.05)
        dead, how = [number for number in numbers if _has_ended(int(number))], "has ended"
    if not dead:
        return None
    files = [printable(path) for number, path in notes if number in dead and path]
    return (f"a process that prepares clips (pid {', '.join(dead)}) {how}, with "
            f"{', '.join(files) or 'no file'} in hand. Killed by nobody you know: out of memory, "
            "lower --workers; anything else: that file crashes the decoder, take it out")


def _has_ended(number):
    """True for a child that no longer runs, whether or not its exit code was collected."""
    if not hasattr(os, "waitid"):  # macOS, before Python 3.13
        return False
    try:
        return os.waitid(os.P_PID, number, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:  # collected already, or a child of Python 3.14's fork server
        return not os.path.exists(f"/proc/{number}") if os.path.exists("/proc/self") else True
