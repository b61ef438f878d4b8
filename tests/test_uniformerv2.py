"""What is proved about uniformerv2.py:

at the start the video model is the image model averaged over frames, and can learn from step one;
convolutions and attention are those of torch; global blocks leave the frames alone; order is
learned where the image model cannot; the official numbers come out, and a file that does not fit is
refused with the names of what is wrong.
"""

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_summary, official_fill, values
from torch import nn

import uniformerv2
import weights
from engine.errors import UserError
from tools import predict
from uniformerv2 import UniFormerV2
from weights import WeightsError, encoders

TOY = uniformerv2.Size(24, 3, 2, 96, 16, 32)  # the toy measures of the reference numbers
MOTION = dict(local_units=2, temporal_downsample=True)
FORMS = {"scenes": {}, "motion": MOTION, "frozen": {"balance": False},
         "image": {"global_layers": ()}}


def toy(**options):
    return UniFormerV2(TOY, **{"frames": 4, "global_layers": (1, 2), **options})


def clip(frames=4, size=32, batch=2, dtype=torch.float32):
    return torch.randn(batch, 3, frames, size, size, dtype=dtype)


def awake(model):
    """The model with all parameters redrawn and statistics unlike 0 and 1: no branch is zero."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * (p[0].numel() ** -0.5 if p.ndim > 1
                                           else 0.1) + (".norm" in name))
        for name, b in model.named_buffers():
            if b.is_floating_point():
                b.uniform_(0.5, 1.5)
    return model


def same(ours, plain, inputs, parameters, tolerance=1e-10):
    """Equal values, and equal gradients for inputs and parameters, given in both forms' order."""
    torch.testing.assert_close(ours, plain, atol=tolerance, rtol=tolerance)
    upstream = torch.randn_like(plain)
    wanted = list(inputs) + list(parameters)
    for a, b in zip(torch.autograd.grad(ours, wanted, upstream, retain_graph=True),
                    torch.autograd.grad(plain, wanted, upstream, retain_graph=True)):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


# The theorem ------------------------------------------------------------------------------------


