"""What each notebook has to show, whatever else is rewritten: the cell is there, and so is what it
showed when the notebook was last run."""

import pytest

from tlv import notebooks

FIGURE = None  # the cell shows a figure

LESSONS = [  # notebook, words of the cell's code, words that it printed
    ("00", "viz.frame_strip(frames[shown]", FIGURE),
    ("00", "questions.event_text(scene, event)", "frame"),
    ("00", "direction from two frames", "✓"),
    ("00", "defects.TEXT_DEFECTS", "in texts: "),
    ("00", "the loss by hand equals tlv's", "✓"),
    ("00", 'show_curve("vision"', FIGURE),
    ("00", 'show_curve("llm"', FIGURE),
    ("01", 'funnel.apply("readable"', "such as"),
    ("01", "motion_gallery =", FIGURE),
    ("01", "copy_gallery =", FIGURE),
    ("01", "perplexity_figure =", FIGURE),
    ("01", "agreement_gallery =", FIGURE),
    ("01", 'funnel.apply("conversation"', "turn"),
    ("01", 'funnel.apply("leakage"', "a copy of"),
    ("01", "for step, sizes in funnel.steps", "raw samples are left"),
    ("01", "for name, s in scores.items()", "overall"),
    ("01", "truth_figure =", FIGURE),
    ("02", "patches @ W + b + p is the first", "✓"),
    ("02", "Perceiver attention by hand", "✓"),
    ("02", "naive resampler by hand", "✓"),
    ("02", "by hand, S = {length}", "✓ by hand, S = 22"),
    ("02", "spliced by hand, equal to tlv's", "✓ spliced"),
    ("02", "paper_counts[part]", "3,629,878,336"),
    ("02", "paper_counts[part]", "30,480,160"),
    ("03", 'mask("pretrain")', FIGURE),
    ("03", "the labels by hand equal tlv's", "✓"),
    ("03", "the loss by hand equals tlv's", "✓"),
    ("03", '"overfit.png"', FIGURE),
    ("03", "launch(config, ranks)", "steps of"),
    ("03", '"loss.png"', FIGURE),
    ("03", '"captions.png"', FIGURE),
    ("04", '"mask_packed.png"', FIGURE),
    ("04", "another first answer changes the second", "✓"),
    ("04", '"overfit.png"', FIGURE),
    ("04", "launch(config, ranks)", "steps of"),
    ("04", '"loss.png"', FIGURE),
    ("04", 'answers_of(checkpoint, "after")', " after\n"),
    ("04", '"answers.png"', FIGURE),
    ("05", "if independent", " by clip"),
    ("05", '"unseen_pairs": "unseen, both"', "unseen, both"),
    ("05", "for name in baselines", "blind  other_clip    majority"),
    ("05", "types_figure =", FIGURE),
    ("05", "viz.confusion(", FIGURE),
    ("05", "calibration_figure =", FIGURE),
    ("05", "gallery = viz.gallery(", FIGURE),
    ("06", '"needle.png"', FIGURE),
    ("06", '"keyframes.png"', FIGURE),
    ("06", '"needle_grid.png"', FIGURE),
    ("06", '"hit_rates.png"', FIGURE),
    ("06", '"hit_rates.png"', "counted over possible places"),
    ("06", '"weights", [', "weights ["),
    ("06", '"weights.png"', FIGURE),
    ("06", '"accuracy.png"', FIGURE),
]  # fmt: skip


@pytest.fixture(scope="module")
def code_cells():
    """The code cells of each notebook, by its number."""
    paths = {name[:2]: notebooks.FOLDER / f"{name}.ipynb" for name in notebooks.names()}
    return {
        number: [cell for cell in notebooks.read(path).cells if cell.cell_type == "code"]
        for number, path in paths.items()
    }


def shows(cell, text) -> bool:
    if text is FIGURE:
        return any("image/png" in output.get("data", {}) for output in cell.outputs)
    return text in "".join(output.get("text", "") for output in cell.outputs)


@pytest.mark.parametrize("number, code, text", LESSONS)
def test_notebook_teaches_and_shows(number, code, text, code_cells):
    found = [cell for cell in code_cells[number] if code in cell.source]
    assert found, f"no cell of notebook {number} holds {code!r}"
    assert any(shows(cell, text) for cell in found), f"none of them shows {text or 'a figure'!r}"


def test_failures_come_first_in_the_gallery_of_answers(code_cells):
    (cell,) = (c.source for c in code_cells["05"] if "gallery = viz.gallery(" in c.source)
    assert cell.index("pick(False") < cell.index("pick(True")
