"""Seconds and memory to load a file like the published DAPO-Math-17k: 1.79 M rows, each prompt 100 times.

python benchmarks/data_loading.py [rows] [prompts]
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from record import heading, save, spread, table

RUNS = 3
TEMPLATE = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n{}\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)
CHILD = """
import resource, sys, time
import transformers
from pathlib import Path
from dapo import config
from dapo.rollout.prompts import load_prompts
tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained("examples/arithmetic/base")
tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
prompts, summary = load_prompts(Path(sys.argv[1]), tokenizer, config.Data(train=sys.argv[1]))
seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(seconds, before / 2**20, peak / 2**20, summary, sep="|")
"""


def write(path: Path, num_rows: int, num_prompts: int) -> None:
    """Write shuffled rows in the published schema; one prompt in a thousand has copies that disagree."""
    rng = random.Random(0)
    words = [f"w{rng.randrange(10**6)}" for _ in range(3000)]
    questions = [f"{i}: " + " ".join(rng.choices(words, k=rng.randint(15, 80))) for i in range(num_prompts)]
    schema = writer = None
    for first in range(0, num_rows, 100_000):
        rows = []
        for i in range(first, min(first + 100_000, num_rows)):
            q = i % num_prompts if i < num_prompts else rng.randrange(num_prompts)
            answer = str(q * 7919) if q % 1000 or rng.random() < 0.5 else "0"
            rows.append(
                {
                    "data_source": "math_dapo",
                    "prompt": [{"content": TEMPLATE.format(questions[q]), "role": "user"}],
                    "ability": "MATH",
                    "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
                    "extra_info": {"index": f"{i:032x}"},
                }
            )
        batch = pa.Table.from_pylist(rows, schema=schema)
        schema = batch.schema
        writer = writer or pq.ParquetWriter(path, schema)
        writer.write_table(batch)
    assert writer is not None
    writer.close()


def main(num_rows: int, num_prompts: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "train.parquet"
        start = time.perf_counter()
        write(path, num_rows, num_prompts)
        print(f"made {path.stat().st_size / 2**20:.0f} MiB in {time.perf_counter() - start:.0f} s")
        runs = []
        for _ in range(RUNS):
            command = [sys.executable, "-c", CHILD, str(path)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            runs.append(done.stdout.strip().split("\n")[-1].split("|"))
        size = path.stat().st_size / 2**20
    text = heading("Loading 1.79 M rows of 17.4 k prompts")
    summary = runs[-1][3].split("/")[-1]
    text += f"\n{summary}. File: {size:.0f} MiB. {RUNS} runs, each in a process of its own.\n\n"
    text += "Seconds: reading, removing copies, chat template, tokenizer (one token a character). "
    text += "Peak: resident memory of the process.\n\n"
    seconds, before, peak = ([float(run[i]) for run in runs] for i in range(3))
    row = [spread(seconds, 1), spread(peak, 2), spread(before, 2)]
    save("data_loading.md", text + table(["seconds", "peak GiB", "GiB before loading"], [row]))


if __name__ == "__main__":
    main(*(int(x) for x in [*sys.argv[1:], *["1791700", "17400"][len(sys.argv) - 1 :]]))
