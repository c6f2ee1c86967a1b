"""`python -m fdserve.worker FD`: started by the executor, never by hand."""

from fdserve.worker.main import main

main()
