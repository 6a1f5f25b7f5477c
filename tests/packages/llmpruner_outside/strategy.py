from llmpruner import RecoveryJob, RecoveryStrategy, TrainingResult


class Nothing(RecoveryStrategy):
    name = "nothing"
    summary = "no training at all"

    def train(self, job: RecoveryJob) -> TrainingResult:
        return TrainingResult(job.model, (), 0)
