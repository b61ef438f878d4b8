"""What is proved about clip_video.py: the official numbers of InternVideo-MM and ViCLIP come out,
and a file that does not fit is refused with the names of what is wrong; the loss is the one written
down, about ln B at random; nothing after the end of a text matters, and reading token by token is
reading at once; the video model begins as the image model."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_summary, official_fill, values

import clip_video
import uniformerv2
import weights
from clip_video import TextEncoder, TextSize, VideoCLIP, contrastive_loss, zero_shot
from weights import WeightsError


def transformer_shapes(prefix, width, depth):
    """Names and shapes of CLIP's transformer, for either encoder."""
    shapes = {}
    for i in range(depth):
        block = f"{prefix}resblocks.{i}."
        shapes |= {block + "attn.in_proj_weight": (3 * width, width),
                   block + "attn.in_proj_bias": (3 * width,),
                   block + "attn.out_proj.weight": (width, width),
                   block + "mlp.c_fc.weight": (4 * width, width),
                   block + "mlp.c_fc.bias": (4 * width,),
                   block + "mlp.c_proj.weight": (width, 4 * width)}
        shapes |= {block + name: (width,) for name in (
            "attn.out_proj.bias", "mlp.c_proj.bias", "ln_1.weight", "ln_1.bias", "ln_2.weight",
            "ln_2.bias")}
    return shapes


def text_shapes(width=128, context=10, vocabulary=50, embedding=16):
    return {"token_embedding.weight": (vocabulary, width), "positional_embedding": (context, width),
            "ln_final.weight": (width,), "ln_final.bias": (width,),
            "text_projection": (width, embedding),
            **transformer_shapes("transformer.", width, 2)}


def visual_shapes(width, depth, embedding, places=5, post="visual.ln_post.", proj="visual.proj"):
    return {"visual.class_embedding": (width,), "visual.positional_embedding": (places, width),
            "visual.ln_pre.weight": (width,), "visual.ln_pre.bias": (width,),
            post + "weight": (width,), post + "bias": (width,), proj: (width, embedding),
            **transformer_shapes("visual.transformer.", width, depth)}


def clip_state(width=64, embedding=16):
    """Plain CLIP: 32 px in patches of 16."""
    state = official_fill({**visual_shapes(width, 3, embedding),
                           "visual.conv1.weight": (width, 3, 16, 16),
                           **text_shapes()})
    return {**state, "logit_scale": torch.tensor(1 / 0.07).log()}


def internvideo_state():
    """F5 of the specification: InternVideo-MM, D 24, three layers, global blocks after the last
    two."""
    D, extra = 24, {}
    for j in range(2):
        block, local = f"visual.transformer.dec.{j}.", f"visual.transformer.dpe.{j}."
        extra |= {name.replace("visual.transformer.resblocks.0.", block): shape for name, shape in
                  transformer_shapes("visual.transformer.", D, 1).items()}
        extra |= {block + "ln_3.weight": (D,), block + "ln_3.bias": (D,),
                  local + "weight": (D, 1, 3, 3, 3),
                  local + "bias": (D,)}
    state = official_fill({**visual_shapes(D, 3, 16, post="visual_ln_post.", proj="visual_proj"),
                           "visual.conv1.weight": (D, 3, 1, 16, 16), **extra,
                           "visual.transformer.temporal_cls_token": (1, 1, D),
                           "visual.transformer.balance": (D,), **text_shapes()})
    return {**state, "logit_scale": torch.tensor(1 / 0.07).log()}


def viclip_state():
    """F7 of the specification: ViCLIP, D 128, two layers, four frames. The reference numbers are of
    the visual encoder alone, so the tags of its fill have no prefix."""
    shapes = {name.removeprefix("visual."): shape for name,
              shape in visual_shapes(128, 2, 16).items()}
    shapes |= {"conv1.weight": (128, 3, 1, 16, 16), "temporal_positional_embedding": (1, 4, 128)}
    state = {"vision_encoder." + name: value for name, value in official_fill(shapes).items()}
    state |= {"text_encoder." + name: value for name, value in official_fill(text_shapes()).items()}
    return {**state, "temp": torch.tensor(0.01)}


