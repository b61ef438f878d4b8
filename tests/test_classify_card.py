"""What is proved about the classify card of train.py:

both encoders fine-tune from a run and from official names; the head of 710 classes starts one of
400; deep layers learn faster; a probe moves nothing but itself and equals the full network; mixed
targets keep their sum; lists of labelled videos train; mistakes get one line.
"""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

import caption_decoder
import clip_video
import data
import engine.run
import mae
import train
import uniformerv2
import weights
from conftest import official_fill
from engine.optimisers import build_optimizer
from tasks import labelled, recognition
from test_clip_video import clip_state
from test_mae import block_shapes
from test_train import write_video
from test_uniformerv2 import official as uniformer
from video import moving_shapes
from video.transforms import normalise
from weights.encoders import load_encoder

FLAGS = (
    "--num-frames 4 --input-size 16 --batch-size 6 --eval-clips 10 --workers 0 --precision fp32 "
         "--device cpu --probe-clips 20").split()
TINY = mae.Size(24, 2, 2, 48, 8, 12, 1, 2, 24)


def run(*flags, out, steps=3, stage="classify"):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.run.pictures, "curve", lambda *_: [])
        return train.main([stage, *FLAGS, "--out", str(out), "--steps", str(steps), *flags])


def save(folder, model):
    weights.save(folder, model, model.config)
    return str(folder)


