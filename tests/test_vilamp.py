"""ViLAMP's connector and what is asked of it: pooling, order, streaming, budget, gradients."""

import weakref

import numpy as np
import pytest
import torch
from PIL import Image

from tlv import answering, long_video
from tlv.answering import generate_answers
from tlv.ask import ask
from tlv.builders import load_model, with_connector
from tlv.connectors import build_connector
from tlv.data import VideoTextDataset, collate
from tlv.feature_cache import FeatureCache
from tlv.long_video import BudgetError, check_budget, encode_clip, generate
from tlv.merging import MergeStream
from tlv.mp4 import write_video
from tlv.selector import QueryError
from tlv.train import answer_nll
from tlv.video import VideoError
from tlv.vilamp import Vilamp

T, N, WIDTH, LLM, D_Q = 23, 9, 12, 20, 6
MERGINGS = ("learned", "mean", "drop")


def make(**changes):
    torch.manual_seed(0)
    fields = dict(num_keyframes=4, patches_per_frame=N, query_width=D_Q, merging_width=8)
    return Vilamp(WIDTH, LLM, **{**fields, **changes}).eval()


@pytest.fixture
def clip():
    torch.manual_seed(1)
    return torch.randn(T, N, WIDTH), torch.tensor([0, 7, 8, 20]), torch.randn(D_Q)


# ---- the connector --------------------------------------------------------------------------


def test_golden_pooling_of_siglips_grid():
    connector = make(patches_per_frame=729, keyframe_grid=14)
    pooled = connector.pool(torch.arange(729.0)[None, :, None])[0, :, 0]
    assert pooled[:3].tolist() == pytest.approx([13.0, 14.928571, 16.857143], abs=1e-5)
    assert pooled[-1] == pytest.approx(715) and pooled.mean() == pytest.approx(364)
    assert connector.tokens_per_keyframe == 196


@pytest.mark.parametrize("merging, grid", [("learned", 0), ("mean", 2), ("drop", 0), ("drop", 3)])
def test_as_many_tokens_as_promised(clip, merging, grid):
    frames, keyframes, query = clip
    connector = make(merging=merging, keyframe_grid=grid)
    (tokens,) = connector([frames], [keyframes], query[None])
    per_key = grid**2 or N
    assert len(tokens) == 4 * per_key + (0 if merging == "drop" else T - 4)
    assert len(tokens) == connector.num_tokens(T * N)
    assert connector.num_tokens(3 * N) == 3 * per_key  # a clip shorter than K frames


def test_published_budgets():
    fields = dict(num_keyframes=32, patches_per_frame=729)
    assert make(**fields).num_tokens(10_000 * 729) == 33_296
    assert make(**fields, keyframe_grid=14).num_tokens(10_000 * 729) == 16_240


def test_tokens_stand_in_order_of_time(clip):
    frames, keyframes, query = clip
    connector = make(merging="mean")
    (tokens,) = connector([frames], [keyframes], query[None])
    wanted = []
    for frame in range(T):  # one by one
        if frame in keyframes.tolist():
            wanted.append(connector.keyframe_mlp(frames[frame]))
        else:
            wanted.append(connector.frame_mlp(frames[frame].mean(0, keepdim=True)))
    assert torch.allclose(tokens, torch.cat(wanted), atol=1e-6)


@pytest.mark.parametrize("merging", MERGINGS)
@pytest.mark.parametrize("size", [1, 4, 7, 64])
def test_streaming_equals_dense(clip, merging, size):
    frames, keyframes, query = clip
    connector = make(merging=merging)
    stream, found = MergeStream(connector.merging, keyframes, query), []
    for chunk in frames.split(size):
        found += [connector.project(*part) for part in stream.feed(chunk)]
    stream.close()
    (dense,) = connector([frames], [keyframes], query[None])
    assert torch.allclose(torch.cat(found), dense, atol=1e-6)


def test_clips_of_unequal_length_do_not_touch_each_other(clip):
    frames, keyframes, query = clip
    connector = make()
    both = connector([frames, frames[:3]], [keyframes, torch.arange(3)], query.expand(2, -1))
    alone = connector([frames[:3]], [torch.arange(3)], query[None])[0]
    assert torch.allclose(both[1], alone, atol=1e-6) and len(both[0]) == 4 * N + T - 4


