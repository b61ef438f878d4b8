"""Say which sentence belongs to which video: two towers that meet in one space.

Why: labels name one fact of a clip, captions name many, and the web is full of them. Nobody needs
to know what is in the words. It is enough that in a batch of B pairs each video must find its own
sentence among B, and each sentence its video: 2*B questions of B answers each, all but one of them
wrong ("negatives"), for the price of 2*B encodings (CLIP, arXiv 2103.00020, Sec. 2.3, Selecting an
Efficient Pre-Training Method; InternVideo, arXiv 2212.03191, Sec. 3.2, Self-Supervised Video
Pretraining). What comes out can name things it was
never given labels for.

    video (B, C, T, H, W) --visual tower--> feature (B, D) --norm, project--> (B, E) --+
                                            tokens (B, t, 1+S, D), for captions        | cosines
                                                                                       | (B, B)
    text ids (B, L) --text tower, causal--> tokens (B, L, W) --at the end--> (B, E) ---+
    loss = cross entropy of exp(logit_scale) * cosines, rows and columns; the truth is the diagonal

Cosines lie between -1 and 1: a softmax of them would be almost flat, however right they are. The factor
exp(logit_scale), one over the temperature, is learned too; it starts at 1/0.07 and is kept within 1
and 100 (ViCLIP's: at most 100).

The idea, in steps:
1. `Tokenizer` cuts sentences into pieces of words: the commonest pairs of symbols, merged again and
   again (byte-pair encoding, arXiv 1508.07909, Sec. 3.2). Any text can be written, none is unknown.
2. `TextTower` reads from left to right. Only its end-of-text token has seen the whole sentence, so
   that one speaks for it, and nothing after it can matter. `TextTower.step` reads word by word, for
   caption_decoder.py.
3. `VideoCLIP` joins it to one of three visual towers: UniFormerV2 ("video", InternVideo's own), the
   same without its video parts ("frames": plain CLIP, averaged over frames), or `JointTower`, where
   all tokens of all frames see each other ("joint": ViCLIP, arXiv 2307.06942, Sec. 4).
4. `contrastive_loss` is the question above. Two clips of a batch with one caption are not each other's
   negatives: `targets` says so. Large batches make it hard and the embedding good:
   `BlockedLoss` never holds all B*B numbers, `gather_with_gradient` joins the batches of several
   processes, and `in_pieces` takes a batch that does not fit into memory bit by bit.
5. `zero_shot` classifies with sentences in place of labels; `retrieval_metrics` counts how often
   the right one comes first, with and without the dual softmax, ties never in our favour.

Where we differ from the official code (InternVideo1 clip_utils/model.py, ViCLIP viclip.py), with
equal numbers: batch first; captions may be cut to the longest of a batch, which a causal tower
cannot notice. ViCLIP orders its tokens by place, then time; ours are time slowest, as everywhere.
CLIP and InternVideo learn the logarithm of a scale, ViCLIP a temperature: both are kept, and
`VideoCLIP.logit_scale` is the logarithm for either. Text and weights that do not fit are refused.

Numbers: B/16 has 150 M parameters (86 M see, 63 M read), 178 M with InternVideo's four global
blocks. At B = 8192 the plain loss takes 1.4 GB, in blocks 0.24 GB and 15 % less time.

>>> model = VideoCLIP("tiny", frames=4, image_size=32, vocabulary=600, context=16)
>>> video, ids = torch.randn(3, 3, 4, 32, 32), torch.randint(600, (3, 16))
>>> model.encode_video(video).shape, model.encode_text(ids).shape    # (B, E) both
(torch.Size([3, 128]), torch.Size([3, 128]))
>>> loss = contrastive_loss(*model(video, ids))
>>> tokenizer = train_tokenizer(["a red ring orbits", "a blue star spins"] * 2, vocabulary=600)
>>> ids, is_token = tokenizer.encode(["a red star"], 16)
>>> tokenizer.decode(ids), int(is_token.sum())                       # start, three words, end
(['a red star'], 5)
"""

import functools
import gzip
import html
import json
import math
import os
import re
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn

import uniformerv2
import weights
from attention import Block, Context, Mask, attention, quick_gelu, run_blocks
from engine.processes import gather_with_gradient, joined, piece
from uniformerv2 import UniFormerV2, as_kernel, as_matrix, block_rules, official_rules, pairs
from weights import Rule, WeightsError, commonest

# Red, green, blue of pixels in [0, 1]. CLIP and InternVideo-MM were trained on clips normalised with
# the first, ViCLIP with ImageNet's.
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class TextSize:
    """The measures of a text tower. The joint space is as wide as the tower: E = width."""

    width: int
    depth: int
    heads: int


TEXT_SIZES = {  # CLIP, Tab. 20, "CLIP-ViT hyperparameters"
    "tiny": TextSize(128, 4, 2),  # ours
    "b16": TextSize(512, 12, 8),
    "l14": TextSize(768, 12, 12),
    "l14_336": TextSize(768, 12, 12),
}


# ------------------------------------------------------------------------------------------------
# Text into numbers

START, END, PAD = "<|startoftext|>", "<|endoftext|>", "<|pad|>"
# What other files call the same three.
SPOKEN = ((START, "<start_of_text>", "[CLS]", "<s>", "<bos>"),
          (END, "<end_of_text>", "[SEP]", "</s>", "<eos>"),
          (PAD, "[PAD]", "<pad>"))
# CLIP's words: English contractions, runs of letters, single digits, runs of anything else.
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@functools.lru_cache(maxsize=None)
def repair():
    """ftfy's function that repairs wrongly decoded characters, where it is installed; else one that changes nothing. Asked
    once: Python searches for what is not there anew each time, which took longer than all the rest of a sentence."""
    try:
        import ftfy
    except ImportError:
        return lambda text: text
    return ftfy.fix_text


