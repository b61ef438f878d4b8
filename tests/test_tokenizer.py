"""What is proved about weights/tokenizer.py: text comes back from its tokens, whatever its letters;
a vocabulary is a function of its captions; what cannot be read is refused in one line; the
tokenizer of a run is found beside its weights and must fit them."""

import pytest
import torch

from weights.tokenizer import (Tokenizer, byte_pairs, load_tokenizer, tokenizer_of,
                               train_tokenizer)

CAPTIONS = ["a red ring orbits clockwise", "a small blue star spins",
            "we see two circles that meet",
            "the blue ring slides left"] * 3


def test_a_tokenizer_learns_words_and_gives_the_text_back(tmp_path):
    tokenizer = train_tokenizer(CAPTIONS, 700)
    # the largest, as in CLIP
    assert tokenizer.end == tokenizer.vocabulary - 1 == tokenizer.start + 1
    ids, is_token = tokenizer.encode(["a blue ring", "the Star  spins\n"], 12)
    assert ids.shape == is_token.shape == (2, 12) and ids.dtype == torch.int64
    assert is_token.sum(dim=1).tolist() == [5, 5] and (ids[~is_token] == tokenizer.pad).all()
    assert tokenizer.decode(ids) == ["a blue ring", "the star spins"]
    assert tokenizer.encode(["a blue ring"], 12, trim=True)[0].shape == (1, 5)
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert torch.equal(again.encode(CAPTIONS)[0], tokenizer.encode(CAPTIONS)[0])
    assert (again.start, again.end, again.pad, again.vocabulary) == (
        tokenizer.start, tokenizer.end, tokenizer.pad, tokenizer.vocabulary)
    assert torch.equal(train_tokenizer(CAPTIONS, 700).encode(CAPTIONS)[0],
                       tokenizer.encode(CAPTIONS)[0])


def test_a_token_that_two_merges_write_has_one_number():
    """Else ids would run past the vocabulary, and past the embedding."""
    pairs = [("a", "b"), ("ab", "c</w>"), ("b", "c</w>"), ("a", "bc</w>")]
    tokenizer = Tokenizer(byte_pairs(pairs))
    assert tokenizer.vocabulary == 512 + 3 + 2 == tokenizer.end + 1
    assert tokenizer.decode(tokenizer.encode(["abc"], 4)[0]) == ["abc"]


@pytest.mark.parametrize("text", ["Ωmega & ÆTHER", "你好 world", "\U0001f680 42!", "ΟΔΥΣΣΕΥΣ",
                                  "it's <b>"])
def test_any_text_survives_even_of_letters_never_seen(text):
    """Bytes are in the vocabulary from the start, so nothing is unknown."""
    found = train_tokenizer(CAPTIONS, 600).decode(train_tokenizer(CAPTIONS, 600).encode(text)[0])[0]
    assert found.replace(" ", "") == text.lower().replace(" ", "")


def test_clips_words_are_cleaned_as_clip_cleans_them():
    tokenizer = train_tokenizer(CAPTIONS, 600)
    clean = tokenizer.clean
    assert clean("  Tom &amp;amp; Jerry\t&lt;3 ") == "tom & jerry <3"
    words = lambda text: tokenizer.engine.pre_tokenizer.pre_tokenize_str(clean(text))  # noqa: E731
    assert [word for word, _ in words("They're 42, ok?!")] == ["they", "'re", "4", "2", ",", "ok",
                                                               "?!"]


def test_a_caption_that_is_too_long_still_ends_with_the_end():
    tokenizer = train_tokenizer(CAPTIONS, 600)
    ids, is_token = tokenizer.encode(["a red ring " * 40, ""], 9)
    assert ids[0, -1] == tokenizer.end and is_token[0].all()
    assert ids[1, :2].tolist() == [tokenizer.start, tokenizer.end] and is_token[1].sum() == 2
    assert tokenizer.decode(ids)[1] == ""


@pytest.mark.parametrize("texts, context, words", [
    ([], 9, "at least one caption"), (["a"], 1, "two tokens"),
    ([None], 9, "must be text, got NoneType"),
    (["half \ud83d"], 9, "half a character")])
def test_what_cannot_be_read_is_refused_in_a_line(texts, context, words):
    with pytest.raises(ValueError, match=words) as error:
        train_tokenizer(CAPTIONS, 600).encode(texts, context)
    assert "\n" not in str(error.value)


def test_files_that_are_no_tokenizers_are_refused_in_a_line(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "bpe.txt.gz").write_bytes(b"no gzip")
    for name in ("tokenizer.json", "bpe.txt.gz", "absent.json"):
        with pytest.raises(ValueError, match="not ") as error:
            load_tokenizer(tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="515"):
        train_tokenizer(CAPTIONS, 100)
    with pytest.raises(ValueError, match="no captions"):
        train_tokenizer([" "])


def test_the_tokenizer_of_a_run_lies_beside_its_weights_and_must_fit_them(tmp_path):
    tokenizer = train_tokenizer(CAPTIONS, 600)
    tokenizer.save(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    for source in (tmp_path / "run", tmp_path / "run" / "model.safetensors"):
        assert tokenizer_of(source, "", 600).vocabulary == tokenizer.vocabulary
    assert tokenizer_of(tmp_path / "empty", tmp_path / "run", 600).end == tokenizer.end
    with pytest.raises(ValueError, match="holds no tokenizer.json; pass --tokenizer"):
        tokenizer_of(tmp_path / "empty", None, 600)
    with pytest.raises(ValueError, match="do not belong together"):
        tokenizer_of(tmp_path / "run", "", tokenizer.vocabulary - 1)
