"""What is proved about tasks/localisation.py, and the long videos of video/moving_shapes.py:

precision, soft-NMS, targets and both losses by numbers derived here; the head gives in pieces what
it gives for the whole, and is not disturbed by padding; streamed features are those of
tools/extract.py; it learns; long videos rest before and after each motion.
"""

import dataclasses
import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

import mae
import uniformerv2
from tasks import localisation
from tasks.localisation import Head, mean_average_precision, soft_nms
from test_train import write_video
from video import moving_shapes
from video.decoding import Video

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))


def segments(*rows):
    """Segments (n, 4)."""
    return np.array(rows, float).reshape(-1, 4)


def test_average_precision_by_hand():
    truth = [[(0, 10, 0), (20, 30, 0)], [(0, 10, 0)]]
    found = [segments((0, 10, 0.9, 0), (1, 10, 0.8, 0), (20, 26, 0.6, 0)),
             segments((5, 15, 0.7, 0), (0, 10, 0.5, 0))]
    # In descending order of score: IoU 1; 0.9 with a segment that is matched already; 5 / 15; 0.6;
    # 1 with one that is matched at 0.3 only.
    # At 0.3 right are 1 0 1 1 0: precision 1, 1/2, 2/3, 3/4, 3/5, at or beyond each hit at best 1,
    # 3/4, 3/4.
    # At 0.5 right are 1 0 0 1 1: at best 1, 3/5, 3/5. At 0.7 right are 1 0 0 0 1: at best 1, 2/5.
    values = mean_average_precision(truth, found, (0.3, 0.5, 0.7))
    assert values == pytest.approx({0.3: 2.5 / 3, 0.5: 2.2 / 3, 0.7: 1.4 / 3})
    # A class that is never found halves the mean; one that never occurs does not count.
    truth[0].append((3, 4, 1))
    found[1] = np.concatenate([found[1], segments((3, 4, 1, 2))])
    assert mean_average_precision(truth, found, (0.5,)) == pytest.approx({0.5: 1.1 / 3})


def test_a_segment_whose_best_match_is_taken_may_find_the_next_best():
    truth = [[(0, 10, 0), (2, 12, 0)]]
    # the second overlaps the first by 0.9 and the other by 8 / 11
    found = [segments((0, 10, 0.9, 0), (1, 10, 0.8, 0))]
    assert mean_average_precision(truth, found, (0.7, 0.75)) == pytest.approx({0.7: 1.0, 0.75: 0.5})
    assert mean_average_precision([[(0, 1, 0)]], [segments()], (0.5,)) == {0.5: 0.0}


def test_soft_nms_by_hand():
    found = soft_nms(segments((0, 4, 0.9, 0), (0, 2, 0.8, 0), (0, 2, 0.7, 1), (4, 8, 0.3, 0)),
                     sigma=0.5)
    # IoU 1/2 with the best of its class: exp(-(1/4) / 0.5). Another class, or mere touching, costs
    # nothing.
    assert found.tolist() == [[0, 4, 0.9, 0], [0, 2, 0.7, 1],
                              [0, 2, pytest.approx(0.8 * math.exp(-0.5)), 0], [4, 8, 0.3, 0]]


def test_the_clearest_segments_overlap_no_better_one_by_half():
    # IoU 3/5, 1/8; too low a score
    found = segments((0, 4, 0.9, 0), (1, 5, 0.8, 1), (3, 8, 0.5, 0), (10, 11, 0.1, 0))
    assert localisation.clearest(found).tolist() == [[0, 4, 0.9, 0], [3, 8, 0.5, 0]]


def test_groups_that_do_not_overlap_are_treated_as_all_at_once():
    rng = np.random.default_rng(0)
    start = rng.uniform(0, 100, 120)
    candidates = np.stack([start, start + rng.uniform(0.5, 6, 120), rng.uniform(0.01, 1, 120),
                           np.zeros(120)], axis=1)
    waiting, expected = candidates.copy(), []
    while len(waiting) and waiting[:, 2].max() > 0.05:
        best = waiting[waiting[:, 2].argmax()].copy()
        expected.append(best)
        waiting = np.delete(waiting, waiting[:, 2].argmax(), axis=0)
        waiting[:, 2] *= np.exp(-localisation.iou(best[None], waiting)[0] ** 2 / 0.5)
    assert np.allclose(soft_nms(candidates, least=0.05), np.stack(expected))
    assert len(expected) < 120


def test_the_middle_of_a_segment_answers_for_it_and_the_shortest_wins():
    labels, distances = localisation.assign(10, [(2, 6, 3), (3.6, 4.4, 1), (7.3, 7.5, 2)],
                                            middle=0.5)
    assert labels.tolist() == [-1, -1, -1, 3, 1, 3, -1, 2, -1, -1]
    assert torch.allclose(distances[[3, 4, 5, 7]],
                          torch.tensor([[1.0, 3], [0.4, 0.4], [3, 1], [0, 0.5]]), atol=1e-6)


