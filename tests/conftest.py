"""Shared by all tests: the repository on the path, one thread, the official deterministic fill."""

import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


@pytest.fixture(autouse=True, scope="session")
def ctrl_c_is_heard():
    """Background jobs of a shell do not hear it, nor does what they start; the tests send it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def one_thread_and_a_seed():
    """Two busy threads on two busy cores are slower than one; and no test depends on another."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.backends.mkldnn.matmul.fp32_precision = "none"  # train.py may have switched it


def values(name, count):
    """`count` reproducible numbers in [-1, 1) for a tensor name, from no random library: the
    fractional part of a fast sine. The reference sums in the tests were made with these."""
    tag = sum(ord(c) * (j + 1) for j, c in enumerate(name)) % 997
    u = np.sin(12.9898 * np.arange(count, dtype=np.float64) + 78.233 * tag) * 43758.5453
    return 2 * (u - np.floor(u)) - 1


def official_fill(shapes):
    """{official name: shape} -> {official name: tensor} with weights of a sensible size."""
    filled = {}
    for name, shape in shapes.items():
        v = values(name, int(np.prod(shape)))
        if len(shape) >= 2:
            v = v * np.sqrt(3 / np.prod(shape[1:]))
        elif name.endswith("running_var"):
            v = 1 + 0.5 * v**2
        elif name.endswith((".weight", ".gamma")):
            v = 1 + 0.1 * v
        else:
            v = 0.1 * v
        filled[name] = torch.from_numpy(v.reshape(shape)).float()
    return filled


def summary(x):
    """(sum, sum of magnitudes, first four, last) of a tensor in row-major order."""
    x = x.detach().double().flatten()
    return float(x.sum()), float(x.abs().sum()), x[:4].tolist(), float(x[-1])


def assert_summary(x, total, magnitude=None, first=None, last=None):
    """Compare with printed reference numbers: elements to 1e-5, sums to 1e-6 of the magnitude."""
    got = summary(x)
    assert abs(got[0] - total) <= 1e-6 * got[1] + 1e-6, (got[0], total)
    if magnitude is not None:
        assert abs(got[1] - magnitude) <= 2e-6 * magnitude
    if first is not None:
        assert np.allclose(got[2][:len(first)], first, atol=1e-5, rtol=0)
    if last is not None:
        assert abs(got[3] - last) <= 1e-5
