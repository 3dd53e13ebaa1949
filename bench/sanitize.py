"""compute-sanitizer's memcheck over the cases that stand for an op, both passes.

python -m bench.sanitize layer_norm     what runs under it
"""

import os
import shutil
import subprocess
import sys

from bench.store import ROOT, Row

SECONDS, FOUND = 400, 86
# What it says where it cannot work: on some virtual machines, for instance.
UNABLE = ("Device not supported", "Unable to", "not supported on this")


def check(op: str) -> Row:
    """The row. A tool that is not there, or does not work here, is not a fault of the op."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return missing("it is not installed")
    command = [tool, "--tool", "memcheck", "--error-exitcode", str(FOUND), "--print-limit", "3",
               sys.executable, "-m", "bench.sanitize", op]  # fmt: skip
    # every tensor an allocation of its own: what is read behind it is seen
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT)}
    try:
        done = subprocess.run(
            command, env=env, cwd=ROOT, timeout=SECONDS, text=True, capture_output=True
        )
    except subprocess.TimeoutExpired:
        return missing(f"it took more than {SECONDS} s")
    return judged(done.returncode, done.stdout + done.stderr)


def judged(code: int, text: str) -> Row:
    lines = text.strip().splitlines()
    if any(sign in text for sign in UNABLE):
        return missing(next(line for line in lines if any(sign in line for sign in UNABLE)))
    if code == 0:
        return {"ok": True, "says": "no bad access"}
    errors = [line for line in lines if "=========" in line and "COMPUTE-SANITIZER" not in line]
    said = " ".join(" ".join(errors[:4] if code == FOUND else lines[-2:]).split())
    return {"ok": False, "says": said.replace("=========", "|") or f"ended with {code}"}


def missing(why: str) -> Row:
    return {"ok": False, "missing": "compute-sanitizer", "says": f"not run: {why}"}


def main(argv: list[str]) -> int:
    import torch

    from bench.streams import Pass
    from fastdl.contract import SPECS

    for op in argv:
        for case in SPECS[op].core:
            Pass(case, "cuda" if torch.cuda.is_available() else "cpu")()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
