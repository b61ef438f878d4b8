"""What is proved about the names of classes:

a head and a data set meet by name, in evaluation and in training, for classifiers, probes and the
fused model; official heads without names are never guessed at; what nothing has trained is not
evaluated.

The heads here ignore the clip: each row has a bias alone, so what they say is known.
"""

import json

import pytest
import torch

import fusion
import mae
import train
import uniformerv2
import weights
from conftest import official_fill
from tasks import class_names, probes
from test_classify_card import TINY, encoders, run, save  # noqa: F401
from test_clip_card import finished  # noqa: F401
from test_fusion import encoders as two_encoders
from test_mae import block_shapes
from test_train import write_video
from weights.__main__ import publish

KNOWN = ("clap", "jump", "wave")


def folder_of(place, *names, clips=2):
    """A folder of class folders with `clips` videos each."""
    for name in names:
        (place / name).mkdir(parents=True)
        for i in range(clips):
            write_video(place / name / f"{i}.mp4", frames=4)
    return str(place)


def says(model, *biases):
    """A head that says the same of every clip: its logits are `biases`."""
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.tensor(biases))
    return model


def named(place, model, names=KNOWN):
    """A run's folder with this model, whose classes have these names."""
    save(place, model)
    class_names.write(place, {"label": names})
    return str(place)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """{name: folder of videos}"""
    place = tmp_path_factory.mktemp("clips")
    return {"/".join(names): folder_of(place / "".join(names), *names) for names in (
        ("jump", "wave", "xray"), ("clap", "wave"), ("clap", "jump", "wave"))}


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory):
    """{kind: a run that always says wave, then jump, then clap}"""
    place = tmp_path_factory.mktemp("classifiers")
    masked = says(mae.VideoClassifier(TINY, classes=3, frames=4, image_size=16), 0.0, 1.0, 2.0)
    multimodal = says(uniformerv2.UniFormerV2(uniformerv2.Size(24, 2, 2, 48, 8, 16), classes=3,
                                              frames=4), 0.0, 1.0, 2.0)
    probe = says(probes.AttentiveProbe(masked.with_head(0), 3, 2), 0.0, 1.0, 2.0)
    first, (second,) = two_encoders(classes=3)
    fused = fusion.InternVideo(says(first, 0.0, 1.0, 2.0), says(second, 0.0, 1.0, 2.0))
    models = {"masked": masked, "multimodal": multimodal, "probe": probe, "fused": fused}
    return {name: named(place / name, model) for name, model in models.items()}


FLAGS = {"masked": (), "multimodal": (), "probe": ("--mode", "attentive"), "fused": ()}


def evaluate(kind, classifiers, data, out, *flags, steps=0):
    """The run's folder, after `classify` or `fuse` on this folder."""
    fused = kind == "fused"
    size = ("--num-frames", "4", "--input-size", "32") if fused else ()
    probes = ("--probe-clips", "0") * fused
    flags = ("--weights", classifiers[kind], "--data", data, "--val-data", data, *FLAGS[kind],
             *size, *flags)
    if probes:
        return train.main(["fuse", *"--batch-size 6 --workers 0 --precision fp32 --device cpu "
                           "--no-figures".split(), "--out", str(out), "--steps", str(steps),
                           *flags])
    return run(*flags, "--no-figures", out=out, steps=steps)


@pytest.mark.parametrize("kind", FLAGS)
def test_a_test_set_that_lacks_a_class_is_evaluated_with_the_whole_head(classifiers, clips, kind,
                                                                        tmp_path):
    assert evaluate(kind, classifiers, clips["clap/wave"], tmp_path) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["val_top1"] == 50.0  # every clip is called wave
    assert metrics["protocol"]["classes"] == {"label": 3}
    assert class_names.read(tmp_path, 3)[0] == {"label": KNOWN}


@pytest.mark.parametrize("kind", FLAGS)
def test_a_class_that_the_head_does_not_know_is_refused_by_name(classifiers, clips, kind, tmp_path,
                                                                capsys):
    assert evaluate(kind, classifiers, clips["jump/wave/xray"], tmp_path) == 2
    error = capsys.readouterr().err
    assert "does not know xray" in error and "clap, jump, wave" in error
    assert error.count("\n") == 1 and not (tmp_path / "metrics.json").exists()