class Tokenizer:
    """Sentences to token numbers and back.

    engine     a tokenizers.Tokenizer
    start, end, pad, vocabulary   three token numbers and how many there are
    """

    def __init__(self, engine):
        self.engine, self.vocabulary = engine, max(engine.get_vocab().values(), default=-1) + 1
        found = [next((name for name in names if engine.token_to_id(name) is not None), None)
                 for names in SPOKEN]
        if None in found[:2]:
            raise ValueError(f"a tokenizer without a start or end token: knows none of "
                             f"{', '.join(SPOKEN[found.index(None)])}")
        self.start, self.end = map(engine.token_to_id, found[:2])
        self.pad = engine.token_to_id(found[2]) if found[2] else 0  # CLIP pads with 0, which is "!"
        # Python's lower() knows that a Greek sigma ends a word; the engine's does not.
        state = json.loads(engine.to_str())["normalizer"]
        self.lower = "Lowercase" in json.dumps(state) or bool((state or {}).get("lowercase"))

    def clean(self, text):
        """CLIP's cleaning: repair wrongly decoded characters (if ftfy is installed), resolve HTML
        entities, twice, make every run of white space one blank, lower case."""
        if not isinstance(text, str):
            raise ValueError(f"a caption must be text, got {type(text).__name__}: {str(text)[:40]!r}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"a caption holds half a character (a lone surrogate) at "
                             f"{error.start}: {text[:40]!r}") from None
        text = re.sub(r"\s+", " ", html.unescape(html.unescape(repair()(text)))).strip()
        return text.lower() if self.lower else text

    def encode(self, texts, context=77, trim=False):
        """Captions to token numbers: start, pieces, end, padding.

        texts    list of str (or one str). One that does not fit is cut and its last token becomes
                 the end, which speaks for the sentence. An empty one is start and end.
        context  L, at least 2
        trim     make L no longer than the longest caption needs
        returns  ids (B, L) int64, is_token (B, L) bool, True = not padding (start and end count)
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts or context < 2:
            raise ValueError(f"{len(texts)} captions of {context} tokens: needs at least one caption, "
                             "and two tokens for its start and end")
        # One by one: the engine's own threads and a data loader's processes do not mix.
        rows = [[self.start, *self.engine.encode(self.clean(text), add_special_tokens=False).ids,
                 self.end] for text in texts]
        longest = min(context, max(map(len, rows))) if trim else context
        ids = torch.full((len(rows), longest), self.pad)
        is_token = torch.zeros(ids.shape, dtype=torch.bool)
        for i, row in enumerate(rows):
            row = row if len(row) <= longest else row[:longest - 1] + [self.end]
            ids[i, :len(row)], is_token[i, :len(row)] = torch.tensor(row), True
        return ids, is_token

    def decode(self, ids):
        """Token numbers to text, up to the first end: (B, L) or lists -> list of str, (L,) -> str."""
        ids = ids.tolist() if isinstance(ids, torch.Tensor) else list(ids)
        if ids and isinstance(ids[0], (list, torch.Tensor)):
            return [self.decode(row) for row in ids]
        ids = ids[:ids.index(self.end)] if self.end in ids else ids
        text = self.engine.decode([i for i in ids if i != self.start], skip_special_tokens=True)
        return text.replace("</w>", " ").strip()

    def save(self, folder):
        """Write tokenizer.json, which `load_tokenizer` and Hugging Face read, into a folder."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        weights.write_aside(Path(folder) / "tokenizer.json",
                            lambda path: Path(path).write_text(self.engine.to_str(), encoding="utf-8"))


def byte_symbols():
    """512 symbols: a character for every byte, then the same at the end of a word. In CLIP's order:
    bytes that print stand for themselves and come first, the others borrow what comes after 255."""
    prints = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(i) for i in prints] + [chr(256 + i) for i in range(256 - len(prints))]
    return symbols + [symbol + "</w>" for symbol in symbols]


def byte_pairs(merges, first=()):
    """The engine whose vocabulary is `first`, the 512 symbols, a token for each merge, start, end."""
    # Two merges may write the same token; it has one number.
    names = dict.fromkeys([*first, *byte_symbols(), *("".join(pair) for pair in merges), START, END])
    model = models.BPE({name: i for i, name in enumerate(names)}, [tuple(pair) for pair in merges],
                       end_of_word_suffix="</w>")
    engine = tokenizers.Tokenizer(model)
    engine.normalizer = normalizers.Sequence([normalizers.Replace(Regex(r"\s+"), " "),
                                              normalizers.Lowercase()])
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(WORDS), "removed", invert=True),
         pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    engine.decoder = decoders.ByteLevel()
    engine.add_special_tokens([*first, START, END])
    return engine


def train_tokenizer(captions, vocabulary=1000):
    """A byte-pair vocabulary from captions, laid out like CLIP's: the end token has the largest id.

    captions    iterable of str
    vocabulary  most tokens, at least 515: padding, 512 bytes, start and end are always there, and
                pairs seen once are not merged, so it may become smaller
    """
    if vocabulary < 515:
        raise ValueError(f"a vocabulary of {vocabulary}: the bytes and the special tokens alone are 515")
    plain = Tokenizer(byte_pairs([]))
    texts = [plain.clean(caption) for caption in captions]
    if not any(texts):
        raise ValueError("no captions to train a tokenizer on")
    # Named beforehand, all symbols have fixed numbers, and equal counts are resolved by number: the
    # same captions give the same vocabulary.
    trainer = trainers.BpeTrainer(vocab_size=vocabulary - 3, min_frequency=2, show_progress=False,
                                  special_tokens=byte_symbols(), end_of_word_suffix="</w>")
    engine = tokenizers.Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    engine.pre_tokenizer = plain.engine.pre_tokenizer
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else every later fork of the process warns
    try:
        engine.train_from_iterator(texts, trainer)
    finally:
        os.environ.pop("TOKENIZERS_PARALLELISM")
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before
    return Tokenizer(byte_pairs(json.loads(engine.to_str())["model"]["merges"], first=(PAD,)))


def clip_tokenizer(path):
    """CLIP's tokenizer from its list of merges (bpe_simple_vocab_16e6.txt.gz): 49408 tokens."""
    try:
        lines = gzip.decompress(Path(path).read_bytes()).decode().split("\n")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise ValueError(f"{path}: not CLIP's bpe_simple_vocab_16e6.txt.gz ({error})") from None
    merges = [line.split() for line in lines[1:49152 - 256 - 2 + 1]]  # as CLIP simple_tokenizer.py
    if len(merges) != 48894 or any(len(pair) != 2 for pair in merges):
        raise ValueError(f"{path}: not CLIP's list of 48894 merges")
    return Tokenizer(byte_pairs(merges))


def load_tokenizer(path):
    """A tokenizer from a tokenizer.json (ours or Hugging Face's), a folder that holds one, or CLIP's
    merges (.gz)."""
    path = Path(path) / "tokenizer.json" if os.path.isdir(path) else Path(path)
    if not os.path.isfile(path):  # of a pipe one would wait for ever
        raise ValueError(f"{path}: not a file that can be read")
    if path.suffix == ".gz":
        return clip_tokenizer(path)
    try:
        engine = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        engine.no_padding()
        engine.no_truncation()
        return Tokenizer(engine)
    except Exception as error:  # the engine raises nothing narrower
        raise ValueError(f"{path}: not a tokenizer.json ({' '.join(str(error).split())[:100]})") from None


def tokenizer_of(source, given, vocabulary):
    """The tokenizer that belongs to weights.

    source      a run's folder, or a file of weights: tokenizer.json is looked for beside it
    given       path of another tokenizer, or "" or None
    vocabulary  of the model; ValueError where the tokenizer knows more, or where there is none
    """
    folder = Path(source) if os.path.isdir(source) else Path(source).parent
    if not given and not os.path.exists(folder / "tokenizer.json"):
        raise ValueError(f"{folder} holds no tokenizer.json; pass --tokenizer")
    tokenizer = load_tokenizer(given or folder)
    if tokenizer.vocabulary > vocabulary:
        raise ValueError(f"a tokenizer of {tokenizer.vocabulary} tokens and weights for {vocabulary}: they do not "
                         "belong together")
    return tokenizer


# ------------------------------------------------------------------------------------------------
# Towers


def clip_block(width, heads, drop_path=0.0, mlp_width=None):
    """attention.Block as in CLIP: all biases, QuickGELU, norms with epsilon 1e-5."""
    return Block(width, heads, mlp_width=mlp_width, bias="qkv", eps=1e-5, activation=quick_gelu,
                 drop_path=drop_path)


