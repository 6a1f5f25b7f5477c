"""Several processes of one run, without the seconds that a launcher and the imports of each take."""

import json
import os
from pathlib import Path

from fresh import run_fresh

HERE = Path(__file__).parent
PATHS = (HERE / "engine", HERE / "recovery", HERE)
RANKS = """
import json, os, runpy, signal, socket, sys
paths, module, runs = sys.argv[1:]
sys.path[:0] = paths.split(os.pathsep)
if module == "many_processes":
    import many_processes
    for name, _ in many_processes.CASES.values():
        many_processes.make(name)  # whose structure is discovered once for all

def run(count, arguments):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    os.environ |= {"WORLD_SIZE": str(count), **place}
    sys.argv = [module, *arguments]
    ranks = []
    for rank in range(count):
        ranks.append(os.fork())
        if not ranks[-1]:
            signal.alarm(300)
            os.environ["RANK"] = str(rank)
            runpy.run_module(module, run_name="__main__", alter_sys=True)
            sys.exit()
    return max([os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks], key=abs)

sys.exit(max([run(*each) for each in json.loads(runs)], key=abs))
"""


def run_ranks(module, **runs):
    """What ``torchrun --nproc-per-node COUNT -m MODULE ARGUMENTS`` does, in processes that are forked, for each of
    several counts (``of_2``) with its arguments."""
    told = [(int(count.removeprefix("of_")), list(map(str, arguments))) for count, arguments in runs.items()]
    return run_fresh(RANKS, os.pathsep.join(map(str, PATHS)), module, json.dumps(told))
