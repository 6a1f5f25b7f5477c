"""Recovers a model in all processes of a launcher: ``python sharded_training.py HOME CASES``, see `test_sharded`."""

import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from unittest.mock import patch

import torch
from said import Killed

import llmpruner
from llmpruner.recovery import training


def until(stop):
    """Ends a training in its step ``stop``, in every process."""

    def check(loss, step):
        if step == stop:
            raise Killed
        return loss

    return patch.object(training, "_finite", check)


if __name__ == "__main__":
    torch.set_num_threads(1)
    home, rank = Path(sys.argv[1]), os.environ.get("RANK", "0")
    for name, (stop, options) in json.loads(sys.argv[2]).items():
        options |= {"output": home / name, "work_dir": home / f"{name}.work"}
        if stop is not None:
            with suppress(Killed), until(stop):
                llmpruner.recover(str(home / "pruned"), **options)
                raise AssertionError("it was not interrupted")
        made = llmpruner.recover(str(home / "pruned"), **options)
        done = {"record": made.record["recovery"][-1], "weights": made.network.state_dict()}
        torch.save({**done, "class": type(made.network).__name__}, home / f"{name}-{rank}.pt")