def test_every_parameter_gets_a_gradient_and_only_paper_has_none(clip):
    frames, keyframes, query = clip
    connector = make()
    connector([frames], [keyframes], query[None])[0].square().sum().backward()
    gradients = {name: p.grad.abs().sum() for name, p in connector.named_parameters()}
    assert all(g > 0 for name, g in gradients.items()), gradients
    assert not list(make(merging="paper", query_width=WIDTH).merging.parameters())


def test_a_clip_of_keyframes_alone_leaves_no_parameter_without_gradient(clip):
    """Else a rank whose clips are all short would leave the others waiting."""
    connector = make()
    connector([clip[0][:2]], [torch.arange(2)], clip[2][None])[0].sum().backward()
    assert all(p.grad is not None for p in connector.parameters())


@pytest.mark.parametrize("changes, message", [
    (dict(keyframe_grid=4), "a frame is a grid of 3 x 3 patches"),
    (dict(keyframe_grid=2, patches_per_frame=8), "needs a square grid of patches"),
    (dict(merging="paper"), "they are 12 and 6 wide; take 'learned'"),
    (dict(merging="best"), "known are learned, paper, mean, drop"),
])  # fmt: skip
def test_sizes_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_without_a_selector_the_connector_says_what_is_missing():
    with pytest.raises(ValueError, match="name its folder as selector_dir"):
        build_connector("vilamp", vision_width=8, llm_width=8, num_queries=1, num_groups=1,
                        num_layers=1, patches_per_frame=4)


# ---- the model ------------------------------------------------------------------------------


@pytest.fixture
def long_model(build_tiny, pair_dir, tmp_path):
    """A tiny long-video model: 4 patches a frame, 3 keyframes, every frame of 8 fps."""
    model, processor = build_tiny(connector_type="vilamp", selector_dir=pair_dir, sampling="fps",
                                  fps=8.0, max_frames=500, num_keyframes=3, merging_width=8)
    processor.selector.cache_dir = tmp_path / "cache"
    return model, processor


@pytest.fixture
def path(tmp_path, clip_frames):
    write_video(tmp_path / "clip.mp4", clip_frames(100), fps=8)
    return tmp_path / "clip.mp4"


def whole_clip(model, processor, path):
    """Features of all frames at once: what streaming never holds."""
    frames = processor.process_frames(processor.sample(path).frames)
    with torch.no_grad():
        return model.vision_features(frames)  # (T, N, D_v)


def test_two_passes_give_what_the_dense_model_gives(long_model, path):
    model, processor = long_model
    looks = [processor.select(path, query) for query in ("a red circle", "he is running")]
    dense = model.encode_videos(
        video_features=[whole_clip(model, processor, path)] * 2,
        keyframes=[keys for keys, _ in looks], queries=torch.stack([q for _, q in looks]),
    )  # fmt: skip
    found = encode_clip(model, processor, path, looks)
    assert looks[0][0].tolist() != looks[1][0].tolist()
    for tokens, wanted in zip(found, dense, strict=True):
        assert len(tokens) == processor.num_tokens(100) == 3 * 4 + 97
        assert torch.allclose(tokens, wanted, atol=1e-5)


def test_a_clip_is_embedded_once_for_all_queries(long_model, path, monkeypatch):
    model, processor = long_model
    embedded, plain = [], processor.selector.embed_clip

    def embed(path, numbers):
        embedded.append(path)
        return plain(path, numbers)

    monkeypatch.setattr(processor.selector, "embed_clip", embed)
    generate(model, processor, path, [("Where?", "a circle"), ("Who?", "a ring")], 2)
    assert embedded == [path]


def test_answers_equal_plain_generation_from_the_dense_tokens(long_model, path):
    model, processor = long_model
    asked = [("Where?", "a red circle"), ("What is he doing?", "running"),
             ("What is he doing?", "a red circle")]
    said = generate(model, processor, path, asked, max_new_tokens=6)
    features = whole_clip(model, processor, path)
    for (question, query), its in zip(asked, said, strict=True):
        keys, vector = processor.select(path, query)
        ids = long_video._prompt(model, processor, question)
        place = ids.index(model.config.video_token_id)
        ids = ids[:place] + [ids[place]] * processor.num_tokens(100) + ids[place + 1 :]
        out = model.generate(
            input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)),
            video_features=[features], keyframes=[keys], queries=vector[None],
            max_new_tokens=6, do_sample=False,
        )[0, len(ids) :]  # fmt: skip
        assert out.tolist() == its.tokens


