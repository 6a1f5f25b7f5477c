"""Later layers give more than earlier ones."""

from pydantic import Field

from llmpruner import Allocation, ComponentSettings, top_up


class Tapered(Allocation):
    name = "tapered"
    summary = "shares that grow evenly from the first layer to the last"
    equal_shares = True

    class Settings(ComponentSettings):
        slope: float = Field(0.5, ge=0, le=1, description="How much more than the mean the last layer gives.")

    settings: Settings

    def allocate(self, task):
        layers = [queue.group.layer or 0 for queue in task.queues]
        middle, half = (max(layers) + min(layers)) / 2, max((max(layers) - min(layers)) / 2, 1)

        def at(share):
            return {
                queue.group.name: queue.steps_for(
                    share * queue.group.units * (1 + self.settings.slope * (layer - middle) / half)
                )
                for queue, layer in zip(task.queues, layers, strict=True)
            }

        low, high = 0.0, 1.0
        for _ in range(40):
            share = (low + high) / 2
            low, high = (share, high) if task.meter.removed(at(share)) <= task.amount else (low, share)
        return top_up(task, at(low))
