"""FlexAttention: a kernel that torch.compile generates for a mask (arXiv 2412.05496).

It computes the same as attention.reference_attention. It skips blocks of 128 x 128 pairs in which
the mask allows no pair. attention.py describes masks and arguments, and decides when it runs.
"""

import functools

import torch
from torch.nn.attention import flex_attention as torch_flex

BACKEND = "inductor"  # backend of torch.compile, here and in engine/machine.py


def flex_attention(q, k, v, mask=None, scale=None):
    """Same arguments and result as attention.sdpa, but not for float64.

    ValueError for gradients on a CPU, where it has no backward pass.
    """
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if grad and q.device.type == "cpu":
        raise ValueError("FlexAttention has no backward pass on a CPU: choose sdpa or reference, "
                         "or use torch.no_grad()")
    if not grad:  # on a CPU torch refuses tensors that require gradients even under no_grad
        q, k, v = q.detach(), k.detach(), v.detach()
    k, v = (x.expand(-1, q.shape[1], -1, -1) for x in (k, v))
    mask = mask if mask is not None and mask.kind else None
    blocks = mask and block_mask(mask, len(q), q.shape[2], k.shape[2], q.device)
    if torch.compiler.is_compiling():  # inside a compiled graph: compiled with it
        return torch_flex.flex_attention(q, k, v, block_mask=blocks, scale=scale)
    variant = mask and (mask.kind, mask.rows == 1, mask.window)
    return kernel(variant, q.shape[1], q.shape[3], q.dtype, q.device, grad, scale)(q, k, v, blocks)


def block_mask(mask, batch, queries, keys, device):
    """The torch BlockMask of an attention.Mask: its rule, and the blocks that are not empty.

    Cached in the mask, because all layers of a network need the same one.
    """
    def create():
        rows = None if mask.rows == 1 else batch
        return torch_flex.create_block_mask(mask.rule(batch, queries, keys, device), rows, None,
                                            queries, keys, device=device)
    if torch.compiler.is_compiling():
        return create()
    cache, size = mask.__dict__.setdefault("_blocks", {}), (batch, queries, keys, str(device))
    return cache.get(size) or cache.setdefault(size, create())


@functools.lru_cache(maxsize=None)
def kernel(variant, heads, width, dtype, device, grad, scale):
    """The compiled kernel for these constants; there is one for each combination.

    Batch and lengths may vary: torch.compile makes them dynamic at the second size. With fullgraph,
    torch.compile raises an error where it would otherwise silently use slow eager code, such as
    after 8 recompilations.
    """
    def flex(q, k, v, blocks):
        return torch_flex.flex_attention(q, k, v, block_mask=blocks, scale=scale)
    flex.__code__ = flex.__code__.replace()  # a copy: recompilations count per code object
    return torch.compile(flex, fullgraph=True, backend=BACKEND)


@functools.lru_cache(maxsize=None)
def no_compiler(device):
    """Why torch.compile fails on "cpu" or "cuda", in one line; "" = it works. Tried once."""
    try:
        compiled = torch.compile(lambda x: x.cos() + 1, fullgraph=True, backend=BACKEND)
        compiled(torch.zeros(8, device=device))
    except Exception as error:  # a missing compiler raises many types of errors
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return ""
