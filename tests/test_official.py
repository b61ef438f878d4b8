"""What is proved about official files and old runs, beside the reference vectors of test_golden.py:

sizes come from the shapes, also where no published model has such sizes; the outputs are then those
of the official class, written out here in a few lines; a file comes back as it was; mmaction2's
files and image ViTs give the numbers of their own code; a folder of Hugging Face tells sizes and
pixels, and is refused where it contradicts its tensors; options that no longer exist are dropped
where they meant nothing, and refused in one line where they did.
"""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import attention
import weights
from caption_decoder import CaptionDecoder
from clip_video import TextSize, VideoCLIP
from conftest import official_fill
from mae import Size as MaskedSize
from mae import VideoClassifier, VideoMAE
from uniformerv2 import Size, UniFormerV2
from weights import WeightsError, videomae
from weights.official import OfficialFile, key_map, spell, under


# The official classes, written out ----------------------------------------------------------------


def norm(state, name, x, eps=1e-5):
    return F.layer_norm(x, x.shape[-1:], state[name + ".weight"], state[name + ".bias"], eps)


def linear(state, name, x):
    return F.linear(x, state[name + ".weight"], state[name + ".bias"])


def heads_of(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(q, k, v, heads):
    out = F.scaled_dot_product_attention(*(heads_of(x, heads) for x in (q, k, v)))
    return out.transpose(1, 2).flatten(2)


def clip_block(state, a, x, heads, context=None):
    """CLIP's block on x (B, N, D), and that of a global query, which reads a context."""
    q = norm(state, a + "ln_1", x)
    y = q if context is None else norm(state, a + "ln_3", context)
    weight, bias = (state[f"{a}attn.in_proj_{part}"].chunk(3) for part in ("weight", "bias"))
    q, k, v = (F.linear(z, w, b) for z, w, b in zip((q, y, y), weight, bias))
    x = x + linear(state, a + "attn.out_proj", attend(q, k, v, heads))
    hidden = linear(state, a + "mlp.c_fc", norm(state, a + "ln_2", x))
    return x + linear(state, a + "mlp.c_proj", hidden * torch.sigmoid(1.702 * hidden))


def uniformerv2_logits(state, video, heads, layers):
    """video (B, 3, T, H, W) -> (B, Y), for one frame per embedding and no local units."""
    B, _, T = video.shape[:3]
    x = F.conv3d(video, state["conv1.weight"], stride=state["conv1.weight"].shape[2:])
    h, w = x.shape[3:]
    x = x.permute(0, 2, 3, 4, 1).flatten(0, 1).flatten(1, 2)                 # (B*T, S, D)
    x = torch.cat([state["class_embedding"].expand(len(x), 1, -1), x], dim=1)
    x = norm(state, "ln_pre", x + state["positional_embedding"])
    token = state["transformer.temporal_cls_token"].expand(B, -1, -1)
    for i in range(max(layers) + 1):
        x = clip_block(state, f"transformer.resblocks.{i}.", x, heads)
        if i in layers:
            j = layers.index(i)
            tokens = x.unflatten(0, (B, T))
            grid = tokens[:, :, 1:].unflatten(2, (h, w)).permute(0, 4, 1, 2, 3)
            grid = grid + F.conv3d(grid, *(state[f"transformer.dpe.{j}.{part}"] for part in
                                           ("weight", "bias")), padding=1, groups=grid.shape[1])
            patches = grid.permute(0, 2, 3, 4, 1).flatten(2, 3)
            context = torch.cat([tokens[:, :, :1], patches], dim=2).flatten(1, 2)
            token = clip_block(state, f"transformer.dec.{j}.", token, heads, context)
    share = state["transformer.balance"].sigmoid()
    mean = x.unflatten(0, (B, T))[:, :, 0].mean(dim=1)
    feature = (1 - share) * token[:, 0] + share * mean
    return linear(state, "transformer.proj.2", norm(state, "transformer.proj.0", feature))


def viclip_video(state, video, heads, depth):
    """video (B, 3, T, H, W) -> (B, E); names without "vision_encoder."."""
    x = F.conv3d(video, state["conv1.weight"], stride=state["conv1.weight"].shape[2:])
    x = x.flatten(3).permute(0, 3, 2, 1) + state["positional_embedding"][1:, None]  # (B, S, t, D)
    times = state["temporal_positional_embedding"]
    x = x + (times.mean(dim=1) if x.shape[2] == 1 else times)                # places, then times
    first = state["class_embedding"] + state["positional_embedding"][0]
    x = norm(state, "ln_pre", torch.cat([first.expand(len(x), 1, -1), x.flatten(1, 2)], dim=1))
    for i in range(depth):
        x = clip_block(state, f"transformer.resblocks.{i}.", x, heads)
    return norm(state, "ln_post", x)[:, 0] @ state["proj"]


def videomae_logits(state, video, heads, depth):
    """video (B, C, T, H, W) -> (B, Y) of a fine-tuned file with biases of queries and values."""
    kernel = state["patch_embed.proj.weight"]
    x = F.conv3d(video, kernel, state["patch_embed.proj.bias"], stride=kernel.shape[2:])
    x = x.flatten(2).transpose(1, 2)
    x = x + attention.sinusoid_table(*x.shape[1:])
    for i in range(depth):
        a = f"blocks.{i}."
        q_bias, v_bias = state[a + "attn.q_bias"], state[a + "attn.v_bias"]
        qkv = F.linear(norm(state, a + "norm1", x, 1e-6), state[a + "attn.qkv.weight"],
                       torch.cat([q_bias, torch.zeros_like(q_bias), v_bias]))
        x = x + linear(state, a + "attn.proj", attend(*qkv.chunk(3, dim=-1), heads))
        hidden = F.gelu(linear(state, a + "mlp.fc1", norm(state, a + "norm2", x, 1e-6)))
        x = x + linear(state, a + "mlp.fc2", hidden)
    return linear(state, "head", norm(state, "fc_norm", x.mean(dim=1), 1e-6))


# Sizes that no published model has ----------------------------------------------------------------


def linear_shapes(name, rows, columns):
    return {name + ".weight": (rows, columns), name + ".bias": (rows,)}


def norm_shapes(*names, width):
    return {f"{name}.{part}": (width,) for name in names for part in ("weight", "bias")}


def clip_block_shapes(a, width, hidden):
    return {a + "attn.in_proj_weight": (3 * width, width), a + "attn.in_proj_bias": (3 * width,),
            **linear_shapes(a + "attn.out_proj", width, width),
            **linear_shapes(a + "mlp.c_fc", hidden, width),
            **linear_shapes(a + "mlp.c_proj", width, hidden),
            **norm_shapes(a + "ln_1", a + "ln_2", width=width)}


def encoder_shapes(width, depth, hidden, patch, places, frames=1):
    return {"class_embedding": (width,), "positional_embedding": (1 + places, width),
            "conv1.weight": (width, 3, frames, patch, patch), **norm_shapes("ln_pre", width=width),
            **{key: shape for i in range(depth) for key, shape in
               clip_block_shapes(f"transformer.resblocks.{i}.", width, hidden).items()}}


def uniformerv2_shapes(width, depth, hidden, global_hidden, blocks, classes):
    shapes = encoder_shapes(width, depth, hidden, 4, 9)
    for j in range(blocks):
        a = f"transformer.dec.{j}."
        shapes |= clip_block_shapes(a, width, global_hidden) | norm_shapes(a + "ln_3", width=width)
        shapes |= {f"transformer.dpe.{j}.weight": (width, 1, 3, 3, 3),
                   f"transformer.dpe.{j}.bias": (width,)}
    return shapes | {"transformer.temporal_cls_token": (1, 1, width),
                     "transformer.balance": (width,),
                     **norm_shapes("transformer.proj.0", width=width),
                     **linear_shapes("transformer.proj.2", classes, width)}


def viclip_state(tubelet, steps):
    """Width 24, two layers, patches of 4 in frames of 12 pixels; the text encoder 16 wide."""
    vision = encoder_shapes(24, 2, 40, 4, 9, tubelet) | norm_shapes("ln_post", width=24) | {
        "proj": (24, 10), "temporal_positional_embedding": (1, steps, 24)}
    text = {"token_embedding.weight": (30, 16), "positional_embedding": (7, 16),
            "text_projection": (16, 10), **norm_shapes("ln_final", width=16),
            **clip_block_shapes("transformer.resblocks.0.", 16, 64)}
    state = official_fill({"vision_encoder." + key: shape for key, shape in vision.items()}
                          | {"text_encoder." + key: shape for key, shape in text.items()})
    return state | {"temp": torch.tensor(0.05)}


def videomae_block_shapes(a, width, hidden):
    return {a + "attn.qkv.weight": (3 * width, width), a + "attn.q_bias": (width,),
            a + "attn.v_bias": (width,), **linear_shapes(a + "attn.proj", width, width),
            **linear_shapes(a + "mlp.fc1", hidden, width),
            **linear_shapes(a + "mlp.fc2", width, hidden),
            **norm_shapes(a + "norm1", a + "norm2", width=width)}


def videomae_shapes(prefix, width, depth, hidden, kernel):
    return {**{key: shape for i in range(depth) for key, shape in
               videomae_block_shapes(f"{prefix}blocks.{i}.", width, hidden).items()},
            f"{prefix}patch_embed.proj.weight": (width, *kernel),
            f"{prefix}patch_embed.proj.bias": (width,)}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in b)