@pytest.mark.parametrize("kind", FLAGS)
def test_training_on_other_classes_keeps_the_rows_of_known_names(classifiers, clips, kind, tmp_path,
                                                                 capsys):
    assert evaluate(kind, classifiers, clips["jump/wave/xray"], tmp_path, "--lr", "0",
                    steps=1) == 0
    assert "the rows of 2 classes are kept by name (jump, wave); 1 is new (xray)" in \
        capsys.readouterr().out
    tensors, _ = weights.read(tmp_path)
    heads = [key for key in tensors if key.endswith("head.bias")]
    assert len(heads) == 1 + (kind == "fused")
    for key in heads:
        assert tensors[key][:2].tolist() == [1.0, 2.0] and tensors[key].shape == (3,)
        weight = tensors[key.replace("bias", "weight")]
        assert not weight[:2].any() and (weight[2].any() or tensors[key][2])


def test_clips_of_one_class_alone_are_evaluated_with_the_whole_head(classifiers, tmp_path):
    data = folder_of(tmp_path / "data", "wave")
    assert evaluate("masked", classifiers, data, tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["val_top1"] == 100.0


def test_classes_in_another_order_take_their_own_rows(classifiers, tmp_path, capsys):
    other = named(tmp_path / "run", says(mae.VideoClassifier(TINY, classes=3, frames=4,
                                                            image_size=16), 2.0, 0.0, 1.0),
                  ("wave", "clap", "jump"))
    data = folder_of(tmp_path / "data", "clap", "wave")
    assert evaluate("masked", {"masked": other}, data, tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["val_top1"] == 50.0
    assert evaluate("masked", {"masked": other}, data, tmp_path / "trained", "--lr", "0",
                    steps=1) == 0
    assert weights.read(tmp_path / "trained")[0]["head.bias"].tolist() == [0.0, 2.0]
    assert "the rows of 2 classes are kept by name (clap, wave)" in capsys.readouterr().out


def test_two_encoders_whose_heads_have_other_orders_fuse_by_name(clips, tmp_path):
    first, (second,) = two_encoders(classes=3)
    a = named(tmp_path / "a", says(first, 0.0, 1.0, 2.0))
    b = named(tmp_path / "b", says(second, 2.0, 0.0, 1.0), ("wave", "clap", "jump"))
    out = tmp_path / "out"
    data = clips["clap/jump/wave"]
    assert train.main(["fuse", "--masked", a, "--multimodal", b, "--data", data, "--val-data", data,
                       *"--workers 0 --precision fp32 --device cpu --no-figures --steps 0".split(),
                       "--out", str(out)]) == 0
    tensors, _ = weights.read(out)
    assert tensors["masked.head.bias"].tolist() == tensors["multimodal.0.head.bias"].tolist() \
        == [0.0, 1.0, 2.0]


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """An official file with a head of five classes, which have no names."""
    width, place = 384, tmp_path_factory.mktemp("official") / "vit.pth"
    torch.save({"module": official_fill(
        {"patch_embed.proj.weight": (width, 3, 2, 16, 16), "patch_embed.proj.bias": (width,),
         "fc_norm.weight": (width,), "fc_norm.bias": (width,), "head.weight": (5, width),
         "head.bias": (5,)} | block_shapes("blocks.", width, 1, 4 * width))}, place)
    return str(place)


def of_list(place, *labels):
    """A list of videos with these labels."""
    for i, label in enumerate(labels):
        write_video(place / f"{i}.mp4", frames=4)
    (place / "list.csv").write_text("path,label\n" + "".join(
        f"{i}.mp4,{label}\n" for i, label in enumerate(labels)))
    return str(place / "list.csv")


@pytest.mark.parametrize("labels, steps, complaint, said", [
    ((0, 3), 0, "", ""),  # numbers are rows
    ((0, 7), 0, "does not know 7", ""),
    (tuple("abcde"), 0, "", "its 5 rows are matched with the data's classes in order"),
    (("a", "b"), 0, "has 5 classes without names", ""),
    (("a", "b"), 1, "", "the head for 2 classes is new"),
])
def test_the_rows_of_an_official_head_are_never_guessed_at(official, labels, steps, complaint, said,
                                                           tmp_path, capsys):
    data = of_list(tmp_path, *labels)
    code = run("--weights", official, "--data", data, "--val-data", data, "--no-figures",
               "--input-size", "32", out=tmp_path / "out", steps=steps)
    shown = capsys.readouterr()
    assert code == (2 if complaint else 0), shown.err
    assert complaint in shown.err and said in shown.out
    if labels == (0, 3):
        metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
        assert metrics["protocol"]["classes"] == {"label": 5}


def test_names_lie_beside_official_weights_as_ours_or_as_transformers_write_them(official, tmp_path,
                                                                                 capsys):
    place = tmp_path / "named"
    place.mkdir()
    (place / "vit.pth").write_bytes(open(official, "rb").read())
    (place / "config.json").write_text(json.dumps({"id2label": dict(enumerate("vwxyz"))}))
    assert class_names.read(place, 5) == ({"label": tuple("vwxyz")}, frozenset())
    assert class_names.read(place / "vit.pth", 5) == (None, frozenset())
    class_names.write(place, {"label": tuple("abcde")})
    data = of_list(tmp_path, "b", "z")
    assert run("--weights", str(place / "vit.pth"), "--data", data, "--val-data", data,
               "--input-size", "32", out=tmp_path / "out", steps=0) == 2
    assert "does not know z" in capsys.readouterr().err
    (place / "questions.json").write_text("[3]")
    assert run("--weights", str(place / "vit.pth"), "--data", data, "--val-data", data,
               "--input-size", "32", out=tmp_path / "out", steps=0) == 2
    assert "must hold {question: names of its answers}" in capsys.readouterr().err


def test_an_export_says_where_the_names_are(classifiers, tmp_path):
    said = publish(classifiers["multimodal"], tmp_path / "x.pth")
    assert f"copy {classifiers['multimodal']}/questions.json beside the file" in said


def test_a_new_head_for_answers_is_not_evaluated(finished, tmp_path, capsys):  # noqa: F811
    assert train.main(["answer", "--weights", str(finished), "--steps", "0", "--device", "cpu",
                       "--workers", "0", "--out", str(tmp_path / "out")]) == 2
    assert "would measure a new head, which nothing has trained" in capsys.readouterr().err


@pytest.mark.parametrize("stage, flags, complaint", [
    ("mae", (), "a network from scratch"),
    ("clip", (), "a network from scratch"),
    ("classify", (), "a network from scratch"),
    ("classify", ("--weights", "{masked}"), "a new head for 30 classes"),
    ("classify", ("--weights", "{multimodal}", "--mode", "probe"), "a new head for 30 classes"),
    ("classify", ("--weights", "{masked}", "--mode", "attentive"), "a new head for 30 classes"),
    ("localise", ("--weights", "{masked}"), "a new head"),
    ("fuse", ("--masked", "{masked}", "--multimodal", "{multimodal}"), "a new head for 30 classes"),
])
def test_what_nothing_has_trained_is_not_evaluated(encoders, stage, flags, complaint,  # noqa: F811
                                                   tmp_path, capsys):
    places = {name: path for name, (path, _) in encoders.items()}
    assert train.main([stage, "--steps", "0", "--out", str(tmp_path / "out"), "--device", "cpu",
                       "--workers", "0", *(flag.format(**places) for flag in flags)]) == 2
    error = capsys.readouterr().err
    assert f"would measure {complaint}, which nothing has trained" in error
    assert error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_fused_model_without_gates_is_not_evaluated_before_training(tmp_path, capsys):
    first, (second,) = two_encoders(classes=30)
    flags = ("--masked", save(tmp_path / "a", first), "--multimodal", save(tmp_path / "b", second))
    assert train.main(["fuse", *flags, "--steps", "0", "--no-gates", "--device", "cpu",
                       "--out", str(tmp_path / "out")]) == 2
    assert "cross-model attention without gates" in capsys.readouterr().err


def test_a_run_that_has_nothing_to_resume_is_not_evaluated(tmp_path, capsys):
    assert run("--resume", out=tmp_path / "out", steps=0) == 2
    assert "a network from scratch" in capsys.readouterr().err


def test_a_row_that_is_kept_is_the_same_and_a_new_one_is_not():
    for model in (mae.VideoClassifier(TINY, classes=3, frames=4, image_size=16),
                  uniformerv2.UniFormerV2(uniformerv2.Size(24, 2, 2, 48, 8, 16), classes=3)):
        new = model.with_head(3, rows=[2, None, 0])
        assert torch.equal(new.head.weight[[0, 2]], model.head.weight[[2, 0]])
        assert not torch.equal(new.head.weight[1], model.head.weight[1])


def test_a_fused_model_with_another_head_is_the_same_otherwise():
    first, (second,) = two_encoders(classes=3)
    model = fusion.InternVideo(first, second)
    torch.nn.init.normal_(model.balance)
    clip = torch.randint(256, (2, 4, 32, 32, 3), dtype=torch.uint8)
    assert torch.equal(model.with_head(2, rows=[2, 0]).eval()(clip), model(clip)[:, [2, 0]])
