"""Attention, and the block that the encoders are made of: what differs is who may look at whom.

Why: a masked autoencoder, a frame-wise CLIP, a caption decoder and the bridge between two encoders
are told apart by what each token may look at, hardly by anything else. (The caption decoder arranges
its layers otherwise than `Block`, but its attention is this one too.) So attention is written once,
here, and the rest of the repository is about what to look at ("Attention Is All You Need", arXiv
1706.03762, Sec. 3.2, Attention; "An Image Is Worth 16x16 Words", arXiv 2010.11929, Sec. 3.1, Vision
Transformer).

    x (B, N, D) -+- norm1 -> attention -> (+) -+- norm2 -> mlp -> (+) -> x (B, N, D)
                 |_________________________|   |____________________|

The letters, used in every file. Small t, h, w are the three axes of the token grid; all other counts
are capitals.

    letter     meaning                                                        ViT-B value
    B          clips in the batch                                             -
    C          colour channels                                                3
    T H W      frames, pixel rows, pixel columns                              16, 224, 224
    t h w      token grid: tubelets in time, patch rows, patch columns        8, 14, 14
    S          tokens per frame, h*w                                          196
    N          tokens per clip, t*S                                           1568
    Nv Nm      visible and masked tokens, Nv + Nm = N                         160, 1408
    P          numbers inside one tubelet, 2*16*16*3                          1536
    D          model width                                                    768
    heads, K   attention heads, width of one head, D = heads*K                12, 64
    L V        text tokens, vocabulary size                                   77, 49408
    M          video tokens that a text or another encoder looks at           -
    W          width of the text encoder, where H and W are not pixels        512
    E          width of the joint video-text space                            512
    Q          learned queries                                                256
    Y          classes                                                        400

A video is (B, C, T, H, W), its tokens are (B, N, D), and token n = tau*S + y*w + x: time is slowest.
Queries, keys and values are always (B, heads, N, K).

The idea, in steps:
1. `Mask` says in words what a query may look at: the past, real tokens, its own segment, nearby
   frames. `Mask.rule` says the same as a function of two numbers, a query's and a key's.
2. `written_out`: a soft dictionary. Each token asks with its query and answers with its key and its
   value: a query is compared with every key, the similarities become weights that sum to one, and the
   weights mix the values. With unit-variance entries a dot
   product of K numbers has variance K; dividing by sqrt(K) keeps the softmax away from saturation.
3. `piecewise`, `fused`, `flex` and `apart` give the same numbers with less: piece by piece, computed again
   for the backward pass in place of being kept; by a ready-made kernel that never stores the scores;
   by one that torch.compile writes for the mask's rule; clip by clip.
4. `attention` is what the networks call; `choose` picks one of the five and says why.
5. `Attention` adds the projections, `Mlp` the other half, `Block` the pre-norm residuals.
   `DropPath` and `sinusoid_table` complete the kit.

Biases are what each projection adds to all queries, keys or values. One on the keys adds the same number to
all scores of a query, and softmax cannot see it, which is why VideoMAE has them on queries and values
only (bias="qv").

Where we differ from common code: DropPath drops samples, also where the official sequence-first code drops
token positions.

Numbers: one block of ViT-B holds 7.1 M parameters, 2.4 M of them in the attention.

>>> block = Block(width=32, heads=4)
>>> block(torch.zeros(2, 10, 32)).shape             # (B, N, D) -> (B, N, D)
torch.Size([2, 10, 32])
>>> block(torch.zeros(2, 10, 32), last=3).shape     # only the last three tokens ask
torch.Size([2, 3, 32])
"""

import functools
import itertools
import time
import warnings
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from engine.processes import joined

KERNELS = ("auto", "written_out", "piecewise", "fused", "flex", "apart")

# On a CPU the written-out form keeps all weights for the backward pass, up to KEPT bytes of them. Above, they
# are computed in pieces of at most PIECE bytes, twice: the attention alone takes a quarter to two thirds more
# time, and no more memory than fused kernels (LOG.md).
KEPT, PIECE = 8 * 2**20, 4 * 2**20


# ------------------------------------------------------------------------------------------------
# What may be looked at


