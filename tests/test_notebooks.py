"""The notebooks: the style rules, and every one run as it is committed and compared (nbval)."""

import copy
import io
import json
import os
import re
import shutil
import subprocess
import sys
from base64 import b64decode, b64encode

import numpy as np
import pytest
import torch
from clone import make_clone
from nbformat import from_dict
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from papermill import execute_notebook
from PIL import Image
from toy_manifest import make_world as make_clips
from toy_tokenizer import make_tokenizer
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    GemmaConfig,
    GemmaForCausalLM,
)
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tlv import ROOT, chat, data, notebook_form, notebooks, recipes, smoke, train, viz
from tlv.builders import load_model
from tlv.card import read_card
from tlv.config import ConfigError, build, load_json
from tlv.files import write_json
from tlv.manifest import load_samples
from tlv.notebook_parameters import defaults_of
from tlv.notebook_style import lint
from tlv.pretrained import ModelFolderError
from tlv.stage import load_stage_params
from tlv.toy_data import make_world
from tlv.train_config import TrainConfig

MANY = pytest.mark.skipif("TLV_ALL_TESTS" not in os.environ,
                          reason="a minute each; TLV_ALL_TESTS=1 runs them")  # fmt: skip
NAMES = notebooks.names()
PRESETS = ("tiny", "gpu", "own", "paper")
NUMBERS = [n[:2] for n in NAMES]


def nbval(name, root=ROOT) -> subprocess.CompletedProcess:
    """Run a committed notebook with its defaults; cells tagged nbval-check-output are compared."""
    env = os.environ | notebooks.environment(num_threads=1)
    env |= {"TQDM_DISABLE": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "pytest", "--nbval-lax", "--nbval-current-env", "-p",
               "no:cacheprovider", "--nbval-sanitize-with", str(ROOT / "tests/nbval.cfg"),
               "--nbval-cell-timeout", "300", f"notebooks/{name}.ipynb"]  # fmt: skip
    return subprocess.run(command, cwd=root, env=env, text=True, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip


def changed_files() -> dict[str, float]:
    """Files that git would call changed or new, all results of real runs, and when each was
    written."""
    command = ["git", "ls-files", "--modified", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True).stdout
    paths = [ROOT / name for name in names.splitlines()]
    paths += [path for preset in PRESETS for path in (ROOT / "outputs" / preset).rglob("*")]
    return {str(path): path.stat().st_mtime for path in paths if path.exists()}


def test_numbers_are_unique_and_without_gaps():
    assert NUMBERS == [f"{i:02d}" for i in range(len(NAMES))]


@pytest.mark.parametrize("name", NAMES)
def test_style(name):
    problems = lint(notebooks.FOLDER / f"{name}.ipynb")
    assert not problems, "\n".join(problems)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES[::-1])  # backwards: none finds what the one before it made
def test_notebook_runs_and_prints_what_is_committed(name):
    before = changed_files()
    done = nbval(name)
    assert done.returncode == 0, done.stdout[-5000:]
    assert changed_files() == before, "it wrote beside outputs/scratch"


CHAT = ("{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}")  # fmt: skip


@pytest.fixture(scope="module")
def other_parts(tmp_path_factory):
    """Random folders that look like published ones: CLIP, DINOv2, a Gemma with its own template."""
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("parts")
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
                 image_size=64, patch_size=8)  # fmt: skip
    CLIPVisionModel(CLIPVisionConfig(**sizes)).save_pretrained(out / "clip")
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(out / "dinov2")
    crop = dict(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    CLIPImageProcessorPil(**crop).save_pretrained(out / "clip")
    smaller = dict(size={"shortest_edge": 56}, crop_size={"height": 48, "width": 48})
    BitImageProcessorPil(**smaller).save_pretrained(out / "dinov2")  # as published: 518 and 224
    special = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer = make_tokenizer(["A red circle moves to the left."], special, True)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(out / "llm")
    GemmaForCausalLM(GemmaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=4096,
        bos_token_id=1, eos_token_id=tokenizer.eos_token_id, initializer_range=0.1,
    )).save_pretrained(out / "llm")  # fmt: skip
    return out


