"""What is proved about fusion.py:

at the start every stream is what it was, bit for bit, and the sum is the equal average of logits; only
gates have a gradient then, and the rest later; frozen tensors never move and stay in eval mode; running them
without gradients changes no gradient; the experts listen to each other once gates open; a saved whole loads
alone; each option does what it says; what cannot work is refused in one line; late fusion by hand.
"""

import contextlib
import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import clip_video
from video.transforms import normalise
import fusion
import mae
import uniformerv2
import weights
from fusion import CrossModelAttention, InternVideo
from mae import VideoClassifier
from uniformerv2 import UniFormerV2

MASKED = mae.Size(24, 3, 2, 48, 8, 12, 1, 2, 24)
MULTIMODAL = uniformerv2.Size(32, 4, 2, 64, 8, 16)


def experts(classes=5, frames=4, second=False):
    torch.manual_seed(0)
    masked = VideoClassifier(MASKED, classes=classes, frames=4, image_size=16, head_scale=1.0)
    found = [UniFormerV2(replace(MULTIMODAL, depth=4 - i), classes=classes, frames=frames, local_units=1,
                         temporal_downsample=True) for i in range(1 + second)]
    for expert in found:  # as if trained: nothing is silent any more
        for p in expert.parameters():
            p.data += 0.05 * torch.randn_like(p)
    return masked.eval(), [expert.eval() for expert in found]


def clip(batch=2, frames=4, size=16, seed=0):
    return torch.randint(256, (batch, frames, size, size, 3), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(seed))


def whole(second=False, **options):
    masked, others = experts(second=second)
    return InternVideo(masked, others, **options)


def open_gates(model, amount=0.5):
    for name, p in model.named_parameters():
        if "gate_" in name:
            p.data.fill_(amount)
    return model


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("options", [{}, dict(source="patches"), dict(before=[0, 2], heads=4), dict(bridges=False),
                                     dict(before=[]), dict(last=False)])
def test_at_the_start_the_experts_are_themselves_bit_for_bit_and_the_sum_is_the_equal_average_of_their_logits(second, options):
    masked, others = experts(second=second)
    x = clip()
    with torch.no_grad():
        alone = [model(fusion.view(x, model)) for model in (masked, *others)]
    model = InternVideo(masked, others, **options).train()
    assert all(torch.equal(a, b) for a, b in zip(model.scores(x), alone)), "in training too"
    with torch.no_grad():
        scores = model.scores(x)
        assert len(scores) == len(alone) and all(torch.equal(a, b) for a, b in zip(scores, alone))
        assert torch.allclose(model(x), sum(alone) / len(alone), atol=1e-6)
        if not second:
            assert torch.equal(model(x), 0.5 * alone[0] + 0.5 * alone[1])
        tokens, _, seen = model.streams(x)
        assert torch.equal(tokens, masked.encoder(fusion.view(x, masked)))
        assert torch.equal(seen[0], others[0].encode(fusion.view(x, others[0]))[1])


def test_without_gates_the_start_is_another():
    masked, others = experts()
    x = clip()
    alone = masked(fusion.view(x, masked))
    assert not torch.allclose(InternVideo(masked, others, gates=False).scores(x)[0], alone, atol=1e-3)


def step(model, optimiser, x, answers):
    loss = torch.nn.functional.cross_entropy(model(x), answers)
    optimiser.zero_grad()
    loss.backward()
    found = {name: None if p.grad is None else float(p.grad.abs().sum()) for name, p in model.named_parameters()}
    optimiser.step()
    return found


def test_gates_have_a_gradient_at_step_one_and_the_bridges_behind_them_from_step_two():
    model = whole().train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    first, second = (step(model, optimiser, clip(4), torch.arange(4)) for _ in range(2))
    gates = [name for name in first if "gate_" in name]
    behind = [name for name in first if name.startswith(("bridges.", "last.")) and "gate_" not in name]
    assert len(gates) == 8 and all(first[name] > 0 for name in gates)
    assert all(first[name] == 0 for name in behind)
    assert all(second[name] > 0 for name in behind if not name.endswith(".kv.bias"))  # keys' biases cancel
    assert first["balance"] > 0 and first["masked.head.weight"] > 0 and first["multimodal.0.global_token"] > 0


