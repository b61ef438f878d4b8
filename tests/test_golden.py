"""The official numbers in full: outputs, losses, gradients of reference vectors, in two precisions.

The vectors are too large to keep here. Set GOLDEN to their folder, or put it beside the repository
as shared/golden; without it these tests are skipped (tests/test_mae.py holds the printed sums).
Tolerances relative to the largest reference number: 1e-5 and 5e-5 (gradients) in float32, 1e-7 in
float64, where a wrong LayerNorm epsilon would show.
"""

import functools
import inspect
import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import caption_decoder
import clip_video
import mae
import uniformerv2
import weights
from engine.large_batches import chunked_caption_loss
from mae import VideoClassifier, reconstruction_loss, reconstruction_target
from variants.dual_masking import DualMaskedVideoMAE, dual_masking_loss, hidden_among_decoded
from weights import videomae
from weights.__main__ import convert, main
from weights.caption_decoder import OFFICIAL as DECODER
from weights.official import spell
from weights.tokenizer import load_tokenizer
from weights.uniformerv2 import OFFICIAL as TOWER

FOLDER = Path(os.environ.get("GOLDEN",
                             Path(__file__).resolve().parent.parent.parent / "shared" / "golden"))
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="no reference vectors (set GOLDEN)")
DTYPES = (torch.float32, torch.float64)


class Case:
    """One reference case at one precision."""

    def __init__(self, name, dtype):
        tensors = load_file(FOLDER / f"{name}.safetensors")
        facts = json.loads((FOLDER / f"{name}.json").read_text())
        self.arguments = facts.get("constructor", {})
        # a table of which few rows are in use
        for key, sparse in (facts.get("sparse_state") or {}).items():
            table = torch.zeros(sparse["full_shape"])
            table[tensors["staterowindex." + key]] = tensors["staterows." + key]
            tensors["state." + key] = table
        self.known = {key[4:] for key in tensors if key.startswith("out.")}
        self.dtype, wide = dtype, "64" if dtype == torch.float64 else ""
        self.state, self.inputs, self.outputs, self.gradients = (
            {key[len(prefix):]: value for key, value in tensors.items() if key.startswith(prefix)}
            for prefix in ("state.", "in.", f"out{wide}.", f"grad{wide}."))

    def check(self, name, value):
        """Compare an output, where this precision has it on file (float64: small ones only)."""
        if name in self.outputs:
            self.close(value, self.outputs[name], 1e-7 if self.dtype == torch.float64 else 1e-5,
                       name)

    def check_all(self, **values):
        """Compare several outputs, each of which must be a reference's name."""
        for name, value in values.items():
            assert name in self.known, f"no reference is called {name}"
            self.check(name, value)

    def check_grads(self, model, tolerance64=1e-7, **names):
        """Every recorded gradient; names: its official name, with __ for a dot -> our parameter."""
        parameters = dict(model.named_parameters())
        assert {name.replace("__", ".") for name in names} == set(self.gradients)
        for name, ours in names.items():
            reference = self.gradients[name.replace("__", ".")]
            got = parameters[ours].grad
            # CLIP's projections lie on their side
            got = got.T if got.ndim == 2 and got.T.shape == reference.shape != got.shape else got
            self.close(got.reshape(reference.shape), reference,
                       tolerance64 if self.dtype == torch.float64 else 5e-5, name)

    def close(self, value, reference, tolerance, name):
        error = (value.double() - reference.double()).abs().max() / reference.double().abs().max()
        assert error <= tolerance, f"{name}: {error:.2e}"

    def check_gradients(self, model, rules):
        """Every recorded gradient, found through the key map by its official name."""
        ours = {rule.sources[0]: rule.ours for rule in rules}
        parameters = dict(model.named_parameters())
        assert self.gradients
        for name, reference in self.gradients.items():
            got = parameters[ours[name]].grad.view(reference.shape)
            self.close(got, reference, 1e-7 if self.dtype == torch.float64 else 5e-5, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["videomae_pretrain", "videomae_v2_pretrain",
                                  "hf_videomae_pretrain"])