def ask_once(sample):
    """A sample with the first of its questions that has no options."""
    question, answer = next(t for t in chat.parse_conversation(sample) if "\nA. " not in t[0])
    turn = [{"from": "human", "value": chat.with_video(question)},
            {"from": "gpt", "value": answer}]  # fmt: skip
    return sample | {"conversations": turn}


@pytest.mark.slow
@pytest.mark.parametrize(
    "encoder, changes",
    [("clip", dict(connector_type="mof_mlp", second_vision_dir="dinov2", vision_feature_layer=-1)),
     pytest.param("clip", dict(image_mode="crop"), marks=MANY),
     pytest.param("dinov2", dict(connector_type="mean_pool", num_groups=2), marks=MANY)],
)  # fmt: skip
def test_other_encoders_and_llms_go_through_the_notebooks(encoder, changes, other_parts, tmp_path):
    """From architecture to evaluation, as the preset own takes whatever a reader has; the encoder
    is tuned through adapters, so that its features cannot be cached. No validation clip is asked
    about twice, nothing with options, and one sample is text alone."""
    tuning = dict(recipe="lora_vision", lora_rank=4, cache_features=False)
    card = read_card(smoke.world("outputs/scratch/00_toy_world/world"))
    del card["truth"]
    plain = [ask_once(sample) for sample in load_json(card["val_qa"])]
    text = {"id": "text", "conversations": [{"from": "human", "value": "What is a circle?"},
                                            {"from": "gpt", "value": "round"}]}  # fmt: skip
    write_json(tmp_path / "val_qa.json", [text, *plain])
    parts = {"vision_dir": other_parts / encoder, "llm_dir": other_parts / "llm",
             "val_qa": tmp_path / "val_qa.json"}  # fmt: skip
    write_json(tmp_path / "world/world.json", {k: str(v) for k, v in (card | parts).items()})
    if "second_vision_dir" in changes:
        changes = changes | {"second_vision_dir": str(other_parts / changes["second_vision_dir"])}
    given = changes | dict(template="own", drop_first_patch=True, num_frames=2, num_queries=32,
                           max_seq_len=2048)  # fmt: skip
    for name in NAMES[2:6]:
        given = {"world_dir": str(tmp_path / "world"), "out_dir": str(tmp_path / name), **given}
        execute_notebook(notebooks.FOLDER / f"{name}.ipynb", tmp_path / f"{name}.ipynb", given,
                         cwd=str(ROOT), progress_bar=False)  # fmt: skip
        given = {"model_dir": str(tmp_path / name)} | {
            NAMES[2]: dict(template=None), NAMES[3]: tuning}.get(name, {})  # None: the model's own
    report = json.loads((tmp_path / "04_sft/report.json").read_text())
    assert report["trained_parameters"]["vision"] > 0
    metrics = load_json(tmp_path / "04_sft/metrics.json")
    assert metrics["num_questions"] == len(plain) + 1  # the first one's comes again
    assert "exact_match/free/after" in metrics and "exact_match/choice/after" not in metrics
    assert json.loads((tmp_path / NAMES[5] / "metrics.json").read_text())["num_questions"] > 0
    assert load_model(tmp_path / "04_sft/checkpoint")[0].config.template["stop"] == "</s>"


