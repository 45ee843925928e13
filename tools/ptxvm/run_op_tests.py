"""Runs the ops' tests on the vm backend, seed by seed, on two processors; says what ran.

python tools/ptxvm/run_op_tests.py --seeds 1 2 3 4 5 -- -k softmax
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent.parent
SHARDS = 2  # parts that the tests of a seed are cut into, so that the processors finish together


def run(seed: int, shard: int, folder: Path, further: list[str]) -> dict[str, object]:
    """One part of the tests on one seed, in a process of its own."""
    record = folder / f"{seed}.{shard}.json"
    command = [sys.executable, "-m", "pytest", "--backend", "vm", "--vm-seed", str(seed)]
    command += ["--vm-shard", f"{shard}/{SHARDS}", "--vm-record", str(record)]
    command += ["-p", "no:cacheprovider", "--no-header", *further]
    start = time.monotonic()
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    lines = done.stdout.strip().splitlines()
    print(
        f"seed {seed}, part {shard + 1} of {SHARDS}: {lines[-1] if lines else done.stderr[-2000:]}"
    )
    # 5: no test was selected.
    if done.returncode not in (0, 5):
        print(done.stdout[-20000:], done.stderr[-2000:], sep="\n")
    content = json.loads(record.read_text()) if record.exists() else {}
    return {"failed": done.returncode not in (0, 5), "seconds": time.monotonic() - start, **content}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("further", nargs="*", help="arguments of pytest, after --")
    options = parser.parse_args()
    start = time.monotonic()
    with TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        jobs = [
            pool.submit(run, seed, shard, Path(folder), options.further)
            for seed in options.seeds
            for shard in range(SHARDS)
        ]
        results = [job.result() for job in jobs]
    launched: dict[str, int] = {}
    known: set[str] = set()
    for result in results:
        known.update(result.get("known", []))
        for kernel, count in result.get("launches", {}).items():
            launched[kernel] = launched.get(kernel, 0) + count
    instructions = sum(result.get("instructions", 0) for result in results)
    silent = sorted(known - set(launched))
    executed = {name: launched.get(name, 0) for name in sorted(known)}
    (ROOT / "build" / "vm" / "executed.json").write_text(json.dumps(executed, indent=1) + "\n")
    print(
        f"{len(known) - len(silent)} of {len(known)} kernels executed,"
        f" {sum(launched.values())} launches, {instructions / 1e9:.2f} G warp instructions,"
        f" {time.monotonic() - start:.0f} s,"
        f" seeds {' '.join(map(str, options.seeds))}"
    )
    for name in silent:
        print(f"never launched: {name}")
    return int(any(result["failed"] for result in results))


if __name__ == "__main__":
    sys.exit(main())
