"""Settings: what is refused, and whether the message says what would be right."""

import dataclasses
import json

import pytest

from tlv import ROOT
from tlv.config import ConfigError, build, load_json, load_json_lines, load_params
from tlv.launch import LaunchConfig
from tlv.train_config import TrainConfig, as_dict

GOOD = {"model_dir": "m", "data": "d.json", "videos_dir": "v", "out_dir": "o", "num_steps": 3,
        "trainable": ["connector"], "lr_connector": 1.0e-3}


def params(tmp_path, text):
    path = tmp_path / "p.yaml"
    path.write_text(text)
    return path


def refuse(**changes):
    with pytest.raises(ConfigError) as error:
        build(TrainConfig, GOOD | changes, "p.yaml")
    return str(error.value)


def test_a_good_mapping_becomes_a_frozen_config():
    config = build(TrainConfig, GOOD)
    assert config.trainable == ("connector",) and config.warmup_ratio == 0.03
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1


@pytest.mark.parametrize("text,right", [("1e-4", "1.0e-4"), ("5E3", "5.0e+3"),
                                        ("2.5e3", "2.5e+3")])
def test_a_number_that_yaml_reads_as_a_string_is_refused(tmp_path, text, right):
    path = params(tmp_path, f"seed: 0\nlr: {text}\n")
    with pytest.raises(ConfigError) as error:
        load_params(path)
    assert str(path) in str(error.value) and f"lr = {text}" in str(error.value)
    assert f"write {right}" in str(error.value)
    import yaml
    assert isinstance(yaml.safe_load(right), float)


def test_a_number_as_dvc_writes_it_is_a_number(tmp_path):
    """`dvc exp run -S file:lr=1.0e-5` leaves 1e-05 in the file."""
    path = params(tmp_path, "lr: 1e-05\nrates: [2.5e-06, 1.0]\n")
    assert load_params(path) == {"lr": 1e-5, "rates": [2.5e-6, 1.0]}


def test_numbers_quoted_strings_and_lists_are_read_as_meant(tmp_path):
    path = params(tmp_path, 'lr: 1.0e-4\nname: "1e-4"\nparts: [connector, llm]\nx: null\nb: true\n')
    assert load_params(path) == {"lr": 1e-4, "name": "1e-4", "parts": ["connector", "llm"],
                                 "x": None, "b": True}


@pytest.mark.parametrize("text,message", [
    ("a: 010", "write plain digits"), ("a: 1:30", "plain digits"), ("a: 0o17", "plain digits"),
    ("a: 1_000", "plain digits"), ("a: 1.0_0", "plain digits"), ("a: 0x_1", "plain digits"),
    ("a: [1, -07]", "plain digits"),
    ("flag: yes", "write true, false"), ("a: 1\na: 2", "twice"), ("a: {b: 1}", "nested"),
    ("- 1", "must be a mapping"), ("a: [1", "not valid YAML"), ("a: [1, 1e-4]", "1.0e-4")])
def test_yaml_that_readers_would_not_agree_on_is_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_params(params(tmp_path, text))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda path: None, "a.json: no such file"),
        (lambda path: path.mkdir(), "a.json: not readable: .*Is a directory"),
        (lambda path: path.write_text("{"), "a.json: not valid JSON"),
        (lambda path: path.write_bytes(b"\xff"), "a.json: not valid JSON"),
    ],
)
def test_a_json_file_that_cannot_be_read_is_named(make, message, tmp_path):
    make(tmp_path / "a.json")
    with pytest.raises(ConfigError, match=message):
        load_json(tmp_path / "a.json")


def test_json_lines_end_at_line_feeds_alone(tmp_path):
    path, rows = tmp_path / "a.jsonl", [{"said": "one\u2028two\x85three"}, {"said": ""}]
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    assert load_json_lines(path) == rows
    path.write_text('{}\n{"a"')
    with pytest.raises(ConfigError, match=r"a.jsonl, line 2: not valid JSON"):
        load_json_lines(path)
    with pytest.raises(ConfigError, match="b.jsonl: no such file"):
        load_json_lines(tmp_path / "b.jsonl")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="nowhere.yaml: no such"):
        load_params(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("changes,words", [
    ({"learning_rate": 1.0}, ["p.yaml", "'learning_rate'", "known keys", "lr_connector"]),
    ({"lr_connector": "1e-4"}, ["p.yaml", "lr_connector = '1e-4'", "a number"]),
    ({"num_steps": 2.5}, ["num_steps = 2.5", "integer"]),
    ({"seed": True}, ["seed = True", "integer"]),
    ({"gradient_checkpointing": 1}, ["true or false"]),
    ({"trainable": "connector"}, ["a list", "'connector', 'llm', 'vision'"]),
    ({"trainable": ["conector"]}, ["conector", "'connector'"]),
    ({"precision": "float16"}, ["'float16'", "'fp16'"]),
    ({"trainable": ["connector", "llm"]}, ["lr_llm must be a number"]),
    ({"lr_vision": 1.0}, ["lr_vision = 1.0", "trainable does not name"]),
    ({"num_epochs": 1}, ["exactly one"]),
    ({"micro_batch_size": 0}, ["micro_batch_size = 0", "> 0"]),
    ({"max_bad_share": 5}, ["max_bad_share = 5", "[0, 1]"]),
    ({"val_every": 2}, ["needs val_data"]),
    ({"cache_features": True, "trainable": ["vision"], "lr_connector": None, "lr_vision": 1.0},
     ["frozen vision encoder"]),
])
def test_wrong_settings_end_in_a_message_that_says_what_is_right(changes, words):
    message = refuse(**changes)
    assert all(word in message for word in words), message


def test_missing_keys_are_named():
    with pytest.raises(ConfigError, match="missing key data, videos_dir"):
        build(TrainConfig, {"model_dir": "m", "out_dir": "o"})


def test_paths_inside_the_project_are_stored_the_same_in_every_clone():
    config = build(TrainConfig, GOOD | {"out_dir": str(ROOT / "outputs" / "x"), "data": "/d.json"})
    stored = as_dict(config)
    assert stored["out_dir"] == "outputs/x" and stored["data"] == "/d.json"
    assert as_dict(build(TrainConfig, stored)) == stored


@pytest.mark.parametrize("changes,words", [
    ({"hostfile": "hosts"}, "launcher: deepspeed only"), ({"num_nodes": 2}, "master_addr"),
    ({"num_ranks": 0}, "num_ranks = 0"), ({"node_rank": 1}, "node_rank = 1"),
    ({"master_port": 99999}, "master_port = 99999 must lie in 1 to 65535")])
def test_launch_settings_that_cannot_work_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        build(LaunchConfig, changes)