@pytest.mark.parametrize("hidden, global_hidden", [(96, 60), (50, 96), (50, 50)])
@torch.no_grad()
def test_global_blocks_may_have_an_mlp_of_another_width_than_the_frames(hidden, global_hidden):
    """`mlp_factor` of the official class; and no width needs to be four times the model's."""
    state = official_fill(uniformerv2_shapes(24, 3, hidden, global_hidden, 2, 5))
    model = UniFormerV2.from_official(state, heads=3)
    same_width = hidden == global_hidden
    assert model.config["global_mlp_width"] == (None if same_width else global_hidden)
    assert model.config["size"]["mlp_width"] == hidden
    video = torch.randn(2, 3, 4, 12, 12)
    torch.testing.assert_close(model(video), uniformerv2_logits(state, video, 3, [1, 2]))
    back = model.to_official()
    assert same({key.removeprefix("backbone."): value for key, value in back.items()}, state)
    assert UniFormerV2.from_config(model.config).config == model.config


def test_an_mlp_of_one_global_block_that_differs_from_the_others_is_named():
    state = official_fill(uniformerv2_shapes(24, 4, 96, 60, 3, 5))
    key = "transformer.dec.1.mlp.c_fc.weight"
    with pytest.raises(WeightsError, match=rf"{key} is \(61, 24\) instead of \(60, 24\)"):
        UniFormerV2.from_official(state | {key: torch.zeros(61, 24)}, heads=3)


