"""Worker processes that load clips ahead."""

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


class Carry(torch.utils.data.Dataset):
    """Pass a DataError on as a value: a DataLoader would bury its one line in a traceback."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, index):
        try:
            return self.dataset[index]
        except DataError as error:
            return error


_desks = weakref.WeakSet()  # the desks of our workers: shared bytes (workers, 512), what each has in hand
_desk = None  # in a worker: its own


def start_worker(number, desks=None):
    # Ctrl-C reaches every process of the terminal, and a scheduler may ask all of a job to end; only the parent should
    # answer, by stopping us.
    global _desk
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if desks is not None:
        _desk = desks[number]
        _note("")


def _note(path):
    if _desk is not None:
        text = f"{os.getpid()} {path}".encode("utf-8", "backslashreplace")[:_desk.numel()]
        _desk.copy_(torch.frombuffer(bytearray(text.ljust(_desk.numel(), b"\0")), dtype=torch.uint8))


@contextlib.contextmanager
def in_hand(path):
    """While a worker reads a file: should it die, `dead_worker` knows which file that was."""
    _note(path)
    try:
        yield
    finally:
        _note("")


def dead_worker(error):
    """What a DataLoader says of a worker that died, or a pipe to it that broke -> one line that names the file it had in
    hand, or None where the error is another one."""
    found = re.search(r"DataLoader worker \(pid\(?s?\)? ([\d, ]+)\) (is killed by signal: \w+|exited unexpectedly)",
                      str(error))
    notes = [_in_writing(desk) for desks in list(_desks) for desk in desks]
    if found:
        dead, how = found[1].split(", "), found[2]
    else:
        broken = isinstance(error, (ConnectionError, EOFError))
        numbers = [number for number, _ in notes if broken and number]
        for _ in range(40 if numbers else 0):  # a process closes its pipes a moment before it has ended
            if any(_has_ended(int(number)) for number in numbers):
                break
            time.sleep(0.05)
        dead, how = [number for number in numbers if _has_ended(int(number))], "has ended"
    if not dead:
        return None
    files = [printable(path) for number, path in notes if number in dead and path]
    return (f"a process that prepares clips (pid {', '.join(dead)}) {how}, with {', '.join(files) or 'no file'} in "
            "hand. Killed by nobody you know: out of memory, lower --workers; anything else: that file crashes the "
            "decoder, take it out")


def _in_writing(desk):
    """(process number, what it has in hand) of what `_note` wrote, as text; "" where there is nothing."""
    return bytes(desk.tolist()).rstrip(b"\0").decode("utf-8", "replace").partition(" ")[::2]


def _has_ended(number):
    """True for a child of ours that no longer runs, whether or not somebody has asked for its exit code."""
    if not hasattr(os, "waitid"):  # macOS, before Python 3.13
        return False
    try:
        return os.waitid(os.P_PID, number, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:  # waited for already, or a child of the server that forks for us (Python 3.14)
        return not os.path.exists(f"/proc/{number}") if os.path.exists("/proc/self") else True


def _end(children):
    for child in children:
        if child.is_alive():
            child.kill()


def load(dataset, plan, workers, collate, **options):
    # The workers run one torch thread each: DataLoader sees to that. Its own generator, so that starting a loader does
    # not move the global one.
    if plan is not None:
        dataset, options = Carry(dataset), {"batch_sampler": plan}
    desks = torch.zeros(workers, 512, dtype=torch.uint8).share_memory_() if workers else None
    if workers:
        _desks.add(desks)
    loader = torch.utils.data.DataLoader(
        dataset, collate_fn=collate, num_workers=workers, generator=torch.Generator(),
        pin_memory=torch.cuda.is_available(),  # so that the copy to the GPU need not be waited for
        worker_init_fn=functools.partial(start_worker, desks=desks), **options)
    batches = iter(loader)
    if workers and threading.current_thread() is threading.main_thread():
        # torch tells of a dead worker from a signal handler, wherever the program then is: in the midst of writing a
        # checkpoint, or of reporting this very death. Here the next batch tells (torch looks every five seconds).
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # They leave SIGTERM to us, and by SIGTERM DataLoader, and multiprocessing at the end of the program, would end one
    # that does not hear them, busy with a file that takes for ever.
    end = multiprocessing.util.Finalize(None, _end, (list(getattr(batches, "_workers", ())),), exitpriority=10)
    try:
        for batch in batches:
            if isinstance(batch, DataError):
                raise batch
            yield batch
    finally:
        del batches  # DataLoader asks them to end, and waits a while
        end()


class Plan:
    """The indices of each step, computed as they are needed."""

    def __init__(self, dataset, batch_size, seed, steps, start, shuffle, rank, world, repeats):
        self.length = len(dataset) if hasattr(dataset, "__len__") else None
        self.batch_size, self.seed, self.steps, self.start = batch_size, seed, steps, start
        self.shuffle, self.rank, self.world, self.repeats = shuffle, rank, world, repeats

    def __len__(self):
        return max(self.steps - self.start, 0)

    def __iter__(self):
        order = functools.lru_cache(maxsize=2)(
            lambda epoch: np.random.default_rng((self.seed, epoch)).permutation(self.length))
        for step in range(self.start, self.steps):
            first = (step * self.world + self.rank) * self.batch_size
            places = range(first, first + self.batch_size)
            if self.length is None:
                yield list(places)
            else:
                turns = [(*divmod(place // self.repeats, self.length), place % self.repeats) for place in places]
                yield [(int(order(epoch)[i]) if self.shuffle else i, epoch * self.repeats + again)
                       for epoch, i, again in turns]