def clip(batch=2, frames=4, size=32):
    """The input of the reference numbers."""
    shape = (batch, 3, frames, size, size)
    return torch.from_numpy(values("input", math.prod(shape)).reshape(shape)).float()


IDS = torch.tensor([[48, 5, 6, 7, 49, 0, 0, 0, 0, 0], [48, 9, 8, 3, 2, 1, 49, 0, 0, 0]])


def load_internvideo(state=None, **options):
    return VideoCLIP.from_official(state or internvideo_state(), heads=2, global_heads=2, **options)


# Official numbers --------------------------------------------------------------------------------


@torch.no_grad()
def test_internvideo_gives_the_official_numbers():
    model = load_internvideo()
    video, tokens = model.encode_video_tokens(clip())
    text, words = model.encode_text_tokens(IDS)
    assert_summary(video, -3.280128, first=[-0.740984, -2.338089, 0.243710, 0.696468],
                   last=1.551634)
    assert_summary(tokens.permute(2, 0, 1, 3), -33.762920,
                   first=[-0.475680, -0.928520, 0.635591, 0.888292])
    image = model.encode_video(clip()[:, :, 0])
    assert_summary(image, 0.132470, first=[-0.536288, -2.360570, 0.766343, 1.444628])
    assert_summary(text, -2.532697, first=[-0.070236, -1.816668, -0.120077, 1.379320])
    assert_summary(words, 13.826892, first=[-0.568982, 0.893855, -0.220480, -0.665796])
    assert abs(contrastive_loss(video, text, model.logit_scale) - 0.852967) < 1e-5


@torch.no_grad()
def test_viclip_gives_the_official_numbers_for_clips_and_images():
    """An image gets the mean of the codes for time; without such codes ViCLIP's image is CLIP's."""
    state = viclip_state()
    model = VideoCLIP.from_official(state)
    assert_summary(model.encode_video(clip()), -16.631352,
                   first=[-0.543958, 1.975196, 0.769801, -2.408024])
    image = clip()[:, :, 0]
    assert_summary(model.encode_video(image), -15.298794,
                   first=[1.607964, 1.449801, 2.314520, -1.529666])
    model.visual.times.zero_()
    assert_summary(model.encode_video(image), -16.398231,
                   first=[1.640286, 1.323513, 2.192422, -1.611349])

    plain = {"visual." + key.removeprefix("vision_encoder."): value for key, value in state.items()
             if key.startswith("vision_encoder.") and "temporal" not in key}
    plain["visual.conv1.weight"] = plain["visual.conv1.weight"][:, :, 0]
    plain |= {key.removeprefix("text_encoder."): value for key, value in state.items()
              if key.startswith("text_encoder.")}
    plain["logit_scale"] = torch.tensor(0.0)
    close(VideoCLIP.from_official(plain).encode_video(image), model.encode_video(image))


def close(a, b, atol=2e-6):
    assert a.shape == b.shape and torch.allclose(a, b, atol=atol,
                                                 rtol=1e-5), float((a - b).abs().max())


