"""TRL's GRPOTrainer with loss_type="dapo", as fast as it was found to be: sdpa, static cache, fused AdamW."""

from __future__ import annotations

from typing import Any

from peers import work


def run(task: work.Task, clock: work.Clock) -> None:
    import datasets
    import transformers
    import trl

    tokenizer = transformers.AutoTokenizer.from_pretrained(task.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        task.model, dtype="float32", attn_implementation="sdpa"
    )

    def reward(
        prompts: Any, completions: Any, completion_ids: Any, answer: Any, **others: Any
    ) -> list[float]:
        clock.generated(sum(map(len, completion_ids)))
        return work.rewards(task, completions, completion_ids, answer)

    class Watch(transformers.TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *arguments: Any, **others: Any) -> None:
            clock.start(model.named_parameters())

        def on_step_end(self, arguments: Any, state: Any, control: Any, **others: Any) -> None:
            if state.global_step % task.updates == 0:
                clock.end_step(model.named_parameters)

    options: dict[str, Any] = dict(
        output_dir=f"{task.folder}/trl", seed=task.seed, use_cpu=True, bf16=False,
        report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
        loss_type="dapo", epsilon=0.2, epsilon_high=0.28, beta=0.0, scale_rewards="group",
        num_generations=task.group_size, num_iterations=1, steps_per_generation=task.updates,
        per_device_train_batch_size=task.prompts_per_minibatch * task.group_size,
        gradient_accumulation_steps=1, max_steps=task.updates * task.steps, shuffle_dataset=False,
        learning_rate=task.learning_rate, lr_scheduler_type="constant", optim="adamw_torch_fused",
        weight_decay=task.weight_decay, max_grad_norm=task.clip_grad, gradient_checkpointing=False,
        temperature=1.0, top_p=1.0, top_k=0, max_completion_length=task.max_tokens,
        cache_implementation="static", dataloader_pin_memory=False,
    )  # fmt: skip
    prompts, answers = zip(*task.rows(), strict=True)
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=[reward],
        args=trl.GRPOConfig(**options),
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts, "answer": answers}),
        processing_class=tokenizer,
        callbacks=[Watch()],
    )
    trainer.train()


if __name__ == "__main__":
    import transformers
    import trl

    work.main(run, TRL=trl.__version__, transformers=transformers.__version__)
