"""Clips to learn from: a generated world where only time tells, and a door to real video files.

Why. A video model is worth its cost only if it uses the order of frames, and real data hides
whether it does: Kinetics labels can often be guessed from one frame. So the generated world,
`MovingShapes`, comes in time-reversed twins. A clip of "left" played backwards *is* a clip of
"right", with exactly the same probability, so a model that ignores frame order scores 50 % within
a pair, however large it is. What it scores above that is what video adds. Captions are written
from the same facts as the pixels, so retrieval and captioning can be checked as well.

    rng(seed, split, index) -> Scene -> render -> (T, H, W, 3) uint8     `MovingShapes[index]`
                                 |
                                 +-> facts -> describe -> "a small red ring orbits clockwise"

    file -> probe -> indices -> read_clip -> crop -> (T, H, W, 3) uint8  `VideoFiles[index]`

The idea in steps.
1. `draw_scene` draws every quantity of a clip once, as numbers and per-frame arrays.
2. `Scene.reversed` flips the arrays: the twin. `render` is pure and treats each frame alone, so
   render(scene.reversed()) == render(scene)[::-1], bit for bit.
3. `describe` turns facts into a sentence and `parse_caption` turns any sentence back into facts.
4. `dense_indices` and `segment_indices` choose frames; `probe` and `read_clip` fetch them.
5. `batches` and `held_out` collate either source. Step k holds the same clips for any number of
   workers and after any resume, because each draw is a function of (seed, index). `normalise`
   makes of the bytes what a model takes.

Where we differ. The official loaders put *another random video* in place of a corrupt one, even in
evaluation (VideoMAE kinetics.py:118); here training names what it skipped, and evaluation never
substitutes. VideoMAE fine-tuning spreads 16 frames over 64 with spacing 64/15; we use the exact
stride of its pretraining. InternVideo's segment sampling never draws the last frame of a segment;
ours can. The test protocol of many views and RandAugment are left to the caller.

Numbers, one core: a generated clip of 16x64x64 takes about 1.2 ms (850 clips/s), of
16x224x224 about 7 ms. Sixteen frames at stride 4 of a 640x360 h264 file take 70 to 100 ms.

Try it:

>>> world = MovingShapes("train", frames=8, size=64)
>>> world[3]["video"].shape, world[3]["caption"]
((8, 64, 64, 3), 'in this clip a little cyan ring pops up')
>>> scene = world.scene(3)
>>> bool((render(scene.reversed()) == render(scene)[::-1]).all())
True
>>> segment_indices(100, 4)
array([12, 37, 62, 87])
"""

import csv
import dataclasses
import functools
import itertools
import json
import math
import operator
import os
import re
import signal
from pathlib import Path

import numpy as np
import torch
from torchvision.transforms import v2


class DataError(ValueError):
    """The user's data or request is at fault: one line with what, which file, and what to do."""


# ------------------------------------------------------------------ the generated world: words

PAIRS = (  # (a motion, the same motion played backwards); labels 2k and 2k + 1
    ("right", "left"),
    ("down", "up"),
    ("spin clockwise", "spin counter-clockwise"),
    ("orbit clockwise", "orbit counter-clockwise"),
    ("grow", "shrink"),
    ("appear", "vanish"),
    ("meet", "part"),
    ("brighten", "darken"),
)
MOTIONS = tuple(itertools.chain(*PAIRS))
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = {
    "red": (215, 35, 35),
    "orange": (240, 135, 35),
    "yellow": (240, 230, 50),
    "green": (35, 160, 50),
    "cyan": (60, 215, 220),
    "blue": (45, 75, 225),
    "purple": (135, 40, 175),
    "pink": (245, 150, 205),
}
RADII = {"small": 0.18, "large": 0.26}  # mean radius as a fraction of the short side
# The compositional test: colour number c is never seen in training with shape number c modulo 6.
HELD_OUT_PAIRS = tuple((SHAPES[c % len(SHAPES)], name) for c, name in enumerate(COLOURS))
SPLITS = ("train", "val", "test", "unseen")


def _phrases(verbs, endings):
    return tuple(f"{verb} {ending}" for verb in verbs for ending in endings)


_GO, _TURN = ("moves", "slides", "travels"), ("spins", "rotates", "turns")
_ROUND = ("orbits", "loops around", "travels around")
MOTION_PHRASES = {
    "right": _phrases(_GO, ("right", "to the right", "rightwards")),
    "left": _phrases(_GO, ("left", "to the left", "leftwards")),
    "down": _phrases(_GO, ("down", "downwards")) + ("sinks",),
    "up": _phrases(_GO, ("up", "upwards")) + ("rises",),
    "spin clockwise": _phrases(_TURN, ("clockwise",)),
    "spin counter-clockwise": _phrases(_TURN, ("counter-clockwise",)),
    "orbit clockwise": _phrases(_ROUND, ("clockwise",)),
    "orbit counter-clockwise": _phrases(_ROUND, ("counter-clockwise",)),
    "grow": ("grows", "gets bigger", "becomes larger", "expands"),
    "shrink": ("shrinks", "gets smaller", "becomes smaller", "contracts"),
    "appear": ("appears", "pops up", "shows up", "comes into view"),
    "vanish": ("vanishes", "disappears", "goes away", "drops out of view"),
    "meet": ("meet", "move together", "approach each other", "come closer"),
    "part": ("part", "move apart", "separate", "drift apart"),
    "brighten": ("brightens", "gets brighter", "becomes brighter", "lights up"),
    "darken": ("darkens", "gets darker", "becomes darker", "dims"),
}
SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
TEMPLATES = (
    "{it} {verb}", "{it} that {verb}", "we see {it} that {verb}", "in this clip {it} {verb}")
_PLURALS = {shape: shape + ("es" if shape == "cross" else "s") for shape in (*SHAPES, "shape")}
_VOCABULARY = {  # fact -> value -> every phrase that states it
    "motion": MOTION_PHRASES,
    "shape": {shape: (shape, _PLURALS[shape]) for shape in SHAPES},
    "colour": {colour: (colour,) for colour in COLOURS},
    "size": SIZE_WORDS,
}


def phrasings(facts):
    """Every sentence that `describe` may choose for these facts, as a list of str.

    facts   dict with "motion" and any of "shape", "colour", "size"; what is absent is not said
    """
    motion, colour = facts["motion"], facts.get("colour")
    sizes = ("",)  # for no mention; a growing thing is neither small nor large
    if "size" in facts and motion not in ("grow", "shrink"):
        sizes += SIZE_WORDS[facts["size"]]
    noun, determiners = facts.get("shape", "shape"), ("a", "the")
    if motion in ("meet", "part"):
        noun, determiners = _PLURALS[noun], ("two", "the two")
    sentences = []
    for determiner, size in itertools.product(determiners, sizes):
        words = [word for word in (size, colour, noun) if word]
        if determiner == "a" and words[0][0] in "aeiou":
            words.insert(0, "an")
        else:
            words.insert(0, determiner)
        for template, verb in itertools.product(TEMPLATES, MOTION_PHRASES[motion]):
            sentences.append(template.format(it=" ".join(words), verb=verb))
    return sentences


