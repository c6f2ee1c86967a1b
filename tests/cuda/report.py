"""Figures of the CUDA kernels beside what the device can do, as rows of a Markdown table. Imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

HEADER = "| kernel | time | moves or computes | of the limit | goal | torch takes |\n|---|---|---|---|---|---|"


@dataclass(frozen=True)
class Limits:
    """What a device reaches: bytes a second that a copy reads and writes, FLOP/s of a bfloat16 product."""

    copy: float
    matmul: float


@dataclass(frozen=True)
class Work:
    """What a kernel cannot do with less: bytes read and written, and operations of tensor cores."""

    moved: float
    flops: float = 0


@dataclass(frozen=True)
class Figure:
    """A kernel's time, its work, the share of the limit that is asked for, and torch's time."""

    seconds: float
    work: Work
    goal: float = 0
    torch: float | None = None

    def plain(self) -> dict[str, Any]:
        """As JSON has it; `of` reads that."""
        return asdict(self)

    @staticmethod
    def of(plain: dict[str, Any]) -> Figure:
        return Figure(**plain | {"work": Work(**plain["work"])})

    def row(self, name: str, limits: Limits) -> str:
        """A row of the table."""
        moving, computing = self.work.moved / limits.copy, self.work.flops / limits.matmul
        if moving >= computing:
            rate = f"{self.work.moved / self.seconds / 1e9:.0f} GB/s"
        else:
            rate = f"{self.work.flops / self.seconds / 1e12:.0f} TFLOP/s"
        share = max(moving, computing) / self.seconds
        goal = f"{100 * self.goal:.0f} %, {'missed' if share < self.goal else 'met'}" if self.goal else ""
        beside = "" if self.torch is None else f"{self.torch / self.seconds:.2f}x"
        return f"| {name} | {1e6 * self.seconds:.1f} us | {rate} | {100 * share:.0f} % | {goal} | {beside} |"