def hugging_face(state):
    """The same weights as Hugging Face stores them, spelled out by hand."""
    table = {"visual.class_embedding": "vision_model.embeddings.class_embedding",
             "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
             "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
             "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
             "positional_embedding": "text_model.embeddings.position_embedding.weight",
             "logit_scale": "logit_scale"}
    layers = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "c_fc": "fc1", "c_proj": "fc2"}
    norms = {"visual.ln_pre": "vision_model.pre_layrnorm",
             "visual.ln_post": "vision_model.post_layernorm",
             "ln_final": "text_model.final_layer_norm"}
    found = {"text_model.embeddings.position_ids": torch.arange(10)[None]}
    for key, value in state.items():
        stem, _, part = key.rpartition(".")
        if key in table:
            found[table[key]] = value
        elif key in ("visual.proj", "text_projection"):
            part = "visual" if key == "visual.proj" else "text"
            found[f"{part}_projection.weight"] = value.T
        elif stem in norms:
            found[f"{norms[stem]}.{part}"] = value
        else:
            which, number = ("vision_model",
                             "text_model")["visual" not in key], key.split("resblocks.")[1][0]
            block = f"{which}.encoder.layers.{number}."
            if "in_proj" in key:
                for letter, piece in zip("qkv", value.chunk(3)):
                    found[f"{block}self_attn.{letter}_proj.{key.split('in_proj_')[1]}"] = piece
            elif "out_proj" in key:
                found[f"{block}self_attn.out_proj.{part}"] = value
            else:
                group, name = stem.split(".")[-2:] if "mlp" in stem else ("", stem.split(".")[-1])
                found[f"{block}{group + '.' if group else ''}{layers[name]}.{part}"] = value
    return found


@torch.no_grad()
def test_every_layout_of_the_same_weights_is_the_same_model():
    state = clip_state()
    first = VideoCLIP.from_official(state)
    with_sizes = {**state, "input_resolution": torch.tensor(32), "context_length": torch.tensor(10)}
    for other in (with_sizes, hugging_face(state), {"state_dict": state}):
        model = VideoCLIP.from_official(other)
        close(model.encode_video(clip()), first.encode_video(clip()))
        close(model.encode_text(IDS), first.encode_text(IDS))
    assert VideoCLIP.from_official(with_sizes).unused == ["input_resolution", "context_length"]
    whole = {"clip." + key: value for key, value in internvideo_state().items()}
    whole["caption_decoder.visual_queries"] = torch.zeros(3, 4)
    model = load_internvideo(whole)
    close(model.encode_video(clip()), load_internvideo().encode_video(clip()))
    assert model.unused == ["caption_decoder.visual_queries"]


@pytest.mark.parametrize("make", [clip_state, internvideo_state, viclip_state,
                                  lambda: hugging_face(clip_state())])
def test_a_file_that_does_not_fit_is_refused_by_the_names_in_it(make):
    """Each tensor in turn: missing, misshapen; and one too many. Silence here is a random
    network."""
    state = make()
    load = lambda state: VideoCLIP.from_official(state, heads=2, global_heads=2)  # noqa: E731
    load(state)
    for key in state:
        if "position_ids" in key:
            continue
        with pytest.raises(WeightsError, match="missing: ") as error:
            load({name: value for name, value in state.items() if name != key})
        assert key in str(error.value) and len(str(error.value)) < 250
    for key in [key for key in state if state[key].ndim and "position" not in key
                and "conv1" not in key
                and "patch_embedding" not in key and "token_embedding" not in key]:
        longer = torch.cat([state[key], state[key][..., -1:]], dim=-1)
        with pytest.raises(WeightsError, match="wrong shape") as error:
            load({**state, key: longer})
        assert key in str(error.value) and len(str(error.value)) < 350
    extra = next(key for key in state if "ln" in key or "norm" in key) + "_again"
    with pytest.raises(WeightsError, match="unknown: " + extra):
        load({**state, extra: torch.zeros(3)})


def test_what_is_no_clip_model_is_refused_in_a_sentence():
    with pytest.raises(WeightsError, match="not the weights of a CLIP"):
        VideoCLIP.from_official({"encoder.blocks.0.norm1.weight": torch.zeros(3)})
    with pytest.raises(WeightsError, match="grow=True is for plain CLIP"):
        load_internvideo(grow=True)
    with pytest.raises(WeightsError, match="pass heads="):
        VideoCLIP.from_official(internvideo_state())


