"""What is proved about the stages answer and retrieve, and about multiple choice, zero-shot classes
and scored captions in the stage clip:

questions never give their answer away; the head sees what it should and nothing more; accuracies
count rare answers as wrong and stand beside their baselines; every caption of a video counts; all
work on files; mistakes get one line.
"""

import json

import numpy as np
import pytest
import torch

import caption_decoder
import clip_video
import data
import engine.run
import train
from tasks import retrieval
from tasks.question_answering import (AnswerHead, QuestionOnly, VideoQA, answer_table,
                                      normalise_answer)
from test_clip_card import finished, make_list, run as run_clip  # noqa: F401
from test_train import write_video
from tools import predict
from video import moving_shapes

SMALL = "--batch-size 4 --eval-clips 10 --workers 0 --precision fp32 --device cpu --lr 1e-3".split()


def run(stage, *flags, out, steps=2):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.run.pictures, "curve", lambda *_: [])
        return train.main([stage, *SMALL, "--out", str(out), "--steps", str(steps), *flags])


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


# ------------------------------------------------------------------------------------------------
# Questions about the generated world


def test_questions_are_true_half_of_the_time_and_never_hold_their_answer():
    rng, kinds, true = np.random.default_rng(0), {}, []
    world = moving_shapes.MovingShapes("val", 2, 16)
    for i in range(2000):
        facts = world.scene(i).facts
        question, answer = moving_shapes.ask(facts, rng)
        kind = " ".join(question.strip("?").split()[:2])
        kinds[kind] = kinds.get(kind, 0) + 1
        if kind == "is it":
            said = moving_shapes.parse_caption(question)
            assert (all(facts[fact] == said[fact]
                        for fact in ("motion", "shape", "colour"))) == (answer == "yes")
            true.append(answer == "yes")
        else:
            assert f" {answer}" not in question and answer in (
                facts["motion"], facts["motion"].split()[-1], facts["shape"], facts["colour"])
    assert set(kinds) == {"what happens", "which way", "what shape", "what colour", "is it"}
    assert min(kinds.values()) > 100
    assert 0.4 < np.mean(true) < 0.6


def test_a_question_is_a_function_of_the_clips_number():
    world, again = (moving_shapes.QuestionShapes("val", 2, 16, seed=3) for _ in range(2))
    again[7]
    assert world[5]["question"] == again[5]["question"] and world[5]["answer"] == again[5]["answer"]
    assert (world[5]["video"] == moving_shapes.MovingShapes("val", 2, 16, seed=3)[5]["video"]).all()


def test_of_five_choices_one_is_true_and_the_others_differ_in_one_fact():
    rng, places = np.random.default_rng(0), []
    for i in range(50):
        facts = moving_shapes.MovingShapes("val", 2, 16).scene(i).facts
        sentences, right = moving_shapes.choices(facts, rng)
        wrong = [[fact for fact in ("motion", "shape", "colour")
                  if moving_shapes.parse_caption(text)[fact] != facts[fact]]
                 for text in sentences]
        assert wrong[right] == [] and sorted(len(facts) for facts in wrong) == [0, 1, 1, 1, 1]
        assert sorted(sum(wrong, [])) == ["colour", "motion", "motion", "shape"]
        places.append(right)
    assert set(places) == set(range(5))


def test_clips_of_two_acts_come_in_pairs_that_only_order_tells_apart():
    world = moving_shapes.ActShapes("val", frames=7, size=32, seed=1)
    for k in range(20):
        a, b = world[2 * k], world[2 * k + 1]
        order = [[], []]
        for clip, motions in zip((a, b), order):
            text = clip["caption"].removeprefix("first ")
            parts = text.replace(", but before that", ", then").replace(" and later ",
                                                                        ", then ").split(", then ")
            motions += [moving_shapes.parse_caption(part)["motion"] for part in parts]
            if "but before that" in clip["caption"]:
                motions.reverse()
            assert clip["video"].shape == (7, 32, 32, 3) and clip["labels"] == {}
            assert set(motions) <= set(moving_shapes.MOTIONS)
        assert order[0] == order[1][::-1] and len(set(order[0])) == 2
        looks = [{key: moving_shapes.parse_caption(clip["caption"])[key]
                  for key in ("shape", "colour")} for clip in (a, b)]
        assert looks[0] == looks[1]
    assert (world[6]["video"]
            == moving_shapes.ActShapes("val", frames=7, size=32, seed=1)[6]["video"]).all()


