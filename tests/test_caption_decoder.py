"""What a caption decoder promises.

The network:   the numbers of the official code; equal to plain attention written out by hand; the
               future is invisible; the order of video tokens is irrelevant; the video matters
The loss:      ln V at the start; the shift by one; padding is free, the end token is not
The model:     one pass gives what both losses take; its parts read its runs
Decoding:      the cache changes nothing; greedy = argmax in a loop; one beam = greedy; a wide beam
               finds the likeliest sentence; the end stops a row; minimum, maximum, nucleus
Weights:       with or without prefix, beta honoured, everything else refused by name
"""

import itertools
import math
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_summary, official_fill, values
from torch import nn

import weights
from attention import Block, Context, Mask, quick_gelu, reference_attention
import caption_decoder
import clip_video
from caption_decoder import (CaptionDecoder, VideoText, caption_loss, generate, rotary_frequencies,
                             rotate)
from tasks.caption_search import Beams, Nucleus, reorder
from tasks.captioning import attention_maps, decoder_maps
from weights import WeightsError
from weights.caption_decoder import OFFICIAL
from weights.official import spell

START, END = 0, 1


class ToyTower(nn.Module):
    """A causal text tower with the protocol of `generate`. It caches the input of each block."""

    def __init__(self, vocabulary, width, heads=2, depth=2, places=80):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.places = nn.Parameter(torch.randn(places, width))
        self.blocks = nn.ModuleList(Block(width, heads, eps=1e-5, activation=quick_gelu)
                                    for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.calls = 0

    def start_cache(self, batch):
        return [self.places.new_empty(batch, 0, self.places.shape[1]) for _ in self.blocks]

    def step(self, ids, cache):
        self.calls += 1
        place, n, grown = cache[0].shape[1], ids.shape[1], []
        x = self.embed(ids) + self.places[place:place + n]
        for block, past in zip(self.blocks, cache):
            grown.append(torch.cat([past, x], dim=1))
            x = block(grown[-1], Context(Mask(causal=True), last=n))
        return self.norm(x), grown

    def forward(self, ids):
        return self.step(ids, self.start_cache(len(ids)))[0]


def make(vocabulary=11, seed=0, **options):
    """A decoder and a tower with lively weights, in float64, and a batch of two videos."""
    torch.manual_seed(seed)
    options = {"heads": 4, "depth": 2, "visual_width": 24, "queries": 6, **options}
    decoder = CaptionDecoder(32, vocabulary=vocabulary, **options).double().eval()
    tower = ToyTower(vocabulary, 32).double().eval()
    for parameter in decoder.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=2 * parameter.shape[-1]**-0.5)
    return decoder, tower, torch.randn(2, 15, 24, dtype=torch.float64)


def sentences(vocabulary=11, batch=3, length=9):
    """Word ids (B, L) with start, end and padding, and which of them are text."""
    ids = torch.randint(2, vocabulary, (batch, length), generator=torch.Generator().manual_seed(1))
    is_text = torch.arange(length) < torch.tensor([length, 5, 2])[:batch, None]
    ids[:, 0] = START
    ids[torch.arange(batch), is_text.sum(dim=1) - 1] = END
    return ids.masked_fill(~is_text, 0), is_text


# ------------------------------------------------------------------------------------------------
# The network


def filled(name, shape):
    """The deterministic tensor of that official name; see conftest.py."""
    return official_fill({name: shape})[name]


def fill_clip_blocks(blocks, prefix):
    """Blocks of a CLIP tower, under CLIP's names."""
    names = {"norm1": "ln_1", "norm2": "ln_2", "qkv.": "in_proj_", "proj": "out_proj",
             "fc1": "c_fc", "fc2": "c_proj"}
    for i, block in enumerate(blocks):
        for key, tensor in block.state_dict().items():
            name = re.sub("norm1|norm2|qkv.|proj|fc1|fc2", lambda m: names[m[0]], key)
            tensor.copy_(filled(f"{prefix}{i}.{name}", tensor.shape))


