"""Base of the stages that hide a part of each clip, and pictures of the reconstruction.

    video (B, 3, T, H, W), hidden (B, N) -> {"input", "visible", "reconstruction", "trivial"}

`reconstruction_pictures` makes these four clips, engine.pictures.reconstruction draws them.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

import mae
from engine import pictures, processes
from engine.errors import UserError
from engine.stage import ClipStage, flag, generator
from video.transforms import normalise


@dataclass
class MaskedStage(ClipStage):
    """A stage that hides a part of each clip and uses no labels."""

    mask_ratio: float = flag(0.75, "share of each frame that is hidden", low=0, high=1)
    mask_type: str = flag("tube", "tube = the same places in every frame", choices=tuple(mae.MASKS))
    sampling_rate: int = flag(4, "a clip takes every n-th frame of a video", low=1, group="clips")
    sampling: str = flag("dense")

    def datasets(self):
        """Clips without labels and sentences."""
        train_set, held_out = self.open_sets(stride=self.sampling_rate)
        return train_set, {"val": held_out["val"]}

    def check_mask(self, grid):
        """UserError if the mask hides nothing or everything of a token grid (t, h, w)."""
        t, h, w = grid
        count, unit = (t, "frames") if self.mask_type == "frame" else (h * w, "places of a frame")
        if not 0 < int(self.mask_ratio * count) < count:
            raise UserError(f"--mask-ratio {self.mask_ratio}: must hide at least one of the "
                            f"{count} {unit} and leave at least one")

    def draw_mask(self, clips, grid, rng, training):
        """Draw a mask: (clips, t*h*w) bool, True = hidden.

        In training all processes draw the same masks, for all clips, and each takes its own rows.
        """
        rows, mine = processes.global_rows(clips) if training else (clips, slice(None))
        return mae.MASKS[self.mask_type](rows, grid, self.mask_ratio, rng)[mine]


@torch.no_grad()
def reconstruction_pictures(model, video, hidden):
    """The four clips to draw: {name: (B, 3, T, H, W) float in [0, 1]}.

    model          mae.VideoMAE
    video, hidden  as in mae.VideoMAE.forward
    returns        "input"; "visible", the input with grey hidden tubelets; "reconstruction"; and
                   "trivial", the prediction without a model (mae.trivial_prediction)

    A model of normalised pixels predicts structure, not brightness. Its "reconstruction" takes mean
    and contrast of each hidden tubelet from the input. Its "trivial" takes the mean.
    """
    patch, tubelet = model.encoder.patch, model.encoder.tubelet
    targets = mae.split_by_mask(hidden)[1].to(video.device)
    every = torch.arange(hidden.shape[1], device=video.device).expand(len(video), -1)
    pixels = put_tubelets(video.float(), every, mae.tubelet_pixels(video, every, patch, tubelet),
                          patch, tubelet)
    true = mae.tubelet_pixels(video, targets, patch, tubelet)                # (B, Nm, 3, pixels)
    predicted = model(video, hidden).float().unflatten(-1, (-1, 3)).transpose(2, 3)
    trivial = mae.trivial_prediction(video, hidden, model.config["normalised"], patch=patch,
                                tubelet=tubelet).unflatten(-1, (-1, 3)).transpose(2, 3)
    if model.config["normalised"]:
        mean, contrast = mae.tubelet_statistics(true)
        predicted, trivial = (x * contrast + mean for x in (predicted, trivial))
    filled = {"input": true, "visible": torch.full_like(true, 0.5), "reconstruction": predicted,
              "trivial": trivial}
    return {name: put_tubelets(pixels, targets, tubelets, patch, tubelet).clamp(0, 1)
            for name, tubelets in filled.items()}


def put_tubelets(video, index, tubelets, patch, tubelet):
    """The inverse of mae.take_tubelets: a copy of the video with these tubelets replaced."""
    B, C, T, H, W = video.shape
    t, h, w = T // tubelet, H // patch, W // patch
    video = video.clone(memory_format=torch.contiguous_format)
    cut = video.view(B, C, t, tubelet, h, patch, w, patch).permute(0, 2, 4, 6, 1, 3, 5, 7)
    row = torch.arange(B, device=index.device)[:, None]
    cut[row, index // (h * w), index // w % h, index % w] = \
        tubelets.reshape(*index.shape, C, tubelet, patch, patch).to(video.dtype)
    return video


def draw(stage, model, batch, folder):
    """Draw up to four clips of a batch with the masks of `stage`: reconstruction_0.png, .gif, ...

    Returns the paths.
    """
    paths = []
    for i in range(min(4, len(batch["video"]))):
        video = normalise(batch["video"][i:i + 1], mae.IMAGENET_MEAN, mae.IMAGENET_STD)
        hidden = stage.draw_mask(1, model.grid, generator(stage.seed, "picture", i), training=False)
        title = batch["caption"][i] if "caption" in batch else Path(batch["path"][i]).name
        paths += pictures.reconstruction(reconstruction_pictures(model, video, hidden),
                                         folder / f"reconstruction_{i}.png",
                                         f"held-out clip: {title}", model.config["normalised"])
    return paths