# ------------------------------------------------------------------------------------------------
# Answers


def test_the_table_holds_the_commonest_answers_as_they_are_compared():
    assert normalise_answer("  A  Dog. ") == "a dog"
    assert answer_table(["man", "Man", "dog", "cat", "cat", "cat!"], most=2) == ["cat", "man"]
    assert answer_table(["b", "a"]) == ["a", "b"]


def test_the_baseline_knows_the_question_alone():
    guess = QuestionOnly(["who?", "who?", "who?", "what?"], ["man", "man", "dog", "dog"])
    assert guess("Who") == "man" and guess("what?") == "dog" and guess("never asked") == "dog"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    clip = clip_video.VideoCLIP(train.SMALL, text_size=train.SMALL_TEXT, vocabulary=60, context=9,
                                end=59, frames=2)
    decoder = caption_decoder.CaptionDecoder(96, heads=2, depth=1, visual_width=96, vocabulary=60,
                                             queries=3)
    return VideoQA(clip, decoder, ["yes", "no", "left"], drop=0.0).eval()


def test_an_answer_is_read_from_decoder_video_and_text_at_the_questions_end(model):
    """Written out for a question whose end is its last token: the official order of the three."""
    video, ids = torch.randn(1, 3, 2, 40, 40), torch.tensor([[58, 3, 4, 59]])
    seen, tokens = model.clip.visual.encode(video)
    words = model.clip.text.tokens(ids)
    feature = torch.cat([model.caption_decoder.hidden(tokens.flatten(1, 2), words)[:, -1],
                         model.clip.visual_norm(seen),
                         words[:, -1]], dim=-1)
    assert torch.allclose(model(video, ids), model.head(feature), atol=1e-6)


def test_padding_after_the_end_changes_no_answer_and_a_full_context_is_no_overflow(model):
    video, ids = torch.randn(2, 3, 2, 40, 40), torch.tensor([[58, 3, 59, 0, 0, 0, 0, 0, 0],
                                                             [58, 1, 2, 3, 4, 5, 6, 7, 59]])
    both, alone = model(video, ids), model(video[:1], ids[:1, :3])
    assert torch.allclose(both[:1], alone, atol=1e-5) and both.shape == (2, 3)


def test_everything_an_answer_needs_learns_and_nothing_else_does(model):
    model(torch.randn(1, 3, 2, 40, 40),
          torch.tensor([[58, 3, 4, 59]])).logsumexp(dim=1).sum().backward()
    for name, p in model.named_parameters():
        assert p.requires_grad == (p.grad is not None), name
    frozen = {name.rsplit(".", 1)[0] for name, p in model.named_parameters() if not p.requires_grad}
    assert {"clip.text.proj", "clip.visual_proj", "caption_decoder.vocabulary", "clip"} <= frozen
    model.zero_grad()


def test_the_head_is_as_wide_as_published():
    """h = D + 2*W = 768 + 2*512, then 2*h, then the answers."""
    head = AnswerHead(768, 512, 1500)
    assert [tuple(layer.weight.shape) for layer in head
            if isinstance(layer, torch.nn.Linear)] == [(3584, 1792), (1500, 3584)]


