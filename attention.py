"""Attention and the transformer block, shared by all networks of this project.

The networks differ mainly in which tokens may attend to which other tokens. Sources: "Attention Is
All You Need", arXiv 1706.03762, Sec. 3.2; Vision Transformer, arXiv 2010.11929, Sec. 3.1.

    x (B, N, D) -+- norm1 -> attention -> (+) -+- norm2 -> mlp -> (+) -> x (B, N, D)
                 |_________________________|   |____________________|

    letter     meaning                                                        ViT-B value
    B C        clips in the batch, colour channels                            -, 3
    T H W      frames, pixel rows, pixel columns                              16, 224, 224
    t h w      token grid: tubelets in time, patch rows, patch columns        8, 14, 14
    S N        tokens per time step, h*w; tokens per clip, t*S                196, 1568
    Nq Nk      number of queries, number of keys                              1568, 1568
    D          model width                                                    768
    heads, K   number of attention heads, width of one head, D = heads*K      12, 64

A video has the shape (B, C, T, H, W), its tokens (B, N, D). The token at time step tau, row y and
column x has the number n = tau*S + y*w + x. Queries, keys and values are (B, heads, N, K). A time
step is one frame, or the two frames of a tubelet (mae.py). Other files add their own letters.

1. `Mask` says which keys a query may attend to. `Mask.rule` is its only definition.
2. `reference_attention` is the definition of attention: softmax(q k^T / sqrt(K)) v. If the
   numbers in q and k are independent with mean 0 and variance 1, q k^T has variance K. Division by
   sqrt(K) makes this variance 1, so the softmax does not saturate.
3. `sdpa` and `flex_attention` compute the same with less memory. `sdpa` calls torch's kernel. For
   `flex_attention` (engine/flex.py) torch.compile generates a kernel that knows the mask. `choose`
   selects one of these three forms.
4. `Attention` adds the projections. `Block` is the pre-norm block with `Attention` and `Mlp`.
5. `run_blocks` runs the blocks in order and passes a `Context` to each: the mask, for example.

A bias on the keys adds the same number to all scores of a query, and the softmax cancels it.
VideoMAE therefore has biases on queries and values only (bias="qv"). Where we differ: `DropPath`
drops samples. In official code with tokens on the first axis it drops token positions instead.

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
from engine.processes import global_rows

FORMS = ("auto", "reference", "sdpa", "flex")

# Largest size of the scores, in bytes, for which `choose` selects the reference form:
# B*heads*Nq*Nk * 2 bytes. With a mask a block keeps two tensors of this size for the backward
# pass, without a mask one: up to 1 GiB in the 4 blocks of a decoder, 3 GiB in 12 blocks.
# Only memory sets the limit.
SMALL = 256 * 2**20


# ------------------------------------------------------------------------------------------------
# Masks: which keys a query may attend to


@dataclass(frozen=True, eq=False)
class Mask:
    """Which keys each query may attend to: the keys that all given fields allow.

    Query i has the position of key i + Nk - Nq: new tokens also attend to older ones, whose keys
    are cached. For a query with no allowed key, attention returns zeros.
    """

    causal: bool = False                   # True = only keys up to the query's own position
    is_token: torch.Tensor | None = None   # (B or 1, Nk) bool; True = token, False = padding
    frames: torch.Tensor | None = None     # (B or 1, Nk) int, number of the frame of each key
    window: int = 0                        # largest allowed distance |frame of query - of key|

    @property
    def kind(self):
        """Names of the fields that exclude keys; () = every query attends to every key."""
        tensors = tuple(name for name in ("is_token", "frames") if getattr(self, name) is not None)
        return ("causal",) * self.causal + tensors

    @property
    def rows(self):
        """Batch size of the mask: B, or 1 if all clips share the mask."""
        return max([1] + [len(x) for x in (self.is_token, self.frames) if x is not None])

    def rule(self, batch, Nq, Nk, device):
        """The mask as a function may_attend(b, head, query, key) -> bool, for FlexAttention.

        Its arguments are the indices of clip, head, query and key: integers or integer tensors.
        """
        # Position of query 0. A tensor, because torch.compile compiles again for each new int.
        offset = torch.tensor(Nk - Nq, device=device)
        causal, window = self.causal, self.window
        is_token, frames = (None if x is None else x.expand(batch, -1)
                            for x in (self.is_token, self.frames))           # (batch, Nk) each
        query_frames = None if frames is None else frames[:, Nk - Nq:]       # (batch, Nq)

        def may_attend(b, head, query, key):
            allowed = key >= 0  # all True, in the shape of key
            if causal:
                allowed = allowed & (key <= query + offset)
            if is_token is not None:
                allowed = allowed & is_token[b, key]
            if frames is not None:
                distance = (query_frames[b, query] - frames[b, key]).abs()
                allowed = allowed & (distance <= window)
            return allowed
        return may_attend

    def allowed(self, Nq, Nk, device):
        """The mask as a tensor (B or 1, 1, Nq, Nk) bool, True = may attend; None = all may."""
        if not self.kind:
            return None
        rule = self.rule(self.rows, Nq, Nk, device)
        b, query, key = (torch.arange(n, device=device) for n in (self.rows, Nq, Nk))
        # Indices (B or 1, 1, 1, 1), (Nq, 1), (Nk,). The rule is the same for all heads: 0 will do.
        allowed = rule(b[:, None, None, None], 0, query[:, None], key)
        return allowed.expand(self.rows, 1, Nq, Nk)                          # (B or 1, 1, Nq, Nk)


# ------------------------------------------------------------------------------------------------
# Attention: the definition, faster forms, and the choice. `attention` explains the arguments.


def attention_weights(q, k, allowed=None, scale=None):
    """softmax(q k^T / sqrt(K)): the weight of each value for each query, (B, heads, Nq, Nk).

    allowed  as `Mask.allowed` returns it
    returns  rows that sum to one; a row with no allowed key is zero
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = (q * scale) @ k.transpose(-2, -1)                               # (B, heads, Nq, Nk)
    if allowed is None:
        return scores.softmax(dim=-1)
    # Not -inf: a row with no allowed key would be NaN. It is 1/Nk everywhere, and then zero.
    weights = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(dim=-1)
    return weights.masked_fill(~allowed, 0)                                  # (B, heads, Nq, Nk)


