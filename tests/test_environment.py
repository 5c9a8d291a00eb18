"""One set of pins, read everywhere; no torchvision; nothing of one machine in the repository."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import requires

import pytest
import yaml
from packaging.requirements import Requirement

from tlv import ROOT, __version__

GPU_ONLY = re.compile(r"^(nvidia-|triton|cuda)")


def pins() -> dict[str, str]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line) for line in lines), (
        "requirements.txt holds public pins only: name==version"
    )
    return {name(line.split("==")[0]): line.split("==")[1] for line in lines}


def name(text) -> str:
    return re.sub(r"[-_.]+", "-", text).lower()


def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def project() -> dict:
    return pyproject()["project"]


def test_every_dependency_is_pinned_and_no_gpu_wheel_is():
    assert {name(d) for d in project()["dependencies"]} <= set(pins())
    assert not [n for n in pins() if GPU_ONLY.match(n)], "torch brings its own GPU wheels"
    assert pins()["torch"] == "2.13.0" and pins()["transformers"].startswith("5.")


def needed() -> tuple[set[str], set[str]]:
    """The names of all that the dependencies need here, pinned and not."""
    todo = [Requirement(text) for text in project()["dependencies"]]
    seen, unpinned = set(), set()
    while todo:
        wanted = todo.pop()
        if wanted in seen or GPU_ONLY.match(name(wanted.name)):
            continue  # a CUDA build of torch names its own GPU wheels
        seen.add(wanted)
        if name(wanted.name) not in pins():
            unpinned.add(name(wanted.name))
            continue
        for theirs in map(Requirement, requires(wanted.name) or []):
            extras = ("", *wanted.extras)  # "": what is needed without any
            if not theirs.marker or any(theirs.marker.evaluate({"extra": e}) for e in extras):
                todo.append(theirs)
    return {name(wanted.name) for wanted in seen} - unpinned, unpinned


def test_what_the_dependencies_need_is_pinned_and_nothing_else_is():
    """A package that nothing needs is installed for nothing, and may be imported by others."""
    pinned, unpinned = needed()
    assert not unpinned and pinned == set(pins())


def test_installed_packages_are_the_pinned_ones():
    from importlib.metadata import version

    wrong = {
        n: (version(n).split("+")[0], pin)
        for n, pin in pins().items()
        if version(n).split("+")[0] != pin
    }
    assert not wrong, f"installed, pinned: {wrong}; run `make venv`"


def test_every_package_is_installed():
    """An editable install would find a folder that the list forgets."""
    files = (ROOT / "tlv").rglob("__init__.py")
    found = [".".join(path.parent.relative_to(ROOT).parts) for path in files]
    assert pyproject()["tool"]["setuptools"]["packages"] == sorted(found)


def test_conda_environment_reads_the_same_pins():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    plain = [d for d in environment["dependencies"] if isinstance(d, str)]
    (pip,) = [d["pip"] for d in environment["dependencies"] if isinstance(d, dict)]
    assert pip == ["-r requirements.txt", "-e ."]
    (python,) = [d for d in plain if d.startswith("python=")]
    assert f">={python.split('=')[1]}" in project()["requires-python"]
    assert "pip" in plain
    assert {d.split("=")[0] for d in plain} <= {"python", "pip", "git", "make"}


def test_make_installs_once(tmp_path):
    for name in ("Makefile", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv").mkdir()
    shutil.copy(ROOT / "requirements.txt", tmp_path / ".venv/installed.txt")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    call = dict(cwd=tmp_path, env=env, text=True, capture_output=True)
    done = subprocess.run(["make", "venv"], **call)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    (tmp_path / ".venv/installed.txt").write_text("torch==1.0\n")  # other pins: it would install
    done = subprocess.run(["make", "venv", "PYTHON=false"], **call)
    assert done.returncode and "building .venv" in done.stdout


def test_version_is_told_once_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert project()["version"] == __version__ == citation["version"]
    identifiers = [r["identifiers"][0]["value"] for r in citation["references"]]
    assert identifiers == ["arXiv:2402.14289", "arXiv:2501.15513", "arXiv:2504.02438"]
    assert project()["license"] == citation["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()[:200]


def test_torchvision_cannot_be_imported():
    assert importlib.util.find_spec("torchvision") is None, (
        "torchvision is installed: its CUDA build breaks transformers on a CPU; pip uninstall it"
    )
    assert "torchvision" not in pins()


def tracked_text() -> list[tuple[str, str]]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, text=True, capture_output=True)
    if listed.returncode:
        pytest.skip("not a git repository")
    names = [n for n in listed.stdout.split("\0") if n and (ROOT / n).is_file()]
    kinds = (".py", ".md", ".toml", ".yml", ".yaml", ".cfg", ".json", ".txt", ".ipynb", ".cff")
    names = [n for n in names if n.endswith(kinds) or "." not in n.rsplit("/", 1)[-1]]
    names += [n for n in (".ci/run", ".dvc/config") if n not in names]
    return [(n, (ROOT / n).read_text()) for n in names if n != "tests/test_environment.py"]


@pytest.mark.parametrize("what, pattern", [
    ("a machine's path", r"(?<![\w.$}])/(home|root|work|Users)/\w"),
    ("a package registry", r"pypi\.org|files\.pythonhosted|download\.pytorch\.org|index-url"),
])  # fmt: skip
def test_tracked_files_name_no(what, pattern):
    found = [f"{n}: {m[0]}" for n, text in tracked_text() if (m := re.search(pattern, text))]
    assert not found, f"{what}: {found}"


def test_make_prints_its_targets_and_ci_runs_the_tests():
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(["make"], cwd=ROOT, env=env, text=True, capture_output=True, check=True)
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    assert targets == {line.split()[0] for line in done.stdout.splitlines()[1:]}
    assert {"repro", "test", "lab", "notebooks", "book", "remote", "clean"} <= targets
    for target, last in (("repro", "dvc repro"), ("test", "python -m pytest -n 2 ")):
        plan = subprocess.run(["make", "-n", target], cwd=ROOT, env=env, text=True,
                              capture_output=True, check=True)  # fmt: skip
        assert plan.stdout.splitlines()[-1].startswith(last)
    assert "make test" in (ROOT / ".ci/run").read_text()
    assert (ROOT / ".ci/run").stat().st_mode & 0o111


def test_code_style():
    command = [sys.executable, "-m", "ruff", "check", "."]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout
