"""What is proved about graphs of whole networks, made for other programs:

torch.export for one batch size and for any, torch.jit.trace, torch.compile without a graph break
and ONNX give the numbers of the network itself. A network that was exported first still runs.
"""

import pytest
import torch

import caption_decoder
import clip_video
import fusion
import mae
import uniformerv2
from variants import dual_masking

MASKED = mae.Size(24, 2, 2, 48, 8, 24, 1, 2, 48)
FRAMES = uniformerv2.Size(32, 2, 2, 64, 16, 32)
TEXT = clip_video.TextSize(32, 1, 2)
SMALL = dict(frames=4, image_size=32)
NETWORKS = ("mae", "mae, uint8", "dual masking", "masked classifier", "stretched positions",
            "uniformerv2", "text", "clip", "frame-wise clip", "joint clip", "caption decoder",
            "video and text", "fusion")


def some(*quick):
    """All networks as parameters of a test; all but these are marked slow."""
    return pytest.mark.parametrize("name", [
        pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in NETWORKS])


def classifier(**options):
    return mae.VideoClassifier(MASKED, classes=3, head_scale=1.0, **SMALL | options)


def multimodal(**options):
    """Not as at the start, when branches that are zero would hide what is wrong in them."""
    model = uniformerv2.UniFormerV2(FRAMES, classes=3, frames=4, **options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def text_ids():
    """Three sentences of a text encoder whose end is token 49: of three, four and six tokens."""
    ids = torch.randint(49, (3, 6))
    ids[[0, 1, 2], [2, 3, 5]] = 49
    return ids


def clip(kind):
    return clip_video.VideoCLIP(FRAMES, kind=kind, text_size=TEXT, frames=4, vocabulary=50,
                                context=8, end=49)


def caption_of(visual_width):
    return caption_decoder.CaptionDecoder(32, heads=2, depth=1, visual_width=visual_width,
                                          vocabulary=50, queries=4)


def network(name):
    """A small network in eval mode and its inputs, a batch of three."""
    torch.manual_seed(0)
    video = torch.randn(3, 3, 4, 32, 32)
    hidden = mae.tube_mask(3, (2, 4, 4), 0.5, torch.Generator().manual_seed(0))
    bytes_ = torch.randint(256, (3, 4, 40, 48, 3), dtype=torch.uint8)
    skipped = dual_masking.running_cell_mask(3, (2, 4, 4), torch.Generator().manual_seed(0))
    make = {
        "mae": lambda: (mae.VideoMAE(MASKED, **SMALL), video, hidden),
        "mae, uint8": lambda: (mae.VideoMAE(MASKED, **SMALL), video.mul(50).byte(), hidden),
        "dual masking": lambda: (dual_masking.DualMaskedVideoMAE(MASKED, **SMALL), video, hidden,
                                 skipped),
        "masked classifier": lambda: (classifier(), video),
        "stretched positions": lambda: (classifier(positions="stored", image_size=48), video),
        "uniformerv2": lambda: (multimodal(local_units=2, temporal_downsample=True), video),
        "text": lambda: (clip_video.TextEncoder(TEXT, vocabulary=50, context=8, embedding=16),
                         text_ids()),
        "clip": lambda: (clip("video"), video, text_ids()),
        "frame-wise clip": lambda: (clip("frames"), video, text_ids()),
        "joint clip": lambda: (clip("joint"), video, text_ids()),
        "caption decoder": lambda: (caption_of(48), torch.randn(3, 9, 48), torch.randn(3, 6, 32)),
        "video and text": lambda: (caption_decoder.VideoText(clip("video"), caption_of(32)), video,
                                   text_ids()),
        "fusion": lambda: (fusion.InternVideo(classifier(frames=2), multimodal()), bytes_),
    }[name]
    model, *inputs = make()
    return model.eval(), tuple(inputs)


def any_batch(inputs):
    """What torch.export calls dynamic shapes: the first axis of every input."""
    batch = torch.export.Dim("batch", min=1, max=64)
    return tuple({0: batch} for _ in inputs)


@torch.no_grad()
def check(graph, model, inputs, sizes=(3,), atol=1e-5):
    """The graph gives the numbers of the model, in batches of these sizes."""
    for size in sizes:
        rows = torch.arange(size) % 3
        given = tuple(x[rows] for x in inputs)
        torch.testing.assert_close(graph(*given), model(*given), atol=atol, rtol=10 * atol)


@some("mae", "stretched positions", "uniformerv2", "text", "joint clip", "caption decoder",
      "fusion")
def test_a_network_exported_for_any_batch_gives_its_own_numbers(name):
    """It is exported before its first forward pass, so nothing of the trace may stay in it."""
    model, inputs = network(name)
    program = torch.export.export(model, inputs, dynamic_shapes=any_batch(inputs))
    check(program.module(), model, inputs, sizes=(3, 1, 5))
    fresh, _ = network(name)
    check(fresh, model, inputs)


def test_an_exported_autoencoder_takes_masks_with_another_share_hidden():
    model, (video, hidden) = network("mae")
    graph = torch.export.export(model, (video, hidden)).module()
    check(graph, model, (video, mae.tube_mask(3, (2, 4, 4), 0.8)))


@some("masked classifier", "text")
def test_a_network_exported_for_one_batch_size_gives_its_own_numbers(name):
    model, inputs = network(name)
    check(torch.export.export(model, inputs).module(), model, inputs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NETWORKS)
def test_a_traced_network_gives_its_own_numbers_for_any_batch(name):
    model, inputs = network(name)
    check(torch.jit.trace(model, inputs), model, inputs, sizes=(3, 1, 5))


@some("text")
def test_a_whole_network_compiles_without_a_graph_break(name):
    """fullgraph: a break is an exception. The graph runs as it is; only tracing costs."""
    model, inputs = network(name)
    torch._dynamo.reset()
    check(torch.compile(model, fullgraph=True, backend="eager"), model, inputs, sizes=(3, 2))
    torch._dynamo.reset()


@some()
def test_a_network_as_onnx_gives_its_own_numbers_for_any_batch(name, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, inputs = network(name)
    program = torch.onnx.export(model, inputs, dynamo=True, dynamic_shapes=any_batch(inputs),
                                verbose=False)
    program.save(tmp_path / "network.onnx")
    session = runtime.InferenceSession(tmp_path / "network.onnx")

    def run(*given):
        names = [place.name for place in session.get_inputs()]
        out = [torch.as_tensor(x) for x in session.run(None, {
            key: value.numpy() for key, value in zip(names, given)})]
        return out[0] if len(out) == 1 else tuple(out)
    check(run, model, inputs, sizes=(3, 1, 5), atol=1e-4)
