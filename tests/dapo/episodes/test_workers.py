"""Worker processes of environments and tools: what cannot be imported, tools and their faults."""

import json
import re
import time
from types import SimpleNamespace

import pytest

from dapo.config import ConfigError
from dapo.episodes import workers as workers_module
from dapo.episodes.assemble import check_reset
from dapo.episodes.checks import import_environment
from dapo.episodes.tools import schemas
from dapo.episodes.workers import Workers
from dapo.types import EpisodeError, Interrupted
from tests.dapo.episodes.stage import DONE, HERE, Policy, Stage, setup_of
from tests.dapo.episodes.test_faults import matches, worker_pids
from tests.dapo.reward.test_guardian import survivors


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(workers_module, "SILENT", 1.0)


# --- what cannot be used is refused, in one line ---


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("nowhere:Game", "rollout.environment=nowhere:Game.*No module named 'nowhere'"),
        (f"{HERE}:Nothing", "Nothing.*no attribute 'Nothing'"),
        (f"{HERE}:NoStep", "NoStep has no method step; expected a class with reset"),
        (f"{HERE}:NoReset", "NoReset has no method reset; expected a class with reset"),
        (f"{HERE}:act", "act is function; expected a class"),
        (f"{HERE}:Needy", "Needy has to be made without arguments: missing a required argument: 'name'"),
    ],
)
def test_what_is_no_environment_is_refused(path, what):
    with pytest.raises(ConfigError) as caught:
        import_environment(path)
    assert matches(what, str(caught.value)) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["untyped"], "untyped: .*give it types, and a docstring"),
        (["undocumented"], "undocumented: .*a docstring with a line for each argument"),
        (["do", "do"], "another tool is called 'do' too: rename one"),
        (["Obedient"], "Obedient is type; expected a plain function"),
        (["nothing"], "no attribute 'nothing'"),
    ],
)
def test_what_is_no_tool_is_refused(names, what):
    with pytest.raises(ConfigError) as caught:
        schemas([f"{HERE}:{name}" for name in names])
    assert matches(what, str(caught.value)) and "\n" not in str(caught.value)


def test_an_environment_that_workers_cannot_import_is_an_error_and_no_hang():
    with Stage(setup_of("Nothing")) as stage, pytest.raises(ConfigError, match="no attribute 'Nothing'"):
        stage.play([{"steps": []}])


