"""`python -m bench kernels`: every CPU kernel beside the limits of this machine, measured in the same run.

    python -m bench kernels                       # everything: several minutes
    python -m bench kernels linear --rows 1 256   # one family

A kernel that reads is set against the bandwidth at which plain code reads memory here, a matrix product also against
oneDNN's own, the two taking turns, and a prefill's attention against oneDNN's best rate. Ratios are shares of the
floor's speed: at 100 % the floor is reached. Sizes are those of ERNIE-4.5-0.3B, of experts and packing those of
ERNIE-4.5-21B-A3B; "step" is a whole decode step of a model of random weights, from the plan to the tokens.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from bench.floors import HEADING, Case, Floors, measure_floors
from bench.kernel_attention import attention_cases
from bench.kernel_linear import ROWS, SHAPES, linear_cases
from bench.kernel_moe import moe_cases
from bench.kernel_pack import pack_cases
from bench.kernel_rows import element_cases, sampler_cases
from bench.kernel_step import step_cases
from bench.machine import describe
from bench.random_checkpoint import SHAPES as CHECKPOINTS
from fdserve import ops
from fdserve.ops.library import ISAS, force_isa
from fdserve.ops.weights import FORMATS

FAMILIES = ("linear", "attention", "moe", "sample", "elements", "pack", "step")


def cases(family: str, floors: Floors, options: argparse.Namespace) -> Iterator[Case]:
    """The measurements of a family."""
    dtypes = options.dtypes or [ops.compute_dtype()]
    if family == "linear":
        yield from linear_cases(floors, names=options.formats, shapes=options.shapes, rows=options.rows)
    elif family == "attention":
        yield from attention_cases(floors, dtypes=dtypes)
    elif family == "step":
        yield from step_cases(names=options.formats, shape=options.shape, budget=floors.budget)
    elif family == "pack":
        yield from pack_cases(floors, names=options.formats)
    elif family == "sample":
        yield from sampler_cases(floors)
    elif family == "moe":
        yield from moe_cases(floors, names=options.formats, rows=options.rows)
    else:
        for dtype in dtypes:
            yield from element_cases(floors, dtype=dtype)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(FAMILIES)}; default: all")
    parser.add_argument("--dtypes", nargs="+", choices=("bfloat16", "float32"), help="default: the processor's best")
    parser.add_argument(
        "--formats",
        nargs="+",
        choices=FORMATS,
        help="of linear's, moe's, pack's and step's weights; default: what is computed in, and integers",
    )
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES), help="of linear")
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS), help="of linear and moe")
    parser.add_argument("--shape", choices=list(CHECKPOINTS), default="0.3B", help="of step's model")
    parser.add_argument("--isa", choices=ISAS, help="compute with this instruction set; default: the processor's best")
    parser.add_argument("--threads", type=int, default=0, help="default: as many as the process may run on cores")
    parser.add_argument("--budget", type=float, default=0.5, metavar="SECONDS", help="for each call of a case")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    options = parser.parse_args(argv)
    if unknown := set(options.families) - set(FAMILIES):
        parser.error(f"no such family: {', '.join(sorted(unknown))}")
    if options.isa:
        try:
            force_isa(options.isa)
        except ValueError as error:
            parser.error(str(error))
    options.formats = options.formats or [ops.compute_dtype(), *FORMATS[2:]]
    if options.threads:
        ops.set_num_threads(options.threads)
    floors, told = measure_floors(options.budget)
    print(describe(), *told, HEADING, sep="\n", flush=True)
    measured = []
    for family in options.families or FAMILIES:
        for case in cases(family, floors, options):
            print(case, flush=True)
            measured.append(asdict(case))
    if options.json:
        content = {"machine": describe(), "bandwidth": floors.bandwidth, "peak": floors.peak, "cases": measured}
        options.json.write_text(json.dumps(content))
    return 0