def test_what_is_frozen_never_moves_and_nothing_else_is_frozen():
    model = whole(second=True, drop=0.5).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
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
    assert not any(part.training for expert in (model.masked, *model.multimodal) for part in expert.modules())
    assert any(isinstance(part, torch.nn.BatchNorm3d) or "BatchNorm" in type(part).__name__
               for part in model.modules())
    torch.manual_seed(0)
    a, b = model(clip()), model(clip())
    assert not torch.equal(a, b), "dropout before the heads"
    assert torch.equal(model.eval()(clip()), model.eval()(clip()))


def gradients(model, x, answers):
    view = fusion.view
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fusion, "view", lambda *a: view(*a).double())
        torch.nn.functional.cross_entropy(model(x), answers).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("second", [False, True])
def test_no_gradient_is_lost_where_frozen_parts_run_without(monkeypatch, second):
    """Against the plain way: every parameter of all models has a gradient, and nothing runs without."""
    x, answers = clip(3), torch.tensor([0, 3, 1])
    model = open_gates(whole(second=second, before=[1, 2]).double())
    found = gradients(model, x, answers)
    assert found.keys() == {name for name, _ in model.named_parameters()} - model.frozen
    plain = open_gates(whole(second=second, before=[1, 2]).double()).requires_grad_(True)
    plain.load_state_dict(model.state_dict())
    monkeypatch.setattr(fusion.torch, "no_grad", contextlib.nullcontext)
    everything = gradients(plain, x, answers)
    assert "multimodal.0.blocks.0.attn.qkv.weight" in everything and "masked.encoder.embed.weight" in everything
    for name, grad in found.items():
        assert torch.allclose(grad, everything[name], rtol=1e-9, atol=1e-12), name


def test_recomputing_saves_activations_and_changes_no_gradient(monkeypatch):
    x, answers = clip(3), torch.tensor([0, 3, 1])
    models = [open_gates(whole(before=[1]).double()) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    models[1].recompute()
    calls, checkpoint = [], torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda *a, **k: calls.append(a[0]) or checkpoint(*a, **k))
    plain, again = (gradients(model, x, answers) for model in models)
    assert calls == list(models[1].masked.encoder.blocks[1:]), "block 0 keeps nothing anyway"
    assert all(torch.allclose(plain[name], again[name], rtol=1e-9, atol=1e-12) for name in plain)


def test_freezing_again_undoes_thawing():
    model = whole()
    frozen = set(model.frozen)
    model.requires_grad_(True)
    model.freeze()
    assert model.frozen == frozen == {name for name, p in model.named_parameters() if not p.requires_grad}


def test_with_open_gates_each_expert_hears_the_other():
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
    assert not torch.allclose(before[1], model.scores(x)[1], atol=1e-4), "the multimodal encoder's answer"
    shut = whole()
    alone = shut.scores(x)[1]
    with torch.no_grad():
        for p in shut.masked.encoder.parameters():
            p.add_(0.3 * torch.randn_like(p))
    assert torch.equal(alone, shut.scores(x)[1])


def test_bridges_stand_evenly_and_read_as_far_up_as_they_stand():
    assert fusion.evenly(4, 32) == [7, 15, 23, 31]
    model = whole()
    assert model.before == [0, 1, 2] and model.layers == [[0, 2, 3]]
    with torch.device("meta"):
        big = InternVideo(VideoClassifier("huge", classes=400), UniFormerV2("l14", classes=400, frames=8))
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
    assert torch.allclose(model.shares(), torch.full((3,), 1 / 3))
    model.balance.data = torch.tensor([1.0, -2.0])
    assert math.isclose(float(model.shares().sum().detach()), 1, rel_tol=1e-6)
    scores = model.scores(clip())
    by_hand = sum(w * s for w, s in zip(torch.tensor([0.0, 1.0, -2.0]).softmax(0), scores))
    assert torch.allclose(model(clip()), by_hand, atol=1e-6)


def test_each_expert_sees_the_clip_in_its_own_way():
    masked, others = experts(frames=2)
    x = clip(frames=8, size=24)
    seen = fusion.view(x, masked)
    assert seen.shape == (2, 3, 4, 16, 16) and fusion.view(x, others[0]).shape == (2, 3, 2, 16, 16)
    same = clip()
    by_hand = (same.permute(0, 4, 1, 2, 3) / 255 - torch.tensor(mae.IMAGENET_MEAN).view(3, 1, 1, 1)) / torch.tensor(
        mae.IMAGENET_STD).view(3, 1, 1, 1)
    assert torch.allclose(fusion.view(same, masked), by_hand, atol=1e-6)
    frames = torch.arange(8, dtype=torch.uint8).view(1, 8, 1, 1, 1).expand(1, 8, 16, 16, 3)
    picked = fusion.view(frames, masked)[0, 0, :, 0, 0] * mae.IMAGENET_STD[0] * 255 + mae.IMAGENET_MEAN[0] * 255
    assert picked.round().tolist() == [1, 3, 5, 7]
    with pytest.raises(ValueError, match="sample more frames"):
        fusion.view(clip(frames=2), masked)
    assert InternVideo(masked, others)(x).shape == (2, 5)


