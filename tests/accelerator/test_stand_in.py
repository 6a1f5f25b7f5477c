"""The stand-in refuses what accelerators refuse, else the other tests could not fail; and counts bytes."""

import stand_in
import torch

MIXED = "RuntimeError: Expected all tensors to be on the same device"
REFUSED = {
    "add, a tensor on the CPU": MIXED,
    "add, one on the other device": MIXED,
    "mm, a tensor on the CPU": f"{MIXED}, but found standin:0 and cpu in aten::mm",
    "mm, one on the other device": f"{MIXED}, but found standin:0 and standin:1 in aten::mm",
    "cat": f"{MIXED}, but found standin:0 and cpu in aten::cat",
    "a generator of the CPU": "RuntimeError: Expected a 'standin' device type for generator but found 'cpu'",
    "too many bytes": "OutOfMemoryError: standin out of memory: tried to allocate 4000 bytes, 3000 of 3000 are free",
    "float64": "TypeError: standin has no float64",
    "a sum in float64": "TypeError: standin has no float64",
    "a number": "accepted",
    "an index on the CPU": "accepted",
}


def test_it_refuses_and_counts(on_device):
    found = on_device(refusals)
    assert found.keys() == REFUSED.keys()
    assert {name: said for name, said in found.items() if not said.startswith(REFUSED[name])} == {}
    assert on_device(counted) == {"live": 4000, "peak": 8000, "of the other": 400, "freed": 0}


def refusals():
    def said(compute):
        try:
            compute()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "accepted"

    here, there, cpu = (torch.ones(3, 3, device=device) for device in ("standin", "standin:1", "cpu"))
    found = {
        "add, a tensor on the CPU": said(lambda: here + cpu),
        "add, one on the other device": said(lambda: here + there),
        "mm, a tensor on the CPU": said(lambda: here @ cpu),
        "mm, one on the other device": said(lambda: here @ there),
        "cat": said(lambda: torch.cat([here, cpu])),
        "a generator of the CPU": said(lambda: here.uniform_(generator=torch.Generator())),
        "a number": said(lambda: here + torch.tensor(1.0)),
        "an index on the CPU": said(lambda: here[torch.tensor([1])]),
    }
    here = there = None
    stand_in.start(total=3000)
    found["too many bytes"] = said(lambda: torch.empty(1000, device="standin"))
    stand_in.start(float64=False)
    here = torch.ones(9, device="standin")
    found["float64"] = said(here.double)
    found["a sum in float64"] = said(lambda: here.sum(dtype=torch.float64))
    return found


def counted():
    library = stand_in.start()
    kept = torch.ones(1000, device="standin") + 1
    there = torch.ones(100, device="standin:1")
    kept = kept + kept.view(10, 100).flatten()
    found = {"live": library.live(0), "peak": library.peak(0), "of the other": library.live(1)}
    del kept, there
    return {**found, "freed": library.live(0) + library.live(1)}