def describe(facts, rng):
    """One sentence about the facts, chosen among `phrasings(facts)` by a numpy Generator."""
    sentences = phrasings(facts)
    return sentences[rng.integers(len(sentences))]


def still(facts, frames, rng):
    """A frame of a clip with these facts, and a sentence that is true of that picture alone.

    returns  its number, drawn by a numpy Generator among those where the shape surely is to be seen,
             and a sentence like "a red star": of motion a single picture knows nothing
    """
    shape, colour, motion = facts["shape"], facts["colour"], facts["motion"]
    number = {"appear": frames - 1, "vanish": 0}.get(motion)
    number = int(rng.integers(frames)) if number is None else number
    if motion in ("meet", "part"):
        return number, f"two {colour} {_PLURALS[shape]}"
    return number, f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape}"


def parse_caption(sentence):
    """The facts that a sentence states: a dict with any of "motion", "shape", "colour", "size".

    A fact that is not mentioned, or mentioned with two different values, is absent. Words that no
    caption uses are ignored, so the output of an untrained caption model parses too.
    """
    joined = re.sub(r"\s*-\s*", "-", sentence.lower())  # CLIP's tokens decode to "counter - clockwise"
    text = f" {' '.join(re.findall(r'[a-z]+(?:-[a-z]+)*', joined))} "
    facts = {}
    for fact, values in _VOCABULARY.items():
        said = [value for value, words in values.items() if any(f" {w} " in text for w in words)]
        if len(said) == 1:
            facts[fact] = said[0]
    return facts


# ----------------------------------------------------------------- the generated world: pixels


@dataclasses.dataclass(frozen=True, eq=False)
class Scene:
    """Every drawn quantity of one clip; `render` adds nothing random.

    Units: pixels for lengths, radians clockwise on the screen for angles, grey levels of 255 for
    brightness. Positions are (row, column). The arrays with T rows are all that distinguishes one
    frame from another, beside the phase.
    """

    height: int
    width: int
    pair: int  # row of PAIRS
    forward: bool  # True = first motion of the pair, False = its twin
    shape: str
    colour: str
    size: str
    radius: float  # mean over the clip
    centre: tuple  # middle of the path
    angle: float  # of the clock hand, in the middle of a spin
    extent: float  # path length; or sweep; or growth factor; or moment in [0, 1]; see _states
    heading: float  # axis of meet and part; place on the orbit in its middle
    light: tuple  # share of the light that is lost towards the bottom, and towards the right
    waves: np.ndarray  # (K, 3) background: cycles down, cycles across, phase
    paint: np.ndarray  # (K + 1, 3) background: amplitude of each wave per channel, and the mean
    distractors: tuple  # of (shape, row, column, radius, angle, grey level)
    drift: np.ndarray  # (T, 2) int, background offset
    shake: np.ndarray  # (T, 2) int, offset of everything: the camera's trembling
    noise: np.ndarray  # (T,) int, where in the noise bank the pixel noise of a frame starts

    @property
    def motion(self):
        return PAIRS[self.pair][0 if self.forward else 1]

    @property
    def facts(self):
        return {key: getattr(self, key) for key in ("motion", "shape", "colour", "size")}

    @property
    def phase(self):
        """(T,) float64 in (0, 1): how far the pair's first motion has got at each frame."""
        phase = (np.arange(len(self.noise)) + 0.5) / len(self.noise)
        # The flipped array, not 1 - phase: the two differ in the last bit.
        return phase if self.forward else phase[::-1].copy()

    def reversed(self):
        """The same scene with time running backwards: the twin motion."""
        flipped = {name: getattr(self, name)[::-1] for name in ("drift", "shake", "noise")}
        return dataclasses.replace(self, forward=not self.forward, **flipped)


def draw_scene(rng, frames, height, width, looks):
    """Draw a `Scene`; flipping time leaves its distribution as it is (rng: numpy Generator).

    looks   sequence of (shape, colour) to choose from

    Direction of time and of drift are fair coins, shake and noise are independent from frame to
    frame, and everything else is constant: nothing is left that could know where time points.
    """
    pair, forward = int(rng.integers(len(PAIRS))), bool(rng.integers(2))
    shape, colour = looks[rng.integers(len(looks))]
    size = ("small", "large")[rng.integers(2)]
    short = min(height, width)
    radius = RADII[size] * short * rng.uniform(0.94, 1.06)

    name = PAIRS[pair][0]
    # Minutes must suffice to learn this world, so its questions are put plainly (LOG.md): clock hands and
    # orbits pass the top, two shapes meet side by side, and what does not spin stands nearly upright.
    heading = rng.uniform(-0.5, 0.5)
    angle = rng.uniform(-0.8, 0.8) if name == "spin clockwise" else rng.uniform(-0.3, 0.3)
    reach = np.full(2, 1.25 * radius)  # how far from the centre the picture extends, per axis
    if name in ("right", "down"):
        axis = ("down", "right").index(name)
        extent = rng.uniform(0.35, 0.6) * (height, width)[axis]
        reach[axis] += extent / 2
    elif name in ("spin clockwise", "orbit clockwise"):
        extent = math.radians(rng.uniform(150, 220))
        if name == "orbit clockwise":
            reach += 0.24 * short
    elif name == "grow":
        extent = rng.uniform(2.0, 2.6)  # last radius over first
        reach *= 1.5
    elif name == "appear":
        extent = rng.uniform(0.25, 0.75)
    elif name == "meet":
        radius, reach = 0.75 * radius, 0.75 * reach  # two of them must fit
        extent = rng.uniform(0.12, 0.16) * short  # travelled by each of the two
        reach += np.abs((math.sin(heading), math.cos(heading))) * (extent + radius)
    else:
        extent = rng.uniform(0.24, 0.34)  # darkest over brightest
    room = np.maximum((height, width) - 2 * reach, 0)
    centre = (np.array((height, width)) - 1) / 2 + room * rng.uniform(-0.5, 0.5, 2)

    cycles = rng.uniform(0.7, 1.6, 7) / short
    direction = rng.uniform(0, 2 * math.pi, 7)
    waves = np.stack(  # whole cycles per tile, so that it repeats seamlessly
        [np.rint(cycles * np.sin(direction) * height), np.rint(cycles * np.cos(direction) * width),
         rng.uniform(0, 2 * math.pi, 7)], 1)
    tint = 1 + 0.25 * rng.standard_normal((7, 3))  # channels nearly agree: nearly grey
    paint = np.vstack([rng.uniform(7, 11) / math.sqrt(7 / 2) * tint,
                       rng.uniform(140, 190) + rng.uniform(-8, 8, 3)])
    strength, source = rng.uniform(0.5, 0.6), rng.uniform(0, 2 * math.pi)
    light = (strength * math.sin(source), strength * math.cos(source))
    distractors = tuple(
        (SHAPES[rng.integers(len(SHAPES))], rng.uniform(0, height), rng.uniform(0, width),
         rng.uniform(0.06, 0.1) * short, rng.uniform(0, 2 * math.pi), rng.choice((75, 185)))
        for _ in range(rng.integers(3)))

    speed, course = rng.uniform(0.1, 0.5) * short / frames, rng.uniform(0, 2 * math.pi)
    # Measured from the middle frame, so that the opposite course is exactly the flipped array.
    from_middle = np.arange(frames)[:, None] - (frames - 1) / 2
    drift = from_middle * (speed * np.array((math.sin(course), math.cos(course))))
    drift = np.rint(rng.integers((height, width)) + drift).astype(np.int64)
    tremor = max(1, round(0.012 * short))
    return Scene(
        height, width, pair, forward, shape, colour, size, radius, tuple(centre.tolist()),
        angle, extent, heading, light, waves, paint, distractors, drift,
        rng.integers(-tremor, tremor + 1, (frames, 2)), rng.integers(_NOISE_STARTS, size=frames))