@pytest.mark.parametrize("kind", list(clip_video.KINDS))
@torch.no_grad()
def test_a_run_comes_back_as_it_was_saved(kind, tmp_path):
    model = VideoCLIP("tiny", kind=kind, frames=2, image_size=16, vocabulary=60, context=8,
                      end=5).eval()
    weights.save(tmp_path, model, model.config)
    again = VideoCLIP.from_official(tmp_path)
    assert again.config == model.config and not again.training
    video, ids = torch.randn(2, 3, 2, 16, 16), torch.tensor([[1, 5, 59, 2], [1, 2, 5, 5]])
    for a, b in zip(again(video, ids), model(video, ids)):
        assert torch.equal(a, b)


# The visual encoder -------------------------------------------------------------------------------


@torch.no_grad()
def test_grown_from_clip_the_video_model_begins_as_the_image_model():
    """Fresh global blocks are silent, so the feature is 0.5 * the mean class token (spec. 4.3)."""
    state = clip_state()
    frames = VideoCLIP.from_official(state)
    video = VideoCLIP.from_official(state, grow=True, frames=4, global_layers=(1, 2))
    assert video.config["global_layers"] == [1, 2] and video.kind == "video"
    assert sum(p.numel() for p in video.parameters()) > sum(p.numel() for p in frames.parameters())
    for batch in (clip(), clip()[:, :, :1]):
        tokens = frames.encode_video_tokens(batch)[1]
        expected = video.visual_proj(video.visual_norm(0.5 * tokens[:, :, 0].mean(dim=1)))
        close(video.encode_video(batch), expected)
    close(video.encode_text(IDS), frames.encode_text(IDS))


@torch.no_grad()
def test_plain_clip_of_one_frame_is_clip_written_out():
    state = clip_state(width=64)
    image = clip()[:, :, 0]
    x = F.conv2d(image, state["visual.conv1.weight"], stride=16).flatten(2).transpose(1, 2)
    x = torch.cat([state["visual.class_embedding"].expand(2, 1, -1), x], dim=1)

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[name + ".weight"], state[name + ".bias"])

    def linear(x, name):
        return F.linear(x, state[name + ".weight"], state[name + ".bias"])

    x = norm(x + state["visual.positional_embedding"], "visual.ln_pre")
    for i in range(3):
        a = f"visual.transformer.resblocks.{i}."
        y = norm(x, a + "ln_1").transpose(0, 1)
        y, _ = F.multi_head_attention_forward(
            y, y, y, 64, 1, state[a + "attn.in_proj_weight"], state[a + "attn.in_proj_bias"], None,
            None,
            False, 0.0, state[a + "attn.out_proj.weight"], state[a + "attn.out_proj.bias"],
            training=False)
        x = x + y.transpose(0, 1)
        y = linear(norm(x, a + "ln_2"), a + "mlp.c_fc")
        x = x + linear(y * torch.sigmoid(1.702 * y), a + "mlp.c_proj")
    expected = norm(x[:, 0], "visual.ln_post") @ state["visual.proj"]
    close(VideoCLIP.from_official(state).encode_video(image), expected, atol=1e-5)


def test_viclips_table_of_times_is_cut_or_stretched_to_the_frames_asked_for():
    table = viclip_state()["vision_encoder.temporal_positional_embedding"][0]
    few = VideoCLIP.from_official(viclip_state(), frames=2)
    many = VideoCLIP.from_official(viclip_state(), frames=7)
    assert torch.equal(few.visual.times, table[:2]) and many.visual.times.shape == (7, 128)
    assert many.encode_video(clip(1, 7)).shape == (1, 16)
    with pytest.raises(ValueError, match="up to 2 frames of 32 x 32"):
        few.encode_video(clip(1, 3))


# The text encoder ---------------------------------------------------------------------------------


def text_encoder(**options):
    sizes = dict(vocabulary=50, context=10, embedding=8)
    return TextEncoder(TextSize(32, 3, 4), **sizes, **options).double().eval()


