"""What is proved about fusion.py:

at the start every stream is what it was, bit for bit, also with encoders that handle positions in
another way; the sum is then the equal average of logits; only gates have a gradient at first, and
the rest later; frozen tensors never move and stay in eval mode; freezing changes no gradient of
what trains; each encoder reads the other once gates open; a saved model loads alone; each option
does what it says; what cannot work is refused in one line; late fusion by hand.
"""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import clip_video
import fusion
import mae
import uniformerv2
import weights
from engine import pictures
from fusion import CrossModelAttention, InternVideo
from mae import VideoClassifier
from tasks import recognition
from uniformerv2 import UniFormerV2
from video.transforms import normalise

MASKED = mae.Size(24, 3, 2, 48, 8, 12, 1, 2, 24)
MULTIMODAL = uniformerv2.Size(32, 4, 2, 64, 8, 16)


def encoders(classes=5, frames=4, second=False):
    torch.manual_seed(0)
    masked = VideoClassifier(MASKED, classes=classes, frames=4, image_size=16, head_scale=1.0)
    found = [UniFormerV2(replace(MULTIMODAL, depth=4 - i), classes=classes, frames=frames,
                         local_units=1, temporal_downsample=True) for i in range(1 + second)]
    for encoder in found:  # as if trained: nothing is silent any more
        for p in encoder.parameters():
            p.data += 0.05 * torch.randn_like(p)
    return masked.eval(), [encoder.eval() for encoder in found]


def clip(batch=2, frames=4, size=16, seed=0):
    return torch.randint(256, (batch, frames, size, size, 3), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(seed))


def whole(second=False, **options):
    masked, others = encoders(second=second)
    return InternVideo(masked, others, **options)


def open_gates(model, amount=0.5):
    for name, p in model.named_parameters():
        if "gate_" in name:
            p.data.fill_(amount)
    return model


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("options", [
    {}, dict(source="patches"), dict(before=[0, 2], heads=4), dict(bridges=False), dict(before=[]),
    dict(last=False)])
def test_at_the_start_the_encoders_are_themselves_bit_for_bit_and_logits_are_averaged(
        second, options):
    masked, others = encoders(second=second)
    x = clip()
    with torch.no_grad():
        alone = [model(fusion.prepare_clip(x, model)) for model in (masked, *others)]
    model = InternVideo(masked, others, **options).train()
    assert all(torch.equal(a, b) for a, b in zip(model.scores(x), alone)), "in training too"
    with torch.no_grad():
        scores = model.scores(x)
        assert len(scores) == len(alone) and all(torch.equal(a, b) for a, b in zip(scores, alone))
        assert torch.allclose(model(x), sum(alone) / len(alone), atol=1e-6)
        if not second:
            assert torch.equal(model(x), 0.5 * alone[0] + 0.5 * alone[1])
        states = model.encode(x)
        assert torch.equal(states[0].tokens, masked.tokens(fusion.prepare_clip(x, masked)))
        assert torch.equal(states[1].tokens, others[0].encode(fusion.prepare_clip(x, others[0]))[1])


class PositionsInEveryBlock(VideoClassifier):
    """Adds its position codes before every block, not only before the first."""

    def run(self, state, start, stop):
        codes = self.encoder.codes_of(self.encoder.grid).to(state.tokens)
        for i in range(start, stop):
            state = super().run(replace(state, tokens=state.tokens + codes), i, i + 1)
        return state


class TimeInEveryBlock(UniFormerV2):
    """Rotates the first two channels of all tokens before every block, by an angle per step."""

    def run(self, state, start, stop):
        angle = torch.arange(1.0, 1 + state.tokens.shape[1])[:, None]
        for i in range(start, stop):
            a, b, *_ = state.tokens.unbind(dim=-1)
            turned = torch.stack([a * angle.cos() - b * angle.sin(),
                                  a * angle.sin() + b * angle.cos()], dim=-1)
            tokens = torch.cat([turned, state.tokens[..., 2:]], dim=-1)
            state = super().run(replace(state, tokens=tokens), i, i + 1)
        return state


