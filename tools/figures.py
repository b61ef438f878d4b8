"""Make the figures of README.md and docs/ from runs/default: `make figures`.

    figures/system.png          the four stages and their files, from BOXES
    figures/moving_shapes.png   the generated world: a clip of each of eight motions
    figures/reconstruction.png  the masked autoencoder's prediction for a held-out clip
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


# (left, bottom, width, height) in a plane about 100 wide; file, what it does, colour
BOXES = {
    "clip": ((0, 18, 15, 10), "data.py\nvideo/", "clips, captions,\nlabels", "#eeeeee"),
    "masked": ((23, 30, 22, 12), "mae.py",
               "VideoMAE: sees a quarter,\nattends in space and time", "#cfe3f7"),
    "decoder": ((52, 33, 20, 9), "mae.py", "decoder: predicts\nwhat was hidden", "#cfe3f7"),
    "video": ((23, 12, 22, 12), "uniformerv2.py",
              "CLIP's frames, local and\nglobal units for time", "#d9efd2"),
    "text": ((23, -3, 22, 8), "clip_video.py", "CLIP's text encoder", "#d9efd2"),
    "contrast": ((52, 6, 20, 8), "clip_video.py",
                 "which sentence belongs\nto which video?", "#d9efd2"),
    "caption": ((52, -5, 20, 8), "caption_decoder.py",
                "writes a sentence,\nword by word", "#d9efd2"),
    "cross": ((52, 17, 20, 11), "fusion.py", "cross-model attention\nbehind gates", "#fbe3c0"),
    "scores": ((78, 17, 20, 11), "fusion.py", "learned sum of\nboth scores", "#fbe3c0"),
}
ARROWS = (("clip", "masked"), ("clip", "video"), ("clip", "text"), ("masked", "decoder"),
          ("masked", "cross"), ("video", "cross"), ("video", "contrast"), ("text", "contrast"),
          ("video", "caption"), ("text", "caption"), ("cross", "scores"))


def system(path):
    """Draw all parts of InternVideo as boxes, each with the name of its file."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import FancyBboxPatch

    figure, axis = plt.subplots(figsize=(10, 5.3), facecolor="white")
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.99)
    axis.set(xlim=(-1, 101), ylim=(-6.5, 49))
    axis.axis("off")
    for a, b in ARROWS:
        (x, y, w, h), (u, v, _, k) = BOXES[a][0], BOXES[b][0]
        axis.annotate("", (u - 0.4, v + k / 2), (x + w + 0.4, y + h / 2),
                      arrowprops=dict(arrowstyle="-|>", color="#555555", shrinkA=0, shrinkB=0,
                                      lw=1.2))
    for (x, y, w, h), file, what, colour in BOXES.values():
        axis.add_patch(FancyBboxPatch((x, y), w, h, boxstyle="round,pad=0.3", facecolor=colour,
                                      edgecolor="#555555", lw=1))
        axis.text(x + w / 2, y + h - 0.6, file, ha="center", va="top", fontsize=9.5,
                  family="monospace", weight="bold", color="black")
        axis.text(x + w / 2, y + 0.8, what, ha="center", va="bottom", fontsize=8.5, color="black")
    for x, y, text in ((23, 43.2, "1  masked video modelling; 3  with labels"),
                       (23, 24.9, "2  video and language; 3  with labels"),
                       (52, 29, "4  cross-model interaction")):
        axis.text(x, y, text, fontsize=8.5, style="italic", color="#333333")
    axis.text(0, 46.5, "train.py runs all stages; attention.py has the block that every network "
              "is made of; weights/ loads official files", fontsize=8.5, color="#333333")
    figure.savefig(path, dpi=90)
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


def reconstruction(run, path):
    """Draw the input, its visible part and the reconstruction of a held-out clip."""
    model = mae.VideoMAE.from_official(run)
    size = tuple(model.config["image_size"])
    item = moving_shapes.MovingShapes("val", model.config["frames"], size, 0)[CLIP]
    video = torch.as_tensor(item["video"])[None].permute(0, 4, 1, 2, 3)
    hidden = mae.tube_mask(1, model.grid, 0.75, torch.Generator().manual_seed(CLIP))
    clips = reconstruction_pictures(model, video, hidden)
    pictures.reconstruction(clips, path, f"held-out clip: {item['caption']}",
                            model.config["normalised"])


def main():
    """Draw all figures. Returns the exit code: 0, or 2 with one line if a run is missing."""
    default, out = ROOT / "runs" / "default", ROOT / "figures"
    run = default / "mae"
    out.mkdir(exist_ok=True)
    try:
        reconstruction(run, out / "reconstruction.png")
    except weights.WeightsError as error:
        print(f"figures.py: {error}; run `make train` first", file=sys.stderr)
        return 2
    (out / "reconstruction.gif").unlink(missing_ok=True)  # README.md shows only the .png
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
