"""Answers to a task's problems, greedy and sampled. Shapes: B sequences, S positions."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from moestro.data.tasks import Problem, Task
from moestro.data.tokenizer import answer_stop_ids, encode
from moestro.errors import InputError

BATCH_SIZE = 64


@dataclass(frozen=True)
class Answer:
    """What a model said to a problem, up to the end of the line, and its score in [0, 1]."""

    problem: Problem
    completion: str
    score: float

    @property
    def correct(self) -> bool:
        """Whether it is the right answer, in any form the task accepts."""
        return self.score == 1.0


def greedy_answers(model: Any, tokenizer: Any, task: Task, problems: list[Problem], max_tokens: int) -> list[Answer]:
    """The model's greedy answer to each problem, in the problems' order.

    Problems are batched by length, so that little is padded. Raises `InputError` if a prompt and `max_tokens`
    exceed the model's positions.
    """
    return _answers(model, tokenizer, task, problems, max_tokens, do_sample=False)


def sampled_accuracy(
    model: Any, tokenizer: Any, task: Task, problems: list[Problem], max_tokens: int, *, samples: int, seed: int
) -> list[float]:
    """Share of right ones among `samples` answers to each problem, sampled from the model as it is (temperature 1).

    Their mean is what reinforcement learning from a verified reward improves (mean@k); the greedy answer only tells
    which answer is likeliest. Raises as `greedy_answers` does.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        rounds = [
            _answers(model, tokenizer, task, problems, max_tokens, do_sample=True, temperature=1.0, top_k=0)
            for _ in range(samples)
        ]
    return [sum(answer.correct for answer in answers) / samples for answers in zip(*rounds, strict=True)]


def _answers(
    model: Any, tokenizer: Any, task: Task, problems: list[Problem], max_tokens: int, **sampling: Any
) -> list[Answer]:
    prompts = encode(tokenizer, [problem.prompt for problem in problems])
    longest = max(len(prompt) for prompt in prompts) + max_tokens
    if longest > model.config.max_position_embeddings:
        raise InputError(
            f"The longest problem and its answer need {longest} positions; "
            f"the model has {model.config.max_position_embeddings}.",
            hint="Choose a task with shorter questions, or lower `evaluate.max_answer_tokens`.",
        )
    generation = GenerationConfig(
        **sampling,
        max_new_tokens=max_tokens,
        eos_token_id=answer_stop_ids(tokenizer),
        pad_token_id=tokenizer.eos_token_id,
    )
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    completions: dict[int, str] = {}
    for start in range(0, len(order), BATCH_SIZE):
        chosen = order[start : start + BATCH_SIZE]
        rows = _generate(model, [prompts[index] for index in chosen], generation)
        texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
        completions |= {index: text.split("\n", 1)[0] for index, text in zip(chosen, texts, strict=True)}
    return [
        Answer(problem, completions[index], task.score(problem, completions[index]))
        for index, problem in enumerate(problems)
    ]


@torch.no_grad()
def _generate(model: Any, prompts: list[list[int]], generation: GenerationConfig) -> list[list[int]]:
    """New tokens of each prompt; prompts are padded on the left, so that all end at the same position."""
    width = max(len(prompt) for prompt in prompts)
    ids_BS = torch.full((len(prompts), width), generation.pad_token_id, dtype=torch.long)
    mask_BS = torch.zeros_like(ids_BS)
    for row, prompt in enumerate(prompts):
        ids_BS[row, width - len(prompt) :] = torch.tensor(prompt)
        mask_BS[row, width - len(prompt) :] = 1
    output_BS = model.generate(
        input_ids=ids_BS.to(model.device), attention_mask=mask_BS.to(model.device), generation_config=generation
    )
    return output_BS[:, width:].tolist()