@torch.no_grad()
def test_nothing_after_the_end_of_a_text_changes_its_embedding():
    """Padding is not masked; causality alone keeps it out (CLIP, Sec. 2.4)."""
    encoder = text_encoder()
    other = IDS.masked_fill(IDS == 0, 17)
    assert torch.equal(encoder(IDS)[0], encoder(other)[0])
    close(encoder(IDS[:, :7])[0], encoder(IDS)[0], atol=1e-12)                   # trimmed captions
    assert not torch.allclose(encoder(IDS[:, :7].flip(0))[0], encoder(IDS)[0])


@torch.no_grad()
def test_the_end_may_have_a_number_of_its_own():
    """Where it is not the largest: then the first one that is given counts."""
    encoder, ids = text_encoder(end=3), torch.tensor([[48, 5, 3, 49, 3], [1, 3, 2, 2, 2]])
    expected = encoder.proj(torch.stack([encoder.tokens(ids)[0, 2], encoder.tokens(ids)[1, 1]]))
    assert torch.equal(encoder(ids)[0], expected)
    with pytest.raises(ValueError, match="no end-of-text token, id 3"):
        encoder(torch.tensor([[1, 3], [1, 2]]))


@torch.no_grad()
def test_reading_word_by_word_gives_the_numbers_of_reading_at_once():
    encoder = text_encoder()
    tokens, cache, found = encoder.tokens(IDS), encoder.start_cache(2), []
    for n in (1, 3, 1, 5):
        done = sum(part.shape[1] for part in found)
        part, cache = encoder.step(IDS[:, done:done + n], cache)
        found.append(part)
    close(torch.cat(found, dim=1), tokens, atol=1e-12)
    # Beams: the cache of sentence 1, twice, goes on with two different words.
    _, cache = encoder.step(IDS[:, :4], encoder.start_cache(2))
    cache = [[x[torch.tensor([1, 1])] for x in pair] for pair in cache]
    part, _ = encoder.step(torch.tensor([[7], [8]]), cache)
    for i, word in enumerate((7, 8)):
        sentence = torch.cat([IDS[1:, :4], torch.tensor([[word]])], dim=1)
        close(part[i:i + 1], encoder.tokens(sentence)[:, 4:], atol=1e-12)
    with pytest.raises(ValueError, match="a text of 11 tokens: this encoder takes up to 10"):
        encoder.step(IDS[:, :1], encoder.step(IDS, encoder.start_cache(2))[1])


# The loss -----------------------------------------------------------------------------------------


def test_the_loss_of_three_pairs_by_hand():
    """Cosines of unit vectors that one can see; scale 2."""
    video = torch.tensor([[3.0, 0], [0, 2], [1, 1]])
    text = torch.tensor([[1.0, 0], [1, 1], [0, 5]])
    h, e = 2**-0.5, math.exp
    cosines = [[1, h, 0], [0, h, 1], [h, 1, h]]                              # video x text
    columns = list(zip(*cosines))
    by_hand = sum(math.log(sum(e(2 * c) for c in line)) - 2 * line[i]
                  for lines in (cosines, columns) for i, line in enumerate(lines)) / 6
    assert abs(contrastive_loss(video, text, torch.tensor(math.log(2))) - by_hand) < 1e-6


def test_strangers_cost_about_ln_b():
    video, text = torch.randn(200, 512), torch.randn(200, 512)
    assert abs(contrastive_loss(video, text, torch.tensor(0.0)) - math.log(200)) < 0.01
    assert contrastive_loss(video, video, torch.tensor(math.log(100))) < 1e-6


def test_pairs_with_one_caption_share_the_truth():
    """Two clips of the same caption are no negatives of each other (ViCLIP, VTC with shared
    ids)."""
    (video, text), scale = torch.randn(2, 4, 8), torch.tensor(1.5)
    targets = torch.tensor([4, 9, 4, 2])
    logits = scale.exp() * F.normalize(video, dim=-1) @ F.normalize(text, dim=-1).T
    truth = torch.eye(4)
    truth[0, 2] = truth[2, 0] = 1
    truth /= truth.sum(dim=1, keepdim=True)
    rows, columns = (truth * logits.log_softmax(1)).sum(), (truth * logits.T.log_softmax(1)).sum()
    expected = -(rows + columns) / 8
    close(contrastive_loss(video, text, scale, targets=targets), expected)
    close(contrastive_loss(video, text, scale, targets=torch.arange(4)),
          contrastive_loss(video, text, scale))


