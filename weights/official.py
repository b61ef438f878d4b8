"""Read official files by our names of tensors; the form of key maps.

A key map is a table of (regular expression, replacement), which converts our name of a tensor to
the official one. Each line is applied to the result of the line before:

    encoder.embed.weight  --OFFICIAL-->  encoder.patch_embed.proj.weight
                          --HUGGING_FACE-->  videomae.embeddings.patch_embeddings.projection.weight

Another prefix, or the names of another library, are one more table after the first. A name with
braces stands for several official tensors, which are stacked along dim 0 into one of ours.

>>> spell("blocks.3.qkv.bias", ((r"qkv", "{q,k,v}_proj"),), ((r"^", "backbone."),))
('backbone.blocks.3.q_proj.bias', 'backbone.blocks.3.k_proj.bias', 'backbone.blocks.3.v_proj.bias')
"""

import math
import re
from collections import Counter

from weights.families import without_prefix
from weights.files import Rule, WeightsError, fill, name_of, part, read


def spell(name, *tables):
    """The official name of our tensor `name`; a tuple where several are stacked into it."""
    for table in tables:
        for pattern, replacement in table:
            name = re.sub(pattern, replacement, name)
    if "{" not in name:
        return name
    before, middle, after = re.split("[{}]", name)
    return tuple(before + piece + after for piece in middle.split(","))


def under(prefix, table):
    """The table of a model that is part of a larger one, with this prefix in both layouts."""
    return tuple((f"^{re.escape(prefix)}{pattern[1:]}", prefix + replacement)
                 if pattern.startswith("^") else (pattern, replacement)
                 for pattern, replacement in table)


def key_map(model, tables, conversions=None, same="(?!)"):
    """The rules for every tensor of a model, in network order.

    tables       tables of replacements, applied one after the other
    conversions  {our name: (official -> ours, ours -> official)}, for layouts that differ
    same         regular expression of names that are equal in both
    raises       ValueError for a tensor that neither the first table nor `same` knows
    """
    rules = []
    for name in model.state_dict():
        if spell(name, tables[0]) == name and not re.fullmatch(same, name):
            raise ValueError(f"{name} belongs to a part that is unknown to the official code")
        rules.append(Rule(name, spell(name, *tables), *(conversions or {}).get(name, (None, None))))
    return rules


def as_matrix(kernel):
    """The kernel of a convolution whose stride equals its size, as the matrix of a linear layer:
    (D, C, ...) -> (D, C * ...). Other tensors stay unchanged."""
    return kernel.flatten(1) if kernel.ndim in (4, 5) else kernel


def as_kernel(*shape):
    """The reverse of `as_matrix`, as a function: (D, n) -> (D, *shape)."""
    return lambda matrix: matrix.unflatten(1, shape)


def commonest(values):
    """The most frequent value. If one tensor has a wrong shape, the others decide, and the message
    then names only that tensor."""
    return Counter(values).most_common(1)[0][0]


