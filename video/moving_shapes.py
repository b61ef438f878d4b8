"""A generated world that only the order of frames explains: moving shapes and sentences about them.

A video model is worth its cost only if it uses the order of frames. Real data hides whether it
does: Kinetics labels can often be guessed from one frame. So the motions of this world come in
time-reversed pairs. A clip of "left" played backwards is a clip of "right", with exactly the same
probability. A model that ignores the order of frames scores 50 % within a pair, however large it
is. Captions are written from the same facts as the pixels, so retrieval and captioning can be
checked as well.

    rng(seed, split, index) -> Scene -> render -> (T, H, W, 3) uint8     `MovingShapes[index]`
                                 |
                                 +-> facts -> describe -> "a small red ring orbits clockwise"

1. `draw_scene` draws every quantity of a clip once, as numbers and per-frame arrays.
2. `Scene.reversed` flips the arrays: the twin. `render` is pure and treats each frame alone, so
   render(scene.reversed()) == render(scene)[::-1], bit for bit.
3. `describe` turns facts into a sentence. `parse_caption` turns any sentence back into facts.
4. More from the same facts: `StillShapes`, single pictures; `ActShapes`, two acts in a row;
   `QuestionShapes`, a question and its answer; `LongShapes`, long videos with segments.
5. Some pairs of shape and colour are in no training clip. The split "unseen" has only these. It
   tests whether a model learned shapes and colours or memorised their pairs.

Speed, one core: a clip of 16x64x64 takes about 1.2 ms (850 clips/s), of 16x224x224 about 7 ms.

    python -m video.moving_shapes       draws a clip of each motion

>>> world = MovingShapes("train", frames=8, size=64)
>>> world[3]["video"].shape, world[3]["caption"]
((8, 64, 64, 3), 'in this clip a little cyan ring pops up')
>>> scene = world.scene(3)
>>> bool((render(scene.reversed()) == render(scene)[::-1]).all())
True
"""

import dataclasses
import functools
import itertools
import math
import operator
import re
from pathlib import Path

import numpy as np

from video.annotations import DataError
from video.clip_set import ClipSet


# ------------------------------------------------------------------ words

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
    """Every sentence that `describe` may choose for these facts, as a tuple of str.

    facts   dict with "motion" and any of "shape", "colour", "size"; what is absent is not said
    """
    return _phrasings(*(facts.get(fact) for fact in ("motion", "shape", "colour", "size")))


@functools.lru_cache(maxsize=None)  # a few thousand combinations, needed with every clip
def _phrasings(motion, shape, colour, size):
    sizes = ("",)  # for no mention; a growing thing is neither small nor large
    if size and motion not in ("grow", "shrink"):
        sizes += SIZE_WORDS[size]
    noun, determiners = shape or "shape", ("a", "the")
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
    return tuple(sentences)


def describe(facts, rng):
    """One sentence about the facts, chosen among `phrasings(facts)` by a numpy Generator."""
    sentences = phrasings(facts)
    return sentences[rng.integers(len(sentences))]


def still(facts, frames, rng):
    """A frame of a clip with these facts, and a sentence that is true of that picture alone.

    returns  its number, drawn by a numpy Generator among those where the shape is visible, and a
             sentence like "a red star": a single picture shows no motion
    """
    shape, colour, motion = facts["shape"], facts["colour"], facts["motion"]
    number = {"appear": frames - 1, "vanish": 0}.get(motion)
    number = int(rng.integers(frames)) if number is None else number
    if motion in ("meet", "part"):
        return number, f"two {colour} {_PLURALS[shape]}"
    return number, f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape}"