@pytest.fixture
def own_card(other_parts, pair_dir, tmp_path):
    """A card of a reader's own: a few clips without a truth, an encoder that reads no text; among
    the validation samples one of text alone and one with a picture."""
    clips = tmp_path / "clips"
    card = read_card(make_world(clips, seed=1, num_train=16, num_val=2, num_test=2,
                                defect_share=0.0).parent)  # fmt: skip
    planted = load_json(card["truth"])["defects"]
    for name in ("raw_captions", "raw_qa"):
        write_json(card[name], [s for s in load_json(card[name]) if s["id"] not in planted])
    Image.new("RGB", (64, 64), "red").save(card["videos_dir"] / "red.png")
    text, picture = load_json(card["val_qa"])
    del text["video"], picture["video"]
    text["conversations"][0]["value"] = "What is red and blue?"
    picture["image"] = "red.png"
    write_json(card["val_qa"], [text, picture])
    card |= {"vision_dir": other_parts / "dinov2", "pair_dir": pair_dir,
             "llm_dir": other_parts / "llm"}  # fmt: skip
    card = {key: str(path) for key, path in card.items()} | {"truth": None}
    write_json(tmp_path / "own.json", card)
    return tmp_path / "own.json"


def run(name, out_dir, **given):
    given |= {"out_dir": str(out_dir)}
    execute_notebook(notebooks.FOLDER / f"{name}.ipynb", f"{out_dir}.ipynb", given, cwd=str(ROOT),
                     progress_bar=False)  # fmt: skip


def find_cell(name, words) -> str:
    """The one code cell that holds these words."""
    cells = notebooks.read(notebooks.FOLDER / f"{name}.ipynb").cells
    (source,) = [c.source for c in cells if c.cell_type == "code" and words in c.source]
    return source


@pytest.mark.slow
def test_a_card_of_own_data_goes_through_the_first_notebooks(own_card, tmp_path):
    run(NAMES[0], tmp_path / "00", data_card=str(own_card))
    text = (tmp_path / "00.ipynb").read_text()
    assert "Dinov2Model" in text and "its text tower " not in text
    run(NAMES[1], tmp_path / "01", world_dir=str(tmp_path / "00/world"))
    assert load_json(tmp_path / "01/metrics.json")["num_kept/captions"] > 0


def test_a_model_folder_that_is_not_there_is_named_by_the_first_notebook(other_parts):
    card = {"vision_dir": other_parts / "dinov2", "llm_dir": other_parts / "nowhere"}
    with pytest.raises(ModelFolderError, match="llm_dir = .*nowhere: no such folder; a Hugging"):
        exec(find_cell(NAMES[0], "load_pretrained(AutoModel,"), {"card": card})


def test_the_architecture_is_shown_on_the_first_sample_that_is_good_and_no_text(tiny, tmp_path):
    model, processor = tiny
    folder = make_clips(tmp_path, 2, bad=[0])
    samples = load_json(folder / "data.json")
    text = {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "No."}]}
    write_json(folder / "data.json", [text, *samples])
    seen = dict(data=data, chat=chat, viz=viz, model=model, processor=processor, figures=tmp_path,
                load_samples=load_samples,
                card={"val_qa": folder / "data.json", "videos_dir": folder})  # fmt: skip
    exec(find_cell(NAMES[2], "looked_at.usable(1)"), seen)
    assert seen["clip_path"] == folder / "1.mp4" and len(seen["clip"].frames) == 4


@pytest.mark.parametrize("number, given, message", [
    (0, {"num_test": 0}, "num_test = 0 must be > 0"),
    (0, {"width": 100}, "width = 100 must be a multiple of 32"),
    (0, {"defect_share": 2.0}, "defect_share = 2.0 must be from 0 to less than 0.1"),
    (1, {"seconds": [60.0, 1.5]}, r"seconds = \[60.0, 1.5\] must be \[shortest, longest\]"),
    (1, {"num_words": [4]}, r"num_words = \[4\] must be \[fewest, most\]"),
    (5, {"dtype": "float23"}, "dtype = 'float23' must be 'float32', "),
    (5, {"num_clips": -1}, "num_clips = -1 must be >= 0; 0 asks about all"),
    (5, {"batch_size": 0}, "batch_size = 0 must be > 0"),
])  # fmt: skip
def test_a_wrong_parameter_is_named_where_a_notebook_is_set_up(number, given, message):
    values = defaults_of(notebooks.read(notebooks.FOLDER / f"{NAMES[number]}.ipynb")) | given
    with pytest.raises(ConfigError, match=message):
        exec(find_cell(NAMES[number], "torch.set_num_threads(num_threads)"), values)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_presets_parameters_pass_the_checks_of_the_first_notebook(preset, tmp_path):
    notebook = notebooks.read(notebooks.FOLDER / f"{NAMES[0]}.ipynb")
    values = defaults_of(notebook) | load_stage_params(NAMES[0], preset, notebook)
    source = find_cell(NAMES[0], "torch.set_num_threads(num_threads)")
    exec(source, values | {"out_dir": str(tmp_path), "num_threads": 1})
    assert (tmp_path / "figures").is_dir()