class OfficialFile:
    """A file of weights. Its tensors and sizes are found by our names.

    source     path or {name: tensor}; see `read`
    component  the model to take from a run of ours that holds several
    tables     key map from our names to those of the file; subclasses set it

    The methods take our names. "#" in a name stands for the numbers of all blocks. A name may be a
    pair (name, axis); otherwise the axis is 0.
    """

    tables = ()

    def __init__(self, source, component=None):
        self.tensors, self.config = part(*read(source), component)
        self.name = name_of(source)
        if not self.config:
            self.tensors = without_prefix(self.tensors, self.name)

    def spell(self, name):
        """The name in this file of our tensor `name`."""
        return spell(name, *self.tables)

    def keys(self, name):
        """The names in this file for our `name`, whether the file has them or not."""
        blocks, number, rest = name.partition("#")
        if not number:
            return [self.spell(name)]
        return [self.spell(f"{blocks}{i}{rest}") for i in range(self.depth(blocks))]

    def has(self, *names):
        """True if the name of some tensor in the file begins with one of these names."""
        starts = tuple(key for name in names for key in self.keys(name))
        return any(key.startswith(starts) for key in self.tensors)

    def depth(self, blocks):
        """Number of blocks: 1 + the largest i in names that begin with `blocks` and i."""
        prefix = self.spell(blocks)
        numbers = [key[len(prefix):].split(".")[0]
                   for key in self.tensors if key.startswith(prefix)]
        return max((int(number) + 1 for number in numbers if number.isdigit()), default=0)

    def size(self, *names):
        """The most frequent size of these tensors. WeightsError if none of them is in the file."""
        sizes, missing = [], None
        for name in names:
            name, axis = (name, 0) if isinstance(name, str) else name
            for key in self.keys(name) or [self.spell(name.replace("#", "0"))]:
                missing = missing or key
                if key in self.tensors and self.tensors[key].ndim > axis:
                    sizes.append(self.tensors[key].shape[axis])
        if not sizes:
            raise WeightsError(f"{self.name}: missing: {missing}")
        return commonest(sizes)

    def width(self, block):
        """D of the blocks with this prefix, such as "encoder.blocks.#."."""
        return self.size(block + "norm1.weight", block + "norm2.weight", block + "mlp.fc2.bias")

    def rows(self, *names):
        """The number of rows of these tensors, which must be equal; 0 if the file has none of them.
        """
        keys = [self.spell(name) for name in names]
        counts = {key: len(self.tensors[key]) for key in keys
                  if key in self.tensors and self.tensors[key].ndim}
        if len(set(counts.values())) > 1:  # with two tensors there is no majority
            raise WeightsError(f"{self.name}: wrong shape: " + ", ".join(
                f"{key} has {count} rows" for key, count in counts.items()))
        return next(iter(counts.values()), 0)

    def shape(self, name, *dimensions):
        """Shape of a tensor. WeightsError if its number of dimensions is not in `dimensions`."""
        key = self.spell(name)
        if key not in self.tensors:
            raise WeightsError(f"{self.name}: missing: {key}")
        shape = tuple(self.tensors[key].shape)
        if len(shape) not in dimensions:
            raise WeightsError(f"{self.name}: wrong shape: {key} has {len(shape)} dimensions, "
                               f"not {' or '.join(map(str, dimensions))}")
        return shape

    def side(self, positions):
        """Side of the square grid of a position table (1 + side*side, D), class token first."""
        count = self.shape(positions, 2)[0] - 1
        side = math.isqrt(max(count, 0))
        if side < 1 or side * side != count:
            raise WeightsError(f"{self.name}: wrong shape: {self.spell(positions)} has {count} "
                               "positions besides the class token, which is not a square number")
        return side

    def heads(self, width, given=None, keyword="heads", usual=None):
        """Number of attention heads: `given`, or that of the published model of this width, or
        width / 64. WeightsError if none of these applies."""
        usual = (usual or {}).get(width, 0 if width % 64 else width // 64)
        if not given and not usual:
            raise WeightsError(f"{self.name}: shapes do not show the number of heads for a width "
                               f"of {width}; pass {keyword}=")
        return given or usual

    def activation(self, config, usual):
        """WeightsError if transformers' configuration names another activation than `usual`."""
        if config.get("hidden_act", usual) != usual:
            raise WeightsError(f"{self.name}: its config.json says hidden_act "
                               f"{config['hidden_act']!r}; only {usual!r} is known here")

    def build(self, cls, *args, **options):
        """cls(*args, **options). WeightsError if the sizes of the file do not fit together."""
        try:
            return cls(*args, **options)
        except ValueError as error:
            raise WeightsError(f"{self.name}: {error}") from None

    def fill(self, model, rules):
        """Fill every tensor of the model. Returns it in eval mode."""
        return fill(model, self.tensors, rules, name=self.name).eval()
