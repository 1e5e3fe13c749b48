"""Run the parts on this machine's GPU: `make test-gpu`. One JSON line for each part, nine minutes at most.

Each part runs in a process of its own with its own time limit, so that one that hangs or dies ends nothing else. A part
without a package that it needs is skipped, with the name of the package. It needs no network and no weights: models are
random, or made by the demo. Python 3.12 with torch 2.11 and transformers 5.17 suffice for most parts; those that start
`glm train` or batch answers need the transformers of the lock, and the packages that they name. What `make gpu-wheels`
downloads to .gpu-wheels is imported first: copy it to a machine without a network.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
TOTAL_SECONDS = 540
WHEELS = REPOSITORY / ".gpu-wheels"


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
    with _unpacked(WHEELS) as packages:
        for name in args.parts or PARTS:
            left = args.patience * TOTAL_SECONDS - (time.monotonic() - begin)
            limit = min(args.patience * PARTS[name][1], left)
            line = _run_part(name, limit, args, packages) if left > 0 else {"ok": False, "error": "no time was left"}
            print(json.dumps({"part": name, **line}, ensure_ascii=False), flush=True)
            failed |= not line.get("ok") and "skipped" not in line
    return int(failed)


@contextlib.contextmanager
def _unpacked(wheels: Path) -> Iterator[str]:
    """A folder to import from with the contents of all wheels of a folder."""
    with tempfile.TemporaryDirectory() as folder:
        for wheel in sorted(wheels.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder)
        yield folder


def _run_part(name: str, seconds: float, args: argparse.Namespace, packages: str) -> dict:
    command = [sys.executable, __file__, name, "--here", "--device", args.device, *(["--small"] if args.small else [])]
    path = os.pathsep.join(filter(None, (packages, str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    begin = time.monotonic()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
        start_new_session=True,  # a run of `glm train` that the part started has to end with it
    )
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return {"ok": False, "error": f"longer than {seconds:.0f} s"}
    last = (output.strip().splitlines() or ["{}"])[-1]
    try:
        line = json.loads(last) if process.returncode == 0 else {}
    except ValueError:
        line = {}
    if not line:
        line = {"ok": False, "error": errors[-1500:] or f"ended with code {process.returncode}"}
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