def test_a_module_that_ends_the_process_is_named(tmp_path, monkeypatch):
    (tmp_path / "deadly.py").write_text("import os, sys\nif 'pytest' not in sys.modules:\n    os._exit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    setup = setup_of()._replace(environment="deadly:Game")
    with Stage(setup) as stage, pytest.raises(EpisodeError, match="3 processes ended while it was imported"):
        stage.play([{"steps": []}])


def reset_of(kind: str, rows, is_interrupted=lambda: False):
    workers = Workers(setup_of(kind), 2, 4.0)
    try:
        check_reset(workers, rows, 5, is_interrupted)
    finally:
        workers.close()


@pytest.mark.parametrize(
    ("kind", "row", "what"),
    [
        ("Obedient", {"reset": "differs"}, "reset is not reproducible: for the row .*'differs'"),
        ("Obedient", {"reset": "raise"}, "reset raised ValueError: no such row"),
        ("Obedient", {"reset": "none"}, "reset returned NoneType"),
        ("Obedient", {"reset": "long"}, "beyond data.max_prompt_length=500"),
        ("Stubborn", {}, "its constructor raised OSError: no display"),
    ],
)
def test_an_environment_is_tried_before_the_run(kind, row, what):
    with pytest.raises(ConfigError) as caught:
        reset_of(kind, [{"reset": "seed"}, row])
    assert matches(f"rollout.environment={HERE}:{kind}: .*{what}", str(caught.value))


def test_an_environment_that_begins_alike_twice_is_taken():
    reset_of("Obedient", [{"reset": "seed"}, {}])


def test_the_trial_can_be_interrupted():
    with pytest.raises(Interrupted):
        reset_of("Obedient", [{}], is_interrupted=lambda: True)


# --- tools ---


def call(name: str, **arguments) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


@pytest.fixture(scope="module")
def tooled():
    """`tooled(text, …)`: the episode of a policy that says these, one a turn, and then is done."""
    texts: list[str] = []
    policy = Policy(lambda group, index, turn: texts[turn] if turn < len(texts) else DONE)
    with Stage(setup_of(tools=["do", "await_it", "named", "odd"]), policy) as stage:

        def play(*said):
            texts[:] = said
            return stage.play([None])["0.0"]

        play.stage = stage
        play("hello")
        yield play


def answers(sample) -> list[str]:
    return [m["content"] for m in sample.episode.messages if m["role"] == "tool"]


def test_a_turn_without_calls_ends_the_episode(tooled):
    sample = tooled(DONE)
    assert (sample.finish_reason, sample.text, sample.episode.num_turns) == ("stop", DONE, 1)
    assert sample.episode.prompt_tokens is None, "the prompt has them"


@pytest.mark.parametrize(
    ("said", "answer", "counts"),  # counts: of calls, unreadable and failed ones
    [
        (call("do", command="ok"), "went on", (1, 0, 0)),
        (call("do", command="raise"), "Error: ValueError: no such move", (1, 0, 1)),
        (call("do", command="system"), "Error: SystemExit: 3", (1, 0, 1)),
        (call("do", command="stop"), "Error: StopIteration: StopIteration", (1, 0, 1)),
        (call("do", command="sleep"), "Error: do did not answer in time", (1, 0, 1)),
        (call("do", command="loop"), "Error: do did not answer in time", (1, 0, 1)),
        (call("await_it", seconds=60), "Error: await_it did not answer in time", (1, 0, 1)),
        (call("await_it", seconds=0.01), "waited 0.01", (1, 0, 0)),
        (call("do", order="ok"), "Error: do: missing a required argument: 'command'", (1, 0, 1)),
        (call("undo", command="ok"), "Error: there is no tool 'undo'; there is do, await_it", (1, 0, 1)),
        (call("named", function="x", episode=3), "x 3", (1, 0, 0)),
        (call("odd", kind="number"), "7", (1, 0, 0)),
        (call("odd", kind="dict"), '{"a": [1, 2]}', (1, 0, 0)),
        (call("odd", kind="object"), "a word", (1, 0, 0)),
        (call("odd", kind="set"), '"{1}"', (1, 0, 0)),
        (call("odd", kind="round"), "Error: ValueError: Circular reference detected", (1, 0, 1)),
        (call("odd", kind="keys"), "Error: TypeError: keys must be", (1, 0, 1)),
        (call("odd", kind="surrogate"), "half ?", (1, 0, 0)),
        ('<tool_call>{"name": "do", "arguments": </tool_call>', "Error: the call cannot be read:", (1, 1, 0)),
    ],
    ids=lambda value: value[:50] if isinstance(value, str) else "",
)  # fmt: skip
def test_a_tools_fault_is_read_by_the_policy_and_counted(tooled, said, answer, counts):
    sample = tooled(said)
    assert sample.finish_reason == "stop" and sample.episode.num_turns == 2
    [found] = answers(sample)
    assert found.startswith(answer)
    episode = sample.episode
    assert (episode.num_calls, episode.num_unreadable, episode.num_failed) == counts
    assert episode.num_attempts == 1


def test_a_large_answer_is_cut_and_has_no_room_here(tooled):
    sample = tooled(call("odd", kind="large"))
    assert sample.finish_reason == "length" and len(answers(sample)[0]) <= 8192


def test_several_calls_of_a_turn_are_answered_in_order(tooled):
    said = "".join(call("named", function="n", episode=i) for i in range(3)) + call("await_it", seconds=0.05)
    assert answers(tooled(said)) == ["n 0", "n 1", "n 2", "waited 0.05"]


def test_after_a_call_that_is_late_a_turns_others_are_not_made(tooled):
    """A turn may hold hundreds of calls, each of which may take all its time."""
    start = time.monotonic()
    sample = tooled(call("do", command="sleep") * 4)
    assert time.monotonic() - start < 20
    assert answers(sample)[0] == "Error: do did not answer in time"
    assert answers(sample)[1:] == ["Error: not called, for do did not answer in time"] * 3
    assert sample.episode.num_failed == 4


@pytest.mark.parametrize(
    ("command", "what"),
    [
        ("exit", "the process that ran it ended"),
        ("hold", "it did not answer within rollout.turn_seconds=0.5 and held its process"),
    ],
)
def test_a_tool_that_ends_its_process_has_failed_and_the_episode_goes_on(command, what):
    """What a policy writes cannot make its group leave the step."""
    killer, others = call("do", command=command), call("await_it", seconds=0.2)

    def say(group, index, turn):
        return DONE if turn == 2 else killer if group == 0 and turn == 1 else others

    with Stage(setup_of(tools=["do", "await_it"]), Policy(say)) as stage:
        found = stage.play([None] * 6)
    assert answers(found["0.0"]) == ["waited 0.2", f"Error: {what}"]
    assert all(answers(found[f"{g}.0"]) == ["waited 0.2"] * 2 for g in range(1, 6))
    assert all(sample.episode.num_attempts == 1 for sample in found.values())
    assert found["0.0"].episode.num_failed == 1


def test_a_tool_that_blocks_its_worker_has_failed_and_the_episode_goes_on():
    blocks, others = call("block", seconds=600), call("await_it", seconds=0.1)

    def say(group, index, turn):
        return DONE if turn == 2 else blocks if group == 0 and turn == 1 else others

    with Stage(setup_of(tools=["block", "await_it"]), Policy(say)) as stage:
        found = stage.play([None] * 3)
    [first, second] = answers(found["0.0"])
    assert first == "waited 0.1"
    assert re.search(
        "Error: (block is async and blocks its worker|it did not answer .* held its process)", second
    )
    assert all(answers(found[f"{g}.0"]) == ["waited 0.1"] * 2 for g in (1, 2))
    assert all(sample.episode.num_attempts == 1 for sample in found.values())


def test_a_tool_that_raises_is_named_once_with_its_place(tooled, capfd):
    for _ in range(3):
        tooled(call("do", command="raise"))
    lines = [line for line in capfd.readouterr().err.splitlines() if "do raised ValueError" in line]
    assert len(lines) <= 1  # other tests may have made it raise
    assert all("obedient.py:" in line for line in lines)


def test_an_endless_tool_loop_ends_with_the_last_turn(tooled):
    sample = tooled(*[call("odd", kind="number")] * 20)
    assert (sample.finish_reason, sample.episode.num_turns) == ("length", 6)


# --- the run ends ---


def test_an_interruption_while_an_environment_hangs_ends_soon():
    flag: list[bool] = []
    stage = Stage(setup_of(seconds=600.0), is_interrupted=lambda: bool(flag))
    stream = stage.engine.stream()
    stream.submit(stage.requests([{"steps": ["ok", "sleep"]}] * 3))
    while not any(episode.turns for _, episode in [*stage.engine.players.values()]):
        time.sleep(0.01)
    flag.append(True)
    start = time.monotonic()
    with pytest.raises(Interrupted):
        list(stream.completed())
    pids = worker_pids(stage)
    stage.engine.close()
    assert pids and survivors(pids) == []
    assert time.monotonic() - start < 30, "the call would have taken ten minutes"
    assert stage.policy.is_closed


def test_environments_that_never_let_a_call_be_answered_stop_the_run(monkeypatch):
    monkeypatch.setattr(workers_module, "MOST_DEATHS", 3)
    with Stage(setup_of()) as stage, pytest.raises(EpisodeError, match="4 processes ended and no call was"):
        stage.play([{"steps": [], "reset": "exit"}] * 12)


def test_steps_that_have_always_failed_stop_the_run(monkeypatch):
    monkeypatch.setattr(workers_module, "MOST_FAILURES", 4)
    with Stage(setup_of()) as stage, pytest.raises(EpisodeError, match="first 4 calls of step have failed"):
        stage.play([{"steps": ["raise"]}] * 12)


def test_steps_that_fail_after_one_that_did_not_are_lost_one_by_one(monkeypatch):
    monkeypatch.setattr(workers_module, "MOST_FAILURES", 4)
    with Stage(setup_of()) as stage:
        stage.play([{"steps": ["done"]}])
        assert all(sample.is_lost for sample in stage.play([{"steps": ["raise"]}] * 4).values())


def test_time_in_which_the_whole_job_was_stopped_counts_for_no_call(monkeypatch):
    ahead = [0.0]
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + ahead[0])
    waited, wait = [], workers_module.wait
    with Stage(setup_of(seconds=20.0)) as stage:
        monkeypatch.setattr(workers_module, "time", clock)

        def stopped_once(channels, seconds):
            if not waited and any(worker.calls for worker in stage.workers.workers):
                waited.append(True)
                ahead[0] = 600.0
                return []
            return wait(channels, seconds)

        monkeypatch.setattr(workers_module, "wait", stopped_once)
        found = stage.play([{"steps": ["wait 0.2", "done"]}])["0.0"]
    assert waited and found.reward == 1.25 and found.episode.num_attempts == 1
    assert not stage.workers.warned
