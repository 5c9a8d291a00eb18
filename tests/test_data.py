"""The order of samples, how they become micro-batches, and what happens to bad ones."""

import pytest
import torch
from toy_manifest import make_sample, make_world, turn

from tlv import processor as processor_module
from tlv.bad_samples import BadSample
from tlv.chat import IGNORE_INDEX
from tlv.config import ConfigError
from tlv.data import VideoTextDataset, collate, make_loader, names_of
from tlv.feature_cache import FeatureCache
from tlv.manifest import load_samples


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), 4)


@pytest.fixture
def make(world, tiny):
    """make(samples or None, **options) -> dataset on the tiny model."""

    def build(samples=None, **options):
        samples = samples or load_samples(world / "data.json")
        return VideoTextDataset(samples, world, *tiny, **options)

    return build


def test_samples_that_share_an_id_are_told_apart_by_their_place():
    samples = [{"id": "a"}, {"id": "b"}, {"id": "a"}, {}, "x", {"id": 3}]
    assert names_of(samples) == ["a #0", "b", "a #2", "#3", "#4", "3"]
    assert names_of([{}]) == ["#0"]


# ---- samples --------------------------------------------------------------------------------


def test_packed_turns_are_one_row_and_separate_turns_share_the_clip(make):
    packed, separate = make()[1], make(turns="separate")[1]
    assert len(packed["rows"]) == 1 and len(separate["rows"]) == 2
    assert torch.equal(packed["clip"], separate["clip"])
    answers = [[t for t in row["labels"] if t != IGNORE_INDEX] for row in separate["rows"]]
    assert [t for t in packed["rows"][0]["labels"] if t != IGNORE_INDEX] == sum(answers, [])
    # asked alone: the second row holds the visual, and nothing of the first turn
    placeholder = make().config.video_token_id
    assert all(row["input_ids"].count(placeholder) == 8 for row in separate["rows"])
    text = make().tokenizer.decode(separate["rows"][1]["input_ids"])
    assert "And then?" in text and "What happens" not in text


@pytest.mark.parametrize("template", [None, "pretrain"])  # the second one asks nothing
def test_isolated_turns_are_one_row_that_looks_as_separate_ones_do(make, template):
    dataset = make(turns="isolated", template=template)
    batch = next(iter(make_loader(dataset, [[0, 1]], 2, 0)))
    separate = [make(turns="separate", template=template)[i]["rows"] for i in (0, 1)]
    for row, apart in enumerate(separate):
        segments = dataset[row]["rows"][0]["segments"]
        look = batch["attention_mask"][row, 0]
        for number, one in enumerate(apart, start=1):
            own = [i for i, segment in enumerate(segments) if segment in (0, number)]
            assert batch["input_ids"][row, own].tolist() == one["input_ids"]
            # the token that predicts a label stands in front of it
            labels = [segments[i - 1] for i in own if batch["labels"][row, i] != IGNORE_INDEX]
            assert set(labels) == {number}
            assert batch["position_ids"][row, own].tolist() == list(range(len(own)))
            assert torch.equal(look[own][:, own], torch.ones(len(own), len(own)).bool().tril())
            others = [i for i, segment in enumerate(segments) if segment not in (0, number)]
            assert not look[own[segments.count(0):]][:, others].any()
    assert batch["attention_mask"].any(-1).all()  # padding looks at something, else it is NaN


def test_each_kind_of_bad_sample_is_named_with_its_reason(make, world):
    (world / "broken.mp4").write_bytes(b"no clip")
    (world / "folder.mp4").mkdir(exist_ok=True)
    good = make_sample(0, "0.mp4")
    question, answer = good["conversations"][:2]
    bad = {
        "no such file": {"video": "missing.mp4"},
        "not a readable video": {"video": "broken.mp4"},
        "relative to videos_dir": {"video": 7},
        "must be gpt": {"conversations": [question, question]},
        "must be human, gpt": {"conversations": [question]},
        "max_seq_len is 256": {"conversations": [question, turn("gpt", "left and " * 300)]},
        "placeholder": {"conversations": [turn("human", "What?"), answer]},
    }
    dataset = make([good | changes for changes in bad.values()] + ["no object"])
    for item, words in zip(dataset, [*bad, "no JSON object"], strict=True):
        assert isinstance(item, BadSample) and words in item.reason, (words, item)
    assert dataset[0].id == "s0 #0" and "missing.mp4" in dataset[0].reason
    assert str(world) not in dataset[0].reason  # the same text in every clone