def test_an_encoder_with_another_kind_of_positions_keeps_them_inside_the_fusion():
    """Nobody but the encoder runs its blocks, so what belongs to every block cannot be left out."""
    masked, (other,) = encoders()
    x = clip()
    with torch.no_grad():
        usual = [model(fusion.prepare_clip(x, model)) for model in (masked, other)]
        masked.__class__, other.__class__ = PositionsInEveryBlock, TimeInEveryBlock
        alone = [model(fusion.prepare_clip(x, model)) for model in (masked, other)]
        assert all((a - b).abs().max() > 1e-4 for a, b in zip(usual, alone))
        for options in ({}, dict(before=[1, 2], layers=[3, 0])):
            model = InternVideo(masked, other, **options)
            assert all(torch.equal(a, b) for a, b in zip(model.scores(x), alone))
            assert torch.equal(model.encode(x)[0].tokens,
                               masked.tokens(fusion.prepare_clip(x, masked)))


def test_without_gates_the_start_is_another():
    masked, others = encoders()
    x = clip()
    alone = masked(fusion.prepare_clip(x, masked))
    without = InternVideo(masked, others, gates=False)
    assert not torch.allclose(without.scores(x)[0], alone, atol=1e-3)


def step(model, optimiser, x, answers):
    loss = torch.nn.functional.cross_entropy(model(x), answers)
    optimiser.zero_grad()
    loss.backward()
    found = {name: None if p.grad is None else float(p.grad.abs().sum())
             for name, p in model.named_parameters()}
    optimiser.step()
    return found


def test_gates_have_a_gradient_at_step_one_and_the_layers_behind_them_from_step_two():
    model = whole().train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    first, second = (step(model, optimiser, clip(4), torch.arange(4)) for _ in range(2))
    gates = [name for name in first if "gate_" in name]
    behind = [name for name in first
              if name.startswith(("bridges.", "last.")) and "gate_" not in name]
    assert len(gates) == 8 and all(first[name] > 0 for name in gates)
    assert all(first[name] == 0 for name in behind)
    # The biases of keys cancel in the softmax.
    assert all(second[name] > 0 for name in behind if not name.endswith(".kv.bias"))
    for name in ("balance", "masked.head.weight", "multimodal.0.global_token"):
        assert first[name] > 0


def test_what_is_frozen_never_moves_and_nothing_else_is_frozen():
    model = whole(second=True, drop=0.5).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    learned = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(learned, lr=1e-2, weight_decay=0.1)
    for i in range(4):
        step(model, optimiser, clip(4, seed=i), torch.arange(4))
    after = model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    trained = {name for name, _ in model.named_parameters()} - model.frozen
    assert moved == trained
    parts = ("bridges.", "last.", "balance", "masked.fc_norm.", "masked.head.") + tuple(
        f"multimodal.{i}.{part}" for i in (0, 1) for part in ("norm.", "head.", "global_token"))
    assert trained == {name for name in before if name.startswith(parts)}


def test_frozen_parts_stay_in_eval_mode_while_the_rest_trains():
    model = whole(drop=0.9).train()
    assert model.training and model.drop.training and model.bridges.training
    assert not any(part.training for encoder in (model.masked, *model.multimodal)
                   for part in encoder.modules())
    assert any(isinstance(part, torch.nn.BatchNorm3d) or "BatchNorm" in type(part).__name__
               for part in model.modules())
    torch.manual_seed(0)
    a, b = model(clip()), model(clip())
    assert not torch.equal(a, b), "dropout before the heads"
    assert torch.equal(model.eval()(clip()), model.eval()(clip()))


def gradients(model, x, answers):
    prepare_clip = fusion.prepare_clip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fusion, "prepare_clip", lambda *a: prepare_clip(*a).double())
        torch.nn.functional.cross_entropy(model(x), answers).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("second", [False, True])
def test_freezing_changes_no_gradient_of_what_trains(second):
    """Against a model in which every parameter has a gradient."""
    x, answers = clip(3), torch.tensor([0, 3, 1])
    model = open_gates(whole(second=second, before=[1, 2]).double())
    found = gradients(model, x, answers)
    assert found.keys() == {name for name, _ in model.named_parameters()} - model.frozen
    plain = open_gates(whole(second=second, before=[1, 2]).double()).requires_grad_(True)
    plain.load_state_dict(model.state_dict())
    everything = gradients(plain, x, answers)
    assert {"multimodal.0.blocks.0.attn.qkv.weight",
            "masked.encoder.embed.weight"} <= set(everything)
    for name, grad in found.items():
        assert torch.allclose(grad, everything[name], rtol=1e-9, atol=1e-12), name


def test_frozen_parts_before_what_trains_keep_nothing_for_the_backward_pass():
    """Neither their weights nor their inputs need a gradient: autograd builds no graph for them."""
    model = whole(before=[2], last=False)
    state, _ = model.encode_multimodal(model.multimodal[0], clip(), [1])
    assert not state.tokens.requires_grad and state.query.requires_grad  # the global token trains
    state = model.masked.run(model.masked.start(fusion.prepare_clip(clip(), model.masked)), 0, 2)
    assert not state.tokens.requires_grad and model.encode(clip())[0].tokens.requires_grad


