"""Early stopping that a cut off run goes on with, and that a stopped run keeps to when it is started again."""

from typing import Any

from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments


class EarlyStopping(EarlyStoppingCallback):
    """Stops a run after so many evaluations without a better figure; a resumed run counts on from its checkpoint.

    The Trainer restores callbacks only as a whole, with a stale wish to stop; here the counter alone is taken.

    Args:
        patience: evaluations without a better `training.metric_for_best_model`.
    """

    def __init__(self, patience: int):
        super().__init__(patience)

    @property
    def stops(self) -> bool:
        """Whether as many evaluations as the patience brought nothing better."""
        return self.early_stopping_patience_counter >= self.early_stopping_patience

    def count_on_from(self, state: TrainerState) -> None:
        """Take the counter that a checkpoint's state has, if it has one."""
        stored = state.stateful_callbacks.get(type(self).__name__)
        if stored is not None:
            self.early_stopping_patience_counter = stored["attributes"]["early_stopping_patience_counter"]

    def state(self) -> dict[str, Any]:
        return {
            "args": {"patience": self.early_stopping_patience},
            "attributes": {"early_stopping_patience_counter": self.early_stopping_patience_counter},
        }

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.count_on_from(state)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        super().on_evaluate(args, state, control, **kwargs)
        if self.stops:  # a checkpoint of this step, so that the run is known to have stopped
            control.should_save = True
