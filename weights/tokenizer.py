"""Byte-pair encoding as in CLIP: text to token numbers and back.

    "A red star" --clean--> "a red star" --split into words, words into pieces--> ids (B, L)
    ids: start, pieces, end, padding; is_token (B, L) is False for padding

The idea, in steps:
1. `train_tokenizer` starts from 512 symbols: the bytes, and the bytes at the end of a word. It then
   repeatedly merges the most frequent pair of symbols (arXiv 1508.07909, Sec. 3.2). Every text can
   be encoded, so there is no unknown token.
2. `clip_tokenizer` builds a tokenizer from CLIP's published list of 48,894 merges.
3. `tokenizer_of` finds the tokenizer of weights and checks that it fits them.

Where we differ: L is 77 in CLIP; here it is an argument. A caption that is too long is cut, and its
last token is replaced by the end token, whose feature represents the sentence.

>>> tokenizer = train_tokenizer(["a red ring orbits", "a blue star spins"] * 2, vocabulary=600)
>>> ids, is_token = tokenizer.encode(["a red star"], 16)
>>> tokenizer.decode(ids), int(is_token.sum())                       # start, three words, end
(['a red star'], 5)
"""

import functools
import gzip
import html
import json
import os
import re
import zlib
from pathlib import Path

import tokenizers
import torch
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from weights.files import write_atomically
from weights.places import split

START, END, PAD = "<|startoftext|>", "<|endoftext|>", "<|pad|>"
# These three special tokens and their names in other files; the first known name is used.
SPECIAL = ((START, "<start_of_text>", "[CLS]", "<s>", "<bos>"),
           (END, "<end_of_text>", "[SEP]", "</s>", "<eos>"),
           (PAD, "[PAD]", "<pad>"))
# CLIP splits a text into: English contractions, runs of letters, single digits, runs of others.
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
CLIP_MERGES = 49152 - 256 - 2  # as CLIP's simple_tokenizer.py


@functools.lru_cache(maxsize=None)
def repair():
    """ftfy's function that repairs wrongly decoded characters. Without ftfy, a function that
    changes nothing. Cached, because a failing import searches the disk each time."""
    try:
        import ftfy
    except ImportError:
        return lambda text: text
    return ftfy.fix_text


class Tokenizer:
    """Converts sentences to token numbers and back.

    engine            a tokenizers.Tokenizer
    start, end, pad   numbers of the special tokens
    vocabulary        number of tokens
    lower             True: texts are converted to lower case
    """

    def __init__(self, engine):
        self.engine, self.vocabulary = engine, max(engine.get_vocab().values(), default=-1) + 1
        start, end, pad = (next((number for name in names
                                 if (number := engine.token_to_id(name)) is not None), None)
                           for names in SPECIAL)
        for number, names in zip((start, end), SPECIAL):
            if number is None:
                raise ValueError("a tokenizer without a start or end token: it knows none of "
                                 f"{', '.join(names)}")
        self.start, self.end = start, end
        self.pad = 0 if pad is None else pad  # CLIP pads with 0, which is "!"
        # `clean` uses Python's lower(), which handles a Greek sigma at the end of a word; the
        # engine's does not.
        state = json.loads(engine.to_str())["normalizer"]
        self.lower = "Lowercase" in json.dumps(state) or bool((state or {}).get("lowercase"))

    def clean(self, text):
        """CLIP's cleaning of a text: repair wrongly decoded characters (if ftfy is installed),
        resolve HTML entities twice, replace runs of white space by one space, convert to lower
        case."""
        if not isinstance(text, str):
            raise ValueError(
                f"a caption must be text, got {type(text).__name__}: {str(text)[:40]!r}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"a caption holds half a character (a lone surrogate) at "
                             f"{error.start}: {text[:40]!r}") from None
        text = re.sub(r"\s+", " ", html.unescape(html.unescape(repair()(text)))).strip()
        return text.lower() if self.lower else text

    def encode(self, texts, context=77, trim=False):
        """Captions to token numbers: start, pieces, end, padding.

        texts    list of str (or one str). A text that is too long is cut, and its last token
                 becomes the end token. An empty text is start and end
        context  L, at least 2
        trim     True: shorten L to the length of the longest text
        returns  ids (B, L) int64; is_token (B, L) bool, False = padding
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts or context < 2:
            raise ValueError(f"{len(texts)} captions of {context} tokens: needs at least one "
                             "caption, and two tokens for its start and end")
        # One text at a time: the engine's threads would conflict with a data loader's processes.
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
        """Token numbers to text, up to the first end token: (B, L) or lists -> list of str;
        (L,) -> str."""
        ids = ids.tolist() if isinstance(ids, torch.Tensor) else list(ids)
        if ids and isinstance(ids[0], (list, torch.Tensor)):
            return [self.decode(row) for row in ids]
        ids = ids[:ids.index(self.end)] if self.end in ids else ids
        text = self.engine.decode([i for i in ids if i != self.start], skip_special_tokens=True)
        return text.replace("</w>", " ").strip()

    def save(self, folder):
        """Write tokenizer.json, which `load_tokenizer` and Hugging Face read, into a folder."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_atomically(Path(folder) / "tokenizer.json",
                    lambda path: Path(path).write_text(self.engine.to_str(), encoding="utf-8"))


