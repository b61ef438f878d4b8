"""What is proved about the clip stage of train.py:

a run leaves a file in InternVideo's layout that both components read; gradient
caching is the large batch; accumulation is refused; lists as CSV and JSONL train; bad lists get one
line; a video gets a sentence and a probability on the command line.
"""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import caption_decoder
import clip_video
import data
import engine.run
import train
from engine.stage import generator
from test_train import lines, write_video
from tools import predict
from video import moving_shapes
from video.transforms import normalise
from weights.tokenizer import load_tokenizer

SMALL = (
    "--num-frames 2 --input-size 16 --batch-size 6 --eval-clips 12 --workers 0 --precision fp32 "
         "--device cpu --lr 1e-3").split()


def run(*flags, out, steps=3, draw=False):
    with pytest.MonkeyPatch.context() as patch:
        if not draw:  # pictures take longer than all the rest
            patch.setattr(train.VideoLanguage, "pictures", lambda *_: [])
            patch.setattr(engine.run.pictures, "curve", lambda *_: [])
        return train.main(["clip", *SMALL, "--out", str(out), "--steps", str(steps), *flags])


def make_list(folder, text, name="list.csv", count=4):
    for i in range(count):
        write_video(folder / f"{i}.mp4", frames=4)
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("clip")
    assert run(out=folder, draw=True) == 0
    return folder


def test_a_run_leaves_its_files_pictures_and_numbers(finished):
    for name in ("model.safetensors", "config.json", "tokenizer.json", "last.pt", "loss.png",
                 "retrieval.png",
                 "similarity.png", "captions.png", "attention.png"):
        assert (finished / name).stat().st_size > 0
    metrics = json.loads((finished / "metrics.json").read_text())
    for prefix in ("val_", "unseen_"):
        for name in ("t2v_R@1", "v2t_R@1", "dsl_t2v_R@1", "zero_shot_motion", "zero_shot_shape",
                     "zero_shot_colour", "captions_motion", "captions_all_three"):
            assert 0 <= metrics[prefix + name] <= 100


def test_a_run_has_the_official_prefixes_and_each_part_reads_it(finished):
    tensors = load_file(finished / "model.safetensors")
    assert {key.split(".")[0] for key in tensors} == {"clip", "caption_decoder"}
    clip = clip_video.VideoCLIP.from_official(finished)
    decoder = caption_decoder.CaptionDecoder.from_official(finished)
    whole = caption_decoder.VideoText.from_run(finished)
    assert clip.config["end"] == load_tokenizer(finished).end
    for part, prefix in ((clip, "clip."), (decoder, "caption_decoder.")):
        assert all(torch.equal(tensors[prefix + key], value) for key,
                   value in part.state_dict().items())
    assert all(torch.equal(tensors[key], value) for key, value in whole.state_dict().items())
    assert whole.config == json.loads((finished / "config.json").read_text())


def test_evaluating_a_run_again_gives_its_numbers(finished, tmp_path):
    assert run("--weights", str(finished), out=tmp_path, steps=0) == 0
    a, b = (json.loads((folder / "metrics.json").read_text()) for folder in (finished, tmp_path))
    assert all(a[key] == b[key] for key in a if key.startswith(("val_", "unseen_")))


def test_videos_and_images_alternate(finished):
    assert run("--log-every", "1", "--image-every", "2", out=finished / "again", steps=4) == 0
    told = [line.get("image_contrastive") for line in lines(finished / "again") if "lr" in line]
    # Image, video, image, video: a line also repeats what the last batch of the other kind gave.
    assert told[0] == told[1] != told[2] == told[3]


def test_a_picture_of_the_generated_world_is_one_frame_of_its_clip_with_a_true_sentence():
    clips, stills = moving_shapes.MovingShapes("train", 6, 32,
                                               0), moving_shapes.StillShapes("train", 6, 32, 0)
    for i in range(40):
        clip, still = clips[i], stills[i]
        assert still["video"].shape == (1, 32, 32, 3) and still["facts"] == clip["facts"]
        assert any((still["video"][0] == frame).all() for frame in clip["video"])
        assert moving_shapes.parse_caption(still["caption"]) == {key: clip["facts"][key]
                                                                 for key in ("shape", "colour")}


