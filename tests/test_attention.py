"""What is proved about attention.py:

Every form gives the reference attention, values and gradients, for every mask, dtype and layout
in memory. So does a kernel compiled for a mask, and its batch and length may change without a
kernel for each. The choice is a rule that no stopwatch and no processor changes, and a block
exports with a symbolic batch. The future is invisible under a causal mask. A key bias changes
nothing. A query that may attend to nothing gets zeros. Packed clips are what they would be alone.
The last block may answer for some tokens only. A new field of Context reaches every block.
Sinusoids know distances. DropPath keeps the mean.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

import attention as attention_file
from attention import (Attention, Block, Context, DropPath, Mask, attention, attention_weights,
                       choose, quick_gelu, reference_attention, run_blocks, sinusoid_table)
from engine import flex


def masks(keys):
    """Every kind of mask, alone and together; some queries may attend to nothing."""
    is_token = torch.rand(2, keys) > 0.3
    clips, frames = torch.randint(0, 3, (2, keys)), torch.arange(keys)[None] // 3
    return {"none": None, "empty": Mask(), "causal": Mask(causal=True),
            "padding": Mask(is_token=is_token), "frames": Mask(frames=frames),
            "window": Mask(frames=frames, window=1), "packed": Mask(frames=clips),
            "all": Mask(causal=True, is_token=is_token, frames=clips, window=1),
            "nothing": Mask(is_token=torch.zeros(2, keys, dtype=torch.bool))}


@pytest.mark.parametrize("kind", masks(1))
@pytest.mark.parametrize("queries, keys, heads",
                         [(7, 7, 3), (1, 1, 3), (1, 9, 3), (4, 9, 3), (5, 5, 1)])
def test_every_form_is_attention_from_first_principles(kind, queries, keys, heads):
    """The choice may pick what is fast only because the numbers are the same."""
    torch.manual_seed(queries * 10 + keys)
    mask = masks(keys)[kind]
    inputs = [torch.randn(2, n, size, 8, dtype=torch.float64, requires_grad=True)
              for n, size in ((3, queries), (heads, keys), (heads, keys))]
    # From first principles, with loops instead of tensor tricks.
    allowed = torch.ones(2, queries, keys, dtype=torch.bool)
    for b in range(2):
        for i in range(queries):
            for j in range(keys):
                if mask is None:
                    continue
                own = i + keys - queries  # the query's own key
                if mask.causal and j > own:
                    allowed[b, i, j] = False
                if mask.is_token is not None and not mask.is_token[b, j]:
                    allowed[b, i, j] = False
                if mask.frames is not None:
                    of = mask.frames[b if len(mask.frames) > 1 else 0]
                    if abs(of[j] - of[own]) > mask.window:
                        allowed[b, i, j] = False
    q, k, v = inputs
    scores = torch.einsum("bhik,bhjk->bhij", q, k.expand(-1, 3, -1, -1)) / 8**0.5
    weights = scores.exp() * allowed[:, None]
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)
    expected = torch.einsum("bhij,bhjk->bhik", weights, v.expand(-1, 3, -1, -1))
    table = None if mask is None else mask.allowed(queries, keys, "cpu")
    torch.testing.assert_close(attention_weights(q, k, table), weights, atol=1e-12, rtol=1e-10)
    upstream = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, inputs, upstream)
    for form in ("auto", "reference", "sdpa"):
        out = attention(q, k, v, mask, form=form)
        torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-10)
        for got, want in zip(torch.autograd.grad(out, inputs, upstream), gradients):
            torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-10)


@pytest.fixture
def traced(monkeypatch):
    """FlexAttention traced and run by torch's own operators, without the minute of compiling.
    Returns a function that returns how many graphs were made so far."""
    monkeypatch.setattr(flex, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    counters.clear()
    flex.kernel.cache_clear()
    yield lambda: counters["stats"]["unique_graphs"]
    flex.kernel.cache_clear()


LAYOUTS = {  # one tensor, strided in all ways that projections, heads and caches leave behind
    "contiguous": lambda x: x.contiguous(),
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "sliced": lambda x: F.pad(x, (3, 2, 1, 1))[..., 1:-1, 3:-2],
    "expanded": lambda x: x[:1, :1].expand_as(x)}
# bfloat16: eight times its own rounding, 2**-8
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-5}


def assert_exact(form, mask, dtype, queries, keys, layout, backward=True):
    """The form against the reference attention of the same numbers in float64."""
    inputs = [torch.randn(2, 3, n, 16).to(dtype).requires_grad_(backward)
              for n in (queries, keys, keys)]
    exact = [x.detach().double().requires_grad_(backward) for x in inputs]
    results = []
    for name, leaves in (("reference", exact), (form, inputs)):
        out = attention(*map(LAYOUTS[layout], leaves), mask, form=name)
        upstream = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
        results.append((out, *(torch.autograd.grad(out, leaves, upstream) if backward else ())))
    for expected, got in zip(*results):
        assert got.dtype == dtype
        rounding = ROUNDING[dtype]
        torch.testing.assert_close(got.double(), expected, atol=rounding, rtol=rounding)
        if mask is not None and mask.is_token is not None and not mask.is_token.any():
            assert not got.any() and not got.isnan().any()  # exactly zero, the gradients too


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("form", ["reference", "sdpa", "auto"])
def test_every_form_takes_every_dtype_and_layout_with_gradients(form, dtype):
    torch.manual_seed(0)
    for queries, keys in ((7, 9), (1, 1), (1, 5)):
        of = masks(keys)
        for kind in ("none", "causal", "padding", "packed", "window", "all", "nothing"):
            for layout in LAYOUTS:
                assert_exact(form, of[kind], dtype, queries, keys, layout)


@pytest.mark.parametrize("kind, dtype", [("all", torch.float32)] + [
    pytest.param(*pair, marks=pytest.mark.slow) for pair in (
        ("none", torch.float32), ("nothing", torch.float32), ("none", torch.bfloat16),
        ("all", torch.bfloat16))])
def test_so_does_flex_without_them(kind, dtype, traced):
    torch.manual_seed(0)
    for queries, keys in ((7, 9), (1, 1)):
        for layout in LAYOUTS:
            mask = masks(keys)[kind]
            with torch.no_grad():
                assert_exact("flex", mask, dtype, queries, keys, layout, backward=False)


@torch.no_grad()
def assert_flex_is_the_reference(mask, q, k, v, atol=1e-5):
    out = attention(q, k, v, mask, form="flex")
    expected = attention(q, k, v, mask, form="reference")
    assert out.dtype == q.dtype and out.shape == q.shape
    torch.testing.assert_close(out, expected, atol=atol, rtol=1e-5)


@pytest.mark.parametrize("kind", ["none", "all", "nothing"])
def test_a_kernel_made_for_the_mask_is_the_reference_attention(kind, traced):
    """Odd sizes, one query, one key, several blocks of 128, one head of keys, not contiguous."""
    for queries, keys, heads in [(5, 9, 3), (1, 1, 3), (130, 261, 1)]:
        q, k, v = (torch.randn(2, n, size, 16).transpose(1, 2)
                   for n, size in ((queries, 3), (keys, heads), (keys, heads)))
        assert_flex_is_the_reference(masks(keys)[kind], q, k, v)


@pytest.mark.slow
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.bfloat16, 0.04)])
@pytest.mark.parametrize("kind", masks(1))
def test_so_is_the_compiled_one(kind, dtype, atol):
    if flex.no_compiler("cpu"):
        pytest.skip(f"nothing can be compiled here: {flex.no_compiler('cpu')}")
    for queries, keys in [(7, 7), (1, 9), (300, 300)]:
        q, k, v = (torch.randn(2, 3, n, 16).to(dtype) for n in (queries, keys, keys))
        try:
            assert_flex_is_the_reference(masks(keys)[kind], q, k, v, atol)
        except torch._dynamo.exc.TorchDynamoException as error:
            frames = kind in ("frames", "window", "packed", "all")
            if not frames or "was not declared" not in str(error):
                raise
            pytest.skip(f"torch {torch.__version__}: its C++ for frames does not compile on a CPU")


def test_the_blocks_of_a_mask_hold_all_that_may_be_attended_to_and_little_else():
    """Three packed clips of 256 tokens: of 36 blocks of 128 x 128, 12 are computed."""
    mask = Mask(frames=torch.arange(768)[None] // 256)
    assert flex.block_mask(mask, 4, 768, 768, "cpu").to_dense().sum() == 12
    for kind, mask in masks(400).items():
        if mask is not None and mask.kind:
            blocks = flex.block_mask(mask, 2, 300, 400, "cpu")
            dense = blocks.to_dense().bool()                                 # (2 or 1, 1, 3, 4)
            allowed = F.pad(mask.allowed(300, 400, "cpu"), (0, 112, 0, 84))
            needed = allowed.unflatten(3, (4, 128)).unflatten(2, (3, 128)).any(dim=(3, 5))
            assert torch.equal(dense, needed.expand_as(dense)), kind
            assert flex.block_mask(mask, 2, 300, 400, "cpu") is blocks  # cached


@pytest.mark.slow
def test_new_batches_and_lengths_make_one_more_kernel_each_and_never_fall_back(traced):
    """Training and evaluation differ in both. Past the limit of torch.compile, 8 versions, an
    exception says so."""
    def graphs_for(kind, batch, length):
        q = torch.randn(batch, 2, length, 16)
        clips = (torch.arange(length)[None] // 60).expand(batch, -1)
        mask = {"none": None, "causal": Mask(causal=True), "packed": Mask(frames=clips)}[kind]
        before = traced()
        assert_flex_is_the_reference(mask, q, q, q)
        return traced() - before

    for kind in ("none", "causal", "packed"):
        assert graphs_for(kind, 4, 200) == 1
        assert graphs_for(kind, 6, 200) <= 1                                  # another batch
        assert graphs_for(kind, 6, 300) <= 1                                  # another length
        for batch, length in ((4, 200), (8, 200), (4, 333), (3, 517), (16, 140)):
            assert graphs_for(kind, batch, length) == 0, (kind, batch, length)

    flex.kernel.cache_clear()
    with torch._dynamo.config.patch(recompile_limit=1, automatic_dynamic_shapes=False):
        graphs_for("none", 4, 200)
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            graphs_for("none", 4, 300)


def test_flex_attention_refuses_gradients_on_a_cpu():
    q = torch.randn(1, 2, 6, 16, requires_grad=True)
    with pytest.raises(ValueError, match="no backward pass on a CPU: choose sdpa or reference"):
        attention(q, q, q, form="flex")


def test_where_nothing_can_be_compiled_the_reason_is_one_line(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no such unit\nin line 3")
    monkeypatch.setattr(torch, "compile", broken)
    assert flex.no_compiler.__wrapped__("cpu") == "no such unit"


def shape(*size, dtype=torch.float32, device="cpu", grad=False):
    """All that the choice may look at."""
    return SimpleNamespace(shape=size, dtype=dtype, device=torch.device(device), requires_grad=grad,
                           element_size=lambda: dtype.itemsize)


def test_the_choice_is_torchs_kernel_but_for_two_cases(monkeypatch):
    """By device, type and mask alone: nothing is timed, so a run repeats on any processor."""
    monkeypatch.setattr(attention_file, "no_compiler", lambda device: "")
    rough = dict(dtype=torch.bfloat16, grad=True)
    for device in ("cpu", "cuda", "mps"):
        for dtype in (torch.float32, torch.float64, torch.float16):
            for grad in (False, True):
                for mask in (None, Mask(), Mask(causal=True)):
                    q = shape(2, 3, 160, 64, dtype=dtype, device=device, grad=grad)
                    assert choose(q, q, mask) == "sdpa"

    # A bfloat16 backward pass on a CPU, up to a number of bytes; not without gradients.
    small, large = shape(2, 12, 160, 64, **rough), shape(16, 6, 1568, 64, **rough)
    decoder_of_base = shape(8, 6, 1568, 64, **rough)
    assert choose(small, small) == choose(decoder_of_base, decoder_of_base) == "reference"
    assert choose(large, large) == "sdpa"
    assert choose(small, shape(2, 12, 160, 64, dtype=torch.bfloat16)) == "reference"
    assert choose(*[shape(2, 12, 160, 64, dtype=torch.bfloat16)] * 2) == "sdpa"
    with torch.no_grad():
        assert choose(small, small) == "sdpa"
    edge = attention_file.SMALL // 2 // 128
    assert choose(shape(1, 1, 128, 64, **rough), shape(1, 1, edge, 64, **rough)) == "reference"
    assert choose(shape(1, 1, 128, 64, **rough), shape(1, 1, edge + 1, 64, **rough)) == "sdpa"
    assert choose(*[shape(2, 12, 160, 64, device="cuda", **rough)] * 2) == "sdpa"

    # A mask that leaves blocks empty, on CUDA, in sizes that FlexAttention takes, with a compiler.
    mask = Mask(frames=torch.arange(600)[None] // 60, window=1)
    keys = shape(1, 2, 600, 16, device="cuda")
    for queries, K, dtype, expected in (
            (600, 16, torch.float32, "flex"), (128, 16, torch.bfloat16, "flex"),
            (127, 16, torch.float32, "sdpa"), (600, 8, torch.float32, "sdpa"),
            (600, 16, torch.float64, "sdpa")):
        assert choose(shape(1, 2, queries, K, dtype=dtype, device="cuda"), keys, mask) == expected
    padding = Mask(is_token=torch.ones(1, 600, dtype=torch.bool))
    assert choose(keys, keys, padding) == "flex"
    assert choose(shape(1, 2, 600, 16), shape(1, 2, 600, 16), padding) == "sdpa"
    monkeypatch.setattr(attention_file, "no_compiler", lambda device: "no Triton")
    assert choose(keys, keys, mask) == "sdpa"


@pytest.mark.parametrize("mask", [None, Mask(causal=True)])
def test_a_block_exports_for_any_batch_and_holds_torchs_kernel(mask):
    """One graph for all batch sizes, in float32 and bfloat16, with nothing cached between calls."""
    class Blocks(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList(Block(32, 2, bias="qv", drop_path=0.1)
                                              for _ in range(2))

        def forward(self, x):
            return run_blocks(self.blocks, x, Context(mask, last=3))

    for dtype, atol in ((torch.float32, 1e-5), (torch.bfloat16, 0.04)):
        model = Blocks().to(dtype).eval()
        example = torch.randn(4, 10, 32, dtype=dtype)
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(model, (example,), dynamic_shapes=({0: batch},))
        assert "scaled_dot_product_attention" in program.graph_module.code
        for size in (1, 4, 7):
            x = torch.randn(size, 10, 32, dtype=dtype)
            torch.testing.assert_close(program.module()(x), model(x), atol=atol, rtol=atol)


def test_the_flag_of_train_py_rules_all_attentions_that_name_no_form():
    calls = []
    q = torch.randn(1, 1, 4, 16)
    try:
        attention_file.use("reference")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention_file, "reference_attention",
                          lambda q, *rest: calls.append(1) or q)
            attention(q, q, q)
            attention(q, q, q, form="sdpa")
    finally:
        attention_file.use("auto")
    attention(q, q, q)
    assert calls == [1]


def test_a_query_that_may_attend_to_nothing_gets_zeros_and_gives_no_gradient_in_every_form():
    q = torch.randn(1, 2, 3, 4, requires_grad=True)
    nothing = Mask(is_token=torch.zeros(1, 3, dtype=torch.bool))
    elsewhere = Mask(frames=torch.arange(3)[None], is_token=torch.tensor([[True, False, True]]))
    for form in ("reference", "sdpa"):
        out = attention(q, q, q, nothing, form=form)
        assert out.eq(0).all() and torch.autograd.grad(out.sum(), q)[0].eq(0).all(), form
        out = attention(q, q, q, elsewhere, form=form)  # query 1 may see only key 1, padding
        assert out[:, :, 1].eq(0).all() and out[:, :, [0, 2]].ne(0).all(), form


def test_bfloat16_forms_agree_within_their_rounding():
    q, k, v = torch.randn(3, 2, 4, 50, 16)
    exact = reference_attention(q, k, v)
    for form in ("reference", "sdpa"):
        rough = attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), form=form)
        assert (rough.float() - exact).abs().max() < 0.03
        with torch.autocast("cpu", torch.bfloat16):
            rough = attention(q, k, v, form=form)
        assert rough.dtype == torch.bfloat16 and (rough.float() - exact).abs().max() < 0.03


def test_torchs_kernel_keeps_no_scores_for_the_backward_pass():
    q, k, v = torch.randn(3, 3, 2, 50, 8, requires_grad=True).unbind()

    def largest_kept(form):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
                lambda x: sizes.append(x.numel()) or x, lambda x: x):
            out = attention(q, k, v, form=form)
        return max(sizes), torch.autograd.grad(out.square().sum(), (q, k, v))

    (scores, whole), (inputs, blockwise) = largest_kept("reference"), largest_kept("sdpa")
    assert scores == 3 * 2 * 50 * 50 and inputs == q.numel()
    for a, b in zip(whole, blockwise):
        torch.testing.assert_close(a, b)


def test_an_unknown_form_is_named_with_the_choices():
    for call in (lambda: attention(*torch.zeros(3, 1, 1, 1, 1), form="flash"),
                 lambda: attention_file.use("flash")):
        with pytest.raises(ValueError, match="'flash': choose auto, reference, sdpa or flex"):
            call()


def test_changing_the_future_leaves_the_past_alone():
    block = Block(16, 2).double()
    x = torch.randn(1, 6, 16, dtype=torch.float64)
    y = x.clone()
    y[:, 4:] += 1
    before, after = (block(z, Context(Mask(causal=True))) for z in (x, y))
    assert torch.equal(before[:, :4], after[:, :4]) and not torch.equal(before[:, 4:], after[:, 4:])


def test_packed_clips_are_what_they_would_be_alone():
    """Two clips of different length in one row, told apart by `frames`, equal two single runs."""
    block = Block(16, 2).double()
    a, b = torch.randn(1, 3, 16, dtype=torch.float64), torch.randn(1, 5, 16, dtype=torch.float64)
    clips = Mask(frames=torch.tensor([[0] * 3 + [1] * 5]))
    packed = block(torch.cat([a, b], dim=1), Context(clips))
    torch.testing.assert_close(packed, torch.cat([block(a), block(b)], dim=1), atol=1e-12, rtol=0)


def test_padding_changes_nothing_for_real_tokens():
    block = Block(16, 2).double()
    x = torch.randn(1, 4, 16, dtype=torch.float64)
    padded = torch.cat([x, torch.randn(1, 3, 16, dtype=torch.float64)], dim=1)
    mask = Mask(is_token=torch.tensor([[True] * 4 + [False] * 3]))
    torch.testing.assert_close(block(padded, Context(mask))[:, :4], block(x), atol=1e-12, rtol=0)


def test_cross_attention_to_oneself_is_self_attention():
    cross = Attention(16, 4, context_width=16).double()
    self_attention = Attention(16, 4).double()
    own = cross.state_dict()
    self_attention.load_state_dict({
        "qkv.weight": torch.cat([own["q.weight"], own["kv.weight"]]),
        "qkv.bias": torch.cat([own["q.bias"], own["kv.bias"]]),
        "proj.weight": own["proj.weight"], "proj.bias": own["proj.bias"]})
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    torch.testing.assert_close(cross(x, keys_from=x), self_attention(x), atol=1e-12, rtol=0)


def test_a_key_bias_never_changes_the_output():
    """It adds q . bias to every score of a query, which softmax ignores. So VideoMAE has none."""
    layer = Attention(16, 4, bias="qkv").double()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    before = layer(x)
    with torch.no_grad():
        layer.qkv.bias[16:32] += torch.randn(16, dtype=torch.float64)
    torch.testing.assert_close(layer(x), before, atol=1e-12, rtol=0)


@pytest.mark.parametrize("bias", ["qkv", "qv", "none"])
@pytest.mark.parametrize("cosine", [False, True])
def test_asking_for_the_last_tokens_only_gives_the_same_numbers(bias, cosine):
    block = Block(16, 2, bias=bias, cosine=cosine, layer_scale=0.5).double()
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    torch.testing.assert_close(block(x, Context(last=3)), block(x)[:, -3:], atol=1e-12, rtol=0)
    blocks = torch.nn.ModuleList([block, Block(16, 2).double()])
    few, all_tokens = run_blocks(blocks, x, Context(last=3)), run_blocks(blocks, x)
    torch.testing.assert_close(few, all_tokens[:, -3:], atol=1e-12, rtol=0)
    assert torch.equal(run_blocks([], x, Context(last=3)), x[:, -3:])


def test_a_new_field_of_the_context_reaches_every_block_beside_the_old_ones():
    """Rotary positions (RoFormer, arXiv 2104.09864) in one field: only distances count."""
    @dataclass(frozen=True, eq=False)
    class Rotary(Context):
        angles: torch.Tensor | None = None  # (N, K/2)

    class RotaryAttention(Attention):
        def forward(self, x, context=None, *, keys_from=None):
            self.angles = context.angles
            return super().forward(x, context, keys_from=keys_from)

        def queries_keys_values(self, x, keys_from=None, last=None):
            q, k, v = super().queries_keys_values(x, keys_from, last)
            turned = []
            for y in (q, k):
                first, second = y.chunk(2, dim=-1)
                cos, sin = (f(self.angles[-y.shape[2]:]) for f in (torch.cos, torch.sin))
                turned.append(torch.cat([first * cos - second * sin,
                                         second * cos + first * sin], dim=-1))
            return *turned, v

    blocks = [Block(16, 2).double() for _ in range(3)]
    for block in blocks:
        own = RotaryAttention(16, 2).double()
        own.load_state_dict(block.attn.state_dict())
        block.attn = own
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    angles = torch.arange(6)[:, None] / 10 ** torch.arange(4.0).double()
    out = run_blocks(blocks, x, Rotary(Mask(causal=True), angles=angles))
    turned = run_blocks(blocks, x, Rotary(Mask(causal=True), angles=angles + 3.0))
    torch.testing.assert_close(out, turned, atol=1e-12, rtol=0)
    stretched = run_blocks(blocks, x, Rotary(Mask(causal=True), angles=angles * 2))
    assert (out - stretched).abs().max() > 1e-4
    for recompute in (False, True):
        few = run_blocks(blocks, x, Rotary(Mask(causal=True), last=2, angles=angles), recompute)
        torch.testing.assert_close(few, out[:, -2:], atol=1e-12, rtol=0)


def test_recomputing_activations_changes_no_number():
    blocks = torch.nn.ModuleList([Block(16, 2, drop_path=0.3), Block(16, 2)])
    x = torch.randn(4, 5, 16, requires_grad=True)
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(1)
        out = run_blocks(blocks, x, recompute=recompute)
        gradients.append(torch.autograd.grad(out.square().sum(), [x, *blocks.parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_cosine_attention_ignores_the_length_of_queries_and_keys():
    layer = Attention(16, 2, bias="none", cosine=True)
    x = torch.randn(1, 5, 16)
    with torch.no_grad():
        before = layer(x)
        layer.qkv.weight[:32] *= 7
    torch.testing.assert_close(layer(x), before, atol=1e-5, rtol=1e-4)


def test_the_block_is_torchs_own_pre_norm_layer():
    """Equality with something that others wrote: nn.TransformerEncoderLayer, norm first."""
    theirs = torch.nn.TransformerEncoderLayer(16, 2, 64, dropout=0.0, activation="gelu",
                                              batch_first=True, norm_first=True,
                                              layer_norm_eps=1e-6)
    theirs = theirs.double()
    ours = Block(16, 2).double()
    names = {"attn.qkv.weight": "self_attn.in_proj_weight",
             "attn.qkv.bias": "self_attn.in_proj_bias",
             "attn.proj.weight": "self_attn.out_proj.weight",
             "attn.proj.bias": "self_attn.out_proj.bias",
             "mlp.fc1.weight": "linear1.weight", "mlp.fc1.bias": "linear1.bias",
             "mlp.fc2.weight": "linear2.weight", "mlp.fc2.bias": "linear2.bias"}
    state = theirs.state_dict()
    ours.load_state_dict({key: state[names.get(key, key)] for key in ours.state_dict()})
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-12, rtol=0)


def test_the_two_gelus_differ_enough_to_spoil_loaded_weights():
    x = torch.linspace(-4, 4, 101, dtype=torch.float64)
    torch.testing.assert_close(F.gelu(x), x * 0.5 * (1 + torch.erf(x / 2**0.5)))
    difference = (F.gelu(x) - quick_gelu(x)).abs().max()
    assert 0.01 < difference < 0.03


def test_the_product_of_two_sinusoid_rows_depends_on_their_distance_alone():
    table = sinusoid_table(50, 32).double()
    products = table @ table.T
    for distance in (1, 7, 20):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5, rtol=0)


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    drop, x = DropPath(0.4), torch.ones(20000, 2, 3)
    out = drop(x)
    assert set(out.unique().tolist()) == {0.0, x.new_tensor(1 / 0.6).item()}
    assert (out.flatten(1).std(dim=1) == 0).all()
    assert abs(out.mean().item() - 1) < 0.02
    assert torch.equal(drop.eval()(x), x)


def test_non_contiguous_inputs_are_fine():
    q = torch.randn(2, 5, 3, 8).transpose(1, 2)
    torch.testing.assert_close(attention(q, q, q), attention(*[q.contiguous()] * 3))
    torch.testing.assert_close(attention(q, q, q, form="reference"),
                               F.scaled_dot_product_attention(q, q, q), atol=1e-5, rtol=1e-5)


def test_the_file_shows_the_shapes_of_attention_and_two_masks(capsys):
    attention_file.main()
    out = capsys.readouterr().out
    assert "(2, 4, 12, 24)" in out and "sdpa differs from the reference by" in out
    window = ("######......", "#########...", "...#########", "......######")
    assert out.splitlines()[-12:] == ["  " + row for row in window for _ in range(3)]
