"""What is proved about weights/:

envelopes and prefixes are understood; a model in parts, in a folder of DeepSpeed or inside
somebody's module reads as the whole file does; half precision is widened exactly; what a file
lacks, has too much or has misshapen is listed exactly; no file can run code; no damaged file ends
in a traceback.
"""

import gzip
import io
import json
import os
import pickle
import random
import zipfile

import pytest
import torch
from safetensors.torch import save_file

import weights
from weights import Rule, WeightsError
from weights.__main__ import convert, main
from weights.official import OfficialFile
from weights.tokenizer import load_tokenizer


def model():
    return torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))


@pytest.mark.parametrize("envelope", [None, *weights.ENVELOPES, *weights.AVERAGES])
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod."])
@pytest.mark.parametrize("kind", ["pt", "safetensors", "dict"])
def test_every_envelope_and_prefix_reads_as_the_same_tensors(tmp_path, envelope, prefix, kind):
    own = model().state_dict()
    tensors = {prefix + key: value for key, value in own.items()}
    if kind == "safetensors":
        if envelope:
            pytest.skip("safetensors files have no envelopes")
        save_file(tensors, tmp_path / "w.safetensors")
        source = tmp_path / "w.safetensors"
    else:
        source = {envelope: tensors, "epoch": 3} if envelope else tensors
        if kind == "pt":
            torch.save(source, tmp_path / "w.pth")
            source = tmp_path / "w.pth"
    read, config = weights.read(source)
    assert config == {} and read.keys() == own.keys()
    assert all(torch.equal(read[key], own[key]) for key in own)


def test_half_precision_is_widened_without_loss():
    half = {"a": torch.randn(5).half(), "b": torch.randn(5).bfloat16(), "n": torch.tensor([3])}
    read, _ = weights.read(half)
    assert read["a"].dtype == read["b"].dtype == torch.float32 and read["n"].dtype == torch.int64
    assert torch.equal(read["a"].half(), half["a"]) and torch.equal(read["b"].bfloat16(), half["b"])


def test_missing_extra_and_misshapen_tensors_are_listed_exactly():
    tensors = model().state_dict()
    del tensors["0.bias"]
    tensors["head.bias"] = torch.zeros(2)
    tensors["1.weight"] = torch.zeros(4)
    with pytest.raises(WeightsError) as caught:
        weights.fill(model(), tensors, name="w.pth")
    assert str(caught.value) == (
        "w.pth does not fit Sequential: missing: 0.bias; unknown: head.bias; "
        "wrong shape: 1.weight is (4,) instead of (3,)")


def test_a_refused_file_leaves_the_model_untouched():
    target = model()
    before = {key: value.clone() for key, value in target.state_dict().items()}
    tensors = {key: value + 1 for key, value in before.items()} | {"extra": torch.zeros(1)}
    with pytest.raises(WeightsError):
        weights.fill(target, tensors)
    assert all(torch.equal(target.state_dict()[key], before[key]) for key in before)


def test_rules_stack_and_convert():
    layer = torch.nn.Linear(2, 6, bias=False)
    parts = {name: torch.randn(2, 2, 1) for name in ("q", "k", "v")}
    weights.fill(layer, parts, [Rule("weight", ("q", "k", "v"), lambda x: x.flatten(1))])
    assert torch.equal(layer.weight.data, torch.cat([parts[n][..., 0] for n in "qkv"]))


def test_a_run_of_ours_reads_back_with_its_configuration(tmp_path):
    own = model()
    weights.save(tmp_path / "run", own, {"model": "Sequential", "width": 3})
    for source in (tmp_path / "run", tmp_path / "run" / "model.safetensors"):
        tensors, config = weights.read(source)
        assert config == {"model": "Sequential", "width": 3}
        assert all(torch.equal(tensors[key], value) for key, value in own.state_dict().items())
    assert not list((tmp_path / "run").glob("*.part"))


