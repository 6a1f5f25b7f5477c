"""``python -m benchmarks``: every benchmark in turn; each writes its results below ``benchmarks/results``."""

from . import main_job

main_job.main()
