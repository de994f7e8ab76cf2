"""Every option of a run. The defaults are the paper's recipe for Qwen2.5-32B (arXiv:2503.14476, 4.1).

The text below an option is its description, for `dapo config`, editors and the reference in docs/.
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, field_validator

from dapo.config.options import (
    AboveZero,
    AtLeastTwo,
    Count,
    Location,
    NonNegative,
    Positive,
    Section,
    Seed,
    Share,
    UpToOne,
    example,
    expanded,
    option,
)

DEFAULT_FUNCTION = "dapo.reward:is_correct"


class Profile(Section):
    """Traces of chosen steps by torch's profiler, for ui.perfetto.dev."""

    steps: list[Count] = example([3], default=[])
    """Steps that are recorded, in run.dir/profile. Such a step is slower, and its trace may have hundreds of
    MB."""
    ranks: list[Count] = Field(default=[0])
    """Ranks that record them. On a GPU each also keeps its memory's history, as a pickle."""


class Run(Section):
    """The run itself: its directory, its length, what it saves."""

    dir: Location = example("runs/mine")
    """Everything the run writes goes below this directory. ~ and $NAME are replaced."""
    steps: Count = 400
    """Rollout steps, each of prompts_per_step / prompts_per_minibatch updates."""
    seed: Seed = 0
    """Decides the order of prompts and the draws of samples."""
    resume: Literal["auto", "never"] | Positive = "auto"
    """auto: from the newest checkpoint, if there is one. never: a directory with a run is refused. A step:
    from its checkpoint; newer ones are renamed."""
    save_every: Positive = 10
    """Steps between checkpoints. The last step is always saved."""
    keep_checkpoints: Positive = 2
    """How many of the newest checkpoints are kept."""
    keep_every: Positive | None = example(50, default=None)
    """Checkpoints of every so many steps are kept too. A multiple of save_every."""
    deterministic: bool = False
    """The same command on the same machines gives the same weights, to the bit. On GPUs it takes kernels that
    add in a fixed order, which are slower, and servers with --enable-deterministic-inference: others are
    refused. On a CPU the trainer and the embedded engine always are deterministic, and SGLang never is. Not
    covered: another layout, device, version or tp-size, and an answer that comes near reward.time_limit."""
    async_save: bool = False
    """Checkpoints are written while training goes on; an update first copies what is not written yet."""
    export_every: Positive | None = example(50, default=None)
    """Steps between exports of the model: run.dir/hf-step-000050 and so on, like run.dir/hf at the end. They
    stay until you remove them."""
    keep_best: str | None = example("eval/aime/mean", default=None)
    """A metric of evaluation: the model is exported to run.dir/hf-best whenever it is larger than ever."""
    wandb_project: str | None = example("dapo", default=None)
    """Metrics also go to this project of Weights & Biases."""
    tracker: str | None = example("mine:Tracker", default=None)
    """module:name of another tracker: called with (config, start), it returns an object with
    log(values, step) and close(status), as in dapo/log.py. It cannot end the run."""
    profile: Profile = Profile()
    """Which steps are recorded by torch's profiler, and by which ranks."""


class Data(Section):
    """The prompts to learn from."""

    train: Location | list[Location] | dict[Location, AboveZero] = example(
        "prompts.jsonl", {"easy.jsonl": 1.0}
    )
    """.jsonl of {prompt, answer}, or .parquet as DAPO-Math-17k: one file, several as one, {file: weight} to
    mix. Or a data set of the hub, org/name or org/name@revision, whose training files are taken; one of them
    is org/name:folder/file.parquet."""
    max_prompt_length: Positive = option(2048, "other tasks, other lengths", verl=2048)
    """Tokens of the longest prompt, chat template included."""
    too_long: Literal["error", "drop", "truncate"] = option(
        "truncate", "a prompt that is cut may have lost its question", verl="truncate"
    )
    """A longer prompt stops the run, is left out, or is cut on the left, as in the released recipe."""
    on_error: Literal["stop", "skip"] = "stop"
    """A malformed row, or a ground truth that reward.function cannot use, stops the run, or is counted and
    left out."""
    template_arguments: dict[str, Any] = option(
        {}, "the template writes the prompts otherwise", examples=[{"enable_thinking": False}]
    )
    """Variables of the model's chat template."""

    @field_validator("train", mode="before")
    @classmethod
    def _each_once(cls, train: Any) -> Any:
        """Refuse no file, and one that is weighted under two names: one of the weights would be lost."""
        if train in ([], {}):
            raise ValueError("expected at least one file")
        for path, count in Counter(map(expanded, train if isinstance(train, dict) else ())).items():
            if count > 1:
                raise ValueError(f"{path} is given twice")
        return train


