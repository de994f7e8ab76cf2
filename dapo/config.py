"""Every option of a run. The defaults are the paper's recipe for Qwen2.5-32B (arXiv:2503.14476, 4.1)."""

from __future__ import annotations

import difflib
import os
import re
from collections import Counter
from math import lcm
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from dapo import plain_yaml

Positive = Annotated[int, Field(ge=1, lt=2**31)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Share = Annotated[float, Field(gt=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
AboveZero = Annotated[float, Field(gt=0)]
AtLeastTwo = Annotated[int, Field(ge=2, lt=2**31)]


class ConfigError(ValueError):
    """The user's input cannot be used. The message is one line: the thing, its value, and the remedy."""

    def __init__(self, message: str):
        without_user = re.sub(r"(://)[^\s'\"]*@", r"\1***@", message)  # of a URL
        super().__init__(re.sub(r"(://[^\s'\"?#]*)[?#][^\s'\"]*", r"\1?***", without_user))


UNSAID = "unsaid"  # the source leaves it open: nothing departs from it


def option(default: Any, why: str, paper: Any = UNSAID, verl: Any = UNSAID, both: Any = UNSAID) -> Any:
    """Declare an option that decides what a run's numbers mean; `dapo plan --diff` compares it with these.

    `paper`, `verl`, `both`: its value in the paper, in the released code, in both; `why`: a reason for
    another.
    """
    sources = {"paper": paper, "verl": verl} if both == UNSAID else {"paper": both, "verl": both}
    return Field(default, json_schema_extra=sources | {"reason": why})


def _expanded(path: Any) -> Path:
    """Return the path with its ~ and $NAMEs replaced."""
    if not isinstance(path, str | Path) or not str(path).strip() or "\0" in str(path):
        raise ValueError("expected a path, in quotes if it looks like a number")
    expanded = os.path.expandvars(os.path.expanduser(path))
    if re.match(r"~|.*\$[\w{]", expanded):
        raise ValueError("no such user or environment variable")
    return Path(expanded)


Location = Annotated[Path, BeforeValidator(_expanded)]


class Section(BaseModel):
    """Types are taken strictly: true is no number, 1 is not true, and 10.0 is no whole number."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


class Run(Section):
    dir: Location  # everything the run writes goes below it
    steps: Count = 400  # rollout steps, each of prompts_per_step / prompts_per_minibatch updates
    seed: Seed = 0
    resume: Literal["auto", "never"] | Positive = "auto"  # a step: from its checkpoint; newer are renamed
    save_every: Positive = 10  # steps between checkpoints; the last step is always saved
    keep_checkpoints: Positive = 2  # the newest ones
    keep_every: Positive | None = None  # and those of every so many steps, a multiple of save_every
    async_save: bool = False  # write checkpoints while training goes on, from a copy in main memory
    wandb_project: str | None = None


class Data(Section):
    # .jsonl of {prompt, answer} or .parquet as DAPO-Math-17k: one file, several as one, {file: weight} to mix
    train: Location | list[Location] | dict[Location, AboveZero]
    max_prompt_length: Positive = option(2048, "other tasks, other lengths", verl=2048)  # tokens
    # truncate cuts on the left, as the released recipe does
    too_long: Literal["error", "drop", "truncate"] = option(
        "truncate", "a prompt that is cut may have lost its question", verl="truncate"
    )
    # a malformed row, or a ground truth that reward.function cannot use: stop, or count it and go on
    on_error: Literal["stop", "skip"] = "stop"
    # variables of the model's chat template: {enable_thinking: false}
    template_arguments: dict[str, Any] = option({}, "the template writes the prompts otherwise")

    @field_validator("train", mode="before")
    @classmethod
    def _each_once(cls, train: Any) -> Any:
        """Refuse no file, and one that is weighted under two names: one of the weights would be lost."""
        if train in ([], {}):
            raise ValueError("expected at least one file")
        for path, count in Counter(map(_expanded, train if isinstance(train, dict) else ())).items():
            if count > 1:
                raise ValueError(f"{path} is given twice")
        return train


class Rollout(Section):
    # N: groups that a step learns from
    prompts_per_step: Positive = option(512, "another batch size", both=512)
    # G: samples per prompt
    group_size: AtLeastTwo = option(16, "more samples find a mixed group more often, and cost more", both=16)
    # prompts asked for at a time, until N mixed groups are in; from servers as the groups come in
    prompts_per_round: Positive = option(1536, "how far sampling runs ahead", verl=1536)
    max_rounds: Positive = option(10, "how long to look for mixed groups", verl=10)
    # Eq. 11; false keeps every group
    dynamic_sampling: bool = option(True, "without it a step is cheaper and teaches less", both=True)
    # after max_rounds with fewer than N mixed groups
    at_cap: Literal["train", "stop"] = option(
        "train", "a late step that finds too few mixed groups learns from those", verl="stop"
    )
    # finished groups that a step has no room for are kept for the next, as long as they are at most so many
    # steps old when they are learnt from; 0: they are thrown away, and their prompts asked anew
    max_staleness: Count = option(0, "finished groups without room are learnt from later", verl=0)
    max_empty_steps: Positive = 3  # steps in a row without one mixed group before the run stops
    temperature: AboveZero = option(1.0, "hotter explores more; the loss uses the same", both=1.0)
    # L_max of Eq. 13, tokens
    max_response_length: Positive = option(20480, "other tasks, other lengths", both=20480)
    # of each step's groups, kept in run.dir/rollouts as parquet
    dump_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    only: bool = False  # write every step's batch and learn nothing
    replay: Location | None = None  # learn from a directory of dumped batches instead of sampling


class Reward(Section):
    # module:name of f(response, answer) → bool, or a float that is correct above 0, as a grade of 0.1 is; it
    # sees these two texts and no other column. Or http://host:port/path, its key in the environment:
    # DAPO_REWARD_KEY. Or several with weights, {"dapo.reward:is_correct": 1.0, "mine:format": 0.2}: the
    # reward is their weighted sum, the first decides what is correct. The default reads the last line with
    # "Answer:", which prompts have to ask for, and nothing else
    function: str | Annotated[dict[str, float], Field(min_length=1)] = "dapo.reward:is_correct"
    # functions that change nothing; where they disagree is counted, and kept in run.dir/disputes.jsonl
    shadow: list[str] = []
    # processes that call the functions; 0: this process calls them, and waits for as long as they take
    workers: Count = 4
    # seconds for one answer; after them the worker is replaced, the answer is wrong and counted
    time_limit: AboveZero = 5.0
    # GiB of main memory for a worker and what it started; above them it is replaced, as after a crash
    memory_limit: AboveZero = 4.0
    truncated_is_wrong: bool = option(False, "where the task asks for an end", verl=False)
    soft_overlong_punishment: bool = True  # Eq. 13
    overlong_cache: Positive = 4096  # L_cache of Eq. 13, tokens


class Objective(Section):
    normaliser: Literal["token_mean", "group_token_mean", "sample_mean"] = option(
        "token_mean", paper="group_token_mean", verl="token_mean",
        why="every token of a minibatch weighs the same; Eq. 8 to the letter weighs short groups' tokens up",
    )  # fmt: skip
    clip_low: NonNegative = option(0.2, "a narrower or wider trust region downwards", both=0.2)
    clip_high: NonNegative = option(
        0.28, "Clip-Higher: room for unlikely tokens keeps the entropy up", both=0.28
    )
    dual_clip: Annotated[float, Field(gt=1)] | None = option(
        None, paper=None, verl=10.0, why="bounds the loss of a bad token that became much likelier"
    )
    # truncated samples give no gradient
    overlong_filtering: bool = option(
        False, paper=True, verl=False,
        why="Table 1 adds it and keeps it; the best public run had none: soft punishment alone limits length",
    )  # fmt: skip
    # a token of older weights counts min(exp(old − behavior log-prob), this); one of the current ones 1
    importance_cap: Annotated[float, Field(ge=1)] = 2.0


class Optim(Section):
    lr: NonNegative = option(1e-6, "a smaller model bears more", both=1e-6)
    # rollout steps, linear, starting at the first warm-up value
    warmup_steps: Count = option(20, "rollout steps, linear", paper=20, verl=10)
    # × group_size = samples per update
    prompts_per_minibatch: Positive = option(32, "other numbers of updates a step", both=32)
    weight_decay: NonNegative = option(0.1, "none for very small models", verl=0.1)
    betas: Annotated[tuple[Share, Share], Field(strict=False)] = option(
        (0.9, 0.999), "a shorter memory bears larger steps", verl=[0.9, 0.999]
    )
    clip_grad: AboveZero = option(1.0, "another bound for the gradient's norm", verl=1.0)


class Parallel(Section):
    tensor: Positive = 8  # with sequence parallelism whenever > 1
    pipeline: Positive = 1
    # chunks of layers on each pipeline stage, in turns: less waiting at both ends of an update
    virtual_pipeline: Positive = 1
    context: Positive = 1  # ranks that share the tokens of every sequence: for responses too long for one
    expert: Positive = 1  # ranks of a pipeline stage that share a layer's experts, each with whole ones

    @property
    def model_size(self) -> int:
        """Number of ranks that a microbatch takes: world size / data-parallel ranks."""
        return self.tensor * self.pipeline * self.context

    @property
    def least_world(self) -> int:
        """Number of processes of the smallest world in this layout."""
        return lcm(self.model_size, self.expert * self.pipeline)

    @property
    def sequence_multiple(self) -> int:
        """Multiple to which a sequence is padded, in tokens: a context rank has two equal chunks of it."""
        return 1 if self.context == 1 else 2 * self.context

    @property
    def pack_multiple(self) -> int:
        """Multiple to which a microbatch is padded, in tokens: sequence parallelism splits it further."""
        return self.sequence_multiple * self.tensor

    def data(self, world: int) -> int:
        """Return the number of data-parallel ranks of `world` processes.

        Raises:
            ConfigError: tensor × pipeline × context does not divide the world, or expert a stage's ranks.
        """
        if world % self.model_size:
            context = f" × parallel.context={self.context}" if self.context > 1 else ""
            layout = f"parallel.tensor={self.tensor} × parallel.pipeline={self.pipeline}{context}"
            raise ConfigError(
                f"world size {world} is not a multiple of {layout}: launch {self.model_size} processes, or a "
                "multiple, or change the layout"
            )
        stage = world // self.pipeline
        if stage % self.expert:
            raise ConfigError(
                f"parallel.expert={self.expert} does not divide the {stage} ranks of a pipeline stage (world "
                f"size {world} / parallel.pipeline={self.pipeline}), who share its experts"
            )
        return world // self.model_size


class Policy(Section):
    model: Location  # Hugging Face directory: config.json, *.safetensors, tokenizer
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    # budget of one packed forward-backward per data-parallel rank; context ranks share it
    tokens_per_microbatch: Positive = 32768
    # fields of Megatron's TransformerConfig, OptimizerConfig, DistributedDataParallelConfig: passthrough.py
    megatron: dict[str, Any] = {}


class Limits(NamedTuple):
    """Seconds without progress after which a run acts."""

    stall: float  # report, dump stacks, restart the server that stands still

    @property
    def stop(self) -> float:
        """Seconds after which the run saves and stops."""
        return 2 * self.stall

    @property
    def exit(self) -> float:
        """Seconds after which ranks that are stuck in a collective, where they cannot save, exit."""
        return 3 * self.stall


class Engine(Section):
    kind: Literal["embedded", "sglang"] = "embedded"  # embedded: Hugging Face generate, in the main process
    max_concurrent: Positive = 256  # samples generated together, by each server
    # for sglang. A server's API key, if it wants one, is in the environment: DAPO_ENGINE_KEY
    urls: list[str] = []  # servers that someone else has started; none: the run starts its own and stops them
    servers: Positive = 1  # how many it starts
    python: Location | None = None  # of the environment that has SGLang; null: this one
    # server arguments, as on SGLang's command line: {tp-size: 2, mem-fraction-static: 0.8}
    sglang: dict[str, Any] = {}
    # files · NCCL, or gloo on a CPU · same host only
    weight_sync: Literal["disk", "broadcast", "tensor"] = "broadcast"
    bucket_mib: Positive = 512  # weights travel in buckets of this size
    verify_weights: bool = False  # after every sync compare the servers' checksums with the policy's
    # without any progress on any rank: say who is waited for, keep stacks in run.dir/stalls, and ask again
    # for missing responses; at one server: start it again; twice as long without a response, or in one wait
    # of a weight sync: save and stop; three times as long in a collective, where no rank can save: stop
    stall_seconds: AboveZero = 300.0

    @property
    def limits(self) -> Limits:
        """Times without progress after which a run acts."""
        return Limits(self.stall_seconds)

    @property
    def is_streaming(self) -> bool:
        """True if groups are requested ahead and scored as they come; in process, whole rounds gain more."""
        return self.kind == "sglang"


class Eval(Section):
    # same formats as data.train; {name: file} for several sets; null: no evaluation
    data: Location | dict[str, Location] | None = None
    every: Positive = 5  # steps; also before the first and after the last
    samples: Positive = option(32, "fewer samples, wider intervals", both=32)  # k per problem: mean@k
    temperature: AboveZero = option(1.0, "another way to ask", both=1.0)
    top_p: Share = option(0.7, "1.0 measures the distribution that is trained", both=0.7)


class Config(Section):
    run: Run
    data: Data
    rollout: Rollout = Rollout()
    reward: Reward = Reward()
    objective: Objective = Objective()
    optim: Optim = Optim()
    parallel: Parallel = Parallel()
    policy: Policy
    engine: Engine = Engine()
    eval: Eval = Eval()

    @property
    def updates_per_step(self) -> int:
        """Number of updates of a full step; a step with fewer groups makes fewer."""
        return self.rollout.prompts_per_step // self.optim.prompts_per_minibatch

    def check(self) -> None:
        """Raise ConfigError if two options contradict each other."""
        run, rollout, reward, parallel = self.run, self.rollout, self.reward, self.parallel
        minibatch, budget = self.optim.prompts_per_minibatch, self.policy.tokens_per_microbatch
        if run.keep_every and run.keep_every % run.save_every:
            raise ConfigError(
                f"run.keep_every={run.keep_every} is not a multiple of run.save_every={run.save_every}: "
                "nothing is saved then"
            )
        if rollout.prompts_per_step % minibatch:
            raise ConfigError(
                f"rollout.prompts_per_step={rollout.prompts_per_step} is not a multiple of "
                f"optim.prompts_per_minibatch={minibatch}: every update takes the same number of groups"
            )
        if rollout.prompts_per_round * rollout.max_rounds < rollout.prompts_per_step:
            raise ConfigError(
                f"rollout.prompts_per_round={rollout.prompts_per_round} × rollout.max_rounds="
                f"{rollout.max_rounds} can never fill rollout.prompts_per_step={rollout.prompts_per_step}: "
                "raise one of them"
            )
        longest = self.data.max_prompt_length + rollout.max_response_length
        multiple = parallel.sequence_multiple
        if -(-longest // multiple) * multiple > budget:
            padded = f", padded to a multiple of 2 × parallel.context={parallel.context}"
            padded = padded if multiple > 1 else ""
            raise ConfigError(
                f"policy.tokens_per_microbatch={budget} cannot hold one sample of data.max_prompt_length="
                f"{self.data.max_prompt_length} + rollout.max_response_length={rollout.max_response_length} "
                f"= {longest} tokens{padded}: raise it"
            )
        names = [reward.function] if isinstance(reward.function, str) else reward.function
        for name in [*names, *reward.shadow, *self.engine.urls]:
            if re.search("[@?#]", name.partition("://")[2]):
                without_user = re.sub("://.*@", "://***@", name, flags=re.DOTALL)  # whatever stands there
                raise ConfigError(
                    f"{without_user}: a URL is saved with the run, so it may hold no user, password or "
                    "query; a key for the server is in the environment: DAPO_REWARD_KEY or DAPO_ENGINE_KEY"
                )
        if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
            raise ConfigError(
                f"parallel.virtual_pipeline={parallel.virtual_pipeline} with parallel.pipeline=1: one stage "
                "has nobody to take turns with; raise parallel.pipeline, or leave it 1"
            )
        if reward.soft_overlong_punishment and reward.overlong_cache >= rollout.max_response_length:
            raise ConfigError(
                f"reward.overlong_cache={reward.overlong_cache} leaves nothing of "
                f"rollout.max_response_length={rollout.max_response_length} unpunished: make it smaller, or "
                "set reward.soft_overlong_punishment=false"
            )

    def warnings(self) -> list[str]:
        """Describe what is allowed and rarely meant, a line each."""
        if self.reward.soft_overlong_punishment and not self.rollout.dynamic_sampling:
            return [
                "reward.soft_overlong_punishment without rollout.dynamic_sampling: in a group all right or "
                "all wrong the length penalty is the only difference, and dividing by its small std (Eq. 9) "
                "makes full-size advantages of it"
            ]
        return []

    def changed(self, overrides: list[str]) -> Config:
        """Return this config with overrides applied as `load` does.

        Raises:
            ConfigError: a key or value is not valid, or two options contradict each other.
        """
        return _validated(self.model_dump(mode="json"), overrides, "config")

    def dump(self) -> str:
        """Return the resolved config as YAML, which `load` reads back to an equal Config."""
        return plain_yaml.dump(self.model_dump(mode="json"))


def load(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML config, then apply overrides in order: `load("run.yaml", ["optim.lr=2e-6"])`.

    Raises:
        ConfigError: the file cannot be read, or a key or value is not valid; the message names it and the
            nearest key.
    """
    try:
        values = plain_yaml.load(Path(path).read_text(encoding="utf-8")) or {}
    except UnicodeDecodeError as error:
        raise ConfigError(f"config {path}: not UTF-8 text: {error}") from error
    except OSError as error:
        raise ConfigError(f"config {path}: {error.strerror}") from error
    except plain_yaml.NotYAML as error:
        raise ConfigError(f"config {path}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"config {path}: expected sections (run:, data:, …), got {type(values).__name__}")
    return _validated(values, overrides or [], f"config {path}")


def _validated(values: dict[str, Any], overrides: list[str], what: str) -> Config:
    try:
        for override in overrides:
            plain_yaml.override(values, override)
        config = Config.model_validate(values)
    except plain_yaml.NotYAML as error:
        raise ConfigError(str(error)) from error
    except ValidationError as error:
        wrong = [_explain(e, values) for e in error.errors()]
        # of a list with a wrong item, another kind of a union says that it is no path
        said = [text for key, text in wrong if not any(other.startswith(f"{key}.") for other, _ in wrong)]
        raise ConfigError(f"{what}: {'; '.join(dict.fromkeys(said))}") from None
    config.check()
    return config


def nearest(word: str, known: list[str]) -> str:
    """Return a hint for a misspelt name: `nearest("lrr", ["lr", "seed"])` → "did you mean lr?"."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(sorted(known))}"


def _explain(error: Any, values: Any) -> tuple[str, str]:
    """Return the key that an error of pydantic is about, and what to say of it."""
    model: Any = Config
    key, last = ".".join(map(str, error["loc"])), error["loc"][-1]
    if error["type"] == "extra_forbidden":
        for part in error["loc"][:-1]:
            model = model.model_fields[part].annotation
        return key, f"unknown key {key}: {nearest(last, list(model.model_fields))}"
    if error["type"] == "missing":
        return key, f"missing key {key}"
    path = []
    for part in error["loc"]:  # pydantic names a union's kinds in it, which are no keys
        if isinstance(values, dict) and str(part) in map(str, values):
            values = next(value for key, value in values.items() if str(key) == str(part))
        elif isinstance(values, list) and isinstance(part, int) and part < len(values):
            values = values[part]
        else:
            continue
        path.append(str(part))
    wrong = error["msg"].lower().removeprefix("value error, ")
    key = ".".join(path)
    return key, f"{key}={plain_yaml.shown(error['input'])}: {wrong}"
