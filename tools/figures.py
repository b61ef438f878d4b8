"""Make the figures of README.md and docs/ from runs/default: `make figures`.

    figures/system.png          the four stages, files and shapes, from BOXES and ARROWS
    figures/moving_shapes.png   the generated world: a clip of each of eight motions
    figures/reconstruction.png  the masked autoencoder's prediction for a held-out clip
    figures/hidden_90.gif       the same clip with 90 % of it hidden
    figures/loss.png            its training loss, held-out loss and trivial baseline
    figures/captions.png        captions of held-out clips
    figures/gates.png           the gates of cross-model attention during training
    figures/table.png           accuracies of each encoder, and of both together
    figures/claims.png          the results of `make claims`, with docs/claims.md

The last six come from weights and logs of runs. A missing run is an error, except for claims.png,
which is then left out.
"""

import shutil
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import mae  # noqa: E402
import weights  # noqa: E402
from engine import pictures  # noqa: E402
from tasks.reconstruction import reconstruction_pictures  # noqa: E402
from video import moving_shapes  # noqa: E402

CLIP = 3  # index of the held-out clip in README.md, the first with a motion across the frame


STAGE_COLOURS = {"": "#8a8a8a", "1": "#2f6fb0", "2": "#3c8f3c", "3": "#8a5aa8", "4": "#c9761a"}
STAGE_NAMES = {"1": "masked video modelling", "2": "video and language",
               "3": "training on labels", "4": "cross-model interaction"}

# box: ((left, bottom, width, height) in a plane 124 x 78, title, file, what it does, stage)
BOXES = {
    "clip": ((0, 41, 15, 13), "clip", "data.py", "of files or\ngenerated", ""),
    "sentence": ((0, 9, 15, 10), "sentence", "data.py", "tokens", ""),
    "masked": ((31, 49, 21, 14), "masked encoder", "mae.py",
               "attention in space\nand time", "1"),
    "multimodal": ((31, 28, 21, 14), "multimodal encoder", "uniformerv2.py",
                   "CLIP, with local and\nglobal units for time", "2"),
    "text": ((31, 8, 21, 12), "text encoder", "clip_video.py", "CLIP's, causal", "2"),
    "decoder": ((70, 59, 21, 10.5), "decoder", "mae.py", "predicts what is hidden", "1"),
    "masked head": ((70, 46, 21, 9.5), "classifier", "train.py classify", "", "3"),
    "multimodal head": ((70, 33, 21, 9.5), "classifier", "train.py classify", "", "3"),
    "pairs": ((70, 18.5, 21, 10.5), "contrastive loss", "clip_video.py",
              "which belong together?", "2"),
    "caption": ((70, 4, 21, 10.5), "caption decoder", "caption_decoder.py",
                "writes the sentence", "2"),
    "cross": ((105, 37, 19, 16), "cross-model\nattention", "fusion.py", "behind gates", "4"),
    "sum": ((105, 15, 19, 13), "learned sum\nof both scores", "fusion.py", "", "4"),
}
# (stage, shape, place of the shape, what is written below it, corners of the arrow)
ARROWS = (
    ("1", "(B, C, T, H, W)", (23.6, 56.6), "a part hidden",
     [(15, 50), (16.6, 50), (16.6, 56), (31, 56)]),
    ("2", "(B, C, T, H, W)", (23.9, 35.6), "", [(15, 45), (16.6, 45), (16.6, 35), (31, 35)]),
    ("2", "(B, L)", (23, 14.8), "", [(15, 14), (31, 14)]),
    ("1", "(B, Nv, D)", (63, 64.8), "visible", [(52, 59), (55, 59), (55, 64), (70, 64)]),
    ("3", "(B, N, D)", (63, 51.6), "all", [(52, 53), (55, 53), (55, 50.8), (70, 50.8)]),
    ("3", "(B, t, 1+S, D)", (62.5, 38.6), "", [(52, 37.8), (70, 37.8)]),
    ("2", "(B, E)", (64, 27), "", [(52, 33), (59, 33), (59, 26.2), (70, 26.2)]),
    ("2", "(B, t, 1+S, D)", (62, 12.4), "", [(52, 30.5), (54.5, 30.5), (54.5, 11.6), (70, 11.6)]),
    ("2", "(B, E)", (64, 21.8), "", [(52, 17), (59, 17), (59, 21), (70, 21)]),
    ("2", "(B, L, W)", (63, 7.6), "", [(52, 9.5), (54.5, 9.5), (54.5, 6.8), (70, 6.8)]),
    ("4", "(B, N, D)", (97.5, 51.2), "frozen", [(91, 50.6), (105, 50.6)]),
    ("4", "(B, t, 1+S, D)", (97.6, 40), "frozen", [(91, 39.4), (105, 39.4)]),
    ("4", "2 x (B, Y)", (109.5, 31.5), "", [(114.5, 37), (114.5, 28)]),
    ("4", "(B, Y)", (111, 11), "", [(114.5, 15), (114.5, 8)]),
)
BELOW = ("B clips, C colours, T frames of H x W pixels; N tokens of width D, Nv of them visible; t "
         "time steps of S patches and a class token;",
         "L tokens of text, each W wide; E numbers of the joint space; Y classes. train.py runs "
         "all stages; attention.py has the block of all networks.")


