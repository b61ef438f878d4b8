"""What is proved about compiled blocks (train.py --compile):

no stage has a graph break, forward or backward; losses and gradients are those of the uncompiled
network; another batch size in evaluation makes one more version, not one per size; where nothing can
be compiled a run says so and goes on.
"""

import pytest
import torch
from torch._dynamo.utils import counters

import attention
import data
import train

FAST = dict(device="cpu", precision="fp32", workers=0)
STAGES = {
    "mae": (train.MAE, dict(num_frames=4, input_size=32, mask_ratio=0.5)),
    "mae packed": (train.MAE, dict(num_frames=4, input_size=32, mask_ratio=0.5, pack_frames="2,4")),
    "clip": (train.Clip, dict(num_frames=4, input_size=40, image_every=0)),
    "clip joint": (train.Clip, dict(kind="joint", num_frames=4, input_size=40, image_every=0)),
}


@pytest.fixture(autouse=True)
def traced(monkeypatch):
    """Traced by torch.compile and run by torch's own operators: all but the minute of compiling."""
    monkeypatch.setattr(attention, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    counters.clear()
    found = attention.no_compiler
    train.compiled.cache_clear()
    found.cache_clear()
    with torch._dynamo.config.patch(recompile_limit=8):
        yield
    train.compiled.cache_clear()
    found.cache_clear()
    torch._dynamo.reset()


def step(stage, model, batch):
    """Loss and gradients with a fixed draw of everything random."""
    model.zero_grad()
    torch.manual_seed(0)
    loss, _ = stage.loss(model, batch, train.generator(0, "test"))
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["mae", pytest.param("clip", marks=pytest.mark.slow),
                                  pytest.param("clip joint", marks=pytest.mark.slow),
                                  pytest.param("mae packed", marks=pytest.mark.slow)])
def test_no_stage_has_a_graph_break_and_the_numbers_stay(name):
    card, options = STAGES[name]
    stage = card(**FAST, **options)
    torch.manual_seed(0)
    model = stage.build().train()
    batch = next(iter(data.batches(stage.datasets()[0], 4, 0, 1)))
    for module in model.modules():  # drawn in another order by compiled code
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    plain, expected = step(stage, model, batch)
    train.compile_blocks(model)
    stage.compile = "on"
    loss, gradients = step(stage, model, batch)
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"], dict(counters["graph_break"])
    torch.testing.assert_close(loss, plain)
    for part in expected:
        torch.testing.assert_close(gradients[part], expected[part], atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_the_bridge_between_two_encoders_has_no_graph_break_either(tmp_path):
    for name, size in (("masked", 32), ("multimodal", 40)):
        torch.manual_seed(0)
        model = train.Classify(encoder=name, **FAST, num_frames=4, input_size=size).build()
        train.weights.save(tmp_path / name, model, model.config)
    stage = train.Fuse(**FAST, masked=str(tmp_path / "masked"), multimodal=str(tmp_path / "multimodal"), batch_size=4)
    model = stage.build().train()
    batch = next(iter(data.batches(stage.datasets()[0], 4, 0, 1)))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    plain, expected = step(stage, model, batch)
    train.compile_blocks(model)
    loss, gradients = step(stage, model, batch)
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]
    torch.testing.assert_close(loss, plain)
    assert gradients.keys() == expected.keys()


def test_other_batches_and_lengths_make_one_more_version_each():
    """The last batch of an evaluation is smaller, a clip of another length may follow."""
    block = attention.Block(32, 2)
    block.compile(fullgraph=True, backend="aot_eager")

    def graphs_for(batch, length):
        before = counters["stats"]["unique_graphs"]
        block(torch.randn(batch, length, 32)).sum().backward()
        return counters["stats"]["unique_graphs"] - before

    assert graphs_for(4, 10) == 1
    assert graphs_for(6, 10) == 1
    assert graphs_for(6, 12) == 1
    assert [graphs_for(*size) for size in ((5, 10), (4, 10), (7, 30), (12, 12))] == [0, 0, 0, 0]


@torch.no_grad()
def test_a_compiled_block_takes_its_masked_attention_in_one_graph():
    """What CUDA does with packed clips: mask and FlexAttention become part of the block's graph."""
    block = attention.Block(32, 2)
    x = torch.randn(1, 200, 32)
    mask = attention.Mask(segments=torch.arange(200)[None] // 70)
    expected = block(x, mask, last=50)
    block.compile(fullgraph=True, backend="aot_eager")
    try:
        attention.use("flex")
        torch.testing.assert_close(block(x, mask, last=50), expected, atol=1e-5, rtol=1e-5)
    finally:
        attention.use("auto")
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_where_nothing_can_be_compiled_a_run_says_so_once_and_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(attention, "no_compiler", lambda device: "g++: not found")
    flags = ("--num-frames 4 --input-size 32 --mask-ratio 0.5 --batch-size 4 --eval-clips 8 --workers 0 --precision fp32 "
             "--device cpu --compile on --steps 1").split()
    assert train.main(["mae", *flags, "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("nothing can be compiled here: g++: not found") == 1


def test_float32_products_change_library_by_a_rule_and_only_where_that_is_exact(monkeypatch):
    """A stopwatch might say something else the next time, and two equal runs would differ in their last bits."""
    setting = torch.backends.mkldnn.matmul
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    for maker, expected in (("GenuineIntel", "off"), ("", "off"), ("AuthenticAMD", "on")):
        monkeypatch.setattr(train, "processor_maker", lambda: maker)
        taken, why = train.choose_products("auto")
        assert taken == expected and (setting.fp32_precision == "bf16") == (taken == "on") and "error " in why
    assert train.choose_products("off")[0] == "off" and setting.fp32_precision == "none"
    rounded = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: rounded(a, b) if setting.fp32_precision == "none"
                        else rounded(a, b).bfloat16().float())             # as AMX units would
    assert train.choose_products("auto")[0] == "off" and setting.fp32_precision == "none"