class Rollout(Section):
    """Prompts → groups: sampling until enough groups are mixed (Eq. 11)."""

    prompts_per_step: Positive = option(512, "another batch size", both=512)
    """N: groups that a step learns from."""
    group_size: AtLeastTwo = option(16, "more samples find a mixed group more often, and cost more", both=16)
    """G: samples per prompt."""
    prompts_per_round: Positive = option(1536, "how far sampling runs ahead", verl=1536)
    """With max_rounds, how many prompts a step may ask for; the embedded engine at most so many at a time."""
    max_rounds: Positive = option(10, "how long to look for mixed groups", verl=10)
    """A step asks for prompts_per_round × max_rounds prompts at most, with first_wave for as many samples:
    at_cap."""
    dynamic_sampling: bool = option(True, "without it a step is cheaper and teaches less", both=True)
    """Eq. 11: only mixed groups, some of whose samples are correct and some not, are learnt from. false keeps
    every group."""
    at_cap: Literal["train", "stop"] = option(
        "train", "a late step that finds too few mixed groups learns from those", verl="stop"
    )
    """After max_rounds with fewer than N mixed groups: learn from those, or stop the run."""
    max_staleness: Count = option(0, "servers generate while the policy learns", verl=0)
    """Generate for so many steps ahead while the policy learns: no token is older than so many steps when it
    is learnt from. 0: in turns, and every token is of the current weights. Servers need GPUs of their own."""
    max_empty_steps: Positive = 3
    """Steps in a row without one mixed group before the run stops."""
    temperature: AboveZero = option(1.0, "hotter explores more; the loss uses the same", both=1.0)
    """Of sampling, and of the log-probs in the loss."""
    max_response_length: Positive = option(20480, "other tasks, other lengths", both=20480)
    """L_max of Eq. 13, tokens: a longer response is cut off. With several turns what stands between the
    policy's counts too."""
    forecast: Literal["off", "skip"] = option(
        "off", "fewer samples for the same batch: prompts of no use are seldom asked for", both="off"
    )
    """skip: prompts whose group will probably be all right or all wrong are mostly passed over, as the run's
    record of earlier groups says (run.dir/prompts.parquet)."""
    forecast_floor: UpToOne = option(0.3, "a higher one passes over less, and the record stays fresher")
    """Of forecast=skip: the least chance with which any prompt that comes by is asked for."""
    forecast_sharpness: AboveZero = option(0.2, "a higher one passes over more")
    """Of forecast=skip: a prompt is asked for with chance (chance of a mixed group) / forecast_sharpness."""
    first_wave: Count = option(0, "fewer samples for the same batch: groups of no use end early", both=0)
    """So many samples of a group first; if these are all right or all wrong, and stop_below says so, the
    group is rejected without the others. A tenth of such groups is finished all the same, which measures
    what stopping costs. 0: groups are always finished."""
    stop_below: UpToOne = option(0.1, "a higher one stops more groups, and more of them would be mixed")
    """Of first_wave: a group stops if its chance to come out mixed is below this."""
    drop_above: Share | None = option(None, "what is solved teaches little", both=None, examples=[0.9])
    """A prompt whose record says that it is solved more often than this leaves the run."""
    environment: str | None = example("mine:Game", default=None)
    """module:Class of an environment that answers the policy's turns: see dapo.episodes.Environment. Rows of
    the data may then have any columns, and its rewards take the place of reward.function."""
    tools: list[str] = example(["mine:calculator"], default=[])
    """module:name of functions that the policy may call, with types and docstrings. A response ends with a
    turn that calls none; reward.function reads this turn."""
    max_turns: Positive = option(16, "longer games, more calls")
    """With an environment or tools: turns of the policy in a response. One that is not done then is cut
    off."""
    turn_seconds: AboveZero = 60.0
    """Seconds for one answer of an environment or tool."""
    dump_share: UpToOne = 0.0
    """Share of each step's groups that is kept in run.dir/rollouts as parquet."""
    only: bool = False
    """Write every step's batch and learn nothing."""
    replay: Location | None = example("runs/earlier/rollouts", default=None)
    """Learn from a directory of dumped batches instead of sampling."""

    @property
    def has_turns(self) -> bool:
        """True if a response has several turns: something answers the policy."""
        return bool(self.environment or self.tools)


