"""What the machine allows: device, precision, threads, matrix products, compiling, memory."""

import contextlib
import ctypes
import os
import re
import resource
import sys
from pathlib import Path

import torch

from engine import flex, processes
from engine.errors import UserError


def choose_device(name):
    """"auto" or a torch device name -> the device's name; UserError where it is not available."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" has no numbers
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {name}: not available here; use cpu"
                      + (" or cuda" if torch.cuda.is_available() else "")) from None
    return str(device)


def choose_precision(name, device):
    """bf16 where the processor multiplies bfloat16 itself; emulating it is slow."""
    if name != "auto":
        return name
    if device.startswith("cuda"):
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        has = getattr(torch.cpu, "get_capabilities", dict)()
        before_2_13 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        fast = any(map(has.get, ("avx512_bf16", "amx_bf16", "bf16"))) or before_2_13()
    return "bf16" if fast else "fp32"


CGROUP = Path("/sys/fs/cgroup")  # where Linux tells the limits of a container


def processors():
    """How many processors this process may use: those it is bound to, or fewer by a quota."""
    count = len(getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0))
    for names in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):  # version 2, 1
        with contextlib.suppress(OSError, ValueError):  # ValueError: "max", no quota
            runs, period = map(int, " ".join((CGROUP / name).read_text() for name in names).split())
            count = min(count, runs // period) if runs > 0 else count
    return max(1, count)


SMALL = 1e13  # parameters times pixels of a micro-batch


def choose_threads(parameters, pixels):
    """Set the threads of a network on a CPU -> why so many, in words.

    parameters   of the network
    pixels       of a micro-batch, B * T * H * W

    1. OMP_NUM_THREADS decides where it is set.
    2. A small network takes one thread. Its steps are many short pieces, after each of which
       threads wait for the slowest one: a second thread gains nothing on a quiet machine, and
       where a neighbour keeps a processor busy it doubles the time (LOG.md).
    3. Another takes all processors. Workers are not subtracted: beside it they mostly wait.

    Machine and settings alone decide, not what else runs: the number changes the last bits.
    """
    if os.environ.get("OMP_NUM_THREADS"):
        return "OMP_NUM_THREADS"
    small = parameters * pixels < SMALL
    torch.set_num_threads(1 if small else processors())
    return "a small network" if small else "all processors"


def choose_products(choice="auto"):
    """Let oneDNN multiply float32 matrices on a CPU, or not -> "on" or "off", and why.

    choice  "auto", or "on" or "off" where a run goes on that began so: its last bits depend on it

    PyTorch uses MKL otherwise, where there is one. It is slower on processors that are not Intel's,
    by a tenth (Zen 4) to a half (Zen 5; LOG.md). The switch permits bfloat16 units, which oneDNN
    takes only where there are AMX units; elsewhere it computes in float32. So one product is tried,
    which must be right to 1e-5. Time is not measured: the choice changes the last bits of a run, so
    it must be the same each time, and in all processes of a run.
    """
    setting = torch.backends.mkldnn.matmul
    setting.fp32_precision = "none"
    if choice == "off" or not torch.backends.mkldnn.is_available():
        return "off", "as the run began" if choice == "off" else "not available"
    a, b = torch.randn(2, 512, 512, generator=torch.Generator().manual_seed(0))
    exact, error = a.double() @ b.double(), {}
    for precision in ("none", "bf16"):
        setting.fp32_precision = precision
        error[precision] = float((a @ b - exact).abs().max() / exact.abs().max())
    maker = processor_maker()
    slow = torch.backends.mkl.is_available() and maker not in ("", "GenuineIntel")
    better = processes.collect([(processes.rank(), slow and error["bf16"] < 1e-5)])
    take = choice == "on" or all(each for _, each in better)
    setting.fp32_precision = "bf16" if take else "none"
    return "on" if take else "off", (
        f"processor by {maker or 'an unknown maker'}, error {error['bf16']:.0e} in place of "
        f"{error['none']:.0e}" + ", as the run began" * (choice == "on"))


def processor_maker():
    """"GenuineIntel", "AuthenticAMD" ...; "" where the system does not say."""
    with contextlib.suppress(OSError):
        if match := re.search(r"vendor_id\s*:\s*(\S+)", Path("/proc/cpuinfo").read_text()):
            return match[1]
    return os.environ.get("PROCESSOR_IDENTIFIER", "").rpartition(" ")[2]  # Windows


def keep_memory():
    """Linux: let the C library keep the memory of freed tensors.

    It would return large blocks to the system and ask for them again, page by page, in the next
    step: up to a quarter of a large step on a CPU. Elsewhere this does nothing.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        library = ctypes.CDLL(None)
        # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):
            library.mallopt(option, value)


def choose_compile(stage):
    """--compile -> "on" or "off", and why."""
    cuda = stage.device.startswith("cuda")
    if stage.compile == "off" or (stage.compile == "auto" and not cuda):
        return "off", ""
    if stage.shard:
        return "off", "--shard moves weights around each block, which cannot be compiled"
    reason = flex.no_compiler("cuda" if cuda else "cpu")
    return ("off", f"nothing can be compiled here: {reason}") if reason else ("on", "")


def compile_blocks(model, kinds):
    """Compile the forward pass of each module of these classes, in place: names and weights stay.

    Blocks of one shape share their code. fullgraph: a graph break is an error, not a slow block.
    One piece of code serves encoder and decoder, training and evaluation, so it may have many
    versions.
    """
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for module in model.modules():
        if isinstance(module, kinds):
            module.compile(fullgraph=True, backend=flex.BACKEND)


def memory_mib(device):
    """Most memory used so far, in MiB: of the GPU, or of this process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**20
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (2**20 if sys.platform == "darwin" else 2**10)
