"""What is proved about compiled blocks (train.py --compile):

No stage and no network has a graph break, forward or backward. Losses and gradients are those of
the uncompiled network. Another batch size makes one more version in training and one in
evaluation, not one per size. FlexAttention and its mask become part of a block's graph. Where
nothing can be compiled a run says so and goes on. oneDNN multiplies float32 matrices by a rule.
"""

import pytest
import torch
from torch._dynamo.utils import counters

import attention
import caption_decoder
import data
import fusion
import mae
import train
import uniformerv2
import weights
from engine import flex, machine
from engine.stage import generator
from variants import divided_attention, dual_masking

FAST = dict(device="cpu", precision="fp32", workers=0)
STAGES = {
    "mae": (train.MaskedModelling, dict(num_frames=4, input_size=32, mask_ratio=0.5)),
    "clip": (train.VideoLanguage, dict(num_frames=4, input_size=40, image_every=0)),
    "clip joint": (train.VideoLanguage, dict(kind="joint", num_frames=4, input_size=40,
                                             image_every=0)),
}


@pytest.fixture(autouse=True)
def traced(monkeypatch):
    """Traced by torch.compile and run by torch's own operators: all but the minute of compiling."""
    monkeypatch.setattr(flex, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    counters.clear()
    no_compiler = flex.no_compiler
    no_compiler.cache_clear()
    with torch._dynamo.config.patch(recompile_limit=8):
        yield
    no_compiler.cache_clear()
    torch._dynamo.reset()


def step(stage, model, batch):
    """Loss and gradients with a fixed draw of everything random."""
    model.zero_grad()
    torch.manual_seed(0)
    loss, _ = stage.loss(model, batch, generator(0, "test"))
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()
                           if p.grad is not None}


@pytest.mark.parametrize("name", ["mae", pytest.param("clip", marks=pytest.mark.slow),
                                  pytest.param("clip joint", marks=pytest.mark.slow)])