def test_captions_of_one_clip_and_clips_of_one_caption_are_no_negatives():
    """The second column says which clip it is; pairs agree where either number is equal."""
    (video, text), scale = torch.randn(2, 4, 8), torch.tensor(1.5)
    targets = torch.tensor([[4, 1], [9, 1], [4, 2], [2, 3]])
    logits = scale.exp() * F.normalize(video, dim=-1) @ F.normalize(text, dim=-1).T
    truth = torch.eye(4)
    for i, j in ((0, 1), (0, 2)):
        truth[i, j] = truth[j, i] = 1
    truth /= truth.sum(dim=1, keepdim=True)
    rows, columns = (truth * logits.log_softmax(1)).sum(), (truth * logits.T.log_softmax(1)).sum()
    close(contrastive_loss(video, text, scale, targets=targets), -(rows + columns) / 8)


def test_under_autocast_the_loss_stays_in_float32():
    """bfloat16 has 8 bits: logits up to 100 would be off by 0.4."""
    video = torch.randn(6, 16).bfloat16().requires_grad_()
    text = torch.randn(6, 16).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = contrastive_loss(video, text, torch.tensor(4.0))
        loss.backward()
    assert loss.dtype == torch.float32
    close(loss.detach(), contrastive_loss(video.detach().float(), text.float(), torch.tensor(4.0)),
          atol=1e-5)


@pytest.mark.parametrize("kind", ["frames", "joint"])
def test_the_factor_on_the_cosines_never_exceeds_100(kind):
    """In training, however hard the optimiser pushes (CLIP, Sec. 2.5). InternVideo's is also at
    least 1."""
    model = VideoCLIP("tiny", kind=kind, frames=2, image_size=16, vocabulary=60, context=8)
    video, ids = torch.randn(2, 3, 2, 16, 16), torch.randint(60, (2, 8))
    model.scale.data.fill_(1e-4 if kind == "joint" else 9.0)
    assert model(video, ids)[2].exp() <= 100.001
    model.scale.data.fill_(50.0 if kind == "joint" else -3.0)
    factor = model(video, ids)[2].exp()
    assert factor < 1 if kind == "joint" else factor == 1
    model.eval().scale.data.fill_(5.0)
    model(video, ids)
    assert model.scale == 5  # evaluation changes nothing


def test_a_few_steps_teach_which_text_belongs_to_which_clip():
    torch.manual_seed(0)
    model = VideoCLIP("tiny", frames=2, image_size=16, vocabulary=60, context=8)
    video, ids = torch.randn(6, 3, 2, 16, 16), torch.randint(60, (6, 8))
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-4)
    for _ in range(12):
        loss = contrastive_loss(*model(video, ids))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.3 * math.log(6)


# The use of the trained model ---------------------------------------------------------------------


def test_zero_shot_averages_probabilities_over_prompts():
    """Two prompts that disagree: the mean of probabilities is not the probability of the mean."""
    video = torch.tensor([[1.0, 0.0]])
    classes = F.normalize(torch.tensor([[[1.0, 0], [0, 1]], [[0, 1.0], [-1, 1]]]), dim=-1)
    scale, h = torch.tensor(math.log(3.0)), 2**-0.5
    first, second = math.exp(3) / (math.exp(3) + 1), 1 / (1 + math.exp(-3 * h))
    found = zero_shot(video, classes, scale)
    close(found, torch.tensor([[(first + second) / 2, 1 - (first + second) / 2]]))
    mean = F.normalize(classes.mean(dim=0), dim=-1)
    close(zero_shot(video, classes, scale, "embeddings"), (3 * video @ mean.T).softmax(-1))


# Options and sizes --------------------------------------------------------------------------------


