"""The connector with a log of what vLLM tells it, for processes that the test does not see."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pairtrace.engine.vllm.connector import PoolingConnector

LOG = "PAIRTRACE_TEST_LOG"


class RecordingConnector(PoolingConnector):
    def request_finished_all_groups(self, request: Any, block_ids: tuple[list[int], ...]) -> tuple[bool, None]:
        keeps, nothing = super().request_finished_all_groups(request, block_ids)
        blocks = len(block_ids[self._group])
        entry = {"request": request.request_id, "tokens": len(request.prompt_token_ids), "blocks": blocks}
        log(event="finished", **entry, keeps=keeps, preemptions=request.num_preemptions)
        return keeps, nothing

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        for request in scheduler_output.preempted_req_ids or ():
            log(event="preempted", request=request)
        return super().build_connector_meta(scheduler_output)


def log(**entry: Any) -> None:
    with Path(os.environ[LOG]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def recorded(arguments: dict[str, Any]) -> dict[str, Any]:
    """`pooling_arguments` with this connector in the place of the other."""
    names = {"kv_connector": RecordingConnector.__name__, "kv_connector_module_path": __name__}
    return {**arguments, "kv_transfer_config": {**arguments["kv_transfer_config"], **names}}
