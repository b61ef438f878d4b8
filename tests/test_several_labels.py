"""What is proved about clips that have several labels:

a batch holds a one for each.
"""

import numpy as np
import torch

import data


def item(**labels):
    return {"video": np.zeros((1, 2, 2, 3), np.uint8), "labels": labels, "path": "x.mp4",
            "part": None}


def test_a_batch_holds_a_one_for_each_label_and_minus_one_or_no_one_where_there_is_none():
    batch = data.collate([item(actions=np.array([0, 1, 1], np.uint8), place=2),
                          item(place=0), item(actions=np.array([1, 0, 0], np.uint8))])
    assert torch.equal(batch["labels"]["actions"],
                       torch.tensor([[0.0, 1, 1], [0, 0, 0], [1, 0, 0]]))
    assert torch.equal(batch["labels"]["place"], torch.tensor([2, 0, -1]))
    assert batch["labels"]["place"].dtype == torch.int64 and batch["part"] == [None] * 3