def image_model(model, frames):
    """CLIP's image tower with torch's layers: (B, 3, H, W) -> class tokens (B, D)."""
    D = model.embed.out_features
    kernel = model.embed.weight.unflatten(1, (3, model.window, 16, 16))[:, :, model.window // 2]
    x = F.conv2d(frames, kernel, stride=16).flatten(2).transpose(1, 2)
    x = torch.cat([model.class_token.expand(len(x), 1, D), x], dim=1) + model.positions
    x = F.layer_norm(x, (D,), model.norm_pre.weight, model.norm_pre.bias, 1e-5)
    for block in model.blocks:
        attn = nn.MultiheadAttention(D, 2, batch_first=True).to(x.dtype)
        layers = {"in_proj_": block.attn.qkv, "out_proj.": block.attn.proj}
        attn.load_state_dict({theirs + part: getattr(layer, part) for theirs,
                              layer in layers.items()
                              for part in ("weight", "bias")})
        y = block.norm1(x)
        x = x + attn(y, y, y, need_weights=False)[0]
        y = block.mlp.fc1(block.norm2(x))
        x = x + block.mlp.fc2(y * torch.sigmoid(1.702 * y))
    return x[:, 0]


@pytest.mark.parametrize("form", ["scenes", "motion"])
def test_at_the_start_the_video_model_is_the_image_model_averaged_over_frames(form):
    """UniFormerV2, Sec. 3: new branches end in zeros. Times 1/2, the balance; a norm removes it."""
    model = toy(**FORMS[form]).eval()
    nn.init.normal_(model.blocks[0].norm1.bias)
    video = clip()
    seen = video[:, :, ::model.stride]  # three frames into one: at first only the middle one counts
    each = torch.stack([image_model(model, frame) for frame in seen.unbind(2)])
    torch.testing.assert_close(model.feature(video), 0.5 * each.mean(dim=0), atol=1e-5, rtol=1e-5)
    tokens = model.encode(video)[1]
    read = model.global_blocks[0](model.global_token.expand(2, -1, -1), tokens, model.grid)
    assert read.count_nonzero() == 0  # exactly


def test_at_the_start_frames_may_come_in_any_order():
    model, video = toy().eval(), clip(8)
    torch.testing.assert_close(model(video[:, :, torch.randperm(8)]), model(video), atol=1e-5,
                               rtol=1e-5)


@pytest.mark.parametrize("form", ["scenes", "motion"])
def test_what_starts_at_zero_has_a_gradient_on_step_one_and_order_matters_after_it(form):
    """Except the last layer's second local unit: no frame reads it any more, only the global block,
    whose output is zero until step two."""
    model = toy(classes=3, global_mlp_dropout=0.0, head_dropout=0.0, **FORMS[form])
    zeros = [name for name, p in model.named_parameters() if p.count_nonzero() == 0 and p.ndim > 1]
    ends = [f"global_blocks.{j}.{part}" for j in (0, 1)
            for part in ("attn.proj.weight", "mlp.fc2.weight")]
    ends += [f"blocks.{i}.local.{j}.expand.weight" for i in range(3) for j in (0, 1)
             if form == "motion"]
    assert sorted(zeros) == sorted(ends + ["global_token"])
    optimiser = torch.optim.SGD(model.parameters(), lr=1.0)
    F.cross_entropy(model(clip()), torch.tensor([0, 1])).backward()
    parameters = dict(model.named_parameters())
    late = "blocks.2.local.1.expand.weight"
    for name in zeros + ["balance"]:
        assert (parameters[name].grad.abs().max() > 1e-6) == (name != late), name
    optimiser.step()
    model.zero_grad()
    F.cross_entropy(model(clip()), torch.tensor([0, 1])).backward()
    assert late not in parameters or parameters[late].grad.abs().max() > 1e-6
    optimiser.step()  # two steps, for the convolutions that feed into zeros
    model.eval()
    video, order = clip(8), [6, 7, 0, 1, 4, 5, 2, 3]
    assert (model(video[:, :, order]) - model(video)).abs().max() > 1e-5


def test_order_is_learned_where_the_image_model_cannot():
    """Behaviour: a bright bar moves right or left. The frames are equal, in opposite order."""
    torch.manual_seed(0)
    bars = torch.zeros(8, 3, 4, 32, 32)
    for i in range(8):
        for tau in range(4):
            bars[i, :, tau, :, 8 * tau:8 * tau + 8] = 0.5 + 0.1 * i
    video, label = torch.cat([bars, bars.flip(2)]), torch.arange(2).repeat_interleave(8)
    losses = {}
    for name, options in (("image", FORMS["image"]), ("video", dict(local_units=1))):
        model = toy(classes=2, head_dropout=0.0, **options)
        optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(40):
            loss = F.cross_entropy(model(video), label)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        losses[name] = loss.item()
    assert losses["video"] < 0.1 and losses["image"] > 0.69  # ln 2, a coin


# Forms with equal numbers -----------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_the_convolution_over_time_is_the_official_one(frames):
    x = torch.randn(2, frames, 6, 10, dtype=torch.float64, requires_grad=True)
    kernel, bias = (torch.randn(*s, dtype=torch.float64, requires_grad=True)
                    for s in ((10, 3), (10,)))
    official = F.conv3d(x.permute(0, 3, 1, 2).reshape(2, 10, frames, 2, 3),
                        kernel.view(10, 1, 3, 1, 1), bias,
                        padding=(1, 0, 0), groups=10).flatten(3).permute(0, 2, 3, 1)
    same(uniformerv2.temporal_conv(x, kernel, bias), official, [x], [kernel, bias])


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_the_convolution_over_the_grid_is_the_official_one(frames):
    tokens = torch.randn(2, frames, 1 + 12, 6, dtype=torch.float64, requires_grad=True)
    x = tokens[:, :, 1:].unflatten(2, (3, 4))
    kernel, bias = (torch.randn(*s, dtype=torch.float64, requires_grad=True)
                    for s in ((6, 1, 3, 3, 3), (6,)))
    official = F.conv3d(x.permute(0, 4, 1, 2, 3), kernel, bias, padding=1,
                        groups=6).permute(0, 2, 3, 4, 1)
    same(uniformerv2.grid_conv(x, kernel, bias), official, [tokens], [kernel, bias])
    with torch.no_grad():
        torch.testing.assert_close(uniformerv2.grid_conv(x, kernel, bias), official)


@pytest.mark.parametrize("downsample", [False, True])
def test_the_embedding_is_the_official_strided_convolution(downsample):
    model, video = awake(toy(temporal_downsample=downsample)).double(), clip(6, dtype=torch.float64)
    k, D = model.window, 24
    x = F.conv3d(video, model.embed.weight.view(D, 3, k, 16, 16), stride=(model.stride, 16, 16),
                 padding=(k // 2, 0, 0)).flatten(3).permute(0, 2, 3, 1)             # (B, t, S, D)
    x = torch.cat([model.class_token.expand(2, x.shape[1], 1, D), x], dim=2) + model.positions
    same(model.embed_frames(video), model.norm_pre(x), [],
         [model.embed.weight, model.positions, model.class_token])


def test_the_attention_of_a_global_block_is_torchs_own():
    block = awake(uniformerv2.GlobalBlock(TOY, 4, 96, 0.0, 0.0)).double()
    query, context = (torch.randn(3, n, 24, dtype=torch.float64, requires_grad=True)
                      for n in (1, 17))
    qkv, proj = block.attn.qkv, block.attn.proj
    plain, _ = F.multi_head_attention_forward(
        query.transpose(0, 1), context.transpose(0, 1), context.transpose(0, 1), 24, 4, qkv.weight,
        qkv.bias,
        None, None, False, 0.0, proj.weight, proj.bias)
    same(block.attend(query, context), plain.transpose(0, 1), [query, context],
         [qkv.weight, qkv.bias, proj.weight, proj.bias])


@pytest.mark.parametrize("training", [True, False])
def test_a_local_unit_is_the_official_stack_of_3d_layers(training):
    """BatchNorm3d, 1x1x1, 3x1x1 depth-wise and 1x1x1 convolution; the norm's statistics too."""
    unit = awake(uniformerv2.LocalUnit(24, 1.5)).double().train(training)
    official = nn.Sequential(nn.BatchNorm3d(24), nn.Conv3d(24, 16, 1),
                             nn.Conv3d(16, 16, (3, 1, 1), padding=(1, 0, 0), groups=16),
                             nn.Conv3d(16, 24, 1)).double().train(training)
    ours = dict(unit.state_dict())
    official.load_state_dict({key: ours[name].reshape(tensor.shape) for (key, tensor), name in
                              zip(official.state_dict().items(), ours)})
    x = torch.randn(2, 5, 6, 24, dtype=torch.float64, requires_grad=True)
    plain = official(x.permute(0, 3, 1, 2).reshape(2, 24, 5, 2, 3)).flatten(3).permute(0, 2, 3, 1)
    same(unit(x), plain, [x], [])
    for a, b in zip(torch.autograd.grad(unit(x).square().sum(), list(unit.parameters())),
                    torch.autograd.grad(plain.square().sum(), list(official.parameters()))):
        torch.testing.assert_close(a, b.view(a.shape), atol=1e-9, rtol=1e-9)
    if not training:
        assert torch.equal(unit.norm.running_mean, official[0].running_mean)


def test_a_local_unit_keeps_the_statistics_of_all_clips_frames_and_places():
    unit = uniformerv2.LocalUnit(8, 1.5)
    x = 3 + 2 * torch.randn(2, 5, 6, 8)
    unit(x)
    torch.testing.assert_close(unit.norm.running_mean, 0.1 * x.mean(dim=(0, 1, 2)))
    torch.testing.assert_close(unit.norm.running_var, 0.9 + 0.1 * x.flatten(0, 2).var(dim=0))
    assert int(unit.norm.num_batches_tracked) == 1


def test_recomputing_keeps_less_and_changes_neither_gradients_nor_statistics():
    """A second forward pass must not count twice in the BatchNorm."""
    def step(recompute):
        torch.manual_seed(0)
        model, kept = awake(toy(drop_path=0.3, global_drop_path=0.3, **MOTION)), []
        model.recompute(recompute)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x,
                                                      lambda x: x):
            loss = model(clip()).square().sum()
        loss.backward()
        return [p.grad for p in model.parameters()] + list(model.buffers()), sum(kept)
    (plain, kept), (again, kept_again) = step(False), step(True)
    assert kept_again < 0.75 * kept
    for a, b in zip(plain, again):
        assert torch.equal(a, b)


# The parts --------------------------------------------------------------------------------------


def test_global_blocks_leave_the_frames_alone():
    """Their 3x3x3 convolution works on a copy (spec of the official code: it clones)."""
    model = awake(toy()).eval()
    plain = toy(global_layers=()).eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k in plain.state_dict()})
    video = clip()
    feature, tokens = plain.encode(video)
    assert torch.equal(tokens, model.encode(video)[1])
    assert torch.equal(feature, tokens[:, :, 0].mean(dim=1))


