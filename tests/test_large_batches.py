"""What is proved about engine/large_batches.py: each form has the value and the gradients of its
plain form, over two processes and under autocast, too; pieces keep no activations and draw what the
whole batch draws."""

import functools

import pytest
import torch

import attention
from caption_decoder import caption_loss
from clip_video import VideoCLIP, contrastive_loss
from engine.large_batches import chunked_caption_loss, in_pieces
from engine.processes import gather_with_gradient
from test_caption_decoder import make, sentences
from test_clip_video import IDS, clip, close, load_internvideo, viclip_state


CAPTIONS = torch.tensor([0, 1, 2, 0, 3, 0, 1, 5, 6, 7, 8])
CLIPS = torch.tensor([0, 1, 2, 3, 0, 4, 1, 1, 5, 6, 7])


@pytest.mark.parametrize("targets", [None, CAPTIONS, torch.stack([CAPTIONS, CLIPS], dim=1)])
@pytest.mark.parametrize("rows", [1, 4, 11, 64])
def test_in_blocks_the_loss_and_its_gradients_are_the_same(rows, targets):
    """To rounding in float64, the scale's gradient included."""
    found = []
    for loss_of in (contrastive_loss, functools.partial(contrastive_loss, rows=rows)):
        torch.manual_seed(1)
        video, text = (torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
                       for _ in range(2))
        scale = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
        loss = loss_of(video, text, scale, targets=targets)
        (3 * loss).backward()
        found.append((loss.detach(), video.grad, text.grad, scale.grad))
    for a, b in zip(*found):
        assert (a - b).abs().max() < 1e-12


