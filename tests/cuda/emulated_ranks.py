"""`python -m tests.cuda.emulated_ranks LIBRARY CHECKPOINT RANK RENDEZVOUS OUT`: one of two ranks on the emulated ops.

They gather by Gloo, through the same calls as by NCCL on GPUs.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fdserve.executor.wire import Load
from fdserve.ops.collectives import vocabulary_starts
from fdserve.ops.gathering import Gathering
from fdserve.ops.sampling import NO_LOGPROBS
from fdserve.worker.group import group_variables, join
from tests.cuda.sampling import Inputs, random_inputs

WORLD_SIZE = 2


def load_of(checkpoint: Path, rank: int, rendezvous: str) -> Load:
    return Load(
        directory=str(checkpoint), device="auto", rank=rank, world_size=WORLD_SIZE, dtype="auto", block_size=16,
        num_blocks=0, kv_cache_bytes=1 << 20, host_cache_bytes=0, max_num_seqs=4, max_model_len=0, num_threads=1,
        parent=0, rendezvous=rendezvous,
    )  # fmt: skip


def sampled(inputs: Inputs, logits: Any, sample: Any, **more: bool) -> list[np.ndarray[Any, Any]]:
    """What an op gives for these rows."""
    import paddle

    arrays = [paddle.to_tensor(each) for name, each in inputs.arrays.items() if name != "logits"]
    options = dict(zip(("masks", "mask_rows", "logprob_modes"), arrays[8:], strict=True))
    results = sample(logits, *arrays[:8], vocab_size=inputs.vocab_size, num_top=inputs.num_top, **options, **more)
    return [each.numpy() for each in results]


def main() -> None:
    """Write this rank's logits, and say whether ranks sample as one does, and sum in their order."""
    library, checkpoint, rank, rendezvous, out = sys.argv[1:]
    load = load_of(Path(checkpoint), int(rank), rendezvous)
    os.environ.update(group_variables(load))

    import paddle

    from fdserve import ops
    from fdserve.worker.collectives import Collectives
    from tests.cuda.emulated_model import emulate, logits_of

    emulate(Path(library))
    collectives = Collectives(load)
    assert collectives.least(7 + load.rank) == 7
    parts = [
        paddle.to_tensor(np.random.default_rng(i).normal(size=(3, 16)).astype(np.float32)) for i in range(WORLD_SIZE)
    ]
    narrow = [part.cast("bfloat16") for part in parts]
    total = (narrow[0].cast("float32") + narrow[1].cast("float32")).cast("bfloat16")
    assert bool((collectives.all_reduce(narrow[load.rank]) == total).all())

    for vocab_size in (40, 3000):
        inputs = random_inputs(np.random.default_rng(vocab_size), 24, vocab_size, vocab_size, 5)
        starts = vocabulary_starts(vocab_size, WORLD_SIZE)
        whole = paddle.to_tensor(inputs.arrays["logits"])
        part = whole[:, starts[load.rank] : starts[load.rank + 1]].contiguous()
        alone, together = sampled(inputs, whole, ops.sample), sampled(inputs, part, collectives.sample)
        for one, joint in zip(alone, together, strict=True):
            assert one.tobytes() == joint.tobytes(), "ranks sample otherwise than one"
    # The rows are those of the larger vocabulary, which is shared out in blocks.
    assert sampled(inputs, part, collectives.sample, all_greedy=True)[0].tolist() == alone[0].tolist()
    inputs.arrays["float_params"][:, 0] = 0
    inputs.arrays["logprob_modes"][:] = NO_LOGPROBS
    gathering = Gathering(join("gloo"), rank=load.rank, world_size=WORLD_SIZE)
    gather, calls = gathering.gather, 0

    def counted(x: Any) -> Any:
        nonlocal calls
        calls += 1
        return gather(x)

    gathering.gather = counted
    greedy = sampled(inputs, part, partial(ops.sample, shared=gathering), all_greedy=True)
    assert greedy[0].tolist() == sampled(inputs, whole, ops.sample)[0].tolist()
    assert calls == 1, "greedy rows need one gathering"

    ranks: dict[str, Any] = {"rank": load.rank, "world_size": WORLD_SIZE, "all_reduce": collectives.all_reduce}
    np.save(out, logits_of(Path(checkpoint), "bfloat16", **ranks))


if __name__ == "__main__":
    main()
