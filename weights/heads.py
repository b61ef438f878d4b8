"""Give an encoder a head for other classes, and keep the rest of its weights.

mae and uniformerv2 call these functions in their method `with_head`.
"""

import torch

import mae
from weights.families import class_of


def rows_of(old, classes, rows):
    """Which rows of a head for `old` classes a head for Y classes starts with; None = a new head.

    rows  Y numbers, None for a class that starts anew. Default: the whole head for as many
          classes, whatever they are called (tasks.class_names matches names). 400 classes
          after the 710 of Kinetics-710: its first 400 rows, which are Kinetics-400 in InternVideo's
          and UniFormerV2's order (not in VideoMAE V2's, and no shape tells them apart).
          Any other number: a new head.
    """
    if rows is None and classes and (classes == old or (old, classes) == (710, 400)):
        return list(range(classes))
    return None if rows is None else list(rows)


@torch.no_grad()
def copy_rows(new, old, rows):
    """Copy these rows of the linear layer `old` into `new`, one after another; None: leave it."""
    kept = [(place, row) for place, row in enumerate(rows) if row is not None]
    if kept:
        places, rows = map(list, zip(*kept))
        new.weight[places], new.bias[places] = old.weight[rows], old.bias[rows]


@torch.no_grad()
def masked(model, classes, rows, options):
    """A VideoClassifier for Y classes with the encoder of a VideoMAE or VideoClassifier.

    options  of the new model, where they differ: drop, drop_path, frames, image_size, ...

    The encoder's own norm in a VideoMAE is left behind; fc_norm and head are then new.
    """
    pretrained = "classes" not in model.config
    if pretrained:  # its head_eps is that of the decoder
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

    norm     a LayerNorm to start the head's norm with; default: this model's, where it has one
    options  of the new model, where they differ: head_dropout, drop_path, mean, std, ...
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
