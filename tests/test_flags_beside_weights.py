"""What is proved about flags that stand beside --weights:

every flag of every stage that describes a network is refused where the weights say otherwise, also
where it was typed with its default, and taken where it says the same; a folder of Hugging Face says
for which clips its model is.
"""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import save_file

import caption_decoder
import clip_video
import fusion
import mae
import train
import weights
from engine.stage import STAGES, ClipStage, Stage, details
from tasks import localisation, probes, question_answering
from test_official import image_vit
from video import moving_shapes
from weights import videomae
from weights.tokenizer import train_tokenizer

SHARED = "--batch-size 4 --eval-clips 4 --workers 0 --precision fp32 --device cpu --no-figures"
CLIP = "--num-frames 4 --input-size 16"

# stage, its weights -> {flags that say what the weights are: flags that say otherwise}, one each.
NETWORK = {
    ("mae", "mae"): {
        "--model tiny": "--model base", "--decoder-depth 2": "--decoder-depth 4",
        "--decoder-width 96": "--decoder-width 48", "--positions sinusoid": "--positions axes",
        "--no-normalise": "--normalise", "--drop-path 0": "--drop-path 0.5"},
    ("clip", "clip"): {
        "--model small": "--model b16", "--kind video": "--kind frames", "": "--kind joint",
        "--local-units 0": "--local-units 1", "--no-temporal-downsample": "--temporal-downsample",
        "--vocabulary 520": "--vocabulary 800", "--caption-depth 1": "--caption-depth 2",
        "--queries 2": "--queries 8", "--context 32": "--context 33",
        "--global-layers ": "--global-layers 0"},
    ("retrieve", "clip"): {"--context 32": "--context 33"},
    ("classify", "mae"): {
        "--encoder masked": "--encoder multimodal", "--model tiny": "--model base",
        "--positions sinusoid": "--positions resized"},
    ("classify", "clip"): {
        "--encoder multimodal": "--encoder masked", "--model ": "--model b16",
        "": "--positions sinusoid"},
    ("classify", "image"): {"--positions resized": "--positions sinusoid"},
    ("classify", "probe"): {
        "--encoder masked": "--encoder multimodal", "--model tiny": "--model base",
        "--positions sinusoid": "--positions resized"},
    ("fuse", "fuse"): {
        "--drop 0.25": "--drop 0", "--gates": "--no-gates", "--way both": "--way masked",
        "--bridges": "--no-bridges", "--before ": "--before 1", "--layers ": "--layers 1",
        "--masked ": "--masked {mae}", "--multimodal ": "--multimodal {clip}",
        "--second ": "--second {clip}"},
    ("localise", "localise"): {
        "--width 16": "--width 128", "--depth 2": "--depth 4", "--drop 0.25": "--drop 0.1",
        "--stride 2": "--stride 4"},
    ("answer", "answer"): {"--answers 3": "--answers 1500"},
}
MORE = {"probe": "--mode attentive", "localise": "--videos 2 --stride 2"}
# Flags of these stages that describe no network: what is learned from, and how.
NO_NETWORK = {
    "mae": "mask_ratio mask_type sampling_rate blr",
    "clip": "tokenizer freeze_text freeze_visual merge merge_share image_data prompts cache_size "
            "caption_weight image_every image_batch motion_words gallery test",
    "retrieve": "tokenizer test",
    "classify": "sampling_rate flip area rand_augment magnitude erasing repeats "
                "test_clips test_crops merge_views test mode head_rows probe_clips unknown "
                "layer_decay drop_path drop smoothing mixup cutmix balance "
                "standardise",  # the last are put in anew
    "fuse": "sampling_rate flip area rand_augment magnitude erasing repeats test_clips "
            "test_crops merge_views test scalar_scale thaw",
    "localise": "annotations train_subset val_subset videos middle length window rate",
    "answer": "tokenizer head_scale drop",
}