def official_state(decoder, prefix=""):
    """What an official file of this decoder would hold, filled with reference tensors."""
    return {prefix + spell(key, OFFICIAL): tensor.clone() if key.endswith(("beta", "frequencies"))
            else filled(spell(key, OFFICIAL), tensor.shape)
            for key, tensor in decoder.state_dict().items()}


def test_logits_and_loss_are_those_of_the_official_code():
    """Expected numbers: printed by the official modules on the same deterministic weights, towers
    included (InternVideo-MM: three vision blocks frame by frame, two causal text blocks)."""
    video = torch.from_numpy(values("input", 2 * 3 * 4 * 32**2)).float().view(2, 3, 4, 32, 32)
    kernel = filled("visual.conv1.weight", (24, 3, 1, 16, 16))[:, :, 0]
    frames = F.conv2d(video.transpose(1, 2).flatten(0, 1), kernel, stride=16)
    frames = frames.flatten(2).transpose(1, 2)                               # (B*T, S, C)
    first = filled("visual.class_embedding", (24,)).expand(8, 1, 24)
    tokens = torch.cat([first, frames], 1) + filled("visual.positional_embedding", (5, 24))
    tokens = F.layer_norm(tokens, (24,), filled("visual.ln_pre.weight", (24,)),
                          filled("visual.ln_pre.bias", (24,)))
    blocks = [Block(24, 2, eps=1e-5, activation=quick_gelu) for _ in range(3)]
    fill_clip_blocks(blocks, "visual.transformer.resblocks.")
    for block in blocks:
        tokens = block(tokens)
    visual = tokens.unflatten(0, (2, 4)).transpose(1, 2)                     # (B, S+1, T, C)
    assert_summary(visual.permute(2, 0, 1, 3), -33.762920, None,             # (S+1, B, T, C) there
                   [-0.475680, -0.928520, 0.635591, 0.888292])

    tower = ToyTower(50, 128, places=10)
    with torch.no_grad():
        tower.embed.weight.copy_(filled("token_embedding.weight", (50, 128)))
        tower.places.copy_(filled("positional_embedding", (10, 128)))
        tower.norm.weight.copy_(filled("ln_final.weight", (128,)))
        tower.norm.bias.copy_(filled("ln_final.bias", (128,)))
        fill_clip_blocks(tower.blocks, "transformer.resblocks.")
        ids = torch.tensor([[48, 5, 6, 7, 49, 0, 0, 0, 0, 0], [48, 9, 8, 3, 2, 1, 49, 0, 0, 0]])
        text = tower(ids)
        assert_summary(text, 13.826892, None, [-0.568982, 0.893855, -0.220480, -0.665796])

        like = CaptionDecoder(128, heads=2, depth=2, visual_width=24, vocabulary=50, queries=6)
        decoder = CaptionDecoder.from_official(official_state(like))
        assert decoder.config == like.config
        logits = decoder(visual.flatten(1, 2), text[:, :-1])
    assert logits.shape == (2, 9, 50)
    assert_summary(logits, -74.498770, 734.072956, [1.890113, -0.373242, -0.437422, -1.555612],
                   -1.039310)
    assert caption_loss(logits, ids, ids != 0).item() == pytest.approx(4.702718, abs=1e-5)


