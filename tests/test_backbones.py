"""The tiny backbones: their loss, their captions, and folders that load like published ones."""

import json
from itertools import combinations

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
)

from tlv import ROOT, backbones, corpus, questions, toy_data, toy_llm, toy_siglip, world
from tlv.builders import build_model
from tlv.card import read_card
from tlv.config import load_params
from tlv.ranks import ALONE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("backbones")
    losses = backbones.train_backbones(
        out, seed=0, vision_steps=2, llm_steps=2, num_texts=60, vision_width=32,
        vision_layers=2, llm_width=32, llm_layers=2, batch_size=8, num_rows=2,
    ).wait()  # fmt: skip
    assert len(losses["vision"]) == len(losses["llm"]) == 2
    return out


def test_siglip_loss_equals_the_sum_over_pairs():
    torch.manual_seed(0)
    image, text = torch.randn(3, 4), torch.randn(5, 4)  # more captions than images
    same = torch.rand(5, 3) > 0.6
    by_hand = 0.0
    for j in range(5):
        for i in range(3):
            logit = 2.0 * float(text[j] @ image[i]) - 1.0
            by_hand += np.log1p(np.exp(-logit if same[j, i] else logit)) / 3
    loss = toy_siglip.siglip_loss(image, text, torch.tensor(2.0).log(), torch.tensor(-1.0), same)
    assert float(loss) == pytest.approx(by_hand, rel=1e-5)


def test_captions_are_true_of_the_frames_that_show_them():
    facts = [[("small", "red", "ring", "north")], [("large", "red", "bar", "west")], []]
    captions, truth = corpus.write_captions(facts)
    rows = dict(zip(captions, truth.tolist(), strict=True))
    assert rows["small red ring north"] == [True, False, False]
    assert rows["nothing"] == [False, False, True]
    assert rows["red"] == [True, True, False]
    assert rows["north"] == [True, False, False] and rows["northwest"] == [False, False, False]


def test_the_corpora_hold_no_held_out_pair():
    rng = np.random.default_rng(0)
    _, facts = corpus.write_frames(rng, 300)
    shown = {(colour, shape) for one in facts for _, colour, shape, _ in one}
    texts = [q + a for i in range(400) for q, a in corpus.write_lesson(rng, i / 400)]
    for colour, shape in world.HELD_OUT_PAIRS:
        assert (colour, shape) not in shown
        assert not any(f"{colour} {shape}" in text for text in texts)


def test_no_scene_that_the_backbones_learn_from_is_in_a_split(tmp_path, monkeypatch):
    """Corpora and clips come from the same functions: seeds that meet would draw scenes twice."""
    drawn, draw = [], world.sample_scene

    def record(*args, **kwargs):
        drawn.append(draw(*args, **kwargs))
        return drawn[-1]

    monkeypatch.setattr(world, "sample_scene", record)
    monkeypatch.setattr(backbones, "Background", lambda jobs, **_: jobs)  # none is started
    monkeypatch.setattr(toy_llm, "compute_ahead", map)
    monkeypatch.setattr(toy_llm, "_add_text_gradient", lambda *_: 0.0)  # drawing is enough
    monkeypatch.setattr(toy_llm, "run_forked", lambda function, count: function(ALONE))
    for module in (toy_llm, toy_siglip):
        monkeypatch.setattr(module, "take_step", lambda *_: None)
    monkeypatch.setattr(toy_data, "_write_clips", lambda *_: None)
    jobs = backbones.train_backbones(
        tmp_path, seed=0, vision_steps=2, llm_steps=6, num_texts=60, vision_width=32,
        vision_layers=2, llm_width=32, llm_layers=2, batch_size=160, num_rows=40,
    )  # fmt: skip
    sources = {"tokenizer": {json.dumps(scene.to_dict()) for scene in drawn}}
    for name, (train, settings) in jobs.items():
        drawn.clear()
        train(**settings)
        assert not any(scene.pairs() & set(world.HELD_OUT_PAIRS) for scene in drawn)
        sources[name] = {json.dumps(scene.to_dict()) for scene in drawn}
    drawn.clear()
    toy_data.make_pictures(tmp_path / "pictures", seed=0, num_train=200, num_val=20, num_test=60)
    sources["pictures"] = {json.dumps(scene.to_dict()) for scene in drawn}
    assert len(sources["pictures"]) == len(drawn) == 280  # nor is one of them in two splits
    toy_data.make_world(tmp_path / "world", seed=0, num_train=400, num_val=40, num_test=120,
                        defect_share=0.01)  # fmt: skip
    card = read_card(tmp_path / "world")
    truth = json.loads(card["truth"].read_text())
    leaked = {i for i, entry in truth["defects"].items() if entry["kind"] == "leaked_test_clip"}
    for split in ("raw_qa", "val_qa", "test_questions"):
        shown = [s for s in json.loads(card[split].read_text()) if s["id"] not in leaked]
        sources[split] = {json.dumps(truth["scenes"][sample["video"]]) for sample in shown}
    assert min(map(len, sources.values())) >= 40 and len(sources["llm"]) > 120
    for a, b in combinations(sources, 2):
        assert not sources[a] & sources[b], f"{a} and {b} share a scene"