@pytest.mark.parametrize("preset", [*PRESETS, *(f"{p}/image" for p in PRESETS)])
def test_adapters_for_own_clips_may_train_in_every_presets_precision(preset, model_dir, tmp_path):
    notebook = notebooks.read(notebooks.FOLDER / f"{NAMES[4]}.ipynb")
    values = defaults_of(notebook) | load_stage_params(NAMES[4], preset, notebook)
    write_json(tmp_path / "raw_qa.json", [])
    launched = []

    def launch(config):
        launched.append(config)
        raise InterruptedError

    values |= {"own": tmp_path, "start_dir": model_dir, "card": {"videos_dir": tmp_path}}
    values |= {"build": build, "TrainConfig": TrainConfig, "recipes": recipes, "launch": launch}
    with pytest.raises(InterruptedError):
        exec(find_cell(NAMES[4], "own_config = build("), values)
    train.check_inputs(launched[0])


@pytest.mark.slow
def test_a_changed_constant_in_tlv_makes_a_notebook_fail(tmp_path):
    """The positional encoding's base, ten times too small; and the comparison bites as well: a
    number that is stored as printed is another one."""
    folder = make_clone(tmp_path / "clone")
    made = smoke.world("outputs/scratch/00_toy_world/world").parent
    shutil.copytree(made, folder / "outputs/scratch/00_toy_world")
    path = folder / "tlv/resamplers.py"
    text = path.read_text()
    changed = text.replace("10_000.0", "1_000.0")
    assert changed != text, "tlv/resamplers.py no longer holds the constant that this test changes"
    path.write_text(changed)
    path = folder / "notebooks/02_architecture.ipynb"
    notebook = notebooks.read(path)
    compared = next(cell for cell in notebook.cells if cell.get("outputs")
                    and "nbval-check-output" in cell.metadata.get("tags", []))  # fmt: skip
    number = re.search(r"\d+", compared.outputs[0].text)[0]
    compared.outputs[0].text = compared.outputs[0].text.replace(number, f"{number}0", 1)
    notebooks.write(path, notebook)
    done = nbval("02_architecture", folder)
    assert done.returncode == 1 and "positions by hand" in done.stdout
    assert "Notebook cell execution failed" in done.stdout
    assert "Cell outputs differ" in done.stdout and f"{number}0" in done.stdout


def test_stored_figures_are_smaller_and_look_the_same():
    greys = np.random.default_rng(0).integers(0, 16, (200, 300, 1)) * 16
    canvas = np.repeat(greys, 3, axis=2).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(canvas).save(file, "PNG")
    output = new_output("display_data", {"image/png": b64encode(file.getvalue()).decode()})
    cell = new_code_cell("x", outputs=[output])
    notebook_form.shrink_figures(new_notebook(cells=[cell]))
    small = b64decode(cell.outputs[0].data["image/png"])
    assert len(small) < len(file.getvalue())
    again = np.asarray(Image.open(io.BytesIO(small)).convert("RGB")).astype(int)
    assert again.shape == canvas.shape and np.abs(again - canvas).max() < 16