def choices(facts, rng):
    """Five sentences, one of which fits a clip with these facts -> (list of str, its index).

    The wrong ones differ in one fact each: the motion reversed, another motion, another shape,
    another colour.
    """
    true = {key: facts[key] for key in ("motion", "shape", "colour")}
    twin = MOTIONS[MOTIONS.index(true["motion"]) ^ 1]
    others = [("motion", [twin]),
              ("motion", [motion for motion in MOTIONS if motion not in (true["motion"], twin)]),
              ("shape", [shape for shape in SHAPES if shape != true["shape"]]),
              ("colour", [colour for colour in COLOURS if colour != true["colour"]])]
    sentences = [describe(true, rng)]
    for fact, values in others:
        sentences.append(describe(true | {fact: rng.choice(values).item()}, rng))
    order = rng.permutation(5)
    return [sentences[i] for i in order], int(order.argmin())


def ask(facts, rng):
    """A question about a clip with these facts, and its answer, drawn by a numpy Generator.

    Five kinds, which the first two words tell: "what happens", "which way" (for motions with a
    direction; else the first kind again), "what shape", "what colour", and "is it" true that ...,
    which is true of half. A false statement differs in one fact, a false motion is the reversed
    one. No question contains its answer.
    """
    motion, shape, colour = facts["motion"], facts["shape"], facts["colour"]
    kind = rng.integers(5)  # 0 what happens, 1 which way, 2 what shape, 3 what colour, 4 is it
    if kind == 1 and motion in ("right", "left", "down", "up"):
        return f"which way does the {colour} {shape} go?", motion
    if kind == 1 and "clockwise" in motion:
        return f"which way does the {colour} {shape} turn?", motion.split()[-1]
    if kind < 2:  # kind 1 too, where a motion has no direction
        return "what happens?", motion
    if kind == 2:
        return ("what shape is it?", f"what shape is {colour}?")[rng.integers(2)], shape
    if kind == 3:
        return ("what colour is it?", f"what colour is the {shape}?")[rng.integers(2)], colour
    stated, true = {"motion": motion, "shape": shape, "colour": colour}, bool(rng.integers(2))
    if not true:
        fact = ("motion", "shape", "colour")[rng.integers(3)]
        twin = MOTIONS[MOTIONS.index(motion) ^ 1]
        values = {"motion": [twin], "shape": SHAPES, "colour": COLOURS}[fact]
        stated[fact] = rng.choice([value for value in values if value != stated[fact]]).item()
    it = f"{stated['colour']} {stated['shape']}"
    if motion in ("meet", "part"):
        it = f"two {stated['colour']} {_PLURALS[stated['shape']]}"
    else:
        it = f"{'an' if it[0] in 'aeiou' else 'a'} {it}"
    verb = rng.choice(MOTION_PHRASES[stated["motion"]]).item()
    return f"is it true that {it} {verb}?", ("no", "yes")[true]


def parse_caption(sentence):
    """The facts that a sentence states: a dict with any of "motion", "shape", "colour", "size".

    A fact that is not mentioned, or mentioned with two different values, is absent. Words that no
    caption uses are ignored, so the output of an untrained caption model parses too.
    """
    joined = re.sub(r"\s*-\s*", "-", sentence.lower())  # CLIP decodes to "counter - clockwise"
    text = f" {' '.join(re.findall(r'[a-z]+(?:-[a-z]+)*', joined))} "
    facts = {}
    for fact, values in _VOCABULARY.items():
        said = [value for value, words in values.items() if any(f" {w} " in text for w in words)]
        if len(said) == 1:
            facts[fact] = said[0]
    return facts


# ----------------------------------------------------------------- pixels


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
    rest: tuple = (0, 0)  # frames before and after the motion, in which the shape stands still

    @property
    def motion(self):
        return PAIRS[self.pair][0 if self.forward else 1]

    @property
    def facts(self):
        return {key: getattr(self, key) for key in ("motion", "shape", "colour", "size")}

    @property
    def phase(self):
        """(T,) float64 in (0, 1): how far the pair's first motion has got at each frame."""
        before, after = self.rest if self.forward else self.rest[::-1]
        count = len(self.noise) - before - after
        phase = (np.clip(np.arange(len(self.noise)) - before, 0, count - 1) + 0.5) / count
        # The flipped array, not 1 - phase: the two differ in the last bit.
        return phase if self.forward else phase[::-1].copy()

    def reversed(self):
        """The same scene with time running backwards: the twin motion."""
        flipped = {name: getattr(self, name)[::-1] for name in ("drift", "shake", "noise")}
        return dataclasses.replace(self, forward=not self.forward, rest=self.rest[::-1], **flipped)