def test_lessons_are_dealt_out_in_order_and_ask_about_one_text():
    assert all(sum(shares.values()) == pytest.approx(1) for _, shares in corpus.LESSONS)
    assert [end for end, _ in corpus.LESSONS] == sorted(end for end, _ in corpus.LESSONS)
    rng = np.random.default_rng(0)
    assert all("Which option" in q for q, _ in corpus.write_lesson(rng, 0.0))
    for name, write in corpus.WRITERS.items():
        if name != "letters":
            for _ in range(20):
                assert len({question.split("\n")[0] for question, _ in write(rng)}) == 1


def test_half_of_the_letters_are_of_objects_beside_objects_that_are_alike():
    rng, num_objects = np.random.default_rng(0), 0
    for _ in range(400):
        question, answer = questions.write_match(rng)
        asked, *options = (line.split(". ")[-1] for line in question.split("\n"))
        named, letter = answer[:-1].split(" (")
        assert asked == f"Which option is {named}?"
        assert options["ABCD".index(letter)] == named and len(set(options)) == len(options)
        if len(named.split()) == 2:
            num_objects += 1
            assert len(options) == 4
            assert all(set(option.split()) & set(named.split()) for option in options)
    assert num_objects / 400 == pytest.approx(0.5, abs=0.1)


def test_every_skill_that_is_taught_alone_is_asked_in_both_forms():
    rng = np.random.default_rng(0)
    for name, types in (("frame", ("What colour", "How large")), ("motion", ("Where is",))):
        turns = [turn for _ in range(50) for turn in corpus.WRITERS[name](rng)]
        for opening in types:
            asked = [a for q, a in turns if q.split("\n")[1].startswith(opening)]
            lettered = {answer[-3:] for answer in asked if answer.endswith(")")}
            assert {"(A)", "(B)"} <= lettered and any(not a.endswith(")") for a in asked)


@pytest.mark.parametrize("kind", ["leaves", "changes colour"])
def test_a_kind_of_event_is_first_taught_alone_and_in_free_form(kind):
    rng = np.random.default_rng(0)
    turns = [turn for _ in range(20) for turn in corpus.WRITERS[kind](rng)]
    assert len(turns) == 20
    assert all(question.endswith(f"\nWhich object {kind} first?") for question, _ in turns)


def test_the_longest_caption_fits_into_the_text_tower(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "vision")
    longest = questions.frame_caption([("large", "purple", "circle", "southeast")] * 3)
    assert len(tokenizer(longest).input_ids) <= toy_siglip.TEXT_LENGTH


def test_training_frames_are_processed_as_the_saved_processor_does(folder):
    frames, _ = corpus.write_frames(np.random.default_rng(0), 4)
    processor = AutoImageProcessor.from_pretrained(folder / "vision")
    saved = processor(images=list(frames), return_tensors="pt").pixel_values
    assert torch.allclose(toy_siglip.to_pixels(frames), saved, atol=1e-6)


def test_equal_seeds_give_equal_weights(folder, tmp_path):
    backbones.train_backbones(
        tmp_path, seed=0, vision_steps=2, llm_steps=2, num_texts=60, vision_width=32,
        vision_layers=2, llm_width=32, llm_layers=2, batch_size=8, num_rows=2,
    ).wait()  # fmt: skip
    for name in ("vision/model.safetensors", "llm/model.safetensors", "llm/tokenizer.json"):
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes()


def test_the_folders_load_through_the_auto_classes_and_can_be_measured(folder):
    encoder = AutoModel.from_pretrained(folder / "vision")
    llm = AutoModelForCausalLM.from_pretrained(folder / "llm")
    tokenizer = AutoTokenizer.from_pretrained(folder / "llm")
    assert encoder.config.model_type == "siglip" and llm.config.model_type == "qwen2"
    found = toy_siglip.measure_retrieval(encoder, tokenizer, seed=0, num_images=8)
    assert 0 <= found["top1"] <= found["top5"] <= 1
    read = toy_llm.measure_reading(llm, tokenizer, "plain", seed=0, num_scenes=6)
    assert set(read) <= set(questions.TYPES) and "count" in read


def test_the_llm_has_positions_for_two_thousand_tokens(folder):
    assert AutoConfig.from_pretrained(folder / "llm").max_position_embeddings >= 2048


def test_the_model_of_the_preset_gpu_has_30_to_100_million_parameters(tmp_path):
    world_of, design = (load_params(ROOT / f"params/gpu/{name}.yaml")
                        for name in ("00_toy_world", "02_architecture"))
    tokenizer = backbones.train_tokenizer(["a red circle moves"])
    common = dict(tokenizer=tokenizer, seed=0, num_steps=0, device="cpu",
                  width=world_of["width"])  # fmt: skip
    toy_siglip.train_vision(tmp_path / "vision", num_layers=world_of["vision_layers"],
                            batch_size=4, **common)  # fmt: skip
    toy_llm.train_llm(tmp_path / "llm", num_layers=world_of["llm_layers"], template="plain",
                      num_rows=1, num_threads=1, **common)  # fmt: skip
    fields = {k: v for k, v in design.items() if k not in ("seed", "world_dir")}
    model, _ = build_model(tmp_path / "vision", tmp_path / "llm", **fields)
    assert 30e6 < sum(p.numel() for p in model.parameters()) < 100e6
