"""Give an encoder a head for other classes and keep its other weights.

The methods `with_head` of mae.py and uniformerv2.py call these functions.
"""

import torch

import mae
from weights.families import class_of


def rows_of(old, classes, rows):
    """The rows of an old head that the new head starts with, as a list; None = a new head.

    old      number of rows of the old head
    classes  Y
    rows     the row of each class, None for a new one. Default: all rows if the numbers of classes
             are equal, whatever their names (tasks.class_names matches names). For 400 classes
             after the 710 of Kinetics-710 the first 400 rows. These are Kinetics-400 in the order
             of InternVideo and UniFormerV2, but not of VideoMAE V2, whose files look the same.
             Otherwise a new head
    """
    if rows is None and classes and (classes == old or (old, classes) == (710, 400)):
        return list(range(classes))
    return None if rows is None else list(rows)


@torch.no_grad()
def copy_rows(new, old, rows):
    """Copy row rows[i] of the linear layer `old` to row i of `new`; None leaves row i unchanged."""
    kept = [(target, row) for target, row in enumerate(rows) if row is not None]
    if kept:
        targets, rows = map(list, zip(*kept))
        new.weight[targets], new.bias[targets] = old.weight[rows], old.bias[rows]


@torch.no_grad()
def masked(model, classes, rows, options):
    """A VideoClassifier for Y classes with the encoder of a VideoMAE or VideoClassifier.

    options  options of the new model that differ: drop, drop_path, frames, image_size, ...

    From a VideoMAE, fc_norm and head are new, and the last norm of its encoder is dropped.
    """
    pretrained = "classes" not in model.config
    if pretrained:  # its head_eps belongs to the decoder
        options = {"head_eps": mae.Options.head_eps} | options
    new = class_of(model.classifier)(classes=classes, **vars(model.options) | options)
    own, tensors = new.encoder.state_dict(), model.encoder.state_dict()
    tensors = {key: tensors.get(key, own[key]) if key == "stored" else tensors[key] for key in own}
    if "stored" in tensors and tensors["stored"] is not own["stored"]:
        tensors["stored"] = mae.resize_positions(tensors["stored"], model.encoder.grid,
                                                 new.encoder.grid)
    new.encoder.load_state_dict(tensors)
    if not pretrained:
        new.fc_norm.load_state_dict(model.fc_norm.state_dict())
        rows = rows_of(model.config["classes"], classes, rows)
        if rows is not None:
            copy_rows(new.head, model.head, rows)
    return new


def multimodal(model, classes, norm, rows, options):
    """A UniFormerV2 for Y classes with the weights of another.

    norm     a LayerNorm whose weights the head's norm starts with; default: this model's own, if it
             has one
    options  options of the new model that differ: head_dropout, drop_path, mean, std, ...
    """
    new = type(model)(**vars(model.options) | options | {"classes": classes})
    # A model without a head has no norm either.
    tensors = {key: x for key, x in model.state_dict().items()
               if not key.startswith("head.") and (classes or not key.startswith("norm."))}
    if norm is not None:
        tensors |= {f"norm.{key}": x for key, x in norm.state_dict().items()}
    missing, unknown = new.load_state_dict(tensors, strict=False)
    assert not unknown and all(key.startswith(("norm.", "head.")) for key in missing), \
        (missing, unknown)
    rows = rows_of(model.options.classes, classes, rows)
    if rows is not None:
        copy_rows(new.head, model.head, rows)
    return new
