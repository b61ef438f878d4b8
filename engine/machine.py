"""Choices that depend on the machine: device, precision, threads, oneDNN, torch.compile, memory."""

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
    """"auto" or the name of a torch device -> its name. UserError where it is not available."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # fails for the device "meta", too
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {name}: not available here; use cpu"
                      + (" or cuda" if torch.cuda.is_available() else "")) from None
    return str(device)


def choose_precision(name, device):
    """--precision -> "bf16" or "fp32"; auto = bf16 where the processor supports it natively."""
    if name != "auto":
        return name
    if device.startswith("cuda"):
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        supports = getattr(torch.cpu, "get_capabilities", dict)()
        before_2_13 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        fast = any(map(supports.get, ("avx512_bf16", "amx_bf16", "bf16"))) or before_2_13()
    return "bf16" if fast else "fp32"


CGROUP = Path("/sys/fs/cgroup")  # where Linux lists the limits of a container


def processors():
    """Number of processors this process may use, by its affinity and by a container's quota."""
    count = len(getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0))
    for names in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):  # cgroup v2, v1
        with contextlib.suppress(OSError, ValueError):  # ValueError: "max", no quota
            quota, period = map(int, " ".join(
                (CGROUP / name).read_text() for name in names).split())
            count = min(count, quota // period) if quota > 0 else count
    return max(1, count)


SMALL_NETWORK = 1e13  # parameters times pixels of a micro-batch


def choose_threads(parameters, pixels):
    """Set the number of threads for a network on a CPU -> the reason, in words.

    parameters   of the network
    pixels       of a micro-batch, B * T * H * W

    1. If OMP_NUM_THREADS is set, it decides.
    2. A small network gets one thread. Its steps consist of many short operations, and after each
       one all threads wait for the slowest. A second thread makes them 1.2 to 1.7 times as fast on
       an idle machine, and many times slower where another program uses a processor (LOG.md).
    3. A larger network gets all processors. Workers are not subtracted, because they mostly wait.

    The number changes the last bits of results. So it depends on machine and settings alone, not on
    other programs.
    """
    if os.environ.get("OMP_NUM_THREADS"):
        return "OMP_NUM_THREADS"
    small = parameters * pixels < SMALL_NETWORK
    torch.set_num_threads(1 if small else processors())
    return "a small network" if small else "all processors"


def choose_onednn(choice="auto"):
    """Choose oneDNN for float32 matrix products on a CPU, or not -> "on" or "off", and the reason.

    choice  "auto"; or "on" or "off" to repeat the choice of a resumed run, for the same last bits

    Without oneDNN, PyTorch uses MKL if it was built with it. MKL is slower on processors that are
    not from Intel, by a tenth (Zen 4) to a half (Zen 5; LOG.md). PyTorch's switch for oneDNN also
    permits bfloat16 units. oneDNN uses them only on processors with AMX and computes in float32
    elsewhere. So one product is computed as a test, and its error must be below 1e-5. Time is not
    measured, because the choice changes the last bits: it must be the same in every run and in all
    its processes.
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
    votes = processes.gather_rows([(processes.rank(), slow and error["bf16"] < 1e-5)])
    enabled = choice == "on" or all(vote for _, vote in votes)
    setting.fp32_precision = "bf16" if enabled else "none"
    return "on" if enabled else "off", (
        f"processor by {maker or 'an unknown maker'}, error {error['bf16']:.0e} instead of "
        f"{error['none']:.0e}" + ", as the run began" * (choice == "on"))


def processor_maker():
    """"GenuineIntel", "AuthenticAMD" ...; "" where the system does not say."""
    with contextlib.suppress(OSError):
        if match := re.search(r"vendor_id\s*:\s*(\S+)", Path("/proc/cpuinfo").read_text()):
            return match[1]
    return os.environ.get("PROCESSOR_IDENTIFIER", "").rpartition(" ")[2]  # Windows


def keep_memory():
    """On Linux, let the C library keep the memory of freed tensors. Elsewhere this does nothing.

    By default it returns large blocks to the system and requests them again in the next step. That
    takes up to a quarter of a large step on a CPU.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        library = ctypes.CDLL(None)
        # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):
            library.mallopt(option, value)


def choose_compile(stage):
    """--compile -> "on" or "off", and the reason."""
    cuda = stage.device.startswith("cuda")
    if stage.compile == "off" or (stage.compile == "auto" and not cuda):
        return "off", ""
    if stage.shard:
        return "off", "--shard gathers weights around each block, which cannot be compiled"
    reason = flex.no_compiler("cuda" if cuda else "cpu")
    return ("off", f"nothing can be compiled here: {reason}") if reason else ("on", "")


def compile_blocks(model, kinds):
    """Compile the forward pass of each module of these classes in place.

    Names and weights do not change. Modules of the same shape share compiled code. With fullgraph,
    a graph break is an error instead of a slow block. Encoder and decoder, training and evaluation
    use the same forward pass, so it may be compiled many times.
    """
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for module in model.modules():
        if isinstance(module, kinds):
            module.compile(fullgraph=True, backend=flex.BACKEND)


def memory_mib(device):
    """Peak memory so far, in MiB: of the GPU, or of this process on a CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**20
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (2**20 if sys.platform == "darwin" else 2**10)