def test_pretraining(name, dtype):
    case = Case(name, dtype)
    video = case.inputs.get("video")
    video = case.inputs["pixel_values"].transpose(1, 2) if video is None else video
    video = video.contiguous().to(dtype)
    hidden = case.inputs.get("mask", case.inputs.get("bool_masked_pos"))
    skipped = case.inputs.get("decode_mask")
    heads = case.arguments.get("encoder_num_heads", case.arguments.get("num_attention_heads"))
    decoder_heads = case.arguments.get("decoder_num_heads",
                                       case.arguments.get("decoder_num_attention_heads"))
    model = DualMaskedVideoMAE.from_official(
        case.state, heads=heads, decoder_heads=decoder_heads, frames=video.shape[2],
        image_size=tuple(video.shape[3:])).to(dtype)
    prediction = model(video, hidden, skipped)
    wanted = hidden if skipped is None else ~skipped
    weight = None if skipped is None else hidden_among_decoded(hidden, skipped)
    target, raw = (reconstruction_target(video, wanted, normalise) for normalise in (True, False))
    measure = reconstruction_loss if weight is None else functools.partial(dual_masking_loss,
            weight=weight)
    loss = measure(prediction, target)
    loss.backward()
    for key, value in (("pred", prediction), ("logits", prediction), ("target_normalized", target),
                       ("target_raw", raw), ("loss", loss.detach()),
                       ("loss_raw_target", measure(prediction.detach(), raw))):
        case.check(key, value)
    visible, _ = mae.split_by_mask(hidden)
    for key in ("encoder_tokens", "encoder_last_hidden_state"):
        case.check(key, model.encoder(video, visible))
    case.check_gradients(model, videomae.rules(model, videomae.VideoMAEFile(case.state).tables))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["videomae_finetune_meanpool", "videomae_finetune_layerscale",
                                  "hf_videomae_classify"])
def test_classification(name, dtype):
    case = Case(name, dtype)
    video = case.inputs.get("video")
    video = case.inputs["pixel_values"].transpose(1, 2) if video is None else video
    heads = case.arguments.get("num_heads", case.arguments.get("num_attention_heads"))
    model = VideoClassifier.from_official(case.state, heads=heads, frames=video.shape[2],
                                          image_size=tuple(video.shape[3:])).to(dtype)
    seen = []
    model.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    logits = model(video.to(dtype))
    loss = F.cross_entropy(logits, case.inputs["labels"])
    loss.backward()
    case.check("logits", logits)
    case.check("loss", loss.detach())
    case.check("features", model.feature(video.to(dtype)))
    file = videomae.VideoMAEFile(case.state, videomae.FINE_TUNED)
    case.check_gradients(model, videomae.rules(model, file.tables))


def test_a_classifier_of_the_first_token_is_refused_in_one_line():
    """An option of the official code that no published model uses: its norm is the encoder's."""
    with pytest.raises(weights.WeightsError, match="classifies by the first token") as caught:
        VideoClassifier.from_official(Case("videomae_finetune_token0", torch.float32).state)
    assert "\n" not in str(caught.value)


def test_tube_mask_counts():
    rows = json.loads((FOLDER / "videomae_tube_mask.json").read_text())["rows"]
    for row in rows:
        grid = row["input_size_time_height_width"]
        hidden = mae.tube_mask(3, grid, row["mask_ratio"]).view(3, grid[0], -1)
        assert (hidden.sum(dim=2) == row["num_masks_per_frame"]).all()
        assert hidden[0].sum() == row["total_masks"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["uniformerv2_k400", "uniformerv2_ssv2", "uniformerv2_frozen"])
