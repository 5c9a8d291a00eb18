"""What runs cost: wall time, peak memory, machine and date, in `outputs/<preset>/costs.json`.

The file is in git but is no output of the pipeline: a slower machine makes no stage stale.
"""

import datetime
import json
import os
import re
from pathlib import Path

from tlv import ROOT
from tlv.files import write_json


def machine() -> str:
    """The processor's name and how many cores this process may use, and the GPU if there is one."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, flags=re.M)
    name = re.sub(r"\((R|TM)\)|CPU|Processor", "", found[1]) if found else "unknown processor"
    parts = [f"{len(os.sched_getaffinity(0))} cores of {' '.join(name.split())}"]
    for info in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        parts += re.findall(r"Model:\s*(.+)", info.read_text())
    return ", ".join(parts)


def costs_path(preset: str) -> Path:
    return ROOT / "outputs" / preset / "costs.json"


def read_costs(preset: str) -> dict[str, dict[str, dict]]:
    """stage -> machine -> wall_s, peak_mib, date; {} where nothing has run."""
    path = costs_path(preset)
    return json.loads(path.read_text()) if path.exists() else {}


def record_cost(preset: str, name: str, seconds: float, peak_kib: int) -> None:
    """Store one run's wall time and the memory of its largest process (kernel or rank), beside the
    last runs of other machines."""
    entry = {
        "wall_s": round(seconds, 1),
        "peak_mib": round(peak_kib / 1024),
        "date": datetime.date.today().isoformat(),
    }
    costs = read_costs(preset)
    others = {where: cost for where, cost in costs.get(name, {}).items() if where != machine()}
    costs[name] = others | {machine(): entry}  # the newest comes last
    write_json(costs_path(preset), dict(sorted(costs.items())))


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"


def banner_table(name: str) -> str:
    """The cost table at the head of a notebook: its smoke run and its real, tiny run."""
    rows = ["| run | device | wall time | peak memory |", "|---|---|---|---|"]
    for preset in ("smoke", "tiny"):
        found = read_costs(preset).get(name)
        cells = ("not yet measured", "", "")
        if found:
            where, cost = list(found.items())[-1]
            cells = where, duration(cost["wall_s"]), f"{cost['peak_mib'] / 1024:.1f} GiB"
        rows.append(f"| {preset} | {' | '.join(cells)} |")
    return "\n".join(rows)
