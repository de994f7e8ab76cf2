"""dapo itself: sampler and policy in one process, as `train()` calls them, with the embedded engine."""

from __future__ import annotations

from peers import work
from peers.arithmetic import make


def run(task: work.Task, clock: work.Clock) -> None:
    from dapo.policy.megatron import Policy

    config, mesh, rollouts, _ = make(task.seed, task.options, f"{task.folder}/run")
    policy = Policy(config, mesh)
    clock.start(policy.weights())
    for step in range(task.steps):
        rollouts.load_weights(policy.weights(), version=step)
        [share] = rollouts.next_batch(step)
        placed = policy.place(share.batch(config.parallel, 0))
        policy.score(placed)
        for minibatch in placed.minibatches:
            policy.update(minibatch)
        clock.generated(int(share.metrics["rollout/tokens"]))
        clock.end_step(policy.weights)


if __name__ == "__main__":
    import transformers

    work.main(run, transformers=transformers.__version__)