def test_uniformerv2(name, dtype):
    case = Case(name, dtype)
    model = uniformerv2.UniFormerV2.from_official(
        case.state, heads=case.arguments["heads"], global_heads=case.arguments["n_head"],
        global_layers=tuple(case.arguments["return_list"]),
        frames=case.arguments["num_frames"]).to(dtype)
    seen, names = {}, [("ln_pre", model.norm_pre), ("block_first", model.blocks[0]),
                       ("block_last", model.blocks[-1])]
    names += [(f"global_token{i}", block) for i, block in enumerate(model.global_blocks)]
    for key, part in names:
        part.register_forward_hook(lambda _, inputs, out, key=key: seen.setdefault(key, out))
    video = case.inputs["video"].to(dtype)
    logits = model(video)
    loss = F.cross_entropy(logits, case.inputs["labels"])
    loss.backward()
    fused, tokens = model.encode(video)
    assert torch.equal(tokens, seen["block_last"])
    case.check_all(logits=logits, loss=loss.detach(), fused=fused,
                   ln_pre=seen["ln_pre"].flatten(0, 1))
    for key, value in seen.items():  # the reference is sequence first
        if key != "ln_pre":
            value = value.flatten(0, 1) if key.startswith("block") else value
            case.check_all(**{key: value.transpose(0, 1)})
    ours = {spell(name, TOWER): name for name in model.state_dict()}
    parameters = dict(model.named_parameters())
    for key, reference in case.gradients.items():
        case.close(parameters[ours[key.removeprefix("backbone.")]].grad.reshape(reference.shape),
                   reference,
                   1e-7 if dtype == torch.float64 else 5e-5, key)


def test_inflated_kernels():
    case = Case("inflate_weight", torch.float32)
    for frames in (1, 3):
        kernel = case.inputs["weight2d"]
        assert torch.equal(uniformerv2.inflate(kernel, frames), case.outputs[f"center_{frames}"])


def logits_of(model, video, text):
    return model.logit_scale.exp() * F.normalize(video, dim=-1) @ F.normalize(text, dim=-1).T


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["clip_openai", "clip_hf"])
def test_clip(name, dtype):
    """The Hugging Face float64 gradients are themselves 1.5e-7 away from the OpenAI-named ones."""
    case = Case(name, dtype)
    model = clip_video.VideoCLIP.from_official(case.state, heads=3, text_heads=2).to(dtype)
    video, tokens = model.encode_video_tokens(case.inputs["image"].to(dtype))
    text, words = model.encode_text_tokens(case.inputs["text_ids"])
    loss = clip_video.contrastive_loss(video, text, model.logit_scale)
    loss.backward()
    case.check_all(image_features=video, text_features=text, loss=loss.detach(),
                   text_tokens_ln_final=words,
                   image_features_normalized=F.normalize(video, dim=-1),
                   vision_tokens_last_block=tokens[:, 0],
                   text_features_normalized=F.normalize(text, dim=-1),
                   logits_per_image=logits_of(model, video, text))
    if name == "clip_openai":
        case.check_grads(model, logit_scale="scale", visual__proj="visual_proj.weight",
                         visual__class_embedding="visual.class_token",
                         text_projection="text.proj.weight",
                         positional_embedding="text.positions")
    else:
        case.check_grads(model, 2e-7, logit_scale="scale",
                         visual_projection__weight="visual_proj.weight",
                         vision_model__embeddings__class_embedding="visual.class_token",
                         text_projection__weight="text.proj.weight",
                         text_model__embeddings__position_embedding__weight="text.positions")


@pytest.mark.parametrize("dtype", DTYPES)
def test_internvideo_mm(dtype):
    case = Case("videointern", dtype)
    model = clip_video.VideoCLIP.from_official(case.state, heads=3, text_heads=3, global_heads=3,
                                               frames=4).to(dtype)
    video, tokens = model.encode_video_tokens(case.inputs["video"].to(dtype))
    ids = case.inputs["text_ids"]
    text, words = model.encode_text_tokens(ids)
    logits = logits_of(model, video, text)
    loss = F.cross_entropy(logits, torch.arange(len(logits)))
    loss.backward()
    longest = Case("videointern", torch.float32).outputs["text_all_features_upto_longest"].shape[1]
    case.check_all(video_features=video, text_features=text, logits=logits,
                   probs=logits.softmax(-1), loss=loss.detach(),
                   video_all_features=tokens.permute(2, 0, 1, 3),
                   text_all_features_upto_longest=words[:, :longest],
                   image_features=model.encode_video(case.inputs["image_as_one_frame"].to(dtype)))
    assert model.unused == ["text_mask_embedding"]
    case.check_grads(model, logit_scale="scale", visual_proj="visual_proj.weight",
                     visual__transformer__temporal_cls_token="visual.global_token",
                     visual__transformer__balance="visual.balance",
                     text_projection="text.proj.weight",
                     visual_ln_post__weight="visual_norm.weight")


