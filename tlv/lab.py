"""JupyterLab on the notebooks: `python -m tlv.lab [options of jupyter lab]`, or `make lab`.

Its kernels run as those of the smoke run do, so that *Run all* prints what is committed, without
warnings about things that the notebooks do not use.
"""

import os
import sys

from tlv import notebooks

QUIET = {
    "PYTHONWARNINGS": "ignore:IProgress not found",  # tqdm's, that bars will be plain text
    "TRANSFORMERS_VERBOSITY": "error",
}
START = "--LabApp.default_url=/lab/tree/notebooks"


def main(arguments) -> None:
    """Become JupyterLab. What the user has set of `QUIET` stays."""
    env = QUIET | os.environ | notebooks.environment(num_threads=1)
    os.execve(sys.executable, [sys.executable, "-m", "jupyterlab", START, *arguments], env)


if __name__ == "__main__":
    main(sys.argv[1:])
