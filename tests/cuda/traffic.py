"""`python -m tests.cuda.traffic`: how a GPU would serve what emulated kernels load and store, line by line."""

from __future__ import annotations

import ctypes
import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.cuda import attention, checks, sampling
from tests.cuda.harness import Emulated, compile_emulated, link_emulated


@dataclass
class Count:
    """Of a line: bytes of global memory, and turns of shared memory."""

    wanted_bytes: int = 0
    moved_bytes: int = 0  # in sectors of 32
    least_turns: int = 0  # if no two addresses wanted the same bank
    turns: int = 0

    def add(self, other: Count) -> None:
        self.wanted_bytes += other.wanted_bytes
        self.moved_bytes += other.moved_bytes
        self.least_turns += other.least_turns
        self.turns += other.turns


@dataclass(frozen=True)
class Case:
    """Launchers in a model's shapes, and how much more than is wanted they may move and take."""

    run: Callable[[Emulated, np.random.Generator], None]
    most_moved: float = 1.1
    most_turns: float = 1.02
    is_hopper: bool = False


def _attention(*lengths: int) -> attention.Shape:
    """Of sequences of so many new tokens after 300."""
    return attention.Shape(lengths, (300,) * len(lengths), heads=16, kv_heads=2, head_dim=128, block_size=64)


CASES = {
    "rms_norm": Case(lambda device, rng: checks.rms_norm(device, rng, "bfloat16", 4, 2560, residual=True)),
    "swiglu": Case(lambda device, rng: checks.swiglu(device, rng, "bfloat16", 4, 3072)),
    "rope": Case(lambda device, rng: attention.rope_and_store(device, rng, "bfloat16", _attention(20, 1))),
    "decode": Case(lambda device, rng: attention.attend(device, rng, "bfloat16", _attention(1, 1))),
    # Rows are written four bytes a lane; the second-level cache puts them together.
    "prefill": Case(lambda device, rng: attention.attend(device, rng, "bfloat16", _attention(20)), 1.3),
    "prefill on Hopper": Case(
        lambda device, rng: attention.attend(device, rng, "bfloat16", _attention(20)), 1.3, is_hopper=True
    ),
    "experts": Case(lambda device, rng: checks.moe(device, rng, "bfloat16", 20, 256, 128, 8, 2)),
    # Eight groups' scales of a column are a sector, which the first-level cache keeps for all of them.
    "linear of 8 bits": Case(
        lambda device, rng: checks.quant_linear(device, rng, "bfloat16", 8, 16, 512, 256, to_float=False), 1.5
    ),
    "linear of 4 bits": Case(
        lambda device, rng: checks.quant_linear(device, rng, "bfloat16", 4, 70, 512, 256, to_float=False), 1.75
    ),
    # Places for the few large logits are dealt out by an atomic counter, lane after lane here.
    "sampler": Case(lambda device, rng: sampling.sample(device, rng, 8, 20000, 20000, 20), 1.15, 1.35),
}


_SOURCE = re.compile(r"/(?:kernels/cuda/|tests/cuda/(?=wrong))(\S+:\d+)")


def lines_of(device: Emulated, codes: list[int]) -> list[tuple[str, str]]:
    """Of each address in the library: the function it is compiled into, and the innermost line of a kernel's source."""
    command = ["addr2line", "-Cfpia", "-e", device.library._name, *(hex(code - 1) for code in codes)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    places = []
    for each in re.split(r"^0x[0-9a-f]+: ", told, flags=re.MULTILINE)[1:]:
        frames = [frame.replace(" (inlined by) ", "") for frame in each.splitlines()]
        line = next(
            (m[1] for frame in frames if (m := re.search(r"/(?:kernels/cuda/|tests/cuda/(?=wrong))(\S+:\d+)", frame))),
            frames[0],
        )
        function = re.search(r"(\w+)(?:<[^()]*>)?\(", frames[-1].replace("(anonymous namespace)::", ""))
        places.append((function[1] if function else frames[-1], line))
    return places


def measure(device: Emulated, run: Callable[[], None]) -> dict[tuple[str, str], Count]:
    """What the launchers that are run make memory do, by function and line."""
    device.library.emulator_count_traffic(1)
    run()
    device.library.emulator_count_traffic(0)
    codes, counts = [], []
    code, out = ctypes.c_uint64(), (ctypes.c_uint64 * 4)()
    while device.library.emulator_traffic(ctypes.byref(code), out):
        codes.append(code.value)
        counts.append(Count(*out))
    lines: defaultdict[tuple[str, str], Count] = defaultdict(Count)
    for place, count in zip(lines_of(device, codes), counts, strict=True):
        lines[place].add(count)
    return dict(lines)


def measure_case(device: Emulated, case: Case) -> dict[tuple[str, str], Count]:
    """`measure` of one of CASES."""
    device.library.emulator_be_hopper(int(case.is_hopper))
    try:
        return measure(device, lambda: case.run(device, np.random.default_rng(7)))
    finally:
        device.library.emulator_be_hopper(0)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        compile_emulated(directory)
        device = Emulated(ctypes.CDLL(str(link_emulated([*directory.glob("*.o")], directory / "emulated.so"))))
        for title, case in CASES.items():
            print(title)
            for (function, line), count in sorted(measure_case(device, case).items()):
                moved = f"global: {count.wanted_bytes:8} bytes wanted, {count.moved_bytes:8} moved"
                turns = f"shared: {count.least_turns:6} turns at least, {count.turns:6} taken"
                print(f"  {function:24} {line:28} {moved}   {turns}")


if __name__ == "__main__":
    main()
