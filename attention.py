"""Attention and the transformer block that every network here is made of.

The networks differ mainly in what a token may attend to, so attention is written once ("Attention
Is All You Need", arXiv 1706.03762, Sec. 3.2; Vision Transformer, arXiv 2010.11929, Sec. 3.1).

    x (B, N, D) -+- norm1 -> attention -> (+) -+- norm2 -> mlp -> (+) -> x (B, N, D)
                 |_________________________|   |____________________|

    letter     meaning                                                        ViT-B value
    B C        clips in the batch, colour channels                            -, 3
    T H W      frames, pixel rows, pixel columns                              16, 224, 224
    t h w      token grid: tubelets in time, patch rows, patch columns        8, 14, 14
    S N        tokens per frame, h*w; tokens per clip, t*S                    196, 1568
    D          model width                                                    768
    heads, K   attention heads, width of one head, D = heads*K                12, 64

A video is (B, C, T, H, W) and its tokens are (B, N, D). Token n = tau*S + y*w + x: time is the
slowest axis. Queries, keys and values are (B, heads, N, K). Other files define their own letters.

1. `Mask` says which keys a query may attend to. `Mask.rule` is the one place that defines it.
2. `reference_attention` is the definition. Each query is compared with every key, softmax turns
   the similarities into weights that sum to one, and the weights mix the values. A dot product of K
   numbers of unit variance has variance K. Division by sqrt(K) keeps the softmax from saturating.
3. `sdpa` (torch's own kernel) and `flex_attention` (a kernel that torch.compile generates for the
   mask, engine/flex.py) compute the same numbers with less memory. `choose` names one of the three.
4. `Attention` adds the projections, `Mlp` is the other half, `Block` the pre-norm residual block.
   `run_blocks` hands a `Context` to each block: all that a block needs besides its tokens.

A bias on the keys adds the same number to all scores of a query, and softmax ignores it. VideoMAE
therefore has biases on queries and values only (bias="qv"). Where we differ: DropPath drops
samples. Official code that puts the sequence first drops token positions.

>>> block = Block(width=32, heads=4)
>>> block(torch.zeros(2, 10, 32)).shape                    # (B, N, D) -> (B, N, D)
torch.Size([2, 10, 32])
>>> block(torch.zeros(2, 10, 32), Context(last=3)).shape   # only the last three tokens are queries
torch.Size([2, 3, 32])
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from engine.flex import flex_attention, no_compiler
from engine.processes import joined

FORMS = ("auto", "reference", "sdpa", "flex")

# `choose` takes the reference form up to this many bytes of scores, B*heads*Nq*Nk*2. It keeps them
# in each block for the backward pass, 0.4 GiB in 12 blocks. From about 50 MiB on it is not faster.
SMALL = 32 * 2**20


# ------------------------------------------------------------------------------------------------
# What a query may attend to


@dataclass(frozen=True, eq=False)
class Mask:
    """Which keys a query may attend to. Every field that is given excludes further keys.

    The queries are the last Nq of the Nk keys. A query that may attend to nothing gets zeros.
    """

    causal: bool = False                   # only keys up to the query's own position
    is_token: torch.Tensor | None = None   # (B or 1, Nk) bool; False = padding, never attended to
    frames: torch.Tensor | None = None     # (B or 1, Nk) int, frame of each key, or any group:
    window: int = 0                        # only keys at most so many frames away from the query

    @property
    def kind(self):
        """Names of the fields that exclude keys; () = every query attends to every key."""
        tensors = tuple(name for name in ("is_token", "frames") if getattr(self, name) is not None)
        return ("causal",) * self.causal + tensors

    @property
    def rows(self):
        """B, or 1 where the mask is the same for all clips."""
        return max([1] + [len(x) for x in (self.is_token, self.frames) if x is not None])

    def rule(self, batch, queries, keys, device):
        """The mask as a function of (row, head, query, key), integers -> bool, may it attend?"""
        # A tensor, because torch.compile would specialise the kernel for a Python number.
        offset = torch.tensor(keys - queries, device=device)
        causal, window = self.causal, self.window
        is_token, frames = (None if x is None else x.expand(batch, -1)
                            for x in (self.is_token, self.frames))
        query_frames = None if frames is None else frames[:, keys - queries:]

        def may_attend(row, head, query, key):
            allowed = key >= 0
            if causal:
                allowed = allowed & (key <= query + offset)
            if is_token is not None:
                allowed = allowed & is_token[row, key]
            if frames is not None:
                distance = (query_frames[row, query] - frames[row, key]).abs()
                allowed = allowed & (distance <= window)
            return allowed
        return may_attend

    def allowed(self, queries, keys, device):
        """The mask as a table: (B or 1, 1, Nq, Nk) bool, True = may attend; None = everything."""
        if not self.kind:
            return None
        rule = self.rule(self.rows, queries, keys, device)
        row, query, key = (torch.arange(n, device=device) for n in (self.rows, queries, keys))
        allowed = rule(row[:, None, None, None], 0, query[:, None], key)
        return allowed.expand(self.rows, 1, queries, keys)


# ------------------------------------------------------------------------------------------------
# Attention: the definition, forms with the same numbers, and the choice. Arguments: see `attention`


def attention_weights(q, k, allowed=None, scale=None):
    """softmax(q k^T / sqrt(K)): how much of each value a query takes, (B, heads, Nq, Nk).

    allowed  as `Mask.allowed` returns it. Rows sum to one, or to zero where nothing is allowed
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = (q * scale) @ k.transpose(-2, -1)
    if allowed is None:
        return scores.softmax(dim=-1)
    weights = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(dim=-1)
    return weights.masked_fill(~allowed, 0)  # a row with nothing allowed: zeros, not a mean