def made(folder):
    """{name: model} of small weights, as runs leave them, written into folders of these names."""
    captions = [f"{a} {b} {a}" for a in map(str, range(50)) for b in "abcd"]
    bpe = train_tokenizer(captions, 520)
    masked = dict(frames=4, image_size=16, positions="sinusoid")
    size = dataclasses.replace(train.SMALL, image_size=16)
    clip = clip_video.VideoCLIP(size, text_size=clip_video.TextSize(24, 1, 2), frames=4,
                                vocabulary=520, context=32, end=bpe.end, local_units=0,
                                temporal_downsample=False, global_layers=(2,))
    decoder = caption_decoder.CaptionDecoder(24, heads=2, depth=1, visual_width=96, vocabulary=520,
                                             queries=2)
    video_mae = mae.VideoMAE(dataclasses.replace(mae.SIZES["tiny"], decoder_depth=2),
                             normalised=False, **masked)
    world = moving_shapes.LongShapes("train", [16, 16], 0)
    models = {
        "mae": video_mae, "clip": caption_decoder.VideoText(clip, decoder),
        "probe": probes.AttentiveProbe(video_mae.with_head(0), 30, 4),
        "fuse": fusion.InternVideo(video_mae.with_head(30), [clip.visual.with_head(30)], drop=0.25),
        "localise": localisation.Localiser(video_mae.with_head(0), localisation.Head(
            96, len(world.motions), width=16, depth=2, drop=0.25), list(world.motions), 2),
        "answer": question_answering.VideoQA(clip, decoder, ["yes", "no", "red"])}
    torch.save(image_vit(64), folder / "image")
    for name, model in models.items():
        weights.save(folder / name, model, model.config)
        bpe.save(folder / name)
    return {name: str(folder / name) for name in [*models, "image"]}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return made(tmp_path_factory.mktemp("weights"))


def code_of(stage, name, flags, saved, out):
    """Exit code of a dry run beside these weights."""
    size = CLIP if stage in ("mae", "clip", "retrieve", "classify") else ""
    flags = [flag.format(**saved) for flag in flags.split(" ")] if flags else []
    return train.main([stage, *f"{SHARED} {size} {MORE.get(name, '')} --dry-run".split(),
                       "--out", str(out), "--weights", saved[name], *flags])


CASES = [(*key, other) for key, flags in NETWORK.items() for other in flags.values()]


@pytest.mark.parametrize("stage, name, other", CASES, ids=lambda value: str(value).strip("-"))
def test_a_flag_that_says_otherwise_than_the_weights_is_refused_in_a_line(
        saved, tmp_path, capsys, stage, name, other):
    assert code_of(stage, name, other, saved, tmp_path / "out") == 2
    error = capsys.readouterr().err
    flag = other.split(" ")[0].replace("--no-", "--")
    assert error.count("\n") == 1 and {"--stride": "a stride of 2"}.get(flag, flag) in error, error


@pytest.mark.parametrize("stage, name", NETWORK)
def test_flags_that_say_what_the_weights_say_are_taken(saved, tmp_path, stage, name):
    own = [flag for flag in NETWORK[stage, name] if flag and not flag.endswith(" ")]
    assert code_of(stage, name, " ".join(own), saved, tmp_path / "out") == 0


@pytest.mark.parametrize("stage", NO_NETWORK)
def test_every_flag_is_known_to_describe_a_network_or_not(stage):
    shared = {field.name for kind in (Stage, ClipStage) for field in dataclasses.fields(kind)}
    own = {field.name for field in dataclasses.fields(STAGES[stage])
           if details(field)["group"] in ("recipe", "clips")} - shared
    checked = {other.split(" ")[0].removeprefix("--").removeprefix("no-").replace("-", "_")
               for kind, _, other in CASES if kind == stage}
    assert own == checked | set(NO_NETWORK[stage].split())
    assert not checked & set(NO_NETWORK[stage].split())


# Folders of Hugging Face --------------------------------------------------------------------------


def hub_folder(folder, **config):
    """A classifier as transformers writes it, for 6 frames of 24 x 24 pixels."""
    model = mae.VideoClassifier(mae.Size(24, 1, 2, 48, 8, 0, 0, 0, 0), classes=30, frames=6,
                                image_size=24, head_eps=1e-5, eps=1e-12)
    tables = (videomae.OFFICIAL, videomae.HUGGING_FACE)
    folder.mkdir()
    save_file(weights.export(model, videomae.rules(model, tables)), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(dict(
        model_type="videomae", num_attention_heads=2, num_frames=6, image_size=24) | config))
    return str(folder)


def test_a_folder_for_other_clips_than_the_flags_say_is_refused_unless_positions_are_made_for_them(
        tmp_path, capsys):
    saved = {"hub": hub_folder(tmp_path / "hub")}
    for flags, message in (
            ("--num-frames 6", "--input-size 16: {} is for 24; pass --input-size 24, or type"),
            ("--input-size 24", "--num-frames 4: {} is for 6; pass --num-frames 6, or type")):
        assert code_of("classify", "hub", flags, saved, tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert message.format(saved["hub"]) in error and error.count("\n") == 1
    for flags in ("--num-frames 6 --input-size 24", "--positions resized", "--positions sinusoid"):
        assert code_of("classify", "hub", flags, saved, tmp_path / "out") == 0