def test_a_layer_is_plain_attention_with_the_single_key_head_repeated():
    """Multi-query attention and the parallel MLP, written out the long way."""
    decoder, _, visual = make()
    x = torch.randn(2, 5, 32, dtype=torch.float64)

    def norm(n, y):
        return F.layer_norm(y, (32,), n.gamma, n.beta)

    block = decoder.self_blocks[0]
    q, k, v, inner = (norm(block.norm, x) @ block.fused.weight.T).split([32, 8, 8, 256], dim=-1)
    out = torch.zeros(2, 5, 32, dtype=torch.float64)
    for head in range(4):
        for t in range(5):
            turned = rotate(q[:, :, None, 8 * head:8 * head + 8], block.angles(0, 5, "cpu"))[:, t]
            keys = rotate(k[:, :, None], block.angles(0, 5, "cpu"))[:, :t + 1, 0]
            share = (turned @ keys.transpose(1, 2) / 8**0.5).softmax(dim=-1)  # (B, 1, t+1)
            out[:, t, 8 * head:8 * head + 8] = (share @ v[:, :t + 1])[:, 0]
    mlp = (F.silu(inner[..., 128:]) * inner[..., :128]) @ block.fc2.weight.T
    torch.testing.assert_close(block(x)[0], x + out @ block.proj.weight.T + mlp)

    cross, pooled = decoder.cross_blocks[0], decoder.pool(visual)
    normed, (k, v) = norm(cross.norm, x), (pooled @ cross.attn.kv.weight.T).chunk(2, dim=-1)
    q = (normed @ cross.attn.q.weight.T).unflatten(-1, (4, 8)).transpose(1, 2)
    out = reference_attention(q, k[:, None].expand(-1, 4, -1, -1), v[:, None].expand(-1, 4, -1, -1))
    out = out.transpose(1, 2).flatten(2) @ cross.attn.proj.weight.T
    torch.testing.assert_close(cross(x, *cross.attn.keys(pooled)),
                               x + out + cross.fc2(F.silu((cross.fc1(normed))[..., 128:])
                                                   * cross.fc1(normed)[..., :128]))


def test_rotation_makes_products_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    angle = rotary_frequencies(8).double()[None]

    def product(m, n):
        return (rotate(q, m * angle) * rotate(k, n * angle)).sum()

    torch.testing.assert_close(product(3, 1), product(40, 38))
    assert abs(product(3, 1) - product(3, 2)) > 1e-3


def test_the_future_is_invisible():
    """Otherwise teacher forcing would let it copy the answer."""
    decoder, tower, visual = make()
    ids = torch.randint(11, (2, 9))
    changed = ids.clone()
    changed[:, 5:] = (ids[:, 5:] + 3) % 11
    before, after = decoder(visual, tower(ids)), decoder(visual, tower(changed))
    torch.testing.assert_close(before[:, :5], after[:, :5], atol=1e-12, rtol=0)
    assert (before[:, 5:] - after[:, 5:]).abs().amax(dim=-1).min() > 1e-3


def test_the_order_of_video_tokens_is_irrelevant():
    """Space first or time first: pooling has no positions, so both flattenings are one."""
    decoder, tower, visual = make()
    text = tower(torch.randint(11, (2, 6)))
    space_first = visual.unflatten(1, (5, 3)).transpose(1, 2).flatten(1, 2)
    torch.testing.assert_close(decoder(space_first, text), decoder(visual, text), atol=1e-12,
                               rtol=0)


def test_another_video_gives_another_distribution():
    """The known failure is one caption for every image."""
    decoder, tower, visual = make()
    text = tower(torch.randint(11, (1, 6))).expand(2, -1, -1)
    chance = decoder(visual, text).softmax(dim=-1)
    assert (chance[0] - chance[1]).abs().sum(dim=-1).min() > 0.01


def test_a_model_cast_to_bfloat16_keeps_exact_angles():
    decoder, _, _ = make()
    exact = decoder.self_blocks[0].angles(70, 5, "cpu").float()
    assert torch.equal(decoder.bfloat16().self_blocks[0].angles(70, 5, "cpu"), exact)


# ------------------------------------------------------------------------------------------------
# The loss


def test_loss_at_the_start_is_near_ln_V():
    """A little above: logits of variance 0.02**2 * 768 add half of it on average."""
    torch.manual_seed(0)
    decoder = CaptionDecoder(64, heads=4, depth=2, visual_width=24, vocabulary=500, queries=6)
    ids = torch.randint(500, (32, 9))
    logits = decoder(torch.randn(32, 15, 24), torch.randn(32, 8, 64))
    assert caption_loss(logits, ids, ids >= 0).item() == pytest.approx(math.log(500) + 0.15,
                                                                       abs=0.05)