def test_opening_a_file_never_runs_code(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"model": Trap()}))
    torch.save({"model": Trap()}, tmp_path / "evil2.pth")
    for name in ("evil.pth", "evil2.pth"):
        with pytest.raises(WeightsError, match=name):
            weights.read(tmp_path / name)
    assert not (tmp_path / "sprung").exists()


def test_a_missing_file_or_empty_folder_is_named(tmp_path):
    for source in (tmp_path / "nowhere.pth", tmp_path):
        with pytest.raises(WeightsError, match=str(source)) as caught:
            weights.read(source)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_a_damaged_file_is_refused_in_one_line_or_read_but_never_crashes(tmp_path, kind):
    path = tmp_path / f"w.{kind}"
    own = model().state_dict()
    torch.save(own, path) if kind == "pth" else save_file(own, path)
    whole, rng = path.read_bytes(), random.Random(0)
    for trial in range(120):
        damaged = bytearray(whole)
        if trial % 3 == 0:
            damaged = damaged[:rng.randrange(len(damaged))]
        else:
            for _ in range(rng.randrange(1, 6)):
                damaged[rng.randrange(min(len(damaged), 400))] = rng.randrange(256)
        path.write_bytes(bytes(damaged))
        try:
            tensors, _ = weights.read(path)
            weights.fill(model(), tensors)
        except WeightsError as error:
            assert "\n" not in str(error)


# --------------------------------------------------------------------- programs, pickles, families


class Leaf(torch.nn.Module):
    """Half precision, a buffer and a number, as CLIP's archives have them."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(4, 3).half().t())
        self.register_buffer("count", torch.arange(3))
        self.size = 5

    def forward(self, x: torch.Tensor):
        return x


class Tree(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.leaf = Leaf()
        self.stack = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))

    def forward(self, x: torch.Tensor):
        return self.stack(x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("how", ["script", "trace"])
def test_a_torchscript_archive_gives_its_tensors_and_does_not_run(tmp_path, how):
    tree = Tree()
    make = {"script": torch.jit.script,
            "trace": lambda tree: torch.jit.trace(tree, torch.zeros(1, 2))}[how]
    program = make(tree)
    torch.jit.save(program, tmp_path / "clip.pt")
    read, config = weights.read(tmp_path / "clip.pt")
    own = tree.state_dict()
    assert config == {} and read.keys() == own.keys()
    assert all(torch.equal(read[key], own[key].to(read[key].dtype)) for key in own)


class Spy:
    """What a pickle with code in it looks like: Lightning's checkpoints hold such objects."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_tensors_are_taken_out_of_a_pickle_that_holds_more_and_nothing_of_it_runs(tmp_path, capsys):
    spied = str(tmp_path / "spied")
    own = model().state_dict()
    torch.save({"state_dict": own, "callbacks": {"spy": Spy(spied)}, "hyper": [Spy(spied)]},
               tmp_path / "x.ckpt")
    with pytest.raises(WeightsError, match="--convert"):
        weights.read(tmp_path / "x.ckpt")
    convert(tmp_path / "x.ckpt", tmp_path / "x.safetensors")
    assert "left out" in capsys.readouterr().err
    assert not (tmp_path / "spied").exists()
    read, _ = weights.read(tmp_path / "x.safetensors")
    assert all(torch.equal(read[key], own[key]) for key in own) and read.keys() == own.keys()