def _states(scene):
    """What the pair's first motion does with phase u: a list of copies to draw, each a dict of
    row, column, angle, radius, brightness: (T,) or float; and shown: (T,) bool, True = drawn."""
    u, name = scene.phase, PAIRS[scene.pair][0]
    row, column = scene.centre
    state = dict(row=row, column=column, angle=scene.angle, radius=scene.radius, brightness=1.0,
                 shown=np.ones(len(u), bool))
    if name == "right":
        state["column"] = column + (u - 0.5) * scene.extent
    elif name == "down":
        state["row"] = row + (u - 0.5) * scene.extent
    elif name == "spin clockwise":
        state["angle"] = scene.angle + (u - 0.5) * scene.extent
    elif name == "orbit clockwise":
        around = scene.heading + (u - 0.5) * scene.extent
        orbit = 0.24 * min(scene.height, scene.width)
        state.update(row=row - orbit * np.cos(around), column=column + orbit * np.sin(around))
    elif name == "grow":
        first = 2 * scene.radius / (1 + scene.extent)
        state["radius"] = first + (scene.extent * first - first) * u
    elif name == "appear":
        state["shown"] = u >= scene.extent
    elif name == "brighten":
        state["brightness"] = scene.extent + (1 - scene.extent) * u
    else:
        apart = 1.05 * scene.radius + scene.extent * (1 - u)  # half the distance of the centres
        down, across = apart * math.sin(scene.heading), apart * math.cos(scene.heading)
        return [{**state, "row": row + way * down, "column": column + way * across}
                for way in (-1, 1)]
    return [state]


def _distance(shape, y, x):
    """Signed distance (negative inside) from points to the outline of a shape of radius 1,
    float32 like y and x. Exact along edges, a little short beyond corners: fine for smoothing."""
    if shape == "circle":
        return np.hypot(y, x) - 0.92
    if shape == "ring":
        return np.abs(np.hypot(y, x) - 0.76) - 0.26
    if shape == "square":
        return np.maximum(np.abs(y), np.abs(x)) - 0.92
    if shape == "cross":
        long, short = np.maximum(np.abs(y), np.abs(x)), np.minimum(np.abs(y), np.abs(x))
        return np.maximum(long - 1.05, short - 0.36)
    if shape == "triangle":
        slanted = np.float32(math.sqrt(3) / 2) * np.abs(x) - np.float32(0.5) * y
        return np.maximum(y, slanted) - 0.62
    # Star: fold the plane on its ten mirror lines, then one edge from tip to notch is left.
    wedge = math.pi / 5
    turn = np.abs(np.mod(np.arctan2(x, -y) + np.float32(wedge), np.float32(2 * wedge)) - wedge)
    reach, tip, notch = np.hypot(y, x), 1.2, 0.55
    along, aside = reach * np.cos(turn), reach * np.sin(turn)
    edge = np.array((notch * math.cos(wedge) - tip, notch * math.sin(wedge)))
    normal_along, normal_aside = (edge[1], -edge[0]) / np.hypot(*edge)
    return np.float32(normal_along) * (along - np.float32(tip)) + np.float32(normal_aside) * aside


def _draw(video, shape, colour, hand, row, column, angle, radius, brightness, shown):
    """Paint a shape into a uint8 (T, H, W, 3) video, in place; hand: True = with a clock hand."""
    T, H, W, _ = video.shape
    row, column, angle, radius, brightness = (
        np.broadcast_to(value, T) for value in (row, column, angle, radius, brightness))
    half = math.ceil(1.32 * radius.max()) + 1
    top, left = np.rint(row).astype(int) - half, np.rint(column).astype(int) - half
    steps = np.arange(2 * half + 1)
    f32 = functools.partial(np.asarray, dtype=np.float32)
    r = f32(radius)[:, None, None]
    dy = f32(top - row)[:, None, None] + f32(steps)[:, None]  # (T, h, 1), pixels from the centre
    dx = f32(left - column)[:, None, None] + f32(steps)  # (T, 1, w)
    cos, sin = f32(np.cos(angle))[:, None, None] / r, f32(np.sin(angle))[:, None, None] / r
    y, x = dy * cos - dx * sin, dx * cos + dy * sin  # (T, h, w), radii, turned upright

    cover = np.clip(0.5 - r * _distance(shape, y, x), 0, 1)  # one pixel of smoothing at the edge
    tone = (f32(colour) * f32(brightness)[:, None])[:, None, None]  # (T, 1, 1, 3)
    if hand:
        thick = np.maximum(f32(0.2), 1.2 / r)
        off = np.hypot(x, y + np.clip(-y, 0, f32(1.0))) - thick
        dark = np.clip(0.5 - r * off, 0, 1)
        cover = np.maximum(cover, dark)  # the hand also spans the hole of a ring
        tone = tone + dark[..., None] * (f32(20) - tone)
    cover = cover[..., None]
    painted, kept = cover * tone + f32(0.5), 1 - cover
    for t in np.flatnonzero(shown):
        y0, x0 = max(top[t], 0), max(left[t], 0)
        y1, x1 = min(top[t] + len(steps), H), min(left[t] + len(steps), W)
        if y0 < y1 and x0 < x1:
            box = np.s_[t, y0 - top[t]:y1 - top[t], x0 - left[t]:x1 - left[t]]
            video[t, y0:y1, x0:x1] = painted[box] + kept[box] * video[t, y0:y1, x0:x1]


def _background(scene):
    """One seamless tile of muted waves, uint8 (H, W, 3)."""
    down, across, phase = scene.waves.T[:, :, None]
    a = 2 * math.pi / scene.height * down * np.arange(scene.height) + phase  # (K, H)
    b = 2 * math.pi / scene.width * across * np.arange(scene.width)  # (K, W)
    # cos(a + b) = cos a cos b - sin a sin b: the sum of plane waves is one matrix product.
    rows = np.concatenate([np.cos(a), -np.sin(a)]).T.astype(np.float32)  # (H, 2K)
    columns = np.concatenate([np.cos(b), np.sin(b)])[..., None]  # (2K, W, 1)
    columns = columns * np.tile(scene.paint[:-1], (2, 1))[:, None]  # (2K, W, 3)
    tile = rows @ columns.astype(np.float32).reshape(len(columns), -1)  # (H, W * 3)
    tile = tile.reshape(scene.height, scene.width, 3) + scene.paint[-1].astype(np.float32)
    return np.clip(tile, 16, 239).astype(np.uint8)