def reference_attention(q, k, v, mask=None, scale=None):
    """softmax(q k^T / sqrt(K)) v: the definition (arXiv 1706.03762, Sec. 3.2.1). It keeps all
    Nq x Nk weights in memory for the backward pass."""
    allowed = None if mask is None else mask.allowed(q.shape[2], k.shape[2], q.device)
    return attention_weights(q, k, allowed, scale).to(v.dtype) @ v           # (B, heads, Nq, K)


def sdpa(q, k, v, mask=None, scale=None):
    """`reference_attention`, computed by torch's scaled_dot_product_attention.

    Where it can, torch uses a fused kernel that never stores all scores (FlashAttention, arXiv
    2205.14135, Sec. 3.1). Its causal mask fits ours only for Nq = Nk. Other masks become a tensor.
    """
    k, v = (x.expand(-1, q.shape[1], -1, -1) for x in (k, v))  # (B, heads, Nk, K), also from 1 head
    fields = () if mask is None else mask.kind
    if not fields or (fields == ("causal",) and q.shape[2] == k.shape[2]):
        return F.scaled_dot_product_attention(q, k, v, is_causal=bool(fields), scale=scale)
    allowed = mask.allowed(q.shape[2], k.shape[2], q.device)                 # (B or 1, 1, Nq, Nk)
    # For a query with no allowed key, some kernels return zeros and some NaN. So this query may
    # attend to all keys here, and its result is set to zero afterwards.
    no_key = ~allowed.any(dim=-1, keepdim=True)                              # (B or 1, 1, Nq, 1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed | no_key, scale=scale)
    return out.masked_fill(no_key, 0)                                        # (B, heads, Nq, K)


