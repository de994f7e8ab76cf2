"""Servers of a run, real ones: they start, answer, and leave nothing behind."""

from __future__ import annotations

from tests.sglang.conftest import RunningServer


def test_a_started_server_is_healthy_and_generates(sglang_server: RunningServer) -> None:
    answer = sglang_server.server.post("/generate", {"input_ids": [3, 4, 5], "sampling_params": {"max_new_tokens": 4, "ignore_eos": True}})
    assert len(answer["output_ids"]) == 4
    assert sglang_server.server.get("/model_info")["model_path"] == str(sglang_server.model)