@pytest.mark.parametrize("turns", ["packed", "separate", "isolated"])
def test_what_published_code_drops_is_learnt_rightly_counted_and_listed(turns, make):
    good = make_sample(0, "0.mp4")
    odd = {**good, "id": "odd", "conversations": [turn("gpt", "Hi."), *good["conversations"],
                                                  turn("human", "And then?")]}
    quoting = {**good, "id": "quoting", "conversations": [good["conversations"][0],
                                                          turn("gpt", "He said ASSISTANT: no.")]}
    asking = {**good, "id": "asking", "conversations": [
        turn("human", "<video>\nWho said ASSISTANT: no?"), turn("gpt", "He.")]}
    dataset = make([good, odd, quoting, asking], turns=turns)
    plain, odd, quoting, asking = (dataset[i] for i in range(4))
    assert odd["rows"] == plain["rows"] and plain["notes"] == []
    for item, answer in ((quoting, " He said ASSISTANT: no."), (asking, " He.")):
        learnt = [i for row in item["rows"] for i in row["labels"] if i != IGNORE_INDEX]
        assert dataset.tokenizer.decode(learnt) == answer + "<|endoftext|>"
        assert "words of the template" in item["notes"][0].reason
    assert all(item["notes"][0].is_used for item in (odd, quoting, asking))
    assert "the first turn is no question" in odd["notes"][0].reason
    assert "no answer; that turn is left out" in odd["notes"][0].reason
    batch = collate([odd, quoting, asking], num_clips=3, blank=dataset.blank(), pad_id=0)
    assert [note.id for note in batch["bad"]] == ["odd", "quoting", "asking"]


def test_a_long_row_is_cut_where_published_code_cuts_after_its_fusion(make, tiny):
    model, placeholder = tiny[0], tiny[0].config.video_token_id
    samples = [make_sample(0, "0.mp4"), make_sample(1, "1.mp4")]
    samples[1]["conversations"][1]["value"] = "left and " * 300
    whole = make(samples)
    whole.config.max_seq_len, whole.config.long_rows = 10_000, "cut"
    items = [whole[0], whole[1]]
    assert [item["notes"] for item in items] == [[], []]
    row = items[1]["rows"][0]
    # Published: one id stands for the clip, its tokens take its place, and the end is cut off.
    first, num = row["input_ids"].index(placeholder), row["input_ids"].count(placeholder)
    with torch.no_grad():
        tokens = model.encode_videos(items[1]["clip"][None])[0]  # (Q, D)
        embed = model.get_input_embeddings()
        text = [torch.tensor(row["input_ids"][i]) for i in (slice(first), slice(first + num, None))]
        fused = torch.cat([embed(text[0]), tokens, embed(text[1])])[:256]  # (L, D)
    wanted = model(inputs_embeds=fused[None], labels=torch.tensor([row["labels"][:256]])).loss
    whole.config.max_seq_len = 256
    items = [whole[0], whole[1]]
    batch = collate(items, num_clips=2, blank=whole.blank(), pad_id=0)
    assert batch["input_ids"].shape == (2, 256)
    assert batch["bad"] == [BadSample("s1", f"{len(row['input_ids']) - 256} tokens beyond "
                                      "max_seq_len = 256 are cut", is_used=True)]
    mine = model(batch["input_ids"][1:], pixel_values_videos=batch["clips"][1:],
                 labels=batch["labels"][1:]).loss
    assert torch.allclose(mine, wanted, atol=1e-5)