def test_sizes_are_the_published_ones():
    """Parameters of CLIP B/16 without building it twice: the sum over its tensors."""
    with torch.device("meta"):
        model = VideoCLIP("b16", kind="frames")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == 150
    assert uniformerv2.SIZES["b16"].width == 768


@pytest.mark.parametrize("options, words", [
    (dict(kind="still"), "choose video, frames, joint"),
    (dict(kind="frames", local_units=1), "local_units is for kind='video'"),
    (dict(kind="joint", global_layers=(1,)), "global_layers is for kind='video'"),
    (dict(tubelet=2), "tubelet is for kind='joint'"),
    (dict(size=uniformerv2.SIZES["tiny"]), "a Size of your own needs a text_size"),
    (dict(kind="joint", image_size=30), "do not divide into patches of 8 x 8"),
    (dict(kind="joint", frames=3, tubelet=2), "3 frames do not divide into tubelets of 2")])
def test_options_that_contradict_each_other_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        VideoCLIP(**{"size": "tiny", **options})


def test_the_configuration_is_all_options_with_nothing_left_open():
    model = VideoCLIP("tiny", image_size=16, vocabulary=60, context=8)
    assert model.config.keys() == {"model"} | model.options.__dict__.keys()
    assert model.config["global_layers"] == [2, 3] and model.config["image_size"] == [16, 16]
    assert model.config["embedding"] == 128 and model.config["text_size"]["width"] == 128
    older = {key: value for key, value in model.config.items() if key != "tubelet"}
    again = weights.build(VideoCLIP.from_config, older | {"masked_text": False}, "run")
    assert again.config == model.config and again.options == model.options


@torch.no_grad()
def test_an_embedding_of_hidden_words_is_left_aside_and_named():
    whole = {"clip." + key: value for key, value in internvideo_state().items()}
    whole["clip.text_mask_embedding"] = torch.ones(1, 1, 128)
    model = load_internvideo(whole)
    assert model.unused == ["clip.text_mask_embedding"]
    close(model.encode_text(IDS), load_internvideo().encode_text(IDS))


@torch.no_grad()
def test_with_tubelets_the_joint_encoder_begins_with_a_convolution_over_frames():
    """Of two frames, at every second one; an image, standing still, gets the mean of all times."""
    model = VideoCLIP("tiny", kind="joint", frames=4, image_size=16, tubelet=2, vocabulary=60,
                      context=8).eval()
    visual, video = model.visual, torch.randn(2, 3, 4, 16, 16)
    visual.times.normal_()
    assert visual.times.shape == (2, 192) and visual.stride == 2
    kernel = visual.embed.weight.view(192, 3, 2, 8, 8)
    x = F.conv3d(video, kernel, stride=(2, 8, 8)).permute(0, 2, 3, 4, 1).flatten(2, 3)
    seen = []
    visual.norm_pre.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    assert model.encode_video_tokens(video)[1].shape == (2, 1, 1 + 8, 192)
    close(seen[0][:, 1:], (x + visual.positions[1:] + visual.times[:, None]).flatten(1, 2), 1e-5)
    model.encode_video(video[:, :, :1].expand(-1, -1, 2, -1, -1))
    x = F.conv3d(video[:, :, :1].expand(-1, -1, 2, -1, -1), kernel, stride=(2, 8, 8))
    x = x.permute(0, 2, 3, 4, 1).flatten(2, 3) + visual.positions[1:]
    close(seen[1][:, 1:], (x + visual.times.mean(dim=0)).flatten(1, 2), 1e-5)
    with pytest.raises(ValueError, match="up to 4 frames of 16 x 16 pixels, a multiple of 2"):
        model.encode_video(video[:, :, :3])


def test_the_command_prints_the_shapes(capsys):
    clip_video.main()
    lines = capsys.readouterr().out.splitlines()
    assert any("(B, t, 1+S, D)" in line and "(4, 4, 65, 192)" in line for line in lines)
    assert "ln B = 1.386" in lines[-1]
