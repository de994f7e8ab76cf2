"""An engine that plays episodes, as a config says. What can be refused is refused before anything starts."""

from __future__ import annotations

import queue
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from dapo.clock import waiting
from dapo.config import Config, ConfigError
from dapo.episodes.calls import reader_of
from dapo.episodes.chat import Chat
from dapo.episodes.checks import import_environment
from dapo.episodes.environment import Message
from dapo.episodes.player import Answer, Began, Begin, Fault, Setup
from dapo.episodes.stream import EpisodeEngine, group_seed
from dapo.episodes.tools import schemas
from dapo.episodes.workers import Call, Workers, preload
from dapo.model.tokenizer import decoder_json, stop_ids
from dapo.rollout.render import NONE, ONE_TURN, Renderer, Turns
from dapo.types import Engine, Interrupted, Prompt

CHECKED = 4  # prompts whose environments are reset twice, before the run


def turns_of(config: Config) -> Turns:
    """Return what the config's rollout asks of prompts. Raise ConfigError if its code cannot be used."""
    rollout = config.rollout
    if rollout.has_turns:
        preload()
    if rollout.environment:
        import_environment(rollout.environment)
        return Turns(environment=rollout.environment)
    return Turns(tools=schemas(rollout.tools)) if rollout.tools else ONE_TURN


def make_setup(config: Config, tokenizer: Any, turns: Turns, dates: Mapping[str, str] = NONE) -> Setup:
    """Return what workers need. `dates`: as Renderer's.

    Raises:
        ConfigError: the model's tokenizer or chat template is not fit for several turns.
    """
    renderer = Renderer(tokenizer, config.data.template_arguments, dates, turns)
    tools = [dict(tool) for tool in turns.tools]
    model = f"policy.model={config.policy.model}"
    encoded = decoder_json(tokenizer)
    if encoded is None:
        raise ConfigError(
            f"{model}: several turns need a tokenizer of the tokenizers library, without Python"
        )
    if not renderer.template:
        raise ConfigError(f"{model} has no chat template: several turns need one")
    chat = Chat(
        renderer.tokenizer.get_chat_template(tools=tools or None),
        encoded,
        dict(tokenizer.special_tokens_map),
        dict(config.data.template_arguments),
        stop_ids(config.policy.model, tokenizer),
    )
    try:
        chat.check(tools)
        if tools:
            reader_of(chat.template)
    except ConfigError as error:
        raise ConfigError(f"{model}: {error}") from error
    rollout = config.rollout
    of_config = rollout.environment, tuple(rollout.tools), tools, rollout.turn_seconds
    return Setup(chat, *of_config, max_prompt_length=config.data.max_prompt_length)


def make_episodes(
    make_engine: Callable[[], Engine],
    config: Config,
    setup: Setup,
    prompts: Sequence[Prompt],
    is_interrupted: Callable[[], bool] = lambda: False,
) -> EpisodeEngine:
    """Make an engine that plays episodes with the turns of another one. `prompts`: some of the run's.

    Raises:
        ConfigError: the environment cannot be used, or begins differently for one row and seed.
        Interrupted: the run is to stop.
    """
    rollout, is_of_environment = config.rollout, bool(setup.environment)

    def row_of(prompt: Prompt) -> dict[str, Any]:
        assert prompt.origin, f"prompt {prompt.index} is not from a data file"
        row: dict[str, Any] = prompt.origin.read(prompt, {"task"})["task"]
        return row

    def messages_of(prompt: Prompt) -> list[Message]:
        found = prompt.origin.read(prompt, {"messages"})["messages"] if prompt.origin else None
        return list(found or [])

    workers = Workers(setup, config.reward.workers, config.reward.memory_limit)
    with ExitStack() as failing:
        failing.callback(workers.close)
        if is_of_environment:
            check_reset(workers, [row_of(p) for p in prompts[:CHECKED]], config.run.seed, is_interrupted)
        engine = make_engine()
        failing.pop_all()
    return EpisodeEngine(
        engine,
        workers,
        rollout.max_turns,
        config.run.seed,
        in_rounds=not config.engine.is_streaming,
        correct_above=config.reward.correct_above,
        row_of=row_of if is_of_environment else None,
        messages_of=messages_of,
        is_interrupted=is_interrupted,
    )


def check_reset(
    workers: Workers, rows: Sequence[dict[str, Any]], run_seed: int, is_interrupted: Callable[[], bool]
) -> None:
    """Reset an environment twice for each row. Raise ConfigError if one fails, or they begin differently."""
    answers: queue.SimpleQueue[Began | Answer | Fault] = queue.SimpleQueue()
    numbers: dict[int, int] = {}  # of the attempt → of the row
    for i, row in enumerate(rows):
        for _ in range(2):
            number = next(workers.numbers)
            numbers[number] = i
            workers.ask(Call(Begin(number, row, group_seed(run_seed, i)), answers.put))
    found: dict[int, Began] = {}
    name = workers.setup.name
    for _ in numbers:
        answer = _next(answers, workers, is_interrupted)
        if isinstance(answer, Fault):
            raise ConfigError(f"{name}: {answer.what}")
        assert isinstance(answer, Began)
        first = found.setdefault(numbers[answer.episode], answer)
        if (first.tokens, first.messages) != (answer.tokens, answer.messages):
            shown = str(rows[numbers[answer.episode]])[:80]
            raise ConfigError(
                f"{name}: reset is not reproducible: for the row {shown} and one seed it returned other "
                "messages the second time: take all chance from its seed"
            )
        workers.end(answer.episode)


def _next(
    answers: queue.SimpleQueue[Any], workers: Workers, is_interrupted: Callable[[], bool]
) -> Began | Answer | Fault:
    while True:
        if workers.failure:
            raise workers.failure
        if is_interrupted():
            raise Interrupted
        waiting()
        try:
            answer: Began | Answer | Fault = answers.get(timeout=0.25)
        except queue.Empty:
            continue
        return answer
