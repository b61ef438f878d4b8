"""What is proved about mae.py:

tubes are constant in time and exactly as many as asked; patches go out and come back unchanged; the
encoder never sees a hidden pixel; the loss never sees a visible one; targets have mean 0 and
variance 1 per tubelet and channel; the short cuts give the numbers of the plain form; the official
VideoMAE, VideoMAE V2 and Hugging Face numbers come out, and a file that does not fit is refused
with the names of what is wrong; configurations of older runs load; a batch is learned.
"""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_summary, official_fill, values

from video import transforms
import mae
import weights
from engine import pictures
from tasks.reconstruction import put_tubelets, reconstruction_pictures
from attention import sinusoid_table
from mae import VideoClassifier, VideoMAE, reconstruction_loss, reconstruction_target, tube_mask
from weights import WeightsError, runs

TINY = mae.Size(24, 2, 2, 96, 16, 16, 2, 2, 64)  # the toy measures of the reference numbers


def toy(**options):
    return VideoMAE(mae.Size(32, 2, 2, 64, 8, 16, 2, 2, 32), frames=4, image_size=32, **options)


def clip(frames=4, size=32, batch=2, dtype=torch.float32):
    return torch.randn(batch, 3, frames, size, size, dtype=dtype)


# Masks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid, ratio, count", [((8, 14, 14), 0.9, 176), ((8, 14, 14), 0.75, 147),
                                                ((4, 3, 5), 0.9, 13), ((8, 4, 4), 0.5, 8)])
def test_a_tube_hides_the_same_places_in_every_frame(grid, ratio, count):
    """Else the answer could be copied from the frame before (VideoMAE, Sec. 3.3, Tube masking)."""
    t, h, w = grid
    hidden = tube_mask(50, grid, ratio, torch.Generator().manual_seed(0)).view(50, t, h * w)
    assert (hidden == hidden[:, :1]).all()
    assert (hidden.sum(dim=2) == count).all()
    share = hidden[:, 0].float().mean(dim=0)
    assert share.std() < 0.15 and len(hidden[:, 0].unique(dim=0)) > 10  # everywhere, and not alike


def test_random_and_frame_masks_hide_as_many_tokens_in_their_own_shape():
    grid = (8, 4, 4)
    random = mae.random_mask(6, grid, 0.5, torch.Generator().manual_seed(0)).view(6, 8, 16)
    frames = mae.frame_mask(6, grid, 0.5, torch.Generator().manual_seed(0)).view(6, 8, 16)
    assert (random.sum(dim=(1, 2)) == 64).all() and (random.sum(dim=2) != 8).any()
    assert (frames.sum(dim=(1, 2)) == 64).all() and (frames == frames[:, :, :1]).all()