def test_prefill_in_pieces_equals_one_piece(long_model, path, monkeypatch):
    model, processor = long_model
    one = generate(model, processor, path, [("Where?", "a park")], max_new_tokens=4)
    monkeypatch.setattr(long_video, "PREFILL", 7)
    pieces = generate(model, processor, path, [("Where?", "a park")], max_new_tokens=4)
    assert one[0].tokens == pieces[0].tokens
    assert one[0].log_probs == pytest.approx(pieces[0].log_probs, abs=1e-4)


def test_saved_and_loaded_it_carries_its_selector(long_model, path, tmp_path):
    model, processor = long_model
    model.save_pretrained(tmp_path / "m")
    processor.save_pretrained(tmp_path / "m")
    again, its_processor = load_model(tmp_path / "m")
    asked = [("Where?", "a red circle")]
    assert generate(again, its_processor, path, asked) == generate(model, processor, path, asked)
    with pytest.raises(ValueError, match="no such folder"):
        (tmp_path / "m" / "selector").rename(tmp_path / "gone")
        load_model(tmp_path / "m")


def test_a_model_takes_another_connector_and_keeps_its_encoder_and_llm(build_tiny, pair_dir):
    model, processor = build_tiny(connector_type="mlp2x_gelu")
    llm = {k: v.clone() for k, v in model.language_model.state_dict().items()}
    other, its_processor = with_connector(
        model, processor, selector_dir=pair_dir, connector_type="vilamp", sampling="fps",
        num_keyframes=2,
    )  # fmt: skip
    assert all(v.equal(llm[k]) for k, v in other.language_model.state_dict().items())
    assert other.config.query_width == its_processor.selector.width == 32
    assert its_processor.num_tokens(10) == 2 * 4 + 8
    with pytest.raises(ValueError, match="TlvConfig has no field num_querys"):
        with_connector(other, its_processor, num_querys=7)


# ---- what does not fit ----------------------------------------------------------------------


def test_a_budget_that_does_not_fit_names_the_cap_and_nothing_is_decoded(long_model, tmp_path,
                                                                         clip_frames, monkeypatch):
    model, processor = long_model
    model.language_model.config.max_position_embeddings = 256
    write_video(tmp_path / "long.mp4", clip_frames(300), fps=8)
    monkeypatch.setattr(processor, "select", None)  # a first pass would fail
    with pytest.raises(BudgetError, match="300 frames with 3 keyframes of 4 tokens are 309 video "
                                          "tokens.* context of 256: lower max_frames") as error:
        generate(model, processor, tmp_path / "long.mp4", [("Where?", "park")])
    fits = int(str(error.value).split("at most ")[1].split(",")[0])
    num_text = int(str(error.value).split("with ")[2].split(" of text")[0])
    check_budget(model, processor, fits, num_text)  # the advice holds
    with pytest.raises(BudgetError):
        check_budget(model, processor, fits + 1, num_text)


def test_keyframes_that_alone_are_too_many_are_named(long_model):
    model, processor = long_model
    processor.num_keyframes = 100
    model.language_model.config.max_position_embeddings = 256
    with pytest.raises(BudgetError, match=r"lower num_keyframes \(K\) below 60") as error:
        check_budget(model, processor, 300, num_text=20)
    assert "100 keyframes of 4 tokens" in str(error.value)


@pytest.mark.parametrize("num_frames", [1, 2, 3, 4])
def test_clips_shorter_than_the_keyframes_are_read_whole(long_model, tmp_path, clip_frames,
                                                         num_frames):
    model, processor = long_model
    write_video(tmp_path / "short.mp4", clip_frames(num_frames), fps=8)
    keys, query = processor.select(tmp_path / "short.mp4", "park")
    assert keys.tolist() == list(range(num_frames))[:3] if num_frames < 4 else len(keys) == 3
    (tokens,) = encode_clip(model, processor, tmp_path / "short.mp4", [(keys, query)])
    assert len(tokens) == min(num_frames, 3) * 4 + max(0, num_frames - 3)


def test_uniform_sampling_is_refused(build_tiny, pair_dir):
    with pytest.raises(ValueError, match="vilamp.*take 'fps'"):
        build_tiny(connector_type="vilamp", selector_dir=pair_dir, sampling="uniform")


