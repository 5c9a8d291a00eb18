"""The workbook's rules for a notebook, checked by machine: `lint(path)` lists what breaks them.

The rules make every lesson read alike: the same sections in the same order, short cells, prose
before code, outputs that git can compare, exercises that say what they cost.
"""

import ast
import json
import re
import statistics
from itertools import takewhile
from pathlib import Path

from tlv.notebook_parameters import NotebookError, read_parameters

FIRST_SECTIONS = ["Goal", "Parameters", "Setup"]
LAST_SECTIONS = ["Write the results", "What you should see", "Recap", "Exercises", "References"]
MAX_PARAMETERS = {"02": 23, "03": 31, "04": 31, "05": 16, "06": 24}  # else 15
MAX_BYTES = 300_000
NOT_IN_OUTPUT = {  # what differs between machines or runs
    r"0x[0-9a-f]{6,}": "a memory address",
    r"(?<![\w.])/(home|root|tmp|work|Users|usr|opt)/": "a machine's path",
    r"\d+%\|.*\|": "a progress bar",
}
NOT_IN_CODE = {
    r"^\s*[!%]": "a shell or magic command: only tlv.launch starts processes",
    r"^\s*class \w": "a class: its home is tlv",
    r"os\.chdir": "os.chdir: paths start at tlv.ROOT",
    r"^\s*(import|from) (matplotlib|seaborn|subprocess)": "this import: use tlv.viz or tlv.launch",
    r"\.cuda\(\)|[\"']cuda[\"']|torch\.cuda": "a fixed device: take it from a parameter, through "
                                            "tlv.devices.find_device",
    r"outputs/tiny": "outputs/tiny: the defaults are the smoke run, in outputs/scratch",
    r"\btime\.\w+\(|perf_counter|ru_maxrss": "a clock: what it reads differs from run to run; tlv "
                                          "measures, and a cell tagged `measured` shows it",
}


def lint(path) -> list[str]:
    """The broken rules of one notebook file; an empty list if there are none."""
    path = Path(path)
    notebook = json.loads(path.read_text())
    cells = [{**c, "source": "".join(c["source"])} for c in notebook["cells"]]
    code = [c for c in cells if c["cell_type"] == "code"]
    prose = [c for c in cells if c["cell_type"] == "markdown"]
    number = path.name[:2]
    problems = _file(path, notebook, cells, code, number)
    problems += _opening(cells, number) + _sections(prose) + _parameters(code, number)
    problems += _setup(cells)
    problems += _rhythm(code, prose, number) + _code(code) + _outputs(code) + _exercises(prose)
    problems += _figures(cells) + _pictures(prose, path.parent)
    return problems


def _file(path, notebook, cells, code, number) -> list[str]:
    found = []
    if path.stat().st_size > MAX_BYTES:
        found.append(f"{path.stat().st_size} bytes: over {MAX_BYTES}, make figures smaller")
    if notebook["metadata"].get("kernelspec", {}).get("name") != "python3":
        found.append("the kernelspec must be python3")
    expected = [f"{number}-{i:02d}" for i in range(1, len(cells) + 1)]
    if [c.get("id") for c in cells] != expected:
        found.append(f"cell ids must be {number}-01, {number}-02 ...: run `make notebooks`")
    if [c["execution_count"] for c in code] != list(range(1, len(code) + 1)):
        found.append("not every cell has run once, in order: run `make notebooks`")
    extra = set().union(*(c["metadata"].keys() for c in cells)) - {"tags"}
    if extra or set(notebook["metadata"]) != {"kernelspec"}:
        found.append(f"metadata {sorted(extra)} of an editor: run `make notebooks`")
    return found


def _opening(cells, number) -> list[str]:
    text = cells[0]["source"] if cells[0]["cell_type"] == "markdown" else ""
    found = []
    if not re.match(rf"# {number} · \S", text):
        found.append(f"the first cell must begin `# {number} · Title`")
    if "?" not in text:
        found.append("the first cell must ask the one question that the notebook answers")
    if not re.search(r"^\| smoke \|.*\n\| tiny \|", text, flags=re.M):
        found.append("the first cell lacks the cost table (smoke, tiny): run `make notebooks`")
    return found


def headings(prose) -> list[str]:
    text = "\n".join(re.sub(r"```.*?```", "", c["source"], flags=re.S) for c in prose)
    return re.findall(r"^## +(.+?) *$", text, flags=re.M)


def _sections(prose) -> list[str]:
    found, names = [], headings(prose)
    first, last = names[: len(FIRST_SECTIONS)], names[-len(LAST_SECTIONS) :]
    if first != FIRST_SECTIONS or last != LAST_SECTIONS:
        found.append(f"sections must begin {FIRST_SECTIONS} and end {LAST_SECTIONS}, not {names}")
    lessons = len(names) - len(first) - len(last)
    if not 3 <= lessons <= 6:
        found.append(f"{lessons} lesson sections, must be three to six")
    goal = "\n".join(c["source"] for c in prose).partition("## Goal")[2].partition("\n## ")[0]
    if len(re.findall(r"^[-*] ", goal, flags=re.M)) != 3:
        found.append("## Goal must have three bullets")
    return found


