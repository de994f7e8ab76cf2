"""The nouns of the algorithm: a Prompt is answered by a Group of Samples, which an Engine produces on
Request.

p = tokens of a prompt, n = tokens of a response.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from signal import SIGINT
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np  # neither a plan nor an error at the command line needs it
    import torch  # takes seconds; a report of a run needs none of it

FinishReason = Literal["stop", "length", "abort"]


class Stopped(Exception):
    """The run has to stop and can be resumed: every rank saves, then exits."""

    is_saved = False  # set once a checkpoint is written; there is nothing to save before the policy is built


class Interrupted(Stopped):
    """The user or the scheduler asked the run to stop, with Ctrl-C or another signal.

    `signal` is its number, on every rank: the exit status is 128 + this.
    """

    number: ClassVar[int] = SIGINT  # of the signal that reached this process

    def __init__(self) -> None:
        super().__init__()
        self.signal = Interrupted.number  # an attribute travels with the exception to the other ranks


class StorageError(Stopped):
    """A file that the run has to keep cannot be written. The message is one line."""


class RewardError(Stopped):
    """A reward function returned no verdict. The message is one line: which function, and what happened."""


class EpisodeError(Stopped):
    """Environments or tools cannot go on. The message is one line: which, and what happened."""


class EngineError(Stopped):
    """The engine cannot go on. The message is one line: which server, and what happened."""


class WeightsLost(EngineError):
    """Servers died under a weight sync, or all that held the weights did; others live or restart.

    Sync weights, then send the same requests again.
    """


def reason(error: BaseException) -> str:
    """Return an error's message in one line; its kind if it has none: `MemoryError()` → "MemoryError"."""
    try:
        text = str(error)
    except Exception:  # noqa: BLE001  # of a user's own kind: it may raise anything
        text = ""
    return " ".join(text.split()) or type(error).__name__


def per_token(dtype: Any) -> dict[str, Any]:
    """Metadata of a dataclass field that holds one value of this NumPy dtype a token."""
    return {"dtype": dtype}


def token_fields(kind: type) -> dict[str, np.dtype]:
    """Return name → dtype of a dataclass's per-token fields. Other lists of them are derived from this."""
    import numpy as np

    return {f.name: np.dtype(f.metadata["dtype"]) for f in fields(kind) if "dtype" in f.metadata}


class Origin(Protocol):
    """Reads again what prompts were made of, when a reward function asks for it."""

    def read(self, prompt: Prompt, names: Collection[str]) -> dict[str, Any]:
        """Return, by name, at least what `names` has of row, prompt and messages: see reward.function; or
        task, the whole row.
        """
        ...


@dataclass(frozen=True, slots=True)
class Prompt:
    """A task and its ground truth. `index` is its row among the run's prompts, the same in every epoch."""

    index: int
    tokens: np.ndarray  # int32 [p]
    answer: str
    origin: Origin | None = field(default=None, compare=False, repr=False)  # None: read from a dump


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling settings of a request. Nothing is inherited from a model's generation_config."""

    temperature: float
    max_tokens: int
    stop_ids: tuple[int, ...]
    top_p: float = 1.0
    returns_routes: bool = False  # each sample comes with its routes


@dataclass(frozen=True, slots=True)
class Request:
    """Asks for one response: sample `index` of group `group`. The seed alone decides the randomness."""

    group: int
    index: int
    prompt: Prompt
    seed: int
    sampling: Sampling
    priority: int = 0  # sent before those of less: 1 of first waves, 2 where the policy waits for it

    @property
    def id(self) -> str:
        return f"{self.group}.{self.index}"


@dataclass(slots=True)
class Episode:
    """A conversation of several turns, which a sample is made of, and what happened in it."""

    # the conversation in order, from the first message on: {"role": "user", "content": "…"}
    messages: list[dict[str, Any]]
    num_turns: int = 0  # of the policy
    num_calls: int = 0  # of tools, readable or not
    num_unreadable: int = 0  # calls that could not be read
    num_failed: int = 0  # calls whose tool raised, or ran out of time
    num_neutralised: int = 0  # control tokens in the environment's text, encoded as ordinary text
    num_attempts: int = 1  # at the episode: the environment failed in those before
    # of each turn: tokens that it was asked for with, and those of them in the engine's prefix cache
    cached: list[list[int]] = field(default_factory=list)
    # [p], of the first messages, if the environment wrote them: they take the place of the prompt's
    prompt_tokens: np.ndarray | None = None