def reference_attention(q, k, v, mask=None, scale=None):
    """softmax(q k^T / sqrt(K)) v: the definition (arXiv 1706.03762, Sec. 3.2.1). The backward pass
    keeps all Nq x Nk weights."""
    allowed = None if mask is None else mask.allowed(q.shape[2], k.shape[2], q.device)
    return attention_weights(q, k, allowed, scale).to(v.dtype) @ v


def sdpa(q, k, v, mask=None, scale=None):
    """The same numbers from torch's scaled_dot_product_attention. Where it can, it never stores all
    scores: it takes one block of queries and one block of keys at a time (FlashAttention, arXiv
    2205.14135, Sec. 3.1). The causal mask is built in. Any other mask becomes a table."""
    k, v = (x.expand(-1, q.shape[1], -1, -1) for x in (k, v))  # one head may serve all queries
    kind = () if mask is None else mask.kind
    if not kind or (kind == ("causal",) and q.shape[2] == k.shape[2]):
        return F.scaled_dot_product_attention(q, k, v, is_causal=bool(kind), scale=scale)
    allowed = mask.allowed(q.shape[2], k.shape[2], q.device)
    # Kernels disagree about a query that may attend to nothing (zeros or NaN). It attends to
    # everything here, and its result is replaced by zeros.
    nothing = ~allowed.any(dim=-1, keepdim=True)                             # (B or 1, 1, Nq, 1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed | nothing, scale=scale)
    return out.masked_fill(nothing, 0)


def choose(q, k, mask=None):
    """The form for these queries, keys and mask: "sdpa", "flex" or "reference".

    1. "sdpa", torch's maintained kernel, except in the next two cases. Nothing is timed.
    2. CUDA, a mask of padding or frames, and 128 queries or more: "flex" skips empty blocks.
    3. CPU, bfloat16 with gradients, at most SMALL bytes of scores: "reference". torch's bfloat16
       backward pass on CPUs takes 1.5 to 6 times as long as plain matrix products (LOG.md).

    While compiling, a batch size may be a symbol, so rule 3 does not apply. Exports hold "sdpa".
    """
    compiling = torch.compiler.is_compiling()
    if q.device.type == "cuda":
        skips = mask is not None and (mask.is_token is not None or mask.frames is not None)
        takes = q.shape[3] >= 16 and q.dtype != torch.float64  # what FlexAttention can do
        if skips and takes and not torch.compiler.is_exporting() and q.shape[2] >= 128 and (
                compiling or not no_compiler("cuda")):
            return "flex"
    elif q.dtype == torch.bfloat16 and torch.is_grad_enabled() and not compiling:
        scores = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * q.element_size()
        if (q.requires_grad or k.requires_grad) and scores <= SMALL:
            return "reference"
    return "sdpa"


_form = "auto"


def use(form):
    """The form of every attention that names none; "auto" = `choose` decides, call by call."""
    global _form
    _form = _known(form)


def _known(form):
    if form not in FORMS:
        raise ValueError(f"no attention form {form!r}: choose auto, reference, sdpa or flex")
    return form