def _parameters(code, number) -> list[str]:
    tagged = [c for c in code if "parameters" in c["metadata"].get("tags", [])]
    if len(tagged) != 1:
        return [f"{len(tagged)} cells are tagged `parameters`, must be one"]
    source = tagged[0]["source"]
    try:
        values = {name: default for name, (default, _) in read_parameters(source, "").items()}
    except NotebookError as error:
        return [str(error).removeprefix(": ")]
    found = [
        f"parameters: `{ast.unparse(line)}` lacks a comment with its unit"
        for line in ast.parse(source).body
        if "#" not in source.splitlines()[line.end_lineno - 1]
    ]
    limit = MAX_PARAMETERS.get(number, 15)
    if len(values) > limit:
        found.append(f"{len(values)} parameters, at most {limit}")
    if "seed" not in values or not str(values.get("out_dir", "")).startswith("outputs/scratch/"):
        found.append("parameters must hold `seed` and an `out_dir` below outputs/scratch/")
    return found


def _setup(cells) -> list[str]:
    """The section Setup prints what a run can be told by."""
    source, is_setup = "", False
    for cell in cells:
        if cell["cell_type"] == "markdown" and (names := headings([cell])):
            is_setup = names[-1] == "Setup"
        elif cell["cell_type"] == "code" and is_setup:
            source += cell["source"] + "\n"
    lines = [line for line in source.splitlines() if line.strip().startswith("print(")]
    return [f"## Setup prints no `{word}`" for word in ("{seed}", "__version__", "{out_dir}")
            if not any(word in line for line in lines)]  # fmt: skip


def _rhythm(code, prose, number) -> list[str]:
    found = []
    # The parameters cell has a limit of its own.
    cells = [c for c in code if "parameters" not in c["metadata"].get("tags", [])]
    lengths = [sum(bool(line.strip()) for line in c["source"].splitlines()) for c in cells]
    if statistics.median(lengths) > 8:
        found.append(f"median code cell has {statistics.median(lengths)} lines, at most 8")
    found += [f"a code cell has {n} lines, at most 30" for n in lengths if n > 30]
    if len(prose) < len(code):
        found.append(f"{len(prose)} prose cells for {len(code)} code cells: at least as many")
    strip = f'viz.pipeline_strip("{number}")'
    if not any(strip in c["source"] for c in code):
        found.append(f"the pipeline strip is missing: {strip}")
    return found


def _code(code) -> list[str]:
    return [
        f"cell {c.get('id')}: {reason}"
        for c in code
        for pattern, reason in NOT_IN_CODE.items()
        if re.search(pattern, c["source"], flags=re.M)
    ]


def _outputs(code) -> list[str]:
    found = []
    for cell in code:
        text = json.dumps([{k: v for k, v in o.items() if k != "data"} for o in cell["outputs"]])
        shown = [o.get("data", {}) for o in cell["outputs"]]
        text += json.dumps([v for d in shown for k, v in d.items() if k.startswith("text/")])
        found += [
            f"cell {cell.get('id')} prints {reason}"
            for pattern, reason in NOT_IN_OUTPUT.items()
            if re.search(pattern, text)
        ]
        kinds = {o.get("name") or o["output_type"] for o in cell["outputs"]}
        if kinds & {"stderr", "error"}:
            found.append(f"cell {cell.get('id')} has {sorted(kinds)} output: run `make notebooks`")
    compared = [c for c in code if "nbval-check-output" in c["metadata"].get("tags", [])]
    if sum(bool(c["outputs"]) for c in compared) < 5:
        found.append(f"{len(compared)} cells with compared output, at least 5 (nbval-check-output)")
    return found


def _figures(cells) -> list[str]:
    """The prose behind a figure says what to look for."""
    found = []
    for number, cell in enumerate(cells):
        shown = any("image/png" in output.get("data", {}) for output in cell.get("outputs", []))
        behind = takewhile(_goes_with_a_figure, cells[number + 1 :])
        if shown and "pipeline_strip(" not in cell["source"] and not any(
            "Look for" in c["source"] for c in behind
        ):
            found.append(f"no prose behind the figure of cell {cell['id']} says `Look for`")
    return found


def _goes_with_a_figure(cell) -> bool:
    return cell["cell_type"] == "markdown" or "measured" in cell["metadata"].get("tags", [])


def _pictures(prose, folder) -> list[str]:
    """Figures of committed runs: each must be there, and its cell must stay out of a run's copy."""
    found = []
    for cell in prose:
        links = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", cell["source"])
        if links and "measured" not in cell["metadata"].get("tags", []):
            found.append(f"cell {cell.get('id')} shows {links[0]}: tag it `measured`")
        found += [f"cell {cell.get('id')}: {link} is not there" for link in links
                  if not (folder / link).is_file()]  # fmt: skip
    return found


def _exercises(prose) -> list[str]:
    text = "\n".join(c["source"] for c in prose).partition("## Exercises")[2].partition("\n## ")[0]
    items = re.split(r"^\d+\. ", text, flags=re.M)[1:]
    found = []
    if not 3 <= len(items) <= 5:
        found.append(f"{len(items)} exercises (`1. ...`), must be three to five")
    found += [f"exercise {i} does not say its cost" for i, item in enumerate(items, 1)
              if "cost" not in item.lower()]  # fmt: skip
    if items and "predict" not in text.lower():
        found.append("no exercise predicts its outcome")
    return found