# ------------------------------------------------------------------------------------------------
# Making a tokenizer


def byte_symbols():
    """512 symbols: a character for every byte, then the same with "</w>", for the end of a word.

    They have CLIP's order. Printable bytes come first and are their own symbols. The other bytes
    are written as the characters from 256 on.
    """
    prints = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(i) for i in prints] + [chr(256 + i) for i in range(256 - len(prints))]
    return symbols + [symbol + "</w>" for symbol in symbols]


def byte_pairs(merges, first=()):
    """The engine with the vocabulary: `first`, the 512 symbols, a token per merge, start, end."""
    # Two merges may give the same token, which then has one number.
    merged = ("".join(pair) for pair in merges)
    names = dict.fromkeys([*first, *byte_symbols(), *merged, START, END])
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
    """Learn a tokenizer from captions. As in CLIP, the end token has the largest number.

    captions    iterable of str
    vocabulary  maximum number of tokens, at least 515 (padding, 512 symbols, start, end). It may
                become smaller, because pairs that occur only once are not merged
    """
    if vocabulary < 515:
        raise ValueError(
            f"a vocabulary of {vocabulary}: the bytes and the special tokens alone are 515")
    plain = Tokenizer(byte_pairs([]))
    texts = [plain.clean(caption) for caption in captions]
    if not any(texts):
        raise ValueError("no captions to train a tokenizer on")
    # Given as special tokens, all symbols have fixed numbers. Pairs with equal counts are ordered
    # by these numbers, so the same captions give the same vocabulary.
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 3, min_frequency=2, show_progress=False,
        special_tokens=byte_symbols(), end_of_word_suffix="</w>")
    engine = tokenizers.Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    engine.pre_tokenizer = plain.engine.pre_tokenizer
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # otherwise every later fork prints a warning
    try:
        engine.train_from_iterator(texts, trainer)
    finally:
        os.environ.pop("TOKENIZERS_PARALLELISM")
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before
    return Tokenizer(byte_pairs(json.loads(engine.to_str())["model"]["merges"], first=(PAD,)))


# ------------------------------------------------------------------------------------------------
# Finding a tokenizer


def clip_tokenizer(path):
    """CLIP's tokenizer from its list of merges (bpe_simple_vocab_16e6.txt.gz): 49408 tokens."""
    try:
        lines = gzip.decompress(Path(path).read_bytes()).decode().split("\n")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise ValueError(f"{path}: not CLIP's bpe_simple_vocab_16e6.txt.gz ({error})") from None
    merges = [line.split() for line in lines[1:CLIP_MERGES + 1]]
    if len(merges) != CLIP_MERGES or any(len(pair) != 2 for pair in merges):
        raise ValueError(f"{path}: not CLIP's list of {CLIP_MERGES} merges")
    return Tokenizer(byte_pairs(merges))


def load_tokenizer(path):
    """A tokenizer from a tokenizer.json (ours or Hugging Face's), a folder with such a file, or
    CLIP's list of merges (.gz). ValueError if it is not a tokenizer."""
    path = Path(path) / "tokenizer.json" if os.path.isdir(path) else Path(path)
    if not os.path.isfile(path):  # reading a pipe would block
        raise ValueError(f"{path}: not a file that can be read")
    if path.suffix == ".gz":
        return clip_tokenizer(path)
    try:
        engine = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        engine.no_padding()
        engine.no_truncation()
        return Tokenizer(engine)
    except Exception as error:  # the engine raises nothing narrower
        reason = " ".join(str(error).split())[:100]
        raise ValueError(f"{path}: not a tokenizer.json ({reason})") from None


def tokenizer_of(source, given, vocabulary):
    """The tokenizer of weights.

    source      a run's folder, or a file of weights with a tokenizer.json beside it
    given       path of another tokenizer; "" or None for that of the weights
    vocabulary  number of tokens of the model
    raises      ValueError: there is no tokenizer, or it has more tokens than the model
    """
    path = split(source)[0]
    folder = path if os.path.isdir(path) else path.parent
    if not given and not os.path.exists(folder / "tokenizer.json"):
        raise ValueError(f"{folder} holds no tokenizer.json; pass --tokenizer")
    tokenizer = load_tokenizer(given or folder)
    if tokenizer.vocabulary > vocabulary:
        raise ValueError(f"a tokenizer of {tokenizer.vocabulary} tokens and weights for "
                         f"{vocabulary}: they do not belong together")
    return tokenizer