# noqa: F811
def test_a_run_answers_beside_its_baselines_and_on_the_command_line(finished, tmp_path, capsys):
    assert run("answer", "--weights", str(finished), out=tmp_path / "run") == 0
    told = capsys.readouterr().out
    assert "10 held-out clips of moving shapes" in told and "open-ended" in told
    assert "question only" in told
    found = metrics(tmp_path / "run")
    assert found["all_questions"] == found["val_accuracy"] and 0 <= found["question_only"] <= 100
    assert run("answer", "--weights", str(tmp_path / "run"), out=tmp_path / "again", steps=0) == 0
    assert metrics(tmp_path / "again")["val_accuracy"] == found["val_accuracy"]
    write_video(tmp_path / "a.mp4")
    capsys.readouterr()
    flags = [str(tmp_path / "a.mp4"), "--question", "what happens?", "--weights"]
    assert predict.main([*flags, str(tmp_path / "run")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "protocol: one view of" in lines[0] and len(lines) == 6
    assert all(" %  " in line for line in lines[1:])
    assert predict.main([*flags, str(finished)]) == 2
    assert "give a run of train.py answer" in capsys.readouterr().err


# noqa: F811
def test_files_with_questions_train_and_rare_answers_count_as_wrong(finished, tmp_path, capsys):
    path = make_list(
        tmp_path, json.dumps([{"video": f"{i % 4}.mp4", "question": "what is it?", "answer": answer}
                                           for i, answer in enumerate(["wall", "Wall.", "wall",
                                                                       "dog", "dog", "cat"])]),
        "qa.json")
    assert run("answer", "--weights", str(finished), "--data", str(path), "--val-data", str(path),
               "--answers", "2",
               out=tmp_path / "run") == 0
    assert "one of the 2 most frequent answers" in capsys.readouterr().out
    found = metrics(tmp_path / "run")
    assert found["commonest_answer"] == found["question_only"] == 50
    # never 100: the cat is not in the table
    assert found["what"] == found["all_questions"] in (50, pytest.approx(100 / 3))


@pytest.mark.parametrize("flags, complaint", [
    (("answer",), "--weights: answering starts from a video-text model"),
    (("retrieve",), "--weights: fine-tuning starts from a model"),
    (("answer", "--weights", "{run}", "--data", "{list}"), "a question or an answer is missing"),
    (("answer", "--weights", "{run}", "--answers", "1"), "--answers 1: must be at least 2"),
    (("clip", "--weights", "{run}", "--data", "{folder}", "--steps", "0", "--prompts", "{list}"),
     "with {} in place of the class name"),
    (("clip", "--weights", "{run}", "--data", "{folder}", "--steps", "1"), "has no captions"),
])
def test_mistakes_get_one_line(finished, tmp_path, capsys, flags, complaint):  # noqa: F811
    path = make_list(tmp_path,
                     "path,caption\n0.mp4,a wall\n1.mp4,a door\n2.mp4,a wall\n3.mp4,a wall\n")
    for name in ("wall", "door"):
        (tmp_path / "classes" / name).mkdir(parents=True)
        (tmp_path / f"{'0' if name == 'wall' else '1'}.mp4").rename(
            tmp_path / "classes" / name / "a.mp4")
    flags = [flag.format(run=finished, list=path, folder=tmp_path / "classes")
             if flag != "{}" else flag for flag in flags]
    assert run(flags[0], *(["--num-frames", "2", "--input-size", "16"]
                           if flags[0] == "clip" else []), *flags[1:],
               out=tmp_path / "run") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and complaint in err, err


# ------------------------------------------------------------------------------------------------
# Retrieval, multiple choice, zero-shot classes, captions


# noqa: F811
def test_fine_tuned_retrieval_reports_all_ranks_and_its_protocol(finished, tmp_path, capsys):
    small = ("retrieve", "--weights", str(finished), "--num-frames", "4")
    assert run(*small, "--test", "10", out=tmp_path / "run") == 0
    told = capsys.readouterr().out
    assert "zero-shot" not in told and "without the order, R@1 cannot pass 50 %" in told
    assert "10 held-out clips of moving shapes; frames: 4; pixels: 16" in told  # as the weights
    assert "gallery: 10 videos, 10 captions; chance of R@1 is 10.0 %" in told
    found = metrics(tmp_path / "run")
    assert found["initial_val_t2v_R@1"] >= 0 and found["val_t2v_R@1"] == found["t2v_R@1"]
    assert found["dsl_v2t_MnR"] >= 1
    assert "val_caption" not in found and "BLEU-4" not in found
    # of clips with two acts, too
    assert "test_t2v_R@1" in found and "test_zero_shot_motion" not in found


def test_the_caption_decoder_rests_where_captions_do_not_count():
    card = train.VideoLanguage(num_frames=2, input_size=16, caption_weight=0.0, image_every=0,
                               device="cpu", precision="fp32")
    train_set, _ = card.datasets()
    model = card.build(train_set)
    assert not any(p.requires_grad for p in model.caption_decoder.parameters())
    loss, values = card.loss(model, next(iter(data.batches(train_set, 3, 0, 1))), None)
    assert set(values) == {"loss", "contrastive"} and loss.requires_grad


def test_a_video_with_several_captions_is_looked_at_once_and_found_by_any(finished, tmp_path,
                                                                          capsys):  # noqa: F811
    rows = [(0, "a wall"), (1, "a door"), (0, "a grey wall"), (2, "a hat"), (1, "one door"),
            (0, "the wall")]
    path = make_list(tmp_path, "path,caption\n" + "".join(f"{i}.mp4,{text}\n" for i, text in rows),
                     count=3)
    assert run("retrieve", "--weights", str(finished), "--data", str(path), "--val-data", str(path),
               "--num-frames", "2",
               "--input-size", "16", out=tmp_path / "run", steps=0) == 0
    told = capsys.readouterr().out
    assert "3 videos, 6 captions" in told and "v2t among videos by their best caption" in told
    assert metrics(tmp_path / "run")["val_clips"] == 3
    held_out = data.VideoFiles(path, 2, 16, sampling="segment", train=False).one_item_per_video()
    assert [held_out[i]["captions"] for i in range(3)] == [("a wall", "a grey wall", "the wall"),
                                                           ("a door", "one door"), ("a hat",)]


class Parrot:
    """In place of a VideoCLIP: videos are embeddings, sentences (one token) rows of a table."""

    def encode_video(self, video):
        return video

    def encode_text(self, ids):
        return torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 3.0]])[ids[:, 0]]


