"""What is proved about attention.py:

every kernel gives the written-out attention, values and gradients, for every mask, dtype and layout in memory; a
kernel that fails on a GPU when it is tried is not chosen there; a kernel compiled
for a mask does, too, and batch and length may change without a kernel for each;
the future is invisible under a causal mask; a key bias changes nothing; a query that may look at
nothing gets zeros; packed clips are what they would be alone; the last block may answer for some
tokens only; sinusoids know distances; DropPath keeps the mean.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend

import attention as attention_file
from attention import (Attention, Block, DropPath, Mask, attention, choose, gelu, quick_gelu, run_blocks,
                       sinusoid_table, written_out)


def masks(queries, keys):
    """Every kind of mask, alone and together; some queries may look at nothing."""
    is_token = torch.rand(2, keys) > 0.3
    segments = torch.randint(0, 3, (2, keys))
    asking = torch.randint(0, 4, (2, queries))
    frames, at = torch.arange(keys)[None] // 3, torch.arange(queries)[None] // 2
    return {"none": None, "causal": Mask(causal=True), "padding": Mask(is_token=is_token),
            "segments": Mask(segments=segments, query_segments=asking), "empty": Mask(),
            "frames": Mask(frames=frames, query_frames=at), "window": Mask(frames=frames, query_frames=at, window=1),
            "all": Mask(causal=True, is_token=is_token, segments=segments, query_segments=asking, frames=frames,
                        query_frames=at, window=1),
            "nothing": Mask(is_token=torch.zeros(2, keys, dtype=torch.bool))}


@pytest.mark.parametrize("kind", masks(1, 1))
@pytest.mark.parametrize("queries, keys, heads", [(7, 7, 3), (1, 1, 3), (1, 9, 3), (4, 9, 3), (5, 5, 1)])
def test_every_kernel_is_the_written_out_attention(kind, queries, keys, heads, monkeypatch):
    """The dispatch may pick what is fast only because the numbers are the same."""
    monkeypatch.setattr(attention_file, "PIECE", 100)  # bytes: some heads or some queries at a time
    torch.manual_seed(queries * 10 + keys)
    mask = masks(queries, keys)[kind]
    inputs = [torch.randn(2, n, size, 8, dtype=torch.float64, requires_grad=True)
              for n, size in ((3, queries), (heads, keys), (heads, keys))]
    # From first principles, with loops instead of tensor tricks.
    allowed = torch.ones(2, queries, keys, dtype=torch.bool)
    for b in range(2):
        for i in range(queries):
            for j in range(keys):
                if mask is None:
                    continue
                if mask.causal and j > i + keys - queries:
                    allowed[b, i, j] = False
                if mask.is_token is not None and not mask.is_token[b, j]:
                    allowed[b, i, j] = False
                if mask.segments is not None and mask.segments[b, j] != mask.query_segments[b, i]:
                    allowed[b, i, j] = False
                if mask.frames is not None and abs(mask.frames[0, j] - mask.query_frames[0, i]) > mask.window:
                    allowed[b, i, j] = False
    q, k, v = inputs
    scores = torch.einsum("bhik,bhjk->bhij", q, k.expand(-1, 3, -1, -1)) / 8**0.5
    weights = scores.exp() * allowed[:, None]
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)
    expected = torch.einsum("bhij,bhjk->bhik", weights, v.expand(-1, 3, -1, -1))
    upstream = torch.randn_like(expected)
    reference = torch.autograd.grad(expected, inputs, upstream)
    for kernel in ("auto", "written_out", "piecewise", "fused") + ("apart",) * (kind == "segments"):
        out = attention(q, k, v, mask, kernel=kernel)
        torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-10)
        for got, want in zip(torch.autograd.grad(out, inputs, upstream), reference):
            torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-10)


@pytest.fixture
def traced(monkeypatch):
    """FlexAttention traced and run by torch's own operators: what is compiled, without the minute of compiling.
    Returns a function that says how many graphs were made so far."""
    monkeypatch.setattr(attention_file, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    counters.clear()
    attention_file._kernel.cache_clear()
    attention_file.no_compiler.cache_clear()
    yield lambda: counters["stats"]["unique_graphs"]
    attention_file._kernel.cache_clear()
    attention_file.no_compiler.cache_clear()


LAYOUTS = {  # one tensor, strided in all ways that projections, heads and caches leave behind
    "contiguous": lambda x: x.contiguous(),
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "sliced": lambda x: F.pad(x, (3, 2, 1, 1))[..., 1:-1, 3:-2],
    "expanded": lambda x: x[:1, :1].expand_as(x)}
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-5}  # bfloat16: eight times its own, 2**-8


def assert_exact(kernel, mask, dtype, queries, keys, layout, backward=True):
    """The kernel against the written-out attention of the same numbers in float64."""
    inputs = [torch.randn(2, 3, n, 16).to(dtype).requires_grad_(backward) for n in (queries, keys, keys)]
    exact = [x.detach().double().requires_grad_(backward) for x in inputs]
    found = []
    for name, leaves in (("written_out", exact), (kernel, inputs)):
        out = attention(*map(LAYOUTS[layout], leaves), mask, kernel=name)
        upstream = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
        found.append((out, *(torch.autograd.grad(out, leaves, upstream) if backward else ())))
    for expected, got in zip(*found):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, atol=ROUNDING[dtype], rtol=ROUNDING[dtype])
        if mask is not None and mask.is_token is not None and not mask.is_token.any():
            assert not got.any() and not got.isnan().any()                   # exactly zero, the gradients too


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("kernel", ["written_out", "piecewise", "fused", "apart", "auto"])
def test_every_kernel_takes_every_dtype_and_layout_with_gradients(kernel, dtype, monkeypatch):
    monkeypatch.setattr(attention_file, "PIECE", 500)
    torch.manual_seed(0)
    for queries, keys in ((7, 9), (1, 1), (1, 5)):
        of = masks(queries, keys)
        for kind in ("segments",) if kernel == "apart" else ("none", "causal", "padding", "segments", "window", "all", "nothing"):
            for layout in LAYOUTS:
                assert_exact(kernel, of[kind], dtype, queries, keys, layout)


@pytest.mark.parametrize("kind, dtype", [("all", torch.float32)] + [pytest.param(*pair, marks=pytest.mark.slow) for pair in (
    ("none", torch.float32), ("nothing", torch.float32), ("none", torch.bfloat16), ("all", torch.bfloat16))])
def test_so_does_flex_without_them(kind, dtype, traced):
    torch.manual_seed(0)
    for queries, keys in ((7, 9), (1, 1)):
        for layout in LAYOUTS:
            with torch.no_grad():
                assert_exact("flex", masks(queries, keys)[kind], dtype, queries, keys, layout, backward=False)


@torch.no_grad()
def assert_flex_is_written_out(mask, q, k, v, atol=1e-5):
    out = attention(q, k, v, mask, kernel="flex")
    expected = attention(q, k, v, mask, kernel="written_out")
    assert out.dtype == q.dtype and out.shape == q.shape
    torch.testing.assert_close(out, expected, atol=atol, rtol=1e-5)


@pytest.mark.parametrize("kind", ["none", "all", "nothing"])
def test_a_kernel_made_for_the_mask_is_the_written_out_attention(kind, traced):
    """Odd sizes, one query, one key, more than one block of 128, one head of keys, not contiguous."""
    for queries, keys, heads in [(5, 9, 3), (1, 1, 3), (130, 261, 1)]:
        mask = masks(queries, keys)[kind]
        q, k, v = (torch.randn(2, n, size, 16).transpose(1, 2)
                   for n, size in ((queries, 3), (keys, heads), (keys, heads)))
        assert_flex_is_written_out(mask, q, k, v)


@pytest.mark.slow
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.bfloat16, 0.04)])
@pytest.mark.parametrize("kind", masks(1, 1))
def test_so_is_the_compiled_one(kind, dtype, atol):
    for queries, keys in [(7, 7), (1, 9), (300, 300)]:
        q, k, v = (torch.randn(2, 3, n, 16).to(dtype) for n in (queries, keys, keys))
        try:
            assert_flex_is_written_out(masks(queries, keys)[kind], q, k, v, atol)
        except torch._dynamo.exc.TorchDynamoException as error:
            if kind not in ("frames", "window", "all") or "was not declared" not in str(error):
                raise
            pytest.skip(f"torch {torch.__version__} writes C++ for windows that does not compile; the dispatch goes on without")


def test_the_blocks_of_a_mask_hold_all_that_may_be_looked_at_and_little_else():
    """Three packed clips of 256 tokens: of 36 blocks of 128 x 128, 12 are computed; of a window of frames, the band."""
    mask = Mask(segments=torch.arange(768)[None] // 256)
    assert mask.blocks(4, 768, 768, "cpu").to_dense().sum() == 12
    for kind, mask in masks(300, 400).items():
        if mask is not None and mask.kind:
            dense = mask.blocks(2, 300, 400, "cpu").to_dense().bool()        # (2 or 1, 1, 3, 4)
            allowed = F.pad(mask.allowed(300, 400, "cpu"), (0, 112, 0, 84))
            needed = allowed.unflatten(3, (4, 128)).unflatten(2, (3, 128)).any(dim=(3, 5))
            assert torch.equal(dense, needed.expand_as(dense)), kind
            assert mask.blocks(2, 300, 400, "cpu") is mask.blocks(2, 300, 400, "cpu")  # kept


@pytest.mark.slow
def test_new_batches_and_lengths_make_one_more_kernel_each_and_never_fall_back(traced):
    """Training and evaluation differ in both. Past the limit of torch.compile, 8 versions, an exception says so."""
    def graphs_for(kind, batch, length):
        q = torch.randn(batch, 2, length, 16)
        segments = (torch.arange(length)[None] // 60).expand(batch, -1)
        mask = {"none": None, "causal": Mask(causal=True), "segments": Mask(segments=segments)}[kind]
        before = traced()
        assert_flex_is_written_out(mask, q, q, q)
        return traced() - before

    for kind in ("none", "causal", "segments"):
        assert graphs_for(kind, 4, 200) == 1
        assert graphs_for(kind, 6, 200) <= 1                                  # another batch
        assert graphs_for(kind, 6, 300) <= 1                                  # another length
        for batch, length in ((4, 200), (8, 200), (4, 333), (3, 517), (16, 140)):
            assert graphs_for(kind, batch, length) == 0, (kind, batch, length)

    attention_file._kernel.cache_clear()
    with torch._dynamo.config.patch(recompile_limit=1, automatic_dynamic_shapes=False):
        graphs_for("none", 4, 200)
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            graphs_for("none", 4, 300)


def test_where_no_kernel_can_be_compiled_the_choice_says_so_once_and_goes_on(traced, monkeypatch):
    mask = Mask(frames=torch.arange(600)[None] // 60, window=1)
    q = torch.randn(1, 2, 600, 16)
    with torch.no_grad():
        assert choose(q, q, mask) == "flex", attention_file.no_compiler("cpu")
    assert choose(q, q, mask) == "written_out"                               # no gradients from a CPU's FlexAttention
    with pytest.raises(ValueError, match="no backward pass on a CPU"):
        attention(q.requires_grad_(), q, q, mask, kernel="flex")

    def broken(*_, **__):
        raise torch._dynamo.exc.TorchDynamoException("no such unit")
    monkeypatch.setattr(attention_file, "flex", broken)
    with torch.no_grad(), pytest.warns(UserWarning, match="no compiled kernel for frames here.*no such unit"):
        out = attention(q, q, q, mask)
    torch.testing.assert_close(out, attention(q, q, q, mask, kernel="written_out"))
    assert choose(q, q, mask) == "written_out"
    attention_file._failed.clear()
    monkeypatch.setattr(torch, "compile", broken)
    attention_file.no_compiler.cache_clear()
    assert attention_file.no_compiler("cpu") == "no such unit"
    with torch.no_grad():
        assert choose(q, q, mask) == "written_out"


def test_a_gpu_never_chooses_a_flex_attention_that_failed_when_it_was_tried(monkeypatch):
    """On a CPU the trial fails by itself, for there is no backward pass."""
    monkeypatch.setattr(attention_file, "_failed", set())
    attention_file._flex_works.cache_clear()
    before = torch.get_rng_state()
    on_gpu = SimpleNamespace(shape=(1, 2, 600, 16), dtype=torch.float32, device=torch.device("cuda"))
    mask = Mask(segments=torch.arange(600)[None] // 60)
    asked = []
    monkeypatch.setattr(attention_file, "no_compiler", lambda device: "")
    with monkeypatch.context() as patch:
        patch.setattr(attention_file, "_flex_works", lambda *variant: asked.append(variant) or True)
        assert choose(on_gpu, on_gpu, mask) == "flex" and asked == [(("segments",), 16, torch.float32, on_gpu.device)]
    with pytest.warns(UserWarning, match="no compiled kernel for segments here.*no backward pass on a CPU"):
        assert not attention_file._flex_works(("segments",), 16, torch.float32, "cpu")
    assert choose(on_gpu, on_gpu, mask) == "fused" and torch.equal(torch.get_rng_state(), before)
    attention_file._flex_works.cache_clear()

    with monkeypatch.context() as patch:                                     # one that works: right numbers, wrong numbers
        patch.setattr(attention_file, "flex", attention_file.piecewise)
        kind = ("causal", "is_token", "segments", "frames")
        assert attention_file._flex_works(kind, 16, torch.bfloat16, "cpu")
        patch.setattr(attention_file, "flex", lambda *args: attention_file.piecewise(*args) * 1.2)
        with pytest.warns(UserWarning, match="wrong by 2.*e-01 of the largest"):
            assert not attention_file._flex_works(kind, 32, torch.bfloat16, "cpu")

        def no_number_backward(*args):
            out = attention_file.piecewise(*args)
            out.register_hook(lambda grad: grad * torch.nan)
            return out
        patch.setattr(attention_file, "flex", no_number_backward)
        with pytest.warns(UserWarning, match="wrong by nan of the largest"):
            assert not attention_file._flex_works(kind, 64, torch.bfloat16, "cpu")
    attention_file._flex_works.cache_clear()


def test_the_quickest_fused_kernel_goes_first_and_a_newer_flash_only_if_it_is_right(monkeypatch):
    """Of three newer ones one is not installed, one gives other numbers."""
    ms, active = {"flash": 3.0, "cudnn": 2.0, "efficient": 4.0, "FA3": 1.5, "wrong": 0.1}, []

    def activate(name):
        if name == "FA4":
            raise ImportError(name)
        active.append(name)
    monkeypatch.setattr(attention_file, "newer_flash", lambda: ("FA3", "FA4", "wrong"))
    monkeypatch.setattr(attention_file, "_activate", activate)
    assert attention_file._flash_is_right("cpu")  # torch's own, which runs here
    monkeypatch.setattr(attention_file, "_flash_is_right", lambda device: active[-1] != "wrong")
    monkeypatch.setattr(attention_file, "_there_and_back", lambda backend, device: ms[active[-1]])
    usual = torch._C._get_sdp_priority_order()
    try:
        found = attention_file.fastest_fused.__wrapped__("cuda")
        assert list(found.items()) == [("FA3", 1.5), ("cudnn", 2.0), ("flash", 3.0), ("efficient", 4.0)]
        monkeypatch.setattr(attention_file, "fastest_fused", lambda device: found)
        assert attention_file.use("fused", "cuda").startswith("fused for all (measured: FA3 1.50 ms, cudnn 2.00 ms")
        assert active[-1] == "FA3"
        order = [int(SDPBackend.FLASH_ATTENTION), int(SDPBackend.CUDNN_ATTENTION), int(SDPBackend.EFFICIENT_ATTENTION)]
        assert torch._C._get_sdp_priority_order()[:3] == order
    finally:
        attention_file.use("auto")
        attention_file.prefer([])
    assert active[-1] == "flash" and torch._C._get_sdp_priority_order() == usual


def test_packed_clips_taken_one_by_one_cost_only_their_own_pairs():
    from torch.utils.flop_counter import FlopCounterMode
    q = torch.randn(1, 2, 100, 16)
    mask = Mask(segments=torch.tensor([[0] * 10 + [1] * 60 + [2] * 30]))
    assert choose(q, q, mask) == "apart"
    flops = {}
    for kernel in ("apart", "written_out"):
        with FlopCounterMode(display=False) as counter:
            attention(q, q, q, mask, kernel=kernel)
        flops[kernel] = counter.get_total_flops()
    assert flops["apart"] / flops["written_out"] == (10**2 + 60**2 + 30**2) / 100**2


def test_the_flag_of_train_py_rules_all_attentions_that_name_no_kernel():
    calls = []
    q = torch.randn(1, 1, 4, 16)
    try:
        assert attention_file.use("fused") == "fused for all"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention_file, "fused", lambda q, *rest: calls.append(1) or q)
            attention(q, q, q)
    finally:
        assert "written out" in attention_file.use("auto")
    attention(q, q, q)
    assert calls == [1]


def test_a_query_that_may_look_at_nothing_gets_zeros_and_gives_no_gradient_in_every_kernel():
    q = torch.randn(1, 2, 3, 4, requires_grad=True)
    nothing = Mask(is_token=torch.zeros(1, 3, dtype=torch.bool))
    elsewhere = Mask(segments=torch.zeros(1, 3, dtype=torch.int), query_segments=torch.ones(1, 3, dtype=torch.int))
    for kernel, mask in (("written_out", nothing), ("piecewise", nothing), ("fused", nothing), ("written_out", elsewhere), ("apart", elsewhere)):
        out = attention(q, q, q, mask, kernel=kernel)
        assert out.eq(0).all() and torch.autograd.grad(out.sum(), q)[0].eq(0).all(), kernel


def test_bfloat16_kernels_agree_within_their_rounding():
    q, k, v = torch.randn(3, 2, 4, 50, 16)
    exact = written_out(q, k, v)
    for kernel in ("written_out", "piecewise", "fused"):
        rough = attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), kernel=kernel)
        assert (rough.float() - exact).abs().max() < 0.03
        with torch.autocast("cpu", torch.bfloat16):
            rough = attention(q, k, v, kernel=kernel)
        assert rough.dtype == torch.bfloat16 and (rough.float() - exact).abs().max() < 0.03


def test_in_pieces_no_scores_are_kept_and_large_ones_are_taken_so(monkeypatch):
    monkeypatch.setattr(attention_file, "KEPT", 4 * 3 * 2 * 50 * 50)
    monkeypatch.setattr(attention_file, "PIECE", 4 * 20 * 50)
    q, k, v = torch.randn(3, 3, 2, 50, 8, requires_grad=True).unbind()

    def kept(kernel):
        most = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: most.append(x.numel()) or x, lambda x: x):
            out = attention(q, k, v, kernel=kernel)
        return max(most), torch.autograd.grad(out.square().sum(), (q, k, v))

    (scores, whole), (inputs, pieces) = kept("written_out"), kept("piecewise")
    assert scores == 3 * 2 * 50 * 50 and inputs == q.numel()
    for a, b in zip(whole, pieces):
        torch.testing.assert_close(a, b)
    assert choose(q, k) == "written_out" and choose(q, k.repeat(1, 1, 2, 1)) == "piecewise"


def test_an_unknown_kernel_is_named_with_the_choices():
    with pytest.raises(ValueError, match="auto, written_out, piecewise, fused, flex or apart"):
        attention(*torch.zeros(3, 1, 1, 1, 1), kernel="flash")


def test_changing_the_future_leaves_the_past_alone():
    block = Block(16, 2).double()
    x = torch.randn(1, 6, 16, dtype=torch.float64)
    y = x.clone()
    y[:, 4:] += 1
    before, after = block(x, Mask(causal=True)), block(y, Mask(causal=True))
    assert torch.equal(before[:, :4], after[:, :4]) and not torch.equal(before[:, 4:], after[:, 4:])


def test_packed_clips_are_what_they_would_be_alone():
    """Two clips of different length in one row, kept apart by segments, equal two single runs."""
    block = Block(16, 2).double()
    a, b = torch.randn(1, 3, 16, dtype=torch.float64), torch.randn(1, 5, 16, dtype=torch.float64)
    packed = block(torch.cat([a, b], dim=1), Mask(segments=torch.tensor([[0] * 3 + [1] * 5])))
    torch.testing.assert_close(packed, torch.cat([block(a), block(b)], dim=1), atol=1e-12, rtol=0)


def test_padding_changes_nothing_for_real_tokens():
    block = Block(16, 2).double()
    x = torch.randn(1, 4, 16, dtype=torch.float64)
    padded = torch.cat([x, torch.randn(1, 3, 16, dtype=torch.float64)], dim=1)
    mask = Mask(is_token=torch.tensor([[True] * 4 + [False] * 3]))
    torch.testing.assert_close(block(padded, mask)[:, :4], block(x), atol=1e-12, rtol=0)


def test_cross_attention_to_oneself_is_self_attention():
    cross = Attention(16, 4, context_width=16).double()
    self_attention = Attention(16, 4).double()
    own = cross.state_dict()
    self_attention.load_state_dict({
        "qkv.weight": torch.cat([own["q.weight"], own["kv.weight"]]),
        "qkv.bias": torch.cat([own["q.bias"], own["kv.bias"]]),
        "proj.weight": own["proj.weight"], "proj.bias": own["proj.bias"]})
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    torch.testing.assert_close(cross(x, context=x), self_attention(x), atol=1e-12, rtol=0)


def test_a_key_bias_never_changes_the_output():
    """It adds q . bias to every score of a query alike; softmax cannot see that. So VideoMAE has none."""
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
    torch.testing.assert_close(block(x, last=3), block(x)[:, -3:], atol=1e-12, rtol=0)
    blocks = torch.nn.ModuleList([block, Block(16, 2).double()])
    torch.testing.assert_close(run_blocks(blocks, x, last=3), run_blocks(blocks, x)[:, -3:], atol=1e-12, rtol=0)


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
                                              batch_first=True, norm_first=True, layer_norm_eps=1e-6)
    theirs = theirs.double()
    ours = Block(16, 2).double()
    names = {"attn.qkv.weight": "self_attn.in_proj_weight", "attn.qkv.bias": "self_attn.in_proj_bias",
             "attn.proj.weight": "self_attn.out_proj.weight", "attn.proj.bias": "self_attn.out_proj.bias",
             "mlp.fc1.weight": "linear1.weight", "mlp.fc1.bias": "linear1.bias",
             "mlp.fc2.weight": "linear2.weight", "mlp.fc2.bias": "linear2.bias"}
    state = theirs.state_dict()
    ours.load_state_dict({key: state[names.get(key, key)] for key in ours.state_dict()})
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-12, rtol=0)


def test_the_two_gelus_differ_enough_to_spoil_loaded_weights():
    x = torch.linspace(-4, 4, 101, dtype=torch.float64)
    torch.testing.assert_close(gelu(x), x * 0.5 * (1 + torch.erf(x / 2**0.5)))
    difference = (gelu(x) - quick_gelu(x)).abs().max()
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
    torch.testing.assert_close(attention(q, q, q, kernel="fused"), F.scaled_dot_product_attention(q, q, q),
                               atol=1e-5, rtol=1e-5)


def test_attention_in_pieces_cancels_in_bfloat16_what_must_cancel(monkeypatch):
    """With a single key every weight is 1, whatever the query: queries and that key have no gradient."""
    monkeypatch.setattr(attention_file, "PIECE", 600)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 5, n, 16, dtype=torch.bfloat16, requires_grad=True) for n in (129, 1, 1))
    attention_file.piecewise(q, k, v, scale=1.0).backward(torch.randn(2, 5, 129, 16, dtype=torch.bfloat16))
    assert not q.grad.any() and not k.grad.any() and v.grad.any()


def test_attention_in_small_pieces_adds_up_bfloat16_gradients_as_exactly_as_in_one(monkeypatch):
    torch.manual_seed(0)
    inputs = [torch.randn(1, 2, 512, 16, dtype=torch.bfloat16) for _ in range(4)]
    found = {}
    for name, dtype, form in (("exact", torch.float64, attention_file.written_out), ("whole", torch.bfloat16, attention_file.written_out),
                              ("pieces", torch.bfloat16, attention_file.piecewise)):
        monkeypatch.setattr(attention_file, "PIECE", 8 * 512 * 2)
        q, k, v, grad = (x.to(dtype).clone().requires_grad_() for x in inputs)
        form(q, k, v).backward(grad.detach())
        found[name] = [x.grad.double() for x in (q, k, v)]
    for exact, whole, pieces in zip(*found.values()):
        assert (pieces - exact).norm() <= 1.2 * (whole - exact).norm()