def choose(q, k, mask=None):
    """Select the form for these queries, keys and mask: "sdpa", "flex" or "reference".

    1. "flex" on CUDA, for 128 or more queries and a mask with `is_token` or `frames`. It skips
       blocks of queries and keys in which the mask allows nothing.
    2. "reference" on other devices, for bfloat16 with gradients and at most SMALL bytes of scores.
       On a CPU the backward pass of "sdpa" then takes 1.7 to 4 times as long (LOG.md).
       torch.compile does not use this rule, because the batch size may be symbolic.
    3. "sdpa" otherwise, and in exports.
    """
    compiling = torch.compiler.is_compiling()
    if q.device.type == "cuda":
        sparse = mask is not None and (mask.is_token is not None or mask.frames is not None)
        supported = q.shape[3] >= 16 and q.dtype != torch.float64  # limits of FlexAttention
        if sparse and supported and not torch.compiler.is_exporting() and q.shape[2] >= 128 and (
                compiling or not no_compiler("cuda")):  # no_compiler: why it fails, "" = it works
            return "flex"
    elif q.dtype == torch.bfloat16 and torch.is_grad_enabled() and not compiling:
        score_bytes = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * q.element_size()
        if (q.requires_grad or k.requires_grad) and score_bytes <= SMALL:
            return "reference"
    return "sdpa"


_default_form = "auto"


def use(form):
    """Set the form for calls of `attention` without `form`. "auto" = `choose` at each call."""
    global _default_form
    _default_form = _check_form(form)


def _check_form(form):
    if form not in FORMS:
        raise ValueError(f"no attention form {form!r}: choose auto, reference, sdpa or flex")
    return form


def attention(q, k, v, mask=None, *, scale=None, form=None):
    """Attention in the chosen form -> (B, heads, Nq, K). Networks call this function.

    q      (B, heads, Nq, K) float
    k, v   (B, heads, Nk, K) float, or (B, 1, Nk, K): all heads of q share one head of k and v
    mask   Mask; None = every query attends to every key
    scale  factor on q k^T; default 1/sqrt(K)
    form   one of FORMS; default: the form set by `use`, initially "auto"
    """
    form = _check_form(form or _default_form)
    if form == "auto":
        form = choose(q, k, mask)
    forms = {"reference": reference_attention, "sdpa": sdpa, "flex": flex_attention}
    return forms[form](q, k, v, mask, scale)


# ------------------------------------------------------------------------------------------------
# Layers


def quick_gelu(x):
    """x * sigmoid(1.702 x), an approximation of GELU in CLIP and UniFormerV2. VideoMAE uses F.gelu.
    They differ by up to 0.02, so each model needs the one it was trained with."""
    # silu(y) = y * sigmoid(y): one kernel in each direction, and one stored tensor instead of two.
    return F.silu(1.702 * x) / 1.702


