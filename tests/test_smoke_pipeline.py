"""The real notebooks as stages at smoke scale: run, not run again, run again equally, killed."""

import fcntl
import os
import re
import signal
import subprocess
import time

import papermill
import pytest
import yaml
from clone import IMAGE, NAMES, environment, make_clone, own_folder, repro, run, use_preset

from tlv import ROOT, checkpoint, notebooks
from tlv.builders import load_model
from tlv.card import read_card
from tlv.config import load_json
from tlv.files import write_json
from tlv.notebook_parameters import defaults_of
from tlv.stage import SCALE, STATED

pytestmark = pytest.mark.slow

# What differs from the notebooks' defaults, so that one run shows more of what they can do: the
# video model chooses frames by the question, the image model's pretraining is the recipe share's.
DESIGNS = {
    "02_architecture": dict(connector_type="vilamp", sampling="fps", fps=2.0, num_keyframes=2),
    "image/03_pretraining": dict(recipe="share", overfit_steps=0, num_clips=2),
}


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A clone in which the real notebooks ran once. All parameters are the notebooks' defaults,
    except where they read, the stages before, and DESIGNS."""
    folder = make_clone(tmp_path_factory.mktemp("real") / "clone")
    params = {}
    for name in map(own_folder, NAMES + IMAGE):
        notebook = notebooks.read(folder / f"notebooks/{name.split('/')[-1]}.ipynb")
        defaults = defaults_of(notebook)
        scale = {key: defaults[key] for key in defaults if SCALE.search(key) or key in STATED}
        values = yaml.safe_load((folder / f"params/tiny/{name}.yaml").read_text()) or {}
        design = ("manifest_dir", "connector_type", "num_frames") if "/" in name else ()
        params[name] = scale | {
            key: yaml.safe_load(yaml.safe_dump(value).replace("outputs/tiny/", "outputs/smoke/"))
            for key, value in values.items()
            if key in design or "outputs/tiny/" in str(value)
        }
        params[name] |= DESIGNS.get(name, {})
    use_preset(folder, "smoke", params)
    assert set(NAMES + IMAGE) <= set(repro(folder))
    return folder


def read(real, stage, name) -> dict:
    return load_json(real / "outputs/smoke" / stage / name)


def again(real, number, out_dir, **given):
    """Run a notebook on what the pipeline made."""
    (name,) = (n for n in NAMES if n.startswith(number))
    given |= {"out_dir": str(out_dir)}
    papermill.execute_notebook(notebooks.FOLDER / f"{name}.ipynb", f"{out_dir}.ipynb", given,
                               cwd=str(ROOT), progress_bar=False)  # fmt: skip


def test_real_notebooks_run_at_smoke_scale_and_only_once(real):
    metrics = read(real, "05_evaluation", "metrics.json")
    assert metrics["num_questions"] > 0 and "other/type/colour" in metrics
    pictures = read(real, "image/05_evaluation", "metrics.json")
    assert "accuracy/type/place" in pictures and "accuracy/type/order" not in pictures
    assert repro(real) == []


def test_the_connector_goes_through_all_notebooks(real):
    config = load_model(real / "outputs/smoke/04_sft/checkpoint")[0].config
    assert (config.connector_type, config.num_keyframes) == ("vilamp", 2)


def test_filtering_training_and_asking_again_give_the_same_bytes(real):
    lock = (real / "dvc.lock").read_text()
    for name in ("01_data_filtering", "03_pretraining", "04_sft", "05_evaluation"):
        assert repro(real, "--force", "--single-item", name) == [name]
    assert (real / "dvc.lock").read_text() == lock


def test_what_is_kept_depends_neither_on_the_truth_nor_on_ids(real, tmp_path):
    """Published annotations have a clip's name for each of its samples, a number, or none."""
    card = {k: str(v) for k, v in read_card(real / "outputs/smoke/00_toy_world/world").items()}
    card |= {"truth": ""}
    for pool in ("captions", "qa"):
        samples = load_json(card[f"raw_{pool}"])
        card[f"raw_{pool}"] = str(tmp_path / f"raw_{pool}.json")
        for number, sample in enumerate(samples):
            sample["id"] = number if pool == "qa" else sample.get("video")
        del samples[0]["id"]
        write_json(card[f"raw_{pool}"], samples)
    write_json(tmp_path / "world.json", card)
    again(real, "01", tmp_path / "01", world_dir=str(tmp_path))
    assert read(real, "01_data_filtering", "report.json")["scores"]
    assert not load_json(tmp_path / "01/report.json")["scores"]
    for file in ("captions.json", "qa.json"):
        known, other = (load_json(folder / file) for folder in (
            real / "outputs/smoke/01_data_filtering", tmp_path / "01"))  # fmt: skip
        assert len({s["id"] for s in other}) == len(other) > 0
        assert [s | {"id": ""} for s in other] == [s | {"id": ""} for s in known], file


