"""What is proved about clip_video.py:

the official numbers of InternVideo-MM and ViCLIP come out, and a file that does not fit is refused
with the names of what is wrong; the loss is the one written down, about ln B at random, the same in
blocks, in cached pieces and over two processes; nothing after the end of a text matters, and reading
word by word is reading at once; ties never help retrieval; the video model begins as the image model.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_summary, official_fill, values

import attention
import clip_video
import uniformerv2
import weights
from clip_video import (TextSize, TextTower, VideoCLIP, contrastive_loss, in_pieces,
                        gather_with_gradient, load_tokenizer, protocol, retrieval_metrics,
                        train_tokenizer, zero_shot)
from weights import WeightsError


def tower_shapes(prefix, width, depth):
    """Names and shapes of CLIP's transformer, for either tower."""
    shapes = {}
    for i in range(depth):
        block = f"{prefix}resblocks.{i}."
        shapes |= {block + "attn.in_proj_weight": (3 * width, width),
                   block + "attn.in_proj_bias": (3 * width,), block + "attn.out_proj.weight": (width, width),
                   block + "mlp.c_fc.weight": (4 * width, width), block + "mlp.c_fc.bias": (4 * width,),
                   block + "mlp.c_proj.weight": (width, 4 * width)}
        shapes |= {block + name: (width,) for name in (
            "attn.out_proj.bias", "mlp.c_proj.bias", "ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias")}
    return shapes


def text_shapes(width=128, context=10, vocabulary=50, embedding=16):
    return {"token_embedding.weight": (vocabulary, width), "positional_embedding": (context, width),
            "ln_final.weight": (width,), "ln_final.bias": (width,), "text_projection": (width, embedding),
            **tower_shapes("transformer.", width, 2)}


def visual_shapes(width, depth, embedding, places=5, post="visual.ln_post.", proj="visual.proj"):
    return {"visual.class_embedding": (width,), "visual.positional_embedding": (places, width),
            "visual.ln_pre.weight": (width,), "visual.ln_pre.bias": (width,),
            post + "weight": (width,), post + "bias": (width,), proj: (width, embedding),
            **tower_shapes("visual.transformer.", width, depth)}


def clip_state(width=64, embedding=16):
    """Plain CLIP: 32 px in patches of 16."""
    state = official_fill({**visual_shapes(width, 3, embedding), "visual.conv1.weight": (width, 3, 16, 16),
                           **text_shapes()})
    return {**state, "logit_scale": torch.tensor(1 / 0.07).log()}


def internvideo_state():
    """F5 of the specification: InternVideo-MM, D 24, three layers, global blocks after the last two."""
    D, extra = 24, {}
    for j in range(2):
        block, local = f"visual.transformer.dec.{j}.", f"visual.transformer.dpe.{j}."
        extra |= {name.replace("visual.transformer.resblocks.0.", block): shape for name, shape in
                  tower_shapes("visual.transformer.", D, 1).items()}
        extra |= {block + "ln_3.weight": (D,), block + "ln_3.bias": (D,), local + "weight": (D, 1, 3, 3, 3),
                  local + "bias": (D,)}
    state = official_fill({**visual_shapes(D, 3, 16, post="visual_ln_post.", proj="visual_proj"),
                           "visual.conv1.weight": (D, 3, 1, 16, 16), **extra,
                           "visual.transformer.temporal_cls_token": (1, 1, D),
                           "visual.transformer.balance": (D,), **text_shapes()})
    return {**state, "logit_scale": torch.tensor(1 / 0.07).log()}


