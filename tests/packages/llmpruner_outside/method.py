"""A method with another default where the model writes its calibration text."""

from llmpruner import Method


class Cautious(Method):
    name = "cautious"
    summary = "Wanda over structures on few samples, compensated, the middle half of the model"

    def defaults(self, asked, *, writes):
        samples = 4 if writes else 8
        return {"importance": "wanda-sp", "compensate": "refit", "samples": samples, "length": 16}
