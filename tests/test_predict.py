"""What tools/predict.py promises: every kind of weights predicts something about a file and about a
generated clip, draws it, and answers a mistake with one line and exit code 2.

The models are small and untrained. They are saved as runs are.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import caption_decoder  # noqa: E402
import clip_video  # noqa: E402
import fusion  # noqa: E402
import mae  # noqa: E402
import predict  # noqa: E402
import uniformerv2  # noqa: E402
import weights  # noqa: E402
from tasks import localisation, question_answering, probes  # noqa: E402
from video import moving_shapes  # noqa: E402
from weights.tokenizer import train_tokenizer  # noqa: E402

QUESTIONS = {"shape": ["ring", "star"], "colour": ["red", "blue", "pink"]}
SENTENCES = ["a red star grows", "a blue ring shrinks", "the pink star meets another one"]


def masked(classes=5):
    return mae.VideoClassifier("tiny", classes=classes, frames=2, image_size=32)


def multimodal(classes=5):
    return uniformerv2.UniFormerV2("tiny", classes=classes, frames=2, image_size=32,
                                   global_layers=(2, 3))


def text_model(tokenizer, **options):
    return clip_video.VideoCLIP("tiny", frames=2, image_size=16, vocabulary=tokenizer.vocabulary,
                                context=12, end=tokenizer.end, **options)


def decoder(tokenizer):
    return caption_decoder.CaptionDecoder(128, heads=2, depth=1, visual_width=192, queries=4,
                                          vocabulary=tokenizer.vocabulary)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{name of a model: folder of a run}, and "video": a file of 40 frames."""
    torch.manual_seed(0)
    av = pytest.importorskip("av")
    folder = tmp_path_factory.mktemp("predict")
    tokenizer = train_tokenizer(SENTENCES, 600)
    clip, names = text_model(tokenizer), moving_shapes.LongShapes("test").motions
    models = {
        "VideoMAE": mae.VideoMAE("tiny", frames=4, image_size=32),
        "VideoClassifier": masked(), "UniFormerV2": multimodal(),
        "AttentiveProbe": probes.AttentiveProbe(masked(), 5, 2),
        "VideoCLIP": clip, "VideoText": caption_decoder.VideoText(clip, decoder(tokenizer)),
        "InternVideo": fusion.InternVideo(masked(), multimodal()),
        "Localiser": localisation.Localiser(masked(0), localisation.Head(96, len(names)), names, 4),
        "VideoQA": question_answering.VideoQA(clip, decoder(tokenizer), ["wall", "dog", "cat"])}
    for name, model in models.items():
        weights.save(folder / name, model, model.config)
        tokenizer.save(folder / name)
        (folder / name / "questions.json").write_text(json.dumps(QUESTIONS))
    with av.open(str(folder / "video.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height = 64, 48
        for number in range(40):
            picture = np.full((48, 64, 3), 6 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return {name: folder / name for name in models} | {"video": folder / "video.mp4"}


@pytest.fixture
def run(runs, tmp_path, capsys):
    """run(name of a model, arguments) -> (what is printed, path of the picture)."""
    def run(name, *arguments):
        picture = tmp_path / "deep" / "x.png"
        arguments = [*map(str, arguments), "--weights", str(runs[name]), "--out", str(picture)]
        assert predict.main(arguments) == 0, capsys.readouterr().err
        return capsys.readouterr().out, picture
    return run


def test_every_model_that_a_run_can_hold_predicts(runs):
    assert set(predict.MODELS) == set(runs) - {"video"}
    variants = {name for name in weights.MODELS if name.startswith("Divided")}
    assert set(weights.MODELS) - variants <= {*predict.MODELS, "CaptionDecoder"}


@pytest.mark.parametrize("name", predict.MODELS)
def test_without_a_video_the_clip_is_generated_and_its_truth_is_printed(run, name):
    out, _ = run(name, *(["--text", "a red star"] if name == "VideoCLIP" else []))
    assert "a generated clip" in out or name == "Localiser" and "true: " in out


def test_a_masked_autoencoder_draws_its_reconstruction(run, runs):
    from PIL import Image
    out, picture = run("VideoMAE", runs["video"], "--mask-ratio", "0.5")
    assert "8 of 16 places of every frame are hidden; loss on this clip" in out
    assert Image.open(picture).size[0] > 300
    assert Image.open(picture.with_suffix(".gif")).n_frames == 4


@pytest.mark.parametrize("name", ["VideoClassifier", "UniFormerV2", "AttentiveProbe"])
def test_a_classifier_answers_each_question_by_name(run, runs, name):
    out, picture = run(name, runs["video"], "--top", "2")
    shape, colour = out.splitlines()[:2]
    assert shape.startswith("shape ") and colour.startswith("colour ")
    assert shape.count("%") == colour.count("%") == 2
    assert picture.exists() == (name == "UniFormerV2")


def test_answers_without_names_are_numbers(runs, tmp_path, capsys):
    model = masked()
    weights.save(tmp_path / "bare", model, model.config)
    arguments = [str(runs["video"]), "--weights", str(tmp_path / "bare"), "--top", "9"]
    assert predict.main(arguments) == 0
    out = capsys.readouterr().out
    assert out.startswith("class ") and out.count("%") == 5


def test_official_files_are_known_by_their_names(runs, tmp_path, capsys):
    model = multimodal()
    torch.save({"model_state": model.to_official()}, tmp_path / "k400.pyth")
    assert predict.main([str(runs["video"]), "--weights", str(tmp_path / "k400.pyth"),
                         "--out", str(tmp_path / "x.png")]) == 0
    assert capsys.readouterr().out.startswith("class ")


@pytest.mark.parametrize("name", ["VideoText", "VideoCLIP"])
def test_a_video_text_model_says_which_text_fits(run, runs, name):
    out, _ = run(name, runs["video"], "--text", "a ring", "a star", "--text", "a wall",
                 "--frames", "3")
    lines = out.splitlines()
    assert sorted(line.split("  ")[-1] for line in lines) == ["a ring", "a star", "a wall"]
    shares = [float(line.split()[0]) for line in lines]
    assert sum(shares) == pytest.approx(1, abs=2e-4) and shares == sorted(shares, reverse=True)


@pytest.mark.parametrize("method", ["greedy", "beam", "nucleus"])
def test_a_video_text_model_writes_a_caption_and_draws_where_its_words_attend(run, runs, method):
    out, picture = run("VideoText", runs["video"], "--method", method)
    assert out.endswith(f"\ndrawn: {picture}\n") and picture.stat().st_size > 2000
    assert run("VideoText", runs["video"], "--method", method)[0] == out


def test_the_fused_model_answers_for_each_encoder_and_together(run, runs):
    out, picture = run("InternVideo", runs["video"])
    for who in ("masked", "multimodal", "together"):
        assert f"{who:11s} shape    " in out and f"{who:11s} colour   " in out
    assert out.index("together") < out.index("weights of the scores: 0.50, 0.50") < \
        out.index("gate_attn")  # first what was asked for
    assert picture.stat().st_size > 2000


def test_a_localiser_names_segments_of_a_file(run, runs):
    out, picture = run("Localiser", runs["video"], "--min-score", "0", "--top", "3")
    lines = out.splitlines()
    assert "4.0 s, 40 frames, one step per 4 frames" in lines[0]
    starts = [float(line.split(" s to ")[0]) for line in lines[1:-1]]
    assert 1 <= len(starts) <= 3 and starts == sorted(starts)
    assert any(lines[1].endswith(f"%  {name}") for name in moving_shapes.LongShapes("test").motions)
    assert picture.stat().st_size > 2000


def test_a_question_gets_its_likeliest_answers(run, runs):
    out, _ = run("VideoQA", runs["video"], "--question", "what happens?")
    lines = out.splitlines()
    assert "protocol: one view of 2 frames" in lines[0]
    assert sorted(line.split(" %  ")[1] for line in lines[1:]) == ["cat", "dog", "wall"]
    out, _ = run("VideoQA", "--question", "what colour is it?")
    assert "; the answer to " in out


def without(runs, tmp_path, name, file):
    (tmp_path / "part").mkdir()
    for path in runs[name].iterdir():
        if path.name != file:
            (tmp_path / "part" / path.name).write_bytes(path.read_bytes())
    return str(tmp_path / "part")


MISTAKES = {  # what the line must say -> arguments after the video; weights by the name of a model
    "no such file or folder": ["--weights", "nowhere"],
    "must leave at least one": ["--weights", "VideoMAE", "--mask-ratio", "1"],
    "--top 0": ["--weights", "InternVideo", "--top", "0"],
    "--frames 0": ["--weights", "VideoText", "--text", "a", "--frames", "0"],
    "must end in .png": ["--weights", "VideoMAE", "--out", "x.jpg"],
    "give one with --question": ["--weights", "VideoQA"],
    "holds VideoMAE; give a video-text model": ["--weights", "VideoMAE", "--text", "a"],
    "holds VideoText; give a run of train.py answer": ["--weights", "VideoText", "--question", "?"],
    "caption": ["--weights", "VideoCLIP"],  # has no decoder
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_one_line(runs, capsys, words):
    arguments = [str(runs.get(word, word)) for word in MISTAKES[words]]
    assert predict.main([str(runs["video"]), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("predict.py: ") and error.count("\n") == 1
    assert words in error.replace("no such file of weights", "no such file or folder"), error


def test_what_is_missing_or_cannot_be_written_is_one_line(runs, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    headless, text = masked(0), without(runs, tmp_path, "VideoText", "tokenizer.json")
    weights.save(tmp_path / "headless", headless, headless.config)
    local = localisation.Localiser(None, localisation.Head(96, 2), ["a", "b"], 4)
    weights.save(tmp_path / "features", local, local.config)
    (tmp_path / "other.json").write_text("{}")
    for words, arguments in (
            ("no such file", ["gone.mp4", "--weights", runs["VideoMAE"]]),
            ("tokenizer.json", [runs["video"], "--weights", text]),
            ("has no classifier", [runs["video"], "--weights", tmp_path / "headless"]),
            ("features from files", [runs["video"], "--weights", tmp_path / "features"]),
            ("weights", [runs["video"], "--weights", tmp_path / "other.json"]),
            ("file", [runs["video"], "--weights", runs["VideoMAE"],
                      "--out", tmp_path / "file" / "x.png"])):
        assert predict.main(list(map(str, arguments))) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error


def test_names_that_do_not_belong_to_the_weights_are_refused(runs, tmp_path, capsys):
    folder = Path(without(runs, tmp_path, "VideoClassifier", "questions.json"))
    (folder / "questions.json").write_text('{"label": ["a", "b"]}')
    assert predict.main([str(runs["video"]), "--weights", str(folder)]) == 2
    assert "names 2 answers, the weights have 5" in capsys.readouterr().err