@pytest.mark.parametrize("tubelet, steps", [(1, 4), (2, 3), (2, 1), (3, 2)])
@torch.no_grad()
def test_viclips_first_convolution_may_span_several_frames(tubelet, steps):
    """`kernel_size` of the official class; its stride is its size, and each step has one code."""
    state = viclip_state(tubelet, steps)
    model = VideoCLIP.from_official(state, heads=3, text_heads=2)
    assert model.config["tubelet"] == tubelet and model.config["frames"] == tubelet * steps
    assert model.config["size"]["mlp_width"] == 40
    vision = {key.removeprefix("vision_encoder."): value for key, value in state.items()}
    video = torch.randn(2, 3, tubelet * steps, 12, 12)
    torch.testing.assert_close(model.encode_video(video), viclip_video(vision, video, 3, 2))
    one = video[:, :, :tubelet]  # a single step has the mean of all codes
    torch.testing.assert_close(model.encode_video(one), viclip_video(vision, one, 3, 2))
    assert same(model.to_official(), state)
    assert VideoCLIP.from_config(model.config).config == model.config


@torch.no_grad()
def test_tubelets_are_counted_where_another_number_of_frames_is_asked_for():
    state = viclip_state(2, 3)
    few = VideoCLIP.from_official(state, heads=3, text_heads=2, frames=4)
    many = VideoCLIP.from_official(state, heads=3, text_heads=2, frames=10)
    table = state["vision_encoder.temporal_positional_embedding"][0]
    assert torch.equal(few.visual.times, table[:2]) and many.visual.times.shape == (5, 24)
    assert many.encode_video(torch.randn(1, 3, 10, 12, 12)).shape == (1, 10)


@torch.no_grad()
def test_a_videomae_of_any_width_depth_patch_tubelet_and_channels_loads():
    shapes = videomae_shapes("", 20, 3, 34, (4, 3, 5, 5)) | norm_shapes("fc_norm", width=20)
    state = official_fill(shapes | linear_shapes("head", 7, 20))
    model = VideoClassifier.from_official(state, heads=2, frames=6, image_size=(10, 15))
    size = model.config["size"]
    assert (size["width"], size["depth"], size["mlp_width"], size["patch"]) == (20, 3, 34, 5)
    assert (model.config["tubelet"], model.config["channels"], model.config["classes"]) == (3, 4, 7)
    video = torch.randn(2, 4, 6, 10, 15)
    torch.testing.assert_close(model(video), videomae_logits(state, video, 2, 3))
    assert same(model.to_official(), state)


@pytest.mark.parametrize("depth, decoder", [(1, (12, 1, 18)), (2, (40, 5, 30))])
def test_a_decoder_may_be_narrower_or_wider_shallower_or_deeper_than_its_encoder(depth, decoder):
    width, decoder_depth, hidden = decoder
    shapes = videomae_shapes("encoder.", 20, depth, 34, (3, 2, 4, 4))
    shapes |= {"mask_token": (1, 1, width), "encoder_to_decoder.weight": (width, 20),
               **norm_shapes("encoder.norm", width=20), **norm_shapes("decoder.norm", width=width),
               **linear_shapes("decoder.head", 96, width)}
    for i in range(decoder_depth):
        shapes |= videomae_block_shapes(f"decoder.blocks.{i}.", width, hidden)
    state = official_fill(shapes)
    model = VideoMAE.from_official(state, heads=5, decoder_heads=2, frames=4, image_size=8)
    size = model.config["size"]
    assert [size["decoder_" + key] for key in ("width", "depth", "mlp_width", "heads")] == [
        width, decoder_depth, hidden, 2]
    hidden = torch.arange(8)[None] % 4 > 0
    assert model(torch.randn(1, 3, 4, 8, 8), hidden).shape == (1, 6, 96)
    assert same(model.to_official(), state)


