"""What is proved about tasks/retrieval.py: ranks and dual softmax by hand; ties never help; the
order of the test set does not matter; class names go into every prompt; a protocol is complete."""

import math

import pytest
import torch
import torch.nn.functional as F

from clip_video import VideoCLIP
from tasks.retrieval import PROMPTS, embed_classes, protocol, retrieval_metrics
from weights.tokenizer import train_tokenizer


def test_a_constant_similarity_scores_nothing():
    """Official code lets ties win, so that a broken model scores 100 %."""
    metrics = retrieval_metrics(torch.ones(20, 20))
    assert metrics["t2v_R@10"] == metrics["v2t_R@10"] == 0 and metrics["t2v_MdR"] == 20
    assert metrics["dsl_t2v_R@10"] == metrics["dsl_v2t_R@10"] == 0


def test_ranks_by_hand():
    S = torch.tensor([[0.9, 0.9, 0.1], [0.2, 0.8, 0.3], [0.5, 0.1, 0.4]])
    metrics = retrieval_metrics(S)                                           # t2v ranks 2, 1, 2
    assert metrics["t2v_R@1"] == pytest.approx(100 / 3) and metrics["t2v_R@5"] == 100
    assert metrics["t2v_MdR"] == 2 and metrics["t2v_MnR"] == pytest.approx(5 / 3)
    assert metrics["v2t_MnR"] == pytest.approx((1 + 2 + 1) / 3)              # columns: 1, 2, 1


def test_the_dual_softmax_by_hand():
    """t2v weighs by a softmax over texts, v2t by one over videos, without a temperature."""
    S = [[2.0, 2.1, 0.0], [0.0, 5.0, 0.5], [0.3, 1.0, 0.5]]  # all texts like video 1
    down = [sum(math.exp(S[i][j]) for i in range(3)) for j in range(3)]
    along = [sum(math.exp(x) for x in row) for row in S]
    t2v = [[S[i][j] * math.exp(S[i][j]) / down[j] for j in range(3)] for i in range(3)]
    v2t = [[S[i][j] * math.exp(S[i][j]) / along[i] for j in range(3)] for i in range(3)]
    rank = lambda row, i: 1 + sum(x >= row[i] for j, x in enumerate(row) if j != i)  # noqa: E731
    metrics = retrieval_metrics(torch.tensor(S))
    assert metrics["dsl_t2v_MnR"] == pytest.approx(sum(rank(row, i) for i,
                                                       row in enumerate(t2v)) / 3)
    assert metrics["dsl_v2t_MnR"] == pytest.approx(sum(rank(col, i) for i,
                                                       col in enumerate(zip(*v2t))) / 3)
    assert metrics["dsl_t2v_MnR"] != metrics["t2v_MnR"]  # it does change something


def test_the_order_of_the_test_set_does_not_matter():
    S = torch.randn(12, 12).round(decimals=1)
    shuffle = torch.randperm(12)
    same = retrieval_metrics(S[shuffle][:, shuffle])
    assert same == pytest.approx(retrieval_metrics(S))
    texts = torch.randperm(12)
    assert retrieval_metrics(S[texts], owner=texts) == pytest.approx(retrieval_metrics(S))


def test_a_video_with_several_captions_is_found_by_its_best():
    """Own captions do not compete with each other, not even when equal."""
    S = torch.tensor([[9.0, 1.0], [9.0, 8.0], [2.0, 5.0], [1.0, 5.0], [1.0, 3.0]])
    owner = torch.tensor([0, 0, 1, 1, 1])
    metrics = retrieval_metrics(S, owner)
    assert metrics["t2v_R@1"] == 100 and metrics["v2t_R@1"] == 50
    assert metrics["v2t_MnR"] == 1.5  # the 8 beats the 5s of video 1
    S[0, 1] = 7  # now two strangers beat them
    assert retrieval_metrics(S, owner)["v2t_MnR"] == 2
    assert retrieval_metrics(S, owner, grouped=True)["v2t_MnR"] == 1.5  # but both are of video 0


@pytest.mark.parametrize("S, owner, words", [
    (torch.randn(3, 4), None, "each of 4 videos"), (torch.randn(3), None, "expected numbers"),
    (torch.randn(3, 2), torch.tensor([0, 0, 0]), "at least once"),
    (torch.full((2, 2), math.nan), None, "expected numbers")])
def test_retrieval_of_nonsense_is_refused(S, owner, words):
    with pytest.raises(ValueError, match=words):
        retrieval_metrics(S, owner)


def test_class_names_go_into_every_prompt():
    tokenizer = train_tokenizer(["a red ring orbits clockwise"] * 3, 600)
    model = VideoCLIP("tiny", kind="frames", frames=1, image_size=16, context=20,
                      vocabulary=tokenizer.vocabulary).eval()
    found = embed_classes(model, tokenizer, ["orbiting", "a {set}"])
    assert found.shape == (16, 2, 128)
    ids, _ = tokenizer.encode(["The man is orbiting"], 20)
    torch.testing.assert_close(found[14, 0],
                               F.normalize(model.encode_text(ids), dim=-1)[0].detach())


def test_a_protocol_is_one_line_with_everything_in_it():
    line = protocol("MSVD test", videos=670, captions=27763, frames=12, sampling="uniform",
                    crop="centre crop", size=224, merge=0.25)
    for word in ("MSVD test", "670 videos", "27763 captions", "12 frames", "uniform",
                 "centre crop 224",
                 "0.25", "dual softmax", "best own caption"):
        assert word in line
    assert "\n" not in line


def test_the_prompts_are_sixteen_different_sentences_with_one_place_for_a_name():
    assert len(PROMPTS) == len(set(PROMPTS)) == 16
    assert all(prompt.count("{}") == 1 for prompt in PROMPTS)