class Reward(Section):
    """Is a response correct, and what is it worth?"""

    function: str | Annotated[dict[str, float], Field(min_length=1)] = example(
        "mine:reward",
        "http://127.0.0.1:8000/grade",
        {DEFAULT_FUNCTION: 1.0, "mine:format": 0.2},
        default=DEFAULT_FUNCTION,
    )
    """module:name of f(response, answer) → bool, a float that is correct above correct_above, or a pair
    (float, is it correct). By name it may take more: row (the row's other columns), prompt (its text, as the
    model saw it), messages (of a chat, else None), truncated (was the response cut off), conversation (all
    messages of a response of several turns, else None).
    Or http://host:port/path, which gets responses and answers only, its key in the environment:
    DAPO_REWARD_KEY. Or several with weights: the reward is their weighted sum, the first decides what is
    correct. The default reads what answer_format says, and nothing else."""
    correct_above: float = option(0.0, "grades from 0 to 1 pass at another mark")
    """A float that a function returns means correct above this number; it is the reward as it is."""
    answer_format: Literal["answer_line", "boxed", "either"] = option(
        "answer_line", "the prompts ask for another form of the answer", verl="answer_line"
    )
    r"""What dapo.reward:is_correct reads of a response, so prompts have to ask for it. answer_line: the last
    line with "Answer:". boxed: the last \boxed{…}. either: of these two the one on the later line, on one
    line "Answer:". One that is empty counts too: then there is no answer."""
    shadow: list[str] = example(["mine:stricter"], default=[])
    """Functions that change nothing: where they disagree is counted, and kept in run.dir/disputes.jsonl."""
    workers: Count = 4
    """Processes that call the functions. 0: this process calls them, and waits for as long as they take. As
    many more hold environments and tools."""
    time_limit: AboveZero = 5.0
    """Seconds for one answer. After them the worker is replaced, the answer is wrong and counted."""
    memory_limit: AboveZero = 4.0
    """GiB of main memory for a worker and what it started. Above them it is replaced, as after a crash."""
    truncated_is_wrong: bool = option(False, "where the task asks for an end", verl=False)
    """A response that was cut off is wrong, whatever it says."""
    soft_overlong_punishment: bool = True
    """Eq. 13: a long response costs reward before it is cut off."""
    overlong_cache: Positive = 4096
    """L_cache of Eq. 13, tokens: the punishment grows over the last so many before L_max."""

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each function, by its name; the first decides what is correct."""
        return {self.function: 1.0} if isinstance(self.function, str) else self.function


class Objective(Section):
    """The loss (Eq. 8)."""

    kind: Literal["dapo", "cispo", "gspo"] = option("dapo", "another method", both="dapo")
    """dapo: Eq. 8; with clip_low = clip_high the loss of GRPO and PPO. cispo: the clipped ratio is a factor,
    and every token keeps its gradient (arXiv:2506.13585). gspo: Eq. 8 with one ratio for a whole response,
    the geometric mean of its tokens' (arXiv:2507.18071); its clips are a thousand times smaller."""
    advantage: Literal["group_std", "no_std", "batch_std"] = option(
        "group_std", "a group that is nearly all right or all wrong has a small std", both="group_std"
    )
    """The reward minus its group's mean, divided by the group's standard deviation (Eq. 9), by nothing
    (Dr. GRPO), or by the standard deviation of all these differences in the step's batch."""
    normaliser: Literal["token_mean", "group_token_mean", "sample_mean", "constant"] = option(
        "token_mean", paper="group_token_mean", verl="token_mean",
        why="every token of a minibatch weighs the same; Eq. 8 to the letter weighs short groups' tokens up",
    )  # fmt: skip
    """What each token's loss is divided by: the tokens of the minibatch, of its group (then a mean of
    groups), of its sample (then a mean of samples, as GRPO), or, whatever a sample's length, by
    rollout.max_response_length (then a mean of samples, as Dr. GRPO)."""
    clip_low: UpToOne = option(0.2, "a narrower or wider trust region downwards", both=0.2)
    """ε_low: a ratio below 1 − clip_low has no gradient where the advantage is negative. cispo: it counts
    1 − clip_low; 1 sets no bound."""
    clip_high: NonNegative = option(
        0.28, "Clip-Higher: room for unlikely tokens keeps the entropy up", both=0.28
    )
    """ε_high: a ratio above 1 + clip_high has no gradient where the advantage is positive. cispo: it counts
    1 + clip_high."""
    dual_clip: Annotated[float, Field(gt=1)] | None = option(
        None, paper=None, verl=10.0, why="bounds the loss of a bad token that became much likelier"
    )
    """Of dapo: where the advantage A is negative, the loss is at most −dual_clip · A."""
    overlong_filtering: bool = option(
        False, paper=True, verl=False,
        why="Table 1 adds it and keeps it; the best public run had none: soft punishment alone limits length",
    )  # fmt: skip
    """Truncated samples give no gradient."""
    importance: Literal["none", "tis", "band", "sequence_mask"] = "tis"
    """What corrects for tokens of another distribution than π_θold. A token's loss is multiplied by a weight
    made of ρ = exp(old − behavior log-prob). tis: min(ρ, importance_cap). band: ρ inside importance_band,
    else 0. sequence_mask: 1 where the geometric mean of the response's ρ is inside importance_band, else 0.
    none: 1."""
    importance_of: Literal["stale", "all"] = "stale"
    """stale: of tokens that older weights wrote (rollout.max_staleness; a dump may hold some). all: of all:
    engine and policy compute their log-probs differently."""
    importance_cap: Annotated[float, Field(ge=1)] = 2.0
    """Of importance=tis: the largest weight of a token."""
    importance_band: Annotated[tuple[NonNegative, AboveZero], Field(strict=False)] = (0.5, 5.0)
    """Of importance=band and sequence_mask: the smallest and the largest ρ that counts."""