_NOISE_STARTS = 1 << 19


@functools.lru_cache(maxsize=4)
def _noise_bank(length):
    """Pixel noise to cut from, uint8 (_NOISE_STARTS + length,): std 1 grey level, negative values
    wrapped around. Drawing it afresh would take longer than all the rest of `render`."""
    noise = np.random.default_rng(0).normal(0, 1, _NOISE_STARTS + length)
    return np.clip(np.rint(noise), -8, 8).astype(np.int8).view(np.uint8)


def render(scene, only=slice(None)):
    """The pixels of a scene: uint8 (T, H, W, 3), RGB. A pure function.

    only   the frames to render, as an index into T; each looks as it does among all
    """
    drift, shake, noise = scene.drift[only], scene.shake[only], scene.noise[only]
    T, H, W = len(noise), scene.height, scene.width
    video = np.empty((T, H, W, 3), np.uint8)
    tiles = np.tile(_background(scene), (2, 2, 1))
    for t, (y, x) in enumerate((drift + shake) % (H, W)):
        video[t] = tiles[y:y + H, x:x + W]
    # The camera sees the texture through a window at +shake, so all else moves by -shake.
    dy, dx = -shake.T
    always = np.ones(T, bool)
    for shape, row, column, radius, angle, grey in scene.distractors:
        place = row + dy, column + dx
        _draw(video, shape, (grey,) * 3, False, *place, angle, radius, 1.0, always)
    for state in _states(scene):
        state = {name: value[only] if np.ndim(value) else value for name, value in state.items()}
        state.update(row=state["row"] + dy, column=state["column"] + dx)
        _draw(video, scene.shape, COLOURS[scene.colour], True, **state)
    # Light falls from one side, on all alike, and stays where it is: 256ths of a full exposure.
    slopes = (np.linspace(-0.5, 0.5, n) * slope for n, slope in zip((H, W), scene.light))
    light = (256 * (0.75 - np.add.outer(*slopes)).clip(0.4, 1)).astype(np.uint16)[..., None]
    video = np.maximum(video * light >> 8, 8).astype(np.uint8)
    # Everything painted lies in 8..247 and the noise in -8..8, so this uint8 sum cannot wrap.
    bank = _noise_bank(H * W * 3)
    for frame, start in zip(video, noise):
        frame += bank[start:start + H * W * 3].reshape(H, W, 3)
    return video


class MovingShapes:
    """An endless, deterministic world of one coloured shape doing one of 16 motions.

    split    "train", "val", "test" (shape-colour pairs seen in training, other clips) or "unseen"
             (only HELD_OUT_PAIRS: can the model recombine what it knows?)
    frames   T >= 1; the motion always spans the whole clip
    size     int or (H, W) in pixels, 16 or more
    seed     int >= 0
    told     share of the captions that name the motion; the others say what one frame shows, as most
             captions of the web do

    self[i]  {"video": uint8 (T, H, W, 3), "label": int motion in [0, 16), "facts": dict of str with
             motion, shape, colour, size, "caption": str}, for any i >= 0; a function of (seed,
             split, i) alone. There is no len(): ask for as many as you like.

    `motions` lists the classes and `twin` maps each label to that of the time-reversed motion.
    Raises DataError for another split name or an impossible size.
    """

    def __init__(self, split, frames=16, size=64, seed=0, told=1.0):
        if split not in SPLITS:
            raise DataError(f"no split {split!r} in the generated world: choose one of "
                            f"{', '.join(SPLITS)}")
        self.split, self.frames, self.size, self.seed, self.told = split, frames, _height_width(size), seed, told
        if frames < 1 or min(self.size) < 16 or seed < 0:
            raise DataError(f"generated clips need frames >= 1, size >= 16 and seed >= 0, "
                            f"got frames={frames}, size={size}, seed={seed}")
        self.motions, self.shapes, self.colours = list(MOTIONS), list(SHAPES), list(COLOURS)
        self.twin = {label: label ^ 1 for label in range(len(MOTIONS))}
        self.looks = [look for look in itertools.product(SHAPES, COLOURS)
                      if (look in HELD_OUT_PAIRS) == (split == "unseen")]

    def _draw(self, index):
        index = operator.index(index)
        if index < 0:
            raise IndexError(f"the generated world starts at index 0 and has no end, got {index}")
        rng = np.random.default_rng((self.seed, SPLITS.index(self.split), index))
        return draw_scene(rng, self.frames, *self.size, self.looks), rng

    def scene(self, index):
        """The `Scene` behind self[index]."""
        return self._draw(index)[0]

    def __getitem__(self, index):
        scene, rng = self._draw(index)
        silent = self.told < 1 and rng.random() >= self.told
        caption = still(scene.facts, self.frames, rng)[1] if silent else describe(scene.facts, rng)
        return {"video": render(scene), "label": MOTIONS.index(scene.motion), "facts": scene.facts,
                "caption": caption}


class StillShapes(MovingShapes):
    """Single frames of the same world, with sentences that are true of the picture alone.

    self[i]  one frame of clip i of MovingShapes, as that is but for "video": uint8 (1, H, W, 3), and
             "caption": str, of which motion is no part. See `still`
    """

    def __getitem__(self, index):
        scene, rng = self._draw(index)
        number, caption = still(scene.facts, self.frames, rng)
        return {"video": render(scene, [number]), "label": MOTIONS.index(scene.motion),
                "facts": scene.facts, "caption": caption}


def _height_width(size):
    return (size, size) if np.ndim(size) == 0 else tuple(size)


# ------------------------------------------------------------------------------- one video file


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """What `probe` learns about the first video stream of a file."""

    path: str
    width: int  # pixels, as shown: after the rotation
    height: int
    frames: int  # that will be shown; edit lists may hide some
    duration: float  # seconds, from the first frame's start to the last one's end
    fps: float  # frames per second, measured from the timestamps; an average where they vary
    codec: str
    rotation: int  # 0, 90, 180, 270: degrees counter-clockwise from the stored to the shown frame
    timestamps: tuple  # (frames,) float, seconds since the first shown frame
    pts: tuple  # (frames,) int, the same in the stream's own clock; empty if the file has none
    keyframes: tuple  # int pts of frames at which decoding can start, ascending


