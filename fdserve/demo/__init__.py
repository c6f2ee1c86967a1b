"""The demo model: a tiny checkpoint of the ERNIE-4.5 architecture that ships with fdserve.

`checkpoint/` has 3.2 million parameters in bf16 and the files of a real one. It greets, answers short questions
about fdserve and LLM serving, adds two numbers of up to three digits, knows the form of a tool call, and declines the
rest. It is there to try the server and to test it end to end, without a download.

`python -m fdserve.demo.train --out DIR` makes it again (torch and transformers needed; half an hour on two cores) and
`python -m fdserve.demo.evaluate DIR` measures it.
"""

from __future__ import annotations

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
