"""Official files, found by our names: one reader, and one way to write down a key map.

A key map is a table of respellings, from our name of a tensor to the official one. Each line is a
regular expression and its replacement, applied to what the line above gave. Reading a table teaches
both layouts:

    encoder.embed.weight  --OFFICIAL-->  encoder.patch_embed.proj.weight
                          --HUGGING_FACE-->  videomae.embeddings.patch_embeddings.projection.weight

A layout that differs by a prefix, or another library's names, is a further table after the first. A
name with braces is several official tensors, stacked along dim 0 into one of ours.

>>> spell("blocks.3.qkv.bias", ((r"qkv", "{q,k,v}_proj"),), ((r"^", "backbone."),))
('backbone.blocks.3.q_proj.bias', 'backbone.blocks.3.k_proj.bias', 'backbone.blocks.3.v_proj.bias')
"""

import math
import re
from collections import Counter

from weights.families import bare
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
    """The table for a model that is a part of a larger one, in both under the same prefix."""
    return tuple((f"^{re.escape(prefix)}{pattern[1:]}", prefix + replacement)
                 if pattern.startswith("^") else (pattern, replacement)
                 for pattern, replacement in table)


def key_map(model, tables, conversions=None, same="(?!)"):
    """The rules for every tensor of a model, in network order.

    tables       respellings, applied one after the other
    conversions  {our name: (official -> ours, ours -> official)}, for layouts that differ
    same         regular expression of names that are the same in both
    raises       ValueError for a tensor that the first table does not know
    """
    rules = []
    for name in model.state_dict():
        if spell(name, tables[0]) == name and not re.fullmatch(same, name):
            raise ValueError(f"{name} belongs to a part that is unknown to the official code")
        rules.append(Rule(name, spell(name, *tables), *(conversions or {}).get(name, (None, None))))
    return rules


def as_matrix(kernel):
    """A convolution whose stride is its size is a matrix: (D, C, ...) -> (D, C * the rest)."""
    return kernel.flatten(1) if kernel.ndim in (4, 5) else kernel


def as_kernel(*shape):
    """The way back: (D, n) -> (D, *shape)."""
    return lambda matrix: matrix.unflatten(1, shape)


def commonest(values):
    """The value that most tensors agree on, so that one misshapen tensor is named alone."""
    return Counter(values).most_common(1)[0][0]


class OfficialFile:
    """A file of weights, whose tensors and sizes are found by our names.

    source     path or {name: tensor}; see `read`
    component  name of the part to take, where a run of ours holds several models
    tables     respellings from our names to the file's; subclasses set them

    In the methods a name may hold "#", which stands for the number of every block, and may be a
    pair (name, axis), axis 0 otherwise.
    """

    tables = ()

    def __init__(self, source, component=None):
        self.tensors, self.config = part(*read(source), component)
        self.name = name_of(source)
        if not self.config:
            self.tensors = bare(self.tensors, self.name)

    def spell(self, name):
        """What this file calls our tensor `name`."""
        return spell(name, *self.tables)

    def keys(self, name):
        """All names of the file that our `name` stands for, whether the file has them or not."""
        blocks, number, rest = name.partition("#")
        if not number:
            return [self.spell(name)]
        return [self.spell(f"{blocks}{i}{rest}") for i in range(self.depth(blocks))]

    def has(self, *names):
        """True where the file holds a tensor whose name begins like one of these."""
        starts = tuple(key for name in names for key in self.keys(name))
        return any(key.startswith(starts) for key in self.tensors)

    def depth(self, blocks):
        """Number of blocks: one more than the largest i in the names that begin with blocks + i."""
        prefix = self.spell(blocks)
        numbers = [key[len(prefix):].split(".")[0]
                   for key in self.tensors if key.startswith(prefix)]
        return max((int(number) + 1 for number in numbers if number.isdigit()), default=0)

    def size(self, *names):
        """The size that most of these tensors agree on; WeightsError where none is in the file."""
        found, missing = [], None
        for name in names:
            name, axis = (name, 0) if isinstance(name, str) else name
            for key in self.keys(name) or [self.spell(name.replace("#", "0"))]:
                missing = missing or key
                if key in self.tensors and self.tensors[key].ndim > axis:
                    found.append(self.tensors[key].shape[axis])
        if not found:
            raise WeightsError(f"{self.name}: missing: {missing}")
        return commonest(found)

    def width(self, block):
        """D of the blocks whose names begin so, as "encoder.blocks.#."."""
        return self.size(block + "norm1.weight", block + "norm2.weight", block + "mlp.fc2.bias")

    def rows(self, *names):
        """The length that all these tensors must agree on: 0 where the file has none of them."""
        keys = [self.spell(name) for name in names]
        found = {key: len(self.tensors[key]) for key in keys
                 if key in self.tensors and self.tensors[key].ndim}
        if len(set(found.values())) > 1:  # one against one: no majority
            raise WeightsError(f"{self.name}: wrong shape: " + ", ".join(
                f"{key} has {count} rows" for key, count in found.items()))
        return next(iter(found.values()), 0)

    def shape(self, name, *dimensions):
        """Shape of a tensor that must have so many dimensions; WeightsError where it has not."""
        key = self.spell(name)
        if key not in self.tensors:
            raise WeightsError(f"{self.name}: missing: {key}")
        shape = tuple(self.tensors[key].shape)
        if len(shape) not in dimensions:
            raise WeightsError(f"{self.name}: wrong shape: {key} has {len(shape)} dimensions, "
                               f"not {' or '.join(map(str, dimensions))}")
        return shape

    def side(self, positions):
        """Side of the square grid of a table of positions (1 + side*side, D), class token first."""
        places = self.shape(positions, 2)[0] - 1
        side = math.isqrt(max(places, 0))
        if side < 1 or side * side != places:
            raise WeightsError(f"{self.name}: wrong shape: {self.spell(positions)} has {places} "
                               "places besides the class token, which is not a square")
        return side

    def heads(self, width, given=None, keyword="heads", usual=None):
        """Heads of an attention: as given, or of the published model of that width, or of 64."""
        usual = (usual or {}).get(width, 0 if width % 64 else width // 64)
        if not given and not usual:
            raise WeightsError(f"{self.name}: shapes cannot tell how many heads a width of {width} "
                               f"has; pass {keyword}=")
        return given or usual

    def activation(self, config, usual):
        """WeightsError where transformers' configuration asks for another activation."""
        if config.get("hidden_act", usual) != usual:
            raise WeightsError(f"{self.name}: its config.json says hidden_act "
                               f"{config['hidden_act']!r}; only {usual!r} is known here")

    def build(self, cls, *args, **options):
        """The model; WeightsError where the official sizes describe none."""
        try:
            return cls(*args, **options)
        except ValueError as error:
            raise WeightsError(f"{self.name}: {error}") from None

    def fill(self, model, rules):
        """The model, filled to the last tensor, in eval mode."""
        return fill(model, self.tensors, rules, name=self.name).eval()