def test_the_plain_processor_says_whom_to_ask(long_model, clip_frames):
    with pytest.raises(TypeError, match=r"tlv\.long_video\.generate"):
        long_model[1](text="<video>\nWhere?", videos=[clip_frames()])


def test_selection_is_by_name_and_a_wrong_one_lists_the_known(long_model, path):
    _, processor = long_model
    processor.selection = "uniform"
    assert processor.select(path, "park")[0].tolist() == [0, 49, 99]
    processor.selection = "best"
    with pytest.raises(ValueError, match="known are dks, top_k, uniform"):
        processor.select(path, "park")


def test_features_of_a_chunk_are_gone_before_the_next_is_decoded(long_model, path, monkeypatch):
    """Peak memory does not grow with the clip: at most one chunk's features are alive."""
    model, processor = long_model
    alive, worst = [], []

    def features(pixels):
        worst.append(sum(ref() is not None for ref in alive))
        found = torch.randn(len(pixels), 4, 32)
        alive.append(weakref.ref(found))
        return found

    monkeypatch.setattr(model, "vision_features", features)
    monkeypatch.setattr(long_video, "CHUNK", 16)
    encode_clip(model, processor, path, [processor.select(path, "park")])
    assert len(worst) == int(np.ceil(100 / 16)) and max(worst) == 0


# ---- through the joints that all models share -----------------------------------------------


def test_evaluation_asks_each_question_with_its_query(long_model, path):
    model, processor = long_model
    head = {"video": path.name, "form": "free", "answer": "", "options": []}
    rows = [{**head, "question": "Where?", "query": "a park"},
            {**head, "question": "Where?\nA. here\nB. there"},
            {**head, "question": "Where?", "video": None},
            {**head, "question": "Where?", "video": "nowhere.mp4"},
            {**head, "question": "Where is the man who is running in the park? " * 3}]
    found = generate_answers(model, processor, rows, path.parent, max_new_tokens=5)
    asked = [(rows[0]["question"], "a park"), (rows[1]["question"], "Where?")]
    said = generate(model, processor, path, asked, max_new_tokens=5)
    texts = [processor.tokenizer.decode(one.tokens, skip_special_tokens=True).strip()
             for one in said]
    assert [one.text for one in found[:2]] == texts
    assert found[0].confidence == pytest.approx(np.exp(sum(said[0].log_probs)), rel=1e-4)
    assert found[2].error == "" and "no such file" in found[3].error
    assert "the text encoder reads 16" in found[4].error and found[4].text == ""


def test_a_clip_beyond_the_context_costs_its_own_questions_alone(long_model, path, monkeypatch):
    def refuse(*_):
        raise BudgetError("300 frames are too many")

    head = {"video": path.name, "form": "free", "answer": "", "options": [], "question": "Where?"}
    monkeypatch.setattr(long_video, "check_budget", refuse)
    beyond, blind = generate_answers(*long_model, [head, {**head, "video": None}], path.parent,
                                     max_new_tokens=2)
    assert (beyond.text, beyond.error) == ("", "300 frames are too many") and blind.error == ""


def test_a_question_beyond_the_context_costs_no_other_of_its_clip(long_model, path):
    head = {"video": path.name, "form": "free", "answer": "", "options": [], "query": "red"}
    rows = [{**head, "question": text} for text in ("Where?", "word " * 1200, "Who?")]
    one, long, other = generate_answers(*long_model, rows, path.parent, max_new_tokens=2)
    assert "more than the LLM's context" in long.error and one.error == other.error == ""


def test_a_clip_all_of_whose_queries_are_refused_is_passed_over(long_model, path):
    head = {"video": path.name, "form": "free", "answer": "", "options": []}
    rows = [{**head, "question": "Where is the man who is running in the park? " * 3}]
    (found,) = generate_answers(*long_model, rows, path.parent, max_new_tokens=2)
    assert "the text encoder reads 16" in found.error


def test_blind_questions_go_in_batches_and_keep_their_order(long_model, path, monkeypatch):
    rows = [{"video": None, "question": f"Where {'or when ' * i}?", "form": "free"}
            for i in range(5)]  # fmt: skip
    sizes, generate_some = [], answering._generate

    def watch(model, processor, rows, max_new_tokens):
        sizes.append(len(rows))
        return generate_some(model, processor, rows, max_new_tokens)

    options = dict(videos_dir=path.parent, max_new_tokens=4)
    alone = [generate_answers(*long_model, [row], **options)[0].text for row in rows]
    monkeypatch.setattr(answering, "_generate", watch)
    together = generate_answers(*long_model, rows, batch_size=2, **options)
    assert [answer.text for answer in together] == alone
    assert sizes == [2, 2, 1]