class _Video:
    """`with _Video(path) as (container, stream)`: opened by PyAV, always closed, and whatever goes
    wrong inside becomes a DataError that names the file."""

    def __init__(self, path):
        self.path = str(path)

    def __enter__(self):
        try:
            import av
        except ImportError:
            raise DataError("reading video files needs PyAV: pip install av") from None
        self.error = av.FFmpegError
        if not Path(self.path).is_file():
            raise DataError(f"{self.path}: no such file")
        try:
            # Titles may be in any encoding; PyAV minds until version 19.
            lenient = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
            self.container = av.open(self.path, **lenient)
        except av.FFmpegError as error:
            raise DataError(f"{self.path}: not a readable video ({error.strerror})") from None
        stream = next(iter(self.container.streams.video), None)
        if stream is None or stream.codec_context is None:
            self.container.close()
            what = "no video stream" if stream is None else "no decoder for its video stream"
            raise DataError(f"{self.path}: {what}")
        # One thread a file: clips are read in parallel, and FFmpeg's own threads cost 10-50 % CPU.
        stream.codec_context.thread_count = 1
        return self.container, stream

    def __exit__(self, kind, error, trace):
        self.container.close()
        if kind is not None and issubclass(kind, self.error):
            raise DataError(f"{self.path}: damaged, cannot be decoded ({error.strerror})") from None


def probe(path):
    """A `VideoInfo`, from the packets alone; only the first frame is decoded, for its rotation.

    Raises DataError (no such file, not a video, no video stream, first frame broken).
    """
    pts, keyframes, first = set(), set(), None
    with _Video(path) as (container, stream):
        for packet in container.demux(stream):
            if _is_shown(packet, stream.codec_context.codec.name):
                pts.add(packet.pts)
                if packet.is_keyframe:
                    keyframes.add(packet.pts)
            if first is None:
                first = next(iter(packet.decode()), None)
        if first is None:
            raise DataError(f"{path}: no frame in its video stream can be decoded")
        clock, rate = stream.time_base, stream.average_rate or stream.guessed_rate or 25
        codec = stream.codec_context.codec.name
    if None in pts or not pts:  # a raw stream: nothing but counting the frames is left
        with _Video(path) as (container, stream):
            seconds = [float(i / rate) for i, _ in enumerate(container.decode(stream))]
        pts, keyframes, tail = (), (), float(1 / rate)
        if not seconds:
            raise DataError(f"{path}: no frame in its video stream is to be shown")
    else:
        pts, keyframes = tuple(sorted(pts)), tuple(sorted(keyframes))
        seconds = [float((p - pts[0]) * clock) for p in pts]
        tail = seconds[-1] - seconds[-2] if len(seconds) > 1 else float(1 / rate)
    duration = seconds[-1] + tail
    quarter_turns = round(first.rotation / 90) % 4
    height, width = (first.height, first.width)[:: -1 if quarter_turns % 2 else 1]
    return VideoInfo(str(path), width, height, len(seconds), duration, len(seconds) / duration,
                     codec, 90 * quarter_turns, tuple(seconds), pts, keyframes)


def _is_shown(packet, codec):
    """Whether a packet holds a frame to show: not the empty end mark, nor discarded by an edit
    list, nor one of the reference frames that VP8 and VP9 store but hide."""
    if not packet.size or packet.is_discard:
        return False
    first, last = memoryview(packet)[0], memoryview(packet)[-1]
    if codec == "vp8":  # RFC 6386 Sec. 9.1, "Uncompressed Data Chunk": bit 4 is show_frame
        return bool(first & 0x10)
    if codec == "vp9" and last & 0xE0 != 0xC0:  # else a superframe, of which one frame is shown
        # VP9 specification Sec. 6.2, "Uncompressed header syntax": show_existing_frame and
        # show_frame are bits 3 and 1, one place lower in profile 3 (bits 5 and 4 both set).
        return bool(first & (0x05 if first & 0x30 == 0x30 else 0x0A))
    return True


def read_clip(path, times_or_indices, size=None, info=None):
    """Frames of a video file as shown, upright: uint8 (T, H, W, 3) RGB, in the order asked for.

    times_or_indices  (T,) integers: frame numbers in presentation order, or floats: seconds from the first
            frame, giving the frame on show at that time; repeats are allowed
    size    None = as stored, int = short side in pixels with the aspect kept, (H, W) = exactly that
    info    the file's `VideoInfo`, if at hand: saves a second pass over its packets

    The result equals picking from a full decode: we seek to the last keyframe before the first
    wanted frame, then match frames by timestamp, never by counting from the seek. Raises DataError
    (as `probe`; a frame outside the video; damage on the way to a wanted frame).
    """
    info = info or probe(path)
    numbers = _frame_numbers(info, times_or_indices).tolist()
    distinct, start = set(numbers), None
    if info.pts:
        start = max((key for key in info.keyframes if key <= info.pts[min(numbers)]), default=None)
        if start in info.keyframes[:1]:
            start = None  # where decoding begins anyway
    found = _decode(info, distinct, size, start)
    if start is not None and len(found) < len(distinct):
        found = _decode(info, distinct, size, None)  # the seek came out too late
    if len(found) < len(distinct):
        raise DataError(f"{path}: damaged, its frame {min(distinct - set(found))} of {info.frames} "
                        "cannot be decoded")
    return np.stack([found[number] for number in numbers])


def _frame_numbers(info, wanted):
    wanted = np.atleast_1d(np.asarray(wanted))
    if wanted.dtype.kind not in "iuf" or not wanted.size:
        raise DataError(f"{info.path}: ask for frame numbers or seconds, not {wanted.tolist()}")
    in_seconds = wanted.dtype.kind == "f"
    end, unit = (info.duration, " s") if in_seconds else (info.frames, "")
    outside = wanted[~((wanted >= 0) & (wanted < end))]
    if outside.size:
        raise DataError(f"{info.path}: has {info.frames} frames in {info.duration:.3f} s, "
                        f"but the frame at {outside[0]}{unit} was asked for (the first is 0)")
    if in_seconds:
        # A microsecond of tolerance: 0.1 may lie a rounding error before the frame at 1/10 s.
        return np.searchsorted(info.timestamps, wanted + 1e-6, side="right") - 1
    return wanted


def _decode(info, numbers, size, start):
    """{number: uint8 (H, W, 3)} for those of the wanted frame numbers that are met."""
    place = {pts: number for number, pts in enumerate(info.pts)}
    turns = info.rotation // 90
    if size is None:
        height, width = info.height, info.width
    elif np.ndim(size) == 0:
        scale = size / min(info.height, info.width)
        height, width = (max(1, round(side * scale)) for side in (info.height, info.width))
    else:
        height, width = size
    stored = (width, height) if turns % 2 else (height, width)
    found = {}
    with _Video(info.path) as (container, stream):
        # A converter of our own with one thread: PyAV keeps one with a pool, which a worker process
        # forked from here would inherit without its threads, and wait for them for ever.
        from av.video.reformatter import VideoReformatter
        converter = VideoReformatter()
        if start is not None:
            container.seek(start, stream=stream)
        for count, frame in enumerate(container.decode(stream)):
            number = place.get(frame.pts) if info.pts else count
            if number in numbers and number not in found:
                # Resized by swscale while it converts: one pass, and no full-size RGB frame.
                picture = converter.reformat(frame, stored[1], stored[0], "rgb24", threads=1)
                found[number] = np.rot90(picture.to_ndarray(), turns)
                if len(found) == len(numbers):
                    break
    return found


# ------------------------------------------------------------------------------ choosing frames