def test_position_t_is_asked_for_word_t_plus_1():
    """A decoder that is sure of the next word pays nothing; one sure of the current word, a lot."""
    ids, is_text = sentences()
    assert caption_loss(100.0 * F.one_hot(ids[:, 1:], 11), ids, is_text) < 1e-6
    assert caption_loss(100.0 * F.one_hot(ids[:, :-1], 11), ids, is_text) > 10
    with pytest.raises(ValueError, match="without the last position"):
        caption_loss(torch.zeros(3, 9, 11), ids, is_text)


def test_padding_carries_no_loss_and_the_end_does():
    ids, is_text = sentences()
    logits = torch.randn(3, 8, 11, requires_grad=True)
    caption_loss(logits, ids, is_text).backward()
    asked = logits.grad.abs().sum(dim=-1) > 0
    assert torch.equal(asked, is_text[:, 1:])
    assert asked[ids[:, 1:] == END].all()


def test_two_half_batches_sum_to_the_whole_when_the_count_is_given():
    """What processes that share a batch need: rows differ in length, so means do not average."""
    ids, is_text = sentences(batch=2)
    logits = torch.randn(2, 8, 11)
    words = is_text[:, 1:].sum()
    halves = [caption_loss(logits[i:i + 1], ids[i:i + 1], is_text[i:i + 1], count=words)
              for i in range(2)]
    torch.testing.assert_close(sum(halves), caption_loss(logits, ids, is_text))


# ------------------------------------------------------------------------------------------------
# The whole model of stage 2


def small_model(**options):
    """A VideoText for clips of two frames of 16 pixels, and a batch of three pairs."""
    torch.manual_seed(0)
    clip = clip_video.VideoCLIP("tiny", frames=2, image_size=16, vocabulary=50, context=8, end=END,
                                **options)
    decoder = CaptionDecoder(128, heads=2, depth=2, visual_width=192, vocabulary=50, queries=4)
    return VideoText(clip, decoder), torch.randn(3, 3, 2, 16, 16), sentences(50, length=8)[0]


def test_one_pass_gives_what_both_losses_take():
    model, video, ids = small_model()
    model.eval()
    video_embedding, text_embedding, hidden = model(video, ids)
    expected = model.clip(video, ids)
    torch.testing.assert_close(video_embedding, expected[0])
    torch.testing.assert_close(text_embedding, expected[1])
    tokens = model.clip.encode_video_tokens(video)[1].flatten(1, 2)
    text = model.clip.encode_text_tokens(ids)[1]
    torch.testing.assert_close(model.caption_decoder.logits(hidden),
                               model.caption_decoder(tokens, text[:, :-1]))


def test_in_training_the_scale_is_kept_in_its_range_and_in_evaluation_not():
    model, video, ids = small_model()
    for train in (False, True):
        model.train(train).clip.scale.data.fill_(9.0)
        model(video, ids)
        assert (model.clip.logit_scale.exp() <= 100.001) == train


def test_a_model_is_rebuilt_from_its_configuration_and_its_run(tmp_path):
    model, video, ids = small_model()
    model.eval()
    weights.save(tmp_path, model, model.config)
    again = VideoText.from_run(tmp_path)
    assert again.config == model.config == VideoText.from_config(model.config).config
    assert not again.training
    for a, b in zip(again(video, ids), model(video, ids)):
        assert torch.equal(a, b)
    assert {name.split(".")[0] for name in model.state_dict()} == {"clip", "caption_decoder"}


def test_where_words_look_sums_to_one():
    decoder, _, visual = make()
    maps = decoder_maps(decoder, visual, torch.randn(2, 5, 32, dtype=torch.float64))
    assert maps.shape == (2, 5, 15)
    torch.testing.assert_close(maps.sum(dim=-1), torch.ones(2, 5, dtype=torch.float64))


def test_maps_of_a_clip_are_those_of_its_tokens_without_the_class_tokens():
    model, video, ids = small_model(kind="frames")
    maps = attention_maps(model.eval(), video, ids)
    assert maps.shape == (3, 7, 2, 2, 2)                                     # (B, L-1, t, h, w)
    tokens, text = (encode(x)[1] for encode, x in (
        (model.clip.encode_video_tokens, video), (model.clip.encode_text_tokens, ids)))
    expected = decoder_maps(model.caption_decoder, tokens.flatten(1, 2), text[:, :-1])
    torch.testing.assert_close(maps[:, :, 1, 1, 0], expected[:, :, 5 + 1 + 2])


