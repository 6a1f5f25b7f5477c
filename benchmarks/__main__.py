"""``python -m benchmarks``: the benchmarks of quality in turn, hours in all; each writes its results below
``benchmarks/results`` and goes on where it was interrupted."""

from . import main_job, ordering, quality

main_job.main()
ordering.main()
quality.main()