@pytest.mark.parametrize("turns", ["packed", "separate", "isolated"])
def test_a_cut_that_leaves_no_answer_or_half_a_clip_is_refused(turns, make):
    dataset = make(turns=turns)
    first = dataset[0]["rows"][0]["labels"]
    answer = next(i for i, label in enumerate(first) if label != IGNORE_INDEX)
    for limit, words in ((answer, "no answer is among what is kept of "),
                         (5, "its clip ends beyond what is kept of ")):
        dataset.config.max_seq_len, dataset.config.long_rows = limit, "cut"
        assert isinstance(dataset[0], BadSample) and not dataset[0].is_used
        assert words in dataset[0].reason, dataset[0].reason


def test_a_clip_shown_in_a_later_turn_is_not_cut_in_half(make):
    sample = make_sample(0, "0.mp4")
    text = [turn("human", "Hi?"), turn("gpt", "Hello.")]
    dataset = make([{**sample, "conversations": [*text, *sample["conversations"]]}])
    ids, placeholder = dataset[0]["rows"][0]["input_ids"], dataset.config.video_token_id
    dataset.config.max_seq_len, dataset.config.long_rows = ids.index(placeholder) + 3, "cut"
    assert "its clip ends beyond" in dataset[0].reason


def test_isolated_turns_are_cut_with_all_that_belongs_to_them(make):
    dataset = make(turns="isolated")
    full = dataset[0]["rows"][0]
    dataset.config.max_seq_len, dataset.config.long_rows = len(full["input_ids"]) - 3, "cut"
    cut = dataset[0]["rows"][0]
    assert {name: values[:-3] for name, values in full.items()} == cut and "segments" in cut


def test_text_that_is_learnt_from_its_first_token_is_isolated_as_it_is_separate(make):
    text = {"id": "t", "conversations": [turn("human", "Hi?"), turn("gpt", "Red."),
                                         turn("human", "Ho?"), turn("gpt", "Red, blue.")]}
    row = make([text], turns="isolated", template="pretrain")[0]["rows"][0]
    apart = make([text], turns="separate", template="pretrain")[0]["rows"]
    assert apart[0]["labels"][0] != IGNORE_INDEX  # there is no token before it
    assert {len(values) for values in row.values()} == {len(row["input_ids"])}
    learnt = [row["labels"][1:] for row in (row, *apart)]
    learnt = [[label for label in labels if label != IGNORE_INDEX] for labels in learnt]
    assert learnt[0] == learnt[1] + learnt[2]
    before = row["segments"][:-1]  # the token that predicts a label stands in its own turn
    for there, segment, label in zip(before, row["segments"][1:], row["labels"][1:], strict=True):
        assert label == IGNORE_INDEX or there == segment


def test_a_row_beyond_the_llms_positions_is_a_bad_sample(make):
    dataset = make(gap_seed=0)
    assert isinstance(dataset[0], dict)
    dataset.config.text_config.max_position_embeddings = 9
    assert isinstance(dataset[0], BadSample)
    assert "positions does not fit into the LLM's 9" in dataset[0].reason


def test_a_clip_that_hangs_the_decoder_is_a_bad_sample(make):
    item = make(timeout_s=1e-6)[0]
    assert isinstance(item, BadSample) and "was stopped" in item.reason


def test_a_missing_manifest_or_folder_is_named(tmp_path, tiny):
    with pytest.raises(ConfigError, match="none.json: no such file"):
        load_samples(tmp_path / "none.json")
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(ConfigError, match="at least one sample"):
        load_samples(tmp_path / "empty.json")
    with pytest.raises(ConfigError, match="nowhere: no such folder"):
        VideoTextDataset([{}], tmp_path / "nowhere", *tiny)


# ---- micro-batches --------------------------------------------------------------------------


def test_a_bad_sample_leaves_a_place_that_weighs_nothing(make):
    dataset = make()
    items = [dataset[0], BadSample("x", "why"), dataset[1]]
    batch = collate(items, num_clips=3, blank=dataset.blank(), pad_id=5)
    assert batch["bad"] == [items[1]]
    assert batch["clips"].shape == (3, 4, 3, 16, 16)
    assert batch["video_index"].tolist() == [0, 1, 2]
    assert (batch["labels"][2] == IGNORE_INDEX).all()
    count = (batch["labels"][:2] != IGNORE_INDEX).sum().item()
    rows = [dataset[i]["rows"][0]["labels"] for i in (0, 1)]
    assert count == sum(t != IGNORE_INDEX for row in rows for t in row)
    padded = batch["attention_mask"] == 0
    assert (batch["input_ids"][padded] == 5).all()
    assert (batch["labels"][padded] == IGNORE_INDEX).all()


