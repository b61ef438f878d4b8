"""What moving_shapes.py promises, in this order.

1. The generated world is deterministic, endless, and blind to the direction of time.
2. Some pairs of shape and colour are for the compositional test alone.
3. A caption states the facts of its clip, and nothing else.
"""

import dataclasses
import itertools

import numpy as np
import pytest

from video import moving_shapes
from video.annotations import DataError
from video.moving_shapes import COLOURS, MOTIONS, MovingShapes, render


# ------------------------------------------------------------------------- the generated world


def test_the_same_index_is_the_same_clip_in_any_order_and_any_instance():
    one, two = MovingShapes("train", 4, 32), MovingShapes("train", 4, 32)
    first = {i: one[i] for i in (0, 7, 123456789)}
    for i in (123456789, 0, 7, 0):
        again = two[i]
        assert np.array_equal(again["video"], first[i]["video"])
        assert (again["labels"], again["caption"]) == (first[i]["labels"], first[i]["caption"])


@pytest.mark.parametrize("other", [dict(split="val"), dict(split="test"), dict(seed=1)])
def test_each_split_and_seed_is_its_own_stream(other):
    one = MovingShapes("train", 2, 32)
    two = MovingShapes(**{"split": "train", **other}, frames=2, size=32)
    assert not any(np.array_equal(one[i]["video"], two[i]["video"]) for i in range(10))


@pytest.mark.parametrize("frames, size", [(1, 32), (7, (24, 56)), (16, 64), (3, (50, 17))])
def test_any_length_and_any_size_can_be_rendered(frames, size):
    height, width = (size, size) if isinstance(size, int) else size
    world = MovingShapes("val", frames, size)
    for i in range(20):
        video = world[i]["video"]
        assert video.shape == (frames, height, width, 3) and video.dtype == np.uint8


def scenes_of_every_motion(**kwargs):
    world = MovingShapes("train", **kwargs)
    scenes = {}
    for i in itertools.count():
        scene = world.scene(i)
        scenes.setdefault(scene.motion, scene)
        if len(scenes) == len(MOTIONS):
            return world, scenes


@pytest.mark.parametrize("frames, size", [(16, 64), (7, (40, 48)), (1, 32)])
def test_a_clip_played_backwards_is_a_clip_of_its_twin_bit_for_bit(frames, size):
    """Together with the next test: no model that ignores frame order can beat 50 % in a pair."""
    world, scenes = scenes_of_every_motion(frames=frames, size=size)
    for motion, scene in scenes.items():
        twin = scene.reversed()
        assert MOTIONS.index(twin.motion) == world.twin[MOTIONS.index(motion)]
        assert np.array_equal(render(twin), render(scene)[::-1])
        assert np.array_equal(render(twin.reversed()), render(scene))


@pytest.mark.parametrize("frames", [1, 2, 7, 16, 49])
def test_twins_pass_through_the_same_phases_to_the_last_bit(frames):
    """1 - phase would differ from the flipped phase in the last bit, which 8-bit pixels mostly
    hide, but not always."""
    scene = MovingShapes("train", frames, 32).scene(0)
    assert np.array_equal(scene.reversed().phase, scene.phase[::-1])


def test_nothing_drawn_knows_the_direction_of_time():
    """Every quantity that reversal changes has a symmetric distribution, and none that it keeps
    depends on `forward`. Means over many scenes, in standard errors."""
    world = MovingShapes("train", 6, 32)
    scenes = [world.scene(i) for i in range(4000)]
    forward = np.array([scene.forward for scene in scenes])

    def standard_errors(values):
        return abs(np.mean(values)) / (np.std(values) / len(values) ** 0.5)

    assert standard_errors(forward - 0.5) < 4
    odd = {  # change sign when time is reversed
        "drift down": [s.drift[-1, 0] - s.drift[0, 0] for s in scenes],
        "drift across": [s.drift[-1, 1] - s.drift[0, 1] for s in scenes],
        "shake": [s.shake[-1, 0] - s.shake[0, 0] for s in scenes],
        "noise": [float(s.noise[-1] - s.noise[0]) for s in scenes],
    }
    even = {  # stay as they are
        "row": [s.centre[0] for s in scenes], "angle": [s.angle for s in scenes],
        "radius": [s.radius for s in scenes], "extent": [s.extent / (s.pair + 1) for s in scenes],
        "distractors": [len(s.distractors) for s in scenes],
        "speed": [np.abs(s.drift[-1] - s.drift[0]).sum() for s in scenes],
        "drift start": [s.drift.mean() for s in scenes],
    }
    sign = np.where(forward, 1.0, -1.0)
    for name, values in odd.items():
        values = np.array(values, float)
        assert standard_errors(values) < 4, name
        # A true clip of the first motion and a reversed clip of the second look alike here too.
        assert standard_errors(values * sign) < 4, name
    for name, values in even.items():
        values = np.array(values, float)
        assert standard_errors((values - values.mean()) * sign) < 4, name