def test_no_stage_has_a_graph_break_and_the_numbers_stay(name):
    card, options = STAGES[name]
    stage = card(**FAST, **options)
    torch.manual_seed(0)
    train_set, _ = stage.datasets()
    model = stage.build(train_set).train()
    batch = next(iter(data.batches(train_set, 4, 0, 1)))
    for module in model.modules():  # drawn in another order by compiled code
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    plain, expected = step(stage, model, batch)
    machine.compile_blocks(model, train.BLOCKS)
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
        stage = train.PostPretraining(encoder=name, **FAST, num_frames=4, input_size=size)
        train_set, _ = stage.datasets()
        model = stage.build(train_set)
        weights.save(tmp_path / name, model, model.config)
    stage = train.CrossModel(**FAST, masked=str(tmp_path / "masked"),
                             multimodal=str(tmp_path / "multimodal"), batch_size=4)
    train_set, _ = stage.datasets()
    model = stage.build(train_set).train()
    batch = next(iter(data.batches(train_set, 4, 0, 1)))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    plain, expected = step(stage, model, batch)
    machine.compile_blocks(model, train.BLOCKS)
    loss, gradients = step(stage, model, batch)
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]
    torch.testing.assert_close(loss, plain)
    assert gradients.keys() == expected.keys()


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that torch.compile has made so far. They run as they are: only tracing costs."""
    made = []
    monkeypatch.setattr(flex, "BACKEND",
                        lambda graph, inputs: made.append(graph) or graph.forward)
    return made


def classifier(**options):
    return mae.VideoClassifier("tiny", classes=3, frames=4, image_size=32, head_scale=1.0,
                               **options)


def masked(network):
    model = network("tiny", frames=4, image_size=32)
    return model, mae.tube_mask(2, model.grid, 0.5, torch.Generator().manual_seed(0))


def network(name):
    """A small network and a call of it."""
    video = torch.randn(2, 3, 4, 32, 32)
    if name == "classifier":
        model = classifier()
        return model, lambda: model(video)
    if name == "dual mask":
        model, hidden = masked(dual_masking.DualMaskedVideoMAE)
        skipped = torch.arange(hidden.shape[1]).expand_as(hidden) % 2 == 0
        return model, lambda: model(video, hidden, skipped)
    if name == "divided attention":
        model, hidden = masked(divided_attention.DividedVideoMAE)
        return model, lambda: model(video, hidden)
    if name == "local units":
        size = uniformerv2.Size(32, 2, 2, 64, 16, 32)
        model = uniformerv2.UniFormerV2(size, classes=3, local_units=2)
        return model, lambda: model(video)
    if name == "windows of frames":
        model = torch.nn.ModuleList([attention.Block(32, 2), attention.Block(32, 2)])
        x = torch.randn(2, 40, 32)
        mask = attention.Mask(frames=torch.arange(40)[None] // 10, window=1)
        context = attention.Context(mask, last=10)
        return model, lambda: attention.run_blocks(model, x, context)
    if name == "caption decoder":
        model = caption_decoder.CaptionDecoder(32, heads=2, depth=2, visual_width=48,
                                               vocabulary=50, queries=4)
        visual, text = torch.randn(2, 9, 48), torch.randn(2, 6, 32)
        return model, lambda: model(visual, text)
    model = fusion.InternVideo(classifier(), uniformerv2.UniFormerV2("tiny", classes=3, frames=4))
    clip = torch.randint(256, (2, 4, 32, 32, 3), dtype=torch.uint8)
    return model, lambda: model(clip)


@pytest.mark.parametrize("name", [
    "classifier", "local units", "windows of frames", "caption decoder",
    *(pytest.param(name, marks=pytest.mark.slow)
      for name in ("dual mask", "divided attention", "fusion"))])
def test_no_network_has_a_graph_break_in_its_blocks_forward_or_backward(name, graphs):
    torch.manual_seed(0)
    model, call = network(name)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    expected = call()
    # fullgraph: a break is an exception
    machine.compile_blocks(model, train.BLOCKS)
    out = call()
    out.square().sum().backward()
    assert graphs and not counters["graph_break"]
    torch.testing.assert_close(out, expected)
    # A version for the last tokens alone or for the first layer is fine, one for each layer is not.
    assert len(graphs) <= sum(isinstance(module, train.BLOCKS) for module in model.modules())


def test_training_and_evaluation_taking_turns_make_one_more_version_each(graphs):
    """Full batches, a smaller last one, other sizes later: two versions at most of each of both."""
    model = classifier(drop_path=0.1)
    machine.compile_blocks(model, train.BLOCKS)
    new = []
    for training, batch in ((False, 6), (False, 6), (False, 3), (True, 4), (True, 4), (True, 4),
                            (False, 6), (True, 5), (False, 7), (True, 2), (False, 4)):
        before = len(graphs)
        model.train(training)
        with torch.set_grad_enabled(training):
            out = model(torch.randn(batch, 3, 4, 32, 32))
        if training:
            out.sum().backward()
        new.append(len(graphs) - before)
    assert new[0] and not new[1] and new[2] <= new[0]  # evaluation: 6, again, another size
    assert not any(new[i] for i in (4, 5, 6, 8, 10)) and new[7] <= new[3] and not new[9], new


@pytest.mark.slow
@torch.no_grad()
def test_layers_share_their_versions_with_flex_attention_inside(graphs):
    """What CUDA does with a window of frames, by FlexAttention that is only traced here."""
    blocks = torch.nn.ModuleList([attention.Block(32, 2) for _ in range(3)])
    cases = []
    for length in (200, 333, 260):
        mask = attention.Mask(frames=torch.arange(length)[None] // 70, window=1)
        cases.append((torch.randn(2, length, 32), attention.Context(mask, last=50)))
    expected = [attention.run_blocks(blocks, *case) for case in cases]
    for block in blocks:
        block.compile(fullgraph=True, backend=flex.BACKEND)
    counts = []
    try:
        attention.use("flex")
        for case, wanted in zip(cases, expected):
            before = len(graphs)
            out = attention.run_blocks(blocks, *case)
            torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)
            counts.append(len(graphs) - before)
    finally:
        attention.use("auto")
    # Two versions, for all tokens and for the last 50; two more when the length first changes.
    assert counts == [2, 2, 0] and not counters["graph_break"]


@pytest.mark.slow
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
    """What CUDA does with frames: mask and FlexAttention become part of the block's graph."""
    block = attention.Block(32, 2)
    x = torch.randn(1, 200, 32)
    context = attention.Context(attention.Mask(frames=torch.arange(200)[None] // 70), last=50)
    expected = block(x, context)
    block.compile(fullgraph=True, backend="aot_eager")
    try:
        attention.use("flex")
        torch.testing.assert_close(block(x, context), expected, atol=1e-5, rtol=1e-5)
    finally:
        attention.use("auto")
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_where_nothing_can_be_compiled_a_run_says_so_once_and_goes_on(tmp_path, capsys,
                                                                      monkeypatch):
    monkeypatch.setattr(flex, "no_compiler", lambda device: "g++: not found")
    flags = ("--num-frames 4 --input-size 32 --mask-ratio 0.5 --batch-size 4 --eval-clips 8 "
             "--workers 0 --precision fp32 --device cpu --compile on --steps 1").split()
    assert train.main(["mae", *flags, "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("nothing can be compiled here: g++: not found") == 1


@pytest.mark.parametrize("rounds", [False, True])
def test_float32_products_change_library_by_a_rule_and_only_where_that_is_exact(rounds,
                                                                                monkeypatch):
    """A stopwatch might say something else the next time, and two equal runs would differ in their
    last bits. Maker and rounding are simulated, so the test is the same on every processor."""
    setting = torch.backends.mkldnn.matmul
    product = torch.Tensor.__matmul__

    def simulated(a, b):
        """Exact; bfloat16 where the switch permits it and the processor has units for it."""
        out = product(a.double(), b.double()).to(a.dtype)
        rounded = rounds and a.dtype == torch.float32 and setting.fp32_precision == "bf16"
        return out.bfloat16().float() if rounded else out
    monkeypatch.setattr(torch.Tensor, "__matmul__", simulated)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    for maker, faster in (("GenuineIntel", False), ("", False), ("AuthenticAMD", True)):
        monkeypatch.setattr(machine, "processor_maker", lambda: maker)
        for choice, on in (("auto", faster and not rounds), ("on", True), ("off", False)):
            taken, why = machine.choose_onednn(choice)
            assert taken == ("on" if on else "off") and (choice == "off" or "error " in why)
            assert setting.fp32_precision == ("bf16" if on else "none")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)  # oneDNN is all there is
    assert machine.choose_onednn("auto")[0] == "off"