def test_the_command_prints_the_shapes(capsys):
    caption_decoder.main()
    lines = capsys.readouterr().out.splitlines()
    assert any("(B, M, D)" in line and "(1, 260, 192)" in line for line in lines)
    assert "ln V" in lines[-2] and lines[-1].startswith("caption of the untrained model:")


# ------------------------------------------------------------------------------------------------
# Decoding


def test_step_by_step_decoding_is_teacher_forcing():
    """Word by word, and in one go after a prompt of three words."""
    decoder, tower, visual = make()
    ids = torch.randint(11, (2, 9))
    full = decoder(visual, tower(ids))
    for cuts in ([1] * 9, [3, 1, 1, 4]):
        pooled, cache, tower_cache, logits = decoder.pool(visual), None, tower.start_cache(2), []
        for new in ids.split(cuts, dim=1):
            features, tower_cache = tower.step(new, tower_cache)
            hidden, cache = decoder.step(features, pooled, cache)
            logits.append(decoder.logits(hidden))
        torch.testing.assert_close(torch.cat(logits, dim=1), full, atol=1e-10, rtol=0)


def test_reordering_the_caches_is_reordering_the_rows():
    decoder, tower, visual = make()
    ids, index = torch.randint(11, (2, 4)), torch.tensor([1, 1, 0])
    features, tower_cache = tower.step(ids[:, :3], tower.start_cache(2))
    _, cache = decoder.step(features, decoder.pool(visual), None)
    features, _ = tower.step(ids[index, 3:], reorder(tower_cache, index))
    hidden, _ = decoder.step(features, None, reorder(cache, index))
    full = decoder.hidden(visual[index], tower(ids[index]))
    torch.testing.assert_close(hidden, full[:, -1:], atol=1e-10, rtol=0)


def slow_greedy(decoder, tower, visual, maximum, minimum=0):
    """Argmax in a loop, one video at a time, everything computed anew for each word."""
    captions = []
    for video in visual:
        ids = [START]
        while len(ids) <= maximum and ids[-1] != END:
            logits = decoder(video[None], tower(torch.tensor([ids])))[0, -1]
            if len(ids) <= minimum:
                logits[END] = -math.inf
            ids.append(int(logits.argmax()))
        captions.append([i for i in ids[1:] if i != END])
    return captions


def captions_of(decoder, tower, visual, method="greedy", minimum=0, maximum=12, **options):
    search = {"greedy": lambda: None, "beam": lambda **options: Beams(END, **options),
              "nucleus": Nucleus}[method](**options)
    return generate(decoder, tower, visual, start=START, end=END, minimum=minimum, maximum=maximum,
                    search=search)


@pytest.fixture(scope="module")
def many():
    """Twelve videos, with a decoder eager enough to end that its captions differ in length."""
    decoder, tower, _ = make(vocabulary=7, seed=6)
    decoder.vocabulary.bias.data[END] = 1.0
    generator = torch.Generator().manual_seed(4)
    return decoder, tower, 3 * torch.randn(12, 15, 24, dtype=torch.float64, generator=generator)


def test_greedy_is_argmax_in_a_loop_and_one_beam_is_greedy(many):
    decoder, tower, visual = many
    with torch.no_grad():
        expected = slow_greedy(decoder, tower, visual, 12)
    assert len({len(row) for row in expected}) > 3 and len(set(map(tuple, expected))) > 4
    assert captions_of(decoder, tower, visual) == expected
    for penalty in (0.0, 1.0):
        assert captions_of(decoder, tower, visual, method="beam", beams=1,
                           length_penalty=penalty) == expected


