"""`python -m benches` lists the benches; `python -m benches NAME ...` runs one, or `all`."""

import os
import subprocess
import sys
from pathlib import Path


def main() -> None:
    files = sorted(Path(__file__).parent.glob("bench_*.py"))
    names = [file.stem.removeprefix("bench_") for file in files]
    wanted = sys.argv[1:2]
    if not wanted or (wanted[0] not in names and wanted[0] != "all"):
        print("benches:", *names, "(or all)")
        raise SystemExit(bool(wanted))
    # spconv's CPU code is right with one OpenMP thread only, and must find it set at start.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in names if wanted == ["all"] else wanted:
        command = [sys.executable, "-m", f"benches.bench_{name}", *sys.argv[2:]]
        subprocess.run(command, check=True, env=environment)


if __name__ == "__main__":
    main()