def draw_scene(rng, frames, height, width, looks, motion=None):
    """Draw a `Scene`; flipping time leaves its distribution as it is (rng: numpy Generator).

    looks   sequence of (shape, colour) to choose from
    motion  one of MOTIONS; None = any

    Direction of time and of drift are fair coins, shake and noise are independent from frame to
    frame, and everything else is constant: nothing is left that could know where time points.
    """
    pair, forward = int(rng.integers(len(PAIRS))), bool(rng.integers(2))
    if motion is not None:
        pair, forward = MOTIONS.index(motion) // 2, MOTIONS.index(motion) % 2 == 0
    shape, colour = looks[rng.integers(len(looks))]
    size = ("small", "large")[rng.integers(2)]
    short = min(height, width)
    radius = RADII[size] * short * rng.uniform(0.94, 1.06)

    name = PAIRS[pair][0]
    # The motions are easy to see, so that this world can be learned in minutes (LOG.md): spinning
    # hands and orbits pass the top, two shapes meet side by side, and shapes that do not spin stand
    # nearly upright.
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


KEPT = 1 << 15  # clips of each kind that `set_cache_folder` has room for
_shelf = None  # the folder of `set_cache_folder`


def set_cache_folder(folder):
    """Store the clips that MovingShapes renders in files in `folder`, and read those stored there.

    This holds for this process and those that it forks, until set_cache_folder(None). It serves
    several runs that use the same clips, one after the other or at the same time. There is one
    sparse file for each split, size and seed, with KEPT records: a byte, 1 = present, and the
    pixels. Two processes that
    render the same clip at once write the same bytes.
    """
    global _shelf
    _shelf = folder and Path(folder)
    if folder:
        _shelf.mkdir(parents=True, exist_ok=True)


@functools.lru_cache(maxsize=8)
def _records(path, size):
    with open(path, "ab") as file:
        file.truncate(KEPT * size)
    return np.memmap(path, np.uint8, "r+", shape=(KEPT, size))


