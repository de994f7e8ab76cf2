"""ms-swift's GRPO trainer with loss_type="dapo", sampling by its transformers engine.

As fast as it was found to be: sdpa, static cache, fused AdamW. With the option "dynamic" it samples
dynamically: it asks further prompts instead of groups whose rewards are all the same. These come from a
second pass over the prompts, in another order, so here both passes are shuffled by ms-swift itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peers import work

# Four rounds of 16 prompts, as many as ours at most: it counts rounds beyond the first, the last is not used.
MAX_RESAMPLE_TIMES = 4


def run(task: work.Task, clock: work.Clock) -> None:
    import transformers
    from swift.arguments import RLHFArguments
    from swift.pipelines.train.rlhf import SwiftRLHF
    from swift.rewards import ORM, orms
    from swift.template import TemplateMeta, register_template

    class Reward(ORM):  # type: ignore[misc]
        def __call__(
            self, completions: Any, answer: Any, response_token_ids: Any, **others: Any
        ) -> list[float]:
            clock.generated(sum(map(len, response_token_ids)))
            return work.rewards(task, completions, response_token_ids, answer)

    class Watch(transformers.TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *arguments: Any, model: Any, **others: Any) -> None:
            clock.start(model.named_parameters())

        def on_step_end(self, arguments: Any, state: Any, control: Any, model: Any, **others: Any) -> None:
            if state.global_step % task.updates == 0:
                clock.end_step(model.named_parameters)

    class Pipeline(SwiftRLHF):  # type: ignore[misc]
        def train(self, trainer: Any) -> None:
            trainer.model.generation_config.cache_implementation = "static"
            trainer.add_callback(Watch())
            trainer.train()

    orms["arithmetic"] = Reward
    # its empty template looks for a letter that the example's tokenizer does not have
    register_template(TemplateMeta("arithmetic", prefix=[], prompt=["{{QUERY}}"], chat_sep=None))

    is_dynamic = "dynamic" in task.options
    rows = list(zip(task.prompts, task.answers, strict=True)) if is_dynamic else task.rows()
    data = Path(task.folder) / "prompts.jsonl"
    lines = [{"messages": [{"role": "user", "content": prompt}], "answer": answer} for prompt, answer in rows]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))

    options: dict[str, Any] = dict(
        rlhf_type="grpo", model=task.model, model_type="qwen2", template="arithmetic", tuner_type="full",
        torch_dtype="float32", attn_impl="sdpa", use_hf=True, check_model=False, use_cpu=True,
        dataset=[str(data)], split_dataset_ratio=0.0, load_from_cache_file=False,
        dataset_shuffle=is_dynamic, train_dataloader_shuffle=is_dynamic, dataloader_num_workers=0,
        output_dir=f"{task.folder}/swift", seed=task.seed, report_to=[], save_strategy="no",
        eval_strategy="no", logging_strategy="no", disable_tqdm=True, bf16=False, fp16=False,
        reward_funcs=["arithmetic"], loss_type="dapo", epsilon=0.2, epsilon_high=0.28, beta=0.0,
        scale_rewards="group", dynamic_sample=is_dynamic, max_resample_times=MAX_RESAMPLE_TIMES,
        num_generations=task.group_size, num_iterations=1, steps_per_generation=task.updates,
        per_device_train_batch_size=task.prompts_per_minibatch * task.group_size,
        gradient_accumulation_steps=1, max_steps=task.updates * task.steps, max_length=128,
        learning_rate=task.learning_rate, lr_scheduler_type="constant", warmup_ratio=0.0,
        optim="adamw_torch_fused", weight_decay=task.weight_decay, adam_beta2=0.999,
        # its loss is divided by the tokens of all of the step's updates
        max_grad_norm=task.clip_grad / task.updates, gradient_checkpointing=False,
        temperature=1.0, top_p=1.0, top_k=-1, max_completion_length=task.max_tokens,
    )  # fmt: skip
    Pipeline(RLHFArguments(**options)).run()


if __name__ == "__main__":
    import swift
    import transformers
    import trl

    versions = {
        "ms-swift": swift.__version__,
        "transformers": transformers.__version__,
        "TRL": trl.__version__,
    }
    work.main(run, **versions)