@pytest.mark.parametrize("dtype", DTYPES)
def test_viclip(dtype):
    case = Case("viclip", dtype)
    model = clip_video.VideoCLIP.from_official(case.state, heads=3, text_heads=2).to(dtype)
    video, tokens = model.encode_video_tokens(case.inputs["video"].to(dtype).transpose(1, 2))
    text, words = model.encode_text_tokens(case.inputs["text_ids"])
    loss = clip_video.contrastive_loss(video, text, model.logit_scale, targets=case.inputs["idx"])
    loss.backward()
    # the reference's patches run place by place, ours frame by frame
    normed = model.visual_norm(tokens)[:, 0]
    patches = normed[:, 1:].unflatten(1, (case.inputs["video"].shape[1], -1))
    patches = patches.transpose(1, 2).flatten(1, 2)
    case.check_all(vision_features=video, text_features=text, loss=loss.detach(),
                   sim_v2t=logits_of(model, video, text),
                   image_features=model.encode_video(case.inputs["image"].to(dtype)),
                   vision_tokens=torch.cat([normed[:, :1], patches], dim=1),
                   text_tokens_projected=model.text.proj(words),
                   loss_without_idx=clip_video.contrastive_loss(
                       video, text, model.logit_scale).detach())
    case.check_grads(model, temp="scale",
                     vision_encoder__temporal_positional_embedding="visual.times",
                     vision_encoder__proj="visual_proj.weight",
                     text_encoder__text_projection="text.proj.weight")


@pytest.mark.parametrize("beta0", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_caption_decoder(dtype, beta0):
    """beta0: as the official file has them, all shifts of its norms zero."""
    case = Case("caption_decoder", dtype)
    state = {key: value * (not (beta0 and key.endswith("beta")))
             for key, value in case.state.items()}
    decoder = caption_decoder.CaptionDecoder.from_official(state, heads=3).to(dtype)
    visual = case.inputs["image_feats"].to(dtype).permute(1, 0, 2, 3).flatten(1, 2)
    text, ids = case.inputs["text_embeds"].to(dtype), case.inputs["text_ids"]
    is_text = ~case.inputs["special_tokens_mask"]
    hidden = decoder.hidden(visual, text)
    loss = caption_decoder.caption_loss(decoder.logits(hidden), ids, is_text)
    loss.backward()
    chunked = chunked_caption_loss(decoder, hidden.detach(), ids, is_text, rows=4)
    torch.testing.assert_close(chunked, loss)
    prefix = "beta0_" if beta0 else ""
    case.check_all(**{prefix + "logits": decoder(visual, text), prefix + "loss": loss.detach()})
    if not beta0:
        pooled = decoder.pool(visual)
        first = decoder.self_blocks[0](decoder.text_norm(text))[0]
        crossed = decoder.cross_blocks[0](first, *decoder.cross_blocks[0].attn.keys(pooled))
        case.check_all(visual_tokens=pooled, hidden_before_predictor=hidden,
                       after_first_self_block=first,
                       after_first_cross_block=crossed)
        ours = {"caption_decoder." + spell(key, DECODER): value
                for key, value in decoder.named_parameters()}
        for key, reference in case.gradients.items():
            case.close(ours[key].grad, reference, 1e-7 if dtype == torch.float64 else 5e-5, key)


@pytest.mark.parametrize("dtype", DTYPES)
def test_contrastive_and_captioning_together(dtype):
    case = Case("cotrain_contrastive_caption", dtype)
    model = clip_video.VideoCLIP.from_official(case.state, heads=2, text_heads=2, global_heads=2,
                                               frames=3).to(dtype)
    decoder = caption_decoder.CaptionDecoder.from_official(case.state).to(dtype)
    ids = case.inputs["text_ids"].long()
    video, tokens = model.encode_video_tokens(case.inputs["video"].to(dtype).transpose(1, 2))
    text, words = model.encode_text_tokens(ids)
    logits = decoder(tokens.flatten(1, 2), words[:, :-1])
    case.check_all(
        video_features=video, text_features=text,
        contrastive_image_logits=logits_of(model, video, text),
        contrastive_loss=clip_video.contrastive_loss(video, text, model.logit_scale).detach(),
        cap_logits=logits,
        cap_loss=caption_decoder.caption_loss(logits, ids,
                                              ~case.inputs["special_tokens_mask"]).detach())
    loss = clip_video.contrastive_loss(video, text,
                                       model.logit_scale) + caption_decoder.caption_loss(
        logits, ids, ~case.inputs["special_tokens_mask"])
    loss.backward()
    case.check_grads(
        torch.nn.ModuleDict({"clip": model, "caption_decoder": decoder}),
        clip__logit_scale="clip.scale",
        clip__visual__transformer__temporal_cls_token="clip.visual.global_token",
        clip__text_projection="clip.text.proj.weight", clip__visual_proj="clip.visual_proj.weight",
        caption_decoder__visual_queries="caption_decoder.queries",
        clip__token_embedding__weight="clip.text.embed.weight")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["coca_open_clip", "coca_lucidrains"])