class MovingShapes(ClipSet):
    """An endless, deterministic world of one coloured shape doing one of 16 motions.

    split         "train", "val", "test" (shape-colour pairs seen in training, other clips) or
                  "unseen" (only HELD_OUT_PAIRS: can the model recombine what it knows?)
    frames        T >= 1; the motion always spans the whole clip
    size          int or (H, W) in pixels, 16 or more
    seed          int >= 0
    motion_words  share of the captions that name the motion; the others say what one frame shows,
                  as most captions of the web do

    self[i]       {"video": uint8 (T, H, W, 3), "labels": {question: int}, "caption": str,
                  "captions": tuple of that one, "facts": dict of str with motion, shape, colour and
                  size, "index": i}, for any i >= 0: a function of (seed, split, i) alone. There is
                  no len(): ask for as many as you like.

    It has the interface of data.VideoFiles: `classes` {question: names}, `only`, `first`,
    `training_captions`, `sentences`, `references`, `choices`, `facts_in`, `summary`. `twin` maps
    each motion label to that of the time-reversed motion. Raises DataError for another split name
    or an impossible size.
    """

    source = "moving shapes"
    has_captions = can_read_facts = True
    prompt_average = "embeddings"
    HELD_OUT = ("val", "unseen", "test")  # the other splits, which training never shows

    def __init__(self, split, frames=16, size=64, seed=0, motion_words=1.0):
        if split not in SPLITS:
            raise DataError(f"no split {split!r} in the generated world: choose one of "
                            f"{', '.join(SPLITS)}")
        self.split, self.frames, self.size, self.seed = split, frames, height_width(size), seed
        self.motion_words = motion_words
        if split == "unseen":
            self.source += ", pairs of shape and colour that training never shows"
        if frames < 1 or min(self.size) < 16 or seed < 0:
            raise DataError(f"generated clips need frames >= 1, size >= 16 and seed >= 0, "
                            f"got frames={frames}, size={size}, seed={seed}")
        self.classes = {"motion": MOTIONS, "shape": SHAPES, "colour": tuple(COLOURS)}
        self.twin = {label: label ^ 1 for label in range(len(MOTIONS))}
        self.looks = [look for look in itertools.product(SHAPES, COLOURS)
                      if (look in HELD_OUT_PAIRS) == (split == "unseen")]
        self.count = None
        self.drawn = {}  # index: (scene, state of its generator afterwards), after `first`

    def first(self, count):
        """Show the first `count` clips over and over from now on: a world with few labels."""
        self.count = count
        return self

    def only(self, question, names):
        """Show only clips of these motions from now on, numbered in this order. Returns self."""
        self.drawn = {}
        if question != "motion":
            raise DataError(f"the generated world can leave out motions, not {question}s")
        self.classes = self.classes | {question: tuple(names)}
        return self

    def summary(self):
        """One line for the user."""
        asks = ", ".join(f"{len(names)} {question}s" for question, names in self.classes.items())
        item = self[0]
        return (f"generated moving shapes: endless, {asks or 'no classes'}, first "
                f"{item.get('caption') or item['question']!r}")

    def training_captions(self):
        """3,000 sentences of this world, to learn a vocabulary from."""
        return [describe(self.scene(i).facts, np.random.default_rng((self.seed, i)))
                for i in range(3000)]

    def sentences(self, prompts=()):
        """Sentences for zero-shot recognition: {question: [[sentence of each class], ...]}.

        Every combination of the three facts has two sentences. A class of one question is all
        sentences that name it: what is not asked for is averaged.
        """
        shape = [len(names) for names in self.classes.values()]
        texts = [describe(dict(zip(self.classes, facts)), np.random.default_rng((self.seed, i, j)))
                 for i, facts in enumerate(itertools.product(*self.classes.values()))
                 for j in range(2)]
        table = np.array(texts, dtype=object).reshape(*shape, 2)
        return {question: np.moveaxis(table, axis, -1).reshape(-1, shape[axis]).tolist()
                for axis, question in enumerate(self.classes)}

    def references(self, batch):
        """Every true sentence about each clip of a batch: a list of tuples of str."""
        return [phrasings(facts) for facts in batch["facts"]]

    def choices(self, batch):
        """Multiple choice: [(sentences, place of the right one), ...] for the clips of a batch."""
        return [choices(facts, np.random.default_rng((self.seed, i)))
                for facts, i in zip(batch["facts"], batch["index"])]

    def facts_in(self, sentence):
        """{question: name} that a sentence states; see `parse_caption`."""
        return parse_caption(sentence)

    def _draw(self, index):
        """(scene, the generator that drew it). Drawing takes longer than reading the pixels from
        the cache, so a clip that comes over and over is drawn once."""
        place = self._place(index)
        if place in self.drawn:
            scene, state = self.drawn[place]
            rng = np.random.default_rng(0)
            rng.bit_generator.state = state
            return scene, rng
        rng = self._rng(index)
        while True:  # with all motions, the first draw is the one
            scene = draw_scene(rng, self.frames, *self.size, self.looks)
            if scene.motion in self.classes.get("motion", MOTIONS):
                break
        if self.count:
            self.drawn[place] = scene, rng.bit_generator.state
        return scene, rng

    def _rng(self, index):
        return np.random.default_rng((self.seed, SPLITS.index(self.split), self._place(index)))

    def _place(self, index):
        """Which clip of the world self[index] is: with `first`, they come over and over."""
        index = operator.index(index)
        if index < 0:
            raise IndexError(f"the generated world starts at index 0 and has no end, got {index}")
        return index % self.count if self.count else index

    def _pixels(self, index, scene):
        """render(scene), or what `set_cache_folder` has kept of it."""
        index = self._place(index)
        if not _shelf or index >= KEPT or self.classes["motion"] != MOTIONS:
            return render(scene)
        shape = (self.frames, *self.size, 3)
        name = f"{self.split}-{'x'.join(map(str, shape))}-{self.seed}"
        record = _records(_shelf / name, 1 + math.prod(shape))[index]
        if not record[0]:
            record[1:] = render(scene).ravel()
            record[0] = 1  # last, so that a reader who sees it finds the pixels
        return np.array(record[1:]).reshape(shape)

    def scene(self, index):
        """The `Scene` behind self[index]."""
        return self._draw(index)[0]

    def __getitem__(self, index):
        scene, rng = self._draw(index)
        if self.motion_words < 1 and rng.random() >= self.motion_words:
            caption = still(scene.facts, self.frames, rng)[1]
        else:
            caption = describe(scene.facts, rng)
        return self._item(index, scene, self._pixels(index, scene), caption)

    def _item(self, index, scene, video, caption):
        labels = {question: names.index(scene.facts[question])
                  for question, names in self.classes.items()}
        return {"video": video, "labels": labels, "caption": caption, "captions": (caption,),
                "facts": scene.facts, "index": index}