def dense_indices(n, frames, stride, rng=None, view=(0, 1)):
    """(frames,) int: every stride-th of n frames, in a window of frames * stride (VideoMAE
    Sec. 3.3, "Temporal downsampling"). Random start with rng, the centre without; a short video
    repeats its last frame. view=(c, C) is clip c of C spread evenly from the first frame to the last
    (VideoMAE, multi-view test); of one, the centre."""
    spare = max(n - frames * stride, 0)
    clip, clips = view
    start = spare // 2 if clips == 1 else spare * clip // (clips - 1)
    start = start if rng is None else int(rng.integers(spare + 1))
    return np.minimum(start + stride * np.arange(frames), n - 1)


def segment_indices(n, frames, rng=None, view=(0, 1)):
    """(frames,) int: one of n frames from each of `frames` equal segments (TSN Sec. 3.1,
    "Temporal Segment Networks"): random within its segment with rng, the middle without.
    view=(c, C) is clip c of C: at (c + 1) / (C + 1) of each segment (UniFormerV2's test)."""
    edges = np.arange(frames + 1) * n // frames
    first, last = edges[:-1], np.maximum(edges[1:] - 1, edges[:-1])
    clip, clips = view
    return first + (last - first) * (clip + 1) // (clips + 1) if rng is None else rng.integers(first, last + 1)


# ---------------------------------------------------------------------------- many video files

VIDEO_SUFFIXES = frozenset(
    ".3gp .avi .flv .gif .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .webm .wmv".split())
_COLUMNS = {  # what a header line may call a column
    "path": ("path", "video", "file", "filename", "video_path"),
    "label": ("label", "class", "category"),
    "caption": ("caption", "text", "sentence"),
}


_LIST_SUFFIXES = (".csv", ".tsv", ".txt", ".jsonl", ".list")


def _is_video(name):
    return Path(name.strip().strip('"')).suffix.lower() in VIDEO_SUFFIXES


def _read_list(path):
    """Rows (path, label or None, caption or None), all str, of a list; see VideoFiles."""
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if path.suffix.lower() in _LIST_SUFFIXES and b"\0" not in raw:
            line = raw[:error.start].count(b"\n") + 1
            raise DataError(f"{path}, line {line}: byte 0x{raw[error.start]:02x} is not UTF-8; save "
                            "the list with that encoding") from None
        raise DataError(f"{path}: neither a video nor a text file; give a folder of videos, one "
                        "video, or a list with 'path label' on each line") from None
    lines = [(number, line) for number, line in enumerate(map(str.strip, text.splitlines()), 1)
             if line]
    if not lines:
        raise DataError(f"{path}: the list is empty; write 'path label' on each line")
    if path.suffix.lower() == ".jsonl":
        return _read_json_lines(path, lines)
    for delimiter in (",", "\t"):
        names = [name.strip().lower() for name in lines[0][1].split(delimiter)]
        if set(names) & set(_COLUMNS["path"]):
            return _read_columns(path, names, csv.reader(text.splitlines(), delimiter=delimiter))
    if all(_is_video(line) for _, line in lines):
        return [(line.strip('"'), None, None) for _, line in lines]

    def splits_off_a_video(separator):
        return sum(separator in line and _is_video(line.rsplit(separator, 1)[0])
                   for _, line in lines)
    # Split at the last separator: a path may contain it too.
    separator = max(("::", "\t", ",", " "), key=splits_off_a_video)
    rows = [(number, *line.rpartition(separator)) for number, line in lines]
    if rows[0][1].strip().lower() in _COLUMNS["path"]:
        del rows[0]
    for number, name, _, label in rows:
        if not _is_video(name):
            raise DataError(f"{path}, line {number}: expected 'path label', a video's name and "
                            f"then a space, comma, tab or '::', got {(name or label)[:60]!r}")
    return [(name.strip().strip('"'), label.strip(), None) for _, name, _, label in rows]


def _read_columns(path, names, reader):
    """Rows as `_read_list`, of a CSV file whose header names its columns."""
    at = [next((names.index(name) for name in known if name in names), None)
          for known in _COLUMNS.values()]
    rows = []  # the header first
    for row in filter(None, reader):
        if len(row) != len(names):
            raise DataError(f"{path}, line {reader.line_num}: {len(row)} columns, but the header "
                            f"has {len(names)}; put quotes around text that contains the separator")
        rows.append(tuple(None if place is None else row[place].strip() for place in at))
    return rows[1:]


def _read_json_lines(path, lines):
    """Rows as `_read_list`, of a JSON object on each line, with the same names for the columns."""
    rows = []
    for number, line in lines:
        try:
            item = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(item, dict):
            raise DataError(f"{path}, line {number}: expected an object like "
                            '{"path": "dog.mp4", "caption": "a dog runs"}, got ' + line[:40])
        row = [next((item[name] for name in names if name in item), None) for names in _COLUMNS.values()]
        row[1] = str(row[1]) if isinstance(row[1], int) else row[1]
        if row[0] is None or not all(isinstance(value, str) for value in row if value is not None):
            raise DataError(f"{path}, line {number}: needs a \"path\", and path, label and caption must "
                            f"be text, got {line[:60]}")
        rows.append(tuple(value if value is None else value.strip() for value in row))
    captioned = [row[2] is not None for row in rows]
    if any(captioned) and not all(captioned):
        raise DataError(f"{path}, line {lines[captioned.index(False)][0]}: has no caption, other lines have")
    return rows


def _scan_folder(folder):
    """Rows as `_read_list`, of every video below a folder, sorted by path."""
    names = sorted(Path(place, name).relative_to(folder)
                   for place, _, files in os.walk(folder, followlinks=True)  # datasets are linked
                   for name in files if _is_video(name) and not name.startswith("."))
    if not names:
        raise DataError(f"{folder}: no video below this folder (looked for "
                        f"{' '.join(sorted(VIDEO_SUFFIXES))})")
    labelled = all(len(name.parts) > 1 for name in names)
    split = next((name.parts[0] for name in names
                  if name.parts[0].lower() in ("train", "val", "validation", "test")), None)
    if labelled and split:
        raise DataError(f"{folder}: its sub-folder '{split}' looks like a split, not a class; "
                        f"give {folder / split} instead")
    return [(str(name), name.parts[0] if labelled else None, None) for name in names]


_GREY = [124, 116, 104]  # the mean colour of ImageNet


def split_files(items, fraction=0.1, seed=0):
    """(training items, held-out items): a fixed random share of at least one is held out.

    The seed is not the training seed, so that runs with different seeds share a validation set.
    A single item lands in both parts, as there is nothing else to do with it.
    """
    if len(items) < 2:
        return list(items), list(items)
    count = min(max(1, round(fraction * len(items))), len(items) - 1)
    held = set(np.random.default_rng(seed).permutation(len(items))[:count].tolist())
    return ([item for i, item in enumerate(items) if i not in held],
            [item for i, item in enumerate(items) if i in held])