class Optim(Section):
    """AdamW, and how many groups an update takes."""

    lr: NonNegative = option(1e-6, "a smaller model bears more", both=1e-6)
    """Learning rate after the warm-up, constant."""
    warmup_steps: Count = option(20, "rollout steps, linear", paper=20, verl=10)
    """Rollout steps, linear, starting at the first warm-up value."""
    prompts_per_minibatch: Positive = option(32, "other numbers of updates a step", both=32)
    """Groups of an update; × group_size = its samples."""
    weight_decay: NonNegative = option(0.1, "none for very small models", verl=0.1)
    """Of matrices; vectors (biases, norms) have none."""
    betas: Annotated[tuple[Share, Share], Field(strict=False)] = option(
        (0.9, 0.999), "a shorter memory bears larger steps", verl=[0.9, 0.999]
    )
    """Adam's decay of the first and the second moment."""
    clip_grad: AboveZero = option(1.0, "another bound for the gradient's norm", verl=1.0)
    """Largest norm of an update's gradient, over all parameters."""


class Policy(Section):
    """The model that learns."""

    model: Location = example("models/Qwen2.5-7B", "Qwen/Qwen2.5-7B")
    """Hugging Face directory: config.json, *.safetensors, tokenizer. Or its name on the hub, org/name or
    org/name@revision; the commit is kept in run.dir/semantics.json."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of parameters and activations; with bfloat16 the optimizer keeps float32 main parameters."""
    logits_dtype: Literal["bfloat16", "float32"] = option(
        "float32", "bfloat16 logits round a log-prob by about 0.02, and cost less", verl="bfloat16"
    )
    """Of the LM head's product, in the ratio's numerator and denominator. Servers have an option of their
    own: engine.sglang.enable-fp32-lm-head."""
    tokens_per_microbatch: Positive = 32768
    """Budget of one packed forward-backward per data-parallel rank; context ranks share it."""
    routing_replay: Literal["off", "rollout", "old"] = option(
        "off", "trainer and engine send tokens to other experts, and a mixture of experts can collapse"
    )
    """Of a mixture of experts: off: in every pass the router chooses. rollout: each token goes to the experts
    that it went to when it was sampled, in the old log-probs and in every update (R3, arXiv:2510.11370). old:
    updates send it where it went in the old log-probs."""
    other_tensors: Literal["leave_out", "refuse"] = "leave_out"
    """Tensors in the model's files that are no part of the language model: a vision tower, layers that guess
    several tokens. What is left out does not learn; exports have it as it was."""
    megatron: dict[str, Any] = example({"recompute_granularity": "selective"}, default={})
    """Fields of Megatron's TransformerConfig, OptimizerConfig and DistributedDataParallelConfig, as they are
    there."""


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
    """The sampler: in process, or servers."""

    kind: Literal["embedded", "sglang"] = "embedded"
    """embedded: a Hugging Face model in the main process, for small ones. sglang: servers."""
    max_concurrent: Positive = 256
    """Samples generated together, by each server."""
    urls: list[str] = example(["http://node7:30000"], default=[])
    """Servers that someone else has started; none: the run starts its own and stops them. An API key, if they
    want one, is in the environment: DAPO_ENGINE_KEY."""
    servers: Positive = 1
    """How many servers the run starts."""
    python: Location | None = example("/opt/sglang/bin/python", default=None)
    """Python of the environment that has SGLang; null: this one."""
    sglang: dict[str, Any] = example({"tp-size": 2, "mem-fraction-static": 0.8}, default={})
    """Server arguments, as on SGLang's command line."""
    weight_sync: Literal["disk", "broadcast", "tensor"] = "broadcast"
    """How weights get to the servers: files; NCCL, or gloo on a CPU; memory of the same host."""
    bucket_mib: Positive = 512
    """Weights travel in buckets of this size, MiB."""
    verify_weights: bool = False
    """After every sync the servers' checksums are compared with the policy's."""
    stall_seconds: AboveZero = 300.0
    """Without any progress on any rank for so long: say who is waited for, keep stacks in run.dir/stalls, and
    ask again for missing responses; at one server: start it again. Twice as long without a response, or in
    one wait of a weight sync: save and stop. Three times as long in a collective, where no rank can save:
    stop."""

    @property
    def limits(self) -> Limits:
        """Times without progress after which a run acts."""
        return Limits(self.stall_seconds)

    @property
    def without_servers(self) -> dict[str, Any]:
        """Options that are set, by name, and are for servers, where there are none; values as in JSON."""
        own = ("urls", "servers", "python", "sglang", "weight_sync", "bucket_mib", "verify_weights")
        values = {} if self.kind == "sglang" else self.model_dump(mode="json", exclude_defaults=True)
        return {name: values[name] for name in own if name in values}

    @property
    def is_streaming(self) -> bool:
        """True if groups are requested ahead and scored as they come; in process, whole rounds gain more."""
        return self.kind == "sglang"


class Eval(Section):
    """Evaluation during a run, and by `dapo eval`."""

    data: Location | dict[str, Location] | None = example("aime.jsonl", {"aime": "aime.jsonl"}, default=None)
    """Same formats as data.train; {name: file} for several sets; null: no evaluation."""
    every: Positive = 5
    """Steps between evaluations; also before the first and after the last."""
    samples: Positive = option(32, "fewer samples, wider intervals", both=32)
    """k responses per problem: mean@k."""
    temperature: AboveZero = option(1.0, "another way to ask", both=1.0)
    """Of evaluation's sampling."""
    top_p: Share = option(0.7, "1.0 measures the distribution that is trained", both=0.7)
    """Of evaluation's sampling: the likeliest tokens that have this share of the probability."""