class StillShapes(MovingShapes):
    """Single frames of the same world, with sentences that are true of the picture alone.

    self[i]  as MovingShapes, but "video" is one frame of clip i, uint8 (1, H, W, 3), and "caption"
             does not name the motion. See `still`
    """

    def __getitem__(self, index):
        scene, rng = self._draw(index)
        number, caption = still(scene.facts, self.frames, rng)
        return self._item(index, scene, render(scene, [number]), caption)


class ActShapes(MovingShapes):
    """Clips of two acts: a shape does one thing, then, in another shot, another.

    The sentences name both, and which came first.

    frames   of both acts together, 2 or more

    self[i]  {"video": uint8 (T, H, W, 3), "labels": {}, "caption": str, "captions"}. Clips 2k and
             2k+1 have the same shape, colour and motions, in either order: a model that ignores the
             order is right in half of them. A clip has no one class: `classes` is empty.
    """

    HELD_OUT = ("val", "test")
    can_read_facts = False
    limit = "without the order, R@1 cannot pass 50 %"

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.classes = {}

    TEMPLATES = ("{it} {first}, then it {second}", "{it} {first} and later {second}",
                 "first {it} {first}, then it {second}",
                 "{it} {second}, but before that it {first}")

    def __getitem__(self, index):
        drawn = self._rng(operator.index(index) // 2)
        look = self.looks[drawn.integers(len(self.looks))]
        alone = [motion for motion in MOTIONS if motion not in ("meet", "part")]  # one shape's
        motions = drawn.permutation(alone)[:2].tolist()
        rng, acts = np.random.default_rng((self.seed, SPLITS.index(self.split), index, 2)), []
        if index % 2:
            motions.reverse()
        for motion, frames in zip(motions, (self.frames // 2, -(-self.frames // 2))):
            acts.append(draw_scene(rng, frames, *self.size, [look], motion))
        verbs = [rng.choice(MOTION_PHRASES[scene.motion]).item() for scene in acts]
        it = f"{'an' if look[1][0] in 'aeiou' else 'a'} {look[1]} {look[0]}"
        caption = rng.choice(self.TEMPLATES).item().format(it=it, first=verbs[0], second=verbs[1])
        return {"video": np.concatenate([render(scene) for scene in acts]), "labels": {},
                "caption": caption, "captions": (caption,), "index": index}

    # A clip of two acts states no one fact.
    sentences, references, choices = ClipSet.sentences, ClipSet.references, ClipSet.choices
    facts_in = ClipSet.facts_in


class QuestionShapes(MovingShapes):
    """Clips of the same world with a question about each.

    self[i]  as MovingShapes, without a caption, and "question": str, "answer": str. See `ask`
    """

    HELD_OUT = ("val",)

    def __getitem__(self, index):
        scene, rng = self._draw(index)
        question, answer = ask(scene.facts, rng)
        return {"video": render(scene), "labels": {}, "facts": scene.facts, "question": question,
                "answer": answer, "index": index}

    def training_questions(self):
        """3,000 pairs (question, answer) of this world."""
        return [ask(self.scene(i).facts, np.random.default_rng((self.seed, i)))
                for i in range(3000)]


class LongShapes(MovingShapes):
    """Long videos of the same world: shots in a row, each with stillness, a motion, and stillness.

    split, size, seed   as MovingShapes
    shots    least and most shots in a video
    lasts    least and most frames of a motion
    rests    least and most frames of stillness, before a motion and again after it

    self[i]  {"video": uint8 (T, H, W, 3), T differs from video to video, "segments": list of
             (start s, end s, label), one for each motion, "duration": s, "path": a name}. A second
             has FPS frames. Labels are indices into `motions`.

    No cut marks where a motion begins or ends: shots change during stillness, and the camera
    trembles all the time. "appear" and "vanish" take no time, so they are not among the motions.
    """

    FPS = 8

    def __init__(self, split, size=40, seed=0, shots=(3, 5), lasts=(10, 40), rests=(5, 20)):
        super().__init__(split, 1, size, seed)
        self.shots, self.lasts, self.rests = shots, lasts, rests
        self.only("motion", [motion for motion in MOTIONS if motion not in ("appear", "vanish")])
        self.motions = list(self.classes["motion"])

    def scenes(self, index):
        """The shots of self[index], a list of `Scene`."""
        rng, found = self._rng(index), []
        count = rng.integers(self.shots[0], self.shots[1] + 1)
        while len(found) < count:
            before, after = rng.integers(self.rests[0], self.rests[1] + 1, 2).tolist()
            lasts = int(rng.integers(self.lasts[0], self.lasts[1] + 1))
            scene = draw_scene(rng, before + lasts + after, *self.size, self.looks)
            if scene.motion in self.motions:
                found.append(dataclasses.replace(scene, rest=(before, after)))
        return found

    def outline(self, index):
        """All of self[index] but the pixels."""
        begin, segments = 0, []
        for scene in self.scenes(index):
            (before, after), end = scene.rest, begin + len(scene.noise)
            segments.append(((begin + before) / self.FPS, (end - after) / self.FPS,
                             self.motions.index(scene.motion)))
            begin = end
        return {"segments": segments, "duration": begin / self.FPS,
                "path": f"moving shapes, {self.split} {index}"}

    def __getitem__(self, index):
        video = np.concatenate([render(scene) for scene in self.scenes(index)])
        return self.outline(index) | {"video": video}


def height_width(size):
    """int or (H, W) -> (H, W)"""
    return (size, size) if np.ndim(size) == 0 else tuple(size)


def main(argv=None):
    """`python -m video.moving_shapes`: print a clip's facts and draw a clip of each motion."""
    import argparse

    from engine import pictures

    parser = argparse.ArgumentParser(prog="python -m video.moving_shapes",
                                     description="Draw a clip of each motion.")
    parser.add_argument("--out", default="runs/moving_shapes.png",
                        help="where the picture goes (.png)")
    args = parser.parse_args(argv)
    world = MovingShapes("train", frames=8)
    item = world[0]
    print(item["caption"], item["facts"], f"labels {item['labels']}", item["video"].shape, sep="\n")
    motions = [world.scene(i).motion for i in range(500)]
    items = [world[motions.index(motion)] for motion in MOTIONS]
    path = Path(args.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures.sheet([pictures.strip(item["video"], 8) for item in items], path,
                   [f"{motion}: {item['caption']}" for motion, item in zip(MOTIONS, items)],
                   columns=1)
    print(f"drawn: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