def test_recomputing_saves_activations_and_changes_no_gradient():
    def kept(model):
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
                lambda y: sizes.update({y.data_ptr(): y.numel()}) or y, lambda y: y):
            found = gradients(model, x, answers)
        return found, sum(sizes.values())
    x, answers = clip(3), torch.tensor([0, 3, 1])
    models = [open_gates(whole(before=[1]).double()) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    models[1].recompute()
    (plain, all_of_it), (again, less) = map(kept, models)
    assert less < 0.9 * all_of_it
    assert all(torch.allclose(plain[name], again[name], rtol=1e-9, atol=1e-12) for name in plain)


def test_freezing_again_undoes_thawing():
    model = whole()
    frozen = set(model.frozen)
    model.requires_grad_(True)
    model.freeze()
    assert model.frozen == frozen == {name for name, p in model.named_parameters()
                                      if not p.requires_grad}


def test_with_open_gates_each_encoder_reads_the_other():
    model = open_gates(whole())
    x = clip()
    before = model.scores(x)
    with torch.no_grad():
        for p in model.multimodal[0].blocks.parameters():
            p.add_(0.3 * torch.randn_like(p))
    changed = model.scores(x)
    assert not torch.allclose(before[0], changed[0], atol=1e-4), "the masked encoder's answer"
    model = open_gates(whole())
    with torch.no_grad():
        for p in model.masked.encoder.parameters():
            p.add_(0.3 * torch.randn_like(p))
    after = model.scores(x)[1]
    assert not torch.allclose(before[1], after, atol=1e-4), "the multimodal encoder's answer"
    shut = whole()
    alone = shut.scores(x)[1]
    with torch.no_grad():
        for p in shut.masked.encoder.parameters():
            p.add_(0.3 * torch.randn_like(p))
    assert torch.equal(alone, shut.scores(x)[1])


def test_cross_model_attention_stands_evenly_and_reads_at_the_same_relative_depth():
    assert fusion.evenly_spaced_blocks(4, 32) == [7, 15, 23, 31]
    model = whole()
    assert model.before == [0, 1, 2] and model.layers == [[0, 2, 3]]
    with torch.device("meta"):
        big = InternVideo(VideoClassifier("huge", classes=400),
                          UniFormerV2("l14", classes=400, frames=8))
    assert big.before == [7, 15, 23, 31] and big.layers == [[5, 11, 17, 23]]
    trained = sum(p.numel() for p in big.parameters() if p.requires_grad)
    bridge = sum(p.numel() for p in big.bridges[0][0].parameters())
    assert 18e6 < bridge < 20e6 and 85e6 < trained < 95e6
    assert sum(p.numel() for p in big.parameters()) - trained > 0.9e9
    assert big(torch.empty(1, 16, 224, 224, 3, dtype=torch.uint8, device="meta")).shape == (1, 400)


def test_each_direction_alone():
    """before=[]: only the multimodal class token asks. last=False: only the masked tokens do."""
    x, alone = clip(), whole().scores(clip())
    for options, hears in ((dict(before=[]), [False, True]), (dict(last=False), [True, False])):
        model = open_gates(whole(**options))
        said = model.scores(x)
        assert [not torch.equal(a, b) for a, b in zip(said, alone)] == hears
        assert model.from_config(model.config).config == model.config


def test_the_three_encoder_form_learns_three_shares_that_sum_to_one():
    model = whole(second=True)
    assert torch.allclose(model.score_weights(), torch.full((3,), 1 / 3))
    model.balance.data = torch.tensor([1.0, -2.0])
    assert math.isclose(float(model.score_weights().sum().detach()), 1, rel_tol=1e-6)
    scores = model.scores(clip())
    by_hand = sum(w * s for w, s in zip(torch.tensor([0.0, 1.0, -2.0]).softmax(0), scores))
    assert torch.allclose(model(clip()), by_hand, atol=1e-6)


def test_each_encoder_sees_the_clip_in_its_own_way():
    masked, others = encoders(frames=2)
    x = clip(frames=8, size=24)
    seen = fusion.prepare_clip(x, masked)
    assert seen.shape == (2, 3, 4, 16, 16)
    assert fusion.prepare_clip(x, others[0]).shape == (2, 3, 2, 16, 16)
    same = clip()
    mean, std = (torch.tensor(x).view(3, 1, 1, 1) for x in (mae.IMAGENET_MEAN, mae.IMAGENET_STD))
    by_hand = (same.permute(0, 4, 1, 2, 3) / 255 - mean) / std
    assert torch.allclose(fusion.prepare_clip(same, masked), by_hand, atol=1e-6)
    frames = torch.arange(8, dtype=torch.uint8).view(1, 8, 1, 1, 1).expand(1, 8, 16, 16, 3)
    red = fusion.prepare_clip(frames, masked)[0, 0, :, 0, 0]
    picked = (red * mae.IMAGENET_STD[0] + mae.IMAGENET_MEAN[0]) * 255
    assert picked.round().tolist() == [1, 3, 5, 7]
    with pytest.raises(ValueError, match="sample more frames"):
        fusion.prepare_clip(clip(frames=2), masked)
    assert InternVideo(masked, others)(x).shape == (2, 5)


@pytest.mark.parametrize("spoil", [
    lambda x: x.float() / 255, lambda x: x.permute(0, 4, 1, 2, 3), lambda x: x[0],
    lambda x: x[..., :1]])
def test_what_is_no_clip_is_refused_rather_than_normalised_twice(spoil):
    with pytest.raises(ValueError, match=r"a clip is uint8 \(B, T, H, W, 3\), not"):
        whole()(spoil(clip()))


def test_attention_maps_are_weights_and_have_no_class_tokens_where_only_patches_give_keys():
    for source, places in (("all", 5), ("patches", 4)):
        model = open_gates(whole(source=source))
        for place in range(3):
            maps = model.attention_maps(clip(), place)
            assert maps.shape == (2, 8, 2, places)
            assert torch.allclose(maps.flatten(2).sum(dim=2), torch.ones(2, 8), atol=1e-5)
    assert torch.equal(model.attention_maps(clip()), maps), "the last place is the default"
    where, grid, shares = pictures.strongest(maps[0], (2, 2, 2), (2, 2, 2))
    assert grid == (2, 2, 2) and shares.shape == (4, 2, 2, 2) and len(set(where)) == 4


def test_attention_maps_are_those_of_the_forward_pass():
    """Of two multimodal encoders, the first one's layer changes the queries to the second."""
    model, seen = open_gates(whole(second=True)), {}
    hooks = [model.bridges[encoder][place].register_forward_hook(
        lambda layer, given, _, key=(encoder, place): seen.update(
            {key: layer.attention_maps(*given)}))
        for encoder in (0, 1) for place in range(3)]
    x = clip()
    model(x)
    for hook in hooks:
        hook.remove()
    for (encoder, place), shares in seen.items():
        assert torch.equal(model.attention_maps(x, place, encoder).flatten(2), shares)


def test_features_for_other_work():
    model = whole(second=True)
    found = model.features(clip())
    assert found["clip"].shape == (2, 24 + 32 + 32) and found["masked"].shape == (2, 8, 24)
    assert [x.shape for x in found["multimodal"]] == [(2, 2, 5, 32)] * 2


@pytest.mark.parametrize("second", [False, True])
def test_a_saved_model_loads_alone_and_gives_the_same(tmp_path, second):
    model = open_gates(whole(second=second, before=[1], heads=4, source="patches"))
    weights.save(tmp_path, model, model.config)
    again = InternVideo.from_run(tmp_path)
    assert torch.equal(again(clip()), model.eval()(clip()))
    assert again.config == json.loads((tmp_path / "config.json").read_text())
    assert set(load_file(tmp_path / "model.safetensors")) == set(model.state_dict())
    masked, _ = encoders()
    weights.save(tmp_path / "other", masked, masked.config)
    # A run from before there was the option `last`.
    old = {key: value for key, value in model.config.items() if key != "last"}
    assert InternVideo.from_config(old).config == model.config
    with pytest.raises(weights.WeightsError, match="not InternVideo"):
        InternVideo.from_run(tmp_path / "other")


def test_a_plain_image_tower_works_too():
    masked, _ = encoders()
    tower = UniFormerV2(MULTIMODAL, classes=5, frames=4, global_layers=()).eval()
    x = clip()
    model = InternVideo(masked, tower)
    alone = tower(fusion.prepare_clip(x, tower))
    assert torch.equal(model.scores(x)[1], alone)
    assert not torch.equal(open_gates(model).scores(x)[1], alone)


def test_the_tower_of_a_video_text_model_sees_clips_as_it_was_trained():
    """InternVideo-MM's tower takes CLIP's normalisation along; its head is new."""
    clip_model = clip_video.VideoCLIP(MULTIMODAL, text_size=clip_video.TextSize(16, 1, 2), frames=4,
                                      vocabulary=50, context=8)
    tower = clip_model.visual.with_head(5, norm=clip_model.visual_norm, mean=clip_model.mean,
                                        std=clip_model.std).eval()
    masked, _ = encoders()
    x = clip()
    model = InternVideo(masked, tower)
    normalised = normalise(x, clip_video.CLIP_MEAN, clip_video.CLIP_STD)
    assert torch.allclose(model.scores(x)[1], tower(normalised), atol=1e-5)
    again = InternVideo.from_config(json.loads(json.dumps(model.config)))
    assert again.multimodal[0].mean == clip_video.CLIP_MEAN


@pytest.mark.parametrize("options, complaint", [
    (dict(before=[2, 1]), "rising"), (dict(before=[3]), "blocks 0 to 2"),
    (dict(layers=[0, 1]), "give 3 blocks"),
    (dict(before=[0], layers=[9]), "from 0 to 3"), (dict(source="class"), "choose all or patches"),
    (dict(heads=5), "not a multiple of 5 heads"),
    (dict(before=[0], layers=[[0], [1]]), "a list for each of the 1"),
    (dict(second=True, before=[0], layers=[[0]]), "a list for each of the 2"),
    (dict(second=True, before=[0, 1], layers=[0, 1]), "a list for each of the 2")])
def test_impossible_places_are_refused(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        whole(**options)


def test_heads_for_different_classes_are_refused():
    with pytest.raises(ValueError, match="heads have 5, 7 classes"):
        InternVideo(encoders(5)[0], encoders(7)[1])


def test_what_is_no_such_encoder_is_refused():
    masked, others = encoders()
    with pytest.raises(ValueError, match="masked encoder is a UniFormerV2: give a VideoClassifier"):
        InternVideo(others[0], masked)
    with pytest.raises(ValueError, match="the multimodal encoder is a Linear: give a UniFormerV2"):
        InternVideo(masked, torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="0 multimodal encoders"):
        InternVideo(masked, [])
    with pytest.raises(ValueError, match="for 1 colour channels: clips have 3"):
        InternVideo(VideoClassifier(MASKED, classes=5, frames=4, image_size=16, channels=1), others)


def test_cross_model_attention_is_gated_attention_and_a_gated_mlp_written_out():
    torch.manual_seed(0)
    layer = CrossModelAttention(8, 12, 2)
    layer.gate_attn.data, layer.gate_mlp.data = torch.tensor(0.4), torch.tensor(-0.7)
    x, y = torch.randn(2, 3, 8), torch.randn(2, 5, 12)
    q, (k, v) = layer.attn.q(layer.norm(x)), layer.attn.kv(layer.norm_context(y)).chunk(2, dim=-1)
    told = []
    for part in range(2):
        a, b, c = (z[..., 4 * part:4 * part + 4] for z in (q, k, v))
        told.append((a @ b.transpose(1, 2) / 2).softmax(dim=-1) @ c)
    heard = x + math.tanh(0.4) * layer.attn.proj(torch.cat(told, dim=-1))
    inner = torch.nn.functional.gelu(layer.mlp.fc1(layer.norm_mlp(heard)))
    assert torch.allclose(layer(x, y), heard + math.tanh(-0.7) * layer.mlp.fc2(inner), atol=1e-5)


def test_late_fusion_by_hand():
    a, b = torch.tensor([[0.0, math.log(3)]]), torch.tensor([[[math.log(9), 0.0], [0.0, 0.0]]])
    # a says (1/4, 3/4); b's two views (9/10, 1/10) and (1/2, 1/2) say (7/10, 3/10) together.
    assert torch.allclose(recognition.late_fusion([a, b]), torch.tensor([[0.475, 0.525]]))
    assert torch.allclose(recognition.late_fusion([a, b], [0.2, 0.8]), torch.tensor([[0.61, 0.39]]))
    assert recognition.best_weight(lambda w: 1.0) == 0.5
    assert recognition.best_weight(lambda w: w > 0.7) == 0.71
    for scores, shares in (([a, a[:, :1]], None), ([a, b], [1.0]), ([a, b.repeat(2, 1, 1)], None),
                           ([], None)):
        with pytest.raises(ValueError, match="one for each model"):
            recognition.late_fusion(scores, shares)


def test_the_command_prints_shapes(capsys):
    fusion.main()
    assert "(1, 256, 8, 65)" in capsys.readouterr().out