def test_our_losses_are_those_of_two_other_public_models_of_coca(name, dtype):
    """Their networks differ; from their outputs, our losses give the same numbers. open_clip counts
    captions twice; the contrast of the other is of texts one token shorter than those on file."""
    case, single = Case(name, dtype), Case(name, torch.float32)
    found = {key: case.outputs.get(key, value).to(dtype) for key, value in single.outputs.items()}
    ids = case.inputs["text_ids"].long()
    caption = caption_decoder.caption_loss(found["logits"][:, :ids.shape[1] - 1], ids, ids != 0)
    if name == "coca_lucidrains":
        case.close(caption, found["caption_loss"], 1e-5, name)
        return
    case.close(2 * caption, found["caption_loss_times_2"], 1e-5, name)
    case.close(clip_video.contrastive_loss(found["image_features"], found["text_features"],
                                           case.state["logit_scale"].to(dtype)),
               found["contrastive_loss"], 1e-5, name)


def test_clip_tokenizer():
    vocabulary = FOLDER.parent / "clip_bpe" / "bpe_simple_vocab_16e6.txt.gz"
    if not vocabulary.exists():
        pytest.skip("no CLIP vocabulary beside the reference vectors")
    words = load_tokenizer(vocabulary)
    rows = json.loads((FOLDER / "clip_tokenizer.json").read_text())["rows"]
    assert len(rows) == 60
    for row in rows:
        plain = row["ids_without_ftfy"]
        expected = row["ids"] if plain is None or has_ftfy() else plain
        ids, is_token = words.encode([row["text"]], 10**4, trim=True)
        assert ids[0, 1:-1].tolist() == expected, row["text"]


def has_ftfy():
    try:
        import ftfy  # noqa: F401
    except ImportError:
        return False
    return True


# ------------------------------------------------------------------------ through files, sniffed

LOADERS = {
    "videomae_pretrain": "VideoMAE", "videomae_v2_pretrain": "VideoMAE",
    "hf_videomae_pretrain": "VideoMAE", "videomae_finetune_meanpool": "VideoClassifier",
    "videomae_finetune_layerscale": "VideoClassifier", "hf_videomae_classify": "VideoClassifier",
    "uniformerv2_k400": "UniFormerV2", "uniformerv2_ssv2": "UniFormerV2",
    "uniformerv2_frozen": "UniFormerV2", "caption_decoder": "CaptionDecoder",
    "cotrain_contrastive_caption": "VideoCLIP", "clip_openai": "VideoCLIP",
    "clip_hf": "VideoCLIP", "viclip": "VideoCLIP", "videointern": "VideoCLIP",
}


