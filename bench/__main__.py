"""`python -m bench COMMAND …`: measure fdserve, or any server that speaks OpenAI's protocol."""

from __future__ import annotations

import importlib
import signal
import sys

from fdserve.errors import StartupError

COMMANDS = {
    "serve": "load a server; throughput and latencies",
    "compare": "load several servers in turn; ratios",
    "plot": "latency-throughput curves and step timelines from saved results",
    "kernels": "the CPU kernels against memory bandwidth and oneDNN",
    "scheduler": "planning a step and assembling its batch",
    "frontend": "streaming with ranks that answer at once against bare hypercorn",
    "soak": "a mixed load for an hour; whether the server's memory grows",
    "startup": "from the start of the process to /health 200; memory",
    "accuracy": "what quantization changes: logits and greedy tokens",
    "random_checkpoint": "write a checkpoint of random weights to measure with",
}


def main(argv: list[str] | None = None) -> int:
    """Run a command with the rest of the arguments; its exit status, 2 for an unknown one, 1 for no such checkpoint."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments and arguments[0] in COMMANDS:
        try:
            status: int | None = importlib.import_module(f"bench.{arguments[0]}").main(arguments[1:])
        except KeyboardInterrupt:
            return 128 + signal.SIGINT
        except StartupError as error:
            print(f"bench {arguments[0]}: {error}", file=sys.stderr)
            return 1
        return status or 0
    usage = ["usage: python -m bench COMMAND [OPTIONS]; COMMAND --help tells the options", ""]
    usage += [f"  {name:18} {what}" for name, what in COMMANDS.items()]
    asked = arguments[:1] in (["-h"], ["--help"])
    print("\n".join(usage), file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


if __name__ == "__main__":
    sys.exit(main())