def test_a_mask_is_a_function_of_its_generator():
    def draw(seed):
        return tube_mask(3, (2, 4, 4), 0.5, torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


def test_rows_that_hide_different_counts_are_refused():
    hidden = tube_mask(2, (2, 4, 4), 0.5)
    hidden[0, 0] = ~hidden[0, 0]
    with pytest.raises(ValueError, match="same number"):
        toy()(clip(), hidden)


# Tubelets and targets ---------------------------------------------------------------------------


def test_tubelets_go_out_and_come_back_unchanged():
    video = clip(4, 32)
    index = torch.stack([torch.randperm(32)[:20] for _ in range(2)])
    cut, empty = mae.take_tubelets(video, index, 8, 2), torch.zeros_like(video)
    assert torch.equal(put_tubelets(empty, index, cut, 8, 2) != 0,
                       put_tubelets(empty, index, torch.ones_like(cut), 8, 2) != 0)
    every = torch.arange(32).expand(2, -1)
    back = put_tubelets(empty, every, mae.take_tubelets(video, None, 8, 2), 8, 2)
    assert torch.equal(back, video)


def test_token_order_is_time_then_row_then_column():
    """n = tau*S + y*w + x, the order of every mask and every position table."""
    video = torch.zeros(1, 3, 4, 16, 24)
    video[:, :, 2:4, 8:16, 16:24] = 1  # tau = 1, y = 1, x = 2
    cut = mae.take_tubelets(video, None, 8, 2)[0].flatten(1).sum(dim=1)
    assert cut.nonzero().tolist() == [[1 * 6 + 1 * 3 + 2]]


def test_the_embedding_is_the_official_strided_convolution():
    model, video = toy(), clip()
    kernel = model.encoder.embed.weight.view(32, 3, 2, 8, 8)
    expected = F.conv3d(video, kernel, model.encoder.embed.bias, stride=(2, 8, 8))
    expected = expected.flatten(2).transpose(1, 2)
    got = model.encoder.embed(mae.take_tubelets(video, None, 8, 2).flatten(2))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_the_target_has_zero_mean_and_unit_variance_per_tubelet_and_channel():
    hidden = tube_mask(2, (2, 4, 4), 0.5)
    target = reconstruction_target(clip(), hidden).view(2, 16, 128, 3)      # colour is fastest
    torch.testing.assert_close(target.mean(dim=2), torch.zeros(2, 16, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(target.var(dim=2), torch.ones(2, 16, 3), atol=1e-4, rtol=0)


def test_predicting_zeros_costs_one():
    """The trivial baseline that every curve is compared with: (n - 1)/n, n pixels in a tubelet."""
    target = reconstruction_target(clip(), tube_mask(2, (2, 4, 4), 0.5))
    assert abs(reconstruction_loss(torch.zeros_like(target), target).item() - 127 / 128) < 1e-4


def test_the_target_follows_the_official_recipe_step_by_step():
    """Un-normalise, cut with the colour fastest, standardise: written with plain loops."""
    video, hidden = clip(batch=1), tube_mask(1, (2, 4, 4), 0.5)
    pixels = video[0] * torch.tensor(mae.IMAGENET_STD).view(3, 1, 1, 1) \
        + torch.tensor(mae.IMAGENET_MEAN).view(3, 1, 1, 1)
    for normalise in (True, False):
        rows = []
        for tau in range(2):
            for y in range(4):
                for x in range(4):
                    if hidden[0, tau * 16 + y * 4 + x]:
                        part = pixels[:, 2 * tau:2 * tau + 2, 8 * y:8 * y + 8, 8 * x:8 * x + 8]
                        flat = part.permute(1, 2, 3, 0).reshape(-1, 3)
                        if normalise:
                            deviation = flat.var(0, unbiased=True).sqrt() + 1e-6
                            flat = (flat - flat.mean(0)) / deviation
                        rows.append(flat.flatten())
        got = reconstruction_target(video, hidden, normalise)
        torch.testing.assert_close(got[0], torch.stack(rows), atol=1e-5, rtol=1e-5)


def test_bytes_go_straight_in_with_the_numbers_of_normalised_clips():
    """Only the selected tubelets become floats. What the model sees is the same to the last bit;
    targets are divided by 255 at once, not normalised and scaled back."""
    clip = torch.randint(256, (2, 4, 32, 32, 3), dtype=torch.uint8)
    video = transforms.normalise(clip, mae.IMAGENET_MEAN, mae.IMAGENET_STD)
    raw, model = clip.permute(0, 4, 1, 2, 3), toy()
    hidden = tube_mask(2, model.grid, 0.5)
    assert torch.equal(model(raw, hidden), model(video, hidden))
    assert torch.equal(model.encoder(raw), model.encoder(video))
    for normalise in (True, False):
        torch.testing.assert_close(reconstruction_target(raw, hidden, normalise),
                                   reconstruction_target(video, hidden, normalise),
                                   atol=1e-5, rtol=0)


def test_a_mask_that_does_not_fit_the_clip_is_refused():
    with pytest.raises(ValueError, match="does not fit"):
        reconstruction_target(clip(), torch.ones(2, 30, dtype=torch.bool), patch=8)


# The autoencoder --------------------------------------------------------------------------------


def test_the_encoder_never_sees_a_hidden_pixel():
    model, video, hidden = toy().eval(), clip(), tube_mask(2, (2, 4, 4), 0.5)
    _, index = mae.split_by_mask(hidden)
    noise = torch.randn_like(mae.take_tubelets(video, index, 8, 2))
    other = put_tubelets(video, index, noise, 8, 2)
    assert torch.equal(model(video, hidden), model(other, hidden))


def test_the_loss_never_sees_a_visible_pixel():
    hidden = tube_mask(2, (2, 4, 4), 0.5)
    video = clip().requires_grad_()
    reconstruction_target(video, hidden, normalise=False).sum().backward()
    touched = mae.take_tubelets(video.grad, None, 8, 2).flatten(2).abs().sum(dim=2) > 0
    assert torch.equal(touched, hidden)


def plain_forward(model, video, hidden, targets=None):
    """VideoMAE as one would write it first: embed everything, index with masks, decode in full."""
    B = len(video)
    targets = hidden if targets is None else targets
    tokens = model.encoder.embed(mae.take_tubelets(video, None, 8, 2).flatten(2))
    tokens = tokens + sinusoid_table(tokens.shape[1], tokens.shape[2]).to(tokens.dtype)
    x = tokens[~hidden].view(B, -1, tokens.shape[2])
    for block in model.encoder.blocks:
        x = block(x)
    x = model.encoder_to_decoder(model.encoder.norm(x))
    table = sinusoid_table(tokens.shape[1], x.shape[2]).to(x.dtype).expand(B, -1, -1)
    x = torch.cat([x + table[~hidden].view(B, -1, x.shape[2]),
                   model.mask_token + table[targets].view(B, -1, x.shape[2])], dim=1)
    for block in model.decoder.blocks:
        x = block(x)
    return model.decoder.head(model.decoder.norm(x))[:, -int(targets[0].sum()):]


def test_the_short_cuts_give_the_numbers_of_the_plain_form():
    """Embedding, decoding and predicting only what is needed: equal values, equal gradients."""
    model, video = toy().double(), clip(dtype=torch.float64)
    hidden = tube_mask(2, (2, 4, 4), 0.5)
    quick, plain = model(video, hidden), plain_forward(model, video, hidden)
    torch.testing.assert_close(quick, plain, atol=1e-12, rtol=1e-12)
    upstream = torch.randn_like(plain)
    for a, b in zip(torch.autograd.grad(quick, list(model.parameters()), upstream),
                    torch.autograd.grad(plain, list(model.parameters()), upstream)):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_a_batch_is_learned():
    """Behaviour: the loss on eight smooth clips falls far below the trivial baseline."""
    torch.manual_seed(0)
    wave = torch.linspace(0, 6.3, 32)
    phase = torch.rand(8, 3, 4, 1, 1) * 6.3
    video = torch.sin(wave[:, None] + phase) + torch.cos(wave[None] - phase)
    model, hidden = toy(), tube_mask(8, (2, 4, 4), 0.5, torch.Generator().manual_seed(0))
    target = reconstruction_target(video, hidden)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        loss = reconstruction_loss(model(video, hidden), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.5


def test_embedding_and_bridge_keep_torchs_initialisation_and_the_rest_is_xavier():
    """Spec of the official code: its initialiser never reaches two of the layers."""
    model = VideoMAE("tiny", image_size=64)
    qkv = model.encoder.blocks[0].attn.qkv.weight
    assert abs(qkv.abs().max().item() - (6 / (96 + 288)) ** 0.5) < 2e-3
    bridge = model.encoder_to_decoder.weight
    assert abs(bridge.abs().max().item() - 96**-0.5) < 2e-3
    assert model.mask_token.abs().max() <= 0.02


def test_codes_by_axis_shift_alike_everywhere():
    """The product of two places' codes depends on their distance in time, row and column alone."""
    t, h, w = 3, 4, 5
    codes = mae.position_codes("axes", (t, h, w), 8, 2, 48)[0].double()
    assert codes.shape == (t * h * w, 48) and len(codes.unique(dim=0)) == t * h * w
    product = (codes @ codes.T).view(t, h, w, t, h, w)
    later, earlier = product[(slice(1, None),) * 6], product[(slice(-1),) * 6]
    assert torch.allclose(later, earlier, atol=1e-5)


def test_cosine_codes_tell_all_places_apart_alike():
    """On one axis any two places are equally far apart, and every column differs somewhere."""
    for places in (2, 4, 5):
        codes = mae.cosine_table(places, 4 * (places - 1)).double()
        apart = torch.cdist(codes, codes)[~torch.eye(places, dtype=torch.bool)]
        assert torch.allclose(apart, apart[:1]) and (codes.std(dim=0) > 0.5).all()
    codes = mae.position_codes("cosines", (1, 4, 5), 8, 2, 48)[0]
    assert codes.shape == (20, 48) and len(codes.unique(dim=0)) == 20


def test_any_grid_will_do():
    """Positions are computed for the clip at hand, not for the one the model was made for."""
    model = toy()
    for frames, height, width in ((2, 16, 24), (6, 40, 8)):
        grid = model.encoder.grid_of(frames, height, width)
        hidden = tube_mask(1, grid, 0.5)
        prediction = model(torch.randn(1, 3, frames, height, width), hidden)
        assert prediction.shape == (1, int(hidden.sum()), 384)
    with pytest.raises(ValueError, match="33 x 32"):
        model(torch.randn(1, 3, 4, 33, 32), hidden)


def test_autocast_and_half_batches_keep_the_table_in_float32():
    with torch.autocast("cpu", torch.bfloat16):
        out = toy()(clip(), tube_mask(2, (2, 4, 4), 0.5))
    assert out.dtype == torch.bfloat16 and out.isfinite().all()


def test_the_pictures_show_the_input_where_it_was_visible_and_the_prediction_elsewhere():
    model, video, hidden = toy().eval(), clip(batch=1), tube_mask(1, (2, 4, 4), 0.5)
    drawn = reconstruction_pictures(model, video, hidden)
    visible, targets = mae.split_by_mask(hidden)
    pixels = mae.tubelet_pixels(video, visible, 8, 2).clamp(0, 1)
    for name, picture in drawn.items():
        torch.testing.assert_close(mae.take_tubelets(picture, visible, 8, 2), pixels)
    assert (mae.take_tubelets(drawn["visible"], targets, 8, 2) == 0.5).all()
    true = mae.tubelet_pixels(video, targets, 8, 2)
    mean, contrast = mae.tubelet_statistics(true)
    predicted = model(video, hidden).unflatten(-1, (-1, 3)).transpose(2, 3) * contrast + mean
    got = mae.take_tubelets(drawn["reconstruction"], targets, 8, 2)
    torch.testing.assert_close(got, predicted.clamp(0, 1))
    got = mae.take_tubelets(drawn["trivial"], targets, 8, 2)
    torch.testing.assert_close(got, mean.expand_as(got).clamp(0, 1))


def test_the_pictures_of_frames_and_of_normalised_clips_are_the_same():
    frames, model = torch.randint(256, (1, 4, 32, 32, 3), dtype=torch.uint8), toy(normalised=False)
    hidden = tube_mask(1, model.grid, 0.5)
    video = transforms.normalise(frames, mae.IMAGENET_MEAN, mae.IMAGENET_STD)
    one, other = (reconstruction_pictures(model, x, hidden)
                  for x in (video, frames.permute(0, 4, 1, 2, 3)))
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name])
    seen = one["input"][(one["visible"] == one["input"]).all(dim=1, keepdim=True).expand_as(
        one["input"])].view(3, -1)
    guess = mae.take_tubelets(one["trivial"], mae.split_by_mask(hidden)[1], 8, 2)
    expected = seen.mean(dim=1)[:, None].expand_as(guess)  # of what was visible, nothing borrowed
    torch.testing.assert_close(guess, expected)
    torch.testing.assert_close(one["input"], frames.permute(0, 4, 1, 2, 3) / 255)


@pytest.mark.parametrize("normalised", [True, False])
def test_drawing_writes_a_strip_and_a_moving_picture(tmp_path, normalised):
    model, hidden = toy(normalised=normalised).eval(), tube_mask(1, (2, 4, 4), 0.5)
    drawn = reconstruction_pictures(model, clip(batch=1), hidden)
    pictures.reconstruction(drawn, tmp_path / "a.png", "a clip", normalised)
    from PIL import Image
    assert Image.open(tmp_path / "a.png").size[0] > 300
    moving = Image.open(tmp_path / "a.gif")
    assert moving.n_frames == 4 and moving.size == (len(drawn) * 4 * 32, 4 * 32)


# The official numbers ---------------------------------------------------------------------------


def block_shapes(prefix, width, depth, mlp, cosine=None):
    shapes = {}
    for i in range(depth):
        b = f"{prefix}{i}."
        shapes |= {b + "norm1.weight": (width,), b + "norm1.bias": (width,),
                   b + "attn.q_bias": (width,), b + "attn.v_bias": (width,),
                   b + "attn.qkv.weight": (3 * width, width),
                   b + "attn.proj.weight": (width, width), b + "attn.proj.bias": (width,),
                   b + "norm2.weight": (width,), b + "norm2.bias": (width,),
                   b + "mlp.fc1.weight": (mlp, width), b + "mlp.fc1.bias": (mlp,),
                   b + "mlp.fc2.weight": (width, mlp), b + "mlp.fc2.bias": (width,)}
        if cosine:
            shapes[b + "attn.scale"] = (cosine, 1, 1)
    return shapes


def official(cosine=None):
    """A complete official pretraining state dict of toy size, as the official class saves it."""
    return official_fill(
        {"mask_token": (1, 1, 16), "encoder.patch_embed.proj.weight": (24, 3, 2, 16, 16),
         "encoder.patch_embed.proj.bias": (24,), "encoder.norm.weight": (24,),
         "encoder.norm.bias": (24,), "encoder_to_decoder.weight": (16, 24),
         "decoder.norm.weight": (16,), "decoder.norm.bias": (16,),
         "decoder.head.weight": (1536, 16), "decoder.head.bias": (1536,)}
        | block_shapes("encoder.blocks.", 24, 2, 96, cosine)
        | block_shapes("decoder.blocks.", 16, 2, 64, cosine))


def official_fine_tuned():
    return official_fill({"patch_embed.proj.weight": (24, 3, 2, 16, 16),
                          "patch_embed.proj.bias": (24,), "fc_norm.weight": (24,),
                          "fc_norm.bias": (24,), "head.weight": (5, 24),
                          "head.bias": (5,)} | block_shapes("blocks.", 24, 2, 96))


def hugging_face(tensors, new_spelling=False):
    """The same weights under the names that transformers gives them."""
    out = {}
    for key, value in tensors.items():
        key = key.replace("encoder.patch_embed.proj",
                          "videomae.embeddings.patch_embeddings.projection")
        key = key.replace("encoder.blocks", "videomae.encoder.layer")
        key = key.replace("encoder.norm", "videomae.layernorm")
        key = key.replace("decoder.blocks", "decoder.decoder_layers")
        key = key.replace("norm1", "layernorm_before").replace("norm2", "layernorm_after")
        key = key.replace("attn.proj", "attention.output.dense")
        key = key.replace("mlp.fc1", "intermediate.dense")
        key = key.replace("mlp.fc2", "output.dense")
        if "attn.qkv" in key:
            for part, rows in zip(("query", "key", "value"), value.chunk(3)):
                out[key.replace("attn.qkv", f"attention.attention.{part}")] = rows
            continue
        if new_spelling:
            key = key.replace("attn.q_bias", "attn.query.bias")
            key = key.replace("attn.v_bias", "attn.value.bias")
        out[key.replace("attn.", "attention.attention.")] = value
    return out


def reference_clip():
    return torch.from_numpy(values("input", 2 * 3 * 16 * 32 * 32).reshape(2, 3, 16, 32, 32)).float()


def reference_mask():
    return torch.tensor([[1, 0, 1, 1], [1, 1, 0, 1]], dtype=torch.bool).repeat(1, 8)


OPTIONS = dict(heads=2, decoder_heads=2, frames=16, image_size=32)


def test_official_pretraining_numbers():
    """Printed sums of the official class on these weights and this clip."""
    model = VideoMAE.from_official(official(), **OPTIONS)
    video, hidden = reference_clip(), reference_mask()
    out = model(video, hidden)
    assert_summary(out, -1635.343138, 63223.852998,
                   [-3.902112, 0.337986, 0.305057, 0.839681], 0.338370)
    visible, _ = mae.split_by_mask(hidden)
    assert_summary(model.encoder(video, visible), -3.047012, 312.690386,
                   [0.674724, 0.650136, 1.711398, 0.073737], -0.341673)
    # That reference made its pixels as 0.25*x + 0.5; ours come from ImageNet-normalised clips.
    pixels = 0.25 * video + 0.5
    mean, std = (torch.tensor(x).view(3, 1, 1, 1) for x in (mae.IMAGENET_MEAN, mae.IMAGENET_STD))
    target = reconstruction_target((pixels - mean) / std, hidden)
    assert_summary(target[0, 0, :4], sum([0.711407, 0.186587, 0.771748, 1.371828]),
                   first=[0.711407, 0.186587, 0.771748, 1.371828])
    assert abs(target.double().abs().sum().item() - 63712.109643) < 0.07
    assert abs(reconstruction_loss(out, target).item() - 2.163539) < 1e-5


def test_official_fine_tuned_numbers():
    model = VideoClassifier.from_official(official_fine_tuned(), heads=2, frames=16, image_size=32)
    assert_summary(model(reference_clip()), 0.819501, 8.662388,
                   [1.523208, -0.376952, 1.102663, -0.602413], -0.885315)


def test_official_cosine_attention_numbers():
    model = VideoMAE.from_official(official(cosine=2), **OPTIONS)
    assert_summary(model(reference_clip(), reference_mask()), -1612.141996,
                   first=[-3.921409, 0.350768, 0.329938, 0.889063])


def test_the_official_position_table_and_its_stretching():
    """InternVideo's ViT-H at 384 px and 32 frames stretches the table of 224 px and 16 frames."""
    assert_summary(sinusoid_table(32, 16), 201.655273)
    table = sinusoid_table(1568, 16)[None]
    assert_summary(table, 4006.631377)
    wide = mae.resize_positions(table, (8, 14, 14), (8, 24, 24))
    assert_summary(wide, 11774.066621, first=[-0.190744, 1.125366, 0.060153, 1.133806])
    assert_summary(mae.resize_positions(table, (8, 14, 14), (16, 24, 24)), 23548.133245)
    assert torch.equal(mae.position_codes("resized", (16, 24, 24), 16, 2, 16),
                       mae.resize_positions(table, (8, 14, 14), (16, 24, 24)))


@pytest.mark.parametrize("new_spelling", [False, True])
def test_hugging_face_files_give_the_official_numbers(new_spelling):
    """Both spellings of the biases; the epsilons of Hugging Face differ and are kept."""
    model = VideoMAE.from_official(hugging_face(official(), new_spelling), **OPTIONS)
    assert model.encoder.blocks[0].norm1.eps == model.encoder.norm.eps == 1e-12
    assert model.decoder.norm.eps == 1e-5
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-6
    assert_summary(model(reference_clip(), reference_mask()), -1635.343138, 63223.852998)


def test_a_hugging_face_file_that_lost_its_biases_is_refused():
    tensors = {key: value for key, value in hugging_face(official()).items()
               if not key.endswith(("q_bias", "v_bias"))}
    with pytest.raises(WeightsError, match="videomae.encoder.layer.0.attention.attention.q_bias"):
        VideoMAE.from_official(tensors, **OPTIONS)


@pytest.mark.parametrize("style", ["official", "hugging face", "fine-tuned"])
def test_each_missing_extra_or_misshapen_tensor_is_named_and_alone(style):
    """For every single tensor of the file, by the name that the file gives it."""
    load = (lambda x: VideoMAE.from_official(x, **OPTIONS)) if style != "fine-tuned" else \
        (lambda x: VideoClassifier.from_official(x, heads=2, frames=16, image_size=32))
    whole = {"official": official, "hugging face": lambda: hugging_face(official()),
             "fine-tuned": official_fine_tuned}[style]()
    load(whole)
    for key in whole:
        with pytest.raises(WeightsError) as caught:
            load({k: v for k, v in whole.items() if k != key})
        said = str(caught.value)
        assert key in said and sum(k in said for k in whole) == 1, said
        changed = whole | {key: torch.cat([whole[key], whole[key]])}
        with pytest.raises(WeightsError) as caught:
            load(changed)
        assert key in str(caught.value), (key, caught.value)
    with pytest.raises(WeightsError, match="unknown: encoder.blocks.0.surprise"):
        load(whole | {"encoder.blocks.0.surprise": torch.zeros(3)})


def test_the_wrong_class_for_a_file_is_pointed_out():
    with pytest.raises(WeightsError, match="VideoMAE.from_official"):
        VideoClassifier.from_official(official(), heads=2)
    with pytest.raises(WeightsError, match="VideoClassifier.from_official"):
        VideoMAE.from_official(official_fine_tuned(), heads=2)
    with pytest.raises(WeightsError):
        VideoMAE.from_official({"conv.weight": torch.zeros(3)})


def test_heads_that_no_shape_can_tell_are_asked_for():
    with pytest.raises(WeightsError, match="pass heads="):
        VideoMAE.from_official(official())


def test_published_sizes_have_the_published_numbers_of_parameters():
    """In millions, of the encoder: 22, 86, 304, 632 for S, B, L and H at patch 16."""
    for name, millions in (("small", 22), ("base", 86), ("large", 304), ("huge", 632)):
        with torch.device("meta"):
            encoder = mae.Encoder(mae.Options(name))
        assert round(sum(p.numel() for p in encoder.parameters()) / 1e6) == millions


@pytest.mark.parametrize("cls", [VideoMAE, VideoClassifier])
def test_a_run_of_ours_loads_again(tmp_path, cls):
    options = {} if cls is VideoMAE else {"classes": 3}
    model = cls(TINY, frames=4, image_size=32, **options).eval()
    weights.save(tmp_path, model, model.config)
    loaded = cls.from_official(tmp_path)
    assert loaded.config == model.config
    other = loaded.state_dict()
    assert all(torch.equal(value, other[key]) for key, value in model.state_dict().items())


def test_a_classifier_may_lack_its_head_and_gives_features_then():
    tensors = {k: v for k, v in official_fine_tuned().items() if not k.startswith("head.")}
    model = VideoClassifier.from_official(tensors, heads=2, frames=16, image_size=32)
    assert model(reference_clip()).shape == (2, 24)


def test_a_stored_position_table_is_added_but_never_learns():
    """The official code detaches its "learnable" table; so ours is no parameter."""
    model = VideoClassifier(TINY, classes=3, frames=4, image_size=32, positions="stored")
    assert "encoder.stored" in model.state_dict()
    assert "encoder.stored" not in dict(model.named_parameters())
    before = model(clip(4, 32))
    with torch.no_grad():
        model.encoder.stored += 1
        model.head.weight.fill_(1)
    assert not torch.equal(model(clip(4, 32)), before)


def test_numpy_is_not_needed_for_masks():
    """Masks come from torch generators: numpy's global state has no say."""
    np.random.seed(0)
    state = np.random.get_state()[1].copy()
    tube_mask(2, (2, 4, 4), 0.5)
    assert (np.random.get_state()[1] == state).all()


def state_for(model, video):
    """Blocks run one by one, through the interface of encoders."""
    state = model.start(video)
    for block in range(model.depth):
        state = model.run(state, block, block + 1)
    return state


def test_an_encoder_run_block_by_block_gives_the_numbers_of_one_call():
    model, video = VideoClassifier(TINY, classes=3, frames=4, image_size=32).eval(), clip()
    assert (model.width, model.depth, model.heads, model.family) == (24, 2, 2, "masked")
    assert model.grid_of(4, 32, 32) == (2, 2, 2)
    state = state_for(model, video)
    assert torch.equal(state.tokens, model.tokens(video)) and state.tokens.shape == (2, 8, 24)
    assert torch.equal(model.finish(state), model.feature(video))
    assert torch.equal(model.head(model.feature(video)), model(video))


def test_every_parameter_has_its_layer_and_what_trains_beside_a_frozen_encoder_is_behind_it():
    model = VideoClassifier(TINY, classes=3, frames=4, image_size=32)
    layers = {name: model.layer_index(name) for name, _ in model.named_parameters()}
    assert [layers[name] for name in ("encoder.embed.weight", "encoder.blocks.0.norm1.weight",
                                      "encoder.blocks.1.mlp.fc2.bias", "fc_norm.weight",
                                      "head.bias")] == [0, 1, 2, 3, 3]
    learned = {parameter for part in model.trainable_modules() for parameter in part.parameters()}
    assert learned == {p for name, p in model.named_parameters() if layers[name] == model.depth + 1}


@pytest.mark.parametrize("cls", [VideoMAE, VideoClassifier])
def test_configurations_of_older_runs_load_where_they_mean_the_same_network(cls):
    options = {} if cls is VideoMAE else {"classes": 3}
    config = cls(TINY, frames=4, image_size=32, **options).config
    assert json.loads(json.dumps(config)) == config
    same = {"space_time": "joint"} | ({} if cls is VideoMAE else {"pool": "mean"})
    assert runs.build(cls.from_config, config | same, "a run").config == config
    for key in same:
        with pytest.raises(WeightsError, match="removed, and only '(joint|mean)' can still be"):
            runs.build(cls.from_config, config | {key: "another"}, "a run")


def test_a_model_that_was_exported_first_still_runs():
    """Export traces with tensors that hold no numbers; none of them may stay in the model."""
    model, video = VideoClassifier(TINY, classes=3, frames=4, image_size=32).eval(), clip()
    exported = torch.export.export(model, (video,)).module()
    torch.testing.assert_close(exported(video), model(video))
    assert torch.equal(VideoClassifier(TINY, classes=3, frames=4, image_size=32).encoder.stored,
                       model.encoder.stored)


@pytest.mark.parametrize("frames", [4, 8])
def test_a_stored_table_goes_along_to_another_head_and_is_stretched_for_longer_clips(frames):
    model = VideoClassifier(TINY, classes=3, frames=4, image_size=32, positions="stored",
                            head_scale=1.0).eval()
    torch.nn.init.normal_(model.encoder.stored)
    other = model.with_head(3, frames=frames).eval()
    if frames == 4:
        x = clip()
        assert torch.equal(other(x), model(x))
    expected = mae.resize_positions(model.encoder.stored, model.encoder.grid, other.encoder.grid)
    assert torch.equal(other.encoder.stored, expected)


def test_an_encoder_alone_and_one_inside_a_larger_model_load():
    model = VideoClassifier(TINY, classes=0, frames=4, image_size=32).eval()
    torch.nn.init.normal_(model.fc_norm.weight)
    official, x = model.to_official(), clip()
    for tensors in (official, {"backbone." + key: value for key, value in official.items()}):
        found = VideoClassifier.from_official(tensors, heads=TINY.heads, frames=4, image_size=32)
        assert torch.equal(found(x), model(x))