@torch.no_grad()
def test_a_caption_decoder_of_any_size_loads_and_its_heads_come_from_the_shapes():
    model = CaptionDecoder(36, heads=3, depth=1, visual_width=20, vocabulary=31, queries=5,
                           mlp_width=50)
    state = {key: torch.randn_like(value) if "inv_freq" not in key else value
             for key, value in model.to_official().items()}
    again = CaptionDecoder.from_official(state)
    assert again.config == model.config and same(again.to_official(), state)


def test_heads_that_do_not_divide_the_width_are_one_line():
    state = official_fill(uniformerv2_shapes(24, 2, 96, 96, 1, 5))
    with pytest.raises((WeightsError, AssertionError, ValueError, RuntimeError)) as caught:
        UniFormerV2.from_official(state, heads=5)
    assert isinstance(caught.value, WeightsError) and "\n" not in str(caught.value)


# Other people's names -----------------------------------------------------------------------------


def renamed(state, *table):
    """{name: tensor} with each (old, new) replaced in the names."""
    for old, new in table:
        state = {key.replace(old, new): value for key, value in state.items()}
    return state


def fine_tuned(width=24, depth=2, classes=5):
    return official_fill(videomae_shapes("", width, depth, 34, (3, 2, 4, 4))
                         | norm_shapes("fc_norm", width=width)
                         | linear_shapes("head", classes, width))


def mmaction(state):
    """A fine-tuned VideoMAE as mmaction2's VisionTransformer and its head have it."""
    head = {key.replace("head.", "cls_head.fc_cls."): value for key, value in state.items()
            if key.startswith("head.")}
    backbone = renamed({"backbone." + key: value for key, value in state.items()
                        if not key.startswith("head.")},
                       ("patch_embed.proj.", "patch_embed.projection."),
                       ("mlp.fc1.", "mlp.layers.0.0."), ("mlp.fc2.", "mlp.layers.1."))
    return backbone | head


@torch.no_grad()
def test_mmaction2s_videomae_gives_its_numbers(tmp_path):
    state = fine_tuned()
    table = attention.sinusoid_table(2 * 3 * 3, 24)[None]
    theirs = {"backbone.pos_embed": table, **mmaction(state)}
    torch.save({"state_dict": theirs, "meta": {}}, tmp_path / "mm.pth")
    assert weights.describe(theirs) == ("VideoMAE, classifier, of mmaction2", ("VideoClassifier",))
    video = torch.randn(2, 3, 4, 12, 12)
    for source in (tmp_path / "mm.pth", mmaction(state)):
        model = VideoClassifier.from_official(source, heads=3, frames=4, image_size=12)
        torch.testing.assert_close(model(video), videomae_logits(state, video, 3, 2))
        assert same(model.to_official(), state) and model.config["positions"] == "sinusoid"
    learned = theirs | {"backbone.pos_embed": table + 1}  # use_learnable_pos_emb
    model = VideoClassifier.from_official(learned, heads=3, frames=4, image_size=12)
    assert model.config["positions"] == "stored" and torch.equal(model.encoder.stored, table + 1)
    with pytest.raises(WeightsError, match="pos_embed has 18 positions, and 16 frames of 224 x"):
        VideoClassifier.from_official(theirs, heads=3)
    with pytest.raises(WeightsError, match="missing: backbone.blocks.1.mlp.layers.0.0.bias"):
        VideoClassifier.from_official({key: x for key, x in theirs.items() if "1.mlp.layers.0.0.b"
                                       not in key}, heads=3, frames=4, image_size=12)


@torch.no_grad()
def test_mmaction2s_uniformerv2_gives_its_numbers():
    state = official_fill(uniformerv2_shapes(24, 3, 96, 96, 2, 5))
    theirs = {"backbone." + key: value for key, value in state.items()}
    theirs = renamed(theirs, ("transformer.proj.0.", "transformer.norm."),
                     ("backbone.transformer.proj.2.", "cls_head.fc_cls."))
    assert weights.describe(theirs) == ("UniFormerV2, of mmaction2", ("UniFormerV2",))
    model = UniFormerV2.from_official(theirs, heads=3)
    video = torch.randn(2, 3, 4, 12, 12)
    torch.testing.assert_close(model(video), uniformerv2_logits(state, video, 3, [1, 2]))
    # mean 114.75 and deviation 57.375 of 255, as its configurations say
    assert (set(model.mean), set(model.std)) == ({114.75 / 255}, {57.375 / 255})
    with pytest.raises(WeightsError, match="missing: cls_head.fc_cls.bias"):
        UniFormerV2.from_official({key: x for key, x in theirs.items()
                                   if key != "cls_head.fc_cls.bias"}, heads=3)