def test_every_nth_batch_is_of_images_and_no_clip_comes_twice_wherever_one_begins():
    card = train.VideoLanguage(num_frames=2, input_size=16, batch_size=3, image_batch=5,
                               image_every=3, steps=8, workers=0)
    train_set, _ = card.datasets()
    whole = list(card.batches(train_set, 0))
    assert [len(batch["video"]) for batch in whole] == [5, 3, 3, 5, 3, 3, 5, 3]
    assert [batch.get("image", False) for batch in whole] == [len(batch["video"]) == 5
                                                              for batch in whole]
    for kind in (3, 5):
        clips = [clip.numpy().tobytes() for batch in whole for clip in batch["video"]
                 if len(batch["video"]) == kind]
        assert len(set(clips)) == len(clips)
    for first in range(8):
        again = list(card.batches(train_set, first))
        assert len(again) == 8 - first
        assert all(torch.equal(a["video"], b["video"]) for a, b in zip(whole[first:], again))


def test_with_few_clips_the_images_are_frames_of_the_same_clips():
    card = train.VideoLanguage(num_frames=2, input_size=16, batch_size=6, image_batch=6,
                               image_every=2, steps=4, train_clips=3, workers=0)
    train_set, _ = card.datasets()
    shown = {tuple(facts.items()) for batch in card.batches(train_set, 0)
             for facts in batch["facts"]}
    assert shown == {tuple(train_set[i]["facts"].items()) for i in range(3)}


def test_pictures_and_their_sentences_come_from_a_list_of_their_own(tmp_path, capsys):
    from PIL import Image
    Image.new("RGB", (24, 20), (90, 90, 90)).save(tmp_path / "grey.png")
    (tmp_path / "pictures.csv").write_text("path,caption\ngrey.png,nothing but grey\n")
    assert run("--image-data", str(tmp_path / "pictures.csv"), out=tmp_path / "run") == 0
    assert "grey" in load_tokenizer(tmp_path / "run").decode(
        load_tokenizer(tmp_path / "run").encode(["nothing but grey"], 20)[0].tolist())[0]
    (tmp_path / "empty.csv").write_text("path,caption\ngrey.png,\n")
    capsys.readouterr()
    assert run("--image-data", str(tmp_path / "empty.csv"), out=tmp_path / "run") == 2
    assert run("--image-data", str(tmp_path / "empty.csv"), "--image-every", "0",
               out=tmp_path / "run") == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 2 and "grey.png is empty" in err[0] and "leave out one" in err[1]