def test_the_distance_iou_loss_by_hand():
    found, wanted = torch.tensor([[1.0, 1], [2, 3]]), torch.tensor([[2.0, 0], [2, 3]])
    # [-1, 1] and [-2, 0]: 1 of 3 shared, centres 1 apart in a hull of 3. The others are the same.
    losses = localisation.distance_iou_loss(found, wanted).tolist()
    assert losses == pytest.approx([1 - 1 / 3 + 1 / 9, 0])
    # [2, 3] against [-1, 1]: nothing shared, yet a slope
    apart = torch.tensor([[-2.0, 3.0]], requires_grad=True)
    localisation.distance_iou_loss(apart, torch.tensor([[1.0, 1]])).sum().backward()
    assert apart.grad.abs().min() > 0


def test_the_focal_loss_by_hand_and_by_torchvision():
    logit = torch.tensor([math.log(9.0)])  # probability 0.9
    assert float(localisation.focal_loss(logit, torch.ones(1))) == pytest.approx(
        -0.25 * 0.1**2 * math.log(0.9), rel=1e-4)
    logits, target = torch.randn(4, 5), (torch.rand(4, 5) > 0.5).float()
    assert torch.allclose(localisation.focal_loss(logits, target),
                          torchvision.ops.sigmoid_focal_loss(logits, target), atol=1e-6)


@pytest.fixture
def head():
    head = Head(6, 3, width=16).eval()
    torch.nn.init.normal_(head.score.bias)
    head.measure(torch.randn(50, 6) + 2)
    return head


@torch.no_grad()
@pytest.mark.parametrize("count, chunk, pieces",
                         [(137, 20, (1, 7, 30)), (137, 64, (64,)), (5, 20, (2,)), (20, 20, (20,))])
def test_in_pieces_the_head_gives_what_it_gives_for_the_whole(head, count, chunk, pieces):
    features = torch.randn(count, 6) + 2
    whole = head(features[None])
    sizes, given = itertools.cycle(pieces), iter(features.split(1))
    parts = iter(lambda: torch.cat(list(itertools.islice(given, next(sizes))) or [features[:0]]),
                 None)
    parts = itertools.takewhile(len, parts)
    seen = []
    head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    found = list(localisation.stream(head, parts, chunk))
    assert [first for first, *_ in found] == list(range(0, count, chunk))
    assert torch.allclose(torch.cat([scores for _, scores, _ in found]), whole[0][0].sigmoid(),
                          atol=1e-6)
    assert torch.allclose(torch.cat([distances for *_, distances in found]), whole[1][0], rtol=1e-4)
    assert max(seen) <= chunk + 2 * head.margin


@torch.no_grad()
def test_an_answer_depends_on_margin_steps_and_padding_looks_like_the_end(head):
    features = torch.randn(1, 80, 6)
    before = head(features)[0]
    changed = features.clone()
    changed[0, 40] += 1
    moved = (head(changed)[0] != before).any(dim=2)[0].nonzero()[:, 0]
    assert moved.min() >= 40 - head.margin and moved.max() <= 40 + head.margin
    padded = torch.cat([features, torch.randn(1, 30, 6)], dim=1)
    inside = torch.arange(110)[None] < 80
    for alone, with_padding in zip(head(features), head(padded, inside)):
        assert torch.allclose(alone, with_padding[:, :80], atol=1e-5)


def test_windows_slide_and_a_short_video_repeats_its_last_frame():
    frames = [np.full((1, 1, 3), i, np.uint8) for i in range(10)]

    def numbers(frames):
        return [window[:, 0, 0, 0].tolist() for window in localisation.windows(frames, 4, 3)]

    assert numbers(frames) == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    assert numbers(frames[:2]) == [[0, 1, 1, 1]]
    assert localisation.step_times(np.arange(10) / 2, 4, 3).tolist() == [0.75, 2.25, 3.75]
    assert localisation.step_times([0.0, 0.5], 4, 3).tolist() == [0.25]


@pytest.mark.parametrize("frames, stride", [(23, 3), (23, 6), (2, 4)])
@pytest.mark.parametrize("make", [
    lambda: mae.VideoClassifier("tiny", classes=2, frames=4, image_size=32),
    lambda: uniformerv2.UniFormerV2(uniformerv2.Size(24, 2, 2, 48, 8, 32), classes=2, frames=4)])
def test_streamed_features_and_times_are_those_of_extract(tmp_path, make, frames, stride):
    import extract
    write_video(tmp_path / "a.mp4", frames=frames)
    encoder = make().eval()
    with Video(tmp_path / "a.mp4") as video:
        feats, times = extract.extract(encoder, video, stride, "all", 4, "cpu")
        played = video.play(encoder.config["image_size"])
        streamed = torch.cat(list(localisation.slide(encoder, played, stride, 3)))
        assert np.allclose(streamed.numpy(), feats, atol=1e-5)
        assert np.allclose(localisation.step_times(video.info.timestamps, 4, stride), times)


def test_every_frame_is_played_once_and_equals_the_one_that_is_read(tmp_path):
    write_video(tmp_path / "a.mp4", frames=30)
    with Video(tmp_path / "a.mp4") as video:
        assert (np.stack(list(video.play(32))) == video.read(np.arange(30), 32)).all()


