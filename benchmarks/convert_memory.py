"""Peak anonymous memory of a conversion, and whether one that is killed on its way ends with the same bytes.

    python benchmarks/convert_memory.py --gigabytes 16 --shard 2GB --kills 3 --folder SCRATCH

A random Llama (`examples/random_checkpoint.py`) is converted in a process that is watched: once in peace, then killed
by SIGKILL at random moments and started again each time. Mapped shards are not counted: `RssAnon` of /proc is what the
process could not give back (Linux only). The scratch folder takes about twice the size and is emptied at the end.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONVERT = (
    "import sys, zoo; zoo.convert(sys.argv[1], sys.argv[2], mixer=sys.argv[3], keep=[0], max_shard_size=sys.argv[4])"
)
RANDOM = Path(__file__).resolve().parent.parent / "examples" / "random_checkpoint.py"


def watch(command: list[str], limit: float = float("inf")) -> tuple[int, int, float]:
    """Run a command, for `limit` seconds at most; its exit status, peak RssAnon in bytes, and seconds."""
    start, peak = time.monotonic(), 0
    with subprocess.Popen(command) as process:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            peak = max(peak, anonymous(status))
            if time.monotonic() - start > limit:
                process.kill()
            time.sleep(0.005)
    return process.returncode, peak, time.monotonic() - start


def anonymous(status: Path) -> int:
    try:
        lines = status.read_text().splitlines()
    except OSError:  # it has just ended
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    found = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
        found[str(file.relative_to(folder))] = digest.hexdigest()
    return found


def measure(scratch: Path, options: argparse.Namespace) -> None:
    """Convert in peace, then with kills; exits with a message when a bar is missed."""
    source, out = scratch / "source", scratch / "out"
    made = [sys.executable, str(RANDOM), str(source), "--gigabytes", str(options.gigabytes), "--shard", options.shard]
    subprocess.run(made, check=True)
    command = [sys.executable, "-c", CONVERT, str(source), str(out), options.mixer, options.shard]
    code, peak, seconds = watch(command)
    print(f"converted in {seconds:.0f} s; peak RssAnon {peak / 1e9:.3f} GB", flush=True)
    if code or peak > options.limit * 1e9:
        sys.exit(f"failed: exit status {code}, limit {options.limit} GB")
    if not options.kills:
        return
    expected = hashes(out)
    shutil.rmtree(out)
    draw = random.Random(options.seed)
    code, killed, total = 1, 0, 0.0
    while code != 0:
        limit = draw.uniform(0.3, 1.0) * seconds / options.kills if killed < options.kills else float("inf")
        code, found, took = watch(command, limit)
        peak, killed, total = max(peak, found), killed + (code != 0), total + took
        print(f"{'finished' if code == 0 else 'killed'} after {took:.0f} s (exit status {code})", flush=True)
        if code not in (0, -signal.SIGKILL):
            sys.exit("failed: it ended by itself")
    same = hashes(out) == expected
    print(f"{killed} kills, {total:.0f} s in all; peak RssAnon {peak / 1e9:.3f} GB; same bytes: {same}")
    if not same or peak > options.limit * 1e9:
        sys.exit("failed: the killed conversion is another, or took too much memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--shard", default="500MB")
    parser.add_argument("--mixer", default="gated_delta_net")
    parser.add_argument("--limit", type=float, default=1.2, help="GB of anonymous memory")
    parser.add_argument("--kills", type=int, default=0, help="SIGKILLs at random moments of a second conversion")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", default=None, help="scratch folder (default: the system's)")
    options = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        measure(scratch, options)
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
