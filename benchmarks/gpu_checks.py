"""What has to hold before a figure of a GPU means anything, on the training step of the small network.

- `pseudo-labels count`: some target pixels are confident and some are not; else the other checks would not see the
  teacher.
- `no host sync`: under `torch.cuda.set_sync_debug_mode("error")` nothing in a step waits for the device.
- `CUDA = CPU`: the losses of three steps agree.
- `graph = eager`: a captured step replays to the losses of an eager one.
- `repeatable`: two runs give the same losses bit by bit under `torch.use_deterministic_algorithms`.

Each is printed with its outcome; what needs a GPU is skipped without one. The exit code is 1 if one failed.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from step_forms import THRESHOLD, Size, forms, losses, stepper

SIZE = Size(crop=(64, 128), batch=2)
STEPS = 3


class Skipped(Exception):  # noqa: N818 - it is no error
    """The check cannot run here."""


def need_cuda(device: str) -> None:
    """Skip on a CPU."""
    if torch.device(device).type != "cuda":
        raise Skipped("needs a GPU")


def close(found: Sequence[float], wanted: Sequence[float], tolerance: float) -> None:
    """Compare losses."""
    if not all(abs(a - b) <= tolerance * abs(b) for a, b in zip(found, wanted, strict=True)):  # NaN is not close
        raise RuntimeError(f"the losses {found} differ from {wanted} by more than {tolerance:g}, relatively")


def some_count(device: str) -> None:
    """Lambda is neither 0 nor 1."""
    work, _ = stepper(forms(device)["RepeatedSGD"], replace(SIZE, device=device))
    output = work.training(*work.batch, draw=work.sample())
    share = float((output.confidence >= THRESHOLD).float().mean())
    if not 0.1 < share < 0.9:
        raise RuntimeError(f"{100 * share:.0f} % of the target pixels are confident; choose another threshold")


def no_sync(device: str) -> None:
    """The first step may allocate and tune; the others must not wait."""
    need_cuda(device)
    for name in ("RepeatedSGD", "bf16"):
        work, step = stepper(forms(device)[name], replace(SIZE, device=device))
        step(work.sample())
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(2):
                step(work.sample())
            step(work.training.sample(SIZE.batch, generator=torch.Generator(), device=device))
        finally:
            torch.cuda.set_sync_debug_mode("default")


def cuda_is_cpu(device: str) -> None:
    """In fp32, without TF32."""
    need_cuda(device)
    form = forms(device)["RepeatedSGD"]
    close(losses(form, replace(SIZE, device=device), STEPS), losses(form, SIZE, STEPS), 1e-3)


def graph_is_eager(device: str) -> None:
    """In fp32."""
    need_cuda(device)
    form, size = forms(device)["RepeatedSGD"], replace(SIZE, device=device)
    close(losses(replace(form, graph=True), size, STEPS), losses(form, size, STEPS), 1e-4)


def repeatable(device: str) -> None:
    """As the trainer has it with --deterministic."""
    torch.use_deterministic_algorithms(mode=True)
    try:
        one, two = (losses(forms(device)["RepeatedSGD"], replace(SIZE, device=device), STEPS) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(mode=False)
    close(one, two, 0)


CHECKS: dict[str, Callable[[str], None]] = {
    "pseudo-labels count": some_count,
    "no host sync": no_sync,
    "CUDA = CPU": cuda_is_cpu,
    "graph = eager": graph_is_eager,
    "repeatable": repeatable,
}


def main() -> int:
    """Run all, whatever fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA's matrix products are first used
    failed = False
    for name, check in CHECKS.items():
        try:
            check(device)
            print(f"check {name}: ok", flush=True)
        except Skipped as skipped:
            print(f"check {name}: skipped, {skipped}", flush=True)
        except Exception as error:  # noqa: BLE001 - the others are to run
            traceback.print_exc()
            print(f"check {name}: FAILED, {str(error).partition(chr(10))[0]}", flush=True)
            failed = True
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