def log_probability(decoder, tower, video, words):
    """Of words (with its end, if it has one) given the video, in one pass."""
    logits = decoder(video[None], tower(torch.tensor([[START] + words[:-1]])))[0]
    return logits.log_softmax(dim=-1)[torch.arange(len(words)), words].sum().item()


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_a_wide_beam_finds_the_likeliest_of_all_sentences(many, penalty):
    """Three words of a vocabulary of seven: 259 sentences, all tried."""
    decoder, tower, visual = many
    every = [list(words) + [END] * (n < 3) for n in range(4)
             for words in itertools.product([0, 2, 3, 4, 5, 6], repeat=n)]
    with torch.no_grad():
        for video in visual[:3]:
            best = max(every, key=lambda words: log_probability(decoder, tower, video, words)
                       / len(words)**penalty)
            found = captions_of(decoder, tower, video[None], maximum=3, method="beam", beams=300,
                                length_penalty=penalty)
            assert found == [[word for word in best if word != END]]


def test_beams_do_not_depend_on_the_other_videos_of_the_batch(many):
    decoder, tower, visual = many
    together = captions_of(decoder, tower, visual, method="beam", beams=3)
    alone = [captions_of(decoder, tower, video[None], method="beam", beams=3)[0]
             for video in visual]
    assert together == alone


@pytest.mark.parametrize("method", ["greedy", "beam", "nucleus"])
def test_captions_keep_to_minimum_and_maximum(many, method):
    """The end is forbidden before the minimum; at the maximum a sentence is cut."""
    decoder, tower, visual = many
    options = {"method": method}
    if method == "nucleus":
        options["generator"] = torch.Generator().manual_seed(0)
    bound = captions_of(decoder, tower, visual, minimum=4, maximum=6, **options)
    assert {len(row) for row in bound} <= {4, 5, 6}
    free = [len(row) for row in captions_of(decoder, tower, visual, maximum=6, **options)]
    assert min(free) < 4
    assert all(END not in row for row in captions_of(decoder, tower, visual, **options))
    with pytest.raises(ValueError, match="minimum"):
        captions_of(decoder, tower, visual, minimum=7, maximum=6, **options)


def test_decoding_stops_when_every_sentence_has_ended(many):
    decoder, tower, visual = many
    longest = max(len(row) for row in slow_greedy(decoder, tower, visual[:4], 60))
    assert longest < 60
    tower.calls = 0
    captions_of(decoder, tower, visual[:4], maximum=60)
    assert tower.calls == longest + 1  # one more, for the end