@dataclass(frozen=True, eq=False)
class Mask:
    """Which keys a query may look at; each field given narrows the choice further.

    causal          True = a query sees keys up to its own position. With fewer queries than keys,
                    the queries are the last ones (as in step-by-step decoding).
    is_token        (B, Nk) bool, True = a real token, False = padding, never looked at
    segments        (B, Nk) int, the clip or sentence each key belongs to, when several are packed
                    in one row; a query sees its own segment only
    query_segments  (B, Nq) int, the same for queries; default: the last Nq of `segments`
    frames          (B, Nk) int, the frame each key belongs to; a query sees keys of frames at most
                    `window` away. 0 = its own frame only
    query_frames    (B, Nq) int, the same for queries; default: the last Nq of `frames`
    ready           its `blocks`, made before compiled code begins: see `made_ready`

    Tensors may have one row for all clips, (1, N). A query that may look at nothing gets zeros.
    """

    causal: bool = False
    is_token: torch.Tensor | None = None
    segments: torch.Tensor | None = None
    query_segments: torch.Tensor | None = None
    frames: torch.Tensor | None = None
    query_frames: torch.Tensor | None = None
    window: int = 0
    ready: BlockMask | None = None

    @property
    def kind(self):
        """Which of the four narrow: a tuple of names, () = every query sees every key."""
        return ("causal",) * self.causal + tuple(
            name for name in ("is_token", "segments", "frames") if getattr(self, name) is not None)

    @property
    def rows(self):
        """B, or 1 where the mask is the same for all clips."""
        tensors = (self.is_token, self.segments, self.query_segments, self.frames, self.query_frames)
        return max([1] + [len(x) for x in tensors if x is not None])

    def rule(self, rows, queries, keys, device):
        """The mask as a function: (row, head, query, key), all numbers, -> may it look? This is the
        one place that says so: broadcast, it fills a table; compiled, it becomes part of a kernel."""
        def both(of_keys, of_queries):
            if of_keys is None:
                return None, None
            of_queries = of_keys[:, keys - queries:] if of_queries is None else of_queries
            return of_queries.expand(rows, -1), of_keys.expand(rows, -1)

        ahead = torch.tensor(keys - queries, device=device)  # a tensor: as a number it would be compiled in
        causal, window = self.causal, self.window
        is_token = None if self.is_token is None else self.is_token.expand(rows, -1)
        (query_segments, segments), (query_frames, frames) = (
            both(self.segments, self.query_segments), both(self.frames, self.query_frames))

        def may_look(row, head, query, key):
            seen = key >= 0
            if causal:
                seen = seen & (key <= query + ahead)
            if is_token is not None:
                seen = seen & is_token[row, key]
            if segments is not None:
                seen = seen & (query_segments[row, query] == segments[row, key])
            if frames is not None:
                seen = seen & ((query_frames[row, query] - frames[row, key]).abs() <= window)
            return seen
        return may_look

    def allowed(self, queries, keys, device):
        """The mask as a table: (B or 1, 1, Nq, Nk) bool, True = may be looked at; None = all."""
        if not self.kind:
            return None
        rule = self.rule(self.rows, queries, keys, device)
        row, query, key = (torch.arange(n, device=device) for n in (self.rows, queries, keys))
        allowed = rule(row[:, None, None, None], 0, query[:, None], key)
        return allowed.expand(self.rows, 1, queries, keys)

    def blocks(self, batch, queries, keys, device):
        """The mask as FlexAttention wants it: its rule, and which blocks of 128 x 128 pairs hold
        anything. Kept for the next layer, which asks for the same."""
        if self.ready is not None:
            return self.ready

        def made():
            return create_block_mask(self.rule(batch, queries, keys, device), None if self.rows == 1 else batch,
                                     None, queries, keys, device=device)
        if torch.compiler.is_compiling():
            return made()
        kept = self.__dict__.setdefault("_blocks", {})
        wanted = batch, queries, keys, str(device)
        return kept.get(wanted) or kept.setdefault(wanted, made())


# ------------------------------------------------------------------------------------------------
# Attention, once in plain words and four times with less memory or time