def test_own_questions_may_lack_a_form_known_types_and_unseen_pairs(real, tmp_path):
    card = {k: str(v) for k, v in read_card(real / "outputs/smoke/00_toy_world/world").items()}
    questions = [q | {"unseen_pair": False, "type": f"what {q['type']}"}
                 for q in load_json(card["test_questions"]) if q["form"] == "choice"]
    write_json(tmp_path / "questions.json", questions)
    write_json(tmp_path / "world.json", card | {"test_questions": str(tmp_path / "questions.json")})
    again(real, "05", tmp_path / "05", world_dir=str(tmp_path), num_clips=3,
          model_dir=str(real / "outputs/smoke/04_sft"))  # fmt: skip
    metrics = load_json(tmp_path / "05/metrics.json")
    assert {"accuracy/choice", "accuracy/type/what colour"} <= set(metrics)
    assert not {"accuracy/free", "accuracy/unseen_pairs"} & set(metrics)
    figures = {path.stem for path in (tmp_path / "05/figures").iterdir()}
    assert figures == {"types", "calibration", "gallery"}


def test_the_recipe_share_pretrains_twice(real, tmp_path):
    """First the connector, then also the LLM and the encoder's upper layers."""
    pictures = str(real / "outputs/smoke/00_toy_world/world/pictures")
    first = real / "outputs/smoke/image/03_pretraining"
    again(real, "03", tmp_path / "two", stage="pretrain_share", template=None, recipe="share",
          cache_features=False, overfit_steps=0, num_clips=2, model_dir=str(first),
          world_dir=pictures, manifest_dir="")  # fmt: skip
    reports = [load_json(folder / "report.json") for folder in (first, tmp_path / "two")]
    counts = [report["trained_parameters"] for report in reports]
    assert counts[0]["llm"] == counts[0]["vision"] == 0 < counts[0]["connector"]
    encoder = load_model(tmp_path / "two" / "checkpoint")[0].vision_encoder
    assert 0 < counts[1]["vision"] < sum(p.numel() for p in encoder.parameters())
    assert counts[1]["llm"] > 0


def test_a_killed_pipeline_goes_on_where_its_training_was(real):
    path = real / "params/smoke/03_pretraining.yaml"
    values = yaml.safe_load(path.read_text()) | {"num_steps": 60, "save_every": 5}
    path.write_text(yaml.safe_dump(values | {"overfit_steps": 0, "val_every": None}))
    command = ["dvc", "repro", "03_pretraining"]
    process = subprocess.Popen(command, cwd=real, env=environment(real), start_new_session=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    root, stop = real / "outputs/.resume/smoke/03_pretraining", time.time() + 600
    while not any(checkpoint.list_steps(folder) for folder in root.glob("*")):
        assert process.poll() is None and time.time() < stop, "no checkpoint was written"
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    with open(root / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # kernel and ranks end when they find their parent gone
    said = run(command, real)
    assert re.search(r"resuming at step \d+", said), said[-2000:]
