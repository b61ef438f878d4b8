"""What is proved about the scores of captions: numbers worked out by hand, and the properties the
papers name."""

import math

import pytest

from tasks.captioning import bleu, cider_d, common, rouge_l, score, words


def test_words_are_lower_case_without_punctuation():
    text = "A dog, running. Counter-clockwise! It's 2_x"
    assert words(text) == ["a", "dog", "running", "counter-clockwise", "it's", "2", "x"]


def test_bleu_counts_no_word_more_often_than_a_reference_has_it():
    """The example of Papineni et al. 2002, Sec. 2.1: seven times "the"; the references have it
    twice and once."""
    references = [["the cat is on the mat", "there is a cat on the mat"]]
    assert bleu(["the the the the the the the"], references, n=1) == pytest.approx(2 / 7)


def test_bleu_of_a_short_caption_pays_for_its_length():
    """3 words, all right; the nearest reference has 4: exp(1 - 4/3)."""
    assert bleu(["a dog runs"], [["a dog runs home", "a dog runs home today with me"]],
                n=1) == pytest.approx(math.exp(-1 / 3))


def test_bleu_of_a_worked_example():
    """"the red square moves right" against "the red square moves left": runs right 4/5, 3/4, 2/3,
    1/2, so the fourth root of 0.2; and no length to pay for."""
    assert bleu(["the red square moves right"],
                [["the red square moves left"]]) == pytest.approx(0.2**0.25)


def test_bleu_is_counted_over_all_captions_and_is_nothing_where_no_run_of_four_is_right():
    pairs = ["a b c d", "a b x y"], [["a b c d"], ["a b c d"]]
    expected = (6 / 8 * 4 / 6 * 2 / 4 * 1 / 2)**0.25
    assert bleu(*pairs) == pytest.approx(expected)
    assert bleu(["a b x y"], [["a b c d"]]) == 0 and bleu([""], [["a b c d"]]) == 0


def test_the_longest_common_sequence_may_have_gaps():
    assert common("police killed the gunman".split(), "police kill the gunman".split()) == 3
    assert common("the gunman kill police".split(), "police kill the gunman".split()) == 2
    assert common([], ["a"]) == 0


def test_rouge_l_prefers_the_right_order():
    """Lin 2004, Sec. 3.1: against "police killed the gunman", "police kill the gunman" has three
    words in order and "the gunman kill police" two, of four and four: with P = R, F is P whatever
    beta."""
    reference = [["police killed the gunman"]]
    assert rouge_l(["police kill the gunman"], reference) == pytest.approx(3 / 4)
    assert rouge_l(["the gunman kill police"], reference) == pytest.approx(2 / 4)
    assert rouge_l(["a dog"], reference) == 0


def test_rouge_l_weighs_recall_by_beta():
    """2 of 2 words right, 2 of 4 found: P = 1, R = 1/2; (1 + 1.44) * 0.5 / (0.5 + 1.44)."""
    assert rouge_l(["police gunman"],
                   [["police killed the gunman"]]) == pytest.approx(2.44 * 0.5 / 1.94)


def test_cider_of_a_worked_example():
    """Two clips; "red" and "blue" are told of one each, "square" of both, so that ln(2/2) = 0. With
    single words alone: "red square" against "red square" has cosine 1, "red square" against "blue
    square" 0. Mean 0.5, times 10."""
    assert cider_d(["red square", "red square"], [["red square"], ["blue square"]],
                   n=1) == pytest.approx(5)


def test_cider_d_takes_no_gain_from_repeating_and_makes_length_pay():
    """"red red red" has a vector in the direction of "red": without the D its cosine with it is 1.
    With it, 1 of its 3 counts, 1/3, and it is two words too long: exp(-4 / 72)."""
    others = [["red"], ["blue"]]
    assert cider_d(["red red red", "blue"], others,
                   n=1) == pytest.approx(10 * (math.exp(-4 / 72) / 3 + 1) / 2)


def test_cider_is_the_mean_over_references_and_runs():
    """Caption "a b" of the first of two clips. Runs of 1: "a", "b" in clip one only, weight ln 2;
    reference "a b" gives 1, reference "a c" gives 1/2. Runs of 2: 1 and 0. Mean of (1 + 1 + 0.5 +
    0) / (2 references * 2 lengths)."""
    value = cider_d(["a b", "x"], [["a b", "a c"], ["x y"]], n=2)
    second = math.exp(-1 / 72) * (1 / math.sqrt(2)) / 2
    assert value == pytest.approx(10 * (2.5 / 4 + second) / 2)


def test_a_perfect_caption_has_all_of_each_score():
    texts = ["a red square moves left slowly", "two blue rings meet in the middle", "it gets dark"]
    found = score(texts, [[text] for text in texts])
    assert found["BLEU-4"] == pytest.approx(100) and found["ROUGE-L"] == pytest.approx(100)
    # The third has no run of four words.
    assert found["CIDEr-D"] == pytest.approx(1000 * (1 + 1 + 3 / 4) / 3)