def image_vit(width=24, depth=2, places=9):
    """{timm's name: tensor} of an image ViT with patches of 4 and 7 classes."""
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 1 + places, width),
              "patch_embed.proj.weight": (width, 3, 4, 4), "patch_embed.proj.bias": (width,),
              **norm_shapes("norm", width=width), **linear_shapes("head", 7, width)}
    for i in range(depth):
        a = f"blocks.{i}."
        shapes |= {**linear_shapes(a + "attn.qkv", 3 * width, width),
                   **linear_shapes(a + "attn.proj", width, width),
                   **linear_shapes(a + "mlp.fc1", 30, width),
                   **linear_shapes(a + "mlp.fc2", width, 30),
                   **norm_shapes(a + "norm1", a + "norm2", width=width)}
    return official_fill(shapes)


def image_vit_feature(state, image, heads, depth, eps=1e-6):
    """image (B, 3, H, W) -> (B, D): the norm of the mean of all tokens but the class token's."""
    kernel = state["patch_embed.proj.weight"]
    x = F.conv2d(image, kernel, state["patch_embed.proj.bias"], stride=kernel.shape[2:])
    x = x.flatten(2).transpose(1, 2) + state["pos_embed"][:, 1:]
    for i in range(depth):
        a = f"blocks.{i}."
        qkv = linear(state, a + "attn.qkv", norm(state, a + "norm1", x, eps))
        x = x + linear(state, a + "attn.proj", attend(*qkv.chunk(3, dim=-1), heads))
        hidden = F.gelu(linear(state, a + "mlp.fc1", norm(state, a + "norm2", x, eps)))
        x = x + linear(state, a + "mlp.fc2", hidden)
    return norm(state, "norm", x.mean(dim=1), eps)


def of_hugging_face(state):
    """An image ViT under the names of transformers' ViTForImageClassification."""
    for key in [key for key in state if ".qkv." in key]:
        for part, value in zip(("query", "key", "value"), state[key].chunk(3)):
            state = state | {key.replace("attn.qkv", f"attention.attention.{part}"): value}
        del state[key]
    state = renamed(state, ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
                    ("blocks.", "encoder.layer."), ("norm1.", "layernorm_before."),
                    ("norm2.", "layernorm_after."), ("attn.proj.", "attention.output.dense."),
                    ("mlp.fc1.", "intermediate.dense."), ("mlp.fc2.", "output.dense."),
                    ("cls_token", "embeddings.cls_token"),
                    ("pos_embed", "embeddings.position_embeddings"))
    state = {("layernorm" + key[4:] if key.startswith("norm.") else key): value
             for key, value in state.items()}
    return {("classifier" + key[4:] if key.startswith("head.") else "vit." + key): value
            for key, value in state.items()}


@pytest.mark.parametrize("kind", ["timm", "timm, net.", "timm, backbone.", "Hugging Face",
                                  "Hugging Face, without a head"])
@torch.no_grad()
def test_an_image_vit_starts_a_video_encoder_with_its_own_numbers(tmp_path, capsys, kind):
    state, eps = image_vit(), 1e-12 if "Face" in kind else 1e-6
    theirs = {"timm": lambda: state,
              "timm, net.": lambda: {"net." + key: x for key, x in state.items()},
              "timm, backbone.": lambda: {"backbone." + key: x for key, x in state.items()},
              "Hugging Face": lambda: of_hugging_face(state),
              "Hugging Face, without a head": lambda: {
                  key.removeprefix("vit."): x for key, x in of_hugging_face(state).items()
                  if not key.startswith("classifier")} | {"pooler.dense.bias": torch.ones(24)}}
    theirs = theirs[kind]()
    torch.save(theirs, tmp_path / "vit.pth")
    model = VideoClassifier.from_official(tmp_path / "vit.pth", heads=3, frames=2)
    image = torch.randn(2, 3, 12, 12)
    video = torch.stack([torch.randn_like(image), image], dim=2)  # the middle frame of a tubelet
    torch.testing.assert_close(model(video), image_vit_feature(state, image, 3, 2, eps))
    said = capsys.readouterr().out
    for words in ("inflated over the 2 frames", "repeated over time", "cls_token",
                  "Do not expect accuracy on videos", "nothing says how its pixels are"):
        assert words in said
    assert ("classifier.bias" in said or "head.bias" in said) == ("without a head" not in kind)
    # A longer clip of another size: the same positions at every time, stretched.
    model = VideoClassifier.from_official(tmp_path / "vit.pth", heads=3, frames=6, image_size=16)
    table = model.encoder.stored[0].unflatten(0, (3, 16))
    assert torch.equal(table[0], table[2]) and model.config["positions"] == "stored"
    assert same(VideoClassifier.from_official(model.to_official(), heads=3, frames=6,
                                              image_size=16).state_dict(), model.state_dict())