def test_steps_and_seconds_translate_into_each_other():
    times = np.array([1.0, 2.0, 4.0])
    knots = localisation.clock(times)
    seconds = np.interp([0.5, 1.5, 3, -1], *knots)
    assert seconds.tolist() == pytest.approx([1.5, 3, 5.5, -0.5], abs=1e-6)
    steps = np.interp([0.2, 3.3, 7], *knots[::-1])
    assert np.interp(steps, *knots).tolist() == pytest.approx([0.2, 3.3, 7], abs=1e-6)
    found = localisation.in_seconds(segments((-4, 1, 0.5, 0), (5, 9, 0.5, 0)), times, 5.0)
    assert found.tolist() == [[0, 2, 0.5, 0]]  # the second lies beyond the end


def test_mean_segments_by_hand():
    truth = [[(0, 2, 1), (5, 6, 1)], [(8, 12, 0), (2, 4, 1)]]
    mean = localisation.MeanSegments(truth, [10, 20])
    # First segments at 0 to 0.2 and 0.1 to 0.2 of the duration, second ones at 0.5 to 0.6 and 0.4
    # to 0.6.
    expected = segments((5, 20, 0.75, 1), (5, 20, 0.25, 0), (45, 60, 0.75, 1), (45, 60, 0.25, 0))
    assert mean(100) == pytest.approx(expected)


def test_the_head_learns_to_find_what_the_features_tell():
    rng = np.random.default_rng(0)

    def make():
        start, label = rng.integers(5, 25), int(rng.integers(3))
        segment = (float(start), float(start + rng.integers(6, 14)), label)
        features = torch.from_numpy(rng.normal(0, 0.3, (50, 6))).float()
        features[start:int(segment[1]) + 1, label] += 2
        return features, segment

    torch.manual_seed(0)
    videos, held_out = [make() for _ in range(48)], [make() for _ in range(24)]
    head = Head(6, 3, width=32, depth=3, drop=0.0)
    optimiser = torch.optim.AdamW(head.parameters(), lr=5e-3)
    inside = torch.ones(16, 50, dtype=torch.bool)
    for step in range(90):
        batch = [videos[i] for i in rng.integers(48, size=16)]
        labels, wanted = map(torch.stack,
                             zip(*(localisation.assign(50, [segment]) for _, segment in batch)))
        loss = sum(localisation.head_loss(*head(torch.stack([features for features, _ in batch])),
                                          labels, wanted, inside))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    head.eval()
    with torch.no_grad():
        answers = [head(features[None]) for features, _ in held_out]
    found = [soft_nms(localisation.decode(scores[0].sigmoid(), distances[0]))
             for scores, distances in answers]
    truth = [[segment] for _, segment in held_out]
    mean = localisation.MeanSegments([[segment] for _, segment in videos], [50] * 48)
    assert mean_average_precision(truth, found, (0.7,))[0.7] > 0.8
    assert mean_average_precision(truth, [mean(50)] * 24, (0.7,))[0.7] < 0.4


# ------------------------------------------------------------------------------------------------
# The long videos


def test_a_long_video_is_a_function_of_its_number_and_its_motions_lie_within_stillness():
    world = moving_shapes.LongShapes("train", 16)
    item, again = world[3], moving_shapes.LongShapes("train", 16)[3]
    assert (item["video"] == again["video"]).all() and item["segments"] == again["segments"]
    assert item["duration"] == len(item["video"]) / world.FPS and len(world.motions) == 14
    ends = [0.0, *(second for start, end, _ in item["segments"] for second in (start, end)),
            item["duration"]]
    assert ends == sorted(ends) and all(a < b for a, b in zip(ends, ends[1:]))
    for scene, (start, end, label) in zip(world.scenes(3), item["segments"]):
        assert scene.motion == world.motions[label] and scene.motion not in ("appear", "vanish")
        before, after = scene.rest
        assert len(scene.noise) - before - after == round((end - start) * world.FPS)
        # Without the camera's trembling, drift and noise, the picture changes in the motion alone.
        calm = dataclasses.replace(scene, drift=0 * scene.drift, shake=0 * scene.shake,
                                   noise=0 * scene.noise)
        changes = (np.diff(moving_shapes.render(calm).astype(int), axis=0) != 0).any(axis=(1, 2, 3))
        assert not changes[:before].any() and not changes[len(changes) - after:].any()
        assert changes[before:len(changes) - after].mean() > 0.9
        assert (moving_shapes.render(scene.reversed()) == moving_shapes.render(scene)[::-1]).all()


def test_a_world_shows_only_the_motions_it_is_told_to():
    world = moving_shapes.MovingShapes("val", 2, 16)
    usual = [world.scene(i).motion for i in range(40)]
    few = moving_shapes.MovingShapes("val", 2, 16).only("motion", ("grow", "left"))
    assert {few.scene(i).motion for i in range(40)} == {"grow", "left"} < set(usual)
    shown = [i for i, motion in enumerate(usual) if motion in ("grow", "left")]
    assert all(few.scene(i).motion == usual[i] for i in shown)
    assert few[0]["labels"]["motion"] == ("grow", "left").index(few.scene(0).motion)