@pytest.mark.parametrize("spoil", [lambda x: x.float() / 255, lambda x: x.permute(0, 4, 1, 2, 3), lambda x: x[0],
                                   lambda x: x[..., :1]])
def test_what_is_no_clip_is_refused_rather_than_normalised_twice(spoil):
    with pytest.raises(ValueError, match=r"a clip is uint8 \(B, T, H, W, 3\), not"):
        whole()(spoil(clip()))


def test_looks_are_shares_and_nothing_is_seen_of_class_tokens_where_only_patches_speak():
    for source, places in (("all", 5), ("patches", 4)):
        model = open_gates(whole(source=source))
        for place in range(3):
            looks = model.looks(clip(), place)
            assert looks.shape == (2, 8, 2, places)
            assert torch.allclose(looks.flatten(2).sum(dim=2), torch.ones(2, 8), atol=1e-5)
    where, grid, shares = fusion.places(model, clip(1))
    assert grid == (2, 2, 2) and shares.shape == (4, 2, 2, 2) and len(set(where)) == 4


def test_looks_are_those_of_the_forward_pass():
    """With two experts the second one's bridge is asked by tokens that the first one's has changed."""
    model, seen = open_gates(whole(second=True)), {}
    for expert in (0, 1):
        for place in range(3):
            model.bridges[expert][place].register_forward_hook(
                lambda bridge, given, _, key=(expert, place): seen.update({key: bridge.looks(*given)}))
    x = clip()
    model(x)
    for (expert, place), shares in seen.items():
        assert torch.equal(model.looks(x, place, expert).flatten(2), shares)


def test_features_for_other_work():
    model = whole(second=True)
    found = model.features(clip())
    assert found["clip"].shape == (2, 24 + 32 + 32) and found["masked"].shape == (2, 8, 24)
    assert [x.shape for x in found["multimodal"]] == [(2, 2, 5, 32)] * 2


@pytest.mark.parametrize("second", [False, True])
def test_a_saved_whole_loads_alone_and_says_the_same(tmp_path, second):
    model = open_gates(whole(second=second, before=[1], heads=4, source="patches"))
    weights.save(tmp_path, model, model.config)
    again = InternVideo.from_run(tmp_path)
    assert torch.equal(again(clip()), model.eval()(clip()))
    assert again.config == json.loads((tmp_path / "config.json").read_text())
    assert set(load_file(tmp_path / "model.safetensors")) == set(model.state_dict())
    masked, _ = experts()
    weights.save(tmp_path / "other", masked, masked.config)
    old = {key: value for key, value in model.config.items() if key != "last"}  # runs before there was `last`
    assert InternVideo.from_config(old).config == model.config
    with pytest.raises(weights.WeightsError, match="not an InternVideo"):
        InternVideo.from_run(tmp_path / "other")


def test_a_plain_image_tower_is_an_expert_too():
    masked, _ = experts()
    tower = UniFormerV2(MULTIMODAL, classes=5, frames=4, global_layers=()).eval()
    x = clip()
    model = InternVideo(masked, tower)
    assert torch.equal(model.scores(x)[1], tower(fusion.view(x, tower)))


def test_the_tower_of_a_video_text_model_is_an_expert_that_sees_as_it_was_trained():
    """InternVideo-MM's tower takes CLIP's normalisation along; its head is new."""
    clip_model = clip_video.VideoCLIP(MULTIMODAL, text_size=clip_video.TextSize(16, 1, 2), frames=4, vocabulary=50, context=8)
    tower = clip_model.visual.with_head(5, norm=clip_model.visual_norm, mean=clip_model.mean, std=clip_model.std).eval()
    masked, _ = experts()
    x = clip()
    model = InternVideo(masked, tower)
    normalised = normalise(x, clip_video.CLIP_MEAN, clip_video.CLIP_STD)
    assert torch.allclose(model.scores(x)[1], tower(normalised), atol=1e-5)
    again = InternVideo.from_config(json.loads(json.dumps(model.config)))
    assert again.multimodal[0].mean == clip_video.CLIP_MEAN