def written_out(q, k, v, allowed=None, scale=None):
    """softmax(q k^T / sqrt(K)) v, in a few lines (arXiv 1706.03762, Sec. 3.2.1, Scaled Dot-Product).

    q (B, heads, Nq, K), k and v (B, heads or 1, Nk, K); allowed as `Mask.allowed`; returns as q.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return weights_of(q * scale, k, allowed).to(v.dtype) @ v


def weights_of(q, k, allowed=None):
    """How much of each value a query takes: (B, heads, Nq, Nk), rows sum to one, or to zero where nothing is allowed."""
    scores = q @ k.transpose(-2, -1)
    if allowed is None:
        return scores.softmax(dim=-1)
    weights = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(dim=-1)
    return weights.masked_fill(~allowed, 0)  # a row with nothing allowed: zeros, not a mean


def piecewise(q, k, v, mask=None, scale=None):
    """The same numbers, for a part of clips, heads or queries at a time; the backward pass computes the weights of
    each part again. All the weights are never there at once."""
    k, v = (x.expand(-1, q.shape[1], -1, -1) for x in (k, v))                # one key head, shared
    allowed = None if mask is None else mask.allowed(q.shape[2], k.shape[2], q.device)
    if torch.is_autocast_enabled(q.device.type):  # as it would do to every product
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast(q.device.type, enabled=False):
        return Piecewise.apply(q, k, v, allowed, scale)


class Piecewise(torch.autograd.Function):
    """See `piecewise`; there is a head of keys for each of queries, allowed is a table or None."""

    @staticmethod
    def pieces(q, k, allowed):
        """(place in q, place in k and v, that part of the table), piece by piece: some clips, or some heads of one, or
        some queries of one head."""
        (B, heads, Nq, _), row = q.shape, max(1, k.shape[2]) * q.element_size()
        most = [max(1, PIECE // (row * max(1, size))) for size in (Nq * heads, Nq, 1)]
        for starts in itertools.product(*(range(0, count, step) for count, step in zip((B, heads, Nq), most))):
            clips, some, queries = (slice(start, start + step) for start, step in zip(starts, most))
            part = None if allowed is None else allowed[clips if len(allowed) > 1 else slice(None), :, queries]
            yield (clips, some, queries), (clips, some), part

    @staticmethod
    def forward(ctx, q, k, v, allowed, scale):
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)  # as the projection reads it
        for of_q, of_k, part in Piecewise.pieces(q, k, allowed):
            out[of_q] = weights_of(q[of_q] * scale, k[of_k], part).to(v.dtype) @ v[of_k]
        ctx.save_for_backward(q, k, v, allowed)
        ctx.scale = scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        q, k, v, allowed = ctx.saved_tensors
        exact = torch.promote_types(q.dtype, torch.float32)                  # sums over pieces are not rounded piece by piece
        grad_q, grad_k, grad_v = q.new_empty(q.shape), k.new_zeros(k.shape, dtype=exact), v.new_zeros(v.shape, dtype=exact)
        # (a^T b)^T in place of b^T a: the large matrix as it lies is read twice as fast.
        for of_q, of_k, part in Piecewise.pieces(q, k, allowed):
            scaled, upstream = q[of_q] * ctx.scale, grad[of_q]
            weights = weights_of(scaled, k[of_k], part)
            grad_v[of_k] += (upstream.transpose(-2, -1) @ weights.to(v.dtype)).transpose(-2, -1)
            # A softmax sends back w * (g - sum of w * g over keys). Taken of these same g, so that in bfloat16 what must
            # cancel does: the output times its gradient is that sum too, rounded otherwise.
            scores = torch.ops.aten._softmax_backward_data(upstream @ v[of_k].transpose(-2, -1), weights, -1, weights.dtype)
            grad_q[of_q] = (scores @ k[of_k]).mul_(ctx.scale)
            grad_k[of_k] += (scaled.transpose(-2, -1) @ scores).transpose(-2, -1)
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None, None


def fused(q, k, v, mask=None, scale=None):
    """The same numbers from torch's fused kernels, which never hold all scores in memory: a block of
    queries meets a block of keys at a time, and a running maximum and sum finish the softmax
    (FlashAttention, arXiv 2205.14135, Sec. 3.1). They know "all" and "the past"; any other mask is a
    table that they read, and what it hides is computed all the same."""
    k, v = (x.expand(-1, q.shape[1], -1, -1) for x in (k, v))                # one key head, shared
    kind = () if mask is None else mask.kind
    if not kind or (kind == ("causal",) and q.shape[2] == k.shape[2]):
        return F.scaled_dot_product_attention(q, k, v, is_causal=bool(kind), scale=scale)
    allowed = mask.allowed(q.shape[2], k.shape[2], q.device)
    # Kernels disagree about a query that may look at nothing (zeros or NaN), so let it look
    # everywhere and throw the answer away.
    nothing = ~allowed.any(dim=-1, keepdim=True)                             # (B, 1, Nq, 1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed | nothing, scale=scale)
    return out.masked_fill(nothing, 0)


def flex(q, k, v, mask=None, scale=None):
    """The same numbers from a kernel made for the mask: torch.compile writes the mask's rule into a
    fused kernel, forward and backward, that leaves out blocks of 128 x 128 pairs in which nothing may
    be looked at (FlexAttention, arXiv 2412.05496). No backward on a CPU, none in float64."""
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if grad and q.device.type == "cpu":
        raise ValueError("FlexAttention has no backward pass on a CPU: choose another kernel, or torch.no_grad()")
    if not grad:  # what could have gradients is refused on a CPU, even where none are asked for
        q, k, v = q.detach(), k.detach(), v.detach()
    k, v = (x.expand(-1, q.shape[1], -1, -1) for x in (k, v))
    mask = mask if mask is not None and mask.kind else None
    blocks = None if mask is None else mask.blocks(len(q), q.shape[2], k.shape[2], q.device)
    if torch.compiler.is_compiling():  # it becomes part of the graph around it
        return flex_attention(q, k, v, block_mask=blocks, scale=scale)
    variant = mask and (mask.kind, mask.rows == 1, mask.window)
    return _kernel(variant, q.shape[1], q.shape[3], q.dtype, q.device, grad, scale)(q, k, v, blocks)


BACKEND = "inductor"  # of torch.compile


@functools.lru_cache(maxsize=None)
def _kernel(kind, heads, width, dtype, device, grad, scale):
    """A FlexAttention of its own for all that a kernel is written for. Only batch and lengths vary within
    one, and torch.compile makes a kernel for any size when it meets the second, once per size.

    It counts versions by code object and past the eighth falls back to the slow form, silently unless the
    whole function must become one graph. So: one code object each, and fullgraph, which raises instead."""
    def run(q, k, v, blocks):
        return flex_attention(q, k, v, block_mask=blocks, scale=scale)
    run.__code__ = run.__code__.replace(co_name="flex")  # a copy
    return torch.compile(run, fullgraph=True, backend=BACKEND)


@functools.lru_cache(maxsize=None)
def _flex_works(kind, width, dtype, device):
    """Does FlexAttention give the written-out numbers for such masks there, forward and backward? Tried once, on 256
    tokens: inside a compiled block its failure could not be caught. A failing kind is never chosen again, and a
    warning says why."""
    place = torch.arange(256, device=device)[None]
    fields = {"is_token": place < 200, "segments": place // 100, "frames": place // 50}
    mask = Mask(causal="causal" in kind, window=1, **{name: fields[name] for name in kind if name != "causal"})
    rng = torch.Generator(device).manual_seed(0)  # a generator of its own: the network's draws stay
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(torch.device(device).type, enabled=False):
            upstream, *inputs = torch.randn(4, 1, 1, 256, width, generator=rng, device=device).to(dtype).unbind()
            inputs = [x.requires_grad_() for x in inputs]
            found = [(out, *torch.autograd.grad(out, inputs, upstream)) for out in (
                flex(*inputs, mask), attention(*inputs, mask, kernel="written_out"))]
            errors = [float((a - b).detach().abs().max() / b.detach().abs().max()) for a, b in zip(*found)]
        wrong = [error for error in errors if not error < 0.05]  # NaN is less than nothing
        reason = f"numbers that are wrong by {wrong[0]:.1e} of the largest" if wrong else ""
    except Exception as failure:  # of the compiler, of the kernel, of the driver
        reason = (str(failure).strip() or type(failure).__name__).splitlines()[0]
    if reason:
        _give_up(kind, reason)
    return not reason


def _give_up(kind, reason):
    _failed.add(kind)
    warnings.warn(f"attention: no compiled kernel for {' and '.join(kind)} here, a slower one from now on ({reason})")


def made_ready(mask, q, k):
    """The mask for layers whose attention is of such queries and keys (only their shape, device and dtype count): where
    FlexAttention will be chosen, with its blocks, so that no compiled layer makes them again. Otherwise as it was."""
    if mask is None or not mask.kind or mask.ready is not None or torch.compiler.is_compiling():
        return mask
    if (choose(q, k, mask) if _always == "auto" else _always) != "flex":
        return mask
    return replace(mask, ready=mask.blocks(len(q), q.shape[2], k.shape[2], q.device))


def apart(q, k, v, mask, scale=None):
    """The same numbers for packed clips, one clip at a time: no pair of different clips is computed. For a
    CPU, where `segments` can be read without waiting for a device. Raises ValueError for a mask of anything but
    segments."""
    if mask is None or mask.kind != ("segments",):
        raise ValueError("apart is for packed clips: a mask of segments alone")
    asking = mask.segments[:, k.shape[2] - q.shape[2]:] if mask.query_segments is None else mask.query_segments
    rows = []
    for b in range(len(q)):
        of_queries, of_keys = (x[b if len(x) > 1 else 0] for x in (asking, mask.segments))
        clips = torch.cat([of_queries, of_keys]).unique()
        nq, nk = ((x[:, None] == clips).sum(dim=0).tolist() for x in (of_queries, of_keys))
        order, places = of_queries.argsort(stable=True), of_keys.argsort(stable=True)
        parts = zip(q[b:b + 1].index_select(2, order).split(nq, dim=2),
                    *(x[b:b + 1].index_select(2, places).split(nk, dim=2) for x in (k, v)))
        out = torch.cat([attention(*part, scale=scale, kernel="auto") for part in parts], dim=2)
        rows.append(out.index_select(2, order.argsort()))
    return torch.cat(rows)


@functools.lru_cache(maxsize=None)
def no_compiler(device):
    """Why torch.compile does not work for "cpu" or "cuda" here, in one line, or "": found by trying."""
    try:
        torch.compile(lambda x: x.cos() + 1, fullgraph=True, backend=BACKEND)(torch.zeros(8, device=device))
    except Exception as error:  # a missing compiler shows in many ways
        return str(error).strip().splitlines()[0]
    return ""


FUSED = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
         "efficient": SDPBackend.EFFICIENT_ATTENTION}


@functools.lru_cache(maxsize=None)
def fastest_fused(device):
    """Which of torch's fused kernels is fastest depends on the GPU, so on CUDA each takes one attention of ViT-B
    there and back, and the quickest goes first for the rest of the process. FlashAttention 3 and 4, packages of their
    own that put themselves in place of torch's flash kernel, take part where they are installed and give the same
    numbers. By reading alone: neither was seen to run.

    Returns {name: milliseconds}, quickest first; {} where there is no choice."""
    if torch.device(device).type != "cuda":
        return {}
    found = {}
    for name in (*FUSED, *newer_flash()):
        try:
            _activate(name)
            if name in FUSED or _flash_is_right(device):
                found[name] = _there_and_back(FUSED.get(name, SDPBackend.FLASH_ATTENTION), device)
        except Exception:  # this GPU or this build has no such kernel; those of packages fail in ways of their own
            continue
    _activate("flash")
    return dict(sorted(found.items(), key=lambda pair: pair[1]))


def newer_flash():
    """Names of the flash kernels that torch knows beside its own, () where it knows none; installed or not."""
    return tuple(getattr(torch.nn.attention, "list_flash_attention_impls", tuple)())


def _activate(name):
    """Let torch's flash kernel be the one of that name; any other name: torch's own."""
    if name in newer_flash():
        torch.nn.attention.activate_flash_attention_impl(name)
    elif newer_flash() and torch.nn.attention.current_flash_attention_impl():
        torch.nn.attention.restore_flash_attention_impl()


def _flash_is_right(device):
    """Does flash give the written-out numbers in bfloat16, forward and backward: widths of ViT-B, -H and -g, the past,
    one query? Two roundings' worth of the largest number are allowed."""
    rng = torch.Generator(device).manual_seed(0)
    for width, queries, keys, causal in ((64, 257, 257, False), (64, 257, 257, True), (80, 130, 65, False),
                                         (88, 1, 65, False)):
        q, k, v = (torch.randn(2, n, 3, width, generator=rng, device=device).bfloat16().transpose(1, 2).requires_grad_()
                   for n in (queries, keys, keys))
        exact = [x.detach().float().requires_grad_() for x in (q, k, v)]
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
            got = out, *torch.autograd.grad(out, (q, k, v), out.detach())
        expected = attention(*exact, Mask(causal=causal), kernel="written_out")
        wanted = expected, *torch.autograd.grad(expected, exact, out.detach().float())
        if not all((a - b).abs().max() <= 2**-6 * b.abs().max().clamp(min=1) for a, b in zip(got, wanted)):
            return False  # so is NaN
    return True