def test_under_autocast_the_blocked_loss_stays_in_float32():
    """bfloat16 has 8 bits: logits up to 100 would be off by 0.4."""
    video = torch.randn(6, 16).bfloat16().requires_grad_()
    text, scale = torch.randn(6, 16).bfloat16(), torch.tensor(4.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = contrastive_loss(video, text, scale, rows=2)
        loss.backward()
    assert loss.dtype == torch.float32
    close(loss.detach(), contrastive_loss(video.detach().float(), text.float(), scale), atol=1e-5)


def two_processes(rank, folder, world):
    """One of `world` processes: its third of the batch, its gradients, averaged as data parallel
    does."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank,
                                         world_size=world)
    towers, video, text, targets, scale = distributed_case()
    mine = slice(3 * rank, 3 * rank + 3)
    found = []
    for shared in (None, targets[mine], in_two_ways(targets)[mine]):
        for loss_of in (contrastive_loss, functools.partial(contrastive_loss, rows=2)):
            loss = loss_of(towers[0](video[mine]), towers[1](text[mine]), scale, targets=shared,
                           gather=True)
            parameters = [*towers.parameters(), scale]
            grads = torch.autograd.grad(loss, parameters)
            for grad in grads:
                torch.distributed.all_reduce(grad)
            found.append([loss.detach()] + [grad / world for grad in grads])
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def in_two_ways(targets):
    """(6, 2): the numbers of captions, and those of clips."""
    return torch.stack([targets, torch.tensor([0, 0, 3, 2, 3, 4])], dim=1)


def distributed_case():
    torch.manual_seed(3)
    towers = torch.nn.ModuleList([torch.nn.Linear(5, 4), torch.nn.Linear(7, 4)])
    scale = torch.nn.Parameter(torch.tensor(1.2))
    return towers, torch.randn(6, 5), torch.randn(6, 7), torch.tensor([0, 1, 2, 1, 0, 5]), scale


def test_two_processes_have_the_loss_and_gradients_of_one(tmp_path):
    """Negatives are global, and the gradient flows back through the gathering."""
    torch.multiprocessing.spawn(two_processes, (str(tmp_path), 2), nprocs=2)
    towers, video, text, targets, scale = distributed_case()
    both = in_two_ways(targets)
    for i, shared in enumerate((None, None, targets, targets, both, both)):
        loss = contrastive_loss(towers[0](video), towers[1](text), scale, targets=shared)
        expected = [loss.detach(), *torch.autograd.grad(loss, [*towers.parameters(), scale])]
        for rank in range(2):
            for a, b in zip(torch.load(tmp_path / f"{rank}.pt")[i], expected):
                assert (a - b).abs().max() < 1e-6
    x = torch.randn(3)
    assert gather_with_gradient(x) is x                                      # alone


def steps_of(model):
    """Both encoders, and the question."""
    return lambda v, t: model(v, t)[:2], lambda v, t: contrastive_loss(v, t, model.logit_scale)


def test_a_batch_in_cached_pieces_has_the_gradients_of_the_whole():
    """GradCache: with towers that draw nothing, equal to one large batch within rounding."""
    found = []
    for size in (None, 2, 7):
        model = load_internvideo().double()
        video, ids = clip(5).double(), (torch.arange(50).view(5, 10) * 7) % 48
        encode, question = steps_of(model)
        loss = question(*(encode(video, ids) if size is None
                          else in_pieces(encode, size, video, ids)))
        loss.backward()
        found.append([loss.detach()] + [p.grad for p in model.parameters() if p.grad is not None])
    for other in found[1:]:
        assert len(other) == len(found[0]) > 40
        for a, b in zip(found[0], other):
            assert (a - b).abs().max() < 1e-10


def test_cached_pieces_see_the_random_numbers_of_the_whole_batch_both_times():
    """Else the gradients would belong to other masks, and be those of another batch."""
    found = []
    for cached in (False, True):
        model = VideoCLIP.from_official(viclip_state()).train()
        drop_video, drop_text = attention.Dropout(0.5), attention.Dropout(0.5)
        torch.manual_seed(5)
        video, ids, loss = clip(4), IDS.repeat(2, 1), steps_of(model)[1]

        def encode(v, t):
            return drop_video(model.encode_video(v)), drop_text(model.encode_text(t))  # noqa: B023

        value = loss(*(in_pieces(encode, 2, video, ids) if cached else encode(video, ids)))
        value.backward()
        found.append((value.detach(), model.visual.times.grad, model.text.embed.weight.grad,
                      torch.rand(2)))
    for a, b in zip(*found):
        close(a, b, atol=1e-5)


def test_cached_pieces_keep_no_activations():
    model = load_internvideo()
    encode, _ = steps_of(model)
    kept = []

    def bytes_kept(run):
        kept.append(0)

        def pack(x):
            kept[-1] += x.nbytes
            return x
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            return run()

    video, ids = clip(4), IDS.repeat(2, 1)
    bytes_kept(lambda: encode(video, ids))
    bytes_kept(lambda: in_pieces(encode, 1, video, ids))
    assert kept[1] < kept[0] / 5


def test_a_frozen_text_encoder_is_no_obstacle_to_cached_pieces():
    model = VideoCLIP.from_official(viclip_state())
    model.text.requires_grad_(False)
    encode, question = steps_of(model)
    question(*in_pieces(encode, 1, clip(2), IDS)).backward()
    assert model.visual.times.grad is not None and model.text.positions.grad is None


def test_under_autocast_cached_pieces_still_teach_every_weight():
    """Autocast keeps its bfloat16 copies of weights; those of a pass without a graph have no way
    back."""
    model = VideoCLIP.from_official(viclip_state())
    encode, question = steps_of(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = question(*in_pieces(encode, 1, clip(2), IDS))
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("rows", [1, 4, 1000])
def test_chunked_loss_is_the_plain_loss_with_its_gradients(rows):
    """One row of the batch is padding throughout, and the chunks do not divide the words."""
    decoder, tower, _ = make()
    ids, is_text = sentences()
    is_text[1] = False
    results = []
    for chunked in (False, True):
        decoder.zero_grad()
        visual = torch.randn(3, 15, 24, dtype=torch.float64,
                             generator=torch.Generator().manual_seed(2)).requires_grad_()
        hidden = decoder.hidden(visual, tower(ids)[:, :-1])
        loss = chunked_caption_loss(decoder, hidden, ids, is_text, rows=rows) if chunked else \
            caption_loss(decoder.logits(hidden), ids, is_text)
        (3 * loss).backward()
        results.append([loss.detach(), visual.grad]
                       + [p.grad.clone() for p in decoder.parameters()])
    for plain, chunked in zip(*results):
        torch.testing.assert_close(chunked, plain, atol=1e-12, rtol=1e-12)


def test_a_batch_without_words_costs_nothing():
    decoder, tower, visual = make()
    ids = torch.zeros(2, 5, dtype=torch.long)
    hidden = decoder.hidden(visual, tower(ids)[:, :-1])
    loss = chunked_caption_loss(decoder, hidden, ids, ids != 0)
    loss.backward()
    assert loss == 0 and not decoder.vocabulary.weight.grad.any()
    assert caption_loss(decoder.logits(hidden), ids, ids != 0) == 0


def test_under_bfloat16_autocast_both_losses_are_float32_and_agree():
    decoder, tower, visual = make(vocabulary=300)
    decoder, tower, visual = decoder.float(), tower.float(), visual.float()
    ids, is_text = sentences(300, batch=2)
    grads = []
    for chunked in (False, True):
        decoder.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = decoder.hidden(visual, tower(ids)[:, :-1])
            loss = chunked_caption_loss(decoder, hidden, ids, is_text) if chunked else \
                caption_loss(decoder.logits(hidden), ids, is_text)
        loss.backward()
        grads.append((loss.detach(), decoder.vocabulary.weight.grad.clone()))
    assert grads[0][0].dtype == grads[1][0].dtype == torch.float32
    torch.testing.assert_close(grads[1][0], grads[0][0], rtol=1e-4, atol=0)
    assert (grads[1][1] - grads[0][1]).norm() < 0.01 * grads[0][1].norm()