def built(**flags):
    """A classify stage, its model, and its data sets (training, {name: held out})."""
    stage = train.PostPretraining(**{"num_frames": 4, "input_size": 16} | flags)
    sets = stage.datasets()
    return stage, stage.build(sets[0]), sets


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """A masked autoencoder and a video-text model, both untrained, as runs leave them."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoders")
    masked = mae.VideoMAE(TINY, frames=4, image_size=16)
    size = uniformerv2.Size(24, 2, 2, 48, 8, 16)
    clip = clip_video.VideoCLIP(
        size, text_size=clip_video.TextSize(24, 1, 2), frames=4, vocabulary=520, context=8,
        end=515, local_units=1, temporal_downsample=True)
    decoder = caption_decoder.CaptionDecoder(24, heads=2, depth=1, visual_width=24,
                                             vocabulary=520, queries=2)
    both = caption_decoder.VideoText(clip, decoder)
    return {"masked": (save(folder / "mae", masked), masked),
            "multimodal": (save(folder / "clip", both), both)}


@pytest.mark.parametrize("kind", ["masked", "multimodal"])
def test_a_run_goes_on_as_a_classifier_with_the_same_encoder(encoders, kind, tmp_path):
    path, pretrained = encoders[kind]
    model = load_encoder(path, 30, frames=4, image_size=16)
    if kind == "masked":
        assert isinstance(model, mae.VideoClassifier) and model.mean == mae.IMAGENET_MEAN
        assert all(torch.equal(value, pretrained.encoder.state_dict()[key])
                   for key, value in model.encoder.state_dict().items())
    else:
        assert isinstance(model, uniformerv2.UniFormerV2) and model.mean == clip_video.CLIP_MEAN
        video = torch.randn(2, 3, 4, 16, 16)
        assert torch.equal(model.eval().encode(video)[0],
                           pretrained.eval().clip.visual.encode(video)[0])
        assert torch.equal(model.norm.weight, pretrained.clip.visual_norm.weight)
    assert model.head.out_features == 30
    assert run("--weights", path, out=tmp_path) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    for prefix in ("val_", "unseen_"):
        assert all(0 <= metrics[prefix + name] <= 100
                   for name in ("motion", "shape", "colour", "all_facts"))
    assert (tmp_path / "confusion.png").stat().st_size > 0
    # as many classes: the head, too
    again = load_encoder(tmp_path, 30, frames=4, image_size=16)
    assert torch.equal(again.head.weight, load_file(tmp_path / "model.safetensors")["head.weight"])


@pytest.mark.parametrize("make", [
    lambda classes: mae.VideoClassifier(TINY, classes=classes, frames=4, image_size=16),
    lambda classes: uniformerv2.UniFormerV2(uniformerv2.Size(24, 2, 2, 48, 8, 16), classes=classes,
                                            frames=4)])
def test_the_first_400_of_710_classes_are_those_of_kinetics_400(make):
    big = make(710)
    small, other, same = big.with_head(400), big.with_head(174), big.with_head(710)
    chosen = big.with_head(3, rows=[7, 0, 709])
    assert torch.equal(chosen.head.weight, big.head.weight[[7, 0, 709]])
    assert torch.equal(chosen.head.bias, big.head.bias[[7, 0, 709]])
    assert torch.equal(small.head.weight, big.head.weight[:400])
    assert torch.equal(small.head.bias, big.head.bias[:400])
    assert torch.equal(same.head.weight, big.head.weight)
    assert other.head.weight.shape == (174, 24)
    assert not torch.equal(other.head.weight, big.head.weight[:174])
    video = torch.randn(2, 3, 4, 16, 16)
    assert torch.equal(small.eval()(video), big.eval()(video)[:, :400])


def test_each_layer_further_from_the_head_learns_more_slowly(encoders):
    stage, model, _ = built(weights=encoders["masked"][0], layer_decay=0.5)
    scales = {name: stage.scale_of(model, name) for name, _ in model.named_parameters()}
    assert scales["head.weight"] == scales["fc_norm.weight"] == 1
    assert scales["encoder.blocks.1.mlp.fc1.weight"] == 0.5
    assert scales["encoder.blocks.0.norm1.bias"] == 0.25
    assert scales["encoder.embed.weight"] == 0.125
    used = {id(parameter): group["scale"] for group in build_optimizer(model, stage).param_groups
            for parameter in group["params"]}
    assert all(used[id(parameter)] == scales[name] for name, parameter in model.named_parameters())
    stage, model, _ = built(weights=encoders["multimodal"][0], layer_decay=0.5)
    names = [name for name, _ in model.named_parameters() if not name.startswith("blocks.")]
    embedding = ("embed", "norm_pre", "class_token", "positions")
    assert {name: stage.scale_of(model, name) for name in names} == {
        name: 0.125 if name.startswith(embedding) else 1.0 for name in names}


@pytest.mark.parametrize("kind", ["masked", "multimodal"])
@pytest.mark.parametrize("mode", ["probe", "attentive"])
def test_a_probe_moves_nothing_but_itself_and_reads_what_the_whole_network_would(encoders, kind,
                                                                                 mode, tmp_path):
    path, _ = encoders[kind]
    assert run("--weights", path, "--mode", mode, out=tmp_path) == 0
    before = load_encoder(path, 30, frames=4, image_size=16).state_dict()
    after = load_file(tmp_path / "model.safetensors")
    prefix = "encoder." if mode == "attentive" else ""
    kept = [key for key in before if not key.startswith("head.") and prefix + key in after]
    assert len(kept) > 20 and all(torch.equal(before[key], after[prefix + key]) for key in kept)
    stage, model, (train_set, held_out) = built(
        weights=path, mode=mode, probe_clips=7, out=str(tmp_path), device="cpu", precision="fp32",
        workers=0)
    features, targets = stage.prepare(model, train_set, held_out)
    batch = next(data.held_out(train_set, 7, 7))
    with torch.no_grad():
        whole = model.eval()(normalise(batch["video"], model.mean, model.std))
        stored = stage.logits(model, {"features": features.float()})
    # stored in bfloat16
    assert torch.allclose(whole, stored, atol=2e-2 * float(whole.abs().max()) + 1e-6)
    assert torch.equal(targets, stage.target(batch))
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == (
        {"head"} if mode == "probe" else {"query", "norm", "attn", "head"})


@pytest.mark.parametrize("kind", ["masked", "multimodal"])
def test_a_standardised_probe_reads_features_of_mean_0_and_variance_1_and_stays_one_network(
        encoders, kind, tmp_path, capsys):
    """Its norm takes the statistics in, so what is saved is a plain classifier; and it resumes."""
    path, _ = encoders[kind]
    flags = "--weights", path, "--mode", "probe", "--standardise", "--save-every", "1"
    assert run(*flags, out=tmp_path, steps=3) == 0
    once = load_file(tmp_path / "model.safetensors")
    stage, model, (train_set, held_out) = built(
        weights=path, mode="probe", standardise=True, probe_clips=7, out=str(tmp_path / "again"),
        device="cpu", precision="fp32", workers=0)
    (tmp_path / "again").mkdir()
    features, _ = stage.prepare(model, train_set, held_out)
    spread = features.float().var(dim=0, correction=0)
    assert features.float().mean(dim=0).abs().max() < 0.02
    assert ((spread - 1).abs() < 0.05).float().mean() > 0.9
    batch = next(data.held_out(train_set, 7, 7))
    with torch.no_grad():
        own = model.eval().feature(normalise(batch["video"], model.mean, model.std))
    assert torch.allclose(own, features.float(), atol=0.05)
    assert run(*flags, out=tmp_path / "cut", steps=2) == 0
    assert run(*flags, "--resume", out=tmp_path / "cut", steps=3) == 0
    again = load_file(tmp_path / "cut/model.safetensors")
    norm = "fc_norm.weight" if kind == "masked" else "norm.weight"
    assert torch.equal(once[norm], again[norm])
    assert run("--weights", path, "--standardise", out=tmp_path / "wrong") == 2
    assert "--standardise: is for --mode probe" in capsys.readouterr().err


def test_mixed_targets_still_sum_to_one_per_question_and_share_their_partner_with_the_pixels():
    video = torch.arange(4.0)[:, None, None, None, None].expand(4, 3, 2, 8, 8).contiguous()
    target = torch.eye(30)[[0, 3, 5, 9]]
    for seed in range(5):
        torch.manual_seed(seed)
        mixed, soft = labelled.mix(video, target, 0.8, 0.0)
        assert torch.allclose(soft.sum(dim=1), torch.ones(4)) and mixed.shape == video.shape
        share = soft[torch.arange(4), [0, 3, 5, 9]]
        assert torch.allclose(mixed[:, 0, 0, 0, 0],
                              share * torch.arange(4.0) + (1 - share) * torch.arange(4.0).roll(1),
                              atol=1e-5)
    torch.manual_seed(0)
    mixed, soft = labelled.mix(video, target, 0.0, 1.0)
    pasted = (mixed[1] != video[1])
    assert torch.equal(pasted[:, 0], pasted[:, 1]), "the box is the same in all frames"
    assert math.isclose(float(soft[1, 0]), float(pasted.float().mean()), abs_tol=1e-5)


def test_accuracies_by_hand():
    logits = {"motion": torch.tensor([[2.0, 1], [0, 1], [3, 1]]),
              "shape": torch.tensor([[0.0, 1], [0, 1], [0, 1]])}
    answers = {"motion": torch.tensor([0, 1, 1]), "shape": torch.tensor([1, 0, 1])}
    found = recognition.accuracies(logits, answers)
    assert [round(found[name], 1) for name in ("motion", "shape", "all_facts")] == [66.7, 66.7,
                                                                                    33.3]
    ranks = recognition.accuracies({"label": torch.arange(7.0).repeat(4, 1)},
                                   {"label": torch.tensor([6, 2, 1, 0])})
    assert ranks == {"top1": 25.0, "top5": 50.0}


def test_folders_of_classes_train_and_name_top_1_and_top_5(tmp_path, encoders, capsys):
    for name in ("wave", "jump"):
        (tmp_path / "videos" / name).mkdir(parents=True)
        for i in range(4):
            write_video(tmp_path / "videos" / name / f"{i}.mp4", frames=6)
    assert run("--data", str(tmp_path / "videos"), "--val-data", str(tmp_path / "videos"),
               out=tmp_path / "run") == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["val_clips"] == 8 and 0 <= metrics["val_top1"] <= metrics["val_top5"] == 100
    assert run("--data", str(tmp_path / "videos"), "--mode", "probe", "--weights",
               encoders["masked"][0],
               out=tmp_path / "probe") == 0
    assert run("--data", str(tmp_path / "videos" / "wave"), out=tmp_path / "one") == 2
    assert "give a folder of class folders" in capsys.readouterr().err


def test_merging_views_by_hand():
    """Odds of 3 : 1 for the first class, twice, against 1 : 9: probabilities 3/4, 3/4, 1/10, mean
    8/15. Against 1 : 81 the mean of the probabilities, 0.504, still says the first. The mean of the
    logits, (2 ln 3 - 4 ln 3) / 3, says the second."""
    views = torch.tensor([[3.0, 1.0], [3.0, 1.0], [1.0, 9.0]]).log()
    assert torch.allclose(recognition.merge_views(views), torch.tensor([8 / 15, 7 / 15]))
    views = torch.tensor([[3.0, 1.0], [3.0, 1.0], [1.0, 81.0]]).log()
    assert recognition.merge_views(views).argmax() == 0 and views.mean(dim=0).argmax() == 1


def test_several_views_are_averaged_as_probabilities_and_stand_beside_one_clip(tmp_path):
    for name in ("wave", "jump"):
        (tmp_path / "videos" / name).mkdir(parents=True)
        for i in range(3):
            write_video(tmp_path / "videos" / name / f"{i}.mp4", frames=20)
    assert run("--data", str(tmp_path / "videos"), "--val-data", str(tmp_path / "videos"),
               *"--test-clips 2 --test-crops 3 --rand-augment 2 --erasing 0.5 --repeats 2".split(),
               *"--area 0.3 --flip".split(), out=tmp_path / "run") == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["val_top1 (1 clip)"] == pytest.approx(metrics["val_top1"])
    model = load_encoder(tmp_path / "run").eval()
    views = data.VideoFiles(tmp_path / "videos", 4, 16, sampling="segment", train=False,
                            views=(2, 3))
    right = []
    with torch.no_grad():
        for item in (views[i] for i in range(6)):
            video = normalise(torch.as_tensor(item["video"][1:]), model.mean, model.std)
            predicted = int(model(video).softmax(dim=1).mean(dim=0).argmax())
            right.append(predicted == item["labels"]["label"])
    assert metrics["val_top1 (2 x 3 views)"] == pytest.approx(100 * sum(right) / 6)


def test_views_and_repeats_are_for_files(tmp_path, capsys):
    assert run("--test-crops", "3", out=tmp_path) == 2
    assert run("--repeats", "4", "--data", str(tmp_path), out=tmp_path) == 2
    assert capsys.readouterr().err.count("\n") == 2


@pytest.mark.parametrize("flags, complaint", [
    (("--model", "b16"), "add --encoder multimodal"),
    (("--encoder", "multimodal", "--model", "base"), "add --encoder masked"),
    (("--num-frames", "3"), "a clip of 3 frames"),
    (("--weights", "nowhere"), "no such file"),
])
def test_mistakes_get_one_line(tmp_path, capsys, flags, complaint):
    assert run(*flags, out=tmp_path) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and complaint in err, err


def test_official_files_of_both_encoders_load_for_fine_tuning(tmp_path):
    width = 384  # as VideoMAE-S: for a published width, the file need not tell the heads
    pretrained = official_fill(
        {"mask_token": (1, 1, 192), "encoder.patch_embed.proj.weight": (width, 3, 2, 16, 16),
         "encoder.patch_embed.proj.bias": (width,), "encoder.norm.weight": (width,),
         "encoder.norm.bias": (width,),
         "encoder_to_decoder.weight": (192, width), "decoder.norm.weight": (192,),
         "decoder.norm.bias": (192,),
         "decoder.head.weight": (1536, 192), "decoder.head.bias": (1536,)}
        | block_shapes("encoder.blocks.", width, 1, 4 * width)
        | block_shapes("decoder.blocks.", 192, 1, 768))
    fine_tuned = {key.removeprefix("encoder."): value for key, value in pretrained.items()
                  if key.startswith(("encoder.blocks", "encoder.patch"))}
    fine_tuned |= official_fill({"fc_norm.weight": (width,), "fc_norm.bias": (width,),
                                 "head.weight": (710, width),
                                 "head.bias": (710,)})
    for name, tensors, kind in (("pretrained", pretrained, mae.VideoClassifier),
                                ("fine_tuned", fine_tuned, mae.VideoClassifier),
                                ("uniformer", uniformer(D=64, reduced=42, classes=710),
                                 uniformerv2.UniFormerV2),
                                ("clip", clip_state(), uniformerv2.UniFormerV2)):
        torch.save({"model": tensors}, tmp_path / f"{name}.pth")
        model = load_encoder(tmp_path / f"{name}.pth", 400, frames=4, image_size=32)
        assert type(model) is kind and model.head.out_features == 400
        assert model(torch.zeros(1, 3, 4, 32, 32)).shape == (1, 400)
        if name in ("fine_tuned", "uniformer"):
            head = tensors.get("head.weight", tensors.get("transformer.proj.2.weight"))
            assert torch.equal(model.head.weight, head[:400])


def test_few_labels_are_the_same_few_clips_over_and_over(tmp_path):
    stage = train.PostPretraining(num_frames=2, input_size=16, train_clips=5, encoder="masked")
    few, held_out = stage.datasets()
    whole, val = (moving_shapes.MovingShapes(split, 2, 16) for split in ("train", "val"))
    assert (few[13]["video"] == whole[3]["video"]).all()
    assert (few[4]["video"] == whole[4]["video"]).all()
    for i in (3, 8, 13):  # drawn once, and the same every time
        assert few[i]["caption"] == whole[3]["caption"] and few[i]["index"] == i
        assert (few[i]["video"] == whole[3]["video"]).all()
    assert (held_out["val"][13]["video"] == val[13]["video"]).all()
    for name in ("wave", "jump"):
        (tmp_path / name).mkdir()
        for i in range(4):
            write_video(tmp_path / name / f"{i}.mp4", frames=4)
    stage = train.PostPretraining(num_frames=2, input_size=16, train_clips=3, data=str(tmp_path),
                                  val_data=str(tmp_path))
    few, held_out = stage.datasets()
    assert len(few) == 3 and len(held_out["val"]) == 8


def test_a_probe_takes_steps_in_pieces_and_open_sets_have_a_test_split(encoders, tmp_path):
    assert run("--weights", encoders["masked"][0], "--mode", "probe", "--accum", "2",
               out=tmp_path / "probe") == 0
    assert run("--unknown", "4", "--test", "10", "--steps", "1", out=tmp_path / "open") == 0
    found = json.loads((tmp_path / "open" / "metrics.json").read_text())
    assert 0 <= found["test_motion"] <= 100 and found["val_unknown_clips"] == 10


def test_the_rows_of_a_head_are_named_in_a_file_and_checked(encoders, tmp_path, capsys):
    (tmp_path / "rows.json").write_text("[1, 0]")
    flags = ("--weights", encoders["masked"][0], "--head-rows", str(tmp_path / "rows.json"))
    assert run(*flags, out=tmp_path / "run") == 2
    assert "--head-rows: 2 rows for 30 classes do not fit the head with" in capsys.readouterr().err
    (tmp_path / "rows.json").write_text("{}")
    assert run(*flags, out=tmp_path / "run") == 2
    assert "must hold a list of numbers" in capsys.readouterr().err


def test_views_are_merged_by_hand_as_probabilities_and_as_logits():
    logits = torch.tensor([[2.0, 0.0], [0.0, 4.0]])
    sure = torch.tensor([[0.880797, 0.119203], [0.017986, 0.982014]])
    assert torch.allclose(recognition.merge_views(logits), sure.mean(dim=0), atol=1e-5)
    assert torch.equal(recognition.merge_views(logits, "logits"), torch.tensor([1.0, 2.0]))


def test_an_attentive_probe_is_evaluated_again_and_says_what_it_is(encoders, tmp_path, capsys):
    assert run("--weights", encoders["masked"][0], "--mode", "attentive",
               out=tmp_path / "probe") == 0
    first = json.loads((tmp_path / "probe" / "metrics.json").read_text())
    assert run("--weights", str(tmp_path / "probe"), "--mode", "attentive", "--steps", "0",
               out=tmp_path / "again") == 0
    again = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert again["val_motion"] == first["val_motion"]
    assert again["val_loss"] == pytest.approx(first["val_loss"], rel=1e-5)
    capsys.readouterr()
    assert run("--weights", str(tmp_path / "probe"), out=tmp_path / "wrong") == 2
    assert "add --mode attentive" in capsys.readouterr().err


def test_a_flag_that_would_change_nothing_is_a_mistake(tmp_path, capsys):
    for flags in (("--rand-augment", "4"), ("--transform", "videomae"),
                  ("--merge-views", "logits")):
        assert run(*flags, out=tmp_path) == 2
        expected = f"{flags[0]}: is for video files, not for moving shapes"
        assert expected in capsys.readouterr().err
    assert run("--data", "x", "--test", "4", out=tmp_path) == 2
    assert "--test: is for moving shapes" in capsys.readouterr().err


@pytest.mark.parametrize("flags, files, expected", [
    ({}, False, (8, 40)), ({}, True, (8, 112)),
    ({"model": "base"}, True, (16, 224)),
    ({"encoder": "multimodal", "model": "b16"}, True, (8, 224)),
    ({"weights": "masked"}, True, (4, 16)), ({"weights": "multimodal"}, False, (4, 16)),
    ({"weights": "masked", "input_size": 32}, True, (4, 32)),
])
def test_clips_have_the_size_of_the_weights_or_the_usual_one_of_their_kind(encoders, flags, files,
                                                                           expected, tmp_path):
    if files:
        for name in ("wave", "jump"):
            (tmp_path / name).mkdir()
            write_video(tmp_path / name / "0.mp4", frames=4)
        flags = flags | {"data": str(tmp_path), "val_data": str(tmp_path)}
    if "weights" in flags:
        flags = flags | {"weights": encoders[flags["weights"]][0]}
    stage = train.PostPretraining(**flags)
    stage.datasets()
    assert (stage.num_frames, stage.input_size) == expected


def test_official_weights_on_files_take_clips_as_they_were_trained_on(tmp_path, capsys):
    for name in ("wave", "jump"):
        (tmp_path / "videos" / name).mkdir(parents=True)
        write_video(tmp_path / "videos" / name / "0.mp4", frames=4)
    torch.save({"model_state": uniformer(D=64, reduced=42, classes=400)}, tmp_path / "k400.pyth")
    stage = train.PostPretraining(weights=str(tmp_path / "k400.pyth"),
                                  data=str(tmp_path / "videos"))
    train_set, _ = stage.datasets()
    model = stage.build(train_set)
    assert [stage.input_size] * 2 == model.config["image_size"]
    assert stage.num_frames == model.config["frames"] == 8
    assert "the head for 2 classes is new" in capsys.readouterr().out


def test_a_dry_run_on_files_tells_time_and_memory(tmp_path, capsys):
    for name in ("wave", "jump"):
        (tmp_path / "videos" / name).mkdir(parents=True)
        write_video(tmp_path / "videos" / name / "0.mp4", frames=4)
    assert run("--data", str(tmp_path / "videos"), "--dry-run", out=tmp_path / "run") == 0
    out = capsys.readouterr().out
    assert "expected memory" in out and "s a step at most" in out and "minutes for 3 steps" in out
    assert not (tmp_path / "run").exists()