def viclip_state():
    """F7 of the specification: ViCLIP, D 128, two layers, four frames. The reference numbers are of
    the vision tower alone, so the tags of its fill have no prefix."""
    shapes = {name.removeprefix("visual."): shape for name, shape in visual_shapes(128, 2, 16).items()}
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
    assert_summary(video, -3.280128, first=[-0.740984, -2.338089, 0.243710, 0.696468], last=1.551634)
    assert_summary(tokens.permute(2, 0, 1, 3), -33.762920, first=[-0.475680, -0.928520, 0.635591, 0.888292])
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
    assert_summary(model.encode_video(clip()), -16.631352, first=[-0.543958, 1.975196, 0.769801, -2.408024])
    image = clip()[:, :, 0]
    assert_summary(model.encode_video(image), -15.298794, first=[1.607964, 1.449801, 2.314520, -1.529666])
    model.visual.times.zero_()
    assert_summary(model.encode_video(image), -16.398231, first=[1.640286, 1.323513, 2.192422, -1.611349])

    plain = {"visual." + key.removeprefix("vision_encoder."): value for key, value in state.items()
             if key.startswith("vision_encoder.") and "temporal" not in key}
    plain["visual.conv1.weight"] = plain["visual.conv1.weight"][:, :, 0]
    plain |= {key.removeprefix("text_encoder."): value for key, value in state.items()
              if key.startswith("text_encoder.")}
    plain["logit_scale"] = torch.tensor(0.0)
    close(VideoCLIP.from_official(plain).encode_video(image), model.encode_video(image))


def close(a, b, atol=2e-6):
    assert a.shape == b.shape and torch.allclose(a, b, atol=atol, rtol=1e-5), float((a - b).abs().max())


def hugging_face(state):
    """The same weights as Hugging Face stores them, spelled out by hand."""
    table = {"visual.class_embedding": "vision_model.embeddings.class_embedding",
             "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
             "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
             "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
             "positional_embedding": "text_model.embeddings.position_embedding.weight",
             "logit_scale": "logit_scale"}
    layers = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "c_fc": "fc1", "c_proj": "fc2"}
    norms = {"visual.ln_pre": "vision_model.pre_layrnorm", "visual.ln_post": "vision_model.post_layernorm",
             "ln_final": "text_model.final_layer_norm"}
    found = {"text_model.embeddings.position_ids": torch.arange(10)[None]}
    for key, value in state.items():
        stem, _, part = key.rpartition(".")
        if key in table:
            found[table[key]] = value
        elif key in ("visual.proj", "text_projection"):
            found[{"visual.proj": "visual_projection.weight"}.get(key, "text_projection.weight")] = value.T
        elif stem in norms:
            found[f"{norms[stem]}.{part}"] = value
        else:
            which, number = ("vision_model", "text_model")["visual" not in key], key.split("resblocks.")[1][0]
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
    """Each tensor in turn: missing, misshapen; and one too many. Silence here is a random network."""
    state = make()
    load = lambda state: VideoCLIP.from_official(state, heads=2, global_heads=2)  # noqa: E731
    load(state)
    for key in state:
        if "position_ids" in key:
            continue
        with pytest.raises(WeightsError, match="missing: ") as error:
            load({name: value for name, value in state.items() if name != key})
        assert key in str(error.value) and len(str(error.value)) < 250
    for key in [key for key in state if state[key].ndim and "position" not in key and "conv1" not in key
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
    model = VideoCLIP("tiny", kind=kind, frames=2, image_size=16, vocabulary=60, context=8, end=5).eval()
    weights.save(tmp_path, model, model.config)
    again = VideoCLIP.from_official(tmp_path)
    assert again.config == model.config and not again.training
    video, ids = torch.randn(2, 3, 2, 16, 16), torch.tensor([[1, 5, 59, 2], [1, 2, 5, 5]])
    for a, b in zip(again(video, ids), model(video, ids)):
        assert torch.equal(a, b)


# The visual tower ---------------------------------------------------------------------------------


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
            y, y, y, 64, 1, state[a + "attn.in_proj_weight"], state[a + "attn.in_proj_bias"], None, None,
            False, 0.0, state[a + "attn.out_proj.weight"], state[a + "attn.out_proj.bias"], training=False)
        x = x + y.transpose(0, 1)
        y = linear(norm(x, a + "ln_2"), a + "mlp.c_fc")
        x = x + linear(y * torch.sigmoid(1.702 * y), a + "mlp.c_proj")
    expected = norm(x[:, 0], "visual.ln_post") @ state["visual.proj"]
    close(VideoCLIP.from_official(state).encode_video(image), expected, atol=1e-5)


def test_masking_leaves_out_the_stated_share_and_is_a_function_of_its_generator():
    model = VideoCLIP.from_official(viclip_state())

    def draw(seed):
        return model.encode_video_tokens(clip(), 0.75, torch.Generator().manual_seed(seed))

    (one, tokens), (again, _), (other, _) = draw(1), draw(1), draw(2)
    assert tokens.shape[2] == 1 + 4                                          # a quarter of 4 * 2 * 2
    assert torch.equal(one, again) and not torch.equal(one, other)
    with pytest.raises(ValueError, match="mask_ratio is for kind='joint'"):
        load_internvideo().encode_video(clip(), 0.5)


