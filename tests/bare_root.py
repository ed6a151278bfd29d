"""Runs and times the README's two commands in a Debian root that contains only git and python3.

    python tests/bare_root.py /tmp/bare          # as root, on Debian or Ubuntu, with debootstrap and 12 GB of free disk
    python tests/bare_root.py /tmp/bare lint     # another task, in a root that is there already

The output goes to FOLDER/TASK.log, with a time for each piece. The script fails if a task fails, or if a task prints
nothing for more than 15 seconds.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SILENCE = 15.0
CERTIFICATES = "etc/ssl/certs/ca-certificates.crt"


def make_root(root: Path) -> None:
    """Installs git and python3, and clones this repository. pip has the same network access as outside."""
    packages = "--include=git,python3,ca-certificates"
    subprocess.run(["debootstrap", "--variant=minbase", packages, "bookworm", root], check=True)
    for name in (CERTIFICATES, "etc/resolv.conf", "etc/hosts"):
        (root / name).write_bytes((Path("/") / name).read_bytes())
    subprocess.run(["git", "clone", "--quiet", ROOT, root / "clone"], check=True)


def longest_silence(root: Path, task: str, log: Path) -> tuple[int, float, float]:
    """Runs a task; returns its exit code, its duration and the longest time without output in seconds."""
    kept = {name: value for name, value in os.environ.items() if name.startswith("PIP_") and "FIND_LINKS" not in name}
    environment = {"HOME": "/root", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "SSL_CERT_FILE": f"/{CERTIFICATES}"} | kept
    # Own namespaces, so that its /proc is unmounted when it ends.
    mounts = f"mount -t proc proc {root}/proc; mount --rbind /dev {root}/dev"
    script = f"{mounts}; exec chroot {root} sh -c 'cd clone && ./run {task}'"
    process = subprocess.Popen(
        ["unshare", "--mount", "--pid", "--fork", "sh", "-ec", script],
        env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout
    start = last = time.monotonic()
    longest = 0.0
    with log.open("wb") as file:
        while piece := os.read(process.stdout.fileno(), 1 << 16):
            now = time.monotonic()
            longest, last = max(longest, now - last), now
            file.write(f"\n[{now - start:7.1f}] ".encode() + piece)
            file.flush()
    return process.wait(), time.monotonic() - start, max(longest, time.monotonic() - last)


def main(folder: Path, tasks: list[str]) -> None:
    if not (folder / "root").exists():
        make_root(folder / "root")
    failed = False
    for task in tasks or ["demo", "test"]:
        code, seconds, silence = longest_silence(folder / "root", task, folder / f"{task}.log")
        print(f"./run {task}: exit code {code} after {seconds:.0f} s, longest silence {silence:.1f} s", flush=True)
        failed |= code != 0 or silence > SILENCE
    sys.exit(failed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="place of the root and of the logs")
    parser.add_argument("tasks", nargs="*", metavar="TASK", help="tasks of ./run (default: demo test)")
    arguments = parser.parse_args()
    main(arguments.folder, arguments.tasks)