def test_drift_reversed_is_the_drift_of_the_opposite_course():
    """Rounding to pixels must not break the symmetry of the prior: steps of both kinds occur
    equally often at equal places, so the multiset of (step, place in clip) is its own mirror."""
    world = MovingShapes("train", 5, 32)
    steps = np.stack([np.diff(world.scene(i).drift, axis=0) for i in range(3000)])  # (n, T - 1, 2)
    spread = steps.std(0) / len(steps) ** 0.5
    assert (np.abs(steps.mean(0) + steps[:, ::-1].mean(0)) < 5 * spread).all()
    assert (np.abs(np.abs(steps).mean(0) - np.abs(steps[:, ::-1]).mean(0)) < 5 * spread).all()


def test_a_motion_spans_the_whole_clip_whatever_its_length():
    """Between 2 and 32 frames, the shape covers a share of the path that only misses its ends."""
    for frames in (2, 8, 32):
        _, scenes = scenes_of_every_motion(frames=frames, size=64)
        state, = moving_shapes._states(scenes["right"])
        covered = state["column"][-1] - state["column"][0]
        assert covered == pytest.approx(scenes["right"].extent * (1 - 1 / frames))


def test_the_direction_on_the_screen_is_the_one_in_the_label():
    """Measured from pixels, without the renderer's own numbers: where has the colour gone?"""
    _, scenes = scenes_of_every_motion(frames=9, size=64)

    def coloured(scene):  # (T, H, W), True = has the colour of the shape
        # three quarters of a full exposure
        even = render(dataclasses.replace(scene, light=(0.0, 0.0)))
        return np.abs(even - 0.75 * np.array(moving_shapes.COLOURS[scene.colour])).sum(-1) < 45

    def coloured_centre(scene):
        return np.array([np.argwhere(frame).mean(0) for frame in coloured(scene)])

    for motion, axis, sign in [("right", 1, 1), ("left", 1, -1), ("down", 0, 1), ("up", 0, -1)]:
        path = coloured_centre(scenes[motion])
        assert sign * (path[-1] - path[0])[axis] > 15, motion
    for motion, sign in [("orbit clockwise", 1), ("orbit counter-clockwise", -1)]:
        steps = np.diff(coloured_centre(scenes[motion]), axis=0)
        # Clockwise on a screen, where rows grow downwards, is a turn from columns to rows.
        turns = steps[:-1, 1] * steps[1:, 0] - steps[:-1, 0] * steps[1:, 1]
        assert sign * turns.sum() > 0, motion
    for rising, falling in (("grow", "shrink"), ("appear", "vanish"), ("brighten", "darken")):
        first, *_, last = coloured(scenes[rising]).sum((1, 2))
        assert last > 1.8 * first, rising
        first, *_, last = coloured(scenes[falling]).sum((1, 2))
        assert first > 1.8 * last, falling


def test_pixel_noise_is_light_and_never_wraps_around(monkeypatch):
    """Noise is added modulo 256, so a colour too near 0 or 255 would flash."""
    world, by_motion = scenes_of_every_motion(frames=24, size=32)
    darkest = by_motion["darken"]
    darkening = [i for i in range(1000) if world.scene(i).motion in ("brighten", "darken")]
    scenes = [dataclasses.replace(darkest, colour=colour, radius=14.0, centre=(15, 15),
                                  extent=min(world.scene(i).extent for i in darkening))
              for colour in COLOURS]
    scenes += by_motion.values()
    noisy = [render(scene).astype(int) for scene in scenes]
    monkeypatch.setattr(moving_shapes, "_noise_bank",
                        lambda n: np.zeros(moving_shapes._NOISE_STARTS + n, np.uint8))
    difference = np.stack(noisy) - np.stack([render(scene) for scene in scenes])
    assert np.abs(difference).max() <= 8 and 0.9 < difference.std() < 1.2


