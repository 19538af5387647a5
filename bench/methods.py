"""What each merge method costs: seconds, and memory beside the bound that `hf-datavec plan` states.

    python bench/methods.py --network resnet-50 --vectors 5

Each method has a process of its own, that starts its libraries and reads the headers first. Measured is from there on,
with all threads of torch: measuring the vectors where the method asks for it, and combining them; what is combined
is let go, so nothing is written. Memory is how much of it that is not file pages (RssAnon) is added, looked at every
2 ms. Methods that learn, or that need more than vectors from the sites, are left out; `wudi` takes `--steps`. Networks
are those of `bench/speed.py`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from speed import NETWORKS, machine, make, spread

PROGRAM = """
import json, os, sys, threading, time
from pathlib import Path
import numpy, torch
sys.path.insert(0, sys.argv[2])
from speed import anonymous
from hf_datavec import fuse, survey
from hf_datavec.pipeline.prepare import prepare
from hf_datavec.threads import tune_process

def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], anonymous(os.getpid()))

tune_process()
plan = prepare(Path(sys.argv[1])).plan
torch.linalg.svd(torch.eye(8))  # what torch starts when it is first asked for one
before, done = anonymous(os.getpid()), threading.Event()
peak = [before]
watcher = threading.Thread(target=watch)
watcher.start()
begun = time.monotonic()
for _ in fuse.pieces(plan, survey=survey.take(plan)):
    pass
seconds = time.monotonic() - begun
done.set()
watcher.join()
memory = max(peak[0], anonymous(os.getpid())) - before
print(json.dumps({"seconds": seconds, "memory": memory, "bound": plan.peak_bytes}))
"""


def main() -> None:
    """Run every method in turn, round by round, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, default="resnet-50")
    parser.add_argument("--methods", nargs="+", help="only these")
    parser.add_argument("--vectors", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="of wudi")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "hf-datavec-bench")
    options = parser.parse_args()
    folder = options.work.absolute() / options.network
    folder.mkdir(parents=True, exist_ok=True)
    make(options.network, folder, options.vectors, 0)
    for line in machine():
        print(line)
    names = options.methods or alone(options.vectors)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in names:
            found[name].append(measured(folder, name, options))
    print(f"\n{options.network}, {options.vectors} vectors, {options.rounds} rounds")
    print("| method | seconds | memory, MB | bound, MB |")
    print("| --- | --- | --- | --- |")
    for name in sorted(names, key=lambda name: statistics.median(run["seconds"] for run in found[name])):
        runs = found[name]
        memory = max(run["memory"] for run in runs) / 1e6
        print(
            f"| `{name}` | {spread([run['seconds'] for run in runs])} | {memory:.0f} | {runs[0]['bound'] / 1e6:.0f} |"
        )


def alone(count: int) -> list[str]:
    """The methods that take so many vectors and need nothing else."""
    from hf_datavec.methods import all_methods

    return [
        name
        for name, method in all_methods().items()
        if not (method.from_sites or method.learned or method.needs_counts or method.refuse(count, {}))
    ]


def measured(folder: Path, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One run of a method."""
    merge = {"method": name, "options": {"steps": options.steps} if name == "wudi" else {}}
    vectors = [{"vector": f"./vector-{number}", "name": f"site-{number}"} for number in range(options.vectors)]
    (folder / "methods.yaml").write_text(json.dumps({"base": "./base", "vectors": vectors, "merge": merge}), "utf-8")
    command = [sys.executable, "-c", PROGRAM, "methods.yaml", str(Path(__file__).parent)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed: {done.stderr}")
    return json.loads(done.stdout)  # type: ignore[no-any-return]


if __name__ == "__main__":
    main()