def _there_and_back(backend, device):
    """Milliseconds of one attention of ViT-B in bfloat16, forward and backward."""
    x = torch.randn(4, 12, 1568, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    with sdpa_kernel(backend):
        for i in range(13):
            if i == 3:  # warm by now
                torch.cuda.synchronize(device)
                started = time.perf_counter()
            F.scaled_dot_product_attention(x, x, x).backward(x.detach())
        torch.cuda.synchronize(device)
    return (time.perf_counter() - started) / 10 * 1e3


def prefer(names):
    """For the rest of the process, torch's fused attention tries these kernels in this order, see `fastest_fused`; the
    last resort, which takes any shape, stays. Of flash kernels the first counts."""
    global _order
    flash = [name for name in names if FUSED.get(name, SDPBackend.FLASH_ATTENTION) is SDPBackend.FLASH_ATTENTION]
    _activate(flash[0] if flash else "flash")
    if _order is not None:
        _order.__exit__(None, None, None)
        _order = None
    if names:
        order = dict.fromkeys(FUSED.get(name, SDPBackend.FLASH_ATTENTION) for name in names)
        _order = sdpa_kernel([*order, SDPBackend.MATH], set_priority=True)
        _order.__enter__()


_order = None
_always = "auto"
_failed = set()  # kinds of masks that torch.compile could not make a kernel for


def use(kernel, device="cpu"):
    """Which kernel every attention takes that names none; "auto" = `choose`. Returns the choice in words."""
    global _always
    _always = _known(kernel)
    cpu = torch.device(device).type == "cpu"
    measured = fastest_fused(device) if kernel in ("auto", "fused") else {}
    if measured:
        prefer(list(measured))
    quickest = ", ".join(f"{name} {ms:.2f} ms" for name, ms in measured.items())
    if kernel != "auto":
        return f"{kernel} for all" + f" (measured: {quickest})" * bool(quickest)
    if cpu:
        return (f"written out up to {KEPT >> 20} MiB of scores, in pieces above; packed clips one by one; windows of "
                "frames, without gradients, by FlexAttention where that can be compiled")
    reason = no_compiler("cuda")
    return (f"fused where nothing or only the future is hidden (measured: {quickest}), other masks by "
            + (f"a table, for nothing can be compiled: {reason}" if reason else "FlexAttention"))


def choose(q, k, mask=None):
    """The kernel for these queries, keys and mask -> its name.

    CUDA  No mask, or the past: `fused` (flash or cuDNN, see `fastest_fused`). Other masks: `flex`, from 128
          queries on; below that, or without a compiler, a table for `fused` is cheap; a kind that was tried and
          failed (`_flex_works`) has a table, too.
    CPU   `written_out`, and where its scores would take much memory, `piecewise`: matrix products use the fast
          bfloat16 units, which the fused CPU kernel does not (2 to 4 times, forward and backward).
          `fused` for the past of more than 512 float32 tokens, half of which it leaves out. Packed clips:
          `apart`. Windows of frames, without gradients: `flex`, for most blocks are empty. (Torch up to 2.14 writes
          C++ for one size of them; another does not compile, which a warning says before it goes on in pieces.)
    """
    kind, Nq, Nk = () if mask is None else mask.kind, q.shape[2], k.shape[2]
    compiling, cpu = torch.compiler.is_compiling(), q.device.type == "cpu"
    plain = not kind or (kind == ("causal",) and Nq == Nk)
    if not plain and Nq >= 128 and q.shape[3] >= 16 and q.dtype != torch.float64 and kind not in _failed and \
            (not cpu or ("frames" in kind and Nq >= 512 and not torch.is_grad_enabled() and not compiling)) and \
            (compiling or not no_compiler(q.device.type)) and \
            (compiling or cpu or _flex_works(kind, q.shape[3], q.dtype, q.device)):
        return "flex"
    if not cpu:
        return "fused"
    if kind == ("segments",) and not compiling:
        return "apart"
    if kind == ("causal",) and Nq == Nk > 512 and q.dtype == torch.float32:
        return "fused"
    scores = q.shape[0] * q.shape[1] * Nq * Nk * q.element_size()
    return "written_out" if scores <= KEPT or compiling else "piecewise"


def _known(kernel):
    if kernel not in KERNELS:
        raise ValueError(f"no attention kernel {kernel!r}: choose {', '.join(KERNELS[:-1])} or {KERNELS[-1]}")
    return kernel


def attention(q, k, v, mask=None, *, scale=None, kernel=None):
    """What every network here calls: attention by the best kernel for the device and the mask.

    q       (B, heads, Nq, K) float
    k, v    (B, heads, Nk, K) float, or (B, 1, Nk, K): one head of keys and values for all queries
    mask    Mask or None (every query sees every key)
    scale   factor on q k^T; default 1/sqrt(K)
    kernel  "auto", "written_out", "piecewise", "fused", "flex" or "apart"; default: what `use` was told, "auto"
    returns (B, heads, Nq, K)
    """
    kernel = chosen = _known(kernel or _always)
    if chosen == "auto":
        kernel = choose(q, k, mask)
    if kernel == "flex":
        try:
            return flex(q, k, v, mask, scale)
        except torch._dynamo.exc.TorchDynamoException as error:
            if chosen == "flex" or torch.compiler.is_compiling():
                raise
            _give_up(mask.kind, str(error).strip().splitlines()[0])
            kernel = choose(q, k, mask)
    if kernel == "written_out":
        allowed = None if mask is None else mask.allowed(q.shape[2], k.shape[2], q.device)
        return written_out(q, k, v, allowed, scale)
    return {"piecewise": piecewise, "fused": fused, "apart": apart}[kernel](q, k, v, mask, scale)


# ------------------------------------------------------------------------------------------------
# Layers


def gelu(x):
    """x * Phi(x), the exact form with the error function: VideoMAE, the bridge, the heads."""
    return F.gelu(x)


def quick_gelu(x):
    """x * sigmoid(1.702 x): CLIP's cheaper cousin. It differs from `gelu` by up to 0.02, so
    weights trained with one give wrong features with the other."""
    return x * torch.sigmoid(1.702 * x)


def sinusoid_table(positions, width):
    """Fixed position codes: sines and cosines of wavelengths from 2 pi to 10000 * 2 pi.

    Returns (positions, width) float32. Column j holds sin (even j) or cos (odd j) of
    position / 10000^(2*floor(j/2)/width). The dot product of two rows depends on their distance
    alone. (arXiv 1706.03762, Sec. 3.5, Positional Encoding.)
    """
    place = torch.arange(positions, dtype=torch.float64)[:, None]
    column = torch.arange(width)
    angle = place / 10000 ** (2 * (column // 2).double() / width)
    return torch.where(column % 2 == 0, angle.sin(), angle.cos()).float()


class DropPath(nn.Module):
    """Skip a residual branch for a random share of the samples (arXiv 1603.09382, Sec. 3).

    rate  probability that a sample skips the branch, in [0, 1). The others are divided by
          1 - rate, so that the mean stays. Does nothing in eval mode.
    """

    def __init__(self, rate=0.0):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if not self.training or self.rate == 0:
            return x
        rows, mine = joined(x.shape[0])  # several processes: of one draw, each takes its rows
        keep = x.new_empty((rows,) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.rate)[mine]
        return x * keep / (1 - self.rate)

    def extra_repr(self):
        return f"rate={self.rate:.3f}"


class Dropout(nn.Dropout):
    """Dropout whose draw is that of the joined batch of all processes: see processes.py. x (B, ...)."""

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        rows, mine = joined(x.shape[0])
        if rows == len(x):
            return super().forward(x)
        keep = x.new_ones((rows,) + x.shape[1:])
        return x * F.dropout(keep, self.p)[mine]


class Attention(nn.Module):
    """Multi-head attention with its projections: out = proj(attention(q, k, v)).

    width, heads   D and the number of heads; D must be a multiple of heads
    context_width  width of the tokens that give keys and values; None = self-attention
    bias           "qkv", "qv" (queries and values only, as VideoMAE) or "none"
    cosine         compare directions only: scores are cosines times a learned temperature of at
                   most 100 (Swin V2, arXiv 2111.09883, Sec. 3.2; an option of VideoMAE V2)
    """

    def __init__(self, width, heads, *, context_width=None, bias="qkv", cosine=False):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of {heads} heads")
        if bias not in ("qkv", "qv", "none"):
            raise ValueError(f"bias is {bias!r}: choose qkv, qv or none")
        if context_width is not None and bias == "qv":
            raise ValueError("bias='qv' is for self-attention")
        self.heads = heads
        if context_width is None:
            self.qkv = nn.Linear(width, 3 * width, bias=bias == "qkv")
        else:
            self.q = nn.Linear(width, width, bias=bias == "qkv")
            self.kv = nn.Linear(context_width, 2 * width, bias=bias == "qkv")
        self.q_bias = nn.Parameter(torch.zeros(width)) if bias == "qv" else None
        self.v_bias = nn.Parameter(torch.zeros(width)) if bias == "qv" else None
        self.temperature = nn.Parameter(torch.full((heads, 1, 1), 10.0).log()) if cosine else None
        self.proj = nn.Linear(width, width)

    def project(self, x, context, last):
        """Queries, keys and values side by side: (B, Nq, D), (B, Nk, D), (B, Nk, D)."""
        if context is not None:
            return self.q(x if last is None else x[:, -last:]), *self.kv(context).chunk(2, dim=-1)
        weight, bias = self.qkv.weight, self.qkv.bias
        if self.q_bias is not None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        if last is None:
            return F.linear(x, weight, bias).chunk(3, dim=-1)
        D = x.shape[-1]
        q = F.linear(x[:, -last:], weight[:D], None if bias is None else bias[:D])
        return q, *F.linear(x, weight[D:], None if bias is None else bias[D:]).chunk(2, dim=-1)

    def forward(self, x, context=None, mask=None, last=None):
        """x (B, Nq, D) -> (B, Nq, D). context (B, Nk, context_width): where keys and values come
        from. last: only the last `last` tokens of x ask, the result is (B, last, D)."""
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2)         # (B, heads, N, K)
                   for y in self.project(x, context, last))
        scale = None
        if self.temperature is not None:
            q = F.normalize(q, dim=-1) * self.temperature.clamp(max=4.6052).exp()
            k, scale = F.normalize(k, dim=-1), 1.0
            q, k = q.to(v.dtype), k.to(v.dtype)
        out = attention(q, k, v, mask, scale=scale)
        return self.proj(out.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """fc2(activation(fc1(x))), token by token. x (B, N, D) -> (B, N, D)."""

    def __init__(self, width, hidden, activation=gelu, drop=0.0):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.activation = activation
        self.drop = Dropout(drop)

    def forward(self, x):
        return self.drop(self.fc2(self.activation(self.fc1(x))))


class Block(nn.Module):
    """The pre-norm transformer block: x + attn(norm1 x), then x + mlp(norm2 x).

    mlp_width    hidden width of the MLP, default 4*D
    drop_path    see DropPath
    layer_scale  start value of a learned factor per channel on each branch; None = no factor
    eps          of both LayerNorms: 1e-6 in VideoMAE, 1e-5 in CLIP
    """

    def __init__(self, width, heads, *, mlp_width=None, bias="qkv", cosine=False, eps=1e-6,
                 drop=0.0, drop_path=0.0, layer_scale=None, activation=gelu):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads, bias=bias, cosine=cosine)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, mlp_width or 4 * width, activation, drop)
        self.drop_path = DropPath(drop_path)
        self.gamma1 = self.gamma2 = None
        if layer_scale is not None:
            self.gamma1 = nn.Parameter(torch.full((width,), float(layer_scale)))
            self.gamma2 = nn.Parameter(torch.full((width,), float(layer_scale)))

    def look(self, x, mask, last):
        """What the tokens see in each other; mae.DividedBlock looks otherwise."""
        return self.attn(x, mask=mask, last=last)

    def forward(self, x, mask=None, last=None):
        """x (B, N, D) -> (B, N, D), or (B, last, D): the output for the last `last` tokens alone,
        which still look at all N. It is the full result cut short, without the wasted work."""
        kept = x if last is None else x[:, -last:]
        seen = self.look(self.norm1(x), mask, last)
        x = kept + self.drop_path(seen if self.gamma1 is None else self.gamma1 * seen)
        digested = self.mlp(self.norm2(x))
        return x + self.drop_path(digested if self.gamma2 is None else self.gamma2 * digested)