def test_the_background_has_more_contrast_than_the_noise():
    """Inside a patch of 8 x 8 pixels too: what a masked autoencoder must paint is no noise."""
    world = MovingShapes("train", 1, 64)
    frames = np.stack([world[i]["video"][0] for i in range(60)]).astype(float).mean(-1)
    patches = frames.reshape(60, 8, 8, 8, 8).swapaxes(2, 3).reshape(60, 64, 64)
    assert 3 < np.median(patches.std(-1)) < 9 and 20 < np.mean(frames.std((1, 2))) < 50


def test_held_out_pairs_occur_in_the_unseen_split_and_nowhere_else():
    def looks(split):
        world = MovingShapes(split, 1, 16)
        return {(s.shape, s.colour) for s in map(world.scene, range(600))}
    held = set(moving_shapes.HELD_OUT_PAIRS)
    assert len(held) == 8 == len({colour for _, colour in held})
    assert looks("unseen") == held
    for split in ("train", "val", "test"):
        seen = looks(split)
        assert not seen & held and len(seen) == 6 * 8 - 8
    assert {s for s, _ in seen} == set(moving_shapes.SHAPES)
    assert {c for _, c in seen} == set(moving_shapes.COLOURS)


@pytest.mark.parametrize("wrong", [dict(split="dev"), dict(split="train", size=8),
                                   dict(split="train", frames=0), dict(split="train", seed=-1)])
def test_an_impossible_world_is_refused_in_one_line(wrong):
    with pytest.raises(DataError) as error:
        MovingShapes(**wrong)
    assert "\n" not in str(error.value)
    assert "split" not in wrong or wrong["split"] == "train" or "unseen" in str(error.value)


# -------------------------------------------------------------------------------------- captions


def test_every_caption_states_exactly_its_facts():
    # each with every motion, shape and size would say no more
    colours = itertools.cycle(moving_shapes.COLOURS)
    for motion, shape, size in itertools.product(moving_shapes.MOTIONS, moving_shapes.SHAPES,
                                                 moving_shapes.RADII):
        colour = next(colours)
        facts = dict(motion=motion, shape=shape, colour=colour, size=size)
        sizes = set()
        for sentence in moving_shapes.phrasings(facts):
            read = moving_shapes.parse_caption(sentence)
            sizes.add(read.pop("size", None))
            assert read == dict(motion=motion, shape=shape, colour=colour), sentence
        assert sizes == ({None} if motion in ("grow", "shrink") else {None, size})


def test_no_phrase_of_one_motion_contains_a_phrase_of_another():
    for one, other in itertools.permutations(moving_shapes.MOTIONS, 2):
        for phrase, part in itertools.product(moving_shapes.MOTION_PHRASES[one],
                                              moving_shapes.MOTION_PHRASES[other]):
            assert f" {part} " not in f" {phrase} "


def test_facts_that_are_not_given_are_not_said():
    assert moving_shapes.parse_caption("a shape moves to the left") == {"motion": "left"}
    assert moving_shapes.parse_caption(
        "it spins counter - clockwise") == {"motion": "spin counter-clockwise"}
    assert "a shape moves to the left" in moving_shapes.phrasings({"motion": "left"})
    for sentence in moving_shapes.phrasings(dict(motion="up", colour="red")):
        assert moving_shapes.parse_caption(sentence) == dict(motion="up", colour="red")


@pytest.mark.parametrize("sentence, facts", [
    ("", {}), ("banana banana", {}), ("A RED, red circle!", dict(colour="red", shape="circle")),
    ("a red blue star that moves left moves right", dict(shape="star")),
    ("the two little crosses drift apart", dict(motion="part", size="small", shape="cross")),
])
def test_unknown_and_contradictory_words_yield_no_fact(sentence, facts):
    assert moving_shapes.parse_caption(sentence) == facts


def test_the_caption_of_a_clip_agrees_with_its_facts_and_label():
    world = MovingShapes("train", 1, 16)
    for i in range(100):
        item = world[i]
        assert item["facts"].items() >= moving_shapes.parse_caption(item["caption"]).items()
        assert all(names[item["labels"][question]] == item["facts"][question]
                   for question, names in world.classes.items())


def test_captions_may_keep_silent_about_the_motion():
    silent, half, full = (MovingShapes("train", 4, 32, motion_words=share)
                          for share in (0.0, 0.5, 1.0))
    captions = [moving_shapes.parse_caption(silent[i]["caption"]) for i in range(60)]
    assert all("motion" not in facts and {"shape", "colour"} <= set(facts) for facts in captions)
    named = sum("motion" in moving_shapes.parse_caption(half[i]["caption"]) for i in range(200))
    assert 70 < named < 130
    assert all((silent[i]["video"] == full[i]["video"]).all() for i in range(5))