# ---- the rules themselves -------------------------------------------------------------------

PROSE = """\
## Goal
After this you can
- say
- count
- build
|| ## Parameters || ## Setup || ## One || ## Two || ## Three || ## Write the results
|| ## What you should see || ## Recap
|| ## Exercises
1. By hand: add. Cost: a minute.
2. Change a line. Cost: seconds.
3. Open: we predict that it falls. Cost: an hour.
|| ## References"""


SETUP = """\
import numpy as np
print(f"seed {seed}, numpy {np.__version__}, writing to {out_dir}")"""


def good_notebook():
    parameters = 'seed = 0  # any\nout_dir = "outputs/scratch/00_x"  # results'
    cells = [new_markdown_cell("# 00 · Title\nWhy?\n\n| run |\n|---|\n| smoke | |\n| tiny | |")]
    cells += [new_markdown_cell(text.strip()) for text in PROSE.split("||")]
    cells.insert(3, new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    cells.insert(5, new_code_cell(SETUP))
    cells.append(new_code_cell('from tlv import viz\nviz.pipeline_strip("00")'))
    for i in range(5):
        cells.append(new_code_cell(f"print({i})", metadata={"tags": ["nbval-check-output"]}))
        cells[-1].outputs = [new_output("stream", text=f"{i}\n")]
    notebook = new_notebook(cells=cells)
    for count, cell in enumerate((c for c in cells if c.cell_type == "code"), 1):
        cell.execution_count = count
    return notebook_form.canonicalise(notebook, "00")


def problems_of(notebook, tmp_path) -> str:
    path = tmp_path / "00_x.ipynb"
    notebooks.write(path, notebook)
    return "\n".join(lint(path))


def test_a_good_notebook_has_no_problems(tmp_path):
    assert problems_of(good_notebook(), tmp_path) == ""


def replace(old, new):
    def change(notebook):
        for cell in notebook.cells:
            cell.source = cell.source.replace(old, new)

    return change


def change_last(**values):
    return lambda notebook: notebook.cells[-1].update(from_dict(values))


@pytest.mark.parametrize("change, problem", [
    (replace("# 00 · Title", "# Title"), "must begin `# 00 · Title`"),
    (replace("Why?", "Because."), "one question"),
    (replace("| tiny |", "| huge |"), "cost table"),
    (replace("## Recap", "## Summary"), "sections must begin"),
    (replace("## Two", "Two"), "2 lesson sections"),
    (replace("- build", "build"), "three bullets"),
    (replace("  # any", ""), "`seed = 0` lacks a comment"),
    (replace("seed = 0", "seed = 1 + 2"), "holds `seed = 1 + 2`; only `name = literal`"),
    (replace("seed = 0", "sed = 0"), "must hold `seed`"),
    (replace("outputs/scratch", "outputs/tiny"), "below outputs/scratch"),
    (replace("seed {seed}, ", ""), "## Setup prints no `{seed}`"),
    (replace("{np.__version__}", "2"), "## Setup prints no `__version__`"),
    (replace("writing to {out_dir}", ""), "## Setup prints no `{out_dir}`"),
    (replace("## Setup", "## Start"), "## Setup prints no `{seed}`"),
    (replace('viz.pipeline_strip("00")', "1"), "pipeline strip is missing"),
    (replace('viz.pipeline_strip("00")', 'viz.pipeline_strip("01")'), 'viz.pipeline_strip("00")'),
    (replace("print(2)", "print(time.monotonic())"), "a clock"),
    (replace("print(1)", "\n".join(["print(1)"] * 31)), "31 lines, at most 30"),
    (replace("print(2)", "!ls"), "a shell or magic command"),
    (replace("print(2)", "class A: pass"), "a class"),
    (replace("print(2)", "import matplotlib.pyplot as plt"), "this import"),
    (replace("print(2)", "x = y.to('cuda')"), "a fixed device"),
    (replace("print(2)", "torch.cuda.empty_cache()"), "a fixed device"),
    (replace("print(2)", "open('outputs/tiny/x')"), "outputs/tiny: the defaults are the smoke"),
    (replace("add. Cost", "add. Price"), "exercise 1 does not say its cost"),
    (replace("we predict", "we hope"), "no exercise predicts"),
    (replace("3. Open", "Open"), "2 exercises"),
    (replace("a minute.", "a minute. ![a](x.png)"), "shows x.png: tag it `measured`"),
    (replace("a minute.", "a minute. ![a](x.png)"), "x.png is not there"),
    (change_last(execution_count=None), "not every cell has run"),
    (change_last(id="x"), "cell ids"),
    (change_last(outputs=[]), "at least 5"),
    (change_last(metadata={"collapsed": True}), "metadata"),
    (change_last(outputs=[new_output("stream", name="stderr", text="w")]), "stderr"),
    (change_last(outputs=[new_output("stream", text="/opt/x")]), "a machine's path"),
    (change_last(outputs=[new_output("display_data", {"image/png": ""})]), "says `Look for`"),
    (change_last(outputs=[new_output("stream", text="<A at 0x7f12ab34>")]), "a memory address"),
    (change_last(outputs=[new_output("stream", text="x" * 300_001)]), "bytes: over"),
])  # fmt: skip
def test_broken_rule_is_named(change, problem, tmp_path):
    notebook = copy.deepcopy(good_notebook())
    change(notebook)
    assert problem in problems_of(notebook, tmp_path)


def test_banner_table_is_filled_from_recorded_costs(tmp_path, monkeypatch):
    from tlv import costs

    monkeypatch.setattr(costs, "ROOT", tmp_path)
    costs.record_cost("tiny", "00_x", 125, 1536 * 1024)
    notebook = good_notebook()
    notebook_form.fill_banner(notebook, "00_x")
    text = notebook.cells[0].source
    assert text.startswith("# 00 · Title\nWhy?\n\n| run | device | wall time | peak memory |")
    assert "| tiny | " in text and "| 2.1 min | 1.5 GiB |" in text
    assert "| smoke | not yet measured |" in text and text.count("| run |") == 1
    assert problems_of(notebook, tmp_path) == ""
    notebook_form.drop_banner(notebook)  # in the executed copy of a stage
    assert notebook.cells[0].source == "# 00 · Title\nWhy?"


@pytest.mark.slow
def test_refresh_stores_outputs_and_is_stable(tmp_path, monkeypatch):
    from tlv import costs

    monkeypatch.setattr(costs, "ROOT", tmp_path)
    monkeypatch.setattr(notebooks, "FOLDER", tmp_path)
    monkeypatch.setattr(costs, "duration", lambda seconds: "1 s")
    before, notebook = dict(os.environ), good_notebook()
    for cell in notebook.cells:
        cell.pop("outputs", None) if cell.cell_type == "markdown" else cell.update(outputs=[])
    path = tmp_path / "00_x.ipynb"
    notebooks.write(path, notebook)
    versions = []
    for _ in range(2):
        notebooks.refresh("00_x")
        versions.append(json.loads(path.read_text())["cells"][1:])
    os.environ.clear()
    os.environ.update(before)
    assert versions[0] == versions[1]
    assert lint(path) == []
    shown = versions[0][-6]["outputs"][0]["data"]  # the pipeline strip, shown once
    assert "image/png" in shown and len(versions[0][-6]["outputs"]) == 1
    (cost,) = costs.read_costs("smoke")["00_x"].values()
    assert cost["peak_mib"] > 50


@pytest.mark.parametrize("action", ["lint", "refresh"])
def test_an_unknown_notebook_is_refused_with_the_known_ones(action, capsys):
    with pytest.raises(SystemExit, match="2"):
        notebooks.main([action, "02_architecture", "09_x"])
    assert "no notebook '09_x'; there are 00_toy_world" in capsys.readouterr().err