@pytest.mark.parametrize("options, complaint", [
    (dict(before=[2, 1]), "rising"), (dict(before=[3]), "blocks 0 to 2"), (dict(layers=[0, 1]), "name 3 layers"),
    (dict(before=[0], layers=[9]), "from 0 to 3"), (dict(source="class"), "choose all or patches"),
    (dict(heads=5), "not a multiple of 5 heads"), (dict(before=[0], layers=[[0], [1]]), "a list for each of the 1"),
    (dict(second=True, before=[0], layers=[[0]]), "a list for each of the 2"),
    (dict(second=True, before=[0, 1], layers=[0, 1]), "a list for each of the 2")])
def test_impossible_bridges_are_refused(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        whole(**options)


def test_heads_for_different_classes_are_refused():
    with pytest.raises(ValueError, match="heads name 5, 7 classes"):
        InternVideo(experts(5)[0], experts(7)[1])


def test_what_is_no_such_encoder_is_refused():
    masked, others = experts()
    with pytest.raises(ValueError, match="the masked encoder is a UniFormerV2: give a VideoClassifier"):
        InternVideo(others[0], masked)
    with pytest.raises(ValueError, match="the multimodal encoder is a Linear: give a UniFormerV2"):
        InternVideo(masked, torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="0 multimodal encoders"):
        InternVideo(masked, [])
    with pytest.raises(ValueError, match="for 1 colour channels: clips have 3"):
        InternVideo(VideoClassifier(MASKED, classes=5, frames=4, image_size=16, channels=1), others)


def test_a_bridge_is_gated_attention_and_a_gated_mlp_written_out():
    torch.manual_seed(0)
    bridge = CrossModelAttention(8, 12, 2)
    bridge.gate_attn.data, bridge.gate_mlp.data = torch.tensor(0.4), torch.tensor(-0.7)
    x, y = torch.randn(2, 3, 8), torch.randn(2, 5, 12)
    q, (k, v) = bridge.attn.q(bridge.norm(x)), bridge.attn.kv(bridge.norm_context(y)).chunk(2, dim=-1)
    told = []
    for part in range(2):
        a, b, c = (z[..., 4 * part:4 * part + 4] for z in (q, k, v))
        told.append((a @ b.transpose(1, 2) / 2).softmax(dim=-1) @ c)
    heard = x + math.tanh(0.4) * bridge.attn.proj(torch.cat(told, dim=-1))
    inner = torch.nn.functional.gelu(bridge.mlp.fc1(bridge.norm_mlp(heard)))
    assert torch.allclose(bridge(x, y), heard + math.tanh(-0.7) * bridge.mlp.fc2(inner), atol=1e-5)


def test_late_fusion_by_hand():
    a, b = torch.tensor([[0.0, math.log(3)]]), torch.tensor([[[math.log(9), 0.0], [0.0, 0.0]]])
    # a says (1/4, 3/4); b's two views (9/10, 1/10) and (1/2, 1/2) say (7/10, 3/10) together.
    assert torch.allclose(fusion.late_fusion([a, b]), torch.tensor([[0.475, 0.525]]))
    assert torch.allclose(fusion.late_fusion([a, b], [0.2, 0.8]), torch.tensor([[0.61, 0.39]]))
    assert fusion.best_weight(lambda w: 1.0) == 0.5 and fusion.best_weight(lambda w: w > 0.7) == 0.71
    for scores, shares in (([a, a[:, :1]], None), ([a, b], [1.0]), ([a, b.repeat(2, 1, 1)], None), ([], None)):
        with pytest.raises(ValueError, match="one for each model"):
            fusion.late_fusion(scores, shares)


def test_the_command_names_both_experts_and_the_whole(tmp_path, capsys):
    masked, others = experts()
    model = InternVideo(masked, others)
    weights.save(tmp_path, model, model.config)
    (tmp_path / "questions.json").write_text(json.dumps({"label": ["a", "b", "c", "d", "e"]}))
    assert fusion.main(["--weights", str(tmp_path), "--out", str(tmp_path / "looks.png")]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("masked      label", "multimodal  label", "together    label", "0.50, 0.50"))
    assert (tmp_path / "looks.png").stat().st_size > 0
    assert fusion.main(["nowhere.mp4", "--weights", str(tmp_path)]) == 2
    assert fusion.main(["--weights", str(tmp_path / "gone")]) == 2
    assert fusion.main(["--weights", str(tmp_path), "--top", "0"]) == 2
    assert fusion.main(["--weights", str(tmp_path), "--out", str(tmp_path / "looks.png" / "x.png")]) == 2
    assert capsys.readouterr().err.count("\n") == 4
