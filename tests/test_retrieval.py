"""What is proved about tasks/retrieval.py: ranks and dual softmax by hand; ties never help; the
order of the test set does not matter; class names go into every prompt; a protocol is complete."""

import math

import pytest
import torch
import torch.nn.functional as F

import clip_video
import train
from tasks.recognition import evaluate_zero_shot
from tasks.retrieval import PROMPTS, retrieval_metrics
from video.clip_set import ClipSet
from video.transforms import normalise
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


class Named(ClipSet):
    """670 videos with 27,763 captions, of three classes."""

    source, captions, classes = "MSVD test", [], {"label": ("orbiting", "a {set}", "red_ring")}

    def __len__(self):
        return 670

    def count_captions(self, places):
        return 27763 if list(places) == list(range(670)) else -1


def test_class_names_go_into_every_prompt():
    sentences = Named().sentences(PROMPTS)["label"]
    assert len(sentences) == 16 and all(len(row) == 3 for row in sentences)
    assert sentences[14] == ["The man is orbiting", "The man is a {set}", "The man is red ring"]


def test_zero_shot_recognition_is_that_of_each_sentence_encoded_alone():
    tokenizer = train_tokenizer(["a red ring orbits clockwise"] * 3, 600)
    model = clip_video.VideoCLIP("tiny", kind="frames", frames=1, image_size=16, context=20,
                                 vocabulary=tokenizer.vocabulary).eval()
    video, sentences = torch.randint(256, (6, 1, 16, 16, 3)).byte(), Named().sentences(PROMPTS)
    with torch.no_grad():
        table = torch.stack([torch.cat([F.normalize(
            model.encode_text(tokenizer.encode([text], 20)[0]), dim=-1) for text in row])
                             for row in sentences["label"]])
        features = model.encode_video(normalise(video, model.mean, model.std))
        chosen = clip_video.zero_shot(features, table, model.logit_scale).argmax(dim=1)
    labels = torch.where(torch.arange(6) < 2, (chosen + 1) % 3, chosen)      # two of six are wrong
    batches = [{"video": video[i:i + 3], "labels": {"label": labels[i:i + 3]}, "number": i // 3}
               for i in (0, 3)]
    numbers = evaluate_zero_shot(model, batches, tokenizer, sentences)
    assert numbers == {"zero_shot_top1": pytest.approx(100 * 4 / 6), "zero_shot_top5": 100}


def test_a_protocol_names_all_that_ranks_depend_on():
    stage = train.VideoLanguage(data="list.csv", num_frames=12, sampling="uniform", input_size=224,
                                transform="clip", weights="a", merge="b", merge_share=0.25,
                                steps=0, eval_clips=1000, gallery=1000)
    line = "; ".join(f"{word}: {value}" for word, value in
                     stage.protocol({"val": Named()}).items())
    for word in ("MSVD test", "670 videos", "27763 captions", "frames: 12", "uniform", "clip",
                 "pixels: 224", "0.25", "dual softmax", "best caption", "chance of R@1 is 0.1 %",
                 "3 classes of label (chance 33.3 %)", "16 prompts"):
        assert word in line
    assert "\n" not in line


def test_the_prompts_are_sixteen_different_sentences_with_one_place_for_a_name():
    assert len(PROMPTS) == len(set(PROMPTS)) == 16
    assert all(prompt.count("{}") == 1 for prompt in PROMPTS)