def draw_box(axis, place, title, file, what, stage):
    """A box of the system, with a badge where it belongs to a stage."""
    from matplotlib.colors import to_rgb
    from matplotlib.patches import FancyBboxPatch

    (x, y, w, h), colour = place, STAGE_COLOURS[stage]
    pale = [1 - 0.13 * (1 - part) for part in to_rgb(colour)]
    axis.add_patch(FancyBboxPatch((x, y), w, h, boxstyle="round,pad=0,rounding_size=1.2", lw=1.4,
                                  facecolor=pale, edgecolor=colour, zorder=2))
    lines = [(line, dict(weight="bold", fontsize=9)) for line in title.split("\n")]
    lines += [(file, dict(family="monospace", fontsize=8.2))]
    lines += [(line, dict(fontsize=8.2)) for line in what.split("\n") if line]
    for i, (line, style) in enumerate(lines):
        axis.text(x + w / 2, y + h / 2 + 2.5 * ((len(lines) - 1) / 2 - i), line, ha="center",
                  va="center", color="black", zorder=3, **style)
    if stage:
        draw_badge(axis, x, y + h, stage)


def draw_badge(axis, x, y, stage):
    """The number of a stage in a circle."""
    axis.text(x, y, stage, ha="center", va="center", fontsize=8.5, weight="bold", color="white",
              zorder=4, bbox=dict(boxstyle="circle,pad=0.22", fc=STAGE_COLOURS[stage], ec="white"))


def draw_arrow(axis, stage, shape, place, below, corners):
    """An arrow along corners (x, y), with the shape of what goes along it."""
    colour = STAGE_COLOURS[stage]
    axis.plot(*zip(*corners[:-1]), color=colour, lw=1.3, solid_joinstyle="round", zorder=1)
    axis.annotate("", corners[-1], corners[-2], zorder=1, arrowprops=dict(
        arrowstyle="-|>", color=colour, shrinkA=0, shrinkB=0.5, lw=1.3))
    axis.text(*place, shape, ha="center", va="bottom", fontsize=8, family="monospace",
              color="black", zorder=3)
    axis.text(place[0], place[1] - 1.2, below, ha="center", va="top", fontsize=8,
              color="#444444", zorder=3)


def system(path):
    """The whole of InternVideo: boxes with their files, arrows with shapes, stages numbered."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(10, 6.3), facecolor="white")
    figure.subplots_adjust(0, 0, 1, 1)
    axis.set(xlim=(-1.5, 125.5), ylim=(-4, 76))
    axis.axis("off")
    for arrow in ARROWS:
        draw_arrow(axis, *arrow)
    for box in BOXES.values():
        draw_box(axis, *box)
    for (stage, name), x in zip(STAGE_NAMES.items(), (2, 37, 66, 95)):
        draw_badge(axis, x, 73.3, stage)
        axis.text(x + 2.2, 73.2, name, va="center", fontsize=9, color="black")
    for y, line in zip((0.2, -2.4), BELOW):
        axis.text(0, y, line, va="center", fontsize=8, color="#333333")
    figure.savefig(path, dpi=160)
    plt.close(figure)


def motions(path):
    """Draw eight clips of eight frames, one of each pair of motions."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    world = moving_shapes.MovingShapes("train", frames=8, size=64)
    first = {}
    for index in range(400):
        item = world[index]
        motion = item["labels"]["motion"]
        pair = min(motion, world.twin[motion])
        first.setdefault(pair, item)
    figure, axes = plt.subplots(4, 2, figsize=(9, 3.4), facecolor="white", layout="constrained")
    for axis, (_, item) in zip(axes.flat, sorted(first.items())):
        axis.imshow(torch.cat([torch.as_tensor(item["video"][i]) for i in range(0, 8)], dim=1))
        axis.set_title(item["caption"], fontsize=8)
        axis.axis("off")
    figure.savefig(path, dpi=80)
    plt.close(figure)


def reconstruction(run, ratio, path):
    """Draw a held-out clip, its visible part and the reconstruction; `ratio` of it is hidden."""
    model = mae.VideoMAE.from_official(run)
    size = tuple(model.config["image_size"])
    item = moving_shapes.MovingShapes("val", model.config["frames"], size, 0)[CLIP]
    video = torch.as_tensor(item["video"])[None].permute(0, 4, 1, 2, 3)
    hidden = mae.tube_mask(1, model.grid, ratio, torch.Generator().manual_seed(CLIP))
    clips = reconstruction_pictures(model, video, hidden)
    pictures.reconstruction(clips, path, f"held-out clip: {item['caption']}",
                            model.config["normalised"])


def main():
    """Draw all figures. Returns the exit code: 0, or 2 with one line if a run is missing."""
    default, out = ROOT / "runs" / "default", ROOT / "figures"
    run = default / "mae"
    out.mkdir(exist_ok=True)
    try:
        reconstruction(run, 0.5, out / "reconstruction.png")
        reconstruction(run, 0.9, out / "hidden_90.png")
    except weights.WeightsError as error:
        print(f"figures.py: {error}; run `make train` first", file=sys.stderr)
        return 2
    for unused in ("reconstruction.gif", "hidden_90.png"):  # each comes as a picture and a GIF
        (out / unused).unlink(missing_ok=True)
    motions(out / "moving_shapes.png")
    system(out / "system.png")
    for path in (run / "loss.png", default / "clip" / "captions.png",
                 default / "fuse" / "gates.png", default / "table.png"):
        if not path.exists():
            print(f"figures.py: {path} is missing; run `make train` to its end first",
                  file=sys.stderr)
            return 2
        shutil.copy(path, out / path.name)
    claims = ROOT / "runs" / "claims" / "claims.md"
    if claims.exists():
        text = claims.read_text().replace("](claims.png)", "](../figures/claims.png)")
        (ROOT / "docs" / "claims.md").write_text(text)
        shutil.copy(claims.with_suffix(".png"), out / "claims.png")
    for path in sorted(out.iterdir()):
        print(f"{path.relative_to(ROOT)}  {path.stat().st_size // 1024} KiB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
