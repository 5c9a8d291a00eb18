"""The model, the trainer and what two notebooks share, in the small-LMM workbook."""

from pathlib import Path

__version__ = "0.1.0"

# Every path in the workbook starts here: Papermill and Jupyter run in different folders.
ROOT = Path(__file__).resolve().parent.parent