def test_viclips_table_of_times_is_cut_or_stretched_to_the_frames_asked_for():
    table = viclip_state()["vision_encoder.temporal_positional_embedding"][0]
    few = VideoCLIP.from_official(viclip_state(), frames=2)
    many = VideoCLIP.from_official(viclip_state(), frames=7)
    assert torch.equal(few.visual.times, table[:2]) and many.visual.times.shape == (7, 128)
    assert many.encode_video(clip(1, 7)).shape == (1, 16)
    with pytest.raises(ValueError, match="up to 2 frames of 32 x 32"):
        few.encode_video(clip(1, 3))


# The text tower -----------------------------------------------------------------------------------


def text_tower(**options):
    return TextTower(TextSize(32, 3, 4), vocabulary=50, context=10, embedding=8, **options).double().eval()


@torch.no_grad()
def test_nothing_after_the_end_of_a_text_changes_its_embedding():
    """Padding is not masked; causality alone keeps it out (CLIP, Sec. 2.4)."""
    tower = text_tower()
    other = IDS.masked_fill(IDS == 0, 17)
    assert torch.equal(tower(IDS)[0], tower(other)[0])
    close(tower(IDS[:, :7])[0], tower(IDS)[0], atol=1e-12)                   # trimmed captions
    assert not torch.allclose(tower(IDS[:, :7].flip(0))[0], tower(IDS)[0])


@torch.no_grad()
def test_the_end_may_have_a_number_of_its_own():
    """Where it is not the largest: then the first one that is given counts."""
    tower, ids = text_tower(end=3), torch.tensor([[48, 5, 3, 49, 3], [1, 3, 2, 2, 2]])
    expected = tower.proj(torch.stack([tower.tokens(ids)[0, 2], tower.tokens(ids)[1, 1]]))
    assert torch.equal(tower(ids)[0], expected)
    with pytest.raises(ValueError, match="without its end, token 3"):
        tower(torch.tensor([[1, 3], [1, 2]]))


@torch.no_grad()
def test_reading_word_by_word_gives_the_numbers_of_reading_at_once():
    tower = text_tower()
    tokens, cache, found = tower.tokens(IDS), tower.start_cache(2), []
    for n in (1, 3, 1, 5):
        done = sum(part.shape[1] for part in found)
        part, cache = tower.step(IDS[:, done:done + n], cache)
        found.append(part)
    close(torch.cat(found, dim=1), tokens, atol=1e-12)
    # Beams: the cache of sentence 1, twice, goes on with two different words.
    _, cache = tower.step(IDS[:, :4], tower.start_cache(2))
    cache = [[x[torch.tensor([1, 1])] for x in pair] for pair in cache]
    part, _ = tower.step(torch.tensor([[7], [8]]), cache)
    for i, word in enumerate((7, 8)):
        sentence = torch.cat([IDS[1:, :4], torch.tensor([[word]])], dim=1)
        close(part[i:i + 1], tower.tokens(sentence)[:, 4:], atol=1e-12)
    with pytest.raises(ValueError, match="token 11 of a text tower of 10"):
        tower.step(IDS[:, :1], tower.step(IDS, tower.start_cache(2))[1])


@torch.no_grad()
def test_a_hidden_word_is_replaced_before_its_place_is_added():
    tower = text_tower(masked_text=True)
    hidden = torch.zeros_like(IDS, dtype=torch.bool)
    hidden[:, 2] = True
    other = IDS.clone()
    other[:, 2] = 11
    assert torch.equal(tower(IDS, hidden)[0], tower(other, hidden)[0])
    tower.embed.weight[11] = tower.mask_embedding[0, 0]
    assert torch.equal(tower(IDS, hidden)[0], tower(other)[0])


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
    """Two clips of the same caption are no negatives of each other (ViCLIP, VTC with shared ids)."""
    video, text = torch.randn(2, 4, 8), torch.tensor(1.5)
    targets, video, words = torch.tensor([4, 9, 4, 2]), video[0], video[1]
    logits = text.exp() * F.normalize(video, dim=-1) @ F.normalize(words, dim=-1).T
    truth = torch.eye(4)
    truth[0, 2] = truth[2, 0] = 1
    truth /= truth.sum(dim=1, keepdim=True)
    expected = -((truth * logits.log_softmax(1)).sum() + (truth * logits.T.log_softmax(1)).sum()) / 8
    close(contrastive_loss(video, words, text, targets=targets), expected)
    close(contrastive_loss(video, words, text, targets=torch.arange(4)), contrastive_loss(video, words, text))


