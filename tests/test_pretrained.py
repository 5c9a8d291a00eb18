"""Model folders from disk: no code of theirs runs, and an unfinished one says what it lacks."""

import contextlib
import json
import shutil

import pytest
import safetensors
import torch
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    SiglipConfig,
)

from tlv.builders import build_model, load_model
from tlv.pretrained import (
    ModelFolderError,
    check_weights,
    forget_code,
    load_part,
    load_pretrained,
    read_config,
)

AUTO_MAP = {
    "AutoConfig": "configuration_trap.TrapConfig", "AutoModel": "modeling_trap.Trap",
    "AutoModelForCausalLM": "modeling_trap.Trap", "AutoTokenizer": ["modeling_trap.Trap", None],
    "AutoImageProcessor": "modeling_trap.Trap", "AutoProcessor": "modeling_trap.Trap",
}  # fmt: skip


@pytest.fixture
def trap(llm_dir, tmp_path, monkeypatch):
    """trap(folder=None, file="config.json", **changes) -> a copy whose `file` names its own code.

    Whether that code ran is looked at when the test ends; to be asked is a failure at once.
    """
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))

    def build(folder=llm_dir, file="config.json", **changes):
        copy = tmp_path / "trap"
        shutil.copytree(folder, copy)
        content = json.loads((copy / file).read_text())
        (copy / file).write_text(json.dumps(content | {"auto_map": AUTO_MAP} | changes))
        for name in ("configuration_trap.py", "modeling_trap.py"):
            (copy / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise SystemExit\n")
        return copy

    yield build
    assert not (tmp_path / "ran").exists()


NOT_RUN = "trap: .*code from a model folder is not run; take a model of a type"


def test_a_folder_of_an_unknown_type_is_refused_and_its_code_is_not_run(trap):
    folder = trap(model_type="trap")
    with pytest.raises(ModelFolderError, match=NOT_RUN):
        read_config(folder, "llm_dir")
    with pytest.raises(ModelFolderError, match=NOT_RUN):
        load_pretrained(AutoModelForCausalLM, folder, "llm_dir")
    with pytest.raises(ModelFolderError, match=NOT_RUN):
        load_model(folder)


def test_a_folder_of_a_known_type_loads_without_its_code(trap, vision_dir, llm_dir):
    folder = trap()
    config = read_config(folder, "llm_dir")
    assert config.model_type == "qwen2" and not hasattr(config, "auto_map")
    model, processor = build_model(vision_dir, folder, num_queries=8, num_groups=4)
    wanted = load_pretrained(AutoModelForCausalLM, llm_dir, "llm_dir").state_dict()
    assert all(torch.equal(model.language_model.state_dict()[k], v) for k, v in wanted.items())
    assert load_part(AutoTokenizer, folder, "llm_dir").eos_token == "<|endoftext|>"


def test_a_model_that_has_no_such_class_but_code_for_it_is_refused(trap, vision_dir):
    with pytest.raises(ModelFolderError, match="trap: its weights do not load"):
        load_pretrained(AutoModelForCausalLM, trap(vision_dir), "llm_dir")


@pytest.mark.parametrize(
    "auto_class, part, file, kind",
    [
        (AutoTokenizer, "llm_dir", "tokenizer_config.json", "tokenizer_class"),
        (AutoImageProcessor, "vision_dir", "preprocessor_config.json", "image_processor_type"),
    ],
)
def test_code_of_a_tokenizer_or_processor_is_not_run(auto_class, part, file, kind, trap, request):
    folder = trap(request.getfixturevalue(part), file, **{kind: "TrapThing"})
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "trap"}
    (folder / "config.json").write_text(json.dumps(config))  # else its class is told by its model
    with pytest.raises(ModelFolderError, match=NOT_RUN):
        load_part(auto_class, folder, part)


def test_a_saved_model_whose_parts_name_code_loads_without_it(trap, model_dir):
    folder = trap(model_dir)
    config = json.loads((folder / "config.json").read_text())
    for part in ("text_config", "vision_config"):
        config[part]["auto_map"] = AUTO_MAP
    (folder / "config.json").write_text(json.dumps(config))
    model, _ = load_model(folder)
    assert not hasattr(model.config.text_config, "auto_map")
    config["text_config"] = {"model_type": "t5", "auto_map": AUTO_MAP}  # no causal LLM
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelFolderError, match="trap: its weights do not load"):
        load_model(folder)


def test_forgetting_code_reaches_parts_of_parts():
    config = SiglipConfig()
    config.vision_config.auto_map = AUTO_MAP
    assert "auto_map" not in str(forget_code(config).to_dict())


@pytest.mark.parametrize(
    "changes",
    [{"model_type": "tinyllava"},
     {"model_type": "tiny_llava_phi", "architectures": ["TinyLlavaPhiForCausalLM"]}],
)  # fmt: skip
def test_a_published_checkpoint_is_to_be_converted_first(changes, trap):
    folder = trap(**changes)
    for load in (load_model, lambda path: read_config(path, "vision_dir")):
        with pytest.raises(ModelFolderError, match="first: python -m tlv.convert .*/trap"):
            load(folder)


def test_a_stages_folder_points_to_the_model_in_it(model_dir, tmp_path):
    (tmp_path / "04_sft").mkdir()
    (tmp_path / "04_sft/checkpoint").symlink_to(model_dir)
    with pytest.raises(ModelFolderError, match="no model folder, but its checkpoint/ is one"):
        load_model(tmp_path / "04_sft", what="--model")


@pytest.mark.parametrize("text", ["[]", "{", '"x"', "\x00"])
def test_a_config_that_is_no_json_object_is_refused(text, llm_dir, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelFolderError, match="config.json is (not readable|no JSON object)"):
        read_config(tmp_path, "llm_dir")


def test_a_shard_that_is_not_there_is_named(llm_dir, tmp_path):
    folder = tmp_path / "llm"
    shutil.copytree(llm_dir, folder)
    model = load_pretrained(AutoModelForCausalLM, folder, "llm_dir")
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    check_weights(folder, "llm_dir")
    load_pretrained(AutoModel, folder, "llm_dir")
    lost = sorted(folder.glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(ModelFolderError, match=f"names {lost.name}, which is not there; the copy"):
        load_pretrained(AutoModelForCausalLM, folder, "llm_dir")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ["x"]}')
    with pytest.raises(ModelFolderError, match="has no weight_map of file names"):
        check_weights(folder, "llm_dir")


def test_pickled_weights_are_not_read_and_how_to_rewrite_them_is_told(llm_dir, tmp_path):
    folder = shutil.copytree(llm_dir, tmp_path / "llm")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]  # tied, as .bin files have it
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ModelFolderError, match="pytorch_model.bin is there, .* Rewrite it: ") as e:
        load_pretrained(AutoModelForCausalLM, folder, "llm_dir")
    names = {"torch": torch, "safetensors": safetensors}
    with contextlib.chdir(folder):
        exec(str(e.value).split("Rewrite it: ")[1], names)  # what is told works
    assert load_pretrained(AutoModelForCausalLM, folder, "llm_dir")