@pytest.mark.parametrize("style", ["safetensors", "plain", "module", "half", "deepspeed",
                                   "lightning"])
@pytest.mark.parametrize("name", LOADERS)
def test_a_file_is_recognised_by_its_content_and_holds_the_same_tensors(
        tmp_path, capsys, name, style):
    state = Case(name, torch.float32).state
    if style == "safetensors":
        path = tmp_path / "w.bin"  # names of files tell nothing
        save_file({key: value.contiguous() for key, value in state.items()}, path)
    else:
        path = tmp_path / "w.safetensors"
        torch.save({
            "plain": lambda: state,
            "module": lambda: {"model": {f"module.{key}": value for key, value in state.items()},
                               "epoch": 3},
            "half": lambda: {key: value.half() if value.is_floating_point() else value
                             for key, value in state.items()},
            "deepspeed": lambda: {"module": state, "optimizer": {"lr": 0.1}},
            "lightning": lambda: {"state_dict": state, "hyper_parameters": Path("x")},
        }[style](), path)
    if style == "lightning":
        with pytest.raises(weights.WeightsError, match="--convert"):
            weights.read(path)
        path = convert(path, tmp_path / "taken_out.safetensors")
    found, _ = weights.read(path)
    expected = {key: value.half().float() if style == "half"
                and value.is_floating_point() else value
                for key, value in state.items()}
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key])
                                                   for key in found)
    family, loaders = weights.describe(found)
    assert loaders[0] == LOADERS[name], family
    if style == "plain" and name != "videomae_finetune_layerscale":  # its positions: another size
        assert main([str(path), "--heads", "4"]) == 0
        out = capsys.readouterr().out
        whole = name not in ("videointern", "cotrain_contrastive_caption")  # hidden words: unused
        module = weights.MODELS[LOADERS[name]][0]
        assert f"loads{', to the last tensor' * whole}: {module}.{LOADERS[name]}" in out
        broken = {key: value for key, value in found.items() if key != list(found)[-1]}
        torch.save(broken, path)
        assert main([str(path), "--heads", "4"]) == 2 and "missing" in capsys.readouterr().err


@pytest.mark.parametrize("name", LOADERS)
def test_what_was_loaded_goes_back_under_its_official_names_bit_for_bit(name):
    """But for what no model needs, sizes stored as tensors and the embedding of hidden words.
    Hugging Face files come back under the authors' names."""
    case = Case(name, torch.float32)
    load = weights.class_of(LOADERS[name]).from_official
    keys = [key for key in inspect.signature(load).parameters if key.endswith("heads")]
    keys = [] if name == "caption_decoder" else keys
    options = dict.fromkeys(keys, 4 if "videomae" in name else 2)
    if name == "videomae_finetune_layerscale":
        video = case.inputs["video"]
        options |= dict(frames=video.shape[2], image_size=tuple(video.shape[3:]))
    model = load(case.state, **options)
    back = model.to_official()
    if name.startswith(("hf_", "clip_hf")):
        again = load(back, **options).state_dict()
        assert all(torch.equal(again[key], value) for key, value in model.state_dict().items())
        return
    unused = set(getattr(model, "unused", ()))
    prefix = "caption_decoder." if name == "caption_decoder" else ""
    state = {key: value for key, value in case.state.items() if key not in unused}
    if name == "cotrain_contrastive_caption":
        state = {key.removeprefix("clip."): value for key, value in state.items()}
    state = {(key if key.startswith(prefix) else prefix + key): value
             for key, value in state.items()}
    if name.startswith("uniformerv2"):
        state = {"backbone." + key.removeprefix("backbone."): value for key, value in state.items()}
        back = {key: value for key, value in back.items() if key in state
                or not key.endswith("num_batches_tracked")}
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)