def test_a_nucleus_of_nothing_or_no_temperature_is_greedy_and_a_seed_repeats_itself(many):
    decoder, tower, visual = many
    greedy = captions_of(decoder, tower, visual)
    assert captions_of(decoder, tower, visual, method="nucleus", top_p=1e-9) == greedy
    assert captions_of(decoder, tower, visual, method="nucleus", temperature=1e-6) == greedy
    drawn = [captions_of(decoder, tower, visual, method="nucleus",
                         generator=torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_nucleus_draws_by_probability_and_never_outside():
    """First words of 4000 copies of one video against the model's own distribution."""
    decoder, tower, visual = make(vocabulary=7)
    with torch.no_grad():
        chance = decoder(visual[:1], tower(torch.tensor([[START]])))[0, -1].softmax(dim=-1)
    ranked, word = chance.sort(descending=True)
    inside = int((ranked.cumsum(dim=0) < 0.8).sum()) + 1
    assert 1 < inside < 7
    drawn = captions_of(decoder, tower, visual[:1].expand(4000, -1, -1), maximum=1, top_p=0.8,
                        method="nucleus", generator=torch.Generator().manual_seed(0))
    first = torch.tensor([row[0] if row else END for row in drawn])
    share = torch.bincount(first, minlength=7) / 4000
    expected = torch.zeros(7, dtype=torch.float64)
    expected[word[:inside]] = ranked[:inside] / ranked[:inside].sum()
    assert not share[expected == 0].any()
    torch.testing.assert_close(share.double(), expected, atol=0.04, rtol=0)


def test_it_learns_to_say_which_video_it_sees():
    """Two videos, two captions; the words differ from the first on, so only the video can tell."""
    torch.manual_seed(0)
    decoder = CaptionDecoder(32, heads=2, depth=1, visual_width=24, vocabulary=11, queries=4)
    tower, visual = ToyTower(11, 32, depth=1), torch.randn(2, 15, 24)
    ids = torch.tensor([[START, 4, 5, 6, END, 0], [START, 7, 8, END, 0, 0]])
    is_text = torch.arange(6) < torch.tensor([[5], [4]])
    optimiser = torch.optim.AdamW([*decoder.parameters(), *tower.parameters()], lr=3e-3)
    for _ in range(60):
        hidden = decoder.hidden(visual, tower(ids)[:, :-1])
        loss = caption_loss(decoder.logits(hidden), ids, is_text)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.1
    assert captions_of(decoder, tower, visual) == [[4, 5, 6], [7, 8]]
    assert captions_of(decoder, tower, visual.flip(0), method="beam") == [[7, 8], [4, 5, 6]]


# ------------------------------------------------------------------------------------------------
# Weights


@pytest.fixture
def official():
    like = CaptionDecoder(32, heads=4, depth=2, visual_width=24, vocabulary=11, queries=6)
    return official_state(like, "caption_decoder.")


def test_a_decoder_loads_with_or_without_prefix_or_from_a_whole_checkpoint(official):
    visual, text = torch.randn(1, 9, 24), torch.randn(1, 4, 32)
    bare = {key.removeprefix("caption_decoder."): tensor for key, tensor in official.items()}
    whole = {"state_dict": {**official, "clip.logit_scale": torch.zeros(())}}
    logits = [CaptionDecoder.from_official(source, heads=heads)(visual, text)
              for source, heads in ((official, None), (official, 4), (bare, None), (whole, None))]
    assert all(torch.equal(other, logits[0]) for other in logits[1:])


def test_a_beta_that_is_not_zero_is_honoured_and_not_trained(official):
    visual, text = torch.randn(1, 9, 24), torch.randn(1, 4, 32)
    before = CaptionDecoder.from_official(official)(visual, text)
    key = "caption_decoder.multimodal_layers.1.0.fn.norm.beta"
    official[key] = torch.randn(32)
    decoder = CaptionDecoder.from_official(official)
    assert (decoder(visual, text) - before).abs().max() > 0.01
    assert not any(name.endswith("beta") for name, _ in decoder.named_parameters())


def test_every_missing_extra_or_misshapen_tensor_is_named(official):
    for key in official:
        without = {other: tensor for other, tensor in official.items() if other != key}
        with pytest.raises(WeightsError, match=f"missing: {re.escape(key)}$"):
            CaptionDecoder.from_official(without)
        if not key.endswith("visual_queries"):  # fewer queries are another, valid decoder
            with pytest.raises(WeightsError, match=f"shape: .*{re.escape(key)} "):
                CaptionDecoder.from_official({**official, key: official[key][:-2]})
    for extra in ("bias", "multimodal_layers.0.0.fn.norm.bias"):
        with pytest.raises(WeightsError, match=re.escape(f"unknown: caption_decoder.{extra}")):
            CaptionDecoder.from_official({**official, "caption_decoder." + extra: torch.zeros(1)})
    with pytest.raises(WeightsError, match="holds no caption decoder"):
        CaptionDecoder.from_official({"visual_proj": torch.zeros(2, 2)})
    with pytest.raises(WeightsError, match="heads"):
        CaptionDecoder.from_official(official, heads=5)


def test_other_rotary_frequencies_are_refused_and_rounded_ones_made_exact(official):
    key = "caption_decoder.multimodal_layers.1.0.fn.rotary_emb.inv_freq"
    with pytest.raises(WeightsError, match=re.escape(key)):
        CaptionDecoder.from_official({**official, key: official[key] ** 1.1})
    decoder = CaptionDecoder.from_official({name: t.half() for name, t in official.items()})
    assert torch.equal(decoder.self_blocks[1].frequencies, rotary_frequencies(8))


def test_our_own_runs_load_back(official, tmp_path):
    decoder = CaptionDecoder.from_official(official)
    weights.save(tmp_path, decoder, decoder.config)
    again = CaptionDecoder.from_official(tmp_path)
    assert again.config == decoder.config
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(),
                                                 decoder.state_dict().values()))