def attention(q, k, v, mask=None, *, scale=None, form=None):
    """Attention as the networks call it -> (B, heads, Nq, K).

    q      (B, heads, Nq, K) float
    k, v   (B, heads, Nk, K) float, or (B, 1, Nk, K): one head of keys and values for all queries
    mask   Mask or None (every query attends to every key)
    scale  factor on q k^T; default 1/sqrt(K)
    form   one of FORMS; default: what `use` set, "auto" at first
    """
    form = _known(form or _form)
    if form == "auto":
        form = choose(q, k, mask)
    forms = {"reference": reference_attention, "sdpa": sdpa, "flex": flex_attention}
    return forms[form](q, k, v, mask, scale)


# ------------------------------------------------------------------------------------------------
# Layers


def quick_gelu(x):
    """x * sigmoid(1.702 x): CLIP's approximation of F.gelu, which all other networks use. The two
    differ by up to 0.02, so weights trained with one give wrong features with the other."""
    return x * torch.sigmoid(1.702 * x)


def sinusoid_table(positions, width):
    """Fixed position codes (positions, width) float32 (arXiv 1706.03762, Sec. 3.5).

    Column j holds sin (even j) or cos (odd j) of position / 10000^(2*floor(j/2)/width). The dot
    product of two rows depends on their distance alone.
    """
    place = torch.arange(positions, dtype=torch.float64)[:, None]
    column = torch.arange(width)
    angle = place / 10000 ** (2 * (column // 2).double() / width)
    return torch.where(column % 2 == 0, angle.sin(), angle.cos()).float()


class DropPath(nn.Module):
    """Skip a residual branch for a random share `rate` of the samples (arXiv 1603.09382, Sec. 3).
    The other samples are divided by 1 - rate, so that the mean stays."""

    def __init__(self, rate=0.0):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if not self.training or self.rate == 0:
            return x
        rows, mine = joined(x.shape[0])  # several processes: one draw for all, each takes its rows
        keep = x.new_empty((rows,) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.rate)[mine]
        return x * keep / (1 - self.rate)


class Dropout(nn.Dropout):
    """Dropout that draws for the joined batch of all processes, see engine/processes.py."""

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        rows, mine = joined(x.shape[0])
        if rows == x.shape[0]:
            return super().forward(x)
        keep = x.new_ones((rows,) + x.shape[1:])
        return x * F.dropout(keep, self.p)[mine]


@dataclass(frozen=True)
class State:
    """A clip between two blocks of an encoder."""

    tokens: torch.Tensor               # (B, N, D); the multimodal encoder's are (B, t, 1+S, D)
    query: torch.Tensor | None = None  # (B, 1, D), the multimodal encoder's global token so far


@dataclass(frozen=True, eq=False)
class Context:
    """What `run_blocks` hands to every block besides the tokens.

    To hand down something else, such as rotary angles, add a field here and read it in
    `Attention.forward`. Nothing between the two needs to know.
    """

    mask: Mask | None = None   # None = every token attends to every token
    last: int | None = None    # only the last `last` tokens are queries, and only their results are
    #                            returned; None = all. `run_blocks` passes it to the final block


class Attention(nn.Module):
    """Multi-head attention with its projections: out = proj(attention(q, k, v)).

    width, heads   D and the number of heads; D must be a multiple of heads
    context_width  width of the tokens that give keys and values; None = self-attention
    bias           "qkv", "none", or for self-attention "qv" (queries and values only)
    cosine         scores are cosines times a learned temperature of at most 100 (Swin V2, arXiv
                   2111.09883, Sec. 3.2; an option of VideoMAE V2)
    """

    def __init__(self, width, heads, *, context_width=None, bias="qkv", cosine=False):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of {heads} heads")
        if bias not in (("qkv", "none") if context_width else ("qkv", "qv", "none")):
            raise ValueError(f"bias is {bias!r}: choose qkv or none, or qv for self-attention")
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

    def queries_keys_values(self, x, keys_from=None, last=None):
        """x (B, Nx, D), keys_from (B, Nk, context_width) or None (x itself) -> queries of the last
        `last` tokens of x (None = all), keys and values, each (B, heads, N, K)."""
        asking = x if last is None else x[:, -last:]
        if keys_from is not None:
            projected = self.q(asking), *self.kv(keys_from).chunk(2, dim=-1)
        else:
            D, weight, bias = x.shape[-1], self.qkv.weight, self.qkv.bias
            if self.q_bias is not None:
                bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
            if last is None:
                projected = F.linear(x, weight, bias).chunk(3, dim=-1)
            else:
                q_bias, kv_bias = (None, None) if bias is None else (bias[:D], bias[D:])
                projected = (F.linear(asking, weight[:D], q_bias),
                             *F.linear(x, weight[D:], kv_bias).chunk(2, dim=-1))
        return tuple(y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in projected)

    def forward(self, x, context=None, *, keys_from=None):
        """x (B, Nx, D), context a Context -> (B, Nx, D), or (B, context.last, D).
        keys_from (B, Nk, context_width): tokens that give keys and values in place of x."""
        context = context or Context()
        q, k, v = self.queries_keys_values(x, keys_from, context.last)
        scale = None
        if self.temperature is not None:
            q = F.normalize(q, dim=-1) * self.temperature.clamp(max=4.6052).exp()  # log(100)
            k, scale = F.normalize(k, dim=-1), 1.0
            q, k = q.to(v.dtype), k.to(v.dtype)
        out = attention(q, k, v, context.mask, scale=scale)
        return self.proj(out.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """fc2(activation(fc1(x))), token by token. x (B, N, D) -> (B, N, D)."""

    def __init__(self, width, hidden, activation=F.gelu, drop=0.0):
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
    layer_scale  start value of a learned factor per channel on each branch; None = no factor
    eps          of both LayerNorms: 1e-6 in VideoMAE, 1e-5 in CLIP

    One block of ViT-B has 7.1 M parameters, 2.4 M of them in the attention.
    """

    def __init__(self, width, heads, *, mlp_width=None, bias="qkv", cosine=False, eps=1e-6,
                 drop=0.0, drop_path=0.0, layer_scale=None, activation=F.gelu):
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

    def forward(self, x, context=None):
        """x (B, N, D), context a Context -> (B, N, D), or (B, context.last, D): the end of the full
        result. The queries of other tokens and their MLP are not computed."""
        context = context or Context()
        kept = x if context.last is None else x[:, -context.last:]
        branch = self.attn(self.norm1(x), context)
        x = kept + self.drop_path(branch if self.gamma1 is None else self.gamma1 * branch)
        branch = self.mlp(self.norm2(x))
        return x + self.drop_path(branch if self.gamma2 is None else self.gamma2 * branch)


def run_blocks(blocks, x, context=None, recompute=False):
    """x (B, N, D) through all blocks, each with the same Context except for `last`: see there.

    recompute  True = keep no activations inside a block and compute them again in the backward
               pass: about a third more time for a fraction of the memory (arXiv 1604.06174).
    """
    context = context or Context()
    for_all_tokens = replace(context, last=None)
    for i, block in enumerate(blocks):
        given = context if i == len(blocks) - 1 else for_all_tokens
        if recompute and torch.is_grad_enabled():
            x = torch.utils.checkpoint.checkpoint(block, x, given, use_reentrant=False)
        else:
            x = block(x, given)
    return x if context.last is None else x[:, -context.last:]


@torch.no_grad()
def main():
    """`python attention.py`: the shapes of one attention, step by step, and two masks."""
    torch.manual_seed(0)
    layer, x = Attention(96, 4), torch.randn(2, 12, 96)
    q, k, v = layer.queries_keys_values(x)
    weights, mixed = attention_weights(q, k), reference_attention(q, k, v)
    for name, value in (("tokens (B, N, D)", x), ("queries, keys, values (B, heads, N, K)", q),
                        ("weights of keys (B, heads, N, N)", weights),
                        ("weighted means of values (B, heads, N, K)", mixed),
                        ("heads side by side, projected (B, N, D)", layer(x))):
        print(f"{name:45s} {tuple(value.shape)}")
    print(f"{choose(q, k)} differs from the reference by {(sdpa(q, k, v) - mixed).abs().max():.0e}")
    window = Mask(frames=torch.arange(12)[None] // 3, window=1)
    for name, mask in (("causal", Mask(causal=True)), ("4 frames, window 1", window)):
        print(f"{name}: one row per query, # = a key that it may attend to")
        for row in mask.allowed(12, 12, "cpu")[0, 0].tolist():
            print("  " + "".join("#" if allowed else "." for allowed in row))


if __name__ == "__main__":
    main()