def test_the_balance_weighs_the_class_tokens_not_the_global_token():
    """The paper says the opposite of the official code; the code made the weights."""
    model, video = awake(toy()).eval(), clip()
    mean = model.encode(video)[1][:, :, 0].mean(dim=1)
    with torch.no_grad():
        model.balance.fill_(50)
    torch.testing.assert_close(model.feature(video), mean)
    with torch.no_grad():
        model.balance.fill_(-50)
    token = model.feature(video)
    assert (token - mean).abs().max() > 0.1
    model.balance = None  # the form for a frozen tower
    torch.testing.assert_close(model.feature(video), token)


def test_local_units_never_touch_a_class_token():
    block = awake(uniformerv2.FrameBlock(TOY, 2, 1.5, 0.0)).eval()
    x = torch.randn(2, 4, 5, 24)
    y = block.apply_local_unit(1, block.apply_local_unit(0, x))
    assert torch.equal(y[:, :, 0], x[:, :, 0]) and (y[:, :, 1:] != x[:, :, 1:]).all()


def test_the_global_token_travels_from_block_to_block():
    """"Sequential" fusion: what the first block read reaches the feature through the last."""
    model, video = awake(toy(balance=False)).eval(), clip()
    before = model.feature(video)
    with torch.no_grad():
        model.global_blocks[0].near.bias += torch.randn(24)
    assert (model.feature(video) - before).abs().max() > 1e-3


