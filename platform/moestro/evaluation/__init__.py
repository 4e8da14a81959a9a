"""The `evaluate` stage: held-out loss per domain and the accuracy of greedy answers to a task."""

from moestro.evaluation.answers import Answer, greedy_answers, sampled_accuracy
from moestro.evaluation.loss import held_out_loss
from moestro.evaluation.stage import evaluate

__all__ = ["Answer", "evaluate", "greedy_answers", "held_out_loss", "sampled_accuracy"]