def test_more_keyframes_than_it_was_built_for(build_tiny, pair_dir, path):
    """Without merged frames the number of keyframes is free: more whole frames, more tokens."""
    model, processor = build_tiny(connector_type="vilamp", selector_dir=pair_dir, sampling="fps",
                                  fps=8.0, max_frames=500, num_keyframes=3, merging="drop")
    processor.selector.cache_dir, processor.num_keyframes = None, 20
    look = processor.select(path, "a park")
    (tokens,) = encode_clip(model, processor, path, [look])
    assert len(look[0]) == 20 and len(tokens) == processor.num_tokens(100) == 20 * 4
    (said,) = generate(model, processor, path, [("Where?", "a park")], max_new_tokens=3)
    assert 1 <= len(said.tokens) <= 3


def test_a_clip_that_the_selector_cannot_read_is_a_bad_sample(long_model, path, monkeypatch):
    model, processor = long_model
    turn = [{"from": "human", "value": "<video>\nWhere?"}, {"from": "gpt", "value": "Here."}]
    samples = [{"id": "a", "video": path.name, "conversations": turn}]
    data = VideoTextDataset(samples, path.parent, model, processor)
    data.cache = FeatureCache("cpu", torch.float32)

    def embed(path):
        raise VideoError(path, "damaged further on")

    monkeypatch.setattr(processor, "embed", embed)
    data.cache.fill(model, data, [0])
    assert "damaged further on" in data[0].reason


def test_the_command_names_the_keyframes(long_model, path, tmp_path):
    model, processor = long_model
    for part in (model, processor):
        part.save_pretrained(tmp_path / "m")
    said = ask(path, "Where?", tmp_path / "m")
    assert "keyframes: 3 of the 100 frames looked at" in said
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "a.png")
    assert ask(tmp_path / "a.png", "Where?", tmp_path / "m").endswith("looked at: the picture")
    with pytest.raises(QueryError, match="the text encoder reads 16"):
        ask(path, "Where is the man who is running in the park? " * 3, tmp_path / "m")


def test_training_reaches_the_merger_and_spreads_positions(long_model, path, tmp_path):
    """One sample with gaps: the merging gets gradients, positions reach far beyond the row."""
    model, processor = long_model
    conversations = [{"from": "human", "value": "<video>\nWhere?"},
                     {"from": "gpt", "value": "In a park."}]
    samples = [{"id": "a", "video": path.name, "query": "a park", "conversations": conversations},
               {"id": "b", "conversations": [{"from": "human", "value": "Where?"},
                                             conversations[1]]},
               {"id": "c", "video": path.name, "query": "a park " * 20,
                "conversations": conversations}]
    data = VideoTextDataset(samples, path.parent, model, processor, turns="isolated", gap_seed=0)
    items = [data[0], data[1], data[2]]
    assert items[0]["rows"][0]["positions"][-1] > len(items[0]["rows"][0]["input_ids"])
    assert items[2].id == "c" and "text encoder reads 16" in items[2].reason
    batch = collate(items, num_clips=2, blank=data.blank(), pad_id=0)
    batch = {**batch, "clips": list(batch["clips"])}
    model.train()
    answer_nll(model, batch, torch.device("cpu")).backward()
    assert all(p.grad is not None for p in model.connector.parameters())
    assert model.connector.merging.relevant_query.weight.grad.abs().sum() > 0
    assert model.connector.merging.redundant_key.weight.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in processor.selector.model.parameters())


def test_a_sample_has_the_same_gaps_every_time(long_model, path):
    model, processor = long_model
    turn = [{"from": "human", "value": "<video>\nWhere?"}, {"from": "gpt", "value": "Here."}]
    samples = [{"id": str(i), "video": path.name, "query": "park", "conversations": turn}
               for i in range(2)]
    data = VideoTextDataset(samples, path.parent, model, processor, gap_seed=3)
    first, second = (data[i]["rows"][0]["positions"] for i in (0, 1))
    assert data[0]["rows"][0]["positions"] == first != second