class VideoFiles:
    """Clips from video files.

    source    a folder, searched recursively: if all videos lie in sub-folders, the names of these
              are the classes, else there are no labels; or one video file; or a list: a text or
              CSV file of `path label` lines, paths relative to the list's folder, separated by
              space (the last one), comma, tab or `::`; an optional header may name the columns
              path, label, caption. Labels are class numbers or names. Lines of paths alone do too.
              Or a .jsonl file: {"path": ..., "caption": ...} on each line, "label" if you like.
    frames    T
    size      int or (H, W), pixels
    stride    frames from one chosen frame to the next, for sampling="dense"
    sampling  "dense" (`dense_indices`) or "segment" (`segment_indices`)
    train     True: random window, crop of 50-100 % of the area and (with flip=True) mirroring,
              alike for all frames, a function of (seed, index, epoch); False: the centre of each
    area      with train=True: the smallest share of a frame's area that a random crop keeps
    operations, magnitude   with train=True: RandAugment (arXiv 1909.13719), so many of its operations of a
              strength of 0 to 30, drawn once for a clip; 0 = none
    erasing   with train=True: probability that a box of the clip, the same in all frames, turns grey
    views     (clips, crops) with train=False: that many clips along time, and of each that many crops from
              end to end of the longer side. "video" is then uint8 (1 + clips * crops, T, H, W, 3), the one
              view in the centre of both first
    part      "all", or "train" / "val": without / only the tenth that `split_files` holds out
    classes   class names in label order, to read a validation list with the training set's labels

    self[index] and self[index, epoch] return
              {"video": uint8 (T, H, W, 3), "label": int, -1 = no label, "path": str,
               "bad": [(path, reason), ...], and "caption": str if the list has a caption column}
              A file that cannot be read is named in "bad". With train=True the next readable file
              takes its place; with train=False nothing does and "video" is None: to count, not to
              replace, is what keeps an evaluation honest.

    `items` lists (path, label or None), `captions` is None or parallel to it, `classes` the names.
    Raises DataError if source is none of these, a label is unknown, or no file can be read.
    """

    def __init__(self, source, frames, size, stride=4, sampling="dense", train=True, seed=0,
                 flip=True, part="all", classes=None, area=0.5, operations=0, magnitude=7, erasing=0.0, views=None):
        if sampling not in ("dense", "segment"):
            raise DataError(f"no sampling {sampling!r}: choose dense or segment")
        if part not in ("all", "train", "val"):
            raise DataError(f"no part {part!r}: choose all, train or val")
        if frames < 1 or stride < 1 or seed < 0:
            raise DataError("clips need frames >= 1, stride >= 1 and seed >= 0, "
                            f"got frames={frames}, stride={stride}, seed={seed}")
        self.source, self.size = str(source), _height_width(size)
        self.frames, self.stride, self.sampling = frames, stride, sampling
        self.train, self.seed, self.views = train, seed, views
        self.augment = v2.Compose(
            ([v2.RandAugment(operations, magnitude)] if operations else [])
            + [v2.RandomResizedCrop(self.size, scale=(area, 1), antialias=True),
               v2.RandomHorizontalFlip(0.5 if flip else 0),
               v2.RandomErasing(erasing, value=_GREY)])
        source, folder = Path(source), Path(source)
        if source.is_dir():
            rows = _scan_folder(source)
        elif not source.is_file():
            raise DataError(f"{source}: no such file or folder")
        else:
            folder = source.parent
            rows = [(source.name, None, None)] if _is_video(source.name) else _read_list(source)
        rows = [(str(folder / path), label, caption) for path, label, caption in rows]
        self.classes, number = _number_labels(source, [label for _, label, _ in rows], classes)
        if part != "all":
            rows = split_files(rows)[part == "val"]
        self.items = [(path, number.get(label)) for path, label, _ in rows]
        self.captions = [caption for _, _, caption in rows] if rows[0][2] is not None else None
        self.missing = [path for path, _ in self.items if not Path(path).is_file()]
        if len(self.missing) == len(self.items):
            raise DataError(f"{source}: none of its {len(rows)} files exists, the first is "
                            f"{self.missing[0]}; paths are relative to the list's folder")

    def __len__(self):
        return len(self.items)

    def summary(self):
        """One line for the user: counts, classes, a sample, what is missing."""
        path, label = self.items[0]
        kinds = (f"{len(self.classes)} classes ({', '.join(self.classes[:3])}"
                 f"{', ...' if len(self.classes) > 3 else ''})" if self.classes else "no labels")
        first = f"first {path}" + ("" if label is None else f" = {self.classes[label]}")
        missing = f"; {len(self.missing):,} MISSING, e.g. {self.missing[0]}" if self.missing else ""
        return f"{self.source}: {len(self):,} videos, {kinds}, {first}{missing}"

    def __getitem__(self, index):
        index, epoch = index if isinstance(index, tuple) else (index, 0)
        index, bad = range(len(self))[index], []
        for place in range(index, index + (len(self) if self.train else 1)):
            place %= len(self)
            path, label = self.items[place]
            label = -1 if label is None else label
            item = {"video": None, "label": label, "path": path, "bad": bad}
            if self.captions:
                item["caption"] = self.captions[place]
            try:
                item["video"] = self._clip(path, (self.seed, index, epoch) if self.train else None)
                return item
            except DataError as error:
                bad.append((path, str(error)))
        if self.train:
            raise DataError(f"{self.source}: none of its {len(self)} files can be read; "
                            f"{bad[0][1]}")
        return item

    def _clip(self, path, key):
        rng = None if key is None else np.random.default_rng(key)
        info = probe(path)
        choose = segment_indices if self.sampling == "segment" else functools.partial(
            dense_indices, stride=self.stride)
        # Just large enough to cover the crop; with room for a random one, as 256 is for 224.
        scale = max(self.size[0] / info.height, self.size[1] / info.width)
        scale *= 1 if rng is None else 8 / 7
        cover = tuple(max(round(side * scale), least) for side, least in
                      zip((info.height, info.width), self.size))
        if rng is None and self.views:
            clips, crops = self.views
            numbers = [choose(info.frames, self.frames)] + [
                choose(info.frames, self.frames, view=(clip, clips)) for clip in range(clips)]
            video = read_clip(path, np.concatenate(numbers), cover, info)
            centre, *others = video.reshape(1 + clips, self.frames, *video.shape[1:])
            return np.stack([self._crop(centre, 0.5)] + [
                self._crop(clip, 0.5 if crops == 1 else crop / (crops - 1)) for clip in others for crop in range(crops)])
        video = read_clip(path, choose(info.frames, self.frames, rng=rng), cover, info)
        if rng is None:
            return self._crop(video, 0.5)
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which would reset the accelerator's generator as well.
            torch.default_generator.manual_seed(int(rng.integers(2**63)))
            return self.augment(torch.from_numpy(video).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()

    def _crop(self, video, place):
        """The crop at this share of the way, 0 = start, 1 = end of the side that has room."""
        top, left = (int((side - kept) * place) for side, kept in zip(video.shape[1:3], self.size))
        return video[:, top:top + self.size[0], left:left + self.size[1]]


def _number_labels(source, labels, classes):
    """(class names, {label as written: number}); all-integer labels are numbers already."""
    written = sorted({label for label in labels if label is not None})
    if not written:
        return list(classes or []), {}
    if all(label.isdecimal() for label in written) and not set(written) <= set(classes or ()):
        number = {label: int(label) for label in written}
        classes = list(classes or map(str, range(max(number.values()) + 1)))
        unknown = [label for label in written if number[label] >= len(classes)]
    else:
        classes = list(classes or written)
        number = {name: place for place, name in enumerate(classes)}
        unknown = [label for label in written if label not in number]
    if unknown:
        raise DataError(f"{source}: label {unknown[0]!r} is not among the {len(classes)} known "
                        f"classes ({', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''})")
    return classes, number


# ------------------------------------------------------------------------------------- batches


class _Carry(torch.utils.data.Dataset):
    """Pass a DataError on as a value: a DataLoader would bury its one line in a traceback."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, index):
        try:
            return self.dataset[index]
        except DataError as error:
            return error


def _collate(items):
    for item in items:
        if isinstance(item, DataError):
            return item
    good = [item for item in items if item["video"] is not None]
    batch = {key: [item[key] for item in good] for key in ("caption", "path", "facts")
             if good and key in good[0]}
    batch["bad"] = [entry for item in items for entry in item.get("bad", ())]
    batch["label"] = torch.tensor([item["label"] for item in good], dtype=torch.int64)
    batch["video"] = torch.from_numpy(np.stack([item["video"] for item in good])) if good else None
    return batch


def _start_worker(_):
    # Ctrl-C reaches every process of the terminal; only the parent should answer, by stopping us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _load(dataset, plan, workers):
    # The workers run one torch thread each and end with the parent: DataLoader sees to both. Its
    # own generator, so that starting a loader does not move the global one.
    loader = torch.utils.data.DataLoader(
        _Carry(dataset), batch_sampler=plan, collate_fn=_collate, num_workers=workers,
        worker_init_fn=_start_worker, generator=torch.Generator())
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        yield batch


class _Plan:
    """The indices of each step, computed as they are needed."""

    def __init__(self, dataset, batch_size, seed, steps, start, shuffle, rank, world, repeats):
        self.length = len(dataset) if hasattr(dataset, "__len__") else None
        self.batch_size, self.seed, self.steps, self.start = batch_size, seed, steps, start
        self.shuffle, self.rank, self.world, self.repeats = shuffle, rank, world, repeats

    def __len__(self):
        return max(self.steps - self.start, 0)

    def __iter__(self):
        order = functools.lru_cache(maxsize=2)(
            lambda epoch: np.random.default_rng((self.seed, epoch)).permutation(self.length))
        for step in range(self.start, self.steps):
            first = (step * self.world + self.rank) * self.batch_size
            places = range(first, first + self.batch_size)
            if self.length is None:
                yield list(places)
            else:
                turns = [(*divmod(place // self.repeats, self.length), place % self.repeats) for place in places]
                yield [(int(order(epoch)[i]) if self.shuffle else i, epoch * self.repeats + again)
                       for epoch, i, again in turns]


def normalise(video, mean, std):
    """uint8 (B, T, H, W, 3) -> float32 (B, 3, T, H, W), (video / 255 - mean) / std, on the device
    of the video: a batch travels as bytes, a quarter of the size.

    mean, std  three numbers each, of red, green, blue in [0, 1]; the model's file has its own
    """
    mean, std = (torch.tensor(numbers, device=video.device) for numbers in (mean, std))
    return video.float().div_(255).sub_(mean).div_(std).permute(0, 4, 1, 2, 3)


def batches(dataset, batch_size, seed, steps, start=0, workers=0, shuffle=True, rank=0, world=1, repeats=1):
    """Iterate over the batches of steps start .. steps - 1; batch k is a function of (seed, k).

    An endless dataset is read in order: step k holds indices k B to k B + B - 1. A finite one is
    read epoch after epoch, each in its own order drawn from (seed, epoch) unless shuffle=False; a
    batch may straddle two epochs, so that all have the same size. With `world` processes, the
    batches of all ranks at step k are together the batch of one process with batch size B * world.

    workers  processes that load ahead; 0 = load in this one
    repeats  clips of each file side by side, each cut out anew (repeated augmentation, arXiv 1901.09335, as
             VideoMAE uses it); finite datasets only
    yields   dict: "video" uint8 (B, T, H, W, 3), "label" int64 (B,), -1 = none, "bad" list of
             (path, reason), and the lists "caption", "path", "facts" where the dataset has them
    Raises DataError where the dataset does, or if a batch has nothing but unreadable files.
    """
    if repeats > 1 and not hasattr(dataset, "__len__"):
        raise DataError(f"repeats={repeats}: an endless dataset has no need of the same clip twice")
    plan = _Plan(dataset, batch_size, seed, steps, start, shuffle, rank, world, repeats)
    for batch in _load(dataset, plan, workers):
        if batch["video"] is None:
            raise DataError(f"a whole batch of unreadable files; {batch['bad'][0][1]}")
        yield batch


def held_out(dataset, count, batch_size, workers=0):
    """Iterate over the first `count` items in order, once, as dicts like those of `batches`.

    The last batch may be smaller, and so may one with unreadable files: these are in "bad", so
    that evaluated + bad = count. No batch is empty. count=None means all of a finite dataset.
    Raises DataError if no item can be read.
    """
    if hasattr(dataset, "__len__"):
        count = len(dataset) if count is None else min(count, len(dataset))
    plan = [list(range(first, min(first + batch_size, count)))
            for first in range(0, count, batch_size)]
    waiting, bad = None, []  # one batch is held back: the last one also reports what follows it
    for batch in _load(dataset, plan, workers):
        bad += batch["bad"]
        if batch["video"] is None:
            continue
        if waiting is not None:
            yield waiting
        waiting, bad, batch["bad"] = batch, [], bad
    if waiting is None:
        raise DataError(f"none of the {count} held-out clips can be read; {bad[0][1]}")
    waiting["bad"] += bad
    yield waiting


def main():
    """Print one generated clip's facts and draw all 16 motions to runs/moving_shapes.png."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    world = MovingShapes("train", frames=8)
    item = world[0]
    print(item["caption"], item["facts"], f"label {item['label']}", item["video"].shape, sep="\n")
    labels = [MOTIONS.index(world.scene(i).motion) for i in range(500)]
    figure, axes = plt.subplots(16, 1, figsize=(8, 20), layout="constrained")
    for label, ax in enumerate(axes):
        item = world[labels.index(label)]
        ax.imshow(np.concatenate([np.pad(f, ((0, 0), (0, 2), (0, 0))) for f in item["video"]], 1))
        ax.set_title(f"{MOTIONS[label]}: {item['caption']}", loc="left", fontsize=8)
        ax.axis("off")
    Path("runs").mkdir(exist_ok=True)
    figure.savefig("runs/moving_shapes.png", dpi=100)
    print("wrote runs/moving_shapes.png")


if __name__ == "__main__":
    main()
