"""Make the README's figures from runs/default: `make figures`.

    figures/moving_shapes.png   the generated world, a clip of each of eight motions
    figures/reconstruction.png  what the masked autoencoder paints on a held-out clip
    figures/loss.png            its loss, the held-out loss and the trivial baseline
    figures/captions.png        what the caption decoder writes about held-out clips
    figures/gates.png           the bridge between the two encoders opening
    figures/table.png           what each encoder knows alone, and both together

Every figure comes from the weights and logs of a run, never by hand. Refuses to run without one.
"""

import shutil
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import mae  # noqa: E402
import weights  # noqa: E402

CLIP = 3  # which held-out clip README shows; the first one with a motion across the frame


def moving_shapes(path):
    """Eight clips, one of each pair of motions, four frames each."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    world = data.MovingShapes("train", frames=8, size=64)
    first = {}
    for index in range(400):
        item = world[index]
        pair = min(item["label"], world.twin[item["label"]])
        first.setdefault(pair, item)
    figure, axes = plt.subplots(4, 2, figsize=(9, 3.4), facecolor="white", layout="constrained")
    for axis, (_, item) in zip(axes.flat, sorted(first.items())):
        axis.imshow(torch.cat([torch.as_tensor(item["video"][i]) for i in range(0, 8)], dim=1))
        axis.set_title(item["caption"], fontsize=8)
        axis.axis("off")
    figure.savefig(path, dpi=80)
    plt.close(figure)


def reconstruction(run, path):
    """The strip of mae.draw for one held-out clip, hidden as in training."""
    model = mae.VideoMAE.from_official(run)
    item = data.MovingShapes("val", model.config["frames"], tuple(model.config["image_size"]), 0)[CLIP]
    video = data.normalise(torch.as_tensor(item["video"])[None], mae.IMAGENET_MEAN, mae.IMAGENET_STD)
    hidden = mae.tube_mask(1, model.grid, 0.75, torch.Generator().manual_seed(CLIP))
    mae.draw(model, video, hidden, path, f"held-out clip: {item['caption']}")


def main():
    """Draw all figures; exit code 2 with one line where the run is missing."""
    default, out = ROOT / "runs" / "default", ROOT / "figures"
    run = default / "mae"
    out.mkdir(exist_ok=True)
    try:
        reconstruction(run, out / "reconstruction.png")
    except weights.WeightsError as error:
        print(f"figures.py: {error}; run `make train` first", file=sys.stderr)
        return 2
    (out / "reconstruction.gif").unlink()  # the README shows the strip
    moving_shapes(out / "moving_shapes.png")
    for path in (run / "loss.png", default / "clip" / "captions.png", default / "fuse" / "gates.png",
                 default / "table.png"):
        if not path.exists():
            print(f"figures.py: {path} is missing; run `make train` to its end first", file=sys.stderr)
            return 2
        shutil.copy(path, out / path.name)
    for path in sorted(out.iterdir()):
        print(f"{path.relative_to(ROOT)}  {path.stat().st_size // 1024} KiB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