def run_blocks(blocks, x, mask=None, last=None, recompute=False):
    """x through all blocks; the final one answers for the last `last` tokens only (None = all).

    recompute  True = keep no activations inside a block and compute them again in the backward
               pass: about a third more time for a fraction of the memory (arXiv 1604.06174).
    """
    made = {None: mask, last: mask}
    if mask is not None and len(blocks):
        kind, heads = x.device.type, blocks[0].attn.heads
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        q = x.new_empty((), dtype=dtype).expand(len(x), heads, x.shape[1], x.shape[2] // heads)  # of no memory: its shape
        made = {n: made_ready(mask, q if n is None else q[:, :, -n:], q) for n in made}
    for i, block in enumerate(blocks):
        final = last if i == len(blocks) - 1 else None
        if recompute and torch.is_grad_enabled():
            x = torch.utils.checkpoint.checkpoint(block, x, made[final], final, use_reentrant=False)
        else:
            x = block(x, made[final], final)
    return x if last is None else x[:, -last:]


# ------------------------------------------------------------------------------------------------
# Try it


@torch.no_grad()
def main(argv=None):
    """`python attention.py`: attention step by step, and a picture of what each mask lets a token see."""
    import argparse
    from pathlib import Path

    from engine import pictures

    parser = argparse.ArgumentParser(description="Attention, shape by shape, and its masks in a picture.")
    parser.add_argument("--out", default="runs/masks.png", help="where the picture goes (.png)")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    layer, x = Attention(96, 4).eval(), torch.randn(2, 12, 96)
    q, k, v = (y.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for y in layer.project(x, None, None))
    scores = q @ k.mT * q.shape[-1]**-0.5
    share = scores.softmax(dim=-1)
    difference = (layer(x) - layer.proj((share @ v).transpose(1, 2).flatten(2))).abs().max()
    for name, letters, value in (
            ("tokens", "(B, N, D)", x), ("queries, and so keys and values", "(B, heads, N, K)", q),
            ("scores: each query with each key, over sqrt K", "(B, heads, N, N)", scores),
            ("shares: their softmax; each row sums to 1", "(B, heads, N, N)", share),
            ("mixed values, heads side by side, projected", "(B, N, D)", layer(x))):
        print(f"{name:50s} {letters:18s} {tuple(value.shape)}")
    print(f"as written here and as Attention computes it ({choose(q, k)}): {difference:.0e} apart")
    clips = torch.arange(12)[None] // torch.tensor([5])                     # 5, 5 and 2 tokens
    masks = {"none": Mask(), "causal": Mask(causal=True), "padding: the last 3 are none": Mask(is_token=torch.arange(12)[None] < 9),
             "three clips packed in a row": Mask(segments=clips), "frames of 3, window 1": Mask(frames=torch.arange(12)[None] // 3, window=1),
             "the last 4 ask, causal": Mask(causal=True)}
    tables = {}
    for name, mask in masks.items():
        queries = 4 if name.startswith("the last") else 12
        allowed = mask.allowed(queries, 12, "cpu")
        tables[name] = torch.ones(queries, 12, dtype=torch.bool) if allowed is None else allowed[0, 0]
    path = Path(args.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures.masks(tables, path)
    print(f"drawn: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