def test_drop_path_skips_clips_as_a_whole():
    model = awake(toy(drop_path=0.9, global_layers=())).train()
    video = clip(batch=1).expand(40, -1, -1, -1, -1)
    outcomes = {tuple(row) for row in model(video).detach().round(decimals=4).tolist()}
    assert 1 < len(outcomes) <= 16  # four branches that may drop, not one choice per frame or token


@pytest.mark.parametrize("form", FORMS)
def test_any_number_of_frames_will_do(form):
    """No weight depends on it. The image model gives the same for any number of equal frames."""
    model = awake(toy(**FORMS[form])).eval()
    assert [model(clip(n)).shape for n in (2, 4, 10)] == [(2, 24)] * 3
    if form == "image":
        still = clip(1)
        torch.testing.assert_close(model(still), model(still.expand(-1, -1, 7, -1, -1)), atol=1e-5,
                                   rtol=1e-5)


def test_clips_and_options_that_do_not_fit_are_refused():
    for video, message in ((clip(3), "multiple of 2"), (clip(4, 48), "48 x 48")):
        with pytest.raises(ValueError, match=message):
            toy(**MOTION)(video)
    for options, message in (
            (dict(global_layers=(1, 3)), "layers 0 to 2"), (dict(global_layers=(2, 1)), "rising"),
            (dict(local_units=3), "0, 1 or 2"), (dict(image_size=30), "do not divide")):
        with pytest.raises(ValueError, match=message):
            toy(**options)