@pytest.mark.parametrize("change, message", [
    (lambda state: state.pop("pos_embed"), "missing: pos_embed"),
    (lambda state: state.update(pos_embed=torch.zeros(1, 9, 24)), "has 8 positions besides"),
    (lambda state: state.update({"patch_embed.proj.weight": torch.zeros(24, 3, 2, 4, 4)}),
     "patch_embed.proj.weight has 5 dimensions, not 4"),
    (lambda state: state.pop("norm.bias"), "missing: norm.bias"),
    (lambda state: state.update(reg_token=torch.zeros(1, 4, 24)), "unknown: reg_token")])
def test_an_image_vit_that_lacks_something_or_has_too_much_is_refused_by_name(change, message):
    state = image_vit()
    change(state)
    with pytest.raises(WeightsError, match=message) as caught:
        VideoClassifier.from_official(state, heads=3)
    assert "\n" not in str(caught.value)


def hub_folder(folder, config=None, preprocessor=None):
    """VideoMAE's classifier as transformers writes it -> the state under the authors' names."""
    state = fine_tuned()
    theirs = dict(state)
    for key in [key for key in state if ".qkv." in key]:
        for part, value in zip(("query", "key", "value"), theirs.pop(key).chunk(3)):
            theirs[key.replace("attn.qkv", f"attention.attention.{part}")] = value
    theirs = renamed(theirs, ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
                     ("blocks.", "encoder.layer."), ("norm1.", "layernorm_before."),
                     ("norm2.", "layernorm_after."), ("attn.proj.", "attention.output.dense."),
                     ("attn.", "attention.attention."), ("mlp.fc1.", "intermediate.dense."),
                     ("mlp.fc2.", "output.dense."), ("head.", "classifier."))
    theirs = {key if key.startswith(("fc_norm", "classifier")) else "videomae." + key: value
              for key, value in theirs.items()}
    folder.mkdir()
    save_file({key: value.contiguous() for key, value in theirs.items()},
              folder / "model.safetensors")
    config = {"num_attention_heads": 3, "num_frames": 4, "image_size": 12} | (config or {})
    (folder / "config.json").write_text(json.dumps(config))
    if preprocessor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return state


@pytest.mark.parametrize("size, crop", [(12, {"height": 12, "width": 12}), ([12, 12], None)])
@torch.no_grad()
def test_a_folder_of_hugging_face_tells_the_clips_and_the_pixels_of_its_model(
        tmp_path, capsys, size, crop):
    preprocessor = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.6, 0.7],
                    "size": {"shortest_edge": 12} if crop else {"height": 12, "width": 12}}
    preprocessor |= {"crop_size": crop, "do_center_crop": True} if crop else {}
    state = hub_folder(tmp_path / "hub", {"image_size": size, "layer_norm_eps": 1e-6}, preprocessor)
    for source in (tmp_path / "hub", tmp_path / "hub" / "model.safetensors"):
        model = VideoClassifier.from_official(source)
        assert (model.config["frames"], model.config["image_size"]) == (4, [12, 12])
    assert "its embedding is rewritten for those of ImageNet" in capsys.readouterr().out
    video = torch.randint(0, 256, (2, 3, 4, 12, 12), dtype=torch.uint8)
    mean, std = (torch.tensor(preprocessor[key]).view(3, 1, 1, 1)
                 for key in ("image_mean", "image_std"))
    expected = videomae_logits(state, (video / 255 - mean) / std, 3, 2)
    torch.testing.assert_close(model(video), expected, rtol=1e-4, atol=1e-4)  # another last epsilon
    assert VideoClassifier.from_official(tmp_path / "hub", frames=6, image_size=16).config[
        "image_size"] == [16, 16]  # asked for


@pytest.mark.parametrize("preprocessor", [
    None, {}, {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
               "size": {"shortest_edge": 12}, "rescale_factor": 1 / 255}])
def test_what_a_folder_does_not_say_otherwise_leaves_the_weights_as_they_are(
        tmp_path, preprocessor):
    state = hub_folder(tmp_path / "hub", preprocessor=preprocessor)
    assert same(VideoClassifier.from_official(tmp_path / "hub").to_official(), state)


