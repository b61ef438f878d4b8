"""The variants as stages: `python -m variants.cards mae-divided` or `mae-dual`.

Importing this file registers both stages, as in tools/claims.py. They have the flags and results of
`python train.py mae`.
"""

from dataclasses import dataclass

import torch

import mae
import train
from engine import processes
from engine.errors import UserError
from variants.divided_attention import DividedVideoMAE
from variants.dual_masking import (
    DualMaskedVideoMAE, dual_masking_loss, hidden_among_decoded, running_cell_mask)


@dataclass
class DividedAttention(train.MaskedModelling, name="mae-divided"):
    """Stage 1 with divided attention: over time, then over space."""

    network = DividedVideoMAE

    def build(self, train_set):
        if self.mask_type != "tube":
            raise UserError("--mask-type: divided attention needs the same hidden places in every "
                            "frame; use tube")
        return super().build(train_set)


@dataclass
class DualMasking(train.MaskedModelling, name="mae-dual"):
    """Stage 1 with a decoder that reconstructs only half of the tokens (VideoMAE V2)."""

    network = DualMaskedVideoMAE

    def build(self, train_set):
        model = super().build(train_set)
        h, w = model.encoder.grid_of(self.num_frames, *self.sides)[1:]
        if h % 2 or w % 2:
            raise UserError(f"--input-size {self.input_size}: dual masking needs an even token "
                            f"grid, this one is {h} x {w}")
        return model

    def loss(self, model, batch, rng):
        video = batch["video"].permute(0, 4, 1, 2, 3)  # (B, 3, T, H, W), uint8
        hidden = self.draw_mask(len(video), model.grid, rng, model.training)
        rows, mine = len(video), slice(None)
        if model.training:
            rows, mine = processes.global_rows(len(video))
        grid = model.encoder.grid_of(*video.shape[2:])
        skipped = running_cell_mask(rows, grid, rng)[mine]
        weight = hidden_among_decoded(hidden, skipped).to(video.device)
        count = processes.mean(weight.float().sum()) if model.training else None
        target = mae.reconstruction_target(video, ~skipped, self.normalise,
                                           tubelet=model.encoder.tubelet)
        with self.autocast():
            prediction = model(video, hidden, skipped)
        loss = dual_masking_loss(prediction, target, weight, count=count)
        metrics = {"loss": loss.detach()}
        if self.normalise and not model.training:
            metrics["trivial_loss"] = dual_masking_loss(torch.zeros_like(target), target, weight)
        return loss, metrics


if __name__ == "__main__":
    raise SystemExit(train.main())