@pytest.mark.parametrize("frames", [1, 3])
def test_a_kernel_inflated_at_its_centre_gives_each_frame_what_the_image_model_gave_it(frames):
    kernel, video = torch.randn(5, 3, 4, 4), clip(3, 8)
    inflated = uniformerv2.inflate(kernel, frames)
    assert inflated.shape == (5, 3, frames, 4, 4)
    got = F.conv3d(video, inflated, stride=(1, 4, 4), padding=(frames // 2, 0, 0))
    for i in range(3):
        one = F.conv2d(video[:, :, i], kernel, stride=4)
        torch.testing.assert_close(got[:, :, i], one, atol=1e-5, rtol=1e-5)


# Official weights -------------------------------------------------------------------------------


def official_shapes(motion, D=24, depth=3, patch=16, places=4, blocks=2, classes=5, reduced=16):
    """{official name: shape} of a UniFormerV2 file, as its code makes it."""
    shapes = {"class_embedding": (D,), "positional_embedding": (1 + places, D),
              "conv1.weight": (D, 3, 3 if motion else 1, patch, patch),
              "ln_pre.weight": (D,), "ln_pre.bias": (D,),
              "transformer.temporal_cls_token": (1, 1, D), "transformer.balance": (D,),
              "transformer.proj.0.weight": (D,), "transformer.proj.0.bias": (D,),
              "transformer.proj.2.weight": (classes, D), "transformer.proj.2.bias": (classes,)}
    names = [f"transformer.resblocks.{i}." for i in range(depth)]
    names += [f"transformer.dec.{j}." for j in range(blocks)]
    for a in names:
        shapes |= {a + "attn.in_proj_weight": (3 * D, D), a + "attn.in_proj_bias": (3 * D,),
                   a + "attn.out_proj.weight": (D, D), a + "attn.out_proj.bias": (D,),
                   a + "mlp.c_fc.weight": (4 * D, D), a + "mlp.c_fc.bias": (4 * D,),
                   a + "mlp.c_proj.weight": (D, 4 * D), a + "mlp.c_proj.bias": (D,)}
        for norm in ("ln_1.", "ln_2.") + (("ln_3.",) if ".dec." in a else ()):
            shapes |= {a + norm + "weight": (D,), a + norm + "bias": (D,)}
    for j in range(blocks):
        shapes |= {f"transformer.dpe.{j}.weight": (D, 1, 3, 3, 3),
                   f"transformer.dpe.{j}.bias": (D,)}
    units = [f"{a}lmhra{j}.pos_embed." for a in names[:depth] for j in (1, 2)]
    for a in units if motion else ():
        shapes |= {a + f"0.{name}": (D,)
                   for name in ("weight", "bias", "running_mean", "running_var")}
        shapes |= {a + "1.weight": (reduced, D, 1, 1, 1), a + "1.bias": (reduced,),
                   a + "2.weight": (reduced, 1, 3, 1, 1), a + "2.bias": (reduced,),
                   a + "3.weight": (D, reduced, 1, 1, 1), a + "3.bias": (D,)}
    return shapes


def official(motion=False, prefix="", **measures):
    tensors = official_fill(official_shapes(motion, **measures))
    for name in [name for name in tensors if name.endswith("running_var")]:
        tensors[name.replace("running_var", "num_batches_tracked")] = torch.tensor(7)
    return {prefix + name: tensor for name, tensor in tensors.items()}


def reference_clip():
    return torch.from_numpy(values("input", 2 * 3 * 4 * 32 * 32).reshape(2, 3, 4, 32, 32)).float()


NUMBERS = {False: (0.560813, 8.967975, [2.661510, -0.682581, -0.284324, -1.169417], -0.188928),
           True: (3.754978, 9.347060, [2.893536, -0.715676, -0.354450, -0.731675], 0.398425)}


@pytest.mark.parametrize("prefix", ["", "backbone."])
@pytest.mark.parametrize("motion", [False, True])
def test_official_numbers(motion, prefix):
    """Printed sums of the official class on these weights and this clip."""
    model = UniFormerV2.from_official(official(motion, prefix), heads=2)
    assert model.config["global_layers"] == [1, 2] and model.config["local_units"] == 2 * motion
    assert_summary(model(reference_clip()), *NUMBERS[motion])
    wide = model.double()(reference_clip().double())
    assert wide.dtype == torch.float64
    assert_summary(wide, *NUMBERS[motion])


def test_every_layer_norm_has_the_official_epsilon():
    """1e-6, VideoMAE's, would change a feature by one part in a million, too little to notice."""
    for model in (toy(classes=3, **MOTION), UniFormerV2.from_official(official(True), heads=2)):
        norms = [m for m in model.modules() if isinstance(m, (nn.LayerNorm, nn.BatchNorm1d))]
        assert len(norms) == 1 + 3 * 2 + 3 * 2 + 2 * 3 + 1 and {norm.eps
                                                                for norm in norms} == {1e-5}


def test_heads_and_layers_that_no_shape_can_tell():
    with pytest.raises(WeightsError, match="pass heads="):
        UniFormerV2.from_official(official())
    with pytest.raises(WeightsError, match="holds 2 global blocks, global_layers names 3"):
        UniFormerV2.from_official(official(), heads=2, global_layers=(0, 1, 2))
    model = UniFormerV2.from_official(official(), heads=2, global_heads=3, global_layers=(0, 2))
    assert model.global_blocks[0].attn.heads == 3 and model.blocks[0].attn.heads == 2
    other = model(reference_clip())
    assert (other - UniFormerV2.from_official(official(),
                                              heads=2)(reference_clip())).abs().max() > 1e-3


def test_options_are_read_off_the_names_and_shapes():
    tensors = official(True, reduced=10)
    del tensors["transformer.balance"]
    tensors = {k: v for k,
               v in tensors.items() if "lmhra2" not in k and "transformer.proj" not in k}
    config = UniFormerV2.from_official({"model_state": tensors}, heads=2).config
    assert not config["balance"] and config["classes"] == 0 and config["local_units"] == 1
    assert config["temporal_downsample"]
    assert int(24 // config["reduction"]) == 10
    assert config["frames"] == 16


@pytest.mark.parametrize("motion", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_each_missing_extra_or_misshapen_tensor_is_named_and_alone(motion):
    """For every single tensor of the file but the balance, whose absence means the frozen form."""
    whole = official(motion, "backbone.")
    for key in whole:
        if not key.endswith("balance"):
            with pytest.raises(WeightsError) as caught:
                UniFormerV2.from_official({k: v for k, v in whole.items() if k != key}, heads=2)
            assert key in str(caught.value) and sum(k in str(caught.value)
                                                    for k in whole) == 1, caught.value
        if whole[key].ndim:
            with pytest.raises(WeightsError) as caught:
                UniFormerV2.from_official(whole | {key: torch.cat([whole[key], whole[key][:1]])},
                                          heads=2)
            assert key in str(caught.value), (key, caught.value)
    for surprise in ("backbone.transformer.resblocks.0.surprise", "surprise"):
        with pytest.raises(WeightsError, match=f"unknown: {surprise}"):
            UniFormerV2.from_official(whole | {surprise: torch.zeros(3)}, heads=2)
    with pytest.raises(WeightsError, match="not the weights of a UniFormerV2"):
        UniFormerV2.from_official({"conv.weight": torch.zeros(3)})


def test_files_without_the_counters_of_the_norms_load():
    """No output depends on them; one that lacks some of them is damaged (see above)."""
    tensors = {k: v for k, v in official(True).items() if "num_batches" not in k}
    assert_summary(UniFormerV2.from_official(tensors, heads=2)(reference_clip()), *NUMBERS[True])


@pytest.mark.parametrize("form", FORMS)
def test_a_run_of_ours_loads_again(tmp_path, form):
    model = awake(toy(classes=3, drop_path=0.1, **FORMS[form])).eval()
    weights.save(tmp_path, model, model.config)
    loaded = UniFormerV2.from_official(tmp_path)
    assert loaded.config == model.config
    assert UniFormerV2.from_config(model.config).config == model.config
    video = clip()
    assert torch.equal(loaded(video), model(video))


def clip_tensors():
    """OpenAI's names: image tower, its last norm and projection, a tensor of the text tower."""
    shapes = {k: v for k, v in official_shapes(False).items()
              if "resblocks" in k or not k.startswith("transformer")}
    shapes |= {"conv1.weight": (24, 3, 16, 16), "ln_post.weight": (24,), "ln_post.bias": (24,),
               "proj": (24, 8)}
    return official_fill({"visual." + k: v for k, v in shapes.items()} | {"ln_final.weight": (8,)})


@pytest.mark.parametrize("form", ["scenes", "motion"])
def test_clip_grows_into_a_video_model_that_starts_as_clip(form):
    tensors, video = clip_tensors(), clip()
    model = UniFormerV2.from_clip(tensors, heads=2, classes=4, global_layers=(1, 2), **FORMS[form])
    assert not model.training
    seen = video[:, :, ::model.stride]
    each = torch.stack([image_model(model, frame) for frame in seen.unbind(2)])
    torch.testing.assert_close(model.encode(video)[0], 0.5 * each.mean(dim=0), atol=1e-5, rtol=1e-5)
    kernel = model.embed.weight.unflatten(1, (3, model.window, 16, 16))
    assert torch.equal(kernel, uniformerv2.inflate(tensors["visual.conv1.weight"], model.window))
    plain = UniFormerV2.from_clip(tensors, heads=2, global_layers=())
    assert torch.equal(plain.embed.weight, tensors["visual.conv1.weight"].flatten(1))


def test_clip_weights_must_fit_and_only_an_asked_for_size_stretches_the_positions():
    tensors = clip_tensors()
    for key in tensors:
        if key not in ("visual.ln_post.weight", "visual.ln_post.bias", "visual.proj",
                       "ln_final.weight"):
            with pytest.raises(WeightsError, match=key):
                UniFormerV2.from_clip({k: v for k, v in tensors.items() if k != key}, heads=2)
    with pytest.raises(WeightsError, match="unknown: visual.surprise"):
        UniFormerV2.from_clip(tensors | {"visual.surprise": torch.zeros(3)}, heads=2)
    with pytest.raises(ValueError, match="64 x 64"):
        UniFormerV2.from_clip(tensors, heads=2)(clip(4, 64))
    large = UniFormerV2.from_clip(tensors, heads=2, image_size=64)
    assert large(clip(4, 64)).shape == (2, 24)
    assert torch.equal(large.positions[0], tensors["visual.positional_embedding"][0])
    old = tensors["visual.positional_embedding"][1:].mean(dim=0)
    new = large.positions[1:].mean(dim=0)
    # stretching keeps the mean, by symmetry
    torch.testing.assert_close(new, old, atol=1e-5, rtol=1e-5)


def test_published_sizes_have_the_published_numbers_of_parameters():
    """Official model zoo, in millions: Kinetics 115, 354; Something-Something 163, 574."""
    for name, family, classes, millions in (("b16", "scenes", 400, 115),
                                            ("l14", "scenes", 400, 354),
                                            ("b16", "motion", 174, 163),
                                            ("l14", "motion", 174, 574)):
        depth = uniformerv2.SIZES[name].depth
        options = {"motion": MOTION | dict(global_layers=range(depth // 3, depth), frames=16),
                   "scenes": {}}[family]
        with torch.device("meta"):
            model = UniFormerV2(name, classes=classes, **options)
        assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions
    assert 2e6 < sum(p.numel() for p in UniFormerV2("tiny").parameters()) < 3e6


def test_the_command_prints_shapes(capsys):
    uniformerv2.main()
    assert "(1, 3, 16, 64, 64)" in capsys.readouterr().out


def test_the_attention_map_is_that_of_the_forward_pass():
    """Mixing the values by these weights gives what the query gets."""
    torch.manual_seed(0)
    model = uniformerv2.UniFormerV2("tiny", frames=4, global_layers=(3,)).double().eval()
    block = model.global_blocks[0]
    torch.nn.init.normal_(block.attn.proj.weight)
    tokens = model.encode(torch.randn(2, 3, 4, 64, 64, dtype=torch.float64))[1]
    query = torch.randn(2, 1, 192, dtype=torch.float64)
    block.attn.heads = 1  # a mean over one head is that head
    share, context = block.attention_map(query, tokens,
                                         model.grid), block.context(tokens, model.grid)
    values = F.linear(context, *(x.chunk(3)[2]
                                 for x in (block.attn.qkv.weight, block.attn.qkv.bias)))
    by_hand = block.attn.proj(share.flatten(1)[:, None] @ values)
    assert (by_hand - block.attend(block.norm1(query), context)).abs().max() < 1e-12
    assert (share.sum(dim=(1, 2)) - 1).abs().max() < 1e-12


def test_attention_maps_follow_the_global_token_from_block_to_block():
    model, video, given = awake(toy()).eval(), clip(), []
    for block in model.global_blocks:
        block.register_forward_hook(
            lambda block, inputs, _: given.append(block.attention_map(*inputs)[:, :, 1:]))
    with torch.no_grad():
        maps = predict.global_attention(model, video)
    assert list(maps) == [1, 2]
    assert all(torch.equal(m.flatten(2), g) for m, g in zip(maps.values(), given))
    assert maps[1].shape == (2, 4, 2, 2)


# The interface ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_running_the_blocks_piece_by_piece_is_the_forward_pass(form):
    model, video = awake(toy(classes=3, **FORMS[form])).eval(), clip()
    state = model.start(video)
    for i in range(model.depth):
        state = model.run(state, i, i + 1)
    assert torch.equal(model.head(model.finish(state)), model(video))
    assert torch.equal(model.tokens(video), state.tokens.flatten(1, 2))
    assert torch.equal(model.feature(video), model.norm(model.encode(video)[0]))
    assert (model.width, model.depth, model.heads) == (24, 3, 2)


def test_each_parameter_has_a_layer_for_layer_wise_learning_rates():
    model = toy(classes=3, **MOTION)
    found = {name: model.layer_index(name) for name, _ in model.named_parameters()}
    assert {found[name] for name in found
            if name.startswith(("embed", "norm_pre", "class_", "positions"))} == {0}
    assert found["blocks.0.local.1.norm.weight"] == 1 and found["blocks.2.mlp.fc1.weight"] == 3
    late = [name for name in found if name.startswith(("global_", "balance", "norm.", "head."))]
    assert len(late) > 30 and {found[name] for name in late} == {4}


def test_global_blocks_may_have_an_mlp_of_another_width():
    model = toy(global_mlp_width=40)
    assert model.global_blocks[0].mlp.fc1.out_features == 40
    assert model.blocks[0].mlp.fc1.out_features == 96
    assert UniFormerV2.from_config(model.config).global_blocks[1].mlp.fc2.in_features == 40
    older = {key: value for key, value in toy().config.items() if key != "global_mlp_width"}
    assert UniFormerV2.from_config(older).config == toy().config


def test_a_model_for_frames_of_another_size_has_its_places_interpolated_and_all_else_untouched():
    model = UniFormerV2("tiny", classes=3, image_size=32, global_layers=(2, 3)).eval()
    torch.nn.init.normal_(model.positions)
    same, large = encoders.resized(model, 32), encoders.resized(model, (64, 48))
    x = clip(4, 32)
    assert torch.equal(same(x), model(x))
    assert large.config["image_size"] == [64, 48]
    assert not large.training
    assert torch.equal(large.positions[0], model.positions[0])
    assert all(torch.equal(value, model.state_dict()[name]) for name,
               value in large.state_dict().items() if name != "positions")
    flat = encoders.resized(model, 32)
    flat.positions.data[1:] = 0.5  # a table that is the same everywhere stays so
    assert torch.allclose(encoders.resized(flat, 64).positions[1:], torch.tensor(0.5))
    with pytest.raises(UserError, match="do not divide"):
        encoders.resized(model, 30)