def test_gradient_caching_is_the_large_batch(monkeypatch):
    """Value and gradients of 7 pairs in pieces of 3, against all at once; in float64 to 1e-10."""
    monkeypatch.setattr(train, "normalise", lambda *args: normalise(*args).double())
    found = []
    for size in (0, 3):
        torch.manual_seed(0)
        card = train.VideoLanguage(num_frames=2, input_size=16, cache_size=size, local_units=0,
                                   device="cpu", precision="fp32")
        train_set, _ = card.datasets()
        model = card.build(train_set).double()
        for module in model.modules():  # dropout draws once for each piece
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        loss, _ = card.loss(model, next(iter(data.batches(train_set, 7, 0, 1))), generator(0))
        loss.backward()
        found.append([loss.detach()] + [p.grad for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 50
    for a, b in zip(*found):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-10)


def test_accumulation_is_refused_and_the_alternative_named(tmp_path, capsys):
    assert run("--accum", "4", out=tmp_path) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "adds no negatives" in err
    assert "--batch-size 24 --cache-size 6" in err


def test_local_units_and_gradient_caching_exclude_each_other(tmp_path, capsys):
    assert run("--cache-size", "2", "--local-units", "1", out=tmp_path) == 2
    assert "BatchNorm" in capsys.readouterr().err


@pytest.mark.parametrize("name, text", [
    ("list.csv", 'path,caption\n0.mp4,"a grey, dark wall"\n1.mp4,a wall\n2.mp4,a wall\n'
                 '3.mp4,it gets bright\ngone.mp4,x'),
    ("list.jsonl", "".join(json.dumps({"video": f"{i}.mp4", "caption": f"a wall, number {i}"})
                           + "\n" for i in range(4))),
])
def test_lists_of_real_videos_train_and_captions_too_long_are_counted(tmp_path, capsys, name, text):
    path = make_list(tmp_path, text, name)
    assert run("--data", str(path), "--context", "5", out=tmp_path / "run") == 0
    out = capsys.readouterr().out
    assert "captions are longer than --context 5 tokens and are cut" in out
    assert ("gone.mp4" in out) == (name == "list.csv")
    assert out.count("--data ") == 1  # though images come from the same list


@pytest.mark.parametrize("name, text, complaint", [
    ("list.csv", "path,caption\n0.mp4,a wall\n1.mp4,\n2.mp4,a wall\n3.mp4,a wall",
     "the caption of"),
    ("list.csv", b"path,caption\n0.mp4,a wall\n1.mp4,caf\xe9\n", "line 3: byte 0xe9 is not UTF-8"),
    ("list.csv", "path,label\n0.mp4,wall\n1.mp4,wall", "has no captions"),
    ("list.csv", "path,caption\nx.mp4,a wall\ny.mp4,a wall", "none of its"),
    ("list.jsonl", '{"path": "0.mp4", "caption": "a wall"}\nnonsense', "line 2: not JSON"),
    ("list.jsonl", '{"path": "0.mp4", "caption": "a wall"}\n{"path": "1.mp4"}',
     "line 2: has no caption"),
    ("list.jsonl", '{"path": "0.mp4", "caption": 3}', "line 1: needs"),
])
def test_bad_lists_get_one_line(tmp_path, capsys, name, text, complaint):
    path = make_list(tmp_path, text, name)
    assert run("--data", str(path), out=tmp_path / "run") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and complaint in err, err


def test_frozen_towers_do_not_move(tmp_path):
    card = train.VideoLanguage(num_frames=2, input_size=16, freeze_text=True, freeze_visual=True)
    model = card.build(card.datasets()[0])
    trained = {name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad}
    assert "text" not in trained and "visual" not in trained and "visual_proj" in trained


def test_a_still_shows_what_its_sentence_says():
    rng = np.random.default_rng(0)
    facts = dict(motion="vanish", shape="star", colour="orange", size="small")
    assert moving_shapes.still(facts, 8, rng) == (0, "an orange star")
    assert moving_shapes.still(facts | {"motion": "appear"}, 8, rng)[0] == 7
    assert moving_shapes.still(facts | {"motion": "meet"}, 8, rng)[1] == "two orange stars"


def test_both_forms_of_the_command_read_a_run(finished, tmp_path, capsys):
    write_video(tmp_path / "v.mp4")
    picture = tmp_path / "words.png"
    flags = [str(tmp_path / "v.mp4"), "--weights", str(finished), "--out", str(picture)]
    assert predict.main(flags) == 0
    assert capsys.readouterr().out.endswith(f"\ndrawn: {picture}\n")
    assert picture.stat().st_size > 0
    assert predict.main([*flags, "--text", "a red star", "--text", "a blue ring"]) == 0
    shares = [float(line.split()[0]) for line in capsys.readouterr().out.splitlines()]
    assert len(shares) == 2 and abs(sum(shares) - 1) < 2e-4
    assert predict.main([str(tmp_path / "gone.mp4"), *flags[1:]]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_weights_are_averaged_for_evaluation_only_and_the_protocol_says_so(tmp_path, capsys):
    assert run(out=tmp_path / "a", steps=2) == 0
    assert run("--seed", "1", out=tmp_path / "b", steps=2) == 0
    capsys.readouterr()
    numbers = {("a",
                0): json.loads((tmp_path / "a" / "metrics.json").read_text())["val_contrastive"]}
    for name, share in (("a", 0.5), ("b", 1)):
        assert run("--weights", str(tmp_path / name), "--merge", str(tmp_path / "a"),
                   "--merge-share", str(share),
                   out=tmp_path / "merged", steps=0) == 0
        assert f"{share:g} of CLIP merged" in capsys.readouterr().out
        numbers[name, share] = json.loads((tmp_path / "merged" / "metrics.json").read_text())[
            "val_contrastive"]
    assert numbers["a", 0] == pytest.approx(numbers["a", 0.5], abs=1e-5)
    assert numbers["b", 1] != numbers["a", 0]
    assert run("--weights", str(tmp_path / "a"), "--merge", str(tmp_path / "a"), out=tmp_path / "c",
               steps=1) == 2
    assert "--steps 0" in capsys.readouterr().err


def test_another_input_size_interpolates_the_places_and_the_usual_one_by_accident_does_not(finished,
                                                                                           tmp_path,
                                                                                           capsys):
    assert run("--weights", str(finished), "--input-size", "24", out=tmp_path / "large",
               steps=1) == 0
    assert "--input-size 24: the position table of the weights, for 16 x 16 pixels, is " \
           "interpolated" in capsys.readouterr().out
    assert run("--weights", str(finished), "--input-size", "40", out=tmp_path / "usual",
               steps=1) == 2
    assert "the weights are for 16 x 16 pixels; pass --input-size 16" in capsys.readouterr().err
    assert run("--weights", str(finished), "--input-size", "30", out=tmp_path / "odd", steps=1) == 2
    assert "--input-size 30: frames of 30 x 30 pixels do not divide" in capsys.readouterr().err