@pytest.mark.parametrize("mean, words", [([0.48145466, 0.4578275, 0.40821073], ""),
                                         ([0.5, 0.5, 0.5], "only CLIP's own can be read here")])
def test_pixels_that_clip_does_not_know_are_refused(tmp_path, mean, words):
    """CLIP's first layer has no bias, into which another mean could go."""
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(
        {"image_mean": mean, "image_std": [0.26862954, 0.26130258, 0.27577711]}))
    save_file({"vision_model.a": torch.zeros(1), "text_model.a": torch.zeros(1)},
              tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=words or "missing: vision_model"):
        VideoCLIP.from_official(tmp_path)


@pytest.mark.parametrize("normalised", [True, False])
def test_a_folder_tells_whether_its_model_predicts_normalised_pixels(tmp_path, normalised):
    own = VideoMAE(MaskedSize(24, 1, 2, 48, 8, 12, 1, 2, 24), frames=4, image_size=16)
    tables = (videomae.OFFICIAL, videomae.HUGGING_FACE)
    save_file(weights.export(own, videomae.rules(own, tables)), tmp_path / "model.safetensors")
    config = {"num_attention_heads": 2, "decoder_num_attention_heads": 2, "num_frames": 4,
              "image_size": 16, "norm_pix_loss": normalised, "decoder_hidden_size": 12}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = VideoMAE.from_official(tmp_path)
    assert model.config["normalised"] == normalised and same(model.state_dict(), own.state_dict())
    (tmp_path / "config.json").write_text(json.dumps(config | {"decoder_hidden_size": 13}))
    with pytest.raises(WeightsError, match="says decoder_hidden_size 13, the tensors say 12"):
        VideoMAE.from_official(tmp_path)


@torch.no_grad()
def test_layer_scales_of_an_image_vit_are_kept():
    state = image_vit() | {f"blocks.{i}.ls{j}.gamma": torch.rand(24) for i in (0, 1)
                           for j in (1, 2)}
    model = VideoClassifier.from_official(state, heads=3, frames=2)
    assert torch.equal(model.encoder.blocks[1].gamma2, state["blocks.1.ls2.gamma"])


@pytest.mark.parametrize("config, preprocessor, message", [
    ({"patch_size": 16}, None, "config.json says patch_size 16, the tensors say 4"),
    ({"tubelet_size": 4}, None, "config.json says tubelet_size 4, the tensors say 2"),
    ({"hidden_size": 32}, None, "config.json says hidden_size 32, the tensors say 24"),
    ({"num_hidden_layers": 3}, None, "config.json says num_hidden_layers 3, the tensors say 2"),
    ({"hidden_act": "relu"}, None, "hidden_act 'relu'"),
    ({"image_size": 24}, {"size": 12}, "prepares frames of 12 x 12 pixels, and .* says 24 x 24"),
    ({"image_size": [1, 2, 3]}, None, "image_size must be one or two whole numbers"),
    ({"num_frames": 0}, None, "num_frames must be a whole number from 1 on"),
    ({"layer_norm_eps": "x"}, None, r"layer_norm_eps must be in \[0, 1\)"),
    ({}, {"image_mean": [0.5], "image_std": [0.5]}, "normalises 1 channels and has 3"),
    ({}, {"image_mean": [0.5] * 3, "image_std": [0.5, 0.5, 0]}, "deviations must be above 0"),
    ({}, {"image_mean": [0.5] * 3}, "must be lists of numbers, got 'None'"),
    ({}, {"image_mean": "x", "image_std": [1]}, "must be lists of numbers, got 'x'"),
    ({}, {"do_rescale": False}, "normalises pixels that are not in"),
    ({}, {"rescale_factor": 0.0078}, "normalises pixels that are not in"),
    ({}, [], "not a configuration as transformers writes it")])
def test_a_folder_that_contradicts_its_tensors_or_says_what_cannot_be_is_one_line(
        tmp_path, config, preprocessor, message):
    hub_folder(tmp_path / "hub", config, preprocessor)
    with pytest.raises(WeightsError, match=message) as caught:
        VideoClassifier.from_official(tmp_path / "hub")
    assert "\n" not in str(caught.value)


# Key maps -----------------------------------------------------------------------------------------


def test_a_name_is_spelled_through_every_table_in_turn():
    first, prefix = ((r"^a\.", "b."), (r"b\.", "c.")), ((r"^", "whole."),)
    assert spell("a.weight", first, prefix) == "whole.c.weight"
    assert spell("x.weight", ((r"x\.(\w+)", r"{q,k}.\1"),), prefix) == (
        "whole.q.weight", "whole.k.weight")
    assert spell("part.a.b.", under("part.", ((r"^a\.", "d."), (r"b\.", "c.")))) == "part.d.c."
    assert spell("a.b.", under("part.", ((r"^a\.", "d."),))) == "a.b."