@dataclass(slots=True)
class Sample:
    """One response as the engine produced it, then marked by the reward and the advantage.

    In a response of several turns the environment's tokens stand between the policy's.
    """

    group: int
    index: int
    tokens: np.ndarray = field(metadata=per_token("int32"))  # [n], stop token included
    # [n], log π_θold as the engine reports it, at the sampling temperature
    behavior_logprobs: np.ndarray = field(metadata=per_token("float32"))
    # [n], False where the policy did not write the token
    loss_mask: np.ndarray = field(metadata=per_token(bool))
    # (weight version, start, end) of consecutive tokens: which weights wrote them
    versions: tuple[tuple[int, int, int], ...]
    finish_reason: FinishReason
    text: str = ""
    is_correct: bool = False
    reward: float = 0.0
    advantage: float = 0.0
    # [p + n − 1, columns]: the experts that prompt and response went to, as model.routing has them
    routes: np.ndarray | None = None
    episode: Episode | None = None  # None: one turn
    num_cached: int = 0  # tokens of the request that the engine had in its prefix cache; not dumped

    @property
    def length(self) -> int:
        """Number of response tokens, n."""
        return len(self.tokens)

    @property
    def num_written(self) -> int:
        """Number of response tokens that the policy wrote."""
        return int(self.loss_mask.sum())

    @property
    def is_truncated(self) -> bool:
        """True if a limit ended it, of tokens or of turns, and not the policy or its environment."""
        return self.finish_reason == "length"

    @property
    def is_lost(self) -> bool:
        """True if there is no sample: its environment failed again and again, as `text` says."""
        return self.finish_reason == "abort"


@dataclass(slots=True)
class Group:
    """The G samples of one prompt. Identified by its own id, never by its prompt's text."""

    id: int
    prompt: Prompt
    samples: list[Sample] = field(default_factory=list)

    def add(self, sample: Sample) -> None:
        """Append a sample. First messages that an environment wrote become the group's prompt."""
        if sample.episode and sample.episode.prompt_tokens is not None:
            self.prompt = replace(self.prompt, tokens=sample.episode.prompt_tokens)
            sample.episode.prompt_tokens = None
        self.samples.append(sample)

    @property
    def num_correct(self) -> int:
        """Number of correct samples."""
        return sum(sample.is_correct for sample in self.samples)

    @property
    def is_lost(self) -> bool:
        """True if one of its samples is: it is neither learnt from nor counted as right or wrong."""
        return any(sample.is_lost for sample in self.samples)

    @property
    def why_lost(self) -> str:
        """Reason why it is lost, if it is; else nothing."""
        return next((sample.text for sample in self.samples if sample.is_lost), "")

    @property
    def is_mixed(self) -> bool:
        """0 < #correct < G (Eq. 11): only such a group separates right from wrong.

        Counted on correctness, never on the shaped reward.
        """
        return 0 < self.num_correct < len(self.samples) and not self.is_lost


class Stream(Protocol):
    """One user's requests to an engine. Streams of one engine run side by side and do not see each other."""

    def submit(self, requests: Iterable[Request]) -> None: ...

    def completed(self) -> Iterator[Sample]:
        """Yield samples as they finish, in any order, until no request of this stream is outstanding.

        More may be submitted, or aborted, meanwhile. A caller may stop reading early, and abort the rest.
        """
        ...

    def abort(self, ids: Iterable[str] | None = None) -> None:
        """Drop these requests; None: all that are outstanding. Nothing comes back for them."""
        ...


class Engine(Protocol):
    """A sampler of π_θold. Weights are replaced between rollouts; `stream` takes requests."""

    @property
    def is_colocated(self) -> bool:
        """True if it works on the trainer's GPUs: then each side releases its memory for the other."""
        ...

    def stream(self) -> Stream: ...

    def prepare_weights(self, version: int) -> None:
        """Refuse now what can be refused before weights are there: no rank is in their collectives yet."""
        ...

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None: ...

    def waiting(self) -> str:
        """Say what is outstanding, and where, for a person to read. Any thread may call it."""
        ...

    def score(self, groups: Sequence[Group]) -> list[np.ndarray]:
        """Return log softmax of the logits of every response token, [n] float32 for each sample in order, as
        the engine computes them for a whole response. The temperature is 1.
        """
        ...

    def take_idle(self) -> list[float]:
        """Return, for each server, the seconds since the last call in which it had nothing to do."""
        ...

    def release_memory(self) -> None:
        """Free what only sampling needs; nothing is sampled until the next weights."""
        ...

    def close(self) -> None: ...
