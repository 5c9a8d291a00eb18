"""JupyterLab as `make lab` starts it."""

import os

import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

from tlv import lab, notebooks


@pytest.fixture
def started(monkeypatch):
    """started(*options) -> the command and the environment that JupyterLab would have."""
    calls = []
    monkeypatch.setattr(os, "execve", lambda *call: calls.append(call))

    def start(*options):
        lab.main(list(options))
        _, command, env = calls.pop()
        return command, env

    return start


def test_it_opens_the_notebooks_with_the_users_own_options(started, monkeypatch):
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    command, env = started("--port", "9999")
    assert command[1:] == ["-m", "jupyterlab", "--LabApp.default_url=/lab/tree/notebooks",
                           "--port", "9999"]  # fmt: skip
    assert env["TRANSFORMERS_VERBOSITY"] == "info" and env["PATH"] == os.environ["PATH"]
    assert env["PYTHONHASHSEED"] == "0"


@pytest.mark.slow
def test_its_kernels_do_not_warn_of_what_the_notebooks_do_not_use(started, monkeypatch):
    for name, value in started()[1].items():
        monkeypatch.setenv(name, value)
    code = """
from tqdm.auto import tqdm
from transformers import SiglipConfig
told = SiglipConfig().to_diff_dict()
"""
    notebook = new_notebook(cells=[new_code_cell(code)])
    with notebooks.private_kernel() as manager:
        NotebookClient(notebook, km=manager).execute()
    assert notebook.cells[0].outputs == []