def test_multiple_choice_by_hand():
    """Cosines, not products: of (2, 1) with (1, 0), (0, 1), (3, 3): 0.894, 0.447, 0.949.

    Of (1, 0): 1, 0, 0.707, where the product would say the third."""
    ids = torch.tensor([[0], [1], [2]])
    chosen = retrieval.choose(Parrot(), torch.tensor([[2.0, 1.0], [1.0, 0.0], [0.0, 1.0]]),
                              [ids, ids, ids.flip(0)])
    assert chosen.tolist() == [2, 0, 1]


# noqa: F811
def test_multiple_choice_of_files_and_of_the_generated_world(finished, tmp_path, monkeypatch):
    """A model that always takes the first of three sentences: right for two of four videos."""
    assert 0 <= metrics(finished)["multiple_choice"] <= 100 and metrics(finished)["ROUGE-L"] >= 0
    monkeypatch.setattr(retrieval, "choose", lambda model, video,
                        options: torch.zeros(len(options), dtype=torch.int64))
    path = make_list(tmp_path, json.dumps([{"video": f"{i}.mp4",
                                            "caption": ["a wall", "a door", f"hat {i}"],
                                            "answer": i % 3}
                                           for i in range(4)]), "mc.json")
    assert run_clip("--weights", str(finished), "--data", str(path), "--val-data", str(path),
                    out=tmp_path / "run", steps=0) == 0
    assert metrics(tmp_path / "run")["multiple_choice"] == 50


# noqa: F811
def test_files_with_classes_are_recognised_by_their_names_alone(finished, tmp_path, capsys):
    for name in ("red_circle", "wall"):
        (tmp_path / name).mkdir()
        for i in range(2):
            write_video(tmp_path / name / f"{i}.mp4", frames=4)
    (tmp_path / "prompts.txt").write_text("we see a {}\n\n{}\n")
    for more, count in (((), 16), (("--prompts", str(tmp_path / "prompts.txt")), 2)):
        assert run_clip("--weights", str(finished), "--data", str(tmp_path), "--val-data",
                        str(tmp_path), *more,
                        out=tmp_path / "run", steps=0) == 0
        told = capsys.readouterr().out
        assert f"4 held-out clips of {tmp_path};" in told
        assert "zero-shot: 2 classes of label (chance 50.0 %)" in told
        assert f"prompts: the mean over {count} prompts of the softmax over classes" in told
        assert metrics(tmp_path / "run")["val_zero_shot_top5"] == 100