def test_a_part_that_the_official_code_does_not_have_is_not_written_under_a_name_of_ours():
    model = VideoMAE("tiny", frames=2, image_size=16)
    model.encoder.blocks[0].norm_time = torch.nn.LayerNorm(2)
    with pytest.raises(ValueError, match="norm_time.weight belongs to a part that is unknown"):
        model.to_official()
    with pytest.raises(ValueError, match="new.weight belongs to a part that is unknown"):
        key_map(torch.nn.ModuleDict({"new": torch.nn.Linear(1, 1)}), (((r"^old\.", "a."),),))


def test_most_tensors_decide_a_size_and_two_that_alone_tell_it_must_agree():
    file = OfficialFile({f"b.{i}.w": torch.zeros(3 + (i == 1), 7) for i in range(3)}
                        | {"head.weight": torch.zeros(5, 2), "head.bias": torch.zeros(4)})
    assert file.depth("b.") == 3 and file.size("b.#.w") == 3 and file.size(("b.#.w", 1)) == 7
    with pytest.raises(WeightsError, match="head.weight has 5 rows, head.bias has 4 rows"):
        file.rows("head.weight", "head.bias")
    with pytest.raises(WeightsError, match="missing: b.0.v"):
        file.size("b.#.v")
    assert file.rows("none.weight") == 0


# Runs of older versions ---------------------------------------------------------------------------

SMALL = Size(32, 2, 2, 64, 8, 16)


def run(folder, model, **options):
    """A run whose config.json also has these options, as older versions wrote them."""
    weights.save(folder, model, model.config | options)
    return folder


def old_models():
    text = dict(text_size=TextSize(32, 1, 2), vocabulary=40, context=7, frames=2)
    return {"VideoMAE": lambda: VideoMAE("tiny", frames=2, image_size=16),
            "VideoClassifier": lambda: VideoClassifier("tiny", classes=3, frames=2, image_size=16),
            "VideoCLIP": lambda: VideoCLIP(SMALL, **text)}


@pytest.mark.parametrize("kind, kept, refused", [
    ("VideoMAE", {"space_time": "joint"}, {"space_time": "divided"}),
    ("VideoClassifier", {"space_time": "joint", "pool": "mean"}, {"pool": "first"}),
    ("VideoCLIP", {"masked_text": False}, {"masked_text": True})])
def test_options_that_no_longer_exist_are_dropped_or_refused(tmp_path, kind, kept, refused):
    model = old_models()[kind]()
    again = type(model).from_official(run(tmp_path / "old", model, **kept))
    assert same(again.state_dict(), model.state_dict())
    key = next(iter(refused))
    with pytest.raises(WeightsError, match=f"old2.*{key}={refused[key]!r}; this opt") as caught:
        type(model).from_official(run(tmp_path / "old2", model, **refused))
    assert "\n" not in str(caught.value)


def test_so_they_are_in_the_models_inside_a_model():
    old = {"model": "InternVideo",
           "masked": {"model": "VideoClassifier", "pool": "mean", "frames": 2},
           "multimodal": [{"model": "UniFormerV2", "pool": "mean"}]}
    assert weights.runs.without_removed(old, "x") == {
        "model": "InternVideo", "masked": {"model": "VideoClassifier", "frames": 2},
        "multimodal": [{"model": "UniFormerV2", "pool": "mean"}]}
    old["masked"]["pool"] = "first"
    with pytest.raises(WeightsError, match="x: VideoClassifier with pool='first'"):
        weights.runs.without_removed(old, "x")


def test_a_run_of_another_stage_is_refused_by_name(tmp_path):
    folder = run(tmp_path / "mae", VideoMAE("tiny", frames=2, image_size=16))
    with pytest.raises(WeightsError, match="of `train.py fuse`: it holds VideoMAE, not I"):
        weights.load_run(None, folder, "InternVideo", "fuse")
    weights.save(tmp_path / "bare", {"a": torch.ones(1)}, {})
    with pytest.raises(WeightsError, match="it has no configuration, not Localiser"):
        weights.load_run(None, tmp_path / "bare", "Localiser", "localise")
    classifier = VideoClassifier("tiny", classes=3, frames=2, image_size=16)
    folder = run(tmp_path / "classifier", classifier)
    with pytest.raises(WeightsError, match="holds VideoClassifier, not VideoMAE; .* stage 1"):
        VideoMAE.from_official(folder)


def test_every_model_of_the_tables_exists_and_has_official_names():
    for model in weights.MODELS:
        assert callable(weights.class_of(model).to_official)
    for _, _, loaders in weights.FAMILIES:
        assert set(loaders) <= set(weights.MODELS)
    from weights.encoders import ENCODERS
    assert set(ENCODERS) <= set(weights.MODELS)
