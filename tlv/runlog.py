"""What a run tells: log.jsonl (the same bytes for the same run), a progress bar, TensorBoard.

log.jsonl holds one row per optimizer step: step, loss, lr_<part>, grad_norm, num_tokens, and
val_loss where it was measured (step 0 is before training). No timings: those are on the bar.
"""

import json
import shutil
import sys
from pathlib import Path

from tqdm import tqdm

from tlv.config import ConfigError, load_json_lines
from tlv.files import write_text


def read_log(path) -> list[dict]:
    """The rows of a log.jsonl."""
    return load_json_lines(path)


SAID = "tlv.train stopped: "  # in front of every line of what stopped a rank


def say(text: str, is_first: bool = True) -> None:
    """A line on stderr from the first rank."""
    if is_first:
        tqdm.write(f"tlv.train: {text}", file=sys.stderr)
        sys.stderr.flush()


def bar(is_first: bool, **options) -> tqdm:
    """A progress bar on stderr, of the first rank alone; its rate and time left are tqdm's."""
    if not is_first:
        options["disable"] = True  # for the first rank the variable TQDM_DISABLE decides
    return tqdm(file=sys.stderr, dynamic_ncols=True, mininterval=1.0, **options)


class RunLog:
    """Rows of log.jsonl in memory and on disk, and their copy in TensorBoard; first rank only."""

    def __init__(self, out_dir: Path, is_first: bool, rows=(), tensorboard=False):
        self.rows, self._path, self._is_first = list(rows), out_dir / "log.jsonl", is_first
        self._writer = None
        if is_first:
            write_text(self._path, "".join(_line(row) for row in self.rows))
            if tensorboard:
                shutil.rmtree(out_dir / "tensorboard", ignore_errors=True)
                self._writer = find_tensorboard()(str(out_dir / "tensorboard"))
                for row in self.rows:
                    self._draw(row)

    def add(self, row: dict) -> None:
        """Append one row."""
        self.rows.append(row)
        if not self._is_first:
            return
        with open(self._path, "a") as file:
            file.write(_line(row))
        if self._writer is not None:
            self._draw(row)

    def _draw(self, row: dict) -> None:
        for name, value in row.items():
            if name != "step" and value is not None:
                self._writer.add_scalar(name, value, row["step"])

    def last(self, name: str):
        """The newest value of a column, or None."""
        return next((row[name] for row in reversed(self.rows) if row.get(name) is not None), None)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _line(row: dict) -> str:
    return json.dumps(row) + "\n"


def find_tensorboard():
    """TensorBoard's SummaryWriter. Raises ConfigError where the package is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError("tensorboard: true in the launch settings, but it is not installed: "
                          "pip install tensorboard==2.21.0, or take the line out") from error
    return SummaryWriter