class TextTower(nn.Module):
    """A causal transformer over token numbers (CLIP, Sec. 2.4, Choosing and Scaling a Model).

    size         TextSize or its name
    vocabulary   V, number of tokens
    context      most tokens of a sentence
    embedding    E, width of the joint space
    end          number of the end-of-text token; None = the largest in each row, as in CLIP
    masked_text  have an embedding for hidden words (InternVideo's masked language model)
    """

    def __init__(self, size, *, vocabulary, context, embedding, end=None, masked_text=False):
        super().__init__()
        size = TEXT_SIZES[size] if isinstance(size, str) else size
        self.end, width = end, size.width
        self.embed = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.empty(context, width))
        self.mask_embedding = nn.Parameter(torch.empty(1, 1, width)) if masked_text else None
        self.blocks = nn.ModuleList(clip_block(width, size.heads) for _ in range(size.depth))
        self.norm = nn.LayerNorm(width)
        self.proj = nn.Linear(width, embedding, bias=False)
        self._recompute = False
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.01)
        nn.init.normal_(self.proj.weight, std=width**-0.5)
        if masked_text:
            nn.init.normal_(self.mask_embedding, std=0.02)
        for block in self.blocks:  # CLIP, Sec. 2.4: residual branches start smaller in deep towers
            nn.init.normal_(block.attn.qkv.weight, std=width**-0.5)
            nn.init.normal_(block.attn.proj.weight, std=width**-0.5 * (2 * size.depth)**-0.5)
            nn.init.normal_(block.mlp.fc1.weight, std=(2 * width)**-0.5)
            nn.init.normal_(block.mlp.fc2.weight, std=width**-0.5 * (2 * size.depth)**-0.5)
            for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
                nn.init.zeros_(layer.bias)

    def tokens(self, ids, hidden=None):
        """ids (B, L) int64, hidden (B, L) bool or None, True = the word is not shown ->
        (B, L, W) after the final norm, not projected. Token i has seen tokens 0..i."""
        if ids.ndim != 2 or ids.shape[1] > len(self.positions):
            raise ValueError(f"text of shape {tuple(ids.shape)}: expected (B, L) with at most "
                             f"{len(self.positions)} tokens")
        x = self.embed(ids)
        if hidden is not None:
            x = torch.where(hidden[:, :, None], self.mask_embedding, x)
        x = x + self.positions[:ids.shape[1]]
        return self.norm(run_blocks(self.blocks, x, Context(Mask(causal=True)), recompute=self._recompute))

    def forward(self, ids, hidden=None):
        """As `tokens` -> embedding (B, E), not normalised, and tokens (B, L, W)."""
        tokens = self.tokens(ids, hidden)
        return self.proj(self.at_end(tokens, ids)), tokens

    def at_end(self, tokens, ids):
        """Of tokens (B, L, W), those at the end of each sentence of ids (B, L): (B, W), they have read all of it."""
        ends = ids if self.end is None else (ids == self.end).int()
        if self.end is not None and not ends.any(dim=1).all():
            raise ValueError(f"a text without its end, token {self.end}")
        place = ends.argmax(dim=1)                                           # (B,), the first one
        return tokens.gather(1, place[:, None, None].expand(-1, 1, tokens.shape[2]))[:, 0]

    def recompute(self, on=True):
        self._recompute = on

    def start_cache(self, batch):
        """What `step` has read of `batch` sentences: nothing. A list of [keys, values] per block,
        each (batch, heads, n, K); beams are reordered by indexing all of them."""
        heads, weight = self.blocks[0].attn.heads, self.positions
        empty = weight.detach().new_zeros(batch, heads, 0, weight.shape[1] // heads)
        return [[empty, empty] for _ in self.blocks]

    def step(self, ids, cache):
        """Read on: ids (B, n) -> (B, n, W), what `tokens` gives for these after all before them, and
        the grown cache."""
        read = cache[0][0].shape[2]
        if read + ids.shape[1] > len(self.positions):
            raise ValueError(f"token {read + ids.shape[1]} of a text tower of {len(self.positions)}")
        x, grown = self.embed(ids) + self.positions[read:read + ids.shape[1]], []
        for block, past in zip(self.blocks, cache):
            q, *new = block.attn.queries_keys_values(block.norm1(x))
            k, v = (torch.cat([old.to(y.dtype), y], dim=2) for old, y in zip(past, new))
            out = attention(q, k, v, Mask(causal=True) if ids.shape[1] > 1 else None)  # the last word may look at all
            x = x + block.attn.proj(out.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.norm2(x))
            grown.append([k, v])
        return self.norm(x), grown


class JointTower(nn.Module):
    """ViCLIP's eyes: one class token and the patches of all frames in one sequence.

    Patch n of frame t gets a code for its place, shared by all frames, plus one for its time.
    size, frames, image_size, channels   as UniFormerV2
    """

    def __init__(self, size, *, frames, image_size=None, channels=3, drop_path=0.0):
        super().__init__()
        D, p = size.width, size.patch
        image_size = size.image_size if image_size is None else image_size
        H, W = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.patch, self.grid, self._recompute = p, (H // p, W // p), False
        self.embed = nn.Linear(channels * p * p, D, bias=False)
        self.class_token = nn.Parameter(D**-0.5 * torch.randn(D))
        self.positions = nn.Parameter(uniformerv2.place_codes(*self.grid, D))
        self.times = nn.Parameter(torch.zeros(frames, D))
        self.norm_pre = nn.LayerNorm(D)
        rates = torch.linspace(0, drop_path, size.depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(clip_block(D, size.heads, rate, size.mlp_width) for rate in rates)

    def encode(self, video, mask_ratio=0.0, generator=None):
        """video (B, C, T, H, W) -> feature (B, D), tokens (B, 1, 1+N, D): the class token, then the
        patches, time slowest; no final norm.

        mask_ratio  share of the patches, the same number in each clip, that is left out at random
        """
        B, C, T, H, W = video.shape
        p, (h, w) = self.patch, self.grid
        if (H, W) != (h * p, w * p) or T > len(self.times):
            raise ValueError(f"a clip of {T} frames of {H} x {W}: this tower takes up to "
                             f"{len(self.times)} frames of {h * p} x {w * p} pixels")
        patches = video.reshape(B, C, T, h, p, w, p).permute(0, 2, 3, 5, 1, 4, 6)  # b t h w (c p p)
        times = self.times.mean(dim=0, keepdim=True) if T == 1 else self.times[:T]
        x = self.embed(patches.reshape(B, T, h * w, -1)) + self.positions[1:] + times[:, None]
        x = x.flatten(1, 2)                                                  # (B, N, D)
        if mask_ratio:
            kept = x.shape[1] - int(mask_ratio * x.shape[1])
            rows, mine = joined(B)  # several processes: of one draw, each takes its rows
            order = torch.rand(rows, x.shape[1], generator=generator)[mine].argsort(dim=1)
            chosen = order[:, :kept].sort(dim=1).values.to(x.device)
            x = x.gather(1, chosen[:, :, None].expand(-1, -1, x.shape[2]))
        first = (self.class_token + self.positions[0]).expand(B, 1, -1)
        x = self.norm_pre(torch.cat([first.to(x.dtype), x], dim=1))
        x = run_blocks(self.blocks, x, recompute=self._recompute)
        return x[:, 0], x[:, None]

    def recompute(self, on=True):
        self._recompute = on


KINDS = {"video": "UniFormerV2", "frames": "frame-wise CLIP", "joint": "ViCLIP"}


class VideoCLIP(nn.Module):
    """A visual and a text tower with a common space (B, E).

    size        a name ("tiny", "b16", "l14", "l14_336") or a uniformerv2.Size
    kind        "video", "frames" or "joint", see the head of this file
    frames, image_size   T, and H = W or (H, W), default the size's own; "frames" and "video" take
                clips of any other length, too
    global_layers, global_heads   of "video": see UniFormerV2
    local_units, temporal_downsample   of "video", for motion: see UniFormerV2; no official
                video-text model has them
    text_size   TextSize or name; default: the one that goes with the name in `size`
    embedding   E, default the width of the text tower
    vocabulary, context, end, masked_text   see TextTower
    drop_path   see attention.DropPath; visual tower only
    """

    def __init__(self, size="b16", *, kind="video", frames=8, image_size=None, global_layers=None,
                 global_heads=None, text_size=None, embedding=None, vocabulary=49408, context=77,
                 end=None, masked_text=False, drop_path=0.0, local_units=0, temporal_downsample=False):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind is {kind!r}: choose {', '.join(KINDS)}")
        if kind != "video" and (local_units or temporal_downsample):
            raise ValueError(f"local_units and temporal_downsample are for kind='video', not {kind!r}")
        if text_size is None and not isinstance(size, str):
            raise ValueError("a Size of your own needs a text_size")
        text_size = text_size or size
        size = uniformerv2.SIZES[size] if isinstance(size, str) else size
        text_size = TEXT_SIZES[text_size] if isinstance(text_size, str) else text_size
        embedding = embedding or text_size.width
        if kind == "joint":
            self.visual = JointTower(size, frames=frames, image_size=image_size, drop_path=drop_path)
            self.mean, self.std = IMAGENET_MEAN, IMAGENET_STD  # what pixels are normalised with
        else:
            layers = () if kind == "frames" else global_layers
            self.visual = UniFormerV2(size, frames=frames, image_size=image_size, drop_path=drop_path,
                                      global_layers=layers, global_heads=global_heads,
                                      local_units=local_units, temporal_downsample=temporal_downsample)
            self.mean, self.std = CLIP_MEAN, CLIP_STD
        self.kind = kind
        self.config = {"model": "VideoCLIP", "size": asdict(size), "kind": kind, "frames": frames,
                       "image_size": [side * size.patch for side in self.visual.grid],
                       "global_layers": list(getattr(self.visual, "global_layers", ())),
                       "global_heads": global_heads, "text_size": asdict(text_size),
                       "embedding": embedding, "vocabulary": vocabulary, "context": context,
                       "end": end, "masked_text": masked_text, "local_units": local_units,
                       "temporal_downsample": temporal_downsample}
        self.visual_norm = nn.LayerNorm(size.width)
        self.visual_proj = nn.Linear(size.width, embedding, bias=False)
        nn.init.normal_(self.visual_proj.weight, std=size.width**-0.5)
        self.text = TextTower(text_size, vocabulary=vocabulary, context=context, embedding=embedding,
                              end=end, masked_text=masked_text)
        # What a file stores. CLIP and InternVideo: the logarithm of the factor on the cosines, from a temperature
        # of 0.07 (CLIP, Sec. 2.5, Training). ViCLIP ("joint"): the temperature itself. `logit_scale` hides that.
        self.scale = nn.Parameter(torch.tensor(0.01) if kind == "joint" else torch.tensor(1 / 0.07).log())
        self.unused = []  # what from_official found in the file and had no use for

    def resized(self, image_size):
        """The same model for frames of another size: see UniFormerV2.resized. Raises ValueError where patches do not
        fit, and for "joint", whose table is one of places and times."""
        if self.kind == "joint":
            raise ValueError("a joint tower stays at its size")
        model = VideoCLIP.from_config(self.config | {"image_size": image_size})
        places = uniformerv2.resize_positions(self.visual.positions, self.visual.grid, model.visual.grid)
        model.load_state_dict(self.state_dict() | {"visual.positions": places})
        return model.train(self.training)

    @property
    def logit_scale(self):
        """(): ln of the factor on the cosines, between 0 and ln 100; may be negative in ViCLIP."""
        return -self.scale.log() if self.kind == "joint" else self.scale

    @torch.no_grad()
    def clamp_scale(self):
        """Keep the factor on the cosines at or below 100, as all the official models do, and at or
        above 1, as InternVideo does. A larger one makes the training unstable (CLIP, Sec. 2.5)."""
        if self.kind == "joint":
            self.scale.clamp_(min=0.01)
        else:
            self.scale.clamp_(0, math.log(100))

    def encode_video_tokens(self, video, mask_ratio=0.0, generator=None):
        """video (B, C, T, H, W) float, normalised with self.mean and self.std; (B, C, H, W) is an
        image, a clip of one frame -> embedding (B, E), not normalised, and the tokens of the last
        layer, before any norm: (B, t, 1+S, D), class token of each frame first; "joint": (B, 1, 1+N, D).

        mask_ratio  "joint" only: the share of patches left out in training (ViCLIP: 0.9)
        generator   torch.Generator on the CPU for these; None = the global one
        """
        video = video[:, :, None] if video.ndim == 4 else video
        if self.kind == "joint":
            feature, tokens = self.visual.encode(video, mask_ratio, generator)
        elif mask_ratio:
            raise ValueError(f"mask_ratio is for kind='joint', not {self.kind!r}")
        else:
            feature, tokens = self.visual.encode(video)
        return self.visual_proj(self.visual_norm(feature)), tokens

    def encode_video(self, video, mask_ratio=0.0, generator=None):
        """The embedding (B, E) alone; arguments as `encode_video_tokens`."""
        return self.encode_video_tokens(video, mask_ratio, generator)[0]

    def encode_text_tokens(self, ids, hidden=None):
        """ids (B, L) int64 -> embedding (B, E), not normalised, and tokens (B, L, W) after the final
        norm, not projected. hidden: see TextTower.tokens."""
        return self.text(ids, hidden)

    def encode_text(self, ids, hidden=None):
        """The embedding (B, E) alone."""
        return self.text(ids, hidden)[0]

    def forward(self, video, ids, mask_ratio=0.0, generator=None):
        """What `contrastive_loss` takes: video and text embedding (B, E), logit_scale ()."""
        if self.training:
            self.clamp_scale()
        return (self.encode_video(video, mask_ratio, generator), self.encode_text(ids),
                self.logit_scale)

    def recompute(self, on=True):
        """Save memory, spend time: see attention.run_blocks."""
        self.visual.recompute(on)
        self.text.recompute(on)

    @classmethod
    def from_config(cls, config):
        """Build from the configuration that a run saved (config.json)."""
        config = {key: value for key, value in config.items() if key != "model"}
        return cls(uniformerv2.Size(**config.pop("size")),
                   text_size=TextSize(**config.pop("text_size")), **config)

    @classmethod
    def from_official(cls, source, *, heads=None, global_heads=None, global_layers=None,
                      text_heads=None, frames=None, grow=False):
        """Load InternVideo-MM, ViCLIP, OpenAI CLIP or Hugging Face CLIP weights, or a run of ours.

        source        path or {name: tensor}; see weights.read
        heads, global_heads, text_heads   shapes cannot tell them; default: heads of 64
        global_layers after which layers InternVideo's global blocks read; default: the last ones
        frames        T; default 8, or as many as ViCLIP's table has. That table is cut, or stretched,
                      to another T
        grow          turn plain CLIP, or a frame-wise run of ours, into the start of the video model: fresh
                      global blocks, which begin silent. The embedding is then CLIP's of 0.5 * the mean class token.
        returns       the model in eval mode; `unused` names what was left in the file on purpose
        raises        WeightsError: not such a file, or one that does not fit to the last tensor.
                      QuickGELU is meant; a Hugging Face folder whose config.json says otherwise is refused,
                      and its numbers of heads are taken. A file alone tells neither.
        """
        file = OfficialFile(source)
        if file.layout == "Hugging Face CLIP":
            eyes, reader = (weights.hub_config(source).get(part) or {} for part in ("vision_config", "text_config"))
            for part in (eyes, reader):
                weights.activation(part, file.name, "quick_gelu")
            heads, text_heads = heads or eyes.get("num_attention_heads"), text_heads or reader.get("num_attention_heads")
        if file.config and file.config.get("model") != "VideoCLIP":
            raise WeightsError(f"{file.name}: holds a {file.config.get('model')}, not a VideoCLIP")
        config = dict(file.config) if file.config else file.sizes(heads, text_heads)
        if grow and config.get("kind") != "frames":
            raise WeightsError(f"{file.name}: grow=True is for plain CLIP weights, these are "
                               f"{file.layout or KINDS.get(config.get('kind'))}")
        if file.config:
            if frames and config.get("kind") != "joint":
                config["frames"] = frames
            model = weights.fill(weights.build(cls.from_config, config, file.name), file.tensors, name=file.name)
        else:
            config["frames"] = frames or config["frames"]
            if config["kind"] == "video":
                count, depth = file.depth("visual.transformer.dec."), config["size"].depth
                layers = tuple(range(depth - count, depth)) if global_layers is None else global_layers
                config.update(global_heads=global_heads, global_layers=layers)
            model = cls(**config)
            weights.fill(model, file.tensors, file.rules(model), name=file.name)
        if grow:
            config = model.config | dict(kind="video", global_heads=global_heads, global_layers=global_layers)
            grown = cls.from_config(config)
            grown.load_state_dict({**grown.state_dict(), **model.state_dict()}, strict=True)
            model = grown
        model.unused = file.unused
        return model.eval()

    def to_official(self):
        """{official name: tensor}: InternVideo-MM's, OpenAI CLIP's or ViCLIP's, as `kind` is "video", "frames" or
        "joint". Raises ValueError for what none of them has."""
        config = self.config
        if config["local_units"] or config["temporal_downsample"]:
            raise ValueError("InternVideo's video-text models have no local units and no temporal downsampling; train with "
                             "--local-units 0 --no-temporal-downsample")
        if config["end"] not in (None, config["vocabulary"] - 1):
            raise ValueError(f"token {config['end']} ends a text; officially it is the last of the vocabulary")
        uniformerv2.officially_last(config["global_layers"], config["size"]["depth"])
        layout = {"video": "InternVideo-MM", "frames": "CLIP", "joint": "ViCLIP"}[self.kind]
        return weights.official(self, key_map(self, layout))


# What CLIP brought to the video model, by our names: the published list, but for the blocks. It names blocks 0
# to 11 only, so that of L/14 half the visual ones are left out.
FROM_CLIP = (r"text\.(positions|embed\.weight|proj\.weight)", r"text\.norm\..*", r"visual\.(class_token|positions|embed\.weight)",
             r"visual\.norm_pre\..*", r"visual_norm\..*", r"visual_proj\.weight",
             r"(visual|text)\.blocks\.(?P<block>\d+)\.(norm1|norm2|attn|mlp)\..*")


@torch.no_grad()
def merge(model, start, share=0.5, *, as_published=False):
    """Average a video model with the CLIP it grew from (WiSE-FT, arXiv 2109.01903, Sec. 3): what was learned keeps
    half of what was known. W = share * start + (1 - share) * model, for the tensors of FROM_CLIP.

    model, start   VideoCLIPs of the same size; `model` is changed in place and returned
    share          in [0, 1]; the published zero-shot scripts take 0.5
    as_published   leave out blocks 12 and above, as the published list does, perhaps unknowingly
    raises         ValueError where a tensor is missing from `start` or has another shape
    """
    known = start.state_dict()
    for name, tensor in model.state_dict().items():
        found = next(filter(None, (re.fullmatch(pattern, name) for pattern in FROM_CLIP)), None)
        if found is None or as_published and int(found.groupdict().get("block") or 0) > 11:
            continue
        if name not in known or known[name].shape != tensor.shape:
            raise ValueError(f"the two models differ in {name}: they are not of one size")
        tensor.lerp_(known[name].to(tensor), share)
    return model


# ------------------------------------------------------------------------------------------------
# Losses

# Batches above BLOCKED_ABOVE pairs are compared in blocks of BLOCK_ROWS rows.
BLOCKED_ABOVE, BLOCK_ROWS = 2048, 256


def contrastive_loss(video, text, logit_scale, *, targets=None, gather=False, rows=None):
    """Find the sentence of each video and the video of each sentence (CLIP, Sec. 2.3, Fig. 3).

    loss = mean of CE(s * v @ t.T) and CE(s * t @ v.T), s = exp(logit_scale), with the truth on the
    diagonal, in nats; about ln B when nothing is known.

    video, text  (B, E) embeddings, any length: they are normalised here; or (B, n, E), averaged first
    logit_scale  (), ln of the factor on the cosines
    targets      (B,) int or None: a number for each pair; those with equal numbers (ViCLIP: several clips
                 with one caption) are all right answers to each other and share the truth evenly. None: every
                 pair is its own
    gather       join the batches of all processes first; every process needs the same B
    rows         None = choose; 0 = all at once; else rows per block, see BlockedLoss
    returns      () float32 (float64 for float64 inputs), also under autocast
    """
    if video.shape != text.shape or video.ndim not in (2, 3):
        raise ValueError(f"video {tuple(video.shape)} and text {tuple(text.shape)} should both be (B, E)")
    with torch.autocast(video.device.type, enabled=False):
        v, t = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (video, text))
        v, t = (F.normalize(x.mean(dim=1) if x.ndim == 3 else x, dim=-1) for x in (v, t))
        if gather:
            v, t = gather_with_gradient(v), gather_with_gradient(t)
            targets = None if targets is None else gather_with_gradient(targets)
        if rows is None:
            rows = BLOCK_ROWS if len(v) > BLOCKED_ABOVE else 0
        targets = torch.arange(len(v), device=v.device) if targets is None else targets
        scale = torch.as_tensor(logit_scale, dtype=v.dtype, device=v.device)
        if rows:
            return BlockedLoss.apply(v, t, scale, targets, rows)
        logits = scale.exp() * v @ t.T                                       # (B, B)
        truth = shared_truth(targets, 0, len(v), v.dtype)
        return (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2


def shared_truth(targets, start, rows, dtype):
    """These rows of (B, B): each spreads a probability of 1 evenly over the targets equal to its own."""
    same = (targets[start:start + rows, None] == targets).to(dtype)
    return same / same.sum(dim=1, keepdim=True)


class BlockedLoss(torch.autograd.Function):
    """The loss above from blocks of rows; the (B, B) logits never exist, forward or backward.

    With r_i and c_j the log-sum-exp of row i and column j of the logits S, and W the truth,
        loss = (mean r + mean c) / 2 - sum(W * S) / B
        dloss/dS = (exp(S - r) + exp(S - c)) / 2B - W / B
    so B + B numbers carry over, and each block of S is computed a second time. Columns are summed as
    the blocks come: logaddexp of what was and what is new.
    """

    @staticmethod
    def forward(ctx, v, t, scale, targets, rows):
        B = len(v)
        r, c, hits = v.new_empty(B), v.new_full((B,), -math.inf), v.new_zeros(())
        for start in range(0, B, rows):
            S = scale.exp() * v[start:start + rows] @ t.T
            hits += (S * shared_truth(targets, start, rows, S.dtype)).sum()
            r[start:start + rows] = S.logsumexp(dim=1)
            c = torch.logaddexp(c, S.logsumexp(dim=0))
        ctx.save_for_backward(v, t, scale, targets, r, c)
        ctx.rows = rows
        return (r.mean() + c.mean()) / 2 - hits / B

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        v, t, scale, targets, r, c = ctx.saved_tensors
        B, rows, factor = len(v), ctx.rows, scale.exp() * grad
        dv, dt, dscale = torch.empty_like(v), torch.zeros_like(t), torch.zeros_like(scale)
        with torch.autocast(v.device.type, enabled=False):
            for start in range(0, B, rows):
                S = scale.exp() * v[start:start + rows] @ t.T
                d = (S - r[start:start + rows, None]).exp_().add_((S - c).exp_()).mul_(0.5 / B)
                d -= shared_truth(targets, start, rows, S.dtype) / B
                dv[start:start + rows] = factor * (d @ t)
                dt.addmm_(d.T, v[start:start + rows])
                dscale += (d * S).sum()
        return dv, factor * dt, grad * dscale, None, None


def in_pieces(encode, size, *inputs):
    """A large batch with the memory of a small one: gradient caching (GradCache, arXiv 2101.06983, Sec. 3.2,
    Gradient Cache Technique).

    A contrastive loss needs all embeddings at once, but not the activations behind them. So each piece is
    encoded and its activations are dropped; when the gradient of its embeddings comes back, it is encoded
    again, with the same random numbers, and the gradient goes on into the weights. In autograd's words:
    checkpoint every piece (arXiv 1604.06174). Equal to the large batch within rounding, for one more
    forward pass, dropout too: every piece draws for all rows from the same start, and takes its own
    (processes.joined). Only layers that look at the whole batch, as BatchNorm does, are not.

    encode   function of a piece of each input -> a tuple of tensors (b, ...), each row for itself; random
             numbers come from torch's global generators
    size     rows in a piece
    inputs   tensors (B, ...)
    returns  a tuple of tensors (B, ...)

    >>> layer = nn.Linear(3, 2)
    >>> [x.shape for x in in_pieces(lambda v, t: (layer(v), t), 2, torch.zeros(5, 3), torch.zeros(5, 1))]
    [torch.Size([5, 2]), torch.Size([5, 1])]
    """
    def encode_from(first, *rows):
        with piece(len(inputs[0]), first):
            return encode(*rows)

    devices = [inputs[0].device] if inputs[0].is_cuda else []
    starts, pieces = range(0, len(inputs[0]), size), []
    for first, *rows in zip(starts, *(x.split(size) for x in inputs)):
        # All but the last leave the generators as they were, so that each begins where the first did.
        with torch.random.fork_rng(devices, enabled=first != starts[-1]):
            pieces.append(torch.utils.checkpoint.checkpoint(encode_from, first, *rows, use_reentrant=False))
    return tuple(map(torch.cat, zip(*pieces)))


# ------------------------------------------------------------------------------------------------
# What it is good for

# The sentences that InternVideo puts the names of actions into.
PROMPTS = (
    "a photo of action {}", "a picture of action {}", "Human action of {}", "{}, an action",
    "{} this is an action", "{}, a video of action", "Playing action of {}", "{}",
    "Playing a kind of action, {}", "Doing a kind of action, {}", "Look, the human is {}",
    "Can you recognize the action of {}?", "Video classification of {}", "A video of {}",
    "The man is {}", "The woman is {}",
)


@torch.no_grad()
def embed_classes(model, tokenizer, classes, prompts=PROMPTS):
    """Every class name in every prompt: (prompts, Y, E), normalised."""
    device = model.scale.device
    found = []
    for prompt in prompts:
        ids, _ = tokenizer.encode([prompt.replace("{}", name) for name in classes],
                                  model.config["context"], trim=True)
        found.append(F.normalize(model.encode_text(ids.to(device)), dim=-1))
    return torch.stack(found)


def zero_shot(video, classes, logit_scale, combine="probabilities"):
    """Probabilities of classes nobody trained for (CLIP, Sec. 3.1.2, Using CLIP for zero-shot transfer).

    video     (B, E) embeddings
    classes   (prompts, Y, E), as `embed_classes`
    combine   "probabilities": softmax over classes for each prompt, then the mean (InternVideo);
              "embeddings": the mean, normalised, of a class's sentences, then one softmax (CLIP)
    returns   (B, Y), rows sum to 1
    """
    if combine not in ("probabilities", "embeddings"):
        raise ValueError(f"combine is {combine!r}: choose probabilities or embeddings")
    if combine == "embeddings":
        classes = F.normalize(classes.mean(dim=0, keepdim=True), dim=-1)
    cosines = torch.einsum("be,pye->bpy", F.normalize(video, dim=-1), classes)
    return (logit_scale.exp() * cosines).softmax(dim=-1).mean(dim=1)


def choose(model, video, options):
    """Multiple choice: the sentence whose cosine with the video is the largest (InternVideo, Sec. 4.4, video-text
    multiple choice).

    video    (B, C, T, H, W), as `VideoCLIP.encode_video`
    options  for each video the token numbers of its sentences, (n, L) int64
    returns  (B,) int64, the place of the chosen one; of equal ones the first
    """
    seen = F.normalize(model.encode_video(video).float(), dim=-1)
    return torch.stack([(F.normalize(model.encode_text(ids).float(), dim=-1) @ one).argmax() for one, ids in zip(seen, options)])


def retrieval_metrics(similarity, owner=None, grouped=False):
    """How well videos are found by text (t2v) and text by videos (v2t).

    similarity  (texts, videos): exp(logit_scale) * cosines. Only the dual softmax minds the factor.
    owner       (texts,) int, the video that each text describes; default: text i, video i
    grouped     v2t where videos have several captions. False: the rank of the best own caption among
                the captions of all other videos. True: among videos, each with its best caption (the
                protocol of InternVideo on MSVD); kinder to ranks beyond the first.
    returns     {"t2v_R@1", "t2v_R@5", "t2v_R@10": percent; "t2v_MdR", "t2v_MnR": median and mean rank,
                from 1; the same for v2t; the same again with "dsl_" in front}. A rank is 1 + the
                number of others at least as similar: ties count against us, and a model that
                calls everything equal comes out last.

    dsl_: dual softmax (CAMoE, arXiv 2109.04290, Dual Softmax Loss). Each similarity is multiplied by its own softmax
    over all queries of the test, S * softmax(S): how much this query wants it, among all that could. It knows the
    whole test set, as no user would, and so is never shown without the raw numbers.
    """
    S = torch.as_tensor(similarity).detach().double().cpu()
    if S.ndim != 2 or not S.numel() or not S.isfinite().all():
        raise ValueError(f"similarity {tuple(S.shape)}: expected numbers (texts, videos)")
    texts, videos = S.shape
    owner = torch.arange(texts) if owner is None else torch.as_tensor(owner).cpu().long()
    if owner.shape != (texts,) or not torch.equal(owner.unique(), torch.arange(videos)):
        raise ValueError(f"owner {tuple(owner.shape)} must name a video for each of {texts} texts, and "
                         f"each of {videos} videos at least once")
    wanted = S * S.softmax(dim=0)                         # for each video: which text wants it most?
    # For each text: which video wants it most? With several texts per video the published protocol takes the softmax
    # over texts for both ways.
    other = wanted if texts > videos else S * S.softmax(dim=1)
    metrics = {}
    for name, to_video, to_text in (("", S, S), ("dsl_", wanted, other)):
        ranks = {"t2v": (to_video >= to_video.gather(1, owner[:, None])).sum(dim=1)}
        own = owner[:, None] == torch.arange(videos)                         # (texts, videos) bool
        best = to_text.masked_fill(~own, -math.inf).amax(dim=0)
        rivals = to_text.masked_fill(own, -math.inf)
        if grouped:
            index = owner[:, None].expand(-1, videos)
            rivals = torch.full((videos, videos), -math.inf, dtype=S.dtype).scatter_reduce(
                0, index, rivals, "amax")
        ranks["v2t"] = 1 + (rivals >= best).sum(dim=0)
        for way, rank in ranks.items():
            for k in (1, 5, 10):
                metrics[f"{name}{way}_R@{k}"] = 100 * (rank <= k).double().mean().item()
            metrics[f"{name}{way}_MdR"] = rank.double().quantile(0.5).item()
            metrics[f"{name}{way}_MnR"] = rank.double().mean().item()
    return metrics


def protocol(dataset, *, videos, captions, frames, sampling, crop, size, merge=None, grouped=False):
    """One line that says how retrieval was measured; numbers without it cannot be compared.

    dataset    name and split, "MSR-VTT 1k-A"
    sampling   how frames were chosen; crop, size: what of them was seen, pixels
    merge      share of CLIP's weights mixed into the model's, None = none
    """
    several = "" if captions == videos else (
        ", v2t " + ("among videos by their best caption" if grouped else "by the best own caption"))
    return (f"{dataset}: {videos} videos, {captions} captions{several}; {frames} frames, {sampling}; "
            f"{crop} {size} px; " + ("no weight merge" if merge is None else f"{merge:g} of CLIP merged")
            + "; raw and dual softmax (dsl); ties count against us")


# ------------------------------------------------------------------------------------------------
# Official weights

# How others call what OpenAI's CLIP calls otherwise. Those in braces are stacked into one matrix.
SPELLINGS = {
    "CLIP": (),
    "InternVideo-MM": (
        (r"^visual\.ln_post\.", "visual_ln_post."),
        (r"^visual\.proj$", "visual_proj"),
    ),
    "ViCLIP": (
        (r"^visual\.", "vision_encoder."),
        (r"^logit_scale$", "temp"),
        (r"^(transformer|token_embedding|positional_embedding|ln_final|text_projection)", r"text_encoder.\1"),
    ),
    "Hugging Face CLIP": (
        (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
        (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
        (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
        (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),  # their spelling
        (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
        (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
        (r"^visual\.proj$", "visual_projection.weight"),
        (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
        (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
        (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
        (r"^ln_final\.", "text_model.final_layer_norm."),
        (r"^text_projection$", "text_projection.weight"),
        (r"\.ln_([12])\.", r".layer_norm\1."),
        (r"\.attn\.in_proj_(weight|bias)$", r".self_attn.{q,k,v}_proj.\1"),
        (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
        (r"\.mlp\.c_fc\.", ".mlp.fc1."),
        (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    ),
}
# A tensor with one of these names tells the layout; the first that fits is taken.
SIGNS = (
    ("ViCLIP", ("vision_encoder.", "text_encoder.")),
    ("Hugging Face CLIP", ("vision_model.", "text_model.")),
    ("InternVideo-MM", ("visual_proj", "visual_ln_post.", "visual.transformer.dec.",
                        "visual.transformer.dpe.", "visual.transformer.temporal_cls_token")),
    ("CLIP", ("visual.transformer.", "visual.proj")),
)
# Left aside wherever they occur: sizes that OpenAI stores as tensors, counters of old Hugging Face
# files, and the captioning half of InternVideo (caption_decoder.py reads that).
UNUSED = (r"^(input_resolution|context_length|vocab_size)$",
          r"^(text|vision)_model\.embeddings\.position_ids$", r"^caption_decoder\.")


class OfficialFile:
    """An official file, seen through the names of OpenAI's CLIP."""

    def __init__(self, source):
        tensors, self.config = weights.part(*weights.read(source), "clip")
        self.name = "the dict of weights" if isinstance(source, dict) else str(source)
        self.tensors, self.layout, self.prefix, self.unused = tensors, None, "", []
        if self.config:
            return
        if any(key.startswith("clip.") for key in tensors):  # the whole of InternVideo's training
            self.prefix = "clip."
        self.layout = next((layout for layout, signs in SIGNS if any(
            key.startswith(tuple(self.prefix + sign for sign in signs)) for key in tensors)), None)
        if self.layout is None:
            raise WeightsError(f"{self.name}: not the weights of a CLIP, InternVideo-MM or ViCLIP model; "
                               f"its names are like {', '.join(list(tensors)[:3])}")
        self.unused = [key for key in tensors if not key.startswith(self.prefix)
                       or any(re.search(pattern, key) for pattern in UNUSED)]
        self.tensors = {key: tensors[key] for key in tensors if key not in set(self.unused)}

    def spell(self, name):
        """What this file calls the tensor that OpenAI calls `name`; several in a tuple."""
        return spell(name, self.layout, self.prefix)

    def depth(self, blocks):
        return weights.depth_of(self.tensors, self.spell(blocks))

    def shape(self, name, ndim):
        return weights.shape_of(self.tensors, self.spell(name), ndim, self.name)

    def width(self, blocks, *parts):
        """A size that these tensors of all blocks share, by majority, so that one damaged tensor is
        named when we fill."""
        names = [self.spell(f"{blocks}{i}.{part}") for i in range(self.depth(blocks)) for part in parts]
        found = [self.tensors[key].shape[0] for key in names
                 if key in self.tensors and self.tensors[key].ndim]
        if not found:
            raise WeightsError(f"{self.name}: missing: {names[0] if names else self.spell(blocks) + '*'}")
        return commonest(found)

    def heads(self, width, given, keyword):
        if not given and width % 64:
            raise WeightsError(f"{self.name}: shapes cannot tell how many heads a width of {width} has; "
                               f"pass {keyword}=")
        return given or width // 64

    def sizes(self, heads, text_heads):
        """The arguments of VideoCLIP, read off the shapes."""
        eyes, reader = "visual.transformer.resblocks.", "transformer.resblocks."
        norms = ("ln_1.weight", "ln_2.weight", "mlp.c_proj.bias")
        D, W = self.width(eyes, *norms), self.width(reader, *norms)
        kernel = self.tensors.get(self.spell("visual.conv1.weight"))
        patch = self.shape("visual.conv1.weight", 4 if kernel is None else max(4, min(5, kernel.ndim)))[-1]
        places = self.shape("visual.positional_embedding", 2)[0] - 1
        side = math.isqrt(max(places, 0))
        if side * side != places:
            raise WeightsError(f"{self.name}: wrong shape: {self.spell('visual.positional_embedding')} has "
                               f"{places} places, which is not a square")
        joint, layout = self.layout == "ViCLIP", self.layout
        ends = [self.shape(name, 2)[0 if layout == "Hugging Face CLIP" else 1]
                for name in ("visual.proj", "text_projection")]
        if ends[0] != ends[1]:
            raise WeightsError(f"{self.name}: wrong shape: {self.spell('visual.proj')} and "
                               f"{self.spell('text_projection')} lead to spaces of {ends[0]} and {ends[1]}")
        size = uniformerv2.Size(D, self.depth(eyes), self.heads(D, heads, "heads"),
                                self.width(eyes, "mlp.c_fc.weight", "mlp.c_fc.bias"), patch, side * patch)
        vocabulary = self.shape("token_embedding.weight", 2)[0]
        return dict(
            size=size, kind={"InternVideo-MM": "video", "ViCLIP": "joint"}.get(layout, "frames"),
            frames=self.shape("visual.temporal_positional_embedding", 3)[1] if joint else 8,
            embedding=ends[0],
            text_size=TextSize(W, self.depth(reader), self.heads(W, text_heads, "text_heads")),
            vocabulary=vocabulary, context=self.shape("positional_embedding", 2)[0],
            masked_text=self.prefix + "text_mask_embedding" in self.tensors)

    def rules(self, model):
        """The key map, in network order."""
        return key_map(model, self.layout, self.prefix)


def spell(name, layout, prefix=""):
    """What a layout calls the tensor that OpenAI calls `name`; several in a tuple."""
    for pattern, replacement in SPELLINGS[layout]:
        name = re.sub(pattern, replacement, name)
    if "{" in name:
        before, middle, after = re.split("[{}]", prefix + name)
        return tuple(before + part + after for part in middle.split(","))
    return prefix + name


def key_map(model, layout, prefix=""):
    """The rules, in network order."""
    flip = (None, None) if layout == "Hugging Face CLIP" else (transposed, transposed)
    if model.kind == "joint":
        frames, p = len(model.visual.times), model.visual.patch
        eyes = [Rule("embed.weight", "conv1.weight", as_matrix, as_kernel(-1, 1, p, p)), Rule("class_token", "class_embedding"),
                Rule("positions", "positional_embedding"),
                Rule("times", "temporal_positional_embedding", lambda table: resize_times(table, frames),
                     lambda table: table[None]),
                *pairs("norm_pre.", "ln_pre.")]
        for i in range(len(model.visual.blocks)):
            eyes += block_rules(f"blocks.{i}.", f"transformer.resblocks.{i}.")
    else:
        eyes = official_rules(model.visual)
    rules = [replace(rule, ours="visual." + rule.ours, official="visual." + rule.official) for rule in eyes]
    rules += pairs("visual_norm.", "visual.ln_post.") + [
        Rule("visual_proj.weight", "visual.proj", *flip), Rule("scale", "logit_scale"),
        Rule("text.embed.weight", "token_embedding.weight"),
        Rule("text.positions", "positional_embedding")]
    if model.config["masked_text"]:
        rules.append(Rule("text.mask_embedding", "text_mask_embedding"))
    for i in range(len(model.text.blocks)):
        rules += block_rules(f"text.blocks.{i}.", f"transformer.resblocks.{i}.")
    rules += pairs("text.norm.", "ln_final.") + [Rule("text.proj.weight", "text_projection", *flip)]
    return [replace(rule, official=spell(rule.official, layout, prefix)) for rule in rules]


def transposed(matrix):
    """A matrix turned round; a vector as it is. CLIP stores its projections input first."""
    return matrix.T if matrix.ndim == 2 else matrix


def resize_times(table, frames):
    """ViCLIP's codes for time (1, T, D) for another number of frames: (frames, D). Fewer: the first
    ones, as the official helper; more: stretched, as it meant to."""
    if table.ndim != 3 or table.shape[1] >= frames:
        return table[0, :frames] if table.ndim == 3 else table
    return F.interpolate(table.transpose(1, 2), size=frames, mode="linear", align_corners=False)[0].T


# ------------------------------------------------------------------------------------------------
# Try it


@torch.no_grad()
def main(argv=None):
    """`python clip_video.py`: the shapes. With a video, texts and weights: which text fits."""
    import argparse
    import sys
    from pathlib import Path

    import data
    from video import moving_shapes
    from engine import pictures

    parser = argparse.ArgumentParser(description="Which of these sentences belongs to the video?")
    parser.add_argument("video", nargs="?", help="a video file; default: a generated clip")
    parser.add_argument("--text", action="append", help="a sentence; give several", metavar="TEXT")
    parser.add_argument("--weights", help="a run's folder or official weights; default: an untrained model")
    parser.add_argument("--tokenizer", help="tokenizer.json or CLIP's bpe_simple_vocab_16e6.txt.gz; "
                                            "default: the one in the run's folder")
    parser.add_argument("--frames", type=int, help="frames to look at; default: what the model was made for")
    parser.add_argument("--out", default="runs/similarity.png", help="without a video: the cosines of four; PNG")
    args = parser.parse_args(argv)
    try:
        if not args.video and not args.weights:
            path = Path(args.out)
            path.parent.mkdir(parents=True, exist_ok=True)
            cosines, _, captions = explain(data, moving_shapes)
            pictures.similarity(cosines, captions, path)
            print(f"drawn, of an untrained model: {path}")
            return 0
        if not args.text or not args.weights or not args.video:
            raise ValueError("needs a video, --weights and at least one --text")
        if args.frames is not None and args.frames < 1:
            raise ValueError(f"--frames {args.frames}: must be at least 1")
        model = VideoCLIP.from_official(args.weights, frames=args.frames)
        tokenizer = tokenizer_of(args.weights, args.tokenizer, model.config["vocabulary"])
        T, (H, W) = args.frames or model.config["frames"], model.config["image_size"]
        clip = torch.as_tensor(data.one_clip(args.video, T, (H, W)))[None]
        video = data.normalise(clip, model.mean, model.std)                  # (1, 3, T, H, W)
        ids, _ = tokenizer.encode(args.text, model.config["context"])
        classes = F.normalize(model.encode_text(ids), dim=-1)[None]
        found = zero_shot(model.encode_video(video), classes, model.logit_scale)[0]
        for share, text in sorted(zip(found.tolist(), args.text), reverse=True):
            print(f"{share:8.4f}  {text}")
    except (WeightsError, data.DataError, ValueError, OSError) as error:
        print(f"clip_video.py: {error}", file=sys.stderr)
        return 2
    return 0


def explain(data, moving_shapes):
    """Print what happens to a few clips and sentences, shape by shape; returns their cosines (texts, clips), the
    clips and the sentences."""
    world = moving_shapes.MovingShapes("train", 4, 64)
    items = [world[i] for i in range(4)]
    captions = [item["caption"] for item in items]
    tokenizer = train_tokenizer([world[i]["caption"] for i in range(100)], 800)
    model = VideoCLIP("tiny", frames=4, image_size=64, vocabulary=tokenizer.vocabulary, context=24).eval()
    video = data.normalise(torch.stack([torch.as_tensor(item["video"]) for item in items]), model.mean, model.std)
    ids, is_token = tokenizer.encode(captions, 24, trim=True)
    seen, patches = model.encode_video_tokens(video)
    read, words = model.encode_text_tokens(ids)
    for name, value in (
            ("captions, the first", captions[0]),
            ("its tokens", ids[0][is_token[0]].tolist()),
            ("video (B, C, T, H, W)", tuple(video.shape)),
            ("its tokens (B, t, 1+S, D)", tuple(patches.shape)),
            ("its embedding (B, E)", tuple(seen.shape)),
            ("text (B, L)", tuple(ids.shape)),
            ("its tokens (B, L, W)", tuple(words.shape)),
            ("its embedding (B, E)", tuple(read.shape)),
            ("contrastive loss, untrained (ln B = 1.386 at chance)",
             f"{contrastive_loss(seen, read, model.logit_scale):.3f}")):
        print(f"{name:53s} {value}")
    return F.normalize(read, dim=-1) @ F.normalize(seen, dim=-1).T, [item["video"] for item in items], captions


if __name__ == "__main__":
    raise SystemExit(main())