def sinusoid_table(length, width):
    """Fixed position encodings (length, width) float32 (arXiv 1706.03762, Sec. 3.5).

    Column j holds sin (even j) or cos (odd j) of position / 10000^(2*floor(j/2)/width). The dot
    product of two rows depends only on the distance of their positions.
    """
    position = torch.arange(length, dtype=torch.float64)[:, None]            # (length, 1)
    column = torch.arange(width)                                             # (width,)
    angle = position / 10000 ** (2 * (column // 2).double() / width)         # (length, width)
    return torch.where(column % 2 == 0, angle.sin(), angle.cos()).float()


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382, Sec. 3): zero a residual branch for random samples.

    rate  probability of zero for a sample; the others are divided by 1 - rate to keep the mean
    """

    def __init__(self, rate=0.0):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        """x (B, ...) -> the same shape; unchanged in eval mode."""
        if not self.training or self.rate == 0:
            return x
        # Each training process draws numbers for the samples of all processes and uses those of its
        # own. So the result does not depend on the number of processes.
        rows, own_rows = global_rows(x.shape[0])  # number of all samples; slice of its own
        keep = x.new_empty((rows,) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.rate)[own_rows]
        return x * keep / (1 - self.rate)  # keep: (B, 1, ..., 1), 0 or 1


class Dropout(nn.Dropout):
    """nn.Dropout whose result does not depend on the number of processes, as in `DropPath`."""

    def forward(self, x):
        """x (B, ...) -> the same shape; unchanged in eval mode."""
        if not self.training or self.p == 0:
            return x
        rows, own_rows = global_rows(x.shape[0])
        if rows == x.shape[0]:
            return super().forward(x)
        keep = x.new_ones((rows,) + x.shape[1:])
        return x * F.dropout(keep, self.p)[own_rows]  # 0 or 1 / (1 - p) times x


@dataclass(frozen=True)
class State:
    """The activations of an encoder between two blocks."""

    tokens: torch.Tensor               # (B, N, D); in uniformerv2.py (B, t, 1+S, D)
    query: torch.Tensor | None = None  # (B, 1, D), the global token of uniformerv2.py


@dataclass(frozen=True, eq=False)
class Context:
    """What `run_blocks` passes to every block besides the tokens.

    To pass something else, such as rotary angles, add a field here and use it in
    `Attention.forward`. No code in between changes.
    """

    mask: Mask | None = None   # None = every token attends to every token
    last: int | None = None    # number of tokens, counted from the end, whose results are needed;
    #                            only these are queries. None = all. See `run_blocks`


class Attention(nn.Module):
    """Multi-head attention with its projections: out = proj(attention(q, k, v)).

    width, heads   D and the number of heads; D must be a multiple of heads
    context_width  for cross-attention: width of the tokens `keys_from`; None = self-attention
    bias           which projections have one: "qkv", "none", or for self-attention "qv"
    cosine         True = scores are cosine similarities times a learned factor per head, at most
                   100 (Swin V2, arXiv 2111.09883, Sec. 3.2; an option of VideoMAE V2)
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
        # A bias of `qkv` would include the keys, so "qv" has two parameters instead.
        self.q_bias = nn.Parameter(torch.zeros(width)) if bias == "qv" else None
        self.v_bias = nn.Parameter(torch.zeros(width)) if bias == "qv" else None
        # Logarithm of the factor on the cosine similarities. The factor starts at 10.
        self.temperature = nn.Parameter(torch.full((heads, 1, 1), 10.0).log()) if cosine else None
        self.proj = nn.Linear(width, width)

    def queries_keys_values(self, x, keys_from=None, last=None):
        """Project tokens to queries (B, heads, Nq, K), keys and values (B, heads, Nk, K).

        x          (B, N, D), tokens that queries come from
        keys_from  (B, Nk, context_width), tokens that keys and values come from; None = x
        last       Nq: only the last Nq tokens of x are queries; None = all
        """
        query_tokens = x if last is None else x[:, -last:]                   # (B, Nq, D)
        if keys_from is not None:
            projected = self.q(query_tokens), *self.kv(keys_from).chunk(2, dim=-1)
        else:
            D, weight, bias = x.shape[-1], self.qkv.weight, self.qkv.bias
            if self.q_bias is not None:
                bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
            if last is None:
                projected = F.linear(x, weight, bias).chunk(3, dim=-1)       # (B, N, D) each
            else:  # rows 0 to D - 1 of the weight make queries, the others keys and values
                q_bias, kv_bias = (None, None) if bias is None else (bias[:D], bias[D:])
                projected = (F.linear(query_tokens, weight[:D], q_bias),
                             *F.linear(x, weight[D:], kv_bias).chunk(2, dim=-1))
        # Each (B, N, D) -> (B, N, heads, K) -> (B, heads, N, K).
        return tuple(y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in projected)

    def forward(self, x, context=None, *, keys_from=None):
        """x (B, N, D) -> (B, N, D), or (B, context.last, D) if that is set.

        context    Context; None = the default one
        keys_from  (B, Nk, context_width), tokens that keys and values come from; None = x
        """
        context = context or Context()
        q, k, v = self.queries_keys_values(x, keys_from, context.last)
        scale = None  # 1/sqrt(K)
        if self.temperature is not None:
            q = F.normalize(q, dim=-1) * self.temperature.clamp(max=4.6052).exp()  # log(100)
            k, scale = F.normalize(k, dim=-1), 1.0
            q, k = q.to(v.dtype), k.to(v.dtype)  # autocast computes both in float32
        out = attention(q, k, v, context.mask, scale=scale)                  # (B, heads, Nq, K)
        return self.proj(out.transpose(1, 2).flatten(2))                     # (B, Nq, D)


class Mlp(nn.Module):
    """fc2(activation(fc1(x))) on each token, then dropout. x (B, N, D) -> (B, N, D)."""

    def __init__(self, width, hidden, activation=F.gelu, drop=0.0):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.activation = activation
        self.drop = Dropout(drop)

    def forward(self, x):
        return self.drop(self.fc2(self.activation(self.fc1(x))))


class Block(nn.Module):
    """The pre-norm transformer block: x = x + attn(norm1(x)), then x = x + mlp(norm2(x)).

    mlp_width     hidden width of the MLP, default 4*D
    bias, cosine  see Attention
    eps           of both LayerNorms: 1e-6 in VideoMAE, 1e-5 in CLIP
    drop          dropout probability after the MLP
    drop_path     rate of DropPath, for both branches
    layer_scale   initial value of a learned factor per channel on each branch; None = no factor

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
        """x (B, N, D), context a Context -> (B, N, D), or (B, context.last, D) if that is set.

        The tokens before the last ones then only give keys and values.
        """
        context = context or Context()
        residual = x if context.last is None else x[:, -context.last:]
        branch = self.attn(self.norm1(x), context)
        x = residual + self.drop_path(branch if self.gamma1 is None else self.gamma1 * branch)
        branch = self.mlp(self.norm2(x))
        return x + self.drop_path(branch if self.gamma2 is None else self.gamma2 * branch)


def run_blocks(blocks, x, context=None, recompute=False):
    """Run the blocks in order, x (B, N, D) -> (B, N, D), or (B, context.last, D) if that is set.

    context    Context for every block; only the last block gets `last`, the others need all tokens
    recompute  True = activation checkpointing (arXiv 1604.06174): activations inside a block are
               not stored. The backward pass computes them again. This takes much less memory and
               about a third more time
    """
    context = context or Context()
    without_last = replace(context, last=None)
    for i, block in enumerate(blocks):
        block_context = context if i == len(blocks) - 1 else without_last
        if recompute and torch.is_grad_enabled():
            x = torch.utils.checkpoint.checkpoint(block, x, block_context, use_reentrant=False)
        else:
            x = block(x, block_context)
    return x if context.last is None else x[:, -context.last:]  # needed if there are no blocks


@torch.no_grad()
def main():
    """`python attention.py`: print the shapes of one attention layer, and two masks."""
    torch.manual_seed(0)
    layer, x = Attention(96, 4), torch.randn(2, 12, 96)
    q, k, v = layer.queries_keys_values(x)
    weights, out = attention_weights(q, k), reference_attention(q, k, v)
    for name, value in (("tokens (B, N, D)", x), ("queries, keys, values (B, heads, N, K)", q),
                        ("attention weights (B, heads, N, N)", weights),
                        ("weighted sums of values (B, heads, N, K)", out),
                        ("heads concatenated, projected (B, N, D)", layer(x))):
        print(f"{name:45s} {tuple(value.shape)}")
    print(f"{choose(q, k)} differs from the reference by {(sdpa(q, k, v) - out).abs().max():.0e}")
    window = Mask(frames=torch.arange(12)[None] // 3, window=1)
    for name, mask in (("causal", Mask(causal=True)), ("4 frames, window 1", window)):
        print(f"{name}: one row per query, # = allowed key")
        for row in mask.allowed(12, 12, "cpu")[0, 0].tolist():
            print("  " + "".join("#" if allowed else "." for allowed in row))


if __name__ == "__main__":
    main()
