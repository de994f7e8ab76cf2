"""Does `dapo mismatch` name what is wrong with a real SGLang server?

python benchmarks/mismatch.py SERVER_PYTHON [CAUSE …, default all]

SERVER_PYTHON: of an environment with SGLang; `make sglang-cpu` prints one. A Qwen3-MoE of random weights, in
float32 on both sides; each cause is planted alone: the servers' Python is given a module that changes SGLang
as it is imported, and stale weights are those of an earlier checkpoint (--sampled-by).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from record import ROOT, heading, save, table

from dapo.measure.attribution import Attribution, Change

CAUSES = ("nothing", "stale weights", "temperature", "head", "routing")
PLANT = '''"""Changes SGLang while it is imported, as PLANT says."""
import importlib.machinery, os, sys, torch

def head(module):
    def with_bfloat16(self, hidden_states, lm_head, *_, **__):
        return (hidden_states.bfloat16() @ lm_head.weight.bfloat16().T).float()
    module.LogitsProcessor._compute_lm_head = with_bfloat16

def temperature(module):
    verify = module.SamplingParams.verify
    def colder(self, *arguments):
        self.temperature *= 0.8
        return verify(self, *arguments)
    module.SamplingParams.verify = colder

def routing(module):
    select, noise = module.select_experts, torch.Generator().manual_seed(0)
    def noisy(*, router_logits, **options):
        drawn = torch.randn(router_logits.shape, generator=noise)
        return select(router_logits=router_logits + 0.3 * drawn, **options)
    module.select_experts = noisy

PLANTS = {
    "head": ("sglang.srt.layers.logits_processor", head),
    "temperature": ("sglang.srt.sampling.sampling_params", temperature),
    "routing": ("sglang.srt.layers.moe.topk", routing),
}
name, change = PLANTS.get(os.environ.get("PLANT", ""), ("", None))

class Finder:
    @staticmethod
    def find_spec(full_name, path=None, target=None):
        if full_name != name:
            return None
        spec = importlib.machinery.PathFinder.find_spec(full_name, path)
        execute = spec.loader.exec_module
        def changed(module):
            execute(module)
            change(module)
        spec.loader.exec_module = changed
        return spec

sys.meta_path.insert(0, Finder)
'''


def dapo(*arguments: str, **environment: str) -> str:
    command = [sys.executable, "-m", "dapo", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stdout[-2000:]}{done.stderr[-3000:]}")
    return done.stdout


def main() -> None:
    python, *wanted = sys.argv[1:]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "plant").mkdir()
        (folder / "plant/sitecustomize.py").write_text(PLANT)
        wrapper = folder / "python"
        paths = f"{folder / 'plant'}:$PYTHONPATH"
        wrapper.write_text(f'#!/bin/sh\nPYTHONPATH="{paths}" exec "{python}" "$@"\n')
        wrapper.chmod(0o755)
        make = "from pathlib import Path; from tests.sglang.conftest import make_model; "
        make += f"make_model(Path({str(folder / 'model')!r}), num_experts=8)"
        subprocess.run([sys.executable, "-c", make], cwd=ROOT, check=True, capture_output=True)
        options = ["examples/arithmetic/config.yaml", f"policy.model={folder / 'model'}", "eval.data=null"]
        options += ["rollout.max_response_length=48", "reward.overlong_cache=8"]
        served = ["engine.kind=sglang", f"engine.python={wrapper}", "engine.max_concurrent=64"]
        text, rows = "", []
        for cause in wanted or CAUSES:
            own = [f"run.dir={folder / cause.replace(' ', '-')}"]
            sampled_by = []
            if cause == "stale weights":  # two checkpoints, a step apart
                steps = ["run.steps=2", "run.save_every=1", "run.keep_checkpoints=2", "optim.lr=0.003"]
                dapo("train", *options, *own, *steps, "rollout.dynamic_sampling=false")
                sampled_by = ["--sampled-by", "1"]
            printed = dapo("mismatch", *options, *served, *own, *sampled_by, PLANT=cause)
            shown = printed[printed.index("64 responses") :].replace(temporary, "…")
            text += f"\n## Planted: {cause}\n\n```\n{shown.strip()}\n```\n"
            print(text, flush=True)
            found = json.loads((folder / cause.replace(" ", "-") / "mismatch.json").read_text())
            result = Attribution(**found | {"changes": [Change(**change) for change in found["changes"]]})
            main = result.main_cause
            named = [main.cause, f"{main.share(result.mean):.0%}"] if main else ["none is named", ""]
            rows.append([cause, f"{result.mean:.2e}", *named])
        head = table(["planted", "mean distance of log-probs", "largest share", "of it"], rows)
        save("mismatch.md", heading("dapo mismatch against a real server") + "\n" + head + text)


if __name__ == "__main__":
    main()
