"""Run the parts on this machine's GPU: `make test-gpu`. One JSON line for each part, nine minutes at most.

Each part runs in a process of its own with its own time limit, so that one that hangs or dies ends nothing else. A part
without a package that it needs is skipped, with the name of the package. It needs no network and no weights: models are
random, or made by the demo. Python 3.12 with torch 2.11 and transformers 5.17 suffice for most parts; those that start
`glm train` or batch answers need the transformers of the lock, and the packages that they name.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
TOTAL_SECONDS = 540


def main(argv: list[str] | None = None) -> int:
    """Run all parts, or one in this process; 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="names of parts; all without any")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny models, as the tests run the parts on CPUs")
    parser.add_argument("--patience", type=float, default=1.0, help="factor of all time limits, for busy machines")
    parser.add_argument("--here", action="store_true", help="run one part in this process")
    args = parser.parse_args(argv)
    sys.path[:0] = [str(REPOSITORY), str(Path(__file__).parent)]
    from parts import PARTS

    if args.here:
        return _run_here(args)
    begin, failed = time.monotonic(), False
    for name in args.parts or PARTS:
        left = args.patience * TOTAL_SECONDS - (time.monotonic() - begin)
        limit = min(args.patience * PARTS[name][1], left)
        line = _run_part(name, limit, args) if left > 10 else {"skipped": "out of time"}
        print(json.dumps({"part": name, **line}, ensure_ascii=False), flush=True)
        failed |= not line.get("ok") and "skipped" not in line
    return int(failed)


def _run_part(name: str, seconds: float, args: argparse.Namespace) -> dict:
    command = [sys.executable, __file__, name, "--here", "--device", args.device, *(["--small"] if args.small else [])]
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    begin = time.monotonic()
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, env=os.environ | {"PYTHONPATH": path}
        )
    except subprocess.TimeoutExpired:
        return {"ok": False, "error": f"longer than {seconds:.0f} s"}
    last = (done.stdout.strip().splitlines() or ["{}"])[-1]
    try:
        line = json.loads(last) if done.returncode == 0 else {}
    except ValueError:
        line = {}
    if not line:
        line = {"ok": False, "error": done.stderr[-1500:] or f"ended with code {done.returncode}"}
    return {**line, "seconds": round(time.monotonic() - begin, 1)}


def _run_here(args: argparse.Namespace) -> int:
    from parts import PARTS, Skipped

    with tempfile.TemporaryDirectory() as folder:
        try:
            found = PARTS[args.parts[0]][0](args.device, Path(folder), args.small)
        except Skipped as reason:
            print(json.dumps({"skipped": str(reason)}))
            return 0
    print(json.dumps({"ok": True, **found}, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
