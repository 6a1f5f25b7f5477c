"""Distillation: the pruned model learns the next-token distributions of the dense one (Hinton et al., 2015)."""

from pydantic import Field

from llmpruner import ComponentSettings, RecoveryStrategy, TrainingResult, fit, hookimpl


class Distil(RecoveryStrategy):
    name = "imitation"
    summary = "trains every parameter on the KL divergence from the dense model's next-token distributions"

    class Settings(ComponentSettings):
        temperature: float = Field(2.0, gt=0, description="What the logits of both models are divided by.")

    def train(self, job):
        from torch.nn.functional import kl_div

        teacher, temperature = job.teacher(), self.settings.temperature

        def loss(model, batch):
            trained = batch["labels"][:, 1:] != -100
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            student, dense = (m(**inputs).logits[:, :-1][trained].float() / temperature for m in (model, teacher))
            kl = kl_div(student.log_softmax(-1), dense.log_softmax(-1), reduction="batchmean", log_target=True)
            return kl * temperature**2

        job.model.requires_grad_(True)
        return TrainingResult(job.model, fit(job.model, job, loss), job.model.num_parameters())


@hookimpl
def llmpruner_recovery_strategies():
    return [Distil]