def test_a_micro_batch_without_any_sample_still_runs_the_same_modules(make):
    dataset = make()
    batch = collate([], num_clips=2, blank=dataset.blank(), pad_id=0)
    assert batch["clips"].shape[0] == 2 and (batch["labels"] == IGNORE_INDEX).all()


def test_rows_of_one_clip_point_to_it_and_text_alone_has_none(make):
    samples = [make_sample(0, "0.mp4"), make_sample(1, "1.mp4")]
    text = {"id": "t", "conversations": [turn("human", "Hi?"), turn("gpt", "Hello.")]}
    dataset = make([samples[0], text, samples[1]], turns="separate")
    batch = collate(list(dataset), num_clips=3, blank=dataset.blank(), pad_id=0)
    assert batch["video_index"].tolist() == [0, 0, 1, 1, 2]
    has_visual = (batch["input_ids"] == dataset.config.video_token_id).any(1).tolist()
    assert has_visual == [True, True, False, True, True, True]


def test_workers_give_the_same_micro_batches(make):
    dataset = make(timeout_s=None)
    batches = [[0, 2], [3], []]
    plain = list(make_loader(dataset, batches, 2, 0))
    forked = list(make_loader(dataset, batches, 2, 1))
    for a, b in zip(plain, forked, strict=True):
        assert torch.equal(a["input_ids"], b["input_ids"]) and torch.equal(a["clips"], b["clips"])


# ---- features -------------------------------------------------------------------------------


def test_the_cache_encodes_each_clip_once_and_gives_the_encoders_features(
    make, tiny, monkeypatch
):
    samples = [make_sample(i, f"{i % 2}.mp4") for i in range(4)]
    dataset, model = make([*samples, make_sample(4, "missing.mp4")]), tiny[0]
    pixels, calls = dataset[1]["clip"], []
    decode = processor_module.sample_frames_within
    monkeypatch.setattr(processor_module, "sample_frames_within",
                        lambda limit, path, **kw: calls.append(path) or decode(limit, path, **kw))
    cache = FeatureCache("cpu", torch.float32)
    cache.fill(model, dataset, range(5))
    cache.fill(model, dataset, range(5))
    assert not any(held is model for held in vars(cache).values())  # it outlives the model
    assert len(calls) == 3 and len(cache) == 3
    dataset.cache = cache
    with torch.no_grad():
        expected = model.vision_features(pixels)
    assert torch.equal(dataset[1]["clip"], expected) and len(calls) == 3
    assert "no such file" in dataset[4].reason
    assert dataset.blank()["clip"].shape == expected.shape


# ---- several files in a row -----------------------------------------------------------------


def test_a_list_of_files_is_shown_one_after_another(make, world, tiny):
    samples = load_samples(world / "data.json")
    one, two = samples[0], samples[1]
    both = {**one, "video": [one["video"], two["video"]]}
    rows = [make([sample])[0] for sample in (one, {**two, "conversations": one["conversations"]})]
    joined = make([both])[0]
    assert torch.equal(joined["clip"], torch.cat([row["clip"] for row in rows]))
    cache = FeatureCache(torch.device("cpu"), torch.float32)
    dataset = make([both, one])
    cache.fill(tiny[0], dataset, [0, 1])
    dataset.cache = cache
    assert len(cache) == 2  # each file once
    assert torch.equal(dataset[0]["clip"][: len(dataset[1]["clip"])], dataset[1]["clip"])


def test_a_list_with_something_else_in_it_is_a_bad_sample(make, world):
    sample = load_samples(world / "data.json")[0]
    bad = make([{**sample, "video": [sample["video"], 3]}])[0]
    assert isinstance(bad, BadSample) and "must be a file name" in bad.reason