def test_the_command_says_what_a_file_is_and_who_loads_it(tmp_path, capsys):
    import mae
    tiny = mae.VideoMAE(mae.SIZES["tiny"], frames=4, image_size=16)
    weights.save(tmp_path / "run", tiny, {"model": "VideoMAE", **tiny.config})
    assert main([str(tmp_path / "run")]) == 0 and "VideoMAE" in capsys.readouterr().out
    torch.save({"a.weight": torch.zeros(2)}, tmp_path / "other.pt")
    assert main([str(tmp_path / "other.pt")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main([str(tmp_path / "other.pt"), "--convert", "x.bin"]) == 2
    assert main([str(tmp_path / "gone.pt")]) == 2
    assert main([str(tmp_path / "other.pt"), "--convert", str(tmp_path / "new.safetensors")]) == 2
    assert weights.read(tmp_path / "new.safetensors")[0]["a.weight"].shape == (2,)


def save(folder, model):
    weights.save(folder, model, model.config)
    return folder


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("kind", ["VideoMAE", "VideoClassifier", "UniFormerV2", "VideoCLIP",
                                  "ViCLIP", "CLIP", "VideoText"])
def test_a_run_written_under_official_names_comes_back_bit_for_bit(tmp_path, capsys, kind, suffix):
    import caption_decoder
    import clip_video
    import mae
    import train
    import uniformerv2
    torch.manual_seed(0)
    text = dict(text_size=clip_video.TextSize(64, 2, 1), vocabulary=40, context=7)
    size = uniformerv2.Size(64, 2, 1, 128, 8, 16)
    model = {
        "VideoMAE": lambda: mae.VideoMAE("tiny", frames=4, image_size=32),
        "VideoClassifier": lambda: mae.VideoClassifier("tiny", classes=3, frames=4, image_size=32),
        "UniFormerV2": lambda: uniformerv2.UniFormerV2(size, classes=3, frames=4, local_units=2,
                                                       temporal_downsample=True),
        "VideoCLIP": lambda: clip_video.VideoCLIP(size, **text, frames=4),
        "ViCLIP": lambda: clip_video.VideoCLIP(size, **text, frames=4, kind="joint"),
        "CLIP": lambda: clip_video.VideoCLIP(size, **text, kind="frames"),
        "VideoText": lambda: train.VideoText(clip_video.VideoCLIP(size, **text, frames=4),
                                             caption_decoder.CaptionDecoder(
            64, heads=2, depth=1, visual_width=64, vocabulary=40, queries=3)),
    }[kind]()
    path = tmp_path / f"official{suffix}"
    assert main([str(save(tmp_path / "run", model)), "--official", str(path)]) == 0
    assert "under official names, family: " in capsys.readouterr().out
    parts = {"": model}
    if kind == "VideoText":
        parts = {"clip": model.clip, "caption_decoder": model.caption_decoder}
    for part in parts.values():
        size, options = part.config.get("size"), {}
        if kind in ("VideoMAE", "VideoClassifier"):
            options = dict(heads=size["heads"], frames=4, image_size=32)
        if kind == "VideoMAE":
            options["decoder_heads"] = size["decoder_heads"]
        again = type(part).from_official(path, **options).state_dict()
        assert all(torch.equal(again[key], value) for key, value in part.state_dict().items())
    assert main([str(tmp_path / "run"), "--official", str(path)]) == 2  # nothing is overwritten
    assert capsys.readouterr().err.count("\n") == 1


def test_what_official_names_cannot_hold_is_refused_in_a_line(tmp_path, capsys):
    import clip_video
    import mae
    import train
    for i, model in enumerate((
            mae.VideoMAE("tiny", frames=4, image_size=32, positions="axes"),
            clip_video.VideoCLIP(train.SMALL, text_size=train.SMALL_TEXT, vocabulary=40, context=7,
                                 local_units=1),
            clip_video.VideoCLIP(train.SMALL, text_size=train.SMALL_TEXT, vocabulary=40, context=7,
                                 global_layers=(0,)))):
        run = save(tmp_path / str(i), model)
        assert main([str(run), "--official", str(tmp_path / "new.pth")]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and ("train with --" in err
                                         or "officially they stand after the last ones" in err)
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    assert main([str(tmp_path / "a.safetensors"), "--official", str(tmp_path / "new.pth")]) == 2
    assert "no official names" in capsys.readouterr().err
    assert main([str(tmp_path / "0"), "--official", str(tmp_path / "new.bin")]) == 2


def test_what_official_names_do_not_say_is_said(tmp_path, capsys):
    import uniformerv2
    model = uniformerv2.UniFormerV2(uniformerv2.Size(64, 2, 2, 128, 8, 16), classes=3, frames=4,
                                    mean=(0.1, 0.2, 0.3))
    assert main([str(save(tmp_path / "run", model)), "--official", str(tmp_path / "new.pth")]) == 0
    message = capsys.readouterr().out
    assert ("must know them: 2 heads of width 32 instead of 64; pixels in [0, 1] are normalised "
            "with mean [0.1, 0.2, 0.3]") in message


@pytest.mark.parametrize("tensors, message", [({1: torch.ones(2)},
                                            "expected tensors by name, found 1"),
                                            ({}, "holds no tensors")])
def test_odd_dicts_are_one_line(tmp_path, capsys, tensors, message):
    torch.save(tensors, tmp_path / "odd.pth")
    assert main([str(tmp_path / "odd.pth")]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_tensors_that_share_memory_are_written_and_odd_heads_are_one_line(tmp_path, capsys):
    both = torch.ones(3)
    torch.save({"a": both, "b": both}, tmp_path / "tied.pth")
    # of no family
    assert main([str(tmp_path / "tied.pth"), "--convert", str(tmp_path / "new.safetensors")]) == 2
    assert torch.equal(weights.read(tmp_path / "new.safetensors")[0]["b"], both)
    assert main([str(tmp_path / "tied.pth"), "--heads",
                 "-2"]) == 2 and "--heads -2" in capsys.readouterr().err


def test_what_transformers_wrote_beside_its_weights_counts(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": {"hidden_act": "gelu"}}))
    assert weights.hub_config(tmp_path) == {"vision_config": {"hidden_act": "gelu"}}
    assert weights.hub_config({}) == {} == weights.hub_clips(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"crop_size": 8}')
    assert weights.hub_clips(tmp_path) == {}  # CLIP's shapes tell, and --input-size may differ
    (tmp_path / "config.json").write_text('{"num_frames": 3}')
    assert weights.hub_clips(tmp_path) == {"num_frames": 3, "input_size": [8, 8]}
    file = OfficialFile({"a": torch.zeros(1)})
    with pytest.raises(WeightsError, match="hidden_act 'gelu'; only 'quick_gelu'"):
        file.activation({"hidden_act": "gelu"}, "quick_gelu")
    file.activation({}, "gelu")


# ------------------------------------------------------------------- weights as they lie about


def in_parts(folder, kind, count=3):
    """A model in so many parts, with its index -> (its tensors, the index)."""
    tensors, names = {f"layer.{i}": torch.randn(2, i + 1).half() for i in range(7)}, {}
    stem, suffix = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    for i in range(count):
        part, name = dict(list(tensors.items())[i::count]), f"{stem}-0000{i + 1}.{suffix}"
        names |= dict.fromkeys(part, name)
        save_file(part, folder / name) if suffix == "safetensors" else torch.save(
            part, folder / name)
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": names}))
    return tensors, index


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_model_in_parts_reads_as_a_whole_from_its_folder_or_its_index(tmp_path, kind):
    tensors, index = in_parts(tmp_path, kind)
    for source in (tmp_path, index):
        read, config = weights.read(source)
        assert config == {} and read.keys() == tensors.keys()
        assert all(torch.equal(read[key], value.float()) for key, value in tensors.items())
    first = weights.fingerprint(tmp_path)
    assert first == weights.fingerprint(index)
    last = sorted(tmp_path.glob("*-00003.*"))[0]
    last.write_bytes(last.read_bytes() + b" ")
    assert weights.fingerprint(tmp_path) != first


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_what_lacks_of_a_model_in_parts_is_named(tmp_path, kind):
    tensors, index = in_parts(tmp_path, kind)
    part = sorted(tmp_path.glob("*-00002.*"))[0]
    held = weights.read(part)[0]
    gone = next(iter(held))
    del held[gone]
    save_file(held, part) if kind == "safetensors" else torch.save(held, part)
    message = f"{part.name}: lacks tensors that {index.name} names: {gone}"
    with pytest.raises(WeightsError, match=message):
        weights.read(tmp_path)
    part.unlink()
    with pytest.raises(WeightsError, match=f"of its 3 parts 1 is missing: {part.name}; download"):
        weights.read(index)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": []}', '{"weight_map": {"a": 3}}',
                                  '{"weight_map": {}}', '{"weight_map": {"a": "../model.bin"}}',
                                  '{"weight_map": {"a": "/etc/passwd"}}', "[" * 99999],
                         ids=lambda text: text[:40])
def test_an_index_that_is_none_is_one_line_and_leads_to_no_other_folder(tmp_path, text):
    torch.save({"a": torch.ones(1)}, tmp_path / "model.bin")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "pytorch_model.bin.index.json").write_text(text)
    with pytest.raises(WeightsError, match="pytorch_model.bin.index.json: n") as caught:
        weights.read(tmp_path / "run")
    assert "\n" not in str(caught.value)


def states(place, tensors, name="mp_rank_00_model_states.pt"):
    """What DeepSpeed writes of a model, as far as a reader meets it."""
    place.mkdir(parents=True, exist_ok=True)
    shapes = [{key: value.shape for key, value in tensors.items()}]
    torch.save({"module": tensors, "param_shapes": shapes, "buffer_names": [], "optimizer": None,
                "sparse_tensor_module_names": set(), "ds_config": {"zero_optimization": {}},
                "ds_version": "0.15.0", "epoch": 3, "global_steps": 7}, place / name)


def test_folders_of_deepspeed_give_their_newest_states(tmp_path):
    own = model().state_dict()
    for step in (5, 40, 300):
        states(tmp_path / f"global_step{step}", {key: x + step for key, x in own.items()})
    states(tmp_path / "videomae" / "checkpoint-9", {key: x + 9 for key, x in own.items()})
    for source, step in ((tmp_path, 300), (tmp_path / "global_step5", 5), (
            tmp_path / "global_step5" / "mp_rank_00_model_states.pt", 5),
            (tmp_path / "videomae", 9)):
        read = weights.read(source)[0]
        assert all(torch.equal(read[key], x + step) for key, x in own.items())
    (tmp_path / "latest").write_text("global_step40\n")  # it counts, not the number
    assert torch.equal(weights.read(tmp_path)[0]["0.bias"], own["0.bias"] + 40)
    (tmp_path / "latest").write_text("global_step41")
    with pytest.raises(WeightsError, match="latest: names global_step41, where there is no mp_"):
        weights.read(tmp_path)


def test_states_that_deepspeed_has_cut_up_are_refused_with_the_way_to_whole_ones(tmp_path):
    empty = {key: torch.empty(0) for key in model().state_dict()}
    states(tmp_path / "a" / "global_step1", empty, "zero_pp_rank_0_mp_rank_00_model_states.pt")
    states(tmp_path / "b" / "global_step1", empty)
    states(tmp_path / "c" / "global_step1", {})
    for name in ("a", "a/global_step1", "b", "c",
                 "a/global_step1/zero_pp_rank_0_mp_rank_00_model_states.pt"):
        with pytest.raises(WeightsError, match="ZeRO-3 .*python zero_to_fp32.py . whole") as caught:
            weights.read(tmp_path / name)
        assert "\n" not in str(caught.value)
    states(tmp_path / "d" / "global_step1", model().state_dict())
    states(tmp_path / "d" / "global_step1", {}, "mp_rank_01_model_states.pt")
    with pytest.raises(WeightsError, match="tensor parallelism"):
        weights.read(tmp_path / "d")


@pytest.mark.parametrize("plain, average", [("model", "model_ema"), ("state_dict", "ema"),
                                            ("net", "state_dict_ema")])
def test_of_weights_and_their_average_the_weights_are_taken_and_a_suffix_takes_the_others(
        tmp_path, capsys, plain, average):
    own = model().state_dict()
    other = {key: value + 1 for key, value in own.items()}
    path = tmp_path / "x.pth"
    torch.save({average: {"module": other} if average == "ema" else other, plain: own}, path)
    for _ in range(2):  # said once
        assert torch.equal(weights.read(path)[0]["0.bias"], own["0.bias"])
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert f"{plain!r} is used; for the average write {path}::{average}" in out
    assert torch.equal(weights.read(f"{path}::{average}")[0]["0.bias"], other["0.bias"])
    assert torch.equal(weights.read(f"{path}::{plain}")[0]["0.bias"], own["0.bias"])
    assert capsys.readouterr().out == ""
    assert weights.fingerprint(path) != weights.fingerprint(f"{path}::{average}")
    with pytest.raises(WeightsError, match="has no part 'emma'; its names begin with 0, 1"):
        weights.read(f"{path}::emma")


def test_a_part_may_also_be_a_prefix_and_a_file_may_have_two_colons_in_its_name(tmp_path):
    own = model().state_dict()
    both = {f"teacher.net.{key}": value + 1 for key, value in own.items()} | {
        f"student.{key}": value for key, value in own.items()}
    torch.save({"state_dict": both}, tmp_path / "x::student")
    torch.save({"state_dict": both}, tmp_path / "x")
    assert len(weights.read(tmp_path / "x::student")[0]) == len(both)  # a file that is called so
    assert torch.equal(weights.read(f"{tmp_path / 'x'}::teacher.net")[0]["1.bias"],
                       own["1.bias"] + 1)


def classifier():
    import mae
    return mae.VideoClassifier(mae.Size(24, 2, 2, 48, 8, 0, 0, 0, 0), classes=3, frames=2,
                               image_size=16).eval()


LOAD = dict(heads=2, frames=2, image_size=16)


@pytest.mark.parametrize("prefix", ["net.", "encoder.", "backbone.", "lit.model.", "0.",
                                    "module.net.encoder."])
def test_names_of_somebodys_own_module_before_those_of_a_network_are_no_hindrance(
        tmp_path, capsys, prefix):
    own = classifier()
    official = {prefix + key: value for key, value in own.to_official().items()}
    torch.save({"state_dict": official | {"loss.weight": torch.ones(3)}, "epoch": 1},
               tmp_path / "x.ckpt")
    torch.save({"state_dict": official}, tmp_path / "alone.ckpt")
    if prefix != "backbone.":  # that is one of VideoMAE's own layouts, which is read strictly
        model = type(own).from_official(tmp_path / "x.ckpt", **LOAD)
        assert f"under {prefix!r} is read; not read: loss" in capsys.readouterr().out
        assert all(torch.equal(model.state_dict()[key], x) for key, x in own.state_dict().items())
    model = type(own).from_official(tmp_path / "alone.ckpt", **LOAD)
    assert all(torch.equal(model.state_dict()[key], x) for key, x in own.state_dict().items())
    assert capsys.readouterr().out == ""
    assert weights.describe(weights.read(tmp_path / "alone.ckpt")[0])[0] == "VideoMAE, classifier"


def test_of_two_networks_in_a_file_neither_is_taken_unasked(tmp_path, capsys):
    own = classifier()
    both = {f"{name}.{key}": value + (name == "teacher") for name in ("student", "teacher")
            for key, value in own.to_official().items()}
    torch.save({"state_dict": both}, tmp_path / "x.ckpt")
    source = str(tmp_path / "x.ckpt")
    with pytest.raises(WeightsError, match="holds 2 networks; choose one: .*::student, .*::tea"):
        type(own).from_official(source, **LOAD)
    model = type(own).from_official(source + "::teacher", **LOAD)
    assert torch.equal(model.head.bias, own.head.bias + 1)
    with pytest.raises(WeightsError, match="2 networks"):
        from weights.encoders import load_encoder
        load_encoder(source)


def test_what_lacks_under_a_prefix_is_named(tmp_path):
    own = classifier()
    official = {"net." + key: value for key, value in own.to_official().items()}
    del official["net.blocks.1.mlp.fc1.bias"]
    torch.save({"state_dict": official}, tmp_path / "x.ckpt")
    with pytest.raises(WeightsError, match="missing: blocks.1.mlp.fc1.bias"):
        type(own).from_official(tmp_path / "x.ckpt", **LOAD)


@pytest.mark.parametrize("content, message", [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:12ab\nsize 345\n",
     "a git-lfs pointer, not the file itself: fetch the file with git lfs pull"),
    (b"\n<!DOCTYPE html>\n<html><head>", "a web page in place of a file of weights"),
    (b"<HTML><body>Sign in", "a web page"),
    (b'<?xml version="1.0"?>\n<!DOCTYPE html PUBLIC "-//W3C//DTD XHTML 1.0">', "a web page"),
    (b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>AccessDenied</Code><Message>x',
     r"a server.s XML message .* download the file again \(AccessDenied\)"),
    (b"<Error><Code>NoSuchKey</Code></Error>", r"a server.s XML message .*\(NoSuchKey\)"),
    (b"", "an empty file: the download did not work"),
    (b"Invalid username or password.", "a text .* it begins: Invalid username or password"),
    (b'{"error": "not found"}\n', 'a text .* it begins: {"error": "not found"}')])
@pytest.mark.parametrize("name", ["x.pth", "model.safetensors"])
def test_what_a_failed_download_leaves_is_named_as_what_it_is(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=f"{name}: {message}") as caught:
        weights.read(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_tensors_are_taken_out_of_one_part_of_a_pickle_that_holds_more(tmp_path, capsys):
    own = model().state_dict()
    torch.save({"model": own, "model_ema": {key: value + 1 for key, value in own.items()},
                "args": Spy(str(tmp_path / "spied"))}, tmp_path / "x.pth")
    convert(f"{tmp_path / 'x.pth'}::model_ema", tmp_path / "new.safetensors")
    assert not (tmp_path / "spied").exists() and "left out" in capsys.readouterr().err
    assert torch.equal(weights.read(tmp_path / "new.safetensors")[0]["0.bias"], own["0.bias"] + 1)


# ------------------------------------------------------------------------------------- odd files


@pytest.mark.parametrize("name", ["pipe", "run", "folder", "/dev/zero", "a" * 300, "a\0b", "a\nb"])
def test_what_is_no_file_is_one_line_and_nobody_waits_for_a_pipe(tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "folder" / "model.safetensors").mkdir(parents=True)
    for place in ("pipe", "run/model.safetensors"):
        os.mkfifo(tmp_path / place)
    with pytest.raises(WeightsError,
                       match="a folder, a pipe|no such file|cannot be read") as caught:
        weights.read(tmp_path / name)
    assert "\n" not in str(caught.value)


def zipped(**files):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(name.replace("__", "/").replace("_", "."), text)
    return content.getvalue()


# TorchScript, to look at
PROGRAM = zipped(a__data_pkl=pickle.dumps({"a": list(range(999))}), a__code__x_py="b" * 999)


@pytest.mark.parametrize("content", [
    random.Random(0).randbytes(5000), b"", b"PK\3\4" + bytes(99), zipped(a_txt="b"),
    zipped(a__data_pkl=b"\x80\2]."), PROGRAM,
    *(PROGRAM[:place] + bytes([PROGRAM[place] ^ 16]) + PROGRAM[place + 1:]
      for place in range(40, 90, 5)), b"\x80\2" + b"]" * 99999 + b".",
    (2).to_bytes(8, "little") + b"{}", (2**60).to_bytes(8, "little") + b"{}",
    (9**5).to_bytes(8, "little") + b"{" * 9**5],
    ids=lambda content: f"{len(content)} bytes")
def test_a_file_that_holds_no_weights_is_one_line(tmp_path, content):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(WeightsError, match="x.pth: ") as caught:
        weights.read(tmp_path / "x.pth")
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize("tensor, message", [
    (torch.eye(2).to_sparse(), "sparse"), (torch.ones(2, 2, device="meta"),
                                           "without their numbers"),
    (torch.ones(2, 2, dtype=torch.int8),
     "wrong kind: weight is torch.int8 instead of torch.float32"),
    (torch.ones(2, 2, dtype=torch.bool), "wrong kind"), (torch.ones(2, 2) * 1j, "wrong kind")])
def test_numbers_of_another_kind_are_not_copied_in_silence(tmp_path, tensor, message):
    torch.save({"weight": tensor}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=message):
        weights.fill(torch.nn.Linear(2, 2, bias=False), weights.read(tmp_path / "x.pth")[0])


@pytest.mark.parametrize("config", ["[]", "3", "null", "{", "[" * 99999],
                         ids=lambda config: config[:9])
def test_a_configuration_that_is_none_is_one_line(tmp_path, config):
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors", metadata={"config": config})
    with pytest.raises(WeightsError, match="x.safetensors: not a readable"):
        weights.read(tmp_path / "x.safetensors")


@pytest.mark.parametrize("config", [
    {"model": "VideoQA"}, {"model": "VideoQA", "clip": 3}, {"model": "Localiser"},
    {"model": "Localiser", "encoder": {"model": "X"}},
    {"model": "Localiser", "encoder": None, "head": {"features": "x"}, "names": 3, "stride": 1},
    {"model": ["Localiser"]},
    {"model": "VideoCLIP"}, {"model": "UniFormerV2", "size": 3}, {"model": "CaptionDecoder"},
    {"model": "InternVideo", "masked": []}])
def test_a_configuration_that_describes_no_model_is_one_line(tmp_path, config, capsys):
    import caption_decoder
    import clip_video
    import fusion
    from tasks import localisation
    from tasks import question_answering
    import uniformerv2
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors",
              metadata={"config": json.dumps(config)})
    for load in (localisation.Localiser.from_run, question_answering.VideoQA.from_run,
                 fusion.InternVideo.from_run,
                 clip_video.VideoCLIP.from_official, uniformerv2.UniFormerV2.from_official,
                 caption_decoder.CaptionDecoder.from_official):
        with pytest.raises(WeightsError, match="x.safetensors"):
            load(tmp_path / "x.safetensors")
    assert main([str(tmp_path / "x.safetensors"), "--official", str(tmp_path / "new.pth")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("text", [
    "[]", "3", "{", "[" * 99999, '{"hidden_act": []}', '{"vision_config": [1]}',
    '{"num_attention_heads": "x"}',
    '{"num_attention_heads": true}', '{"decoder_num_attention_heads": 0}',
    '{"text_config": {"num_attention_heads": 1.5}}'],
    ids=lambda text: text[:40])
def test_a_config_json_of_odd_kinds_is_one_line(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(WeightsError, match="config.json: "):
        weights.hub_config(tmp_path)


@pytest.mark.parametrize("name, content", [
    ("x.json", b""), ("x.json", b"\xff"), ("x.json", b"{}"), ("x.json", b"[" * 99999),
    ("x.json", None), ("x.gz", None), ("x.gz", b"x"),
    ("x.gz", gzip.compress(b"a b\n" * 999, mtime=0)[:-9] + b"x" * 9),
    ("x.gz", b"\x1f\x8b\x08" + bytes(7) + b"\xff" * 99),
    ("x.json", b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}')],
    ids=lambda value: str(value)[:20])
def test_a_damaged_tokenizer_is_one_line(tmp_path, name, content):
    if content is None:
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: ") as caught:
        load_tokenizer(tmp_path / name)
    assert "\n" not in str(caught.value)