@pytest.mark.parametrize("targets", [None, torch.tensor([0, 1, 2, 0, 3, 0, 1, 5, 6, 7, 8])])
@pytest.mark.parametrize("rows", [1, 4, 11, 64])
def test_in_blocks_the_loss_and_its_gradients_are_the_same(rows, targets):
    """To rounding in float64, the scale's gradient included."""
    found = []
    for way in (0, rows):
        torch.manual_seed(1)
        video, text = (torch.randn(11, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
        scale = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
        loss = contrastive_loss(video, text, scale, targets=targets, rows=way)
        (3 * loss).backward()
        found.append((loss.detach(), video.grad, text.grad, scale.grad))
    for a, b in zip(*found):
        assert (a - b).abs().max() < 1e-12


def test_large_batches_are_compared_in_blocks_by_themselves(monkeypatch):
    monkeypatch.setattr(clip_video, "BLOCKED_ABOVE", 8)
    monkeypatch.setattr(clip_video, "BLOCK_ROWS", 3)
    video = torch.randn(9, 4, requires_grad=True)
    loss = contrastive_loss(video, torch.randn(9, 4), torch.tensor(1.0))
    assert "BlockedLoss" in str(loss.grad_fn)
    assert "BlockedLoss" not in str(contrastive_loss(video[:8], torch.randn(8, 4), torch.tensor(1.0)).grad_fn)


@pytest.mark.parametrize("rows", [0, 2])
def test_under_autocast_the_loss_stays_in_float32(rows):
    """bfloat16 has 8 bits: logits up to 100 would be off by 0.4."""
    video = torch.randn(6, 16).bfloat16().requires_grad_()
    text = torch.randn(6, 16).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = contrastive_loss(video, text, torch.tensor(4.0), rows=rows)
        loss.backward()
    assert loss.dtype == torch.float32
    close(loss.detach(), contrastive_loss(video.detach().float(), text.float(), torch.tensor(4.0)), atol=1e-5)


@pytest.mark.parametrize("kind", ["frames", "joint"])
def test_the_factor_on_the_cosines_never_exceeds_100(kind):
    """In training, however hard the optimiser pushes (CLIP, Sec. 2.5). InternVideo's is also at least 1."""
    model = VideoCLIP("tiny", kind=kind, frames=2, image_size=16, vocabulary=60, context=8)
    video, ids = torch.randn(2, 3, 2, 16, 16), torch.randint(60, (2, 8))
    model.scale.data.fill_(1e-4 if kind == "joint" else 9.0)
    assert model(video, ids)[2].exp() <= 100.001
    model.scale.data.fill_(50.0 if kind == "joint" else -3.0)
    factor = model(video, ids)[2].exp()
    assert factor < 1 if kind == "joint" else factor == 1
    model.eval().scale.data.fill_(5.0)
    model(video, ids)
    assert model.scale == 5                                                  # evaluation changes nothing


def two_processes(rank, folder, world):
    """One of `world` processes: its third of the batch, its gradients, averaged as data parallel does."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank,
                                         world_size=world)
    towers, video, text, targets, scale = distributed_case()
    mine = slice(3 * rank, 3 * rank + 3)
    found = []
    for shared in (None, targets[mine]):
        for rows in (0, 2):
            loss = contrastive_loss(towers[0](video[mine]), towers[1](text[mine]), scale, targets=shared,
                                    gather=True, rows=rows)
            parameters = [*towers.parameters(), scale]
            grads = torch.autograd.grad(loss, parameters)
            for grad in grads:
                torch.distributed.all_reduce(grad)
            found.append([loss.detach()] + [grad / world for grad in grads])
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def distributed_case():
    torch.manual_seed(3)
    towers = torch.nn.ModuleList([torch.nn.Linear(5, 4), torch.nn.Linear(7, 4)])
    scale = torch.nn.Parameter(torch.tensor(1.2))
    return towers, torch.randn(6, 5), torch.randn(6, 7), torch.tensor([0, 1, 2, 1, 0, 5]), scale


def test_two_processes_have_the_loss_and_gradients_of_one(tmp_path):
    """Negatives are global, and the gradient flows back through the gathering."""
    torch.multiprocessing.spawn(two_processes, (str(tmp_path), 2), nprocs=2)
    towers, video, text, targets, scale = distributed_case()
    for i, shared in enumerate((None, None, targets, targets)):
        loss = contrastive_loss(towers[0](video), towers[1](text), scale, targets=shared)
        expected = [loss.detach(), *torch.autograd.grad(loss, [*towers.parameters(), scale])]
        for rank in range(2):
            for a, b in zip(torch.load(tmp_path / f"{rank}.pt")[i], expected):
                assert (a - b).abs().max() < 1e-6
    x = torch.randn(3)
    assert gather_with_gradient(x) is x                                      # alone


def steps_of(model):
    """Both encoders, and the question."""
    return lambda v, t: model(v, t)[:2], lambda v, t: contrastive_loss(v, t, model.logit_scale)


def test_a_batch_in_cached_pieces_has_the_gradients_of_the_whole():
    """GradCache: with towers that draw nothing, equal to one large batch within rounding."""
    found = []
    for size in (None, 2, 7):
        model = load_internvideo().double()
        video, ids = clip(5).double(), (torch.arange(50).view(5, 10) * 7) % 48
        encode, question = steps_of(model)
        loss = question(*(encode(video, ids) if size is None else in_pieces(encode, size, video, ids)))
        loss.backward()
        found.append([loss.detach()] + [p.grad for p in model.parameters() if p.grad is not None])
    for other in found[1:]:
        assert len(other) == len(found[0]) > 40
        for a, b in zip(found[0], other):
            assert (a - b).abs().max() < 1e-10


def test_cached_pieces_see_the_random_numbers_of_the_whole_batch_both_times():
    """Else the gradients would belong to other masks, and be those of another batch."""
    found = []
    for cached in (False, True):
        model = VideoCLIP.from_official(viclip_state()).train()
        drop = attention.Dropout(0.5)
        torch.manual_seed(5)
        video, ids, loss = clip(4), IDS.repeat(2, 1), steps_of(model)[1]

        def encode(v, t):
            return model.encode_video(v, 0.5), drop(model.encode_text(t))  # noqa: B023

        value = loss(*(in_pieces(encode, 2, video, ids) if cached else encode(video, ids)))
        value.backward()
        found.append((value.detach(), model.visual.times.grad, model.text.embed.weight.grad, torch.rand(2)))
    for a, b in zip(*found):
        close(a, b, atol=1e-5)


def test_cached_pieces_keep_no_activations():
    model = load_internvideo()
    encode, _ = steps_of(model)
    kept = []

    def bytes_kept(run):
        kept.append(0)

        def pack(x):
            kept[-1] += x.nbytes
            return x
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            return run()

    video, ids = clip(4), IDS.repeat(2, 1)
    bytes_kept(lambda: encode(video, ids))
    bytes_kept(lambda: in_pieces(encode, 1, video, ids))
    assert kept[1] < kept[0] / 5


def test_a_frozen_text_tower_is_no_obstacle_to_cached_pieces():
    model = VideoCLIP.from_official(viclip_state())
    model.text.requires_grad_(False)
    encode, question = steps_of(model)
    question(*in_pieces(encode, 1, clip(2), IDS)).backward()
    assert model.visual.times.grad is not None and model.text.positions.grad is None


def test_under_autocast_cached_pieces_still_teach_every_weight():
    """Autocast keeps its bfloat16 copies of weights; those of a pass without a graph have no way back."""
    model = VideoCLIP.from_official(viclip_state())
    encode, question = steps_of(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = question(*in_pieces(encode, 1, clip(2), IDS))
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


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


# What it is good for ------------------------------------------------------------------------------


def test_a_constant_similarity_scores_nothing():
    """Official code lets ties win, so that a broken model scores 100 %."""
    metrics = retrieval_metrics(torch.ones(20, 20))
    assert metrics["t2v_R@10"] == metrics["v2t_R@10"] == 0 and metrics["t2v_MdR"] == 20
    assert metrics["dsl_t2v_R@10"] == metrics["dsl_v2t_R@10"] == 0


def test_ranks_by_hand():
    S = torch.tensor([[0.9, 0.9, 0.1], [0.2, 0.8, 0.3], [0.5, 0.1, 0.4]])
    metrics = retrieval_metrics(S)                                           # t2v ranks 2, 1, 2
    assert metrics["t2v_R@1"] == pytest.approx(100 / 3) and metrics["t2v_R@5"] == 100
    assert metrics["t2v_MdR"] == 2 and metrics["t2v_MnR"] == pytest.approx(5 / 3)
    assert metrics["v2t_MnR"] == pytest.approx((1 + 2 + 1) / 3)              # columns: 1, 2, 1


def test_the_dual_softmax_by_hand():
    """t2v weighs by a softmax over texts, v2t by one over videos, without a temperature."""
    S = [[2.0, 2.1, 0.0], [0.0, 5.0, 0.5], [0.3, 1.0, 0.5]]                  # all texts like video 1
    down = [sum(math.exp(S[i][j]) for i in range(3)) for j in range(3)]
    along = [sum(math.exp(x) for x in row) for row in S]
    t2v = [[S[i][j] * math.exp(S[i][j]) / down[j] for j in range(3)] for i in range(3)]
    v2t = [[S[i][j] * math.exp(S[i][j]) / along[i] for j in range(3)] for i in range(3)]
    rank = lambda row, i: 1 + sum(x >= row[i] for j, x in enumerate(row) if j != i)  # noqa: E731
    metrics = retrieval_metrics(torch.tensor(S))
    assert metrics["dsl_t2v_MnR"] == pytest.approx(sum(rank(row, i) for i, row in enumerate(t2v)) / 3)
    assert metrics["dsl_v2t_MnR"] == pytest.approx(sum(rank(col, i) for i, col in enumerate(zip(*v2t))) / 3)
    assert metrics["dsl_t2v_MnR"] != metrics["t2v_MnR"]                      # it does change something


def test_the_order_of_the_test_set_does_not_matter():
    S = torch.randn(12, 12).round(decimals=1)
    shuffle = torch.randperm(12)
    same = retrieval_metrics(S[shuffle][:, shuffle])
    assert same == pytest.approx(retrieval_metrics(S))
    texts = torch.randperm(12)
    assert retrieval_metrics(S[texts], owner=texts) == pytest.approx(retrieval_metrics(S))


def test_a_video_with_several_captions_is_found_by_its_best():
    """Own captions do not compete with each other, not even when equal."""
    S = torch.tensor([[9.0, 1.0], [9.0, 8.0], [2.0, 5.0], [1.0, 5.0], [1.0, 3.0]])
    owner = torch.tensor([0, 0, 1, 1, 1])
    metrics = retrieval_metrics(S, owner)
    assert metrics["t2v_R@1"] == 100 and metrics["v2t_R@1"] == 50
    assert metrics["v2t_MnR"] == 1.5                                         # the 8 beats the 5s of video 1
    S[0, 1] = 7                                                              # now two strangers beat them
    assert retrieval_metrics(S, owner)["v2t_MnR"] == 2
    assert retrieval_metrics(S, owner, grouped=True)["v2t_MnR"] == 1.5       # but both are of video 0


@pytest.mark.parametrize("S, owner, words", [
    (torch.randn(3, 4), None, "each of 4 videos"), (torch.randn(3), None, "expected numbers"),
    (torch.randn(3, 2), torch.tensor([0, 0, 0]), "at least once"),
    (torch.full((2, 2), math.nan), None, "expected numbers")])
def test_retrieval_of_nonsense_is_refused(S, owner, words):
    with pytest.raises(ValueError, match=words):
        retrieval_metrics(S, owner)


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
    assert len(clip_video.PROMPTS) == len(set(clip_video.PROMPTS)) == 16
    assert all(prompt.count("{}") == 1 for prompt in clip_video.PROMPTS)


def test_class_names_go_into_every_prompt():
    tokenizer = train_tokenizer(CAPTIONS, 600)
    model = VideoCLIP("tiny", kind="frames", frames=1, image_size=16, context=20,
                      vocabulary=tokenizer.vocabulary).eval()
    found = clip_video.embed_classes(model, tokenizer, ["orbiting", "a {set}"])
    assert found.shape == (16, 2, 128)
    ids, _ = tokenizer.encode(["The man is orbiting"], 20)
    close(found[14, 0], F.normalize(model.encode_text(ids), dim=-1)[0].detach())


def test_a_protocol_is_one_line_with_everything_in_it():
    line = protocol("MSVD test", videos=670, captions=27763, frames=12, sampling="uniform",
                    crop="centre crop", size=224, merge=0.25)
    for word in ("MSVD test", "670 videos", "27763 captions", "12 frames", "uniform", "centre crop 224",
                 "0.25", "dual softmax", "best own caption"):
        assert word in line
    assert "\n" not in line


# The tokenizer ------------------------------------------------------------------------------------

CAPTIONS = ["a red ring orbits clockwise", "a small blue star spins", "we see two circles that meet",
            "the blue ring slides left"] * 3


def test_a_tokenizer_learns_words_and_gives_the_text_back(tmp_path):
    tokenizer = train_tokenizer(CAPTIONS, 700)
    assert tokenizer.end == tokenizer.vocabulary - 1 == tokenizer.start + 1  # the largest, as in CLIP
    ids, is_token = tokenizer.encode(["a blue ring", "the Star  spins\n"], 12)
    assert ids.shape == is_token.shape == (2, 12) and ids.dtype == torch.int64
    assert is_token.sum(dim=1).tolist() == [5, 5] and (ids[~is_token] == tokenizer.pad).all()
    assert tokenizer.decode(ids) == ["a blue ring", "the star spins"]
    assert tokenizer.encode(["a blue ring"], 12, trim=True)[0].shape == (1, 5)
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert torch.equal(again.encode(CAPTIONS)[0], tokenizer.encode(CAPTIONS)[0])
    assert (again.start, again.end, again.pad, again.vocabulary) == (
        tokenizer.start, tokenizer.end, tokenizer.pad, tokenizer.vocabulary)
    assert torch.equal(train_tokenizer(CAPTIONS, 700).encode(CAPTIONS)[0], tokenizer.encode(CAPTIONS)[0])


def test_a_token_that_two_merges_write_has_one_number():
    """Else ids would run past the vocabulary, and past the embedding."""
    pairs = [("a", "b"), ("ab", "c</w>"), ("b", "c</w>"), ("a", "bc</w>")]
    tokenizer = clip_video.Tokenizer(clip_video.byte_pairs(pairs))
    assert tokenizer.vocabulary == 512 + 3 + 2 == tokenizer.end + 1
    assert tokenizer.decode(tokenizer.encode(["abc"], 4)[0]) == ["abc"]


@pytest.mark.parametrize("text", ["Ωmega & ÆTHER", "你好 world", "\U0001f680 42!", "ΟΔΥΣΣΕΥΣ", "it's <b>"])
def test_any_text_survives_even_of_letters_never_seen(text):
    """Bytes are in the vocabulary from the start, so nothing is unknown."""
    found = train_tokenizer(CAPTIONS, 600).decode(train_tokenizer(CAPTIONS, 600).encode(text)[0])[0]
    assert found.replace(" ", "") == text.lower().replace(" ", "")


def test_clips_words_are_cleaned_as_clip_cleans_them():
    tokenizer = train_tokenizer(CAPTIONS, 600)
    clean = tokenizer.clean
    assert clean("  Tom &amp;amp; Jerry\t&lt;3 ") == "tom & jerry <3"
    words = lambda text: tokenizer.engine.pre_tokenizer.pre_tokenize_str(clean(text))  # noqa: E731
    assert [word for word, _ in words("They're 42, ok?!")] == ["they", "'re", "4", "2", ",", "ok", "?!"]


def test_a_caption_that_is_too_long_still_ends_with_the_end():
    tokenizer = train_tokenizer(CAPTIONS, 600)
    ids, is_token = tokenizer.encode(["a red ring " * 40, ""], 9)
    assert ids[0, -1] == tokenizer.end and is_token[0].all()
    assert ids[1, :2].tolist() == [tokenizer.start, tokenizer.end] and is_token[1].sum() == 2
    assert tokenizer.decode(ids)[1] == ""


@pytest.mark.parametrize("texts, context, words", [
    ([], 9, "at least one caption"), (["a"], 1, "two tokens"), ([None], 9, "must be text, got NoneType"),
    (["half \ud83d"], 9, "half a character")])
def test_what_cannot_be_read_is_refused_in_a_line(texts, context, words):
    with pytest.raises(ValueError, match=words) as error:
        train_tokenizer(CAPTIONS, 600).encode(texts, context)
    assert "\n" not in str(error.value)


def test_files_that_are_no_tokenizers_are_refused_in_a_line(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "bpe.txt.gz").write_bytes(b"no gzip")
    for name in ("tokenizer.json", "bpe.txt.gz", "absent.json"):
        with pytest.raises(ValueError, match="not ") as error:
            load_tokenizer(tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="515"):
        train_tokenizer(CAPTIONS, 100)
    with pytest.raises(ValueError, match="no captions"):
        train_tokenizer([" "])


# The command --------------------------------------------------------------------------------------


def test_the_command_explains_itself_and_answers_mistakes_with_a_line(capsys, tmp_path):
    assert clip_video.main([]) == 0
    assert "(4, 4, 65, 192)" in capsys.readouterr().out
    model = VideoCLIP("tiny", frames=2, image_size=16, vocabulary=600, context=8)
    weights.save(tmp_path, model, model.config)
    for arguments, words in ((["x.mp4", "--text", "a"], "--weights"),
                             (["x.mp4", "--text", "a", "--weights", "nowhere"], "no such file"),
                             (["x.mp4", "--text", "a", "--weights", str(tmp_path)], "tokenizer.json")):
        assert clip_video.main(arguments) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1


def test_the_command_says_which_text_fits(capsys, tmp_path):
    import av
    tokenizer = train_tokenizer(CAPTIONS, 600)
    tokenizer.save(tmp_path)
    model = VideoCLIP("tiny", frames=2, image_size=16, vocabulary=tokenizer.vocabulary, context=16)
    weights.save(tmp_path, model, model.config)
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        for _ in range(5):
            pixels = torch.randint(256, (32, 32, 3), dtype=torch.uint8).numpy()
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert clip_video.main([str(tmp_path / "clip.mp4"), "--weights", str(tmp_path), "--text", "a ring",
                            "--text", "a star"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split("  ")[-1] for line in lines) == ["a ring", "a star"]
    assert sum(float(line.split()[0]) for line in lines) == pytest.approx(1, abs=2e-4)


def test_sizes_are_the_published_ones():
    """Parameters of CLIP B/16 without building it twice: the sum over its tensors."""
    with torch.device("meta"):
        model = VideoCLIP("b16", kind="frames")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == 150
    assert uniformerv2.SIZES["b16"].width == 768


# ------------------------------------------------------------------------------- averages of weights


def test_merging_averages_what_clip_brought_and_nothing_else():
    """WiSE-FT; CLIP of twelve blocks and more, of which the published list forgets the thirteenth."""
    size = uniformerv2.Size(8, 14, 2, 16, 8, 16)

    def filled(value, **options):
        model = VideoCLIP(size, text_size=TextSize(8, 2, 2), frames=2, image_size=16, vocabulary=20, context=6, **options)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data.fill_(value)
        return model

    for as_published in (False, True):
        state = clip_video.merge(filled(1), filled(5, kind="frames"), 0.25, as_published=as_published).state_dict()
        merged = {name for name, value in state.items() if bool((value == 2).all())}
        assert all(bool((state[name] == 1).all()) for name in state.keys() - merged)
        assert {"text.positions", "visual.class_token", "visual_proj.weight", "text.blocks.1.mlp.fc1.weight",
                "visual.blocks.11.attn.qkv.weight"} <= merged
        assert ("visual.blocks.12.attn.qkv.weight" in merged) is not as_published
        assert not any("global" in name or "balance" in name or name == "scale" for name in merged)
    with pytest.raises(ValueError, match="not of one size"):
        clip_video.merge(filled(1), VideoCLIP(size, text_size=TextSize(4, 2, 2), frames=2, image_size=16, vocabulary=20, context=6))
