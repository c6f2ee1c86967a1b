"""fdserve: an OpenAI-compatible inference server for ERNIE-4.5 on PaddlePaddle."""

__version__ = "0.1.0"
